//! Sessions that ask how new the state is which they read: SESSION and READ.

use std::time::Duration;

use walferry_cluster::level::CommitLevel;
use walferry_engine::epoch::EpochHistory;
use walferry_engine::lsn::{Epoch, Lsn};

use crate::session::client::SessionSettings;
use crate::session::host::{DataView, TurnClock, Wait};
use crate::session::id::SessionId;
use crate::session::reading::Strong;
use crate::session::test_host::{TestClient, TestHost};

const READ_TIMEOUT: Duration = Duration::from_secs(1);

fn client(id: u64) -> TestClient {
    TestClient::with(&SessionSettings { read_wait_timeout: READ_TIMEOUT, ..SessionSettings::default() }, id)
}

fn token(host: &mut TestHost, client: &mut TestClient) -> String {
    client.ask(host, "SESSION").lines().nth(1).expect("a bulk string").to_owned()
}

/// A leader with `commands` in its log, and a replica that will have the same log once it is flushed.
fn leader_and_replica(commands: &[&str]) -> (TestHost, TestHost) {
    let (mut leader, mut replica) = (TestHost::new(), TestHost::new());
    let (mut writer, mut shipper) = (client(8), client(9));
    for command in commands {
        writer.ask(&mut leader, command);
        shipper.send(&mut replica, format!("{command}\r\n").as_bytes());
        replica.flush();
    }
    // What a replica's log holds beyond its store is nothing that is pending.
    (leader, replica)
}

#[test]
fn a_token_tells_of_what_was_written_and_read() {
    let mut host = TestHost::new();
    let (mut writer, mut reader) = (client(1), client(2));
    assert_eq!(token(&mut host, &mut writer), "w1.9f31c2aa.0.0/0");
    writer.ask(&mut host, "SET a 1");
    let written = host.last_commit();
    assert_eq!(token(&mut host, &mut writer), format!("w1.9f31c2aa.7.{written}"));
    // In one round trip: the token behind a write that is not durable yet covers it.
    writer.send(&mut host, b"SET a 2\r\nSESSION\r\n");
    let end = host.last_commit();
    host.flush();
    writer.session.release(&mut host);
    assert!(writer.output().ends_with(&format!("w1.9f31c2aa.7.{end}\r\n")));
    assert_eq!(token(&mut host, &mut reader), "w1.9f31c2aa.0.0/0", "what others wrote was not seen");
    reader.ask(&mut host, "GET a");
    let applied = host.applied();
    assert_eq!(token(&mut host, &mut reader), format!("w1.9f31c2aa.7.{applied}"));
    assert_eq!(reader.ask(&mut host, "SESSION RESET"), "+OK\r\n");
    assert_eq!(token(&mut host, &mut reader), "w1.9f31c2aa.0.0/0");
    // A write that changes nothing has read as well.
    assert_eq!(reader.ask(&mut host, "SETNX a 3"), ":0\r\n");
    assert_eq!(token(&mut host, &mut reader), format!("w1.9f31c2aa.7.{applied}"));
}

#[test]
fn a_token_of_elsewhere_or_garbage_is_refused() {
    let (mut host, mut client) = (TestHost::new(), client(1));
    for (line, reply) in [
        ("SESSION x", "-ERR not a token: "),
        ("SESSION w1.9f31c2aa.3", "-ERR not a token: "),
        ("SESSION w1.00000001.7.0/0", "-ERR not a token: "),
        ("SESSION w1.00000001.7.0/1000", "-ERR the token is of cluster 00000001, this node belongs to 9f31c2aa"),
        ("SESSION a b", "-ERR wrong number of arguments for 'session' command"),
    ] {
        let told = client.ask(&mut host, line);
        assert!(told.starts_with(reply), "{line}: {told}");
    }
}

#[test]
fn a_read_waits_for_what_its_session_has_seen() {
    let (mut leader, mut replica) = leader_and_replica(&["SET a 1"]);
    let (mut writer, mut reader, mut shipper) = (client(1), client(2), client(9));
    writer.ask(&mut leader, "SET a 2");
    let seen = leader.last_commit();
    let token = token(&mut leader, &mut writer);
    assert_eq!(reader.ask(&mut replica, &format!("SESSION {token}")), "+OK\r\n");
    assert_eq!(reader.send(&mut replica, b"GET a\r\nPING\r\n"), "", "and nothing behind it is answered before");
    assert_eq!(replica.parked.get(&SessionId(2)), Some(&Wait::Floor(seen)));
    assert_eq!(reader.session.deadline(), Some(replica.now() + READ_TIMEOUT));
    assert_eq!(reader.resume(&mut replica), "", "a needless call does no harm");
    shipper.ask(&mut replica, "SET a 2");
    assert_eq!(reader.resume(&mut replica), "$1\r\n2\r\n+PONG\r\n");
    assert_eq!(reader.session.deadline(), None);
    assert!(replica.parked.is_empty());
}

