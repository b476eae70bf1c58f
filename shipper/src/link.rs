//! One connection to a replica: its socket, what it receives, and the link from hello to close. The write side is
//! `outgoing.rs`. The shipper owns the links, judges what they receive, and decides when they end.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use io_uring::{opcode, types};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{Shutdown, setsockopt, shutdown, sockopt};
use nix::sys::time::TimeVal;
use walferry_cluster::error::MessageError;
use walferry_cluster::member::{Caller, MemberName};
use walferry_cluster::message::{Fetch, FetchFrames, Hello, MESSAGE_BYTES_MAX, Message, Refuse, decode};
use walferry_engine::log::Log;
use walferry_engine::ring::{Completion, Owner, Ring, Token};
use walferry_engine::world;

use crate::catchup::CatchupError;
use crate::outgoing::{Outgoing, Turn};
use crate::progress::AckError;
use crate::transport::Transport;

/// The receive buffer of a link; acknowledgements are small. It grows once, for a hello with a long history.
const RECEIVE_BYTES: usize = 4096;
/// How long a write of a catch-up thread blocks before the thread looks up, microseconds.
const SEND_TIMEOUT_US: i64 = 500_000;
/// How long a replica that was refused has to read why.
const CLOSING_TIME_MAX: Duration = Duration::from_secs(1);
/// How long a connection has to say what it is, however often a byte of that comes.
pub(crate) const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(5);
/// Set in the id of every token of the shipper, so that a node that changes its role can tell them from others.
const SHIPPER_TOKEN: u64 = 1 << 55;

/// The number of a link, never used twice by one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct LinkNo(pub(crate) u32);

impl LinkNo {
    /// The next one. A later leadership has another shipper, and the operations of the earlier one's links may still end.
    pub(crate) fn next() -> LinkNo {
        static LAST: AtomicU32 = AtomicU32::new(0);
        LinkNo(LAST.fetch_add(1, Ordering::Relaxed).wrapping_add(1))
    }
}

/// What an operation on the ring is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Receive,
    Writable,
    /// A SEND_ZC, by its place.
    Send(usize),
}

impl Op {
    pub(crate) fn token(self, link: LinkNo) -> u64 {
        let number = match self {
            Op::Receive => 0,
            Op::Writable => 1,
            Op::Send(place) => 2 + place as u64,
        };
        Token::new(Owner::Peer, SHIPPER_TOKEN | number << 32 | u64::from(link.0)).into()
    }

    /// The link and the operation that a completion belongs to; `None` when it is not the shipper's.
    pub(crate) fn of(completion: &Completion) -> Option<(LinkNo, Op)> {
        let id = completion.token.id();
        let op = match (id & !SHIPPER_TOKEN) >> 32 {
            0 => Op::Receive,
            1 => Op::Writable,
            number => Op::Send(number as usize - 2),
        };
        (id & SHIPPER_TOKEN != 0).then_some((LinkNo(id as u32), op))
    }
}

