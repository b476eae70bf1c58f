//! Links over TLS, both ends in this process: what goes in comes out, ends are passed on, and who does not belong is told why.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use walferry_tls::{
    Accepted, Answers, Gate, GateConfig, GateTls, Identity, NamedFile, PeerLinks, Protection, Purpose, Secured,
    Terminator,
};

#[path = "common/certificates.rs"]
mod certificates;
use certificates::{Authority, Signed, replace};

const PATIENCE: Duration = Duration::from_secs(30);
const PLAIN_ANSWER: &[u8] = b"-ERR speak TLS\r\n";

fn peer_identity(own: &Signed, ca: &Authority) -> Arc<Identity> {
    let purpose = Purpose::Peers { ca: NamedFile::new("tls_ca", &ca.ca) };
    let (certificate, key) = (NamedFile::new("tls_cert", &own.certificate), NamedFile::new("tls_key", &own.key));
    Arc::new(Identity::load(certificate, key, purpose).expect("an identity"))
}

struct Side {
    gate: Gate,
    accepted: Receiver<Accepted>,
    terminator: Arc<Terminator>,
}

impl Side {
    fn open(identity: Arc<Identity>) -> Side {
        let terminator = Terminator::new(true);
        let (outbox, accepted) = channel();
        let config = GateConfig {
            option: "peer_listen",
            tls: Some(GateTls { identity, terminator: Arc::clone(&terminator) }),
            secret: None,
            answers: Answers { plain: PLAIN_ANSWER.to_vec(), ..Answers::default() },
            deliver: Box::new(move |one| outbox.send(one).expect("the test waits")),
        };
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        Side { gate: Gate::start(listener, config).expect("a gate"), accepted, terminator }
    }

    fn dial(&self, tls: &PeerLinks) -> std::io::Result<Secured> {
        let address = self.gate.address();
        tls.secure(TcpStream::connect(address)?, &address.to_string(), PATIENCE)
    }

    fn accept(&self) -> TcpStream {
        stream(self.accepted.recv_timeout(PATIENCE).expect("a connection").socket)
    }
}

fn stream(socket: OwnedFd) -> TcpStream {
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream
}

struct Pair {
    _dir: tempfile::TempDir,
    side: Side,
    tls: PeerLinks,
}

fn pair() -> Pair {
    let dir = tempfile::tempdir().expect("a directory");
    let ca = Authority::new(dir.path(), "cluster");
    let (a, b) = (ca.sign("a", &["127.0.0.1"]), ca.sign("b", &["b.example"]));
    let side = Side::open(peer_identity(&a, &ca));
    let tls = PeerLinks::plain().with_tls(peer_identity(&b, &ca), Terminator::new(true));
    Pair { _dir: dir, side, tls }
}

fn connected(pair: &Pair) -> (TcpStream, TcpStream) {
    let secured = pair.side.dial(&pair.tls).expect("a link");
    secured.stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    (secured.stream, pair.side.accept())
}

#[test]
fn bytes_go_both_ways_at_once_and_ends_are_passed_on() {
    const BYTES: usize = 24 << 20;
    let pair = pair();
    let (ours, theirs) = connected(&pair);
    let pattern = |seed: usize| (0..BYTES).map(move |at| (at * 31 + at / 4096 + seed) as u8);
    let ends = [(ours, 1, 2), (theirs, 2, 1)].map(|(stream, says, hears)| {
        let mut writing = stream.try_clone().expect("another descriptor");
        let writer = std::thread::spawn(move || {
            writing.write_all(&pattern(says).collect::<Vec<u8>>()).expect("written in time");
            writing.shutdown(Shutdown::Write).expect("an end");
        });
        let reader = std::thread::spawn(move || {
            let (mut stream, mut got) = (stream, Vec::new());
            stream.read_to_end(&mut got).expect("all of it");
            assert!(got.iter().copied().eq(pattern(hears)), "{} bytes came", got.len());
        });
        [writer, reader]
    });
    ends.into_iter().flatten().for_each(|thread| thread.join().expect("no panic"));
}

