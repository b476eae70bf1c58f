//! What a replica makes of its leader's messages: the comparison of logs, frames, heartbeats, and the end of a link. Called by the
//! link for each message that is complete; persists a promise before it is sent.

use std::time::Instant;

use walferry_cluster::handover::Handover;
use walferry_cluster::member::{ClusterId, reachable};
use walferry_cluster::message::{EPOCHS_PER_MESSAGE_MAX, LinkHeartbeat, RefuseCode, Welcome};
use walferry_cluster::register::MemberId;
use walferry_engine::epoch::EpochHistory;
use walferry_engine::frame::UnverifiedFrame;
use walferry_engine::log::Log;
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_engine::mutants;
use walferry_engine::ring::Ring;
use walferry_engine::world::{self};

use super::{BACKOFF_MAX, BACKOFF_MIN, BACKOFF_PASSING_MAX, JITTER_SHARE, LinkError, Phase, Replica};
use crate::error::ReplicaError;
use crate::receiver::Step;
use crate::rewind::{Outcome, Rewind};
use crate::snapshot::fetch::FetchError;
use crate::store::Store;

pub(super) enum Progress {
    /// There may be more to do.
    Again,
    /// Bytes are needed.
    Receive {
        /// Straight into the log buffer.
        into_log: bool,
    },
    /// The log has no space: its disk is behind.
    Wait,
}

pub(super) enum StepError {
    Link(LinkError),
    Follow(ReplicaError),
}

impl From<LinkError> for StepError {
    fn from(error: LinkError) -> StepError {
        StepError::Link(error)
    }
}

impl From<ReplicaError> for StepError {
    fn from(error: ReplicaError) -> StepError {
        StepError::Follow(error)
    }
}

impl Replica {
    /// Up to where nothing of the log may be cut without a word of the operator's: what an earlier leader told to be committed.
    /// Zero for a member and for a leader that follows another.
    pub(super) fn keeps(&self, log: &Log, history: &EpochHistory) -> Lsn {
        let asked = self.config.may_cut_commits || self.config.member != MemberId(0);
        if asked || self.gives_up(log, history) { Lsn::ZERO } else { self.committed.min(log.sealed()) }
    }

    /// True where this node itself led its newest epoch, without a register: by following another it gives that up.
    pub(super) fn gives_up(&self, log: &Log, history: &EpochHistory) -> bool {
        self.config.member == MemberId(0) && log.led() == history.last_epoch()
    }

    /// Does everything that can be done now: steps through what was received, receives more, sends.
    pub(super) fn advance(
        &mut self,
        ring: &mut Ring,
        log: &mut Log,
        store: &mut Store,
        history: &mut EpochHistory,
        now: Instant,
    ) -> Result<(), ReplicaError> {
        while matches!(self.phase, Phase::Greeting | Phase::Streaming) && self.receiving.is_none() {
            match self.one_step(log, store, history, now) {
                Ok(Progress::Again) => {}
                Ok(Progress::Receive { into_log: false }) => {
                    self.receive_staging(ring);
                    break;
                }
                Ok(Progress::Receive { into_log: true }) => {
                    self.receive_raw(ring, log);
                    break;
                }
                Ok(Progress::Wait) => {
                    // It is this node that does not listen: that says nothing of the leader.
                    self.heard_at = now;
                    break;
                }
                Err(StepError::Link(error)) => self.fail(error, now),
                Err(StepError::Follow(error)) => return Err(error),
            }
        }
        self.send(ring, log, store, now);
        Ok(())
    }

    pub(super) fn one_step(
        &mut self,
        log: &mut Log,
        store: &mut Store,
        history: &mut EpochHistory,
        now: Instant,
    ) -> Result<Progress, StepError> {
        if let Some((wire_bytes, traced)) = self.waiting_frame.take() {
            return self.take_frame(wire_bytes, traced, log, now);
        }
        match self.receiver.step(log.received()).map_err(LinkError::from)? {
            Step::More => Ok(Progress::Receive { into_log: false }),
            Step::Welcome(welcome) => {
                self.welcomed(&welcome, log, store, history)?;
                self.receiver.accept();
                self.phase = Phase::Streaming;
                Ok(Progress::Again)
            }
            Step::Refuse(refuse) => Err(LinkError::Refused { code: refuse.code, text: refuse.text }.into()),
            Step::Frame { wire_bytes, traced } => self.take_frame(wire_bytes, traced, log, now),
            Step::Heartbeat(heartbeat) => {
                let has_all = log.sealed() >= heartbeat.end;
                self.heard(heartbeat, has_all, now);
                Ok(Progress::Again)
            }
            Step::Raw => self.take_raw(log, now),
        }
    }

