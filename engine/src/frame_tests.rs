//! Frames as bytes: what was sealed is read back, and anything else is refused.

use super::*;

const AT: Lsn = Lsn(0x16_0000_3000);
const PREVIOUS: u32 = 0xfeed;

fn header(payload_bytes: usize, record_count: u32) -> FrameHeader {
    FrameHeader {
        filler: false,
        epoch: Epoch(7),
        lsn: AT,
        payload_bytes: payload_bytes as u32,
        record_count,
        previous_crc: PREVIOUS,
        crc: 0,
        flushed: Lsn(0x16_0000_2000),
        committed: Lsn(0x16_0000_1000),
        sealed_at_us: 1_700_000_000_000_000,
    }
}

/// A sealed frame with its padding.
fn frame_of(records: &[&[u8]]) -> (FrameHeader, Vec<u8>) {
    let mut payload = Vec::new();
    for record in records {
        payload.extend((record.len() as u32).to_le_bytes());
        payload.extend_from_slice(record);
    }
    let header = header(payload.len(), records.len() as u32);
    let mut bytes = vec![0; header.span_bytes()];
    bytes[FRAME_HEADER_BYTES..header.wire_bytes()].copy_from_slice(&payload);
    (header.seal(&mut bytes), bytes)
}

#[test]
fn what_was_sealed_is_read_back() {
    let large = vec![5; 100_000];
    let cases: [&[&[u8]]; 5] = [&[], &[b"one"], &[b"", b""], &[b"a", &large, b"", b"z"], &[&[0; 4096 - 64 - 4]]];
    for records in cases {
        let (sealed, bytes) = frame_of(records);
        let frame = Frame::read(&bytes, AT).expect("valid");
        assert_eq!(*frame.header(), sealed);
        assert_eq!(frame.follows(PREVIOUS), Ok(()));
        assert_eq!(frame.follows(PREVIOUS + 1), Err(FrameError::Chain));
        let mut end = AT.advance(FRAME_HEADER_BYTES as u64);
        for ((lsn, record), wanted) in frame.records().zip(records) {
            end = end.advance((RECORD_LENGTH_BYTES + wanted.len()) as u64);
            assert_eq!((lsn, record), (end, *wanted));
        }
        assert_eq!(frame.records().count(), records.len());
        assert_eq!(sealed.end() - AT, frame_aligned(sealed.wire_bytes()) as u64);
        assert!(end <= sealed.end());
        // What travels to a replica is enough; padding carries nothing.
        assert!(Frame::read(&bytes[..sealed.wire_bytes()], AT).is_ok());
    }
}

#[test]
fn every_flipped_bit_is_refused() {
    let (sealed, bytes) = frame_of(&[b"a record", &[0; 300], b"another"]);
    let mut flipped = bytes.clone();
    for bit in 0..sealed.wire_bytes() * 8 {
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(Frame::read(&flipped, AT).is_err(), "bit {bit} of {} bytes", sealed.wire_bytes());
        flipped[bit / 8] ^= 1 << (bit % 8);
    }
    assert_eq!(flipped, bytes);
}

#[test]
fn a_frame_cut_at_any_byte_is_refused() {
    let (sealed, bytes) = frame_of(&[&[9; 9000], b"end"]);
    for kept in 0..sealed.wire_bytes() {
        assert_eq!(Frame::read(&bytes[..kept], AT).err(), Some(FrameError::Short), "{kept} bytes");
    }
    // On disk a torn frame is not shorter: its lost blocks are old.
    for kept in (512..sealed.wire_bytes()).step_by(512) {
        for old in [0, 0xaa] {
            let mut torn = bytes.clone();
            torn[kept..].fill(old);
            assert_eq!(Frame::read(&torn, AT).err(), Some(FrameError::Checksum), "torn at {kept}");
        }
    }
}

#[test]
fn what_is_no_frame_of_this_place_says_why() {
    let (_, bytes) = frame_of(&[b"x"]);
    let error = |bytes: &[u8], at| Frame::read(bytes, at).err();
    assert_eq!(error(&[0; 4096], AT), Some(FrameError::Magic));
    assert_eq!(error(&bytes, AT.advance(4096)), Some(FrameError::Position(AT)), "a recycled block");
    let with = |at: usize, value: &[u8]| {
        let mut bytes = bytes.clone();
        bytes[at..at + value.len()].copy_from_slice(value);
        Frame::read(&bytes, AT).err()
    };
    assert_eq!(with(4, &2u16.to_le_bytes()), Some(FrameError::Version(2)));
    assert_eq!(with(6, &2u16.to_le_bytes()), Some(FrameError::Version(1)), "a flag that this build does not know");
    assert_eq!(with(24, &u32::MAX.to_le_bytes()), Some(FrameError::Length(u32::MAX)));
    let bound = (FRAME_BYTES_MAX - FRAME_HEADER_BYTES) as u32;
    assert_eq!(with(24, &(bound + 1).to_le_bytes()), Some(FrameError::Length(bound + 1)));
    assert_eq!(with(24, &bound.to_le_bytes()), Some(FrameError::Short));
}

#[test]
fn records_that_do_not_fill_the_payload_are_refused() {
    // (payload, record count): too many, too few, one that runs over the end, and a rest too short for a length.
    let cases: [(&[u8], u32); 5] =
        [(&[0, 0, 0, 0], 2), (&[0, 0, 0, 0], 0), (&[5, 0, 0, 0, 1, 2], 1), (&[0, 0, 0, 0, 7], 1), (&[255; 8], 1)];
    for (payload, count) in cases {
        let header = header(payload.len(), count);
        let mut bytes = vec![0; header.span_bytes()];
        bytes[FRAME_HEADER_BYTES..header.wire_bytes()].copy_from_slice(payload);
        header.seal(&mut bytes);
        assert_eq!(Frame::read(&bytes, AT).err(), Some(FrameError::Records), "{payload:?} as {count}");
    }
}

#[test]
fn a_filler_is_valid_without_records() {
    let header = FrameHeader { filler: true, ..header(3 * 4096 - FRAME_HEADER_BYTES, 0) };
    let mut bytes = vec![0; header.span_bytes()];
    let sealed = header.seal(&mut bytes);
    let frame = Frame::read(&bytes, AT).expect("valid");
    assert!(frame.header().filler);
    assert_eq!(frame.records().count(), 0);
    assert_eq!(sealed.end() - AT, 3 * 4096);
    bytes[5000] = 1;
    assert_eq!(Frame::read(&bytes, AT).err(), Some(FrameError::Checksum));
}
