//! A run: threads, their common start, their intervals merged into progress lines, the interval log and the summary.
//! Called by the command line and by the demo.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use rand::{RngExt, SeedableRng};
use tokio_postgres::Config;

use super::connection::{Connection, Greeting, LoadTls};
use super::driver::{self, Event, INTERVAL, Plan};
use super::expr::Random;
use super::options::ScriptSource;
use super::postgres::{self, Sql};
use super::report::{self, CommandSummary, IntervalLog, Lag, Latency, ScriptSummary, Summary};
use super::route::Route;
use super::script::{Payload, Script, Step, Variables};
use super::session::{Session, Workload};
use super::stats::Stats;
use super::tables;
use super::target::{Server, Target};
use crate::client::{Client, ClientError, Url, encode_command};
use crate::failure::Failure;

/// Intervals that threads may hand over before the run takes them.
const EVENTS_AHEAD: usize = 64;

/// What to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The node.
    pub url: Target,
    /// Connections.
    pub clients: usize,
    /// Threads, at most as many as clients.
    pub threads: usize,
    /// How long; exclusive with `transactions`.
    pub duration: Option<Duration>,
    /// Transactions of each client.
    pub transactions: Option<u64>,
    /// How often to tell progress.
    pub progress: Option<Duration>,
    /// Transactions a second of an open-loop run.
    pub rate: Option<f64>,
    /// Scale for `-i`, and for scripts when there are no tables.
    pub scale: Option<i64>,
    /// The scripts.
    pub scripts: Vec<ScriptSource>,
    /// Variables set on the command line.
    pub define: Vec<(String, i64)>,
    /// Size of `:payload`.
    pub payload_bytes: usize,
    /// Commit level to ask for.
    pub level: Option<String>,
    /// Seed, if one was given.
    pub seed: Option<u64>,
    /// Interval log to write.
    pub log: Option<PathBuf>,
}

/// Set by the first Ctrl-C; the second one ends the process.
static STOP: AtomicBool = AtomicBool::new(false);

extern "C" fn on_interrupt(_: libc::c_int) {
    STOP.store(true, Ordering::Relaxed);
}

fn catch_interrupts() {
    let flags = SaFlags::SA_RESETHAND;
    let action = SigAction::new(SigHandler::Handler(on_interrupt), flags, SigSet::empty());
    // SAFETY: the handler only stores an atomic. Without it Ctrl-C ends the run without a report, which is no harm.
    let _ = unsafe { sigaction(Signal::SIGINT, &action) };
}

/// The URL of the leader that a node knows, or else the node's own: tables are filled and checked there.
pub fn leader_url(url: &Url) -> Url {
    let ask = || {
        let answer = Client::connect(url).ok()?.call(&["LEADER"]).ok()?;
        url.with_address(&answer.text()?).ok()
    };
    ask().unwrap_or_else(|| url.clone())
}

/// Opens a connection for checks before and after a run, at a commit level if one is asked for and the server knows levels.
pub fn connect(url: &Url, level: Option<&str>) -> Result<(Client, Server), Failure> {
    let mut client = Client::connect(url).map_err(Failure::failed)?;
    let server = Server::detect(&mut client).map_err(Failure::failed)?;
    if let (Server::Walferry(_), Some(level)) = (&server, level) {
        match client.call(&["COMMITLEVEL", level]) {
            Err(ClientError::Refused { text, .. }) => return Err(Failure::Usage(format!("--level {level}: {text}"))),
            answer => answer.map(drop).map_err(Failure::failed)?,
        }
    }
    if let (Server::Other, Some(level)) = (&server, level) {
        return Err(Failure::failed(format_args!(
            "--level {level}: {url} does not know commit levels; is it a walferry node? Without --level it can be measured"
        )));
    }
    Ok((client, server))
}

fn greeting(url: &Url, level: Option<&str>) -> Greeting {
    let mut greeting = Greeting { bytes: Vec::new(), answers: 0 };
    let mut add = |arguments: &[&str]| {
        encode_command(&mut greeting.bytes, &arguments.iter().map(|a| a.as_bytes()).collect::<Vec<_>>());
        greeting.answers += 1;
    };
    if let Some(auth) = url.auth() {
        add(&auth);
    }
    if let Some(level) = level {
        add(&["COMMITLEVEL", level]);
    }
    add(&["PING"]);
    greeting
}

/// A run that can begin.
struct Prepared {
    workload: Workload,
    scale: i64,
    server: String,
    way: Way,
}

