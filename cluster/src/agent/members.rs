//! The leader's part in changes of the membership: it takes nodes in, makes them count once they have caught up, and removes
//! members. One change at a time, in bounded time. Which register may follow which, and why no commit is missed, stands in
//! [`crate::membership`], the steps of one change in [`crate::changing`]; the node's commit rule does the proving.
//!
//! A removal takes two changes: first the member is marked as leaving, and stops voting about the register; then the members
//! go on without it. A leader that finds a member leaving, and nobody at it, goes on with its removal.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::changing::{ChangeError, Changing, ChangingOutput, MemberChange};
use crate::control::{Answer, Ask, Greeting};
use crate::member::MemberName;
use crate::register::{ClusterState, Kind, MemberId};

use crate::agent::Agent;
use crate::agent::state::members::{AfterChange, ChangeStep, ChangeTurn, WantedChange};
use crate::agent::types::{Asker, CHANGE_TIME_MAX, Order, Purpose, refusal};
use crate::agent::voters::ADMIT_TIME_MAX;

/// How long a change waits for the one before it.
const TURN_TIME_MAX: Duration = Duration::from_secs(5);
/// How long the join of a node waits until that is heard: it may have been started a moment ago, and makes its log first.
const KNOWN_TIME_MAX: Duration = Duration::from_secs(10);
/// Changes that wait, at most.
const WAITING_MAX: usize = 16;
/// How long a node that was removed, or has to begin anew, may take before it can be taken in.
const ANEW_TIME_MAX: Duration = Duration::from_secs(5);
/// How long the voters may take to follow before the operator gets the outcome of a change.
const VOTERS_TIME_MAX: Duration = Duration::from_secs(10);
/// Between two looks at a node.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// A change that this member began by itself and that failed is tried again after this.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

impl Agent {
    /// An operator wants a node taken in.
    pub(super) fn begin_join(&mut self, asker: Asker, name: MemberName, peer: Option<String>, now: Instant) {
        self.want(Some(asker), WantedChange::Join { name, peer }, now);
    }

    /// An operator wants a member removed.
    pub(super) fn begin_remove(&mut self, asker: Asker, name: MemberName, now: Instant) {
        self.want(Some(asker), WantedChange::Remove { name }, now);
    }

    /// A member that joined keeps up, as this incarnation: from now on its confirmations count.
    pub(super) fn let_count(&mut self, name: MemberName, id: MemberId, now: Instant) {
        if self.changes_rest() && now >= self.changes.own_at {
            self.want(None, WantedChange::CaughtUp { name, id }, now);
        }
    }

    fn want(&mut self, asker: Option<Asker>, wanted: WantedChange, now: Instant) {
        if self.changes.waiting.len() >= WAITING_MAX {
            let text = format!("{WAITING_MAX} changes of the members are waiting; try again when they are over");
            return self.tell(asker, Err(text), now);
        }
        let time_max = if self.is_known(&wanted) { TURN_TIME_MAX } else { KNOWN_TIME_MAX };
        self.changes.waiting.push_back((asker, wanted, now + time_max));
    }

    /// No change is under way, and none waits but for a node that was not heard yet.
    pub(super) fn changes_rest(&self) -> bool {
        self.changes.turn.is_none() && !self.changes.waiting.iter().any(|(_, wanted, _)| self.is_known(wanted))
    }

    /// False for a node that is to join and was not heard yet. What the register refuses is known, and said at once.
    fn is_known(&self, wanted: &WantedChange) -> bool {
        let WantedChange::Join { name, peer: None } = wanted else { return true };
        let refused = || self.view.state.with_member(name, MemberId(0), "", Kind::Data).is_err();
        self.contacts.own_peer(name).is_some() || !self.leads_by_register() || refused()
    }

    fn tell(&mut self, asker: Option<Asker>, outcome: Result<String, String>, now: Instant) {
        match (asker, outcome) {
            (Some(asker), outcome) => self.answer(asker, outcome.map_or_else(Answer::Refused, Answer::Told), now),
            (None, Ok(_)) => {}
            (None, Err(text)) => {
                if self.told.tell(&text, now).is_some() {
                    tracing::warn!("the members did not change yet: {text}");
                }
                self.changes.own_at = now + RETRY_PAUSE;
            }
        }
    }

