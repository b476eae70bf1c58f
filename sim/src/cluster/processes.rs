//! The nodes' processes: they start, turn, do background work, die, and are started again; and what must become of damage on their
//! disks.

use walferry_cluster::register::MemberId;
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_engine::world::simulated::TaskNo;
use walferry_engine::world::{self, Pace};
use walferry_node::config::{NodeConfig, PeerAuth};
use walferry_node::simulated::Member;

use super::{
    Broken, Checked, Cluster, Event, IDLE_TURNS_MAX, NETWORK_LOOK_US, Process, RESTART_US, SCRUB_US_MAX, SEGMENT_BYTES,
    TURN_US_MAX, WAKE_US_MIN,
};
use crate::control::{Control, Kept, name_of};
use crate::kernel::{DiskOpNo, Kernel};
use crate::network::{peer_address, socket_address};
use crate::rot::{self, Rot};
use crate::world::NodeNo;

impl Cluster {
    fn config(&self, node: NodeNo) -> NodeConfig {
        let members: Vec<String> =
            (0..self.nodes.len()).map(|node| format!("{}={}", name_of(node), peer_address(node))).collect();
        let text = format!(
            "data = {:?}\nname = \"{}\"\nmembers = \"{}\"\nsync_method = \"{}\"\nwrite_depth = {}\nwaterfall = false\n\
             peer_timeout = \"2s\"\nreplica_lag_time_max = \"{}ms\"\nlog_buffer_bytes = \"32MiB\"\nsegment_bytes = \"16MiB\"\n\
             on_sync_loss = \"{}\"\n",
            self.nodes[node].dir,
            name_of(node),
            members.join(","),
            self.plan.sync_method,
            self.plan.write_depth,
            self.plan.replica_lag_ms,
            self.plan.on_sync_loss,
        );
        let mut config = Member::configure(&text).expect("a configuration of the simulator's");
        config.segment_bytes = SEGMENT_BYTES;
        config.segment_bytes_given = None;
        config.log_buffer_bytes = 2 << 20;
        config.checkpoint_bytes = self.plan.checkpoint_bytes;
        config.store_cache_bytes = 1 << 20;
        config.zero_copy_bytes_min = self.plan.zero_copy_bytes_min;
        config.keep_bytes_min = self.plan.keep_bytes_min;
        config.slot_keep_bytes_max = self.plan.slot_keep_bytes_max;
        config.snapshot_rate = self.plan.snapshot_rate;
        config.min_in_sync = self.plan.min_in_sync;
        // The simulated network carries no other traffic, and it names the sender.
        config.peer_auth = PeerAuth::None;
        config
    }

    pub(super) fn start(&mut self, node: NodeNo) -> Checked {
        if self.nodes[node].control().is_some() {
            return Ok(());
        }
        self.world.be(node);
        if self.plan.is_witness(node) {
            self.start_witness(node);
            return Ok(());
        }
        let config = self.config(node);
        let kept = (self.nodes[node].kept.id, self.nodes[node].kept.promised);
        self.gather_frame_servers();
        let opened = Member::open(config, socket_address(node, 6400), kept);
        let (member, queues, end) = match opened {
            Ok(opened) => opened,
            Err(error) => return self.does_not_start(node, &error.to_string()),
        };
        let known = &mut self.nodes[node];
        known.started_us = self.now_us;
        known.incarnation += 1;
        let incarnation = known.incarnation;
        let whole = member.flushed() >= member.history().fork_with(&known.history, known.durable);
        if member.flushed() < known.durable && !(whole && member.history() != &known.history) {
            return Err(Broken(format!(
                "{} had its log durable up to {} (epoch {}) and recovered up to {}",
                name_of(node),
                known.durable,
                known.epoch,
                member.flushed()
            )));
        }
        known.durable = member.flushed();
        (known.checkpoint, known.copies, known.committed) = (member.store().durable_applied(), 0, Lsn::ZERO);
        let kept = known.kept.clone();
        let control = Control::new(node, kept, end, member.epoch(), &self.setting, world::now());
        let kernel = Kernel::new(queues, known.disk, self.rng.u64(..));
        known.process = Some(Process { member, kernel, control });
        self.world.take_failed(node);
        self.network.borrow_mut().set_up(node, true);
        self.tell_register();
        self.schedule_turn(node, self.now_us);
        self.after(1, Event::Control(node, incarnation));
        self.node_is_sound(node)
    }

    /// A witness has nothing on its disk but what its register keeps.
    fn start_witness(&mut self, node: NodeNo) {
        let known = &mut self.nodes[node];
        known.incarnation += 1;
        known.witness = Some(Control::witness(node, known.kept.clone(), &self.setting, world::now()));
        let incarnation = known.incarnation;
        self.tell_register();
        self.after(1, Event::Control(node, incarnation));
    }

