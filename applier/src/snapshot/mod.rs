//! The replica's side of a snapshot: what a node does whose place in its leader's log is gone. Used by `replica`, which begins
//! it, and by the node, which puts the copy in place of log and store.
//!
//! ```text
//! fetch (a thread) ──pieces──> incoming ──all verified──> ready marker ──> install ──> log and store open anew
//!
//! DIR/snapshot/incoming.redb    the copy as far as it has come
//! DIR/snapshot/incoming         what it is, and which of its pieces are verified and durable
//! DIR/snapshot/ready            it is whole: from here on the next thing that opens the directory puts it in place
//! ```

pub mod fetch;
pub mod incoming;
pub mod install;

use std::io;
use std::path::{Path, PathBuf};

/// The directory in the data directory, for both sides of snapshots.
pub const SNAPSHOT_DIR: &str = "snapshot";

/// Why a copy cannot be kept or put in place.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// A file or directory operation failed.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was attempted.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The disk is too small.
    #[error("{} needs {needed} bytes for a snapshot and has {free}: free some space, the copy goes on by itself", path.display())]
    NoSpace {
        /// The directory.
        path: PathBuf,
        /// What is missing of the copy, and something to go on with.
        needed: u64,
        /// What the disk has.
        free: u64,
    },
    /// A small file of the engine's failed.
    #[error(transparent)]
    Log(#[from] walferry_engine::log::LogError),
    /// The epoch history cannot be written.
    #[error(transparent)]
    Epochs(#[from] walferry_engine::epoch::EpochError),
    /// The directory's description cannot be read or written.
    #[error(transparent)]
    Meta(#[from] walferry_engine::meta::MetaError),
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SnapshotError + use<> {
    let path = path.to_owned();
    move |source| SnapshotError::Io { what, path, source }
}

/// Removes a file that may not be there.
fn remove(path: &Path) -> Result<(), SnapshotError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

fn sync_dir(path: &Path) -> Result<(), SnapshotError> {
    walferry_engine::prepare::sync_dir(path).map_err(failed("flush", path))
}