/// How the clients talk.
enum Way {
    Resp { route: Arc<Route>, tls: Option<LoadTls>, greeting: Greeting },
    Postgres { config: Box<Config>, scripts: Vec<Sql> },
}

/// Reads the scripts and looks for the tables that they need.
fn prepare(options: &Options, seed: u64) -> Result<Prepared, Failure> {
    let level = options.level.as_deref();
    let (found, server, confirmation, way) = match &options.url {
        Target::Redis(url) => {
            let (mut client, server) = connect(url, level)?;
            let found = tables::scale(&mut client).map_err(Failure::failed)?;
            let confirmation = server.confirmation(level).map_err(Failure::Usage)?;
            let known = level.filter(|_| matches!(server, Server::Walferry(_)));
            let address = url.resolve().map_err(Failure::failed)?;
            let config = url.tls_config().map_err(Failure::failed)?;
            let tls = config.map(|config| LoadTls { config, host: url.host.clone(), address });
            let route = Arc::new(Route::new(address));
            if matches!(server, Server::Walferry(_)) {
                route.learn(&mut client);
            }
            (found, server.to_string(), confirmation, Way::Resp { route, tls, greeting: greeting(url, known) })
        }
        Target::Postgres(config) => {
            let facts = postgres::prepare(config, level)?;
            let sql = |source: &ScriptSource| match source {
                ScriptSource::Builtin(name, _) => Sql::named(name),
                ScriptSource::File(..) => None,
            };
            let scripts: Option<Vec<Sql>> = options.scripts.iter().map(sql).collect();
            let scripts = scripts.ok_or_else(|| Failure::Usage("PostgreSQL runs only built-in scripts".to_owned()))?;
            (facts.scale, facts.server, None, Way::Postgres { config: config.clone(), scripts })
        }
    };
    if let (Some(found), Some(asked)) = (found, options.scale)
        && found != asked
    {
        tracing::warn!("--scale {asked} is not used: the tables have the scale {found}");
    }
    let scale = found.or(options.scale).unwrap_or(1);
    let mut variables = Variables::predefined(scale, seed);
    for (name, value) in &options.define {
        variables.set(name, *value);
    }
    let mut scripts = Vec::new();
    for source in &options.scripts {
        scripts.push(match source {
            ScriptSource::Builtin(name, weight) => {
                Script::builtin(name, *weight, &mut variables).map_err(Failure::Usage)?
            }
            ScriptSource::File(path, weight) => {
                let name = path.display().to_string();
                let text =
                    std::fs::read_to_string(path).map_err(|error| Failure::Usage(format!("--file {name}: {error}")))?;
                Script::parse(&name, *weight, &text, &mut variables)
                    .map_err(|error| Failure::Usage(error.to_string()))?
            }
        });
    }
    if let Some(command) = confirmation {
        scripts.iter_mut().try_for_each(|script| script.end_with(command, &variables)).map_err(Failure::failed)?;
    }
    if found.is_none() && scripts.iter().any(|script| script.needs_tables) {
        return Err(Failure::failed(format_args!(
            "{} has no tables; fill them with `walferry load -i` and the same --url",
            options.url
        )));
    }
    let payload = Payload::new(options.payload_bytes, &mut Random::seed_from_u64(seed));
    let client_id_slot = variables.slot("client_id");
    let workload = Workload { scripts, values: variables.values, client_id_slot, payload };
    Ok(Prepared { workload, scale, server, way })
}

