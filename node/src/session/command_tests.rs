//! Every command: what goes in, and the exact bytes that come out. The bytes were compared with redis-server 7.0's.

use std::time::Duration;

use redis_protocol::resp2::decode::decode as decode2;
use redis_protocol::resp3::decode::complete::decode as decode3;
use serde_json::json;
use walferry_engine::lsn::{Epoch, Lsn};

use crate::metrics::text;
use crate::session::host::{Following, NodeRole, ReplicationRow};
use crate::session::test_host::{TestClient, TestHost};

/// Says the lines one after the other, each with its reply.
fn check(host: &mut TestHost, client: &mut TestClient, table: &[(&str, &str)]) {
    for (line, expected) in table {
        assert_eq!(client.ask(host, line), *expected, "{line}");
    }
}

fn check_fresh(table: &[(&str, &str)]) {
    check(&mut TestHost::new(), &mut TestClient::new(), table);
}

const WRONG_TYPE: &str = "-WRONGTYPE Operation against a key holding the wrong kind of value\r\n";
const NOT_AN_INTEGER: &str = "-ERR value is not an integer or out of range\r\n";
const INVALID_ID: &str = "-ERR Invalid stream ID specified as stream command argument\r\n";
const SMALL_ID: &str = "-ERR The ID specified in XADD is equal or smaller than the target stream top item\r\n";
const SYNTAX: &str = "-ERR syntax error\r\n";

#[test]
fn strings() {
    check_fresh(&[
        ("GET a", "$-1\r\n"),
        ("SET a 1", "+OK\r\n"),
        ("get a", "$1\r\n1\r\n"),
        ("SET a \"x y\\r\\n\"", "+OK\r\n"),
        ("GET a", "$5\r\nx y\r\n\r\n"),
        ("SET a 2 NX", "$-1\r\n"),
        ("SET a 2 xx", "+OK\r\n"),
        ("SET b 1 XX", "$-1\r\n"),
        ("SET b 1 XX GET", "$-1\r\n"),
        ("GET b", "$-1\r\n"),
        ("SET b 1 NX GET", "$-1\r\n"),
        ("SET b 2 NX GET", "$1\r\n1\r\n"),
        ("SET b 3 GET", "$1\r\n1\r\n"),
        ("SET b 3 NX XX", SYNTAX),
        ("SET b 3 FOO", SYNTAX),
        ("SET b 3 ex 10", "-ERR option EX of SET is not supported\r\n"),
        ("SET b 3 PX 10", "-ERR option PX of SET is not supported\r\n"),
        ("SET b 3 KEEPTTL", "-ERR option KEEPTTL of SET is not supported\r\n"),
        ("MGET a b c a", "*4\r\n$1\r\n2\r\n$1\r\n3\r\n$-1\r\n$1\r\n2\r\n"),
        ("MSET a 1 b 2 a 3", "+OK\r\n"),
        ("MGET a b", "*2\r\n$1\r\n3\r\n$1\r\n2\r\n"),
        ("MSET a 1 b", "-ERR wrong number of arguments for 'mset' command\r\n"),
        ("SETNX a 9", ":0\r\n"),
        ("SETNX c 9", ":1\r\n"),
        ("GETDEL c", "$1\r\n9\r\n"),
        ("GETDEL c", "$-1\r\n"),
        ("STRLEN a", ":1\r\n"),
        ("STRLEN c", ":0\r\n"),
        ("APPEND c abc", ":3\r\n"),
        ("APPEND c \"\"", ":3\r\n"),
        ("APPEND c de", ":5\r\n"),
        ("GET c", "$5\r\nabcde\r\n"),
        ("INCR c", NOT_AN_INTEGER),
        ("INCR n", ":1\r\n"),
        ("INCRBY n 41", ":42\r\n"),
        ("DECR n", ":41\r\n"),
        ("DECRBY n 42", ":-1\r\n"),
        ("GET n", "$2\r\n-1\r\n"),
        ("INCRBY n 1x", NOT_AN_INTEGER),
        ("INCRBY n +1", NOT_AN_INTEGER),
        ("INCRBY n 01", NOT_AN_INTEGER),
        ("INCRBY n -", NOT_AN_INTEGER),
        ("SET n 9223372036854775807", "+OK\r\n"),
        ("INCR n", "-ERR increment or decrement would overflow\r\n"),
        ("DECRBY n -9223372036854775808", "-ERR decrement would overflow\r\n"),
        ("INCRBY n -9223372036854775808", ":-1\r\n"),
    ]);
}

