//! Who gets in, who is turned away with which words, who is dropped, and what slots hold.

mod common;

use std::io::Write;
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

use common::replica::{Replica, hello};
use common::{CLUSTER, Leader, SEGMENT_BYTES, directory, history, shipper_config};
use walferry_cluster::level::CommitLevel;
use walferry_cluster::member::ClusterId;
use walferry_cluster::message::{Fetch, Hello, Message, PROTOCOL_VERSION, RefuseCode, read_message};
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_engine::small_file;
use walferry_shipper::ShipperConfig;
use walferry_shipper::progress::ReplicaState;
use walferry_shipper::slots::{SLOTS_FILE, SLOTS_MAX, Slots};

const LEADER: &[(u64, u64)] = &[(1, 0)];

fn refusal(leader: &mut Leader, hello: Hello) -> (RefuseCode, String) {
    let replica = Replica::connect_as(leader.address, hello, Vec::new(), true);
    leader.run("the replica is refused", |_| replica.ask(|seen| seen.refuse.is_some()));
    let refuse = replica.seen().refuse.expect("just seen");
    (refuse.code, refuse.text)
}

#[test]
fn unidentified_peer_gets_the_reason() {
    let dir = directory();
    let mut leader = Leader::new(dir.path());
    leader.append([100; 10]);
    leader.flush();
    let log = leader.files(Lsn::ZERO, leader.log.flushed());
    let usual = hello("a", &log, LEADER);
    let table = [
        (Hello { cluster_id: Some(ClusterId(1)), ..usual.clone() }, RefuseCode::ClusterId, "cluster"),
        (Hello { protocol: 9, ..usual.clone() }, RefuseCode::Protocol, "protocol"),
        (Hello { segment_bytes: 1 << 30, ..usual.clone() }, RefuseCode::SegmentBytes, "segments"),
        (Hello { crc: usual.crc ^ 1, ..usual.clone() }, RefuseCode::Diverged, "does not hold"),
        (Hello { flushed: Lsn(usual.flushed.0 - 7), ..usual.clone() }, RefuseCode::Diverged, "does not hold"),
        (Hello { flushed: Lsn(1 << 30), ..usual.clone() }, RefuseCode::Diverged, "only up to"),
        (Hello { name: "leader".parse().unwrap(), ..usual.clone() }, RefuseCode::Protest, "name"),
    ];
    for (hello, code, word) in table {
        let (told, text) = refusal(&mut leader, hello);
        assert_eq!(told, code, "{text}");
        assert!(text.contains(word) && !text.contains('\n'), "{text}");
    }
    assert_eq!(leader.shipper.superseded(), None);
    assert!(leader.shipper.replicas().is_empty(), "unidentified peers get no slot");
    let newer = [(1, 0), (5, usual.flushed.0)];
    let (code, _) = refusal(&mut leader, hello("a", &log, &newer));
    assert_eq!((code, leader.shipper.superseded()), (RefuseCode::NewerEpoch, Some(Epoch(5))));
}

#[test]
fn a_replica_behind_a_fork_is_sent_to_the_fork() {
    let dir = directory();
    let mut leader = Leader::new(dir.path());
    leader.append([100; 10]);
    leader.flush();
    let fork = leader.log.flushed();
    let mut log = leader.files(Lsn::ZERO, fork);
    leader.history = history(&[(1, 0), (2, fork.0)]);
    leader.log.lead(Epoch(2));
    leader.append([5000; 10]);
    leader.flush();
    // Frames that the leader lost in a crash: their contents do not matter, their place does.
    log.resize(log.len() + 8192, 7);
    let theirs = Hello { flushed: Lsn(log.len() as u64), crc: 99, ..hello("a", &log[..fork.0 as usize], LEADER) };
    let replica = Replica::connect_as(leader.address, theirs, log, true);
    leader.wait_applied("a");
    let seen = replica.seen();
    let welcome = seen.welcome.expect("welcomed");
    assert_eq!((welcome.start, welcome.cluster_id), (fork, CLUSTER));
    assert_eq!(welcome.history, leader.history.entries());
    assert_eq!(seen.log, leader.files(Lsn::ZERO, leader.log.flushed()));
}

