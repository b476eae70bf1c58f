//! How a cluster replaces its leader. Run by the member that may change the register (the *controller*). A core: told what was
//! heard and what time it is, it says whom to ask what, and at last which change to propose. It knows neither sockets nor the
//! engine that holds the register.
//!
//! ```text
//! Watching ──(the leader is silent)──> PreVoting ───(a majority hears nothing of it either)──> Fencing
//!    ^   └────────(no leader yet, or it asked to be replaced)────────────────────────────────────^  │
//!    └──(the register moved)── Proposed <──(a majority is fenced, and no commit can be missing)────┘
//! ```
//!
//! A fenced member has made durable that it takes nothing from leaders of older epochs any more, and says how far its log
//! reaches (Kafka's and BookKeeper's fencing; Raft's vote with Kafka's in-sync set in place of the log's majority). The
//! pre-vote disturbs nobody: a member that comes back from a partition learns by it that the leader is alive (Raft's PreVote).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_engine::mutants;

use crate::member::MemberName;
use crate::register::{Awaited, Change, ClusterState, Kind, LogStatus, MemberId};

/// A proposal that has not come back for so many election timeouts is looked at anew.
const PROPOSAL_TIMEOUTS: u32 = 4;

/// What a fenced member said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fenced {
    /// Its incarnation: a promise is lost with the disk that holds it.
    pub id: MemberId,
    /// It refuses leaders of older epochs; at least the epoch that was asked for.
    pub promised: Epoch,
    /// The epoch of the last frame in its log; 0 for a witness and for an empty log.
    pub last_epoch: Epoch,
    /// The durable end of its log.
    pub flushed: Lsn,
    /// Until when the old leader may still rest a lease on this member's grant.
    pub granted_until: Instant,
}

/// Whom to ask what. Questions go to every member, this one included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Does the member hear of the leader?
    PreVote,
    /// Promise to refuse leaders of epochs before this one, and say how far your log is.
    Fence(Epoch),
    /// Change the register.
    Propose(Change),
}

/// The leader consents to being replaced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepDown {
    /// It cannot go on: its log failed. Started again it is the last choice, for what only it has.
    Unfit,
    /// This member shall lead, if it reaches as far as every other.
    TransferLeadership(MemberName),
}

/// A failover that is under way, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlockedReason {
    /// No majority says that the leader is silent; so many do.
    PreVoting {
        /// Members that do not hear the leader.
        silent: usize,
        /// How many are needed.
        majority: usize,
    },
    /// Too few members have answered.
    Majority {
        /// Members that have.
        fenced: Vec<MemberName>,
        /// How many are needed.
        majority: usize,
    },
    /// Members that have answered may lack a commit that was confirmed.
    Unsafe(Awaited),
}

impl fmt::Display for BlockedReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BlockedReason::PreVoting { silent, majority } => {
                write!(
                    f,
                    "the leader is silent here; {silent} members do not hear it, {majority} are needed to replace it"
                )
            }
            BlockedReason::Majority { fenced, majority } => {
                let names: Vec<&str> = fenced.iter().map(MemberName::as_str).collect();
                write!(f, "no leader: waiting for a majority of {majority} members; answering: {}", names.join(", "))
            }
            BlockedReason::Unsafe(awaited) => {
                write!(f, "no leader: a commit that was confirmed may be missing here; waiting for {awaited}")
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Phase {
    Watching,
    PreVoting { silent: BTreeSet<MemberName>, ask_at: Instant },
    Fencing { epoch: Epoch, fenced: BTreeMap<MemberName, Fenced>, ask_at: Instant, since: Instant },
    Proposed { at: Instant },
}

/// The controller's state machine.
#[derive(Clone, Debug)]
pub struct Failover {
    me: MemberName,
    election_timeout: Duration,
    /// Questions without an answer are asked again after this.
    ask_interval: Duration,
    phase: Phase,
    /// The register's version that the phase is about.
    version: u64,
    /// The leader of this epoch consents to being replaced.
    step_down: Option<(Epoch, StepDown)>,
    /// The operator accepts that confirmed commits are lost, in the failover that follows on this epoch.
    unclean: Option<Epoch>,
}

/// The facts that the controller uses in one turn.
#[derive(Clone, Copy, Debug)]
pub struct Outlook<'a> {
    /// The register.
    pub state: &'a ClusterState,
    /// This member may change the register.
    pub controls: bool,
    /// For how long this member's own grant to the leader lasts.
    pub grant_left: Duration,
    /// The epoch that this member has promised.
    pub promised: Epoch,
    /// The time.
    pub now: Instant,
}