    /// The link has brought something, or there is nothing to bring: one that is welcomed and fails before that, as when the leader
    /// cannot read its own log, is not tried again at once.
    pub(super) fn works(&mut self) {
        if self.backoff != BACKOFF_MIN || !self.last_error.is_empty() {
            self.backoff = BACKOFF_MIN;
            self.last_error.clear();
        }
    }

    pub(super) fn heard(&mut self, heartbeat: LinkHeartbeat, has_all: bool, now: Instant) {
        if has_all {
            self.works();
        }
        self.leader_end = heartbeat.end;
        self.leader_flushed = self.leader_flushed.max(heartbeat.flushed);
        self.committed = self.committed.max(heartbeat.committed);
        self.acks.handle_heartbeat(heartbeat.sent_at_us, now);
        if heartbeat.stamp_us != 0 {
            // A leader that returns what it never got must not make the state look fresher than now.
            self.freshness.handle_echo(heartbeat.end, self.acks.stamped_at(heartbeat.stamp_us).min(now));
        }
    }

    pub(super) fn take_frame(
        &mut self,
        wire_bytes: usize,
        traced: bool,
        log: &mut Log,
        now: Instant,
    ) -> Result<Progress, StepError> {
        let wire = &self.receiver.front()[..wire_bytes];
        let at = log.sealed();
        if !log.receive_frame(wire, now).map_err(LinkError::from)? {
            self.waiting_frame = Some((wire_bytes, traced));
            return Ok(Progress::Wait);
        }
        // The log verified it; only the numbers are read again.
        if let Ok(frame) = UnverifiedFrame::parse(wire, at) {
            self.leader_flushed = self.leader_flushed.max(frame.claimed().flushed);
            self.committed = self.committed.max(frame.claimed().committed);
        }
        self.works();
        self.leader_end = self.leader_end.max(log.sealed());
        self.acks.handle_received(log.sealed(), now);
        if traced {
            self.acks.trace(log.sealed(), now);
        }
        self.receiver.consume(wire_bytes);
        Ok(Progress::Again)
    }

    /// Raw log bytes: first those that came with the message, then straight from the socket.
    pub(super) fn take_raw(&mut self, log: &mut Log, now: Instant) -> Result<Progress, StepError> {
        let here = self.receiver.front().len().min(self.receiver.raw() as usize);
        if here == 0 {
            return Ok(Progress::Receive { into_log: true });
        }
        let Some(space) = log.receive_space(here) else { return Ok(Progress::Wait) };
        let bytes = space.len().min(here);
        space[..bytes].copy_from_slice(&self.receiver.front()[..bytes]);
        self.receiver.consume(bytes);
        self.received_raw(bytes, log, now)?;
        Ok(Progress::Again)
    }

    pub(super) fn received_raw(&mut self, bytes: usize, log: &mut Log, now: Instant) -> Result<(), LinkError> {
        self.receiver.raw_done(bytes as u64);
        let before = log.sealed();
        log.receive_advance(bytes, now)?;
        if log.sealed() > before {
            self.works();
        }
        // A leader sends from its files only what it has made durable.
        self.leader_flushed = self.leader_flushed.max(log.sealed());
        self.leader_end = self.leader_end.max(log.sealed());
        self.acks.handle_received(log.sealed(), now);
        Ok(())
    }

    /// Follows a welcome. What is promised by it is durable before anything of the new stream is taken.
    pub(super) fn welcomed(
        &mut self,
        welcome: &Welcome,
        log: &mut Log,
        store: &mut Store,
        history: &mut EpochHistory,
    ) -> Result<(), StepError> {
        if let Some(Err(error)) = self.leader_proved.as_ref().map(|proved| proved.check(&welcome.name)) {
            return Err(LinkError::Misfit(error.to_string()).into());
        }
        self.adopt(welcome)?;
        let epoch = welcome.history.last().map_or(Epoch(0), |(epoch, _)| *epoch);
        if epoch < self.config.promised {
            let text = format!("the leader is of epoch {epoch}, this node has promised {}", self.config.promised);
            return Err(LinkError::Superseded(text).into());
        }
        let merged = merge(history, &welcome.history).ok_or_else(|| {
            LinkError::Misfit("the leader's epoch history does not ascend: its data directory is damaged".to_owned())
        })?;
        let start = welcome.start;
        let ended = log.sealed();
        let committed = self.keeps(log, history);
        if start < committed {
            return Err(LinkError::Committed { fork: start, committed }.into());
        }
        let rewind = Rewind {
            leader: welcome.name.as_str(),
            dir: &self.config.dir,
            start,
            leads: &merged,
            log,
            store,
            history,
            lost_commits: &mut self.lost_commits,
        };
        match rewind.run()? {
            Outcome::Done => {}
            Outcome::Beyond(stored) => return Err(LinkError::Beyond { fork: start, stored }.into()),
            Outcome::Writing => return Err(LinkError::Checkpoint { fork: start }.into()),
        }
        if start < ended {
            self.freshness.handle_rollback();
        }
        if !mutants::is_on("no-apply-limit") {
            // What an earlier leader had made durable beyond here says nothing of this one's log.
            self.leader_flushed = self.leader_flushed.min(start);
            self.committed = self.committed.min(start);
            self.leader_end = start;
        }
        if let Some(link) = self.leader_at {
            self.client_address = reachable(&welcome.client_address, link).unwrap_or_default();
        }
        tracing::info!(leader = %welcome.name, address = %self.config.leader, %start, "following");
        Ok(())
    }

