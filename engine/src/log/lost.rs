//! What a truncation is about to cut off, put aside: commits that this node acknowledged as a leader at a level below the sync
//! policy's, and that no later leader has. They are never taken back into a log by themselves; the file is for people.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::{LOG_DIR, Log, LogError};
use crate::frame::{Frame, UnverifiedFrame};
use crate::limits::FRAME_HEADER_BYTES;
use crate::lsn::{Epoch, Lsn};
use crate::mutants;
use crate::prepare::{make_dir, remove_if_there, rename, sync_dir};
use crate::reader::LogReader;

/// The directory in the data directory.
pub const LOST_DIR: &str = "lost";
/// It takes so much; before more is put there, the oldest files go, each with a line in the log. What is being put there is kept
/// whole, whatever its size.
pub const LOST_BYTES_MAX: u64 = 1 << 30;
/// ... and so many files.
pub const LOST_FILES_MAX: usize = 1000;

/// What was put aside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    /// Commits in it.
    pub records: u64,
    /// Where it began.
    pub from: Lsn,
    /// Where it ended.
    pub to: Lsn,
    /// The frames as they stood in the log.
    pub path: PathBuf,
}

/// For people; the file's name goes with it.
impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Lost { records, from, to, .. } = self;
        write!(
            f,
            "lost asynchronous commits: {records}, LSN {from}-{to}: the leader's log does not have them, they are kept in the file"
        )
    }
}

/// What a file in `lost/` is called: the epoch of its last frame, from where to where in the log its frames were, the checksum of
/// the last one.
fn lost_name(epoch: Epoch, (from, to): (Lsn, Lsn), crc: u32) -> String {
    format!("epoch-{epoch}-{:016X}-{:016X}-{crc:08x}.frames", from.0, to.0)
}

/// From where to where in the log the frames of a file in `lost/` were, by its name; `None` for any other file.
pub fn lost_range(name: &str) -> Option<(Lsn, Lsn)> {
    // From its end: the epoch may have a tag, which is set off by the same character.
    let mut parts = name.strip_prefix("epoch-")?.strip_suffix(".frames")?.rsplitn(4, '-');
    let mut number = || u64::from_str_radix(parts.next()?, 16).ok();
    let (_crc, to, from) = (number()?, number()?, number()?);
    parts.next()?.parse::<Epoch>().ok()?;
    Some((Lsn(from), Lsn(to)))
}

/// Makes `lost/` of a data directory if it is not there, and removes its oldest files while they are beyond its bounds.
pub fn make_lost_dir(data: &Path) -> io::Result<PathBuf> {
    let dir = make_dir(data, LOST_DIR)?;
    bound(&dir, LOST_BYTES_MAX, LOST_FILES_MAX)?;
    Ok(dir)
}

/// Removes the oldest files of a directory until what is left is below both bounds.
fn bound(dir: &Path, bytes_max: u64, files_max: usize) -> io::Result<()> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let facts = entry.metadata()?;
        if facts.is_file() {
            files.push((facts.modified()?, entry.path(), facts.len()));
        }
    }
    files.sort();
    let (mut bytes, mut left) = (files.iter().map(|file| file.2).sum::<u64>(), files.len());
    for (_, path, length) in files {
        if bytes < bytes_max && left < files_max {
            break;
        }
        tracing::warn!(
            file = %path.display(), bytes = length,
            "{LOST_DIR}/ has reached its bound of {LOST_FILES_MAX} files and {} MiB: the oldest file with lost commits is removed; move \
             away what is still needed",
            LOST_BYTES_MAX >> 20
        );
        remove_if_there(&path)?;
        (bytes, left) = (bytes - length, left - 1);
    }
    Ok(())
}

/// The name of the file while it is written; one that a crash left is written over.
const PARTIAL_FILE: &str = "partial";

/// The file for lost frames while it is written. It gets its name when it is durable, so that what has a name is whole. The name
/// ends with the checksum of the last frame: an LSN and an epoch may be lost twice, each time with other frames.
struct LostFile {
    dir: PathBuf,
    path: PathBuf,
    file: File,
    records: u64,
    crc: u32,
}

impl LostFile {
    fn make(data: &Path) -> Result<LostFile, LogError> {
        let dir = make_lost_dir(data).map_err(failed("make", &data.join(LOST_DIR)))?;
        let path = dir.join(PARTIAL_FILE);
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(true).mode(0o640).open(&path);
        let file = file.map_err(failed("make", &path))?;
        Ok(LostFile { dir, path, file, records: 0, crc: 0 })
    }

