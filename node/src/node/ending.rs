//! How a node ends: because its log or its files failed, or because it was asked to. A leader that fails asks to be replaced first.

use std::time::Duration;

use walferry_engine::ring::Ring;

use crate::error::DaemonError;
use crate::node::state::Ending;
use crate::node::{Node, Role};

/// A leader that has to end waits so many election timeouts for the next one: it may be the member that controls the register.
const REPLACED_TIMEOUTS_MAX: u32 = 4;

impl Node {
    /// Looked at each turn, whatever stopped the log: what its disk has is found out by the next start only. A leader first asks the
    /// others to replace it, which is faster than being missed.
    pub(super) fn notice_failure(&mut self, ring: &mut Ring) {
        let gone = self.held.gone().map(str::to_owned);
        if gone.is_some()
            && let Role::Leader(shipper) = &mut self.role
        {
            shipper.forget_slots();
        }
        let reason = gone.or_else(|| self.failure.take()).or_else(|| self.log.stopped().map(str::to_owned));
        let Some(reason) = reason.filter(|_| self.ending.is_none()) else { return };
        let replaced_time_max = match &self.membership {
            Some(membership) if self.leads() => {
                membership.state.election_timeout().unwrap_or(self.config.election_timeout) * REPLACED_TIMEOUTS_MAX
            }
            _ => Duration::ZERO,
        };
        let (epoch, until) = (self.history.last_epoch(), self.clock.now + replaced_time_max);
        self.ending = Some(Ending { reason: reason.clone(), epoch, until });
        self.step_down(reason, ring);
    }

    /// Why the process ends now, if it does.
    pub fn ended(&self) -> Option<DaemonError> {
        let Ending { reason, epoch, until } = self.ending.as_ref()?;
        let replaced = self.membership.as_ref().is_some_and(|membership| membership.state.epoch > *epoch);
        let failed = || DaemonError::Failed(reason.clone());
        (replaced || self.clock.now >= *until).then(failed)
    }

    /// The replica's or leader's connections end; every record that was answered is on disk already.
    pub fn close(mut self, ring: &mut Ring) -> Result<(), DaemonError> {
        let committed = self.committed();
        if let Role::Leader(shipper) = &mut self.role {
            shipper.close_all(ring, &mut self.log, self.clock.now);
        }
        if let Role::Replica(replica) = &mut self.role {
            replica.close();
        }
        if let Some(membership) = self.membership.take() {
            membership.close();
        }
        let end = self.log.flushed();
        self.look_at_space();
        self.store.close(committed)?;
        self.log.shutdown(ring)?;
        tracing::info!(%end, "closed");
        Ok(())
    }
}
