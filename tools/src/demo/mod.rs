//! `walferry demo`: a leader and two replicas as child processes, load at every commit level, one table, a clean stop;
//! then the brief table of two distances. `walferry demo warehouse` is a demo of its own.
//! Uses the same commands that a person would type; knows nothing of the daemon's inside.

mod scanner;
mod warehouse;

use std::io::Write;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use clap::{Args, Subcommand};
use walferry_cluster::CommitLevel;

use crate::client::{Client, Url, info_field};
use crate::distance::{self, DistanceArgs};
use crate::failure::{Failure, say};
use crate::load::{self, Options, ScriptSource, Summary};
use crate::nodes::{LocalNode, replace_directory, wait_until_streaming, without_direct_io};

/// Examples for the help text.
pub const EXAMPLES: &str = "\
Examples:
  walferry demo
  walferry demo --seconds 5 --clients 64
  walferry demo warehouse                     who reads a replica behind a lag, what that costs, and what helps

The three nodes' data and logs stay in the directory to be looked at:
  walferry log dump --data ./walferry-demo/leader --limit 5
  cmp ./walferry-demo/{leader,replica-1}/log/0000000000000000.wal

Exit codes: 0 the table was printed and every node stopped cleanly; 1 something failed, with the reason; 2 wrong usage.";

const REPLICAS: [&str; 2] = ["replica-1", "replica-2"];
const SYNC_POLICY: &str = "ANY 1 (replica-1, replica-2)";

/// Flags of `walferry demo`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct DemoArgs {
    #[command(subcommand)]
    scene: Option<Scene>,
    /// Where the nodes keep their data; replaced if an earlier demo made it
    #[arg(long, value_name = "DIR", default_value = "./walferry-demo")]
    dir: PathBuf,
    /// How long each commit level is under load
    #[arg(long, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Clients of the load
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=1000))]
    clients: u16,
}

#[derive(Debug, Subcommand)]
enum Scene {
    /// Scan packages, look at a dashboard that reads replicas behind a lag, and count who scans twice
    #[command(after_help = warehouse::EXAMPLES)]
    Warehouse(warehouse::WarehouseArgs),
}

/// Runs `walferry demo`.
pub fn run(args: &DemoArgs) -> Result<(), Failure> {
    match &args.scene {
        Some(Scene::Warehouse(args)) => warehouse::run(args),
        None => levels(args),
    }
}

fn levels(args: &DemoArgs) -> Result<(), Failure> {
    replace_directory(&args.dir)?;
    let buffered = without_direct_io(&args.dir)?;
    let policy = ["--sync", SYNC_POLICY];
    let here = LocalNode::program()?;
    let start = |name, flags: &[&str]| {
        let flags = [flags, buffered.as_slice()].concat();
        LocalNode::spawn(Command::new(&here), &args.dir, name, &flags)
    };
    let leader = start("leader", &policy)?.wait_until_ready()?;
    let follow = ["--follow", leader.peer_listen.as_str()];
    let starting = REPLICAS.map(|name| start(name, &follow));
    let mut replicas = Vec::new();
    for node in starting {
        replicas.push(node?.wait_until_ready()?);
    }
    say(format_args!("a leader and two replicas, data and logs under {}", args.dir.display()))?;
    for node in std::iter::once(&leader).chain(&replicas) {
        say(format_args!("  {:<10} {}", node.name, node.url))?;
    }
    wait_until_streaming(&leader, replicas.len())?;
    say("both replicas stream\n")?;
    let summaries = table(args, &leader)?;
    let interrupted = summaries.iter().any(|summary| summary.interrupted);
    if interrupted {
        say("\ninterrupted: the other levels and the comparison of the nodes are left out")?;
    } else {
        check(&leader, &replicas)?;
    }
    for node in replicas.into_iter().chain([leader]) {
        node.stop()?;
    }
    say("every node stopped cleanly")?;
    if interrupted { Ok(()) } else { distances(args) }
}

