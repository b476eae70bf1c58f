//! One run: nodes, clients, network, disks and clocks in one thread, from one seed. Events happen in the order of their time;
//! whatever happens next is decided by the seed alone.

mod held;
mod injection;
mod liveness;
mod processes;
mod register;
mod sessions;
mod states;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use walferry_cluster::agent::{AskId, RegisterView, VoterStep};
use walferry_cluster::control::{Answer, Ask};
use walferry_cluster::level::CommitLevel;
use walferry_cluster::register::{ClusterState, MemberId, Outcome};
use walferry_cluster::{ClusterId, MemberName};
use walferry_engine::EpochHistory;
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_engine::world::simulated::{TaskNo, World, enter};
use walferry_node::simulated::Member;

use crate::clients::{Acknowledged, Client, Told, p99_us};
use crate::control::{Control, Kept, Proposal, Setting, name_of};
use crate::events::Events;
use crate::faults::{Plan, Wanted};
use crate::kernel::{Disk, DiskOpNo, Kernel};
use crate::limits::{Broken, SEGMENT_BYTES};
use crate::model::Model;
use crate::network::{Network, peer_address};
use crate::rot::Rot;
use crate::trace::Trace;
use crate::world::{Clock, DRIFT_PPM_MAX, NodeNo, SimWorld};

const SECOND_US: u64 = 1_000_000;
/// After the last fault the cluster serves again within this, and all are equal.
pub const RECOVERY_US_MAX: u64 = 20 * SECOND_US;
const CONTROL_INTERVAL_US: u64 = 10_000;
const TURN_US_MAX: u64 = 100_000;
/// Turns in a row that a node asks for at once although nothing has happened; more, and it takes a processor for nothing.
const IDLE_TURNS_MAX: u32 = 1_000;
/// The register's own election: a controller that a majority does not hear is replaced after so long.
const CONTROLLER_TIME_US: u64 = 250_000;
/// A thread that is woken runs after this: what comes meanwhile it finds too. Background work within a little more, and a checkpoint
/// within what the plan says.
const WAKE_US_MIN: u64 = 10;
const WAKE_US_MAX: u64 = 1_000;
/// Sockets that a node closed, or wrote to without its ring, are looked at within this.
const NETWORK_LOOK_US: u64 = 400;
/// Everybody has to be well for so long after the last fault.
const WELL_US: u64 = SECOND_US;
const CHANGE_TIME_US: u64 = 1_000_000;
/// A crash that waits for a write looks so often, and so soon again.
const CRASH_LOOKS: u32 = 200;
const CRASH_LOOK_US_MAX: u64 = 400;
/// A node that ended or did not start is started again after so long.
const RESTART_US: u64 = 200_000;
/// A look through old log takes no longer.
const SCRUB_US_MAX: u64 = 2 * SECOND_US;
const ELECTION_TIMEOUT: Duration = Duration::from_millis(400);
const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(100);

/// Something that happens.
#[derive(Debug)]
enum Event {
    Turn(NodeNo),
    Task(NodeNo, TaskNo),
    Disk(NodeNo, u64, DiskOpNo),
    Network,
    Control(NodeNo, u64),
    /// The node has reported something to its agent.
    Reports(NodeNo, u64),
    Packet {
        from: NodeNo,
        to: NodeNo,
        request: u64,
        body: Body,
    },
    AskTimeout(u64),
    Controller,
    Promised {
        node: NodeNo,
        incarnation: u64,
        id: MemberId,
        epoch: Epoch,
    },
    Propose {
        node: NodeNo,
        incarnation: u64,
        id: MemberId,
        proposal: Proposal,
    },
    Proposed {
        node: NodeNo,
        incarnation: u64,
        id: MemberId,
        number: u64,
        outcome: Result<Outcome, String>,
    },
    ChangeVoters {
        node: NodeNo,
        incarnation: u64,
        id: MemberId,
        step: VoterStep,
    },
    VotersChanged {
        node: NodeNo,
        incarnation: u64,
        id: MemberId,
        outcome: Result<(), String>,
    },
    Learn {
        node: NodeNo,
        id: MemberId,
        view: Box<RegisterView>,
    },
    Client(usize, u64),
    Input(NodeNo, u64, u64, Vec<u8>),
    Reply(usize, u64, NodeNo, Epoch, Vec<u8>),
    Closed(usize, u64),
    Fault,
    /// These go down, as soon as this one has something in flight that can be torn.
    Crash {
        nodes: Vec<NodeNo>,
        watched: NodeNo,
        looks_left: u32,
    },
    /// A leader that was cut off until members had promised their vote to the next one gets through again.
    LeaderBack,
    /// It dies for a moment.
    Fall(NodeNo),
    /// Who controls the register dies, for long.
    Ambush(NodeNo),
    /// It is to lead again.
    GiveBack(NodeNo),
    Replica,
    Start(NodeNo),
    /// A stopped node goes on; its machine was suspended for so long.
    Resume(NodeNo, u64),
    /// These directions are cut no longer.
    Heal(Vec<(NodeNo, NodeNo)>),
    /// Connections in these directions are slow no longer, or were held back for long enough.
    Quicken(Vec<(NodeNo, NodeNo)>),
    Release(Vec<(NodeNo, NodeNo)>),
    /// The operator tells the first that the second is to lead.
    Switchover(NodeNo, NodeNo),
    ReadWell,
    Mend(NodeNo),
}

