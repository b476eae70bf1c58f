//! A node for session tests: the real store and pending changes over a log of which only the positions are kept. Nothing
//! happens by itself: a test says when the log is flushed, what replicas have reached, and what time it is.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use walferry_applier::pending::Pending;
use walferry_applier::store::{KeyCount, Store, StoreConfig, StoreError};
use walferry_cluster::MemberName;
use walferry_cluster::level::CommitLevel;
use walferry_engine::epoch::EpochHistory;
use walferry_engine::frame::{Frame, FrameHeader};
use walferry_engine::limits::{FRAME_HEADER_BYTES, RECORD_LENGTH_BYTES, frame_aligned};
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_shipper::status::SlotStatus;

use crate::clients::list::{ClientAsk, ClientReply};
use crate::cluster::{Command, Reply};
use crate::node::apply::COUNT_LOOKUPS_PER_TURN_MAX;
use crate::session::Session;
use crate::session::client::SessionSettings;
use crate::session::host::{
    Administration, CommitPath, DataView, Evidence, InfoSection, NodeFacts, NodeInfo, Refusal, ReplicaEvidence,
    ReplicationRow, Stage, TurnClock, Wait,
};
use crate::session::id::SessionId;
use crate::session::reading::Strong;
use crate::users::login::Job;

/// The node.
pub struct TestHost {
    store: Store,
    pending: Pending,
    /// The open frame: its start and its records with their lengths in front.
    open_start: Lsn,
    open: Vec<u8>,
    open_records: u32,
    last_commit: Lsn,
    flushed: Lsn,
    previous_crc: u32,
    now: Instant,
    /// What remote levels have reached.
    pub reached: BTreeMap<CommitLevel, Lsn>,
    /// Why nobody confirms commits at remote levels.
    pub unconfirmable: Option<String>,
    /// Why it may answer nothing.
    pub silent: Option<String>,
    /// The level that stands in for remote ones.
    pub degraded: Option<CommitLevel>,
    /// What commits are refused with.
    pub refusal: Option<Refusal>,
    /// Every hold that sessions asked for.
    pub holds: Vec<(CommitLevel, Lsn)>,
    /// Every hold of a reader of committed state.
    pub committed_holds: Vec<Lsn>,
    /// What sessions wait for.
    pub parked: BTreeMap<SessionId, Wait>,
    /// Set on a replica.
    pub facts: NodeFacts,
    /// What REPLICATION tells.
    pub rows: Vec<ReplicationRow>,
    /// What LEADER tells.
    pub leader: Option<String>,
    /// What SLOT LIST tells.
    pub slots: Vec<MemberName>,
    /// The epochs of its log.
    pub history: EpochHistory,
    /// What is committed; none: everything that is durable.
    pub committed: Option<Lsn>,
    /// How old its state is.
    pub staleness: Option<Duration>,
    /// Whether it answers strong reads.
    pub strong: Strong,
    /// When this turn began, for tests of how long it takes; none: turns take no time.
    pub turn_began: Option<Instant>,
    /// Passwords that wait to be compared.
    pub checks: Vec<Job>,
    /// Commands that sessions found slow.
    pub slow: Vec<(&'static str, Duration)>,
    /// After so many looks at the clock the process is stopped for so long: it loses its lease, and its state gets older.
    pub stopped_after: Cell<Option<(u32, Duration)>>,
    _dir: TempDir,
}

impl TestHost {
    /// A leader with an empty log and no replicas.
    pub fn new() -> TestHost {
        let program = std::env::current_exe().expect("the test has a program");
        let beside = program.parent().expect("a program lies in a directory");
        let dir = tempfile::tempdir_in(beside).expect("a directory for the store");
        let config = StoreConfig {
            checkpoint_bytes: 64 << 20,
            checkpoint_log_bytes: u64::MAX,
            checkpoint_interval: Duration::MAX,
            cache_bytes: 1 << 20,
        };
        let store = Store::open(&dir.path().join("store"), config, Box::new(|| {})).expect("a new store");
        TestHost {
            store,
            pending: Pending::default(),
            open_start: Lsn::ZERO,
            open: Vec::new(),
            open_records: 0,
            last_commit: Lsn::ZERO,
            flushed: Lsn::ZERO,
            previous_crc: 0,
            now: Instant::now(),
            reached: BTreeMap::new(),
            unconfirmable: None,
            silent: None,
            degraded: None,
            refusal: None,
            holds: Vec::new(),
            committed_holds: Vec::new(),
            parked: BTreeMap::new(),
            facts: NodeFacts::default(),
            rows: Vec::new(),
            leader: None,
            slots: Vec::new(),
            history: EpochHistory::from_entries(&[(Epoch(7), Lsn::ZERO)]).expect("one epoch"),
            committed: None,
            staleness: Some(Duration::ZERO),
            strong: Strong::Held,
            turn_began: None,
            checks: Vec::new(),
            slow: Vec::new(),
            stopped_after: Cell::new(None),
            _dir: dir,
        }
    }

