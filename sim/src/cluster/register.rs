//! The cluster's threads: packets between them, who controls the register, and what becomes of proposals. The register is one
//! value that whoever controls it may change while a majority hears it; openraft has its own suite.

use walferry_cluster::control::Answer;
use walferry_cluster::register::{Change, ClusterState, Holding};
use walferry_engine::world;

use super::{ASK_TIME_US, Body, CHANGE_TIME_US, CONTROL_INTERVAL_US, CONTROLLER_TIME_US, Cluster, Event, RESTART_US};
use crate::control::{Control, Purpose, Wish, name_of, node_of};
use crate::world::NodeNo;

/// A proposal takes no less.
const PROPOSE_US_MIN: u64 = 500;

/// Whether only the controller makes such proposals.
fn is_controllers(purpose: Purpose) -> bool {
    matches!(purpose, Purpose::Failover | Purpose::TakeBack)
}

impl Cluster {
    pub(super) fn turn_control(&mut self, node: NodeNo, life: u64) {
        if self.nodes[node].life != life || self.nodes[node].process.is_none() {
            return;
        }
        if self.is_paused(node) {
            return self.at(self.nodes[node].paused_until, Event::Control(node, life));
        }
        self.after(CONTROL_INTERVAL_US, Event::Control(node, life));
        self.move_control(node, |control, wishes| control.turn(world::now(), wishes));
    }

    /// Does something with a member's part, and what comes of it.
    pub(super) fn move_control(&mut self, node: NodeNo, act: impl FnOnce(&mut Control, &mut Vec<Wish>)) {
        self.world.be(node);
        let life = self.nodes[node].life;
        let Some(process) = &mut self.nodes[node].process else { return };
        let mut wishes = Vec::new();
        act(&mut process.control, &mut wishes);
        let answers = process.control.take_answers(world::now());
        self.schedule_turn(node, self.now_us + 2);
        for (request, to, answer) in answers {
            if matches!(answer, Answer::Sealed { .. }) {
                self.maybe_kill_sealed(node);
            }
            self.send_packet(node, to, request, Body::Answer(answer));
        }
        for wish in wishes {
            match wish {
                Wish::Ask { to, ask, asked } => {
                    self.last_ask += 1;
                    let request = self.last_ask;
                    self.asks.insert(request, (node, life, asked));
                    self.after(ASK_TIME_US, Event::AskTimeout(request));
                    self.send_packet(node, to, request, Body::Ask(ask));
                }
                Wish::Propose(purpose, change) => {
                    // The controller's disks, and whoever else's it needs.
                    let mut delay = self.rng.u64(PROPOSE_US_MIN..=self.plan.register_us);
                    if !is_controllers(purpose) {
                        delay += self.network.borrow_mut().delay_us();
                    }
                    let change = Box::new(change);
                    self.after(delay, Event::Propose { from: node, life, change, purpose });
                }
            }
        }
    }

    fn send_packet(&mut self, from: NodeNo, to: NodeNo, request: u64, body: Body) {
        if let Some(delay) = self.network.borrow_mut().packet(from, to) {
            self.last_event += 1;
            self.events.insert((self.now_us + delay, self.last_event), Event::Packet { from, to, request, body });
        }
    }

    pub(super) fn packet(&mut self, from: NodeNo, to: NodeNo, request: u64, body: Body) {
        if self.is_paused(to) {
            return self.at(self.nodes[to].paused_until, Event::Packet { from, to, request, body });
        }
        if !self.network.borrow().passes(from, to) || self.nodes[to].process.is_none() {
            return;
        }
        match body {
            Body::Ask(ask) => {
                let mut answer = None;
                self.move_control(to, |control, _| answer = control.answer(request, from, ask, world::now()));
                if let Some(answer) = answer {
                    self.send_packet(to, from, request, Body::Answer(answer));
                }
            }
            Body::Answer(answer) => self.answered(request, Some(answer)),
        }
    }

    pub(super) fn answered(&mut self, request: u64, answer: Option<Answer>) {
        let Some((node, life, asked)) = self.asks.remove(&request) else { return };
        if self.nodes[node].life == life {
            self.move_control(node, |control, wishes| {
                control.handle_answer(asked, answer, world::now(), wishes);
                control.turn(world::now(), wishes);
            });
        }
    }

    pub(super) fn is_up(&self, node: NodeNo) -> bool {
        self.nodes[node].process.is_some() && !self.is_paused(node)
    }

    /// Whether the register has this life of the node among its members.
    pub(super) fn is_member(&self, node: NodeNo) -> bool {
        self.register.knows(&name_of(node), self.nodes[node].kept.id)
    }

    /// Those whose lives the register has.
    pub(super) fn members(&self) -> impl Iterator<Item = NodeNo> {
        (0..self.nodes.len()).filter(|node| self.is_member(*node))
    }

    /// No member misses anything that it confirmed, and none is still catching up with its first log.
    pub(super) fn all_are_whole(&self) -> bool {
        self.register.members.values().all(|seat| seat.holding == Holding::Whole)
    }

