//! Which replies may be sent: how far each commit level is confirmed, and which sessions go on because of that. An acknowledgement of
//! a replica releases its replies here, at the end of the turn in which it arrived.

use std::time::{Duration, Instant};

use walferry_cluster::level::CommitLevel;
use walferry_engine::lsn::Lsn;
use walferry_engine::mutants;
use walferry_shipper::shipper::Shipper;

use crate::config::OnSyncLoss;
use crate::membership::Membership;
use crate::node::policy::no_policy;
use crate::node::{Node, Role};
use crate::session::id::SessionId;
use crate::session::parking::News;

/// No more changes are taken while those that are not durable yet need so much memory. A frame holds no others, so what a replica needs
/// to apply one is bounded by this and by one transaction (`APPENDED_TO_BYTES_MAX`).
const PENDING_BYTES_MAX: usize = 128 << 20;

impl Node {
    /// Finds the sessions that may go on.
    pub(crate) fn release(&mut self, ready: &mut Vec<SessionId>) {
        let mut queue = std::mem::take(&mut self.queue);
        queue.release(|level| self.released_at(level), ready);
        queue.release_committed(|| self.committed_and_applied(), ready);
        self.queue = queue;
        self.wake_readers(ready);
        if self.parking.is_empty() {
            return;
        }
        let applied = self.store.applied();
        let acknowledgements = match &self.role {
            Role::Leader(shipper) => shipper.acknowledgements(),
            Role::Replica(_) | Role::Leaderless(_) | Role::SteppedDown(_) => 0,
        };
        let news = News {
            // Who waits for log space is refused when it comes again.
            log_space: self.has_capacity() || self.refuses_for_silence(),
            applied: (applied != self.seen.applied).then_some(applied),
            acknowledged: acknowledgements != self.seen.acknowledged || applied != self.seen.applied,
            fresh: self.heard.fresh != self.seen.fresh || (self.leads() && self.may_speak()),
            counted: std::mem::take(&mut self.counting.is_done),
            turned: self.history.last_epoch() != self.seen.epoch
                || self.leads() != self.seen.leads
                || std::mem::take(&mut self.rolled_back),
        };
        self.seen.epoch = self.history.last_epoch();
        self.seen.leads = self.leads();
        self.seen.fresh = self.heard.fresh;
        self.seen.applied = applied;
        self.seen.acknowledged = acknowledgements;
        self.parking.wake(news, ready);
    }

    /// Wakes who waits for entries of streams that were added since the last turn.
    pub(crate) fn wake_readers(&mut self, ready: &mut Vec<SessionId>) {
        if !self.parking.has_readers() {
            return self.store.ignore_streams();
        }
        match self.store.take_added() {
            Some(added) => added.into_iter().for_each(|(hash, newest)| self.parking.wake_readers(hash, newest, ready)),
            // The store is another one, or too many streams changed to be named.
            None => {
                self.store.watch_streams();
                self.parking.wake_all_readers(ready);
            }
        }
    }

    /// Commits up to the LSN that this gives hold `level`. `Local` follows the store: what is answered can be read.
    pub(crate) fn released_at(&self, level: CommitLevel) -> Lsn {
        let applied = self.store.applied();
        if !self.may_speak() {
            return Lsn::ZERO;
        }
        match (&self.role, level) {
            (_, CommitLevel::Off) => Lsn::MAX,
            (_, CommitLevel::Local) if mutants::is_on("answer-before-the-flush") => self.log.end(),
            (_, CommitLevel::Local) => applied,
            (Role::Leader(shipper), level) => {
                let degraded = self.leadership.sync_loss.as_ref().and_then(|loss| loss.degraded);
                match degraded.map_or(level, |degraded| degraded.min(level)) {
                    CommitLevel::Off => Lsn::MAX,
                    CommitLevel::Local => applied,
                    remote => shipper.released(remote, self.log.flushed()).min(applied),
                }
            }
            // Nobody confirms commits here any more.
            (Role::Replica(_) | Role::Leaderless(_) | Role::SteppedDown(_), _) => Lsn::ZERO,
        }
    }

