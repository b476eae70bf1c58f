//! The cluster's threads: packets between them, who controls the register, and what becomes of proposals. The register is one
//! value that whoever controls it may change while a majority of its voters hears it; openraft has its own suite. Who votes is
//! modelled as openraft has it: voters, changed by a majority of those before and of those after.

use std::collections::{BTreeMap, BTreeSet};

use walferry_cluster::agent::{Output, RegisterView, VoterStep};
use walferry_cluster::control::{Answer, Ask};
use walferry_cluster::register::{Change, LogStatus, MemberId, Outcome};
use walferry_engine::lsn::Epoch;
use walferry_engine::world;

use super::{
    Body, Broken, CHANGE_TIME_US, CONTROL_INTERVAL_US, CONTROLLER_TIME_US, Checked, Cluster, Event, WAKE_US_MIN,
};
use crate::control::{Control, Proposal, name_of, node_of};
use crate::world::NodeNo;

/// A proposal takes no less.
const PROPOSE_US_MIN: u64 = 500;
/// A promise is on the disk within this.
const PROMISE_US: std::ops::Range<u64> = 100..4_000;

/// The engine that holds the register.
#[derive(Debug, Default)]
pub struct Engine {
    pub voters: BTreeSet<MemberId>,
    /// Where those are that are told the register.
    pub told: BTreeMap<MemberId, String>,
    /// A step of the voters is under way; more of them wait.
    pub joint: bool,
}

impl Cluster {
    pub(super) fn turn_control(&mut self, node: NodeNo, incarnation: u64) {
        if self.nodes[node].incarnation != incarnation || self.nodes[node].control().is_none() {
            return;
        }
        if self.is_paused(node) {
            return self.at(self.nodes[node].paused_until, Event::Control(node, incarnation));
        }
        self.after(CONTROL_INTERVAL_US, Event::Control(node, incarnation));
        self.move_control(node, |control| control.turn(world::now()));
    }

    /// The node reported something, and nothing else brings the agent to look at it.
    pub(super) fn take_reports(&mut self, node: NodeNo, incarnation: u64) {
        if self.nodes[node].incarnation != incarnation || self.is_paused(node) {
            return;
        }
        self.move_control(node, |control| control.turn(world::now()));
    }

    /// Does something with a member's part, and what comes of it.
    pub(super) fn move_control(&mut self, node: NodeNo, act: impl FnOnce(&mut Control)) {
        self.world.be(node);
        let incarnation = self.nodes[node].incarnation;
        let Some(control) = self.nodes[node].control_mut() else { return };
        act(control);
        self.schedule_turn(node, self.now_us + WAKE_US_MIN);
        while let Some(control) = self.nodes[node].control_mut() {
            let Some(output) = control.poll_output() else { break };
            let id = control.kept.id;
            self.carry_out(node, incarnation, id, output);
        }
    }