    fn hear_each_other(&self, node: NodeNo, other: NodeNo) -> bool {
        let network = self.network.borrow();
        network.passes(node, other) && network.passes(other, node)
    }

    /// Whether this member and a majority hear each other.
    fn reaches_majority(&self, node: NodeNo) -> bool {
        let heard = |other: &NodeNo| self.is_member(*other) && self.is_up(*other) && self.hear_each_other(node, *other);
        let heard = (0..self.nodes.len()).filter(heard).count();
        self.is_member(node) && self.is_up(node) && heard * 2 > self.register.members.len()
    }

    pub(super) fn choose_controller(&mut self) {
        self.after(50_000, Event::Controller);
        let holds = self.controller.is_some_and(|node| self.reaches_majority(node));
        if holds {
            self.controller_lost_us = None;
            // Whoever missed it hears it now.
            for node in 0..self.nodes.len() {
                self.tell_register(node);
            }
            return self.look_for_new_lives();
        }
        let lost = *self.controller_lost_us.get_or_insert(self.now_us);
        let first = self.controller.is_none();
        if !first && self.now_us < lost + CONTROLLER_TIME_US {
            return;
        }
        let able: Vec<NodeNo> = (0..self.nodes.len()).filter(|node| self.reaches_majority(*node)).collect();
        let Some(&chosen) = (!able.is_empty()).then(|| &able[self.rng.usize(0..able.len())]) else { return };
        self.controller = Some(chosen);
        self.controller_lost_us = None;
        for node in 0..self.nodes.len() {
            self.tell_register(node);
        }
    }

    /// A member that is there again without what it was: its disk is new.
    fn look_for_new_lives(&mut self) {
        let Some(controller) = self.controller else { return };
        let is_new = |node: &NodeNo| {
            let known = self.register.members.contains_key(&name_of(*node)) && !self.is_member(*node);
            known && self.is_up(*node) && self.hear_each_other(controller, *node)
        };
        let Some(node) = (0..self.nodes.len()).find(is_new) else { return };
        let id = self.nodes[node].kept.id;
        self.move_control(controller, |control, wishes| control.take_back(&name_of(node), id, wishes));
    }

    /// The controller's word on the register and on itself, if it gets through.
    pub(super) fn tell_register(&mut self, node: NodeNo) {
        let Some(controller) = self.controller else { return };
        let delay = self.network.borrow_mut().packet(controller, node);
        if let Some(delay) = delay {
            let state = Box::new(self.register.clone());
            self.after(delay, Event::Learn { node, state });
        }
    }

    pub(super) fn learn(&mut self, node: NodeNo, state: &ClusterState) {
        if self.is_paused(node) {
            return;
        }
        let controls = self.controller == Some(node);
        let mut removed = false;
        self.move_control(node, |control, wishes| {
            let news = state.version > control.kept.state.version || control.controls != controls;
            control.learn(state);
            control.controls = controls;
            removed = control.is_removed();
            if news && !removed {
                control.turn(world::now(), wishes);
            }
        });
        if removed {
            self.lose_disk(node);
            self.after(RESTART_US, Event::Start(node));
        }
    }

    pub(super) fn propose(&mut self, from: NodeNo, life: u64, change: Change, purpose: Purpose) {
        let able = self.controller.filter(|node| self.reaches_majority(*node));
        let able = able.filter(|node| *node == from || !is_controllers(purpose) && self.hear_each_other(from, *node));
        let (delay, answer) = match able {
            Some(_) => {
                let before = self.register.epoch;
                let outcome = self.register.apply(change);
                self.trace.note(
                    self.now_us,
                    &format!(
                        "register: {purpose:?} {outcome:?} version {} epoch {} leader {:?} in sync {:?} members {}",
                        self.register.version,
                        self.register.epoch,
                        self.register.leader,
                        self.register.in_sync,
                        self.members_text()
                    ),
                );
                if self.register.epoch > before {
                    self.trace.failovers += 1;
                    let leader = self.register.leader.as_ref().map_or(usize::MAX, node_of);
                    self.leaders.push((self.register.epoch, leader));
                }
                for node in 0..self.nodes.len() {
                    self.tell_register(node);
                }
                (self.network.borrow_mut().delay_us(), Ok(()))
            }
            None => (CHANGE_TIME_US, Err("nobody controls".to_owned())),
        };
        self.after(delay, Event::ChangeDone { node: from, life, purpose, answer });
    }

    /// `a whole, b lost`.
    pub(super) fn members_text(&self) -> String {
        let members = self.register.members.iter();
        members.map(|(name, seat)| format!("{name} {}", seat.holding)).collect::<Vec<_>>().join(", ")
    }

    pub(super) fn change_done(&mut self, node: NodeNo, life: u64, purpose: Purpose, answer: Result<(), String>) {
        if self.nodes[node].life == life {
            self.move_control(node, |control, wishes| {
                control.proposed(purpose, answer, world::now());
                control.turn(world::now(), wishes);
            });
        }
    }
}
