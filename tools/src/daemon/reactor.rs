//! The node's one thread: waits on the ring, hands each completion to its owner, and lets node and clients do their duties
//! once a turn. The only place where crates, sockets and signals are wired together. Holds no protocol knowledge.
//!
//! A turn: 1. dispatch completions (input is executed, records land in the open frame) -> 2. the node seals, submits, ships,
//! applies and says whose replies are released -> 3. sessions are woken -> 4. what they wrote is sealed, what they answered is
//! sent -> 5. one system call submits all of it and waits.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};

use walferry_engine::ring::{Completion, Owner, RING_ENTRIES_MAX, Ring};
use walferry_engine::waker::WakeSource;

use super::DaemonError;
use super::clients::Clients;
use super::listener::Listener;
use super::metrics::Metrics;
use super::node::Node;
use super::notify::Notifier;
use super::recv_buffers::RecvBuffers;
use super::session::SessionSettings;
use super::signals::Signals;
use crate::config::{self, NodeConfig};

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
    peer_listener: Listener,
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
        let signals = Signals::block(WAKE_SIGNAL).map_err(DaemonError::Signals)?;
        let mut ring = Ring::new(RING_ENTRIES_MAX)?;
        let (waker, wakes) = WakeSource::new().map_err(DaemonError::Signals)?;
        let listen = config::resolve("listen", &config.listen)?;
        let peer_listen = config::resolve("peer_listen", &config.peer_listen)?;
        let bind = |key, address: SocketAddr, id| {
            Listener::bind(address, id).map_err(|source| DaemonError::Listen { key, address, source })
        };
        let client_listener = bind("listen", listen, ACCEPT_CLIENTS)?;
        let peer_listener = bind("peer_listen", peer_listen, ACCEPT_PEERS)?;
        let metrics = match &config.metrics_listen {
            None => None,
            Some(listen) => {
                let (key, address) = ("metrics_listen", config::resolve("metrics_listen", listen)?);
                let failed = |source| DaemonError::Listen { key, address, source };
                Some(Metrics::start(address, waker.clone()).map_err(failed)?)
            }
        };
        let buffers = RecvBuffers::register(&ring).map_err(DaemonError::RecvBuffers)?;
        let settings = SessionSettings {
            password: config.password.as_deref().map(Rc::from),
            commit_level: Some(config.commit_level),
            commit_timeout: config.commit_timeout,
        };
        let clients = Clients::new(settings, config.clients_max);
        let client_address = client_listener.address().map_err(DaemonError::Signals)?;
        let node = Node::open(config, client_address, &mut ring, waker)?;
        client_listener.arm(&mut ring);
        peer_listener.arm(&mut ring);
        wakes.arm(&mut ring);
        signals.arm(&mut ring);
        Ok(Reactor {
            ring,
            clients,
            node,
            buffers,
            client_listener,
            peer_listener,
            wakes,
            metrics,
            signals,
            notifier,
            completions: Vec::new(),
            deadlines_checked: Instant::now(),
        })
    }

    /// Says that the node serves: in the log, to systemd and in the ready file.
    fn announce(&self) -> Result<(), DaemonError> {
        let listen = self.client_listener.address().map_err(DaemonError::Signals)?;
        let peer_listen = self.peer_listener.address().map_err(DaemonError::Signals)?;
        tracing::info!(%listen, %peer_listen, "{} serves", self.node.describe());
        let mut ready = format!("listen={listen}\npeer_listen={peer_listen}\n");
        if let Some(metrics) = &self.metrics {
            let address = metrics.address();
            tracing::info!("metrics at http://{address}/metrics");
            ready.push_str(&format!("metrics_listen={address}\n"));
        }
        if let Some(file) = &self.node.config().ready_file {
            // Renamed into place, so that whoever waits for the file never reads half of it.
            let partial = file.with_extension("partial");
            std::fs::write(&partial, ready)
                .and_then(|()| std::fs::rename(&partial, file))
                .map_err(|source| DaemonError::ReadyFile { file: file.clone(), source })?;
        }
        self.notifier.ready(&self.node.describe());
        Ok(())
    }

    /// Serves until a signal asks it to end; then drains and closes.
    pub fn run(mut self) -> Result<(), DaemonError> {
        self.announce()?;
        let mut ready = Vec::new();
        loop {
            let timeout = self.node.timeout(Instant::now()).map_or(TURN_MAX, |timeout| timeout.min(TURN_MAX));
            self.ring.submit_and_wait(Some(timeout)).map_err(DaemonError::Ring)?;
            if self.turn(&mut ready)? {
                break;
            }
        }
        self.drain(&mut ready)?;
        self.node.close(&mut self.ring)
    }

    /// One turn of the loop; true when the node is asked to end.
    fn turn(&mut self, ready: &mut Vec<super::host::SessionId>) -> Result<bool, DaemonError> {
        let now = Instant::now();
        self.node.set_now(now, SystemTime::now());
        let mut ending = false;
        let mut completions = std::mem::take(&mut self.completions);
        self.ring.completions(&mut completions);
        for completion in completions.drain(..) {
            ending |= self.dispatch(&completion, now)?;
        }
        self.completions = completions;
        self.node.poll(&mut self.ring, ready)?;
        if now.duration_since(self.deadlines_checked) >= TURN_MAX {
            self.deadlines_checked = now;
            self.periodic(now, ready);
        }
        if !ready.is_empty() {
            for session in ready.drain(..) {
                self.clients.wake(session, &mut self.node);
            }
            // What the woken sessions wrote goes out with this turn, not with the next.
            self.node.submit(&mut self.ring);
        }
        self.clients.flush(&mut self.ring, &mut self.node);
        self.node.account();
        Ok(ending)
    }

    fn dispatch(&mut self, completion: &Completion, now: Instant) -> Result<bool, DaemonError> {
        match completion.token.owner() {
            Owner::Log => self.node.handle_log(completion),
            Owner::Client => {
                self.clients.handle_completion(completion, &mut self.buffers, &mut self.ring, &mut self.node);
            }
            Owner::Peer => self.node.handle_peer(completion, &mut self.ring)?,
            Owner::Accept if completion.token.id() == ACCEPT_CLIENTS => {
                if let Some((socket, address)) = self.client_listener.accepted(completion, &mut self.ring) {
                    self.clients.accept(socket, address, &mut self.ring);
                }
            }
            Owner::Accept => {
                if let Some((socket, address)) = self.peer_listener.accepted(completion, &mut self.ring) {
                    self.node.accept_peer(socket, address, &mut self.ring, now);
                }
            }
            Owner::Wake if completion.token.id() == WAKE_SIGNAL => {
                if let Some(signal) = self.signals.take() {
                    tracing::info!(%signal, "asked to end");
                    return Ok(true);
                }
                self.signals.arm(&mut self.ring);
            }
            Owner::Wake => {
                self.wakes.handle_completion(completion, &mut self.ring);
                if let Some(metrics) = &self.metrics {
                    metrics.answer(|| self.node.snapshot());
                }
            }
            Owner::Timer => {}
        }
        Ok(false)
    }

    /// Ten times a second: deadlines of sessions, the watchdog, counters.
    fn periodic(&mut self, now: Instant, ready: &mut Vec<super::host::SessionId>) {
        self.notifier.alive(now);
        let mut commands = 0;
        let abandoned = self.node.take_abandoned();
        self.clients.for_each(|session| {
            commands += session.take_commands();
            if let Some(reason) = &abandoned {
                session.abandon(reason);
            }
            if abandoned.is_some() || session.deadline().is_some_and(|deadline| deadline <= now) {
                ready.push(session.id());
            }
        });
        self.node.count(self.clients.len(), commands);
    }

    /// Answers what is still held and sends it, for a bounded time.
    fn drain(&mut self, ready: &mut Vec<super::host::SessionId>) -> Result<(), DaemonError> {
        self.notifier.stopping();
        let deadline = Instant::now() + DRAIN_MAX;
        while !self.clients.drained() && Instant::now() < deadline {
            self.ring.submit_and_wait(Some(TURN_MAX)).map_err(DaemonError::Ring)?;
            self.turn(ready)?;
        }
        Ok(())
    }
}
