//! The durable mark: how far this node's own log was durable when it last looked, and in which epoch it led. `log.rs`
//! writes it, recovery reads it. The frames cannot say this: the flushed LSN in a header is the leader's, so on a
//! replica it proves nothing about the replica's disk, and no frame follows the last one to vouch for it.
//!
//! `raise` only hands the bytes to the page cache: exact after a crash of the process, a few seconds old after a
//! crash of the machine. That is safe, because the mark is a lower bound. What must not be lost (`lead`, `lower`,
//! `close`) is flushed. The layout, little-endian, in one sector so that it is written whole:
//!
//! ```text
//!  0  magic    4   "WFM1"
//!  4  crc      4   CRC32C of the 24 bytes that follow
//!  8  durable  8   the log was durable up to here
//! 16  epoch    8   the newest epoch in the node's history then
//! 24  led      8   the last epoch in which this node led; 0 if it never did
//! ```

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::epoch::EpochHistory;
use crate::log::LogError;
use crate::lsn::{Epoch, Lsn};
use crate::prepare::sync_dir;

/// The mark's file in the data directory.
pub const MARK_FILE: &str = "durable";
/// The mark is raised at most this often: its cost stays out of the way of commits.
pub const RAISE_INTERVAL: Duration = Duration::from_millis(10);

const MAGIC: [u8; 4] = *b"WFM1";
const MARK_BYTES: usize = 32;
const CRC_FROM: usize = 8;

/// What the mark says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    /// The log was durable up to here.
    pub durable: Lsn,
    /// The newest epoch in the node's history then.
    pub epoch: Epoch,
    /// The last epoch in which this node led; 0 if it never did.
    pub led: Epoch,
}

