//! The replies of one session in order, and what each is held for. Used by `session`; knows commit levels and LSNs, but neither
//! commands nor sockets.
//!
//! ```text
//! reply.bytes:  | may leave (`ready`) | part | part | part |
//! ```
//!
//! A part is one reply that is held, or that stands behind one that is. The front part leaves when its level has reached its LSN.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::{Buf, BytesMut};
use walferry_cluster::level::CommitLevel;
use walferry_engine::lsn::Lsn;

use crate::session::host::Host;
use crate::session::id::SessionId;
use crate::session::reading::Position;
use crate::session::reply::Reply;

/// With this many replies held a session executes nothing further until some have left.
pub const HELD_REPLIES_MAX: usize = 64 << 10;
/// With this many bytes of replies not yet sent a session executes nothing further until some were. Fifty clients that ask for
/// much at the same moment hold up the others for as long as it takes to copy this much for each.
pub const OUTPUT_BYTES_MAX: usize = 1 << 20;
/// A buffer that one large reply made larger than this is given back.
const KEPT_CAPACITY_BYTES_MAX: usize = 1 << 20;

/// Why a reply may not leave yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// The reply may be sent now.
    Nothing,
    /// It tells of changes that are not durable yet: until `Local` has reached this LSN.
    Seen(Lsn),
    /// It tells what has to survive a failover: until that is committed.
    Committed(Position),
    /// It confirms this commit: until the level has reached it.
    Commit(CommitLevel, Lsn),
}

#[derive(Clone, Copy, Debug)]
struct Part {
    bytes: usize,
    hold: Hold,
    at: Instant,
    deadline: Option<Instant>,
    /// The deadline passed before the commit was even durable here.
    overdue: bool,
}

/// The session's last commit whose acknowledgement left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Acknowledged {
    /// The end of its record.
    pub position: Position,
    /// The level that was asked for.
    pub level: CommitLevel,
    /// The level that it held when it was answered.
    pub met: CommitLevel,
    /// From execution to release.
    pub held_for: Duration,
    /// It held the level that was asked for: false for `-UNCERTAIN`, and where the node had degraded.
    pub confirmed: bool,
}

/// The replies of one session.
#[derive(Debug, Default)]
pub struct Outbox {
    /// Where the next reply is written.
    pub reply: Reply,
    ready: usize,
    parts: VecDeque<Part>,
    output: BytesMut,
    /// Asked of the host at the end of the batch: one hold for many replies.
    batch: Option<(CommitLevel, Lsn)>,
    /// What was acknowledged last.
    pub acknowledged: Option<Acknowledged>,
    /// What became of reads of committed state since the session asked.
    committed_reads: CommittedReads,
}

/// What became of reads that were held until they are committed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CommittedReads {
    /// The newest that was told.
    pub told: Option<Position>,
    /// Some were not told: what they would have shown was not seen.
    pub untold: bool,
}

impl Hold {
    /// For commit levels; what has to be committed has a queue of its own.
    fn target(self) -> Option<(CommitLevel, Lsn)> {
        match self {
            Hold::Nothing | Hold::Committed(_) => None,
            Hold::Seen(lsn) => Some((CommitLevel::Local, lsn)),
            Hold::Commit(level, lsn) => Some((level, lsn)),
        }
    }
}

/// What stands in the place of a reply that is not told.
fn abandoned(hold: Hold, reason: &str) -> String {
    match hold {
        Hold::Nothing => String::new(),
        Hold::Seen(lsn) => format!("UNCERTAIN what was read is durable only at {lsn}: {reason}"),
        Hold::Committed(Position { lsn, .. }) => {
            format!("UNCOMMITTED what was read is not committed up to {lsn}: {reason}")
        }
        Hold::Commit(_, lsn) => format!("UNCERTAIN the commit at {lsn} is not confirmed: {reason}"),
    }
}

