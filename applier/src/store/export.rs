//! The store's file as of one checkpoint, written anew into another file, for a replica that cannot get there by the log.
//! The database has no backup of its own, and its file changes under every checkpoint: so a read transaction keeps one state
//! while checkpoints go on, and its rows go into a fresh file in key order, a batch at a time, each batch handed to the disk before
//! the next, so that the disk never has a long queue of this. Only the last makes all of them durable: a flush of the disk's
//! cache for each would stand in the way of the log's. Runs on a thread of its own; knows nothing of the log but the LSN.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use redb::{Database, Durability, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition};
use walferry_engine::durable::believe_flush_of;
use walferry_engine::lsn::Lsn;

use super::file::{ENTRIES, FACTS, KEYS, Position, VALUES};
use super::{Store, StoreError};

/// Rows that are written at once.
const BATCH_BYTES: usize = 2 << 20;
/// Pages of the new file that stay in memory.
const CACHE_BYTES: usize = 16 << 20;

/// A state of the store, to be written.
pub struct Export {
    transaction: ReadTransaction,
    source: PathBuf,
    position: Position,
}

/// Why no copy was written.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The store or the new file failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It was asked to end.
    #[error("the copy was given up")]
    Stopped,
}

impl Store {
    /// The newest checkpoint as it stands, however many follow.
    pub fn export(&self) -> Result<Export, StoreError> {
        let source = self.store_file.path().to_owned();
        let take = || -> Result<(ReadTransaction, Position), redb::Error> {
            let transaction = self.store_file.database().begin_read()?;
            let facts = transaction.open_table(FACTS)?;
            let position = Position::read(&facts)?;
            drop(facts);
            Ok((transaction, position))
        };
        let (transaction, position) = take().map_err(StoreError::at(&source))?;
        Ok(Export { transaction, source, position })
    }
}

impl Export {
    /// What it holds: everything before this.
    pub fn applied(&self) -> Lsn {
        self.position.applied
    }

    /// About the size of the new file: that of the old one, which has unused space.
    pub fn source_bytes(&self) -> io::Result<u64> {
        Ok(std::fs::metadata(&self.source)?.len())
    }

    /// Writes it to `path`, which is made anew and durable in the end. `written` is told each batch's bytes after the disk has
    /// them, and may wait; false ends the copy.
    pub fn write(self, path: &Path, mut written: impl FnMut(usize) -> bool) -> Result<(), ExportError> {
        let at = StoreError::at(path);
        match std::fs::remove_file(path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(StoreError::Setup { path: path.to_owned(), source }.into());
            }
            _ => {}
        }
        let database =
            Database::builder().set_cache_size(CACHE_BYTES).create(path).map_err(|error| at(error.into()))?;
        let file = File::open(path).map_err(|source| StoreError::Setup { path: path.to_owned(), source })?;
        let mut written = |bytes| {
            hand_to_disk(&file);
            written(bytes)
        };
        for table in [KEYS, VALUES, ENTRIES] {
            if !copy_rows(&self.transaction, &database, table, &mut written).map_err(&at)? {
                return Err(ExportError::Stopped);
            }
        }
        self.write_facts(path, &database).map_err(&at)?;
        Ok(())
    }

    fn write_facts(&self, path: &Path, database: &Database) -> Result<(), redb::Error> {
        let mut transaction = database.begin_write()?;
        transaction.set_durability(Durability::Immediate)?;
        transaction.set_quick_repair(true);
        {
            let mut facts = transaction.open_table(FACTS)?;
            self.position.write(&mut facts)?;
        }
        transaction.commit()?;
        believe_flush_of(path).map_err(redb::Error::Io)
    }
}

/// Starts and awaits the writing of what the page cache holds of the file, without a flush of the disk's own cache.
fn hand_to_disk(file: &File) {
    let how = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: a plain system call on an open file. Only its pace matters: the flush at the end finds any error.
    let _ = unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, how) };
}

type Rows = TableDefinition<'static, &'static [u8], &'static [u8]>;

/// False when it was asked to end.
fn copy_rows(
    from: &ReadTransaction,
    to: &Database,
    table: Rows,
    written: &mut impl FnMut(usize) -> bool,
) -> Result<bool, redb::Error> {
    let source = from.open_table(table)?;
    let mut rows = source.iter()?;
    loop {
        let mut transaction = to.begin_write()?;
        transaction.set_durability(Durability::None)?;
        let mut bytes = 0;
        {
            let mut target = transaction.open_table(table)?;
            while bytes < BATCH_BYTES {
                let Some(row) = rows.next() else { break };
                let (key, value) = row?;
                bytes += key.value().len() + value.value().len();
                target.insert(key.value(), value.value())?;
            }
        }
        transaction.commit()?;
        if !written(bytes) {
            return Ok(false);
        }
        if bytes < BATCH_BYTES {
            return Ok(true);
        }
    }
}
