//! A listening socket on the ring. Used by `reactor` for clients and for peers; knows nothing of either.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use io_uring::{cqueue, opcode, types};
use nix::sys::socket::{SockaddrStorage, getsockname};
use walferry_engine::ring::{Completion, Owner, Ring, Token};
use walferry_engine::told::Told;
use walferry_engine::world;

/// The kernel closes the sockets of a ring a moment after its process is gone. A node that is started again at once waits this
/// long for its address.
const ADDRESS_WAIT_MAX: Duration = Duration::from_secs(5);
const ADDRESS_WAIT_STEP: Duration = Duration::from_millis(10);

/// The address of this host that a client connected to; none for what is no connection of a network.
pub fn local_ip(socket: &OwnedFd) -> Option<IpAddr> {
    let address: SockaddrStorage = getsockname(socket.as_raw_fd()).ok()?;
    let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
    // A client of IPv4 that came through a socket for both.
    v4.or_else(|| Some(IpAddr::V6(address.as_sockaddr_in6()?.ip()).to_canonical()))
}

/// A socket that accepts until it is dropped.
pub struct Listener {
    socket: TcpListener,
    id: u64,
    /// No descriptor was free: it accepts again when `arm_again` is called.
    resting: bool,
    told: Told,
}

impl Listener {
    /// Binds `address`; completions of this listener carry `id` (and `Owner::Accept`).
    pub fn bind(address: SocketAddr, id: u64) -> std::io::Result<Listener> {
        let (begun, mut said) = (world::now(), false);
        loop {
            // The standard library sets SO_REUSEADDR and a backlog of 4096 or so: what a server wants.
            match TcpListener::bind(address) {
                Err(error) if error.kind() == ErrorKind::AddrInUse && world::now() - begun < ADDRESS_WAIT_MAX => {
                    if !std::mem::replace(&mut said, true) {
                        tracing::info!(%address, "the address is taken, waiting for it for {ADDRESS_WAIT_MAX:?}");
                    }
                    std::thread::sleep(ADDRESS_WAIT_STEP);
                }
                bound => return Ok(Listener { socket: bound?, id, resting: false, told: Told::default() }),
            }
        }
    }

    /// The address that it listens on, the port chosen by the kernel included.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// A second descriptor of the socket, for somebody who accepts before this one is armed.
    pub fn second(&self) -> std::io::Result<TcpListener> {
        self.socket.try_clone()
    }

    /// The socket, for somebody else to accept.
    pub fn into_socket(self) -> TcpListener {
        self.socket
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

    /// Starts to accept again after descriptors ran out; call it now and then. At once it would fail at once, and turn the loop
    /// for nothing as long as somebody waits to be accepted.
    pub fn arm_again(&mut self, ring: &mut Ring) {
        if std::mem::take(&mut self.resting) {
            self.arm(ring);
        }
    }

    /// What a completion brought: a connection, or nothing because of an error that is logged. Arms itself again when the
    /// kernel ended the multishot, but for an error: then it rests.
    pub fn accepted(&mut self, completion: &Completion, ring: &mut Ring) -> Option<(OwnedFd, SocketAddr)> {
        let ended = !cqueue::more(completion.flags) && completion.result != -libc::ECANCELED;
        self.resting |= ended && completion.result < 0;
        if ended && !self.resting {
            self.arm(ring);
        }
        if completion.result < 0 {
            let error = std::io::Error::from_raw_os_error(-completion.result);
            // EMFILE and the like: the clients that wait in the backlog are accepted when descriptors are free again.
            if let Some(repeated) = self.told.tell(&error.to_string(), world::now()) {
                tracing::warn!(%error, repeated, "a connection could not be accepted");
            }
            return None;
        }
        // SAFETY: a successful accept hands over a descriptor that nobody else owns.
        let stream = unsafe { std::net::TcpStream::from_raw_fd(completion.result) };
        let address = stream.peer_addr().ok()?;
        Some((stream.into(), address))
    }
}
