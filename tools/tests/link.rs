//! An emulated distance as its users meet it: bytes take the time that was asked, cuts hold, changes work while it runs.

mod common;

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{Link, Node, PATIENCE, Reply, directory, until, wait_applied};

const MS: Duration = Duration::from_millis(1);

/// Echoes everything that any connection sends, until the test ends.
fn echo_server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("its address");
    std::thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            std::thread::spawn(move || {
                socket.set_nodelay(true).expect("a socket takes it");
                let _ = std::io::copy(&mut &socket, &mut &socket);
                let _ = socket.shutdown(Shutdown::Write);
            });
        }
    });
    address
}

fn connect(link: &Link) -> TcpStream {
    let address: SocketAddr = link.printed("listens on ").parse().expect("an address");
    let socket = TcpStream::connect(address).expect("the link listens");
    socket.set_nodelay(true).expect("a socket takes it");
    socket.set_read_timeout(Some(PATIENCE)).expect("a socket takes it");
    socket
}

/// One byte there and back.
fn exchange(socket: &mut TcpStream) -> Duration {
    let began = Instant::now();
    socket.write_all(b"x").expect("the link takes a byte");
    socket.read_exact(&mut [0]).expect("the byte comes back");
    began.elapsed()
}

#[test]
fn proxied_bytes_take_the_round_trip_that_is_set() {
    let root = directory();
    let target = echo_server().to_string();
    let link = Link::try_start(root.path(), &["--rtt", "40ms", "--to", &target]).expect("a proxy needs nothing");
    let mut socket = connect(&link);
    for _ in 0..5 {
        assert!(exchange(&mut socket) >= 40 * MS);
    }
    let measured: f64 = link.printed("measured round trip ").split(' ').next().unwrap().parse().unwrap();
    assert!(measured >= 40.0, "{measured} ms");

    assert!(link.ask(&["set", "rtt=0"]).expect("it runs").contains("rtt=0s"));
    let fastest = (0..20).map(|_| exchange(&mut socket)).min().unwrap();
    assert!(fastest < 40 * MS, "{fastest:?} after the distance is gone");
    let error = link.ask(&["set", "rtt=1"]).unwrap_err();
    assert!(error.contains("such as 100us"), "{error}");
    assert_eq!(link.stop(), Some(0));
    assert!(!root.path().join("link.sock").exists(), "the control socket goes with the link");
}

#[test]
fn control_socket_stands_in_a_directory_of_its_user() {
    let root = directory();
    let target = echo_server().to_string();
    let link = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_walferry"));
        command.arg("link").args(arguments).env("TMPDIR", root.path()).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    };
    // SAFETY: it asks for a number.
    let own = root.path().join(format!("walferry-link-{}", unsafe { libc::geteuid() }));
    // Others can make links in the directory for temporary files; what they lead to is not used.
    let elsewhere = root.path().join("elsewhere");
    std::fs::create_dir(&elsewhere).expect("a directory");
    std::os::unix::fs::symlink(&elsewhere, &own).expect("a link");
    for arguments in [&["--to", &target][..], &["status"]] {
        let output = link(arguments).output().expect("the binary starts");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && error.contains("has to be a directory of this user alone"), "{error}");
    }
    assert_eq!(std::fs::read_dir(&elsewhere).expect("it is there").count(), 0);
    std::fs::remove_file(&own).expect("our link");

    let mut running = link(&["--to", &target]).spawn().expect("the binary starts");
    let printed = BufReader::new(running.stdout.take().expect("a pipe")).lines().map(|line| line.expect("text"));
    let socket = printed.filter_map(|line| line.strip_prefix("control socket ").map(PathBuf::from)).next();
    let socket = socket.expect("it says where");
    assert_eq!(socket.parent(), Some(&*own));
    assert_eq!(std::fs::metadata(&own).expect("it was made").permissions().mode() & 0o7777, 0o700);
    let asked = link(&["status"]).output().expect("the binary starts");
    // SAFETY: signals a process that is our child and not yet waited for.
    unsafe { libc::kill(running.id() as libc::pid_t, libc::SIGTERM) };
    assert_eq!(running.wait().expect("a child ends").code(), Some(0));
    assert!(asked.status.success(), "the only link is found there: {asked:?}");
    assert!(!socket.exists());
}

#[test]
fn a_rate_bounds_what_a_proxy_passes() {
    let root = directory();
    let target = echo_server().to_string();
    // 100 kB take 800 ms at 1 Mbit; the buffer before the bottleneck holds less than that.
    let flags = ["--rtt", "0", "--rate", "1mbit", "--buffer", "20KiB", "--to", &target];
    let link = Link::try_start(root.path(), &flags).expect("a proxy needs nothing");
    let mut socket = connect(&link);
    let began = Instant::now();
    let bytes = vec![7; 100_000];
    let mut writer = socket.try_clone().expect("a second handle");
    let sent = bytes.clone();
    let writing = std::thread::spawn(move || {
        writer.write_all(&sent).expect("the link takes it");
        writer.shutdown(Shutdown::Write).expect("it is open");
    });
    let mut received = Vec::new();
    socket.read_to_end(&mut received).expect("the end comes after the bytes");
    writing.join().expect("the writer does not panic");
    assert!(received == bytes, "{} bytes came back", received.len());
    assert!(began.elapsed() >= 750 * MS, "{:?}", began.elapsed());
}

