//! `walferry demo warehouse` as its users run it, with a lag that is short.

mod common;

use std::process::Command;

use common::directory;
use serde_json::Value;

#[test]
fn stale_reads_make_duplicates_and_tokens_prevent_them() {
    let root = directory();
    let output = Command::new(env!("CARGO_BIN_EXE_walferry"))
        .args(["demo", "warehouse", "--scans", "40", "--scanners", "8", "--lag", "500ms", "--json", "--dir"])
        .arg(root.path().join("nodes"))
        .env("RUST_LOG", "error")
        .output()
        .expect("the binary starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON on the standard output and nothing else");
    let ways = report["ways"].as_array().expect("three ways");
    let told = |way: &str| ways.iter().find(|told| told["way"] == way).unwrap_or_else(|| panic!("{way} is missing"));
    let number = |way: &str, what: &str| told(way)[what].as_f64().unwrap_or_else(|| panic!("{way} tells no {what}"));
    for way in ["no_tokens", "read_your_own_writes", "remote_apply"] {
        assert_eq!(number(way, "scans"), 40.0);
    }
    assert!(number("no_tokens", "duplicates") > 0.0, "a replica that is behind shows what it has: {report}");
    assert_eq!(number("read_your_own_writes", "duplicates"), 0.0, "{report}");
    assert_eq!(number("remote_apply", "duplicates"), 0.0, "{report}");
    assert!(number("remote_apply", "scan_p50_ms") >= 500.0, "it waits for the replicas: {report}");
    assert!(number("no_tokens", "scan_p50_ms") < number("remote_apply", "scan_p50_ms"), "{report}");
}
