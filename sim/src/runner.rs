//! Many runs: each in a process of its own, so that a node that panics ends one run and not all, and several at a time.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, pipe};

use crate::cluster::{Cluster, Summary, Variation};
use crate::faults::Wanted;
use crate::trace::Trace;

/// One seed of so many is also about latency.
pub const LATENCY_SEEDS: u64 = 32;
/// The slowest commits with one slow or dead replica, in percent of those with none: they wait for all of the others, of which one
/// more often is the late one. Up to 125 was seen.
const LATENCY_PERCENT_MAX: u64 = 150;

/// What a run came to, as a line, or what it broke and how.
pub type Outcome = Result<String, String>;

/// One run in this process.
pub fn run(seed: u64, wanted: &Wanted<'_>, verbose: bool) -> Result<Summary, String> {
    let summary = run_one(seed, Variation::Faults, wanted, verbose)?;
    if seed.is_multiple_of(LATENCY_SEEDS) {
        latency_holds(seed)?;
    }
    Ok(summary)
}

/// One slow or dead replica that the policy can do without must not multiply what commits take.
fn latency_holds(seed: u64) -> Result<(), String> {
    let p99_us = |variation| run_one(seed, variation, &Wanted::from(&[][..]), false).map(|summary| summary.p99_us);
    let Some(calm) = p99_us(Variation::Calm)? else { return Ok(()) };
    for variation in [Variation::SlowReplica, Variation::DeadReplica] {
        let Some(troubled) = p99_us(variation)? else { continue };
        if troubled * 100 > calm * LATENCY_PERCENT_MAX {
            return Err(format!("{variation:?}: p99 of remote_flush went from {calm} to {troubled} us"));
        }
    }
    Ok(())
}

fn run_one(seed: u64, variation: Variation, wanted: &Wanted<'_>, verbose: bool) -> Result<Summary, String> {
    let mut cluster = Cluster::new(seed, variation, wanted, Trace::new(verbose));
    cluster.run().map_err(|broken| {
        let mut text = broken.0;
        for line in cluster.trace.lines() {
            text.push_str("\n  ");
            text.push_str(line);
        }
        text
    })
}

/// A line for people.
pub fn line(summary: &Summary) -> String {
    format!(
        "hash {:016x}: {} commands, {} acknowledged, {} elections, {} faults, {} kills, {} misreads, {} base copies, {} register calls in order, {:.1} s simulated",
        summary.hash,
        summary.commands,
        summary.acknowledged,
        summary.failovers,
        summary.faults,
        summary.restarts,
        summary.misreads,
        summary.base_copies,
        summary.checked_calls,
        summary.simulated_us as f64 / 1e6
    )
}

/// What is read of a run's words at once.
const WORDS_BYTES: usize = 4 << 10;

/// A run under way.
struct Child {
    seed: u64,
    pid: Pid,
    words: File,
    text: Vec<u8>,
}

impl Child {
    fn start(seed: u64, wanted: &Wanted<'_>) -> Child {
        let (reader, writer): (OwnedFd, OwnedFd) = pipe().expect("a pipe");
        // SAFETY: this process has one thread, so the child may do whatever it could have done itself.
        match unsafe { fork() }.expect("another process") {
            ForkResult::Parent { child } => Child { seed, pid: child, words: File::from(reader), text: Vec::new() },
            ForkResult::Child => {
                drop(reader);
                let outcome = run(seed, wanted, false);
                let (text, code) = match &outcome {
                    Ok(summary) => (line(summary), 0),
                    Err(text) => (text.clone(), 1),
                };
                let _ = File::from(writer).write_all(text.as_bytes());
                std::process::exit(code);
            }
        }
    }

    /// Takes what it says; true once that is all.
    fn listen(&mut self) -> bool {
        let mut piece = [0; WORDS_BYTES];
        let read = self.words.read(&mut piece).unwrap_or(0);
        self.text.extend_from_slice(&piece[..read]);
        read == 0
    }

    /// It has said all; how it ended.
    fn end(self) -> (u64, Outcome) {
        let text = String::from_utf8_lossy(&self.text).into_owned();
        let outcome = match waitpid(self.pid, None) {
            Ok(WaitStatus::Exited(_, 0)) => Ok(text),
            Ok(WaitStatus::Exited(_, 1)) => Err(text),
            other => Err(format!("a node or a check panicked ({other:?}); its message is above. {text}")),
        };
        (self.seed, outcome)
    }
}

/// The run that ends first.
fn first_to_end(children: &mut Vec<Child>) -> (u64, Outcome) {
    loop {
        let mut words: Vec<PollFd> =
            children.iter().map(|child| PollFd::new(child.words.as_fd(), PollFlags::POLLIN)).collect();
        // Interrupted, it is asked again.
        let _ = poll(&mut words, PollTimeout::NONE);
        let said: Vec<usize> = (0..words.len()).filter(|index| words[*index].any().unwrap_or(false)).collect();
        if let Some(ended) = said.into_iter().find(|index| children[*index].listen()) {
            return children.remove(ended).end();
        }
    }
}

/// Runs these seeds, as many at a time as there are processors, until `until`, or until `each` has seen enough. How many ran.
pub fn run_all(
    seeds: std::ops::Range<u64>,
    wanted: &Wanted<'_>,
    until: Option<Instant>,
    mut each: impl FnMut(u64, Outcome) -> bool,
) -> u64 {
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let (mut seeds, mut children, mut ran, mut go_on) = (seeds, Vec::new(), 0, true);
    loop {
        while go_on && children.len() < jobs && until.is_none_or(|until| Instant::now() < until) {
            let Some(seed) = seeds.next() else { break };
            children.push(Child::start(seed, wanted));
        }
        if children.is_empty() {
            return ran;
        }
        let (seed, outcome) = first_to_end(&mut children);
        ran += 1;
        go_on &= each(seed, outcome);
    }
}