    /// The register, if this member leads by it and may speak.
    fn leading(&self, now: Instant) -> Result<&ClusterState, String> {
        let name = &self.config.name;
        if !self.leads_by_register() {
            return Err(format!("{name} does not lead any more: try again"));
        }
        if !self.holds_lease(now) {
            return Err(format!("{name} leads without a lease: a majority of the members has to answer"));
        }
        Ok(&self.view.state)
    }

    /// Carries on with the change that is under way, and begins the next one.
    pub(super) fn turn_changes(&mut self, now: Instant) {
        self.poll_changing(now);
        self.poll_step(now);
        // A leader that has just taken a member in may have to wait for its first grant: a majority of more members is a larger one.
        while self.changes.turn.is_none() && (self.holds_lease(now) || !self.leads_by_register()) {
            let known = self.changes.waiting.iter().position(|(_, wanted, _)| self.is_known(wanted));
            let Some((asker, wanted, _)) = known.and_then(|index| self.changes.waiting.remove(index)) else { break };
            self.begin_change(asker, wanted, now);
        }
        while let Some(index) = self.changes.waiting.iter().position(|(.., until)| now >= *until) {
            let Some((asker, wanted, _)) = self.changes.waiting.remove(index) else { break };
            let text = match (&self.changes.turn, self.leading(now)) {
                _ if !self.is_known(&wanted) => self.first_step(wanted, now).err().unwrap_or_default(),
                (Some(turn), _) => format!("another change is under way: {}", turn.under_way()),
                (None, refused) => refused.err().unwrap_or_default(),
            };
            self.tell(asker, Err(text), now);
        }
        self.go_on_removing(now);
    }

    /// A leader before this one began to remove a member, and did not finish.
    fn go_on_removing(&mut self, now: Instant) {
        let Some(name) = self.view.state.leaving.first().cloned() else { return };
        if self.changes_rest() && now >= self.changes.own_at && self.leading(now).is_ok() {
            self.want(None, WantedChange::Remove { name }, now);
        }
    }

    fn begin_change(&mut self, asker: Option<Asker>, wanted: WantedChange, now: Instant) {
        let text = wanted.text();
        let (step, changing) = match self.first_step(wanted, now) {
            Ok(first) => first,
            Err(error) => return self.tell(asker, Err(error), now),
        };
        let proof = self.next_id();
        self.changes.turn = Some(ChangeTurn { asker, text, step, changing, proof });
        if let Some(ChangeTurn { step: ChangeStep::Reaching { .. }, .. }) = &self.changes.turn {
            self.ask_all(&Ask::PreVote(self.kept.id), self.election_timeout * 2, &Purpose::InReach, now);
        }
        self.poll_changing(now);
        self.poll_step(now);
    }

    fn first_step(&self, wanted: WantedChange, now: Instant) -> Result<(ChangeStep, Option<Changing>), String> {
        let state = self.leading(now)?;
        match wanted {
            WantedChange::Join { name, peer } => {
                let Some(peer) = peer.or_else(|| self.contacts.own_peer(&name)) else {
                    // The register's own reasons come first: a member is not looked for.
                    state.with_member(&name, MemberId(0), "", Kind::Data).map_err(|error| error.to_string())?;
                    return Err(format!(
                        "{name} is not known to the leader: start it with --members that name it and one member at least, or tell \
                         its peer address with --peer"
                    ));
                };
                state.with_member(&name, MemberId(0), &peer, Kind::Data).map_err(|error| error.to_string())?;
                Ok((ChangeStep::Greeting { name, peer, asked: false, at: now, until: now + ANEW_TIME_MAX }, None))
            }
            WantedChange::Remove { name } => {
                // What cannot be, whoever answers, is said at once.
                let all = state.members.keys().cloned().collect();
                state.without_member(&name, &all).map_err(|error| error.to_string())?;
                // A removal that a leader began goes on under the next one, whatever that one is configured with.
                if !state.leaving.contains(&name) {
                    let need = self.config.min_in_sync;
                    state.check_min_in_sync(&name, need).map_err(|error| error.to_string())?;
                }
                let awaited = state.members.keys().cloned().collect();
                let until = now + self.election_timeout * 2;
                Ok((ChangeStep::Reaching { name, awaited, answering: BTreeSet::new(), until }, None))
            }
            WantedChange::CaughtUp { name, id } => {
                let change = MemberChange::CaughtUp { name: name.clone(), id };
                let changing = Changing::begin(change, state, now).map_err(|error| error.to_string())?;
                Ok((ChangeStep::Changing { then: AfterChange::Counts { name } }, Some(changing)))
            }
        }
    }

