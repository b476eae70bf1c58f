//! Clusters of real processes: a leader that is killed, stopped, cut off or asked to step down is replaced; nothing that was
//! confirmed is lost, and what is lost is counted.

mod common;

use std::path::{Path, PathBuf};
use std::time::Duration;

use common::cluster::{Cluster, Load, is_witness, missing};
use common::{Reply, lsn_bytes, until};

fn lost_files(data: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(data.join("lost")).into_iter().flatten();
    entries.map(|entry| entry.expect("an entry").path()).collect()
}

#[test]
fn a_killed_leader_is_replaced_and_no_confirmed_commit_is_lost() {
    let mut cluster = Cluster::start(&["a", "b", "c"], &[]);
    let load = Load::start(&cluster, "remote_flush");
    for _ in 0..5 {
        load.wait_for(200);
        let leader = cluster.leader();
        cluster.kill(leader);
        load.wait_for(200);
        cluster.bring(leader);
        // The next one may be killed only when two copies are there again.
        until("it keeps up again", || {
            let told = cluster.describe(cluster.leader());
            told["in_sync"].as_array().is_some_and(|members| members.len() == 2)
        });
    }
    let (keys, _) = load.finish();
    let lost = missing(&mut cluster.client(cluster.leader()), &keys);
    assert!(lost.is_empty(), "{} of {} confirmed commits are lost: {lost:?}", lost.len(), keys.len());
    cluster.logs_are_identical();
}

#[test]
fn stopped_leader_acknowledges_nothing_and_returns_as_replica() {
    let cluster = Cluster::start(&["a", "b", "c"], &[]);
    let old = cluster.leader();
    let mut client = cluster.client(old);
    client.command(&["COMMITLEVEL", "local"]);
    cluster.signal(old, libc::SIGSTOP);
    // On its way to a leader that cannot know yet that it leads no more.
    client.send(&["SET", "late", "1"]).expect("the socket takes it");
    let mut new = old;
    until("another member leads", || {
        let others = cluster.names.iter().copied().filter(|name| *name != old);
        let leads = |name: &&str| cluster.describe(name)["role"] == "leader";
        let found = others.clone().find(leads);
        new = found.unwrap_or(old);
        found.is_some()
    });
    cluster.signal(old, libc::SIGCONT);
    let answer = client.reply().expect("an answer");
    let Reply::Error(text) = &answer else { panic!("a leader without a lease acknowledged: {answer:?}") };
    assert!(["MOVED", "UNCERTAIN", "CLUSTERDOWN"].iter().any(|code| text.starts_with(code)), "{text}");
    until("it follows", || cluster.describe(old)["role"] == "replica");
    assert_ne!(cluster.leader(), old);
    cluster.logs_are_identical();
    let _ = new;
}

#[test]
fn commits_only_the_old_leader_had_are_counted_and_kept() {
    let mut cluster = Cluster::start(&["a", "b", "c"], &[]);
    let old = cluster.leader();
    let others: Vec<&str> = cluster.names.iter().copied().filter(|name| *name != old).collect();
    cluster.client(old).command(&["SET", "kept", "1"]);
    until("everybody has it", || {
        others.iter().all(|name| cluster.describe(name)["flushed"] == cluster.describe(old)["flushed"])
    });
    others.iter().for_each(|name| cluster.signal(name, libc::SIGSTOP));
    let mut client = cluster.client(old);
    client.command(&["COMMITLEVEL", "local"]);
    // As many as the lease lets through before it ends.
    let mut acknowledged = 0;
    client.give_up_after(Duration::from_millis(100));
    while let Ok(Reply::Simple(_)) = client.try_command(&["SET", &format!("lost:{acknowledged}"), "1"]) {
        acknowledged += 1;
    }
    assert!(acknowledged > 0, "the lease still held when the others were stopped");
    cluster.kill(old);
    others.iter().for_each(|name| cluster.signal(name, libc::SIGCONT));
    let new = cluster.leader();
    assert_ne!(new, old);
    cluster.bring(old);
    cluster.logs_are_identical();
    let told = cluster.describe(old);
    let lost = told["lost_commits"].as_u64().expect("a number");
    let path = &cluster.nodes[old].data;
    // Frames may have reached a stopped replica's socket; those are not lost.
    let mut kept = cluster.client(new);
    let there = (0..acknowledged).filter(|n| kept.command(&["GET", &format!("lost:{n}")]) != Reply::Nil).count() as u64;
    assert!(lost + there >= acknowledged, "{acknowledged} acknowledged, {there} there, {lost} counted as lost");
    assert_eq!(lost > 0, !lost_files(path).is_empty(), "what is lost is kept in a file");
    assert_eq!(kept.command(&["GET", "kept"]), Reply::Bulk("1".to_owned()));
    if lost > 0 {
        assert!(cluster.log_of(old).contains("lost asynchronous commits: "), "the log says so");
        let data = path.display().to_string();
        let told = cluster.run(&["log", "dump", "--data", &data, "--lost", "--records"]).expect("a dump");
        assert_eq!(told.matches("put \"lost:").count() as u64, lost, "{told}");
    }
}

