//! Snapshots with real nodes: a replica whose place in its leader's log is gone comes back by itself, whatever is killed meanwhile.

mod common;

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use common::{Client, Node, Reply, directory, until, wait_applied};
use serde_json::Value;

/// Small enough to be written in a moment, large enough for several segments.
const VALUE_BYTES: usize = 200_000;
const KEYS: usize = 80;
/// So little log that a replica which misses a round of writes is lost.
const SMALL: [&str; 6] = ["--slot-keep-bytes-max", "17MiB", "--keep-bytes-min", "0", "--checkpoint-bytes", "1MiB"];
/// A copy of KEYS values takes some seconds.
const SLOW: [&str; 2] = ["--snapshot-rate", "4MiB"];

fn value(key: usize, round: usize) -> String {
    let head = format!("{key}-{round}-");
    head.repeat(VALUE_BYTES / head.len())
}

/// Writes every key in rounds `from..to`.
fn write(client: &mut Client, rounds: std::ops::Range<usize>) {
    for round in rounds {
        for key in 0..KEYS {
            let reply = client.command(&["SET", &format!("key{key}"), &value(key, round)]);
            assert_eq!(reply, Reply::Simple("OK".to_owned()), "key{key} in round {round}");
        }
    }
}

fn assert_holds(client: &mut Client, round: usize) {
    for key in 0..KEYS {
        let reply = client.command(&["GET", &format!("key{key}")]);
        assert!(reply == Reply::Bulk(value(key, round)), "key{key} is not of round {round}");
    }
    assert_eq!(client.command(&["DBSIZE"]), Reply::Integer(KEYS as i64));
}

fn info(client: &mut Client, key: &str) -> String {
    let reply = client.command(&["INFO"]);
    let line = reply.text().lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':').map(str::to_owned));
    line.unwrap_or_else(|| panic!("INFO has no {key}"))
}

fn number(client: &mut Client, key: &str) -> u64 {
    info(client, key).trim().parse().expect("a number")
}

fn describe(node: &Node) -> Value {
    serde_json::from_str(node.client().command(&["DESCRIBE"]).text()).expect("JSON")
}

/// Waits until the log of the leader no longer reaches back to where `before` says that it did.
fn wait_recycled(client: &mut Client, before: &str) {
    until("the leader has recycled its log", || {
        // A turn of the node moves retention; a write makes one.
        client.command(&["SET", "key0", &value(0, 0)]);
        info(client, "log_start_lsn") != before
    });
}

fn log_of(root: &Path, name: &str) -> String {
    std::fs::read_to_string(root.join(format!("{name}.log"))).expect("a log")
}

/// Both logs hold the same bytes where both have them, and neither is damaged.
fn assert_same_log(a: &Path, b: &Path) {
    for (data, against) in [(a, b), (b, a)] {
        let output = Command::new(env!("CARGO_BIN_EXE_walferry"))
            .args(["log", "verify", "--data"])
            .arg(data)
            .arg("--against")
            .arg(against)
            .output()
            .expect("the binary starts");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("the same bytes as"), "{output:?}");
    }
}

fn flags<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&SMALL[..], more].concat()
}

/// Waits until the replica holds everything that the leader has, by commits of the leader's.
fn wait_caught_up(leader: &mut Client, replica: &mut Client) {
    let lsn = leader.command(&["LSN"]).text().to_owned();
    wait_applied(replica, &lsn);
}

#[test]
fn new_replica_of_an_old_leader_begins_with_a_snapshot() {
    let root = directory();
    let leader = Node::start(root.path(), "a", &flags(&[]));
    let mut a = leader.client();
    let start = info(&mut a, "log_start_lsn");
    write(&mut a, 0..3);
    wait_recycled(&mut a, &start);
    write(&mut a, 3..4);
    let peer = leader.peer_listen.to_string();
    let replica = Node::start(root.path(), "b", &flags(&["--follow", &peer]));
    let mut b = replica.client();
    // The same connection, before, while and after the copy takes the place of the empty store.
    until("the copy is in place", || number(&mut b, "snapshots_taken") == 1);
    wait_caught_up(&mut a, &mut b);
    assert_holds(&mut b, 3);
    // The log goes on behind it, and a restart finds all of it.
    write(&mut a, 4..5);
    wait_caught_up(&mut a, &mut b);
    replica.kill();
    let replica = Node::start(root.path(), "b", &flags(&["--follow", &peer]));
    let mut b = replica.client();
    wait_caught_up(&mut a, &mut b);
    assert_holds(&mut b, 4);
    assert_eq!(number(&mut b, "snapshots_taken"), 0, "its own log was enough");
    assert_same_log(&leader.data, &replica.data);
    // A second one, from a node that itself began with a copy.
    let data = replica.data.clone();
    leader.kill();
    assert!(matches!(b.command(&["PROMOTE"]), Reply::Integer(_)));
    write(&mut b, 5..6);
    let peer = replica.peer_listen.to_string();
    let third = Node::start(root.path(), "c", &flags(&["--follow", &peer]));
    let mut c = third.client();
    until("the copy is in place", || number(&mut c, "snapshots_taken") == 1);
    wait_caught_up(&mut b, &mut c);
    assert_holds(&mut c, 5);
    assert_same_log(&data, &third.data);
}

