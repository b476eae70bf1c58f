//! Whether what was confirmed is held: looked at whenever something more is confirmed, the register moves or a disk is lost, and
//! not only when a failover happens to come at the wrong moment.

use std::collections::BTreeSet;

use walferry_cluster::MemberName;
use walferry_cluster::policy::SyncPolicy;
use walferry_cluster::register::{LogStatus, MemberId};
use walferry_engine::EpochHistory;
use walferry_engine::lsn::{Epoch, Lsn};

use super::{Broken, Checked, Cluster};
use crate::control::{name_of, node_of};
use crate::world::NodeNo;

fn has((history, durable): (&EpochHistory, Lsn), (epoch, lsn): (Epoch, Lsn)) -> bool {
    durable >= lsn && history.epoch_of_end(lsn) == epoch
}

fn listed<'a>(names: impl IntoIterator<Item = &'a MemberName>) -> String {
    names.into_iter().map(MemberName::as_str).collect::<Vec<_>>().join(", ")
}

impl Cluster {
    /// A node's log, as far as it is durable: of one that is down, what it had then.
    fn durable_log(&self, node: NodeNo) -> (&EpochHistory, Lsn) {
        let known = &self.nodes[node];
        match &known.process {
            Some(process) => (process.member.history(), process.member.flushed()),
            None => (&known.history, known.durable),
        }
    }

    pub(super) fn holds(&self, node: NodeNo, position: (Epoch, Lsn)) -> bool {
        has(self.durable_log(node), position)
    }

    /// The incarnation that the register knows had it, before it lost its disk: what it confirmed may have come later.
    fn held(&self, node: NodeNo, position: (Epoch, Lsn)) -> bool {
        let known = |lost: &&(MemberId, EpochHistory, Lsn)| self.register.knows(&name_of(node), lost.0);
        let lost = self.nodes[node].lost.as_ref().filter(known);
        lost.is_some_and(|(_, history, durable)| has((history, *durable), position))
    }

    /// How a failover compares logs.
    fn reach(&self, node: NodeNo) -> (Epoch, Lsn) {
        let (history, durable) = self.durable_log(node);
        (history.epoch_of_end(durable), durable)
    }

    /// Takes down what a leader holds to be confirmed, and checks it when it is more than before.
    pub(super) fn note_confirmed(&mut self, node: NodeNo) -> Checked {
        let Some(process) = self.nodes[node].process.as_ref().filter(|process| process.member.leads()) else {
            return Ok(());
        };
        let member = &process.member;
        let confirmed = member.committed().min(member.flushed());
        let written_in = member.history().epoch_of_end(confirmed);
        let known = self.confirmed.entry(written_in).or_default();
        if confirmed <= *known {
            return Ok(());
        }
        *known = confirmed;
        self.enough_are_in_sync(node, (written_in, confirmed))?;
        self.enough_confirmed(node, (written_in, confirmed))?;
        self.no_failover_misses_it()?;
        if self.model.is_behind(confirmed) { self.read_on(node, confirmed) } else { Ok(()) }
    }

    /// As many as `min_in_sync` asks for have it, beside the leader: under `ALL` each of those that are in sync confirms.
    fn enough_are_in_sync(&self, leader: NodeNo, position: (Epoch, Lsn)) -> Checked {
        let others = self.register.members.keys().map(node_of).filter(|node| *node != leader);
        let has_it = |node: &NodeNo| self.is_member(*node) && self.holds(*node, position) || self.held(*node, position);
        let holders: Vec<MemberName> = others.filter(has_it).map(name_of).collect();
        if self.register.sync_policy() == SyncPolicy::All && holders.len() < self.plan.min_in_sync {
            let (epoch, lsn) = position;
            return Err(Broken(format!(
                "{} confirms {lsn} of epoch {epoch}: min_in_sync is {}, and it is on the disks of {} beside its own",
                name_of(leader),
                self.plan.min_in_sync,
                listed(&holders)
            )));
        }
        Ok(())
    }

    /// So many of those that the policy names have it, or had it when they lost their disk.
    fn enough_confirmed(&self, leader: NodeNo, position: (Epoch, Lsn)) -> Checked {
        let policy = self.register.sync_policy();
        let had = |node: NodeNo| {
            let lost = self.nodes[node].lost.as_ref();
            lost.is_some_and(|(_, history, durable)| has((history, *durable), position))
        };
        let has_it = |name: &MemberName| self.holds(node_of(name), position) || had(node_of(name));
        let others = || self.register.confirming().filter(|name| node_of(name) != leader);
        let (asked, have) = match &policy {
            SyncPolicy::None => return Ok(()),
            SyncPolicy::All => {
                let counts = |name: &&MemberName| self.register.members[*name].log_status == LogStatus::Complete;
                let in_sync = others().filter(|name| self.register.in_sync.contains(*name)).filter(counts);
                let has: Vec<bool> = in_sync.map(has_it).collect();
                (has.len(), has.iter().filter(|has| **has).count())
            }
            SyncPolicy::First { k, .. } | SyncPolicy::Any { k, .. } => {
                (*k, others().filter(|name| policy.names(name) && has_it(name)).count())
            }
        };
        if have < asked {
            let (epoch, lsn) = position;
            return Err(Broken(format!(
                "{} confirms {lsn} of epoch {epoch}: {policy} asks for {asked} and {have} of them have it; {}",
                name_of(leader),
                self.state_text()
            )));
        }
        Ok(())
    }

    /// However a failover chose among the members now, who leads next has what was confirmed. A member without it wins when it
    /// reaches furthest of those that answer; so the most that may answer are those that reach no further.
    pub(super) fn no_failover_misses_it(&self) -> Checked {
        let Some((&epoch, &lsn)) = self.confirmed.iter().rev().find(|(_, lsn)| **lsn > Lsn::ZERO) else {
            return Ok(());
        };
        let eligible = |name: &MemberName| self.register.members[name].is_eligible();
        let answering: Vec<NodeNo> = self.members().collect();
        for node in answering.iter().filter(|node| eligible(&name_of(**node)) && !self.holds(**node, (epoch, lsn))) {
            let reach = self.reach(*node);
            let below = answering.iter().filter(|other| !eligible(&name_of(**other)) || self.reach(**other) <= reach);
            let below: BTreeSet<MemberName> = below.map(|other| name_of(*other)).collect();
            if below.len() >= self.register.majority() && self.register.safe_to_lead(&below).is_ok() {
                let logs = self.register.members.keys().map(|name| {
                    let (epoch, lsn) = self.reach(node_of(name));
                    format!("{name} has epoch {epoch} up to {lsn}")
                });
                return Err(Broken(format!(
                    "{lsn} of epoch {epoch} was confirmed, and {} could lead without it, chosen by {}: {}; {}",
                    name_of(*node),
                    listed(&below),
                    logs.collect::<Vec<_>>().join(", "),
                    self.state_text()
                )));
            }
        }
        Ok(())
    }
}
