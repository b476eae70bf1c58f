//! A remote commit level that nobody confirms is never silently a local one: it is refused, or the evidence names the level that
//! was met; and the sync policy of a static pair goes with its leadership.

mod common;

use std::path::Path;
use std::process::{Command, Stdio};

use common::cluster::Cluster;
use common::{Client, Node, Reply, directory, until};

fn ok() -> Reply {
    Reply::Simple("OK".to_owned())
}

/// Runs the binary to its end: its exit code, and what it says.
fn run(arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_walferry"));
    let output = command.args(arguments).stdin(Stdio::null()).output().expect("the binary runs");
    (output.status.code(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
}

/// An error reply that says all of this.
fn refused(reply: &Reply, says: &[&str]) {
    let Reply::Error(text) = reply else { panic!("{reply:?} should be an error that says {says:?}") };
    assert!(says.iter().all(|word| text.contains(word)), "{text} should say {says:?}");
}

/// What COMMITINFO tells of one field.
fn evidence(client: &mut Client, field: &str) -> Reply {
    let Reply::Array(items) = client.command(&["COMMITINFO"]) else { panic!("COMMITINFO answers with a map") };
    let at = items.iter().position(|item| *item == Reply::Bulk(field.to_owned())).expect("the field is there");
    items[at + 1].clone()
}

/// Level asked for, level met, confirmed.
fn met(client: &mut Client) -> (String, String, Reply) {
    let [level, met] = ["level", "met"].map(|field| evidence(client, field).text().to_owned());
    (level, met, evidence(client, "confirmed"))
}

fn told(level: &str, met: &str) -> (String, String, Reply) {
    (level.to_owned(), met.to_owned(), Reply::Integer(i64::from(level == met)))
}

fn policy(node: &Node) -> String {
    let text = node.client().command(&["DESCRIBE"]).text().to_owned();
    let described: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    described["policy"].as_str().unwrap_or_else(|| panic!("a policy in {text}")).to_owned()
}

fn start_refused(root: &Path, name: &str, flags: &[&str], says: &[&str]) {
    let data = root.join(name).display().to_string();
    let common = ["start", "--data", &data, "--name", name, "--listen", "127.0.0.1:0", "--peer-listen", "127.0.0.1:0"];
    let (code, text) = run(&[&common[..], flags].concat());
    assert_eq!(code, Some(2), "{flags:?}: {text}");
    assert!(says.iter().all(|word| text.contains(word)), "{flags:?} should say {says:?}: {text}");
}

#[test]
fn remote_level_without_a_policy_is_refused() {
    let root = directory();
    let says = ["commit_level = remote_flush", "no sync policy", "--sync 'ANY 1 (*)'", "commit_level = local"];
    start_refused(root.path(), "a", &["--commit-level", "remote_flush"], &says);
    assert!(!root.path().join("a").exists(), "a start that is refused makes nothing");

    let leader = Node::start(root.path(), "a", &[]);
    // A replica that nobody has to wait for confirms nothing that counts.
    let _replica = Node::start(root.path(), "b", &["--follow", &leader.peer_listen.to_string()]);
    let mut client = leader.client();
    for level in ["remote_write", "remote_flush", "remote_apply"] {
        let says = ["NOREPLICAS", level, "no sync policy", "--sync 'ANY 1 (*)'", "COMMITLEVEL local"];
        refused(&client.command(&["COMMITLEVEL", level]), &says);
    }
    assert_eq!(client.command(&["SET", "k", "v"]), ok());
    assert_eq!(met(&mut client), told("local", "local"));
    let url = format!("redis://{}", leader.listen);
    let (code, text) = run(&["load", "--url", &url, "-b", "append", "-t", "1", "--level", "remote_flush"]);
    assert!(code != Some(0) && text.contains("no sync policy"), "{code:?}: {text}");
}

#[test]
fn degraded_commits_tell_the_level_that_was_met() {
    let root = directory();
    let flags = ["--sync", "ANY 1 (b)", "--on-sync-loss", "degrade:local", "--commit-level", "remote_apply"];
    let leader = Node::start(root.path(), "a", &flags);
    let mut client = leader.client();
    until("it degrades", || client.command(&["SET", "k", "v"]) == ok());
    assert_eq!(met(&mut client), told("remote_apply", "local"));
    let _replica = Node::start(root.path(), "b", &["--follow", &leader.peer_listen.to_string()]);
    until("the replica confirms", || {
        assert_eq!(client.command(&["SET", "k", "v"]), ok());
        met(&mut client) == told("remote_apply", "remote_apply")
    });

    // The operator's word holds without a policy, too.
    let alone = Node::start(root.path(), "c", &["--on-sync-loss", "degrade:local", "--commit-level", "remote_flush"]);
    let mut client = alone.client();
    assert_eq!(client.command(&["SET", "k", "v"]), ok());
    assert_eq!(met(&mut client), told("remote_flush", "local"));
}

/// ALL asks the members of the in-sync set: while there is none, that is nobody.
#[test]
fn commit_that_an_empty_in_sync_set_confirmed_was_met_locally() {
    let root = directory();
    let leader = Node::start(root.path(), "a", &["--sync", "ALL"]);
    let mut client = leader.client();
    assert_eq!(client.command(&["COMMITLEVEL", "remote_flush"]), ok());
    assert_eq!(client.command(&["SET", "k", "v"]), ok());
    assert_eq!(met(&mut client), told("remote_flush", "local"));
}

#[test]
fn sync_policy_goes_with_the_leadership_of_a_pair() {
    let root = directory();
    let levels = ["--commit-level", "remote_flush"];
    let old = Node::start(root.path(), "a", &[&["--sync", "ANY 1 (b)"][..], &levels].concat());
    let replica = Node::start(root.path(), "b", &[&["--follow", &old.peer_listen.to_string()][..], &levels].concat());
    assert_eq!(old.client().command(&["SET", "k", "1"]), ok());
    old.kill();

    let mut client = replica.client();
    assert!(matches!(client.command(&["PROMOTE"]), Reply::Integer(_)));
    assert_eq!(policy(&replica), "ANY 1 (a)", "the old leader stands where the new one stood");
    client.command(&["COMMITTIMEOUT", "100"]);
    refused(&client.command(&["SET", "k", "2"]), &["UNCERTAIN", "ANY 1 (a)", "remote_flush"]);
    assert_eq!(met(&mut client), ("remote_flush".to_owned(), "local".to_owned(), Reply::Integer(0)));
    let back = Node::start(root.path(), "a", &["--follow", &replica.peer_listen.to_string()]);
    client.command(&["COMMITTIMEOUT", "0"]);
    assert_eq!(client.command(&["SET", "k", "3"]), ok());
    assert_eq!(met(&mut client), told("remote_flush", "remote_flush"));

    // It outlives a restart, until the options name another.
    replica.kill();
    let again = Node::start(root.path(), "b", &levels);
    assert_eq!(policy(&again), "ANY 1 (a)");
    again.kill();
    let named = Node::start(root.path(), "b", &[&["--sync", "ANY 1 (c)"][..], &levels].concat());
    assert_eq!(policy(&named), "ANY 1 (c)");
    named.kill();
    start_refused(root.path(), "b", &[&["--sync", ""][..], &levels].concat(), &["no sync policy"]);

    // And back: what b says as a leader replaces what a had.
    let leader = Node::start(root.path(), "b", &["--sync", "ALL"]);
    back.kill();
    let back = Node::start(root.path(), "a", &["--follow", &leader.peer_listen.to_string()]);
    let streams = |node: &Node| node.client().command(&["GET", "last"]) == Reply::Bulk("1".to_owned());
    assert_eq!(leader.client().command(&["SET", "last", "1"]), ok());
    until("it streams", || streams(&back));
    leader.kill();
    assert!(matches!(back.client().command(&["PROMOTE"]), Reply::Integer(_)));
    assert_eq!(policy(&back), "ALL");
}

/// A promotion takes the leadership over with its policy; `--become leader` begins one of the operator's own.
#[test]
fn policy_of_a_former_leader_does_not_hold_after_become_leader() {
    let root = directory();
    let old = Node::start(root.path(), "a", &["--sync", "ANY 1 (b)"]);
    let replica = Node::start(root.path(), "b", &["--follow", &old.peer_listen.to_string()]);
    assert_eq!(old.client().command(&["SET", "k", "1"]), ok());
    until("it streams", || replica.client().command(&["GET", "k"]) == Reply::Bulk("1".to_owned()));
    replica.kill();
    old.kill();
    let become_leader = ["--become", "leader"];
    let remote = [&become_leader[..], &["--commit-level", "remote_flush"]].concat();
    start_refused(root.path(), "b", &remote, &["no sync policy", "--sync 'ANY 1 (*)'"]);
    let leader = Node::start(root.path(), "b", &become_leader);
    assert_eq!(policy(&leader), "");
    assert_eq!(leader.client().command(&["SET", "k", "2"]), ok());
    leader.kill();
    // Nor later, when the flag is gone.
    let leader = Node::start(root.path(), "b", &[]);
    assert_eq!(policy(&leader), "");
    let log = std::fs::read_to_string(root.path().join("b.log")).expect("its log");
    assert!(log.contains("ANY 1 (b)") && log.contains("does not hold here"), "{log}");
}

#[test]
fn cluster_of_one_refuses_remote_levels_until_another_joins() {
    let mut cluster = Cluster::start(&["a"], &[]);
    let mut client = cluster.client("a");
    refused(&client.command(&["COMMITLEVEL", "remote_flush"]), &["NOREPLICAS", "walferry join", "COMMITLEVEL local"]);
    cluster.add("b");
    let join = ["join", "--name", "b", "--url", &cluster.url("a")];
    until("the leader takes it in", || cluster.run(&join).is_ok());
    assert_eq!(client.command(&["COMMITLEVEL", "remote_flush"]), ok());
    assert_eq!(client.command(&["SET", "k", "v"]), ok());
    assert_eq!(met(&mut client), told("remote_flush", "remote_flush"));
}
