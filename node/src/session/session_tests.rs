//! A session's promises: order, what a reply is held for, waiting, bounds.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use walferry_applier::store::overlay::hash_of;
use walferry_cluster::level::CommitLevel;
use walferry_engine::lsn::Lsn;

use crate::clients::limits::{DisconnectReason, INPUT_UNREAD_BYTES_MAX, Places};
use crate::session::client::SessionSettings;
use crate::session::host::{CommitPath, Refusal, ReplicationRow, TurnClock, Wait};
use crate::session::id::SessionId;
use crate::session::outbox::OUTPUT_BYTES_MAX;
use crate::session::resp::VALUE_BYTES_MAX;
use crate::session::test_host::{TestClient, TestHost};
use crate::users::Users;
use crate::users::login;
use crate::users::salted::SaltedHash;

fn pair() -> (TestHost, TestClient) {
    (TestHost::new(), TestClient::new())
}

/// The record of one `SET a 1` ends here: after the frame's header and its own length. Later ones are compared relatively.
fn lsn_of(host: &mut TestHost, client: &mut TestClient) -> Lsn {
    let reply = client.ask(host, "LSN");
    reply.lines().nth(1).expect("a bulk string").parse().expect("an LSN")
}

#[test]
fn a_write_is_answered_when_it_is_durable() {
    let (mut host, mut client) = pair();
    assert_eq!(client.send(&mut host, b"SET a 1\r\nPING\r\n"), "", "PING stands behind the reply that is held");
    assert_eq!(host.holds, [(CommitLevel::Local, host.log_end())]);
    client.session.release(&mut host);
    assert_eq!(client.output(), "");
    assert!(client.session.holds_replies());
    host.flush();
    client.session.release(&mut host);
    assert_eq!(client.output(), "+OK\r\n+PONG\r\n");
    assert!(!client.session.holds_replies());
}

#[test]
fn a_pipeline_asks_for_one_hold() {
    let (mut host, mut client) = pair();
    let pipeline = b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$1\r\n1\r\n".repeat(16);
    assert_eq!(client.send(&mut host, &pipeline), "");
    assert_eq!(host.holds, [(CommitLevel::Local, host.log_end())]);
    host.flush();
    client.session.release(&mut host);
    assert_eq!(client.output(), "+OK\r\n".repeat(16));
}

#[test]
fn replies_leave_in_order_whatever_their_levels() {
    let (mut host, mut client) = pair();
    let input =
        b"COMMITLEVEL remote_apply\r\nINCR n\r\nCOMMITLEVEL off\r\nINCR n\r\nCOMMITLEVEL local\r\nINCR n\r\nGET n\r\n";
    assert_eq!(client.send(&mut host, input), "+OK\r\n");
    let levels: Vec<CommitLevel> = host.holds.iter().map(|(level, _)| *level).collect();
    assert_eq!(levels, [CommitLevel::RemoteApply, CommitLevel::Local]);
    host.flush();
    client.session.release(&mut host);
    assert_eq!(client.output(), "", "everything stands behind the commit that waits for a replica");
    host.confirm(CommitLevel::RemoteApply);
    client.session.release(&mut host);
    assert_eq!(client.output(), ":1\r\n+OK\r\n:2\r\n+OK\r\n:3\r\n$1\r\n3\r\n");
}

#[test]
fn level_off_answers_at_once_and_its_session_reads_its_write() {
    let (mut host, mut client) = pair();
    assert_eq!(client.send(&mut host, b"COMMITLEVEL off\r\nSET a 1\r\n"), "+OK\r\n+OK\r\n");
    assert_eq!(client.send(&mut host, b"GET a\r\n"), "", "what is not durable is not shown");
    host.flush();
    client.session.release(&mut host);
    assert_eq!(client.output(), "$1\r\n1\r\n");
}

#[test]
fn others_see_only_what_is_durable() {
    let (mut host, mut writer) = pair();
    let mut reader = TestClient::with(&SessionSettings::default(), 2);
    writer.ask(&mut host, "SET a 1");
    writer.send(&mut host, b"SET a 2\r\n");
    assert_eq!(reader.send(&mut host, b"GET a\r\n"), "$1\r\n1\r\n");
    host.flush();
    assert_eq!(reader.send(&mut host, b"GET a\r\n"), "$1\r\n2\r\n");
}

#[test]
fn a_write_that_changes_nothing_waits_for_what_it_saw() {
    let (mut host, mut writer) = pair();
    let mut other = TestClient::with(&SessionSettings::default(), 2);
    assert_eq!(other.send(&mut host, b"DEL a\r\n"), ":0\r\n", "nothing is pending: nothing to wait for");
    writer.send(&mut host, b"SET a 1\r\n");
    let end = host.log_end();
    assert_eq!(other.send(&mut host, b"SETNX a 2\r\n"), "");
    assert_eq!(host.log_end(), end, "nothing is appended");
    assert_eq!(other.send(&mut host, b"GET a\r\n"), "", "and no later read is older");
    host.flush();
    other.session.release(&mut host);
    assert_eq!(other.output(), ":0\r\n$1\r\n1\r\n");
}