#[test]
fn a_read_that_waited_in_vain_is_told_where_the_node_is() {
    let (mut leader, mut replica) = leader_and_replica(&["SET a 1"]);
    let (mut writer, mut reader) = (client(1), client(2));
    writer.ask(&mut leader, "SET a 2");
    let (seen, applied) = (leader.last_commit(), replica.applied());
    let token = token(&mut leader, &mut writer);
    reader.ask(&mut replica, &format!("SESSION {token}"));
    reader.send(&mut replica, b"GET a\r\nGET a\r\nPING\r\n");
    let behind = format!("-BEHIND this node has applied {applied}, the session has seen {seen}; ");
    replica.pass(READ_TIMEOUT);
    let told = reader.resume(&mut replica);
    assert!(told.starts_with(&behind) && told.lines().count() == 1, "the second waits anew: {told}");
    replica.pass(READ_TIMEOUT);
    let told = reader.resume(&mut replica);
    assert!(told.starts_with(&behind) && told.ends_with("\r\n+PONG\r\n"), "{told}");
    assert_eq!(reader.ask(&mut replica, "READ TIMEOUT 0"), "+OK\r\n");
    assert!(reader.send(&mut replica, b"GET a\r\n").starts_with(&behind), "it does not wait");
    assert!(reader.ask(&mut replica, "SET b 1").starts_with("+OK"), "a write needs no newer state");
    assert_eq!(reader.ask(&mut replica, "SESSION RESET"), "+OK\r\n");
    assert_eq!(reader.ask(&mut replica, "GET a"), "$1\r\n1\r\n");
}

#[test]
fn what_was_read_is_not_read_older_elsewhere() {
    let (mut leader, mut behind) = leader_and_replica(&["SET a 1"]);
    let mut client = client(1);
    client.ask(&mut leader, "SESSION");
    let mut other = crate::session::reading_session_tests::client(2);
    other.ask(&mut leader, "SET a 2");
    assert_eq!(client.ask(&mut leader, "GET a"), "$1\r\n2\r\n");
    let token = token(&mut leader, &mut client);
    let mut elsewhere = crate::session::reading_session_tests::client(3);
    elsewhere.ask(&mut behind, "READ TIMEOUT 0");
    elsewhere.ask(&mut behind, &format!("SESSION {token}"));
    assert!(elsewhere.ask(&mut behind, "GET a").starts_with("-BEHIND "));
    // An older token does not lower the floor.
    assert_eq!(elsewhere.ask(&mut behind, "SESSION w1.9f31c2aa.7.0/48"), "+OK\r\n");
    assert!(elsewhere.ask(&mut behind, "EXISTS a").starts_with("-BEHIND "));
}

#[test]
fn session_whose_commit_was_lost_does_not_wait_for_another() {
    let (mut leader, mut host) = leader_and_replica(&["SET a 1"]);
    let mut writer = client(1);
    writer.ask(&mut leader, &format!("SET a {}", "x".repeat(9000)));
    let lost = leader.last_commit();
    // The same connection: its node followed another leader and leads again.
    host.history = EpochHistory::from_entries(&[(Epoch(7), Lsn::ZERO), (Epoch(9), host.applied())]).expect("ascending");
    for wait in ["WAIT 0 1", "WAITAOF 0 0 1"] {
        let said = writer.ask(&mut host, wait);
        assert!(
            said.starts_with(&format!("-LOST what this session has seen up to {lost} in epoch 7")),
            "{wait}: {said}"
        );
    }
    assert_eq!(writer.ask(&mut host, "SET b 1"), "+OK\r\n");
    assert!(host.last_commit() < lost);
    assert_eq!(writer.ask(&mut host, "WAIT 0 1"), ":0\r\n");
    assert!(writer.ask(&mut host, "LSN").contains(&host.last_commit().to_string()));
}

