//! Fencing and the replacement of a leader: this member's answers to fence requests, and the controller's failover.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use walferry_engine::lsn::Epoch;
use walferry_engine::mutants;

use crate::agent::Agent;
use crate::agent::types::{Asker, LogEnd, Order, Output, ProposalFor, Purpose};
use crate::control::{Answer, Ask};
use crate::failover::{Effect, Fenced, Outlook};
use crate::member::MemberName;
use crate::register::{Change, ClusterState, Kind};

/// Fence requests that wait, at most; a further one is refused.
const FENCING_MAX: usize = 64;

/// Fence requests on their way: promised on disk first, then obeyed by the node, then answered.
#[derive(Debug, Default)]
pub(super) struct Fencing {
    /// Wait for the disk.
    promising: Vec<(Asker, Epoch)>,
    /// Wait for the node.
    obeying: Vec<(Asker, Epoch)>,
    /// Members that this controller has asked, for which epoch.
    asked: BTreeMap<MemberName, Epoch>,
    silence_said: bool,
}

impl Agent {
    /// A controller wants this member to refuse older leaders.
    pub(super) fn answer_fence(&mut self, asker: Asker, epoch: Epoch, now: Instant) {
        let current = self.view.state.epoch;
        let name = &self.config.name;
        if epoch <= current {
            let text = format!("{name}: epoch {current} has begun already, {epoch} is over");
            return self.answer(asker, Answer::Refused(text), now);
        }
        if !epoch.is_near(current.max(self.kept.promised)) {
            let text = format!("{name}: epoch {epoch} is too far after epoch {current} to be an honest one");
            return self.answer(asker, Answer::Refused(text), now);
        }
        if self.fencing.promising.len() + self.fencing.obeying.len() >= FENCING_MAX {
            let text = format!("{name} has {FENCING_MAX} fence requests to answer");
            return self.answer(asker, Answer::Refused(text), now);
        }
        self.fencing.promising.push((asker, epoch));
        if epoch <= self.kept.promised || mutants::is_on("forget-the-fence") {
            return self.obey_promise(epoch, Ok(()), now);
        }
        // The promise is durable before anything rests on it.
        self.outputs.push_back(Output::Promise(epoch));
    }

    /// A promise is durable, or could not be made so.
    pub fn handle_promised(&mut self, epoch: Epoch, outcome: Result<(), String>, now: Instant) {
        self.obey_promise(epoch, outcome, now);
        self.turn(now);
    }

    fn obey_promise(&mut self, epoch: Epoch, outcome: Result<(), String>, now: Instant) {
        let (done, waiting) = std::mem::take(&mut self.fencing.promising).into_iter().partition(|(_, of)| *of <= epoch);
        self.fencing.promising = waiting;
        let done: Vec<(Asker, Epoch)> = done;
        if let Err(error) = outcome {
            for (asker, _) in done {
                let text = format!("{} cannot promise: {error}", self.config.name);
                self.answer(asker, Answer::Refused(text), now);
            }
            return;
        }
        // Meanwhile a leader of that epoch may have been chosen, whom the node follows: there is nothing to stop any more.
        let current = self.view.state.epoch;
        let (late, done): (Vec<_>, Vec<_>) = done.into_iter().partition(|(_, of)| *of <= current);
        for (asker, of) in late {
            let text = format!("{}: epoch {current} has begun already, {of} is over", self.config.name);
            self.answer(asker, Answer::Refused(text), now);
        }
        self.kept.promised = self.kept.promised.max(epoch);
        self.voter.promise(epoch);
        if done.is_empty() {
            return;
        }
        self.fence_lease(epoch);
        if self.node.is_some() {
            self.fencing.obeying.extend(done);
            self.order(Order::Fence(epoch));
        } else {
            for (asker, _) in done {
                self.answer_fenced(asker, LogEnd::default(), now);
            }
        }
    }

    /// The node takes nothing from older leaders any more.
    pub(super) fn take_fenced_node(&mut self, epoch: Epoch, end: Option<LogEnd>, now: Instant) {
        let (done, waiting) = std::mem::take(&mut self.fencing.obeying).into_iter().partition(|(_, of)| *of <= epoch);
        self.fencing.obeying = waiting;
        let done: Vec<(Asker, Epoch)> = done;
        for (asker, _) in done {
            match end {
                Some(end) => self.answer_fenced(asker, end, now),
                None => {
                    let text = format!("the log of {} is stopped", self.config.name);
                    self.answer(asker, Answer::Refused(text), now);
                }
            }
        }
    }

    fn answer_fenced(&mut self, asker: Asker, end: LogEnd, now: Instant) {
        let grant_left_us = self.voter.grant_left(now).as_micros() as u64;
        let (id, promised) = (self.kept.id, self.voter.promised());
        let LogEnd { last_epoch, flushed } = end;
        self.answer(asker, Answer::Fenced { id, promised, last_epoch, flushed, grant_left_us }, now);
    }

