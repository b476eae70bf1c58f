//! A replica's side of the log: the leader's bytes into the log buffer as they are, verified frame by frame before
//! anything of them is written; and truncation behind a fork.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use super::{Log, LogError, OpenFrame, ReceiveError};
use crate::epoch::EpochHistory;
use crate::frame::{Frame, FrameError, FrameHeader, UnverifiedFrame};
use crate::limits::FRAME_HEADER_BYTES;
use crate::lsn::{Lsn, SegmentNo};
use crate::prepare::open_segment;

impl Log {
    /// The log follows a leader with this epoch history from now on. Records of an open frame are gone: nobody was
    /// told that they are durable.
    pub fn follow(&mut self, history: &EpochHistory) {
        self.leading = None;
        self.open = OpenFrame::EMPTY;
        self.history = history.clone();
        self.receive_reset();
    }

    /// Space for up to `wanted` raw log bytes at `received()`, at least one; `None` when the log buffer is full,
    /// until frames have become durable and were taken. The address stays until the bytes were advanced over; an
    /// operation of the ring that fills them has completed before the log is reset, truncated or dropped.
    pub fn receive_space(&mut self, wanted: usize) -> Option<&mut [u8]> {
        if self.stopped.is_some() {
            return None;
        }
        let at = self.received;
        self.evict_for(at, wanted);
        let bytes = self.buffer.free_bytes(at).min(wanted);
        self.short_of_space = bytes == 0;
        (bytes > 0).then(|| self.buffer.bytes_mut(at, bytes))
    }

    /// `bytes` raw log bytes arrived in the space. Verifies every frame that is whole now; only those are written.
    pub fn receive_advance(&mut self, bytes: usize, now: Instant) -> Result<(), ReceiveError> {
        assert!(bytes <= self.buffer.free_bytes(self.received));
        self.received = self.received.advance(bytes as u64);
        loop {
            let at = self.sealed();
            let here = (self.received - at) as usize;
            if here < FRAME_HEADER_BYTES {
                return Ok(());
            }
            let frame = UnverifiedFrame::parse(self.buffer.bytes(at, here), at);
            let frame = frame.map_err(|source| ReceiveError::Frame { lsn: at, source })?;
            self.check_place(frame.claimed())?;
            if here < frame.claimed().span_bytes() {
                return Ok(());
            }
            let verified = frame.verify(self.buffer.bytes(at, here)).and_then(|f| self.chained(f));
            let header = verified.map_err(|source| ReceiveError::Frame { lsn: at, source })?;
            self.accept_frame(&header, now);
        }
    }

    /// One hot frame: header and records without padding. `Ok(false)` when the log buffer is full: give it again
    /// later.
    pub fn receive_frame(&mut self, wire: &[u8], now: Instant) -> Result<bool, ReceiveError> {
        if let Some(text) = &self.stopped {
            return Err(ReceiveError::Stopped(text.clone()));
        }
        let at = self.sealed();
        assert!(self.received == at, "a hot frame in the middle of raw log bytes");
        let verified = UnverifiedFrame::parse(wire, at).and_then(|frame| {
            let whole = frame.wire_bytes() == wire.len();
            if whole { frame.verify(wire).and_then(|f| self.chained(f)) } else { Err(FrameError::Short) }
        });
        let header = verified.map_err(|source| ReceiveError::Frame { lsn: at, source })?;
        self.check_place(&header)?;
        if !self.evict_for(at, header.span_bytes()) {
            return Ok(false);
        }
        self.buffer.bytes_mut(at, wire.len()).copy_from_slice(wire);
        self.received = header.end();
        self.accept_frame(&header, now);
        Ok(true)
    }

    /// The connection broke: a half received frame is forgotten.
    pub fn receive_reset(&mut self) {
        self.received = self.sealed();
        self.short_of_space = false;
    }

    fn chained(&self, frame: Frame<'_>) -> Result<FrameHeader, FrameError> {
        frame.follows(self.crc)?;
        Ok(*frame.header())
    }

