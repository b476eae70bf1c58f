//! `walferry distance`: what each commit level costs at each distance, measured.
//!
//! ```text
//! mod (flags, the course) ── measure (nodes, link, load) ── result (figures and what follows from them) ─┬─ text
//!                            profile                        rule, model                                  └─ html ── svg
//! ```

mod format;
mod html;
mod measure;
mod model;
mod profile;
mod result;
mod rule;
mod svg;
mod text;

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use walferry_cluster::CommitLevel;

use self::measure::Stand;
use self::profile::Profile;
use self::result::{Machine, ProfileResult, Report, saturate};
use crate::client::Url;
use crate::failure::{Failure, say};
use crate::link::Kind;
use crate::nodes::{replace_directory, without_direct_io};
use walferry_node::units::Span;

pub use self::text::brief;

/// Examples for the help text.
pub const EXAMPLES: &str = "\
Examples:
  walferry distance                                       five distances, five levels, 1 to 1024 clients; some minutes
  walferry distance --profile rack,region --clients 1,64 --html report.html
  walferry distance --profile paris=9ms,virginia=82ms --levels local,remote_apply
  walferry distance --kind tun                            root: the kernels' own TCP lives through the distance
  walferry distance --profile same-host,rack --model 30ms   predict 30 ms, and tell how far off the model is
  walferry distance --hosts redis://10.0.0.1:6400 --json  nodes that already run, nothing emulated

Distances: same-host (no link), rack 1ms, zone 2ms, region 50ms, ocean 150ms, or NAME=RTT. Each report states the round trip
that was measured. With --hosts the load writes to the stream `history` of that leader.

Exit codes: 0 measured, or interrupted with what was measured; 1 something failed, with the reason; 2 wrong usage.";

/// A leader with this many more replicas on one machine would measure the machine.
const REPLICAS_MAX: usize = 8;
/// As `walferry load --clients`.
const CLIENTS_MAX: usize = 10_000;
const PAYLOAD_BYTES_MAX: usize = 1 << 20;

/// Flags of `walferry distance`.
#[derive(Debug, Args)]
pub struct DistanceArgs {
    /// Distances: same-host, rack, zone, region, ocean, or NAME=RTT
    #[arg(
        long,
        value_name = "NAME[=RTT],...",
        value_delimiter = ',',
        default_value = "same-host,rack,zone,region,ocean"
    )]
    profile: Vec<Profile>,
    /// Measure the nodes of this leader, which already run, over the distance that there is
    #[arg(long, value_name = "URL", conflicts_with_all = ["profile", "kind", "replicas"])]
    hosts: Option<Url>,
    /// How the distance is made; tun and netem need root
    #[arg(long, value_enum, default_value_t = Kind::Proxy)]
    kind: Kind,
    /// Commit levels
    #[arg(
        long,
        value_name = "LEVEL,...",
        value_delimiter = ',',
        default_value = "off,local,remote_write,remote_flush,remote_apply"
    )]
    levels: Vec<CommitLevel>,
    /// Numbers of clients
    #[arg(short, long, value_name = "N,...", value_delimiter = ',', default_value = "1,16,64,256,1024")]
    clients: Vec<usize>,
    /// How long each run lasts; at long distances at least 20 round trips
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    /// Replicas at the far end; a remote commit waits for one of them
    #[arg(long, value_name = "N", default_value_t = 1)]
    replicas: usize,
    /// Bytes of each commit's payload
    #[arg(long, value_name = "BYTES", default_value_t = 100)]
    payload_bytes: usize,
    /// Threads of the load
    #[arg(short, long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    jobs: u16,
    /// After the closed loops, offer half of what they reached as an open loop
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = true, default_missing_value = "true", action = clap::ArgAction::Set, value_name = "BOOL")]
    open_loop: bool,
    /// Predict this round trip from what is measured; may be given several times
    #[arg(long, value_name = "RTT,...", value_delimiter = ',')]
    model: Vec<Span>,
    /// Where the nodes keep their data; replaced if an earlier run made it
    #[arg(long, value_name = "DIR", default_value = "./walferry-distance")]
    dir: PathBuf,
    /// Print the report as JSON, progress on the error output
    #[arg(long)]
    json: bool,
    /// Print the report, but no progress
    #[arg(short, long)]
    quiet: bool,
    /// Write the report as one page
    #[arg(long, value_name = "FILE.html")]
    html: Option<PathBuf>,
}

impl DistanceArgs {
    /// The end of `walferry demo`: two distances, two numbers of clients.
    pub fn brief(dir: PathBuf, seconds: u64) -> DistanceArgs {
        let known = |name: &str| name.parse::<Profile>().expect("a known name");
        DistanceArgs {
            profile: vec![known("rack"), known("region")],
            hosts: None,
            kind: Kind::Proxy,
            levels: vec![CommitLevel::Local, CommitLevel::RemoteFlush, CommitLevel::RemoteApply],
            clients: vec![1, 64],
            seconds,
            replicas: 1,
            payload_bytes: 100,
            jobs: 1,
            open_loop: false,
            model: Vec::new(),
            dir,
            json: false,
            html: None,
            quiet: true,
        }
    }

