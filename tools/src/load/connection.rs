//! One connection of the load generator: a non-blocking socket, its buffers and its session. Opens, greets
//! (AUTH, COMMITLEVEL), carries the session's bytes, and opens again after a loss. Driven by the thread's event loop.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, connect, socket};
use walferry_tls::ClientStream;
use walferry_tls::rustls::ClientConfig;

use super::reply::{Kind, Scan};
use super::route::{Refused, Route, refusal};
use super::session::{Next, Session};
use super::stats::Stats;

/// The inbox of a connection at first; it doubles when an answer does not fit.
const INBOX_BYTES_MIN: usize = 16 << 10;
/// An answer that is larger than this breaks the connection.
const ANSWER_BYTES_MAX: usize = 32 << 20;
/// The first wait before a lost connection is opened again; doubles up to the maximum.
const BACKOFF_MS_MIN: u64 = 10;
const BACKOFF_MS_MAX: u64 = 1_000;

/// What is sent on every new connection before the first script; at least one command.
#[derive(Clone, Debug)]
pub struct Greeting {
    /// Encoded commands.
    pub bytes: Vec<u8>,
    /// How many answers they bring.
    pub answers: usize,
}

/// Where a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Not connected; to be opened at this time.
    Down(Instant),
    /// The system is connecting.
    Connecting,
    /// So many answers of the greeting are still to come.
    Greeting(usize),
    /// Ready for a transaction.
    Idle,
    /// In a transaction.
    Running,
    /// In a transaction, sleeping until this time.
    Sleeping(Instant),
}

/// What carries a connection; it does not block.
enum Socket {
    Plain(TcpStream),
    Tls(Box<ClientStream>),
}

impl Socket {
    fn tcp(&self) -> &TcpStream {
        match self {
            Socket::Plain(socket) => socket,
            Socket::Tls(stream) => stream.socket(),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match self {
            Socket::Plain(socket) => socket.write(bytes),
            Socket::Tls(stream) => stream.write(bytes),
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Socket::Plain(socket) => socket.read(buffer),
            Socket::Tls(stream) => stream.read(buffer),
        }
    }
}

/// Who a node has to be, for connections over TLS.
#[derive(Clone)]
pub struct LoadTls {
    /// Whose word is taken.
    pub config: Arc<ClientConfig>,
    /// The host that the node's certificate is for; another node's is for its own address.
    pub host: String,
    /// Where that host is.
    pub address: SocketAddr,
}

impl LoadTls {
    fn host_at(&self, address: SocketAddr) -> String {
        if address == self.address { self.host.clone() } else { address.ip().to_string() }
    }
}

/// One connection.
pub struct Connection {
    socket: Option<Socket>,
    state: State,
    session: Session,
    /// Transactions that this client may still start; `None` is without end.
    pub left: Option<u64>,
    inbox: Vec<u8>,
    /// How much of the inbox holds bytes that came.
    filled: usize,
    scan: Scan,
    sent: usize,
    route: Arc<Route>,
    tls: Option<LoadTls>,
    /// Where the socket goes.
    address: SocketAddr,
    backoff_ms: u64,
    was_up: bool,
    /// The node named the leader: the connection is opened there without a pause.
    leaving: bool,
    /// Why the last attempt to connect failed.
    pub last_error: Option<String>,
}

impl Connection {
    /// A connection that opens at its first `open`.
    pub fn new(
        session: Session,
        left: Option<u64>,
        route: Arc<Route>,
        tls: Option<LoadTls>,
        now: Instant,
    ) -> Connection {
        Connection {
            address: route.current(),
            route,
            tls,
            socket: None,
            state: State::Down(now),
            session,
            left,
            inbox: vec![0; INBOX_BYTES_MIN],
            filled: 0,
            scan: Scan::default(),
            sent: 0,
            backoff_ms: BACKOFF_MS_MIN,
            was_up: false,
            leaving: false,
            last_error: None,
        }
    }

