//! `kill -9` in a loop: real processes die at moments that a seed draws, under load at every level, with segments, checkpoints and
//! slots so small that kills fall into rollovers, checkpoints, catch-ups and snapshots. A checker has every key that was sent
//! and every one that was acknowledged, with its level. 20 rounds, or as many as WALFERRY_CRASH_ROUNDS says; the seed is printed,
//! and WALFERRY_CRASH_SEED repeats its draws (not the machine's timing).

mod common;

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::cluster::Cluster;
use common::{Client, Node, Reply, directory, until};

const ROUNDS_DEFAULT: u64 = 20;
/// Acknowledgements between two kills.
const ACKNOWLEDGED_MAX: u64 = 250;
/// The writers go on while nodes come back, up to so many acknowledgements a round: what a node reads at its start and copies for
/// others stays of a size that says nothing about the machine.
const ALLOWED_A_ROUND: u64 = 1000;
const FILLER_BYTES: usize = 1000;
/// MGET asks for so many keys at once.
const BATCH: usize = 200;
const LEVELS: [&str; 4] = ["off", "local", "remote_flush", "remote_apply"];
const SMALL: [&str; 6] = ["--checkpoint-bytes", "1MiB", "--keep-bytes-min", "0", "--slot-keep-bytes-max", "17MiB"];

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

/// SplitMix64.
struct Draws(u64);

impl Draws {
    fn new(test: &str) -> Draws {
        let clock = || SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_nanos() as u64;
        let seed = from_environment("WALFERRY_CRASH_SEED").unwrap_or_else(clock);
        println!("{test}: WALFERRY_CRASH_SEED={seed}");
        Draws(seed)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ z >> 31) % bound
    }
}

fn rounds() -> u64 {
    from_environment("WALFERRY_CRASH_ROUNDS").unwrap_or(ROUNDS_DEFAULT)
}

fn value(key: &str) -> String {
    format!("{key} {}", "x".repeat(FILLER_BYTES))
}

/// What the checker knows.
#[derive(Default)]
struct Record {
    sent: Mutex<Vec<String>>,
    /// Keys by the level at which they were acknowledged.
    acknowledged: [Mutex<Vec<String>>; 4],
    count: AtomicU64,
    stop: AtomicBool,
    /// The count may rise to this.
    allowed: Mutex<u64>,
    more_allowed: Condvar,
}

impl Record {
    fn acknowledged(&self, level: usize) -> Vec<String> {
        self.acknowledged[level].lock().unwrap().clone()
    }