    /// What `level` promises holds for commits up to the LSN that this gives, whatever is released.
    pub(super) fn met_at(&self, level: CommitLevel) -> Lsn {
        match (level, &self.role) {
            (CommitLevel::Off, _) => Lsn::MAX,
            (CommitLevel::Local, _) => self.store.applied(),
            (remote, Role::Leader(shipper)) => shipper.confirmed(remote, self.log.flushed()).min(self.store.applied()),
            (_, Role::Replica(_) | Role::Leaderless(_) | Role::SteppedDown(_)) => Lsn::ZERO,
        }
    }

    /// Why commits at `level` are refused for want of replicas.
    pub(super) fn refuses(&self, shipper: &Shipper, level: CommitLevel) -> Option<String> {
        if level <= CommitLevel::Local || self.leadership.sync_loss.as_ref().is_some_and(|loss| loss.degraded.is_some())
        {
            return None;
        }
        let lost = self.leadership.sync_loss.as_ref().filter(|_| self.config.on_sync_loss == OnSyncLoss::Refuse);
        let short = || shipper.refuses(level).or_else(|| lost.map(|loss| loss.text.clone()));
        self.nobody_confirms(shipper, level).or_else(short)
    }

    /// Why no replica has to confirm a commit at `level`, which must not look as if one had; `None` where replicas have to, and where
    /// the operator chose to degrade.
    pub(super) fn nobody_confirms(&self, shipper: &Shipper, level: CommitLevel) -> Option<String> {
        let degrades = matches!(self.config.on_sync_loss, OnSyncLoss::Degrade(_));
        if !level.is_remote() || shipper.waits() || degrades {
            return None;
        }
        Some(match &self.membership {
            None => format!("{} to have commits confirmed, or choose COMMITLEVEL local", no_policy(level)),
            Some(_) => format!(
                "no replica confirms commits at {level}: this cluster has no other data member that holds the log. `walferry join` \
                 one, or choose COMMITLEVEL local"
            ),
        })
    }

    /// True when commands can be executed and their records appended.
    pub(super) fn has_capacity(&self) -> bool {
        // Without a lease nothing may be acknowledged, at `off` neither: what cannot be answered is not executed.
        let draining = self.membership.as_ref().is_some_and(Membership::is_draining);
        // Who waits is refused when it comes again.
        let has_memory =
            self.store.lacks_space().is_some() || !self.store.overloaded() && self.pending.bytes() < PENDING_BYTES_MAX;
        !draining && self.may_speak() && has_memory && self.log.has_capacity() && self.has_replayed()
    }

    /// What readers of committed state may be told.
    pub(super) fn committed_and_applied(&self) -> Lsn {
        if self.may_speak() { self.committed().min(self.store.applied()) } else { Lsn::ZERO }
    }

    /// True when a leader has applied all that was in its log when it began to lead.
    pub(super) fn has_replayed(&self) -> bool {
        self.store.applied() >= self.leadership.from
    }

    /// What was durable on the leader so long before `now` is applied here. A leader is its own measure while it may speak.
    pub(super) fn staleness_at(&self, now: Instant) -> Option<Duration> {
        match &self.role {
            Role::Leader(_) => (self.may_speak_at(now) && self.has_replayed()).then_some(Duration::ZERO),
            Role::Replica(_) | Role::Leaderless(_) => Some(now.saturating_duration_since(self.heard.fresh?)),
            Role::SteppedDown(_) => None,
        }
    }

    pub(crate) fn committed(&self) -> Lsn {
        match &self.role {
            Role::Leader(shipper) => shipper.committed(self.log.flushed()),
            Role::Replica(replica) => replica.committed(),
            Role::Leaderless(_) => self.heard.committed,
            Role::SteppedDown(_) => Lsn::ZERO,
        }
    }
}
