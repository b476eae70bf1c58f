//! What goes wrong, when its time has come.

use walferry_cluster::agent::Command;
use walferry_engine::world;

use super::{CRASH_LOOK_US_MAX, CRASH_LOOKS, Checked, Cluster, Event, Variation};
use crate::control::{name_of, node_of};
use crate::faults::Fault;
use crate::kernel::Disk;
use crate::network::peer_address;
use crate::world::{FileFault, NodeNo};

/// A member that promised its vote dies within this.
const FENCED_US_MAX: u64 = 20_000;
/// A member that lost its disk and is back at once, or only died.
const BACK_AT_ONCE_US: std::ops::Range<u64> = 1_000..20_000;
/// A member that died before its promise is back within this, and a controller that died after the leader's.
const BYSTANDER_US: std::ops::Range<u64> = 30_000..300_000;
const CONTROLLER_AWAY_US: std::ops::Range<u64> = 4_500_000..6_000_000;

/// A leader is cut off for so long, and wants the leadership back after it.
const AWAY_US: std::ops::Range<u64> = 500_000..900_000;
const BACK_US: std::ops::Range<u64> = 50_000..400_000;

/// So much later comes what is sent over slow connections.
const SLOW_LINK_US: std::ops::Range<u64> = 30_000..600_000;

/// Who is to die in a switchover.
pub(super) struct Ambush {
    leader: NodeNo,
    controller: NodeNo,
    /// It dies first; then it is nobody any more.
    bystander: Option<NodeNo>,
}

/// The operator leaves so many.
const MEMBERS_MIN: usize = 2;

impl Cluster {
    pub(super) fn inject(&mut self) -> Checked {
        if self.calm {
            return Ok(());
        }
        let pause = self.rng.u64(self.plan.pause_us.0..self.plan.pause_us.1);
        self.after(pause, Event::Fault);
        let kind = self.plan.faults[self.rng.usize(0..self.plan.faults.len())];
        let node = self.rng.usize(0..self.nodes.len());
        // A witness has no log, and nothing that its disk does is modelled but that it is lost.
        let node = if kind.is_of_a_log() { node % self.plan.data_nodes().len() } else { node };
        let other = (node + 1 + self.rng.usize(0..self.nodes.len() - 1)) % self.nodes.len();
        let long = self.rng.u64(30_000..1_500_000);
        self.faults += 1;
        self.trace.note(self.now_us, &format!("fault: {kind:?} {} {} {long} us", name_of(node), name_of(other)));
        match kind {
            Fault::Kill => self.begin_crash(vec![node], node),
            Fault::KillAll => self.begin_crash((0..self.nodes.len()).collect(), node),
            Fault::KillLeader => {
                let leader = self.register.leader.as_ref().map_or(node, node_of);
                self.begin_crash(vec![leader], leader);
            }
            Fault::Pause => {
                self.nodes[node].paused_until = self.now_us + long;
                self.after(long, Event::Resume(node, 0));
            }
            Fault::Suspend => self.suspend(node, long),
            Fault::KillHalfway | Fault::BrokenFile => self.arm_a_file(kind, node),
            Fault::ThereAndBack => self.leave_and_return(node),
            Fault::KillController => self.lie_in_ambush(node),
            Fault::SlowLinks => self.slow_links(node, long * 2),
            Fault::KillBehindSlowLinks => self.kill_behind_slow_links(node, long),
            Fault::SwitchoverWhileSlow => self.switch_over_while_slow(node, other, long),
            Fault::Isolate => self.isolate(node, long),
            Fault::OneWay => self.cut(vec![(node, other)], long),
            Fault::Split => self.cut(vec![(node, other), (other, node)], long),
            Fault::KillFenced => self.cut_off_the_leader(node, long),
            Fault::LoseDisk => self.replace_disk(node, long)?,
            Fault::Switchover => self.command(other, Command::Switchover(Some(name_of(node)))),
            Fault::ChangeMembers => self.change_members(node),
            Fault::Reset => {
                self.network.borrow_mut().reset(node, other);
                self.schedule_network();
            }
            Fault::SlowDisk => {
                self.set_disk(node, |disk| disk.slowness = 50);
                self.after(long, Event::Mend(node));
            }
            Fault::StalledDisk => {
                let until = self.now_us + long;
                self.set_disk(node, |disk| disk.stalled_until = until);
                self.schedule_turn(node, self.now_us);
            }
            Fault::BrokenDisk => {
                self.set_disk(node, |disk| disk.broken = true);
                self.after(long, Event::Mend(node));
            }
            Fault::FullDisk => {
                self.world.set_full(node, true);
                self.after(long, Event::Mend(node));
            }
            Fault::Rot => {
                self.rot(node);
                self.after(long, Event::Start(node));
            }
            Fault::Misread => {
                self.misread(node, long);
                self.after(long, Event::Start(node));
            }
            Fault::WallClock => {
                let by = self.rng.i64(-3_600_000_000..3_600_000_000);
                self.world.jump_wall_clock(node, by);
            }
        }
        self.restart_stopped();
        Ok(())
    }

