//! MULTI, EXEC and WATCH over a session: one record, all or nothing, and never over a value that changed.

use walferry_engine::epoch::EpochHistory;
use walferry_engine::lsn::{Epoch, Lsn};

use crate::session::client::SessionSettings;
use crate::session::command::transaction::APPENDED_TO_BYTES_MAX;
use crate::session::host::{Refusal, ReplicationRow};
use crate::session::resp::VALUE_BYTES_MAX;
use crate::session::test_host::{TestClient, TestHost};

fn pair() -> (TestHost, TestClient) {
    (TestHost::new(), TestClient::new())
}

#[test]
fn a_transaction_is_one_record_and_sees_itself() {
    let (mut host, mut client) = pair();
    client.ask(&mut host, "SET a 1");
    client.ask(&mut host, "XADD s 1-0 f v");
    let before = host.last_commit();
    for line in [
        "MULTI",
        "INCR a",
        "INCR a",
        "GET a",
        "APPEND a x",
        "GET a",
        "DEL a",
        "EXISTS a",
        "APPEND a y",
        "GET a",
        "SET n 1",
        "XADD s 2-0 f w",
        "XLEN s",
        "XRANGE s - + COUNT 2",
        "XREVRANGE s + - COUNT 1",
        "XREAD BLOCK 0 STREAMS s 1-0",
        "DBSIZE",
        "SCAN 0 MATCH n",
        "INCR s",
        "DEL s",
        "XADD s 0-1 f x",
        "XLEN s",
        "PING",
    ] {
        let reply = client.send(&mut host, format!("{line}\r\n").as_bytes());
        assert_eq!(reply, if line == "MULTI" { "+OK\r\n" } else { "+QUEUED\r\n" }, "{line}");
    }
    assert_eq!((host.pending_records(), host.last_commit()), (0, before), "nothing is appended before EXEC");
    assert_eq!(client.send(&mut host, b"EXEC\r\n"), "");
    assert_eq!(host.pending_records(), 1);
    host.flush();
    client.session.release(&mut host);
    let entry = |id: &str, value: &str| format!("*2\r\n$3\r\n{id}\r\n*2\r\n$1\r\nf\r\n$1\r\n{value}\r\n");
    let (first, second) = (entry("1-0", "v"), entry("2-0", "w"));
    assert_eq!(
        client.output(),
        format!(
            "*22\r\n:2\r\n:3\r\n$1\r\n3\r\n:2\r\n$2\r\n3x\r\n:1\r\n:0\r\n:1\r\n$1\r\ny\r\n+OK\r\n$3\r\n2-0\r\n:2\r\n\
             *2\r\n{first}{second}*1\r\n{second}*1\r\n*2\r\n$1\r\ns\r\n*1\r\n{second}:3\r\n*2\r\n$1\r\n0\r\n*1\r\n$1\r\nn\r\n\
             -WRONGTYPE Operation against a key holding the wrong kind of value\r\n:1\r\n$3\r\n0-1\r\n:1\r\n+PONG\r\n"
        )
    );
    assert_eq!(client.ask(&mut host, "MGET a n"), "*2\r\n$1\r\ny\r\n$1\r\n1\r\n");
    assert_eq!(client.ask(&mut host, "XRANGE s - +"), format!("*1\r\n{}", entry("0-1", "x")));
}

#[test]
fn transaction_with_an_error_is_refused() {
    let (mut host, mut client) = pair();
    let aborted = "-EXECABORT Transaction discarded because of previous errors.\r\n";
    for (line, reply) in [
        ("EXEC", "-ERR EXEC without MULTI\r\n"),
        ("DISCARD", "-ERR DISCARD without MULTI\r\n"),
        ("MULTI", "+OK\r\n"),
        ("MULTI", "-ERR MULTI calls can not be nested\r\n"),
        ("WATCH a", "-ERR WATCH inside MULTI is not allowed\r\n"),
        ("SET a 1", "+QUEUED\r\n"),
        ("DISCARD", "+OK\r\n"),
        ("GET a", "$-1\r\n"),
        ("MULTI", "+OK\r\n"),
        ("SET a 1", "+QUEUED\r\n"),
        ("SET a", "-ERR wrong number of arguments for 'set' command\r\n"),
        ("EXEC", aborted),
        ("MULTI", "+OK\r\n"),
        ("NOPE", "-ERR unknown command 'NOPE', with args beginning with: \r\n"),
        ("SET a 1", "+QUEUED\r\n"),
        ("EXEC", aborted),
        ("MULTI", "+OK\r\n"),
        ("WAIT 1 0", "-ERR WAIT is not allowed in a transaction\r\n"),
        ("EXEC", aborted),
        ("GET a", "$-1\r\n"),
        ("MULTI", "+OK\r\n"),
        ("EXEC", "*0\r\n"),
    ] {
        assert_eq!(client.ask(&mut host, line), reply, "{line}");
    }
    client.ask(&mut host, "MULTI");
    client.ask(&mut host, "SET a 1");
    host.refusal = Some(Refusal::NoReplicas("0 of 1 in sync".to_owned()));
    assert_eq!(
        client.ask(&mut host, "EXEC"),
        "-EXECABORT Transaction discarded because of: NOREPLICAS 0 of 1 in sync\r\n"
    );
    client.ask(&mut host, "MULTI");
    assert_eq!(client.ask(&mut host, "SET a 1"), "-NOREPLICAS 0 of 1 in sync\r\n");
    assert_eq!(client.ask(&mut host, "EXEC"), aborted);
    client.ask(&mut host, "MULTI");
    client.ask(&mut host, "GET a");
    assert_eq!(client.ask(&mut host, "EXEC"), "*1\r\n$-1\r\n", "reading is allowed where writing is not");
}

