//! The client sockets on the ring: receives into `recv_buffers`, hands bytes to sessions, sends what sessions answer.
//! Driven by `reactor`; knows the ring and `Session`'s bytes, nothing of commands.

pub mod limits;
pub mod list;
pub mod newcomers;
pub mod recv_buffers;

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use io_uring::{cqueue, opcode, squeue, types};
use walferry_engine::ring::{Completion, Owner, Ring, Token};
use walferry_engine::told::Rarely;

use self::newcomers::Newcomers;
use crate::clients::limits::{ClientCounts, ClientLimits, DisconnectReason, Places, Signs, UNREAD_TIME_MIN};
use crate::clients::list::{Asked, ClientAnswer, ClientAsk, Seen, line};
use crate::clients::recv_buffers::{RECV_BUFFER_BYTES, RECV_GROUP, RecvBuffers};
use crate::node::Node;
use crate::node::turn::Sessions;
use crate::session::Session;
use crate::session::client::SessionSettings;
use crate::session::description::Description;
use crate::session::host::CommitPath;
use crate::session::id::SessionId;
use crate::users::login::NO_PLACE;

const OP_RECV: u64 = 0;
const OP_SEND: u64 = 1;
const OP_BITS: u32 = 8;
const SLOT_BITS: u32 = 24;
const SLOT_MASK: u64 = (1 << SLOT_BITS) - 1;
/// Linux' TLS has no other word for "a record that is no data came": the client said that it ends.
const NO_DATA_RECORD: i32 = -libc::EIO;

/// Connections a slot number can tell apart; `clients_max` of the configuration is below it.
pub const CLIENTS_MAX: usize = 1 << 20;
const _: () = assert!(CLIENTS_MAX as u64 <= SLOT_MASK);

/// Clients that are sent away at once are logged one by one up to this number, and counted beyond it.
const DISCONNECTS_LOGGED_MAX: usize = 8;
/// Clients that are sent away for what they sent are logged once in so long, and counted in between: whoever connects again at once
/// must not fill the log.
const EXPELLED_LOG_PAUSE: Duration = Duration::from_secs(10);

/// One client's socket and session. Dropped only when no operation on it is in flight.
struct Connection {
    socket: OwnedFd,
    session: Session,
    address: SocketAddr,
    since: Instant,
    /// When a command was executed last, as seen ten times a second.
    active: Instant,
    receiving: bool,
    /// Bytes that the send in flight reads from, and how many of them are sent.
    outgoing: BytesMut,
    sending: bool,
    /// When the send in flight began.
    sending_since: Instant,
    /// The client closed its side: it still gets its replies.
    input_ended: Option<Instant>,
    /// It is not known who the client is, since then.
    unknown_since: Option<Instant>,
    /// A socket error, or the client is sent away: nothing more is read or written.
    ended: bool,
    dirty: bool,
}

impl Connection {
    fn buffered_bytes(&self) -> usize {
        self.session.buffered_bytes() + self.outgoing.len()
    }

    /// Nothing more is read or written.
    fn end_at_once(&mut self) {
        self.ended = true;
        // What the kernel still has for it is of no use; without this it stays in memory until the client takes it.
        let at_once = libc::linger { l_onoff: 1, l_linger: 0 };
        let _ = nix::sys::socket::setsockopt(&self.socket, nix::sys::socket::sockopt::Linger, &at_once);
    }

    fn signs(&self, waiting: bool) -> Signs {
        Signs {
            active: self.active,
            waiting,
            sending_since: self.sending.then_some(self.sending_since),
            input_ended: self.input_ended,
            unknown_since: self.unknown_since,
        }
    }

    fn is_newcomer(&self) -> bool {
        !self.ended && !self.session.is_authenticated()
    }

    fn seen<'a>(&self, description: &'a Description<'a>) -> Seen<'a> {
        Seen {
            session: description,
            id: self.session.id(),
            address: self.address,
            descriptor: self.socket.as_raw_fd(),
            since: self.since,
            active: self.active,
            sending_bytes: self.outgoing.len(),
        }
    }
}

/// All clients of a node.
pub struct Clients {
    slots: Vec<Option<Connection>>,
    /// Grows when a slot is reused, so that an old session id never names a new client.
    generations: Vec<u32>,
    free: Vec<usize>,
    dirty: Vec<usize>,
    starved: Vec<usize>,
    /// Sessions that left commands for the next turn.
    yielded: Vec<usize>,
    settings: SessionSettings,
    limits: ClientLimits,
    counts: ClientCounts,
    expelled_told: Rarely,
    failed_logins_told: Rarely,
    displaced_told: Rarely,
    newcomers: Newcomers,
}

