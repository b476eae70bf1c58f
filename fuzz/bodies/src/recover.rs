//! Recovery: a log of frames that the input describes, damaged where the input says, or bytes as they are. What recovery finds is
//! compared with the end of the chain by the rule of validity alone.

use std::path::PathBuf;

use walferry_engine::epoch::EpochHistory;
use walferry_engine::error::RecoverError;
use walferry_engine::frame::FrameHeader;
use walferry_engine::limits::{FRAME_ALIGN_BYTES, FRAME_HEADER_BYTES, SEGMENT_BYTES_MIN};
use walferry_engine::lsn::{Epoch, Lsn, SegmentNo};
use walferry_engine::origin::Origin;
use walferry_engine::recover::{Known, find_end};
use walferry_engine::segment::LogBytes;
use walferry_engine::watermark::{KnownWatermark, Watermark};

use crate::Input;
use crate::frame::valid;

/// Frames of one log, at most: it has to be quick.
const FRAMES_MAX: usize = 24;
/// Zeros behind them.
const BLANK_BYTES: usize = 4 * FRAME_ALIGN_BYTES;

struct Memory {
    bytes: Vec<u8>,
    segments: Vec<SegmentNo>,
}

impl LogBytes for Memory {
    fn read(&mut self, at: Lsn, bytes: usize) -> Result<&[u8], RecoverError> {
        let length = self.bytes.len();
        let from = usize::try_from(at.0).map_or(length, |at| at.min(length));
        Ok(&self.bytes[from..from.saturating_add(bytes).min(length)])
    }
    fn locate(&self, at: Lsn) -> (PathBuf, u64) {
        (PathBuf::from("memory"), at.0)
    }
    fn segment_bytes(&self) -> u64 {
        SEGMENT_BYTES_MIN
    }
    fn segments(&self) -> &[SegmentNo] {
        &self.segments
    }
}

/// Any bytes.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let how = input.byte();
    let (mut bytes, ends, history) = if how & 1 == 0 { written(&mut input) } else { raw(&mut input) };
    for _ in 0..input.byte() % 4 {
        let at = input.number::<3>() as usize % bytes.len();
        bytes[at] ^= input.byte();
    }
    let boundary = |choice: u64| ends[choice as usize % ends.len()];
    let applied = if how & 2 != 0 { boundary(input.number::<1>()).0 } else { Lsn::ZERO };
    let watermark = (how & 4 != 0).then(|| Watermark {
        durable: boundary(input.number::<1>()).0,
        epoch: Epoch(input.number::<1>()),
        led: Epoch(input.number::<1>()),
    });
    let origin = (how & 8 != 0).then(|| {
        let (lsn, crc) = boundary(input.number::<1>());
        Origin { lsn, crc }
    });
    let known = Known { applied, watermark: watermark.map_or(KnownWatermark::Never, KnownWatermark::As), origin };
    let mut memory = Memory { bytes, segments: vec![SegmentNo(0)] };
    // `Err` is a node that stops and says why: never wrong, if sometimes a nuisance.
    let Ok(found) = find_end(&mut memory, known, &history) else { return };
    assert!(found.end >= applied, "the store holds more than the log");
    let begun = origin.filter(|origin| origin.lsn <= applied).map_or((Lsn::ZERO, 0), |origin| (origin.lsn, origin.crc));
    let (end, crc) = follow(&memory.bytes, begun, &history);
    assert_eq!((found.end, found.crc), (end, crc), "the end of the valid chain, and nothing beyond it");
    assert!(found.cut.is_none_or(|cut| cut.lsn == end));
    let durable = watermark.map_or(Lsn::ZERO, |watermark| watermark.bound(&history));
    assert!(end >= durable, "what was known to be durable is not missing in silence");
}

/// Where the chain of valid frames ends, and the crc there.
fn follow(bytes: &[u8], (mut at, mut crc): (Lsn, u32), history: &EpochHistory) -> (Lsn, u32) {
    while let Some(rest) = bytes.get(at.0 as usize..)
        && let Some((wire_bytes, its, previous)) = valid(rest, at.0)
        && u64::from_le_bytes(rest[8..16].try_into().expect("8 bytes")) == history.epoch_at(at).0
        && previous == crc
    {
        at = Lsn(at.0 + wire_bytes.next_multiple_of(FRAME_ALIGN_BYTES) as u64);
        crc = its;
    }
    (at, crc)
}

type Log = (Vec<u8>, Vec<(Lsn, u32)>, EpochHistory);

/// Frames, one after the other, each with one record.
fn written(input: &mut Input<'_>) -> Log {
    let (mut bytes, mut ends, mut history) = (Vec::new(), vec![(Lsn::ZERO, 0)], EpochHistory::default());
    history.push(Epoch(1), Lsn::ZERO).expect("the first epoch");
    for _ in 0..1 + usize::from(input.byte()) % FRAMES_MAX {
        let how = input.byte();
        let (lsn, crc) = *ends.last().expect("it begins with one");
        if how & 0x80 != 0 {
            history.push(history.last_epoch().next(), lsn).expect("epochs ascend");
        }
        let record = input.piece(usize::from(how & 0x0f));
        let payload_bytes = (4 + record.len()) as u32;
        let flushed = if how & 0x40 != 0 { lsn } else { Lsn(lsn.0 / 2) };
        let header = FrameHeader {
            filler: false,
            epoch: history.last_epoch(),
            lsn,
            payload_bytes,
            record_count: 1,
            previous_crc: crc,
            crc: 0,
            flushed,
            committed: Lsn::ZERO,
            sealed_at_us: 1,
        };
        let from = bytes.len();
        bytes.resize(from + header.span_bytes(), 0);
        let frame = &mut bytes[from..];
        frame[FRAME_HEADER_BYTES..][..4].copy_from_slice(&(record.len() as u32).to_le_bytes());
        frame[FRAME_HEADER_BYTES + 4..][..record.len()].copy_from_slice(record);
        let sealed = header.seal(frame);
        // A write that never reached the disk.
        if how & 0x30 == 0x30 {
            frame.fill(0);
        }
        ends.push((sealed.end(), sealed.crc));
    }
    bytes.resize(bytes.len() + BLANK_BYTES, 0);
    (bytes, ends, history)
}

/// The input itself, as often as a few blocks need it.
fn raw(input: &mut Input<'_>) -> Log {
    let mut history = EpochHistory::default();
    history.push(Epoch(input.number::<1>()), Lsn::ZERO).ok();
    let mut bytes = input.0.to_vec();
    bytes.resize(bytes.len() + BLANK_BYTES, 0);
    (bytes, vec![(Lsn::ZERO, 0), (Lsn(FRAME_ALIGN_BYTES as u64), 0)], history)
}
