//! One direction of an emulated link: what enters at one time leaves at another, in order, or not at all.
//! A core: driven by the proxy's and the tun link's thread with their clock; knows neither sockets nor packets.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};

use super::shape::Way;

/// What one direction holds at most, on its way and waiting; a second of 512 Mbit.
pub const HELD_BYTES_MAX: u64 = 64 << 20;

/// What became of an item that was offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The item is queued and leaves after its delay.
    Queued,
    /// The link lost it.
    Lost,
    /// The link lost it, and it leaves when it was sent again.
    Late,
    /// The buffer before the bottleneck is full.
    Overflowed,
}

/// What a loss does. A packet is gone; a byte of a stream cannot be, it comes later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnLoss {
    /// The item is gone.
    Drop,
    /// The item, and what follows it, waits so much longer: the time of a retransmission.
    Delay(Duration),
}

#[derive(Debug)]
struct Item<T> {
    due: Instant,
    bytes: u64,
    content: T,
}

/// A queue of what is on its way. Invariant: `due` never falls from one item to the next.
#[derive(Debug)]
pub struct DelayLine<T> {
    way: Way,
    on_loss: OnLoss,
    items: VecDeque<Item<T>>,
    held_bytes: u64,
    /// The bottleneck has sent everything that was offered so far.
    idle_from: Instant,
    random: Xoshiro256PlusPlus,
}

impl<T> DelayLine<T> {
    /// An empty line; nothing leaves before `open_from` plus the delay. Equal seeds lose the same items.
    pub fn new(way: Way, on_loss: OnLoss, open_from: Instant, seed: u64) -> DelayLine<T> {
        let random = Xoshiro256PlusPlus::seed_from_u64(seed);
        DelayLine { way, on_loss, items: VecDeque::new(), held_bytes: 0, idle_from: open_from, random }
    }

    /// From now on items are treated so; those on their way keep their time.
    pub fn set_way(&mut self, way: Way, on_loss: OnLoss) {
        (self.way, self.on_loss) = (way, on_loss);
    }

    fn sending_time(&self, bytes: u64) -> Duration {
        let nanos = |rate: u64| u128::from(bytes) * 8 * 1_000_000_000 / u128::from(rate);
        self.way.rate.map_or(Duration::ZERO, |rate| Duration::from_nanos(nanos(rate.0) as u64))
    }

    /// Nothing more may enter before this; none: it may now.
    pub fn full_until(&self, now: Instant) -> Option<Instant> {
        if self.held_bytes >= HELD_BYTES_MAX {
            return self.items.front().map(|item| item.due);
        }
        let waiting = self.sending_time(self.way.buffer_bytes);
        // Without a rate nothing waits before the bottleneck, and neither does what was held back until `open_from`.
        let place_from = self.idle_from.checked_sub(waiting).filter(|_| self.way.rate.is_some())?;
        (place_from > now).then_some(place_from)
    }

    /// Lets an item of `bytes` enter.
    pub fn offer(&mut self, now: Instant, content: T, bytes: u64) -> Fate {
        if self.full_until(now).is_some() {
            return Fate::Overflowed;
        }
        self.push(now, content, bytes)
    }

    /// Lets an item enter whether the queue is full or not: the end of a stream has no size and has to arrive.
    pub fn push(&mut self, now: Instant, content: T, bytes: u64) -> Fate {
        self.idle_from = self.idle_from.max(now) + self.sending_time(bytes);
        let mut due = self.idle_from + self.way.delay;
        if !self.way.jitter.is_zero() {
            let jitter = self.way.jitter.mul_f64(self.random.random::<f64>());
            due = if self.random.random() { due + jitter } else { due - jitter };
        }
        let lost = self.way.loss > 0.0 && self.random.random::<f64>() < self.way.loss;
        match self.on_loss {
            OnLoss::Drop if lost => return Fate::Lost,
            OnLoss::Delay(time) if lost => due += time,
            _ => {}
        }
        if let Some(last) = self.items.back() {
            due = due.max(last.due);
        }
        self.items.push_back(Item { due, bytes, content });
        self.held_bytes += bytes;
        if lost { Fate::Late } else { Fate::Queued }
    }

    /// When the next item leaves.
    pub fn next_due(&self) -> Option<Instant> {
        self.items.front().map(|item| item.due)
    }

    /// The next item, if its time has come; it stays until `pop`.
    pub fn due(&mut self, now: Instant) -> Option<&mut T> {
        self.items.front_mut().filter(|item| item.due <= now).map(|item| &mut item.content)
    }

    /// Takes the next item out.
    pub fn pop(&mut self) -> Option<T> {
        let item = self.items.pop_front()?;
        self.held_bytes -= item.bytes;
        Some(item.content)
    }

