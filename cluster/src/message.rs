//! What a leader and a replica say to each other, and its bytes. Pure: bytes in, messages out. The shipper and the
//! applier drive it; it knows no socket and no log.
//!
//! A connection is opened by the replica. It says `Hello`; the leader answers `Welcome` or `Refuse` (and closes). Then
//! the leader sends `Chunk`, `Frame` and `Heartbeat`, and may end with `Refuse`; the replica sends `Ack`, at least
//! one per heartbeat interval, as a sign of life. All integers little-endian.
//!
//! ```text
//! envelope    0  body length      4   bytes after the envelope, for all kinds but Chunk's raw bytes
//!             4  kind             1
//!             5  flags            1   of a Frame: 1 = traced, the replica answers it with Traced; else 0
//!             6  zeros            2
//!
//! 1 Hello     0  magic            4   "WFPR"; stays in front in every later protocol version
//!             4  protocol         2   1
//!             6  name length      1   1-63
//!             7  address length   1   <= ADDRESS_BYTES_MAX
//!             8  cluster id      16   0: none yet, takes the leader's
//!            24  flushed lsn      8   end of the replica's durable log, always the end of a frame
//!            32  segment bytes    8   the replica's segment size; must be the leader's
//!            40  crc              4   of the frame that ends at the flushed lsn, 0 for an empty log
//!            44  epoch count      4   <= EPOCHS_PER_MESSAGE_MAX
//!            48  epochs          16   each: epoch 8, lsn of its first frame 8; ascending
//!             .  name                 the replica's, and the name of its slot
//!             .  address              where clients reach the replica, `HOST:PORT`; may be empty
//! 2 Welcome   0  magic            4   "WFPR"
//!             4  protocol         2   1
//!             6  name length      1
//!             7  address length   1   <= ADDRESS_BYTES_MAX
//!             8  cluster id      16
//!            24  start lsn        8   the stream starts here: <= Hello's flushed lsn. If it is less, the replica
//!                                     has frames that the leader does not have: it truncates its log to here
//!            32  segment bytes    8   the leader's
//!            40  heartbeat ms     4   the leader sends something at least this often, and expects the same
//!            44  epoch count      4
//!            48  epochs          16   each, as in Hello; to be durable at the replica before any byte of the log is
//!             .  name                 the leader's
//!             .  address              where clients reach the leader, `HOST:PORT`, for -READONLY; may be empty
//! 3 Refuse    0  code             2   RefuseCode
//!             2  zeros            2
//!             4  text                 one line for people, <= REFUSE_TEXT_BYTES_MAX
//! 4 Frame     the frame as it stands in the log without its padding: body length = FrameHeader::wire_bytes().
//!             It starts where the bytes sent before it ended, its own padding counted as sent.
//! 5 Chunk     0  lsn              8   position of the first raw byte: where the bytes sent before it ended
//!             8  bytes            8   1..=CHUNK_BYTES_MAX
//!            body length is 16; `bytes` raw bytes of the log, padding and all, follow the body.
//!             A chunk may end inside a frame. Then the next Chunk goes on there; Heartbeats may stand between,
//!             a Frame does not.
//! 6 Heartbeat 0  end lsn          8   end of the leader's log (sealed frames)
//!             8  flushed lsn      8   durable at the leader: the replica may apply up to here
//!            16  committed lsn    8   confirmed by the sync policy: a checkpoint may hold up to here
//!            24  sent at          8   microseconds by a clock of the leader's own; to be echoed in the next Ack
//!            32  epoch            8   the leader's epoch
//!             sent when the flushed lsn grew and no frame that says so is about to go, and once per interval.
//!             A frame's header carries flushed and commit lsn as well.
//! 7 Ack       0  written lsn      8   handed to the replica's disk; whole frames
//!             8  flushed lsn      8   durable at the replica
//!            16  applied lsn      8   visible to the replica's readers; applied <= flushed <= written
//!            24  echo             8   `sent at` of the last heartbeat, 0 when none came yet or it was echoed before
//!            32  echo held us     4   for how long the replica held that heartbeat
//!            36  write us         4   for the newest frame concerned: receipt of its last byte to written
//!            40  flush us         4   receipt of its last byte to flushed
//!            44  apply us         4   flushed to applied
//! 8 Traced    0  end lsn          8   end of the traced frame
//!             8  flushes          8   durable writes of the replica since it started
//!            16  records          8   records in them
//!            24  written us       4   receipt of the frame's last byte to the Ack that told it was written
//!            28  flushed us       4   ... to the Ack that told it was durable
//!            32  applied us       4   ... to the Ack that told it was applied; the Traced follows that Ack
//!            36  zeros            4
//! ```

