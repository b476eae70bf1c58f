use super::*;
use crate::testing::{formed, name, names};

#[test]
fn without_a_policy_a_majority_of_the_data_members_confirms() {
    let table = [
        ("a", ""),
        ("a b", "ANY 1 (*)"),
        ("a b w?", "ANY 1 (*)"),
        ("a b c", "ANY 1 (*)"),
        ("a b c d+", "ANY 1 (*)"),
        ("a b c d*", "ANY 2 (*)"),
        ("a b c d e", "ANY 2 (*)"),
    ];
    for (members, policy) in table {
        assert_eq!(formed(members, "").sync_policy().to_string(), policy, "{members}");
    }
    assert_eq!(formed("a b c", "FIRST 1 (b, c)").sync_policy().to_string(), "FIRST 1 (b, c)");
    assert!(ClusterState::formed(ClusterId(7), BTreeMap::new(), "ANY 0 (a)").is_err());
}

#[test]
fn a_change_is_taken_only_by_the_version_that_it_follows() {
    let mut state = formed("a b c", "");
    let mut first = state.next();
    first.epoch = Epoch(4);
    let second = Change { state: first.clone() };
    assert_eq!(state.apply(Change { state: first }), Outcome::Taken);
    assert_eq!((state.version, state.apply(second)), (2, Outcome::Conflict));
    let older = ClusterState { epoch: Epoch(3), ..state.next() };
    assert_eq!(state.apply(Change { state: older }), Outcome::Conflict, "epochs do not go back");
}

type Spoil = fn(&mut ClusterState);

#[test]
fn change_that_cannot_follow_is_refused() {
    let mut state = formed("a b w?", "");
    (state.epoch, state.leader) = (Epoch(4), Some(name("a")));
    let kept = state.clone();
    let changes: [(&str, Spoil); 11] = [
        ("another cluster", |next| next.cluster_id = ClusterId(99)),
        ("an epoch before", |next| next.epoch = Epoch(3)),
        ("an epoch that nobody reaches", |next| next.epoch = Epoch(u64::MAX)),
        ("another leader of an epoch", |next| next.leader = Some(name("b"))),
        ("a leader who is no member", |next| (next.epoch, next.leader) = (Epoch(5), Some(name("x")))),
        ("a leader without a log", |next| (next.epoch, next.leader) = (Epoch(5), Some(name("w")))),
        ("an unknown name in sync", |next| next.in_sync = names("x")),
        ("an unknown name that leaves", |next| next.leaving = names("x")),
        ("other members", |next| next.members = formed("c d e", "").members),
        ("another election timeout", |next| next.election_timeout_us += 1),
        ("a policy that is none", |next| next.policy = "ANY 0 (a)".to_owned()),
    ];
    for (what, change) in changes {
        let mut next = state.next();
        change(&mut next);
        assert_eq!(state.apply(Change { state: next }), Outcome::Conflict, "{what}");
        assert_eq!(state, kept, "{what}");
    }
    let mut next = state.next();
    (next.epoch, next.leader) = (Epoch(5), Some(name("b")));
    assert_eq!(state.apply(Change { state: next }), Outcome::Taken);
}

#[test]
fn member_that_joins_a_forced_cluster_gets_its_register() {
    let forced = formed("a b c", "").forced(&name("a"));
    let first = Change { state: forced.next() };
    let second = Change { state: first.state.next() };
    // The survivor began with the state that was forced, who joins with nothing.
    let (mut survivor, mut joined) = (forced, ClusterState::default());
    for change in [first.clone(), first, second] {
        assert_eq!(survivor.apply(change.clone()), joined.apply(change));
        assert_eq!(survivor, joined);
    }
}

