//! What a session tells of itself: to the driver of its connection, and to CLIENT LIST.

use std::net::IpAddr;
use std::time::Instant;

use bytes::BytesMut;

use crate::clients::limits::DisconnectReason;
use crate::session::command::spec::Transaction;
use crate::session::description::Description;
use crate::session::id::SessionId;
use crate::session::parked::Parked;
use crate::users::login::FailedLogins;

use super::Session;
use super::{BACKLOG_BYTES_MAX, WATCHED_BYTES};

impl Session {
    /// The connection's number.
    pub fn id(&self) -> SessionId {
        self.client.id
    }

    /// The connection comes from there.
    pub fn comes_from(&mut self, address: IpAddr) {
        self.client.comes_from = Some(address);
    }

    /// True once it is known who the client is.
    pub fn is_authenticated(&self) -> bool {
        self.client.user.is_some()
    }

    /// Logins that failed since the last call.
    pub fn take_failed_logins(&mut self) -> FailedLogins {
        std::mem::take(&mut self.client.failed_logins)
    }

    /// Why the client has to be disconnected at once, if it has to; told once.
    pub fn take_expelled(&mut self) -> Option<DisconnectReason> {
        self.expelled.take()
    }

    /// True when commands were left for the next turn: call `go_on` then.
    pub fn has_yielded(&self) -> bool {
        self.yielded
    }

    /// When `resume` must be called at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        let parked = self.parked.as_ref().and_then(Parked::deadline);
        parked.into_iter().chain(self.outbox.deadline()).min()
    }

    /// The bytes to send now; the caller takes them out.
    pub fn output(&mut self) -> &mut BytesMut {
        self.outbox.output()
    }

    /// True when the connection is to be closed once everything is sent.
    pub fn closing(&self) -> bool {
        self.closing && !self.outbox.is_holding()
    }

    /// True when commands were left because too much output was waiting, and the caller has since taken it: call `resume`.
    pub fn can_go_on(&self) -> bool {
        self.stalled && !self.outbox.is_full()
    }

    /// True when replies are held.
    pub fn holds_replies(&self) -> bool {
        self.outbox.is_holding()
    }

    /// True while its user is what it was when the client authenticated.
    pub fn is_still_welcome(&self) -> bool {
        let users = self.client.settings.users.borrow();
        self.client.user.as_ref().is_none_or(|user| users.get(&user.name) == Some(user))
    }

    /// True while it waits for the node: replies are held, or it blocks.
    pub fn is_waiting(&self) -> bool {
        self.parked.is_some() || self.outbox.is_holding()
    }

    /// True when no reply will come that is not in `output`, unless more input does.
    pub fn is_done(&self) -> bool {
        !self.is_waiting() && !self.stalled && !self.yielded
    }

    /// The memory that its client takes: what is half sent, queued, and not yet read.
    pub fn buffered_bytes(&self) -> usize {
        let queued = self.client.transaction.as_ref().map_or(0, Transaction::kept_bytes);
        let parked = self.parked.as_ref().map_or(0, Parked::kept_bytes);
        let watched: usize = self.client.watched.keys().map(|key| key.len() + WATCHED_BYTES).sum();
        self.input.len() + queued + parked + watched + self.outbox.kept_bytes()
    }

    /// What CLIENT LIST tells.
    pub fn description(&self) -> Description<'_> {
        let transaction = self.client.transaction.as_ref();
        Description {
            name: &self.client.name,
            user: self.client.user.as_ref().map_or("", |user| &user.name),
            last_command: self.last_command,
            blocked: self.parked.is_some(),
            queued: transaction.map(Transaction::len),
            input_bytes: self.input.len() + transaction.map_or(0, Transaction::kept_bytes),
            output_bytes: self.outbox.kept_bytes(),
            held_replies: self.outbox.held_replies(),
            resp3: self.outbox.reply.resp3,
            level: self.client.level,
        }
    }

    /// False while the socket should not be read: too much is waiting already.
    pub fn wants_input(&self) -> bool {
        !self.closing && (self.is_runnable() || self.reads_ahead || self.input.len() < BACKLOG_BYTES_MAX)
    }
}
