//! A node as a member of a cluster: takes the orders of its agent, tells it what it asks for, and follows the register. The agent
//! decides; it runs on the thread of `cluster`.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use rand::RngExt;
use walferry_cluster::agent::{AgentConfig, LogEnd, Order, Report};
use walferry_cluster::consensus::RegisterStore;
use walferry_cluster::register::{ClusterState, Kind, MemberId};
use walferry_cluster::{ClusterId, QuorumRule};
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_engine::mutants;
use walferry_engine::ring::Ring;
use walferry_engine::world;

use crate::cluster::{Cluster, ClusterConfig, Order as ThreadOrder, Report as ThreadReport};
use crate::error::DaemonError;
use crate::membership::{Drain, Joint, Membership};
use crate::node::role::begin_epoch;
use crate::node::{Node, Role};
use crate::role::Becoming;

/// A drain that takes longer is given up, and writes go on.
const DRAIN_TIME_MAX: Duration = Duration::from_secs(2);
/// After a drain the leader waits so long to be replaced.
const STEP_DOWN_TIME_MAX: Duration = Duration::from_secs(2);
/// A change of the quorum rule that is not proved by then is given up.
const JOINT_TIME_MAX: Duration = Duration::from_secs(10);

impl Node {
    /// Makes the node a member: from now on the cluster says what it is.
    pub(crate) fn join_members(&mut self, listener: TcpListener) -> Result<(), DaemonError> {
        let members = self.config.members.clone().expect("a member knows the members");
        let new_id = MemberId(rand::rng().random());
        let members = members.peers();
        let copies_begin_anew = self.config.becoming != Some(Becoming::Member);
        let store = RegisterStore::open(&self.config.data, new_id, copies_begin_anew.then_some(&members));
        let store = store?;
        let agent = AgentConfig {
            name: self.member_name()?,
            kind: Kind::Data,
            members,
            client_address: self.public_address(),
            cluster_id: (self.meta.cluster_id != 0).then_some(ClusterId(self.meta.cluster_id)),
            new_cluster_id: ClusterId(rand::rng().random()),
            election_timeout: self.config.election_timeout,
            heartbeat_interval: self.config.heartbeat_interval,
            policy: self.config.sync.as_ref().map(ToString::to_string).unwrap_or_default(),
            min_in_sync: self.config.min_in_sync,
            history_epoch: self.history.last_epoch(),
        };
        let config = ClusterConfig { agent, tls: self.tls.clone() };
        let (id, promised) = (store.identity().id, store.promised());
        let cluster = Cluster::start(config, store, listener, self.waker.clone())?;
        self.become_member(cluster, id, promised);
        Ok(())
    }

    /// From now on whoever holds the other end of `cluster` says what this node is.
    pub(crate) fn become_member(&mut self, cluster: Cluster, id: MemberId, promised: Epoch) {
        self.role = Role::Leaderless("the node is starting".to_owned());
        self.membership = Some(Membership {
            cluster,
            state: ClusterState::default(),
            id,
            promised,
            leader_address: Default::default(),
            next: None,
            fencing: None,
            drain: None,
            joint: None,
            in_sync: Default::default(),
        });
    }

    /// True unless this node leads without a lease: then it may acknowledge nothing, at no level. By the clock of this moment:
    /// a turn takes time, and the machine may have been suspended within it.
    pub(crate) fn may_speak(&self) -> bool {
        self.may_speak_at(world::now())
    }

    /// The same at another moment.
    pub(crate) fn may_speak_at(&self, now: Instant) -> bool {
        match (&self.role, &self.membership) {
            (Role::Leader(_), Some(membership)) => {
                membership.holds_lease(now) || mutants::is_on("speak-without-a-lease")
            }
            _ => true,
        }
    }

    pub(super) fn member(&mut self) -> &mut Membership {
        self.membership.as_mut().expect("only a member follows orders")
    }

    /// One turn of the node's part in its cluster.
    pub(super) fn follow_orders(&mut self, ring: &mut Ring) -> Result<(), DaemonError> {
        let (now, end) = (self.now(), self.log.end());
        self.member().cluster.shared.turned(now, end);
        while let Some(order) = self.member().cluster.next_order() {
            self.take_order(order, ring)?;
        }
        self.forget_retired();
        if self.log.stopped().is_some() {
            // It may have stopped after the order came, which is answered as one that comes now.
            if let Some(epoch) = self.member().fencing.take() {
                self.report(Report::Fenced(epoch, None));
            }
            if let Some(Order::Lead(epoch)) = self.member().next.take() {
                self.member().report_unfit(epoch);
            }
        }
        let quiet = self.retired.is_none() && self.log.idle() && self.log.flushed() == self.log.sealed();
        if quiet && let Some(epoch) = self.member().fencing.take() {
            let end = self.log_end();
            self.report(Report::Fenced(epoch, Some(end)));
        }
        if quiet && let Some(order) = self.member().next.take() {
            self.take_role(order)?;
        }
        self.report_in_sync();
        self.poll_drain();
        self.poll_joint();
        Ok(())
    }

