//! A full disk: appends are refused, what is there stays readable, and service resumes when there is space.

mod common;

use std::path::Path;

use common::*;
use nix::mount::{MsFlags, mount};
use walferry_engine::log::{AppendError, LogConfig};
use walferry_engine::lsn::{Lsn, SegmentNo};

/// A filesystem of a given size; nothing is left behind however the test ends.
fn small_filesystem(at: &Path, size: &str) -> nix::Result<()> {
    walferry_mounts::own()?;
    mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some(format!("size={size}").as_str()))
}

#[test]
fn a_full_disk_refuses_appends_until_there_is_space() {
    let dir = directory();
    if let Err(error) = small_filesystem(dir.path(), "40m") {
        println!("skipped: this user may not mount a small filesystem ({error})");
        return;
    }
    // Two segments of 16 MiB fit, a third does not.
    let mut node = Node::leader(LogConfig { buffered: true, ..config(dir.path()) });
    node.run("the preparer reports the full disk", |log| {
        let _ = log.next_flushed();
        log.space_error().is_some()
    });
    let record = vec![4; 2 << 20];
    let mut appended = 0;
    let refused = loop {
        match node.log.append(&record) {
            Ok(_) => appended += 1,
            Err(AppendError::Busy) => {
                node.turn().expect("the disk works");
                node.take_all();
            }
            Err(AppendError::NoSpace(text)) => break text,
            Err(error) => panic!("{error}"),
        }
    };
    assert!(refused.contains("No space left") && refused.contains("0000000000000002.wal"), "{refused}");
    assert!(appended >= 14, "both segments were filled: {appended}");
    node.flush();
    let flushed = node.log.flushed();
    assert_eq!(flushed, SegmentNo(2).start(16 << 20));
    frames_on_disk(&node.log, Lsn::ZERO, flushed, |_| ());
    // Retention lets a segment go: it comes back as the next one, without any new space.
    node.take_all();
    node.log.release_before(SegmentNo(1).start(16 << 20).advance(4096));
    node.run("the released segment is recycled", |log| log.append(b"again").is_ok());
    node.flush();
    // And with new space the preparer gets ahead again.
    let none: Option<&str> = None;
    mount(none, dir.path(), none, MsFlags::MS_REMOUNT, Some("size=200m")).expect("remount");
    node.run("the space error clears", |log| log.space_error().is_none());
    let until = SegmentNo(5).start(16 << 20);
    while node.log.end() < until {
        match node.log.append(&record) {
            Ok(_) => {}
            Err(AppendError::Busy) => {
                node.turn().expect("the disk works");
                node.take_all();
            }
            // From an attempt before there was space; the preparer tries again each second.
            Err(AppendError::NoSpace(_)) => node.run("appends are taken again", |log| log.append(&record).is_ok()),
            Err(error) => panic!("{error}"),
        }
    }
    node.flush();
    node.close();
}

#[test]
fn a_log_that_can_get_no_segment_stops() {
    let dir = directory();
    let mut node = Node::leader(LogConfig { buffered: true, ..config(dir.path()) });
    // What is open goes on; no name can be made durable in the directory any more.
    std::fs::rename(dir.path().join("log"), dir.path().join("elsewhere")).expect("renamed");
    let record = vec![4; 2 << 20];
    let stopped = loop {
        match node.log.append(&record) {
            Ok(_) => {}
            Err(AppendError::Busy) => {
                node.turn().expect("the disk works");
                node.take_all();
            }
            Err(AppendError::Stopped(text)) => break text,
            Err(error) => panic!("{error}"),
        }
    };
    assert!(stopped.contains("cannot prepare segment"), "{stopped}");
    assert_eq!(node.log.stopped(), Some(stopped.as_str()));
}
