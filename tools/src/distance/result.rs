//! What was measured, and what follows from it by arithmetic alone. Filled by `measure`, read by the table, the page and the
//! model; this is also the JSON.

use serde::Serialize;
use serde_json::Value;
use walferry_cluster::CommitLevel;

use crate::link::Rtt;
use crate::load::Summary;

/// A number of clients saturates when more clients add less than this share.
const SATURATED_SHARE: f64 = 0.9;

/// Everything that one `walferry distance` found.
#[derive(Debug, Serialize)]
pub struct Report {
    /// What it was measured on.
    pub machine: Machine,
    /// How the distance was made: `proxy`, `tun`, `netem`, or `none` for nodes that already ran.
    pub link: String,
    /// Replicas behind the link.
    pub replicas: usize,
    /// Which of them a remote commit waits for.
    pub sync: String,
    /// Bytes of each commit's payload.
    pub payload_bytes: usize,
    /// By distance.
    pub profiles: Vec<ProfileResult>,
    /// What the model says of distances, measured ones and others.
    pub model: Vec<super::model::Prediction>,
    /// True if Ctrl-C ended it early.
    pub interrupted: bool,
}

/// Facts that figures depend on.
#[derive(Debug, Serialize)]
pub struct Machine {
    /// Kernel release.
    pub kernel: String,
    /// Processors that this process may use.
    pub cpus: usize,
    /// Their model.
    pub cpu: String,
    /// This program.
    pub version: &'static str,
}

impl Machine {
    /// This one.
    pub fn here() -> Machine {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let info = read("/proc/cpuinfo");
        let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        Machine {
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            cpu: model.map_or("unknown", |(_, name)| name).to_owned(),
            version: env!("CARGO_PKG_VERSION"),
        }
    }
}

/// One distance.
#[derive(Debug, Serialize)]
pub struct ProfileResult {
    /// Its name.
    pub name: String,
    /// The measured round trip.
    pub rtt: Rtt,
    /// Levels and clients, in the order they were measured.
    pub points: Vec<Point>,
    /// For each level, the clients that saturate.
    pub saturation: Vec<Saturation>,
    /// For each level, what a failover would lose.
    pub losses: Vec<Loss>,
    /// Which level for which data.
    pub rule: Vec<String>,
}

/// One run of the load.
#[derive(Debug, Serialize)]
pub struct Point {
    /// Commit level.
    pub level: Level,
    /// Clients.
    pub clients: usize,
    /// Transactions a second that were asked for; none is a closed loop.
    pub rate: Option<f64>,
    /// What came of it.
    pub load: Summary,
    /// p50 over that of `local` with as many clients, milliseconds.
    pub over_local_ms: Option<f64>,
    /// p50 over the measured round trip, milliseconds; for levels that cross it.
    pub over_rtt_ms: Option<f64>,
    /// Records in a flush of the leader, mean.
    pub records_per_flush: Option<f64>,
    /// What `WATERFALL` answered after it, for this level.
    pub waterfall: Value,
    /// What replicas had not applied meanwhile, at most.
    pub lag: Option<Lag>,
    /// The distributions of the stages in microseconds: what the model draws from.
    #[serde(skip)]
    pub stages: super::model::Stages,
}

/// A commit level that prints as its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Level(pub CommitLevel);

impl Level {
    /// True if a commit crosses the link before it is answered.
    pub fn is_remote(self) -> bool {
        self.0 > CommitLevel::Local
    }
}

impl std::fmt::Display for Level {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&self.0.to_string())
    }
}

impl Serialize for Level {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// How far replicas were behind.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Lag {
    /// Looks at it.
    pub samples: u64,
    /// The most bytes that any look found missing on the replica that was furthest ahead.
    pub bytes_max: u64,
    /// The longest that the oldest of them had waited, seconds.
    pub seconds_max: f64,
}

