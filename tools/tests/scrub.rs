//! The scrubber with real nodes: a bit that flips in old log of a running replica, which no recovery and no catch-up reads, is
//! found, given back by the leader, and told in the log, in INFO and to Prometheus.

mod common;

use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use common::{Client, Node, Reply, directory, lsn_bytes, until, wait_applied};

const VALUE_BYTES: usize = 200_000;
/// Two segments and a half.
const KEYS: usize = 200;
const SEGMENT_BYTES: u64 = 16 << 20;
const SMALL: [&str; 2] = ["--checkpoint-bytes", "1MiB"];

fn info(client: &mut Client, key: &str) -> String {
    let reply = client.command(&["INFO"]);
    let line = reply.text().lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':').map(str::to_owned));
    line.unwrap_or_else(|| panic!("INFO has no {key}"))
}

/// A leader with some segments of log, and a replica whose store holds all of the first two.
fn pair(root: &Path, replica_flags: &[&str]) -> (Node, Node) {
    let leader = Node::start(root, "a", &SMALL);
    let peer = leader.peer_listen.to_string();
    let replica = Node::start(root, "b", &[&["--follow", &peer][..], &SMALL, replica_flags].concat());
    let (mut a, mut b) = (leader.client(), replica.client());
    let value = "v".repeat(VALUE_BYTES);
    for key in 0..KEYS {
        assert_eq!(a.command(&["SET", &format!("key{key}"), &value]), Reply::Simple("OK".to_owned()));
    }
    wait_applied(&mut b, a.command(&["LSN"]).text());
    until("the replica's store holds two segments of log", || {
        // A turn of the node moves checkpoints; a write makes one.
        a.command(&["SET", "turn", "x"]);
        lsn_bytes(&info(&mut b, "store_checkpoint_lsn")) >= 2 * SEGMENT_BYTES
    });
    (leader, replica)
}

fn flip(segment: &Path, at: u64) {
    let file = OpenOptions::new().read(true).write(true).open(segment).expect("a segment");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("a byte");
    file.write_all_at(&[byte[0] ^ 1], at).expect("a flipped bit");
}

fn metrics(address: SocketAddr) -> String {
    let mut socket = TcpStream::connect(address).expect("a connection");
    socket.write_all(b"GET /metrics HTTP/1.1\r\nConnection: close\r\n\r\n").expect("written");
    let mut page = String::new();
    socket.read_to_string(&mut page).expect("a page");
    page
}

