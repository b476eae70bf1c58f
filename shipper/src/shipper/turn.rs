//! One turn: completions and messages of links, reports of catch-ups, sending, lag and slots.

use std::time::Instant;

use walferry_cluster::insync::Change;
use walferry_cluster::member::MemberName;
use walferry_cluster::message::{Ack, Message, Refuse, RefuseCode};
use walferry_engine::epoch::EpochHistory;
use walferry_engine::log::Log;
use walferry_engine::lsn::Lsn;
use walferry_engine::mutants;
use walferry_engine::ring::{Completion, Ring};

use super::Shipper;
use super::admission::no_member;
use crate::commit_rule::Standing;
use crate::link::{HANDSHAKE_TIME_MAX, Link, LinkError, LinkNo, Op, Phase};
use crate::outgoing::Turn;
use crate::progress::Progress;
use crate::replica::Replica;
use crate::sender::View;

impl Shipper {
    /// Takes a completion of [`walferry_engine::ring::Owner::Peer`]; others than its own are left alone.
    pub fn handle_completion(&mut self, completion: &Completion, ring: &mut Ring, log: &mut Log, now: Instant) {
        let Some((number, op)) = Op::of(completion) else { return };
        self.with_link(number, |shipper, link| {
            let outcome = match op {
                Op::Writable => {
                    link.outgoing.handle_writable();
                    Ok(())
                }
                Op::Send(place) => link.outgoing.handle_send(place, completion, log).map_err(LinkError::Socket),
                Op::Receive => {
                    let outcome = link.handle_received(completion, now);
                    outcome.and_then(|()| shipper.read_messages(link, now)).map(|()| link.receive(ring))
                }
            };
            if let Err(error) = outcome {
                shipper.end(link, &error, ring, log, now);
                link.receive(ring);
            }
        });
    }

    pub(super) fn read_messages(&mut self, link: &mut Link, now: Instant) -> Result<(), LinkError> {
        while let Some(message) = link.next_message()? {
            let said = match &message {
                Message::Hello(hello) => Some(&hello.name),
                Message::Fetch(fetch) => Some(&fetch.name),
                Message::FetchFrames(request) => Some(&request.name),
                _ => None,
            };
            if let Some(Err(error)) = said.map(|name| link.caller.check(name)) {
                let text = error.to_string();
                return Err(LinkError::Refused(Refuse { code: RefuseCode::Protest, text }));
            }
            match (&link.phase, message) {
                (Phase::Probe(None), Message::Hello(hello)) => link.phase = Phase::Probe(Some(hello)),
                (Phase::Probe(None), Message::Fetch(fetch)) => link.phase = Phase::Fetch(fetch),
                (Phase::Probe(None), Message::FetchFrames(request)) => link.phase = Phase::FetchFrames(request),
                (Phase::Streaming(name), Message::Ack(ack)) => {
                    let replica = self.replicas.get_mut(name).expect("a link feeds a known replica");
                    link.outgoing.handle_stamp(ack.stamp_us);
                    let moved = acknowledge(replica, link, &ack, self.common.clock_us(now))?;
                    if moved {
                        self.slots.advance(name, replica.progress.flushed());
                        self.acknowledgements += 1;
                        self.moved = true;
                    }
                }
                (Phase::Streaming(name), Message::Traced(traced)) => self.traces.answer(name, traced),
                _ => return Err(LinkError::Turn),
            }
        }
        Ok(())
    }

    /// One turn. See the module's head for its duties.
    pub fn poll(&mut self, ring: &mut Ring, log: &mut Log, history: &EpochHistory, now: Instant) {
        let sealed_before = self.view.sealed;
        self.turned = now;
        self.common.epoch = history.last_epoch();
        self.view = View {
            hot_start: log.hot_start(),
            sealed: log.sealed(),
            flushed: log.flushed(),
            committed: self.committed(log.flushed()),
            hot_bytes_max: log.config().log_buffer_bytes as u64,
        };
        self.timeline.record(self.view.sealed, now);
        self.take_reports(ring, log, now);
        self.answer_hellos(ring, log, history, now);
        self.give_snapshots(ring, log, history, now);
        self.serve_frames(log, history);
        self.drop_silent(ring, log, now);
        let news = self.view.sealed > sealed_before && !self.links.is_empty();
        if news && !self.waits() {
            // Nobody waits for replicas: the disk starts on its part of the work before the sockets get theirs.
            let _ = ring.submit();
        }
        self.send(ring, log, now);
        if news {
            let _ = ring.submit();
        }
        self.unblock(ring, log, now);
        self.links.retain(|_, link| !link.is_over());
        self.observe(now);
        self.keep_slots(ring, log, now);
    }

