//! What a leader's messages mean to a replica: bytes in, steps out. A core: holds the phase of one connection and what has
//! arrived of the current message; the link gives it bytes and does what it says. Knows no socket and no disk.

use walferry_cluster::error::MessageError;
use walferry_cluster::message::{ENVELOPE_BYTES, LinkHeartbeat, MESSAGE_BYTES_MAX, Message, Refuse, Welcome, decode};
use walferry_engine::lsn::Lsn;

/// What is received at once while messages are small.
pub const STAGING_BYTES: usize = 256 << 10;

const _: () = assert!(MESSAGE_BYTES_MAX <= STAGING_BYTES);

/// What the link has to do next.
#[derive(Debug, PartialEq)]
pub enum Step {
    /// Receive more.
    More,
    /// The leader takes this replica: persist its history, truncate, then `accept`.
    Welcome(Welcome),
    /// The leader does not; nothing follows.
    Refuse(Refuse),
    /// A hot frame of this many bytes stands at the front of what was received; `consume` it once the log took it.
    Frame {
        /// Header and records.
        wire_bytes: usize,
        /// The leader asks where the time for it goes.
        traced: bool,
    },
    /// Raw log bytes are due at this position; `raw` tells how many. Take them from the front first.
    Raw,
    /// Where the leader is.
    Heartbeat(LinkHeartbeat),
}

/// Why a connection is of no use any more.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum ProtocolError {
    /// The bytes are not a valid message.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// A message that does not belong here.
    #[error("the leader sent {what} {when}")]
    Unexpected {
        /// The message.
        what: &'static str,
        /// The phase.
        when: &'static str,
    },
    /// Raw bytes for another place than the end of the log.
    #[error("the leader sent log bytes for {lsn}, but {expected} comes next")]
    Place {
        /// Where they belong.
        lsn: Lsn,
        /// What the replica needs.
        expected: Lsn,
    },
}

/// One connection's receiving side.
#[derive(Debug)]
pub struct Receiver {
    staging: Vec<u8>,
    from: usize,
    to: usize,
    welcomed: bool,
    raw_bytes: u64,
}

impl Default for Receiver {
    fn default() -> Receiver {
        Receiver { staging: vec![0; STAGING_BYTES], from: 0, to: 0, welcomed: false, raw_bytes: 0 }
    }
}

impl Receiver {
    /// A new connection.
    pub fn reset(&mut self) {
        (self.from, self.to, self.welcomed, self.raw_bytes) = (0, 0, false, 0);
    }

    /// Where the next bytes go; never empty after `More`.
    pub fn space(&mut self) -> &mut [u8] {
        if self.from == self.to {
            (self.from, self.to) = (0, 0);
        }
        &mut self.staging[self.to..]
    }

    /// `bytes` arrived in the space.
    pub fn advance(&mut self, bytes: usize) {
        assert!(self.to + bytes <= self.staging.len());
        self.to += bytes;
    }

    /// What was received and not consumed.
    pub fn front(&self) -> &[u8] {
        &self.staging[self.from..self.to]
    }

    /// The first `bytes` of the front are done with.
    pub fn consume(&mut self, bytes: usize) {
        assert!(self.from + bytes <= self.to);
        self.from += bytes;
    }

    /// Raw log bytes that are still due.
    pub fn raw(&self) -> u64 {
        self.raw_bytes
    }

    /// That many of them went into the log.
    pub fn raw_done(&mut self, bytes: u64) {
        assert!(bytes <= self.raw_bytes);
        self.raw_bytes -= bytes;
    }

    /// The welcome was followed: frames may come.
    pub fn accept(&mut self) {
        self.welcomed = true;
    }

    /// Looks at what was received. `end` is where the next log byte belongs.
    pub fn step(&mut self, end: Lsn) -> Result<Step, ProtocolError> {
        if self.raw_bytes > 0 {
            return Ok(Step::Raw);
        }
        let Some((message, length)) = decode(self.front())? else {
            self.reserve(MESSAGE_BYTES_MAX);
            return Ok(Step::More);
        };
        if let Message::Frame { wire_bytes, traced } = message {
            self.expect_welcomed("a frame")?;
            if self.front().len() < length + wire_bytes {
                self.reserve(ENVELOPE_BYTES + wire_bytes);
                return Ok(Step::More);
            }
            self.consume(length);
            return Ok(Step::Frame { wire_bytes, traced });
        }
        self.consume(length);
        match message {
            Message::Welcome(welcome) if !self.welcomed => Ok(Step::Welcome(welcome)),
            Message::Refuse(refuse) => Ok(Step::Refuse(refuse)),
            Message::LinkHeartbeat(heartbeat) => {
                self.expect_welcomed("a heartbeat")?;
                Ok(Step::Heartbeat(heartbeat))
            }
            Message::Chunk(chunk) => {
                self.expect_welcomed("a chunk")?;
                if chunk.lsn != end {
                    return Err(ProtocolError::Place { lsn: chunk.lsn, expected: end });
                }
                self.raw_bytes = chunk.bytes;
                Ok(Step::Raw)
            }
            Message::Welcome(_) => Err(ProtocolError::Unexpected { what: "a welcome", when: "twice" }),
            Message::Hello(_) => Err(ProtocolError::Unexpected { what: "a hello", when: "to its replica" }),
            Message::Ack(_) | Message::Traced(_) => {
                Err(ProtocolError::Unexpected { what: "an ack", when: "to its replica" })
            }
            Message::Fetch(_)
            | Message::Preparing { .. }
            | Message::Offer(_)
            | Message::Piece(_)
            | Message::FetchFrames(_)
            | Message::FetchedFrames(_) => {
                Err(ProtocolError::Unexpected { what: "a part of a snapshot", when: "on the log's connection" })
            }
            Message::Frame { .. } => unreachable!("handled above"),
        }
    }