#[test]
fn what_a_failover_took_back_is_told_until_the_session_resets() {
    let (mut leader, mut host) = leader_and_replica(&["SET a 1"]);
    let (mut writer, mut reader) = (client(1), client(2));
    writer.ask(&mut leader, "SET a 2");
    let seen = leader.last_commit();
    let token = token(&mut leader, &mut writer);
    let start = host.applied();
    host.history = EpochHistory::from_entries(&[(Epoch(7), Lsn::ZERO), (Epoch(9), start)]).expect("ascending");
    let mut other = client(3);
    other.ask(&mut host, "SET b 1");
    reader.ask(&mut host, &format!("SESSION {token}"));
    let lost = format!(
        "-LOST what this session has seen up to {seen} in epoch 7 was lost in the failover to epoch 9, which began at {start}; \
         SESSION RESET goes on from there\r\n"
    );
    // No command that depends on it, and none that would hide it.
    for line in ["GET a", "INCR a", "WATCH a", "XREAD STREAMS a 0"] {
        assert_eq!(reader.ask(&mut host, line), lost, "{line}");
    }
    let newer = format!("SESSION w1.9f31c2aa.9.{}", host.last_commit());
    assert_eq!(reader.ask(&mut host, &newer), "+OK\r\n");
    assert_eq!(reader.ask(&mut host, "GET a"), lost, "a newer token does not hide it");
    reader.ask(&mut host, "MULTI");
    reader.ask(&mut host, "GET a");
    assert_eq!(reader.ask(&mut host, "EXEC"), lost);
    assert_eq!(reader.ask(&mut host, "EXEC"), "-ERR EXEC without MULTI\r\n");
    assert_eq!(reader.ask(&mut host, "SESSION RESET"), "+OK\r\n");
    assert_eq!(reader.ask(&mut host, "GET a"), "$1\r\n1\r\n");
    // It can come to light while a read waits.
    let mut waiting = client(4);
    host.history = EpochHistory::from_entries(&[(Epoch(7), Lsn::ZERO)]).expect("ascending");
    waiting.ask(&mut host, "SESSION w1.9f31c2aa.7.F/0");
    assert_eq!(waiting.send(&mut host, b"GET a\r\n"), "");
    host.history = EpochHistory::from_entries(&[(Epoch(7), Lsn::ZERO), (Epoch(9), start)]).expect("ascending");
    assert!(waiting.resume(&mut host).starts_with("-LOST what this session has seen up to F/0 in epoch 7"));
    // Who never asked is not bothered.
    assert_eq!(other.ask(&mut host, "GET a"), "$1\r\n1\r\n");
}

#[test]
fn transactions_and_blocking_reads_wait_as_well() {
    let (mut leader, mut replica) = leader_and_replica(&["XADD s 1-0 f v"]);
    let (mut writer, mut reader, mut shipper) = (client(1), client(2), client(9));
    writer.ask(&mut leader, "XADD s 2-0 f w");
    let token = token(&mut leader, &mut writer);
    reader.ask(&mut replica, &format!("SESSION {token}"));
    assert_eq!(reader.send(&mut replica, b"MULTI\r\nXLEN s\r\nEXEC\r\n"), "+OK\r\n+QUEUED\r\n");
    shipper.ask(&mut replica, "XADD s 2-0 f w");
    assert_eq!(reader.resume(&mut replica), "*1\r\n:2\r\n");
    writer.ask(&mut leader, "XADD s 3-0 f x");
    let token = crate::session::reading_session_tests::token(&mut leader, &mut writer);
    reader.ask(&mut replica, &format!("SESSION {token}"));
    assert_eq!(reader.send(&mut replica, b"XREAD STREAMS s 1-0\r\n"), "");
    shipper.ask(&mut replica, "XADD s 3-0 f x");
    assert!(reader.resume(&mut replica).contains("3-0"), "not what was there when it was asked");
    assert!(reader.ask(&mut replica, "MULTI").starts_with("+OK"));
    assert_eq!(reader.ask(&mut replica, "SESSION"), "-ERR SESSION is not allowed in a transaction\r\n");
    assert!(reader.ask(&mut replica, "EXEC").starts_with("-EXECABORT"));
}

