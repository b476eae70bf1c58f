//! The messages, their fields and bounds. Their bytes are in the files beside this one.

use std::fmt;

use walferry_engine::limits::FRAME_BYTES_MAX;
use walferry_engine::lsn::{Epoch, Lsn};

use crate::member::{ClusterId, MEMBER_NAME_BYTES_MAX, MemberName};
use crate::policy::{POLICY_TEXT_BYTES_MAX, SyncPolicy};
use crate::register::MemberId;

/// The version of this protocol; both sides must have the same.
pub const PROTOCOL_VERSION: u16 = 5;
/// Bytes in front of every message.
pub const ENVELOPE_BYTES: usize = 8;
/// Epochs that a handshake carries; of a longer history the newest.
pub const EPOCHS_PER_MESSAGE_MAX: usize = 4096;
/// The longest text of a refusal; a longer one is cut.
pub const REFUSE_TEXT_BYTES_MAX: usize = 512;
/// The longest address for clients.
pub const ADDRESS_BYTES_MAX: usize = 255;
/// Raw bytes in a chunk, at most. Between chunks a heartbeat may be sent.
pub const CHUNK_BYTES_MAX: u64 = 8 << 20;
/// Raw bytes that follow one FetchedFrames, at most: the largest frame fits.
pub const FETCHED_FRAMES_BYTES_MAX: u64 = FRAME_BYTES_MAX as u64;
/// Bytes of a message with its envelope, without the raw bytes of frames and chunks: a receive buffer of this size suffices.
pub const MESSAGE_BYTES_MAX: usize = ENVELOPE_BYTES
    + HELLO_FIXED_BYTES
    + EPOCHS_PER_MESSAGE_MAX * EPOCH_BYTES
    + MEMBER_NAME_BYTES_MAX
    + ADDRESS_BYTES_MAX
    + POLICY_TEXT_BYTES_MAX;

pub(super) const HELLO_FIXED_BYTES: usize = 64;
pub(super) const WELCOME_FIXED_BYTES: usize = 48;
pub(super) const EPOCH_BYTES: usize = 16;
pub(super) const HEARTBEAT_BODY_BYTES: usize = 48;
pub(super) const ACK_BODY_BYTES: usize = 56;
pub(super) const TRACED_BODY_BYTES: usize = 40;
pub(super) const REFUSE_FIXED_BYTES: usize = 4;
pub(super) const FETCH_FIXED_BYTES: usize = 60;
pub(super) const PREPARING_BODY_BYTES: usize = 16;
pub(super) const OFFER_FIXED_BYTES: usize = 64;
pub(super) const PIECE_BODY_BYTES: usize = 16;
pub(super) const FETCH_FRAMES_FIXED_BYTES: usize = 56;
pub(super) const FETCHED_FRAMES_BODY_BYTES: usize = 16;

const _: () = assert!(MESSAGE_BYTES_MAX <= 128 << 10);
const _: () = assert!(OFFER_FIXED_BYTES <= HELLO_FIXED_BYTES + ADDRESS_BYTES_MAX);
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
    /// Its incarnation as a member of a cluster: what it acknowledges on this connection is confirmed by that one alone. 0 for
    /// a replica that is no member of any.
    pub member: MemberId,
    /// The epoch that it led last, without a register, and gives up by following; 0 for none and for a member.
    pub gives_up: Epoch,
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
    /// The leader's sync policy: the replica's, when it is promoted.
    pub policy: SyncPolicy,
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
    /// Another connection has the name: it took this one's place, or it is another node's, which keeps it.
    Replaced = 10,
    /// The segment sizes differ.
    SegmentBytes = 11,
    /// The replica is no member of the leader's cluster.
    NotMember = 12,
    /// No snapshot can be made at the moment.
    NoSnapshot = 13,
    /// The part of the log that is wanted is not here, or not whole.
    NotHeld = 14,
}

