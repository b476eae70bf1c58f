//! What one command may take of the loop's time, whatever the data: every command is executed at its bounds, and each turn is
//! measured by the processor time of the thread, so that a machine that is busy otherwise fails nothing.

use std::time::{Duration, Instant};

use walferry_cluster::level::CommitLevel;

use crate::clients::recv_buffers::RECV_BUFFER_BYTES;
use crate::session::client::SessionSettings;
use crate::session::command::glob::PATTERN_BYTES_MAX;
use crate::session::command::spec::{
    ARGS_MAX, KEYS_MAX, NAMES_MAX, TRANSACTION_ARGS_MAX, TRANSACTION_COMMANDS_MAX, TRANSACTION_HEAVY_MAX,
    WATCHED_KEYS_MAX,
};
use crate::session::command::stream::XREAD_STREAMS_MAX;
use crate::session::command::table::COMMANDS;
use crate::session::host::{CommitPath, Wait};
use crate::session::id::SessionId;
use crate::session::reply::REPLY_BYTES_MAX;
use crate::session::resp::{COMMAND_BYTES_MAX, KEY_BYTES_MAX, VALUE_BYTES_MAX};
use crate::session::test_host::{TestClient, TestHost};
use crate::watchdog::SLOW;

/// What each turn has to stay below: ten times what is called slow. The faults that this is for took seconds.
const TURN_CPU_MAX: Duration = SLOW.saturating_mul(10);
/// Small keys in the file, and as many that changed since.
const KEYS: usize = 40_000;
/// A parked command is asked so often whether it can be answered.
const RESUMES: usize = 100;

type Command = Vec<Vec<u8>>;

fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call names a value of the type that it wants.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    assert_eq!(result, 0, "Linux measures threads");
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn words(line: &str) -> Command {
    line.split(' ').map(|word| word.as_bytes().to_vec()).collect()
}

/// `head` and so many times the words of `of`, which are told their number.
fn repeated(head: &str, count: usize, of: impl Fn(usize) -> Vec<String>) -> Command {
    let mut command = words(head);
    command.extend((0..count).flat_map(of).map(String::into_bytes));
    command
}

fn encode(commands: &[Command]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for command in commands {
        bytes.extend_from_slice(format!("*{}\r\n", command.len()).as_bytes());
        for word in command {
            bytes.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
            bytes.extend_from_slice(word);
            bytes.extend_from_slice(b"\r\n");
        }
    }
    bytes
}

/// Sends commands as a socket would bring them and goes on until nothing more comes; the longest turn, and what was answered.
fn run(host: &mut TestHost, commands: &[Command]) -> (Duration, usize) {
    let bytes = encode(commands);
    let mut client =
        TestClient::with(&SessionSettings { commit_level: Some(CommitLevel::Off), ..Default::default() }, 9);
    let (mut pieces, mut longest, mut answered, mut resumes) = (bytes.chunks(RECV_BUFFER_BYTES), Duration::ZERO, 0, 0);
    loop {
        let session = &mut client.session;
        let piece = if session.wants_input() { pieces.next() } else { None };
        if piece.is_none() && !session.has_yielded() && !session.can_go_on() {
            if !session.is_waiting() || resumes == RESUMES {
                break;
            }
            resumes += 1;
        }
        host.turn_began = Some(Instant::now());
        let began = cpu_time();
        session.go_on(host);
        session.release(host);
        session.resume(host);
        if let Some(piece) = piece {
            session.handle_input(piece, host);
        }
        longest = longest.max(cpu_time() - began);
        answered += session.output().len();
        session.output().clear();
        host.flush();
    }
    host.unpark(SessionId(9));
    (longest, answered)
}