    /// Makes everything durable and applies it.
    pub fn flush(&mut self) {
        if self.open_records == 0 {
            return;
        }
        let mut bytes = vec![0; FRAME_HEADER_BYTES];
        bytes.append(&mut self.open);
        let header = FrameHeader {
            filler: false,
            epoch: Epoch(1),
            lsn: self.open_start,
            payload_bytes: (bytes.len() - FRAME_HEADER_BYTES) as u32,
            record_count: std::mem::take(&mut self.open_records),
            previous_crc: self.previous_crc,
            crc: 0,
            flushed: self.flushed,
            committed: self.flushed,
            sealed_at_us: 0,
        };
        bytes.resize(frame_aligned(bytes.len()), 0);
        let header = header.seal(&mut bytes);
        self.previous_crc = header.crc;
        let frame = Frame::read(&bytes, header.lsn).expect("a frame that was just sealed");
        self.store.apply(&frame).expect("the store takes what commands emitted");
        self.open_start = header.end();
        self.flushed = header.end();
        self.pending.forget(self.flushed);
    }

    /// Everything that is durable goes into the store's file.
    pub fn checkpoint(&mut self) {
        self.flush();
        self.store.ask_for_checkpoint(self.flushed, true);
        while self.store.durable_applied() < self.flushed {
            self.store.poll_checkpoint(Lsn::MAX, Instant::now()).expect("a checkpoint");
            self.store.finish_checkpoint().expect("a checkpoint");
        }
    }

    /// A remote level has reached everything.
    pub fn confirm(&mut self, level: CommitLevel) {
        self.reached.insert(level, self.log_end());
    }

    /// Records that are not durable yet.
    pub fn pending_records(&self) -> u32 {
        self.open_records
    }

    /// The end of the last record that was committed.
    pub fn last_commit(&self) -> Lsn {
        self.last_commit
    }

    /// Time passes.
    pub fn pass(&mut self, time: Duration) {
        self.now += time;
    }
}

impl TurnClock for TestHost {
    fn now(&self) -> Instant {
        self.now
    }

    fn clock(&self) -> Instant {
        match self.stopped_after.get() {
            Some((0, time)) => self.now + time,
            Some((looks, time)) => {
                self.stopped_after.set(Some((looks - 1, time)));
                self.now
            }
            None => self.now,
        }
    }

    fn turn_time(&self) -> Duration {
        self.turn_began.map_or(Duration::ZERO, |began| began.elapsed())
    }

    fn report_slow(&mut self, command: &'static str, took: Duration) {
        self.slow.push((command, took));
    }

    fn wall_clock_us(&self) -> u64 {
        1_700_000_000_123_456
    }
}

impl DataView for TestHost {
    fn store(&self) -> &Store {
        &self.store
    }

