//! A replica's link to its leader: connects, says what it has, and moves bytes from the socket into the log. The driver of
//! `receiver` and `ack`; the node calls it once a turn and with its completions. Its duties in order: notice a broken or silent
//! link; receive (verified, then written as it came); acknowledge what moved.

use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver as Inbox, TryRecvError, channel};
use std::time::{Duration, Instant};

use io_uring::{opcode, types};
use walferry_cluster::handover::Handover;
use walferry_cluster::member::{ClusterId, MemberName, Proved, reachable};
use walferry_cluster::message::{
    EPOCHS_PER_MESSAGE_MAX, Hello, LinkHeartbeat, Message, PROTOCOL_VERSION, RefuseCode, Traced, Welcome,
};
use walferry_cluster::register::MemberId;
use walferry_cluster::snapshot::CopyProgress;
use walferry_engine::epoch::EpochHistory;
use walferry_engine::frame::UnverifiedFrame;
use walferry_engine::log::{Log, ReceiveError};
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_engine::meta::Meta;
use walferry_engine::mutants;
use walferry_engine::ring::{Completion, Owner, Ring, Token};
use walferry_engine::waker::Waker;
use walferry_engine::world::{self, Pace};
use walferry_tls::{PeerLinks, Secured};

use crate::ack::{Acks, Reached};
use crate::freshness::Freshness;
use crate::receiver::{ProtocolError, Receiver, Step};
use crate::rewind::{Outcome, Rewind};
use crate::snapshot::SnapshotError;
use crate::snapshot::fetch::{FetchConfig, FetchError, Fetching, cuts_commits};
use crate::snapshot::incoming::{Facts, Incoming};
use crate::store::{Store, StoreError};

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
/// How long the handshakes behind it may take, of the secret and of TLS: five round trips of a long link.
const SECURE_TIME_MAX: Duration = Duration::from_secs(3);
/// The socket's receive buffer: a catch-up over a long link fills it.
const SOCKET_RECEIVE_BYTES: usize = 4 << 20;

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

