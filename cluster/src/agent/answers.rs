//! This member's answers to the others, and the reports of its own node.

use std::time::Instant;

use walferry_engine::lsn::Epoch;

use super::voters::ADMIT_TIME_MAX;
use crate::agent::Agent;
use crate::agent::types::{Asker, Order, Over, ProposalFor, Purpose, Report};
use crate::consensus::name_of;
use crate::control::{Answer, Ask, Greeting, LeaseHeartbeat, UnidentifiedPeer};
use crate::failover::StepDown;
use crate::member::{MemberName, Proved};
use crate::register::MemberId;

/// Drains of other members' switchovers that are under way here, at most.
const DRAINS_MAX: usize = 8;

impl Agent {
    /// Another member asks; the answer comes out as [`super::Output::Answer`] with this number.
    pub fn handle_ask(&mut self, request: u64, proved: Option<&Proved>, ask: Ask, now: Instant) {
        match proved.map_or(Ok(()), |proved| self.check_asker(proved, &ask)) {
            Ok(()) => self.handle_ask_of(Asker::Peer(request), ask, now),
            Err(text) => self.answer(Asker::Peer(request), Answer::Refused(text), now),
        }
        self.turn(now);
    }

    /// Whether a node that proved to be `proved` may ask this: it speaks for itself only, and what moves the cluster is asked by
    /// members. Heartbeats and what carries the register are taken from whoever holds the secret: this member may not know yet
    /// that it was taken in.
    fn check_asker(&self, proved: &Proved, ask: &Ask) -> Result<(), String> {
        let state = &self.view.state;
        let said = match ask {
            Ask::Greet(theirs) => Some(&theirs.name),
            Ask::LeaseHeartbeat(heartbeat) => Some(&heartbeat.leader),
            ask => ask.asker().and_then(|id| name_of(state, id)),
        };
        if let Some(said) = said {
            proved.check(said).map_err(|error| error.to_string())?;
        }
        let moves_nothing = matches!(
            ask,
            Ask::Greet(_) | Ask::LeaseHeartbeat(_) | Ask::BeginAnew(_) | Ask::Consensus(..) | Ask::PreVote(_)
        );
        // One that was removed gets its own answer.
        let removed = ask.asker().is_some_and(|id| state.removed_at(id).is_some());
        if moves_nothing
            || removed
            || state.members.is_empty()
            || proved.is_one_of(|name| state.members.contains_key(name))
        {
            return Ok(());
        }
        Err(format!("{proved} is no member of this cluster: `walferry join --name NAME` makes it one"))
    }

    pub(super) fn handle_ask_of(&mut self, asker: Asker, ask: Ask, now: Instant) {
        if let Some(id) = ask.asker() {
            self.contacts.reached_by(id, now);
            // What it knows as its cluster is not this one any more, and must not move anything here.
            if let Some(removed) = self.view.state.removed.iter().find(|removed| removed.id == id) {
                let answer = Answer::Unidentified(self.unidentified_peer(&removed.name, id));
                return self.answer(asker, answer, now);
            }
        }
        let for_members = !matches!(ask, Ask::Greet(_) | Ask::BeginAnew(_));
        if for_members && !self.is_member() {
            let text = format!("{} is not a member yet", self.config.name);
            return self.answer(asker, Answer::Refused(text), now);
        }
        let answer = match ask {
            Ask::Greet(theirs) => self.answer_greeting(theirs, now),
            Ask::LeaseHeartbeat(heartbeat) => self.answer_heartbeat(heartbeat, now),
            Ask::PreVote(_) => {
                let (silent, blocked_reason) = (self.hears_no_leader(now), self.contacts.blocked().to_owned());
                Answer::PreVote { silent, blocked_reason }
            }
            Ask::Fence(epoch, _) => return self.answer_fence(asker, epoch, now),
            Ask::Change(change)
                if change.state.version == self.view.state.version + 1
                    && let Err(error) = self.view.state.check_successor(&change.state) =>
            {
                Answer::Refused(error.to_string())
            }
            Ask::Change(change) if self.view.controls => return self.propose(*change, ProposalFor::Asker(asker)),
            Ask::Change(_) => Answer::Refused(self.does_not_control()),
            Ask::StepDown(epoch, step_down) => self.answer_step_down(epoch, step_down),
            Ask::AllowUnclean if self.view.controls => {
                self.failover.allow_unclean(self.view.state.epoch);
                Answer::Done
            }
            Ask::AllowUnclean => Answer::Refused(self.does_not_control()),
            Ask::Drain(epoch, to) => return self.answer_drain(asker, epoch, to, now),
            Ask::Join(name, peer) => return self.begin_join(asker, name, peer, now),
            Ask::Remove(name) => return self.begin_remove(asker, name, now),
            Ask::Admit(id, peer) => return self.answer_admit(asker, id, peer, now + ADMIT_TIME_MAX, now),
            Ask::BeginAnew(id) => self.answer_begin_anew(id),
            // The register's own messages go to its engine.
            Ask::Consensus(..) => Answer::Refused("not a question for the agent".to_owned()),
        };
        self.answer(asker, answer, now);
    }

    fn does_not_control(&self) -> String {
        format!("{} does not control the register", self.config.name)
    }