    /// The machine of this node, or of the leader, is suspended.
    fn suspend(&mut self, node: NodeNo, long: u64) {
        let leader = self.register.leader.as_ref().map(node_of).filter(|_| self.rng.bool());
        let node = leader.unwrap_or(node);
        if !self.is_paused(node) {
            self.nodes[node].paused_until = self.now_us + long;
            self.after(long, Event::Resume(node, long));
            // Its network card sleeps too.
            self.isolate(node, long);
        }
    }

    /// One of the next small files of this node, or of the leader, fails.
    fn arm_a_file(&mut self, kind: Fault, node: NodeNo) {
        let leader = self.register.leader.as_ref().map(node_of).filter(|_| self.rng.bool());
        let fault = if kind == Fault::KillHalfway { FileFault::Down } else { FileFault::Broken };
        self.world.arm(leader.unwrap_or(node), fault, &mut self.rng);
    }

    /// The leader is isolated, and the operator gives it the leadership back later.
    fn leave_and_return(&mut self, node: NodeNo) {
        let leader = self.register.leader.as_ref().map_or(node, node_of);
        let away = self.rng.u64(AWAY_US);
        self.isolate(leader, away);
        let back = self.rng.u64(BACK_US);
        self.after(away + back, Event::GiveBack(leader));
    }

    /// The leader is killed while its links are slow, and started again.
    fn kill_behind_slow_links(&mut self, node: NodeNo, long: u64) {
        let leader = self.register.leader.as_ref().map_or(node, node_of);
        self.slow_links(leader, long * 2);
        self.kill(leader);
        let back = if self.rng.bool() { self.rng.u64(BACK_AT_ONCE_US) } else { self.rng.u64(BYSTANDER_US) };
        self.after(back, Event::Start(leader));
    }

    /// The operator changes the leader while members have slow disks or links.
    fn switch_over_while_slow(&mut self, node: NodeNo, other: NodeNo, long: u64) {
        let slow = if self.rng.bool() { vec![node] } else { vec![node, other] };
        for slow in slow {
            if self.rng.bool() {
                self.slow_links(slow, long);
            } else {
                self.set_disk(slow, |disk| disk.slowness = 50);
                self.after(long, Event::Mend(slow));
            }
        }
        let when = self.rng.u64(0..long);
        self.after(when, Event::Switchover(other, node));
    }

    /// The leader is cut off, and members may die just after they promised their vote.
    fn cut_off_the_leader(&mut self, node: NodeNo, long: u64) {
        self.kills_fenced_until = self.now_us + long;
        self.let_leader_through();
        let leader = self.register.leader.as_ref().map_or(node, node_of);
        self.cut_off = self.around(leader);
        for (from, to) in &self.cut_off {
            self.network.borrow_mut().cut(*from, *to);
        }
        self.after(long, Event::LeaderBack);
    }

    /// The node loses its disk, unless that would lose confirmed commits.
    fn replace_disk(&mut self, node: NodeNo, long: u64) -> Checked {
        if self.may_lose_a_disk(node) {
            self.lose_disk(node);
            // Often before anybody has missed it.
            let back = if self.rng.bool() { self.rng.u64(BACK_AT_ONCE_US) } else { long };
            self.after(back, Event::Start(node));
            self.no_failover_misses_it()?;
        }
        Ok(())
    }

    /// Starts nodes again whose log failed: they do not start by themselves.
    fn restart_stopped(&mut self) {
        for node in 0..self.nodes.len() {
            let stopped = self.nodes[node].process.as_ref().is_some_and(|p| p.member.stepped_down().is_some());
            if stopped {
                self.kill(node);
                self.after(50_000, Event::Start(node));
            }
        }
    }

    /// Nothing gets through in these directions for a while.
    fn cut(&mut self, directions: Vec<(NodeNo, NodeNo)>, long: u64) {
        for (from, to) in &directions {
            self.network.borrow_mut().cut(*from, *to);
        }
        self.after(long, Event::Heal(directions));
    }

