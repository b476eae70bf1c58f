//! The cluster thread: carries bytes between the member agent (`walferry_cluster::agent`), which decides, and what it acts on: the
//! other members' sockets, the register's engine, the member's disk, and the node. Decides nothing itself.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, mpsc as std_mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rand::RngExt;
use tokio::sync::{mpsc, oneshot};
use walferry_cluster::agent::{Agent, AskId, CHANGE_TIME_MAX, Kept, NodeFacts, Output, Over, VoterStep};
use walferry_cluster::consensus::{Carrier, Register, RegisterStore, Rpc, RpcReply};
use walferry_cluster::control::{Answer, Ask};
use walferry_cluster::member::{Caller, Proved};
use walferry_cluster::register::{MemberId, Outcome};
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_engine::waker::Waker;
use walferry_engine::world;
use walferry_tls::PeerLinks;

use super::{ClusterConfig, Order, Reply, Report, Shared};
use crate::cluster::wire::{Answering, Door, Peer, serve};
use crate::error::DaemonError;

/// A leader whose ring thread has not turned for so long sends no heartbeats any more.
const STUCK_TIME_MAX: Duration = Duration::from_secs(5);
/// The nice level of the thread.
const THREAD_NICE: libc::c_int = -10;
/// How long a step of the register's voters may take.
const VOTER_STEP_TIME_MAX: Duration = Duration::from_secs(10);
/// Outcomes that an ended incarnation still delivers: its last answers are given so long to leave.
const LAST_WORDS_TIME: Duration = Duration::from_millis(50);

/// The way to the node.
#[derive(Clone)]
pub(super) struct NodeEnd {
    pub(super) orders: std_mpsc::Sender<Order>,
    pub(super) waker: Waker,
    pub(super) shared: Arc<Shared>,
}

impl NodeEnd {
    pub(super) fn order(&self, order: Order) {
        // A node that has ended takes no orders; its process ends next.
        let _ = self.orders.send(order);
        self.waker.wake();
    }

    fn block(&self, text: &str) {
        text.clone_into(&mut self.shared.blocked_reason.lock().expect("nobody panics with it"));
    }

    fn facts(&self) -> NodeFacts {
        let end = Lsn(self.shared.end.load(std::sync::atomic::Ordering::Relaxed));
        NodeFacts { end, stuck: self.shared.is_stuck(STUCK_TIME_MAX) }
    }
}

/// Starts the thread; it ends when the node's reports do.
pub(super) fn spawn(
    config: ClusterConfig,
    store: RegisterStore,
    listener: std::net::TcpListener,
    node: Option<NodeEnd>,
    reports: mpsc::UnboundedReceiver<Report>,
) -> Result<JoinHandle<()>, DaemonError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|source| DaemonError::Thread { name: "cluster", source })?;
    let run = move || {
        take_precedence();
        let outcome = runtime.block_on(run(config, store, listener, node.clone(), reports));
        if let Err(text) = outcome {
            tracing::error!("this node takes no part in its cluster any more: {text}");
            if let Some(node) = node {
                node.shared.lease.set(None);
                node.order(Order::End(text));
            }
        }
        runtime.shutdown_background();
    };
    std::thread::Builder::new()
        .name("cluster".to_owned())
        .spawn(run)
        .map_err(|source| DaemonError::Thread { name: "cluster", source })
}

/// Heartbeats are tiny and late ones cost an election: where the system allows it (`LimitNICE=` of the unit), this thread runs
/// before whatever else keeps the processors busy.
fn take_precedence() {
    // SAFETY: a plain system call; 0 is the calling thread.
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, THREAD_NICE) } != 0 {
        let error = std::io::Error::last_os_error();
        tracing::debug!(%error, "heartbeats have no precedence over other threads");
    }
}

