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

mod body;
mod codec;
mod frames;
mod handshake;
mod kind;
mod stream;
#[cfg(test)]
mod tests;
mod transfer;
mod types;

pub use codec::{TLS_FIRST_BYTES, decode, frame_envelope, identify, is_of_a_peer, read_message};
pub use types::*;
