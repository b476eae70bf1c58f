//! Members that could have a leader have one soon, also while others are gone.

use std::collections::BTreeSet;

use walferry_cluster::MemberName;

use super::{Broken, Checked, Cluster};
use crate::control::name_of;
use crate::world::NodeNo;

/// Nobody leads for so long although somebody could.
const LEADERLESS_US_MAX: u64 = 3_000_000;
/// A member that needs a snapshot has it, and what follows on it, so long after the last fault.
const WHOLE_US_MAX: u64 = 10_000_000;

impl Cluster {
    /// Looked at again and again.
    pub(super) fn somebody_leads(&mut self) -> Checked {
        if self.leader().is_some() || !self.could_have_a_leader() {
            self.leaderless_us = None;
            return Ok(());
        }
        let since = *self.leaderless_us.get_or_insert(self.now_us);
        if self.now_us > since + LEADERLESS_US_MAX {
            let state = self.state_text();
            let long = LEADERLESS_US_MAX / super::SECOND_US;
            return Err(Broken(format!("nobody leads for {long} s, although a majority is well: {state}")));
        }
        Ok(())
    }

    /// Once faults are over, members that joined or lost their disk soon have everything. Looked at again and again.
    pub(super) fn members_catch_up(&self) -> Checked {
        let long = self.now_us > self.plan.faults_us + WHOLE_US_MAX;
        if !self.calm || !long || self.all_are_complete() {
            return Ok(());
        }
        let state = self.state_text();
        let long = WHOLE_US_MAX / super::SECOND_US;
        Err(Broken(format!("{long} s after the last fault a member is not whole, or not gone: {state}")))
    }

    /// A majority of the members is up, well and connected, has a majority of the voters in it and may elect one of its own; and
    /// the network loses nothing.
    fn could_have_a_leader(&self) -> bool {
        let well: Vec<NodeNo> = self.members().filter(|node| self.is_well(*node)).collect();
        let names: BTreeSet<MemberName> = well.iter().map(|node| name_of(*node)).collect();
        let heard = |node: &NodeNo| well.iter().all(|other| self.hear_each_other(*node, *other));
        let voting = well.iter().filter(|node| self.engine.voters.contains(&self.incarnation(**node))).count();
        let eligible = |name: &MemberName| self.register.members[name].is_eligible();
        self.plan.delays.lost_per_mille == 0
            && self.register.version > 0
            && well.len() >= self.register.majority()
            && well.iter().all(heard)
            && voting * 2 > self.engine.voters.len()
            && !self.engine.joint
            && names.iter().any(eligible)
            && self.register.safe_to_lead(&names).is_ok()
    }

    fn is_well(&self, node: NodeNo) -> bool {
        let known = &self.nodes[node];
        let stopped = known.process.as_ref().is_some_and(|process| process.member.stepped_down().is_some());
        let disk = &known.disk;
        let slow = disk.slowness > 1 || disk.stalled_until > self.now_us;
        self.is_up(node) && !stopped && !slow && known.rotten.is_none() && !self.world.has_pending_fault(node)
    }
}
