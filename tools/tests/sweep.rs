//! A bit flips, or a file is cut short, somewhere in the data directory of one member of three, while none of them runs. After a
//! start nothing acknowledged is lost and nothing wrong is served: the node has repaired itself, or made anew what can be, or
//! stands stopped with a message that names the file. CI tries a sample of the places; all of them with
//!
//! ```text
//! cargo test --test sweep -- --include-ignored
//! ```

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime};

use common::cluster::Cluster;
use common::{Client, Node, Reply, lsn_bytes, wait_applied};

/// More than a segment of log, and several checkpoints.
const KEYS: usize = 120;
const VALUE_BYTES: usize = 150_000;
/// The log is cut often, and the store written often: every file has something in it.
const FLAGS: [&str; 8] =
    ["--checkpoint-bytes", "1MiB", "--keep-bytes-min", "0", "--snapshot-rate", "0", "--election-timeout", "1s"];
/// Which member is hurt: the one that led, and one that did not; each place in the files of one of them, in turn.
const VICTIMS: [&str; 2] = ["a", "b"];
const PAGE_BYTES: u64 = 4096;
const SEGMENT_BYTES: u64 = 16 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Harm {
    /// The lowest bit of this byte.
    Flip(u64),
    /// From this byte on everything is gone.
    Cut(u64),
}

fn value(key: usize) -> String {
    let head = format!("{key}-");
    head.repeat(VALUE_BYTES / head.len())
}

/// Every file below `dir` that outlives a process, with its length.
fn files(dir: &Path) -> Vec<(PathBuf, u64)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).expect("a directory") {
        let entry = entry.expect("an entry");
        let path = entry.path();
        if entry.file_type().expect("a type").is_dir() {
            found.extend(files(&path));
        } else if path.file_name().is_some_and(|name| name != "lock") {
            found.push((path, entry.metadata().expect("facts").len()));
        }
    }
    found.sort();
    found
}

/// When a file was written last, and its length: whoever changes it changes one of them.
type Stamp = (SystemTime, u64);

fn stamp(path: &Path) -> Option<Stamp> {
    let facts = fs::metadata(path).ok()?;
    Some((facts.modified().expect("a time"), facts.len()))
}

/// Makes `to` the same as `from`. What stands there as it was copied the last time is left alone.
fn copy_all(from: &Path, to: &Path, copied: &mut BTreeMap<PathBuf, Stamp>) {
    let wanted: Vec<PathBuf> = files(from).into_iter().map(|(path, _)| below(&path, from)).collect();
    if to.exists() {
        for (path, _) in files(to).into_iter().filter(|(path, _)| !wanted.contains(&below(path, to))) {
            fs::remove_file(path).expect("removed");
        }
    }
    for file in wanted {
        let target = to.join(&file);
        if stamp(&target).is_some_and(|stamp| copied.get(&target) == Some(&stamp)) {
            continue;
        }
        fs::create_dir_all(target.parent().expect("a directory")).expect("made");
        fs::copy(from.join(&file), &target).expect("copied");
        copied.insert(target.clone(), stamp(&target).expect("just copied"));
    }
}

fn below(path: &Path, dir: &Path) -> PathBuf {
    path.strip_prefix(dir).expect("below it").to_owned()
}

/// Places in a file of this length: header, middle, the last frame or page, its end, and a few between by a fixed rule.
fn harms(length: u64, log_end: Option<u64>) -> Vec<Harm> {
    if log_end == Some(0) {
        // A segment that nothing was written to yet.
        return vec![Harm::Flip(0), Harm::Flip(length / 2), Harm::Cut(length / 2)];
    }
    if length < PAGE_BYTES {
        // One checksum over all of it: unit tests flip each of its bits.
        let places = || [0, 9, length / 2, length.saturating_sub(1)].into_iter().filter(|place| *place < length);
        return places().map(Harm::Flip).chain(places().map(Harm::Cut)).collect();
    }
    let last = log_end.unwrap_or(length).min(length);
    let mut at: Vec<u64> = vec![0, 9, 40, 70, length / 2, length.saturating_sub(1)];
    at.extend([last.saturating_sub(1), last.saturating_sub(PAGE_BYTES), last.saturating_sub(PAGE_BYTES - 3), last + 8]);
    at.extend((1..8).map(|part| length / 8 * part + part * 13));
    at.extend([PAGE_BYTES, PAGE_BYTES + 20]);
    at.retain(|place| *place < length);
    at.sort_unstable();
    at.dedup();
    let cuts = [0, 1, length / 2, last.saturating_sub(PAGE_BYTES), length.saturating_sub(1)];
    let mut harms: Vec<Harm> = at.into_iter().map(Harm::Flip).collect();
    harms.extend(cuts.into_iter().filter(|place| *place < length).map(Harm::Cut));
    harms.dedup();
    harms
}

