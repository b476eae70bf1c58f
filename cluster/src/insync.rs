//! The in-sync set (Kafka's ISR): the replicas whose lag in time is at most `replica_lag_time_max`. Core: the shipper
//! tells each replica's lag, the set says who joins and leaves. It reads no clock and knows no connection.

use std::collections::BTreeSet;
use std::time::Duration;

use walferry_engine::mutants;

use crate::member::MemberName;

/// A replica's membership changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It keeps up: commits under `ALL` wait for it from now on.
    Joined,
    /// It lagged for too long, or was silent for too long: commits no longer wait for it.
    Left,
}

/// The in-sync set.
#[derive(Clone, Debug)]
pub struct InSync {
    lag_time_max: Duration,
    members: BTreeSet<MemberName>,
    /// The members that the register has; `None` for a leader without a cluster, whose own word is enough.
    confirmed: Option<BTreeSet<MemberName>>,
    /// Members that left while the register may still come to hold them: a proposal with them is under way, or its fate is not
    /// known.
    unrecorded: BTreeSet<MemberName>,
}

impl InSync {
    /// An empty set; a replica leaves when it lags for longer than `lag_time_max`.
    pub fn new(lag_time_max: Duration) -> InSync {
        InSync { lag_time_max, members: BTreeSet::new(), confirmed: None, unrecorded: BTreeSet::new() }
    }

    /// A leader starts: the replica was known to the one before, which may have counted it in. It stays a member until
    /// it has lagged or been silent for too long, so that no commit passes it by in the meantime.
    pub fn presume(&mut self, name: &MemberName) {
        self.members.insert(name.clone());
    }

    /// A replica's lag now: the age of the oldest byte that it has not flushed, and for a replica without connection at
    /// least the time since it had one. `may_join`: it streams, and holds everything that is committed.
    pub fn observe(&mut self, name: &MemberName, lag: Duration, may_join: bool) -> Option<Change> {
        let member = self.members.contains(name);
        if member && lag > self.lag_time_max {
            self.members.remove(name);
            if self.confirmed.is_some() {
                self.unrecorded.insert(name.clone());
            }
            return Some(Change::Left);
        }
        if !member && may_join && lag <= self.lag_time_max {
            self.members.insert(name.clone());
            self.unrecorded.remove(name);
            return Some(Change::Joined);
        }
        None
    }

    /// The replica is no longer known.
    pub fn forget(&mut self, name: &MemberName) {
        self.members.remove(name);
        self.unrecorded.remove(name);
    }

    /// The register has these members. Until it follows what was observed here, a replica counts as a member when either says
    /// so: no commit is released by a shrink that a failover would not know of.
    pub fn confirm(&mut self, members: &BTreeSet<MemberName>) {
        self.confirmed = Some(members.clone());
    }

    /// The register follows what was observed, and every proposal with other members has met its fate.
    pub fn record(&mut self) {
        self.unrecorded.clear();
    }

    /// True for replicas that commits under `ALL` wait for: every set that the register holds, or may come to hold.
    pub fn contains(&self, name: &MemberName) -> bool {
        let confirmed = self.confirmed.as_ref().filter(|_| !mutants::is_on("shrink-at-once"));
        let held = confirmed.is_some_and(|confirmed| confirmed.contains(name) || self.unrecorded.contains(name));
        self.members.contains(name) || held
    }

    /// The members as observed here, by name.
    pub fn members(&self) -> impl ExactSizeIterator<Item = &MemberName> {
        self.members.iter()
    }

    /// How many replicas are in sync, as observed here and in the register: what `min_in_sync` asks for.
    pub fn count(&self) -> usize {
        let confirmed = |name: &&MemberName| self.confirmed.as_ref().is_none_or(|members| members.contains(*name));
        self.members.iter().filter(confirmed).count()
    }

    /// Why commits at a remote level are refused while at least `min_in_sync` replicas have to be in sync.
    pub fn shortage(&self, min_in_sync: usize) -> Option<String> {
        let (have, need) = (self.count(), min_in_sync);
        (have < need).then(|| format!("{have} replicas are in sync, min_in_sync asks for {need}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replicas_join_when_they_keep_up_and_leave_when_they_lag() {
        let mut set = InSync::new(Duration::from_secs(10));
        let name: MemberName = "a".parse().expect("a name");
        let table = [
            // lag in seconds, may join, change, member after
            (0, false, None, false),
            (11, true, None, false),
            (10, true, Some(Change::Joined), true),
            (0, true, None, true),
            (9, false, None, true),
            (10, false, None, true),
            (11, true, Some(Change::Left), false),
            (11, true, None, false),
            (0, true, Some(Change::Joined), true),
        ];
        for (step, (lag_s, may_join, change, member)) in table.into_iter().enumerate() {
            assert_eq!(set.observe(&name, Duration::from_secs(lag_s), may_join), change, "step {step}");
            assert_eq!(set.contains(&name), member, "step {step}");
            assert_eq!(set.shortage(1).is_some(), !member, "step {step}");
        }
        assert_eq!(set.shortage(0), None);
        assert_eq!(set.members().len(), 1);
        let other: MemberName = "b".parse().expect("a name");
        set.presume(&other);
        assert_eq!(set.observe(&other, Duration::from_secs(9), false), None);
        assert_eq!(set.observe(&other, Duration::from_secs(11), false), Some(Change::Left));
        set.presume(&other);
        let register = BTreeSet::from([other.clone()]);
        set.confirm(&register);
        set.forget(&other);
        assert!(set.contains(&other), "it left, but the register does not know yet");
        assert!(set.shortage(1).is_some(), "and does not count any more");
        set.confirm(&BTreeSet::new());
        assert!(!set.contains(&other));
        set.forget(&name);
        assert!(set.shortage(1).expect("nobody is left").contains("min_in_sync"));
    }
}
