use super::*;
use crate::register::LogStatus;
use crate::testing::{led, name};

/// A change, the register, and the time.
struct Scene {
    state: ClusterState,
    changing: Changing,
    now: Instant,
}

impl Scene {
    /// `a` leads `b` and `c`, and `d` joins.
    fn new(change: MemberChange) -> Scene {
        let mut state = led("a b c d+", "");
        state.epoch = Epoch(3);
        let now = Instant::now();
        let changing = Changing::begin(change, &state, now).expect("the rules allow it");
        Scene { state, changing, now }
    }

    fn poll(&mut self) -> ChangingOutput {
        self.changing.poll(&self.state, self.now)
    }

    /// The register that it proposes, up to there.
    fn proposal(&mut self) -> ClusterState {
        match self.poll() {
            ChangingOutput::Propose(Change { state }) => {
                assert_eq!(state.version, self.state.version + 1);
                state
            }
            other => panic!("a proposal, not {other:?}"),
        }
    }

    fn prove(&mut self) -> QuorumRule {
        let ChangingOutput::Prove(quorum_rule) = self.poll() else { panic!("the quorum rule changes") };
        assert_eq!(self.poll(), ChangingOutput::Wait(None), "until they are proved");
        self.changing.handle_proved(Ok(()), self.now);
        quorum_rule
    }

    fn error(&mut self) -> ChangeError {
        let ChangingOutput::Told(Err(error)) = self.poll() else { panic!("an error") };
        error
    }
}

fn caught_up() -> MemberChange {
    MemberChange::CaughtUp { name: name("d"), id: MemberId(4) }
}

fn join() -> MemberChange {
    MemberChange::Join { name: name("e"), id: MemberId(5), peer: "h:5".to_owned(), kind: Kind::Data }
}

#[test]
fn change_under_the_same_quorum_rule_needs_no_proof() {
    let mut scene = Scene::new(join());
    let next = scene.proposal();
    assert_eq!(scene.poll(), ChangingOutput::Wait(None), "it is on its way");
    scene.changing.handle_answer(Ok(()), scene.now);
    assert_eq!(scene.poll(), ChangingOutput::Wait(Some(scene.now + ARRIVAL_TIME_MAX)), "taken, but not seen here yet");
    scene.state = next;
    assert_eq!(scene.poll(), ChangingOutput::Told(Ok(scene.state.version)));
    assert_eq!(scene.poll(), ChangingOutput::Over);
}

#[test]
fn both_quorum_rules_count_until_the_register_moves() {
    let mut scene = Scene::new(caught_up());
    let quorum_rule = scene.prove();
    let next = scene.proposal();
    assert_eq!(next.quorum_rule(), quorum_rule);
    assert_ne!(scene.state.quorum_rule(), quorum_rule);
    scene.changing.handle_answer(Ok(()), scene.now);
    scene.state = next;
    assert_eq!(scene.poll(), ChangingOutput::Told(Ok(scene.state.version)));
    assert_eq!(scene.poll(), ChangingOutput::End(scene.state.version));
}

#[test]
fn what_is_not_proved_is_not_proposed() {
    let mut scene = Scene::new(caught_up());
    assert!(matches!(scene.poll(), ChangingOutput::Prove(_)));
    scene.changing.handle_proved(Err("d is behind".to_owned()), scene.now);
    assert_eq!(scene.error(), ChangeError::Unproved("d is behind".to_owned()));
    assert_eq!(scene.poll(), ChangingOutput::End(scene.state.version), "nothing was proposed");
}

#[test]
fn proposal_of_unknown_outcome_keeps_both_quorum_rules() {
    let mut scene = Scene::new(caught_up());
    scene.prove();
    let first = scene.proposal();
    scene.changing.handle_answer(Err("no answer".to_owned()), scene.now);
    assert_eq!(scene.poll(), ChangingOutput::Wait(Some(scene.now + RETRY_PAUSE)));
    scene.now += RETRY_PAUSE;
    assert_eq!(scene.proposal(), first, "again");
    scene.now += PROPOSE_TIME_MAX;
    scene.changing.handle_answer(Err("no answer".to_owned()), scene.now);
    scene.now += RETRY_PAUSE;
    assert_eq!(scene.error(), ChangeError::Unknown("no answer".to_owned()));
    assert_eq!(scene.poll(), ChangingOutput::Wait(Some(scene.now + END_PAUSE)), "it may still be taken");
    assert_eq!(scene.changing.unknown(), Some("no answer"));
    scene.state = first;
    assert_eq!(scene.changing.unknown(), Some("no answer"), "it has not looked");
    assert_eq!(scene.poll(), ChangingOutput::End(scene.state.version), "and was");
}

