//! A node dies after each step of a rewind; whatever the next start finds, nothing that was cut is lost.

use std::fs;
use std::time::Instant;

use walferry_engine::log::LOST_DIR;
use walferry_engine::lsn::Epoch;

use super::*;
use crate::test_replica::{PATIENCE, TestReplica};
use crate::view::View;

/// Commits before the fork, and behind it.
const KEPT: u64 = 5;
const CUT: u64 = 7;

impl TestReplica {
    fn rewind(&mut self, dir: &Path, leads: &EpochHistory, steps: &[Step]) -> (Outcome, u64) {
        let mut lost_commits = 0;
        let start = leads.fork_with(&self.history, self.log.flushed());
        let mut rewind = Rewind {
            leader: "b",
            dir,
            start,
            leads,
            log: &mut self.log,
            store: &mut self.store,
            history: &mut self.history,
            lost_commits: &mut lost_commits,
        };
        let outcome = rewind.steps(steps).expect("the steps are done");
        (outcome, lost_commits)
    }

    fn holds(&self) -> Vec<u64> {
        (0..KEPT + CUT).filter(|key| self.store.get(&key.to_be_bytes()).expect("read").is_some()).collect()
    }
}

fn history(entries: &[(u64, Lsn)]) -> EpochHistory {
    let entries: Vec<_> = entries.iter().map(|&(epoch, lsn)| (Epoch(epoch), lsn)).collect();
    EpochHistory::from_entries(&entries).expect("ascending")
}

/// A former leader that has flushed and applied what no later leader has, and the history of the one that it is to follow.
fn former_leader(dir: &Path) -> (TestReplica, EpochHistory, Vec<u8>) {
    history(&[(1, Lsn::ZERO)]).save(dir).expect("saved");
    let mut replica = TestReplica::open(dir);
    replica.log.lead(Epoch(1));
    (0..KEPT).for_each(|key| replica.put(key));
    let fork = replica.log.sealed();
    (KEPT..KEPT + CUT).for_each(|key| replica.put(key));
    replica.log.resign();
    replica.apply();
    let segment = fs::read(dir.join("log").join(walferry_engine::lsn::SegmentNo(0).file_name())).expect("the segment");
    let cut = segment[fork.0 as usize..replica.log.sealed().0 as usize].to_vec();
    (replica, history(&[(1, Lsn::ZERO), (2, fork)]), cut)
}

/// What is in `lost/` under a name of its own.
fn kept(dir: &Path) -> Vec<Vec<u8>> {
    let Ok(entries) = fs::read_dir(dir.join(LOST_DIR)) else { return Vec::new() };
    let paths = entries.map(|entry| entry.expect("an entry").path());
    let named = paths.filter(|path| path.extension().is_some_and(|ending| ending == "frames"));
    named.map(|path| fs::read(path).expect("read")).collect()
}

/// Dies after `done` of `steps`, starts again and is welcomed by the same leader; what was kept and what all processes counted.
fn died_after(steps: &[Step], done: usize) -> (Vec<Vec<u8>>, u64, Vec<u8>) {
    let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).expect("a directory on a real disk");
    let (mut replica, leads, cut) = former_leader(dir.path());
    let (_, first) = replica.rewind(dir.path(), &leads, &steps[..done]);
    drop(replica);
    let mut replica = TestReplica::open(dir.path());
    replica.apply();
    let (outcome, second) = replica.rewind(dir.path(), &leads, steps);
    assert_eq!(outcome, Outcome::Done);
    replica.apply();
    assert_eq!((replica.log.sealed(), replica.store.applied()), (leads.last_start(), leads.last_start()));
    assert_eq!(replica.holds(), (0..KEPT).collect::<Vec<_>>(), "after {done} steps of {steps:?}");
    assert_eq!(EpochHistory::load(dir.path()).expect("a history"), leads);
    (kept(dir.path()), first + second, cut)
}

#[test]
fn death_after_any_step_keeps_and_counts_what_is_cut() {
    for done in 0..=STEPS.len() {
        let (kept, counted, cut) = died_after(&STEPS, done);
        assert!(kept == [cut], "after {done} steps: {} files", kept.len());
        // Whoever dies between keeping and forgetting has counted them, and so does the next start.
        let kept_before = STEPS[..done].contains(&Step::Keep);
        let repeats = kept_before && !STEPS[..done].contains(&Step::History);
        assert_eq!(counted, if repeats { 2 * CUT } else { CUT }, "after {done} steps");
    }
}

/// The wrong order loses them, and only where a node dies in between: this test would notice.
#[test]
fn death_between_history_and_keep_would_lose_the_frames() {
    let after_history = FORGETFUL_STEPS.iter().position(|step| *step == Step::History).expect("a step") + 1;
    assert_eq!(died_after(&FORGETFUL_STEPS, after_history).0.len(), 0);
    assert_eq!(died_after(&FORGETFUL_STEPS, 0).0.len(), 1);
}

#[test]
fn checkpoint_that_ends_meanwhile_is_seen_before_a_cut() {
    let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).expect("a directory on a real disk");
    let (mut replica, leads, _) = former_leader(dir.path());
    let end = replica.log.sealed();
    // It goes beyond the commit LSN, and its end was not looked at yet.
    replica.store.ask_for_checkpoint(end, true);
    replica.store.poll_checkpoint(Lsn::ZERO, Instant::now()).expect("handed to its thread");
    assert_eq!(replica.store.durable_applied(), Lsn::ZERO);
    let mut outcome = replica.rewind(dir.path(), &leads, &STEPS);
    let started = Instant::now();
    while outcome == (Outcome::Writing, 0) {
        assert!(started.elapsed() < PATIENCE, "waited too long for the checkpoint");
        std::thread::yield_now();
        outcome = replica.rewind(dir.path(), &leads, &STEPS);
    }
    assert_eq!(outcome, (Outcome::Beyond(end), 0));
    assert_eq!((replica.log.sealed(), kept(dir.path()).len()), (end, 0), "nothing was changed");
}

#[test]
fn store_of_another_epoch_below_the_fork_is_beyond_it() {
    let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).expect("a directory on a real disk");
    let (mut replica, _, _) = former_leader(dir.path());
    let end = replica.log.sealed();
    replica.store.ask_for_checkpoint(end, true);
    replica.store.poll_checkpoint(Lsn::ZERO, Instant::now()).expect("handed to its thread");
    replica.store.finish_checkpoint().expect("written");
    // As long as the leader's, whose frames before that LSN are of another epoch.
    let leads = history(&[(2, Lsn::ZERO)]);
    let mut lost_commits = 0;
    let rewind = Rewind {
        leader: "b",
        dir: dir.path(),
        start: end,
        leads: &leads,
        log: &mut replica.log,
        store: &mut replica.store,
        history: &mut replica.history,
        lost_commits: &mut lost_commits,
    };
    assert_eq!(rewind.run().expect("looked at"), Outcome::Beyond(end));
}