/// Why following failed for good. The node ends.
#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    /// History or identity cannot be made durable.
    #[error("cannot follow: {0}")]
    Persist(String),
    /// The log cannot be truncated.
    #[error(transparent)]
    Log(#[from] walferry_engine::log::LogError),
    /// The store cannot go back.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A snapshot cannot be put in place.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
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

fn token(op: u64) -> u64 {
    Token::new(Owner::Peer, op).into()
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

    /// How far the snapshot is that is being received, if one is.
    pub fn snapshot(&self) -> Option<&Arc<CopyProgress>> {
        match &self.phase {
            Phase::Fetching(fetching) => Some(fetching.progress()),
            _ => None,
        }
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

    /// When `poll` is due at the latest.
    pub fn next_timeout(&self, now: Instant) -> Option<Duration> {
        let at = match &self.phase {
            Phase::Resting(until) => *until,
            Phase::Flushing | Phase::Connecting(_) | Phase::Closing | Phase::Fetching(_) => return None,
            Phase::Fetched(_) => now + INSTALL_INTERVAL,
            Phase::Greeting => self.heard_at + self.config.peer_timeout,
            Phase::Streaming => {
                let heartbeat = now + self.config.heartbeat_interval;
                self.acks.echo_due().map_or(heartbeat, |echo| echo.min(heartbeat))
            }
        };
        Some(at.saturating_duration_since(now))
    }

    /// True when no operation of the link is in flight: it may be dropped.
    pub fn is_quiet(&self) -> bool {
        self.receiving.is_none() && !self.sending
    }

    /// An operation of a link that was closed for good ended.
    pub fn handle_late_completion(&mut self, completion: &Completion) {
        match completion.token.id() {
            OP_SEND => self.sending = false,
            OP_RECEIVE => self.receiving = None,
            _ => {}
        }
    }

    /// Ends the link; drop it once `is_quiet`. False while the receive in flight still fills the log's memory: the log must not
    /// be written to by anybody else until that has ended.
    pub fn close(&mut self) -> bool {
        if let Some(socket) = &self.socket {
            // Fails only when the connection is gone already.
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
        self.phase = Phase::Closing;
        self.receiving != Some(true)
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

    /// An operation of the link ended.
    pub fn handle_completion(
        &mut self,
        completion: &Completion,
        ring: &mut Ring,
        log: &mut Log,
        store: &mut Store,
        history: &mut EpochHistory,
        now: Instant,
    ) -> Result<(), ReplicaError> {
        let outcome = completion.outcome();
        if completion.token.id() == OP_SEND {
            self.sending = false;
            match outcome {
                Ok(bytes) => self.sent += bytes as usize,
                Err(error) => self.fail(LinkError::Io(error), now),
            }
            return self.advance(ring, log, store, history, now);
        }
        let into_log = self.receiving.take().unwrap_or(false);
        let open = matches!(self.phase, Phase::Greeting | Phase::Streaming);
        match outcome {
            Ok(_) | Err(_) if !open => {}
            Ok(0) => self.fail(LinkError::Closed, now),
            Ok(bytes) => {
                self.heard_at = now;
                self.bytes_at = Some(now);
                if !into_log {
                    self.receiver.advance(bytes as usize);
                } else if let Err(error) = self.received_raw(bytes as usize, log, now) {
                    self.fail(error, now);
                }
            }
            // Linux' TLS has no other word for "a record that is no data came": the other side said that it ends.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => self.fail(LinkError::Closed, now),
            Err(error) => self.fail(LinkError::Io(error), now),
        }
        self.advance(ring, log, store, history, now)
    }

    /// A snapshot is there, and nothing is in flight that would keep the node from putting it in place.
    pub fn has_snapshot(&self, log: &Log) -> bool {
        let quiet = self.is_quiet() && log.idle() && log.flushed() == log.sealed() && log.stopped().is_none();
        matches!(self.phase, Phase::Fetched(_)) && quiet
    }

    /// The last that is done with the old log: what of it the copy does not hold is put aside. Then the copy is declared ready: from
    /// here on only `snapshot::install` may touch log and store.
    pub fn give_way_to_snapshot(
        &mut self,
        log: &Log,
        store: &mut Store,
        history: &EpochHistory,
    ) -> Result<(), ReplicaError> {
        let Phase::Fetched(facts) = &self.phase else { unreachable!("`has_snapshot` was asked first") };
        let end = log.sealed();
        let fork = facts.history.fork_with(history, end);
        if fork < end {
            let from = fork.max(log.start());
            let lost = log.put_aside(from, history.epoch_at(Lsn(end.0 - 1)))?;
            tracing::warn!(file = %lost.path.display(), "{lost}");
            self.lost_commits += lost.records;
            if from > fork {
                // A checkpoint that ends later would change the file that is kept, and what it is called after.
                store.finish_checkpoint()?;
                let kept = crate::snapshot::install::keep_store(&self.config.dir, store.durable_position())?;
                tracing::warn!(
                    file = %kept.display(),
                    "commits from {fork} to {from} are lost as well and their log was recycled: the store that held them is kept"
                );
            }
        }
        tracing::info!(snapshot = %facts.snapshot, before = %end, "a snapshot takes the place of log and store");
        Incoming::declare_ready(&self.config.dir)?;
        Ok(())
    }

    /// Fetches a snapshot that holds everything before `floor`.
    fn fetch(&mut self, floor: Lsn, log: &Log, history: &EpochHistory, now: Instant) {
        let gives_up = self.gives_up(log, history);
        let config = FetchConfig {
            data: self.config.dir.clone(),
            leader: self.config.leader.clone(),
            cluster_id: self.config.meta.cluster_id,
            name: self.config.name.clone(),
            segment_bytes: self.config.meta.segment_bytes,
            peer_timeout: self.config.peer_timeout,
            epoch_min: self.config.promised.max(if gives_up { Epoch(0) } else { history.last_epoch() }),
            floor,
            keeps: self.keeps(log, history),
            history: history.clone(),
            flushed: log.flushed(),
            suspect: self.suspect,
            links: Arc::clone(&self.config.links),
        };
        self.socket = None;
        match Fetching::start(config, self.waker.clone()) {
            Ok(fetching) => self.phase = Phase::Fetching(fetching),
            Err(error) => self.fail(LinkError::Io(error), now),
        }
    }

    fn connect(&mut self) {
        let (outbox, inbox) = channel();
        let timeout = CONNECT_TIME_MAX.min(self.config.peer_timeout);
        let (leader, links, waker) = (self.config.leader.clone(), Arc::clone(&self.config.links), self.waker.clone());
        // A name server may take its time: not on the ring's thread.
        let connect = move || {
            // Nobody waits for it any more when the link was closed meanwhile.
            let _ = outbox.send(connect_to(&leader, timeout, &links));
            waker.wake();
            Pace::Over
        };
        match world::spawn("connect", Box::new(connect)) {
            Ok(_) => self.phase = Phase::Connecting(inbox),
            Err(error) => self.fail(LinkError::Io(error), world::now()),
        }
    }

    /// True where this node itself led its newest epoch, without a register: by following another it gives that up.
    fn gives_up(&self, log: &Log, history: &EpochHistory) -> bool {
        self.config.member == MemberId(0) && log.led() == history.last_epoch()
    }

    /// Up to where nothing of the log may be cut without a word of the operator's: what an earlier leader told to be committed.
    /// Zero for a member and for a leader that follows another.
    fn keeps(&self, log: &Log, history: &EpochHistory) -> Lsn {
        let asked = self.config.may_cut_commits || self.config.member != MemberId(0);
        if asked || self.gives_up(log, history) { Lsn::ZERO } else { self.committed.min(log.sealed()) }
    }

    fn greet(&mut self, connected: Connected, log: &Log, history: &EpochHistory, now: Instant) {
        let entries = history.entries();
        let newest = entries.len().saturating_sub(EPOCHS_PER_MESSAGE_MAX);
        let id = self.config.meta.cluster_id;
        let hello = Hello {
            protocol: PROTOCOL_VERSION,
            cluster_id: (id != 0).then_some(ClusterId(id)),
            name: self.config.name.clone(),
            client_address: self.config.client_address.clone(),
            flushed: log.flushed(),
            segment_bytes: self.config.meta.segment_bytes,
            crc: log.crc_at_end(),
            member: self.config.member,
            gives_up: if self.gives_up(log, history) { log.led() } else { Epoch(0) },
            history: entries[newest..].to_vec(),
        };
        self.receiver.reset();
        self.acks = Acks::new(now);
        self.freshness.handle_connect();
        self.outgoing.clear();
        self.sent = 0;
        Message::Hello(hello).encode(&mut self.outgoing);
        self.socket = Some(connected.stream);
        self.leader_at = connected.address;
        self.leader_proved = connected.proved;
        self.heard_at = now;
        self.phase = Phase::Greeting;
    }

    /// Does everything that can be done now: steps through what was received, receives more, sends.
    fn advance(
        &mut self,
        ring: &mut Ring,
        log: &mut Log,
        store: &mut Store,
        history: &mut EpochHistory,
        now: Instant,
    ) -> Result<(), ReplicaError> {
        while matches!(self.phase, Phase::Greeting | Phase::Streaming) && self.receiving.is_none() {
            match self.one_step(log, store, history, now) {
                Ok(Progress::Again) => {}
                Ok(Progress::Receive { into_log: false }) => {
                    self.receive_staging(ring);
                    break;
                }
                Ok(Progress::Receive { into_log: true }) => {
                    self.receive_raw(ring, log);
                    break;
                }
                Ok(Progress::Wait) => {
                    // It is this node that does not listen: that says nothing of the leader.
                    self.heard_at = now;
                    break;
                }
                Err(StepError::Link(error)) => self.fail(error, now),
                Err(StepError::Follow(error)) => return Err(error),
            }
        }
        self.send(ring, log, store, now);
        Ok(())
    }

    fn one_step(
        &mut self,
        log: &mut Log,
        store: &mut Store,
        history: &mut EpochHistory,
        now: Instant,
    ) -> Result<Progress, StepError> {
        if let Some((wire_bytes, traced)) = self.waiting_frame.take() {
            return self.take_frame(wire_bytes, traced, log, now);
        }
        match self.receiver.step(log.received()).map_err(LinkError::from)? {
            Step::More => Ok(Progress::Receive { into_log: false }),
            Step::Welcome(welcome) => {
                self.welcomed(&welcome, log, store, history)?;
                self.receiver.accept();
                self.phase = Phase::Streaming;
                Ok(Progress::Again)
            }
            Step::Refuse(refuse) => Err(LinkError::Refused { code: refuse.code, text: refuse.text }.into()),
            Step::Frame { wire_bytes, traced } => self.take_frame(wire_bytes, traced, log, now),
            Step::Heartbeat(heartbeat) => {
                let has_all = log.sealed() >= heartbeat.end;
                self.heard(heartbeat, has_all, now);
                Ok(Progress::Again)
            }
            Step::Raw => self.take_raw(log, now),
        }
    }

    /// The link has brought something, or there is nothing to bring: one that is welcomed and fails before that, as when the leader
    /// cannot read its own log, is not tried again at once.
    fn works(&mut self) {
        if self.backoff != BACKOFF_MIN || !self.last_error.is_empty() {
            self.backoff = BACKOFF_MIN;
            self.last_error.clear();
        }
    }

    fn heard(&mut self, heartbeat: LinkHeartbeat, has_all: bool, now: Instant) {
        if has_all {
            self.works();
        }
        self.leader_end = heartbeat.end;
        self.leader_flushed = self.leader_flushed.max(heartbeat.flushed);
        self.committed = self.committed.max(heartbeat.committed);
        self.acks.handle_heartbeat(heartbeat.sent_at_us, now);
        if heartbeat.stamp_us != 0 {
            // A leader that returns what it never got must not make the state look fresher than now.
            self.freshness.handle_echo(heartbeat.end, self.acks.stamped_at(heartbeat.stamp_us).min(now));
        }
    }

    fn take_frame(
        &mut self,
        wire_bytes: usize,
        traced: bool,
        log: &mut Log,
        now: Instant,
    ) -> Result<Progress, StepError> {
        let wire = &self.receiver.front()[..wire_bytes];
        let at = log.sealed();
        if !log.receive_frame(wire, now).map_err(LinkError::from)? {
            self.waiting_frame = Some((wire_bytes, traced));
            return Ok(Progress::Wait);
        }
        // The log verified it; only the numbers are read again.
        if let Ok(frame) = UnverifiedFrame::parse(wire, at) {
            self.leader_flushed = self.leader_flushed.max(frame.claimed().flushed);
            self.committed = self.committed.max(frame.claimed().committed);
        }
        self.works();
        self.leader_end = self.leader_end.max(log.sealed());
        self.acks.handle_received(log.sealed(), now);
        if traced {
            self.acks.trace(log.sealed(), now);
        }
        self.receiver.consume(wire_bytes);
        Ok(Progress::Again)
    }

    /// Raw log bytes: first those that came with the message, then straight from the socket.
    fn take_raw(&mut self, log: &mut Log, now: Instant) -> Result<Progress, StepError> {
        let here = self.receiver.front().len().min(self.receiver.raw() as usize);
        if here == 0 {
            return Ok(Progress::Receive { into_log: true });
        }
        let Some(space) = log.receive_space(here) else { return Ok(Progress::Wait) };
        let bytes = space.len().min(here);
        space[..bytes].copy_from_slice(&self.receiver.front()[..bytes]);
        self.receiver.consume(bytes);
        self.received_raw(bytes, log, now)?;
        Ok(Progress::Again)
    }

    fn received_raw(&mut self, bytes: usize, log: &mut Log, now: Instant) -> Result<(), LinkError> {
        self.receiver.raw_done(bytes as u64);
        let before = log.sealed();
        log.receive_advance(bytes, now)?;
        if log.sealed() > before {
            self.works();
        }
        // A leader sends from its files only what it has made durable.
        self.leader_flushed = self.leader_flushed.max(log.sealed());
        self.leader_end = self.leader_end.max(log.sealed());
        self.acks.handle_received(log.sealed(), now);
        Ok(())
    }

    /// Follows a welcome. What is promised by it is durable before anything of the new stream is taken.
    fn welcomed(
        &mut self,
        welcome: &Welcome,
        log: &mut Log,
        store: &mut Store,
        history: &mut EpochHistory,
    ) -> Result<(), StepError> {
        if let Some(Err(error)) = self.leader_proved.as_ref().map(|proved| proved.check(&welcome.name)) {
            return Err(LinkError::Misfit(error.to_string()).into());
        }
        self.adopt(welcome)?;
        let epoch = welcome.history.last().map_or(Epoch(0), |(epoch, _)| *epoch);
        if epoch < self.config.promised {
            let text = format!("the leader is of epoch {epoch}, this node has promised {}", self.config.promised);
            return Err(LinkError::Superseded(text).into());
        }
        let merged = merge(history, &welcome.history).ok_or_else(|| {
            LinkError::Misfit("the leader's epoch history does not ascend: its data directory is damaged".to_owned())
        })?;
        let start = welcome.start;
        let ended = log.sealed();
        let committed = self.keeps(log, history);
        if start < committed {
            return Err(LinkError::Committed { fork: start, committed }.into());
        }
        let rewind = Rewind {
            leader: welcome.name.as_str(),
            dir: &self.config.dir,
            start,
            leads: &merged,
            log,
            store,
            history,
            lost_commits: &mut self.lost_commits,
        };
        match rewind.run()? {
            Outcome::Done => {}
            Outcome::Beyond(stored) => return Err(LinkError::Beyond { fork: start, stored }.into()),
            Outcome::Writing => return Err(LinkError::Checkpoint { fork: start }.into()),
        }
        if start < ended {
            self.freshness.handle_rollback();
        }
        if !mutants::is_on("no-apply-limit") {
            // What an earlier leader had made durable beyond here says nothing of this one's log.
            self.leader_flushed = self.leader_flushed.min(start);
            self.committed = self.committed.min(start);
            self.leader_end = start;
        }
        if let Some(link) = self.leader_at {
            self.client_address = reachable(&welcome.client_address, link).unwrap_or_default();
        }
        tracing::info!(leader = %welcome.name, address = %self.config.leader, %start, "following");
        Ok(())
    }

    fn adopt(&mut self, welcome: &Welcome) -> Result<(), StepError> {
        if self.config.meta.cluster_id == 0 {
            self.config.meta.cluster_id = welcome.cluster_id.0;
            self.config.meta.save(&self.config.dir).map_err(|error| ReplicaError::Persist(error.to_string()))?;
            tracing::info!(cluster = %welcome.cluster_id, "joined the leader's cluster");
        }
        if self.config.meta.cluster_id != welcome.cluster_id.0 {
            let ours = ClusterId(self.config.meta.cluster_id);
            let text = format!("the leader belongs to cluster {}, this node to {ours}", welcome.cluster_id);
            return Err(LinkError::Misfit(text).into());
        }
        if self.config.member == MemberId(0) {
            // For its promotion. The members of a cluster have it in their register.
            let told = Handover { leader: welcome.name.clone(), policy: welcome.policy.clone() };
            told.save(&self.config.dir).map_err(|error| ReplicaError::Persist(error.to_string()))?;
        }
        Ok(())
    }

    fn receive_staging(&mut self, ring: &mut Ring) {
        let Some(socket) = &self.socket else { return };
        let space = self.receiver.space();
        let entry = opcode::Recv::new(types::Fd(socket.as_raw_fd()), space.as_mut_ptr(), space.len() as u32);
        self.receiving = Some(false);
        // SAFETY: the staging memory is neither moved nor read while `receiving`, and the link not dropped.
        unsafe { ring.push(entry.build().user_data(token(OP_RECEIVE))) };
    }

    fn receive_raw(&mut self, ring: &mut Ring, log: &mut Log) {
        let Some(socket) = &self.socket else { return };
        let wanted = usize::try_from(self.receiver.raw()).unwrap_or(usize::MAX).min(RAW_BYTES_MAX);
        let Some(space) = log.receive_space(wanted) else { return };
        let entry = opcode::Recv::new(types::Fd(socket.as_raw_fd()), space.as_mut_ptr(), space.len() as u32);
        self.receiving = Some(true);
        // SAFETY: the log keeps the space in place until it was advanced over; the log is reset only when the link is quiet.
        unsafe { ring.push(entry.build().user_data(token(OP_RECEIVE))) };
    }

    fn send(&mut self, ring: &mut Ring, log: &Log, store: &Store, now: Instant) {
        if self.sending || !matches!(self.phase, Phase::Greeting | Phase::Streaming) {
            return;
        }
        if self.sent == self.outgoing.len() && matches!(self.phase, Phase::Streaming) {
            let reached = Reached { written: log.written(), flushed: log.flushed(), applied: store.applied() };
            self.acks.handle_progress(reached, now);
            self.outgoing.clear();
            self.sent = 0;
            if let Some(ack) = self.acks.poll(self.config.heartbeat_interval, now) {
                Message::Ack(ack).encode(&mut self.outgoing);
            }
            while let Some(traced) = self.acks.poll_traced() {
                let flush = log.flush_accounting();
                let (flushes, records) = (flush.flushes(), flush.records());
                Message::Traced(Traced { flushes, records, ..traced }).encode(&mut self.outgoing);
            }
        }
        let rest = &self.outgoing[self.sent..];
        let Some(socket) = self.socket.as_ref().filter(|_| !rest.is_empty()) else { return };
        let entry = opcode::Send::new(types::Fd(socket.as_raw_fd()), rest.as_ptr(), rest.len() as u32);
        self.sending = true;
        // SAFETY: `outgoing` is not touched while `sending`, and the link not dropped.
        unsafe { ring.push(entry.flags(libc::MSG_NOSIGNAL).build().user_data(token(OP_SEND))) };
    }

    fn fail(&mut self, error: LinkError, now: Instant) {
        let text = error.to_string();
        if text != self.last_error {
            tracing::warn!(leader = %self.config.leader, "{text}");
            self.last_error = text;
        }
        match &error {
            LinkError::Refused { code: RefuseCode::LogGone, .. } => self.needs_snapshot = Some(Lsn::ZERO),
            LinkError::Beyond { fork, .. } => self.needs_snapshot = Some(*fork),
            // A fetch goes on where it was; a leader that was restarted is back soon.
            LinkError::Fetch(FetchError::Refused { code: RefuseCode::NotLeader | RefuseCode::Stopping, .. })
            | LinkError::Fetch(FetchError::Busy) => self.backoff = self.backoff.min(BACKOFF_PASSING_MAX),
            LinkError::Fetch(
                FetchError::Refused { .. } | FetchError::Misfit(_) | FetchError::Committed { .. } | FetchError::Keep(_),
            ) => {
                self.backoff = BACKOFF_MAX;
            }
            // The leader is about to be one, or there is another in a moment; a checkpoint ends soon.
            LinkError::Superseded(_) | LinkError::Checkpoint { .. } => {
                self.backoff = self.backoff.min(BACKOFF_PASSING_MAX)
            }
            LinkError::Refused {
                code: RefuseCode::NotLeader | RefuseCode::NotMember | RefuseCode::Stopping, ..
            } => {
                self.backoff = self.backoff.min(BACKOFF_PASSING_MAX);
            }
            // Trying again at once would get the same answer.
            LinkError::Refused { .. } | LinkError::Misfit(_) | LinkError::Committed { .. } => {
                self.backoff = BACKOFF_MAX
            }
            _ => {}
        }
        self.waiting_frame = None;
        if self.socket.is_some() {
            self.close();
        } else {
            self.rest(now);
        }
    }

    fn rest(&mut self, now: Instant) {
        self.socket = None;
        let random = world::random() as u32 % 1000;
        let pause = self.backoff - self.backoff / JITTER_SHARE * random / 1000;
        self.phase = Phase::Resting(now + pause);
        self.backoff = (self.backoff * 2).min(BACKOFF_MAX);
    }
}

enum Progress {
    /// There may be more to do.
    Again,
    /// Bytes are needed.
    Receive {
        /// Straight into the log buffer.
        into_log: bool,
    },
    /// The log has no space: its disk is behind.
    Wait,
}

enum StepError {
    Link(LinkError),
    Follow(ReplicaError),
}

impl From<LinkError> for StepError {
    fn from(error: LinkError) -> StepError {
        StepError::Link(error)
    }
}

impl From<ReplicaError> for StepError {
    fn from(error: ReplicaError) -> StepError {
        StepError::Follow(error)
    }
}

/// The leader's history with our older epochs in front, where it was told the newest only.
fn merge(ours: &EpochHistory, theirs: &[(Epoch, Lsn)]) -> Option<EpochHistory> {
    let older = ours.entries().iter().filter(|entry| theirs.first().is_some_and(|first| entry.0 < first.0));
    let older = older.filter(|_| theirs.len() == EPOCHS_PER_MESSAGE_MAX);
    EpochHistory::from_entries(&older.chain(theirs).copied().collect::<Vec<_>>())
}

/// A connection to a leader.
pub(crate) struct Connected {
    pub(crate) stream: TcpStream,
    /// Of the leader, where it has one; the stream may be no TCP socket and not know it.
    pub(crate) address: Option<SocketAddr>,
    /// The names that it has proved to be.
    pub(crate) proved: Option<Proved>,
}

pub(crate) fn connect_to(leader: &str, timeout: Duration, links: &PeerLinks) -> std::io::Result<Connected> {
    if let Some(connection) = world::simulated_connection(leader) {
        return connection.map(|stream| Connected { stream, address: None, proved: None });
    }
    let mut last = std::io::Error::new(std::io::ErrorKind::NotFound, format!("{leader} has no address"));
    for address in leader.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, timeout) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                // More than the default window for long links; the kernel caps it at net.core.rmem_max.
                let _ = nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::RcvBuf, &SOCKET_RECEIVE_BYTES);
                let Secured { stream, names, .. } = links.secure(stream, leader, SECURE_TIME_MAX)?;
                let proved = names.map(|names| Proved::of(names.iter().map(String::as_str)));
                return Ok(Connected { stream, address: Some(address), proved });
            }
            Err(error) => last = std::io::Error::new(error.kind(), format!("cannot connect to {address}: {error}")),
        }
    }
    Err(last)
}