#[test]
fn lsn_and_commitinfo_tell_of_the_last_commit() {
    let (mut host, mut client) = pair();
    assert_eq!(client.ask(&mut host, "LSN"), "$3\r\n0/0\r\n");
    assert_eq!(client.ask(&mut host, "COMMITINFO"), "$-1\r\n");
    client.ask(&mut host, "COMMITLEVEL remote_apply");
    client.send(&mut host, b"SET a 1\r\n");
    let end = host.log_end();
    host.flush();
    host.confirm(CommitLevel::RemoteApply);
    host.pass(Duration::from_micros(250));
    client.session.release(&mut host);
    assert_eq!(client.output(), "+OK\r\n");
    assert_eq!(lsn_of(&mut host, &mut client), end);
    let lsn = end.to_string();
    assert_eq!(
        client.ask(&mut host, "COMMITINFO"),
        format!(
            "*14\r\n$5\r\nepoch\r\n:7\r\n$3\r\nlsn\r\n${}\r\n{lsn}\r\n$5\r\nlevel\r\n$12\r\nremote_apply\r\n$3\r\nmet\r\n\
             $12\r\nremote_apply\r\n$9\r\nconfirmed\r\n:1\r\n\
             $8\r\nreplicas\r\n*2\r\n$1\r\nb\r\n$12\r\nremote_apply\r\n$9\r\nstages_us\r\n*4\r\n$5\r\nflush\r\n:120\r\n\
             $5\r\ntotal\r\n:250\r\n",
            lsn.len()
        )
    );
}

#[test]
fn commit_level_and_timeout_are_the_sessions_own() {
    let settings = SessionSettings {
        commit_level: Some(CommitLevel::RemoteFlush),
        commit_timeout: Some(Duration::from_secs(2)),
        ..SessionSettings::default()
    };
    let (mut host, mut client) = (TestHost::new(), TestClient::with(&settings, 1));
    for (line, reply) in [
        ("COMMITLEVEL", "$12\r\nremote_flush\r\n"),
        ("COMMITTIMEOUT", ":2000\r\n"),
        ("COMMITLEVEL ON", "+OK\r\n"),
        ("COMMITLEVEL off", "+OK\r\n"),
        ("COMMITLEVEL default", "+OK\r\n"),
        ("COMMITLEVEL", "$12\r\nremote_flush\r\n"),
        ("COMMITLEVEL local", "+OK\r\n"),
        ("COMMITTIMEOUT 0", "+OK\r\n"),
        ("COMMITLEVEL", "$5\r\nlocal\r\n"),
        ("COMMITTIMEOUT", ":0\r\n"),
        ("COMMITTIMEOUT x", "-ERR timeout is not an integer or out of range\r\n"),
        ("COMMITLEVEL a b", "-ERR wrong number of arguments for 'commitlevel' command\r\n"),
    ] {
        assert_eq!(client.ask(&mut host, line), reply, "{line}");
    }
    assert!(client.ask(&mut host, "COMMITLEVEL most").starts_with("-ERR \"most\" is not a commit level"));
}

#[test]
fn leader_without_a_majority_answers_after_the_commit_timeout() {
    let (mut host, mut client) = pair();
    client.ask(&mut host, "COMMITTIMEOUT 100");
    // One is in the log when the lease ends, the next finds no space for what cannot be answered.
    client.send(&mut host, b"SET a 1\r\n");
    host.silent = Some("waiting for b, c".to_owned());
    host.refusal = Some(Refusal::Busy);
    client.send(&mut host, b"SET b 2\r\n");
    let deadline = client.session.deadline().expect("a deadline, at `local` too");
    assert_eq!(deadline, host.now() + Duration::from_millis(100));
    assert_eq!(client.resume(&mut host), "");
    host.pass(Duration::from_millis(100));
    let answers = client.resume(&mut host);
    let lsn = host.last_commit();
    assert_eq!(
        answers,
        format!(
            "-UNCERTAIN the commit at {lsn} is not confirmed: waiting for b, c\r\n-CLUSTERDOWN waiting for b, c\r\n"
        )
    );
    assert_eq!(host.log_end(), lsn, "what is told not to be done is not done");
    // Without a majority that is missing, a log that is full is waited for.
    host.silent = None;
    client.send(&mut host, b"SET c 3\r\n");
    host.pass(Duration::from_millis(100));
    assert_eq!(client.resume(&mut host), "");
    assert_eq!(client.session.deadline(), None);
    host.refusal = None;
    client.resume(&mut host);
    host.flush();
    client.session.release(&mut host);
    assert_eq!(client.output(), "+OK\r\n");
}

