//! Keeps the next segments ready, on a thread of its own: a write into blocks that were written before needs no
//! ext4 metadata, so a segment is written with zeros once, ahead of need, and released segments are recycled by
//! rename. `log.rs` tells which numbers it wants and which it no longer needs, and takes the open files.
//! Knows nothing of frames.
//!
//! A segment appears under its number only when it is whole and durable: zeros go to a temporary name, then
//! fsync, rename, fsync of the directory.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::file_size::Named;
use crate::limits::FRAME_ALIGN_BYTES;
use crate::lsn::SegmentNo;
use crate::waker::Waker;
use crate::world::{self, Pace, Task};

/// The name under which a segment is written with zeros before it has a number.
pub const TEMPORARY_FILE: &str = "prepare.tmp";
/// Zeros go to the disk in pieces of this size, so that a log write between them waits for one piece only.
const ZERO_WRITE_BYTES: usize = 1 << 20;
/// After a failure (no space, most often) the next attempt comes this much later.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// After one that may pass in a moment it comes so much later at first, and twice as much each time.
const RETRY_INTERVAL_MIN: Duration = Duration::from_millis(10);
/// Released segments that are kept as future ones beyond what is wanted; further ones are deleted.
const RECYCLED_SEGMENTS_MAX: u64 = 8;
/// Segments without which the log cannot go on: one that is written, two that were and are not in a checkpoint yet, one that is next.
const SEGMENTS_NEEDED: u64 = 4;
/// Recycled segments take no more than this beyond what is wanted.
const RECYCLED_BYTES_MAX: u64 = 1 << 30;

/// What the preparer needs to know.
#[derive(Clone, Debug)]
pub struct PrepareConfig {
    /// The directory of the segments.
    pub log_dir: PathBuf,
    /// The size of each.
    pub segment_bytes: u64,
    /// No O_DIRECT.
    pub buffered: bool,
}

/// What the log wants and what it got; one lock, held for moments.
#[derive(Debug)]
struct Plan {
    /// Segments below this number are wanted.
    wanted_until: SegmentNo,
    /// Segments below this number are no longer needed; `first <= released_until <= next`.
    released_until: SegmentNo,
    /// The oldest segment on disk.
    first: SegmentNo,
    /// The first number that has no segment yet.
    next: SegmentNo,
    /// Prepared and not yet taken by the log; at most RECYCLED_SEGMENTS_MAX and what is wanted.
    ready: VecDeque<(SegmentNo, File)>,
    /// Why the last attempt failed.
    space_error: Option<NoSegment>,
    stop: bool,
}

/// Why the last attempt to prepare a segment failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoSegment {
    /// What was attempted, where, and what the system said.
    pub text: String,
    /// What it may need.
    pub cause: Cause,
}

/// What the next attempt to prepare a segment needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The disk or a quota is full: there may be space again.
    Space,
    /// The process or the machine was short of descriptors or memory, or a signal came: it passes by itself, soon.
    Passing,
    /// Nothing that would be there by itself.
    Lasting,
}

impl Cause {
    fn of(error: &io::Error) -> Cause {
        match (error.kind(), error.raw_os_error()) {
            (io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded, _) => Cause::Space,
            (_, Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::EINTR | libc::EAGAIN)) => Cause::Passing,
            _ => Cause::Lasting,
        }
    }
}

#[derive(Debug)]
struct Shared {
    plan: Mutex<Plan>,
    change: Condvar,
    /// True when `ready` or `space_error` changed since the log looked.
    news: AtomicBool,
    /// What the store needs of the disk.
    spare_bytes: AtomicU64,
    /// The store is writing a checkpoint.
    store_writes: AtomicBool,
}

impl Shared {
    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().expect("the segment preparer's lock: a holder panicked")
    }
}

/// The log's end of the thread.
#[derive(Debug)]
pub struct Preparer {
    shared: Arc<Shared>,
    task: Option<Task>,
}

impl Preparer {
    /// Starts the thread. Segments from `first` up to and without `next` exist; those below `wanted_until` are wanted.
    pub fn start(
        config: PrepareConfig,
        first: SegmentNo,
        next: SegmentNo,
        wanted_until: SegmentNo,
        waker: Waker,
    ) -> io::Result<Preparer> {
        remove_if_there(&config.log_dir.join(TEMPORARY_FILE))?;
        let names = File::open(&config.log_dir)?;
        let (ready, space_error) = (VecDeque::new(), None);
        let plan = Plan { wanted_until, released_until: first, first, next, ready, space_error, stop: false };
        let (plan, change) = (Mutex::new(plan), Condvar::new());
        let shared = Arc::new(Shared {
            plan,
            change,
            news: AtomicBool::new(false),
            spare_bytes: AtomicU64::new(0),
            store_writes: AtomicBool::new(false),
        });
        let retry_after = RETRY_INTERVAL_MIN;
        let mut work = Work { config, shared: Arc::clone(&shared), waker, names, rest: None, retry_after };
        let task = world::spawn("segments", Box::new(move || work.step()))?;
        Ok(Preparer { shared, task: Some(task) })
    }

