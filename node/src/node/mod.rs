//! The node: its log, store and links, and what its sessions may ask of them (`Host`). Driven by `reactor`.
//!
//! Its duties, once a turn (`poll`), in this order: 1. seal and submit what was appended; 2. ship it, or follow; 3. apply what
//! became durable; 4. move the commit LSN, checkpoints and retention; 5. say whose replies are released.

mod base;
pub mod description;
mod facts;
mod scrub;
pub mod turn;
#[cfg(test)]
mod turn_tests;

use std::cell::RefCell;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use walferry_applier::base::install;
use walferry_applier::follower::{Follower, FollowerConfig};
use walferry_applier::pending::Pending;
use walferry_applier::replay::{self, Applied};
use walferry_applier::store::{KeyCount, SPACE_CHECKPOINT_BYTES_MIN, STORE_DIR, Store, StoreConfig, StoreError};
use walferry_cluster::consensus::REGISTER_FILE;
use walferry_cluster::handover::Handover;
use walferry_cluster::level::CommitLevel;
use walferry_cluster::member::{Caller, ClusterId, MemberName, reachable_member};
use walferry_cluster::policy::SyncPolicy;
use walferry_cluster::register::MemberId;
use walferry_engine::epoch::EpochHistory;
use walferry_engine::held::{HeldFile, HeldFiles};
use walferry_engine::lock::DirLock;
use walferry_engine::log::{Log, LogConfig, LogError};
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_engine::meta::Meta;
use walferry_engine::mutants;
use walferry_engine::prepare::free_bytes;
use walferry_engine::recover::Recovery;
use walferry_engine::ring::{Completion, Owner, Ring};
use walferry_engine::told::Told;
use walferry_engine::waker::Waker;
use walferry_engine::world;
use walferry_shipper::lend::{Holding, Lendings};
use walferry_shipper::shipper::{Shipper, ShipperConfig};

use crate::clients::limits::ClientCounts;
use crate::clients::list::Asked;
use crate::config::{ConfigError, NodeConfig, OnSyncLoss};
use crate::error::{DaemonError, refused};
use crate::membership::Membership;
use crate::metrics::waterfall::{LEVELS, LevelsReached, ReplicaReached, Step, Waterfall};
use crate::node::base::BaseCopies;
use crate::node::scrub::{Scrub, Unreadable};
use crate::repair::{self, RepairCount};
use crate::role;
use crate::session::commit_queue::CommitQueue;
use crate::session::host::{COUNT_TIME_MAX, SessionId};
use crate::session::parking::{News, Parking};
use crate::tls::Tls;
use crate::users::Users;
use crate::users::login::Checker;
use crate::watchdog::Watchdog;

/// What the node is for its cluster.
pub(super) enum Role {
    /// It takes writes and ships them.
    Leader(Box<Shipper>),
    /// It follows a leader.
    Replica(Box<Follower>),
    /// A member of a cluster that has no leader for it at the moment; why. It answers reads.
    Leaderless(String),
    /// It took writes until its log failed or a newer leader appeared; it answers reads and says why.
    SteppedDown(String),
}

/// A new leader's sync set is not called lost before this.
const SETTLE_TIME: Duration = Duration::from_secs(1);
/// A leader that no majority of the members confirms answers its writes after so long, unless `commit_timeout` says otherwise.
const SILENT_TIME_MAX: Duration = Duration::from_secs(5);
/// A leader that has to end waits so many election timeouts for the next one: it may be the member that controls the register.
const REPLACED_TIMEOUTS_MAX: u32 = 4;
/// Log behind the newest checkpoint, as a multiple of `checkpoint_bytes`, that calls for another one.
const LOG_CHECKPOINTS_MAX: u64 = 8;
/// No more changes are taken while those that are not durable yet need so much memory. A frame holds no others, so what a replica needs
/// to apply one is bounded by this and by one transaction (`APPENDED_TO_BYTES_MAX`).
const PENDING_BYTES_MAX: usize = 128 << 20;
/// Changes get a checkpoint after so long, however few they are (PostgreSQL's checkpoint_timeout).
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(300);
/// How often it is looked how much space the disk has left.
const SPACE_LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// With less than so many times what the next checkpoint needs, space is scarce.
const SPACE_SCARCE_SHARE: u64 = 4;
/// Old log is not read again sooner than this after the last time.
const SCRUB_PAUSE: Duration = Duration::from_secs(5);

/// Changed keys that are looked up in one turn at most, to count the store's keys.
pub(super) const COUNT_LOOKUPS_PER_TURN_MAX: usize = 512;
/// So many at once; then the time is looked at. Where the store's file is not in memory each of them reads from the disk.
const COUNT_LOOKUPS_AT_ONCE: usize = 32;
/// After so long the next turn goes on.
const COUNT_TURN_TIME_MAX: Duration = Duration::from_millis(2);

/// How far a leader was.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Heard {
    /// Durable at the leader: the store may hold it.
    pub(super) flushed: Lsn,
    /// Confirmed by the sync policy.
    pub(super) committed: Lsn,
    /// The store is as fresh as the leader's was then, by this node's clock; `None` when that is not known.
    pub(super) fresh: Option<Instant>,
    /// When anything came from a leader, or this node led itself; `None` before.
    pub(super) at: Option<Instant>,
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
    /// Where clients of other hosts connect: to TLS, where there is a port for it.
    pub(super) client_address: SocketAddr,
    /// How links are protected.
    pub(super) tls: Tls,
    pub(super) log: Log,
    pub(super) store: Store,
    /// Whether what log and store have open is still what stands in the data directory.
    held: HeldFiles,
    pub(super) pending: Pending,
    pub(super) history: EpochHistory,
    pub(super) role: Role,
    /// The link of a replica that was promoted, until nothing of it is in flight.
    pub(super) retired: Option<Box<Follower>>,
    /// Its seat in a cluster, if it is a member of one.
    pub(super) membership: Option<Membership>,
    /// What the log's last leader had made durable, and what was committed, as last heard; for the next link.
    pub(super) heard: Heard,
    /// Commits cut off from this log since the process started.
    pub(super) lost_commits: u64,
    /// Base copies that it makes, gives and takes.
    pub(super) base_copies: BaseCopies,
    /// What of its data was damaged and is whole again.
    pub(super) repaired: RepairCount,
    /// A walk over old log, and when the last one began.
    scrub: Option<Scrub>,
    scrubbed_at: Instant,
    scrub_told: Told,
    space_looked_at: Instant,
    /// It is looked with every turn.
    is_space_scarce: bool,
    /// What the shipper counted of broken catch-ups when it was looked last.
    catchups_broken: u64,
    /// Old log before this is damaged and nobody gave it back; else 0.
    readable_from: Lsn,
    /// Parts of the log that it lends while it does not lead.
    lendings: Lendings,
    pub(super) queue: CommitQueue,
    pub(super) parking: Parking,
    /// Observes commits; nothing asks it.
    pub(super) waterfall: Waterfall,
    pub(super) clients: ClientCounts,
    /// What sessions ask of all connections; answered by `clients` within the turn.
    pub(super) client_asks: Vec<Asked>,
    pub(super) logins: Checker,
    pub(super) commands: u64,
    pub(super) started: Instant,
    pub(super) waker: Waker,
    /// Who may connect; every session has it.
    pub(super) users: Rc<RefCell<Users>>,
    users_changed: bool,
    clock: Clock,
    /// When this leadership began.
    led_since: Instant,
    /// Commands execute once the store holds the log up to here: its end when this leadership began.
    lead_from: Lsn,
    /// What was told to sessions last, to see what moved.
    applied_seen: Lsn,
    acknowledged_seen: u64,
    epoch_seen: Epoch,
    led_seen: bool,
    fresh_seen: Option<Instant>,
    /// What the store held at the end of the last turn.
    applied_before: Lsn,
    /// Why the node has to step down and end; done with the next turn.
    failure: Option<String>,
    ending: Option<Ending>,
    abandoned: Option<String>,
    /// The sync set is lost, since when, and what `on_sync_loss` makes of remote levels.
    pub(super) sync_loss: Option<SyncLoss>,
    /// This node leads and holds no lease.
    silence: Option<Silence>,
    more_to_apply: bool,
    /// The store's keys are being counted, until then at the longest.
    counting_until: Option<Instant>,
    /// They were with this turn.
    counted: bool,
    /// The store went back in this turn.
    rolled_back: bool,
    /// How long turns and commands take.
    pub(super) watchdog: Watchdog,
}

