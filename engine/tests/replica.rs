//! A replica's log is its leader's, byte for byte, however the bytes travel; and truncation behind a fork.

mod common;

use std::time::Instant;

use common::*;
use walferry_engine::frame::FrameError;
use walferry_engine::limits::SEGMENT_BYTES_MIN;
use walferry_engine::log::{LogConfig, LogError, ReceiveError};
use walferry_engine::lsn::{Epoch, Lsn, SegmentNo};
use walferry_engine::origin::Origin;

/// Sends the leader's hot frame at the replica's end, if there is one.
fn ship_frame(leader: &Node, replica: &mut Node) -> bool {
    let at = replica.log.received();
    let Some(frame) = leader.log.hot_frame(at) else {
        return false;
    };
    let wire = frame.wire_bytes().to_vec();
    while !replica.log.receive_frame(&wire, Instant::now()).expect("a good frame") {
        replica.turn().expect("the disk works");
        replica.take_all();
    }
    assert_eq!(replica.log.received(), frame.end());
    true
}

/// Feeds raw log bytes in pieces that respect no boundary.
fn ship_bytes(bytes: &[u8], replica: &mut Node) {
    let (mut rest, mut piece) = (bytes, 1);
    while !rest.is_empty() {
        piece = piece * 7 % 1_500_007 + 1;
        match replica.log.receive_space(piece.min(rest.len())) {
            Some(space) => {
                let (now, later) = rest.split_at(space.len());
                space.copy_from_slice(now);
                rest = later;
                replica.log.receive_advance(now.len(), Instant::now()).expect("good bytes");
                replica.log.poll(&mut replica.ring, Instant::now());
            }
            None => {
                replica.turn().expect("the disk works");
                replica.take_all();
            }
        }
    }
}

fn assert_same_files(leader: &Node, replica: &Node) {
    let until = replica.log.flushed();
    assert_eq!(until, leader.log.flushed());
    assert_eq!(replica.log.crc_at_end(), leader.log.crc_at_end());
    let theirs = bytes_on_disk(&replica.log, Lsn::ZERO, until);
    assert!(theirs == bytes_on_disk(&leader.log, Lsn::ZERO, until), "the logs differ");
}

fn replica(config: LogConfig) -> Node {
    let mut node = Node::open(config);
    node.log.follow(&history());
    node
}

#[test]
fn hot_frames_make_the_same_log() {
    let (here, there) = (directory(), directory());
    let mut leader = Node::leader(config(here.path()));
    let mut replica = replica(LogConfig { write_depth: 2, ..config(there.path()) });
    for number in 0..3000 {
        leader.append(&record(number));
        if number % 3 == 0 {
            leader.log.poll(&mut leader.ring, Instant::now());
        }
        if number % 40 == 0 {
            leader.turn().expect("the disk works");
        }
        if number % 500 == 0 {
            leader.append(&vec![number as u8; 5 << 20]);
        }
        while ship_frame(&leader, &mut replica) {}
        replica.log.poll(&mut replica.ring, Instant::now());
    }
    leader.flush();
    while ship_frame(&leader, &mut replica) {}
    replica.flush();
    assert!(replica.log.flushed() > SegmentNo(2).start(SEGMENT_BYTES_MIN), "several segments");
    assert_same_files(&leader, &replica);
    leader.close();
    replica.close();
}

#[test]
fn raw_bytes_make_the_same_log_and_no_half_frame_stays() {
    let (here, there) = (directory(), directory());
    let mut leader = Node::leader(config(here.path()));
    for number in 0..4000 {
        leader.append(&record(number));
        if number % 400 == 0 {
            leader.append(&vec![number as u8; 6 << 20]);
        }
        if number % 4 == 0 {
            leader.log.poll(&mut leader.ring, Instant::now());
        }
    }
    leader.flush();
    let bytes = bytes_on_disk(&leader.log, Lsn::ZERO, leader.log.flushed());
    let mut replica = replica(config(there.path()));
    let half = bytes.len() / 2 + 77;
    ship_bytes(&bytes[..half], &mut replica);
    assert_eq!(replica.log.received(), Lsn(half as u64));
    replica.log.receive_reset();
    let whole = replica.log.received();
    assert_eq!(whole, replica.log.sealed());
    assert!(whole < Lsn(half as u64));
    replica.flush();
    let config = replica.log.config().clone();
    replica.close();
    let mut replica = Node::open(config);
    assert_eq!(replica.log.received(), whole);
    ship_bytes(&bytes[whole.0 as usize..], &mut replica);
    replica.flush();
    assert_same_files(&leader, &replica);
    leader.close();
    replica.close();
}

