//! All replicas of a leading node: accepts their connections, streams the log to them, takes their acknowledgements, and
//! says what is confirmed. The node's ring thread owns it and calls `poll` once a turn, after the log's. It knows the log
//! and the links; it knows neither commands, nor sessions, nor the store.
//!
//! The duties of a turn, in this order: 1. take what threads report (catch-up, slots' file); 2. answer hellos;
//! 3. drop the silent, and those that are no members any more; 4. send; 5. free log memory that blocks the log; 6. measure lag, move the in-sync set and the
//! commit rule; 7. give up slots that hold too much, take back those
//! whose replicas come close, and save slots.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use walferry_cluster::insync::InSync;
use walferry_cluster::member::{ClusterId, MemberName};
use walferry_cluster::policy::SyncPolicy;
use walferry_cluster::quorum_rule::QuorumRule;
use walferry_cluster::register::MemberId;
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_engine::mutants;
use walferry_engine::told::{Rarely, Told};
use walferry_engine::waker::Waker;
use walferry_engine::world;

use crate::catchup::Report;
use crate::commit_rule::CommitRule;
use crate::frame_server::FrameServer;
use crate::lag::Timeline;
use crate::link::{Link, LinkNo};
use crate::outgoing::Common;
use crate::progress::Progress;
use crate::replica::Replica;
use crate::sender::View;
use crate::slots::{SlotFile, Slots, SlotsError};
use crate::snapshot::{Snapshots, SnapshotsConfig};
use crate::traces::Traces;

mod admission;
mod asked;
mod end;
mod transfers;
mod turn;

/// Connections at once, those that have not said hello included; another is refused.
pub const LINKS_MAX: usize = 64;

/// Of them, connections that have not said what they are, or were refused; a further one takes the oldest one's place, so that
/// no number of them keeps replicas out.
const UNIDENTIFIED_MAX: usize = 32;
/// Connections that end before they have a name are told of in the log at most so often.
const UNIDENTIFIED_TOLD_INTERVAL: Duration = Duration::from_secs(1);

/// A replica's connection that was heard so recently, or within so many heartbeats, keeps its name from another node.
const NAME_HELD_TIME: Duration = Duration::from_secs(1);
const HELD_HEARTBEATS: u32 = 4;

const _: () = assert!(UNIDENTIFIED_MAX < LINKS_MAX);

/// What a shipper is made with.
#[derive(Clone, Debug)]
pub struct ShipperConfig {
    /// The data directory, for the slots.
    pub dir: PathBuf,
    /// The cluster.
    pub cluster_id: ClusterId,
    /// The leader's name.
    pub name: MemberName,
    /// Where clients reach the leader; told to replicas for their -READONLY.
    pub client_address: String,
    /// The segment size of the cluster.
    pub segment_bytes: u64,
    /// A replica that was not heard for longer is dropped.
    pub peer_timeout: Duration,
    /// Something is sent to each replica at least this often.
    pub heartbeat_interval: Duration,
    /// A slot that holds back more log is lost.
    pub slot_keep_bytes_max: u64,
    /// A replica that lags for longer leaves the in-sync set.
    pub replica_lag_time_max: Duration,
    /// Remote levels are refused while fewer replicas are in sync.
    pub min_in_sync: usize,
    /// Where the leader's epoch begins.
    pub epoch_start: Lsn,
    /// Who has to confirm commits.
    pub policy: SyncPolicy,
    /// Batches of at least this size go by SEND_ZC.
    pub zero_copy_bytes_min: usize,
    /// Bytes a second of all snapshots together; 0 for no limit.
    pub snapshot_rate: u64,
}

