//! What a client session may ask of its node, and nothing else. The node implements it over the real log, store and links;
//! the session tests implement it over a real store without any log. Knows no socket, no ring and no thread.
//!
//! The node's duties towards its sessions, once a turn of its loop:
//!
//! 1. input arrived: `Session::handle_input` (only while `Session::wants_input`);
//! 2. a level reached an LSN that a session holds replies for: `Session::release`;
//! 3. what a parked session waits for may have come: `Session::resume` (a needless call does no harm);
//! 4. `Session::deadline` has passed: `Session::resume`;
//! 5. the node stopped answering commits: `Session::abandon`;
//! 6. `Session::has_yielded` after any of these: `Session::go_on` in the next turn, which comes at once;
//! 7. send `Session::output`; once it was taken and `Session::can_go_on`: `Session::resume`; close after the last byte once
//!    `Session::closing`, and `Host::unpark` a session that is gone.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use walferry_applier::pending::Pending;
use walferry_applier::record::StreamId;
use walferry_applier::store::{KeyCount, Store, StoreError};
use walferry_cluster::MemberName;
use walferry_cluster::level::CommitLevel;
use walferry_engine::epoch::EpochHistory;
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_shipper::status::SlotStatus;

use crate::clients::limits::ClientCounts;
use crate::clients::list::{ClientAsk, ClientReply};
use crate::cluster::{Command, Reply};
use crate::repair::RepairCount;
use crate::session::id::SessionId;
use crate::session::reading::Strong;
use crate::users::login::Job;
use crate::watchdog::Turns;

/// Why the node does not take a commit. Nothing of it is in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The log's buffer is full for the moment: park (`Wait::LogSpace`) and try the command again.
    Busy,
    /// This node is a replica; the address for clients of the leader, when known.
    ReadOnly {
        /// `HOST:PORT`.
        leader: Option<String>,
    },
    /// This member of a cluster does not lead; where clients of the leader go.
    Moved {
        /// `HOST:PORT`.
        leader: String,
    },
    /// The cluster has no leader for this node at the moment; what is awaited.
    NoLeader(String),
    /// The disk is full.
    NoSpace(String),
    /// Too few replicas are in sync for the session's commit level, or no replica has to confirm it.
    NoReplicas(String),
    /// The record does not fit into a frame.
    TooLarge(String),
    /// The log is stopped for good.
    Stopped(String),
}

/// Counting keys goes on for so long at most, as they may change faster than they are counted; DBSIZE answers with an estimate then.
pub const COUNT_TIME_MAX: Duration = Duration::from_secs(1);

/// What a parked session waits for. One wait a session at a time; the node forgets it when it calls `Session::resume`,
/// and the session asks again when it has to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wait {
    /// The log can take records again.
    LogSpace,
    /// `Host::applied` has reached this LSN.
    Applied(Lsn),
    /// `Host::applied` has reached this LSN, or the node's role or epoch changed: what was seen may be lost.
    Floor(Lsn),
    /// The node's state became newer, or its role or epoch changed.
    Fresh,
    /// A replica acknowledged something, or `Host::flushed` moved.
    Acknowledged,
    /// An entry was applied to one of these streams, named by the hashes of their keys, behind this id. Or the node's role or epoch
    /// changed.
    Streams(Vec<(u64, StreamId)>),
    /// The store's keys are counted, or `Host::applied` moved.
    Counted,
    /// The cluster answered an operator's command.
    Cluster,
    /// What was asked of all connections is answered.
    Clients,
    /// The password is compared.
    Login,
}

/// How far a replica is with a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Durable in the replica's log.
    Flushed,
    /// Visible to the replica's readers.
    Applied,
}

/// One row of `REPLICATION`, as in `pg_stat_replication`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReplicationRow {
    /// The replica's name.
    pub name: String,
    /// The replica's address.
    pub address: String,
    /// `probe`, `catchup`, `streaming`, `disconnected` or `lost`.
    pub state: String,
    /// What was handed to the replica's socket.
    pub sent: Lsn,
    /// What the replica has written.
    pub written: Lsn,
    /// What the replica has made durable.
    pub flushed: Lsn,
    /// What the replica's readers see.
    pub applied: Lsn,
    /// Bytes of the leader's log that the replica has not applied.
    pub lag_bytes: u64,
    /// For how long the oldest of those bytes has been waiting, microseconds.
    pub lag_us: u64,
    /// `sync`, `potential`, `quorum` or `async`.
    pub sync_state: String,
    /// Member of the in-sync set.
    pub in_sync: bool,
}

/// What one replica has done for a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaEvidence {
    /// The replica's name.
    pub name: String,
    /// The highest level at which it confirmed the commit.
    pub level: CommitLevel,
}

/// The evidence behind an acknowledgement.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Evidence {
    /// Every connected replica that has confirmed the commit at some level.
    pub replicas: Vec<ReplicaEvidence>,
    /// Named durations of the commit's stages, microseconds, in the order of the path.
    pub stages_us: Vec<(&'static str, u64)>,
}

