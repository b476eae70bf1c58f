//! What a reader may ask of the state that it is shown, and whether a node's state is that good at the moment. A core: facts and
//! a guarantee in, a verdict out. Used by `session` and `parked`; knows no clock, no log and no connection.
//!
//! ```text
//! asked for      good enough when                                     otherwise
//! floor (token)  the log reaches it, in the epoch that the token names  wait, -BEHIND; -LOST when a failover took it back
//! ANY            always
//! AT MOST d      what was durable on the leader d ago is applied here   wait, -STALE
//! COMMITTED      always; the reply is held until it is committed        -UNCOMMITTED
//! STRONG         this node leads and holds its lease, checked after the value was read; the reply is held as for COMMITTED
//! ```

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use walferry_engine::epoch::EpochHistory;
use walferry_engine::lsn::{Epoch, Lsn};

use crate::units::Span;

/// The version of the token's text.
const TOKEN_VERSION: &str = "w1";
/// Digits of the cluster's id in a token: enough to tell clusters apart, and no secret.
const TOKEN_CLUSTER_DIGITS: usize = 8;

/// A place in the log that no failover confuses with another: the epoch is the one that wrote the last byte before `lsn`.
/// Ordered as the log of one leader after the other grows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// Which leadership wrote it.
    pub epoch: Epoch,
    /// Where it ends.
    pub lsn: Lsn,
}

impl Position {
    /// The end `lsn` of a log with this history.
    pub fn at(lsn: Lsn, history: &EpochHistory) -> Position {
        Position { epoch: history.epoch_of_end(lsn), lsn }
    }
}

/// What a session has seen, as text that any node of the cluster understands: `w1.9f31c2aa.3.16/B374D848`. Every character
/// may stand in a cookie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token {
    /// The first 8 hexadecimal digits of the cluster's id.
    pub cluster: u32,
    /// What was seen.
    pub seen: Position,
}

impl Token {
    /// The token of `seen` in the cluster with this id.
    pub fn new(cluster_id: u128, seen: Position) -> Token {
        Token { cluster: (cluster_id >> (u128::BITS - u32::BITS)) as u32, seen }
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Position { epoch, lsn } = self.seen;
        write!(f, "{TOKEN_VERSION}.{:0TOKEN_CLUSTER_DIGITS$x}.{epoch}.{lsn}", self.cluster)
    }
}

/// What was given is not a token.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("not a token: SESSION tells one, such as w1.9f31c2aa.3.16/B374D848")]
pub struct TokenSyntax;

impl FromStr for Token {
    type Err = TokenSyntax;
    fn from_str(text: &str) -> Result<Token, TokenSyntax> {
        let mut parts = text.split('.');
        let mut part = || parts.next().ok_or(TokenSyntax);
        let (version, cluster, epoch, lsn) = (part()?, part()?, part()?, part()?);
        let hex = cluster.len() == TOKEN_CLUSTER_DIGITS && cluster.bytes().all(|digit| digit.is_ascii_hexdigit());
        if version != TOKEN_VERSION || !hex || parts.next().is_some() {
            return Err(TokenSyntax);
        }
        let cluster = u32::from_str_radix(cluster, 16).map_err(|_| TokenSyntax)?;
        let epoch: Epoch = epoch.parse().map_err(|_| TokenSyntax)?;
        let lsn: Lsn = lsn.parse().map_err(|_| TokenSyntax)?;
        // Nothing was ever written in epoch 0.
        if (epoch == Epoch(0)) != (lsn == Lsn::ZERO) {
            return Err(TokenSyntax);
        }
        Ok(Token { cluster, seen: Position { epoch, lsn } })
    }
}

/// READ: how good the state has to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Whatever this node has applied.
    #[default]
    Any,
    /// At most so old.
    AtMost(Duration),
    /// What survives a failover.
    Committed,
    /// The newest of all, as if there were one node only.
    Strong,
}

impl Mode {
    /// Whether it depends on what time it is.
    pub fn is_timed(self) -> bool {
        matches!(self, Mode::AtMost(_) | Mode::Strong)
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Mode::Any => f.write_str("ANY"),
            Mode::AtMost(age) => write!(f, "AT MOST {}", Span(*age)),
            Mode::Committed => f.write_str("COMMITTED"),
            Mode::Strong => f.write_str("STRONG"),
        }
    }
}

/// What a read asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Guarantee {
    /// The state must contain the log up to here.
    pub floor: Position,
    /// And this good.
    pub mode: Mode,
}

/// Whether a node may answer strong reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Strong {
    /// It leads, holds its lease, and has applied all that was there before.
    Held,
    /// It leads, and has not applied all that was there before.
    Replaying,
    /// It may not; the error.
    Refused(String),
}

