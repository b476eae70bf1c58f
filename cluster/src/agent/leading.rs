//! What a member does as leader: it holds the lease, sends heartbeats, and keeps the in-sync set in the register. And how the
//! node is told what it is.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use walferry_engine::lsn::Epoch;
use walferry_engine::mutants;

use crate::control::{Answer, Ask, LeaseHeartbeat};
use crate::failover::StepDown;
use crate::lease::Lease;
use crate::member::MemberName;
use crate::register::{Change, LogStatus, MemberId, MemberRole};

use crate::agent::state::leading::Wanted;
use crate::agent::types::{CHANGE_TIME_MAX, Order, Output, Purpose, refusal};
use crate::agent::{Agent, member_role};

/// A leader that cannot change the in-sync set for longer says so.
const IN_SYNC_TIME_MAX: Duration = Duration::from_secs(1);

impl Agent {
    /// Tells the node what it is, when that has changed.
    pub(super) fn tell_node(&mut self, now: Instant) {
        if self.view.state.version != self.role.told_version {
            self.role.told_version = self.view.state.version;
            self.keep_lease(now);
            self.order(Order::State(Box::new(self.view.state.clone())));
        }
        let role = member_role(self, self.role.epochs_before);
        if self.role.told.as_ref() == Some(&role) {
            return;
        }
        if let MemberRole::Lead(epoch) | MemberRole::Follow(epoch) = role {
            // The first heartbeat of a leader is that it was chosen.
            self.voter.handle_heartbeat(epoch, now);
        }
        match &role {
            MemberRole::Lead(epoch) => {
                tracing::info!(%epoch, "chosen to lead");
                self.leading.lease = Some((*epoch, Lease::new(self.election_timeout)));
                self.leading.heartbeat_at = now;
                self.order(Order::Lead(*epoch));
            }
            MemberRole::Follow(epoch) => {
                self.drop_lease();
                let state = &self.view.state;
                if let (Some(leader), Some(peer)) = (&state.leader, state.leader_peer()) {
                    tracing::info!(%leader, %epoch, "following");
                    let peer = peer.to_owned();
                    self.order(Order::Follow { peer, epoch: *epoch });
                }
            }
            MemberRole::Wait(text) => {
                if !self.is_member() {
                    tracing::info!("{text}");
                }
                self.drop_lease();
                self.order(Order::Leaderless(text.clone()));
            }
        }
        self.role.told = Some(role);
    }

    /// The members may have changed: the lease rests on those that the register has now.
    fn keep_lease(&mut self, now: Instant) {
        let (members, majority) = (&self.view.state.members, self.view.state.majority());
        if let Some((_, lease)) = &mut self.leading.lease {
            lease.keep(|name| members.contains_key(name));
            self.outputs.push_back(Output::Lease(lease.until(majority)));
            // A new member may be needed for it at once.
            self.leading.heartbeat_at = now;
        }
    }

    /// This member leads no more, or must not: it sends no heartbeats and may not speak.
    pub(super) fn drop_lease(&mut self) {
        self.leading.lease = None;
        if self.node.is_some() {
            self.outputs.push_back(Output::Lease(None));
        }
    }

    /// This member promised to refuse leaders of epochs before `epoch`, itself among them.
    pub(super) fn fence_lease(&mut self, epoch: Epoch) {
        if mutants::is_on("heartbeats-of-a-fenced-leader") {
            self.outputs.push_back(Output::Lease(None));
        } else if self.leading.lease.as_ref().is_some_and(|(leading, _)| *leading < epoch) {
            // Its heartbeats would keep the others from replacing it, and nobody would lead.
            self.drop_lease();
        }
    }

    /// True while this member leads and may speak.
    pub(super) fn holds_lease(&self, now: Instant) -> bool {
        let until = self.leading.lease.as_ref().and_then(|(_, lease)| lease.until(self.view.state.majority()));
        until.is_some_and(|until| now < until)
    }

    /// Heartbeats to every member, this one included: it is a voter like the others.
    pub(super) fn send_heartbeats(&mut self, now: Instant) {
        let (Some((epoch, _)), Some(node)) = (&self.leading.lease, self.node) else { return };
        if now < self.leading.heartbeat_at || node.stuck || self.is_unreached(now) {
            return;
        }
        let epoch = *epoch;
        self.leading.heartbeat_at = now + self.config.heartbeat_interval;
        let heartbeat = LeaseHeartbeat {
            epoch,
            leader: self.config.name.clone(),
            id: self.kept.id,
            client_address: self.config.client_address.clone(),
            end: node.end,
        };
        let purpose = Purpose::Heartbeat { sent_at: now, epoch };
        self.ask_all(&Ask::LeaseHeartbeat(heartbeat), self.election_timeout, &purpose, now);
    }

