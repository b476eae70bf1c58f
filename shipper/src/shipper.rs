//! All replicas of a leading node: accepts their connections, streams the log to them, takes their acknowledgements, and
//! says what is confirmed. The node's ring thread owns it and calls `poll` once a turn, after the log's. It knows the log
//! and the links; it knows neither commands, nor sessions, nor the store.
//!
//! The duties of a turn, in this order: 1. take what threads report (catch-up, slots' file); 2. answer hellos;
//! 3. drop the silent, and those that are no members any more; 4. send; 5. free log memory that blocks the log; 6. measure lag, move the in-sync set and the
//! commit rule; 7. give up slots that hold too much, take back those
//! whose replicas come close, and save slots.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use walferry_cluster::insync::{Change, InSync};
use walferry_cluster::member::{Caller, ClusterId, MemberName, reachable};
use walferry_cluster::message::{Ack, Fetch, Hello, Message, Offer, PROTOCOL_VERSION, Refuse, RefuseCode, Welcome};
use walferry_cluster::policy::SyncPolicy;
use walferry_cluster::quorum_rule::QuorumRule;
use walferry_cluster::register::MemberId;
use walferry_engine::epoch::EpochHistory;
use walferry_engine::log::Log;
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_engine::mutants;
use walferry_engine::ring::{Completion, Ring};
use walferry_engine::told::{Rarely, Told};
use walferry_engine::waker::Waker;
use walferry_engine::world;

use crate::catchup::Report;
use crate::chain;
use crate::commit_rule::{CommitRule, Standing};
use crate::frame_server::{FrameServer, LogSnapshot};
use crate::handshake::{Leader, judge, judge_fetch};
use crate::lag::Timeline;
use crate::link::{HANDSHAKE_TIME_MAX, Link, LinkError, LinkNo, Op, Phase};
use crate::outgoing::{Common, Turn};
use crate::progress::Progress;
use crate::refuse::turn_away;
use crate::replica::Replica;
use crate::sender::View;
use crate::slots::{SLOTS_MAX, SlotFile, Slots, SlotsError};
use crate::snapshot::{Snapshots, SnapshotsConfig};
use crate::traces::Traces;

mod asked;

/// Connections at once, those that have not said hello included; another is refused.
pub const LINKS_MAX: usize = 64;

/// Of them, connections that have not said what they are, or were refused; a further one takes the oldest one's place, so that
/// no number of them keeps replicas out.
const UNIDENTIFIED_MAX: usize = 32;
/// Connections that end before they have a name are told of in the log at most so often.
const UNIDENTIFIED_TOLD_INTERVAL: Duration = Duration::from_secs(1);

/// A replica's connection that was heard so recently, or within so many heartbeats, keeps its name from another node.
const NAME_HELD_TIME: Duration = Duration::from_secs(1);
const HELD_HEARTBEATS: u32 = 4;

const _: () = assert!(UNIDENTIFIED_MAX < LINKS_MAX);

/// What a shipper is made with.
#[derive(Clone, Debug)]
pub struct ShipperConfig {
    /// The data directory, for the slots.
    pub dir: PathBuf,
    /// The cluster.
    pub cluster_id: ClusterId,
    /// The leader's name.
    pub name: MemberName,
    /// Where clients reach the leader; told to replicas for their -READONLY.
    pub client_address: String,
    /// The segment size of the cluster.
    pub segment_bytes: u64,
    /// A replica that was not heard for longer is dropped.
    pub peer_timeout: Duration,
    /// Something is sent to each replica at least this often.
    pub heartbeat_interval: Duration,
    /// A slot that holds back more log is lost.
    pub slot_keep_bytes_max: u64,
    /// A replica that lags for longer leaves the in-sync set.
    pub replica_lag_time_max: Duration,
    /// Remote levels are refused while fewer replicas are in sync.
    pub min_in_sync: usize,
    /// Where the leader's epoch begins.
    pub epoch_start: Lsn,
    /// Who has to confirm commits.
    pub policy: SyncPolicy,
    /// Batches of at least this size go by SEND_ZC.
    pub zero_copy_bytes_min: usize,
    /// Bytes a second of all snapshots together; 0 for no limit.
    pub snapshot_rate: u64,
}

