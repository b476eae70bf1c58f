//! The driver of one log on one disk: frames are sealed in the log buffer, written through the ring, and become
//! durable in order. The daemon's ring thread owns it and calls it; it knows nothing of networks or commands.
//! Its duties, in the order in which [`Log::poll`] does them: take segments that became ready, resubmit what the
//! disk wrote short, seal the open frame when the disk can take a write, submit sealed frames.
//!
//! ```text
//!  append ──> open frame ──seal──┐
//!                                ├─> log buffer ──submit──> ring ──completion──> flushed ──> next_flushed
//!  receive ──> verify ───────────┘        └──> hot_frame (the shipper, pinned)
//! ```
//!
//! The parts: `open` (recovery at the start), `lead` (append and seal), `receive` (a replica's side, truncation), `lost` (what a truncation
//! cuts off), `submit` (writes and their completions), `error`.

pub mod config;
pub mod error;
mod flights;
mod lead;
mod lost;
mod open;
mod receive;
mod submit;

use std::collections::VecDeque;
use std::fs::File;
use std::path::{Path, PathBuf};

use std::time::{Duration, Instant};

use crate::buffer::{LogBuffer, PinId};
use crate::commit::Commit;
use crate::epoch::EpochHistory;
use crate::flush_accounting::FlushAccounting;
use crate::frame::{Frame, FrameHeader};
use crate::held::HeldFile;
use crate::limits::{FRAME_BYTES_MAX, FRAME_HEADER_BYTES, FRAME_TARGET_BYTES};
use crate::lock::DirLock;
use crate::lsn::{Epoch, Lsn, SegmentNo};
use crate::mutants;
use crate::prepare::{Cause, NoSegment, Preparer};
use crate::retain::Needs;
use crate::watermark::WatermarkFile;
use crate::world;

pub use config::{LOG_DIR, LogConfig, SyncMethod};
pub use error::{AppendError, LogError, LogFailure, ReceiveError};
use flights::Flights;
pub use lost::{LOST_DIR, Lost, keep_lost, lost_range, make_lost_dir};
pub use open::direct_io_refusal;

/// Segments that are kept ready beyond the current one at first.
const READY_SEGMENTS_MIN: u64 = 2;
/// Each time that an append finds no segment ready, twice as many are kept ready, up to this many.
const READY_SEGMENTS_MAX: u64 = 16;
/// Ready segments take no more than this.
const READY_BYTES_MAX: u64 = 1 << 30;
/// A log that needs a segment waits no longer than this for descriptors or memory to be there again; the others may have a leader
/// that can write by then.
const SHORT_TIME_MAX: Duration = Duration::from_secs(5);
/// The index of the log buffer among the ring's fixed buffers.
pub const LOG_BUFFER_INDEX: u16 = 0;

impl LogConfig {
    /// The largest frame that fits a segment of this size, which is what bounds a record on every node.
    pub fn frame_bytes_max(&self) -> usize {
        FRAME_BYTES_MAX.min(self.segment_bytes as usize)
    }
}

/// The frame that is being filled.
#[derive(Debug)]
struct OpenFrame {
    /// Header and records so far; FRAME_HEADER_BYTES when there are none.
    bytes: usize,
    /// How far it may grow; 0 until space was found for the first record. `records > 0 => bytes <= bytes_limit`.
    bytes_limit: usize,
    records: u32,
    /// When `poll` first saw a record in it.
    since: Option<Instant>,
}

impl OpenFrame {
    const EMPTY: OpenFrame = OpenFrame { bytes: FRAME_HEADER_BYTES, bytes_limit: 0, records: 0, since: None };
}

/// Durations of the last write that completed, for acknowledgements.
#[derive(Clone, Copy, Debug, Default)]
pub struct LastWrite {
    /// From the arrival of its oldest frame to its submission.
    pub queue: Duration,
    /// From submission to durable.
    pub device: Duration,
}

