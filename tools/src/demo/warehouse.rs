//! `walferry demo warehouse`: a leader, and two replicas behind a lag. Workers scan packages at the leader and look at a dashboard
//! that reads the replicas; whoever does not see the package scans it again. Counts those, for three ways to write and to read.
//! What it counts is what stands in the leader's store at the end. Knows nothing of the daemon's inside.

use std::io::Write;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};
use walferry_client::Cluster;

use super::REPLICAS;
use super::scanner::{Places, Way, Work, key, work};
use crate::client::{Client, Url};
use crate::failure::{Failure, say};
use crate::link::{Kind, Link, Percent, Shape};
use crate::nodes::{LocalNode, replace_directory, wait_until_streaming, without_direct_io};
use walferry_node::units::Span;

/// Examples for the help text.
pub const EXAMPLES: &str = "\
Examples:
  walferry demo warehouse                           three ways, 240 packages each, replicas 2 s behind; 40 seconds
  walferry demo warehouse --lag 500ms --scans 1000
  walferry demo warehouse --json

A worker scans a package (an event, written to the leader) and looks at the dashboard (a read from a replica) at once. A package
that is not shown is scanned again: a duplicate.

Exit codes: 0 the table was printed, and there were duplicates at most without tokens; 1 there were others, or something failed;
2 wrong usage.";

/// The longest lag.
const LAG_MAX: Duration = Duration::from_secs(10);
/// The usual bound for a silent peer; a lag is silence at the beginning of a connection.
const PEER_TIMEOUT: Duration = Duration::from_secs(5);
/// A commit that waits for the replicas is answered after the lag and this.
const ANSWER_SLACK: Duration = Duration::from_secs(10);
/// Packages that are counted with one request.
const COUNTED_AT_ONCE: usize = 500;

/// Flags of `walferry demo warehouse`.
#[derive(Debug, Args)]
pub struct WarehouseArgs {
    /// Where the nodes keep their data; replaced if an earlier demo made it
    #[arg(long, value_name = "DIR", default_value = "./walferry-demo")]
    dir: PathBuf,
    /// Packages that are scanned, each way
    #[arg(long, value_name = "N", default_value_t = 240, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    scans: u32,
    /// Workers that scan at the same time
    #[arg(long, value_name = "N", default_value_t = 24, value_parser = clap::value_parser!(u16).range(1..=500))]
    scanners: u16,
    /// How far the replicas are behind the leader
    #[arg(long, value_name = "TIME", default_value = "2s")]
    lag: Span,
    /// Print the counts as JSON, and nothing else
    #[arg(long)]
    json: bool,
}

/// The running warehouse. Nodes end before the link between them does.
struct Warehouse {
    replicas: Vec<LocalNode>,
    leader: LocalNode,
    _link: Link,
}

/// What came of one way.
struct Outcome {
    way: Way,
    packages: usize,
    /// Events in the leader's store beyond one for each package.
    duplicates: usize,
    by_leader: usize,
    scan_p50: Duration,
    look_p50: Duration,
}

/// Runs `walferry demo warehouse`.
pub fn run(args: &WarehouseArgs) -> Result<(), Failure> {
    if args.lag.0 > LAG_MAX {
        return Err(Failure::Usage(format!("--lag {}: at most {}", args.lag, Span(LAG_MAX))));
    }
    let warehouse = Warehouse::start(args)?;
    let places = warehouse.places();
    let cluster = Cluster::connect(&[places.leader.to_string()]).map_err(Failure::failed)?;
    if !args.json {
        head(args)?;
    }
    let mut outcomes = Vec::new();
    for way in Way::ALL {
        let outcome = scan_all(way, args, &places, &cluster)?;
        if !args.json {
            say(row(&outcome))?;
            std::io::stdout().flush()?;
        }
        outcomes.push(outcome);
    }
    warehouse.stop()?;
    if args.json {
        say(serde_json::to_string_pretty(&as_json(args, &outcomes)).map_err(Failure::failed)?)?;
    } else {
        say(meaning(args, &outcomes))?;
    }
    match outcomes.iter().find(|outcome| outcome.way != Way::NoTokens && outcome.duplicates > 0) {
        None => Ok(()),
        Some(Outcome { way, duplicates, .. }) => {
            Err(Failure::failed(format_args!("{duplicates} packages were scanned twice although with {}", way.name())))
        }
    }
}

impl Warehouse {
    fn start(args: &WarehouseArgs) -> Result<Warehouse, Failure> {
        replace_directory(&args.dir)?;
        let buffered = without_direct_io(&args.dir)?;
        let peer_timeout = Span(PEER_TIMEOUT + args.lag.0 * 4).to_string();
        // A dashboard may read either replica: a commit that is to be seen there waits for both.
        let both = format!("ANY {} ({})", REPLICAS.len(), REPLICAS.join(", "));
        let here = LocalNode::program()?;
        let start = |name, flags: &[&str]| {
            let common = ["--peer-timeout", &peer_timeout, "--segment-bytes", "16MiB"];
            let flags = [flags, &common, buffered.as_slice()].concat();
            LocalNode::spawn(Command::new(&here), &args.dir, name, &flags)
        };
        let leader = start("leader", &["--sync", &both])?.wait_until_ready()?;
        // What the replicas send arrives at once; what they are sent takes the lag.
        let shape = Shape { asymmetry: Percent(0.0), ..Shape::with_rtt(args.lag.0) };
        let failed = |error: std::io::Error| Failure::failed(format_args!("cannot start the link: {error}"));
        let mut link = Link::start(Kind::Proxy, shape).map_err(failed)?;
        let peers = leader.peer_listen.parse().map_err(Failure::failed)?;
        let through = link.reach(peers).map_err(failed)?.to_string();
        let starting = REPLICAS.map(|name| start(name, &["--follow", &through]));
        let mut replicas = Vec::new();
        for node in starting {
            replicas.push(node?.wait_until_ready()?);
        }
        wait_until_streaming(&leader, replicas.len())?;
        Ok(Warehouse { replicas, leader, _link: link })
    }

