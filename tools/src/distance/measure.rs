//! The measurement itself: nodes at a distance, load at every level and number of clients, and what the leader says of it.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use walferry_cluster::CommitLevel;

use super::DistanceArgs;
use super::profile::Profile;
use super::result::{Lag, Level, Point, ProfileResult};
use crate::client::{Client, ClientError, Reply, Url, info_field};
use crate::failure::Failure;
use crate::link::{self, Link, Rtt, Shape};
use crate::load::{self, Options, ScriptSource, Summary};
use crate::nodes::{LocalNode, wait_until_streaming};
use crate::status::waterfall;

/// Between two looks at the replicas' lag.
const LAG_LOOK_MS: u64 = 5;
/// A run lasts at least so many round trips, so that one client gives a median.
const ROUND_TRIPS_MIN: u32 = 20;
/// Clients of the run before the first that counts: it opens the congestion windows.
const WARM_UP_CLIENTS: usize = 64;
/// An open loop asks for this share of what the closed one reached.
const OPEN_SHARE: f64 = 0.5;
/// The name of the node that leads.
const LEADER: &str = "leader";

/// Nodes that can be measured.
pub struct Stand {
    /// Where the load goes.
    pub leader: Url,
    /// The measured round trip between leader and replicas.
    pub rtt: Rtt,
    // Dropped in this order: nodes end before the link that carries them.
    nodes: Vec<LocalNode>,
    link: Option<Link>,
}

/// What a remote commit waits for: one of the replicas.
pub fn sync_policy(replicas: usize) -> String {
    let names: Vec<String> = (1..=replicas).map(replica_name).collect();
    format!("ANY 1 ({})", names.join(", "))
}

fn replica_name(number: usize) -> String {
    format!("replica-{number}")
}

impl Stand {
    /// Starts a leader here and replicas at the other end of a link.
    pub fn start(args: &DistanceArgs, profile: &Profile, flags: &[&str]) -> Result<Stand, Failure> {
        let dir = args.dir.join(&profile.name);
        std::fs::create_dir_all(&dir)
            .map_err(|error| Failure::failed(format_args!("--dir {}: {error}", dir.display())))?;
        let failed = |error: std::io::Error| Failure::failed(format_args!("the link of {}: {error}", profile.name));
        let mut link = match profile.rtt.is_zero() {
            true => None,
            false => {
                let shape = Shape::with_rtt(profile.rtt).checked().map_err(Failure::Usage)?;
                Some(Link::start(args.kind, shape).map_err(failed)?)
            }
        };
        let rtt = match &mut link {
            Some(link) => link.measure_rtt().map_err(failed)?,
            None => link::measure_loopback().map_err(failed)?,
        };
        let policy = sync_policy(args.replicas);
        let program = LocalNode::program()?;
        let near = link.as_ref().map_or("127.0.0.1".to_owned(), |link| link.near_host().to_string());
        let peer_listen = format!("{near}:0");
        let leader_flags = [&["--sync", policy.as_str(), "--peer-listen", &peer_listen], flags].concat();
        let leader = LocalNode::spawn(Command::new(&program), &dir, LEADER, &leader_flags)?.wait_until_ready()?;
        let peers = leader.peer_listen.parse().map_err(Failure::failed)?;
        let follow = match &mut link {
            Some(link) => link.reach(peers).map_err(failed)?,
            None => peers,
        };
        let far = link.as_ref().map_or("127.0.0.1".to_owned(), |link| link.far_host().to_string());
        let (follow, far) = (follow.to_string(), format!("{far}:0"));
        let follow_flags = [&["--follow", follow.as_str(), "--listen", &far, "--peer-listen", &far], flags].concat();
        let mut nodes = Vec::new();
        for number in 1..=args.replicas {
            let command = link.as_ref().map_or_else(|| Command::new(&program), |link| link.far_command(&program));
            let name = replica_name(number);
            nodes.push(LocalNode::spawn(command, &dir, &name, &follow_flags)?.wait_until_ready()?);
        }
        wait_until_streaming(&leader, args.replicas)?;
        let url = leader.url.clone();
        nodes.push(leader);
        Ok(Stand { leader: url, rtt, nodes, link })
    }