    fn expect_welcomed(&self, what: &'static str) -> Result<(), ProtocolError> {
        if self.welcomed { Ok(()) } else { Err(ProtocolError::Unexpected { what, when: "before its welcome" }) }
    }

    /// Makes the staging memory fit a message of `bytes` from the front on. `decode` bounds them.
    fn reserve(&mut self, bytes: usize) {
        if self.from > 0 && self.staging.len() - self.from < bytes {
            self.staging.copy_within(self.from..self.to, 0);
            (self.from, self.to) = (0, self.to - self.from);
        }
        if self.staging.len() < bytes {
            self.staging.resize(bytes, 0);
        } else if bytes <= STAGING_BYTES && self.staging.len() > STAGING_BYTES && self.to <= STAGING_BYTES {
            self.staging.truncate(STAGING_BYTES);
            self.staging.shrink_to_fit();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use walferry_cluster::member::{ClusterId, MemberName};
    use walferry_cluster::message::{Chunk, PROTOCOL_VERSION, frame_envelope};
    use walferry_engine::lsn::Epoch;

    fn welcome() -> Message {
        Message::Welcome(Welcome {
            protocol: PROTOCOL_VERSION,
            cluster_id: ClusterId(7),
            name: "a".parse::<MemberName>().unwrap(),
            start: Lsn::ZERO,
            segment_bytes: 1 << 26,
            client_address: String::new(),
            heartbeat_ms: 1000,
            history: vec![(Epoch(1), Lsn::ZERO)],
            policy: "ANY 1 (b)".parse().unwrap(),
        })
    }

    /// Feeds `bytes` in pieces of `piece` and writes down the steps.
    fn run(bytes: &[u8], piece: usize) -> Result<Vec<String>, ProtocolError> {
        let mut receiver = Receiver::default();
        let mut end = Lsn::ZERO;
        let mut steps = Vec::new();
        let mut pieces = bytes.chunks(piece);
        loop {
            match receiver.step(end)? {
                Step::More => {
                    let Some(piece) = pieces.next() else { return Ok(steps) };
                    receiver.space()[..piece.len()].copy_from_slice(piece);
                    receiver.advance(piece.len());
                }
                Step::Welcome(_) => {
                    receiver.accept();
                    steps.push("welcome".to_owned());
                }
                Step::Frame { wire_bytes, .. } => {
                    steps.push(format!("frame {:?}", &receiver.front()[..wire_bytes.min(2)]));
                    receiver.consume(wire_bytes);
                }
                Step::Raw => {
                    let bytes = receiver.front().len().min(receiver.raw() as usize);
                    if bytes == 0 {
                        let Some(piece) = pieces.next() else { return Ok(steps) };
                        receiver.space()[..piece.len()].copy_from_slice(piece);
                        receiver.advance(piece.len());
                        continue;
                    }
                    receiver.consume(bytes);
                    receiver.raw_done(bytes as u64);
                    end = end.advance(bytes as u64);
                    if receiver.raw() == 0 {
                        steps.push(format!("raw up to {end}"));
                    }
                }
                Step::Heartbeat(heartbeat) => steps.push(format!("heartbeat {}", heartbeat.flushed)),
                Step::Refuse(refuse) => steps.push(refuse.text),
            }
        }
    }

    #[test]
    fn a_conversation_means_the_same_wherever_it_is_cut() {
        let mut bytes = Vec::new();
        welcome().encode(&mut bytes);
        Message::Chunk(Chunk { lsn: Lsn::ZERO, bytes: 8192 }).encode(&mut bytes);
        bytes.extend_from_slice(&[9; 8192]);
        let frame = [8; 100];
        bytes.extend_from_slice(&frame_envelope(frame.len(), false));
        bytes.extend_from_slice(&frame);
        let heartbeat = LinkHeartbeat { flushed: Lsn(5), end: Lsn(6), sent_at_us: 1, ..LinkHeartbeat::default() };
        Message::LinkHeartbeat(heartbeat).encode(&mut bytes);
        let expected = ["welcome", "raw up to 0/2000", "frame [8, 8]", "heartbeat 0/5"];
        for piece in [1, 7, 100, 4096, bytes.len()] {
            assert_eq!(run(&bytes, piece).unwrap(), expected, "in pieces of {piece}");
        }
    }

    #[test]
    fn what_does_not_belong_is_an_error() {
        let mut early = Vec::new();
        Message::LinkHeartbeat(LinkHeartbeat { sent_at_us: 1, ..LinkHeartbeat::default() }).encode(&mut early);
        assert!(matches!(run(&early, 64), Err(ProtocolError::Unexpected { .. })));
        let mut misplaced = Vec::new();
        welcome().encode(&mut misplaced);
        Message::Chunk(Chunk { lsn: Lsn(4096), bytes: 1 }).encode(&mut misplaced);
        assert!(matches!(run(&misplaced, 64), Err(ProtocolError::Place { .. })));
        assert!(run(&[0xff; 64], 64).is_err(), "garbage is refused");
    }
}