    pub(super) fn take_reports(&mut self, ring: &mut Ring, log: &mut Log, now: Instant) {
        while let Ok(report) = self.reports.try_recv() {
            self.with_link(report.link, |shipper, link| {
                // One that was closed meanwhile has no thread any more, and nothing to go on with.
                if !link.outgoing.is_catching_up() {
                    return;
                }
                match link.outgoing.caught_up(report.outcome, now) {
                    Ok(position) => {
                        let replica = link.replica().map(MemberName::as_str);
                        tracing::info!(replica, %position, "caught up, streaming from memory");
                    }
                    Err(error) => shipper.end(link, &error.into(), ring, log, now),
                }
            });
        }
        if let Some(outcome) = self.slot_file.poll() {
            match &outcome {
                Ok(()) if self.slots_told.is_over() => tracing::info!("the slots are saved again"),
                Ok(()) => {}
                Err(error) => {
                    let text = error.to_string();
                    if self.slots_told.tell(&text, now).is_some() {
                        tracing::error!(
                            "the slots cannot be saved, no log is recycled meanwhile; it is tried again: {text}"
                        );
                    }
                }
            }
            self.slots.saved(outcome.is_ok(), now);
        }
    }

    pub(super) fn drop_silent(&mut self, ring: &mut Ring, log: &mut Log, now: Instant) {
        let timeout = self.config.peer_timeout;
        let late = |link: &Link| match link.phase {
            Phase::Closing(until) => now >= until,
            Phase::Closed => false,
            Phase::Probe(_) | Phase::Fetch(_) | Phase::FetchFrames(_) | Phase::Streaming(_) => {
                is_handshake_late(link, now) || now.saturating_duration_since(link.heard) > timeout
            }
        };
        let numbers: Vec<LinkNo> = self.links.values().filter(|link| late(link)).map(|link| link.number).collect();
        for number in numbers {
            self.with_link(number, |shipper, link| {
                let late = is_handshake_late(link, now);
                let error = if late { LinkError::HandshakeTimeout } else { LinkError::Silent(timeout) };
                shipper.end(link, &error, ring, log, now);
            });
        }
        let gone = |replica: &&Replica| !replica.member && replica.link.is_some();
        let gone: Vec<_> =
            self.replicas.values().filter(gone).map(|replica| (replica.name.clone(), replica.link)).collect();
        for (name, number) in gone {
            if let Some(number) = number {
                self.end_link(number, &LinkError::Refused(no_member(&name)), ring, log, now);
            }
            self.replicas.remove(&name);
        }
    }

    pub(super) fn send(&mut self, ring: &mut Ring, log: &mut Log, now: Instant) {
        let mut failed = Vec::new();
        for link in self.links.values_mut() {
            let mut turn = Turn { log, ring, common: &self.common, view: self.view, traces: &self.traces, now };
            if let Err(error) = link.pump(&mut turn) {
                failed.push((link.number, error));
                continue;
            }
            let Some(replica) = link.replica().and_then(|name| self.replicas.get_mut(name)) else { continue };
            replica.progress.send(link.outgoing.sent().max(replica.progress.sent()));
            if !replica.caught_up && !link.outgoing.is_catching_up() && replica.progress.sent() >= self.view.sealed {
                replica.caught_up = true;
                self.moved = true;
            }
        }
        for (number, error) in failed {
            self.end_link(number, &error, ring, log, now);
        }
    }

    /// The log cannot go on because of memory that a link keeps in place.
    pub(super) fn unblock(&mut self, ring: &mut Ring, log: &mut Log, now: Instant) {
        while let Some(pin) = log.pin_blocking() {
            let holder = self.links.values().find(|link| link.outgoing.holds(pin));
            let Some(number) = holder.map(|link| link.number) else { return };
            self.with_link(number, |shipper, link| {
                let (common, traces) = (&shipper.common, &shipper.traces);
                let mut turn = Turn { log, ring, common, view: shipper.view, traces, now };
                if let Err(error) = link.give_way(&mut turn) {
                    shipper.end(link, &error, ring, log, now);
                }
            });
        }
    }

