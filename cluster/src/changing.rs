//! One change of the members on its way into the register, by the steps of [`crate::membership`]: both quorum rules count while the
//! register moves, and the register's alone once it is known which they are. Pure, as [`crate::failover`] is: the leader's cluster
//! thread does what [`Changing::poll`] says and tells what came of it.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use walferry_engine::lsn::Epoch;

use crate::member::MemberName;
use crate::membership::MembershipError;
use crate::quorum_rule::QuorumRule;
use crate::register::{Change, ClusterState, Kind, MemberId};

/// How long a change is proposed. A controller that died is replaced well before that.
const PROPOSE_TIME_MAX: Duration = Duration::from_secs(10);
/// How long the register may take to change on this member too, once a controller has answered.
const ARRIVAL_TIME_MAX: Duration = Duration::from_secs(5);
/// While the outcome of a proposal is unknown, another one that only increments the version is made at this interval.
const END_PAUSE: Duration = Duration::from_millis(500);
/// The pause between a proposal that was not answered and the next one.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// How one member changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemberChange {
    /// Add a node as a member that does not count yet.
    Join {
        /// Its name, which is free.
        name: MemberName,
        /// This incarnation of it.
        id: MemberId,
        /// Where it is.
        peer: String,
        /// With a log or without.
        kind: Kind,
    },
    /// It has joined and caught up: its confirmations count from now on.
    CaughtUp {
        /// Its name.
        name: MemberName,
        /// The incarnation that has caught up.
        id: MemberId,
    },
    /// Its removal begins: it no longer votes on the register.
    Leave {
        /// Its name.
        name: MemberName,
    },
    /// It is removed.
    Remove {
        /// Its name.
        name: MemberName,
        /// Members that answer.
        in_reach: BTreeSet<MemberName>,
    },
}

impl MemberChange {
    fn apply(&self, state: &ClusterState) -> Result<ClusterState, ChangeError> {
        Ok(match self {
            MemberChange::Join { name, id, peer, kind } => state.with_member(name, *id, peer, *kind)?,
            MemberChange::CaughtUp { name, id } => {
                state.with_caught_up(name, *id).ok_or(ChangeError::NotJoining(name.clone()))?
            }
            MemberChange::Leave { name } => state.with_leaving(name)?,
            MemberChange::Remove { name, in_reach } => state.without_member(name, in_reach)?,
        })
    }

    fn is_done(&self, state: &ClusterState) -> bool {
        match self {
            MemberChange::Join { name, id, .. } => state.knows(name, *id),
            MemberChange::CaughtUp { name, id } => state.knows(name, *id) && state.with_caught_up(name, *id).is_none(),
            MemberChange::Leave { name } => state.leaving.contains(name) || !state.members.contains_key(name),
            MemberChange::Remove { name, .. } => !state.members.contains_key(name),
        }
    }
}

/// Why the members did not change, or why it is unknown whether they did.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// The rules of membership do not allow the change.
    #[error(transparent)]
    Membership(#[from] MembershipError),
    /// The member was removed, has another incarnation, or counts already.
    #[error("{0} does not join any more")]
    NotJoining(MemberName),
    /// Commits that were confirmed so far are not confirmed under the new quorum rule.
    #[error("{0}")]
    Unproved(String),
    /// Another member leads, or this one leads in another epoch.
    #[error("the leader changed meanwhile, and nothing else: try again")]
    LeaderChanged,
    /// The quorum rule is no longer the one for which it was proved.
    #[error("another change of the members came first: try again")]
    Overtaken,
    /// No proposal is left open, and none was taken.
    #[error("given up, nothing was changed: {0}")]
    GivenUp(String),
    /// A proposal is still open, so its outcome is unknown.
    #[error(
        "it is not known yet whether the change was taken ({0}); the leader finds out, and `walferry describe` tells it"
    )]
    Unknown(String),
}

/// What the change needs next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChangingOutput {
    /// Nothing until the register moves, what was asked for is answered, or this time has come.
    Wait(Option<Instant>),
    /// Commits need this quorum rule as well from now on. [`Changing::handle_proved`] once they have confirmed all there was.
    Prove(QuorumRule),
    /// This register. [`Changing::handle_answer`] tells what became of it.
    Propose(Change),
    /// The outcome of the change, given once: the version in which it was seen. The change may end later.
    Told(Result<u64, ChangeError>),
    /// The register's quorum rule suffices again from this version on. The change is over.
    End(u64),
    /// The change is over, and the quorum rule stayed the same.
    Over,
}

#[derive(Clone, Debug)]
enum ChangingStep {
    /// The quorum rule changes, and nobody has been asked to prove it.
    Begun,
    Proving,
    Ready,
    Proposed,
    /// A proposal was answered or timed out: the register is read when it has changed, and at this time.
    Looking {
        at: Instant,
    },
    Failed(ChangeError),
    /// The outcome was told; what is left to find out is looked for then.
    Ending {
        at: Instant,
    },
}

/// A change on its way.
#[derive(Clone, Debug)]
pub struct Changing {
    change: MemberChange,
    /// The epoch in which the change began. Another leader has no proof of it.
    epoch: Epoch,
    /// The quorum rules before and after the change.
    rules: (QuorumRule, QuorumRule),
    step: ChangingStep,
    /// A proposal followed on this version, and its fate is not known: it may be taken until the register is past it.
    open: Option<u64>,
    until: Instant,
    /// Why the change has not ended yet.
    reason: String,
}