    pub(super) fn report(&mut self, report: Report) {
        self.member().cluster.report(ThreadReport::Agent(report));
    }

    pub(super) fn log_end(&self) -> LogEnd {
        let flushed = self.log.flushed();
        LogEnd { last_epoch: self.history.epoch_of_end(flushed), flushed }
    }

    pub(super) fn take_order(&mut self, order: ThreadOrder, ring: &mut Ring) -> Result<(), DaemonError> {
        match order {
            ThreadOrder::End(reason) => {
                return Err(DaemonError::ClusterEnded(reason));
            }
            ThreadOrder::Connection(..) | ThreadOrder::BeginAnew(..) if self.log.stopped().is_some() => {}
            ThreadOrder::Connection(socket, caller) => self.accept_peer(socket, caller, ring, self.now()),
            ThreadOrder::BeginAnew(id, promised) => {
                let member = self.member();
                (member.promised, member.id, member.state) = (promised, id, ClusterState::default());
                member.in_sync = Default::default();
                member.fencing = None;
                member.leader_address = Default::default();
                self.lose_leader("this node begins anew as a member".to_owned(), ring);
            }
            ThreadOrder::Agent(order) => self.take_agent_order(order, ring)?,
        }
        Ok(())
    }

    pub(super) fn take_agent_order(&mut self, order: Order, ring: &mut Ring) -> Result<(), DaemonError> {
        if self.log.stopped().is_some() {
            let stopped = || Err(format!("the log of {} is stopped", self.config.name));
            match order {
                Order::State(state) => self.take_state(*state)?,
                Order::Fence(epoch) => self.report(Report::Fenced(epoch, None)),
                Order::Drain(id, _) => {
                    let outcome = stopped();
                    self.report(Report::Drained(id, outcome));
                }
                Order::Joint(id, _) => {
                    let outcome = stopped();
                    self.report(Report::Proved(id, outcome));
                }
                Order::Lead(epoch) => self.member().report_unfit(epoch),
                _ => {}
            }
            return Ok(());
        }
        match order {
            Order::LeaderAddress(epoch, address) => self.member().leader_address = (epoch, address),
            Order::State(state) => self.take_state(*state)?,
            Order::Joint(id, quorum_rule) => self.begin_joint(id, quorum_rule),
            Order::InSyncRecorded(number) => self.record_in_sync(number),
            Order::JointEnds(version) => {
                if let Some(joint) = &mut self.member().joint {
                    joint.ends_at = Some(version);
                }
            }
            Order::Drain(id, to) => {
                let until = self.now() + DRAIN_TIME_MAX;
                self.end_drain(Err("another switchover has begun".to_owned()));
                self.member().drain = Some(Drain { to, until, open: Some(id) });
            }
            Order::Fence(epoch) => {
                let member = self.member();
                member.promised = member.promised.max(epoch);
                member.fencing = Some(member.fencing.map_or(epoch, |before| before.max(epoch)));
                member.next = None;
                self.lose_leader(format!("epoch {epoch} is about to begin"), ring);
            }
            Order::Leaderless(reason) => {
                self.member().next = None;
                self.lose_leader(reason, ring);
            }
            Order::Lead(_) | Order::Follow { .. } => {
                self.lose_leader("a new leader was chosen".to_owned(), ring);
                self.member().next = Some(order);
            }
        }
        Ok(())
    }

    pub(super) fn lose_leader(&mut self, reason: String, ring: &mut Ring) {
        self.end_drain(Err("it stopped leading".to_owned()));
        self.end_joint(Err("it stopped leading".to_owned()));
        self.log.resign();
        self.pending.clear();
        self.leave_role(Role::Leaderless(reason.clone()), &reason, ring);
        self.role = Role::Leaderless(reason);
    }

    pub(super) fn take_state(&mut self, state: ClusterState) -> Result<(), DaemonError> {
        if state.version < self.member().state.version {
            return Ok(());
        }
        if self.meta.cluster_id != state.cluster_id.0 {
            if self.meta.cluster_id != 0 && self.log.flushed() > Lsn::ZERO {
                return Err(DaemonError::OtherCluster {
                    dir: self.config.data.clone(),
                    ours: ClusterId(self.meta.cluster_id),
                    theirs: state.cluster_id,
                });
            }
            self.meta.cluster_id = state.cluster_id.0;
            self.meta.save(&self.config.data)?;
        }
        self.member().state = state;
        self.follow_register();
        Ok(())
    }

    /// Tells the shipper what the register says.
    pub(super) fn follow_register(&mut self) {
        let (Role::Leader(shipper), Some(membership)) = (&mut self.role, &self.membership) else { return };
        let state = &membership.state;
        let own = state.leader.as_ref();
        let replicas = state.data_members().filter(|name| Some(*name) != own);
        let members = replicas.map(|name| (name.clone(), state.members[name].id)).collect();
        shipper.follow_register(members, &state.in_sync, state.quorum_rule());
    }

