//! The proof that the simulator can find something: bugs that are built in on purpose, each of which it has to find within a
//! number of seeds.

use std::time::Instant;

use walferry_cluster::level::CommitLevel;
use walferry_engine::mutants::turn_on;

use crate::clients::{ClientKind, Tempo};
use crate::faults::{Fault, Plan, RunRequest};
use crate::runner::run_all;

/// Seeds within which each is found, under the faults that bring it out.
pub const SEEDS_MAX: u64 = 80;

/// A deliberate bug.
pub struct Mutant {
    pub name: &'static str,
    /// What it does.
    what: &'static str,
    /// The faults under which it shows soonest, and other circumstances.
    wanted: RunRequest<'static>,
}

const fn mutant(name: &'static str, what: &'static str, faults: &'static [Fault]) -> Mutant {
    tuned(name, what, faults, |_| ())
}

const fn tuned(name: &'static str, what: &'static str, faults: &'static [Fault], tune: fn(&mut Plan)) -> Mutant {
    Mutant { name, what, wanted: RunRequest { faults, wide: false, tune } }
}

const CRASHES: &[Fault] = &[Fault::Kill, Fault::KillAll, Fault::KillLeader];
const CUT_OFF: &[Fault] = &[Fault::Isolate, Fault::OneWay, Fault::Split];
const CUT_OFF_AND_KILLED: &[Fault] = &[Fault::Isolate, Fault::OneWay, Fault::KillLeader];
const POWER: &[Fault] = &[Fault::KillAll, Fault::KillLeader];
const FENCES: &[Fault] = &[Fault::KillFenced, Fault::Split];
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

/// So is the time in which a member that forgot its promise serves the leader of before.
fn slower_register(plan: &mut Plan) {
    plan.register_us = 600_000;
    plan.delays.lost_per_mille = 0;
}

/// Two with the log, of which one soon has nobody in sync, and a witness.
fn witness_of_one(plan: &mut Plan) {
    impatient(plan);
    plan.take_a_witness(2);
    plan.min_in_sync = 0;
}

/// Whoever comes first, there is another that confirms sooner.
fn named(plan: &mut Plan) {
    (plan.nodes, plan.witnesses, plan.policy) = (3, 0, "FIRST 1 (a, b)");
}

/// A leader that has led for a while goes on without its only replica, and dies before that one has everything.
fn alone_for_a_while(plan: &mut Plan) {
    plan.take_a_witness(2);
    plan.policy = "ANY 1 (*)";
    plan.degrade();
    (plan.pause_us, plan.faults_us) = ((400_000, 1_200_000), 9_000_000);
}

fn with_a_witness(plan: &mut Plan) {
    plan.take_a_witness(2);
    plan.policy = "ALL";
}

/// One of two needs a snapshot, and confirms nothing meanwhile: the newest checkpoint is old, and much is written at `local`.
fn long_log_behind(plan: &mut Plan) {
    plan.take_a_witness(2);
    (plan.policy, plan.on_sync_loss, plan.min_in_sync) = ("", "block", 0);
    (plan.checkpoint_bytes, plan.checkpoint_us) = (4 << 20, 1_000);
    (plan.keep_bytes_min, plan.slot_keep_bytes_max, plan.snapshot_rate) = (0, 256 << 10, 0);
    plan.clients.extend([ClientKind::Writer(CommitLevel::Local); 6]);
    plan.pause_us = (1_000_000, 2_000_000);
}

/// Every flush is a step of its own.
fn separate_flushes(plan: &mut Plan) {
    (plan.sync_method, plan.checkpoint_bytes) = ("fdatasync", 4 << 20);
}

/// Commits wait for all who keep up, who soon do not.
fn impatient(plan: &mut Plan) {
    (plan.policy, plan.replica_lag_ms) = ("ALL", 100);
}

/// Commits need one other node's disk, whoever is in sync.
fn one_in_sync(plan: &mut Plan) {
    impatient(plan);
    plan.min_in_sync = 1;
}