#[test]
fn keys() {
    check_fresh(&[
        ("DBSIZE", ":0\r\n"),
        ("SCAN 0", "*2\r\n$1\r\n0\r\n*0\r\n"),
        ("MSET a 1 b 2", "+OK\r\n"),
        ("XADD s 1-1 f v", "$3\r\n1-1\r\n"),
        ("DBSIZE", ":3\r\n"),
        ("EXISTS a s a zz", ":3\r\n"),
        ("SCAN 0 MATCH [a-b] TYPE stream", "*2\r\n$1\r\n0\r\n*0\r\n"),
        ("SCAN 0 TYPE STREAM COUNT 100", "*2\r\n$1\r\n0\r\n*1\r\n$1\r\ns\r\n"),
        ("SCAN 0 MATCH ? COUNT 100 match b", "*2\r\n$1\r\n0\r\n*1\r\n$1\r\nb\r\n"),
        ("SCAN x", "-ERR invalid cursor\r\n"),
        ("SCAN 0 COUNT 0", SYNTAX),
        ("SCAN 0 COUNT x", NOT_AN_INTEGER),
        ("SCAN 0 MATCH", SYNTAX),
        ("SCAN 0 FOO 1", SYNTAX),
        ("DEL a a zz", ":1\r\n"),
        ("DEL a b s", ":2\r\n"),
        ("DBSIZE", ":0\r\n"),
        ("XLEN s", ":0\r\n"),
        ("XADD s 1-1 f v", "$3\r\n1-1\r\n"),
        ("SET s 1", "+OK\r\n"),
        ("GET s", "$1\r\n1\r\n"),
    ]);
}

#[test]
fn scan_visits_every_key_once() {
    let (mut host, mut client) = (TestHost::new(), TestClient::new());
    for key in 0..100 {
        client.ask(&mut host, &format!("SET key:{key} v"));
    }
    let (mut cursor, mut found) = ("0".to_owned(), Vec::new());
    for round in 0.. {
        assert!(round < 100, "SCAN does not end");
        let reply = client.ask(&mut host, &format!("SCAN {cursor} COUNT 7"));
        let mut words = reply.split("\r\n").filter(|word| !word.starts_with(['*', '$']) && !word.is_empty());
        cursor = words.next().expect("a cursor").to_owned();
        found.extend(words.map(str::to_owned));
        if cursor == "0" {
            break;
        }
    }
    found.sort();
    let mut expected: Vec<String> = (0..100).map(|key| format!("key:{key}")).collect();
    expected.sort();
    assert_eq!(found, expected);
}

