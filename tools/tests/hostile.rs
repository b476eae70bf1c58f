//! Clients and peers that mean no good, or no longer work: none of them keeps the node from serving the others, and each that is
//! sent away is counted. In every test a good client commits all the while.

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use common::cluster::Cluster;
use common::{Client, Node, PATIENCE, Reply, directory, until};

fn ok() -> Reply {
    Reply::Simple("OK".into())
}

/// A client that commits one value after the other, until it is asked what became of them.
struct GoodClient {
    stop: Arc<AtomicBool>,
    served: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl GoodClient {
    fn start(address: SocketAddr) -> GoodClient {
        let (stop, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut client = Client::connect(address).expect("a running node takes connections");
        let (until, count) = (Arc::clone(&stop), Arc::clone(&served));
        let thread = std::thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                assert_eq!(client.command(&["SET", "good", "client"]), ok());
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
        GoodClient { stop, served, thread: Some(thread) }
    }

    /// It still is served: some more commits are answered.
    fn is_served(&self) {
        let before = self.served.load(Ordering::Relaxed);
        until("the good client is served", || self.served.load(Ordering::Relaxed) > before + 5);
    }
}

impl Drop for GoodClient {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().expect("it runs").join();
        assert!(ended.is_ok() || std::thread::panicking(), "every command of the good client is answered");
    }
}

/// A line of INFO as a number.
fn info(client: &mut Client, key: &str) -> u64 {
    let reply = client.command(&["INFO"]);
    let found = reply.text().lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    found.and_then(|value| value.trim().parse().ok()).unwrap_or_else(|| panic!("INFO has a number {key}: {reply:?}"))
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("a running node takes connections");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout that is not zero");
    stream.set_write_timeout(Some(PATIENCE)).expect("a timeout that is not zero");
    stream
}

/// What comes until the other side closes; a reset is an end as well.
fn read_to_end(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        Err(error) => panic!("the connection is not closed: {error}"),
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Raises this process' own limit of descriptors; false when it cannot.
fn may_open(descriptors: u64) -> bool {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls name a value of the type that they want.
    unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit);
        limit.rlim_cur = descriptors.max(limit.rlim_cur);
        limit.rlim_max = limit.rlim_max.max(limit.rlim_cur);
        libc::setrlimit(libc::RLIMIT_NOFILE, &limit) == 0
    }
}

#[test]
fn ten_thousand_idle_clients_do_not_slow_the_others() {
    const IDLE: usize = 9_990;
    if !may_open(IDLE as u64 + 500) {
        eprintln!("skipped: this process may not open {IDLE} connections (ulimit -Hn)");
        return;
    }
    let root = directory();
    let node = Node::start(root.path(), "a", &[]);
    let good = GoodClient::start(node.listen);
    let mut operator = node.client();
    let idle: Vec<TcpStream> = (0..IDLE).map(|_| connect(node.listen)).collect();
    until("all are accepted", || info(&mut operator, "connected_clients") == IDLE as u64 + 2);
    good.is_served();
    assert_eq!(info(&mut operator, "maxclients"), 10_000, "the limit of descriptors was raised as far as is needed");
    let list = operator.command(&["CLIENT", "LIST"]);
    assert_eq!(list.text().lines().count(), IDLE + 2);
    let last: Vec<TcpStream> = (0..8).map(|_| connect(node.listen)).collect();
    until("the node is full", || info(&mut operator, "connected_clients") == 10_000);
    assert_eq!(read_to_end(&mut connect(node.listen)), "-ERR max number of clients reached\r\n");
    until("it is counted", || info(&mut operator, "rejected_connections") == 1);
    drop((idle, last));
    until("their places are free again", || info(&mut operator, "connected_clients") == 2);
    assert_eq!(node.client().command(&["PING"]), Reply::Simple("PONG".into()));
    good.is_served();
}

#[test]
fn too_few_descriptors_lower_clients_max_and_are_logged() {
    let root = directory();
    let Some(command) = limited(300) else { return };
    let node = Node::start_by(command, root.path(), "a", &[]);
    let mut operator = node.client();
    let fits = info(&mut operator, "maxclients");
    assert_eq!(fits, 150, "half of few descriptors");
    let log = std::fs::read_to_string(root.path().join("a.log")).expect("a log");
    assert!(log.contains("only 150 clients are taken") && log.contains("ulimit -Hn"), "{log}");
    let good = GoodClient::start(node.listen);
    let _others: Vec<TcpStream> = (2..fits).map(|_| connect(node.listen)).collect();
    until("the node is full", || info(&mut operator, "connected_clients") == fits);
    assert_eq!(read_to_end(&mut connect(node.listen)), "-ERR max number of clients reached\r\n");
    good.is_served();
}