    fn carry_out(&mut self, node: NodeNo, incarnation: u64, id: MemberId, output: Output) {
        match output {
            Output::Ask { id: number, peer, ask, timeout, .. } => {
                self.last_ask += 1;
                let request = self.last_ask;
                self.asks.insert(request, (node, incarnation, id, number));
                let timeout = self.world.true_us(node, timeout);
                self.after(timeout, Event::AskTimeout(request));
                if let Some(to) = crate::network::node_of(&peer).filter(|to| *to < self.nodes.len()) {
                    self.send_packet(node, to, request, Body::Ask(ask));
                }
            }
            Output::Answer(request, answer) => {
                let Some(to) = self.nodes[node].control_mut().and_then(|control| control.asker(request)) else {
                    return;
                };
                if matches!(*answer, Answer::Fenced { .. }) {
                    self.maybe_kill_fenced(node);
                    self.maybe_kill_controller(node);
                }
                self.send_packet(node, to, request, Body::Answer(answer));
            }
            Output::Promise(epoch) => {
                let delay = self.rng.u64(PROMISE_US);
                self.after(delay, Event::Promised { node, incarnation, id, epoch });
            }
            Output::Propose(number, change) => {
                // The controller's disk, and whoever else's it needs.
                let delay = self.rng.u64(PROPOSE_US_MIN..=self.plan.register_us);
                let proposal = Proposal { id: number, change };
                self.after(delay, Event::Propose { node, incarnation, id, proposal });
            }
            Output::Form(voters) => {
                if self.engine.voters.is_empty() {
                    self.engine.voters = voters.keys().copied().collect();
                    self.engine.told = voters;
                }
            }
            Output::ChangeVoters(step) => {
                let delay = self.rng.u64(PROPOSE_US_MIN..=self.plan.register_us);
                self.after(delay, Event::ChangeVoters { node, incarnation, id, step });
            }
            Output::Over(over) => {
                let next = MemberId(self.rng.u64(1..));
                self.trace.note(self.now_us, &format!("{} ends as {id}: {over:?}", name_of(node)));
                self.move_control(node, |control| control.begin_anew(over, next, world::now()));
            }
            Output::Reply(_, outcome) => {
                self.trace.note(self.now_us, &format!("operator at {}: {outcome:?}", name_of(node)));
            }
            Output::Order(_) | Output::Lease(_) | Output::MayElect(_) | Output::Blocked(_) => {}
        }
    }

    fn send_packet(&mut self, from: NodeNo, to: NodeNo, request: u64, body: Body) {
        if matches!(&body, Body::Ask(ask) if matches!(**ask, Ask::Fence(..))) {
            self.maybe_kill_bystander(from, to);
        }
        if let Some(delay) = self.network.borrow_mut().packet(from, to) {
            self.last_event += 1;
            self.events.insert((self.now_us + delay, self.last_event), Event::Packet { from, to, request, body });
        }
    }

    pub(super) fn packet(&mut self, from: NodeNo, to: NodeNo, request: u64, body: Body) {
        if self.is_paused(to) {
            return self.at(self.nodes[to].paused_until, Event::Packet { from, to, request, body });
        }
        if !self.network.borrow().passes(from, to) || self.nodes[to].control().is_none() {
            return;
        }
        match body {
            Body::Ask(ask) => self.move_control(to, |control| control.ask(request, from, *ask, world::now())),
            Body::Answer(answer) => self.answered(request, Some(*answer)),
        }
    }

    pub(super) fn answered(&mut self, request: u64, answer: Option<Answer>) {
        let Some((node, incarnation, id, number)) = self.asks.remove(&request) else { return };
        let answer = answer.ok_or_else(|| "no answer".to_owned());
        self.tell(node, incarnation, id, |control| control.answered(number, answer, world::now()));
    }

    /// Tells an incarnation of a member something, if it is still there.
    fn tell(&mut self, node: NodeNo, incarnation: u64, id: MemberId, act: impl FnOnce(&mut Control)) {
        let there = self.nodes[node].control().is_some_and(|control| control.kept.id == id);
        if there && self.nodes[node].incarnation == incarnation {
            self.move_control(node, act);
        }
    }

    pub(super) fn promised(&mut self, node: NodeNo, incarnation: u64, id: MemberId, epoch: Epoch) {
        if self.is_paused(node) {
            return self.at(self.nodes[node].paused_until, Event::Promised { node, incarnation, id, epoch });
        }
        self.tell(node, incarnation, id, |control| control.promised(epoch, world::now()));
    }

    pub(super) fn is_up(&self, node: NodeNo) -> bool {
        self.nodes[node].control().is_some() && !self.is_paused(node)
    }

    /// Which incarnation of the member is there, or was last.
    pub(super) fn incarnation(&self, node: NodeNo) -> MemberId {
        let known = &self.nodes[node];
        known.control().map_or(known.kept.id, |control| control.kept.id)
    }

    /// Whether the register has this incarnation of the node among its members.
    pub(super) fn is_member(&self, node: NodeNo) -> bool {
        self.register.knows(&name_of(node), self.incarnation(node))
    }