/// A leader may answer nothing while no majority of the members confirms that it leads.
struct Silence {
    /// Since when nothing was answered for it.
    since: Instant,
    /// It has lasted too long: what was held was answered, and writes are refused until it ends.
    answered: bool,
}

/// The process ends. A member whose log has stopped can promise nothing: as long as it is up, it keeps others from choosing a leader.
struct Ending {
    reason: String,
    /// The newest epoch of this log.
    epoch: Epoch,
    /// It waits no longer than this for another leader.
    until: Instant,
}

/// The sync policy has too few replicas to ask.
pub(super) struct SyncLoss {
    /// What is missing.
    pub(super) text: String,
    /// The level that stands in for remote ones, when the node degrades.
    pub(super) degraded: Option<CommitLevel>,
}

/// What a data directory holds, open.
pub(super) struct Opened {
    pub(super) meta: Meta,
    pub(super) history: EpochHistory,
    pub(super) log: Log,
    pub(super) store: Store,
    pub(super) recovery: Recovery,
    pub(super) repaired: RepairCount,
}

/// Opens log and store; a base copy that was received is put in their place first, and damage is repaired. While a node that has
/// just started waits for others with that, it lends them what it has itself at `lends_at`.
pub(super) fn open_data(
    config: &NodeConfig,
    lock: DirLock,
    (lends_at, tls): (Option<&TcpListener>, &Tls),
    ring: &mut Ring,
    waker: &Waker,
) -> Result<Opened, DaemonError> {
    if let Some(facts) = install::finish(&config.data).map_err(refused)? {
        tracing::info!(base = %facts.base, bytes = facts.bytes, "a base copy was put in the place of log and store");
    }
    repair::mend_small_files(&config.data)?;
    let (mut lock, mut repaired) = (lock, RepairCount::default());
    loop {
        let mut opened = open_repaired(config, lock, (lends_at, tls), repaired, ring, waker)?;
        repaired = opened.repaired;
        let position = opened.store.durable_position();
        // What other nodes gave back of the log may be another one than the store was made from: the store was compared before.
        if repaired.ranges == 0 || repair::foreign_to_log(config, &opened.meta, &opened.history, &position)?.is_none() {
            return Ok(opened);
        }
        lock = opened.log.retire(ring)?;
    }
}

/// Opens log and store, once the store is known to fit what is there of the log, and the log to be whole.
fn open_repaired(
    config: &NodeConfig,
    lock: DirLock,
    (lends_at, tls): (Option<&TcpListener>, &Tls),
    mut repaired: RepairCount,
    ring: &mut Ring,
    waker: &Waker,
) -> Result<Opened, DaemonError> {
    let settle = || -> Result<(Meta, EpochHistory), DaemonError> {
        Ok((crate::data_dir::open_or_init(config)?, EpochHistory::load(&config.data).map_err(refused)?))
    };
    let (mut meta, mut history) = settle()?;
    if repair::settle_store(config, &meta, &history, tls, &mut repaired, waker)? {
        // A base copy in the place of a damaged store brings its leader's epochs.
        (meta, history) = settle()?;
    }
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
    let wake_on_checkpoint = waker.clone();
    let store_config = StoreConfig {
        checkpoint_bytes: usize::try_from(config.checkpoint_bytes).unwrap_or(usize::MAX),
        checkpoint_log_bytes: (config.slot_keep_bytes_max / 2)
            .min(config.checkpoint_bytes.saturating_mul(LOG_CHECKPOINTS_MAX)),
        checkpoint_interval: CHECKPOINT_INTERVAL,
        cache_bytes: config.store_cache_bytes,
    };
    let store = Store::open(&config.data.join(STORE_DIR), store_config, Box::new(move || wake_on_checkpoint.wake()))?;
    let repairer = repair::repairer(config, &meta, &history, tls)?;
    let (log, recovery) = repair::open_log(
        &log_config,
        lock,
        store.applied(),
        (&repairer, &mut repaired),
        lends_at.map(|at| (at, tls)),
        ring,
        waker,
    )?;
    if let Some(cut) = &recovery.cut {
        // What every crash leaves: nothing for an operator to do.
        tracing::info!(from = %cut.lsn, to = %cut.to, reason = %cut.reason, "a torn tail was cut from the log: it was being written in a crash, and was never acknowledged");
    }
    tracing::info!(end = %recovery.end, applied = %store.applied(), "log recovered");
    Ok(Opened { meta, history, log, store, recovery, repaired })
}

/// Whether the flags fit what the data directory is. Before it is made: one that is a witness's has no description, and is not to
/// get one.
pub fn check(config: &NodeConfig) -> Result<(), DaemonError> {
    role::check(&config.data, &config.role(), config.becoming)?;
    check_level(config)
}

/// Makes the data directory, if the flags fit what it is, and takes its lock, which comes before anything else of it is touched.
pub fn prepare(config: &NodeConfig) -> Result<DirLock, DaemonError> {
    check(config)?;
    let (wanted, becoming) = (config.role(), config.becoming);
    crate::data_dir::open_or_init(config)?;
    let lock = DirLock::take(&config.data).map_err(LogError::from)?;
    role::take(&config.data, &wanted, becoming)?;
    Ok(lock)
}

