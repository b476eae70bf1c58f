//! What nodes agree on and say to each other. No sockets and no clock; the only disk is the register's own file.
//!
//! ```text
//!  leader (shipper)                                    replica (applier)
//!      <------------------------------- Hello    message.rs: who I am, my epoch history, my LSN
//!      Welcome | Refuse --------------->         message.rs: stream starts here, or why not
//!      Chunk, Frame, LinkHeartbeat -------->         the log's bytes, and how far the leader is
//!      <--------------------------------- Ack    written, flushed, applied
//!
//!  level.rs      how far a commit must have come before its client is answered
//!  policy.rs     which replicas have to confirm it
//!  handover.rs   the policy that a replica keeps for its promotion
//!  insync.rs     which replicas keep up
//!
//!  snapshot.rs  how far a copy of the store is, for a replica whose log is gone
//!
//!  register.rs   what all members agree on: members, epoch, leader, in-sync set, policy
//!  quorum_rule.rs whose confirmations count, by policy and members
//!  membership.rs how members come and go while the cluster runs
//!  changing.rs   one such change on its way into the register
//!  lease.rs      for how long a leader may speak
//!  failover.rs   how it is replaced
//!  control.rs    what members ask each other for that
//!  agent/        everything that a member decides: the one control plane, driven by the daemon and by the simulator
//!  consensus/    the register, held by openraft
//! ```

pub mod agent;
pub(crate) mod changing;
pub mod consensus;
pub mod control;
pub mod error;
pub mod failover;
pub mod handover;
pub mod insync;
pub mod lease;
pub mod level;
pub mod member;
pub mod membership;
pub mod message;
pub mod policy;
pub mod quorum_rule;
pub mod register;
pub mod snapshot;
#[cfg(test)]
mod testing;

pub use error::MessageError;
pub use insync::InSync;
pub use level::CommitLevel;
pub use member::{ClusterId, MemberName};
pub use message::Message;
pub use policy::SyncPolicy;
pub use quorum_rule::QuorumRule;
