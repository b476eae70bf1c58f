//! From the log into the store: the replay of a start, what became durable in a turn, and the counting of the store's keys.

use std::time::Duration;

use walferry_applier::replay::{self, Applied};
use walferry_applier::store::{KeyCount, StoreError};
use walferry_engine::lsn::Lsn;
use walferry_engine::mutants;
use walferry_engine::world;

use crate::error::DaemonError;
use crate::node::{Node, Role};
use crate::session::commit_queue::CommitQueue;
use crate::session::host::COUNT_TIME_MAX;

/// Changed keys that are looked up in one turn at most, to count the store's keys.
pub(crate) const COUNT_LOOKUPS_PER_TURN_MAX: usize = 512;
/// So many at once; then the time is looked at. Where the store's file is not in memory each of them reads from the disk.
const COUNT_LOOKUPS_AT_ONCE: usize = 32;
/// After so long the next turn goes on.
const COUNT_TURN_TIME_MAX: Duration = Duration::from_millis(2);

impl Node {
    /// Applies everything that is certain, with checkpoints in between: memory does not depend on the length of the log, and a
    /// start that is cut off goes on from the newest checkpoint.
    pub(super) fn replay(&mut self) -> Result<(), DaemonError> {
        // A leader has heard no confirmation yet; what its log says to be committed is.
        let committed = self.committed().max(self.heard.committed);
        loop {
            self.look_at_space();
            let applied = self.apply()?;
            self.store.poll_checkpoint(committed, world::now())?;
            match (applied, self.store.lacks_space()) {
                (Applied::More, _) => {}
                (Applied::All, _) => return Ok(()),
                (Applied::Waits, Some(text)) => {
                    return Err(DaemonError::ReplayLacksSpace(text));
                }
                (Applied::Waits, None) => self.store.finish_checkpoint()?,
            }
        }
    }

    /// Applies what became durable here; on a replica no further than what its leader calls durable.
    pub(crate) fn apply(&mut self) -> Result<Applied, DaemonError> {
        let limit = match &self.role {
            Role::Leader(_) => Lsn::MAX,
            Role::Replica(replica) => replica.apply_limit(),
            Role::SteppedDown(_) if mutants::is_on("no-apply-limit") => Lsn::MAX,
            Role::Leaderless(_) | Role::SteppedDown(_) => self.heard.flushed,
        };
        let applied = replay::apply_flushed(&mut self.log, &mut self.store, limit)?;
        self.pending.forget(self.store.applied());
        Ok(applied)
    }

    /// How many keys the store has; goes on counting with the next turns when that is not known exactly.
    pub(super) fn count_some_keys(&mut self) -> Result<KeyCount, StoreError> {
        let (began, mut lookups) = (world::now(), 0);
        let count = loop {
            let count = self.store.count_keys(COUNT_LOOKUPS_AT_ONCE)?;
            lookups += COUNT_LOOKUPS_AT_ONCE;
            let over = lookups >= COUNT_LOOKUPS_PER_TURN_MAX || world::now() - began >= COUNT_TURN_TIME_MAX;
            if count.is_exact || over {
                break count;
            }
        };
        if count.is_exact {
            self.counting.is_done |= self.counting.until.take().is_some();
        } else if self.counting.until.is_none() {
            self.counting.until = Some(self.clock.now + COUNT_TIME_MAX);
        }
        Ok(count)
    }

    pub(super) fn go_on_counting(&mut self) -> Result<(), DaemonError> {
        let Some(until) = self.counting.until else { return Ok(()) };
        self.count_some_keys()?;
        if self.clock.now >= until {
            self.counting.until = None;
        }
        Ok(())
    }

    /// The store went back to what a new leader has: replies that tell of the cut part are not sent.
    pub(super) fn notice_rollback(&mut self) {
        let applied = self.store.applied();
        self.rolled_back |= applied < self.applied_before;
        if applied < self.applied_before && self.abandoned.is_none() {
            self.abandoned = Some(format!("a failover took it back, this node's state ends at {applied} now"));
            self.queue = CommitQueue::default();
        }
        self.applied_before = applied;
    }
}
