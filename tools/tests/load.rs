//! The operator's tools against real nodes: load and its check, status, the log of a running node, promote.

mod common;

use std::process::{Command, Stdio};

use common::{Client, Node, Reply, directory};

/// Runs a subcommand to its end; gives its exit code and what it printed.
fn walferry(arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_walferry"));
    let output = command.args(arguments).stdin(Stdio::null()).output().expect("the binary runs");
    let text = |bytes| String::from_utf8(bytes).expect("output is text");
    (output.status.code(), text(output.stdout), text(output.stderr))
}

fn succeeds(arguments: &[&str]) -> String {
    let (code, out, err) = walferry(arguments);
    assert_eq!(code, Some(0), "{arguments:?}: {out}{err}");
    out
}

fn url(node: &Node) -> String {
    format!("redis://{}", node.listen)
}

#[test]
fn sums_agree_on_leader_and_replica_after_load_at_every_level() {
    let root = directory();
    let leader = Node::start(root.path(), "a", &["--sync", "ANY 1 (b)"]);
    let replica = Node::start(root.path(), "b", &["--follow", &leader.peer_listen.to_string()]);
    let (leader_url, replica_url) = (url(&leader), url(&replica));
    succeeds(&["load", "--url", &leader_url, "-i", "--level", "remote_apply"]);
    for level in ["off", "local", "remote_write", "remote_flush", "remote_apply"] {
        let run = ["load", "--url", &leader_url, "-c", "4", "-j", "2", "-t", "25", "--level", level, "--json"];
        let mix = ["-b", "tpcb-like@3", "-b", "simple-update@1", "-b", "select-only@1"];
        let check = ["--check", "--check-url", &replica_url];
        let out = succeeds(&[&run[..], &mix, &check].concat());
        let json: serde_json::Value = serde_json::from_str(&out).expect("JSON");
        assert_eq!(
            (&json["load"]["transactions"], &json["load"]["failed"]),
            (&100.into(), &0.into()),
            "{level}: {out}"
        );
        let nodes = json["check"].as_array().expect("a list of nodes");
        assert_eq!(nodes.len(), 2, "{out}");
        assert!(nodes.iter().all(|node| node["agrees"] == true), "{level}: {out}");
    }
    // One transaction that is not whole: the check has to see it.
    assert!(matches!(leader.client().command(&["INCRBY", "teller:1", "1"]), Reply::Integer(_)));
    let (code, _, err) = walferry(&["load", "--url", &leader_url, "-t", "0", "--check", "--check-url", &replica_url]);
    assert!(code == Some(1) && err.contains("disagree"), "{err}");
}

#[test]
fn status_shows_replicas_and_the_running_log_verifies() {
    let root = directory();
    let leader = Node::start(root.path(), "a", &["--sync", "b", "--commit-level", "remote_apply"]);
    let replica = Node::start(root.path(), "b", &["--follow", &leader.peer_listen.to_string()]);
    let mut client = leader.client();
    for number in 0..50 {
        assert_eq!(client.command(&["SET", &format!("k{number}"), "v"]), Reply::Simple("OK".into()));
    }
    let text = succeeds(&["status", "--url", &url(&leader)]);
    assert!(text.starts_with("a at ") && text.contains("leader"), "{text}");
    assert!(text.contains("remote_apply") && text.contains("streaming"), "{text}");
    let json: serde_json::Value =
        serde_json::from_str(&succeeds(&["status", "--json", "--url", &url(&leader)])).expect("JSON");
    assert_eq!(json["replicas"][0]["name"], "b");
    assert_eq!(json["replicas"][0]["lag_bytes"], 0, "{json:#}");
    assert!(succeeds(&["status", "--url", &url(&replica)]).contains("replica"));
    for node in [&leader, &replica] {
        let data = node.data.to_str().expect("a path of text");
        assert!(succeeds(&["log", "verify", "--data", data]).contains("no damage"));
        let dump = succeeds(&["log", "dump", "--data", data, "--records"]);
        assert!(dump.contains("put \"k49\" \"v\""), "{dump}");
    }
}

#[test]
fn promote_makes_a_replica_the_leader() {
    let root = directory();
    let leader = Node::start(root.path(), "a", &["--sync", "b", "--commit-level", "remote_apply"]);
    let replica = Node::start(root.path(), "b", &["--follow", &leader.peer_listen.to_string()]);
    assert_eq!(leader.client().command(&["SET", "k", "v"]), Reply::Simple("OK".into()));
    let (code, _, err) = walferry(&["promote", "--url", &url(&leader)]);
    assert_eq!(code, Some(1), "a leader cannot be promoted: {err}");
    leader.kill();
    let out = succeeds(&["promote", "--url", &url(&replica)]);
    assert!(out.contains("leads, epoch"), "{out}");
    let mut client: Client = replica.client();
    client.command(&["COMMITLEVEL", "local"]);
    assert_eq!(client.command(&["SET", "k", "w"]), Reply::Simple("OK".into()));
}
