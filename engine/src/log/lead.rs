//! The leader's side of the log: records into the open frame, and its sealing.

use std::time::{Duration, Instant, UNIX_EPOCH};

use super::{AppendError, Log, OpenFrame};
use crate::frame::FrameHeader;
use crate::limits::{FRAME_HEADER_BYTES, FRAME_TARGET_BYTES, RECORD_LENGTH_BYTES, frame_aligned};
use crate::lsn::{Epoch, Lsn};
use crate::prepare::Cause;
use crate::world;

impl Log {
    /// Frames sealed from now on carry `epoch`; the caller has made the epoch history that says so durable.
    /// A half received frame is forgotten. When the durable watermark cannot be flushed the log stops.
    pub fn lead(&mut self, epoch: Epoch) {
        assert!(self.leading.is_none_or(|leading| leading < epoch), "an epoch never goes back");
        self.seal_open();
        self.receive_reset();
        self.leading = Some(epoch);
        // An earlier leader may have told more than came here: of this leadership's frames nothing is committed yet.
        self.committed = self.committed.min(self.sealed());
        // Before the first frame of the epoch: recovery believes its headers only with this.
        if let Err(error) = self.watermark.lead(epoch) {
            self.stop(error.to_string());
        }
    }

    /// This node's leadership is over: what was appended is sealed, so that nothing of it is lost before somebody else's log says
    /// so, and nothing can be appended any more.
    pub fn resign(&mut self) {
        if self.leading.is_some() {
            self.seal_open();
            self.leading = None;
            self.receive_reset();
        }
    }

    /// The epoch in which this log leads, if it does.
    pub fn leading(&self) -> Option<Epoch> {
        self.leading
    }

    /// Puts a record into the open frame. The LSN is the record's end: the commit is durable here once
    /// `flushed()` has reached it. Only on a log that leads.
    pub fn append(&mut self, record: &[u8]) -> Result<Lsn, AppendError> {
        let grown = self.open.bytes + RECORD_LENGTH_BYTES + record.len();
        if grown > self.open.bytes_limit {
            self.open_frame_for(record.len())?;
        }
        Ok(self.put(record))
    }

    fn put(&mut self, record: &[u8]) -> Lsn {
        let bytes = RECORD_LENGTH_BYTES + record.len();
        let at = self.commit.sealed().advance(self.open.bytes as u64);
        let (length, body) = self.buffer.bytes_mut(at, bytes).split_at_mut(RECORD_LENGTH_BYTES);
        length.copy_from_slice(&(record.len() as u32).to_le_bytes());
        body.copy_from_slice(record);
        self.open.bytes += bytes;
        self.open.records += 1;
        debug_assert!(self.open.bytes <= self.open.bytes_limit);
        at.advance(bytes as u64)
    }

    /// Makes the open frame one that a record of `record_bytes` fits into, sealing what is in the way.
    #[cold]
    fn open_frame_for(&mut self, record_bytes: usize) -> Result<(), AppendError> {
        if let Some(text) = &self.stopped {
            return Err(AppendError::Stopped(text.clone()));
        }
        assert!(self.leading.is_some(), "append on a log that does not lead");
        let overhead = FRAME_HEADER_BYTES + RECORD_LENGTH_BYTES;
        let bytes_max = self.config.frame_bytes_max() - overhead;
        if record_bytes > bytes_max {
            return Err(AppendError::TooLarge { bytes: record_bytes, bytes_max });
        }
        self.seal_open();
        let span = frame_aligned(overhead + record_bytes);
        let mut rest = self.segment_rest()?;
        if span > rest {
            self.fill_segment(rest)?;
            rest = self.segment_rest()?;
        }
        let sealed = self.sealed();
        let wanted = span.max(FRAME_TARGET_BYTES).min(rest);
        if !self.evict_for(sealed, wanted) && self.buffer.free_bytes(sealed) < span {
            return Err(AppendError::Busy);
        }
        self.short_of_space = false;
        self.open.bytes_limit = wanted.min(self.buffer.free_bytes(sealed));
        Ok(())
    }

