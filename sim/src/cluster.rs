//! One run: nodes, clients, network, disks and clocks in one thread, from one seed. Events happen in the order of their time;
//! whatever happens next is decided by the seed alone.

mod ending;
mod event;
mod held;
mod injection;
mod liveness;
mod machine;
mod outcome;
mod processes;
mod register;
mod sessions;
mod start;
mod states;
mod wires;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use walferry_cluster::agent::AskId;
use walferry_cluster::register::{ClusterState, MemberId};
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_engine::world::simulated::enter;

use crate::clients::{Client, Told};
use crate::control::Setting;
use crate::events::Events;
use crate::faults::Plan;
use crate::limits::{Broken, SEGMENT_BYTES};
use crate::model::Model;
use crate::network::Network;
use crate::trace::Trace;
use crate::world::{NodeNo, SimWorld};

use event::{Body, Event};
use machine::{Node, Process};
use outcome::Checked;

pub use outcome::{Summary, Variation};

const SECOND_US: u64 = 1_000_000;
/// After the last fault the cluster serves again within this, and all are equal.
pub const RECOVERY_US_MAX: u64 = 20 * SECOND_US;
const CONTROL_INTERVAL_US: u64 = 10_000;
const TURN_US_MAX: u64 = 100_000;
/// Turns in a row that a node may request at once although nothing has happened. A node that requests more is spinning.
const IDLE_TURNS_MAX: u32 = 1_000;
/// The register's own election: a controller that a majority does not hear is replaced after so long.
const CONTROLLER_TIME_US: u64 = 250_000;
/// A thread that is woken runs after this time and sees what arrived meanwhile. Background work starts within `WAKE_US_MAX`, a checkpoint
/// within the time of the plan.
const WAKE_US_MIN: u64 = 10;
const WAKE_US_MAX: u64 = 1_000;
/// Sockets that a node closed, or wrote to without its ring, are looked at within this.
const NETWORK_LOOK_US: u64 = 400;
/// All members have to be healthy for this long after the last fault.
const WELL_US: u64 = SECOND_US;
const CHANGE_TIME_US: u64 = 1_000_000;
/// A crash that waits for a write in flight checks this often, at most this far apart.
const CRASH_LOOKS: u32 = 200;
const CRASH_LOOK_US_MAX: u64 = 400;
/// A node that ended or did not start is started again after so long.
const RESTART_US: u64 = 200_000;
/// A scrub of the log takes no longer.
const SCRUB_US_MAX: u64 = 2 * SECOND_US;
const ELECTION_TIMEOUT: Duration = Duration::from_millis(400);
const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(100);

/// A run.
pub struct Cluster {
    world: Rc<SimWorld>,
    network: Rc<RefCell<Network>>,
    events: Events<Event>,
    last_event: u64,
    now_us: u64,
    nodes: Vec<Node>,
    clients: Vec<Client>,
    told: Told,
    /// What members are started with.
    setting: Setting,
    /// The register, as a majority holds it, and who votes about it.
    register: ClusterState,
    engine: register::Engine,
    controller: Option<NodeNo>,
    controller_lost_us: Option<u64>,
    asks: BTreeMap<u64, (NodeNo, u64, MemberId, AskId)>,
    last_ask: u64,
    last_session: u64,
    network_at: Option<u64>,
    /// Who was chosen to lead in which epoch.
    leaders: Vec<(Epoch, NodeNo)>,
    /// Up to where leaders held commits to be confirmed, by the epoch that wrote them.
    confirmed: BTreeMap<Epoch, Lsn>,
    /// Who acknowledged in which epoch.
    spoke: BTreeMap<Epoch, NodeNo>,
    plan: Plan,
    rng: fastrand::Rng,
    variation: Variation,
    /// Faults are over.
    calm: bool,
    faults: u64,
    restarts: u64,
    /// Snapshots that took a log's place, of processes that are gone.
    snapshots: u64,
    /// Until then members that promise their vote may die of it.
    kills_fenced_until: u64,
    /// How the leader is cut off meanwhile.
    cut_off: Vec<(NodeNo, NodeNo)>,
    /// Who dies in the switchover that is under way.
    ambush: Option<injection::Ambush>,
    /// Since when members that could have a leader have none.
    leaderless_us: Option<u64>,
    /// Up to where the log of each epoch was durable on somebody who led then or later.
    led: BTreeMap<Epoch, Lsn>,
    /// Epochs that somebody has led in.
    led_in: BTreeSet<Epoch>,
    /// What the log says, as far as it is confirmed.
    model: Model,
    pub trace: Trace,
    _root: tempfile::TempDir,
}

impl Cluster {
    fn at(&mut self, time_us: u64, event: Event) {
        self.last_event += 1;
        self.events.insert((time_us.max(self.now_us), self.last_event), event);
    }

    fn after(&mut self, delay_us: u64, event: Event) {
        self.at(self.now_us + delay_us, event);
    }