#[test]
fn two_data_members_and_a_witness_are_a_cluster() {
    let mut cluster = Cluster::start(&["a", "b", "w"], &[]);
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
    // Without the witness and the leader nobody may lead, and the other says for whom it waits.
    let leader = cluster.leader();
    cluster.kill("w");
    cluster.kill(leader);
    let left = if leader == "a" { "b" } else { "a" };
    until("the reason is reported", || {
        let told = cluster.describe(left)["blocked_reason"].as_str().unwrap_or_default().to_owned();
        told.contains("silent") || told.contains("majority")
    });
    let refused = cluster.client(left).command(&["SET", "k", "v"]);
    assert!(!matches!(refused, Reply::Simple(_)), "{refused:?}");
    assert!(!matches!(cluster.client(left).command(&["GET", "leads"]), Reply::Error(_)), "reads go on");
    cluster.bring("w");
    until("it leads", || cluster.describe(left)["role"] == "leader");
    drop(refused);
}

#[test]
fn unsafe_failover_waits_until_it_is_allowed() {
    let mut cluster = Cluster::start(&["a", "b", "c", "w1", "w2"], &[]);
    let (leader, replica) = (cluster.leader(), cluster.replica());
    let left = *cluster.nodes.keys().find(|name| **name != leader && **name != replica).expect("three");
    cluster.kill(replica);
    cluster.client(leader).command(&["SET", "k", "v"]);
    cluster.kill(leader);
    // Which of the two confirmed a commit the one that is left cannot know.
    let awaited = format!("waiting for {leader}, or 1 of {replica}");
    until("the one that is left says for whom it waits", || {
        cluster.describe(left)["blocked_reason"].as_str().is_some_and(|text| text.contains(&awaited))
    });
    let refused = cluster.client(left).command(&["SET", "k", "w"]);
    assert!(
        matches!(&refused, Reply::Error(text) if text.starts_with("CLUSTERDOWN") && text.contains(&awaited)),
        "{refused:?}"
    );
    let told = cluster.run(&["promote", "--allow-unclean", "--url", &cluster.url(left)]).expect("it leads");
    assert!(told.contains(&format!("{left} leads")) && told.contains("may be lost"), "{told}");
    until("it leads", || cluster.describe(left)["role"] == "leader");
    cluster.bring(leader);
    cluster.bring(replica);
    cluster.logs_are_identical();
}

