//! What a replica acknowledges and when: whenever written, flushed or applied moved and no acknowledgement is on its way. A core:
//! the link gives it positions and time, it gives messages.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use walferry_cluster::message::{Ack, Traced};
use walferry_engine::lsn::Lsn;

/// Receipts that are remembered for the durations; of more the oldest are measured by the next.
const RECEIPTS_MAX: usize = 4096;
/// A heartbeat is echoed with the acknowledgement that what it tells brings, or alone after this: on a path over which packets are
/// rationed a needless one costs a later one a round trip. The echo says how long it was held.
const ECHO_AFTER: Duration = Duration::from_millis(5);
/// Frames that are traced at once; a leader's further wishes are not followed.
const TRACES_MAX: usize = 256;

/// How far the replica is: `applied <= flushed <= written`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reached {
    /// Handed to the disk.
    pub written: Lsn,
    /// Durable.
    pub flushed: Lsn,
    /// Visible to readers.
    pub applied: Lsn,
}

/// The acknowledgements of one connection.
#[derive(Debug)]
pub struct Acks {
    /// What stamps count from.
    origin: Instant,
    told: Option<Reached>,
    told_at: Instant,
    /// `sent_at_us` of the heartbeat to echo, and when it came.
    heartbeat: Option<(u64, Instant)>,
    /// Ends of what was received, with the time; ascending.
    received: VecDeque<(Lsn, Instant)>,
    flushed: VecDeque<(Lsn, Instant)>,
    seen: Reached,
    write: Duration,
    flush: Duration,
    apply: Duration,
    /// Traced frames that are not applied yet, ascending, with the time of their receipt.
    traces: VecDeque<(Traced, Instant)>,
    traced: VecDeque<Traced>,
}

fn micros(duration: Duration) -> u32 {
    u32::try_from(duration.as_micros()).unwrap_or(u32::MAX)
}

impl Acks {
    /// A connection on which nothing was acknowledged yet.
    pub fn new(now: Instant) -> Acks {
        Acks {
            origin: now,
            told: None,
            told_at: now,
            heartbeat: None,
            received: VecDeque::new(),
            flushed: VecDeque::new(),
            seen: Reached::default(),
            write: Duration::ZERO,
            flush: Duration::ZERO,
            apply: Duration::ZERO,
            traces: VecDeque::new(),
            traced: VecDeque::new(),
        }
    }

    /// Frames up to `end` arrived.
    pub fn handle_received(&mut self, end: Lsn, now: Instant) {
        if self.received.len() < RECEIPTS_MAX && self.received.back().is_none_or(|last| last.0 < end) {
            self.received.push_back((end, now));
        }
    }

    /// The leader asks where the time for the frame goes that ends at `end` and has just arrived.
    pub fn trace(&mut self, end: Lsn, now: Instant) {
        if self.traces.len() + self.traced.len() < TRACES_MAX {
            self.traces.push_back((Traced { end, ..Traced::default() }, now));
        }
    }

    /// The next answer to `trace`; it follows the Ack that told of the frame's applying. Its flush durations are zero.
    pub fn poll_traced(&mut self) -> Option<Traced> {
        self.traced.pop_front()
    }

    fn follow_traces(&mut self, reached: Reached, now: Instant) {
        for (traced, received) in &mut self.traces {
            let since = micros(now.saturating_duration_since(*received)).max(1);
            let stages = [
                (reached.written, &mut traced.written_us),
                (reached.flushed, &mut traced.flushed_us),
                (reached.applied, &mut traced.applied_us),
            ];
            for (position, duration) in stages {
                if position >= traced.end && *duration == 0 {
                    *duration = since;
                }
            }
        }
        while let Some((traced, _)) = self.traces.front().filter(|(traced, _)| traced.applied_us > 0) {
            self.traced.push_back(*traced);
            self.traces.pop_front();
        }
    }

    /// When an acknowledgement with this stamp was made: at that time or a little later.
    pub fn stamped_at(&self, stamp_us: u64) -> Instant {
        self.origin + Duration::from_micros(stamp_us.saturating_sub(1))
    }

    /// A heartbeat arrived.
    pub fn handle_heartbeat(&mut self, sent_at_us: u64, now: Instant) {
        self.heartbeat = Some((sent_at_us, now));
    }

    /// The log or the store got further.
    pub fn handle_progress(&mut self, reached: Reached, now: Instant) {
        debug_assert!(reached.applied <= reached.flushed && reached.flushed <= reached.written);
        if reached == self.seen {
            return;
        }
        if reached.written > self.seen.written
            && let Some((_, at)) = self.received.iter().rev().find(|mark| mark.0 <= reached.written)
        {
            self.write = now.saturating_duration_since(*at);
        }
        let mut newest = None;
        while self.received.front().is_some_and(|mark| mark.0 <= reached.flushed) {
            newest = self.received.pop_front();
        }
        if let Some((_, at)) = newest {
            self.flush = now.saturating_duration_since(at);
        }
        if reached.flushed > self.seen.flushed && self.flushed.len() < RECEIPTS_MAX {
            self.flushed.push_back((reached.flushed, now));
        }
        let mut newest = None;
        while self.flushed.front().is_some_and(|mark| mark.0 <= reached.applied) {
            newest = self.flushed.pop_front();
        }
        if let Some((_, at)) = newest {
            self.apply = now.saturating_duration_since(at);
        }
        if !self.traces.is_empty() {
            self.follow_traces(reached, now);
        }
        self.seen = reached;
    }

    /// When a heartbeat has to be echoed.
    pub fn echo_due(&self) -> Option<Instant> {
        self.heartbeat.map(|(_, came)| came + ECHO_AFTER)
    }

