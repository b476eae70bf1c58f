//! The register: the small state that every member of a cluster agrees on. One value with a version; it changes only by
//! compare-and-set, through whatever engine holds it (`consensus`). Pure: it knows neither that engine nor time.
//!
//! It says as well what a failover must wait for: the fenced members have to meet every set of members on which the old
//! epoch may have confirmed a commit ([`ClusterState::safe_to_lead`]).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use walferry_engine::lsn::Epoch;
use walferry_engine::mutants;

use crate::member::{ClusterId, MemberName};
use crate::policy::{NamePattern, PolicySyntax, SyncPolicy};
use crate::quorum_rule::QuorumRule;

/// Members of a cluster at most; of them at most [`VOTERS_MAX`] vote about the register.
pub const MEMBERS_MAX: usize = 16;
/// Members that vote about the register at most: with more, every change waits for more disks and survives no likelier fault.
/// On leases and fences every member votes ([`ClusterState::majority`]).
pub const VOTERS_MAX: usize = 5;
/// Removed incarnations that the register remembers, so that they can be told. The oldest is dropped first.
pub const REMOVED_MAX: usize = 32;

/// The number of one incarnation of a member, random, made with its data directory: a member that lost its disk has another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MemberId(pub u64);

impl fmt::Display for MemberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// The kind of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// It has the log and may lead.
    Data,
    /// It votes and stores no log.
    Witness,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Kind::Data => "data",
            Kind::Witness => "witness",
        })
    }
}

/// What a member's log proves about commits that were confirmed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogStatus {
    /// It holds every commit that it ever confirmed. A witness confirms none, and so holds all of them.
    #[default]
    Complete,
    /// It came without the log that it had confirmed: a failover has to count it as missing, until it has caught up.
    Lost,
    /// It was taken in and has not caught up since: it never confirmed anything that counts, so nobody misses it, and what it
    /// confirms does not count.
    Joining,
}

impl fmt::Display for LogStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            LogStatus::Complete => "complete",
            LogStatus::Lost => "lost",
            LogStatus::Joining => "joining",
        })
    }
}

/// An incarnation that is no longer a member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removed {
    /// Its name.
    pub name: MemberName,
    /// Its incarnation.
    pub id: MemberId,
    /// The first version of the register without it.
    pub version: u64,
}

/// One member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The incarnation of it that is a member.
    pub id: MemberId,
    /// Its peer address, `HOST:PORT`.
    pub peer: String,
    /// Its kind.
    pub kind: Kind,
    /// What its log proves.
    #[serde(default)]
    pub log_status: LogStatus,
}

impl Member {
    /// True for one that has a log, which proves what its confirmations say.
    pub fn is_eligible(&self) -> bool {
        self.kind == Kind::Data && self.log_status == LogStatus::Complete
    }
}

/// What the cluster has agreed on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterState {
    /// Grows by one with each change; 0 before the cluster was formed.
    pub version: u64,
    /// The cluster.
    pub cluster_id: ClusterId,
    /// The current leadership; 0 before the first.
    pub epoch: Epoch,
    /// The leader of that epoch.
    pub leader: Option<MemberName>,
    /// Every member by name.
    pub members: BTreeMap<MemberName, Member>,
    /// The leader's replicas that keep up; commits under `ALL` wait for each.
    pub in_sync: BTreeSet<MemberName>,
    /// Which replicas have to confirm a commit: the text of a [`SyncPolicy`], or nothing for a majority of the data members,
    /// the leader counted in, however many there are.
    pub policy: String,
    /// Who was removed, oldest first.
    #[serde(default)]
    pub removed: Vec<Removed>,
    /// Members whose removal has begun: they vote about the register no more, and a leader goes on with it.
    #[serde(default)]
    pub leaving: BTreeSet<MemberName>,
    /// A leader that is silent for so long is replaced, and grants and leases last as long, in microseconds; agreed on when the
    /// cluster was formed. 0: not agreed on.
    #[serde(default)]
    pub election_timeout_us: u64,
}

