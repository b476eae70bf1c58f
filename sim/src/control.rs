//! A member's cluster thread: the member agent of production, with the simulator's packets, register and disk where the daemon's
//! thread has sockets, openraft and a file. Carries bytes and decides nothing.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use walferry_cluster::agent::{
    Agent, AgentConfig, AskId, Command, Kept as AgentKept, NodeFacts, Output, Over, RegisterView,
};
use walferry_cluster::control::{Answer, Ask};
use walferry_cluster::member::{Caller, Proved};
use walferry_cluster::register::{Change, ClusterState, Kind, MemberId, Outcome};
use walferry_cluster::{ClusterId, MemberName};
use walferry_engine::lsn::Epoch;
use walferry_node::simulated::{Control as NodeEnd, Order, Report, witness_agent};

use crate::network::peer_address;
use crate::world::NodeNo;

/// What a member keeps on its disk beside its log.
#[derive(Clone, Debug)]
pub struct Kept {
    pub id: MemberId,
    pub promised: Epoch,
    /// The version of the register with which an earlier incarnation was removed.
    pub removed: Option<u64>,
    /// The register, as far as this incarnation heard of it.
    pub view: RegisterView,
}

impl Kept {
    /// A member that knows nothing.
    pub fn new(id: MemberId, promised: Epoch, removed: Option<u64>) -> Kept {
        Kept { id, promised, removed, view: RegisterView::default() }
    }

    fn for_agent(&self) -> AgentKept {
        AgentKept { id: self.id, promised: self.promised, removed: self.removed }
    }
}

/// What a member is started with.
#[derive(Clone, Debug)]
pub struct Setting {
    pub members: BTreeMap<MemberName, String>,
    pub cluster_id: ClusterId,
    pub policy: String,
    pub min_in_sync: usize,
    pub election_timeout: Duration,
    pub heartbeat_interval: Duration,
}

/// One member's part.
pub struct Control {
    pub name: MemberName,
    pub kept: Kept,
    /// It may try to control the register.
    pub may_elect: bool,
    agent: Agent,
    config: AgentConfig,
    /// A witness has none.
    node: Option<NodeEnd>,
    /// Whose questions the agent has to answer.
    asked: BTreeMap<u64, NodeNo>,
    last_command: u64,
}

pub fn name_of(node: NodeNo) -> MemberName {
    let letter = char::from(b'a' + node as u8);
    letter.to_string().parse().expect("a letter is a name")
}

pub fn node_of(name: &MemberName) -> NodeNo {
    usize::from(name.as_str().as_bytes()[0] - b'a')
}

impl Control {
    /// That of a member with data, whose node has a log of epochs up to `history_epoch`.
    pub fn new(
        node_no: NodeNo,
        kept: Kept,
        node: NodeEnd,
        history_epoch: Epoch,
        setting: &Setting,
        now: Instant,
    ) -> Control {
        let name = name_of(node_no);
        let mut members = setting.members.clone();
        members.entry(name.clone()).or_insert_with(|| peer_address(node_no));
        let config = AgentConfig {
            name: name.clone(),
            kind: Kind::Data,
            members,
            client_address: format!("{name}:6400"),
            cluster_id: None,
            new_cluster_id: setting.cluster_id,
            election_timeout: setting.election_timeout,
            heartbeat_interval: setting.heartbeat_interval,
            policy: setting.policy.clone(),
            min_in_sync: setting.min_in_sync,
            history_epoch,
        };
        Control::of(config, kept, Some(node), now)
    }

    /// The control of a witness.
    pub fn witness(node_no: NodeNo, kept: Kept, setting: &Setting, now: Instant) -> Control {
        let timeouts = (setting.election_timeout, setting.heartbeat_interval);
        let config = witness_agent(name_of(node_no), setting.members.clone(), setting.cluster_id, timeouts);
        Control::of(config, kept, None, now)
    }

    fn of(config: AgentConfig, kept: Kept, node: Option<NodeEnd>, now: Instant) -> Control {
        let agent = Agent::new(config.clone(), kept.for_agent(), kept.view.clone(), node.is_some(), now);
        let name = config.name.clone();
        Control { name, kept, may_elect: false, agent, config, node, asked: BTreeMap::new(), last_command: 0 }
    }