fn harm(path: &Path, harm: Harm) {
    match harm {
        Harm::Flip(at) => {
            let mut bytes = fs::read(path).expect("bytes");
            bytes[at as usize] ^= 1;
            fs::write(path, bytes).expect("written");
        }
        Harm::Cut(at) => fs::File::options().write(true).open(path).and_then(|file| file.set_len(at)).expect("cut"),
    }
}

fn assert_holds(client: &mut Client, what: &str) {
    for key in 0..KEYS {
        let reply = client.command(&["GET", &format!("key{key}")]);
        assert!(reply == Reply::Bulk(value(key)), "{what}: key{key} is lost or another");
    }
}

/// Three members with data, stopped; what each directory then holds is kept apart, to begin from again and again.
struct Prepared {
    cluster: Cluster,
    image: PathBuf,
    copied: BTreeMap<PathBuf, Stamp>,
    /// Where the log ends.
    end: u64,
}

impl Prepared {
    fn new() -> Prepared {
        let mut cluster = Cluster::start(&["a", "b", "c"], &FLAGS);
        let mut leader = cluster.leader();
        let mut client = cluster.client(leader);
        client.command(&["COMMITLEVEL", "remote_apply"]);
        for key in 0..KEYS {
            // On a machine that is busy with other tests the leader may change meanwhile.
            while client.command(&["SET", &format!("key{key}"), &value(key)]) != Reply::Simple("OK".to_owned()) {
                leader = cluster.leader();
                client = cluster.client(leader);
                client.command(&["COMMITLEVEL", "remote_apply"]);
            }
        }
        let lsn = client.command(&["LSN"]).text().to_owned();
        cluster.nodes.keys().for_each(|name| wait_applied(&mut cluster.client(name), &lsn));
        drop(client);
        // Replicas first: they have all that there is.
        let mut names: Vec<&str> = cluster.nodes.keys().copied().filter(|name| *name != leader).collect();
        names.push(leader);
        for name in names {
            cluster.nodes.remove(name).expect("it runs").stop();
        }
        let image = cluster.root.path().join("image");
        for name in ["a", "b", "c"] {
            copy_all(&cluster.root.path().join(name), &image.join(name), &mut BTreeMap::new());
        }
        Prepared { cluster, image, copied: BTreeMap::new(), end: lsn_bytes(&lsn) }
    }

    /// Everything as it was.
    fn restore(&mut self) {
        let names: Vec<&str> = self.cluster.nodes.keys().copied().collect();
        names.into_iter().for_each(|name| self.cluster.kill(name));
        for name in ["a", "b", "c"] {
            copy_all(&self.image.join(name), &self.cluster.root.path().join(name), &mut self.copied);
            let _ = fs::remove_file(self.cluster.root.path().join(format!("{name}.log")));
        }
    }

