//! The controller's part in who votes about the register: the voters follow the members, one step at a time. Those who vote
//! are members that stay; a member that leaves stops voting before it is removed, so that no majority ever rests on a vote that
//! was thrown away.

use std::time::{Duration, Instant};

use crate::control::Answer;
use crate::register::MemberId;

use crate::agent::Agent;
use crate::agent::types::{Asker, Output, VoterStep};

/// How long a node may take to get the register before it is a member.
pub(super) const ADMIT_TIME_MAX: Duration = Duration::from_secs(10);
/// A node that has the register and has not become a member by then no longer gets it.
const ADMITTED_TIME_MAX: Duration = Duration::from_secs(60);
/// Nodes that are told the register without being members, at most.
const ADMITTED_MAX: usize = 8;
/// A step that failed is tried again after this.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

impl Agent {
    /// To the controller: a node that is about to join gets the register.
    pub(super) fn answer_admit(&mut self, asker: Asker, id: MemberId, peer: String, until: Instant, now: Instant) {
        let full = self.voters.admitted.len() >= ADMITTED_MAX && !self.voters.admitted.contains_key(&id);
        if !self.view.controls || full {
            let name = &self.config.name;
            let text = match full {
                true => {
                    format!("{name} tells the register to {ADMITTED_MAX} nodes that are no members, which is the limit")
                }
                false => format!("{name} does not control the register"),
            };
            return self.answer(asker, Answer::Refused(text), now);
        }
        self.voters.admitted.insert(id, (peer, now));
        self.voters.asked.push((asker, id, until));
    }

    /// The register's voters follow the members.
    pub(super) fn keep_voters(&mut self, now: Instant) {
        self.answer_admitted(now);
        let state = &self.view.state;
        let idle = state.version > 0 && self.voters.step.is_none() && !self.contacts.is_taking_back();
        if !idle || now < self.voters.retry_at || !self.view.controls || !self.is_member() {
            return;
        }
        let mut told = state.told();
        self.voters.admitted.retain(|id, (_, since)| {
            now.saturating_duration_since(*since) < ADMITTED_TIME_MAX && !told.contains_key(id)
        });
        told.extend(self.voters.admitted.iter().map(|(id, (peer, _))| (*id, peer.clone())));
        if let Some(step) = self.view.next_step(&told, &state.voters(&self.view.voters)) {
            self.voters.step = Some(step.clone());
            self.outputs.push_back(Output::ChangeVoters(step));
        }
    }

    fn answer_admitted(&mut self, now: Instant) {
        let told = |step: &Option<VoterStep>, id: MemberId| {
            self.view.told.contains(&id) && !matches!(step, Some(VoterStep::Admit(admitting, _)) if *admitting == id)
        };
        let mut answers = Vec::new();
        let (step, controls) = (&self.voters.step, self.view.controls);
        let mut asked = std::mem::take(&mut self.voters.asked);
        asked.retain(|(asker, id, until)| {
            let answer = if told(step, *id) {
                Answer::Done
            } else if now >= *until || !controls {
                Answer::Refused("the node did not get the register in time".to_owned())
            } else {
                return true;
            };
            answers.push((*asker, answer));
            false
        });
        self.voters.asked = asked;
        for (asker, answer) in answers {
            self.answer(asker, answer, now);
        }
    }

    /// A step of the voters is done, or failed.
    pub fn handle_voters_changed(&mut self, outcome: Result<(), String>, now: Instant) {
        self.voters.step = None;
        if let Err(error) = outcome {
            tracing::debug!("the register's voters cannot follow the members yet: {error}");
            self.voters.retry_at = now + RETRY_PAUSE;
        }
        self.turn(now);
    }
}
