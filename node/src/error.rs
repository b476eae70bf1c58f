//! Why a node does not start or why it ended, as the reader of its log or of the command's output sees it. Layers below
//! have errors of their own; this one joins them and adds what to do.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use walferry_engine::lsn::Lsn;
use walferry_engine::meta::META_FILE;
use walferry_engine::prepare::free_bytes;

use crate::config::ConfigError;
use crate::units::ByteSize;
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
    Log(#[from] walferry_engine::log::LogError),
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
    /// A descriptor for signals, wakes or a listener cannot be made or read.
    #[error("cannot set up the node's descriptors: {0}")]
    Descriptors(std::io::Error),
    /// A thread of the node cannot be started.
    #[error("cannot start the thread {name}: {source}")]
    Thread {
        /// The thread's name.
        name: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// The directory's lock is held by another process, or cannot be taken.
    #[error(transparent)]
    Lock(#[from] walferry_engine::lock::LockError),
    /// The data directory does not fit the configuration, or cannot be created.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// The description of the data directory cannot be read or written.
    #[error(transparent)]
    Meta(#[from] walferry_engine::meta::MetaError),
    /// The disk of the data directory cannot be measured.
    #[error(transparent)]
    Probe(#[from] walferry_engine::probe::ProbeError),
    /// A file of the data directory cannot be opened, mended or watched.
    #[error("cannot {what} {}: {source}", path.display())]
    File {
        /// What was attempted.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The history of epochs cannot be read or written, or an epoch does not continue it.
    #[error(transparent)]
    Epoch(#[from] walferry_engine::epoch::EpochError),
    /// The log cannot be read for its repair.
    #[error(transparent)]
    Recover(#[from] walferry_engine::error::RecoverError),
    /// Damage that no other node gave back.
    #[error(transparent)]
    Repair(#[from] walferry_applier::repair::RepairError),
    /// The store of the data directory is damaged or foreign, and cannot be replaced.
    #[error(transparent)]
    StoreFile(#[from] StoreFileError),
    /// Records of the log cannot be applied.
    #[error(transparent)]
    Replay(#[from] walferry_applier::replay::ReplayError),
    /// The store needs a checkpoint during the replay, for which the disk has no space.
    #[error("{0} and start the node again: memory does not hold what its log has")]
    ReplayLacksSpace(String),
    /// The link of a replica met an error that its node does not survive.
    #[error(transparent)]
    Follow(#[from] walferry_applier::error::ReplicaError),
    /// A received snapshot cannot be put in place.
    #[error(transparent)]
    Snapshot(#[from] walferry_applier::snapshot::SnapshotError),
    /// The leader's side of replication cannot start.
    #[error(transparent)]
    Shipper(#[from] walferry_shipper::shipper::ShipperError),
    /// What an earlier leader handed over cannot be read.
    #[error(transparent)]
    Handover(#[from] walferry_cluster::handover::HandoverError),
    /// The node's name is not one.
    #[error(transparent)]
    Name(#[from] walferry_cluster::member::NameSyntax),
    /// The register of the cluster cannot be opened.
    #[error(transparent)]
    Register(#[from] walferry_cluster::consensus::RegisterError),
    /// The members belong to another cluster than the log.
    #[error(
        "--data {}: its log belongs to cluster {ours}, the members' to {theirs}: name another directory",
        dir.display()
    )]
    OtherCluster {
        /// The data directory.
        dir: PathBuf,
        /// The cluster of the log.
        ours: walferry_cluster::member::ClusterId,
        /// The cluster of the members.
        theirs: walferry_cluster::member::ClusterId,
    },
    /// The cluster's thread ended.
    #[error("this node can take no part in its cluster any more, start it again: {0}")]
    ClusterEnded(String),
    /// The secret that peers prove cannot be read or made.
    #[error(transparent)]
    Secret(#[from] walferry_tls::SecretError),
    /// The log stopped before the node served anybody.
    #[error("{0}")]
    LogStopped(String),
    /// The log or a file of the data directory failed while the node ran.
    #[error("{0}; this process ends: once the disk is sound, start the node again")]
    Failed(String),
    /// A file that a witness has open is no longer in its directory.
    #[error("this process ends: {0}")]
    FileGone(String),
    /// The thread of a witness ended.
    #[error("the witness cannot take part any more; its log tells why")]
    WitnessEnded,
    /// The process may not open as many descriptors as it needs.
    #[error("{0}")]
    DescriptorLimit(String),
    /// The users' file is not one, or everybody can read it.
    #[error(transparent)]
    Users(#[from] users::UsersError),
    /// The data directory is another's than the flags say, or cannot say whose.
    #[error(transparent)]
    Role(#[from] crate::role::RoleError),
    /// The same as `source`, with what to do about it: the data directory's disk is full.
    #[error(
        "{source}. {} has {free} bytes free: free some space there and start the node again; its log has everything that was flushed",
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
    /// did not fit is reported by many layers, each in its own words.
    pub(crate) fn on_the_disk_of(self, dir: &Path) -> DaemonError {
        let writes = !matches!(
            self,
            DaemonError::Config(_)
                | DaemonError::NoRing(_)
                | DaemonError::Ring(_)
                | DaemonError::Listen { .. }
                | DaemonError::ReadyFile { .. }
                | DaemonError::RecvBuffers(_)
                | DaemonError::Descriptors(_)
                | DaemonError::DescriptorLimit(_)
                | DaemonError::Thread { .. }
                | DaemonError::Users(_)
                | DaemonError::Role(_)
        );
        match free_bytes(dir) {
            Ok(free) if writes && free < FREE_BYTES_MIN => {
                DaemonError::FullDisk { dir: dir.to_owned(), free, source: Box::new(self) }
            }
            _ => self,
        }
    }

    /// For `map_err`: an operation on a file of the data directory that failed.
    pub(crate) fn file(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> DaemonError {
        move |source| DaemonError::File { what, path: path.to_owned(), source }
    }
}

/// Why a data directory is refused.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    /// The limit of the process for the size of files is too small.
    #[error(
        "--data {}: no file of this process may be larger than {limit} bytes, and {what} has {bytes}: raise RLIMIT_FSIZE \
         (ulimit -f, LimitFSIZE= in the unit)",
        dir.display()
    )]
    FileSizeLimit {
        /// The directory.
        dir: PathBuf,
        /// The limit.
        limit: u64,
        /// The file that needs more.
        what: &'static str,
        /// The size of that file.
        bytes: u64,
    },
    /// The directory was initialised for a node with another name.
    #[error(
        "--data {} belongs to the node {owner:?}, not to {name:?}: start it with --name {owner}, or name another directory",
        dir.display()
    )]
    OtherNode {
        /// The directory.
        dir: PathBuf,
        /// The name in the directory.
        owner: String,
        /// The configured name.
        name: String,
    },
    /// The segment size is chosen at the initialisation only.
    #[error(
        "--data {} has segments of {here} since its init, and segment_bytes = {given}: the size cannot be changed; leave \
         segment_bytes out or set it to {here}, or begin with an empty directory",
        dir.display()
    )]
    SegmentBytes {
        /// The directory.
        dir: PathBuf,
        /// The size in the directory.
        here: ByteSize,
        /// The configured size.
        given: ByteSize,
    },
    /// A directory above it is missing: perhaps a volume is not mounted.
    #[error(
        "--data {}: there is no {}: mount the volume that belongs there, or make the directory; only the last directory of the \
         path is made by itself",
        dir.display(),
        missing.display()
    )]
    ParentMissing {
        /// The directory.
        dir: PathBuf,
        /// The topmost directory that is missing.
        missing: PathBuf,
    },
    /// The directory is open to others, and its mode cannot be changed.
    #[error(
        "--data {}: others than the node's user and group can look into it or write there, and its mode cannot be changed \
         ({source}): chmod {mode:o} it, or name a directory that this user owns",
        dir.display()
    )]
    Open {
        /// The directory.
        dir: PathBuf,
        /// The mode that it should have.
        mode: u32,
        /// What the system said.
        source: std::io::Error,
    },
    /// The directory cannot be created or read.
    #[error("--data {}: cannot {what}: {source}", dir.display())]
    Io {
        /// The directory.
        dir: PathBuf,
        /// What was attempted.
        what: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// The directory holds files that are not walferry's.
    #[error(
        "--data {}: has no `{META_FILE}` file but holds {found:?}: not a walferry data directory; name an empty or a new one",
        dir.display()
    )]
    Foreign {
        /// The directory.
        dir: PathBuf,
        /// The first such file.
        found: String,
    },
    /// The filesystem refuses O_DIRECT writes.
    #[error(
        "--data {}: its filesystem takes no O_DIRECT writes ({reason}): name a directory on a disk, or give --buffered",
        dir.display()
    )]
    NoDirectIo {
        /// The directory.
        dir: PathBuf,
        /// What the filesystem said.
        reason: String,
    },
    /// No method of making writes durable works in the directory.
    #[error("--data {}: no sync method works there", dir.display())]
    NoSyncMethod {
        /// The directory.
        dir: PathBuf,
    },
}

/// Why the store of a data directory cannot be used and cannot be replaced.
#[derive(Debug, thiserror::Error)]
pub enum StoreFileError {
    /// The file cannot be read; it is not known to be damaged.
    #[error(
        "the store's file {path} cannot be looked at: {reason}. Nothing was changed; `fuser {path}` tells who has it",
        path = path.display()
    )]
    Unreadable {
        /// The store's file.
        path: PathBuf,
        /// What the system or the store said.
        reason: String,
    },
    /// The file is damaged, the log no longer has its beginning, and no other node gave a snapshot.
    #[error(
        "the store's file {} is damaged ({reason}), and the log begins at {start}, which is too late to make it anew: {fetch}",
        path.display()
    )]
    Damaged {
        /// The store's file.
        path: PathBuf,
        /// What is damaged.
        reason: String,
        /// Where the log begins.
        start: Lsn,
        /// Why no snapshot was fetched.
        fetch: String,
    },
}
