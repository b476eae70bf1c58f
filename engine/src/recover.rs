//! Finding the end of the log: a core over `LogBytes`. Called when a log is opened; changes nothing on disk.
//!
//! The chain is followed from a known frame boundary. Where it breaks, at position P, three pieces of evidence decide:
//!
//! | block at P | a later valid frame | P is known to have been durable | verdict |
//! |---|---|---|---|
//! | nothing, recycled, headless or stale | none | no | end: the log ends at P, nothing was cut |
//! | nothing, recycled, headless or stale | does not prove P flushed | no | torn: P was lost in a crash, its successor was not |
//! | damaged or out of the chain | none, or does not prove P flushed | no | torn: P was being written in a crash |
//! | anything | proves P flushed | any | rot: stop |
//! | anything | any | yes, by the store or the durable watermark | rot: stop |
//! | what the disk cannot read | none, or does not prove P flushed | no | stop: nothing tells what it was |
//!
//! *Valid* is a right checksum at the right position, in the epoch that the history has for that position, and no older than the
//! chain. *Stale* is a whole frame of another epoch: what a truncation left behind. Recycled blocks name another position.
//! *Headless* is a block without a header: in a recycled segment the log often ends within what was a longer frame. A header whose
//! magic rotted looks the same, so a damaged watermark makes it damage.
//! A header *proves* P flushed when it says so and this node led in its epoch: the flushed LSN in a header is the leader's, and
//! a replica that catches up has frames in flight that its leader flushed long ago. For a replica the watermark and the store speak.
//! Without a watermark (lost, or damaged) every header counts: a stop too many, never one too few. With a damaged one a torn tail
//! counts as rot as well, since nothing says how far this node had confirmed its log.
//!
//! A checksum ends with the records. A crash can leave a frame whole and, behind it, the padding's place as it was before: with
//! what a torn tail or a recycled segment had there. The frame counts; its padding is named, to be made zeros again.

use std::path::Path;

use crate::epoch::EpochHistory;
use crate::error::{Gap, RecoverError};
use crate::frame::{Frame, FrameError, FrameHeader, UnverifiedFrame};
use crate::limits::{FRAME_ALIGN_BYTES, FRAME_HEADER_BYTES, LOG_BUFFER_BYTES_MAX};
use crate::lsn::{Epoch, Lsn};
use crate::mutants;
use crate::origin::Origin;
use crate::segment::{DirBytes, LogBytes};
use crate::watermark::{KnownWatermark, WATERMARK_FILE};

/// Blocks behind a break that the disk may refuse to read; a disk that is beyond this has more than bad sectors, and each costs time.
const UNREADABLE_MAX: usize = 256;

/// What is known of the log apart from its frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// What the store already holds: a frame boundary that the log must reach, and from whose segment on it is read.
    pub applied: Lsn,
    /// What the node last said of its own disk.
    pub watermark: KnownWatermark,
    /// Where the log began, if not at 0.
    pub origin: Option<Origin>,
}

/// A position alone: the store's, or the oldest one of a log that is only looked at.
impl From<Lsn> for Known {
    fn from(applied: Lsn) -> Known {
        Known { applied, ..Known::default() }
    }
}

impl Known {
    fn durable(&self, history: &EpochHistory) -> Durable {
        let by_watermark = match self.watermark {
            KnownWatermark::As(watermark) => watermark.bound(history),
            KnownWatermark::Never | KnownWatermark::Damaged => Lsn::ZERO,
        };
        if by_watermark > self.applied { Durable::Watermark(by_watermark) } else { Durable::Store(self.applied) }
    }

    fn believes(&self, header: &FrameHeader) -> bool {
        match self.watermark {
            KnownWatermark::As(watermark) => watermark.led == header.epoch,
            KnownWatermark::Never | KnownWatermark::Damaged => true,
        }
    }
}

/// Up to where the log must be whole, and by whose word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Durable {
    Store(Lsn),
    Watermark(Lsn),
}

impl Durable {
    fn lsn(self) -> Lsn {
        match self {
            Durable::Store(lsn) | Durable::Watermark(lsn) => lsn,
        }
    }

    fn evidence(self) -> String {
        match self {
            Durable::Store(lsn) => format!("the store holds everything up to {lsn}"),
            Durable::Watermark(lsn) => format!("this node had made everything up to {lsn} durable"),
        }
    }
}

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
    /// Padding that is not zeros, from and to: what stood there before. Every node's log has the same bytes once it is.
    pub stale_padding: Vec<(Lsn, Lsn)>,
}

/// A tail that was being written when the node went down. Nobody was told that it is safe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TornTail {
    /// The log ends here.
    pub lsn: Lsn,
    /// Up to where there are frames, or parts of one, that do not count.
    pub to: Lsn,
    /// Why.
    pub reason: String,
}