/// One incarnation of the member after the other.
async fn run(
    config: ClusterConfig,
    mut store: RegisterStore,
    listener: std::net::TcpListener,
    node: Option<NodeEnd>,
    mut reports: mpsc::UnboundedReceiver<Report>,
) -> Result<(), String> {
    let door = Door::open(listener, &config.tls).map_err(|error| format!("cannot listen to peers: {error}"))?;
    let (door, peers) = (Arc::new(door), Peers::new(config.tls.links()));
    loop {
        let election_timeout = store.state().election_timeout().unwrap_or(config.agent.election_timeout);
        let register = Register::open(store.clone(), election_timeout, Arc::new(peers.clone())).await;
        let register = register.map_err(|error| error.to_string())?;
        let (events, inbox) = mpsc::unbounded_channel();
        let me = store.identity().id;
        let hub = Hub { me, register: register.clone(), events: events.clone(), node: node.clone() };
        let serving = tokio::spawn(serve(Arc::clone(&door), Arc::new(hub)));
        let driver = Driver::new(&config, store.clone(), register.clone(), peers.clone(), node.clone(), events).await;
        let over = tokio::select! {
            over = driver.run(inbox, &mut reports) => over,
            failure = store.failure() => return Err(failure),
        };
        tokio::time::sleep(if over.is_some() { LAST_WORDS_TIME } else { Duration::ZERO }).await;
        serving.abort();
        let _ = register.close().await;
        let Some(over) = over else { return Ok(()) };
        let id = MemberId(rand::rng().random());
        let next = match over {
            Over::Removed(version) => {
                let name = &config.agent.name;
                tracing::warn!(
                    "removed from the cluster at version {version}; `walferry join --name {name}` takes it back"
                );
                store.begin_anew(id, Some(version)).await
            }
            Over::Anew => store.begin_anew(id, store.removed()).await,
            Over::Forced(mut state) => {
                state.begin_alone(&config.agent.name, id);
                store.begin_alone(id, *state).await
            }
        };
        store = next.map_err(|error| format!("it ended as a member and cannot begin anew: {error}"))?;
        if let Some(node) = &node {
            node.shared.lease.set(None);
            node.block("");
            node.order(Order::BeginAnew(store.identity().id, store.promised()));
        }
    }
}

/// Ways to other members, by their address.
#[derive(Clone)]
struct Peers {
    known: Arc<Mutex<HashMap<String, Arc<Peer>>>>,
    links: Arc<PeerLinks>,
}

impl Peers {
    fn new(links: Arc<PeerLinks>) -> Peers {
        Peers { known: Arc::default(), links }
    }

    fn at(&self, address: &str) -> Arc<Peer> {
        let mut peers = self.known.lock().expect("nobody panics with it");
        Arc::clone(
            peers.entry(address.to_owned()).or_insert_with(|| Arc::new(Peer::new(address, Arc::clone(&self.links)))),
        )
    }
}

impl Carrier for Peers {
    fn carry(
        &self,
        to: MemberId,
        peer: &str,
        rpc: Rpc,
        timeout: Duration,
    ) -> std::pin::Pin<Box<dyn Future<Output = io::Result<RpcReply>> + Send>> {
        let peer = self.at(peer);
        Box::pin(async move {
            match peer.ask(None, &Ask::Consensus(to, Box::new(rpc)), timeout).await? {
                Answer::Consensus(reply) => Ok(*reply),
                Answer::Refused(text) => Err(io::Error::other(text)),
                _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the answer is not to what was asked")),
            }
        })
    }
}

/// What connections and tasks tell the driver.
enum Event {
    Asked(Option<Proved>, Ask, oneshot::Sender<Answer>),
    Answered(AskId, Result<Answer, String>),
    Misfit(AskId, String),
    Promised(Epoch, Result<(), String>),
    Proposed(u64, Result<Outcome, String>),
    VotersChanged(Result<(), String>),
}

/// Why the driver turns.
enum Woken {
    Event(Event),
    Report(Report),
    /// The register or its engine moved.
    Register,
    /// Something is due.
    Time,
}

/// What answers the connections of other nodes: the register's engine its own messages, the agent everything else.
struct Hub {
    me: MemberId,
    register: Register,
    events: mpsc::UnboundedSender<Event>,
    node: Option<NodeEnd>,
}

