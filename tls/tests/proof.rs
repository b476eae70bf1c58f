//! Gates that ask for the peer secret, both ends in this process: who holds it comes through under its own name, and nobody else.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use walferry_tls::{
    Accepted, Answers, Gate, GateConfig, GateTls, Identity, NamedFile, PeerLinks, PeerSecret, Purpose, Secrets,
    Terminator,
};

#[path = "common/certificates.rs"]
mod certificates;
use certificates::{Authority, Signed};

const PATIENCE: Duration = Duration::from_secs(30);
const UNPROVED_ANSWER: &[u8] = b"prove the secret";

fn secret_file(dir: &Path, name: &str) -> PathBuf {
    let file = dir.join(name);
    Secrets::create(&file).expect("a secret");
    file
}

fn secret(own_name: &str, file: &Path) -> Arc<PeerSecret> {
    Arc::new(PeerSecret::load(own_name, file).expect("a secret"))
}

fn identity(own: &Signed, ca: &Authority) -> Arc<Identity> {
    let purpose = Purpose::Peers { ca: NamedFile::new("tls_ca", &ca.ca) };
    let (certificate, key) = (NamedFile::new("tls_cert", &own.certificate), NamedFile::new("tls_key", &own.key));
    Arc::new(Identity::load(certificate, key, purpose).expect("an identity"))
}

fn open(tls: Option<GateTls>, secret: Arc<PeerSecret>) -> (Gate, Receiver<Accepted>) {
    let (outbox, accepted) = channel();
    let config = GateConfig {
        option: "peer_listen",
        tls,
        secret: Some(secret),
        answers: Answers { unproved: UNPROVED_ANSWER.to_vec(), ..Answers::default() },
        deliver: Box::new(move |one| outbox.send(one).expect("the test waits")),
    };
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    (Gate::start(listener, config).expect("a gate"), accepted)
}

fn dial(gate: &Gate, links: &PeerLinks) -> std::io::Result<walferry_tls::Secured> {
    let address = gate.address();
    links.secure(TcpStream::connect(address)?, &address.to_string(), PATIENCE)
}

fn unidentified(gate: &Gate) -> TcpStream {
    let stream = TcpStream::connect(gate.address()).expect("a connection");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream
}

/// What the link carries, both ways.
fn carries(mut ours: TcpStream, accepted: Accepted) {
    let mut theirs = TcpStream::from(accepted.socket);
    for end in [&ours, &theirs] {
        end.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    }
    ours.write_all(b"hello").expect("written");
    theirs.write_all(b"welcome").expect("written");
    let (mut heard, mut answer) = ([0; 5], [0; 7]);
    theirs.read_exact(&mut heard).expect("a word");
    ours.read_exact(&mut answer).expect("an answer");
    assert_eq!((&heard, &answer), (b"hello", b"welcome"));
}

#[test]
fn holder_of_the_secret_comes_through_under_its_name() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = secret_file(dir.path(), "peer.secret");
    let (gate, accepted) = open(None, secret("a", &file));
    let secured = dial(&gate, &PeerLinks::plain().with_secret(secret("b", &file))).expect("a link");
    let through = accepted.recv_timeout(PATIENCE).expect("a connection");
    assert_eq!((secured.names, through.names.clone()), (Some(vec!["a".to_owned()]), Some(vec!["b".to_owned()])));
    carries(secured.stream, through);
}

#[test]
fn secret_is_proved_behind_tls_as_well() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = secret_file(dir.path(), "peer.secret");
    let ca = Authority::new(dir.path(), "cluster");
    let (a, b) = (ca.sign("a", &["127.0.0.1"]), ca.sign("b", &["b.example"]));
    let tls = GateTls { identity: identity(&a, &ca), terminator: Terminator::new(true) };
    let (gate, accepted) = open(Some(tls), secret("a", &file));
    let links = PeerLinks::plain().with_tls(identity(&b, &ca), Terminator::new(true));
    let error = dial(&gate, &links).map(|secured| (&secured.stream).read(&mut [0]));
    let refused = !matches!(error, Ok(Ok(1..)));
    assert!(refused && accepted.try_recv().is_err(), "a certificate alone is not enough where a secret is asked for");
    let secured = dial(&gate, &links.with_secret(secret("b", &file))).expect("a link");
    let through = accepted.recv_timeout(PATIENCE).expect("a connection");
    assert_eq!(through.names.clone(), Some(vec!["b".to_owned()]));
    carries(secured.stream, through);
}