impl Failover {
    /// The state machine of member `me`.
    pub fn new(me: MemberName, election_timeout: Duration, ask_interval: Duration) -> Failover {
        Failover {
            me,
            election_timeout,
            ask_interval,
            phase: Phase::Watching,
            version: 0,
            step_down: None,
            unclean: None,
        }
    }

    /// The election timeout that the cluster agreed on.
    pub fn set_election_timeout(&mut self, election_timeout: Duration) {
        self.election_timeout = election_timeout;
    }

    /// The leader of `epoch` asks to be replaced: it cannot go on, an operator wants another to lead, or it wants to go on itself
    /// in a later epoch, because members have promised one. They promise one in every failover, so the last of these must not
    /// outrank what the failover is for.
    pub fn handle_step_down(&mut self, state: &ClusterState, epoch: Epoch, step_down: StepDown) {
        let rank = |step_down: &StepDown| match step_down {
            StepDown::TransferLeadership(name) if state.leader.as_ref() == Some(name) => 0,
            StepDown::TransferLeadership(_) => 1,
            StepDown::Unfit => 2,
        };
        let asked = (epoch, rank(&step_down));
        if self.step_down.as_ref().is_none_or(|(epoch, standing)| asked > (*epoch, rank(standing))) {
            self.step_down = Some((epoch, step_down));
        }
    }

    /// The operator accepts the loss of confirmed commits in the failover that follows on `epoch`.
    pub fn allow_unclean(&mut self, epoch: Epoch) {
        self.unclean = Some(epoch);
    }

    /// A member answered a pre-vote; `silent` when it has not heard the leader for the election timeout.
    pub fn handle_pre_vote(&mut self, name: &MemberName, silent: bool) {
        if let Phase::PreVoting { silent: members, .. } = &mut self.phase {
            if silent {
                members.insert(name.clone());
            } else {
                members.remove(name);
            }
        }
    }

    /// A member is fenced.
    pub fn handle_fenced(&mut self, state: &ClusterState, name: &MemberName, answer: Fenced) {
        if !state.knows(name, answer.id) {
            return;
        }
        if let Phase::Fencing { epoch, fenced, .. } = &mut self.phase {
            if answer.promised > *epoch {
                // Another controller tried before with a later epoch: all members are asked again, for that epoch.
                *epoch = answer.promised;
                fenced.clear();
            } else {
                fenced.insert(name.clone(), answer);
            }
        }
    }

    /// A proposal was decided. The register shows the outcome.
    pub fn handle_proposed(&mut self) {
        if matches!(self.phase, Phase::Proposed { .. }) {
            self.phase = Phase::Watching;
        }
    }

    /// Why nobody leads yet; `None` while somebody leads.
    pub fn blocked_reason(&self, state: &ClusterState) -> Option<BlockedReason> {
        match &self.phase {
            Phase::Watching | Phase::Proposed { .. } => None,
            Phase::PreVoting { silent, .. } => {
                Some(BlockedReason::PreVoting { silent: silent.len(), majority: state.majority() })
            }
            Phase::Fencing { fenced, .. } if fenced.len() < state.majority() => {
                let fenced = fenced.keys().cloned().collect();
                Some(BlockedReason::Majority { fenced, majority: state.majority() })
            }
            Phase::Fencing { fenced, .. } => {
                state.safe_to_lead(&fenced.keys().cloned().collect()).err().map(BlockedReason::Unsafe)
            }
        }
    }