/// A change: the whole new state, taken only if the register still has version `state.version - 1`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// What the register shall hold.
    pub state: ClusterState,
}

/// The outcome of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The register holds it.
    Taken,
    /// Another change came first, or this one cannot follow the current state: read the register and decide again.
    Conflict,
}

/// A change that cannot follow on the register's state; a correct member never proposes one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a change of the register is refused: {0}")]
pub struct Illegal(String);

/// Why no member may lead yet: which members have to answer first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Awaited {
    /// The old leader suffices.
    pub leader: Option<MemberName>,
    /// Or this many of these.
    pub need: usize,
    /// Members that may have confirmed what no fenced one has.
    pub of: Vec<MemberName>,
}

impl fmt::Display for Awaited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.of.iter().map(MemberName::as_str).collect();
        let names = names.join(", ");
        match (&self.leader, self.of.len()) {
            (Some(leader), 0) => write!(f, "{leader}"),
            (Some(leader), _) => write!(f, "{leader}, or {} of {names}", self.need),
            (None, all) if all == self.need => f.write_str(&names),
            (None, _) => write!(f, "{} of {names}", self.need),
        }
    }
}

/// The role of a member according to the register.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemberRole {
    /// It leads in this epoch.
    Lead(Epoch),
    /// It follows the leader of this epoch.
    Follow(Epoch),
    /// It waits, with the reason.
    Wait(String),
}

impl ClusterState {
    /// The state of a cluster that is being formed: these members, no leader yet.
    pub fn formed(
        cluster_id: ClusterId,
        members: BTreeMap<MemberName, Member>,
        policy: &str,
    ) -> Result<ClusterState, PolicySyntax> {
        policy.parse::<SyncPolicy>()?;
        let policy = policy.trim().to_owned();
        Ok(ClusterState { version: 1, cluster_id, members, policy, ..ClusterState::default() })
    }

    /// For how long every member grants a lease: a member that used another value would break the leases' safety.
    pub fn election_timeout(&self) -> Option<Duration> {
        (self.election_timeout_us > 0).then(|| Duration::from_micros(self.election_timeout_us))
    }

    /// Agrees on the election timeout, while the cluster is formed.
    pub fn set_election_timeout(&mut self, timeout: Duration) {
        self.election_timeout_us = u64::try_from(timeout.as_micros()).unwrap_or(u64::MAX);
    }

    /// True when the policy follows the number of data members.
    pub fn follows_majority(&self) -> bool {
        self.policy.is_empty()
    }

    /// The policy. The register never holds an invalid text.
    pub fn sync_policy(&self) -> SyncPolicy {
        if !self.follows_majority() {
            return self.policy.parse().unwrap_or_default();
        }
        match self.confirming().count() / 2 {
            0 => SyncPolicy::None,
            k => SyncPolicy::Any { k, names: vec![NamePattern::Every] },
        }
    }

    /// Members that may have confirmed commits, the leader included.
    pub fn confirming(&self) -> impl Iterator<Item = &MemberName> {
        let confirms = |member: &Member| member.kind == Kind::Data && member.log_status != LogStatus::Joining;
        self.members.iter().filter(move |(_, member)| confirms(member)).map(|(name, _)| name)
    }

    /// Whose confirmations the leader needs.
    pub fn quorum_rule(&self) -> QuorumRule {
        let replicas = self.confirming().filter(|name| Some(*name) != self.leader.as_ref()).cloned();
        QuorumRule { policy: self.sync_policy(), confirming: Some(replicas.collect()) }
    }

    /// The state that follows this one; what it shall hold is then set in it.
    pub fn next(&self) -> ClusterState {
        ClusterState { version: self.version + 1, ..self.clone() }
    }