    /// Where it stands.
    pub fn state(&self) -> State {
        self.state
    }

    /// True while a transaction is under way.
    pub fn is_busy(&self) -> bool {
        matches!(self.state, State::Running | State::Sleeping(_))
    }

    /// Starts connecting; the new socket is to be watched under the returned descriptor.
    pub fn open(&mut self, now: Instant) -> Option<RawFd> {
        debug_assert!(matches!(self.state, State::Down(_)));
        self.address = self.route.current();
        match begin_connect(self.address).and_then(|socket| self.dress(socket)) {
            Ok(socket) => {
                let fd = socket.tcp().as_raw_fd();
                self.socket = Some(socket);
                self.state = State::Connecting;
                Some(fd)
            }
            Err(error) => {
                self.close(&error.to_string(), now);
                None
            }
        }
    }

    fn dress(&self, socket: TcpStream) -> std::io::Result<Socket> {
        let Some(tls) = &self.tls else { return Ok(Socket::Plain(socket)) };
        let stream = ClientStream::new(Arc::clone(&tls.config), &tls.host_at(self.address), socket)?;
        Ok(Socket::Tls(Box::new(stream)))
    }

    /// Starts a transaction on an idle connection.
    pub fn begin(&mut self, scheduled: Instant, now: Instant, stats: &mut Stats) {
        debug_assert_eq!(self.state, State::Idle);
        if let Some(left) = &mut self.left {
            *left -= 1;
        }
        let next = self.session.begin(scheduled, now, stats);
        self.follow(next, now, stats);
    }

    /// A sleep is over.
    pub fn wake(&mut self, now: Instant, stats: &mut Stats) {
        debug_assert!(matches!(self.state, State::Sleeping(_)));
        let next = self.session.run(now, stats);
        self.follow(next, now, stats);
    }

    /// The socket can be read or written.
    pub fn ready(&mut self, greeting: &Greeting, stats: &mut Stats) {
        let result = match self.state {
            State::Down(_) => Ok(()),
            State::Connecting => self.connected(greeting).and_then(|()| self.read(stats)),
            _ => self.flush().and_then(|()| self.read(stats)),
        };
        if let Err(error) = result {
            self.lost(&error.to_string(), Instant::now(), stats);
        }
    }

    fn connected(&mut self, greeting: &Greeting) -> std::io::Result<()> {
        let socket = self.socket.as_ref().expect("a connecting connection has a socket").tcp();
        if let Some(error) = socket.take_error()? {
            return Err(error);
        }
        if let Err(error) = socket.peer_addr() {
            // Woken before the connection stood: wait on.
            return if error.kind() == ErrorKind::NotConnected { Ok(()) } else { Err(error) };
        }
        socket.set_nodelay(true)?;
        self.session.out.extend_from_slice(&greeting.bytes);
        self.state = State::Greeting(greeting.answers);
        self.flush()
    }

