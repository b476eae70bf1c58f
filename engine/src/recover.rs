//! Finding the end of the log: a core over `LogBytes`. Called when a log is opened; changes nothing on disk.
//!
//! The chain is followed from a known frame boundary. Where it breaks, at position P, three pieces of evidence decide:
//!
//! | block at P | a later valid frame | verdict |
//! |---|---|---|
//! | nothing, recycled or stale | none | the log ends at P |
//! | nothing, recycled or stale | says that P was not flushed | torn: P was lost in a crash, its successor was not |
//! | damaged or out of the chain | none, or says that P was not flushed | torn: P was being written in a crash |
//! | anything | says that P was flushed | rot: stop |
//! | anything, P before what the store holds | any | rot or missing: stop |
//!
//! *Valid* is a right checksum at the right position, in the epoch that the history has for that position, and no older than the
//! chain. *Stale* is a whole frame of another epoch: what a truncation left behind. Recycled blocks name another position.

use std::path::Path;

use crate::epoch::EpochHistory;
use crate::error::RecoverError;
use crate::frame::{Frame, FrameError, FrameHeader, UnverifiedFrame};
use crate::limits::{FRAME_ALIGN_BYTES, FRAME_HEADER_BYTES};
use crate::lsn::{Epoch, Lsn};
use crate::segment::{DirBytes, LogBytes};

/// Frames that were sealed while another was not yet flushed lie within the log buffer's size behind it; no log buffer is larger.
pub const LOOK_AHEAD_BYTES_MAX: u64 = 512 << 20;

/// What recovery found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovery {
    /// Where the log ends.
    pub end: Lsn,
    /// The crc of the frame that ends there; 0 in an empty log.
    pub crc: u32,
    /// The newest epoch with a frame.
    pub epoch: Epoch,
    /// What the leader had made durable when it sealed the last frame here.
    pub leader_flushed: Lsn,
    /// The commit LSN when the leader sealed the last frame here.
    pub committed: Lsn,
    /// What was cut off, if the log did not end cleanly.
    pub cut: Option<TornTail>,
}

/// A tail that was being written when the node went down. Nobody was told that it is safe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TornTail {
    /// The log ends here.
    pub lsn: Lsn,
    /// Why.
    pub reason: String,
}

/// What stands where the chain breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Block {
    Nothing,
    Recycled,
    Stale,
    Damaged(FrameError),
}

/// What a frame after the break says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Later {
    None,
    NotFlushed(Lsn),
    Flushed(Lsn),
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    End,
    Torn(String),
    Rot { reason: FrameError, evidence: String },
}

fn judge(at: Lsn, block: Block, later: Later, needed: Lsn) -> Verdict {
    let reason = match block {
        Block::Nothing => FrameError::Magic,
        Block::Recycled | Block::Stale => FrameError::Chain,
        Block::Damaged(error) => error,
    };
    if let Later::Flushed(frame) = later {
        return Verdict::Rot { reason, evidence: format!("the frame at {frame} says that it was durable") };
    }
    if at < needed {
        return Verdict::Rot { reason, evidence: format!("the store holds everything up to {needed}") };
    }
    match (block, later) {
        (Block::Nothing | Block::Recycled | Block::Stale, Later::None) => Verdict::End,
        (_, Later::NotFlushed(frame)) => {
            Verdict::Torn(format!("{reason}, and the frame at {frame} was written without it in the same crash"))
        }
        (_, _) => Verdict::Torn(reason.to_string()),
    }
}

/// As `find_end`, for the segments in `log_dir`.
pub fn recover(
    log_dir: &Path,
    segment_bytes: u64,
    needed: Lsn,
    history: &EpochHistory,
) -> Result<Recovery, RecoverError> {
    let mut bytes = DirBytes::open(log_dir, segment_bytes)?;
    let found = find_end(&mut bytes, needed, history)?;
    if found.end < needed {
        return Err(RecoverError::Missing { dir: log_dir.to_owned(), end: found.end, needed });
    }
    Ok(found)
}