#[test]
fn a_silent_replica_is_dropped_and_its_lag_grows_meanwhile() {
    let dir = directory();
    let config = ShipperConfig {
        peer_timeout: Duration::from_millis(400),
        replica_lag_time_max: Duration::from_millis(300),
        ..shipper_config(dir.path())
    };
    let mut leader = Leader::with(config, history(LEADER));
    let replica = Replica::connect(leader.address, "a", Vec::new());
    leader.append([100]);
    leader.wait_applied("a");
    let released = leader.log.flushed();
    // The rule looks at acknowledgements once a turn, after they arrived.
    leader.run("it is in sync and its acknowledgement counts", |leader| {
        leader.status("a").in_sync && leader.shipper.released(CommitLevel::RemoteFlush, released) == released
    });
    drop(replica);
    leader.wait_state("a", ReplicaState::Disconnected);
    let log = leader.files(Lsn::ZERO, leader.log.flushed());
    let silent = Replica::connect_as(leader.address, hello("a", &log, LEADER), log, false);
    leader.run("it is welcomed", |_| silent.ask(|seen| seen.welcome.is_some()));
    assert!(leader.status("a").last_error.is_empty());
    leader.append([100]);
    leader.flush();
    let mut lag = Duration::ZERO;
    leader.run("it is dropped", |leader| {
        let status = leader.status("a");
        assert!(status.flush_lag.time >= lag, "the lag shrinks although nothing was confirmed");
        lag = status.flush_lag.time;
        status.state == ReplicaState::Disconnected && !status.in_sync
    });
    assert!(lag > Duration::ZERO);
    assert!(leader.status("a").last_error.contains("nothing was heard"));
    // Nothing was confirmed by the silent one, so nothing more is released.
    assert_eq!(leader.shipper.released(CommitLevel::RemoteFlush, leader.log.flushed()), released);
    assert_eq!(leader.shipper.released(CommitLevel::Local, leader.log.flushed()), leader.log.flushed());
    assert!(leader.shipper.sync_shortage().is_some());
    let grown = leader.status("a").flush_lag.time;
    leader.run("time goes on", |leader| leader.status("a").flush_lag.time > grown);
}

#[test]
fn garbage_ends_its_own_connection_only() {
    use std::io::{Read, Write};
    let dir = directory();
    let mut leader = Leader::new(dir.path());
    let replica = Replica::connect(leader.address, "a", Vec::new());
    leader.wait_state("a", ReplicaState::Streaming);
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xFF; 3000], &[6, 0, 0, 0, 7, 0, 0, 0]] {
        let mut stream = std::net::TcpStream::connect(leader.address).expect("the leader listens");
        stream.write_all(garbage).expect("the leader listens");
        stream.set_nonblocking(true).expect("a socket");
        leader.run("the connection ends", |_| {
            let mut bytes = [0; 1000];
            match stream.read(&mut bytes) {
                Ok(0) => true,
                Ok(_) => false,
                Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
            }
        });
    }
    leader.append([100; 10]);
    leader.wait_applied("a");
    assert!(!replica.ask(|seen| seen.over));
}

#[test]
fn new_connection_of_a_replica_replaces_its_old_one() {
    let dir = directory();
    let mut leader = Leader::new(dir.path());
    let old = Replica::connect(leader.address, "a", Vec::new());
    leader.wait_state("a", ReplicaState::Streaming);
    let new = Replica::connect(leader.address, "a", Vec::new());
    leader.run("the old one is told", |_| old.ask(|seen| seen.refuse.is_some()));
    assert_eq!(old.seen().refuse.map(|refuse| refuse.code), Some(RefuseCode::Replaced));
    leader.append([100; 10]);
    leader.wait_applied("a");
    assert_eq!(new.seen().log, leader.files(Lsn::ZERO, leader.log.flushed()));
    assert_eq!(leader.shipper.replicas().len(), 1);
}