#[derive(Debug)]
enum Body {
    Ask(Box<Ask>),
    Answer(Box<Answer>),
}

/// A running process.
struct Process {
    member: Member,
    kernel: Kernel,
    control: Control,
}

/// One machine.
struct Node {
    process: Option<Process>,
    /// The process of a witness, which has no node.
    witness: Option<Control>,
    kept: Kept,
    dir: PathBuf,
    disk: Disk,
    /// Counts its processes.
    incarnation: u64,
    /// Stopped until then.
    paused_until: u64,
    turn_at: Option<u64>,
    /// Turns in a row that it had asked for and in which nothing happened.
    idle_turns: u32,
    /// What its log held durably when its process was last seen.
    durable: Lsn,
    /// And how its log ended there.
    epoch: Epoch,
    /// The epochs of its log, and where that begins.
    history: EpochHistory,
    log_start: Lsn,
    /// Up to where its log was durable after its last turn.
    seen_durable: Lsn,
    /// Its process after whose turn that was, how many of the commits that it counted as lost were found in `lost/` by then, and
    /// the files there.
    seen_incarnation: u64,
    lost_seen: u64,
    lost_files: BTreeSet<String>,
    /// The most that its process knew to be committed, the checkpoint of its store, and how many snapshots it had taken then.
    committed: Lsn,
    checkpoint: Lsn,
    copies: u64,
    /// Which incarnation lost its disk there last, and what it had.
    lost: Option<(MemberId, EpochHistory, Lsn)>,
    /// The newest epoch when its disk was lost last.
    lost_in: Option<Epoch>,
    /// What is damaged on its disk.
    rotten: Option<Rot>,
    /// Something was damaged on its disk once.
    was_damaged: bool,
    /// When its process was started.
    started_us: u64,
}

impl Node {
    /// The cluster thread of whatever runs there.
    fn control(&self) -> Option<&Control> {
        self.process.as_ref().map(|process| &process.control).or(self.witness.as_ref())
    }

    fn control_mut(&mut self) -> Option<&mut Control> {
        self.process.as_mut().map(|process| &mut process.control).or(self.witness.as_mut())
    }
}

/// What a run is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variation {
    /// The faults of the seed's plan.
    Faults,
    /// None, for comparison.
    Calm,
    /// One replica's disk is slow.
    SlowReplica,
    /// One replica is gone.
    DeadReplica,
}

/// What a run came to.
pub struct Summary {
    /// Of commits at `remote_flush`, if there were enough.
    pub p99_us: Option<u64>,
    pub hash: u64,
    pub commands: u64,
    pub acknowledged: usize,
    pub failovers: u64,
    pub faults: u64,
    pub restarts: u64,
    pub misreads: u64,
    pub snapshots: u64,
    pub checked_calls: usize,
    /// The stores were compared with what the log says.
    pub modelled: bool,
    pub simulated_us: u64,
}