#[test]
fn remote_level_that_nobody_confirms_is_refused_to_the_session() {
    let (mut host, mut client) = pair();
    host.unconfirmable = Some("no sync policy".to_owned());
    for level in ["remote_write", "remote_flush", "on", "remote_apply"] {
        assert_eq!(client.ask(&mut host, &format!("COMMITLEVEL {level}")), "-NOREPLICAS no sync policy\r\n");
        assert_eq!(client.ask(&mut host, "COMMITLEVEL"), "$5\r\nlocal\r\n", "it stays as it was");
    }
    assert_eq!(client.ask(&mut host, "COMMITLEVEL off"), "+OK\r\n");
    let settings = SessionSettings { commit_level: Some(CommitLevel::RemoteFlush), ..SessionSettings::default() };
    let mut default = TestClient::with(&settings, 2);
    assert_eq!(default.ask(&mut host, "COMMITLEVEL local"), "+OK\r\n");
    assert_eq!(default.ask(&mut host, "COMMITLEVEL DEFAULT"), "-NOREPLICAS no sync policy\r\n");
    host.unconfirmable = None;
    assert_eq!(default.ask(&mut host, "COMMITLEVEL DEFAULT"), "+OK\r\n");
}

#[test]
fn remote_commit_is_uncertain_when_its_last_replica_is_removed() {
    let (mut host, mut client) = pair();
    client.ask(&mut host, "COMMITLEVEL remote_flush");
    client.send(&mut host, b"SET a 1\r\n");
    host.flush();
    client.session.release(&mut host);
    assert_eq!(client.output(), "", "a replica has to confirm it");
    // Nobody has to confirm anything from now on.
    (host.degraded, host.unconfirmable) =
        (Some(CommitLevel::Local), Some("this cluster has no other data member".to_owned()));
    client.session.release(&mut host);
    let reply = client.output();
    assert!(reply.starts_with("-UNCERTAIN the commit at "), "{reply}");
    assert!(reply.ends_with("is not confirmed: this cluster has no other data member\r\n"), "{reply}");
    let told = client.ask(&mut host, "COMMITINFO");
    assert!(told.contains("met\r\n$5\r\nlocal\r\n") && told.contains("confirmed\r\n:0\r\n"), "{told}");
}

#[test]
fn degraded_commit_tells_the_level_that_was_met() {
    let (mut host, mut client) = pair();
    client.ask(&mut host, "COMMITLEVEL remote_apply");
    host.degraded = Some(CommitLevel::Local);
    assert_eq!(client.ask(&mut host, "SET a 1"), "+OK\r\n");
    let told = client.ask(&mut host, "COMMITINFO");
    assert!(told.contains("level\r\n$12\r\nremote_apply\r\n$3\r\nmet\r\n$5\r\nlocal\r\n"), "{told}");
    assert!(told.contains("confirmed\r\n:0\r\n"), "{told}");
    host.degraded = Some(CommitLevel::Off);
    client.send(&mut host, b"SET a 2\r\n");
    client.session.release(&mut host);
    assert_eq!(client.output(), "+OK\r\n");
    let told = client.send(&mut host, b"COMMITINFO\r\n");
    assert!(told.contains("met\r\n$3\r\noff\r\n"), "{told}");
    // The replica is back.
    host.degraded = None;
    client.send(&mut host, b"SET a 3\r\n");
    host.flush();
    host.confirm(CommitLevel::RemoteWrite);
    host.confirm(CommitLevel::RemoteApply);
    client.session.release(&mut host);
    assert_eq!(client.output(), "+OK\r\n");
    let told = client.ask(&mut host, "COMMITINFO");
    assert!(told.contains("met\r\n$12\r\nremote_apply\r\n$9\r\nconfirmed\r\n:1\r\n"), "{told}");
}

#[test]
fn unconfirmed_commit_is_uncertain_once_durable_here() {
    let (mut host, mut client) = pair();
    client.ask(&mut host, "COMMITLEVEL remote_flush");
    client.ask(&mut host, "COMMITTIMEOUT 100");
    client.send(&mut host, b"SET a 1\r\nSET b 2\r\nPING\r\n");
    let end = host.log_end();
    let first = {
        // Both records have the same length, and the frame's header stands before the first.
        Lsn(64 + (end.0 - 64) / 2)
    };
    let deadline = client.session.deadline().expect("a deadline");
    assert_eq!(deadline, host.now() + Duration::from_millis(100));
    host.pass(Duration::from_millis(100));
    assert_eq!(client.resume(&mut host), "", "not durable here: neither yes nor uncertain");
    assert_eq!(client.session.deadline(), None, "the hold that was asked for ends the wait");
    assert_eq!(host.holds.last(), Some(&(CommitLevel::Local, first)));
    host.flush();
    client.session.release(&mut host);
    let uncertain = |lsn: Lsn| {
        format!("-UNCERTAIN committed locally at {lsn}, not confirmed by ANY 1 (b) at level remote_flush\r\n")
    };
    assert_eq!(client.output(), format!("{}{}+PONG\r\n", uncertain(first), uncertain(end)));
    assert!(client.ask(&mut host, "COMMITINFO").contains("met\r\n$5\r\nlocal\r\n$9\r\nconfirmed\r\n:0\r\n"));
    assert_eq!(client.ask(&mut host, "COMMITLEVEL local"), "+OK\r\n");
    assert_eq!(client.ask(&mut host, "GET a"), "$1\r\n1\r\n");
}

