use std::collections::HashSet;

use super::*;
use crate::member::ClusterId;
use crate::testing::{led, name, names};

#[test]
fn a_member_comes_in_two_steps_and_a_witness_in_one() {
    let state = led("a b c", "");
    let joining = state.with_member(&name("d"), MemberId(9), "h:9", Kind::Data).expect("it may");
    assert_eq!(joining.version, state.version + 1);
    assert_eq!(joining.quorum_rule(), state.quorum_rule(), "what it confirms does not count yet");
    assert_eq!((state.majority(), joining.majority()), (2, 3), "its vote does");
    assert_eq!(joining.with_caught_up(&name("d"), MemberId(8)), None, "another incarnation");
    let whole = joining.with_caught_up(&name("d"), MemberId(9)).expect("it joins");
    assert_eq!(whole.quorum_rule().policy.to_string(), "ANY 2 (*)");
    assert!(whole.quorum_rule().counts(&name("d")) && whole.in_sync.contains(&name("d")));
    assert_eq!(whole.with_caught_up(&name("d"), MemberId(9)), None, "once");
    let witness = state.with_member(&name("w"), MemberId(9), "h:9", Kind::Witness).expect("it may");
    assert_eq!(witness.members[&name("w")].log_status, LogStatus::Complete);
    assert_eq!(witness.quorum_rule(), state.quorum_rule());
}

#[test]
fn what_cannot_be_is_refused_with_the_reason() {
    let join = |state: &ClusterState, text: &str, peer: &str| {
        state.with_member(&name(text), MemberId(99), peer, Kind::Data).expect_err("refused").to_string()
    };
    let state = led("a b c", "");
    assert!(join(&state, "b", "h:1").starts_with("b is a member already"));
    assert_eq!(join(&state, "d", "10.0.0.1:6401"), "10.0.0.1:6401 is the peer address of b");
    let many: Vec<String> = (0..MEMBERS_MAX).map(|number| format!("n{number}")).collect();
    assert!(join(&led(&many.join(" "), ""), "d", "h:1").contains("16 members"));

    // members, policy, in reach, who goes, what is said
    let table = [
        ("a b c", "", "a b c", "b", ""),
        ("a b c", "", "a b c", "x", "x is not a member; members are a, b, c"),
        ("a b c", "", "a b c", "a", "a leads: `walferry switchover` first, then remove it"),
        ("a b c", "", "a b", "c", ""),
        ("a b c", "", "a b", "b", "waiting for c"),
        ("a b", "", "a", "b", ""),
        ("a b w?", "", "a w", "b", ""),
        ("a b c", "FIRST 1 (b, c, *)", "a b c", "b", ""),
        ("a b c", "FIRST 1 (b, c)", "a b c", "b", "there would be 0 of those that it names when c leads"),
        ("a b c", "FIRST 1 (b)", "a b c", "b", "asks for 1 replicas, and without b there would be 0"),
        ("a b c", "ANY 2 (a, b, c)", "a b c", "c", "asks for 2 replicas, and without c there would be 1"),
        ("a b c d", "ANY 2 (a, b, c)", "a b c d", "d", ""),
        ("a b c", "FIRST 1 (x)", "a b c", "c", ""),
        ("a b c", "ALL", "a b c", "b", ""),
    ];
    for (members, policy, in_reach, goes, says) in table {
        let outcome = led(members, policy).without_member(&name(goes), &names(in_reach));
        let text = outcome.as_ref().err().map(ToString::to_string).unwrap_or_default();
        assert_eq!(outcome.is_ok(), says.is_empty(), "{members} without {goes}, {in_reach} in reach: {text}");
        assert!(text.contains(says), "{text}");
    }
}

#[test]
fn removal_waits_until_one_that_joins_counts() {
    let state = led("a b c", "ANY 2 (*)").with_member(&name("d"), MemberId(9), "h:1", Kind::Data).expect("taken in");
    let refused = state.without_member(&name("b"), &names("a b c d")).expect_err("d confirms nothing yet").to_string();
    assert!(refused.contains("there would be 1 of those that it names when a leads"), "{refused}");
    let state = state.with_caught_up(&name("d"), MemberId(9)).expect("it has caught up");
    state.without_member(&name("b"), &names("a b c d")).expect("c and d are left");
}