#[test]
fn last_message_arrives_before_the_socket_closes() {
    let pair = pair();
    let (mut ours, mut theirs) = connected(&pair);
    ours.write_all(&[7; 100_000]).expect("written");
    drop(ours);
    let mut got = Vec::new();
    theirs.read_to_end(&mut got).expect("all of it");
    assert_eq!(got, [7; 100_000]);
}

#[test]
fn a_side_that_does_not_read_holds_the_other_back() {
    let pair = pair();
    let (mut ours, theirs) = connected(&pair);
    ours.set_write_timeout(Some(Duration::from_millis(300))).expect("a timeout");
    let mut sent = 0;
    let full = loop {
        match ours.write(&[0; 64 << 10]) {
            Ok(bytes) => sent += bytes,
            Err(error) => break error,
        }
        assert!(sent < 256 << 20, "nobody reads, and {sent} bytes were taken");
    };
    assert_eq!(full.kind(), std::io::ErrorKind::WouldBlock);
    drop(theirs);
    let mut rest = [0; 16];
    ours.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    assert!(matches!(ours.read(&mut rest), Ok(0) | Err(_)), "the end of the other side is heard although it is full");
}

#[test]
fn another_ca_is_refused_with_a_reason_on_both_sides() {
    let dir = tempfile::tempdir().expect("a directory");
    let (ca, other) = (Authority::new(dir.path(), "cluster"), Authority::new(dir.path(), "other"));
    let side = Side::open(peer_identity(&ca.sign("a", &["127.0.0.1"]), &ca));
    // It believes the server, the server does not believe it.
    let foreign = peer_identity(&other.sign("b", &["b.example"]), &ca);
    let error =
        side.dial(&PeerLinks::plain().with_tls(foreign, Terminator::new(true))).expect_err("a refusal").to_string();
    assert!(error.contains("peer_tls") && error.contains("does not know its CA"), "{error}");
    // The other way round.
    let distrustful = peer_identity(&ca.sign("b", &["b.example"]), &other);
    let error =
        side.dial(&PeerLinks::plain().with_tls(distrustful, Terminator::new(true))).expect_err("a refusal").to_string();
    assert!(error.contains("not signed by a CA that this side knows"), "{error}");
    let failed = || side.terminator.counts().failed.load(Ordering::Relaxed);
    let deadline = std::time::Instant::now() + PATIENCE;
    while failed() < 2 {
        assert!(std::time::Instant::now() < deadline, "both are counted");
        std::thread::yield_now();
    }
    assert!(side.accepted.try_recv().is_err());
}

#[test]
fn a_certificate_for_another_host_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let ca = Authority::new(dir.path(), "cluster");
    let side = Side::open(peer_identity(&ca.sign("a", &["a.example"]), &ca));
    let tls = PeerLinks::plain().with_tls(peer_identity(&ca.sign("b", &["b.example"]), &ca), Terminator::new(true));
    let error = side.dial(&tls).expect_err("a refusal").to_string();
    assert!(error.contains("other names than the one that was dialled") && error.contains("a.example"), "{error}");
}

#[test]
fn who_does_not_speak_tls_is_answered_in_plain_words() {
    let pair = pair();
    let mut plain = TcpStream::connect(pair.side.gate.address()).expect("a connection");
    plain.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    plain.write_all(b"*1\r\n$4\r\nPING\r\n").expect("written");
    let mut answer = Vec::new();
    plain.read_to_end(&mut answer).expect("an answer and an end");
    assert_eq!(answer, PLAIN_ANSWER);
    // The other way round: a node that dials somebody who speaks another protocol.
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let answering = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a connection");
        stream.write_all(b"-ERR what is that\r\n").expect("written");
        stream
    });
    let error = pair.tls.secure(TcpStream::connect(address).expect("a connection"), &address.to_string(), PATIENCE);
    let error = error.expect_err("no TLS").to_string();
    assert!(error.contains("does not speak TLS") && error.contains("-ERR what is that"), "{error}");
    drop(answering.join());
}