    /// Loses everything that is on its way; how many items that were.
    pub fn clear(&mut self) -> u64 {
        let lost = self.items.len() as u64;
        self.items.clear();
        self.held_bytes = 0;
        lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::shape::{Direction, Shape};

    fn way(assignments: &str) -> Way {
        let mut shape = Shape::with_rtt(Duration::ZERO);
        assignments.split(' ').for_each(|assignment| shape.assign(assignment).unwrap());
        shape.way(Direction::Out)
    }

    fn line(assignments: &str) -> (DelayLine<u32>, Instant) {
        let now = Instant::now();
        (DelayLine::new(way(assignments), OnLoss::Drop, now, 1), now)
    }

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn an_item_leaves_after_the_delay_and_not_before() {
        let (mut line, now) = line("rtt=20ms");
        assert_eq!(line.offer(now, 7, 1500), Fate::Queued);
        assert_eq!(line.next_due(), Some(now + 10 * MS));
        assert_eq!(line.due(now + 9 * MS), None);
        assert_eq!(line.due(now + 10 * MS), Some(&mut 7));
        assert_eq!((line.pop(), line.pop()), (Some(7), None));
    }

    #[test]
    fn a_rate_spreads_what_enters_at_once() {
        // 1500 bytes take 12 ms at 1 Mbit.
        let (mut line, now) = line("rtt=20ms rate=1mbit");
        for (number, due_ms) in [(1, 22), (2, 34), (3, 46)] {
            line.offer(now, number, 1500);
            assert_eq!(line.items.back().unwrap().due, now + due_ms * MS);
        }
        // After a pause the bottleneck owes nothing.
        line.offer(now + 1000 * MS, 4, 1500);
        assert_eq!(line.items.back().unwrap().due, now + 1022 * MS);
    }

    #[test]
    fn a_full_buffer_refuses_and_says_until_when() {
        let (mut line, now) = line("rtt=2ms rate=1mbit buffer=3000");
        let fates: Vec<Fate> = (0..5).map(|number| line.offer(now, number, 1500)).collect();
        assert_eq!(fates[..3], [Fate::Queued; 3]);
        assert_eq!(fates[3..], [Fate::Overflowed; 2]);
        let from = line.full_until(now).unwrap();
        assert_eq!(from, now + 12 * MS);
        assert_eq!(line.offer(from, 9, 1500), Fate::Queued);
    }

    #[test]
    fn without_a_rate_the_bound_is_what_is_held() {
        let (mut line, now) = line("rtt=2ms");
        assert_eq!(line.offer(now, 1, HELD_BYTES_MAX), Fate::Queued);
        assert_eq!(line.offer(now, 2, 1), Fate::Overflowed);
        assert_eq!(line.full_until(now), Some(now + MS));
        line.pop();
        assert_eq!(line.offer(now, 3, 1), Fate::Queued);
    }

    #[test]
    fn jitter_stays_within_its_bounds_and_keeps_the_order() {
        let (mut line, now) = line("rtt=20ms jitter=4ms");
        let mut seen = (now + 20 * MS, now);
        for number in 0..1000 {
            line.offer(now, number, 100);
            line.set_way(way("rtt=20ms jitter=4ms"), OnLoss::Drop);
        }
        let mut last = now;
        while let Some(due) = line.next_due() {
            assert!(due >= last, "a later item is never due earlier");
            seen = (seen.0.min(due), seen.1.max(due));
            last = due;
            line.pop();
        }
        assert!(seen.0 >= now + 6 * MS && seen.1 <= now + 14 * MS);
        assert!(seen.1 > now + 13 * MS, "a thousand draws come near the bound");
    }

    #[test]
    fn packets_are_lost_at_the_asked_share_and_streams_wait_instead() {
        let (mut packets, now) = line("rtt=2ms loss=10%");
        let lost = (0..10_000).filter(|number| packets.offer(now, *number, 1) == Fate::Lost).count();
        assert!((900..1100).contains(&lost), "{lost} of 10000 at 10 %");

        let mut stream = DelayLine::new(way("rtt=2ms loss=10%"), OnLoss::Delay(2 * MS), now, 1);
        let late = (0..1000).filter(|number| stream.offer(now, *number, 1) == Fate::Late).count();
        assert!((70..130).contains(&late), "{late} of 1000 at 10 %");
        assert_eq!(stream.items.back().unwrap().due, now + 3 * MS);
        assert_eq!(stream.items.len(), 1000);
    }

    #[test]
    fn nothing_leaves_before_the_line_is_open() {
        let now = Instant::now();
        let mut line = DelayLine::new(way("rtt=20ms"), OnLoss::Drop, now + 20 * MS, 1);
        line.offer(now, 1, 1);
        assert_eq!(line.next_due(), Some(now + 30 * MS));
    }
}