    /// Nodes that already run; nothing is emulated. The round trip is the one that the leader measures.
    pub fn attach(leader: &Url) -> Result<(Stand, usize, String), Failure> {
        let mut client = Client::connect(leader).map_err(Failure::failed)?;
        let rows = client.call(&["REPLICATION"]).map_err(Failure::failed)?;
        let info = client.call(&["INFO"]).map_err(Failure::failed)?.text().unwrap_or_default();
        let replicas = rows.items().len();
        if replicas == 0 {
            return Err(Failure::failed(format_args!("{leader} has no replicas: there is no distance to measure")));
        }
        let sync = info_field(&info, "sync_policy").unwrap_or_default().to_owned();
        // Commits bring round trips with them.
        let (options, level) = (options(leader, 1, 0, 1), CommitLevel::RemoteWrite.to_string());
        let load = Options { level: Some(level), transactions: Some(u64::from(ROUND_TRIPS_MIN)), ..options };
        let summary = load::execute(&load)?;
        if summary.transactions == 0 {
            let why = summary.failures.first().map_or("no answer", |failure| &failure.example);
            return Err(Failure::failed(format_args!(
                "{leader} confirms no remote commit: {why}; does it have --sync?"
            )));
        }
        let info = client.call(&["INFO"]).map_err(Failure::failed)?.text().unwrap_or_default();
        let round_trips = info.lines().filter_map(|line| {
            let us = line.trim_end().rsplit_once("round_trip=").filter(|_| line.starts_with("replica_"))?.1;
            us.parse::<f64>().ok().filter(|us| *us > 0.0)
        });
        let us = round_trips.reduce(f64::min).unwrap_or(0.0);
        let rtt = Rtt { samples: 1, min_us: us, p50_us: us, p99_us: us };
        Ok((Stand { leader: leader.clone(), rtt, nodes: Vec::new(), link: None }, replicas, sync))
    }

    /// Ends the nodes, then the link.
    pub fn stop(self) -> Result<(), Failure> {
        let Stand { nodes, link, .. } = self;
        for node in nodes {
            node.stop()?;
        }
        drop(link);
        Ok(())
    }

    /// Every level and number of clients, closed loop; each level with the most clients once more as an open loop.
    pub fn measure(
        &self,
        args: &DistanceArgs,
        name: &str,
        mut told: impl FnMut(&Point) -> Result<(), Failure>,
    ) -> Result<(ProfileResult, bool), Failure> {
        let mut result = ProfileResult {
            name: name.to_owned(),
            rtt: self.rtt,
            points: Vec::new(),
            saturation: Vec::new(),
            losses: Vec::new(),
            rule: Vec::new(),
        };
        let rtt = Duration::from_secs_f64(self.rtt.p50_us / 1e6);
        let time = Duration::from_secs(args.seconds).max(rtt * ROUND_TRIPS_MIN);
        let options = |clients| options(&self.leader, clients, args.payload_bytes, usize::from(args.jobs));
        let strongest = args.levels.iter().copied().max().unwrap_or(CommitLevel::Local);
        let warm_up = Options { duration: Some(time), level: Some(strongest.to_string()), ..options(WARM_UP_CLIENTS) };
        let mut interrupted = load::execute(&warm_up)?.interrupted;
        for level in &args.levels {
            let closed = args.clients.iter().map(|clients| (*clients, false));
            let open = args.clients.iter().max().filter(|_| args.open_loop).map(|clients| (*clients, true));
            for (clients, is_open) in closed.chain(open) {
                if interrupted {
                    return Ok((result, true));
                }
                let reached = result.points.iter().filter(|point| point.level.0 == *level);
                let best = reached.map(|point| point.load.tps).fold(0.0, f64::max);
                let rate = is_open.then_some((best * OPEN_SHARE).max(1.0));
                let level_name = Some(level.to_string());
                let options = Options { duration: Some(time), level: level_name, rate, ..options(clients) };
                let point = self.point(*level, &options)?;
                interrupted = point.load.interrupted;
                told(&point)?;
                result.points.push(point);
            }
        }
        Ok((result, interrupted))
    }