/// `walferry` under a limit of descriptors that it may not raise; none where the machine has no `setpriv`.
fn limited(descriptors: u64) -> Option<Command> {
    let run = format!(
        "ulimit -n {descriptors} && exec setpriv --bounding-set=-sys_resource --inh-caps=-sys_resource \"$0\" \"$@\""
    );
    let mut probe = Command::new("sh");
    probe.args(["-c", &run, "sh", "-c", "ulimit -Hn 10000"]).stderr(std::process::Stdio::null());
    if probe.status().map_or(true, |status| status.code() == Some(127)) {
        eprintln!("skipped: setpriv is missing (util-linux)");
        return None;
    }
    let mut command = Command::new("sh");
    command.args(["-c", &run, env!("CARGO_BIN_EXE_walferry")]);
    Some(command)
}

#[test]
fn clients_cannot_take_the_descriptors_of_the_log() {
    let root = directory();
    let Some(command) = limited(140) else { return };
    let node = Node::start_by(command, root.path(), "a", &["--segment-bytes", "16MiB"]);
    let mut writer = node.client();
    assert_eq!(info(&mut writer, "maxclients"), 12, "128 descriptors are kept for the node itself");
    let _idle: Vec<TcpStream> = (0..200).map(|_| connect(node.listen)).collect();
    until("the node is full", || info(&mut writer, "connected_clients") == 12);
    let value = "v".repeat(1 << 20);
    for key in 0..80 {
        assert_eq!(writer.command(&["SET", &format!("key{key}"), &value]), ok(), "five segments of log");
    }
    // The burst may have run into the limit while connections beyond the bound were accepted, to be closed: the log did not.
    let log = std::fs::read_to_string(root.path().join("a.log")).expect("a log");
    assert!(!log.contains("when no segment is left"), "{log}");
}

#[test]
fn start_with_too_few_descriptors_says_how_many_it_needs() {
    let root = directory();
    let Some(mut command) = limited(100) else { return };
    let data = root.path().join("x");
    command
        .args(["start", "--name", "x", "--listen", "127.0.0.1:0", "--peer-listen", "127.0.0.1:0", "--data"])
        .arg(&data);
    let output = command.output().expect("it starts");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{text}");
    assert!(text.contains("is 100, and a node needs 136") && text.contains("ulimit -Hn"), "{text}");
    assert!(!data.join("log").exists(), "nothing was made");
}

#[test]
fn a_client_that_closes_its_side_gets_its_replies() {
    const COMMITS: usize = 500;
    let root = directory();
    let node = Node::start(root.path(), "a", &[]);
    let _good = GoodClient::start(node.listen);
    let mut half = connect(node.listen);
    for number in 0..COMMITS {
        write!(half, "SET half:{number} {number}\r\n").expect("it is read");
    }
    // A command that will never be whole changes nothing.
    write!(half, "*2\r\n$3\r\nGET\r\n$100\r\nhal").expect("it is read");
    half.shutdown(Shutdown::Write).expect("an open socket");
    assert_eq!(read_to_end(&mut half), "+OK\r\n".repeat(COMMITS), "every commit is confirmed, then the node closes");
    let mut operator = node.client();
    until("it is forgotten", || info(&mut operator, "connected_clients") == 2);
    // One that waits for its commit is closed as well, if late: it may be gone altogether.
    let mut blocked = connect(node.listen);
    blocked.write_all(b"WAIT 1 0\r\n").expect("it is read");
    until("it blocks", || operator.command(&["CLIENT", "LIST"]).text().contains("flags=b db=0 multi=-1 qbuf=0 obl=0"));
    blocked.shutdown(Shutdown::Write).expect("an open socket");
    assert_eq!(read_to_end(&mut blocked), "");
    until("it is counted", || info(&mut operator, "half_closed_disconnections") == 1);
}

