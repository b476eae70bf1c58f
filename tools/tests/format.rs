//! Data directories of formats that this build has to read: each below `fixtures/` holds what a node of that format left behind.
//!
//! When a format changes on purpose, raise its version, make a directory beside the old one as docs/format.md says, and name here what
//! becomes of the old one.

use std::fs::{self, OpenOptions};
use std::path::Path;
use std::process::Command;

mod common;
use common::{Node, Reply, directory};

const SEGMENT_BYTES: u64 = 16 << 20;

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a directory");
    for entry in fs::read_dir(from).expect("a fixture") {
        let path = entry.expect("an entry").path();
        let target = to.join(path.file_name().expect("a name"));
        if path.is_dir() {
            copy(&path, &target);
        } else {
            fs::copy(&path, &target).expect("a copy");
        }
    }
}

/// The directory of format 1 in a temporary one; its segments are stored without the zeros at their end.
fn format_1() -> tempfile::TempDir {
    let root = directory();
    copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/format-1/a"), &root.path().join("a"));
    for segment in fs::read_dir(root.path().join("a/log")).expect("a log") {
        let file = OpenOptions::new().write(true).open(segment.expect("an entry").path()).expect("a segment");
        file.set_len(SEGMENT_BYTES).expect("space");
    }
    root
}

fn check(node: &Node) {
    let mut client = node.client();
    let mut ask = |words: &[&str]| client.command(words);
    assert_eq!(ask(&["GET", "greeting"]), Reply::Bulk("hello world".to_owned()));
    assert_eq!(ask(&["GET", "counter"]), Reply::Bulk("42".to_owned()));
    assert_eq!(ask(&["GET", "last"]), Reply::Bulk("1".to_owned()));
    assert_eq!(ask(&["EXISTS", "gone"]), Reply::Integer(0));
    assert_eq!(ask(&["XLEN", "events"]), Reply::Integer(1));
    assert_eq!(ask(&["DBSIZE"]), Reply::Integer(4));
    assert_eq!(ask(&["INCR", "counter"]), Reply::Integer(43));
}

#[test]
fn directory_of_format_1_is_opened() {
    let root = format_1();
    check(&Node::start(root.path(), "a", &[]));
}

#[test]
fn log_of_format_1_rebuilds_the_store() {
    let root = format_1();
    fs::remove_dir_all(root.path().join("a/store")).expect("a store");
    check(&Node::start(root.path(), "a", &[]));
}

#[test]
fn log_of_format_1_verifies() {
    let root = format_1();
    let output = Command::new(env!("CARGO_BIN_EXE_walferry"))
        .args(["log", "verify", "--data"])
        .arg(root.path().join("a"))
        .output()
        .expect("a verdict");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("no damage"), "{text}");
}