#[test]
fn the_fenced_meet_every_set_that_may_have_confirmed_a_commit() {
    // members, policy, leader, in sync, fenced, what is awaited
    let table = [
        ("a b c", "ANY 1 (*)", "a", "b c", "b c", ""),
        ("a b c", "ANY 1 (*)", "a", "b c", "b", "a, or 1 of c"),
        ("a b c", "ANY 1 (*)", "a", "b c", "a", ""),
        ("a b c", "ANY 1 (*)", "a", "b c", "a c", ""),
        ("a b c", "ANY 2 (*)", "a", "b c", "c", ""),
        ("a b c", "ANY 1 (b)", "a", "b c", "b", ""),
        ("a b c", "ANY 1 (b)", "a", "b c", "c", "a, or 1 of b"),
        ("a b c", "FIRST 1 (b, c)", "a", "b c", "b", "a, or 1 of c"),
        ("a b c", "ALL", "a", "b c", "c", ""),
        ("a b c", "ALL", "a", "b", "c", "a, or 1 of b"),
        ("a b c", "ALL", "a", "", "b c", "a"),
        ("a b w?", "ANY 1 (*)", "a", "b", "b w", ""),
        ("a b w?", "ANY 1 (*)", "a", "b", "w", "a, or 1 of b"),
        ("a b c*", "ANY 1 (*)", "a", "b", "b c", "a, or 1 of c"),
        ("a b c d e", "ANY 2 (*)", "a", "", "d e", "a, or 1 of b, c"),
        ("a b c d e", "ANY 2 (*)", "a", "", "c d e", ""),
        ("a b c d e", "ANY 1 (*)", "a", "", "d e", "a, or 2 of b, c"),
        // The commit may be one that a, which led before b, had confirmed by b alone.
        ("a b c", "FIRST 1 (b, c)", "b", "c", "c", "b, or 1 of a"),
        ("a b c", "FIRST 1 (b, c)", "b", "c", "a c", ""),
        ("a b c d", "ANY 2 (b, c, d)", "b", "c d", "d", "b, or 1 of c"),
        ("a b c d+", "ANY 1 (*)", "a", "b c", "b c", ""),
        ("a b c d+", "ANY 1 (*)", "a", "b c", "b d", "a, or 1 of c"),
        ("a b c d", "", "a", "b c", "b c", ""),
        ("a b c d", "", "a", "b c", "b", "a, or 1 of c, d"),
        ("a b w?", "", "", "", "a w", "b"),
        ("a b w?", "", "", "", "a b", ""),
    ];
    for (members, policy, leader, in_sync, fenced, awaited) in table {
        let mut state = formed(members, policy);
        state.leader = (!leader.is_empty()).then(|| name(leader));
        state.in_sync = names(in_sync);
        let verdict = state.safe_to_lead(&names(fenced)).err().map(|awaited| awaited.to_string());
        assert_eq!(
            verdict.unwrap_or_default(),
            awaited,
            "{members} under {policy}, leader {leader:?}, fenced {fenced}"
        );
    }
}

#[test]
fn majorities_share_a_member_while_one_comes_or_goes() {
    for count in 1..MEMBERS_MAX {
        let names: Vec<String> = (0..=count).map(|number| format!("n{number}")).collect();
        let (before, after) = (formed(&names[..count].join(" "), ""), formed(&names.join(" "), ""));
        assert!(before.majority() * 2 > count, "two majorities of {count}");
        assert!(before.majority() + after.majority() > count + 1, "{count} and one more");
    }
}

#[test]
fn at_most_five_vote_about_the_register_and_those_that_do_stay() {
    let state = formed("a b c d e f g", "");
    let ids = |ids: &[u64]| ids.iter().copied().map(MemberId).collect::<BTreeSet<_>>();
    assert_eq!(state.voters(&ids(&[])), ids(&[1, 2, 3, 4, 5]));
    assert_eq!(state.voters(&ids(&[3, 6, 7])), ids(&[1, 2, 3, 6, 7]));
    assert_eq!(state.voters(&ids(&[3, 99])), ids(&[1, 2, 3, 4, 5]), "one that is no member goes");
}
