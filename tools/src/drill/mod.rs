//! `walferry drill`: a real cluster of processes under an open-loop load of unique values, one fault after another, and what
//! each cost: time without writes, commits lost at each level, changes of the in-sync set, reads that went back.
//!
//! ```text
//! mod (flags, the course of a drill) ─┬─ plan      which faults (core) ── fault   what is done, and undone
//!      └─ report (verdict) ── table    ├─ cluster ─┬─ own ── ground   processes, their networks, disks and clocks
//!                                      │           └─ hosts           a cluster that runs already, an operator's commands
//!                                      ├─ load      writers on a schedule ── outage (core)
//!                                      ├─ sessions  readers and what they saw
//!                                      ├─ soak      what must not grow in a long drill
//!                                      ├─ watch     who leads, what replicas hold (core)
//!                                      └─ etcd      the same kills on etcd, beside it
//! ```

mod cluster;
mod etcd;
mod fault;
mod ground;
mod hosts;
mod inject;
mod load;
mod member;
mod outage;
mod own;
mod plan;
mod report;
mod sessions;
mod soak;
mod table;
mod watch;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use clap::{Args, ValueEnum};
use rand::RngExt;
use walferry_cluster::level::CommitLevel;

use crate::failure::{Failure, say};
use crate::load::route::Route;
use crate::nodes;
use cluster::Cluster;
use fault::Fault;
use ground::{Ground, Needs};
use hosts::{Hooks, NamedHost};
use load::{Load, MarkedAt};
use member::{Member, Site};
use own::{CLIENT_PORT, Own};
use plan::{Step, Wanted};
use report::{Report, Round, Setting};
use sessions::Sessions;
use soak::Soak;
use walferry_node::config::{ELECTION_TIMEOUT_DEFAULT, HEARTBEAT_INTERVAL_DEFAULT};
use walferry_node::units::Span;
use watch::Watch;

/// Examples for the help text.
pub const EXAMPLES: &str = "\
Examples:
  walferry drill                                          every fault once, three nodes on this host; three minutes
  walferry drill --faults kill --rounds 30 --beside-etcd  thirty kills each, interleaved with etcd's
  walferry drill --faults kill --rounds 30 --rtt 50ms     with 50 ms between the nodes (root)
  walferry drill --faults kill --profile tuned
  walferry drill --faults random --rounds 50              any fault, for any time, sometimes the next at once
  walferry drill --soak 30min --every 60s                 a random fault a minute; what grows? is the log clean?
  walferry drill --faults slow-replica,dead-replica --nodes 4 --sync 'ANY 2 (*)'
  walferry drill --hosts a=db1:6400,b=db2:6400,c=db3:6400  a cluster that runs already, by switchover
  walferry drill --hosts a=db1:6400,b=db2:6400,c=db3:6400 --faults kill \\
    --on-fault 'ssh {host} systemctl kill -s KILL walferry@main' --on-heal 'ssh {host} systemctl start walferry@main'

Faults: kill, stop, switchover, isolate-leader, isolate-replica, cut-leader-inbound, cut-leader-outbound, slow-leader, slow-replica,
dead-replica, full-disk, clock-jump; random. What the system does not allow is left out and named: networks and disks
of a node's own need root, clocks need libfaketime (package `faketime`). With --hosts your commands do every fault but a
switchover; the drill picks the member, fills in {fault}, {name} and {host}, and measures. The load writes keys that
begin with `drill-`. Acknowledged commits must all be there after each fault, at remote_flush and remote_apply without
exception, at local and off but for what replicas lacked when their leader fell silent (the bound). No session that
carries what it has seen may see anything older, and the logs of all nodes must be the same bytes.

Exit codes: 0 all of that held; 1 something did not, or a fault was not survived; 2 wrong usage.";

/// Before a fault the load runs undisturbed for so long.
const CALM: Duration = Duration::from_millis(1500);
/// Before a replica's fault for longer, so that the p99 to compare with rests on enough writes.
const CALM_FOR_P99: Duration = Duration::from_secs(6);
/// A cluster must take writes again, and its members keep up again, within this time of a fault's end.
const RECOVERY_TIME_MAX: Duration = Duration::from_secs(60);
/// Members of a drill at least and at most: a majority has to be left.
const NODES: std::ops::RangeInclusive<usize> = 3..=5;
/// Timeouts for one rack whose machines are not starved of processor time.
const TUNED: (Duration, Duration) = (Duration::from_millis(150), Duration::from_millis(30));

