//! Members that come and go while the cluster runs: nothing that was confirmed is lost on the way, who is removed is told and
//! disturbs nobody, and what cannot be done is refused with the reason.

mod common;

use common::cluster::{Cluster, Load, is_witness, missing};
use common::{Reply, until};

/// What the leader tells of a member; null when it is none.
fn member(cluster: &Cluster, name: &str) -> serde_json::Value {
    let told = cluster.describe(cluster.leader());
    let members = told["members"].as_array().expect("members").clone();
    members.into_iter().find(|member| member["name"] == name).unwrap_or_default()
}

fn policy(cluster: &Cluster) -> String {
    cluster.describe(cluster.leader())["policy"].as_str().expect("a policy").to_owned()
}

fn blocked_reason(cluster: &Cluster, name: &str) -> String {
    cluster.describe(name)["blocked_reason"].as_str().unwrap_or_default().to_owned()
}

fn join(cluster: &Cluster, name: &str, at: &str) -> Result<String, String> {
    cluster.run(&["join", "--name", name, "--url", &cluster.url(at)])
}

fn remove(cluster: &Cluster, name: &str, at: &str) -> Result<String, String> {
    cluster.run(&["remove", "--name", name, "--url", &cluster.url(at)])
}

#[test]
fn members_come_and_go_under_load_and_nothing_confirmed_is_lost() {
    let mut cluster = Cluster::start(&["a", "b", "c"], &[]);
    cluster.add("d");
    cluster.add("e");
    let load = Load::start(&cluster, "remote_flush");
    load.wait_for(100);
    for (name, rule) in [("d", "ANY 2 (*)"), ("e", "ANY 2 (*)")] {
        until("it says how it is taken in", || blocked_reason(&cluster, name).contains("`walferry join --name"));
        let told = join(&cluster, name, "a").expect("it joins");
        for says in [format!("{name} is a member (version"), format!("{name} has caught up and counts")] {
            assert!(told.contains(&says), "{told}");
        }
        assert_eq!(policy(&cluster), rule);
        load.wait_for(100);
    }
    // Two of five die at once, one of them the leader: each commit is on three.
    let old = cluster.leader();
    let other = cluster.replica();
    cluster.kill(old);
    cluster.kill(other);
    load.wait_for(100);
    assert_ne!(cluster.leader(), old);
    cluster.bring(old);
    cluster.bring(other);
    until("everybody is in sync", || {
        cluster.describe(cluster.leader())["in_sync"].as_array().is_some_and(|members| members.len() == 4)
    });
    for rule in ["ANY 2 (*)", "ANY 1 (*)"] {
        let name = cluster.replica();
        let told = remove(&cluster, name, cluster.leader()).expect("it goes");
        assert!(told.contains(&format!("{name} is removed (version")) && told.contains(rule), "{told}");
        until("it reports its removal", || {
            blocked_reason(&cluster, name).contains("removed from the cluster at version")
        });
        cluster.kill(name);
        cluster.forget(name);
        load.wait_for(100);
    }
    // Three are left, and one of them may die.
    let old = cluster.leader();
    cluster.kill(old);
    load.wait_for(100);
    cluster.bring(old);
    let (keys, _) = load.finish();
    let lost = missing(&mut cluster.client(cluster.leader()), &keys);
    assert!(lost.is_empty(), "{} of {} confirmed commits are lost: {lost:?}", lost.len(), keys.len());
    cluster.logs_are_identical();
}