#[test]
fn second_node_of_a_name_is_refused_while_the_first_is_up() {
    let dir = directory();
    let mut leader = Leader::new(dir.path());
    let at = |port: u16| Hello { client_address: format!("127.0.0.1:{port}"), ..hello("a", &[], LEADER) };
    let first = Replica::connect_as(leader.address, at(6500), Vec::new(), true);
    leader.wait_state("a", ReplicaState::Streaming);
    for _ in 0..3 {
        let (code, text) = refusal(&mut leader, at(6600));
        assert_eq!(code, RefuseCode::Replaced, "{text}");
        assert!(
            text.contains("127.0.0.1:6500") && text.contains("127.0.0.1:6600") && text.contains("--name"),
            "{text}"
        );
    }
    leader.append([100; 10]);
    leader.wait_applied("a");
    assert!(!first.ask(|seen| seen.over), "it was not disturbed");
    // The same node comes back before its old connection has ended.
    let again = Replica::connect_as(leader.address, at(6500), Vec::new(), true);
    leader.run("the old one is told", |_| first.ask(|seen| seen.refuse.is_some()));
    leader.wait_applied("a");
    // Another comes once the first says nothing: not before, and without anybody's help.
    again.pause(true);
    let mut refused = 0;
    let second = loop {
        let second = Replica::connect_as(leader.address, at(6600), Vec::new(), true);
        leader.run("it is answered", |_| second.ask(|seen| seen.refuse.is_some() || seen.heartbeats > 0));
        if second.ask(|seen| seen.refuse.is_none()) {
            break second;
        }
        refused += 1;
    };
    assert!(refused > 0, "the first was heard a moment ago");
    leader.append([100; 10]);
    leader.wait_applied("a");
    assert_eq!(second.seen().log, leader.files(Lsn::ZERO, leader.log.flushed()));
}

#[test]
fn a_slot_holds_the_log_until_its_bound_and_survives_a_restart() {
    let dir = directory();
    let config = ShipperConfig { slot_keep_bytes_max: 40 << 20, ..shipper_config(dir.path()) };
    let mut leader = Leader::with(config.clone(), history(LEADER));
    assert_eq!(leader.shipper.slots_hold(), Lsn::MAX);
    let replica = Replica::connect(leader.address, "a", Vec::new());
    leader.append([1 << 20; 4]);
    leader.wait_applied("a");
    let log = replica.disconnect();
    leader.wait_state("a", ReplicaState::Disconnected);
    let restart = leader.log.flushed();
    leader.restart_shipper(config);
    assert_eq!(leader.shipper.slots_hold(), restart, "saved on the way out");
    leader.append([1 << 20; 30]);
    leader.flush();
    leader.turn();
    assert_eq!((leader.shipper.slots_hold(), leader.status("a").state), (restart, ReplicaState::Disconnected));
    leader.append([1 << 20; 15]);
    leader.flush();
    leader.wait_state("a", ReplicaState::Lost);
    leader.run("the file says so", |leader| leader.shipper.slots_hold() == Lsn::MAX);
    // Lost, but nothing was recycled yet: it may come back, and holds again once it is close.
    let replica = Replica::connect(leader.address, "a", log.clone());
    leader.wait_applied("a");
    leader.run("the slot holds again", |leader| !leader.status("a").slot_lost);
    drop(replica);
    leader.append([1 << 20; 50]);
    leader.flush();
    leader.wait_state("a", ReplicaState::Lost);
    leader.log.release_before(leader.log.flushed());
    let (code, text) = refusal(&mut leader, hello("a", &log, LEADER));
    assert_eq!(code, RefuseCode::LogGone);
    assert!(text.contains("slot is lost"), "{text}");
}

/// A leader under `ALL`, and replica `a`, which is in sync.
fn in_sync_under_all(dir: &Path, replica_lag_time_max: Duration) -> (ShipperConfig, Leader, Replica) {
    let policy = "ALL".parse().expect("a policy");
    let config = ShipperConfig { policy, replica_lag_time_max, ..shipper_config(dir) };
    let mut leader = Leader::with(config.clone(), history(LEADER));
    let replica = Replica::connect(leader.address, "a", Vec::new());
    leader.append([100]);
    leader.wait_applied("a");
    leader.run("it is in sync", |leader| leader.status("a").in_sync);
    (config, leader, replica)
}