    /// What this node sends to its connections, or what is sent to it, or both, is held back for a while or comes much later.
    fn slow_links(&mut self, node: NodeNo, long: u64) {
        let others = (0..self.nodes.len()).filter(|other| *other != node);
        let mut directions: Vec<(NodeNo, NodeNo)> = others.flat_map(|other| [(node, other), (other, node)]).collect();
        match self.rng.u8(0..4) {
            0 => directions.retain(|(from, _)| *from == node),
            1 => directions.retain(|(_, to)| *to == node),
            _ => {}
        }
        if self.rng.bool() {
            let more_us = self.rng.u64(SLOW_LINK_US);
            directions.iter().for_each(|(from, to)| self.network.borrow_mut().slow_down(*from, *to, more_us));
            self.after(long, Event::Quicken(directions));
        } else {
            directions.iter().for_each(|(from, to)| self.network.borrow_mut().hold(*from, *to));
            self.after(long, Event::Release(directions));
        }
    }

    pub(super) fn switch_over(&mut self, at: NodeNo, to: NodeNo) {
        if !self.calm {
            self.command(at, Command::Switchover(Some(name_of(to))));
        }
    }

    /// From a node to all others and back.
    fn around(&self, node: NodeNo) -> Vec<(NodeNo, NodeNo)> {
        let others = (0..self.nodes.len()).filter(|other| *other != node);
        others.flat_map(|other| [(node, other), (other, node)]).collect()
    }

    fn isolate(&mut self, node: NodeNo, long: u64) {
        self.cut(self.around(node), long);
    }

    /// A member has promised its vote to the next leader; it may not live to use it, or be back before the next one leads, when the
    /// last one gets through again.
    pub(super) fn maybe_kill_fenced(&mut self, node: NodeNo) {
        if self.now_us >= self.kills_fenced_until || self.calm || self.rng.bool() {
            return;
        }
        let soon = self.rng.u64(0..FENCED_US_MAX);
        if self.rng.bool() {
            return self.after(soon, Event::Crash { nodes: vec![node], watched: node, looks_left: 0 });
        }
        self.after(soon, Event::Fall(node));
    }

    /// A member dies and is back at once, when the leader of before gets through again.
    pub(super) fn fall(&mut self, node: NodeNo) {
        if !self.calm {
            self.kill(node);
            let back = self.rng.u64(BACK_AT_ONCE_US);
            self.after(back, Event::Start(node));
            self.after(back, Event::LeaderBack);
        }
    }

    /// The leader of before is there again for the others.
    pub(super) fn let_leader_through(&mut self) {
        for (from, to) in std::mem::take(&mut self.cut_off) {
            self.network.borrow_mut().join(from, to);
        }
        self.schedule_network();
    }

    /// Begins a switchover in which the controller dies; where it leads, it is taken from the lead first.
    fn lie_in_ambush(&mut self, node: NodeNo) {
        let leader = self.register.leader.as_ref().map(node_of);
        let (Some(leader), Some(controller)) = (leader, self.controller) else { return };
        let members: Vec<NodeNo> = self.members().filter(|member| self.is_up(*member)).collect();
        let whole = members.len() == self.register.members.len() && members.len() > MEMBERS_MIN;
        let able = |other: &NodeNo| ![leader, controller].contains(other) && !self.plan.is_witness(*other);
        let others: Vec<NodeNo> = members.into_iter().filter(able).collect();
        if !whole || others.is_empty() {
            return;
        }
        let to = others[node % others.len()];
        self.ambush = (leader != controller).then_some(Ambush { leader, controller, bystander: Some(to) });
        self.command(leader, Command::Switchover(Some(name_of(to))));
    }

    /// The member that was to lead is not there when it is asked for its promise.
    pub(super) fn maybe_kill_bystander(&mut self, from: NodeNo, to: NodeNo) {
        let Some(ambush) = self.ambush.as_mut().filter(|ambush| ambush.controller == from) else { return };
        if ambush.bystander.take_if(|bystander| *bystander == to).is_some() {
            self.kill(to);
            let back = self.rng.u64(BYSTANDER_US);
            self.after(back, Event::Start(to));
        }
    }

    /// The leader has promised: before the controller hears of it, it is gone.
    pub(super) fn maybe_kill_controller(&mut self, node: NodeNo) {
        if let Some(ambush) = self.ambush.take_if(|ambush| ambush.leader == node && ambush.bystander.is_none()) {
            self.after(1, Event::Ambush(ambush.controller));
        }
    }

