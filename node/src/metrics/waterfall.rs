//! Where a commit's time goes: samples of commits, followed by their position in the log through every stage, and their
//! histograms. A core: the node tells it how far each stage has reached and when; it decides nothing for the node.
//!
//! ```text
//! begin ─ frame_wait ─┬─ local_queue ─ local_flush ─ local_apply ───────────────────────────────┬─ reply
//!                     └─ hand_over ─ network_out ─ replica_write ─ _flush ─ _apply ─ network_back ┘
//! ```
//!
//! The two branches run side by side; the one that ends later is the critical one. No clock is compared across machines: a
//! replica says how long it had the frame, the leader subtracts that from the time between its send and the acknowledgement,
//! and what is left is the network, halved into its two directions.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use walferry_cluster::level::CommitLevel;
use walferry_cluster::message::Traced;
use walferry_engine::lsn::Lsn;

/// Samples that are followed at once; while there are so many, no further commit is sampled.
const SAMPLES_MAX: usize = 256;
/// Turns whose commits at one level were not answered; those of further turns count with the last one.
const PENDING_MAX: usize = 1024;
/// Replicas of which one sample keeps times.
const REPLICAS_MAX: usize = 64;
/// Commits that are sampled in a second, about; above it one in N.
const SAMPLES_PER_S_MAX: u64 = 2_000;
/// How often N is adapted.
const ADAPT_INTERVAL: Duration = Duration::from_secs(1);
/// How long an answered sample waits for its replica's durations.
const TRACE_WAIT_MAX: Duration = Duration::from_secs(5);
/// The longest duration that is told apart, microseconds; longer ones count as this.
const DURATION_US_MAX: u64 = 60_000_000;
/// Decimal digits that the histograms keep.
const PRECISION: u8 = 3;
/// The same for accounting that is off and records nothing: its 60 histograms would take 8 MiB.
const PRECISION_OFF: u8 = 0;

/// Levels that commits may have.
pub const LEVELS: [CommitLevel; 5] = CommitLevel::ALL;

/// How far each level is, by the order of [`LEVELS`].
#[derive(Clone, Copy, Debug)]
pub struct LevelsReached {
    /// Replies of commits up to here are handed to their sockets.
    pub released: [Lsn; LEVELS.len()],
    /// What the level promises holds up to here. A leader that degrades releases more than that.
    pub met: [Lsn; LEVELS.len()],
}

impl LevelsReached {
    /// What was met of `level` by a commit that ends at `lsn`.
    fn met(&self, level: CommitLevel, lsn: Lsn) -> CommitLevel {
        level.met(lsn, |lower| self.met[lower as usize])
    }
}

/// The stages of a commit, in the order of its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// From execution until its frame is sealed.
    FrameWait,
    /// Until the frame's write is handed to the disk.
    LocalQueue,
    /// Until it is durable here.
    LocalFlush,
    /// Until readers here see it.
    LocalApply,
    /// From the end of its frame until the socket has taken it.
    HandOver,
    /// On the way to the replica.
    NetworkOut,
    /// Until the replica's disk was given it.
    ReplicaWrite,
    /// Until it is durable there.
    ReplicaFlush,
    /// Until readers there see it; waiting for word that it is durable here included.
    ReplicaApply,
    /// The acknowledgement's way back.
    NetworkBack,
    /// From the end of the later branch until the reply is handed to the socket.
    Reply,
}

/// Which part of the way a stage belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Branch {
    /// Before the branches.
    Start,
    /// This node's disk and store.
    Local,
    /// The replica that the commit was released by.
    Remote,
    /// After them.
    End,
}

impl Stage {
    /// Every stage.
    pub const ALL: [Stage; 11] = {
        use Stage::*;
        [
            FrameWait,
            LocalQueue,
            LocalFlush,
            LocalApply,
            HandOver,
            NetworkOut,
            ReplicaWrite,
            ReplicaFlush,
            ReplicaApply,
            NetworkBack,
            Reply,
        ]
    };

