//! The member agent: everything that a member of a cluster decides beside its log. It grants and holds leases, answers
//! pre-votes and fence requests, replaces a silent leader, keeps the in-sync set and the register's voters, and changes the
//! members. A core without I/O: messages, reports of the node, the register's answers and the time come in; messages,
//! proposals and orders to the node come out. The daemon's cluster thread and the simulator are its two drivers.
//!
//! ```text
//!  other members ── handle_ask, handle_answer ──┐            ┌── Ask, Answer ───────────────> other members
//!  node ─────────── handle_report, set_node ────┤            ├── Order, Lease, Blocked ─────> node
//!  register ─────── handle_register, _proposed, ┼─> Agent ───┼── Propose, ChangeVoters, Form ───────> register
//!                   _voters_changed, _promised          │   (turn)   ├── Promise ─────────────────> the member's disk
//!  operators ────── handle_command ─────────────┘            └── Reply ───────────────────> operators
//! ```
//!
//! The driver's duties, in this order: 1. hand over what came, with the time; 2. take outputs with [`Agent::poll_output`] until there
//! are none, and carry each out. [`Output::Promise`] is made durable before [`Agent::handle_promised`] says so; until then the agent
//! answers no fence request. 3. Call [`Agent::handle_timeout`] when [`Agent::poll_timeout`] has passed. 4. At [`Output::Over`] this
//! incarnation of the member ends, and the driver makes the next one.
//!
//! One turn of the agent, after whatever came in: follow the register; look for the other members; tell the node its role; send
//! heartbeats; replace the leader; keep the in-sync set; keep the voters; carry on with what operators asked for.

mod answers;
mod commands;
mod contacts;
mod leading;
mod members;
mod replacing;
mod voters;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use walferry_engine::lsn::{Epoch, Lsn};
use walferry_engine::told::Told;

use crate::control::{Answer, Ask, Greeting};
use crate::failover::Failover;
use crate::lease::Voter;
use crate::member::{ClusterId, MemberName};
use crate::quorum_rule::QuorumRule;
use crate::register::{Change, ClusterState, Kind, MemberId, MemberRole, Outcome};

use commands::Commands;
use contacts::Contacts;
use leading::Leading;
use members::MemberChanges;
use voters::Voters;

/// A change of the register that takes longer has failed or is on its way; both are seen in the register.
pub const CHANGE_TIME_MAX: Duration = Duration::from_secs(5);
/// A member that was removed while it controls the register waits so long before it begins anew: the others hear of it first.
const REMOVED_PAUSE: Duration = Duration::from_secs(1);

/// The number of a message that this member sent, by which its answer is known.
pub type AskId = u64;

/// What a member is started with.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// Its name.
    pub name: MemberName,
    /// Data or witness.
    pub kind: Kind,
    /// Peer addresses of all members, as every one of them was started with.
    pub members: BTreeMap<MemberName, String>,
    /// Where clients reach it; empty for a witness.
    pub client_address: String,
    /// The cluster that its log belongs to, if it has one.
    pub cluster_id: Option<ClusterId>,
    /// The cluster id of a cluster that is formed by members without logs; random.
    pub new_cluster_id: ClusterId,
    /// A leader that is silent for so long is replaced. A cluster that was formed goes by the value in its register.
    pub election_timeout: Duration,
    /// How often a leader sends heartbeats.
    pub heartbeat_interval: Duration,
    /// The sync policy of a cluster that is formed; empty for a majority.
    pub policy: String,
    /// How many replicas have to be in sync for commits at remote levels, under this member.
    pub min_in_sync: usize,
    /// The newest epoch that the node's log knew when the process started.
    pub history_epoch: Epoch,
}

impl AgentConfig {
    /// The members as `name=address`, ascending: what greetings compare.
    pub fn member_texts(&self) -> Vec<String> {
        self.members.iter().map(|(name, peer)| format!("{name}={peer}")).collect()
    }
}

/// What this incarnation of the member keeps on its disk, as it was when the agent starts.
#[derive(Clone, Debug)]
pub struct Kept {
    /// The incarnation.
    pub id: MemberId,
    /// It refuses leaders of older epochs.
    pub promised: Epoch,
    /// The version of the register with which an earlier incarnation was removed, if that is why this one began.
    pub removed: Option<u64>,
}

