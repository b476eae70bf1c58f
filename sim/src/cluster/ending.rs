//! The end of a run: whether the cluster has recovered from its faults, and what has to hold then.

use walferry_cluster::MemberName;
use walferry_cluster::level::CommitLevel;
use walferry_engine::lsn::Lsn;
use walferry_node::simulated::Member;

use super::event::Event;
use super::machine::Node;
use super::outcome::{Checked, Summary};
use super::{Cluster, WELL_US};
use crate::clients::{Acknowledged, p99_us};
use crate::control::name_of;
use crate::limits::{Broken, SEGMENT_BYTES};
use crate::world::NodeNo;

impl Cluster {
    pub(super) fn leader(&self) -> Option<NodeNo> {
        (0..self.nodes.len()).find(|node| {
            self.world.be(*node);
            self.nodes[*node].process.as_ref().is_some_and(|process| process.member.leads())
        })
    }

    /// Everybody is there and has the leader's log, and a commit that waits for all of it was just taken.
    pub(super) fn has_recovered(&mut self) -> bool {
        if self.now_us < self.plan.faults_us + WELL_US {
            return false;
        }
        for node in 0..self.nodes.len() {
            let stopped = self.nodes[node].process.as_ref().is_some_and(|p| p.member.stepped_down().is_some());
            if stopped {
                self.kill(node);
                self.after(10_000, Event::Start(node));
                return false;
            }
        }
        let Some(leader) = self.leader() else { return false };
        if self.nodes.iter().any(|node| node.control().is_none())
            || !(0..self.nodes.len()).all(|node| self.is_healed(node))
            || !self.all_are_complete()
        {
            return false;
        }
        let ends: Vec<(Lsn, Lsn)> = self
            .data_members()
            .filter_map(|node| self.nodes[node].process.as_ref())
            .map(|process| (process.member.sealed(), process.member.applied()))
            .collect();
        let lately = self.plan.faults_us + WELL_US / 2;
        let mut acknowledged = self.told.acknowledged.iter().rev().take_while(|ack| ack.at_us > lately);
        // A node alone has nobody to confirm a commit, and refuses the remote levels.
        let alone = self.register.data_members().count() == 1;
        let level = if alone { CommitLevel::Local } else { CommitLevel::RemoteApply };
        let served = acknowledged.any(|ack| ack.node == leader && ack.level == level);
        ends.len() == self.register.data_members().count()
            && served
            && ends.iter().all(|(sealed, applied)| *sealed == ends[0].0 && *applied == ends[0].0)
    }

    pub(super) fn state_text(&self) -> String {
        let mut text = format!(
            "register version {} epoch {} leader {:?} in sync {:?} members {} controller {:?}",
            self.register.version,
            self.register.epoch,
            self.register.leader.as_ref().map(MemberName::as_str),
            self.register.in_sync.iter().map(MemberName::as_str).collect::<Vec<_>>(),
            self.members_text(),
            self.controller.map(name_of)
        );
        for (number, node) in self.nodes.iter().enumerate() {
            self.world.be(number);
            match &node.process {
                None if node.witness.is_some() => text.push_str(&format!("; {} is a witness", name_of(number))),
                None => text.push_str(&format!("; {} is down", name_of(number))),
                Some(process) => text.push_str(&format!(
                    "; {} ({}) epoch {} sealed {} flushed {} applied {} committed {} {}",
                    name_of(number),
                    process.member.describe(),
                    process.member.epoch(),
                    process.member.sealed(),
                    process.member.flushed(),
                    process.member.applied(),
                    process.member.committed(),
                    process.member.stepped_down().unwrap_or_default(),
                )),
            }
        }
        text
    }

    pub(super) fn check_end(&mut self) -> Checked<Summary> {
        let leader = self.leader().expect("it has recovered");
        self.world.be(leader);
        crate::checks::nothing_acknowledged_is_lost(&self.told.acknowledged, self.member(leader), &self.leaders)?;
        crate::checks::nothing_confirmed_is_taken_back(&self.confirmed, self.member(leader))?;
        for node in self.data_members() {
            let known = &self.nodes[node];
            // A disk that lost something, or brought something else, may have lost this.
            // By epochs: an answer that was on its way came later.
            let counts = |ack: &&Acknowledged| {
                ack.node == node && !known.was_damaged && known.lost_in.is_none_or(|epoch| ack.epoch > epoch)
            };
            let acknowledged = self.told.acknowledged.iter().filter(counts);
            crate::checks::what_was_cut_off_is_kept(acknowledged, self.member(leader), &known.dir)?;
        }
        let end = self.member(leader).sealed();
        for node in self.data_members().filter(|node| *node != leader) {
            self.world.be(node);
            crate::checks::logs_agree(self.member(leader), self.member(node), end, SEGMENT_BYTES)?;
        }
        self.states_are_the_model(leader, end)?;
        let held = crate::checks::grown(&self.told.growing, self.member(leader))?;
        let checked_calls = self.told.growing.check(&held).map_err(Broken)?;
        let checked_calls = checked_calls + self.told.registers.check().map_err(Broken)?;
        let copies = |node: &Node| node.process.as_ref().map_or(0, |process| process.member.snapshots());
        self.snapshots += self.nodes.iter().map(copies).sum::<u64>();
        Ok(Summary {
            p99_us: p99_us(&self.told.acknowledged, CommitLevel::RemoteFlush),
            hash: self.trace.hash(),
            commands: self.told.commands,
            acknowledged: self.told.acknowledged.len(),
            failovers: self.trace.failovers,
            faults: self.faults,
            restarts: self.restarts,
            misreads: self.world.misreads(),
            snapshots: self.snapshots,
            checked_calls,
            modelled: !self.model.is_lost(),
            simulated_us: self.now_us,
        })
    }

    pub(super) fn member(&self, node: NodeNo) -> &Member {
        &self.nodes[node].process.as_ref().expect("everybody is there").member
    }
}
