//! Connects to another node, and proves who this one is. For the link of a replica, snapshots and repairs; a simulated world gives its
//! own connections.

use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::Duration;

use walferry_cluster::member::Proved;
use walferry_engine::world;
use walferry_tls::{PeerLinks, Secured};

/// How long the handshakes behind it may take, of the secret and of TLS: five round trips of a long link.
const SECURE_TIME_MAX: Duration = Duration::from_secs(3);
/// The socket's receive buffer: a catch-up over a long link fills it.
const SOCKET_RECEIVE_BYTES: usize = 4 << 20;

/// A connection to a leader.
pub(crate) struct Connected {
    pub(crate) stream: TcpStream,
    /// Of the leader, where it has one; the stream may be no TCP socket and not know it.
    pub(crate) address: Option<SocketAddr>,
    /// The names that it has proved to be.
    pub(crate) proved: Option<Proved>,
}

pub(crate) fn connect_to(leader: &str, timeout: Duration, links: &PeerLinks) -> std::io::Result<Connected> {
    if let Some(connection) = world::simulated_connection(leader) {
        return connection.map(|stream| Connected { stream, address: None, proved: None });
    }
    let mut last = std::io::Error::new(std::io::ErrorKind::NotFound, format!("{leader} has no address"));
    for address in leader.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, timeout) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                // More than the default window for long links; the kernel caps it at net.core.rmem_max.
                let _ = nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::RcvBuf, &SOCKET_RECEIVE_BYTES);
                let Secured { stream, names, .. } = links.secure(stream, leader, SECURE_TIME_MAX)?;
                let proved = names.map(|names| Proved::of(names.iter().map(String::as_str)));
                return Ok(Connected { stream, address: Some(address), proved });
            }
            Err(error) => last = std::io::Error::new(error.kind(), format!("cannot connect to {address}: {error}")),
        }
    }
    Err(last)
}