    /// The name in output.
    pub fn name(self) -> &'static str {
        match self {
            Stage::FrameWait => "frame_wait",
            Stage::LocalQueue => "local_queue",
            Stage::LocalFlush => "local_flush",
            Stage::LocalApply => "local_apply",
            Stage::HandOver => "hand_over",
            Stage::NetworkOut => "network_out",
            Stage::ReplicaWrite => "replica_write",
            Stage::ReplicaFlush => "replica_flush",
            Stage::ReplicaApply => "replica_apply",
            Stage::NetworkBack => "network_back",
            Stage::Reply => "reply",
        }
    }

    /// Where it belongs.
    pub fn branch(self) -> Branch {
        match self {
            Stage::FrameWait => Branch::Start,
            Stage::LocalQueue | Stage::LocalFlush | Stage::LocalApply => Branch::Local,
            Stage::Reply => Branch::End,
            _ => Branch::Remote,
        }
    }
}

impl Branch {
    /// The name in output.
    pub fn name(self) -> &'static str {
        match self {
            Branch::Start => "start",
            Branch::Local => "local",
            Branch::Remote => "remote",
            Branch::End => "end",
        }
    }
}

/// A step of a commit on this node, for [`Waterfall::reached`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Its frame is sealed.
    Sealed,
    /// Its write was submitted.
    Submitted,
    /// The frame is durable on the leader.
    Flushed,
    /// It is in the store.
    Applied,
}

const STEPS: usize = 4;

/// How far a replica is with a commit, by its acknowledgements; for [`Waterfall::replica_reached`].
#[derive(Clone, Copy, Debug, Default)]
pub struct ReplicaReached {
    /// Handed to its socket.
    pub sent: Lsn,
    /// Acknowledged as written.
    pub written: Lsn,
    /// Acknowledged as durable.
    pub flushed: Lsn,
    /// Acknowledged as applied.
    pub applied: Lsn,
}

/// When a replica got how far with one sample.
#[derive(Clone, Copy, Debug, Default)]
struct ReplicaTimes {
    sent: Option<Instant>,
    written: Option<Instant>,
    flushed: Option<Instant>,
    applied: Option<Instant>,
    traced: Option<Traced>,
}

impl ReplicaTimes {
    /// When it acknowledged what `level` waits for.
    fn acknowledged(&self, level: CommitLevel) -> Option<Instant> {
        match level {
            CommitLevel::Off | CommitLevel::Local => None,
            CommitLevel::RemoteWrite => self.written,
            CommitLevel::RemoteFlush => self.flushed,
            CommitLevel::RemoteApply => self.applied,
        }
    }
}

/// One commit under way.
#[derive(Clone, Debug)]
struct Sample {
    lsn: Lsn,
    /// That was asked for; once it was answered, that was met.
    level: CommitLevel,
    began: Instant,
    steps: [Option<Instant>; STEPS],
    /// By the number of [`Waterfall::replica`].
    replicas: Vec<ReplicaTimes>,
    /// The replica whose acknowledgement was the last that the release needed.
    decided_by: Option<usize>,
    replied: Option<Instant>,
}

/// What is kept for one level.
#[derive(Clone, Debug)]
pub struct LevelStages {
    /// Commits that met this level since the start or the last reset, sampled or not.
    pub commits: u64,
    /// Samples that are complete.
    pub samples: u64,
    /// Of these, how many waited longest for this node, and for a replica.
    pub critical_local: u64,
    /// See `critical_local`.
    pub critical_remote: u64,
    /// Durable writes of this node's log that are this level's share, by what was asked for.
    pub flushes_share: f64,
    /// From execution to reply, microseconds.
    pub total: Histogram<u64>,
    /// Each stage, microseconds; as in [`Stage::ALL`].
    pub stages: Vec<Histogram<u64>>,
    /// Samples that each replica decided, by its number.
    pub decided: Vec<u64>,
    /// Commits whose flush was not shared out yet.
    unshared: u64,
    /// Commits at this level that were not answered: those of each turn together, up to where the last one ends, ascending.
    pending: VecDeque<(Lsn, u64)>,
    /// Commits of this turn count with the last of `pending`.
    is_open: bool,
}

