//! What `DESCRIBE` tells: leader, replicas, in-sync set, epoch, policy and lag as this node knows them. Decides nothing.

use std::net::IpAddr;

use serde_json::{Value, json};
use walferry_cluster::MemberName;
use walferry_cluster::member::reachable_at;
use walferry_cluster::snapshot::CopyPhase;

use crate::node::{Node, Role};
use crate::session::host::{NodeInfo, ReplicationRow};

impl Node {
    /// The cluster as JSON; for a node without one, the node and its replicas.
    pub(super) fn description(&self, reached_at: Option<IpAddr>) -> Value {
        let facts = NodeInfo::facts(self);
        let state = self.membership.as_ref().map(|membership| &membership.state);
        let leader = match (&self.role, state) {
            (_, Some(state)) => state.leader.as_ref().map(MemberName::to_string),
            (Role::Leader(_), None) => Some(facts.name.clone()),
            _ => None,
        };
        let rows = self.replication();
        json!({
            "name": facts.name,
            "role": facts.role.to_string(),
            "cluster_id": facts.cluster_id,
            "leader": leader,
            "leader_address": NodeInfo::leader(self).map(|address| reachable_at(&address, reached_at)),
            "epoch": facts.epoch.number(),
            "epoch_id": facts.epoch.to_string(),
            "version": state.map(|state| state.version),
            "policy": facts.sync_policy,
            "policy_follows_members": state.is_some_and(|state| state.follows_majority()),
            "min_in_sync": self.config.min_in_sync,
            "in_sync": state.map(|state| state.in_sync.iter().map(MemberName::to_string).collect::<Vec<_>>()),
            "end": self.log.end().to_string(),
            "flushed": facts.flushed.to_string(),
            "applied": facts.applied.to_string(),
            "committed": facts.committed.to_string(),
            "leader_silence_ms": facts.following.as_ref().map(|leader| leader.silence.as_millis() as u64),
            "staleness_ms": facts.staleness.map(|staleness| staleness.as_millis() as u64),
            "lost_commits": self.lost_commits,
            "members": self.members(&rows),
            "snapshot": self.snapshot(),
            "blocked_reason": facts.blocked_reason,
            "slow_disk": self.disk_words(),
        })
    }

    /// How far the snapshot is that this node receives.
    fn snapshot(&self) -> Option<Value> {
        let Role::Replica(replica) = &self.role else { return None };
        let progress = replica.snapshot()?;
        let (done, total) = progress.bytes();
        let phase = match progress.phase() {
            CopyPhase::Preparing => "preparing",
            CopyPhase::Copying => "copying",
            CopyPhase::Verifying => "verifying",
        };
        Some(json!({ "phase": phase, "bytes": done, "of_bytes": total, "kept_bytes": progress.kept() }))
    }

    /// A member each, with what a leader knows of it; on a node without a cluster, its replicas.
    fn members(&self, rows: &[ReplicationRow]) -> Vec<Value> {
        let Some(membership) = &self.membership else { return rows.iter().map(replica).collect() };
        let describe = |(name, member): (&MemberName, &walferry_cluster::register::Member)| {
            let row = rows.iter().find(|row| row.name == name.as_str());
            let mut value = row.map_or_else(|| json!({}), replica);
            value["name"] = json!(name.as_str());
            value["kind"] = json!(member.kind);
            value["peer"] = json!(member.peer);
            value["id"] = json!(member.id.to_string());
            value["log_status"] = json!(member.log_status);
            value["in_sync"] = json!(membership.state.in_sync.contains(name));
            value["leaving"] = json!(membership.state.leaving.contains(name));
            value
        };
        membership.state.members.iter().map(describe).collect()
    }
}

fn replica(row: &ReplicationRow) -> Value {
    json!({
        "name": row.name,
        "kind": "data",
        "address": row.address,
        "state": row.state,
        "in_sync": row.in_sync,
        "sync_state": row.sync_state,
        "flushed": row.flushed.to_string(),
        "applied": row.applied.to_string(),
        "lag_bytes": row.lag_bytes,
        "lag_us": row.lag_us,
    })
}