#[test]
fn a_node_that_stops_answers_what_it_does_not_know() {
    let (mut host, mut client) = pair();
    client.ask(&mut host, "SET z 0");
    client.send(&mut host, b"SET a 1\r\nGET a\r\nPING\r\n");
    client.session.abandon("write failed: EIO");
    let reply = client.output();
    let lines: Vec<&str> = reply.lines().collect();
    assert!(lines[0].starts_with("-UNCERTAIN the commit at 0/") && lines[0].ends_with("write failed: EIO"), "{reply}");
    assert!(lines[1].starts_with("-UNCERTAIN what was read is durable only at 0/"), "{reply}");
    assert_eq!(lines[2], "+PONG");
    host.refusal = Some(Refusal::Stopped("the log is stopped: write failed: EIO".to_owned()));
    assert_eq!(client.send(&mut host, b"SET a 1\r\n"), "-STOPPED the log is stopped: write failed: EIO\r\n");
}

#[test]
fn refusals_say_why() {
    let (mut host, mut client) = pair();
    let read_only = "-READONLY You can't write against a read only replica. The leader is";
    for (refusal, reply) in [
        (Refusal::ReadOnly { leader: Some("10.0.0.1:7000".to_owned()) }, format!("{read_only} 10.0.0.1:7000.\r\n")),
        (Refusal::ReadOnly { leader: None }, format!("{read_only} not known.\r\n")),
        (Refusal::NoSpace("the disk is full".to_owned()), "-NOSPACE the disk is full\r\n".to_owned()),
        (Refusal::NoReplicas("0 of 1 in sync".to_owned()), "-NOREPLICAS 0 of 1 in sync\r\n".to_owned()),
        (Refusal::TooLarge("too large".to_owned()), "-ERR too large\r\n".to_owned()),
    ] {
        host.refusal = Some(refusal);
        assert_eq!(client.send(&mut host, b"SET a 1\r\n"), reply);
        assert_eq!(client.send(&mut host, b"GET a\r\n"), "$-1\r\n");
    }
}

#[test]
fn a_busy_log_parks_the_session_and_loses_nothing() {
    let (mut host, mut client) = pair();
    host.refusal = Some(Refusal::Busy);
    assert_eq!(client.send(&mut host, b"PING\r\nSET a 1\r\nGET a\r\nSET "), "+PONG\r\n");
    assert_eq!(host.parked.get(&SessionId(1)), Some(&Wait::LogSpace));
    assert_eq!(client.send(&mut host, b"b 2\r\n"), "");
    assert_eq!(client.resume(&mut host), "", "still busy");
    host.refusal = None;
    assert_eq!(client.resume(&mut host), "");
    host.flush();
    client.session.release(&mut host);
    assert_eq!(client.output(), "+OK\r\n$1\r\n1\r\n+OK\r\n");
    host.refusal = Some(Refusal::Busy);
    assert_eq!(client.send(&mut host, b"MULTI\r\nINCR a\r\nEXEC\r\n"), "+OK\r\n+QUEUED\r\n");
    host.refusal = None;
    client.session.resume(&mut host);
    host.flush();
    client.session.release(&mut host);
    assert_eq!(client.output(), "*1\r\n:2\r\n");
}

#[test]
fn xread_waits_for_entries_that_are_durable() {
    let (mut host, mut reader) = pair();
    let mut writer = TestClient::with(&SessionSettings::default(), 2);
    assert_eq!(reader.send(&mut host, b"XREAD BLOCK 1000 STREAMS s t $ $\r\nPING\r\n"), "");
    assert_eq!(
        host.parked.get(&SessionId(1)),
        Some(&Wait::Streams(vec![(hash_of(b"s"), (0, 0)), (hash_of(b"t"), (0, 0))]))
    );
    writer.send(&mut host, b"XADD t 1-0 f v\r\n");
    assert_eq!(reader.resume(&mut host), "");
    host.flush();
    let entry = "*1\r\n*2\r\n$3\r\n1-0\r\n*2\r\n$1\r\nf\r\n$1\r\nv\r\n";
    assert_eq!(reader.resume(&mut host), format!("*1\r\n*2\r\n$1\r\nt\r\n{entry}+PONG\r\n"));
    assert!(host.parked.is_empty());
    assert_eq!(reader.send(&mut host, b"XREAD BLOCK 1000 STREAMS t $\r\n"), "");
    assert_eq!(reader.session.deadline(), Some(host.now() + Duration::from_secs(1)));
    host.pass(Duration::from_secs(1));
    assert_eq!(reader.resume(&mut host), "*-1\r\n");
    assert_eq!(reader.send(&mut host, b"XREAD BLOCK 0 STREAMS t $\r\n"), "");
    assert_eq!(reader.session.deadline(), None, "0 waits without end");
}

