//! A frame: any bytes at any position, and a frame that was whole before one bit of it changed.

use walferry_engine::frame::{Frame, FrameHeader, UnverifiedFrame};
use walferry_engine::limits::{FRAME_BYTES_MAX, FRAME_HEADER_BYTES};
use walferry_engine::lsn::{Epoch, Lsn};

use crate::Input;

const CRC_AT: usize = 36;

/// CRC32C once more, a bit at a time.
pub(crate) fn crc32c(parts: &[&[u8]]) -> u32 {
    let mut crc = !0_u32;
    for byte in parts.iter().copied().flatten() {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 != 0 { crc >> 1 ^ 0x82F6_3B78 } else { crc >> 1 };
        }
    }
    !crc
}

/// The rule of validity once more, from the layout in `engine/src/frame.rs`; what is valid gives its wire bytes, its crc and the
/// crc before.
pub(crate) fn valid(bytes: &[u8], position: u64) -> Option<(usize, u32, u32)> {
    let header = bytes.get(..FRAME_HEADER_BYTES)?;
    let u32_at = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("4 bytes"));
    let known = header[..6] == *b"WFR1\x01\0" && header[6] <= 1 && header[7] == 0;
    let placed = header[16..24] == position.to_le_bytes();
    let payload_bytes = u32_at(24) as usize;
    if !known || !placed || payload_bytes > FRAME_BYTES_MAX - FRAME_HEADER_BYTES {
        return None;
    }
    let whole = bytes.get(..FRAME_HEADER_BYTES + payload_bytes)?;
    if u32_at(CRC_AT) != crc32c(&[&whole[..CRC_AT], &[0; 4], &whole[CRC_AT + 4..]]) {
        return None;
    }
    let (mut rest, mut records) = (&whole[FRAME_HEADER_BYTES..], 0);
    while header[6] == 0 && !rest.is_empty() {
        let (length, after) = rest.split_first_chunk::<4>()?;
        rest = after.get(u32::from_le_bytes(*length) as usize..)?;
        records += 1;
    }
    (header[6] == 1 || records == u32_at(28)).then_some((whole.len(), u32_at(CRC_AT), u32_at(32)))
}

/// Any bytes.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let (how, position) = (input.byte(), input.number::<8>());
    if how & 1 == 0 {
        compare(input.0, position);
        return;
    }
    // A whole frame with one bit changed is none; with no bit changed it is one.
    let flipped = input.number::<3>() as usize;
    let position = position >> 1;
    let payload = records_of(input.0);
    let header = FrameHeader {
        filler: false,
        epoch: Epoch(position % 5),
        lsn: Lsn(position),
        payload_bytes: payload.len() as u32,
        record_count: u32::from(!payload.is_empty()),
        previous_crc: flipped as u32,
        crc: 0,
        flushed: Lsn(position / 2),
        committed: Lsn(position / 3),
        sealed_at_us: 1,
    };
    let mut bytes = vec![0; FRAME_HEADER_BYTES];
    bytes.extend_from_slice(&payload);
    let sealed = header.seal(&mut bytes);
    let frame = Frame::read(&bytes, Lsn(position)).expect("a frame that was just sealed");
    assert_eq!(*frame.header(), sealed);
    assert!(frame.follows(sealed.previous_crc).is_ok() && frame.follows(!sealed.previous_crc).is_err());
    compare(&bytes, position);
    let at = flipped % (bytes.len() * 8);
    bytes[at / 8] ^= 1 << (at % 8);
    assert!(Frame::read(&bytes, Lsn(position)).is_err(), "bit {at} was changed and the frame is still one");
    assert!(Frame::read(&bytes[..bytes.len() - 1], Lsn(position)).is_err());
}

/// One record that is the whole of `bytes`.
fn records_of(bytes: &[u8]) -> Vec<u8> {
    let mut payload = Vec::new();
    if !bytes.is_empty() {
        payload.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        payload.extend_from_slice(bytes);
    }
    payload
}

fn compare(bytes: &[u8], position: u64) {
    let read = Frame::read(bytes, Lsn(position));
    assert_eq!(read.is_ok(), valid(bytes, position).is_some(), "{read:?}");
    let Ok(frame) = read else { return };
    let header = frame.header();
    assert!(header.wire_bytes() <= bytes.len() && header.span_bytes() <= FRAME_BYTES_MAX);
    let mut at = position + FRAME_HEADER_BYTES as u64;
    for (end, record) in frame.records() {
        at += 4 + record.len() as u64;
        assert_eq!(end, Lsn(at));
    }
    let unverified = UnverifiedFrame::parse(bytes, Lsn(position)).expect("it was read whole");
    assert_eq!(unverified.claimed(), header);
}
