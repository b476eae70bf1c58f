//! The data directory of a node: created once (its disk measured, the choice written down), then only opened and compared with
//! the configuration. Used by the start of nodes and witnesses and by `walferry init`.

use std::fs;
use std::io;
use std::path::Path;

use rand::RngExt;
use walferry_engine::file_size;
use walferry_engine::log::{SyncMethod, direct_io_refusal};
use walferry_engine::meta::Meta;
use walferry_engine::probe::{self, ProbeConfig, ProbeReport};

use crate::config::NodeConfig;
use crate::error::{DaemonError, DataDirError};
use crate::own_files;
use crate::units::ByteSize;

/// What an init that was cut short may have left behind, and what filesystems put into their root.
const LEFTOVERS: [&str; 5] = ["lock", "probe.tmp", "direct.tmp", "meta.partial", "lost+found"];

/// What the data directory says of itself; created first if there is none.
pub fn open_or_init(config: &NodeConfig) -> Result<Meta, DaemonError> {
    let close = || -> Result<(), DaemonError> {
        close_to_others(&config.data)?.into_iter().for_each(|line| tracing::warn!("{line}"));
        Ok(())
    };
    let found = load(config)?;
    let segment_bytes = found.as_ref().map_or(config.segment_bytes, |meta| meta.segment_bytes);
    // The log buffer is a file in memory.
    for (what, bytes) in [("a segment of the log", segment_bytes), ("log_buffer_bytes", config.log_buffer_bytes as u64)]
    {
        if let Some(limit) = file_size::limit_bytes().filter(|limit| *limit < bytes) {
            return Err(DataDirError::FileSizeLimit { dir: config.data.clone(), limit, what, bytes }.into());
        }
    }
    let Some(meta) = found else {
        let (meta, _) = create(config)?;
        close()?;
        tracing::info!(
            data = %config.data.display(),
            sync_method = %meta.sync_method,
            write_depth = meta.write_depth,
            segment_bytes = meta.segment_bytes,
            "data directory initialised"
        );
        return Ok(meta);
    };
    close()?;
    if meta.name != config.name {
        let (dir, name) = (config.data.clone(), config.name.clone());
        return Err(DataDirError::OtherNode { dir, owner: meta.name, name }.into());
    }
    if let Some(given) = config.segment_bytes_given.filter(|given| *given != meta.segment_bytes) {
        let (given, here) = (ByteSize(given), ByteSize(meta.segment_bytes));
        return Err(DataDirError::SegmentBytes { dir: config.data.clone(), here, given }.into());
    }
    Ok(meta)
}

/// Makes the data directory unless it is there: the last directory of the path and no other. What else is missing may be a volume
/// that is not mounted, and on the disk below it an empty node would begin where there was one with data.
pub fn make_directory(dir: &Path) -> Result<(), DataDirError> {
    let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty());
    let missing = parent.and_then(|parent| parent.ancestors().filter(|above| !above.exists()).last());
    if let Some(missing) = missing.filter(|missing| !missing.as_os_str().is_empty()) {
        return Err(DataDirError::ParentMissing { dir: dir.to_owned(), missing: missing.to_owned() });
    }
    match own_files::make_directory(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(DataDirError::Io { dir: dir.to_owned(), what: "create it", source: error })
        }
        _ => Ok(()),
    }
}

/// Takes from a data directory that is there already what others may do with it; says so when there was something. A directory whose mode
/// cannot be changed is refused.
pub fn close_to_others(dir: &Path) -> Result<Option<String>, DataDirError> {
    match own_files::narrow(dir) {
        Ok(None) => Ok(None),
        Ok(Some((old, new))) => Ok(Some(format!(
            "--data {}: its mode was {old:04o} and is {new:04o} now: only the node's user and group need access",
            dir.display()
        ))),
        Err(source) => Err(DataDirError::Open { dir: dir.to_owned(), mode: own_files::DIRECTORY_MODE, source }),
    }
}

/// What the directory says of itself; `None` before its init.
pub fn load(config: &NodeConfig) -> Result<Option<Meta>, DaemonError> {
    Ok(Meta::load(&config.data)?)
}