fn replica(flushed: Lsn, applied: Lsn) -> ReplicationRow {
    ReplicationRow {
        name: "b".to_owned(),
        address: "127.0.0.1:7001".to_owned(),
        state: "streaming".to_owned(),
        sent: flushed,
        written: flushed,
        flushed,
        applied,
        lag_bytes: 0,
        lag_us: 0,
        sync_state: "async".to_owned(),
        in_sync: true,
    }
}

#[test]
fn wait_and_waitaof_count_replicas() {
    let (mut host, mut client) = pair();
    host.rows = vec![replica(Lsn::ZERO, Lsn::ZERO), replica(Lsn::ZERO, Lsn::ZERO)];
    assert_eq!(client.ask(&mut host, "WAIT 2 0"), ":2\r\n", "nothing was written: nobody is behind");
    client.ask(&mut host, "SET a 1");
    let lsn = lsn_of(&mut host, &mut client);
    assert_eq!(client.send(&mut host, b"WAIT 1 100\r\nPING\r\n"), "");
    assert_eq!(host.parked.get(&SessionId(1)), Some(&Wait::Acknowledged));
    host.rows[0].flushed = lsn;
    assert_eq!(client.resume(&mut host), "", "flushed is not applied");
    host.rows[0].applied = lsn;
    assert_eq!(client.resume(&mut host), ":1\r\n+PONG\r\n");
    assert_eq!(client.send(&mut host, b"WAIT 2 100\r\n"), "");
    host.pass(Duration::from_millis(100));
    assert_eq!(client.resume(&mut host), ":1\r\n");
    assert_eq!(client.send(&mut host, b"WAITAOF 1 1 0\r\n"), "*2\r\n:1\r\n:1\r\n");
    assert_eq!(client.send(&mut host, b"COMMITLEVEL off\r\nSET a 2\r\nWAITAOF 1 0 100\r\n"), "+OK\r\n+OK\r\n");
    host.flush();
    assert_eq!(client.resume(&mut host), "*2\r\n:1\r\n:0\r\n");
    for (line, reply) in [
        ("WAIT x 1", "-ERR value is not an integer or out of range\r\n"),
        ("WAIT -1 1", "-ERR value is not an integer or out of range\r\n"),
        ("WAIT 1 x", "-ERR timeout is not an integer or out of range\r\n"),
        ("WAIT 1 -1", "-ERR timeout is negative\r\n"),
        ("WAITAOF 2 0 0", "-ERR value is out of range, must be between 0 and 1\r\n"),
    ] {
        assert_eq!(client.ask(&mut host, line), reply, "{line}");
    }
}

#[test]
fn waitlsn_returns_when_applied_or_says_that_it_is_not() {
    let (mut host, mut writer) = pair();
    let mut waiter = TestClient::with(&SessionSettings::default(), 2);
    writer.send(&mut host, b"SET a 1\r\n");
    let lsn = host.log_end();
    assert_eq!(waiter.send(&mut host, format!("WAITLSN {lsn} 50\r\n").as_bytes()), "");
    assert_eq!(host.parked.get(&SessionId(2)), Some(&Wait::Applied(lsn)));
    host.pass(Duration::from_millis(50));
    assert_eq!(waiter.resume(&mut host), format!("-TIMEOUT {lsn} is not applied here in time: applied is 0/0\r\n"));
    assert_eq!(waiter.send(&mut host, format!("WAITLSN {lsn} 0\r\n").as_bytes()), "");
    host.flush();
    assert_eq!(waiter.resume(&mut host), "+OK\r\n");
    assert_eq!(waiter.send(&mut host, format!("WAITLSN {lsn} 0\r\n").as_bytes()), "+OK\r\n");
    assert!(waiter.ask(&mut host, "WAITLSN x 0").starts_with("-ERR \"x\" is not an LSN"));
}