/// Replicas that are slow for a moment are out of sync, and what they are sent they flush much later.
fn slow_replicas(plan: &mut Plan) {
    impatient(plan);
    // A majority without those that have everything.
    plan.nodes = 5;
    slow_disks(plan);
    plan.pause_us = (50_000, 400_000);
}

/// A replica that is cut off is soon out of sync, the other one loses its disk.
fn few_in_sync(plan: &mut Plan) {
    impatient(plan);
    slow_disks(plan);
    plan.pause_us = (50_000, 400_000);
}

/// A leader that is cut off soon has to checkpoint what is not committed, and the checkpoint takes long.
fn beyond_commits(plan: &mut Plan) {
    (plan.checkpoint_bytes, plan.checkpoint_us) = (8 << 10, 2_000_000);
    plan.keep_bytes_min = 1 << 20;
}

/// Frames are with the replicas long before the leader has them on its disk.
fn slow_leader(plan: &mut Plan) {
    slow_disks(plan);
    (plan.delays.min_us, plan.delays.spread_us) = (20, 30);
}

/// Time to see that nobody leads.
fn long_and_quiet(plan: &mut Plan) {
    plan.faults_us = 9_000_000;
    plan.delays.lost_per_mille = 0;
}

fn often(plan: &mut Plan) {
    plan.pause_us = (100_000, 400_000);
}

/// Whoever is left to wait soon asks the next leader.
fn many_registers(plan: &mut Plan) {
    plan.clients.extend([ClientKind::Register; 4]);
}

