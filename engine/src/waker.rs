//! How another thread wakes the ring thread: an eventfd that the ring polls. It carries no message; what happened
//! stands in whatever channel or shared state the two threads have. Knows nothing of who wakes whom.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use io_uring::{opcode, types};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::ring::{Completion, Owner, Ring, Token};

#[derive(Debug)]
struct Shared {
    event: EventFd,
    /// True from the first wake until the ring thread has seen it: further wakes cost no system call.
    pending: AtomicBool,
}

/// Wakes the ring thread. Cheap to clone and to call again and again.
#[derive(Clone, Debug)]
pub struct Waker {
    shared: Arc<Shared>,
}

impl Waker {
    /// Makes the ring thread's wait end. What the caller published before is visible to the ring thread after.
    pub fn wake(&self) {
        if !self.shared.pending.swap(true, Ordering::AcqRel) {
            // Fails only when the counter is full, and then the ring is being woken anyway.
            let _ = self.shared.event.write(1);
        }
    }
}

/// The ring thread's end.
#[derive(Debug)]
pub struct WakeSource {
    shared: Arc<Shared>,
}

impl WakeSource {
    /// A pair: clones of the waker go to other threads, the source stays with the ring.
    pub fn new() -> io::Result<(Waker, WakeSource)> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let shared = Arc::new(Shared { event, pending: AtomicBool::new(false) });
        Ok((Waker { shared: Arc::clone(&shared) }, WakeSource { shared }))
    }

    /// The eventfd.
    pub fn fd(&self) -> RawFd {
        self.shared.event.as_raw_fd()
    }

    /// The token of the poll on the eventfd.
    pub const fn token() -> Token {
        Token::new(Owner::Wake, 0)
    }

    /// Starts listening on `ring`; once, before the first wait.
    pub fn arm(&self, ring: &mut Ring) {
        let fd = types::Fd(self.fd());
        let entry = opcode::PollAdd::new(fd, libc::POLLIN as u32).multi(true).build();
        // SAFETY: a poll names no memory, and the kernel holds the file while the poll lasts.
        unsafe { ring.push(entry.user_data(Self::token().into())) };
    }

    /// Takes a completion of [`Owner::Wake`]. Afterwards look at every channel: later wakes complete again.
    pub fn handle_completion(&self, completion: &Completion, ring: &mut Ring) {
        // Read before the reset: a wake after the reset writes again, and what a wake before it published is seen
        // by the caller's look at the channels, because the reset acquires it.
        let _ = self.shared.event.read();
        self.shared.pending.swap(false, Ordering::AcqRel);
        if !io_uring::cqueue::more(completion.flags) {
            self.arm(ring);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn every_round_of_wakes_ends_a_wait() {
        let mut ring = Ring::new(8).expect("io_uring");
        let (waker, source) = WakeSource::new().expect("eventfd");
        source.arm(&mut ring);
        let mut seen = Vec::new();
        for _ in 0..3 {
            let waker = waker.clone();
            let thread = std::thread::spawn(move || (0..10).for_each(|_| waker.wake()));
            while seen.is_empty() {
                ring.submit_and_wait(Some(Duration::from_secs(5))).expect("wait");
                ring.completions(&mut seen);
            }
            thread.join().expect("the waking thread");
            ring.submit_and_wait(Some(Duration::ZERO)).expect("wait");
            ring.completions(&mut seen);
            for completion in seen.drain(..) {
                assert_eq!(completion.token, WakeSource::token());
                source.handle_completion(&completion, &mut ring);
            }
        }
    }
}