/// A fetch of a node that has nothing; what it is refused with.
fn fetch_refusal(leader: &mut Leader, name: &str) -> (RefuseCode, String) {
    let mut stream = TcpStream::connect(leader.address).expect("the leader listens");
    let fetch = Fetch {
        protocol: PROTOCOL_VERSION,
        cluster_id: Some(CLUSTER),
        name: name.parse().expect("a name"),
        floor: Lsn::ZERO,
        segment_bytes: SEGMENT_BYTES,
        snapshot: Lsn::ZERO,
        offset: 0,
        suspect: false,
    };
    let mut bytes = Vec::new();
    Message::Fetch(fetch).encode(&mut bytes);
    stream.write_all(&bytes).expect("the leader listens");
    let answer = std::thread::spawn(move || read_message(&mut stream).expect("an answer"));
    leader.run("the fetch is answered", |_| answer.is_finished());
    match answer.join().expect("no panic") {
        Message::Refuse(refuse) => (refuse.code, refuse.text),
        other => panic!("it is refused: {other:?}"),
    }
}

#[test]
fn replica_without_a_slot_is_refused_before_its_copy() {
    let dir = directory();
    let name = |number: usize| format!("r{number}").parse().expect("a name");
    let mut slots = Slots::default();
    (0..SLOTS_MAX).for_each(|number| assert!(slots.attach(&name(number), Lsn::ZERO)));
    let text = slots.poll_save(true, Instant::now()).expect("something to save");
    small_file::save(&dir.path().join(SLOTS_FILE), &text).expect("the file is written");
    let config = ShipperConfig { slot_keep_bytes_max: 4 << 20, ..shipper_config(dir.path()) };
    let mut leader = Leader::with(config.clone(), history(LEADER));
    leader.append([100; 10]);
    for (code, text) in [refusal(&mut leader, hello("new", &[], LEADER)), fetch_refusal(&mut leader, "new")] {
        assert_eq!(code, RefuseCode::Full, "{text}");
        assert!(text.contains("`walferry slot drop NAME`") && text.contains("256"), "{text}");
    }
    assert_eq!(leader.shipper.snapshots().wanted(), None, "nothing is prepared for it");
    assert_eq!((leader.shipper.replicas().len(), leader.shipper.slots().len()), (SLOTS_MAX, SLOTS_MAX));

    let unknown = leader.shipper.drop_slot(&"other".parse().expect("a name")).expect_err("there is none");
    assert!(unknown.contains("no slot called other") && unknown.contains("r7"), "{unknown}");
    assert!(leader.shipper.drop_slot(&name(7)).expect("it is away").contains("slot r7 is dropped"));
    let replica = Replica::connect(leader.address, "new", Vec::new());
    leader.wait_state("new", ReplicaState::Streaming);
    let used = leader.shipper.drop_slot(&"new".parse().expect("a name")).expect_err("it is connected");
    assert!(used.contains("new is connected from 127.0.0.1:"), "{used}");
    // It is dropped for good.
    leader.restart_shipper(config);
    assert!(!leader.shipper.slots().iter().any(|slot| slot.name == name(7)));
    drop(replica);

    // Those that are lost give way, the connected ones aside.
    let replica = Replica::connect(leader.address, "new", Vec::new());
    leader.append([1 << 20; 8]);
    leader.wait_applied("new");
    leader.run("the others are lost", |leader| {
        leader.shipper.slots().iter().filter(|slot| slot.lost).count() == SLOTS_MAX - 1
    });
    let log = leader.files(Lsn::ZERO, leader.log.flushed());
    let another = Replica::connect(leader.address, "another", log);
    leader.wait_state("another", ReplicaState::Streaming);
    assert_eq!((leader.shipper.replicas().len(), leader.shipper.slots().len()), (SLOTS_MAX, SLOTS_MAX));
    assert!(!leader.shipper.slots().iter().any(|slot| slot.name == name(0)), "the first of them");
    drop((replica, another));
}

#[test]
fn restarted_leader_under_all_waits_for_its_replicas() {
    let dir = directory();
    let (config, mut leader, replica) = in_sync_under_all(dir.path(), Duration::from_secs(2));
    drop(replica);
    leader.restart_shipper(config);
    let before = leader.log.flushed();
    assert_eq!(leader.shipper.slots_hold(), before, "the log is kept for it");
    leader.append([100]);
    leader.flush();
    let released = |leader: &mut Leader| leader.shipper.released(CommitLevel::RemoteFlush, leader.log.flushed());
    assert!(leader.status("a").in_sync);
    // What its slot remembers of an earlier leadership confirms nothing: its disk may be lost.
    assert_eq!(released(&mut leader), Lsn::ZERO);
    leader.run("it leaves the set", |leader| !leader.status("a").in_sync);
    leader.run("commits go on without it", |leader| released(leader) == leader.log.flushed());
}

