use super::*;
use crate::register::MemberId;
use crate::testing::{led, name};

const TIMEOUT: Duration = Duration::from_millis(400);
const INTERVAL: Duration = Duration::from_millis(50);

/// A cluster of three, led by `a` in epoch 3, seen by its controller `b`.
struct Scene {
    state: ClusterState,
    failover: Failover,
    grant_left: Duration,
    promised: Epoch,
    now: Instant,
}

impl Scene {
    fn new() -> Scene {
        let mut state = led("a b c", "");
        state.epoch = Epoch(3);
        let failover = Failover::new(name("b"), TIMEOUT, INTERVAL);
        Scene { state, failover, grant_left: TIMEOUT, promised: Epoch(3), now: Instant::now() }
    }

    fn poll(&mut self) -> Vec<Effect> {
        let Scene { state, failover, grant_left, promised, now } = self;
        let outlook = Outlook { state, controls: true, grant_left: *grant_left, promised: *promised, now: *now };
        failover.poll(&outlook)
    }

    fn step_down(&mut self, step_down: StepDown) {
        self.failover.handle_step_down(&self.state, Epoch(3), step_down);
    }

    fn fenced(&mut self, member: &str, last_epoch: u64, flushed: u64) {
        let answer = Fenced { last_epoch: Epoch(last_epoch), ..self.answer(member, Epoch(4), flushed) };
        self.failover.handle_fenced(&self.state, &name(member), answer);
    }

    fn answer(&self, member: &str, promised: Epoch, flushed: u64) -> Fenced {
        let id = self.state.members[&name(member)].id;
        Fenced { id, promised, last_epoch: Epoch(3), flushed: Lsn(flushed), granted_until: self.now }
    }

    /// Up to the fence of epoch 4.
    fn silent(&mut self) {
        self.grant_left = Duration::ZERO;
        assert_eq!(self.poll(), [Effect::PreVote]);
        self.failover.handle_pre_vote(&name("b"), true);
        self.failover.handle_pre_vote(&name("c"), true);
        assert_eq!(self.poll(), [Effect::Fence(Epoch(4))]);
    }

    /// The one proposal: who leads, in which epoch, who is in sync.
    fn proposal(&mut self) -> Option<(String, u64, String)> {
        let effects = self.poll();
        let [Effect::Propose(Change { state })] = &effects[..] else { return None };
        assert_eq!(state.version, self.state.version + 1);
        let in_sync: Vec<&str> = state.in_sync.iter().map(MemberName::as_str).collect();
        Some((state.leader.as_ref().expect("a leader").to_string(), state.epoch.0, in_sync.join(" ")))
    }
}

#[test]
fn a_leader_that_is_heard_by_a_majority_stays() {
    let mut scene = Scene::new();
    assert_eq!(scene.poll(), []);
    scene.grant_left = Duration::ZERO;
    assert_eq!(scene.poll(), [Effect::PreVote]);
    scene.failover.handle_pre_vote(&name("b"), true);
    scene.failover.handle_pre_vote(&name("c"), false);
    assert_eq!(scene.poll(), []);
    scene.now += INTERVAL;
    assert_eq!(scene.poll(), [Effect::PreVote], "asked again");
    assert_eq!(scene.failover.blocked_reason(&scene.state), Some(BlockedReason::PreVoting { silent: 1, majority: 2 }));
    scene.grant_left = TIMEOUT;
    assert_eq!(scene.poll(), []);
    assert_eq!(scene.failover.blocked_reason(&scene.state), None);
}

#[test]
fn member_with_the_longest_log_leads_once_it_is_safe() {
    let mut scene = Scene::new();
    scene.silent();
    scene.fenced("b", 3, 900);
    assert_eq!(scene.proposal(), None, "one of three is no majority");
    assert!(matches!(scene.failover.blocked_reason(&scene.state), Some(BlockedReason::Majority { .. })));
    scene.fenced("c", 3, 1000);
    assert_eq!(scene.proposal(), Some(("c".to_owned(), 4, "b".to_owned())));
    assert_eq!(scene.proposal(), None, "once");
    // Of equals the controller does not lead.
    let mut scene = Scene::new();
    scene.failover = Failover::new(name("c"), TIMEOUT, INTERVAL);
    scene.silent();
    scene.fenced("b", 3, 900);
    scene.fenced("c", 3, 900);
    assert_eq!(scene.proposal().expect("a leader").0, "b");
    // A newer epoch counts more than a longer log.
    let mut scene = Scene::new();
    scene.silent();
    scene.fenced("b", 3, 900);
    scene.fenced("c", 2, 1000);
    assert_eq!(scene.proposal().expect("a leader").0, "b");
}

