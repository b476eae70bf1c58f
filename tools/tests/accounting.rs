//! Where commits spend their time, as real nodes tell it: over RESP, to `walferry status` and to Prometheus.

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;

use common::{Link, Node, PATIENCE, Reply, directory, until};

const COMMITS: usize = 200;

/// What one HTTP request is answered with: status line and all.
fn http(address: SocketAddr, request: &str) -> String {
    let mut socket = TcpStream::connect(address).expect("the endpoint listens");
    socket.set_read_timeout(Some(PATIENCE)).expect("a socket takes it");
    socket.write_all(request.as_bytes()).expect("it takes a request");
    let mut answer = String::new();
    socket.read_to_string(&mut answer).expect("an answer and its end");
    answer
}

/// The value of the one line that begins with `series`.
fn value(page: &str, series: &str) -> f64 {
    let line = page.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{series} is missing in\n{page}")).parse().expect("a number")
}

#[test]
fn stages_of_a_commit_add_up_to_its_total() {
    let root = directory();
    let flags = ["--sync", "FIRST 1 (b)", "--metrics-listen", "127.0.0.1:0"];
    let leader = Node::start(root.path(), "a", &flags);
    let to = leader.peer_listen.to_string();
    let link = Link::try_start(root.path(), &["--rtt", "4ms", "--to", &to]).expect("a proxy needs nothing");
    let replica = Node::start(root.path(), "b", &["--follow", link.printed("listens on ")]);
    let mut client = leader.client();
    until("the replica streams", || client.command(&["WAIT", "1", "100"]) == Reply::Integer(1));
    for level in ["local", "remote_apply"] {
        assert_eq!(client.command(&["COMMITLEVEL", level]), Reply::Simple("OK".into()));
        for number in 0..COMMITS {
            client.command(&["SET", "k", &number.to_string()]);
        }
    }
    let report: serde_json::Value = serde_json::from_str(client.command(&["WATERFALL"]).text()).expect("JSON");
    let mean = |value: &serde_json::Value| value["us"]["mean"].as_f64().expect("a mean");
    for level in ["local", "remote_apply"] {
        let levels = report["levels"].as_array().expect("levels");
        let found = levels.iter().find(|row| row["level"] == level).expect("the level had commits");
        assert_eq!(found["samples"], COMMITS, "one client is never sampled");
        // Across 4 ms it is always the remote branch that ends later; `local` has no other than the local one.
        let critical = if level == "local" { "local" } else { "remote" };
        assert_eq!(found["critical"][critical], COMMITS, "{found}");
        let stages = found["stages"].as_array().expect("stages");
        let on_path = |stage: &&serde_json::Value| {
            let branch = stage["branch"].as_str().expect("a branch");
            branch == "start" || branch == "end" || branch == critical
        };
        let sum: f64 = stages.iter().filter(on_path).map(mean).sum();
        let total = mean(&found["total"]);
        assert!((sum - total).abs() <= total * 0.02, "{level}: the stages take {sum} us, the commit {total} us");
    }
    let page = http(leader.metrics_listen.expect("asked for"), "GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n");
    assert!(page.starts_with("HTTP/1.1 200 OK\r\n"), "{page}");
    assert_eq!(value(&page, "walferry_commits_total{level=\"remote_apply\"}"), COMMITS as f64);
    assert!(value(&page, "walferry_commit_seconds{level=\"remote_apply\",quantile=\"0.5\"}") >= 0.004);
    assert_eq!(value(&page, "walferry_replica_streaming{replica=\"b\"}"), 1.0);
    assert!(value(&page, "walferry_flushes_total") <= value(&page, "walferry_records_total"));

    let shown = Command::new(env!("CARGO_BIN_EXE_walferry"))
        .args(["status", "--waterfall", "--url", &format!("redis://{}", leader.listen)])
        .output()
        .expect("the binary starts");
    let shown = String::from_utf8_lossy(&shown.stdout);
    assert!(shown.contains("network_out") && shown.contains("released by: b 200"), "{shown}");
    drop((replica, leader, link));
}

#[test]
fn metrics_endpoint_answers_other_requests_with_an_error() {
    let root = directory();
    let node = Node::start(root.path(), "a", &["--metrics-listen", "127.0.0.1:0"]);
    let address = node.metrics_listen.expect("asked for");
    for (request, says) in [
        ("GET / HTTP/1.1\r\n\r\n", "404 Not Found"),
        ("POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", "405 Method Not Allowed"),
        ("hello\r\n\r\n", "400 Bad Request"),
    ] {
        let answer = http(address, request);
        assert!(answer.lines().next().unwrap_or_default().contains(says), "{request:?}: {answer}");
    }
    // Whoever connects and says nothing holds up nobody but for a bounded time.
    let silent = TcpStream::connect(address).expect("it listens");
    let page = http(address, "GET /metrics HTTP/1.1\r\n\r\n");
    assert!(page.contains("walferry_node_info{name=\"a\",role=\"leader\""), "{page}");
    drop(silent);
}

#[test]
fn an_address_that_is_taken_is_named() {
    let root = directory();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("its address").to_string();
    let log = Node::try_start(root.path(), "a", &["--metrics-listen", &address]).err().expect("it does not start");
    assert!(log.contains("--metrics-listen") && log.contains(&address), "{log}");
}
