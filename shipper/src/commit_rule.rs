//! The commit rule: up to which LSN commits hold each level, under the sync policy. Core: told where the replicas
//! are by the shipper, asked by the node's commit queue. As in PostgreSQL, a remote level needs the local flush too,
//! an empty policy makes remote levels mean local, and with too few replicas commits wait.

use walferry_cluster::level::CommitLevel;
use walferry_cluster::member::MemberName;
use walferry_cluster::policy::{Candidate, SyncPolicy, SyncState};
use walferry_engine::lsn::Lsn;

use crate::progress::Progress;

const REMOTE_LEVELS: [CommitLevel; 3] = [CommitLevel::RemoteWrite, CommitLevel::RemoteFlush, CommitLevel::RemoteApply];

/// A replica as the rule sees it.
#[derive(Clone, Copy, Debug)]
pub struct Standing<'a> {
    /// Its name.
    pub name: &'a MemberName,
    /// Connected, and past its catch-up.
    pub streaming: bool,
    /// Member of the in-sync set.
    pub in_sync: bool,
    /// Its positions.
    pub progress: &'a Progress,
}

impl<'a> Standing<'a> {
    fn candidate(&self, level: CommitLevel) -> Candidate<'a> {
        let position = match level {
            CommitLevel::RemoteWrite => self.progress.written(),
            CommitLevel::RemoteApply => self.progress.applied(),
            _ => self.progress.flushed(),
        };
        let Standing { name, streaming, in_sync, .. } = *self;
        Candidate { name, streaming, in_sync, position }
    }
}

fn candidates<'a>(standings: &[Standing<'a>], level: CommitLevel) -> Vec<Candidate<'a>> {
    standings.iter().map(|standing| standing.candidate(level)).collect()
}

#[derive(Clone, Copy, Debug, Default)]
struct Held {
    /// What the policy's replicas have confirmed now; `Lsn::MAX` when nobody has to.
    confirmed: Lsn,
    /// What was released before: a commit that was answered stays answered, whoever comes and goes.
    released: Lsn,
}

/// The rule and what it has released so far.
#[derive(Clone, Debug)]
pub struct CommitRule {
    policy: SyncPolicy,
    held: [Held; REMOTE_LEVELS.len()],
}

impl CommitRule {
    /// A rule under `policy` that knows no replicas yet.
    pub fn new(policy: SyncPolicy) -> CommitRule {
        let mut rule = CommitRule { policy, held: Default::default() };
        rule.update(&[], Lsn::ZERO);
        rule
    }

    /// The policy.
    pub fn policy(&self) -> &SyncPolicy {
        &self.policy
    }

    /// Another policy from now on; `update` follows. What was released stays so.
    pub fn set_policy(&mut self, policy: SyncPolicy) {
        self.policy = policy;
    }

