//! The durable watermark: how far this node's own log was durable when it last looked, and in which epoch it led. `log.rs`
//! writes it, recovery reads it. The frames cannot say this: the flushed LSN in a header is the leader's, so on a
//! replica it proves nothing about the replica's disk, and no frame follows the last one to confirm it.
//!
//! `raise` only hands the bytes to the page cache: exact after a crash of the process, a few seconds old after a
//! crash of the machine. That is safe, because the watermark is a lower bound. What must not be lost (`lead`, `lower`,
//! `close`) is flushed. It stands twice in the file, in blocks of their own, so that one damaged place does not cost it: without
//! it nobody can tell a torn tail from damage to what was acknowledged. The newer of the whole ones counts. A file in which
//! neither is whole is told apart from no file: recovery then cuts nothing by itself. Little-endian, each in one sector:
//!
//! ```text
//!  0  magic     4   "WFM2"
//!  4  crc       4   CRC32C of the 32 bytes that follow
//!  8  sequence  8   grows with each write
//! 16  durable   8   the log was durable up to here
//! 24  epoch     8   the newest epoch in the node's history then
//! 32  led       8   the last epoch in which this node led; 0 if it never did
//! ```

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::durable;
use crate::epoch::EpochHistory;
use crate::held::HeldFile;
use crate::log::error::LogError;
use crate::lsn::{Epoch, Lsn};
use crate::prepare::sync_dir;
use crate::world;

/// The watermark's file in the data directory.
pub const WATERMARK_FILE: &str = "durable";
/// The watermark is raised at most this often: its cost stays out of the way of commits.
pub const RAISE_INTERVAL: Duration = Duration::from_millis(10);

const MAGIC: [u8; 4] = *b"WFM2";
const WATERMARK_BYTES: usize = 40;
const CRC_FROM: usize = 8;
/// Where the watermark stands in the file.
const PLACES: [u64; 2] = [0, 4096];

/// What is known of the watermark of a data directory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KnownWatermark {
    /// There is no file: the log was never opened, or begins with a snapshot.
    #[default]
    Never,
    /// The file is damaged.
    Damaged,
    /// What it says.
    As(Watermark),
}

/// What the watermark says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Watermark {
    /// The log was durable up to here.
    pub durable: Lsn,
    /// The newest epoch in the node's history then.
    pub epoch: Epoch,
    /// The last epoch in which this node led; 0 if it never did.
    pub led: Epoch,
}

impl Watermark {
    /// Reads the watermark of a data directory.
    pub fn load(dir: &Path) -> Result<KnownWatermark, LogError> {
        let newest = Watermark::read(&dir.join(WATERMARK_FILE))?;
        Ok(newest.map_or(KnownWatermark::Never, |newest| {
            newest.map_or(KnownWatermark::Damaged, |(watermark, _)| KnownWatermark::As(watermark))
        }))
    }

