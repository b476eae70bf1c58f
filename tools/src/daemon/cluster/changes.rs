//! The leader's part in changes of the membership: takes nodes in, makes them count once they have caught up, and does without
//! members. One change at a time, told in bounded time. Which register may follow which, and why no commit is missed, stands in
//! `walferry_cluster::membership`, the steps in `walferry_cluster::changing`; the node's commit rule does the proving.

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{OwnedMutexGuard, oneshot};
use walferry_cluster::MemberName;
use walferry_cluster::changing::{ChangeError, Changing, MemberChange, Next};
use walferry_cluster::control::{Answer, Ask, Greeting};
use walferry_cluster::register::{ClusterState, Kind, MemberId};

use super::Order;
use super::seat::{CHANGE_TIME_MAX, Seat};

/// How long an operator's command to the leader may take: longer than all its parts.
pub(super) const COMMAND_TIME_MAX: Duration = Duration::from_secs(60);
/// How long a node may take to get the register before it is a member.
pub(super) const ADMIT_TIME_MAX: Duration = Duration::from_secs(10);
/// How long a change waits for the one before it.
const TURN_TIME_MAX: Duration = Duration::from_secs(5);
/// How long a node that was removed may take to hear of it before it can be taken in again.
const ANEW_TIME_MAX: Duration = Duration::from_secs(5);
/// How long the voters may take to follow before a change is told.
const SEATED_TIME_MAX: Duration = Duration::from_secs(10);
/// Between two looks at the voters.
const SEATED_INTERVAL: Duration = Duration::from_millis(20);
/// Between two looks at a node.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// The outcome of a change, for whoever asked for it.
pub(super) type Told = Pin<Box<dyn Future<Output = Result<String, String>> + Send>>;

/// The one change that is under way, up to its last word: the end of one must not be taken for the end of the next.
struct Turn {
    seat: Arc<Seat>,
    _alone: OwnedMutexGuard<()>,
}

impl Turn {
    async fn take(seat: &Arc<Seat>, what: String) -> Result<Arc<Turn>, String> {
        let alone = Arc::clone(&seat.changing).lock_owned();
        let Ok(alone) = tokio::time::timeout(TURN_TIME_MAX, alone).await else {
            let other = seat.known().changing.clone();
            return Err(format!("another change is under way: {other}; try again when it is over"));
        };
        seat.known().changing = what;
        Ok(Arc::new(Turn { seat: Arc::clone(seat), _alone: alone }))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.seat.known().changing.clear();
    }
}

/// The register, if this node leads by it and may speak.
fn leading(seat: &Seat) -> Result<ClusterState, String> {
    let state = seat.state();
    let name = &seat.config.name;
    if state.leader.as_ref() != Some(name) || !seat.is_member(&state) {
        return Err(format!("{name} does not lead any more: try again"));
    }
    let lease = seat.node.as_ref().is_some_and(|node| node.shared.lease.holds(Instant::now()));
    if lease {
        Ok(state)
    } else {
        Err(format!("{name} leads without a lease: a majority of the members has to answer"))
    }
}

/// What became of a question, if it is not what was hoped for.
fn refusal(answer: std::io::Result<Answer>, whom: &str) -> String {
    match answer {
        Ok(Answer::Refused(text)) => text,
        Ok(_) => format!("{whom}: not an answer"),
        Err(error) => format!("{whom}: {error}"),
    }
}

/// Takes a node in.
pub(super) fn join(seat: Arc<Seat>, name: MemberName, peer: Option<String>) -> Told {
    Box::pin(async move {
        let turn = Turn::take(&seat, format!("{name} is being taken in")).await?;
        let state = leading(&seat)?;
        let Some(peer) = peer.or_else(|| seat.known().own_peer(&name)) else {
            // The register's own reasons come first: a member is not looked for.
            state.with_member(&name, MemberId(0), "", Kind::Data).map_err(|error| error.to_string())?;
            return Err(format!(
                "{name} is not known to the leader: start it with --members that name it and one member at least, or tell its \
                 peer address with --peer"
            ));
        };
        state.with_member(&name, MemberId(0), &peer, Kind::Data).map_err(|error| error.to_string())?;
        let Greeting { id, kind, .. } = greet_stranger(&seat, &state, &name, &peer).await?;
        let admitted = seat.ask_controller(Ask::Admit(id, peer.clone()), ADMIT_TIME_MAX + CHANGE_TIME_MAX).await;
        if !matches!(admitted, Ok(Answer::Done)) {
            return Err(format!("{name} could not be told the register: {}", refusal(admitted, "the controller")));
        }
        let change = MemberChange::Join { name: name.clone(), id, peer: peer.clone(), kind };
        let version = agree(&turn, change).await?;
        seated(&seat).await;
        tracing::info!(member = %name, %id, %peer, version, "taken in");
        Ok(match kind {
            Kind::Witness => format!("{name} is a member, a witness (version {version})"),
            Kind::Data => format!("{name} is a member (version {version}); it counts once it has caught up"),
        })
    })
}

