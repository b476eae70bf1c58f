//! TLS with real nodes: clients and peers over it, certificates that are missing, foreign, renewed or required, and who speaks
//! something else. Where the kernel has TLS the links are `ktls`, elsewhere `relay`; each test holds for both and prints which.

mod common;

#[path = "../../tls/tests/common/certificates.rs"]
mod certificates;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use certificates::{Authority, Signed, replace};
use common::cluster::{Cluster, Load, missing};
use common::{Node, PATIENCE, Reply, directory, log_bytes, lsn_bytes, until, wait_applied};
use walferry_client::Url;
use walferry_tls::{NamedFile, client_config, rustls};

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// The flags of a certificate and its key.
fn pair(own: &Signed) -> Vec<String> {
    vec!["--tls-cert".to_owned(), text(&own.certificate), "--tls-key".to_owned(), text(&own.key)]
}

fn peer_flags(own: &Signed, ca: &Authority) -> Vec<String> {
    let mut flags = pair(own);
    flags.extend(["--peer-tls".to_owned(), "--peer-tls-ca".to_owned(), text(&ca.ca)]);
    flags
}

fn client_flags(own: &Signed) -> Vec<String> {
    let mut flags = pair(own);
    flags.extend(["--tls-listen".to_owned(), "127.0.0.1:0".to_owned()]);
    flags
}

fn start(root: &Path, name: &str, flags: &[String], more: &[&str]) -> Node {
    let flags: Vec<&str> = flags.iter().map(String::as_str).chain(more.iter().copied()).collect();
    Node::start(root, name, &flags)
}

fn log_of(root: &Path, name: &str) -> String {
    std::fs::read_to_string(root.join(format!("{name}.log"))).unwrap_or_default()
}

fn until_logged(root: &Path, name: &str, what: &str) {
    until(&format!("{name} logs {what:?}"), || log_of(root, name).contains(what));
}

fn info(node: &Node, key: &str) -> String {
    let reply = node.client().command(&["INFO"]);
    let line = reply.text().lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':').map(str::to_owned));
    line.unwrap_or_default()
}

fn url(address: SocketAddr, ca: &Authority, own: Option<&Signed>) -> Url {
    let own = own.map_or(String::new(), |own| format!("&cert={}&key={}", text(&own.certificate), text(&own.key)));
    format!("rediss://{address}?ca={}{own}", text(&ca.ca)).parse().expect("a URL")
}

fn connect(url: &Url) -> Result<walferry_client::Client, String> {
    let mut client = walferry_client::Client::connect(url).map_err(|error| error.to_string())?;
    // Under TLS 1.3 a client whose certificate is refused hears of it with its first answer.
    client.call(&["PING"]).map_err(|error| error.to_string())?;
    Ok(client)
}

