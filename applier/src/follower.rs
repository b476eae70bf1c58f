//! A replica's link to its leader: connects, says what it has, and moves bytes from the socket into the log. The driver of
//! `receiver` and `ack`; the node calls it once a turn and with its completions. Its duties in order: notice a broken or silent
//! link; receive (verified, then written as it came); acknowledge what moved.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver as Inbox, TryRecvError, channel};
use std::time::{Duration, Instant};

use io_uring::{opcode, types};
use walferry_cluster::member::{ClusterId, MemberName, reachable};
use walferry_cluster::message::{
    EPOCHS_PER_MESSAGE_MAX, Heartbeat, Hello, Message, PROTOCOL_VERSION, RefuseCode, Traced, Welcome,
};
use walferry_engine::epoch::EpochHistory;
use walferry_engine::frame::UnverifiedFrame;
use walferry_engine::log::{Log, ReceiveError};
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_engine::meta::Meta;
use walferry_engine::ring::{Completion, Owner, Ring, Token};
use walferry_engine::waker::Waker;

use crate::ack::{Acks, Reached};
use crate::receiver::{ProtocolError, Receiver, Step};
use crate::store::{Store, StoreError};

const OP_RECEIVE: u64 = 0;
const OP_SEND: u64 = 1;
/// Raw log bytes are received in pieces of at most this.
const RAW_BYTES_MAX: usize = 4 << 20;
/// The first pause before connecting again; it doubles up to BACKOFF_MAX.
const BACKOFF_MIN: Duration = Duration::from_millis(50);
/// The longest pause before connecting again.
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// What of a pause is left to chance, as a divisor: replicas of a leader that comes back do not all knock at once.
const JITTER_SHARE: u32 = 4;
/// The socket's receive buffer: a catch-up over a long link fills it.
const SOCKET_RECEIVE_BYTES: usize = 4 << 20;

/// How a replica follows.
#[derive(Clone, Debug)]
pub struct FollowerConfig {
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
    /// A leader that is silent for so long is dead.
    pub peer_timeout: Duration,
    /// A sign of life goes out at least this often.
    pub heartbeat_interval: Duration,
}

