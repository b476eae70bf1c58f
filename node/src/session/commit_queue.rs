//! Who waits for which LSN at which commit level: the one place where acknowledgements come back up.
//! A core: the node tells it what each level has reached, it tells which sessions to look at.

use std::collections::VecDeque;

use walferry_cluster::level::CommitLevel;
use walferry_engine::lsn::Lsn;

use crate::session::id::SessionId;

/// One queue a level. LSNs are handed out in order, so each queue is sorted and only its front is looked at.
/// Bounded by the sessions: a session adds an entry a batch of input and has a bounded number of held replies.
#[derive(Default)]
pub struct CommitQueue {
    waiting: [Waiting; CommitLevel::ALL.len()],
    /// Readers of committed state.
    readers: Waiting,
}

type Waiting = VecDeque<(Lsn, SessionId)>;

fn wait(queue: &mut Waiting, session: SessionId, lsn: Lsn) {
    if queue.back() == Some(&(lsn, session)) {
        return;
    }
    // A session that holds a read at the log's end may ask for less than one before it; the later answer is right too.
    let lsn = queue.back().map_or(lsn, |&(last, _)| last.max(lsn));
    queue.push_back((lsn, session));
}

fn leave(queue: &mut Waiting, reached: Lsn, ready: &mut Vec<SessionId>) {
    while let Some(&(lsn, session)) = queue.front() {
        if lsn > reached {
            break;
        }
        queue.pop_front();
        ready.push(session);
    }
}

impl CommitQueue {
    /// `session` holds a reply until `level` has reached `lsn`.
    pub fn hold(&mut self, session: SessionId, level: CommitLevel, lsn: Lsn) {
        wait(&mut self.waiting[level as usize], session, lsn);
    }

    /// `session` holds a reply until what readers of committed state may be told has reached `lsn`.
    pub fn hold_committed(&mut self, session: SessionId, lsn: Lsn) {
        wait(&mut self.readers, session, lsn);
    }

    /// True when nobody waits.
    pub fn is_empty(&self) -> bool {
        self.readers.is_empty() && self.waiting.iter().all(VecDeque::is_empty)
    }

    /// As `release`, for readers of committed state. `committed` is only called when somebody waits.
    pub fn release_committed(&mut self, committed: impl Fn() -> Lsn, ready: &mut Vec<SessionId>) {
        if !self.readers.is_empty() {
            leave(&mut self.readers, committed(), ready);
        }
    }

    /// Moves to `ready` every session whose front reply may have been released. `released` tells what a level reached.
    pub fn release(&mut self, released: impl Fn(CommitLevel) -> Lsn, ready: &mut Vec<SessionId>) {
        for level in CommitLevel::ALL {
            let queue = &mut self.waiting[level as usize];
            if queue.is_empty() {
                continue;
            }
            leave(queue, released(level), ready);
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
        queue.hold_committed(SessionId(3), Lsn(50));
        queue.release(|_| Lsn(60), &mut ready);
        queue.release_committed(|| Lsn(49), &mut ready);
        assert_eq!(ready.len(), 3);
        queue.release_committed(|| Lsn(50), &mut ready);
        assert_eq!(ready[3..], [SessionId(3)]);
    }
}
