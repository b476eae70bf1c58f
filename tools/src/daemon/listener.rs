//! A listening socket on the ring. Used by `reactor` for clients and for peers; knows nothing of either.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use io_uring::{cqueue, opcode, types};
use walferry_engine::ring::{Completion, Owner, Ring, Token};

/// A socket that accepts until it is dropped.
pub struct Listener {
    socket: TcpListener,
    id: u64,
}

impl Listener {
    /// Binds `address`; completions of this listener carry `id` (and `Owner::Accept`).
    pub fn bind(address: SocketAddr, id: u64) -> std::io::Result<Listener> {
        // The standard library sets SO_REUSEADDR and a backlog of 4096 or so: what a server wants.
        Ok(Listener { socket: TcpListener::bind(address)?, id })
    }

    /// The address that it listens on, the port chosen by the kernel included.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Starts to accept.
    pub fn arm(&self, ring: &mut Ring) {
        let entry = opcode::AcceptMulti::new(types::Fd(self.socket.as_raw_fd()))
            .flags(libc::SOCK_CLOEXEC)
            .build()
            .user_data(Token::new(Owner::Accept, self.id).into());
        // SAFETY: names no memory; the listener lives as long as the reactor.
        unsafe { ring.push(entry) };
    }

    /// What a completion brought: a connection, or nothing because of an error that is logged. Arms itself again when the
    /// kernel ended the multishot.
    pub fn accepted(&self, completion: &Completion, ring: &mut Ring) -> Option<(OwnedFd, SocketAddr)> {
        if !cqueue::more(completion.flags) && completion.result != -libc::ECANCELED {
            self.arm(ring);
        }
        if completion.result < 0 {
            let error = std::io::Error::from_raw_os_error(-completion.result);
            // EMFILE and the like: the clients that wait in the backlog are accepted when descriptors are free again.
            tracing::warn!(%error, "a connection could not be accepted");
            return None;
        }
        // SAFETY: a successful accept hands over a descriptor that nobody else owns.
        let stream = unsafe { std::net::TcpStream::from_raw_fd(completion.result) };
        let address = stream.peer_addr().ok()?;
        Some((stream.into(), address))
    }
}
