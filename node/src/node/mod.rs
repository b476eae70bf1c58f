//! The node: its log, store and links, and what its sessions may ask of them (`Host`). Driven by `reactor`.
//!
//! Its duties, once a turn (`poll`), in this order: 1. seal and submit what was appended; 2. ship it, or follow; 3. apply what
//! became durable; 4. move the commit LSN, checkpoints and retention; 5. say whose replies are released.

mod administration;
pub(crate) mod apply;
mod blocked;
mod commit;
mod confirmation;
pub mod description;
mod disk;
mod ending;
mod facts;
mod info;
mod links;
mod members;
pub(crate) mod open;
mod policy;
mod release;
mod role;
mod scrub;
mod scrub_schedule;
mod snapshot;
mod state;
pub mod turn;
#[cfg(test)]
mod turn_tests;

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Instant;

use walferry_applier::pending::Pending;
use walferry_applier::replica::Replica;
use walferry_applier::store::Store;
use walferry_engine::epoch::EpochHistory;
use walferry_engine::held::HeldFiles;
use walferry_engine::log::Log;
use walferry_engine::lsn::Lsn;
use walferry_engine::meta::Meta;
use walferry_engine::waker::Waker;
use walferry_shipper::frame_server::FrameServer;
use walferry_shipper::shipper::Shipper;

use self::state::{Ending, KeyCounting, Leadership, Scrubbing, Seen, SnapshotTransfers, SpaceWatch};
use crate::clients::limits::ClientCounts;
use crate::clients::list::Asked;
use crate::config::NodeConfig;
use crate::membership::Membership;
use crate::metrics::waterfall::Waterfall;
use crate::repair::RepairCount;
use crate::session::commit_queue::CommitQueue;
use crate::session::parking::Parking;
use crate::tls::Tls;
use crate::users::Users;
use crate::users::login::Checker;
use crate::watchdog::Watchdog;

/// What the node is for its cluster.
pub(crate) enum Role {
    /// The node takes writes and ships them to replicas.
    Leader(Box<Shipper>),
    /// The node replicates from a leader.
    Replica(Box<Replica>),
    /// A member of a cluster that has no leader for it at the moment; why. It answers reads.
    Leaderless(String),
    /// It took writes until its log failed or a newer leader appeared; it answers reads and says why.
    SteppedDown(String),
}

/// How far a leader was.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Heard {
    /// Durable at the leader: the store may hold it.
    pub(crate) flushed: Lsn,
    /// Confirmed by the sync policy.
    pub(crate) committed: Lsn,
    /// The store is as fresh as the leader's was then, by this node's clock; `None` when that is not known.
    pub(crate) fresh: Option<Instant>,
    /// When anything came from a leader, or this node led itself; `None` before.
    pub(crate) at: Option<Instant>,
}

/// What of a turn of the loop all duties share.
#[derive(Clone, Copy)]
struct Clock {
    now: Instant,
    wall_us: u64,
}

/// What sessions and their connections share.
pub(crate) struct ClientSide {
    pub(crate) counts: ClientCounts,
    /// What sessions ask of all connections; answered by `clients` within the turn.
    pub(crate) asks: Vec<Asked>,
    /// Commands executed since the start.
    pub(crate) commands: u64,
    pub(crate) logins: Checker,
    /// Who may connect; every session has it.
    pub(crate) users: Rc<RefCell<Users>>,
    users_changed: bool,
}

impl ClientSide {
    fn new(users: Rc<RefCell<Users>>, waker: Waker) -> ClientSide {
        ClientSide {
            counts: ClientCounts::default(),
            asks: Vec::new(),
            commands: 0,
            logins: Checker::new(waker),
            users,
            users_changed: false,
        }
    }
}

