//! How a node takes a role and leaves it: leads, follows, is promoted, steps down. An epoch is persisted before its first frame exists.
//! Called by `open`, `turn` and `membership`.

use walferry_applier::replica::{Replica, ReplicaConfig};
use walferry_cluster::member::{ClusterId, MemberName, reachable_member};
use walferry_cluster::register::MemberId;
use walferry_engine::epoch::EpochHistory;
use walferry_engine::log::Log;
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_engine::mutants;
use walferry_engine::ring::Ring;
use walferry_engine::world;
use walferry_shipper::shipper::{Shipper, ShipperConfig};

use crate::config::NodeConfig;
use crate::error::DaemonError;
use crate::membership::Membership;
use crate::node::policy::own_policy;
use crate::node::{Heard, Node, Role};
use crate::role;
use crate::session::commit_queue::CommitQueue;

impl Node {
    /// The first role of a node that is no member of a cluster: what its configuration says.
    pub(crate) fn take_configured_role(&mut self) -> Result<(), DaemonError> {
        self.role = match self.config.follow.as_ref().map(ToString::to_string) {
            Some(leader) => self.follow(leader, Epoch(0))?,
            None => self.lead()?,
        };
        // Nobody waits for this node yet: it is better started again than up without a log.
        self.log.stopped().map_or(Ok(()), |reason| Err(DaemonError::LogStopped(reason.to_owned())))
    }

    /// The shipper of a new leadership; its epoch is persisted already.
    pub(crate) fn lead(&mut self) -> Result<Role, DaemonError> {
        let epoch = self.history.last_epoch();
        self.log.lead(epoch);
        self.leadership.from = self.log.sealed();
        let config = ShipperConfig {
            dir: self.config.data.clone(),
            cluster_id: ClusterId(self.meta.cluster_id),
            name: self.member_name()?,
            client_address: self.public_address(),
            segment_bytes: self.meta.segment_bytes,
            peer_timeout: self.config.peer_timeout,
            heartbeat_interval: self.config.heartbeat_interval,
            slot_keep_bytes_max: self.config.slot_keep_bytes_max,
            replica_lag_time_max: self.config.replica_lag_time_max,
            min_in_sync: self.config.min_in_sync,
            epoch_start: self.history.last_start(),
            policy: own_policy(&self.config)?,
            zero_copy_bytes_min: self.config.zero_copy_bytes_min,
            snapshot_rate: self.config.snapshot_rate,
        };
        let shipper = Shipper::new(config, self.waker.clone())?;
        self.leadership.since = self.clock.now;
        tracing::info!(%epoch, start = %self.log.end(), "leading");
        if self.membership.is_none()
            && let Some(reason) = self.nobody_confirms(&shipper, self.config.commit_level)
        {
            tracing::warn!("sessions that choose no other level have their writes refused: {reason}");
        }
        Ok(Role::Leader(Box::new(shipper)))
    }

    /// Where clients reach this node, as it tells the others.
    pub(crate) fn public_address(&self) -> String {
        let own = self.member_name().ok().zip(self.config.members.as_ref());
        match own.and_then(|(name, members)| members.peer(&name)) {
            Some(peer) => reachable_member(self.client_address, &peer.to_string()),
            None => self.client_address.to_string(),
        }
    }

    pub(crate) fn member_name(&self) -> Result<MemberName, DaemonError> {
        Ok(self.config.name.parse()?)
    }

    /// The link of a replica.
    pub(crate) fn follow(&mut self, leader: String, promised: Epoch) -> Result<Role, DaemonError> {
        if let Err(error) = walferry_shipper::snapshot::file::clear(&self.config.data, true) {
            tracing::warn!("cannot remove the snapshot of an earlier leadership: {error}");
        }
        let config = ReplicaConfig {
            dir: self.config.data.clone(),
            leader,
            client_address: self.public_address(),
            meta: self.meta.clone(),
            name: self.member_name()?,
            member: self.membership.as_ref().map_or(MemberId(0), Membership::id),
            peer_timeout: self.config.peer_timeout,
            heartbeat_interval: self.config.heartbeat_interval,
            promised,
            may_cut_commits: self.config.becoming == Some(role::Becoming::Replica),
            links: self.tls.links(),
        };
        let (waker, now, heard) = (self.waker.clone(), self.clock.now, self.heard);
        let replica = Replica::new(config, heard.flushed, heard.committed, heard.fresh, waker, now);
        Ok(Role::Replica(Box::new(replica)))
    }

