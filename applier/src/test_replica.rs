//! A node's log and store for tests, without anything that drives them.

use std::path::Path;
use std::time::{Duration, Instant};

use walferry_engine::epoch::EpochHistory;
use walferry_engine::limits::SEGMENT_BYTES_MIN;
use walferry_engine::log::{Log, LogConfig, SyncMethod};
use walferry_engine::lsn::Lsn;
use walferry_engine::ring::{Owner, Ring};
use walferry_engine::waker::{WakeSource, Waker};

use crate::record::Effect;
use crate::replay::{Applied, apply_flushed};
use crate::store::{STORE_DIR, Store, StoreConfig};

/// No test waits longer for one event.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// What the tests' stores are opened with.
pub const STORE_CONFIG: StoreConfig = StoreConfig {
    checkpoint_bytes: 1 << 20,
    checkpoint_log_bytes: u64::MAX,
    checkpoint_interval: Duration::MAX,
    cache_bytes: 1 << 20,
};

/// One node.
pub struct TestReplica {
    pub log: Log,
    pub store: Store,
    pub history: EpochHistory,
    ring: Ring,
    source: WakeSource,
    _waker: Waker,
}

impl TestReplica {
    pub fn open(dir: &Path) -> TestReplica {
        let mut ring = Ring::new(256).expect("io_uring");
        let (waker, source) = WakeSource::new().expect("eventfd");
        source.arm(&mut ring);
        let history = EpochHistory::load(dir).expect("a history");
        let store = Store::open(&dir.join(STORE_DIR), STORE_CONFIG, Box::new(|| ())).expect("a store");
        let config = LogConfig {
            dir: dir.to_owned(),
            segment_bytes: SEGMENT_BYTES_MIN,
            write_depth: 4,
            sync_method: SyncMethod::Dsync,
            buffered: true,
            commit_delay: Duration::ZERO,
            log_buffer_bytes: 2 * SEGMENT_BYTES_MIN as usize,
            keep_bytes_min: 0,
        };
        let opened = Log::open(config, store.applied(), &history, &mut ring, waker.clone());
        let (log, _) = opened.expect("the log opens");
        TestReplica { log, store, history, ring, source, _waker: waker }
    }

    /// Commits `key`, alone in its frame.
    pub fn put(&mut self, key: u64) {
        assert!(self.try_put(key, b"v"), "there is space");
    }

    /// The same with this value; false when the log has no memory for it.
    pub fn try_put(&mut self, key: u64, value: &[u8]) -> bool {
        let mut record = Vec::new();
        Effect::Put { key: &key.to_be_bytes(), value }.encode_into(&mut record);
        let started = Instant::now();
        while self.log.append(&record).is_err() {
            if started.elapsed() > Duration::from_secs(1) {
                return false;
            }
            // A segment is being made.
            self.turn();
        }
        while self.log.flushed() < self.log.end() || !self.log.idle() {
            assert!(started.elapsed() < PATIENCE, "waited too long for the disk");
            self.turn();
        }
        true
    }

    fn turn(&mut self) {
        let now = Instant::now();
        self.log.poll(&mut self.ring, now);
        self.ring.submit_and_wait(Some(Duration::from_millis(2))).expect("the ring waits");
        let mut completions = Vec::new();
        self.ring.completions(&mut completions);
        for completion in completions {
            match completion.token.owner() {
                Owner::Wake => self.source.handle_completion(&completion, &mut self.ring),
                _ => self.log.handle_completion(&completion, now).expect("the disk works"),
            }
        }
    }

    pub fn apply(&mut self) {
        while self.apply_some() == Applied::More {}
    }

    /// One turn of applying.
    pub fn apply_some(&mut self) -> Applied {
        apply_flushed(&mut self.log, &mut self.store, Lsn::MAX).expect("it applies")
    }
}
