//! Whether anybody can confirm this leader's commits: its lease, and the replicas that its sync policy asks. Once nobody could for too
//! long, waiting commits are answered and new ones refused.

use std::time::{Duration, Instant};

use crate::config::OnSyncLoss;
use crate::node::state::{Silence, SyncLoss};
use crate::node::{Node, Role};

/// A new leader's sync set is not called lost before this.
const SYNC_SET_GRACE_TIME: Duration = Duration::from_secs(1);
/// A leader that no majority of the members confirms answers its writes after so long, unless `commit_timeout` says otherwise.
const SILENT_TIME_MAX: Duration = Duration::from_secs(5);

impl Node {
    /// Notices when the sync set is lost or back, and says so loudly.
    pub(super) fn watch_sync_set(&mut self) {
        let Role::Leader(shipper) = &self.role else { return };
        // The replicas of a leader that was just chosen are on their way to it.
        let is_new =
            self.membership.is_some() && self.clock.now.duration_since(self.leadership.since) < SYNC_SET_GRACE_TIME;
        match (shipper.sync_shortage(), &self.leadership.sync_loss) {
            (Some(_), None) if is_new => {}
            (Some(text), None) => {
                let degraded = match self.config.on_sync_loss {
                    OnSyncLoss::Degrade(level) => Some(level),
                    OnSyncLoss::Block | OnSyncLoss::Refuse => None,
                };
                tracing::warn!(on_sync_loss = %self.config.on_sync_loss, "the sync set is lost: {text}");
                self.leadership.sync_loss = Some(SyncLoss { text, degraded });
            }
            (None, Some(_)) => {
                tracing::info!("the sync set is back");
                self.leadership.sync_loss = None;
            }
            _ => {}
        }
    }

    /// Notices when this leader may not speak for too long: then what waits is answered, and what comes is refused.
    pub(super) fn watch_lease(&mut self) {
        if !self.leads() || self.may_speak() {
            self.leadership.silence = None;
            if self.leads() {
                self.heard.at = Some(self.clock.now);
            }
            return;
        }
        let (now, time_max) = (self.clock.now, self.silent_time_max());
        let silence = self.leadership.silence.get_or_insert(Silence { since: now, answered: false });
        if now.saturating_duration_since(silence.since) < time_max {
            return;
        }
        silence.since = now;
        let first = !std::mem::replace(&mut silence.answered, true);
        if first || !self.queue.is_empty() {
            let reason = self.why_silent();
            tracing::warn!("nothing that waits is confirmed, and writes are refused: {reason}");
            self.abandon(reason);
        }
    }

    pub(super) fn silent_time_max(&self) -> Duration {
        self.config.commit_timeout.unwrap_or(SILENT_TIME_MAX)
    }

    /// When a lease that ended, or that is about to, has to be looked at: somebody waits for an answer.
    pub(super) fn silence_timeout(&self, now: Instant) -> Option<Duration> {
        let waits = self.membership.is_some() && self.leads() && !(self.queue.is_empty() && self.parking.is_empty());
        match &self.leadership.silence {
            _ if !waits => None,
            Some(silence) => Some((silence.since + self.silent_time_max()).saturating_duration_since(now)),
            None => Some(self.config.election_timeout),
        }
    }

    /// True once a leader that may not speak refuses writes.
    pub(super) fn refuses_for_silence(&self) -> bool {
        self.leadership.silence.as_ref().is_some_and(|silence| silence.answered)
    }

    /// Why this leader may answer nothing, and what an operator can do about it.
    pub(super) fn why_silent(&self) -> String {
        let awaited = self.membership.as_ref().map(|membership| membership.blocked_reason()).unwrap_or_default();
        let epoch = self.history.last_epoch();
        let led = format!(
            "this node led in epoch {epoch}, and a majority of the members does not confirm that it still does"
        );
        if awaited.is_empty() {
            format!("{led}; `walferry describe` tells what is awaited")
        } else {
            format!("{led}: {awaited}")
        }
    }
}