impl Node {
    /// Opens log and store of a prepared data directory, takes its first role, and replays what the store has not seen.
    pub fn open(
        (config, lock): (NodeConfig, DirLock),
        client_address: SocketAddr,
        (lends_at, tls): (Option<&TcpListener>, Tls),
        take_role: impl FnOnce(&mut Node) -> Result<(), DaemonError>,
        users: Rc<RefCell<Users>>,
        ring: &mut Ring,
        waker: Waker,
    ) -> Result<Node, DaemonError> {
        let Opened { meta, mut history, log, store, recovery, repaired } =
            open_data(&config, lock, (lends_at, &tls), ring, &waker)?;
        let leader = config.follow.is_none() && config.members.is_none();
        if leader {
            let epoch = history.last_epoch().next_alone(world::chance());
            begin_epoch(&mut history, &log, &config, epoch)?;
        }
        let now = world::now();
        let mut node = Node {
            role: Role::SteppedDown("the node is starting".to_owned()),
            retired: None,
            membership: None,
            heard: Heard { flushed: recovery.leader_flushed, committed: recovery.committed, fresh: None, at: None },
            lost_commits: 0,
            base_copies: BaseCopies::default(),
            repaired,
            lendings: Lendings::default(),
            scrub: None,
            scrubbed_at: now,
            scrub_told: Told::default(),
            space_looked_at: now,
            is_space_scarce: false,
            catchups_broken: 0,
            readable_from: Lsn::ZERO,
            meta,
            client_address,
            tls,
            held: HeldFiles::default(),
            log,
            store,
            pending: Pending::default(),
            history,
            queue: CommitQueue::default(),
            parking: Parking::default(),
            waterfall: Waterfall::new(config.waterfall),
            clients: ClientCounts::default(),
            client_asks: Vec::new(),
            logins: Checker::new(waker.clone()),
            commands: 0,
            started: now,
            waker,
            users,
            users_changed: false,
            clock: Clock { now, wall_us: 0 },
            led_since: now,
            lead_from: Lsn::ZERO,
            applied_seen: Lsn::ZERO,
            acknowledged_seen: 0,
            epoch_seen: Epoch(0),
            led_seen: false,
            fresh_seen: None,
            applied_before: Lsn::ZERO,
            failure: None,
            ending: None,
            abandoned: None,
            sync_loss: None,
            silence: None,
            more_to_apply: false,
            counting_until: None,
            counted: false,
            rolled_back: false,
            watchdog: Watchdog::default(),
            config,
        };
        node.set_now(now, world::wall_clock());
        take_role(&mut node)?;
        // With the register of a member, which is there by now.
        node.watch_files()?;
        // Before the first client: what the store has not seen yet of what is certain.
        node.replay()?;
        node.begin_scrub()?;
        Ok(node)
    }

    /// The first role of a node that is no member of a cluster: what its configuration says.
    pub(super) fn take_configured_role(&mut self) -> Result<(), DaemonError> {
        self.role = match self.config.follow.as_ref().map(ToString::to_string) {
            Some(leader) => self.follow(leader, Epoch(0))?,
            None => self.lead()?,
        };
        // Nobody waits for this node yet: it is better started again than up without a log.
        self.log.stopped().map_or(Ok(()), |reason| Err(refused(reason)))
    }

    /// The shipper of a new leadership; its epoch is persisted already.
    pub(super) fn lead(&mut self) -> Result<Role, DaemonError> {
        let epoch = self.history.last_epoch();
        self.log.lead(epoch);
        self.lead_from = self.log.sealed();
        let config = ShipperConfig {
            dir: self.config.data.clone(),
            cluster_id: ClusterId(self.meta.cluster_id),
            name: self.member_name()?,
            client_address: self.public_address(),
            segment_bytes: self.meta.segment_bytes,
            peer_timeout: self.config.peer_timeout,
            heartbeat_interval: self.config.heartbeat_interval,
            slot_keep_bytes_max: self.config.slot_keep_bytes_max,
            replica_lag_time_max: self.config.replica_lag_time_max,
            min_in_sync: self.config.min_in_sync,
            epoch_start: self.history.last_start(),
            policy: own_policy(&self.config)?,
            zero_copy_bytes_min: self.config.zero_copy_bytes_min,
            base_copy_rate: self.config.base_copy_rate,
        };
        let shipper = Shipper::new(config, self.waker.clone()).map_err(refused)?;
        self.led_since = self.clock.now;
        tracing::info!(%epoch, start = %self.log.end(), "leading");
        if self.membership.is_none()
            && let Some(reason) = self.nobody_confirms(&shipper, self.config.commit_level)
        {
            tracing::warn!("sessions that choose no other level have their writes refused: {reason}");
        }
        Ok(Role::Leader(Box::new(shipper)))
    }

    /// Where clients reach this node, as it tells the others.
    pub(super) fn public_address(&self) -> String {
        let own = self.member_name().ok().zip(self.config.members.as_ref());
        match own.and_then(|(name, members)| members.peer(&name)) {
            Some(peer) => reachable_member(self.client_address, &peer.to_string()),
            None => self.client_address.to_string(),
        }
    }

    pub(super) fn member_name(&self) -> Result<MemberName, DaemonError> {
        self.config.name.parse().map_err(refused)
    }

    /// The link of a replica.
    pub(super) fn follow(&mut self, leader: String, promised: Epoch) -> Result<Role, DaemonError> {
        if let Err(error) = walferry_shipper::base::file::clear(&self.config.data, true) {
            tracing::warn!("cannot remove the base copy of an earlier leadership: {error}");
        }
        let config = FollowerConfig {
            dir: self.config.data.clone(),
            leader,
            client_address: self.public_address(),
            meta: self.meta.clone(),
            name: self.member_name()?,
            member: self.membership.as_ref().map_or(MemberId(0), Membership::id),
            peer_timeout: self.config.peer_timeout,
            heartbeat_interval: self.config.heartbeat_interval,
            promised,
            may_cut_commits: self.config.becoming == Some(role::Becoming::Replica),
            links: self.tls.links(),
        };
        let (waker, now, heard) = (self.waker.clone(), self.clock.now, self.heard);
        let follower = Follower::new(config, heard.flushed, heard.committed, heard.fresh, waker, now);
        Ok(Role::Replica(Box::new(follower)))
    }

