//! Sessions against servers of these tests that answer as nodes do in situations that real ones are hard to bring into. With real
//! nodes: `tools/tests/client.rs`.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};

use redis_protocol::resp2::decode::decode;

use super::*;
use crate::url::Url;

/// What one server answers to a command; `None` closes the connection instead.
type Answer = dyn Fn(&[String]) -> Option<String> + Send + Sync;

/// A server that answers what a test wants. It ends with the process.
fn serve(listener: TcpListener, answer: Arc<Answer>) {
    std::thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            let answer = Arc::clone(&answer);
            std::thread::spawn(move || converse(stream, &*answer));
        }
    });
}

fn converse(mut stream: TcpStream, answer: &Answer) {
    let (mut unread, mut chunk) = (Vec::new(), [0; 4096]);
    loop {
        while let Ok(Some((frame, length))) = decode(&unread) {
            unread.drain(..length);
            let words: Vec<String> = Reply::from(frame).items().iter().filter_map(Reply::text).collect();
            let Some(text) = answer(&words) else { return };
            if stream.write_all(text.as_bytes()).is_err() {
                return;
            }
        }
        match stream.read(&mut chunk) {
            Ok(count @ 1..) => unread.extend_from_slice(&chunk[..count]),
            _ => return,
        }
    }
}

fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("an address").to_string();
    (listener, address)
}

const TOKEN: &str = "w1.9f31c2aa.3.0/2000";

fn bulk(text: &str) -> String {
    format!("${}\r\n{text}\r\n", text.len())
}

fn row(address: &str) -> String {
    format!("*2\r\n{}{}", bulk("address"), bulk(address))
}

/// The answers of a node that does nothing by itself: `leader` leads, these are the replicas, sessions have seen `token`.
fn node(words: &[String], leader: &str, replicas: &[&str], token: &str) -> String {
    match (words[0].as_str(), words.len()) {
        ("LEADER", _) => bulk(leader),
        ("REPLICATION", _) => {
            format!("*{}\r\n{}", replicas.len(), replicas.iter().map(|address| row(address)).collect::<String>())
        }
        ("SESSION", 1) => bulk(token),
        _ => "+OK\r\n".to_owned(),
    }
}

fn quick<P: Pool>(cluster: &Cluster<P>) -> Session<P> {
    let mut session = Session::new(cluster);
    session.options.give_up_after = Duration::from_millis(300);
    session.options.replica_wait = Duration::from_millis(20);
    session
}

fn url(address: &str) -> String {
    format!("redis://{address}")
}

#[test]
fn a_write_follows_the_leader_and_takes_its_token() {
    let ((old_listener, old), (new_listener, new)) = (listen(), listen());
    let (old_leader, old_self, new_self) = (new.clone(), old.clone(), new.clone());
    serve(
        old_listener,
        Arc::new(move |words| {
            Some(match words[0].as_str() {
                "SET" => format!("-MOVED 0 {old_leader}\r\n"),
                // It does not know yet that it leads no more.
                _ => node(words, &old_self, &[], "w1.9f31c2aa.2.0/1000"),
            })
        }),
    );
    serve(new_listener, Arc::new(move |words| Some(node(words, &new_self, &[], TOKEN))));
    let cluster = Cluster::connect(&[url(&old)]).unwrap();
    assert_eq!(cluster.leader(), Some(old));
    let mut session = quick(&cluster);
    assert_eq!(session.token(), None);
    session.write(&["SET", "k", "v"]).unwrap();
    assert_eq!((session.token().as_deref(), cluster.leader()), (Some(TOKEN), Some(new)));
}

#[test]
fn unanswered_write_is_uncertain_and_repeated_if_harmless() {
    let (listener, address) = listen();
    let (executed, own) = (Arc::new(AtomicUsize::new(0)), address.clone());
    let count = Arc::clone(&executed);
    serve(
        listener,
        Arc::new(move |words| match words[0].as_str() {
            // Every other one is executed without an answer.
            "SET" | "INCR" if count.fetch_add(1, Ordering::SeqCst) % 2 == 0 => None,
            _ => Some(node(words, &own, &[], TOKEN)),
        }),
    );
    let cluster = Cluster::connect(&[url(&address)]).unwrap();
    let mut session = quick(&cluster);
    let error = session.write(&["INCR", "k"]).unwrap_err();
    assert!(matches!(error, Error::Uncertain { .. }), "{error:?}");
    assert_eq!(executed.load(Ordering::SeqCst), 1, "not sent again");
    assert_eq!(session.token(), None);
    executed.store(0, Ordering::SeqCst);
    session.write_idempotent(&["SET", "k", "v"]).unwrap();
    assert_eq!(executed.load(Ordering::SeqCst), 2);
    assert_eq!(session.token().as_deref(), Some(TOKEN));
}