/// Between two faults of a soak at least: the longest one, and the time to come back.
const EVERY_MIN: Duration = Duration::from_secs(10);

/// Timeouts by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Profile {
    /// The defaults of `walferry start`
    Default,
    /// 150 ms and 30 ms: for one rack
    Tuned,
}

/// Flags of `walferry drill`.
#[derive(Debug, Args)]
pub struct DrillArgs {
    /// Which faults, in this order, or `random` [default: every one]
    #[arg(long, value_delimiter = ',', value_name = "FAULT,...")]
    faults: Vec<Wanted>,
    /// Each fault so often; of `random` so many in all
    #[arg(long, value_name = "N", default_value_t = 1)]
    rounds: usize,
    /// Go on for so long, one of the faults at random after another, and watch memory, descriptors and segments
    #[arg(long, value_name = "TIME", conflicts_with_all = ["rounds", "hosts", "beside_etcd"])]
    soak: Option<Span>,
    /// With --soak: a fault so often
    #[arg(long, value_name = "TIME", default_value = "60s", requires = "soak")]
    every: Span,
    /// Makes the sequence of a random drill again [default: another one each time]
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Writes a second at each commit level
    #[arg(long, value_name = "N", default_value_t = 200)]
    rate: u32,
    /// Members
    #[arg(long, value_name = "N", default_value_t = 3)]
    nodes: usize,
    /// Put so much distance between the nodes (root)
    #[arg(long, value_name = "TIME")]
    rtt: Option<Span>,
    /// The sync policy [default: a majority]
    #[arg(long, value_name = "POLICY", default_value = "")]
    sync: String,
    /// Timeouts by name
    #[arg(long, value_enum, value_name = "NAME", default_value = "default")]
    profile: Profile,
    /// A leader that is silent for so long is replaced [default: the profile's]
    #[arg(long, value_name = "TIME")]
    election_timeout: Option<Span>,
    /// How often a leader sends a heartbeat [default: the profile's]
    #[arg(long, value_name = "TIME")]
    heartbeat_interval: Option<Span>,
    /// Kill the leader of an etcd cluster of three as well, after each of ours (needs `etcd` in PATH)
    #[arg(long)]
    beside_etcd: bool,
    /// A cluster that runs already: every member and where its clients connect
    #[arg(long, value_delimiter = ',', value_name = "NAME=HOST:PORT,...", conflicts_with_all = ["nodes", "rtt", "sync", "profile", "election_timeout", "heartbeat_interval"])]
    hosts: Vec<NamedHost>,
    /// With --hosts: the command that does {fault} to member {name} at {host}
    #[arg(long, value_name = "COMMAND", requires = "hosts")]
    on_fault: Option<String>,
    /// With --hosts: the command that undoes it
    #[arg(long, value_name = "COMMAND", requires = "hosts")]
    on_heal: Option<String>,
    /// Where the nodes keep their data; made anew
    #[arg(long, value_name = "DIR", default_value = "walferry-drill")]
    dir: PathBuf,
    /// Print the result as Markdown
    #[arg(long, conflicts_with = "json")]
    markdown: bool,
    /// Print the result as JSON, and nothing else
    #[arg(long)]
    json: bool,
}

impl DrillArgs {
    fn timeouts(&self) -> (Span, Span) {
        let (election, heartbeat) = match self.profile {
            Profile::Default => (ELECTION_TIMEOUT_DEFAULT, HEARTBEAT_INTERVAL_DEFAULT),
            Profile::Tuned => TUNED,
        };
        (self.election_timeout.unwrap_or(Span(election)), self.heartbeat_interval.unwrap_or(Span(heartbeat)))
    }