    /// Those whose votes the register has.
    pub(super) fn members(&self) -> impl Iterator<Item = NodeNo> {
        (0..self.nodes.len()).filter(|node| self.is_member(*node))
    }

    /// Those of them that have the log.
    pub(super) fn data_members(&self) -> impl Iterator<Item = NodeNo> {
        self.members().filter(|node| !self.plan.is_witness(*node))
    }

    /// No member misses anything that it confirmed, none is still catching up with its first log, and none is leaving.
    pub(super) fn all_are_complete(&self) -> bool {
        let whole = self.register.members.values().all(|member| member.log_status == LogStatus::Complete);
        whole && self.register.leaving.is_empty()
    }

    pub(super) fn hear_each_other(&self, node: NodeNo, other: NodeNo) -> bool {
        let network = self.network.borrow();
        network.passes(node, other) && network.passes(other, node)
    }

    /// Whether this voter and a majority of these voters hear each other.
    fn reaches_majority(&self, node: NodeNo, voters: &BTreeSet<MemberId>) -> bool {
        let heard = |other: &NodeNo| {
            voters.contains(&self.incarnation(*other)) && self.is_up(*other) && self.hear_each_other(node, *other)
        };
        let count = (0..self.nodes.len()).filter(heard).count();
        heard(&node) && count * 2 > voters.len()
    }

    pub(super) fn choose_controller(&mut self) {
        self.after(50_000, Event::Controller);
        let voters = self.engine.voters.clone();
        let holds = self.controller.is_some_and(|node| self.reaches_majority(node, &voters));
        if holds {
            self.controller_lost_us = None;
            // Whoever missed it hears it now.
            return self.tell_register();
        }
        let lost = *self.controller_lost_us.get_or_insert(self.now_us);
        let first = self.controller.is_none();
        if !first && self.now_us < lost + CONTROLLER_TIME_US {
            return;
        }
        let tries = |node: &NodeNo| {
            let may_elect = self.nodes[*node].control().is_some_and(|control| control.may_elect);
            may_elect && self.reaches_majority(*node, &voters)
        };
        let able: Vec<NodeNo> = (0..self.nodes.len()).filter(tries).collect();
        let Some(&chosen) = (!able.is_empty()).then(|| &able[self.rng.usize(0..able.len())]) else { return };
        self.controller = Some(chosen);
        self.controller_lost_us = None;
        self.tell_register();
    }

    /// The controller's word on the register and on itself, to those it gets through to.
    pub(super) fn tell_register(&mut self) {
        let Some(controller) = self.controller else { return };
        for node in 0..self.nodes.len() {
            if !self.engine.told.contains_key(&self.incarnation(node)) {
                continue;
            }
            let delay = self.network.borrow_mut().packet(controller, node);
            if let Some(delay) = delay {
                let view = RegisterView {
                    state: self.register.clone(),
                    formed: true,
                    controller: Some(self.incarnation(controller)),
                    controls: controller == node,
                    voters: self.engine.voters.clone(),
                    told: self.engine.told.keys().copied().collect(),
                    joint: self.engine.joint,
                };
                let id = self.incarnation(node);
                self.after(delay, Event::Learn { node, id, view: Box::new(view) });
            }
        }
    }

    pub(super) fn learn(&mut self, node: NodeNo, id: MemberId, mut view: RegisterView) {
        if self.is_paused(node) {
            return;
        }
        view.controls &= self.controller == Some(node);
        let incarnation = self.nodes[node].incarnation;
        self.tell(node, incarnation, id, |control| control.learn(view, world::now()));
    }

    pub(super) fn propose(&mut self, node: NodeNo, incarnation: u64, id: MemberId, proposal: Proposal) -> Checked {
        let able = self.controller == Some(node)
            && self.incarnation(node) == id
            && self.nodes[node].incarnation == incarnation;
        let voters = self.engine.voters.clone();
        if !able || !self.reaches_majority(node, &voters) {
            let outcome = Err("no majority of the voters took it".to_owned());
            self.after(CHANGE_TIME_US, Event::Proposed { node, incarnation, id, number: proposal.id, outcome });
            return Ok(());
        }
        let outcome = self.change_register(*proposal.change)?;
        let delay = self.network.borrow_mut().delay_us();
        self.after(delay, Event::Proposed { node, incarnation, id, number: proposal.id, outcome: Ok(outcome) });
        self.no_failover_misses_it()
    }

