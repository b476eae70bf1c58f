//! How a replica's log, store and epoch history come to be a beginning of its new leader's: what the leader's log does not hold
//! is cut off. Called by `replica` with a welcome; knows nothing of links. No step destroys what an earlier one has not kept.
//!
//! | step | what | a crash after it |
//! |---|---|---|
//! | Checkpoint | looks whether the store's file holds what is to be cut; not before a checkpoint that is being written has ended | nothing was changed |
//! | Keep | copies the frames that are to be cut into `lost/`, durably, and counts them | the next welcome keeps them again, under the same name |
//! | History | makes the leader's epoch history durable: the frames are of no epoch of this log any more | recovery ends the log at the cut |
//! | Log | lowers the durable watermark and forgets the frames | the same |
//! | Store | goes back to the last checkpoint; the log is replayed from there | the next start begins with the checkpoint |

use std::path::Path;

use walferry_engine::epoch::EpochHistory;
use walferry_engine::log::Log;
use walferry_engine::lsn::Lsn;
use walferry_engine::mutants;

use crate::error::ReplicaError;
use crate::store::Store;

/// One step; see the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Checkpoint,
    Keep,
    History,
    Log,
    Store,
}

const STEPS: [Step; 5] = [Step::Checkpoint, Step::Keep, Step::History, Step::Log, Step::Store];
/// The deliberate bug: a crash after the history leaves frames that nobody keeps.
const FORGETFUL_STEPS: [Step; 5] = [Step::Checkpoint, Step::History, Step::Keep, Step::Log, Step::Store];

/// What is rewound, and to where.
pub(crate) struct Rewind<'a> {
    /// The leader's name, for what is logged.
    pub(crate) leader: &'a str,
    /// The data directory.
    pub(crate) dir: &'a Path,
    /// The leader's log is followed from here on; what this log has beyond is cut.
    pub(crate) start: Lsn,
    /// The leader's epoch history.
    pub(crate) leads: &'a EpochHistory,
    pub(crate) log: &'a mut Log,
    pub(crate) store: &'a mut Store,
    pub(crate) history: &'a mut EpochHistory,
    /// Commits that were cut off are added.
    pub(crate) lost_commits: &'a mut u64,
}

/// What came of it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The log ends at `start`, or before.
    Done,
    /// Nothing was changed: the store's file holds everything up to here, which the leader's log does not.
    Beyond(Lsn),
    /// Nothing was changed: a checkpoint is being written that may hold what is to be cut. The ring thread does not wait for it.
    Writing,
}

impl Rewind<'_> {
    /// All steps.
    pub(crate) fn run(mut self) -> Result<Outcome, ReplicaError> {
        let forgetful = mutants::is_on("forget-before-keeping");
        self.steps(if forgetful { &FORGETFUL_STEPS } else { &STEPS })
    }

    fn steps(&mut self, steps: &[Step]) -> Result<Outcome, ReplicaError> {
        for step in steps {
            match step {
                Step::Checkpoint => {
                    if let Some(obstacle) = self.wait_for_checkpoint()? {
                        return Ok(obstacle);
                    }
                }
                Step::Keep => self.keep()?,
                Step::History => self.take_history()?,
                Step::Log if self.cuts() => self.log.truncate(self.start, self.history)?,
                Step::Log => self.log.follow(self.history),
                Step::Store if self.store.applied() > self.start => self.store.rollback()?,
                Step::Store => {}
            }
        }
        Ok(Outcome::Done)
    }

    /// True when the log has frames that the leader's has not.
    fn cuts(&self) -> bool {
        self.start < self.log.sealed()
    }

    /// What keeps the log from being cut: the store's file holds what the leader's log does not, which is more, or the same LSN
    /// of another epoch; or it may in a moment.
    fn wait_for_checkpoint(&mut self) -> Result<Option<Outcome>, ReplicaError> {
        let cuts_applied = self.start < self.store.applied();
        if cuts_applied && self.store.is_writing()? && !mutants::is_on("check-before-the-checkpoint") {
            return Ok(Some(Outcome::Writing));
        }
        let stored = self.store.durable_position();
        let fits = self.leads.epoch_of_end(stored.applied) == stored.epoch;
        Ok((self.start < stored.applied || !fits).then_some(Outcome::Beyond(stored.applied)))
    }

    fn keep(&mut self) -> Result<(), ReplicaError> {
        if self.cuts() {
            let epoch = self.history.epoch_of_end(self.log.sealed());
            let lost = self.log.put_aside(self.start, epoch)?;
            tracing::warn!(leader = %self.leader, file = %lost.path.display(), "{lost}");
            *self.lost_commits += if mutants::is_on("keep-without-counting") { 0 } else { lost.records };
        }
        Ok(())
    }

    fn take_history(&mut self) -> Result<(), ReplicaError> {
        if self.leads != self.history {
            self.leads.save(self.dir).map_err(|error| ReplicaError::Persist(error.to_string()))?;
            self.history.clone_from(self.leads);
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "rewind_tests.rs"]
mod tests;
