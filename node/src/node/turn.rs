//! What every turn of the loop does with the node and its sessions: the part that the reactor and the simulator share.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use walferry_applier::replay::Applied;
use walferry_engine::lsn::Lsn;
use walferry_engine::mutants;
use walferry_engine::ring::Ring;
use walferry_engine::world;
use walferry_shipper::shipper::Shipper;

use crate::error::DaemonError;
use crate::metrics::waterfall::{LEVELS, LevelsReached, ReplicaReached, Step, Waterfall};
use crate::node::scrub::Scrub;
use crate::node::{Clock, Heard, Node, Role};
use crate::session::Session;
use crate::session::id::SessionId;

/// The sessions of a node, wherever their bytes come from.
pub trait Sessions {
    /// Calls `act` for every open session. A session that has something to send afterwards needs a `wake`.
    fn for_each(&mut self, act: impl FnMut(&mut Session));
    /// Something that the session waits for may have come: releases its replies and lets it go on with its input.
    fn wake(&mut self, id: SessionId, node: &mut Node);
}

/// The node does what is due, and sessions that it released, or that are `ready` for another reason, go on.
pub fn run(
    node: &mut Node,
    ring: &mut Ring,
    sessions: &mut impl Sessions,
    ready: &mut Vec<SessionId>,
) -> Result<(), DaemonError> {
    node.poll(ring, ready)?;
    if let Some(reason) = node.take_abandoned() {
        // At once: no reply of this leadership may be taken for one of the next.
        sessions.for_each(|session| {
            session.abandon(&reason);
            ready.push(session.id());
        });
    }
    if !ready.is_empty() {
        ready.drain(..).for_each(|session| sessions.wake(session, node));
        // What the woken sessions wrote goes out with this turn, not with the next.
        node.submit(ring);
    }
    Ok(())
}

impl Node {
    /// How long the loop may sleep at most; none: until something completes.
    pub fn timeout(&self, now: Instant) -> Option<Duration> {
        if self.more_to_apply
            || self.counting.until.is_some()
            || self.failure.is_some()
            || !self.clients.asks.is_empty()
        {
            return Some(Duration::ZERO);
        }
        let link = match &self.role {
            Role::Leader(shipper) => shipper.next_timeout(now),
            Role::Replica(replica) => replica.next_timeout(now),
            Role::Leaderless(_) | Role::SteppedDown(_) => None,
        };
        let member = self.membership.as_ref().and_then(|membership| membership.next_timeout(now));
        let end = self.ending.as_ref().map(|ending| ending.until.saturating_duration_since(now));
        link.into_iter()
            .chain(self.log.next_timeout(now))
            .chain(self.store.next_timeout(now))
            .chain(member)
            .chain(end)
            .chain(self.silence_timeout(now))
            .min()
    }

