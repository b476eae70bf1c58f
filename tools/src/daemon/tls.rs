//! A node's part in TLS: its identities made of the configuration, its gates, the kernel or the relay behind them, and what INFO
//! tells of them. What is not configured is not there.

use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use walferry_cluster::message::{Message, Refuse, RefuseCode};
use walferry_engine::told::Told;
use walferry_engine::waker::Waker;
use walferry_engine::world;
use walferry_tls::{Accepted, Gate, GateConfig, Identity, NamedFile, PeerTls, Purpose, Reloaded, Terminator};

use super::DaemonError;
use crate::config::{ConfigError, TlsConfig};

/// Connections that came through a gate and wait for the ring thread; beyond it they are closed.
const THROUGH_MAX: usize = 4096;
/// How long a node that ends waits for the relay to send what it holds.
const CLOSE_TIME_MAX: Duration = Duration::from_secs(1);

/// What a node has of TLS.
#[derive(Clone, Debug)]
pub struct Tls {
    terminator: Arc<Terminator>,
    clients: Option<Arc<Identity>>,
    peers: Option<Arc<Identity>>,
}

impl Tls {
    /// Reads the files that the configuration names.
    pub fn open(config: &TlsConfig) -> Result<Tls, ConfigError> {
        let load = |purpose| {
            let pair = config.certificate.as_ref().zip(config.key.as_ref());
            let (certificate, key) = pair.expect("the configuration was checked");
            Identity::load(NamedFile::new("tls_cert", certificate), NamedFile::new("tls_key", key), purpose)
                .map(Arc::new)
        };
        let ca = config.ca.as_ref().filter(|_| config.client_auth).map(|ca| NamedFile::new("tls_ca", ca));
        let clients = config.listen.as_ref().map(|_| load(Purpose::Clients { ca }));
        let peer_ca = config.peer_ca.as_ref().filter(|_| config.peers);
        let option = if config.peer_ca == config.ca { "tls_ca" } else { "peer_tls_ca" };
        let peers = peer_ca.map(|ca| load(Purpose::Peers { ca: NamedFile::new(option, ca) }));
        Ok(Tls { terminator: Terminator::new(config.kernel), clients: clients.transpose()?, peers: peers.transpose()? })
    }

    /// True when anything is TLS.
    pub fn is_used(&self) -> bool {
        self.clients.is_some() || self.peers.is_some()
    }

    /// What it takes to connect to peers; none when that is plain.
    pub fn peer(&self) -> Option<Arc<PeerTls>> {
        let identity = Arc::clone(self.peers.as_ref()?);
        Some(Arc::new(PeerTls::new(identity, Arc::clone(&self.terminator))))
    }

    /// Reads the files again.
    pub fn reload(&self) {
        for identity in self.clients.iter().chain(&self.peers) {
            // Success and failure have been logged.
            let (Reloaded::Unchanged | Reloaded::New | Reloaded::Kept(_)) = identity.reload();
        }
    }

    /// The gate of `tls_listen`.
    pub fn open_for_clients(&self, listener: TcpListener, waker: &Waker) -> std::io::Result<Option<Entrance>> {
        let answer = b"-ERR this port speaks TLS (tls_listen): connect with redis-cli --tls or a rediss:// URL\r\n";
        self.clients
            .as_ref()
            .map(|identity| self.entrance("tls_listen", identity, answer.to_vec(), listener, waker))
            .transpose()
    }

    /// The gate of `peer_listen`, for a node whose ring thread accepts its peers.
    pub fn open_for_peers(&self, listener: TcpListener, waker: &Waker) -> std::io::Result<Option<Entrance>> {
        self.peers
            .as_ref()
            .map(|identity| self.entrance("peer_listen", identity, refusal(), listener, waker))
            .transpose()
    }

