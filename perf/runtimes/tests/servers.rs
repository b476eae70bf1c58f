//! Each of the three servers answers, closes what is malformed, and has the requests in its file before it answers them.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use walferry_runtimes::load::{self, Load};
use walferry_runtimes::protocol::{REPLY, request};
use walferry_runtimes::{batch, session};

const RUNTIMES: [&str; 3] = ["epoll", "tokio-uring", "ring"];
const WAIT_MAX: Duration = Duration::from_secs(20);

struct Server {
    process: Child,
    address: SocketAddr,
}

impl Server {
    fn start(on: &str, file: Option<&Path>) -> Server {
        let mut command = Command::new(env!("CARGO_BIN_EXE_walferry-runtimes"));
        command.args(["serve", "--on", on]).stdout(Stdio::piped());
        if let Some(file) = file {
            command.arg("--file").arg(file);
        }
        let mut process = command.spawn().expect("the server starts");
        let mut address = String::new();
        BufReader::new(process.stdout.take().expect("piped")).read_line(&mut address).expect("an address");
        Server { process, address: address.trim().parse().expect("an address") }
    }

    fn connect(&self) -> TcpStream {
        let socket = TcpStream::connect(self.address).expect("a connection");
        socket.set_read_timeout(Some(WAIT_MAX)).expect("a timeout");
        socket
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn expect_replies(socket: &mut TcpStream, count: usize) {
    let mut replies = vec![0; count * REPLY.len()];
    socket.read_exact(&mut replies).expect("replies");
    assert_eq!(replies, REPLY.repeat(count));
}

/// Talks to a server; returns the requests that were answered.
fn converse(server: &Server) -> Vec<Vec<u8>> {
    let requests: Vec<Vec<u8>> =
        (0..6).map(|n| request(&format!("key{n}"), &vec![b'a' + n; 700 * usize::from(n)])).collect();
    let (mut one, mut other, mut bad) = (server.connect(), server.connect(), server.connect());
    // Two and a half requests, then the rest: the third is completed by a later receive.
    let pipelined = requests[..4].concat();
    let cut = requests[0].len() + requests[1].len() + requests[2].len() / 2;
    one.write_all(&pipelined[..cut]).expect("sent");
    expect_replies(&mut one, 2);
    bad.write_all(b"GET key\r\n").expect("sent");
    assert_eq!(bad.read(&mut [0]).unwrap_or(0), 0, "a malformed request closes its connection");
    other.write_all(&requests[4]).expect("sent");
    expect_replies(&mut other, 1);
    one.write_all(&pipelined[cut..]).expect("sent");
    expect_replies(&mut one, 2);
    drop(one);
    other.write_all(&requests[5]).expect("sent");
    expect_replies(&mut other, 1);
    requests
}

#[test]
fn server_without_file_answers() {
    for on in RUNTIMES {
        converse(&Server::start(on, None));
    }
}

#[test]
fn server_with_file_answers_what_is_written() {
    for on in RUNTIMES {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        let file = dir.path().join("log");
        let server = Server::start(on, Some(&file));
        let answered = converse(&server);
        drop(server);
        let written = batch::read_file(&file).expect("the file").concat();
        let expected = [&answered[0], &answered[1], &answered[4], &answered[2], &answered[3], &answered[5]];
        assert_eq!(
            String::from_utf8_lossy(&written),
            String::from_utf8_lossy(&expected.map(|r| &r[..]).concat()),
            "{on}"
        );
    }
}

#[test]
fn server_under_load_answers_all_and_groups() {
    const CLIENTS: usize = 100;
    for on in RUNTIMES {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        let file = dir.path().join("log");
        let server = Server::start(on, Some(&file));
        let load = Load {
            clients: CLIENTS,
            pipeline: 8,
            value_bytes: 100,
            warm_up: Duration::ZERO,
            measured: Duration::from_millis(100),
        };
        let measured = load::run(server.address, &load).expect("every reply is right");
        drop(server);
        let batches = batch::read_file(&file).expect("the file");
        let one = request("key:00000000", &[b'x'; 100]).len();
        let written = batches.iter().map(|payload| payload.len() / one).sum::<usize>() as u64;
        assert!(written >= measured.requests, "{on}: {written} written, {} answered", measured.requests);
        assert!(batches.len() as u64 * 8 < written, "{on}: {} batches for {written} requests", batches.len());
    }
}

#[test]
fn server_closes_connections_over_its_limit() {
    // Of this process and of the servers that it starts: a usual limit is 1,024 descriptors.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
    setrlimit(Resource::RLIMIT_NOFILE, most.min(8192), most).expect("a higher limit");
    for on in RUNTIMES {
        let server = Server::start(on, None);
        let kept: Vec<TcpStream> = (0..session::CONNECTIONS_MAX).map(|_| server.connect()).collect();
        let mut over = server.connect();
        assert_eq!(over.read(&mut [0]).unwrap_or(0), 0, "{on}: one connection too many is closed");
        drop(kept);
    }
}