/// Runs the load to its end or to Ctrl-C.
pub fn execute(options: &Options) -> Result<Summary, Failure> {
    let seed = options.seed.unwrap_or_else(|| rand::rng().random());
    let Prepared { workload, scale, server, way } = prepare(options, seed)?;
    let workload = Arc::new(workload);
    STOP.store(false, Ordering::Relaxed);
    catch_interrupts();
    let (events_in, events) = sync_channel(EVENTS_AHEAD);
    let (mut starts, mut threads) = (Vec::new(), Vec::new());
    let connecting = Instant::now();
    for thread in 0..options.threads {
        let rate =
            options.rate.map(|rate| (rate / options.threads as f64, Random::seed_from_u64(!seed ^ thread as u64)));
        let (start, started) = channel();
        let events_in = events_in.clone();
        let (duration, workload) = (options.duration, Arc::clone(&workload));
        let body: Box<dyn FnOnce() + Send> = match &way {
            Way::Resp { route, tls, greeting } => {
                let connections = connections(options, &workload, route, tls, thread, seed, connecting);
                let greeting = greeting.clone();
                let plan = Plan { thread, greeting, connections, rate, duration, workload, stop: &STOP };
                Box::new(move || driver::run(plan, &started, &events_in))
            }
            Way::Postgres { config, scripts } => {
                let plan = postgres::Plan {
                    thread,
                    config: (**config).clone(),
                    scripts: scripts.clone(),
                    clients: (thread..options.clients).step_by(options.threads).collect(),
                    transactions: options.transactions,
                    rate,
                    duration,
                    level: options.level.clone(),
                    scale,
                    seed,
                    workload,
                    stop: &STOP,
                };
                Box::new(move || postgres::run(plan, &started, &events_in))
            }
        };
        let spawned = std::thread::Builder::new().name(format!("load-{thread}")).spawn(body);
        threads.push(spawned.map_err(|error| Failure::failed(format_args!("cannot start thread {thread}: {error}")))?);
        starts.push(start);
    }
    drop(events_in);
    let collected = collect(options, &workload, &events, starts, connecting);
    // After a failure the receiver goes first, so that no thread waits for a place in the channel.
    drop(events);
    for thread in threads {
        thread.join().map_err(|_| Failure::failed("a load thread panicked"))?;
    }
    let collected = collected?;
    Ok(summary(options, &workload, server, scale, seed, collected))
}

/// The connections of one thread: every `threads`-th client.
fn connections(
    options: &Options,
    workload: &Arc<Workload>,
    route: &Arc<Route>,
    tls: &Option<LoadTls>,
    thread: usize,
    seed: u64,
    now: Instant,
) -> Vec<Connection> {
    let clients = (thread..options.clients).step_by(options.threads);
    let connection = |client: usize| {
        let random = Random::seed_from_u64(seed.wrapping_add(client as u64));
        let session = Session::new(Arc::clone(workload), client, random, now);
        Connection::new(session, options.transactions, Arc::clone(route), tls.clone(), now)
    };
    clients.map(connection).collect()
}

struct Collected {
    stats: Stats,
    elapsed: Duration,
    connecting: Duration,
    unfinished: u64,
}

/// Starts all threads together and merges what they count, interval by interval.
fn collect(
    options: &Options,
    workload: &Workload,
    events: &Receiver<Event>,
    starts: Vec<Sender<Instant>>,
    connecting: Instant,
) -> Result<Collected, Failure> {
    let gone = || Failure::failed("a load thread ended without a word");
    for _ in 0..options.threads {
        match events.recv().map_err(|_| gone())? {
            Event::Failed(text) => {
                return Err(Failure::failed(format_args!("{}: {text}", options.url)));
            }
            Event::Connected | Event::Interval(..) | Event::Finished { .. } => {}
        }
    }
    let (start, wall_start) = (Instant::now(), SystemTime::now());
    for sender in &starts {
        sender.send(start).map_err(|_| gone())?;
    }
    let mut merge = Merge::new(options, workload, wall_start)?;
    let mut unfinished = 0;
    let mut finished = 0;
    while finished < options.threads {
        match events.recv().map_err(|_| gone())? {
            Event::Interval(thread, stats) => merge.add(thread, *stats)?,
            Event::Finished { thread, unfinished: count } => {
                unfinished += count;
                finished += 1;
                merge.finish(thread)?;
            }
            Event::Failed(text) => return Err(Failure::failed(text)),
            Event::Connected => {}
        }
    }
    let elapsed = start.elapsed();
    let stats = merge.end(elapsed)?;
    Ok(Collected { stats, elapsed, connecting: start - connecting, unfinished })
}

/// Puts the intervals of all threads together, in order.
struct Merge<'a> {
    options: &'a Options,
    empty: Stats,
    total: Stats,
    since_progress: Stats,
    progress_from: u64,
    /// Intervals that some threads still owe.
    open: BTreeMap<u64, Stats>,
    /// For each thread the interval that it hands over next.
    next: Vec<u64>,
    /// The first interval that is not closed.
    closed: u64,
    log: Option<IntervalLog>,
}