/// How good a node's state is.
#[derive(Clone, Debug)]
pub struct Facts<'a> {
    /// The epochs of its log.
    pub history: &'a EpochHistory,
    /// What its readers see at once.
    pub applied: Lsn,
    /// What they can see when they wait for the disk; `applied <= readable`.
    pub readable: Lsn,
    /// What was durable on the leader so long ago is applied; `None` when the node cannot say.
    pub staleness: Option<Duration>,
    /// Whether it may answer strong reads.
    pub strong: Strong,
}

/// What a read has to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// The floor.
    Floor,
    /// A newer state, or to know how old it is.
    Fresh,
    /// The part of the log that was there before this node led.
    Replay,
}

/// Whether a read may be answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Yes.
    Ready,
    /// The state is not good enough yet; what is missing.
    Wait(Missing),
    /// Never; the error.
    Refuse(String),
}

/// What became of a position in a log with some history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is in this log, or will be.
    Kept,
    /// It is of an epoch that this log has not heard of yet.
    Unknown,
    /// It is not: this later epoch began before it.
    Lost {
        /// The epoch.
        to: Epoch,
        /// Where it began.
        start: Lsn,
    },
}

/// What became of `position`: an epoch has one leader, so epoch and LSN name one beginning of the log.
pub fn fate(position: Position, history: &EpochHistory) -> Fate {
    let entries = history.entries();
    if position.lsn == Lsn::ZERO {
        return Fate::Kept;
    }
    let older = entries.partition_point(|entry| entry.0.number() < position.epoch.number());
    let (known, next) = match entries.get(older) {
        Some(entry) if entry.0 == position.epoch => (true, older + 1),
        // Another leader began an epoch with its number.
        Some(entry) if entry.0.number() == position.epoch.number() => (false, older),
        // Older than all that is remembered: then only its end counts.
        _ => (older == 0, older),
    };
    match entries.get(next) {
        None if known && next > 0 => Fate::Kept,
        None => Fate::Unknown,
        Some(&(_, start)) if known && position.lsn <= start => Fate::Kept,
        Some(&(to, start)) => Fate::Lost { to, start },
    }
}

/// The error for a session that has seen what a failover took back.
pub fn lost(floor: Position, history: &EpochHistory) -> Option<String> {
    let Fate::Lost { to, start } = fate(floor, history) else { return None };
    let Position { epoch, lsn } = floor;
    Some(format!(
        "LOST what this session has seen up to {lsn} in epoch {epoch} was lost in the failover to epoch {to}, which began at \
         {start}; SESSION RESET goes on from there"
    ))
}

/// Whether a read with this guarantee may be answered from a state with these facts.
pub fn judge(guarantee: &Guarantee, facts: &Facts<'_>) -> Verdict {
    let floor = guarantee.floor;
    if let Some(error) = lost(floor, facts.history) {
        return Verdict::Refuse(error);
    }
    if guarantee.mode == Mode::Strong
        && let Strong::Refused(error) = &facts.strong
    {
        return Verdict::Refuse(error.clone());
    }
    if fate(floor, facts.history) == Fate::Unknown || facts.readable < floor.lsn {
        return Verdict::Wait(Missing::Floor);
    }
    match guarantee.mode {
        Mode::Strong if facts.strong == Strong::Replaying => Verdict::Wait(Missing::Replay),
        Mode::AtMost(age) if facts.staleness.is_none_or(|staleness| staleness > age) => Verdict::Wait(Missing::Fresh),
        Mode::Any | Mode::AtMost(_) | Mode::Committed | Mode::Strong => Verdict::Ready,
    }
}

/// The error for a read that waited in vain.
pub fn waited(missing: Missing, guarantee: &Guarantee, facts: &Facts<'_>) -> String {
    let applied = facts.applied;
    match (missing, guarantee.mode) {
        (Missing::Fresh, Mode::AtMost(age)) => {
            let may_be = match facts.staleness {
                Some(staleness) => format!("this node's state may be {} ms old", staleness.as_millis()),
                None => "this node cannot say how old its state is".to_owned(),
            };
            format!("STALE {may_be}, at most {} ms were asked for; it has applied {applied}", age.as_millis())
        }
        (Missing::Floor, _) => {
            let Position { epoch, lsn } = guarantee.floor;
            let ours = facts.history.last_epoch();
            let epochs =
                if epoch > ours { format!(" in epoch {epoch}, this node knows epoch {ours}") } else { String::new() };
            format!(
                "BEHIND this node has applied {applied}, the session has seen {lsn}{epochs}; wait longer (READ TIMEOUT) or ask \
                 another node"
            )
        }
        (Missing::Fresh | Missing::Replay, _) => {
            format!("BEHIND this node has applied {applied} and not yet all that its log held when it began to lead")
        }
    }
}

#[cfg(test)]
#[path = "reading_tests.rs"]
mod tests;
