//! Who may speak to a peer port: nodes that prove the secret, under the name that they proved, and nobody else.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use walferry_cluster::control::{Answer, Ask, Greeting, LeaseHeartbeat, Packet, encode};
use walferry_cluster::message::{ENVELOPE_BYTES, Hello, Message, PROTOCOL_VERSION};
use walferry_cluster::register::{Change, ClusterState, Kind, MemberId};
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_tls::{PeerLinks, PeerSecret, Secrets};

mod common;
use common::cluster::{Cluster, Load, missing};
use common::{Client, Node, PATIENCE, Reply, directory, until};

fn run(words: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_walferry")).args(words).output().expect("the binary starts");
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

fn replicas(client: &mut Client) -> String {
    let text = client.command(&["INFO", "replication"]).text().to_owned();
    text.lines().find_map(|line| line.strip_prefix("connected_slaves:")).expect("a count").trim().to_owned()
}

fn epoch(cluster: &Cluster) -> String {
    cluster.describe(cluster.leader())["epoch"].to_string()
}

/// One that nobody listens on, by the kernel's word.
fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port")
}

fn set(node: &Node, key: &str, value: &str) {
    assert_eq!(node.client().command(&["SET", key, value]), Reply::Simple("OK".to_owned()));
}

fn secret(root: &Path, name: &str) -> PathBuf {
    let file = root.join(name);
    Secrets::create(&file).expect("a secret");
    file
}

/// A connection of somebody who holds the secret in `file` and proves to be `name`.
fn proved(address: SocketAddr, name: &str, file: &Path) -> TcpStream {
    let secret = Arc::new(PeerSecret::load(name, file).expect("a secret"));
    let stream = TcpStream::connect(address).expect("a connection");
    let secured = PeerLinks::plain().with_secret(secret).secure(stream, &address.to_string(), PATIENCE);
    let stream = secured.expect("the secret is the right one").stream;
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream
}

fn asked(stream: &mut TcpStream, ask: Ask) -> Answer {
    stream.write_all(&encode(&Packet { number: 1, body: ask })).expect("written");
    answer_on(stream)
}

fn answer_on(stream: &mut TcpStream) -> Answer {
    let mut envelope = [0; ENVELOPE_BYTES];
    stream.read_exact(&mut envelope).expect("an answer");
    let bytes = walferry_cluster::control::body_bytes(&envelope).expect("an answer of a member");
    let mut body = vec![0; bytes];
    stream.read_exact(&mut body).expect("all of it");
    serde_json::from_slice::<Packet<Answer>>(&body).expect("an answer").body
}

#[test]
fn first_node_makes_the_secret_that_others_are_given() {
    let root = directory();
    let leader = Node::start(root.path(), "a", &["--peer-auth", "secret"]);
    let file = leader.data.join("peer.secret");
    let mode = std::fs::metadata(&file).expect("a secret").permissions().mode() & 0o777;
    assert_eq!(mode, 0o600, "its owner's alone");
    let follow = leader.peer_listen.to_string();
    let data = root.path().join("b").display().to_string();
    let begin = ["start", "--data", &data, "--name", "b", "--listen", "127.0.0.1:0", "--peer-listen", "127.0.0.1:0"];
    let without = run(&[&begin[..], &["--follow", &follow]].concat());
    assert_eq!(without.0, Some(2), "{}", without.1);
    assert!(without.1.contains("--peer-secret FILE") && without.1.contains("walferry secret"), "{}", without.1);
    assert!(!root.path().join("b").exists(), "a start that is refused makes nothing");
    let given = file.display().to_string();
    let replica = Node::start(root.path(), "b", &["--follow", &follow, "--peer-secret", &given]);
    set(&leader, "k", "v");
    until("the replica has it", || replica.client().command(&["GET", "k"]) == Reply::Bulk("v".into()));
}

/// As when the commands of the README are pasted.
#[test]
fn replica_that_starts_before_the_secret_exists_waits() {
    let root = directory();
    let file = root.path().join("a/peer.secret");
    let given = file.display().to_string();
    let (path, listen) = (root.path().to_owned(), free_address().to_string());
    let follow = listen.clone();
    let replica = std::thread::spawn(move || Node::start(&path, "b", &["--follow", &follow, "--peer-secret", &given]));
    until("it waits", || {
        let log = std::fs::read_to_string(root.path().join("b.log")).unwrap_or_default();
        log.contains("waiting up to 5s for the peer secret")
    });
    let leader = Node::start(root.path(), "a", &["--peer-listen", &listen, "--peer-auth", "secret"]);
    let replica = replica.join().expect("it starts");
    set(&leader, "k", "v");
    until("the replica has it", || replica.client().command(&["GET", "k"]) == Reply::Bulk("v".into()));
}

