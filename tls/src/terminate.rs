//! Where TLS ends once both sides know each other: in the kernel where it can, else in the relay. One for a process.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustls::Connection;

use crate::ktls;
use crate::relay::{Job, Relay};

/// How a connection is protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// The kernel has the keys: the socket is the connection.
    Kernel,
    /// The relay has the keys: the socket is one end of a pair.
    Relay,
}

/// What happened to connections since the process started.
#[derive(Debug, Default)]
pub struct Counts {
    /// Handshakes that a gate ended well.
    pub accepted: AtomicU64,
    /// Handshakes that a gate gave up.
    pub failed: AtomicU64,
    /// Connections handed to the kernel.
    pub kernel: AtomicU64,
    /// Connections handed to the relay.
    pub relayed: AtomicU64,
    /// Of these, open now.
    pub relaying: AtomicU64,
    /// Plain bytes that the relay moved, either way.
    pub relay_bytes: AtomicU64,
}

/// Takes over connections whose handshake is done.
#[derive(Debug)]
pub struct Terminator {
    /// False once the kernel has refused.
    kernel: AtomicBool,
    relay: Mutex<Option<Relay>>,
    counts: Arc<Counts>,
}

impl Terminator {
    /// `kernel` says whether the kernel is asked at all.
    pub fn new(kernel: bool) -> Arc<Terminator> {
        Arc::new(Terminator { kernel: AtomicBool::new(kernel), relay: Mutex::new(None), counts: Arc::default() })
    }

    /// What happened so far.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Gives the socket on which plain bytes go in and out; it blocks.
    pub(crate) fn take(
        &self,
        socket: TcpStream,
        tls: Connection,
        address: SocketAddr,
    ) -> io::Result<(OwnedFd, Protection)> {
        if self.kernel.load(Ordering::Relaxed) && ktls::fits(&tls) && self.attach(&socket) {
            socket.set_nonblocking(false)?;
            if let Err(error) = ktls::give_keys(&socket, tls) {
                self.kernel.store(false, Ordering::Relaxed);
                tracing::warn!(%address, "the kernel took no TLS keys ({error}): from now on a thread does its work; this connection ends");
                return Err(error);
            }
            self.counts.kernel.fetch_add(1, Ordering::Relaxed);
            return Ok((socket.into(), Protection::Kernel));
        }
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        self.counts.relayed.fetch_add(1, Ordering::Relaxed);
        self.relay(Job { tls, tcp: socket, local: ours, address })?;
        Ok((theirs.into(), Protection::Relay))
    }

    fn attach(&self, socket: &TcpStream) -> bool {
        match ktls::attach(socket) {
            Ok(()) => true,
            // The other side is gone already; the relay will notice as well.
            Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => false,
            Err(error) => {
                if self.kernel.swap(false, Ordering::Relaxed) {
                    tracing::info!("the kernel offers no TLS ({error}; module tls): a thread does its work");
                }
                false
            }
        }
    }

    fn relay(&self, job: Job) -> io::Result<()> {
        let mut relay = self.relay.lock().expect("nobody panics with it");
        if relay.is_none() {
            *relay = Some(Relay::start(Arc::clone(&self.counts))?);
        }
        match &*relay {
            Some(relay) => relay.take(job),
            None => unreachable!("just started"),
        }
    }

    /// Lets the relay send what it holds, for at most so long. Whoever used its connections has closed them.
    pub fn close(&self, time_max: Duration) {
        if let Some(relay) = self.relay.lock().expect("nobody panics with it").take() {
            relay.end(time_max);
        }
    }
}