    fn pending(&self) -> &Pending {
        &self.pending
    }

    fn count_keys(&mut self) -> Result<KeyCount, StoreError> {
        self.store.count_keys(COUNT_LOOKUPS_PER_TURN_MAX)
    }

    fn flushed(&self) -> Lsn {
        self.flushed
    }

    fn applied(&self) -> Lsn {
        self.flushed
    }

    fn committed_here(&self) -> Lsn {
        self.committed.unwrap_or(Lsn::MAX).min(self.flushed)
    }

    fn history(&self) -> &EpochHistory {
        &self.history
    }

    fn cluster_id(&self) -> u128 {
        0x9f31_c2aa << 96
    }

    fn staleness(&self, now: Instant) -> Option<Duration> {
        Some(self.staleness? + (now - self.now))
    }

    fn strong(&self, now: Instant) -> Strong {
        match now > self.now {
            true => Strong::Refused("CLUSTERDOWN the lease is over".to_owned()),
            false => self.strong.clone(),
        }
    }
}

impl CommitPath for TestHost {
    fn writable(&self, _: CommitLevel) -> Result<(), Refusal> {
        self.refusal.clone().map_or(Ok(()), Err)
    }

    fn commit(&mut self, record: &[u8], level: CommitLevel) -> Result<Lsn, Refusal> {
        self.writable(level)?;
        if self.open_records == 0 {
            self.open_start = self.flushed;
        }
        self.open.extend_from_slice(&(record.len() as u32).to_le_bytes());
        self.open.extend_from_slice(record);
        self.open_records += 1;
        let lsn = self.log_end();
        self.last_commit = lsn;
        self.pending.record(lsn, record, &self.store).expect("the store takes what commands emitted");
        Ok(lsn)
    }

    fn log_end(&self) -> Lsn {
        let header = if self.open_records == 0 { 0 } else { FRAME_HEADER_BYTES };
        debug_assert!(self.open.len() >= self.open_records as usize * RECORD_LENGTH_BYTES);
        self.open_start.advance((header + self.open.len()) as u64)
    }

    fn released(&self, level: CommitLevel) -> Lsn {
        match self.degraded.map_or(level, |degraded| degraded.min(level)) {
            _ if self.silent.is_some() => Lsn::ZERO,
            CommitLevel::Off => Lsn::MAX,
            CommitLevel::Local => self.flushed,
            remote => self.reached.get(&remote).copied().unwrap_or_default().min(self.flushed),
        }
    }

    fn met(&self, level: CommitLevel, lsn: Lsn) -> CommitLevel {
        let remote = self.reached.iter().rev().find(|(reached, at)| **reached <= level && **at >= lsn);
        match remote {
            _ if !level.is_remote() => level,
            Some((reached, _)) => *reached,
            None if self.flushed >= lsn => CommitLevel::Local,
            None => CommitLevel::Off,
        }
    }

    fn silent(&self) -> Option<String> {
        self.silent.clone()
    }

    fn unconfirmable(&self, level: CommitLevel) -> Option<String> {
        self.unconfirmable.clone().filter(|_| level.is_remote())
    }

    fn replicas_at(&self, stage: Stage, lsn: Lsn) -> usize {
        let reached = |row: &&ReplicationRow| match stage {
            Stage::Flushed => row.flushed >= lsn,
            Stage::Applied => row.applied >= lsn,
        };
        self.rows.iter().filter(reached).count()
    }

    fn evidence(&self, _: Lsn) -> Evidence {
        let replica = ReplicaEvidence { name: "b".to_owned(), level: CommitLevel::RemoteApply };
        Evidence { replicas: vec![replica], stages_us: vec![("flush", 120)] }
    }

    fn unconfirmed_by(&self, _: Lsn, _: CommitLevel) -> String {
        "ANY 1 (b)".to_owned()
    }

