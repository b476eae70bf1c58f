//! The network between simulated nodes. A connection is two pairs of real sockets, one at each node, with the simulator between
//! them: what a node writes waits here until it is delivered, so that a full socket, a broken connection and a silent one look
//! to the node as they do in production. Heartbeats and questions of the cluster's threads travel as packets.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};

use crate::kernel::{SocketNo, socket_no};
use crate::world::NodeNo;

/// Where node `n` is reached by its peers, before the number.
const PEER_NET: &str = "10.0.0.";
const PEER_PORT: u16 = 6401;
/// Bytes on their way in one direction of a connection; beyond it the sender's socket fills up.
const WINDOW_BYTES: usize = 256 << 10;
const RECEIVE_BYTES: usize = 64 << 10;
/// What a full socket or a stopped node does not take is offered again after this.
const BUSY_US: u64 = 300;

pub fn peer_address(node: NodeNo) -> String {
    format!("{PEER_NET}{}:{PEER_PORT}", node + 1)
}

pub fn socket_address(node: NodeNo, port: u16) -> SocketAddr {
    format!("{PEER_NET}{}:{port}", node + 1).parse().expect("an address")
}

/// Which node is reached there.
pub fn node_of(address: &str) -> Option<NodeNo> {
    let number: NodeNo = address.strip_prefix(PEER_NET)?.split_once(':')?.0.parse().ok()?;
    number.checked_sub(1)
}

/// How long things take here.
#[derive(Clone, Copy, Debug)]
pub struct Delays {
    pub min_us: u64,
    pub spread_us: u64,
    /// Of a thousand deliveries so many are lost and come again later.
    pub lost_per_mille: u64,
    pub again_us: u64,
}

/// A connection by number.
pub type LinkNo = u64;

/// What travels.
enum Piece {
    Bytes(Vec<u8>),
    End,
}

/// One direction.
struct Lane {
    /// Where the simulator writes what arrives; the other lane reads what leaves here.
    from: NodeNo,
    to: NodeNo,
    pieces: VecDeque<(u64, Piece)>,
    bytes: usize,
    last_at: u64,
    /// The sender has closed its side.
    ended: bool,
    /// The end was delivered.
    done: bool,
}

struct Connection {
    /// The simulator's ends: of the node that connected, and of the one that accepted.
    ends: [Option<OwnedFd>; 2],
    /// What the kernel said of each end since everything that it had was read.
    readable: [Readable; 2],
    lanes: [Lane; 2],
    /// The accepting node's end, until it was accepted.
    waiting: Option<(u64, OwnedFd)>,
}

/// What there is to be read of a socket.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Readable {
    Nothing,
    Bytes,
    /// Perhaps bytes, and then the end.
    End,
}

impl Connection {
    /// Whether what the node at this side writes is taken now.
    fn is_read(&self, side: usize) -> bool {
        let lane = &self.lanes[side];
        self.ends[side].is_some() && !lane.ended && lane.bytes < WINDOW_BYTES
    }
}

/// All connections and who reaches whom.
pub struct Network {
    connections: BTreeMap<LinkNo, Connection>,
    last: LinkNo,
    /// `cut[a][b]`: nothing gets from a to b, for so many reasons.
    cut: Vec<Vec<u32>>,
    /// `held[a][b]`: what a writes to its connections with b waits, for so many reasons; packets pass.
    held: Vec<Vec<u32>>,
    /// `slow_us[a][b]`: it takes so much longer.
    slow_us: Vec<Vec<u64>>,
    /// Whether a process is there that listens.
    up: Vec<bool>,
    pub delays: Delays,
    rng: fastrand::Rng,
    /// Nodes of connections that broke since the last turn.
    broken: Vec<NodeNo>,
    /// Kept for its memory.
    buffer: Vec<u8>,
    /// The simulator's ends, by connection and side.
    simulator_ends: Changes,
    /// The nodes' ends, by socket.
    node_ends: Changes,
    /// Those of the nodes' ends at which something arrived that their node was not told of.
    arrived: BTreeSet<SocketNo>,
}

/// Sockets whose changes the kernel tells once (epoll, edge-triggered): to ask each of them was a fifth of all time.
struct Changes {
    epoll: OwnedFd,
    events: Vec<libc::epoll_event>,
}

const CHANGES_PER_CALL_MAX: usize = 64;
const CLOSED: u32 = (libc::EPOLLRDHUP | libc::EPOLLHUP | libc::EPOLLERR) as u32;

