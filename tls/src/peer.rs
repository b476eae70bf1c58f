//! The side of a peer link that dials: handshakes on the caller's thread, which may wait.

use std::io;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::handshake::Handshake;
use crate::identity::Identity;
use crate::introduction::{Before, Introduction};
use crate::names::peer_names;
use crate::secret::PeerSecret;
use crate::terminate::{Protection, Terminator};

/// A connection to a peer, ready for messages.
#[derive(Debug)]
pub struct Secured {
    /// Plain bytes go in and out here. It may be no TCP socket: the peer's address is not to be asked of it.
    pub stream: TcpStream,
    /// How it is protected; `None`: it is plain.
    pub protection: Option<Protection>,
    /// The names that it has proved to be: the one behind the secret, or those of its certificate. None where nothing is proved.
    pub names: Option<Vec<String>>,
}

/// What a connection to a peer begins with: TLS, the proof of the peer secret, both, or nothing.
#[derive(Debug, Default)]
pub struct PeerLinks {
    tls: Option<(Arc<Identity>, Arc<Terminator>)>,
    secret: Option<Arc<PeerSecret>>,
}

impl PeerLinks {
    /// Connections that begin with messages.
    pub fn plain() -> PeerLinks {
        PeerLinks::default()
    }

    /// Over TLS, with the certificates of `identity`, which is one for peers.
    pub fn with_tls(mut self, identity: Arc<Identity>, terminator: Arc<Terminator>) -> PeerLinks {
        self.tls = Some((identity, terminator));
        self
    }

    /// Both sides prove this secret.
    pub fn with_secret(mut self, secret: Arc<PeerSecret>) -> PeerLinks {
        self.secret = Some(secret);
        self
    }

    /// Connections begin with messages: there is no handshake.
    pub fn is_plain(&self) -> bool {
        self.tls.is_none() && self.secret.is_none()
    }

    /// Does the handshakes on a connection that is open; `peer` is the `HOST:PORT` that was dialled, whose host the peer's
    /// certificate has to be for.
    pub fn secure(&self, stream: TcpStream, peer: &str, time_max: Duration) -> io::Result<Secured> {
        let until = Instant::now() + time_max;
        let mut secured = Secured { stream, protection: None, names: None };
        if let Some((identity, terminator)) = &self.tls {
            let address = secured.stream.peer_addr()?;
            let failed = |error: io::Error| io::Error::new(error.kind(), format!("{peer} (peer_tls): {error}"));
            let config = identity.current().client.expect("an identity for peers");
            let host = peer.rsplit_once(':').map_or(peer, |(host, _)| host);
            let host = host.trim_start_matches('[').trim_end_matches(']');
            let handshake = Handshake::connect(secured.stream, config, host, time_max);
            let (socket, tls) = handshake.and_then(Handshake::run).map_err(io::Error::from).map_err(failed)?;
            let names = Some(peer_names(&tls));
            let (stream, protection) = terminator.take(socket, tls, address)?;
            secured = Secured { stream: stream.into(), protection: Some(protection), names };
        }
        if let Some(secret) = &self.secret {
            let failed = |error: io::Error| io::Error::new(error.kind(), format!("{peer}: {error}"));
            let left = until.saturating_duration_since(Instant::now());
            let before = Before { protection: secured.protection, names: secured.names };
            let introduction = Introduction::dial(secured.stream, before, secret, left);
            let proved = introduction.and_then(Introduction::run).map_err(io::Error::from);
            let (stream, name) = proved.map_err(failed)?;
            secured = Secured { stream, protection: secured.protection, names: Some(vec![name]) };
        }
        Ok(secured)
    }
}
