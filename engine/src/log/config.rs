//! How a log is kept: where, in which segments, and how its writes are made durable.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// The directory of the segments in the data directory.
pub const LOG_DIR: &str = "log";

/// How a write is made durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SyncMethod {
    /// The write itself carries `RWF_DSYNC`.
    Dsync,
    /// The write is followed by a linked `fdatasync`.
    Fdatasync,
}

impl SyncMethod {
    /// The name in config and output.
    pub fn name(self) -> &'static str {
        match self {
            SyncMethod::Dsync => "dsync",
            SyncMethod::Fdatasync => "fdatasync",
        }
    }
}

impl std::fmt::Display for SyncMethod {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// Not the name of a sync method.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a sync method: expected dsync or fdatasync")]
pub struct SyncMethodSyntax(String);

impl FromStr for SyncMethod {
    type Err = SyncMethodSyntax;
    fn from_str(text: &str) -> Result<SyncMethod, SyncMethodSyntax> {
        match text {
            "dsync" => Ok(SyncMethod::Dsync),
            "fdatasync" => Ok(SyncMethod::Fdatasync),
            _ => Err(SyncMethodSyntax(text.to_owned())),
        }
    }
}

/// What a log is opened with.
#[derive(Clone, Debug)]
pub struct LogConfig {
    /// The data directory; the segments are in its `log/`.
    pub dir: PathBuf,
    /// The size of a segment; the same on every node of a cluster.
    pub segment_bytes: u64,
    /// The most writes in flight.
    pub write_depth: usize,
    /// How a write is made durable.
    pub sync_method: SyncMethod,
    /// No O_DIRECT, and always `fdatasync`.
    pub buffered: bool,
    /// How long the first record of a frame may wait for company; zero seals as soon as the disk is free.
    pub commit_delay: Duration,
    /// The size of the log buffer.
    pub log_buffer_bytes: usize,
    /// Log that is kept behind the flushed end in any case, for replicas without a slot.
    pub keep_bytes_min: u64,
}
