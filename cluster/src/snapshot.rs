//! What both ends of a snapshot share: the sizes, and how far a copy is. A snapshot is the store of a leader as of one LSN, as
//! a file; a replica takes it whose place in the leader's log is gone. Counted by the threads that move it, read by whoever
//! shows it. Knows no file and no socket.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A copy travels and is verified in pieces of this size; the last one may be shorter.
pub const PIECE_BYTES: usize = 1 << 20;
/// No store is larger: more than a petabyte is a damaged length.
pub const SNAPSHOT_BYTES_MAX: u64 = 1 << 50;

/// How many pieces a copy of `bytes` has.
pub fn pieces(bytes: u64) -> u64 {
    bytes.div_ceil(PIECE_BYTES as u64)
}

/// The length of the piece that begins at `offset` of a copy of `bytes`.
pub fn piece_bytes(offset: u64, bytes: u64) -> usize {
    (bytes - offset).min(PIECE_BYTES as u64) as usize
}

/// Spreads bytes over time, so that a copy leaves the disk and the network to the commits. A core: time comes in as an argument.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// 0: no limit.
    bytes_per_second: u64,
    /// When the next byte is due.
    due: Option<Instant>,
}

impl Pace {
    /// At most so many bytes a second; 0 for no limit.
    pub fn new(bytes_per_second: u64) -> Pace {
        Pace { bytes_per_second, due: None }
    }

    /// From now on so many bytes a second; 0 for no limit.
    pub fn set_rate(&mut self, bytes_per_second: u64) {
        if self.bytes_per_second != bytes_per_second {
            *self = Pace::new(bytes_per_second);
        }
    }

    /// What is moved at once: a twentieth of a second's worth, so that no burst is long, within sensible bounds.
    pub fn step_bytes(&self) -> usize {
        let step = if self.bytes_per_second == 0 { u64::MAX } else { self.bytes_per_second / 20 };
        step.clamp(4 << 10, 256 << 10) as usize
    }

    /// How long to wait before `bytes` are moved. Time that was not used is not made up for.
    pub fn wait(&mut self, bytes: usize, now: Instant) -> Duration {
        if self.bytes_per_second == 0 {
            return Duration::ZERO;
        }
        let due = self.due.unwrap_or(now).max(now);
        self.due = Some(due + Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64));
        due - now
    }
}

/// What a copy is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum CopyPhase {
    /// The leader writes the file.
    Preparing = 0,
    /// Its pieces are being sent.
    Copying = 1,
    /// The replica reads it back.
    Verifying = 2,
}

/// How far a copy is: written by one thread, read by any.
#[derive(Debug, Default)]
pub struct CopyProgress {
    phase: AtomicU8,
    done: AtomicU64,
    total: AtomicU64,
    /// Of `done`, what was there before this attempt.
    kept: AtomicU64,
    over: AtomicBool,
}

impl CopyProgress {
    /// The copy is in `phase` now, at `done` of `total` bytes.
    pub fn set(&self, phase: CopyPhase, done: u64, total: u64) {
        self.total.store(total, Ordering::Relaxed);
        self.done.store(done, Ordering::Relaxed);
        self.phase.store(phase as u8, Ordering::Release);
    }

    /// The attempt goes on with `bytes` that an earlier one brought.
    pub fn keep(&self, bytes: u64) {
        self.kept.store(bytes, Ordering::Relaxed);
    }

    /// What earlier attempts had brought, bytes.
    pub fn kept(&self) -> u64 {
        self.kept.load(Ordering::Relaxed)
    }

    /// What it is doing.
    pub fn phase(&self) -> CopyPhase {
        match self.phase.load(Ordering::Acquire) {
            0 => CopyPhase::Preparing,
            1 => CopyPhase::Copying,
            _ => CopyPhase::Verifying,
        }
    }

    /// Bytes done, of how many; a total of 0 is not known yet.
    pub fn bytes(&self) -> (u64, u64) {
        let total = self.total.load(Ordering::Relaxed);
        (self.done.load(Ordering::Relaxed).min(total), total)
    }

    /// Whole percent.
    pub fn percent(&self) -> u8 {
        let (done, total) = self.bytes();
        if total == 0 { 0 } else { (u128::from(done) * 100 / u128::from(total)) as u8 }
    }

    /// Nothing moves it any more.
    pub fn end(&self) {
        self.over.store(true, Ordering::Release);
    }

    /// True once nothing moves it any more.
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }
}

impl fmt::Display for CopyProgress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.phase() {
            CopyPhase::Preparing => write!(f, "snapshot, preparing {} %", self.percent()),
            CopyPhase::Copying => write!(f, "snapshot {} %", self.percent()),
            CopyPhase::Verifying => write!(f, "snapshot, verifying {} %", self.percent()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_a_copy_exactly() {
        let piece = PIECE_BYTES as u64;
        for (bytes, count, last) in [(1, 1, 1), (piece, 1, piece), (piece + 1, 2, 1), (3 * piece - 7, 3, piece - 7)] {
            assert_eq!(pieces(bytes), count);
            assert_eq!(piece_bytes((count - 1) * piece, bytes) as u64, last, "{bytes}");
        }
    }

    #[test]
    fn a_pace_is_kept_and_a_pause_is_not_made_up_for() {
        let begun = Instant::now();
        let mut pace = Pace::new(1 << 20);
        let (mut now, mut moved) = (begun, 0);
        for _ in 0..100 {
            now += pace.wait(pace.step_bytes(), now);
            moved += pace.step_bytes();
        }
        let rate = moved as f64 / (now - begun).as_secs_f64();
        assert!((1_000_000.0..1_100_000.0).contains(&rate), "{rate}");
        now += Duration::from_secs(60);
        assert_eq!(pace.wait(1 << 20, now), Duration::ZERO);
        assert_eq!(pace.wait(1, now), Duration::from_secs(1));
        let mut unlimited = Pace::new(0);
        assert_eq!(unlimited.wait(usize::MAX, now) + unlimited.wait(usize::MAX, now), Duration::ZERO);
    }

    #[test]
    fn progress_says_what_it_does_in_words() {
        let progress = CopyProgress::default();
        assert_eq!(progress.to_string(), "snapshot, preparing 0 %");
        progress.set(CopyPhase::Copying, u64::MAX / 2, u64::MAX);
        assert_eq!(progress.to_string(), "snapshot 49 %");
        progress.set(CopyPhase::Verifying, 7, 7);
        assert_eq!((progress.to_string().as_str(), progress.is_over()), ("snapshot, verifying 100 %", false));
    }
}
