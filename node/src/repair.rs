//! What a node does about damage in its data directory before it takes part in anything: small files are mended from their
//! copies, what the log lost is asked of the other nodes, and a store that is not whole is made anew from the log, or where that
//! does not reach back, from a snapshot. Called under the directory's lock by whatever opens it.

use std::net::TcpListener;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, poll};
use walferry_applier::repair::plan::Source;
use walferry_applier::repair::{RepairError, Repaired, Repairer};
use walferry_applier::snapshot::fetch::{FetchConfig, FetchError, Fetching};
use walferry_applier::snapshot::incoming::Incoming;
use walferry_applier::snapshot::install;
use walferry_applier::store::check::{Condition, examine};
use walferry_applier::store::{Position, STORE_DIR, STORE_FILE};
use walferry_cluster::ClusterId;
use walferry_cluster::handover::POLICY_FILE;
use walferry_cluster::member::Caller;
use walferry_engine::epoch::{EPOCHS_FILE, EpochHistory};
use walferry_engine::lock::DirLock;
use walferry_engine::log::{LOG_DIR, Log, LogConfig, LogError, keep_lost};
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_engine::mend::set_aside;
use walferry_engine::meta::{META_FILE, Meta};
use walferry_engine::origin::{ORIGIN_FILE, Origin};
use walferry_engine::recover::{Known, LastFrame, Lineage, Recovery, is_unwritten, lineage_of, recover};
use walferry_engine::ring::Ring;
use walferry_engine::segment::{DirBytes, LogBytes, list_segments, run_start};
use walferry_engine::small_file;
use walferry_engine::waker::Waker;
use walferry_engine::watermark::{KnownWatermark, Watermark};
use walferry_engine::world;
use walferry_shipper::frame_server::{FrameServer, LogSnapshot};
use walferry_shipper::slots::SLOTS_FILE;
use walferry_tls::{Accepted, Gate};

use crate::config::NodeConfig;
use crate::error::{DaemonError, StoreFileError};
use crate::notify::Notifier;
use crate::role::{Becoming, ROLE_FILE};
use crate::tls::{Tls, caller};

/// Nodes that cannot be reached are waited for so long; then the node stops, and the service manager starts it again.
const REPAIR_WAIT_MAX: Duration = Duration::from_secs(60);
/// A disk that reads a store slower than this is not waited for.
const EXAMINED_BYTES_A_SECOND_MIN: u64 = 10 << 20;
/// Reading the store is told when it took longer.
const EXAMINED_TIME_TOLD_MIN: Duration = Duration::from_secs(1);
/// Between two looks at a snapshot that is on its way.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// How often the thread of a repair server checks whether to stop.
const STOP_CHECK_INTERVAL_MS: u16 = 50;
/// Between two attempts to be given one.
const RETRY_PAUSE: Duration = Duration::from_millis(250);

/// What was repaired since the process started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RepairCount {
    /// Parts of the log that other nodes gave back.
    pub ranges: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Stores that were damaged and made anew.
    pub stores: u64,
}

impl RepairCount {
    pub(super) fn add(&mut self, repaired: &[Repaired]) {
        self.ranges += repaired.len() as u64;
        self.bytes += repaired.iter().map(|part| part.to - part.from).sum::<u64>();
    }
}

/// Who may hold what this node lost.
pub(super) fn sources(config: &NodeConfig) -> Vec<Source> {
    let mut sources = Vec::new();
    for (name, peer) in config.members.iter().flat_map(|members| members.iter()) {
        if name.as_str() != config.name {
            sources.push(Source { name: name.to_string(), address: peer.to_string() });
        }
    }
    for peer in config.follow.iter().chain(&config.repair_from.0) {
        sources.push(Source { name: peer.to_string(), address: peer.to_string() });
    }
    sources
}

/// Restores small files of which one of the two copies is damaged.
pub(super) fn mend_small_files(data: &Path) -> Result<(), DaemonError> {
    for name in [META_FILE, ROLE_FILE, EPOCHS_FILE, ORIGIN_FILE, SLOTS_FILE, POLICY_FILE] {
        let path = data.join(name);
        small_file::mend(&path).map_err(DaemonError::file("mend", &path))?;
    }
    Ok(())
}

