//! The log reaches a replica byte for byte: from memory, from segment files, and across every change between them.

mod common;

use std::time::Duration;

use common::replica::Replica;
use common::{LOG_BUFFER_BYTES, Leader, directory, shipper_config};
use walferry_cluster::level::CommitLevel;
use walferry_engine::lsn::Lsn;
use walferry_shipper::progress::ReplicaState;

/// The replica holds what the segment files hold.
fn assert_same(leader: &Leader, replica: &Replica) {
    let end = leader.log.flushed();
    let files = leader.files(Lsn::ZERO, end);
    replica.ask(|seen| {
        assert_eq!(seen.log.len() as u64, end.0);
        let differs = seen.log.iter().zip(&files).position(|(theirs, ours)| theirs != ours);
        assert_eq!(differs, None, "the logs differ");
    });
}

/// Sizes from tiny to larger than a megabyte, summing up to about `bytes`.
fn sizes(bytes: usize) -> impl Iterator<Item = usize> {
    let cycle = [8, 100, 3000, 4096, 20_000, 64 << 10, 700_000, 100, 1_500_000, 9];
    let mut left = bytes;
    cycle.into_iter().cycle().take_while(move |size| {
        let more = left > 0;
        left = left.saturating_sub(*size);
        more
    })
}

#[test]
fn hot_frames_go_from_memory() {
    let dir = directory();
    let mut leader = Leader::new(dir.path());
    let replica = Replica::connect(leader.address, "a", Vec::new());
    leader.wait_state("a", ReplicaState::Streaming);
    leader.append(sizes(10 << 20));
    for _ in 0..200 {
        leader.append([100]);
        leader.turn();
    }
    leader.wait_applied("a");
    leader.turn();
    assert_same(&leader, &replica);
    let status = leader.status("a");
    assert_eq!(status.sent_bytes.sendfile, 0);
    assert!(status.sent_bytes.copy > 10 << 20 && status.sent_bytes.copy < leader.log.flushed().0 + (1 << 20));
    // How many frames these are is up to the disk: a slow one gets fewer and larger ones.
    assert!(replica.ask(|seen| seen.frames > 0 && seen.chunks == 0));
    for level in CommitLevel::ALL.into_iter().skip(1) {
        assert_eq!(leader.shipper.released(level, leader.log.flushed()), leader.log.flushed(), "{level}");
    }
    assert_eq!((status.apply_lag.bytes, status.apply_lag.time), (0, Duration::ZERO));
    assert!(status.in_sync && status.round_trip.is_some());
    assert_eq!(leader.shipper.evidence(leader.log.flushed()), [(status.name, CommitLevel::RemoteApply)]);
}

#[test]
fn replica_behind_is_fed_from_files_and_then_from_memory() {
    let dir = directory();
    let mut leader = Leader::new(dir.path());
    leader.append(sizes(LOG_BUFFER_BYTES + (30 << 20)));
    leader.flush();
    let behind = leader.log.flushed();
    let replica = Replica::connect(leader.address, "a", Vec::new());
    leader.wait_state("a", ReplicaState::Streaming);
    leader.append(sizes(5 << 20));
    leader.wait_applied("a");
    assert_same(&leader, &replica);
    let sent = leader.status("a").sent_bytes;
    assert!(sent.sendfile >= leader.log.hot_start().0 && sent.sendfile <= behind.0, "{sent:?}");
    assert!(replica.ask(|seen| seen.chunks > 3 && seen.frames > 3 && seen.switches == 1));
}