    fn task(&self) -> &Task {
        self.task.as_ref().expect("there until dropped")
    }

    /// A new segment leaves so much of the disk to the store while there is that much, and where the store writes already, in any case.
    pub fn leave_spare(&self, bytes: u64, is_writing: bool) {
        self.shared.spare_bytes.store(bytes, Ordering::Relaxed);
        self.shared.store_writes.store(is_writing, Ordering::Relaxed);
    }

    /// Segments below `until` are wanted.
    pub fn want(&self, until: SegmentNo) {
        let mut plan = self.shared.plan();
        if until > plan.wanted_until {
            plan.wanted_until = until;
            self.task().wake();
        }
    }

    /// Segments below `until` are no longer needed.
    pub fn release(&self, until: SegmentNo) {
        let mut plan = self.shared.plan();
        assert!(until <= plan.next);
        if until > plan.released_until {
            plan.released_until = until;
            self.task().wake();
        }
    }

    /// Moves what became ready into `segments`, in order, and updates the reason why nothing does.
    /// Costs one atomic load when nothing changed.
    pub fn take(&self, segments: &mut VecDeque<(SegmentNo, File)>, space_error: &mut Option<NoSegment>) {
        if self.shared.news.load(Ordering::Relaxed) && self.shared.news.swap(false, Ordering::Acquire) {
            let mut plan = self.shared.plan();
            segments.append(&mut plan.ready);
            space_error.clone_from(&plan.space_error);
        }
    }

    /// Waits until a segment is ready or an attempt failed.
    pub fn wait(&self) {
        let waits = |plan: &Plan| plan.ready.is_empty() && plan.space_error.is_none() && plan.next < plan.wanted_until;
        let mut plan = self.shared.plan();
        while waits(&plan) {
            if world::is_simulated() {
                drop(plan);
                self.task().poke();
                plan = self.shared.plan();
                continue;
            }
            plan = self.shared.change.wait(plan).expect("the segment preparer's lock: a holder panicked");
        }
    }
}

impl Drop for Preparer {
    fn drop(&mut self) {
        self.shared.plan().stop = true;
        if let Some(task) = self.task.take() {
            task.wake();
            task.join();
        }
    }
}

/// What the thread does next.
#[derive(Clone, Copy)]
enum Step {
    Recycle(SegmentNo, SegmentNo),
    Zero(SegmentNo),
    Delete(SegmentNo),
}

/// Why a step failed.
struct Failure {
    error: io::Error,
    /// A directory that could not be synced: trying again may report success for names that are not durable.
    lasting: bool,
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        Failure { error, lasting: false }
    }
}

struct Work {
    config: PrepareConfig,
    shared: Arc<Shared>,
    waker: Waker,
    /// The directory, open from the start: to make names durable must not need a descriptor.
    names: File,
    /// A step failed: nothing is tried again before then.
    rest: Option<(Instant, Step)>,
    /// How much later the next attempt comes after a failure that passes.
    retry_after: Duration,
}

impl Work {
    fn step(&mut self) -> Pace {
        let step = {
            let plan = self.shared.plan();
            if plan.stop {
                return Pace::Over;
            }
            if let Some(left) = self.rest_left(&plan) {
                return Pace::Idle(left);
            }
            self.rest = None;
            match self.next_step(&plan) {
                Some(step) => step,
                None => return Pace::Asleep,
            }
        };
        let outcome = match step {
            Step::Recycle(old, new) => self.recycle(old, new).map(|file| Some((new, file))),
            Step::Zero(new) => self.zero(new).map(|file| Some((new, file))),
            Step::Delete(old) => self.delete(old).map(|()| None),
        };
        match outcome {
            Ok(made) => {
                self.retry_after = RETRY_INTERVAL_MIN;
                self.report(&step, made);
            }
            Err(failure) => {
                let cause = if failure.lasting { Cause::Lasting } else { Cause::of(&failure.error) };
                self.fail(&step, &failure.error, cause);
                if failure.lasting {
                    return Pace::Over;
                }
                let after = if cause == Cause::Passing { self.retry_after } else { RETRY_INTERVAL };
                self.retry_after = (self.retry_after * 2).min(RETRY_INTERVAL);
                self.rest = Some((world::now() + after, step));
            }
        }
        Pace::Again
    }