#[test]
fn read_tells_and_takes_its_modes() {
    let (mut host, mut client) = (TestHost::new(), client(1));
    for (line, reply) in [
        ("READ", "$3\r\nANY\r\n"),
        ("READ at most 500ms", "+OK\r\n"),
        ("READ", "$13\r\nAT MOST 500ms\r\n"),
        ("READ AT MOST 2 s", "+OK\r\n"),
        ("READ", "$10\r\nAT MOST 2s\r\n"),
        ("READ committed", "+OK\r\n"),
        ("READ", "$9\r\nCOMMITTED\r\n"),
        ("READ STRONG", "+OK\r\n"),
        ("READ", "$6\r\nSTRONG\r\n"),
        ("READ TIMEOUT", ":1000\r\n"),
        ("READ TIMEOUT 250", "+OK\r\n"),
        ("READ TIMEOUT", ":250\r\n"),
        ("READ TIMEOUT x", "-ERR timeout is not an integer or out of range\r\n"),
        ("RESET", "+RESET\r\n"),
        ("READ", "$3\r\nANY\r\n"),
        ("READ TIMEOUT", ":1000\r\n"),
    ] {
        assert_eq!(client.ask(&mut host, line), reply, "{line}");
    }
    for (line, start) in [
        ("READ AT MOST", "-ERR READ takes nothing, ANY, AT MOST"),
        ("READ AT MOST 500", "-ERR READ AT MOST: \"500\" is not a time"),
        ("READ AT MOST 99999h", "-ERR READ AT MOST 99999h is no bound"),
        ("READ MOST", "-ERR READ takes nothing, ANY, AT MOST"),
    ] {
        let told = client.ask(&mut host, line);
        assert!(told.starts_with(start), "{line}: {told}");
    }
}

#[test]
fn staleness_bound_waits_and_then_answers_the_age() {
    let (mut host, mut client) = (TestHost::new(), client(1));
    client.ask(&mut host, "SET a 1");
    client.ask(&mut host, "READ AT MOST 500ms");
    host.staleness = Some(Duration::from_millis(500));
    assert_eq!(client.ask(&mut host, "GET a"), "$1\r\n1\r\n");
    host.staleness = Some(Duration::from_millis(501));
    assert_eq!(client.send(&mut host, b"GET a\r\n"), "");
    assert_eq!(host.parked.get(&SessionId(1)), Some(&Wait::Fresh));
    host.staleness = Some(Duration::ZERO);
    assert_eq!(client.resume(&mut host), "$1\r\n1\r\n");
    host.staleness = Some(Duration::from_millis(1234));
    client.send(&mut host, b"MULTI\r\nGET a\r\nEXEC\r\n");
    host.pass(READ_TIMEOUT);
    let applied = host.applied();
    let stale = format!(
        "-STALE this node's state may be 1234 ms old, at most 500 ms were asked for; it has applied {applied}\r\n"
    );
    assert_eq!(client.resume(&mut host), stale);
    host.staleness = None;
    client.ask(&mut host, "READ TIMEOUT 0");
    assert!(
        client.ask(&mut host, "GET a").starts_with("-STALE this node cannot say how old its state is, at most 500 ms")
    );
    assert_eq!(client.ask(&mut host, "READ ANY"), "+OK\r\n");
    assert_eq!(client.ask(&mut host, "GET a"), "$1\r\n1\r\n");
}

#[test]
fn process_stopped_in_a_read_answers_no_fresh_read() {
    let (mut host, mut client) = (TestHost::new(), client(1));
    client.ask(&mut host, "SET a 1");
    client.ask(&mut host, "READ TIMEOUT 0");
    for (mode, code) in [("READ AT MOST 500ms", "-STALE "), ("READ STRONG", "-CLUSTERDOWN ")] {
        client.ask(&mut host, mode);
        for lines in ["GET a", "MULTI\r\nGET a\r\nEXEC"] {
            // The clock was looked at once, then the process was stopped, then the value was read.
            host.stopped_after.set(Some((1, Duration::from_millis(501))));
            let told = client.ask(&mut host, lines);
            let told = told.lines().last().expect("a reply");
            assert!(told.starts_with(code), "{mode}, {lines}: {told}");
            host.stopped_after.set(None);
            let told = client.ask(&mut host, lines);
            assert!(told.ends_with("$1\r\n1\r\n"), "{mode}, {lines}: {told}");
        }
    }
}

