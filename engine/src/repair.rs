//! Giving back to a log what its disk lost: frames from another node, taken only when they fit between what stands before and
//! after them. A core over `LogBytes`: says what is missing, judges each frame that is offered, and says when the gap is closed.
//! Who is asked, and the writing, are elsewhere (`mend`, the applier's `repair`).
//!
//! Log files are byte-identical on all nodes, so what fits is what was lost. A frame fits when
//!
//! | | by |
//! |---|---|
//! | it is whole, and stands at this position | its checksum |
//! | it is of the leadership that wrote this position | this node's own epoch history |
//! | it goes on from the frame before | the chain; the first one unless nothing before it can be read |
//! | the frame after the gap goes on from the last one | the chain; or the gap reaches what this node knows to have been durable |

use crate::epoch::EpochHistory;
use crate::error::{Gap, RecoverError};
use crate::frame::{Frame, FrameError, FrameHeader};
use crate::lsn::{Epoch, Lsn};
use crate::segment::LogBytes;

/// Why a frame from elsewhere is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// It is no frame for this position.
    #[error("at {at}: {reason}")]
    Frame {
        /// The position.
        at: Lsn,
        /// What is wrong.
        reason: FrameError,
    },
    /// Another leadership wrote this position here.
    #[error("at {at}: the frame is of epoch {theirs}, this node's history says {ours}")]
    Epoch {
        /// The position.
        at: Lsn,
        /// The frame's.
        theirs: Epoch,
        /// This node's.
        ours: Epoch,
    },
    /// A frame never goes from one segment into the next.
    #[error("at {at}: the frame goes beyond its segment")]
    Segment {
        /// The position.
        at: Lsn,
    },
}

/// A gap on its way to be closed.
#[derive(Clone, Debug)]
pub struct Patch<'a> {
    gap: Gap,
    history: &'a EpochHistory,
    segment_bytes: u64,
    /// Everything before this was taken; `gap.from <= at`.
    at: Lsn,
    crc: Option<u32>,
}

impl<'a> Patch<'a> {
    /// Of which nothing is there yet.
    pub fn new(gap: Gap, history: &'a EpochHistory, segment_bytes: u64) -> Patch<'a> {
        debug_assert!(gap.from < gap.needed);
        Patch { gap, history, segment_bytes, at: gap.from, crc: gap.previous_crc }
    }

    /// The next frame begins here.
    pub fn position(&self) -> Lsn {
        self.at
    }

    /// True once something was taken.
    pub fn is_begun(&self) -> bool {
        self.at > self.gap.from
    }

    /// The crc of the frame that ends there, if it is known.
    pub fn previous_crc(&self) -> Option<u32> {
        self.crc
    }

    /// Judges the frame at the start of `bytes`, which is to stand at `position`; taken, it counts as part of the log.
    pub fn take(&mut self, bytes: &[u8]) -> Result<FrameHeader, Unfit> {
        let at = self.at;
        let frame = Frame::read(bytes, at).map_err(|reason| Unfit::Frame { at, reason })?;
        let header = *frame.header();
        let ours = self.history.epoch_at(at);
        if header.epoch != ours {
            return Err(Unfit::Epoch { at, theirs: header.epoch, ours });
        }
        if header.end() > at.segment(self.segment_bytes).next().start(self.segment_bytes) {
            return Err(Unfit::Segment { at });
        }
        if let Some(crc) = self.crc {
            frame.follows(crc).map_err(|reason| Unfit::Frame { at, reason })?;
        }
        (self.at, self.crc) = (header.end(), Some(header.crc));
        Ok(header)
    }

    /// True when the log goes on by itself behind what was taken: `own` are the bytes that this node has.
    pub fn is_closed(&self, own: &mut impl LogBytes) -> Result<bool, RecoverError> {
        if self.at == self.gap.from {
            return Ok(false);
        }
        if self.at >= self.gap.needed {
            return Ok(true);
        }
        let goes_on = |frame: &Frame<'_>| {
            let header = frame.header();
            header.epoch == self.history.epoch_at(self.at) && self.crc.is_some_and(|crc| frame.follows(crc).is_ok())
        };
        let Some(head) = own.read_good(self.at, crate::limits::FRAME_HEADER_BYTES)? else { return Ok(false) };
        let Ok(claimed) = crate::frame::UnverifiedFrame::parse(head, self.at) else { return Ok(false) };
        let Some(bytes) = own.read_good(self.at, claimed.wire_bytes())? else { return Ok(false) };
        Ok(Frame::read(bytes, self.at).is_ok_and(|frame| goes_on(&frame)))
    }
}