#[test]
fn replica_back_after_a_restart_under_all_confirms_again() {
    let dir = directory();
    let (config, mut leader, replica) = in_sync_under_all(dir.path(), Duration::from_secs(600));
    let log = replica.disconnect();
    leader.restart_shipper(config);
    leader.turn();
    let released = |leader: &mut Leader| leader.shipper.released(CommitLevel::RemoteFlush, leader.log.flushed());
    assert_eq!(released(&mut leader), Lsn::ZERO);
    let _replica = Replica::connect(leader.address, "a", log);
    leader.run("what it holds counts", |leader| released(leader) == leader.log.flushed());
}

#[test]
fn late_completion_of_an_earlier_shipper_ends_no_link() {
    let dir = directory();
    let (config, mut leader, replica) = in_sync_under_all(dir.path(), Duration::from_secs(600));
    // The receive of the old link ends, and its completion is taken after the new shipper has its first link.
    leader.restart_shipper(config);
    let log = leader.files(Lsn::ZERO, leader.log.flushed());
    let again = Replica::connect(leader.address, "a", log);
    leader.append([100]);
    leader.wait_applied("a");
    assert!(!again.ask(|seen| seen.over), "the new connection lasts");
    drop(replica);
}

#[test]
fn a_connected_replica_whose_log_is_gone_is_told() {
    let dir = directory();
    let config = ShipperConfig { slot_keep_bytes_max: 8 << 20, ..shipper_config(dir.path()) };
    let mut leader = Leader::with(config, history(LEADER));
    // It reads, and confirms nothing.
    let replica = Replica::connect_as(leader.address, hello("a", &[], LEADER), Vec::new(), false);
    leader.wait_state("a", ReplicaState::Streaming);
    leader.append([1 << 20; 40]);
    leader.flush();
    leader.run("the slot is lost", |leader| leader.status("a").slot_lost);
    assert!(replica.ask(|seen| seen.refuse.is_none()), "the log is still there");
    leader.run("the file says so", |leader| leader.shipper.slots_hold() == Lsn::MAX);
    leader.log.release_before(leader.log.flushed());
    leader.run("it reports its removal", |_| replica.ask(|seen| seen.refuse.is_some()));
    let refuse = replica.seen().refuse.expect("just seen");
    assert_eq!(refuse.code, RefuseCode::LogGone);
    assert!(refuse.text.contains("slot_keep_bytes_max"), "{refuse}");
}

#[test]
fn too_few_in_sync_replicas_refuse_remote_levels_only() {
    let dir = directory();
    let config = ShipperConfig { min_in_sync: 1, ..shipper_config(dir.path()) };
    let mut leader = Leader::with(config, history(LEADER));
    leader.turn();
    assert_eq!(leader.shipper.refuses(CommitLevel::Local), None);
    assert!(leader.shipper.refuses(CommitLevel::RemoteWrite).expect("nobody is there").contains("min_in_sync"));
    let _replica = Replica::connect(leader.address, "a", Vec::new());
    leader.run("it joins", |leader| leader.shipper.refuses(CommitLevel::RemoteApply).is_none());
}

#[test]
fn a_node_that_does_not_lead_says_so() {
    use std::os::fd::OwnedFd;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("a bound listener");
    let replica = Replica::connect_as(address, hello("a", &[], LEADER), Vec::new(), true);
    let (socket, _) = listener.accept().expect("it connects");
    walferry_shipper::refuse::not_leading(OwnedFd::from(socket), "replica b of 10.0.0.1:7000");
    while !replica.ask(|seen| seen.over) {
        std::thread::yield_now();
    }
    let refuse = replica.seen().refuse.expect("told");
    assert_eq!(refuse.code, RefuseCode::NotLeader);
    assert!(refuse.text.contains("replica b of"), "{refuse}");
}