/// What this member knows of the register and of the engine that holds it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RegisterView {
    /// The value.
    pub state: ClusterState,
    /// This member belongs to a register.
    pub formed: bool,
    /// Who may change the register.
    pub controller: Option<MemberId>,
    /// This member may, and knows all that was changed before.
    pub controls: bool,
    /// Those that vote about the register.
    pub voters: BTreeSet<MemberId>,
    /// Those that the register is told to; the voters among them.
    pub told: BTreeSet<MemberId>,
    /// A change of the voters is under way.
    pub joint: bool,
}

/// How far a node's log reaches, once nothing moves it any more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogEnd {
    /// The epoch of its last frame.
    pub last_epoch: Epoch,
    /// Its durable end.
    pub flushed: Lsn,
}

/// What the agent goes by of its node in each turn. A witness has no node.
#[derive(Clone, Copy, Debug, Default)]
pub struct NodeFacts {
    /// The end of its log.
    pub end: Lsn,
    /// Its ring thread has not turned for too long: it must not be kept alive as a leader.
    pub stuck: bool,
}

/// What the node is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// Lead in this epoch.
    Lead(Epoch),
    /// Follow this member in this epoch.
    Follow {
        /// Its peer address.
        peer: String,
        /// In which epoch.
        epoch: Epoch,
    },
    /// Nobody leads; why.
    Leaderless(String),
    /// Take nothing from leaders of epochs before this one, and report [`Report::Fenced`] once nothing moves the log any more.
    Fence(Epoch),
    /// Take no writes until this replica has everything, then report [`Report::Drained`].
    Drain(u64, MemberName),
    /// Let commits need this quorum rule as well, and report [`Report::Proved`] when all that was before is confirmed under them, or
    /// why it is not; then they are no longer needed.
    Joint(u64, QuorumRule),
    /// From this version of the register on its own quorum rule suffices again.
    JointEnds(u64),
    /// The register has the in-sync set of the report with this number, and nothing that was proposed before can change it.
    InSyncRecorded(u64),
    /// The register moved.
    State(Box<ClusterState>),
    /// Where clients of the leader of this epoch connect.
    LeaderAddress(Epoch, String),
}

/// What the node reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// Who keeps up, as the leader of this epoch sees it, each by the incarnation that proved it; the report's number in this
    /// epoch.
    InSync(Epoch, u64, BTreeMap<MemberName, MemberId>),
    /// The leader of this epoch cannot go on.
    Unfit(Epoch),
    /// The node takes nothing from leaders of epochs before this one; how far its log is. `None`: its log is stopped.
    Fenced(Epoch, Option<LogEnd>),
    /// What became of a drain.
    Drained(u64, Result<(), String>),
    /// What became of a proof.
    Proved(u64, Result<(), String>),
}

/// What an operator asks of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Another leader, without any loss.
    Switchover(Option<MemberName>),
    /// A leader, whatever is lost.
    AllowUnclean,
    /// A node shall be a member; its peer address if it is to be given.
    Join(MemberName, Option<String>),
    /// A member shall be none any more.
    Remove(MemberName),
    /// This member goes on as a cluster of its own: the others are gone for good.
    ForceNewCluster,
}

/// A step of the register's voters towards the members.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VoterStep {
    /// Tell the register to this incarnation, reached there, which does not vote yet; done once it has caught up.
    Admit(MemberId, String),
    /// These vote from now on.
    Voters(BTreeSet<MemberId>),
    /// These are not told the register any more.
    Forget(BTreeSet<MemberId>),
}

/// Why this incarnation of the member ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Over {
    /// It was removed with this version of the register: the next incarnation waits to be taken in.
    Removed(u64),
    /// A member asked it to forget a register in which it has no part; the next incarnation can be taken in.
    Anew,
    /// The operator made this member a cluster of its own, whose register begins with this state.
    Forced(Box<ClusterState>),
}

/// What the driver has to do.
#[derive(Debug)]
pub enum Output {
    /// Ask another member; [`Agent::handle_answer`] tells what came of it, within the time.
    Ask {
        /// The number of the question.
        id: AskId,
        /// Whom.
        to: MemberName,
        /// Its peer address.
        peer: String,
        /// What.
        ask: Box<Ask>,
        /// How long an answer may take.
        timeout: Duration,
    },
    /// Answer another member's question, which came with this number.
    Answer(u64, Box<Answer>),
    /// Make the promise durable to refuse leaders of epochs before this one; then [`Agent::handle_promised`].
    Promise(Epoch),
    /// Change the register, which this member controls; then [`Agent::handle_proposed`].
    Propose(u64, Box<Change>),
    /// Make a new register of these voters.
    Form(BTreeMap<MemberId, String>),
    /// Take this step, as the controller; then [`Agent::handle_voters_changed`].
    ChangeVoters(VoterStep),
    /// Whether this member may control the register, or try to.
    MayElect(bool),
    /// An order to the node.
    Order(Order),
    /// Until when the node may speak as leader.
    Lease(Option<Instant>),
    /// Why nobody leads, for people; empty when nothing is wrong.
    Blocked(String),
    /// The outcome of an operator's command, which came with this number.
    Reply(u64, Result<String, String>),
    /// This incarnation ends.
    Over(Over),
}