#[test]
fn a_cut_direction_passes_nothing_until_it_is_healed() {
    let root = directory();
    let target = echo_server().to_string();
    let link = Link::try_start(root.path(), &["--rtt", "0", "--to", &target]).expect("a proxy needs nothing");
    let mut socket = connect(&link);
    exchange(&mut socket);
    link.ask(&["cut", "back"]).expect("it runs");
    socket.write_all(b"y").expect("this direction is open");
    socket.set_read_timeout(Some(200 * MS)).unwrap();
    let error = socket.read_exact(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock, "nothing comes back");
    let status: serde_json::Value = serde_json::from_str(&link.ask(&["status"]).unwrap()).expect("JSON");
    assert_eq!((&status["back"]["cut"], &status["out"]["cut"]), (&true.into(), &false.into()));
    link.ask(&["heal"]).expect("it runs");
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut byte = [0];
    socket.read_exact(&mut byte).expect("what was held arrives");
    assert_eq!(&byte, b"y");
}

#[test]
fn who_cannot_be_reached_closes_the_connection() {
    let root = directory();
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let link = Link::try_start(root.path(), &["--rtt", "1ms", "--to", &nobody]).expect("a proxy needs nothing");
    assert_eq!(connect(&link).read(&mut [0]).expect("an orderly end"), 0);
}

#[test]
fn what_cannot_be_a_link_is_said() {
    let root = directory();
    for (flags, says) in [
        (&["--rtt", "1ms"][..], "a proxy needs --to HOST:PORT"),
        (&["--kind", "tun", "--to", "127.0.0.1:1"], "--to is for --kind proxy"),
        (&["--rtt", "20s", "--to", "127.0.0.1:1"], "--rtt 20s: at most 10s"),
        (&["--jitter", "2ms", "--to", "127.0.0.1:1"], "more than one direction's delay of 500us"),
        (&["--loss", "5", "--to", "127.0.0.1:1"], "such as 0.1%"),
    ] {
        let error = Link::try_start(root.path(), flags).err().expect("no link");
        assert!(error.contains(says), "{flags:?}: {error}");
    }
}

/// A tun link, or the reason why this host has none.
fn tun(root: &std::path::Path, flags: &[&str]) -> Option<Link> {
    let flags: Vec<&str> = ["--kind", "tun"].iter().chain(flags).copied().collect();
    match Link::try_start(root, &flags) {
        Ok(link) => Some(link),
        Err(error) => {
            let expected = error.contains("needs root") || error.contains("/dev/net/tun") || error.contains("iproute2");
            assert!(expected, "a tun link fails only where it cannot work: {error}");
            println!("skipped: {}", error.trim());
            None
        }
    }
}

#[test]
fn a_replica_lives_across_a_tun_link_and_survives_its_cut() {
    let root = directory();
    let Some(link) = tun(root.path(), &["--rtt", "20ms"]) else { return };
    let ends = link.printed("near ").to_owned();
    let (near, rest) = ends.split_once(", far ").expect("both ends");
    let (far, namespace) = rest.split_once(" in namespace ").expect("the namespace");
    let measured: f64 = link.printed("measured round trip ").split(' ').next().unwrap().parse().unwrap();
    assert!(measured >= 20.0, "{measured} ms");

    let peer_listen = format!("{near}:0");
    let leader = Node::start(root.path(), "a", &["--peer-listen", &peer_listen, "--sync", "FIRST 1 (b)"]);
    let (follow, listen) = (leader.peer_listen.to_string(), format!("{far}:0"));
    let replica = Node::start_in(namespace, root.path(), "b", &["--follow", &follow, "--listen", &listen]);
    let mut client = leader.client();
    let ok = Reply::Simple("OK".into());
    until("the replica streams", || client.command(&["WAIT", "1", "100"]) == Reply::Integer(1));
    assert_eq!(client.command(&["COMMITLEVEL", "remote_apply"]), ok);
    let began = Instant::now();
    assert_eq!(client.command(&["SET", "k", "far"]), ok);
    assert!(began.elapsed() >= 20 * MS, "an acknowledgement crosses the link twice: {:?}", began.elapsed());
    assert_eq!(replica.client().command(&["GET", "k"]), Reply::Bulk("far".into()));

    // What is sent while the link is cut is lost; the kernel's TCP repeats it once it is healed.
    link.ask(&["cut"]).expect("it runs");
    assert_eq!(client.command(&["COMMITLEVEL", "local"]), ok);
    assert_eq!(client.command(&["SET", "k", "cut"]), ok);
    let lsn = client.command(&["LSN"]).text().to_owned();
    link.ask(&["heal"]).expect("it runs");
    let mut reader = replica.client();
    wait_applied(&mut reader, &lsn);
    assert_eq!(reader.command(&["GET", "k"]), Reply::Bulk("cut".into()));
    drop((reader, replica, leader));
    assert_eq!(link.stop(), Some(0));
    assert!(!std::path::Path::new("/run/netns").join(namespace).exists(), "the namespace goes with the link");
}