impl LevelStages {
    fn new(enabled: bool) -> LevelStages {
        let histogram = || histogram(if enabled { PRECISION } else { PRECISION_OFF });
        LevelStages {
            commits: 0,
            samples: 0,
            critical_local: 0,
            critical_remote: 0,
            flushes_share: 0.0,
            total: histogram(),
            stages: Stage::ALL.iter().map(|_| histogram()).collect(),
            decided: Vec::new(),
            unshared: 0,
            pending: VecDeque::new(),
            is_open: false,
        }
    }

    fn begin(&mut self, lsn: Lsn) {
        self.unshared += 1;
        let joins = self.is_open || self.pending.len() == PENDING_MAX;
        match self.pending.back_mut().filter(|_| joins) {
            Some((end, commits)) => (*end, *commits) = (lsn, *commits + 1),
            None => self.pending.push_back((lsn, 1)),
        }
        self.is_open = true;
    }

    fn record(&mut self, stage: Stage, duration: Duration) {
        self.stages[stage as usize].saturating_record(duration.as_micros() as u64);
    }
}

fn histogram(precision: u8) -> Histogram<u64> {
    Histogram::new_with_bounds(1, DURATION_US_MAX, precision).expect("constant bounds that a histogram takes")
}

/// A replica and what it said of its own log.
#[derive(Clone, Debug)]
pub struct ReplicaAccounting {
    /// Its name.
    pub name: String,
    /// Its durable writes since it started.
    pub flushes: u64,
    /// Records in them.
    pub records: u64,
}

/// The accounting of a leader's commits.
#[derive(Debug)]
pub struct Waterfall {
    enabled: bool,
    levels: [LevelStages; LEVELS.len()],
    replicas: Vec<ReplicaAccounting>,
    /// Ascending by position; those that were answered wait for their replica's durations.
    samples: VecDeque<Sample>,
    /// One commit in so many is sampled; at least 1.
    one_in: u64,
    /// Commits until the next sample.
    countdown: u64,
    /// Samples that never got their replica's durations.
    untraced: u64,
    commits_adapted: u64,
    adapted_at: Option<Instant>,
    flushes_seen: u64,
}

impl Waterfall {
    /// Accounting that is off does nothing at all.
    pub fn new(enabled: bool) -> Waterfall {
        Waterfall {
            enabled,
            levels: std::array::from_fn(|_| LevelStages::new(enabled)),
            replicas: Vec::new(),
            samples: VecDeque::with_capacity(SAMPLES_MAX),
            one_in: 1,
            countdown: 0,
            untraced: 0,
            commits_adapted: 0,
            adapted_at: None,
            flushes_seen: 0,
        }
    }

    /// False when the operator turned it off.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Forgets all samples and counts.
    pub fn reset(&mut self) {
        let (one_in, flushes_seen) = (self.one_in, self.flushes_seen);
        *self = Waterfall { one_in, flushes_seen, ..Waterfall::new(self.enabled) };
    }

    /// True while a sample is under way: only then have `reached`, `replica_reached` and `traced` anything to do.
    pub fn is_following(&self) -> bool {
        !self.samples.is_empty()
    }

    /// True while commits were not answered or samples are under way: only then has `replied` anything to do.
    pub fn is_awaiting(&self) -> bool {
        self.is_following() || self.levels.iter().any(|level| !level.pending.is_empty())
    }

    /// A commit at `level` was executed and ends at `lsn`. True when it is sampled; then it began at `now()`.
    pub fn begin(&mut self, lsn: Lsn, level: CommitLevel, now: impl FnOnce() -> Instant) -> bool {
        if !self.enabled {
            return false;
        }
        self.levels[level as usize].begin(lsn);
        self.commits_adapted += 1;
        if self.countdown > 0 {
            self.countdown -= 1;
            return false;
        }
        if self.samples.len() >= SAMPLES_MAX {
            return false;
        }
        self.countdown = self.one_in - 1;
        self.samples.push_back(Sample {
            lsn,
            level,
            began: now(),
            steps: [None; STEPS],
            replicas: vec![ReplicaTimes::default(); self.replicas.len()],
            decided_by: None,
            replied: None,
        });
        true
    }

    /// This node has reached `up_to` at `step`.
    pub fn reached(&mut self, step: Step, up_to: Lsn, now: Instant) {
        for sample in self.samples.iter_mut().take_while(|sample| sample.lsn <= up_to) {
            sample.steps[step as usize].get_or_insert(now);
        }
    }