/// Load at every commit level, a row each, printed as it comes.
fn table(args: &DemoArgs, leader: &LocalNode) -> Result<Vec<Summary>, Failure> {
    let mut options = Options {
        url: leader.url.clone().into(),
        clients: usize::from(args.clients),
        threads: 1,
        duration: Some(Duration::from_secs(args.seconds)),
        transactions: None,
        progress: None,
        rate: None,
        scale: Some(1),
        scripts: vec![ScriptSource::Builtin("tpcb-like".to_owned(), 1)],
        define: Vec::new(),
        payload_bytes: 0,
        level: None,
        seed: None,
        log: None,
    };
    load::initialise(&options)?;
    let (clients, seconds) = (args.clients, args.seconds);
    say(format_args!("tpcb-like, {clients} clients, {seconds} s at each level, sync policy {SYNC_POLICY}\n"))?;
    say(format_args!(
        "{:<13} {:>9} {:>9} {:>9} {:>14}   answered when",
        "level", "tps", "p50 ms", "p99 ms", "records/flush"
    ))?;
    let mut summaries = Vec::new();
    for level in CommitLevel::ALL {
        options.level = Some(level.to_string());
        let before = flushes(leader)?;
        let summary = load::execute(&options)?;
        let after = flushes(leader)?;
        let latency = &summary.latency_ms;
        say(format_args!(
            "{level:<13} {:>9.0} {:>9.3} {:>9.3} {:>14}   {}",
            summary.tps,
            latency.p50,
            latency.p99,
            records_per_flush(before, after),
            meaning(level)
        ))?;
        std::io::stdout().flush()?;
        if summary.failed > 0 {
            let example = summary.failures.first().map_or("", |failure| failure.example.as_str());
            say(format_args!("{:<13} {} transactions failed: {example}", "", summary.failed))?;
        }
        let interrupted = summary.interrupted;
        summaries.push(summary);
        if interrupted {
            break;
        }
    }
    Ok(summaries)
}

/// The same at two distances, on nodes of their own.
fn distances(args: &DemoArgs) -> Result<(), Failure> {
    say("\nand with a distance between leader and replica (emulated; appends of 100 bytes)\n")?;
    let report = distance::measure_profiles(&DistanceArgs::brief(args.dir.join("distance"), args.seconds))?;
    say(distance::brief(&report))?;
    say("\n`walferry distance` measures more of them, with a page to look at: --html report.html")
}

fn meaning(level: CommitLevel) -> &'static str {
    match level {
        CommitLevel::Off => "in the leader's memory",
        CommitLevel::Local => "durable on the leader",
        CommitLevel::RemoteWrite => "and received by a replica",
        CommitLevel::RemoteFlush => "and durable on a replica",
        CommitLevel::RemoteApply => "and visible to a replica's readers",
    }
}

/// Records and durable writes of the leader's log since its start.
fn flushes(leader: &LocalNode) -> Result<Option<(u64, u64)>, Failure> {
    let mut client = Client::connect(&leader.url).map_err(Failure::failed)?;
    let info = client.call(&["INFO"]).map_err(Failure::failed)?.text().unwrap_or_default();
    let number = |key| info_field(&info, key).and_then(|value| value.parse().ok());
    Ok(number("flush_records").zip(number("flush_count")))
}

fn records_per_flush(before: Option<(u64, u64)>, after: Option<(u64, u64)>) -> String {
    let (Some((records_before, flushes_before)), Some((records, flushes))) = (before, after) else {
        return "-".to_owned();
    };
    let flushes = flushes.saturating_sub(flushes_before);
    if flushes == 0 {
        return "-".to_owned();
    }
    format!("{:.1}", records.saturating_sub(records_before) as f64 / flushes as f64)
}

fn check(leader: &LocalNode, replicas: &[LocalNode]) -> Result<(), Failure> {
    let urls: Vec<Url> = replicas.iter().map(|node| node.url.clone()).collect();
    let checked = load::check(&leader.url, &urls)?;
    match checked.iter().find(|node| !node.agrees) {
        Some(node) => {
            let (address, sums) = (&node.address, &node.sums);
            Err(Failure::failed(format_args!("the sums of {address} disagree: {sums}")))
        }
        None => say("\naccounts, tellers, branches and history add up to the same on all three nodes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_per_flush_is_a_difference() {
        assert_eq!(records_per_flush(Some((100, 10)), Some((500, 50))), "10.0");
        assert_eq!(records_per_flush(Some((100, 10)), Some((100, 10))), "-");
        assert_eq!(records_per_flush(None, Some((1, 1))), "-");
    }
}
