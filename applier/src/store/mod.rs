//! The store: what the log says, as keys that can be read. Rebuilt from the log, so it may lag behind it but never leads.
//!
//! ```text
//! apply ──> active overlay ──freeze──> frozen overlay ──checkpoint (its own thread)──> store file
//! get   ──> active, else frozen, else store file
//! ```
//!
//! A checkpoint holds nothing beyond the committed LSN, so that what a failover takes back is only in memory. There are two
//! exceptions, [`Store::went_beyond`] tells of them: the overlay is full, or a snapshot transfer needs a newer checkpoint. Where what such a
//! checkpoint holds is cut, the store is made anew from a snapshot.

pub mod check;
pub mod error;
pub mod export;
mod file;
pub mod overlay;
#[cfg(feature = "simulation")]
mod simulated;

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use walferry_engine::frame::Frame;
use walferry_engine::lsn::Lsn;
use walferry_engine::mutants;
use walferry_engine::told::Rarely;
use walferry_engine::world::{self, Inbox, Pace, Task};

use crate::record::{Effect, StreamId, effects};
use crate::view::{About, Value, View};
pub use error::StoreError;
pub use file::{Position, STORE_FILE};
use file::{StoreFile, write_checkpoint};
use overlay::{Count, Overlay, Slot, State, hash_of};

/// The directory of the store in the data directory.
pub const STORE_DIR: &str = "store";
/// The overlay may grow to this many times `checkpoint_bytes` while the one before it is being written; then `overloaded`.
const OVERLAY_CHECKPOINTS_MAX: usize = 4;
/// Overlays in memory: the one that takes changes, and the one that is being written.
const OVERLAYS_MAX: usize = 2;
/// What `checkpoint_bytes` and `checkpoint_log_bytes` are taken to be at least.
const CHECKPOINT_BYTES_MIN: usize = 1 << 20;
/// What a checkpoint may take beside what has changed.
const CHECKPOINT_SPARE_BYTES: u64 = 4 << 20;
/// Changes in memory for which a checkpoint is worth while, where the disk has little space.
pub const SPACE_CHECKPOINT_BYTES_MIN: usize = 1 << 20;
/// That a checkpoint is put off is logged once in so long.
const PUT_OFF_TELL_INTERVAL: Duration = Duration::from_secs(60);
/// More streams than this that got entries in one turn are not named one by one.
const ADDED_STREAMS_MAX: usize = 16 << 10;
/// A SCAN ends behind the key with which its keys are this long together.
const SCAN_BYTES_MAX: usize = 256 << 10;

/// How a store is opened.
#[derive(Clone, Copy, Debug)]
pub struct StoreConfig {
    /// Changes in memory, bytes, that trigger a checkpoint.
    pub checkpoint_bytes: usize,
    /// Log behind the newest checkpoint, bytes, that triggers another. A few keys that are written again and again change little in
    /// memory, but the log behind the newest checkpoint cannot be recycled.
    pub checkpoint_log_bytes: u64,
    /// Changes are no longer than this in memory only, so that a restart has little to replay.
    pub checkpoint_interval: Duration,
    /// Pages of the file that stay in memory, bytes.
    pub cache_bytes: usize,
}

/// What the disk needs to have for a checkpoint of this.
fn space_for(overlay: &Overlay) -> u64 {
    overlay.file_bytes_max() + CHECKPOINT_SPARE_BYTES
}

/// An overlay on its way into the file.
struct Frozen {
    overlay: Arc<Overlay>,
    /// What it adds to the number of keys in the file.
    count: Count,
    position: Position,
    /// Handed to the thread; until then it waits for the commit LSN.
    writing: bool,
}

struct Job {
    overlay: Arc<Overlay>,
    position: Position,
}

impl StoreConfig {
    /// The most that overlays take in memory, where no frame is larger than `frame_bytes` and applying stops at [`Store::overloaded`]
    /// after at most `turn_bytes`. Keys and entries that are small cost more in memory than in the log; see `overlay::ENTRY_BYTES`.
    pub fn overlay_bytes_max(&self, turn_bytes: usize) -> usize {
        OVERLAYS_MAX * (self.checkpoint_bytes.max(CHECKPOINT_BYTES_MIN) * OVERLAY_CHECKPOINTS_MAX + turn_bytes)
    }
}

