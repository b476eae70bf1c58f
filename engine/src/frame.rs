//! The frame: the records of one group commit, the unit that is written, checksummed, shipped and acknowledged.
//! Pure bytes in, bytes out; knows no file. The layout, all integers little-endian:
//!
//! ```text
//!  0  magic            4   "WFR1"
//!  4  format version   2   1
//!  6  flags            2   bit 0: filler (no records; pads a segment to its end)
//!  8  epoch            8   the leadership that sealed it
//! 16  lsn              8   position of this header in the log
//! 24  payload length   4   bytes of records after the header
//! 28  record count     4
//! 32  previous crc     4   CRC32C of the frame before (the chain); 0 in the first frame of a log
//! 36  crc              4   CRC32C of header (with this field 0) and payload
//! 40  flushed lsn      8   the leader's flushed LSN when it sealed this frame
//! 48  commit lsn       8   the leader's commit LSN when it sealed this frame
//! 56  sealed at        8   microseconds since the Unix epoch by the leader's clock
//! 64  payload: for each record a u32 length, then its bytes
//!     zeros up to the next multiple of 4096
//! ```
//!
//! A frame is valid at a position exactly when its magic and version are known, its lsn is that position,
//! its length is within bounds, its crc is right, its lengths tile the payload into `record count` records,
//! and its previous crc is the crc of the frame that ends where it starts.

use crate::limits::{FRAME_BYTES_MAX, FRAME_HEADER_BYTES, RECORD_LENGTH_BYTES, frame_aligned};
use crate::lsn::{Epoch, Lsn};

const MAGIC: u32 = u32::from_le_bytes(*b"WFR1");
const FORMAT_VERSION: u16 = 1;
const FLAG_FILLER: u16 = 1;
const CRC_AT: usize = 36;

/// What the first 64 bytes of a frame say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// True for a frame that only pads a segment to its end.
    pub filler: bool,
    /// The leadership that sealed the frame.
    pub epoch: Epoch,
    /// Position of the frame's first byte in the log.
    pub lsn: Lsn,
    /// Bytes of records after the header.
    pub payload_bytes: u32,
    /// Records in the payload.
    pub record_count: u32,
    /// The crc of the frame before this one.
    pub previous_crc: u32,
    /// CRC32C of header and payload.
    pub crc: u32,
    /// The leader's flushed LSN at sealing; `flushed <= lsn`.
    pub flushed: Lsn,
    /// The leader's commit LSN at sealing; `committed <= flushed`.
    pub committed: Lsn,
    /// When the leader sealed it, microseconds since the Unix epoch.
    pub sealed_at_us: u64,
}

/// Why bytes are not the frame that belongs at a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Fewer bytes than the header or the frame needs.
    #[error("the frame is cut short")]
    Short,
    /// The magic is not there; zeros look like this too.
    #[error("no frame starts here")]
    Magic,
    /// A format that this build does not know.
    #[error("frame format version {0} is not known to this build")]
    Version(u16),
    /// The frame belongs elsewhere: a recycled block.
    #[error("the frame says it belongs at {0}")]
    Position(Lsn),
    /// The length is beyond FRAME_BYTES_MAX.
    #[error("the frame's payload length {0} is beyond the bound")]
    Length(u32),
    /// Header or payload were changed.
    #[error("the frame's checksum is wrong")]
    Checksum,
    /// The frame does not follow the one before it.
    #[error("the frame does not continue the chain")]
    Chain,
    /// The record lengths do not tile the payload.
    #[error("the frame's records do not fill its payload")]
    Records,
    /// The disk gives an error for it: a bad sector.
    #[error("the disk cannot read it (I/O error)")]
    Unreadable,
}

impl FrameHeader {
    /// Bytes from the header to the end of the payload: what travels to a replica.
    pub fn wire_bytes(&self) -> usize {
        FRAME_HEADER_BYTES + self.payload_bytes as usize
    }

    /// Bytes that the frame takes in the log, padding included.
    pub fn span_bytes(&self) -> usize {
        frame_aligned(self.wire_bytes())
    }

    /// Where the next frame starts.
    pub fn end(&self) -> Lsn {
        self.lsn.advance(self.span_bytes() as u64)
    }

