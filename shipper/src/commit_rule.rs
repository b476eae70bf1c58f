//! The commit rule: up to which LSN commits hold each level, under the quorum rule that the register sets. Core: told where the
//! replicas are by the shipper, asked by the node's commit queue. As in PostgreSQL, a remote level needs the local flush too,
//! and with too few replicas commits wait. Where nobody has to confirm anything a remote level is met with the local flush; the node
//! refuses remote levels then, or tells that replicas confirmed nothing ([`CommitRule::confirmed`]).
//!
//! Replicas confirm what earlier epochs left only together with a frame of this one (the Raft paper's figure 8, section 5.4.2): a
//! failover takes the log of the highest epoch. A replica that has all of the earlier frames and none of this epoch gives way to
//! the leader of an epoch in between that has none of them, and what was answered on its word would be gone.
//!
//! While the quorum rule changes, commits need both the old and the new one ([`CommitRule::begin_joint`]); the argument stands in
//! `walferry_cluster::membership`.

use walferry_cluster::level::CommitLevel;
use walferry_cluster::member::MemberName;
use walferry_cluster::policy::{Candidate, SyncPolicy, SyncState};
use walferry_cluster::quorum_rule::QuorumRule;
use walferry_engine::lsn::Lsn;
use walferry_engine::mutants;

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
            _ if self.progress.is_remembered() => Lsn::ZERO,
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
    /// Of that, what replicas had confirmed.
    by_replicas: Lsn,
}

impl Held {
    /// Nobody had to confirm anything: that confirms nothing.
    fn reach_by_replicas(&self, local: Lsn, floor: Lsn) -> Lsn {
        let confirmed = if self.confirmed == Lsn::MAX { Lsn::ZERO } else { self.confirmed };
        self.by_replicas.max(reach(confirmed, local, floor))
    }
}

/// How far both go, if that is beyond `floor`.
fn reach(confirmed: Lsn, local: Lsn, floor: Lsn) -> Lsn {
    let reached = confirmed.min(local);
    if reached > floor { reached } else { Lsn::ZERO }
}

/// The quorum rule that is about to follow.
#[derive(Clone, Debug)]
struct Joint {
    quorum_rule: QuorumRule,
    /// Before the change may be proposed, this rule has to have confirmed everything up to here: the end of the log when
    /// they began to count.
    mark: Lsn,
}

/// The rule and what it has released so far.
#[derive(Clone, Debug)]
pub struct CommitRule {
    quorum_rule: QuorumRule,
    /// Commits need this rule as well.
    joint: Option<Joint>,
    held: [Held; REMOTE_LEVELS.len()],
    /// Where this epoch begins: confirmations that reach no further do not count.
    epoch_start: Lsn,
    /// Up to where the joint rule has it durable.
    proved: Lsn,
    /// Fewer replicas than `min_in_sync` are in sync: nothing more is confirmed at remote levels.
    short: bool,
}

impl CommitRule {
    /// A rule under `policy` for the epoch that begins at `epoch_start`. It knows no replicas yet, and takes each at its word.
    pub fn new(policy: SyncPolicy, epoch_start: Lsn) -> CommitRule {
        let quorum_rule = QuorumRule::of_any(policy);
        let mut rule = CommitRule {
            quorum_rule,
            joint: None,
            held: Default::default(),
            epoch_start,
            proved: Lsn::ZERO,
            short: false,
        };
        // Where replicas have to confirm, nothing is confirmed before the first look at them: an in-sync set that is not known yet is
        // not an empty one.
        if !rule.waits() {
            rule.update(&[], Lsn::ZERO);
        }
        rule
    }

    /// Another rule from now on; `update` follows. What was released stays so.
    pub fn set_quorum_rule(&mut self, quorum_rule: QuorumRule) {
        self.quorum_rule = quorum_rule;
    }

    /// Whether fewer replicas than `min_in_sync` are in sync. It is checked here, at the release, as well as when a commit begins:
    /// the last replica may leave in between. True when it changed; `update` follows.
    pub fn set_short(&mut self, short: bool) -> bool {
        let short = short && !mutants::is_on("min-in-sync-at-admission");
        std::mem::replace(&mut self.short, short) != short
    }

    /// `quorum_rule` is to follow: from now on commits need it as well. The log ends at `mark`; `update` follows.
    pub fn begin_joint(&mut self, quorum_rule: QuorumRule, mark: Lsn) {
        self.proved = Lsn::ZERO;
        self.joint = Some(Joint { quorum_rule, mark });
    }

