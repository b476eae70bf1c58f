//! The node: its log, store and links, and what its sessions may ask of them (`Host`). Driven by `reactor`.
//!
//! Its duties, once a turn (`poll`), in this order: 1. seal and submit what was appended; 2. ship it, or follow; 3. apply what
//! became durable; 4. move the commit LSN, checkpoints and retention; 5. say whose replies are released.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use walferry_applier::follower::{Follower, FollowerConfig};
use walferry_applier::pending::Pending;
use walferry_applier::replay;
use walferry_applier::store::{Store, StoreConfig};
use walferry_cluster::level::CommitLevel;
use walferry_cluster::member::{ClusterId, MemberName};
use walferry_engine::epoch::EpochHistory;
use walferry_engine::lock::DirLock;
use walferry_engine::log::{Log, LogConfig, LogError};
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_engine::meta::Meta;
use walferry_engine::ring::{Completion, Ring};
use walferry_engine::waker::Waker;
use walferry_shipper::shipper::{Shipper, ShipperConfig};

use super::DaemonError;
use super::commit_queue::CommitQueue;
use super::host::SessionId;
use super::parking::{News, Parking};
use super::waterfall::{LEVELS, ReplicaReached, Step, Waterfall};
use crate::config::{NodeConfig, OnSyncLoss};

/// What the node is for its cluster.
pub(super) enum Role {
    /// It takes writes and ships them.
    Leader(Box<Shipper>),
    /// It follows a leader.
    Replica(Box<Follower>),
    /// It took writes until its log failed or a newer leader appeared; it answers reads and says why.
    SteppedDown(String),
}

/// What of a turn of the loop all duties share.
#[derive(Clone, Copy)]
struct Clock {
    now: Instant,
    wall_us: u64,
}

/// One node.
pub struct Node {
    pub(super) config: NodeConfig,
    pub(super) meta: Meta,
    pub(super) client_address: SocketAddr,
    pub(super) log: Log,
    pub(super) store: Store,
    pub(super) pending: Pending,
    pub(super) history: EpochHistory,
    pub(super) role: Role,
    /// The link of a replica that was promoted, until nothing of it is in flight.
    retired: Option<Box<Follower>>,
    pub(super) queue: CommitQueue,
    pub(super) parking: Parking,
    /// Observes commits; nothing asks it.
    pub(super) waterfall: Waterfall,
    pub(super) clients: usize,
    pub(super) commands: u64,
    pub(super) started: Instant,
    waker: Waker,
    clock: Clock,
    /// Commands execute once the store holds the log up to here: its end when this leadership began.
    lead_from: Lsn,
    /// What was told to sessions last, to see what moved.
    applied_seen: Lsn,
    acknowledged_seen: u64,
    /// Why the node has to step down; done with the next turn.
    failure: Option<String>,
    abandoned: Option<String>,
    /// The sync set is lost, since when, and what `on_sync_loss` makes of remote levels.
    pub(super) sync_loss: Option<SyncLoss>,
    more_to_apply: bool,
}

/// The sync policy has too few replicas to ask.
pub(super) struct SyncLoss {
    /// What is missing.
    pub(super) text: String,
    /// The level that stands in for remote ones, when the node degrades.
    pub(super) degraded: Option<CommitLevel>,
}

fn refused(error: impl std::fmt::Display) -> DaemonError {
    DaemonError::Refused(error.to_string())
}