impl Changes {
    fn new() -> io::Result<Changes> {
        // SAFETY: a plain system call; the descriptor that it returns is ours.
        let epoll = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if epoll < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above.
        let epoll = unsafe { OwnedFd::from_raw_fd(epoll) };
        Ok(Changes { epoll, events: vec![libc::epoll_event { events: 0, u64: 0 }; CHANGES_PER_CALL_MAX] })
    }

    /// Bytes that arrive at the socket, and its end, are told from now on, under this number, until it is closed.
    fn add(&self, socket: &OwnedFd, number: u64) -> io::Result<()> {
        let events = (libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLET) as u32;
        let mut event = libc::epoll_event { events, u64: number };
        // SAFETY: the event lives through the call.
        match unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, socket.as_raw_fd(), &mut event) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Calls `each` with the number of each socket that changed, and whether nothing comes after what it has now.
    fn take(&mut self, mut each: impl FnMut(u64, bool)) {
        loop {
            let (list, most) = (self.events.as_mut_ptr(), self.events.len() as libc::c_int);
            // SAFETY: the list lives through the call, which does not wait.
            let count = unsafe { libc::epoll_wait(self.epoll.as_raw_fd(), list, most, 0) };
            assert!(count >= 0, "epoll_wait: {}", io::Error::last_os_error());
            for event in &self.events[..count as usize] {
                each(event.u64, event.events & CLOSED != 0);
            }
            if (count as usize) < self.events.len() {
                return;
            }
        }
    }
}

fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: the call fills two descriptors, which are then ours.
    if unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    Ok(unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) })
}

impl Network {
    pub fn new(nodes: usize, delays: Delays, seed: u64) -> Network {
        Network {
            connections: BTreeMap::new(),
            last: 0,
            cut: vec![vec![0; nodes]; nodes],
            held: vec![vec![0; nodes]; nodes],
            slow_us: vec![vec![0; nodes]; nodes],
            up: vec![false; nodes],
            delays,
            rng: fastrand::Rng::with_seed(seed),
            broken: Vec::new(),
            buffer: vec![0; RECEIVE_BYTES],
            simulator_ends: Changes::new().expect("a descriptor is left"),
            node_ends: Changes::new().expect("a descriptor is left"),
            arrived: BTreeSet::new(),
        }
    }

    pub fn set_up(&mut self, node: NodeNo, up: bool) {
        self.up[node] = up;
    }

    pub fn cut(&mut self, from: NodeNo, to: NodeNo) {
        self.cut[from][to] += 1;
    }

    /// Takes one `cut` back.
    pub fn join(&mut self, from: NodeNo, to: NodeNo) {
        self.cut[from][to] = self.cut[from][to].saturating_sub(1);
    }

    /// What is written to connections in this direction waits.
    pub fn hold(&mut self, from: NodeNo, to: NodeNo) {
        self.held[from][to] += 1;
    }

    /// Takes one `hold` back.
    pub fn release(&mut self, from: NodeNo, to: NodeNo) {
        self.held[from][to] = self.held[from][to].saturating_sub(1);
    }

    /// What is written to connections in this direction takes so much longer from now on.
    pub fn slow_down(&mut self, from: NodeNo, to: NodeNo, more_us: u64) {
        self.slow_us[from][to] = more_us;
    }

    /// Everything passes again.
    pub fn heal(&mut self) {
        self.cut.iter_mut().chain(&mut self.held).flatten().for_each(|reasons| *reasons = 0);
        self.slow_us.iter_mut().flatten().for_each(|more_us| *more_us = 0);
    }

    /// Whether bytes of a connection get from one to the other now.
    fn carries(&self, from: NodeNo, to: NodeNo) -> bool {
        self.cut[from][to] == 0 && self.held[from][to] == 0
    }

    /// Whether anything gets from one to the other.
    pub fn passes(&self, from: NodeNo, to: NodeNo) -> bool {
        self.cut[from][to] == 0
    }

    /// How long a message takes now.
    pub fn delay_us(&mut self) -> u64 {
        let Delays { min_us, spread_us, lost_per_mille, again_us } = self.delays;
        let again = if self.rng.u64(0..1000) < lost_per_mille { again_us } else { 0 };
        min_us + self.rng.u64(0..=spread_us) + again
    }