impl Answering for Hub {
    async fn answer(self: Arc<Hub>, caller: Caller, ask: Ask) -> Answer {
        match ask {
            Ask::Consensus(to, _) if to != self.me => Answer::Refused(format!("{to} is gone, {} is here", self.me)),
            Ask::Consensus(_, rpc) => match self.register.answer(*rpc, caller.proved.as_ref()).await {
                Ok(reply) => Answer::Consensus(Box::new(reply)),
                Err(error) => Answer::Refused(error.to_string()),
            },
            ask => {
                let (sender, answer) = oneshot::channel();
                // An agent that is over drops the sender, which is an answer as well.
                let _ = self.events.send(Event::Asked(caller.proved, ask, sender));
                answer.await.unwrap_or_else(|_| Answer::Refused(format!("{} is over", self.me)))
            }
        }
    }

    fn log_connection(&self, socket: OwnedFd, caller: Caller) {
        if let Some(node) = &self.node {
            node.order(Order::Connection(socket, caller));
        }
    }
}

struct Driver {
    agent: Agent,
    store: RegisterStore,
    register: Register,
    formed: bool,
    peers: Peers,
    node: Option<NodeEnd>,
    events: mpsc::UnboundedSender<Event>,
    /// Who waits for the agent's answer, and for the outcome of a command.
    asked: BTreeMap<u64, oneshot::Sender<Answer>>,
    commands: BTreeMap<u64, Reply>,
    last: u64,
}

impl Driver {
    async fn new(
        config: &ClusterConfig,
        store: RegisterStore,
        register: Register,
        peers: Peers,
        node: Option<NodeEnd>,
        events: mpsc::UnboundedSender<Event>,
    ) -> Driver {
        let formed = register.is_formed().await;
        let kept = Kept { id: store.identity().id, promised: store.promised(), removed: store.removed() };
        let agent = Agent::new(config.agent.clone(), kept, register.view(formed), node.is_some(), world::now());
        let (asked, commands) = (BTreeMap::new(), BTreeMap::new());
        Driver { agent, store, register, formed, peers, node, events, asked, commands, last: 0 }
    }

    /// Runs this incarnation; `None` when the node ends.
    async fn run(
        mut self,
        mut inbox: mpsc::UnboundedReceiver<Event>,
        reports: &mut mpsc::UnboundedReceiver<Report>,
    ) -> Option<Over> {
        let (mut state, mut metrics) = (self.register.watch(), self.register.metrics());
        loop {
            if let Some(over) = self.carry_out() {
                return Some(over);
            }
            let wait = self.agent.poll_timeout(world::now()).saturating_duration_since(world::now());
            let woken = tokio::select! {
                event = inbox.recv() => Woken::Event(event?),
                report = reports.recv() => Woken::Report(report?),
                _ = state.changed() => Woken::Register,
                _ = metrics.changed() => Woken::Register,
                () = tokio::time::sleep(wait) => Woken::Time,
            };
            if let Some(node) = &self.node {
                self.agent.set_node(node.facts());
            }
            match woken {
                Woken::Event(event) => self.take_event(event),
                Woken::Report(report) => self.take_report(report),
                Woken::Register => self.look_at_register(),
                Woken::Time => self.agent.handle_timeout(world::now()),
            }
        }
    }

    fn look_at_register(&mut self) {
        self.formed = self.formed || self.register.seems_formed();
        self.agent.handle_register(self.register.view(self.formed), world::now());
    }

    fn take_event(&mut self, event: Event) {
        let now = world::now();
        match event {
            Event::Asked(proved, ask, sender) => {
                self.last += 1;
                self.asked.insert(self.last, sender);
                self.agent.handle_ask(self.last, proved.as_ref(), ask, now);
            }
            Event::Answered(id, answer) => self.agent.handle_answer(id, answer, now),
            Event::Misfit(id, why) => self.agent.handle_misfit(id, why, now),
            Event::Promised(epoch, outcome) => self.agent.handle_promised(epoch, outcome, now),
            Event::Proposed(id, outcome) => self.agent.handle_proposed(id, outcome, now),
            Event::VotersChanged(outcome) => self.agent.handle_voters_changed(outcome, now),
        }
    }

