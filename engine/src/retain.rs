//! Which segments may go: a core without I/O. The node tells who still needs the log, `Log::release_before` acts on it.
//!
//! ```text
//!  | segment | segment | segment | segment | segment |
//!   <- may go ->|       ^keep_from                    ^flushed
//! ```

use crate::lsn::{Lsn, SegmentNo};

/// Who needs the log, and from where on. What lies before all of them may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// The store's durable checkpoint: a restart replays from here.
    pub checkpoint: Lsn,
    /// The oldest position that a replication slot holds; [`Lsn::MAX`] without slots.
    pub slots: Lsn,
    /// The end of the durable log.
    pub flushed: Lsn,
    /// Log that is kept behind `flushed` for replicas without a slot.
    pub keep_bytes_min: u64,
}

impl Needs {
    /// The position from which on the log is needed.
    pub fn keep_from(&self) -> Lsn {
        let kept = Lsn(self.flushed.0.saturating_sub(self.keep_bytes_min));
        self.checkpoint.min(self.slots).min(kept)
    }
}

/// The oldest segment that is needed when the log is needed from `keep_from` on: the one that holds the frame *before* it,
/// because the next frame's place in the chain is that frame's crc.
pub fn oldest_needed(keep_from: Lsn, segment_bytes: u64) -> SegmentNo {
    Lsn(keep_from.0.saturating_sub(1)).segment(segment_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEGMENT: u64 = 16 << 20;

    #[test]
    fn whoever_needs_most_decides() {
        let needs = Needs { checkpoint: Lsn(500), slots: Lsn(400), flushed: Lsn(900), keep_bytes_min: 600 };
        assert_eq!(needs.keep_from(), Lsn(300));
        assert_eq!(Needs { keep_bytes_min: 0, ..needs }.keep_from(), Lsn(400));
        assert_eq!(Needs { keep_bytes_min: 0, slots: Lsn::MAX, ..needs }.keep_from(), Lsn(500));
        assert_eq!(Needs { keep_bytes_min: 1000, ..needs }.keep_from(), Lsn::ZERO);
    }

    #[test]
    fn the_frame_before_is_kept_with_its_segment() {
        let cases = [
            (0, 0),
            (1, 0),
            (SEGMENT - 4096, 0),
            (SEGMENT, 0),
            (SEGMENT + 4096, 1),
            (2 * SEGMENT, 1),
            (5 * SEGMENT + 1, 5),
        ];
        for (keep_from, oldest) in cases {
            assert_eq!(oldest_needed(Lsn(keep_from), SEGMENT), SegmentNo(oldest), "from {keep_from}");
        }
    }
}
