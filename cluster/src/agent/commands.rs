//! What operators ask of this member: it brings joins and removals to the leader, and walks through switchovers and unclean
//! promotions step by step.

use std::time::{Duration, Instant};

use crate::control::{Answer, Ask};
use crate::failover::StepDown;
use crate::member::MemberName;
use crate::register::Kind;

use crate::agent::Agent;
use crate::agent::state::commands::{Running, Step, handover_to};
use crate::agent::types::{Command, Output, Purpose, refusal};

/// How long an operator's command to the leader may take: longer than all its parts.
const COMMAND_TIME_MAX: Duration = Duration::from_secs(60);
/// How long an operator's switchover may take.
const SWITCHOVER_TIME_MAX: Duration = Duration::from_secs(10);
/// Commands under way at most; a further one is refused.
const COMMANDS_MAX: usize = 64;

impl Agent {
    /// An operator's command; its outcome comes out as [`Output::Reply`] with this number.
    pub fn handle_command(&mut self, id: u64, command: Command, now: Instant) {
        let outcome = if self.commands.running.len() >= COMMANDS_MAX {
            Err(format!("{COMMANDS_MAX} commands are under way here; try again when they are over"))
        } else {
            self.begin_command(id, command, now)
        };
        if let Err(text) = outcome {
            self.reply(id, Err(text));
        }
        self.turn(now);
    }

    fn reply(&mut self, id: u64, outcome: Result<String, String>) {
        self.commands.running.remove(&id);
        self.outputs.push_back(Output::Reply(id, outcome));
    }

    fn begin_command(&mut self, id: u64, command: Command, now: Instant) -> Result<(), String> {
        match command {
            Command::ForceNewCluster => {
                let text = self.force_new_cluster(now)?;
                // The last words of this incarnation: they go out before its end.
                let end = self.outputs.pop_back();
                self.outputs.push_back(Output::Reply(id, Ok(text)));
                self.outputs.extend(end);
                Ok(())
            }
            Command::Switchover(to) => self.begin_switchover(id, to, now),
            Command::AllowUnclean => {
                let step = Step::Allowing { known: self.contacts.leader_end() };
                self.commands.running.insert(id, Running { epoch: self.view.state.epoch, step });
                self.ask_controller(Ask::AllowUnclean, self.election_timeout, Purpose::Command(id), now);
                Ok(())
            }
            Command::Join(name, peer) => self.ask_leader(id, Ask::Join(name, peer), now),
            Command::Remove(name) => self.ask_leader(id, Ask::Remove(name), now),
        }
    }

    /// Brings a command to the leader.
    fn ask_leader(&mut self, id: u64, ask: Ask, now: Instant) -> Result<(), String> {
        if !self.is_member() {
            return Err(self.waiting_for());
        }
        let state = &self.view.state;
        let leader = state.leader.clone().zip(state.leader_peer().map(str::to_owned));
        let (leader, peer) = leader.ok_or("nobody leads at the moment: members change only under a leader")?;
        self.commands.running.insert(id, Running { epoch: state.epoch, step: Step::AtLeader });
        self.ask(&leader, &peer, ask, COMMAND_TIME_MAX, Purpose::Command(id), now);
        Ok(())
    }

    /// Another leader: the old one takes no writes until the new one has everything, then it steps down.
    fn begin_switchover(&mut self, id: u64, to: Option<MemberName>, now: Instant) -> Result<(), String> {
        let state = &self.view.state;
        let leader = state.leader.clone().ok_or("nobody leads: there is nothing to switch over from")?;
        let peer = state.leader_peer().unwrap_or_default().to_owned();
        let to = match to {
            Some(to) => to,
            None => handover_to(state, self.view.controller).ok_or("no replica is in sync: name one with TO")?,
        };
        match state.members.get(&to) {
            None => return Err(format!("{to} is not a member")),
            Some(member) if member.kind == Kind::Witness => {
                return Err(format!("{to} is a witness: it has no log to lead with"));
            }
            Some(_) if to == leader => return Err(format!("{to} leads already")),
            Some(_) => {}
        }
        let epoch = state.epoch;
        let step = Step::Draining { to: to.clone(), begun: now };
        self.commands.running.insert(id, Running { epoch, step });
        self.ask(&leader, &peer, Ask::Drain(epoch, to), SWITCHOVER_TIME_MAX, Purpose::Command(id), now);
        Ok(())
    }

