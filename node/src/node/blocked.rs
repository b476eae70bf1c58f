//! What keeps the node from its work, in the words that an operator reads in INFO, STATUS and `walferry describe`.

use std::time::Duration;

use crate::node::snapshot::receiving;
use crate::node::{Node, Role};

/// A disk whose flushes take longer is called slow: every commit but those at `off` feels it.
const DISK_SLOW: Duration = Duration::from_millis(50);

impl Node {
    /// What an operator has to know at once; empty when all is well.
    pub(super) fn blocked_reason(&self) -> String {
        let mut reasons = Vec::new();
        match &self.role {
            Role::SteppedDown(reason) => reasons.push(format!("stepped down: {reason}")),
            Role::Replica(replica) => {
                let status = replica.status(&self.log);
                reasons.extend(
                    self.membership
                        .as_ref()
                        .map(|membership| membership.blocked_reason())
                        .filter(|text| !text.is_empty()),
                );
                if let Some(copy) = &status.snapshot {
                    reasons.push(receiving(copy, &status.leader));
                } else if !status.last_error.is_empty() {
                    reasons.push(format!("not following {} (its peer address): {}", status.leader, status.last_error));
                }
            }
            Role::Leaderless(reason) => reasons.push(self.why_leaderless(reason)),
            Role::Leader(_) if !self.may_speak() => {
                reasons.push(format!("no lease: {}", self.why_silent()));
            }
            Role::Leader(_) => {
                reasons.extend(
                    self.membership
                        .as_ref()
                        .map(|membership| membership.blocked_reason())
                        .filter(|text| !text.is_empty()),
                );
            }
        }
        if let Some(loss) = &self.leadership.sync_loss {
            let meanwhile = match loss.degraded {
                Some(level) => format!("DEGRADED to {level}"),
                None => "remote commits wait".to_owned(),
            };
            reasons.push(format!("the sync set is lost ({meanwhile}): {}", loss.text));
        }
        reasons.extend(self.log.space_error().map(str::to_owned));
        reasons.extend(self.store.lacks_space());
        // A node that stepped down says so with the reason.
        if !matches!(self.role, Role::SteppedDown(_)) {
            reasons.extend(self.log.stopped().map(str::to_owned));
        }
        reasons.join("; ")
    }

    /// What there is to say of a disk that holds up commits; empty when it does not. No election comes of it: heartbeats do not
    /// wait for the disk.
    pub(super) fn disk_words(&self) -> String {
        let (writes, p99) = self.log.flush_accounting().recent_p99();
        if p99 < DISK_SLOW {
            return String::new();
        }
        format!(
            "the disk is slow: of its last {writes} flushes 99 of 100 took up to {p99:.0?}, and commits wait for each"
        )
    }

    pub(super) fn why_leaderless(&self, reason: &str) -> String {
        let awaited = self.membership.as_ref().map(|membership| membership.blocked_reason()).unwrap_or_default();
        if awaited.is_empty() { reason.to_owned() } else { awaited }
    }
}
