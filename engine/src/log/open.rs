//! Opening a log: the lock, a look at the filesystem, recovery, and the flush of what recovery kept.

use std::collections::VecDeque;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::config::LOG_DIR;
use super::flights::Flights;
use super::{LastWrite, Log, LogConfig, LogError, OpenFrame, READY_SEGMENTS_MIN, SyncMethod};
use crate::buffer::LogBuffer;
use crate::commit::Commit;
use crate::epoch::EpochHistory;
use crate::flush_accounting::FlushAccounting;
use crate::limits::*;
use crate::lock::DirLock;
use crate::lsn::{Lsn, SegmentNo};
use crate::mend::Mender;
use crate::origin::Origin;
use crate::prepare::{PrepareConfig, Preparer, make_dir, open_segment, remove_if_there, sync_dir};
use crate::recover::{Known, Recovery, recover};
use crate::ring::Ring;
use crate::segment::list_segments;
use crate::waker::Waker;
use crate::watermark::{Watermark, WatermarkFile};
use crate::world;

/// The file with which O_DIRECT is tried.
const TRIAL_FILE: &str = "direct.tmp";

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> LogError + use<> {
    let path = path.to_owned();
    move |source| LogError::Io { what, path, source }
}

impl LogConfig {
    /// The smallest log buffer for segments of this size: a filler and the largest frame after it.
    pub fn log_buffer_bytes_min(&self) -> usize {
        self.frame_bytes_max() * 2
    }

    fn check(&self) -> Result<(), LogError> {
        let config = |text| Err(LogError::Config(text));
        let aligned = self.segment_bytes.is_multiple_of(FRAME_ALIGN_BYTES as u64);
        let bytes_min = segment_bytes_min();
        if !(bytes_min..=SEGMENT_BYTES_MAX).contains(&self.segment_bytes) || !aligned {
            return config(format!(
                "segments of {} bytes: from {bytes_min} to {SEGMENT_BYTES_MAX}, a multiple of {FRAME_ALIGN_BYTES}",
                self.segment_bytes
            ));
        }
        if !(1..=WRITE_DEPTH_MAX).contains(&self.write_depth) {
            return config(format!("a write depth of {}: from 1 to {WRITE_DEPTH_MAX}", self.write_depth));
        }
        if self.log_buffer_bytes < self.log_buffer_bytes_min() {
            return config(format!(
                "a log buffer of {} bytes: at least {} for segments of {} bytes",
                self.log_buffer_bytes,
                self.log_buffer_bytes_min(),
                self.segment_bytes
            ));
        }
        if self.log_buffer_bytes > LOG_BUFFER_BYTES_MAX {
            let bytes = self.log_buffer_bytes;
            return config(format!("a log buffer of {bytes} bytes: at most {LOG_BUFFER_BYTES_MAX}"));
        }
        Ok(())
    }
}

/// The segments on disk.
struct OnDisk {
    log_dir: PathBuf,
    /// The oldest of the run without a gap that leads up to the end of the log.
    first: SegmentNo,
    /// The first number without a file from the end of the log on.
    next: SegmentNo,
    /// The segment at the end of the log and those prepared after it.
    open: VecDeque<(SegmentNo, File)>,
}

impl Log {
    /// Opens the log in `config.dir`: takes the lock, recovers the end of the log (frames from `replay_from` on are
    /// verified; the caller replays them into its store), makes what was kept durable, and starts the preparer.
    pub fn open(
        config: LogConfig,
        replay_from: Lsn,
        history: &EpochHistory,
        ring: &mut Ring,
        waker: Waker,
    ) -> Result<(Log, Recovery), LogError> {
        let lock = DirLock::take(&config.dir)?;
        Log::open_locked(config, lock, replay_from, history, ring, waker)
    }

