//! The proof that the simulator can find something: bugs that are built in on purpose, each of which it has to find within a
//! number of seeds.

use std::time::Instant;

use walferry_engine::mutants::turn_on;

use crate::faults::Fault;
use crate::runner::run_all;

/// Seeds within which each is found, under the faults that bring it out.
pub const SEEDS_MAX: u64 = 40;

/// A deliberate bug.
pub struct Mutant {
    pub name: &'static str,
    /// What it does.
    what: &'static str,
    /// Under these faults it shows soonest; none: those of the seed.
    faults: &'static [Fault],
}

const fn mutant(name: &'static str, what: &'static str, faults: &'static [Fault]) -> Mutant {
    Mutant { name, what, faults }
}

const CRASHES: &[Fault] = &[Fault::Kill, Fault::KillAll, Fault::KillLeader];
const FAILED_FLUSHES: &[Fault] = &[Fault::BrokenDisk, Fault::KillAll];
const CUT_OFF: &[Fault] = &[Fault::Isolate, Fault::OneWay, Fault::Split];
const CUT_OFF_AND_KILLED: &[Fault] = &[Fault::Isolate, Fault::OneWay, Fault::KillLeader];

/// All of them.
pub const ALL: &[Mutant] = &[
    mutant("ack-before-flush", "the log calls durable what it has only submitted", CRASHES),
    mutant("answer-before-the-flush", "commits at `local` are answered when they are appended", CRASHES),
    mutant("write-without-a-flush", "the log's writes carry no flush", CRASHES),
    mutant("retry-the-flush", "a flush that failed counts as done", FAILED_FLUSHES),
    mutant("believe-headers", "recovery takes a frame whose records are torn", CRASHES),
    mutant("take-any-chain", "a frame need not name the one before it", CRASHES),
    mutant("forget-the-epoch", "an epoch is not on the disk when its first frame is", CRASHES),
    mutant("ack-without-replicas", "the commit rule releases remote levels with the local flush", CUT_OFF_AND_KILLED),
    mutant("count-what-is-received", "a replica counts as having flushed what it has only received", CRASHES),
    mutant(
        "shrink-at-once",
        "commits stop waiting for a replica before the register has it out of the in-sync set",
        CUT_OFF,
    ),
    mutant(
        "forget-the-fork",
        "a replica's stream begins where its own log ends, and not where it parts from the leader's",
        CUT_OFF_AND_KILLED,
    ),
    mutant("skip-the-epoch", "a replica follows a leader that it has promised against", CUT_OFF),
    mutant("vote-twice", "a voter grants the old leader a lease after it has promised itself to a new one", CUT_OFF),
    mutant("forget-the-seal", "what a member promised to a new leader is not on its disk", CUT_OFF_AND_KILLED),
    mutant("speak-without-a-lease", "a leader acknowledges although its lease is over", CUT_OFF),
    mutant("stretch-the-lease", "a lease lasts longer than the grants that it rests on", CUT_OFF),
    mutant("lead-with-any-log", "the failover takes a sealed member that does not reach furthest", CUT_OFF_AND_KILLED),
    mutant("lead-without-a-majority", "the failover goes on with whoever is sealed", CUT_OFF_AND_KILLED),
    mutant("checkpoint-beyond-commits", "a checkpoint holds what is not committed", CUT_OFF_AND_KILLED),
    mutant("keep-what-was-applied", "a rollback of the store forgets to say where it went back to", CUT_OFF_AND_KILLED),
    mutant("forget-the-session", "a session's token is not waited for", CUT_OFF),
    mutant("recycle-what-is-needed", "a segment is recycled although a slot holds it", CUT_OFF_AND_KILLED),
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
    for Mutant { name, what, faults } in wanted {
        turn_on(name);
        let faults = if only.is_empty() { faults } else { only };
        let (mut found, begun) = (None, Instant::now());
        run_all(from..from + seeds, faults, None, |seed, outcome| {
            if let Err(broken) = outcome {
                found.get_or_insert((seed, broken));
            }
            found.is_none()
        });
        turn_on("");
        let time = begun.elapsed().as_secs_f64();
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
