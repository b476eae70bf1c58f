//! The cluster's thread of a simulated node: the state machines of the `cluster` crate with the simulator's packets and register
//! in place of sockets and openraft. It does what the daemon's own driver does, without its tasks; decisions are the cores'.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use walferry::simulated::{Control as NodeEnd, Order, Reach, Report};
use walferry_cluster::MemberName;
use walferry_cluster::changing::{Changing, MemberChange, Next};
use walferry_cluster::control::{Answer, Ask, Beat};
use walferry_cluster::failover::{Aside, Effect, Failover, Outlook, Sealed};
use walferry_cluster::lease::{Lease, Voter};
use walferry_cluster::register::{Change, ClusterState, Holding, MemberId, Part};
use walferry_engine::lsn::Epoch;
use walferry_engine::mutants;

use crate::world::NodeNo;

/// What a member keeps on its disk beside its log.
#[derive(Clone, Debug)]
pub struct Kept {
    pub id: MemberId,
    pub promised: Epoch,
    pub state: ClusterState,
}

/// What a question was about, for when its answer comes.
#[derive(Clone, Debug)]
pub enum Asked {
    Beat { member: MemberName, sent_at: Instant, epoch: Epoch },
    Canvass(MemberName),
    Seal(MemberName),
    Aside,
}

/// What the member wants done.
pub enum Wish {
    Ask {
        to: NodeNo,
        ask: Ask,
        asked: Asked,
    },
    /// A change of the register.
    Propose(Purpose, Change),
}

/// What a change of the register is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Another leader, by the controller itself.
    Failover,
    /// A member that lost its disk begins anew, by the controller itself.
    TakeBack,
    /// The leader's in-sync set.
    InSync,
    /// The leader's change of the members.
    Members,
}

/// A seal that waits for the node.
struct Sealing {
    request: u64,
    from: NodeNo,
    reach: oneshot::Receiver<Reach>,
}

/// A leader that takes no writes until this replica has everything.
struct Draining {
    epoch: Epoch,
    to: MemberName,
    drained: oneshot::Receiver<Result<(), String>>,
}

/// One member's part.
pub struct Control {
    pub name: MemberName,
    pub kept: Kept,
    node: NodeEnd,
    election_timeout: Duration,
    heartbeat_interval: Duration,
    voter: Voter,
    failover: Failover,
    lease: Option<(Epoch, Lease)>,
    told: Option<Part>,
    told_version: u64,
    lived_through: Epoch,
    beat_at: Instant,
    sealing: BTreeMap<MemberName, Epoch>,
    answering: Vec<Sealing>,
    wanted_in_sync: Option<(Epoch, BTreeSet<MemberName>)>,
    in_sync_changing: bool,
    draining: Option<Draining>,
    changing: Option<Changing>,
    /// The node confirms what there is under the terms of the change as well.
    proving: Option<oneshot::Receiver<Result<(), String>>>,
    taking_back: bool,
    /// It believes that it may change the register.
    pub controls: bool,
}

pub fn name_of(node: NodeNo) -> MemberName {
    let letter = char::from(b'a' + node as u8);
    letter.to_string().parse().expect("a letter is a name")
}

pub fn node_of(name: &MemberName) -> NodeNo {
    usize::from(name.as_str().as_bytes()[0] - b'a')
}

impl Control {
    pub fn new(
        node_no: NodeNo,
        kept: Kept,
        node: NodeEnd,
        history_epoch: Epoch,
        election_timeout: Duration,
        heartbeat_interval: Duration,
        now: Instant,
    ) -> Control {
        let name = name_of(node_no);
        Control {
            voter: Voter::new(kept.promised, election_timeout, now),
            failover: Failover::new(name.clone(), election_timeout, heartbeat_interval),
            lived_through: kept.state.epoch.max(history_epoch),
            name,
            kept,
            node,
            election_timeout,
            heartbeat_interval,
            lease: None,
            told: None,
            told_version: 0,
            beat_at: now,
            sealing: BTreeMap::new(),
            answering: Vec::new(),
            wanted_in_sync: None,
            in_sync_changing: false,
            draining: None,
            changing: None,
            proving: None,
            taking_back: false,
            controls: false,
        }
    }

    pub fn connection(&self, socket: std::os::fd::OwnedFd, address: std::net::SocketAddr) {
        self.node.order(Order::Connection(socket, address));
    }

    fn is_member(&self) -> bool {
        self.kept.state.knows(&self.name, self.kept.id)
    }

