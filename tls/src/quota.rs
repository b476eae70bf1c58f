//! How often something is said at most: whoever connects without being known must not be able to fill a log.

use std::time::{Duration, Instant};

/// The time that a quota is for.
const PERIOD: Duration = Duration::from_secs(10);
/// How often within it.
const PER_PERIOD_MAX: u32 = 5;

/// Counts what is said.
#[derive(Debug)]
pub struct Quota {
    since: Instant,
    said: u32,
}

impl Quota {
    /// A quota of which nothing is used.
    pub fn new(now: Instant) -> Quota {
        Quota { since: now, said: 0 }
    }

    /// True when it may be said once more.
    pub fn take(&mut self, now: Instant) -> bool {
        if now.saturating_duration_since(self.since) >= PERIOD {
            *self = Quota::new(now);
        }
        self.said += 1;
        self.said <= PER_PERIOD_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_period_has_its_share_and_no_more() {
        let begun = Instant::now();
        let mut quota = Quota::new(begun);
        assert_eq!((0..20).filter(|_| quota.take(begun)).count(), PER_PERIOD_MAX as usize);
        assert!(quota.take(begun + PERIOD));
    }
}
