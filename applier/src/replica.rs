//! A replica's link to its leader: connects, says what it has, and moves bytes from the socket into the log. The driver of
//! `receiver` and `ack`; the node calls it once a turn and with its completions. Its duties in order: notice a broken or silent
//! link; receive (verified, then written as it came); acknowledge what moved.

mod link;
mod snapshot;
mod steps;

use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver as Inbox, TryRecvError};
use std::time::{Duration, Instant};

use walferry_cluster::member::{MemberName, Proved};
use walferry_cluster::message::RefuseCode;
use walferry_cluster::register::MemberId;
use walferry_cluster::snapshot::CopyProgress;
use walferry_engine::epoch::EpochHistory;
use walferry_engine::log::{Log, ReceiveError};
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_engine::meta::Meta;
use walferry_engine::ring::Ring;
use walferry_engine::waker::Waker;
use walferry_tls::PeerLinks;

use crate::ack::Acks;
use crate::connect::Connected;
use crate::error::ReplicaError;
use crate::freshness::Freshness;
use crate::receiver::{ProtocolError, Receiver};
use crate::snapshot::fetch::{FetchError, Fetching, cuts_commits};
use crate::snapshot::incoming::Facts;
use crate::store::Store;

const OP_RECEIVE: u64 = 0;
const OP_SEND: u64 = 1;
/// Raw log bytes are received in pieces of at most this.
const RAW_BYTES_MAX: usize = 4 << 20;
/// The first pause before connecting again; it doubles up to BACKOFF_MAX.
const BACKOFF_MIN: Duration = Duration::from_millis(50);
/// The longest pause before connecting again.
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// A snapshot that is there and cannot be put in place yet is looked at again after this.
const INSTALL_INTERVAL: Duration = Duration::from_millis(5);
/// The longest pause when the other node is expected to lead soon.
const BACKOFF_PASSING_MAX: Duration = Duration::from_millis(100);
/// What of a pause is random, as a divisor, so that the replicas of a leader that comes back do not all connect at once.
const JITTER_SHARE: u32 = 4;
/// How long a connection may take to open; over a network that was cut and is whole again, the next attempt is quicker.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(1);

/// How a replica follows.
#[derive(Clone, Debug)]
pub struct ReplicaConfig {
    /// The data directory.
    pub dir: PathBuf,
    /// The leader's peer address, `HOST:PORT`.
    pub leader: String,
    /// This node's address for clients, told to the leader.
    pub client_address: String,
    /// What this node is; a cluster id of 0 takes the leader's.
    pub meta: Meta,
    /// The node's name, and its slot's.
    pub name: MemberName,
    /// Its incarnation as a member of a cluster; 0 for none.
    pub member: MemberId,
    /// A leader that is silent for so long is dead.
    pub peer_timeout: Duration,
    /// A heartbeat goes out at least this often.
    pub heartbeat_interval: Duration,
    /// This node has promised to take nothing from leaders of older epochs; 0 for none.
    pub promised: Epoch,
    /// The operator takes it that what this node knows to be committed is cut off where the leader has not got it. Members ask nobody:
    /// their register tells who may lead.
    pub may_cut_commits: bool,
    /// Peers speak TLS.
    pub links: Arc<PeerLinks>,
}

/// Why a connection ended. Another is tried.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error("the leader closed the connection")]
    Closed,
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("nothing was heard of the leader for {0:?} (peer_timeout)")]
    Silent(Duration),
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    #[error(transparent)]
    Receive(#[from] ReceiveError),
    #[error("the leader refuses this replica: {text}")]
    Refused { code: RefuseCode, text: String },
    #[error("{0}")]
    Superseded(String),
    #[error("{0}")]
    Misfit(String),
    /// Our store holds what the leader's log does not: only a copy of the leader's helps.
    #[error("the leader's log parts from ours at {fork}, but our store holds {stored} already: it needs a snapshot")]
    Beyond { fork: Lsn, stored: Lsn },
    /// Whether the store's file holds what the leader's log does not is known once it has ended.
    #[error(
        "the leader's log parts from ours at {fork}, and a checkpoint is being written that may go further: waits for its end"
    )]
    Checkpoint { fork: Lsn },
    #[error("{}", cuts_commits(*fork, *committed))]
    Committed { fork: Lsn, committed: Lsn },
    #[error(transparent)]
    Fetch(#[from] FetchError),
}