#[test]
fn a_committed_read_is_held_until_no_failover_takes_it_back() {
    let (mut host, mut client) = (TestHost::new(), client(1));
    let mut writer = crate::session::reading_session_tests::client(2);
    writer.ask(&mut host, "SET a 1");
    let first = host.applied();
    client.ask(&mut host, "READ COMMITTED");
    host.committed = Some(first);
    assert_eq!(client.ask(&mut host, "GET a"), "$1\r\n1\r\n");
    writer.ask(&mut host, "SET a 2");
    let second = host.applied();
    assert_eq!(client.send(&mut host, b"GET a\r\nSESSION\r\n"), "");
    assert_eq!(host.committed_holds, [second]);
    host.committed = Some(second);
    client.session.release(&mut host);
    assert_eq!(client.output(), format!("$1\r\n2\r\n${}\r\nw1.9f31c2aa.7.{second}\r\n", 14 + second.to_string().len()));
    writer.ask(&mut host, "SET a 3");
    let third = host.applied();
    client.send(&mut host, b"GET a\r\n");
    assert_eq!(client.session.deadline(), Some(host.now() + READ_TIMEOUT));
    host.pass(READ_TIMEOUT);
    let told = client.resume(&mut host);
    let expected = format!("-UNCOMMITTED what was read reaches up to {third}, and is committed up to {second} only; ");
    assert!(told.starts_with(&expected), "{told}");
    // What was not told was not seen.
    assert_eq!(token(&mut host, &mut client), format!("w1.9f31c2aa.7.{second}"));
    client.ask(&mut host, "READ TIMEOUT 0");
    assert!(client.send(&mut host, b"GET a\r\n").starts_with("-UNCOMMITTED "), "it does not wait");
    client.ask(&mut host, "READ TIMEOUT 1000");
    client.send(&mut host, b"MULTI\r\nGET a\r\nEXEC\r\n");
    client.session.abandon("a new leader was chosen");
    let told = client.output();
    let expected = format!("-UNCOMMITTED what was read is not committed up to {third}: a new leader was chosen\r\n");
    assert!(told.ends_with(&expected), "{told}");
    assert_eq!(token(&mut host, &mut client), format!("w1.9f31c2aa.7.{second}"));
}

#[test]
fn a_strong_read_sees_every_commit_that_was_answered() {
    let (mut host, mut client) = (TestHost::new(), client(1));
    let mut writer = crate::session::reading_session_tests::client(2);
    host.committed = Some(Lsn::ZERO);
    assert_eq!(writer.send(&mut host, b"COMMITLEVEL off\r\nSET a 1\r\n"), "+OK\r\n+OK\r\n");
    assert_eq!(client.ask(&mut host, "READ STRONG"), "+OK\r\n");
    writer.send(&mut host, b"SET a 2\r\n");
    assert_eq!(client.send(&mut host, b"GET a\r\n"), "", "not durable, not committed: not told yet");
    let seen = host.last_commit();
    assert_eq!(host.committed_holds, [seen]);
    host.flush();
    client.session.release(&mut host);
    assert_eq!(client.output(), "", "not committed");
    host.committed = Some(Lsn::MAX);
    client.session.release(&mut host);
    assert_eq!(client.output(), "$1\r\n2\r\n");
    host.strong = Strong::Refused("MOVED 0 127.0.0.1:7000".to_owned());
    assert_eq!(client.ask(&mut host, "GET a"), "-MOVED 0 127.0.0.1:7000\r\n");
    host.strong = Strong::Replaying;
    assert_eq!(client.send(&mut host, b"GET a\r\n"), "");
    host.strong = Strong::Held;
    assert_eq!(client.resume(&mut host), "$1\r\n2\r\n");
    // On the leader a token of what is pending is served from what is pending.
    let mut tracked = crate::session::reading_session_tests::client(3);
    writer.send(&mut host, b"SET a 3\r\n");
    tracked.ask(&mut host, "PING");
    writer.send(&mut host, b"SET a 4\r\n");
    let pending = format!("SESSION w1.9f31c2aa.7.{}\r\nGET a\r\n", host.last_commit());
    assert_eq!(tracked.send(&mut host, pending.as_bytes()), "+OK\r\n");
    assert_eq!(host.holds.last(), Some(&(CommitLevel::Local, host.last_commit())));
    host.flush();
    tracked.session.release(&mut host);
    assert_eq!(tracked.output(), "$1\r\n4\r\n");
}
