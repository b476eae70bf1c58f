//! Which commits somebody wants to follow through the replicas: the frames that hold them ask for a `Traced`, and what comes
//! back waits here to be fetched. Plain state; `batch` asks it, the shipper fills it.

use std::collections::VecDeque;

use walferry_cluster::member::MemberName;
use walferry_cluster::message::Traced;
use walferry_engine::lsn::Lsn;

/// Commits that are followed at once; of more the oldest are forgotten.
const WANTED_MAX: usize = 256;
/// Answers that wait to be fetched; beyond it newer ones are dropped.
const ANSWERS_MAX: usize = 4096;

/// What is asked and what was answered.
#[derive(Debug, Default)]
pub(crate) struct Traces {
    /// Ascending: LSNs are handed out in order.
    wanted: VecDeque<Lsn>,
    answers: Vec<(MemberName, Traced)>,
}

impl Traces {
    /// The commit that ends at `lsn` is to be followed.
    pub(crate) fn want(&mut self, lsn: Lsn) {
        if self.wanted.len() == WANTED_MAX {
            self.wanted.pop_front();
        }
        self.wanted.push_back(lsn);
    }

    /// True when the frame from `start` to `end` holds such a commit.
    pub(crate) fn contains(&self, start: Lsn, end: Lsn) -> bool {
        // The newest are what is being sent: they are looked at first.
        self.wanted.iter().rev().take_while(|lsn| **lsn > start).any(|lsn| *lsn <= end)
    }

    /// A replica answered.
    pub(crate) fn answer(&mut self, name: &MemberName, traced: Traced) {
        if self.answers.len() < ANSWERS_MAX {
            self.answers.push((name.clone(), traced));
        }
    }

    /// What was answered since the last call.
    pub(crate) fn take(&mut self) -> Vec<(MemberName, Traced)> {
        std::mem::take(&mut self.answers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_traced_when_it_holds_a_wanted_commit() {
        let mut traces = Traces::default();
        for lsn in [5000, 9000] {
            traces.want(Lsn(lsn));
        }
        let traced = |start, end| traces.contains(Lsn(start), Lsn(end));
        assert!(traced(4096, 8192) && traced(8192, 12288) && traced(4096, 12288));
        assert!(!traced(0, 4096) && !traced(12288, 16384));
        assert!(traced(8192, 9000), "a record may end where its frame ends");
    }

    #[test]
    fn the_oldest_wish_is_forgotten_first() {
        let mut traces = Traces::default();
        (1..=WANTED_MAX as u64 + 1).for_each(|n| traces.want(Lsn(n * 10)));
        assert!(!traces.contains(Lsn(5), Lsn(15)) && traces.contains(Lsn(15), Lsn(25)));
    }
}
