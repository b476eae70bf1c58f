//! The drill's load: writers of unique values on a fixed schedule at each commit level, which follow the leader, and a list of
//! everything that was acknowledged. A writer that cannot write misses its times; the schedule does not wait for it.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use walferry_cluster::level::CommitLevel;

use super::cluster::Cluster;
use super::outage::{longest_gap, quantile};
use super::watch::Seen;
use crate::client::{Client, ClientError, Reply, Url};
use crate::failure::Failure;
use crate::load::route::{Refused, Route, refusal};

/// The levels that are written at.
pub const LEVELS: [CommitLevel; 4] =
    [CommitLevel::Off, CommitLevel::Local, CommitLevel::RemoteFlush, CommitLevel::RemoteApply];
/// Writers of each level; with few of them the moment at which writes come back would be coarse.
const WRITERS: u32 = 4;
/// A node that does not answer a write for so long is left for another.
pub const ANSWER_TIME_MAX: Duration = Duration::from_millis(400);
/// Between two attempts to find a node that takes writes.
pub const RETRY_PAUSE: Duration = Duration::from_millis(5);
/// Keys that are looked for with one command.
const KEYS_AT_ONCE: usize = 500;

/// What was acknowledged at one level, in order.
#[derive(Debug, Default)]
struct Acknowledged {
    keys: Vec<String>,
    at: Vec<Instant>,
    acks: Vec<Ack>,
}

/// Who acknowledged a key, and how long it took.
#[derive(Clone, Copy, Debug)]
struct Ack {
    by: SocketAddr,
    took: Duration,
}

#[derive(Debug, Default)]
struct Shared {
    levels: [Mutex<Acknowledged>; LEVELS.len()],
    stop: AtomicBool,
}

/// How much was acknowledged at a moment.
#[derive(Clone, Debug)]
pub struct MarkedAt([usize; LEVELS.len()]);

/// The running load.
pub struct Load {
    shared: Arc<Shared>,
    writers: Vec<JoinHandle<()>>,
}

/// What became of the commits of one level.
#[derive(Clone, Debug)]
pub struct Loss {
    /// The level.
    pub level: CommitLevel,
    /// Number of acknowledged writes.
    pub acknowledged: usize,
    /// Those that are not there any more.
    pub lost: Vec<String>,
    /// So many could have been lost by what the replicas lacked when their leader was last heard.
    pub bound: usize,
}

/// At each level.
pub type Losses = Vec<Loss>;

impl Load {
    /// Starts `rate` writes a second at each level. Keys begin with `run`.
    pub fn start(route: &Arc<Route>, rate: u32, run: &str) -> Load {
        let shared = Arc::new(Shared::default());
        let interval = Duration::from_secs(1) * WRITERS / rate;
        let start = Instant::now();
        let writers = (0..LEVELS.len() as u32 * WRITERS).map(|number| {
            let (shared, route, run) = (Arc::clone(&shared), Arc::clone(route), run.to_owned());
            let level = number as usize / WRITERS as usize;
            // The writers take turns within an interval.
            let first = start + interval * (number % WRITERS) / WRITERS;
            let writer = Writer { shared, route, level, keys: format!("{run}:{}:{number}", LEVELS[level]) };
            std::thread::spawn(move || writer.run(first, interval))
        });
        Load { writers: writers.collect(), shared }
    }

    /// How much was acknowledged until now.
    pub fn mark(&self) -> MarkedAt {
        MarkedAt(std::array::from_fn(|level| self.level(level).keys.len()))
    }