    /// Commits need this quorum rule as well from now on.
    pub(super) fn begin_joint(&mut self, id: u64, quorum_rule: QuorumRule) {
        self.end_joint(Err("another change of the members has begun".to_owned()));
        let until = self.now() + JOINT_TIME_MAX;
        let (Role::Leader(shipper), Some(membership)) = (&mut self.role, &mut self.membership) else {
            return self.report(Report::Proved(id, Err("it does not lead".to_owned())));
        };
        shipper.begin_joint(quorum_rule);
        membership.joint = Some(Joint { until, open: Some(id), ends_at: None });
    }

    /// Reports the outcome of the proof that is under way, if it was not yet, and forgets it.
    pub(super) fn end_joint(&mut self, outcome: Result<(), String>) {
        if let Some(Joint { open: Some(id), .. }) = self.member().joint.take() {
            self.report(Report::Proved(id, outcome));
        }
    }

    pub(super) fn poll_joint(&mut self) {
        let now = self.now();
        let (Role::Leader(shipper), Some(membership)) = (&mut self.role, &mut self.membership) else { return };
        let Some(joint) = &mut membership.joint else { return };
        if shipper.joint_is_proved()
            && let Some(id) = joint.open.take()
        {
            membership.cluster.report(ThreadReport::Agent(Report::Proved(id, Ok(()))));
        }
        let given_up = joint.open.is_some() && now >= joint.until;
        if given_up || joint.ends_at.is_some_and(|version| version <= membership.state.version) {
            let missing = shipper.sync_shortage().unwrap_or_else(|| "the replicas that stay are behind".to_owned());
            shipper.end_joint();
            self.end_joint(Err(format!(
                "given up after {JOINT_TIME_MAX:?}, nothing was changed: those that are to confirm commits from then on have to \
                 confirm the ones so far, and did not: {missing}"
            )));
        }
    }

    pub(super) fn take_role(&mut self, order: Order) -> Result<(), DaemonError> {
        match order {
            Order::Lead(epoch) if self.history.last_epoch() < epoch => {
                begin_epoch(&mut self.history, &self.log, &self.config, epoch)?;
                self.role = self.lead()?;
                self.follow_register();
            }
            Order::Lead(epoch) => {
                let text =
                    format!("epoch {epoch} cannot begin here: the log knows epoch {}", self.history.last_epoch());
                self.role = Role::Leaderless(text);
                self.member().report_unfit(epoch);
            }
            Order::Follow { peer, epoch, .. } => {
                let promised = self.member().promised.max(epoch);
                self.role = self.follow(peer, promised)?;
            }
            _ => unreachable!("only roles are put off"),
        }
        Ok(())
    }

    /// Tells the cluster who keeps up, when that has changed.
    pub(super) fn report_in_sync(&mut self) {
        let (Role::Leader(shipper), Some(membership)) = (&self.role, &mut self.membership) else { return };
        let (epoch, members) = (self.history.last_epoch(), shipper.observed_in_sync());
        let (before, number, reported) = &mut membership.in_sync;
        if *before != epoch || *reported != members || *number == 0 {
            (*before, *number) = (epoch, *number + 1);
            reported.clone_from(&members);
            let report = Report::InSync(epoch, *number, members);
            membership.cluster.report(ThreadReport::Agent(report));
        }
    }

    /// The register has the in-sync set of a report, and no proposal can change it any more.
    pub(super) fn record_in_sync(&mut self, number: u64) {
        let (Role::Leader(shipper), Some(membership)) = (&mut self.role, &self.membership) else { return };
        let (epoch, newest, reported) = &membership.in_sync;
        // What was observed since is another report, which will be recorded by itself.
        let current = *epoch == self.history.last_epoch() && *newest == number;
        if current && *reported == shipper.observed_in_sync() {
            shipper.record_in_sync();
        }
    }

    /// Reports the outcome of the drain that is under way, if it was not yet, and lets writes go on.
    pub(super) fn end_drain(&mut self, outcome: Result<(), String>) {
        if let Some(Drain { open: Some(id), .. }) = self.member().drain.take() {
            self.report(Report::Drained(id, outcome));
        }
    }

    pub(super) fn poll_drain(&mut self) {
        let (now, end) = (self.now(), self.log.end());
        let Some(membership) = &mut self.membership else { return };
        let Some(drain) = &mut membership.drain else { return };
        let Role::Leader(shipper) = &self.role else {
            return self.end_drain(Err("it stopped leading".to_owned()));
        };
        let reached = shipper.flushed_at(&drain.to);
        if reached.is_some_and(|reached| reached >= end)
            && let Some(id) = drain.open.take()
        {
            drain.until = now + STEP_DOWN_TIME_MAX;
            membership.cluster.report(ThreadReport::Agent(Report::Drained(id, Ok(()))));
        }
        if now >= drain.until {
            let text = match reached {
                None => format!("{} is not connected", drain.to),
                Some(reached) => {
                    format!("{} is at {reached}, the leader at {end}: it did not catch up in time", drain.to)
                }
            };
            self.end_drain(Err(text));
        }
    }
}