    fn encode(&self, out: &mut [u8]) {
        out[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        out[4..6].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        out[6..8].copy_from_slice(&(if self.filler { FLAG_FILLER } else { 0 }).to_le_bytes());
        out[8..16].copy_from_slice(&self.epoch.0.to_le_bytes());
        out[16..24].copy_from_slice(&self.lsn.0.to_le_bytes());
        out[24..28].copy_from_slice(&self.payload_bytes.to_le_bytes());
        out[28..32].copy_from_slice(&self.record_count.to_le_bytes());
        out[32..36].copy_from_slice(&self.previous_crc.to_le_bytes());
        out[CRC_AT..40].copy_from_slice(&self.crc.to_le_bytes());
        out[40..48].copy_from_slice(&self.flushed.0.to_le_bytes());
        out[48..56].copy_from_slice(&self.committed.0.to_le_bytes());
        out[56..64].copy_from_slice(&self.sealed_at_us.to_le_bytes());
    }

    /// Completes the frame in `bytes` (header space, then `payload_bytes` of records): writes the header, its crc
    /// included, and returns that crc for the chain. The padding after the payload is the caller's to zero.
    pub fn seal(mut self, bytes: &mut [u8]) -> FrameHeader {
        debug_assert!(self.committed <= self.flushed && self.flushed <= self.lsn);
        self.crc = 0;
        self.encode(bytes);
        self.crc = crc32c::crc32c(&bytes[..self.wire_bytes()]);
        bytes[CRC_AT..40].copy_from_slice(&self.crc.to_le_bytes());
        self
    }
}

/// A header that parsed but whose checksum, records and chain nobody has looked at yet.
#[derive(Clone, Copy, Debug)]
pub struct UnverifiedFrame {
    header: FrameHeader,
}

impl UnverifiedFrame {
    /// Parses the header that should stand at `position`. Reads 64 bytes; allocates nothing.
    pub fn parse(bytes: &[u8], position: Lsn) -> Result<UnverifiedFrame, FrameError> {
        let header = bytes.get(..FRAME_HEADER_BYTES).ok_or(FrameError::Short)?;
        let u16_at = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        let u64_at = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().unwrap());
        if u32_at(0) != MAGIC {
            return Err(FrameError::Magic);
        }
        if u16_at(4) != FORMAT_VERSION || u16_at(6) & !FLAG_FILLER != 0 {
            return Err(FrameError::Version(u16_at(4)));
        }
        let header = FrameHeader {
            filler: u16_at(6) & FLAG_FILLER != 0,
            epoch: Epoch(u64_at(8)),
            lsn: Lsn(u64_at(16)),
            payload_bytes: u32_at(24),
            record_count: u32_at(28),
            previous_crc: u32_at(32),
            crc: u32_at(CRC_AT),
            flushed: Lsn(u64_at(40)),
            committed: Lsn(u64_at(48)),
            sealed_at_us: u64_at(56),
        };
        if header.lsn != position {
            return Err(FrameError::Position(header.lsn));
        }
        if header.payload_bytes as usize > FRAME_BYTES_MAX - FRAME_HEADER_BYTES {
            return Err(FrameError::Length(header.payload_bytes));
        }
        Ok(UnverifiedFrame { header })
    }

    /// What the header claims.
    pub fn claimed(&self) -> &FrameHeader {
        &self.header
    }

    /// The frame, without looking at it again: the caller holds memory that this process sealed or verified and
    /// that nothing has changed since.
    pub(crate) fn known_good(self, bytes: &[u8]) -> Frame<'_> {
        Frame { header: self.header, wire: &bytes[..self.header.wire_bytes()] }
    }

    /// How many bytes `verify` needs.
    pub fn wire_bytes(&self) -> usize {
        self.header.wire_bytes()
    }

    /// Checks checksum and record tiling. The chain is checked by whoever knows the frame before.
    pub fn verify(self, bytes: &[u8]) -> Result<Frame<'_>, FrameError> {
        let whole = bytes.get(..self.header.wire_bytes()).ok_or(FrameError::Short)?;
        let crc = crc32c::crc32c(&whole[..CRC_AT]);
        let crc = crc32c::crc32c_append(crc, &[0; 4]);
        let crc = crc32c::crc32c_append(crc, &whole[CRC_AT + 4..]);
        if crc != self.header.crc {
            return Err(FrameError::Checksum);
        }
        let frame = Frame { header: self.header, wire: whole };
        let mut records = frame.records();
        let count = records.by_ref().count();
        let tiled = records.rest.is_empty() && count == self.header.record_count as usize;
        if !frame.header.filler && !tiled {
            return Err(FrameError::Records);
        }
        Ok(frame)
    }
}

/// A frame whose checksum and records are right.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    header: FrameHeader,
    wire: &'a [u8],
}

impl<'a> Frame<'a> {
    /// The frame that stands at `position` at the start of `bytes`.
    pub fn read(bytes: &'a [u8], position: Lsn) -> Result<Frame<'a>, FrameError> {
        UnverifiedFrame::parse(bytes, position)?.verify(bytes)
    }

    /// The header.
    pub fn header(&self) -> &FrameHeader {
        &self.header
    }

    /// `Err(Chain)` unless this frame follows the frame with crc `previous`.
    pub fn follows(&self, previous: u32) -> Result<(), FrameError> {
        if self.header.previous_crc == previous { Ok(()) } else { Err(FrameError::Chain) }
    }

    /// Header and payload as they stand in the log, without the padding.
    pub fn wire(&self) -> &'a [u8] {
        self.wire
    }

    /// The records in order; a filler has none.
    pub fn records(&self) -> Records<'a> {
        let rest = if self.header.filler { &[][..] } else { &self.wire[FRAME_HEADER_BYTES..] };
        let at = self.header.lsn.advance(FRAME_HEADER_BYTES as u64);
        Records { rest, at }
    }
}

/// The records of a frame, each with the LSN of its end (the LSN of that commit).
#[derive(Clone, Debug)]
pub struct Records<'a> {
    rest: &'a [u8],
    at: Lsn,
}

impl<'a> Iterator for Records<'a> {
    type Item = (Lsn, &'a [u8]);

    fn next(&mut self) -> Option<(Lsn, &'a [u8])> {
        let (length, rest) = self.rest.split_at_checked(RECORD_LENGTH_BYTES)?;
        let length = u32::from_le_bytes(length.try_into().unwrap()) as usize;
        let (record, rest) = rest.split_at_checked(length)?;
        self.rest = rest;
        self.at = self.at.advance((RECORD_LENGTH_BYTES + length) as u64);
        Some((self.at, record))
    }
}

#[cfg(test)]
#[path = "frame_tests.rs"]
mod tests;