#[test]
fn streams() {
    let entry = |id: &str| format!("*2\r\n${}\r\n{id}\r\n*2\r\n$1\r\nf\r\n$1\r\nv\r\n", id.len());
    let (a, b, c) = (entry("5-5"), entry("5-6"), entry("7-0"));
    let (all, last_two, first_two) = (format!("*3\r\n{a}{b}{c}"), format!("*2\r\n{b}{c}"), format!("*2\r\n{a}{b}"));
    let reversed = format!("*3\r\n{c}{b}{a}");
    let one = |entry: &str| format!("*1\r\n{entry}");
    let read = |entries: &str| format!("*1\r\n*2\r\n$1\r\ns\r\n{entries}");
    check_fresh(&[
        ("XLEN s", ":0\r\n"),
        ("XRANGE s - +", "*0\r\n"),
        ("XADD s 0-0 f v", "-ERR The ID specified in XADD must be greater than 0-0\r\n"),
        ("XADD s 0 f v", "-ERR The ID specified in XADD must be greater than 0-0\r\n"),
        ("XADD s x f v", INVALID_ID),
        ("XADD s 5- f v", INVALID_ID),
        ("XADD s 18446744073709551616-1 f v", INVALID_ID),
        ("XADD s 5-5 f v", "$3\r\n5-5\r\n"),
        ("XADD s 5-5 f v", SMALL_ID),
        ("XADD s 4-* f v", SMALL_ID),
        ("XADD s 5-* f v", "$3\r\n5-6\r\n"),
        ("XADD s 7-* f v", "$3\r\n7-0\r\n"),
        ("XADD s 8 f", "-ERR wrong number of arguments for 'xadd' command\r\n"),
        ("XADD s 8 f v g", "-ERR wrong number of arguments for 'xadd' command\r\n"),
        ("XADD s MAXLEN 1 * f v", "-ERR option MAXLEN of XADD is not supported\r\n"),
        ("XADD s nomkstream 9 f v", "-ERR option NOMKSTREAM of XADD is not supported\r\n"),
        ("XLEN s", ":3\r\n"),
        ("XRANGE s - +", &all),
        ("XRANGE s 5 5", &first_two),
        ("XRANGE s (5-5 +", &last_two),
        ("XRANGE s - (7-0", &first_two),
        ("XRANGE s - + COUNT 1", &one(&a)),
        ("XRANGE s - + COUNT 0", "*-1\r\n"),
        ("XRANGE s 7 5", "*0\r\n"),
        ("XRANGE s 8 9", "*0\r\n"),
        ("XREVRANGE s + -", &reversed),
        ("XREVRANGE s (7-0 - COUNT 1", &one(&b)),
        ("XREVRANGE s + (5-6 COUNT 9", &one(&c)),
        ("XRANGE s x +", INVALID_ID),
        ("XRANGE s (- +", INVALID_ID),
        ("XRANGE s (18446744073709551615-18446744073709551615 +", "-ERR invalid start ID for the interval\r\n"),
        ("XRANGE s - (0-0", "-ERR invalid end ID for the interval\r\n"),
        ("XRANGE s - + COUNT", SYNTAX),
        ("XRANGE s - + FOO 1", SYNTAX),
        ("XRANGE s - + COUNT x", NOT_AN_INTEGER),
        ("XREAD STREAMS s 5-6", &read(&one(&c))),
        ("XREAD COUNT 2 STREAMS s zz 0 0", &read(&first_two)),
        ("XREAD STREAMS s $", "*-1\r\n"),
        ("XREAD STREAMS zz 0", "*-1\r\n"),
        ("XREAD STREAMS s 18446744073709551615-18446744073709551615", "*-1\r\n"),
        ("XREAD STREAMS s", "-ERR wrong number of arguments for 'xread' command\r\n"),
        (
            "XREAD COUNT 1 STREAMS s",
            "-ERR Unbalanced XREAD list of streams: for each stream key an ID or '$' must be specified.\r\n",
        ),
        ("XREAD STREAMS s x", INVALID_ID),
        ("XREAD COUNT x STREAMS s 0", NOT_AN_INTEGER),
        ("XREAD BLOCK -1 STREAMS s 0", "-ERR timeout is negative\r\n"),
        ("XREAD BLOCK x STREAMS s 0", "-ERR timeout is not an integer or out of range\r\n"),
        ("XREAD GROUP g c STREAMS s 0", "-ERR option GROUP of XREAD is not supported\r\n"),
        ("XREAD FOO 1 STREAMS s 0", SYNTAX),
        ("XREAD BLOCK 100 STREAMS s 5-6", &read(&one(&c))),
        ("XADD t * f v", "$15\r\n1700000000123-0\r\n"),
        ("XADD t * f v", "$15\r\n1700000000123-1\r\n"),
        (
            "XADD t 18446744073709551615-18446744073709551614 f v",
            "$41\r\n18446744073709551615-18446744073709551614\r\n",
        ),
        ("XADD t * f v", "$41\r\n18446744073709551615-18446744073709551615\r\n"),
        ("XADD t * f v", "-ERR The stream has exhausted the last possible ID, unable to add more items\r\n"),
        ("XADD e 0-* f v", "$3\r\n0-1\r\n"),
    ]);
}

