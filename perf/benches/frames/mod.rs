//! Sealed frames for benches: what a leader's log would hold. Used by `codec` and `store_apply`.

use walferry_engine::frame::FrameHeader;
use walferry_engine::limits::{FRAME_HEADER_BYTES, frame_aligned};
use walferry_engine::lsn::{Epoch, Lsn};

/// A frame as it stands in the log, padding included.
pub struct Sealed {
    pub header: FrameHeader,
    pub bytes: Vec<u8>,
}

/// The frame at `lsn` that carries `records`.
pub fn seal(lsn: Lsn, records: &[Vec<u8>]) -> Sealed {
    let mut bytes = vec![0; FRAME_HEADER_BYTES];
    for record in records {
        bytes.extend_from_slice(&(record.len() as u32).to_le_bytes());
        bytes.extend_from_slice(record);
    }
    let header = FrameHeader {
        filler: false,
        epoch: Epoch(1),
        lsn,
        payload_bytes: (bytes.len() - FRAME_HEADER_BYTES) as u32,
        record_count: records.len() as u32,
        previous_crc: 0,
        crc: 0,
        flushed: lsn,
        committed: lsn,
        sealed_at_us: 1,
    };
    bytes.resize(frame_aligned(bytes.len()), 0);
    Sealed { header: header.seal(&mut bytes), bytes }
}