    fn change_register(&mut self, change: Change) -> Checked<Outcome> {
        let before = self.register.epoch;
        let outcome = self.register.apply(change);
        let text = format!(
            "register: {outcome:?} version {} epoch {} leader {:?} in sync {:?} members {}",
            self.register.version,
            self.register.epoch,
            self.register.leader,
            self.register.in_sync,
            self.members_text()
        );
        self.trace.note(self.now_us, &text);
        if self.register.epoch > before {
            self.trace.failovers += 1;
            let leader = self.register.leader.as_ref().map_or(usize::MAX, node_of);
            self.leaders.push((self.register.epoch, leader));
        }
        self.tell_register();
        if outcome == Outcome::Taken && self.register.policy != self.plan.policy {
            let (policy, given) = (&self.register.policy, self.plan.policy);
            return Err(Broken(format!(
                "the members were started with the sync policy {given:?}, and the register has {policy:?}"
            )));
        }
        Ok(outcome)
    }

    pub(super) fn proposed(
        &mut self,
        node: NodeNo,
        incarnation: u64,
        id: MemberId,
        number: u64,
        outcome: Result<Outcome, String>,
    ) {
        self.tell(node, incarnation, id, |control| control.proposed(number, outcome, world::now()));
    }

    /// A step of the voters: it takes a majority of those that vote, and of those that are to vote.
    pub(super) fn change_voters(&mut self, node: NodeNo, incarnation: u64, id: MemberId, step: VoterStep) {
        let voters = self.engine.voters.clone();
        let able =
            self.controller == Some(node) && self.incarnation(node) == id && self.reaches_majority(node, &voters);
        let outcome =
            if !able { Err("no majority of the voters took it".to_owned()) } else { self.take_step(node, step) };
        let delay = self.network.borrow_mut().delay_us();
        self.after(delay, Event::VotersChanged { node, incarnation, id, outcome });
    }

    fn take_step(&mut self, controller: NodeNo, step: VoterStep) -> Result<(), String> {
        match step {
            VoterStep::Admit(id, peer) => {
                let there = crate::network::node_of(&peer).filter(|node| *node < self.nodes.len());
                let there = there.filter(|node| self.incarnation(*node) == id && self.is_up(*node));
                self.engine.told.insert(id, peer);
                if !there.is_some_and(|node| self.hear_each_other(controller, node)) {
                    return Err("it does not take the register".to_owned());
                }
            }
            VoterStep::Voters(voters) => {
                // One that is about to stop voting may change the voters as well: it needs the others.
                let others = (0..self.nodes.len()).filter(|node| voters.contains(&self.incarnation(*node)));
                let others = others.filter(|node| self.is_up(*node) && self.hear_each_other(controller, *node)).count();
                if others * 2 <= voters.len() {
                    self.engine.joint = true;
                    return Err("no majority of those that are to vote took it".to_owned());
                }
                (self.engine.voters, self.engine.joint) = (voters, false);
            }
            VoterStep::Forget(ids) => self.engine.told.retain(|id, _| !ids.contains(id)),
        }
        self.tell_register();
        Ok(())
    }

    pub(super) fn voters_changed(&mut self, node: NodeNo, incarnation: u64, id: MemberId, outcome: Result<(), String>) {
        self.tell(node, incarnation, id, |control| control.voters_changed(outcome, world::now()));
    }

    /// `a whole, b lost`.
    pub(super) fn members_text(&self) -> String {
        let members = self.register.members.iter();
        let leaves = |name| if self.register.leaving.contains(name) { " leaving" } else { "" };
        members
            .map(|(name, member)| format!("{name} {}{}", member.log_status, leaves(name)))
            .collect::<Vec<_>>()
            .join(", ")
    }
}