/// Values of these keys change little in memory compared with the log that they make.
const RARE_CHECKPOINTS: [&str; 6] =
    ["--slot-keep-bytes-max", "17MiB", "--keep-bytes-min", "0", "--checkpoint-bytes", "64MiB"];

/// A leader that has recycled the beginning of its log, with a checkpoint from before it was started with `flags`.
fn leader_with_recycled_log(root: &Path, flags: &[&str]) -> Node {
    let leader = Node::start(root, "a", &RARE_CHECKPOINTS);
    let mut a = leader.client();
    let start = info(&mut a, "log_start_lsn");
    write(&mut a, 0..2);
    // A stop writes a checkpoint.
    assert_eq!(leader.stop().0, Some(0));
    let leader = Node::start(root, "a", flags);
    wait_recycled(&mut leader.client(), &start);
    leader
}

/// The log behind the newest checkpoint would be longer than slots may hold back: a snapshot of that checkpoint would be given up
/// and made again without an end, although nobody writes any more.
#[test]
fn new_replica_of_a_leader_that_rewrites_keys_gets_a_snapshot() {
    let root = directory();
    let leader = leader_with_recycled_log(root.path(), &RARE_CHECKPOINTS);
    let mut a = leader.client();
    write(&mut a, 2..4);
    let peer = leader.peer_listen.to_string();
    let replica = Node::start(root.path(), "b", &[&RARE_CHECKPOINTS[..], &["--follow", &peer]].concat());
    let mut b = replica.client();
    until("the snapshot is in place", || number(&mut b, "snapshots_taken") == 1);
    wait_caught_up(&mut a, &mut b);
    assert_holds(&mut b, 3);
    assert_same_log(&leader.data, &replica.data);
}

/// The commit LSN stands still until the replica is back, and checkpoints wait for it: only a checkpoint beyond it is fresh enough.
#[test]
fn wiped_replica_that_commits_wait_for_gets_a_fresh_snapshot() {
    let root = directory();
    let leader = leader_with_recycled_log(root.path(), &[&RARE_CHECKPOINTS[..], &["--sync", "ANY 1 (b)"]].concat());
    let peer = leader.peer_listen.to_string();
    let replica_flags = [&RARE_CHECKPOINTS[..], &["--follow", &peer]].concat();
    let replica = Node::start(root.path(), "b", &replica_flags);
    let (mut a, mut b) = (leader.client(), replica.client());
    until("the first snapshot is in place", || number(&mut b, "snapshots_taken") == 1);
    wait_caught_up(&mut a, &mut b);
    replica.kill();
    std::fs::remove_dir_all(root.path().join("b")).expect("its disk is lost");
    write(&mut a, 2..4);
    assert!(log_of(root.path(), "a").contains("a slot is lost"), "the kept log is too long");
    let replica = Node::start(root.path(), "b", &replica_flags);
    let mut b = replica.client();
    until("the snapshot is in place", || number(&mut b, "snapshots_taken") == 1);
    assert_eq!(a.command(&["COMMITLEVEL", "remote_apply"]), Reply::Simple("OK".to_owned()));
    write(&mut a, 4..5);
    assert_holds(&mut b, 4);
    assert_same_log(&leader.data, &replica.data);
}