/// The store of one node. Used by one thread; checkpoints are written on another.
pub struct Store {
    config: StoreConfig,
    active: Overlay,
    frozen: Option<Frozen>,
    store_file: StoreFile,
    /// The state that readers see; `durable_applied <= applied`.
    position: Position,
    jobs: Option<Sender<Job>>,
    results: Receiver<Result<(), redb::Error>>,
    task: Option<Task>,
    checkpoints: u64,
    /// When a checkpoint was last due for want of changes: since then there are some that only memory holds.
    changed_since: Option<Instant>,
    /// Somebody waits for a checkpoint that holds everything before this.
    asked_for: Lsn,
    /// ... and cannot wait for the commit LSN.
    asked_beyond: bool,
    /// A checkpoint went beyond the commit LSN because memory ran out; told once.
    warned_beyond: bool,
    /// What the disk has left, as told last.
    free_bytes: u64,
    /// A checkpoint is due, and has no space: what it needs.
    put_off: Option<u64>,
    put_off_told: Rarely,
    /// No key that is in neither file nor overlays was changed behind this: deletions that checkpoints have forgotten.
    forgotten_delete: Lsn,
    /// While somebody watches streams: the last entry of each to which entries were added, by the hash of its key.
    added: Option<HashMap<u64, StreamId>>,
}

/// How many keys there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeyCount {
    /// The number, or an estimate.
    pub keys: u64,
    /// False while the number is an estimate.
    pub is_exact: bool,
}

impl Store {
    /// Opens or makes the store in `dir`. `wake` is called on another thread when a checkpoint is done.
    pub fn open(dir: &Path, config: StoreConfig, wake: Box<dyn Fn() + Send>) -> Result<Store, StoreError> {
        let setup = |source| StoreError::Setup { path: dir.to_owned(), source };
        std::fs::create_dir_all(dir).map_err(setup)?;
        let store_file = StoreFile::open(dir, config.cache_bytes)?;
        let (jobs, job_queue) = channel::<Job>();
        let (done, results) = channel();
        let (database, path) = (store_file.database(), store_file.path().to_owned());
        let write = move || {
            let job = match world::take(&job_queue) {
                Inbox::Item(job) => job,
                Inbox::Empty => return Pace::Asleep,
                Inbox::Closed => return Pace::Over,
            };
            let outcome = write_checkpoint(&path, &database, &job.overlay, job.position);
            // The overlay is large: it is freed here, not on the ring thread.
            drop(job);
            if done.send(outcome).is_err() {
                return Pace::Over;
            }
            wake();
            Pace::Again
        };
        let task = world::spawn("checkpoint", Box::new(write)).map_err(setup)?;
        let checkpoint_bytes_min = if world::is_simulated() { 0 } else { CHECKPOINT_BYTES_MIN };
        Ok(Store {
            config: StoreConfig {
                checkpoint_bytes: config.checkpoint_bytes.max(checkpoint_bytes_min),
                checkpoint_log_bytes: config.checkpoint_log_bytes.max(checkpoint_bytes_min as u64),
                ..config
            },
            active: Overlay::counted(),
            frozen: None,
            position: store_file.position(),
            // What was deleted before is not known.
            forgotten_delete: store_file.position().applied,
            store_file,
            jobs: Some(jobs),
            results,
            task: Some(task),
            checkpoints: 0,
            added: None,
            changed_since: None,
            asked_for: Lsn::ZERO,
            asked_beyond: false,
            warned_beyond: false,
            free_bytes: u64::MAX,
            put_off: None,
            put_off_told: Rarely::default(),
        })
    }

    /// Where its file is.
    pub fn path(&self) -> &Path {
        self.store_file.path()
    }

    /// End of the last frame that was applied.
    pub fn applied(&self) -> Lsn {
        self.position.applied
    }

    /// When the leader sealed that frame, microseconds since the Unix epoch; 0 before the first.
    pub fn applied_at_us(&self) -> u64 {
        self.position.at_us
    }

    /// What the file holds: the log before it is not needed for a restart.
    pub fn durable_applied(&self) -> Lsn {
        self.store_file.position().applied
    }

    /// The same, with what tells it from the state of another log.
    pub fn durable_position(&self) -> Position {
        self.store_file.position()
    }

    /// Checkpoints written since the start.
    pub fn checkpoints(&self) -> u64 {
        self.checkpoints
    }

