//! What a node tells of itself and of others to clients, monitoring and operators is what it knows: never a master that takes no
//! writes, no lag of 0 behind a leader that is dead, no address at which clients are not served.

mod common;

use std::net::TcpListener;
use std::process::Command;
use std::time::{Duration, Instant};

use common::cluster::Cluster;
use common::{Client, Node, Reply, directory, until};

/// The value of a line of INFO.
fn info(client: &mut Client, key: &str) -> String {
    let text = client.command(&["INFO"]).text().to_owned();
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("{key} is told: {text}")).to_owned()
}

fn role(client: &mut Client) -> String {
    let Reply::Array(elements) = client.command(&["ROLE"]) else { panic!("ROLE answers with an array") };
    elements[0].text().to_owned()
}

/// The value that HELLO tells of `role`.
fn hello_role(client: &mut Client) -> String {
    let Reply::Array(pairs) = client.command(&["HELLO", "2"]) else { panic!("HELLO answers with an array") };
    let value = pairs.chunks_exact(2).find(|pair| matches!(&pair[0], Reply::Bulk(key) if key == "role"));
    value.expect("a role")[1].text().to_owned()
}

/// What monitoring of Redis looks at says that writes do not go here.
fn is_no_master(client: &mut Client, node_role: &str) {
    assert_eq!(info(client, "role"), "slave");
    assert_eq!((role(client).as_str(), hello_role(client).as_str()), ("slave", "replica"));
    assert_eq!((info(client, "node_role").as_str(), info(client, "lag_bytes").as_str()), (node_role, "-1"));
    assert_eq!(info(client, "master_link_status"), "down");
    assert_eq!(client.command(&["LEADER"]), Reply::Nil);
}

#[test]
fn member_without_a_majority_is_no_master() {
    let root = directory();
    let free = || TcpListener::bind("127.0.0.1:0").expect("a free port");
    let ports = [free(), free(), free()].map(|listener| listener.local_addr().expect("an address").to_string());
    let members = format!("a={},b={},c={}", ports[0], ports[1], ports[2]);
    let alone = Node::start(root.path(), "a", &["--members", &members, "--peer-listen", &ports[0]]);
    is_no_master(&mut alone.client(), "leaderless");
}

#[test]
fn leader_that_lost_its_majority_is_no_master() {
    let mut cluster = Cluster::start(&["a", "b", "c"], &["--sync", "ALL"]);
    let leader = cluster.leader();
    let mut client = cluster.client(leader);
    assert_eq!((info(&mut client, "role").as_str(), role(&mut client).as_str()), ("master", "master"));
    assert_eq!(hello_role(&mut client), "master");
    let others: Vec<&str> = cluster.names.iter().copied().filter(|name| *name != leader).collect();
    others.iter().for_each(|name| cluster.kill(name));
    until("its lease is over", || info(&mut client, "role") == "slave");
    is_no_master(&mut client, "leader without lease");
    until("it tells since when", || info(&mut client, "leader_silence_ms").parse::<u64>().expect("a number") > 500);
    cluster.bring_together(&others);
    let leader = cluster.leader();
    assert_eq!(info(&mut cluster.client(leader), "role"), "master");
}

#[test]
fn lag_behind_a_dead_leader_grows_and_is_not_zero() {
    let root = directory();
    let leader = Node::start(root.path(), "a", &[]);
    let follow = leader.peer_listen.to_string();
    let metrics = ["--follow", &follow, "--metrics-listen", "127.0.0.1:0"];
    let replica = Node::start(root.path(), "b", &metrics);
    let mut client = replica.client();
    leader.client().command(&["SET", "k", "v"]);
    until("it has everything", || {
        client.command(&["GET", "k"]) == Reply::Bulk("v".to_owned()) && info(&mut client, "lag_bytes") == "0"
    });
    leader.kill();
    let lag = |client: &mut Client| info(client, "lag_us").parse::<u64>().expect("a number");
    until("it says that it does not know", || info(&mut client, "lag_bytes") == "-1");
    let before = lag(&mut client);
    assert!(before > 0, "{before}");
    until("the lag grows", || lag(&mut client) > before + 500_000);
    assert!(info(&mut client, "leader_silence_ms").parse::<u64>().expect("a number") >= 500);
    let url = format!("redis://{}", replica.listen);
    let output = Command::new(env!("CARGO_BIN_EXE_walferry")).args(["status", "--url", &url]).output();
    let output = output.expect("the binary runs");
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(told.contains("not known: nothing was heard of a leader for"), "{told}");
    assert_eq!(output.status.code(), Some(1), "there is something to look at");
}

/// INFO, ROLE and LEADER name no leader.
fn names_no_leader(client: &mut Client) {
    assert_eq!((info(client, "master_host").as_str(), info(client, "master_port").as_str()), ("", "0"));
    let Reply::Array(elements) = client.command(&["ROLE"]) else { panic!("ROLE answers with an array") };
    assert_eq!(elements[1..3], [Reply::Bulk(String::new()), Reply::Integer(0)]);
    assert_eq!(client.command(&["LEADER"]), Reply::Nil);
}