    /// The next acknowledgement, if there is something to tell or it is time for a heartbeat.
    pub fn poll(&mut self, interval: Duration, now: Instant) -> Option<Ack> {
        let news = self.told != Some(self.seen) || self.echo_due().is_some_and(|due| now >= due);
        if !news && now.saturating_duration_since(self.told_at) < interval {
            return None;
        }
        let (echo_us, held) = match self.heartbeat.take() {
            Some((sent_at_us, at)) => (sent_at_us, now.saturating_duration_since(at)),
            None => (0, Duration::ZERO),
        };
        self.told = Some(self.seen);
        self.told_at = now;
        Some(Ack {
            written: self.seen.written,
            flushed: self.seen.flushed,
            applied: self.seen.applied,
            echo_us,
            echo_held_us: micros(held),
            write_us: micros(self.write),
            flush_us: micros(self.flush),
            apply_us: micros(self.apply),
            stamp_us: now.saturating_duration_since(self.origin).as_micros() as u64 + 1,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reached(written: u64, flushed: u64, applied: u64) -> Reached {
        Reached { written: Lsn(written), flushed: Lsn(flushed), applied: Lsn(applied) }
    }

    #[test]
    fn every_step_is_told_once_with_its_durations() {
        let start = Instant::now();
        let at = |us| start + Duration::from_micros(us);
        let interval = Duration::from_secs(1);
        let mut acks = Acks::new(start);
        assert!(acks.poll(interval, start).is_some(), "the first tells where the replica is");
        assert_eq!(acks.poll(interval, at(1)), None);
        acks.handle_received(Lsn(4096), at(10));
        acks.handle_progress(reached(4096, 0, 0), at(15));
        let ack = acks.poll(interval, at(15)).unwrap();
        assert_eq!((ack.written, ack.flushed, ack.write_us), (Lsn(4096), Lsn(0), 5));
        acks.handle_progress(reached(4096, 4096, 0), at(110));
        acks.handle_progress(reached(4096, 4096, 4096), at(130));
        let ack = acks.poll(interval, at(130)).unwrap();
        assert_eq!((ack.applied, ack.flush_us, ack.apply_us), (Lsn(4096), 100, 20), "coalesced");
        assert_eq!(acks.poll(interval, at(131)), None);
        assert!(acks.poll(interval, at(1_000_131)).is_some(), "a heartbeat");
    }

    /// BBR lets four packets travel at once while it measures the path: a fifth waits a round trip for the first.
    #[test]
    fn commit_takes_three_acknowledgements_with_its_heartbeat() {
        let start = Instant::now();
        let at = |us| start + Duration::from_micros(us);
        let interval = Duration::from_secs(1);
        let mut acks = Acks::new(start);
        acks.poll(interval, start);
        let mut sent = Vec::new();
        // The frame, the heartbeat that tells that it is durable at the leader, the disk, the store: a look after each.
        acks.handle_received(Lsn(4096), at(10));
        acks.handle_progress(reached(4096, 0, 0), at(10));
        sent.extend(acks.poll(interval, at(10)));
        acks.handle_heartbeat(77, at(900));
        sent.extend(acks.poll(interval, at(900)));
        acks.handle_progress(reached(4096, 4096, 0), at(1000));
        sent.extend(acks.poll(interval, at(1000)));
        acks.handle_progress(reached(4096, 4096, 4096), at(1010));
        sent.extend(acks.poll(interval, at(1010)));
        sent.extend(acks.poll(interval, at(1010) + ECHO_AFTER));
        let told: Vec<_> = sent.iter().map(|ack| (ack.flushed, ack.applied, ack.echo_us)).collect();
        assert_eq!(told, [(Lsn(0), Lsn(0), 0), (Lsn(4096), Lsn(0), 77), (Lsn(4096), Lsn(4096), 0)]);
    }

    #[test]
    fn a_traced_frame_is_told_once_it_is_applied() {
        let start = Instant::now();
        let at = |us| start + Duration::from_micros(us);
        let mut acks = Acks::new(start);
        acks.trace(Lsn(4096), at(10));
        acks.trace(Lsn(8192), at(30));
        acks.handle_progress(reached(8192, 0, 0), at(40));
        acks.handle_progress(reached(8192, 4096, 0), at(110));
        assert_eq!(acks.poll_traced(), None);
        acks.handle_progress(reached(8192, 8192, 4096), at(120));
        let first = acks.poll_traced().unwrap();
        assert_eq!((first.end, first.written_us, first.flushed_us, first.applied_us), (Lsn(4096), 30, 100, 110));
        assert_eq!(acks.poll_traced(), None);
        acks.handle_progress(reached(8192, 8192, 8192), at(125));
        let second = acks.poll_traced().unwrap();
        assert_eq!((second.written_us, second.flushed_us, second.applied_us), (10, 90, 95));
    }

    #[test]
    fn a_heartbeat_is_echoed_once_with_the_time_it_was_held() {
        let start = Instant::now();
        let mut acks = Acks::new(start);
        acks.poll(Duration::from_secs(1), start);
        acks.handle_heartbeat(77, start);
        let due = acks.echo_due().expect("held");
        assert_eq!(acks.poll(Duration::from_secs(1), due - Duration::from_micros(1)), None);
        let ack = acks.poll(Duration::from_secs(1), due).unwrap();
        assert_eq!((ack.echo_us, ack.echo_held_us), (77, ECHO_AFTER.as_micros() as u32));
        assert_eq!(acks.stamped_at(ack.stamp_us), due);
        assert_eq!((acks.poll(Duration::from_secs(1), due), acks.echo_due()), (None, None));
    }
}
