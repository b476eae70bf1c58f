//! What nodes agree on and say to each other. No sockets, no clock, no disk: plain types and state machines.
//!
//! ```text
//!  leader (shipper)                                    replica (applier)
//!      <------------------------------- Hello    message.rs: who I am, my epoch history, my LSN
//!      Welcome | Refuse --------------->         message.rs: stream starts here, or why not
//!      Chunk, Frame, Heartbeat -------->         the log's bytes, and how far the leader is
//!      <--------------------------------- Ack    written, flushed, applied
//!
//!  level.rs   how far a commit must have come before its client is answered
//!  policy.rs  which replicas have to confirm it
//!  insync.rs  which replicas keep up
//! ```

pub mod error;
pub mod insync;
pub mod level;
pub mod member;
pub mod message;
pub mod policy;

pub use error::MessageError;
pub use insync::InSync;
pub use level::CommitLevel;
pub use member::{ClusterId, MemberName};
pub use message::Message;
pub use policy::SyncPolicy;