#[test]
fn a_password_is_asked_for() {
    let settings =
        SessionSettings { users: Rc::new(RefCell::new(Users::open(Some("secret")))), ..SessionSettings::default() };
    let mut host = TestHost::new();
    let no_auth = "-NOAUTH Authentication required.\r\n";
    let wrong = "-WRONGPASS invalid username-password pair or user is disabled.\r\n";
    let mut client = TestClient::with(&settings, 1);
    for (line, reply) in [
        ("PING", no_auth),
        ("GET a", no_auth),
        ("AUTH nope", wrong),
        ("AUTH secretsecret", wrong),
        ("AUTH \"\"", wrong),
        ("AUTH other secret", wrong),
        ("GET a", no_auth),
        ("AUTH secret", "+OK\r\n"),
        ("GET a", "$-1\r\n"),
    ] {
        let mut told = client.ask(&mut host, line);
        if reply == wrong {
            assert_eq!(told, "", "{line} is not answered at once");
            host.pass(login::DELAY_MAX);
            told = client.resume(&mut host);
        }
        assert_eq!(told, reply, "{line}");
    }
    let failed = client.session.take_failed_logins();
    assert_eq!((failed.count, failed.user), (4, None), "the last one named nobody");
    let mut client = TestClient::with(&settings, 2);
    assert!(client.ask(&mut host, "HELLO 3").starts_with("-NOAUTH HELLO must be called"));
    assert_eq!(client.ask(&mut host, "HELLO 3 AUTH default nope"), "");
    host.pass(login::DELAY);
    assert_eq!(client.resume(&mut host), wrong);
    assert_eq!(client.session.take_failed_logins().user.as_deref(), Some("default"));
    assert!(client.ask(&mut host, "HELLO 3 AUTH default secret SETNAME me").starts_with("%7\r\n"));
    assert_eq!(client.ask(&mut host, "GET a"), "_\r\n");
    let mut client = TestClient::with(&settings, 3);
    assert_eq!(client.ask(&mut host, "QUIT"), "+OK\r\n");
    assert!(client.session.closing());
    let mut client = TestClient::with(&settings, 4);
    assert_eq!(client.send(&mut host, b"*11\r\n"), "-ERR Protocol error: unauthenticated multibulk length\r\n");
}

fn with_users(text: &str) -> SessionSettings {
    let users = Users::parse(text, "users").expect("a right file");
    SessionSettings { users: Rc::new(RefCell::new(users)), ..SessionSettings::default() }
}

fn read_again(settings: &SessionSettings, text: &str) {
    settings.users.replace(Users::parse(text, "users").expect("a right file"));
}

#[test]
fn each_wrong_password_is_answered_later_than_the_one_before() {
    let settings = with_users("user default on >secret +@all");
    let (mut host, mut client) = (TestHost::new(), TestClient::with(&settings, 1));
    let wrong = format!("-{}\r\n", login::WRONG_PASSWORD);
    // One write with all guesses, and RESET in between: none is looked at before the one before is answered.
    let guesses = "AUTH a\r\nRESET\r\nAUTH b\r\nAUTH c\r\nAUTH secret\r\nECHO in\r\n";
    assert_eq!(client.send(&mut host, guesses.as_bytes()), "");
    let answers = [format!("{wrong}+RESET\r\n"), wrong.clone(), format!("{wrong}+OK\r\n$2\r\nin\r\n")];
    for (failures, told) in (0..).zip(answers) {
        assert_eq!(client.session.deadline(), Some(host.now() + login::delay(failures)));
        host.pass(login::delay(failures) - Duration::from_millis(1));
        assert_eq!(client.resume(&mut host), "", "after {failures} failures");
        host.pass(Duration::from_millis(1));
        assert_eq!(client.resume(&mut host), told);
    }
    assert_eq!(client.session.take_failed_logins().count, 3);
    assert_eq!(client.send(&mut host, b"AUTH d\r\n"), "");
    assert_eq!(client.session.deadline(), Some(host.now() + login::DELAY), "a right one in between forgives");
}