    /// The newest watermark in the file, if any is whole, and its sequence; `None` when there is no file.
    fn read(path: &Path) -> Result<Option<Option<(Watermark, u64)>>, LogError> {
        match std::fs::read(path) {
            Ok(bytes) => Ok(Some(Watermark::newest(&bytes))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(LogError::Io { what: "read", path: path.to_owned(), source }),
        }
    }

    /// The newer of those in a file, and its sequence.
    fn newest(file: &[u8]) -> Option<(Watermark, u64)> {
        let at = |place: u64| Watermark::decode(file.get(place as usize..)?);
        PLACES.into_iter().filter_map(at).max_by_key(|(_, sequence)| *sequence)
    }

    /// Up to where the log that `history` describes must be found on this node's disk. A truncation that came after
    /// the watermark takes back what it says: it ends the watermark's epoch earlier, or knows nothing of it.
    pub fn bound(&self, history: &EpochHistory) -> Lsn {
        let known = self.epoch == Epoch(0) || history.entries().iter().any(|entry| entry.0 == self.epoch);
        if !known {
            return Lsn::ZERO;
        }
        self.durable.min(history.end_of(self.epoch).unwrap_or(Lsn::MAX))
    }

    fn encode(&self, sequence: u64) -> [u8; WATERMARK_BYTES] {
        let mut bytes = [0; WATERMARK_BYTES];
        for (place, value) in [sequence, self.durable.0, self.epoch.0, self.led.0].into_iter().enumerate() {
            bytes[CRC_FROM + place * 8..][..8].copy_from_slice(&value.to_le_bytes());
        }
        let crc = crc32c::crc32c(&bytes[CRC_FROM..]);
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..8].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<(Watermark, u64)> {
        let bytes = bytes.get(..WATERMARK_BYTES)?;
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let crc = u32::from_le_bytes(bytes[4..8].try_into().expect("4 bytes"));
        let whole = bytes[..4] == MAGIC && crc32c::crc32c(&bytes[CRC_FROM..]) == crc;
        let watermark = || Watermark { durable: Lsn(u64_at(16)), epoch: Epoch(u64_at(24)), led: Epoch(u64_at(32)) };
        whole.then(|| (watermark(), u64_at(8)))
    }
}

/// The watermark's file, open while the log is.
#[derive(Debug)]
pub(crate) struct WatermarkFile {
    path: PathBuf,
    file: File,
    watermark: Watermark,
    sequence: u64,
    raised: Option<Instant>,
    /// Raising failed once: the watermark stays where it is, which is a lower bound still.
    stuck: bool,
}

impl WatermarkFile {
    /// Opens or makes the file, and sets it to what recovery found and made durable.
    pub(crate) fn open(dir: &Path, durable: Lsn, epoch: Epoch) -> Result<WatermarkFile, LogError> {
        let path = dir.join(WATERMARK_FILE);
        let newest = Watermark::read(&path)?.flatten();
        let (led, sequence) = newest.map_or((Epoch(0), 0), |(watermark, sequence)| (watermark.led, sequence));
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).mode(0o640).open(&path);
        let file = file.map_err(|source| LogError::Io { what: "open", path: path.clone(), source })?;
        let mut opened = WatermarkFile {
            path,
            file,
            watermark: Watermark { durable, epoch, led },
            sequence,
            raised: None,
            stuck: false,
        };
        opened.flush()?;
        sync_dir(dir).map_err(|source| LogError::Io { what: "flush", path: dir.to_owned(), source })?;
        Ok(opened)
    }

    /// The file, to be looked at.
    pub(crate) fn held(&self) -> io::Result<HeldFile> {
        HeldFile::open(&self.path, &self.file)
    }

    /// The last epoch in which this node led; 0 if it never did.
    pub(crate) fn led(&self) -> Epoch {
        self.watermark.led
    }

    /// The log is durable up to `durable`; `epoch` is the newest of its history. Costs a system call now and then.
    pub(crate) fn raise(&mut self, durable: Lsn, epoch: Epoch, now: Instant) {
        let early = self.raised.is_some_and(|at| now.saturating_duration_since(at) < RAISE_INTERVAL);
        if durable <= self.watermark.durable || self.stuck || early {
            return;
        }
        self.raised = Some(now);
        self.watermark.durable = durable;
        self.watermark.epoch = epoch;
        if let Err(error) = self.write() {
            self.stuck = true;
            tracing::warn!("{} stays behind the log from now on: {error}", self.path.display());
        }
    }

    /// This node leads in `epoch` from now on: what the headers of that epoch call flushed is flushed here.
    pub(crate) fn lead(&mut self, epoch: Epoch) -> Result<(), LogError> {
        self.watermark.epoch = self.watermark.epoch.max(epoch);
        self.watermark.led = epoch;
        self.flush()
    }

    /// The log is cut at `to`; before that happens.
    pub(crate) fn lower(&mut self, to: Lsn, epoch: Epoch) -> Result<(), LogError> {
        self.watermark.durable = self.watermark.durable.min(to);
        self.watermark.epoch = epoch;
        self.flush()
    }

