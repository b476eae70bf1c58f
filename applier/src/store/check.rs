//! Whether the store's file is whole. Its database keeps a checksum of every page and looks at them only when it is asked: a page
//! that rotted would be read as if nothing were wrong with it. So a node asks once, before it opens the store, which reads the
//! whole file. A damaged store is no loss: the log or a snapshot makes it anew.

use std::io;
use std::path::Path;

use redb::{Database, ReadableDatabase};

use super::file::{FACTS, Position, STORE_FILE};
use walferry_engine::panics;

/// What a look at the file gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// The store has no file yet.
    Absent,
    /// Every page of it is what was written; it holds the log up to here.
    Verified(Position),
    /// It is not to be read; why.
    Damaged(String),
}

/// Reads the file of the store in `dir`. An error says why it could not be looked at: another process has it, or the system refuses;
/// then it is not known what it holds.
pub fn examine(dir: &Path, cache_bytes: usize) -> Result<Condition, String> {
    let path = dir.join(STORE_FILE);
    if !path.exists() {
        return Ok(Condition::Absent);
    }
    // The database reports what it finds; where it trips over a damaged page instead, that is a finding as well.
    let looked = panics::caught(|| look(&path, cache_bytes));
    Ok(match looked {
        Ok(Ok(Some(applied))) => Condition::Verified(applied),
        Ok(Ok(None)) => Condition::Damaged("a page is not what its checksum says".to_owned()),
        Ok(Err(redb::Error::DatabaseAlreadyOpen)) => return Err("another process has it open".to_owned()),
        Ok(Err(redb::Error::Io(error))) if !tells_of_content(&error) => return Err(error.to_string()),
        Ok(Err(error)) => Condition::Damaged(error.to_string()),
        Err(text) => Condition::Damaged(format!("its pages make no sense ({text})")),
    })
}

/// Whether an error comes of what the file holds, or of the disk that holds it, and not of how it was opened.
fn tells_of_content(error: &io::Error) -> bool {
    let of_content = matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof);
    of_content || error.raw_os_error().is_none() || error.raw_os_error() == Some(libc::EIO)
}

fn look(path: &Path, cache_bytes: usize) -> Result<Option<Position>, redb::Error> {
    let mut database = Database::builder().set_cache_size(cache_bytes).open(path)?;
    if !database.check_integrity()? {
        return Ok(None);
    }
    let reading = database.begin_read()?;
    let applied = match reading.open_table(FACTS) {
        Ok(facts) => Position::read(&facts)?,
        // A store that was made and never written to.
        Err(redb::TableError::TableDoesNotExist(_)) => Position::default(),
        Err(error) => return Err(error.into()),
    };
    Ok(Some(applied))
}
