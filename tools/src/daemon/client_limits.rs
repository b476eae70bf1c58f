//! When a client has to go, and what was counted of clients. A core: `clients` asks it ten times a second for each connection and
//! does what it says; it knows no socket and reads no clock.

use std::fmt;
use std::time::{Duration, Instant};

/// A client that has closed its side gets the replies that it still waits for within this time, or none.
pub const HALF_CLOSED_TIME_MAX: Duration = Duration::from_secs(10);

/// A client that does not read its replies is read on up to so many bytes of commands, so that one that writes its whole pipeline
/// before it reads comes to its end. Beyond it the client is disconnected.
pub const INPUT_UNREAD_BYTES_MAX: usize = 64 << 20;
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
}

/// Why a client was sent away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Farewell {
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
}

impl fmt::Display for Farewell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Farewell::Idle(time) => write!(f, "it finished no command for {time:?} (client_idle_timeout)"),
            Farewell::Stalled(time) => write!(f, "it read none of its replies for {time:?} (output_stalled_timeout)"),
            Farewell::HalfClosed => {
                write!(f, "it closed its side, and what it waits for did not come within {HALF_CLOSED_TIME_MAX:?}")
            }
            Farewell::Evicted(bytes) => write!(
                f,
                "its buffers hold {bytes} bytes, the most of all, and together they hold more than clients_bytes_max"
            ),
            Farewell::Killed => write!(f, "CLIENT KILL"),
            Farewell::UserChanged => write!(f, "its user was changed or removed in users_file"),
            Farewell::Http => write!(
                f,
                "possible attack: it sent an HTTP request (POST, Host: or a request line), as a web page can to a port that speaks \
                 text; nothing of it was executed"
            ),
            Farewell::Unread(bytes) => write!(
                f,
                "it reads no replies and has sent {bytes} bytes of commands that wait for that; a client may be {INPUT_UNREAD_BYTES_MAX} \
                 bytes ahead of its replies: it has to read while it writes, or send shorter pipelines"
            ),
        }
    }
}

impl ClientLimits {
    /// Why this client has to go now, if it has to.
    pub fn judge(&self, signs: &Signs, now: Instant) -> Option<Farewell> {
        let since = |then: Instant| now.saturating_duration_since(then);
        if let Some(sending) = signs.sending_since {
            // It does not read: how long it has been idle is not the question.
            return self.stalled_timeout.filter(|limit| since(sending) >= *limit).map(Farewell::Stalled);
        }
        if let Some(ended) = signs.input_ended {
            return (since(ended) >= HALF_CLOSED_TIME_MAX).then_some(Farewell::HalfClosed);
        }
        if signs.waiting {
            return None;
        }
        self.idle_timeout.filter(|limit| since(signs.active) >= *limit).map(Farewell::Idle)
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
    /// Sent away: `Farewell::Idle`.
    pub idle: u64,
    /// Sent away: `Farewell::Stalled`.
    pub stalled: u64,
    /// Sent away: `Farewell::HalfClosed`.
    pub half_closed: u64,
    /// Sent away: `Farewell::Evicted`.
    pub evicted: u64,
    /// Sent away: `Farewell::Killed` and `Farewell::UserChanged`.
    pub killed: u64,
    /// Sent away: `Farewell::Http`.
    pub http: u64,
    /// Sent away: `Farewell::Unread`.
    pub unread: u64,
}

impl ClientCounts {
    /// One more was sent away.
    pub fn count(&mut self, why: Farewell) {
        let counter = match why {
            Farewell::Idle(_) => &mut self.idle,
            Farewell::Stalled(_) => &mut self.stalled,
            Farewell::HalfClosed => &mut self.half_closed,
            Farewell::Evicted(_) => &mut self.evicted,
            Farewell::Killed | Farewell::UserChanged => &mut self.killed,
            Farewell::Http => &mut self.http,
            Farewell::Unread(_) => &mut self.unread,
        };
        *counter += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    fn limits() -> ClientLimits {
        ClientLimits { clients_max: 1, idle_timeout: Some(LIMIT), stalled_timeout: Some(LIMIT), bytes_max: 1 }
    }

    #[test]
    fn who_waits_for_the_node_is_not_idle_and_who_does_not_read_is_stalled() {
        let start = Instant::now();
        let late = start + LIMIT;
        let calm = Signs { active: start, waiting: false, sending_since: None, input_ended: None };
        let judged = |signs: Signs, now| limits().judge(&signs, now);
        assert_eq!(judged(calm, late - Duration::from_millis(1)), None);
        assert_eq!(judged(calm, late), Some(Farewell::Idle(LIMIT)));
        assert_eq!(judged(Signs { active: late, ..calm }, late), None);
        assert_eq!(judged(Signs { waiting: true, ..calm }, late), None, "a blocked client may wait for ever");
        let sending = Signs { sending_since: Some(late), ..calm };
        assert_eq!(judged(sending, late), None, "the send has only begun");
        assert_eq!(judged(sending, late + LIMIT), Some(Farewell::Stalled(LIMIT)));
        let half = Signs { input_ended: Some(start), waiting: true, ..calm };
        assert_eq!(judged(half, start), None);
        assert_eq!(judged(half, start + HALF_CLOSED_TIME_MAX), Some(Farewell::HalfClosed), "it may be gone altogether");
    }

    #[test]
    fn without_timeouts_nobody_goes() {
        let start = Instant::now();
        let limits = ClientLimits { idle_timeout: None, stalled_timeout: None, ..limits() };
        let calm = Signs { active: start, waiting: false, sending_since: None, input_ended: None };
        let stalled = Signs { sending_since: Some(start), ..calm };
        assert_eq!([calm, stalled].map(|signs| limits.judge(&signs, start + 1000 * LIMIT)), [None, None]);
    }
}
