//! The frames of a log from a position on, read from its segment files: for replay at the start, `log dump` and `log verify`.
//! Works beside a running node; knows nothing of the ring.

use std::path::Path;

use crate::error::{Gap, RecoverError};
use crate::frame::{Frame, FrameError, UnverifiedFrame};
use crate::limits::FRAME_HEADER_BYTES;
use crate::lsn::Lsn;
use crate::segment::{DirBytes, LogBytes};

/// Reads frame after frame.
pub struct LogReader {
    bytes: DirBytes,
    at: Lsn,
    until: Lsn,
    previous_crc: Option<u32>,
}

impl LogReader {
    /// Reads from `from` (a frame boundary) up to `until`. `log_dir` is the directory of the segments.
    pub fn open(log_dir: &Path, segment_bytes: u64, from: Lsn, until: Lsn) -> Result<LogReader, RecoverError> {
        let bytes = DirBytes::open(log_dir, segment_bytes)?;
        let previous_crc = (from == Lsn::ZERO).then_some(0);
        Ok(LogReader { bytes, at: from, until, previous_crc })
    }

    /// Where the next frame is read.
    pub fn position(&self) -> Lsn {
        self.at
    }

    /// The next frame, verified with its place in the chain; `None` at `until`. A frame that is not valid is an error that names
    /// file, offset and LSN, and so is a segment that is not there.
    pub fn next_frame(&mut self) -> Result<Option<Frame<'_>>, RecoverError> {
        if self.at >= self.until {
            return Ok(None);
        }
        let at = self.at;
        let (path, offset) = self.bytes.locate(at);
        // Closed where the log goes on by itself: frames that are lost beside each other are one gap.
        let gap = Gap { from: at, previous_crc: self.previous_crc, needed: self.until };
        let bad = |reason| RecoverError::Rot {
            path: path.clone(),
            offset,
            lsn: at,
            reason,
            evidence: format!("the log is known to reach {}", self.until),
            gap,
        };
        let header = match self.bytes.read_good(at, FRAME_HEADER_BYTES)? {
            Some([]) => return Err(RecoverError::Missing { path, end: at, needed: self.until, gap }),
            Some(header) => header,
            None => return Err(bad(FrameError::Unreadable)),
        };
        let wire_bytes = match UnverifiedFrame::parse(header, at) {
            Ok(frame) => frame.wire_bytes(),
            Err(reason) => return Err(bad(reason)),
        };
        let Some(wire) = self.bytes.read_good(at, wire_bytes)? else { return Err(bad(FrameError::Unreadable)) };
        let frame = match Frame::read(wire, at) {
            Ok(frame) => frame,
            Err(reason) => return Err(bad(reason)),
        };
        if self.previous_crc.is_some_and(|crc| frame.follows(crc).is_err()) {
            return Err(bad(FrameError::Chain));
        }
        self.at = frame.header().end();
        self.previous_crc = Some(frame.header().crc);
        Ok(Some(frame))
    }
}
