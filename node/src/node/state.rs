//! What the duties of a node keep from turn to turn, a type for each. `Node` holds them; the file of each duty changes its own.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::Receiver;
use std::time::Instant;

use walferry_cluster::level::CommitLevel;
use walferry_cluster::snapshot::CopyProgress;
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_engine::told::Told;
use walferry_shipper::snapshot::file::SnapshotFile;

use crate::node::scrub::Scrub;

/// The counting of the store's keys, which goes on over several turns.
#[derive(Default)]
pub(super) struct KeyCounting {
    /// Keys are being counted, until then at the longest.
    pub(super) until: Option<Instant>,
    /// The counting ended in this turn.
    pub(super) is_done: bool,
}

/// The sync policy has too few replicas to ask.
pub(super) struct SyncLoss {
    /// What is missing.
    pub(super) text: String,
    /// The level that stands in for remote ones, when the node degrades.
    pub(super) degraded: Option<CommitLevel>,
}

/// A leader may answer nothing while no majority of the members confirms that it leads.
pub(super) struct Silence {
    /// Since when nothing was answered for it.
    pub(super) since: Instant,
    /// It has lasted too long: what was held was answered, and writes are refused until it ends.
    pub(super) answered: bool,
}

/// When the disk was looked at last, and what was seen.
pub(super) struct SpaceWatch {
    pub(super) looked_at: Instant,
    /// The disk is looked at with every turn.
    pub(super) is_scarce: bool,
}

/// The process ends. A member whose log has stopped can promise nothing: as long as it is up, it keeps others from choosing a leader.
pub(super) struct Ending {
    pub(super) reason: String,
    /// The newest epoch of this log.
    pub(super) epoch: Epoch,
    /// It waits no longer than this for another leader.
    pub(super) until: Instant,
}

/// What sessions were last woken for, to see what moved since.
#[derive(Default)]
pub(super) struct Seen {
    pub(super) applied: Lsn,
    pub(super) acknowledged: u64,
    pub(super) epoch: Epoch,
    pub(super) leads: bool,
    pub(super) fresh: Option<Instant>,
}

/// When this node's leadership began, and with which log.
pub(super) struct Leadership {
    pub(super) since: Instant,
    /// Commands execute once the store holds the log up to here: its end at that time.
    pub(super) from: Lsn,
    /// The sync set is lost, since when, and what `on_sync_loss` makes of remote levels.
    pub(super) sync_loss: Option<SyncLoss>,
    /// This node leads and holds no lease.
    pub(super) silence: Option<Silence>,
}

impl Leadership {
    pub(super) fn new(since: Instant) -> Leadership {
        Leadership { since, from: Lsn::ZERO, sync_loss: None, silence: None }
    }
}

/// The walks over old log.
pub(super) struct Scrubbing {
    /// The one on its way.
    pub(super) walk: Option<Scrub>,
    /// When the last one began.
    pub(super) began_at: Instant,
    pub(super) told: Told,
    /// What the shipper had counted of broken catch-ups when it was looked at last.
    pub(super) catchups_broken: u64,
    /// Old log before this is damaged and no node gave it back; else 0.
    pub(super) readable_from: Lsn,
}

impl Scrubbing {
    pub(super) fn new(now: Instant) -> Scrubbing {
        Scrubbing { walk: None, began_at: now, told: Told::default(), catchups_broken: 0, readable_from: Lsn::ZERO }
    }
}

/// What the node knows of snapshots.
#[derive(Default)]
pub(crate) struct SnapshotTransfers {
    /// A checkpoint for a copy was asked for and waits.
    pub(super) commit_wait: Option<CommitWait>,
    pub(super) making: Option<Making>,
    /// Copies that are being shown.
    pub(super) shown: Vec<Arc<CopyProgress>>,
    /// Copies that this node has put in place since it started, bytes that travelled for the last one, and bytes that were kept.
    pub(crate) taken: u64,
    pub(crate) taken_bytes: u64,
    pub(super) kept_bytes: u64,
}

/// How long the commit LSN has stood still while a checkpoint waits for it.
pub(crate) struct CommitWait {
    pub(super) committed: Lsn,
    pub(super) moved: Instant,
}

/// A thread that makes a copy; dropped, it ends. One that was told to end is waited for: the next writes to the same file.
pub(crate) struct Making {
    pub(super) stop: Arc<AtomicBool>,
    pub(super) outcome: Receiver<Result<SnapshotFile, String>>,
}