    /// As [`Log::open`] for a caller that took the directory's lock before it touched anything else in there.
    pub fn open_locked(
        config: LogConfig,
        lock: DirLock,
        replay_from: Lsn,
        history: &EpochHistory,
        ring: &mut Ring,
        waker: Waker,
    ) -> Result<(Log, Recovery), LogError> {
        config.check()?;
        let log_dir = make_log_dir(&config)?;
        if !config.buffered {
            let refusal =
                direct_io_refusal(&log_dir, config.sync_method).map_err(io_error("try O_DIRECT in", &log_dir))?;
            if let Some(reason) = refusal {
                return Err(LogError::NoDirectIo { dir: log_dir, reason });
            }
        }
        let mender = Mender::new(&config.dir, config.segment_bytes);
        let filled = mender.fill_up();
        for (path, bytes) in filled.map_err(io_error("fill up the segments in", &log_dir))? {
            let file = path.display();
            tracing::warn!(%file, bytes, "a segment is shorter than it was made: zeros stand for what it lost");
        }
        check_sizes(&log_dir, &config)?;
        // Before recovery looks: what it reads must come from the disk, not from pages that a failed flush of an
        // earlier process left behind as if they were clean.
        flush_segments(&log_dir, &config, replay_from, Lsn::MAX, true)?;
        let origin = Origin::load(&config.dir)?;
        let known = Known { applied: replay_from, watermark: Watermark::load(&config.dir)?, origin };
        let recovery = recover(&log_dir, config.segment_bytes, known, history)?;
        for (from, to) in &recovery.stale_padding {
            tracing::info!(lsn = %from, "a crash tore the padding of a frame: zeros again");
            mender.clear(*from, *to).map_err(io_error("clear padding in", &log_dir))?;
        }
        // What was read back is not thereby durable.
        flush_segments(&log_dir, &config, replay_from, recovery.end, false)?;
        let on_disk = OnDisk::find(&log_dir, &config, recovery.end)?;
        let mut log = Log::assemble(config, lock, on_disk, &recovery, history, ring, waker)?;
        log.origin = origin.map_or(Lsn::ZERO, |origin| origin.lsn);
        Ok((log, recovery))
    }

    fn assemble(
        config: LogConfig,
        lock: DirLock,
        on_disk: OnDisk,
        recovery: &Recovery,
        history: &EpochHistory,
        ring: &mut Ring,
        waker: Waker,
    ) -> Result<Log, LogError> {
        let (end, log_dir) = (recovery.end, on_disk.log_dir);
        let watermark = WatermarkFile::open(&config.dir, end, history.last_epoch())?;
        let buffer =
            LogBuffer::new(config.log_buffer_bytes, end).map_err(io_error("map the log buffer of", &log_dir))?;
        let prepare =
            PrepareConfig { log_dir: log_dir.clone(), segment_bytes: config.segment_bytes, buffered: config.buffered };
        let wanted = SegmentNo(end.segment(config.segment_bytes).0 + 1 + READY_SEGMENTS_MIN);
        let preparer = Preparer::start(prepare, on_disk.first, on_disk.next, wanted, waker)
            .map_err(io_error("prepare segments in", &log_dir))?;
        let mut log = Log {
            commit: Commit::new(end, writes_in_flight_max(&config)),
            registered: register(ring, &buffer),
            open: OpenFrame::EMPTY,
            crc: recovery.crc,
            leading: None,
            history: history.clone(),
            committed: Lsn::ZERO,
            received: end,
            segments: on_disk.open,
            first_segment: on_disk.first,
            origin: Lsn::ZERO,
            ready_segments: READY_SEGMENTS_MIN,
            waited_for: end.segment(config.segment_bytes),
            flights: Flights::new(),
            queued_since: None,
            last_write: LastWrite::default(),
            short_of_space: false,
            flush_accounting: FlushAccounting::new(),
            watermark,
            stopped: None,
            space_error: None,
            short_since: None,
            lock: Some(lock),
            config,
            log_dir,
            buffer,
            preparer: Some(preparer),
        };
        if log.segments.is_empty() {
            log.preparer().wait();
            log.take_segments();
        }
        Ok(log)
    }
}

/// In the page cache a failed write is told to one flush of the file and to no other: two flushes at once would share one error, and
/// the one that does not get it would call lost pages durable.
fn writes_in_flight_max(config: &LogConfig) -> usize {
    if config.buffered { 1 } else { config.write_depth }
}

fn make_log_dir(config: &LogConfig) -> Result<PathBuf, LogError> {
    make_dir(&config.dir, LOG_DIR).map_err(io_error("make", &config.dir.join(LOG_DIR)))
}

/// A directory of another segment size would look like damage to recovery.
fn check_sizes(log_dir: &Path, config: &LogConfig) -> Result<(), LogError> {
    for number in list_segments(log_dir).map_err(io_error("list", log_dir))? {
        let path = log_dir.join(number.file_name());
        let bytes = fs::metadata(&path).map_err(io_error("look at", &path))?.len();
        if bytes != config.segment_bytes {
            return Err(LogError::SegmentSize { path, bytes, expected: config.segment_bytes });
        }
    }
    Ok(())
}