enum Phase {
    /// Connect again then.
    Resting(Instant),
    /// It is time to connect, once what the log has taken is durable: a completion of the log's ends this, and not time.
    Flushing,
    /// A thread resolves the name and connects.
    Connecting(Inbox<std::io::Result<Connected>>),
    /// Said hello.
    Greeting,
    /// Frames come.
    Streaming,
    /// Waits for operations in flight, then rests, or fetches a snapshot.
    Closing,
    /// A thread fetches a snapshot.
    Fetching(Fetching),
    /// It is there: the node is to put it in place.
    Fetched(Box<Facts>),
}

/// What a replica knows of its link.
#[derive(Clone, Debug)]
pub struct ReplicaLinkStatus {
    /// The leader's peer address, as configured.
    pub leader: String,
    /// The link is up and accepted.
    pub connected: bool,
    /// The replica has all that the leader said it has.
    pub streaming: bool,
    /// The leader's end of log, as last heard.
    pub leader_end: Lsn,
    /// Durable at the leader, as last heard.
    pub leader_flushed: Lsn,
    /// The commit LSN, as last heard.
    pub committed: Lsn,
    /// Why the last connection ended or was not made; empty when none did.
    pub last_error: String,
    /// How far a snapshot is that is being received.
    pub snapshot: Option<Arc<CopyProgress>>,
}

/// The link of a replica to its leader.
pub struct Replica {
    config: ReplicaConfig,
    phase: Phase,
    socket: Option<TcpStream>,
    /// Where the leader is, at the network's end of the socket.
    leader_at: Option<SocketAddr>,
    /// The names that it has proved to be.
    leader_proved: Option<Proved>,
    receiver: Receiver,
    acks: Acks,
    /// The receive in flight fills the log buffer; else, if any, the staging memory.
    receiving: Option<bool>,
    sending: bool,
    outgoing: Vec<u8>,
    sent: usize,
    /// A frame in the staging memory for which the log had no space.
    waiting_frame: Option<(usize, bool)>,
    heard_at: Instant,
    /// When bytes came from the leader, as against when the wait for them began.
    bytes_at: Option<Instant>,
    backoff: Duration,
    leader_flushed: Lsn,
    leader_end: Lsn,
    committed: Lsn,
    freshness: Freshness,
    client_address: String,
    last_error: String,
    /// Commits that truncations cut off.
    lost_commits: u64,
    /// The log that this node needs is gone: it fetches a snapshot that holds everything before this.
    needs_snapshot: Option<Lsn>,
    /// A piece of the copy arrived damaged.
    suspect: bool,
    /// Of the copy that came last: bytes that travelled, and bytes that earlier attempts had brought.
    copied: (u64, u64),
    waker: Waker,
}

impl Replica {
    /// A link that connects at the first `poll`. `leader_flushed` and `committed` are what the recovered log says of its leader;
    /// the store is as fresh as the leader's was at `fresh`.
    pub fn new(
        config: ReplicaConfig,
        leader_flushed: Lsn,
        committed: Lsn,
        fresh: Option<Instant>,
        waker: Waker,
        now: Instant,
    ) -> Replica {
        Replica {
            config,
            phase: Phase::Resting(now),
            socket: None,
            leader_at: None,
            leader_proved: None,
            receiver: Receiver::default(),
            acks: Acks::new(now),
            receiving: None,
            sending: false,
            outgoing: Vec::new(),
            sent: 0,
            waiting_frame: None,
            heard_at: now,
            bytes_at: None,
            backoff: BACKOFF_MIN,
            leader_flushed,
            leader_end: Lsn::ZERO,
            committed,
            freshness: Freshness::new(fresh),
            client_address: String::new(),
            last_error: String::new(),
            lost_commits: 0,
            needs_snapshot: None,
            suspect: false,
            copied: (0, 0),
            waker,
        }
    }