#[test]
fn blocked_reader_that_closed_leaves_at_once() {
    let root = directory();
    let node = Node::start(root.path(), "a", &[]);
    let mut operator = node.client();
    let mut blocked = connect(node.listen);
    blocked.write_all(b"PING\r\nXREAD BLOCK 0 STREAMS s $\r\n").expect("it is read");
    until("it blocks", || operator.command(&["CLIENT", "LIST"]).text().contains("flags=b"));
    blocked.shutdown(Shutdown::Write).expect("an open socket");
    assert_eq!(read_to_end(&mut blocked), "+PONG\r\n", "what was answered before still comes");
    until("its place is free", || info(&mut operator, "connected_clients") == 1);
    assert_eq!(info(&mut operator, "half_closed_disconnections"), 0, "nobody had to send it away");
}

#[test]
fn connections_that_do_not_log_in_take_no_place_from_others() {
    const PLACES: usize = 40;
    const KEPT: usize = 8;
    let root = directory();
    let users = root.path().join("users");
    std::fs::write(&users, "user app on >app +@all -@admin\nuser root on >root +@all\n").expect("our file");
    std::fs::set_permissions(&users, std::fs::Permissions::from_mode(0o600)).expect("our file");
    let places = PLACES.to_string();
    let flags = ["--users-file", users.to_str().expect("text"), "--clients-max", &places];
    let node = Node::start(root.path(), "a", &flags);
    let log_in = |user: &str| {
        let mut client = node.client();
        (client.command(&["AUTH", user, user]), client)
    };
    let mut operator = log_in("root").1;
    // As many as there are places, and they say nothing.
    let mut silent: Vec<TcpStream> = (0..PLACES).map(|_| connect(node.listen)).collect();
    // Each that comes finds a place all the same, up to those that are kept.
    let mut apps = Vec::new();
    let refused = loop {
        match log_in("app") {
            (Reply::Simple(_), mut client) => {
                assert_eq!(client.command(&["SET", "a", "1"]), ok());
                apps.push(client);
            }
            (answer, _) => break answer,
        }
    };
    assert_eq!(refused, Reply::Error("ERR max number of clients reached".into()));
    assert_eq!(apps.len(), PLACES - KEPT - 1, "one place is the operator's");
    let mut others: Vec<Client> = (0..KEPT)
        .map(|_| log_in("root"))
        .map(|(answer, client)| {
            assert_eq!(answer, ok(), "a place is kept for an operator");
            client
        })
        .collect();
    for client in apps.iter_mut().chain(&mut others) {
        client.command(&["LSN"]).text();
    }
    until("they are counted", || info(&mut operator, "unauthenticated_displaced") >= (PLACES - KEPT) as u64);
    // The share that they may have: of those that stay, a quarter of the places; and none of them for long.
    drop((apps, others));
    silent.extend((0..PLACES / 2).map(|_| connect(node.listen)));
    until("they have their share", || info(&mut operator, "unauthenticated_clients") <= PLACES as u64 / 4);
    let log = std::fs::read_to_string(root.path().join("a.log")).expect("a log");
    assert_eq!(log.matches("had not logged in").count(), 1, "told once in a while: {log}");
    for stream in &mut silent {
        assert_eq!(read_to_end(stream), "");
    }
    until("those who stayed are counted", || info(&mut operator, "authentication_timeout_disconnections") > 0);
    until("all of them are gone", || info(&mut operator, "connected_clients") == 1);
}

#[test]
fn web_page_that_posts_to_the_client_port_changes_nothing() {
    let root = directory();
    let node = Node::start(root.path(), "a", &[]);
    let good = GoodClient::start(node.listen);
    let mut operator = node.client();
    let requests = [
        "POST / HTTP/1.1\r\nHost: x\r\n\r\nSET pwned 1\r\n",
        "post / HTTP/1.1\r\nContent-Length: 13\r\n\r\nSET pwned 1\r\n",
        "PUT /pwned HTTP/1.1\r\nHost: x\r\n\r\nSET pwned 1\r\n",
        "GET / HTTP/1.1\r\nSET pwned 1\r\n",
        "X y\r\nhost: x\r\nSET pwned 1\r\n",
        "*2\r\n$4\r\nPOST\r\n$1\r\n/\r\nSET pwned 1\r\n",
    ];
    for request in requests {
        let mut page = connect(node.listen);
        page.write_all(request.as_bytes()).expect("it is read");
        assert_eq!(read_to_end(&mut page), "", "no answer, and the end: {request}");
    }
    until("all are counted", || info(&mut operator, "http_disconnections") == requests.len() as u64);
    assert_eq!(operator.command(&["EXISTS", "pwned"]), Reply::Integer(0));
    let log = std::fs::read_to_string(root.path().join("a.log")).expect("a log");
    assert_eq!(log.matches("possible attack").count(), 1, "told once in a while: {log}");
    good.is_served();
}