/// The log. See the module's head for the way through it.
pub struct Log {
    config: LogConfig,
    log_dir: PathBuf,
    buffer: LogBuffer,
    /// The log buffer is registered with the ring as buffer [`LOG_BUFFER_INDEX`].
    registered: bool,
    commit: Commit,
    open: OpenFrame,
    /// The crc of the frame that ends at `sealed`.
    crc: u32,
    /// The epoch of the frames sealed here; `None` on a replica.
    leading: Option<Epoch>,
    history: EpochHistory,
    committed: Lsn,
    /// Raw bytes received; `sealed <= received`.
    received: Lsn,
    /// Open files in order without a gap: the segment of the oldest write in flight, up to the last ready one.
    segments: VecDeque<(SegmentNo, File)>,
    /// The oldest segment on disk.
    first_segment: SegmentNo,
    /// Nothing before this was ever in this log.
    origin: Lsn,
    /// How many segments beyond the current one are kept ready.
    ready_segments: u64,
    /// The last segment that the log had to wait for.
    waited_for: SegmentNo,
    /// There until the log is retired.
    preparer: Option<Preparer>,
    flights: Flights,
    /// When the oldest bytes arrived that wait for their write.
    queued_since: Option<Instant>,
    last_write: LastWrite,
    short_of_space: bool,
    flush_accounting: FlushAccounting,
    watermark: WatermarkFile,
    stopped: Option<String>,
    space_error: Option<NoSegment>,
    /// Since when a segment has been needed that cannot be prepared for a reason that passes.
    short_since: Option<Instant>,
    /// Last, so that the directory stays ours until everything else is gone.
    lock: Option<DirLock>,
}

/// A frame in the log buffer.
#[derive(Clone, Copy, Debug)]
pub struct HotFrame<'a> {
    header: FrameHeader,
    span: &'a [u8],
}

impl<'a> HotFrame<'a> {
    /// The header.
    pub fn header(&self) -> &FrameHeader {
        &self.header
    }

    /// Header and records, without padding. The address stays while the frame is pinned.
    pub fn wire_bytes(&self) -> &'a [u8] {
        &self.span[..self.header.wire_bytes()]
    }

    /// The bytes as they stand in the log, padding included.
    pub fn span(&self) -> &'a [u8] {
        self.span
    }

    /// Where the next frame starts.
    pub fn end(&self) -> Lsn {
        self.header.end()
    }
}

impl Log {
    /// End of the log with the open frame: a commit appended last ends here.
    pub fn end(&self) -> Lsn {
        let open = if self.open.records > 0 { self.open.bytes as u64 } else { 0 };
        self.sealed().advance(open)
    }

    /// End of the last whole frame, submitted or not.
    pub fn sealed(&self) -> Lsn {
        self.commit.sealed()
    }

    /// End of what was submitted to the kernel.
    pub fn written(&self) -> Lsn {
        self.commit.written()
    }

    /// End of the contiguous prefix that is durable.
    pub fn flushed(&self) -> Lsn {
        if mutants::is_on("ack-before-flush") {
            return self.commit.written();
        }
        self.commit.flushed()
    }

    /// End of the frames that [`Log::next_flushed`] has handed out.
    pub fn taken(&self) -> Lsn {
        self.commit.applied()
    }

    /// Raw bytes received on a replica; the next byte from the leader belongs here.
    pub fn received(&self) -> Lsn {
        self.received
    }

    /// The oldest byte on disk.
    pub fn start(&self) -> Lsn {
        self.first_segment.start(self.config.segment_bytes).max(self.origin)
    }

    /// The oldest frame in the log buffer.
    pub fn hot_start(&self) -> Lsn {
        self.buffer.hot_start()
    }

    /// The crc of the frame that ends at `sealed`; 0 in an empty log.
    pub fn crc_at_end(&self) -> u32 {
        self.crc
    }

