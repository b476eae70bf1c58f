//! Which segments may go: a core without I/O. The node says from where on its checkpoint and its slots need the log
//! (`Log::release_before`); what the log itself needs is added here.
//!
//! ```text
//!  | segment | segment | segment | segment | segment |
//!   <- may go ->|       ^keep_from          ^taken ^flushed
//! ```

use crate::lsn::{Lsn, SegmentNo};

/// Who needs the log, and from where on. What lies before all of them may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// The store's durable checkpoint, from which a restart replays, or a replication slot that holds more.
    pub node: Lsn,
    /// The end of what was handed out for applying; `taken <= flushed`.
    pub taken: Lsn,
    /// The end of the durable log.
    pub flushed: Lsn,
    /// Log that is kept behind `flushed` in any case, for replicas without a slot.
    pub keep_bytes_min: u64,
}

impl Needs {
    /// The position from which on the log is needed.
    pub fn keep_from(&self) -> Lsn {
        debug_assert!(self.taken <= self.flushed);
        let kept = Lsn(self.flushed.0.saturating_sub(self.keep_bytes_min));
        self.node.min(self.taken).min(kept)
    }

    /// The oldest segment that is needed: the one that holds the frame *before* `keep_from`, because the next frame's
    /// place in the chain is that frame's crc.
    pub fn oldest_segment(&self, segment_bytes: u64) -> SegmentNo {
        Lsn(self.keep_from().0.saturating_sub(1)).segment(segment_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEGMENT: u64 = 16 << 20;

    #[test]
    fn whoever_needs_most_decides() {
        let needs = Needs { node: Lsn(400), taken: Lsn(700), flushed: Lsn(900), keep_bytes_min: 600 };
        assert_eq!(needs.keep_from(), Lsn(300));
        assert_eq!(Needs { keep_bytes_min: 0, ..needs }.keep_from(), Lsn(400));
        assert_eq!(Needs { keep_bytes_min: 0, node: Lsn::MAX, ..needs }.keep_from(), Lsn(700));
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
        for (node, oldest) in cases {
            let end = Lsn(9 * SEGMENT);
            let needs = Needs { node: Lsn(node), taken: end, flushed: end, keep_bytes_min: 0 };
            assert_eq!(needs.oldest_segment(SEGMENT), SegmentNo(oldest), "from {node}");
        }
    }
}
