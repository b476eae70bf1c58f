//! Files that hold a secret: a key, a password, a list of users. One function opens all of them, and refuses what others can read.
//! The mode is asked of the open file, so that it is the mode of what is read.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Who must not be able to read or write a file with a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outsiders {
    /// Everybody but the owner and the group: the file may be root's, for the group of the service that reads it.
    Others,
    /// Everybody but the owner.
    GroupAndOthers,
}

/// Why a file with a secret is not read.
#[derive(Debug, thiserror::Error)]
pub enum PrivateFileError {
    /// The file cannot be opened.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Too many can read it.
    #[error("{} can read or write it (mode {mode:04o}): chmod {} it", outsiders.who(), outsiders.wanted())]
    Open {
        /// Who.
        outsiders: Outsiders,
        /// Its mode.
        mode: u32,
    },
}

impl Outsiders {
    fn mode_bits(self) -> u32 {
        match self {
            Outsiders::Others => 0o007,
            Outsiders::GroupAndOthers => 0o077,
        }
    }

    fn who(self) -> &'static str {
        match self {
            Outsiders::Others => "every user of this host",
            Outsiders::GroupAndOthers => "not only its owner",
        }
    }

    fn wanted(self) -> &'static str {
        match self {
            Outsiders::Others => "640",
            Outsiders::GroupAndOthers => "600",
        }
    }
}

/// Opens a file with a secret to read it; refused when `outsiders` can read or write it.
pub fn open_private(path: &Path, outsiders: Outsiders) -> Result<File, PrivateFileError> {
    let file = File::open(path)?;
    check_private(&file, outsiders)?;
    Ok(file)
}

/// The same for a file that is open: whether it holds a secret is known once it was read.
pub fn check_private(file: &File, outsiders: Outsiders) -> Result<(), PrivateFileError> {
    let mode = file.metadata()?.mode() & 0o7777;
    if mode & outsiders.mode_bits() == 0 { Ok(()) } else { Err(PrivateFileError::Open { outsiders, mode }) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn secret_that_outsiders_can_read_is_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("key");
        std::fs::write(&path, "secret").expect("written");
        let opened = |mode, outsiders| {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("our file");
            open_private(&path, outsiders).map(drop).map_err(|error| error.to_string())
        };
        for mode in [0o600, 0o400, 0o640] {
            assert_eq!(opened(mode, Outsiders::Others), Ok(()), "{mode:o}");
        }
        for mode in [0o644, 0o604, 0o602, 0o601] {
            let error = opened(mode, Outsiders::Others).expect_err("others can");
            assert!(error.contains(&format!("mode 0{mode:o}")) && error.contains("chmod 640"), "{error}");
        }
        assert_eq!(opened(0o600, Outsiders::GroupAndOthers), Ok(()));
        let error = opened(0o640, Outsiders::GroupAndOthers).expect_err("the group can");
        assert!(error.contains("mode 0640") && error.contains("chmod 600"), "{error}");
    }
}
