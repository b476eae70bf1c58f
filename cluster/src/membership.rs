//! How members come and go while the cluster runs: which register may follow which. Pure; the leader's cluster thread proposes
//! what stands here, and its commit rule proves what a change rests on.
//!
//! A data member comes in two steps. It is taken in as [`LogStatus::Joining`]: it votes on leases and fences, but what it
//! confirms does not count and no failover waits for it, so the rule for commits stays as it was. Once it has caught up it is
//! marked complete: from then on it counts, and a policy that follows the members may ask for one more. A witness comes in one step.
//!
//! **Commits.** A failover chooses by the register's quorum rule (policy and confirming members): it approves a set of fenced members
//! only if every set that may have confirmed a commit under this rule has a counted member in it. So each commit that was
//! ever confirmed has to be confirmed under the rule of *every later* version. When the rule changes from R to R' (as in Raft's
//! joint consensus, with the register's compare-and-set in place of the two log entries):
//!
//! 1. the leader releases commits only if both R and R' confirm them, from the moment at which its log ended at M;
//! 2. it waits until R' has confirmed everything before M. R confirmed what was released before 1, all of it before M; so now
//!    R' has confirmed every commit that was ever released, and 1 keeps it so;
//! 3. it proposes the register with R'. If a failover comes first, the proposal no longer follows on the register and is
//!    refused: R holds, and 1 held to it. If the proposal is taken, R' holds, and so does 2;
//! 4. only when the register is seen to have moved (or nothing was proposed), the leader goes by the register's rule alone.
//!
//! A proof for a member that loses its disk meanwhile is void: the new state names the incarnation that was proved, and a member that
//! is taken back as another incarnation is another change, which one of the two has to lose.
//!
//! **Leases and fences.** Both take a majority of the members. Changes are the leader's, one member at a time, and it goes by the
//! changed members for its lease before it makes another change. So the lease of a leader and the fence of its successor rest on
//! majorities of the same members, or of members of which one came or went, and these share a member
//! (`floor(n / 2) + 1 + floor((n + 1) / 2) + 1 = n + 2`). A grant of a member that was removed is void at once.
//!
//! **The register itself** is openraft's: learners first, then voters by its own joint consensus, at most
//! [`crate::register::VOTERS_MAX`]. Its voters follow the members and not the other way round.

use std::collections::{BTreeMap, BTreeSet};

use walferry_engine::mutants;

use crate::member::MemberName;
use crate::policy::SyncPolicy;
use crate::register::{ClusterState, Kind, LogStatus, MEMBERS_MAX, Member, MemberId, REMOVED_MAX, Removed};

/// A member that is made a cluster of its own counts the register's versions on from so many later.
const FORCED_VERSIONS: u64 = 1 << 20;
/// And the epochs from so many later: this member may not know the newest ones of the others.
const FORCED_EPOCHS: u32 = 1 << 16;

/// Why the membership cannot be changed so.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MembershipError {
    /// It has joined before.
    #[error("{0} is a member already; `walferry describe` shows it")]
    Member(MemberName),
    /// Nobody of that name has.
    #[error("{name} is not a member; members are {members}")]
    Unknown {
        /// What was asked for.
        name: MemberName,
        /// Whom there is.
        members: String,
    },
    /// Another member is reached there.
    #[error("{peer} is the peer address of {name}")]
    Address {
        /// The address.
        peer: String,
        /// Whose it is.
        name: MemberName,
    },
    /// The cluster has `MEMBERS_MAX` members already.
    #[error("the cluster has {MEMBERS_MAX} members, which is the limit: `walferry remove` one first")]
    Full,
    /// The leader cannot be removed.
    #[error("{0} leads: `walferry switchover` first, then remove it")]
    Leads(MemberName),
    /// What the others can do without is known for one at a time.
    #[error("{other} is leaving, and {name} can be removed once it has left: `walferry describe` shows who leaves")]
    Leaving {
        /// Who is to go.
        name: MemberName,
        /// Who goes first.
        other: MemberName,
    },
    /// The others could not go on.
    #[error(
        "without {name} the members would be {members}, and no majority of them answers: waiting for {silent}; \
         bring these back first, or remove them"
    )]
    Majority {
        /// Who is to go.
        name: MemberName,
        /// Who would stay.
        members: String,
        /// Who of them is silent.
        silent: String,
    },
    /// The register could not follow.
    #[error(
        "the register's voters are {voters}, and no majority of them answers: waiting for {silent}; bring these back first, or, if \
         they are gone for good, make the node that stays a cluster of its own with `walferry promote --force-new-cluster`"
    )]
    Voters {
        /// Who votes about the register.
        voters: String,
        /// Who of them is silent.
        silent: String,
    },
    /// Commits at remote levels could not go on.
    #[error(
        "the sync policy {policy} asks for {need} replicas, and without {name} there would be {have} of those that it names when \
         {leader} leads: every remote commit would wait for ever; take a node that it names in first (`walferry join`; it \
         counts once it has caught up)"
    )]
    Policy {
        /// The policy of the cluster.
        policy: String,
        /// Who is to go.
        name: MemberName,
        /// Under whom commits would wait.
        leader: MemberName,
        /// How many it asks for.
        need: usize,
        /// How many would stay.
        have: usize,
    },
    /// The leader would refuse commits at remote levels.
    #[error(
        "min_in_sync asks for {need} replicas in sync, and without {name} there would be {have}: every commit at a remote level \
         would be refused; take another node in first (`walferry join`; it counts once it has caught up), or start the members with a \
         smaller --min-in-sync"
    )]
    MinInSync {
        /// Who is to go.
        name: MemberName,
        /// How many replicas it asks for.
        need: usize,
        /// How many would stay.
        have: usize,
    },
}

