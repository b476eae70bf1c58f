//! How links, replicas and slots end.

use std::time::Instant;

use walferry_cluster::member::MemberName;
use walferry_cluster::message::{Refuse, RefuseCode};
use walferry_engine::log::Log;
use walferry_engine::ring::Ring;

use super::Shipper;
use super::UNIDENTIFIED_TOLD_INTERVAL;
use crate::link::{Link, LinkError, LinkNo};
use crate::outgoing::Turn;
use crate::slots::Slots;

impl Shipper {
    /// Nothing is held for this replica, and it counts nowhere.
    pub(super) fn forget_replica(&mut self, name: &MemberName) {
        self.slots.forget(name);
        self.in_sync.forget(name);
        self.replicas.remove(name);
        self.moved = true;
    }

    /// An operator drops the slot of a replica that does not come back; what is said to that, or why it is not done.
    pub fn drop_slot(&mut self, name: &MemberName) -> Result<String, String> {
        if self.members.as_ref().is_some_and(|members| members.contains_key(name)) {
            return Err(format!("{name} is a member of the cluster: `walferry remove --name {name}` does without it"));
        }
        let Some(restart) = self.slots.restart(name) else {
            let known = self.slots.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ");
            let known = if known.is_empty() { "there is none" } else { &known };
            return Err(format!("there is no slot called {name}; the slots: {known}"));
        };
        let replica = self.replicas.get(name);
        if let Some(link) = replica.and_then(|replica| self.links.get(&replica.link?)) {
            return Err(format!(
                "the slot is in use: {name} is connected from {}. Stop that node first, it would make its slot anew",
                link.caller.address
            ));
        }
        if self.snapshots.progress(name).is_some() {
            return Err(format!("the slot is in use: {name} receives a snapshot. Stop that node first"));
        }
        let held = if self.slots.is_lost(name) { 0 } else { self.view.sealed.since(restart) };
        self.forget_replica(name);
        tracing::info!(slot = %name, held_bytes = held, "a slot was dropped by an operator");
        let text = format!("slot {name} is dropped: it held {held} bytes of log");
        let policy = self.rule.policy();
        if policy.names(name) {
            return Ok(format!(
                "{text}. The sync policy {policy} still names {name}: start the leader with another --sync"
            ));
        }
        Ok(text)
    }

    /// Works on one link, which is out of the map meanwhile; drops it once it is over. `None` when there is no such link.
    pub(super) fn with_link<T>(
        &mut self,
        number: LinkNo,
        work: impl FnOnce(&mut Shipper, &mut Link) -> T,
    ) -> Option<T> {
        let mut link = self.links.remove(&number)?;
        let result = work(self, &mut link);
        if !link.is_over() {
            self.links.insert(number, link);
        }
        Some(result)
    }

    /// Ends the link with this number, if it is still there.
    pub(super) fn end_link(&mut self, number: LinkNo, error: &LinkError, ring: &mut Ring, log: &mut Log, now: Instant) {
        self.with_link(number, |shipper, link| shipper.end(link, error, ring, log, now));
    }

    /// Ends a link that went wrong: says so here, and to the replica when it is its fault.
    pub(super) fn end(&mut self, link: &mut Link, error: &LinkError, ring: &mut Ring, log: &mut Log, now: Instant) {
        let replica = link.replica().and_then(|name| self.replicas.get_mut(name));
        if let Some(name) = replica.as_ref().map(|replica| replica.name.as_str()).filter(|_| link.is_open()) {
            if let Some(repeated) = self.links_told.tell(&format!("{name}: {error}"), now) {
                tracing::warn!(replica = name, address = %link.caller.address, repeated, "replica disconnected: {error}");
            }
        } else if let LinkError::Refused(refuse) = error {
            if let Some(repeated) = self.links_told.tell(&refuse.to_string(), now) {
                tracing::warn!(address = %link.caller.address, repeated, "a replica is refused: {refuse}");
            }
        } else if link.is_open()
            && let Some(more) = self.unidentified_told.tell(UNIDENTIFIED_TOLD_INTERVAL, now)
        {
            let count = more + 1;
            tracing::warn!(address = %link.caller.address, count, "a peer connection without a name ended: {error}");
        }
        if let Some(replica) = replica.filter(|replica| replica.link == Some(link.number)) {
            replica.link = None;
            self.catchups_broken += u64::from(replica.progress.flushed() < self.view.hot_start);
            replica.silent_since = now;
            replica.sent_bytes = replica.sent_bytes.plus(link.outgoing.bytes());
            replica.last_error = error.to_string();
            self.moved = true;
        }
        match error {
            LinkError::Refused(refuse) => link.refuse(refuse, now),
            LinkError::Message(_) | LinkError::Ack(_) | LinkError::Turn => {
                link.refuse(&Refuse { code: RefuseCode::Protest, text: error.to_string() }, now);
            }
            LinkError::Stopping => {
                link.refuse(&Refuse { code: RefuseCode::Stopping, text: error.to_string() }, now);
                let mut turn = Turn { log, ring, common: &self.common, view: self.view, traces: &self.traces, now };
                let _ = link.pump(&mut turn);
                link.close(ring, log);
            }
            _ => link.close(ring, log),
        }
    }

    /// The data directory is not this node's any more: nothing is written there.
    pub fn forget_slots(&mut self) {
        self.slots = Slots::default();
    }

    /// Ends every connection and makes the slots durable: the node stops, or steps down. The shipper is dropped next.
    pub fn close_all(&mut self, ring: &mut Ring, log: &mut Log, now: Instant) {
        for (_, mut link) in std::mem::take(&mut self.links) {
            self.end(&mut link, &LinkError::Stopping, ring, log, now);
        }
        if self.slots.is_saving() {
            let outcome = self.slot_file.wait();
            self.slots.saved(outcome.is_ok(), now);
        }
        if let Some(text) = self.slots.poll_save(true, now) {
            self.slot_file.write(text);
            let outcome = self.slot_file.wait();
            if let Err(error) = &outcome {
                tracing::error!("the slots cannot be saved: {error}");
            }
            self.slots.saved(outcome.is_ok(), now);
        }
    }
}
