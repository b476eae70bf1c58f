//! The node's one thread: waits on the ring, hands each completion to its owner, and lets node and clients do their duties
//! once a turn. The only place where crates, sockets and signals are wired together. Holds no protocol knowledge.
//!
//! A turn: 1. sessions that left commands go on, dispatch completions (input is executed, records land in the open frame) -> 2. the node seals, submits, ships,
//! applies and says whose replies are released -> 3. sessions are woken -> 4. what they wrote is sealed, what they answered is
//! sent -> 5. one system call submits all of it and waits.

use std::cell::RefCell;
use std::net::{SocketAddr, TcpListener};
use std::rc::Rc;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use walferry_cluster::member::Caller;
use walferry_engine::file_size;
use walferry_engine::ring::{Completion, Owner, RING_ENTRIES_MAX, Ring};
use walferry_engine::waker::WakeSource;
use walferry_engine::world;
use walferry_tls::Accepted;

use crate::clients::Clients;
use crate::clients::limits::ClientLimits;
use crate::clients::recv_buffers::RecvBuffers;
use crate::config::{self, NodeConfig};
use crate::descriptors;
use crate::error::DaemonError;
use crate::listener::{self, Listener};
use crate::logging;
use crate::metrics::Metrics;
use crate::node::turn;
use crate::node::{self, Node};
use crate::notify::Notifier;
use crate::own_files;
use crate::peer_secret::SecretSettings;
use crate::session::client::SessionSettings;
use crate::signals::Signals;
use crate::tls::{Entrance, Tls, caller, unopened, warn_of_open_doors};
use crate::users::{Grant, Users};
use crate::watchdog::Phases;

const ACCEPT_CLIENTS: u64 = 0;
const ACCEPT_PEERS: u64 = 1;
const WAKE_SIGNAL: u64 = 1;
/// The ring is left at least this often, for timeouts and the watchdog.
const TURN_MAX: Duration = Duration::from_millis(100);
/// How long a stopping node waits for replies that are held or not yet sent.
const DRAIN_MAX: Duration = Duration::from_secs(2);

/// Everything that the loop drives. Fields drop in this order: the ring closes before the memory that it writes to is freed.
pub struct Reactor {
    ring: Ring,
    clients: Clients,
    node: Node,
    buffers: RecvBuffers,
    client_listener: Listener,
    /// `None` for a member of a cluster: its peers connect to the cluster's thread.
    peer_listener: Option<Listener>,
    peer_address: SocketAddr,
    tls: Tls,
    /// Of clients that speak TLS.
    tls_entrance: Option<Entrance>,
    /// Of peers that speak TLS, for a node that is no member of a cluster.
    peer_entrance: Option<Entrance>,
    wakes: WakeSource,
    metrics: Option<Metrics>,
    signals: Signals,
    notifier: Notifier,
    completions: Vec<Completion>,
    deadlines_checked: Instant,
}