#[test]
fn removal_waits_until_another_one_has_ended() {
    let state = led("a b c", "ANY 1 (*)").with_leaving(&name("b")).expect("c is left");
    let refused = state.without_member(&name("c"), &names("a b c")).expect_err("nobody would be left").to_string();
    assert_eq!(refused, "b is leaving, and c can be removed once it has left: `walferry describe` shows who leaves");
    let state = state.without_member(&name("b"), &names("a b c")).expect("it was first");
    let refused = state.without_member(&name("c"), &names("a c")).expect_err("ANY 1").to_string();
    assert!(refused.contains("there would be 0 of those that it names when a leads"), "{refused}");
}

#[test]
fn min_in_sync_is_not_met_by_one_that_joins() {
    let joining = led("a b c w?", "").with_member(&name("d"), MemberId(9), "h:1", Kind::Data).expect("taken in");
    let whole = joining.with_caught_up(&name("d"), MemberId(9)).expect("it has caught up");
    // who is in the register, min_in_sync, who goes, how many would be left when that is too few
    let table = [
        (&joining, 2, "b", Some(1)),
        (&joining, 1, "b", None),
        (&joining, 2, "d", None),
        (&joining, 2, "w", None),
        (&whole, 2, "b", None),
        (&whole, 2, "d", None),
        (&whole, 3, "d", Some(2)),
    ];
    for (state, need, goes, left) in table {
        let outcome = state.check_min_in_sync(&name(goes), need);
        let refused = left.map(|have| MembershipError::MinInSync { name: name(goes), need, have });
        assert_eq!(outcome.err(), refused, "min_in_sync {need} without {goes}");
    }
}

#[test]
fn removed_incarnations_are_remembered_up_to_the_limit() {
    let everybody = names("a b c d");
    let mut state = led("a b c", "").without_member(&name("c"), &everybody).expect("it may");
    assert_eq!(state.removed_at(MemberId(3)), Some(state.version));
    let again = state.with_member(&name("c"), MemberId(4), "h:4", Kind::Data).expect("it may");
    assert_eq!(again.removed_at(MemberId(3)), Some(state.version), "its next incarnation is another");
    assert_eq!(again.removed_at(MemberId(4)), None);
    for id in 0..REMOVED_MAX as u64 {
        state = state.with_member(&name("d"), MemberId(100 + id), "h:9", Kind::Data).expect("it may");
        state = state.without_member(&name("d"), &everybody).expect("it may");
    }
    assert_eq!((state.removed.len(), state.removed_at(MemberId(3))), (REMOVED_MAX, None));
}

/// One commit and who holds it, in one state of the register. `holders` are disks.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    /// Of each node: nothing, or what the register says of it.
    members: Vec<Option<LogStatus>>,
    leader: usize,
    /// Nobody has heard of the commit, or it was confirmed and these have it.
    holders: Option<u32>,
}

const NODES: [&str; 5] = ["a", "b", "c", "d", "e"];

impl World {
    fn state(&self, policy: &str) -> ClusterState {
        let member = |(index, log_status): (usize, &Option<LogStatus>)| {
            let (id, peer) = (MemberId(index as u64 + 1), format!("h:{index}"));
            Some((name(NODES[index]), Member { id, peer, kind: Kind::Data, log_status: (*log_status)? }))
        };
        let members = self.members.iter().enumerate().filter_map(member).collect();
        let mut state = ClusterState::formed(ClusterId(7), members, policy).expect("a policy");
        state.leader = Some(name(NODES[self.leader]));
        state
    }

    /// Every smallest set of replicas that confirms a commit under the quorum rule of `state`.
    fn confirming(&self, state: &ClusterState) -> Vec<u32> {
        let quorum_rule = state.quorum_rule();
        let (SyncPolicy::Any { k, .. } | SyncPolicy::First { k, .. }) = quorum_rule.policy else { return vec![0] };
        let counts = |set: &u32| {
            let of = |index: &usize| set >> index & 1 == 1;
            let member =
                |index: usize| quorum_rule.counts(&name(NODES[index])) && quorum_rule.policy.names(&name(NODES[index]));
            set.count_ones() as usize == k && (0..NODES.len()).filter(of).all(member)
        };
        (0..1 << self.members.len()).filter(counts).collect()
    }

