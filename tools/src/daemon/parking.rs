//! Sessions that wait for something other than a commit level, by what they wait for. A core: the node tells what came, it tells
//! whom to resume. A needless resume does no harm, so each list errs on that side.

use std::collections::BTreeMap;

use walferry_engine::lsn::Lsn;

use super::host::{SessionId, Wait};

/// Who is parked. Holds one wait a session, so it is bounded by the sessions.
#[derive(Default)]
pub struct Parking {
    waits: BTreeMap<SessionId, Wait>,
}

/// What may have come since the last look.
#[derive(Clone, Copy, Debug, Default)]
pub struct News {
    /// The log takes records again.
    pub room: bool,
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
        self.waits.insert(session, wait);
    }

    /// `session` waits no longer.
    pub fn unpark(&mut self, session: SessionId) {
        self.waits.remove(&session);
    }

    /// True when nobody waits: the usual case, tested each turn.
    pub fn is_empty(&self) -> bool {
        self.waits.is_empty()
    }

    /// Moves to `ready` whom the news may concern; they are parked no longer.
    pub fn wake(&mut self, news: News, ready: &mut Vec<SessionId>) {
        if self.waits.is_empty() {
            return;
        }
        self.waits.retain(|&session, wait| {
            let concerned = match wait {
                Wait::Room => news.turned || news.room,
                Wait::Applied(lsn) => news.applied.is_some_and(|applied| applied >= *lsn),
                Wait::Floor(lsn) => news.turned || news.applied.is_some_and(|applied| applied >= *lsn),
                Wait::Fresh => news.turned || news.fresh || news.applied.is_some(),
                Wait::Acknowledged => news.turned || news.acknowledged,
                Wait::Streams(_) => news.applied.is_some(),
                Wait::Counted => news.counted || news.applied.is_some(),
                Wait::Cluster => true,
                // `clients` resumes it itself.
                Wait::Clients => false,
            };
            if concerned {
                ready.push(session);
            }
            !concerned
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whom_the_news_concerns_is_woken() {
        let mut parking = Parking::default();
        parking.park(SessionId(1), Wait::Room);
        parking.park(SessionId(2), Wait::Applied(Lsn(10)));
        parking.park(SessionId(3), Wait::Acknowledged);
        let mut ready = Vec::new();
        parking.wake(News { applied: Some(Lsn(9)), ..News::default() }, &mut ready);
        assert_eq!(ready, []);
        parking.wake(News { applied: Some(Lsn(10)), room: true, ..News::default() }, &mut ready);
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
}