#[test]
fn client_that_writes_all_before_it_reads_is_answered() {
    const ASKED: usize = 100_000;
    let root = directory();
    let node = Node::start(root.path(), "a", &[]);
    let good = GoodClient::start(node.listen);
    let (value, large) = ("x".repeat(1 << 10), "y".repeat(4 << 20));
    let mut operator = node.client();
    assert_eq!(operator.command(&["SET", "value", &value]), ok());
    assert_eq!(operator.command(&["SET", "large", &large]), ok());
    let mut writer = connect(node.listen);
    writer.write_all("GET value\r\n".repeat(ASKED).as_bytes()).expect("all of it is read");
    let reply = format!("${}\r\n{value}\r\n", value.len());
    let mut replies = vec![0; reply.len() * ASKED];
    writer.read_exact(&mut replies).expect("every reply comes");
    assert!(replies.chunks(reply.len()).all(|chunk| chunk == reply.as_bytes()), "in order");
    // Few commands, which are large.
    let set = "z".repeat(8 << 20);
    let pipeline = format!("{}*3\r\n$3\r\nSET\r\n$1\r\nz\r\n${}\r\n{set}\r\n", "GET large\r\n".repeat(3), set.len());
    writer.write_all(pipeline.as_bytes()).expect("all of it is read");
    let mut replies = vec![0; 3 * (large.len() + "$4194304\r\n\r\n".len()) + "+OK\r\n".len()];
    writer.read_exact(&mut replies).expect("every reply comes");
    assert!(replies.ends_with(b"y\r\n+OK\r\n"));
    good.is_served();
}

#[test]
fn client_far_ahead_of_its_replies_is_disconnected() {
    let root = directory();
    let node = Node::start(root.path(), "a", &[]);
    let good = GoodClient::start(node.listen);
    let mut operator = node.client();
    assert_eq!(operator.command(&["SET", "value", &"x".repeat(1 << 10)]), ok());
    let mut writer = connect(node.listen);
    let pipeline = "GET value\r\n".repeat(100_000);
    let mut sent = 0;
    while writer.write_all(pipeline.as_bytes()).is_ok() {
        sent += pipeline.len();
        assert!(sent < 256 << 20, "its commands are read without end");
    }
    assert!(sent > 60 << 20, "only {sent} bytes were read");
    until("it is counted", || info(&mut operator, "client_query_buffer_limit_disconnections") == 1);
    let log = std::fs::read_to_string(root.path().join("a.log")).expect("a log");
    assert!(log.contains("it reads no replies and has sent"), "{log}");
    good.is_served();
}

#[test]
fn client_that_never_finishes_a_command_is_idle() {
    const LORISES: u64 = 20;
    let root = directory();
    let node = Node::start(root.path(), "a", &["--client-idle-timeout", "1s"]);
    let good = GoodClient::start(node.listen);
    let mut blocked = node.client();
    blocked.send(&["XREAD", "BLOCK", "0", "STREAMS", "s", "$"]).expect("it is read");
    let lorises: Vec<JoinHandle<()>> = (0..LORISES)
        .map(|_| {
            let mut loris = connect(node.listen);
            std::thread::spawn(move || {
                loris.write_all(b"*2\r\n$3\r\nGET\r\n$100000\r\n").expect("it is read at first");
                while loris.write_all(b"x").is_ok() {
                    std::thread::sleep(Duration::from_millis(20));
                }
            })
        })
        .collect();
    for loris in lorises {
        loris.join().expect("each is disconnected in the end");
    }
    good.is_served();
    // The operator's connections are idle in between as well.
    let mut operator = node.client();
    until("all are counted", || info(&mut operator, "idle_disconnections") >= LORISES);
    operator.command(&["XADD", "s", "*", "a", "1"]);
    assert!(matches!(blocked.reply(), Ok(Reply::Array(_))), "who waits for the node is not idle");
}

