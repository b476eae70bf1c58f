//! What waits in memory is bounded, on a leader, on a replica and in a replay, however slow checkpoints are.

use std::time::Instant;

use walferry_engine::epoch::EpochHistory;
use walferry_engine::lsn::Epoch;

use super::*;
use crate::test_replica::{STORE_CONFIG, TestReplica};
use crate::view::View;

static VALUE: [u8; 500_000] = [7; 500_000];
/// What the tests' frames take in the log, about.
const FRAME_BYTES: u64 = 512 << 10;

fn leader(dir: &std::path::Path) -> TestReplica {
    let history = EpochHistory::from_entries(&[(Epoch(1), Lsn::ZERO)]).expect("one epoch");
    history.save(dir).expect("saved");
    let mut replica = TestReplica::open(dir);
    replica.log.lead(Epoch(1));
    replica
}

fn bound() -> usize {
    STORE_CONFIG.overlay_bytes_max(APPLY_BYTES_PER_TURN_MAX as usize + FRAME_BYTES as usize)
}

#[test]
fn applying_waits_for_a_slow_checkpoint() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut node = leader(dir.path());
    let mut keys = 0;
    // Nobody moves checkpoints along after the first is begun: the disk stands still.
    let mut frozen = false;
    let waits = loop {
        if !node.try_put(keys, &VALUE) {
            break false;
        }
        keys += 1;
        let applied = node.apply_some();
        if !frozen {
            node.store.poll_checkpoint(Lsn::ZERO, Instant::now()).expect("it waits for the commit LSN");
            frozen = node.store.overlay_bytes() >= STORE_CONFIG.checkpoint_bytes;
        }
        assert!(node.store.overlay_bytes() <= bound(), "{} bytes after {keys} keys", node.store.overlay_bytes());
        if applied == Applied::Waits {
            break true;
        }
    };
    assert!(waits && node.store.overloaded());
    let applied = node.store.applied();
    // What comes now stays in the log, until that has no memory left and takes nothing more.
    while node.try_put(keys, &VALUE) {
        keys += 1;
        assert_eq!((node.apply_some(), node.store.applied()), (Applied::Waits, applied));
        assert!(keys < 1000, "the log buffer is bounded");
    }
    // The disk works again.
    while node.apply_some() != Applied::All {
        node.store.poll_checkpoint(Lsn::ZERO, Instant::now()).expect("it goes beyond the commit LSN");
        node.store.finish_checkpoint().expect("a checkpoint");
        assert!(node.store.overlay_bytes() <= bound());
    }
    assert!(node.store.get(&(keys - 1).to_be_bytes()).expect("read").is_some(), "all of it is there");
}

#[test]
fn replay_of_a_long_log_stays_within_its_bound() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut node = leader(dir.path());
    let keys = 2 * bound() as u64 / VALUE.len() as u64;
    for key in 0..keys {
        assert!(node.try_put(key, &VALUE));
        node.apply();
        node.store.poll_checkpoint(Lsn::MAX, Instant::now()).expect("moved along");
        node.store.finish_checkpoint().expect("a checkpoint");
    }
    drop(node);
    // As after its damage: the store is made anew from the log.
    std::fs::remove_dir_all(dir.path().join(crate::store::STORE_DIR)).expect("removed");
    let mut node = TestReplica::open(dir.path());
    let mut turns = 0;
    loop {
        let before = node.store.applied();
        let applied = node.apply_some();
        assert!(node.store.applied().since(before) <= APPLY_BYTES_PER_TURN_MAX + 2 * FRAME_BYTES, "one turn is short");
        assert!(node.store.overlay_bytes() <= bound(), "{} bytes", node.store.overlay_bytes());
        node.store.poll_checkpoint(Lsn::ZERO, Instant::now()).expect("moved along");
        match applied {
            Applied::More => {}
            Applied::All => break,
            Applied::Waits => node.store.finish_checkpoint().expect("a checkpoint"),
        }
        turns += 1;
    }
    assert!(turns > 4 && node.store.checkpoints() > 1, "{turns} turns, {} checkpoints", node.store.checkpoints());
    assert!(node.store.durable_applied() > Lsn::ZERO, "a start that is cut off keeps what was done");
    assert!(node.store.get(&(keys - 1).to_be_bytes()).expect("read").is_some());
}