/// What stands where the chain breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Block {
    Nothing,
    Recycled,
    Headless,
    Stale,
    /// Why, and up to where the frame reaches by its own header.
    Damaged(FrameError, Option<Lsn>),
}

/// What a frame after the break says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Later {
    None,
    /// The first such frame, and where the last one ends.
    NotFlushed(Lsn, Lsn),
    Flushed(Lsn),
}

impl Later {
    /// Up to where it says that the log was flushed, `broken` at least.
    fn flushed_from(self, broken: Lsn) -> Lsn {
        match self {
            Later::Flushed(frame) => frame,
            Later::None | Later::NotFlushed(..) => broken,
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    End,
    Torn(String),
    Rot { reason: FrameError, evidence: String },
}

fn reason_of(block: Block) -> FrameError {
    match block {
        Block::Nothing | Block::Headless => FrameError::Magic,
        Block::Recycled | Block::Stale => FrameError::Chain,
        Block::Damaged(error, _) => error,
    }
}

/// Up to where a torn tail reaches, as far as its headers tell: a block at least.
fn torn_to(at: Lsn, block: Block, later: Later) -> Lsn {
    let block_end = at.advance(FRAME_ALIGN_BYTES as u64);
    let claimed = match block {
        Block::Damaged(_, Some(end)) => end.max(block_end),
        _ => block_end,
    };
    match later {
        Later::NotFlushed(_, end) => end.max(claimed),
        Later::None | Later::Flushed(_) => claimed,
    }
}

fn judge(at: Lsn, block: Block, later: Later, durable: Durable) -> Verdict {
    let reason = reason_of(block);
    if mutants::is_on("cut-what-rots") {
        return Verdict::Torn(reason.to_string());
    }
    if let Later::Flushed(frame) = later {
        return Verdict::Rot { reason, evidence: format!("the frame at {frame} says that it was durable") };
    }
    if at < durable.lsn() {
        return Verdict::Rot { reason, evidence: durable.evidence() };
    }
    match (block, later) {
        (Block::Nothing | Block::Recycled | Block::Headless | Block::Stale, Later::None) => Verdict::End,
        (_, Later::NotFlushed(frame, _)) => {
            Verdict::Torn(format!("{reason}, and the frame at {frame} was written without it in the same crash"))
        }
        (_, _) => Verdict::Torn(reason.to_string()),
    }
}

/// As `find_end`, for the segments in `log_dir`.
pub fn recover(
    log_dir: &Path,
    segment_bytes: u64,
    known: impl Into<Known>,
    history: &EpochHistory,
) -> Result<Recovery, RecoverError> {
    find_end(&mut DirBytes::open(log_dir, segment_bytes)?, known, history)
}

/// What a state of the log is compared by: two logs that both reach an LSN hold the same up to there only if the frames that
/// end there are the same one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LastFrame {
    /// Where it ends.
    pub end: Lsn,
    /// Its epoch.
    pub epoch: Epoch,
    /// Its checksum, which depends on all frames before it.
    pub crc: u32,
}

/// Whether a state is one of this log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lineage {
    /// The log holds this frame.
    Same,
    /// The log's files do not lead up to the frame's end, in an epoch that fits: recovery finds out whether they are damaged.
    Unknown,
    /// The log holds something else there; what.
    Other(String),
}

/// Compares `last`, the end of a state that claims to be one of this log, with the epoch history and the frames.
pub fn lineage_of(
    bytes: &mut impl LogBytes,
    last: LastFrame,
    origin: Option<Origin>,
    history: &EpochHistory,
) -> Result<Lineage, RecoverError> {
    let LastFrame { end: at, epoch, crc } = last;
    let known = history.epoch_of_end(at);
    if known != epoch {
        return Ok(Lineage::Other(format!(
            "its last frame is of epoch {epoch}, the log before {at} is of epoch {known}"
        )));
    }
    if at == Lsn::ZERO {
        return Ok(Lineage::Same);
    }
    let segment_bytes = bytes.segment_bytes();
    let first = Lsn(at.0 - 1).segment(segment_bytes).start(segment_bytes);
    let begin = origin.filter(|origin| (first..=at).contains(&origin.lsn));
    let (mut end, mut found) = begin.map_or((first, None), |origin| (origin.lsn, Some(origin.crc)));
    while end < at {
        let Ok(header) = next_frame(bytes, end, found, history)? else { return Ok(Lineage::Unknown) };
        (end, found) = (header.end(), Some(header.crc));
    }
    if end > at {
        return Ok(Lineage::Other(format!("no frame of the log ends at {at}")));
    }
    Ok(match found {
        Some(found) if found == crc => Lineage::Same,
        Some(found) => {
            Lineage::Other(format!("its last frame has the checksum {crc:08x}, the log's before {at} has {found:08x}"))
        }
        None => Lineage::Unknown,
    })
}

