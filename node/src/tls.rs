//! What the connections of a node begin with: TLS, with identities made of the configuration, and between peers the proof of their
//! secret; the gates where it is asked for, and what INFO tells of them. What is not configured is not there.

use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use walferry_cluster::error::MessageError;
use walferry_cluster::member::{Caller, Proved};
use walferry_cluster::message::{Message, Refuse, RefuseCode};
use walferry_engine::told::Told;
use walferry_engine::waker::Waker;
use walferry_engine::world;
use walferry_tls::{
    Accepted, Answers, Gate, GateConfig, GateTls, Identity, NamedFile, PeerLinks, PeerSecret, Purpose, Reloaded,
    Terminator,
};

use crate::config::{ConfigError, TlsConfig};
use crate::error::DaemonError;

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
    secret: Option<Arc<PeerSecret>>,
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
        let terminator = Terminator::new(config.kernel);
        Ok(Tls { terminator, clients: clients.transpose()?, peers: peers.transpose()?, secret: None })
    }

    /// Peers prove this secret.
    pub fn with_secret(self, secret: Option<Arc<PeerSecret>>) -> Tls {
        Tls { secret, ..self }
    }

    /// True when anything is TLS.
    pub fn is_used(&self) -> bool {
        self.clients.is_some() || self.peers.is_some()
    }

    /// True when connections of peers begin with a handshake.
    pub fn guards_peers(&self) -> bool {
        self.peers.is_some() || self.secret.is_some()
    }

    /// What connections to peers begin with.
    pub fn links(&self) -> Arc<PeerLinks> {
        let mut links = PeerLinks::plain();
        if let Some(identity) = &self.peers {
            links = links.with_tls(Arc::clone(identity), Arc::clone(&self.terminator));
        }
        if let Some(secret) = &self.secret {
            links = links.with_secret(Arc::clone(secret));
        }
        Arc::new(links)
    }

    /// Reads the files again.
    pub fn reload(&self) {
        for identity in self.clients.iter().chain(&self.peers) {
            // Success and failure have been logged.
            let (Reloaded::Unchanged | Reloaded::New | Reloaded::Kept(_)) = identity.reload();
        }
        if let Some(secret) = &self.secret {
            secret.reload();
        }
    }

    /// The gate of `tls_listen`.
    pub fn open_for_clients(&self, listener: TcpListener, waker: &Waker) -> std::io::Result<Option<Entrance>> {
        let Some(identity) = &self.clients else { return Ok(None) };
        let answer = b"-ERR this port speaks TLS (tls_listen): connect with redis-cli --tls or a rediss:// URL\r\n";
        let answers = Answers { plain: answer.to_vec(), ..Answers::default() };
        let (deliver, through) = delivery(waker);
        let gate = self.gate("tls_listen", (Some(identity), None), answers, listener, deliver)?;
        Ok(Some(Entrance { gate, through }))
    }

    /// The gate of `peer_listen`, for a node whose ring thread accepts its peers; peers are guarded.
    pub fn open_for_peers(&self, listener: TcpListener, waker: &Waker) -> std::io::Result<Entrance> {
        let (deliver, through) = delivery(waker);
        Ok(Entrance { gate: self.gate_for_peers(listener, deliver)?, through })
    }

    /// The gate of `peer_listen`; peers are guarded. `deliver` gets each connection, on the gate's thread.
    pub fn gate_for_peers(
        &self,
        listener: TcpListener,
        deliver: Box<dyn Fn(Accepted) + Send>,
    ) -> std::io::Result<Gate> {
        let answers = Answers {
            plain: refusal("this node's peers speak TLS: set peer_tls = true on both or on neither"),
            tls: refusal(&MessageError::Tls.to_string()),
            unproved: refusal(
                "this node's peers prove a secret: give this node the same file (--peer-secret FILE), or say --peer-auth none on both",
            ),
        };
        self.gate("peer_listen", (self.peers.as_ref(), self.secret.as_ref()), answers, listener, deliver)
    }

    fn gate(
        &self,
        option: &'static str,
        (identity, secret): (Option<&Arc<Identity>>, Option<&Arc<PeerSecret>>),
        answers: Answers,
        listener: TcpListener,
        deliver: Box<dyn Fn(Accepted) + Send>,
    ) -> std::io::Result<Gate> {
        let tls = identity
            .map(|identity| GateTls { identity: Arc::clone(identity), terminator: Arc::clone(&self.terminator) });
        Gate::start(listener, GateConfig { option, tls, secret: secret.cloned(), answers, deliver })
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

/// The refusal of a peer that does not do what the gate asks for.
fn refusal(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    Message::Refuse(Refuse { code: RefuseCode::Protocol, text: text.to_owned() }).encode(&mut bytes);
    bytes
}

/// Hands connections that came through to the ring thread, which is woken.
fn delivery(waker: &Waker) -> (Box<dyn Fn(Accepted) + Send>, Receiver<Accepted>) {
    let (outbox, through) = sync_channel(THROUGH_MAX);
    let waker = waker.clone();
    let told = Mutex::new(Told::default());
    let deliver = move |accepted: Accepted| {
        let address = accepted.address;
        let lost = outbox.try_send(accepted).is_err();
        if lost && told.lock().expect("nobody panics with it").tell("full", world::now()).is_some() {
            tracing::warn!(%address, "a connection is closed: {THROUGH_MAX} wait for the node already");
        }
        waker.wake();
    };
    (Box::new(deliver), through)
}

/// Who is at the other end of a connection that came through a gate.
pub fn caller(accepted: &Accepted) -> Caller {
    let proved = accepted.names.as_ref().map(|names| Proved::of(names.iter().map(String::as_str)));
    Caller { address: accepted.address, proved }
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
            "peer_listen = {peer_listen}: peers prove that they hold the secret, and what follows can be read and changed on the \
             way: set peer_tls unless the network is trusted"
        );
    }
}

/// A `DaemonError` for a gate that does not open.
pub fn unopened(key: &'static str, address: SocketAddr) -> impl Fn(std::io::Error) -> DaemonError {
    move |source| DaemonError::Listen { key, address, source }
}