    fn order(&self, order: Order) {
        if let Some(node) = &self.node {
            node.order(order);
        }
    }

    fn set_lease(&self, until: Option<Instant>) {
        if let Some(node) = &self.node {
            node.set_lease(until);
        }
    }

    pub fn connection(&self, socket: std::os::fd::OwnedFd, address: std::net::SocketAddr) {
        self.order(Order::Connection(socket, Caller::unproved(address)));
    }

    /// Hands over what the node reported, or that time has passed.
    pub fn turn(&mut self, now: Instant) {
        let mut quiet = true;
        if let Some(node) = &self.node {
            self.agent.set_node(NodeFacts { end: node.log_end(), stuck: false });
        }
        while let Some(report) = self.node.as_mut().and_then(NodeEnd::next_report) {
            if let Report::Agent(report) = report {
                self.agent.handle_report(report, now);
                quiet = false;
            }
        }
        if quiet {
            self.agent.handle_timeout(now);
        }
    }

    /// The node has reported something.
    pub fn has_reports(&self) -> bool {
        self.node.as_ref().is_some_and(NodeEnd::has_reports)
    }

    /// The register moved, as far as this member hears.
    pub fn learn(&mut self, view: RegisterView, now: Instant) {
        if view.state.version >= self.kept.view.state.version {
            self.kept.view = view.clone();
        }
        self.agent.handle_register(view, now);
    }

    pub fn ask(&mut self, request: u64, from: NodeNo, ask: Ask, now: Instant) {
        self.asked.insert(request, from);
        self.agent.handle_ask(request, Some(&Proved::of([name_of(from).as_str()])), ask, now);
    }

    pub fn answered(&mut self, id: AskId, answer: Result<Answer, String>, now: Instant) {
        self.agent.handle_answer(id, answer, now);
    }

    pub fn proposed(&mut self, id: u64, outcome: Result<Outcome, String>, now: Instant) {
        self.agent.handle_proposed(id, outcome, now);
    }

    pub fn voters_changed(&mut self, outcome: Result<(), String>, now: Instant) {
        self.agent.handle_voters_changed(outcome, now);
    }

    /// The promise is on the disk.
    pub fn promised(&mut self, epoch: Epoch, now: Instant) {
        self.kept.promised = self.kept.promised.max(epoch);
        self.agent.handle_promised(epoch, Ok(()), now);
    }

    /// An operator's command, whose outcome nobody waits for.
    pub fn command(&mut self, command: Command, now: Instant) {
        self.last_command += 1;
        self.agent.handle_command(self.last_command, command, now);
    }

    /// What the simulator has to carry out.
    pub fn poll_output(&mut self) -> Option<Output> {
        loop {
            match self.agent.poll_output()? {
                Output::Order(order) => self.order(Order::Agent(order)),
                Output::Lease(until) => self.set_lease(until),
                Output::MayElect(may) => self.may_elect = may,
                Output::Blocked(_) => {}
                output => return Some(output),
            }
        }
    }

    /// Who asked what is answered now.
    pub fn asker(&mut self, request: u64) -> Option<NodeNo> {
        self.asked.remove(&request)
    }

    /// This incarnation is over; the next one has this id.
    pub fn begin_anew(&mut self, over: Over, id: MemberId, now: Instant) {
        self.kept = match over {
            Over::Removed(version) => Kept::new(id, Epoch(0), Some(version)),
            Over::Anew => Kept::new(id, Epoch(0), self.kept.removed),
            Over::Forced(mut state) => {
                state.begin_alone(&self.name, id);
                let mut kept = Kept::new(id, self.kept.promised, None);
                kept.view.state = ClusterState::clone(&state);
                kept
            }
        };
        self.asked.clear();
        self.set_lease(None);
        self.order(Order::BeginAnew(self.kept.id, self.kept.promised));
        let (kept, view) = (self.kept.for_agent(), self.kept.view.clone());
        self.agent = Agent::new(self.config.clone(), kept, view, self.node.is_some(), now);
    }
}

/// A change of the register on its way.
#[derive(Debug)]
pub struct Proposal {
    pub id: u64,
    pub change: Box<Change>,
}