impl Changing {
    /// A change of this register, if the rules allow it.
    pub fn begin(change: MemberChange, base: &ClusterState, now: Instant) -> Result<Changing, ChangeError> {
        let rules = (base.quorum_rule(), change.apply(base)?.quorum_rule());
        let step = if rules.0 == rules.1 { ChangingStep::Ready } else { ChangingStep::Begun };
        let reason = "other changes kept coming first".to_owned();
        let until = now + PROPOSE_TIME_MAX;
        Ok(Changing { change, epoch: base.epoch, rules, step, open: None, until, reason })
    }

    /// What was released under the old quorum rule is confirmed under the new ones, and both count from now on; or why not.
    pub fn handle_proved(&mut self, outcome: Result<(), String>, now: Instant) {
        self.until = now + PROPOSE_TIME_MAX;
        self.step = match outcome {
            Ok(()) => ChangingStep::Ready,
            Err(text) => ChangingStep::Failed(ChangeError::Unproved(text)),
        };
    }

    /// A controller answered the proposal, whichever way; or why none did.
    pub fn handle_answer(&mut self, outcome: Result<(), String>, now: Instant) {
        if let Err(text) = &outcome {
            self.reason.clone_from(text);
        }
        if !matches!(self.step, ChangingStep::Proposed) {
            return;
        }
        let pause = match outcome {
            Ok(()) => ARRIVAL_TIME_MAX,
            Err(_) => RETRY_PAUSE,
        };
        self.step = ChangingStep::Looking { at: now + pause };
    }

    /// When the change has something to do although no event arrives.
    pub fn timeout(&self) -> Option<Instant> {
        match &self.step {
            ChangingStep::Looking { at } => Some(*at),
            ChangingStep::Ending { at } => self.open.map(|_| *at),
            ChangingStep::Begun | ChangingStep::Ready | ChangingStep::Failed(_) => Some(self.until),
            ChangingStep::Proving | ChangingStep::Proposed => None,
        }
    }

    /// Why it is not known what became of a proposal, once its outcome was told; `None` when it is known.
    pub fn unknown(&self) -> Option<&str> {
        let told = matches!(self.step, ChangingStep::Ending { .. }) && self.open.is_some();
        told.then_some(self.reason.as_str())
    }

    /// What the change needs next, given the register as this member knows it.
    pub fn poll(&mut self, state: &ClusterState, now: Instant) -> ChangingOutput {
        // The register is past the proposal, so it can no longer be taken.
        self.open.take_if(|version| state.version > *version);
        let outcome = match &self.step {
            ChangingStep::Begun => {
                self.step = ChangingStep::Proving;
                return ChangingOutput::Prove(self.rules.1.clone());
            }
            ChangingStep::Proving | ChangingStep::Proposed => return ChangingOutput::Wait(None),
            ChangingStep::Looking { at } if self.open.is_some() && now < *at => return ChangingOutput::Wait(Some(*at)),
            ChangingStep::Ending { at } if self.open.is_some() && now < *at => return ChangingOutput::Wait(Some(*at)),
            ChangingStep::Ending { .. } if self.open.is_some() => {
                // Only one of the two can be taken.
                self.step = ChangingStep::Ending { at: now + END_PAUSE };
                return ChangingOutput::Propose(Change { state: state.next() });
            }
            ChangingStep::Ending { .. } if self.is_joint() => return ChangingOutput::End(state.version),
            ChangingStep::Ending { .. } => return ChangingOutput::Over,
            ChangingStep::Failed(error) => Err(error.clone()),
            ChangingStep::Ready | ChangingStep::Looking { .. } => self.propose(state, now),
        };
        if let Ok(Some(next)) = outcome {
            // The proposal is repeated until its outcome is known. The repetition has no effect if the first one arrives after all.
            (self.step, self.open) = (ChangingStep::Proposed, Some(state.version));
            return ChangingOutput::Propose(Change { state: next });
        }
        self.step = ChangingStep::Ending { at: now + END_PAUSE };
        ChangingOutput::Told(outcome.map(|_| state.version))
    }

    fn is_joint(&self) -> bool {
        self.rules.0 != self.rules.1
    }

    /// The register to propose; `None` when it is as wanted.
    fn propose(&self, state: &ClusterState, now: Instant) -> Result<Option<ClusterState>, ChangeError> {
        if self.change.is_done(state) {
            return Ok(None);
        }
        if state.epoch != self.epoch {
            return Err(ChangeError::LeaderChanged);
        }
        if now >= self.until {
            let reason = self.reason.clone();
            return Err(match self.open {
                Some(_) => ChangeError::Unknown(reason),
                None => ChangeError::GivenUp(reason),
            });
        }
        let next = self.change.apply(state)?;
        if (state.quorum_rule(), next.quorum_rule()) != self.rules {
            return Err(ChangeError::Overtaken);
        }
        Ok(Some(next))
    }
}

#[cfg(test)]
#[path = "changing_tests.rs"]
mod tests;