    /// Its life is over: the register has done without it, or has another life in its place.
    pub fn is_removed(&self) -> bool {
        self.kept.state.removed_at(self.kept.id).is_some()
    }

    fn leads(&self) -> bool {
        self.kept.state.leader.as_ref() == Some(&self.name) && self.is_member()
    }

    /// An operator wants another leader.
    pub fn switch_over(&mut self, to: MemberName) {
        if self.leads() && self.draining.is_none() {
            let (sender, drained) = oneshot::channel();
            self.node.order(Order::Drain(to.clone(), sender));
            self.draining = Some(Draining { epoch: self.kept.state.epoch, to, drained });
        }
    }

    /// An operator, or this leader itself, wants other members.
    pub fn change_members(&mut self, change: MemberChange, now: Instant) {
        let majority = self.kept.state.majority();
        let speaks =
            self.lease.as_ref().is_some_and(|(_, lease)| lease.until(majority).is_some_and(|until| now < until));
        if !self.leads() || !speaks || self.changing.is_some() {
            return;
        }
        self.changing = Changing::begin(change, &self.kept.state, now).ok();
    }

    /// The controller hears a member that has lost its disk.
    pub fn take_back(&mut self, name: &MemberName, id: MemberId, wishes: &mut Vec<Wish>) {
        if self.controls && self.is_member() && !self.taking_back {
            self.taking_back = true;
            wishes.push(Wish::Propose(Purpose::TakeBack, Change { state: self.kept.state.with_new_life(name, id) }));
        }
    }

    /// The register moved, as far as this member hears.
    pub fn learn(&mut self, state: &ClusterState) {
        if state.version > self.kept.state.version {
            self.kept.state = state.clone();
        }
    }

    /// One turn of its loop.
    pub fn turn(&mut self, now: Instant, wishes: &mut Vec<Wish>) {
        while let Some(report) = self.node.next_report() {
            match report {
                Report::InSync(epoch, members) => self.wanted_in_sync = Some((epoch, members)),
                Report::Unfit(epoch) => {
                    self.drop_lease();
                    self.ask_controller(Ask::Aside(epoch, Aside::Unfit), wishes);
                }
                Report::Command(..) => {}
            }
        }
        self.tell_node(now);
        self.beat(now, wishes);
        self.replace_leader(now, wishes);
        self.keep_in_sync(now, wishes);
        self.drain(wishes);
        self.turn_change(now, wishes);
    }

    fn drain(&mut self, wishes: &mut Vec<Wish>) {
        let Some(draining) = &mut self.draining else { return };
        match draining.drained.try_recv() {
            Err(oneshot::error::TryRecvError::Empty) => return,
            Ok(Ok(())) => {
                let (epoch, aside) = (draining.epoch, Aside::For(draining.to.clone()));
                self.ask_controller(Ask::Aside(epoch, aside), wishes);
            }
            Ok(Err(_)) | Err(oneshot::error::TryRecvError::Closed) => {}
        }
        self.draining = None;
    }

    fn turn_change(&mut self, now: Instant, wishes: &mut Vec<Wish>) {
        while let Some(changing) = &mut self.changing {
            if let Some(proving) = &mut self.proving {
                let outcome = match proving.try_recv() {
                    Err(oneshot::error::TryRecvError::Empty) => return,
                    Err(oneshot::error::TryRecvError::Closed) => Err("it stopped leading".to_owned()),
                    Ok(outcome) => outcome,
                };
                self.proving = None;
                changing.handle_proved(outcome, now);
            }
            match changing.poll(&self.kept.state, now) {
                Next::Wait(_) => return,
                Next::Prove(terms) => {
                    let (sender, proved) = oneshot::channel();
                    self.node.order(Order::Joint(terms, sender));
                    self.proving = Some(proved);
                }
                Next::Propose(change) => wishes.push(Wish::Propose(Purpose::Members, change)),
                Next::Told(_) => {}
                Next::Settle(version) => {
                    self.node.order(Order::Settled(version));
                    self.changing = None;
                }
                Next::Over => self.changing = None,
            }
        }
    }

    /// The simulator knows who controls and sends it there.
    fn ask_controller(&self, ask: Ask, wishes: &mut Vec<Wish>) {
        for member in self.kept.state.members.keys() {
            wishes.push(Wish::Ask { to: node_of(member), ask: ask.clone(), asked: Asked::Aside });
        }
    }

