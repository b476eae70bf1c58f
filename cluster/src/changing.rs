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

/// How long a change is proposed: a controller that died is replaced well before.
const PROPOSE_TIME_MAX: Duration = Duration::from_secs(10);
/// How long the register may take to move here as well, once a controller has answered.
const ARRIVAL_TIME_MAX: Duration = Duration::from_secs(5);
/// A proposal whose fate is not known is followed by one that only counts the version up, again and again after this.
const END_PAUSE: Duration = Duration::from_millis(500);
/// From a proposal that was not answered to the next.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// What is to become of a member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemberChange {
    /// It is taken in.
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
    /// It has joined and caught up, and counts from now on.
    CaughtUp {
        /// Its name.
        name: MemberName,
        /// The incarnation that has caught up.
        id: MemberId,
    },
    /// Its removal begins: it votes about the register no more.
    Leave {
        /// Its name.
        name: MemberName,
    },
    /// The members do without it.
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

/// Why the members did not change, or may not have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// It is against the rules.
    #[error(transparent)]
    Membership(#[from] MembershipError),
    /// It was removed, has another incarnation, or counts.
    #[error("{0} does not join any more")]
    NotJoining(MemberName),
    /// What was confirmed so far is not confirmed under the new quorum rule.
    #[error("{0}")]
    Unproved(String),
    /// Another leads, or this one in another epoch.
    #[error("the leader changed meanwhile, and nothing else: try again")]
    LeaderChanged,
    /// The quorum rule is no longer the one for which it was proved.
    #[error("another change of the members came first: try again")]
    Overtaken,
    /// No proposal is left that could be taken.
    #[error("given up, nothing was changed: {0}")]
    GivenUp(String),
    /// One is.
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
    /// What became of the change, once: the version in which it was seen. Its end may take longer.
    Told(Result<u64, ChangeError>),
    /// The register's quorum rule suffices again from this version on. The last word.
    End(u64),
    /// The last word on a change whose quorum rule stayed the same.
    Over,
}

#[derive(Clone, Debug)]
enum ChangingStep {
    /// The quorum rule changes, and nobody has been asked to prove it.
    Begun,
    Proving,
    Ready,
    Proposed,
    /// A proposal was answered, or was not: the register is looked at when it has moved, and at this time.
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
    /// In which it began: another leader knows nothing of the proof.
    epoch: Epoch,
    /// Of before and after.
    rules: (QuorumRule, QuorumRule),
    step: ChangingStep,
    /// A proposal followed on this version, and its fate is not known: it may be taken until the register is past it.
    open: Option<u64>,
    until: Instant,
    /// Why it takes so long.
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

    /// When it has something to do although nothing comes.
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

    /// What it needs, by the register as it is known here.
    pub fn poll(&mut self, state: &ClusterState, now: Instant) -> ChangingOutput {
        // Taken or not: the proposal can have no other fate any more.
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
                // Whichever of the two is taken, no other can be then.
                self.step = ChangingStep::Ending { at: now + END_PAUSE };
                return ChangingOutput::Propose(Change { state: state.next() });
            }
            ChangingStep::Ending { .. } if self.is_joint() => return ChangingOutput::End(state.version),
            ChangingStep::Ending { .. } => return ChangingOutput::Over,
            ChangingStep::Failed(error) => Err(error.clone()),
            ChangingStep::Ready | ChangingStep::Looking { .. } => self.propose(state, now),
        };
        if let Ok(Some(next)) = outcome {
            // Made again until its fate is known, which makes no difference if the first one arrives after all.
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
