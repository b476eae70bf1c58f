//! The waterfall on a clock of its own: every stage, both critical paths, sampling, bounds.

use super::*;

struct Clock(Instant);

impl Clock {
    fn at(&self, us: u64) -> Instant {
        self.0 + Duration::from_micros(us)
    }
}

fn mean(level: &LevelStages, stage: Stage) -> f64 {
    level.stages[stage as usize].mean()
}

/// Every level is met that is released.
fn released(lsn: u64) -> LevelsReached {
    LevelsReached { released: [Lsn(lsn); LEVELS.len()], met: [Lsn(lsn); LEVELS.len()] }
}

/// One commit that ends at 100 at `level`; the replica's acknowledgements arrive at `heard` for write, flush and apply.
fn run(level: CommitLevel, heard: [u64; 3], local_flush: u64) -> Waterfall {
    let clock = Clock(Instant::now());
    let mut waterfall = Waterfall::new(true);
    assert!(waterfall.begin(Lsn(100), level, || clock.at(0)));
    waterfall.reached(Step::Sealed, Lsn(4096), clock.at(10));
    waterfall.reached(Step::Submitted, Lsn(4096), clock.at(12));
    let reached = |written, flushed, applied| ReplicaReached {
        sent: Lsn(4096),
        written: Lsn(written),
        flushed: Lsn(flushed),
        applied: Lsn(applied),
    };
    waterfall.replica_reached("b", reached(0, 0, 0), clock.at(15), clock.at(15));
    waterfall.replica_reached("b", reached(4096, 0, 0), clock.at(heard[0]), clock.at(heard[0]));
    waterfall.reached(Step::Flushed, Lsn(4096), clock.at(local_flush));
    waterfall.reached(Step::Applied, Lsn(4096), clock.at(local_flush + 5));
    waterfall.replica_reached("b", reached(4096, 4096, 0), clock.at(heard[1]), clock.at(heard[1]));
    waterfall.replica_reached("b", reached(4096, 4096, 4096), clock.at(heard[2]), clock.at(heard[2]));
    let end = (local_flush + 5).max(heard[level as usize - 2]);
    waterfall.replied(&released(100), clock.at(end + 3));
    assert_eq!(waterfall.levels[level as usize].samples, 0, "the replica's own durations are still to come");
    let traced = Traced { end: Lsn(4096), flushes: 7, records: 9, written_us: 4, flushed_us: 104, applied_us: 110 };
    waterfall.traced("b", traced);
    waterfall.replied(&released(100), clock.at(end + 500));
    assert!(!waterfall.is_following());
    waterfall
}

#[test]
fn the_stages_of_the_critical_branch_add_up_to_the_total() {
    let remote = [Stage::HandOver, Stage::NetworkOut, Stage::ReplicaWrite, Stage::ReplicaFlush, Stage::ReplicaApply];
    let local = [Stage::LocalQueue, Stage::LocalFlush, Stage::LocalApply];
    for level in [CommitLevel::RemoteWrite, CommitLevel::RemoteFlush, CommitLevel::RemoteApply] {
        for local_flush in [90, 9000] {
            let waterfall = run(level, [1019, 1119, 1125], local_flush);
            let seen = &waterfall.levels[level as usize];
            let of = |stages: &[Stage]| stages.iter().map(|stage| mean(seen, *stage)).sum::<f64>();
            let (local, remote) = (of(&local), of(&remote) + mean(seen, Stage::NetworkBack));
            assert_eq!(local, (local_flush + 5 - 10) as f64);
            let ends = mean(seen, Stage::FrameWait) + local.max(remote) + mean(seen, Stage::Reply);
            assert!((ends - seen.total.mean()).abs() <= 0.02 * seen.total.mean(), "{level}: {ends}");
            assert_eq!((seen.critical_local, seen.critical_remote), if local_flush > 1000 { (1, 0) } else { (0, 1) });
            assert_eq!(seen.decided, [1]);
            let network = mean(seen, Stage::NetworkOut) + mean(seen, Stage::NetworkBack);
            assert_eq!(network, 1000.0, "{level}: what the replica did is not the network's");
        }
    }
}

#[test]
fn a_replica_that_was_not_needed_does_not_decide() {
    let clock = Clock(Instant::now());
    let mut waterfall = Waterfall::new(true);
    waterfall.begin(Lsn(100), CommitLevel::RemoteFlush, || clock.at(0));
    for step in [Step::Sealed, Step::Submitted, Step::Flushed, Step::Applied] {
        waterfall.reached(step, Lsn(4096), clock.at(100));
    }
    let all = ReplicaReached { sent: Lsn(4096), written: Lsn(4096), flushed: Lsn(4096), applied: Lsn(4096) };
    let sent = ReplicaReached { sent: Lsn(4096), ..ReplicaReached::default() };
    waterfall.replica_reached("far", sent, clock.at(100), clock.at(100));
    waterfall.replica_reached("near", all, clock.at(100), clock.at(300));
    waterfall.replied(&released(100), clock.at(310));
    waterfall.replica_reached("far", all, clock.at(100), clock.at(50_000));
    let traced = Traced { end: Lsn(4096), flushes: 1, records: 1, written_us: 1, flushed_us: 2, applied_us: 3 };
    waterfall.traced("near", traced);
    waterfall.replied(&released(100), clock.at(400));
    let seen = &waterfall.levels[CommitLevel::RemoteFlush as usize];
    assert_eq!(waterfall.replicas()[1].name, "near");
    assert_eq!(seen.decided, [0, 1]);
    assert_eq!(seen.total.max(), 310);
}

