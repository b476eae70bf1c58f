//! Reads that never go back in time, with real processes: tokens on lagging replicas and through failovers, bounded staleness,
//! committed and strong reads.

mod common;

use common::cluster::Cluster;
use common::{Client, Link, Node, Reply, directory, until, wait_applied};

/// Leases last longer than a test's step takes on a busy machine.
const LONG_LEASE: [&str; 4] = ["--election-timeout", "3s", "--read-wait-timeout", "300ms"];

fn token(client: &mut Client) -> String {
    client.command(&["SESSION"]).text().to_owned()
}

fn error(reply: &Reply) -> &str {
    let Reply::Error(text) = reply else { panic!("expected an error, got {reply:?}") };
    text
}

fn value(text: &str) -> Reply {
    Reply::Bulk(text.to_owned())
}

#[test]
fn lagging_replica_waits_or_answers_its_lag() {
    let root = directory();
    let leader = Node::start(root.path(), "a", &["--peer-timeout", "60s"]);
    let link = Link::try_start(root.path(), &["--rtt", "1ms", "--to", &leader.peer_listen.to_string()]);
    let link = link.expect("a proxy needs nothing");
    let through = link.printed("listens on ").to_owned();
    let replica = Node::start(root.path(), "b", &["--peer-timeout", "60s", "--follow", &through]);
    let (mut writer, mut reader) = (leader.client(), replica.client());
    writer.command(&["SET", "k", "1"]);
    wait_applied(&mut reader, writer.command(&["LSN"]).text());
    let first = token(&mut writer);

    // Nobody writes: the state is as fresh as heartbeats are frequent, again and again.
    let mut fresh = replica.client();
    assert_eq!(fresh.command(&["READ", "AT", "MOST", "5s"]), Reply::Simple("OK".to_owned()));
    until("the first stamp has come back", || fresh.command(&["GET", "k"]) == value("1"));
    fresh.command(&["READ", "TIMEOUT", "10000"]);
    fresh.command(&["READ", "AT", "MOST", "300ms"]);
    for _ in 0..20 {
        assert_eq!(fresh.command(&["GET", "k"]), value("1"));
    }
    let told: serde_json::Value = serde_json::from_str(reader.command(&["DESCRIBE"]).text()).expect("JSON");
    assert!(told["staleness_ms"].as_u64().is_some(), "{told}");
    assert!(reader.command(&["INFO", "replication"]).text().contains("staleness_ms:"));

    link.ask(&["cut"]).expect("the link runs");
    writer.command(&["SET", "k", "2"]);
    let second = token(&mut writer);
    let seen = writer.command(&["LSN"]).text().to_owned();
    let mut own = replica.client();
    assert_eq!(own.command(&["SESSION", &first]), Reply::Simple("OK".to_owned()));
    assert_eq!(own.command(&["GET", "k"]), value("1"));
    assert_eq!(own.command(&["SESSION", &second]), Reply::Simple("OK".to_owned()));
    own.command(&["READ", "TIMEOUT", "100"]);
    let behind = own.command(&["GET", "k"]);
    assert!(error(&behind).starts_with("BEHIND this node has applied 0/"), "{behind:?}");
    assert!(error(&behind).contains(&format!("the session has seen {seen};")), "{behind:?}");
    assert_eq!(reader.command(&["GET", "k"]), value("1"), "who asks for nothing is answered");
    // The cut replica's state gets older, whatever it thinks of the time.
    fresh.command(&["READ", "TIMEOUT", "0"]);
    let mut stale = Reply::Nil;
    until("the cut replica calls its state too old", || {
        stale = fresh.command(&["GET", "k"]);
        matches!(stale, Reply::Error(_))
    });
    assert!(error(&stale).starts_with("STALE this node's state may be "), "{stale:?}");
    assert!(error(&stale).contains("at most 300 ms were asked for; it has applied 0/"), "{stale:?}");

    own.command(&["READ", "TIMEOUT", "60000"]);
    own.send(&["GET", "k"]).expect("it is connected");
    link.ask(&["heal"]).expect("the link runs");
    assert_eq!(own.reply().expect("an answer"), value("2"), "it waits for its own write");
    fresh.command(&["READ", "TIMEOUT", "60000"]);
    assert_eq!(fresh.command(&["GET", "k"]), value("2"));
    // Read committed on a replica: nothing else is asked of the leader, and the commit LSN comes by itself.
    own.command(&["READ", "COMMITTED"]);
    for n in 3..20 {
        let n = n.to_string();
        writer.command(&["SET", "k", &n]);
        own.command(&["SESSION", &token(&mut writer)]);
        assert_eq!(own.command(&["GET", "k"]), value(&n));
    }
    own.command(&["READ", "STRONG"]);
    assert!(error(&own.command(&["GET", "k"])).starts_with("READONLY "));
    writer.command(&["READ", "STRONG"]);
    assert_eq!(writer.command(&["GET", "k"]), value("19"));
}

