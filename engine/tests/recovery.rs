//! What the next start finds in the data directory that a log left behind: damage, a crash in the middle of writes,
//! and a log that ends exactly with its segment.

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use common::{EPOCH, Node, config, directory, frames_on_disk, history};
use walferry_engine::limits::{FRAME_HEADER_BYTES, RECORD_LENGTH_BYTES, SEGMENT_BYTES_MIN};
use walferry_engine::lsn::{Lsn, SegmentNo};

fn open_file(path: &Path) -> File {
    File::options().read(true).write(true).open(path).expect("the segment's file")
}

fn flip(path: &Path, offset: u64) {
    let file = open_file(path);
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).expect("a byte");
    file.write_all_at(&[byte[0] ^ 1], offset).expect("the flipped byte");
}

/// Frames of one record each, every one durable before the next; their positions and the log's end.
fn durable_frames(node: &mut Node, count: u8) -> Vec<Lsn> {
    let mut at = vec![node.log.flushed()];
    for number in 0..count {
        node.append(&[number; 5000]);
        node.flush();
        at.push(node.log.flushed());
    }
    at
}

#[test]
fn damage_in_a_durable_frame_stops_the_next_start() {
    for damaged in 0..3 {
        let dir = directory();
        let mut node = Node::leader(config(dir.path()));
        let at = durable_frames(&mut node, 3);
        let path = node.log.segment_path(SegmentNo(0));
        node.close();
        let before = std::fs::read(&path).expect("the segment");
        flip(&path, at[damaged].0 + 100);
        let damage = std::fs::read(&path).expect("the segment");
        assert_ne!(before, damage);
        let text = Node::try_open(config(dir.path()), &history(), Lsn::ZERO).err().expect("refused").to_string();
        let place = format!("{} at offset {} (LSN {})", path.display(), at[damaged].0, at[damaged]);
        assert!(text.contains(&place), "frame {damaged}: {text}");
        assert_eq!(std::fs::read(&path).expect("the segment"), damage, "recovery changed the log");
    }
}

#[test]
fn replica_that_crashed_with_writes_out_of_order_is_cut() {
    let (leader_dir, dir) = (directory(), directory());
    let mut leader = Node::leader(config(leader_dir.path()));
    let at = durable_frames(&mut leader, 4);
    let bytes = common::bytes_on_disk(&leader.log, Lsn::ZERO, at[4]);
    leader.close();
    // The replica had the first frame durable and caught up with three writes in flight, of which the crash lost one.
    let mut replica = Node::open(config(dir.path()));
    replica.log.follow(&history());
    let space = replica.log.receive_space(at[1].0 as usize).expect("written");
    space.copy_from_slice(&bytes[..at[1].0 as usize]);
    replica.log.receive_advance(at[1].0 as usize, Instant::now()).expect("the leader's frame");
    replica.run("the first frame is durable", |log| log.flushed() == at[1]);
    let path = replica.log.segment_path(SegmentNo(0));
    replica.close();
    open_file(&path).write_all_at(&bytes[at[2].0 as usize..], at[2].0).expect("the later frames");
    let replica = Node::try_open(config(dir.path()), &history(), Lsn::ZERO);
    let replica = replica.unwrap_or_else(|error| panic!("a crash is no damage: {error}"));
    assert_eq!(replica.log.flushed(), at[1]);
    assert_eq!(replica.recovery.cut.as_ref().expect("a torn tail").lsn, at[1]);
    replica.close();
}

#[test]
fn log_that_ends_with_its_segment_keeps_the_crc_chain() {
    let dir = directory();
    let mut node = Node::leader(config(dir.path()));
    node.append(&vec![7; SEGMENT_BYTES_MIN as usize - FRAME_HEADER_BYTES - RECORD_LENGTH_BYTES]);
    node.flush();
    let end = node.log.flushed();
    assert_eq!(end, Lsn(SEGMENT_BYTES_MIN));
    let crc = node.log.crc_at_end();
    node.take_all();
    node.log.release_before(end);
    assert_eq!(node.log.start(), Lsn::ZERO, "the frame before the end is still needed");
    node.close();
    let mut node = Node::try_open(config(dir.path()), &history(), end).expect("it opens again");
    assert_eq!((node.log.flushed(), node.log.crc_at_end()), (end, crc));
    node.log.lead(EPOCH.next());
    node.append(b"after the boundary");
    node.flush();
    frames_on_disk(&node.log, Lsn::ZERO, node.log.flushed(), |_| ());
    node.close();
}

#[test]
fn padding_that_a_crash_left_as_it_was_is_zeros_again() {
    let dir = directory();
    let mut node = Node::leader(config(dir.path()));
    let at = durable_frames(&mut node, 2);
    let path = node.log.segment_path(SegmentNo(0));
    node.close();
    let whole = std::fs::read(&path).expect("the segment");
    // The last sector of each frame is where something older stood.
    for end in &at[1..] {
        open_file(&path).write_all_at(&[7; 512], end.0 - 512).expect("stale bytes");
    }
    let node = Node::try_open(config(dir.path()), &history(), Lsn::ZERO).expect("padding is no part of a frame");
    assert_eq!((node.log.flushed(), node.recovery.cut.clone()), (at[2], None));
    assert_eq!(node.recovery.stale_padding.iter().map(|(_, to)| *to).collect::<Vec<_>>(), at[1..]);
    node.close();
    assert!(whole == std::fs::read(&path).expect("the segment"), "stale bytes are left");
}

#[test]
fn truncation_lowers_the_watermark_whenever_a_crash_comes() {
    let mut forked = history();
    for truncated in [false, true] {
        let dir = directory();
        let mut node = Node::leader(config(dir.path()));
        let at = durable_frames(&mut node, 4);
        if !truncated {
            forked.push(EPOCH.next().next(), at[2]).expect("a later epoch");
        }
        node.take_all();
        if truncated {
            node.log.truncate(at[2], &forked).expect("nothing is in flight");
        }
        // Else the crash came when the leader's history was durable and the log not yet cut.
        node.close();
        let node = Node::try_open(config(dir.path()), &forked, Lsn::ZERO);
        let node = node.unwrap_or_else(|error| panic!("truncated: {truncated}: {error}"));
        assert_eq!(node.log.flushed(), at[2], "truncated: {truncated}");
        node.close();
    }
}
