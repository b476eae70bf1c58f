//! The side of a peer link that connects: a handshake on the caller's thread, which may wait.

use std::io;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use crate::handshake::Handshake;
use crate::identity::Identity;
use crate::terminate::{Protection, Terminator};

/// A connection to a peer, protected.
#[derive(Debug)]
pub struct Secured {
    /// Plain bytes go in and out here. It may be no TCP socket: the peer's address is not to be asked of it.
    pub stream: TcpStream,
    /// How.
    pub protection: Protection,
}

/// What it takes to connect to peers over TLS.
#[derive(Debug)]
pub struct PeerTls {
    identity: Arc<Identity>,
    terminator: Arc<Terminator>,
}

impl PeerTls {
    /// With the certificates of `identity`, which is one for peers.
    pub fn new(identity: Arc<Identity>, terminator: Arc<Terminator>) -> PeerTls {
        PeerTls { identity, terminator }
    }

    /// Does the handshake on a connection that is open; `peer` is the `HOST:PORT` that was dialled, whose host the peer's
    /// certificate has to be for.
    pub fn secure(&self, stream: TcpStream, peer: &str, time_max: Duration) -> io::Result<Secured> {
        let address = stream.peer_addr()?;
        let failed = |error: io::Error| io::Error::new(error.kind(), format!("{peer} (peer_tls): {error}"));
        let config = self.identity.current().client.expect("an identity for peers");
        let host = peer.rsplit_once(':').map_or(peer, |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let handshake = Handshake::connect(stream, config, host, time_max);
        let (socket, tls) = handshake.and_then(Handshake::run).map_err(io::Error::from).map_err(failed)?;
        let (stream, protection) = self.terminator.take(socket, tls, address)?;
        Ok(Secured { stream: stream.into(), protection })
    }
}
