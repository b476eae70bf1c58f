//! The proof that the simulator can find something: bugs that are built in on purpose, each of which it has to find within a
//! number of seeds.

use std::time::Instant;

use walferry_engine::mutants::turn_on;

use crate::faults::{Fault, Plan, Wanted};
use crate::runner::run_all;

/// Seeds within which each is found, under the faults that bring it out.
pub const SEEDS_MAX: u64 = 120;

/// A deliberate bug.
pub struct Mutant {
    pub name: &'static str,
    /// What it does.
    what: &'static str,
    /// The faults under which it shows soonest, and other circumstances.
    wanted: Wanted<'static>,
}

const fn mutant(name: &'static str, what: &'static str, faults: &'static [Fault]) -> Mutant {
    tuned(name, what, faults, |_| ())
}

const fn tuned(name: &'static str, what: &'static str, faults: &'static [Fault], tune: fn(&mut Plan)) -> Mutant {
    Mutant { name, what, wanted: Wanted { faults, tune } }
}

const CRASHES: &[Fault] = &[Fault::Kill, Fault::KillAll, Fault::KillLeader];
const CUT_OFF: &[Fault] = &[Fault::Isolate, Fault::OneWay, Fault::Split];
const CUT_OFF_AND_KILLED: &[Fault] = &[Fault::Isolate, Fault::OneWay, Fault::KillLeader];
const POWER: &[Fault] = &[Fault::KillAll, Fault::KillLeader];
const SEALS: &[Fault] = &[Fault::KillSealed, Fault::Split];
const LEFT_ALONE: &[Fault] = &[Fault::Isolate];

fn slow_disks(plan: &mut Plan) {
    (plan.disk.write_us, plan.disk.spread_us) = (2_000, 8_000);
}

fn small_checkpoints(plan: &mut Plan) {
    plan.checkpoint_bytes = 64 << 10;
}

/// No log is kept but for those who need it.
fn little_log(plan: &mut Plan) {
    small_checkpoints(plan);
    plan.keep_bytes_min = 0;
}

/// Nobody can be made anew from the beginning of the log.
fn some_log(plan: &mut Plan) {
    small_checkpoints(plan);
    plan.keep_bytes_min = 512 << 10;
}

/// Between a promise and the new leader there is time.
fn slow_register(plan: &mut Plan) {
    plan.register_us = 300_000;
}

/// Every flush is a step of its own.
fn separate_flushes(plan: &mut Plan) {
    (plan.sync_method, plan.checkpoint_bytes) = ("fdatasync", 4 << 20);
}

/// Commits wait for all who keep up, who soon do not.
fn impatient(plan: &mut Plan) {
    (plan.policy, plan.replica_lag_ms) = ("ALL", 100);
}

/// All of them.
pub const ALL: &[Mutant] = &[
    mutant("ack-before-flush", "the log calls durable what it has only submitted", CRASHES),
    mutant("answer-before-the-flush", "commits at `local` are answered when they are appended", POWER),
    mutant("write-without-a-flush", "the log's writes carry no flush", CRASHES),
    tuned(
        "retry-the-flush",
        "a flush that failed counts as done",
        &[Fault::BrokenDisk, Fault::KillAll],
        separate_flushes,
    ),
    tuned("believe-headers", "recovery takes a frame whose records are torn", POWER, slow_disks),
    mutant("cut-what-rots", "recovery takes damage for a torn tail", &[Fault::Rot]),
    tuned(
        "take-any-chain",
        "recovery takes every whole frame that names its place, whichever log it is of",
        &[Fault::KillSealed, Fault::Kill],
        slow_disks,
    ),
    mutant("forget-the-epoch", "an epoch is not on the disk when its first frame is", CRASHES),
    mutant("ack-without-replicas", "the commit rule releases remote levels with the local flush", CUT_OFF_AND_KILLED),
    tuned("count-what-is-received", "a replica counts as having flushed what it has only received", POWER, slow_disks),
    tuned(
        "shrink-at-once",
        "commits stop waiting for a replica before the register has it out of the in-sync set",
        LEFT_ALONE,
        impatient,
    ),
    mutant(
        "forget-the-fork",
        "a replica's stream begins where its own log ends, and not where it parts from the leader's",
        CUT_OFF_AND_KILLED,
    ),
    tuned("vote-twice", "a voter grants its voice to a leader that it promised to refuse", SEALS, slow_register),
    tuned("forget-the-seal", "a promise to refuse older leaders is not on the disk", SEALS, slow_register),
    mutant(
        "forget-the-loss",
        "a member that lost its disk counts as before",
        &[Fault::LoseDisk, Fault::KillLeader, Fault::Isolate],
    ),
    mutant("speak-without-a-lease", "a leader acknowledges although its lease is over", LEFT_ALONE),
    mutant("stretch-the-lease", "a lease lasts longer than the grants that it rests on", LEFT_ALONE),
    mutant("lead-with-any-log", "the failover takes a sealed member that does not reach furthest", CUT_OFF_AND_KILLED),
    mutant("lead-without-a-majority", "the failover goes on with whoever is sealed", CUT_OFF_AND_KILLED),
    tuned("checkpoint-beyond-commits", "a checkpoint holds what is not committed", LEFT_ALONE, small_checkpoints),
    mutant("keep-what-was-applied", "a rollback of the store forgets to say where it went back to", CUT_OFF_AND_KILLED),
    mutant("forget-the-session", "a session's token is not waited for", CUT_OFF),
    tuned("recycle-what-is-needed", "a segment is recycled although a slot holds it", &[Fault::Split], little_log),
    tuned("checkpoint-without-a-flush", "what the store flushes is not on its disk", CRASHES, some_log),
];

/// Runs seeds with a bug built in until it is found; true when every one of those that were asked for was. With `only` under these
/// faults and no others.
pub fn hunt(name: &str, from: u64, seeds: u64, only: &[Fault]) -> bool {
    let wanted: Vec<_> = ALL.iter().filter(|mutant| name == "all" || name == mutant.name).collect();
    if wanted.is_empty() {
        let names: Vec<&str> = ALL.iter().map(|mutant| mutant.name).collect();
        println!("no such mutant: {name}; there are {}", names.join(", "));
        return false;
    }
    let mut all_found = true;
    for Mutant { name, what, wanted } in wanted {
        turn_on(name);
        let wanted = Wanted { faults: if only.is_empty() { wanted.faults } else { only }, ..*wanted };
        let (mut found, begun) = (None, Instant::now());
        run_all(from..from + seeds, &wanted, None, |seed, outcome| {
            if let Err(broken) = outcome {
                found.get_or_insert((seed, broken));
            }
            found.is_none()
        });
        turn_on("");
        // The same without the bug has to hold: it is the bug that was found.
        let mut blamed = None;
        if let Some((seed, _)) = found {
            run_all(seed..seed + 1, &wanted, None, |_, outcome| {
                blamed = outcome.err();
                true
            });
        }
        let time = begun.elapsed().as_secs_f64();
        if let Some(broken) = blamed {
            println!("{name:<26} BROKEN WITHOUT IT as well: {broken}");
            all_found = false;
            continue;
        }
        match found {
            Some((seed, broken)) => {
                let text: String = broken.lines().next().unwrap_or_default().chars().take(110).collect();
                println!("{name:<26} found by seed {seed} ({} seeds, {time:.1} s): {text}", seed - from + 1);
            }
            None => {
                println!("{name:<26} NOT FOUND in {seeds} seeds, {time:.1} s ({what})");
                all_found = false;
            }
        }
    }
    all_found
}
