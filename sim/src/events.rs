//! What is going to happen, in the order of its time. Knows nothing of what it holds: an event is moved in and out once, however
//! many others are waiting.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// When an event happens; of those of one time the one that was put in first comes first.
pub type When = (u64, u64);

/// Events by their time.
pub struct Events<T> {
    order: BinaryHeap<Reverse<(When, usize)>>,
    /// The events themselves, wherever there was a place.
    slots: Vec<Option<T>>,
    free: Vec<usize>,
}

impl<T> Default for Events<T> {
    fn default() -> Events<T> {
        Events { order: BinaryHeap::new(), slots: Vec::new(), free: Vec::new() }
    }
}

impl<T> Events<T> {
    pub fn insert(&mut self, when: When, event: T) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.slots[slot] = Some(event);
        self.order.push(Reverse((when, slot)));
    }

    pub fn pop_first(&mut self) -> Option<(When, T)> {
        let Reverse((when, slot)) = self.order.pop()?;
        self.free.push(slot);
        Some((when, self.slots[slot].take().expect("an event for each place in the order")))
    }
}