#[test]
fn another_secret_is_refused_and_told_at_both_ends() {
    let root = directory();
    let (ours, theirs) = (secret(root.path(), "ours"), secret(root.path(), "theirs"));
    let (ours, theirs) = (ours.display().to_string(), theirs.display().to_string());
    let leader = Node::start(root.path(), "a", &["--peer-secret", &ours]);
    let follow = leader.peer_listen.to_string();
    let replica = Node::start(root.path(), "b", &["--follow", &follow, "--peer-secret", &theirs]);
    let told = |name: &str| std::fs::read_to_string(root.path().join(format!("{name}.log"))).unwrap_or_default();
    until("both say so", || {
        told("a").contains("b holds another peer secret") && told("b").contains("does not take this node's peer secret")
    });
    assert_eq!(replicas(&mut leader.client()), "0");
    drop(replica);
}

#[test]
fn node_that_proves_nothing_is_told_what_to_do() {
    let root = directory();
    let leader = Node::start(root.path(), "a", &[]);
    let follow = leader.peer_listen.to_string();
    let _replica = Node::start(root.path(), "b", &["--follow", &follow, "--peer-auth", "none"]);
    until("the replica says what it was told", || {
        let log = std::fs::read_to_string(root.path().join("b.log")).unwrap_or_default();
        log.contains("this node's peers prove a secret") && log.contains("--peer-secret FILE")
    });
}

#[test]
fn no_secret_beyond_loopback_is_refused() {
    let root = directory();
    let data = root.path().join("a").display().to_string();
    let begin = ["start", "--data", &data, "--name", "a", "--listen", "127.0.0.1:0", "--peer-auth", "none"];
    let (code, text) = run(&[&begin[..], &["--peer-listen", "0.0.0.0:0"]].concat());
    assert_eq!(code, Some(2), "{text}");
    assert!(text.contains("peer_auth = none") && text.contains("peer_secret"), "{text}");
}

#[test]
fn name_is_the_one_that_was_proved() {
    let root = directory();
    let file = secret(root.path(), "peer.secret");
    let flags = ["--peer-secret", &file.display().to_string()];
    let leader = Node::start(root.path(), "a", &flags);
    let mut stream = proved(leader.peer_listen, "x", &file);
    let mut bytes = Vec::new();
    Message::Hello(hello("b")).encode(&mut bytes);
    stream.write_all(&bytes).expect("written");
    let mut told = Vec::new();
    stream.read_to_end(&mut told).expect("a refusal and an end");
    assert!(String::from_utf8_lossy(&told).contains("x says that it is b"), "{}", told.escape_ascii());
}

/// What an unauthenticated host did to a cluster before peers had to prove anything: it moved it with one message.
#[test]
fn unidentified_peers_change_nothing_under_load() {
    let cluster = Cluster::start(&["a", "b", "c"], &[]);
    let leader = cluster.leader();
    let before = epoch(&cluster);
    let file = cluster.root.path().join("peer.secret");
    let asks = || {
        let heartbeat = LeaseHeartbeat {
            epoch: Epoch(1 << 30),
            leader: leader.parse().expect("a name"),
            id: MemberId(7),
            client_address: "10.0.0.9:6379".to_owned(),
            end: Lsn::ZERO,
        };
        [
            Ask::Fence(Epoch(u64::MAX), MemberId(7)),
            Ask::Fence(Epoch(1 << 30), MemberId(7)),
            Ask::LeaseHeartbeat(heartbeat),
            Ask::AllowUnclean,
        ]
    };
    let load = Load::start(&cluster, "remote_flush");
    load.wait_for(100);
    for name in ["a", "b", "c"] {
        let address: SocketAddr = cluster.peer_address(name).parse().expect("an address");
        for ask in asks() {
            // One who holds nothing is not heard.
            let mut stream = TcpStream::connect(address).expect("a connection");
            stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
            stream.write_all(&encode(&Packet { number: 1, body: ask.clone() })).expect("written");
            let mut told = Vec::new();
            let _ = stream.read_to_end(&mut told);
            assert!(String::from_utf8_lossy(&told).contains("peers prove a secret"), "{}", told.escape_ascii());
            // One who holds the secret speaks for itself, and is no member.
            let answer = asked(&mut proved(address, "x", &file), ask);
            assert!(matches!(answer, Answer::Refused(_)), "{answer:?}");
        }
    }
    load.wait_for(200);
    let (acknowledged, _) = load.finish();
    assert_eq!((cluster.leader(), epoch(&cluster)), (leader, before), "nothing moved");
    let lost = missing(&mut cluster.client(leader), &acknowledged);
    assert!(lost.is_empty(), "{} of {} are lost", lost.len(), acknowledged.len());
}

