//! Who may confirm commits, and how many of them must: the sync policy over the members whose confirmation a failover counts on.
//! Pure. The register gives the rule ([`crate::register::ClusterState::quorum_rule`]), the leader's commit rule applies it, and
//! while it changes to two at once.

use std::collections::BTreeSet;

use walferry_engine::lsn::Lsn;

use crate::member::MemberName;
use crate::policy::{Candidate, SyncPolicy, SyncState};

/// The policy, and whom it may choose from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QuorumRule {
    /// How many, and which of them.
    pub policy: SyncPolicy,
    /// Replicas that count; `None` for a leader without a cluster, which takes every replica at its word.
    pub confirming: Option<BTreeSet<MemberName>>,
}

impl QuorumRule {
    /// The rule of a leader without a cluster.
    pub fn of_any(policy: SyncPolicy) -> QuorumRule {
        QuorumRule { policy, confirming: None }
    }

    /// True when what this replica confirms counts.
    pub fn counts(&self, name: &MemberName) -> bool {
        self.confirming.as_ref().is_none_or(|confirming| confirming.contains(name))
    }

    /// The candidates as the policy is to see them, at the same places: those that do not count are not there.
    fn seen<'a>(&self, candidates: &[Candidate<'a>]) -> Vec<Candidate<'a>> {
        let seen = |candidate: &Candidate<'a>| {
            let counts = self.counts(candidate.name);
            let (streaming, in_sync) = (candidate.streaming && counts, candidate.in_sync && counts);
            Candidate { streaming, in_sync, ..*candidate }
        };
        candidates.iter().map(seen).collect()
    }

    /// What has been confirmed: `Lsn::MAX` when nobody has to, `None` when too few are there to ask.
    pub fn confirmed(&self, candidates: &[Candidate<'_>]) -> Option<Lsn> {
        self.policy.confirmed(&self.seen(candidates))
    }

    /// What the policy makes of the candidate at `index`.
    pub fn sync_state(&self, candidates: &[Candidate<'_>], index: usize) -> SyncState {
        if !self.counts(candidates[index].name) {
            return SyncState::Async;
        }
        self.policy.sync_state(&self.seen(candidates), index)
    }

    /// Why commits wait at the moment: too few replicas are there to ask.
    pub fn shortage(&self, candidates: &[Candidate<'_>]) -> Option<String> {
        let (need, have) = self.policy.needs(&self.seen(candidates))?;
        (have < need).then(|| format!("{} needs {need} streaming, {have} are", self.policy))
    }
}
