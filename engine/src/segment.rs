//! Reading segment files: the bytes of the log at any position, for recovery, replay and inspection. Plain reads, no ring.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::error::RecoverError;
use crate::limits::frame_aligned;
use crate::lsn::{Lsn, SegmentNo};
use crate::world;

/// What is read at once; larger frames are read whole.
const READ_BYTES: usize = 1 << 20;

/// The bytes of a log at any position. Recovery runs over this, so that a test can hand it any bytes.
pub trait LogBytes {
    /// `bytes` bytes from `at` on, or as many as its segment has; empty where there is no segment.
    fn read(&mut self, at: Lsn, bytes: usize) -> Result<&[u8], RecoverError>;
    /// The same; `None` where the disk has a bad sector.
    fn read_good(&mut self, at: Lsn, bytes: usize) -> Result<Option<&[u8]>, RecoverError> {
        match self.read(at, bytes) {
            Ok(read) => Ok(Some(read)),
            Err(error) if error.is_bad_sector() => Ok(None),
            Err(error) => Err(error),
        }
    }
    /// The file and the offset of a position, for messages.
    fn locate(&self, at: Lsn) -> (PathBuf, u64);
    /// The size of a segment.
    fn segment_bytes(&self) -> u64;
    /// The segments that exist, ascending.
    fn segments(&self) -> &[SegmentNo];
}

/// The segments of a directory.
pub struct DirBytes {
    dir: PathBuf,
    segment_bytes: u64,
    segments: Vec<SegmentNo>,
    open: Option<(SegmentNo, File)>,
    chunk: Vec<u8>,
    chunk_at: Lsn,
}

/// The segments in a directory, ascending.
pub fn list_segments(dir: &Path) -> io::Result<Vec<SegmentNo>> {
    let mut segments = Vec::new();
    for entry in fs::read_dir(dir)? {
        segments.extend(entry?.file_name().to_str().and_then(SegmentNo::from_file_name));
    }
    segments.sort_unstable();
    Ok(segments)
}

/// The oldest of the run without a gap that leads up to the newest of these segments, which ascend; 0 for none.
pub fn run_start(segments: &[SegmentNo]) -> SegmentNo {
    let mut start = segments.last().copied().unwrap_or_default();
    for number in segments.iter().rev().skip(1) {
        if number.next() != start {
            break;
        }
        start = *number;
    }
    start
}

impl DirBytes {
    /// The segments of `dir` (the directory of the segment files).
    pub fn open(dir: &Path, segment_bytes: u64) -> Result<DirBytes, RecoverError> {
        let segments =
            list_segments(dir).map_err(|source| RecoverError::Io { path: dir.to_owned(), offset: 0, source })?;
        Ok(DirBytes {
            dir: dir.to_owned(),
            segment_bytes,
            segments,
            open: None,
            chunk: Vec::new(),
            chunk_at: Lsn::ZERO,
        })
    }

    fn file(&mut self, number: SegmentNo) -> io::Result<Option<&File>> {
        if self.open.as_ref().is_none_or(|open| open.0 != number) {
            match File::open(self.dir.join(number.file_name())) {
                Ok(file) => self.open = Some((number, file)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        Ok(self.open.as_ref().map(|open| &open.1))
    }

    fn load(&mut self, at: Lsn, bytes: usize) -> io::Result<()> {
        let (number, offset) = (at.segment(self.segment_bytes), at.offset(self.segment_bytes));
        let length = (frame_aligned(bytes).max(READ_BYTES) as u64).min(self.segment_bytes - offset) as usize;
        let mut chunk = std::mem::take(&mut self.chunk);
        chunk.resize(length, 0);
        let mut filled = 0;
        if let Some(file) = self.file(number)? {
            while filled < length {
                match file.read_at(&mut chunk[filled..], offset + filled as u64) {
                    Ok(0) => break,
                    Ok(read) => filled += read,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    // What was asked for is there; what lies behind it is asked for in its turn.
                    Err(_) if filled >= bytes => break,
                    Err(error) => return Err(error),
                }
            }
        }
        chunk.truncate(filled);
        world::misread(at, &mut chunk);
        self.chunk = chunk;
        self.chunk_at = at;
        Ok(())
    }
}

impl LogBytes for DirBytes {
    fn read(&mut self, at: Lsn, bytes: usize) -> Result<&[u8], RecoverError> {
        let left = (self.segment_bytes - at.offset(self.segment_bytes)) as usize;
        let wanted = bytes.min(left);
        let held = at >= self.chunk_at && at.since(self.chunk_at) as usize + wanted <= self.chunk.len();
        if !held {
            self.load(at, wanted).map_err(|source| {
                let (path, offset) = self.locate(at);
                RecoverError::Io { path, offset, source }
            })?;
        }
        let from = (at.since(self.chunk_at) as usize).min(self.chunk.len());
        let to = (from + wanted).min(self.chunk.len());
        Ok(&self.chunk[from..to])
    }

    fn locate(&self, at: Lsn) -> (PathBuf, u64) {
        (self.dir.join(at.segment(self.segment_bytes).file_name()), at.offset(self.segment_bytes))
    }

    fn segment_bytes(&self) -> u64 {
        self.segment_bytes
    }

    fn segments(&self) -> &[SegmentNo] {
        &self.segments
    }
}