    /// For how long what failed is not tried again.
    fn rest_left(&self, plan: &Plan) -> Option<Duration> {
        let (until, failed) = self.rest?;
        // A released segment can be recycled at once: that needs no space.
        let recycles = plan.first < plan.released_until && matches!(failed, Step::Zero(_));
        let left = until.saturating_duration_since(world::now());
        (!recycles && !left.is_zero()).then_some(left)
    }

    fn next_step(&self, plan: &Plan) -> Option<Step> {
        let spare = RECYCLED_SEGMENTS_MAX.min(RECYCLED_BYTES_MAX / self.config.segment_bytes);
        let released = plan.first < plan.released_until;
        if released && plan.next.0 < plan.wanted_until.0 + spare {
            Some(Step::Recycle(plan.first, plan.next))
        } else if plan.next < plan.wanted_until {
            Some(Step::Zero(plan.next))
        } else {
            released.then_some(Step::Delete(plan.first))
        }
    }

    fn report(&self, step: &Step, made: Option<(SegmentNo, File)>) {
        let mut plan = self.shared.plan();
        if matches!(step, Step::Recycle(..) | Step::Delete(_)) {
            plan.first = plan.first.next();
        }
        if let Some((number, file)) = made {
            plan.next = number.next();
            plan.ready.push_back((number, file));
        }
        if plan.space_error.take().is_some() {
            tracing::info!("segments can be prepared again");
        }
        self.announce(plan);
    }

    fn fail(&self, step: &Step, error: &io::Error, cause: Cause) {
        let what = match step {
            Step::Recycle(old, new) => {
                format!("recycle segment {} as {}", old.file_name(), new.file_name())
            }
            Step::Zero(new) => format!("prepare segment {}", new.file_name()),
            Step::Delete(old) => format!("delete segment {}", old.file_name()),
        };
        let text = format!("cannot {what} in {}: {}", self.config.log_dir.display(), Named(error));
        let mut plan = self.shared.plan();
        if plan.stop {
            return;
        }
        let failed = NoSegment { text, cause };
        if plan.space_error.as_ref() != Some(&failed) {
            let then = match cause {
                Cause::Space => "appends will be refused",
                Cause::Passing => "it is tried again; appends will wait, and then the log will stop,",
                Cause::Lasting => "the log will stop",
            };
            tracing::error!("{}; {then} when no segment is left", failed.text);
            plan.space_error = Some(failed);
        }
        self.announce(plan);
    }

    fn announce(&self, plan: MutexGuard<'_, Plan>) {
        drop(plan);
        self.shared.news.store(true, Ordering::Release);
        self.shared.change.notify_all();
        self.waker.wake();
    }

    fn path(&self, number: SegmentNo) -> PathBuf {
        self.config.log_dir.join(number.file_name())
    }

    fn recycle(&self, old: SegmentNo, new: SegmentNo) -> Result<File, Failure> {
        match fs::rename(self.path(old), self.path(new)) {
            // Renamed by an attempt that failed after it.
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.path(new).exists() => {}
            renamed => renamed?,
        }
        self.sync_names()?;
        Ok(open_segment(&self.path(new), self.config.buffered)?)
    }

    fn delete(&self, old: SegmentNo) -> Result<(), Failure> {
        remove_if_there(&self.path(old))?;
        self.sync_names()
    }

    fn zero(&self, new: SegmentNo) -> Result<File, Failure> {
        let temporary = self.config.log_dir.join(TEMPORARY_FILE);
        self.leave_spare(new)?;
        let written = write_zeros(&temporary, self.config.segment_bytes, self.config.buffered, || self.pace());
        if let Err(error) = written {
            // What was taken of the disk is given back: others may need it more while we wait.
            let _ = remove_if_there(&temporary);
            return Err(error.into());
        }
        fs::rename(&temporary, self.path(new))?;
        self.sync_names()?;
        Ok(open_segment(&self.path(new), self.config.buffered)?)
    }

