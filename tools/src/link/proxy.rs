//! A link without privileges: a TCP proxy that holds every byte for the time that the distance takes.
//! One thread; it accepts, connects on, reads into delay lines and writes what is due. What TCP itself would do over
//! the distance (slow start, retransmission) is not there; the `tun` link has it.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

use super::control::{Behaviour, Control};
use super::delay_line::{DelayLine, Fate, OnLoss};
use super::shape::{Direction, Shape};

/// Connections that pass through at once; further ones are closed.
const CONNECTIONS_MAX: usize = 1024;
/// Listening addresses of one proxy.
const ROUTES_MAX: usize = 64;
/// Read at once from a socket.
const CHUNK_BYTES: usize = 64 << 10;
/// A target that does not answer within this time refuses.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Payload of a packet on Ethernet: a chunk is lost as often as one of the packets that would carry it.
const PACKET_PAYLOAD_BYTES: u64 = 1448;

/// A running proxy; dropping it closes its connections.
#[derive(Debug)]
pub struct Proxy {
    control: Control,
    routes: Sender<RouteChange>,
    route_count: usize,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Route {
    listener: TcpListener,
    target: SocketAddr,
}

#[derive(Debug)]
enum RouteChange {
    Add(Route),
    /// Its connections stay.
    Remove(SocketAddr),
}

impl Proxy {
    /// A proxy that listens nowhere yet.
    pub fn start(shape: Shape) -> std::io::Result<Proxy> {
        let control = Control::new(shape)?;
        let (routes, changes) = channel();
        let worker = Worker::new(control.clone(), changes);
        let thread = std::thread::Builder::new().name("link".to_owned()).spawn(move || worker.run())?;
        Ok(Proxy { control, routes, route_count: 0, thread: Some(thread) })
    }

    /// Listens on `listen` (port 0: the kernel chooses) and connects whoever comes with `target`; the bound address.
    pub fn add_route(&mut self, listen: SocketAddr, target: SocketAddr) -> std::io::Result<SocketAddr> {
        if self.route_count == ROUTES_MAX {
            return Err(std::io::Error::other(format!("a link has at most {ROUTES_MAX} routes")));
        }
        let listener = TcpListener::bind(listen)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        self.change(RouteChange::Add(Route { listener, target }))?;
        self.route_count += 1;
        Ok(address)
    }

    /// Listens there no longer; connections that pass already go on.
    pub fn remove_route(&mut self, listen: SocketAddr) -> std::io::Result<()> {
        self.change(RouteChange::Remove(listen))?;
        self.route_count -= 1;
        Ok(())
    }

    fn change(&self, change: RouteChange) -> std::io::Result<()> {
        self.routes.send(change).map_err(|_| std::io::Error::other("the link's thread has ended"))?;
        self.control.wake();
        Ok(())
    }

    /// To change and watch it.
    pub fn control(&self) -> &Control {
        &self.control
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.control.stop();
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so; the proxy is gone either way.
            let _ = thread.join();
        }
    }
}

/// A piece of a stream.
#[derive(Debug)]
enum Piece {
    Bytes {
        bytes: Vec<u8>,
        written: usize,
    },
    /// The sender will send no more.
    End,
}

/// One direction of one connection.
#[derive(Debug)]
struct Flow {
    line: DelayLine<Piece>,
    /// The source has ended, or was lost.
    read_all: bool,
    /// The end has arrived.
    ended: bool,
    /// The receiver takes no more at the moment.
    blocked: bool,
}

#[derive(Debug)]
struct Connection {
    /// Who connected, and whom we connected to: sources of `Out` and `Back`.
    ends: [TcpStream; 2],
    flows: [Flow; 2],
}

/// Sockets of one accepted connection once its target has answered.
type Connected = (TcpStream, TcpStream, Instant);

struct Worker {
    control: Control,
    behaviour: Behaviour,
    changes: Receiver<RouteChange>,
    routes: Vec<Route>,
    connecting: usize,
    connected: (Sender<Option<Connected>>, Receiver<Option<Connected>>),
    connections: Vec<Connection>,
    buffer: Vec<u8>,
    seed: u64,
}

/// What a polled descriptor belongs to.
enum Polled {
    Waker,
    Route(usize),
    End(usize, Direction),
}

fn on_loss(shape: &Shape) -> OnLoss {
    // Fast retransmission: the receiver notices by the next packet, asks, and gets it one round trip later.
    OnLoss::Delay(shape.rtt)
}