impl Node {
    /// Opens log and store, replays what the store has not seen, and takes the role that the configuration names.
    pub fn open(
        config: NodeConfig,
        client_address: SocketAddr,
        ring: &mut Ring,
        waker: Waker,
    ) -> Result<Node, DaemonError> {
        let meta = crate::init::open_or_init(&config)?;
        let mut history = EpochHistory::load(&config.data).map_err(refused)?;
        let log_config = LogConfig {
            dir: config.data.clone(),
            segment_bytes: meta.segment_bytes,
            write_depth: config.write_depth.unwrap_or(meta.write_depth),
            sync_method: config.sync_method.unwrap_or(meta.sync_method),
            buffered: config.buffered,
            commit_delay: config.commit_delay,
            log_buffer_bytes: config.log_buffer_bytes,
            keep_bytes_min: config.keep_bytes_min,
        };
        // The lock comes before anything else of the directory is touched.
        let lock = DirLock::take(&config.data).map_err(LogError::from)?;
        let wake_on_checkpoint = waker.clone();
        let store_config = StoreConfig {
            checkpoint_bytes: usize::try_from(config.checkpoint_bytes).unwrap_or(usize::MAX),
            cache_bytes: config.store_cache_bytes,
        };
        let store = Store::open(&config.data.join("store"), store_config, Box::new(move || wake_on_checkpoint.wake()))?;
        let (log, recovery) = Log::open_locked(log_config, lock, store.applied(), &history, ring, waker.clone())?;
        if let Some(cut) = &recovery.cut {
            tracing::warn!(lsn = %cut.lsn, reason = %cut.reason, "a torn tail was cut from the log: it was never acknowledged");
        }
        tracing::info!(end = %recovery.end, applied = %store.applied(), "log recovered");
        let replica = config.follow.is_some();
        if !replica {
            begin_epoch(&mut history, &log, &config)?;
        }
        let now = Instant::now();
        let mut node = Node {
            role: Role::SteppedDown("the node is starting".to_owned()),
            retired: None,
            meta,
            client_address,
            log,
            store,
            pending: Pending::default(),
            history,
            queue: CommitQueue::default(),
            parking: Parking::default(),
            waterfall: Waterfall::new(config.waterfall),
            clients: 0,
            commands: 0,
            started: now,
            waker,
            clock: Clock { now, wall_us: 0 },
            lead_from: Lsn::ZERO,
            applied_seen: Lsn::ZERO,
            acknowledged_seen: 0,
            failure: None,
            abandoned: None,
            sync_loss: None,
            more_to_apply: false,
            config,
        };
        node.set_now(now, SystemTime::now());
        node.role = if replica { node.follow(recovery.leader_flushed, recovery.committed)? } else { node.lead()? };
        // Before the first client: what the store has not seen yet of what is certain.
        while node.apply()? {}
        Ok(node)
    }

    /// The shipper of a new leadership; its epoch is persisted already.
    fn lead(&mut self) -> Result<Role, DaemonError> {
        let epoch = self.history.last_epoch();
        self.log.lead(epoch);
        self.lead_from = self.log.sealed();
        let config = ShipperConfig {
            dir: self.config.data.clone(),
            cluster_id: ClusterId(self.meta.cluster_id),
            name: self.member_name()?,
            client_address: self.client_address.to_string(),
            segment_bytes: self.meta.segment_bytes,
            peer_timeout: self.config.peer_timeout,
            heartbeat_interval: self.config.heartbeat_interval,
            slot_keep_bytes_max: self.config.slot_keep_bytes_max,
            replica_lag_time_max: self.config.replica_lag_time_max,
            min_in_sync: self.config.min_in_sync,
            policy: self.config.sync.clone(),
            zero_copy_bytes_min: self.config.zero_copy_bytes_min,
        };
        let shipper = Shipper::new(config, self.waker.clone()).map_err(refused)?;
        tracing::info!(%epoch, start = %self.log.end(), sync = %self.config.sync, "leading");
        Ok(Role::Leader(Box::new(shipper)))
    }

    fn member_name(&self) -> Result<MemberName, DaemonError> {
        self.config.name.parse().map_err(refused)
    }

    /// The link of a replica.
    fn follow(&mut self, leader_flushed: Lsn, committed: Lsn) -> Result<Role, DaemonError> {
        let leader = self.config.follow.as_ref().expect("a replica has a leader to follow").to_string();
        let config = FollowerConfig {
            dir: self.config.data.clone(),
            leader,
            client_address: self.client_address.to_string(),
            meta: self.meta.clone(),
            name: self.member_name()?,
            peer_timeout: self.config.peer_timeout,
            heartbeat_interval: self.config.heartbeat_interval,
        };
        let (waker, now) = (self.waker.clone(), self.clock.now);
        Ok(Role::Replica(Box::new(Follower::new(config, leader_flushed, committed, waker, now))))
    }