    /// While the store has the space that it said to need, or writes into it, a new segment does not take it: its checkpoint, which lets
    /// old segments go, comes first. Beyond those segments that the log cannot do without, a new one leaves twice its own space to others.
    fn leave_spare(&self, new: SegmentNo) -> io::Result<()> {
        if world::is_simulated() {
            return Ok(());
        }
        let (free, segment_bytes) = (free_bytes(&self.config.log_dir)?, self.config.segment_bytes);
        let here = new.0 - self.shared.plan().first.0;
        let left = free.saturating_sub(segment_bytes);
        let wanted = self.shared.spare_bytes.load(Ordering::Relaxed);
        let comes_first = wanted > left && (wanted <= free || self.shared.store_writes.load(Ordering::Relaxed));
        match comes_first || here >= SEGMENTS_NEEDED && left < 2 * segment_bytes {
            true => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
            false => Ok(()),
        }
    }

    fn sync_names(&self) -> Result<(), Failure> {
        self.names.sync_all().map_err(|error| Failure { error, lasting: true })?;
        world::synced_names(&self.config.log_dir);
        Ok(())
    }

    /// True when the log has a segment in hand, so that zeros may leave the disk to its writes half of the time.
    fn pace(&self) -> io::Result<bool> {
        let plan = self.shared.plan();
        if plan.stop {
            return Err(io::Error::other("the log is being closed"));
        }
        Ok(plan.next.0 + 1 >= plan.wanted_until.0)
    }
}

/// Zeros that O_DIRECT can write from.
struct Zeros(Box<[u8]>);

impl Zeros {
    fn new() -> Zeros {
        Zeros(vec![0; ZERO_WRITE_BYTES + FRAME_ALIGN_BYTES].into_boxed_slice())
    }

    fn aligned(&self) -> &[u8] {
        let skip = self.0.as_ptr().align_offset(FRAME_ALIGN_BYTES);
        &self.0[skip..skip + ZERO_WRITE_BYTES]
    }
}

/// Makes `path` a file of `bytes` zeros whose blocks are all written, and durable. `pace` is asked before each
/// piece: `true` leaves the disk idle for as long as the piece took, an error ends it.
pub(crate) fn write_zeros(
    path: &Path,
    bytes: u64,
    buffered: bool,
    mut pace: impl FnMut() -> io::Result<bool>,
) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o640);
    if !buffered {
        options.custom_flags(libc::O_DIRECT);
    }
    let file = options.open(path)?;
    // Asked first: a file system may give a part of what it has before it refuses, and the store, which cannot wait as the log can,
    // would find none left until it is given back.
    let is_full = if world::is_simulated() { world::is_out_of_space() } else { free_bytes(path)? < bytes };
    if is_full {
        return Err(io::Error::from_raw_os_error(libc::ENOSPC));
    } else if world::is_simulated() {
        return file.set_len(bytes);
    }
    // Reserves the space in one go: few extents, and a full disk shows before anything is written.
    // SAFETY: a plain system call on our own descriptor.
    match unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, bytes as i64) } {
        0 => {}
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
            error => return Err(error),
        },
    }
    let zeros = Zeros::new();
    let mut at = 0;
    while at < bytes {
        let idle = pace()?;
        let started = Instant::now();
        let piece = (bytes - at).min(ZERO_WRITE_BYTES as u64);
        file.write_all_at(&zeros.aligned()[..piece as usize], at)?;
        at += piece;
        if idle {
            std::thread::sleep(started.elapsed());
        }
    }
    file.sync_all()
}

/// Opens a segment for the log's writes.
pub(crate) fn open_segment(path: &Path, buffered: bool) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    if !buffered {
        options.custom_flags(libc::O_DIRECT);
    }
    options.open(path)
}

/// What the file system of `path` has left for us. One that counts no blocks (ramfs, a tmpfs without a size) has no bound of its own.
pub fn free_bytes(path: &Path) -> io::Result<u64> {
    let facts = nix::sys::statvfs::statvfs(path)?;
    Ok(if facts.blocks() == 0 { u64::MAX } else { facts.blocks_available() * facts.fragment_size() })
}

/// Makes a directory in `parent`, durably, if it is not there.
pub fn make_dir(parent: &Path, name: &str) -> io::Result<PathBuf> {
    let dir = parent.join(name);
    match fs::create_dir(&dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => sync_dir(parent)?,
    }
    Ok(dir)
}

/// Makes the names in a directory durable.
pub fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()?;
    world::synced_names(path);
    Ok(())
}

/// Gives a file another name, which is durable after [`sync_dir`].
pub(crate) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    world::renames(from, to)?;
    fs::rename(from, to)
}

/// Removes a file that may not be there.
pub(crate) fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