    /// The cluster that the node belongs to; 0 until a leader told it.
    pub fn cluster_id(&self) -> u128 {
        self.config.meta.cluster_id
    }

    /// The leader's peer address.
    pub fn leader(&self) -> &str {
        &self.config.leader
    }

    /// The leader's address for clients; empty until it was told.
    pub fn client_address(&self) -> &str {
        &self.client_address
    }

    /// The store may hold what ends at or before this: what the leader had made durable.
    pub fn apply_limit(&self) -> Lsn {
        self.leader_flushed
    }

    /// The commit LSN as the leader last told it.
    pub fn committed(&self) -> Lsn {
        self.committed
    }

    /// What the log's leader had made durable, as last heard.
    pub fn leader_flushed(&self) -> Lsn {
        self.leader_flushed
    }

    /// The store is as fresh as the leader's was then; `None` when that is not known.
    pub fn fresh_as_of(&self) -> Option<Instant> {
        self.freshness.as_of()
    }

    /// When anything came from the leader over this link; `None` before.
    pub fn heard_at(&self) -> Option<Instant> {
        self.bytes_at
    }

    /// Commits that were cut off since the last call, because the leader's log does not have them.
    pub fn take_lost_commits(&mut self) -> u64 {
        std::mem::take(&mut self.lost_commits)
    }

    /// Of the snapshot that came last: bytes that travelled in its last attempt, and bytes that earlier attempts had brought.
    pub fn copied(&self) -> (u64, u64) {
        self.copied
    }

    /// Leaders of older epochs are refused.
    pub fn promised(&self) -> Epoch {
        self.config.promised
    }

    /// What the link is doing.
    pub fn status(&self, log: &Log) -> ReplicaLinkStatus {
        let connected = matches!(self.phase, Phase::Streaming);
        ReplicaLinkStatus {
            leader: self.config.leader.clone(),
            connected,
            streaming: connected && log.sealed() >= self.leader_end,
            leader_end: self.leader_end,
            leader_flushed: self.leader_flushed,
            committed: self.committed,
            last_error: self.last_error.clone(),
            snapshot: self.snapshot().map(Arc::clone),
        }
    }

    /// The link's duties of one turn.
    pub fn poll(
        &mut self,
        ring: &mut Ring,
        log: &mut Log,
        store: &mut Store,
        history: &mut EpochHistory,
        now: Instant,
    ) -> Result<(), ReplicaError> {
        match &self.phase {
            Phase::Resting(until) if now < *until => {}
            Phase::Resting(_) | Phase::Flushing => {
                // What the replica says it has must be durable, and the end of its log.
                if log.idle() && log.flushed() == log.sealed() && log.stopped().is_none() {
                    self.connect();
                } else {
                    self.phase = Phase::Flushing;
                }
            }
            Phase::Connecting(inbox) => match inbox.try_recv() {
                Ok(Ok(connected)) => self.greet(connected, log, history, now),
                Ok(Err(error)) => self.fail(LinkError::Io(error), now),
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => self.fail(LinkError::Closed, now),
            },
            Phase::Greeting | Phase::Streaming => {
                if now.saturating_duration_since(self.heard_at) > self.config.peer_timeout {
                    self.fail(LinkError::Silent(self.config.peer_timeout), now);
                }
            }
            Phase::Closing => {
                if self.is_quiet() {
                    log.receive_reset();
                    match self.needs_snapshot.take() {
                        Some(floor) => self.fetch(floor, log, history, now),
                        None => self.rest(now),
                    }
                }
            }
            Phase::Fetching(fetching) => match fetching.outcome() {
                None => {}
                Some(Ok(facts)) => {
                    let kept = fetching.progress().kept();
                    self.copied = (facts.bytes - kept, kept);
                    self.phase = Phase::Fetched(Box::new(facts));
                }
                Some(Err(error)) => {
                    self.suspect = matches!(error, FetchError::Damaged(_));
                    self.fail(error.into(), now);
                }
            },
            Phase::Fetched(_) => {}
        }
        self.advance(ring, log, store, history, now)?;
        self.freshness.handle_applied(store.applied());
        Ok(())
    }
}
