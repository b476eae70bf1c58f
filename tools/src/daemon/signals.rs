//! SIGTERM and SIGINT as a descriptor on the ring, so that a signal is an event like any other. Used by `reactor`.

use std::os::fd::AsRawFd;

use io_uring::{opcode, types};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use walferry_engine::ring::{Owner, Ring, Token};

/// The descriptor that becomes readable when the process is asked to end.
pub struct Signals {
    descriptor: SignalFd,
    id: u64,
}

impl Signals {
    /// Blocks both signals for this thread and those it starts from now on. Call it before any other thread exists.
    pub fn block(id: u64) -> std::io::Result<Signals> {
        let mut set = SigSet::empty();
        set.add(Signal::SIGTERM);
        set.add(Signal::SIGINT);
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

    /// The signal that arrived, if one did.
    pub fn take(&mut self) -> Option<Signal> {
        let info = self.descriptor.read_signal().ok().flatten()?;
        Signal::try_from(info.ssi_signo as i32).ok()
    }
}