#[test]
fn a_key_of_the_other_kind_is_refused() {
    let (mut host, mut client) = (TestHost::new(), TestClient::new());
    check(&mut host, &mut client, &[("SET a 1", "+OK\r\n"), ("XADD s 1-0 f v", "$3\r\n1-0\r\n")]);
    for line in ["GET s", "GETDEL s", "APPEND s x", "STRLEN s", "INCR s", "SET s 1 GET", "XADD a * f v", "XLEN a"] {
        assert_eq!(client.ask(&mut host, line), WRONG_TYPE, "{line}");
    }
    for line in ["XRANGE a - +", "XREVRANGE a + -", "XREAD STREAMS a 0", "XREAD BLOCK 10 STREAMS a $"] {
        assert_eq!(client.ask(&mut host, line), WRONG_TYPE, "{line}");
    }
    assert_eq!(client.ask(&mut host, "MGET s a"), "*2\r\n$-1\r\n$1\r\n1\r\n");
}

#[test]
fn the_connection() {
    let hello = |proto: u32| {
        format!(
            "*14\r\n$6\r\nserver\r\n$5\r\nredis\r\n$7\r\nversion\r\n$5\r\n7.0.0\r\n$5\r\nproto\r\n:{proto}\r\n$2\r\nid\r\n:1\r\n\
             $4\r\nmode\r\n$10\r\nstandalone\r\n$4\r\nrole\r\n$6\r\nmaster\r\n$7\r\nmodules\r\n*0\r\n"
        )
    };
    check_fresh(&[
        ("PING", "+PONG\r\n"),
        ("ping hi", "$2\r\nhi\r\n"),
        ("PING a b", "-ERR wrong number of arguments for 'ping' command\r\n"),
        ("ECHO hi", "$2\r\nhi\r\n"),
        ("ECHO", "-ERR wrong number of arguments for 'echo' command\r\n"),
        ("NOPE a b", "-ERR unknown command 'NOPE', with args beginning with: 'a' 'b' \r\n"),
        ("SELECT 0", "+OK\r\n"),
        ("CLIENT ID", ":1\r\n"),
        ("CLIENT GETNAME", "$-1\r\n"),
        ("CLIENT SETNAME me", "+OK\r\n"),
        ("CLIENT GETNAME", "$2\r\nme\r\n"),
        ("CLIENT SETNAME", "-ERR wrong number of arguments for 'client|setname' command\r\n"),
        ("CLIENT SETNAME \"a b\"", "-ERR Client names cannot contain spaces, newlines or special characters.\r\n"),
        ("CLIENT SETINFO LIB-NAME x", "+OK\r\n"),
        ("CLIENT SETINFO foo x", "-ERR Unrecognized option 'foo'\r\n"),
        ("CLIENT NOPE", "-ERR unknown subcommand 'NOPE'. CLIENT NOPE is not supported.\r\n"),
        ("HELLO 4", "-NOPROTO unsupported protocol version\r\n"),
        ("HELLO x", "-ERR Protocol version is not an integer or out of range\r\n"),
        ("HELLO 2 FOO", "-ERR Syntax error in HELLO option 'FOO'\r\n"),
        ("HELLO", &hello(2)),
        ("HELLO 3", &hello(3).replacen("*14", "%7", 1)),
        ("HELLO 2 SETNAME you", &hello(2)),
        ("CLIENT GETNAME", "$3\r\nyou\r\n"),
        (
            "AUTH x",
            "-ERR AUTH <password> called without any password configured for the default user. \
             Are you sure your configuration is correct?\r\n",
        ),
        ("AUTH default x", "+OK\r\n"),
        ("AUTH a b c", SYNTAX),
        ("TIME", "*2\r\n$10\r\n1700000000\r\n$6\r\n123456\r\n"),
        ("QUIT", "+OK\r\n"),
    ]);
    check_fresh(&[("SELECT x", NOT_AN_INTEGER)]);
}

#[test]
fn refused_select_closes_the_connection() {
    let mut host = TestHost::new();
    let mut client = TestClient::new();
    let batch = b"SELECT 1\r\nSET a 1\r\n";
    assert_eq!(client.send(&mut host, batch), "-ERR DB index is out of range\r\n");
    assert!(client.session.closing());
    assert_eq!(host.pending_records(), 0, "what was meant for another database is written into none");
}