    fn entrance(
        &self,
        option: &'static str,
        identity: &Arc<Identity>,
        plain_answer: Vec<u8>,
        listener: TcpListener,
        waker: &Waker,
    ) -> std::io::Result<Entrance> {
        let (outbox, through) = sync_channel(THROUGH_MAX);
        let waker = waker.clone();
        let told = Mutex::new(Told::default());
        let deliver = move |accepted: Accepted| {
            let address = accepted.address;
            let lost = outbox.try_send(accepted).is_err();
            if lost && told.lock().expect("nobody panics with it").tell("full", world::now()).is_some() {
                tracing::warn!(%address, "a TLS connection is closed: {THROUGH_MAX} wait for the node already");
            }
            waker.wake();
        };
        let gate = self.gate(option, identity, plain_answer, listener, Box::new(deliver))?;
        Ok(Entrance { gate, through })
    }

    /// The gate of `peer_listen`, for a member, whose cluster thread accepts its peers. None when peers are plain; then the
    /// listener is given back.
    pub fn gate_for_members(
        &self,
        listener: TcpListener,
        deliver: Box<dyn Fn(Accepted) + Send>,
    ) -> std::io::Result<Result<Gate, TcpListener>> {
        match &self.peers {
            None => Ok(Err(listener)),
            Some(identity) => self.gate("peer_listen", identity, refusal(), listener, deliver).map(Ok),
        }
    }

    fn gate(
        &self,
        option: &'static str,
        identity: &Arc<Identity>,
        plain_answer: Vec<u8>,
        listener: TcpListener,
        deliver: Box<dyn Fn(Accepted) + Send>,
    ) -> std::io::Result<Gate> {
        let terminator = Arc::clone(&self.terminator);
        Gate::start(listener, GateConfig { option, identity: Arc::clone(identity), terminator, plain_answer, deliver })
    }

    /// What INFO tells.
    pub fn lines(&self) -> Vec<(String, String)> {
        if !self.is_used() {
            return Vec::new();
        }
        let counts = self.terminator.counts();
        [
            ("tls_handshakes", &counts.accepted),
            ("tls_handshakes_failed", &counts.failed),
            ("tls_ktls_connections", &counts.kernel),
            ("tls_relay_connections", &counts.relayed),
            ("tls_relay_connections_now", &counts.relaying),
            ("tls_relay_bytes", &counts.relay_bytes),
        ]
        .map(|(key, count)| (key.to_owned(), count.load(Ordering::Relaxed).to_string()))
        .to_vec()
    }

    /// Lets the relay send what it holds; the connections that it serves are closed on this side.
    pub fn close(&self) {
        self.terminator.close(CLOSE_TIME_MAX);
    }
}

/// What a peer that does not speak TLS is told.
fn refusal() -> Vec<u8> {
    let text = "this node's peers speak TLS: set peer_tls = true on both or on neither".to_owned();
    let mut bytes = Vec::new();
    Message::Refuse(Refuse { code: RefuseCode::Protocol, text }).encode(&mut bytes);
    bytes
}

/// A gate whose connections the ring thread takes when it was woken.
pub struct Entrance {
    gate: Gate,
    through: Receiver<Accepted>,
}

impl Entrance {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.gate.address()
    }

    /// The next connection that came through, if there is one.
    pub fn next(&self) -> Option<Accepted> {
        self.through.try_recv().ok()
    }
}

/// Says once what a start on addresses that others reach leaves open, those of plain clients aside. `unguarded` says that a client
/// may do everything without a word about who it is.
pub fn warn_of_open_doors(config: &crate::config::NodeConfig, unguarded: bool, peer_listen: SocketAddr) {
    let tls_listen = config.tls.listen.as_ref().and_then(|listen| listen.resolve().ok());
    if let Some(listen) = tls_listen.filter(|listen| !listen.ip().is_loopback())
        && unguarded
        && !config.tls.client_auth
    {
        tracing::warn!(
            "tls_listen = {listen}: encrypted, and yet whoever reaches it may do everything: name a users_file, or set \
             tls_client_auth"
        );
    }
    if !peer_listen.ip().is_loopback() && !config.tls.peers {
        tracing::warn!(
            "peer_listen = {peer_listen}: whoever reaches it can be a replica and read the log: set peer_tls"
        );
    }
}

/// A `DaemonError` for a gate that does not open.
pub fn unopened(key: &'static str, address: SocketAddr) -> impl Fn(std::io::Error) -> DaemonError {
    move |source| DaemonError::Listen { key, address, source }
}
