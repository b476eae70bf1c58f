//! What goes into an agent and comes out of it: configuration, orders, reports, outputs.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use walferry_engine::lsn::{Epoch, Lsn};

use crate::control::{Answer, Ask, Greeting};
use crate::member::{ClusterId, MemberName};
use crate::quorum_rule::QuorumRule;
use crate::register::{Change, ClusterState, Kind, MemberId};

/// How long a change of the register may take. The register shows later whether a change that took longer was made.
pub const CHANGE_TIME_MAX: Duration = Duration::from_secs(5);

/// What a member says while nobody leads yet, and nothing is wrong.
pub const FORMING_TEXT: &str = "the cluster is being formed";

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
    /// A leader that is silent for this long is replaced. Once the cluster is formed, the value in its register is used instead.
    pub election_timeout: Duration,
    /// How often a leader sends heartbeats.
    pub heartbeat_interval: Duration,
    /// The sync policy of a cluster that is formed; empty for a majority.
    pub policy: String,
    /// While this member leads, commits at remote levels need this many replicas in sync.
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
    /// The member refuses leaders of epochs before this one.
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
    /// This member may change the register, and knows every earlier change.
    pub controls: bool,
    /// Those that vote about the register.
    pub voters: BTreeSet<MemberId>,
    /// The incarnations that the register is sent to, voters included.
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

/// The facts about its node that the agent uses in each turn. A witness has no node.
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
    /// Nobody leads, with the reason.
    Leaderless(String),
    /// Take nothing from leaders of epochs before this one, and report [`Report::Fenced`] once nothing moves the log any more.
    Fence(Epoch),
    /// Take no writes until this replica has everything, then report [`Report::Drained`].
    Drain(u64, MemberName),
    /// Let commits need this quorum rule as well, and report [`Report::Proved`] when every earlier commit is confirmed under it, or
    /// the reason why not, after which the rule is no longer needed.
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
    /// The leader of this epoch has failed and must be replaced.
    Unfit(Epoch),
    /// The node takes nothing from leaders of epochs before this one; how far its log is. `None`: its log is stopped.
    Fenced(Epoch, Option<LogEnd>),
    /// The outcome of a drain.
    Drained(u64, Result<(), String>),
    /// The outcome of a proof.
    Proved(u64, Result<(), String>),
}

/// What an operator asks of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Change the leader, without any loss.
    Switchover(Option<MemberName>),
    /// Choose a leader even if confirmed commits are lost.
    AllowUnclean,
    /// Make a node a member. The peer address is optional.
    Join(MemberName, Option<String>),
    /// Remove a member.
    Remove(MemberName),
    /// Make this member a cluster of its own, because the others are gone for good.
    ForceNewCluster,
}

/// A step of the register's voters towards the members.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VoterStep {
    /// Send the register to this incarnation at this address. It does not vote yet; the step is done once it has caught up.
    Admit(MemberId, String),
    /// These vote from now on.
    Voters(BTreeSet<MemberId>),
    /// Stop sending the register to these.
    Forget(BTreeSet<MemberId>),
}

/// Why this incarnation of the member ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Over {
    /// It was removed with this version of the register. The next incarnation waits until it is taken in.
    Removed(u64),
    /// A member asked it to forget a register in which it has no part; the next incarnation can be taken in.
    Anew,
    /// The operator made this member a cluster of its own, whose register begins with this state.
    Forced(Box<ClusterState>),
}

/// What the driver has to do.
#[derive(Debug)]
pub enum Output {
    /// Ask another member; its driver calls [`Agent::handle_answer`] with the outcome, within the timeout.
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
    /// Until when the node may act as leader.
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
pub(super) enum Asker {
    /// Another member, whose question has this number at the driver.
    Peer(u64),
    /// This member itself.
    Own(AskId),
}

/// What a question of this member is for.
#[derive(Clone, Debug)]
pub(super) enum Purpose {
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
pub(super) enum ProposalFor {
    Failover,
    TakeBack,
    First,
    Asker(Asker),
}

/// The reason why an answer is not the expected one.
pub(super) fn refusal(answer: Result<Answer, String>, whom: &str) -> String {
    match answer {
        Ok(Answer::Refused(text)) => text,
        Ok(_) => format!("{whom}: not an answer"),
        Err(error) => format!("{whom}: {error}"),
    }
}