/// Clients that saturate a level.
#[derive(Debug, Serialize)]
pub struct Saturation {
    /// Commit level.
    pub level: Level,
    /// The most commits a second that any number of clients reached at this distance.
    pub tps_max: f64,
    /// The most that this level reached at any distance: what node and disk can do.
    pub capacity_tps: f64,
    /// Clients that Little's law asks for to fill the capacity: capacity times the latency of one client.
    pub littles_law: f64,
    /// The smallest measured number of clients that reached nine tenths of `tps_max`.
    pub measured: usize,
    /// False if the most clients that were tried still gained: more would reach more.
    pub is_reached: bool,
}

/// What is lost of acknowledged commits when the leader dies for good.
#[derive(Debug, Serialize)]
pub struct Loss {
    /// Commit level.
    pub level: Level,
    /// The largest measured lag; none for levels that wait for a replica: nothing is lost.
    pub at_most: Option<Lag>,
}

impl ProfileResult {
    /// The closed-loop run of this level with so many clients.
    pub fn point(&self, level: Level, clients: usize) -> Option<&Point> {
        self.closed().find(|point| point.level == level && point.clients == clients)
    }

    /// Every closed-loop run.
    pub fn closed(&self) -> impl Iterator<Item = &Point> {
        self.points.iter().filter(|point| point.rate.is_none())
    }

    /// The levels that were measured, the weakest first.
    pub fn levels(&self) -> Vec<Level> {
        let mut levels: Vec<Level> = self.points.iter().map(|point| point.level).collect();
        levels.sort();
        levels.dedup();
        levels
    }

    /// The fewest clients that were tried.
    pub fn fewest_clients(&self) -> usize {
        self.points.iter().map(|point| point.clients).min().unwrap_or(1)
    }

    /// Fills in what follows from the points of this distance.
    pub fn derive(&mut self) {
        let rtt_ms = self.rtt.p50_us / 1e3;
        let local: Vec<(usize, f64)> = self
            .closed()
            .filter(|point| point.level.0 == CommitLevel::Local)
            .map(|point| (point.clients, point.load.latency_ms.p50))
            .collect();
        for point in &mut self.points {
            let p50 = point.load.latency_ms.p50;
            let local = local.iter().find(|(clients, _)| *clients == point.clients && point.rate.is_none());
            point.over_local_ms = local.map(|(_, local)| p50 - local);
            point.over_rtt_ms = point.level.is_remote().then_some(p50 - rtt_ms);
        }
        self.losses = self.levels().into_iter().map(|level| self.loss(level)).collect();
        self.rule = super::rule::rule(self);
    }

    fn loss(&self, level: Level) -> Loss {
        let lags = self.points.iter().filter(|point| point.level == level).filter_map(|point| point.lag);
        let worst = lags.reduce(|a, b| Lag {
            samples: a.samples + b.samples,
            bytes_max: a.bytes_max.max(b.bytes_max),
            seconds_max: a.seconds_max.max(b.seconds_max),
        });
        Loss { level, at_most: worst.filter(|_| !level.is_remote()) }
    }
}

/// Fills in what follows from all distances together.
pub fn saturate(profiles: &mut [ProfileResult]) {
    let best = |profile: &ProfileResult, level: Level| {
        profile.closed().filter(|point| point.level == level).map(|point| point.load.tps).fold(0.0, f64::max)
    };
    let capacity = |profiles: &[ProfileResult], level| profiles.iter().map(|p| best(p, level)).fold(0.0, f64::max);
    for index in 0..profiles.len() {
        let levels = profiles[index].levels();
        let found = levels.into_iter().filter_map(|level| {
            let capacity_tps = capacity(profiles, level);
            let profile = &profiles[index];
            let tps_max = best(profile, level);
            let alone = profile.point(level, profile.fewest_clients())?;
            let enough = |point: &&Point| point.level == level && point.load.tps >= SATURATED_SHARE * tps_max;
            let measured = profile.closed().filter(enough).map(|point| point.clients).min()?;
            let most = profile.closed().map(|point| point.clients).max()?;
            let littles_law = capacity_tps * alone.load.latency_ms.p50 / 1e3;
            Some(Saturation { level, tps_max, capacity_tps, littles_law, measured, is_reached: measured < most })
        });
        let found = found.collect();
        profiles[index].saturation = found;
    }
}