    /// Whether `next` is a state that this one can become by one change, whoever proposes it.
    pub fn check_successor(&self, next: &ClusterState) -> Result<(), Illegal> {
        let illegal = |what: String| Err(Illegal(what));
        if next.cluster_id != self.cluster_id {
            return illegal(format!("it is one of cluster {}, this is cluster {}", next.cluster_id, self.cluster_id));
        }
        if next.epoch < self.epoch || !next.epoch.is_near(self.epoch) {
            return illegal(format!("epoch {} cannot follow epoch {}", next.epoch, self.epoch));
        }
        if next.leader != self.leader && next.epoch == self.epoch {
            return illegal(format!("epoch {} has a leader, and gets no other", self.epoch));
        }
        let leads = |name: &MemberName| next.members.get(name).is_some_and(|member| member.kind == Kind::Data);
        if let Some(leader) = next.leader.as_ref().filter(|leader| !leads(leader)) {
            return illegal(format!("{leader}, who is to lead, is no member with a log"));
        }
        if let Some(name) = next.in_sync.union(&next.leaving).find(|name| !next.members.contains_key(*name)) {
            return illegal(format!("{name} is no member"));
        }
        let moved = |from: &ClusterState, to: &ClusterState| {
            from.members.keys().filter(|name| !to.members.contains_key(*name)).count()
        };
        if moved(self, next) + moved(next, self) > 1 || next.members.len() > MEMBERS_MAX {
            return illegal("more than one member comes or goes".to_owned());
        }
        if next.election_timeout_us != self.election_timeout_us {
            return illegal("the election timeout is agreed on once".to_owned());
        }
        if !next.follows_majority()
            && let Err(error) = next.policy.parse::<SyncPolicy>()
        {
            return illegal(error.to_string());
        }
        Ok(())
    }

    /// Takes a change, if it follows from this state. An empty register takes any as its first: that of a cluster that an operator
    /// forced counts on from the version of the one before, of which its log of changes has nothing.
    pub fn apply(&mut self, change: Change) -> Outcome {
        let follows = self.version == 0 || change.state.version == self.version + 1;
        if !follows {
            return Outcome::Conflict;
        }
        if self.version > 0
            && let Err(error) = self.check_successor(&change.state)
        {
            tracing::error!(version = change.state.version, "{error}");
            return Outcome::Conflict;
        }
        *self = change.state;
        Outcome::Taken
    }

    /// Members with the log.
    pub fn data_members(&self) -> impl Iterator<Item = &MemberName> {
        self.members.iter().filter(|(_, member)| member.kind == Kind::Data).map(|(name, _)| name)
    }

    fn is_witness(&self, name: &MemberName) -> bool {
        self.members.get(name).is_some_and(|member| member.kind == Kind::Witness)
    }

    /// How many members are a majority, for leases and fences. Of all members, whether they vote about the register or not: any
    /// two majorities have to share a member, also those of two versions between which one member came or went.
    pub fn majority(&self) -> usize {
        self.members.len() / 2 + 1
    }

    /// To whom the register is sent: the incarnation and the peer address of every member.
    pub fn told(&self) -> BTreeMap<MemberId, String> {
        self.members.values().map(|member| (member.id, member.peer.clone())).collect()
    }

    /// Which members are to vote about the register when `current` do: those stay, and others fill what is free, by name. One
    /// that leaves votes no more.
    pub fn voters(&self, current: &BTreeSet<MemberId>) -> BTreeSet<MemberId> {
        let stays = |(name, _): &(&MemberName, &Member)| !self.leaving.contains(*name);
        let ids = || self.members.iter().filter(stays).map(|(_, member)| member.id);
        let stay = ids().filter(|id| current.contains(id));
        let come = ids().filter(|id| !current.contains(id));
        stay.chain(come).take(VOTERS_MAX).collect()
    }

    /// The version with which this incarnation ceased to be a member.
    pub fn removed_at(&self, id: MemberId) -> Option<u64> {
        self.removed.iter().find(|removed| removed.id == id).map(|removed| removed.version)
    }

    /// The leader's peer address.
    pub fn leader_peer(&self) -> Option<&str> {
        Some(self.members.get(self.leader.as_ref()?)?.peer.as_str())
    }

    /// True when this incarnation of `name` is a member.
    pub fn knows(&self, name: &MemberName, id: MemberId) -> bool {
        self.members.get(name).is_some_and(|member| member.id == id)
    }

