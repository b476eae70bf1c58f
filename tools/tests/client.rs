//! The client crate with real nodes: sessions read what they wrote from replicas, go on elsewhere by their token, outlive a leader,
//! and say what they cannot know. What nodes hardly ever answer is tested beside the crate.

mod common;

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use common::{Link, Node, PATIENCE, Reply, directory, until};
use walferry_client::{Cluster, CommitLevel, Error, ReadMode, Route, Session};

fn url(address: SocketAddr) -> String {
    format!("redis://{address}")
}

/// A session that waits as long as a test does.
fn session(cluster: &Cluster) -> Session {
    let mut session = Session::new(cluster);
    session.options.give_up_after = PATIENCE;
    session
}

fn replica(root: &Path, name: &str, leader: &str) -> Node {
    Node::start(root, name, &["--follow", leader])
}

fn stop(node: &Node, signal: libc::c_int) {
    // SAFETY: signals a process that is a child of this one and not yet waited for.
    unsafe { libc::kill(node.pid() as libc::pid_t, signal) };
}

fn until_known(cluster: &Cluster, nodes: usize) {
    until("every node is known", || {
        // Whoever asks too often is answered by what is known.
        let _ = cluster.refresh();
        cluster.leader().is_some() && cluster.nodes().len() == nodes
    });
}

#[test]
fn session_token_reads_own_writes_from_replicas() {
    let root = directory();
    let leader = Node::start(root.path(), "a", &[]);
    let near = replica(root.path(), "b", &leader.peer_listen.to_string());
    // What goes to this one takes half a second.
    let to = leader.peer_listen.to_string();
    let link = Link::try_start(root.path(), &["--rtt", "500ms", "--asymmetry", "0%", "--to", &to]).expect("a link");
    let far = replica(root.path(), "c", link.printed("listens on "));
    let cluster = Cluster::connect(&[url(near.listen)]).expect("a replica knows its leader");
    until_known(&cluster, 3);
    assert_eq!(cluster.leader(), Some(leader.listen.to_string()));

    let mut writer = session(&cluster);
    writer.options.replica_wait = PATIENCE;
    for round in 0..20 {
        writer.write(&["SET", "n", &round.to_string()]).expect("the leader is there");
        assert_eq!(writer.answered_by(), Some(leader.listen.to_string().as_str()));
        let read = writer.read(Route::Replica, &["GET", "n"]).expect("the replicas are there");
        assert_eq!(read.int(), Some(round));
        let by = writer.answered_by().expect("somebody answered").to_owned();
        assert!([near.listen, far.listen].map(|listen| listen.to_string()).contains(&by), "{by} is no replica");
    }

    // As the next request of the same user, in a process that only knows the far replica.
    let token = writer.token().expect("it has written");
    writer.write(&["SET", "n", "20"]).expect("the leader is there");
    let token_after = writer.token().expect("it has written");
    assert_ne!(token, token_after);
    let elsewhere = Cluster::connect(&[url(far.listen)]).expect("a replica knows its leader");
    let mut reader = Session::resume(&elsewhere, &token_after).expect("a token of this cluster");
    reader.options.give_up_after = PATIENCE;
    near.kill();
    // The far replica has no time to wait, the near one is gone: the leader has it.
    reader.options.replica_wait = Duration::ZERO;
    let read = reader.read(Route::Replica, &["GET", "n"]).expect("the leader is there");
    assert_eq!(read.int(), Some(20));
    reader.options.replica_wait = PATIENCE;
    let read = reader.read(Route::Replica, &["GET", "n"]).expect("a replica is there");
    assert_eq!((read.int(), reader.answered_by()), (Some(20), Some(far.listen.to_string().as_str())));
    for mode in [ReadMode::Committed, ReadMode::Strong] {
        reader.options.read_mode = mode;
        assert_eq!(reader.read(Route::Leader, &["GET", "n"]).map(|read| read.int()), Ok(Some(20)), "{mode:?}");
    }

    // A session beside it on the same connections has seen nothing, and is asked for nothing.
    let mut fresh = session(&elsewhere);
    fresh.options.replica_wait = Duration::ZERO;
    fresh.read(Route::Replica, &["GET", "n"]).expect("any state will do");
    assert_eq!(fresh.answered_by(), Some(far.listen.to_string().as_str()));
    let error = fresh.write(&["INCR", "n", "n"]).expect_err("too many arguments");
    assert!(matches!(&error, Error::Refused { text, .. } if text.starts_with("ERR wrong number")), "{error:?}");
}

#[test]
fn a_write_that_was_under_way_when_its_leader_died_is_uncertain() {
    let root = directory();
    let leader = Node::start(root.path(), "a", &["--sync", "ANY 1 (b)"]);
    let replica = replica(root.path(), "b", &leader.peer_listen.to_string());
    let cluster = Cluster::connect(&[url(leader.listen)]).expect("it is there");
    until_known(&cluster, 2);
    let mut writer = session(&cluster);
    writer.options.commit_level = Some(CommitLevel::RemoteApply);
    writer.write(&["SET", "before", "1"]).expect("the replica confirms");
    stop(&replica, libc::SIGSTOP);
    let waiting = std::thread::spawn(move || {
        let outcome = writer.write(&["SET", "under-way", "1"]);
        (outcome, writer)
    });
    let mut watcher = leader.client();
    until("it is durable on the leader", || matches!(watcher.command(&["GET", "under-way"]), Reply::Bulk(_)));
    leader.kill();
    let (outcome, mut writer) = waiting.join().expect("it does not panic");
    assert!(matches!(outcome, Err(Error::Uncertain { .. })), "{outcome:?}");
    stop(&replica, libc::SIGCONT);
    // Nobody leads; what was confirmed is read nevertheless.
    let read = writer.read(Route::Replica, &["GET", "before"]).expect("the replica is there");
    assert_eq!(read.int(), Some(1));
    writer.options.give_up_after = Duration::from_millis(300);
    let error = writer.write(&["SET", "after", "1"]).expect_err("nobody takes writes");
    assert!(matches!(error, Error::Unavailable(_)), "{error:?}");
}

#[test]
fn a_session_outlives_its_leader_and_never_reads_back() {
    let names = ["a", "b", "c"];
    let mut nodes = common::cluster::Cluster::start(&names, &["--sync", "ANY 1 (*)"]);
    let seeds: Vec<String> = names.iter().map(|name| url(nodes.client_address(name))).collect();
    let cluster = Cluster::connect(&seeds).expect("they are there");
    until_known(&cluster, 3);

    let mut session = session(&cluster);
    session.options.commit_level = Some(CommitLevel::RemoteFlush);
    let first = cluster.leader().expect("somebody leads");
    for round in 0..60 {
        if round == 20 {
            let leader = names.iter().find(|name| nodes.client_address(name).to_string() == first);
            nodes.kill(leader.expect("one of them"));
        }
        session.write_idempotent(&["SET", "n", &round.to_string()]).expect("somebody leads, soon");
        let read = session.read(Route::Replica, &["GET", "n"]).expect("somebody has it");
        assert_eq!(read.int(), Some(round), "answered by {:?}", session.answered_by());
    }
    assert_ne!(cluster.leader(), Some(first));
}