#[test]
fn an_unconfirmed_write_is_uncertain_and_its_position_is_kept() {
    let (listener, address) = listen();
    let own = address.clone();
    serve(
        listener,
        Arc::new(move |words| {
            Some(match words[0].as_str() {
                "SET" => "-UNCERTAIN committed locally at 0/2000, not confirmed by ANY 1 (b)\r\n".to_owned(),
                "DEL" => "-NOREPLICAS 0 of 1 replicas are in sync\r\n".to_owned(),
                _ => node(words, &own, &[], TOKEN),
            })
        }),
    );
    let mut session = quick(&Cluster::connect(&[url(&address)]).unwrap());
    let error = session.write(&["DEL", "k"]).unwrap_err();
    assert!(matches!(&error, Error::Refused { text, .. } if text.starts_with("NOREPLICAS")), "{error:?}");
    let error = session.write(&["SET", "k", "v"]).unwrap_err();
    assert!(matches!(&error, Error::Uncertain { reason, .. } if reason.contains("locally at 0/2000")), "{error:?}");
    assert_eq!(session.token().as_deref(), Some(TOKEN), "its own write, if it stays, is read");
}

#[test]
fn read_skips_lagging_replicas_and_ends_at_the_leader() {
    let ((listener, leader), (behind_listener, behind), (even_listener, even)) = (listen(), listen(), listen());
    let even_is_behind = Arc::new(Mutex::new(false));
    let (own, replicas) = (leader.clone(), [behind.clone(), even.clone()]);
    serve(
        listener,
        Arc::new(move |words| {
            let replicas = replicas.each_ref().map(String::as_str);
            Some(if words[0] == "GET" { bulk("by the leader") } else { node(words, &own, &replicas, TOKEN) })
        }),
    );
    let behind_answer = |words: &[String], leader: &str| match words[0].as_str() {
        "GET" => "-BEHIND this node has applied 0/1000, the session has seen 0/2000\r\n".to_owned(),
        _ => node(words, leader, &[], "w1.9f31c2aa.3.0/1000"),
    };
    let own = leader.clone();
    serve(behind_listener, Arc::new(move |words| Some(behind_answer(words, &own))));
    let (own, is_behind) = (leader.clone(), Arc::clone(&even_is_behind));
    serve(
        even_listener,
        Arc::new(move |words| {
            if *is_behind.lock().unwrap() {
                return Some(behind_answer(words, &own));
            }
            Some(if words[0] == "GET" { bulk("by the even replica") } else { node(words, &own, &[], TOKEN) })
        }),
    );
    // Found from a replica.
    let cluster = Cluster::connect(&[url(&behind)]).unwrap();
    assert_eq!(cluster.leader(), Some(leader));
    let mut session = Session::resume(&cluster, TOKEN).unwrap();
    session.options = quick(&cluster).options;
    for _ in 0..4 {
        let reply = session.read(Route::Replica, &["GET", "k"]).unwrap();
        assert_eq!(reply.text().as_deref(), Some("by the even replica"));
    }
    *even_is_behind.lock().unwrap() = true;
    for (route, mode) in
        [(Route::Replica, ReadMode::Any), (Route::Leader, ReadMode::Any), (Route::Replica, ReadMode::Strong)]
    {
        session.options.read_mode = mode;
        let reply = session.read(route, &["GET", "k"]).unwrap();
        assert_eq!(reply.text().as_deref(), Some("by the leader"), "{route:?} {mode:?}");
    }
    assert_eq!(session.token().as_deref(), Some(TOKEN));
}