    /// What must hold of a frame's place before its bytes are worth waiting for.
    fn check_place(&self, header: &FrameHeader) -> Result<(), ReceiveError> {
        let lsn = header.lsn;
        let segment = self.segment_of(lsn);
        if header.end() > segment.next().start(self.config.segment_bytes) {
            return Err(ReceiveError::Boundary { lsn, segment });
        }
        let expected = self.history.epoch_at(lsn);
        if header.epoch != expected {
            return Err(ReceiveError::Epoch { lsn, epoch: header.epoch, expected });
        }
        Ok(())
    }

    /// A verified frame stands whole in the log buffer: it may be written.
    fn accept_frame(&mut self, header: &FrameHeader, now: Instant) {
        debug_assert!(self.received >= header.end());
        // The checksum ends with the records; zeros after them are part of the format.
        let padding = header.lsn.advance(header.wire_bytes() as u64);
        self.buffer.bytes_mut(padding, (header.end() - padding) as usize).fill(0);
        self.crc = header.crc;
        self.commit.seal(header.end());
        self.queued_since = self.queued_since.or(Some(now));
    }

    /// The log ends at `to` from now on, a frame boundary that it shares with the leader of `history`; the caller
    /// has made the history durable. What lies behind is not erased: its epochs betray it. Nothing may be in flight.
    pub fn truncate(&mut self, to: Lsn, history: &EpochHistory) -> Result<(), LogError> {
        if let Some(text) = &self.stopped {
            return Err(LogError::Stopped(text.clone()));
        }
        let forgets_memory = to < self.buffer.hot_start();
        if self.flights.outstanding() > 0 || forgets_memory && self.buffer.is_pinned() {
            return Err(LogError::InFlight(to));
        }
        self.follow(history);
        if to >= self.sealed() {
            let reason = format!("it ends at {}", self.sealed());
            return if to == self.sealed() { Ok(()) } else { Err(LogError::Truncate { to, reason }) };
        }
        if to < self.start() {
            let reason = format!("the oldest segment on disk starts at {}", self.start());
            return Err(LogError::Truncate { to, reason });
        }
        // Every frame names the crc of the one before it, so the first to go names the crc of the last to stay.
        self.crc = self.read_header(to)?.previous_crc;
        self.watermark.lower(to, history.last_epoch())?;
        self.reopen_segments(self.segment_of(to))?;
        self.commit.truncate(to);
        self.committed = self.committed.min(to);
        if forgets_memory {
            self.buffer.reset(to);
        }
        self.queued_since = None;
        self.receive_reset();
        Ok(())
    }

    fn read_header(&self, at: Lsn) -> Result<FrameHeader, LogError> {
        if let Some(hot) = self.hot_frame(at) {
            return Ok(*hot.header());
        }
        let path = self.segment_path(self.segment_of(at));
        let mut bytes = [0; FRAME_HEADER_BYTES];
        File::open(&path)
            .and_then(|file| file.read_exact_at(&mut bytes, at.offset(self.config.segment_bytes)))
            .map_err(|source| LogError::Io { what: "read", path, source })?;
        let frame = UnverifiedFrame::parse(&bytes, at);
        let frame = frame.map_err(|source| LogError::Truncate { to: at, reason: source.to_string() })?;
        Ok(*frame.claimed())
    }

    /// Opens the segments from `first` up to the oldest one that is still open.
    fn reopen_segments(&mut self, first: SegmentNo) -> Result<(), LogError> {
        let until = self.segments.front().map_or(self.segment_of(self.sealed()), |(number, _)| *number);
        for number in (first.0..until.0).rev().map(SegmentNo) {
            let path = self.segment_path(number);
            let file = open_segment(&path, self.config.buffered);
            let file = file.map_err(|source| LogError::Io { what: "open", path, source })?;
            self.segments.push_front((number, file));
        }
        Ok(())
    }
}
