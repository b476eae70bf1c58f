//! The node as a member of a cluster: does what the cluster thread orders, and reports to it. The only place where a running
//! node changes its role. An order is followed once nothing of the role before is in flight.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use walferry_cluster::MemberName;
use walferry_cluster::agent::{Order, Report};
use walferry_cluster::register::{ClusterState, MemberId};
use walferry_engine::lsn::Epoch;

use crate::cluster::{Cluster, Command, Reply, Report as ThreadReport};

/// Writes wait until a replica has everything.
pub(super) struct Drain {
    pub(super) to: MemberName,
    pub(super) until: Instant,
    /// Under which number its outcome is reported; taken once it was.
    pub(super) open: Option<u64>,
}

/// Commits need another quorum rule as well, until the register has them.
pub(super) struct Joint {
    pub(super) until: Instant,
    /// Under which number the proof is reported; taken once it was.
    pub(super) open: Option<u64>,
    /// The register's quorum rule suffices from this version on.
    pub(super) ends_at: Option<u64>,
}

/// What a node keeps as a member of its cluster.
pub(super) struct Membership {
    pub(super) cluster: Cluster,
    /// The register as last heard.
    pub(super) state: ClusterState,
    /// The incarnation of this member.
    pub(super) id: MemberId,
    /// Leaders of older epochs are refused.
    pub(super) promised: Epoch,
    /// Where clients of the leader of this epoch connect.
    pub(super) leader_address: (Epoch, String),
    /// The role to take once nothing is in flight.
    pub(super) next: Option<Order>,
    /// A fence to be reported once nothing moves the log any more.
    pub(super) fencing: Option<Epoch>,
    pub(super) drain: Option<Drain>,
    pub(super) joint: Option<Joint>,
    /// The in-sync set that was reported last, in which epoch, and the report's number; 0 before the first.
    pub(super) in_sync: (Epoch, u64, BTreeMap<MemberName, MemberId>),
}

impl Membership {
    /// The incarnation of this member.
    pub(super) fn id(&self) -> MemberId {
        self.id
    }

    /// True while writes have to wait for a switchover.
    pub(super) fn is_draining(&self) -> bool {
        self.drain.is_some()
    }

    /// When the node has to look at its membership although nothing came.
    pub(super) fn next_timeout(&self, now: Instant) -> Option<Duration> {
        let drain = self.drain.as_ref().map(|drain| drain.until);
        let joint = self.joint.as_ref().filter(|joint| joint.open.is_some()).map(|joint| joint.until);
        drain.into_iter().chain(joint).min().map(|until| until.saturating_duration_since(now))
    }

    /// The leader cannot go on.
    pub(super) fn report_unfit(&self, epoch: Epoch) {
        self.cluster.report(ThreadReport::Agent(Report::Unfit(epoch)));
    }

    /// An operator's command on its way.
    pub(super) fn command(&self, command: Command) -> Reply {
        let reply = Reply::default();
        self.cluster.report(ThreadReport::Command(command, reply.clone()));
        reply
    }

    /// What keeps the cluster from having a leader; empty when nothing does.
    pub(super) fn blocked_reason(&self) -> String {
        self.cluster.shared.blocked_reason.lock().expect("nobody panics with it").clone()
    }

    /// Where clients of the present leader connect, if it has told; another may have led when one was told last.
    pub(super) fn leader_address(&self) -> Option<&str> {
        let (epoch, address) = &self.leader_address;
        (*epoch == self.state.epoch && !address.is_empty()).then_some(address)
    }

    pub(super) fn holds_lease(&self, now: Instant) -> bool {
        self.cluster.shared.lease.holds(now)
    }

    /// When the lease ends, or ended.
    pub(super) fn lease_until(&self) -> Option<Instant> {
        self.cluster.shared.lease.until()
    }

    pub(super) fn close(self) {
        self.cluster.close();
    }
}