    /// Makes this replica a leader in a new epoch.
    pub(super) fn promote_now(&mut self) -> Result<Epoch, String> {
        let follower = match &mut self.role {
            Role::Replica(follower) => follower,
            Role::Leader(_) => return Err("this node leads already".to_owned()),
            Role::SteppedDown(reason) => return Err(format!("this node has stepped down: {reason}")),
        };
        if let Some(reason) = self.log.stopped() {
            return Err(reason.to_owned());
        }
        if follower.cluster_id() == 0 {
            return Err(
                "this node has never met a leader: it has no data to lead with; start it without --follow".to_owned()
            );
        }
        if !follower.close() {
            return Err("the replica is receiving a part of its leader's log this moment; try again".to_owned());
        }
        self.meta.cluster_id = follower.cluster_id();
        // What was received only in part is nobody's; what is whole is the new leader's log.
        self.log.receive_reset();
        begin_epoch(&mut self.history, &self.log, &self.config).map_err(|error| error.to_string())?;
        let leader = self.lead().map_err(|error| error.to_string())?;
        if let Role::Replica(follower) = std::mem::replace(&mut self.role, leader) {
            self.retired = Some(follower);
        }
        Ok(self.history.last_epoch())
    }

    /// The configuration.
    pub fn config(&self) -> &NodeConfig {
        &self.config
    }

    /// One line for logs and the service manager.
    pub fn describe(&self) -> String {
        let epoch = self.history.last_epoch();
        match (&self.role, &self.config.follow) {
            (Role::Leader(_), _) => format!("leader {} in epoch {epoch} at {}", self.config.name, self.log.end()),
            (Role::Replica(_), Some(leader)) => {
                format!("replica {} of {leader} at {}", self.config.name, self.log.end())
            }
            (Role::Replica(_), None) => format!("replica {}", self.config.name),
            (Role::SteppedDown(reason), _) => format!("{} stepped down: {reason}", self.config.name),
        }
    }