    fn check(&self) -> Result<(), Failure> {
        let refuse = |text: String| Err(Failure::Usage(text));
        if let Some(clients) = self.clients.iter().find(|clients| !(1..=CLIENTS_MAX).contains(*clients)) {
            return refuse(format!("--clients {clients}: choose 1 to {CLIENTS_MAX}"));
        }
        if !(1..=REPLICAS_MAX).contains(&self.replicas) {
            return refuse(format!("--replicas {}: choose 1 to {REPLICAS_MAX}", self.replicas));
        }
        if self.payload_bytes > PAYLOAD_BYTES_MAX {
            return refuse(format!("--payload-bytes {}: at most {PAYLOAD_BYTES_MAX}", self.payload_bytes));
        }
        let names: Vec<&str> = self.profile.iter().map(|profile| profile.name.as_str()).collect();
        match names.iter().enumerate().find(|(index, name)| names[..*index].contains(*name)) {
            Some((_, name)) => refuse(format!("--profile {name}: named twice")),
            None => Ok(()),
        }
    }

    /// A line of progress: beside the JSON it goes to the error output.
    fn tell(&self, line: impl std::fmt::Display) -> Result<(), Failure> {
        if self.quiet {
            return Ok(());
        }
        if self.json {
            eprintln!("{line}");
            return Ok(());
        }
        say(line)
    }
}

/// Runs `walferry distance`.
pub fn run(args: &DistanceArgs) -> Result<(), Failure> {
    args.check()?;
    // A page that cannot be written is said before the minutes of measuring.
    if let Some(path) = &args.html {
        // What an earlier run wrote stays until there is something to write.
        let opened = std::fs::OpenOptions::new().append(true).create(true).open(path);
        opened.map_err(|error| Failure::failed(format_args!("--html {}: {error}", path.display())))?;
    }
    let report = match &args.hosts {
        Some(leader) => measure_hosts(args, leader)?,
        None => {
            replace_directory(&args.dir)?;
            measure_profiles(args)?
        }
    };
    if let Some(path) = &args.html {
        std::fs::write(path, html::page(&report))
            .map_err(|error| Failure::failed(format_args!("--html {}: {error}", path.display())))?;
    }
    if args.json {
        let json = serde_json::to_string_pretty(&report).map_err(Failure::failed)?;
        return say(json);
    }
    say(text::summary(&report, args.quiet).trim_end())?;
    match &args.html {
        Some(path) => say(format_args!("\nthe page is in {}", path.display())),
        None => Ok(()),
    }
}

/// The distances of these arguments, one after the other.
pub fn measure_profiles(args: &DistanceArgs) -> Result<Report, Failure> {
    std::fs::create_dir_all(&args.dir)
        .map_err(|error| Failure::failed(format_args!("--dir {}: {error}", args.dir.display())))?;
    let flags = without_direct_io(&args.dir)?;
    let (mut profiles, mut interrupted) = (Vec::new(), false);
    for profile in &args.profile {
        if interrupted {
            break;
        }
        let stand = Stand::start(args, profile, &flags)?;
        let measured = measure(args, &stand, &profile.name);
        stand.stop()?;
        let (result, ended) = measured?;
        profiles.push(result);
        interrupted = ended;
    }
    let link = args.kind.to_string();
    finish(args, link, args.replicas, measure::sync_policy(args.replicas), profiles, interrupted)
}

fn measure_hosts(args: &DistanceArgs, leader: &Url) -> Result<Report, Failure> {
    let (stand, replicas, sync) = Stand::attach(leader)?;
    let (result, interrupted) = measure(args, &stand, "hosts")?;
    finish(args, "none".to_owned(), replicas, sync, vec![result], interrupted)
}

fn measure(args: &DistanceArgs, stand: &Stand, name: &str) -> Result<(ProfileResult, bool), Failure> {
    args.tell(format_args!("\n{name}: measured round trip {}\n{}", stand.rtt, text::header()))?;
    let (mut result, interrupted) = stand.measure(args, name, |point| args.tell(text::row(point)))?;
    result.derive();
    Ok((result, interrupted))
}

fn finish(
    args: &DistanceArgs,
    link: String,
    replicas: usize,
    sync: String,
    mut profiles: Vec<ProfileResult>,
    interrupted: bool,
) -> Result<Report, Failure> {
    saturate(&mut profiles);
    let asked: Vec<Duration> = args.model.iter().map(|span| span.0).collect();
    let model = model::predict(&profiles, &asked);
    let (machine, payload_bytes) = (Machine::here(), args.payload_bytes);
    Ok(Report { machine, link, replicas, sync, payload_bytes, profiles, model, interrupted })
}