    fn places(&self) -> Places {
        let replicas = self.replicas.iter().map(|node| node.url.clone()).collect();
        Places { leader: self.leader.url.clone(), replicas }
    }

    fn stop(self) -> Result<(), Failure> {
        for node in self.replicas.into_iter().chain([self.leader]) {
            node.stop()?;
        }
        Ok(())
    }
}

/// Every worker scans until no package is left.
fn scan_all(way: Way, args: &WarehouseArgs, places: &Places, cluster: &Cluster) -> Result<Outcome, Failure> {
    let (next, packages) = (AtomicUsize::new(0), args.scans as usize);
    let shift = || {
        let packages = std::iter::from_fn(|| {
            let package = next.fetch_add(1, Ordering::Relaxed);
            (package < packages).then_some(package)
        });
        work(way, places, args.lag.0 + ANSWER_SLACK, cluster, packages)
    };
    let works: Result<Vec<Work>, Failure> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..args.scanners).map(|_| scope.spawn(shift)).collect();
        workers.into_iter().map(|worker| worker.join().expect("a worker does not panic")).collect()
    });
    let mut sum = Work::default();
    for work in works? {
        sum.scans.extend(work.scans);
        sum.looks.extend(work.looks);
        sum.duplicates += work.duplicates;
        sum.by_leader += work.by_leader;
    }
    let duplicates = events(way, packages, &places.leader)?.saturating_sub(packages);
    if duplicates != sum.duplicates {
        let scanned = sum.duplicates;
        return Err(Failure::failed(format_args!(
            "{scanned} scans were repeated, the store holds {duplicates} of them"
        )));
    }
    let (scan_p50, look_p50) = (median(&mut sum.scans), median(&mut sum.looks));
    Ok(Outcome { way, packages, duplicates, by_leader: sum.by_leader, scan_p50, look_p50 })
}

/// How many scans of these packages the leader's store holds.
fn events(way: Way, packages: usize, leader: &Url) -> Result<usize, Failure> {
    let mut client = Client::connect(leader).map_err(Failure::failed)?;
    let mut events = 0;
    let numbers: Vec<usize> = (0..packages).collect();
    for chunk in numbers.chunks(COUNTED_AT_ONCE) {
        let mut request = Vec::new();
        for package in chunk {
            walferry_client::encode_command(&mut request, &[b"XLEN", key(way, *package).as_bytes()]);
        }
        client.send(&request, "XLEN").map_err(Failure::failed)?;
        for _ in chunk {
            let count = client.receive("XLEN").map_err(Failure::failed)?.int().unwrap_or_default();
            events += usize::try_from(count).unwrap_or_default();
        }
    }
    Ok(events)
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn head(args: &WarehouseArgs) -> Result<(), Failure> {
    let (scans, scanners, lag) = (args.scans, args.scanners, args.lag);
    say(format_args!("{scanners} workers, {scans} packages each way, a leader and two replicas {lag} behind it\n"))?;
    say(format_args!(
        "{:<22} {:>8} {:>11} {:>12} {:>12} {:>15}",
        "", "scans", "duplicates", "scan p50 ms", "look p50 ms", "leader's looks"
    ))
}

fn row(outcome: &Outcome) -> String {
    let Outcome { way, packages, duplicates, by_leader, scan_p50, look_p50 } = outcome;
    format!(
        "{:<22} {packages:>8} {duplicates:>11} {:>12.2} {:>12.2} {by_leader:>15}",
        way.name(),
        ms(*scan_p50),
        ms(*look_p50)
    )
}

fn meaning(args: &WarehouseArgs, outcomes: &[Outcome]) -> String {
    let mut text = String::new();
    for Outcome { way, packages, duplicates, scan_p50, look_p50, by_leader } in outcomes {
        let (scan, look) = (ms(*scan_p50), ms(*look_p50));
        text += &match way {
            Way::NoTokens => format!(
                "\nA dashboard on any replica shows what it has: {duplicates} of {packages} packages were not there yet and were \
                 scanned twice."
            ),
            Way::OwnWrites => format!(
                "\nWith the session's token a replica answers only if it has what the worker wrote; otherwise the leader did, \
                 {by_leader} times: the look costs {look:.1} ms, the scan nothing."
            ),
            Way::RemoteApply => format!(
                "\nAt remote_apply the scan itself waits until both replicas show it, {scan:.0} ms behind a lag of {}; then any \
                 dashboard is right, and the look costs nothing.",
                args.lag
            ),
        };
    }
    text
}

fn as_json(args: &WarehouseArgs, outcomes: &[Outcome]) -> Value {
    let way = |outcome: &Outcome| {
        json!({
            "way": outcome.way.key(),
            "scans": outcome.packages,
            "duplicates": outcome.duplicates,
            "looks_by_leader": outcome.by_leader,
            "scan_p50_ms": ms(outcome.scan_p50),
            "look_p50_ms": ms(outcome.look_p50),
        })
    };
    json!({ "lag_ms": ms(args.lag.0), "scanners": args.scanners, "ways": outcomes.iter().map(way).collect::<Vec<_>>() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_a_time_that_was_measured() {
        let times = |ms: &[u64]| ms.iter().copied().map(Duration::from_millis).collect::<Vec<_>>();
        assert_eq!(median(&mut times(&[9, 1, 5])), Duration::from_millis(5));
        assert_eq!(median(&mut []), Duration::ZERO);
    }
}
