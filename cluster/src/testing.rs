//! Registers for the tests of this crate, from text.

use std::collections::BTreeSet;

use crate::member::{ClusterId, MemberName};
use crate::register::{ClusterState, Kind, LogStatus, Member, MemberId};

pub fn name(text: &str) -> MemberName {
    text.parse().expect("a name")
}

pub fn names(text: &str) -> BTreeSet<MemberName> {
    text.split_whitespace().map(name).collect()
}

/// Members from text such as `a b w?`: `?` marks a witness, `*` one that lost its log, `+` one that joins. Their ids count from 1.
pub fn formed(members: &str, policy: &str) -> ClusterState {
    let member = |(index, text): (usize, &str)| {
        let kind = if text.ends_with('?') { Kind::Witness } else { Kind::Data };
        let member = Member {
            id: MemberId(index as u64 + 1),
            peer: format!("10.0.0.{index}:6401"),
            kind,
            log_status: match text.chars().last() {
                Some('*') => LogStatus::Lost,
                Some('+') => LogStatus::Joining,
                _ => LogStatus::Complete,
            },
        };
        (name(text.trim_end_matches(['?', '*', '+'])), member)
    };
    let members = members.split_whitespace().enumerate().map(member).collect();
    ClusterState::formed(ClusterId(7), members, policy).expect("a policy")
}

/// The same, led by the first, with every other whole data member in sync.
pub fn led(members: &str, policy: &str) -> ClusterState {
    let mut state = formed(members, policy);
    state.leader = members.split_whitespace().next().map(name);
    let whole = |name: &&MemberName| state.members[*name].log_status == LogStatus::Complete;
    let replicas = state.data_members().filter(whole).filter(|name| Some(*name) != state.leader.as_ref());
    state.in_sync = replicas.cloned().collect();
    state
}
