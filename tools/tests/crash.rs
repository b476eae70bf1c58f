//! `kill -9` of a leader or a replica in the middle of load, with real processes: no commit that was acknowledged is lost at
//! its level, and the logs are byte-identical afterwards.

mod common;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use common::{Client, Node, Reply, directory, log_bytes, lsn_bytes, until, wait_applied};

const ROUNDS: u64 = 20;
const WRITERS: usize = 4;

/// What was acknowledged: key and value.
type Acknowledged = Arc<Mutex<Vec<(String, String)>>>;

/// Writes unique keys at `level` until the connection breaks or `stop_at` commits were acknowledged by all writers together.
fn write_load(
    leader: &Node,
    level: &str,
    round: u64,
    done: &Arc<AtomicU64>,
    acknowledged: &Acknowledged,
) -> Vec<std::thread::JoinHandle<()>> {
    (0..WRITERS)
        .map(|writer| {
            let (address, level) = (leader.listen, level.to_owned());
            let (done, acknowledged) = (Arc::clone(done), Arc::clone(acknowledged));
            std::thread::spawn(move || {
                let Ok(mut client) = Client::connect(address) else { return };
                if client.try_command(&["COMMITLEVEL", &level]).is_err() {
                    return;
                }
                for number in 0_u64.. {
                    let key = format!("{round}:{writer}:{number}");
                    match client.try_command(&["SET", &key, &number.to_string()]) {
                        Ok(Reply::Simple(_)) => {
                            acknowledged.lock().unwrap().push((key, number.to_string()));
                            done.fetch_add(1, Ordering::Relaxed);
                        }
                        Ok(_) | Err(_) => return,
                    }
                }
            })
        })
        .collect()
}

fn check_all_there(node: &Node, acknowledged: &Acknowledged, what: &str) {
    let mut client = node.client();
    let expected = acknowledged.lock().unwrap().clone();
    for batch in expected.chunks(256) {
        for (key, _) in batch {
            client.send(&["GET", key]).expect("a running node");
        }
        for (key, value) in batch {
            let found = client.reply().expect("a running node");
            assert_eq!(found, Reply::Bulk(value.clone()), "{what}: acknowledged {key} is lost");
        }
    }
}

fn leader_flags<'a>() -> [&'a str; 2] {
    ["--sync", "ANY 1 (b)"]
}

/// How many acknowledgements to wait for before the kill: differs by round, from a handful to a few thousand.
fn kill_after(round: u64) -> u64 {
    20 + (round * 7919) % 1500
}

/// The leader is killed; at `local` its restart has everything, at remote levels the promoted replica has everything.
#[test]
fn no_acknowledged_commit_is_lost_when_the_leader_is_killed() {
    let root = directory();
    let mut leader = Node::start(root.path(), "a", &leader_flags());
    let acknowledged = Acknowledged::default();
    let remote = Acknowledged::default();
    for round in 0..ROUNDS {
        let level = ["local", "remote_flush", "remote_apply"][round as usize % 3];
        let follow = leader.peer_listen.to_string();
        let replica = Node::start(root.path(), "b", &["--follow", &follow]);
        let done = Arc::new(AtomicU64::new(0));
        let sink = if level == "local" { &acknowledged } else { &remote };
        let writers = write_load(&leader, level, round, &done, sink);
        until("enough commits are acknowledged", || done.load(Ordering::Relaxed) >= kill_after(round));
        leader.kill();
        writers.into_iter().for_each(|writer| writer.join().expect("a writer ends with its connection"));
        if level != "local" {
            check_all_there(&replica, &remote, "on the replica, before promotion");
        }
        drop(replica);
        leader = Node::start(root.path(), "a", &leader_flags());
        check_all_there(&leader, &acknowledged, "on the restarted leader, local");
        check_all_there(&leader, &remote, "on the restarted leader, remote");
    }
}