    /// What a command asked for was answered, or was not.
    pub(super) fn take_command_answer(
        &mut self,
        id: u64,
        from: &MemberName,
        answer: Result<Answer, String>,
        now: Instant,
    ) {
        let Some(running) = self.commands.running.get_mut(&id) else { return };
        let epoch = running.epoch;
        let done = matches!(answer, Ok(Answer::Done));
        match &running.step {
            Step::AtLeader => {
                let outcome = match answer {
                    Ok(Answer::Told(text)) => Ok(text),
                    Ok(other) => Err(refusal(Ok(other), &format!("the leader {from}"))),
                    Err(error) => {
                        let blocked = self.contacts.blocked();
                        let awaited = if blocked.is_empty() { String::new() } else { format!("; {blocked}") };
                        Err(format!("the leader {from}: {error}{awaited}"))
                    }
                };
                self.reply(id, outcome);
            }
            Step::Draining { to, begun } if done => {
                let (to, begun) = (to.clone(), *begun);
                running.step = Step::SteppingDown { to: to.clone(), begun };
                let step_down = Ask::StepDown(epoch, StepDown::TransferLeadership(to));
                self.ask_controller(step_down, self.election_timeout, Purpose::Command(id), now);
            }
            Step::Draining { .. } => self.reply(id, Err(refusal(answer, &format!("the leader {from}")))),
            Step::SteppingDown { to, begun } if done => {
                let (to, begun) = (to.clone(), *begun);
                running.step = Step::Moving { to, begun, until: now + SWITCHOVER_TIME_MAX };
            }
            Step::Allowing { known } if done => {
                running.step = Step::MovingUnclean { known: *known, until: now + SWITCHOVER_TIME_MAX };
            }
            Step::SteppingDown { .. } | Step::Allowing { .. } => {
                self.reply(id, Err(refusal(answer, "the controller")));
            }
            Step::Moving { .. } | Step::MovingUnclean { .. } => {}
        }
    }

    /// Commands that wait for the register.
    pub(super) fn turn_commands(&mut self, now: Instant) {
        let state = &self.view.state;
        let new = state.leader.as_ref().map_or("nobody", MemberName::as_str);
        let outcome = |running: &Running| {
            let moved = state.epoch > running.epoch;
            match &running.step {
                Step::Moving { to, begun, .. } if moved => {
                    let took = now.saturating_duration_since(*begun);
                    let text = format!("{new} leads in epoch {} ({took:?})", state.epoch);
                    Some(if state.leader.as_ref() == Some(to) {
                        Ok(text)
                    } else {
                        Err(format!("{text}: {to} was not heard in time, or its log did not reach as far"))
                    })
                }
                Step::Moving { until, .. } if now >= *until => Some(Err(format!(
                    "no new leader within {SWITCHOVER_TIME_MAX:?}; `walferry describe` tells what is awaited"
                ))),
                Step::MovingUnclean { known, .. } if moved => Some(Ok(format!(
                    "{new} leads in epoch {}; the old leader was last heard at {known}: what lies between may be lost",
                    state.epoch
                ))),
                Step::MovingUnclean { until, .. } if now >= *until => {
                    Some(Err("no failover was under way, or no majority of the voters answers".to_owned()))
                }
                _ => None,
            }
        };
        let running = self.commands.running.iter();
        let done: Vec<_> = running.filter_map(|(id, running)| Some((*id, outcome(running)?))).collect();
        for (id, outcome) in done {
            self.reply(id, outcome);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::agent::state::commands::handover_to;
    use crate::register::MemberId;
    use crate::testing::{formed, name, names};

    #[test]
    fn handover_avoids_the_controller() {
        let mut state = formed("a b c", "");
        assert_eq!(handover_to(&state, None), None, "nobody is in sync");
        state.in_sync = names("b c");
        assert_eq!(handover_to(&state, Some(MemberId(2))), Some(name("c")));
        assert_eq!(handover_to(&state, Some(MemberId(1))), Some(name("b")));
        state.in_sync = names("b");
        assert_eq!(handover_to(&state, Some(MemberId(2))), Some(name("b")), "there is no other");
    }
}