    pub(super) fn take_heartbeat_answer(
        &mut self,
        member: &MemberName,
        sent_at: Instant,
        epoch: Epoch,
        answer: Result<Answer, String>,
        now: Instant,
    ) {
        let Ok(Answer::LeaseHeartbeat { granted, promised }) = answer else { return };
        let (own_promise, majority) = (self.voter.promised(), self.view.state.majority());
        let Some((_, lease)) = self.leading.lease.as_mut().filter(|(leading, _)| *leading == epoch) else { return };
        if own_promise > epoch || !self.view.state.members.contains_key(member) {
            return;
        }
        if granted {
            lease.handle_grant(member, sent_at);
            let until = lease.until(majority);
            self.outputs.push_back(Output::Lease(until));
        } else if promised > epoch {
            // A failover began and nobody finished it: that member follows this leader only in a later epoch.
            let step_down = Ask::StepDown(epoch, StepDown::TransferLeadership(self.config.name.clone()));
            self.ask_controller(step_down, self.election_timeout, Purpose::Nothing, now);
        }
    }

    /// The leader's node says who keeps up.
    pub(super) fn want_in_sync(&mut self, epoch: Epoch, number: u64, members: BTreeMap<MemberName, MemberId>) {
        self.leading.wanted_in_sync = Some(Wanted { epoch, number, members });
    }

    /// Puts what the leader sees into the register, which releases what waits for it.
    pub(super) fn keep_in_sync(&mut self, now: Instant) {
        if !self.leads_by_register() {
            return;
        }
        let Some(Wanted { epoch, number, members: wanted }) = &self.leading.wanted_in_sync else { return };
        let (state, report) = (&self.view.state, (*epoch, *number));
        if *epoch != state.epoch {
            return;
        }
        let joins = |(name, id): &(&MemberName, &MemberId)| {
            state.members.get(*name).is_some_and(|member| member.log_status == LogStatus::Joining && member.id == **id)
        };
        let joining = wanted.iter().find(joins).map(|(name, id)| (name.clone(), *id));
        let idle = !self.leading.in_sync_changing && now >= self.leading.in_sync_at;
        let next = idle.then(|| state.with_in_sync(wanted));
        if let Some((name, id)) = joining {
            self.let_count(name, id, now);
        }
        let Some(next) = next else { return };
        let version = self.view.state.version;
        self.leading.in_sync_open.take_if(|(open, _)| version > *open);
        let next = match (next, self.leading.in_sync_open) {
            // It was taken, or another change was: the register is about to tell.
            (_, Some((_, true))) => return,
            (Some(next), _) => next,
            // Whether the last proposal is taken is not known. A register that stays as it is and counts one version more ends that.
            (None, Some(_)) => self.view.state.next(),
            (None, None) => return self.record_in_sync(report),
        };
        self.leading.in_sync_changing = true;
        self.leading.in_sync_open = Some((version, false));
        let change = Ask::Change(Box::new(Change { state: next }));
        self.ask_controller(change, CHANGE_TIME_MAX, Purpose::InSync, now);
    }

    /// Tells the node once that the register has the in-sync set that it reported. A change of the members may add a member to it too.
    fn record_in_sync(&mut self, report: (Epoch, u64)) {
        if self.leading.in_sync_recorded != Some(report) && self.changes_rest() {
            self.leading.in_sync_recorded = Some(report);
            self.order(Order::InSyncRecorded(report.1));
        }
    }

    pub(super) fn take_in_sync_answer(&mut self, answer: Result<Answer, String>, now: Instant) {
        self.leading.in_sync_changing = false;
        let known = matches!(answer, Ok(Answer::Change(_)));
        let since = self.leading.in_sync_failing.take().map_or(now, |(since, _)| since);
        if !known {
            self.leading.in_sync_failing = Some((since, refusal(answer, "the controller")));
        }
        if let Some((_, answered)) = &mut self.leading.in_sync_open {
            *answered = known;
        }
        self.leading.in_sync_at = now + if known { Duration::ZERO } else { self.config.heartbeat_interval };
    }

    /// What a leader says whose register does not follow its in-sync set.
    pub(super) fn in_sync_text(&self, now: Instant) -> Option<String> {
        let (since, reason) = self.leading.in_sync_failing.as_ref().filter(|_| self.leads_by_register())?;
        let long = now.saturating_duration_since(*since) >= IN_SYNC_TIME_MAX;
        long.then(|| format!("the register does not take changes of the in-sync set, which commits wait for: {reason}"))
    }

    /// How many of these members answered lately; this one counts as one that did.
    pub(super) fn in_reach<'a>(&self, of: impl Iterator<Item = &'a MemberName>, now: Instant) -> usize {
        let lately = self.election_timeout * 2;
        of.filter(|name| **name == self.config.name || self.contacts.is_in_reach(name, lately, now)).count()
    }
}