pub(super) fn repairer(
    config: &NodeConfig,
    meta: &Meta,
    history: &EpochHistory,
    tls: &Tls,
) -> Result<Repairer, DaemonError> {
    Ok(Repairer {
        data: config.data.clone(),
        cluster_id: meta.cluster_id,
        name: meta.name.parse()?,
        segment_bytes: meta.segment_bytes,
        history: history.clone(),
        sources: sources(config),
        links: tls.links(),
        // A start of a simulated node takes no time: it is started again instead.
        wait_max: if world::is_simulated() { Duration::ZERO } else { REPAIR_WAIT_MAX },
    })
}

/// Tells the service manager, and the log when the text is another than before.
fn teller() -> impl FnMut(&str) {
    let notifier = Notifier::new();
    let mut told = String::new();
    move |text: &str| {
        notifier.repairing(text, REPAIR_WAIT_MAX);
        if told != text {
            tracing::warn!("{text}");
            text.clone_into(&mut told);
        }
    }
}

/// Opens the log; damage in it is repaired from other nodes first.
pub(super) fn open_log(
    log_config: &LogConfig,
    lock: DirLock,
    applied: Lsn,
    (repairer, count): (&Repairer, &mut RepairCount),
    serves_at: Option<(&TcpListener, &Tls)>,
    ring: &mut Ring,
    waker: &Waker,
) -> Result<(Log, Recovery), DaemonError> {
    let mut lock = Some(lock);
    let mut last: Option<Repaired> = None;
    let mut tell = teller();
    loop {
        let held = match lock.take() {
            Some(lock) => lock,
            None => DirLock::take(&log_config.dir).map_err(LogError::from)?,
        };
        let outcome = Log::open_locked(log_config.clone(), held, applied, &repairer.history, ring, waker.clone());
        let damage = match outcome {
            Err(LogError::Recover(damage)) if damage.gap().is_some() && !repairer.sources.is_empty() => damage,
            outcome => return Ok(outcome?),
        };
        lock = Some(DirLock::take(&log_config.dir).map_err(LogError::from)?);
        tracing::warn!("{damage}");
        let needed = damage.gap().expect("just seen").needed;
        let _server =
            serves_at.map(|(listener, tls)| RepairServer::start(listener, tls, log(repairer, needed)?)).transpose()?;
        let repaired = repairer.close_next(damage, last.as_ref(), &mut tell)?;
        count.add(std::slice::from_ref(&repaired));
        last = Some(repaired);
    }
}

/// What a node holds whose log is damaged: whatever of it is whole, which is looked at when it is asked for.
fn log(repairer: &Repairer, flushed: Lsn) -> Result<LogSnapshot, DaemonError> {
    Ok(LogSnapshot {
        cluster_id: ClusterId(repairer.cluster_id),
        name: repairer.name.clone(),
        segment_bytes: repairer.segment_bytes,
        log_dir: repairer.data.join(LOG_DIR),
        history: repairer.history.clone(),
        start: log_start(&repairer.data, repairer.segment_bytes)?,
        flushed,
        // The register is opened after the log.
        members: None,
    })
}

/// Two nodes that lost different parts help each other: while one waits, a thread answers its peers. Ends when it is dropped.
struct RepairServer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    /// Where peers prove themselves first, its thread answers them.
    _gate: Option<Gate>,
}