    /// Bytes left in the segment at the end of the log, whose file must be ready.
    fn segment_rest(&mut self) -> Result<usize, AppendError> {
        let number = self.segment_of(self.sealed());
        if self.segment_file(number).is_none() {
            self.take_segments();
        }
        if self.segment_file(number).is_none() {
            self.wait_for_segment(number);
            return Err(match (&self.stopped, &self.space_error) {
                (Some(text), _) => AppendError::Stopped(text.clone()),
                (None, Some(failed)) if failed.cause != Cause::Passing => AppendError::NoSpace(failed.text.clone()),
                (None, _) => AppendError::Busy,
            });
        }
        let end = number.next().start(self.config.segment_bytes);
        Ok((end - self.sealed()) as usize)
    }

    /// Ends the segment with a filler frame of `span` bytes.
    fn fill_segment(&mut self, span: usize) -> Result<(), AppendError> {
        let sealed = self.sealed();
        if !self.evict_for(sealed, span) {
            return Err(AppendError::Busy);
        }
        let bytes = span - FRAME_HEADER_BYTES;
        self.buffer.bytes_mut(sealed, span).fill(0);
        self.seal_frame(true, bytes as u32, 0);
        Ok(())
    }

    /// Seals the open frame, if there is a record in it.
    pub(super) fn seal_open(&mut self) {
        let open = std::mem::replace(&mut self.open, OpenFrame::EMPTY);
        if open.records > 0 {
            self.seal_frame(false, (open.bytes - FRAME_HEADER_BYTES) as u32, open.records);
            self.queued_since = self.queued_since.or(open.since);
        }
    }

    fn seal_frame(&mut self, filler: bool, payload_bytes: u32, record_count: u32) {
        let flushed = self.flushed();
        let header = FrameHeader {
            filler,
            epoch: self.leading.expect("only a leader seals"),
            lsn: self.sealed(),
            payload_bytes,
            record_count,
            previous_crc: self.crc,
            crc: 0,
            flushed,
            committed: self.committed.min(flushed),
            sealed_at_us: wall_clock_us(),
        };
        let bytes = self.buffer.bytes_mut(header.lsn, header.span_bytes());
        bytes[header.wire_bytes()..].fill(0);
        self.crc = header.seal(bytes).crc;
        self.commit.seal(header.end());
        self.received = header.end();
    }

    /// The commit LSN to stamp into frames from now on.
    pub fn set_committed(&mut self, committed: Lsn) {
        self.committed = self.committed.max(committed);
    }

    /// True when the open frame has records and has waited long enough for more.
    pub(super) fn open_frame_is_due(&self, now: Instant) -> bool {
        let delay = self.config.commit_delay;
        self.open.records > 0
            && (delay.is_zero() || self.open.since.is_some_and(|since| now.duration_since(since) >= delay))
    }

    /// How long until `poll` has something to do even if nothing completes: the end of the commit delay.
    pub fn next_timeout(&self, now: Instant) -> Option<Duration> {
        let since = self.open.since.filter(|_| self.open.records > 0)?;
        let delay = self.config.commit_delay;
        (!delay.is_zero()).then(|| (since + delay).saturating_duration_since(now))
    }

    /// True when an append that was refused with `Busy` is worth trying again, be it to learn of another error.
    pub fn has_capacity(&self) -> bool {
        if self.stopped.is_some() {
            return true;
        }
        if self.segment_file(self.segment_of(self.sealed())).is_none() {
            return self.space_error.is_some() && !self.is_short_for_a_moment();
        }
        self.buffer.free_bytes_after_eviction(self.end(), self.commit.applied()) >= FRAME_TARGET_BYTES
    }
}

fn wall_clock_us() -> u64 {
    world::wall_clock().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}
