//! The log on a real disk: durability, order, segments, the lock, and what happens when the disk fails.

mod common;

use std::cell::Cell;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use common::*;
use walferry_engine::limits::{FRAME_TARGET_BYTES, SEGMENT_BYTES_MIN};
use walferry_engine::log::{AppendError, LogConfig, SyncMethod};
use walferry_engine::lsn::{Lsn, SegmentNo};
use walferry_engine::watermark::WATERMARK_FILE;

fn variants(dir: &Path) -> [(&'static str, LogConfig); 3] {
    [
        ("dsync", config(dir)),
        ("fdatasync", LogConfig { sync_method: SyncMethod::Fdatasync, ..config(dir) }),
        ("buffered", LogConfig { buffered: true, ..config(dir) }),
    ]
}

#[test]
fn what_was_flushed_is_there_after_reopening() {
    for index in 0..3 {
        let dir = directory();
        let (name, config) = variants(dir.path())[index].clone();
        let mut node = Node::leader(config.clone());
        assert_eq!(node.log.end(), Lsn::ZERO);
        let lsn = node.append(b"one");
        assert_eq!(lsn, node.log.end());
        assert_eq!(node.log.sealed(), Lsn::ZERO);
        node.append(b"two");
        node.flush();
        let frame = node.log.next_flushed().expect("a flushed frame");
        let records: Vec<_> = frame.records().collect();
        assert_eq!(records[0], (lsn, &b"one"[..]), "{name}");
        assert_eq!(records[1].1, b"two");
        assert!(node.log.next_flushed().is_none());
        let (end, crc) = (node.log.flushed(), node.log.crc_at_end());
        node.close();
        let node = Node::open(config);
        assert_eq!((node.log.flushed(), node.log.crc_at_end()), (end, crc), "{name}");
        assert!(node.recovery.cut.is_none());
        node.close();
    }
}

#[test]
fn many_writes_in_flight_become_durable_in_order() {
    for index in 0..3 {
        let dir = directory();
        let (name, config) = variants(dir.path())[index].clone();
        let mut node = Node::leader(LogConfig { write_depth: 8, ..config });
        let count = 6000;
        let mut taken = 0;
        let mut take = |node: &mut Node| {
            while let Some(frame) = node.log.next_flushed() {
                for (_, bytes) in frame.records() {
                    assert!(bytes == record(taken), "{name}: record {taken}");
                    taken += 1;
                }
            }
        };
        for number in 0..count {
            // Few enough at a time that the disk always has several frames, of one record up to many.
            while let Err(error) = node.log.append(&record(number)) {
                assert_eq!(error, AppendError::Busy);
                node.turn().expect("the disk works");
                take(&mut node);
            }
            if number % 5 == 0 {
                node.log.poll(&mut node.ring, std::time::Instant::now());
            }
            if number % 50 == 0 {
                node.turn().expect("the disk works");
                take(&mut node);
            }
        }
        node.flush();
        take(&mut node);
        assert_eq!(taken, count, "{name}");
        let (flushed, log) = (node.log.flushed(), &node.log);
        let mut on_disk = 0;
        frames_on_disk(log, Lsn::ZERO, flushed, |frame| on_disk += frame.records().count() as u64);
        assert_eq!(on_disk, count, "{name}");
        node.close();
    }
}

/// Two flushes of one file at once share one error of the page cache, and one of them would not get it.
#[test]
fn buffered_log_has_one_write_in_flight() {
    let dir = directory();
    for (buffered, at_once) in [(true, 1), (false, 3)] {
        let config = LogConfig { buffered, write_depth: 8, ..config(&dir.path().join(at_once.to_string())) };
        std::fs::create_dir(&config.dir).expect("made");
        let mut node = Node::leader(config);
        let mut in_flight = 0;
        for number in 0..3 {
            node.append(&record(number));
            let before = node.log.written();
            node.log.poll(&mut node.ring, std::time::Instant::now());
            in_flight += u32::from(node.log.written() > before);
        }
        assert_eq!(in_flight, at_once, "buffered: {buffered}");
        node.flush();
        assert_eq!(node.log.flushed(), node.log.end());
        node.close();
    }
}

#[test]
fn segments_are_filled_and_recycled() {
    let dir = directory();
    let mut node = Node::leader(config(dir.path()));
    let big = vec![7; 3 << 20];
    let mut appended = 0u64;
    while node.log.end() < SegmentNo(4).start(SEGMENT_BYTES_MIN) {
        node.append(&big);
        appended += 1;
    }
    node.flush();
    node.take_all();
    let flushed = node.log.flushed();
    let (mut fillers, mut records) = (0, 0);
    frames_on_disk(&node.log, Lsn::ZERO, flushed, |frame| match frame.header().filler {
        true => fillers += 1,
        false => records += frame.records().count() as u64,
    });
    assert_eq!((fillers, records), (4, appended));
    assert_eq!(node.log.start(), Lsn::ZERO);
    let released = SegmentNo(3).start(SEGMENT_BYTES_MIN);
    node.log.release_before(released.advance(5));
    assert_eq!(node.log.start(), released);
    // The files of the released segments come back under the numbers that follow the last one ready.
    let path = |number| node.log.segment_path(SegmentNo(number));
    let (oldest, recycled) = (path(0), path(9));
    node.run("released segments are recycled", |_| !oldest.exists() && recycled.exists());
    while node.log.end() < SegmentNo(9).start(SEGMENT_BYTES_MIN) {
        node.append(&big);
    }
    node.flush();
    frames_on_disk(&node.log, released, node.log.flushed(), |_| ());
    node.close();
    let node = Node::try_open(config(dir.path()), &history(), released).expect("it opens again");
    assert_eq!(node.log.start(), released);
    node.close();
}

#[test]
fn a_torn_tail_is_cut_and_written_anew() {
    let dir = directory();
    let mut node = Node::leader(config(dir.path()));
    node.append(b"kept");
    node.flush();
    let kept = node.log.flushed();
    let watermark = std::fs::read(dir.path().join(WATERMARK_FILE)).expect("the watermark");
    node.append(&[1; 9000]);
    node.flush();
    let path = node.log.segment_path(SegmentNo(0));
    node.close();
    // The directory as a crash in the middle of the second write leaves it.
    std::fs::write(dir.path().join(WATERMARK_FILE), watermark).expect("the watermark of before");
    let mut bytes = std::fs::read(&path).expect("the segment");
    let second_block = kept.0 as usize + 4096;
    bytes[second_block..second_block + 4096].fill(0);
    std::fs::write(&path, bytes).expect("tear");
    let mut node = Node::open(config(dir.path()));
    assert_eq!(node.log.flushed(), kept);
    assert_eq!(node.recovery.cut.as_ref().expect("a torn tail").lsn, kept);
    node.log.lead(EPOCH.next());
    node.append(b"anew");
    node.flush();
    let mut seen = Vec::new();
    frames_on_disk(&node.log, Lsn::ZERO, node.log.flushed(), |frame| {
        seen.extend(frame.records().map(|(_, bytes)| bytes.to_vec()));
    });
    assert_eq!(seen, [b"kept", b"anew"]);
    node.close();
}

#[test]
fn a_second_log_in_the_same_directory_is_refused() {
    let dir = directory();
    let node = Node::open(config(dir.path()));
    let second = Node::try_open(config(dir.path()), &history(), Lsn::ZERO);
    let text = second.err().expect("refused").to_string();
    assert!(text.contains("in use by process"), "{text}");
    node.close();
    Node::open(config(dir.path())).close();
}

#[test]
fn a_memory_filesystem_is_refused_unless_buffered() {
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else {
        println!("skipped: there is no /dev/shm to write to");
        return;
    };
    let text = Node::try_open(config(dir.path()), &history(), Lsn::ZERO).err().expect("refused").to_string();
    assert!(text.contains("--buffered") && text.contains("tmpfs"), "{text}");
    let mut node = Node::leader(LogConfig { buffered: true, ..config(dir.path()) });
    node.append(b"in memory");
    node.flush();
    node.close();
}

#[test]
fn settings_out_of_bounds_are_named() {
    let dir = directory();
    let refuse = |config| Node::try_open(config, &history(), Lsn::ZERO).err().expect("refused").to_string();
    assert!(refuse(LogConfig { segment_bytes: 4096, ..config(dir.path()) }).contains("4096"));
    assert!(refuse(LogConfig { write_depth: 0, ..config(dir.path()) }).contains("write depth"));
    assert!(refuse(LogConfig { log_buffer_bytes: 1 << 20, ..config(dir.path()) }).contains("log buffer"));
    let mut node = Node::leader(config(dir.path()));
    // One alone may have been cut.
    node.run("a second segment is there", |log| log.segment_path(SegmentNo(1)).exists());
    node.close();
    let other = LogConfig { segment_bytes: 2 * SEGMENT_BYTES_MIN, log_buffer_bytes: 64 << 20, ..config(dir.path()) };
    let text = refuse(other);
    assert!(text.contains("segment"), "{text}");
}

#[test]
fn a_record_that_no_frame_holds_is_refused_and_the_largest_fits() {
    let dir = directory();
    let mut node = Node::leader(config(dir.path()));
    node.append(b"small");
    let Err(AppendError::TooLarge { bytes_max, .. }) = node.log.append(&vec![0; SEGMENT_BYTES_MIN as usize]) else {
        panic!("too large");
    };
    assert_eq!(node.log.end(), Lsn(64 + 4 + 5), "a refused record leaves no trace");
    node.append(&vec![9; bytes_max]);
    node.flush();
    assert_eq!(node.log.flushed(), SegmentNo(2).start(SEGMENT_BYTES_MIN));
    frames_on_disk(&node.log, Lsn::ZERO, node.log.flushed(), |_| ());
    node.close();
}

#[test]
fn full_log_buffer_is_busy_until_frames_are_released() {
    let dir = directory();
    let mut node = Node::leader(config(dir.path()));
    let record = vec![3; 1 << 20];
    let pin = node.log.pin(Lsn::ZERO);
    let next_segment = node.log.segment_path(SegmentNo(2));
    let fill = |node: &mut Node| {
        let mut appended = 0;
        loop {
            // With every write done and the next segment there, only the buffer can be what is short.
            let quiet = node.log.idle() && next_segment.exists() && node.log.hot_frame(Lsn::ZERO).is_some();
            match node.log.append(&record) {
                Ok(_) => appended += 1,
                Err(error) => assert_eq!(error, AppendError::Busy),
            }
            if quiet && node.log.idle() {
                return appended;
            }
            node.turn().expect("the disk works");
        }
    };
    let first = fill(&mut node);
    assert!(first > 20, "{first} MiB");
    assert_eq!(node.log.pin_blocking(), None, "what was not applied blocks, not the pin");
    let taken = node.take_all();
    assert!(taken >= first);
    // It may have been busy for want of a segment before; what stays is the pin.
    node.run("the pin is what blocks", |log| {
        assert_eq!(log.append(&record), Err(AppendError::Busy));
        log.pin_blocking() == Some(pin)
    });
    assert!(!node.log.has_capacity());
    assert_eq!(node.log.hot_frame(Lsn::ZERO).expect("pinned").header().lsn, Lsn::ZERO);
    node.log.unpin(pin);
    // A busy machine may still be preparing the segment that comes next.
    node.run("there is capacity without the pin", |log| log.has_capacity());
    node.append(&record);
    assert_eq!(node.log.pin_blocking(), None);
    assert!(node.log.hot_frame(Lsn::ZERO).is_none());
    node.close();
}

#[test]
fn an_error_of_the_disk_stops_the_log_for_good() {
    for (index, what) in [(0, "write failed"), (1, "fdatasync failed")] {
        let dir = directory();
        let mut node = Node::leader(LogConfig { write_depth: 2, ..variants(dir.path())[index].1.clone() });
        node.append(b"durable");
        node.flush();
        let flushed = node.log.flushed();
        let flush_part = index as u64;
        node.meddle = Some(Box::new(move |completion| {
            if completion.token.id() & 1 == flush_part {
                completion.result = -libc::EIO;
            }
        }));
        node.append(b"lost");
        let failure = loop {
            if let Err(failure) = node.turn() {
                break failure;
            }
        };
        assert_eq!(failure.lsn, flushed);
        let text = failure.to_string();
        assert!(text.contains(what) && text.contains(".wal") && text.contains("LSN 0/1000"), "{text}");
        node.meddle = None;
        assert_eq!(node.log.append(b"refused"), Err(AppendError::Stopped(text.clone())));
        assert_eq!(node.log.stopped(), Some(text.as_str()));
        for _ in 0..3 {
            node.turn().expect("a failure is told once");
        }
        assert_eq!(node.log.flushed(), flushed);
        assert!(node.log.has_capacity(), "who waits for space is to learn why there will be none");
        let closed = node.log.shutdown(&mut node.ring).expect_err("not everything is durable");
        assert_eq!(closed.to_string(), text);
    }
}

#[test]
fn a_short_write_is_finished_with_a_flush_of_its_own() {
    for index in 0..3 {
        let dir = directory();
        let (name, config) = variants(dir.path())[index].clone();
        let mut node = Node::leader(config);
        let (writes, flushes) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(0)));
        let (w, f) = (Rc::clone(&writes), Rc::clone(&flushes));
        node.meddle = Some(Box::new(move |completion| {
            let counter = if completion.token.id() & 1 == 0 { &w } else { &f };
            counter.set(counter.get() + 1);
            // The first write of three blocks ends in the middle of the second; its flush reports success.
            if completion.token.id() & 1 == 0 && w.get() == 1 {
                completion.result = 6000;
            }
        }));
        node.append(&[5; 10_000]);
        node.flush();
        assert_eq!(node.log.flushed(), Lsn(3 * 4096));
        assert_eq!((writes.get(), flushes.get()), (2, if index == 0 { 0 } else { 2 }), "{name}");
        frames_on_disk(&node.log, Lsn::ZERO, node.log.flushed(), |_| ());
        node.close();
    }
}

