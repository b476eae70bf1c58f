//! The proof that the simulator can find something: bugs that are built in on purpose, each of which it has to find within a
//! number of seeds.

use walferry_engine::mutants::turn_on;

use crate::runner::run_all;

/// Seeds within which each is found.
pub const SEEDS_MAX: u64 = 400;

/// Each deliberate bug and what it does.
pub const ALL: [(&str, &str); 16] = [
    ("ack-before-flush", "the log calls durable what it has only submitted"),
    ("answer-before-the-flush", "commits at `local` are answered when they are appended"),
    ("write-without-a-flush", "the log's writes carry no flush"),
    ("retry-the-flush", "a flush that failed counts as done"),
    ("believe-headers", "recovery takes a frame whose records are torn"),
    ("forget-the-epoch", "an epoch is not on the disk when its first frame is"),
    ("ack-without-replicas", "the commit rule releases remote levels with the local flush"),
    ("count-what-is-received", "a replica counts as having flushed what it has only received"),
    ("forget-the-fork", "a replica's stream begins where its own log ends, and not where it parts from the leader's"),
    ("speak-without-a-lease", "a leader acknowledges although its lease is over"),
    ("stretch-the-lease", "a lease lasts longer than the grants that it rests on"),
    ("lead-with-any-log", "the failover takes a sealed member that does not reach furthest"),
    ("lead-without-a-majority", "the failover goes on with whoever is sealed"),
    ("checkpoint-beyond-commits", "a checkpoint holds what is not committed"),
    ("keep-what-was-applied", "a rollback of the store forgets to say where it went back to"),
    ("forget-the-session", "a session's token is not waited for"),
];

/// Runs seeds with a bug built in until it is found; true when every one of those that were asked for was.
pub fn hunt(name: &str, from: u64, seeds: u64) -> bool {
    let wanted: Vec<_> = ALL.iter().filter(|(known, _)| name == "all" || name == *known).collect();
    if wanted.is_empty() {
        println!("no such mutant: {name}; there are {}", ALL.map(|(name, _)| name).join(", "));
        return false;
    }
    let mut all_found = true;
    for (name, what) in wanted {
        turn_on(name);
        let mut found = None;
        run_all(from..from + seeds, &[], None, |seed, outcome| {
            if let Err(broken) = outcome {
                found = Some((seed, broken));
            }
            found.is_none()
        });
        turn_on("");
        match found {
            Some((seed, broken)) => {
                let text: String = broken.lines().next().unwrap_or_default().chars().take(110).collect();
                println!("{name:<26} found by seed {seed} ({} seeds): {text}", seed - from + 1);
            }
            None => {
                println!("{name:<26} NOT FOUND in {seeds} seeds ({what})");
                all_found = false;
            }
        }
    }
    all_found
}