/// Why there is no shipper.
#[derive(Debug, thiserror::Error)]
pub enum ShipperError {
    /// The slots' file is unreadable.
    #[error(transparent)]
    Slots(#[from] SlotsError),
    /// The thread for the slots' file cannot be started.
    #[error("cannot start a thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// All replicas of a leader.
pub struct Shipper {
    config: ShipperConfig,
    common: Common,
    reports: mpsc::Receiver<Report>,
    /// Bounded by LINKS_MAX.
    links: BTreeMap<LinkNo, Link>,
    /// What the log has told of connections without a name that ended.
    unidentified_told: Rarely,
    /// What the log has told of links that ended or were refused, and of slots that cannot be saved.
    links_told: Told,
    slots_told: Told,
    /// Every replica that has a slot.
    replicas: BTreeMap<MemberName, Replica>,
    slots: Slots,
    slot_file: SlotFile,
    snapshots: Snapshots,
    frame_server: FrameServer,
    rule: CommitRule,
    in_sync: InSync,
    timeline: Timeline,
    /// The log at the last turn.
    view: View,
    /// When the last turn was.
    turned: Instant,
    /// The commit rule has to look at the replicas again.
    moved: bool,
    /// Why commits at remote levels wait, as of the last look at the replicas.
    shortage: Option<String>,
    acknowledgements: u64,
    /// Links that ended while their replica still needed log from the segment files.
    catchups_broken: u64,
    /// Replicas are not fed with log before this, which is damaged.
    feeds_from: Lsn,
    superseded: Option<Epoch>,
    traces: Traces,
    /// The members of the leader's cluster and their incarnations; `None` for a leader that takes every replica as one.
    members: Option<BTreeMap<MemberName, MemberId>>,
}

impl Shipper {
    /// A shipper that knows the replicas that have slots. `waker` wakes the ring thread.
    pub fn new(config: ShipperConfig, waker: Waker) -> Result<Shipper, ShipperError> {
        let slots = Slots::load(&config.dir)?;
        let slot_file = SlotFile::new(&config.dir, waker.clone())?;
        let (sender, reports) = mpsc::channel();
        let now = world::now();
        let mut in_sync = InSync::new(config.replica_lag_time_max);
        let mut replicas = BTreeMap::new();
        for (name, restart) in slots.iter() {
            let mut replica = Replica::new(name.clone(), MemberId(0), Progress::remembered(restart), now);
            if !slots.is_lost(name) {
                in_sync.presume(name);
                replica.in_sync = true;
            }
            replicas.insert(name.clone(), replica);
        }
        let snapshots = SnapshotsConfig {
            data: config.dir.clone(),
            rate: config.snapshot_rate,
            heartbeat_interval: config.heartbeat_interval,
            peer_timeout: config.peer_timeout,
            keep_bytes_max: config.slot_keep_bytes_max,
        };
        let snapshots = Snapshots::new(snapshots, waker.clone(), now);
        let common = Common {
            zero_copy_bytes_min: config.zero_copy_bytes_min,
            heartbeat_interval: config.heartbeat_interval,
            epoch: Epoch::default(),
            leads_alone: true,
            origin: now,
            reports: sender,
            waker,
        };
        Ok(Shipper {
            replicas,
            rule: CommitRule::new(config.policy.clone(), config.epoch_start),
            in_sync,
            config,
            common,
            reports,
            links: BTreeMap::new(),
            unidentified_told: Rarely::default(),
            links_told: Told::default(),
            slots_told: Told::default(),
            slots,
            slot_file,
            snapshots,
            frame_server: FrameServer::default(),
            timeline: Timeline::default(),
            view: View::default(),
            turned: now,
            moved: true,
            shortage: None,
            acknowledgements: 0,
            catchups_broken: 0,
            feeds_from: Lsn::ZERO,
            superseded: None,
            traces: Traces::default(),
            members: None,
        })
    }

    /// What the register says: who is a member, who of them is in sync, and by which quorum rule commits are confirmed. At the start
    /// of a leadership and whenever it has moved. Slots of others hold no log; their connections end with the next turn.
    pub fn follow_register(
        &mut self,
        members: BTreeMap<MemberName, MemberId>,
        in_sync: &BTreeSet<MemberName>,
        quorum_rule: QuorumRule,
    ) {
        if self.members.is_none() {
            // Slots tell who was in sync with an earlier leadership; the register knows better.
            self.in_sync = InSync::new(self.config.replica_lag_time_max);
            in_sync.iter().for_each(|name| self.in_sync.presume(name));
        }
        for (name, id) in &members {
            let known = self.replicas.entry(name.clone());
            let replica = known.or_insert_with(|| Replica::new(name.clone(), *id, Progress::default(), self.turned));
            if replica.id == *id || mutants::is_on("complete-without-proof") {
                continue;
            }
            // What another incarnation confirmed proves nothing of this one, whose disk may be empty.
            // Nor does what a slot remembers of an earlier leadership.
            replica.progress = Progress::default();
            if replica.id != MemberId(0) {
                self.in_sync.forget(name);
            }
            if replica.link.is_none() {
                replica.id = *id;
            }
        }
        self.replicas.retain(|name, replica| members.contains_key(name) || replica.link.is_some());
        for replica in self.replicas.values_mut() {
            let id = members.get(&replica.name);
            replica.member = id.is_some_and(|id| *id == replica.id || mutants::is_on("complete-without-proof"));
        }
        let others: Vec<MemberName> = self.slots.iter().map(|(name, _)| name.clone()).collect();
        for name in others.iter().filter(|name| !members.contains_key(*name)) {
            tracing::info!(slot = %name, "a slot is dropped: its replica is no member");
            self.slots.forget(name);
            self.in_sync.forget(name);
        }
        self.snapshots.keep_only(|name| members.contains_key(name), admission::no_member);
        self.in_sync.confirm(in_sync);
        self.rule.set_quorum_rule(quorum_rule);
        self.members = Some(members);
        self.moved = true;
    }

    /// Whether this node is the only one that leads, looked at after everything that was given to the shipper. While it is not
    /// certain, replicas are not told that what they have is fresh. Without a cluster it stays true.
    pub fn confirm_leadership(&mut self, alone: bool) {
        self.common.leads_alone = alone;
    }
}