fn walferry(words: &[&str]) -> Result<String, String> {
    let output = Command::new(env!("CARGO_BIN_EXE_walferry")).args(words).output().expect("the binary starts");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

#[test]
fn clients_and_tools_speak_tls_beside_the_plain_port() {
    const VALUE_BYTES: usize = 4 << 20;
    let root = directory();
    let ca = Authority::new(root.path(), "all");
    let node = start(root.path(), "a", &client_flags(&ca.sign("a", &["127.0.0.1", "localhost"])), &[]);
    let address = node.tls_listen.expect("a port for TLS");
    let secured = url(address, &ca, None);
    let mut client = connect(&secured).expect("a connection");
    let value: String = (0..VALUE_BYTES).map(|at| char::from(b'a' + (at / 7 % 26) as u8)).collect();
    client.call(&["SET", "large", &value]).expect("an answer");
    assert!(
        client.call(&["GET", "large"]).expect("an answer").text().as_deref() == Some(&value),
        "it comes back whole"
    );
    assert_eq!(node.client().command(&["STRLEN", "large"]), Reply::Integer(VALUE_BYTES as i64), "one node, two ports");
    let shown = secured_text(&secured);
    assert!(walferry(&["status", "--url", &shown]).expect("a status").contains("leader"));
    walferry(&["load", "-i", "--url", &shown]).expect("tables");
    let load = walferry(&["load", "-c", "4", "-T", "1", "--url", &shown]).expect("a load");
    assert!(load.contains("latency"), "{load}");
    let count = |key| info(&node, key).parse::<u64>().expect("a number");
    assert!(count("tls_handshakes") >= 8 && count("tls_handshakes_failed") == 0);
    println!("clients: {} ktls, {} relayed", count("tls_ktls_connections"), count("tls_relay_connections"));
    drop(client);
    until("no connection is left in the relay", || info(&node, "tls_relay_connections_now") == "0");
    redis_cli(address, &ca);
    assert_eq!(node.stop().0, Some(0));
}

#[test]
fn a_client_that_says_goodbye_gets_its_replies() {
    const COMMITS: usize = 500;
    let root = directory();
    let ca = Authority::new(root.path(), "all");
    let node = start(root.path(), "a", &client_flags(&ca.sign("a", &["127.0.0.1"])), &[]);
    let config = client_config(&NamedFile::new("tls_ca", &ca.ca), None).expect("a CA");
    let name = "127.0.0.1".try_into().expect("a name");
    let tls = rustls::ClientConnection::new(config, name).expect("settings");
    let socket = TcpStream::connect(node.tls_listen.expect("a port for TLS")).expect("a connection");
    socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let mut stream = rustls::StreamOwned::new(tls, socket);
    for number in 0..COMMITS {
        write!(stream, "SET last:{number} {number}\r\n").expect("it is read");
    }
    stream.conn.send_close_notify();
    stream.flush().expect("it is read");
    let mut replies = vec![0; "+OK\r\n".len() * COMMITS];
    stream.read_exact(&mut replies).expect("every commit is confirmed");
    assert!(replies == "+OK\r\n".repeat(COMMITS).into_bytes());
    // The end itself may come as a record or as the connection's end.
    assert!(
        stream.read(&mut [0]).is_ok_and(|bytes| bytes == 0) || stream.sock.read(&mut [0]).is_ok_and(|bytes| bytes == 0)
    );
}

/// The whole URL; what is printed of one leaves the files out.
fn secured_text(url: &Url) -> String {
    let ca = url.tls.as_ref().and_then(|files| files[0].clone()).expect("a CA");
    format!("{url}?ca={}", ca.display())
}

fn redis_cli(address: SocketAddr, ca: &Authority) {
    let help = Command::new("redis-cli").arg("--help").output();
    let has_tls = help.is_ok_and(|output| {
        String::from_utf8_lossy(&output.stdout).contains("--tls")
            || String::from_utf8_lossy(&output.stderr).contains("--tls")
    });
    if !has_tls {
        println!("skipped: no redis-cli with TLS here");
        return;
    }
    let port = address.port().to_string();
    let output = Command::new("redis-cli")
        .args(["-h", "127.0.0.1", "-p", &port, "--tls", "--cacert", &text(&ca.ca), "STRLEN", "large"])
        .output()
        .expect("redis-cli starts");
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(said.contains(&(4 << 20).to_string()), "{said}");
}

#[test]
fn client_with_a_wrong_certificate_is_refused_with_a_reason() {
    let root = directory();
    let (ca, other) = (Authority::new(root.path(), "all"), Authority::new(root.path(), "other"));
    let mut flags = client_flags(&ca.sign("a", &["127.0.0.1"]));
    flags.extend(["--tls-client-auth".to_owned(), "--tls-ca".to_owned(), text(&ca.ca)]);
    let node = start(root.path(), "a", &flags, &[]);
    let address = node.tls_listen.expect("a port for TLS");
    connect(&url(address, &ca, Some(&ca.sign("c", &["c"])))).expect("its certificate is good");
    let error = connect(&url(address, &ca, None)).map(drop).expect_err("none was shown");
    assert!(error.contains("asks for a certificate"), "{error}");
    let error = connect(&url(address, &ca, Some(&other.sign("x", &["x"])))).map(drop).expect_err("a foreign one");
    assert!(error.contains("does not know its CA"), "{error}");
    let error = connect(&url(address, &other, None)).map(drop).expect_err("the node's own is not believed");
    assert!(error.contains("UnknownIssuer"), "{error}");
    until_logged(root.path(), "a", "it shows no certificate, and has to");
    until_logged(root.path(), "a", "not signed by a CA that this side knows");
}

#[test]
fn certificates_are_renewed_while_the_node_runs() {
    let root = directory();
    let (old, new) = (Authority::new(root.path(), "old"), Authority::new(root.path(), "new"));
    let own = old.sign("a", &["127.0.0.1"]);
    let node = start(root.path(), "a", &client_flags(&own), &[]);
    let address = node.tls_listen.expect("a port for TLS");
    let mut before = connect(&url(address, &old, None)).expect("the old CA's certificate");
    new.sign("a", &["127.0.0.1"]);
    // Without a word: the files are looked at.
    until("the new certificate is used", || connect(&url(address, &new, None)).is_ok());
    let error = connect(&url(address, &old, None)).map(drop).expect_err("it is the new CA's now");
    assert!(error.contains("UnknownIssuer"), "{error}");
    before.call(&["PING"]).expect("connections stay");
    replace(&own.certificate, "broken");
    // SAFETY: signals a process that is our child and not yet waited for.
    unsafe { libc::kill(node.pid() as libc::pid_t, libc::SIGHUP) };
    until_logged(root.path(), "a", "the new certificates are of no use, the old ones stay: tls_cert = ");
    connect(&url(address, &new, None)).expect("the last good one serves");
    old.sign("a", &["127.0.0.1"]);
    // SAFETY: as above.
    unsafe { libc::kill(node.pid() as libc::pid_t, libc::SIGHUP) };
    until("the renewed certificate is used", || connect(&url(address, &old, None)).is_ok());
    assert_eq!(node.stop().0, Some(0));
}

#[test]
fn a_mistaken_port_is_told_from_an_answer() {
    let root = directory();
    let ca = Authority::new(root.path(), "all");
    let node = start(root.path(), "a", &client_flags(&ca.sign("a", &["127.0.0.1"])), &[]);
    let address = node.tls_listen.expect("a port for TLS");
    for said in ["*1\r\n$4\r\nPING\r\n", "PING\r\n", "GET / HTTP/1.1\r\n\r\n"] {
        let mut plain = TcpStream::connect(address).expect("a connection");
        plain.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        plain.write_all(said.as_bytes()).expect("written");
        let mut answer = String::new();
        plain.read_to_string(&mut answer).expect("an answer and an end");
        assert!(answer.starts_with("-ERR this port speaks TLS (tls_listen)"), "{answer}");
    }
    until_logged(root.path(), "a", "it does not speak TLS; it said \"*1\\\\r\\\\n$4\\\\r\\\\nPING");
    let error = connect(&url(node.listen, &ca, None)).map(drop).expect_err("it is the plain port");
    assert!(error.contains("does not speak TLS on this port"), "{error}");
    until_logged(root.path(), "a", "a client speaks TLS to `listen`");
    let error = walferry(&["status", "--url", &format!("rediss://{address}")]).expect_err("no CA is named");
    assert!(error.contains("?ca=FILE"), "{error}");
}

#[test]
fn a_replica_streams_and_catches_up_over_mutual_tls() {
    const VALUE_BYTES: usize = 1 << 20;
    let root = directory();
    let ca = Authority::new(root.path(), "cluster");
    let a = start(
        root.path(),
        "a",
        &peer_flags(&ca.sign("a", &["127.0.0.1"]), &ca),
        &["--log-buffer-bytes", "32MiB", "--sync", "ANY 1 (b)"],
    );
    let value = "v".repeat(VALUE_BYTES);
    let mut leader = a.client();
    // More than the log buffer holds: the replica is fed from files first.
    for key in 0..48 {
        assert_eq!(leader.command(&["SET", &format!("cold{key}"), &value]), Reply::Simple("OK".to_owned()));
    }
    let flags = peer_flags(&ca.sign("b", &["127.0.0.1"]), &ca);
    let b = start(root.path(), "b", &flags, &["--follow", &a.peer_listen.to_string()]);
    until("the replica streams", || info(&a, "shipped_sendfile_bytes") != "0" && streams(&a, "b"));
    leader.command(&["COMMITLEVEL", "remote_apply"]);
    for key in 0..200 {
        // Small ones, and some large enough for SEND_ZC, which no socket under TLS knows.
        let value = if key % 40 == 0 { value.as_str() } else { "hot" };
        assert_eq!(leader.command(&["SET", &format!("hot{key}"), value]), Reply::Simple("OK".to_owned()));
    }
    let sent: u64 = info(&a, "shipped_sendfile_bytes").parse().expect("a number");
    assert!(sent > 16 * VALUE_BYTES as u64, "the old part went by sendfile: {sent}");
    assert_eq!(info(&a, "shipped_zc_bytes"), "0");
    let transport = info(&a, "replica_b_transport");
    println!("peers: {transport}");
    assert!(["ktls", "relay"].contains(&transport.as_str()), "{transport}");
    let end = leader.command(&["LSN"]).text().to_owned();
    wait_applied(&mut b.client(), &end);
    assert!(b.client().command(&["GET", "cold7"]) == Reply::Bulk(value.clone()));
    let bytes = |node: &Node| log_bytes(&node.data, 0, lsn_bytes(&end));
    assert!(bytes(&a) == bytes(&b), "the logs differ");
    // The link breaks and comes back.
    b.kill();
    let b = start(root.path(), "b", &flags, &["--follow", &a.peer_listen.to_string()]);
    assert_eq!(leader.command(&["SET", "again", "x"]), Reply::Simple("OK".to_owned()));
    assert_eq!(b.stop().0, Some(0));
    assert_eq!(a.stop().0, Some(0));
}

fn streams(leader: &Node, replica: &str) -> bool {
    let Reply::Array(rows) = leader.client().command(&["REPLICATION"]) else { return false };
    format!("{rows:?}").contains(replica) && format!("{rows:?}").contains("streaming")
}

#[test]
fn a_replica_whose_log_is_gone_takes_its_snapshot_over_tls() {
    const SMALL: [&str; 6] = ["--slot-keep-bytes-max", "17MiB", "--keep-bytes-min", "0", "--checkpoint-bytes", "1MiB"];
    let root = directory();
    let ca = Authority::new(root.path(), "cluster");
    let a = start(root.path(), "a", &peer_flags(&ca.sign("a", &["127.0.0.1"]), &ca), &SMALL);
    let mut leader = a.client();
    let value = "v".repeat(400_000);
    let before = info(&a, "log_start_lsn");
    let mut number = 0;
    until("the leader has recycled its log", || {
        number += 1;
        leader.command(&["SET", &format!("key{}", number % 32), &value]);
        info(&a, "log_start_lsn") != before
    });
    let flags = peer_flags(&ca.sign("b", &["127.0.0.1"]), &ca);
    let b = start(root.path(), "b", &flags, &["--follow", &a.peer_listen.to_string()]);
    until("the copy is there", || info(&b, "snapshots_taken") == "1");
    wait_applied(&mut b.client(), leader.command(&["LSN"]).text());
    assert!(b.client().command(&["GET", "key1"]) == Reply::Bulk(value));
}

/// The command has no node's configuration: it is given the certificate that the peers ask for.
#[test]
fn a_stopped_log_is_repaired_from_a_peer_behind_tls() {
    const VALUE_BYTES: usize = 100_000;
    let root = directory();
    let ca = Authority::new(root.path(), "cluster");
    let a = start(root.path(), "a", &peer_flags(&ca.sign("a", &["127.0.0.1"]), &ca), &[]);
    let own = ca.sign("b", &["127.0.0.1"]);
    let peer = a.peer_listen.to_string();
    let b = start(root.path(), "b", &peer_flags(&own, &ca), &["--follow", &peer]);
    let mut leader = a.client();
    let value = "v".repeat(VALUE_BYTES);
    for key in 0..20 {
        assert_eq!(leader.command(&["SET", &format!("key{key}"), &value]), Reply::Simple("OK".to_owned()));
    }
    let end = leader.command(&["LSN"]).text().to_owned();
    wait_applied(&mut b.client(), &end);
    let data = text(&b.data);
    assert_eq!(b.stop().0, Some(0));
    let segment = Path::new(&data).join("log/0000000000000000.wal");
    let mut bytes = std::fs::read(&segment).expect("a segment");
    // Within a value.
    bytes[VALUE_BYTES * 3 / 2] ^= 1;
    std::fs::write(&segment, bytes).expect("a flipped bit");
    let repair = ["log", "repair", "--data", &data, "--from", &peer];
    let error = walferry(&repair).expect_err("in the clear it gets nothing");
    assert!(error.contains(&format!("{peer}: ")) && error.contains("peers speak TLS"), "{error}");
    let (certificate, key, authority) = (text(&own.certificate), text(&own.key), text(&ca.ca));
    let error = walferry(&[&repair[..], &["--tls-cert", &certificate]].concat()).expect_err("its key is missing");
    assert!(error.contains("--tls-key"), "{error}");
    let files = ["--tls-cert", &certificate, "--tls-key", &key, "--peer-tls-ca", &authority];
    let error = walferry(&[&repair[..], &files].concat()).expect_err("it proves nothing");
    assert!(error.contains("peers prove a secret"), "{error}");
    let secret = text(&root.path().join("peer.secret"));
    let files = [&files[..], &["--peer-secret", &secret]].concat();
    let said = walferry(&[&repair[..], &files].concat()).expect("it is repaired");
    assert!(said.contains("repaired 0/") && said.contains(&format!("from {peer}")), "{said}");
    walferry(&["log", "verify", "--data", &data, "--against", &text(&a.data)]).expect("the same bytes, no damage");
}

#[test]
fn peers_that_do_not_belong_together_say_so_on_both_sides() {
    let root = directory();
    let (ca, other) = (Authority::new(root.path(), "cluster"), Authority::new(root.path(), "other"));
    let own = ca.sign("a", &["127.0.0.1"]);
    let secured = start(root.path(), "a", &peer_flags(&own, &ca), &[]);
    let plain = Node::start(root.path(), "p", &[]);
    let to_secured = ["--follow", &secured.peer_listen.to_string()];
    let to_plain = ["--follow", &plain.peer_listen.to_string()];

    // A certificate of another CA; the replica itself would believe the leader.
    let foreign = start(root.path(), "b", &peer_flags(&other.sign("b", &["127.0.0.1"]), &ca), &to_secured);
    until_logged(root.path(), "b", "it refuses this side's certificate: it does not know its CA");
    until_logged(root.path(), "a", "not signed by a CA that this side knows");
    until("INFO tells it", || info_of(&foreign).contains("does not know its CA"));

    // A certificate of the right CA, for another node.
    let _other = start(root.path(), "x", &peer_flags(&ca.sign("y", &["127.0.0.1"]), &ca), &to_secured);
    until_logged(root.path(), "x", "this node's certificate is not for x");

    // Only one of the two speaks TLS.
    let _plain_replica = Node::start(root.path(), "c", &to_secured);
    until_logged(root.path(), "c", "this node's peers speak TLS: set peer_tls = true on both or on neither");
    until_logged(root.path(), "a", "it does not speak TLS");
    let _secured_replica = start(root.path(), "d", &peer_flags(&ca.sign("d", &["127.0.0.1"]), &ca), &to_plain);
    until_logged(
        root.path(),
        "p",
        "the peer speaks TLS and this node does not: set peer_tls = true on both or on neither",
    );
    until_logged(root.path(), "d", "it does not speak TLS; it said");
}

#[test]
fn certificate_names_the_nodes_that_may_show_it() {
    let root = directory();
    let ca = Authority::new(root.path(), "cluster");
    let flags = |signed: &Signed| [peer_flags(signed, &ca), vec!["--peer-auth".to_owned(), "none".to_owned()]].concat();
    let a = start(root.path(), "a", &flags(&ca.sign("a", &["127.0.0.1"])), &[]);
    let follow = ["--follow", &a.peer_listen.to_string()];
    let _other = start(root.path(), "x", &flags(&ca.sign("y", &["127.0.0.1"])), &follow);
    until_logged(root.path(), "a", "y says that it is x: a node speaks under the name that it proved");
    let b = start(root.path(), "b", &flags(&ca.sign("b.example.org", &["127.0.0.1"])), &follow);
    until("b, whose host is called b, follows", || info_of(&b).contains("master_link_status:up"));
}

/// Neither is gone: nobody is told to go on without the other.
#[test]
fn member_without_tls_among_those_with_it_is_told_so() {
    let mut cluster = Cluster::start(&["a", "b", "c"], &[]);
    let ca = Authority::new(cluster.root.path(), "cluster");
    let secured = peer_flags(&ca.sign("member", &[&cluster.host, "a", "b", "c"]), &ca);
    let both = "set peer_tls = true on both or on neither";
    let told = |cluster: &Cluster, name: &str, says: &str| {
        until(&format!("{name} tells {says}"), || {
            let blocked_reason = cluster.describe(name)["blocked_reason"].to_string();
            blocked_reason.contains("is there, but")
                && blocked_reason.contains(says)
                && !blocked_reason.contains("gone for good")
        });
        let refused = |line: &&str| line.contains("a member cannot be asked") && line.contains(says);
        let asked = || cluster.log_of(name).lines().filter(refused).count();
        until("it is logged", || asked() > 0);
        assert!(asked() <= 2, "once for each member:\n{}", cluster.log_of(name));
    };
    let other = cluster.replica();
    cluster.kill(other);
    let plain = std::mem::replace(&mut cluster.flags, secured.clone());
    cluster.bring(other);
    told(&cluster, other, "it does not speak TLS");
    let leader = cluster.leader();
    until("the other side logs it", || cluster.log_of(leader).contains(both));

    let names = cluster.names.clone();
    names.iter().for_each(|name| cluster.kill(name));
    let others: Vec<&'static str> = names.into_iter().filter(|name| *name != other).collect();
    cluster.bring_together(&others);
    cluster.flags = plain;
    cluster.bring(other);
    told(&cluster, other, "it refuses this node: this node's peers speak TLS: set peer_tls");
    until("the other side logs it", || cluster.log_of(others[0]).contains("it does not speak TLS"));
}

fn info_of(node: &Node) -> String {
    node.client().command(&["INFO"]).text().to_owned()
}

#[test]
fn wrong_options_and_files_end_the_start_with_one_clear_line() {
    let root = directory();
    let ca = Authority::new(root.path(), "all");
    let own = ca.sign("a", &["127.0.0.1"]);
    let data = text(&root.path().join("x"));
    let (certificate, key, missing) = (text(&own.certificate), text(&own.key), text(&root.path().join("none.pem")));
    let begin = ["start", "--name", "x", "--listen", "127.0.0.1:0", "--peer-listen", "127.0.0.1:0", "--data", &data];
    let open = root.path().join("open.key");
    std::fs::copy(&own.key, &open).expect("a copy of the key");
    std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o644)).expect("our file");
    let open = text(&open);
    for (flags, says) in [
        (
            vec!["--tls-cert", &certificate, "--tls-key", &open, "--tls-listen", "127.0.0.1:0"],
            "(mode 0644): chmod 640 it",
        ),
        (vec!["--tls-listen", "127.0.0.1:0"], "tls_listen = 127.0.0.1:0: it needs tls_cert and tls_key"),
        (vec!["--tls-cert", &certificate], "tls_key has to name the certificate's key"),
        (vec!["--tls-cert", &certificate, "--tls-key", &key], "nothing uses it: give tls_listen, peer_tls or both"),
        (vec!["--tls-cert", &certificate, "--tls-key", &key, "--peer-tls"], "peer_tls_ca (or tls_ca)"),
        (vec!["--tls-cert", &missing, "--tls-key", &key, "--tls-listen", "127.0.0.1:0"], "none.pem: No such file"),
        (vec!["--tls-cert", &key, "--tls-key", &key, "--tls-listen", "127.0.0.1:0"], "it holds no certificate (PEM)"),
    ] {
        let error = walferry(&[begin.as_slice(), &flags].concat()).expect_err("it is wrong");
        assert!(error.contains(says), "{flags:?}: {error}");
        assert_eq!(error.trim_end().lines().count(), 1, "{error}");
    }
}

