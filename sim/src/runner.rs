//! Many runs: each in a process of its own, so that a node that panics ends one run and not all, and several at a time.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::time::Instant;

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, pipe};

use crate::cluster::{Cluster, Summary, Variation};
use crate::faults::Fault;
use crate::trace::Trace;

/// One seed of so many is also about latency.
pub const LATENCY_SEEDS: u64 = 16;
/// The slowest commits with one slow or dead replica, in percent of those with none: they wait for all of the others, of which one
/// more often is the late one. Up to 125 was seen.
const LATENCY_PERCENT_MAX: u64 = 150;

/// What a run came to, as a line, or what it broke and how.
pub type Outcome = Result<String, String>;

/// One run in this process.
pub fn run(seed: u64, only: &[Fault], verbose: bool) -> Result<Summary, String> {
    let summary = run_one(seed, Variation::Faults, only, verbose)?;
    if seed.is_multiple_of(LATENCY_SEEDS) {
        latency_holds(seed)?;
    }
    Ok(summary)
}

/// One slow or dead replica that the policy can do without must not multiply what commits take.
fn latency_holds(seed: u64) -> Result<(), String> {
    let p99_us = |variation| run_one(seed, variation, &[], false).map(|summary| summary.p99_us);
    let Some(calm) = p99_us(Variation::Calm)? else { return Ok(()) };
    for variation in [Variation::SlowReplica, Variation::DeadReplica] {
        let Some(troubled) = p99_us(variation)? else { continue };
        if troubled * 100 > calm * LATENCY_PERCENT_MAX {
            return Err(format!("{variation:?}: p99 of remote_flush went from {calm} to {troubled} us"));
        }
    }
    Ok(())
}

fn run_one(seed: u64, variation: Variation, only: &[Fault], verbose: bool) -> Result<Summary, String> {
    let mut cluster = Cluster::new(seed, variation, only, Trace::new(verbose));
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
        "hash {:016x}: {} commands, {} acknowledged, {} elections, {} faults, {} kills, {} register calls in order, {:.1} s simulated",
        summary.hash,
        summary.commands,
        summary.acknowledged,
        summary.failovers,
        summary.faults,
        summary.restarts,
        summary.checked_calls,
        summary.simulated_us as f64 / 1e6
    )
}

/// A run under way.
struct Child {
    seed: u64,
    pid: Pid,
    words: File,
}

impl Child {
    fn start(seed: u64, only: &[Fault]) -> Child {
        let (reader, writer): (OwnedFd, OwnedFd) = pipe().expect("a pipe");
        // SAFETY: this process has one thread, so the child may do whatever it could have done itself.
        match unsafe { fork() }.expect("another process") {
            ForkResult::Parent { child } => Child { seed, pid: child, words: File::from(reader) },
            ForkResult::Child => {
                drop(reader);
                let outcome = run(seed, only, false);
                let (text, code) = match &outcome {
                    Ok(summary) => (line(summary), 0),
                    Err(text) => (text.clone(), 1),
                };
                let _ = File::from(writer).write_all(text.as_bytes());
                std::process::exit(code);
            }
        }
    }

    fn wait(mut self) -> (u64, Outcome) {
        let mut text = String::new();
        let _ = self.words.read_to_string(&mut text);
        let outcome = match waitpid(self.pid, None) {
            Ok(WaitStatus::Exited(_, 0)) => Ok(text),
            Ok(WaitStatus::Exited(_, 1)) => Err(text),
            other => Err(format!("a node or a check panicked ({other:?}); its message is above. {text}")),
        };
        (self.seed, outcome)
    }
}

/// Runs these seeds, as many at a time as there are processors, until `until`, or until `each` has seen enough. How many ran.
pub fn run_all(
    seeds: std::ops::Range<u64>,
    only: &[Fault],
    until: Option<Instant>,
    mut each: impl FnMut(u64, Outcome) -> bool,
) -> u64 {
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let (mut seeds, mut children, mut ran, mut go_on) = (seeds, VecDeque::new(), 0, true);
    loop {
        while go_on && children.len() < jobs && until.is_none_or(|until| Instant::now() < until) {
            let Some(seed) = seeds.next() else { break };
            children.push_back(Child::start(seed, only));
        }
        let Some(child) = children.pop_front() else { return ran };
        let (seed, outcome) = child.wait();
        ran += 1;
        go_on &= each(seed, outcome);
    }
}
