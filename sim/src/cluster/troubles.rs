//! What goes wrong, when its time has come.

use walferry_cluster::agent::Command;
use walferry_engine::world;

use super::{CRASH_LOOK_US_MAX, CRASH_LOOKS, Checked, Cluster, Event, Variation};
use crate::control::{name_of, node_of};
use crate::faults::Fault;
use crate::kernel::Disk;
use crate::network::peer_address;
use crate::world::NodeNo;

/// A member that promised its voice dies within this.
const SEALED_US_MAX: u64 = 20_000;
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
                self.after(long, Event::Resume(node));
            }
            Fault::Isolate => self.isolate(node, long),
            Fault::OneWay => self.cut(vec![(node, other)], long),
            Fault::Split => self.cut(vec![(node, other), (other, node)], long),
            Fault::KillSealed => {
                self.kills_sealed_until = self.now_us + long;
                self.isolate(self.register.leader.as_ref().map_or(node, node_of), long);
            }
            Fault::LoseDisk => {
                if self.may_lose_a_disk(node) {
                    self.lose_disk(node);
                    self.after(long, Event::Start(node));
                }
            }
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
        // A node whose log failed stays as it is until it is started again.
        for node in 0..self.nodes.len() {
            let stopped = self.nodes[node].process.as_ref().is_some_and(|p| p.member.stepped_down().is_some());
            if stopped {
                self.kill(node);
                self.after(50_000, Event::Start(node));
            }
        }
        Ok(())
    }

    /// Nothing gets through in these directions for a while.
    fn cut(&mut self, directions: Vec<(NodeNo, NodeNo)>, long: u64) {
        for (from, to) in &directions {
            self.network.borrow_mut().cut(*from, *to);
        }
        self.after(long, Event::Heal(directions));
    }

    fn isolate(&mut self, node: NodeNo, long: u64) {
        let others = (0..self.nodes.len()).filter(|other| *other != node);
        self.cut(others.flat_map(|other| [(node, other), (other, node)]).collect(), long);
    }

    /// A member has promised its voice to the next leader; it may not live to use it.
    pub(super) fn maybe_kill_sealed(&mut self, node: NodeNo) {
        if self.now_us < self.kills_sealed_until && !self.calm && self.rng.bool() {
            let soon = self.rng.u64(0..SEALED_US_MAX);
            self.after(soon, Event::Crash { nodes: vec![node], watched: node, looks_left: 0 });
        }
    }

    /// No more disks are lost than the policy stands, and those that stay are a majority. Before the first leader members may have
    /// brought logs of their own, and whether one of them is missed only the operator knows.
    fn may_lose_a_disk(&self, node: NodeNo) -> bool {
        let alone = self.plan.policy == "ALL" && self.register.in_sync.is_empty();
        let all_are_there = self.members().count() == self.register.members.len();
        let majority = self.register.members.len() > self.register.majority();
        let led = self.register.leader.is_some();
        let well = self.all_are_whole() && self.disks_are_well();
        self.is_member(node) && led && all_are_there && majority && well && !alone
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
        let command = if !self.is_member(node) {
            Command::Join(name, Some(peer_address(node)))
        } else if self.register.members.len() > MEMBERS_MIN {
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
    pub(super) fn trouble_a_replica(&mut self) {
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