#[test]
fn snapshot_transfer_survives_kills_of_both_ends() {
    let root = directory();
    let leader_flags = flags(&SLOW);
    let leader = Node::start(root.path(), "a", &leader_flags);
    let peer = leader.peer_listen.to_string();
    let leader_flags = [&leader_flags[..], &["--peer-listen", &peer]].concat();
    let replica_flags = flags(&["--follow", &peer]);
    let replica = Node::start(root.path(), "b", &replica_flags);
    let (mut a, mut b) = (leader.client(), replica.client());
    write(&mut a, 0..1);
    wait_caught_up(&mut a, &mut b);
    replica.kill();
    let start = info(&mut a, "log_start_lsn");
    write(&mut a, 1..4);
    wait_recycled(&mut a, &start);
    write(&mut a, 4..5);

    let half_way = |node: &Node| {
        until("a part of the copy is there", || {
            let copy = &describe(node)["snapshot"];
            copy["phase"] == "copying" && copy["bytes"].as_u64() > Some(5 << 20)
        });
    };
    let replica = Node::start(root.path(), "b", &replica_flags);
    half_way(&replica);
    let described = describe(&replica);
    let blocked_reason = described["blocked_reason"].as_str().expect("text");
    assert!(blocked_reason.contains("receiving a snapshot: ") && blocked_reason.contains(" of "), "{described}");
    let states = describe(&leader)["members"].to_string();
    assert!(states.contains("snapshot "), "{states}");
    // What it had before is still readable; only of the last frame it cannot know that its leader had it durable.
    for key in 0..KEYS - 1 {
        let reply = replica.client().command(&["GET", &format!("key{key}")]);
        assert!(reply == Reply::Bulk(value(key, 0)), "key{key} is not of round 0");
    }
    replica.kill();
    // Of what was verified before it was killed, a bit flips on the disk.
    let incoming = root.path().join("b/snapshot/incoming.redb");
    let file = OpenOptions::new().read(true).write(true).open(&incoming).expect("a part of a copy");
    let mut byte = [0];
    file.read_exact_at(&mut byte, 1 << 20).expect("a byte");
    file.write_all_at(&[byte[0] ^ 1], 1 << 20).expect("a flipped bit");

    let replica = Node::start(root.path(), "b", &replica_flags);
    until("the copy goes on", || describe(&replica)["snapshot"]["kept_bytes"].as_u64() >= Some(4 << 20));
    leader.kill_and_free();
    let leader = Node::start(root.path(), "a", &leader_flags);
    let mut b = replica.client();
    until("the copy is in place", || number(&mut b, "snapshots_taken") == 1);
    let mut a = leader.client();
    wait_caught_up(&mut a, &mut b);
    assert_holds(&mut b, 4);
    let log = log_of(root.path(), "b");
    assert!(log.contains("a piece of the snapshot is damaged here"), "{log}");
    // The pieces before the damaged one did not travel again, and after each kill neither did those that were verified.
    assert_eq!(number(&mut b, "snapshot_kept_bytes"), 1 << 20);
    assert!(log.matches("the snapshot goes on").count() >= 2, "{log}");
    assert_eq!(log.matches("receiving a snapshot").count(), 1, "it began once: {log}");
    write(&mut a, 5..6);
    wait_caught_up(&mut a, &mut b);
    assert_holds(&mut b, 5);
    assert_same_log(&leader.data, &replica.data);
}

#[test]
fn old_leader_beyond_the_fork_rejoins_and_keeps_lost_commits() {
    let root = directory();
    let leader = Node::start(root.path(), "a", &flags(&[]));
    let peer = leader.peer_listen.to_string();
    let replica = Node::start(root.path(), "b", &flags(&["--follow", &peer]));
    let (mut a, mut b) = (leader.client(), replica.client());
    write(&mut a, 0..1);
    wait_caught_up(&mut a, &mut b);
    // b is cut off; a goes on, alone, and writes it all into its store.
    // SAFETY: signals a process that is our child and not yet waited for.
    unsafe { libc::kill(replica.pid() as libc::pid_t, libc::SIGSTOP) };
    let before = info(&mut a, "store_checkpoint_lsn");
    let mut key = 0;
    let mut write_alone = |a: &mut Client| {
        key += 1;
        a.command(&["SET", &format!("alone{}", key % 60), &value(key, 1)]);
    };
    (0..60).for_each(|_| write_alone(&mut a));
    until("a checkpoint holds what b lacks", || {
        write_alone(&mut a);
        number(&mut a, "store_checkpoints") >= 6 && info(&mut a, "store_checkpoint_lsn") != before
    });
    leader.kill();
    // SAFETY: as above.
    unsafe { libc::kill(replica.pid() as libc::pid_t, libc::SIGCONT) };
    until("b leads", || matches!(b.command(&["PROMOTE"]), Reply::Integer(_)));
    b.command(&["SET", "key0", &value(0, 1)]);
    let peer = replica.peer_listen.to_string();
    let again = Node::start(root.path(), "a", &flags(&["--follow", &peer]));
    let mut a = again.client();
    until("the copy is in place", || number(&mut a, "snapshots_taken") == 1);
    wait_caught_up(&mut b, &mut a);
    for key in 0..60 {
        let get = ["GET", &format!("alone{key}")];
        assert_eq!(a.command(&get), b.command(&get));
    }
    assert_eq!(a.command(&["GET", "key0"]), Reply::Bulk(value(0, 1)));
    assert!(describe(&again)["lost_commits"].as_u64() > Some(0), "{}", describe(&again));
    assert!(std::fs::read_dir(again.data.join("lost")).expect("kept").count() >= 1);
    assert_same_log(&again.data, &replica.data);
}
