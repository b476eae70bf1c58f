//! The limit of a file's size (`ulimit -f`, `prlimit --fsize`, systemd's `LimitFSIZE=`). Beyond it the kernel ends a process by
//! SIGXFSZ, without a word; a process that ignores the signal gets EFBIG instead, and [`Named`] says what that means.

use std::fmt;
use std::io;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use nix::sys::signal::{SigHandler, Signal, signal};

/// From now on a file that would grow beyond the limit is an error of the call that would make it so.
pub fn refuse_by_error() {
    // SAFETY: no handler of ours runs; only what the kernel does by itself changes.
    let _ = unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) };
}

/// How large a file of this process may become; `None`: as large as the filesystem lets it.
pub fn limit_bytes() -> Option<u64> {
    let (soft, _) = getrlimit(Resource::RLIMIT_FSIZE).ok()?;
    (soft != RLIM_INFINITY).then_some(soft)
}

/// An error of a file operation in words: where a file became too large, with the limit and how it is raised.
pub struct Named<'a>(pub &'a io::Error);

impl fmt::Display for Named<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        match limit_bytes() {
            _ if self.0.raw_os_error() != Some(libc::EFBIG) => Ok(()),
            Some(bytes) => write!(
                f,
                ": no file of this process may be larger than {bytes} bytes; raise RLIMIT_FSIZE (ulimit -f, LimitFSIZE= in the unit)"
            ),
            None => write!(f, ": its filesystem holds no file of that size"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_file_too_large_is_told_with_its_limit() {
        let told = |code| Named(&io::Error::from_raw_os_error(code)).to_string();
        assert_eq!(told(libc::ENOSPC), io::Error::from_raw_os_error(libc::ENOSPC).to_string());
        let expected = if limit_bytes().is_some() { "RLIMIT_FSIZE" } else { "its filesystem holds no file" };
        assert!(told(libc::EFBIG).contains(expected));
    }
}
