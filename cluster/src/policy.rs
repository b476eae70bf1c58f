//! The sync policy: which replicas have to confirm a commit at a remote level. PostgreSQL's grammar and meaning of
//! `synchronous_standby_names`, and `ALL` for Kafka's acks=all. Pure; asked by the shipper's commit rule, which
//! knows where the replicas are. The replicas are unaware of the policy: they confirm what they have.
//! How a policy is written stands in `text.rs`.

mod text;

use std::fmt;

use walferry_engine::lsn::Lsn;
use walferry_engine::mutants;

use crate::member::{MEMBER_NAME_BYTES_MAX, MemberName};

pub use text::PolicySyntax;

/// Names in a list, at most; also the bound for k.
pub const POLICY_NAMES_MAX: usize = 64;
/// The text of a policy, at most: `FIRST 64 (a, b, ...)` with names of full length.
pub const POLICY_TEXT_BYTES_MAX: usize = 16 + POLICY_NAMES_MAX * (MEMBER_NAME_BYTES_MAX + 2);

/// One entry of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NamePattern {
    /// `*`.
    Every,
    /// One replica.
    Name(MemberName),
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NamePattern::Every => f.pad("*"),
            NamePattern::Name(name) => write!(f, "{name}"),
        }
    }
}

impl NamePattern {
    fn matches(&self, name: &MemberName) -> bool {
        match self {
            NamePattern::Every => true,
            NamePattern::Name(own) => own == name,
        }
    }
}

/// Which replicas have to confirm a commit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum SyncPolicy {
    /// Nobody. The node refuses remote levels then.
    #[default]
    None,
    /// The first `k` of `names`, in this order of priority, that are connected and streaming.
    First {
        /// How many.
        k: usize,
        /// Highest priority first; `k <= names.len()` unless it has a `*`.
        names: Vec<NamePattern>,
    },
    /// Any `k` of `names`.
    Any {
        /// How many.
        k: usize,
        /// In any order.
        names: Vec<NamePattern>,
    },
    /// Every member of the in-sync set.
    All,
}

/// A replica as the policy sees it.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// Its name.
    pub name: &'a MemberName,
    /// Connected, and past its catch-up.
    pub streaming: bool,
    /// Member of the in-sync set.
    pub in_sync: bool,
    /// What it has confirmed at the level in question.
    pub position: Lsn,
}

/// What the policy makes of a replica, as in `pg_stat_replication.sync_state`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SyncState {
    /// Commits wait for it.
    Sync,
    /// It takes over when one that commits wait for is gone.
    Potential,
    /// One of those of which any k suffice.
    Quorum,
    /// No commit waits for it.
    Async,
}

impl fmt::Display for SyncState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            SyncState::Sync => "sync",
            SyncState::Potential => "potential",
            SyncState::Quorum => "quorum",
            SyncState::Async => "async",
        })
    }
}

fn priority(names: &[NamePattern], name: &MemberName) -> Option<usize> {
    names.iter().position(|pattern| pattern.matches(name))
}