#[test]
fn session_token_reads_never_go_back_through_failovers() {
    let mut cluster = Cluster::start(&["a", "b", "c"], &[]);
    let mut kills = 0;
    let (mut next, mut last, mut token) = (0_u64, 0_u64, String::new());
    while kills < 3 {
        for _ in 0..30 {
            next += 1;
            let name = cluster.leader();
            let mut client = cluster.client(name);
            client.command(&["COMMITLEVEL", "remote_flush"]);
            client.command(&["COMMITTIMEOUT", "500"]);
            if token.is_empty() || matches!(client.command(&["SESSION", &token]), Reply::Simple(_)) {
                client.command(&["SET", "counter", &next.to_string()]);
                token = self::token(&mut client);
            }
            // Any node, each time another connection: only the token ties them together.
            for name in ["a", "b", "c"] {
                let mut client = cluster.client(name);
                client.command(&["READ", "TIMEOUT", "30000"]);
                assert_eq!(client.command(&["SESSION", &token]), Reply::Simple("OK".to_owned()));
                match client.command(&["GET", "counter"]) {
                    Reply::Bulk(text) => {
                        let seen: u64 = text.parse().expect("a number");
                        assert!(seen >= last, "{name} told {seen} after {last}");
                        last = seen;
                        token = self::token(&mut client);
                    }
                    // What was not confirmed everywhere may be lost; then it is told.
                    Reply::Error(text) if text.starts_with("LOST ") => {
                        client.command(&["SESSION", "RESET"]);
                        token = self::token(&mut client);
                        last = 0;
                    }
                    other => panic!("{name}: {other:?}"),
                }
            }
        }
        let leader = cluster.leader();
        cluster.kill(leader);
        let new = cluster.leader();
        let mut client = cluster.client(new);
        assert_eq!(client.command(&["SESSION", &token]), Reply::Simple("OK".to_owned()));
        let Reply::Bulk(text) = client.command(&["GET", "counter"]) else { panic!("it was confirmed") };
        assert!(text.parse::<u64>().expect("a number") >= last, "{text} after {last}");
        token = self::token(&mut client);
        cluster.bring(leader);
        kills += 1;
    }
}

