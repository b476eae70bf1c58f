//! What clients were promised, and whether a recovered node keeps it. Core: acknowledgements come in with their moment, the
//! values of a recovered node come in as they were read.
//!
//! Each writer sends 1, 2, 3, ... and value `i` goes to the key `i mod SLOTS`, the next one only after the one before was
//! acknowledged. So a recovered node holds, for each writer, exactly what the first `n` of its writes leave, and `n` is at
//! least what was acknowledged before the cut.

use std::collections::BTreeMap;
use std::fmt;

use crate::disk::Moment;

/// Keys of each writer.
pub const SLOTS: u64 = 64;
/// A writer has sent at most so many values that nobody has seen acknowledged: one is on its way, and a few lines that tell of
/// those before may have been in the machine that was cut.
const AHEAD_MAX: u64 = 64;

/// What a recovered node holds of one writer: the value of each slot that has one.
pub type Held = BTreeMap<u64, u64>;

/// A promise that was broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Broken {
    /// Acknowledged values are missing.
    Lost {
        /// Whose.
        writer: usize,
        /// The newest that is there.
        held: u64,
        /// The newest that was acknowledged before the cut.
        acknowledged: u64,
    },
    /// A slot does not hold what a prefix of the writes leaves there.
    Hole {
        /// Whose.
        writer: usize,
        /// Which.
        slot: u64,
        /// What it holds.
        held: Option<u64>,
        /// What it should hold.
        expected: Option<u64>,
    },
    /// A value that nobody had sent.
    Invented {
        /// Whose.
        writer: usize,
        /// Which.
        held: u64,
    },
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Broken::Lost { writer, held, acknowledged } => {
                write!(f, "writer {writer}: {acknowledged} was acknowledged, the node holds only up to {held}")
            }
            Broken::Hole { writer, slot, held, expected } => {
                write!(f, "writer {writer}: slot {slot} holds {held:?} in the place of {expected:?}")
            }
            Broken::Invented { writer, held } => write!(f, "writer {writer}: holds {held}, which was never sent"),
        }
    }
}

/// Every acknowledgement, by writer.
#[derive(Clone, Debug, Default)]
pub struct Promises {
    /// When value `i + 1` of each writer was known to be acknowledged; grows along each list.
    acknowledged: Vec<Vec<Moment>>,
}

impl Promises {
    /// `value` of `writer` was acknowledged. An error when it is not the next one: a line is missing.
    pub fn acknowledge(&mut self, writer: usize, value: u64, at: Moment) -> Result<(), String> {
        if self.acknowledged.len() <= writer {
            self.acknowledged.resize(writer + 1, Vec::new());
        }
        let known = &mut self.acknowledged[writer];
        if value != known.len() as u64 + 1 {
            return Err(format!("writer {writer} tells of {value} after {}", known.len()));
        }
        known.push(at);
        Ok(())
    }

    /// How many values of a writer were acknowledged by `at`.
    pub fn count(&self, writer: usize, at: Moment) -> u64 {
        self.acknowledged.get(writer).map_or(0, |known| known.partition_point(|moment| *moment <= at) as u64)
    }

    /// The first acknowledgement at `at` or later.
    pub fn next_after(&self, at: Moment) -> Option<Moment> {
        let next = |known: &Vec<Moment>| known.get(known.partition_point(|moment| *moment < at)).copied();
        self.acknowledged.iter().filter_map(next).min()
    }

    /// How many values of all writers were acknowledged by `at`.
    pub fn total(&self, at: Moment) -> u64 {
        (0..self.acknowledged.len()).map(|writer| self.count(writer, at)).sum()
    }

    /// What is wrong with a node recovered from a cut at `at`.
    pub fn broken(&self, at: Moment, held: &[Held]) -> Vec<Broken> {
        let mut broken = Vec::new();
        for writer in 0..self.acknowledged.len().max(held.len()) {
            let empty = Held::new();
            let held = held.get(writer).unwrap_or(&empty);
            let newest = held.values().copied().max().unwrap_or(0);
            let acknowledged = self.count(writer, at);
            if newest < acknowledged {
                broken.push(Broken::Lost { writer, held: newest, acknowledged });
            }
            if newest > self.count(writer, Moment(u64::MAX)) + AHEAD_MAX {
                broken.push(Broken::Invented { writer, held: newest });
            }
            for slot in 0..SLOTS {
                let (found, expected) = (held.get(&slot).copied(), newest_in(slot, newest));
                if found != expected {
                    broken.push(Broken::Hole { writer, slot, held: found, expected });
                }
            }
        }
        broken
    }
}

/// The newest of the values `1..=newest` that goes to `slot`.
fn newest_in(slot: u64, newest: u64) -> Option<u64> {
    let back = (newest + SLOTS - slot) % SLOTS;
    newest.checked_sub(back).filter(|value| *value > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(newest: u64) -> Held {
        (1..=newest).map(|value| (value % SLOTS, value)).collect()
    }

    fn promises(count: u64) -> Promises {
        let mut promises = Promises::default();
        (1..=count).for_each(|value| promises.acknowledge(0, value, Moment(value * 10)).expect("in order"));
        promises
    }

    #[test]
    fn a_prefix_that_holds_everything_acknowledged_is_right() {
        let promises = promises(200);
        for held in 100..=202 {
            assert_eq!(promises.broken(Moment(1000), &[after(held)]), [], "{held}");
        }
        assert_eq!(promises.broken(Moment(9), &[]), [], "nothing was acknowledged");
        let next = [9, 10, 11, 2000, 2001].map(|at| promises.next_after(Moment(at)).map(|moment| moment.0));
        assert_eq!(next, [Some(10), Some(10), Some(20), Some(2000), None]);
    }

    #[test]
    fn what_is_lost_old_or_invented_is_named() {
        let promises = promises(200);
        let lost = Broken::Lost { writer: 0, held: 99, acknowledged: 100 };
        assert_eq!(promises.broken(Moment(1000), &[after(99)]), [lost]);
        let mut old = after(150);
        old.insert(5, 5);
        let hole = Broken::Hole { writer: 0, slot: 5, held: Some(5), expected: Some(133) };
        assert_eq!(promises.broken(Moment(1000), &[old]), [hole]);
        assert_eq!(promises.broken(Moment(1000), &[after(265)]), [Broken::Invented { writer: 0, held: 265 }]);
        assert!(matches!(promises.broken(Moment(10), &[])[..], [Broken::Lost { acknowledged: 1, .. }]));
    }

    #[test]
    fn a_line_that_is_missing_is_an_error() {
        assert_eq!(promises(3).acknowledge(0, 5, Moment(99)), Err("writer 0 tells of 5 after 3".to_owned()));
    }
}
