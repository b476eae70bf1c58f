//! The small files of a data directory that nothing can rebuild: each ends with a checksum and is kept twice, as FILE and
//! FILE.copy, so that one damaged place on the disk costs neither. Used by `meta`, `epoch`, `origin` and the shipper's slots.
//!
//! Written: the copy first, then the file, each a new file, flushed and renamed into its place. Read: the file if it is whole,
//! else the copy. Whoever holds the directory's lock mends at its start what is damaged or differs, from what is believed; so
//! the copy is older than the file at no time.
//!
//! ```text
//! lines of text
//! crc HEX         CRC32C of all bytes before this line
//! ```

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::durable::believe_flush_of;
use crate::mutants;
use crate::prepare::{remove_if_there, rename, sync_dir};
use crate::world::{self, Saving};

const CRC_WORD: &str = "crc ";
const COPY_SUFFIX: &str = ".copy";
/// A larger file is not one of these: an epoch history of EPOCHS_MAX lines fits.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// What the reading of a file gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// There is neither the file nor its copy.
    Nothing,
    /// The text before the checksum.
    Text(String),
    /// Something is there, and neither the file nor its copy is whole.
    Damaged,
}

/// Where the second copy of `path` is.
pub fn copy_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(COPY_SUFFIX);
    PathBuf::from(name)
}

/// The text with its checksum; lines, each ended.
pub fn seal(text: &str) -> String {
    format!("{text}{CRC_WORD}{:08x}\n", crc32c::crc32c(text.as_bytes()))
}

/// The text before the checksum; `None` unless that is right.
pub fn unseal(bytes: &[u8]) -> Option<&str> {
    let whole = std::str::from_utf8(bytes).ok()?;
    let last = whole.strip_suffix('\n')?.rfind('\n').map_or(0, |at| at + 1);
    let (text, line) = whole.split_at(last);
    let expected = format!("{CRC_WORD}{:08x}\n", crc32c::crc32c(text.as_bytes()));
    (line == expected).then_some(text)
}

/// Makes `text` durable at `path`, and its copy.
pub fn save(path: &Path, text: &str) -> io::Result<()> {
    let whole = seal(text);
    replace_file(&copy_of(path), whole.as_bytes())?;
    replace_file(path, whole.as_bytes())
}

/// Removes both, if they are there.
pub fn remove(path: &Path) -> io::Result<()> {
    remove_if_there(path)?;
    remove_if_there(&copy_of(path))
}

/// Reads; changes nothing, so that it can be done beside a running node.
pub fn load(path: &Path) -> io::Result<Found> {
    let (file, copy) = (read(path)?, read(&copy_of(path))?);
    Ok(match (file, copy) {
        (Found::Text(text), _) | (_, Found::Text(text)) => Found::Text(text),
        (Found::Nothing, Found::Nothing) => Found::Nothing,
        _ => Found::Damaged,
    })
}

/// Writes anew whichever of the two is damaged, missing or older; the caller holds the directory's lock.
pub fn mend(path: &Path) -> io::Result<()> {
    let (file, copy) = (read(path)?, read(&copy_of(path))?);
    match (&file, &copy) {
        (Found::Text(_), _) if file == copy => Ok(()),
        (Found::Text(text), other) => {
            if *other == Found::Damaged {
                tracing::warn!(file = %copy_of(path).display(), "damaged, and written anew: the file beside it is whole");
            }
            save(path, text)
        }
        (_, Found::Text(text)) => {
            tracing::warn!(file = %path.display(), "damaged or missing, and restored from the copy beside it");
            save(path, text)
        }
        _ => Ok(()),
    }
}

fn read(path: &Path) -> io::Result<Found> {
    let bytes = match fs::metadata(path) {
        Ok(facts) if facts.len() > FILE_BYTES_MAX => return Ok(Found::Damaged),
        Ok(_) => fs::read(path)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
        Err(error) => return Err(error),
    };
    Ok(unseal(&bytes).map_or(Found::Damaged, |text| Found::Text(text.to_owned())))
}

/// Puts `bytes` where `path` is, so that after a crash the file holds either the old or the new bytes, whole.
pub fn replace_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    world::saves(path, Saving::Begins)?;
    let partial = path.with_extension("partial");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(&partial)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    rename(&partial, path)?;
    world::saves(path, Saving::Named)?;
    if !mutants::is_on("rename-without-directory-sync") {
        sync_dir(path.parent().unwrap_or(Path::new(".")))?;
    }
    believe_flush_of(path)?;
    world::saves(path, Saving::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_file_of_the_two_is_restored_from_the_other() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("facts");
        assert_eq!(load(&path).expect("read"), Found::Nothing);
        save(&path, "a = 1\nb = 2\n").expect("saved");
        let text = Found::Text("a = 1\nb = 2\n".to_owned());
        let whole = fs::read(&path).expect("bytes");
        for victim in [path.clone(), copy_of(&path)] {
            for bit in 0..whole.len() * 8 {
                let mut bytes = whole.clone();
                bytes[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(unseal(&bytes), None, "bit {bit}");
            }
            for length in 0..whole.len() {
                fs::write(&victim, &whole[..length]).expect("cut");
                assert_eq!(load(&path).expect("read"), text, "{} cut to {length}", victim.display());
                mend(&path).expect("mended");
                assert_eq!(fs::read(&victim).expect("bytes"), whole, "mended");
            }
            fs::remove_file(&victim).expect("removed");
            assert_eq!(load(&path).expect("read"), text);
            mend(&path).expect("mended");
            assert_eq!(fs::read(&victim).expect("bytes"), whole);
        }
        fs::write(&path, "x").expect("damaged");
        fs::write(copy_of(&path), "y").expect("damaged");
        mend(&path).expect("nothing to mend with");
        assert_eq!(load(&path).expect("read"), Found::Damaged);
    }
}