fn listed<'a>(names: impl Iterator<Item = &'a MemberName>) -> String {
    names.map(MemberName::as_str).collect::<Vec<_>>().join(", ")
}

impl ClusterState {
    /// The state with one member more.
    pub fn with_member(
        &self,
        name: &MemberName,
        id: MemberId,
        peer: &str,
        kind: Kind,
    ) -> Result<ClusterState, MembershipError> {
        if self.members.contains_key(name) {
            return Err(MembershipError::Member(name.clone()));
        }
        if let Some((other, _)) = self.members.iter().find(|(_, member)| member.peer == peer) {
            return Err(MembershipError::Address { peer: peer.to_owned(), name: other.clone() });
        }
        if self.members.len() >= MEMBERS_MAX {
            return Err(MembershipError::Full);
        }
        let log_status = match kind {
            Kind::Data => LogStatus::Joining,
            Kind::Witness => LogStatus::Complete,
        };
        let mut next = self.next();
        next.members.insert(name.clone(), Member { id, peer: peer.to_owned(), kind, log_status });
        next.removed.retain(|removed| removed.id != id);
        Ok(next)
    }

    /// The state in which this incarnation of a member that joined has caught up and counts.
    pub fn with_caught_up(&self, name: &MemberName, id: MemberId) -> Option<ClusterState> {
        let mut next = self.next();
        let joining = |member: &&mut Member| member.id == id && member.log_status == LogStatus::Joining;
        next.members.get_mut(name).filter(joining)?.log_status = LogStatus::Complete;
        next.in_sync.insert(name.clone());
        Some(next)
    }

    /// The state in which those of `wanted` that are members are in sync, and thereby have all that they ever confirmed; `None` when
    /// it is this one. One that joined is left out: it counts by a change of its own ([`ClusterState::with_caught_up`]).
    pub fn with_in_sync(&self, wanted: &BTreeMap<MemberName, MemberId>) -> Option<ClusterState> {
        let mut next = self.next();
        let counts = |(name, id): &(&MemberName, &MemberId)| {
            let proved = |member: &Member| member.id == **id || mutants::is_on("complete-without-proof");
            self.members.get(*name).is_some_and(|member| member.log_status != LogStatus::Joining && proved(member))
        };
        next.in_sync = wanted.iter().filter(counts).map(|(name, _)| name.clone()).collect();
        for name in &next.in_sync {
            if let Some(member) = next.members.get_mut(name) {
                member.log_status = LogStatus::Complete;
            }
        }
        (next.in_sync != self.in_sync || next.members != self.members).then_some(next)
    }

    /// The state in which a member has another incarnation, which came without the disk of the one before.
    pub fn with_new_incarnation(&self, name: &MemberName, id: MemberId) -> ClusterState {
        let mut next = self.next();
        if let Some(member) = next.members.get_mut(name) {
            let removed =
                Removed { name: name.clone(), id: std::mem::replace(&mut member.id, id), version: next.version };
            // One that never counted is not missed; of a witness only its promises are gone.
            let counted = member.kind == Kind::Data && member.log_status != LogStatus::Joining;
            if counted && !mutants::is_on("forget-the-loss") {
                member.log_status = LogStatus::Lost;
            }
            next.in_sync.remove(name);
            next.remember(removed);
        }
        next
    }

    fn remember(&mut self, removed: Removed) {
        self.removed.push(removed);
        let forgotten = self.removed.len().saturating_sub(REMOVED_MAX);
        self.removed.drain(..forgotten);
    }

    /// The state without a member, while those `in_reach` answer.
    pub fn without_member(
        &self,
        name: &MemberName,
        in_reach: &BTreeSet<MemberName>,
    ) -> Result<ClusterState, MembershipError> {
        let Some(member) = self.members.get(name) else {
            return Err(MembershipError::Unknown { name: name.clone(), members: listed(self.members.keys()) });
        };
        if self.leader.as_ref() == Some(name) {
            return Err(MembershipError::Leads(name.clone()));
        }
        // Both may be one too many.
        if let Some(other) = self.leaving.first()
            && !self.leaving.contains(name)
        {
            return Err(MembershipError::Leaving { name: name.clone(), other: other.clone() });
        }
        let mut next = self.next();
        next.members.remove(name);
        next.in_sync.remove(name);
        next.leaving.remove(name);
        let silent: Vec<&MemberName> = next.members.keys().filter(|name| !in_reach.contains(*name)).collect();
        if next.members.len() - silent.len() < next.majority() {
            let (members, silent) = (listed(next.members.keys()), listed(silent.into_iter()));
            return Err(MembershipError::Majority { name: name.clone(), members, silent });
        }
        next.remember(Removed { name: name.clone(), id: member.id, version: next.version });
        next.check_policy(self, name)?;
        Ok(next)
    }

