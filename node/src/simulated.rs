//! A node for the simulator: the node and the sessions that run in production, with a simulator where the reactor, the sockets of
//! clients and the cluster's thread would be.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use bytes::BytesMut;
use walferry_cluster::ClusterId;
use walferry_cluster::level::CommitLevel;
use walferry_cluster::member::Caller;
use walferry_cluster::register::MemberId;
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_engine::ring::simulated::Queues;
use walferry_engine::ring::{Completion, Owner, Ring};
use walferry_engine::waker::WakeSource;
use walferry_engine::world;
use walferry_shipper::frame_server::LogSnapshot;

use crate::cluster::Cluster;
pub use crate::cluster::witness::agent as witness_agent;
pub use crate::cluster::{Control, Order, Report};
use crate::config::{NodeConfig, Settings};
use crate::error::DaemonError;
use crate::node::turn::{self, Sessions};
use crate::node::{self, Node, Role};
use crate::session::Session;
use crate::session::client::SessionSettings;
use crate::session::host::CommitPath;
use crate::session::id::SessionId;
use crate::tls::Tls;
use crate::users::Users;

/// What a turn brought.
#[derive(Debug, Default)]
pub struct Turned {
    /// Sessions with replies.
    pub replied: Vec<(u64, Vec<u8>)>,
    /// Sessions that the node closed.
    pub closed: Vec<u64>,
}

/// A node.
pub struct Member {
    // Drops first: what the node still has in flight is never completed.
    ring: Ring,
    node: Node,
    sessions: BTreeMap<SessionId, Session>,
    settings: SessionSettings,
    ready: Vec<SessionId>,
    completions: Vec<Completion>,
}

impl Sessions for BTreeMap<SessionId, Session> {
    fn for_each(&mut self, act: impl FnMut(&mut Session)) {
        self.values_mut().for_each(act);
    }

    fn wake(&mut self, id: SessionId, node: &mut Node) {
        if let Some(session) = self.get_mut(&id) {
            session.release(node);
            session.resume(node);
        }
    }
}

impl Member {
    /// A configuration from the text of a `walferry.toml`; what the file may not say can be changed afterwards.
    pub fn configure(text: &str) -> Result<NodeConfig, String> {
        let settings: Settings = toml::from_str(text).map_err(|error| error.to_string())?;
        NodeConfig::new(settings, Settings::default()).map_err(|error| error.to_string())
    }

    /// What it is, in a line.
    pub fn describe(&self) -> String {
        self.node.describe()
    }

    /// Opens the node's data and makes it a member; `id` is the incarnation of the member, which has promised to refuse leaders of epochs before `promised`.
    pub fn open(
        config: NodeConfig,
        client_address: SocketAddr,
        (id, promised): (MemberId, Epoch),
    ) -> Result<(Member, Queues, Control), DaemonError> {
        let (mut ring, queues) = Ring::simulated()?;
        let (waker, _) = WakeSource::new().map_err(DaemonError::Descriptors)?;
        let (cluster, control) = Cluster::pair(waker.clone());
        let users = Rc::new(RefCell::new(Users::open(None)));
        let settings = SessionSettings {
            users: Rc::clone(&users),
            places: Rc::default(),
            commit_level: Some(config.commit_level),
            commit_timeout: config.commit_timeout,
            read_wait_timeout: config.read_wait_timeout,
        };
        let take_role = |node: &mut Node| {
            node.become_member(cluster, id, promised);
            Ok(())
        };
        let lock = node::open::prepare(&config)?;
        let tls = Tls::open(&config.tls)?;
        let node = Node::open((config, lock), client_address, (None, tls), take_role, users, &mut ring, waker)?;
        let (sessions, ready, completions) = (BTreeMap::new(), Vec::new(), Vec::new());
        Ok((Member { ring, node, sessions, settings, ready, completions }, queues, control))
    }

    /// One turn of the node's loop.
    pub fn turn(&mut self) -> Result<Turned, DaemonError> {
        let now = world::now();
        self.node.set_now(now, world::wall_clock());
        let mut completions = std::mem::take(&mut self.completions);
        self.ring.completions(&mut completions);
        for completion in completions.drain(..) {
            self.node.handle_completion(&completion, &mut self.ring)?;
        }
        self.completions = completions;
        let late = |session: &&Session| session.deadline().is_some_and(|deadline| deadline <= now);
        self.ready.extend(self.sessions.values().filter(late).map(Session::id));
        turn::run(&mut self.node, &mut self.ring, &mut self.sessions, &mut self.ready)?;
        self.node.ended().map_or(Ok(self.collect()), Err)
    }

