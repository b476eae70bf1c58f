//! A process that runs out of file descriptors: the log waits for those that its next segment needs, for a while. A file of its own,
//! because the limit is the whole process's.

mod common;

use std::time::{Duration, Instant};

use common::*;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use walferry_engine::log::AppendError;
use walferry_engine::lsn::SegmentNo;

/// What is open stays open, and nothing more can be opened.
const NONE: u64 = 3;

fn limit(descriptors: u64) -> u64 {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
    setrlimit(Resource::RLIMIT_NOFILE, descriptors, hard).expect("a lower limit");
    soft
}

/// Appends until the log has no segment, and then until `enough`.
fn append_until(node: &mut Node, mut enough: impl FnMut(&Node) -> bool) -> Option<String> {
    let record = vec![4; 2 << 20];
    while !enough(node) {
        match node.log.append(&record) {
            Ok(_) => {}
            Err(AppendError::Busy) => {
                node.turn().expect("the disk works");
                node.take_all();
            }
            Err(AppendError::Stopped(text)) => return Some(text),
            Err(error) => panic!("{error}"),
        }
    }
    None
}

#[test]
fn log_waits_for_descriptors_and_stops_when_none_come() {
    let dir = directory();
    let mut node = Node::leader(config(dir.path()));
    let soft = limit(NONE);
    let mut short: Option<Instant> = None;
    let stopped = append_until(&mut node, |node| {
        let error = node.log.space_error().map(str::to_owned);
        let full = node.log.end().segment(16 << 20) > SegmentNo(0) && node.log.idle() && error.is_some();
        let since = full.then(|| *short.get_or_insert_with(Instant::now));
        since.is_some_and(|since| since.elapsed() > Duration::from_secs(1))
    });
    let error = node.log.space_error().expect("no segment can be prepared").to_owned();
    assert!(error.contains("Too many open files"), "{error}");
    assert_eq!(stopped, None, "it waits");
    limit(soft);
    let until = SegmentNo(5).start(16 << 20);
    assert_eq!(append_until(&mut node, |node| node.log.end() >= until), None, "it goes on");
    node.flush();

    limit(NONE);
    let begun = Instant::now();
    let stopped = append_until(&mut node, |_| begun.elapsed() > Duration::from_secs(60)).expect("it stops in the end");
    limit(soft);
    assert!(stopped.contains("cannot prepare segment") && stopped.contains("Too many open files"), "{stopped}");
    assert!(begun.elapsed() >= Duration::from_secs(5), "not at once");
}