#[test]
fn salted_password_is_compared_by_another_thread() {
    let salted = SaltedHash::with_costs(b"secret", 8, 1, 1);
    let users = format!("user app on {salted} +@all -@admin");
    let settings = with_users(&users);
    let mut host = TestHost::new();
    let mut client = TestClient::with(&settings, 1);
    assert_eq!(client.send(&mut host, b"HELLO 3 AUTH app secret SETNAME me\r\nCLIENT GETNAME\r\nPROMOTE\r\n"), "");
    assert_eq!(host.parked[&SessionId(1)], Wait::Login);
    host.pass(login::DELAY_MAX);
    assert_eq!(client.resume(&mut host), "", "nothing is told before it is compared");
    host.checks.remove(0).run();
    let told = client.resume(&mut host);
    assert!(told.starts_with("%7\r\n") && told.contains("$2\r\nme\r\n"), "{told}");
    assert!(told.ends_with("-NOPERM User app has no permissions to run the 'promote' command\r\n"), "{told}");
    assert_eq!(client.ask(&mut host, "SET a 1"), "+OK\r\n");

    let mut again = TestClient::with(&settings, 2);
    assert_eq!(again.send(&mut host, b"AUTH app secret\r\n"), "+OK\r\n", "it is remembered");
    let mut wrong = TestClient::with(&settings, 3);
    assert_eq!(wrong.send(&mut host, b"AUTH app Secret\r\n"), "");
    host.checks.remove(0).run();
    assert_eq!(wrong.resume(&mut host), "", "a wrong one is compared soon and answered late");
    assert_eq!(wrong.session.take_failed_logins().user.as_deref(), Some("app"));
    host.pass(login::DELAY);
    assert_eq!(wrong.resume(&mut host), format!("-{}\r\n", login::WRONG_PASSWORD));

    // The users' file is read again while a comparison is under way.
    let mut late = TestClient::with(&settings, 4);
    read_again(&settings, &users);
    assert_eq!(late.send(&mut host, b"AUTH app secret\r\n"), "");
    read_again(&settings, "user app on >new +@all");
    host.checks.remove(0).run();
    host.pass(login::DELAY);
    assert_eq!(late.resume(&mut host), format!("-{}\r\n", login::WRONG_PASSWORD));

    // Too many wait: told late as well, and no failure.
    read_again(&settings, &users);
    let mut one_more = TestClient::with(&settings, 5);
    assert_eq!(one_more.send(&mut host, b"AUTH app secret\r\n"), "");
    host.checks.remove(0).leave_out();
    assert_eq!(one_more.resume(&mut host), "");
    host.pass(login::DELAY);
    assert_eq!(one_more.resume(&mut host), format!("-{}\r\n", login::BUSY));
    assert_eq!(one_more.session.take_failed_logins().count, 0);
}

#[test]
fn last_places_are_for_those_who_log_in_as_operators() {
    let users = "user app on >app +@all -@admin\nuser root on >root +@all\nuser default on nopass +@read";
    let settings = SessionSettings { places: Rc::new(Places::new(4)), ..with_users(users) };
    let mut host = TestHost::new();
    let mut taken: Vec<TestClient> = (0..3).map(|id| TestClient::with(&settings, id)).collect();
    assert!(taken.iter().all(|client| !client.session.closing()));
    assert!(TestClient::with(&settings, 3).session.closing(), "the default user finds none");
    // Whoever has a place may change its user.
    assert_eq!(taken[0].ask(&mut host, "AUTH app app"), "+OK\r\n");
    assert_eq!(taken[1].ask(&mut host, "AUTH root root"), "+OK\r\n");
    taken.pop();
    assert!(!TestClient::with(&settings, 4).session.closing(), "one is free again");
    read_again(&settings, &users.replace("default on", "default off"));
    let mut apps = [5, 6].map(|id| TestClient::with(&settings, id));
    assert_eq!(apps[0].ask(&mut host, "AUTH app app"), "+OK\r\n");
    assert_eq!(apps[1].ask(&mut host, "AUTH app app"), format!("-{}\r\n", login::NO_PLACE));
    assert!(apps[1].session.closing() && !apps[1].session.is_authenticated());
    assert_eq!(TestClient::with(&settings, 7).ask(&mut host, "AUTH root root"), "+OK\r\n");
}

#[test]
fn input_cut_anywhere_gives_the_same_replies() {
    let input: &[u8] = b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$4\r\n1\r\n2\r\nget a\r\n*1\r\n$5\r\nMULTI\r\nINCR n\r\n*1\r\n$4\r\nEXEC\r\nPING\r\n";
    let expected = "+OK\r\n$4\r\n1\r\n2\r\n+OK\r\n+QUEUED\r\n*1\r\n:1\r\n+PONG\r\n";
    let mut host = TestHost::new();
    for cut in 0..=input.len() {
        let mut client = TestClient::new();
        client.ask(&mut host, "DEL n");
        let mut output = client.send(&mut host, &input[..cut]);
        output += &client.send(&mut host, &input[cut..]);
        host.flush();
        client.session.release(&mut host);
        output += &client.output();
        assert_eq!(output, expected, "cut at {cut}");
    }
}

#[test]
fn a_protocol_error_is_told_after_what_went_before_and_closes() {
    let (mut host, mut client) = pair();
    assert_eq!(client.send(&mut host, b"SET a 1\r\n*1\r\nGET\r\nPING\r\n"), "");
    assert!(!client.session.closing(), "not before the held reply has left");
    assert!(!client.session.wants_input());
    host.flush();
    client.session.release(&mut host);
    assert_eq!(client.output(), "+OK\r\n-ERR Protocol error: expected '$', got 'G'\r\n");
    assert!(client.session.closing());
    assert_eq!(client.send(&mut host, b"PING\r\n"), "");
}