/// The open connection of this session, if it is still there.
fn find<'a>(
    slots: &'a [Option<Connection>],
    generations: &[u32],
    session: SessionId,
) -> Option<(usize, &'a Connection)> {
    let slot = (session.0 & SLOT_MASK) as usize;
    let live = generations.get(slot) == Some(&((session.0 >> SLOT_BITS) as u32));
    slots.get(slot)?.as_ref().filter(|_| live).map(|connection| (slot, connection))
}

fn token(slot: usize, op: u64) -> u64 {
    Token::new(Owner::Client, (slot as u64) << OP_BITS | op).into()
}

impl Sessions for Clients {
    fn for_each(&mut self, mut act: impl FnMut(&mut Session)) {
        for connection in self.slots.iter_mut().flatten() {
            act(&mut connection.session);
        }
    }

    fn wake(&mut self, id: SessionId, node: &mut Node) {
        let Some(slot) = self.slot_of(id) else { return };
        if let Some(connection) = self.slots[slot].as_mut() {
            connection.session.release(node);
            connection.session.resume(node);
        }
        self.mark(slot);
    }
}

impl Clients {
    /// No clients yet.
    pub fn new(settings: SessionSettings, limits: ClientLimits) -> Clients {
        let connected_max = limits.clients_max.min(CLIENTS_MAX);
        let settings = SessionSettings { places: Rc::new(Places::new(connected_max)), ..settings };
        Clients {
            slots: Vec::new(),
            generations: Vec::new(),
            free: Vec::new(),
            dirty: Vec::new(),
            starved: Vec::new(),
            yielded: Vec::new(),
            settings,
            limits: ClientLimits { clients_max: connected_max, ..limits },
            counts: ClientCounts { connected_max, ..ClientCounts::default() },
            expelled_told: Rarely::default(),
            failed_logins_told: Rarely::default(),
            displaced_told: Rarely::default(),
            newcomers: Newcomers::default(),
        }
    }

    /// Connections that are open now.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// What was counted until `look` was called last.
    pub fn counts(&self) -> ClientCounts {
        self.counts
    }

    fn slot_of(&self, id: SessionId) -> Option<usize> {
        find(&self.slots, &self.generations, id).map(|(slot, _)| slot)
    }