/// True when these segments were prepared, and nothing of this log was written to any of them from `begin` on: a segment is written
/// from its start, so its first block is as it was made (zeros) or recycled (a frame of another position). Damage counts as written.
pub fn is_unwritten(bytes: &mut impl LogBytes, begin: Lsn) -> Result<bool, RecoverError> {
    let segment_bytes = bytes.segment_bytes();
    for number in bytes.segments().to_vec() {
        let at = number.start(segment_bytes).max(begin);
        if at >= number.next().start(segment_bytes) {
            continue;
        }
        let Some(header) = bytes.read_good(at, FRAME_HEADER_BYTES)? else { return Ok(false) };
        let zeros = header.iter().all(|byte| *byte == 0);
        let unwritten = match UnverifiedFrame::parse(header, at) {
            Ok(_) => false,
            Err(FrameError::Position(_)) => true,
            Err(_) => zeros,
        };
        if !unwritten {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Follows the chain to its end.
pub fn find_end(
    bytes: &mut impl LogBytes,
    known: impl Into<Known>,
    history: &EpochHistory,
) -> Result<Recovery, RecoverError> {
    let known = known.into();
    let (needed, durable) = (known.applied, known.durable(history));
    let segment_bytes = bytes.segment_bytes();
    // The crc of the frame that ends at `needed` is part of the chain, so the frame before is read as well.
    let has = |number| bytes.segments().binary_search(&number).is_ok();
    let before = Lsn(needed.0.saturating_sub(1)).segment(segment_bytes);
    let first = if has(before) { before } else { needed.segment(segment_bytes) };
    let mut recovery = Recovery::at(first.start(segment_bytes), needed);
    let mut linked = recovery.end == Lsn::ZERO;
    // What stands before the origin, if anything does, is not of this log.
    if let Some(origin) = known.origin.filter(|origin| (recovery.end..=needed).contains(&origin.lsn)) {
        (recovery.end, recovery.crc, linked) = (origin.lsn, origin.crc, true);
    }
    let block = loop {
        match next_frame(bytes, recovery.end, linked.then_some(recovery.crc), history)? {
            Ok(header) => {
                recovery.follow(&header);
                let padding = header.span_bytes() - header.wire_bytes();
                let from = header.lsn.advance(header.wire_bytes() as u64);
                if padding > 0 && bytes.read(from, padding)?.iter().any(|byte| *byte != 0) {
                    recovery.stale_padding.push((from, header.end()));
                }
            }
            Err(block) => break block,
        }
        linked = true;
    };
    let at = recovery.end;
    let (path, offset) = bytes.locate(at);
    let previous_crc = linked.then_some(recovery.crc);
    let gap = |flushed: Lsn| Gap { from: at, previous_crc, needed: durable.lsn().max(flushed).max(Lsn(at.0 + 1)) };
    if at < durable.lsn() && bytes.segments().binary_search(&at.segment(segment_bytes)).is_err() {
        return Err(RecoverError::Missing { path, end: at, needed: durable.lsn(), gap: gap(at) });
    }
    let later = look_ahead(bytes, at, recovery.epoch, &known, history)?;
    let verdict = match judge(at, block, later, durable) {
        verdict if known.watermark != KnownWatermark::Damaged => verdict,
        verdict @ Verdict::Rot { .. } => verdict,
        verdict @ Verdict::End if block != Block::Headless => verdict,
        Verdict::Torn(_) | Verdict::End => Verdict::Rot {
            reason: reason_of(block),
            evidence: format!(
                "it may be a torn tail, but the durable watermark ({WATERMARK_FILE} in the data directory) is damaged, so nothing \
                 tells it from damage to what was acknowledged; remove that file to have it cut"
            ),
        },
    };
    match verdict {
        Verdict::End => {}
        // Nobody knows what stands there: it may have been acknowledged, and the next attempt may read it.
        Verdict::Torn(_) if reason_of(block) == FrameError::Unreadable => {
            return Err(RecoverError::bad_sector(path, offset));
        }
        Verdict::Torn(reason) => recovery.cut = Some(TornTail { lsn: at, to: torn_to(at, block, later), reason }),
        Verdict::Rot { reason, evidence } => {
            return Err(RecoverError::Rot {
                path,
                offset,
                lsn: at,
                reason,
                evidence,
                gap: gap(later.flushed_from(at)),
            });
        }
    }
    if !linked {
        // The next frame must name the crc of the one before, and that is not here to be read.
        let before = Lsn(at.0 - 1);
        let (path, _) = bytes.locate(before);
        let begun = known.origin.map_or(Lsn::ZERO, |origin| origin.lsn);
        let from = before.segment(segment_bytes).start(segment_bytes).max(begun.min(before));
        return Err(RecoverError::Unlinked { path, end: at, gap: Gap { from, previous_crc: None, needed: at } });
    }
    Ok(recovery)
}

impl Recovery {
    /// A log that begins at `start`, of which the store holds everything up to `applied`.
    fn at(start: Lsn, applied: Lsn) -> Recovery {
        Recovery {
            end: start,
            crc: 0,
            epoch: Epoch(0),
            leader_flushed: applied,
            committed: applied,
            cut: None,
            stale_padding: Vec::new(),
        }
    }

    /// The log goes on with this frame.
    fn follow(&mut self, header: &FrameHeader) {
        self.end = header.end();
        self.crc = header.crc;
        self.epoch = header.epoch;
        self.leader_flushed = self.leader_flushed.max(header.flushed);
        self.committed = self.committed.max(header.committed);
    }
}

/// The header of the whole, valid frame at `at`, or what stands there instead.
fn next_frame(
    bytes: &mut impl LogBytes,
    at: Lsn,
    previous_crc: Option<u32>,
    history: &EpochHistory,
) -> Result<Result<FrameHeader, Block>, RecoverError> {
    let unreadable = Ok(Err(Block::Damaged(FrameError::Unreadable, None)));
    let Some(header) = bytes.read_good(at, FRAME_HEADER_BYTES)? else { return unreadable };
    let zeros = header.iter().all(|byte| *byte == 0);
    let block = |error| match error {
        // What was never written is zeros.
        FrameError::Magic if zeros => Block::Nothing,
        FrameError::Magic => Block::Headless,
        FrameError::Position(_) => Block::Recycled,
        error => Block::Damaged(error, None),
    };
    let claimed = match UnverifiedFrame::parse(header, at) {
        Ok(frame) => frame,
        // No segment, or the end of the last one.
        Err(FrameError::Short) => return Ok(Err(Block::Nothing)),
        Err(error) => return Ok(Err(block(error))),
    };
    if mutants::is_on("believe-headers") {
        return Ok(Ok(*claimed.claimed()));
    }
    let Some(wire) = bytes.read_good(at, claimed.wire_bytes())? else { return unreadable };
    let frame = match Frame::read(wire, at) {
        Ok(frame) => frame,
        Err(error) => return Ok(Err(Block::Damaged(error, Some(claimed.claimed().end())))),
    };
    if mutants::is_on("take-any-chain") {
        return Ok(Ok(*frame.header()));
    }
    if frame.header().epoch != history.epoch_at(at) {
        return Ok(Err(Block::Stale));
    }
    match previous_crc.map_or(Ok(()), |crc| frame.follows(crc)) {
        Ok(()) => Ok(Ok(*frame.header())),
        Err(error) => Ok(Err(Block::Damaged(error, Some(frame.header().end())))),
    }
}

/// What the frames behind a break say of it. One that proves it flushed decides; else the first counts.
fn look_ahead(
    bytes: &mut impl LogBytes,
    broken: Lsn,
    chain: Epoch,
    known: &Known,
    history: &EpochHistory,
) -> Result<Later, RecoverError> {
    let segment_bytes = bytes.segment_bytes();
    let end = bytes.segments().last().map_or(Lsn::ZERO, |last| last.next().start(segment_bytes));
    let end = end.min(broken.advance(LOG_BUFFER_BYTES_MAX as u64));
    let mut later = Later::None;
    let mut unreadable = 0;
    let mut at = broken.advance(FRAME_ALIGN_BYTES as u64);
    while at < end {
        let found = next_frame(bytes, at, None, history)?;
        if matches!(found, Err(Block::Damaged(FrameError::Unreadable, _))) {
            unreadable += 1;
            if unreadable > UNREADABLE_MAX {
                let (path, offset) = bytes.locate(at);
                return Err(RecoverError::bad_sector(path, offset));
            }
        }
        let Some(header) = found.ok().filter(|header| header.epoch >= chain) else {
            at = at.advance(FRAME_ALIGN_BYTES as u64);
            continue;
        };
        if header.flushed > broken && known.believes(&header) {
            return Ok(Later::Flushed(at));
        }
        at = header.end();
        later = match later {
            Later::NotFlushed(first, _) => Later::NotFlushed(first, at),
            _ => Later::NotFlushed(header.lsn, at),
        };
    }
    Ok(later)
}

#[cfg(test)]
#[path = "recover_tests.rs"]
mod tests;
