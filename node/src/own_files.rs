//! The modes and names of what this program makes on disk: the node's user and group may look into it, nobody else, whatever the
//! umask says; and nothing is made by way of a link that somebody else put there. Called by the commands that keep files; knows no
//! format.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use nix::sys::stat::{Mode, umask};
use nix::unistd::geteuid;

/// A data directory has this mode at most.
pub const DIRECTORY_MODE: u32 = 0o750;
/// A file that this program makes outside its data directory.
const FILE_MODE: u32 = 0o640;
/// A directory for this user alone.
const PRIVATE_DIRECTORY_MODE: u32 = 0o700;
/// What no file of this process is given: 0640 for files and 0750 for directories are left.
const UMASK: u32 = 0o027;

/// From now on no file or directory of this process is made wider. A stricter umask of the caller stays.
pub fn limit_modes() {
    let callers = umask(Mode::from_bits_truncate(0o777));
    umask(callers | Mode::from_bits_truncate(UMASK));
}

/// Makes a data directory.
pub fn make_directory(path: &Path) -> io::Result<()> {
    DirBuilder::new().mode(DIRECTORY_MODE).create(path)
}

/// Takes from a directory what others may do with it, and what its group may write. Gives the modes before and after, if they differ.
pub fn narrow(path: &Path) -> io::Result<Option<(u32, u32)>> {
    let directory = File::open(path)?;
    let mode_of = || directory.metadata().map(|meta| meta.mode() & 0o7777);
    let old = mode_of()?;
    let new = old & !UMASK;
    if new == old {
        return Ok(None);
    }
    directory.set_permissions(Permissions::from_mode(new))?;
    let now = mode_of()?;
    if now == new { Ok(Some((old, new))) } else { Err(io::Error::other(format!("it stays {now:04o}"))) }
}

/// Makes a directory for this user alone, or checks that the one that is there is such a directory and no link to one.
pub fn make_private_directory(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(PRIVATE_DIRECTORY_MODE).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        made => return made,
    }
    let found = fs::symlink_metadata(path)?;
    let mode = found.mode() & 0o777;
    if found.is_dir() && found.uid() == geteuid().as_raw() && mode & !PRIVATE_DIRECTORY_MODE == 0 {
        return Ok(());
    }
    let what = if found.is_dir() { "a directory" } else { "no directory" };
    Err(io::Error::other(format!(
        "{} is {what} of the user {} with mode {mode:04o}, and has to be a directory of this user alone: remove it",
        path.display(),
        found.uid()
    )))
}

/// Puts `bytes` in the place of `path` at once: whoever waits for the file never reads half of it. A link of this name is replaced
/// and not followed, nor is one of the name that the file has until it is whole.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let name = path.file_name().ok_or_else(|| io::Error::other("it names no file"))?;
    let partial = path.with_file_name(format!(".{}.{}", name.to_string_lossy(), std::process::id()));
    match fs::remove_file(&partial) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // O_EXCL, which follows no link in the last part of the name.
    let mut file = File::options().write(true).create_new(true).mode(FILE_MODE).open(&partial)?;
    file.write_all(bytes).and_then(|()| fs::rename(&partial, path)).inspect_err(|_| {
        let _ = fs::remove_file(&partial);
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).expect("it is there").mode() & 0o7777
    }

    #[test]
    fn open_directory_is_narrowed_once() {
        let root = tempfile::tempdir().expect("a directory");
        for (old, new) in [(0o755, 0o750), (0o777, 0o750), (0o2775, 0o2750), (0o710, 0o710)] {
            fs::set_permissions(root.path(), Permissions::from_mode(old)).expect("our directory");
            let expected = (old != new).then_some((old, new));
            assert_eq!(narrow(root.path()).expect("it is ours"), expected);
            assert_eq!(narrow(root.path()).expect("it is ours"), None);
            assert_eq!(mode(root.path()), new);
        }
    }

    #[test]
    fn replaced_file_follows_no_link() {
        let root = tempfile::tempdir().expect("a directory");
        let (victim, file) = (root.path().join("victim"), root.path().join("ready"));
        fs::write(&victim, "untouched").expect("written");
        symlink(&victim, &file).expect("a link in the file's place");
        let partial = root.path().join(format!(".ready.{}", std::process::id()));
        symlink(&victim, &partial).expect("a link in the place of the unfinished file");
        replace(&file, b"listen=x\n").expect("replaced");
        assert_eq!(fs::read_to_string(&victim).expect("it is there"), "untouched");
        assert!(fs::symlink_metadata(&file).expect("it is there").is_file());
        assert_eq!(fs::read_to_string(&file).expect("it is there"), "listen=x\n");
        assert_eq!(mode(&file) & !FILE_MODE, 0);
        replace(&file, b"again").expect("replaced");
        assert_eq!(fs::read_dir(root.path()).expect("it is there").count(), 2, "nothing unfinished is left");
    }

    #[test]
    fn private_directory_is_no_link_and_not_open() {
        let root = tempfile::tempdir().expect("a directory");
        let own = root.path().join("own");
        make_private_directory(&own).expect("made");
        make_private_directory(&own).expect("it is there");
        assert_eq!(mode(&own), 0o700);
        let link = root.path().join("link");
        symlink(&own, &link).expect("a link");
        let error = make_private_directory(&link).expect_err("a link").to_string();
        assert!(error.contains("no directory"), "{error}");
        fs::set_permissions(&own, Permissions::from_mode(0o770)).expect("our directory");
        let error = make_private_directory(&own).expect_err("others can write there").to_string();
        assert!(error.contains("mode 0770"), "{error}");
    }
}