/// For how long the next test lets unidentified peers try; a minute shows more.
const UNIDENTIFIED_VARIABLE: &str = "WALFERRY_UNIDENTIFIED_SECONDS";
const UNIDENTIFIED_SECONDS: u64 = 5;
/// More than a gate has places for.
const SILENT_PEERS: usize = 300;

/// A part of the register's state for which there would have to be 35 TB, to the incarnation `to`.
fn huge_part(number: u64, to: u64) -> Vec<u8> {
    let vote = json!({ "leader_id": { "term": 9, "node_id": 7 }, "committed": true });
    let meta = json!({ "last_log_id": null, "last_membership": { "log_id": null, "membership": { "configs": [], "nodes": {} } },
        "snapshot_id": "s" });
    let part = json!({ "vote": vote, "meta": meta, "offset": 35_u64 << 40, "data": [1], "done": false });
    let body = json!({ "number": number, "body": { "consensus": [to, { "snapshot": part }] } });
    let body = body.to_string().into_bytes();
    let mut bytes = encode(&Packet { number, body: Ask::AllowUnclean });
    bytes.truncate(ENVELOPE_BYTES);
    bytes[..4].copy_from_slice(&(body.len() as u32).to_le_bytes());
    bytes.extend(body);
    bytes
}

/// What somebody says who holds nothing, by number.
fn unidentified_bytes(number: u64) -> Vec<u8> {
    let packet = |ask| encode(&Packet { number, body: ask });
    let mut state = ClusterState { version: 1 << 40, epoch: Epoch(u64::MAX), ..ClusterState::default() };
    state.leader = Some("x".parse().expect("a name"));
    match number % 8 {
        0 => packet(Ask::Change(Box::new(Change { state }))),
        1 => packet(Ask::Fence(Epoch(u64::MAX), MemberId(number))),
        2 => huge_part(number, number),
        3 => {
            let mut bytes = Vec::new();
            Message::Hello(Hello { history: vec![(Epoch(u64::MAX), Lsn::ZERO)], ..hello("b") }).encode(&mut bytes);
            bytes
        }
        // A proof that is none, and one that is begun only.
        4 => [b"WFPA\x01\x01\0\0".as_slice(), &[7; 41], &[7; 32]].concat(),
        5 => b"WFPA".to_vec(),
        6 => vec![0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3],
        _ => (0..200_u64).map(|at| (number.wrapping_mul(at + 1) >> 3) as u8).collect(),
    }
}

/// The p99 of commits at `remote_flush` until `over` says that it is enough.
fn p99_until(address: SocketAddr, mut over: impl FnMut() -> bool) -> Duration {
    let mut client = Client::connect(address).expect("a connection");
    assert_eq!(client.command(&["COMMITLEVEL", "remote_flush"]), Reply::Simple("OK".to_owned()));
    let mut took = Vec::new();
    while !over() {
        let began = Instant::now();
        assert_eq!(client.command(&["SET", "measured", "v"]), Reply::Simple("OK".to_owned()));
        took.push(began.elapsed());
    }
    took.sort_unstable();
    took[took.len() * 99 / 100]
}