/// The leader does not wait for a register that nothing else moves.
#[test]
fn unknown_fate_is_found_out_by_a_change_of_nothing() {
    let mut scene = Scene::new(join());
    scene.proposal();
    scene.now += PROPOSE_TIME_MAX;
    scene.changing.handle_answer(Err("no answer".to_owned()), scene.now);
    scene.now += RETRY_PAUSE;
    assert_eq!(scene.error(), ChangeError::Unknown("no answer".to_owned()));
    // Nobody controls the register for a while, and late answers change nothing.
    for _ in 0..3 {
        assert_eq!(scene.poll(), ChangingOutput::Wait(Some(scene.now + END_PAUSE)));
        scene.now += END_PAUSE;
        assert_eq!(scene.proposal(), scene.state.next());
        scene.changing.handle_answer(Err("nobody controls".to_owned()), scene.now);
        assert_eq!(scene.changing.unknown(), Some("nobody controls"));
    }
    scene.state = scene.state.next();
    assert_eq!(scene.poll(), ChangingOutput::Over, "the change was not taken, and cannot be any more");
    assert_eq!(scene.changing.unknown(), None);
}

#[test]
fn changes_that_come_first_are_followed_or_end_it() {
    // The in-sync set: the same quorum rule, so it goes on from there.
    let mut scene = Scene::new(caught_up());
    scene.prove();
    scene.proposal();
    scene.changing.handle_answer(Ok(()), scene.now);
    scene.state = scene.state.with_in_sync(&[(name("b"), MemberId(2))].into()).expect("another set");
    assert_eq!(scene.proposal().in_sync, [name("b"), name("d")].into());
    // So it does when a member loses its disk: the loss may as well have come after the change.
    scene.changing.handle_answer(Ok(()), scene.now);
    scene.state = scene.state.with_new_incarnation(&name("c"), MemberId(33));
    assert_eq!(scene.proposal().members[&name("c")].log_status, LogStatus::Lost);
    // An earlier change that was thought to be lost: another quorum rule, of which nothing is proved.
    scene.changing.handle_answer(Ok(()), scene.now);
    scene.state = scene.state.without_member(&name("c"), &[name("a"), name("b")].into()).expect("it may");
    assert_eq!(scene.error(), ChangeError::Overtaken);
    assert_eq!(scene.poll(), ChangingOutput::End(scene.state.version));
    // Another epoch: the proof was another leader's.
    let mut scene = Scene::new(caught_up());
    scene.prove();
    scene.state.version += 1;
    scene.state.epoch = Epoch(4);
    assert_eq!(scene.error(), ChangeError::LeaderChanged);
    // The member itself came back as another incarnation, or nothing but others' changes comes through.
    let mut scene = Scene::new(caught_up());
    scene.prove();
    scene.state = scene.state.with_new_incarnation(&name("d"), MemberId(44));
    assert_eq!(scene.error(), ChangeError::NotJoining(name("d")));
    let mut scene = Scene::new(join());
    scene.proposal();
    scene.state.version += 1;
    scene.now += PROPOSE_TIME_MAX;
    scene.changing.handle_answer(Ok(()), scene.now);
    assert!(matches!(scene.error(), ChangeError::GivenUp(_)));
    assert_eq!(scene.poll(), ChangingOutput::Over);
}

#[test]
fn member_is_removed_in_any_incarnation() {
    let in_reach = [name("a"), name("b")].into();
    let mut scene = Scene::new(MemberChange::Remove { name: name("d"), in_reach });
    scene.proposal();
    scene.changing.handle_answer(Ok(()), scene.now);
    scene.state = scene.state.with_new_incarnation(&name("d"), MemberId(44));
    let next = scene.proposal();
    assert!(!next.members.contains_key(&name("d")) && next.removed_at(MemberId(44)).is_some());
    scene.changing.handle_answer(Ok(()), scene.now);
    scene.state = next;
    assert_eq!(scene.poll(), ChangingOutput::Told(Ok(scene.state.version)));
}