    fn follow(&mut self, next: Next, now: Instant, stats: &mut Stats) {
        self.state = match next {
            Next::Answer => State::Running,
            Next::Sleep(time) => State::Sleeping(now + time),
            Next::Done => State::Idle,
        };
        if let Err(error) = self.flush() {
            self.lost(&error.to_string(), now, stats);
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        let Some(socket) = &mut self.socket else {
            return Ok(());
        };
        while self.sent < self.session.out.len() {
            match socket.write(&self.session.out[self.sent..]) {
                Ok(bytes) => self.sent += bytes,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        self.session.out.clear();
        self.sent = 0;
        Ok(())
    }

    fn read(&mut self, stats: &mut Stats) -> std::io::Result<()> {
        loop {
            let Some(socket) = &mut self.socket else {
                return Ok(());
            };
            if self.filled == self.inbox.len() {
                if self.filled >= ANSWER_BYTES_MAX {
                    return Err(std::io::Error::other(format!("an answer is larger than {ANSWER_BYTES_MAX} bytes")));
                }
                self.inbox.resize(self.filled * 2, 0);
            }
            let free = self.inbox.len() - self.filled;
            match socket.read(&mut self.inbox[self.filled..]) {
                Ok(0) => return Err(std::io::Error::other("the node closed the connection")),
                Ok(bytes) => {
                    self.filled += bytes;
                    self.take_answers(Instant::now(), stats)?;
                    // A short read emptied the socket; the next event comes with the next bytes.
                    if bytes < free && matches!(self.socket, Some(Socket::Plain(_))) {
                        return Ok(());
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    fn take_answers(&mut self, now: Instant, stats: &mut Stats) -> std::io::Result<()> {
        let mut taken = 0;
        while taken < self.filled {
            let bytes = &self.inbox[taken..self.filled];
            let Some((length, kind)) = self.scan.scan(bytes).map_err(std::io::Error::other)? else {
                break;
            };
            let error = match kind {
                Kind::Error { from, to } => String::from_utf8_lossy(&bytes[from..to]),
                _ => "".into(),
            };
            if let State::Greeting(left) = self.state {
                if matches!(kind, Kind::Error { .. }) {
                    follow_refusal(&error, &self.route, &mut self.leaving);
                    return Err(std::io::Error::other(error.into_owned()));
                }
                self.state = if left == 1 { State::Idle } else { State::Greeting(left - 1) };
                if left == 1 {
                    stats.reconnects += u64::from(self.was_up);
                    self.was_up = true;
                    self.backoff_ms = BACKOFF_MS_MIN;
                }
            } else {
                if matches!(kind, Kind::Error { .. }) && follow_refusal(&error, &self.route, &mut self.leaving) {
                    return Err(std::io::Error::other(error.into_owned()));
                }
                self.session.answer(kind, &error, now, stats).map_err(std::io::Error::other)?;
            }
            taken += length;
        }
        self.inbox.copy_within(taken..self.filled, 0);
        self.filled -= taken;
        if self.state == State::Running && !self.session.is_waiting() {
            let next = self.session.run(now, stats);
            self.follow(next, now, stats);
        }
        Ok(())
    }

    fn lost(&mut self, why: &str, now: Instant, stats: &mut Stats) {
        if self.is_busy() {
            self.session.lost(why, refusal(why).is_some(), stats);
        }
        self.close(why, now);
    }

    fn close(&mut self, why: &str, now: Instant) {
        self.socket = None;
        if !self.leaving {
            self.route.leave(self.address);
        }
        self.session.out.clear();
        self.sent = 0;
        self.filled = 0;
        self.scan = Scan::default();
        self.last_error = Some(why.to_owned());
        let at_once = std::mem::take(&mut self.leaving);
        let pause_ms = if at_once { 0 } else { self.backoff_ms };
        self.state = State::Down(now + Duration::from_millis(pause_ms));
        let backoff_ms_max = if self.route.has_others() { BACKOFF_MS_MIN } else { BACKOFF_MS_MAX };
        self.backoff_ms = (self.backoff_ms * 2).min(backoff_ms_max);
    }
}

/// Goes where a refusal points to. True when it was one: the connection is of no use any more.
fn follow_refusal(error: &str, route: &Route, leaving: &mut bool) -> bool {
    match refusal(error) {
        Some(Refused::Moved(leader)) => {
            route.moved(leader);
            *leaving = true;
            true
        }
        // Before anything is known of another node, this is an answer like any other.
        Some(Refused::Leaderless) => route.has_others(),
        None => false,
    }
}

fn begin_connect(address: SocketAddr) -> std::io::Result<TcpStream> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let fd = socket(family, SockType::Stream, flags, None)?;
    match connect(fd.as_raw_fd(), &SockaddrStorage::from(address)) {
        Ok(()) | Err(Errno::EINPROGRESS) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(TcpStream::from(fd))
}