    /// Kills a node and flips a bit of what its log says was durable.
    pub(super) fn rot(&mut self, node: NodeNo) {
        let end = self.nodes[node].process.as_ref().map(|process| process.member.flushed());
        self.forget_healed();
        let history = self.nodes[node].process.as_ref().map(|process| process.member.history().clone());
        let start = self.nodes[node].process.as_ref().map(|process| process.member.log_start());
        self.kill(node);
        let (Some(start), Some(end), Some(history)) = (start, end, history) else { return };
        // One node at a time: what two have lost nobody may have.
        if self.disks_are_well() && self.all_are_complete() {
            self.nodes[node].was_damaged = true;
            self.nodes[node].rotten = Rot::begin(&self.nodes[node].dir, (start, end), history, &mut self.rng);
        }
    }

    /// Kills a node and takes everything that it had: who starts there next is another.
    pub(super) fn lose_disk(&mut self, node: NodeNo) {
        self.kill(node);
        let id = MemberId(self.rng.u64(1..));
        let epoch = self.register.epoch;
        let lost = &mut self.nodes[node];
        lost.lost_in = Some(epoch);
        if !self.plan.is_witness(node) {
            std::fs::remove_dir_all(&lost.dir).expect("the simulator's own disk");
        }
        lost.lost = Some((lost.kept.id, std::mem::take(&mut lost.history), lost.durable));
        lost.kept = Kept::new(id, Epoch(0), None);
        (lost.durable, lost.seen_durable, lost.log_start) = (Lsn::ZERO, Lsn::ZERO, Lsn::ZERO);
        (lost.epoch, lost.rotten) = (Epoch(0), None);
    }

    /// Kills a node, whose disk misreads when it starts again.
    pub(super) fn misread(&mut self, node: NodeNo, long: u64) {
        self.forget_healed();
        self.kill(node);
        if self.nodes.iter().all(|node| node.rotten.is_none()) {
            let until = rot::known_durable(&self.nodes[node].dir);
            self.nodes[node].was_damaged = true;
            self.world.set_misreading(Some((node, until)));
            self.after(2 * long, Event::ReadWell);
        }
    }

    pub(super) fn forget_healed(&mut self) {
        for node in &mut self.nodes {
            let member = node.process.as_ref().map(|process| &process.member);
            node.rotten.take_if(|rot| member.is_some_and(|member| rot.is_over(member)));
        }
    }

    /// No disk has lost anything that is not found yet, and none brings wrong sectors.
    pub(super) fn disks_are_well(&self) -> bool {
        let well = |node: NodeNo| self.nodes[node].rotten.is_none() && !self.world.is_misreading(node);
        (0..self.nodes.len()).all(well)
    }

    /// Who would answer now if it was asked for its log.
    fn gather_frame_servers(&mut self) {
        let log = |node: &NodeNo| Some((*node, self.nodes[*node].process.as_ref()?.member.log()));
        let frame_servers = (0..self.nodes.len()).filter(|node| !self.is_paused(*node)).filter_map(|node| log(&node));
        self.world.set_frame_servers(frame_servers.collect());
    }

    /// Only a node whose log is damaged may fail to start, only with the damage's place, and only where nobody gave it back.
    fn does_not_start(&mut self, node: NodeNo, error: &str) -> Checked {
        self.world.drop_jobs(node);
        let name = name_of(node);
        self.trace.note(self.now_us, &format!("{name} does not start: {error}"));
        let is_damage = error.contains("damage");
        if self.world.went_down() == Some(node) {
            // Halfway through its start; what comes of it is seen to below.
            return Ok(());
        }
        if self.world.is_misreading(node) && is_damage || self.world.take_failed(node) {
            self.after(RESTART_US, Event::Start(node));
            return Ok(());
        }
        let Some(rot) = &self.nodes[node].rotten else {
            return Err(Broken(format!("{name} does not start: {error}")));
        };
        if !is_damage || !error.contains(&rot.path().display().to_string()) {
            return Err(Broken(format!("{name} hides that {} is damaged: {error}", rot.path().display())));
        }
        let others = self.plan.data_nodes().filter(|other| *other != node);
        let answers = |other: &NodeNo| {
            let network = self.network.borrow();
            self.is_up(*other) && network.passes(node, *other) && network.passes(*other, node)
        };
        let able: Vec<NodeNo> = others.clone().filter(answers).collect();
        if let Some(holder) = able.iter().find(|other| rot.is_held_by(self.member(**other))) {
            return Err(Broken(format!("{name} was not given back what {} holds: {error}", name_of(*holder))));
        }
        if able.len() == others.count() {
            // All were asked, and nobody has it: now the operator does something.
            rot.mend();
            self.nodes[node].rotten = None;
        }
        self.after(RESTART_US, Event::Start(node));
        Ok(())
    }

