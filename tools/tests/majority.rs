//! A cluster that has lost its majority for good: writes are answered and say what to do, one command makes a survivor a cluster
//! of its own, running or stopped, and the dead that come back are refused until they join anew.

mod common;

use std::time::{Duration, Instant};

use common::cluster::Cluster;
use common::{Reply, until};

/// Longer than writes wait for a lost majority, and far shorter than a hang.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(30);

fn ok() -> Reply {
    Reply::Simple("OK".to_owned())
}

fn blocked_reason(cluster: &Cluster, name: &str) -> String {
    cluster.describe(name)["blocked_reason"].as_str().unwrap_or_default().to_owned()
}

/// A cluster of three in which all have what was confirmed; its leader, and the others.
fn three() -> (Cluster, &'static str, [&'static str; 2]) {
    let cluster = Cluster::start(&["a", "b", "c"], &["--sync", "ALL"]);
    let leader = cluster.leader();
    until("both are in sync", || cluster.describe(leader)["in_sync"].as_array().is_some_and(|names| names.len() == 2));
    let mut client = cluster.client(leader);
    assert_eq!(client.command(&["COMMITLEVEL", "remote_apply"]), ok());
    assert_eq!(client.command(&["SET", "confirmed", "1"]), ok());
    let others: Vec<&str> = cluster.names.iter().copied().filter(|name| *name != leader).collect();
    let others = [others[0], others[1]];
    (cluster, leader, others)
}

/// A write at `local` is answered, and says what an operator can do.
fn write_tells_the_way_out(cluster: &Cluster, name: &str, timeout_ms: &str) {
    let mut client = cluster.client(name);
    client.command(&["COMMITTIMEOUT", timeout_ms]);
    client.give_up_after(ANSWER_TIME_MAX);
    let begun = Instant::now();
    let answer = client.command(&["SET", "unconfirmed", "1"]);
    assert!(
        matches!(&answer, Reply::Error(text) if text.starts_with("CLUSTERDOWN") && text.contains("--force-new-cluster")),
        "{name} after {:?}: {answer:?}",
        begun.elapsed()
    );
}

/// `name` leads a cluster of its own, with what was confirmed; those that come back are refused until they join anew.
fn goes_on_alone(
    cluster: &mut Cluster,
    name: &'static str,
    gone: [&'static str; 2],
    come_back: impl FnOnce(&mut Cluster),
) {
    until("it takes writes", || cluster.client(name).command(&["SET", "alone", "0"]) == ok());
    assert_eq!(cluster.client(name).command(&["GET", "confirmed"]), Reply::Bulk("1".to_owned()));
    let members = cluster.describe(name)["members"].as_array().map(Vec::len);
    assert_eq!(members, Some(1));
    let [version, epoch] = ["version", "epoch"].map(|field| cluster.describe(name)[field].clone());
    // Both at once: of the old cluster they would be a majority.
    come_back(cluster);
    for back in gone {
        until("it is told that it was removed", || {
            let refused = cluster.client(back).command(&["SET", "k", "v"]);
            let way = format!("`walferry join --name {back}`");
            matches!(&refused, Reply::Error(text) if text.starts_with("CLUSTERDOWN removed") && text.contains(&way))
        });
    }
    let now = ["version", "epoch"].map(|field| cluster.describe(name)[field].clone());
    assert_eq!(now, [version, epoch], "they changed nothing");
    assert_eq!(cluster.client(name).command(&["SET", "alone", "0"]), ok());
    // It is remembered.
    cluster.kill(name);
    cluster.bring(name);
    until("it leads again", || cluster.client(name).command(&["SET", "alone", "1"]) == ok());
    for back in gone {
        let join = ["join", "--name", back, "--url", &cluster.url(name)];
        cluster.run(&join).expect("it joins anew");
    }
    let mut client = cluster.client(name);
    assert_eq!(client.command(&["COMMITLEVEL", "remote_apply"]), ok());
    assert_eq!(client.command(&["SET", "together", "1"]), ok());
    for back in gone {
        until("it has the survivor's log", || {
            cluster.client(back).command(&["GET", "together"]) == Reply::Bulk("1".to_owned())
        });
        assert_eq!(cluster.client(back).command(&["GET", "alone"]), Reply::Bulk("1".to_owned()));
    }
    cluster.logs_are_identical();
}

#[test]
fn leader_without_the_others_is_made_a_cluster_while_it_runs() {
    let (mut cluster, leader, gone) = three();
    let refused = cluster.run(&["promote", "--force-new-cluster", "--url", &cluster.url(leader)]);
    assert!(refused.as_ref().is_err_and(|text| text.contains("walferry remove")), "a majority is well: {refused:?}");
    gone.iter().for_each(|name| cluster.kill(name));
    until("its lease is over", || blocked_reason(&cluster, leader).contains("--force-new-cluster"));
    // By the session's own time, by the node's, and at once after that.
    write_tells_the_way_out(&cluster, leader, "300");
    write_tells_the_way_out(&cluster, leader, "0");
    write_tells_the_way_out(&cluster, leader, "0");
    let told = cluster.run(&["promote", "--force-new-cluster", "--url", &cluster.url(leader)]).expect("it is forced");
    assert!(gone.iter().all(|name| told.contains(name)) && told.contains("lost"), "{told}");
    goes_on_alone(&mut cluster, leader, gone, |cluster| cluster.bring_together(&gone));
}

#[test]
fn stopped_replica_becomes_a_cluster_by_force() {
    let (mut cluster, leader, [survivor, other]) = three();
    cluster.kill(leader);
    cluster.kill(other);
    until("it knows that a majority is gone", || blocked_reason(&cluster, survivor).contains("--force-new-cluster"));
    write_tells_the_way_out(&cluster, survivor, "0");
    let data = cluster.nodes[survivor].data.display().to_string();
    let force = ["promote", "--force-new-cluster", "--data", &data];
    let running = cluster.run(&force).expect_err("it runs");
    assert!(running.contains("--url"), "{running}");
    cluster.kill(survivor);
    let told = cluster.run(&force).expect("it is forced");
    for says in [leader, other, "lost", "walferry join", "durable up to"] {
        assert!(told.contains(says), "{says:?} in {told}");
    }
    let again = cluster.run(&force).expect_err("it is done");
    assert!(again.contains("the only member"), "{again}");
    cluster.bring(survivor);
    let gone = [leader, other];
    goes_on_alone(&mut cluster, survivor, gone, |cluster| cluster.bring_together(&gone));
}

/// They go on where they stood still, with leases that are over and promises of their own.
#[test]
fn survivor_is_not_fenced_by_those_that_were_only_paused() {
    for leader_first in [true, false] {
        let (mut cluster, leader, [survivor, other]) = three();
        [leader, other].iter().for_each(|name| cluster.signal(name, libc::SIGSTOP));
        until("it knows that a majority is gone", || {
            blocked_reason(&cluster, survivor).contains("--force-new-cluster")
        });
        cluster.run(&["promote", "--force-new-cluster", "--url", &cluster.url(survivor)]).expect("it is forced");
        let gone = if leader_first { [leader, other] } else { [other, leader] };
        goes_on_alone(&mut cluster, survivor, gone, |cluster| {
            gone.iter().for_each(|name| cluster.signal(name, libc::SIGCONT));
        });
    }
}