impl RepairServer {
    fn start(listener: &TcpListener, tls: &Tls, log: LogSnapshot) -> Result<RepairServer, DaemonError> {
        let listener = listener.try_clone().map_err(DaemonError::Descriptors)?;
        let stop = Arc::new(AtomicBool::new(false));
        let frame_server = FrameServer::default();
        let greet = move |socket, caller| {
            frame_server.greet(socket, caller, "it repairs its log first".to_owned(), log.clone())
        };
        if tls.guards_peers() {
            let deliver = move |accepted: Accepted| {
                let caller = caller(&accepted);
                greet(accepted.socket, caller);
            };
            let gate = tls.gate_for_peers(listener, Box::new(deliver)).map_err(DaemonError::Descriptors)?;
            return Ok(RepairServer { stop, thread: None, _gate: Some(gate) });
        }
        let stopping = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("frame-server".to_owned()).spawn(move || {
            while !stopping.load(Ordering::Acquire) {
                // Never O_NONBLOCK: the socket is somebody else's as well, who comes after us.
                let mut ready = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
                let waiting = matches!(poll(&mut ready, STOP_CHECK_INTERVAL_MS), Ok(1..));
                if waiting && let Ok((socket, address)) = listener.accept() {
                    greet(socket.into(), Caller::unproved(address));
                }
            }
        });
        Ok(RepairServer {
            stop,
            thread: Some(thread.map_err(|source| DaemonError::Thread { name: "frame-server", source })?),
            _gate: None,
        })
    }
}

impl Drop for RepairServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Where the log of a data directory begins.
fn log_start(data: &Path, segment_bytes: u64) -> Result<Lsn, DaemonError> {
    let log = data.join(LOG_DIR);
    let segments = match list_segments(&log) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        segments => segments.map_err(DaemonError::file("list the segments of", &log))?,
    };
    let origin = Origin::load(data)?.map_or(Lsn::ZERO, |origin| origin.lsn);
    Ok(run_start(&segments).start(segment_bytes).max(origin))
}

/// Looks whether the store is whole, and moves it away for a new one if it is not. True when a snapshot took the place of the whole
/// directory's state.
pub(super) fn recover_store(
    config: &NodeConfig,
    meta: &Meta,
    history: &EpochHistory,
    tls: &Tls,
    count: &mut RepairCount,
    waker: &Waker,
) -> Result<bool, DaemonError> {
    let dir = config.data.join(STORE_DIR);
    let mut start = log_start(&config.data, meta.segment_bytes)?;
    let begun = world::now();
    let path = dir.join(STORE_FILE);
    let bytes = std::fs::metadata(&path).map_or(0, |facts| facts.len());
    // The whole file is read: no service manager may take that for a node that hangs.
    let time_max = REPAIR_WAIT_MAX + Duration::from_secs(bytes / EXAMINED_BYTES_A_SECOND_MIN);
    Notifier::new().needs_time(time_max);
    let condition = examine(&dir, config.store_cache_bytes)
        .map_err(|reason| StoreFileError::Unreadable { path: path.clone(), reason: reason.to_string() })?;
    let took = world::now().saturating_duration_since(begun);
    if took > EXAMINED_TIME_TOLD_MIN {
        tracing::info!(bytes, "the store was read whole, in {took:.1?}");
    }
    let foreign = match &condition {
        Condition::Verified(position) => foreign_to_log(config, meta, history, position)?,
        Condition::Absent | Condition::Damaged(_) => None,
    };
    let condition = match condition {
        Condition::Verified(Position { applied, .. }) if applied >= start && foreign.is_none() => return Ok(false),
        Condition::Absent if start == Lsn::ZERO => return Ok(false),
        condition => condition,
    };
    if let Some(newest) = lost_log(config, meta, history)? {
        // Segments that were only prepared are no log that begins at `start`: the store is judged by the log that was lost.
        start = newest;
        if let (Condition::Verified(Position { applied, .. }), None) = (&condition, &foreign)
            && (*applied >= start || regain_log(config, &repairer(config, meta, history, tls)?, *applied, count)?)
        {
            return Ok(false);
        }
    }
    let reason = match condition {
        Condition::Absent => format!("it is missing, and the log begins at {start} only"),
        Condition::Verified(Position { applied, .. }) => {
            foreign.unwrap_or_else(|| format!("it is of {applied}, and the log begins at {start} only"))
        }
        Condition::Damaged(reason) => reason,
    };
    tracing::warn!(file = %path.display(), "the store is damaged: {reason}");
    if start == Lsn::ZERO {
        put_store_aside(config, &path)?;
        tracing::warn!("the store is made anew from the log, which reaches back to its beginning");
    } else {
        fetch_store(config, meta, &repairer(config, meta, history, tls)?, start, waker, count).map_err(|source| {
            StoreFileError::Damaged { path: path.clone(), reason: reason.to_string(), start, fetch: source.to_string() }
        })?;
    }
    count.stores += 1;
    Ok(start > Lsn::ZERO)
}