#[test]
fn silent_connections_do_not_keep_others_out() {
    let pair = pair();
    let silent: Vec<TcpStream> =
        (0..600).map(|_| TcpStream::connect(pair.side.gate.address()).expect("a connection")).collect();
    let (mut ours, mut theirs) = connected(&pair);
    ours.write_all(b"x").expect("written");
    theirs.read_exact(&mut [0]).expect("a byte");
    drop(silent);
}

#[test]
fn new_files_are_used_and_bad_ones_are_not() {
    let dir = tempfile::tempdir().expect("a directory");
    let (ca, other) = (Authority::new(dir.path(), "cluster"), Authority::new(dir.path(), "other"));
    let own = ca.sign("a", &["127.0.0.1"]);
    let identity = peer_identity(&own, &ca);
    let side = Side::open(Arc::clone(&identity));
    let tls = PeerLinks::plain().with_tls(peer_identity(&ca.sign("b", &["b.example"]), &ca), Terminator::new(true));
    side.dial(&tls).expect("a link");
    replace(&own.certificate, "not a certificate");
    assert!(matches!(identity.reload(), walferry_tls::Reloaded::Kept(_)));
    side.dial(&tls).expect("the old certificate still serves");
    other.sign("a", &["127.0.0.1"]);
    assert!(matches!(identity.reload(), walferry_tls::Reloaded::New));
    let error = side.dial(&tls).expect_err("it is another's now").to_string();
    assert!(error.contains("UnknownIssuer"), "{error}");
}

#[test]
fn wrong_files_are_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let ca = Authority::new(dir.path(), "cluster");
    let (a, b) = (ca.sign("a", &["127.0.0.1"]), ca.sign("b", &["127.0.0.1"]));
    let load = |certificate, key, ca| {
        let purpose = Purpose::Clients { ca: Some(NamedFile::new("tls_ca", ca)) };
        let identity = Identity::load(NamedFile::new("tls_cert", certificate), NamedFile::new("tls_key", key), purpose);
        identity.expect_err("wrong files").to_string()
    };
    let missing = dir.path().join("missing.pem");
    assert!(
        load(&missing, &a.key, &ca.ca).contains("tls_cert = ") && load(&missing, &a.key, &ca.ca).contains("No such")
    );
    assert!(load(&a.certificate, &a.certificate, &ca.ca).contains("holds no private key"));
    assert!(load(&a.key, &a.key, &ca.ca).contains("holds no certificate"));
    let misfit = load(&a.certificate, &b.key, &ca.ca);
    assert!(
        misfit.contains("tls_cert = ") && misfit.contains("tls_key = ") && misfit.contains("KeyMismatch"),
        "{misfit}"
    );
    assert!(load(&a.certificate, &a.key, &a.key).contains("tls_ca = "));
}

#[test]
fn a_link_says_how_it_is_protected() {
    let pair = pair();
    let secured = pair.side.dial(&pair.tls).expect("a link");
    let accepted = pair.side.accepted.recv_timeout(PATIENCE).expect("a connection");
    let local: SocketAddr = accepted.address;
    assert_eq!(local.ip().to_string(), "127.0.0.1", "the peer's own address, whatever the socket is");
    for (fd, protection) in
        [(secured.stream.as_raw_fd(), secured.protection), (accepted.socket.as_raw_fd(), accepted.protection)]
    {
        let mut domain: libc::c_int = 0;
        let mut length = size_of::<libc::c_int>() as libc::socklen_t;
        // SAFETY: both point to variables of the sizes that are told.
        let asked = unsafe {
            libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_DOMAIN, (&raw mut domain).cast(), &raw mut length)
        };
        assert_eq!(asked, 0);
        assert_eq!(domain == libc::AF_INET, protection == Some(Protection::Kernel));
        println!("this kernel: {protection:?}");
    }
}
