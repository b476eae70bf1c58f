//! The cluster's threads: packets between them, who controls the register, and what becomes of proposals. The register is one
//! value that whoever controls it may change while a majority hears it; openraft has its own suite.

use walferry_cluster::control::Answer;
use walferry_cluster::register::{Change, ClusterState};
use walferry_engine::world;

use super::{ASK_TIME_US, Body, CHANGE_TIME_US, CONTROL_INTERVAL_US, CONTROLLER_TIME_US, Cluster, Event};
use crate::control::{Control, Wish, node_of};
use crate::world::NodeNo;

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
    fn move_control(&mut self, node: NodeNo, act: impl FnOnce(&mut Control, &mut Vec<Wish>)) {
        self.world.be(node);
        let life = self.nodes[node].life;
        let Some(process) = &mut self.nodes[node].process else { return };
        let mut wishes = Vec::new();
        act(&mut process.control, &mut wishes);
        let answers = process.control.take_answers(world::now());
        self.schedule_turn(node, self.now_us + 2);
        for (request, to, answer) in answers {
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
                Wish::Propose(change) => {
                    let change = Box::new(change);
                    self.after(500, Event::Propose { from: node, life, change, in_sync: false });
                }
                Wish::KeepInSync(change) => {
                    let change = Box::new(change);
                    let delay = self.network.borrow_mut().delay_us();
                    self.after(delay, Event::Propose { from: node, life, change, in_sync: true });
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

    /// Whether a majority and this node hear each other.
    fn reaches_majority(&self, node: NodeNo) -> bool {
        let network = self.network.borrow();
        let heard = |other: &NodeNo| self.is_up(*other) && network.passes(node, *other) && network.passes(*other, node);
        self.is_up(node) && (0..self.nodes.len()).filter(heard).count() * 2 > self.nodes.len()
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
            return;
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
        self.move_control(node, |control, wishes| {
            let news = state.version > control.kept.state.version || control.controls != controls;
            control.learn(state);
            control.controls = controls;
            if news {
                control.turn(world::now(), wishes);
            }
        });
    }

    pub(super) fn propose(&mut self, from: NodeNo, life: u64, change: Change, in_sync: bool) {
        let reaches = |a: NodeNo, b: NodeNo| {
            let network = self.network.borrow();
            network.passes(a, b) && network.passes(b, a)
        };
        let able = self.controller.filter(|node| self.reaches_majority(*node));
        let able = able.filter(|node| (*node == from || in_sync) && reaches(from, *node));
        let delay = match able {
            Some(_) => {
                let before = self.register.epoch;
                let outcome = self.register.apply(change);
                self.trace.note(
                    self.now_us,
                    &format!(
                        "register: {outcome:?} version {} epoch {} leader {:?} in sync {:?}",
                        self.register.version, self.register.epoch, self.register.leader, self.register.in_sync
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
                self.network.borrow_mut().delay_us()
            }
            None => CHANGE_TIME_US,
        };
        self.after(delay, Event::ChangeDone { node: from, life, in_sync });
    }

    pub(super) fn change_done(&mut self, node: NodeNo, life: u64, in_sync: bool) {
        if self.nodes[node].life == life {
            self.move_control(node, |control, wishes| {
                if in_sync {
                    control.in_sync_changed();
                } else {
                    control.proposed();
                }
                control.turn(world::now(), wishes);
            });
        }
    }
}