#[test]
fn the_server() {
    let (mut host, mut client) = (TestHost::new(), TestClient::new());
    check(
        &mut host,
        &mut client,
        &[
            ("CONFIG GET save", "*2\r\n$4\r\nsave\r\n$0\r\n\r\n"),
            ("CONFIG GET appendonly", "*2\r\n$10\r\nappendonly\r\n$3\r\nyes\r\n"),
            ("CONFIG GET COMMIT*", "*2\r\n$12\r\ncommit_level\r\n$5\r\nlocal\r\n"),
            ("CONFIG GET zz", "*0\r\n"),
            ("CONFIG GET", "-ERR wrong number of arguments for 'config|get' command\r\n"),
            ("CONFIG SET a b", "-ERR unknown subcommand 'SET'. CONFIG SET is not supported.\r\n"),
            ("COMMAND COUNT", &format!(":{}\r\n", crate::session::command::table::COMMANDS.len())),
            (
                "COMMAND INFO get zz",
                "*2\r\n*10\r\n$3\r\nget\r\n:2\r\n*2\r\n+readonly\r\n+fast\r\n:1\r\n:1\r\n:1\r\n*0\r\n*0\r\n*0\r\n*0\r\n$-1\r\n",
            ),
            (
                "COMMAND DOCS get zz",
                "*2\r\n$3\r\nget\r\n*6\r\n$7\r\nsummary\r\n$33\r\nReturns the string value of a key\r\n$5\r\nsince\r\n\
                 $5\r\n1.0.0\r\n$5\r\ngroup\r\n$6\r\nstring\r\n",
            ),
            ("COMMAND NOPE", "-ERR unknown subcommand 'NOPE'. COMMAND NOPE is not supported.\r\n"),
            ("INFO flush", "$20\r\n# Flush\r\nflushes:3\r\n\r\n"),
            ("SET a 1", "+OK\r\n"),
            ("INFO keyspace", "$44\r\n# Keyspace\r\ndb0:keys=1,expires=0,avg_ttl=0\r\n\r\n"),
            ("INFO nope", "$0\r\n\r\n"),
            ("PROMOTE", "-ERR this node leads already\r\n"),
        ],
    );
    let info = client.ask(&mut host, "INFO");
    for line in ["# Server", "redis_version:7.0.0", "role:master", "connected_slaves:0", "flushed_lsn:0/0", "flushes:3"]
    {
        assert!(info.contains(&format!("\r\n{line}\r\n")), "{line} in {info}");
    }
    let count = crate::session::command::table::COMMANDS.len();
    for (line, expected) in [
        ("COMMAND", format!("*{count}\r\n*10\r\n$3\r\nset\r\n:-3\r\n")),
        ("COMMAND LIST", format!("*{count}\r\n$3\r\nset\r\n")),
        ("COMMAND DOCS", format!("*{}\r\n$3\r\nset\r\n*6\r\n", 2 * count)),
    ] {
        assert!(client.ask(&mut host, line).starts_with(&expected), "{line} should begin with {expected:?}");
    }
}

fn row() -> ReplicationRow {
    ReplicationRow {
        name: "b".to_owned(),
        address: "127.0.0.1:7001".to_owned(),
        state: "streaming".to_owned(),
        sent: Lsn(0x40),
        written: Lsn(0x30),
        flushed: Lsn(0x20),
        applied: Lsn(0x10),
        lag_bytes: 48,
        lag_us: 1500,
        sync_state: "sync".to_owned(),
        in_sync: true,
    }
}