    /// Does what the step waits for, when its time has come.
    fn poll_step(&mut self, now: Instant) {
        let Some(turn) = &mut self.changes.turn else { return };
        match &mut turn.step {
            ChangeStep::Greeting { name, peer, asked, at, .. } if !*asked && now >= *at => {
                *asked = true;
                let (name, peer) = (name.clone(), peer.clone());
                let ask = Ask::Greet(self.greeting());
                self.ask(&name, &peer, ask, self.election_timeout * 4, Purpose::Members, now);
            }
            ChangeStep::Reaching { name, awaited, answering, until } if awaited.is_empty() || now >= *until => {
                let (name, in_reach) = (name.clone(), answering.clone());
                self.begin_leaving(name, in_reach, now);
            }
            ChangeStep::Leaving { name, in_reach, until } if turn.changing.is_none() => {
                let (name, in_reach, late) = (name.clone(), in_reach.clone(), now >= *until);
                let Some(id) = self.view.state.members.get(&name).map(|member| member.id) else {
                    return self.finish(Err(format!("{name} is a member no more")), now);
                };
                if !self.view.voters.contains(&id) && !self.view.joint {
                    let change = MemberChange::Remove { name: name.clone(), in_reach };
                    self.begin_changing(change, AfterChange::Removed { name }, now);
                } else if late {
                    self.finish(Err("the register's voters could not change in time".to_owned()), now);
                }
            }
            ChangeStep::ChangingVoters { told, until } => {
                let (told, late) = (told.clone(), now >= *until);
                if late || self.view.voters_are_current() && self.holds_lease(now) {
                    self.finish(Ok(told), now);
                }
            }
            _ => {}
        }
    }

    /// The members of whom it is known who answers: the change may begin.
    fn begin_leaving(&mut self, name: MemberName, in_reach: BTreeSet<MemberName>, now: Instant) {
        let checked = self.leading(now).and_then(|state| {
            state.without_member(&name, &in_reach).map_err(|error| error.to_string())?;
            state.check_voters(&name, &self.view.voters, &in_reach).map_err(|error| error.to_string())
        });
        if let Err(text) = checked {
            return self.finish(Err(text), now);
        }
        let then = AfterChange::Left { name: name.clone(), in_reach };
        self.begin_changing(MemberChange::Leave { name }, then, now);
    }

    fn begin_changing(&mut self, change: MemberChange, then: AfterChange, now: Instant) {
        let begun =
            self.leading(now).and_then(|state| Changing::begin(change, state, now).map_err(|error| error.to_string()));
        match begun {
            Err(text) => self.finish(Err(text), now),
            Ok(changing) => {
                let proof = self.next_id();
                if let Some(turn) = &mut self.changes.turn {
                    (turn.step, turn.changing, turn.proof) = (ChangeStep::Changing { then }, Some(changing), proof);
                }
                self.poll_changing(now);
            }
        }
    }

    /// Tells the outcome; the turn ends once its change of the register has had its last word as well.
    fn finish(&mut self, outcome: Result<String, String>, now: Instant) {
        let Some(turn) = &mut self.changes.turn else { return };
        let outcome = match std::mem::replace(&mut turn.step, ChangeStep::Told) {
            // The register has it already.
            ChangeStep::Leaving { name, .. } | ChangeStep::Changing { then: AfterChange::Removed { name } } => outcome.map_err(|text| {
                format!(
                    "{name} is marked as leaving, and whoever leads goes on with it; `walferry describe` tells when it is \
                     removed: {text}"
                )
            }),
            _ => outcome,
        };
        let asker = turn.asker.take();
        if turn.changing.is_none() {
            self.changes.turn = None;
        }
        if outcome.is_err() {
            // A member that has caught up counts first: a removal that goes on by itself may wait for that one.
            self.changes.own_at = now + RETRY_PAUSE;
        }
        self.tell(asker, outcome, now);
    }