    /// Whether the members without this one are enough for `min_in_sync` replicas beside a leader. As in `check_policy`, those
    /// are enough that count now: neither a witness nor a member that joins is one of them, so the removal of either takes none.
    pub fn check_min_in_sync(&self, name: &MemberName, min_in_sync: usize) -> Result<(), MembershipError> {
        if !self.confirming().any(|member| member == name) {
            return Ok(());
        }
        let have = self.confirming().count().saturating_sub(2);
        if have >= min_in_sync {
            return Ok(());
        }
        Err(MembershipError::MinInSync { name: name.clone(), need: min_in_sync, have })
    }

    /// The state in which the removal of a member has begun: its vote about the register ends first.
    pub fn with_leaving(&self, name: &MemberName) -> Result<ClusterState, MembershipError> {
        if !self.members.contains_key(name) {
            return Err(MembershipError::Unknown { name: name.clone(), members: listed(self.members.keys()) });
        }
        if self.leader.as_ref() == Some(name) {
            return Err(MembershipError::Leads(name.clone()));
        }
        let mut next = self.next();
        next.leaving.insert(name.clone());
        Ok(next)
    }

    /// Whether the register can change while those `in_reach` answer: a majority of its voters has to take the change, and of
    /// those that vote without `name` as well.
    pub fn check_voters(
        &self,
        name: &MemberName,
        voters: &BTreeSet<MemberId>,
        in_reach: &BTreeSet<MemberName>,
    ) -> Result<(), MembershipError> {
        let all = self.members.iter().filter(|(_, member)| voters.contains(&member.id)).map(|(name, _)| name);
        for voting in [all.clone().collect::<Vec<_>>(), all.filter(|voter| *voter != name).collect()] {
            let silent: Vec<&MemberName> = voting.iter().copied().filter(|voter| !in_reach.contains(*voter)).collect();
            if !voting.is_empty() && (voting.len() - silent.len()) * 2 <= voting.len() {
                let (voters, silent) = (listed(voting.into_iter()), listed(silent.into_iter()));
                return Err(MembershipError::Voters { voters, silent });
            }
        }
        Ok(())
    }

    /// The state of the cluster that this member alone is, because the others are gone for good. They are remembered as removed,
    /// so that those that come back are refused; version and epoch lie far enough ahead that no register of theirs reaches them.
    pub fn forced(&self, name: &MemberName) -> ClusterState {
        let (version, epoch) = (self.version + FORCED_VERSIONS, self.epoch.skip(FORCED_EPOCHS));
        let mut next = ClusterState { version, epoch, ..self.clone() };
        for (other, member) in std::mem::take(&mut next.members) {
            if other == *name {
                next.members.insert(other, Member { log_status: LogStatus::Complete, ..member });
            } else {
                next.remember(Removed { name: other, id: member.id, version: next.version });
            }
        }
        (next.leader, next.policy) = (None, String::new());
        next.in_sync.clear();
        next.leaving.clear();
        next
    }

    /// The text for the operator when `forced` follows this state.
    pub fn forced_text(&self, name: &MemberName, forced: &ClusterState) -> String {
        let others: Vec<&str> = self.members.keys().filter(|member| *member != name).map(MemberName::as_str).collect();
        format!(
            "{name} goes on as a cluster of its own from version {} of the register on; {} are removed: when they come back they are \
             refused, and `walferry join` takes them in anew. What only they held is lost",
            forced.version,
            others.join(", ")
        )
    }

    /// This member begins alone as another incarnation; see [`ClusterState::forced`]. Its epochs are of a line of their own: those
    /// that were left behind may still number theirs.
    pub fn begin_alone(&mut self, name: &MemberName, id: MemberId) {
        let version = self.version;
        self.epoch = self.epoch.next_alone(id.0);
        if let Some(member) = self.members.get_mut(name) {
            let old = std::mem::replace(&mut member.id, id);
            self.remember(Removed { name: name.clone(), id: old, version });
        }
    }

    /// A policy of the operator's own stays as it is, so it has to be one that the members can meet, whoever of them leads.
    fn check_policy(&self, before: &ClusterState, name: &MemberName) -> Result<(), MembershipError> {
        let policy = self.sync_policy();
        let (SyncPolicy::First { k, .. } | SyncPolicy::Any { k, .. }) = &policy else { return Ok(()) };
        if self.follows_majority() {
            return Ok(());
        }
        let under = |state: &ClusterState, leader: &MemberName| {
            state.confirming().filter(|member| *member != leader && policy.names(member)).count()
        };
        for leader in self.confirming() {
            let (need, have) = (*k, under(self, leader));
            if have < need && have < under(before, leader) {
                let (policy, name, leader) = (self.policy.clone(), name.clone(), leader.clone());
                return Err(MembershipError::Policy { policy, name, leader, need, have });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "membership_tests.rs"]
mod tests;
