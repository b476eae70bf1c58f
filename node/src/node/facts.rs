//! The node as its sessions read it: time, data, and what INFO, ROLE and CONFIG tell. Decides nothing; every number comes from the
//! log, the store or the links.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use walferry_applier::pending::Pending;
use walferry_applier::store::{KeyCount, Store, StoreError};
use walferry_cluster::level::CommitLevel;
use walferry_engine::epoch::EpochHistory;
use walferry_engine::lsn::Lsn;
use walferry_engine::world;
use walferry_shipper::status::ReplicaStatus;

use crate::logging;
use crate::membership::Membership;
use crate::metrics::text::MetricsView;
use crate::metrics::waterfall_report;
use crate::node::{Node, Role};
use crate::session::command::error::refusal_text;
use crate::session::host::{
    CommitPath, DataView, Following, InfoSection, NodeFacts, NodeInfo, NodeRole, ReplicationRow, TurnClock,
};
use crate::session::reading::Strong;

impl TurnClock for Node {
    fn now(&self) -> Instant {
        Node::now(self)
    }

    fn clock(&self) -> Instant {
        world::now()
    }

    fn turn_time(&self) -> Duration {
        world::now().saturating_duration_since(self.now())
    }

    fn report_slow(&mut self, command: &'static str, took: Duration) {
        self.watchdog.command(command, took);
    }

    fn wall_clock_us(&self) -> u64 {
        self.wall_us()
    }
}

impl DataView for Node {
    fn store(&self) -> &Store {
        &self.store
    }

    fn pending(&self) -> &Pending {
        &self.pending
    }

    fn count_keys(&mut self) -> Result<KeyCount, StoreError> {
        self.count_some_keys()
    }

    fn flushed(&self) -> Lsn {
        self.log.flushed()
    }

    fn applied(&self) -> Lsn {
        self.store.applied()
    }

    fn committed_here(&self) -> Lsn {
        self.committed_and_applied()
    }

    fn history(&self) -> &EpochHistory {
        &self.history
    }

    fn cluster_id(&self) -> u128 {
        self.known_cluster_id()
    }

    fn staleness(&self, now: Instant) -> Option<Duration> {
        self.staleness_at(now)
    }

    fn strong(&self, now: Instant) -> Strong {
        if let Err(refusal) = self.writable(CommitLevel::Off) {
            return Strong::Refused(refusal_text(&refusal));
        }
        if !self.may_speak_at(now) {
            return Strong::Refused(format!("CLUSTERDOWN {}", self.why_silent()));
        }
        if self.has_replayed() { Strong::Held } else { Strong::Replaying }
    }
}

impl NodeInfo for Node {
    fn replication(&self) -> Vec<ReplicationRow> {
        let Role::Leader(shipper) = &self.role else { return Vec::new() };
        shipper.replicas().into_iter().map(replication_row).collect()
    }

    fn facts(&self) -> NodeFacts {
        NodeFacts {
            name: self.config.name.clone(),
            cluster_id: format!("{:032x}", self.known_cluster_id()),
            epoch: self.history.last_epoch(),
            role: self.node_role(),
            following: self.following(),
            port: self.client_address.port(),
            uptime_s: (world::now() - self.started).as_secs(),
            clients: self.clients.counts,
            commands: self.clients.commands,
            turns: self.watchdog.turns().clone(),
            lost_lines: logging::lost_lines(),
            repairs: self.repaired,
            end: self.log.end(),
            written: self.log.written(),
            flushed: self.log.flushed(),
            applied: self.store.applied(),
            committed: self.committed(),
            staleness: self.staleness_at(world::now()),
            commit_level: self.config.commit_level.to_string(),
            sync_policy: self.policy_text(),
            blocked_reason: self.blocked_reason(),
        }
    }

    fn info_sections(&self) -> Vec<InfoSection> {
        vec![
            ("Flush", self.flush_lines()),
            ("Waterfall", self.waterfall_lines()),
            ("Log", self.log_lines()),
            ("Shipping", self.shipping_lines()),
            ("TLS", self.tls.lines()),
        ]
    }

    fn config(&self) -> Vec<(String, String)> {
        self.config.entries.clone()
    }

