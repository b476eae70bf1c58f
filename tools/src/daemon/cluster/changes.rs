//! The leader's part in changes of the membership: takes nodes in, makes them count once they have caught up, and does without
//! members. One change at a time, by compare-and-set, each in bounded time or not at all. Which register may follow which, and
//! why no commit is missed, stands in `walferry_cluster::membership`; the node's commit rule does the proving.

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{MutexGuard, oneshot};
use walferry_cluster::control::{Answer, Ask, Greeting};
use walferry_cluster::register::{Change, ClusterState, Kind, MemberId};
use walferry_cluster::{MemberName, Terms};

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
/// How long a change is proposed: a controller that died is replaced well before.
const PROPOSE_TIME_MAX: Duration = Duration::from_secs(10);
/// How long the voters may take to follow before a change is told.
const SEATED_TIME_MAX: Duration = Duration::from_secs(10);
/// Between two looks at the voters.
const SEATED_INTERVAL: Duration = Duration::from_millis(20);
/// Between two looks at a node.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// The outcome of a change, for whoever asked for it.
pub(super) type Told = Pin<Box<dyn Future<Output = Result<String, String>> + Send>>;

/// The one change that is under way.
struct Turn<'a> {
    seat: &'a Seat,
    _alone: MutexGuard<'a, ()>,
}

impl<'a> Turn<'a> {
    async fn take(seat: &'a Seat, what: String) -> Result<Turn<'a>, String> {
        let Ok(alone) = tokio::time::timeout(TURN_TIME_MAX, seat.changing.lock()).await else {
            let other = seat.known().changing.clone();
            return Err(format!("another change is under way: {other}; try again when it is over"));
        };
        seat.known().changing = what;
        Ok(Turn { seat, _alone: alone })
    }
}

impl Drop for Turn<'_> {
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
        let _turn = Turn::take(&seat, format!("{name} is being taken in")).await?;
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
        let change =
            |state: &ClusterState| state.with_member(&name, id, &peer, kind).map_err(|error| error.to_string());
        let version = agree(&seat, change, |state| state.knows(&name, id)).await?;
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
        let _turn = Turn::take(&seat, format!("{name} is being removed")).await?;
        let state = leading(&seat)?;
        let id = state.members.get(&name).map(|member| member.id);
        let in_reach = in_reach(&seat, &state).await;
        let change = |state: &ClusterState| state.without_member(&name, &in_reach).map_err(|error| error.to_string());
        let version = agree(&seat, change, |state| id.is_some_and(|id| !state.knows(&name, id))).await?;
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
    let _turn = Turn::take(seat, format!("{name} has caught up and is about to count")).await?;
    let change = |state: &ClusterState| state.with_whole(name, id).ok_or(format!("{name} does not join any more"));
    let whole = |state: &ClusterState| {
        state.members.get(name).is_some_and(|member| member.id == id) && state.with_whole(name, id).is_none()
    };
    let version = agree(seat, change, whole).await?;
    tracing::info!(member = %name, version, policy = %seat.state().sync_policy(), "has caught up and counts");
    Ok(())
}

/// Brings the register to what `change` makes of it, until it is `done`; the version in which it was seen to be. While the terms
/// of commits change with it, commits need both.
async fn agree(
    seat: &Arc<Seat>,
    change: impl Fn(&ClusterState) -> Result<ClusterState, String>,
    done: impl Fn(&ClusterState) -> bool,
) -> Result<u64, String> {
    let base = leading(seat)?;
    let terms = (base.terms(), change(&base)?.terms());
    let joint = terms.0 != terms.1;
    if joint {
        prove(seat, &terms.1).await?;
    }
    let mut open = None;
    let outcome = propose(seat, &base, &terms, change, done, &mut open).await;
    if joint {
        settle(seat, open);
    }
    outcome
}

/// Waits until what the old terms released is confirmed under the new ones as well, and holds to both from then on.
async fn prove(seat: &Seat, terms: &Terms) -> Result<(), String> {
    let (sender, proved) = oneshot::channel();
    seat.order(Order::Joint(terms.clone(), sender));
    proved.await.unwrap_or_else(|_| Err("this node stopped leading".to_owned()))
}

/// Proposes until the register is as wanted. `open` is the version on which a proposal followed whose fate is not known.
async fn propose(
    seat: &Arc<Seat>,
    base: &ClusterState,
    terms: &(Terms, Terms),
    change: impl Fn(&ClusterState) -> Result<ClusterState, String>,
    done: impl Fn(&ClusterState) -> bool,
    open: &mut Option<u64>,
) -> Result<u64, String> {
    let deadline = Instant::now() + PROPOSE_TIME_MAX;
    let mut reason = "other changes kept coming first".to_owned();
    while Instant::now() < deadline {
        let now = seat.state();
        open.take_if(|version| now.version > *version);
        if done(&now) {
            return Ok(now.version);
        }
        if now.epoch != base.epoch {
            return Err("the leader changed meanwhile, and nothing else: try again".to_owned());
        }
        let next = change(&now)?;
        if (now.terms(), next.terms()) != *terms {
            return Err("another change of the members came first: try again".to_owned());
        }
        let answer = seat.ask_controller(Ask::Change(Box::new(Change { state: next })), CHANGE_TIME_MAX).await;
        // Taken or not: once the register is past this version, the proposal can have no other fate. Until then it is made
        // again, which makes no difference if the first one arrives after all; a dead controller is replaced meanwhile.
        *open = Some(now.version);
        let answered = matches!(answer, Ok(Answer::Change(_)));
        if !answered {
            reason = refusal(answer, "the controller");
        }
        let mut watch = seat.register().watch();
        let past = watch.wait_for(|state| state.version > now.version);
        let _ = tokio::time::timeout(if answered { CHANGE_TIME_MAX } else { LOOK_INTERVAL }, past).await;
    }
    Err(match open {
        Some(_) => format!("it is not known whether the change was taken ({reason}); `walferry describe` tells it"),
        None => format!("given up, nothing was changed: {reason}"),
    })
}

/// The register's terms alone count again, once it is known which they are.
fn settle(seat: &Arc<Seat>, open: Option<u64>) {
    let seat = Arc::clone(seat);
    tokio::spawn(async move {
        let mut watch = seat.register().watch();
        if watch.wait_for(|state| open.is_none_or(|open| state.version > open)).await.is_ok() {
            seat.order(Order::Settled(seat.state().version));
        }
    });
}
