//! Why a replica cannot go on at all. Its node ends.

use crate::snapshot::SnapshotError;
use crate::store::StoreError;

/// Why following failed for good. The node ends.
#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    /// History or identity cannot be made durable.
    #[error("cannot follow: {0}")]
    Persist(String),
    /// The log cannot be truncated.
    #[error(transparent)]
    Log(#[from] walferry_engine::log::LogError),
    /// The store cannot go back.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A snapshot cannot be put in place.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
}