    /// Takes over an accepted socket, or tells the client that there are too many.
    pub fn accept(
        &mut self,
        socket: OwnedFd,
        address: SocketAddr,
        reached_at: Option<IpAddr>,
        ring: &mut Ring,
        now: Instant,
    ) {
        // A connection that is sent away takes its place until its last operation has ended; that is soon.
        if self.len() >= self.limits.clients_max && !self.displace(now) {
            return self.reject(&socket);
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
        let mut session = Session::new(id, reached_at, &self.settings);
        session.comes_from(address.ip());
        if session.closing() {
            // Its user, the default one, finds no place.
            self.free.push(slot);
            return self.reject(&socket);
        }
        self.counts.accepted += 1;
        let is_newcomer = !session.is_authenticated();
        if is_newcomer {
            self.newcomers.add(id, address.ip().to_canonical().is_loopback());
        }
        self.slots[slot] = Some(Connection {
            socket,
            session,
            unknown_since: is_newcomer.then_some(now),
            address,
            since: now,
            active: now,
            receiving: false,
            outgoing: BytesMut::new(),
            sending: false,
            sending_since: now,
            input_ended: None,
            ended: false,
            dirty: false,
        });
        self.receive(slot, ring);
    }

    /// Tells a client that there is no place for it.
    fn reject(&mut self, socket: &OwnedFd) {
        self.counts.rejected += 1;
        let text = format!("-{NO_PLACE}\r\n");
        // Best effort: the socket is new, so its buffer takes this line; then it is closed.
        let flags = nix::sys::socket::MsgFlags::MSG_DONTWAIT;
        let _ = nix::sys::socket::send(socket.as_raw_fd(), text.as_bytes(), flags);
    }

    /// Sends away the connection that has not said who it is for longest; false when each has.
    fn displace(&mut self, now: Instant) -> bool {
        let (slots, generations) = (&self.slots, &self.generations);
        let is_one = |session| find(slots, generations, session).is_some_and(|(_, one)| one.is_newcomer());
        let Some(oldest) = self.newcomers.oldest(is_one) else { return false };
        let slot = self.slot_of(oldest).expect("it was found just now");
        self.displace_one(slot, now);
        true
    }

    fn displace_one(&mut self, slot: usize, now: Instant) {
        let Some(connection) = self.slots[slot].as_mut() else { return };
        connection.end_at_once();
        self.counts.count(DisconnectReason::Displaced);
        if let Some(more) = self.displaced_told.tell(EXPELLED_LOG_PAUSE, now) {
            let address = connection.address;
            tracing::warn!(%address, more, "a client is disconnected: {}", DisconnectReason::Displaced);
        }
        self.mark(slot);
    }

    /// Ten times a second: connections that have not said who they are take no more than their share of the places.
    fn look_at_newcomers(&mut self, now: Instant) {
        let (slots, generations) = (&self.slots, &self.generations);
        let newcomer = |session| find(slots, generations, session).map(|(_, one)| one).filter(|one| one.is_newcomer());
        self.counts.unknown_now = self.newcomers.tidy(|session| newcomer(session).is_some());
        let waiting = slots.iter().enumerate().filter_map(|(slot, connection)| {
            let one = connection.as_ref().filter(|one| one.is_newcomer())?;
            Some((one.unknown_since?, slot))
        });
        for slot in newcomers::beyond_share(self.limits.clients_max, waiting, now) {
            self.displace_one(slot, now);
        }
    }

    fn receive(&mut self, slot: usize, ring: &mut Ring) {
        let Some(connection) = self.slots[slot].as_mut() else { return };
        let over = connection.ended || connection.input_ended.is_some();
        if connection.receiving || over || !connection.session.wants_input() {
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
                (0, _) | (NO_DATA_RECORD, _) => connection.input_ended = Some(node.now()),
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
            connection.session.read_ahead(false);
            let _ = connection.outgoing.split_to(result as usize);
            if connection.outgoing.is_empty() {
                connection.outgoing.clear();
            }
        } else if result != -libc::EINTR {
            connection.ended = true;
        }
    }

    fn mark(&mut self, slot: usize) {
        if let Some(connection) = self.slots[slot].as_mut()
            && !connection.dirty
        {
            connection.dirty = true;
            self.dirty.push(slot);
        }
    }

    /// True when the next turn must come at once.
    pub fn have_yielded(&self) -> bool {
        !self.yielded.is_empty()
    }

    /// Lets sessions go on with what they left in the last turn.
    pub fn go_on(&mut self, node: &mut Node) {
        for slot in std::mem::take(&mut self.yielded) {
            if let Some(connection) = self.slots[slot].as_mut().filter(|connection| !connection.ended) {
                connection.session.go_on(node);
            }
            self.mark(slot);
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
        self.expel(slot, node.now());
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
                connection.sending_since = node.now();
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
        if connection.session.has_yielded() && !connection.ended {
            self.yielded.push(slot);
        }
        let drained = !connection.sending && connection.outgoing.is_empty() && connection.session.output().is_empty();
        let session = &connection.session;
        let needs_nothing = session.is_done() || session.only_awaits_entries();
        let finished = session.closing() || (connection.input_ended.is_some() && needs_nothing);
        let over = connection.ended || (finished && drained);
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

    /// Ends the connection if its session says so.
    fn expel(&mut self, slot: usize, now: Instant) {
        let Some(connection) = self.slots[slot].as_mut().filter(|connection| !connection.ended) else { return };
        let Some(why) = connection.session.take_expelled() else { return };
        connection.end_at_once();
        self.counts.count(why);
        let Some(more) = self.expelled_told.tell(EXPELLED_LOG_PAUSE, now) else { return };
        let address = connection.address;
        if more == 0 {
            tracing::warn!(%address, "a client is disconnected: {why}");
        } else {
            tracing::warn!(%address, "a client is disconnected: {why}; {more} more were since the last such line");
        }
    }

    /// Ten times a second: counts commands, wakes sessions whose time is up, and sends away whom the limits do not allow.
    pub fn look(&mut self, now: Instant, ready: &mut Vec<SessionId>) -> (ClientCounts, u64) {
        let (mut commands, mut waiting, mut buffered) = (0, 0, 0);
        let mut leaving = Vec::new();
        for (slot, connection) in self.slots.iter_mut().enumerate() {
            let Some(connection) = connection.as_mut().filter(|connection| !connection.ended) else { continue };
            let failed = connection.session.take_failed_logins();
            if failed.count > 0 {
                self.counts.failed_logins += failed.count;
                if let Some(more) = self.failed_logins_told.tell(EXPELLED_LOG_PAUSE, now) {
                    let user = failed.user.as_deref().unwrap_or("(no user of this node)");
                    let (address, count) = (connection.address, failed.count);
                    tracing::warn!(%address, user, count, more, "logins fail: the name or the password is wrong");
                }
            }
            connection.unknown_since = match connection.unknown_since {
                _ if connection.session.is_authenticated() => None,
                since => since.or(Some(now)),
            };
            let executed = connection.session.take_commands();
            commands += executed;
            let is_waiting = connection.session.is_waiting();
            if executed > 0 || is_waiting {
                connection.active = now;
            }
            waiting += usize::from(is_waiting);
            buffered += connection.buffered_bytes();
            if connection.session.deadline().is_some_and(|deadline| deadline <= now) {
                ready.push(connection.session.id());
            }
            if let Some(why) = self.limits.judge(&connection.signs(is_waiting), now) {
                leaving.push((slot, why));
            }
            if connection.sending && now.saturating_duration_since(connection.sending_since) >= UNREAD_TIME_MIN {
                connection.session.read_ahead(true);
                if !connection.receiving && !connection.dirty {
                    // Its receive is armed at the end of this turn.
                    connection.dirty = true;
                    self.dirty.push(slot);
                }
            }
        }
        if buffered > self.limits.bytes_max {
            self.choose_largest(buffered - self.limits.bytes_max, &mut leaving);
        }
        self.send_away(&leaving);
        self.look_at_newcomers(now);
        self.counts.connected = self.len();
        self.counts.waiting = waiting;
        self.counts.buffered_bytes = buffered;
        (self.counts, commands)
    }

    /// Adds to `leaving` the clients with the largest buffers, until what they hold is `excess`.
    fn choose_largest(&self, excess: usize, leaving: &mut Vec<(usize, DisconnectReason)>) {
        let open = |(slot, connection): (usize, &Option<Connection>)| {
            let connection = connection.as_ref().filter(|connection| !connection.ended)?;
            Some((connection.buffered_bytes(), slot))
        };
        let mut by_size: Vec<(usize, usize)> = self.slots.iter().enumerate().filter_map(open).collect();
        by_size.sort_unstable_by(|a, b| b.cmp(a));
        let mut freed = 0;
        for (bytes, slot) in by_size {
            if freed >= excess {
                return;
            }
            freed += bytes;
            if !leaving.iter().any(|(known, _)| *known == slot) {
                leaving.push((slot, DisconnectReason::Evicted(bytes)));
            }
        }
    }

    fn send_away(&mut self, leaving: &[(usize, DisconnectReason)]) {
        for (index, (slot, why)) in leaving.iter().enumerate() {
            let Some(connection) = self.slots[*slot].as_mut() else { continue };
            connection.end_at_once();
            self.counts.count(*why);
            if index < DISCONNECTS_LOGGED_MAX {
                tracing::warn!(address = %connection.address, "a client is disconnected: {why}");
            }
            self.mark(*slot);
        }
        if let Some(more) = leaving.len().checked_sub(DISCONNECTS_LOGGED_MAX).filter(|more| *more > 0) {
            tracing::warn!("{more} more clients are disconnected at the same time; INFO clients counts them by reason");
        }
    }

    /// Sends away whose user is not what it was.
    pub fn follow_users(&mut self) {
        let open = self.slots.iter().enumerate().filter_map(|(slot, connection)| Some((slot, connection.as_ref()?)));
        let changed = open.filter(|(_, connection)| !connection.ended && !connection.session.is_still_welcome());
        let leaving: Vec<_> = changed.map(|(slot, _)| (slot, DisconnectReason::UserChanged)).collect();
        self.send_away(&leaving);
    }

    /// Answers CLIENT LIST and its like, and lets the session that asked go on.
    pub fn answer(&mut self, asked: Asked, now: Instant, node: &mut Node) {
        let concerned: Vec<usize> = (0..self.slots.len())
            .filter(|slot| {
                let open = self.slots[*slot].as_ref().filter(|connection| !connection.ended);
                open.is_some_and(|connection| {
                    let session = &connection.session;
                    asked.ask.concerns(asked.session, session.id(), connection.address, session.description().user)
                })
            })
            .collect();
        let answer = match asked.ask {
            ClientAsk::List(_) => {
                let mut text = String::new();
                for connection in concerned.iter().filter_map(|slot| self.slots[*slot].as_ref()) {
                    text.push_str(&line(&connection.seen(&connection.session.description()), now));
                    text.push('\n');
                }
                ClientAnswer::Text(text)
            }
            ClientAsk::Kill { .. } => ClientAnswer::Killed(concerned.len()),
            ClientAsk::KillAddress(_) => ClientAnswer::KilledAddress(!concerned.is_empty()),
        };
        if !matches!(answer, ClientAnswer::Text(_)) {
            let leaving: Vec<_> = concerned.into_iter().map(|slot| (slot, DisconnectReason::Killed)).collect();
            self.send_away(&leaving);
        }
        *asked.reply.borrow_mut() = Some(answer);
        self.wake(asked.session, node);
    }

    /// True when no reply is waiting to be sent.
    pub fn drained(&mut self) -> bool {
        self.slots.iter_mut().flatten().all(|connection| {
            connection.ended
                || (connection.outgoing.is_empty()
                    && connection.session.output().is_empty()
                    && !connection.session.holds_replies())
        })
    }
}
