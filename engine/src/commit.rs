//! The core of group commit: which writes are in flight, and up to where the log is durable. No I/O, no clock, no
//! bytes: the driver (`log.rs`) tells what was sealed, submitted and completed, and asks what is durable.

use crate::limits::WRITE_DEPTH_MAX;
use crate::lsn::Lsn;

/// Writes that are remembered at once. More than may be in flight: behind one slow write, others complete and make
/// way for new ones while the durable prefix waits.
const WINDOW_WRITES: usize = WRITE_DEPTH_MAX * 2;

/// The number of a write, in the order of submission.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct WriteNo(pub u64);

impl WriteNo {
    /// Where a table of [`Commit::WINDOW`] entries keeps this write.
    pub fn slot(self) -> usize {
        (self.0 % WINDOW_WRITES as u64) as usize
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Window {
    end: Lsn,
    complete: bool,
}

/// How far the log has come at each stage.
#[derive(Debug)]
pub struct Commit {
    /// Taken by whoever applies; `applied <= flushed`.
    applied: Lsn,
    /// End of the contiguous prefix that is durable; `flushed <= written`.
    flushed: Lsn,
    /// End of what was submitted to the disk; `written <= sealed`.
    written: Lsn,
    /// End of the last whole frame.
    sealed: Lsn,
    window: [Window; WINDOW_WRITES],
    /// The oldest write that the durable prefix waits for; `oldest <= next`.
    oldest: u64,
    /// The number of the next write; `next - oldest <= WINDOW_WRITES`.
    next: u64,
    /// Submitted and not complete; `in_flight <= depth`.
    in_flight: usize,
    depth: usize,
}

impl Commit {
    /// How many writes may be remembered at once.
    pub const WINDOW: usize = WINDOW_WRITES;

    /// A log that is durable and applied up to `end`, with at most `depth` writes in flight.
    pub fn new(end: Lsn, depth: usize) -> Commit {
        assert!((1..=WRITE_DEPTH_MAX).contains(&depth));
        let window = [Window::default(); WINDOW_WRITES];
        let (applied, flushed, written, sealed) = (end, end, end, end);
        Commit { applied, flushed, written, sealed, window, oldest: 0, next: 0, in_flight: 0, depth }
    }

    fn assert_order(&self) {
        assert!(self.applied <= self.flushed, "applied {} > flushed {}", self.applied, self.flushed);
        assert!(self.flushed <= self.written, "flushed {} > written {}", self.flushed, self.written);
        assert!(self.written <= self.sealed, "written {} > sealed {}", self.written, self.sealed);
        assert!(self.oldest <= self.next && self.next - self.oldest <= WINDOW_WRITES as u64);
        assert!(self.in_flight <= self.depth && self.in_flight as u64 <= self.next - self.oldest);
    }

    /// A frame that ends at `end` is whole and may be written.
    pub fn seal(&mut self, end: Lsn) {
        assert!(end > self.sealed);
        self.sealed = end;
    }

    /// True when the disk can take another write.
    pub fn can_submit(&self) -> bool {
        self.in_flight < self.depth && self.next - self.oldest < WINDOW_WRITES as u64
    }

    /// The bytes from `written` to `end` go to the disk now.
    pub fn submit(&mut self, end: Lsn) -> WriteNo {
        assert!(self.can_submit() && end > self.written && end <= self.sealed);
        let number = WriteNo(self.next);
        self.window[number.slot()] = Window { end, complete: false };
        self.next += 1;
        self.in_flight += 1;
        self.written = end;
        self.assert_order();
        number
    }

    /// Every byte of the write is durable. True when the durable prefix grew.
    pub fn complete(&mut self, number: WriteNo) -> bool {
        assert!((self.oldest..self.next).contains(&number.0), "write {} is not in flight", number.0);
        let write = &mut self.window[number.slot()];
        assert!(!write.complete, "write {} completed twice", number.0);
        write.complete = true;
        self.in_flight -= 1;
        let before = self.flushed;
        while self.oldest < self.next && self.window[WriteNo(self.oldest).slot()].complete {
            self.flushed = self.window[WriteNo(self.oldest).slot()].end;
            self.oldest += 1;
        }
        self.assert_order();
        self.flushed > before
    }

    /// What ends at `end` has been taken for applying.
    pub fn apply(&mut self, end: Lsn) {
        assert!(end >= self.applied);
        self.applied = end;
        self.assert_order();
    }

    /// The log ends at `to` from now on. Only when nothing is in flight.
    pub fn truncate(&mut self, to: Lsn) {
        assert!(self.in_flight == 0 && self.oldest == self.next && to <= self.sealed);
        for stage in [&mut self.sealed, &mut self.written, &mut self.flushed, &mut self.applied] {
            *stage = to.min(*stage);
        }
        self.assert_order();
    }

    /// Taken by whoever applies.
    pub fn applied(&self) -> Lsn {
        self.applied
    }

    /// End of the contiguous durable prefix.
    pub fn flushed(&self) -> Lsn {
        self.flushed
    }

    /// End of what was submitted.
    pub fn written(&self) -> Lsn {
        self.written
    }

    /// End of the last whole frame.
    pub fn sealed(&self) -> Lsn {
        self.sealed
    }

    /// Writes submitted and not complete.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// The most writes in flight.
    pub fn depth(&self) -> usize {
        self.depth
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durable_is_the_contiguous_prefix_in_any_order() {
        let orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
        for order in orders {
            let mut commit = Commit::new(Lsn(100), 3);
            let ends = [Lsn(110), Lsn(130), Lsn(160)];
            let mut writes = Vec::new();
            for end in ends {
                commit.seal(end);
                writes.push(commit.submit(end));
            }
            assert!(!commit.can_submit());
            let mut done = [false; 3];
            for index in order {
                commit.complete(writes[index]);
                done[index] = true;
                let prefix = done.iter().take_while(|d| **d).count();
                let expected = if prefix == 0 { Lsn(100) } else { ends[prefix - 1] };
                assert_eq!(commit.flushed(), expected, "{order:?}");
            }
            assert_eq!(commit.in_flight(), 0);
        }
    }

    #[test]
    fn slow_write_does_not_idle_the_disk() {
        let mut commit = Commit::new(Lsn::ZERO, 2);
        commit.seal(Lsn(1000));
        let slow = commit.submit(Lsn(1));
        let mut at = 1;
        while commit.can_submit() {
            at += 1;
            let write = commit.submit(Lsn(at));
            assert!(!commit.complete(write));
        }
        assert_eq!(at as usize, WINDOW_WRITES);
        assert_eq!(commit.flushed(), Lsn::ZERO);
        assert!(commit.complete(slow));
        assert_eq!(commit.flushed(), Lsn(at));
        assert!(commit.can_submit());
    }

    #[test]
    fn truncation_takes_every_stage_back() {
        let mut commit = Commit::new(Lsn::ZERO, 1);
        commit.seal(Lsn(10));
        let write = commit.submit(Lsn(10));
        commit.complete(write);
        commit.apply(Lsn(10));
        commit.truncate(Lsn(4));
        assert_eq!([commit.applied(), commit.flushed(), commit.written(), commit.sealed()], [Lsn(4); 4]);
    }

    #[test]
    #[should_panic(expected = "completed twice")]
    fn a_write_completes_once() {
        let mut commit = Commit::new(Lsn::ZERO, 2);
        commit.seal(Lsn(2));
        commit.submit(Lsn(1));
        let second = commit.submit(Lsn(2));
        commit.complete(second);
        commit.complete(second);
    }
}