    /// Whether a packet gets through: those of the control plane are small and are not sent again.
    pub fn packet(&mut self, from: NodeNo, to: NodeNo) -> Option<u64> {
        let lost = from != to && self.rng.u64(0..1000) < self.delays.lost_per_mille;
        if self.cut[from][to] > 0 || lost {
            return None;
        }
        Some(if from == to { 1 } else { self.delays.min_us + self.rng.u64(0..=self.delays.spread_us) })
    }

    /// Who listens at an address, if this node reaches it.
    pub fn reach(&self, from: NodeNo, address: &str) -> io::Result<NodeNo> {
        let to = node_of(address).filter(|to| *to < self.up.len());
        let to = to.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("{address} has no address")))?;
        if self.cut[from][to] > 0 || self.cut[to][from] > 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
        if !self.up[to] {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        Ok(to)
    }

    pub fn connect(&mut self, from: NodeNo, address: &str, now_us: u64) -> io::Result<TcpStream> {
        let to = self.reach(from, address)?;
        let ((near, near_sim), (far, far_sim)) = (pair()?, pair()?);
        let lane =
            |from, to| Lane { from, to, pieces: VecDeque::new(), bytes: 0, last_at: now_us, ended: false, done: false };
        self.last += 1;
        let at = now_us + self.delay_us();
        for (side, (ours, theirs)) in [(&near_sim, &near), (&far_sim, &far)].into_iter().enumerate() {
            self.simulator_ends.add(ours, self.last * 2 + side as u64)?;
            self.node_ends.add(theirs, socket_no(theirs))?;
        }
        let connection = Connection {
            ends: [Some(near_sim), Some(far_sim)],
            readable: [Readable::Nothing; 2],
            lanes: [lane(from, to), lane(to, from)],
            waiting: Some((at, far)),
        };
        self.connections.insert(self.last, connection);
        // SAFETY: a socket that is ours and is handed over.
        Ok(unsafe { TcpStream::from_raw_fd(near.into_raw_fd()) })
    }

    /// The process of a node is gone: its ends close, and what it had sent still arrives.
    pub fn kill(&mut self, node: NodeNo) {
        self.up[node] = false;
        for connection in self.connections.values_mut() {
            if connection.lanes[0].to == node {
                connection.waiting = None;
            }
        }
    }

    /// Connections between two nodes break.
    pub fn reset(&mut self, a: NodeNo, b: NodeNo) {
        self.connections.retain(|_, connection| {
            let lane = &connection.lanes[0];
            !((lane.from == a && lane.to == b) || (lane.from == b && lane.to == a))
        });
        self.broken.extend([a, b]);
    }

    /// Connections that a node accepts now.
    pub fn accepted(&mut self, node: NodeNo, now_us: u64) -> Vec<(OwnedFd, SocketAddr)> {
        let mut accepted = Vec::new();
        for connection in self.connections.values_mut() {
            let due = connection.lanes[0].to == node && self.cut[connection.lanes[0].from][node] == 0;
            if due && connection.waiting.as_ref().is_some_and(|(at, _)| *at <= now_us) {
                let (_, socket) = connection.waiting.take().expect("just seen");
                accepted.push((socket, socket_address(connection.lanes[0].from, 40_000)));
            }
        }
        accepted
    }

    /// Takes what nodes have written, and delivers what is due. Nodes whose sockets moved.
    pub fn turn(&mut self, now_us: u64) -> Vec<NodeNo> {
        let mut moved = std::mem::take(&mut self.broken);
        let mut connections = std::mem::take(&mut self.connections);
        self.simulator_ends.take(|number, is_end| {
            // One that broke meanwhile is not there any more.
            if let Some(connection) = connections.get_mut(&(number / 2)) {
                let readable = &mut connection.readable[number as usize % 2];
                *readable = if is_end || *readable == Readable::End { Readable::End } else { Readable::Bytes };
            }
        });
        for connection in connections.values_mut() {
            for side in 0..2 {
                if connection.is_read(side) && connection.readable[side] != Readable::Nothing {
                    self.take(connection, side, now_us, &mut moved);
                }
            }
            for side in 0..2 {
                self.deliver(connection, side, now_us, &mut moved);
            }
        }
        connections.retain(|_, connection| {
            let is_over = connection.lanes.iter().all(|lane| lane.done);
            if is_over {
                moved.extend([connection.lanes[0].from, connection.lanes[0].to]);
            }
            !is_over
        });
        self.connections = connections;
        moved
    }

    /// Takes down at which of the nodes' ends something arrived, and which ended. Whether any did since the last call.
    pub fn look_at_arrivals(&mut self) -> bool {
        let Network { node_ends, arrived, .. } = self;
        let mut any = false;
        node_ends.take(|number, _| {
            arrived.insert(number);
            any = true;
        });
        any
    }

    /// Those ends; each stays there until it is taken out.
    pub fn arrived(&mut self) -> &mut BTreeSet<SocketNo> {
        &mut self.arrived
    }

    fn take(&mut self, connection: &mut Connection, side: usize, now_us: u64, moved: &mut Vec<NodeNo>) {
        let Some(end) = &connection.ends[side] else { return };
        let fd = end.as_raw_fd();
        let lane = &mut connection.lanes[side];
        let mut buffer = std::mem::take(&mut self.buffer);
        while !lane.ended && lane.bytes < WINDOW_BYTES {
            // SAFETY: the buffer lives through the call.
            let got = unsafe { libc::recv(fd, buffer.as_mut_ptr().cast(), buffer.len(), libc::MSG_DONTWAIT) };
            let piece = match got {
                1.. => Piece::Bytes(buffer[..got as usize].to_vec()),
                0 => Piece::End,
                _ if io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock => {
                    connection.readable[side] = Readable::Nothing;
                    break;
                }
                _ => Piece::End,
            };
            lane.last_at = lane.last_at.max(now_us + self.delay_us() + self.slow_us[lane.from][lane.to]);
            match &piece {
                Piece::Bytes(bytes) => lane.bytes += bytes.len(),
                Piece::End => lane.ended = true,
            }
            lane.pieces.push_back((lane.last_at, piece));
            moved.push(lane.from);
            // Less than was asked for: that was all but for an end, which is seen at the next look.
            if got < RECEIVE_BYTES as isize {
                if connection.readable[side] == Readable::Bytes {
                    connection.readable[side] = Readable::Nothing;
                }
                break;
            }
        }
        self.buffer = buffer;
    }

    fn deliver(&mut self, connection: &mut Connection, side: usize, now_us: u64, moved: &mut Vec<NodeNo>) {
        let other = 1 - side;
        let lane = &mut connection.lanes[side];
        while let Some((at, _)) = lane.pieces.front() {
            if *at > now_us || !self.carries(lane.from, lane.to) {
                return;
            }
            let Some(end) = &connection.ends[other] else {
                lane.pieces.clear();
                lane.done = lane.ended;
                return;
            };
            let (at, piece) = lane.pieces.pop_front().expect("just seen");
            match piece {
                Piece::Bytes(bytes) => {
                    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
                    // SAFETY: the bytes live through the call.
                    let sent = unsafe { libc::send(end.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) };
                    if sent < 0 && io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock {
                        lane.pieces.push_front((at, Piece::Bytes(bytes)));
                        return;
                    }
                    // A receiver that is gone takes nothing any more.
                    let sent = usize::try_from(sent).unwrap_or(bytes.len());
                    lane.bytes -= sent;
                    if sent < bytes.len() {
                        lane.pieces.push_front((at, Piece::Bytes(bytes[sent..].to_vec())));
                        moved.push(lane.to);
                        return;
                    }
                }
                Piece::End => {
                    // SAFETY: a plain system call on our own descriptor.
                    unsafe { libc::shutdown(end.as_raw_fd(), libc::SHUT_WR) };
                    lane.done = true;
                }
            }
            moved.push(lane.to);
        }
    }

    /// When something is due next. Nodes that are not `awake` accept nothing, and look by themselves when they are.
    pub fn next_us(&self, now_us: u64, awake: impl Fn(NodeNo) -> bool) -> Option<u64> {
        let open = |lane: &&Lane| self.carries(lane.from, lane.to);
        let lanes = self.connections.values().flat_map(|connection| connection.lanes.iter());
        let pieces = lanes.filter(open).filter_map(|lane| lane.pieces.front()).map(|(at, _)| *at);
        let accepting = |lane: &Lane| self.cut[lane.from][lane.to] == 0 && awake(lane.to);
        let waiting = self.connections.values().filter(|connection| accepting(&connection.lanes[0]));
        let waiting = waiting.filter_map(|connection| connection.waiting.as_ref()).map(|(at, _)| *at);
        // What is due already waits for a full socket or a busy node: soon again.
        pieces.chain(waiting).min().map(|at| at.max(now_us + BUSY_US))
    }
}
