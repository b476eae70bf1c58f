//! A worker of `walferry demo warehouse`: scans a package, looks at the dashboard, and scans again if the package is not shown.
//! Knows three ways to write and to look; starts no node.

use std::time::{Duration, Instant};

use walferry_client::{Client, Cluster, CommitLevel, Route, Session, Url};

use crate::failure::Failure;

/// How the warehouse writes and reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Commits at `local`; the dashboard reads any replica.
    NoTokens,
    /// Commits at `local`; the worker's session reads any replica that has what it wrote.
    OwnWrites,
    /// Commits at `remote_apply`; the dashboard reads any replica.
    RemoteApply,
}

impl Way {
    /// In the order in which they are tried.
    pub const ALL: [Way; 3] = [Way::NoTokens, Way::OwnWrites, Way::RemoteApply];

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Way::NoTokens => "no tokens",
            Way::OwnWrites => "read your own writes",
            Way::RemoteApply => "remote_apply",
        }
    }

    /// For keys and for JSON.
    pub fn key(self) -> &'static str {
        match self {
            Way::NoTokens => "no_tokens",
            Way::OwnWrites => "read_your_own_writes",
            Way::RemoteApply => "remote_apply",
        }
    }
}

/// Where the nodes are.
#[derive(Clone, Debug)]
pub struct Places {
    /// The leader.
    pub leader: Url,
    /// The replicas.
    pub replicas: Vec<Url>,
}

/// What one worker did.
#[derive(Debug, Default)]
pub struct Work {
    /// How long each first scan of a package took.
    pub scans: Vec<Duration>,
    /// How long each look took.
    pub looks: Vec<Duration>,
    /// Packages that were scanned again because they were not shown.
    pub duplicates: usize,
    /// Looks that the leader answered.
    pub by_leader: usize,
}

/// Connections as an application without sessions has them.
struct Plain {
    leader: Client,
    replicas: Vec<Client>,
    turn: usize,
}

enum Hands {
    Plain(Plain),
    Session { session: Box<Session>, leader: String },
}

/// A package's events.
pub fn key(way: Way, package: usize) -> String {
    format!("package:{}:{package}", way.key())
}

/// Scans these packages, one after the other.
pub fn work(
    way: Way,
    places: &Places,
    answer_time_max: Duration,
    cluster: &Cluster,
    packages: impl Iterator<Item = usize>,
) -> Result<Work, Failure> {
    let mut hands = Hands::new(way, places, answer_time_max, cluster)?;
    let mut work = Work::default();
    for package in packages {
        let key = key(way, package);
        let begun = Instant::now();
        hands.scan(&key)?;
        let scanned = Instant::now();
        let (shown, by_leader) = hands.look(&key)?;
        work.looks.push(scanned.elapsed());
        work.scans.push(scanned - begun);
        work.by_leader += usize::from(by_leader);
        if !shown {
            // As people do: it did not take, once more.
            hands.scan(&key)?;
            work.duplicates += 1;
        }
    }
    Ok(work)
}

impl Hands {
    fn new(way: Way, places: &Places, answer_time_max: Duration, cluster: &Cluster) -> Result<Hands, Failure> {
        if way == Way::OwnWrites {
            let mut session = Session::new(cluster);
            session.options.commit_level = Some(CommitLevel::Local);
            return Ok(Hands::Session { session: Box::new(session), leader: places.leader.address() });
        }
        let level = if way == Way::RemoteApply { CommitLevel::RemoteApply } else { CommitLevel::Local };
        let mut leader = Client::connect(&places.leader).map_err(Failure::failed)?;
        leader.set_answer_time_max(answer_time_max).map_err(Failure::failed)?;
        leader.call(&["COMMITLEVEL", level.name()]).map_err(Failure::failed)?;
        let replicas: Result<Vec<Client>, _> = places.replicas.iter().map(Client::connect).collect();
        Ok(Hands::Plain(Plain { leader, replicas: replicas.map_err(Failure::failed)?, turn: 0 }))
    }

    fn scan(&mut self, key: &str) -> Result<(), Failure> {
        let command = ["XADD", key, "*", "event", "scanned"];
        match self {
            Hands::Plain(plain) => plain.leader.call(&command).map(drop).map_err(Failure::failed),
            Hands::Session { session, .. } => session.write(&command).map(drop).map_err(Failure::failed),
        }
    }

    /// Whether the dashboard shows the package, and whether it was the leader that was asked in the end.
    fn look(&mut self, key: &str) -> Result<(bool, bool), Failure> {
        let command = ["XLEN", key];
        let (reply, by_leader) = match self {
            Hands::Plain(plain) => {
                plain.turn = (plain.turn + 1) % plain.replicas.len();
                (plain.replicas[plain.turn].call(&command).map_err(Failure::failed)?, false)
            }
            Hands::Session { session, leader } => {
                let reply = session.read(Route::Replica, &command).map_err(Failure::failed)?;
                (reply, session.answered_by() == Some(leader))
            }
        };
        let count = reply.int().ok_or_else(|| Failure::failed(format_args!("XLEN {key} answered {reply:?}")))?;
        Ok((count > 0, by_leader))
    }
}