    /// Makes this replica a leader in a new epoch.
    pub(super) fn promote_now(&mut self) -> Result<Epoch, String> {
        if self.membership.is_some() {
            return Err("the members of a cluster choose their leader: SWITCHOVER TO this node asks them to".to_owned());
        }
        let follower = match &mut self.role {
            Role::Replica(follower) => follower,
            Role::Leaderless(reason) => return Err(reason.clone()),
            Role::Leader(_) => return Err("this node leads already".to_owned()),
            Role::SteppedDown(reason) => return Err(format!("this node has stepped down: {reason}")),
        };
        if let Some(reason) = self.log.stopped() {
            return Err(reason.to_owned());
        }
        if follower.cluster_id() == 0 {
            return Err(
                "this node has never met a leader: it has no data to lead with; to begin a cluster with it, start it \
                 without --follow and with --become leader"
                    .to_owned(),
            );
        }
        if !follower.close() {
            return Err("the replica is receiving a part of its leader's log this moment; try again".to_owned());
        }
        self.meta.cluster_id = follower.cluster_id();
        // What was received only in part is nobody's; what is whole is the new leader's log.
        self.log.receive_reset();
        let epoch = self.history.last_epoch().next_alone(world::chance());
        let promoted = role::Role::Leader { promoted_from: Some(follower.leader().to_owned()) };
        // Its flags are a replica's still: a start with them is refused from now on.
        let begun = promoted.save(&self.config.data).map_err(DaemonError::from);
        let begun = begun.and_then(|()| begin_epoch(&mut self.history, &self.log, &self.config, epoch));
        let begun = begun.and_then(|()| self.lead());
        let leader = match begun {
            Ok(leader) => leader,
            Err(error) => {
                // The link is closed, and what the disk has of the new epoch is not known: only a start finds out.
                let text = format!("the promotion failed, and this node ends: start it again: {error}");
                self.failure = Some(text.clone());
                return Err(text);
            }
        };
        if let Role::Replica(follower) = std::mem::replace(&mut self.role, leader) {
            self.retired = Some(follower);
        }
        match self.log.stopped() {
            Some(reason) => Err(format!("the promotion failed, and this node ends: start it again: {reason}")),
            None => Ok(epoch),
        }
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
            (Role::Replica(follower), None) => {
                format!("replica {} of {} at {}", self.config.name, follower.leader(), self.log.end())
            }
            (Role::Leaderless(reason), _) => format!("{} without a leader: {reason}", self.config.name),
            (Role::SteppedDown(reason), _) => format!("{} stepped down: {reason}", self.config.name),
        }
    }

    /// What the node is and what keeps it from its work, for the service manager: the same text as long as nothing changes.
    pub fn status_line(&self) -> String {
        let (name, trouble) = (&self.config.name, self.trouble());
        let what = match &self.role {
            Role::Leader(_) => format!("leader {name} in epoch {}", self.history.last_epoch()),
            Role::Replica(follower) => format!("replica {name} of {}", follower.leader()),
            Role::Leaderless(_) => format!("{name} without a leader"),
            Role::SteppedDown(_) => name.clone(),
        };
        if trouble.is_empty() { what } else { format!("{what}: {trouble}") }
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
        if self.more_to_apply || self.counting_until.is_some() || self.failure.is_some() || !self.client_asks.is_empty()
        {
            return Some(Duration::ZERO);
        }
        let link = match &self.role {
            Role::Leader(shipper) => shipper.next_timeout(now),
            Role::Replica(follower) => follower.next_timeout(now),
            Role::Leaderless(_) | Role::SteppedDown(_) => None,
        };
        let member = self.membership.as_ref().and_then(|membership| membership.next_timeout(now));
        let end = self.ending.as_ref().map(|ending| ending.until.saturating_duration_since(now));
        link.into_iter()
            .chain(self.log.next_timeout(now))
            .chain(self.store.next_timeout(now))
            .chain(member)
            .chain(end)
            .chain(self.silence_timeout(now))
            .min()
    }

    /// A write of the log ended.
    pub fn handle_log(&mut self, completion: &Completion) {
        if let Err(failure) = self.log.handle_completion(completion, self.clock.now) {
            self.failure = Some(failure.to_string());
        }
    }

    /// A write of the log or an operation on a link ended.
    pub fn handle_completion(&mut self, completion: &Completion, ring: &mut Ring) -> Result<(), DaemonError> {
        match completion.token.owner() {
            Owner::Log => self.handle_log(completion),
            Owner::Peer => self.handle_peer(completion, ring)?,
            owner => unreachable!("the node asks for nothing of {owner:?}"),
        }
        Ok(())
    }

    /// An operation on a link ended.
    fn handle_peer(&mut self, completion: &Completion, ring: &mut Ring) -> Result<(), DaemonError> {
        let now = self.clock.now;
        if let Some(follower) = &mut self.retired {
            follower.handle_late_completion(completion);
        }
        self.forget_retired();
        match &mut self.role {
            Role::Leader(shipper) => shipper.handle_completion(completion, ring, &mut self.log, now),
            Role::Replica(follower) => follower
                .handle_completion(completion, ring, &mut self.log, &mut self.store, &mut self.history, now)
                .map_err(refused)?,
            Role::Leaderless(_) | Role::SteppedDown(_) => {}
        }
        Ok(())
    }

    /// Drops the link of an earlier role once nothing of it is in flight; what it received only in part is nobody's.
    pub(super) fn forget_retired(&mut self) {
        if self.retired.take_if(|follower| follower.is_quiet()).is_some() && self.log.leading().is_none() {
            self.log.receive_reset();
        }
    }

    /// A peer connected.
    pub fn accept_peer(&mut self, socket: OwnedFd, caller: Caller, ring: &mut Ring, now: Instant) {
        match &mut self.role {
            Role::Leader(shipper) => shipper.accept(socket, caller, ring, &mut self.log, now),
            Role::Replica(_) | Role::Leaderless(_) | Role::SteppedDown(_) => {
                if world::is_simulated() {
                    return walferry_shipper::refuse::not_leading(socket, &self.describe());
                }
                // Without a name it belongs to nobody yet, and holds nothing that anybody could want.
                let Ok(name) = self.member_name() else { return };
                let holding = Holding::of(&self.log, ClusterId(self.known_cluster_id()), name, &self.history);
                let state = self.membership.as_ref().map(|membership| &membership.state);
                let members =
                    state.filter(|state| state.version > 0).map(|state| state.data_members().cloned().collect());
                self.lendings.greet(socket, caller, self.describe(), holding.for_members(members));
            }
        }
    }

    /// Seals and submits what was appended, and ships it.
    pub fn submit(&mut self, ring: &mut Ring) {
        self.log.poll(ring, self.clock.now);
        if self.waterfall.is_following() {
            let now = world::now();
            self.waterfall.reached(Step::Sealed, self.log.sealed(), now);
            self.waterfall.reached(Step::Submitted, self.log.written(), now);
        }
        // By the clock of this moment: every stamp that the shipper knows was made before it.
        let alone = self.may_speak();
        if let Role::Leader(shipper) = &mut self.role {
            shipper.vouch(alone);
            shipper.feed_from(self.readable_from);
            shipper.poll(ring, &mut self.log, &self.history, self.clock.now);
            if self.waterfall.is_following() {
                follow_replicas(&mut self.waterfall, shipper, self.clock.now);
            }
        }
    }

    /// The node's duties of one turn; `ready` gets the sessions that may go on.
    pub fn poll(&mut self, ring: &mut Ring, ready: &mut Vec<SessionId>) -> Result<(), DaemonError> {
        if self.membership.is_some() {
            self.follow_orders(ring)?;
        }
        self.open_epoch();
        self.submit(ring);
        let applied = self.apply()?;
        self.notice_rollback();
        if self.waterfall.is_following() {
            self.waterfall.reached(Step::Flushed, self.log.flushed(), self.clock.now);
            self.waterfall.reached(Step::Applied, self.store.applied(), world::now());
        }
        if let Role::Replica(follower) = &mut self.role {
            let now = self.clock.now;
            follower.poll(ring, &mut self.log, &mut self.store, &mut self.history, now).map_err(refused)?;
            let (fresh, at) = (follower.fresh_as_of(), follower.heard_at().or(self.heard.at));
            self.heard = Heard { flushed: follower.leader_flushed(), committed: follower.committed(), fresh, at };
            self.lost_commits += follower.take_lost_commits();
            // What the link received is written with this turn.
            self.log.poll(ring, now);
            self.take_base(ring)?;
        }
        self.go_on_counting()?;
        self.make_base()?;
        self.show_base_copies();
        self.advance()?;
        let waited = applied == Applied::Waits && !self.store.overloaded();
        self.more_to_apply = applied == Applied::More || waited;
        self.watch_sync_set();
        self.watch_lease();
        self.release(ready);
        self.logins.done(ready);
        if let Role::Leader(shipper) = &self.role
            && self.membership.is_none()
            && let Some(epoch) = shipper.superseded()
        {
            let text =
                format!("epoch {epoch} has begun elsewhere: start this node with --follow and its leader's address");
            self.step_down(text, ring);
        }
        self.notice_failure(ring);
        Ok(())
    }

    /// Looked at each turn, whatever stopped the log: what its disk has is found out by the next start only. A leader first asks the
    /// others to replace it, which is faster than being missed.
    fn notice_failure(&mut self, ring: &mut Ring) {
        let gone = self.held.gone().map(str::to_owned);
        if gone.is_some()
            && let Role::Leader(shipper) = &mut self.role
        {
            shipper.forget_slots();
        }
        let reason = gone.or_else(|| self.failure.take()).or_else(|| self.log.stopped().map(str::to_owned));
        let Some(reason) = reason.filter(|_| self.ending.is_none()) else { return };
        let replaced_time_max = match &self.membership {
            Some(membership) if self.leads() => {
                membership.state.election_timeout().unwrap_or(self.config.election_timeout) * REPLACED_TIMEOUTS_MAX
            }
            _ => Duration::ZERO,
        };
        let (epoch, until) = (self.history.last_epoch(), self.clock.now + replaced_time_max);
        self.ending = Some(Ending { reason: reason.clone(), epoch, until });
        self.step_down(reason, ring);
    }

    /// Why the process ends now, if it does.
    pub fn ended(&self) -> Option<DaemonError> {
        let Ending { reason, epoch, until } = self.ending.as_ref()?;
        let replaced = self.membership.as_ref().is_some_and(|membership| membership.state.epoch > *epoch);
        let text = || refused(format!("{reason}; this process ends: once the disk is sound, start the node again"));
        (replaced || self.clock.now >= *until).then(text)
    }

    /// The end of a turn: what was released in it is handed to the sockets. For the accounting.
    pub fn account(&mut self) {
        if self.waterfall.is_following()
            && let Role::Leader(shipper) = &mut self.role
        {
            for (name, traced) in shipper.take_traced() {
                self.waterfall.traced(name.as_str(), traced);
            }
        }
        if self.waterfall.is_awaiting() {
            let reached = LevelsReached {
                released: LEVELS.map(|level| self.released_at(level)),
                met: LEVELS.map(|level| self.met_at(level)),
            };
            self.waterfall.replied(&reached, world::now());
        }
        self.waterfall.account(self.log.ledger().flushes(), self.clock.now);
    }

    /// Applies everything that is certain, with checkpoints in between: memory does not depend on the length of the log, and a
    /// start that is cut off goes on from the newest checkpoint.
    fn replay(&mut self) -> Result<(), DaemonError> {
        // A leader has heard no confirmation yet; what its log says to be committed is.
        let committed = self.committed().max(self.heard.committed);
        loop {
            self.look_at_space();
            let applied = self.apply()?;
            self.store.poll_checkpoint(committed, world::now())?;
            match (applied, self.store.lacks_space()) {
                (Applied::More, _) => {}
                (Applied::All, _) => return Ok(()),
                (Applied::Waits, Some(text)) => {
                    return Err(refused(format!(
                        "{text} and start the node again: memory does not hold what its log has"
                    )));
                }
                (Applied::Waits, None) => self.store.settle()?,
            }
        }
    }

    /// Applies what became durable here; on a replica no further than what its leader calls durable.
    fn apply(&mut self) -> Result<Applied, DaemonError> {
        let limit = match &self.role {
            Role::Leader(_) => Lsn::MAX,
            Role::Replica(follower) => follower.apply_limit(),
            Role::SteppedDown(_) if mutants::is_on("no-apply-limit") => Lsn::MAX,
            Role::Leaderless(_) | Role::SteppedDown(_) => self.heard.flushed,
        };
        let applied = replay::apply_flushed(&mut self.log, &mut self.store, limit).map_err(refused)?;
        self.pending.forget(self.store.applied());
        Ok(applied)
    }

    /// How many keys the store has; goes on counting with the next turns when that is not known exactly.
    pub(super) fn count_some_keys(&mut self) -> Result<KeyCount, StoreError> {
        let (began, mut lookups) = (world::now(), 0);
        let count = loop {
            let count = self.store.count_keys(COUNT_LOOKUPS_AT_ONCE)?;
            lookups += COUNT_LOOKUPS_AT_ONCE;
            let over = lookups >= COUNT_LOOKUPS_PER_TURN_MAX || world::now() - began >= COUNT_TURN_TIME_MAX;
            if count.is_exact || over {
                break count;
            }
        };
        if count.is_exact {
            self.counted |= self.counting_until.take().is_some();
        } else if self.counting_until.is_none() {
            self.counting_until = Some(self.clock.now + COUNT_TIME_MAX);
        }
        Ok(count)
    }

    fn go_on_counting(&mut self) -> Result<(), DaemonError> {
        let Some(until) = self.counting_until else { return Ok(()) };
        self.count_some_keys()?;
        if self.clock.now >= until {
            self.counting_until = None;
        }
        Ok(())
    }

    pub(super) fn committed(&self) -> Lsn {
        match &self.role {
            Role::Leader(shipper) => shipper.committed(self.log.flushed()),
            Role::Replica(follower) => follower.committed(),
            Role::Leaderless(_) => self.heard.committed,
            Role::SteppedDown(_) => Lsn::ZERO,
        }
    }

    /// Reads the part of the log that recovery did not look at.
    fn begin_scrub(&mut self) -> Result<(), DaemonError> {
        let segment_bytes = self.meta.segment_bytes;
        // Whole segments that nothing writes to any more.
        let (from, to) = (self.log.start(), self.store.durable_applied().min(self.log.flushed()));
        let to = to.segment(segment_bytes).start(segment_bytes);
        self.scrubbed_at = self.clock.now;
        if from < to && self.scrub.is_none() {
            // A replica that has joined since it started knows its cluster by its link.
            let meta = Meta { cluster_id: self.known_cluster_id(), ..self.meta.clone() };
            let repairer = repair::repairer(&self.config, &meta, &self.history, &self.tls)?;
            match Scrub::start(repairer, from, to, self.waker.clone()) {
                Ok(scrub) => self.scrub = Some(scrub),
                Err(error) => tracing::warn!("no thread to read the old log: {error}"),
            }
        }
        Ok(())
    }

    /// Takes what a walk over old log found, and begins another when a replica could not be fed, or when it is time again.
    fn poll_scrub(&mut self) -> Result<(), DaemonError> {
        self.take_scrubbed();
        if self.scrub.is_some() {
            return Ok(());
        }
        let rested = self.clock.now.saturating_duration_since(self.scrubbed_at);
        let broken = match &self.role {
            Role::Leader(shipper) => shipper.catchups_broken(),
            _ => self.catchups_broken,
        };
        let called_for = broken > self.catchups_broken && rested > SCRUB_PAUSE;
        if called_for || self.config.scrub_interval.is_some_and(|interval| rested >= interval) {
            self.catchups_broken = broken;
            self.begin_scrub()?;
        }
        Ok(())
    }

    fn take_scrubbed(&mut self) {
        if let Some(outcome) = self.scrub.as_ref().and_then(Scrub::outcome) {
            self.scrub = None;
            match outcome {
                Ok(repaired) => {
                    self.repaired.add(&repaired);
                    self.readable_from = Lsn::ZERO;
                }
                Err(Unreadable { error, before }) => {
                    self.readable_from = before;
                    // Read again whenever a replica could not be fed.
                    if self.scrub_told.tell(&error.to_string(), self.clock.now).is_some() {
                        tracing::error!(
                            "the old log is damaged, replicas that need it before {before} get a base copy: {error}"
                        );
                    }
                }
            }
        }
    }

    /// Ends a walk over old log; false while its thread has not: until then it may still mend files of the log.
    pub(super) fn end_scrub(&mut self) -> bool {
        let Some(scrub) = &self.scrub else { return true };
        scrub.stop();
        self.take_scrubbed();
        self.scrub.is_none()
    }

    fn leads(&self) -> bool {
        matches!(self.role, Role::Leader(_))
    }

    /// The store went back to what a new leader has: replies about what it held are none any more.
    fn notice_rollback(&mut self) {
        let applied = self.store.applied();
        self.rolled_back |= applied < self.applied_before;
        if applied < self.applied_before && self.abandoned.is_none() {
            self.abandoned = Some(format!("a failover took it back, this node's state ends at {applied} now"));
            self.queue = CommitQueue::default();
        }
        self.applied_before = applied;
    }

    /// What readers of committed state may be told.
    pub(super) fn settled_at(&self) -> Lsn {
        if self.may_speak() { self.committed().min(self.store.applied()) } else { Lsn::ZERO }
    }

    /// True when a leader has applied all that was in its log when it began to lead.
    pub(super) fn has_replayed(&self) -> bool {
        self.store.applied() >= self.lead_from
    }

    /// What was durable on the leader so long before `now` is applied here. A leader is its own measure while it may speak.
    pub(super) fn staleness_at(&self, now: Instant) -> Option<Duration> {
        match &self.role {
            Role::Leader(_) => (self.may_speak_at(now) && self.has_replayed()).then_some(Duration::ZERO),
            Role::Replica(_) | Role::Leaderless(_) => Some(now.saturating_duration_since(self.heard.fresh?)),
            Role::SteppedDown(_) => None,
        }
    }

    /// The cluster that the node belongs to; 0 until it has met one.
    pub(super) fn known_cluster_id(&self) -> u128 {
        match &self.role {
            Role::Replica(follower) => follower.cluster_id(),
            _ => self.meta.cluster_id,
        }
    }

    /// Commits that earlier epochs left open are confirmed together with a frame of this one, or never: a leader does not wait for
    /// a client to write it. A record without effects.
    fn open_epoch(&mut self) {
        let Role::Leader(shipper) = &self.role else { return };
        let start = self.history.last_start();
        if shipper.waits() && start > Lsn::ZERO && self.log.end() == start {
            // Without room for it now, the next turn tries again; a log that has stopped is noticed at the end of this one.
            let _ = self.log.append(&[]);
        }
    }

    /// Tells the store what space it has.
    fn look_at_space(&mut self) {
        if world::is_simulated() {
            return;
        }
        self.space_looked_at = world::now();
        // Where the disk cannot be asked, a checkpoint finds out.
        let (free, wanted) = (free_bytes(&self.config.data).unwrap_or(u64::MAX), self.store.space_wanted());
        self.is_space_scarce = wanted > 0 && free / SPACE_SCARCE_SHARE < wanted;
        self.store.set_free(free);
    }

    /// On a full disk a checkpoint is due as soon as it lets a segment go, or when the log has to leave space for one.
    fn ask_for_space(&mut self) {
        let looked = self.clock.now.saturating_duration_since(self.space_looked_at);
        if self.is_space_scarce || looked >= SPACE_LOOK_INTERVAL {
            self.look_at_space();
        }
        if !self.log.is_short_of_space() {
            return;
        }
        let segment_bytes = self.meta.segment_bytes;
        let applied = self.store.applied();
        let lets_go = applied.segment(segment_bytes) > self.store.durable_applied().segment(segment_bytes);
        if lets_go {
            // A log that ran out of segments ends where one ends.
            let begun = applied.segment(segment_bytes).start(segment_bytes);
            self.store.ask_for_space_before(begun.advance(1).min(applied));
        } else if self.store.overlay_bytes() >= SPACE_CHECKPOINT_BYTES_MIN {
            self.store.ask_for_space_before(applied);
        }
    }

    /// The segment that is written to is looked at, before an older one may be recycled.
    fn look_at_segment(&mut self) -> Result<(), DaemonError> {
        if let Some(number) = self.log.current_segment()
            && self.held.wants_segment(number)
            && let Some(file) = self.log.current_file().map_err(refused)?
        {
            self.held.set_segment(number, file);
        }
        Ok(())
    }

    /// Looks from now on at the files that are open now: at the start, and after others took their place.
    pub(super) fn watch_files(&mut self) -> Result<(), DaemonError> {
        let mut files = self.log.held_files().map_err(refused)?;
        files.push(HeldFile::at(self.store.path()).map_err(refused)?);
        let register = self.config.data.join(REGISTER_FILE);
        if self.config.members.is_some() && register.exists() {
            files.push(HeldFile::at(&register).map_err(refused)?);
        }
        self.held = HeldFiles::watch(files, self.waker.clone()).map_err(refused)?;
        Ok(())
    }

    /// Moves what depends on acknowledgements: the commit LSN, checkpoints, retention.
    fn advance(&mut self) -> Result<(), DaemonError> {
        let committed = self.committed();
        self.log.set_committed(committed);
        self.ask_for_space();
        self.store.poll_checkpoint(committed, self.clock.now)?;
        self.log.leave_spare(self.store.space_wanted(), self.store.writes_checkpoint());
        let slots = match &self.role {
            Role::Leader(_) if mutants::is_on("recycle-what-is-needed") => Lsn::MAX,
            Role::Leader(shipper) => shipper.slots_hold(),
            Role::Replica(_) => Lsn::MAX,
            // It may have led and lead again, with replicas that need its log. Nothing is appended meanwhile.
            Role::Leaderless(_) | Role::SteppedDown(_) => Lsn::ZERO,
        };
        self.look_at_segment()?;
        let scrub = self.scrub.as_ref().map_or(Lsn::MAX, Scrub::hold);
        self.log.release_before(self.store.durable_applied().min(slots).min(scrub));
        self.poll_scrub()
    }

    /// Notices when the sync set is lost or back, and says so loudly.
    fn watch_sync_set(&mut self) {
        let Role::Leader(shipper) = &self.role else { return };
        // The replicas of a leader that was just chosen are on their way to it.
        let settling = self.membership.is_some() && self.clock.now.duration_since(self.led_since) < SETTLE_TIME;
        match (shipper.sync_shortage(), &self.sync_loss) {
            (Some(_), None) if settling => {}
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

    /// Notices when this leader may not speak for too long: then what waits is answered, and what comes is refused.
    fn watch_lease(&mut self) {
        if !self.leads() || self.may_speak() {
            self.silence = None;
            if self.leads() {
                self.heard.at = Some(self.clock.now);
            }
            return;
        }
        let (now, time_max) = (self.clock.now, self.silent_time_max());
        let silence = self.silence.get_or_insert(Silence { since: now, answered: false });
        if now.saturating_duration_since(silence.since) < time_max {
            return;
        }
        silence.since = now;
        let first = !std::mem::replace(&mut silence.answered, true);
        if first || !self.queue.is_empty() {
            let reason = self.why_silent();
            tracing::warn!("nothing that waits is confirmed, and writes are refused: {reason}");
            self.abandon(reason);
        }
    }

    fn silent_time_max(&self) -> Duration {
        self.config.commit_timeout.unwrap_or(SILENT_TIME_MAX)
    }

    /// When a lease that ended, or that is about to, has to be looked at: somebody waits for an answer.
    fn silence_timeout(&self, now: Instant) -> Option<Duration> {
        let waits = self.membership.is_some() && self.leads() && !(self.queue.is_empty() && self.parking.is_empty());
        match &self.silence {
            _ if !waits => None,
            Some(silence) => Some((silence.since + self.silent_time_max()).saturating_duration_since(now)),
            None => Some(self.config.election_timeout),
        }
    }

    /// True once a leader that may not speak refuses writes.
    pub(super) fn refuses_for_silence(&self) -> bool {
        self.silence.as_ref().is_some_and(|silence| silence.answered)
    }

    /// Why this leader may answer nothing, and what an operator can do about it.
    pub(super) fn why_silent(&self) -> String {
        let awaited = self.membership.as_ref().map(|membership| membership.trouble()).unwrap_or_default();
        let epoch = self.history.last_epoch();
        let led = format!(
            "this node led in epoch {epoch}, and a majority of the members does not confirm that it still does"
        );
        if awaited.is_empty() {
            format!("{led}; `walferry describe` tells what is awaited")
        } else {
            format!("{led}: {awaited}")
        }
    }

    /// Finds the sessions that may go on.
    fn release(&mut self, ready: &mut Vec<SessionId>) {
        let mut queue = std::mem::take(&mut self.queue);
        queue.release(|level| self.released_at(level), ready);
        queue.release_settled(|| self.settled_at(), ready);
        self.queue = queue;
        self.wake_readers(ready);
        if self.parking.is_empty() {
            return;
        }
        let applied = self.store.applied();
        let acknowledgements = match &self.role {
            Role::Leader(shipper) => shipper.acknowledgements(),
            Role::Replica(_) | Role::Leaderless(_) | Role::SteppedDown(_) => 0,
        };
        let news = News {
            // Who waits for room is refused when it comes again.
            room: self.has_room() || self.refuses_for_silence(),
            applied: (applied != self.applied_seen).then_some(applied),
            acknowledged: acknowledgements != self.acknowledged_seen || applied != self.applied_seen,
            fresh: self.heard.fresh != self.fresh_seen || (self.leads() && self.may_speak()),
            counted: std::mem::take(&mut self.counted),
            turned: self.history.last_epoch() != self.epoch_seen
                || self.leads() != self.led_seen
                || std::mem::take(&mut self.rolled_back),
        };
        self.epoch_seen = self.history.last_epoch();
        self.led_seen = self.leads();
        self.fresh_seen = self.heard.fresh;
        self.applied_seen = applied;
        self.acknowledged_seen = acknowledgements;
        self.parking.wake(news, ready);
    }

    /// Wakes who waits for entries of streams that were added since the last turn.
    fn wake_readers(&mut self, ready: &mut Vec<SessionId>) {
        if !self.parking.has_readers() {
            return self.store.ignore_streams();
        }
        match self.store.take_added() {
            Some(added) => added.into_iter().for_each(|(hash, newest)| self.parking.wake_readers(hash, newest, ready)),
            // The store is another one, or too many streams changed to be named.
            None => {
                self.store.watch_streams();
                self.parking.wake_all_readers(ready);
            }
        }
    }

    /// Commits up to the LSN that this gives hold `level`. `Local` follows the store: what is answered can be read.
    pub(super) fn released_at(&self, level: CommitLevel) -> Lsn {
        let applied = self.store.applied();
        if !self.may_speak() {
            return Lsn::ZERO;
        }
        match (&self.role, level) {
            (_, CommitLevel::Off) => Lsn::MAX,
            (_, CommitLevel::Local) if mutants::is_on("answer-before-the-flush") => self.log.end(),
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
            (Role::Replica(_) | Role::Leaderless(_) | Role::SteppedDown(_), _) => Lsn::ZERO,
        }
    }

    /// What `level` promises holds for commits up to the LSN that this gives, whatever is released.
    pub(super) fn met_at(&self, level: CommitLevel) -> Lsn {
        match (level, &self.role) {
            (CommitLevel::Off, _) => Lsn::MAX,
            (CommitLevel::Local, _) => self.store.applied(),
            (remote, Role::Leader(shipper)) => shipper.confirmed(remote, self.log.flushed()).min(self.store.applied()),
            (_, Role::Replica(_) | Role::Leaderless(_) | Role::SteppedDown(_)) => Lsn::ZERO,
        }
    }

    /// Why commits at `level` are refused for want of replicas.
    pub(super) fn refuses(&self, shipper: &Shipper, level: CommitLevel) -> Option<String> {
        if level <= CommitLevel::Local || self.sync_loss.as_ref().is_some_and(|loss| loss.degraded.is_some()) {
            return None;
        }
        let lost = self.sync_loss.as_ref().filter(|_| self.config.on_sync_loss == OnSyncLoss::Refuse);
        let short = || shipper.refuses(level).or_else(|| lost.map(|loss| loss.text.clone()));
        self.nobody_confirms(shipper, level).or_else(short)
    }

    /// Why no replica has to confirm a commit at `level`, which must not look as if one had; `None` where replicas have to, and where
    /// the operator chose to degrade.
    pub(super) fn nobody_confirms(&self, shipper: &Shipper, level: CommitLevel) -> Option<String> {
        let degrades = matches!(self.config.on_sync_loss, OnSyncLoss::Degrade(_));
        if !level.is_remote() || shipper.waits() || degrades {
            return None;
        }
        Some(match &self.membership {
            None => format!("{} to have commits confirmed, or choose COMMITLEVEL local", no_policy(level)),
            Some(_) => format!(
                "no replica confirms commits at {level}: this cluster has no other data member that holds the log. `walferry join` \
                 one, or choose COMMITLEVEL local"
            ),
        })
    }

    /// True when commands can be executed and their records appended.
    pub(super) fn has_room(&self) -> bool {
        // Without a lease nothing may be acknowledged, at `off` neither: what cannot be answered is not executed.
        let draining = self.membership.as_ref().is_some_and(Membership::is_draining);
        // Who waits is refused when it comes again.
        let has_memory =
            self.store.lacks_space().is_some() || !self.store.overloaded() && self.pending.bytes() < PENDING_BYTES_MAX;
        !draining && self.may_speak() && has_memory && self.log.has_room() && self.has_replayed()
    }

    /// Takes no more writes, and answers the ones that wait with what is known of them.
    fn step_down(&mut self, reason: String, ring: &mut Ring) {
        if let Role::SteppedDown(_) = self.role {
            return;
        }
        tracing::error!("stepping down, this node takes no writes and acknowledges nothing more: {reason}");
        let led = matches!(self.role, Role::Leader(_));
        self.leave_role(Role::SteppedDown(reason.clone()), &reason, ring);
        if let Some(membership) = self.membership.as_ref().filter(|_| led) {
            membership.report_unfit(self.history.last_epoch());
        }
    }

    /// Ends the role that the node has; `reason` is what held replies are told.
    pub(super) fn leave_role(&mut self, next: Role, reason: &str, ring: &mut Ring) {
        match std::mem::replace(&mut self.role, next) {
            Role::Leader(mut shipper) => {
                shipper.close_all(ring, &mut self.log, self.clock.now);
                let committed = shipper.committed(self.log.flushed());
                self.heard = Heard { flushed: self.store.applied(), committed, fresh: None, at: self.heard.at };
            }
            Role::Replica(mut follower) => {
                follower.close();
                self.retired = Some(follower);
            }
            Role::Leaderless(_) | Role::SteppedDown(_) => return,
        }
        self.waterfall.abandon();
        (self.sync_loss, self.silence) = (None, None);
        self.queue = CommitQueue::default();
        self.abandoned = Some(reason.to_owned());
    }

    /// Nothing that is held is confirmed any more: it speaks of a state that this node has no longer.
    pub(super) fn abandon(&mut self, reason: String) {
        self.queue = CommitQueue::default();
        self.abandoned = Some(reason);
    }

    /// Why held replies will not be confirmed, told once.
    pub fn take_abandoned(&mut self) -> Option<String> {
        self.abandoned.take()
    }

    /// What the clients' side counted.
    pub fn count(&mut self, clients: ClientCounts, commands: u64) {
        self.clients = clients;
        self.commands += commands;
    }

    /// Reads the users' file again; on an error the users stay as they are.
    pub fn read_users(&mut self) -> Result<(), String> {
        let file = self.config.users_file.as_ref().ok_or("this node has no users_file")?;
        let users = Users::load(file).map_err(|error| error.to_string())?;
        tracing::info!(users = users.lines().len(), "the users' file was read again");
        *self.users.borrow_mut() = users;
        self.users_changed = true;
        Ok(())
    }

    /// True once after the users' file was read again.
    pub fn take_users_changed(&mut self) -> bool {
        std::mem::take(&mut self.users_changed)
    }

    /// What sessions ask of all connections.
    pub fn take_client_asks(&mut self) -> Vec<Asked> {
        std::mem::take(&mut self.client_asks)
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
        if let Some(membership) = self.membership.take() {
            membership.close();
        }
        let end = self.log.flushed();
        self.look_at_space();
        self.store.close(committed)?;
        self.log.shutdown(ring)?;
        tracing::info!(%end, "closed");
        Ok(())
    }
}

/// The sync policy of a node that is to lead: what its options name, else, where it was promoted, that of its leader.
fn own_policy(config: &NodeConfig) -> Result<SyncPolicy, DaemonError> {
    if let Some(policy) = &config.sync {
        return Ok(policy.clone());
    }
    if config.members.is_some() {
        return Ok(SyncPolicy::None);
    }
    let promoted = matches!(role::Role::load(&config.data), Ok(Some(role::Role::Leader { promoted_from: Some(_) })));
    let handover = match Handover::load(&config.data) {
        // Of a leader whose replica this was until it was made a leader of its own, by a start and not by a promotion.
        Ok(Some(kept)) if !promoted => {
            tracing::warn!(
                "no --sync is given, and this node leads without a sync policy: it was not promoted, so that of {}, which it \
                 followed, {:?}, does not hold here. Name one with --sync",
                kept.leader,
                kept.policy.to_string()
            );
            None
        }
        Err(_) if !promoted => None,
        kept => kept.map_err(refused)?,
    };
    let Some(handover) = handover else { return Ok(SyncPolicy::None) };
    let policy = handover.policy_of(&config.name.parse().map_err(refused)?);
    if policy.waits() {
        tracing::info!(leader = %handover.leader, %policy, "no --sync is given: the sync policy of the leader before holds");
    }
    Ok(policy)
}

fn no_policy(level: CommitLevel) -> String {
    format!(
        "no replica confirms commits at {level}: this leader has no sync policy. Start it with --sync 'ANY 1 (*)' or another policy"
    )
}

/// Refuses the start of a leader whose sessions would begin at a remote level that nobody confirms. Changes nothing.
fn check_level(config: &NodeConfig) -> Result<(), DaemonError> {
    let leads = config.members.is_none() && config.follow.is_none();
    let degrades = matches!(config.on_sync_loss, OnSyncLoss::Degrade(_));
    let level = config.commit_level;
    if !leads || !level.is_remote() || degrades || own_policy(config)?.waits() {
        return Ok(());
    }
    let reason = format!("{}, or with commit_level = local", no_policy(level));
    Err(ConfigError::Value { key: "commit_level", value: level.to_string(), reason }.into())
}

/// Tells the accounting how far the replicas are; what they were sent was sent just now.
fn follow_replicas(waterfall: &mut Waterfall, shipper: &Shipper, heard_at: Instant) {
    let sent_at = world::now();
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

/// Begins `epoch` at the end of the log. Persisted before its first frame exists.
pub(super) fn begin_epoch(
    history: &mut EpochHistory,
    log: &Log,
    config: &NodeConfig,
    epoch: Epoch,
) -> Result<(), DaemonError> {
    history.cut(log.sealed());
    history.push(epoch, log.sealed()).map_err(refused)?;
    if mutants::is_on("forget-the-epoch") {
        return Ok(());
    }
    history.save(&config.data).map_err(refused)
}