#[test]
fn client_that_never_reads_is_bounded_and_disconnected() {
    const VALUE_BYTES: usize = 1 << 20;
    const ASKED: usize = 200;
    let root = directory();
    let node = Node::start(root.path(), "a", &["--output-stalled-timeout", "1s"]);
    let good = GoodClient::start(node.listen);
    let mut operator = node.client();
    assert_eq!(operator.command(&["SET", "large", &"x".repeat(VALUE_BYTES)]), ok());
    let mut deaf: Vec<TcpStream> = (0..10).map(|_| connect(node.listen)).collect();
    for stream in &mut deaf {
        stream.write_all("GET large\r\n".repeat(ASKED).as_bytes()).expect("these few bytes are read");
    }
    let mut most = 0;
    until("all are disconnected", || {
        most = most.max(info(&mut operator, "clients_buffered_bytes"));
        info(&mut operator, "output_stalled_disconnections") == 10
    });
    let bound = 10 * 2 * ((1 << 20) + VALUE_BYTES as u64 + 1024);
    assert!(most <= bound, "{most} bytes are kept for ten clients that asked for {ASKED} MiB each");
    let log = std::fs::read_to_string(root.path().join("a.log")).expect("a log");
    assert!(log.contains("it read none of its replies for 1s (output_stalled_timeout)"), "{log}");
    good.is_served();
}

