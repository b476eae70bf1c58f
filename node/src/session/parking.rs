//! Sessions that wait for something other than a commit level, by what they wait for. A core: the node tells what came, it tells
//! whom to resume. A needless resume does no harm, so each list errs on that side.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};

use walferry_applier::record::StreamId;
use walferry_engine::lsn::Lsn;

use crate::session::host::Wait;
use crate::session::id::SessionId;

/// Who is parked. Holds one wait a session, so it is bounded by the sessions; what readers of streams wait for is bounded for each
/// (`XREAD_STREAMS_MAX`) and counts as their memory.
#[derive(Default)]
pub struct Parking {
    waits: BTreeMap<SessionId, Wait>,
    /// Who waits for entries of streams, and of which.
    readers: BTreeMap<SessionId, Vec<(u64, StreamId)>>,
    /// By the hash of a stream's key: who waits for an entry behind which id.
    by_stream: HashMap<u64, BTreeMap<SessionId, StreamId>>,
}

/// What may have come since the last look.
#[derive(Clone, Copy, Debug, Default)]
pub struct News {
    /// The log takes records again.
    pub log_space: bool,
    /// What the store holds now, when that moved.
    pub applied: Option<Lsn>,
    /// A replica acknowledged something, or the flushed LSN moved.
    pub acknowledged: bool,
    /// The state became newer, or is known to be.
    pub fresh: bool,
    /// The store's keys are counted.
    pub counted: bool,
    /// The node's role or epoch is another.
    pub turned: bool,
}

impl Parking {
    /// `session` waits for `wait`, and for nothing else.
    pub fn park(&mut self, session: SessionId, wait: Wait) {
        self.unpark(session);
        let Wait::Streams(streams) = wait else {
            self.waits.insert(session, wait);
            return;
        };
        for (hash, after) in &streams {
            let known = self.by_stream.entry(*hash).or_default().entry(session).or_insert(*after);
            *known = (*known).min(*after);
        }
        self.readers.insert(session, streams);
    }

    /// `session` waits no longer.
    pub fn unpark(&mut self, session: SessionId) {
        self.waits.remove(&session);
        for (hash, _) in self.readers.remove(&session).into_iter().flatten() {
            if let Entry::Occupied(mut readers) = self.by_stream.entry(hash) {
                readers.get_mut().remove(&session);
                if readers.get().is_empty() {
                    readers.remove();
                }
            }
        }
    }

    /// True when nobody waits: the usual case, tested each turn.
    pub fn is_empty(&self) -> bool {
        self.waits.is_empty() && self.readers.is_empty()
    }

    /// True when somebody waits for entries of streams.
    pub fn has_readers(&self) -> bool {
        !self.readers.is_empty()
    }

    /// Moves to `ready` whom the news may concern; they are parked no longer.
    pub fn wake(&mut self, news: News, ready: &mut Vec<SessionId>) {
        self.waits.retain(|&session, wait| {
            let concerned = match wait {
                Wait::LogSpace => news.turned || news.log_space,
                Wait::Applied(lsn) => news.applied.is_some_and(|applied| applied >= *lsn),
                Wait::Floor(lsn) => news.turned || news.applied.is_some_and(|applied| applied >= *lsn),
                Wait::Fresh => news.turned || news.fresh || news.applied.is_some(),
                Wait::Acknowledged => news.turned || news.acknowledged,
                Wait::Counted => news.counted || news.applied.is_some(),
                Wait::Cluster => true,
                // `clients` and the thread for logins tell whom to resume, and of readers there is an index.
                Wait::Clients | Wait::Login | Wait::Streams(_) => false,
            };
            if concerned {
                ready.push(session);
            }
            !concerned
        });
        if news.turned {
            self.wake_all_readers(ready);
        }
    }

    /// As `wake`, for those who wait for an entry of the stream with this hash that is behind an id before `newest`.
    pub fn wake_readers(&mut self, hash: u64, newest: StreamId, ready: &mut Vec<SessionId>) {
        let Some(readers) = self.by_stream.get(&hash) else { return };
        let concerned = readers.iter().filter(|(_, after)| newest > **after).map(|(session, _)| *session);
        let concerned: Vec<SessionId> = concerned.collect();
        concerned.iter().for_each(|session| self.unpark(*session));
        ready.extend(concerned);
    }

    /// As `wake`, for all who wait for entries: what was added is not known.
    pub fn wake_all_readers(&mut self, ready: &mut Vec<SessionId>) {
        ready.extend(std::mem::take(&mut self.readers).into_keys());
        self.by_stream.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whom_the_news_concerns_is_woken() {
        let mut parking = Parking::default();
        parking.park(SessionId(1), Wait::LogSpace);
        parking.park(SessionId(2), Wait::Applied(Lsn(10)));
        parking.park(SessionId(3), Wait::Acknowledged);
        let mut ready = Vec::new();
        parking.wake(News { applied: Some(Lsn(9)), ..News::default() }, &mut ready);
        assert_eq!(ready, []);
        parking.wake(News { applied: Some(Lsn(10)), log_space: true, ..News::default() }, &mut ready);
        ready.sort();
        assert_eq!(ready, [SessionId(1), SessionId(2)]);
        parking.unpark(SessionId(3));
        assert!(parking.is_empty());
        parking.park(SessionId(4), Wait::Floor(Lsn(20)));
        parking.park(SessionId(5), Wait::Fresh);
        ready.clear();
        parking.wake(News { applied: Some(Lsn(19)), ..News::default() }, &mut ready);
        assert_eq!(ready, [SessionId(5)]);
        parking.wake(News { fresh: true, ..News::default() }, &mut ready);
        assert_eq!(ready, [SessionId(5)], "only the floor is waited for");
        parking.wake(News { turned: true, ..News::default() }, &mut ready);
        assert_eq!(ready, [SessionId(5), SessionId(4)]);
    }

    #[test]
    fn reader_is_woken_by_newer_entries_of_its_streams_only() {
        let mut parking = Parking::default();
        parking.park(SessionId(1), Wait::Streams(vec![(10, (5, 0)), (11, (0, 0))]));
        parking.park(SessionId(2), Wait::Streams(vec![(10, (7, 0))]));
        let mut ready = Vec::new();
        parking.wake(News { applied: Some(Lsn(9)), fresh: true, ..News::default() }, &mut ready);
        parking.wake_readers(12, (9, 0), &mut ready);
        parking.wake_readers(10, (5, 0), &mut ready);
        assert_eq!(ready, [], "another stream, and an entry that both have");
        parking.wake_readers(10, (6, 0), &mut ready);
        assert_eq!(ready, [SessionId(1)]);
        parking.wake_readers(11, (6, 0), &mut ready);
        assert_eq!(ready, [SessionId(1)], "it is parked no longer");
        parking.park(SessionId(1), Wait::Streams(vec![(11, (0, 0))]));
        parking.unpark(SessionId(2));
        parking.wake(News { turned: true, ..News::default() }, &mut ready);
        assert_eq!(ready, [SessionId(1), SessionId(1)]);
        assert!(parking.is_empty() && parking.by_stream.is_empty());
    }
}
