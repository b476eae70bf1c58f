//! What a leader and a replica say to each other, and its bytes. Pure: bytes in, messages out. The shipper and the
//! applier drive it; it knows no socket and no log.
//!
//! A connection is opened by the replica. It says `Hello`; the leader answers `Welcome` or `Refuse` (and closes). Then
//! the leader sends `Chunk`, `Frame` and `LinkHeartbeat`, and may end with `Refuse`; the replica sends `Ack`, at least
//! one per heartbeat interval, as a heartbeat. All integers little-endian.
//!
//! ```text
//! envelope    0  body length      4   bytes after the envelope, for all kinds but Chunk's raw bytes
//!             4  kind             1
//!             5  flags            1   of a Frame: 1 = traced, the replica answers it with Traced; else 0
//!             6  zeros            2
//!
//! 1 Hello     0  magic            4   "WFPR"; stays in front in every later protocol version
//!             4  protocol         2   5
//!             6  name length      1   1-63
//!             7  address length   1   <= ADDRESS_BYTES_MAX
//!             8  cluster id      16   0: none yet, takes the leader's
//!            24  flushed lsn      8   end of the replica's durable log, always the end of a frame
//!            32  segment bytes    8   the replica's segment size; must be the leader's
//!            40  crc              4   of the frame that ends at the flushed lsn, 0 for an empty log
//!            44  member           8   the replica's incarnation as a member of a cluster; 0: it is none
//!            52  gives up         8   the epoch that the replica led last, without a register; 0: none
//!            60  epoch count      4   <= EPOCHS_PER_MESSAGE_MAX
//!            64  epochs          16   each: epoch 8, lsn of its first frame 8; ascending
//!             .  name                 the replica's, and the name of its slot
//!             .  address              where clients reach the replica, `HOST:PORT`; may be empty
//! 2 Welcome   0  magic            4   "WFPR"
//!             4  protocol         2   5
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
//!             .  policy               the leader's sync policy as `--sync` takes it, to the end; <= POLICY_TEXT_BYTES_MAX
//! 3 Refuse    0  code             2   RefuseCode
//!             2  zeros            2
//!             4  text                 one line for people, <= REFUSE_TEXT_BYTES_MAX
//! 4 Frame     the frame as it stands in the log without its padding: body length = FrameHeader::wire_bytes().
//!             It starts where the bytes sent before it ended, its own padding counted as sent.
//! 5 Chunk     0  lsn              8   position of the first raw byte: where the bytes sent before it ended
//!             8  bytes            8   1..=CHUNK_BYTES_MAX
//!            body length is 16; `bytes` raw bytes of the log, padding and all, follow the body.
//!             A chunk may end inside a frame. Then the next Chunk goes on there; LinkHeartbeats may stand between,
//!             a Frame does not.
//! 6 LinkHeartbeat 0  end lsn          8   end of the leader's log (sealed frames)
//!             8  flushed lsn      8   durable at the leader: the replica may apply up to here
//!            16  committed lsn    8   confirmed by the sync policy: a checkpoint may hold up to here
//!            24  sent at          8   microseconds by a clock of the leader's own; to be echoed in the next Ack
//!            32  epoch            8   the leader's epoch
//!            40  stamp            8   `stamp` of the newest Ack of this connection; 0 when none came yet, or while the leader
//!                                     holds no lease. Everything that was durable here at that time ends before `end lsn`
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
//!            48  stamp            8   microseconds by a clock of the replica's own; to come back with a LinkHeartbeat
//! 8 Traced    0  end lsn          8   end of the traced frame
//!             8  flushes          8   durable writes of the replica since it started
//!            16  records          8   records in them
//!            24  written us       4   receipt of the frame's last byte to the Ack that told it was written
//!            28  flushed us       4   ... to the Ack that told it was durable
//!            32  applied us       4   ... to the Ack that told it was applied; the Traced follows that Ack
//!            36  zeros            4
//! ```
//!
//! A replica whose place in the leader's log is gone opens another connection for a snapshot. It says `Fetch`; the leader
//! answers `Preparing` while it makes the copy, then `Offer`, then every `Piece` from the offset on in order, and closes; or
//! `Refuse` in the place of any of these. The replica says nothing more.
//!
//! ```text
//! 16 Fetch    0  magic            4   "WFPR"
//!             4  protocol         2   1
//!             6  name length      1
//!             7  zero             1
//!             8  cluster id      16   0: none yet
//!            24  floor lsn        8   the copy must hold everything before this: the replica has confirmed it
//!            32  segment bytes    8   the replica's
//!            40  snapshot lsn         8   of the copy of which the replica has a part; 0 for none
//!            48  offset           8   verified bytes of that part: whole pieces; 0 for none
//!            56  suspect          4   1: a piece of that copy arrived damaged, the leader is to look at its file; else 0
//!             .  name                 the replica's, and its slot's
//! 17 Preparing 0 done             8   about so many bytes are written
//!             8  total            8   of about so many; done <= total
//! 18 Offer    0  magic            4   "WFPR"
//!             4  protocol         2   1
//!             6  name length      1
//!             7  zero             1
//!             8  cluster id      16
//!            24  snapshot lsn         8   the copy holds everything before this; the log goes on there
//!            32  segment bytes    8   the leader's
//!            40  bytes            8   of the whole copy, 1..=SNAPSHOT_BYTES_MAX
//!            48  offset           8   pieces follow from here on: Fetch's offset if its snapshot lsn is this one, else 0
//!            56  crc              4   of the frame that ends at the snapshot lsn
//!            60  epoch count      4
//!            64  epochs          16   each, as in Welcome
//!             .  name                 the leader's
//! 19 Piece    0  offset           8   where the pieces before it ended
//!             8  bytes            4   PIECE_BYTES, or what is left of the copy
//!            12  crc              4   CRC32C of the raw bytes
//!            body length is 16; `bytes` raw bytes of the copy follow the body.
//! ```
//!
//! A node whose log is damaged asks any other node for the frames that it lost, on a connection of its own. It says `FetchFrames`; the
//! other answers `FetchedFrames`, or `Refuse`, and closes. Whoever asks checks every frame; for more than one `FetchedFrames` holds it asks again.
//!
//! ```text
//! 20 FetchFrames
//!             0  magic            4   "WFPR"
//!             4  protocol         2   2
//!             6  name length      1
//!             7  flags            1   1: the crc is known; else 0
//!             8  cluster id      16
//!            24  from lsn         8   where the first frame begins
//!            32  segment bytes    8   of the node that asks
//!            40  to lsn           8   frames from here on are not needed; from < to
//!            48  crc              4   of the frame that ends at the from lsn
//!            52  epoch count      4
//!            56  epochs          16   each, as in Hello: frames are wanted as far as both have the same
//!             .  name                 of the node that asks
//! 21 FetchedFrames
//!             0  from lsn         8   FetchFrames'
//!             8  bytes            8   1..=FETCHED_FRAMES_BYTES_MAX
//!            body length is 16; whole frames, padding and all, follow the body: `bytes` raw bytes.
//! ```

