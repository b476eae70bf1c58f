//! Files whose first bytes another library writes: they get their name only when they are whole and durable, so that a power loss
//! while they are made leaves nothing that looks like damage. Used for the store's database and the register's; knows neither.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use crate::prepare::{remove_if_there, rename, sync_dir};

/// What the name of a file that is not whole yet ends with.
const PARTIAL_EXTENSION: &str = "partial";

/// The name of `path` while it is made.
pub fn partial_path(path: &Path) -> PathBuf {
    path.with_extension(PARTIAL_EXTENSION)
}

/// Makes `path` by `make`, which is given another name, unless it is there. What an earlier attempt left is thrown away.
pub fn create_atomically<E: From<io::Error>>(path: &Path, make: impl FnOnce(&Path) -> Result<(), E>) -> Result<(), E> {
    if path.exists() {
        return Ok(());
    }
    let partial = partial_path(path);
    remove_if_there(&partial)?;
    make(&partial)?;
    File::open(&partial)?.sync_all()?;
    rename(&partial, path)?;
    // The file's name, and that of its directory, which may be as new.
    for dir in path.ancestors().skip(1).take(2).filter(|dir| !dir.as_os_str().is_empty()) {
        sync_dir(dir)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn file_has_its_name_only_when_complete() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store.redb");
        fs::write(partial_path(&path), "half of").unwrap();
        let stopped = create_atomically(&path, |partial| {
            assert!(!partial.exists(), "what was left is gone");
            fs::write(partial, "half")?;
            Err(io::Error::other("the power went"))
        });
        assert!(stopped.is_err() && !path.exists());
        create_atomically(&path, |partial| fs::write(partial, "whole")).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "whole");
        assert!(!partial_path(&path).exists());
        create_atomically(&path, |_| Err(io::Error::other("it is there"))).unwrap();
    }
}
