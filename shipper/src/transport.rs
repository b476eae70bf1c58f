//! What carries a link: it says what may be asked of its socket. Found out by looking at the socket, so that whoever accepts need
//! not tell. Used by `link`.

use std::fmt;
use std::mem::size_of_val;
use std::os::fd::{AsRawFd, OwnedFd};

/// The longest name of an upper layer protocol, its zero included (TCP_ULP_NAME_MAX).
const UPPER_LAYER_NAME_BYTES: usize = 16;

/// What carries a link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// TCP as it is.
    #[default]
    Plain,
    /// TCP on which the kernel speaks TLS: `sendfile` stays zero-copy, SEND_ZC is not there.
    KernelTls,
    /// A local socket; at its other end a thread of this process speaks TLS.
    RelayedTls,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Transport::Plain => "plain",
            Transport::KernelTls => "ktls",
            Transport::RelayedTls => "relay",
        })
    }
}

impl Transport {
    /// What carries what goes through this socket.
    pub(crate) fn of(socket: &OwnedFd) -> Transport {
        let mut domain: libc::c_int = 0;
        option(socket, libc::SOL_SOCKET, libc::SO_DOMAIN, &mut domain);
        if domain == libc::AF_UNIX {
            return Transport::RelayedTls;
        }
        let mut name = [0_u8; UPPER_LAYER_NAME_BYTES];
        option(socket, libc::SOL_TCP, libc::TCP_ULP, &mut name);
        if name.starts_with(b"tls") { Transport::KernelTls } else { Transport::Plain }
    }
}

/// Reads an option of a socket; where it has none, `value` stays.
fn option<T: Copy>(socket: &OwnedFd, level: libc::c_int, name: libc::c_int, value: &mut T) {
    let mut length = size_of_val(value) as libc::socklen_t;
    let value = (&raw mut *value).cast();
    // SAFETY: `value` is plain data of `length` bytes, both live for the call.
    let _ = unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, value, &raw mut length) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_socket_tells_what_it_is() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let tcp = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert_eq!(Transport::of(&tcp.into()), Transport::Plain);
        assert_eq!(Transport::of(&UnixStream::pair().unwrap().0.into()), Transport::RelayedTls);
    }
}