    /// When `poll` has something to do although no message arrives.
    pub fn next_timeout(&self, grant_left: Duration, now: Instant) -> Duration {
        match &self.phase {
            Phase::Watching => grant_left,
            Phase::PreVoting { ask_at, .. } => ask_at.saturating_duration_since(now),
            Phase::Fencing { ask_at, fenced, .. } => {
                let free = fenced.values().map(|answer| answer.granted_until).filter(|until| *until > now).min();
                free.map_or(*ask_at, |free| free.min(*ask_at)).saturating_duration_since(now)
            }
            Phase::Proposed { at } => (*at + self.election_timeout * PROPOSAL_TIMEOUTS).saturating_duration_since(now),
        }
    }

    /// One turn: after anything was heard, and when `next_timeout` has passed.
    pub fn poll(&mut self, outlook: &Outlook<'_>) -> Vec<Effect> {
        if !outlook.controls {
            self.phase = Phase::Watching;
            self.step_down = None;
            self.unclean = None;
            return Vec::new();
        }
        let current = outlook.state.epoch;
        self.step_down.take_if(|(epoch, _)| *epoch != current);
        self.unclean.take_if(|epoch| *epoch != current);
        if outlook.state.version != self.version {
            self.version = outlook.state.version;
            self.follow_register(outlook.state);
        }
        let mut effects = Vec::new();
        self.step(outlook, &mut effects);
        effects
    }

    /// The register moved: a failover that it completes is over; one that it does not goes on from what it says now, with the
    /// fences of those that are still members.
    fn follow_register(&mut self, state: &ClusterState) {
        let over = match &mut self.phase {
            Phase::Fencing { epoch, fenced, .. } => {
                fenced.retain(|name, answer| state.knows(name, answer.id));
                state.epoch >= *epoch
            }
            Phase::PreVoting { silent, .. } => {
                silent.retain(|name| state.members.contains_key(name));
                false
            }
            Phase::Proposed { .. } => true,
            Phase::Watching => false,
        };
        if over {
            self.phase = Phase::Watching;
        }
    }

    fn step(&mut self, outlook: &Outlook<'_>, effects: &mut Vec<Effect>) {
        let &Outlook { state, grant_left, now, .. } = outlook;
        let step_down = self.step_down.as_ref().map(|(_, step_down)| step_down);
        match &mut self.phase {
            Phase::Watching => {
                let leaderless = state.leader.is_none();
                if leaderless || step_down.is_some() {
                    self.begin_to_fence(outlook, effects);
                } else if grant_left.is_zero() {
                    self.phase = Phase::PreVoting { silent: BTreeSet::new(), ask_at: now + self.ask_interval };
                    effects.push(Effect::PreVote);
                }
            }
            Phase::PreVoting { silent, ask_at } => {
                if !grant_left.is_zero() {
                    self.phase = Phase::Watching;
                } else if silent.len() >= state.majority() || step_down.is_some() {
                    self.begin_to_fence(outlook, effects);
                } else if now >= *ask_at {
                    *ask_at = now + self.ask_interval;
                    effects.push(Effect::PreVote);
                }
            }
            Phase::Fencing { epoch, fenced, ask_at, since } => {
                let decision =
                    Decision { epoch: *epoch, controller: &self.me, step_down, unclean: self.unclean.is_some() };
                // The operator asked for this member, so it is waited for a while although others qualify.
                let awaited = matches!(step_down, Some(StepDown::TransferLeadership(name)) if !fenced.contains_key(name))
                    && now.saturating_duration_since(*since) < self.election_timeout;
                if let Some(change) = decide(state, fenced, &decision, now).filter(|_| !awaited) {
                    self.phase = Phase::Proposed { at: now };
                    effects.push(Effect::Propose(change));
                } else if now >= *ask_at {
                    *ask_at = now + self.ask_interval;
                    effects.push(Effect::Fence(*epoch));
                }
            }
            Phase::Proposed { at } => {
                if now.saturating_duration_since(*at) >= self.election_timeout * PROPOSAL_TIMEOUTS {
                    self.phase = Phase::Watching;
                }
            }
        }
    }