    /// Replicas moved, came, went, or joined or left the in-sync set; `local` is durable here.
    pub fn update(&mut self, replicas: &[Standing<'_>], local: Lsn) {
        for (held, level) in self.held.iter_mut().zip(REMOTE_LEVELS) {
            // What was confirmed while this confirmation held is kept before it is replaced.
            held.released = held.released.max(held.confirmed.min(local));
            held.confirmed = self.policy.confirmed(&candidates(replicas, level)).unwrap_or(Lsn::ZERO);
            held.released = held.released.max(held.confirmed.min(local));
        }
    }

    /// Commits up to this LSN hold `level`, when `local` is durable here.
    pub fn released(&self, level: CommitLevel, local: Lsn) -> Lsn {
        let held = match level {
            CommitLevel::Off => return Lsn::MAX,
            CommitLevel::Local => return local,
            CommitLevel::RemoteWrite => self.held[0],
            CommitLevel::RemoteFlush => self.held[1],
            CommitLevel::RemoteApply => self.held[2],
        };
        held.released.max(held.confirmed.min(local))
    }

    /// What the policy makes of the replica at `index`.
    pub fn sync_state(&self, replicas: &[Standing<'_>], index: usize) -> SyncState {
        self.policy.sync_state(&candidates(replicas, CommitLevel::RemoteFlush), index)
    }

    /// Why commits at a remote level wait at the moment: too few replicas are there.
    pub fn shortage(&self, replicas: &[Standing<'_>]) -> Option<String> {
        let candidates = candidates(replicas, CommitLevel::RemoteFlush);
        let (need, have) = self.policy.needs(&candidates)?;
        (have < need).then(|| format!("{} needs {need} streaming, {have} are", self.policy))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use CommitLevel::{Local, Off, RemoteApply, RemoteFlush, RemoteWrite};
    use walferry_cluster::message::Ack;

    struct Sketch {
        name: MemberName,
        streaming: bool,
        in_sync: bool,
        progress: Progress,
    }

    fn replica(name: &str, streaming: bool, positions: [u64; 3]) -> Sketch {
        let [written, flushed, applied] = positions.map(Lsn);
        let mut progress = Progress::default();
        progress.send(Lsn(1000));
        progress.acknowledge(&Ack { written, flushed, applied, ..Ack::default() }).expect("valid");
        Sketch { name: name.parse().expect("a name"), streaming, in_sync: streaming, progress }
    }

    fn standings(sketches: &[Sketch]) -> Vec<Standing<'_>> {
        let of = |sketch: &'_ Sketch| (sketch.streaming, sketch.in_sync);
        let mut standings = Vec::new();
        for sketch in sketches {
            let (streaming, in_sync) = of(sketch);
            standings.push(Standing { name: &sketch.name, streaming, in_sync, progress: &sketch.progress });
        }
        standings
    }

    #[test]
    fn each_level_follows_its_position_and_the_local_flush() {
        let replicas = [replica("a", true, [30, 20, 10]), replica("b", true, [60, 50, 40])];
        let table = [
            // policy, local, [off, local, write, flush, apply]
            ("", 25, [u64::MAX, 25, 25, 25, 25]),
            ("a", 100, [u64::MAX, 100, 30, 20, 10]),
            ("a", 15, [u64::MAX, 15, 15, 15, 10]),
            ("FIRST 2 (a, b)", 100, [u64::MAX, 100, 30, 20, 10]),
            ("ANY 1 (a, b)", 100, [u64::MAX, 100, 60, 50, 40]),
            ("ANY 1 (a, b)", 45, [u64::MAX, 45, 45, 45, 40]),
            ("ALL", 100, [u64::MAX, 100, 30, 20, 10]),
            ("ANY 1 (c)", 100, [u64::MAX, 100, 0, 0, 0]),
        ];
        for (policy, local, expected) in table {
            let mut rule = CommitRule::new(policy.parse().expect("a policy"));
            rule.update(&standings(&replicas), Lsn::ZERO);
            let levels = [Off, Local, RemoteWrite, RemoteFlush, RemoteApply];
            let released = levels.map(|level| rule.released(level, Lsn(local)).0);
            assert_eq!(released, expected, "{policy} with {local} flushed here");
        }
    }

    #[test]
    fn a_lost_replica_stops_commits_but_takes_none_back() {
        let mut rule = CommitRule::new("a".parse().expect("a policy"));
        rule.update(&standings(&[replica("a", true, [50, 50, 50])]), Lsn(40));
        assert_eq!(rule.released(RemoteFlush, Lsn(40)), Lsn(40));
        // The local flush went on to 45 before the replica went: those commits were answered.
        assert_eq!(rule.released(RemoteFlush, Lsn(45)), Lsn(45));
        let gone = [replica("a", false, [50, 50, 50])];
        rule.update(&standings(&gone), Lsn(45));
        assert_eq!(rule.released(RemoteFlush, Lsn(100)), Lsn(45));
        assert!(rule.shortage(&standings(&gone)).expect("too few").contains("FIRST 1 (a)"));
        // It comes back after a truncation, behind what was answered.
        rule.update(&standings(&[replica("a", true, [30, 30, 30])]), Lsn(100));
        assert_eq!(rule.released(RemoteFlush, Lsn(100)), Lsn(45));
        rule.update(&standings(&[replica("a", true, [90, 90, 30])]), Lsn(100));
        assert_eq!(rule.released(RemoteFlush, Lsn(100)), Lsn(90));
        assert_eq!(rule.released(RemoteApply, Lsn(100)), Lsn(45));
    }

    #[test]
    fn a_stricter_policy_does_not_inherit_what_nobody_confirmed() {
        let mut rule = CommitRule::new(SyncPolicy::None);
        rule.update(&[], Lsn(10));
        assert_eq!(rule.released(RemoteFlush, Lsn(20)), Lsn(20));
        rule.set_policy("a".parse().expect("a policy"));
        rule.update(&[], Lsn(20));
        assert_eq!(rule.released(RemoteFlush, Lsn(30)), Lsn(20));
    }
}