    fn check(&self) -> Result<(), Failure> {
        if self.rounds == 0 || self.rate == 0 {
            return Err(Failure::Usage("--rounds and --rate: at least 1".to_owned()));
        }
        if !NODES.contains(&self.nodes) {
            return Err(Failure::Usage(format!("--nodes: {} to {}", NODES.start(), NODES.end())));
        }
        if !self.hosts.is_empty() && self.hosts.len() < *NODES.start() {
            return Err(Failure::Usage(format!("--hosts: name every member, {} at least", NODES.start())));
        }
        if self.faults.contains(&Wanted::Random) && self.faults.len() > 1 {
            return Err(Failure::Usage("--faults: random stands alone".to_owned()));
        }
        if let Some(soak) = self.soak.filter(|soak| Soak::rounds(soak.0, self.every.0.max(EVERY_MIN)) == 0) {
            return Err(Failure::Usage(format!("--soak {soak}: shorter than --every {}", self.every)));
        }
        if self.soak.is_some() && self.every.0 < EVERY_MIN {
            return Err(Failure::Usage(format!("--every {}: at least {}", self.every, Span(EVERY_MIN))));
        }
        let (election_timeout, heartbeat_interval) = self.timeouts();
        Ok(walferry_node::config::check_timeouts(election_timeout.0, heartbeat_interval.0)?)
    }

    fn is_random(&self) -> bool {
        self.faults.contains(&Wanted::Random) || self.soak.is_some()
    }

    /// The faults that were asked for.
    fn wanted(&self) -> Vec<Fault> {
        let one = |wanted: &Wanted| match wanted {
            Wanted::One(fault) => Some(*fault),
            Wanted::Random => None,
        };
        let named: Vec<Fault> = self.faults.iter().filter_map(one).collect();
        match (named.is_empty(), self.hosts.is_empty(), self.is_random()) {
            (false, ..) => named,
            (true, false, false) => vec![Fault::Switchover],
            (true, ..) => Fault::ALL.to_vec(),
        }
    }

    /// Says something while the drill runs.
    fn tell(&self, line: impl std::fmt::Display) -> Result<(), Failure> {
        if self.json { Ok(()) } else { say(line) }
    }
}

/// Runs `walferry drill`.
pub fn run(args: &DrillArgs) -> Result<(), Failure> {
    args.check()?;
    let (mut cluster, faults) = gather(args)?;
    if faults.is_empty() {
        return Err(Failure::failed("none of the faults is possible here"));
    }
    let random_seed = || rand::rng().random_range(0..u64::from(u32::MAX));
    let seed = args.is_random().then(|| args.seed.unwrap_or_else(random_seed));
    let steps = match seed {
        Some(seed) => {
            args.tell(format_args!("--seed {seed}"))?;
            match args.soak {
                Some(lasts) => plan::random_calm(&faults, Soak::rounds(lasts.0, args.every.0), seed),
                None => plan::random(&faults, args.rounds, seed),
            }
        }
        None => plan::in_order(&faults, args.rounds),
    };
    cluster.wait_until_complete(RECOVERY_TIME_MAX).map_err(Failure::Failed)?;
    let mut etcd = if args.beside_etcd { Some(etcd::Cluster::start(&args.dir)?) } else { None };
    let (election_timeout, heartbeat_interval) = args.timeouts();
    let own = args.hosts.is_empty();
    let mut report = Report::new(Setting {
        nodes: cluster.members.len(),
        rtt: args.rtt,
        sync: args.sync.clone(),
        election_timeout: own.then_some(election_timeout),
        heartbeat_interval: own.then_some(heartbeat_interval),
        tuned: args.profile == Profile::Tuned,
        rate: args.rate,
        seed,
    });
    let mut drill = Drill::start(&cluster, args.rate);
    let mut soak = args.soak.map(|lasts| Soak::new(lasts.0, args.every.0));
    for (number, step) in steps.iter().enumerate() {
        if let Some(soak) = &mut soak {
            args.tell(format_args!("     {}", soak.wait_and_sample(number, &cluster)?))?;
        }
        let round = drill.round(step, &mut cluster)?;
        args.tell(format_args!("{:>3}  {}", number + 1, round.line()))?;
        report.rounds.push(round);
        if let (Some(etcd), Fault::Kill) = (&mut etcd, step.fault) {
            let outage = etcd.kill_leader()?;
            args.tell(format_args!("{:>3}  {:<30} no writes for {}", number + 1, "etcd", report::ms(outage)))?;
            report.etcd.push(outage);
        }
    }
    if let Some(soak) = &mut soak {
        args.tell(format_args!("     {}", soak.wait_and_sample(steps.len(), &cluster)?))?;
    }
    let Drill { load, sessions, watch, .. } = drill;
    let first_wrong = sessions.first_wrong();
    drop((sessions, watch));
    report.finish(load.finish(), first_wrong, &cluster)?;
    if let Site::Own(own) = &mut cluster.site {
        own.stop()?;
        if let Some(soak) = &mut soak {
            soak.verify(own);
        }
    }
    match (args.json, args.markdown) {
        (true, _) => say(format_args!("{:#}", report.json(soak.as_ref())))?,
        (_, true) => say(report.markdown())?,
        _ => say(report.text())?,
    }
    let grown = match &soak {
        Some(soak) => tell_of(soak, args)?,
        None => None,
    };
    report.verdict()?;
    grown.map_or(Ok(()), |what| Err(Failure::Failed(what)))
}