    /// Memory of changes that are not in the file, bytes, about.
    pub fn overlay_bytes(&self) -> usize {
        self.active.bytes() + self.frozen.as_ref().map_or(0, |frozen| frozen.overlay.bytes())
    }

    /// True while too many changes wait for the file: take no more writes until a checkpoint is done.
    pub fn overloaded(&self) -> bool {
        let waits = self.frozen.is_some() || self.put_off.is_some();
        waits && self.active.bytes() > self.config.checkpoint_bytes * OVERLAY_CHECKPOINTS_MAX
    }

    /// What the disk has left for checkpoints.
    pub fn set_free(&mut self, bytes: u64) {
        self.free_bytes = bytes;
    }

    /// What the disk has to have left, so that the changes in memory find a place in the file.
    pub fn space_wanted(&self) -> u64 {
        self.overlays().filter(|overlay| overlay.keys() > 0).map(space_for).sum()
    }

    /// Why no more changes are to be made: their checkpoint is due by their size, and the disk has no space for it.
    pub fn lacks_space(&self) -> Option<String> {
        let needed = self.put_off.filter(|_| self.active.bytes() >= self.config.checkpoint_bytes)?;
        Some(format!(
            "the store's checkpoint needs {needed} bytes, and the disk of {} has {} free: free some space there",
            self.path().display(),
            self.free_bytes
        ))
    }

    /// Applies the frame that starts where the last one ended.
    pub fn apply(&mut self, frame: &Frame<'_>) -> Result<(), StoreError> {
        debug_assert!(frame.header().lsn >= self.position.applied, "a frame is applied once");
        for (lsn, record) in frame.records() {
            for effect in effects(record) {
                let effect = effect.map_err(|source| StoreError::Record { lsn, source })?;
                let (frozen, store_file) = (&self.frozen, &self.store_file);
                let hash = self.active.apply(&effect, lsn, |hash, key| {
                    Ok(about_below(frozen.as_ref(), store_file, hash, key)?.and_then(|(about, _)| about))
                })?;
                if let (Effect::StreamAdd { id, .. }, Some(added)) = (&effect, &mut self.added) {
                    added.insert(hash, *id);
                }
            }
        }
        // Too many to be named: whoever watches looks at all.
        self.added.take_if(|added| added.len() > ADDED_STREAMS_MAX);
        let header = frame.header();
        let (applied, at_us) = (header.end(), header.sealed_at_us);
        self.position = Position { applied, at_us, epoch: header.epoch, crc: header.crc };
        Ok(())
    }

    /// Moves checkpoints along; once a turn. `committed` is the commit LSN as this node knows it.
    pub fn poll_checkpoint(&mut self, committed: Lsn, now: Instant) -> Result<(), StoreError> {
        self.take_outcome()?;
        self.put_off = None;
        if self.frozen.is_none() && self.is_due(now) {
            let needed = space_for(&self.active);
            if needed > self.free_bytes {
                self.put_off(needed, now);
                return Ok(());
            }
            self.changed_since = None;
            self.freeze();
        }
        let beyond = self.overloaded() || self.asked_beyond && self.asked_for > self.durable_applied();
        let Some(frozen) = self.frozen.as_mut().filter(|frozen| !frozen.writing) else { return Ok(()) };
        let needed = space_for(&frozen.overlay);
        if needed > self.free_bytes {
            self.put_off(needed, now);
            return Ok(());
        }
        if frozen.position.applied > committed && !mutants::is_on("checkpoint-beyond-commits") {
            if !beyond {
                return Ok(());
            }
            if !self.warned_beyond {
                self.warned_beyond = true;
                tracing::warn!(
                    applied = %frozen.position.applied, %committed,
                    "the sync set has not confirmed for too long: a checkpoint goes beyond the commit LSN. Should another node be \
                     promoted now, this one needs a snapshot"
                );
            }
        }
        frozen.writing = true;
        let job = Job { overlay: Arc::clone(&frozen.overlay), position: frozen.position };
        if let Some(jobs) = &self.jobs {
            // The thread ends only after the sender is gone.
            let _ = jobs.send(job);
            self.task.iter().for_each(Task::wake);
        }
        Ok(())
    }

