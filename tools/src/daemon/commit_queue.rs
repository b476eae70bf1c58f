//! Who waits for which LSN at which commit level: the one place where acknowledgements come back up.
//! A core: the node tells it what each level has reached, it tells which sessions to look at.

use std::collections::VecDeque;

use walferry_cluster::level::CommitLevel;
use walferry_engine::lsn::Lsn;

use super::host::SessionId;

const LEVELS: [CommitLevel; 5] = [
    CommitLevel::Off,
    CommitLevel::Local,
    CommitLevel::RemoteWrite,
    CommitLevel::RemoteFlush,
    CommitLevel::RemoteApply,
];

/// One queue a level. LSNs are handed out in order, so each queue is sorted and only its front is looked at.
/// Bounded by the sessions: a session adds an entry a batch of input and has a bounded number of held replies.
#[derive(Default)]
pub struct CommitQueue {
    waiting: [VecDeque<(Lsn, SessionId)>; LEVELS.len()],
}

impl CommitQueue {
    /// `session` holds a reply until `level` has reached `lsn`.
    pub fn hold(&mut self, session: SessionId, level: CommitLevel, lsn: Lsn) {
        let queue = &mut self.waiting[level as usize];
        if queue.back() == Some(&(lsn, session)) {
            return;
        }
        // A session that holds a read at the log's end may ask for less than one before it; the later answer is right too.
        let lsn = queue.back().map_or(lsn, |&(last, _)| last.max(lsn));
        queue.push_back((lsn, session));
    }

    /// Moves to `ready` every session whose front reply may have been released. `released` tells what a level reached.
    pub fn release(&mut self, released: impl Fn(CommitLevel) -> Lsn, ready: &mut Vec<SessionId>) {
        for level in LEVELS {
            let queue = &mut self.waiting[level as usize];
            if queue.is_empty() {
                continue;
            }
            let reached = released(level);
            while let Some(&(lsn, session)) = queue.front() {
                if lsn > reached {
                    break;
                }
                queue.pop_front();
                ready.push(session);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_level_releases_in_order_and_only_what_it_reached() {
        let mut queue = CommitQueue::default();
        queue.hold(SessionId(1), CommitLevel::Local, Lsn(10));
        queue.hold(SessionId(2), CommitLevel::RemoteApply, Lsn(20));
        queue.hold(SessionId(1), CommitLevel::Local, Lsn(30));
        let mut ready = Vec::new();
        let local = |to| move |level| if level == CommitLevel::Local { Lsn(to) } else { Lsn::ZERO };
        queue.release(local(9), &mut ready);
        assert_eq!(ready, []);
        queue.release(local(29), &mut ready);
        assert_eq!(ready, [SessionId(1)]);
        queue.release(|_| Lsn(40), &mut ready);
        assert_eq!(ready, [SessionId(1), SessionId(1), SessionId(2)]);
    }
}
