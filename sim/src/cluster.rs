//! One run: nodes, clients, network, disks and clocks in one thread, from one seed. Events happen in the order of their time;
//! whatever happens next is decided by the seed alone.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use walferry::simulated::{Member, NodeConfig};
use walferry_cluster::control::{Answer, Ask};
use walferry_cluster::level::CommitLevel;
use walferry_cluster::register::{Change, ClusterState, Holding, Kind as MemberKind, Member as Seat, MemberId};
use walferry_cluster::{ClusterId, MemberName};
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_engine::world::simulated::{TaskNo, World, enter};
use walferry_engine::world::{self, Pace};

use crate::clients::{Client, Outcome, PATIENCE, Told, Wants, p99_us};
use crate::control::{Asked, Control, Kept, Wish, name_of, node_of};
use crate::faults::{Fault, Plan, Wanted};
use crate::kernel::{Disk, DiskOpNo, Kernel};
use crate::network::{Network, peer_address, socket_address};
use crate::rot::{self, Rot};
use crate::trace::Trace;
use crate::world::{Clock, DRIFT_PPM_MAX, NodeNo, SimWorld};

const SECOND_US: u64 = 1_000_000;
/// Faults happen for so long, then everything heals.
pub const FAULTS_US: u64 = 5 * SECOND_US;
/// After the last fault the cluster serves again within this, and all are equal.
pub const RECOVERY_US_MAX: u64 = 20 * SECOND_US;
const CONTROL_INTERVAL_US: u64 = 10_000;
const TURN_US_MAX: u64 = 100_000;
/// The register's own election: a controller that a majority does not hear is replaced after so long.
const CONTROLLER_TIME_US: u64 = 250_000;
const ASK_TIME_US: u64 = 1_600_000;
/// Background work that sleeps looks so often whether it was woken.
const LOOK_INTERVAL_US: u64 = 1_000;
const CHANGE_TIME_US: u64 = 1_000_000;
/// A crash that waits for a write looks so often, and so soon again.
const CRASH_LOOKS: u32 = 200;
const CRASH_LOOK_US_MAX: u64 = 400;
pub const SEGMENT_BYTES: u64 = 128 << 10;
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
    Packet {
        from: NodeNo,
        to: NodeNo,
        request: u64,
        body: Body,
    },
    AskTimeout(u64),
    Controller,
    Propose {
        from: NodeNo,
        life: u64,
        change: Box<Change>,
        in_sync: bool,
    },
    ChangeDone {
        node: NodeNo,
        life: u64,
        in_sync: bool,
    },
    Learn {
        node: NodeNo,
        state: Box<ClusterState>,
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
    Replica,
    Start(NodeNo),
    Resume(NodeNo),
    Heal,
    ReadWell,
    Mend(NodeNo),
}

#[derive(Debug)]
enum Body {
    Ask(Ask),
    Answer(Answer),
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
    kept: Kept,
    dir: PathBuf,
    disk: Disk,
    /// Counts its processes.
    life: u64,
    /// Stopped until then.
    paused_until: u64,
    turn_at: Option<u64>,
    /// What its log held durably when its process was last seen.
    durable: Lsn,
    /// And how its log ended there.
    epoch: Epoch,
    /// What is damaged on its disk.
    rotten: Option<Rot>,
    /// Something was damaged on its disk once.
    was_damaged: bool,
    /// When its process was started.
    started_us: u64,
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
    pub checked_calls: usize,
    pub simulated_us: u64,
}

/// A broken property.
#[derive(Debug)]
pub struct Broken(pub String);

type Checked<T = ()> = Result<T, Broken>;