#[test]
fn a_removed_member_is_told_disturbs_nobody_and_joins_anew() {
    let mut cluster = Cluster::start(&["a", "b", "c"], &[]);
    let (leader, gone) = (cluster.leader(), cluster.replica());
    let (id, epoch) = (member(&cluster, gone)["id"].clone(), cluster.describe(leader)["epoch"].clone());
    let at = *cluster.nodes.keys().find(|name| **name != leader && **name != gone).expect("three");
    remove(&cluster, gone, at).expect("it goes, and any member takes the command");
    until("it reports its removal", || blocked_reason(&cluster, gone).contains("removed from the cluster at version"));
    assert!(cluster.log_of(gone).contains("removed from the cluster at version"), "its log says so");
    let refused = cluster.client(gone).command(&["SET", "k", "v"]);
    assert!(matches!(&refused, Reply::Error(text) if text.contains("walferry join")), "{refused:?}");
    // Neither it nor its next incarnation changes anything for the others.
    cluster.kill(gone);
    cluster.bring(gone);
    until("it knows that it was removed", || {
        blocked_reason(&cluster, gone).contains("removed from the cluster at version")
    });
    let load = Load::start_at(&cluster, &[leader, at], "remote_flush");
    load.wait_for(500);
    let (_, pause) = load.finish();
    assert_eq!(cluster.describe(leader)["epoch"], epoch, "no election, longest pause {pause:?}");
    // What it misses meanwhile it gets when it is back, as another incarnation.
    join(&cluster, gone, leader).expect("it joins anew");
    assert_ne!(member(&cluster, gone)["id"], id);
    assert_eq!(member(&cluster, gone)["log_status"], "complete");
    assert_eq!(cluster.describe(leader)["epoch"], epoch, "nor when it comes back");
    cluster.logs_are_identical();
    // It is a full member: it can lead.
    let told = cluster.run(&["switchover", "--to", gone, "--url", &cluster.url(leader)]).expect("it leads");
    assert!(told.contains(&format!("{gone} leads")), "{told}");
}

#[test]
fn removed_member_that_was_down_learns_it_at_its_return() {
    let mut cluster = Cluster::start(&["a", "b", "c"], &[]);
    let (leader, gone) = (cluster.leader(), cluster.replica());
    let epoch = cluster.describe(leader)["epoch"].clone();
    cluster.kill(gone);
    remove(&cluster, gone, leader).expect("it goes");
    assert_eq!(policy(&cluster), "ANY 1 (*)");
    cluster.bring(gone);
    until("it reports its removal", || blocked_reason(&cluster, gone).contains("removed from the cluster at version"));
    let load = Load::start_at(&cluster, &[leader], "remote_flush");
    load.wait_for(200);
    load.finish();
    assert_eq!(cluster.describe(leader)["epoch"], epoch, "it disturbed nobody");
}

#[test]
fn a_joining_node_that_is_killed_goes_on_when_it_is_back() {
    let mut cluster = Cluster::start(&["a", "b", "c"], &[]);
    cluster.add("d");
    until("the leader knows it", || blocked_reason(&cluster, "d").contains("walferry join"));
    let told = cluster.run(&["join", "--no-wait", "--name", "d", "--url", &cluster.url("a")]).expect("it joins");
    cluster.kill("d");
    assert!(told.contains("d is a member"), "{told}");
    // With three of four there everything goes on, a failover included.
    let load = Load::start_at(&cluster, &["a", "b", "c"], "remote_flush");
    load.wait_for(100);
    cluster.bring("d");
    until("it counts", || member(&cluster, "d")["log_status"] == "complete");
    load.wait_for(100);
    let (keys, _) = load.finish();
    assert_eq!(missing(&mut cluster.client(cluster.leader()), &keys), Vec::<String>::new());
    cluster.logs_are_identical();
}

#[test]
fn a_cluster_grows_from_one_node_to_two_with_a_witness() {
    let mut cluster = Cluster::start(&["a"], &[]);
    cluster.client("a").command(&["SET", "first", "1"]);
    cluster.add("b");
    until("it waits", || blocked_reason(&cluster, "b").contains("walferry join"));
    join(&cluster, "b", "a").expect("it joins");
    assert_eq!(policy(&cluster), "ANY 1 (*)");
    cluster.add("w");
    until("the witness listens", || std::net::TcpStream::connect(cluster.peer_address("w")).is_ok());
    let told = cluster.run(&["join", "--name", "w", "--peer", &cluster.peer_address("w"), "--url", &cluster.url("b")]);
    assert!(told.as_ref().is_ok_and(|told| told.contains("w is a member, a witness")), "{told:?}");
    let load = Load::start(&cluster, "remote_flush");
    load.wait_for(100);
    let old = cluster.leader();
    cluster.kill(old);
    let new = cluster.names.iter().copied().find(|name| *name != old && !is_witness(name)).expect("the other");
    until("the other leads", || cluster.describe(new)["role"] == "leader");
    cluster.bring(old);
    load.wait_for(100);
    let (keys, _) = load.finish();
    assert_eq!(missing(&mut cluster.client(cluster.leader()), &keys), Vec::<String>::new());
    assert_eq!(cluster.client(cluster.leader()).command(&["GET", "first"]), Reply::Bulk("1".to_owned()));
}

