//! A leader on a real disk, driven as the daemon's loop drives it, and the simplest replica that can be: a thread with
//! a blocking socket that keeps every byte of the log in memory.
#![allow(dead_code)]

use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use walferry_cluster::member::{Caller, ClusterId};
use walferry_engine::epoch::EpochHistory;
use walferry_engine::limits::SEGMENT_BYTES_MIN;
use walferry_engine::log::{AppendError, Log, LogConfig, SyncMethod};
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_engine::ring::{Owner, Ring};
use walferry_engine::waker::{WakeSource, Waker};
use walferry_shipper::progress::ReplicaState;
use walferry_shipper::{ReplicaStatus, Shipper, ShipperConfig};

pub mod replica;

/// No test waits longer for one event.
pub const PATIENCE: Duration = Duration::from_secs(30);
pub const CLUSTER: ClusterId = ClusterId(42);
pub const SEGMENT_BYTES: u64 = SEGMENT_BYTES_MIN;
/// Of the leaders in these tests.
pub const LOG_BUFFER_BYTES: usize = 2 * SEGMENT_BYTES_MIN as usize;

pub fn directory() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory on a real disk")
}

pub fn history(entries: &[(u64, u64)]) -> EpochHistory {
    let entries: Vec<(Epoch, Lsn)> = entries.iter().map(|&(epoch, lsn)| (Epoch(epoch), Lsn(lsn))).collect();
    EpochHistory::from_entries(&entries).expect("ascending")
}

pub fn shipper_config(dir: &Path) -> ShipperConfig {
    ShipperConfig {
        dir: dir.to_owned(),
        cluster_id: CLUSTER,
        name: "leader".parse().expect("a name"),
        client_address: "127.0.0.1:6380".to_owned(),
        segment_bytes: SEGMENT_BYTES,
        peer_timeout: Duration::from_secs(20),
        heartbeat_interval: Duration::from_millis(50),
        slot_keep_bytes_max: 1 << 40,
        replica_lag_time_max: Duration::from_secs(10),
        min_in_sync: 0,
        epoch_start: Lsn::ZERO,
        policy: "ANY 1 (*)".parse().expect("a policy"),
        zero_copy_bytes_min: usize::MAX,
        snapshot_rate: 0,
    }
}

pub struct Leader {
    pub log: Log,
    pub shipper: Shipper,
    pub history: EpochHistory,
    pub ring: Ring,
    pub address: SocketAddr,
    listener: TcpListener,
    source: WakeSource,
    waker: Waker,
    /// Makes records differ.
    records: u64,
}

impl Leader {
    pub fn new(dir: &Path) -> Leader {
        Leader::with(shipper_config(dir), history(&[(1, 0)]))
    }

    pub fn with(config: ShipperConfig, history: EpochHistory) -> Leader {
        let mut ring = Ring::new(256).expect("io_uring");
        let (waker, source) = WakeSource::new().expect("eventfd");
        source.arm(&mut ring);
        let log_config = LogConfig {
            dir: config.dir.clone(),
            segment_bytes: SEGMENT_BYTES,
            write_depth: 4,
            sync_method: SyncMethod::Dsync,
            buffered: false,
            commit_delay: Duration::ZERO,
            log_buffer_bytes: LOG_BUFFER_BYTES,
            keep_bytes_min: 0,
        };
        let opened = Log::open(log_config, Lsn::ZERO, &history, &mut ring, waker.clone());
        let (mut log, _) = opened.expect("the log opens");
        log.lead(history.last_epoch());
        let shipper = Shipper::new(config, waker.clone()).expect("the slots are readable");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        listener.set_nonblocking(true).expect("a listener");
        let address = listener.local_addr().expect("a bound listener");
        Leader { log, shipper, history, ring, address, listener, source, waker, records: 0 }
    }

    /// Another shipper in place of this one, as after a restart of the leader; connections are gone.
    pub fn restart_shipper(&mut self, config: ShipperConfig) {
        self.shipper.close_all(&mut self.ring, &mut self.log, Instant::now());
        self.shipper = Shipper::new(config, self.waker.clone()).expect("the slots are readable");
    }

