//! CLIENT LIST, INFO and KILL: what a session asks of all connections, and the answer. Asked through `Host`, answered by
//! `clients` once the turn's commands are executed: while one session executes, nobody may look at the others.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::session::description::Description;
use crate::session::id::SessionId;

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientAsk {
    /// CLIENT LIST; of these, in ascending order, or of all when there are none.
    List(Vec<u64>),
    /// CLIENT KILL in its newer form: the answer is a count.
    Kill {
        /// With this number.
        id: Option<u64>,
        /// From this address.
        address: Option<SocketAddr>,
        /// Of this user.
        user: Option<Vec<u8>>,
        /// Not the one that asks.
        skip_me: bool,
    },
    /// CLIENT KILL ADDRESS: the answer is OK or an error.
    KillAddress(SocketAddr),
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientAnswer {
    /// To LIST.
    Text(String),
    /// To KILL: how many.
    Killed(usize),
    /// To KILL of one address.
    KilledAddress(bool),
}

/// Where the answer appears.
pub type ClientReply = Rc<RefCell<Option<ClientAnswer>>>;

/// A question that waits for its answer; one a session at most, for it waits.
#[derive(Debug)]
pub struct Asked {
    /// Who asks.
    pub session: SessionId,
    /// What.
    pub ask: ClientAsk,
    /// Where the answer goes.
    pub reply: ClientReply,
}

/// What `clients` knows of one connection.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a> {
    /// What the session tells of itself.
    pub session: &'a Description<'a>,
    /// Its number.
    pub id: SessionId,
    /// Where it comes from.
    pub address: SocketAddr,
    /// Its descriptor.
    pub descriptor: i32,
    /// When it connected.
    pub since: Instant,
    /// When it was active last.
    pub active: Instant,
    /// Bytes that are being sent.
    pub sending_bytes: usize,
}

impl ClientAsk {
    /// Whether the question concerns this connection.
    pub fn concerns(&self, asking: SessionId, id: SessionId, address: SocketAddr, user: &str) -> bool {
        match self {
            ClientAsk::List(ids) => ids.is_empty() || ids.binary_search(&id.0).is_ok(),
            ClientAsk::KillAddress(wanted) => address == *wanted,
            ClientAsk::Kill { id: wanted_id, address: wanted_address, user: wanted_user, skip_me } => {
                !(*skip_me && id == asking)
                    && wanted_id.is_none_or(|wanted| wanted == id.0)
                    && wanted_address.is_none_or(|wanted| wanted == address)
                    && wanted_user.as_ref().is_none_or(|wanted| wanted == user.as_bytes())
            }
        }
    }
}

/// One line of CLIENT LIST, in redis-server's fields as far as they mean something here.
pub fn line(seen: &Seen<'_>, now: Instant) -> String {
    let seconds = |then: Instant| now.saturating_duration_since(then).min(Duration::MAX).as_secs();
    let session = seen.session;
    let flags = match (session.blocked, session.queued) {
        (true, _) => "b",
        (false, Some(_)) => "x",
        _ => "N",
    };
    format!(
        "id={} addr={} fd={} name={} age={} idle={} flags={flags} db=0 multi={} qbuf={} obl={} oll={} omem={} cmd={} user={} resp={} level={}",
        seen.id.0,
        seen.address,
        seen.descriptor,
        String::from_utf8_lossy(session.name),
        seconds(seen.since),
        seconds(seen.active),
        session.queued.map_or(-1, |queued| i64::try_from(queued).unwrap_or(i64::MAX)),
        session.input_bytes,
        session.output_bytes,
        session.held_replies,
        seen.sending_bytes + session.output_bytes,
        if session.last_command.is_empty() { "NULL" } else { session.last_command },
        session.user,
        if session.resp3 { 3 } else { 2 },
        session.level,
    )
}
