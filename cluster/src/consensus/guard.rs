//! Whether the register's database is what this member last wrote: it holds a promise and a vote, and an older state of it would
//! break both. Every page is looked at once, in a second copy so that nothing is changed; and how many durable writes there were
//! stands in a small file of its own, twice, because a database that falls back to an older state of itself is whole in its own
//! eyes. Beside the number stands which file the database was. A copy of the directory that somebody restores is another file, and
//! older than what this member has promised and confirmed since. Used by `store`, before it opens the database and after each
//! durable write.
//!
//! ```text
//! DIR/cluster.writes    twice, in blocks of their own: "WFW2", CRC32C of what follows 4, number 8,
//!                       of cluster.redb: inode 8, nanoseconds since the Unix epoch when it was made 8 (0: the filesystem does not say)
//! ```
//!
//! The number is written after the database, and the write is told to nobody before both: the database may be ahead by what
//! nobody was told, never behind.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use redb::Database;
use walferry_engine::{durable, panics};

pub(super) const WRITES_FILE: &str = "cluster.writes";
/// The copy that is looked at.
const TRIAL_FILE: &str = "cluster.trial";
/// A register is a few kilobytes; a database beyond this is not one.
const DATABASE_BYTES_MAX: u64 = 256 << 20;
const MAGIC: [u8; 4] = *b"WFW2";
const WRITTEN_BYTES: usize = 32;
const PLACES: [u64; 2] = [0, 4096];

/// Which file the database is: a copy of it is another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileId {
    inode: u64,
    made_ns: u64,
}

impl FileId {
    pub(super) fn of(path: &Path) -> io::Result<FileId> {
        let facts = fs::metadata(path)?;
        let made = facts.created().ok().and_then(|made| made.duration_since(UNIX_EPOCH).ok());
        Ok(FileId { inode: facts.ino(), made_ns: made.map_or(0, |made| made.as_nanos() as u64) })
    }
}

/// What the file of the writes says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Written {
    /// The number of durable writes.
    pub(super) number: u64,
    /// The database that they went to.
    pub(super) to: FileId,
}

/// The number of durable writes, in its file.
#[derive(Debug)]
pub(super) struct Writes {
    file: File,
}

fn decode(bytes: &[u8]) -> Option<Written> {
    let bytes = bytes.get(..WRITTEN_BYTES)?;
    let crc = u32::from_le_bytes(bytes[4..8].try_into().expect("4 bytes"));
    let whole = bytes[..4] == MAGIC && crc32c::crc32c(&bytes[8..]) == crc;
    let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    whole.then(|| Written { number: u64_at(8), to: FileId { inode: u64_at(16), made_ns: u64_at(24) } })
}

impl Writes {
    /// The file of a data directory and what it says; `None` when it is not there, or damaged in both places.
    pub(super) fn open(dir: &Path) -> io::Result<(Writes, Option<Written>)> {
        let path = dir.join(WRITES_FILE);
        let found = match fs::read(&path) {
            Ok(bytes) => {
                let places = PLACES.into_iter().filter_map(|place| decode(bytes.get(place as usize..)?));
                places.max_by_key(|written| written.number)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(false).mode(0o640).open(&path)?;
        Ok((Writes { file }, found))
    }

    /// Makes it durable.
    pub(super) fn save(&self, Written { number, to }: Written) -> io::Result<()> {
        let mut bytes = [0; WRITTEN_BYTES];
        for (place, value) in [number, to.inode, to.made_ns].into_iter().enumerate() {
            bytes[8 + place * 8..][..8].copy_from_slice(&value.to_le_bytes());
        }
        let crc = crc32c::crc32c(&bytes[8..]);
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..8].copy_from_slice(&crc.to_le_bytes());
        PLACES.into_iter().try_for_each(|place| self.file.write_all_at(&bytes, place))?;
        durable::flush(&self.file)
    }
}

/// Looks at every page of the database at `path`, if there is one; what is wrong with it.
pub(super) fn examine(path: &Path) -> io::Result<Result<(), String>> {
    let bytes = match fs::metadata(path) {
        Ok(facts) => facts.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Ok(())),
        Err(error) => return Err(error),
    };
    if bytes == 0 {
        // Made and never written to; or cut short, which the number of writes tells.
        return Ok(Ok(()));
    }
    if bytes > DATABASE_BYTES_MAX {
        return Ok(Err(format!("it has {bytes} bytes, which no register has")));
    }
    let trial: PathBuf = path.with_file_name(TRIAL_FILE);
    fs::copy(path, &trial)?;
    let looked = panics::caught(|| -> Result<bool, redb::DatabaseError> {
        let mut database = Database::open(&trial)?;
        database.check_integrity()
    });
    fs::remove_file(&trial)?;
    Ok(match looked {
        Ok(Ok(true)) => Ok(()),
        Ok(Ok(false)) => Err("a page is not what its checksum says".to_owned()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(text) => Err(format!("its pages make no sense ({text})")),
    })
}