/// Prints what a soak watched; what grew.
fn tell_of(soak: &Soak, args: &DrillArgs) -> Result<Option<String>, Failure> {
    let (said, grown) = soak.verdict();
    match args.markdown {
        true => {
            let said: Vec<String> = said.iter().map(|line| format!("- {line}")).collect();
            let (summary, table) = (soak.summary().markdown(), soak.table().markdown());
            args.tell(format_args!("\n{summary}\n\n{}\n\n{table}", said.join("\n")))?;
        }
        false => {
            let (summary, table) = (soak.summary().text(), soak.table().text());
            args.tell(format_args!("\n{table}\n\n{summary}\n\n{}", said.join("\n")))?;
        }
    }
    Ok(grown)
}

/// The cluster, and those of the faults that can be injected into it.
fn gather(args: &DrillArgs) -> Result<(Cluster, Vec<Fault>), Failure> {
    let mut faults = args.wanted();
    let mut left_out = Vec::new();
    let mut keep = |cannot: &dyn Fn(Fault) -> Option<&'static str>| {
        faults.retain(|fault| match cannot(*fault) {
            None => true,
            Some(why) => {
                left_out.push(format!("{fault}: left out, {why}"));
                false
            }
        });
    };
    let cluster = if args.hosts.is_empty() {
        nodes::replace_directory(&args.dir)?;
        let wanted = args.wanted();
        let needs = Needs {
            disks: wanted.iter().any(|fault| fault.needs_disks()),
            clocks: wanted.iter().any(|fault| fault.needs_clocks()),
        };
        let ground = Ground::find(args.nodes, args.rtt.map(|rtt| rtt.0), needs)?;
        keep(&|fault| ground.cannot(fault));
        let names: Vec<String> = (0..args.nodes).map(Cluster::name).collect();
        let member = |(index, name): (usize, &String)| {
            let address = format!("{}:{CLIENT_PORT}", ground.host(index)).parse().expect("an address");
            Member { name: name.clone(), address }
        };
        let members = names.iter().enumerate().map(member).collect();
        Cluster { members, site: Site::Own(Own::start(ground, &args.dir, &names, flags(args)?)?) }
    } else {
        let hooks = Hooks { hosts: args.hosts.clone(), on_fault: args.on_fault.clone(), on_heal: args.on_heal.clone() };
        keep(&|fault| hooks.cannot(fault));
        let members = args.hosts.iter().map(NamedHost::resolve).collect::<Result<_, _>>()?;
        if args.beside_etcd {
            nodes::replace_directory(&args.dir)?;
        }
        Cluster { members, site: Site::Hosts(hooks) }
    };
    for text in left_out {
        args.tell(text)?;
    }
    Ok((cluster, faults))
}