    /// A node that reads wrong sectors, or whose log rots, may end with that. Its service manager starts it again.
    fn ended(&mut self, node: NodeNo, error: &str) -> Checked {
        if self.world.went_down() == Some(node) {
            return Ok(());
        }
        let disturbed = self.world.is_misreading(node) || self.nodes[node].rotten.is_some();
        let stopped = self.nodes[node].process.as_ref().is_some_and(|process| process.member.stepped_down().is_some());
        if !(stopped || disturbed && error.contains("damage") || self.world.take_failed(node)) {
            return Err(Broken(format!("{} ended: {error}", name_of(node))));
        }
        self.kill(node);
        self.after(RESTART_US, Event::Start(node));
        Ok(())
    }

    /// Whether damage is left, now that everything else is well. A node looks through its old log after a start: one that could
    /// not be given its log then is started again.
    pub(super) fn is_healed(&mut self, node: NodeNo) -> bool {
        let Some(rot) = &self.nodes[node].rotten else { return true };
        if self.nodes[node].process.is_none() {
            return false;
        }
        if rot.is_over(self.member(node)) {
            return true;
        }
        if self.now_us > self.nodes[node].started_us + SCRUB_US_MAX {
            let held = self.plan.data_nodes().any(|other| other != node && rot.is_held_by(self.member(other)));
            if !held {
                // What nobody has any more only the operator can bring back.
                rot.mend();
            } else {
                self.kill(node);
                self.after(RESTART_US, Event::Start(node));
            }
        }
        false
    }

    /// `kill -9`, and what the disk makes of it.
    pub(super) fn kill(&mut self, node: NodeNo) {
        if let Some(witness) = self.nodes[node].witness.take() {
            self.restarts += 1;
            self.nodes[node].kept = witness.kept;
        }
        let Some(mut process) = self.nodes[node].process.take() else { return };
        self.world.be(node);
        self.restarts += 1;
        self.snapshots += process.member.snapshots();
        self.nodes[node].durable = process.member.flushed();
        self.nodes[node].epoch = process.member.epoch();
        self.nodes[node].kept = process.control.kept.clone();
        self.nodes[node].turn_at = None;
        process.kernel.crash();
        self.world.crash_files(node, self.nodes[node].disk.sector_bytes, &mut self.rng);
        drop(process.control);
        process.member.kill();
        self.world.drop_jobs(node);
        self.world.revive();
        self.network.borrow_mut().kill(node);
        self.schedule_network();
        for client in 0..self.clients.len() {
            if let Some((at, session)) = self.clients[client].session
                && at == node
            {
                let delay = self.network.borrow_mut().delay_us();
                self.after(delay, Event::Closed(client, session));
            }
        }
    }

    /// The power of a node went in the middle of what it did.
    pub(super) fn go_down_halfway(&mut self, node: NodeNo) {
        self.trace.note(self.now_us, &format!("{} goes down halfway", name_of(node)));
        if self.nodes[node].process.is_some() {
            self.kill(node);
        } else {
            self.world.crash_files(node, self.nodes[node].disk.sector_bytes, &mut self.rng);
            self.world.drop_jobs(node);
            self.world.revive();
        }
        let down_us = self.rng.u64(RESTART_US..3 * RESTART_US);
        self.after(down_us, Event::Start(node));
    }

    /// It was stopped, or its machine suspended, and goes on.
    pub(super) fn resume(&mut self, node: NodeNo, suspended_us: u64) {
        if !self.calm {
            self.world.resume(node, suspended_us);
        }
        self.schedule_turn(node, self.now_us);
    }

    pub(super) fn schedule_turn(&mut self, node: NodeNo, at_us: u64) {
        let known = &mut self.nodes[node];
        let at_us = at_us.max(known.paused_until);
        if known.process.is_some() && known.turn_at.is_none_or(|at| at > at_us) {
            known.turn_at = Some(at_us);
            self.at(at_us, Event::Turn(node));
        }
    }