    fn hold(&mut self, _: SessionId, level: CommitLevel, lsn: Lsn) {
        self.holds.push((level, lsn));
    }

    fn hold_committed(&mut self, _: SessionId, lsn: Lsn) {
        self.committed_holds.push(lsn);
    }

    fn park(&mut self, session: SessionId, wait: Wait) {
        self.parked.insert(session, wait);
    }

    fn unpark(&mut self, session: SessionId) {
        self.parked.remove(&session);
    }
}

impl NodeInfo for TestHost {
    fn replication(&self) -> Vec<ReplicationRow> {
        self.rows.clone()
    }

    fn facts(&self) -> NodeFacts {
        self.facts.clone()
    }

    fn info_sections(&self) -> Vec<InfoSection> {
        vec![("Flush", vec![("flushes".to_owned(), "3".to_owned())])]
    }

    fn config(&self) -> Vec<(String, String)> {
        vec![("commit_level".to_owned(), "local".to_owned())]
    }

    fn waterfall(&self, histograms: bool) -> String {
        format!("{{\"histograms\":{histograms}}}")
    }

    fn leader(&self) -> Option<String> {
        self.leader.clone()
    }

    fn describe_cluster(&self, _: Option<IpAddr>) -> String {
        "{}".to_owned()
    }
}

impl Administration for TestHost {
    fn slots(&self) -> Result<Vec<SlotStatus>, String> {
        let slot = |name: &MemberName| SlotStatus {
            name: name.clone(),
            restart: Lsn(0x10),
            lost: false,
            held_bytes: 48,
            connected: true,
        };
        Ok(self.slots.iter().map(slot).collect())
    }

    fn drop_slot(&mut self, name: &MemberName) -> Result<String, String> {
        let known = self.slots.contains(name);
        self.slots.retain(|slot| slot != name);
        known.then(|| format!("slot {name} is dropped")).ok_or_else(|| format!("there is no slot called {name}"))
    }

    fn reset_waterfall(&mut self) {}

    fn promote(&mut self) -> Result<Epoch, String> {
        match self.facts.following.take() {
            Some(_) => Ok(Epoch(8)),
            None => Err("this node leads already".to_owned()),
        }
    }

    fn command_cluster(&mut self, _: Command) -> Result<Reply, String> {
        Err("this node is no member of a cluster".to_owned())
    }

    fn reload_users(&mut self) -> Result<(), String> {
        Err("this node has no users_file".to_owned())
    }

    fn check_password(&mut self, job: Job) {
        self.checks.push(job);
    }

    fn ask_clients(&mut self, _: SessionId, _: ClientAsk) -> ClientReply {
        ClientReply::default()
    }
}

/// A session and what came out of it.
pub struct TestClient {
    /// The session under test.
    pub session: Session,
}

impl TestClient {
    /// A client of a node without a password.
    pub fn new() -> TestClient {
        TestClient::with(&SessionSettings::default(), 1)
    }

    /// A client of a node with these settings.
    pub fn with(settings: &SessionSettings, id: u64) -> TestClient {
        TestClient { session: Session::new(SessionId(id), None, settings) }
    }

    /// What may be sent now.
    pub fn output(&mut self) -> String {
        let output = self.session.output().split();
        String::from_utf8_lossy(&output).into_owned()
    }

    /// Sends bytes; returns what is answered at once.
    pub fn send(&mut self, host: &mut TestHost, bytes: &[u8]) -> String {
        self.session.handle_input(bytes, host);
        self.output()
    }

    /// Sends an inline command; returns its reply once the log is flushed.
    pub fn ask(&mut self, host: &mut TestHost, line: &str) -> String {
        self.session.handle_input(format!("{line}\r\n").as_bytes(), host);
        host.flush();
        self.session.release(host);
        self.output()
    }

    /// The node calls back.
    pub fn resume(&mut self, host: &mut TestHost) -> String {
        self.session.resume(host);
        self.output()
    }
}
