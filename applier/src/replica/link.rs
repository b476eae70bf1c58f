//! The connection to the leader on the ring: it connects on a thread, receives into the staging memory or into the log, and sends
//! acknowledgements.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use io_uring::{opcode, types};
use walferry_cluster::member::ClusterId;
use walferry_cluster::message::{EPOCHS_PER_MESSAGE_MAX, Hello, Message, PROTOCOL_VERSION, Traced};
use walferry_engine::epoch::EpochHistory;
use walferry_engine::log::Log;
use walferry_engine::lsn::Epoch;
use walferry_engine::ring::{Completion, Owner, Ring, Token};
use walferry_engine::world::{self, Pace};

use super::{CONNECT_TIME_MAX, INSTALL_INTERVAL, LinkError, OP_RECEIVE, OP_SEND, Phase, RAW_BYTES_MAX, Replica};
use crate::ack::{Acks, Reached};
use crate::connect::{Connected, connect_to};
use crate::error::ReplicaError;
use crate::store::Store;

impl Replica {
    /// When `poll` is due at the latest.
    pub fn next_timeout(&self, now: Instant) -> Option<Duration> {
        let at = match &self.phase {
            Phase::Resting(until) => *until,
            Phase::Flushing | Phase::Connecting(_) | Phase::Closing | Phase::Fetching(_) => return None,
            Phase::Fetched(_) => now + INSTALL_INTERVAL,
            Phase::Greeting => self.heard_at + self.config.peer_timeout,
            Phase::Streaming => {
                let heartbeat = now + self.config.heartbeat_interval;
                self.acks.echo_due().map_or(heartbeat, |echo| echo.min(heartbeat))
            }
        };
        Some(at.saturating_duration_since(now))
    }

    /// True when no operation of the link is in flight: it may be dropped.
    pub fn is_quiet(&self) -> bool {
        self.receiving.is_none() && !self.sending
    }

    /// An operation of a link that was closed for good ended.
    pub fn handle_late_completion(&mut self, completion: &Completion) {
        match completion.token.id() {
            OP_SEND => self.sending = false,
            OP_RECEIVE => self.receiving = None,
            _ => {}
        }
    }