    fn poll_changing(&mut self, now: Instant) {
        while let Some(turn) = &mut self.changes.turn {
            let Some(changing) = &mut turn.changing else { return };
            let proof = turn.proof;
            match changing.poll(&self.view.state, now) {
                ChangingOutput::Wait(_) => return,
                ChangingOutput::Prove(quorum_rule) => {
                    // The current quorum rule is this register's, which the node may not have been told yet.
                    self.order(Order::State(Box::new(self.view.state.clone())));
                    self.order(Order::Joint(proof, quorum_rule));
                    return;
                }
                ChangingOutput::Propose(change) => {
                    let ask = Ask::Change(Box::new(change));
                    self.ask_controller(ask, CHANGE_TIME_MAX, Purpose::Members, now);
                }
                ChangingOutput::Told(outcome) => self.changed(outcome, now),
                ChangingOutput::End(version) => {
                    self.order(Order::JointEnds(version));
                    self.end_changing();
                }
                ChangingOutput::Over => self.end_changing(),
            }
        }
    }

    fn end_changing(&mut self) {
        if let Some(turn) = &mut self.changes.turn {
            turn.changing = None;
            if matches!(turn.step, ChangeStep::Told) {
                self.changes.turn = None;
            }
        }
    }

    fn changed(&mut self, outcome: Result<u64, ChangeError>, now: Instant) {
        let Some(ChangeTurn { step: ChangeStep::Changing { then }, .. }) = &self.changes.turn else { return };
        let then = then.clone();
        let version = match outcome {
            Ok(version) => version,
            Err(error) => return self.finish(Err(error.to_string()), now),
        };
        let step = match then {
            AfterChange::Joined { theirs, peer } => {
                let Greeting { name, id, kind, .. } = theirs;
                tracing::info!(member = %name, %id, %peer, version, "taken in");
                let told = match kind {
                    Kind::Witness => format!("{name} is a member, a witness (version {version})"),
                    Kind::Data => format!("{name} is a member (version {version}); it counts once it has caught up"),
                };
                ChangeStep::ChangingVoters { told, until: now + VOTERS_TIME_MAX }
            }
            AfterChange::Left { name, in_reach } => {
                tracing::info!(member = %name, version, "leaving: its vote about the register ends first");
                ChangeStep::Leaving { name, in_reach, until: now + VOTERS_TIME_MAX }
            }
            AfterChange::Removed { name } => {
                let state = &self.view.state;
                let members: Vec<&str> = state.members.keys().map(MemberName::as_str).collect();
                tracing::info!(member = %name, version, "removed");
                let confirms = match state.sync_policy().to_string() {
                    policy if policy.is_empty() => "no replica confirms commits any more".to_owned(),
                    policy => format!("commits at remote levels wait for {policy}"),
                };
                let told =
                    format!("{name} is removed (version {version}); members are {}; {confirms}", members.join(", "));
                ChangeStep::ChangingVoters { told, until: now + VOTERS_TIME_MAX }
            }
            AfterChange::Counts { name } => {
                let policy = self.view.state.sync_policy();
                tracing::info!(member = %name, version, %policy, "has caught up and counts");
                return self.finish(Ok(format!("{name} counts")), now);
            }
        };
        if let Some(turn) = &mut self.changes.turn {
            turn.step = step;
        }
    }

    pub(super) fn take_proved(&mut self, proof: u64, outcome: Result<(), String>, now: Instant) {
        if let Some(ChangeTurn { changing: Some(changing), proof: of, .. }) = &mut self.changes.turn
            && *of == proof
        {
            changing.handle_proved(outcome, now);
        }
    }

