//! How old a replica's state may be, without comparing clocks. A core: the link tells what came and what is applied.
//!
//! ```text
//! replica            leader
//!   Ack, stamped s  ─────>        everything that was durable on the leader at s ends at or before e,
//!          <─────  Heartbeat      the end of its log when it sends this: e, and s as it came
//!   applied >= e: the state is what the leader's readers saw at s, or newer
//! ```
//!
//! The leader returns a stamp only while it holds its lease, checked after the stamp came: so at `s` nobody else led.

use std::collections::VecDeque;
use std::time::Instant;

use walferry_engine::lsn::Lsn;

/// Echoes that are not applied yet. Of more, every other one is forgotten: the state is then called a little older than it is.
const ECHOES_MAX: usize = 256;

/// How fresh the state is.
#[derive(Clone, Debug, Default)]
pub struct Freshness {
    as_of: Option<Instant>,
    /// The leader's end and the stamp that came back with it, both ascending; none is applied.
    coming: VecDeque<(Lsn, Instant)>,
}

impl Freshness {
    /// Starts with what an earlier link knew.
    pub fn new(as_of: Option<Instant>) -> Freshness {
        Freshness { as_of, coming: VecDeque::new() }
    }

    /// The state is as fresh as the leader's was then; `None` when that is not known.
    pub fn as_of(&self) -> Option<Instant> {
        self.as_of
    }

    /// The leader's log ended at `end` after it had received what was stamped at `stamp`.
    pub fn handle_echo(&mut self, end: Lsn, stamp: Instant) {
        if self.coming.back().is_some_and(|&(last_end, last_stamp)| last_end > end || last_stamp >= stamp) {
            return;
        }
        if self.coming.len() >= ECHOES_MAX {
            let mut keep = false;
            self.coming.retain(|_| {
                keep = !keep;
                keep
            });
        }
        self.coming.push_back((end, stamp));
    }

    /// The state holds everything up to `applied`.
    pub fn handle_applied(&mut self, applied: Lsn) {
        while let Some(&(end, stamp)) = self.coming.front().filter(|(end, _)| *end <= applied) {
            debug_assert!(end <= applied);
            self.as_of = self.as_of.max(Some(stamp));
            self.coming.pop_front();
        }
    }

    /// Another link: what the last one had announced may never come. What is applied stays as fresh as it was.
    pub fn handle_connect(&mut self) {
        self.coming.clear();
    }

    /// The state went back to what another leader has.
    pub fn handle_rollback(&mut self) {
        *self = Freshness::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_state_is_as_fresh_as_the_newest_echo_that_is_applied() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut fresh = Freshness::default();
        fresh.handle_applied(Lsn(100));
        assert_eq!(fresh.as_of(), None, "nothing came back yet");
        fresh.handle_echo(Lsn(100), at(1));
        fresh.handle_applied(Lsn(100));
        assert_eq!(fresh.as_of(), Some(at(1)));
        // An idle log: the same end again and again is news of no lag.
        fresh.handle_echo(Lsn(100), at(2));
        fresh.handle_applied(Lsn(100));
        assert_eq!(fresh.as_of(), Some(at(2)));
        fresh.handle_echo(Lsn(200), at(3));
        fresh.handle_echo(Lsn(300), at(4));
        fresh.handle_echo(Lsn(400), at(4));
        fresh.handle_applied(Lsn(299));
        assert_eq!(fresh.as_of(), Some(at(3)));
        fresh.handle_connect();
        fresh.handle_applied(Lsn(300));
        assert_eq!(fresh.as_of(), Some(at(3)), "what another leader's log holds there is not what was announced");
        fresh.handle_rollback();
        assert_eq!(fresh.as_of(), None);
    }

    #[test]
    fn echoes_of_a_lagging_replica_are_bounded() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let (mut fresh, lag_ms) = (Freshness::default(), 10_000);
        for ms in 0..60_000_u64 {
            fresh.handle_echo(Lsn(ms), at(ms));
            fresh.handle_applied(Lsn(ms.saturating_sub(lag_ms)));
            assert!(fresh.coming.len() <= ECHOES_MAX);
            let Some(as_of) = fresh.as_of().filter(|_| ms > 2 * lag_ms) else { continue };
            let age = at(ms) - as_of;
            assert!(age >= Duration::from_millis(lag_ms), "never fresher than it is: {age:?}");
            assert!(age < Duration::from_millis(lag_ms * 2), "and not called much older: {age:?}");
        }
    }
}