    /// The time of this turn.
    pub fn set_now(&mut self, now: Instant, wall: SystemTime) {
        let wall_us = wall.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64);
        self.clock = Clock { now, wall_us };
    }

    pub(super) fn now(&self) -> Instant {
        self.clock.now
    }

    pub(super) fn wall_us(&self) -> u64 {
        self.clock.wall_us
    }

    /// How long the loop may sleep at most; none: until something completes.
    pub fn timeout(&self, now: Instant) -> Option<Duration> {
        if self.more_to_apply || self.failure.is_some() {
            return Some(Duration::ZERO);
        }
        let link = match &self.role {
            Role::Leader(shipper) => shipper.next_timeout(now),
            Role::Replica(follower) => follower.next_timeout(now),
            Role::SteppedDown(_) => None,
        };
        link.into_iter().chain(self.log.next_timeout(now)).min()
    }

    /// A write of the log ended.
    pub fn handle_log(&mut self, completion: &Completion) {
        if let Err(failure) = self.log.handle_completion(completion, self.clock.now) {
            self.failure = Some(failure.to_string());
        }
    }

    /// An operation on a link ended.
    pub fn handle_peer(&mut self, completion: &Completion, ring: &mut Ring) -> Result<(), DaemonError> {
        let now = self.clock.now;
        if let Some(follower) = &mut self.retired {
            follower.handle_late_completion(completion);
            if follower.is_quiet() {
                self.retired = None;
            }
        }
        match &mut self.role {
            Role::Leader(shipper) => shipper.handle_completion(completion, ring, &mut self.log, now),
            Role::Replica(follower) => follower
                .handle_completion(completion, ring, &mut self.log, &mut self.store, &mut self.history, now)
                .map_err(refused)?,
            Role::SteppedDown(_) => {}
        }
        Ok(())
    }

    /// A peer connected.
    pub fn accept_peer(&mut self, socket: OwnedFd, address: SocketAddr, ring: &mut Ring, now: Instant) {
        match &mut self.role {
            Role::Leader(shipper) => shipper.accept(socket, address, ring, now),
            Role::Replica(_) | Role::SteppedDown(_) => walferry_shipper::refuse::not_leading(socket, &self.describe()),
        }
    }

    /// Seals and submits what was appended, and ships it.
    pub fn submit(&mut self, ring: &mut Ring) {
        self.log.poll(ring, self.clock.now);
        if self.waterfall.is_following() {
            let now = Instant::now();
            self.waterfall.reached(Step::Sealed, self.log.sealed(), now);
            self.waterfall.reached(Step::Submitted, self.log.written(), now);
        }
        if let Role::Leader(shipper) = &mut self.role {
            shipper.poll(ring, &mut self.log, &self.history, self.clock.now);
            if self.waterfall.is_following() {
                follow_replicas(&mut self.waterfall, shipper, self.clock.now);
            }
        }
    }

    /// The node's duties of one turn; `ready` gets the sessions that may go on.
    pub fn poll(&mut self, ring: &mut Ring, ready: &mut Vec<SessionId>) -> Result<(), DaemonError> {
        self.submit(ring);
        self.more_to_apply = self.apply()?;
        if self.waterfall.is_following() {
            self.waterfall.reached(Step::Flushed, self.log.flushed(), self.clock.now);
            self.waterfall.reached(Step::Applied, self.store.applied(), Instant::now());
        }
        if let Role::Replica(follower) = &mut self.role {
            let now = self.clock.now;
            follower.poll(ring, &mut self.log, &mut self.store, &mut self.history, now).map_err(refused)?;
            // What the link received is written with this turn.
            self.log.poll(ring, now);
        }
        self.advance()?;
        self.watch_sync_set();
        self.release(ready);
        if let Role::Leader(shipper) = &self.role
            && let Some(epoch) = shipper.superseded()
        {
            let text =
                format!("epoch {epoch} has begun elsewhere: start this node with --follow and its leader's address");
            self.failure = Some(text);
        }
        if let Some(reason) = self.failure.take() {
            self.step_down(reason, ring);
        }
        Ok(())
    }

    /// The end of a turn: what was released in it is handed to the sockets. For the accounting.
    pub fn account(&mut self) {
        if self.waterfall.is_following() {
            if let Role::Leader(shipper) = &mut self.role {
                for (name, traced) in shipper.take_traced() {
                    self.waterfall.traced(name.as_str(), traced);
                }
            }
            let released = LEVELS.map(|level| self.released_at(level));
            self.waterfall.replied(|level| released[level as usize], Instant::now());
        }
        self.waterfall.account(self.log.ledger().flushes(), self.clock.now);
    }

    /// Applies what became durable here; on a replica no further than what its leader calls durable. True when there is more.
    fn apply(&mut self) -> Result<bool, DaemonError> {
        let limit = match &self.role {
            Role::Leader(_) | Role::SteppedDown(_) => Lsn::MAX,
            Role::Replica(follower) => follower.apply_limit(),
        };
        let more = replay::apply_flushed(&mut self.log, &mut self.store, limit).map_err(refused)?;
        self.pending.forget(self.store.applied());
        Ok(more)
    }

    pub(super) fn committed(&self) -> Lsn {
        match &self.role {
            Role::Leader(shipper) => shipper.committed(self.log.flushed()),
            Role::Replica(follower) => follower.committed(),
            Role::SteppedDown(_) => Lsn::ZERO,
        }
    }

    /// Moves what depends on acknowledgements: the commit LSN, checkpoints, retention.
    fn advance(&mut self) -> Result<(), DaemonError> {
        let committed = self.committed();
        self.log.set_committed(committed);
        self.store.poll_checkpoint(committed)?;
        let slots = match &self.role {
            Role::Leader(shipper) => shipper.slots_hold(),
            Role::Replica(_) | Role::SteppedDown(_) => Lsn::MAX,
        };
        self.log.release_before(self.store.durable_applied().min(slots));
        Ok(())
    }

    /// Notices when the sync set is lost or back, and says so loudly.
    fn watch_sync_set(&mut self) {
        let Role::Leader(shipper) = &self.role else { return };
        match (shipper.sync_shortage(), &self.sync_loss) {
            (Some(text), None) => {
                let degraded = match self.config.on_sync_loss {
                    OnSyncLoss::Degrade(level) => Some(level),
                    OnSyncLoss::Block | OnSyncLoss::Refuse => None,
                };
                tracing::warn!(on_sync_loss = %self.config.on_sync_loss, "the sync set is lost: {text}");
                self.sync_loss = Some(SyncLoss { text, degraded });
            }
            (None, Some(_)) => {
                tracing::info!("the sync set is back");
                self.sync_loss = None;
            }
            _ => {}
        }
    }

    /// Finds the sessions that may go on.
    fn release(&mut self, ready: &mut Vec<SessionId>) {
        let mut queue = std::mem::take(&mut self.queue);
        queue.release(|level| self.released_at(level), ready);
        self.queue = queue;
        if self.parking.is_empty() {
            return;
        }
        let applied = self.store.applied();
        let acknowledgements = match &self.role {
            Role::Leader(shipper) => shipper.acknowledgements(),
            Role::Replica(_) | Role::SteppedDown(_) => 0,
        };
        let news = News {
            room: self.has_room(),
            applied: (applied != self.applied_seen).then_some(applied),
            acknowledged: acknowledgements != self.acknowledged_seen || applied != self.applied_seen,
        };
        self.applied_seen = applied;
        self.acknowledged_seen = acknowledgements;
        self.parking.wake(news, ready);
    }

    /// Commits up to the LSN that this gives hold `level`. `Local` follows the store: what is answered can be read.
    pub(super) fn released_at(&self, level: CommitLevel) -> Lsn {
        let applied = self.store.applied();
        match (&self.role, level) {
            (_, CommitLevel::Off) => Lsn::MAX,
            (_, CommitLevel::Local) => applied,
            (Role::Leader(shipper), level) => {
                let degraded = self.sync_loss.as_ref().and_then(|loss| loss.degraded);
                match degraded.map_or(level, |degraded| degraded.min(level)) {
                    CommitLevel::Off => Lsn::MAX,
                    CommitLevel::Local => applied,
                    remote => shipper.released(remote, self.log.flushed()).min(applied),
                }
            }
            // Nobody confirms commits here any more.
            (Role::Replica(_) | Role::SteppedDown(_), _) => Lsn::ZERO,
        }
    }

    /// Why commits at `level` are refused for want of replicas.
    pub(super) fn refuses(&self, shipper: &Shipper, level: CommitLevel) -> Option<String> {
        if level <= CommitLevel::Local || self.sync_loss.as_ref().is_some_and(|loss| loss.degraded.is_some()) {
            return None;
        }
        let lost = self.sync_loss.as_ref().filter(|_| self.config.on_sync_loss == OnSyncLoss::Refuse);
        shipper.refuses(level).or_else(|| lost.map(|loss| loss.text.clone()))
    }

    /// True when commands can be executed and their records appended.
    pub(super) fn has_room(&self) -> bool {
        !self.store.overloaded() && self.log.has_room() && self.store.applied() >= self.lead_from
    }

    /// Takes no more writes, and answers the ones that wait with what is known of them.
    fn step_down(&mut self, reason: String, ring: &mut Ring) {
        match &mut self.role {
            Role::SteppedDown(_) => return,
            Role::Leader(shipper) => shipper.close_all(ring, &mut self.log, self.clock.now),
            Role::Replica(_) => {}
        }
        tracing::error!("stepping down, this node takes no writes and acknowledges nothing more: {reason}");
        let before = std::mem::replace(&mut self.role, Role::SteppedDown(reason.clone()));
        if let Role::Replica(mut follower) = before {
            follower.close();
            self.retired = Some(follower);
        }
        self.waterfall.abandon();
        self.abandoned = Some(reason);
    }

    /// Why held replies will not be confirmed, told once.
    pub fn take_abandoned(&mut self) -> Option<String> {
        self.abandoned.take()
    }

    /// What the clients' side counted.
    pub fn count(&mut self, clients: usize, commands: u64) {
        self.clients = clients;
        self.commands += commands;
    }

    /// The replica's or leader's connections end; every record that was answered is on disk already.
    pub fn close(mut self, ring: &mut Ring) -> Result<(), DaemonError> {
        let committed = self.committed();
        if let Role::Leader(shipper) = &mut self.role {
            shipper.close_all(ring, &mut self.log, self.clock.now);
        }
        if let Role::Replica(follower) = &mut self.role {
            follower.close();
        }
        let end = self.log.flushed();
        self.store.close(committed)?;
        self.log.shutdown(ring)?;
        tracing::info!(%end, "closed");
        Ok(())
    }
}

/// Tells the accounting how far the replicas are; what they were sent was sent just now.
fn follow_replicas(waterfall: &mut Waterfall, shipper: &Shipper, heard_at: Instant) {
    let sent_at = Instant::now();
    for (name, progress) in shipper.progress() {
        let reached = ReplicaReached {
            sent: progress.sent(),
            written: progress.written(),
            flushed: progress.flushed(),
            applied: progress.applied(),
        };
        waterfall.replica_reached(name.as_str(), reached, sent_at, heard_at);
    }
}

/// Begins the next epoch at the end of the log. Persisted before its first frame exists.
fn begin_epoch(history: &mut EpochHistory, log: &Log, config: &NodeConfig) -> Result<(), DaemonError> {
    history.push(history.last_epoch().next(), log.sealed()).map_err(refused)?;
    history.save(&config.data).map_err(refused)
}