    /// A member answered whether it is there.
    pub(super) fn take_in_reach(&mut self, from: MemberName, answers: bool, now: Instant) {
        if let Some(ChangeTurn { step: ChangeStep::Reaching { awaited, answering, .. }, .. }) = &mut self.changes.turn {
            awaited.remove(&from);
            if answers {
                answering.insert(from);
            }
            self.poll_step(now);
        }
    }

    /// The answer to what the step asked for.
    pub(super) fn take_members_answer(&mut self, answer: Result<Answer, String>, now: Instant) {
        let Some(turn) = &mut self.changes.turn else { return };
        if let Some(changing) =
            turn.changing.as_mut().filter(|_| matches!(turn.step, ChangeStep::Changing { .. } | ChangeStep::Told))
        {
            let outcome = match answer {
                Ok(Answer::Change(_)) => Ok(()),
                other => Err(refusal(other, "the controller")),
            };
            return changing.handle_answer(outcome, now);
        }
        match &turn.step {
            ChangeStep::Greeting { name, peer, until, .. } => {
                let (name, peer, until) = (name.clone(), peer.clone(), *until);
                self.take_newcomer(name, peer, until, answer, now);
            }
            ChangeStep::Admitting { theirs, peer } => {
                let (theirs, peer) = (theirs.clone(), peer.clone());
                if !matches!(answer, Ok(Answer::Done)) {
                    let text = format!(
                        "{} could not be told the register: {}",
                        theirs.name,
                        refusal(answer, "the controller")
                    );
                    return self.finish(Err(text), now);
                }
                let Greeting { name, id, kind, .. } = theirs.clone();
                let change = MemberChange::Join { name, id, peer: peer.clone(), kind };
                self.begin_changing(change, AfterChange::Joined { theirs, peer }, now);
            }
            _ => {}
        }
    }

    /// Who is there, if it can be taken in.
    fn take_newcomer(
        &mut self,
        name: MemberName,
        peer: String,
        until: Instant,
        answer: Result<Answer, String>,
        now: Instant,
    ) {
        let again = |agent: &mut Agent| {
            if let Some(turn) = &mut agent.changes.turn {
                let at = now + LOOK_INTERVAL;
                turn.step = ChangeStep::Greeting { name: name.clone(), peer: peer.clone(), asked: false, at, until };
            }
        };
        let theirs = match answer {
            Ok(Answer::Greeting(theirs)) => theirs,
            Ok(Answer::Unidentified(said)) => said.member,
            // It may have ended its incarnation a moment ago, and its connections with it.
            _ if now < until => return again(self),
            other => {
                return self
                    .finish(Err(format!("{name} is not reached at {peer}: {}", refusal(other, "it says"))), now);
            }
        };
        if theirs.name != name {
            return self.finish(Err(format!("the node at {peer} is {}, not {name}", theirs.name)), now);
        }
        let state = &self.view.state;
        if let Some(other) = theirs.cluster_id.filter(|id| *id != state.cluster_id) {
            let text = format!(
                "the log of {name} belongs to cluster {other}, the members' to {}: start it with an empty data directory",
                state.cluster_id
            );
            return self.finish(Err(text), now);
        }
        // A removed incarnation is not taken in again, and a register in which it has no part is not built upon: the node begins
        // anew first. It does so by itself when it hears that it was removed.
        let removed = state.removed_at(theirs.id).is_some();
        if !removed && (!theirs.formed || self.view.told.contains(&theirs.id)) {
            let admit = Ask::Admit(theirs.id, peer.clone());
            if let Some(turn) = &mut self.changes.turn {
                turn.step = ChangeStep::Admitting { theirs, peer };
            }
            return self.ask_controller(admit, ADMIT_TIME_MAX + CHANGE_TIME_MAX, Purpose::Members, now);
        }
        if theirs.votes && !removed {
            let text = format!("{name} at {peer} has a part in another cluster: start it with an empty data directory");
            return self.finish(Err(text), now);
        }
        if now >= until {
            let text =
                format!("{name} at {peer} did not begin anew within {ANEW_TIME_MAX:?}: start it again, then try again");
            return self.finish(Err(text), now);
        }
        if !removed {
            self.ask(&name, &peer, Ask::BeginAnew(theirs.id), self.election_timeout, Purpose::Nothing, now);
        }
        again(self);
    }
}
