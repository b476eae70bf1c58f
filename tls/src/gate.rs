//! A listener whose connections begin with a handshake: of TLS, or the proof of the peer secret, or one after the other. Accepts
//! on a thread of its own, bounded in number and time, and hands over those that came through. Nobody who does not speak, or not
//! TLS, or has no certificate that counts, or does not hold the secret, gets further than this.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::{HandshakeError, ProofError};
use crate::handshake::{HANDSHAKE_TIME_MAX, Handshake, Parting, Step};
use crate::identity::Identity;
use crate::introduction::{Before, Introduction};
use crate::names::{is_peer, peer_names};
use crate::quota::Quota;
use crate::secret::PeerSecret;
use crate::terminate::{Protection, Terminator};

/// Handshakes at once; beyond it the next ones wait in the listener's backlog.
const HANDSHAKES_MAX: usize = 256;
/// When all of them are taken, the oldest has to give way once it has had this long.
const HANDSHAKE_TIME_SURE: Duration = Duration::from_millis(500);
/// Refused connections that are kept until they have read why; beyond it the oldest is closed.
const PARTINGS_MAX: usize = 64;
/// After a failed accept (no descriptors left) nobody is accepted for so long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const _: () = assert!(HANDSHAKE_TIME_SURE.as_millis() < HANDSHAKE_TIME_MAX.as_millis());

/// A connection that came through.
#[derive(Debug)]
pub struct Accepted {
    /// Plain bytes go in and out here.
    pub socket: OwnedFd,
    /// Who is at the other end.
    pub address: SocketAddr,
    /// At which address of this host it came in.
    pub reached_at: Option<IpAddr>,
    /// How it is protected; `None`: it is plain.
    pub protection: Option<Protection>,
    /// The names that it has proved to be: the one behind the secret, or those of its certificate. None where nothing is proved.
    pub names: Option<Vec<String>>,
}

/// How a gate speaks TLS.
#[derive(Debug)]
pub struct GateTls {
    /// Who this node is.
    pub identity: Arc<Identity>,
    /// Who takes over.
    pub terminator: Arc<Terminator>,
}

/// The answers to those who are refused, in the words of the protocol behind the gate.
#[derive(Clone, Debug, Default)]
pub struct Answers {
    /// Who does not speak TLS, and has to.
    pub plain: Vec<u8>,
    /// Who speaks TLS, where it is not spoken.
    pub tls: Vec<u8>,
    /// Who proves nothing, and has to.
    pub unproved: Vec<u8>,
}

/// What a gate is given.
pub struct GateConfig {
    /// The option that opened it, for messages.
    pub option: &'static str,
    /// How TLS is spoken, if it is.
    pub tls: Option<GateTls>,
    /// What has to be proved after that, if anything.
    pub secret: Option<Arc<PeerSecret>>,
    /// What those are told who are refused.
    pub answers: Answers,
    /// Gets each connection, on the gate's thread.
    pub deliver: Box<dyn Fn(Accepted) + Send>,
}

