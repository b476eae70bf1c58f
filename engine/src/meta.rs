//! What a data directory is: the cluster and node that it belongs to, and the choices made when it was initialised. One small
//! text file, written once.

use std::io;
use std::path::{Path, PathBuf};

use crate::limits::{FRAME_ALIGN_BYTES, SEGMENT_BYTES_MAX, WRITE_DEPTH_MAX, segment_bytes_min};
use crate::log::config::SyncMethod;
use crate::small_file::{self, Found};

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
    /// The file and its copy are damaged.
    #[error(
        "{} is damaged, and so is its copy beside it: restore one of the two from a copy of the data directory, or join anew: empty \
         the directory and start the node again, with `walferry remove` before it for a member of a cluster",
        path.display()
    )]
    Unreadable {
        /// The file.
        path: PathBuf,
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
        let text = match small_file::load(&path) {
            Ok(Found::Text(text)) => text,
            Ok(Found::Nothing) => return Ok(None),
            Ok(Found::Damaged) => return Err(MetaError::Unreadable { path }),
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
        // A number out of its bounds is damage too: every position in the log is divided by the segment size.
        let is_segment = |bytes: &u64| {
            (segment_bytes_min()..=SEGMENT_BYTES_MAX).contains(bytes) && bytes.is_multiple_of(FRAME_ALIGN_BYTES as u64)
        };
        let is_depth = |depth: &usize| (1..=WRITE_DEPTH_MAX).contains(depth);
        let segment_bytes = value("segment_bytes")?.parse().ok().filter(is_segment);
        let write_depth = value("write_depth")?.parse().ok().filter(is_depth);
        Ok(Some(Meta {
            cluster_id,
            name: value("name")?.to_owned(),
            segment_bytes: segment_bytes.ok_or_else(damaged("segment_bytes"))?,
            sync_method: value("sync_method")?.parse().ok().ok_or_else(damaged("sync_method"))?,
            write_depth: write_depth.ok_or_else(damaged("write_depth"))?,
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
        small_file::save(&path, &text).map_err(|source| MetaError::Io { what: "write", path, source })
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
        let Found::Text(text) = small_file::load(&path).unwrap() else { panic!("it was saved") };
        small_file::save(&path, &text.replace("write_depth = 4", "write_depth = x")).unwrap();
        assert!(Meta::load(dir.path()).unwrap_err().to_string().contains("`write_depth`"));
        for (right, wrong) in [("= 67108864", "= 0"), ("= 67108864", "= 67108865"), ("depth = 4", "depth = 0")] {
            small_file::save(&path, &text.replace(right, wrong)).unwrap();
            assert!(Meta::load(dir.path()).unwrap_err().to_string().contains("damaged"), "{wrong}");
        }
        small_file::save(&path, &text.replace("version = 1", "version = 9")).unwrap();
        assert!(Meta::load(dir.path()).unwrap_err().to_string().contains("version 9"));
    }
}