    /// The role of a member. Epochs up to `epochs_before` began in an earlier incarnation of its process, which may have led in them.
    pub fn role_of(&self, name: &MemberName, epochs_before: Epoch) -> MemberRole {
        match &self.leader {
            None => MemberRole::Wait("no leader was chosen yet".to_owned()),
            Some(leader) if leader != name => MemberRole::Follow(self.epoch),
            // It leads by the register, but with the log of its earlier incarnation it lost what it would lead with.
            Some(leader) if self.members.get(leader).is_none_or(|member| member.log_status != LogStatus::Complete) => {
                MemberRole::Wait("this node led and lost its disk: another member has to lead".to_owned())
            }
            Some(_) if self.epoch > epochs_before => MemberRole::Lead(self.epoch),
            Some(_) => MemberRole::Wait(format!(
                "this node led epoch {} before it was restarted, and a majority of {} members has to choose who leads next; if it is gone for \
                 good, `walferry promote --force-new-cluster` makes this node a cluster of its own",
                self.epoch,
                self.majority()
            )),
        }
    }

    /// Whether the highest of the `fenced` members holds every commit that a replica has confirmed: whether each set of
    /// members that may hold a confirmed commit has a fenced one in it. Else what is missing.
    pub fn safe_to_lead(&self, fenced: &BTreeSet<MemberName>) -> Result<(), Awaited> {
        let counts = |name: &MemberName| {
            fenced.contains(name)
                && self.members.get(name).is_some_and(|member| member.log_status == LogStatus::Complete)
        };
        let Some(leader) = &self.leader else {
            // Nobody has led yet, and members may bring logs of their own: all of them are compared.
            let of: Vec<_> = self.confirming().filter(|name| !counts(name)).cloned().collect();
            return if of.is_empty() { Ok(()) } else { Err(Awaited { leader: None, need: of.len(), of }) };
        };
        if counts(leader) {
            return Ok(());
        }
        let awaited = |need, of| Err(Awaited { leader: Some(leader.clone()), need, of });
        match self.sync_policy() {
            SyncPolicy::None => awaited(0, Vec::new()),
            // Each commit was confirmed by every member of the set: one of them suffices.
            SyncPolicy::All if self.in_sync.iter().any(counts) => Ok(()),
            SyncPolicy::All if mutants::is_on("count-a-witness") && fenced.iter().any(|name| self.is_witness(name)) => {
                Ok(())
            }
            SyncPolicy::All => awaited(usize::from(!self.in_sync.is_empty()), self.in_sync.iter().cloned().collect()),
            policy @ (SyncPolicy::First { k, .. } | SyncPolicy::Any { k, .. }) => {
                let missing = self.confirming().filter(|name| !counts(name)).cloned();
                let (listed, unlisted): (Vec<_>, Vec<_>) = missing.partition(|name| policy.names(name));
                self.meets_each_set(k, leader, listed, unlisted).or_else(|(need, of)| awaited(need, of))
            }
        }
    }

    /// A commit is on the leader of its epoch, whoever that was, and on `k` listed replicas of it. It is missed only if all
    /// of these are missing. The log of the current leader holds every commit, so that one suffices as well; else so many of
    /// those.
    fn meets_each_set(
        &self,
        k: usize,
        leader: &MemberName,
        listed: Vec<MemberName>,
        unlisted: Vec<MemberName>,
    ) -> Result<(), (usize, Vec<MemberName>)> {
        // One that is not listed may have led and a full set of listed ones confirmed; a listed leader is none of its set.
        let spare = if unlisted.is_empty() { k } else { k - 1 };
        if listed.len() <= spare {
            return Ok(());
        }
        let others = |names: &[MemberName]| names.iter().filter(|name| *name != leader).cloned().collect::<Vec<_>>();
        let (need, of) = (listed.len() - spare, others(&listed));
        if need <= of.len() {
            return Err((need, of));
        }
        // Then the leader is listed, and it takes all those that are not.
        let of = others(&unlisted);
        Err((of.len(), of))
    }
}

#[cfg(test)]
#[path = "register_tests.rs"]
mod tests;