#[test]
fn the_leader_tells_of_its_replicas() {
    let (mut host, mut client) = (TestHost::new(), TestClient::new());
    host.rows.push(row());
    host.facts.flushed = Lsn(0x40);
    let lsns = "*8\r\n$11\r\nwritten_lsn\r\n$3\r\n0/0\r\n$11\r\nflushed_lsn\r\n$4\r\n0/40\r\n$11\r\napplied_lsn\r\n$3\r\n0/0\r\n\
                $13\r\ncommitted_lsn\r\n$3\r\n0/0\r\n";
    let role = "*4\r\n$6\r\nmaster\r\n:64\r\n*1\r\n*3\r\n$9\r\n127.0.0.1\r\n$4\r\n7001\r\n$2\r\n16\r\n";
    let replication = "*1\r\n*22\r\n$4\r\nname\r\n$1\r\nb\r\n$7\r\naddress\r\n$14\r\n127.0.0.1:7001\r\n$5\r\nstate\r\n\
                       $9\r\nstreaming\r\n$8\r\nsent_lsn\r\n$4\r\n0/40\r\n$11\r\nwritten_lsn\r\n$4\r\n0/30\r\n\
                       $11\r\nflushed_lsn\r\n$4\r\n0/20\r\n$11\r\napplied_lsn\r\n$4\r\n0/10\r\n$10\r\nsync_state\r\n$4\r\nsync\r\n\
                       $9\r\nlag_bytes\r\n:48\r\n$6\r\nlag_us\r\n:1500\r\n$7\r\nin_sync\r\n:1\r\n";
    check(&mut host, &mut client, &[("ROLE", &format!("{role}{lsns}")), ("REPLICATION", replication)]);
    let info = client.ask(&mut host, "INFO replication");
    let slave = "slave0:ip=127.0.0.1,port=7001,state=online,offset=16,lag=0,name=b,sent_lsn=0/40,written_lsn=0/30,\
                 flushed_lsn=0/20,applied_lsn=0/10,lag_bytes=48,lag_us=1500,sync_state=sync";
    assert!(info.contains(slave), "{info}");
}

#[test]
fn slots_are_listed_and_dropped() {
    let (mut host, mut client) = (TestHost::new(), TestClient::new());
    host.slots.push("b".parse().expect("a name"));
    let listed = "*1\r\n*10\r\n$4\r\nname\r\n$1\r\nb\r\n$5\r\nstate\r\n$6\r\nactive\r\n$11\r\nrestart_lsn\r\n$4\r\n0/10\r\n\
                  $10\r\nheld_bytes\r\n:48\r\n$9\r\nconnected\r\n:1\r\n";
    check(
        &mut host,
        &mut client,
        &[
            ("SLOT LIST", listed),
            ("SLOT DROP c", "-ERR there is no slot called c\r\n"),
            ("SLOT DROP", "-ERR wrong number of arguments for 'slot|drop' command\r\n"),
            ("SLOT MOVE b", "-ERR unknown subcommand 'MOVE'. SLOT MOVE is not supported.\r\n"),
            ("slot drop b", "$17\r\nslot b is dropped\r\n"),
            ("SLOT LIST", "*0\r\n"),
        ],
    );
}

#[test]
fn info_shows_connected_replicas_only() {
    let (mut host, mut client) = (TestHost::new(), TestClient::new());
    host.rows.push(ReplicationRow { name: "a".to_owned(), address: String::new(), ..row() });
    host.rows.push(row());
    let info = client.ask(&mut host, "INFO replication");
    assert!(info.contains("connected_slaves:1\r\n") && info.contains("slave0:ip=127.0.0.1,"), "{info}");
    assert!(!info.contains("slave1:") && !info.contains("name=a"), "{info}");
    assert!(client.ask(&mut host, "REPLICATION").contains("\r\na\r\n"), "it is shown where its state is told");
}

#[test]
fn a_replica_tells_of_its_leader_and_can_be_promoted() {
    let (mut host, mut client) = (TestHost::new(), TestClient::new());
    let following = Following {
        host: "10.0.0.1".to_owned(),
        port: 7000,
        connected: true,
        lag_bytes: Some(0),
        ..Following::default()
    };
    (host.facts.role, host.facts.following) = (NodeRole::Replica, Some(following));
    assert!(
        client
            .ask(&mut host, "ROLE")
            .starts_with("*6\r\n$5\r\nslave\r\n$8\r\n10.0.0.1\r\n:7000\r\n$4\r\nsync\r\n:0\r\n")
    );
    assert!(
        client
            .ask(&mut host, "INFO replication")
            .contains("role:slave\r\nmaster_host:10.0.0.1\r\nmaster_port:7000\r\n")
    );
    assert_eq!(client.ask(&mut host, "WAIT 1 10"), "-ERR WAIT cannot be used with replica instances.\r\n");
    assert_eq!(client.ask(&mut host, "PROMOTE"), format!(":{}\r\n", Epoch(8)));
    host.facts.role = NodeRole::Leader;
    assert!(client.ask(&mut host, "ROLE").starts_with("*4\r\n$6\r\nmaster\r\n"));
}