#[test]
fn replica_that_stops_reading_does_not_block_the_leader() {
    let dir = directory();
    let mut leader = Leader::new(dir.path());
    let replica = Replica::connect(leader.address, "a", Vec::new());
    leader.wait_state("a", ReplicaState::Streaming);
    leader.append(sizes(3 << 20));
    leader.wait_applied("a");
    for round in 0..3 {
        replica.pause(true);
        // Far more than the log buffer: appending would get stuck if the replica held anything.
        leader.append(sizes(LOG_BUFFER_BYTES * 2));
        leader.flush();
        let status = leader.status("a");
        assert_eq!(status.state, ReplicaState::Catchup, "round {round}");
        assert!(status.flush_lag.bytes > LOG_BUFFER_BYTES as u64 && status.flush_lag.time > Duration::ZERO);
        replica.pause(false);
        // It comes back while the leader goes on.
        leader.append(sizes(20 << 20));
        leader.wait_state("a", ReplicaState::Streaming);
        leader.wait_applied("a");
        assert_same(&leader, &replica);
    }
    let sent = leader.status("a").sent_bytes;
    assert!(sent.sendfile > 2 * LOG_BUFFER_BYTES as u64, "{sent:?}");
}

#[test]
fn zero_copy_sends_the_same_bytes_and_gives_its_memory_back() {
    let dir = directory();
    let config = walferry_shipper::ShipperConfig { zero_copy_bytes_min: 8 << 10, ..shipper_config(dir.path()) };
    let mut leader = Leader::with(config, common::history(&[(1, 0)]));
    let replica = Replica::connect(leader.address, "a", Vec::new());
    leader.wait_state("a", ReplicaState::Streaming);
    for _ in 0..60 {
        leader.append([100, 30_000, 200_000]);
        leader.turn();
    }
    leader.wait_applied("a");
    assert_same(&leader, &replica);
    // Nothing stays pinned: more than the buffer goes through.
    leader.append(sizes(LOG_BUFFER_BYTES * 2));
    leader.wait_applied("a");
    assert_same(&leader, &replica);
    let sent = leader.status("a").sent_bytes;
    assert!(sent.copy + sent.zero_copy + sent.sendfile > LOG_BUFFER_BYTES as u64 * 2, "{sent:?}");
}

#[test]
fn stalled_zero_copy_replica_releases_memory() {
    let dir = directory();
    let config = walferry_shipper::ShipperConfig { zero_copy_bytes_min: 8 << 10, ..shipper_config(dir.path()) };
    let mut leader = Leader::with(config, common::history(&[(1, 0)]));
    let replica = Replica::connect(leader.address, "a", Vec::new());
    leader.wait_state("a", ReplicaState::Streaming);
    replica.pause(true);
    leader.append(sizes(LOG_BUFFER_BYTES * 3));
    leader.flush();
    let log = replica.disconnect();
    let again = Replica::connect(leader.address, "a", log);
    leader.wait_applied("a");
    assert_same(&leader, &again);
}

#[test]
fn a_connection_that_breaks_in_the_middle_goes_on_where_it_was() {
    let dir = directory();
    let mut leader = Leader::new(dir.path());
    leader.append(sizes(LOG_BUFFER_BYTES + (40 << 20)));
    leader.flush();
    let mut log = Vec::new();
    for _ in 0..4 {
        let before = log.len();
        let replica = Replica::connect(leader.address, "a", log);
        leader.run("something arrives", |_| replica.ask(|seen| seen.whole.0 as usize > before + (5 << 20)));
        log = replica.disconnect();
        leader.append(sizes(1 << 20));
    }
    let replica = Replica::connect(leader.address, "a", log);
    leader.wait_applied("a");
    assert_same(&leader, &replica);
    assert!(leader.status("a").sent_bytes.sendfile > 0);
}

#[test]
fn several_replicas_at_different_places_get_the_same_log() {
    let dir = directory();
    let mut leader = Leader::new(dir.path());
    let near = Replica::connect(leader.address, "near", Vec::new());
    leader.wait_state("near", ReplicaState::Streaming);
    leader.append(sizes(LOG_BUFFER_BYTES + (10 << 20)));
    let far = Replica::connect(leader.address, "far", Vec::new());
    leader.append(sizes(10 << 20));
    for replica in ["near", "far"] {
        leader.wait_applied(replica);
    }
    assert_same(&leader, &near);
    assert_same(&leader, &far);
    assert_eq!(leader.shipper.evidence(leader.log.flushed()).len(), 2);
}