/// A run.
pub struct Cluster {
    world: Rc<SimWorld>,
    network: Rc<RefCell<Network>>,
    events: BTreeMap<(u64, u64), Event>,
    last_event: u64,
    now_us: u64,
    nodes: Vec<Node>,
    clients: Vec<Client>,
    told: Told,
    /// The register, as a majority holds it.
    register: ClusterState,
    controller: Option<NodeNo>,
    controller_lost_us: Option<u64>,
    asks: BTreeMap<u64, (NodeNo, u64, Asked)>,
    last_ask: u64,
    last_session: u64,
    network_at: Option<u64>,
    /// Who was chosen to lead in which epoch.
    leaders: Vec<(Epoch, NodeNo)>,
    /// Who acknowledged in which epoch.
    spoke: BTreeMap<Epoch, NodeNo>,
    plan: Plan,
    rng: fastrand::Rng,
    variation: Variation,
    /// Faults are over.
    calm: bool,
    faults: u64,
    restarts: u64,
    pub trace: Trace,
    _root: tempfile::TempDir,
}

impl Cluster {
    /// A run of this seed.
    pub fn new(seed: u64, variation: Variation, wanted: &Wanted<'_>, trace: Trace) -> Cluster {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut plan = Plan::new(&mut rng);
        if !wanted.faults.is_empty() {
            plan.faults = wanted.faults.to_vec();
        }
        (wanted.tune)(&mut plan);
        if variation != Variation::Faults {
            plan.make_calm(seed);
        }
        let network = Rc::new(RefCell::new(Network::new(plan.nodes, plan.delays, rng.u64(..))));
        let clock = |rng: &mut fastrand::Rng| Clock {
            drift_ppm: rng.i64(-DRIFT_PPM_MAX..=DRIFT_PPM_MAX),
            wall_offset_us: rng.i64(-(SECOND_US as i64)..=SECOND_US as i64),
        };
        let clocks = (0..plan.nodes).map(|_| clock(&mut rng)).collect();
        let world = Rc::new(SimWorld::new(rng.u64(..), clocks, Rc::clone(&network)));
        enter(Some(world.clone() as Rc<dyn World>));
        let root = tempfile::Builder::new().prefix("sim").tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
        let root = root.expect("a directory for the nodes' files");
        std::env::set_current_dir(root.path()).expect("a directory just made");
        let mut members = BTreeMap::new();
        let mut nodes = Vec::new();
        for node in 0..plan.nodes {
            let id = MemberId(rng.u64(1..));
            let (peer, kind, holding) = (peer_address(node), MemberKind::Data, Holding::Whole);
            members.insert(name_of(node), Seat { id, peer, kind, holding });
            nodes.push(Node {
                process: None,
                kept: Kept { id, promised: Epoch(0), state: ClusterState::default() },
                // Relative, so that no message names another directory in another run.
                dir: PathBuf::from(name_of(node).as_str()),
                disk: plan.disk,
                life: 0,
                paused_until: 0,
                turn_at: None,
                durable: Lsn::ZERO,
                epoch: Epoch(0),
                rotten: None,
                was_damaged: false,
                started_us: 0,
            });
        }
        let cluster_id = ClusterId(u128::from(rng.u64(1..)));
        let register = ClusterState::formed(cluster_id, members, plan.policy).expect("a policy of the plan");
        let clients =
            plan.clients.iter().enumerate().map(|(number, kind)| Client::new(number, *kind, plan.nodes, rng.u64(..)));
        let clients = clients.collect();
        let mut cluster = Cluster {
            world,
            network,
            events: BTreeMap::new(),
            last_event: 0,
            now_us: 0,
            nodes,
            clients,
            told: Told::default(),
            register,
            controller: None,
            controller_lost_us: None,
            asks: BTreeMap::new(),
            last_ask: 0,
            last_session: 0,
            network_at: None,
            leaders: Vec::new(),
            spoke: BTreeMap::new(),
            plan,
            rng,
            variation,
            calm: false,
            faults: 0,
            restarts: 0,
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
        while self.now_us < FAULTS_US {
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
        self.network.borrow_mut().heal();
        for node in 0..self.nodes.len() {
            self.mend(node);
            self.nodes[node].paused_until = self.now_us;
            if self.nodes[node].process.is_none() {
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
        for (node, task) in self.world.take_started() {
            let delay = self.rng.u64(20..1_500);
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
            Event::Disk(node, life, op) => self.disk_done(node, life, op),
            Event::Network => self.turn_network(),
            Event::Control(node, life) => self.turn_control(node, life),
            Event::Packet { from, to, request, body } => self.packet(from, to, request, body),
            Event::AskTimeout(request) => self.answered(request, None),
            Event::Controller => self.choose_controller(),
            Event::Propose { from, life, change, in_sync } => self.propose(from, life, *change, in_sync),
            Event::ChangeDone { node, life, in_sync } => self.change_done(node, life, in_sync),
            Event::Learn { node, state } => self.learn(node, &state),
            Event::Client(client, turn) => self.client_turn(client, turn),
            Event::Input(node, life, session, bytes) => self.input(node, life, session, &bytes),
            Event::Reply(client, session, node, epoch, bytes) => {
                return self.reply(client, session, node, epoch, &bytes);
            }
            Event::Closed(client, session) => self.closed(client, session),
            Event::Fault => return self.inject(),
            Event::Crash { nodes, watched, looks_left } => self.crash(nodes, watched, looks_left),
            Event::Replica => self.trouble_a_replica(),
            Event::Start(node) => return self.start(node),
            Event::Resume(node) => self.schedule_turn(node, self.now_us),
            Event::Heal => {
                self.network.borrow_mut().heal();
                self.schedule_network();
            }
            Event::ReadWell => self.world.set_misreading(None),
            Event::Mend(node) => self.mend(node),
        }
        Ok(())
    }

    // Processes.

    fn config(&self, node: NodeNo) -> NodeConfig {
        let members: Vec<String> =
            (0..self.nodes.len()).map(|node| format!("{}={}", name_of(node), peer_address(node))).collect();
        let text = format!(
            "data = {:?}\nname = \"{}\"\nmembers = \"{}\"\nsync_method = \"{}\"\nwrite_depth = {}\nwaterfall = false\n\
             peer_timeout = \"2s\"\nreplica_lag_time_max = \"{}ms\"\nlog_buffer_bytes = \"32MiB\"\nsegment_bytes = \"16MiB\"\n",
            self.nodes[node].dir,
            name_of(node),
            members.join(","),
            self.plan.sync_method,
            self.plan.write_depth,
            self.plan.replica_lag_ms,
        );
        let mut config = Member::configure(&text).expect("a configuration of the simulator's");
        config.segment_bytes = SEGMENT_BYTES;
        config.log_buffer_bytes = 2 << 20;
        config.checkpoint_bytes = self.plan.checkpoint_bytes;
        config.store_cache_bytes = 1 << 20;
        config.zero_copy_bytes_min = self.plan.zero_copy_bytes_min;
        config.keep_bytes_min = self.plan.keep_bytes_min;
        config
    }

    fn start(&mut self, node: NodeNo) -> Checked {
        if self.nodes[node].process.is_some() {
            return Ok(());
        }
        self.world.be(node);
        let config = self.config(node);
        let promised = self.nodes[node].kept.promised;
        self.gather_lenders();
        let opened = Member::open(config, socket_address(node, 6400), promised);
        let (member, queues, end) = match opened {
            Ok(opened) => opened,
            Err(error) => return self.does_not_start(node, &error.to_string()),
        };
        let known = &mut self.nodes[node];
        known.started_us = self.now_us;
        known.life += 1;
        let life = known.life;
        if member.flushed() < known.durable {
            return Err(Broken(format!(
                "{} had its log durable up to {} (epoch {}) and recovered up to {}",
                name_of(node),
                known.durable,
                known.epoch,
                member.flushed()
            )));
        }
        known.durable = member.flushed();
        let kept = known.kept.clone();
        let control = Control::new(node, kept, end, member.epoch(), ELECTION_TIMEOUT, HEARTBEAT_INTERVAL, world::now());
        let kernel = Kernel::new(queues, known.disk, self.rng.u64(..));
        known.process = Some(Process { member, kernel, control });
        self.network.borrow_mut().set_up(node, true);
        if self.register.version > 0 && self.controller.is_some() {
            self.tell_register(node);
        }
        self.schedule_turn(node, self.now_us);
        self.after(1, Event::Control(node, life));
        Ok(())
    }

    /// Kills a node and flips a bit of what its log says was durable.
    fn rot(&mut self, node: NodeNo) {
        let end = self.nodes[node].process.as_ref().map(|process| process.member.flushed());
        self.forget_healed();
        let healthy = self.nodes.iter().all(|node| node.rotten.is_none());
        let history = self.nodes[node].process.as_ref().map(|process| process.member.history().clone());
        let start = self.nodes[node].process.as_ref().map(|process| process.member.log_start());
        self.kill(node);
        let (Some(start), Some(end), Some(history)) = (start, end, history) else { return };
        // One node at a time: what two have lost nobody may have.
        if healthy && !self.is_anyone_misreading() {
            self.nodes[node].was_damaged = true;
            self.nodes[node].rotten = Rot::begin(&self.nodes[node].dir, (start, end), history, &mut self.rng);
        }
    }

    /// Kills a node, whose disk misreads when it starts again.
    fn misread(&mut self, node: NodeNo, long: u64) {
        self.forget_healed();
        self.kill(node);
        if self.nodes.iter().all(|node| node.rotten.is_none()) {
            let until = rot::known_durable(&self.nodes[node].dir);
            self.nodes[node].was_damaged = true;
            self.world.set_misreading(Some((node, until)));
            self.after(2 * long, Event::ReadWell);
        }
    }

    fn forget_healed(&mut self) {
        for node in &mut self.nodes {
            let member = node.process.as_ref().map(|process| &process.member);
            node.rotten.take_if(|rot| member.is_some_and(|member| rot.is_over(member)));
        }
    }

    fn is_anyone_misreading(&self) -> bool {
        (0..self.nodes.len()).any(|node| self.world.is_misreading(node))
    }

    /// Who would answer now if it was asked for its log.
    fn gather_lenders(&mut self) {
        let holding = |node: &NodeNo| Some((*node, self.nodes[*node].process.as_ref()?.member.holding()));
        let lenders = (0..self.nodes.len()).filter(|node| !self.is_paused(*node)).filter_map(|node| holding(&node));
        self.world.set_lenders(lenders.collect());
    }

    /// Only a node whose log is damaged may fail to start, only with the damage's place, and only where nobody gave it back.
    fn does_not_start(&mut self, node: NodeNo, error: &str) -> Checked {
        self.world.drop_jobs(node);
        let name = name_of(node);
        self.trace.note(self.now_us, &format!("{name} does not start: {error}"));
        let is_damage = error.contains("damage");
        if self.world.is_misreading(node) && is_damage {
            self.after(RESTART_US, Event::Start(node));
            return Ok(());
        }
        let Some(rot) = &self.nodes[node].rotten else {
            return Err(Broken(format!("{name} does not start: {error}")));
        };
        if !is_damage || !error.contains(&rot.path().display().to_string()) {
            return Err(Broken(format!("{name} hides that {} is damaged: {error}", rot.path().display())));
        }
        let others = (0..self.nodes.len()).filter(|other| *other != node);
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
        let troubled = self.world.is_misreading(node) || self.nodes[node].rotten.is_some();
        if !troubled || !error.contains("damage") {
            return Err(Broken(format!("{} ended: {error}", name_of(node))));
        }
        self.kill(node);
        self.after(RESTART_US, Event::Start(node));
        Ok(())
    }

    /// Whether damage is left, now that everything else is well. A node looks through its old log after a start: one that could
    /// not be given its log then is started again.
    fn is_healed(&mut self, node: NodeNo) -> bool {
        let Some(rot) = &self.nodes[node].rotten else { return true };
        if self.nodes[node].process.is_none() {
            return false;
        }
        if rot.is_over(self.member(node)) {
            return true;
        }
        if self.now_us > self.nodes[node].started_us + SCRUB_US_MAX {
            let held = (0..self.nodes.len()).any(|other| other != node && rot.is_held_by(self.member(other)));
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
    fn kill(&mut self, node: NodeNo) {
        let Some(mut process) = self.nodes[node].process.take() else { return };
        self.world.be(node);
        self.restarts += 1;
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

    fn schedule_turn(&mut self, node: NodeNo, at_us: u64) {
        let known = &mut self.nodes[node];
        let at_us = at_us.max(known.paused_until);
        if known.process.is_some() && known.turn_at.is_none_or(|at| at > at_us) {
            known.turn_at = Some(at_us);
            self.at(at_us, Event::Turn(node));
        }
    }

    fn turn(&mut self, node: NodeNo) -> Checked {
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
        let turned = match process.member.turn() {
            Ok(turned) => turned,
            Err(error) => return self.ended(node, &error.to_string()),
        };
        if process.member.repaired() > 0 && !was_damaged {
            return Err(Broken(format!("{} had called durable what its disk does not have", name_of(node))));
        }
        let epoch = process.member.epoch();
        let durable = process.member.flushed();
        let timeout = process.member.timeout();
        self.nodes[node].durable = durable;
        self.nodes[node].epoch = epoch;
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
        let life = self.nodes[node].life;
        let Some(process) = &mut self.nodes[node].process else { return };
        let begun = process.kernel.take_submissions(now_us);
        let news = process.kernel.has_news();
        for (at, op) in begun {
            self.at(at, Event::Disk(node, life, op));
        }
        if news {
            self.schedule_turn(node, now_us + 3);
        }
        self.schedule_network_at(now_us + 1);
    }

    fn run_task(&mut self, node: NodeNo, task: TaskNo) {
        if self.is_paused(node) {
            return self.at(self.nodes[node].paused_until, Event::Task(node, task));
        }
        if self.world.asks(task) {
            self.gather_lenders();
        }
        let Some(pace) = self.world.run(task) else { return };
        match pace {
            Pace::Again => {
                let delay = self.rng.u64(10..400);
                self.after(delay, Event::Task(node, task));
            }
            Pace::Idle(time) => {
                let delay = self.world.true_us(node, time);
                return self.after(delay, Event::Task(node, task));
            }
            Pace::Asleep => return self.after(LOOK_INTERVAL_US, Event::Task(node, task)),
            Pace::Over => {}
        }
        // It woke the ring, or wrote to a socket.
        self.schedule_turn(node, self.now_us + 2);
        self.schedule_network_at(self.now_us + 1);
    }

    fn disk_done(&mut self, node: NodeNo, life: u64, op: DiskOpNo) {
        if self.nodes[node].life != life {
            return;
        }
        let now_us = self.now_us;
        let Some(process) = &mut self.nodes[node].process else { return };
        if let Some((at, next)) = process.kernel.finish_disk_op(op, now_us) {
            self.at(at, Event::Disk(node, life, next));
        }
        self.schedule_turn(node, now_us + 1);
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
        for node in 0..self.nodes.len() {
            if self.is_paused(node) {
                continue;
            }
            let accepted: Vec<(OwnedFd, std::net::SocketAddr)> = self.network.borrow_mut().accepted(node, self.now_us);
            let Some(process) = &mut self.nodes[node].process else { continue };
            let woken = !accepted.is_empty();
            for (socket, address) in accepted {
                process.control.connection(socket, address);
            }
            if moved.contains(&node) {
                process.kernel.progress_sockets();
            }
            if woken || process.kernel.has_news() {
                self.schedule_turn(node, self.now_us + 2);
            }
        }
        if let Some(at) = self.network.borrow().next_us(self.now_us) {
            self.network_at = Some(at);
            self.last_event += 1;
            self.events.insert((at, self.last_event), Event::Network);
        }
    }

    // The control plane.

    fn turn_control(&mut self, node: NodeNo, life: u64) {
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

    fn packet(&mut self, from: NodeNo, to: NodeNo, request: u64, body: Body) {
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

    fn answered(&mut self, request: u64, answer: Option<Answer>) {
        let Some((node, life, asked)) = self.asks.remove(&request) else { return };
        if self.nodes[node].life == life {
            self.move_control(node, |control, wishes| {
                control.handle_answer(asked, answer, world::now(), wishes);
                control.turn(world::now(), wishes);
            });
        }
    }

    fn is_up(&self, node: NodeNo) -> bool {
        self.nodes[node].process.is_some() && !self.is_paused(node)
    }

    /// Whether a majority and this node hear each other.
    fn reaches_majority(&self, node: NodeNo) -> bool {
        let network = self.network.borrow();
        let heard = |other: &NodeNo| self.is_up(*other) && network.passes(node, *other) && network.passes(*other, node);
        self.is_up(node) && (0..self.nodes.len()).filter(heard).count() * 2 > self.nodes.len()
    }

    fn choose_controller(&mut self) {
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
    fn tell_register(&mut self, node: NodeNo) {
        let Some(controller) = self.controller else { return };
        let delay = self.network.borrow_mut().packet(controller, node);
        if let Some(delay) = delay {
            let state = Box::new(self.register.clone());
            self.after(delay, Event::Learn { node, state });
        }
    }

    fn learn(&mut self, node: NodeNo, state: &ClusterState) {
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

    fn propose(&mut self, from: NodeNo, life: u64, change: Change, in_sync: bool) {
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

    fn change_done(&mut self, node: NodeNo, life: u64, in_sync: bool) {
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

    // Clients.

    fn client_turn(&mut self, client: usize, turn: u64) {
        if self.clients[client].turn != turn {
            return;
        }
        if self.clients[client].is_waiting() {
            // It has waited long enough.
            return self.leave(client, true);
        }
        if self.calm && self.clients[client].number != 0 && self.now_us > FAULTS_US + SECOND_US {
            return;
        }
        let wants = self.clients[client].next(self.now_us, &mut self.told);
        match wants {
            Wants::Connect(node, bytes) => {
                self.last_session += 1;
                let session = self.last_session;
                self.world.be(node);
                match &mut self.nodes[node].process {
                    Some(process) => process.member.connect(session),
                    None => return self.leave(client, true),
                }
                self.clients[client].session = Some((node, session));
                self.send_input(client, node, session, bytes);
            }
            Wants::Send(bytes) => {
                let (node, session) = self.clients[client].session.expect("it sends on its session");
                self.send_input(client, node, session, bytes);
            }
        }
    }

    fn send_input(&mut self, client: usize, node: NodeNo, session: u64, bytes: Vec<u8>) {
        let delay = self.network.borrow_mut().delay_us();
        let life = self.nodes[node].life;
        self.after(delay, Event::Input(node, life, session, bytes));
        let turn = self.clients[client].turn;
        self.after(PATIENCE.as_micros() as u64, Event::Client(client, turn));
    }

    fn input(&mut self, node: NodeNo, life: u64, session: u64, bytes: &[u8]) {
        if self.nodes[node].life != life {
            return;
        }
        if self.is_paused(node) {
            return self.at(self.nodes[node].paused_until, Event::Input(node, life, session, bytes.to_vec()));
        }
        self.world.be(node);
        if let Some(process) = &mut self.nodes[node].process {
            process.member.input(session, bytes);
        }
        self.schedule_turn(node, self.now_us + 1);
    }

    fn send_reply(&mut self, node: NodeNo, session: u64, epoch: Epoch, bytes: Vec<u8>) {
        let Some(client) = self.clients.iter().position(|client| client.session == Some((node, session))) else {
            self.world.be(node);
            if let Some(process) = &mut self.nodes[node].process {
                process.member.disconnect(session);
            }
            return;
        };
        self.trace.bytes(&bytes);
        let delay = self.network.borrow_mut().delay_us();
        self.after(delay, Event::Reply(client, session, node, epoch, bytes));
    }

    fn session_closed(&mut self, node: NodeNo, session: u64) {
        if let Some(client) = self.clients.iter().position(|client| client.session == Some((node, session))) {
            self.after(100, Event::Closed(client, session));
        }
    }

    fn closed(&mut self, client: usize, session: u64) {
        if self.clients[client].session.is_some_and(|(_, own)| own == session) {
            self.leave(client, true);
        }
    }

    fn leave(&mut self, client: usize, failed: bool) {
        if let Some((node, session)) = self.clients[client].session {
            self.world.be(node);
            if let Some(process) = &mut self.nodes[node].process {
                process.member.disconnect(session);
            }
        }
        self.clients[client].lose();
        let (turn, pause) = (self.clients[client].turn, self.clients[client].pause_us(failed));
        self.after(pause, Event::Client(client, turn));
    }

    fn reply(&mut self, client: usize, session: u64, node: NodeNo, epoch: Epoch, bytes: &[u8]) -> Checked {
        if self.clients[client].session != Some((node, session)) {
            return Ok(());
        }
        let before = self.told.acknowledged.len();
        let outcome = self.clients[client].receive(bytes, self.now_us, epoch, &mut self.told);
        if let Some(ack) = self.told.acknowledged.get(before) {
            let level = ack.level;
            let speaker = *self.spoke.entry(epoch).or_insert(node);
            if speaker != node {
                return Err(Broken(format!(
                    "{} and {} both acknowledged in epoch {epoch} ({level})",
                    name_of(speaker),
                    name_of(node)
                )));
            }
        }
        if let Some(text) = self.told.broken.first() {
            return Err(Broken(text.clone()));
        }
        let turn = self.clients[client].turn;
        match outcome {
            None => {}
            Some(Outcome::Ask(bytes)) => self.send_input(client, node, session, bytes),
            Some(Outcome::Leave) => self.leave(client, false),
            Some(Outcome::Next) => {
                self.clients[client].turn += 1;
                let pause = self.clients[client].pause_us(false);
                self.after(pause, Event::Client(client, turn + 1));
            }
            Some(Outcome::Pause) => {
                self.clients[client].turn += 1;
                let pause = self.clients[client].pause_us(true);
                self.after(pause, Event::Client(client, turn + 1));
            }
        }
        Ok(())
    }

    // Faults.

    fn inject(&mut self) -> Checked {
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

    fn crash(&mut self, nodes: Vec<NodeNo>, watched: NodeNo, looks_left: u32) {
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
    fn trouble_a_replica(&mut self) {
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

    // The end.

    fn leader(&self) -> Option<NodeNo> {
        (0..self.nodes.len()).find(|node| {
            self.world.be(*node);
            self.nodes[*node].process.as_ref().is_some_and(|process| process.member.leads())
        })
    }

    /// Everybody is there and has the leader's log, and a commit that waits for all of it was just taken.
    fn has_recovered(&mut self) -> bool {
        if self.now_us < FAULTS_US + 2 * SECOND_US {
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
        if self.nodes.iter().any(|node| node.process.is_none())
            || !(0..self.nodes.len()).all(|node| self.is_healed(node))
        {
            return false;
        }
        let ends: Vec<(Lsn, Lsn)> = self
            .nodes
            .iter()
            .filter_map(|node| node.process.as_ref())
            .map(|process| (process.member.sealed(), process.member.applied()))
            .collect();
        let served =
            self.told.acknowledged.iter().rev().any(|ack| {
                ack.node == leader && ack.level == CommitLevel::RemoteApply && ack.at_us > FAULTS_US + 500_000
            });
        ends.len() == self.nodes.len()
            && served
            && ends.iter().all(|(sealed, applied)| *sealed == ends[0].0 && *applied == ends[0].0)
    }

    fn state_text(&self) -> String {
        let mut text = format!(
            "register version {} epoch {} leader {:?} in sync {:?} controller {:?}",
            self.register.version,
            self.register.epoch,
            self.register.leader.as_ref().map(MemberName::as_str),
            self.register.in_sync.iter().map(MemberName::as_str).collect::<Vec<_>>(),
            self.controller.map(name_of)
        );
        for (number, node) in self.nodes.iter().enumerate() {
            self.world.be(number);
            match &node.process {
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
        let end = self.member(leader).sealed();
        for node in 0..self.nodes.len() {
            self.world.be(node);
            crate::checks::logs_agree(self.member(leader), self.member(node), end, SEGMENT_BYTES)?;
            crate::checks::state_is_the_log(self.member(node), &self.nodes[node].dir)?;
        }
        let checked_calls = self.told.registers.check().map_err(Broken)?;
        Ok(Summary {
            p99_us: p99_us(&self.told.acknowledged, CommitLevel::RemoteFlush),
            hash: self.trace.hash(),
            commands: self.told.commands,
            acknowledged: self.told.acknowledged.len(),
            failovers: self.trace.failovers,
            faults: self.faults,
            restarts: self.restarts,
            misreads: self.world.misreads(),
            checked_calls,
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
