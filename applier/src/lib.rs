//! The replica's side of a log, and the store that every node reads from.
//!
//! ```text
//! leader's bytes ──> link ──> receiver ──> Log (persisted) ──> replay ──> store ──> view ──> commands
//!                      └────────── ack <──────────┴──────────────┘
//! a leader's own commands ──> pending (not durable yet, over the store)
//! ```
pub mod ack;
mod connect;
pub mod error;
pub mod freshness;
pub mod pending;
pub mod receiver;
pub mod record;
pub mod repair;
pub mod replay;
pub mod replica;
mod rewind;
pub mod snapshot;
pub mod store;
#[cfg(test)]
mod test_replica;
pub mod view;