#[test]
fn peer_address_of_a_leader_is_not_told_to_clients() {
    let root = directory();
    let dead = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port");
    let replica = Node::start(root.path(), "b", &["--follow", &dead.to_string()]);
    let mut client = replica.client();
    names_no_leader(&mut client);
    let Reply::Error(refused) = client.command(&["SET", "k", "v"]) else { panic!("a replica takes no writes") };
    assert!(refused.starts_with("READONLY") && refused.ends_with("The leader is not known."), "{refused}");
    // Once it is known it is told, and the leader's death does not change where it is.
    let peer = dead.to_string();
    let leader = Node::start(root.path(), "a", &["--peer-listen", &peer]);
    let address = leader.listen.to_string();
    until("it reports its removal", || client.command(&["LEADER"]) == Reply::Bulk(address.clone()));
    leader.kill();
    assert_eq!(info(&mut client, "master_port"), address.rsplit_once(':').expect("a port").1);
}

#[test]
fn member_that_has_heard_no_leader_names_none() {
    let mut cluster = Cluster::start(&["a", "b", "c"], &[]);
    let leader = cluster.leader();
    let others: Vec<&str> = cluster.names.iter().copied().filter(|name| *name != leader).collect();
    let mut client = cluster.client(others[0]);
    let address = cluster.client_address(leader).to_string();
    until("the leader's address is told", || client.command(&["LEADER"]) == Reply::Bulk(address.clone()));
    drop(client);
    for name in ["a", "b", "c"] {
        cluster.kill(name);
    }
    cluster.bring(others[0]);
    names_no_leader(&mut cluster.client(others[0]));
}

#[test]
fn address_of_the_leader_before_is_not_told_as_the_present_one() {
    let mut cluster = Cluster::start(&["a", "b", "c"], &[]);
    let old = cluster.leader();
    let address = cluster.client_address(old).to_string();
    cluster.kill(old);
    let others: Vec<&str> = cluster.names.iter().copied().filter(|name| *name != old).collect();
    until("both know the next leader's address", || {
        let mut known = 0;
        for name in &others {
            let told = cluster.describe(name);
            let moved = told["leader"] != old && !told["leader"].is_null();
            assert!(!moved || told["leader_address"] != address.as_str(), "{told}");
            known += usize::from(moved && told["leader_address"].is_string());
        }
        known == others.len()
    });
}