    fn collect(&mut self) -> Turned {
        let mut turned = Turned::default();
        for (id, session) in &mut self.sessions {
            if !session.output().is_empty() {
                let bytes: BytesMut = std::mem::take(session.output());
                turned.replied.push((id.0, bytes.to_vec()));
            }
            if session.closing() {
                turned.closed.push(id.0);
            }
        }
        turned
    }

    /// How long until the node has something to do by itself.
    pub fn timeout(&self) -> Option<Duration> {
        self.node.timeout(world::now())
    }

    /// A client connected.
    pub fn connect(&mut self, id: u64) {
        self.sessions.insert(SessionId(id), Session::new(SessionId(id), None, &self.settings));
    }

    /// A client's bytes arrived.
    pub fn input(&mut self, id: u64, bytes: &[u8]) {
        self.node.set_now(world::now(), world::wall_clock());
        if let Some(session) = self.sessions.get_mut(&SessionId(id)) {
            session.handle_input(bytes, &mut self.node);
        }
    }

    /// A client is gone.
    pub fn disconnect(&mut self, id: u64) {
        if self.sessions.remove(&SessionId(id)).is_some() {
            CommitPath::unpark(&mut self.node, SessionId(id));
        }
    }

    /// A peer connected.
    pub fn accept_peer(&mut self, socket: OwnedFd, address: SocketAddr) {
        self.node.set_now(world::now(), world::wall_clock());
        self.node.accept_peer(socket, Caller::unproved(address), &mut self.ring, world::now());
    }

    /// What it can send of its log.
    pub fn log(&self) -> LogSnapshot {
        let name = self.node.member_name().expect("a name of the simulator's");
        LogSnapshot::of(&self.node.log, ClusterId(self.node.known_cluster_id()), name, &self.node.history)
    }

    /// Parts of its log that other nodes gave back since it was opened.
    pub fn repaired(&self) -> u64 {
        self.node.repaired.ranges
    }

    /// Snapshots that it has put in place since it was opened.
    pub fn snapshots(&self) -> u64 {
        self.node.snapshots.taken
    }

    /// Commits that were cut off from its log since it was opened, as it tells operators.
    pub fn lost_commits(&self) -> u64 {
        self.node.lost_commits
    }

    /// True while it leads and may speak.
    pub fn leads(&self) -> bool {
        matches!(self.node.role, Role::Leader(_)) && self.node.may_speak_at(world::now())
    }

    /// True while it leads, whether it may speak or not.
    pub fn is_leader(&self) -> bool {
        matches!(self.node.role, Role::Leader(_))
    }

    /// Why it is in no state to lead or follow for good, if it is.
    pub fn stepped_down(&self) -> Option<String> {
        match &self.node.role {
            Role::SteppedDown(reason) => Some(reason.clone()),
            _ => self.node.log.stopped().map(str::to_owned),
        }
    }

    /// The newest epoch of its log.
    pub fn epoch(&self) -> Epoch {
        self.node.history.last_epoch()
    }

    /// The epochs of its log.
    pub fn history(&self) -> &walferry_engine::EpochHistory {
        &self.node.history
    }

    /// Where its log ends durably.
    pub fn flushed(&self) -> Lsn {
        self.node.log.flushed()
    }

    /// The newest of its log.
    pub fn sealed(&self) -> Lsn {
        self.node.log.sealed()
    }

    /// The oldest of its log.
    pub fn log_start(&self) -> Lsn {
        self.node.log.start()
    }

    /// What its store holds.
    pub fn applied(&self) -> Lsn {
        self.node.store.applied()
    }

    /// What it knows to be committed.
    pub fn committed(&self) -> Lsn {
        self.node.committed()
    }

    /// Commits up to here hold the level.
    pub fn released(&self, level: CommitLevel) -> Lsn {
        self.node.released_at(level)
    }

    /// What its store says.
    pub fn store(&self) -> &walferry_applier::store::Store {
        &self.node.store
    }

    /// The file of a segment.
    pub fn segment_path(&self, lsn: Lsn) -> std::path::PathBuf {
        self.node.log.segment_path(lsn.segment(self.node.log.config().segment_bytes))
    }

    /// Ends the node as a killed process ends: nothing more is written by it. Whatever it had in flight must have been completed
    /// with an error before.
    pub fn kill(mut self) {
        self.node.set_now(world::now(), world::wall_clock());
        self.ring.completions(&mut self.completions);
        for completion in std::mem::take(&mut self.completions) {
            if completion.token.owner() == Owner::Log {
                self.node.handle_log(&completion);
            }
        }
    }
}
