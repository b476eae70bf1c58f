//! One process per data directory: an flock on the directory itself, which the kernel lets go when the process ends, however it
//! ends, and which nobody can remove by removing a file. `DIR/lock` holds the pid of the holder, for the error text of the second
//! process.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::held::HeldFile;

/// The lock's name in the data directory.
pub const LOCK_FILE: &str = "lock";
/// The most of the lock file that is read for the pid.
const PID_TEXT_BYTES_MAX: u64 = 32;

/// Why the data directory is not ours.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process has it.
    #[error("data directory {dir} is in use by {holder}: one process per data directory", dir = dir.display())]
    Held {
        /// The data directory.
        dir: PathBuf,
        /// `process 1234`, or a plain word when the pid is not known.
        holder: String,
    },
    /// The directory cannot be locked, or the file with the pid cannot be made.
    #[error("cannot lock {path}: {source}", path = path.display())]
    Io {
        /// The directory or the file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// The data directory is ours while this lives.
#[derive(Debug)]
pub struct DirLock {
    _directory: Flock<File>,
    held: [HeldFile; 2],
}

impl DirLock {
    /// Locks `dir` and writes this process's pid into the lock file. Never waits.
    pub fn take(dir: &Path) -> Result<DirLock, LockError> {
        let failed = |path: &Path, source| LockError::Io { path: path.to_owned(), source };
        let path = dir.join(LOCK_FILE);
        let directory = File::open(dir).map_err(|error| failed(dir, error))?;
        let directory = match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(directory) => directory,
            Err((_, Errno::EWOULDBLOCK)) => {
                return Err(LockError::Held { dir: dir.to_owned(), holder: holder(&path) });
            }
            Err((_, errno)) => return Err(failed(dir, errno.into())),
        };
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o640);
        let pid = format!("{}\n", std::process::id());
        let mut file = options.open(&path).map_err(|error| failed(&path, error))?;
        let written = file.write_all(pid.as_bytes()).and_then(|()| HeldFile::open(&path, &file));
        let lock = written.map_err(|error| failed(&path, error))?;
        let held = HeldFile::open(dir, &directory).map_err(|error| failed(dir, error))?;
        Ok(DirLock { _directory: directory, held: [held, lock] })
    }

    /// The directory and the lock file, to be looked at.
    pub fn held(&self) -> &[HeldFile] {
        &self.held
    }
}

fn holder(path: &Path) -> String {
    let mut text = String::new();
    let _ = File::open(path).map(|file| file.take(PID_TEXT_BYTES_MAX).read_to_string(&mut text));
    match text.trim().parse::<u32>() {
        Ok(pid) => format!("process {pid}"),
        Err(_) => "another process".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_lock_names_the_holder_until_the_first_is_gone() {
        let dir = tempfile::tempdir().expect("a directory");
        let first = DirLock::take(dir.path()).expect("the first lock");
        let text = DirLock::take(dir.path()).expect_err("held").to_string();
        assert!(text.contains(&format!("in use by process {}", std::process::id())), "{text}");
        std::fs::remove_file(dir.path().join(LOCK_FILE)).expect("removed");
        let text = DirLock::take(dir.path()).expect_err("held all the same").to_string();
        assert!(text.contains("in use by another process"), "{text}");
        drop(first);
        DirLock::take(dir.path()).expect("free again");
    }
}