    fn tell_node(&mut self, now: Instant) {
        let state = self.kept.state.clone();
        if state.version != self.told_version {
            self.told_version = state.version;
            if let Some((_, lease)) = &mut self.lease {
                lease.keep(|name| state.members.contains_key(name));
                self.node.set_lease(lease.until(state.majority()));
                self.beat_at = now;
            }
            self.node.order(Order::State(Box::new(state.clone())));
        }
        let part = if self.is_member() {
            state.part_of(&self.name, self.lived_through)
        } else {
            Part::Wait("it is no member".to_owned())
        };
        if self.told.as_ref() == Some(&part) {
            return;
        }
        if let Part::Lead(epoch) | Part::Follow(epoch) = part {
            self.voter.handle_beat(epoch, now);
        }
        match &part {
            Part::Lead(epoch) => {
                self.lease = Some((*epoch, Lease::new(self.election_timeout)));
                self.beat_at = now;
                self.node.order(Order::Lead(*epoch));
            }
            Part::Follow(epoch) => {
                self.drop_lease();
                if let Some(peer) = state.leader_peer() {
                    self.node.order(Order::Follow { peer: peer.to_owned(), epoch: *epoch });
                }
            }
            Part::Wait(text) => {
                self.drop_lease();
                self.node.order(Order::Leaderless(text.clone()));
            }
        }
        self.told = Some(part);
    }

    fn drop_lease(&mut self) {
        self.lease = None;
        self.node.set_lease(None);
    }

    fn beat(&mut self, now: Instant, wishes: &mut Vec<Wish>) {
        let Some((epoch, _)) = &self.lease else { return };
        if now < self.beat_at {
            return;
        }
        self.beat_at = now + self.heartbeat_interval;
        let (epoch, leader) = (*epoch, self.name.clone());
        let beat = Beat { epoch, leader, client_address: format!("{}:6400", self.name), end: self.node.log_end() };
        for member in self.kept.state.members.keys() {
            let asked = Asked::Beat { member: member.clone(), sent_at: now, epoch };
            wishes.push(Wish::Ask { to: node_of(member), ask: Ask::Beat(beat.clone()), asked });
        }
    }

    fn replace_leader(&mut self, now: Instant, wishes: &mut Vec<Wish>) {
        if self.kept.state.version == 0 {
            return;
        }
        let controls = self.controls && self.is_member();
        let (grant_left, promised) = (self.voter.grant_left(now), self.voter.promised());
        let state = self.kept.state.clone();
        let outlook = Outlook { state: &state, controls, grant_left, promised, now };
        for effect in self.failover.poll(&outlook) {
            match effect {
                Effect::Canvass => {
                    for member in state.members.keys() {
                        let asked = Asked::Canvass(member.clone());
                        wishes.push(Wish::Ask { to: node_of(member), ask: Ask::Canvass, asked });
                    }
                }
                Effect::Seal(epoch) => {
                    for member in state.members.keys() {
                        if self.sealing.get(member) == Some(&epoch) {
                            continue;
                        }
                        self.sealing.insert(member.clone(), epoch);
                        let asked = Asked::Seal(member.clone());
                        wishes.push(Wish::Ask { to: node_of(member), ask: Ask::Seal(epoch), asked });
                    }
                }
                Effect::Propose(change) => wishes.push(Wish::Propose(Purpose::Failover, change)),
            }
        }
    }

    fn keep_in_sync(&mut self, now: Instant, wishes: &mut Vec<Wish>) {
        let state = &self.kept.state;
        let leads = state.leader.as_ref() == Some(&self.name);
        let Some((epoch, wanted)) = self.wanted_in_sync.clone().filter(|_| leads) else { return };
        if epoch != state.epoch {
            return;
        }
        let joins = |name: &&MemberName| state.members.get(*name).is_some_and(|seat| seat.holding == Holding::Joining);
        if let Some(name) = wanted.iter().find(joins).cloned() {
            let id = state.members[&name].id;
            self.change_members(MemberChange::Whole { name, id }, now);
        }
        if self.in_sync_changing {
            return;
        }
        let state = &self.kept.state;
        let Some(next) = state.with_in_sync(&wanted) else { return };
        self.in_sync_changing = true;
        wishes.push(Wish::Propose(Purpose::InSync, Change { state: next }));
    }

    /// A proposal came back.
    pub fn proposed(&mut self, purpose: Purpose, answer: Result<(), String>, now: Instant) {
        match purpose {
            Purpose::Failover => self.failover.handle_proposed(),
            Purpose::TakeBack => self.taking_back = false,
            Purpose::InSync => self.in_sync_changing = false,
            Purpose::Members => {
                if let Some(changing) = &mut self.changing {
                    changing.handle_answer(answer, now);
                }
            }
        }
    }