    fn take_report(&mut self, report: Report) {
        match report {
            Report::Agent(report) => self.agent.handle_report(report, world::now()),
            Report::Command(command, reply) => {
                self.last += 1;
                self.commands.insert(self.last, reply);
                self.agent.handle_command(self.last, command, world::now());
            }
        }
    }

    /// Does what the agent says; the end of this incarnation, if it has come.
    fn carry_out(&mut self) -> Option<Over> {
        let mut over = None;
        while let Some(output) = self.agent.poll_output() {
            match output {
                Output::Ask { id, to, peer, ask, timeout } => {
                    let peer = self.peers.at(&peer);
                    self.then(async move {
                        let answer = peer.ask(Some(&to), &ask, timeout).await;
                        match answer.as_ref().err().and_then(Peer::misfit_of) {
                            Some(why) => Event::Misfit(id, why),
                            None => Event::Answered(id, answer.map_err(|error| error.to_string())),
                        }
                    });
                }
                Output::Answer(request, answer) => {
                    if let Some(asked) = self.asked.remove(&request) {
                        // The other side may have hung up.
                        let _ = asked.send(*answer);
                    }
                }
                Output::Promise(epoch) => {
                    let store = self.store.clone();
                    self.then(async move {
                        Event::Promised(epoch, store.promise(epoch).await.map_err(|error| error.to_string()))
                    });
                }
                Output::Propose(id, change) => {
                    let register = self.register.clone();
                    self.then(async move {
                        let outcome = register.change(*change, CHANGE_TIME_MAX).await;
                        Event::Proposed(id, outcome.map_err(|error| error.to_string()))
                    });
                }
                Output::Form(voters) => {
                    let register = self.register.clone();
                    tokio::spawn(async move {
                        if let Err(error) = register.form(voters).await {
                            tracing::debug!("the register cannot be formed: {error}");
                        }
                    });
                }
                Output::ChangeVoters(step) => {
                    let register = self.register.clone();
                    self.then(async move { Event::VotersChanged(change_voters(&register, step).await) });
                }
                Output::MayElect(may) => self.register.may_elect(may),
                Output::Order(order) => self.order(Order::Agent(order)),
                Output::Lease(until) => self.set_lease(until),
                Output::Blocked(text) => {
                    if let Some(node) = &self.node {
                        node.block(&text);
                    }
                }
                Output::Reply(command, outcome) => self.reply(command, outcome),
                Output::Over(end) => over = Some(end),
            }
        }
        over
    }

    /// Waits for something beside the loop, which hears of it as an event.
    fn then(&self, event: impl Future<Output = Event> + Send + 'static) {
        let events = self.events.clone();
        tokio::spawn(async move {
            // The driver may have ended meanwhile.
            let _ = events.send(event.await);
        });
    }

    fn order(&self, order: Order) {
        if let Some(node) = &self.node {
            node.order(order);
        }
    }

    fn set_lease(&self, until: Option<Instant>) {
        if let Some(node) = &self.node {
            node.shared.lease.set(until);
            node.waker.wake();
        }
    }

    fn reply(&mut self, command: u64, outcome: Result<String, String>) {
        if let Some(reply) = self.commands.remove(&command) {
            *reply.lock().expect("nobody panics with it") = Some(outcome);
            if let Some(node) = &self.node {
                node.waker.wake();
            }
        }
    }
}

async fn change_voters(register: &Register, step: VoterStep) -> Result<(), String> {
    let outcome = match step {
        VoterStep::Admit(id, peer) => register.admit(id, peer, VOTER_STEP_TIME_MAX).await,
        VoterStep::Voters(voters) => register.set_voters(&voters, VOTER_STEP_TIME_MAX).await,
        VoterStep::Forget(ids) => register.forget(&ids, VOTER_STEP_TIME_MAX).await,
    };
    outcome.map_err(|error| error.to_string())
}