use std::fmt;

use walferry_engine::lsn::{Epoch, Lsn};

use crate::member::{ClusterId, MEMBER_NAME_BYTES_MAX, MemberName};

mod codec;
#[cfg(test)]
mod tests;

pub use codec::{decode, frame_envelope};

/// The version of this protocol; both sides must have the same.
pub const PROTOCOL_VERSION: u16 = 1;
/// Bytes in front of every message.
pub const ENVELOPE_BYTES: usize = 8;
/// Epochs that a handshake carries; of a longer history the newest.
pub const EPOCHS_PER_MESSAGE_MAX: usize = 4096;
/// The longest text of a refusal; a longer one is cut.
pub const REFUSE_TEXT_BYTES_MAX: usize = 512;
/// The longest address for clients.
pub const ADDRESS_BYTES_MAX: usize = 255;
/// Raw bytes in a chunk, at most. Between chunks there is room for a heartbeat.
pub const CHUNK_BYTES_MAX: u64 = 8 << 20;
/// Bytes of a message with its envelope, frames' and chunks' raw bytes aside: a receive buffer of this size suffices.
pub const MESSAGE_BYTES_MAX: usize = ENVELOPE_BYTES
    + HANDSHAKE_FIXED_BYTES
    + EPOCHS_PER_MESSAGE_MAX * EPOCH_BYTES
    + MEMBER_NAME_BYTES_MAX
    + ADDRESS_BYTES_MAX;
/// Bytes of an Ack with its envelope.
pub const ACK_BYTES: usize = ENVELOPE_BYTES + ACK_BODY_BYTES;
/// Bytes of a Heartbeat with its envelope.
pub const HEARTBEAT_BYTES: usize = ENVELOPE_BYTES + HEARTBEAT_BODY_BYTES;

const HANDSHAKE_FIXED_BYTES: usize = 48;
const EPOCH_BYTES: usize = 16;
const HEARTBEAT_BODY_BYTES: usize = 40;
const ACK_BODY_BYTES: usize = 48;
const TRACED_BODY_BYTES: usize = 40;
const REFUSE_FIXED_BYTES: usize = 4;

const _: () = assert!(MESSAGE_BYTES_MAX <= 128 << 10);
const _: () = assert!(REFUSE_FIXED_BYTES + REFUSE_TEXT_BYTES_MAX <= MESSAGE_BYTES_MAX);

/// The replica's first message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The replica's protocol version. With another version than ours the other fields are unknown (and empty).
    pub protocol: u16,
    /// `None` for a replica that belongs to no cluster yet.
    pub cluster_id: Option<ClusterId>,
    /// The replica's name, and its slot's.
    pub name: MemberName,
    /// Where clients reach the replica; for status.
    pub client_address: String,
    /// End of the replica's durable log.
    pub flushed: Lsn,
    /// The replica's segment size.
    pub segment_bytes: u64,
    /// The crc of the frame that ends at `flushed`; 0 for an empty log.
    pub crc: u32,
    /// The replica's epoch history, ascending; at most the newest EPOCHS_PER_MESSAGE_MAX.
    pub history: Vec<(Epoch, Lsn)>,
}

/// The leader's answer when it will stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// The leader's protocol version.
    pub protocol: u16,
    /// The cluster.
    pub cluster_id: ClusterId,
    /// The leader's name.
    pub name: MemberName,
    /// Where the stream starts; the replica truncates its log to here first.
    pub start: Lsn,
    /// The leader's segment size.
    pub segment_bytes: u64,
    /// Where clients reach the leader; empty when unknown. At most ADDRESS_BYTES_MAX.
    pub client_address: String,
    /// The leader's heartbeat interval, milliseconds.
    pub heartbeat_ms: u32,
    /// The leader's epoch history, ascending.
    pub history: Vec<(Epoch, Lsn)>,
}