#[test]
fn a_start_on_an_open_address_says_what_is_open() {
    let root = directory();
    let node = Node::start(root.path(), "a", &["--listen", "0.0.0.0:0", "--peer-listen", "0.0.0.0:0"]);
    let log = log_of(root.path(), "a");
    assert!(log.contains("whoever reaches this address may do everything"), "{log}");
    assert!(log.contains("what follows can be read and changed on the way: set peer_tls"), "{log}");
    assert_eq!(node.stop().0, Some(0));
    let quiet = Node::start(root.path(), "b", &[]);
    assert!(!log_of(root.path(), "b").contains("whoever reaches"), "on loopback there is nothing to say");
    drop(quiet);
}

#[test]
fn a_cluster_under_tls_survives_the_death_of_its_leader() {
    let mut cluster = Cluster::start_with(&["a", "b", "c", "w"], |root, host| {
        let ca = Authority::new(root, "cluster");
        let flags = peer_flags(&ca.sign("member", &[host, "a", "b", "c", "w"]), &ca);
        (flags.clone(), flags)
    });
    let load = Load::start(&cluster, "remote_flush");
    load.wait_for(200);
    let first = cluster.leader();
    cluster.kill(first);
    load.wait_for(200);
    let second = cluster.leader();
    assert_ne!(first, second);
    cluster.bring(first);
    load.wait_for(200);
    let (acknowledged, pause) = load.finish();
    println!("the longest pause was {pause:?}");
    cluster.logs_are_identical();
    let lost = missing(&mut cluster.client(second), &acknowledged);
    assert!(lost.is_empty(), "{} of {} are lost", lost.len(), acknowledged.len());
    let peer: SocketAddr = cluster.peer_address(second).parse().expect("an address");
    let mut plain = TcpStream::connect(peer).expect("a connection");
    plain.write_all(&[0; 8]).expect("written");
    let mut answer = Vec::new();
    plain.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    plain.read_to_end(&mut answer).expect("an answer and an end");
    assert!(String::from_utf8_lossy(&answer).contains("peers speak TLS"), "nobody gets in without a certificate");
}