impl<'a> Merge<'a> {
    fn new(options: &'a Options, workload: &Workload, start: SystemTime) -> Result<Merge<'a>, Failure> {
        let comment = format!("walferry load, latencies in nanoseconds, maxima in milliseconds, {}", options.url);
        let log = options.log.as_ref().map(|path| IntervalLog::create(path, start, &comment));
        let empty = workload.empty_stats();
        Ok(Merge {
            options,
            total: empty.clone(),
            since_progress: empty.clone(),
            progress_from: 0,
            empty,
            open: BTreeMap::new(),
            next: vec![0; options.threads],
            closed: 0,
            log: log.transpose().map_err(Failure::failed)?,
        })
    }

    fn add(&mut self, thread: usize, stats: Stats) -> Result<(), Failure> {
        let index = self.next[thread];
        self.next[thread] += 1;
        match self.open.get_mut(&index) {
            Some(interval) => interval.add(&stats),
            None => {
                self.open.insert(index, stats);
            }
        }
        self.close_interval()
    }

    fn finish(&mut self, thread: usize) -> Result<(), Failure> {
        self.next[thread] = u64::MAX;
        self.close_interval()
    }

    /// Closes the intervals that no thread owes anything to; the last one is left to `end`.
    fn close_interval(&mut self) -> Result<(), Failure> {
        let whole = self.next.iter().copied().min().unwrap_or(0);
        while self.closed < whole && self.open.len() > 1 {
            let Some((index, stats)) = self.open.pop_first() else {
                break;
            };
            self.close(index, INTERVAL, &stats)?;
        }
        Ok(())
    }

    fn close(&mut self, index: u64, lasted: Duration, stats: &Stats) -> Result<(), Failure> {
        self.closed = index + 1;
        self.total.add(stats);
        self.since_progress.add(stats);
        let from = INTERVAL * index as u32;
        if let Some(log) = &mut self.log {
            log.write(from, lasted, stats).map_err(Failure::failed)?;
        }
        let since = INTERVAL * (index - self.progress_from) as u32 + lasted;
        if self.options.progress.is_some_and(|every| since >= every) {
            let line = report::progress_line(from + lasted, since, &self.since_progress, self.options.rate.is_some());
            eprintln!("{line}");
            self.since_progress = self.empty.clone();
            self.progress_from = index + 1;
        }
        Ok(())
    }

    fn end(mut self, elapsed: Duration) -> Result<Stats, Failure> {
        while let Some((index, stats)) = self.open.pop_first() {
            let lasted = elapsed.saturating_sub(INTERVAL * index as u32).min(INTERVAL);
            if stats.latency.count + stats.failed_count() > 0 {
                self.close(index, lasted, &stats)?;
            }
        }
        Ok(self.total)
    }
}

fn summary(
    options: &Options,
    workload: &Workload,
    server: String,
    scale: i64,
    seed: u64,
    collected: Collected,
) -> Summary {
    let Collected { stats, elapsed, connecting, unfinished } = collected;
    let seconds = elapsed.as_secs_f64().max(1e-9);
    let scripts = workload.scripts.iter().zip(&stats.scripts).map(|(script, counted)| {
        let commands = script.steps.iter().zip(&counted.commands).filter_map(|(step, counted)| match step {
            Step::Command(template) => Some(CommandSummary {
                command: template.text.clone(),
                latency_average_ms: counted.latency.mean_ms(),
                failed: counted.failed,
            }),
            _ => None,
        });
        ScriptSummary {
            name: script.name.clone(),
            weight: script.weight,
            transactions: counted.latency.count,
            failed: counted.failed,
            tps: counted.latency.count as f64 / seconds,
            latency_average_ms: counted.latency.mean_ms(),
            latency_stddev_ms: counted.latency.stddev_ms(),
            commands: commands.collect(),
        }
    });
    Summary {
        server,
        scale,
        clients: options.clients,
        threads: options.threads,
        level: options.level.clone(),
        seed,
        rate: options.rate,
        duration_asked_s: options.duration.map(|duration| duration.as_secs()),
        transactions_asked: options.transactions,
        duration_s: elapsed.as_secs_f64(),
        transactions: stats.latency.count,
        failed: stats.failed_count(),
        unfinished,
        tps: stats.latency.count as f64 / seconds,
        latency_ms: Latency::of(&stats),
        percentiles_ms: report::curve(&stats),
        schedule_lag_ms: options.rate.map(|_| Lag::of(&stats.lag)),
        initial_connection_ms: connecting.as_secs_f64() * 1e3,
        reconnects: stats.reconnects,
        failures: report::failures(&stats),
        scripts: scripts.collect(),
        interrupted: STOP.load(Ordering::Relaxed),
    }
}