    /// The next frame, padding and all.
    fn put(&mut self, frame: &Frame<'_>) -> Result<(), LogError> {
        let header = frame.header();
        if !header.filler {
            self.records += u64::from(header.record_count);
        }
        self.crc = header.crc;
        let padding = vec![0; header.span_bytes() - frame.wire().len()];
        let written = self.file.write_all(frame.wire()).and_then(|()| self.file.write_all(&padding));
        written.map_err(failed("write", &self.path))
    }

    /// They are the frames from `from` to `to`, and durable.
    fn finish(self, from: Lsn, to: Lsn, epoch: Epoch) -> Result<Lost, LogError> {
        self.file.sync_all().map_err(failed("flush", &self.path))?;
        let path = self.dir.join(lost_name(epoch, (from, to), self.crc));
        if !mutants::is_on("count-without-keeping") {
            rename(&self.path, &path).map_err(failed("rename", &self.path))?;
        }
        sync_dir(&self.dir).map_err(failed("flush", &self.dir))?;
        Ok(Lost { records: self.records, from, to, path })
    }
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> LogError + use<> {
    let path = path.to_owned();
    move |source| LogError::Io { what, path, source }
}

/// As [`Log::put_aside`], for the log of a data directory that nobody has open; all of it is in its segments.
pub fn keep_lost(data: &Path, segment_bytes: u64, from: Lsn, to: Lsn, epoch: Epoch) -> Result<Lost, LogError> {
    let mut file = LostFile::make(data)?;
    let mut reader = LogReader::open(&data.join(LOG_DIR), segment_bytes, from, to)?;
    while let Some(frame) = reader.next_frame()? {
        file.put(&frame)?;
    }
    file.finish(from, to, epoch)
}

impl Log {
    /// Copies the frames from `from` to the end of the log into `lost/`, durably. Nothing may be in flight. The file begins with
    /// the frame at `from`; its name says which epoch and positions it holds.
    pub fn put_aside(&self, from: Lsn, epoch: Epoch) -> Result<Lost, LogError> {
        let to = self.sealed();
        let mut file = LostFile::make(&self.config.dir)?;
        let mut at = from;
        while at < to {
            let span = self.read_span(at)?;
            let frame = UnverifiedFrame::parse(&span, at).and_then(|frame| frame.verify(&span));
            let frame = frame.map_err(|source| LogError::Truncate { to: at, reason: source.to_string() })?;
            file.put(&frame)?;
            at = frame.header().end();
        }
        file.finish(from, to, epoch)
    }

    /// The frame at `at` with its padding.
    fn read_span(&self, at: Lsn) -> Result<Vec<u8>, LogError> {
        if let Some(hot) = self.hot_frame(at) {
            return Ok(hot.span().to_vec());
        }
        let path = self.segment_path(self.segment_of(at));
        let failed = |source| LogError::Io { what: "read", path: path.clone(), source };
        let file = File::open(&path).map_err(failed)?;
        let offset = at.offset(self.config.segment_bytes);
        let mut header = [0; FRAME_HEADER_BYTES];
        file.read_exact_at(&mut header, offset).map_err(failed)?;
        let frame = UnverifiedFrame::parse(&header, at);
        let frame = frame.map_err(|source| LogError::Truncate { to: at, reason: source.to_string() })?;
        let mut span = vec![0; frame.claimed().span_bytes()];
        file.read_exact_at(&mut span, offset).map_err(failed)?;
        Ok(span)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oldest_lost_files_go_first() {
        let dir = tempfile::tempdir().expect("a directory");
        let made = |number: u64| {
            let path = dir.path().join(format!("{}", 9 - number));
            let file = File::create(&path).expect("made");
            file.set_len(10).expect("ten bytes");
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(number);
            file.set_modified(time).expect("a time");
            path
        };
        let paths: Vec<PathBuf> = (0..6).map(made).collect();
        let left = || paths.iter().map(|path| path.exists()).collect::<Vec<_>>();
        bound(dir.path(), 100, 7).expect("looked");
        assert_eq!(left(), [true; 6], "below both bounds");
        bound(dir.path(), 100, 6).expect("removed");
        assert_eq!(left(), [false, true, true, true, true, true], "space for one more");
        bound(dir.path(), 21, 100).expect("removed");
        assert_eq!(left(), [false, false, false, false, true, true]);
    }

    #[test]
    fn name_of_lost_frames_tells_their_range() {
        let range = (Lsn(0x1000), Lsn(0x16_0000_3000));
        for epoch in [Epoch(3), Epoch(3).next_alone(0x9f21_c4aa)] {
            assert_eq!(lost_range(&lost_name(epoch, range, 0xbadcafe)), Some(range), "{epoch}");
        }
        for other in
            ["partial", "epoch-3.frames", "epoch-3-x-y-z.frames", "epoch-1000-2000-0badcafe.frames", "store-3-1.redb"]
        {
            assert_eq!(lost_range(other), None, "{other}");
        }
    }
}
