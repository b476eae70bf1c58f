//! When a client has to go, and what was counted of clients. A core: `clients` asks it ten times a second for each connection and
//! does what it says; it knows no socket and reads no clock.

use std::cell::Cell;
use std::fmt;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// A client that has closed its side gets the replies that it still waits for within this time, or none.
pub const HALF_CLOSED_TIME_MAX: Duration = Duration::from_secs(10);

/// A client that does not read its replies is read on up to so many bytes of commands, so that one that writes its whole pipeline
/// before it reads comes to its end. Beyond it the client is disconnected.
pub const INPUT_UNREAD_BYTES_MAX: usize = 64 << 20;
/// Places that are kept for operators; of fewer than 32 places a quarter.
const OPERATOR_PLACES: usize = 8;
/// A send that makes no progress for so long means that the client does not read at the moment.
pub const UNREAD_TIME_MIN: Duration = Duration::from_millis(100);

/// What clients may take of the node.
#[derive(Clone, Debug)]
pub struct ClientLimits {
    /// Connections at once.
    pub clients_max: usize,
    /// A client that has no command executed for so long goes; bytes of a command that never ends do not count.
    pub idle_timeout: Option<Duration>,
    /// A client that takes nothing of what is sent to it for so long goes.
    pub stalled_timeout: Option<Duration>,
    /// What all clients together have half sent, queued and not yet read; beyond it the largest go.
    pub bytes_max: usize,
    /// A client that has not said who it is within this time goes.
    pub authentication_timeout: Option<Duration>,
}

/// The places of clients that have logged in, or need not. The last ones are taken by operators only. Shared by all sessions.
#[derive(Debug)]
pub struct Places {
    taken: Cell<usize>,
    /// Whoever is no operator finds no place beyond these.
    ordinary: usize,
}

impl Default for Places {
    fn default() -> Places {
        Places { taken: Cell::new(0), ordinary: usize::MAX }
    }
}

/// A place, until it is dropped.
#[derive(Debug)]
pub struct Place(Rc<Places>);

impl Places {
    /// Of so many, the last `OPERATOR_PLACES` for operators. Where everybody is one, everybody may take them.
    pub fn new(clients_max: usize) -> Places {
        Places { taken: Cell::new(0), ordinary: clients_max - OPERATOR_PLACES.min(clients_max / 4) }
    }

    /// A place, if there is one for this client.
    pub fn take(self: &Rc<Places>, is_operator: bool) -> Option<Place> {
        let taken = self.taken.get();
        if taken >= self.ordinary && !is_operator {
            return None;
        }
        self.taken.set(taken + 1);
        Some(Place(Rc::clone(self)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.taken.set(self.0.taken.get() - 1);
    }
}

/// What `clients` knows of one connection.
#[derive(Clone, Copy, Debug)]
pub struct Signs {
    /// When a command of it was executed last, or it connected.
    pub active: Instant,
    /// It waits for the node: a reply is held, or it blocks.
    pub waiting: bool,
    /// A send is under way since then.
    pub sending_since: Option<Instant>,
    /// It closed its side then.
    pub input_ended: Option<Instant>,
    /// It is not known who it is, since then.
    pub unknown_since: Option<Instant>,
}

/// Why a client was sent away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DisconnectReason {
    /// It asked nothing for so long.
    Idle(Duration),
    /// It took nothing for so long.
    Stalled(Duration),
    /// It closed its side, and what it waited for did not come.
    HalfClosed,
    /// Its buffers held so many bytes, and those of all clients too many.
    Evicted(usize),
    /// An operator asked for it.
    Killed,
    /// Its user is no more, or another one.
    UserChanged,
    /// It speaks HTTP: a web page may send it.
    Http,
    /// It does not read its replies, and has sent so many bytes of commands that wait for that.
    Unread(usize),
    /// It did not say who it is within this time.
    Unknown(Duration),
    /// It had not said who it is, and others needed its place.
    Displaced,
}

impl fmt::Display for DisconnectReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DisconnectReason::Idle(time) => write!(f, "it finished no command for {time:?} (client_idle_timeout)"),
            DisconnectReason::Stalled(time) => {
                write!(f, "it read none of its replies for {time:?} (output_stalled_timeout)")
            }
            DisconnectReason::HalfClosed => {
                write!(f, "it closed its side, and what it waits for did not come within {HALF_CLOSED_TIME_MAX:?}")
            }
            DisconnectReason::Evicted(bytes) => write!(
                f,
                "its buffers hold {bytes} bytes, the most of all, and together they hold more than clients_bytes_max"
            ),
            DisconnectReason::Killed => write!(f, "CLIENT KILL"),
            DisconnectReason::UserChanged => write!(f, "its user was changed or removed in users_file"),
            DisconnectReason::Unknown(time) => {
                write!(f, "it did not log in within {time:?} (authentication_timeout)")
            }
            DisconnectReason::Displaced => write!(
                f,
                "it had not logged in, and connections that have not may take a quarter of clients_max, or give way where all places \
                 are taken"
            ),
            DisconnectReason::Http => write!(
                f,
                "possible attack: it sent an HTTP request (POST, Host: or a request line), as a web page can to a port that speaks \
                 text; nothing of it was executed"
            ),
            DisconnectReason::Unread(bytes) => write!(
                f,
                "it reads no replies and has sent {bytes} bytes of commands that wait for that; a client may be {INPUT_UNREAD_BYTES_MAX} \
                 bytes ahead of its replies: it has to read while it writes, or send shorter pipelines"
            ),
        }
    }
}