/// Why a link ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    #[error("the replica closed the connection")]
    Closed,
    #[error("the connection failed: {0}")]
    Socket(#[from] io::Error),
    #[error("the catch-up failed: {0}")]
    Catchup(#[from] CatchupError),
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error(transparent)]
    Ack(#[from] AckError),
    #[error("the replica sent a message that is not for leaders, or out of turn")]
    Turn,
    #[error("nothing was heard from the replica for {0:?}")]
    Silent(Duration),
    #[error("it did not say within {HANDSHAKE_TIME_MAX:?} what it is")]
    HandshakeTimeout,
    #[error("too many others connected that do not say what they are")]
    Crowded,
    #[error("the replica takes too long for log memory that the leader needs")]
    Blocking,
    #[error("{0}")]
    Refused(Refuse),
    #[error("the leader stops")]
    Stopping,
}

/// How far a link is.
#[derive(Clone, Debug)]
pub(crate) enum Phase {
    /// Waiting for the hello, or with the hello for its answer.
    Probe(Option<Hello>),
    /// It asks for a snapshot: the socket goes to a thread.
    Fetch(Fetch),
    /// It asks for a part of the log that it lost: the same.
    FetchFrames(FetchFrames),
    /// Feeding this replica.
    Streaming(MemberName),
    /// Refused; kept until the replica has read why, at most until then.
    Closing(Instant),
    /// Shut down; kept until the ring has nothing of it left.
    Closed,
}

/// A connection to a replica.
pub(crate) struct Link {
    pub(crate) number: LinkNo,
    pub(crate) caller: Caller,
    pub(crate) phase: Phase,
    /// When it connected.
    pub(crate) since: Instant,
    /// When the replica was heard of last.
    pub(crate) heard: Instant,
    pub(crate) transport: Transport,
    pub(crate) outgoing: Outgoing,
    /// `None` once closed.
    socket: Option<Arc<OwnedFd>>,
    received: Vec<u8>,
    /// Of `received`, what was taken and what has arrived: `taken <= filled`.
    taken: usize,
    filled: usize,
    receiving: bool,
}

impl Link {
    /// Takes over a connected socket and starts to listen to it.
    pub(crate) fn new(
        number: LinkNo,
        socket: OwnedFd,
        caller: Caller,
        ring: &mut Ring,
        now: Instant,
    ) -> io::Result<Link> {
        let is_simulated = world::is_simulated();
        let transport = if is_simulated { Transport::Plain } else { Transport::of(&socket) };
        if !is_simulated && transport != Transport::RelayedTls {
            setsockopt(&socket, sockopt::TcpNoDelay, &true)?;
        }
        setsockopt(&socket, sockopt::SendTimeout, &TimeVal::new(0, SEND_TIMEOUT_US))?;
        // Both the ring and the catch-up thread wait for the socket; with O_NONBLOCK neither would, as where the world is simulated.
        let flags = OFlag::from_bits_retain(fcntl(&socket, FcntlArg::F_GETFL)?);
        let nonblocking = if is_simulated { OFlag::O_NONBLOCK } else { OFlag::empty() };
        fcntl(&socket, FcntlArg::F_SETFL(flags & !OFlag::O_NONBLOCK | nonblocking))?;
        let mut link = Link {
            number,
            caller,
            phase: Phase::Probe(None),
            since: now,
            heard: now,
            transport,
            outgoing: Outgoing::new(number, transport),
            socket: Some(Arc::new(socket)),
            received: vec![0; RECEIVE_BYTES],
            taken: 0,
            filled: 0,
            receiving: false,
        };
        link.receive(ring);
        Ok(link)
    }

    /// True when the link can be dropped.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Closed) && !self.receiving && self.outgoing.is_idle()
    }

    /// True until it is refused or closed.
    pub(crate) fn is_open(&self) -> bool {
        matches!(self.phase, Phase::Probe(_) | Phase::Fetch(_) | Phase::FetchFrames(_) | Phase::Streaming(_))
    }

    /// Gives the socket away; nothing of it is in flight. The link is over.
    pub(crate) fn give_socket(&mut self) -> Option<OwnedFd> {
        debug_assert!(!self.receiving && self.outgoing.is_idle());
        self.phase = Phase::Closed;
        Arc::try_unwrap(self.socket.take()?).ok()
    }

    /// True while it is not known who is there, or known that it is nobody.
    pub(crate) fn is_unidentified(&self) -> bool {
        matches!(self.phase, Phase::Probe(None) | Phase::Closing(_))
    }

    /// The replica that it feeds.
    pub(crate) fn replica(&self) -> Option<&MemberName> {
        match &self.phase {
            Phase::Streaming(name) => Some(name),
            _ => None,
        }
    }

    /// Listens for the next bytes.
    pub(crate) fn receive(&mut self, ring: &mut Ring) {
        if matches!(self.phase, Phase::Fetch(_) | Phase::FetchFrames(_)) {
            return;
        }
        let Some(socket) = self.socket.as_ref().filter(|_| !self.receiving) else { return };
        self.received.copy_within(self.taken..self.filled, 0);
        (self.filled, self.taken) = (self.filled - self.taken, 0);
        if self.filled == self.received.len() {
            // What is there is no whole message, and no message is larger than this.
            self.received.resize(MESSAGE_BYTES_MAX, 0);
        }
        let space = &mut self.received[self.filled..];
        let fd = types::Fd(socket.as_raw_fd());
        let entry = opcode::Recv::new(fd, space.as_mut_ptr(), space.len() as u32).build();
        self.receiving = true;
        // SAFETY: the buffer is not touched until the completion, and leaked when the link is dropped before; the
        // socket is closed only after entries have reached the kernel.
        unsafe { ring.push(entry.user_data(Op::Receive.token(self.number))) };
    }

    /// Bytes arrived, or the connection ended.
    pub(crate) fn handle_received(&mut self, completion: &Completion, now: Instant) -> Result<(), LinkError> {
        self.receiving = false;
        let bytes = match completion.outcome() {
            Ok(0) => return Err(LinkError::Closed),
            Ok(bytes) => bytes as usize,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            // Linux' TLS has no other word for "a record that is no data came": the other side said that it ends.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => return Err(LinkError::Closed),
            Err(error) => return Err(error.into()),
        };
        self.heard = now;
        self.filled += bytes;
        if !self.is_open() {
            // Whatever it says now comes too late.
            self.taken = self.filled;
        }
        Ok(())
    }

    /// The next message, once it is whole.
    pub(crate) fn next_message(&mut self) -> Result<Option<Message>, MessageError> {
        let decoded = decode(&self.received[self.taken..self.filled])?;
        Ok(decoded.map(|(message, bytes)| {
            self.taken += bytes;
            message
        }))
    }

    /// Sends what there is.
    pub(crate) fn pump(&mut self, turn: &mut Turn<'_>) -> Result<(), LinkError> {
        let Some(socket) = &self.socket else { return Ok(()) };
        self.outgoing.pump(socket, turn)?;
        if self.outgoing.has_ended() {
            // Again and again until the replica has closed its side; no harm in that.
            let _ = shutdown(socket.as_raw_fd(), Shutdown::Write);
        }
        Ok(())
    }

    /// The log waits for memory that this link holds.
    pub(crate) fn give_way(&mut self, turn: &mut Turn<'_>) -> Result<(), LinkError> {
        match &self.socket {
            Some(socket) if self.outgoing.give_way(socket, turn)? => Ok(()),
            _ => Err(LinkError::Blocking),
        }
    }

    /// Ends the connection with a word of explanation; the link is closed when the replica has read it.
    pub(crate) fn refuse(&mut self, refuse: &Refuse, now: Instant) {
        if self.socket.is_some() && self.is_open() {
            let mut last_message = Vec::new();
            Message::Refuse(refuse.clone()).encode(&mut last_message);
            self.outgoing.send_last(last_message);
            self.phase = Phase::Closing(now + CLOSING_TIME_MAX);
        }
    }

    /// Ends the connection at once.
    pub(crate) fn close(&mut self, ring: &mut Ring, log: &mut Log) {
        let Some(socket) = self.socket.take() else { return };
        if !matches!(self.phase, Phase::Closing(_)) {
            // What the kernel still has to send is of no use; with it go the references to the log buffer.
            let at_once = libc::linger { l_onoff: 1, l_linger: 0 };
            let _ = setsockopt(&socket, sockopt::Linger, &at_once);
        }
        self.phase = Phase::Closed;
        // Entries name the socket by its number, which must mean the same until they have reached the kernel.
        let _ = ring.submit();
        let _ = shutdown(socket.as_raw_fd(), Shutdown::Both);
        self.outgoing.close(log);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if self.receiving {
            // The kernel may still write there; nobody will be told when it is done.
            std::mem::forget(std::mem::take(&mut self.received));
        }
        self.outgoing.leak();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::zero_copy::ZERO_COPY_SENDS_MAX;

    #[test]
    fn completions_find_their_link_and_operation() {
        let of = |id| Op::of(&Completion { token: Token::new(Owner::Peer, id), result: 0, flags: 0 });
        let id_bits = (1 << 56) - 1;
        for link in [LinkNo(1), LinkNo(u32::MAX)] {
            for op in [Op::Receive, Op::Writable, Op::Send(0), Op::Send(ZERO_COPY_SENDS_MAX - 1)] {
                assert_eq!(of(op.token(link) & id_bits), Some((link, op)));
            }
        }
        for foreign in [0, 1, u64::from(u32::MAX), SHIPPER_TOKEN - 1] {
            assert_eq!(of(foreign), None, "{foreign:x}");
        }
    }
}