    pub(super) fn greeting(&self) -> Greeting {
        let state = &self.view.state;
        Greeting {
            name: self.config.name.clone(),
            id: self.kept.id,
            kind: self.config.kind,
            formed: self.view.formed,
            votes: self.view.voters.contains(&self.kept.id) || self.is_member(),
            cluster_id: if state.version > 0 { Some(state.cluster_id) } else { self.config.cluster_id },
            members: self.config.member_texts(),
            client_address: self.config.client_address.clone(),
            policy: self.config.policy.clone(),
            removed: self.kept.removed,
        }
    }

    fn answer_greeting(&mut self, theirs: Greeting, now: Instant) -> Answer {
        if let Err(text) = theirs.check() {
            return Answer::Refused(text);
        }
        let state = &self.view.state;
        let own = self.config.member_texts();
        if state.version == 0 && !theirs.formed && theirs.members != own {
            let text = format!(
                "{} was started with --members {}, {} with --members {}: to form a cluster give every node the same",
                theirs.name,
                theirs.members.join(","),
                self.config.name,
                own.join(",")
            );
            // One that was removed, or that hears of a cluster, waits to be taken in: its --members may well be others.
            let forming = self.kept.removed.is_none() && theirs.removed.is_none() && !self.contacts.knows_a_cluster();
            if forming {
                self.contacts.complain(&text, now);
            }
            return Answer::Refused(text);
        }
        let foreign = state.version > 0 && !state.knows(&theirs.name, theirs.id);
        let name_known = state.members.contains_key(&theirs.name);
        let answer = match foreign {
            true => Answer::Unidentified(self.unidentified_peer(&theirs.name, theirs.id)),
            false => Answer::Greeting(self.greeting()),
        };
        if foreign && name_known && self.view.controls {
            self.take_back(theirs.clone(), now);
        }
        let (members, configured) = (&self.view.state.members, &self.config.members);
        self.contacts.greeted(theirs, |name| members.contains_key(name) || configured.contains_key(name));
        answer
    }

    /// The answer to an incarnation that is not a member.
    fn unidentified_peer(&self, name: &MemberName, id: MemberId) -> UnidentifiedPeer {
        let state = &self.view.state;
        UnidentifiedPeer {
            member: self.greeting(),
            cluster_id: state.cluster_id,
            version: state.version,
            members: state.members.iter().map(|(name, member)| (name.clone(), member.peer.clone())).collect(),
            removed_at: state.removed_at(id),
            name_known: state.members.contains_key(name),
        }
    }

    fn answer_heartbeat(&mut self, heartbeat: LeaseHeartbeat, now: Instant) -> Answer {
        // What the register says binds as well: a member may have promised nothing in this process yet.
        let current = self.view.state.epoch.max(self.voter.promised());
        let granted = heartbeat.epoch >= self.view.state.epoch
            && heartbeat.epoch.is_near(current)
            && self.voter.handle_heartbeat(heartbeat.epoch, now);
        let promised = self.voter.promised();
        if granted {
            self.contacts.set_blocked(String::new());
            self.contacts.is_led = true;
            if self.contacts.hear_leader(heartbeat.epoch, heartbeat.end, &heartbeat.client_address) {
                self.order(Order::LeaderAddress(heartbeat.epoch, heartbeat.client_address));
            }
        }
        Answer::LeaseHeartbeat { granted, promised }
    }

    fn answer_step_down(&mut self, epoch: Epoch, step_down: StepDown) -> Answer {
        if !self.view.controls {
            return Answer::Refused(self.does_not_control());
        }
        self.failover.handle_step_down(&self.view.state, epoch, step_down);
        Answer::Done
    }

    fn answer_drain(&mut self, asker: Asker, epoch: Epoch, to: MemberName, now: Instant) {
        let leads = self.leads_by_register() && self.view.state.epoch == epoch;
        let text = if !leads || self.node.is_none() {
            format!("{} does not lead in epoch {epoch}", self.config.name)
        } else if self.commands.drains() >= DRAINS_MAX {
            format!("{DRAINS_MAX} switchovers are under way at {} already", self.config.name)
        } else {
            let id = self.next_id();
            self.commands.begin_drain(id, asker);
            return self.order(Order::Drain(id, to));
        };
        self.answer(asker, Answer::Refused(text), now);
    }

    /// A member wants to take this node in, and the node has a register in which it has no part: left of an attempt that was
    /// interrupted, or of a cluster that it was removed from.
    fn answer_begin_anew(&mut self, id: MemberId) -> Answer {
        let name = &self.config.name;
        if id != self.kept.id {
            return Answer::Refused(format!("{name} has begun anew as {}: {id} is gone", self.kept.id));
        }
        if self.greeting().votes {
            return Answer::Refused(format!("{name} has a part in a cluster: start it with an empty data directory"));
        }
        self.end(Over::Anew);
        Answer::Done
    }

    /// The node reports.
    pub fn handle_report(&mut self, report: Report, now: Instant) {
        match report {
            Report::InSync(epoch, number, members) => self.want_in_sync(epoch, number, members),
            Report::Unfit(epoch) => {
                // Heartbeats end: whoever controls then may find this node unfit without being told.
                self.drop_lease();
                let step_down = Ask::StepDown(epoch, StepDown::Unfit);
                self.ask_controller(step_down, self.election_timeout, Purpose::Nothing, now);
            }
            Report::Fenced(epoch, end) => self.take_fenced_node(epoch, end, now),
            Report::Drained(id, outcome) => {
                if let Some(asker) = self.commands.end_drain(id) {
                    self.answer(asker, outcome.map_or_else(Answer::Refused, |()| Answer::Done), now);
                }
            }
            Report::Proved(id, outcome) => self.take_proved(id, outcome, now),
        }
        self.turn(now);
    }
}