    /// One writer; no key is ever sent twice.
    fn write(&self, writer: usize, level: usize, addresses: &[SocketAddr]) {
        let (mut at, mut number) = (writer, 0);
        while !self.stop.load(Ordering::Relaxed) {
            at += 1;
            let Ok(mut client) = Client::connect(addresses[at % addresses.len()]) else {
                std::thread::yield_now();
                continue;
            };
            client.give_up_after(Duration::from_millis(1000));
            if client.try_command(&["COMMITLEVEL", LEVELS[level]]).is_err() {
                continue;
            }
            while self.may_write() {
                let key = format!("{}:{writer}:{number}", LEVELS[level]);
                number += 1;
                self.sent.lock().unwrap().push(key.clone());
                let Ok(Reply::Simple(_)) = client.try_command(&["SET", &key, &value(&key)]) else { break };
                self.acknowledged[level].lock().unwrap().push(key);
                self.count.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Waits until this round allows another write; false at the end.
    fn may_write(&self) -> bool {
        let beyond =
            |allowed: &mut u64| self.count.load(Ordering::Relaxed) >= *allowed && !self.stop.load(Ordering::Relaxed);
        drop(self.more_allowed.wait_while(self.allowed.lock().unwrap(), beyond).unwrap());
        !self.stop.load(Ordering::Relaxed)
    }

    /// Lets the writers go on, and waits for so many acknowledgements.
    fn wait_for(&self, more: u64) {
        *self.allowed.lock().unwrap() = self.count.load(Ordering::Relaxed) + ALLOWED_A_ROUND;
        self.more_allowed.notify_all();
        let target = self.count.load(Ordering::Relaxed) + more;
        until("the load goes on", || self.count.load(Ordering::Relaxed) >= target);
    }
}

struct Load {
    record: Arc<Record>,
    writers: Vec<std::thread::JoinHandle<()>>,
}

impl Load {
    fn start(levels: &[usize], addresses: &[SocketAddr]) -> Load {
        let record = Arc::new(Record::default());
        let start = |(writer, level): (usize, &usize)| {
            let (record, level, addresses) = (Arc::clone(&record), *level, addresses.to_vec());
            std::thread::spawn(move || record.write(writer, level, &addresses))
        };
        Load { writers: levels.iter().enumerate().map(start).collect(), record }
    }

    fn finish(self) -> Arc<Record> {
        {
            let _waiting = self.record.allowed.lock().unwrap();
            self.record.stop.store(true, Ordering::Relaxed);
        }
        self.record.more_allowed.notify_all();
        self.writers.into_iter().for_each(|writer| writer.join().expect("a writer does not panic"));
        self.record
    }
}

/// Which of these keys are there; what is there is what was sent.
fn there(client: &mut Client, keys: &[String]) -> Vec<bool> {
    let mut found = Vec::new();
    for chunk in keys.chunks(BATCH) {
        let words: Vec<&str> = ["MGET"].into_iter().chain(chunk.iter().map(String::as_str)).collect();
        let Reply::Array(values) = client.command(&words) else { panic!("MGET answers with an array") };
        for (key, found_value) in chunk.iter().zip(values) {
            let is_there = found_value != Reply::Nil;
            assert!(!is_there || found_value == Reply::Bulk(value(key)), "{key} has another value than was sent");
            found.push(is_there);
        }
    }
    found
}

fn assert_all_there(client: &mut Client, keys: &[String], what: &str) {
    let found = there(client, keys);
    let lost: Vec<&String> = keys.iter().zip(&found).filter(|(_, found)| !**found).map(|(key, _)| key).collect();
    assert!(lost.is_empty(), "{what}: {} of {} acknowledged keys are lost: {lost:?}", lost.len(), keys.len());
}

/// Every key of the node is one that was sent. `extra` were set by the test itself.
fn assert_nothing_else(client: &mut Client, record: &Record, extra: i64, what: &str) {
    let sent = record.sent.lock().unwrap().clone();
    let found = there(client, &sent).into_iter().filter(|found| *found).count();
    assert_eq!(client.command(&["DBSIZE"]), Reply::Integer(found as i64 + extra), "{what}: keys that nobody sent");
}

fn verify(data: &Path) {
    let output = Command::new(env!("CARGO_BIN_EXE_walferry")).args(["log", "verify", "--data"]).arg(data).output();
    let output = output.expect("the binary starts");
    assert!(output.status.success(), "log verify: {output:?}");
}

#[test]
fn one_node_keeps_what_it_acknowledged_whenever_it_is_killed() {
    let mut draws = Draws::new("one node");
    let root = directory();
    // Its addresses stay the same, so that the writers find it again.
    let node = Node::start(root.path(), "a", &SMALL);
    let (listen, peer) = (node.listen.to_string(), node.peer_listen.to_string());
    let flags = [&SMALL[..], &["--listen", &listen, "--peer-listen", &peer]].concat();
    let load = Load::start(&[0, 1, 1], &[node.listen]);
    let mut node = Some(node);
    for round in 0..rounds() {
        load.record.wait_for(1 + draws.below(ACKNOWLEDGED_MAX));
        // What is acknowledged from here on may be lost no less, but this is known to have been before the kill.
        let promised = load.record.acknowledged(1);
        let data = node.as_ref().expect("it runs").data.clone();
        node.take().expect("it runs").kill();
        verify(&data);
        let again = Node::start(root.path(), "a", &flags);
        let recent = promised.len().saturating_sub(2 * ACKNOWLEDGED_MAX as usize);
        assert_all_there(&mut again.client(), &promised[recent..], &format!("round {round}"));
        node = Some(again);
    }
    let record = load.finish();
    let node = node.expect("it runs");
    let mut client = node.client();
    assert_all_there(&mut client, &record.acknowledged(1), "at the end");
    assert_nothing_else(&mut client, &record, 0, "at the end");
    println!("{} acknowledged over {} kills", record.count.load(Ordering::Relaxed), rounds());
    let data = node.data.clone();
    node.kill();
    verify(&data);
}

#[test]
fn three_members_keep_what_they_acknowledged_whoever_is_killed() {
    const NAMES: [&str; 3] = ["a", "b", "c"];
    let mut draws = Draws::new("three members");
    let mut cluster = Cluster::start(&NAMES, &[&SMALL[..], &["--snapshot-rate", "64MiB"]].concat());
    let addresses: Vec<SocketAddr> = NAMES.iter().map(|name| cluster.client_address(name)).collect();
    let load = Load::start(&[0, 1, 2, 3, 3], &addresses);
    let mut away: Option<(&str, u64)> = None;
    for round in 0..rounds() {
        load.record.wait_for(1 + draws.below(ACKNOWLEDGED_MAX));
        let promised = [2, 3].map(|level| load.record.acknowledged(level));
        // One of those that run, or all of them; now and then one stays away for some rounds, so that its slot may be lost.
        let running: Vec<&str> = cluster.nodes.keys().copied().collect();
        let killed = match draws.below(8) {
            0 => running,
            _ => vec![running[draws.below(running.len() as u64) as usize]],
        };
        for name in &killed {
            cluster.kill(name);
            verify(&cluster.root.path().join(name));
        }
        away = match away {
            Some((name, left)) => (left > 1).then(|| (name, left - 1)),
            None if draws.below(4) == 0 => Some((killed[0], 1 + draws.below(4))),
            None => None,
        };
        for name in NAMES {
            let absent = away.is_some_and(|(absent, _)| absent == name);
            if !absent && !cluster.nodes.contains_key(name) {
                cluster.bring(name);
            }
        }
        let leader = cluster.leader();
        let mut client = cluster.client(leader);
        for keys in promised {
            let recent = keys.len().saturating_sub(2 * ACKNOWLEDGED_MAX as usize);
            assert_all_there(&mut client, &keys[recent..], &format!("round {round}, {killed:?} killed, on {leader}"));
        }
    }
    for name in NAMES {
        if !cluster.nodes.contains_key(name) {
            cluster.bring(name);
        }
    }
    let record = load.finish();
    let leader = cluster.leader();
    // An LSN alone would not do: a member that led for itself has a log of its own until it has taken a snapshot.
    for name in NAMES {
        until("it has taken its snapshot, if it needs one", || cluster.describe(name)["snapshot"].is_null());
    }
    until("every member has what the leader has", || {
        let there = NAMES.map(|name| cluster.describe(name));
        let own = there.iter().find(|facts| facts["name"] == leader).expect("a member");
        let same = |key: &str| there.iter().all(|facts| facts[key] == own[key]);
        let following = |facts: &serde_json::Value| facts["role"] == "replica" && facts["snapshot"].is_null();
        same("epoch") && same("applied") && there.iter().filter(|facts| following(facts)).count() == 2
    });
    for name in NAMES {
        let mut client = cluster.client(name);
        for level in [2, 3] {
            assert_all_there(&mut client, &record.acknowledged(level), &format!("at the end, on {name}"));
        }
        // `leads` is the key of the test's own.
        assert_nothing_else(&mut client, &record, 1, &format!("at the end, on {name}"));
    }
    println!("{} acknowledged over {} rounds", record.count.load(Ordering::Relaxed), rounds());
    for name in NAMES {
        let data = cluster.nodes[name].data.clone();
        cluster.kill(name);
        verify(&data);
    }
    for pair in [["a", "b"], ["a", "c"]] {
        let [data, against] = pair.map(|name| cluster.root.path().join(name));
        let mut command = Command::new(env!("CARGO_BIN_EXE_walferry"));
        let output = command.args(["log", "verify", "--data"]).arg(data).arg("--against").arg(against).output();
        let output = output.expect("the binary starts");
        assert!(output.status.success(), "log verify --against: {output:?}");
    }
}