    fn level(&self, level: usize) -> std::sync::MutexGuard<'_, Acknowledged> {
        self.shared.levels[level].lock().expect("a writer does not panic with it")
    }

    /// The longest time without an acknowledgement at `level` since `from`.
    pub fn outage(&self, level: CommitLevel, from: Instant) -> Duration {
        let index = LEVELS.iter().position(|known| *known == level).expect("a level of the load");
        longest_gap(&self.level(index).at, from, Instant::now())
    }

    /// Waits until every level has been acknowledged after `from`.
    pub fn wait_for_writes(&self, from: Instant, time_max: Duration) -> Result<(), String> {
        let deadline = Instant::now() + time_max;
        for (index, level) in LEVELS.iter().enumerate() {
            while self.level(index).at.last().is_none_or(|at| *at <= from) {
                if Instant::now() > deadline {
                    return Err(format!("no write at {level} was acknowledged within {time_max:?}"));
                }
                std::thread::sleep(RETRY_PAUSE);
            }
        }
        Ok(())
    }

    /// The latency at `share` of the acknowledgements at `level` that came between two moments.
    pub fn latency(&self, level: CommitLevel, share: f64, from: Instant, to: Instant) -> Option<Duration> {
        let index = LEVELS.iter().position(|known| *known == level).expect("a level of the load");
        let acknowledged = self.level(index);
        let range = acknowledged.at.partition_point(|at| *at < from)..acknowledged.at.partition_point(|at| *at < to);
        let mut took: Vec<Duration> = acknowledged.acks[range].iter().map(|ack| ack.took).collect();
        quantile(&mut took, share)
    }

    /// What of that which was acknowledged since `before` the leader does not have.
    pub fn lost(&self, cluster: &Cluster, before: &MarkedAt, seen: &Seen) -> Result<Losses, Failure> {
        let mut losses = Vec::new();
        for (index, level) in LEVELS.iter().enumerate() {
            let (keys, bound) = {
                let acknowledged = self.level(index);
                let range = before.0[index]..acknowledged.keys.len();
                let each = acknowledged.at[range.clone()].iter().zip(&acknowledged.acks[range.clone()]);
                let bound = each.filter(|(at, ack)| !seen.held(ack.by, **at)).count();
                (acknowledged.keys[range].to_vec(), bound)
            };
            losses.push((*level, keys, bound));
        }
        let mut client = cluster.leader_client()?;
        commit_last(&mut client)?;
        let loss = |(level, keys, bound): (CommitLevel, Vec<String>, usize)| {
            let lost = missing(&mut client, &keys)?;
            Ok(Loss { level, acknowledged: keys.len(), lost, bound })
        };
        losses.into_iter().map(loss).collect()
    }

    /// Ends the load; every key that was acknowledged, by level.
    pub fn finish(self) -> Vec<(CommitLevel, Vec<String>)> {
        self.shared.stop.store(true, Ordering::Relaxed);
        for writer in self.writers {
            // A writer that panicked has said so; what it acknowledged counts all the same.
            let _ = writer.join();
        }
        let take = |(index, level): (usize, &CommitLevel)| {
            let mut acknowledged = self.shared.levels[index].lock().expect("the writers are gone");
            (*level, std::mem::take(&mut acknowledged.keys))
        };
        LEVELS.iter().enumerate().map(take).collect()
    }
}

/// Waits until everything that the leader has acknowledged can be read there: what it answered at `off` becomes visible
/// when it is durable, and a later commit at `local` is after that.
pub fn commit_last(client: &mut Client) -> Result<(), Failure> {
    client.call(&["COMMITLEVEL", CommitLevel::Local.name()]).map_err(Failure::failed)?;
    client.call(&["SET", "drill:last", "1"]).map_err(Failure::failed).map(drop)
}

/// Those of the keys that are not there.
pub fn missing(client: &mut Client, keys: &[String]) -> Result<Vec<String>, Failure> {
    let mut lost = Vec::new();
    for chunk in keys.chunks(KEYS_AT_ONCE) {
        let words: Vec<&str> = ["MGET"].into_iter().chain(chunk.iter().map(String::as_str)).collect();
        let answer = client.call(&words).map_err(Failure::failed)?;
        let values = answer.items().iter().zip(chunk);
        lost.extend(values.filter(|(value, _)| **value == Reply::Nil).map(|(_, key)| key.clone()));
    }
    Ok(lost)
}

struct Writer {
    shared: Arc<Shared>,
    route: Arc<Route>,
    level: usize,
    /// What its keys begin with.
    keys: String,
}

impl Writer {
    fn run(&self, first: Instant, interval: Duration) {
        let Writer { shared, route, level, .. } = self;
        let (mut due, mut count) = (first, 0_u64);
        let mut connection: Option<(SocketAddr, Client)> = None;
        while !shared.stop.load(Ordering::Relaxed) {
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            // Times that were missed stay missed: the load is a stream of scans at a gate, not a queue.
            due = (due + interval).max(Instant::now());
            let Some((address, client)) = &mut connection else {
                connection = connect(route, LEVELS[*level]);
                if connection.is_none() {
                    std::thread::sleep(RETRY_PAUSE);
                }
                continue;
            };
            count += 1;
            let key = format!("{}:{count}", self.keys);
            let asked = Instant::now();
            match client.call(&["SET", &key, &key]) {
                Ok(_) => {
                    let mut acknowledged = shared.levels[*level].lock().expect("nobody panics with it");
                    let now = Instant::now();
                    acknowledged.keys.push(key);
                    acknowledged.at.push(now);
                    acknowledged.acks.push(Ack { by: *address, took: now - asked });
                }
                Err(error) => {
                    match refused(&error) {
                        Some(Refused::Moved(leader)) => route.moved(leader),
                        _ => route.leave(*address),
                    }
                    connection = None;
                }
            }
        }
    }
}

/// What an error says of the way to the leader.
pub fn refused(error: &ClientError) -> Option<Refused> {
    match error {
        ClientError::Refused { text, .. } => refusal(text),
        _ => None,
    }
}

/// A connection to the node that leads, as far as is known.
pub fn connect(route: &Route, level: CommitLevel) -> Option<(SocketAddr, Client)> {
    let address = route.current();
    let open = || {
        let url: Url = format!("redis://{address}").parse().ok()?;
        let mut client = Client::connect_within(&url, ANSWER_TIME_MAX).ok()?;
        client.call(&["COMMITLEVEL", level.name()]).ok()?;
        Some((address, client))
    };
    let opened = open();
    if opened.is_none() {
        route.leave(address);
    }
    opened
}
