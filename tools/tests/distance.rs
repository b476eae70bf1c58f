//! `walferry distance` as its users run it: what it measures agrees with the distance, and its page stands alone.

mod common;

use std::path::Path;
use std::process::{Command, Output};

use common::{Node, Reply, directory, until};
use serde_json::Value;

fn distance(dir: &Path, flags: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_walferry"))
        .args(["distance", "--dir"])
        .arg(dir.join("nodes"))
        .args(flags)
        .env("RUST_LOG", "error")
        .output()
        .expect("the binary starts")
}

fn report(output: &Output) -> Value {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    serde_json::from_slice(&output.stdout).expect("JSON on the standard output and nothing else")
}

fn point<'a>(profile: &'a Value, level: &str, clients: u64) -> &'a Value {
    let points = profile["points"].as_array().expect("points");
    let found = points.iter().find(|p| p["level"] == level && p["clients"] == clients && p["rate"].is_null());
    found.unwrap_or_else(|| panic!("{level} with {clients} clients is missing"))
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn distance_page_is_complete_and_its_round_trip_is_right() {
    let root = directory();
    let page = root.path().join("report.html");
    let html = page.to_str().expect("a plain path");
    let flags = ["--profile", "near=0,far=20ms", "--levels", "local,remote_apply", "--clients", "1,8", "--json"];
    let report = report(&distance(root.path(), &[&flags[..], &["--html", html, "--model", "40ms"]].concat()));
    let profiles = report["profiles"].as_array().expect("profiles");
    let far = profiles.iter().find(|profile| profile["name"] == "far").expect("it was asked for");
    let rtt_ms = number(&far["rtt"]["p50_us"]) / 1e3;
    assert!(rtt_ms >= 20.0, "{rtt_ms} ms");
    let remote = point(far, "remote_apply", 1);
    assert!(number(&remote["load"]["latency_ms"]["p50"]) >= 20.0, "{remote}");
    assert!(number(&remote["over_rtt_ms"]) >= 0.0 && number(&remote["over_local_ms"]) > 10.0, "{remote}");
    let local = point(far, "local", 1);
    assert!(local["over_rtt_ms"].is_null(), "a local commit does not cross the link");
    let stages = remote["waterfall"]["stages"].as_array().expect("stages");
    let mean = |name: &str| {
        let stage = stages.iter().find(|stage| stage["stage"] == name).expect("a remote commit has it");
        number(&stage["us"]["mean"])
    };
    assert!(mean("network_out") + mean("network_back") >= 20_000.0, "the distance stands where it belongs");
    let loss = |level: &str| {
        let losses = far["losses"].as_array().expect("losses");
        losses.iter().find(|loss| loss["level"] == level).expect("each level has one")["at_most"].clone()
    };
    assert!(loss("remote_apply").is_null(), "nothing is lost");
    assert!(number(&loss("local")["seconds_max"]) >= 0.01, "half a round trip is always on its way");
    assert!(far["points"].as_array().unwrap().iter().any(|p| number_or(&p["rate"]) > 0.0), "an open loop was run");
    assert!(far["rule"].as_array().is_some_and(|rule| rule.len() == 2), "a line for each measured level");
    let model = report["model"].as_array().expect("predictions");
    let asked = model.iter().find(|row| row["profile"] == "40ms" && row["level"] == "remote_apply").expect("asked for");
    assert!(number(&asked["p50_ms"]) >= 40.0 && asked["error"].is_null(), "{asked}");
    let known = model.iter().find(|row| row["profile"] == "far" && row["level"] == "remote_apply").expect("measured");
    assert!(known["error"]["p50"].is_number() && known["from"] == "near", "{known}");

    let page = std::fs::read_to_string(page).expect("the page was written");
    assert!(page.contains("<svg") && page.contains("remote_apply") && page.contains("prefers-color-scheme:dark"));
    for foreign in ["<script", "http:", "https:", "<link", "@import"] {
        assert!(!page.contains(foreign), "the page must not need {foreign}");
    }
}

fn number_or(value: &Value) -> f64 {
    value.as_f64().unwrap_or(0.0)
}

#[test]
fn replicas_live_in_the_namespace_of_a_tun_link() {
    let root = directory();
    let flags = ["--kind", "tun", "--profile", "far=10ms", "--levels", "remote_flush", "--clients", "4", "--json"];
    let output = distance(root.path(), &flags);
    let errors = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        let expected = ["needs root", "/dev/net/tun", "iproute2"].iter().any(|reason| errors.contains(reason));
        assert!(expected, "a tun link fails only where it cannot work: {errors}");
        println!("skipped: {}", errors.trim());
        return;
    }
    let report = report(&output);
    assert_eq!(report["link"], "tun");
    let far = &report["profiles"][0];
    assert!(number(&far["rtt"]["p50_us"]) >= 10_000.0);
    assert!(number(&point(far, "remote_flush", 4)["load"]["latency_ms"]["p50"]) >= 10.0);
}

#[test]
fn nodes_that_already_run_are_measured_as_they_are() {
    let root = directory();
    let leader = Node::start(root.path(), "a", &["--sync", "FIRST 1 (b)"]);
    let alone = distance(root.path(), &["--hosts", &format!("redis://{}", leader.listen)]);
    assert_eq!(alone.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&alone.stderr).contains("has no replicas"), "{alone:?}");
    let replica = Node::start(root.path(), "b", &["--follow", &leader.peer_listen.to_string()]);
    let mut client = leader.client();
    until("the replica streams", || client.command(&["WAIT", "1", "100"]) == Reply::Integer(1));
    let url = format!("redis://{}", leader.listen);
    let flags = ["--hosts", &url, "--levels", "remote_flush", "--clients", "2", "--open-loop=false", "--json"];
    let report = report(&distance(root.path(), &flags));
    assert_eq!((&report["link"], &report["replicas"]), (&"none".into(), &1.into()));
    assert!(number(&report["profiles"][0]["rtt"]["p50_us"]) > 0.0, "the leader measured it");
    assert!(number(&point(&report["profiles"][0], "remote_flush", 2)["load"]["tps"]) > 0.0);
    drop(replica);
}

#[test]
fn what_cannot_be_measured_is_said_before_anything_starts() {
    let root = directory();
    std::fs::create_dir(root.path().join("nodes")).expect("a directory");
    std::fs::write(root.path().join("nodes/precious"), "x").expect("a file");
    for (flags, code, says) in [
        (&["--profile", "moon"][..], 2, "such as paris=9ms"),
        (&["--profile", "rack,rack=2ms"], 2, "--profile rack: named twice"),
        (&["--clients", "0"], 2, "--clients 0: choose 1"),
        (&["--replicas", "99"], 2, "--replicas 99: choose 1"),
        (&["--levels", "sometimes"], 2, "sometimes"),
        (&["--html", "/nowhere/report.html"], 1, "--html /nowhere/report.html"),
        (&["--profile", "rack"], 2, "was not made by a demo or distance"),
    ] {
        let output = distance(root.path(), flags);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{flags:?}: {errors}");
        assert!(errors.contains(says), "{flags:?}: {errors}");
    }
    assert!(root.path().join("nodes/precious").exists(), "what is not ours stays");
}