    /// Ends the link; drop it once `is_quiet`. False while the receive in flight still fills the log's memory: the log must not
    /// be written to by anybody else until that has ended.
    pub fn close(&mut self) -> bool {
        if let Some(socket) = &self.socket {
            // Fails only when the connection is gone already.
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
        self.phase = Phase::Closing;
        self.receiving != Some(true)
    }

    /// An operation of the link ended.
    pub fn handle_completion(
        &mut self,
        completion: &Completion,
        ring: &mut Ring,
        log: &mut Log,
        store: &mut Store,
        history: &mut EpochHistory,
        now: Instant,
    ) -> Result<(), ReplicaError> {
        let outcome = completion.outcome();
        if completion.token.id() == OP_SEND {
            self.sending = false;
            match outcome {
                Ok(bytes) => self.sent += bytes as usize,
                Err(error) => self.fail(LinkError::Io(error), now),
            }
            return self.advance(ring, log, store, history, now);
        }
        let into_log = self.receiving.take().unwrap_or(false);
        let open = matches!(self.phase, Phase::Greeting | Phase::Streaming);
        match outcome {
            Ok(_) | Err(_) if !open => {}
            Ok(0) => self.fail(LinkError::Closed, now),
            Ok(bytes) => {
                self.heard_at = now;
                self.bytes_at = Some(now);
                if !into_log {
                    self.receiver.advance(bytes as usize);
                } else if let Err(error) = self.received_raw(bytes as usize, log, now) {
                    self.fail(error, now);
                }
            }
            // Linux' TLS has no other word for "a record that is no data came": the other side said that it ends.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => self.fail(LinkError::Closed, now),
            Err(error) => self.fail(LinkError::Io(error), now),
        }
        self.advance(ring, log, store, history, now)
    }

    pub(super) fn connect(&mut self) {
        let (outbox, inbox) = channel();
        let timeout = CONNECT_TIME_MAX.min(self.config.peer_timeout);
        let (leader, links, waker) = (self.config.leader.clone(), Arc::clone(&self.config.links), self.waker.clone());
        // A name server may take its time: not on the ring's thread.
        let connect = move || {
            // Nobody waits for it any more when the link was closed meanwhile.
            let _ = outbox.send(connect_to(&leader, timeout, &links));
            waker.wake();
            Pace::Over
        };
        match world::spawn("connect", Box::new(connect)) {
            Ok(_) => self.phase = Phase::Connecting(inbox),
            Err(error) => self.fail(LinkError::Io(error), world::now()),
        }
    }

    pub(super) fn greet(&mut self, connected: Connected, log: &Log, history: &EpochHistory, now: Instant) {
        let entries = history.entries();
        let newest = entries.len().saturating_sub(EPOCHS_PER_MESSAGE_MAX);
        let id = self.config.meta.cluster_id;
        let hello = Hello {
            protocol: PROTOCOL_VERSION,
            cluster_id: (id != 0).then_some(ClusterId(id)),
            name: self.config.name.clone(),
            client_address: self.config.client_address.clone(),
            flushed: log.flushed(),
            segment_bytes: self.config.meta.segment_bytes,
            crc: log.crc_at_end(),
            member: self.config.member,
            gives_up: if self.gives_up(log, history) { log.led() } else { Epoch(0) },
            history: entries[newest..].to_vec(),
        };
        self.receiver.reset();
        self.acks = Acks::new(now);
        self.freshness.handle_connect();
        self.outgoing.clear();
        self.sent = 0;
        Message::Hello(hello).encode(&mut self.outgoing);
        self.socket = Some(connected.stream);
        self.leader_at = connected.address;
        self.leader_proved = connected.proved;
        self.heard_at = now;
        self.phase = Phase::Greeting;
    }

    pub(super) fn receive_staging(&mut self, ring: &mut Ring) {
        let Some(socket) = &self.socket else { return };
        let space = self.receiver.space();
        let entry = opcode::Recv::new(types::Fd(socket.as_raw_fd()), space.as_mut_ptr(), space.len() as u32);
        self.receiving = Some(false);
        // SAFETY: the staging memory is neither moved nor read while `receiving`, and the link not dropped.
        unsafe { ring.push(entry.build().user_data(token(OP_RECEIVE))) };
    }

    pub(super) fn receive_raw(&mut self, ring: &mut Ring, log: &mut Log) {
        let Some(socket) = &self.socket else { return };
        let wanted = usize::try_from(self.receiver.raw()).unwrap_or(usize::MAX).min(RAW_BYTES_MAX);
        let Some(space) = log.receive_space(wanted) else { return };
        let entry = opcode::Recv::new(types::Fd(socket.as_raw_fd()), space.as_mut_ptr(), space.len() as u32);
        self.receiving = Some(true);
        // SAFETY: the log keeps the space in place until it was advanced over; the log is reset only when the link is quiet.
        unsafe { ring.push(entry.build().user_data(token(OP_RECEIVE))) };
    }

    pub(super) fn send(&mut self, ring: &mut Ring, log: &Log, store: &Store, now: Instant) {
        if self.sending || !matches!(self.phase, Phase::Greeting | Phase::Streaming) {
            return;
        }
        if self.sent == self.outgoing.len() && matches!(self.phase, Phase::Streaming) {
            let reached = Reached { written: log.written(), flushed: log.flushed(), applied: store.applied() };
            self.acks.handle_progress(reached, now);
            self.outgoing.clear();
            self.sent = 0;
            if let Some(ack) = self.acks.poll(self.config.heartbeat_interval, now) {
                Message::Ack(ack).encode(&mut self.outgoing);
            }
            while let Some(traced) = self.acks.poll_traced() {
                let flush = log.flush_accounting();
                let (flushes, records) = (flush.flushes(), flush.records());
                Message::Traced(Traced { flushes, records, ..traced }).encode(&mut self.outgoing);
            }
        }
        let rest = &self.outgoing[self.sent..];
        let Some(socket) = self.socket.as_ref().filter(|_| !rest.is_empty()) else { return };
        let entry = opcode::Send::new(types::Fd(socket.as_raw_fd()), rest.as_ptr(), rest.len() as u32);
        self.sending = true;
        // SAFETY: `outgoing` is not touched while `sending`, and the link not dropped.
        unsafe { ring.push(entry.flags(libc::MSG_NOSIGNAL).build().user_data(token(OP_SEND))) };
    }
}

pub(super) fn token(op: u64) -> u64 {
    Token::new(Owner::Peer, op).into()
}
