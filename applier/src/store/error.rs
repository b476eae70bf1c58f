//! Why the store fails.

use std::path::{Path, PathBuf};

use walferry_engine::file_size::Named;
use walferry_engine::lsn::Lsn;

use crate::record::RecordError;
/// Why the store cannot go on. Fatal for the node: its log has everything.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database file failed.
    #[error("the store's file {}: {}", path.display(), database_error(source))]
    Database {
        /// The file.
        path: PathBuf,
        /// What the database said.
        source: Box<redb::Error>,
    },
    /// A row is not what a checkpoint writes.
    #[error("the store's file {} is damaged; remove it, and the node rebuilds it from its log if that is whole", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// The directory cannot be made, or the thread not be started.
    #[error("cannot set up the store in {}: {}", path.display(), Named(source))]
    Setup {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A record in the log is not one that this build understands.
    #[error("the record before {lsn} cannot be applied: {source}")]
    Record {
        /// The end of the record.
        lsn: Lsn,
        /// What is wrong with it.
        source: RecordError,
    },
}

impl StoreError {
    pub(crate) fn at(path: &Path) -> impl Fn(redb::Error) -> StoreError + use<> {
        let path = path.to_owned();
        move |source| StoreError::Database { path: path.clone(), source: Box::new(source) }
    }
}

fn database_error(error: &redb::Error) -> String {
    match error {
        redb::Error::Io(error) => Named(error).to_string(),
        error => error.to_string(),
    }
}