    /// A checkpoint that cannot be finished is not begun: one that fails for want of space ends the node.
    fn put_off(&mut self, needed: u64, now: Instant) {
        self.put_off = Some(needed);
        if self.put_off_told.tell(PUT_OFF_TELL_INTERVAL, now).is_some() {
            let (free, path) = (self.free_bytes, self.path().display());
            tracing::warn!(%path, needed, free, "a checkpoint is put off, the disk has no space for it");
        }
    }

    /// True when a checkpoint is to be begun: one was asked for, or the changes in memory are large, long in the log, or old, or
    /// would soon have no space in the file.
    fn is_due(&mut self, now: Instant) -> bool {
        let (applied, durable) = (self.applied(), self.durable_applied());
        if applied <= durable {
            self.changed_since = None;
            return false;
        }
        let since = *self.changed_since.get_or_insert(now);
        (self.asked_for > durable && applied >= self.asked_for)
            || applied.since(durable) > self.config.checkpoint_log_bytes
            || now.saturating_duration_since(since) >= self.config.checkpoint_interval
            || self.active.bytes() >= self.config.checkpoint_bytes
            || self.active.bytes() >= SPACE_CHECKPOINT_BYTES_MIN && 2 * space_for(&self.active) > self.free_bytes
    }

    /// When `poll_checkpoint` is due at the latest, though nothing else happens.
    pub fn next_timeout(&self, now: Instant) -> Option<Duration> {
        let since = self.changed_since.filter(|_| self.frozen.is_none())?;
        Some(since.checked_add(self.config.checkpoint_interval)?.saturating_duration_since(now))
    }

    /// A checkpoint that holds everything before `lsn` is wanted, sooner than the size of the changes would bring it. It comes with
    /// the commit LSN, as every other, unless it is to go `beyond`.
    pub fn ask_for_checkpoint(&mut self, lsn: Lsn, beyond: bool) {
        self.asked_for = self.asked_for.max(lsn);
        self.asked_beyond = beyond;
    }

    /// A checkpoint that holds everything before `lsn` would let log go that the disk has no space for. It waits for the commit LSN.
    pub fn ask_for_space_before(&mut self, lsn: Lsn) {
        self.asked_for = self.asked_for.max(lsn);
    }

    /// True when a checkpoint was not to wait for the commit LSN: memory ran out, or a snapshot was wanted.
    pub fn went_beyond(&self) -> bool {
        self.warned_beyond
    }

    fn freeze(&mut self) {
        let mut overlay = std::mem::replace(&mut self.active, Overlay::counted());
        let count = overlay.take_count();
        self.frozen = Some(Frozen { overlay: Arc::new(overlay), count, position: self.position, writing: false });
    }

    fn finish(&mut self, outcome: Result<(), redb::Error>) -> Result<(), StoreError> {
        outcome.map_err(StoreError::at(self.store_file.path()))?;
        self.store_file.renew()?;
        if let Some(frozen) = self.frozen.take() {
            self.forgotten_delete = self.forgotten_delete.max(frozen.overlay.last_delete());
        }
        self.checkpoints += 1;
        Ok(())
    }

    /// Forgets everything that is not in the file; the caller replays the log from `applied` on.
    pub fn rollback(&mut self) -> Result<(), StoreError> {
        self.finish_checkpoint()?;
        (self.frozen, self.put_off) = (None, None);
        self.changed_since = None;
        self.active.clear();
        if !mutants::is_on("keep-what-was-applied") {
            self.position = self.store_file.position();
        }
        Ok(())
    }

    /// Notices that a checkpoint was written.
    fn take_outcome(&mut self) -> Result<(), StoreError> {
        self.results.try_recv().map_or(Ok(()), |outcome| self.finish(outcome))
    }

    /// True while a checkpoint is being written, or its outcome was not taken yet.
    pub fn writes_checkpoint(&self) -> bool {
        self.frozen.as_ref().is_some_and(|frozen| frozen.writing)
    }

    /// True while a checkpoint is being written: what the file holds may change without further notice.
    pub fn is_writing(&mut self) -> Result<bool, StoreError> {
        self.take_outcome()?;
        Ok(self.writes_checkpoint())
    }

    /// Waits for the checkpoint that is being written, if one is. Whoever decides by what the file holds waits for it before.
    pub fn finish_checkpoint(&mut self) -> Result<(), StoreError> {
        if self.writes_checkpoint()
            && let Ok(outcome) = self.task.as_ref().expect("there until dropped").receive(&self.results)
        {
            self.finish(outcome)?;
        }
        Ok(())
    }

