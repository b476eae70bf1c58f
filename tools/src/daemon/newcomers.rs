//! Connections that have not said who they are, in the order of their arrival. They take no place from anybody else: together they
//! have a share of the places, and where all places are taken the oldest of them makes room for a new connection. A core: `clients`
//! tells it who came, and asks whom to send away.

use std::collections::VecDeque;
use std::time::Duration;

use super::host::SessionId;

/// Many clients may come back at the same moment and say who they are with their first command: the share is not observed for
/// those that have been here for less.
pub const GRACE: Duration = Duration::from_millis(500);
/// They may take so much of all places: a quarter.
const SHARE: usize = 4;

/// How many places connections that have not said who they are may take of `clients_max`.
pub fn share(clients_max: usize) -> usize {
    (clients_max / SHARE).max(1)
}

/// Who has not said who it is. May name connections that are gone or have logged in since; bounded by `tidy`, which is called ten
/// times a second, and the connections that are accepted in between.
#[derive(Debug, Default)]
pub struct Newcomers {
    remote: VecDeque<SessionId>,
    /// From this host: operators come from there, and strangers only once they are on it.
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
    fn oldest_is_no_connection_that_logged_in_meanwhile() {
        let mut newcomers = Newcomers::default();
        (0..4).for_each(|number| newcomers.add(SessionId(number), false));
        assert_eq!(newcomers.oldest(|session| session.0 >= 2), Some(SessionId(2)));
        assert_eq!(newcomers.tidy(|_| true), 1);
    }
}
