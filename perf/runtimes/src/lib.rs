//! One small server, written three times, to compare what carries the sockets: epoll, tokio-uring and the node's own ring.
//! Run by `perf/compare --rows runtimes`; not part of a node.
//!
//! ```text
//! main ─┬─ serve ── epoll | tokio_ring | node_ring     one thread accepts, receives, commits and replies
//!       │              └──── session ── protocol       bytes of a client in, replies out: the same for all three
//!       │              └──── batch                     group commit: one durable write of all waiting requests
//!       └─ load                                        closed-loop clients: the same for all three
//! ```

pub mod batch;
pub mod epoll;
pub mod load;
pub mod node_ring;
pub mod protocol;
// The node's own receive buffers, compiled from its source: a copy would be measured instead of the node's.
#[path = "../../../node/src/clients/recv_buffers.rs"]
mod recv_buffers;
pub mod session;
pub mod tokio_ring;