/// The replica is killed again and again under load; it catches up each time and ends with the same bytes.
#[test]
fn a_killed_replica_comes_back_with_the_same_log() {
    let root = directory();
    let leader = Node::start(root.path(), "a", &leader_flags());
    let follow = leader.peer_listen.to_string();
    let acknowledged = Acknowledged::default();
    let done = Arc::new(AtomicU64::new(0));
    let writers = write_load(&leader, "local", 0, &done, &acknowledged);
    let mut replica = Node::start(root.path(), "b", &["--follow", &follow]);
    for round in 0..ROUNDS {
        let target = done.load(Ordering::Relaxed) + kill_after(round) / 4;
        until("enough commits are acknowledged", || done.load(Ordering::Relaxed) >= target);
        replica.kill();
        replica = Node::start(root.path(), "b", &["--follow", &follow]);
    }
    let mut control = leader.client();
    control.command(&["COMMITLEVEL", "remote_apply"]);
    assert_eq!(control.command(&["SET", "last", "1"]), Reply::Simple("OK".into()), "the replica caught up");
    let address = replica.listen;
    check_all_there(&replica, &acknowledged, "on the replica");
    assert_ne!(address.port(), 0);
    let lsn = control.command(&["LSN"]).text().to_owned();
    wait_applied(&mut replica.client(), &lsn);
    let (leader_data, replica_data) = (leader.data.clone(), replica.data.clone());
    leader.kill();
    writers.into_iter().for_each(|writer| writer.join().expect("a writer ends with its connection"));
    replica.kill();
    let end = lsn_bytes(&lsn);
    assert!(
        log_bytes(&leader_data, 0, end) == log_bytes(&replica_data, 0, end),
        "the logs of leader and replica differ before {lsn}"
    );
}

/// A promoted replica leads; the old leader comes back as its replica and drops what nobody acknowledged.
#[test]
fn the_old_leader_rejoins_behind_a_promoted_replica() {
    let root = directory();
    let leader = Node::start(root.path(), "a", &leader_flags());
    let follow = leader.peer_listen.to_string();
    let replica = Node::start(root.path(), "b", &["--follow", &follow, "--sync", "ANY 1 (a)"]);
    let mut client = leader.client();
    client.command(&["COMMITLEVEL", "remote_apply"]);
    assert_eq!(client.command(&["SET", "kept", "1"]), Reply::Simple("OK".into()));
    let refused = replica.client().command(&["SET", "x", "1"]);
    assert!(
        matches!(&refused, Reply::Error(text) if text.starts_with("READONLY")),
        "a replica refuses writes and says so: {refused:?}"
    );
    // Stopped, so that it can never send what the next client writes: those commits live on the old leader alone.
    // SAFETY: signals our own child.
    unsafe { libc::kill(replica.pid() as libc::pid_t, libc::SIGSTOP) };
    let mut local = leader.client();
    for number in 0..100 {
        let reply = local.command(&["SET", &format!("alone:{number}"), "1"]);
        assert_eq!(reply, Reply::Simple("OK".into()));
    }
    leader.kill();
    // SAFETY: as above.
    unsafe { libc::kill(replica.pid() as libc::pid_t, libc::SIGCONT) };
    let mut promoted = replica.client();
    let reply = promoted.command(&["PROMOTE"]);
    assert!(!matches!(reply, Reply::Error(_)), "PROMOTE: {reply:?}");
    assert_eq!(promoted.command(&["GET", "kept"]), Reply::Bulk("1".into()));
    assert_eq!(promoted.command(&["SET", "new", "2"]), Reply::Simple("OK".into()));
    let follow = replica.peer_listen.to_string();
    let rejoined = Node::start(root.path(), "a", &["--follow", &follow]);
    promoted.command(&["COMMITLEVEL", "remote_apply"]);
    assert_eq!(promoted.command(&["SET", "both", "3"]), Reply::Simple("OK".into()));
    let mut reader = rejoined.client();
    assert_eq!(reader.command(&["GET", "new"]), Reply::Bulk("2".into()));
    assert_eq!(reader.command(&["GET", "both"]), Reply::Bulk("3".into()));
    let count = |client: &mut Client| client.command(&["DBSIZE"]);
    assert_eq!(count(&mut reader), count(&mut promoted), "both have the same keys");
}
