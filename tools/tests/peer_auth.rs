//! Who may speak to a peer port: nodes that prove the secret, under the name that they proved, and nobody else.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use walferry_cluster::control::{Answer, Ask, Beat, Packet, encode};
use walferry_cluster::message::{ENVELOPE_BYTES, Hello, Message, PROTOCOL_VERSION};
use walferry_cluster::register::MemberId;
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
    stream.write_all(&encode(&Packet { number: 1, body: ask })).expect("room");
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
    let hello = Hello {
        protocol: PROTOCOL_VERSION,
        cluster_id: None,
        name: "b".parse().expect("a name"),
        client_address: String::new(),
        flushed: Lsn::ZERO,
        segment_bytes: 16 << 20,
        crc: 0,
        member: MemberId(0),
        gives_up: Epoch(0),
        history: Vec::new(),
    };
    let mut bytes = Vec::new();
    Message::Hello(hello).encode(&mut bytes);
    stream.write_all(&bytes).expect("room");
    let mut told = Vec::new();
    stream.read_to_end(&mut told).expect("a refusal and an end");
    assert!(String::from_utf8_lossy(&told).contains("x says that it is b"), "{}", told.escape_ascii());
}

/// What an unauthenticated host did to a cluster before peers had to prove anything: it moved it with one message.
#[test]
fn strangers_move_nothing_in_a_cluster_under_load() {
    let cluster = Cluster::start(&["a", "b", "c"], &[]);
    let leader = cluster.leader();
    let before = epoch(&cluster);
    let file = cluster.root.path().join("peer.secret");
    let asks = || {
        let beat = Beat {
            epoch: Epoch(1 << 30),
            leader: leader.parse().expect("a name"),
            id: MemberId(7),
            client_address: "10.0.0.9:6379".to_owned(),
            end: Lsn::ZERO,
        };
        [
            Ask::Seal(Epoch(u64::MAX), MemberId(7)),
            Ask::Seal(Epoch(1 << 30), MemberId(7)),
            Ask::Beat(beat),
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
            stream.write_all(&encode(&Packet { number: 1, body: ask.clone() })).expect("room");
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