#[test]
fn unsafe_failover_names_the_members_it_waits_for() {
    let mut scene = Scene::new();
    scene.state.members.get_mut(&name("c")).expect("a member").log_status = LogStatus::Lost;
    scene.silent();
    scene.fenced("b", 3, 900);
    scene.fenced("c", 3, 100);
    assert_eq!(scene.proposal(), None);
    let Some(BlockedReason::Unsafe(awaited)) = scene.failover.blocked_reason(&scene.state) else { panic!("it waits") };
    assert_eq!(awaited.to_string(), "a, or 1 of c");
    scene.failover.allow_unclean(Epoch(3));
    assert_eq!(scene.proposal(), Some(("b".to_owned(), 4, "c".to_owned())));
}

#[test]
fn the_old_leader_goes_on_if_it_comes_back_in_time() {
    let mut scene = Scene::new();
    scene.silent();
    scene.fenced("a", 3, 1200);
    scene.fenced("b", 3, 900);
    assert_eq!(scene.proposal(), Some(("a".to_owned(), 4, "b".to_owned())));
}

#[test]
fn nobody_leads_before_the_old_lease_is_over() {
    let mut scene = Scene::new();
    scene.silent();
    let granted_until = scene.now + Duration::from_millis(200);
    for member in ["b", "c"] {
        let answer = Fenced { granted_until, ..scene.answer(member, Epoch(4), 9) };
        scene.failover.handle_fenced(&scene.state, &name(member), answer);
    }
    assert_eq!(scene.proposal(), None);
    assert!(scene.failover.next_timeout(Duration::ZERO, scene.now) <= INTERVAL);
    scene.now = granted_until;
    assert!(scene.proposal().is_some());
}

#[test]
fn a_promise_for_a_later_epoch_moves_the_failover_there() {
    let mut scene = Scene::new();
    scene.silent();
    scene.fenced("b", 3, 900);
    let (b, c) = (scene.answer("b", Epoch(6), 9), scene.answer("c", Epoch(6), 9));
    scene.failover.handle_fenced(&scene.state, &name("c"), c);
    scene.now += INTERVAL;
    assert_eq!(scene.poll(), [Effect::Fence(Epoch(6))]);
    scene.failover.handle_fenced(&scene.state, &name("c"), c);
    scene.failover.handle_fenced(&scene.state, &name("b"), b);
    assert_eq!(scene.proposal().expect("a leader").1, 6);
}

#[test]
fn leader_that_steps_down_is_replaced_without_a_pre_vote() {
    for (step_down, leader) in [
        (StepDown::TransferLeadership(name("c")), "c"),
        (StepDown::TransferLeadership(name("b")), "c"),
        (StepDown::Unfit, "c"),
    ] {
        let mut scene = Scene::new();
        scene.step_down(step_down.clone());
        assert_eq!(scene.poll(), [Effect::Fence(Epoch(4))]);
        scene.fenced("a", 3, 1000);
        scene.fenced("b", 3, 900);
        scene.fenced("c", 3, 1000);
        // `b` is behind: it cannot have what was asked for it. Of equals the controller, `b`, is the last choice.
        assert_eq!(scene.proposal().expect("a leader").0, leader, "{step_down:?}");
    }
}

/// It answers no fence request, and has given its lease up: nobody waits for what it was granted.
#[test]
fn unfit_leader_is_replaced_before_its_grants_end() {
    for (step_down, at_once) in [(StepDown::Unfit, true), (StepDown::TransferLeadership(name("c")), false)] {
        let mut scene = Scene::new();
        scene.step_down(step_down.clone());
        assert_eq!(scene.poll(), [Effect::Fence(Epoch(4))]);
        for member in ["b", "c"] {
            let answer = Fenced { granted_until: scene.now + TIMEOUT, ..scene.answer(member, Epoch(4), 900) };
            scene.failover.handle_fenced(&scene.state, &name(member), answer);
        }
        assert_eq!(scene.proposal().is_some(), at_once, "{step_down:?}");
        scene.now += TIMEOUT;
        assert_eq!(scene.proposal().is_some(), !at_once, "{step_down:?}: once, and when the grants have ended");
    }
}

#[test]
fn failed_leader_leads_again_if_only_it_has_the_commits() {
    let mut scene = Scene::new();
    scene.state.in_sync.clear();
    scene.state.policy = "ALL".to_owned();
    scene.step_down(StepDown::Unfit);
    assert_eq!(scene.poll(), [Effect::Fence(Epoch(4))]);
    scene.fenced("b", 3, 900);
    scene.fenced("c", 2, 800);
    assert_eq!(scene.proposal(), None, "commits under ALL waited for nobody but the leader");
    scene.fenced("a", 3, 1000);
    assert_eq!(scene.proposal().expect("a leader").0, "a", "it was started again");
}

