//! The client sockets on the ring: receives into `recv_buffers`, hands bytes to sessions, sends what sessions answer.
//! Driven by `reactor`; knows the ring and `Session`'s bytes, nothing of commands.

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use bytes::BytesMut;
use io_uring::{cqueue, opcode, squeue, types};
use walferry_engine::ring::{Completion, Owner, Ring, Token};

use super::host::{Host, SessionId};
use super::node::Node;
use super::recv_buffers::{RECV_BUFFER_BYTES, RECV_GROUP, RecvBuffers};
use super::session::{Session, SessionSettings};

const OP_RECV: u64 = 0;
const OP_SEND: u64 = 1;
const OP_BITS: u32 = 8;
const SLOT_BITS: u32 = 24;
const SLOT_MASK: u64 = (1 << SLOT_BITS) - 1;

/// Connections a slot number can tell apart; `clients_max` of the configuration is below it.
pub const CLIENTS_MAX: usize = 1 << 20;
const _: () = assert!(CLIENTS_MAX as u64 <= SLOT_MASK);

/// One client's socket and session. Dropped only when no operation on it is in flight.
struct Connection {
    socket: OwnedFd,
    session: Session,
    receiving: bool,
    /// Bytes that the send in flight reads from, and how many of them are sent.
    outgoing: BytesMut,
    sending: bool,
    /// The client closed its side, or a socket error: nothing more will come.
    ended: bool,
    dirty: bool,
}

/// All clients of a node.
pub struct Clients {
    slots: Vec<Option<Connection>>,
    /// Grows when a slot is reused, so that an old session id never names a new client.
    generations: Vec<u32>,
    free: Vec<usize>,
    dirty: Vec<usize>,
    starved: Vec<usize>,
    settings: SessionSettings,
    clients_max: usize,
}

fn token(slot: usize, op: u64) -> u64 {
    Token::new(Owner::Client, (slot as u64) << OP_BITS | op).into()
}

impl Clients {
    /// No clients yet; at most `clients_max` at once.
    pub fn new(settings: SessionSettings, clients_max: usize) -> Clients {
        Clients {
            slots: Vec::new(),
            generations: Vec::new(),
            free: Vec::new(),
            dirty: Vec::new(),
            starved: Vec::new(),
            settings,
            clients_max: clients_max.min(CLIENTS_MAX),
        }
    }