    /// Ends the store with a checkpoint, unless that would go beyond `committed`; then the log is replayed at the next start.
    pub fn close(mut self, committed: Lsn) -> Result<(), StoreError> {
        self.finish_checkpoint()?;
        if self.frozen.is_none() && self.active.keys() > 0 {
            self.freeze();
        }
        // Where that has no space the log is replayed as well.
        self.poll_checkpoint(committed, world::now())?;
        self.finish_checkpoint()
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(task) = self.task.take() {
            task.join();
        }
    }
}

fn entry_below(
    frozen: Option<&Frozen>,
    store_file: &StoreFile,
    hash: u64,
    key: &[u8],
) -> Result<Option<(Value, Lsn)>, StoreError> {
    if let Some(slot) = frozen.and_then(|frozen| frozen.overlay.find(hash, key)) {
        let value = slot.value(|| Ok(store_file.entry(hash, key)?.map(|entry| entry.0)))?;
        return Ok(value.map(|value| (value, slot.version)));
    }
    store_file.entry(hash, key)
}

impl Store {
    /// The overlays from the newest on.
    fn overlays(&self) -> impl Iterator<Item = &Overlay> {
        std::iter::once(&self.active).chain(self.frozen.as_ref().map(|frozen| &*frozen.overlay))
    }

    fn newest(&self, hash: u64, key: &[u8]) -> Option<&Slot> {
        self.overlays().find_map(|overlay| overlay.find(hash, key))
    }
}

/// What the key holds below the active overlay, and its version, where either is known.
fn about_below(
    frozen: Option<&Frozen>,
    store_file: &StoreFile,
    hash: u64,
    key: &[u8],
) -> Result<Option<(Option<About>, Lsn)>, StoreError> {
    if let Some(slot) = frozen.and_then(|frozen| frozen.overlay.find(hash, key)) {
        return Ok(Some((slot.about(), slot.version)));
    }
    Ok(store_file.about(hash, key)?.map(|(about, version)| (Some(about), version)))
}

impl Store {
    /// From now on `take_added` tells what is added to streams.
    pub fn watch_streams(&mut self) {
        self.added.get_or_insert_default();
    }

    /// Stops recording which streams get entries: no session waits for any.
    pub fn ignore_streams(&mut self) {
        self.added = None;
    }

    /// The last entry of each stream to which entries were added since the last call, by the hash of its key. `None` when that was
    /// not watched, or there are too many.
    pub fn take_added(&mut self) -> Option<HashMap<u64, StreamId>> {
        self.added.as_mut().map(std::mem::take)
    }

    /// How many keys there are. Whether a changed key existed before is looked up once, for up to `lookups` of them with this call:
    /// as long as there are more, the number is an estimate.
    pub fn count_keys(&mut self, mut lookups: usize) -> Result<KeyCount, StoreError> {
        let keys_in_file = self.store_file.len()?;
        if let Some(Frozen { overlay, count, .. }) = &mut self.frozen {
            let exists = |hash, key: &[u8]| Ok(keys_in_file > 0 && self.store_file.about(hash, key)?.is_some());
            count.go_on_in(overlay, &mut lookups, exists)?;
        }
        let (frozen, store_file) = (self.frozen.as_ref(), &self.store_file);
        self.active.count_some(&mut lookups, |hash, key| {
            let found =
                if keys_in_file == 0 && frozen.is_none() { None } else { about_below(frozen, store_file, hash, key)? };
            Ok(found.is_some_and(|(about, _)| about.is_some()))
        })?;
        self.counted_keys()
    }

    /// How many keys there are, as far as they are counted.
    pub fn counted_keys(&self) -> Result<KeyCount, StoreError> {
        let counts = [Some(self.active.count()), self.frozen.as_ref().map(|frozen| &frozen.count)];
        let net = counts.iter().flatten().map(|count| count.net()).sum();
        let is_exact = counts.iter().flatten().all(|count| count.is_exact());
        Ok(KeyCount { keys: self.store_file.len()?.saturating_add_signed(net), is_exact })
    }
}