fn full_store() -> TestHost {
    let mut host = TestHost::new();
    let fill = |host: &mut TestHost, commands: &[Command]| {
        run(host, commands);
    };
    let value = vec![b'v'; VALUE_BYTES_MAX];
    for number in 0..6 {
        fill(&mut host, &[vec![b"SET".to_vec(), format!("big:{number}").into_bytes(), value.clone()]]);
    }
    for _ in 0..REPLY_BYTES_MAX / (1 << 20) + 4 {
        let entry = vec![b"XADD".to_vec(), b"wide".to_vec(), b"*".to_vec(), b"f".to_vec(), vec![b'v'; 1 << 20]];
        fill(&mut host, &[entry]);
    }
    fill(&mut host, &vec![words("XADD long * f v"); KEYS]);
    let keys = |value: &str| (0..KEYS).map(|number| words(&format!("SET key:{number} {value}"))).collect::<Vec<_>>();
    fill(&mut host, &keys("old"));
    host.checkpoint();
    fill(&mut host, &keys("new"));
    let key = |number: usize| [format!("{number:05}").into_bytes(), vec![b'a'; KEY_BYTES_MAX - 5]].concat();
    let long_keys: Vec<Command> = (0..64).map(|number| vec![b"SET".to_vec(), key(number), b"1".to_vec()]).collect();
    fill(&mut host, &long_keys);
    host
}

