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
mod state;
pub(crate) mod types;
mod voters;

pub use types::{
    AgentConfig, AskId, CHANGE_TIME_MAX, Command, FORMING_TEXT, Kept, LogEnd, NodeFacts, Order, Output, Over,
    RegisterView, Report, VoterStep,
};

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use walferry_engine::lsn::Epoch;
use walferry_engine::told::Told;

use self::state::commands::Commands;
use self::state::contacts::Contacts;
use self::state::leading::{Leading, Role};
use self::state::members::MemberChanges;
use self::state::voters::Voters;
use self::types::{Asker, ProposalFor, Purpose};
use crate::control::{Answer, Ask};
use crate::failover::Failover;
use crate::lease::Voter;
use crate::member::MemberName;
use crate::register::{Change, MemberRole, Outcome};

/// A member that was removed while it controls the register waits so long before it begins anew: the others hear of it first.
const REMOVED_PAUSE: Duration = Duration::from_secs(1);

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
    role: Role,
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
            role: Role::new(epoch_known),
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