/// Flushes the segments that hold `from..=until`, and the directory. With `forget` the page cache lets them go.
fn flush_segments(log_dir: &Path, config: &LogConfig, from: Lsn, until: Lsn, forget: bool) -> Result<(), LogError> {
    let numbers = list_segments(log_dir).map_err(io_error("list", log_dir))?;
    // Recovery looks at the frame before as well: its crc is part of the chain.
    let before = Lsn(from.0.saturating_sub(1));
    let range = before.segment(config.segment_bytes)..=until.segment(config.segment_bytes);
    for number in numbers.into_iter().filter(|number| range.contains(number)) {
        let path = log_dir.join(number.file_name());
        let file = File::open(&path).map_err(io_error("open", &path))?;
        file.sync_data().map_err(io_error("flush", &path))?;
        if forget {
            // SAFETY: advice on our own descriptor.
            unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        }
    }
    sync_dir(log_dir).map_err(io_error("flush", log_dir))
}

impl OnDisk {
    fn find(log_dir: &Path, config: &LogConfig, end: Lsn) -> Result<OnDisk, LogError> {
        let numbers = list_segments(log_dir).map_err(io_error("list", log_dir))?;
        let has = |number: u64| numbers.binary_search(&SegmentNo(number)).is_ok();
        let last = end.segment(config.segment_bytes);
        let mut first = last;
        while first.0 > 0 && has(first.0 - 1) {
            first.0 -= 1;
        }
        let mut on_disk = OnDisk { log_dir: log_dir.to_owned(), first, next: last, open: VecDeque::new() };
        for number in numbers.iter().copied() {
            if number == on_disk.next {
                let path = log_dir.join(number.file_name());
                let file = open_segment(&path, config.buffered).map_err(io_error("open", &path))?;
                on_disk.open.push_back((number, file));
                on_disk.next = number.next();
            }
        }
        Ok(on_disk)
    }
}

fn register(ring: &mut Ring, buffer: &LogBuffer) -> bool {
    // SAFETY: the buffer lives as long as the log, which gives it back in `shutdown`; the kernel holds the pages
    // themselves, so that even an early drop leaves nothing dangling.
    match unsafe { ring.register_buffers(&[buffer.fixed_range()]) } {
        Ok(()) => true,
        Err(error) => {
            let mebibytes = buffer.capacity() >> 20;
            tracing::warn!(
                "the log buffer of {mebibytes} MiB is not registered with io_uring ({error}): each write pins its \
                 pages anew; raise RLIMIT_MEMLOCK (`ulimit -l`, LimitMEMLOCK= in the unit) above it"
            );
            false
        }
    }
}

/// A block that O_DIRECT can write.
#[repr(align(4096))]
struct Block([u8; FRAME_ALIGN_BYTES]);

/// Why the filesystem of `dir` cannot take O_DIRECT writes with this sync method; `None` when it can. Memory
/// filesystems take the flag on newer kernels, but there is no disk behind them to be direct with.
pub fn direct_io_refusal(dir: &Path, method: SyncMethod) -> io::Result<Option<String>> {
    const RAMFS_MAGIC: i64 = 0x8584_58f6;
    if world::is_simulated() {
        return Ok(None);
    }
    let name = CString::new(dir.as_os_str().as_bytes())?;
    // SAFETY: plain data, for which zeros are a value; the call fills it.
    let mut facts: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers live through the call.
    if unsafe { libc::statfs(name.as_ptr(), &mut facts) } != 0 {
        return Err(io::Error::last_os_error());
    }
    match facts.f_type {
        libc::TMPFS_MAGIC => return Ok(Some("tmpfs".to_owned())),
        RAMFS_MAGIC => return Ok(Some("ramfs".to_owned())),
        _ => {}
    }
    let path = dir.join(TRIAL_FILE);
    let outcome = try_direct_write(&path, method);
    remove_if_there(&path)?;
    match outcome {
        Ok(()) => Ok(None),
        // A full disk says nothing against O_DIRECT.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT)) => Ok(None),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => {
            Ok(Some(error.to_string()))
        }
        Err(error) => Err(error),
    }
}

fn try_direct_write(path: &Path, method: SyncMethod) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o640).custom_flags(libc::O_DIRECT);
    let file = options.open(path)?;
    let block = Box::new(Block([0; FRAME_ALIGN_BYTES]));
    let piece = libc::iovec { iov_base: block.0.as_ptr().cast_mut().cast(), iov_len: FRAME_ALIGN_BYTES };
    let flags = if method == SyncMethod::Dsync { libc::RWF_DSYNC } else { 0 };
    // SAFETY: the block lives through the call.
    let written = unsafe { libc::pwritev2(file.as_raw_fd(), &piece, 1, 0, flags) };
    if written < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