    /// A question from another member, or from this one. `None`: the answer comes with `take_answers`.
    pub fn answer(&mut self, request: u64, from: NodeNo, ask: Ask, now: Instant) -> Option<Answer> {
        if !self.is_member() {
            return Some(Answer::Refused("not a member yet".to_owned()));
        }
        Some(match ask {
            Ask::Beat(beat) => {
                let granted = beat.epoch >= self.kept.state.epoch && self.voter.handle_beat(beat.epoch, now);
                if granted {
                    self.node.order(Order::LeaderAddress(beat.client_address));
                }
                Answer::Beat { granted, promised: self.voter.promised() }
            }
            Ask::Canvass => {
                let silent = self.kept.state.leader.is_none() || self.voter.grant_left(now).is_zero();
                Answer::Canvass { silent, standstill: String::new() }
            }
            Ask::Seal(epoch) => {
                if epoch <= self.kept.state.epoch {
                    return Some(Answer::Refused("over".to_owned()));
                }
                if !mutants::is_on("forget-the-seal") {
                    self.kept.promised = self.kept.promised.max(epoch);
                }
                self.voter.promise(epoch);
                self.node.set_lease(None);
                let (sender, reach) = oneshot::channel();
                self.node.order(Order::Seal(epoch, sender));
                self.answering.push(Sealing { request, from, reach });
                return None;
            }
            Ask::Aside(epoch, aside) => {
                if self.controls {
                    self.failover.handle_aside(&self.kept.state, epoch, aside);
                }
                Answer::Done
            }
            _ => Answer::Refused("not simulated".to_owned()),
        })
    }

    /// Answers that had to wait for the node.
    pub fn take_answers(&mut self, now: Instant) -> Vec<(u64, NodeNo, Answer)> {
        let mut answers = Vec::new();
        let (grant_left, promised, id) = (self.voter.grant_left(now), self.voter.promised(), self.kept.id);
        self.answering.retain_mut(|sealing| {
            let answer = match sealing.reach.try_recv() {
                Ok(Reach { last_epoch, flushed }) => {
                    let grant_left_us = grant_left.as_micros() as u64;
                    Answer::Sealed { id, promised, last_epoch, flushed, grant_left_us }
                }
                Err(oneshot::error::TryRecvError::Empty) => return true,
                Err(oneshot::error::TryRecvError::Closed) => Answer::Refused("stopped".to_owned()),
            };
            answers.push((sealing.request, sealing.from, answer));
            false
        });
        answers
    }

    /// An answer came, or none in time.
    pub fn handle_answer(&mut self, asked: Asked, answer: Option<Answer>, now: Instant, wishes: &mut Vec<Wish>) {
        match (asked, answer) {
            (Asked::Beat { member, sent_at, epoch }, Some(Answer::Beat { granted, promised })) => {
                self.handle_beat_answer(&member, sent_at, epoch, granted, promised, wishes);
            }
            (Asked::Canvass(member), Some(Answer::Canvass { silent, .. })) => {
                self.failover.handle_canvass(&member, silent);
            }
            (Asked::Seal(member), answer) => {
                self.sealing.remove(&member);
                if let Some(Answer::Sealed { id, promised, last_epoch, flushed, grant_left_us }) = answer {
                    let granted_until = now + Duration::from_micros(grant_left_us);
                    let sealed = Sealed { id, promised, last_epoch, flushed, granted_until };
                    self.failover.handle_sealed(&self.kept.state, &member, sealed);
                }
            }
            _ => {}
        }
    }

    fn handle_beat_answer(
        &mut self,
        member: &MemberName,
        sent_at: Instant,
        epoch: Epoch,
        granted: bool,
        promised: Epoch,
        wishes: &mut Vec<Wish>,
    ) {
        let own_promise = self.voter.promised();
        let Some((_, lease)) = self.lease.as_mut().filter(|(leading, _)| *leading == epoch) else { return };
        if own_promise > epoch || !self.kept.state.members.contains_key(member) {
            return;
        }
        if granted {
            lease.handle_grant(member, sent_at);
            let until = lease.until(self.kept.state.majority());
            self.node.set_lease(until);
        } else if promised > epoch {
            self.ask_controller(Ask::Aside(epoch, Aside::For(self.name.clone())), wishes);
        }
    }
}