/// Whom an answer goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asker {
    /// Another member, whose question has this number at the driver.
    Peer(u64),
    /// This member itself.
    Own(AskId),
}

/// What a question of this member is for.
#[derive(Clone, Debug)]
enum Purpose {
    Heartbeat { sent_at: Instant, epoch: Epoch },
    PreVote,
    Fence,
    Greet,
    Look,
    InSync,
    TakeBack(Greeting),
    Nothing,
    Command(u64),
    Members,
    InReach,
}

/// What a proposal of this member, which controls the register, is for.
#[derive(Clone, Copy, Debug)]
enum ProposalFor {
    Failover,
    TakeBack,
    First,
    Asker(Asker),
}

/// One incarnation of a member.
#[derive(Debug)]
pub struct Agent {
    config: AgentConfig,
    kept: Kept,
    view: RegisterView,
    node: Option<NodeFacts>,
    /// In force: the register's, before there is one the configured.
    election_timeout: Duration,
    voter: Voter,
    failover: Failover,
    contacts: Contacts,
    leading: Leading,
    fencing: replacing::Fencing,
    voters: Voters,
    changes: MemberChanges,
    commands: Commands,
    role: leading::Role,
    asks: BTreeMap<AskId, (MemberName, Purpose)>,
    proposals: BTreeMap<u64, ProposalFor>,
    last_id: u64,
    /// This incarnation was removed, with which version, and when that was heard.
    removed: Option<(u64, Instant)>,
    outputs: VecDeque<Output>,
    over: bool,
    /// What the log has told of proposals that were refused; they are made again.
    told: Told,
}

impl Agent {
    /// A member that starts now. A witness has no node.
    pub fn new(config: AgentConfig, kept: Kept, view: RegisterView, has_node: bool, now: Instant) -> Agent {
        let election_timeout = view.state.election_timeout().unwrap_or(config.election_timeout);
        let epoch_known = view.state.epoch.max(config.history_epoch);
        let mut agent = Agent {
            voter: Voter::new(kept.promised, election_timeout, now),
            failover: Failover::new(config.name.clone(), election_timeout, config.heartbeat_interval),
            contacts: Contacts::new(now),
            leading: Leading::new(now),
            fencing: replacing::Fencing::default(),
            voters: Voters::new(now),
            changes: MemberChanges::new(now),
            commands: Commands::default(),
            role: leading::Role::new(epoch_known),
            node: has_node.then(NodeFacts::default),
            config,
            kept,
            view,
            election_timeout,
            asks: BTreeMap::new(),
            proposals: BTreeMap::new(),
            last_id: 0,
            removed: None,
            outputs: VecDeque::new(),
            over: false,
            told: Told::default(),
        };
        agent.compare_timeouts();
        agent.turn(now);
        agent
    }

    /// What the driver has to do next.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// What the node is like now; before anything else of a turn is handed over.
    pub fn set_node(&mut self, facts: NodeFacts) {
        if let Some(node) = &mut self.node {
            *node = facts;
        }
    }