    /// Harms one file of `victim`, starts all, and looks. How the victim came out of it.
    fn try_one(&mut self, victim: &'static str, file: &Path, harmed: Harm) -> &'static str {
        self.restore();
        let what = format!("{victim}/{} {harmed:?}", file.display());
        harm(&self.cluster.root.path().join(victim).join(file), harmed);
        for name in ["a", "b", "c"].into_iter().filter(|name| *name != victim) {
            self.cluster.bring(name);
        }
        let stopped = self.cluster.try_bring(victim).err();
        let leader = self.cluster.leader();
        // All that the leader has: a new session of its own has no LSN to tell.
        let lsn = self.cluster.describe(leader)["end"].as_str().expect("an LSN").to_owned();
        for name in self.cluster.nodes.keys() {
            let mut client = self.cluster.client(name);
            wait_applied(&mut client, &lsn);
            assert_holds(&mut client, &format!("{what}: on {name}"));
        }
        let log = self.cluster.log_of(victim);
        match stopped {
            Some(said) => {
                let name = file.file_name().expect("a file").to_string_lossy().into_owned();
                assert!(
                    said.contains(name.trim_end_matches(".copy")),
                    "{what}: stopped without naming the file:\n{said}"
                );
                "stopped, and says why"
            }
            None if log.contains("repaired 0/") => "repaired from a peer",
            None if log.contains("took the place of the damaged store") => "store from a snapshot",
            None if log.contains("the store is made anew") => "store made anew from the log",
            None if log.contains("restored from the copy") || log.contains("written anew") => "restored from its copy",
            None => "harmless",
        }
    }

    fn sweep(&mut self, pick: impl Fn(u32) -> bool) {
        let begun = Instant::now();
        let mut outcomes: BTreeMap<(String, &'static str), usize> = BTreeMap::new();
        let mut number = 0;
        for (turn, victim) in VICTIMS.into_iter().enumerate() {
            let dir = self.image.join(victim);
            for (path, length) in files(&dir) {
                let file = below(&path, &dir);
                let name = file.to_string_lossy().into_owned();
                let first = name.strip_prefix("log/").and_then(|name| name.strip_suffix(".wal"));
                let first = first.map(|number| u64::from_str_radix(number, 16).expect("a number") * SEGMENT_BYTES);
                let log_end = first.map(|first| self.end.saturating_sub(first));
                for (place, harmed) in harms(length, log_end).into_iter().enumerate() {
                    if place % VICTIMS.len() != turn {
                        continue;
                    }
                    number += 1;
                    if pick(number) {
                        let outcome = self.try_one(victim, &file, harmed);
                        let kind = if first.is_some() { "log/*.wal".to_owned() } else { name.clone() };
                        *outcomes.entry((kind, outcome)).or_default() += 1;
                    }
                }
            }
        }
        let tried: usize = outcomes.values().sum();
        println!("{tried} of {number} places, {:.1} s each", begun.elapsed().as_secs_f64() / tried as f64);
        for ((file, outcome), times) in &outcomes {
            println!("{file:<24} {outcome:<32} {times}");
        }
    }
}

/// CI's sample: a step that meets every kind of file.
#[test]
fn a_sample_of_places_hurts_nobody() {
    const STEP: u32 = 11;
    Prepared::new().sweep(|number| number % STEP == 0);
}

#[test]
#[ignore = "tries every place, some minutes; for the night"]
fn no_place_hurts_anybody() {
    Prepared::new().sweep(|_| true);
}

/// Two of three lost parts, and the third is away: each has what the other lost.
#[test]
fn two_members_that_lost_different_parts_help_each_other() {
    let mut prepared = Prepared::new();
    let last = PathBuf::from(format!("log/{:016X}.wal", (prepared.end - 1) / SEGMENT_BYTES));
    let last_page = (prepared.end - 1) / PAGE_BYTES * PAGE_BYTES % SEGMENT_BYTES;
    let root = prepared.cluster.root.path().to_owned();
    harm(&root.join("a").join(&last), Harm::Flip(20));
    harm(&root.join("b").join(&last), Harm::Flip(last_page));
    prepared.cluster.bring_together(&["a", "b"]);
    let leader = prepared.cluster.leader();
    assert_holds(&mut prepared.cluster.client(leader), "after both were repaired");
    for (name, other) in [("a", "b"), ("b", "a")] {
        let log = prepared.cluster.log_of(name);
        assert!(log.contains("repaired 0/") && log.contains(&format!(".wal from {other}")), "{name}:\n{log}");
    }
}

/// A leader without a cluster asks whom it is told to; the operator can ask for it as well.
#[test]
fn standalone_leader_is_repaired_from_a_replica() {
    let root = common::directory();
    let leader = Node::start(root.path(), "a", &FLAGS);
    let follow = leader.peer_listen.to_string();
    let replica = Node::start(root.path(), "b", &[&["--follow", &follow][..], &FLAGS].concat());
    let mut client = leader.client();
    for key in 0..KEYS {
        client.command(&["SET", &format!("key{key}"), &value(key)]);
    }
    let lsn = client.command(&["LSN"]).text().to_owned();
    wait_applied(&mut replica.client(), &lsn);
    let data = leader.data.clone();
    drop(client);
    leader.stop();
    // The last frame, of which no store needs to know anything any more.
    let end = lsn_bytes(&lsn);
    let segment = data.join(format!("log/{:016X}.wal", (end - 1) / SEGMENT_BYTES));
    let hurt = || harm(&segment, Harm::Flip((end - 1) / PAGE_BYTES * PAGE_BYTES % SEGMENT_BYTES));
    hurt();
    let alone = Node::try_start(root.path(), "a", &FLAGS).err().expect("it stands");
    assert!(alone.contains("damage in durable log") && alone.contains(".wal"), "{alone}");
    let peer = replica.peer_listen.to_string();
    let verify = |args: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_walferry"));
        let output = command.args(["log"]).args(args).arg("--data").arg(&data).output().expect("the binary starts");
        (output.status.success(), format!("{output:?}"))
    };
    let secret = root.path().join("peer.secret").display().to_string();
    let (clean, text) = verify(&["verify"]);
    assert!(!clean && text.contains("walferry log repair --from"), "{text}");
    let (done, text) = verify(&["repair", "--from", &peer, "--peer-secret", &secret]);
    assert!(done && text.contains("repaired "), "{text}");
    assert!(verify(&["verify"]).0);
    assert_eq!(fs::read_dir(data.join("damaged")).expect("kept").count(), 1);
    hurt();
    let from = ["--repair-from", &peer];
    let again = Node::start(root.path(), "a", &[&from[..], &FLAGS].concat());
    let mut client = again.client();
    assert_holds(&mut client, "after a repair");
    let info = client.command(&["INFO"]).text().to_owned();
    assert!(info.contains("log_repaired_ranges:1"), "{info}");
    // Nobody has it: it stays stopped, and says who was asked.
    drop(client);
    again.stop();
    replica.stop();
    hurt();
    let (done, text) = verify(&["repair", "--from", "127.0.0.1:9"]);
    assert!(!done && text.contains("127.0.0.1:9: ") && text.contains("Nobody gave it back"), "{text}");
}