impl Reactor {
    /// Opens the node and starts to listen. Recovery is complete when this returns.
    pub fn open(config: NodeConfig) -> Result<Reactor, DaemonError> {
        let notifier = Notifier::new();
        let signals = Signals::block(WAKE_SIGNAL).map_err(DaemonError::Descriptors)?;
        let mut ring = Ring::new(RING_ENTRIES_MAX)?;
        let (waker, wakes) = WakeSource::new().map_err(DaemonError::Descriptors)?;
        let listen = config::resolve("listen", &config.listen)?;
        let peer_listen = config::resolve("peer_listen", &config.peer_listen)?;
        let bind = |key, address: SocketAddr, id| {
            Listener::bind(address, id).map_err(|source| DaemonError::Listen { key, address, source })
        };
        let client_listener = bind("listen", listen, ACCEPT_CLIENTS)?;
        let peer_listener = bind("peer_listen", peer_listen, ACCEPT_PEERS)?;
        let peer_address = peer_listener.address().map_err(DaemonError::Descriptors)?;
        // Before the data directory is made: files that are of no use are named first.
        let tls = Tls::open(&config.tls)?;
        node::open::check(&config)?;
        SecretSettings::of(&config).check(peer_listen)?;
        let lock = node::open::prepare(&config)?;
        let tls = tls.with_secret(SecretSettings::of(&config).open()?);
        let tls_entrance = match &config.tls.listen {
            None => None,
            Some(listen) => {
                let address = config::resolve("tls_listen", listen)?;
                let failed = unopened("tls_listen", address);
                let listener = TcpListener::bind(address).map_err(&failed)?;
                tls.open_for_clients(listener, &waker).map_err(failed)?
            }
        };
        let metrics = match &config.metrics_listen {
            None => None,
            Some(listen) => {
                let (key, address) = ("metrics_listen", config::resolve("metrics_listen", listen)?);
                let failed = |source| DaemonError::Listen { key, address, source };
                Some(Metrics::start(address, waker.clone()).map_err(failed)?)
            }
        };
        let buffers = RecvBuffers::register(&ring).map_err(DaemonError::RecvBuffers)?;
        let users = match &config.users_file {
            Some(file) => Users::load(file)?,
            None => Users::open(config.password.as_deref()),
        };
        let client_address = client_listener.address().map_err(DaemonError::Descriptors)?;
        let unguarded = users.at_start().is_some_and(|user| user.grant >= Grant::Write);
        warn_of_open_doors(&config, unguarded, peer_listen);
        if unguarded && !client_address.ip().is_loopback() {
            tracing::warn!(
                listen = %client_address,
                "whoever reaches this address may do everything: name a users_file, or listen on 127.0.0.1 only"
            );
        }
        if let Some(limit) = file_size::limit_bytes() {
            tracing::warn!(
                "no file of this node may be larger than {limit} bytes, and it ends when its store's file has to be: raise \
                 RLIMIT_FSIZE (ulimit -f, LimitFSIZE= in the unit)"
            );
        }
        let users = Rc::new(RefCell::new(users));
        let settings = SessionSettings {
            users: Rc::clone(&users),
            places: Rc::default(),
            commit_level: Some(config.commit_level),
            commit_timeout: config.commit_timeout,
            read_wait_timeout: config.read_wait_timeout,
        };
        let per_client = if config.tls.listen.is_some() { descriptors::RELAYED_CLIENT_DESCRIPTORS } else { 1 };
        let limits = ClientLimits {
            clients_max: descriptors::raise_limit(config.clients_max, per_client)
                .map_err(DaemonError::DescriptorLimit)?,
            idle_timeout: config.client_idle_timeout,
            stalled_timeout: config.output_stalled_timeout,
            bytes_max: config.clients_bytes_max,
            authentication_timeout: config.authentication_timeout,
        };
        let clients = Clients::new(settings, limits);
        let client_address = match &tls_entrance {
            Some(entrance) => entrance.address(),
            None => client_address,
        };
        let serves_at = peer_listener.second().map_err(DaemonError::Descriptors)?;
        let (peer_listener, handed_over, peer_entrance) = match &config.members {
            None if tls.guards_peers() => (None, None, Some(peer_listener.into_socket())),
            None => (Some(peer_listener), None, None),
            Some(_) => (None, Some(peer_listener.into_socket()), None),
        };
        let take_role = |node: &mut Node| match handed_over {
            Some(listener) => node.join_members(listener),
            None => node.take_configured_role(),
        };
        let mut node = Node::open(
            (config, lock),
            client_address,
            (Some(&serves_at), tls.clone()),
            take_role,
            users,
            &mut ring,
            waker.clone(),
        )?;
        drop(serves_at);
        // Only now: while the node repaired its log, whoever came was asked for the secret by a gate of the repair's.
        let peer_entrance = peer_entrance.map(|listener| tls.open_for_peers(listener, &waker)).transpose();
        let peer_entrance = peer_entrance.map_err(unopened("peer_listen", peer_address))?;
        node.count(clients.counts(), 0);
        client_listener.arm(&mut ring);
        if let Some(listener) = &peer_listener {
            listener.arm(&mut ring);
        }
        wakes.arm(&mut ring);
        signals.arm(&mut ring);
        Ok(Reactor {
            ring,
            clients,
            node,
            buffers,
            client_listener,
            peer_listener,
            peer_address,
            tls,
            tls_entrance,
            peer_entrance,
            wakes,
            metrics,
            signals,
            notifier,
            completions: Vec::new(),
            deadlines_checked: world::now(),
        })
    }

    /// Says that the node serves: in the log, to systemd and in the ready file.
    fn announce(&self) -> Result<(), DaemonError> {
        let listen = self.client_listener.address().map_err(DaemonError::Descriptors)?;
        let peer_listen = self.peer_address;
        tracing::info!(%listen, %peer_listen, "{} serves", self.node.describe());
        let mut ready = format!("listen={listen}\npeer_listen={peer_listen}\n");
        if let Some(entrance) = &self.tls_entrance {
            let address = entrance.address();
            tracing::info!("clients over TLS at {address}");
            ready.push_str(&format!("tls_listen={address}\n"));
        }
        if let Some(metrics) = &self.metrics {
            let address = metrics.address();
            tracing::info!("metrics at http://{address}/metrics");
            ready.push_str(&format!("metrics_listen={address}\n"));
        }
        if let Some(file) = &self.node.config().ready_file {
            own_files::replace(file, ready.as_bytes())
                .map_err(|source| DaemonError::ReadyFile { file: file.clone(), source })?;
        }
        logging::finish();
        self.notifier.ready(&self.node.status_line());
        Ok(())
    }

    /// Serves until a signal asks it to end, or its log has stopped; then drains and closes.
    pub fn run(mut self) -> Result<(), DaemonError> {
        self.announce()?;
        let mut ready = Vec::new();
        loop {
            let timeout = self.node.timeout(world::now()).map_or(TURN_MAX, |timeout| timeout.min(TURN_MAX));
            let timeout = if self.clients.have_yielded() { Duration::ZERO } else { timeout };
            self.ring.submit_and_wait(Some(timeout)).map_err(DaemonError::Ring)?;
            if self.turn(&mut ready)? {
                break;
            }
        }
        self.drain(&mut ready)?;
        let Reactor { mut ring, clients, node, tls, .. } = self;
        let ended = node.ended();
        let closed = node.close(&mut ring);
        // What the relay still holds for clients goes out once their sockets are closed on this side.
        drop((ring, clients));
        tls.close();
        ended.map_or(closed, Err)
    }