impl SyncPolicy {
    /// What the policy's replicas have confirmed: `Lsn::MAX` when nobody has to, `None` when too few are there to ask.
    pub fn confirmed(&self, candidates: &[Candidate<'_>]) -> Option<Lsn> {
        match self {
            SyncPolicy::None => Some(Lsn::MAX),
            SyncPolicy::First { k, names } => {
                let anybody = [NamePattern::Every];
                let names = if mutants::is_on("first-of-anybody") { &anybody } else { &names[..] };
                let chosen = chosen(candidates, names);
                let chosen = chosen.get(..*k)?;
                chosen.iter().map(|index| candidates[*index].position).min()
            }
            SyncPolicy::Any { k, names } => {
                let of_list = chosen(candidates, names);
                let mut positions: Vec<Lsn> = of_list.into_iter().map(|index| candidates[index].position).collect();
                positions.sort_unstable_by(|a, b| b.cmp(a));
                positions.get(*k - 1).copied()
            }
            SyncPolicy::All => {
                let members = candidates.iter().filter(|candidate| candidate.in_sync);
                Some(members.map(|member| member.position).min().unwrap_or(Lsn::MAX))
            }
        }
    }

    /// What the policy makes of the candidate at `index`.
    pub fn sync_state(&self, candidates: &[Candidate<'_>], index: usize) -> SyncState {
        let candidate = &candidates[index];
        match self {
            SyncPolicy::First { k, names } if priority(names, candidate.name).is_some() => {
                let rank = chosen(candidates, names).iter().position(|other| *other == index);
                if rank.is_some_and(|rank| rank < *k) { SyncState::Sync } else { SyncState::Potential }
            }
            SyncPolicy::Any { names, .. } if priority(names, candidate.name).is_some() => SyncState::Quorum,
            SyncPolicy::All if candidate.in_sync => SyncState::Sync,
            SyncPolicy::All => SyncState::Potential,
            _ => SyncState::Async,
        }
    }

    /// True when remote levels wait for replicas.
    pub fn waits(&self) -> bool {
        *self != SyncPolicy::None
    }

    /// True when `name` is on the policy's list, so that it may be one of those that confirm a commit.
    pub fn names(&self, name: &MemberName) -> bool {
        match self {
            SyncPolicy::None => false,
            SyncPolicy::First { names, .. } | SyncPolicy::Any { names, .. } => priority(names, name).is_some(),
            SyncPolicy::All => true,
        }
    }

    /// Whether the replicas of a leader called `own` can meet the policy: it is none of them. A list that names it among enough others
    /// is fine, and the same on each node.
    pub fn check_leader(&self, own: &MemberName) -> Result<(), NamesItself> {
        let (SyncPolicy::First { k, names } | SyncPolicy::Any { k, names }) = self else { return Ok(()) };
        let others = names.iter().filter(|pattern| **pattern != NamePattern::Name(own.clone())).count();
        if *k <= others || names.contains(&NamePattern::Every) {
            return Ok(());
        }
        Err(NamesItself { own: own.clone(), k: *k, others })
    }

    /// The policy of `own`, which was a replica of `leader` under this policy and leads now: where its name stood, that of the leader
    /// stands, which comes back as a replica. As many other nodes as before confirm a commit.
    pub fn after_promotion(&self, own: &MemberName, leader: &MemberName) -> SyncPolicy {
        let swapped = |names: &[NamePattern]| -> Vec<NamePattern> {
            let swap = |pattern: &NamePattern| match pattern {
                NamePattern::Name(name) if name == own => NamePattern::Name(leader.clone()),
                NamePattern::Name(name) if name == leader => NamePattern::Name(own.clone()),
                other => other.clone(),
            };
            names.iter().map(swap).collect()
        };
        match self {
            SyncPolicy::First { k, names } => SyncPolicy::First { k: *k, names: swapped(names) },
            SyncPolicy::Any { k, names } => SyncPolicy::Any { k: *k, names: swapped(names) },
            SyncPolicy::None | SyncPolicy::All => self.clone(),
        }
    }

    /// How many streaming replicas the policy needs, and how many it has; `None` when it has no fixed number.
    pub fn needs(&self, candidates: &[Candidate<'_>]) -> Option<(usize, usize)> {
        match self {
            SyncPolicy::First { k, names } | SyncPolicy::Any { k, names } => {
                Some((*k, chosen(candidates, names).len()))
            }
            SyncPolicy::None | SyncPolicy::All => None,
        }
    }
}

/// Indices of the streaming candidates that the list names, highest priority first, then by name.
fn chosen(candidates: &[Candidate<'_>], names: &[NamePattern]) -> Vec<usize> {
    let mut chosen: Vec<(usize, &MemberName, usize)> = candidates
        .iter()
        .enumerate()
        .filter(|(_, candidate)| candidate.streaming)
        .filter_map(|(index, candidate)| Some((priority(names, candidate.name)?, candidate.name, index)))
        .collect();
    chosen.sort_unstable();
    chosen.into_iter().map(|(_, _, index)| index).collect()
}

/// A policy that its own leader cannot meet.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{own} cannot confirm its own commits: a sync policy names other nodes, and without {own} this one asks for {k} of {others}"
)]
pub struct NamesItself {
    own: MemberName,
    k: usize,
    others: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_parse_as_postgresql_reads_them() {
        let table = [
            ("", ""),
            ("  ", ""),
            ("a", "FIRST 1 (a)"),
            ("a, b", "FIRST 1 (a, b)"),
            ("*", "FIRST 1 (*)"),
            ("2 (a, b)", "FIRST 2 (a, b)"),
            ("first 2 (a,b,c)", "FIRST 2 (a, b, c)"),
            ("ANY 1 (A, \"b\")", "ANY 1 (a, b)"),
            ("any 3(*)", "ANY 3 (*)"),
            ("FIRST 1 (first, any)", "FIRST 1 (first, any)"),
            ("all", "ALL"),
        ];
        for (text, printed) in table {
            let policy: SyncPolicy = text.parse().unwrap_or_else(|error| panic!("{text:?}: {error}"));
            assert_eq!(policy.to_string(), printed);
            assert_eq!(printed.parse(), Ok(policy));
        }
        let wrong = [
            "FIRST (a)",
            "ANY 0 (a)",
            "ANY 2 (a)",
            "ANY 2 (a, a)",
            "a, a",
            "ANY 1 (b, b)",
            "ANY 1 (b, \"b\", c)",
            "ANY 1 (b, B)",
            "FIRST 1 (*, *)",
            "SOME 1 (a)",
            "FIRST 1 (a",
            "FIRST 1 a",
            "a,,b",
            "FIRST 1 ()",
            "FIRST -1 (a)",
            "FIRST 1 (a) b",
            "a b",
            "ANY 99999999999999999999 (*)",
            "ANY 65 (*)",
        ];
        for text in wrong {
            assert!(text.parse::<SyncPolicy>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn leader_is_none_of_the_replicas_that_its_policy_asks() {
        let own: MemberName = "a".parse().expect("a name");
        for (text, met) in [
            ("ANY 1 (a)", false),
            ("a", false),
            ("FIRST 2 (a, b)", false),
            ("ANY 2 (b, a, c)", true),
            ("ANY 1 (a, b)", true),
            ("FIRST 2 (a, *)", true),
            ("ALL", true),
            ("", true),
        ] {
            let checked = text.parse::<SyncPolicy>().expect("a policy").check_leader(&own);
            assert_eq!(checked.is_ok(), met, "{text}: {checked:?}");
        }
        let twice = "ANY 1 (b, b)".parse::<SyncPolicy>().expect_err("b stands twice").to_string();
        assert_eq!(twice, "b stands twice in the list: every replica confirms a commit once");
    }

    #[test]
    fn promoted_replica_and_its_leader_change_places() {
        let (own, leader) = ("b".parse().expect("a name"), "a".parse().expect("a name"));
        let table = [
            ("", ""),
            ("ALL", "ALL"),
            ("ANY 1 (*)", "ANY 1 (*)"),
            ("ANY 1 (b)", "ANY 1 (a)"),
            ("FIRST 2 (b, c)", "FIRST 2 (a, c)"),
            ("ANY 1 (c)", "ANY 1 (c)"),
            ("ANY 2 (a, b, c)", "ANY 2 (b, a, c)"),
        ];
        for (before, after) in table {
            let policy: SyncPolicy = before.parse().expect("a policy");
            assert_eq!(policy.after_promotion(&own, &leader).to_string(), after);
        }
    }

    #[test]
    fn longest_policy_fits_its_bound() {
        let name = |number: usize| format!("{number:0>width$}", width = MEMBER_NAME_BYTES_MAX);
        let names: Vec<String> = (0..POLICY_NAMES_MAX).map(name).collect();
        let text = format!("FIRST {POLICY_NAMES_MAX} ({})", names.join(", "));
        let policy: SyncPolicy = text.parse().expect("a policy");
        assert_eq!(policy.to_string(), text);
        assert!(text.len() <= POLICY_TEXT_BYTES_MAX);
    }

    /// Each replica: name, streaming, in sync, position.
    fn confirmed(policy: &str, replicas: &[(&str, bool, bool, u64)]) -> Option<u64> {
        let names: Vec<MemberName> = replicas.iter().map(|replica| replica.0.parse().expect("a name")).collect();
        let mut candidates = Vec::new();
        for (name, (_, streaming, in_sync, position)) in names.iter().zip(replicas.iter().copied()) {
            candidates.push(Candidate { name, streaming, in_sync, position: Lsn(position) });
        }
        policy.parse::<SyncPolicy>().expect("a policy").confirmed(&candidates).map(|lsn| lsn.0)
    }

    #[test]
    fn who_has_to_confirm() {
        let (on, off) = (true, false);
        let abc = [("a", on, on, 10), ("b", on, on, 30), ("c", on, on, 20)];
        let no_a = [("a", off, off, 10), ("b", on, on, 30), ("c", on, on, 20)];
        let only_c = [("a", off, off, 10), ("b", off, on, 30), ("c", on, on, 20)];
        let max = Some(u64::MAX);
        let table: [(&str, &[_], Option<u64>); 19] = [
            ("", &abc, max),
            ("", &[], max),
            ("a", &abc, Some(10)),
            ("b, a", &abc, Some(30)),
            ("FIRST 2 (c, b, a)", &abc, Some(20)),
            ("FIRST 3 (a, b, c)", &abc, Some(10)),
            ("FIRST 1 (a, b)", &no_a, Some(30)),
            ("FIRST 2 (a, b, c)", &no_a, Some(20)),
            ("FIRST 3 (a, b, c)", &no_a, None),
            ("FIRST 1 (a)", &no_a, None),
            ("FIRST 1 (*)", &abc, Some(10)),
            ("FIRST 2 (c, *)", &abc, Some(10)),
            ("ANY 1 (a, b, c)", &abc, Some(30)),
            ("ANY 2 (a, b, c)", &abc, Some(20)),
            ("ANY 2 (a, b)", &no_a, None),
            ("ANY 1 (*)", &[], None),
            ("ALL", &abc, Some(10)),
            // b has just lost its connection: commits wait until it is back, or out of the set.
            ("ALL", &only_c, Some(20)),
            ("ALL", &[], max),
        ];
        for (policy, replicas, expected) in table {
            assert_eq!(confirmed(policy, replicas), expected, "{policy} with {replicas:?}");
        }
    }

    #[test]
    fn sync_states_are_those_of_postgresql() {
        let names: Vec<MemberName> = ["a", "b", "c"].iter().map(|name| name.parse().expect("a name")).collect();
        let streaming = [true, true, false];
        let of = |index: usize| Candidate {
            name: &names[index],
            streaming: streaming[index],
            in_sync: streaming[index],
            position: Lsn(1),
        };
        let candidates = [of(0), of(1), of(2)];
        use SyncState::*;
        let table = [
            ("", [Async, Async, Async]),
            ("FIRST 1 (c, b, a)", [Potential, Sync, Potential]),
            ("FIRST 1 (b)", [Async, Sync, Async]),
            ("ANY 1 (a, c)", [Quorum, Async, Quorum]),
            ("ALL", [Sync, Sync, Potential]),
        ];
        for (text, expected) in table {
            let policy: SyncPolicy = text.parse().expect("a policy");
            let states = [0, 1, 2].map(|index| policy.sync_state(&candidates, index));
            assert_eq!(states, expected, "{text}");
        }
    }
}
