//! Who votes about the register, and the step that is on its way. Changed by `agent/voters.rs`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use crate::register::MemberId;

use crate::agent::types::{Asker, RegisterView, VoterStep};

/// The voters' state.
#[derive(Debug)]
pub(in crate::agent) struct Voters {
    /// Incarnations that receive the register although they are no members yet, where, and since when.
    pub(in crate::agent) admitted: BTreeMap<MemberId, (String, Instant)>,
    /// Who waits until an incarnation has the register, and until when.
    pub(in crate::agent) asked: Vec<(Asker, MemberId, Instant)>,
    /// The step under way.
    pub(in crate::agent) step: Option<VoterStep>,
    pub(in crate::agent) retry_at: Instant,
}

impl Voters {
    pub(in crate::agent) fn new(now: Instant) -> Voters {
        Voters { admitted: BTreeMap::new(), asked: Vec::new(), step: None, retry_at: now }
    }
}

impl RegisterView {
    /// The step that the engine has to take next so that these receive the register, and these of them vote.
    pub(in crate::agent) fn next_step(
        &self,
        told: &BTreeMap<MemberId, String>,
        voters: &BTreeSet<MemberId>,
    ) -> Option<VoterStep> {
        if let Some((id, peer)) = told.iter().find(|(id, _)| !self.told.contains(*id)) {
            return Some(VoterStep::Admit(*id, peer.clone()));
        }
        if self.voters != *voters || self.joint {
            return Some(VoterStep::Voters(voters.clone()));
        }
        let others: BTreeSet<MemberId> = self.told.iter().filter(|id| !told.contains_key(id)).copied().collect();
        (!others.is_empty()).then_some(VoterStep::Forget(others))
    }

    /// True when every member receives the register and every voter votes.
    pub(in crate::agent) fn voters_are_current(&self) -> bool {
        self.next_step(&self.state.told(), &self.state.voters(&self.voters)).is_none()
    }
}
