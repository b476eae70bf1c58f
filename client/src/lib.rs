//! A client for a cluster of walferry nodes: it finds the leader and the replicas, follows a change of leader, and keeps what one
//! user reads from going back in time, whichever nodes answer.
//!
//! ```text
//! session (one user: token, commit level, read mode) ─> cluster (who leads, who follows) ─> pool ─> tcp: a connection each
//!      │                                                   │
//!   token, answer (what a node's error asks for)       topology (core: which node to ask next)
//! ```
//!
//! ```no_run
//! use std::time::Duration;
//! use walferry_client::{Cluster, CommitLevel, ReadMode, Route, Session};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // Once in a process; any node of the cluster will do.
//! let cluster = Cluster::connect(&["redis://10.0.1.11:6400", "redis://10.0.1.12:6400"])?;
//!
//! // Once for each user: what it wrote, it reads, from any replica that has it.
//! let mut session = Session::new(&cluster);
//! session.options.commit_level = Some(CommitLevel::RemoteFlush);
//! session.write(&["SET", "package:7", "scanned"])?;
//! let shown = session.read(Route::Replica, &["GET", "package:7"])?;
//! assert_eq!(shown.text().as_deref(), Some("scanned"));
//!
//! // The token fits a cookie. The next request may meet another process and another replica, and reads on from here.
//! let cookie = session.token().expect("something was written");
//! let mut session = Session::resume(&cluster, &cookie)?;
//! session.options.read_mode = ReadMode::AtMost(Duration::from_millis(500));
//! session.read(Route::Replica, &["XRANGE", "events", "-", "+", "COUNT", "10"])?;
//! # Ok(())
//! # }
//! ```
//!
//! # What a session promises
//!
//! - A read shows everything that the session wrote and was told of, and everything that it read before: its reads never go back,
//!   across replicas, a change of leader, and the processes that its token travels through. When a failover lost what the session
//!   has seen (that takes a commit level below `remote_flush`), the next call is [`Error::Lost`], not an older answer.
//! - A write that was refused was not done. A write of which nobody knows is [`Error::Uncertain`], and is sent again only by
//!   [`Session::write_idempotent`].
//! - Nothing waits without end: every call gives up after [`Options::give_up_after`], and the error says what the nodes said.
//!
//! [`Cluster::with_pool`] takes any other [`Pool`] of RESP connections; `examples/redis_rs.rs` has that of the `redis` crate with r2d2.

mod answer;
mod backoff;
mod cluster;
mod credentials;
mod error;
mod pool;
mod reply;
mod session;
mod tcp;
mod token;
mod topology;
mod url;

pub use answer::{Refused, refusal};
pub use cluster::Cluster;
pub use credentials::Credentials;
pub use error::Error;
pub use pool::{Connection, Pool, PooledClient, TcpPool};
pub use reply::Reply;
pub use session::{CommitLevel, Options, ReadMode, Route, Session};
pub use tcp::{Client, ClientError, encode_command};
pub use token::Token;
pub use url::Url;
