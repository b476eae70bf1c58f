//! What other nodes fetch besides the stream: snapshots of the store, and frames that they lost.

use std::time::Instant;

use walferry_cluster::message::{Fetch, Offer, PROTOCOL_VERSION, Refuse};
use walferry_cluster::register::MemberId;
use walferry_engine::epoch::EpochHistory;
use walferry_engine::log::Log;
use walferry_engine::lsn::Lsn;
use walferry_engine::ring::Ring;

use super::Shipper;
use super::admission::no_member;
use crate::chain;
use crate::frame_server::LogSnapshot;
use crate::handshake::judge_fetch;
use crate::link::{Link, LinkError, LinkNo, Phase};
use crate::progress::Progress;
use crate::refuse::turn_away;
use crate::replica::Replica;
use crate::snapshot::Snapshots;

impl Shipper {
    /// Gives snapshots to those who ask, and keeps the log for those who have one.
    pub(super) fn give_snapshots(&mut self, ring: &mut Ring, log: &mut Log, history: &EpochHistory, now: Instant) {
        self.snapshots.look(log.start(), |snapshot| chain::crc_before(log, snapshot));
        let asking = |link: &Link| matches!(link.phase, Phase::Fetch(_));
        let numbers: Vec<LinkNo> = self.links.values().filter(|link| asking(link)).map(|link| link.number).collect();
        for number in numbers {
            let mut link = self.links.remove(&number).expect("just seen");
            let Phase::Fetch(fetch) = link.phase.clone() else { unreachable!("just seen") };
            if let Err(refuse) = self.give_snapshot(&mut link, fetch, log, history, now) {
                self.end(&mut link, &LinkError::Refused(refuse), ring, log, now);
                link.receive(ring);
                self.links.insert(number, link);
            }
        }
        for (name, snapshot) in self.snapshots.poll(self.view.sealed, now) {
            // It was reserved before the transfer began, and is not dropped while that goes on.
            let held = self.slots.hold_from(&name, snapshot);
            debug_assert!(held, "{name} has no slot");
        }
    }

    pub(super) fn give_snapshot(
        &mut self,
        link: &mut Link,
        fetch: Fetch,
        log: &Log,
        history: &EpochHistory,
        now: Instant,
    ) -> Result<(), Refuse> {
        if self.members.as_ref().is_some_and(|members| !members.contains_key(&fetch.name)) {
            return Err(no_member(&fetch.name));
        }
        judge_fetch(&fetch, &self.as_leader(log, history))?;
        // Before the transfer: a node that replaced its store by a copy for which there is no slot would have lost it for nothing.
        self.make_place(&fetch.name)?;
        let reserved = self.slots.reserve(&fetch.name);
        debug_assert!(reserved, "{} has a place", fetch.name);
        let known = self.replicas.entry(fetch.name.clone());
        // A fetch confirms nothing.
        let id = self.members.as_ref().and_then(|members| members.get(&fetch.name)).copied().unwrap_or(MemberId(0));
        let replica = known.or_insert_with(|| Replica::new(fetch.name.clone(), id, Progress::default(), now));
        replica.member = true;
        tracing::info!(replica = %fetch.name, address = %link.caller.address, "a replica asks for a snapshot");
        let offer = Offer {
            protocol: PROTOCOL_VERSION,
            cluster_id: self.config.cluster_id,
            name: self.config.name.clone(),
            snapshot: Lsn::ZERO,
            segment_bytes: self.config.segment_bytes,
            bytes: 0,
            offset: 0,
            crc: 0,
            history: history.entries().to_vec(),
        };
        let Some(socket) = link.give_socket() else { return Ok(()) };
        if let Err((socket, refuse)) = self.snapshots.ask(socket, fetch, offer, self.view.sealed, now) {
            turn_away(&socket, &refuse);
        }
        Ok(())
    }

    /// Sends parts of the log to nodes that lost them.
    pub(super) fn serve_frames(&mut self, log: &Log, history: &EpochHistory) {
        let asking = |link: &Link| matches!(link.phase, Phase::FetchFrames(_));
        let numbers: Vec<LinkNo> = self.links.values().filter(|link| asking(link)).map(|link| link.number).collect();
        for number in numbers {
            let mut link = self.links.remove(&number).expect("just seen");
            let Phase::FetchFrames(request) = link.phase.clone() else { unreachable!("just seen") };
            if let Some(socket) = link.give_socket() {
                let members = self.members.as_ref().map(|members| members.keys().cloned().collect());
                let log = LogSnapshot::of(log, self.config.cluster_id, self.config.name.clone(), history);
                let log = log.for_members(members);
                self.frame_server.answer(socket, request, log);
            }
        }
    }

    /// The snapshots: the node makes them.
    pub fn snapshots(&mut self) -> &mut Snapshots {
        &mut self.snapshots
    }

    /// The node begins to make a snapshot as of `snapshot`. False when no frame of the log ends there.
    pub fn begin_snapshot(&mut self, snapshot: Lsn, log: &Log) -> bool {
        let crc = chain::crc_before(log, snapshot);
        if let Some(crc) = crc {
            self.snapshots.begun(snapshot, crc);
        }
        crc.is_some()
    }
}