#[test]
fn unidentified_peers_at_once_keep_nobody_out() {
    let seconds =
        std::env::var(UNIDENTIFIED_VARIABLE).map_or(UNIDENTIFIED_SECONDS, |text| text.parse().expect("seconds"));
    let lasts = Duration::from_secs(seconds);
    let mut cluster = Cluster::start(&["a", "b", "c"], &[]);
    let (leader, replica) = (cluster.leader(), cluster.replica());
    let before = epoch(&cluster);
    let load = Load::start(&cluster, "remote_flush");
    load.wait_for(100);
    let leader_clients = cluster.client_address(leader);
    let began = Instant::now();
    let quiet = p99_until(leader_clients, || began.elapsed() > lasts.min(Duration::from_secs(5)));

    let addresses: Vec<SocketAddr> =
        ["a", "b", "c"].iter().map(|name| cluster.peer_address(name).parse().expect("an address")).collect();
    let stop = Arc::new(AtomicBool::new(false));
    let said = Arc::new(AtomicU64::new(0));
    let unidentified: Vec<_> = (0..3)
        .map(|one| {
            let (addresses, stop, said) = (addresses.clone(), Arc::clone(&stop), Arc::clone(&said));
            std::thread::spawn(move || {
                let mut silent = VecDeque::new();
                while !stop.load(Ordering::Relaxed) {
                    let number = said.fetch_add(1, Ordering::Relaxed);
                    // One who is not let in any more has said enough as well.
                    let Ok(mut stream) = TcpStream::connect(addresses[one]) else { continue };
                    let _ = stream.write_all(&unidentified_bytes(number));
                    silent.push_back(stream);
                    if silent.len() > SILENT_PEERS {
                        silent.pop_front();
                    }
                }
            })
        })
        .collect();
    // A member that was away comes back meanwhile.
    cluster.kill(replica);
    cluster.bring(replica);
    let began = Instant::now();
    let beside = p99_until(leader_clients, || began.elapsed() > lasts);
    let in_sync = || cluster.describe(leader)["in_sync"].to_string().contains(&format!("\"{replica}\""));
    until("the member is back in the in-sync set", in_sync);
    stop.store(true, Ordering::Relaxed);
    unidentified.into_iter().for_each(|unidentified| unidentified.join().expect("it has nothing to check"));
    let said = said.load(Ordering::Relaxed);
    println!("{said} connections of unidentified peers; p99 of commits {quiet:?} without them, {beside:?} beside them");
    assert!(said > 100, "they were there");
    load.wait_for(100);
    let (acknowledged, _) = load.finish();
    assert_eq!((cluster.leader(), epoch(&cluster)), (leader, before), "nothing moved");
    let lost = missing(&mut cluster.client(leader), &acknowledged);
    assert!(lost.is_empty(), "{} of {} are lost", lost.len(), acknowledged.len());
}

#[test]
fn another_node_at_a_members_address_is_not_asked() {
    let mut cluster = Cluster::start(&["a", "b", "c"], &[]);
    let (leader, away) = (cluster.leader(), cluster.replica());
    let file = cluster.root.path().join("peer.secret").display().to_string();
    let address = cluster.peer_address(away);
    cluster.kill(away);
    let root = directory();
    let _other = Node::start(root.path(), "x", &["--peer-listen", &address, "--peer-secret", &file]);
    let said = format!("x is at {address}, where {away} should be");
    until("the leader says so", || cluster.log_of(leader).contains(&said));
    assert_eq!(cluster.client(leader).command(&["SET", "k", "v"]), Reply::Simple("OK".to_owned()));
}

#[test]
fn part_of_the_register_beyond_its_bound_is_refused() {
    let cluster = Cluster::start(&["a", "b", "c"], &[]);
    let (leader, before) = (cluster.leader(), epoch(&cluster));
    let file = cluster.root.path().join("peer.secret");
    for name in ["a", "b", "c"] {
        let address: SocketAddr = cluster.peer_address(name).parse().expect("an address");
        let greeting = |answer| match answer {
            Answer::Greeting(greeting) => greeting.id,
            Answer::Unidentified(said) => said.member.id,
            other => panic!("{other:?}"),
        };
        let mut stream = proved(address, "x", &file);
        let id = greeting(asked(&mut stream, Ask::Greet(unidentified())));
        stream.write_all(&huge_part(1, id.0)).expect("written");
        let answer = answer_on(&mut stream);
        assert!(matches!(&answer, Answer::Refused(text) if text.contains("at most")), "{answer:?}");
    }
    assert_eq!((cluster.leader(), epoch(&cluster)), (leader, before), "nothing moved");
}

fn unidentified() -> Greeting {
    Greeting {
        name: "x".parse().expect("a name"),
        id: MemberId(7),
        kind: Kind::Data,
        formed: true,
        votes: false,
        cluster_id: None,
        members: Vec::new(),
        client_address: String::new(),
        policy: String::new(),
        removed: None,
    }
}

fn hello(name: &str) -> Hello {
    Hello {
        protocol: PROTOCOL_VERSION,
        cluster_id: None,
        name: name.parse().expect("a name"),
        client_address: String::new(),
        flushed: Lsn::ZERO,
        segment_bytes: 16 << 20,
        crc: 0,
        member: MemberId(0),
        gives_up: Epoch(0),
        history: Vec::new(),
    }
}