#[test]
fn watch_makes_exec_depend_on_the_newest_version() {
    let (mut host, mut client) = pair();
    let mut other = TestClient::with(&SessionSettings::default(), 2);
    client.ask(&mut host, "SET a 1");
    // Somebody else's change, pending or durable, aborts.
    client.ask(&mut host, "WATCH a b");
    other.send(&mut host, b"SET b 1\r\n");
    client.ask(&mut host, "MULTI");
    client.ask(&mut host, "INCR a");
    assert_eq!(client.ask(&mut host, "EXEC"), "*-1\r\n");
    // EXEC forgot the watched keys; so do UNWATCH and DISCARD.
    for forget in ["PING", "UNWATCH", "DISCARD"] {
        if forget != "PING" {
            client.ask(&mut host, "WATCH a");
        }
        if forget == "DISCARD" {
            client.ask(&mut host, "MULTI");
        }
        client.ask(&mut host, forget);
        other.ask(&mut host, "SET a 1");
        client.ask(&mut host, "MULTI");
        client.ask(&mut host, "INCR a");
        assert_eq!(client.ask(&mut host, "EXEC"), "*1\r\n:2\r\n", "after {forget}");
    }
    // A change that was pending at WATCH: the reads that follow see it, so EXEC may succeed.
    other.send(&mut host, b"SET a 10\r\n");
    assert_eq!(client.send(&mut host, b"WATCH a\r\nGET a\r\n"), "+OK\r\n");
    host.flush();
    client.session.release(&mut host);
    assert_eq!(client.output(), "$2\r\n10\r\n");
    client.ask(&mut host, "MULTI");
    client.ask(&mut host, "INCR a");
    assert_eq!(client.ask(&mut host, "EXEC"), "*1\r\n:11\r\n");
    // Deleting a key is a change too.
    client.ask(&mut host, "WATCH a");
    other.ask(&mut host, "DEL a");
    client.ask(&mut host, "MULTI");
    client.ask(&mut host, "INCR a");
    assert_eq!(client.ask(&mut host, "EXEC"), "*-1\r\n");
}

#[test]
fn watch_of_an_lsn_that_a_later_epoch_reused_fails_exec() {
    let (mut host, mut client) = pair();
    client.ask(&mut host, "SET a 1");
    assert_eq!(client.ask(&mut host, "WATCH a"), "+OK\r\n");
    // The commit was cut off in a failover, and the next leader's change of the key ends at the same LSN.
    host.history = EpochHistory::from_entries(&[(Epoch(7), Lsn::ZERO), (Epoch(8), Lsn(1))]).expect("ascending");
    client.ask(&mut host, "MULTI");
    client.ask(&mut host, "SET a 2");
    assert_eq!(client.ask(&mut host, "EXEC"), "*-1\r\n");
    assert_eq!(client.ask(&mut host, "GET a"), "$1\r\n1\r\n");
    // What an older epoch wrote is still what it was after another epoch began behind it.
    assert_eq!(client.ask(&mut host, "WATCH a"), "+OK\r\n");
    let end = host.last_commit().advance(4096);
    let entries = [(Epoch(7), Lsn::ZERO), (Epoch(8), Lsn(1)), (Epoch(9), end)];
    host.history = EpochHistory::from_entries(&entries).expect("ascending");
    client.ask(&mut host, "MULTI");
    client.ask(&mut host, "SET a 3");
    assert_eq!(client.ask(&mut host, "EXEC"), "*1\r\n+OK\r\n");
}