#[test]
fn what_only_a_dead_leader_had_is_told_as_lost_on_every_node() {
    let mut cluster = Cluster::start(&["a", "b", "c"], &LONG_LEASE);
    let old = cluster.leader();
    let others: Vec<&'static str> = cluster.names.iter().copied().filter(|name| *name != old).collect();
    let mut client = cluster.client(old);
    client.command(&["COMMITLEVEL", "local"]);
    client.command(&["SET", "kept", "1"]);
    let kept = client.command(&["LSN"]).text().to_owned();
    others.iter().for_each(|name| wait_applied(&mut cluster.client(name), &kept));
    let mut reader = cluster.client(old);
    reader.command(&["READ", "COMMITTED"]);
    assert_eq!(reader.command(&["GET", "kept"]), value("1"));
    others.iter().for_each(|name| cluster.kill(name));
    // Nobody can have it but the leader, which acknowledges it: that is what the session chose.
    assert_eq!(client.command(&["SET", "lost", "1"]), Reply::Simple("OK".to_owned()));
    let lost = token(&mut client);
    assert_eq!(client.command(&["GET", "lost"]), value("1"));
    let uncommitted = reader.command(&["GET", "lost"]);
    assert!(error(&uncommitted).starts_with("UNCOMMITTED what was read reaches up to "), "{uncommitted:?}");
    cluster.kill(old);
    others.iter().for_each(|name| cluster.bring(name));
    let new = cluster.leader();
    cluster.bring(old);
    for name in [new, old] {
        let mut client = cluster.client(name);
        client.command(&["READ", "TIMEOUT", "60000"]);
        assert_eq!(client.command(&["SESSION", &lost]), Reply::Simple("OK".to_owned()));
        let told = client.command(&["GET", "lost"]);
        assert!(error(&told).starts_with("LOST what this session has seen up to "), "{name}: {told:?}");
        assert_eq!(client.command(&["SESSION", "RESET"]), Reply::Simple("OK".to_owned()));
        assert_eq!(client.command(&["GET", "lost"]), Reply::Nil);
        assert_eq!(client.command(&["GET", "kept"]), value("1"));
    }
}

#[test]
fn isolated_leader_answers_no_strong_or_fresh_reads() {
    let cluster = Cluster::start(&["a", "b", "c"], &["--read-wait-timeout", "100ms"]);
    let old = cluster.leader();
    let others: Vec<&str> = cluster.names.iter().copied().filter(|name| *name != old).collect();
    let mut strong = cluster.client(old);
    strong.command(&["READ", "STRONG"]);
    let mut fresh = cluster.client(old);
    fresh.command(&["READ", "AT", "MOST", "10s"]);
    let mut any = cluster.client(old);
    any.command(&["COMMITLEVEL", "remote_flush"]);
    any.command(&["SET", "k", "1"]);
    // On a busy machine a lease may be late for a moment.
    until("strong reads are answered", || strong.command(&["GET", "k"]) == value("1"));
    until("fresh reads are answered", || fresh.command(&["GET", "k"]) == value("1"));
    let replica = others[0];
    let refused = {
        let mut client = cluster.client(replica);
        client.command(&["READ", "STRONG"]);
        client.command(&["GET", "k"])
    };
    assert!(["MOVED 0 ", "CLUSTERDOWN "].iter().any(|code| error(&refused).starts_with(code)), "{refused:?}");

    others.iter().for_each(|name| cluster.signal(name, libc::SIGSTOP));
    let mut told = Reply::Nil;
    until("its lease has ended", || {
        told = strong.command(&["GET", "k"]);
        matches!(&told, Reply::Error(text) if text.starts_with("CLUSTERDOWN "))
    });
    told = fresh.command(&["GET", "k"]);
    assert!(error(&told).starts_with("STALE this node cannot say how old its state is"), "{told:?}");
    assert_eq!(any.command(&["GET", "k"]), value("1"), "who asks for nothing is answered");
    others.iter().for_each(|name| cluster.signal(name, libc::SIGCONT));

    // Stopped with a strong read on its way, the old leader never tells what was there before the new one wrote.
    let old = cluster.leader();
    let mut strong = cluster.client(old);
    strong.command(&["READ", "STRONG"]);
    cluster.signal(old, libc::SIGSTOP);
    strong.send(&["GET", "k"]).expect("the socket takes it");
    let mut new = old;
    until("another member leads and writes", || {
        let others = cluster.names.iter().copied().filter(|name| *name != old);
        let mut writes = others.filter(|name| {
            let mut client = cluster.client(name);
            client.command(&["COMMITTIMEOUT", "500"]);
            client.command(&["SET", "k", "2"]) == Reply::Simple("OK".to_owned())
        });
        new = writes.next().unwrap_or(old);
        new != old
    });
    cluster.signal(old, libc::SIGCONT);
    let told = strong.reply().expect("an answer");
    assert!(matches!(&told, Reply::Error(_)) || told == value("2"), "{new} wrote 2, {old} told {told:?}");
}