    /// The number of a replica; `None` when there are too many.
    fn replica(&mut self, name: &str) -> Option<usize> {
        if let Some(number) = self.replicas.iter().position(|replica| replica.name == name) {
            return Some(number);
        }
        if self.replicas.len() == REPLICAS_MAX {
            return None;
        }
        self.replicas.push(ReplicaAccounting { name: name.to_owned(), flushes: 0, records: 0 });
        for sample in &mut self.samples {
            sample.replicas.push(ReplicaTimes::default());
        }
        Some(self.replicas.len() - 1)
    }

    /// A replica has reached so far: it was sent something by `sent_at`, its acknowledgement arrived at `heard_at`.
    pub fn replica_reached(&mut self, name: &str, reached: ReplicaReached, sent_at: Instant, heard_at: Instant) {
        let Some(number) = self.replica(name) else { return };
        for sample in self.samples.iter_mut().take_while(|sample| sample.lsn <= reached.sent) {
            let times = &mut sample.replicas[number];
            times.sent.get_or_insert(sent_at);
            let positions = [
                (reached.written, &mut times.written),
                (reached.flushed, &mut times.flushed),
                (reached.applied, &mut times.applied),
            ];
            for (position, time) in positions {
                if position >= sample.lsn {
                    time.get_or_insert(heard_at);
                }
            }
        }
    }

    /// A replica told where its time went for the frame that ends at `traced.end`.
    pub fn traced(&mut self, name: &str, traced: Traced) {
        let Some(number) = self.replica(name) else { return };
        let accounting = &mut self.replicas[number];
        (accounting.flushes, accounting.records) = (traced.flushes, traced.records);
        for sample in self.samples.iter_mut().take_while(|sample| sample.lsn <= traced.end) {
            // Frames are answered in order: the first answer at or behind a sample's end is its frame's.
            sample.replicas[number].traced.get_or_insert(traced);
        }
    }

    /// Replies were handed to their sockets, once a turn; `now` is after that. Counts their commits and completes samples.
    pub fn replied(&mut self, reached: &LevelsReached, now: Instant) {
        for level in LEVELS {
            self.levels[level as usize].is_open = false;
            while let Some(&(end, commits)) = self.levels[level as usize].pending.front()
                && end <= reached.released[level as usize]
            {
                self.levels[level as usize].pending.pop_front();
                self.levels[reached.met(level, end) as usize].commits += commits;
            }
        }
        for sample in &mut self.samples {
            if sample.replied.is_none() && reached.released[sample.level as usize] >= sample.lsn {
                sample.replied = Some(now);
                sample.level = reached.met(sample.level, sample.lsn);
                sample.decided_by = latest(&sample.replicas, sample.level);
            }
        }
        let mut at = 0;
        while let Some(sample) = self.samples.get(at) {
            let Some(replied) = sample.replied else {
                at += 1;
                continue;
            };
            let waits = sample.decided_by.is_some_and(|number| sample.replicas[number].traced.is_none());
            let is_durable = sample.level == CommitLevel::Off || sample.steps[Step::Applied as usize].is_some();
            if (waits || !is_durable) && now.saturating_duration_since(replied) < TRACE_WAIT_MAX {
                at += 1;
                continue;
            }
            let sample = self.samples.remove(at).expect("just seen");
            if waits || !is_durable {
                self.untraced += 1;
            } else {
                self.complete(&sample, replied);
            }
        }
    }