#[test]
fn node_that_takes_no_writes_is_no_master() {
    let (mut host, mut client) = (TestHost::new(), TestClient::new());
    for role in [NodeRole::LeaderWithoutLease, NodeRole::Leaderless, NodeRole::SteppedDown] {
        let silence = Duration::from_secs(12);
        let following = Following { silence, lag: silence, ..Following::default() };
        (host.facts.role, host.facts.following) = (role, Some(following));
        let info = client.ask(&mut host, "INFO replication");
        for line in [
            "role:slave",
            "master_link_status:down",
            "master_link_down_since_seconds:12",
            "master_last_io_seconds_ago:12",
            "lag_bytes:-1",
            "lag_us:12000000",
            &format!("node_role:{role}"),
        ] {
            assert!(info.contains(&format!("\r\n{line}\r\n")), "{line} in {info}");
        }
        let told = client.ask(&mut host, "ROLE");
        assert!(told.starts_with("*6\r\n$5\r\nslave\r\n") && told.contains("\r\n$7\r\nconnect\r\n"), "{told}");
        let hello = client.ask(&mut host, "HELLO");
        assert!(hello.contains("$4\r\nrole\r\n$7\r\nreplica\r\n"), "{hello}");
        let facts = host.facts.clone();
        let text = text::render(&text::MetricsView { facts, replicas: vec![], accounting: json!({}) });
        let info = format!("walferry_node_info{{name=\"\",role=\"{role}\",cluster_id=\"\"}} 1\n");
        assert!(text.contains(&info) && text.contains("walferry_leads 0\n"), "{text}");
        assert!(text.contains("walferry_lag_seconds 12\n") && !text.contains("walferry_lag_bytes"), "{text}");
    }
}

#[test]
fn resp3_has_its_own_shapes() {
    let (mut host, mut client) = (TestHost::new(), TestClient::new());
    client.ask(&mut host, "HELLO 3");
    let entries = "*1\r\n*2\r\n$3\r\n1-0\r\n*2\r\n$1\r\nf\r\n$1\r\nv\r\n";
    check(
        &mut host,
        &mut client,
        &[
            ("GET a", "_\r\n"),
            ("SET a 1", "+OK\r\n"),
            ("GET a", "$1\r\n1\r\n"),
            ("MGET a b", "*2\r\n$1\r\n1\r\n_\r\n"),
            ("XREAD STREAMS s 0", "_\r\n"),
            ("XADD s 1-0 f v", "$3\r\n1-0\r\n"),
            ("XRANGE s - +", entries),
            ("XRANGE s - + COUNT 0", "_\r\n"),
            ("XREAD STREAMS s 0", &format!("%1\r\n$1\r\ns\r\n{entries}")),
            ("CONFIG GET save", "%1\r\n$4\r\nsave\r\n$0\r\n\r\n"),
            ("INFO flush", "=24\r\ntxt:# Flush\r\nflushes:3\r\n\r\n"),
            (
                "COMMAND INFO get",
                "*1\r\n*10\r\n$3\r\nget\r\n:2\r\n~2\r\n+readonly\r\n+fast\r\n:1\r\n:1\r\n:1\r\n~0\r\n~0\r\n~0\r\n~0\r\n",
            ),
            ("WATCH a", "+OK\r\n"),
            ("SET a 2", "+OK\r\n"),
            ("MULTI", "+OK\r\n"),
            ("EXEC", "_\r\n"),
        ],
    );
    host.rows.push(row());
    assert!(client.ask(&mut host, "REPLICATION").starts_with("*1\r\n%11\r\n$4\r\nname\r\n"));
    assert!(client.ask(&mut host, "COMMITINFO").starts_with("%7\r\n$5\r\nepoch\r\n:7\r\n"));
    assert!(client.ask(&mut host, "COMMAND DOCS get").starts_with("%1\r\n$3\r\nget\r\n%3\r\n"));
}