    /// Connections that are open now.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    fn slot_of(&self, id: SessionId) -> Option<usize> {
        let slot = (id.0 & SLOT_MASK) as usize;
        let live = self.generations.get(slot) == Some(&((id.0 >> SLOT_BITS) as u32));
        (live && self.slots[slot].is_some()).then_some(slot)
    }

    /// Takes over an accepted socket, or tells the client that there are too many.
    pub fn accept(&mut self, socket: OwnedFd, address: SocketAddr, ring: &mut Ring) {
        if self.len() >= self.clients_max {
            let text = b"-ERR max number of clients reached (clients_max)\r\n";
            // Best effort: the socket is new, so its buffer takes this line; then it is closed.
            let _ = nix::sys::socket::send(socket.as_raw_fd(), text, nix::sys::socket::MsgFlags::MSG_DONTWAIT);
            return;
        }
        if let Err(error) = nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::TcpNoDelay, &true) {
            tracing::debug!(%address, %error, "TCP_NODELAY was refused");
        }
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.generations.push(0);
            self.slots.len() - 1
        });
        let id = SessionId(u64::from(self.generations[slot]) << SLOT_BITS | slot as u64);
        self.slots[slot] = Some(Connection {
            socket,
            session: Session::new(id, &self.settings),
            receiving: false,
            outgoing: BytesMut::new(),
            sending: false,
            ended: false,
            dirty: false,
        });
        self.receive(slot, ring);
    }

    fn receive(&mut self, slot: usize, ring: &mut Ring) {
        let Some(connection) = self.slots[slot].as_mut() else { return };
        if connection.receiving || connection.ended || !connection.session.wants_input() {
            return;
        }
        connection.receiving = true;
        let entry =
            opcode::Recv::new(types::Fd(connection.socket.as_raw_fd()), std::ptr::null_mut(), RECV_BUFFER_BYTES as u32)
                .buf_group(RECV_GROUP)
                .build()
                .flags(squeue::Flags::BUFFER_SELECT)
                .user_data(token(slot, OP_RECV));
        // SAFETY: the buffer is the kernel's choice from a group that lives as long as the ring; the socket is kept
        // until `receiving` is false again.
        unsafe { ring.push(entry) };
    }

    /// A receive or a send ended.
    pub fn handle_completion(
        &mut self,
        completion: &Completion,
        buffers: &mut RecvBuffers,
        ring: &mut Ring,
        node: &mut Node,
    ) {
        let id = completion.token.id();
        let slot = (id >> OP_BITS) as usize;
        match id & ((1 << OP_BITS) - 1) {
            OP_RECV => self.received(slot, completion, buffers, node),
            _ => self.sent(slot, completion.result),
        }
        self.receive_unless_starved(slot, completion.result, ring);
        self.mark(slot);
    }

    fn receive_unless_starved(&mut self, slot: usize, result: i32, ring: &mut Ring) {
        if result == -libc::ENOBUFS {
            self.starved.push(slot);
        } else {
            self.receive(slot, ring);
        }
    }

    fn received(&mut self, slot: usize, completion: &Completion, buffers: &mut RecvBuffers, node: &mut Node) {
        let buffer = cqueue::buffer_select(completion.flags);
        if let Some(connection) = self.slots[slot].as_mut() {
            connection.receiving = false;
            match (completion.result, buffer) {
                (length, Some(id)) if length > 0 => {
                    connection.session.handle_input(buffers.bytes(id, length as usize), node);
                }
                (result, _) if result == -libc::ENOBUFS || result == -libc::EINTR => {}
                _ => connection.ended = true,
            }
        }
        if let Some(id) = buffer {
            buffers.give_back(id);
        }
    }

    fn sent(&mut self, slot: usize, result: i32) {
        let Some(connection) = self.slots[slot].as_mut() else { return };
        connection.sending = false;
        if result > 0 {
            let _ = connection.outgoing.split_to(result as usize);
            if connection.outgoing.is_empty() {
                connection.outgoing.clear();
            }
        } else if result != -libc::EINTR {
            connection.ended = true;
        }
    }

    /// Something that the session waits for may have come: releases its replies and lets it go on with its input.
    pub fn wake(&mut self, id: SessionId, node: &mut Node) {
        let Some(slot) = self.slot_of(id) else { return };
        if let Some(connection) = self.slots[slot].as_mut() {
            connection.session.release(node);
            connection.session.resume(node);
        }
        self.mark(slot);
    }

    fn mark(&mut self, slot: usize) {
        if let Some(connection) = self.slots[slot].as_mut()
            && !connection.dirty
        {
            connection.dirty = true;
            self.dirty.push(slot);
        }
    }

    /// Sends what sessions have answered, arms receives, and closes what has ended. Once a turn.
    pub fn flush(&mut self, ring: &mut Ring, node: &mut Node) {
        for slot in std::mem::take(&mut self.starved) {
            self.receive(slot, ring);
        }
        let mut dirty = std::mem::take(&mut self.dirty);
        for slot in dirty.drain(..) {
            self.flush_one(slot, ring, node);
        }
        self.dirty = dirty;
    }

    fn flush_one(&mut self, slot: usize, ring: &mut Ring, node: &mut Node) {
        let Some(connection) = self.slots[slot].as_mut() else { return };
        connection.dirty = false;
        if !connection.sending && !connection.ended {
            if connection.outgoing.is_empty() {
                std::mem::swap(&mut connection.outgoing, connection.session.output());
                if connection.session.can_go_on() {
                    // It had stopped because too much was waiting to be sent.
                    connection.session.resume(node);
                }
            }
            if !connection.outgoing.is_empty() {
                connection.sending = true;
                let entry = opcode::Send::new(
                    types::Fd(connection.socket.as_raw_fd()),
                    connection.outgoing.as_ptr(),
                    u32::try_from(connection.outgoing.len()).unwrap_or(u32::MAX),
                )
                .flags(libc::MSG_NOSIGNAL)
                .build()
                .user_data(token(slot, OP_SEND));
                // SAFETY: `outgoing` is not touched and the connection not dropped while `sending`.
                unsafe { ring.push(entry) };
            }
        }
        let drained = !connection.sending && connection.outgoing.is_empty() && connection.session.output().is_empty();
        let over = connection.ended || (connection.session.closing() && drained);
        if !over {
            self.receive(slot, ring);
            return;
        }
        connection.ended = true;
        if connection.receiving || connection.sending {
            // Wakes the operations in flight; the last of them drops the connection.
            let _ = nix::sys::socket::shutdown(connection.socket.as_raw_fd(), nix::sys::socket::Shutdown::Both);
            return;
        }
        node.unpark(connection.session.id());
        self.slots[slot] = None;
        self.generations[slot] = self.generations[slot].wrapping_add(1);
        self.free.push(slot);
    }

    /// Calls `each` for every open session. A session that has something to send afterwards needs a `wake`.
    pub fn for_each(&mut self, mut each: impl FnMut(&mut Session)) {
        for connection in self.slots.iter_mut().flatten() {
            each(&mut connection.session);
        }
    }

    /// True when no reply is waiting to be sent.
    pub fn drained(&mut self) -> bool {
        self.slots.iter_mut().flatten().all(|connection| {
            connection.ended
                || (connection.outgoing.is_empty()
                    && connection.session.output().is_empty()
                    && !connection.session.holding())
        })
    }
}