impl ClientLimits {
    /// Why this client has to go now, if it has to.
    pub fn judge(&self, signs: &Signs, now: Instant) -> Option<DisconnectReason> {
        let since = |then: Instant| now.saturating_duration_since(then);
        // Whatever it does meanwhile.
        if let (Some(unknown), Some(limit)) = (signs.unknown_since, self.authentication_timeout)
            && since(unknown) >= limit
        {
            return Some(DisconnectReason::Unknown(limit));
        }
        if let Some(sending) = signs.sending_since {
            // It does not read: how long it has been idle is not the question.
            return self.stalled_timeout.filter(|limit| since(sending) >= *limit).map(DisconnectReason::Stalled);
        }
        if let Some(ended) = signs.input_ended {
            return (since(ended) >= HALF_CLOSED_TIME_MAX).then_some(DisconnectReason::HalfClosed);
        }
        if signs.waiting {
            return None;
        }
        self.idle_timeout.filter(|limit| since(signs.active) >= *limit).map(DisconnectReason::Idle)
    }
}

/// What was counted of clients since the start, and what there is now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClientCounts {
    /// Open now.
    pub connected: usize,
    /// Of them, those that wait for the node.
    pub waiting: usize,
    /// The bound of `connected`.
    pub connected_max: usize,
    /// What all of them have half sent, queued and not yet read, bytes.
    pub buffered_bytes: usize,
    /// Accepted since the start.
    pub accepted: u64,
    /// Turned away because there were too many.
    pub rejected: u64,
    /// Sent away: `DisconnectReason::Idle`.
    pub idle: u64,
    /// Sent away: `DisconnectReason::Stalled`.
    pub stalled: u64,
    /// Sent away: `DisconnectReason::HalfClosed`.
    pub half_closed: u64,
    /// Sent away: `DisconnectReason::Evicted`.
    pub evicted: u64,
    /// Sent away: `DisconnectReason::Killed` and `DisconnectReason::UserChanged`.
    pub killed: u64,
    /// Sent away: `DisconnectReason::Http`.
    pub http: u64,
    /// Sent away: `DisconnectReason::Unread`.
    pub unread: u64,
    /// Sent away: `DisconnectReason::Unknown`.
    pub unknown: u64,
    /// Sent away: `DisconnectReason::Displaced`.
    pub displaced: u64,
    /// Open now, and have not said who they are.
    pub unknown_now: usize,
    /// Wrong names or passwords.
    pub failed_logins: u64,
}