/// Why there is no shipper.
#[derive(Debug, thiserror::Error)]
pub enum ShipperError {
    /// The slots' file is unreadable.
    #[error(transparent)]
    Slots(#[from] SlotsError),
    /// The thread for the slots' file cannot be started.
    #[error("cannot start a thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// All replicas of a leader.
pub struct Shipper {
    config: ShipperConfig,
    common: Common,
    reports: mpsc::Receiver<Report>,
    /// Bounded by LINKS_MAX.
    links: BTreeMap<LinkNo, Link>,
    /// What the log has told of connections without a name that ended.
    unidentified_told: Rarely,
    /// What the log has told of links that ended or were refused, and of slots that cannot be saved.
    links_told: Told,
    slots_told: Told,
    /// Every replica that has a slot.
    replicas: BTreeMap<MemberName, Replica>,
    slots: Slots,
    slot_file: SlotFile,
    snapshots: Snapshots,
    frame_server: FrameServer,
    rule: CommitRule,
    in_sync: InSync,
    timeline: Timeline,
    /// The log at the last turn.
    view: View,
    /// When the last turn was.
    turned: Instant,
    /// The commit rule has to look at the replicas again.
    moved: bool,
    /// Why commits at remote levels wait, as of the last look at the replicas.
    shortage: Option<String>,
    acknowledgements: u64,
    /// Links that ended while their replica still needed log from the segment files.
    catchups_broken: u64,
    /// Replicas are not fed with log before this, which is damaged.
    feeds_from: Lsn,
    superseded: Option<Epoch>,
    traces: Traces,
    /// The members of the leader's cluster and their incarnations; `None` for a leader that takes every replica as one.
    members: Option<BTreeMap<MemberName, MemberId>>,
}

impl Shipper {
    /// A shipper that knows the replicas that have slots. `waker` wakes the ring thread.
    pub fn new(config: ShipperConfig, waker: Waker) -> Result<Shipper, ShipperError> {
        let slots = Slots::load(&config.dir)?;
        let slot_file = SlotFile::new(&config.dir, waker.clone())?;
        let (sender, reports) = mpsc::channel();
        let now = world::now();
        let mut in_sync = InSync::new(config.replica_lag_time_max);
        let mut replicas = BTreeMap::new();
        for (name, restart) in slots.iter() {
            let mut replica = Replica::new(name.clone(), MemberId(0), Progress::remembered(restart), now);
            if !slots.is_lost(name) {
                in_sync.presume(name);
                replica.in_sync = true;
            }
            replicas.insert(name.clone(), replica);
        }
        let snapshots = SnapshotsConfig {
            data: config.dir.clone(),
            rate: config.snapshot_rate,
            heartbeat_interval: config.heartbeat_interval,
            peer_timeout: config.peer_timeout,
            keep_bytes_max: config.slot_keep_bytes_max,
        };
        let snapshots = Snapshots::new(snapshots, waker.clone(), now);
        let common = Common {
            zero_copy_bytes_min: config.zero_copy_bytes_min,
            heartbeat_interval: config.heartbeat_interval,
            epoch: Epoch::default(),
            leads_alone: true,
            origin: now,
            reports: sender,
            waker,
        };
        Ok(Shipper {
            replicas,
            rule: CommitRule::new(config.policy.clone(), config.epoch_start),
            in_sync,
            config,
            common,
            reports,
            links: BTreeMap::new(),
            unidentified_told: Rarely::default(),
            links_told: Told::default(),
            slots_told: Told::default(),
            slots,
            slot_file,
            snapshots,
            frame_server: FrameServer::default(),
            timeline: Timeline::default(),
            view: View::default(),
            turned: now,
            moved: true,
            shortage: None,
            acknowledgements: 0,
            catchups_broken: 0,
            feeds_from: Lsn::ZERO,
            superseded: None,
            traces: Traces::default(),
            members: None,
        })
    }

    /// What the register says: who is a member, who of them is in sync, and by which quorum rule commits are confirmed. At the start
    /// of a leadership and whenever it has moved. Slots of others hold no log; their connections end with the next turn.
    pub fn follow_register(
        &mut self,
        members: BTreeMap<MemberName, MemberId>,
        in_sync: &BTreeSet<MemberName>,
        quorum_rule: QuorumRule,
    ) {
        if self.members.is_none() {
            // Slots tell who was in sync with an earlier leadership; the register knows better.
            self.in_sync = InSync::new(self.config.replica_lag_time_max);
            in_sync.iter().for_each(|name| self.in_sync.presume(name));
        }
        for (name, id) in &members {
            let known = self.replicas.entry(name.clone());
            let replica = known.or_insert_with(|| Replica::new(name.clone(), *id, Progress::default(), self.turned));
            if replica.id == *id || mutants::is_on("complete-without-proof") {
                continue;
            }
            // What another incarnation confirmed proves nothing of this one, whose disk may be empty.
            // Nor does what a slot remembers of an earlier leadership.
            replica.progress = Progress::default();
            if replica.id != MemberId(0) {
                self.in_sync.forget(name);
            }
            if replica.link.is_none() {
                replica.id = *id;
            }
        }
        self.replicas.retain(|name, replica| members.contains_key(name) || replica.link.is_some());
        for replica in self.replicas.values_mut() {
            let id = members.get(&replica.name);
            replica.member = id.is_some_and(|id| *id == replica.id || mutants::is_on("complete-without-proof"));
        }
        let others: Vec<MemberName> = self.slots.iter().map(|(name, _)| name.clone()).collect();
        for name in others.iter().filter(|name| !members.contains_key(*name)) {
            tracing::info!(slot = %name, "a slot is dropped: its replica is no member");
            self.slots.forget(name);
            self.in_sync.forget(name);
        }
        self.snapshots.keep_only(|name| members.contains_key(name), no_member);
        self.in_sync.confirm(in_sync);
        self.rule.set_quorum_rule(quorum_rule);
        self.members = Some(members);
        self.moved = true;
    }

    /// Whether this node is the only one that leads, looked at after everything that was given to the shipper. While it is not
    /// certain, replicas are not told that what they have is fresh. Without a cluster it stays true.
    pub fn confirm_leadership(&mut self, alone: bool) {
        self.common.leads_alone = alone;
    }

    /// A replica connected.
    pub fn accept(&mut self, socket: OwnedFd, caller: Caller, ring: &mut Ring, log: &mut Log, now: Instant) {
        let address = caller.address;
        let unidentified = || self.links.values().filter(|link| link.is_unidentified());
        if unidentified().count() >= UNIDENTIFIED_MAX
            && let Some(oldest) = unidentified().min_by_key(|link| link.since).map(|link| link.number)
            && let Some(mut link) = self.links.remove(&oldest)
        {
            self.end(&mut link, &LinkError::Crowded, ring, log, now);
            if !link.is_over() {
                self.links.insert(oldest, link);
            }
        }
        // Those that are closed only wait for the ring to be done with them.
        if self.links.values().filter(|link| !matches!(link.phase, Phase::Closed)).count() >= LINKS_MAX {
            let text = format!("the leader has {LINKS_MAX} peer connections, which is the limit");
            if let Some(repeated) = self.links_told.tell(&text, now) {
                tracing::warn!(%address, repeated, "a replica is refused: {text}");
            }
            return turn_away(&socket, &Refuse { code: RefuseCode::Full, text });
        }
        let number = LinkNo::next();
        match Link::new(number, socket, caller, ring, now) {
            Ok(link) => drop(self.links.insert(number, link)),
            Err(error) => {
                if let Some(repeated) = self.links_told.tell(&error.to_string(), now) {
                    tracing::warn!(%address, repeated, "cannot set up a peer connection: {error}");
                }
            }
        }
    }

    /// Takes a completion of [`walferry_engine::ring::Owner::Peer`]; others than its own are left alone.
    pub fn handle_completion(&mut self, completion: &Completion, ring: &mut Ring, log: &mut Log, now: Instant) {
        let Some((number, op)) = Op::of(completion) else { return };
        // Out of the map while it is worked on; nobody looks for it meanwhile.
        let Some(mut link) = self.links.remove(&number) else { return };
        let outcome = match op {
            Op::Writable => {
                link.outgoing.handle_writable();
                Ok(())
            }
            Op::Send(place) => link.outgoing.handle_send(place, completion, log).map_err(LinkError::Socket),
            Op::Receive => {
                let outcome = link.handle_received(completion, now);
                outcome.and_then(|()| self.read_messages(&mut link, now)).map(|()| link.receive(ring))
            }
        };
        if let Err(error) = outcome {
            self.end(&mut link, &error, ring, log, now);
            link.receive(ring);
        }
        if !link.is_over() {
            self.links.insert(number, link);
        }
    }

    fn read_messages(&mut self, link: &mut Link, now: Instant) -> Result<(), LinkError> {
        while let Some(message) = link.next_message()? {
            let said = match &message {
                Message::Hello(hello) => Some(&hello.name),
                Message::Fetch(fetch) => Some(&fetch.name),
                Message::FetchFrames(request) => Some(&request.name),
                _ => None,
            };
            if let Some(Err(error)) = said.map(|name| link.caller.check(name)) {
                let text = error.to_string();
                return Err(LinkError::Refused(Refuse { code: RefuseCode::Protest, text }));
            }
            match (&link.phase, message) {
                (Phase::Probe(None), Message::Hello(hello)) => link.phase = Phase::Probe(Some(hello)),
                (Phase::Probe(None), Message::Fetch(fetch)) => link.phase = Phase::Fetch(fetch),
                (Phase::Probe(None), Message::FetchFrames(request)) => link.phase = Phase::FetchFrames(request),
                (Phase::Streaming(name), Message::Ack(ack)) => {
                    let replica = self.replicas.get_mut(name).expect("a link feeds a known replica");
                    link.outgoing.handle_stamp(ack.stamp_us);
                    let moved = acknowledge(replica, link, &ack, self.common.clock_us(now))?;
                    if moved {
                        self.slots.advance(name, replica.progress.flushed());
                        self.acknowledgements += 1;
                        self.moved = true;
                    }
                }
                (Phase::Streaming(name), Message::Traced(traced)) => self.traces.answer(name, traced),
                _ => return Err(LinkError::Turn),
            }
        }
        Ok(())
    }

    /// One turn. See the module's head for its duties.
    pub fn poll(&mut self, ring: &mut Ring, log: &mut Log, history: &EpochHistory, now: Instant) {
        let sealed_before = self.view.sealed;
        self.turned = now;
        self.common.epoch = history.last_epoch();
        self.view = View {
            hot_start: log.hot_start(),
            sealed: log.sealed(),
            flushed: log.flushed(),
            committed: self.committed(log.flushed()),
            hot_bytes_max: log.config().log_buffer_bytes as u64,
        };
        self.timeline.record(self.view.sealed, now);
        self.take_reports(ring, log, now);
        self.answer_hellos(ring, log, history, now);
        self.give_snapshots(ring, log, history, now);
        self.serve_frames(log, history);
        self.drop_silent(ring, log, now);
        let news = self.view.sealed > sealed_before && !self.links.is_empty();
        if news && !self.waits() {
            // Nobody waits for replicas: the disk starts on its part of the work before the sockets get theirs.
            let _ = ring.submit();
        }
        self.send(ring, log, now);
        if news {
            let _ = ring.submit();
        }
        self.unblock(ring, log, now);
        self.links.retain(|_, link| !link.is_over());
        self.observe(now);
        self.keep_slots(ring, log, now);
    }

    fn take_reports(&mut self, ring: &mut Ring, log: &mut Log, now: Instant) {
        while let Ok(report) = self.reports.try_recv() {
            let Some(mut link) = self.links.remove(&report.link) else { continue };
            // One that was closed meanwhile has no thread any more, and nothing to go on with.
            if link.outgoing.is_catching_up() {
                match link.outgoing.caught_up(report.outcome, now) {
                    Ok(position) => {
                        let replica = link.replica().map(MemberName::as_str);
                        tracing::info!(replica, %position, "caught up, streaming from memory");
                    }
                    Err(error) => self.end(&mut link, &error.into(), ring, log, now),
                }
            }
            self.links.insert(report.link, link);
        }
        if let Some(outcome) = self.slot_file.poll() {
            match &outcome {
                Ok(()) if self.slots_told.is_over() => tracing::info!("the slots are saved again"),
                Ok(()) => {}
                Err(error) => {
                    let text = error.to_string();
                    if self.slots_told.tell(&text, now).is_some() {
                        tracing::error!(
                            "the slots cannot be saved, no log is recycled meanwhile; it is tried again: {text}"
                        );
                    }
                }
            }
            self.slots.saved(outcome.is_ok(), now);
        }
    }

    fn answer_hellos(&mut self, ring: &mut Ring, log: &mut Log, history: &EpochHistory, now: Instant) {
        let waiting = |link: &Link| matches!(link.phase, Phase::Probe(Some(_)));
        let numbers: Vec<LinkNo> = self.links.values().filter(|link| waiting(link)).map(|link| link.number).collect();
        for number in numbers {
            let mut link = self.links.remove(&number).expect("just seen");
            if let Phase::Probe(Some(hello)) = std::mem::replace(&mut link.phase, Phase::Probe(None))
                && let Err(refuse) = self.welcome(&mut link, &hello, ring, log, history, now)
            {
                if refuse.code == RefuseCode::NewerEpoch {
                    self.superseded = hello.history.last().map(|(epoch, _)| *epoch).max(self.superseded);
                }
                self.end(&mut link, &LinkError::Refused(refuse), ring, log, now);
            }
            self.links.insert(number, link);
        }
    }

    /// What replicas are compared with.
    fn as_leader<'a>(&'a self, log: &Log, history: &'a EpochHistory) -> Leader<'a> {
        Leader {
            cluster_id: self.config.cluster_id,
            name: &self.config.name,
            segment_bytes: self.config.segment_bytes,
            history,
            log_start: log.start().max(self.feeds_from),
            sealed: log.sealed(),
        }
    }

    /// Gives snapshots to those who ask, and keeps the log for those who have one.
    fn give_snapshots(&mut self, ring: &mut Ring, log: &mut Log, history: &EpochHistory, now: Instant) {
        self.snapshots.look(log.start(), |snapshot| chain::crc_before(log, snapshot));
        let asking = |link: &Link| matches!(link.phase, Phase::Fetch(_));
        let numbers: Vec<LinkNo> = self.links.values().filter(|link| asking(link)).map(|link| link.number).collect();
        for number in numbers {
            let mut link = self.links.remove(&number).expect("just seen");
            let Phase::Fetch(fetch) = link.phase.clone() else { unreachable!("just seen") };
            if let Err(refuse) = self.give_snapshot(&mut link, fetch, log, history, now) {
                self.end(&mut link, &LinkError::Refused(refuse), ring, log, now);
                link.receive(ring);
                self.links.insert(number, link);
            }
        }
        for (name, snapshot) in self.snapshots.poll(self.view.sealed, now) {
            // It was reserved before the transfer began, and is not dropped while that goes on.
            let held = self.slots.hold_from(&name, snapshot);
            debug_assert!(held, "{name} has no slot");
        }
    }

    fn give_snapshot(
        &mut self,
        link: &mut Link,
        fetch: Fetch,
        log: &Log,
        history: &EpochHistory,
        now: Instant,
    ) -> Result<(), Refuse> {
        if self.members.as_ref().is_some_and(|members| !members.contains_key(&fetch.name)) {
            return Err(no_member(&fetch.name));
        }
        judge_fetch(&fetch, &self.as_leader(log, history))?;
        // Before the transfer: a node that replaced its store by a copy for which there is no slot would have lost it for nothing.
        self.make_place(&fetch.name)?;
        let reserved = self.slots.reserve(&fetch.name);
        debug_assert!(reserved, "{} has a place", fetch.name);
        let known = self.replicas.entry(fetch.name.clone());
        // A fetch confirms nothing.
        let id = self.members.as_ref().and_then(|members| members.get(&fetch.name)).copied().unwrap_or(MemberId(0));
        let replica = known.or_insert_with(|| Replica::new(fetch.name.clone(), id, Progress::default(), now));
        replica.member = true;
        tracing::info!(replica = %fetch.name, address = %link.caller.address, "a replica asks for a snapshot");
        let offer = Offer {
            protocol: PROTOCOL_VERSION,
            cluster_id: self.config.cluster_id,
            name: self.config.name.clone(),
            snapshot: Lsn::ZERO,
            segment_bytes: self.config.segment_bytes,
            bytes: 0,
            offset: 0,
            crc: 0,
            history: history.entries().to_vec(),
        };
        let Some(socket) = link.give_socket() else { return Ok(()) };
        if let Err((socket, refuse)) = self.snapshots.ask(socket, fetch, offer, self.view.sealed, now) {
            turn_away(&socket, &refuse);
        }
        Ok(())
    }

    /// Sends parts of the log to nodes that lost them.
    fn serve_frames(&mut self, log: &Log, history: &EpochHistory) {
        let asking = |link: &Link| matches!(link.phase, Phase::FetchFrames(_));
        let numbers: Vec<LinkNo> = self.links.values().filter(|link| asking(link)).map(|link| link.number).collect();
        for number in numbers {
            let mut link = self.links.remove(&number).expect("just seen");
            let Phase::FetchFrames(request) = link.phase.clone() else { unreachable!("just seen") };
            if let Some(socket) = link.give_socket() {
                let members = self.members.as_ref().map(|members| members.keys().cloned().collect());
                let log = LogSnapshot::of(log, self.config.cluster_id, self.config.name.clone(), history);
                let log = log.for_members(members);
                self.frame_server.answer(socket, request, log);
            }
        }
    }

    /// Another node with this name is connected and alive: the one that says hello now is refused, or they would take turns for ever.
    /// The same node that was started again, or came back from a network that was cut, connects from where it was: it takes the place
    /// of its old connection at once. One that moved does so once its old connection was silent for `NAME_HELD_TIME`.
    fn check_name(&self, hello: &Hello, link: &Link, now: Instant) -> Result<(), Refuse> {
        let first = self.replicas.get(&hello.name).and_then(|replica| Some((replica, self.links.get(&replica.link?)?)));
        let Some((replica, old)) = first else { return Ok(()) };
        let held = NAME_HELD_TIME.max(self.config.heartbeat_interval * HELD_HEARTBEATS).min(self.config.peer_timeout);
        let clients = reachable(&hello.client_address, link.caller.address).unwrap_or_default();
        let moved = old.caller.address.ip() != link.caller.address.ip() || replica.address != clients;
        let is_silent = now.saturating_duration_since(old.heard) > held;
        if !moved || is_silent {
            return Ok(());
        }
        // Without the port that the other one connects from, which is new each time: what is the same is logged once.
        let text = format!(
            "two nodes are called {}: one at {} serves clients at {} and is connected; this one at {} serves clients at {clients}. \
             Start one of them with another --name, or stop it",
            hello.name,
            old.caller.address.ip(),
            replica.address,
            link.caller.address.ip(),
        );
        Err(Refuse { code: RefuseCode::Replaced, text })
    }

    /// There is a slot for this replica, or a place for one; a lost slot that nobody needs is dropped for it.
    fn make_place(&mut self, name: &MemberName) -> Result<(), Refuse> {
        let is_fed = |name: &MemberName| {
            self.replicas.get(name).is_some_and(|replica| replica.link.is_some())
                || self.snapshots.progress(name).is_some()
        };
        let (fits, lost) = self.slots.place_for(name, is_fed);
        if let Some(lost) = lost {
            tracing::info!(slot = %lost, replica = %name, "a lost slot is dropped: its place is needed for another replica");
            self.forget_replica(&lost);
        }
        if fits {
            return Ok(());
        }
        let text = format!(
            "there is no slot for {name}: the leader has {SLOTS_MAX}, which is the limit, and each holds log for its replica. \
             `walferry slot list` on the leader tells them; `walferry slot drop NAME` drops one whose replica does not come back"
        );
        Err(Refuse { code: RefuseCode::Full, text })
    }

    /// Nothing is held for this replica, and it counts nowhere.
    fn forget_replica(&mut self, name: &MemberName) {
        self.slots.forget(name);
        self.in_sync.forget(name);
        self.replicas.remove(name);
        self.moved = true;
    }

    /// An operator drops the slot of a replica that does not come back; what is said to that, or why it is not done.
    pub fn drop_slot(&mut self, name: &MemberName) -> Result<String, String> {
        if self.members.as_ref().is_some_and(|members| members.contains_key(name)) {
            return Err(format!("{name} is a member of the cluster: `walferry remove --name {name}` does without it"));
        }
        let Some(restart) = self.slots.restart(name) else {
            let known = self.slots.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ");
            let known = if known.is_empty() { "there is none" } else { &known };
            return Err(format!("there is no slot called {name}; the slots: {known}"));
        };
        let replica = self.replicas.get(name);
        if let Some(link) = replica.and_then(|replica| self.links.get(&replica.link?)) {
            return Err(format!(
                "the slot is in use: {name} is connected from {}. Stop that node first, it would make its slot anew",
                link.caller.address
            ));
        }
        if self.snapshots.progress(name).is_some() {
            return Err(format!("the slot is in use: {name} receives a snapshot. Stop that node first"));
        }
        let held = if self.slots.is_lost(name) { 0 } else { self.view.sealed.since(restart) };
        self.forget_replica(name);
        tracing::info!(slot = %name, held_bytes = held, "a slot was dropped by an operator");
        let text = format!("slot {name} is dropped: it held {held} bytes of log");
        let policy = self.rule.policy();
        if policy.names(name) {
            return Ok(format!(
                "{text}. The sync policy {policy} still names {name}: start the leader with another --sync"
            ));
        }
        Ok(text)
    }

    /// The snapshots: the node makes them.
    pub fn snapshots(&mut self) -> &mut Snapshots {
        &mut self.snapshots
    }

    /// The node begins to make a snapshot as of `snapshot`. False when no frame of the log ends there.
    pub fn begin_snapshot(&mut self, snapshot: Lsn, log: &Log) -> bool {
        let crc = chain::crc_before(log, snapshot);
        if let Some(crc) = crc {
            self.snapshots.begun(snapshot, crc);
        }
        crc.is_some()
    }

    /// Compares logs with a replica and begins to stream.
    fn welcome(
        &mut self,
        link: &mut Link,
        hello: &Hello,
        ring: &mut Ring,
        log: &mut Log,
        history: &EpochHistory,
        now: Instant,
    ) -> Result<(), Refuse> {
        match self.members.as_ref().map(|members| members.get(&hello.name)) {
            Some(None) => return Err(no_member(&hello.name)),
            Some(Some(id)) if *id != hello.member && !mutants::is_on("complete-without-proof") => {
                return Err(other_incarnation(&hello.name, *id, hello.member));
            }
            _ => {}
        }
        self.check_name(hello, link, now)?;
        let start = judge(hello, &self.as_leader(log, history))?;
        chain::check(log, hello, start)?;
        self.make_place(&hello.name)?;
        let attached = self.slots.attach(&hello.name, start);
        debug_assert!(attached, "{} has a place", hello.name);
        let replica = self.replicas.entry(hello.name.clone());
        let replica =
            replica.or_insert_with(|| Replica::new(hello.name.clone(), hello.member, Progress::default(), now));
        (replica.member, replica.id) = (true, hello.member);
        if let Some(mut old) = replica.link.and_then(|number| self.links.remove(&number)) {
            let text = format!("another connection of {} took this one's place", hello.name);
            let refuse = Refuse { code: RefuseCode::Replaced, text };
            self.end(&mut old, &LinkError::Refused(refuse), ring, log, now);
            self.links.insert(old.number, old);
        }
        let replica = self.replicas.get_mut(&hello.name).expect("just entered");
        replica.progress.restart(start);
        replica.link = Some(link.number);
        replica.address = reachable(&hello.client_address, link.caller.address).unwrap_or_default();
        replica.caught_up = false;
        replica.last_error.clear();
        self.moved = true;
        let welcome = Welcome {
            protocol: PROTOCOL_VERSION,
            cluster_id: self.config.cluster_id,
            name: self.config.name.clone(),
            start,
            segment_bytes: self.config.segment_bytes,
            client_address: self.config.client_address.clone(),
            heartbeat_ms: u32::try_from(self.config.heartbeat_interval.as_millis()).unwrap_or(u32::MAX),
            history: history.entries().to_vec(),
            policy: self.rule.policy().clone(),
        };
        link.phase = Phase::Streaming(hello.name.clone());
        link.outgoing.begin(&Message::Welcome(welcome), start, self.common.heartbeat_interval, now);
        tracing::info!(replica = %hello.name, address = %link.caller.address, %start, end = %log.sealed(), "replica connected");
        if start < hello.flushed {
            tracing::warn!(replica = %hello.name, theirs = %hello.flushed, fork = %start, "the replica truncates to the fork");
        }
        Ok(())
    }

    fn drop_silent(&mut self, ring: &mut Ring, log: &mut Log, now: Instant) {
        let timeout = self.config.peer_timeout;
        let late = |link: &Link| match link.phase {
            Phase::Closing(until) => now >= until,
            Phase::Closed => false,
            Phase::Probe(_) | Phase::Fetch(_) | Phase::FetchFrames(_) | Phase::Streaming(_) => {
                is_handshake_late(link, now) || now.saturating_duration_since(link.heard) > timeout
            }
        };
        let numbers: Vec<LinkNo> = self.links.values().filter(|link| late(link)).map(|link| link.number).collect();
        for number in numbers {
            let mut link = self.links.remove(&number).expect("just seen");
            let error =
                if is_handshake_late(&link, now) { LinkError::HandshakeTimeout } else { LinkError::Silent(timeout) };
            self.end(&mut link, &error, ring, log, now);
            self.links.insert(number, link);
        }
        let gone = |replica: &&Replica| !replica.member && replica.link.is_some();
        let gone: Vec<_> =
            self.replicas.values().filter(gone).map(|replica| (replica.name.clone(), replica.link)).collect();
        for (name, number) in gone {
            if let Some(mut link) = number.and_then(|number| self.links.remove(&number)) {
                self.end(&mut link, &LinkError::Refused(no_member(&name)), ring, log, now);
                self.links.insert(link.number, link);
            }
            self.replicas.remove(&name);
        }
    }

    fn send(&mut self, ring: &mut Ring, log: &mut Log, now: Instant) {
        let mut failed = Vec::new();
        for link in self.links.values_mut() {
            let mut turn = Turn { log, ring, common: &self.common, view: self.view, traces: &self.traces, now };
            if let Err(error) = link.pump(&mut turn) {
                failed.push((link.number, error));
                continue;
            }
            let Some(replica) = link.replica().and_then(|name| self.replicas.get_mut(name)) else { continue };
            replica.progress.send(link.outgoing.sent().max(replica.progress.sent()));
            if !replica.caught_up && !link.outgoing.is_catching_up() && replica.progress.sent() >= self.view.sealed {
                replica.caught_up = true;
                self.moved = true;
            }
        }
        for (number, error) in failed {
            let mut link = self.links.remove(&number).expect("just seen");
            self.end(&mut link, &error, ring, log, now);
            self.links.insert(number, link);
        }
    }

    /// The log cannot go on because of memory that a link keeps in place.
    fn unblock(&mut self, ring: &mut Ring, log: &mut Log, now: Instant) {
        while let Some(pin) = log.pin_blocking() {
            let holder = self.links.values().find(|link| link.outgoing.holds(pin));
            let Some(mut link) = holder.map(|link| link.number).and_then(|number| self.links.remove(&number)) else {
                return;
            };
            let mut turn = Turn { log, ring, common: &self.common, view: self.view, traces: &self.traces, now };
            if let Err(error) = link.give_way(&mut turn) {
                self.end(&mut link, &error, ring, log, now);
            }
            self.links.insert(link.number, link);
        }
    }

    fn observe(&mut self, now: Instant) {
        let mut needed = self.view.sealed;
        for replica in self.replicas.values_mut() {
            needed = needed.min(replica.progress.applied());
            let age = self.timeline.age(replica.progress.flushed(), now);
            let lag = age.max(replica.silence(now));
            let may_join =
                replica.standing().streaming && has_everything(&replica.progress, self.view, self.config.epoch_start);
            match self.in_sync.observe(&replica.name, lag, may_join) {
                Some(Change::Joined) => tracing::info!(replica = %replica.name, "joined the in-sync set"),
                Some(Change::Left) => tracing::warn!(replica = %replica.name, ?lag, "left the in-sync set"),
                None => {}
            }
            let in_sync = self.in_sync.contains(&replica.name);
            self.moved |= in_sync != replica.in_sync;
            replica.in_sync = in_sync;
        }
        self.timeline.forget_before(needed);
        self.moved |= self.rule.set_short(self.in_sync.count() < self.config.min_in_sync);
        if std::mem::take(&mut self.moved) {
            let standings: Vec<Standing<'_>> = self.replicas.values().map(Replica::standing).collect();
            self.rule.update(&standings, self.view.flushed);
            self.shortage = self.rule.shortage(&standings);
        }
    }

    fn keep_slots(&mut self, ring: &mut Ring, log: &mut Log, now: Instant) {
        let (sealed, keep_bytes_max) = (self.view.sealed, self.config.slot_keep_bytes_max);
        for name in self.slots.give_up(sealed, keep_bytes_max) {
            let restart = self.slots.restart(&name).unwrap_or(Lsn::ZERO);
            tracing::warn!(slot = %name, %restart, end = %sealed, keep_bytes_max, "a slot is lost: it holds no log any more");
        }
        let lost = |replica: &&Replica| replica.link.is_some() && self.slots.is_lost(&replica.name);
        let lost: Vec<(MemberName, LinkNo, Lsn)> = self
            .replicas
            .values()
            .filter(lost)
            .filter_map(|replica| Some((replica.name.clone(), replica.link?, replica.progress.flushed())))
            .collect();
        for (name, number, flushed) in lost {
            if flushed >= log.start() {
                if self.slots.revive(&name, sealed, keep_bytes_max) {
                    tracing::info!(slot = %name, "a lost slot holds the log again: its replica has come close");
                }
                continue;
            }
            let mut link = self.links.remove(&number).expect("a replica names an open link");
            let text = format!(
                "slot {name} is lost: it held back more than slot_keep_bytes_max = {keep_bytes_max}, and the log \
                 from {flushed} to {} is recycled",
                log.start()
            );
            let refuse = Refuse { code: RefuseCode::LogGone, text };
            self.end(&mut link, &LinkError::Refused(refuse), ring, log, now);
            self.links.insert(number, link);
        }
        if let Some(text) = self.slots.poll_save(false, now) {
            self.slot_file.write(text);
        }
    }

    /// Ends a link that went wrong: says so here, and to the replica when it is its fault.
    fn end(&mut self, link: &mut Link, error: &LinkError, ring: &mut Ring, log: &mut Log, now: Instant) {
        let replica = link.replica().and_then(|name| self.replicas.get_mut(name));
        if let Some(name) = replica.as_ref().map(|replica| replica.name.as_str()).filter(|_| link.is_open()) {
            if let Some(repeated) = self.links_told.tell(&format!("{name}: {error}"), now) {
                tracing::warn!(replica = name, address = %link.caller.address, repeated, "replica disconnected: {error}");
            }
        } else if let LinkError::Refused(refuse) = error {
            if let Some(repeated) = self.links_told.tell(&refuse.to_string(), now) {
                tracing::warn!(address = %link.caller.address, repeated, "a replica is refused: {refuse}");
            }
        } else if link.is_open()
            && let Some(more) = self.unidentified_told.tell(UNIDENTIFIED_TOLD_INTERVAL, now)
        {
            let count = more + 1;
            tracing::warn!(address = %link.caller.address, count, "a peer connection without a name ended: {error}");
        }
        if let Some(replica) = replica.filter(|replica| replica.link == Some(link.number)) {
            replica.link = None;
            self.catchups_broken += u64::from(replica.progress.flushed() < self.view.hot_start);
            replica.silent_since = now;
            replica.sent_bytes = replica.sent_bytes.plus(link.outgoing.bytes());
            replica.last_error = error.to_string();
            self.moved = true;
        }
        match error {
            LinkError::Refused(refuse) => link.refuse(refuse, now),
            LinkError::Message(_) | LinkError::Ack(_) | LinkError::Turn => {
                link.refuse(&Refuse { code: RefuseCode::Protest, text: error.to_string() }, now);
            }
            LinkError::Stopping => {
                link.refuse(&Refuse { code: RefuseCode::Stopping, text: error.to_string() }, now);
                let mut turn = Turn { log, ring, common: &self.common, view: self.view, traces: &self.traces, now };
                let _ = link.pump(&mut turn);
                link.close(ring, log);
            }
            _ => link.close(ring, log),
        }
    }

    /// The data directory is not this node's any more: nothing is written there.
    pub fn forget_slots(&mut self) {
        self.slots = Slots::default();
    }

    /// Ends every connection and makes the slots durable: the node stops, or steps down. The shipper is dropped next.
    pub fn close_all(&mut self, ring: &mut Ring, log: &mut Log, now: Instant) {
        for (_, mut link) in std::mem::take(&mut self.links) {
            self.end(&mut link, &LinkError::Stopping, ring, log, now);
        }
        if self.slots.is_saving() {
            let outcome = self.slot_file.wait();
            self.slots.saved(outcome.is_ok(), now);
        }
        if let Some(text) = self.slots.poll_save(true, now) {
            self.slot_file.write(text);
            let outcome = self.slot_file.wait();
            if let Err(error) = &outcome {
                tracing::error!("the slots cannot be saved: {error}");
            }
            self.slots.saved(outcome.is_ok(), now);
        }
    }
}

/// It has had its time to say what it is.
fn is_handshake_late(link: &Link, now: Instant) -> bool {
    matches!(link.phase, Phase::Probe(None)) && now.saturating_duration_since(link.since) > HANDSHAKE_TIME_MAX
}

/// Whether a replica has confirmed, in this leadership, everything that any commit rests on (Kafka's rule: up to the high
/// watermark, and beyond where the epoch begins). At first nothing is committed, so that alone would let in whoever was sent
/// everything and has none of it.
fn has_everything(progress: &Progress, view: View, epoch_start: Lsn) -> bool {
    let flushed = progress.flushed();
    let in_epoch = flushed > epoch_start || flushed == epoch_start && view.sealed == epoch_start;
    flushed >= view.committed && (in_epoch || mutants::is_on("join-without-proof"))
}

fn other_incarnation(name: &MemberName, known: MemberId, theirs: MemberId) -> Refuse {
    let text =
        format!("the leader knows {name} as {known}, this one is {theirs}: it begins anew, and is taken back soon");
    Refuse { code: RefuseCode::NotMember, text }
}

fn no_member(name: &MemberName) -> Refuse {
    let text = format!("{name} is no member of the leader's cluster: `walferry join` makes it one");
    Refuse { code: RefuseCode::NotMember, text }
}

fn acknowledge(replica: &mut Replica, link: &Link, ack: &Ack, clock_us: u64) -> Result<bool, LinkError> {
    // A catch-up thread has sent more than the last turn knew.
    replica.progress.send(link.outgoing.sent().max(replica.progress.sent()));
    Ok(replica.acknowledge(ack, clock_us)?)
}