/// A running gate; dropped, it ends.
#[derive(Debug)]
pub struct Gate {
    address: SocketAddr,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Gate {
    /// Starts the thread.
    pub fn start(listener: TcpListener, config: GateConfig) -> io::Result<Gate> {
        let address = listener.local_addr()?;
        listener.set_nonblocking(true)?;
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?);
        let now = Instant::now();
        let worker = Worker {
            listener,
            config,
            stop: Arc::clone(&stop),
            handshakes: VecDeque::new(),
            partings: VecDeque::new(),
            accept_from: now,
            quota: Quota::new(now),
        };
        let thread = std::thread::Builder::new().name("gate".to_owned()).spawn(move || worker.run())?;
        Ok(Gate { address, stop, thread: Some(thread) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        if self.stop.write(1).is_ok()
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
    }
}

/// Where a connection stands.
enum Stage {
    Tls(Box<Handshake>),
    Proof(Box<Introduction>),
}

impl Stage {
    fn socket(&self) -> &TcpStream {
        match self {
            Stage::Tls(handshake) => &handshake.socket,
            Stage::Proof(introduction) => &introduction.socket,
        }
    }

    fn deadline(&self) -> Instant {
        match self {
            Stage::Tls(handshake) => handshake.deadline,
            Stage::Proof(introduction) => introduction.deadline,
        }
    }

    fn step(&mut self) -> Result<Step, HandshakeError> {
        match self {
            Stage::Tls(handshake) => handshake.step(),
            Stage::Proof(introduction) => introduction.step(),
        }
    }

    fn into_socket(self) -> TcpStream {
        match self {
            Stage::Tls(handshake) => handshake.socket,
            Stage::Proof(introduction) => introduction.socket,
        }
    }
}

struct Pending {
    stage: Stage,
    address: SocketAddr,
    reached_at: Option<IpAddr>,
    since: Instant,
    waits: PollFlags,
}

/// What follows on a stage.
enum Next {
    Stage(Stage),
    Through(Accepted),
}

struct Worker {
    listener: TcpListener,
    config: GateConfig,
    stop: Arc<EventFd>,
    /// In the order of their beginning.
    handshakes: VecDeque<Pending>,
    partings: VecDeque<Parting>,
    accept_from: Instant,
    quota: Quota,
}

impl Worker {
    fn run(mut self) {
        loop {
            let now = Instant::now();
            let accepts = now >= self.accept_from && self.has_capacity(now);
            let ready = self.wait(accepts, now);
            if ready[0] {
                return;
            }
            let now = Instant::now();
            let (listener, handshakes) = (ready[1], &ready[2..]);
            let begun = std::mem::take(&mut self.handshakes);
            for (pending, ready) in begun.into_iter().zip(handshakes) {
                if *ready || now >= pending.stage.deadline() {
                    self.step(pending, now);
                } else {
                    self.handshakes.push_back(pending);
                }
            }
            self.partings.retain_mut(|parting| !parting.is_over());
            if listener && accepts {
                self.accept(now);
            }
        }
    }

    fn has_capacity(&self, now: Instant) -> bool {
        self.handshakes.len() < HANDSHAKES_MAX
            || self.handshakes.front().is_some_and(|oldest| now >= oldest.since + HANDSHAKE_TIME_SURE)
    }

    /// Which of stop, listener and handshakes, in this order, have something.
    fn wait(&self, accepts: bool, now: Instant) -> Vec<bool> {
        let listens = if accepts { PollFlags::POLLIN } else { PollFlags::empty() };
        let mut all =
            vec![PollFd::new(self.stop.as_fd(), PollFlags::POLLIN), PollFd::new(self.listener.as_fd(), listens)];
        all.extend(self.handshakes.iter().map(|pending| PollFd::new(pending.stage.socket().as_fd(), pending.waits)));
        all.extend(self.partings.iter().map(|parting| PollFd::new(parting.socket.as_fd(), PollFlags::POLLIN)));
        let deadlines = self.handshakes.iter().map(|pending| pending.stage.deadline());
        let mut next = deadlines.chain(self.partings.iter().map(|parting| parting.until)).min();
        if !accepts {
            let place_from = self.handshakes.front().map(|oldest| oldest.since + HANDSHAKE_TIME_SURE);
            let from = if now < self.accept_from { Some(self.accept_from) } else { place_from };
            next = next.into_iter().chain(from).min();
        }
        let timeout = next.map_or(PollTimeout::NONE, |at| {
            let left = at.saturating_duration_since(now) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut all, timeout) {
            Ok(_) => {}
            Err(nix::errno::Errno::EINTR) => return vec![false; all.len()],
            Err(error) => {
                // Nothing that passes: too many descriptors for this process.
                tracing::error!(%error, option = self.config.option, "a listener has ended");
                return vec![true; all.len()];
            }
        }
        all.iter().map(|fd| fd.any().unwrap_or(true)).collect()
    }

    fn accept(&mut self, now: Instant) {
        let (socket, address) = match self.listener.accept() {
            Ok(accepted) => accepted,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => {
                if self.quota.take(now) {
                    tracing::warn!(%error, option = self.config.option, "a connection could not be accepted");
                }
                self.accept_from = now + ACCEPT_PAUSE;
                return;
            }
        };
        if self.handshakes.len() >= HANDSHAKES_MAX
            && let Some(oldest) = self.handshakes.pop_front()
        {
            self.refuse(oldest.stage.into_socket(), oldest.address, &HandshakeError::Slow);
        }
        if let Err(error) = socket.set_nodelay(true) {
            tracing::debug!(%address, %error, "TCP_NODELAY was refused");
        }
        let reached_at = socket.local_addr().ok().map(|local| local.ip().to_canonical());
        match self.first_stage(socket) {
            Ok(stage) => self.step(Pending { stage, address, reached_at, since: now, waits: PollFlags::POLLIN }, now),
            Err(error) if !self.quota.take(now) => tracing::debug!(%address, "a handshake cannot begin: {error}"),
            Err(error) => tracing::warn!(%address, "a handshake cannot begin: {error}"),
        }
    }

    fn first_stage(&self, socket: TcpStream) -> Result<Stage, HandshakeError> {
        match (&self.config.tls, &self.config.secret) {
            (Some(tls), _) => Handshake::accept(socket, tls.identity.current().server).map(Box::new).map(Stage::Tls),
            (None, Some(secret)) => {
                Introduction::accept(socket, Before::default(), secret).map(Box::new).map(Stage::Proof)
            }
            (None, None) => unreachable!("a gate asks for something"),
        }
    }

    fn step(&mut self, mut pending: Pending, now: Instant) {
        match pending.stage.step() {
            Ok(Step::Done) => self.advance(pending, now),
            Ok(Step::Wait(_)) if now >= pending.stage.deadline() => {
                self.refuse(pending.stage.into_socket(), pending.address, &HandshakeError::Slow);
            }
            Ok(Step::Wait(what)) => {
                pending.waits = what;
                self.handshakes.push_back(pending);
            }
            Err(error) => self.refuse(pending.stage.into_socket(), pending.address, &error),
        }
    }

    /// Goes on with a connection whose stage is done.
    fn advance(&mut self, pending: Pending, now: Instant) {
        let (address, reached_at, since) = (pending.address, pending.reached_at, pending.since);
        match self.next_stage(pending) {
            Ok(Next::Stage(stage)) => {
                self.step(Pending { stage, address, reached_at, since, waits: PollFlags::POLLIN }, now)
            }
            Ok(Next::Through(accepted)) => {
                if let Some(tls) = &self.config.tls {
                    tls.terminator.counts().accepted.fetch_add(1, Ordering::Relaxed);
                }
                (self.config.deliver)(accepted);
            }
            Err(error) if !self.quota.take(now) => {
                tracing::debug!(%address, "a connection cannot be taken over: {error}")
            }
            Err(error) => tracing::warn!(%address, "a connection cannot be taken over: {error}"),
        }
    }

    fn next_stage(&self, pending: Pending) -> Result<Next, HandshakeError> {
        let (address, reached_at) = (pending.address, pending.reached_at);
        match (pending.stage, &self.config.tls) {
            (Stage::Tls(handshake), Some(tls)) => {
                let (socket, connection) = handshake.into_parts();
                let names = is_peer(&connection).then(|| peer_names(&connection));
                let (socket, protection) = tls.terminator.take(socket, connection, address)?;
                let protection = Some(protection);
                match &self.config.secret {
                    Some(secret) => Introduction::accept(socket.into(), Before { protection, names }, secret)
                        .map(Box::new)
                        .map(Stage::Proof)
                        .map(Next::Stage),
                    None => Ok(Next::Through(Accepted { socket, address, reached_at, protection, names })),
                }
            }
            (Stage::Proof(introduction), _) => {
                let (socket, protection, name) = introduction.into_parts()?;
                Ok(Next::Through(Accepted {
                    socket: socket.into(),
                    address,
                    reached_at,
                    protection,
                    names: Some(vec![name]),
                }))
            }
            (Stage::Tls(_), None) => unreachable!("no TLS is spoken"),
        }
    }

    fn refuse(&mut self, socket: TcpStream, address: SocketAddr, error: &HandshakeError) {
        if let Some(tls) = &self.config.tls {
            tls.terminator.counts().failed.fetch_add(1, Ordering::Relaxed);
        }
        // A port that is looked at, as load balancers do, is nothing to talk of.
        let is_look = matches!(error, HandshakeError::Closed | HandshakeError::ClosedUnproved);
        if is_look || !self.quota.take(Instant::now()) {
            tracing::debug!(%address, option = self.config.option, "refused: {error}");
        } else {
            tracing::warn!(%address, option = self.config.option, "refused: {error}");
        }
        let answers = &self.config.answers;
        let last = match error {
            HandshakeError::Plain(_) | HandshakeError::Knock => answers.plain.as_slice(),
            HandshakeError::Proof(ProofError::Tls) => &answers.tls,
            HandshakeError::Proof(ProofError::Unproved(_)) => &answers.unproved,
            _ => &[],
        };
        self.partings.push_back(Parting::new(socket, last));
        if self.partings.len() > PARTINGS_MAX {
            self.partings.pop_front();
        }
    }
}
