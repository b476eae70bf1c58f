//! Mounts that only this thread and those that it starts see, and that are gone with them: for tests that need a filesystem of
//! their own, and for the power cuts that recover on this host. Needs root; who has no right to it is told by the error.

use std::path::Path;

use nix::mount::{MsFlags, mount, umount};
use nix::sched::{CloneFlags, unshare};

const NONE: Option<&str> = None;

/// From now on this thread's mounts are its own.
pub fn own() -> nix::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)
}

/// Nobody can write what is in `dir` by its path any more; files that are open for it go on taking writes.
pub fn make_read_only(dir: &Path) -> nix::Result<()> {
    mount(Some(dir), dir, NONE, MsFlags::MS_BIND, NONE)?;
    mount(NONE, dir, NONE, MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, NONE)
}

/// Takes `make_read_only` back.
pub fn make_writable(dir: &Path) -> nix::Result<()> {
    umount(dir)
}

/// A filesystem in memory at `dir` that has no size and counts nothing. It takes no O_DIRECT.
pub fn make_unbounded(dir: &Path) -> nix::Result<()> {
    mount(Some("ramfs"), dir, Some("ramfs"), MsFlags::empty(), NONE)
}

/// Gives a filesystem of [`make_small`] another size.
pub fn resize(dir: &Path, bytes: u64) -> nix::Result<()> {
    let options = format!("size={bytes}");
    mount(NONE, dir, NONE, MsFlags::MS_REMOUNT, Some(options.as_str()))
}

/// A filesystem in memory of so many bytes at `dir`. It takes no O_DIRECT.
pub fn make_small(dir: &Path, bytes: u64) -> nix::Result<()> {
    let options = format!("size={bytes}");
    mount(Some("tmpfs"), dir, Some("tmpfs"), MsFlags::empty(), Some(options.as_str()))
}
