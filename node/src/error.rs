//! Why a node does not start or why it ended, as the reader of its log or of the command's output sees it. Layers below
//! have errors of their own; this one joins them and adds what to do.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use walferry_engine::prepare::free_bytes;

use crate::config::ConfigError;
use crate::users;

/// Why a node does not start, or why it ended.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The configuration does not fit this machine or this data directory.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// There is no io_uring.
    #[error(transparent)]
    NoRing(#[from] walferry_engine::ring::RingError),
    /// The ring stopped working.
    #[error("io_uring failed: {0}")]
    Ring(std::io::Error),
    /// The log does not open, or its close failed.
    #[error(transparent)]
    Log(#[from] walferry_engine::error::LogError),
    /// The store does not open or failed.
    #[error(transparent)]
    Store(#[from] walferry_applier::store::StoreError),
    /// An address cannot be listened on.
    #[error("cannot listen on {address} (--{}): {source}", key.replace('_', "-"))]
    Listen {
        /// The configuration key.
        key: &'static str,
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The ready file cannot be written.
    #[error("cannot write --ready-file {}: {source}", file.display())]
    ReadyFile {
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Receive buffers cannot be registered.
    #[error("cannot register receive buffers: {0}; raise RLIMIT_MEMLOCK (LimitMEMLOCK= in the unit)")]
    RecvBuffers(std::io::Error),
    /// Descriptors for signals and wakes cannot be made.
    #[error("cannot set up the node's descriptors: {0}")]
    Signals(std::io::Error),
    /// The users' file is not one, or everybody can read it.
    #[error(transparent)]
    Users(#[from] users::UsersError),
    /// The data directory is another's than the flags say, or cannot say whose.
    #[error(transparent)]
    Role(#[from] crate::role::RoleError),
    /// The data directory belongs to another cluster or node.
    #[error("{0}")]
    Refused(String),
    /// The same as `source`, with what to do about it: the data directory's disk is full.
    #[error(
        "{source}. {} has {free} bytes free: make room there and start the node again; its log has everything that was flushed",
        dir.display()
    )]
    FullDisk {
        /// The data directory.
        dir: PathBuf,
        /// What its disk has left for this user.
        free: u64,
        /// What could not be written.
        source: Box<DaemonError>,
    },
}

/// A disk with less than this free is full: the small files of a data directory and a page of its store may not fit.
const FREE_BYTES_MIN: u64 = 1 << 20;

impl DaemonError {
    /// Adds what to do where the disk of `dir` is full and that can be the reason. Asks the disk, not the error: a write that
    /// did not fit is told by many layers, each in its own words.
    pub(crate) fn on_the_disk_of(self, dir: &Path) -> DaemonError {
        let writes = matches!(self, DaemonError::Log(_) | DaemonError::Store(_) | DaemonError::Refused(_));
        match free_bytes(dir) {
            Ok(free) if writes && free < FREE_BYTES_MIN => {
                DaemonError::FullDisk { dir: dir.to_owned(), free, source: Box::new(self) }
            }
            _ => self,
        }
    }
}

/// An error of a lower layer as one that refuses the start or ends the node.
pub(crate) fn refused(error: impl std::fmt::Display) -> DaemonError {
    DaemonError::Refused(error.to_string())
}