    fn complete(&mut self, sample: &Sample, replied: Instant) {
        let stages = &mut self.levels[sample.level as usize];
        let since = |to: Instant, from: Instant| to.saturating_duration_since(from);
        stages.samples += 1;
        stages.total.saturating_record(since(replied, sample.began).as_micros() as u64);
        let [Some(sealed), Some(submitted), Some(flushed), Some(applied)] = sample.steps else {
            // Level off: nobody waited for the disk.
            stages.record(Stage::Reply, since(replied, sample.began));
            return;
        };
        stages.record(Stage::FrameWait, since(sealed, sample.began));
        stages.record(Stage::LocalQueue, since(submitted, sealed));
        stages.record(Stage::LocalFlush, since(flushed, submitted));
        stages.record(Stage::LocalApply, since(applied, flushed));
        let mut end = applied;
        let decided = sample.decided_by.map(|number| (number, sample.replicas[number]));
        if let Some((number, times)) = decided
            && let (Some(sent), Some(heard)) = (times.sent, times.acknowledged(sample.level))
            && let Some(traced) = times.traced
        {
            if stages.decided.len() <= number {
                stages.decided.resize(number + 1, 0);
            }
            stages.decided[number] += 1;
            let us = |us: u32| Duration::from_micros(u64::from(us));
            let (write, flush, apply) = (us(traced.written_us), us(traced.flushed_us), us(traced.applied_us));
            let own = match sample.level {
                CommitLevel::RemoteWrite => write,
                CommitLevel::RemoteFlush => flush,
                _ => apply,
            };
            let network = since(heard, sent).saturating_sub(own);
            stages.record(Stage::HandOver, since(sent, sealed));
            stages.record(Stage::NetworkOut, network / 2);
            stages.record(Stage::ReplicaWrite, write);
            if sample.level >= CommitLevel::RemoteFlush {
                stages.record(Stage::ReplicaFlush, flush - write);
            }
            if sample.level >= CommitLevel::RemoteApply {
                stages.record(Stage::ReplicaApply, apply - flush);
            }
            stages.record(Stage::NetworkBack, network - network / 2);
            end = end.max(heard);
            if heard > applied {
                stages.critical_remote += 1;
            } else {
                stages.critical_local += 1;
            }
        } else {
            stages.critical_local += 1;
        }
        stages.record(Stage::Reply, since(replied, end));
    }

    /// Shares out the durable writes since the last call among the levels of the commits since then, and adapts the sampling
    /// rate; once a turn or less.
    pub fn account(&mut self, flushes: u64, now: Instant) {
        if !self.enabled {
            return;
        }
        let unshared: u64 = self.levels.iter().map(|level| level.unshared).sum();
        let news = flushes.saturating_sub(self.flushes_seen);
        if news > 0 {
            self.flushes_seen = flushes;
            for level in self.levels.iter_mut().filter(|level| level.unshared > 0) {
                level.flushes_share += news as f64 * level.unshared as f64 / unshared as f64;
                level.unshared = 0;
            }
        }
        let adapted_at = *self.adapted_at.get_or_insert(now);
        let elapsed = now.saturating_duration_since(adapted_at);
        if elapsed >= ADAPT_INTERVAL {
            let per_s = (self.commits_adapted as f64 / elapsed.as_secs_f64()) as u64;
            self.one_in = per_s.div_ceil(SAMPLES_PER_S_MAX).max(1);
            self.countdown = self.countdown.min(self.one_in);
            (self.commits_adapted, self.adapted_at) = (0, Some(now));
        }
    }

    /// Commits that were not answered are given up: the node no longer leads.
    pub fn abandon(&mut self) {
        self.samples.clear();
        self.levels.iter_mut().for_each(|level| level.pending.clear());
    }

    /// One commit in so many is sampled.
    pub fn one_in(&self) -> u64 {
        self.one_in
    }

    /// Samples whose replica never told its durations.
    pub fn untraced(&self) -> u64 {
        self.untraced
    }

    /// What is known of each level.
    pub fn levels(&self) -> impl Iterator<Item = (CommitLevel, &LevelStages)> {
        LEVELS.into_iter().zip(&self.levels)
    }

    /// The replicas, by the numbers of `LevelStages::decided`.
    pub fn replicas(&self) -> &[ReplicaAccounting] {
        &self.replicas
    }
}

/// The replica that acknowledged `level` last.
fn latest(replicas: &[ReplicaTimes], level: CommitLevel) -> Option<usize> {
    let acknowledged = |(number, times): (usize, &ReplicaTimes)| times.acknowledged(level).map(|at| (at, number));
    replicas.iter().enumerate().filter_map(acknowledged).max().map(|(_, number)| number)
}

#[cfg(test)]
#[path = "waterfall_tests.rs"]
mod tests;