impl Outbox {
    /// The reply that was written since `reply.begin` is complete.
    pub fn push(&mut self, hold: Hold, timeout: Option<Duration>, id: SessionId, host: &mut dyn Host) {
        self.reply.finish();
        let bytes = self.reply.written();
        match hold.target() {
            None if matches!(hold, Hold::Committed(_)) => {}
            None if self.parts.is_empty() => {
                self.ready += bytes;
                return;
            }
            None => {}
            // At level off nothing is held back for; the LSN is still the session's last commit.
            Some((CommitLevel::Off, lsn)) if self.parts.is_empty() => {
                self.ready += bytes;
                let held_for = Duration::ZERO;
                let (position, level) = (Position::at(lsn, host.history()), CommitLevel::Off);
                self.acknowledged = Some(Acknowledged { position, level, met: level, held_for, confirmed: true });
                return;
            }
            Some((CommitLevel::Off, _)) => {}
            Some((level, lsn)) => self.ask(level, lsn, id, host),
        }
        let at = host.now();
        let deadline = match hold {
            Hold::Commit(CommitLevel::Off, _) | Hold::Nothing => None,
            Hold::Commit(..) | Hold::Seen(_) | Hold::Committed(_) => timeout.map(|timeout| at + timeout),
        };
        self.parts.push_back(Part { bytes, hold, at, deadline, overdue: false });
        if let Hold::Committed(position) = hold {
            host.hold_committed(id, position.lsn);
            if timeout == Some(Duration::ZERO) {
                // It is not waited for at all.
                self.release(id, host);
            }
        }
    }

    fn ask(&mut self, level: CommitLevel, lsn: Lsn, id: SessionId, host: &mut dyn Host) {
        match &mut self.batch {
            Some((asked, highest)) if *asked == level => *highest = lsn.max(*highest),
            _ => {
                self.end_batch(id, host);
                self.batch = Some((level, lsn));
            }
        }
    }

    /// The input of this turn is done: asks the host for what its replies are held for.
    pub fn end_batch(&mut self, id: SessionId, host: &mut dyn Host) {
        if let Some((level, lsn)) = self.batch.take() {
            host.hold(id, level, lsn);
        }
    }

    /// Lets go of every reply whose level has reached its LSN, in order, and answers `-UNCERTAIN` for commits that are durable
    /// here but overdue elsewhere.
    pub fn release(&mut self, id: SessionId, host: &mut dyn Host) {
        let mut known: Option<(CommitLevel, Lsn)> = None;
        while let Some(part) = self.parts.front().copied() {
            if let Hold::Committed(position) = part.hold {
                let committed = host.committed_here();
                if committed >= position.lsn {
                    self.committed_reads.told = self.committed_reads.told.max(Some(position));
                } else if part.deadline.is_some_and(|deadline| host.now() >= deadline) {
                    self.committed_reads.untold = true;
                    let lsn = position.lsn;
                    self.replace(format_args!(
                        "UNCOMMITTED what was read reaches up to {lsn}, and is committed up to {committed} only; a failover may \
                         take it back"
                    ));
                } else {
                    return;
                }
            }
            if let Some((level, lsn)) = part.hold.target() {
                let released = match known {
                    Some((of, released)) if of == level => released,
                    _ => host.released(level),
                };
                known = Some((level, released));
                if released < lsn && !self.expire(part, id, host) {
                    return;
                }
                if released >= lsn
                    && !self.acknowledge(&part, host)
                    && let Some(reason) = host.unconfirmable(level)
                {
                    // Who had to confirm it is no member any more.
                    self.replace(abandoned(part.hold, &reason));
                }
            }
            // `expire` may have changed the length.
            self.ready += self.parts.pop_front().map_or(0, |part| part.bytes);
        }
    }

    /// Notes the evidence of a commit. False when it does not hold the level that was asked for.
    fn acknowledge(&mut self, part: &Part, host: &dyn Host) -> bool {
        let Hold::Commit(level, lsn) = part.hold else { return true };
        let held_for = host.now().saturating_duration_since(part.at);
        // A reply that outlives its leadership is abandoned: the epoch at `lsn` is the one that wrote the record.
        let position = Position::at(lsn, host.history());
        let met = host.met(level, lsn);
        let confirmed = met == level;
        self.acknowledged = Some(Acknowledged { position, level, met, held_for, confirmed });
        confirmed
    }

