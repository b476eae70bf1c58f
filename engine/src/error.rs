//! What recovery and reading of the log can find wrong. Each text names file, offset and LSN, and says what to do.

use std::io;
use std::path::PathBuf;

use crate::frame::FrameError;
use crate::lsn::Lsn;

pub use crate::epoch::EpochError;
pub use crate::log::{AppendError, LogError, LogFailure, ReceiveError};
pub use crate::meta::MetaError;

/// Why the end of the log cannot be found, or a frame not be read.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// A file cannot be read.
    #[error("cannot read {} at offset {offset}: {source}", path.display())]
    Io {
        /// The segment's file.
        path: PathBuf,
        /// Where in it, bytes.
        offset: u64,
        /// What the system said.
        source: io::Error,
    },
    /// Damage in what was already durable.
    #[error(
        "damage in durable log: {} at offset {offset} (LSN {lsn}): {reason}; {evidence}. Nothing was changed. Restore this \
         node from a replica or a copy",
        path.display()
    )]
    Rot {
        /// The segment's file.
        path: PathBuf,
        /// Where in it, bytes.
        offset: u64,
        /// The position in the log.
        lsn: Lsn,
        /// What is wrong with the frame there.
        reason: FrameError,
        /// What proves that the frame was durable.
        evidence: String,
    },
    /// The log ends before what the store already holds.
    #[error(
        "the log in {} ends at {end}, but the store holds everything up to {needed}: segments are missing. Restore them, or \
         this node from a replica",
        dir.display()
    )]
    Missing {
        /// The directory of the segments.
        dir: PathBuf,
        /// Where the log ends.
        end: Lsn,
        /// What is known to have been durable.
        needed: Lsn,
    },
}