impl RefuseCode {
    /// Every code.
    pub const ALL: [RefuseCode; 14] = {
        use RefuseCode::*;
        [
            Protocol,
            ClusterId,
            NewerEpoch,
            Diverged,
            LogGone,
            NotLeader,
            Full,
            Protest,
            Stopping,
            Replaced,
            SegmentBytes,
            NotMember,
            NoSnapshot,
            NotHeld,
        ]
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
                | RefuseCode::NoSnapshot
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
pub struct LinkHeartbeat {
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
    /// `stamp_us` of the newest Ack that came before `end` was looked at; 0 for none, and while the leader holds no lease.
    pub stamp_us: u64,
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
    /// Microseconds by a clock of the replica's own, never 0 on the wire.
    pub stamp_us: u64,
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

/// A replica's only message on the connection of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetch {
    /// The replica's protocol version. With another version than ours the other fields are unknown (and empty).
    pub protocol: u16,
    /// `None` for a replica that belongs to no cluster yet.
    pub cluster_id: Option<ClusterId>,
    /// The replica's name, and its slot's.
    pub name: MemberName,
    /// The replica has confirmed everything before this: an older copy would take that back.
    pub floor: Lsn,
    /// The replica's segment size.
    pub segment_bytes: u64,
    /// The copy of which it has a part; 0 for none.
    pub snapshot: Lsn,
    /// Verified bytes of that part: whole pieces.
    pub offset: u64,
    /// A piece of that copy arrived damaged: the leader is to look at its file.
    pub suspect: bool,
}

/// What a snapshot is: everything that a replica needs to go on with the log behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// The leader's protocol version.
    pub protocol: u16,
    /// The cluster.
    pub cluster_id: ClusterId,
    /// The leader's name.
    pub name: MemberName,
    /// The copy holds everything before this; the log goes on here.
    pub snapshot: Lsn,
    /// The leader's segment size.
    pub segment_bytes: u64,
    /// The length of the whole copy.
    pub bytes: u64,
    /// Where the first piece begins.
    pub offset: u64,
    /// The crc of the frame that ends at `snapshot`.
    pub crc: u32,
    /// The leader's epoch history, ascending.
    pub history: Vec<(Epoch, Lsn)>,
}

/// A part of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where in the copy.
    pub offset: u64,
    /// Raw bytes that follow.
    pub bytes: u32,
    /// Their CRC32C.
    pub crc: u32,
}

/// What a node lost of its log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FetchFrames {
    /// The protocol version of the node that asks. With another version than ours the other fields are unknown (and empty).
    pub protocol: u16,
    /// Its cluster.
    pub cluster_id: ClusterId,
    /// Its name.
    pub name: MemberName,
    /// Where the first frame begins.
    pub from: Lsn,
    /// Frames from here on are not needed; `from < to`.
    pub to: Lsn,
    /// Its segment size.
    pub segment_bytes: u64,
    /// The crc of the frame that ends at `from`, if it still has that.
    pub crc: Option<u32>,
    /// Its epoch history, ascending.
    pub history: Vec<(Epoch, Lsn)>,
}

/// Whole frames that follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FetchedFrames {
    /// Where the first begins.
    pub from: Lsn,
    /// Raw bytes that follow.
    pub bytes: u64,
}

/// One message. The raw bytes of `Frame`, `Chunk`, `Piece` and `FetchedFrames` are not in it: they follow on the wire.
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
    LinkHeartbeat(LinkHeartbeat),
    /// Replica to leader.
    Ack(Ack),
    /// Replica to leader, once for each traced frame.
    Traced(Traced),
    /// Replica to leader, first and last on the connection of a snapshot.
    Fetch(Fetch),
    /// Leader to replica: the copy is being made.
    Preparing {
        /// About so many bytes are written.
        done: u64,
        /// Of about so many.
        total: u64,
    },
    /// Leader to replica: the copy is there.
    Offer(Offer),
    /// Leader to replica: a part of the copy follows.
    Piece(Piece),
    /// Any node to any other: send me this part of the log.
    FetchFrames(FetchFrames),
    /// Its answer.
    FetchedFrames(FetchedFrames),
}