/// The most that a client may ask of a command.
fn at_bounds(name: &str) -> Vec<Vec<Command>> {
    let big = |number: usize| vec![format!("big:{}", number % 6)];
    let key = |number: usize| vec![format!("key:{}", number % KEYS)];
    let value = vec![b'v'; VALUE_BYTES_MAX];
    let with_value = |line: &str| [words(line), vec![value.clone()]].concat();
    let class = format!("*{}*", ["[", &"ab".repeat((PATTERN_BYTES_MAX - 4) / 2), "]"].concat());
    let stars = "a*".repeat(PATTERN_BYTES_MAX / 2);
    let queued = |commands: Vec<Command>| [vec![words("MULTI")], commands, vec![words("EXEC")]].concat();
    let one = |line: &str| vec![vec![words(line)]];
    match name {
        "set" => vec![vec![with_value("SET big:0"), [with_value("SET big:0"), words("GET")].concat()]],
        "setnx" => vec![vec![with_value("SETNX big:0")]],
        "append" => vec![vec![with_value("APPEND fresh"), words("APPEND fresh x")], vec![words("APPEND big:0 x"); 40]],
        "get" | "strlen" | "incr" | "decr" => vec![vec![words(&format!("{name} big:1")); 40]],
        "incrby" | "decrby" => vec![vec![words(&format!("{name} big:1 1")); 40]],
        "getdel" => vec![vec![with_value("SET gone"), words("GETDEL gone")]],
        "mget" => vec![vec![repeated("MGET", KEYS_MAX, big)], vec![repeated("MGET", KEYS_MAX, key)]],
        "exists" => vec![vec![repeated("EXISTS", KEYS_MAX, big)], vec![repeated("EXISTS", KEYS_MAX, key)]],
        "del" => vec![vec![repeated("DEL", KEYS_MAX, |number| vec![format!("absent:{number}")])]],
        "mset" => {
            let filler = "v".repeat((COMMAND_BYTES_MAX / KEYS_MAX).saturating_sub(64));
            vec![vec![repeated("MSET", KEYS_MAX, |number| vec![format!("key:{number}"), filler.clone()])]]
        }
        "xadd" => vec![vec![repeated("XADD fields *", KEYS_MAX, |number| vec![number.to_string(), "v".to_owned()])]],
        "xlen" => vec![vec![words("XLEN big:0"); 40]],
        "xrange" => ["wide", "long"].map(|key| vec![words(&format!("XRANGE {key} - +"))]).to_vec(),
        "xrevrange" => ["wide", "long"].map(|key| vec![words(&format!("XREVRANGE {key} + -"))]).to_vec(),
        "xread" => {
            let of = |head: &str, key: &str, id: &str| {
                let keys = repeated(head, XREAD_STREAMS_MAX, |_| vec![key.to_owned()]);
                repeated("", XREAD_STREAMS_MAX, |_| vec![id.to_owned()]).into_iter().skip(1).fold(
                    keys,
                    |mut all, id| {
                        all.push(id);
                        all
                    },
                )
            };
            vec![
                vec![of("XREAD STREAMS", "wide", "0")],
                vec![of("XREAD STREAMS", "long", "0")],
                vec![of("XREAD BLOCK 0 STREAMS", "long", "$")],
                vec![of("XREAD COUNT 1 STREAMS", "big:0", "0")],
            ]
        }
        "scan" => {
            let scan = |options: &str| words(&format!("SCAN 0 COUNT 1000000 {options}"));
            vec![
                vec![scan(&format!("MATCH {class}")); 15],
                vec![scan(&format!("MATCH {stars}b TYPE stream")); 15],
                vec![scan("TYPE stream"); 40],
            ]
        }
        "exec" => {
            let args = TRANSACTION_ARGS_MAX;
            let exists = |number: usize| repeated("EXISTS", args / 8 - 1, if number == 0 { big } else { key });
            vec![
                queued(vec![words("SET key:1 2"); TRANSACTION_COMMANDS_MAX]),
                queued(vec![words("INCR big:0"); TRANSACTION_COMMANDS_MAX]),
                queued(vec![words("XLEN big:0"); TRANSACTION_COMMANDS_MAX]),
                queued(
                    vec![words("XADD x * f v"); args / 8]
                        .into_iter()
                        .chain(vec![words("XRANGE x - + COUNT 1"); args / 16])
                        .collect(),
                ),
                queued((0..8).map(exists).collect()),
                queued(vec![words("SCAN 0 COUNT 1000000 TYPE stream"); TRANSACTION_HEAVY_MAX]),
                queued(vec![words("WATERFALL HISTOGRAMS"); TRANSACTION_HEAVY_MAX]),
            ]
        }
        "watch" => vec![vec![repeated("WATCH", WATCHED_KEYS_MAX, big), words("MULTI"), words("EXEC")]],
        "multi" | "discard" | "unwatch" | "quit" | "reset" | "role" | "dbsize" | "time" | "commitinfo" | "lsn"
        | "session" | "replication" | "leader" | "describe" | "switchover" | "promote" | "waterfall" | "info" => {
            one(name)
        }
        "ping" => vec![vec![with_value("PING")]],
        "echo" => vec![vec![with_value("ECHO")]],
        "hello" => vec![vec![words("HELLO 3"), [with_value("HELLO 3 AUTH x")].concat()]],
        "auth" => vec![vec![with_value("AUTH default")]],
        "acl" => one("ACL LIST"),
        "select" => vec![vec![with_value("SELECT")]],
        "client" => vec![vec![repeated("CLIENT LIST ID", NAMES_MAX, |number| vec![number.to_string()])]],
        "command" => vec![
            vec![repeated("COMMAND DOCS", NAMES_MAX, |_| vec!["promote".to_owned()])],
            vec![repeated("COMMAND INFO", NAMES_MAX, |_| vec!["promote".to_owned()])],
        ],
        "slot" => vec![vec![words("SLOT LIST"), with_value("SLOT DROP")]],
        "config" => vec![vec![repeated("CONFIG GET", ARGS_MAX - 2, |_| vec![stars.clone()])]],
        "wait" => one("WAIT 1 1"),
        "waitaof" => one("WAITAOF 1 1 1"),
        "commitlevel" => vec![vec![with_value("COMMITLEVEL")]],
        "committimeout" => vec![vec![with_value("COMMITTIMEOUT")]],
        "read" => vec![vec![with_value("READ AT MOST")]],
        "waitlsn" => vec![vec![[with_value("WAITLSN"), words("1")].concat()]],
        "join" => vec![vec![with_value("JOIN")]],
        "remove" => vec![vec![with_value("REMOVE")]],
        _ => panic!("what are the bounds of {name}?"),
    }
}