    fn begin_to_fence(&mut self, outlook: &Outlook<'_>, effects: &mut Vec<Effect>) {
        let epoch = outlook.state.epoch.next().max(outlook.promised);
        let ask_at = outlook.now + self.ask_interval;
        self.phase = Phase::Fencing { epoch, fenced: BTreeMap::new(), ask_at, since: outlook.now };
        effects.push(Effect::Fence(epoch));
    }
}

/// The facts by which a leader is chosen.
struct Decision<'a> {
    epoch: Epoch,
    controller: &'a MemberName,
    step_down: Option<&'a StepDown>,
    unclean: bool,
}

/// The change that makes the best of the fenced members the leader; `None` while none of them may lead.
fn decide(
    state: &ClusterState,
    fenced: &BTreeMap<MemberName, Fenced>,
    decision: &Decision<'_>,
    now: Instant,
) -> Option<Change> {
    let &Decision { epoch, controller, step_down, unclean } = decision;
    let leader_fenced = state.leader.as_ref().is_some_and(|leader| fenced.contains_key(leader));
    // A fenced leader knows that its lease is over, and one that failed gave it up before it said so; else what a majority has
    // granted must have run out.
    let lease_over = leader_fenced || step_down == Some(&StepDown::Unfit);
    let free = fenced.values().filter(|answer| lease_over || answer.granted_until <= now).count();
    if free < state.majority() && !mutants::is_on("lead-without-a-majority") {
        return None;
    }
    let unfit = state.leader.as_ref().filter(|_| step_down == Some(&StepDown::Unfit));
    let safe = |names: &BTreeSet<MemberName>| {
        unclean || state.safe_to_lead(names).is_ok() || mutants::is_on("lead-without-a-majority")
    };
    let mut names: BTreeSet<MemberName> = fenced.keys().filter(|name| Some(*name) != unfit).cloned().collect();
    if !safe(&names) {
        // A leader whose log failed answers only once it was started again and its log works. Others are taken rather, but what
        // only it has may be confirmed.
        names = fenced.keys().cloned().collect();
        if !safe(&names) {
            return None;
        }
    }
    let may_lead = |name: &MemberName| {
        let member = state.members.get(name);
        member.is_some_and(|member| member.is_eligible() || unclean && member.kind == Kind::Data)
    };
    let reach = |name: &MemberName| {
        let answer = fenced.get(name).filter(|_| !mutants::is_on("lead-with-any-log"))?;
        Some((answer.last_epoch, answer.flushed))
    };
    // Among equals the controller comes last: if the leader dies later, the controller is still there to replace it.
    let best = names.iter().filter(|name| may_lead(name)).max_by_key(|name| (reach(name), *name != controller))?;
    // Whoever was asked for leads if it reaches as far as the best; so does the old leader, whose clients need not move.
    let wanted = match step_down {
        Some(StepDown::TransferLeadership(name)) => Some(name),
        Some(StepDown::Unfit) => None,
        None => state.leader.as_ref().filter(|name| names.contains(*name)),
    };
    let wanted = wanted.filter(|name| may_lead(name) && reach(name) == reach(best));
    let leader = wanted.unwrap_or(best).clone();
    let mut next = state.next();
    next.epoch = epoch;
    // Fenced members that were in sync stay in sync; the old leader is added again when it has caught up.
    next.in_sync = state.in_sync.iter().filter(|name| names.contains(*name) && **name != leader).cloned().collect();
    if state.leader.is_none() {
        next.in_sync = names.iter().filter(|name| may_lead(name) && **name != leader).cloned().collect();
    }
    if unclean && let Some(member) = next.members.get_mut(&leader) {
        member.log_status = LogStatus::Complete;
    }
    // The leader does not change.
    next.leaving.remove(&leader);
    next.leader = Some(leader);
    Some(Change { state: next })
}

#[cfg(test)]
#[path = "failover_tests.rs"]
mod tests;