/// It reaches everybody and nobody reaches it, which must not matter if it is the one that controls the register.
#[test]
fn member_on_another_port_is_removed_and_joins_anew() {
    let mut cluster = Cluster::start(&["a", "b", "c"], &[]);
    let leader = cluster.leader();
    let replicas: Vec<&str> = cluster.names.iter().copied().filter(|name| *name != leader).collect();
    for moved in replicas {
        cluster.kill(moved);
        cluster.move_peer(moved);
        cluster.bring(moved);
        let way = format!("`walferry remove --name {moved}` and `walferry join --name {moved}`");
        until("it says that nobody reaches it", || blocked_reason(&cluster, moved).contains(&way));
        let told = remove(&cluster, moved, leader).expect("it goes, whoever controlled");
        assert!(told.contains(&format!("{moved} is removed")), "{told}");
        until("it reports its removal", || {
            blocked_reason(&cluster, moved).contains("removed from the cluster at version")
        });
        join(&cluster, moved, leader).expect("it joins, where it is now");
        until("it counts", || member(&cluster, moved)["log_status"] == "complete");
    }
    let load = Load::start(&cluster, "remote_flush");
    load.wait_for(100);
    let (keys, _) = load.finish();
    assert_eq!(missing(&mut cluster.client(cluster.leader()), &keys), Vec::<String>::new());
    cluster.logs_are_identical();
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    let mut cluster = Cluster::start(&["a", "b", "c"], &[]);
    let (leader, replica) = (cluster.leader(), cluster.replica());
    let version = cluster.describe(leader)["version"].clone();
    let refused = |outcome: Result<String, String>, says: &str| {
        let text = outcome.expect_err("refused");
        assert!(text.contains(says), "{says:?} in {text}");
    };
    refused(join(&cluster, replica, leader), "is a member already");
    refused(join(&cluster, "x", replica), "x is not known to the leader: start it with --members");
    let nowhere = format!("{}:9", cluster.host);
    refused(
        cluster.run(&["join", "--name", "x", "--peer", &nowhere, "--url", &cluster.url(leader)]),
        &format!("x is not reached at {nowhere}"),
    );
    let peer = cluster.peer_address(replica);
    refused(
        cluster.run(&["join", "--name", "x", "--peer", &peer, "--url", &cluster.url(leader)]),
        &format!("{peer} is the peer address of {replica}"),
    );
    refused(remove(&cluster, "x", replica), "x is not a member; members are a, b, c");
    refused(remove(&cluster, leader, replica), &format!("{leader} leads: `walferry switchover` first"));
    let other = Cluster::start(&["d"], &[]);
    let elsewhere = other.peer_address("d");
    refused(
        cluster.run(&["join", "--name", "d", "--peer", &elsewhere, "--url", &cluster.url(leader)]),
        "the log of d belongs to cluster",
    );
    refused(
        cluster.run(&["join", "--name", "x", "--peer", &elsewhere, "--url", &cluster.url(leader)]),
        &format!("d is at {elsewhere}, where x should be"),
    );
    assert_eq!(cluster.describe(leader)["version"], version, "nothing was changed");
    // Without the one that is down, the one that is to go is needed.
    let down = *cluster.nodes.keys().find(|name| **name != leader && **name != replica).expect("three");
    cluster.kill(down);
    refused(remove(&cluster, replica, leader), &format!("waiting for {down}"));
    assert!(!member(&cluster, replica).is_null());
}

#[test]
fn configured_policy_is_kept_by_a_removal() {
    let mut cluster = Cluster::start(&["a", "b", "c"], &["--sync", "ANY 1 (a, b, c)"]);
    cluster.add("d");
    until("it waits", || blocked_reason(&cluster, "d").contains("walferry join"));
    join(&cluster, "d", "b").expect("it joins");
    assert_eq!(policy(&cluster), "ANY 1 (a, b, c)");
    let leader = cluster.leader();
    let others: Vec<&str> = ["a", "b", "c"].into_iter().filter(|name| *name != leader).collect();
    remove(&cluster, others[0], leader).expect("the other one is left to confirm");
    let text = remove(&cluster, others[1], leader).expect_err("nobody would be left to confirm");
    assert!(text.contains("the sync policy ANY 1 (a, b, c) asks for 1 replicas"), "{text}");
}
