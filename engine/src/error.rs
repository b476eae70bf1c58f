//! What recovery and reading of the log can find wrong. Each text names file, offset and LSN, and says what to do.

use std::io;
use std::path::PathBuf;

use crate::frame::FrameError;
use crate::lsn::Lsn;

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
        "damage in durable log: {} at offset {offset} (LSN {lsn}): {reason}; {evidence}. Nothing was changed. Another \
         node that holds it repairs it: at the next start with --members, --follow or --repair-from, or by `walferry log repair --from`",
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
        /// What is to be asked for.
        gap: Gap,
    },
    /// A segment is missing that must be there.
    #[error(
        "{} is missing: the log ends at {end}, but everything up to {needed} was durable. Restore the segment from a copy, or let \
         another node repair it: at the next start with --members, --follow or --repair-from, or by `walferry log repair --from`",
        path.display()
    )]
    Missing {
        /// The segment's file.
        path: PathBuf,
        /// Where the log ends without it.
        end: Lsn,
        /// What is known to have been durable.
        needed: Lsn,
        /// What is to be asked for.
        gap: Gap,
    },
    /// Nothing is left of the log before its end, so that no frame can continue it.
    #[error(
        "{} is missing: the log ends at {end}, and cannot go on without the frame before that. Restore the segment from a \
         copy, or this node from a replica",
        path.display()
    )]
    Unlinked {
        /// The file of the segment before the end.
        path: PathBuf,
        /// Where the log ends.
        end: Lsn,
        /// What is to be asked for.
        gap: Gap,
    },
}

impl RecoverError {
    /// What a bad sector at `offset` of `path` is told as.
    pub fn bad_sector(path: PathBuf, offset: u64) -> RecoverError {
        RecoverError::Io { path, offset, source: io::Error::from_raw_os_error(libc::EIO) }
    }

    /// True when the disk has a bad sector there: damage, where it is known what must be there.
    pub fn is_bad_sector(&self) -> bool {
        matches!(self, RecoverError::Io { source, .. } if source.raw_os_error() == Some(libc::EIO))
    }

    /// The part of the log that another node can give back; `None` when the disk itself refuses.
    pub fn gap(&self) -> Option<Gap> {
        match self {
            RecoverError::Io { .. } => None,
            RecoverError::Rot { gap, .. } | RecoverError::Missing { gap, .. } | RecoverError::Unlinked { gap, .. } => {
                Some(*gap)
            }
        }
    }
}

/// A part of the log that is not here, or not whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// It begins here, where a frame begins.
    pub from: Lsn,
    /// The crc of the frame that ends there; `None` when that cannot be read.
    pub previous_crc: Option<u32>,
    /// The log must reach this, unless a whole frame of its own goes on before; `from < needed`.
    pub needed: Lsn,
}
