//! Whether a flush that succeeded can be believed. When a filesystem was made read-only by force, by an operator or by the kernel
//! after an error, ext4 answers every flush with success and flushes nothing. So each flush that stands behind a promise is followed
//! by the question whether its filesystem still takes writes: what was writable after the flush was so when it began. Used by the
//! log, the watermark, the small files, and, by path, for the databases of the store and of the register.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// True when the filesystem of an open file takes no more writes. Does not wait for a disk.
pub fn refuses_writes(file: &File) -> bool {
    is_read_only(file.as_raw_fd(), c"")
}

/// Makes the content of a file durable, and fails where the flush meant nothing.
pub fn flush(file: &File) -> io::Result<()> {
    file.sync_data()?;
    believe(!refuses_writes(file))
}

/// Fails when the filesystem that holds `path` takes no more writes: after a flush by a library that keeps its file to itself.
pub fn believe_flush_of(path: &Path) -> io::Result<()> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    believe(!is_read_only(libc::AT_FDCWD, &name))
}

fn believe(writable: bool) -> io::Result<()> {
    if writable { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EROFS)) }
}

fn is_read_only(dir: RawFd, name: &std::ffi::CStr) -> bool {
    // Without a name the descriptor itself is meant.
    let flags = libc::AT_EACCESS | if name.is_empty() { libc::AT_EMPTY_PATH } else { 0 };
    // SAFETY: the name ends with a NUL, and the kernel keeps neither it nor the descriptor.
    let allowed = unsafe { libc::syscall(libc::SYS_faccessat2, dir, name.as_ptr(), libc::W_OK, flags) };
    allowed < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EROFS)
}

#[cfg(test)]
mod tests {
    use nix::mount::{MsFlags, mount};
    use walferry_mounts as mounts;

    use super::*;

    #[test]
    fn read_only_filesystem_is_noticed_by_open_file_and_path() {
        let dir = tempfile::tempdir().expect("a directory");
        let none: Option<&str> = None;
        let tmpfs = |flags| mount(Some("tmpfs"), dir.path(), Some("tmpfs"), flags, none);
        if let Err(error) = mounts::own().and_then(|()| tmpfs(MsFlags::empty())) {
            println!("skipped: this user may not mount a filesystem ({error})");
            return;
        }
        let path = dir.path().join("segment");
        std::fs::write(&path, b"bytes").expect("written");
        // Not for writing: only by force does a filesystem become read-only under a file that is open for that.
        let file = File::open(&path).expect("opened");
        assert!(!refuses_writes(&file));
        flush(&file).and_then(|()| believe_flush_of(&path)).expect("writable");
        tmpfs(MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY).expect("read-only now");
        assert!(refuses_writes(&file));
        for refused in [flush(&file), believe_flush_of(&path)] {
            assert_eq!(refused.expect_err("refused").raw_os_error(), Some(libc::EROFS));
        }
    }
}