#[test]
fn values_up_to_the_bound_are_kept_and_larger_ones_refused() {
    let (mut host, mut client) = pair();
    let set = |length: usize| {
        let mut bytes = format!("*3\r\n$3\r\nSET\r\n$1\r\na\r\n${length}\r\n").into_bytes();
        bytes.resize(bytes.len() + length, b'v');
        [bytes, b"\r\n".to_vec()].concat()
    };
    for piece in set(VALUE_BYTES_MAX).chunks(100_000) {
        client.session.handle_input(piece, &mut host);
    }
    host.flush();
    client.session.release(&mut host);
    assert_eq!(client.output(), "+OK\r\n");
    assert_eq!(client.ask(&mut host, "STRLEN a"), format!(":{VALUE_BYTES_MAX}\r\n"));
    let mut output = String::new();
    for piece in set(VALUE_BYTES_MAX + 1).chunks(100_000) {
        output += &client.send(&mut host, piece);
    }
    assert_eq!(
        output,
        "-ERR too large: a key or value has at most 16777216 bytes, a command at most 25165824 bytes\r\n"
    );
    assert_eq!(client.ask(&mut host, "APPEND a x"), "-ERR too large: a value has at most 16777216 bytes\r\n");
    assert_eq!(client.ask(&mut host, "PING"), "+PONG\r\n");
    let gets = format!("MGET{}", " a".repeat(17));
    assert!(client.ask(&mut host, &gets).starts_with("-ERR the reply would be larger than 67108864 bytes"));
}

#[test]
fn a_client_that_does_not_read_is_not_executed_for() {
    let (mut host, mut client) = pair();
    client.ask(&mut host, &format!("SET a {}", "v".repeat(60_000)));
    let gets = b"GET a\r\n".repeat(1000);
    client.session.handle_input(&gets, &mut host);
    assert!(client.session.wants_input(), "a little more may come");
    client.session.handle_input(&b"PING\r\n".repeat(20_000), &mut host);
    assert!(!client.session.wants_input());
    let mut total = 0;
    loop {
        let taken = client.output().len();
        assert!(taken <= OUTPUT_BYTES_MAX + 70_000, "the output is bounded");
        total += taken;
        if !client.session.can_go_on() {
            break;
        }
        client.session.resume(&mut host);
    }
    assert_eq!(total, 1000 * (60_000 + "$60000\r\n\r\n".len()) + 20_000 * "+PONG\r\n".len());
    assert!(client.session.wants_input());
}

#[test]
fn unread_client_is_read_ahead_up_to_its_bound() {
    let (mut host, mut client) = pair();
    client.ask(&mut host, &format!("SET a {}", "v".repeat(60_000)));
    let gets = b"GET a\r\n".repeat(20_000);
    client.session.handle_input(&gets, &mut host);
    assert!(!client.session.wants_input());
    client.session.read_ahead(true);
    let mut kept = gets.len();
    while kept + gets.len() <= INPUT_UNREAD_BYTES_MAX {
        assert!(client.session.wants_input(), "{kept} bytes are kept");
        client.session.handle_input(&gets, &mut host);
        kept += gets.len();
    }
    assert_eq!(client.session.take_expelled(), None);
    assert!(client.session.buffered_bytes() > kept - gets.len(), "it is accounted for");
    client.session.read_ahead(false);
    assert!(!client.session.wants_input(), "it reads again: it has to take replies first");
    client.session.handle_input(&gets, &mut host);
    client.session.handle_input(&gets, &mut host);
    assert!(
        matches!(client.session.take_expelled(), Some(DisconnectReason::Unread(bytes)) if bytes > INPUT_UNREAD_BYTES_MAX)
    );
    assert!(!client.session.wants_input() && client.session.buffered_bytes() < 4 << 20);
}

#[test]
fn noise_never_panics_a_session() {
    let mut state = 0x2545_F491_4F6C_DD1Du64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as usize
    };
    let words = [
        "SET",
        "GET",
        "XADD",
        "XRANGE",
        "XREAD",
        "STREAMS",
        "BLOCK",
        "COUNT",
        "MULTI",
        "EXEC",
        "WATCH",
        "DEL",
        "SCAN",
        "a",
        "s",
        "*",
        "-",
        "+",
        "$",
        "0",
        "1-1",
        "(5",
        "99999999999999999999",
        "\"\"",
        "NX",
        "GET",
        "HELLO",
        "3",
        "WAIT",
        "CLIENT",
        "COMMITLEVEL",
        "off",
        "INFO",
        "APPEND",
        "INCRBY",
        "\u{0}",
        "CONFIG",
        "MATCH",
        "[^",
        "\\",
    ];
    let mut host = TestHost::new();
    for id in 0..300 {
        let mut client = TestClient::with(&SessionSettings::default(), id);
        for _ in 0..20 {
            let line: Vec<&str> = (0..1 + random() % 7).map(|_| words[random() % words.len()]).collect();
            client.session.handle_input(format!("{}\r\n", line.join(" ")).as_bytes(), &mut host);
            host.pass(Duration::from_secs(1));
            if random() % 3 == 0 {
                host.flush();
            }
            client.session.resume(&mut host);
            client.output();
        }
    }
}