/// What the node is for its clients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NodeRole {
    /// It takes writes: the only role that INFO, ROLE and HELLO call master.
    #[default]
    Leader,
    /// It led, and no majority of the members confirms that it still does.
    LeaderWithoutLease,
    /// It follows a leader.
    Replica,
    /// A member of a cluster that has no leader for it.
    Leaderless,
    /// It led or followed until its log failed or a newer leader appeared.
    SteppedDown,
}

impl std::fmt::Display for NodeRole {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            NodeRole::Leader => "leader",
            NodeRole::LeaderWithoutLease => "leader without lease",
            NodeRole::Replica => "replica",
            NodeRole::Leaderless => "leaderless",
            NodeRole::SteppedDown => "stepped down",
        })
    }
}

/// What INFO and ROLE tell of the node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeFacts {
    /// The node's name.
    pub name: String,
    /// The cluster's id as text.
    pub cluster_id: String,
    /// The epoch that the node is in.
    pub epoch: Epoch,
    /// What it is.
    pub role: NodeRole,
    /// `None` exactly on a leader that takes writes.
    pub following: Option<Following>,
    /// The port for clients.
    pub port: u16,
    /// Since when the node runs, seconds.
    pub uptime_s: u64,
    /// Client connections.
    pub clients: ClientCounts,
    /// What of its data was damaged and is whole again.
    pub repairs: RepairCount,
    /// How long the turns of its loop took.
    pub turns: Turns,
    /// Lines of its log that were lost.
    pub lost_lines: u64,
    /// Commands executed by all sessions since the start.
    pub commands: u64,
    /// The end of the log, its open frame included.
    pub end: Lsn,
    /// Handed to the disk.
    pub written: Lsn,
    /// Durable.
    pub flushed: Lsn,
    /// In the store.
    pub applied: Lsn,
    /// Confirmed by the sync policy.
    pub committed: Lsn,
    /// What was durable on the leader so long ago is applied here; `None` when the node cannot say.
    pub staleness: Option<Duration>,
    /// The node's commit level.
    pub commit_level: String,
    /// The node's sync policy; empty for none.
    pub sync_policy: String,
    /// Why the node is not what it should be (degraded, stopped, no space); empty when all is well.
    pub blocked_reason: String,
}

/// The leader as a node knows it that takes no writes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Following {
    /// The host of the leader's address for clients; empty while that is not known.
    pub host: String,
    /// The port of the leader's address for clients; 0 while that is not known.
    pub port: u16,
    /// The link is up.
    pub connected: bool,
    /// Whether the link is catching up from segment files or streams.
    pub streaming: bool,
    /// For how long nothing was heard of a leader; where none was heard at all, since the node started.
    pub silence: Duration,
    /// Bytes of the leader's log that are not applied here; `None` while the leader is not heard: it may have written since.
    pub lag_bytes: Option<u64>,
    /// For how long the oldest of those bytes has been waiting; while the leader is not heard at least `silence`.
    pub lag: Duration,
}