#[test]
fn frame_that_is_not_the_next_is_refused_unwritten() {
    let (here, there) = (directory(), directory());
    let mut leader = Node::leader(config(here.path()));
    for _ in 0..2 {
        leader.append(b"a record");
        leader.flush();
    }
    let first = leader.log.hot_frame(Lsn::ZERO).expect("hot").span().to_vec();
    let second = leader.log.hot_frame(Lsn(4096)).expect("hot").wire_bytes().to_vec();
    let wire = &first[..leader.log.hot_frame(Lsn::ZERO).expect("hot").wire_bytes().len()];
    let mut replica = replica(config(there.path()));
    let refuse =
        |replica: &mut Node, bytes: &[u8]| replica.log.receive_frame(bytes, Instant::now()).expect_err("refused");
    let frame = |lsn, source| ReceiveError::Frame { lsn: Lsn(lsn), source };
    assert_eq!(refuse(&mut replica, &second), frame(0, FrameError::Position(Lsn(4096))));
    assert_eq!(refuse(&mut replica, &wire[..wire.len() - 1]), frame(0, FrameError::Short));
    let mut flipped = wire.to_vec();
    *flipped.last_mut().expect("bytes") ^= 1;
    assert_eq!(refuse(&mut replica, &flipped), frame(0, FrameError::Checksum));
    let mut later = history();
    later.push(Epoch(2), Lsn(4096)).expect("a later epoch");
    replica.log.follow(&later);
    assert_eq!(replica.log.receive_frame(wire, Instant::now()), Ok(true));
    assert!(matches!(refuse(&mut replica, &second), ReceiveError::Epoch { epoch: EPOCH, expected: Epoch(2), .. }));
    replica.flush();
    assert_eq!(replica.log.flushed(), Lsn(4096));
    // Raw bytes with something in the padding: the format says zeros, and zeros are written.
    let mut dirty = first.clone();
    *dirty.last_mut().expect("bytes") = 1;
    replica.log.truncate(Lsn::ZERO, &history()).expect("back to the start");
    ship_bytes(&dirty, &mut replica);
    replica.flush();
    assert!(bytes_on_disk(&replica.log, Lsn::ZERO, Lsn(4096)) == first);
    leader.close();
    replica.close();
}

#[test]
fn a_replica_behind_a_fork_truncates_and_follows_the_new_epoch() {
    let (here, there) = (directory(), directory());
    let mut leader = Node::leader(config(here.path()));
    let mut old = replica(config(there.path()));
    let piece = vec![1; 3 << 20];
    let common_records = 8;
    for _ in 0..common_records {
        leader.append(&piece);
    }
    leader.flush();
    while ship_frame(&leader, &mut old) {}
    old.flush();
    let fork = leader.log.flushed();
    assert!(fork > SegmentNo(1).start(SEGMENT_BYTES_MIN));
    // The old leader went on alone, over several segments, and the promoted one with other records in a new epoch.
    old.take_all();
    old.log.lead(EPOCH);
    for _ in 0..12 {
        old.append(&vec![2; 2 << 20]);
    }
    old.flush();
    old.take_all();
    let mut forked = history();
    forked.push(Epoch(2), fork).expect("a later epoch");
    leader.log.lead(Epoch(2));
    for _ in 0..common_records {
        leader.append(&vec![3; 2_500_000]);
    }
    leader.flush();
    let beyond = Lsn(1 << 40);
    assert!(matches!(old.log.truncate(beyond, &forked), Err(LogError::Truncate { .. })));
    old.log.truncate(fork, &forked).expect("truncate");
    let at_fork = [old.log.taken(), old.log.flushed(), old.log.written(), old.log.sealed(), old.log.received()];
    assert_eq!(at_fork, [fork; 5]);
    // A crash right after it: what lies behind the fork is not mistaken for the log's tail.
    let config = old.log.config().clone();
    old.close();
    let mut old = Node::try_open(config, &forked, Lsn::ZERO).expect("it opens");
    assert_eq!(old.log.flushed(), fork);
    ship_bytes(&bytes_on_disk(&leader.log, fork, leader.log.flushed()), &mut old);
    old.flush();
    assert_same_files(&leader, &old);
    leader.close();
    old.close();
}

#[test]
fn a_log_that_begins_in_the_middle_goes_on_and_opens_again() {
    let (here, there) = (directory(), directory());
    let mut leader = Node::leader(config(here.path()));
    for number in 0..30 {
        leader.append(&vec![number; 1 << 20]);
        leader.flush();
        leader.take_all();
    }
    let begun = leader.log.flushed();
    let crc = leader.log.crc_at_end();
    assert!(begun > SegmentNo(1).start(SEGMENT_BYTES_MIN) && begun.offset(SEGMENT_BYTES_MIN) > 0);
    Origin { lsn: begun, crc }.save(there.path()).expect("an origin");
    let open = |applied| Node::try_open(config(there.path()), &history(), applied).expect("it opens");
    let mut replica = open(begun);
    replica.log.follow(&history());
    assert_eq!((replica.log.start(), replica.log.flushed(), replica.log.crc_at_end()), (begun, begun, crc));
    // Nothing came before it went down again.
    replica.close();
    let mut replica = open(begun);
    replica.log.follow(&history());
    for number in 0..20 {
        leader.append(&vec![number; 1 << 20]);
        leader.flush();
        leader.take_all();
    }
    let end = leader.log.flushed();
    let bytes = bytes_on_disk(&leader.log, begun, end);
    ship_bytes(&bytes, &mut replica);
    replica.flush();
    assert_eq!(replica.log.crc_at_end(), leader.log.crc_at_end());
    assert!(bytes_on_disk(&replica.log, begun, end) == bytes, "the logs differ");
    replica.close();
    // Before and after a checkpoint in the first segment, and in the next one.
    for applied in [begun, end] {
        let replica = open(applied);
        assert_eq!((replica.log.flushed(), replica.log.crc_at_end()), (end, leader.log.crc_at_end()));
        replica.close();
    }
    // Once it is retired another log may stand in its place, under the same lock.
    let mut replica = open(end);
    let lock = replica.log.retire(&mut replica.ring).expect("nothing is in flight");
    let second = Node::try_open(config(there.path()), &history(), end).err().expect("locked").to_string();
    assert!(second.contains("in use"), "{second}");
    drop(lock);
    drop(replica);
    open(end).close();
    leader.close();
}