/// The way of a chunk: it is late if any of its packets is lost.
fn chunk_loss(loss: f64, bytes: u64) -> f64 {
    1.0 - (1.0 - loss).powf(bytes.div_ceil(PACKET_PAYLOAD_BYTES).max(1) as f64)
}

impl Worker {
    fn new(control: Control, changes: Receiver<RouteChange>) -> Worker {
        Worker {
            behaviour: control.behaviour(),
            control,
            changes,
            routes: Vec::new(),
            connecting: 0,
            connected: channel(),
            connections: Vec::new(),
            buffer: vec![0; CHUNK_BYTES],
            seed: 0,
        }
    }

    fn run(mut self) {
        super::use_precise_timers();
        while !self.control.stopped() {
            self.behaviour = self.control.behaviour();
            while let Ok(change) = self.changes.try_recv() {
                match change {
                    RouteChange::Add(route) => self.routes.push(route),
                    RouteChange::Remove(address) => {
                        self.routes.retain(|route| route.listener.local_addr().ok() != Some(address));
                    }
                }
            }
            while let Ok(outcome) = self.connected.1.try_recv() {
                self.connecting -= 1;
                let connection = outcome.and_then(|connected| self.connection(connected));
                self.connections.extend(connection);
            }
            for index in 0..self.connections.len() {
                self.deliver(index);
            }
            self.connections.retain(|connection| !connection.flows.iter().all(|flow| flow.ended));
            let (polled, ready) = self.wait();
            for (polled, events) in polled.into_iter().zip(ready) {
                match polled {
                    _ if events.is_empty() => {}
                    // Reading resets it; that it was set is all that it says.
                    Polled::Waker => drop(self.control.waker().read()),
                    Polled::Route(index) => self.accept(index),
                    Polled::End(index, direction) => self.receive(index, direction),
                }
            }
        }
    }

    /// Sleeps until a socket is ready or something is due.
    fn wait(&self) -> (Vec<Polled>, Vec<PollFlags>) {
        let now = Instant::now();
        let mut wake_at: Option<Instant> = None;
        let mut sooner = |at: Instant| wake_at = Some(wake_at.map_or(at, |known| known.min(at)));
        let mut polled = vec![Polled::Waker];
        let mut fds: Vec<PollFd> = vec![PollFd::new(self.control.waker().as_fd(), PollFlags::POLLIN)];
        for (index, route) in self.routes.iter().enumerate() {
            polled.push(Polled::Route(index));
            fds.push(PollFd::new(route.listener.as_fd(), PollFlags::POLLIN));
        }
        for (index, connection) in self.connections.iter().enumerate() {
            for direction in Direction::BOTH {
                let flow = &connection.flows[direction.index()];
                let cut = self.behaviour.cut[direction.index()];
                let mut events = PollFlags::empty();
                if !flow.read_all && !cut {
                    match flow.line.full_until(now) {
                        None => events |= PollFlags::POLLIN,
                        Some(free_at) => sooner(free_at),
                    }
                }
                if !flow.blocked && !cut {
                    flow.line.next_due().into_iter().for_each(&mut sooner);
                }
                // This end's socket is the source of this direction and the destination of the other one.
                let arriving = &connection.flows[1 - direction.index()];
                if arriving.blocked {
                    events |= PollFlags::POLLOUT;
                }
                if !events.is_empty() {
                    polled.push(Polled::End(index, direction));
                    fds.push(PollFd::new(connection.ends[direction.index()].as_fd(), events));
                }
            }
        }
        let timeout = wake_at.map(|at| TimeSpec::from(at.saturating_duration_since(now)));
        // An interrupted wait finds nothing ready and is repeated.
        let _ = ppoll(&mut fds, timeout, None);
        let ready = fds.iter().map(|fd| fd.revents().unwrap_or(PollFlags::empty())).collect();
        (polled, ready)
    }

