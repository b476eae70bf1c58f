//! A node: one process with its log, store, links and clients, on one thread and one ring. The one place where engine, cluster,
//! shipper, applier and tls are wired together. Started by `walferry start`; the simulator runs the same code.
//!
//! ```text
//! reactor ─┬─ clients ── session ── command      bytes of clients in, replies out
//!          │                  └──── reading      how new a state a reader must see: the rules
//!          ├─ node ──┬── Log, Store, Pending     the log and what it says
//!          │         ├── Shipper | Replica      the links of a leader | of a replica
//!          │         ├── membership ── cluster   the node among the members | their thread: leases, failover, register
//!          │         └── node::snapshot           snapshots: made for others | put in place of log and store
//!          ├─ repair                             before a start: what the disk lost, from other nodes
//!          ├─ tls, peer_secret                   gates, where connections become plain sockets
//!          ├─ metrics                            Prometheus, from a thread of its own
//!          └─ listener, signals, notify          the edges to the system
//! config, units, role, data_dir, own_files       what a start reads and checks before there is a node
//! logging                                        where log lines go
//! ```

mod clients;
pub mod cluster;
pub mod config;
pub mod data_dir;
mod descriptors;
mod error;
mod listener;
pub mod logging;
mod membership;
mod metrics;
mod node;
mod notify;
pub mod own_files;
pub mod peer_secret;
mod reactor;
mod repair;
pub mod role;
pub mod session;
mod signals;
#[cfg(feature = "simulation")]
pub mod simulated;
pub mod tls;
pub mod units;
pub mod users;
mod watchdog;

pub use error::DaemonError;

use config::NodeConfig;

/// Runs a node until it is asked to end.
pub fn run(config: NodeConfig) -> Result<(), DaemonError> {
    let dir = config.data.clone();
    let ended = reactor::Reactor::open(config).and_then(reactor::Reactor::run);
    ended.map_err(|error| error.on_the_disk_of(&dir))
}