/// Follows the chain to its end. `needed` is what the store already holds: a frame boundary that the log must reach.
pub fn find_end(bytes: &mut impl LogBytes, needed: Lsn, history: &EpochHistory) -> Result<Recovery, RecoverError> {
    let segment_bytes = bytes.segment_bytes();
    // The crc of the frame that ends at `needed` is part of the chain, so the frame before is read as well.
    let has = |number| bytes.segments().binary_search(&number).is_ok();
    let before = Lsn(needed.0.saturating_sub(1)).segment(segment_bytes);
    let first = if has(before) { before } else { needed.segment(segment_bytes) };
    let mut recovery =
        Recovery { end: first.start(segment_bytes), crc: 0, epoch: Epoch(0), leader_flushed: needed, committed: needed, cut: None };
    if bytes.segments().binary_search(&first).is_err() {
        return Ok(recovery);
    }
    let mut linked = recovery.end == Lsn::ZERO;
    loop {
        let at = recovery.end;
        match next_frame(bytes, at, linked.then_some(recovery.crc), history)? {
            Ok(header) => {
                recovery = Recovery {
                    end: header.end(),
                    crc: header.crc,
                    epoch: header.epoch,
                    leader_flushed: recovery.leader_flushed.max(header.flushed),
                    committed: recovery.committed.max(header.committed),
                    cut: None,
                };
                linked = true;
            }
            Err(block) => {
                let later = look_ahead(bytes, at, recovery.epoch, history)?;
                match judge(at, block, later, needed) {
                    Verdict::End => {}
                    Verdict::Torn(reason) => recovery.cut = Some(TornTail { lsn: at, reason }),
                    Verdict::Rot { reason, evidence } => {
                        let (path, offset) = bytes.locate(at);
                        return Err(RecoverError::Rot { path, offset, lsn: at, reason, evidence });
                    }
                }
                return Ok(recovery);
            }
        }
    }
}

/// The header of the whole, valid frame at `at`, or what stands there instead.
fn next_frame(
    bytes: &mut impl LogBytes,
    at: Lsn,
    previous_crc: Option<u32>,
    history: &EpochHistory,
) -> Result<Result<FrameHeader, Block>, RecoverError> {
    let block = |error| match error {
        FrameError::Magic => Block::Nothing,
        FrameError::Position(_) => Block::Recycled,
        error => Block::Damaged(error),
    };
    let wire_bytes = match UnverifiedFrame::parse(bytes.read(at, FRAME_HEADER_BYTES)?, at) {
        Ok(frame) => frame.wire_bytes(),
        // No segment, or the end of the last one.
        Err(FrameError::Short) => return Ok(Err(Block::Nothing)),
        Err(error) => return Ok(Err(block(error))),
    };
    let frame = match Frame::read(bytes.read(at, wire_bytes)?, at) {
        Ok(frame) => frame,
        Err(error) => return Ok(Err(block(error))),
    };
    if frame.header().epoch != history.epoch_at(at) {
        return Ok(Err(Block::Stale));
    }
    match previous_crc.map_or(Ok(()), |crc| frame.follows(crc)) {
        Ok(()) => Ok(Ok(*frame.header())),
        Err(error) => Ok(Err(Block::Damaged(error))),
    }
}

/// What the frames behind a break say of it. One that says it was flushed settles the matter; else the first counts.
fn look_ahead(
    bytes: &mut impl LogBytes,
    broken: Lsn,
    chain: Epoch,
    history: &EpochHistory,
) -> Result<Later, RecoverError> {
    let segment_bytes = bytes.segment_bytes();
    let end = bytes.segments().last().map_or(Lsn::ZERO, |last| last.next().start(segment_bytes));
    let end = end.min(broken.advance(LOOK_AHEAD_BYTES_MAX));
    let mut later = Later::None;
    let mut at = broken.advance(FRAME_ALIGN_BYTES as u64);
    while at < end {
        let header = next_frame(bytes, at, None, history)?.ok().filter(|header| header.epoch >= chain);
        let Some(header) = header else {
            at = at.advance(FRAME_ALIGN_BYTES as u64);
            continue;
        };
        if header.flushed > broken {
            return Ok(Later::Flushed(at));
        }
        if later == Later::None {
            later = Later::NotFlushed(at);
        }
        at = header.end();
    }
    Ok(later)
}

#[cfg(test)]
#[path = "recover_tests.rs"]
mod tests;