#[test]
fn a_switchover_loses_nothing_and_the_old_leader_follows() {
    let cluster = Cluster::start(&["a", "b", "c"], &[]);
    let load = Load::start(&cluster, "local");
    for _ in 0..3 {
        load.wait_for(200);
        let (old, to) = (cluster.leader(), cluster.replica());
        let told = cluster.run(&["switchover", "--to", to, "--url", &cluster.url(old)]).expect("it leads");
        assert!(told.starts_with(&format!("{to} leads in epoch")), "{told}");
        until("the old leader follows", || cluster.describe(old)["role"] == "replica");
    }
    let (keys, _) = load.finish();
    assert_eq!(missing(&mut cluster.client(cluster.leader()), &keys), Vec::<String>::new(), "not even at `local`");
    cluster.logs_are_identical();
    let leader = cluster.leader();
    for (words, says) in
        [(["switchover", "--to", leader], "leads already"), (["switchover", "--to", "nobody"], "is not a member")]
    {
        let refused = cluster.run(&[&words[..], &["--url", &cluster.url("a")]].concat()).expect_err("refused");
        assert!(refused.contains(says), "{refused}");
    }
}

#[test]
fn a_member_that_lost_its_disk_begins_anew() {
    let mut cluster = Cluster::start(&["a", "b", "c"], &[]);
    let (leader, lost) = (cluster.leader(), cluster.replica());
    cluster.client(leader).command(&["SET", "k", "v"]);
    let id = |cluster: &Cluster| {
        let told = cluster.describe(cluster.leader());
        let members = told["members"].as_array().expect("members").clone();
        members.iter().find(|member| member["name"] == lost).expect("it is one")["id"].clone()
    };
    let before = id(&cluster);
    cluster.kill(lost);
    std::fs::remove_dir_all(cluster.root.path().join(lost)).expect("its disk is gone");
    cluster.bring(lost);
    until("it is a member again, but not as the one that had promised and voted", || id(&cluster) != before);
    until("it keeps up", || {
        let told = cluster.describe(cluster.leader());
        told["in_sync"].as_array().is_some_and(|members| members.iter().any(|name| name == lost))
    });
    cluster.logs_are_identical();
}

/// A restored copy of a directory comes back with its member's name and forgot what that member confirmed since.
#[test]
fn restored_copy_of_a_member_joins_anew_and_does_not_lead() {
    let mut cluster = Cluster::start(&["a", "b", "c"], &[]);
    let (leader, restored) = (cluster.leader(), cluster.replica());
    let slow = *cluster.names.iter().find(|name| **name != leader && **name != restored).expect("three members");
    let confirm = |cluster: &Cluster, keys: std::ops::Range<usize>| {
        let mut client = cluster.client(leader);
        assert_eq!(client.command(&["COMMITLEVEL", "remote_flush"]), Reply::Simple("OK".to_owned()));
        let keys = keys.map(|n| format!("k{n}"));
        keys.inspect(|key| assert_eq!(client.command(&["SET", key, key]), Reply::Simple("OK".to_owned())))
            .collect::<Vec<_>>()
    };
    confirm(&cluster, 0..1);
    cluster.kill(restored);
    let (data, copy) = (cluster.root.path().join(restored), cluster.root.path().join("copy"));
    let copied = std::process::Command::new("cp").arg("-a").args([&data, &copy]).status().expect("cp runs");
    assert!(copied.success());
    cluster.bring(restored);
    until("it is in sync again", || {
        cluster.describe(leader)["in_sync"]
            .as_array()
            .is_some_and(|members| members.iter().any(|name| name == restored))
    });
    cluster.signal(slow, libc::SIGSTOP);
    let keys = confirm(&cluster, 1..200);
    cluster.kill(restored);
    cluster.kill(leader);
    std::fs::remove_dir_all(&data).and_then(|()| std::fs::rename(&copy, &data)).expect("the copy is in its place");
    cluster.signal(slow, libc::SIGCONT);
    cluster.bring(restored);
    until("the copy is known for one", || cluster.log_of(restored).contains("a copy of a member's directory"));
    cluster.bring(leader);
    assert_eq!(cluster.leader(), leader, "nobody else has what was confirmed");
    assert_eq!(missing(&mut cluster.client(leader), &keys), Vec::<String>::new());
    until("it keeps up", || {
        cluster.describe(leader)["in_sync"]
            .as_array()
            .is_some_and(|members| members.iter().any(|name| name == restored))
    });
    cluster.logs_are_identical();
}