    /// Nothing came, and the time of [`Agent::poll_timeout`] has passed.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.turn(now);
    }

    /// The register or its engine moved.
    pub fn handle_register(&mut self, view: RegisterView, now: Instant) {
        if view.state.version >= self.view.state.version {
            self.view = view;
            self.learn_timeout();
        }
        self.turn(now);
    }

    /// The register takes or refuses a proposal of this member.
    pub fn handle_proposed(&mut self, id: u64, outcome: Result<Outcome, String>, now: Instant) {
        match self.proposals.remove(&id) {
            None => {}
            Some(ProposalFor::Failover) => {
                if let Err(error) = outcome
                    && self.told.tell(&error, now).is_some()
                {
                    tracing::warn!("a new leader could not be agreed on: {error}");
                }
                self.failover.handle_proposed();
            }
            Some(ProposalFor::TakeBack) => {
                if let Err(error) = outcome
                    && self.told.tell(&error, now).is_some()
                {
                    tracing::warn!("a member is not taken back yet: {error}");
                }
                self.contacts.end_taking_back(now + self.election_timeout);
            }
            Some(ProposalFor::First) => match outcome {
                Ok(_) => tracing::info!("the cluster is formed"),
                Err(error) => {
                    if self.told.tell(&error, now).is_some() {
                        tracing::warn!("the cluster is not formed yet: {error}");
                    }
                }
            },
            Some(ProposalFor::Asker(asker)) => {
                let answer = outcome.map_or_else(Answer::Refused, Answer::Change);
                self.answer(asker, answer, now);
            }
        }
        self.turn(now);
    }

    /// When something is due although nothing comes.
    pub fn poll_timeout(&self, now: Instant) -> Instant {
        let mut next = self.contacts.greet_at();
        next = next.min(self.leading.heartbeat_at().unwrap_or(next));
        if self.view.controls && self.view.state.version > 0 {
            next = next.min(now + self.failover.next_timeout(self.voter.grant_left(now), now));
        }
        for at in [self.changes.timeout(), self.commands.timeout()].into_iter().flatten() {
            next = next.min(at);
        }
        // A timer that is due already is one that its duty could not serve yet: the driver must not spin on it.
        next.max(now + Duration::from_millis(1))
    }

    /// One turn of all duties.
    fn turn(&mut self, now: Instant) {
        if self.over {
            return;
        }
        if let Some(version) = self.is_removed(now) {
            return self.end(Over::Removed(version));
        }
        self.watch_reach(now);
        self.look_around(now);
        self.tell_node(now);
        self.send_heartbeats(now);
        self.replace_leader(now);
        self.keep_in_sync(now);
        self.keep_voters(now);
        self.turn_changes(now);
        self.turn_commands(now);
    }

    fn end(&mut self, over: Over) {
        self.over = true;
        self.outputs.push_back(Output::Lease(None));
        self.outputs.push_back(Output::Over(over));
    }

    /// The version with which this incarnation was removed, once nothing keeps it any more.
    fn is_removed(&mut self, now: Instant) -> Option<u64> {
        if let (None, Some(version)) = (self.removed, self.view.state.removed_at(self.kept.id)) {
            self.removed = Some((version, now));
        }
        let (version, since) = self.removed?;
        let controls = self.view.controller == Some(self.kept.id);
        (!controls || now.saturating_duration_since(since) >= REMOVED_PAUSE).then_some(version)
    }

    /// The cluster's election timeout binds every lease and every grant, whatever this member was configured with.
    fn learn_timeout(&mut self) {
        let Some(timeout) = self.view.state.election_timeout().filter(|timeout| *timeout != self.election_timeout)
        else {
            return;
        };
        self.election_timeout = timeout;
        self.voter.set_election_timeout(timeout);
        self.failover.set_election_timeout(timeout);
        self.compare_timeouts();
    }

    fn compare_timeouts(&self) {
        let (own, agreed) = (self.config.election_timeout, self.election_timeout);
        if own != agreed {
            tracing::warn!(
                "election_timeout = {own:?} is configured here and {agreed:?} was agreed on when the cluster was formed: leases need \
                 the same on all members, so {agreed:?} is used"
            );
        }
    }

    /// True when this incarnation is a member.
    fn is_member(&self) -> bool {
        self.view.state.knows(&self.config.name, self.kept.id)
    }

    fn leads_by_register(&self) -> bool {
        self.view.state.leader.as_ref() == Some(&self.config.name) && self.is_member()
    }

    fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    fn order(&mut self, order: Order) {
        if self.node.is_some() {
            self.outputs.push_back(Output::Order(order));
        }
    }

    /// Every member's name and peer address: as the register has them, before that as they were given.
    fn members(&self) -> Vec<(MemberName, String)> {
        if self.view.state.version == 0 {
            return self.config.members.iter().map(|(name, peer)| (name.clone(), peer.clone())).collect();
        }
        let members = self.view.state.members.iter();
        members.map(|(name, member)| (name.clone(), member.peer.clone())).collect()
    }

    /// Asks a member, this one without a message.
    fn ask(&mut self, to: &MemberName, peer: &str, ask: Ask, timeout: Duration, purpose: Purpose, now: Instant) {
        let id = self.next_id();
        self.asks.insert(id, (to.clone(), purpose));
        if *to == self.config.name {
            self.handle_ask_of(Asker::Own(id), ask, now);
        } else {
            let (to, peer, ask) = (to.clone(), peer.to_owned(), Box::new(ask));
            self.outputs.push_back(Output::Ask { id, to, peer, ask, timeout });
        }
    }

    /// Asks every member, this one included.
    fn ask_all(&mut self, ask: &Ask, timeout: Duration, purpose: &Purpose, now: Instant) {
        for (name, peer) in self.members() {
            self.ask(&name, &peer, ask.clone(), timeout, purpose.clone(), now);
        }
    }

    /// Asks whoever controls the register.
    fn ask_controller(&mut self, ask: Ask, timeout: Duration, purpose: Purpose, now: Instant) {
        let state = &self.view.state;
        let controller = self.view.controller;
        let found = controller.and_then(|id| state.members.iter().find(|(_, member)| member.id == id));
        match found.map(|(name, member)| (name.clone(), member.peer.clone())) {
            Some((name, peer)) => self.ask(&name, &peer, ask, timeout, purpose, now),
            None => {
                let name = self.config.name.clone();
                self.take_answer(name, purpose, Err("nobody controls the register at the moment".to_owned()), now);
            }
        }
    }

    fn answer(&mut self, asker: Asker, answer: Answer, now: Instant) {
        match asker {
            Asker::Peer(request) => self.outputs.push_back(Output::Answer(request, Box::new(answer))),
            Asker::Own(id) => {
                if let Some((name, purpose)) = self.asks.remove(&id) {
                    self.take_answer(name, purpose, Ok(answer), now);
                }
            }
        }
    }

    /// A member answered, or did not in time.
    pub fn handle_answer(&mut self, id: AskId, answer: Result<Answer, String>, now: Instant) {
        if let Some((name, purpose)) = self.asks.remove(&id) {
            if answer.is_ok() {
                self.contacts.heard(&name, now);
            }
            self.take_answer(name, purpose, answer, now);
        }
        self.turn(now);
    }

    /// No answer comes to what was asked of a member: it is there, and its connections are of another kind than this one's.
    pub fn handle_misfit(&mut self, id: AskId, why: String, now: Instant) {
        if let Some((name, _)) = self.asks.get(&id) {
            self.contacts.misfit(name, why.clone());
        }
        self.handle_answer(id, Err(why), now);
    }

    fn take_answer(&mut self, from: MemberName, purpose: Purpose, answer: Result<Answer, String>, now: Instant) {
        match purpose {
            // Whatever it was for: this incarnation was removed, or so the other one's register says.
            Purpose::Heartbeat { .. } | Purpose::PreVote | Purpose::Fence | Purpose::Look | Purpose::InReach
                if matches!(answer, Ok(Answer::Unidentified(_))) =>
            {
                self.take_greeted(from, answer, now);
            }
            Purpose::Heartbeat { sent_at, epoch } => self.take_heartbeat_answer(&from, sent_at, epoch, answer, now),
            Purpose::PreVote => self.take_pre_vote(&from, answer),
            Purpose::Fence => self.take_fenced(&from, answer, now),
            Purpose::Greet => self.take_greeted(from, answer, now),
            Purpose::Look => self.take_look(answer),
            Purpose::InSync => self.take_in_sync_answer(answer, now),
            Purpose::TakeBack(greeting) => self.take_back_verified(greeting, answer, now),
            Purpose::Command(command) => self.take_command_answer(command, &from, answer, now),
            Purpose::Members => self.take_members_answer(answer, now),
            // A refusal is that of an incarnation without a vote: its disk was lost, and it was not taken back yet.
            Purpose::InReach => self.take_in_reach(from, matches!(answer, Ok(Answer::PreVote { .. })), now),
            Purpose::Nothing => {}
        }
    }

    fn propose(&mut self, change: Change, purpose: ProposalFor) {
        let id = self.next_id();
        self.proposals.insert(id, purpose);
        self.outputs.push_back(Output::Propose(id, Box::new(change)));
    }
}

/// The reason of an answer that is not the one that was hoped for.
fn refusal(answer: Result<Answer, String>, whom: &str) -> String {
    match answer {
        Ok(Answer::Refused(text)) => text,
        Ok(_) => format!("{whom}: not an answer"),
        Err(error) => format!("{whom}: {error}"),
    }
}

/// What a member says while nobody leads yet, and nothing is wrong.
pub const FORMING_TEXT: &str = "the cluster is being formed";

/// What this member does by the register; see [`ClusterState::part_of`].
fn member_role(agent: &Agent, epochs_before: Epoch) -> MemberRole {
    if agent.is_member() {
        agent.view.state.role_of(&agent.config.name, epochs_before)
    } else {
        MemberRole::Wait(agent.waiting_for())
    }
}

#[cfg(test)]
#[path = "agent_tests.rs"]
mod tests;