    /// Replaces the front part's reply by `-UNCERTAIN` if its time is up and it is durable here, or nobody may say so.
    fn expire(&mut self, part: Part, id: SessionId, host: &mut dyn Host) -> bool {
        let (Some((level, lsn)), Some(deadline)) = (part.hold.target(), part.deadline) else {
            return false;
        };
        let now = host.now();
        if now < deadline {
            return false;
        }
        if let Some(reason) = host.silent() {
            self.replace(abandoned(part.hold, &reason));
            self.acknowledge(&part, host);
            return true;
        }
        if level <= CommitLevel::Local {
            // It is asked for already: the disk is slow, or the node stops and says so.
            self.parts[0].overdue = true;
            return false;
        }
        if host.released(CommitLevel::Local) < lsn {
            // Not even durable here: that comes soon, or the node stops and says so.
            if !part.overdue {
                self.parts[0].overdue = true;
                host.hold(id, CommitLevel::Local, lsn);
            }
            return false;
        }
        let by = host.unconfirmed_by(lsn, level);
        self.replace(format_args!("UNCERTAIN committed locally at {lsn}, not confirmed by {by} at level {level}"));
        self.acknowledge(&part, host);
        true
    }

    /// Writes `error` in place of the front part's reply.
    fn replace(&mut self, error: impl std::fmt::Display) {
        let Some(part) = self.parts.front_mut() else {
            return;
        };
        let mut line = Reply::default();
        line.error(error);
        let bytes = self.reply.bytes();
        let tail = bytes.split_off(self.ready);
        bytes.extend_from_slice(line.bytes());
        bytes.extend_from_slice(&tail[part.bytes..]);
        part.bytes = line.buffered();
    }

    /// The node no longer answers commits: every held reply says that its fate is not known, and may leave.
    pub fn abandon(&mut self, reason: &str) {
        while let Some(part) = self.parts.front() {
            let hold = part.hold;
            self.committed_reads.untold |= matches!(hold, Hold::Committed(_));
            if hold != Hold::Nothing {
                self.replace(abandoned(hold, reason));
            }
            self.ready += self.parts.pop_front().map_or(0, |part| part.bytes);
        }
        self.batch = None;
    }

    /// What became of reads that were held until they are committed, told once.
    pub fn take_committed_reads(&mut self) -> CommittedReads {
        std::mem::take(&mut self.committed_reads)
    }

    /// When the front reply becomes `-UNCERTAIN` or `-UNCOMMITTED`.
    pub fn deadline(&self) -> Option<Instant> {
        self.parts.front().filter(|part| !part.overdue).and_then(|part| part.deadline)
    }

    /// True when nothing more should be executed before something has left.
    pub fn is_full(&self) -> bool {
        self.parts.len() >= HELD_REPLIES_MAX || self.reply.buffered() + self.output.len() >= OUTPUT_BYTES_MAX
    }

    /// True when replies are held.
    pub fn is_holding(&self) -> bool {
        !self.parts.is_empty()
    }

    /// How many replies are held.
    pub fn held_replies(&self) -> usize {
        self.parts.len()
    }

    /// The memory of replies that were not taken.
    pub fn kept_bytes(&self) -> usize {
        self.reply.buffered() + self.output.len() + self.parts.len() * size_of::<Part>()
    }

    /// The bytes that may be sent now; the caller takes them out.
    pub fn output(&mut self) -> &mut BytesMut {
        let bytes = self.reply.bytes();
        if self.ready == bytes.len() && self.output.is_empty() {
            std::mem::swap(bytes, &mut self.output);
            if bytes.capacity() > KEPT_CAPACITY_BYTES_MAX {
                *bytes = BytesMut::new();
            }
        } else if self.ready > 0 {
            self.output.extend_from_slice(&bytes[..self.ready]);
            bytes.advance(self.ready);
        }
        self.ready = 0;
        &mut self.output
    }
}