/// Creates the directory's description; measures the disk unless everything about it is configured.
pub fn create(config: &NodeConfig) -> Result<(Meta, Option<ProbeReport>), DaemonError> {
    let dir = &config.data;
    let failed = |what, source| DataDirError::Io { dir: dir.clone(), what, source };
    make_directory(dir)?;
    if let Some(found) = foreign_entry(dir).map_err(|error| failed("read it", error))? {
        return Err(DataDirError::Foreign { dir: dir.clone(), found }.into());
    }
    let (sync_method, write_depth, report) = choose(config)?;
    let meta = Meta {
        // A replica belongs to the cluster of the leader that it meets first, a member to the one that is formed with it.
        cluster_id: if config.follow.is_some() || config.members.is_some() { 0 } else { rand::rng().random() },
        name: config.name.clone(),
        segment_bytes: config.segment_bytes,
        sync_method,
        write_depth,
    };
    meta.save(dir)?;
    Ok((meta, report))
}

/// The first entry that no init could have left.
fn foreign_entry(dir: &Path) -> io::Result<Option<String>> {
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if !LEFTOVERS.contains(&name.as_str()) {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// The configured method and depth; what is not configured is measured.
fn choose(config: &NodeConfig) -> Result<(SyncMethod, usize, Option<ProbeReport>), DaemonError> {
    let dir = &config.data;
    if !config.buffered {
        let method = config.sync_method.unwrap_or(SyncMethod::Fdatasync);
        let refusal = direct_io_refusal(dir, method).map_err(|source| DataDirError::Io {
            dir: dir.clone(),
            what: "write a file there",
            source,
        })?;
        if let Some(reason) = refusal {
            return Err(DataDirError::NoDirectIo { dir: dir.clone(), reason: reason.to_string() }.into());
        }
    }
    if let (Some(method), Some(depth)) = (config.sync_method, config.write_depth) {
        return Ok((method, depth, None));
    }
    let report = probe::run(dir, &ProbeConfig::brief(config.buffered))?;
    let no_method = || DataDirError::NoSyncMethod { dir: dir.clone() };
    let recommended = report.recommendation.ok_or_else(no_method)?;
    let method = config.sync_method.unwrap_or(recommended.sync_method);
    Ok((method, config.write_depth.unwrap_or(recommended.write_depth), Some(report)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Settings;

    fn config(dir: &Path, more: Settings) -> NodeConfig {
        let base = Settings {
            data: Some(dir.to_owned()),
            name: Some("a".to_owned()),
            sync_method: Some("fdatasync".parse().unwrap()),
            write_depth: Some(2),
            buffered: Some(true),
            ..Settings::default()
        };
        NodeConfig::new(more, base).unwrap()
    }

    #[test]
    fn a_directory_is_initialised_once_and_then_opened() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("data");
        let config = config(&dir, Settings::default());
        let meta = open_or_init(&config).unwrap();
        assert_eq!((meta.name.as_str(), meta.sync_method, meta.write_depth), ("a", SyncMethod::Fdatasync, 2));
        assert_ne!(meta.cluster_id, 0);
        assert_eq!(open_or_init(&config).unwrap(), meta);
        assert_eq!(load(&config).unwrap(), Some(meta));
    }

    #[test]
    fn data_directory_below_a_missing_one_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let missing = root.path().join("volume");
        let error = open_or_init(&config(&missing.join("nodes/a"), Settings::default())).unwrap_err().to_string();
        assert!(error.contains(&format!("there is no {}:", missing.display())) && error.contains("mount"), "{error}");
        assert!(!missing.exists());
    }

    #[test]
    fn a_replica_has_no_cluster_until_it_meets_one() {
        let root = tempfile::tempdir().unwrap();
        let follow = Settings { follow: Some("127.0.0.1:6401".parse().unwrap()), ..Settings::default() };
        assert_eq!(open_or_init(&config(root.path(), follow)).unwrap().cluster_id, 0);
    }

    #[test]
    fn the_directory_of_another_node_or_of_anything_else_is_refused() {
        let root = tempfile::tempdir().unwrap();
        open_or_init(&config(root.path(), Settings::default())).unwrap();
        let other = Settings { name: Some("b".to_owned()), ..Settings::default() };
        let error = open_or_init(&config(root.path(), other)).unwrap_err().to_string();
        assert!(error.contains("belongs to the node \"a\"") && error.contains("--name a"), "{error}");
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("thesis.tex"), "x").unwrap();
        let error = open_or_init(&config(root.path(), Settings::default())).unwrap_err().to_string();
        assert!(error.contains("thesis.tex") && error.contains("not a walferry data directory"), "{error}");
    }

    #[test]
    fn what_a_broken_init_left_does_not_stand_in_the_way() {
        let root = tempfile::tempdir().unwrap();
        for name in LEFTOVERS {
            fs::write(root.path().join(name), "").unwrap();
        }
        open_or_init(&config(root.path(), Settings::default())).unwrap();
    }
}
