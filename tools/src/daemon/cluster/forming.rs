//! How a cluster comes to be, and how a member that lost its disk is taken back. The register is made once, by the first member
//! by name, when every member was heard and none of them has one.

use std::collections::BTreeMap;
use std::sync::Arc;

use rand::RngExt;
use walferry_cluster::control::{Answer, Ask, Greeting};
use walferry_cluster::register::{Change, ClusterState, Holding, Member, MemberId, VOTERS_MAX};
use walferry_cluster::{ClusterId, MemberName};

use super::seat::{CHANGE_TIME_MAX, Event, Seat};

/// What a node that is no member waits for.
pub(super) fn waiting_for(seat: &Seat, state: &ClusterState) -> String {
    let name = &seat.config.name;
    let known = seat.known();
    let name_known = state.members.contains_key(name) || known.strangeness.as_ref().is_some_and(|said| said.name_known);
    if name_known {
        return "this node begins anew: the cluster takes it back as soon as a majority answers".to_owned();
    }
    if state.version > 0 {
        return "this node is being taken into the cluster".to_owned();
    }
    if let Some(version) = seat.store.removed() {
        return format!("removed from the cluster at version {version}; `walferry join --name {name}` takes it back");
    }
    if let Some(said) = &known.strangeness {
        let at = &said.member.client_address;
        let url = if at.is_empty() { String::new() } else { format!(" --url redis://{at}") };
        return format!(
            "this node is no member of cluster {}: `walferry join --name {name}{url}` takes it in",
            said.cluster_id
        );
    }
    let unheard = |name: &&MemberName| **name != seat.config.name && !known.greetings.contains_key(*name);
    let missing: Vec<&str> = seat.config.members.names().filter(unheard).map(MemberName::as_str).collect();
    if missing.is_empty() && !known.standstill.is_empty() {
        return known.standstill.clone();
    }
    if missing.is_empty() {
        return "the cluster is being formed".to_owned();
    }
    format!("waiting for {} to form the cluster: every member has to be there once", missing.join(", "))
}

/// Forms the cluster if this member is the one to do it and everybody is there.
pub(super) fn form(seat: &Arc<Seat>) {
    let greetings = seat.known().greetings.clone();
    let others = seat.config.members.names().filter(|name| **name != seat.config.name);
    let all = others.clone().all(|name| greetings.contains_key(name));
    let first = seat.config.members.names().next() == Some(&seat.config.name);
    // One that was removed waits to be taken in, and forms no other cluster.
    if !all || seat.store.removed().is_some() {
        return;
    }
    let seat = Arc::clone(seat);
    tokio::spawn(async move {
        let formed_here = seat.register().is_formed().await;
        let formed = formed_here || greetings.values().any(|greeting| greeting.formed);
        if first && !formed {
            let voters = voters(&seat, &greetings);
            tracing::info!(members = %seat.config.members, "forming the cluster");
            if let Err(error) = seat.register().form(voters).await {
                tracing::error!("the cluster cannot be formed: {error}");
            }
        } else if formed_here && seat.register().controls() {
            propose_members(&seat, &greetings).await;
        }
    });
}

fn voters(seat: &Seat, greetings: &BTreeMap<MemberName, Greeting>) -> BTreeMap<MemberId, String> {
    let id_of = |name: &MemberName| if *name == seat.config.name { seat.me } else { greetings[name].id };
    seat.config.members.iter().take(VOTERS_MAX).map(|(name, peer)| (id_of(name), peer.to_string())).collect()
}

/// The register exists and is empty: its first value.
async fn propose_members(seat: &Arc<Seat>, greetings: &BTreeMap<MemberName, Greeting>) {
    let mut all = greetings.clone();
    all.insert(seat.config.name.clone(), seat.greeting().await);
    let mut ids: Vec<ClusterId> = all.values().filter_map(|greeting| greeting.cluster_id).collect();
    ids.dedup();
    if let [one, .., other] = ids[..]
        && one != other
    {
        tracing::error!(
            "the members' logs belong to different clusters, {one} and {other}: remove the data directories of one"
        );
        return;
    }
    let cluster_id = ids.first().copied().unwrap_or_else(|| ClusterId(rand::rng().random()));
    let peers = seat.config.members.iter();
    let members = peers.filter_map(|(name, peer)| {
        let greeting = all.get(name)?;
        let member = Member { id: greeting.id, peer: peer.to_string(), kind: greeting.kind, holding: Holding::Whole };
        Some((name.clone(), member))
    });
    let state = match ClusterState::formed(cluster_id, members.collect(), &seat.config.policy) {
        Ok(state) => state,
        Err(error) => return complain(seat, format!("sync: {error}")),
    };
    match seat.register().change(Change { state }, CHANGE_TIME_MAX).await {
        Ok(_) => tracing::info!(cluster = %cluster_id, "the cluster is formed"),
        Err(error) => tracing::warn!("the cluster is not formed yet: {error}"),
    }
}

/// Says once what keeps the cluster from being formed, and keeps it for whoever asks.
fn complain(seat: &Seat, text: String) {
    let mut known = seat.known();
    if known.standstill != text {
        tracing::error!("{text}");
        known.standstill = text;
    }
}

/// Takes a member back that came with another life: the old one's vote and promises are gone with its disk. The register's
/// voters follow. True when the work has begun; `Event::TakenBack` ends it.
pub(super) fn take_back(seat: &Arc<Seat>, greeting: Greeting, state: &ClusterState) -> bool {
    let Some(member) = state.members.get(&greeting.name).cloned() else { return false };
    let (seat, state) = (Arc::clone(seat), state.clone());
    tokio::spawn(async move {
        let there = seat.peers.at(&member.peer).ask(&Ask::Greet(seat.greeting().await), CHANGE_TIME_MAX).await;
        let there = match there {
            Ok(Answer::Greeting(there)) => Some(there.id),
            Ok(Answer::Stranger(said)) => Some(said.member.id),
            _ => None,
        };
        if there == Some(greeting.id) {
            let name = &greeting.name;
            tracing::warn!(member = %name, old = %member.id, new = %greeting.id, "a member lost its disk and begins anew");
            let next = state.with_new_life(name, greeting.id);
            if let Err(error) = seat.register().change(Change { state: next }, CHANGE_TIME_MAX).await {
                tracing::warn!(member = %name, "not taken back yet: {error}");
            }
        } else {
            let text =
                "it is not the one that is reached at the member's peer address: give every node a name of its own";
            tracing::warn!(member = %greeting.name, id = %greeting.id, peer = %member.peer, "a node is not taken back: {text}");
        }
        tokio::time::sleep(seat.config.election_timeout).await;
        seat.event(Event::TakenBack);
    });
    true
}
