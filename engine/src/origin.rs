//! Where a log begins that does not begin at 0: a node that took over a copy of another's store goes on from the LSN of that
//! copy, in the middle of a segment, with the crc that its first frame has to name. Recovery and readers of the log ask for it.
//! It is written once, when the copy is put in place, and means nothing any more once that segment was recycled.
//!
//! ```text
//! DIR/origin   walferry log origin 1
//!              LSN CRC-OF-THE-FRAME-BEFORE
//! ```

use std::io;
use std::path::Path;

use crate::log::error::LogError;
use crate::lsn::Lsn;
use crate::small_file::{self, Found};

/// The file in the data directory.
pub const ORIGIN_FILE: &str = "origin";
const HEADING: &str = "walferry log origin 1";

/// The beginning of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Where the first frame starts.
    pub lsn: Lsn,
    /// The crc of the frame that ended there, which this log never had.
    pub crc: u32,
}

impl Origin {
    /// The origin of a data directory; `None` for a log that began at 0.
    pub fn load(dir: &Path) -> Result<Option<Origin>, LogError> {
        let path = dir.join(ORIGIN_FILE);
        let damaged = || {
            io::Error::new(
                io::ErrorKind::InvalidData,
                "it is damaged, and so is its copy beside it; restore one of them",
            )
        };
        let parsed = match small_file::load(&path) {
            Ok(Found::Text(text)) => Origin::parse(&text).ok_or_else(damaged),
            Ok(Found::Nothing) => return Ok(None),
            Ok(Found::Damaged) => Err(damaged()),
            Err(error) => Err(error),
        };
        parsed.map(Some).map_err(|source| LogError::Io { what: "read", path, source })
    }

    fn parse(text: &str) -> Option<Origin> {
        let line = text.strip_prefix(HEADING)?.strip_prefix('\n')?.strip_suffix('\n')?;
        let (lsn, crc) = line.split_once(' ')?;
        Some(Origin { lsn: lsn.parse().ok()?, crc: u32::from_str_radix(crc, 16).ok()? })
    }

    /// Makes it durable.
    pub fn save(&self, dir: &Path) -> Result<(), LogError> {
        let path = dir.join(ORIGIN_FILE);
        let text = format!("{HEADING}\n{} {:08x}\n", self.lsn, self.crc);
        small_file::save(&path, &text).map_err(|source| LogError::Io { what: "write", path, source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_saved_is_loaded_and_damage_is_named() {
        let dir = tempfile::tempdir().expect("a directory");
        assert_eq!(Origin::load(dir.path()).expect("none"), None);
        let origin = Origin { lsn: Lsn(0x16_0000_3000), crc: 0x00ab_cdef };
        origin.save(dir.path()).expect("saved");
        assert_eq!(Origin::load(dir.path()).expect("loaded"), Some(origin));
        for text in ["", "walferry log origin 1\n16/3000\n", "walferry log origin 2\n16/3000 00abcdef\n"] {
            small_file::save(&dir.path().join(ORIGIN_FILE), text).expect("written");
            let error = Origin::load(dir.path()).expect_err("damaged").to_string();
            assert!(error.contains("origin") && error.contains("damaged"), "{text:?}: {error}");
        }
    }
}