#[test]
fn watched_key_that_came_and_went_fails_exec() {
    let (mut host, mut client) = pair();
    let mut other = TestClient::with(&SessionSettings::default(), 2);
    client.ask(&mut host, "SET else 1");
    for (flushed, result) in [(false, "*-1\r\n"), (true, "*-1\r\n")] {
        assert_eq!(client.ask(&mut host, "WATCH a"), "+OK\r\n");
        for line in ["SET a 1", "DEL a"] {
            if flushed {
                other.ask(&mut host, line);
            } else {
                other.send(&mut host, format!("{line}\r\n").as_bytes());
            }
        }
        client.ask(&mut host, "MULTI");
        client.ask(&mut host, "SET b 1");
        assert_eq!(client.ask(&mut host, "EXEC"), result, "flushed: {flushed}");
    }
    // It was deleted before it was watched, and other keys changed since.
    assert_eq!(client.ask(&mut host, "WATCH a never"), "+OK\r\n");
    other.ask(&mut host, "SET c 1");
    other.ask(&mut host, "DEL c");
    client.ask(&mut host, "MULTI");
    client.ask(&mut host, "SET b 1");
    assert_eq!(client.ask(&mut host, "EXEC"), "*1\r\n+OK\r\n");
}

#[test]
fn quit_and_refused_select_end_a_transaction_unexecuted() {
    for (line, reply) in [("QUIT", "+OK\r\n"), ("SELECT 1", "-ERR DB index is out of range\r\n")] {
        let (mut host, mut client) = pair();
        client.ask(&mut host, "MULTI");
        client.ask(&mut host, "SET a 1");
        let batch = format!("{line}\r\nSET b 1\r\nEXEC\r\n");
        assert_eq!(client.send(&mut host, batch.as_bytes()), reply);
        assert!(client.session.closing());
        assert_eq!(host.pending_records(), 0, "nothing after {line} is executed");
    }
    let (mut host, mut client) = pair();
    client.ask(&mut host, "MULTI");
    assert_eq!(client.ask(&mut host, "SELECT 0"), "+QUEUED\r\n");
    assert_eq!(client.ask(&mut host, "EXEC"), "*1\r\n+OK\r\n");
}

#[test]
fn wait_and_commitinfo_of_a_commit_cut_off_are_refused() {
    let (mut host, mut client) = pair();
    client.ask(&mut host, "SET a 1");
    assert!(client.ask(&mut host, "COMMITINFO").contains("$5\r\nepoch\r\n:7\r\n"));
    assert_eq!(client.send(&mut host, b"WAIT 1 0\r\n"), "", "no replica has it: the session waits");
    let cut_off = EpochHistory::from_entries(&[(Epoch(7), Lsn::ZERO), (Epoch(8), Lsn(1))]).expect("ascending");
    host.history = cut_off;
    // A replica confirms what stands at the same LSN now.
    let end = host.last_commit().advance(4096);
    host.rows = vec![ReplicationRow { name: "b".to_owned(), applied: end, flushed: end, ..ReplicationRow::default() }];
    assert!(client.resume(&mut host).starts_with("-LOST "));
    assert!(client.ask(&mut host, "COMMITINFO").starts_with("-LOST "));
    assert!(client.ask(&mut host, "WAITAOF 1 0 0").starts_with("-LOST "));
}

#[test]
fn transaction_that_appends_to_many_large_values_is_refused() {
    let (mut host, mut client) = pair();
    let value = "v".repeat(VALUE_BYTES_MAX - 100);
    let fits = APPENDED_TO_BYTES_MAX / value.len();
    for key in 0..=fits {
        let set = format!("*3\r\n$3\r\nSET\r\n$2\r\nk{key}\r\n${}\r\n{value}\r\n", value.len());
        client.send(&mut host, set.as_bytes());
        host.flush();
        client.session.release(&mut host);
        assert_eq!(client.output(), "+OK\r\n");
    }
    let before = host.last_commit();
    let append = |host: &mut TestHost, client: &mut TestClient, keys: usize| {
        client.ask(host, "MULTI");
        for key in 0..keys {
            client.ask(host, &format!("APPEND k{key} x"));
            // The same value again costs nothing.
            client.ask(host, &format!("APPEND k{key} y"));
        }
        client.ask(host, "EXEC")
    };
    let refused = append(&mut host, &mut client, fits + 1);
    assert!(refused.starts_with("-EXECABORT") && refused.contains("128 MiB"), "{refused}");
    assert_eq!((host.pending_records(), host.last_commit()), (0, before), "nothing was logged");
    assert_eq!(client.ask(&mut host, "STRLEN k0"), format!(":{}\r\n", value.len()));
    let taken = append(&mut host, &mut client, fits);
    assert!(taken.starts_with(&format!("*{}\r\n:{}\r\n", 2 * fits, value.len() + 1)), "{}", &taken[..60]);
}
