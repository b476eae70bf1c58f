//! The commands: how one is found, and what each may do. Used by `session`.
//!
//! A command that reads gets a view; one that writes gets a view and emits effects, which become one record; a control command
//! gets the session itself. None of them knows what its reply is held for: the session decides by what they did.

pub mod connection;
pub mod error;
pub mod glob;
pub mod keys;
pub mod reading;
pub mod replication;
pub mod server;
pub mod spec;
pub mod stream;
pub mod string;
pub mod table;
pub mod transaction;
pub mod view;
pub mod writer;
pub mod xread;