/// One node.
pub struct Node {
    pub(crate) config: NodeConfig,
    pub(crate) meta: Meta,
    /// Where clients of other hosts connect: to TLS, where there is a port for it.
    pub(crate) client_address: SocketAddr,
    /// How links are protected.
    pub(crate) tls: Tls,
    pub(crate) log: Log,
    pub(crate) store: Store,
    /// Whether what log and store have open is still what stands in the data directory.
    held: HeldFiles,
    pub(crate) pending: Pending,
    pub(crate) history: EpochHistory,
    pub(crate) role: Role,
    /// The link of a replica that was promoted, until nothing of it is in flight.
    pub(crate) retired: Option<Box<Replica>>,
    /// Its membership in a cluster, if it is a member of one.
    pub(crate) membership: Option<Membership>,
    /// What the log's last leader had made durable, and what was committed, as last heard; for the next link.
    pub(crate) heard: Heard,
    /// Commits cut off from this log since the process started.
    pub(crate) lost_commits: u64,
    /// Snapshots that it makes, gives and takes.
    pub(crate) snapshots: SnapshotTransfers,
    /// What of its data was damaged and is whole again.
    pub(crate) repaired: RepairCount,
    scrubbing: Scrubbing,
    space: SpaceWatch,
    /// Sends parts of the log to other nodes while this node does not lead.
    frame_server: FrameServer,
    pub(crate) queue: CommitQueue,
    pub(crate) parking: Parking,
    /// Observes commits; nothing asks it.
    pub(crate) waterfall: Waterfall,
    /// What sessions and their connections share.
    pub(crate) clients: ClientSide,
    pub(crate) started: Instant,
    pub(crate) waker: Waker,
    clock: Clock,
    leadership: Leadership,
    seen: Seen,
    /// What the store held at the end of the last turn.
    applied_before: Lsn,
    /// Why the node has to step down and end; done with the next turn.
    failure: Option<String>,
    ending: Option<Ending>,
    abandoned: Option<String>,
    more_to_apply: bool,
    counting: KeyCounting,
    /// The store went back in this turn.
    rolled_back: bool,
    /// How long turns and commands take.
    pub(crate) watchdog: Watchdog,
}

impl Node {
    /// The configuration.
    pub fn config(&self) -> &NodeConfig {
        &self.config
    }

    /// One line for logs and the service manager.
    pub fn describe(&self) -> String {
        let epoch = self.history.last_epoch();
        match (&self.role, &self.config.follow) {
            (Role::Leader(_), _) => format!("leader {} in epoch {epoch} at {}", self.config.name, self.log.end()),
            (Role::Replica(_), Some(leader)) => {
                format!("replica {} of {leader} at {}", self.config.name, self.log.end())
            }
            (Role::Replica(replica), None) => {
                format!("replica {} of {} at {}", self.config.name, replica.leader(), self.log.end())
            }
            (Role::Leaderless(reason), _) => format!("{} without a leader: {reason}", self.config.name),
            (Role::SteppedDown(reason), _) => format!("{} stepped down: {reason}", self.config.name),
        }
    }

    /// What the node is and what keeps it from its work, for the service manager: the same text as long as nothing changes.
    pub fn status_line(&self) -> String {
        let (name, blocked_reason) = (&self.config.name, self.blocked_reason());
        let what = match &self.role {
            Role::Leader(_) => format!("leader {name} in epoch {}", self.history.last_epoch()),
            Role::Replica(replica) => format!("replica {name} of {}", replica.leader()),
            Role::Leaderless(_) => format!("{name} without a leader"),
            Role::SteppedDown(_) => name.clone(),
        };
        if blocked_reason.is_empty() { what } else { format!("{what}: {blocked_reason}") }
    }

    pub(crate) fn now(&self) -> Instant {
        self.clock.now
    }

    pub(crate) fn wall_us(&self) -> u64 {
        self.clock.wall_us
    }

    fn leads(&self) -> bool {
        matches!(self.role, Role::Leader(_))
    }

    /// The cluster that the node belongs to; 0 until it has met one.
    pub(crate) fn known_cluster_id(&self) -> u128 {
        match &self.role {
            Role::Replica(replica) => replica.cluster_id(),
            _ => self.meta.cluster_id,
        }
    }

    /// What the clients' side counted.
    pub fn count(&mut self, clients: ClientCounts, commands: u64) {
        self.clients.counts = clients;
        self.clients.commands += commands;
    }

    /// Reads the users' file again; on an error the users stay as they are.
    pub fn read_users(&mut self) -> Result<(), String> {
        let file = self.config.users_file.as_ref().ok_or("this node has no users_file")?;
        let users = Users::load(file).map_err(|error| error.to_string())?;
        tracing::info!(users = users.lines().len(), "the users' file was read again");
        *self.clients.users.borrow_mut() = users;
        self.clients.users_changed = true;
        Ok(())
    }

    /// True once after the users' file was read again.
    pub fn take_users_changed(&mut self) -> bool {
        std::mem::take(&mut self.clients.users_changed)
    }

    /// What sessions ask of all connections.
    pub fn take_client_asks(&mut self) -> Vec<Asked> {
        std::mem::take(&mut self.clients.asks)
    }
}
