//! Recovery over logs in memory: every combination of evidence, and every place where a crash or a flipped bit can strike.

use std::path::PathBuf;

use super::*;
use crate::limits::{FRAME_HEADER_BYTES, RECORD_LENGTH_BYTES, SEGMENT_BYTES_MIN};
use crate::lsn::SegmentNo;
use crate::watermark::Watermark;

struct Memory {
    bytes: Vec<u8>,
    segments: Vec<SegmentNo>,
    /// Reads from here up to there fail.
    bad: (u64, u64),
}

impl LogBytes for Memory {
    fn read(&mut self, at: Lsn, bytes: usize) -> Result<&[u8], RecoverError> {
        if at.0 < self.bad.1 && at.0 + bytes as u64 > self.bad.0 {
            return Err(RecoverError::bad_sector(PathBuf::from("memory"), at.0));
        }
        let from = (at.0 as usize).min(self.bytes.len());
        Ok(&self.bytes[from..(from + bytes).min(self.bytes.len())])
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

#[test]
fn segments_that_were_only_prepared_hold_no_log() {
    let mut writer = Writer::new(1);
    writer.frame(0, b"one");
    let segment = SEGMENT_BYTES_MIN as usize;
    let memory = |segments: &[u64], at: usize, frame: &[u8]| {
        let mut bytes = vec![0; 4 * segment];
        bytes[at..at + frame.len()].copy_from_slice(frame);
        Memory { bytes, segments: segments.iter().map(|number| SegmentNo(*number)).collect(), bad: (0, 0) }
    };
    let frame = writer.bytes.as_slice();
    let mut damaged = writer.bytes.clone();
    damaged[0] ^= 1;
    // segments, what stands where, whether they are unwritten
    let table = [
        (memory(&[2, 3], 0, &[]), true),
        // Recycled: the frame names another position.
        (memory(&[2, 3], 2 * segment, frame), true),
        (memory(&[0, 1], 0, frame), false),
        (memory(&[0, 1], 0, &damaged), false),
        (memory(&[], 0, &[]), true),
    ];
    for (index, (mut memory, unwritten)) in table.into_iter().enumerate() {
        assert_eq!(is_unwritten(&mut memory, Lsn::ZERO).expect("readable"), unwritten, "line {index}");
    }
    let mut unreadable = memory(&[1], 0, &[]);
    unreadable.bad = (segment as u64, segment as u64 + 1);
    assert!(!is_unwritten(&mut unreadable, Lsn::ZERO).expect("a bad sector alone"), "nobody knows what stands there");
    // A log that begins within a segment.
    let mut begun = memory(&[0, 1], 8192, &damaged);
    assert!(!is_unwritten(&mut begun, Lsn(8192)).expect("readable"));
    assert!(
        is_unwritten(&mut begun, Lsn(12288)).expect("readable"),
        "what stands before the origin is not of this log"
    );
}

/// A log in the making: frames with one record each.
struct Writer {
    bytes: Vec<u8>,
    crc: u32,
    epoch: Epoch,
    starts: Vec<Lsn>,
}

const BLANK_BYTES: usize = 64 << 10;

impl Writer {
    fn new(epoch: u64) -> Writer {
        Writer { bytes: Vec::new(), crc: 0, epoch: Epoch(epoch), starts: Vec::new() }
    }

    /// Appends a frame whose header says that everything before `flushed` was durable.
    fn frame(&mut self, flushed: u64, record: &[u8]) -> Lsn {
        let lsn = Lsn(self.bytes.len() as u64);
        let payload_bytes = (RECORD_LENGTH_BYTES + record.len()) as u32;
        let header = FrameHeader {
            filler: false,
            epoch: self.epoch,
            lsn,
            payload_bytes,
            record_count: 1,
            previous_crc: self.crc,
            crc: 0,
            flushed: Lsn(flushed),
            committed: Lsn::ZERO,
            sealed_at_us: 1,
        };
        let mut frame = vec![0; header.span_bytes()];
        let at = FRAME_HEADER_BYTES + RECORD_LENGTH_BYTES;
        frame[FRAME_HEADER_BYTES..at].copy_from_slice(&(record.len() as u32).to_le_bytes());
        frame[at..at + record.len()].copy_from_slice(record);
        self.crc = header.seal(&mut frame).crc;
        self.bytes.extend(frame);
        self.starts.push(lsn);
        lsn
    }

    fn end(&self) -> Lsn {
        Lsn(self.bytes.len() as u64)
    }

    fn memory(&self) -> Memory {
        let mut bytes = self.bytes.clone();
        bytes.resize(bytes.len() + BLANK_BYTES, 0);
        Memory { bytes, segments: vec![SegmentNo(0)], bad: (0, 0) }
    }
}

fn history(entries: &[(u64, u64)]) -> EpochHistory {
    EpochHistory::from_entries(&entries.iter().map(|&(e, l)| (Epoch(e), Lsn(l))).collect::<Vec<_>>()).unwrap()
}

const BROKEN: Lsn = Lsn(0x5000);
const BEYOND: Lsn = Lsn(0x6000);

/// The name of the one case that this evidence makes.
fn case(block: Block, later: Later, durable: Durable) -> &'static str {
    use {Block::*, Durable::*, Later::*};
    match (block, later, durable) {
        (_, Flushed(_), _) => "rot: a later frame proves it",
        (_, _, Store(lsn)) if lsn > BROKEN => "rot: the store holds more",
        (_, _, Watermark(lsn)) if lsn > BROKEN => "rot: the watermark says more",
        (Nothing | Recycled | Headless | Stale, None, _) => "end",
        (Nothing | Recycled | Headless | Stale, NotFlushed(..), _) => "torn: lost, its successor is there",
        (Damaged(..), None, _) => "torn: half written",
        (Damaged(..), NotFlushed(..), _) => "torn: half written, its successor is there",
    }
}

#[test]
fn every_combination_of_evidence_is_one_named_case() {
    let (damaged, chain) = (Block::Damaged(FrameError::Checksum, None), Block::Damaged(FrameError::Chain, None));
    let blocks = [Block::Nothing, Block::Recycled, Block::Headless, Block::Stale, damaged, chain];
    let laters = [Later::None, Later::NotFlushed(BEYOND, BEYOND.advance(4096)), Later::Flushed(BEYOND)];
    let durables =
        [Durable::Store(BROKEN), Durable::Store(BEYOND), Durable::Watermark(BROKEN), Durable::Watermark(BEYOND)];
    let mut seen = std::collections::BTreeMap::new();
    for block in blocks {
        for later in laters {
            for durable in durables {
                let case = case(block, later, durable);
                let right = match judge(BROKEN, block, later, durable) {
                    Verdict::End => case == "end",
                    Verdict::Torn(reason) => {
                        let successor = reason.contains("0/6000 was written without it");
                        case.starts_with("torn") && successor == case.contains("successor")
                    }
                    Verdict::Rot { evidence, .. } => match case {
                        "rot: a later frame proves it" => evidence.contains("the frame at 0/6000"),
                        "rot: the store holds more" => evidence.contains("the store holds everything up to 0/6000"),
                        "rot: the watermark says more" => {
                            evidence.contains("this node had made everything up to 0/6000")
                        }
                        _ => false,
                    },
                };
                assert!(right, "{block:?} {later:?} {durable:?} is not {case}");
                *seen.entry(case).or_insert(0) += 1;
            }
        }
    }
    assert_eq!(seen.len(), 7, "a case that no evidence makes: {seen:?}");
    assert_eq!(seen.values().sum::<usize>(), 6 * 3 * 4);
}

#[test]
fn an_empty_and_a_clean_log_end_where_they_end() {
    let empty =
        find_end(&mut Memory { bytes: vec![], segments: vec![], bad: (0, 0) }, Lsn::ZERO, &history(&[(1, 0)])).unwrap();
    assert_eq!((empty.end, empty.crc, empty.cut), (Lsn::ZERO, 0, None));
    let mut log = Writer::new(1);
    for number in 0..5 {
        log.frame(0, &vec![number; 6000]);
    }
    for needed in [Lsn::ZERO, log.starts[2], log.end()] {
        let found = find_end(&mut log.memory(), needed, &history(&[(1, 0)])).unwrap();
        assert_eq!((found.end, found.crc, found.cut), (log.end(), log.crc, None));
    }
}

/// Four frames of which the first two were flushed when the third was sealed, as with two writes in flight.
fn in_flight() -> Writer {
    let mut log = Writer::new(1);
    log.frame(0, &[1; 5000]);
    log.frame(0, &[2; 5000]);
    let flushed = log.end().0;
    log.frame(flushed, &[3; 5000]);
    log.frame(flushed, &[4; 5000]);
    log
}

#[test]
fn flipped_bit_is_rot_before_the_watermark_and_torn_after() {
    let log = in_flight();
    let flushed = log.starts[2];
    for offset in (0..log.bytes.len()).step_by(512) {
        let frame = log.starts.iter().rposition(|start| start.0 <= offset as u64).unwrap();
        let in_frame = offset as u64 - log.starts[frame].0;
        if in_frame >= (FRAME_HEADER_BYTES + RECORD_LENGTH_BYTES + 5000) as u64 {
            continue; // padding carries nothing
        }
        let mut memory = log.memory();
        memory.bytes[offset] ^= 1;
        let outcome = find_end(&mut memory, Lsn::ZERO, &history(&[(1, 0)]));
        if log.starts[frame] < flushed {
            let error = outcome.expect_err("damage in flushed data stops recovery").to_string();
            assert!(error.contains(&format!("LSN {}", log.starts[frame])), "{error}");
        } else {
            let found = outcome.unwrap();
            assert_eq!(found.end, log.starts[frame], "flipped at {offset}");
            // Nothing tells a last frame without its magic from what a recycled segment holds.
            let headless = Lsn(offset as u64) == log.starts[3];
            let cut = found.cut.map(|cut| (cut.lsn, cut.to));
            let expected = (!headless).then_some((log.starts[frame], log.end()));
            assert_eq!(cut, expected, "flipped at {offset}");
        }
    }
}

/// A bad sector is damage where it is known what must be there, whichever part of the frame it hits, and never a torn tail: what
/// nobody can read may have been acknowledged.
#[test]
fn unreadable_log_is_fetched_or_stops_the_node_uncut() {
    let writer = in_flight();
    let history = history(&[(1, 0)]);
    let end = writer.end();
    let whole = find_end(&mut writer.memory(), end, &history).expect("whole");
    assert_eq!(whole.end, end);
    for start in writer.starts.iter().copied() {
        for at in [start.0, start.0 + FRAME_HEADER_BYTES as u64 + 1] {
            let bad = (at, at + 1);
            let rot = find_end(&mut Memory { bad, ..writer.memory() }, end, &history).expect_err("known to be durable");
            assert!(
                matches!(&rot, RecoverError::Rot { lsn, reason: FrameError::Unreadable, .. } if *lsn == start),
                "{rot}"
            );
            assert_eq!(rot.gap().map(|gap| gap.from), Some(start));
            let known = replica(Lsn::ZERO);
            let refused =
                find_end(&mut Memory { bad, ..writer.memory() }, known, &history).expect_err("nothing is cut");
            assert!(refused.is_bad_sector() && refused.gap().is_none(), "{refused}");
        }
    }
    let bad = (0, writer.memory().bytes.len() as u64);
    let dead = find_end(&mut Memory { bad, ..writer.memory() }, replica(Lsn::ZERO), &history);
    assert!(dead.is_err_and(|error| error.is_bad_sector()));
}

/// What a node knows that follows another, up to `durable` by its own watermark.
fn replica(durable: Lsn) -> Known {
    Known { watermark: KnownWatermark::As(Watermark { durable, epoch: Epoch(1), led: Epoch(0) }), ..Known::default() }
}

#[test]
fn replica_recovers_by_its_own_watermark() {
    let log = in_flight();
    for broken in 0..log.starts.len() {
        let at = log.starts[broken];
        for durable in log.starts.iter().copied().chain([log.end()]) {
            for lost in [true, false] {
                let mut memory = log.memory();
                match lost {
                    true => memory.bytes[at.0 as usize..][..FRAME_ALIGN_BYTES].fill(0),
                    false => memory.bytes[at.0 as usize + 100] ^= 1,
                }
                match find_end(&mut memory, replica(durable), &history(&[(1, 0)])) {
                    Ok(found) => {
                        assert!(durable <= at, "cut at {at} what was durable up to {durable}");
                        assert_eq!(found.end, at);
                    }
                    Err(error) => assert!(durable > at, "durable up to {durable}, broken at {at}: {error}"),
                }
            }
        }
    }
}

#[test]
fn watermark_before_a_truncation_is_bounded_by_it() {
    let log = in_flight();
    let fork = log.starts[1];
    let known = replica(log.end());
    let found = find_end(&mut log.memory(), known, &history(&[(1, 0), (2, fork.0)])).unwrap();
    assert_eq!(found.end, fork);
    let ahead = replica(log.end().advance(4096));
    let error = find_end(&mut log.memory(), ahead, &history(&[(1, 0)])).unwrap_err().to_string();
    assert!(error.contains("durable"), "{error}");
}

#[test]
fn any_run_of_lost_sectors_in_the_unflushed_part_is_a_torn_tail() {
    let log = in_flight();
    let unflushed = log.starts[2];
    let sectors: Vec<usize> = (unflushed.0 as usize..log.bytes.len()).step_by(512).collect();
    for (index, &from) in sectors.iter().enumerate() {
        for &last in &sectors[index..] {
            let mut memory = log.memory();
            memory.bytes[from..last + 512].fill(0);
            let found = find_end(&mut memory, log.starts[2], &history(&[(1, 0)])).unwrap();
            assert!(found.end >= unflushed && (log.starts.contains(&found.end) || found.end == log.end()));
            // The frames that it keeps are whole: their bytes are those that were written.
            let kept = found.end.0 as usize;
            let hurt = (from..(last + 512).min(kept)).any(|at| log.bytes[at] != memory.bytes[at]);
            assert!(!hurt, "kept {kept}, lost {from} to {}", last + 512);
        }
    }
}

#[test]
fn a_log_with_nothing_left_before_its_end_is_refused() {
    let boundary = Lsn(SEGMENT_BYTES_MIN);
    let mut memory =
        Memory { bytes: vec![0; 2 * SEGMENT_BYTES_MIN as usize], segments: vec![SegmentNo(1)], bad: (0, 0) };
    let error = find_end(&mut memory, boundary, &history(&[(1, 0)])).unwrap_err().to_string();
    assert!(error.contains("missing"), "{error}");
}

#[test]
fn a_tail_lost_at_any_sector_ends_at_a_frame() {
    let log = in_flight();
    for kept in (log.starts[2].0 as usize..log.bytes.len()).step_by(512) {
        let mut memory = log.memory();
        memory.bytes[kept..].fill(0);
        let found = find_end(&mut memory, Lsn::ZERO, &history(&[(1, 0)])).unwrap();
        assert!(found.end.0 as usize <= kept.next_multiple_of(FRAME_ALIGN_BYTES), "kept {kept}");
        assert!(log.starts.contains(&found.end) || found.end == log.end());
    }
}

#[test]
fn lost_frame_under_a_valid_one_is_a_torn_tail() {
    let log = in_flight();
    let mut memory = log.memory();
    memory.bytes[log.starts[2].0 as usize..log.starts[3].0 as usize].fill(0);
    let found = find_end(&mut memory, Lsn::ZERO, &history(&[(1, 0)])).unwrap();
    assert_eq!(found.end, log.starts[2]);
    let cut = found.cut.unwrap();
    assert!(cut.reason.contains("without it"));
    assert_eq!((cut.lsn, cut.to), (log.starts[2], log.end()));
}

#[test]
fn frames_of_an_older_epoch_behind_a_fork_are_stale() {
    let log = in_flight();
    // The history says that epoch 2 began in the middle: what epoch 1 wrote behind it was truncated.
    let fork = log.starts[1];
    let found = find_end(&mut log.memory(), Lsn::ZERO, &history(&[(1, 0), (2, fork.0)])).unwrap();
    assert_eq!((found.end, found.cut), (fork, None));
}

#[test]
fn recycled_blocks_end_the_log() {
    let log = in_flight();
    let mut memory = log.memory();
    let (end, old) = (log.bytes.len(), log.bytes[..8192].to_vec());
    memory.bytes[end..end + old.len()].copy_from_slice(&old);
    let found = find_end(&mut memory, Lsn::ZERO, &history(&[(1, 0)])).unwrap();
    assert_eq!((found.end, found.cut), (log.end(), None));
}

/// A clean stop ends the log wherever it ends, and in a recycled segment that is often within what was a longer frame.
#[test]
fn rest_of_an_older_frame_behind_the_end_was_not_cut() {
    let log = in_flight();
    let mut memory = log.memory();
    let end = log.bytes.len();
    memory.bytes[end..end + 8192].fill(b'v');
    let found = find_end(&mut memory, replica(log.end()), &history(&[(1, 0)])).unwrap();
    assert_eq!((found.end, found.cut), (log.end(), None));
    // It may as well be a frame whose magic rotted, when nothing is known of what was durable.
    let unknown = Known { watermark: KnownWatermark::Damaged, ..Known::default() };
    let refused = find_end(&mut memory, unknown, &history(&[(1, 0)])).unwrap_err();
    assert!(refused.to_string().contains("remove that file"), "{refused}");
}

#[test]
fn a_log_that_does_not_reach_what_the_store_holds_is_refused() {
    let log = in_flight();
    let beyond = log.end().advance(4096);
    let error = find_end(&mut log.memory(), beyond, &history(&[(1, 0)])).unwrap_err();
    assert!(error.to_string().contains("the store holds"), "{error}");
}

#[test]
fn a_log_with_an_origin_begins_there_whatever_stands_before_it() {
    let log = in_flight();
    let crc_before = |index: usize| -> u32 {
        let frame = UnverifiedFrame::parse(&log.bytes[log.starts[index].0 as usize..], log.starts[index]);
        frame.expect("a frame").claimed().previous_crc
    };
    for begun in 1..log.starts.len() {
        let mut memory = log.memory();
        memory.bytes[..log.starts[begun].0 as usize].fill(0);
        let origin = Some(Origin { lsn: log.starts[begun], crc: crc_before(begun) });
        for needed in log.starts[begun..].iter().copied().chain([log.end()]) {
            let known = Known { applied: needed, origin, watermark: KnownWatermark::Never };
            let found = find_end(&mut memory, known, &history(&[(1, 0)])).expect("a log");
            assert_eq!((found.end, found.crc, found.cut), (log.end(), log.crc, None), "from {begun}, needed {needed}");
            // Without the origin the same files are damage.
            let error = find_end(&mut memory, needed, &history(&[(1, 0)])).expect_err("no origin");
            assert!(matches!(error, RecoverError::Rot { .. }), "{error}");
        }
        let wrong = Some(Origin { lsn: log.starts[begun], crc: crc_before(begun) ^ 1 });
        let known = Known { applied: log.end(), origin: wrong, watermark: KnownWatermark::Never };
        assert!(find_end(&mut memory, known, &history(&[(1, 0)])).is_err(), "another chain");
        // A store from before the origin cannot be brought to the log's end.
        let known = Known { applied: log.starts[begun - 1], origin, watermark: KnownWatermark::Never };
        assert!(find_end(&mut memory, known, &history(&[(1, 0)])).is_err(), "a store that is too old");
    }
    // Nothing was received yet: the log is empty and goes on from the origin.
    let origin = Origin { lsn: Lsn(3 * SEGMENT_BYTES_MIN + 8192), crc: 77 };
    for segments in [vec![], vec![SegmentNo(3)]] {
        let bytes = vec![0; 4 * SEGMENT_BYTES_MIN as usize];
        let known = Known { applied: origin.lsn, origin: Some(origin), watermark: KnownWatermark::Never };
        let found = find_end(&mut Memory { bytes, segments, bad: (0, 0) }, known, &history(&[(1, 0)])).expect("empty");
        assert_eq!((found.end, found.crc, found.cut), (origin.lsn, 77, None));
    }
}

/// A state that ends with the frame before `starts[index]`.
fn state_before(log: &Writer, index: usize) -> LastFrame {
    let frame = UnverifiedFrame::parse(&log.bytes[log.starts[index].0 as usize..], log.starts[index]);
    LastFrame { end: log.starts[index], epoch: log.epoch, crc: frame.expect("a frame").claimed().previous_crc }
}

#[test]
fn state_of_the_log_is_told_from_one_of_another_log() {
    let log = ten();
    let ours = history(&[(1, 0)]);
    let lineage = |memory: &mut Memory, last, origin, history: &EpochHistory| {
        lineage_of(memory, last, origin, history).expect("memory can be read")
    };
    let of = |last| lineage(&mut log.memory(), last, None, &ours);
    let nothing = LastFrame { end: Lsn::ZERO, epoch: Epoch(0), crc: 0 };
    assert_eq!(of(nothing), Lineage::Same);
    for index in 1..log.starts.len() {
        let last = state_before(&log, index);
        assert_eq!(of(last), Lineage::Same, "before frame {index}");
        let others = [
            LastFrame { crc: last.crc ^ 1, ..last },
            LastFrame { epoch: Epoch(2), ..last },
            LastFrame { end: last.end.advance(512), ..last },
        ];
        for other in others {
            assert!(matches!(of(other), Lineage::Other(_)), "{other:?}: {:?}", of(other));
        }
        // The same frames, but a later leader's log goes on from an earlier place with its own.
        let cut = history(&[(1, 0), (2, last.end.0 - 4096)]);
        assert!(matches!(lineage(&mut log.memory(), last, None, &cut), Lineage::Other(_)));
        // Damage on the way there proves nothing.
        let mut damaged = log.memory();
        damaged.bytes[log.starts[index - 1].0 as usize + 70] ^= 1;
        assert_eq!(lineage(&mut damaged, last, None, &ours), Lineage::Unknown);
        // The log begins there, with a snapshot.
        let mut memory = log.memory();
        memory.bytes[..last.end.0 as usize].fill(0);
        let origin = Some(Origin { lsn: last.end, crc: last.crc });
        assert_eq!(lineage(&mut memory, last, origin, &ours), Lineage::Same);
        let origin = Some(Origin { lsn: last.end, crc: last.crc ^ 1 });
        assert!(matches!(lineage(&mut memory, last, origin, &ours), Lineage::Other(_)));
    }
    assert_eq!(of(LastFrame { end: log.end(), epoch: Epoch(1), crc: log.crc }), Lineage::Same);
    // The files end before it, in its own epoch: whether they lost something, recovery says.
    assert_eq!(of(LastFrame { end: log.end().advance(4096), epoch: Epoch(1), crc: 1 }), Lineage::Unknown);
}

/// A log of ten frames over which `repair` is tried, and the same with damage.
fn ten() -> Writer {
    let mut log = Writer::new(1);
    for number in 0..10u8 {
        log.frame(log.end().0, &vec![number; 3000 + usize::from(number) * 700]);
    }
    log
}

#[test]
fn damaged_frames_are_given_back_by_a_complete_log_only() {
    use crate::repair::Patch;
    let (log, history) = (ten(), history(&[(1, 0)]));
    let known = replica(log.end());
    let ends: Vec<Lsn> = log.starts[1..].iter().copied().chain([log.end()]).collect();
    for first in 0..log.starts.len() {
        for (last, end) in ends.iter().enumerate().skip(first) {
            let mut memory = log.memory();
            for frame in first..=last {
                memory.bytes[log.starts[frame].0 as usize + 70] ^= 8;
            }
            let gap = find_end(&mut memory, known, &history).expect_err("rot").gap().expect("a gap");
            assert_eq!(gap.from, log.starts[first]);
            let mut patch = Patch::new(gap, &history, SEGMENT_BYTES_MIN);
            while !patch.is_closed(&mut memory).expect("memory") {
                let at = patch.position().0 as usize;
                // Another's damage is not taken, nor a frame that belongs elsewhere.
                let mut hurt = log.bytes[at..].to_vec();
                hurt[90] ^= 1;
                patch.take(&hurt).expect_err("damaged");
                if at > 0 {
                    patch.take(&log.bytes[..at]).expect_err("of another position");
                }
                let header = patch.take(&log.bytes[at..]).expect("the right one");
                let (from, to) = (at, header.end().0 as usize);
                memory.bytes[from..to].copy_from_slice(&log.bytes[from..to]);
            }
            assert_eq!(patch.position(), *end, "no more than what is damaged");
            assert_eq!(find_end(&mut memory, known, &history).expect("whole").end, log.end());
        }
    }
}

#[test]
fn a_frame_of_another_leadership_or_chain_is_not_taken() {
    use crate::repair::{Patch, Unfit};
    let log = ten();
    let at = log.starts[4];
    let gap = |previous_crc| crate::error::Gap { from: at, previous_crc, needed: log.end() };
    let other = history(&[(1, 0), (2, at.0)]);
    let outcome = Patch::new(gap(None), &other, SEGMENT_BYTES_MIN).take(&log.bytes[at.0 as usize..]);
    assert!(matches!(outcome, Err(Unfit::Epoch { .. })), "{outcome:?}");
    let ours = history(&[(1, 0)]);
    let outcome = Patch::new(gap(Some(1)), &ours, SEGMENT_BYTES_MIN).take(&log.bytes[at.0 as usize..]);
    assert_eq!(outcome, Err(Unfit::Frame { at, reason: FrameError::Chain }));
    let mut end = Patch::new(gap(None), &ours, at.0 + 4096);
    assert!(matches!(end.take(&log.bytes[at.0 as usize..]), Err(Unfit::Segment { .. })), "beyond its segment");
}

#[test]
fn with_a_damaged_watermark_nothing_is_cut_unseen() {
    let log = in_flight();
    let clean = Known { watermark: KnownWatermark::Damaged, ..Known::default() };
    assert_eq!(find_end(&mut log.memory(), clean, &history(&[(1, 0)])).expect("whole").end, log.end());
    for start in &log.starts {
        for offset in [0, 40, 100] {
            let mut memory = log.memory();
            memory.bytes[start.0 as usize + offset] ^= 1;
            let error = find_end(&mut memory, clean, &history(&[(1, 0)])).expect_err("it may have been acknowledged");
            assert!(error.gap().is_some_and(|gap| gap.from == *start), "{error}");
        }
    }
}