    /// One turn of the loop.
    pub fn turn(&mut self) {
        let mut now = Instant::now();
        while let Ok((socket, address)) = self.listener.accept() {
            let caller = Caller::unproved(address);
            self.shipper.accept(OwnedFd::from(socket), caller, &mut self.ring, &mut self.log, now);
        }
        self.log.poll(&mut self.ring, now);
        self.shipper.poll(&mut self.ring, &mut self.log, &self.history, now);
        while self.log.next_flushed().is_some() {}
        self.log.set_committed(self.shipper.committed(self.log.flushed()));
        let timeout = self.shipper.next_timeout(now).unwrap_or(PATIENCE).min(Duration::from_millis(2));
        self.ring.submit_and_wait(Some(timeout)).expect("the ring waits");
        let mut completions = Vec::new();
        self.ring.completions(&mut completions);
        now = Instant::now();
        for completion in completions {
            match completion.token.owner() {
                Owner::Wake => self.source.handle_completion(&completion, &mut self.ring),
                Owner::Log => self.log.handle_completion(&completion, now).expect("the disk works"),
                Owner::Peer => self.shipper.handle_completion(&completion, &mut self.ring, &mut self.log, now),
                other => panic!("nobody pushed for {other:?}"),
            }
        }
    }

    /// Turns until `done`.
    pub fn run(&mut self, what: &str, mut done: impl FnMut(&mut Leader) -> bool) {
        let started = Instant::now();
        while !done(self) {
            assert!(started.elapsed() < PATIENCE, "waited too long until {what}: {:#?}", self.shipper.replicas());
            self.turn();
        }
    }

    /// Appends records of these sizes, all turns that it takes included.
    pub fn append(&mut self, sizes: impl IntoIterator<Item = usize>) {
        for size in sizes {
            self.records += 1;
            let mut record = vec![self.records as u8; size];
            record[..8].copy_from_slice(&self.records.to_le_bytes());
            let started = Instant::now();
            // As a node does: nothing is tried while the log says that it has no space.
            while !self.log.has_capacity() || {
                let appended = self.log.append(&record);
                assert!(matches!(appended, Ok(_) | Err(AppendError::Busy)), "{appended:?}");
                appended.is_err()
            } {
                assert!(started.elapsed() < PATIENCE, "the log stays busy: {:#?}", self.shipper.replicas());
                self.turn();
            }
        }
    }

    /// Makes everything durable here.
    pub fn flush(&mut self) {
        let end = self.log.end();
        self.run("everything is durable", |leader| leader.log.flushed() >= end);
    }

    pub fn status(&self, name: &str) -> ReplicaStatus {
        let rows = self.shipper.replicas();
        let row = rows.into_iter().find(|row| row.name.as_str() == name);
        row.unwrap_or_else(|| panic!("no replica {name}"))
    }

    /// Turns until the replica has applied everything that the leader has.
    pub fn wait_applied(&mut self, name: &str) {
        self.flush();
        let end = self.log.flushed();
        self.run("the replica has applied everything", |leader| {
            leader.shipper.replicas().iter().any(|row| row.name.as_str() == name && row.applied == end)
        });
    }

    pub fn wait_state(&mut self, name: &str, state: ReplicaState) {
        let is = |leader: &mut Leader| {
            leader.shipper.replicas().iter().any(|row| row.name.as_str() == name && row.state == state)
        };
        self.run(&format!("{name} is {state}"), is);
    }

    /// The log's bytes in the segment files.
    pub fn files(&self, from: Lsn, until: Lsn) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut at = from;
        while at < until {
            let segment = at.segment(SEGMENT_BYTES);
            let file = std::fs::read(self.log.segment_path(segment)).expect("the segment is there");
            let end = until.min(segment.next().start(SEGMENT_BYTES));
            let offset = at.offset(SEGMENT_BYTES) as usize;
            bytes.extend_from_slice(&file[offset..offset + (end - at) as usize]);
            at = end;
        }
        bytes
    }
}