    /// The sealed frame that starts at `at`, while it is in the log buffer.
    pub fn hot_frame(&self, at: Lsn) -> Option<HotFrame<'_>> {
        if at < self.hot_start() || at >= self.sealed() {
            return None;
        }
        let header = *self.buffer.parse(at)?.claimed();
        Some(HotFrame { header, span: self.buffer.bytes(at, header.span_bytes()) })
    }

    /// The index of the ring's fixed buffer that holds these bytes of the log buffer, for SEND_ZC and the like.
    pub fn fixed_index(&self, from: Lsn, bytes: usize) -> Option<u16> {
        (self.registered && self.buffer.is_fixed(from, bytes)).then_some(LOG_BUFFER_INDEX)
    }

    /// Keeps the log buffer from `lsn` on in place until [`Log::unpin`]; `lsn >= hot_start()`.
    pub fn pin(&mut self, lsn: Lsn) -> PinId {
        self.buffer.pin(lsn)
    }

    /// Gives a pin back.
    pub fn unpin(&mut self, pin: PinId) {
        self.buffer.unpin(pin);
    }

    /// The pin that keeps the log from taking more, if one does.
    pub fn pin_blocking(&self) -> Option<PinId> {
        let evictable = self.commit.applied();
        // A leader asks before it appends (`has_capacity`), and appends nothing that would find out.
        let full = || self.buffer.free_bytes_after_eviction(self.end(), evictable) < FRAME_TARGET_BYTES;
        let short = self.short_of_space || self.leading.is_some() && full();
        short.then(|| self.buffer.lowest_pin(evictable)).flatten()
    }

    /// The next frame that became durable here, for applying. Each is handed out once, in order.
    pub fn next_flushed(&mut self) -> Option<Frame<'_>> {
        self.next_flushed_until(Lsn::MAX)
    }

    /// As [`Log::next_flushed`], but nothing that ends beyond `limit`: a replica applies nothing past what its
    /// leader calls durable.
    pub fn next_flushed_until(&mut self, limit: Lsn) -> Option<Frame<'_>> {
        let at = self.commit.applied();
        if at >= self.commit.flushed() {
            return None;
        }
        let frame = self.buffer.parse(at).expect("a flushed frame stays in the log buffer until it was taken");
        let end = frame.claimed().end();
        if end > limit {
            return None;
        }
        self.commit.apply(end);
        Some(frame.known_good(self.buffer.bytes(at, frame.wire_bytes())))
    }

    /// The node no longer needs what lies before `lsn` (its checkpoint, its slots): whole segments that the log does
    /// not need either (`retain.rs`) are recycled.
    pub fn release_before(&mut self, lsn: Lsn) {
        let (taken, flushed) = (self.commit.applied(), self.commit.flushed());
        // A full disk needs the space more than a replica without a slot needs the log.
        let keep_bytes_min = if self.is_short_of_space() { 0 } else { self.config.keep_bytes_min };
        let needs = Needs { node: lsn, taken, flushed, keep_bytes_min };
        let until = needs.oldest_segment(self.config.segment_bytes);
        if until > self.first_segment {
            self.first_segment = until;
            self.preparer().release(until);
        }
    }

    /// Where a segment's file is.
    pub fn segment_path(&self, number: SegmentNo) -> PathBuf {
        self.log_dir.join(number.file_name())
    }

    /// The segment that is written to, once its file is ready.
    pub fn current_segment(&self) -> Option<SegmentNo> {
        self.segments.front().map(|(number, _)| *number)
    }

    /// Its file, to be looked at.
    pub fn current_file(&self) -> std::io::Result<Option<HeldFile>> {
        self.segments.front().map(|(number, file)| HeldFile::open(&self.segment_path(*number), file)).transpose()
    }

    /// What else of the directory is open as long as the log is.
    pub fn held_files(&self) -> std::io::Result<Vec<HeldFile>> {
        let mut held: Vec<HeldFile> = self.lock.iter().flat_map(DirLock::held).cloned().collect();
        held.push(HeldFile::at(&self.log_dir)?);
        held.push(self.watermark.held()?);
        Ok(held)
    }

    /// The directory of the segments.
    pub fn log_dir(&self) -> &Path {
        &self.log_dir
    }

    /// What the log was opened with.
    pub fn config(&self) -> &LogConfig {
        &self.config
    }

    /// What the disk did so far.
    pub fn flush_accounting(&self) -> &FlushAccounting {
        &self.flush_accounting
    }

    /// How long the last write took.
    pub fn last_write(&self) -> LastWrite {
        self.last_write
    }

    /// Why the log stopped for good, once it has.
    pub fn stopped(&self) -> Option<&str> {
        self.stopped.as_deref()
    }

    /// Why no segment can be prepared at the moment. Appends go on until the ready ones are full.
    pub fn space_error(&self) -> Option<&str> {
        self.space_error.as_ref().map(|failed| failed.text.as_str())
    }

    /// True while no segment can be prepared because the disk is full: one that is let go becomes the next.
    pub fn is_short_of_space(&self) -> bool {
        self.space_error.as_ref().is_some_and(|failed| failed.cause == Cause::Space)
    }

    /// True when no write is in flight and nothing waits for one.
    pub fn idle(&self) -> bool {
        self.flights.outstanding() == 0 && self.open.records == 0 && self.written() == self.sealed()
    }

    /// The last epoch in which this node led; 0 if it never did.
    pub fn led(&self) -> Epoch {
        self.watermark.led()
    }

    /// The newest epoch that the log knows of.
    fn newest_epoch(&self) -> Epoch {
        self.leading.unwrap_or_default().max(self.history.last_epoch())
    }

    fn segment_of(&self, lsn: Lsn) -> SegmentNo {
        lsn.segment(self.config.segment_bytes)
    }

    /// The open file of a segment, when it is ready.
    fn segment_file(&self, number: SegmentNo) -> Option<&File> {
        let first = self.segments.front()?.0;
        let (found, file) = self.segments.get(number.0.checked_sub(first.0)? as usize)?;
        debug_assert_eq!(*found, number);
        Some(file)
    }

    /// Frees space in the log buffer for `bytes` after `tail`, by evicting frames that are durable and applied.
    fn evict_for(&mut self, tail: Lsn, bytes: usize) -> bool {
        let made = self.buffer.evict_for(tail, bytes, self.commit.applied());
        self.short_of_space = !made;
        made
    }

    /// New segments leave so much of the disk to the store.
    pub fn leave_spare(&self, bytes: u64, is_writing: bool) {
        self.preparer.iter().for_each(|preparer| preparer.leave_spare(bytes, is_writing));
    }

    fn preparer(&self) -> &Preparer {
        self.preparer.as_ref().expect("nobody asks a retired log for segments")
    }

    /// Takes the segments that became ready.
    fn take_segments(&mut self) {
        if let Some(preparer) = &self.preparer {
            preparer.take(&mut self.segments, &mut self.space_error);
        }
        if self.short_since.is_some() && !self.is_short_for_a_moment() {
            self.short_since = None;
        }
    }

    /// No segment can be prepared, for a reason that passes by itself.
    fn is_short_for_a_moment(&self) -> bool {
        self.space_error.as_ref().is_some_and(|failed| failed.cause == Cause::Passing)
    }

    /// Asks for as many segments ahead of `number` as are kept ready.
    fn want_segments(&mut self, number: SegmentNo) {
        self.preparer().want(SegmentNo(number.0 + 1 + self.ready_segments));
    }

    fn ready_segments_max(&self) -> u64 {
        READY_SEGMENTS_MAX.min(READY_BYTES_MAX / self.config.segment_bytes).max(READY_SEGMENTS_MIN)
    }

    /// The log takes nothing more. Its owner looks at [`Log::stopped`] once a turn, and ends a leadership that rests on it.
    fn stop(&mut self, text: String) {
        self.stopped = Some(text);
        // The next append has to look.
        self.open.bytes_limit = 0;
        self.flights.give_up_short_writes();
    }

    fn stop_for_want_of_a_segment(&mut self) {
        let text = self.space_error.as_ref().map(|failed| failed.text.clone());
        self.stop(text.unwrap_or_default());
    }

    /// The log needs segment `number` and it is not ready: keeps more of them ready from now on. Without hope for one the log stops:
    /// a leader that can never write again must not keep others from leading. On a full disk there is hope for as long as it takes,
    /// on what passes by itself for [`SHORT_TIME_MAX`].
    fn wait_for_segment(&mut self, number: SegmentNo) {
        match self.space_error.as_ref().map(|failed| failed.cause) {
            Some(Cause::Lasting) => return self.stop_for_want_of_a_segment(),
            Some(Cause::Passing) => {
                let now = world::now();
                let since = *self.short_since.get_or_insert(now);
                if now.saturating_duration_since(since) >= SHORT_TIME_MAX {
                    return self.stop_for_want_of_a_segment();
                }
            }
            Some(Cause::Space) | None => {}
        }
        if number > self.waited_for && self.space_error.is_none() {
            self.waited_for = number;
            self.ready_segments = (self.ready_segments * 2).min(self.ready_segments_max());
            tracing::debug!("the log waits for a segment: {} are kept ready from now on", self.ready_segments);
        }
        self.want_segments(number);
    }
}
