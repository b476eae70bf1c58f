//! The daemon: one node with its log, store, links and clients, on one thread and one ring.
//!
//! ```text
//! reactor ─┬─ clients ── session ── command        bytes of clients in, replies out
//!          │                  └───── reading        how new a state a reader must see: the rules
//!          ├─ node ──┬── Log, Store, Pending       the log and what it says
//!          │         ├── Shipper | Follower        the links of a leader | of a replica
//!          │         ├── membership ── cluster     its seat among others | their thread: leases, failover, register
//!          │         ├── base                      makes base copies | puts one in place of log and store
//!          │         ├── commit_queue              whose replies wait for which LSN
//!          │         └── parking                   who waits for anything else
//!          │  └─ repair                        before it takes part: what its disk lost, from the other nodes
//!          ├─ tls                                  gates, where connections become plain sockets
//!          ├─ metrics                              Prometheus, from a thread of its own
//!          └─ listener, signals, notify            the edges to the system
//! ```

mod base;
mod client_limits;
mod client_list;
mod clients;
pub mod cluster;
mod command;
mod commit_queue;
mod description;
mod descriptors;
mod facts;
mod host;
mod listener;
mod login;
mod login_queue;
mod membership;
mod metrics;
mod metrics_text;
mod newcomers;
mod node;
mod notify;
mod outbox;
mod parked;
mod parking;
pub mod peer_secret;
mod reactor;
mod reading;
mod recv_buffers;
mod repair;
mod reply;
pub mod resp;
pub mod salted;
mod scrub;
mod session;
mod signals;
#[cfg(feature = "simulation")]
pub mod simulated;
pub mod tls;
mod turn;
pub mod users;
mod watchdog;
mod waterfall;
mod waterfall_report;

#[cfg(test)]
mod command_tests;
#[cfg(test)]
mod reading_session_tests;
#[cfg(test)]
mod resp_tests;
#[cfg(test)]
mod session_tests;
#[cfg(test)]
mod test_host;
#[cfg(test)]
mod transaction_tests;
#[cfg(test)]
mod turn_tests;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use walferry_engine::prepare::free_bytes;

use crate::config::{ConfigError, NodeConfig};

/// Why a node does not start, or why it ended.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The configuration does not fit this machine or this data directory.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// There is no io_uring.
    #[error(transparent)]
    NoRing(#[from] walferry_engine::ring::RingError),
    /// The ring stopped working.
    #[error("io_uring failed: {0}")]
    Ring(std::io::Error),
    /// The log does not open, or its close failed.
    #[error(transparent)]
    Log(#[from] walferry_engine::error::LogError),
    /// The store does not open or failed.
    #[error(transparent)]
    Store(#[from] walferry_applier::store::StoreError),
    /// An address cannot be listened on.
    #[error("cannot listen on {address} (--{}): {source}", key.replace('_', "-"))]
    Listen {
        /// The configuration key.
        key: &'static str,
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The ready file cannot be written.
    #[error("cannot write --ready-file {}: {source}", file.display())]
    ReadyFile {
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Receive buffers cannot be registered.
    #[error("cannot register receive buffers: {0}; raise RLIMIT_MEMLOCK (LimitMEMLOCK= in the unit)")]
    RecvBuffers(std::io::Error),
    /// Descriptors for signals and wakes cannot be made.
    #[error("cannot set up the node's descriptors: {0}")]
    Signals(std::io::Error),
    /// The users' file is not one, or everybody can read it.
    #[error(transparent)]
    Users(#[from] users::UsersError),
    /// The data directory is another's than the flags say, or cannot say whose.
    #[error(transparent)]
    Role(#[from] crate::role::RoleError),
    /// The data directory belongs to another cluster or node.
    #[error("{0}")]
    Refused(String),
    /// The same as `source`, with what to do about it: the data directory's disk is full.
    #[error(
        "{source}. {} has {free} bytes free: make room there and start the node again; its log has everything that was flushed",
        dir.display()
    )]
    FullDisk {
        /// The data directory.
        dir: PathBuf,
        /// What its disk has left for this user.
        free: u64,
        /// What could not be written.
        source: Box<DaemonError>,
    },
}

/// A disk with less than this free is full: the small files of a data directory and a page of its store may not fit.
const FREE_BYTES_MIN: u64 = 1 << 20;

impl DaemonError {
    /// Adds what to do where the disk of `dir` is full and that can be the reason. Asks the disk, not the error: a write that
    /// did not fit is told by many layers, each in its own words.
    fn on_the_disk_of(self, dir: &Path) -> DaemonError {
        let writes = matches!(self, DaemonError::Log(_) | DaemonError::Store(_) | DaemonError::Refused(_));
        match free_bytes(dir) {
            Ok(free) if writes && free < FREE_BYTES_MIN => {
                DaemonError::FullDisk { dir: dir.to_owned(), free, source: Box::new(self) }
            }
            _ => self,
        }
    }
}

/// Runs a node until it is asked to end.
pub fn run(config: NodeConfig) -> Result<(), DaemonError> {
    let dir = config.data.clone();
    let ended = reactor::Reactor::open(config).and_then(reactor::Reactor::run);
    ended.map_err(|error| error.on_the_disk_of(&dir))
}