    /// What may happen next. The leader changes members only while it has its disk.
    fn successors(&self, policy: &str) -> Vec<World> {
        let state = self.state(policy);
        let everybody: BTreeSet<MemberName> = state.members.keys().cloned().collect();
        let leader = 1 << self.leader;
        let mut next = Vec::new();
        let alive = self.members[self.leader] == Some(LogStatus::Complete);
        if self.holders.is_none() && alive {
            next.extend(
                self.confirming(&state).into_iter().map(|set| World { holders: Some(set | leader), ..self.clone() }),
            );
        }
        for (index, log_status) in self.members.iter().enumerate() {
            let with = |log_status, proof: u32| {
                let mut world = self.clone();
                world.members[index] = log_status;
                world.holders = world.holders.map(|holders| holders | proof);
                world
            };
            // Step 2 of a change: the rule of the new state has confirmed every commit that the old ones had.
            let proved = |changed: &ClusterState, log_status: Option<LogStatus>| {
                let proofs = with(log_status, 0).confirming(changed);
                proofs.into_iter().map(|proof| with(log_status, proof)).collect::<Vec<_>>()
            };
            let (id, this) = (MemberId(index as u64 + 1), name(NODES[index]));
            match log_status {
                None if alive => {
                    let changed =
                        state.with_member(&this, id, &format!("h:{index}"), Kind::Data).expect("there is a place");
                    next.push(with(Some(changed.members[&this].log_status), 0));
                }
                Some(LogStatus::Joining) if alive => {
                    let changed = state.with_caught_up(&this, id).expect("it joins");
                    // It is in sync: it has what the leader has.
                    let has = |world: World| World { holders: world.holders.map(|all| all | 1 << index), ..world };
                    next.extend(proved(&changed, Some(LogStatus::Complete)).into_iter().map(has));
                }
                Some(LogStatus::Lost) if alive => next.push(with(Some(LogStatus::Complete), 1 << index)),
                Some(LogStatus::Complete) => {
                    let mut world = with(Some(LogStatus::Lost), 0);
                    world.holders = world.holders.map(|holders| holders & !(1 << index));
                    next.push(world);
                }
                _ => {}
            }
            if alive
                && log_status.is_some()
                && let Ok(changed) = state.without_member(&this, &everybody)
            {
                let gone = |world: World| World { holders: world.holders.map(|all| all & !(1 << index)), ..world };
                next.extend(proved(&changed, None).into_iter().map(gone));
            }
        }
        next.extend(self.failovers(&state));
        next
    }

    /// Every leader that some set of fenced members may bring; each has the commit, or this is the loss that must not be.
    fn failovers(&self, state: &ClusterState) -> Vec<World> {
        let mut next = Vec::new();
        for set in 1_u32..1 << self.members.len() {
            let of = |index: &usize| set >> index & 1 == 1 && self.members[*index].is_some();
            let fenced: BTreeSet<MemberName> =
                (0..self.members.len()).filter(of).map(|index| name(NODES[index])).collect();
            if fenced.len() != set.count_ones() as usize
                || fenced.len() < state.majority()
                || state.safe_to_lead(&fenced).is_err()
            {
                continue;
            }
            let whole = |index: &usize| of(index) && self.members[*index] == Some(LogStatus::Complete);
            let has = |index: &usize| self.holders.is_none_or(|holders| holders >> index & 1 == 1);
            let may_lead: Vec<usize> = (0..self.members.len()).filter(whole).collect();
            let reach_furthest: Vec<usize> = may_lead.iter().copied().filter(has).collect();
            // With none that may lead, nobody does.
            let met = may_lead.is_empty() || !reach_furthest.is_empty();
            assert!(met, "{fenced:?} is approved and lacks the commit: {self:?}");
            next.extend(reach_furthest.into_iter().map(|leader| World { leader, ..self.clone() }));
        }
        next
    }
}

/// Walks through everything that joins, removals, lost disks and failovers can make of a cluster.
fn explore(count: usize, disks_die: bool, policy: &str) -> usize {
    let mut members = vec![None; count];
    members[..2].fill(Some(LogStatus::Complete));
    let mut open = vec![World { members, leader: 0, holders: None }];
    let mut seen: HashSet<World> = open.iter().cloned().collect();
    while let Some(world) = open.pop() {
        let lost = |world: &World| world.members.contains(&Some(LogStatus::Lost));
        let successors = world.successors(policy).into_iter().filter(|next| disks_die || !lost(next));
        let fresh: Vec<World> = successors.filter(|next| seen.insert(next.clone())).collect();
        open.extend(fresh);
    }
    seen.len()
}

#[test]
fn member_changes_never_make_a_failover_miss_a_commit() {
    for policy in ["", "ANY 1 (*)", "FIRST 1 (b, c, d)", "ANY 2 (a, b, c, d)"] {
        assert!(explore(4, true, policy) > 100, "{policy}");
    }
    assert!(explore(5, false, "") > 1000);
}
