//! `sim`: a whole cluster in one thread from one seed. The nodes run the code that runs in production (log, recovery, shipper,
//! applier, store, sessions, failover); their disks, network and clocks are the simulator's, and so are the faults.
//!
//! ```text
//! cluster   a run: what happens, and what it does
//!  ├─ events    what is going to happen
//!  ├─ world     clocks, random numbers and background work of the nodes
//!  ├─ kernel    what a node's ring asks for: disk writes that take time and tear, sockets
//!  ├─ network   connections and packets: late, lost, cut
//!  ├─ control   a member's cluster thread, around the cores of the `cluster` crate
//!  ├─ clients   what is asked and what was acknowledged; history, growing: whether it can have happened so
//!  ├─ faults    what a seed decides before it begins; rot: damage, and what must become of it
//!  └─ checks    what must hold at the end; model: what the log says; lost: what was cut off and is kept
//! runner    many runs, each in a process of its own; mutants: bugs that they have to find
//! ```

mod checks;
mod clients;
mod cluster;
mod control;
mod events;
mod faults;
mod growing;
mod history;
mod kernel;
mod limits;
mod lost;
mod model;
mod mutants;
mod network;
mod resp;
mod rot;
mod runner;
mod trace;
mod world;

use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::builder::PossibleValue;
use clap::{Parser, ValueEnum};

use faults::{Fault, RunRequest};
use runner::{line, run, run_all};

/// Runs a cluster of nodes in a simulated world, and checks that nothing acknowledged is lost.
#[derive(Parser)]
#[command(name = "sim")]
struct Options {
    /// Run this seed, twice, and compare the runs
    #[arg(long, value_name = "N", conflicts_with = "seeds")]
    seed: Option<u64>,
    /// Run so many seeds, one after the other
    #[arg(long, value_name = "COUNT")]
    seeds: Option<u64>,
    /// The first of them [default: by the clock]
    #[arg(long, value_name = "N", requires = "seeds")]
    from: Option<u64>,
    /// Only these faults, such as `kill,broken-disk`, instead of those that a seed would have
    #[arg(long, value_name = "FAULTS", value_delimiter = ',')]
    faults: Vec<Fault>,
    /// End after so many minutes, however many seeds are left
    #[arg(long, value_name = "MINUTES")]
    minutes: Option<u64>,
    /// Run the seeds in this file, which found something once: a seed a line, and what it found
    #[arg(long, value_name = "FILE")]
    file: Option<std::path::PathBuf>,
    /// Print a line for every seed
    #[arg(long)]
    verbose: bool,
    /// Print every event
    #[arg(long)]
    trace: bool,
    /// Print the nodes' own log
    #[arg(long)]
    log: bool,
    /// Break the code on purpose in this way, or in every way there is (`all`), and count the seeds until it is found
    #[arg(long, value_name = "NAME")]
    mutant: Option<String>,
    /// The faults and circumstances under which this deliberate bug is looked for, without the bug
    #[arg(long, value_name = "NAME", conflicts_with = "mutant")]
    under: Option<String>,
}

impl Options {
    /// What is asked of each run. Faults that are named come before all others.
    fn wanted(&self) -> Result<RunRequest<'_>, String> {
        let under = self.under.as_ref().map(|name| mutants::circumstances(name)).transpose()?;
        let wanted = under.unwrap_or(RunRequest::from(&[][..]));
        Ok(if self.faults.is_empty() { wanted } else { RunRequest { faults: &self.faults, ..wanted } })
    }
}

fn report(seed: u64, broken: &str, wanted: &RunRequest<'_>, under: Option<&str>) {
    let faults: Vec<_> = wanted.faults.iter().filter_map(Fault::to_possible_value).collect();
    let faults: Vec<&str> = faults.iter().map(PossibleValue::get_name).collect();
    let mut only = if faults.is_empty() { String::new() } else { format!(" --faults {}", faults.join(",")) };
    if let Some(name) = under {
        only = format!("{only} --under {name}");
    }
    println!("seed {seed} BROKEN: {broken}\n  replay: cargo run --release -p sim -- --seed {seed}{only}");
}

/// One seed, twice.
fn one(seed: u64, wanted: &RunRequest<'_>, options: &Options) -> bool {
    let under = options.under.as_deref();
    let first = match run(seed, wanted, options.trace) {
        Ok(summary) => summary,
        Err(broken) => {
            report(seed, &broken, wanted, under);
            return false;
        }
    };
    let second = run(seed, wanted, false).map_or(0, |summary| summary.hash);
    println!("seed {seed} ok, {}", line(&first));
    if first.hash != second {
        report(seed, &format!("two runs differ: {:016x} and {second:016x}", first.hash), wanted, under);
    }
    first.hash == second
}

fn many(count: u64, wanted: &RunRequest<'_>, options: &Options) -> bool {
    let by_clock = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs() << 20);
    let from = options.from.unwrap_or_else(by_clock);
    let begun = Instant::now();
    let until = options.minutes.map(|minutes| begun + Duration::from_secs(minutes * 60));
    let mut broken_seeds = Vec::new();
    let ran = run_all(from..from + count, wanted, until, |seed, outcome| {
        match outcome {
            Ok(line) if options.verbose => println!("seed {seed} ok, {line}"),
            Ok(_) => {}
            Err(broken) => {
                report(seed, &broken, wanted, options.under.as_deref());
                broken_seeds.push(seed);
            }
        }
        true
    });
    let time = begun.elapsed().as_secs_f64();
    println!("{ran} seeds from {from}, {} broken {broken_seeds:?}, {time:.1} s", broken_seeds.len());
    broken_seeds.is_empty()
}

fn seed_and_faults(line: &str) -> Option<(u64, Vec<Fault>)> {
    let mut words = line.split_whitespace();
    let seed = words.next()?.parse().ok()?;
    let faults = match (words.next(), words.next()) {
        (Some("--faults"), faults) => faults?,
        _ => return Some((seed, Vec::new())),
    };
    Some((seed, faults.split(',').map(|name| Fault::from_str(name, false).ok()).collect::<Option<_>>()?))
}

fn from_file(path: &std::path::Path, options: &Options) -> bool {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) => {
            println!("cannot read {}: {error}", path.display());
            return false;
        }
    };
    let lines = text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#'));
    let mut all_hold = true;
    for line in lines {
        let Some((seed, faults)) = seed_and_faults(line) else {
            println!("{}: {line:?} does not begin with a seed, or `SEED --faults FAULTS`", path.display());
            return false;
        };
        all_hold &= one(seed, &RunRequest::from(&faults[..]), options);
    }
    all_hold
}

fn main() -> ExitCode {
    let options = Options::parse();
    if options.log {
        tracing_subscriber::fmt().with_env_filter("info").with_writer(std::io::stderr).without_time().init();
    }
    let wanted = match options.wanted() {
        Ok(wanted) => wanted,
        Err(error) => {
            println!("{error}");
            return ExitCode::FAILURE;
        }
    };
    let holds = if let Some(name) = &options.mutant {
        mutants::hunt(name, options.from.unwrap_or(1), options.seeds.unwrap_or(mutants::SEEDS_MAX), &options.faults)
    } else if let Some(path) = &options.file {
        from_file(path, &options)
    } else if let Some(seed) = options.seed {
        one(seed, &wanted, &options)
    } else {
        many(options.seeds.unwrap_or(100), &wanted, &options)
    };
    if holds { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