impl Mark {
    /// Reads the mark of a data directory; `None` when there is none, or none that can be trusted.
    pub fn load(dir: &Path) -> Result<Option<Mark>, LogError> {
        let path = dir.join(MARK_FILE);
        match std::fs::read(&path) {
            Ok(bytes) => Ok(Mark::decode(&bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(LogError::Io { what: "read", path, source }),
        }
    }

    /// Up to where the log that `history` describes must be found on this node's disk. A truncation that came after
    /// the mark takes back what it says: it ends the mark's epoch earlier, or knows nothing of it.
    pub fn bound(&self, history: &EpochHistory) -> Lsn {
        let known = self.epoch == Epoch(0) || history.entries().iter().any(|entry| entry.0 == self.epoch);
        if !known {
            return Lsn::ZERO;
        }
        self.durable.min(history.end_of(self.epoch).unwrap_or(Lsn::MAX))
    }

    fn encode(&self) -> [u8; MARK_BYTES] {
        let mut bytes = [0; MARK_BYTES];
        bytes[8..16].copy_from_slice(&self.durable.0.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.epoch.0.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.led.0.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[CRC_FROM..]);
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..8].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Mark> {
        let bytes = bytes.get(..MARK_BYTES)?;
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let crc = u32::from_le_bytes(bytes[4..8].try_into().expect("4 bytes"));
        let whole = bytes[..4] == MAGIC && crc32c::crc32c(&bytes[CRC_FROM..]) == crc;
        whole.then(|| Mark { durable: Lsn(u64_at(8)), epoch: Epoch(u64_at(16)), led: Epoch(u64_at(24)) })
    }
}

/// The mark's file, open while the log is.
#[derive(Debug)]
pub(crate) struct MarkFile {
    path: PathBuf,
    file: File,
    mark: Mark,
    raised: Option<Instant>,
    /// Raising failed once: the mark stays where it is, which is a lower bound still.
    stuck: bool,
}

impl MarkFile {
    /// Opens or makes the file, and sets it to what recovery found and made durable.
    pub(crate) fn open(dir: &Path, durable: Lsn, epoch: Epoch) -> Result<MarkFile, LogError> {
        let path = dir.join(MARK_FILE);
        let led = Mark::load(dir)?.map_or(Epoch(0), |mark| mark.led);
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(false).mode(0o640).open(&path);
        let file = file.map_err(|source| LogError::Io { what: "open", path: path.clone(), source })?;
        let mut opened = MarkFile { path, file, mark: Mark { durable, epoch, led }, raised: None, stuck: false };
        opened.flush()?;
        sync_dir(dir).map_err(|source| LogError::Io { what: "flush", path: dir.to_owned(), source })?;
        Ok(opened)
    }

    /// The log is durable up to `durable`; `epoch` is the newest of its history. Costs a system call now and then.
    pub(crate) fn raise(&mut self, durable: Lsn, epoch: Epoch, now: Instant) {
        let early = self.raised.is_some_and(|at| now.saturating_duration_since(at) < RAISE_INTERVAL);
        if durable <= self.mark.durable || self.stuck || early {
            return;
        }
        self.raised = Some(now);
        self.mark.durable = durable;
        self.mark.epoch = epoch;
        if let Err(error) = self.file.write_all_at(&self.mark.encode(), 0) {
            self.stuck = true;
            tracing::warn!("{} stays behind the log from now on: {error}", self.path.display());
        }
    }

    /// This node leads in `epoch` from now on: what the headers of that epoch call flushed is flushed here.
    pub(crate) fn lead(&mut self, epoch: Epoch) -> Result<(), LogError> {
        self.mark.epoch = self.mark.epoch.max(epoch);
        self.mark.led = epoch;
        self.flush()
    }

    /// The log is cut at `to`; before that happens.
    pub(crate) fn lower(&mut self, to: Lsn, epoch: Epoch) -> Result<(), LogError> {
        self.mark.durable = self.mark.durable.min(to);
        self.mark.epoch = epoch;
        self.flush()
    }

    /// The log is closed, durable up to `durable`.
    pub(crate) fn close(&mut self, durable: Lsn, epoch: Epoch) -> Result<(), LogError> {
        self.mark.durable = self.mark.durable.max(durable);
        self.mark.epoch = epoch;
        self.flush()
    }

    fn flush(&mut self) -> Result<(), LogError> {
        let outcome = self.file.write_all_at(&self.mark.encode(), 0).and_then(|()| self.file.sync_data());
        outcome.map_err(|source| LogError::Io { what: "write", path: self.path.clone(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_read_back_and_a_damaged_one_is_not_believed() {
        let dir = tempfile::tempdir().expect("a directory");
        assert_eq!(Mark::load(dir.path()).expect("readable"), None);
        let mut file = MarkFile::open(dir.path(), Lsn(4096), Epoch(2)).expect("a mark");
        file.lead(Epoch(3)).expect("written");
        let now = Instant::now();
        file.raise(Lsn(8192), Epoch(3), now);
        let mark = Mark { durable: Lsn(8192), epoch: Epoch(3), led: Epoch(3) };
        assert_eq!(Mark::load(dir.path()).expect("readable"), Some(mark));
        file.raise(Lsn(12288), Epoch(3), now);
        assert_eq!(Mark::load(dir.path()).expect("readable"), Some(mark), "not so often");
        file.raise(Lsn(12288), Epoch(3), now + RAISE_INTERVAL);
        file.lower(Lsn(8192), Epoch(4)).expect("written");
        let mark = Mark { epoch: Epoch(4), ..mark };
        assert_eq!(Mark::load(dir.path()).expect("readable"), Some(mark));
        let whole = mark.encode();
        for bit in 0..MARK_BYTES * 8 {
            let mut bytes = whole;
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Mark::decode(&bytes), None, "bit {bit}");
        }
        assert_eq!(Mark::decode(&whole[..MARK_BYTES - 1]), None);
    }

    #[test]
    fn a_truncation_takes_back_what_the_mark_says() {
        let history = |entries: &[(u64, u64)]| {
            let entries: Vec<_> = entries.iter().map(|&(epoch, lsn)| (Epoch(epoch), Lsn(lsn))).collect();
            EpochHistory::from_entries(&entries).expect("ascending")
        };
        let mark = Mark { durable: Lsn(500), epoch: Epoch(2), led: Epoch(0) };
        let cases: [(&[(u64, u64)], u64); 5] = [
            (&[(1, 0), (2, 100)], 500),
            (&[(1, 0), (2, 100), (3, 600)], 500),
            (&[(1, 0), (2, 100), (3, 300)], 300),
            (&[(1, 0), (3, 300)], 0),
            (&[], 0),
        ];
        for (entries, bound) in cases {
            assert_eq!(mark.bound(&history(entries)), Lsn(bound), "{entries:?}");
        }
    }
}