fn flags(args: &DrillArgs) -> Result<Vec<String>, Failure> {
    let (election_timeout, heartbeat_interval) = args.timeouts();
    let mut flags: Vec<String> = nodes::without_direct_io(&args.dir)?.into_iter().map(str::to_owned).collect();
    flags.extend(["--election-timeout".to_owned(), election_timeout.to_string()]);
    flags.extend(["--heartbeat-interval".to_owned(), heartbeat_interval.to_string()]);
    flags.extend(["--sync".to_owned(), args.sync.clone()]);
    if args.soak.is_some() {
        flags.extend(soak::FLAGS.map(str::to_owned));
    }
    Ok(flags)
}

/// What runs beside the faults.
struct Drill {
    load: Load,
    sessions: Sessions,
    watch: Watch,
    /// What was acknowledged until the last look at what is lost.
    looked_at: MarkedAt,
}

impl Drill {
    fn start(cluster: &Cluster, rate: u32) -> Drill {
        // A cluster that runs already may have been drilled before: every run has keys of its own.
        let run = format!("drill-{:08x}", rand::rng().random_range(0..u32::MAX));
        let addresses = cluster.addresses();
        let route = Arc::new(Route::new(addresses[0]));
        addresses.iter().for_each(|address| route.add(*address));
        let load = Load::start(&route, rate, &run);
        let looked_at = load.mark();
        let sessions = Sessions::start(&addresses, &route, &run);
        Drill { load, sessions, watch: Watch::start(&cluster.members), looked_at }
    }

    /// One fault: calm, the fault, its end, recovery; then what is certain is compared, unless the next one hurries.
    fn round(&mut self, step: &Step, cluster: &mut Cluster) -> Result<Round, Failure> {
        let fault = step.fault;
        let calm = if fault.is_replicas() && !step.hurried { CALM_FOR_P99 } else { CALM };
        let calm = if step.hurried { Duration::ZERO } else { calm };
        std::thread::sleep(calm);
        let reads = self.sessions.reads();
        let leader = cluster.leader()?;
        let (begun, begun_at) = (Instant::now(), SystemTime::now());
        let injected = fault.inject(cluster, &leader, step)?;
        std::thread::sleep(step.lasts);
        let healed = Instant::now();
        let victim = injected.name.clone();
        let note = fault.heal(cluster, injected).map_err(|error| cluster.explain(fault, error))?;
        if !step.hurries {
            self.load
                .wait_for_writes(Instant::now(), RECOVERY_TIME_MAX)
                .map_err(|text| cluster.explain(fault, text))?;
            cluster.wait_until_complete(RECOVERY_TIME_MAX).map_err(|text| cluster.explain(fault, text))?;
        }
        let new_leader = if step.hurries { leader.clone() } else { cluster.leader()? };
        let p99 = |from, to| self.load.latency(CommitLevel::RemoteFlush, 0.99, from, to);
        let p99 = match fault.is_replicas() && !step.hurried {
            true => p99(begun - calm, begun).zip(p99(begun, healed)),
            false => None,
        };
        let (losses, compared) = if step.hurries { (Vec::new(), None) } else { self.look(cluster)? };
        Ok(Round {
            fault,
            lasted: step.lasts,
            victim,
            outage: self.load.outage(CommitLevel::RemoteFlush, begun),
            split: (new_leader != leader).then(|| self.split(cluster, &leader, begun, begun_at)).flatten(),
            leader,
            new_leader,
            in_sync_changes: self.watch.seen().in_sync_changes(begun),
            losses,
            compared,
            p99,
            reads: self.sessions.reads().since(reads),
            note,
        })
    }

    /// What is lost of all that was acknowledged since the last look, and whether the logs are the same.
    fn look(
        &mut self,
        cluster: &Cluster,
    ) -> Result<(load::Losses, Option<crate::inspect::against::Compared>), Failure> {
        let compared = cluster.compare_logs()?;
        let now = self.load.mark();
        let losses = self.load.lost(cluster, &self.looked_at, &self.watch.seen())?;
        self.looked_at = now;
        Ok((losses, compared))
    }

    fn split(&self, cluster: &Cluster, old: &str, since: Instant, since_at: SystemTime) -> Option<member::Split> {
        match &cluster.site {
            Site::Own(own) => own.split(since_at),
            Site::Hosts(_) => self.watch.seen().split(since, cluster.address(old)),
        }
    }
}
