//! A leader's change of the members, in the steps of the daemon's own driver (`walferry_cluster::membership` has the rules): the
//! terms of before and after count together while the register moves, and are settled once it is known where to.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use walferry_cluster::register::{ClusterState, Kind, MemberId};
use walferry_cluster::{MemberName, Terms};
use walferry_engine::lsn::Epoch;

/// How long a change is proposed.
const PROPOSE_TIME_MAX: Duration = Duration::from_secs(10);

/// What is to become of a member.
#[derive(Clone, Debug)]
pub enum Seating {
    /// It is taken in.
    Join { name: MemberName, id: MemberId, peer: String },
    /// It has caught up and counts from now on.
    Whole { name: MemberName, id: MemberId },
    /// It is done without, while those in reach answer.
    Remove { name: MemberName, id: MemberId, in_reach: BTreeSet<MemberName> },
}

impl Seating {
    /// The register with it; `None`: not by the rules.
    fn apply(&self, state: &ClusterState) -> Option<ClusterState> {
        match self {
            Seating::Join { name, id, peer } => state.with_member(name, *id, peer, Kind::Data).ok(),
            Seating::Whole { name, id } => state.with_whole(name, *id),
            Seating::Remove { name, in_reach, .. } => state.without_member(name, in_reach).ok(),
        }
    }

    fn is_done(&self, state: &ClusterState) -> bool {
        match self {
            Seating::Join { name, id, .. } => state.knows(name, *id),
            Seating::Whole { name, id } => state.knows(name, *id) && state.with_whole(name, *id).is_none(),
            Seating::Remove { name, id, .. } => !state.knows(name, *id),
        }
    }
}

enum Step {
    /// The node confirms what there is under the new terms.
    Proving(oneshot::Receiver<Result<(), String>>),
    Proposing,
    /// The register's terms alone count again, once it is known which they are.
    Settling,
}

/// What the change needs next.
pub enum Next {
    /// Nothing now.
    Wait,
    /// This proposal.
    Propose(ClusterState),
    /// The register's terms suffice again from this version on, and the change is over.
    Settle(u64),
    /// It is over, and the terms were the same all the time.
    Over,
}

/// The terms that are to count together with those of now, and who is to be told when everything is confirmed under them.
pub type Proof = (Terms, oneshot::Sender<Result<(), String>>);

/// A change on its way.
pub struct Changing {
    seating: Seating,
    epoch: Epoch,
    terms: (Terms, Terms),
    step: Step,
    /// A proposal followed on this version, and nobody knows its fate.
    open: Option<u64>,
    /// A proposal is on its way.
    asked: bool,
    until: Instant,
}

impl Changing {
    /// Begins on this register; with what the node has to prove, if the terms change.
    pub fn begin(seating: Seating, base: &ClusterState, now: Instant) -> Option<(Changing, Option<Proof>)> {
        let terms = (base.terms(), seating.apply(base)?.terms());
        let (mut step, mut joint) = (Step::Proposing, None);
        if terms.0 != terms.1 {
            let (sender, proved) = oneshot::channel();
            (step, joint) = (Step::Proving(proved), Some((terms.1.clone(), sender)));
        }
        let until = now + PROPOSE_TIME_MAX;
        Some((Changing { seating, epoch: base.epoch, terms, step, open: None, asked: false, until }, joint))
    }

    /// A proposal came back, or will not.
    pub fn handle_answer(&mut self) {
        self.asked = false;
    }

    /// What it needs, by the register as it is known.
    pub fn poll(&mut self, state: &ClusterState, now: Instant) -> Next {
        self.open.take_if(|version| state.version > *version);
        if let Step::Proving(proved) = &mut self.step {
            self.step = match proved.try_recv() {
                Ok(Ok(())) => Step::Proposing,
                Err(oneshot::error::TryRecvError::Empty) => return Next::Wait,
                Ok(Err(_)) | Err(oneshot::error::TryRecvError::Closed) => Step::Settling,
            };
        }
        if matches!(self.step, Step::Proposing) {
            if self.asked {
                return Next::Wait;
            }
            let over = self.seating.is_done(state) || state.epoch != self.epoch || now > self.until;
            let next = self.seating.apply(state).filter(|next| (state.terms(), next.terms()) == self.terms);
            if let (false, Some(next)) = (over, next) {
                self.asked = true;
                self.open = Some(state.version);
                return Next::Propose(next);
            }
            self.step = Step::Settling;
        }
        match self.open {
            Some(_) => Next::Wait,
            None if self.terms.0 == self.terms.1 => Next::Over,
            None => Next::Settle(state.version),
        }
    }
}
