//! What the node asks its shipper between turns: what is released, who confirmed what, how far everybody is. Changes
//! nothing but the policy.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use walferry_cluster::level::CommitLevel;
use walferry_cluster::member::MemberName;
use walferry_cluster::message::Traced;
use walferry_cluster::policy::SyncPolicy;
use walferry_cluster::quorum_rule::QuorumRule;
use walferry_cluster::register::MemberId;
use walferry_engine::lsn::{Epoch, Lsn};

use super::Shipper;
use crate::commit_rule::Standing;
use crate::lag::Lag;
use crate::link::Phase;
use crate::progress::{Progress, ReplicaState};
use crate::replica::Replica;
use crate::status::{ReplicaStatus, SlotStatus};

impl Shipper {
    /// When `poll` has something to do although nothing completes; `None`: never.
    pub fn next_timeout(&self, now: Instant) -> Option<Duration> {
        let committed = self.committed(self.view.flushed);
        let links = self.links.values().filter_map(|link| match link.phase {
            Phase::Closing(until) => Some(until),
            Phase::Closed => None,
            Phase::Probe(_) | Phase::Fetch(_) | Phase::FetchFrames(_) | Phase::Streaming(_) => {
                let silent = link.heard + self.config.peer_timeout;
                Some(link.outgoing.due(committed).map_or(silent, |due| due.min(silent)))
            }
        });
        let members = self.replicas.values().filter(|replica| replica.in_sync).filter_map(|replica| {
            let age = self.timeline.age(replica.progress.flushed(), now);
            let lag = age.max(replica.silence(now));
            (lag > Duration::ZERO).then(|| now + self.config.replica_lag_time_max.saturating_sub(lag))
        });
        // A moment later than due, so that one turn is enough.
        let earliest = links.chain(members).min()? + Duration::from_millis(1);
        Some(earliest.saturating_duration_since(now))
    }

    /// Commits up to this LSN hold `level`, when the log is flushed up to `log_flushed`.
    pub fn released(&self, level: CommitLevel, log_flushed: Lsn) -> Lsn {
        self.rule.released(level, log_flushed)
    }

    /// Commits up to this LSN were confirmed at `level` by replicas that the sync policy asks for: unlike `released`, not because it
    /// asked nobody.
    pub fn confirmed(&self, level: CommitLevel, log_flushed: Lsn) -> Lsn {
        self.rule.confirmed(level, log_flushed)
    }

    /// The sync policy of now.
    pub fn policy(&self) -> &SyncPolicy {
        self.rule.policy()
    }

    /// The commit LSN: everything before it is durable here and where the sync policy asks for it, so no failover that
    /// the policy covers takes it back. With an empty policy what is durable here.
    pub fn committed(&self, log_flushed: Lsn) -> Lsn {
        self.rule.released(CommitLevel::RemoteFlush, log_flushed)
    }

    /// Why a commit at `level` is refused: fewer replicas than `min_in_sync` are in sync.
    pub fn refuses(&self, level: CommitLevel) -> Option<String> {
        level.is_remote().then(|| self.in_sync.shortage(self.config.min_in_sync)).flatten()
    }

    /// Why commits at remote levels wait, as of the last turn: the sync policy has too few replicas to ask.
    pub fn sync_shortage(&self) -> Option<String> {
        self.shortage.clone()
    }

    /// True when commits at remote levels wait for replicas, by the rule of now or by the one that is to follow on them.
    pub fn waits(&self) -> bool {
        self.rule.waits()
    }

    /// This rule is to follow on the register's: commits need both from now on.
    pub fn begin_joint(&mut self, quorum_rule: QuorumRule) {
        self.rule.begin_joint(quorum_rule, self.view.sealed);
        self.moved = true;
    }

    /// Commits need the register's rule alone again.
    pub fn end_joint(&mut self) {
        self.rule.end_joint();
        self.moved = true;
    }

    /// True once the rule that is to follow has confirmed all that was in the log when it was set.
    pub fn joint_is_proved(&self) -> bool {
        !self.moved && self.rule.joint_is_proved(self.view.flushed)
    }

    /// The replicas that keep up, as observed here, each with the incarnation that does: what the register is to be told.
    pub fn observed_in_sync(&self) -> BTreeMap<MemberName, MemberId> {
        let id = |name: &MemberName| Some((name.clone(), self.replicas.get(name).filter(|replica| replica.member)?.id));
        self.in_sync.members().filter_map(id).collect()
    }

    /// The register has what was observed, and no proposal can bring back a replica that left meanwhile.
    pub fn record_in_sync(&mut self) {
        self.in_sync.record();
        self.moved = true;
    }

    /// How far a replica's log is durable, as far as known.
    pub fn flushed_at(&self, name: &MemberName) -> Option<Lsn> {
        let replica = self.replicas.get(name).filter(|replica| replica.link.is_some())?;
        Some(replica.progress.flushed())
    }

    /// Grows with every acknowledgement that moved something.
    pub fn acknowledgements(&self) -> u64 {
        self.acknowledgements
    }

