//! The file of a snapshot on the leader: sealed once it is written, with the checksum of each piece, and found again by a leader
//! that was restarted, so that a replica goes on where it was. Knows neither the store that wrote it nor any socket.
//!
//! ```text
//! DIR/snapshot/making.redb   being written
//! DIR/snapshot/offer.redb    whole
//! DIR/snapshot/offer         walferry snapshot offer 1
//!                        snapshot LSN / crc HEX / bytes N
//!                        pieces HEX HEX ...    CRC32C of each piece
//!                        crc HEX               CRC32C of all lines before
//! ```

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use walferry_cluster::snapshot::{PIECE_BYTES, piece_bytes, pieces};
use walferry_engine::lsn::Lsn;
use walferry_engine::prepare::{make_dir, sync_dir};
use walferry_engine::small_file::{self, replace_file};

/// The directory in the data directory, for both sides of snapshots.
pub const SNAPSHOT_DIR: &str = "snapshot";
const MAKING_FILE: &str = "making.redb";
const OFFER_FILE: &str = "offer.redb";
const FACTS_FILE: &str = "offer";
const HEADING: &str = "walferry snapshot offer 1";

/// A whole copy.
#[derive(Debug)]
pub struct SnapshotFile {
    /// It holds everything before this.
    pub snapshot: Lsn,
    /// Of the frame that ends there.
    pub crc: u32,
    /// Its length.
    pub bytes: u64,
    crcs: Vec<u32>,
    file: File,
}

/// Where a copy is to be written; makes the directory.
pub fn making_path(data: &Path) -> io::Result<PathBuf> {
    Ok(make_dir(data, SNAPSHOT_DIR)?.join(MAKING_FILE))
}

/// Removes what leaders left: of copies that were not finished, and (`all`) of those that were.
pub fn clear(data: &Path, all: bool) -> io::Result<()> {
    let names: &[&str] = if all { &[MAKING_FILE, FACTS_FILE, OFFER_FILE] } else { &[MAKING_FILE] };
    for name in names {
        match fs::remove_file(data.join(SNAPSHOT_DIR).join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

impl SnapshotFile {
    /// Takes what was written to `making_path`: reads it once for the checksums and puts it in the place of the copy before.
    /// `read` is told the bytes of each piece, and may wait; false gives up.
    pub fn seal(data: &Path, snapshot: Lsn, crc: u32, mut read: impl FnMut(usize) -> bool) -> io::Result<SnapshotFile> {
        let dir = data.join(SNAPSHOT_DIR);
        let (making, offer, facts) = (dir.join(MAKING_FILE), dir.join(OFFER_FILE), dir.join(FACTS_FILE));
        let file = File::open(&making)?;
        file.sync_all()?;
        let bytes = file.metadata()?.len();
        let mut crcs = Vec::with_capacity(pieces(bytes) as usize);
        let mut piece = vec![0; PIECE_BYTES];
        let mut at = 0;
        while at < bytes {
            let piece = &mut piece[..piece_bytes(at, bytes)];
            file.read_exact_at(piece, at)?;
            crcs.push(crc32c::crc32c(piece));
            at += piece.len() as u64;
            if !read(piece.len()) {
                return Err(io::ErrorKind::Interrupted.into());
            }
        }
        // The facts of one copy must never stand beside another.
        clear_facts(&facts)?;
        fs::rename(&making, &offer)?;
        let sealed = SnapshotFile { snapshot, crc, bytes, crcs, file };
        replace_file(&facts, small_file::seal(&sealed.encode()).as_bytes())?;
        Ok(sealed)
    }

    /// The copy that an earlier run of this leader made, if there is one.
    pub fn find(data: &Path) -> io::Result<Option<SnapshotFile>> {
        let dir = data.join(SNAPSHOT_DIR);
        let facts = match fs::read(dir.join(FACTS_FILE)) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let Some((snapshot, crc, bytes, crcs)) = small_file::unseal(&facts).and_then(decode) else { return Ok(None) };
        let file = File::open(dir.join(OFFER_FILE))?;
        let whole = file.metadata()?.len() == bytes;
        Ok(whole.then_some(SnapshotFile { snapshot, crc, bytes, crcs, file }))
    }

    /// The checksum of the piece that begins at `offset`.
    pub fn piece_crc(&self, offset: u64) -> u32 {
        self.crcs[(offset / PIECE_BYTES as u64) as usize]
    }

    /// The descriptor that `sendfile` reads from.
    pub fn fd(&self) -> i32 {
        self.file.as_raw_fd()
    }

    fn encode(&self) -> String {
        let mut text =
            format!("{HEADING}\nsnapshot {}\ncrc {:08x}\nbytes {}\npieces", self.snapshot, self.crc, self.bytes);
        for crc in &self.crcs {
            write!(text, " {crc:08x}").expect("writing to memory");
        }
        text.push('\n');
        text
    }
}

fn clear_facts(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    sync_dir(path.parent().unwrap_or(Path::new(".")))
}

fn decode(text: &str) -> Option<(Lsn, u32, u64, Vec<u32>)> {
    let hex = |digits: &str| u32::from_str_radix(digits, 16).ok();
    let mut lines = text.strip_suffix('\n')?.lines();
    if lines.next()? != HEADING {
        return None;
    }
    let mut value = |key: &str| lines.next()?.strip_prefix(key)?.strip_prefix(' ');
    let (snapshot, crc, bytes) = (value("snapshot")?.parse().ok()?, hex(value("crc")?)?, value("bytes")?.parse().ok()?);
    let crcs = value("pieces")?.split(' ').map(hex).collect::<Option<Vec<u32>>>()?;
    (bytes > 0 && crcs.len() as u64 == pieces(bytes)).then_some((snapshot, crc, bytes, crcs))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sealed_copy_is_found_again_and_half_a_one_is_not() {
        let data = tempfile::tempdir().expect("a directory");
        assert!(SnapshotFile::find(data.path()).expect("none").is_none());
        let content: Vec<u8> = (0..2 * PIECE_BYTES + 9).map(|at| (at >> 3) as u8).collect();
        let path = making_path(data.path()).expect("a directory");
        fs::write(&path, &content).expect("written");
        assert!(SnapshotFile::find(data.path()).expect("none").is_none(), "it is not sealed");
        let stopped = SnapshotFile::seal(data.path(), Lsn(8192), 7, |_| false).expect_err("given up");
        assert_eq!(stopped.kind(), io::ErrorKind::Interrupted);
        let sealed = SnapshotFile::seal(data.path(), Lsn(8192), 7, |_| true).expect("sealed");
        let found = SnapshotFile::find(data.path()).expect("read").expect("there");
        for copy in [&sealed, &found] {
            assert_eq!((copy.snapshot, copy.crc, copy.bytes), (Lsn(8192), 7, content.len() as u64));
            assert_eq!(copy.piece_crc(2 * PIECE_BYTES as u64), crc32c::crc32c(&content[2 * PIECE_BYTES..]));
        }
        fs::write(data.path().join("snapshot/offer.redb"), &content[1..]).expect("another length");
        assert!(SnapshotFile::find(data.path()).expect("read").is_none());
        clear(data.path(), true).expect("cleared");
        assert!(SnapshotFile::find(data.path()).expect("none").is_none());
    }
}
