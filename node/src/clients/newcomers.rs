//! Connections that have not said who they are, in the order of their arrival. They take no place from anybody else: together they
//! have a share of the places, and where all places are taken the oldest of them gives way to a new connection. A core: `clients`
//! tells it who came, and asks whom to send away.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::session::id::SessionId;

/// Many clients may come back at the same moment and say who they are with their first command: the share is not observed for
/// those that have been here for less.
const GRACE: Duration = Duration::from_millis(500);
/// They may take so much of all places: a quarter.
const SHARE: usize = 4;

/// Of connections that have not said who they are, each with its arrival and its slot, those that have to go: the oldest that are
/// beyond the share, if they have been here for longer than the grace.
pub fn beyond_share(clients_max: usize, all: impl Iterator<Item = (Instant, usize)>, now: Instant) -> Vec<usize> {
    let share = (clients_max / SHARE).max(1);
    let mut old: Vec<(Instant, usize)> =
        all.filter(|(since, _)| now.saturating_duration_since(*since) >= GRACE).collect();
    let beyond = old.len().saturating_sub(share);
    if beyond > 0 {
        old.sort_unstable();
    }
    old.into_iter().take(beyond).map(|(_, slot)| slot).collect()
}

/// Who has not said who it is. May name connections that are gone or have logged in since; bounded by `tidy`, which is called ten
/// times a second, and the connections that are accepted in between.
#[derive(Debug, Default)]
pub struct Newcomers {
    remote: VecDeque<SessionId>,
    /// From this host: operators come from there, and others only once they are on it.
    local: VecDeque<SessionId>,
}

impl Newcomers {
    /// A connection was accepted.
    pub fn add(&mut self, session: SessionId, is_local: bool) {
        if is_local { self.local.push_back(session) } else { self.remote.push_back(session) }
    }

    /// Forgets whom `is_one` does not know as a newcomer any more, and gives how many there are.
    pub fn tidy(&mut self, mut is_one: impl FnMut(SessionId) -> bool) -> usize {
        self.remote.retain(|session| is_one(*session));
        self.local.retain(|session| is_one(*session));
        self.remote.len() + self.local.len()
    }

    /// Takes out who has to go first: the oldest from elsewhere, else the oldest of this host.
    pub fn oldest(&mut self, mut is_one: impl FnMut(SessionId) -> bool) -> Option<SessionId> {
        [&mut self.remote, &mut self.local]
            .into_iter()
            .find_map(|queue| std::iter::from_fn(|| queue.pop_front()).find(|session| is_one(*session)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oldest_from_elsewhere_goes_first() {
        let mut newcomers = Newcomers::default();
        for (number, is_local) in [(1, true), (2, false), (3, false), (4, true), (5, false)] {
            newcomers.add(SessionId(number), is_local);
        }
        let logged_in = SessionId(2);
        assert_eq!(newcomers.tidy(|session| session != logged_in), 4);
        let order: Vec<u64> = std::iter::from_fn(|| newcomers.oldest(|_| true)).map(|session| session.0).collect();
        assert_eq!(order, [3, 5, 1, 4]);
        assert_eq!(newcomers.tidy(|_| true), 0);
    }

    #[test]
    fn oldest_beyond_the_share_go_after_their_grace() {
        let begun = Instant::now();
        let arrived = |slot: usize| begun + GRACE * u32::try_from(slot).expect("small");
        // The arrivals of slots 0 to 9, in any order.
        let gone = |at: Instant| {
            beyond_share(16, [3, 1, 4, 0, 5, 9, 2, 6, 8, 7].map(|slot| (arrived(slot), slot)).into_iter(), at)
        };
        assert_eq!(gone(arrived(4)), [] as [usize; 0], "four places are theirs, and slots 4 to 9 are young");
        assert_eq!(gone(arrived(5)), [0]);
        assert_eq!(gone(arrived(10)), [0, 1, 2, 3, 4, 5]);
        assert_eq!(beyond_share(1, [(begun, 0)].into_iter(), begun + GRACE), [] as [usize; 0], "one place at least");
    }

    #[test]
    fn oldest_is_no_connection_that_logged_in_meanwhile() {
        let mut newcomers = Newcomers::default();
        (0..4).for_each(|number| newcomers.add(SessionId(number), false));
        assert_eq!(newcomers.oldest(|session| session.0 >= 2), Some(SessionId(2)));
        assert_eq!(newcomers.tidy(|_| true), 1);
    }
}