    /// Log before this is damaged and cannot be repaired: who needs it gets a snapshot.
    pub fn feed_from(&mut self, lsn: Lsn) {
        self.feeds_from = lsn;
    }

    /// Grows when a replica goes that still needed log from the segment files: these may be damaged.
    pub fn catchups_broken(&self) -> u64 {
        self.catchups_broken
    }

    /// A newer epoch than ours that a replica knows: this node no longer leads.
    pub fn superseded(&self) -> Option<Epoch> {
        self.superseded
    }

    /// No log from here on may be recycled; `Lsn::MAX` when neither slot nor snapshot needs any.
    pub fn slots_hold(&self) -> Lsn {
        self.slots.hold().min(self.snapshots.hold())
    }

    /// Which connected replicas have confirmed the commit that ends at `lsn`, and the highest level each has reached.
    pub fn evidence(&self, lsn: Lsn) -> Vec<(MemberName, CommitLevel)> {
        let connected = self.replicas.values().filter(|replica| replica.link.is_some());
        let reached = connected.filter_map(|replica| {
            let progress = &replica.progress;
            let levels = [
                (CommitLevel::RemoteApply, progress.applied()),
                (CommitLevel::RemoteFlush, progress.flushed()),
                (CommitLevel::RemoteWrite, progress.written()),
            ];
            let level = levels.into_iter().find(|(_, position)| *position >= lsn)?.0;
            Some((replica.name.clone(), level))
        });
        reached.collect()
    }

    /// Every replica's name and positions, as of the last turn.
    pub fn progress(&self) -> impl Iterator<Item = (&MemberName, &Progress)> {
        self.replicas.values().map(|replica| (&replica.name, &replica.progress))
    }

    /// The commit that ends at `lsn` is to be followed through the replicas: see [`Shipper::take_traced`].
    pub fn trace(&mut self, lsn: Lsn) {
        self.traces.want(lsn);
    }

    /// Where replicas' time went for the frames that hold traced commits; told once.
    pub fn take_traced(&mut self) -> Vec<(MemberName, Traced)> {
        self.traces.take()
    }

    /// How many connected replicas have confirmed `lsn` at `level`.
    pub fn count_at(&self, level: CommitLevel, lsn: Lsn) -> usize {
        self.evidence(lsn).iter().filter(|(_, reached)| *reached >= level).count()
    }

    /// Every slot, by name, as of the last turn.
    pub fn slots(&self) -> Vec<SlotStatus> {
        let status = |(name, restart): (&MemberName, Lsn)| {
            let lost = self.slots.is_lost(name);
            let link = self.replicas.get(name).and_then(|replica| self.links.get(&replica.link?));
            SlotStatus {
                name: name.clone(),
                restart,
                lost,
                held_bytes: if lost { 0 } else { self.view.sealed.since(restart) },
                connected: link.is_some() || self.snapshots.progress(name).is_some(),
            }
        };
        self.slots.iter().map(status).collect()
    }

    /// Every replica, by name, as of the last turn.
    pub fn replicas(&self) -> Vec<ReplicaStatus> {
        let now = self.turned;
        let standings: Vec<Standing<'_>> = self.replicas.values().map(Replica::standing).collect();
        let status = |(index, replica): (usize, &Replica)| {
            let link = replica.link.and_then(|number| self.links.get(&number));
            let copy = self.snapshots.progress(&replica.name);
            let state = match link {
                None if copy.is_some() => ReplicaState::SnapshotTransfer(copy.map_or(0, |copy| copy.percent())),
                None if self.slots.is_lost(&replica.name) => ReplicaState::Lost,
                None => ReplicaState::Disconnected,
                Some(link) if link.outgoing.is_catching_up() || !replica.caught_up => ReplicaState::Catchup,
                Some(_) => ReplicaState::Streaming,
            };
            let lag = |position| Lag::new(&self.timeline, position, self.view.sealed, now);
            let progress = &replica.progress;
            let sending = link.map(|link| link.outgoing.bytes()).unwrap_or_default();
            ReplicaStatus {
                name: replica.name.clone(),
                address: link.map_or(String::new(), |_| replica.address.clone()),
                transport: link.map(|link| link.transport).unwrap_or_default(),
                state,
                sent: progress.sent(),
                written: progress.written(),
                flushed: progress.flushed(),
                applied: progress.applied(),
                write_lag: lag(progress.written()),
                flush_lag: lag(progress.flushed()),
                apply_lag: lag(progress.applied()),
                slot_lost: self.slots.is_lost(&replica.name),
                sync_state: self.rule.sync_state(&standings, index),
                in_sync: replica.in_sync,
                round_trip: replica.round_trip,
                durations: replica.durations,
                sent_bytes: replica.sent_bytes.plus(sending),
                silence: replica.silence(now),
                last_error: replica.last_error.clone(),
            }
        };
        self.replicas.values().enumerate().map(status).collect()
    }
}