/// Few and equal writes, so that epochs use the same LSNs, and sessions that watch over more than one failover.
fn watchers(plan: &mut Plan) {
    plan.clients.truncate(1);
    plan.clients.extend([ClientKind::Watcher; 16]);
    plan.tempo = Tempo { think_us: 400_000, watch_us: 3_000_000 };
    (plan.pause_us, plan.faults_us) = ((1_500_000, 2_500_000), 9_000_000);
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
        &[Fault::KillFenced, Fault::Kill],
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
    tuned("vote-twice", "a voter grants its vote to a leader that it promised to refuse", FENCES, slow_register),
    tuned(
        "forget-the-fence",
        "a promise to refuse older leaders is not on the disk",
        &[Fault::KillFenced],
        slower_register,
    ),
    mutant(
        "forget-the-loss",
        "a member that lost its disk counts as before",
        &[Fault::LoseDisk, Fault::KillLeader, Fault::Isolate],
    ),
    mutant("speak-without-a-lease", "a leader acknowledges although its lease is over", LEFT_ALONE),
    mutant("stretch-the-lease", "a lease lasts longer than the grants that it rests on", LEFT_ALONE),
    mutant("lead-with-any-log", "the failover takes a fenced member that does not reach furthest", CUT_OFF_AND_KILLED),
    mutant("lead-without-a-majority", "the failover goes on with whoever is fenced", CUT_OFF_AND_KILLED),
    tuned("checkpoint-beyond-commits", "a checkpoint holds what is not committed", LEFT_ALONE, small_checkpoints),
    mutant("keep-what-was-applied", "a rollback of the store forgets to say where it went back to", CUT_OFF_AND_KILLED),
    mutant("forget-the-session", "a session's token is not waited for", CUT_OFF),
    tuned("recycle-what-is-needed", "a segment is recycled although a slot holds it", &[Fault::Split], little_log),
    tuned("checkpoint-without-a-flush", "what the store flushes is not on its disk", CRASHES, some_log),
    tuned(
        "count-older-epochs",
        "what older epochs left counts without a frame of this one",
        CUT_OFF_AND_KILLED,
        |_| (),
    ),
    tuned(
        "min-in-sync-at-admission",
        "commits under way are answered although too few replicas are in sync by then",
        LEFT_ALONE,
        one_in_sync,
    ),
    tuned(
        "join-without-proof",
        "a replica joins the in-sync set before it has anything",
        &[Fault::Isolate, Fault::Isolate, Fault::KillLeader, Fault::SlowDisk],
        slow_replicas,
    ),
    tuned(
        "complete-without-proof",
        "a member that lost its disk counts by what it confirmed before",
        &[Fault::LoseDisk, Fault::SlowDisk, Fault::SlowDisk],
        few_in_sync,
    ),
    tuned(
        "check-before-the-checkpoint",
        "a rewind does not wait for the checkpoint that may hold what is cut",
        &[Fault::ThereAndBack],
        beyond_commits,
    ),
    tuned(
        "no-apply-limit",
        "a replica applies what only its last leader had made durable",
        &[Fault::KillLeader, Fault::SlowDisk, Fault::Isolate],
        slow_leader,
    ),
    tuned(
        "forget-before-keeping",
        "a rewind forgets what it cuts before that is kept",
        &[Fault::Isolate, Fault::KillHalfway],
        often,
    ),
    tuned(
        "monotonic-lease-clock",
        "leases are measured by a clock that stands still in a suspended machine",
        &[Fault::Suspend],
        many_registers,
    ),
    tuned(
        "heartbeats-of-a-fenced-leader",
        "a leader that promised to refuse its own epoch goes on with its heartbeats",
        &[Fault::KillController],
        long_and_quiet,
    ),
    tuned(
        "count-a-witness",
        "a failover takes a witness for one that has what was confirmed",
        &[Fault::Isolate, Fault::KillLeader],
        witness_of_one,
    ),
    tuned(
        "forget-the-policy",
        "a cluster that a witness forms has a witness's sync policy, which is none",
        LEFT_ALONE,
        with_a_witness,
    ),
    tuned("first-of-anybody", "FIRST k counts replicas that it does not name", LEFT_ALONE, named),
    tuned(
        "claim-what-was-asked",
        "a commit that was answered at a lower level claims the one that was asked for",
        &[Fault::Kill, Fault::KillLeader],
        alone_for_a_while,
    ),
    tuned(
        "old-snapshot",
        "a snapshot is made of the newest checkpoint, however old that is",
        &[Fault::LoseDisk],
        long_log_behind,
    ),
    mutant("rename-without-directory-sync", "a small file's new name is not durable when it is relied on", CRASHES),
    tuned(
        "count-without-keeping",
        "a rewind counts what it cuts, and the file that keeps it gets no name",
        &[Fault::Isolate, Fault::KillLeader],
        often,
    ),
    tuned(
        "keep-without-counting",
        "a rewind keeps what it cuts and does not count it",
        &[Fault::Isolate, Fault::KillLeader],
        often,
    ),
    tuned("watch-by-lsn", "WATCH compares LSNs, which a later epoch uses again", &[Fault::ThereAndBack], watchers),
];

fn unknown(name: &str) -> String {
    let names: Vec<&str> = ALL.iter().map(|mutant| mutant.name).collect();
    format!("no such mutant: {name}; there are {}", names.join(", "))
}

/// Under which circumstances a bug is looked for.
pub fn circumstances(name: &str) -> Result<RunRequest<'static>, String> {
    let mutant = ALL.iter().find(|mutant| mutant.name == name).ok_or_else(|| unknown(name))?;
    Ok(RunRequest { ..mutant.wanted })
}

/// Runs seeds with a bug built in until it is found; true when every one of those that were asked for was. With `only` under these
/// faults and no others.
pub fn hunt(name: &str, from: u64, seeds: u64, only: &[Fault]) -> bool {
    let wanted: Vec<_> = ALL.iter().filter(|mutant| name == "all" || name == mutant.name).collect();
    if wanted.is_empty() {
        println!("{}", unknown(name));
        return false;
    }
    let mut all_found = true;
    for Mutant { name, what, wanted } in wanted {
        turn_on(name);
        let wanted = RunRequest { faults: if only.is_empty() { wanted.faults } else { only }, ..*wanted };
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