    fn accept(&mut self, route: usize) {
        while let Ok((near, _)) = self.routes[route].listener.accept() {
            if self.connections.len() + self.connecting == CONNECTIONS_MAX {
                tracing::warn!("a connection was closed: {CONNECTIONS_MAX} pass through the link already");
                continue;
            }
            // A handshake crosses the link once each way before the first byte may.
            let open_from = Instant::now() + self.behaviour.shape.rtt;
            let (target, done, control) = (self.routes[route].target, self.connected.0.clone(), self.control.clone());
            self.connecting += 1;
            let connect = move || {
                let far = TcpStream::connect_timeout(&target, CONNECT_TIMEOUT);
                let far = far.inspect_err(|error| tracing::warn!("the link's target {target}: {error}"));
                // The worker is gone only when the link is.
                let _ = done.send(far.ok().map(|far| (near, far, open_from)));
                control.wake();
            };
            // Connecting may take long and must not hold up what passes.
            if let Err(error) = std::thread::Builder::new().name("link-connect".to_owned()).spawn(connect) {
                tracing::warn!("a connection was closed: no thread to connect it with: {error}");
                self.connecting -= 1;
            }
        }
    }

    fn connection(&mut self, (near, far, open_from): Connected) -> Option<Connection> {
        for socket in [&near, &far] {
            socket.set_nonblocking(true).and_then(|()| socket.set_nodelay(true)).ok()?;
        }
        let shape = &self.behaviour.shape;
        let flows = Direction::BOTH.map(|direction| {
            self.seed += 1;
            let line = DelayLine::new(shape.way(direction), on_loss(shape), open_from, self.seed);
            Flow { line, read_all: false, ended: false, blocked: false }
        });
        Some(Connection { ends: [near, far], flows })
    }

    /// Reads what has come in one direction, as far as there is space for it.
    fn receive(&mut self, index: usize, direction: Direction) {
        let connection = &mut self.connections[index];
        // Being polled for writing only, it is due again in `deliver`.
        connection.flows[1 - direction.index()].blocked = false;
        let flow = &mut connection.flows[direction.index()];
        let now = Instant::now();
        if flow.read_all || self.behaviour.cut[direction.index()] || flow.line.full_until(now).is_some() {
            return;
        }
        let mut way = self.behaviour.shape.way(direction);
        match connection.ends[direction.index()].read(&mut self.buffer) {
            Ok(0) => flow.end(now),
            Ok(count) => {
                way.loss = chunk_loss(way.loss, count as u64);
                flow.line.set_way(way, on_loss(&self.behaviour.shape));
                let bytes = self.buffer[..count].to_vec();
                if flow.line.push(now, Piece::Bytes { bytes, written: 0 }, count as u64) == Fate::Late {
                    self.control.counters(direction).lost.fetch_add(1, Ordering::Relaxed);
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => flow.end(now),
        }
    }

    /// Writes what has arrived, in both directions.
    fn deliver(&mut self, index: usize) {
        let connection = &mut self.connections[index];
        let now = Instant::now();
        for direction in Direction::BOTH {
            if self.behaviour.cut[direction.index()] {
                continue;
            }
            let destination = &mut connection.ends[1 - direction.index()];
            let flow = &mut connection.flows[direction.index()];
            flow.deliver(destination, now, &self.control, direction);
            if flow.ended && !flow.read_all {
                // The destination is gone: the source learns of it as a reset.
                flow.read_all = true;
                let _ = connection.ends[direction.index()].shutdown(Shutdown::Both);
            }
        }
    }
}

impl Flow {
    fn end(&mut self, now: Instant) {
        self.read_all = true;
        self.line.push(now, Piece::End, 0);
    }

    fn deliver(&mut self, destination: &mut TcpStream, now: Instant, control: &Control, direction: Direction) {
        while !self.ended && !self.blocked {
            match self.line.due(now) {
                None => return,
                Some(Piece::End) => {
                    // A destination that is gone needs no end.
                    let _ = destination.shutdown(Shutdown::Write);
                    self.ended = true;
                }
                Some(Piece::Bytes { bytes, written }) => match destination.write(&bytes[*written..]) {
                    Ok(count) => {
                        *written += count;
                        if *written == bytes.len() {
                            control.counters(direction).deliver(bytes.len());
                            self.line.pop();
                        }
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => self.blocked = true,
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(_) => {
                        self.line.clear();
                        self.ended = true;
                    }
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_chunk_is_late_more_often_than_a_packet() {
        assert!((chunk_loss(0.01, 100) - 0.01).abs() < 1e-12);
        assert!((chunk_loss(0.01, 2 * 1448) - 0.0199).abs() < 1e-12);
        assert_eq!(chunk_loss(0.0, 1 << 20), 0.0);
    }
}
