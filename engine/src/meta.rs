//! What a data directory is: the cluster and node that it belongs to, and the choices made when it was initialised. One small
//! text file, written once.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::epoch::replace_file;
use crate::log::SyncMethod;

/// The file in the data directory.
pub const META_FILE: &str = "meta";
/// The layout of data directories that this build reads and writes.
const DIRECTORY_VERSION: u32 = 1;

/// Why a data directory's description cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MetaError {
    /// The file cannot be read or written.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was attempted.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A line is missing or not understood.
    #[error("{}: `{key}` is missing or damaged; restore the file from a copy of the data directory", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The key concerned.
        key: &'static str,
    },
    /// Made by another version.
    #[error("{} has directory version {found}, this build reads {DIRECTORY_VERSION}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// The version it names.
        found: u32,
    },
}

/// What is written down at init.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meta {
    /// The cluster; 0 until a replica has learned it from its leader.
    pub cluster_id: u128,
    /// The node's name.
    pub name: String,
    /// The size of its segments.
    pub segment_bytes: u64,
    /// How writes are made durable, as measured at init.
    pub sync_method: SyncMethod,
    /// Writes in flight, as measured at init.
    pub write_depth: usize,
}

impl Meta {
    /// Reads the file; `None` when the directory was never initialised.
    pub fn load(dir: &Path) -> Result<Option<Meta>, MetaError> {
        let path = dir.join(META_FILE);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(MetaError::Io { what: "read", path, source }),
        };
        let value = |key: &'static str| {
            let found = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(" = "));
            found.ok_or_else(|| MetaError::Damaged { path: path.clone(), key })
        };
        let damaged = |key| move || MetaError::Damaged { path: dir.join(META_FILE), key };
        let version = value("directory_version")?.parse().ok().ok_or_else(damaged("directory_version"))?;
        if version != DIRECTORY_VERSION {
            return Err(MetaError::Version { path: path.clone(), found: version });
        }
        let cluster_id = u128::from_str_radix(value("cluster_id")?, 16).ok().ok_or_else(damaged("cluster_id"))?;
        Ok(Some(Meta {
            cluster_id,
            name: value("name")?.to_owned(),
            segment_bytes: value("segment_bytes")?.parse().ok().ok_or_else(damaged("segment_bytes"))?,
            sync_method: value("sync_method")?.parse().ok().ok_or_else(damaged("sync_method"))?,
            write_depth: value("write_depth")?.parse().ok().ok_or_else(damaged("write_depth"))?,
        }))
    }

    /// Makes the description durable.
    pub fn save(&self, dir: &Path) -> Result<(), MetaError> {
        let text = format!(
            "directory_version = {DIRECTORY_VERSION}\ncluster_id = {:032x}\nname = {}\nsegment_bytes = {}\nsync_method = \
             {}\nwrite_depth = {}\n",
            self.cluster_id, self.name, self.segment_bytes, self.sync_method, self.write_depth
        );
        let path = dir.join(META_FILE);
        replace_file(&path, text.as_bytes()).map_err(|source| MetaError::Io { what: "write", path, source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_saved_is_loaded_and_damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Meta::load(dir.path()).unwrap(), None);
        let meta = Meta {
            cluster_id: 0x1234,
            name: "a".to_owned(),
            segment_bytes: 64 << 20,
            sync_method: SyncMethod::Dsync,
            write_depth: 4,
        };
        meta.save(dir.path()).unwrap();
        assert_eq!(Meta::load(dir.path()).unwrap(), Some(meta));
        let path = dir.path().join(META_FILE);
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace("write_depth = 4", "write_depth = x")).unwrap();
        assert!(Meta::load(dir.path()).unwrap_err().to_string().contains("`write_depth`"));
        fs::write(&path, text.replace("version = 1", "version = 9")).unwrap();
        assert!(Meta::load(dir.path()).unwrap_err().to_string().contains("version 9"));
    }
}