    fn waterfall(&self, histograms: bool) -> String {
        let flush = self.log.flush_accounting().snapshot();
        waterfall_report::report(&self.config.name, &self.waterfall, &flush, histograms).to_string()
    }

    fn leader(&self) -> Option<String> {
        self.leader_address()
    }

    fn describe_cluster(&self, reached_at: Option<IpAddr>) -> String {
        self.description(reached_at).to_string()
    }
}

/// What is known of a leader's log holds for so long after it was heard: it sends heartbeats far more often.
const HEARD_VALID: Duration = Duration::from_secs(1);

fn replication_row(replica: ReplicaStatus) -> ReplicationRow {
    ReplicationRow {
        name: replica.name.to_string(),
        address: replica.address,
        state: replica.state.to_string(),
        sent: replica.sent,
        written: replica.written,
        flushed: replica.flushed,
        applied: replica.applied,
        lag_bytes: replica.apply_lag.bytes,
        lag_us: replica.apply_lag.time.as_micros() as u64,
        sync_state: replica.sync_state.to_string(),
        in_sync: replica.in_sync,
    }
}

impl Node {
    /// What the metrics tell.
    pub fn metrics(&self) -> MetricsView {
        let flush = self.log.flush_accounting().snapshot();
        MetricsView {
            facts: NodeInfo::facts(self),
            replicas: self.replication(),
            accounting: waterfall_report::report(&self.config.name, &self.waterfall, &flush, false),
        }
    }

    /// The sync policy: the cluster's, or that of this leader, or what a replica's own options name.
    pub(super) fn policy_text(&self) -> String {
        match (&self.membership, &self.role) {
            (Some(membership), _) => membership.state.sync_policy().to_string(),
            (None, Role::Leader(shipper)) => shipper.policy().to_string(),
            (None, _) => self.config.sync.as_ref().map(ToString::to_string).unwrap_or_default(),
        }
    }

    /// Where clients find the leader; `None` until that was told. Where peers find it is of no use to them.
    pub(super) fn leader_address(&self) -> Option<String> {
        if let Role::Leader(_) = &self.role {
            return self.may_speak().then(|| self.public_address());
        }
        let Role::Replica(replica) = &self.role else { return None };
        let heard = self.membership.as_ref().and_then(Membership::leader_address);
        let told = heard.unwrap_or_else(|| replica.client_address());
        (!told.is_empty()).then(|| told.to_owned())
    }

    pub(super) fn node_role(&self) -> NodeRole {
        match &self.role {
            Role::Leader(_) if self.may_speak() => NodeRole::Leader,
            Role::Leader(_) => NodeRole::LeaderWithoutLease,
            Role::Replica(_) => NodeRole::Replica,
            Role::Leaderless(_) => NodeRole::Leaderless,
            Role::SteppedDown(_) => NodeRole::SteppedDown,
        }
    }

    fn following(&self) -> Option<Following> {
        if self.node_role() == NodeRole::Leader {
            return None;
        }
        let address = self.leader_address().unwrap_or_default();
        let (host, port) = address.rsplit_once(':').unwrap_or(("", "0"));
        // A leader that had nothing to do did not look at its lease.
        let lease = self.membership.as_ref().and_then(Membership::lease_until).map(|until| until.min(self.now()));
        let silence = self.now().saturating_duration_since(self.heard.at.max(lease).unwrap_or(self.started));
        let mut following = Following {
            host: host.to_owned(),
            port: port.parse().unwrap_or(0),
            silence,
            lag: silence,
            ..Following::default()
        };
        let Role::Replica(replica) = &self.role else { return Some(following) };
        let status = replica.status(&self.log);
        (following.connected, following.streaming) = (status.connected, status.streaming);
        let lag_bytes = status.leader_end.since(self.store.applied());
        let waiting = if lag_bytes == 0 { 0 } else { self.wall_us().saturating_sub(self.store.applied_at_us()) };
        let waiting = Duration::from_micros(waiting);
        if status.connected && silence < HEARD_VALID.max(self.config.heartbeat_interval * 2) {
            (following.lag_bytes, following.lag) = (Some(lag_bytes), waiting);
        } else {
            following.lag = silence.max(waiting);
        }
        Some(following)
    }
}