use std::fmt;

use walferry_engine::limits::FRAME_BYTES_MAX;
use walferry_engine::lsn::{Epoch, Lsn};

use crate::member::{ClusterId, MEMBER_NAME_BYTES_MAX, MemberName};
use crate::policy::{POLICY_TEXT_BYTES_MAX, SyncPolicy};
use crate::register::MemberId;

mod codec;
#[cfg(test)]
mod tests;

pub use codec::{TLS_FIRST_BYTES, decode, frame_envelope, identify, is_of_a_peer, read_message};

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
/// Bytes of a message with its envelope, frames' and chunks' raw bytes aside: a receive buffer of this size suffices.
pub const MESSAGE_BYTES_MAX: usize = ENVELOPE_BYTES
    + HELLO_FIXED_BYTES
    + EPOCHS_PER_MESSAGE_MAX * EPOCH_BYTES
    + MEMBER_NAME_BYTES_MAX
    + ADDRESS_BYTES_MAX
    + POLICY_TEXT_BYTES_MAX;
/// Bytes of an Ack with its envelope.
pub const ACK_BYTES: usize = ENVELOPE_BYTES + ACK_BODY_BYTES;
/// Bytes of a LinkHeartbeat with its envelope.
pub const HEARTBEAT_BYTES: usize = ENVELOPE_BYTES + HEARTBEAT_BODY_BYTES;

const HELLO_FIXED_BYTES: usize = 64;
const WELCOME_FIXED_BYTES: usize = 48;
const EPOCH_BYTES: usize = 16;
const HEARTBEAT_BODY_BYTES: usize = 48;
const ACK_BODY_BYTES: usize = 56;
const TRACED_BODY_BYTES: usize = 40;
const REFUSE_FIXED_BYTES: usize = 4;
const FETCH_FIXED_BYTES: usize = 60;
const PREPARING_BODY_BYTES: usize = 16;
const OFFER_FIXED_BYTES: usize = 64;
const PIECE_BODY_BYTES: usize = 16;
const FETCH_FRAMES_FIXED_BYTES: usize = 56;
const FETCHED_FRAMES_BODY_BYTES: usize = 16;

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