type Checked<T = ()> = Result<T, Broken>;

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
    /// A run of this seed.
    pub fn new(seed: u64, variation: Variation, wanted: &Wanted<'_>, trace: Trace) -> Cluster {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut plan = Plan::new(&mut rng);
        if !wanted.faults.is_empty() {
            plan.set_faults(wanted.faults.to_vec());
        }
        if wanted.wide {
            plan.widen(&mut fastrand::Rng::with_seed(!seed));
        }
        (wanted.tune)(&mut plan);
        if variation != Variation::Faults {
            plan.make_calm(seed);
        }
        let network = Rc::new(RefCell::new(Network::new(plan.machines(), plan.delays, rng.u64(..))));
        let clock = |rng: &mut fastrand::Rng| Clock {
            drift_ppm: rng.i64(-DRIFT_PPM_MAX..=DRIFT_PPM_MAX),
            wall_offset_us: rng.i64(-(SECOND_US as i64)..=SECOND_US as i64),
            suspended_us: 0,
        };
        let clocks = (0..plan.machines()).map(|_| clock(&mut rng)).collect();
        let world = Rc::new(SimWorld::new(rng.u64(..), clocks, Rc::clone(&network)));
        enter(Some(world.clone() as Rc<dyn World>));
        let root = tempfile::Builder::new().prefix("sim").tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
        let root = root.expect("a directory for the nodes' files");
        std::env::set_current_dir(root.path()).expect("a directory just made");
        let mut members = BTreeMap::new();
        let mut nodes = Vec::new();
        for node in 0..plan.machines() {
            let id = MemberId(rng.u64(1..));
            if node < plan.nodes || plan.is_witness(node) {
                members.insert(name_of(node), peer_address(node));
            }
            nodes.push(Node {
                process: None,
                witness: None,
                kept: Kept::new(id, Epoch(0), None),
                // Relative, so that no message names another directory in another run.
                dir: PathBuf::from(name_of(node).as_str()),
                disk: plan.disk,
                incarnation: 0,
                paused_until: 0,
                turn_at: None,
                idle_turns: 0,
                durable: Lsn::ZERO,
                epoch: Epoch(0),
                history: EpochHistory::default(),
                log_start: Lsn::ZERO,
                seen_durable: Lsn::ZERO,
                seen_incarnation: 0,
                lost_seen: 0,
                lost_files: BTreeSet::new(),
                committed: Lsn::ZERO,
                checkpoint: Lsn::ZERO,
                copies: 0,
                lost: None,
                lost_in: None,
                rotten: None,
                was_damaged: false,
                started_us: 0,
            });
        }
        let cluster_id = ClusterId(u128::from(rng.u64(1..)));
        let setting = Setting {
            members,
            cluster_id,
            policy: plan.policy.to_owned(),
            min_in_sync: plan.min_in_sync,
            election_timeout: ELECTION_TIMEOUT,
            heartbeat_interval: HEARTBEAT_INTERVAL,
        };
        let clients = plan.clients.iter().enumerate().map(|(number, kind)| {
            let nodes = plan.data_nodes().len();
            Client::new(number, *kind, nodes, plan.tempo, plan.answers(), rng.u64(..))
        });
        let clients = clients.collect();
        let mut cluster = Cluster {
            world,
            network,
            events: Events::default(),
            last_event: 0,
            now_us: 0,
            nodes,
            clients,
            told: Told::default(),
            setting,
            register: ClusterState::default(),
            engine: register::Engine::default(),
            controller: None,
            controller_lost_us: None,
            asks: BTreeMap::new(),
            last_ask: 0,
            last_session: 0,
            network_at: None,
            leaders: Vec::new(),
            confirmed: BTreeMap::new(),
            spoke: BTreeMap::new(),
            plan,
            rng,
            variation,
            calm: false,
            faults: 0,
            restarts: 0,
            snapshots: 0,
            kills_fenced_until: 0,
            cut_off: Vec::new(),
            ambush: None,
            leaderless_us: None,
            led: BTreeMap::new(),
            led_in: BTreeSet::new(),
            model: Model::default(),
            trace,
            _root: root,
        };
        cluster.begin();
        cluster
    }

    fn begin(&mut self) {
        for node in 0..self.nodes.len() {
            self.at(node as u64 * 1_000, Event::Start(node));
        }
        self.at(5_000, Event::Controller);
        for client in 0..self.clients.len() {
            self.at(50_000 + client as u64 * 3_000, Event::Client(client, 0));
        }
        if self.variation == Variation::Faults {
            self.at(1_200_000, Event::Fault);
        } else if self.variation != Variation::Calm {
            self.at(1_000_000, Event::Replica);
        }
    }

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

    // The network.

    fn schedule_network(&mut self) {
        self.schedule_network_at(self.now_us + 1);
    }

    fn schedule_network_at(&mut self, at_us: u64) {
        if self.network_at.is_none_or(|at| at > at_us || at < self.now_us) {
            self.network_at = Some(at_us);
            self.at(at_us, Event::Network);
        }
    }

    fn turn_network(&mut self) {
        if self.network_at != Some(self.now_us) {
            return;
        }
        self.network_at = None;
        let moved: BTreeSet<NodeNo> = self.network.borrow_mut().turn(self.now_us).into_iter().collect();
        // A node that shuts a socket down ends what waits for it there.
        let arrived = self.network.borrow_mut().look_at_arrivals();
        for node in 0..self.nodes.len() {
            // A stopped process accepts nothing; what its kernel was asked for goes on.
            let accepted: Vec<(OwnedFd, std::net::SocketAddr)> = match self.is_paused(node) {
                true => Vec::new(),
                false => self.network.borrow_mut().accepted(node, self.now_us),
            };
            let Some(process) = &mut self.nodes[node].process else { continue };
            let woken = !accepted.is_empty();
            for (socket, address) in accepted {
                process.control.connection(socket, address);
            }
            if arrived || moved.contains(&node) {
                process.kernel.progress_sockets(self.network.borrow_mut().arrived());
            }
            if woken || process.kernel.has_news() {
                self.schedule_turn(node, self.now_us + WAKE_US_MIN);
            }
        }
        let next_us = self.network.borrow().next_us(self.now_us, |node| !self.is_paused(node));
        if let Some(at) = next_us {
            self.network_at = Some(at);
            self.last_event += 1;
            self.events.insert((at, self.last_event), Event::Network);
        }
    }

    // The end.

    fn leader(&self) -> Option<NodeNo> {
        (0..self.nodes.len()).find(|node| {
            self.world.be(*node);
            self.nodes[*node].process.as_ref().is_some_and(|process| process.member.leads())
        })
    }

    /// Everybody is there and has the leader's log, and a commit that waits for all of it was just taken.
    fn has_recovered(&mut self) -> bool {
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

    fn state_text(&self) -> String {
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

    fn check_end(&mut self) -> Checked<Summary> {
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

    fn member(&self, node: NodeNo) -> &Member {
        &self.nodes[node].process.as_ref().expect("everybody is there").member
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