fn assert_repaired(root: &Path, leader: &Node, replica: &Node, segment: &str) {
    let log = fs::read_to_string(root.join("b.log")).expect("a log");
    let damage = log.lines().find(|line| line.contains("damage in durable log")).unwrap_or_else(|| panic!("{log}"));
    assert!(damage.contains(segment) && damage.contains("LSN 0/"), "{damage}");
    let told = format!("{segment} from {}", leader.peer_listen);
    assert!(log.lines().any(|line| line.contains("repaired 0/") && line.ends_with(&told)), "{told}:\n{log}");
    let of = |node: &Node| fs::read(node.data.join("log").join(segment)).expect("a segment");
    assert!(of(leader) == of(replica), "the segment is the leader's again");
    assert_eq!(fs::read_dir(replica.data.join("damaged")).expect("kept").count(), 1);
    let mut command = Command::new(env!("CARGO_BIN_EXE_walferry"));
    let output = command.args(["log", "verify", "--data"]).arg(&replica.data).output().expect("the binary starts");
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn a_bit_that_flips_under_a_running_replica_is_found_and_mended() {
    let root = directory();
    let (leader, replica) = pair(root.path(), &["--scrub-interval", "200ms", "--metrics-listen", "127.0.0.1:0"]);
    let mut b = replica.client();
    assert_eq!(info(&mut b, "log_repaired_ranges"), "0");
    let segment = "0000000000000000.wal";
    flip(&replica.data.join("log").join(segment), SEGMENT_BYTES / 2);
    until("INFO tells of the repair", || info(&mut b, "log_repaired_ranges") == "1");
    let bytes = info(&mut b, "log_repaired_bytes");
    assert!(bytes.parse::<u64>().expect("a number") >= 4096, "{bytes}");
    let page = metrics(replica.metrics_listen.expect("asked for"));
    assert!(page.lines().any(|line| line.starts_with("walferry_log_repaired_ranges_total") && line.ends_with(" 1")));
    assert_repaired(root.path(), &leader, &replica, segment);
}

/// What is left was prepared for later, and is no log that begins there.
#[test]
fn start_without_any_written_segment_is_repaired() {
    let root = directory();
    // More than the log is long: the store is still of 0/0.
    let flags = ["--checkpoint-bytes", "256MiB", "--segment-bytes", "16MiB"];
    let leader = Node::start(root.path(), "a", &flags);
    let peer = leader.peer_listen.to_string();
    let flags = [&["--follow", &peer][..], &flags].concat();
    let mut a = leader.client();
    let value = "v".repeat(VALUE_BYTES);
    // One segment, then two.
    for (round, keys) in [20, 100].into_iter().enumerate() {
        let replica = Node::start(root.path(), "b", &flags);
        for key in 0..keys {
            assert_eq!(a.command(&["SET", &format!("key{round}.{key}"), &value]), Reply::Simple("OK".to_owned()));
        }
        wait_applied(&mut replica.client(), a.command(&["LSN"]).text());
        let log = replica.data.join("log");
        let end = lsn_bytes(a.command(&["LSN"]).text());
        replica.kill();
        let written = (0..=end / SEGMENT_BYTES).map(|number| log.join(format!("{number:016x}.wal")));
        assert_eq!(written.map(|file| fs::remove_file(file).expect("written")).count(), round + 1);
        assert_ne!(fs::read_dir(&log).expect("a directory").count(), 0, "prepared ones are left");
        let replica = Node::try_start(root.path(), "b", &flags).unwrap_or_else(|log| panic!("the first start:\n{log}"));
        wait_applied(&mut replica.client(), a.command(&["LSN"]).text());
        assert_eq!(info(&mut replica.client(), "snapshots_taken"), "0", "the log was given back");
        assert_eq!(replica.stop().0, Some(0));
    }
}

/// What no recovery reads, for the store holds it already.
#[test]
fn damage_in_old_log_is_mended_after_a_start() {
    let root = directory();
    let (leader, replica) = pair(root.path(), &[]);
    let (data, peer) = (replica.data.clone(), leader.peer_listen.to_string());
    assert_eq!(replica.stop().0, Some(0));
    let segment = "0000000000000001.wal";
    flip(&data.join("log").join(segment), SEGMENT_BYTES / 3);
    let replica = Node::start(root.path(), "b", &[&["--follow", &peer][..], &SMALL].concat());
    let mut b = replica.client();
    until("INFO tells of the repair", || info(&mut b, "log_repaired_ranges") == "1");
    assert_repaired(root.path(), &leader, &replica, segment);
}

/// The leader knows nobody who could give it back, but its store is whole.
#[test]
fn who_needs_log_that_is_damaged_for_good_gets_a_snapshot() {
    let root = directory();
    let (leader, replica) = pair(root.path(), &[]);
    let mut a = leader.client();
    until("the leader's store holds two segments of log", || {
        a.command(&["SET", "turn", "x"]);
        lsn_bytes(&info(&mut a, "store_checkpoint_lsn")) >= 2 * SEGMENT_BYTES
    });
    drop(replica);
    // Nothing of it is in memory any more.
    assert_eq!(leader.stop().0, Some(0));
    let leader = Node::start(root.path(), "a", &SMALL);
    let peer = leader.peer_listen.to_string();
    flip(&leader.data.join("log").join("0000000000000000.wal"), SEGMENT_BYTES / 2);
    let late = Node::start(root.path(), "c", &[&["--follow", &peer][..], &SMALL].concat());
    let mut c = late.client();
    until("a snapshot takes the place of the log", || info(&mut c, "snapshots_taken") == "1");
    assert_eq!(c.command(&["STRLEN", "key0"]), Reply::Integer(VALUE_BYTES as i64));
    let log = fs::read_to_string(root.path().join("a.log")).expect("a log");
    assert!(log.contains("the old log is damaged, replicas that need it before 0/1000000 get a snapshot"), "{log}");
}

/// Thousands of frames beside each other are lost with one segment: they are one gap, whatever each of them is.
#[test]
fn hole_of_many_small_frames_is_repaired_as_one_range() {
    let root = directory();
    let leader = Node::start(root.path(), "a", &SMALL);
    let peer = leader.peer_listen.to_string();
    let replica = Node::start(root.path(), "b", &[&["--follow", &peer][..], &SMALL].concat());
    let (mut a, mut b) = (leader.client(), replica.client());
    // One commit at a time has a frame of one page for itself.
    for _ in 0..SEGMENT_BYTES / 4096 + 100 {
        assert_eq!(a.command(&["SET", "key", "small"]), Reply::Simple("OK".to_owned()));
    }
    assert!(lsn_bytes(a.command(&["LSN"]).text()) > SEGMENT_BYTES);
    let value = "v".repeat(VALUE_BYTES);
    until("the replica's store holds a segment of log", || {
        a.command(&["SET", "turn", &value]);
        lsn_bytes(&info(&mut b, "store_checkpoint_lsn")) > SEGMENT_BYTES
    });
    let data = replica.data.clone();
    assert_eq!(replica.stop().0, Some(0));
    let segment = "0000000000000000.wal";
    let file = OpenOptions::new().write(true).open(data.join("log").join(segment)).expect("a segment");
    file.set_len(0).expect("cut");
    let replica = Node::start(root.path(), "b", &[&["--follow", &peer][..], &SMALL].concat());
    let mut b = replica.client();
    until("INFO tells of the repair", || info(&mut b, "log_repaired_ranges") != "0");
    assert_eq!(info(&mut b, "log_repaired_ranges"), "1");
    let of = |node: &Node| fs::read(node.data.join("log").join(segment)).expect("a segment");
    assert!(of(&leader) == of(&replica), "the segment is the leader's again");
    let kept = fs::read_dir(data.join("damaged")).expect("kept").count();
    assert!(kept <= 2, "{kept} files are kept of one gap");
}
