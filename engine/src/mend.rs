//! Changing segment files by hand, for repair and at a start: what is damaged is kept in `DIR/damaged/` first, then the right bytes
//! are written over it and flushed. The caller holds the directory's lock, or knows that nothing else writes there and that
//! the segments stay under their numbers. Decides nothing: what is right was judged by `repair`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::durable;
use crate::limits::{FRAME_ALIGN_BYTES, SEGMENT_BYTES_MIN};
use crate::log::config::LOG_DIR;
use crate::lsn::{Lsn, SegmentNo};
use crate::prepare::{make_dir, sync_dir};
use crate::segment::list_segments;

/// Damaged bytes are kept here, for people.
pub const DAMAGED_DIR: &str = "damaged";
/// The directory takes so much; what is damaged beyond it is repaired without being kept.
pub const DAMAGED_BYTES_MAX: u64 = 256 << 20;
/// ... and so many files.
pub const DAMAGED_FILES_MAX: usize = 1024;
/// Copied or written at once.
const STEP_BYTES: usize = 1 << 20;

/// The directory of damaged bytes, and how much it still takes.
fn free_space(data: &Path) -> io::Result<(PathBuf, u64)> {
    let dir = make_dir(data, DAMAGED_DIR)?;
    let (mut used, mut files) = (0, 0);
    for entry in fs::read_dir(&dir)? {
        used += entry?.metadata()?.len();
        files += 1;
    }
    let left = if files < DAMAGED_FILES_MAX { DAMAGED_BYTES_MAX.saturating_sub(used) } else { 0 };
    Ok((dir, left))
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
    /// Each with the length that it had. Where all are equally long, as segments of another size are, they are left alone.
    pub fn fill_up(&self) -> io::Result<Vec<(PathBuf, u64)>> {
        let mut found = Vec::new();
        for number in list_segments(&self.data.join(LOG_DIR))? {
            let path = self.path(number);
            let length = fs::metadata(&path)?.len();
            found.push((path, length));
        }
        let is_size = |length: u64| length >= SEGMENT_BYTES_MIN && length.is_multiple_of(FRAME_ALIGN_BYTES as u64);
        let alike = found.windows(2).all(|pair| pair[0].1 == pair[1].1);
        if found.len() > 1 && alike && is_size(found[0].1) {
            return Ok(Vec::new());
        }
        found.retain(|(_, length)| *length < self.segment_bytes);
        for (path, length) in &found {
            self.write_zeros(path, *length)?;
        }
        Ok(found)
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
        let (dir, free) = free_space(&self.data)?;
        if to - from > free {
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

    /// Writes frames of one segment, given without their padding, where they belong, durably.
    pub fn write(&self, frames: &[(Lsn, &[u8])]) -> io::Result<()> {
        let Some((first, _)) = frames.first() else { return Ok(()) };
        let segment = first.segment(self.segment_bytes);
        // Never made anew here: a segment that is gone meanwhile was given up.
        let file = OpenOptions::new().write(true).open(self.path(segment))?;
        for (at, wire) in frames {
            debug_assert!(at.offset(FRAME_ALIGN_BYTES as u64) == 0 && at.segment(self.segment_bytes) == segment);
            // In whole blocks: a part of one would be read first, which a bad sector refuses.
            let mut blocks = wire.to_vec();
            blocks.resize(wire.len().next_multiple_of(FRAME_ALIGN_BYTES), 0);
            file.write_all_at(&blocks, at.offset(self.segment_bytes))?;
        }
        durable::flush(&file)
    }
}

/// Moves a file that is no longer used to `damaged/`, or removes it where there is no space; returns its new path.
pub fn set_aside(data: &Path, path: &Path) -> io::Result<Option<PathBuf>> {
    let (dir, free) = free_space(data)?;
    let name = path.file_name().unwrap_or_default();
    if fs::metadata(path)?.len() > free {
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
    fn short_segment_is_filled_up_whatever_its_length() {
        let segment_bytes = 4 * SEGMENT_BYTES_MIN;
        let lay = |lengths: &[u64]| {
            let data = tempfile::tempdir().expect("a directory");
            fs::create_dir(data.path().join(LOG_DIR)).expect("made");
            let mender = Mender::new(data.path(), segment_bytes);
            for (number, length) in lengths.iter().enumerate() {
                File::create(mender.path(SegmentNo(number as u64)))
                    .and_then(|file| file.set_len(*length))
                    .expect("made");
            }
            let filled = mender.fill_up().expect("looked");
            filled.into_iter().map(|(_, length)| length).collect::<Vec<_>>()
        };
        let whole = segment_bytes;
        for short in [0, 5, 20_000_001, SEGMENT_BYTES_MIN - 1, SEGMENT_BYTES_MIN, 2 * SEGMENT_BYTES_MIN, whole - 4096] {
            assert_eq!(lay(&[whole, short, whole]), [short]);
            assert_eq!(lay(&[short]), [short], "the description of the directory tells the size");
        }
        assert_eq!(lay(&[SEGMENT_BYTES_MIN; 3]), [], "segments of another size");
        assert_eq!(lay(&[whole; 2]), []);
    }

    #[test]
    fn damage_is_kept_before_it_is_overwritten() {
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
        let kept = mender.keep(at, at.advance(8192)).expect("kept").expect("space");
        assert_eq!(fs::read(kept).expect("bytes"), vec![7; 8192]);
        mender.write(&[(at, &[9; 5000])]).expect("written");
        let bytes = fs::read(mender.path(SegmentNo(1))).expect("bytes");
        assert_eq!((&bytes[4096..9096], &bytes[9096..12288]), (&[9; 5000][..], &[0; 3192][..]));
        assert_eq!((bytes[4095], bytes[12288]), (7, 7));
        assert!(mender.write(&[(SegmentNo(5).start(segment_bytes), &[1])]).is_err(), "a segment that is not there");
        // Bounded.
        for number in 1..DAMAGED_FILES_MAX as u64 {
            let at = SegmentNo(1).start(segment_bytes);
            fs::write(data.path().join(DAMAGED_DIR).join(format!("{number}")), b"").expect("made");
            assert_eq!(
                mender.keep(at, at.advance(4096)).expect("looked").is_some(),
                number + 1 < DAMAGED_FILES_MAX as u64
            );
            fs::remove_file(data.path().join(DAMAGED_DIR).join(format!(
                "log-{:016X}-{:016X}.bytes",
                at.0,
                at.0 + 4096
            )))
            .ok();
        }
        assert_eq!(mender.keep(Lsn(0), Lsn(DAMAGED_BYTES_MAX + 1)).expect("looked"), None);
    }
}