/// Runs the binary to its end: its exit code, and what it says.
fn run(words: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_walferry")).args(words).output().expect("the binary runs");
    (output.status.code(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
}

#[test]
fn slot_of_a_replica_that_is_gone_is_listed_and_dropped() {
    let root = directory();
    let leader = Node::start(root.path(), "a", &["--sync", "ANY 1 (b)"]);
    let (follow, url) = (leader.peer_listen.to_string(), format!("redis://{}", leader.listen));
    assert_eq!(run(&["slots", "--url", &url]), (Some(0), "no slots\n".to_owned()));
    let start = |name: &str| Node::start(root.path(), name, &["--follow", &follow]);
    let replicas = ["b", "c"].map(start);
    let listed =
        |what: &str| run(&["slot", "list", "--url", &url]).1.lines().filter(|line| line.contains(what)).count();
    until("both are connected", || listed("connected") == 2);
    let (code, used) = run(&["slot", "drop", "b", "--url", &url]);
    assert!(code == Some(1) && used.contains("the slot is in use: b is connected from 127.0.0.1:"), "{used}");
    let (code, elsewhere) = run(&["slot", "list", "--url", &format!("redis://{}", replicas[0].listen)]);
    let told = format!("ask the leader, at {}", leader.listen);
    assert!(code == Some(1) && elsewhere.contains(&told), "{elsewhere}");
    replicas.into_iter().for_each(Node::kill);
    until("both are away", || listed("away") == 2);
    let (code, dropped) = run(&["slot", "drop", "b", "--url", &url]);
    assert!(code == Some(0) && dropped.contains("slot b is dropped"), "{dropped}");
    assert!(dropped.contains("The sync policy ANY 1 (b) still names b"), "{dropped}");
    // The same for whoever looks for the command that clusters have.
    let (code, removed) = run(&["remove", "--name", "c", "--url", &url]);
    assert_eq!((code, removed.contains("slot c is dropped"), listed("")), (Some(0), true, 1), "{removed}");
    assert_eq!(run(&["slots", "--url", &url]).1, "no slots\n");
    assert_eq!(leader.client().command(&["REPLICATION"]), Reply::Array(vec![]));
    leader.stop();
    let leader = Node::start(root.path(), "a", &[]);
    assert_eq!(run(&["slots", "--url", &format!("redis://{}", leader.listen)]).1, "no slots\n", "for good");
}

#[test]
fn second_member_with_a_name_is_told_of_the_first() {
    let cluster = Cluster::start(&["a", "b", "c"], &[]);
    let (leader, replica) = (cluster.leader(), cluster.replica());
    let own = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").to_string();
    let at = |name: &str| if name == replica { own.clone() } else { cluster.peer_address(name) };
    let members = ["a", "b", "c"].map(|name| format!("{name}={}", at(name))).join(",");
    let secret = cluster.root.path().join("peer.secret").display().to_string();
    let root = directory();
    let flags = ["--members", &members, "--peer-listen", &own, "--peer-secret", &secret];
    let second = Node::start(root.path(), replica, &flags);
    let there = cluster.peer_address(replica);
    until("the second says so", || {
        let blocked_reason = info(&mut second.client(), "blocked_reason");
        blocked_reason.contains("give this node a name of its own") && blocked_reason.contains(&there)
    });
    assert_eq!(cluster.client(leader).command(&["SET", "k", "v"]), Reply::Simple("OK".to_owned()));
}

#[test]
fn second_node_with_a_name_is_told_of_the_first() {
    let root = directory();
    let leader = Node::start(root.path(), "a", &[]);
    let follow = leader.peer_listen.to_string();
    let first = Node::start(root.path(), "b", &["--follow", &follow]);
    leader.client().command(&["SET", "k", "v"]);
    until("the first follows", || first.client().command(&["GET", "k"]) == Reply::Bulk("v".to_owned()));
    let other_root = directory();
    let second = Node::start(other_root.path(), "b", &["--follow", &follow]);
    let (mut client, told) = (second.client(), [first.listen.to_string(), second.listen.to_string()]);
    until("the second says why it is refused", || {
        let blocked_reason = info(&mut client, "blocked_reason");
        blocked_reason.contains("two nodes are called b") && told.iter().all(|address| blocked_reason.contains(address))
    });
    assert_eq!(info(&mut first.client(), "blocked_reason"), "", "the first goes on");
    // The same node comes in at once, whatever its old connection is: kill -9, and a start with the same addresses.
    let (listen, begun) = (first.listen.to_string(), Instant::now());
    first.kill_and_free();
    let first = Node::start(root.path(), "b", &["--follow", &follow, "--listen", &listen]);
    leader.client().command(&["SET", "k", "w"]);
    let mut held = [first.client(), second.client()];
    until("one of the two has the name", || {
        held.iter_mut().any(|client| client.command(&["GET", "k"]) == Reply::Bulk("w".to_owned()))
    });
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}

#[test]
fn sync_policy_that_nobody_can_meet_is_refused() {
    let root = directory();
    let data = root.path().join("a").display().to_string();
    let start = |policy| run(&["start", "--data", &data, "--name", "a", "--listen", "127.0.0.1:0", "--sync", policy]);
    for (policy, says) in [
        ("ANY 1 (a)", "a cannot confirm its own commits"),
        ("FIRST 2 (a, b)", "without a this one asks for 2 of 1"),
        ("ANY 1 (b, b)", "b stands twice in the list"),
    ] {
        let (code, told) = start(policy);
        assert!(code == Some(2) && told.contains(says), "{policy}: {code:?} {told}");
    }
    let file = root.path().join("walferry.toml");
    std::fs::write(&file, "data = \"d\"\nname = \"a\"\nsync = \"b, b\"\n").expect("a file");
    let (code, told) = run(&["config", "check", &file.display().to_string()]);
    assert!(code == Some(2) && told.contains("b stands twice"), "{told}");
}

#[test]
fn replica_that_follows_a_client_port_is_told_at_once() {
    let root = directory();
    let leader = Node::start(root.path(), "a", &[]);
    let replica = Node::start(root.path(), "b", &["--follow", &leader.listen.to_string()]);
    let (mut client, begun) = (replica.client(), Instant::now());
    until("it says what is wrong", || {
        info(&mut client, "blocked_reason").contains("port is for clients, and not for peers")
            || info(&mut client, "blocked_reason").contains("a port for clients, and not for peers")
    });
    // Nothing was waited for: a peer that says nothing is given up after peer_timeout.
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    let log = std::fs::read_to_string(root.path().join("a.log")).expect("a log");
    assert!(log.contains("a node connected to `listen` as a peer"), "{log}");
    assert_eq!(leader.client().command(&["PING"]), Reply::Simple("PONG".to_owned()));
}

#[test]
fn join_right_after_the_start_waits_for_the_node() {
    let mut cluster = Cluster::start(&["a"], &[]);
    cluster.leader();
    let (url, witness) = (cluster.url("a"), "w1");
    // In the background, as an operator does it: it has not said anything yet when the join comes.
    let joining = std::thread::spawn(move || run(&["join", "--name", witness, "--url", &url]));
    cluster.add(witness);
    let (code, told) = joining.join().expect("no panic");
    assert!(code == Some(0) && told.contains("w1 is a member, a witness"), "{code:?} {told}");
}