    fn point(&self, level: CommitLevel, options: &Options) -> Result<Point, Failure> {
        let mut client = Client::connect(&self.leader).map_err(Failure::failed)?;
        client.call(&["WATERFALL", "RESET"]).map_err(Failure::failed)?;
        let before = flushes(&mut client).map_err(Failure::failed)?;
        let (load, lag) = with_lag(&self.leader, || load::execute(options))?;
        let after = flushes(&mut client).map_err(Failure::failed)?;
        let mut report = waterfall::read(&mut client, true).map_err(Failure::failed)?;
        let name = level.to_string();
        let prefix = format!("{name}.");
        let stages = waterfall::histograms(&report)
            .into_iter()
            .filter_map(|(tag, histogram)| Some((tag.strip_prefix(&prefix)?.to_owned(), histogram)))
            .collect();
        let rows = report["levels"].as_array_mut().map(std::mem::take).unwrap_or_default();
        let mut row = rows.into_iter().find(|row| row["level"] == name.as_str()).unwrap_or_default();
        without_histograms(&mut row);
        let per_flush = |(records, flushes): (f64, f64)| (flushes > 0.0).then(|| records / flushes);
        Ok(Point {
            level: Level(level),
            clients: options.clients,
            rate: options.rate,
            load,
            over_local_ms: None,
            over_rtt_ms: None,
            records_per_flush: per_flush((after.0 - before.0, after.1 - before.1)),
            waterfall: row,
            lag,
            stages,
        })
    }
}

/// The encoded distributions are for the model alone.
fn without_histograms(row: &mut serde_json::Value) {
    let stages = row["stages"].as_array_mut().map(std::mem::take).unwrap_or_default();
    let mut bare = |mut value: serde_json::Value| {
        if let Some(map) = value.as_object_mut() {
            map.remove("histogram");
        }
        value
    };
    row["stages"] = stages.into_iter().map(&mut bare).collect();
    row["total"] = bare(row["total"].take());
}

fn options(leader: &Url, clients: usize, payload_bytes: usize, threads: usize) -> Options {
    Options {
        url: leader.clone().into(),
        clients,
        threads: threads.min(clients),
        duration: None,
        transactions: None,
        progress: None,
        rate: None,
        scale: None,
        scripts: vec![ScriptSource::Builtin("append".to_owned(), 1)],
        define: Vec::new(),
        payload_bytes,
        level: None,
        seed: None,
        log: None,
    }
}

/// Records and durable writes of the leader's log.
fn flushes(client: &mut Client) -> Result<(f64, f64), ClientError> {
    let info = client.call(&["INFO"])?.text().unwrap_or_default();
    let number = |key| info_field(&info, key).and_then(|value| value.parse().ok()).unwrap_or(0.0);
    Ok((number("flush_records"), number("flush_count")))
}

/// Does `work` while another connection looks how far the foremost replica is behind.
fn with_lag(leader: &Url, work: impl FnOnce() -> Result<Summary, Failure>) -> Result<(Summary, Option<Lag>), Failure> {
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watching = scope.spawn(|| {
            let mut lag = Lag::default();
            let Ok(mut client) = Client::connect(leader) else { return lag };
            while !ended.load(Ordering::Relaxed) {
                let began = Instant::now();
                let Ok(rows) = client.call(&["REPLICATION"]) else { return lag };
                let number = |row: &Reply, key| row.field(key).and_then(Reply::int).unwrap_or(0).max(0) as u64;
                let behind = rows.items().iter().map(|row| (number(row, "lag_bytes"), number(row, "lag_us"))).min();
                if let Some((bytes, us)) = behind {
                    lag.samples += 1;
                    lag.bytes_max = lag.bytes_max.max(bytes);
                    lag.seconds_max = lag.seconds_max.max(us as f64 / 1e6);
                }
                std::thread::sleep(Duration::from_millis(LAG_LOOK_MS).saturating_sub(began.elapsed()));
            }
            lag
        });
        let done = work();
        ended.store(true, Ordering::Relaxed);
        let lag = watching.join().map_err(|_| Failure::failed("the watch on the lag panicked"))?;
        Ok((done?, Some(lag).filter(|lag| lag.samples > 0)))
    })
}
