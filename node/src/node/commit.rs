//! The way of a commit through the node: whether it takes one, its record in the log, and who waits for what. `release` confirms it.

use walferry_cluster::level::CommitLevel;
use walferry_engine::log::AppendError;
use walferry_engine::lsn::Lsn;
use walferry_engine::mutants;
use walferry_engine::world;

use crate::config::Redirect;
use crate::node::{Node, Role};
use crate::session::host::{CommitPath, Evidence, Refusal, ReplicaEvidence, Stage, Wait};
use crate::session::id::SessionId;

impl CommitPath for Node {
    fn writable(&self, level: CommitLevel) -> Result<(), Refusal> {
        let shipper = match &self.role {
            Role::Leader(_) if self.refuses_for_silence() => return Err(Refusal::NoLeader(self.why_silent())),
            Role::Leader(shipper) => shipper,
            Role::Replica(_) => return Err(self.not_here()),
            Role::Leaderless(reason) => return Err(Refusal::NoLeader(self.why_leaderless(reason))),
            Role::SteppedDown(reason) => return Err(Refusal::Stopped(reason.clone())),
        };
        if let Some(reason) = self.log.stopped() {
            return Err(Refusal::Stopped(reason.to_owned()));
        }
        match self.refuses(shipper, level) {
            Some(reason) => Err(Refusal::NoReplicas(reason)),
            None => Ok(()),
        }
    }

    fn commit(&mut self, record: &[u8], level: CommitLevel) -> Result<Lsn, Refusal> {
        self.writable(level)?;
        if !self.has_capacity() {
            return Err(Refusal::Busy);
        }
        if let Some(text) = self.store.lacks_space() {
            return Err(Refusal::NoSpace(text));
        }
        let lsn = self.log.append(record).map_err(|error| match error {
            AppendError::Busy => Refusal::Busy,
            AppendError::NoSpace(text) => Refusal::NoSpace(text),
            AppendError::TooLarge { .. } => Refusal::TooLarge(error.to_string()),
            AppendError::Stopped(text) => Refusal::Stopped(text),
        })?;
        // It decodes what was encoded a moment ago; only the store's file can fail here, and then the next turn ends the node.
        if let Err(error) = self.pending.record(lsn, record, &self.store) {
            return Err(Refusal::Stopped(error.to_string()));
        }
        if self.waterfall.begin(lsn, level, world::now)
            && level > CommitLevel::Local
            && let Role::Leader(shipper) = &mut self.role
        {
            shipper.trace(lsn);
        }
        Ok(lsn)
    }

    fn log_end(&self) -> Lsn {
        self.log.end()
    }

    fn released(&self, level: CommitLevel) -> Lsn {
        self.released_at(level)
    }

    fn met(&self, level: CommitLevel, lsn: Lsn) -> CommitLevel {
        if !level.is_remote() || mutants::is_on("claim-what-was-asked") {
            return level;
        }
        level.met(lsn, |lower| self.met_at(lower))
    }

    fn silent(&self) -> Option<String> {
        (matches!(self.role, Role::Leader(_)) && !self.may_speak()).then(|| self.why_silent())
    }

    fn unconfirmable(&self, level: CommitLevel) -> Option<String> {
        let Role::Leader(shipper) = &self.role else { return None };
        self.nobody_confirms(shipper, level)
    }

    fn replicas_at(&self, stage: Stage, lsn: Lsn) -> usize {
        let Role::Leader(shipper) = &self.role else { return 0 };
        let level = match stage {
            Stage::Flushed => CommitLevel::RemoteFlush,
            Stage::Applied => CommitLevel::RemoteApply,
        };
        // As redis-server: a replica that is not connected does not count, whatever it confirmed once.
        shipper.count_at(level, lsn)
    }

    fn evidence(&self, lsn: Lsn) -> Evidence {
        let replicas = match &self.role {
            Role::Leader(shipper) => shipper.evidence(lsn),
            Role::Replica(_) | Role::Leaderless(_) | Role::SteppedDown(_) => Vec::new(),
        };
        let write = self.log.last_write();
        let micros = |duration: std::time::Duration| duration.as_micros() as u64;
        Evidence {
            replicas: replicas
                .into_iter()
                .map(|(name, level)| ReplicaEvidence { name: name.to_string(), level })
                .collect(),
            stages_us: vec![("queue", micros(write.queue)), ("device", micros(write.device))],
        }
    }

    fn unconfirmed_by(&self, _: Lsn, _: CommitLevel) -> String {
        self.policy_text()
    }

    fn hold(&mut self, session: SessionId, level: CommitLevel, lsn: Lsn) {
        self.queue.hold(session, level, lsn);
    }

    fn hold_committed(&mut self, session: SessionId, lsn: Lsn) {
        self.queue.hold_committed(session, lsn);
    }

    fn park(&mut self, session: SessionId, wait: Wait) {
        if let Wait::Streams(_) = wait {
            self.store.watch_streams();
        }
        self.parking.park(session, wait);
    }

    fn unpark(&mut self, session: SessionId) {
        self.parking.unpark(session);
    }
}

impl Node {
    /// A write came to a replica.
    fn not_here(&self) -> Refusal {
        let awaited = self.membership.as_ref().map(|membership| membership.blocked_reason()).unwrap_or_default();
        if !awaited.is_empty() {
            return Refusal::NoLeader(awaited);
        }
        match (&self.membership, self.leader_address()) {
            (Some(_), Some(leader)) if self.config.redirect == Redirect::Moved => Refusal::Moved { leader },
            (_, leader) => Refusal::ReadOnly { leader },
        }
    }
}