impl ClientCounts {
    /// One more was sent away.
    pub fn count(&mut self, why: DisconnectReason) {
        let counter = match why {
            DisconnectReason::Idle(_) => &mut self.idle,
            DisconnectReason::Stalled(_) => &mut self.stalled,
            DisconnectReason::HalfClosed => &mut self.half_closed,
            DisconnectReason::Evicted(_) => &mut self.evicted,
            DisconnectReason::Killed | DisconnectReason::UserChanged => &mut self.killed,
            DisconnectReason::Http => &mut self.http,
            DisconnectReason::Unread(_) => &mut self.unread,
            DisconnectReason::Unknown(_) => &mut self.unknown,
            DisconnectReason::Displaced => &mut self.displaced,
        };
        *counter += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    fn limits() -> ClientLimits {
        ClientLimits {
            clients_max: 1,
            idle_timeout: Some(LIMIT),
            stalled_timeout: Some(LIMIT),
            bytes_max: 1,
            authentication_timeout: Some(LIMIT / 6),
        }
    }

    #[test]
    fn waiting_client_is_not_idle_and_unread_output_is_stalled() {
        let start = Instant::now();
        let late = start + LIMIT;
        let calm = Signs { active: start, waiting: false, sending_since: None, input_ended: None, unknown_since: None };
        let judged = |signs: Signs, now| limits().judge(&signs, now);
        assert_eq!(judged(calm, late - Duration::from_millis(1)), None);
        assert_eq!(judged(calm, late), Some(DisconnectReason::Idle(LIMIT)));
        assert_eq!(judged(Signs { active: late, ..calm }, late), None);
        assert_eq!(judged(Signs { waiting: true, ..calm }, late), None, "a blocked client may wait for ever");
        let sending = Signs { sending_since: Some(late), ..calm };
        assert_eq!(judged(sending, late), None, "the send has only begun");
        assert_eq!(judged(sending, late + LIMIT), Some(DisconnectReason::Stalled(LIMIT)));
        let half = Signs { input_ended: Some(start), waiting: true, ..calm };
        assert_eq!(judged(half, start), None);
        assert_eq!(
            judged(half, start + HALF_CLOSED_TIME_MAX),
            Some(DisconnectReason::HalfClosed),
            "it may be gone altogether"
        );
    }

    #[test]
    fn client_that_does_not_log_in_goes_whatever_it_does() {
        let start = Instant::now();
        let limit = LIMIT / 6;
        let unknown =
            Signs { active: start, waiting: true, sending_since: None, input_ended: None, unknown_since: Some(start) };
        for signs in
            [unknown, Signs { sending_since: Some(start), ..unknown }, Signs { active: start + limit, ..unknown }]
        {
            assert_eq!(limits().judge(&signs, start + limit - Duration::from_millis(1)), None);
            assert_eq!(limits().judge(&signs, start + limit), Some(DisconnectReason::Unknown(limit)));
        }
        assert_eq!(limits().judge(&Signs { unknown_since: None, ..unknown }, start + limit), None);
        let patient = ClientLimits { authentication_timeout: None, ..limits() };
        assert_eq!(patient.judge(&unknown, start + LIMIT), None);
    }

    #[test]
    fn last_places_are_taken_by_operators_only() {
        let places = Rc::new(Places::new(100));
        let mut ordinary: Vec<Place> = std::iter::from_fn(|| places.take(false)).collect();
        assert_eq!(ordinary.len(), 100 - OPERATOR_PLACES);
        let operator = places.take(true).expect("a place is kept");
        ordinary.pop();
        assert!(places.take(false).is_none(), "the operator has the place that is free");
        drop(operator);
        assert!(places.take(false).is_some());
        assert_eq!([1, 3, 4, 32].map(|max| Places::new(max).ordinary), [1, 3, 3, 24]);
    }

    #[test]
    fn without_timeouts_nobody_goes() {
        let start = Instant::now();
        let limits = ClientLimits { idle_timeout: None, stalled_timeout: None, ..limits() };
        let calm = Signs { active: start, waiting: false, sending_since: None, input_ended: None, unknown_since: None };
        let stalled = Signs { sending_since: Some(start), ..calm };
        assert_eq!([calm, stalled].map(|signs| limits.judge(&signs, start + 1000 * LIMIT)), [None, None]);
    }
}