    pub(super) fn adopt(&mut self, welcome: &Welcome) -> Result<(), StepError> {
        if self.config.meta.cluster_id == 0 {
            self.config.meta.cluster_id = welcome.cluster_id.0;
            self.config.meta.save(&self.config.dir).map_err(|error| ReplicaError::Persist(error.to_string()))?;
            tracing::info!(cluster = %welcome.cluster_id, "joined the leader's cluster");
        }
        if self.config.meta.cluster_id != welcome.cluster_id.0 {
            let ours = ClusterId(self.config.meta.cluster_id);
            let text = format!("the leader belongs to cluster {}, this node to {ours}", welcome.cluster_id);
            return Err(LinkError::Misfit(text).into());
        }
        if self.config.member == MemberId(0) {
            // For its promotion. The members of a cluster have it in their register.
            let told = Handover { leader: welcome.name.clone(), policy: welcome.policy.clone() };
            told.save(&self.config.dir).map_err(|error| ReplicaError::Persist(error.to_string()))?;
        }
        Ok(())
    }

    pub(super) fn fail(&mut self, error: LinkError, now: Instant) {
        let text = error.to_string();
        if text != self.last_error {
            tracing::warn!(leader = %self.config.leader, "{text}");
            self.last_error = text;
        }
        match &error {
            LinkError::Refused { code: RefuseCode::LogGone, .. } => self.needs_snapshot = Some(Lsn::ZERO),
            LinkError::Beyond { fork, .. } => self.needs_snapshot = Some(*fork),
            // A fetch goes on where it was; a leader that was restarted is back soon.
            LinkError::Fetch(FetchError::Refused { code: RefuseCode::NotLeader | RefuseCode::Stopping, .. })
            | LinkError::Fetch(FetchError::Busy) => self.backoff = self.backoff.min(BACKOFF_PASSING_MAX),
            LinkError::Fetch(
                FetchError::Refused { .. } | FetchError::Misfit(_) | FetchError::Committed { .. } | FetchError::Keep(_),
            ) => {
                self.backoff = BACKOFF_MAX;
            }
            // The leader is about to be one, or there is another in a moment; a checkpoint ends soon.
            LinkError::Superseded(_) | LinkError::Checkpoint { .. } => {
                self.backoff = self.backoff.min(BACKOFF_PASSING_MAX)
            }
            LinkError::Refused {
                code: RefuseCode::NotLeader | RefuseCode::NotMember | RefuseCode::Stopping, ..
            } => {
                self.backoff = self.backoff.min(BACKOFF_PASSING_MAX);
            }
            // Trying again at once would get the same answer.
            LinkError::Refused { .. } | LinkError::Misfit(_) | LinkError::Committed { .. } => {
                self.backoff = BACKOFF_MAX
            }
            _ => {}
        }
        self.waiting_frame = None;
        if self.socket.is_some() {
            self.close();
        } else {
            self.rest(now);
        }
    }

    pub(super) fn rest(&mut self, now: Instant) {
        self.socket = None;
        let random = world::random() as u32 % 1000;
        let pause = self.backoff - self.backoff / JITTER_SHARE * random / 1000;
        self.phase = Phase::Resting(now + pause);
        self.backoff = (self.backoff * 2).min(BACKOFF_MAX);
    }
}

/// The leader's history with our older epochs in front, where it was told the newest only.
pub(super) fn merge(ours: &EpochHistory, theirs: &[(Epoch, Lsn)]) -> Option<EpochHistory> {
    let older = ours.entries().iter().filter(|entry| theirs.first().is_some_and(|first| entry.0 < first.0));
    let older = older.filter(|_| theirs.len() == EPOCHS_PER_MESSAGE_MAX);
    EpochHistory::from_entries(&older.chain(theirs).copied().collect::<Vec<_>>())
}