/// Why following failed for good. The node ends.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// History or identity cannot be made durable.
    #[error("cannot follow: {0}")]
    Persist(String),
    /// The log cannot be truncated.
    #[error(transparent)]
    Log(#[from] walferry_engine::log::LogError),
    /// The store cannot go back.
    #[error(transparent)]
    Store(#[from] StoreError),
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
    Misfit(String),
}

enum Phase {
    /// Connect again then.
    Resting(Instant),
    /// A thread resolves the name and connects.
    Connecting(Inbox<std::io::Result<TcpStream>>),
    /// Said hello.
    Greeting,
    /// Frames come.
    Streaming,
    /// Waits for operations in flight, then rests.
    Closing,
}

/// What a replica knows of its link.
#[derive(Clone, Debug)]
pub struct FollowerStatus {
    /// The leader's peer address, as configured.
    pub leader: String,
    /// The leader's address for clients; empty until it was told.
    pub client_address: String,
    /// The link is up and accepted.
    pub connected: bool,
    /// The replica has all that the leader said it has.
    pub streaming: bool,
    /// For how long nothing was heard of the leader.
    pub silence: Duration,
    /// The leader's end of log, as last heard.
    pub leader_end: Lsn,
    /// Durable at the leader, as last heard.
    pub leader_flushed: Lsn,
    /// The commit LSN, as last heard.
    pub committed: Lsn,
    /// Why the last connection ended or was not made; empty when none did.
    pub last_error: String,
}

/// The link of a replica to its leader.
pub struct Follower {
    config: FollowerConfig,
    phase: Phase,
    socket: Option<TcpStream>,
    receiver: Receiver,
    acks: Acks,
    /// The receive in flight fills the log buffer; else, if any, the staging memory.
    receiving: Option<bool>,
    sending: bool,
    outgoing: Vec<u8>,
    sent: usize,
    /// A frame in the staging memory for which the log had no room.
    waiting_frame: Option<(usize, bool)>,
    heard_at: Instant,
    backoff: Duration,
    leader_flushed: Lsn,
    leader_end: Lsn,
    committed: Lsn,
    client_address: String,
    last_error: String,
    waker: Waker,
}

fn token(op: u64) -> u64 {
    Token::new(Owner::Peer, op).into()
}

impl Follower {
    /// A link that connects at the first `poll`. `leader_flushed` and `committed` are what the recovered log says of its leader.
    pub fn new(config: FollowerConfig, leader_flushed: Lsn, committed: Lsn, waker: Waker, now: Instant) -> Follower {
        Follower {
            config,
            phase: Phase::Resting(now),
            socket: None,
            receiver: Receiver::default(),
            acks: Acks::new(now),
            receiving: None,
            sending: false,
            outgoing: Vec::new(),
            sent: 0,
            waiting_frame: None,
            heard_at: now,
            backoff: BACKOFF_MIN,
            leader_flushed,
            leader_end: Lsn::ZERO,
            committed,
            client_address: String::new(),
            last_error: String::new(),
            waker,
        }
    }

    /// The cluster that the node belongs to; 0 until a leader told it.
    pub fn cluster_id(&self) -> u128 {
        self.config.meta.cluster_id
    }

    /// The store may hold what ends at or before this: what the leader had made durable.
    pub fn apply_limit(&self) -> Lsn {
        self.leader_flushed
    }

    /// The commit LSN as the leader last told it.
    pub fn committed(&self) -> Lsn {
        self.committed
    }

    /// What the link is doing.
    pub fn status(&self, log: &Log, now: Instant) -> FollowerStatus {
        let connected = matches!(self.phase, Phase::Streaming);
        FollowerStatus {
            leader: self.config.leader.clone(),
            client_address: self.client_address.clone(),
            connected,
            streaming: connected && log.sealed() >= self.leader_end,
            silence: now.saturating_duration_since(self.heard_at),
            leader_end: self.leader_end,
            leader_flushed: self.leader_flushed,
            committed: self.committed,
            last_error: self.last_error.clone(),
        }
    }

    /// When `poll` is due at the latest.
    pub fn next_timeout(&self, now: Instant) -> Option<Duration> {
        let at = match &self.phase {
            Phase::Resting(until) => *until,
            Phase::Connecting(_) | Phase::Closing => return None,
            Phase::Greeting => self.heard_at + self.config.peer_timeout,
            Phase::Streaming => now + self.config.heartbeat_interval,
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
    ) -> Result<(), FollowError> {
        match &self.phase {
            Phase::Resting(until) => {
                // What the replica says it has must be durable, and the end of its log.
                if now >= *until && log.idle() && log.flushed() == log.sealed() && log.stopped().is_none() {
                    self.connect();
                }
            }
            Phase::Connecting(inbox) => match inbox.try_recv() {
                Ok(Ok(stream)) => self.greet(stream, log, history, now),
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
                    self.rest(now);
                }
            }
        }
        self.advance(ring, log, store, history, now)
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
    ) -> Result<(), FollowError> {
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
                if !into_log {
                    self.receiver.advance(bytes as usize);
                } else if let Err(error) = self.received_raw(bytes as usize, log, now) {
                    self.fail(error, now);
                }
            }
            Err(error) => self.fail(LinkError::Io(error), now),
        }
        self.advance(ring, log, store, history, now)
    }

    fn connect(&mut self) {
        let (outbox, inbox) = channel();
        let (leader, timeout, waker) = (self.config.leader.clone(), self.config.peer_timeout, self.waker.clone());
        // A name server may take its time: not on the ring's thread.
        let spawned = std::thread::Builder::new().name("connect".to_owned()).spawn(move || {
            // Nobody waits for it any more when the link was closed meanwhile.
            let _ = outbox.send(connect_to(&leader, timeout));
            waker.wake();
        });
        match spawned {
            Ok(_) => self.phase = Phase::Connecting(inbox),
            Err(error) => self.fail(LinkError::Io(error), Instant::now()),
        }
    }

    fn greet(&mut self, stream: TcpStream, log: &Log, history: &EpochHistory, now: Instant) {
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
            history: entries[newest..].to_vec(),
        };
        self.receiver.reset();
        self.acks = Acks::new(now);
        self.outgoing.clear();
        self.sent = 0;
        Message::Hello(hello).encode(&mut self.outgoing);
        self.socket = Some(stream);
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
    ) -> Result<(), FollowError> {
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
                Ok(Progress::Wait) => break,
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
                self.backoff = BACKOFF_MIN;
                self.last_error.clear();
                Ok(Progress::Again)
            }
            Step::Refuse(refuse) => Err(LinkError::Refused { code: refuse.code, text: refuse.text }.into()),
            Step::Frame { wire_bytes, traced } => self.take_frame(wire_bytes, traced, log, now),
            Step::Heartbeat(heartbeat) => {
                self.heard(heartbeat, now);
                Ok(Progress::Again)
            }
            Step::Raw => self.take_raw(log, now),
        }
    }

    fn heard(&mut self, heartbeat: Heartbeat, now: Instant) {
        self.leader_end = heartbeat.end;
        self.leader_flushed = self.leader_flushed.max(heartbeat.flushed);
        self.committed = self.committed.max(heartbeat.committed);
        self.acks.handle_heartbeat(heartbeat.sent_at_us, now);
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
        log.receive_advance(bytes, now)?;
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
        self.adopt(welcome)?;
        let merged = merge(history, &welcome.history).ok_or_else(|| {
            LinkError::Misfit("the leader's epoch history does not ascend: its data directory is damaged".to_owned())
        })?;
        let start = welcome.start;
        if start < store.durable_applied() {
            let text = format!(
                "the leader's log parts from ours at {start}, but our store holds {} already: remove this node's data directory \
                 and start it again to copy everything anew",
                store.durable_applied()
            );
            return Err(LinkError::Misfit(text).into());
        }
        if merged != *history {
            merged.save(&self.config.dir).map_err(|error| FollowError::Persist(error.to_string()))?;
            *history = merged;
        }
        if start < log.sealed() {
            tracing::warn!(
                from = %start, to = %log.sealed(), leader = %welcome.name,
                "our log is ahead of the leader's: what nobody acknowledged is cut off"
            );
            log.truncate(start, history).map_err(FollowError::from)?;
            self.leader_flushed = self.leader_flushed.min(start);
            self.committed = self.committed.min(start);
            if store.applied() > start {
                store.rollback().map_err(FollowError::from)?;
            }
        } else {
            log.follow(history);
        }
        if let Some(link) = self.socket.as_ref().and_then(|socket| socket.peer_addr().ok()) {
            self.client_address = reachable(&welcome.client_address, link);
        }
        tracing::info!(leader = %welcome.name, address = %self.config.leader, %start, "following");
        Ok(())
    }

    fn adopt(&mut self, welcome: &Welcome) -> Result<(), StepError> {
        if self.config.meta.cluster_id == 0 {
            self.config.meta.cluster_id = welcome.cluster_id.0;
            self.config.meta.save(&self.config.dir).map_err(|error| FollowError::Persist(error.to_string()))?;
            tracing::info!(cluster = %welcome.cluster_id, "joined the leader's cluster");
        }
        if self.config.meta.cluster_id != welcome.cluster_id.0 {
            let ours = ClusterId(self.config.meta.cluster_id);
            let text = format!("the leader belongs to cluster {}, this node to {ours}", welcome.cluster_id);
            return Err(LinkError::Misfit(text).into());
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
                let ledger = log.ledger();
                let (flushes, records) = (ledger.flushes(), ledger.records());
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
        if let LinkError::Refused { code, .. } = &error
            && *code != RefuseCode::NotLeader
            && *code != RefuseCode::Stopping
        {
            // Trying again at once would get the same answer.
            self.backoff = BACKOFF_MAX;
        }
        if let LinkError::Misfit(_) = error {
            self.backoff = BACKOFF_MAX;
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
        // Chance without a dependency: the seed that the standard library gives each hash map.
        let chance = RandomState::new().build_hasher().finish() as u32 % 1000;
        let pause = self.backoff - self.backoff / JITTER_SHARE * chance / 1000;
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
    /// The log has no room: its disk is behind.
    Wait,
}

enum StepError {
    Link(LinkError),
    Follow(FollowError),
}

impl From<LinkError> for StepError {
    fn from(error: LinkError) -> StepError {
        StepError::Link(error)
    }
}

impl From<FollowError> for StepError {
    fn from(error: FollowError) -> StepError {
        StepError::Follow(error)
    }
}

/// The leader's history with our older epochs in front, where it was told the newest only.
fn merge(ours: &EpochHistory, theirs: &[(Epoch, Lsn)]) -> Option<EpochHistory> {
    let older = ours.entries().iter().filter(|entry| theirs.first().is_some_and(|first| entry.0 < first.0));
    let older = older.filter(|_| theirs.len() == EPOCHS_PER_MESSAGE_MAX);
    EpochHistory::from_entries(&older.chain(theirs).copied().collect::<Vec<_>>())
}

fn connect_to(leader: &str, timeout: Duration) -> std::io::Result<TcpStream> {
    let mut last = std::io::Error::new(std::io::ErrorKind::NotFound, format!("{leader} has no address"));
    for address in leader.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, timeout) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                // More than the default window for long links; the kernel caps it at net.core.rmem_max.
                let _ = nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::RcvBuf, &SOCKET_RECEIVE_BYTES);
                return Ok(stream);
            }
            Err(error) => last = std::io::Error::new(error.kind(), format!("cannot connect to {address}: {error}")),
        }
    }
    Err(last)
}
