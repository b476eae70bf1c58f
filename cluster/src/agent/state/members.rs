//! Changes of the membership that wait or are on their way. Changed by `agent/members.rs`.

use std::collections::{BTreeSet, VecDeque};
use std::time::Instant;

use crate::changing::Changing;
use crate::control::Greeting;
use crate::member::MemberName;
use crate::register::MemberId;

use crate::agent::types::Asker;

/// What is asked for.
#[derive(Clone, Debug)]
pub(in crate::agent) enum WantedChange {
    Join { name: MemberName, peer: Option<String> },
    Remove { name: MemberName },
    CaughtUp { name: MemberName, id: MemberId },
}

impl WantedChange {
    pub(in crate::agent) fn text(&self) -> String {
        match self {
            WantedChange::Join { name, .. } => format!("{name} is being taken in"),
            WantedChange::Remove { name } => format!("{name} is being removed"),
            WantedChange::CaughtUp { name, .. } => format!("{name} has caught up and is about to count"),
        }
    }
}

/// Where the change under way stands.
#[derive(Debug)]
pub(in crate::agent) enum ChangeStep {
    /// The node that is to join is asked who it is, and the next time then.
    Greeting { name: MemberName, peer: String, asked: bool, at: Instant, until: Instant },
    /// The controller is asked to let the node have the register.
    Admitting { theirs: Greeting, peer: String },
    /// Members are asked whether they answer.
    Reaching { name: MemberName, awaited: BTreeSet<MemberName>, answering: BTreeSet<MemberName>, until: Instant },
    /// The register changes.
    Changing { then: AfterChange },
    /// The register has the member as leaving: its vote ends first.
    Leaving { name: MemberName, in_reach: BTreeSet<MemberName>, until: Instant },
    /// The operator gets the outcome once the voters have followed and a majority of the members of now lets this one lead.
    ChangingVoters { told: String, until: Instant },
    /// The operator has got the outcome.
    Told,
}

/// What follows on a change of the register.
#[derive(Clone, Debug)]
pub(in crate::agent) enum AfterChange {
    Joined { theirs: Greeting, peer: String },
    Left { name: MemberName, in_reach: BTreeSet<MemberName> },
    Removed { name: MemberName },
    Counts { name: MemberName },
}

/// The one change that is under way, up to its last word: the end of one must not be taken for the end of the next.
#[derive(Debug)]
pub(in crate::agent) struct ChangeTurn {
    pub(in crate::agent) asker: Option<Asker>,
    pub(in crate::agent) text: String,
    pub(in crate::agent) step: ChangeStep,
    /// The change on its way into the register, until its last word.
    pub(in crate::agent) changing: Option<Changing>,
    /// The number under which the node proves the quorum rule.
    pub(in crate::agent) proof: u64,
}

impl ChangeTurn {
    /// The error for another change that cannot begin yet.
    pub(in crate::agent) fn under_way(&self) -> String {
        match self.changing.as_ref().and_then(Changing::unknown) {
            None => format!("{}; try again when it is over", self.text),
            Some(reason) => format!(
                "{}, and it is not known whether the register took it ({reason}). This ends by itself once a member that controls the \
                 register answers; if it does not, `walferry switchover` to another leader ends it as well",
                self.text
            ),
        }
    }
}

/// Changes of the members under this leader.
#[derive(Debug)]
pub(in crate::agent) struct MemberChanges {
    pub(in crate::agent) turn: Option<ChangeTurn>,
    pub(in crate::agent) waiting: VecDeque<(Option<Asker>, WantedChange, Instant)>,
    /// When this member may begin a change by itself.
    pub(in crate::agent) own_at: Instant,
}

impl MemberChanges {
    pub(in crate::agent) fn new(now: Instant) -> MemberChanges {
        MemberChanges { turn: None, waiting: VecDeque::new(), own_at: now }
    }

    pub(in crate::agent) fn timeout(&self) -> Option<Instant> {
        let step = self.turn.as_ref().and_then(|turn| match &turn.step {
            ChangeStep::Greeting { asked: false, at, .. } => Some(*at),
            ChangeStep::Reaching { until, .. }
            | ChangeStep::Leaving { until, .. }
            | ChangeStep::ChangingVoters { until, .. } => Some(*until),
            _ => None,
        });
        let changing = self.turn.as_ref().and_then(|turn| turn.changing.as_ref()?.timeout());
        let waiting = self.waiting.iter().map(|(.., until)| *until);
        step.into_iter().chain(changing).chain(waiting).min()
    }
}