#[test]
fn another_reader_of_the_protocol_understands_every_reply() {
    let lines = [
        "SET a 1",
        "GET a",
        "GET zz",
        "NOPE",
        "INCR n",
        "XADD s 1-0 f v",
        "XRANGE s - +",
        "XREAD STREAMS s 0",
        "XREAD STREAMS s $",
        "SCAN 0",
        "INFO",
        "ROLE",
        "COMMAND",
        "COMMAND DOCS",
        "CONFIG GET *",
        "REPLICATION",
        "COMMITINFO",
        "LSN",
        "MULTI",
        "GET a",
        "INCR a",
        "EXEC",
        "TIME",
        "HELLO",
    ];
    for protocol in [2, 3] {
        let (mut host, mut client) = (TestHost::new(), TestClient::new());
        host.rows.push(row());
        client.ask(&mut host, &format!("HELLO {protocol}"));
        for line in lines {
            let reply = client.ask(&mut host, line);
            let read = match protocol {
                2 => decode2(reply.as_bytes()).map(|frame| frame.map(|(_, length)| length)),
                _ => decode3(reply.as_bytes()).map(|frame| frame.map(|(_, length)| length)),
            };
            assert!(
                matches!(read, Ok(Some(length)) if length == reply.len()),
                "{line} in RESP{protocol}: {reply:?}: {read:?}"
            );
        }
    }
}

#[test]
fn patterns_match_as_redis_servers_do() {
    use crate::session::command::glob::{Glob, PATTERN_BYTES_MAX};
    let glob_matches = |pattern: &[u8], text: &[u8]| Glob::new(pattern).expect("short").matches(text);
    for (pattern, text, expected) in [
        ("*", "", true),
        ("", "", true),
        ("", "a", false),
        ("a*c", "abbc", true),
        ("a*c", "abb", false),
        ("?", "a", true),
        ("?", "", false),
        ("[a-c]x", "bx", true),
        ("[c-a]x", "bx", true),
        ("[^a]", "b", true),
        ("[^a]", "a", false),
        ("[ab", "b", true),
        ("\\*", "*", true),
        ("\\*", "x", false),
        ("a\\", "a\\", true),
        ("*a*b", "xaxxb", true),
        ("**", "abc", true),
        ("h[\\]]i", "h]i", true),
    ] {
        assert_eq!(glob_matches(pattern.as_bytes(), text.as_bytes()), expected, "{pattern} on {text}");
    }
    // A pattern that a backtracking matcher would take years for.
    let pattern = "a*".repeat(64) + "b";
    assert!(!glob_matches(pattern.as_bytes(), "a".repeat(4096).as_bytes()));
    // More states than a word has bits, and the longest pattern.
    let pattern = format!("{}*[^x]?{}", "a".repeat(100), "b".repeat(100));
    let text = |end: &str| format!("{}x-y{}{end}", "a".repeat(100), "b".repeat(100));
    assert!(
        glob_matches(pattern.as_bytes(), text("").as_bytes())
            && !glob_matches(pattern.as_bytes(), text("a").as_bytes())
    );
    assert!(glob_matches(&[b'?'; PATTERN_BYTES_MAX], &[0; PATTERN_BYTES_MAX]));
    assert!(Glob::new(&[b'*'; PATTERN_BYTES_MAX + 1]).is_err());
}

#[test]
fn reference_of_commands_is_current() {
    let mut text = String::from(
        "# Commands\n\nRESP2 and RESP3. Names and errors are those of redis-server where it has the command; the group `walferry` is this \
         server's own.\nArity counts the name; negative: at least so many. `write` commands wait for the session's commit level.\n\n| command \
         | arity | group | flags | what it does |\n|---|---|---|---|---|\n",
    );
    let mut commands: Vec<_> = crate::session::command::table::COMMANDS.iter().collect();
    commands.sort_by_key(|spec| (spec.group, spec.name));
    for spec in commands {
        let (name, flags) = (spec.name.to_uppercase(), spec.flags.join(", "));
        let summary = spec.summary.replace('|', "\\|");
        text.push_str(&format!("| `{name}` | {} | {} | {flags} | {summary} |\n", spec.arity, spec.group));
    }
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/reference/commands.md");
    if std::env::var_os("UPDATE_REFERENCE").is_some() {
        std::fs::write(&path, &text).expect("a document");
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == text,
        "docs/reference/commands.md is out of date: UPDATE_REFERENCE=1 cargo test -p walferry-node reference"
    );
}