    /// The register has moved, or will not: commits need its own rule alone. `update` follows.
    pub fn end_joint(&mut self) {
        self.joint = None;
    }

    /// True once everything that was in the log when the joint rule began is durable under it, here included: what was
    /// released under the old rule alone is part of it.
    pub fn joint_is_proved(&self, local: Lsn) -> bool {
        let proved = reach(self.proved, local, self.floor());
        self.joint.as_ref().is_some_and(|joint| proved >= joint.mark)
    }

    /// True when remote levels wait for replicas.
    pub fn waits(&self) -> bool {
        self.quorum_rule.policy.waits() || self.joint.as_ref().is_some_and(|joint| joint.quorum_rule.policy.waits())
    }

    /// What reaches no further is not confirmed in this epoch. Where nobody has to confirm anything, all is as durable as it gets.
    fn floor(&self) -> Lsn {
        if self.waits() && !mutants::is_on("count-older-epochs") { self.epoch_start } else { Lsn::ZERO }
    }

    /// Replicas moved, came, went, or joined or left the in-sync set; `local` is durable here.
    pub fn update(&mut self, replicas: &[Standing<'_>], local: Lsn) {
        let (floor, short) = (self.floor(), self.short && self.waits());
        for (held, level) in self.held.iter_mut().zip(REMOTE_LEVELS) {
            // What was confirmed while this confirmation held is kept before it is replaced.
            held.released = held.released.max(reach(held.confirmed, local, floor));
            held.by_replicas = held.reach_by_replicas(local, floor);
            let candidates = candidates(replicas, level);
            let confirmed = self.quorum_rule.confirmed(&candidates).unwrap_or(Lsn::ZERO);
            let joint = self.joint.as_ref().map(|joint| joint.quorum_rule.confirmed(&candidates).unwrap_or(Lsn::ZERO));
            if let (CommitLevel::RemoteFlush, Some(joint)) = (level, joint) {
                self.proved = joint;
            }
            held.confirmed = joint.map_or(confirmed, |joint| joint.min(confirmed));
            if short {
                held.confirmed = Lsn::ZERO;
            }
            if mutants::is_on("ack-without-replicas") {
                held.confirmed = Lsn::MAX;
            }
            held.released = held.released.max(reach(held.confirmed, local, floor));
        }
    }

    fn held(&self, level: CommitLevel) -> Option<&Held> {
        REMOTE_LEVELS.iter().position(|remote| *remote == level).map(|index| &self.held[index])
    }

    /// Commits up to this LSN hold `level`, when `local` is durable here.
    pub fn released(&self, level: CommitLevel, local: Lsn) -> Lsn {
        match (self.held(level), level) {
            (Some(held), _) => held.released.max(reach(held.confirmed, local, self.floor())),
            (None, CommitLevel::Off) => Lsn::MAX,
            (None, _) => local,
        }
    }

    /// Commits up to this LSN were confirmed at the remote level `level` by replicas, when `local` is durable here.
    pub fn confirmed(&self, level: CommitLevel, local: Lsn) -> Lsn {
        self.held(level).map_or(Lsn::ZERO, |held| held.reach_by_replicas(local, self.floor()))
    }

    /// The sync policy of now.
    pub fn policy(&self) -> &SyncPolicy {
        &self.quorum_rule.policy
    }

    /// What the policy makes of the replica at `index`.
    pub fn sync_state(&self, replicas: &[Standing<'_>], index: usize) -> SyncState {
        self.quorum_rule.sync_state(&candidates(replicas, CommitLevel::RemoteFlush), index)
    }

    /// Why commits at a remote level wait at the moment: too few replicas are there.
    pub fn shortage(&self, replicas: &[Standing<'_>]) -> Option<String> {
        let candidates = candidates(replicas, CommitLevel::RemoteFlush);
        let joint = || self.joint.as_ref().and_then(|joint| joint.quorum_rule.shortage(&candidates));
        self.quorum_rule.shortage(&candidates).or_else(joint)
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
            let mut rule = CommitRule::new(policy.parse().expect("a policy"), Lsn::ZERO);
            rule.update(&standings(&replicas), Lsn::ZERO);
            let levels = [Off, Local, RemoteWrite, RemoteFlush, RemoteApply];
            let released = levels.map(|level| rule.released(level, Lsn(local)).0);
            assert_eq!(released, expected, "{policy} with {local} flushed here");
        }
    }

    #[test]
    fn commits_that_nobody_had_to_confirm_are_not_confirmed() {
        let mut rule = CommitRule::new("ALL".parse().expect("a policy"), Lsn::ZERO);
        rule.update(&standings(&[replica("a", true, [50, 40, 30])]), Lsn(60));
        let confirmed = |rule: &CommitRule, local: u64| {
            [RemoteWrite, RemoteFlush, RemoteApply].map(|level| rule.confirmed(level, Lsn(local)).0)
        };
        assert_eq!(confirmed(&rule, 60), [50, 40, 30]);
        assert_eq!(confirmed(&rule, 45), [45, 40, 30]);
        // The in-sync set is empty: ALL asks nobody, and releases what is durable here.
        rule.update(&[], Lsn(90));
        assert_eq!(rule.released(RemoteFlush, Lsn(100)), Lsn(100));
        assert_eq!(confirmed(&rule, 100), [50, 40, 30], "what a confirmed stays confirmed");
        rule.update(&standings(&[replica("a", true, [95, 95, 70])]), Lsn(100));
        assert_eq!(confirmed(&rule, 100), [95, 95, 70]);
        assert_eq!(rule.released(RemoteApply, Lsn(100)), Lsn(100), "it was answered");
        let mut rule = CommitRule::new(SyncPolicy::None, Lsn::ZERO);
        rule.update(&standings(&[replica("a", true, [50; 3])]), Lsn(60));
        assert_eq!(confirmed(&rule, 60), [0; 3]);
    }

    #[test]
    fn a_lost_replica_stops_commits_but_takes_none_back() {
        let mut rule = CommitRule::new("a".parse().expect("a policy"), Lsn::ZERO);
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
    fn earlier_epochs_are_confirmed_with_a_frame_of_this_one() {
        let rule_at = |position: u64, local: u64, policy: &str| {
            let mut rule = CommitRule::new(policy.parse().expect("a policy"), Lsn(50));
            rule.update(&standings(&[replica("a", true, [position; 3])]), Lsn(local));
            rule.released(RemoteFlush, Lsn(local))
        };
        assert_eq!(rule_at(50, 90, "a"), Lsn::ZERO, "a leader of an epoch in between may take it back");
        assert_eq!(rule_at(60, 50, "a"), Lsn::ZERO, "this node has no frame of its epoch yet");
        assert_eq!(rule_at(60, 90, "a"), Lsn(60));
        assert_eq!(rule_at(0, 50, ""), Lsn(50), "nobody has to confirm anything");
        let mut rule = CommitRule::new("a".parse().expect("a policy"), Lsn(50));
        rule.begin_joint(quorum_rule("ANY 1 (*)", "a"), Lsn(50));
        rule.update(&standings(&[replica("a", true, [50; 3])]), Lsn(50));
        assert!(!rule.joint_is_proved(Lsn(50)), "nor is a change proved with it");
        rule.update(&standings(&[replica("a", true, [60; 3])]), Lsn(60));
        assert!(rule.joint_is_proved(Lsn(60)));
    }

    #[test]
    fn commits_while_min_in_sync_is_missed_are_not_released() {
        let mut rule = CommitRule::new("ALL".parse().expect("a policy"), Lsn::ZERO);
        rule.update(&standings(&[replica("a", true, [50; 3])]), Lsn(60));
        assert_eq!(rule.released(RemoteFlush, Lsn(60)), Lsn(50));
        // The only replica leaves: nobody is left to confirm, which ALL alone takes for enough.
        assert!(rule.set_short(true));
        rule.update(&[], Lsn(90));
        assert_eq!(rule.released(RemoteFlush, Lsn(90)), Lsn(50), "what was answered stays, nothing is added");
        assert!(!rule.set_short(true) && rule.set_short(false));
        rule.update(&standings(&[replica("a", true, [80; 3])]), Lsn(90));
        assert_eq!(rule.released(RemoteFlush, Lsn(90)), Lsn(80));
    }

    #[test]
    fn a_stricter_policy_does_not_inherit_what_nobody_confirmed() {
        let mut rule = CommitRule::new(SyncPolicy::None, Lsn::ZERO);
        rule.update(&[], Lsn(10));
        assert_eq!(rule.released(RemoteFlush, Lsn(20)), Lsn(20));
        rule.set_quorum_rule(QuorumRule::of_any("a".parse().expect("a policy")));
        rule.update(&[], Lsn(20));
        assert_eq!(rule.released(RemoteFlush, Lsn(30)), Lsn(20));
    }

    fn quorum_rule(policy: &str, confirming: &str) -> QuorumRule {
        let names = confirming.split_whitespace().map(|name| name.parse().expect("a name"));
        QuorumRule { policy: policy.parse().expect("a policy"), confirming: Some(names.collect()) }
    }

    #[test]
    fn a_replica_that_does_not_count_releases_nothing() {
        let replicas = [replica("b", true, [20, 20, 20]), replica("d", true, [90, 90, 90])];
        for (policy, released) in [("ANY 1 (*)", 20), ("ALL", 20), ("FIRST 1 (d, b)", 20), ("", 100)] {
            let mut rule = CommitRule::new(SyncPolicy::None, Lsn::ZERO);
            rule.held = Default::default();
            rule.set_quorum_rule(quorum_rule(policy, "b"));
            rule.update(&standings(&replicas), Lsn(100));
            assert_eq!(rule.released(RemoteFlush, Lsn(100)), Lsn(released), "{policy}");
            assert_eq!(rule.sync_state(&standings(&replicas), 1), SyncState::Async, "{policy}");
        }
    }

    #[test]
    fn joint_quorum_rules_both_hold_and_cover_what_was_before() {
        // `d` joins b and c: one more of them has to confirm.
        let mut rule = CommitRule::new(SyncPolicy::None, Lsn::ZERO);
        rule.held = Default::default();
        rule.set_quorum_rule(quorum_rule("ANY 1 (*)", "b c"));
        let at = |b, c, d| [replica("b", true, [b; 3]), replica("c", true, [c; 3]), replica("d", true, [d; 3])];
        rule.update(&standings(&at(50, 0, 90)), Lsn(100));
        assert_eq!(rule.released(RemoteFlush, Lsn(100)), Lsn(50));
        rule.begin_joint(quorum_rule("ANY 2 (*)", "b c d"), Lsn(100));
        rule.update(&standings(&at(50, 0, 90)), Lsn(100));
        assert!(!rule.joint_is_proved(Lsn(100)), "two hold 50, the log ended at 100");
        rule.update(&standings(&at(120, 0, 90)), Lsn(120));
        assert_eq!(rule.released(RemoteFlush, Lsn(120)), Lsn(90), "b alone was enough before");
        rule.update(&standings(&at(120, 0, 100)), Lsn(120));
        assert!(!rule.joint_is_proved(Lsn(99)), "it has to be durable here as well");
        assert!(rule.joint_is_proved(Lsn(120)));
        // Given up: the old rule alone.
        let mut given_up = rule.clone();
        given_up.end_joint();
        given_up.update(&standings(&at(120, 0, 100)), Lsn(120));
        assert_eq!(given_up.released(RemoteFlush, Lsn(120)), Lsn(120));
        // Taken: the new rule alone, under which c may be the second.
        rule.set_quorum_rule(quorum_rule("ANY 2 (*)", "b c d"));
        rule.end_joint();
        rule.update(&standings(&at(130, 125, 100)), Lsn(130));
        assert_eq!(rule.released(RemoteFlush, Lsn(130)), Lsn(125));
    }

    #[test]
    fn a_replica_that_leaves_is_counted_until_the_register_says_so() {
        let mut rule = CommitRule::new(SyncPolicy::None, Lsn::ZERO);
        rule.held = Default::default();
        rule.set_quorum_rule(quorum_rule("ANY 1 (*)", "b c"));
        rule.begin_joint(quorum_rule("ANY 1 (*)", "b"), Lsn(80));
        let at = |b, c| [replica("b", true, [b; 3]), replica("c", true, [c; 3])];
        rule.update(&standings(&at(40, 90)), Lsn(100));
        assert_eq!(rule.released(RemoteFlush, Lsn(100)), Lsn(40), "what only c has, a failover without c lacks");
        assert!(!rule.joint_is_proved(Lsn(100)));
        let gone = [replica("b", false, [40; 3]), replica("c", true, [90; 3])];
        rule.update(&standings(&gone), Lsn(100));
        assert!(rule.shortage(&standings(&gone)).expect("b is gone").contains("needs 1 streaming, 0 are"));
        rule.update(&standings(&at(85, 90)), Lsn(100));
        assert!(rule.joint_is_proved(Lsn(100)));
    }
}