impl View for Store {
    fn about(&self, key: &[u8]) -> Result<(Option<About>, Lsn), StoreError> {
        let hash = hash_of(key);
        if let Some(slot) = self.active.find(hash, key) {
            return Ok((slot.about(), slot.version));
        }
        let below = about_below(self.frozen.as_ref(), &self.store_file, hash, key)?;
        Ok(below.unwrap_or((None, self.forgotten_delete)))
    }

    fn entry(&self, key: &[u8]) -> Result<Option<(Value, Lsn)>, StoreError> {
        let hash = hash_of(key);
        if let Some(slot) = self.active.find(hash, key) {
            let below = || Ok(entry_below(self.frozen.as_ref(), &self.store_file, hash, key)?.map(|entry| entry.0));
            return Ok(slot.value(below)?.map(|value| (value, slot.version)));
        }
        entry_below(self.frozen.as_ref(), &self.store_file, hash, key)
    }

    fn stream_range(
        &self,
        key: &[u8],
        from: StreamId,
        to: StreamId,
        reverse: bool,
        limit: usize,
        each: &mut dyn FnMut(StreamId, &[u8]) -> bool,
    ) -> Result<(), StoreError> {
        let hash = hash_of(key);
        // The overlays that hold a part of the stream, newest first, down to the one where it begins.
        let mut tails = Vec::new();
        let mut in_file = true;
        for slot in self.overlays().filter_map(|overlay| overlay.find(hash, key)) {
            match &slot.state {
                State::Stream(tail) => tails.push(tail),
                State::Absent | State::String(_) | State::Appended(_) => in_file = false,
            }
            in_file &= matches!(&slot.state, State::Stream(tail) if !tail.fresh);
            if !in_file {
                break;
            }
        }
        let mut left = limit;
        let mut counted = |id: StreamId, fields: &[u8]| {
            left -= 1;
            each(id, fields) && left > 0
        };
        if limit == 0 || from > to {
            return Ok(());
        }
        let newer = |counted: &mut dyn FnMut(StreamId, &[u8]) -> bool| {
            if reverse {
                let mut all = tails.iter().flat_map(|tail| tail.between(from, to, None).iter().rev());
                all.all(|(id, fields)| counted(*id, fields))
            } else {
                let mut all = tails.iter().rev().flat_map(|tail| tail.between(from, to, None));
                all.all(|(id, fields)| counted(*id, fields))
            }
        };
        if reverse && !newer(&mut counted) {
            return Ok(());
        }
        // A look is cheap, and finding the place among entries may read large ones of other streams.
        let in_file = in_file && matches!(self.store_file.about(hash, key)?, Some((About::Stream(_), _)));
        if in_file && !self.store_file.stream_range((hash, key), (from, to), reverse, limit, &mut counted)? {
            return Ok(());
        }
        if !reverse {
            newer(&mut counted);
        }
        Ok(())
    }

    fn scan(&self, cursor: u64, count: usize) -> Result<(u64, Vec<Vec<u8>>), StoreError> {
        let (keys, mut next) = self.store_file.scan(cursor, count, SCAN_BYTES_MAX)?;
        let mut keys: Vec<(u64, Cow<'_, [u8]>)> = keys.into_iter().map(|(hash, key)| (hash, Cow::Owned(key))).collect();
        for overlay in self.overlays() {
            let (slots, overlay_next) = overlay.scan(cursor, count);
            keys.extend(slots.into_iter().map(|slot| (slot.hash(), Cow::Borrowed(&*slot.key))));
            next = match (next, overlay_next) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
        }
        keys.sort_unstable();
        keys.dedup();
        // Beyond `next` some source has not been asked yet.
        keys.retain(|(hash, _)| next.is_none_or(|next| *hash < next));
        let exists = |hash: u64, key: &[u8]| match self.newest(hash, key) {
            Some(slot) => !matches!(slot.state, State::Absent),
            None => true,
        };
        let (mut found, mut bytes, mut last) = (Vec::new(), 0, cursor);
        for (hash, key) in keys {
            if (found.len() >= count || bytes >= SCAN_BYTES_MAX) && hash != last {
                return Ok((hash, found));
            }
            last = hash;
            bytes += key.len();
            if exists(hash, &key) {
                found.push(key.into_owned());
            }
        }
        Ok((next.unwrap_or(0), found))
    }
}

#[cfg(test)]
#[path = "../store_tests.rs"]
mod tests;
