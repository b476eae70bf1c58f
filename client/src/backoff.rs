//! Pauses between attempts: each twice as long as the one before, up to a bound, and of uneven length, so that the sessions that
//! lost the same leader do not all come back at once.

use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

/// The first pause; a change of leader may take no longer.
const PAUSE_MIN: Duration = Duration::from_millis(5);
/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_millis(200);

/// The pauses of one call, and when it gives up.
#[derive(Debug)]
pub struct Backoff {
    next: Duration,
    deadline: Instant,
}

impl Backoff {
    /// Attempts until `give_up_after` has passed.
    pub fn new(give_up_after: Duration) -> Backoff {
        Backoff { next: PAUSE_MIN, deadline: Instant::now() + give_up_after }
    }

    /// Sleeps before the next attempt; false when there is no time for one.
    pub fn pause(&mut self) -> bool {
        let half = self.next / 2;
        let uneven = half + half.mul_f64(f64::from(RandomState::new().hash_one(()) as u32) / f64::from(u32::MAX));
        self.next = (self.next * 2).min(PAUSE_MAX);
        if self.is_over() || Instant::now() + uneven > self.deadline {
            return false;
        }
        std::thread::sleep(uneven);
        true
    }

    /// True once it is time to give up.
    pub fn is_over(&self) -> bool {
        Instant::now() >= self.deadline
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_end() {
        let began = Instant::now();
        let mut backoff = Backoff::new(Duration::from_millis(60));
        let pauses = std::iter::from_fn(|| backoff.pause().then_some(())).count();
        assert!((2..=12).contains(&pauses), "{pauses} pauses of 2.5 ms and more");
        assert!(began.elapsed() >= Duration::from_millis(7), "the first two alone last so long");
        assert!(!Backoff::new(Duration::ZERO).pause(), "no time is no attempt");
    }
}