#[test]
fn clients_are_sent_to_the_leader() {
    let cluster = Cluster::start(&["a", "b", "c"], &[]);
    let (leader, replica) = (cluster.leader(), cluster.replica());
    let address = cluster.client_address(leader).to_string();
    let mut client = cluster.client(replica);
    until("the replica knows the leader's clients' address", || {
        client.command(&["LEADER"]) == Reply::Bulk(address.clone())
    });
    assert_eq!(client.command(&["SET", "k", "v"]), Reply::Error(format!("MOVED 0 {address}")));
    assert_eq!(cluster.client(leader).command(&["LEADER"]), Reply::Bulk(address));
    let told = cluster.run(&["describe", "--url", &cluster.url(replica)]).expect("a description");
    for line in [format!("leader     {leader} at"), "policy     ANY 1 (*)".to_owned(), format!("  {leader:<10} leader")]
    {
        assert!(told.contains(&line), "{line:?} in\n{told}");
    }
    // A load that starts at a replica finds the leader, and follows it to the next.
    let load = cluster.run(&[
        "load",
        "-b",
        "append",
        "-c",
        "2",
        "-t",
        "50",
        "--level",
        "remote_flush",
        "--url",
        &cluster.url(replica),
    ]);
    let load = load.expect("the load finds the leader");
    assert!(load.contains("transactions"), "{load}");
}

#[test]
fn member_away_too_long_rejoins_by_snapshot_and_may_lead() {
    // So little log that who misses forty megabytes of it needs a copy.
    let small = ["--slot-keep-bytes-max", "17MiB", "--keep-bytes-min", "0", "--checkpoint-bytes", "1MiB"];
    let mut cluster = Cluster::start(&["a", "b", "c"], &small);
    let away = cluster.replica();
    let text = "x".repeat(400_000);
    let write = |cluster: &Cluster, numbers: std::ops::Range<usize>| {
        let mut client = cluster.client(cluster.leader());
        client.command(&["COMMITLEVEL", "remote_flush"]);
        for number in numbers {
            let reply = client.command(&["SET", &format!("key{}", number % 20), &format!("{number}{text}")]);
            assert_eq!(reply, Reply::Simple("OK".to_owned()));
        }
    };
    write(&cluster, 0..5);
    cluster.kill(away);
    write(&cluster, 5..105);
    cluster.bring(away);
    let state = |cluster: &Cluster| {
        let told = cluster.describe(cluster.leader());
        let in_sync = told["in_sync"].as_array().cloned().unwrap_or_default();
        in_sync.iter().any(|member| member == away)
    };
    // Only then: the set may not have noticed yet that it was away.
    until("it took a snapshot", || cluster.log_of(away).contains("a snapshot takes the place of log and store"));
    until("the member is in the in-sync set again", || state(&cluster));
    write(&cluster, 105..125);
    // It confirms commits like any other, and leads if it is asked to; a member that lacks nothing then follows it.
    let leader = cluster.leader();
    cluster.run(&["switchover", "--to", away, "--url", &cluster.url(leader)]).expect("it takes over");
    until("it leads", || cluster.leader() == away);
    write(&cluster, 125..130);
    let end = cluster.describe(away)["flushed"].as_str().expect("an LSN").to_owned();
    until("all have it", || {
        cluster.names.iter().all(|name| {
            let flushed = cluster.describe(name)["flushed"].as_str().map(lsn_bytes);
            flushed >= Some(lsn_bytes(&end))
        })
    });
    for name in cluster.names.clone() {
        until("its readers see it", || {
            let mut client = cluster.client(name);
            (110..130).all(|number| {
                client.command(&["GET", &format!("key{}", number % 20)]) == Reply::Bulk(format!("{number}{text}"))
            })
        });
        if name != away {
            let data = |name: &str| cluster.nodes[name].data.display().to_string();
            let same =
                cluster.run(&["log", "verify", "--data", &data(name), "--against", &data(away), "--up-to", &end]);
            assert!(same.as_ref().is_ok_and(|text| text.contains("the same bytes")), "{same:?}");
        }
    }
}