/// Why a leader does not stream, or stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum RefuseCode {
    /// The protocol versions differ.
    Protocol = 1,
    /// The replica belongs to another cluster.
    ClusterId = 2,
    /// The replica knows a newer epoch: this leader is superseded.
    NewerEpoch = 3,
    /// The replica's log is not an earlier state of the leader's and cannot be truncated to one.
    Diverged = 4,
    /// The log that the replica needs was recycled (its slot is lost).
    LogGone = 5,
    /// This node does not lead.
    NotLeader = 6,
    /// The leader has as many replicas as it can take.
    Full = 7,
    /// The replica broke the protocol.
    Protest = 8,
    /// The leader stops.
    Stopping = 9,
    /// Another connection with the same name took this one's place.
    Replaced = 10,
    /// The segment sizes differ.
    SegmentBytes = 11,
}

impl RefuseCode {
    /// Every code.
    pub const ALL: [RefuseCode; 11] = {
        use RefuseCode::*;
        [Protocol, ClusterId, NewerEpoch, Diverged, LogGone, NotLeader, Full, Protest, Stopping, Replaced, SegmentBytes]
    };

    pub(crate) fn from_number(number: u16) -> Option<RefuseCode> {
        RefuseCode::ALL.into_iter().find(|code| *code as u16 == number)
    }

    /// True when trying again later may succeed without anybody's help.
    pub fn is_passing(self) -> bool {
        matches!(
            self,
            RefuseCode::NotLeader
                | RefuseCode::Full
                | RefuseCode::Stopping
                | RefuseCode::NewerEpoch
                | RefuseCode::Replaced
        )
    }
}

/// The leader's last message on a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refuse {
    /// For programs.
    pub code: RefuseCode,
    /// For people: one line.
    pub text: String,
}

impl fmt::Display for Refuse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Where the leader is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Heartbeat {
    /// End of the leader's sealed frames; `committed <= flushed <= end`.
    pub end: Lsn,
    /// Durable at the leader.
    pub flushed: Lsn,
    /// Confirmed by the sync policy.
    pub committed: Lsn,
    /// Microseconds by a clock of the leader's own, never 0.
    pub sent_at_us: u64,
    /// The leader's epoch.
    pub epoch: Epoch,
}

/// Where the replica is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ack {
    /// Handed to the replica's disk; `applied <= flushed <= written`.
    pub written: Lsn,
    /// Durable at the replica.
    pub flushed: Lsn,
    /// Visible to its readers.
    pub applied: Lsn,
    /// `sent_at_us` of the last heartbeat; 0 when none came since the last Ack.
    pub echo_us: u64,
    /// How long the replica held that heartbeat.
    pub echo_held_us: u32,
    /// Receipt to written of the newest frame concerned.
    pub write_us: u32,
    /// Receipt to flushed.
    pub flush_us: u32,
    /// Flushed to applied.
    pub apply_us: u32,
}

/// Where a replica's time for one frame went. No clock is compared: everything counts from the receipt of its last byte.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traced {
    /// End of the frame.
    pub end: Lsn,
    /// Durable writes of the replica since it started.
    pub flushes: u64,
    /// Records in them.
    pub records: u64,
    /// Until the Ack that told it was written; `written_us <= flushed_us <= applied_us`.
    pub written_us: u32,
    /// Until the Ack that told it was durable.
    pub flushed_us: u32,
    /// Until the Ack that told it was applied.
    pub applied_us: u32,
}

/// A stretch of the log as it stands in the segment files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Position of its first byte.
    pub lsn: Lsn,
    /// Raw bytes that follow.
    pub bytes: u64,
}

/// One message. The raw bytes of `Frame` and `Chunk` are not in it: they follow on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Replica to leader, first.
    Hello(Hello),
    /// Leader to replica, first.
    Welcome(Welcome),
    /// Leader to replica, last.
    Refuse(Refuse),
    /// A frame of `wire_bytes` follows.
    Frame {
        /// Header and payload, no padding.
        wire_bytes: usize,
        /// The leader wants to know where the replica's time for it goes.
        traced: bool,
    },
    /// Raw log follows.
    Chunk(Chunk),
    /// Leader to replica.
    Heartbeat(Heartbeat),
    /// Replica to leader.
    Ack(Ack),
    /// Replica to leader, once for each traced frame.
    Traced(Traced),
}
