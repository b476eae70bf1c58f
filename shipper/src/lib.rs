//! The leader's side of replication: each replica's progress, the commit rule, and the streaming of the log, from
//! memory while a replica keeps up and from segment files when it does not. Knows the log and what nodes say to each
//! other; knows no commands and no store.
//!
//! ```text
//!             log buffer ──> link (sendmsg, SEND_ZC) ──┐
//!  sender ──┤                                          ├──> replica ──Ack──> progress ──> commit_rule ──> commit queue
//!             segment files ──> catchup (sendfile) ────┘                        ├──> lag ──> in-sync set
//!                                                                               └──> slots ──> retention
//! ```
//!
//! `snapshot` gives copies of the store to replicas whose place in the log is gone; `frame_server` gives frames back to a node that lost them,
//! whether this one leads or not.
//!
//! Cores without I/O: `progress`, `commit_rule`, `lag`, `slots`, `sender`, `handshake`, `frame_server::judge`. Drivers: `link`, `catchup`.
//! `shipper` is the collection that a leading node owns; `status` is what it tells; `refuse` is for nodes that do not lead.

mod batch;
mod catchup;
mod chain;
pub mod commit_rule;
pub mod frame_server;
pub mod handshake;
pub mod lag;
mod link;
mod outgoing;
pub mod progress;
pub mod refuse;
mod replica;
pub mod sender;
pub mod shipper;
pub mod slots;
pub mod snapshot;
pub mod status;
mod traces;
pub mod transport;
mod zero_copy;

pub use shipper::{Shipper, ShipperConfig, ShipperError};
pub use status::ReplicaStatus;