/// A section of INFO: its title and its lines.
pub type InfoSection = (&'static str, Vec<(String, String)>);

/// The time of the loop's turn, and of this moment.
pub trait TurnClock {
    /// The time of this turn of the loop.
    fn now(&self) -> Instant;
    /// The time of this very moment; for what must not have been true some time ago.
    fn clock(&self) -> Instant;
    /// How long this turn of the loop has lasted.
    fn turn_time(&self) -> Duration;
    /// A command took so long, `watchdog::SLOW` or longer.
    fn report_slow(&mut self, command: &'static str, took: Duration);
    /// Wall clock of this turn of the loop, microseconds since the Unix epoch.
    fn wall_clock_us(&self) -> u64;
}

/// What readers may see, and how new it is.
///
/// `applied <= flushed` on a leader.
pub trait DataView {
    /// What is durable (and, on a replica, flushed by the leader): what every reader may see.
    fn store(&self) -> &Store;
    /// The leader's changes that are not durable yet, to be read over `store`.
    fn pending(&self) -> &Pending;
    /// How many keys the store has. When the number is an estimate, counting goes on in steps (`Wait::Counted`).
    fn count_keys(&mut self) -> Result<KeyCount, StoreError>;
    /// What is durable here.
    fn flushed(&self) -> Lsn;
    /// What `store` holds.
    fn applied(&self) -> Lsn;
    /// Readers may be told up to this LSN what survives a failover: confirmed by the sync policy, and applied here. Zero for a
    /// leader that may not speak.
    fn committed_here(&self) -> Lsn;
    /// The epochs of this node's log.
    fn history(&self) -> &EpochHistory;
    /// The cluster; 0 until the node has met one.
    fn cluster_id(&self) -> u128;
    /// What was durable on the leader so long before `now` is applied here; `None` when this node cannot say.
    fn staleness(&self, now: Instant) -> Option<Duration>;
    /// Whether this node may answer strong reads at `now`.
    fn strong(&self, now: Instant) -> Strong;
}

/// The way of a commit: taken or refused, confirmed at its level, and the wait for either.
///
/// `flushed <= log_end` on a leader.
pub trait CommitPath {
    /// `Err` when a write would be refused before it is even executed (replica, stopped, no space, too few replicas for
    /// `level`). Cheap: asked before each write.
    fn writable(&self, level: CommitLevel) -> Result<(), Refusal>;
    /// Appends one record (`walferry_applier::record`: the encoded effects) to the log and to `pending`; its LSN is its end.
    fn commit(&mut self, record: &[u8], level: CommitLevel) -> Result<Lsn, Refusal>;
    /// The end of the log, its open frame included.
    fn log_end(&self) -> Lsn;
    /// Commits up to this LSN hold `level` (a degraded level included). `Off` is `Lsn::MAX`, `Local` follows `applied`: what is
    /// answered must be in `store`.
    fn released(&self, level: CommitLevel) -> Lsn;
    /// The level that the commit that ends at `lsn` holds by what is known here, `level` at most: a lower one where the node degrades,
    /// or where the sync policy asked nobody.
    fn met(&self, level: CommitLevel, lsn: Lsn) -> CommitLevel;
    /// Why this leader may answer nothing at the moment, at no level, and what to do about it; `None` when it may.
    fn silent(&self) -> Option<String>;
    /// Why nobody confirms commits at `level` here, whoever comes and goes, and what to do about it; `None` where somebody may, and
    /// on a node that takes no commits.
    fn unconfirmable(&self, level: CommitLevel) -> Option<String>;
    /// Replicas that have reached `stage` at `lsn`.
    fn replicas_at(&self, stage: Stage, lsn: Lsn) -> usize;
    /// The evidence for the commit that ends at `lsn`.
    fn evidence(&self, lsn: Lsn) -> Evidence;
    /// Who awaits a confirmation that did not come, for `-UNCERTAIN`: such as `ANY 1 (a, b)`.
    fn unconfirmed_by(&self, lsn: Lsn, level: CommitLevel) -> String;
    /// Call `Session::release` when `released(level) >= lsn`.
    fn hold(&mut self, session: SessionId, level: CommitLevel, lsn: Lsn);
    /// Call `Session::release` when `committed_here() >= lsn`.
    fn hold_committed(&mut self, session: SessionId, lsn: Lsn);
    /// Call `Session::resume` when this may have come.
    fn park(&mut self, session: SessionId, wait: Wait);
    /// The session no longer waits (its deadline passed, or what it waited for was there).
    fn unpark(&mut self, session: SessionId);
}

/// What INFO, ROLE, CONFIG and the tools report of the node. Decides nothing.
pub trait NodeInfo {
    /// The replicas of this leader; on a replica none.
    fn replication(&self) -> Vec<ReplicationRow>;
    /// What INFO and ROLE tell.
    fn facts(&self) -> NodeFacts;
    /// Further sections of INFO (log, flush, shipping), each by its title.
    fn info_sections(&self) -> Vec<InfoSection>;
    /// Every configuration key with its value, for CONFIG GET.
    fn config(&self) -> Vec<(String, String)>;
    /// The accounting of commits as JSON; with `histograms` the distributions come along whole.
    fn waterfall(&self, histograms: bool) -> String;
    /// Where clients find the leader, this node included; `None` when it is not known.
    fn leader(&self) -> Option<String>;
    /// Leader, replicas, in-sync set, epoch, policy and lag, as JSON, for a client that reached this node at this address.
    fn describe_cluster(&self, reached_at: Option<IpAddr>) -> String;
}

/// What an operator asks of the node, of its cluster or of all connections.
pub trait Administration {
    /// The slots of this leader; on other nodes why there are none.
    fn slots(&self) -> Result<Vec<SlotStatus>, String>;
    /// Drops a slot of this leader; what is said to that, or why it is not done.
    fn drop_slot(&mut self, name: &MemberName) -> Result<String, String>;
    /// Begins the accounting anew.
    fn reset_waterfall(&mut self);
    /// Makes this replica a leader; the new epoch, or why not.
    fn promote(&mut self) -> Result<Epoch, String>;
    /// Starts an operator's command to the cluster, or tells why it cannot be; the answer comes later.
    fn command_cluster(&mut self, command: Command) -> Result<Reply, String>;
    /// Reads the users' file again; clients whose user changed are disconnected with this turn.
    fn reload_users(&mut self) -> Result<(), String>;
    /// Has a password compared with salted hashes. `Session::resume` follows.
    fn check_password(&mut self, job: Job);
    /// Asks something of all connections; the answer comes with this turn or the next, by `Session::resume`.
    fn ask_clients(&mut self, session: SessionId, ask: ClientAsk) -> ClientReply;
}

/// The node, as its sessions see it.
pub trait Host: TurnClock + DataView + CommitPath + NodeInfo + Administration {}

impl<T: TurnClock + DataView + CommitPath + NodeInfo + Administration> Host for T {}
