//! Damage on one node's disk: a bit of its durable log that flips while the node is down, and what must become of it. Only what the
//! node can know to have been durable is damaged: by its watermark and its store. What lies behind those and is broken could as well have
//! been under way in the crash, and is cut off.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use walferry_engine::EpochHistory;
use walferry_engine::log::LOG_DIR;
use walferry_engine::lsn::Lsn;
use walferry_engine::reader::LogReader;
use walferry_engine::watermark::{KnownWatermark, Watermark};
use walferry_node::simulated::Member;

use crate::limits::SEGMENT_BYTES;

/// A frame with a bit that flipped.
pub struct Rot {
    path: PathBuf,
    /// The bit: where in the file, and which.
    offset: u64,
    mask: u8,
    /// The frame, and its bytes as they were.
    from: Lsn,
    to: Lsn,
    whole: Vec<u8>,
    history: EpochHistory,
}

/// Up to where a node that is down will know that its log was durable.
pub fn known_durable(dir: &Path) -> Lsn {
    match Watermark::load(dir) {
        Ok(KnownWatermark::As(watermark)) => watermark.durable,
        Ok(KnownWatermark::Never | KnownWatermark::Damaged) | Err(_) => Lsn::ZERO,
    }
}

impl Rot {
    /// Flips a bit of one frame in the log of the node in `dir`, which is down; its log went from `start` to `end`. `None` where
    /// there is no frame to choose.
    pub fn begin(dir: &Path, (start, end): (Lsn, Lsn), history: EpochHistory, rng: &mut fastrand::Rng) -> Option<Rot> {
        let end = match Watermark::load(dir) {
            Ok(KnownWatermark::As(watermark)) => end.min(watermark.bound(&history)),
            _ => return None,
        };
        let segment = Lsn(rng.u64(start.0..end.0.max(start.0 + 1))).segment(SEGMENT_BYTES);
        let from = segment.start(SEGMENT_BYTES).max(start);
        let until = segment.next().start(SEGMENT_BYTES).min(end);
        let mut reader = LogReader::open(&dir.join(LOG_DIR), SEGMENT_BYTES, from, until).ok()?;
        let mut frames = Vec::new();
        while let Ok(Some(frame)) = reader.next_frame() {
            let header = frame.header();
            if header.end() <= end {
                frames.push((header.lsn, header.end(), frame.wire().to_vec()));
            }
        }
        if frames.is_empty() {
            return None;
        }
        let (from, to, whole) = frames.swap_remove(rng.usize(0..frames.len()));
        let path = dir.join(LOG_DIR).join(segment.file_name());
        let offset = from.offset(SEGMENT_BYTES) + rng.u64(0..whole.len() as u64);
        let rot = Rot { path, offset, mask: 1 << rng.u8(0..8), from, to, whole, history };
        rot.flip();
        Some(rot)
    }

    fn flip(&self) {
        let file = fs::OpenOptions::new().read(true).write(true).open(&self.path).expect("a segment");
        let mut byte = [0];
        let flipped = file.read_exact_at(&mut byte, self.offset);
        flipped.and_then(|()| file.write_all_at(&[byte[0] ^ self.mask], self.offset)).expect("a byte");
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The operator brings the frame back, from wherever it has it.
    pub fn mend(&self) {
        let file = fs::OpenOptions::new().write(true).open(&self.path).expect("a segment");
        file.write_all_at(&self.whole, self.from.offset(SEGMENT_BYTES)).expect("a frame");
    }

    fn stands_in(&self, member: &Member) -> bool {
        let mut bytes = vec![0; self.whole.len()];
        let file = fs::File::open(member.segment_path(self.from));
        let read = file.and_then(|file| file.read_exact_at(&mut bytes, self.from.offset(SEGMENT_BYTES)));
        read.is_ok() && bytes == self.whole
    }

    /// Whether another member has the frame, and may send it.
    pub fn is_held_by(&self, member: &Member) -> bool {
        member.log_start() <= self.from
            && member.flushed() >= self.to
            && member.history().fork_with(&self.history, Lsn::MAX) >= self.to
            && self.stands_in(member)
    }

    /// Whether the damaged member has the frame again, or does not need it any more: it was recycled, or another leader's log
    /// stands in its place.
    pub fn is_over(&self, member: &Member) -> bool {
        member.log_start() > self.from
            || member.history().epoch_at(self.from) != self.history.epoch_at(self.from)
            || self.stands_in(member)
    }
}