#[test]
fn a_failover_ends_with_the_register_and_with_control() {
    let mut scene = Scene::new();
    scene.silent();
    scene.state.version += 1;
    scene.state.in_sync.clear();
    assert_eq!(scene.poll(), [], "another change: the failover goes on");
    scene.fenced("b", 3, 900);
    scene.fenced("c", 3, 900);
    assert!(scene.proposal().is_some());
    scene.failover.handle_proposed();
    scene.state.version += 1;
    scene.state.epoch = Epoch(4);
    scene.grant_left = TIMEOUT;
    assert_eq!(scene.poll(), []);
    assert_eq!(scene.failover.blocked_reason(&scene.state), None);
    scene.state.leader = None;
    scene.state.version += 1;
    assert_eq!(scene.poll(), [Effect::Fence(Epoch(5))], "nobody leads: no pre-vote is needed");
    let outlook = Outlook {
        state: &scene.state,
        controls: false,
        grant_left: Duration::ZERO,
        promised: Epoch(4),
        now: scene.now,
    };
    assert_eq!(scene.failover.poll(&outlook), []);
    assert_eq!(scene.failover.blocked_reason(&scene.state), None, "another member controls");
}

#[test]
fn fence_ends_with_its_incarnation() {
    let mut scene = Scene::new();
    scene.silent();
    scene.fenced("b", 3, 900);
    // `c` was fenced, then came back without its disk and was taken back: its next incarnation promised nothing.
    let old_incarnation = scene.answer("c", Epoch(4), 900);
    scene.failover.handle_fenced(&scene.state, &name("c"), old_incarnation);
    let member = scene.state.members.get_mut(&name("c")).expect("a member");
    (member.id, member.log_status) = (MemberId(33), LogStatus::Lost);
    scene.state.version += 1;
    assert_eq!(scene.proposal(), None);
    assert!(matches!(scene.failover.blocked_reason(&scene.state), Some(BlockedReason::Majority { .. })));
    scene.failover.handle_fenced(&scene.state, &name("c"), old_incarnation);
    assert!(
        matches!(scene.failover.blocked_reason(&scene.state), Some(BlockedReason::Majority { .. })),
        "a late answer"
    );
}

#[test]
fn whoever_was_asked_for_is_waited_for() {
    let mut scene = Scene::new();
    scene.step_down(StepDown::TransferLeadership(name("c")));
    assert_eq!(scene.poll(), [Effect::Fence(Epoch(4))]);
    scene.fenced("a", 3, 1000);
    scene.fenced("b", 3, 1000);
    assert_eq!(scene.proposal(), None, "its answer is on the way");
    scene.fenced("c", 3, 1000);
    assert_eq!(scene.proposal().expect("a leader").0, "c");
    let mut scene = Scene::new();
    scene.step_down(StepDown::TransferLeadership(name("c")));
    scene.poll();
    scene.fenced("a", 3, 1000);
    scene.fenced("b", 3, 1000);
    scene.now += TIMEOUT;
    assert_eq!(scene.proposal().expect("a leader").0, "a", "but not for ever");
}

#[test]
fn a_leader_that_wants_to_go_on_does_not_undo_a_switchover() {
    let mut scene = Scene::new();
    scene.step_down(StepDown::TransferLeadership(name("c")));
    assert_eq!(scene.poll(), [Effect::Fence(Epoch(4))]);
    scene.fenced("c", 3, 1000);
    // The old leader's heartbeat met the promise that `c` just gave, before the old leader was fenced itself.
    scene.step_down(StepDown::TransferLeadership(name("a")));
    scene.fenced("a", 3, 1000);
    assert_eq!(scene.proposal().expect("a leader").0, "c");
    // In the other order the operator's wish counts as well, and a log that failed counts most.
    for (first, then, leader) in [
        (StepDown::TransferLeadership(name("a")), StepDown::TransferLeadership(name("c")), "c"),
        (StepDown::TransferLeadership(name("c")), StepDown::Unfit, "b"),
        (StepDown::Unfit, StepDown::TransferLeadership(name("c")), "b"),
    ] {
        let mut scene = Scene::new();
        scene.step_down(first.clone());
        scene.step_down(then.clone());
        scene.poll();
        scene.fenced("a", 3, 1000);
        scene.fenced("b", 3, 1000);
        scene.fenced("c", 3, if leader == "c" { 1000 } else { 900 });
        assert_eq!(scene.proposal().expect("a leader").0, leader, "{first:?}, then {then:?}");
    }
}