    /// Makes this replica a leader in a new epoch.
    pub(super) fn promote_now(&mut self) -> Result<Epoch, String> {
        if self.membership.is_some() {
            return Err("the members of a cluster choose their leader: SWITCHOVER TO this node asks them to".to_owned());
        }
        let replica = match &mut self.role {
            Role::Replica(replica) => replica,
            Role::Leaderless(reason) => return Err(reason.clone()),
            Role::Leader(_) => return Err("this node leads already".to_owned()),
            Role::SteppedDown(reason) => return Err(format!("this node has stepped down: {reason}")),
        };
        if let Some(reason) = self.log.stopped() {
            return Err(reason.to_owned());
        }
        if replica.cluster_id() == 0 {
            return Err(
                "this node has never met a leader: it has no data to lead with; to begin a cluster with it, start it \
                 without --follow and with --become leader"
                    .to_owned(),
            );
        }
        if !replica.close() {
            return Err("the replica is receiving a part of its leader's log this moment; try again".to_owned());
        }
        self.meta.cluster_id = replica.cluster_id();
        // What was received only in part is nobody's; what is whole is the new leader's log.
        self.log.receive_reset();
        let epoch = self.history.last_epoch().next_alone(world::random());
        let promoted = role::Role::Leader { promoted_from: Some(replica.leader().to_owned()) };
        // Its flags are a replica's still: a start with them is refused from now on.
        let begun = promoted.save(&self.config.data).map_err(DaemonError::from);
        let begun = begun.and_then(|()| begin_epoch(&mut self.history, &self.log, &self.config, epoch));
        let begun = begun.and_then(|()| self.lead());
        let leader = match begun {
            Ok(leader) => leader,
            Err(error) => {
                // The link is closed, and what the disk has of the new epoch is not known: only a start finds out.
                let text = format!("the promotion failed, and this node ends: start it again: {error}");
                self.failure = Some(text.clone());
                return Err(text);
            }
        };
        if let Role::Replica(replica) = std::mem::replace(&mut self.role, leader) {
            self.retired = Some(replica);
        }
        match self.log.stopped() {
            Some(reason) => Err(format!("the promotion failed, and this node ends: start it again: {reason}")),
            None => Ok(epoch),
        }
    }

    /// Takes no more writes, and answers the ones that wait with what is known of them.
    pub(super) fn step_down(&mut self, reason: String, ring: &mut Ring) {
        if let Role::SteppedDown(_) = self.role {
            return;
        }
        tracing::error!("stepping down, this node takes no writes and acknowledges nothing more: {reason}");
        let led = matches!(self.role, Role::Leader(_));
        self.leave_role(Role::SteppedDown(reason.clone()), &reason, ring);
        if let Some(membership) = self.membership.as_ref().filter(|_| led) {
            membership.report_unfit(self.history.last_epoch());
        }
    }

    /// Ends the role that the node has; held replies carry `reason`.
    pub(crate) fn leave_role(&mut self, next: Role, reason: &str, ring: &mut Ring) {
        match std::mem::replace(&mut self.role, next) {
            Role::Leader(mut shipper) => {
                shipper.close_all(ring, &mut self.log, self.clock.now);
                let committed = shipper.committed(self.log.flushed());
                self.heard = Heard { flushed: self.store.applied(), committed, fresh: None, at: self.heard.at };
            }
            Role::Replica(mut replica) => {
                replica.close();
                self.retired = Some(replica);
            }
            Role::Leaderless(_) | Role::SteppedDown(_) => return,
        }
        self.waterfall.abandon();
        (self.leadership.sync_loss, self.leadership.silence) = (None, None);
        self.queue = CommitQueue::default();
        self.abandoned = Some(reason.to_owned());
    }

    /// Nothing that is held is confirmed any more: it speaks of a state that this node has no longer.
    pub(crate) fn abandon(&mut self, reason: String) {
        self.queue = CommitQueue::default();
        self.abandoned = Some(reason);
    }

    /// Why held replies will not be confirmed, told once.
    pub fn take_abandoned(&mut self) -> Option<String> {
        self.abandoned.take()
    }

    /// Commits that earlier epochs left open are confirmed together with a frame of this one, or never: a leader does not wait for
    /// a client to write it. A record without effects.
    pub(super) fn open_epoch(&mut self) {
        let Role::Leader(shipper) = &self.role else { return };
        let start = self.history.last_start();
        if shipper.waits() && start > Lsn::ZERO && self.log.end() == start {
            // Without log space for it now, the next turn tries again; a log that has stopped is noticed at the end of this one.
            let _ = self.log.append(&[]);
        }
    }
}

/// Begins `epoch` at the end of the log. Persisted before its first frame exists.
pub(crate) fn begin_epoch(
    history: &mut EpochHistory,
    log: &Log,
    config: &NodeConfig,
    epoch: Epoch,
) -> Result<(), DaemonError> {
    history.cut(log.sealed());
    history.push(epoch, log.sealed())?;
    if mutants::is_on("forget-the-epoch") {
        return Ok(());
    }
    Ok(history.save(&config.data)?)
}