    pub(super) fn observe(&mut self, now: Instant) {
        let mut needed = self.view.sealed;
        for replica in self.replicas.values_mut() {
            needed = needed.min(replica.progress.applied());
            let age = self.timeline.age(replica.progress.flushed(), now);
            let lag = age.max(replica.silence(now));
            let may_join =
                replica.standing().streaming && has_everything(&replica.progress, self.view, self.config.epoch_start);
            match self.in_sync.observe(&replica.name, lag, may_join) {
                Some(Change::Joined) => tracing::info!(replica = %replica.name, "joined the in-sync set"),
                Some(Change::Left) => tracing::warn!(replica = %replica.name, ?lag, "left the in-sync set"),
                None => {}
            }
            let in_sync = self.in_sync.contains(&replica.name);
            self.moved |= in_sync != replica.in_sync;
            replica.in_sync = in_sync;
        }
        self.timeline.forget_before(needed);
        self.moved |= self.rule.set_short(self.in_sync.count() < self.config.min_in_sync);
        if std::mem::take(&mut self.moved) {
            let standings: Vec<Standing<'_>> = self.replicas.values().map(Replica::standing).collect();
            self.rule.update(&standings, self.view.flushed);
            self.shortage = self.rule.shortage(&standings);
        }
    }

    pub(super) fn keep_slots(&mut self, ring: &mut Ring, log: &mut Log, now: Instant) {
        let (sealed, keep_bytes_max) = (self.view.sealed, self.config.slot_keep_bytes_max);
        for name in self.slots.give_up(sealed, keep_bytes_max) {
            let restart = self.slots.restart(&name).unwrap_or(Lsn::ZERO);
            tracing::warn!(slot = %name, %restart, end = %sealed, keep_bytes_max, "a slot is lost: it holds no log any more");
        }
        let lost = |replica: &&Replica| replica.link.is_some() && self.slots.is_lost(&replica.name);
        let lost: Vec<(MemberName, LinkNo, Lsn)> = self
            .replicas
            .values()
            .filter(lost)
            .filter_map(|replica| Some((replica.name.clone(), replica.link?, replica.progress.flushed())))
            .collect();
        for (name, number, flushed) in lost {
            if flushed >= log.start() {
                if self.slots.revive(&name, sealed, keep_bytes_max) {
                    tracing::info!(slot = %name, "a lost slot holds the log again: its replica has come close");
                }
                continue;
            }
            let text = format!(
                "slot {name} is lost: it held back more than slot_keep_bytes_max = {keep_bytes_max}, and the log \
                 from {flushed} to {} is recycled",
                log.start()
            );
            let refuse = Refuse { code: RefuseCode::LogGone, text };
            self.end_link(number, &LinkError::Refused(refuse), ring, log, now);
        }
        if let Some(text) = self.slots.poll_save(false, now) {
            self.slot_file.write(text);
        }
    }
}

/// It has had its time to say what it is.
pub(super) fn is_handshake_late(link: &Link, now: Instant) -> bool {
    matches!(link.phase, Phase::Probe(None)) && now.saturating_duration_since(link.since) > HANDSHAKE_TIME_MAX
}

/// Whether a replica has confirmed, in this leadership, everything that any commit rests on (Kafka's rule: up to the high
/// watermark, and beyond where the epoch begins). At first nothing is committed, so that alone would let in whoever was sent
/// everything and has none of it.
pub(super) fn has_everything(progress: &Progress, view: View, epoch_start: Lsn) -> bool {
    let flushed = progress.flushed();
    let in_epoch = flushed > epoch_start || flushed == epoch_start && view.sealed == epoch_start;
    flushed >= view.committed && (in_epoch || mutants::is_on("join-without-proof"))
}

pub(super) fn acknowledge(replica: &mut Replica, link: &Link, ack: &Ack, clock_us: u64) -> Result<bool, LinkError> {
    // A catch-up thread has sent more than the last turn knew.
    replica.progress.send(link.outgoing.sent().max(replica.progress.sent()));
    Ok(replica.acknowledge(ack, clock_us)?)
}
