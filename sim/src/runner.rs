//! Many runs, several at a time, in processes of their own: a node that panics ends its process, and with it one run and not all.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, pipe};

use crate::cluster::{Cluster, Summary, Variation};
use crate::faults::RunRequest;
use crate::limits::LATENCY_SEEDS;
use crate::trace::Trace;

/// The slowest commits with one slow or dead replica, in percent of those with none: they wait for all of the others, of which one
/// more often is the late one. Up to 125 was seen.
const LATENCY_PERCENT_MAX: u64 = 150;

/// What a run came to, as a line, or what it broke and how.
pub type RunOutcome = Result<String, String>;

/// One run in this process.
pub fn run(seed: u64, wanted: &RunRequest<'_>, verbose: bool) -> Result<Summary, String> {
    let summary = run_one(seed, Variation::Faults, wanted, verbose)?;
    if seed.is_multiple_of(LATENCY_SEEDS) {
        latency_holds(seed)?;
    }
    Ok(summary)
}

/// One slow or dead replica that the policy can do without must not multiply what commits take.
fn latency_holds(seed: u64) -> Result<(), String> {
    let p99_us = |variation| run_one(seed, variation, &RunRequest::from(&[][..]), false).map(|summary| summary.p99_us);
    let Some(calm) = p99_us(Variation::Calm)? else { return Ok(()) };
    for variation in [Variation::SlowReplica, Variation::DeadReplica] {
        let Some(disturbed) = p99_us(variation)? else { continue };
        if disturbed * 100 > calm * LATENCY_PERCENT_MAX {
            return Err(format!("{variation:?}: p99 of remote_flush went from {calm} to {disturbed} us"));
        }
    }
    Ok(())
}

fn run_one(seed: u64, variation: Variation, wanted: &RunRequest<'_>, verbose: bool) -> Result<Summary, String> {
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
        "hash {:016x}: {} commands, {} acknowledged, {} elections, {} faults, {} kills, {} misreads, {} snapshots, {} calls in order{}, {:.1} s simulated",
        summary.hash,
        summary.commands,
        summary.acknowledged,
        summary.failovers,
        summary.faults,
        summary.restarts,
        summary.misreads,
        summary.snapshots,
        summary.checked_calls,
        if summary.modelled { "" } else { ", states not compared" },
        summary.simulated_us as f64 / 1e6
    )
}

/// What is read of a worker's words at once.
const WORDS_BYTES: usize = 4 << 10;
/// In place of a seed: there are no more.
const NO_SEED: u64 = u64::MAX;
/// Before a worker's words: how the run came out, and how many bytes of text follow.
const HEAD_BYTES: usize = 5;
/// Memory that a worker keeps from one run for the next: to be given zeroed pages again takes a tenth of a run.
const KEPT_BYTES: libc::c_int = 1 << 30;

/// A process that runs one seed after the other, until one of them breaks something: that one was its last.
struct Worker {
    pid: Pid,
    seeds: File,
    words: File,
    seed: u64,
    text: Vec<u8>,
}

impl Worker {
    fn start(wanted: &RunRequest<'_>) -> Worker {
        let (seeds, seeds_in): (OwnedFd, OwnedFd) = pipe().expect("a pipe");
        let (words, words_in): (OwnedFd, OwnedFd) = pipe().expect("a pipe");
        // SAFETY: this process has one thread, so the child may do whatever it could have done itself.
        match unsafe { fork() }.expect("another process") {
            ForkResult::Parent { child } => Worker {
                pid: child,
                seeds: File::from(seeds_in),
                words: File::from(words),
                seed: NO_SEED,
                text: Vec::new(),
            },
            ForkResult::Child => {
                drop((words, seeds_in));
                work(&mut File::from(seeds), &mut File::from(words_in), wanted);
                std::process::exit(0);
            }
        }
    }

    fn give(&mut self, seed: u64) {
        self.seed = seed;
        // A worker that ended is noticed by its words.
        let _ = self.seeds.write_all(&seed.to_le_bytes());
    }