#[test]
fn only_so_many_commits_are_sampled_and_all_are_counted() {
    let clock = Clock(Instant::now());
    let mut waterfall = Waterfall::new(true);
    waterfall.account(0, clock.at(0));
    let mut sampled = 0;
    for second in 0..4u64 {
        for n in 0..100_000u64 {
            let (lsn, now) = (Lsn(second * 1_000_000 + n + 1), clock.at(second * 1_000_000 + n * 10));
            if waterfall.begin(lsn, CommitLevel::Off, || now) && second > 0 {
                sampled += 1;
            }
            waterfall.replied(&released(u64::MAX), now);
            waterfall.account(second * 100_000 / 4, now);
        }
        waterfall.account(second, clock.at((second + 1) * 1_000_000));
    }
    assert_eq!(waterfall.levels[CommitLevel::Off as usize].commits, 400_000);
    assert!((5_000..=6_600).contains(&sampled), "{sampled} samples in three seconds");
    assert_eq!(waterfall.one_in(), 50);
}

#[test]
fn flushes_are_shared_out_by_the_commits_they_carried() {
    let clock = Clock(Instant::now());
    let mut waterfall = Waterfall::new(true);
    for n in 0..40u64 {
        let level = if n % 4 == 0 { CommitLevel::RemoteApply } else { CommitLevel::Local };
        waterfall.begin(Lsn(n + 1), level, || clock.at(n));
    }
    waterfall.account(8, clock.at(100));
    assert_eq!(waterfall.levels[CommitLevel::RemoteApply as usize].flushes_share, 2.0);
    assert_eq!(waterfall.levels[CommitLevel::Local as usize].flushes_share, 6.0);
}

/// A leader that degrades answers with less than was asked for, also what began before.
#[test]
fn degraded_commits_count_under_the_level_that_was_met() {
    let clock = Clock(Instant::now());
    let mut waterfall = Waterfall::new(true);
    let all = ReplicaReached { sent: Lsn(250), written: Lsn(150), flushed: Lsn(150), applied: Lsn(150) };
    for (lsn, level) in [(100, CommitLevel::RemoteApply), (200, CommitLevel::RemoteFlush), (250, CommitLevel::Off)] {
        assert!(waterfall.begin(Lsn(lsn), level, || clock.at(0)));
        let confirmed = LevelsReached { released: [Lsn(0); LEVELS.len()], met: [Lsn(0); LEVELS.len()] };
        waterfall.replied(&confirmed, clock.at(1));
    }
    for step in [Step::Sealed, Step::Submitted, Step::Flushed, Step::Applied] {
        waterfall.reached(step, Lsn(250), clock.at(10));
    }
    waterfall.replica_reached("b", all, clock.at(20), clock.at(20));
    waterfall
        .traced("b", Traced { end: Lsn(150), flushes: 1, records: 1, written_us: 1, flushed_us: 2, applied_us: 3 });
    let counted = |waterfall: &Waterfall| waterfall.levels.each_ref().map(|level| (level.commits, level.samples));
    assert_eq!(counted(&waterfall), [(0, 0); 5], "nothing was answered");
    assert!(waterfall.is_awaiting());
    let [remote, local] = [Lsn(150), Lsn(250)];
    waterfall
        .replied(&LevelsReached { released: [local; 5], met: [local, local, remote, remote, remote] }, clock.at(30));
    assert_eq!(counted(&waterfall), [(1, 1), (1, 1), (0, 0), (0, 0), (1, 1)], "off, local, and one that was confirmed");
    assert!(!waterfall.is_awaiting());
    // What is given up with the leadership was never answered.
    waterfall.begin(Lsn(300), CommitLevel::RemoteApply, || clock.at(40));
    waterfall.abandon();
    waterfall.replied(&released(300), clock.at(50));
    assert_eq!(counted(&waterfall)[4], (1, 1));
}

#[test]
fn a_sample_without_its_trace_is_given_up_in_time() {
    let clock = Clock(Instant::now());
    let mut waterfall = Waterfall::new(true);
    waterfall.begin(Lsn(100), CommitLevel::RemoteWrite, || clock.at(0));
    for step in [Step::Sealed, Step::Submitted, Step::Flushed, Step::Applied] {
        waterfall.reached(step, Lsn(100), clock.at(10));
    }
    let reached = ReplicaReached { sent: Lsn(100), written: Lsn(100), ..ReplicaReached::default() };
    waterfall.replica_reached("b", reached, clock.at(10), clock.at(20));
    waterfall.replied(&released(100), clock.at(30));
    assert!(waterfall.is_following());
    waterfall.replied(&released(100), clock.at(30) + TRACE_WAIT_MAX);
    assert!(!waterfall.is_following());
    assert_eq!((waterfall.untraced(), waterfall.levels[2].samples), (1, 0));
}

#[test]
fn accounting_that_is_off_samples_nothing() {
    let mut waterfall = Waterfall::new(false);
    assert!(!waterfall.begin(Lsn(1), CommitLevel::Local, || panic!("no clock is read")));
    assert_eq!(waterfall.levels[1].commits, 0);
}
