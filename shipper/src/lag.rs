//! Lag in time. A timeline remembers when which part of the log was sealed; the age of a replica's first missing byte
//! is its lag. So the lag is zero on an idle log and grows on a stalled replica even when no acknowledgement comes.
//! Core: `now` comes in; called by the shipper once a turn and for each status row.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use walferry_engine::lsn::Lsn;

/// Samples that are kept. When they are used up, neighbours among the older half are merged: the lag of a replica
/// far behind is told with less resolution, never less than its due.
const SAMPLES_MAX: usize = 8192;
/// Growth of the log within this time is one sample.
const RESOLUTION: Duration = Duration::from_micros(100);

/// Part of the log.
#[derive(Clone, Copy, Debug)]
struct Sample {
    /// Where the part ends; it starts where the sample before ends.
    end: Lsn,
    /// When its first byte was seen.
    since: Instant,
}

/// When which part of the log was sealed.
#[derive(Clone, Debug, Default)]
pub struct Timeline {
    /// Ascending in both fields; `len() <= SAMPLES_MAX`.
    samples: VecDeque<Sample>,
}

impl Timeline {
    /// The log ends at `end` now.
    pub fn record(&mut self, end: Lsn, now: Instant) {
        if let Some(last) = self.samples.back_mut() {
            if end <= last.end {
                return;
            }
            if now.saturating_duration_since(last.since) < RESOLUTION {
                last.end = end;
                return;
            }
        }
        if self.samples.len() == SAMPLES_MAX {
            self.thin();
        }
        self.samples.push_back(Sample { end, since: now });
    }

    /// For how long the first byte at or after `lsn` has been in the log; zero when there is none.
    pub fn age(&self, lsn: Lsn, now: Instant) -> Duration {
        let first = self.samples.partition_point(|sample| sample.end <= lsn);
        self.samples.get(first).map_or(Duration::ZERO, |sample| now.saturating_duration_since(sample.since))
    }

    /// Nobody will ask for anything before `lsn` any more.
    pub fn forget_before(&mut self, lsn: Lsn) {
        // One sample is kept, so that the end of the log stays known.
        while self.samples.len() > 1 && self.samples[0].end <= lsn {
            self.samples.pop_front();
        }
    }

    fn thin(&mut self) {
        let half = SAMPLES_MAX / 2;
        let merged = (0..half).step_by(2).map(|index| {
            let (first, second) = (self.samples[index], self.samples[index + 1]);
            Sample { end: second.end, since: first.since }
        });
        self.samples = merged.chain(self.samples.range(half..).copied()).collect();
    }
}

/// How far behind a replica is, in bytes and in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lag {
    /// Bytes of the leader's log that it lacks.
    pub bytes: u64,
    /// For how long the first of them has been in the leader's log.
    pub time: Duration,
}

impl Lag {
    /// The lag of a replica at `position`, when the log ends at `end`.
    pub fn new(timeline: &Timeline, position: Lsn, end: Lsn, now: Instant) -> Lag {
        Lag { bytes: end.since(position), time: timeline.age(position, now) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn lag_is_zero_on_an_idle_log_and_grows_on_a_stalled_replica() {
        let start = Instant::now();
        let mut timeline = Timeline::default();
        timeline.record(Lsn(100), start);
        timeline.record(Lsn(200), start + MS * 10);
        timeline.record(Lsn(200), start + MS * 500);
        let table = [
            (200, 900, 0, 0),
            (199, 900, 1, 890),
            (150, 900, 50, 890),
            (100, 900, 100, 890),
            (99, 900, 101, 900),
            (0, 900, 200, 900),
            (0, 5000, 200, 5000),
        ];
        for (position, now_ms, bytes, time_ms) in table {
            let now = start + MS * now_ms;
            let expected = Lag { bytes, time: MS * time_ms };
            assert_eq!(Lag::new(&timeline, Lsn(position), Lsn(200), now), expected, "at {position}");
        }
    }

    #[test]
    fn bytes_of_one_moment_share_the_oldest_sample() {
        let start = Instant::now();
        let mut timeline = Timeline::default();
        for step in 0..10u64 {
            timeline.record(Lsn(step + 1), start + Duration::from_micros(step * 9));
        }
        assert_eq!(timeline.samples.len(), 1);
        assert_eq!(timeline.age(Lsn(9), start + MS), MS);
    }

    #[test]
    fn a_full_timeline_loses_resolution_and_never_understates() {
        let start = Instant::now();
        let mut timeline = Timeline::default();
        let count = SAMPLES_MAX as u64 * 3;
        for step in 0..count {
            timeline.record(Lsn(step + 1), start + MS * step as u32);
            assert!(timeline.samples.len() <= SAMPLES_MAX);
        }
        let now = start + MS * count as u32;
        for position in (0..count).step_by(97) {
            let due = MS * (count - position) as u32;
            let age = timeline.age(Lsn(position), now);
            assert!(age >= due && age <= due * 2 + MS * 8, "{position}: {age:?} for {due:?}");
        }
        timeline.forget_before(Lsn(count));
        assert_eq!((timeline.samples.len(), timeline.age(Lsn(count), now)), (1, Duration::ZERO));
    }
}
