//! Operators' commands that are on their way. Changed by `agent/commands.rs`.

use std::collections::BTreeMap;
use std::time::Instant;

use walferry_engine::lsn::{Epoch, Lsn};

use crate::member::MemberName;
use crate::register::{ClusterState, MemberId};

use crate::agent::types::Asker;

#[derive(Debug)]
pub(in crate::agent) enum Step {
    /// The leader does it.
    AtLeader,
    /// The leader takes no writes until the other has everything.
    Draining { to: MemberName, begun: Instant },
    /// The controller is asked to replace the leader.
    SteppingDown { to: MemberName, begun: Instant },
    /// The register has to move.
    Moving { to: MemberName, begun: Instant, until: Instant },
    /// The controller gets the message that losses are accepted.
    Allowing { known: Lsn },
    /// The register has to move.
    MovingUnclean { known: Lsn, until: Instant },
}

#[derive(Debug)]
pub(in crate::agent) struct Running {
    /// In which it was given.
    pub(in crate::agent) epoch: Epoch,
    pub(in crate::agent) step: Step,
}

/// Commands under way.
#[derive(Debug, Default)]
pub(in crate::agent) struct Commands {
    pub(in crate::agent) running: BTreeMap<u64, Running>,
    /// Drains of this leader, and who asked.
    pub(in crate::agent) drains: BTreeMap<u64, Asker>,
}

impl Commands {
    pub(in crate::agent) fn timeout(&self) -> Option<Instant> {
        let until = |running: &Running| match &running.step {
            Step::Moving { until, .. } | Step::MovingUnclean { until, .. } => Some(*until),
            _ => None,
        };
        self.running.values().filter_map(until).min()
    }

    pub(in crate::agent) fn drains(&self) -> usize {
        self.drains.len()
    }

    pub(in crate::agent) fn begin_drain(&mut self, id: u64, asker: Asker) {
        self.drains.insert(id, asker);
    }

    pub(in crate::agent) fn end_drain(&mut self, id: u64) -> Option<Asker> {
        self.drains.remove(&id)
    }
}

/// Who takes over when nobody is named: not the member that controls the register, if there is another, so that a later death of
/// the leader takes nobody along who has to replace it.
pub(in crate::agent) fn handover_to(state: &ClusterState, controller: Option<MemberId>) -> Option<MemberName> {
    let controls = |name: &&MemberName| state.members.get(*name).map(|member| member.id) == controller;
    state.in_sync.iter().min_by_key(controls).cloned()
}
