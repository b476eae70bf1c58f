//! Opens a node: checks what its flags ask against its data directory, repairs and opens log and store, takes the first role. Called
//! once a process, by `reactor` and by the simulator; `open_data` again when a snapshot has taken the place of log and store.

use std::cell::RefCell;
use std::net::{SocketAddr, TcpListener};
use std::rc::Rc;
use std::time::Duration;

use walferry_applier::pending::Pending;
use walferry_applier::snapshot::install;
use walferry_applier::store::{STORE_DIR, Store, StoreConfig};
use walferry_engine::epoch::EpochHistory;
use walferry_engine::held::HeldFiles;
use walferry_engine::lock::DirLock;
use walferry_engine::log::{Log, LogConfig, LogError};
use walferry_engine::lsn::Lsn;
use walferry_engine::meta::Meta;
use walferry_engine::recover::Recovery;
use walferry_engine::ring::Ring;
use walferry_engine::waker::Waker;
use walferry_engine::world;
use walferry_shipper::frame_server::FrameServer;

use crate::config::NodeConfig;
use crate::error::DaemonError;
use crate::metrics::waterfall::Waterfall;
use crate::node::policy::check_level;
use crate::node::role::begin_epoch;
use crate::node::state::{KeyCounting, Leadership, Scrubbing, Seen, SnapshotTransfers, SpaceWatch};
use crate::node::{ClientSide, Clock, Heard, Node, Role};
use crate::repair::{self, RepairCount};
use crate::role;
use crate::session::commit_queue::CommitQueue;
use crate::session::parking::Parking;
use crate::tls::Tls;
use crate::users::Users;
use crate::watchdog::Watchdog;

/// Log behind the newest checkpoint, as a multiple of `checkpoint_bytes`, that calls for another one.
const LOG_CHECKPOINTS_MAX: u64 = 8;
/// Changes get a checkpoint after so long, however few they are (PostgreSQL's checkpoint_timeout).
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(300);

/// What a data directory holds, open.
pub(super) struct Opened {
    pub(super) meta: Meta,
    pub(super) history: EpochHistory,
    pub(super) log: Log,
    pub(super) store: Store,
    pub(super) recovery: Recovery,
    pub(super) repaired: RepairCount,
}

impl Node {
    /// Opens log and store of a prepared data directory, takes its first role, and replays what the store has not seen.
    pub fn open(
        (config, lock): (NodeConfig, DirLock),
        client_address: SocketAddr,
        (serves_at, tls): (Option<&TcpListener>, Tls),
        take_role: impl FnOnce(&mut Node) -> Result<(), DaemonError>,
        users: Rc<RefCell<Users>>,
        ring: &mut Ring,
        waker: Waker,
    ) -> Result<Node, DaemonError> {
        let Opened { meta, mut history, log, store, recovery, repaired } =
            open_data(&config, lock, (serves_at, &tls), ring, &waker)?;
        let leader = config.follow.is_none() && config.members.is_none();
        if leader {
            let epoch = history.last_epoch().next_alone(world::random());
            begin_epoch(&mut history, &log, &config, epoch)?;
        }
        let now = world::now();
        let mut node = Node {
            role: Role::SteppedDown("the node is starting".to_owned()),
            retired: None,
            membership: None,
            heard: Heard { flushed: recovery.leader_flushed, committed: recovery.committed, fresh: None, at: None },
            lost_commits: 0,
            snapshots: SnapshotTransfers::default(),
            repaired,
            frame_server: FrameServer::default(),
            scrubbing: Scrubbing::new(now),
            space: SpaceWatch { looked_at: now, is_scarce: false },
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
            clients: ClientSide::new(users, waker.clone()),
            started: now,
            waker,
            clock: Clock { now, wall_us: 0 },
            leadership: Leadership::new(now),
            seen: Seen::default(),
            applied_before: Lsn::ZERO,
            failure: None,
            ending: None,
            abandoned: None,
            more_to_apply: false,
            counting: KeyCounting::default(),
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
}

/// Opens log and store; a snapshot that was received is put in their place first, and damage is repaired. While a node that has
/// just started waits for others with that, it sends them, at `serves_at`, what they lost and it has.
pub(super) fn open_data(
    config: &NodeConfig,
    lock: DirLock,
    (serves_at, tls): (Option<&TcpListener>, &Tls),
    ring: &mut Ring,
    waker: &Waker,
) -> Result<Opened, DaemonError> {
    if let Some(facts) = install::finish(&config.data)? {
        tracing::info!(snapshot = %facts.snapshot, bytes = facts.bytes, "a snapshot was put in the place of log and store");
    }
    repair::mend_small_files(&config.data)?;
    let (mut lock, mut repaired) = (lock, RepairCount::default());
    loop {
        let mut opened = open_repaired(config, lock, (serves_at, tls), repaired, ring, waker)?;
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
pub(super) fn open_repaired(
    config: &NodeConfig,
    lock: DirLock,
    (serves_at, tls): (Option<&TcpListener>, &Tls),
    mut repaired: RepairCount,
    ring: &mut Ring,
    waker: &Waker,
) -> Result<Opened, DaemonError> {
    let load = || -> Result<(Meta, EpochHistory), DaemonError> {
        Ok((crate::data_dir::open_or_init(config)?, EpochHistory::load(&config.data)?))
    };
    let (mut meta, mut history) = load()?;
    if repair::recover_store(config, &meta, &history, tls, &mut repaired, waker)? {
        // A snapshot in the place of a damaged store brings its leader's epochs.
        (meta, history) = load()?;
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
        serves_at.map(|at| (at, tls)),
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
