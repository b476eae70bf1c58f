//! What goes into an agent and comes out of it: configuration, orders, reports, outputs.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use walferry_engine::lsn::{Epoch, Lsn};

use crate::control::{Answer, Ask, Greeting};
use crate::member::{ClusterId, MemberName};
use crate::quorum_rule::QuorumRule;
use crate::register::{Change, ClusterState, Kind, MemberId};

/// A change of the register that takes longer has failed or is on its way; both are seen in the register.
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

/// The reason of an answer that is not the one that was hoped for.
pub(super) fn refusal(answer: Result<Answer, String>, whom: &str) -> String {
    match answer {
        Ok(Answer::Refused(text)) => text,
        Ok(_) => format!("{whom}: not an answer"),
        Err(error) => format!("{whom}: {error}"),
    }
}