    pub(super) fn turn(&mut self, node: NodeNo) -> Checked {
        if self.nodes[node].turn_at != Some(self.now_us) {
            return Ok(());
        }
        self.nodes[node].turn_at = None;
        if self.is_paused(node) {
            self.schedule_turn(node, self.nodes[node].paused_until);
            return Ok(());
        }
        self.world.be(node);
        let was_damaged = self.nodes[node].was_damaged;
        let Some(process) = &mut self.nodes[node].process else { return Ok(()) };
        let had_news = process.kernel.has_news();
        let turned = match process.member.turn() {
            Ok(turned) => turned,
            Err(error) => return self.ended(node, &error.to_string()),
        };
        if process.member.repaired() > 0 && !was_damaged {
            return Err(Broken(format!("{} had called durable what its disk does not have", name_of(node))));
        }
        let epoch = process.member.epoch();
        let durable = process.member.flushed();
        let (checkpoint, copies) = (process.member.store().durable_applied(), process.member.snapshots());
        let went_beyond = process.member.store().went_beyond();
        let committed = process.member.committed();
        let timeout = process.member.timeout();
        let idle = !had_news && turned.replied.is_empty() && timeout.is_some_and(|timeout| timeout.is_zero());
        let known = &mut self.nodes[node];
        known.idle_turns = if idle { known.idle_turns + 1 } else { 0 };
        if known.idle_turns == IDLE_TURNS_MAX {
            let what = self.member(node).describe();
            return Err(Broken(format!("{} ({what}) turned {IDLE_TURNS_MAX} times for nothing", name_of(node))));
        }
        (known.durable, known.epoch) = (durable, epoch);
        known.committed = known.committed.max(committed);
        let copied = std::mem::replace(&mut known.copies, copies) != copies;
        let before = std::mem::replace(&mut known.checkpoint, checkpoint);
        if checkpoint > before.max(known.committed) && !copied && !went_beyond {
            return Err(Broken(format!(
                "{} has a checkpoint of {checkpoint} and knows commits up to {}",
                name_of(node),
                known.committed
            )));
        }
        self.node_is_sound(node)?;
        self.note_confirmed(node)?;
        if let Some(process) = &self.nodes[node].process
            && process.control.has_reports()
        {
            self.after(5, Event::Reports(node, self.nodes[node].incarnation));
        }
        for (session, bytes) in turned.replied {
            self.send_reply(node, session, epoch, bytes);
        }
        for session in turned.closed {
            self.session_closed(node, session);
        }
        self.after_node(node);
        let wait = timeout.map_or(TURN_US_MAX, |timeout| self.world.true_us(node, timeout).min(TURN_US_MAX));
        self.schedule_turn(node, self.now_us + wait.max(5));
        Ok(())
    }

    /// Takes what a node has just asked its kernel for.
    fn after_node(&mut self, node: NodeNo) {
        let now_us = self.now_us;
        let incarnation = self.nodes[node].incarnation;
        let Some(process) = &mut self.nodes[node].process else { return };
        let begun = process.kernel.take_submissions(now_us);
        let (news, sent) = (process.kernel.has_news(), process.kernel.take_sent());
        for (at, op) in begun {
            self.at(at, Event::Disk(node, incarnation, op));
        }
        if news {
            self.schedule_turn(node, now_us + WAKE_US_MIN);
        }
        self.schedule_network_at(now_us + if sent { 1 } else { NETWORK_LOOK_US });
    }

    pub(super) fn run_task(&mut self, node: NodeNo, task: TaskNo) {
        if self.is_paused(node) {
            return self.at(self.nodes[node].paused_until, Event::Task(node, task));
        }
        if self.world.asks(task) {
            self.gather_frame_servers();
        }
        let Some(pace) = self.world.run(task) else { return };
        match pace {
            Pace::Again => {
                let delay = self.rng.u64(10..400);
                self.after(delay, Event::Task(node, task));
            }
            Pace::Idle(time) => {
                // It may have written to a socket before.
                self.schedule_network_at(self.now_us + 1);
                let delay = self.world.true_us(node, time);
                return self.after(delay, Event::Task(node, task));
            }
            Pace::Asleep => return self.world.put_to_sleep(task),
            Pace::Over => {}
        }
        // It woke the ring, or wrote to a socket.
        self.schedule_turn(node, self.now_us + WAKE_US_MIN);
        self.schedule_network_at(self.now_us + 1);
    }

    pub(super) fn disk_done(&mut self, node: NodeNo, incarnation: u64, op: DiskOpNo) {
        if self.nodes[node].incarnation != incarnation {
            return;
        }
        let now_us = self.now_us;
        let Some(process) = &mut self.nodes[node].process else { return };
        if let Some((at, next)) = process.kernel.finish_disk_op(op, now_us) {
            self.at(at, Event::Disk(node, incarnation, next));
        }
        self.schedule_turn(node, now_us + WAKE_US_MIN);
    }
}
