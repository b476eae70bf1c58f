//! SIGTERM, SIGINT and SIGHUP as a descriptor on the ring, so that a signal is an event like any other. Used by `reactor`.

use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use io_uring::{opcode, types};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use walferry_engine::ring::{Owner, Ring, Token};

/// The descriptor that becomes readable when the process is asked to end.
pub struct Signals {
    descriptor: SignalFd,
    id: u64,
}

impl Signals {
    /// Blocks these signals for this thread and those it starts from now on. Call it before any other thread exists.
    pub fn block(id: u64) -> std::io::Result<Signals> {
        let mut set = SigSet::empty();
        set.add(Signal::SIGTERM);
        set.add(Signal::SIGINT);
        set.add(Signal::SIGHUP);
        set.thread_block()?;
        let descriptor = SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        Ok(Signals { descriptor, id })
    }

    /// Asks the ring to tell when a signal arrives.
    pub fn arm(&self, ring: &mut Ring) {
        let entry = opcode::PollAdd::new(types::Fd(self.descriptor.as_raw_fd()), libc::POLLIN as u32)
            .build()
            .user_data(Token::new(Owner::Wake, self.id).into());
        // SAFETY: names no memory; the descriptor lives as long as the reactor.
        unsafe { ring.push(entry) };
    }

    /// Waits for a signal without a ring, at most so long.
    pub fn wait(&mut self, timeout: Duration) -> std::io::Result<Option<Signal>> {
        let mut readable = [PollFd::new(self.descriptor.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        match poll(&mut readable, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(self.take()),
            Err(error) => Err(error.into()),
        }
    }

    /// The signal that arrived, if one did.
    pub fn take(&mut self) -> Option<Signal> {
        let info = self.descriptor.read_signal().ok().flatten()?;
        Signal::try_from(info.ssi_signo as i32).ok()
    }
}
