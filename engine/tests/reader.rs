//! Reading a log back from its files: every frame once and in order, from any frame on, and clear words where a file is
//! missing, short or damaged.

mod common;

use std::os::unix::fs::FileExt;

use common::{Node, config, directory, history, record};
use walferry_engine::error::RecoverError;
use walferry_engine::limits::SEGMENT_BYTES_MIN;
use walferry_engine::lsn::{Lsn, SegmentNo};
use walferry_engine::reader::LogReader;
use walferry_engine::recover::recover;

/// A closed log of more than three segments: the directory, every frame's (start, records), and the end.
fn written() -> (tempfile::TempDir, Vec<(Lsn, usize)>, Lsn) {
    let dir = directory();
    let mut node = Node::leader(config(dir.path()));
    let mut number = 0;
    while node.log.end() < SegmentNo(3).start(SEGMENT_BYTES_MIN).advance(1 << 20) {
        node.append(&record(number));
        node.append(&vec![number as u8; 3 << 20]);
        number += 2;
        node.take_all();
    }
    node.flush();
    let end = node.log.flushed();
    let mut frames = Vec::new();
    common::frames_on_disk(&node.log, Lsn::ZERO, end, |frame| {
        frames.push((frame.header().lsn, frame.records().count()));
    });
    node.close();
    (dir, frames, end)
}

fn read_all(reader: &mut LogReader) -> Result<Vec<(Lsn, usize)>, RecoverError> {
    let mut frames = Vec::new();
    while let Some(frame) = reader.next_frame()? {
        frames.push((frame.header().lsn, frame.records().count()));
    }
    Ok(frames)
}

#[test]
fn every_frame_is_read_once_from_any_frame_to_any_frame() {
    let (dir, frames, end) = written();
    let log_dir = dir.path().join("log");
    let open = |from, until| LogReader::open(&log_dir, SEGMENT_BYTES_MIN, from, until).expect("readable");
    for (index, (from, _)) in frames.iter().enumerate() {
        assert_eq!(read_all(&mut open(*from, end)).expect("whole"), frames[index..], "from {from}");
        assert_eq!(read_all(&mut open(Lsn::ZERO, *from)).expect("whole"), frames[..index], "until {from}");
    }
    let found = recover(&log_dir, SEGMENT_BYTES_MIN, Lsn::ZERO, &history()).expect("whole");
    assert_eq!((found.end, found.cut), (end, None));
}

#[test]
fn a_missing_segment_is_named_by_reader_and_recovery() {
    for gone in 0..4 {
        let (dir, _, end) = written();
        let log_dir = dir.path().join("log");
        let path = log_dir.join(SegmentNo(gone).file_name());
        std::fs::remove_file(&path).expect("a segment to remove");
        let mut reader = LogReader::open(&log_dir, SEGMENT_BYTES_MIN, Lsn::ZERO, end).expect("a directory");
        let text = read_all(&mut reader).expect_err("a hole").to_string();
        assert!(text.contains(path.to_str().expect("text")) && text.contains("missing"), "{text}");
        let outcome = Node::try_open(config(dir.path()), &history(), Lsn::ZERO);
        let text = outcome.err().expect("refused").to_string();
        assert!(text.contains(path.to_str().expect("text")) && text.contains("missing"), "{text}");
    }
}

#[test]
fn a_short_segment_and_a_damaged_frame_are_named() {
    let (dir, frames, end) = written();
    let log_dir = dir.path().join("log");
    let (lsn, _) = frames[frames.len() / 2];
    let path = log_dir.join(lsn.segment(SEGMENT_BYTES_MIN).file_name());
    let offset = lsn.offset(SEGMENT_BYTES_MIN);
    let file = std::fs::File::options().write(true).open(&path).expect("the segment");
    file.write_all_at(&[0xff], offset + 90).expect("damage");
    let mut reader = LogReader::open(&log_dir, SEGMENT_BYTES_MIN, Lsn::ZERO, end).expect("a directory");
    let text = read_all(&mut reader).expect_err("damage").to_string();
    assert!(text.contains(&format!("{} at offset {offset} (LSN {lsn})", path.display())), "{text}");
    assert_eq!(reader.position(), lsn, "it stops in front of the damage");
    file.set_len(SEGMENT_BYTES_MIN - 4096).expect("a short segment");
    let text = Node::try_open(config(dir.path()), &history(), Lsn::ZERO).err().expect("refused").to_string();
    assert!(text.contains("damage") && text.contains(path.to_str().expect("text")), "{text}");
    let bytes = std::fs::metadata(&path).expect("the segment").len();
    assert_eq!(bytes, SEGMENT_BYTES_MIN, "zeros stand for what it lost");
}