    /// The log is closed, durable up to `durable`.
    pub(crate) fn close(&mut self, durable: Lsn, epoch: Epoch) -> Result<(), LogError> {
        self.watermark.durable = self.watermark.durable.max(durable);
        self.watermark.epoch = epoch;
        self.flush()
    }

    fn write(&mut self) -> io::Result<()> {
        self.sequence += 1;
        let bytes = self.watermark.encode(self.sequence);
        PLACES.into_iter().try_for_each(|place| {
            world::replaces(&self.path, &self.file, place, bytes.len())?;
            self.file.write_all_at(&bytes, place)
        })
    }

    fn flush(&mut self) -> Result<(), LogError> {
        let outcome = self.write().and_then(|()| durable::flush(&self.file));
        outcome.map_err(|source| LogError::Io { what: "write", path: self.path.clone(), source })?;
        world::synced(&self.path);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watermark_is_read_back_and_a_damaged_one_is_not_believed() {
        let dir = tempfile::tempdir().expect("a directory");
        let load = || Watermark::load(dir.path()).expect("readable");
        assert_eq!(load(), KnownWatermark::Never);
        let mut file = WatermarkFile::open(dir.path(), Lsn(4096), Epoch(2)).expect("a watermark");
        file.lead(Epoch(3)).expect("written");
        let now = Instant::now();
        file.raise(Lsn(8192), Epoch(3), now);
        let watermark = Watermark { durable: Lsn(8192), epoch: Epoch(3), led: Epoch(3) };
        assert_eq!(load(), KnownWatermark::As(watermark));
        file.raise(Lsn(12288), Epoch(3), now);
        assert_eq!(load(), KnownWatermark::As(watermark), "not so often");
        file.raise(Lsn(12288), Epoch(3), now + RAISE_INTERVAL);
        file.lower(Lsn(8192), Epoch(4)).expect("written");
        let watermark = Watermark { epoch: Epoch(4), ..watermark };
        assert_eq!(load(), KnownWatermark::As(watermark));
        let whole = watermark.encode(9);
        for bit in 0..WATERMARK_BYTES * 8 {
            let mut bytes = whole;
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Watermark::decode(&bytes), None, "bit {bit}");
        }
        assert_eq!(Watermark::decode(&whole[..WATERMARK_BYTES - 1]), None);
        // One place may be damaged, and the newer one counts; with both gone it is not as if there never was one.
        let path = dir.path().join(WATERMARK_FILE);
        let bytes = std::fs::read(&path).expect("bytes");
        for place in PLACES {
            let mut hurt = bytes.clone();
            hurt[place as usize + 17] ^= 4;
            std::fs::write(&path, hurt).expect("damaged");
            assert_eq!(load(), KnownWatermark::As(watermark));
        }
        std::fs::write(&path, &bytes[..WATERMARK_BYTES]).expect("cut");
        assert_eq!(load(), KnownWatermark::As(watermark));
        for length in [0, WATERMARK_BYTES - 1] {
            std::fs::write(&path, &bytes[..length]).expect("cut");
            assert_eq!(load(), KnownWatermark::Damaged);
        }
    }

    #[test]
    fn a_truncation_takes_back_what_the_watermark_says() {
        let history = |entries: &[(u64, u64)]| {
            let entries: Vec<_> = entries.iter().map(|&(epoch, lsn)| (Epoch(epoch), Lsn(lsn))).collect();
            EpochHistory::from_entries(&entries).expect("ascending")
        };
        let watermark = Watermark { durable: Lsn(500), epoch: Epoch(2), led: Epoch(0) };
        let cases: [(&[(u64, u64)], u64); 5] = [
            (&[(1, 0), (2, 100)], 500),
            (&[(1, 0), (2, 100), (3, 600)], 500),
            (&[(1, 0), (2, 100), (3, 300)], 300),
            (&[(1, 0), (3, 300)], 0),
            (&[], 0),
        ];
        for (entries, bound) in cases {
            assert_eq!(watermark.bound(&history(entries)), Lsn(bound), "{entries:?}");
        }
    }
}