#[test]
fn what_was_lost_is_said_until_the_session_is_reset() {
    let (listener, address) = listen();
    let own = address.clone();
    let asked: Arc<Mutex<Vec<String>>> = Arc::default();
    let log = Arc::clone(&asked);
    let lost = Arc::new(Mutex::new(false));
    let is_lost = Arc::clone(&lost);
    serve(
        listener,
        Arc::new(move |words| {
            log.lock().unwrap().push(words.join(" "));
            Some(match (words[0].as_str(), *is_lost.lock().unwrap()) {
                ("GET", true) if log.lock().unwrap().iter().rev().nth(3).is_some_and(|line| line.ends_with(TOKEN)) => {
                    "-LOST what this session has seen up to 0/2000 in epoch 3 was lost\r\n".to_owned()
                }
                (_, true) => node(words, &own, &[], "w1.9f31c2aa.4.0/1000"),
                (_, false) => node(words, &own, &[], TOKEN),
            })
        }),
    );
    let mut session = quick(&Cluster::connect(&[url(&address)]).unwrap());
    session.options.commit_level = Some(CommitLevel::Local);
    session.write(&["SET", "k", "v"]).unwrap();
    let written = asked.lock().unwrap()[2..].to_vec();
    assert_eq!(written, ["SESSION RESET", "SESSION", "COMMITLEVEL local", "SET k v", "SESSION"], "one round trip");
    *lost.lock().unwrap() = true;
    session.options.read_mode = ReadMode::AtMost(Duration::from_millis(500));
    for _ in 0..2 {
        let error = session.read(Route::Leader, &["GET", "k"]).unwrap_err();
        assert!(matches!(&error, Error::Lost(text) if text.contains("epoch 3 was lost")), "{error:?}");
        assert_eq!(session.token().as_deref(), Some(TOKEN), "it is not forgotten by itself");
    }
    session.write(&["SET", "k", "v"]).unwrap();
    assert_eq!(session.token().as_deref(), Some(TOKEN), "a position that is behind does not replace it");
    session.reset();
    session.read(Route::Leader, &["GET", "k"]).unwrap();
    assert_eq!(session.token().as_deref(), Some("w1.9f31c2aa.4.0/1000"));
    assert!(asked.lock().unwrap().contains(&"READ AT MOST 500ms".to_owned()));
}

#[test]
fn token_of_another_cluster_is_refused() {
    let (listener, address) = listen();
    let own = address.clone();
    serve(
        listener,
        Arc::new(move |words| {
            Some(match (words[0].as_str(), words.len()) {
                ("SESSION", 2) if words[1] != "RESET" => "-ERR the token is of cluster 9f31c2aa\r\n".to_owned(),
                _ => node(words, &own, &[], TOKEN),
            })
        }),
    );
    let cluster = Cluster::connect(&[url(&address)]).unwrap();
    assert!(matches!(Session::resume(&cluster, "nonsense"), Err(Error::Token(_))));
    let mut session = Session::resume(&cluster, TOKEN).unwrap();
    assert!(
        matches!(session.read(Route::Leader, &["GET", "k"]), Err(Error::Token(text)) if text.contains("of cluster"))
    );
    let (closed, address) = listen();
    drop(closed);
    for seeds in [vec![url(&address)], vec!["127.0.0.1:6400".to_owned()], Vec::new()] {
        assert!(matches!(Cluster::connect(&seeds), Err(Error::NoCluster(_))), "{seeds:?}");
    }
}

#[test]
fn write_without_a_leader_gives_up_in_time() {
    let (listener, address) = listen();
    serve(
        listener,
        Arc::new(|words| {
            Some(match words[0].as_str() {
                "LEADER" => "$-1\r\n".to_owned(),
                "SET" => "-CLUSTERDOWN no leader: waiting for a\r\n".to_owned(),
                _ => node(words, "", &[], TOKEN),
            })
        }),
    );
    let cluster = Cluster::connect(&[url(&address)]).unwrap();
    let mut session = quick(&cluster);
    let error = session.write(&["SET", "k", "v"]).unwrap_err();
    assert!(matches!(&error, Error::Unavailable(_)), "{error:?}");
    assert!(session.read(Route::Replica, &["PING"]).is_ok(), "reads do not need one");
}

#[test]
fn a_pool_has_its_bound_and_gives_out_nothing_that_broke() {
    let (listener, address) = listen();
    let connections = Arc::new(AtomicUsize::new(0));
    let (count, (close, closing)) = (Arc::clone(&connections), mpsc::channel::<()>());
    std::thread::spawn(move || {
        let mut open = Vec::new();
        loop {
            open.push(listener.accept().expect("a client").0);
            count.fetch_add(1, Ordering::SeqCst);
            if closing.recv().is_err() {
                return;
            }
            open.clear();
        }
    });
    let url: Url = url(&address).parse().unwrap();
    let pool = crate::TcpPool::with_bounds(&url, 1, Duration::from_millis(50), Duration::from_secs(10));
    let first = pool.get(&address).unwrap();
    let busy = pool.get(&address).map(drop).unwrap_err();
    assert_eq!(busy.kind(), ErrorKind::TimedOut, "{busy}");
    drop(first);
    drop(pool.get(&address).unwrap());
    until(|| connections.load(Ordering::SeqCst) == 1, "the idle one is used again");
    close.send(()).unwrap();
    // What was closed meanwhile is replaced before anything is sent over it.
    until(
        || {
            drop(pool.get(&address).unwrap());
            connections.load(Ordering::SeqCst) == 2
        },
        "a new connection",
    );
}

fn until(mut question: impl FnMut() -> bool, what: &str) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !question() {
        assert!(Instant::now() < deadline, "gave up waiting for {what}");
        std::thread::yield_now();
    }
}