    /// The controller's part.
    pub(super) fn replace_leader(&mut self, now: Instant) {
        if self.view.state.version == 0 {
            return;
        }
        let controls = self.view.controls && self.is_member() && !self.is_unreached(now);
        let (grant_left, promised) = (self.voter.grant_left(now), self.voter.promised());
        self.fencing.silence_said &= grant_left.is_zero();
        let outlook = Outlook { state: &self.view.state, controls, grant_left, promised, now };
        for effect in self.failover.poll(&outlook) {
            match effect {
                Effect::PreVote => self.pre_vote(now),
                Effect::Fence(epoch) => self.fence_all(epoch, now),
                Effect::Propose(change) => self.propose_leader(change),
            }
        }
        // A leader goes on by its own grant; whether a majority still confirms it, its lease tells.
        let silent = if self.leads_by_register() { !self.holds_lease(now) } else { grant_left.is_zero() };
        if silent && self.in_reach(self.view.state.members.keys(), now) < self.view.state.majority() {
            let text = self.out_of_reach(now);
            self.contacts.set_blocked(text);
        } else if self.is_unreached(now) {
            self.contacts.set_blocked(self.unreached_text(now));
        } else if let Some(text) = self.in_sync_text(now) {
            self.contacts.set_blocked(text);
        } else if controls {
            let blocked = self.failover.blocked_reason(&self.view.state).map(|reason| reason.to_string());
            self.contacts.set_blocked(blocked.unwrap_or_default());
        }
        if let Some(text) = self.contacts.tell_blocked(now) {
            self.outputs.push_back(Output::Blocked(text));
        }
    }

    fn propose_leader(&mut self, change: Change) {
        let (epoch, leader) = (change.state.epoch, change.state.leader.as_ref().map(MemberName::as_str));
        tracing::info!(%epoch, ?leader, "proposing a new leader");
        self.propose(change, ProposalFor::Failover);
    }

    fn pre_vote(&mut self, now: Instant) {
        if !std::mem::replace(&mut self.fencing.silence_said, true) {
            let leader = self.view.state.leader.as_ref().map_or("nobody", MemberName::as_str);
            tracing::info!(leader, "the leader is silent, asking the others");
        }
        self.ask_all(&Ask::PreVote(self.kept.id), self.election_timeout, &Purpose::PreVote, now);
    }

    pub(super) fn take_pre_vote(&mut self, member: &MemberName, answer: Result<Answer, String>) {
        if let Ok(Answer::PreVote { silent, .. }) = answer {
            self.failover.handle_pre_vote(member, silent);
        }
    }

    fn fence_all(&mut self, epoch: Epoch, now: Instant) {
        for (member, peer) in self.members() {
            if self.fencing.asked.get(&member) == Some(&epoch) {
                continue;
            }
            self.fencing.asked.insert(member.clone(), epoch);
            self.ask(&member, &peer, Ask::Fence(epoch, self.kept.id), self.election_timeout * 4, Purpose::Fence, now);
        }
    }

    pub(super) fn take_fenced(&mut self, member: &MemberName, answer: Result<Answer, String>, now: Instant) {
        self.fencing.asked.remove(member);
        match answer {
            Ok(Answer::Fenced { id, promised, last_epoch, flushed, grant_left_us }) => {
                tracing::info!(%member, %promised, %last_epoch, %flushed, "fenced");
                let granted_until = now + Duration::from_micros(grant_left_us);
                let fenced = Fenced { id, promised, last_epoch, flushed, granted_until };
                self.failover.handle_fenced(&self.view.state, member, fenced);
            }
            Ok(Answer::Refused(text)) if self.told.tell(&format!("{member}: {text}"), now).is_some() => {
                tracing::warn!(%member, "not fenced: {text}");
            }
            _ => {}
        }
    }

    /// True when this member has not heard the leader for the election timeout.
    pub(super) fn hears_no_leader(&self, now: Instant) -> bool {
        self.view.state.leader.is_none() || self.voter.grant_left(now).is_zero()
    }

    /// What a member says that reaches too few others.
    fn out_of_reach(&self, now: Instant) -> String {
        let state = &self.view.state;
        let heard = |name: &MemberName| self.contacts.is_in_reach(name, self.election_timeout * 2, now);
        let silent = state.members.keys().filter(|name| **name != self.config.name && !heard(name));
        let silent: Vec<&MemberName> = silent.collect();
        let what = match &state.leader {
            Some(leader) if *leader == self.config.name => format!("{leader} may not lead on"),
            Some(leader) => format!("the leader, {leader}, is silent, and nobody replaces it"),
            None => "nobody leads".to_owned(),
        };
        // Members that are there are not gone: nobody is to be told to go on without them.
        let advice = self.contacts.misfits_among(&silent).unwrap_or_else(|| {
            let name = &self.config.name;
            format!(
                "if these are gone for good, `walferry promote --force-new-cluster` makes {name} a cluster of its own"
            )
        });
        let silent: Vec<&str> = silent.into_iter().map(MemberName::as_str).collect();
        let (majority, silent) = (state.majority(), silent.join(", "));
        format!("{what} without a majority of {majority} members: waiting for {silent}; {advice}")
    }

    /// What this member becomes when its operator says that the others are gone for good; the state of its own cluster.
    pub(super) fn forced_state(&self, now: Instant) -> Result<ClusterState, String> {
        let (name, state) = (&self.config.name, &self.view.state);
        let led = if self.leads_by_register() { self.holds_lease(now) } else { !self.hears_no_leader(now) };
        if led {
            let leader = state.leader.as_ref().map_or("nobody", MemberName::as_str);
            return Err(format!("the leader, {leader}, is there: remove members with `walferry remove`"));
        }
        if self.config.kind == Kind::Witness {
            return Err(format!("{name} is a witness: it has no log to go on with"));
        }
        if !self.is_member() {
            return Err(format!("{name} is no member: it knows of no cluster that it could go on with"));
        }
        Ok(state.forced(name))
    }
}