    /// A member is to lead again.
    pub(super) fn give_back(&mut self, node: NodeNo) {
        if !self.calm {
            self.command(node, Command::Switchover(Some(name_of(node))));
        }
    }

    pub(super) fn kill_for_long(&mut self, node: NodeNo) {
        if !self.calm {
            self.kill(node);
            let back = self.rng.u64(CONTROLLER_AWAY_US);
            self.after(back, Event::Start(node));
        }
    }

    /// No more disks are lost than the policy stands, and those that stay are a majority. Before the first leader members may have
    /// brought logs of their own, and whether one of them is missed only the operator knows.
    fn may_lose_a_disk(&self, node: NodeNo) -> bool {
        // A change that leaves nobody in sync may be under way; then what the leader has is all there is.
        let leads = self.register.leader.as_ref() == Some(&name_of(node));
        let few = self.register.in_sync.len() + 1 < self.register.data_members().count();
        let alone = self.plan.policy == "ALL" && (self.register.in_sync.is_empty() || leads && few);
        let all_are_there = self.members().count() == self.register.members.len();
        let majority = self.register.members.len() > self.register.majority();
        let led = self.register.leader.is_some();
        let well = self.all_are_complete() && self.disks_are_well();
        // A member that came back has no vote about the register at first.
        let votes = |other: &NodeNo| *other != node && self.engine.voters.contains(&self.incarnation(*other));
        let voting = (0..self.nodes.len()).filter(votes).count();
        let voted = !self.engine.joint && voting * 2 > self.engine.voters.len();
        self.is_member(node) && led && all_are_there && majority && voted && well && !alone
    }

    /// An operator's command to one of the nodes, if it is there.
    fn command(&mut self, node: NodeNo, command: Command) {
        if self.is_up(node) {
            self.move_control(node, |control| control.command(command, world::now()));
        }
    }

    /// The operator does without a member, or takes a node in.
    fn change_members(&mut self, node: NodeNo) {
        let name = name_of(node);
        let others_confirm = self.register.data_members().count() > MEMBERS_MIN;
        let command = if !self.is_member(node) {
            Command::Join(name, Some(peer_address(node)))
        } else if self.register.members.len() > MEMBERS_MIN && (self.plan.is_witness(node) || others_confirm) {
            Command::Remove(name)
        } else {
            return;
        };
        let members: Vec<NodeNo> = self.members().filter(|member| self.is_up(*member)).collect();
        if !members.is_empty() {
            let at = members[self.rng.usize(0..members.len())];
            self.command(at, command);
        }
    }

    /// Half of all crashes come while a write is under way, however short a time that is.
    fn begin_crash(&mut self, nodes: Vec<NodeNo>, watched: NodeNo) {
        let looks_left = if self.rng.bool() { CRASH_LOOKS } else { 0 };
        self.crash(nodes, watched, looks_left);
    }

    pub(super) fn crash(&mut self, nodes: Vec<NodeNo>, watched: NodeNo, looks_left: u32) {
        if self.calm {
            return;
        }
        let ready = self.nodes[watched].process.as_ref().is_none_or(|process| process.kernel.can_tear());
        if looks_left > 0 && !ready {
            let pause = self.rng.u64(20..CRASH_LOOK_US_MAX);
            return self.after(pause, Event::Crash { nodes, watched, looks_left: looks_left - 1 });
        }
        let down_us = if nodes.len() > 1 { 20_000..2_000_000 } else { 30_000..1_500_000 };
        for node in nodes {
            self.kill(node);
            let when = self.rng.u64(down_us.clone());
            self.after(when, Event::Start(node));
        }
    }

    /// One replica is slow or dead from now on.
    pub(super) fn disturb_a_replica(&mut self) {
        let leader = self.register.leader.as_ref().map(node_of);
        let replica = (0..self.nodes.len()).find(|node| Some(*node) != leader).expect("there are replicas");
        match self.variation {
            Variation::SlowReplica => self.set_disk(replica, |disk| disk.slowness = 50),
            Variation::DeadReplica => self.kill(replica),
            Variation::Faults | Variation::Calm => {}
        }
    }

    fn set_disk(&mut self, node: NodeNo, change: impl FnOnce(&mut Disk)) {
        change(&mut self.nodes[node].disk);
        let disk = self.nodes[node].disk;
        if let Some(process) = &mut self.nodes[node].process {
            process.kernel.disk = disk;
        }
        self.nodes[node].disk.broken = false;
    }
}