    /// Takes what it says: how its run came out, once that is said or can never be said.
    fn listen(&mut self) -> Option<Said> {
        let mut piece = [0; WORDS_BYTES];
        let read = self.words.read(&mut piece).unwrap_or(0);
        self.text.extend_from_slice(&piece[..read]);
        if read == 0 {
            let ended = waitpid(self.pid, None);
            let text = format!("a node or a check panicked ({ended:?}); its message is above.");
            return Some(Said { outcome: Err(text), goes_on: false });
        }
        let head = self.text.first_chunk::<HEAD_BYTES>()?;
        let [holds, bytes @ ..] = *head;
        if self.text.len() < HEAD_BYTES + u32::from_le_bytes(bytes) as usize {
            return None;
        }
        let text = String::from_utf8_lossy(&self.text[HEAD_BYTES..]).into_owned();
        self.text.clear();
        let goes_on = holds == 1;
        if !goes_on {
            let _ = waitpid(self.pid, None);
        }
        Some(Said { outcome: if goes_on { Ok(text) } else { Err(text) }, goes_on })
    }

    fn end(mut self) {
        self.give(NO_SEED);
        let _ = waitpid(self.pid, None);
    }
}

struct Said {
    outcome: RunOutcome,
    /// The worker is there for another seed.
    goes_on: bool,
}

/// What a worker does.
fn work(seeds: &mut File, words: &mut File, wanted: &RunRequest<'_>) {
    // SAFETY: two plain calls of the allocator.
    unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT_BYTES);
        libc::mallopt(libc::M_MMAP_THRESHOLD, KEPT_BYTES);
    }
    let mut seed = [0; 8];
    while seeds.read_exact(&mut seed).is_ok() && u64::from_le_bytes(seed) != NO_SEED {
        let (text, holds) = match run(u64::from_le_bytes(seed), wanted, false) {
            Ok(summary) => (line(&summary), true),
            Err(text) => (text, false),
        };
        let mut said = vec![u8::from(holds)];
        said.extend_from_slice(&(text.len() as u32).to_le_bytes());
        said.extend_from_slice(text.as_bytes());
        if words.write_all(&said).is_err() || !holds {
            return;
        }
    }
}

/// The worker whose run ends first, and how.
fn first_to_end(workers: &mut [Worker]) -> (usize, Said) {
    loop {
        let mut words: Vec<PollFd> =
            workers.iter().map(|worker| PollFd::new(worker.words.as_fd(), PollFlags::POLLIN)).collect();
        // Interrupted, it is asked again.
        let _ = poll(&mut words, PollTimeout::NONE);
        let said: Vec<usize> = (0..words.len()).filter(|index| words[*index].any().unwrap_or(false)).collect();
        for index in said {
            if let Some(said) = workers[index].listen() {
                return (index, said);
            }
        }
    }
}

/// Runs these seeds, as many at a time as there are processors, until `until`, or until `each` has seen enough. How many ran.
pub fn run_all(
    mut seeds: std::ops::Range<u64>,
    wanted: &RunRequest<'_>,
    until: Option<Instant>,
    mut each: impl FnMut(u64, RunOutcome) -> bool,
) -> u64 {
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let (mut busy, mut idle, mut ran, mut go_on) = (Vec::new(), Vec::new(), 0, true);
    loop {
        while go_on && busy.len() < jobs && until.is_none_or(|until| Instant::now() < until) {
            let Some(seed) = seeds.next() else { break };
            let mut worker: Worker = idle.pop().unwrap_or_else(|| Worker::start(wanted));
            worker.give(seed);
            busy.push(worker);
        }
        if busy.is_empty() {
            idle.into_iter().for_each(Worker::end);
            return ran;
        }
        let (index, Said { outcome, goes_on }) = first_to_end(&mut busy);
        let worker = busy.remove(index);
        ran += 1;
        go_on &= each(worker.seed, outcome);
        if goes_on {
            idle.push(worker);
        }
    }
}