/// When the segments that this node wrote are gone and those are left that were prepared for later: where the newest of those that
/// are gone begins, as far as the durable watermark tells.
fn lost_log(config: &NodeConfig, meta: &Meta, history: &EpochHistory) -> Result<Option<Lsn>, DaemonError> {
    let log_dir = config.data.join(LOG_DIR);
    if !log_dir.exists() {
        return Ok(None);
    }
    let origin = Origin::load(&config.data)?.map_or(Lsn::ZERO, |origin| origin.lsn);
    let durable = match Watermark::load(&config.data)? {
        KnownWatermark::As(watermark) => watermark.bound(history),
        KnownWatermark::Never | KnownWatermark::Damaged => Lsn::ZERO,
    };
    let mut bytes = DirBytes::open(&log_dir, meta.segment_bytes)?;
    if durable <= origin || bytes.segments().is_empty() || !is_unwritten(&mut bytes, origin)? {
        return Ok(None);
    }
    let newest = Lsn(durable.0 - 1).segment(meta.segment_bytes);
    Ok(Some(newest.start(meta.segment_bytes).max(origin)))
}

/// Has other nodes give back the log from where a sound store ends. False when none of them holds all of it: then they have a newer
/// state to give.
fn regain_log(
    config: &NodeConfig,
    repairer: &Repairer,
    applied: Lsn,
    count: &mut RepairCount,
) -> Result<bool, DaemonError> {
    let known = Known { applied, watermark: Watermark::load(&config.data)?, origin: Origin::load(&config.data)? };
    let look = || recover(&config.data.join(LOG_DIR), repairer.segment_bytes, known, &repairer.history);
    match repairer.repair_all(look, &mut teller()) {
        Ok((_, repaired)) => count.add(&repaired),
        Err(error @ (RepairError::NotHeld { .. } | RepairError::Again { .. })) => {
            tracing::warn!("{error}");
            return Ok(false);
        }
        Err(error) => return Err(error.into()),
    }
    Ok(true)
}

/// Why the store's state is not one of this log: it holds a frame that a truncation cut off.
pub(super) fn foreign_to_log(
    config: &NodeConfig,
    meta: &Meta,
    history: &EpochHistory,
    position: &Position,
) -> Result<Option<String>, DaemonError> {
    let log_dir = config.data.join(LOG_DIR);
    if !log_dir.exists() {
        return Ok(None);
    }
    let last = LastFrame { end: position.applied, epoch: position.epoch, crc: position.crc };
    let origin = Origin::load(&config.data)?;
    let mut bytes = DirBytes::open(&log_dir, meta.segment_bytes)?;
    let lineage = lineage_of(&mut bytes, last, origin, history)?;
    Ok(match lineage {
        Lineage::Same | Lineage::Unknown => None,
        Lineage::Other(what) => Some(format!("it is not of this log: {what}")),
    })
}

fn put_store_aside(config: &NodeConfig, path: &Path) -> Result<(), DaemonError> {
    if path.exists() {
        let kept = set_aside(&config.data, path).map_err(DaemonError::file("put aside", path))?;
        if let Some(kept) = kept {
            tracing::info!(file = %kept.display(), "the damaged store is kept");
        }
    }
    Ok(())
}

