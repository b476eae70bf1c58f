//! What can go wrong with a log, as its callers tell it apart.

use std::io;
use std::path::PathBuf;

use crate::file_size::Named;
use crate::frame::FrameError;
use crate::lock::LockError;
use crate::lsn::{Epoch, Lsn, SegmentNo};

/// Why a log cannot be opened or truncated.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// Another process has the data directory.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A setting is out of its bounds.
    #[error("{0}")]
    Config(String),
    /// The filesystem does not do O_DIRECT.
    #[error("{dir} is on a filesystem without O_DIRECT ({reason}): use another filesystem, or give --buffered to write through the page cache with fdatasync", dir = dir.display())]
    NoDirectIo {
        /// The directory of the segments.
        dir: PathBuf,
        /// What showed it.
        reason: String,
    },
    /// A file or directory operation failed.
    #[error("cannot {what} {path}: {}", Named(source), path = path.display())]
    Io {
        /// What was attempted.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The disk holds damage in what was already durable, or recovery failed otherwise.
    #[error(transparent)]
    Recover(#[from] crate::error::RecoverError),
    /// A segment has the wrong size: the data directory was made with another segment size.
    #[error("{path} has {bytes} bytes where segments of {expected} bytes are configured", path = path.display())]
    SegmentSize {
        /// The segment's file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The configured size.
        expected: u64,
    },
    /// Writes or sends are in flight, so the log cannot be cut.
    #[error("the log cannot be truncated to {0} while writes or sends are in flight")]
    InFlight(Lsn),
    /// The position to cut at is not one.
    #[error("the log cannot be truncated to {to}: {reason}")]
    Truncate {
        /// Where it should end.
        to: Lsn,
        /// Why it cannot.
        reason: String,
    },
    /// The log was closed before everything in it was durable.
    #[error("the log was closed at {end}, but is durable only up to {flushed}")]
    Unflushed {
        /// The end of the durable prefix.
        flushed: Lsn,
        /// The end of the log.
        end: Lsn,
    },
    /// The log stopped for good.
    #[error("{0}")]
    Stopped(String),
}

/// Why a record was not appended. Nothing of it is in the log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    /// The log buffer is full or the next segment is not ready yet: try again after the next completions.
    #[error("the log cannot take more at the moment")]
    Busy,
    /// The disk is full: no segment can be prepared.
    #[error("{0}")]
    NoSpace(String),
    /// No frame can hold the record.
    #[error("a record of {bytes} bytes is larger than {bytes_max} bytes, the most that a frame of this log holds")]
    TooLarge {
        /// The record's size.
        bytes: usize,
        /// The largest that fits.
        bytes_max: usize,
    },
    /// The log stopped for good.
    #[error("{0}")]
    Stopped(String),
}

/// Why bytes from the leader are not the log's next. The connection that brought them is of no use any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReceiveError {
    /// Not a valid frame, or not the one that follows.
    #[error("what arrived at {lsn} is not the next frame: {source}")]
    Frame {
        /// Where it should have stood.
        lsn: Lsn,
        /// What is wrong with it.
        source: FrameError,
    },
    /// The frame belongs to another epoch than the history has for its position.
    #[error(
        "the frame at {lsn} is of epoch {epoch}, but by the epoch history its position belongs to epoch {expected}"
    )]
    Epoch {
        /// Where it stands.
        lsn: Lsn,
        /// What it says.
        epoch: Epoch,
        /// What it should say.
        expected: Epoch,
    },
    /// The frame runs over the end of its segment: the leader has another segment size.
    #[error("the frame at {lsn} runs beyond segment {}: does the leader use another segment size?", segment.file_name())]
    Boundary {
        /// Where it stands.
        lsn: Lsn,
        /// Its segment here.
        segment: SegmentNo,
    },
    /// The log stopped for good.
    #[error("{0}")]
    Stopped(String),
}

/// The disk failed a write or a flush. The log has stopped for good; what it called durable stays durable.
#[derive(Debug, thiserror::Error)]
#[error("{what} failed on {path} at offset {offset} (LSN {lsn}): {}; the log stops and nothing later is durable", Named(source), path = path.display())]
pub struct LogFailure {
    /// `write` or `fdatasync`.
    pub what: &'static str,
    /// The segment's file.
    pub path: PathBuf,
    /// Where in the file.
    pub offset: u64,
    /// The same place in the log.
    pub lsn: Lsn,
    /// What the system said.
    pub source: io::Error,
}
