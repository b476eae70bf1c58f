//! Changing segment files by hand, for repair and at a start: what is damaged is kept in `DIR/damaged/` first, then the right bytes
//! are written over it and flushed. The caller holds the directory's lock, or knows that nothing else writes there and that
//! the segments stay under their numbers. Decides nothing: what is right was judged by `repair`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::durable;
use crate::limits::{FRAME_ALIGN_BYTES, SEGMENT_BYTES_MIN};
use crate::log::LOG_DIR;
use crate::lsn::{Lsn, SegmentNo};
use crate::prepare::sync_dir;
use crate::segment::list_segments;

/// Damaged bytes are kept here, for people.
pub const DAMAGED_DIR: &str = "damaged";
/// The directory takes so much; what is damaged beyond it is repaired without being kept.
pub const DAMAGED_BYTES_MAX: u64 = 256 << 20;
/// Copied or written at once.
const STEP_BYTES: usize = 1 << 20;

/// The directory of damaged bytes, and how much it still takes.
fn room(data: &Path) -> io::Result<(PathBuf, u64)> {
    let dir = data.join(DAMAGED_DIR);
    match fs::create_dir(&dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => sync_dir(data)?,
    }
    let mut used = 0;
    for entry in fs::read_dir(&dir)? {
        used += entry?.metadata()?.len();
    }
    Ok((dir, DAMAGED_BYTES_MAX.saturating_sub(used)))
}

/// The log of a data directory, to be mended.
#[derive(Clone, Debug)]
pub struct Mender {
    data: PathBuf,
    segment_bytes: u64,
}

impl Mender {
    /// For the segments of `data`.
    pub fn new(data: &Path, segment_bytes: u64) -> Mender {
        Mender { data: data.to_owned(), segment_bytes }
    }

    /// The file of the segment.
    pub fn path(&self, number: SegmentNo) -> PathBuf {
        self.data.join(LOG_DIR).join(number.file_name())
    }

    /// Segments that are shorter than they have to be are filled up with zeros: what they lost is then judged as any damage is.
    /// Each with the length that it had. One that is as long as a segment of another size could be is left alone: it may be one.
    pub fn fill_up(&self) -> io::Result<Vec<(PathBuf, u64)>> {
        let mut filled = Vec::new();
        for number in list_segments(&self.data.join(LOG_DIR))? {
            let path = self.path(number);
            let length = fs::metadata(&path)?.len();
            let other_size = length >= SEGMENT_BYTES_MIN && length.is_multiple_of(FRAME_ALIGN_BYTES as u64);
            if length < self.segment_bytes && !other_size {
                self.write_zeros(&path, length)?;
                filled.push((path, length));
            }
        }
        Ok(filled)
    }

    /// Makes the segment, of zeros, if its file is gone.
    pub fn restore_segment(&self, number: SegmentNo) -> io::Result<()> {
        let path = self.path(number);
        if !path.exists() {
            // Under its name at once: a crash leaves a segment that is too short, which is filled up.
            self.write_zeros(&path, 0)?;
            sync_dir(&self.data.join(LOG_DIR))?;
        }
        Ok(())
    }