#[test]
fn another_secret_is_refused_and_both_ends_say_so() {
    let dir = tempfile::tempdir().expect("a directory");
    let (ours, theirs) = (secret_file(dir.path(), "ours"), secret_file(dir.path(), "theirs"));
    let (gate, accepted) = open(None, secret("a", &ours));
    let error = dial(&gate, &PeerLinks::plain().with_secret(secret("b", &theirs))).expect_err("refused").to_string();
    assert!(error.contains("peer secret") && error.contains("--peer-secret"), "{error}");
    assert!(accepted.try_recv().is_err());
}

#[test]
fn unidentified_peer_is_asked_for_proof_and_gets_nothing_else() {
    let dir = tempfile::tempdir().expect("a directory");
    let (gate, accepted) = open(None, secret("a", &secret_file(dir.path(), "peer.secret")));
    for said in [b"*1\r\n$4\r\nPING\r\n".as_slice(), b"GET / HTTP/1.1\r\n\r\n", &[60, 0, 0, 0, 1, 0, 0, 0]] {
        let mut stream = unidentified(&gate);
        stream.write_all(said).expect("written");
        let mut told = Vec::new();
        stream.read_to_end(&mut told).expect("an end");
        assert_eq!(told, UNPROVED_ANSWER, "to {:?}", said.escape_ascii().to_string());
    }
    assert!(accepted.try_recv().is_err());
}

#[test]
fn silent_unidentified_peers_keep_nobody_out() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = secret_file(dir.path(), "peer.secret");
    let (gate, accepted) = open(None, secret("a", &file));
    // More than the gate holds; half of them have begun to knock.
    let silent: Vec<TcpStream> = (0..300).map(|_| unidentified(&gate)).collect();
    for stream in silent.iter().step_by(2) {
        let _ = (&*stream).write_all(b"WFPA");
    }
    let began = Instant::now();
    dial(&gate, &PeerLinks::plain().with_secret(secret("b", &file))).expect("a link");
    accepted.recv_timeout(PATIENCE).expect("a connection");
    assert!(began.elapsed() < Duration::from_secs(20), "the oldest give way");
    drop(silent);
}

#[test]
fn secret_is_replaced_without_a_pause() {
    let dir = tempfile::tempdir().expect("a directory");
    let (old, new) = (secret_file(dir.path(), "old"), secret_file(dir.path(), "new"));
    let (old, new) = (std::fs::read_to_string(old).expect("read"), std::fs::read_to_string(new).expect("read"));
    let files = ["a", "b"].map(|name| secret_file(dir.path(), name));
    let set = |file: &Path, text: String| std::fs::write(file, text).expect("written");
    files.iter().for_each(|file| set(file, old.clone()));
    let (a, b) = (secret("a", &files[0]), secret("b", &files[1]));
    let (gate, accepted) = open(None, Arc::clone(&a));
    let links = PeerLinks::plain().with_secret(Arc::clone(&b));
    for (ours, theirs) in [
        (old.clone(), old.clone() + &new),
        (old.clone() + &new, old.clone() + &new),
        (new.clone() + &old, old.clone() + &new),
        (new.clone() + &old, new.clone() + &old),
        (new.clone(), new.clone() + &old),
        (new.clone(), new.clone()),
    ] {
        set(&files[0], ours);
        set(&files[1], theirs);
        a.reload();
        b.reload();
        dial(&gate, &links).expect("a link at each step");
        accepted.recv_timeout(PATIENCE).expect("a connection");
    }
    set(&files[1], old);
    b.reload();
    dial(&gate, &links).expect_err("the old one is out");
}