#[test]
fn open_frame_is_sealed_at_its_target_or_after_the_delay() {
    let dir = directory();
    let mut node = Node::leader(LogConfig { commit_delay: Duration::from_millis(20), ..config(dir.path()) });
    node.append(b"waits");
    node.log.poll(&mut node.ring, std::time::Instant::now());
    assert_eq!(node.log.sealed(), Lsn::ZERO);
    let now = std::time::Instant::now();
    let left = node.log.next_timeout(now).expect("a deadline");
    assert!(left <= Duration::from_millis(20));
    node.log.poll(&mut node.ring, now + left);
    assert_eq!(node.log.sealed(), Lsn(4096));
    assert_eq!(node.log.next_timeout(now), None);
    node.flush();
    let piece = vec![1; 100_000];
    while node.log.sealed() == Lsn(4096) {
        node.append(&piece);
    }
    let sealed = node.log.sealed() - Lsn(4096);
    assert!(sealed <= FRAME_TARGET_BYTES as u64 && sealed > FRAME_TARGET_BYTES as u64 - 110_000);
    node.close();
}

#[test]
fn a_log_buffer_that_cannot_be_registered_works_as_well() {
    let dir = directory();
    // The ring holds another fixed buffer already: the log's registration fails, as it does for want of memory.
    let other = vec![0u8; 4096];
    let mut node = Node::try_open_on(config(dir.path()), &history(), Lsn::ZERO, |ring| {
        let other = libc::iovec { iov_base: other.as_ptr().cast_mut().cast(), iov_len: other.len() };
        // SAFETY: the vector outlives the ring, which never writes to it.
        unsafe { ring.register_buffers(&[other]) }.expect("the ring has no buffers yet");
    })
    .expect("the log opens");
    node.log.lead(EPOCH);
    assert_eq!(node.log.fixed_index(Lsn::ZERO, 4096), None);
    let big = vec![8; 1 << 20];
    while node.log.end() < SegmentNo(3).start(SEGMENT_BYTES_MIN) {
        node.append(&big);
    }
    node.flush();
    frames_on_disk(&node.log, Lsn::ZERO, node.log.flushed(), |_| ());
    node.close();
}