/// Takes a snapshot from whoever leads. Until it is whole nothing changes here: the log keeps what this node has confirmed.
fn fetch_store(
    config: &NodeConfig,
    meta: &Meta,
    repairer: &Repairer,
    start: Lsn,
    waker: &Waker,
    count: &mut RepairCount,
) -> Result<(), String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let history = &repairer.history;
    if world::is_simulated() {
        return Err("snapshots are not simulated".to_owned());
    }
    if repairer.sources.is_empty() {
        return Err("no other node is known to give a snapshot (--members, --follow, --repair-from)".to_owned());
    }
    let mut tell = teller();
    let known = Known {
        applied: start,
        watermark: Watermark::load(&config.data).map_err(|error| text(&error))?,
        origin: Origin::load(&config.data).map_err(|error| text(&error))?,
    };
    let log_dir = config.data.join(LOG_DIR);
    let look = || recover(&log_dir, meta.segment_bytes, known, history);
    let (found, repaired) = repairer.repair_all(look, &mut tell).map_err(|error| text(&error))?;
    count.add(&repaired);
    // A stand-alone leader that follows another gives up what it led; see `Hello::gives_up`.
    let gives_up = config.follow.is_some()
        && matches!(known.watermark, KnownWatermark::As(watermark) if watermark.led == history.last_epoch());
    let asked = gives_up || config.members.is_some() || config.becoming == Some(Becoming::Replica);
    let keeps = if asked { Lsn::ZERO } else { found.committed.min(found.end) };
    let mut floor = Lsn::ZERO;
    let mut said = vec![String::from("was not asked"); repairer.sources.len()];
    let mut moved = world::now();
    for index in (0..repairer.sources.len()).cycle() {
        let source = &repairer.sources[index];
        let fetch = FetchConfig {
            data: config.data.clone(),
            leader: source.address.clone(),
            cluster_id: meta.cluster_id,
            name: repairer.name.clone(),
            segment_bytes: meta.segment_bytes,
            peer_timeout: config.peer_timeout,
            epoch_min: if gives_up { Epoch(0) } else { history.last_epoch() },
            floor,
            keeps,
            history: history.clone(),
            flushed: found.end,
            suspect: false,
            links: Arc::clone(&repairer.links),
        };
        let fetching = Fetching::start(fetch, waker.clone()).map_err(|error| text(&error))?;
        let mut seen = (0, 0);
        let outcome = loop {
            if let Some(outcome) = fetching.outcome() {
                break outcome;
            }
            let now = fetching.progress().bytes();
            if now != seen {
                (seen, moved) = (now, world::now());
            }
            tell(&format!("takes a snapshot from {}, for its store is damaged", source.name));
            std::thread::sleep(LOOK_INTERVAL);
        };
        match outcome {
            Ok(facts) => {
                let fork = facts.history.fork_with(history, found.end);
                if fork < found.end {
                    let epoch = history.epoch_at(Lsn(found.end.0 - 1));
                    let from = fork.max(start);
                    let lost = keep_lost(&config.data, meta.segment_bytes, from, found.end, epoch);
                    let lost = lost.map_err(|error| text(&error))?;
                    tracing::warn!(file = %lost.path.display(), "{lost}");
                }
                put_store_aside(config, &config.data.join(STORE_DIR).join(STORE_FILE)).map_err(|error| text(&error))?;
                Incoming::declare_ready(&config.data).map_err(|error| text(&error))?;
                install::finish(&config.data).map_err(|error| text(&error))?;
                tracing::warn!(snapshot = %facts.snapshot, "a snapshot from {} took the place of the damaged store", source.name);
                return Ok(());
            }
            Err(error) => {
                if let FetchError::TooOld { floor: needed, .. } = &error {
                    floor = *needed;
                }
                said[index] = error.to_string();
            }
        }
        let named = repairer.sources.iter().zip(&said).map(|(source, said)| format!("{}: {said}", source.name));
        let report = named.collect::<Vec<_>>().join("; ");
        if world::now() - moved >= REPAIR_WAIT_MAX {
            return Err(format!("nobody gave a snapshot: {report}"));
        }
        tell(&format!("waits for a snapshot in the place of its damaged store: {report}"));
        std::thread::sleep(RETRY_PAUSE);
    }
    unreachable!("there is a source, and the loop goes round")
}