#[test]
fn every_command_at_its_bounds_keeps_the_turn_short() {
    let mut host = full_store();
    let mut long = Vec::new();
    for spec in COMMANDS {
        for commands in at_bounds(spec.name) {
            let (longest, answered) = run(&mut host, &commands);
            println!("{:>12} {:>8.1?} {answered:>10} bytes answered", spec.name, longest);
            if longest > TURN_CPU_MAX {
                long.push((spec.name, longest));
            }
        }
    }
    assert!(long.is_empty(), "turns of more than {TURN_CPU_MAX:?}: {long:?}");
}

#[test]
fn commands_beyond_their_bounds_are_refused() {
    let (mut host, mut client) = (TestHost::new(), TestClient::new());
    let mut answer = |command: Command| client.send(&mut host, &encode(&[command]));
    let many = |head: &str, count: usize| repeated(head, count, |_| vec!["k".to_owned()]);
    for (command, error) in [
        (many("EXISTS", KEYS_MAX + 1), "-ERR too many arguments for 'exists' command: it takes at most 16384\r\n"),
        (many("INFO", ARGS_MAX), "-ERR too many arguments for 'info' command: it takes at most 63\r\n"),
        (many("WATCH", WATCHED_KEYS_MAX + 1), "-ERR too many arguments for 'watch' command: it takes at most 4096\r\n"),
        (many("XREAD STREAMS", 2 * XREAD_STREAMS_MAX + 2), "-ERR XREAD takes at most 1024 streams\r\n"),
        (
            vec![b"SET".to_vec(), vec![b'k'; KEY_BYTES_MAX + 1], b"1".to_vec()],
            "-ERR too large: a key has at most 65536 bytes\r\n",
        ),
        (
            vec![b"SCAN".to_vec(), b"0".to_vec(), b"MATCH".to_vec(), vec![b'['; PATTERN_BYTES_MAX + 1]],
            "-ERR a pattern has at most 1024 bytes\r\n",
        ),
    ] {
        assert_eq!(answer(command), error);
    }
    assert_eq!(answer(many("EXISTS", KEYS_MAX)), ":0\r\n");
    assert_eq!(answer(words("MULTI")), "+OK\r\n");
    for _ in 0..TRANSACTION_HEAVY_MAX {
        assert_eq!(answer(words("SCAN 0")), "+QUEUED\r\n");
    }
    assert!(answer(words("SCAN 0")).starts_with("-ERR a transaction has at most 16384 commands"));
}

#[test]
fn long_pipeline_yields_to_the_other_sessions() {
    let mut host = TestHost::new();
    let mut client = TestClient::new();
    host.turn_began = Instant::now().checked_sub(SLOW);
    let commands = encode(&vec![words("PING"); 100]);
    client.session.handle_input(&commands, &mut host);
    let first = client.output().len();
    assert!(first > 0 && first < 100 * "+PONG\r\n".len(), "a long turn leaves the rest: {first} bytes");
    assert!(client.session.has_yielded() && !client.session.is_done());
    let mut turns = 1;
    let mut answered = first;
    while client.session.has_yielded() {
        client.session.go_on(&mut host);
        answered += client.output().len();
        turns += 1;
    }
    assert_eq!(answered, 100 * "+PONG\r\n".len(), "in {turns} turns");
    assert!(client.session.is_done());
}

#[test]
fn parked_reader_counts_as_memory_and_waits_by_key() {
    let (mut host, mut client) = (TestHost::new(), TestClient::new());
    let keys = repeated("XREAD BLOCK 0 STREAMS", 100, |number| vec![format!("{number:01000}")]);
    let ids = vec![b"0".to_vec(); 100];
    client.send(&mut host, &encode(&[[keys, ids].concat()]));
    assert!(client.session.buffered_bytes() >= 100 * 1000, "{} bytes", client.session.buffered_bytes());
    assert!(matches!(&host.parked[&SessionId(1)], Wait::Streams(streams) if streams.len() == 100));
}