    /// Runs it to its end.
    pub fn run(&mut self) -> Checked<Summary> {
        while self.now_us < self.plan.faults_us {
            self.step()?;
        }
        self.calm_down();
        let deadline = self.now_us + RECOVERY_US_MAX;
        while !self.has_recovered() {
            if self.now_us >= deadline {
                let state = self.state_text();
                return Err(Broken(format!(
                    "{} s after the last fault it does not serve: {state}",
                    RECOVERY_US_MAX / SECOND_US
                )));
            }
            self.step()?;
        }
        self.check_end()
    }

    /// Faults end, and clients that only add to the load.
    fn calm_down(&mut self) {
        self.calm = true;
        self.world.set_misreading(None);
        self.world.disarm();
        self.network.borrow_mut().heal();
        for node in 0..self.nodes.len() {
            self.mend(node);
            self.nodes[node].paused_until = self.now_us;
            if self.nodes[node].control().is_none() {
                self.at(self.now_us, Event::Start(node));
            }
            self.schedule_turn(node, self.now_us);
        }
        self.schedule_network();
    }

    fn mend(&mut self, node: NodeNo) {
        self.world.set_full(node, false);
        self.nodes[node].disk = self.plan.disk;
        let disk = self.nodes[node].disk;
        if let Some(process) = &mut self.nodes[node].process {
            process.kernel.disk = disk;
        }
    }

    fn step(&mut self) -> Checked {
        let Some(((time_us, _), event)) = self.events.pop_first() else {
            return Err(Broken("nothing happens any more".to_owned()));
        };
        self.now_us = time_us;
        self.world.set_time(time_us);
        self.trace.event(time_us, &event);
        self.handle(event)?;
        if let Some(node) = self.world.went_down() {
            self.go_down_halfway(node);
        }
        for (node, task) in self.world.take_started() {
            let delay = self.rng.u64(20..1_500);
            self.after(delay, Event::Task(node, task));
        }
        for (node, task) in self.world.take_woken() {
            let most = if self.world.is_checkpoint(task) { self.plan.checkpoint_us } else { WAKE_US_MAX };
            let delay = self.rng.u64(WAKE_US_MIN..=most);
            self.after(delay, Event::Task(node, task));
        }
        Ok(())
    }

    fn is_paused(&self, node: NodeNo) -> bool {
        self.nodes[node].paused_until > self.now_us
    }

    fn handle(&mut self, event: Event) -> Checked {
        match event {
            Event::Turn(node) => return self.turn(node),
            Event::Task(node, task) => self.run_task(node, task),
            Event::Disk(node, incarnation, op) => self.disk_done(node, incarnation, op),
            Event::Network => self.turn_network(),
            Event::Control(node, incarnation) => self.turn_control(node, incarnation),
            Event::Reports(node, incarnation) => self.take_reports(node, incarnation),
            Event::Packet { from, to, request, body } => self.packet(from, to, request, body),
            Event::AskTimeout(request) => self.answered(request, None),
            Event::Controller => {
                self.choose_controller();
                self.somebody_leads()?;
                return self.members_catch_up();
            }
            Event::Promised { node, incarnation, id, epoch } => self.promised(node, incarnation, id, epoch),
            Event::Propose { node, incarnation, id, proposal } => return self.propose(node, incarnation, id, proposal),
            Event::Proposed { node, incarnation, id, number, outcome } => {
                self.proposed(node, incarnation, id, number, outcome)
            }
            Event::ChangeVoters { node, incarnation, id, step } => self.change_voters(node, incarnation, id, step),
            Event::VotersChanged { node, incarnation, id, outcome } => {
                self.voters_changed(node, incarnation, id, outcome)
            }
            Event::Learn { node, id, view } => self.learn(node, id, *view),
            Event::Client(client, turn) => self.client_turn(client, turn),
            Event::Input(node, incarnation, session, bytes) => self.input(node, incarnation, session, &bytes),
            Event::Reply(client, session, node, epoch, bytes) => {
                return self.reply(client, session, node, epoch, &bytes);
            }
            Event::Closed(client, session) => self.closed(client, session),
            Event::Fault => return self.inject(),
            Event::Crash { nodes, watched, looks_left } => self.crash(nodes, watched, looks_left),
            Event::GiveBack(node) => self.give_back(node),
            Event::LeaderBack => self.let_leader_through(),
            Event::Fall(node) => self.fall(node),
            Event::Ambush(node) => self.kill_for_long(node),
            Event::Replica => self.disturb_a_replica(),
            Event::Start(node) => return self.start(node),
            Event::Resume(node, suspended_us) => self.resume(node, suspended_us),
            Event::Heal(cut) => {
                for (from, to) in cut {
                    self.network.borrow_mut().join(from, to);
                }
                self.schedule_network();
            }
            Event::Quicken(directions) => {
                for (from, to) in directions {
                    self.network.borrow_mut().slow_down(from, to, 0);
                }
            }
            Event::Release(directions) => {
                for (from, to) in directions {
                    self.network.borrow_mut().release(from, to);
                }
                self.schedule_network();
            }
            Event::Switchover(at, to) => self.switch_over(at, to),
            Event::ReadWell => self.world.set_misreading(None),
            Event::Mend(node) => self.mend(node),
        }
        Ok(())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for node in 0..self.nodes.len() {
            self.kill(node);
        }
        enter(None);
    }
}
