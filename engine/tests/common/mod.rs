//! A log with its ring on a real disk, driven as the daemon's loop drives it.
#![allow(dead_code)]

use std::path::Path;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use walferry_engine::epoch::EpochHistory;
use walferry_engine::frame::Frame;
use walferry_engine::limits::SEGMENT_BYTES_MIN;
use walferry_engine::log::{AppendError, Log, LogConfig, LogError, LogFailure, SyncMethod};
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_engine::recover::Recovery;
use walferry_engine::ring::{Completion, Owner, Ring};
use walferry_engine::waker::WakeSource;

/// No test waits longer for one event.
const PATIENCE: Duration = Duration::from_secs(20);
pub const EPOCH: Epoch = Epoch(1);

pub fn directory() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory on a real disk")
}

pub fn config(dir: &Path) -> LogConfig {
    LogConfig {
        dir: dir.to_owned(),
        segment_bytes: SEGMENT_BYTES_MIN,
        write_depth: 4,
        sync_method: SyncMethod::Dsync,
        buffered: false,
        commit_delay: Duration::ZERO,
        log_buffer_bytes: 2 * SEGMENT_BYTES_MIN as usize,
        keep_bytes_min: 0,
    }
}

pub fn history() -> EpochHistory {
    let mut history = EpochHistory::default();
    history.push(EPOCH, Lsn::ZERO).expect("the first epoch");
    history
}

/// Something to alter completions with before the log sees them.
pub type Meddle = Box<dyn FnMut(&mut Completion)>;

pub struct Node {
    pub log: Log,
    pub ring: Ring,
    pub recovery: Recovery,
    pub meddle: Option<Meddle>,
    source: WakeSource,
}

impl Node {
    pub fn open(config: LogConfig) -> Node {
        Node::try_open(config, &history(), Lsn::ZERO).expect("the log opens")
    }

    pub fn try_open(config: LogConfig, history: &EpochHistory, from: Lsn) -> Result<Node, LogError> {
        Node::try_open_on(config, history, from, |_| ())
    }

    /// Opens on a ring that `prepare` has had in hand.
    pub fn try_open_on(
        config: LogConfig,
        history: &EpochHistory,
        from: Lsn,
        prepare: impl FnOnce(&mut Ring),
    ) -> Result<Node, LogError> {
        let mut ring = Ring::new(64).expect("io_uring");
        prepare(&mut ring);
        let (waker, source) = WakeSource::new().expect("eventfd");
        source.arm(&mut ring);
        let (log, recovery) = Log::open(config, from, history, &mut ring, waker)?;
        Ok(Node { log, ring, recovery, meddle: None, source })
    }

    /// A leader in the first epoch.
    pub fn leader(config: LogConfig) -> Node {
        let mut node = Node::open(config);
        node.log.lead(EPOCH);
        node
    }

    /// One turn of the loop: poll, wait for something, dispatch.
    pub fn turn(&mut self) -> Result<(), LogFailure> {
        self.log.poll(&mut self.ring, Instant::now());
        self.ring.submit_and_wait(Some(Duration::from_millis(100))).expect("the ring waits");
        let mut completions = Vec::new();
        self.ring.completions(&mut completions);
        let mut outcome = Ok(());
        for mut completion in completions {
            match completion.token.owner() {
                Owner::Wake => self.source.handle_completion(&completion, &mut self.ring),
                Owner::Log => {
                    if let Some(meddle) = &mut self.meddle {
                        meddle(&mut completion);
                    }
                    outcome = outcome.and(self.log.handle_completion(&completion, Instant::now()));
                }
                other => panic!("nobody pushed for {other:?}"),
            }
        }
        outcome
    }

    /// Turns until `done`.
    pub fn run(&mut self, what: &str, mut done: impl FnMut(&mut Log) -> bool) {
        let started = Instant::now();
        while !done(&mut self.log) {
            assert!(started.elapsed() < PATIENCE, "waited too long until {what}");
            self.turn().expect("the disk works");
        }
    }

    /// Makes everything appended so far durable.
    pub fn flush(&mut self) {
        let end = self.log.end();
        self.run("everything is durable", |log| log.flushed() >= end);
    }

    /// Appends, taking flushed frames whenever the log cannot take more.
    pub fn append(&mut self, record: &[u8]) -> Lsn {
        let started = Instant::now();
        loop {
            match self.log.append(record) {
                Ok(lsn) => return lsn,
                Err(AppendError::Busy) => {
                    assert!(started.elapsed() < PATIENCE, "the log stays busy");
                    self.turn().expect("the disk works");
                    self.take_all();
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    pub fn take_all(&mut self) -> usize {
        std::iter::from_fn(|| self.log.next_flushed().map(|_| ())).count()
    }

    /// Flushes and closes.
    pub fn close(mut self) {
        self.log.shutdown(&mut self.ring).expect("everything is durable");
    }
}

/// A record that tells its number, of a size that depends on it.
pub fn record(number: u64) -> Vec<u8> {
    let bytes = 8 + (number * 7919 % 2003) as usize;
    let mut record = vec![number as u8; bytes];
    record[..8].copy_from_slice(&number.to_le_bytes());
    record
}

/// Every frame on disk from the start of the log to `until`, verified: the chain too.
pub fn frames_on_disk(log: &Log, from: Lsn, until: Lsn, mut visit: impl FnMut(&Frame<'_>)) {
    let segment_bytes = log.config().segment_bytes;
    let (mut at, mut crc) = (from, None);
    while at < until {
        let number = at.segment(segment_bytes);
        let bytes = std::fs::read(log.segment_path(number)).expect("the segment's file");
        while at < until && at.segment(segment_bytes) == number {
            let frame = Frame::read(&bytes[at.offset(segment_bytes) as usize..], at).expect("a valid frame");
            if let Some(crc) = crc {
                frame.follows(crc).expect("the chain");
            }
            visit(&frame);
            crc = Some(frame.header().crc);
            at = frame.header().end();
        }
    }
    assert_eq!(at, until);
}

/// The bytes of the log on disk in `from..until`.
pub fn bytes_on_disk(log: &Log, from: Lsn, until: Lsn) -> Vec<u8> {
    let segment_bytes = log.config().segment_bytes;
    let mut bytes = Vec::new();
    let mut at = from;
    while at < until {
        let number = at.segment(segment_bytes);
        let end = number.next().start(segment_bytes).min(until);
        let file = std::fs::read(log.segment_path(number)).expect("the segment's file");
        let offset = at.offset(segment_bytes) as usize;
        bytes.extend_from_slice(&file[offset..offset + (end - at) as usize]);
        at = end;
    }
    bytes
}