/// Who is there, if it can be taken in.
async fn greet_stranger(
    seat: &Arc<Seat>,
    state: &ClusterState,
    name: &MemberName,
    peer: &str,
) -> Result<Greeting, String> {
    let deadline = Instant::now() + ANEW_TIME_MAX;
    loop {
        let ask = Ask::Greet(seat.greeting().await);
        let theirs = match seat.peers.at(peer).ask(&ask, seat.config.election_timeout * 4).await {
            Ok(Answer::Greeting(theirs)) => theirs,
            Ok(Answer::Stranger(strangeness)) => strangeness.member,
            other => return Err(format!("{name} is not reached at {peer}: {}", refusal(other, "it says"))),
        };
        if theirs.name != *name {
            return Err(format!("the node at {peer} is {}, not {name}", theirs.name));
        }
        if let Some(other) = theirs.cluster_id.filter(|id| *id != state.cluster_id) {
            return Err(format!(
                "the log of {name} belongs to cluster {other}, the members' to {}: start it with an empty data directory",
                state.cluster_id
            ));
        }
        // It has no register, or ours, of an earlier attempt. A life that was removed is not taken in again: the node begins
        // anew as soon as it hears of it.
        let fresh = !theirs.formed || seat.register().tells(theirs.id);
        if fresh && seat.state().removed_at(theirs.id).is_none() {
            return Ok(theirs);
        }
        if Instant::now() >= deadline {
            return Err(format!(
                "{name} at {peer} has a part in another cluster: start it with an empty data directory"
            ));
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// Does without a member.
pub(super) fn remove(seat: Arc<Seat>, name: MemberName) -> Told {
    Box::pin(async move {
        let turn = Turn::take(&seat, format!("{name} is being removed")).await?;
        let state = leading(&seat)?;
        let change = MemberChange::Remove { name: name.clone(), in_reach: in_reach(&seat, &state).await };
        let version = agree(&turn, change).await?;
        seated(&seat).await;
        let state = seat.state();
        let members: Vec<&str> = state.members.keys().map(MemberName::as_str).collect();
        tracing::info!(member = %name, version, "removed");
        let confirms = match state.sync_policy().to_string() {
            policy if policy.is_empty() => "no replica confirms commits any more".to_owned(),
            policy => format!("commits at remote levels wait for {policy}"),
        };
        Ok(format!("{name} is removed (version {version}); members are {}; {confirms}", members.join(", ")))
    })
}

/// Waits until the register's voters have followed the members, so that whoever is told of the change may rely on them. If they
/// cannot for now, the controller goes on trying.
async fn seated(seat: &Seat) {
    let deadline = Instant::now() + SEATED_TIME_MAX;
    while Instant::now() < deadline {
        let (state, register) = (seat.state(), seat.register());
        let members = state.members.values().map(|member| (member.id, member.peer.clone())).collect();
        if register.is_seated(&members, &state.voters(&register.voters())) {
            return;
        }
        tokio::time::sleep(SEATED_INTERVAL).await;
    }
}

/// Members that answer now.
async fn in_reach(seat: &Arc<Seat>, state: &ClusterState) -> BTreeSet<MemberName> {
    let mut asked = tokio::task::JoinSet::new();
    for (name, member) in &state.members {
        let (seat, name, peer) = (Arc::clone(seat), name.clone(), member.peer.clone());
        asked.spawn(async move {
            let answer = seat.ask(&name, &peer, Ask::Canvass, seat.config.election_timeout * 2).await;
            matches!(answer, Ok(Answer::Canvass { .. })).then_some(name)
        });
    }
    asked.join_all().await.into_iter().flatten().collect()
}

/// A member that joined has caught up: from now on it counts.
pub(super) async fn make_whole(seat: &Arc<Seat>, name: &MemberName, id: MemberId) -> Result<(), String> {
    let turn = Turn::take(seat, format!("{name} has caught up and is about to count")).await?;
    let version = agree(&turn, MemberChange::Whole { name: name.clone(), id }).await?;
    tracing::info!(member = %name, version, policy = %seat.state().sync_policy(), "has caught up and counts");
    Ok(())
}

/// Makes a change; the version of the register in which it was seen.
async fn agree(turn: &Arc<Turn>, change: MemberChange) -> Result<u64, String> {
    let state = leading(&turn.seat)?;
    let changing = Changing::begin(change, &state, Instant::now()).map_err(|error| error.to_string())?;
    let (sender, told) = oneshot::channel();
    tokio::spawn(drive(Arc::clone(turn), changing, sender));
    match told.await {
        Ok(outcome) => outcome.map_err(|error| error.to_string()),
        Err(_) => Err("the register of this node is gone".to_owned()),
    }
}

/// Does what a change needs until its last word, which may come long after its outcome is told.
async fn drive(turn: Arc<Turn>, mut changing: Changing, told: oneshot::Sender<Result<u64, ChangeError>>) {
    let (seat, mut told) = (&turn.seat, Some(told));
    let mut watch = seat.register().watch();
    loop {
        let state = watch.borrow_and_update().clone();
        match changing.poll(&state, Instant::now()) {
            Next::Wait(until) => {
                let time = until.map_or(Duration::MAX, |until| until.saturating_duration_since(Instant::now()));
                if let Ok(Err(_)) = tokio::time::timeout(time, watch.changed()).await {
                    return;
                }
            }
            Next::Prove(terms) => {
                let (sender, proved) = oneshot::channel();
                // The terms of now are this register's, which the driver may not have told the node yet.
                seat.order(Order::State(Box::new(state)));
                seat.order(Order::Joint(terms, sender));
                let outcome = proved.await.unwrap_or_else(|_| Err("this node stopped leading".to_owned()));
                changing.handle_proved(outcome, Instant::now());
            }
            Next::Propose(change) => {
                let answer = seat.ask_controller(Ask::Change(Box::new(change)), CHANGE_TIME_MAX).await;
                let outcome = match answer {
                    Ok(Answer::Change(_)) => Ok(()),
                    other => Err(refusal(other, "the controller")),
                };
                changing.handle_answer(outcome, Instant::now());
            }
            Next::Told(outcome) => {
                if let Some(told) = told.take() {
                    // Whoever asked may have gone.
                    let _ = told.send(outcome);
                }
            }
            Next::Settle(version) => return seat.order(Order::Settled(version)),
            Next::Over => return,
        }
    }
}