#[test]
fn half_sent_commands_of_all_clients_together_are_bounded() {
    let root = directory();
    let node = Node::start(root.path(), "a", &["--clients-bytes-max", "64MiB"]);
    let good = GoodClient::start(node.listen);
    let mut operator = node.client();
    let half = [b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$16000000\r\n".as_slice(), &vec![b'x'; 15 << 20]].concat();
    let senders: Vec<JoinHandle<TcpStream>> = (0..8)
        .map(|_| {
            let (mut stream, half) = (connect(node.listen), half.clone());
            std::thread::spawn(move || {
                // It may be disconnected before all of it is sent.
                let _ = stream.write_all(&half);
                stream
            })
        })
        .collect();
    let _streams: Vec<TcpStream> = senders.into_iter().map(|sender| sender.join().expect("no panic")).collect();
    until("the largest are gone", || {
        info(&mut operator, "evicted_clients") >= 4 && info(&mut operator, "clients_buffered_bytes") <= 64 << 20
    });
    good.is_served();
    assert_eq!(operator.command(&["GET", "k"]), Reply::Nil, "half a command does nothing");
}

#[test]
fn bytes_that_are_no_command_end_their_connection_only() {
    let root = directory();
    let node = Node::start(root.path(), "a", &[]);
    let good = GoodClient::start(node.listen);
    for (garbage, error) in [
        ("*3\r\n:1\r\n", "-ERR Protocol error: expected '$', got ':'\r\n"),
        ("*99999999\r\n", "-ERR Protocol error: invalid multibulk length\r\n"),
        ("*1\r\n$99999999999\r\n", "-ERR Protocol error: invalid bulk length\r\n"),
        ("\"unbalanced\r\n", "-ERR Protocol error: unbalanced quotes in request\r\n"),
    ] {
        let mut stream = connect(node.listen);
        stream.write_all(garbage.as_bytes()).expect("it is read");
        assert_eq!(read_to_end(&mut stream), error);
    }
    let mut stream = connect(node.listen);
    // It is closed while it still sends: a reset may take the error along.
    let _ = stream.write_all(&vec![0xff; 1 << 20]);
    read_to_end(&mut stream);
    good.is_served();
}

#[test]
fn garbage_on_the_peer_port_keeps_no_replica_out() {
    let root = directory();
    let node = Node::start(root.path(), "a", &[]);
    let good = GoodClient::start(node.listen);
    // More than the bound of connections, all of which stay: silent, half an envelope, a whole one without its body.
    let beginnings: [&[u8]; 4] = [b"", b"\x40\0", b"\x40\0\0\0\x01\0\0\0", b"\x40\0\0\0\x01\0\0\0\x01\0"];
    let stay = |index: usize| {
        let mut stream = connect(node.peer_listen);
        let _ = stream.write_all(beginnings[index % beginnings.len()]);
        stream
    };
    let mut staying: Vec<TcpStream> = (0..200).map(stay).collect();
    for garbage in [&b"POST / HTTP/1.1\r\nHost: x\r\n\r\n"[..], &[0xff; 4096], &[0; 64]] {
        let mut stream = connect(node.peer_listen);
        let _ = stream.write_all(garbage);
        read_to_end(&mut stream);
    }
    let follow = node.peer_listen.to_string();
    let replica = Node::start(root.path(), "b", &["--follow", &follow]);
    let mut reader = replica.client();
    until("the replica has what the good client wrote", || {
        reader.command(&["GET", "good"]) == Reply::Bulk("client".into())
    });
    good.is_served();
    // Whoever says nothing is sent away; the last ones when their time is up.
    staying.iter_mut().for_each(|stream| drop(read_to_end(stream)));
    until("the replica still follows", || info(&mut node.client(), "connected_slaves") == 1);
}

#[test]
fn garbage_on_the_port_of_a_member_does_no_harm_to_its_cluster() {
    let cluster = Cluster::start(&["a", "b", "c"], &[]);
    let leader = cluster.leader();
    let peer: SocketAddr = cluster.peer_address(leader).parse().expect("an address");
    let good = GoodClient::start(cluster.client_address(leader));
    // Kind 9 is a question of a member; its body of 64 bytes does not come.
    let beginnings: [&[u8]; 4] = [b"", b"\x40\0", b"\x40\0\0\0\x09\0\0\0", b"\x40\0\0\0\x09\0\0\0{\"number\":"];
    let mut staying: Vec<TcpStream> = (0..100)
        .map(|index| {
            let mut stream = connect(peer);
            stream.write_all(beginnings[index % beginnings.len()]).expect("it is read");
            stream
        })
        .collect();
    for garbage in [&b"\x05\0\0\0\x09\0\0\0right"[..], b"POST / HTTP/1.1\r\nHost: x\r\n\r\n", &[0xff; 4096]] {
        let mut stream = connect(peer);
        let _ = stream.write_all(garbage);
        read_to_end(&mut stream);
    }
    staying.iter_mut().for_each(|stream| drop(read_to_end(stream)));
    good.is_served();
    assert_eq!(cluster.leader(), leader, "nobody was elected meanwhile");
}

#[test]
fn slow_scraper_does_not_block_other_scrapers() {
    let root = directory();
    let node = Node::start(root.path(), "a", &["--metrics-listen", "127.0.0.1:0"]);
    let metrics = node.metrics_listen.expect("it was asked for");
    let mut slow = connect(metrics);
    slow.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").expect("it is read");
    let stop = Arc::new(AtomicBool::new(false));
    let until_then = Arc::clone(&stop);
    let trickle = std::thread::spawn(move || {
        while !until_then.load(Ordering::Relaxed) && slow.write_all(b"x").is_ok() {
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    let mut scraper = connect(metrics);
    scraper.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").expect("it is read");
    scraper.shutdown(Shutdown::Write).expect("an open socket");
    let page = read_to_end(&mut scraper);
    assert!(page.contains("walferry_clients_sent_away_total{reason=\"idle\"} 0"), "{page}");
    stop.store(true, Ordering::Relaxed);
    trickle.join().expect("no panic");
}

#[test]
fn an_operator_lists_and_kills_clients() {
    let root = directory();
    let node = Node::start(root.path(), "a", &[]);
    let mut operator = node.client();
    let mut other = node.client();
    assert_eq!(other.command(&["CLIENT", "SETNAME", "other"]), ok());
    let Reply::Integer(id) = other.command(&["CLIENT", "ID"]) else { panic!("an id is a number") };
    let list = operator.command(&["CLIENT", "LIST"]);
    let line = list.text().lines().find(|line| line.contains("name=other")).expect("it is listed");
    assert!(line.starts_with(&format!("id={id} addr=127.0.0.1:")) && line.contains(" cmd=client "), "{line}");
    let one = operator.command(&["CLIENT", "LIST", "ID", &id.to_string()]);
    assert_eq!(one.text().lines().count(), 1);
    assert!(other.command(&["CLIENT", "INFO"]).text().contains("name=other"));
    assert_eq!(operator.command(&["CLIENT", "KILL", "ID", &id.to_string()]), Reply::Integer(1));
    assert!(other.try_command(&["PING"]).is_err(), "its connection is gone");
    assert_eq!(operator.command(&["CLIENT", "KILL", "ID", &id.to_string()]), Reply::Integer(0));
    assert_eq!(operator.command(&["CLIENT", "KILL", "127.0.0.1:1"]), Reply::Error("ERR No such client".into()));
    until("it is counted", || info(&mut operator, "killed_clients") == 1);
    // In a transaction nothing may wait; the reply of EXEC stays whole.
    operator.command(&["MULTI"]);
    operator.command(&["CLIENT", "LIST"]);
    operator.command(&["SET", "a", "1"]);
    let refused = Reply::Error("ERR CLIENT cannot wait in a transaction".into());
    assert_eq!(operator.command(&["EXEC"]), Reply::Array(vec![refused, ok()]));
}