    fn write_zeros(&self, path: &Path, from: u64) -> io::Result<()> {
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o640).open(path)?;
        let zeros = vec![0; STEP_BYTES];
        let mut at = from;
        while at < self.segment_bytes {
            let step = (self.segment_bytes - at).min(STEP_BYTES as u64) as usize;
            file.write_all_at(&zeros[..step], at)?;
            at += step as u64;
        }
        file.sync_all()
    }

    /// Zeros over `from..to` of one segment, where there was padding, durably.
    pub fn clear(&self, from: Lsn, to: Lsn) -> io::Result<()> {
        debug_assert!(to - from <= FRAME_ALIGN_BYTES as u64);
        let file = OpenOptions::new().write(true).open(self.path(from.segment(self.segment_bytes)))?;
        file.write_all_at(&[0; FRAME_ALIGN_BYTES][..(to - from) as usize], from.offset(self.segment_bytes))?;
        file.sync_data()
    }

    /// Puts aside what stands at `from..to` of one segment; the file, or `None` when the directory is full.
    pub fn keep(&self, from: Lsn, to: Lsn) -> io::Result<Option<PathBuf>> {
        let (dir, room) = room(&self.data)?;
        if to - from > room {
            return Ok(None);
        }
        let kept = dir.join(format!("log-{:016X}-{:016X}.bytes", from.0, to.0));
        let source = File::open(self.path(from.segment(self.segment_bytes)))?;
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o640).open(&kept)?;
        let mut bytes = vec![0; STEP_BYTES];
        let mut at = from;
        while at < to {
            let step = (to - at).min(STEP_BYTES as u64) as usize;
            match source.read_exact_at(&mut bytes[..step], at.offset(self.segment_bytes)) {
                Ok(()) => file.write_all(&bytes[..step])?,
                // A place that the disk cannot read any more has no bytes to be kept.
                Err(error) if error.raw_os_error() == Some(libc::EIO) => break,
                Err(error) => return Err(error),
            }
            at = at.advance(step as u64);
        }
        file.sync_all()?;
        sync_dir(&dir)?;
        Ok(Some(kept))
    }

    /// Writes a frame, given without its padding, where it belongs, durably.
    pub fn write(&self, at: Lsn, wire: &[u8]) -> io::Result<()> {
        debug_assert!(at.offset(FRAME_ALIGN_BYTES as u64) == 0);
        // Never made anew here: a segment that is gone meanwhile was given up.
        let file = OpenOptions::new().write(true).open(self.path(at.segment(self.segment_bytes)))?;
        // In whole blocks: a part of one would be read first, which a bad sector refuses.
        let mut blocks = wire.to_vec();
        blocks.resize(wire.len().next_multiple_of(FRAME_ALIGN_BYTES), 0);
        file.write_all_at(&blocks, at.offset(self.segment_bytes))?;
        durable::flush(&file)
    }
}

/// Puts a whole file that is of no use any more aside, or removes it where there is no room; where it is kept now.
pub fn set_aside(data: &Path, path: &Path) -> io::Result<Option<PathBuf>> {
    let (dir, room) = room(data)?;
    let name = path.file_name().unwrap_or_default();
    if fs::metadata(path)?.len() > room {
        fs::remove_file(path)?;
        return Ok(None);
    }
    let kept = dir.join(name);
    fs::rename(path, &kept)?;
    sync_dir(&dir)?;
    if let Some(parent) = path.parent() {
        sync_dir(parent)?;
    }
    Ok(Some(kept))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damage_is_kept_before_it_is_written_over_and_short_segments_are_filled_up() {
        let data = tempfile::tempdir().expect("a directory");
        let log = data.path().join(LOG_DIR);
        fs::create_dir(&log).expect("made");
        let segment_bytes = 64 << 10;
        let mender = Mender::new(data.path(), segment_bytes);
        fs::write(mender.path(SegmentNo(1)), vec![7; 20_000]).expect("a short segment");
        assert_eq!(mender.fill_up().expect("filled"), [(mender.path(SegmentNo(1)), 20_000)]);
        assert_eq!(mender.fill_up().expect("nothing"), []);
        mender.restore_segment(SegmentNo(0)).expect("made");
        assert_eq!(fs::read(mender.path(SegmentNo(0))).expect("zeros"), vec![0; segment_bytes as usize]);
        let at = SegmentNo(1).start(segment_bytes).advance(4096);
        let kept = mender.keep(at, at.advance(8192)).expect("kept").expect("room");
        assert_eq!(fs::read(kept).expect("bytes"), vec![7; 8192]);
        mender.write(at, &[9; 5000]).expect("written");
        let bytes = fs::read(mender.path(SegmentNo(1))).expect("bytes");
        assert_eq!((&bytes[4096..9096], &bytes[9096..12288]), (&[9; 5000][..], &[0; 3192][..]));
        assert_eq!((bytes[4095], bytes[12288]), (7, 7));
        assert!(mender.write(SegmentNo(5).start(segment_bytes), &[1]).is_err(), "a segment that is not there");
        // Bounded.
        assert_eq!(mender.keep(Lsn(0), Lsn(DAMAGED_BYTES_MAX + 1)).expect("looked"), None);
    }
}
