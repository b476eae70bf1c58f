//! Who may act as leader of an epoch, and for how long. A voter that hears a leader grants it `election_timeout` from that moment, and
//! until then takes no part in replacing it; a leader holds its lease as long as a majority's grants last, counted from when it
//! *sent* what they answered, which is never later. So the old lease has ended before the next leader exists, whatever the
//! network delays (Gray and Cheriton's leases; etcd's and CockroachDB's leader leases). Core: time comes in.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use walferry_engine::lsn::Epoch;
use walferry_engine::mutants;

use crate::member::MemberName;

/// This part of a grant is left unused, because the clocks of two machines may differ in rate by as much.
const DRIFT_SHARE: u32 = 16;

/// The grant of one voter.
#[derive(Clone, Debug)]
pub struct Voter {
    election_timeout: Duration,
    /// Leaders of older epochs get no grant. Durable before it is set here.
    promised: Epoch,
    granted_until: Instant,
}

impl Voter {
    /// A voter that starts now and has promised `promised` before. What it granted in its last incarnation it no longer knows,
    /// so it grants nothing for as long as an earlier grant may last.
    pub fn new(promised: Epoch, election_timeout: Duration, now: Instant) -> Voter {
        Voter { election_timeout, promised, granted_until: now + election_timeout }
    }

    /// The election timeout that the cluster agreed on.
    pub fn set_election_timeout(&mut self, election_timeout: Duration) {
        self.election_timeout = election_timeout;
    }

    /// Leaders of older epochs are refused.
    pub fn promised(&self) -> Epoch {
        self.promised
    }

    /// The leader of `epoch` was heard; true when it has this voter's grant now.
    pub fn handle_heartbeat(&mut self, epoch: Epoch, now: Instant) -> bool {
        let granted = epoch >= self.promised || mutants::is_on("vote-twice");
        if granted {
            self.granted_until = self.granted_until.max(now + self.election_timeout);
        }
        granted
    }

    /// The promise to refuse leaders of epochs before `epoch` is durable.
    pub fn promise(&mut self, epoch: Epoch) {
        self.promised = self.promised.max(epoch);
    }

    /// For how long the last grant still lasts. Zero: the leader was not heard for `election_timeout`.
    pub fn grant_left(&self, now: Instant) -> Duration {
        self.granted_until.saturating_duration_since(now)
    }
}

/// A leader's lease.
#[derive(Clone, Debug)]
pub struct Lease {
    election_timeout: Duration,
    /// When what each voter answered with a grant was sent.
    sent_at: BTreeMap<MemberName, Instant>,
}

impl Lease {
    /// The lease of a new leader: nobody has granted anything.
    pub fn new(election_timeout: Duration) -> Lease {
        Lease { election_timeout, sent_at: BTreeMap::new() }
    }

    /// A voter granted what was sent at `sent_at`.
    pub fn handle_grant(&mut self, voter: &MemberName, sent_at: Instant) {
        let newest = self.sent_at.entry(voter.clone()).or_insert(sent_at);
        *newest = (*newest).max(sent_at);
    }

    /// The members changed: grants of others count no more.
    pub fn keep(&mut self, is_member: impl Fn(&MemberName) -> bool) {
        self.sent_at.retain(|name, _| is_member(name));
    }

    /// Until when the lease holds, with `majority` of the voters needed; `None` before there is one.
    pub fn until(&self, majority: usize) -> Option<Instant> {
        let mut sent: Vec<Instant> = self.sent_at.values().copied().collect();
        sent.sort_unstable_by(|a, b| b.cmp(a));
        let weakest = *sent.get(majority.checked_sub(1)?)?;
        if mutants::is_on("stretch-the-lease") {
            return Some(weakest + self.election_timeout * 3);
        }
        Some(weakest + self.election_timeout - self.election_timeout / DRIFT_SHARE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_millis(400);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn voter_with_a_grant_waits_and_keeps_its_promise() {
        let start = Instant::now();
        let mut voter = Voter::new(Epoch(3), TIMEOUT, start);
        assert_eq!(voter.grant_left(start + ms(100)), ms(300), "an unknown grant of its last incarnation");
        assert!(!voter.handle_heartbeat(Epoch(2), start + ms(350)), "an old leader");
        assert_eq!(voter.grant_left(start + ms(400)), Duration::ZERO);
        assert!(voter.handle_heartbeat(Epoch(3), start + ms(500)));
        assert_eq!(voter.grant_left(start + ms(600)), ms(300));
        voter.promise(Epoch(4));
        assert!(!voter.handle_heartbeat(Epoch(3), start + ms(700)), "fenced");
        assert_eq!(voter.grant_left(start + ms(700)), ms(200), "what was granted is not taken back");
        voter.promise(Epoch(2));
        assert_eq!(voter.promised(), Epoch(4), "a promise stays");
    }

    #[test]
    fn a_lease_ends_before_the_grants_that_it_rests_on() {
        let start = Instant::now();
        let names: Vec<MemberName> = ["a", "b", "c"].map(|name| name.parse().expect("a name")).into();
        let mut lease = Lease::new(TIMEOUT);
        assert_eq!(lease.until(2), None);
        lease.handle_grant(&names[0], start + ms(100));
        assert_eq!(lease.until(2), None, "one of three is no majority");
        lease.handle_grant(&names[1], start);
        assert_eq!(lease.until(2), Some(start + ms(375)), "from when it was sent, less the drift");
        lease.handle_grant(&names[2], start + ms(50));
        assert_eq!(lease.until(2), Some(start + ms(425)));
        lease.handle_grant(&names[2], start + ms(20));
        assert_eq!(lease.until(2), Some(start + ms(425)), "late answers change nothing");
        lease.keep(|name| *name != names[0]);
        assert_eq!(lease.until(2), Some(start + ms(375)), "a member that is none any more has no vote");
    }
}