    /// One turn of the loop; true when the node has to end.
    fn turn(&mut self, ready: &mut Vec<crate::session::id::SessionId>) -> Result<bool, DaemonError> {
        let now = world::now();
        self.node.set_now(now, world::wall_clock());
        let mut ending = false;
        self.clients.go_on(&mut self.node);
        let mut completions = std::mem::take(&mut self.completions);
        self.ring.completions(&mut completions);
        for completion in completions.drain(..) {
            ending |= self.dispatch(&completion, now)?;
        }
        self.completions = completions;
        let received = world::now();
        if now.duration_since(self.deadlines_checked) >= TURN_MAX {
            self.deadlines_checked = now;
            self.periodic(now, ready);
        }
        turn::run(&mut self.node, &mut self.ring, &mut self.clients, ready)?;
        if self.node.take_users_changed() {
            self.clients.follow_users();
        }
        for asked in self.node.take_client_asks() {
            self.clients.answer(asked, now, &mut self.node);
        }
        let served = world::now();
        self.clients.flush(&mut self.ring, &mut self.node);
        self.node.account();
        let ended = world::now();
        let phases = Phases { input: received - now, node: served - received, output: ended - served };
        if let Some(line) = self.node.watchdog.turn(&phases, ended) {
            tracing::warn!("{line}");
        }
        Ok(ending || self.node.ended().is_some())
    }

    fn dispatch(&mut self, completion: &Completion, now: Instant) -> Result<bool, DaemonError> {
        match completion.token.owner() {
            Owner::Client => {
                self.clients.handle_completion(completion, &mut self.buffers, &mut self.ring, &mut self.node);
            }
            Owner::Accept if completion.token.id() == ACCEPT_CLIENTS => {
                if let Some((socket, address)) = self.client_listener.accepted(completion, &mut self.ring) {
                    let reached_at = listener::local_ip(&socket);
                    self.clients.accept(socket, address, reached_at, &mut self.ring, now);
                }
            }
            Owner::Accept => {
                let accepted = self.peer_listener.as_mut().and_then(|all| all.accepted(completion, &mut self.ring));
                if let Some((socket, address)) = accepted {
                    self.node.accept_peer(socket, Caller::unproved(address), &mut self.ring, now);
                }
            }
            Owner::Wake if completion.token.id() == WAKE_SIGNAL => {
                let signal = self.signals.take();
                if signal == Some(Signal::SIGHUP) {
                    if self.node.config().users_file.is_some() || !self.tls.is_used() {
                        self.read_users();
                    }
                    self.tls.reload();
                } else if let Some(signal) = signal {
                    tracing::info!(%signal, "asked to end");
                    return Ok(true);
                }
                self.signals.arm(&mut self.ring);
            }
            Owner::Wake => {
                self.wakes.handle_completion(completion, &mut self.ring);
                self.take_secured(now);
                if let Some(metrics) = &self.metrics {
                    metrics.answer(|| self.node.metrics());
                }
            }
            Owner::Log | Owner::Peer => self.node.handle_completion(completion, &mut self.ring)?,
        }
        Ok(false)
    }

    fn read_users(&mut self) {
        if self.node.config.users_file.is_some()
            && let Err(error) = self.node.read_users()
        {
            tracing::error!("the users stay as they are: {error}");
        }
    }

    /// Connections that came through a gate.
    fn take_secured(&mut self, now: Instant) {
        while let Some(accepted) = self.tls_entrance.as_ref().and_then(Entrance::next) {
            let Accepted { socket, address, reached_at, .. } = accepted;
            self.clients.accept(socket, address, reached_at, &mut self.ring, now);
        }
        while let Some(accepted) = self.peer_entrance.as_ref().and_then(Entrance::next) {
            let caller = caller(&accepted);
            self.node.accept_peer(accepted.socket, caller, &mut self.ring, now);
        }
    }

    /// Ten times a second: deadlines and limits of clients, the watchdog, counters, listeners that rest.
    fn periodic(&mut self, now: Instant, ready: &mut Vec<crate::session::id::SessionId>) {
        self.notifier.alive(now);
        self.notifier.status(now, || self.node.status_line());
        let (counts, commands) = self.clients.look(now, ready);
        self.node.count(counts, commands);
        let peers = self.peer_listener.iter_mut();
        peers.chain(Some(&mut self.client_listener)).for_each(|listener| listener.arm_again(&mut self.ring));
    }

    /// Answers what is still held and sends it, for a bounded time.
    fn drain(&mut self, ready: &mut Vec<crate::session::id::SessionId>) -> Result<(), DaemonError> {
        self.notifier.stopping();
        let deadline = world::now() + DRAIN_MAX;
        while !self.clients.drained() && world::now() < deadline {
            self.ring.submit_and_wait(Some(TURN_MAX)).map_err(DaemonError::Ring)?;
            self.turn(ready)?;
        }
        Ok(())
    }
}