    /// The time of this turn.
    pub fn set_now(&mut self, now: Instant, wall: SystemTime) {
        let wall_us = wall.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64);
        self.clock = Clock { now, wall_us };
    }

    /// Seals and submits what was appended, and ships it.
    pub fn submit(&mut self, ring: &mut Ring) {
        self.log.poll(ring, self.clock.now);
        if self.waterfall.is_following() {
            let now = world::now();
            self.waterfall.reached(Step::Sealed, self.log.sealed(), now);
            self.waterfall.reached(Step::Submitted, self.log.written(), now);
        }
        // By the clock of this moment: every stamp that the shipper knows was made before it.
        let alone = self.may_speak();
        if let Role::Leader(shipper) = &mut self.role {
            shipper.confirm_leadership(alone);
            shipper.feed_from(self.scrubbing.readable_from);
            shipper.poll(ring, &mut self.log, &self.history, self.clock.now);
            if self.waterfall.is_following() {
                follow_replicas(&mut self.waterfall, shipper, self.clock.now);
            }
        }
    }

    /// The node's duties of one turn; `ready` gets the sessions that may go on.
    pub fn poll(&mut self, ring: &mut Ring, ready: &mut Vec<SessionId>) -> Result<(), DaemonError> {
        if self.membership.is_some() {
            self.follow_orders(ring)?;
        }
        self.open_epoch();
        self.submit(ring);
        let applied = self.apply()?;
        self.notice_rollback();
        if self.waterfall.is_following() {
            self.waterfall.reached(Step::Flushed, self.log.flushed(), self.clock.now);
            self.waterfall.reached(Step::Applied, self.store.applied(), world::now());
        }
        if let Role::Replica(replica) = &mut self.role {
            let now = self.clock.now;
            replica.poll(ring, &mut self.log, &mut self.store, &mut self.history, now)?;
            let (fresh, at) = (replica.fresh_as_of(), replica.heard_at().or(self.heard.at));
            self.heard = Heard { flushed: replica.leader_flushed(), committed: replica.committed(), fresh, at };
            self.lost_commits += replica.take_lost_commits();
            // What the link received is written with this turn.
            self.log.poll(ring, now);
            self.take_snapshot(ring)?;
        }
        self.go_on_counting()?;
        self.make_snapshot()?;
        self.show_snapshots();
        self.advance()?;
        let waited = applied == Applied::Waits && !self.store.overloaded();
        self.more_to_apply = applied == Applied::More || waited;
        self.watch_sync_set();
        self.watch_lease();
        self.release(ready);
        self.clients.logins.done(ready);
        if let Role::Leader(shipper) = &self.role
            && self.membership.is_none()
            && let Some(epoch) = shipper.superseded()
        {
            let text =
                format!("epoch {epoch} has begun elsewhere: start this node with --follow and its leader's address");
            self.step_down(text, ring);
        }
        self.notice_failure(ring);
        Ok(())
    }

    /// The end of a turn: what was released in it is handed to the sockets. For the accounting.
    pub fn account(&mut self) {
        if self.waterfall.is_following()
            && let Role::Leader(shipper) = &mut self.role
        {
            for (name, traced) in shipper.take_traced() {
                self.waterfall.traced(name.as_str(), traced);
            }
        }
        if self.waterfall.is_awaiting() {
            let reached = LevelsReached {
                released: LEVELS.map(|level| self.released_at(level)),
                met: LEVELS.map(|level| self.met_at(level)),
            };
            self.waterfall.replied(&reached, world::now());
        }
        self.waterfall.account(self.log.flush_accounting().flushes(), self.clock.now);
    }

    /// Moves what depends on acknowledgements: the commit LSN, checkpoints, retention.
    pub(crate) fn advance(&mut self) -> Result<(), DaemonError> {
        let committed = self.committed();
        self.log.set_committed(committed);
        self.ask_for_space();
        self.store.poll_checkpoint(committed, self.clock.now)?;
        self.log.leave_spare(self.store.space_wanted(), self.store.writes_checkpoint());
        let slots = match &self.role {
            Role::Leader(_) if mutants::is_on("recycle-what-is-needed") => Lsn::MAX,
            Role::Leader(shipper) => shipper.slots_hold(),
            Role::Replica(_) => Lsn::MAX,
            // It may have led and lead again, with replicas that need its log. Nothing is appended meanwhile.
            Role::Leaderless(_) | Role::SteppedDown(_) => Lsn::ZERO,
        };
        self.look_at_segment()?;
        let scrub = self.scrubbing.walk.as_ref().map_or(Lsn::MAX, Scrub::hold);
        self.log.release_before(self.store.durable_applied().min(slots).min(scrub));
        self.poll_scrub()
    }
}

/// Tells the accounting how far the replicas are; what they were sent was sent just now.
pub(super) fn follow_replicas(waterfall: &mut Waterfall, shipper: &Shipper, heard_at: Instant) {
    let sent_at = world::now();
    for (name, progress) in shipper.progress() {
        let reached = ReplicaReached {
            sent: progress.sent(),
            written: progress.written(),
            flushed: progress.flushed(),
            applied: progress.applied(),
        };
        waterfall.replica_reached(name.as_str(), reached, sent_at, heard_at);
    }
}
