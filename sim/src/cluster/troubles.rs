//! What goes wrong, when its time has come.

use super::{CRASH_LOOK_US_MAX, CRASH_LOOKS, Checked, Cluster, Event, Variation};
use crate::control::{name_of, node_of};
use crate::faults::Fault;
use crate::kernel::Disk;
use crate::world::NodeNo;

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
            Fault::Isolate => {
                for other in (0..self.nodes.len()).filter(|other| *other != node) {
                    self.network.borrow_mut().cut(node, other);
                    self.network.borrow_mut().cut(other, node);
                }
                self.after(long, Event::Heal);
            }
            Fault::OneWay => {
                self.network.borrow_mut().cut(node, other);
                self.after(long, Event::Heal);
            }
            Fault::Split => {
                self.network.borrow_mut().cut(node, other);
                self.network.borrow_mut().cut(other, node);
                self.after(long, Event::Heal);
            }
            Fault::Reset => self.network.borrow_mut().reset(node, other),
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
