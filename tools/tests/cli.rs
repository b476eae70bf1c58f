//! The command line as its users meet it: what is wrong is said clearly, and exit codes are those of the help text.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use walferry_engine::epoch::EpochHistory;
use walferry_engine::frame::FrameHeader;
use walferry_engine::limits::{FRAME_HEADER_BYTES, SEGMENT_BYTES_MIN};
use walferry_engine::log::SyncMethod;
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_engine::meta::Meta;

/// What a subcommand did.
struct Outcome {
    code: Option<i32>,
    out: String,
    err: String,
}

fn walferry(arguments: &[&str]) -> Outcome {
    let command = Command::new(env!("CARGO_BIN_EXE_walferry"))
        .args(arguments)
        .stdin(Stdio::null())
        .env("COLUMNS", "200")
        .output()
        .expect("the binary runs");
    let Output { status, stdout, stderr } = command;
    let text = |bytes| String::from_utf8(bytes).expect("output is text");
    Outcome { code: status.code(), out: text(stdout), err: text(stderr) }
}

fn refused(arguments: &[&str], code: i32, says: &str) {
    let outcome = walferry(arguments);
    assert_eq!(outcome.code, Some(code), "{arguments:?}: {}", outcome.err);
    assert!(outcome.err.contains(says), "{arguments:?} should say {says:?}:\n{}", outcome.err);
    assert!(!outcome.err.contains("panicked"), "{arguments:?}: {}", outcome.err);
}

fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a temporary directory")
}

/// An address where nobody listens.
fn closed_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port")
}

#[test]
fn wrong_usage_is_exit_code_2_and_says_what_would_do() {
    for (arguments, says) in [
        (&[][..], "Usage: walferry"),
        (&["statsu"], "similar subcommand"),
        (&["start"], "data is not set: give --data"),
        (&["start", "--data", "d", "--folow", "x"], "'--follow'"),
        (&["start", "--data", "d", "--follow", "6401"], "\"6401\" is not HOST:PORT"),
        (&["start", "--data", "d", "--name", "Node A"], "expected 1 to 63 of a-z"),
        (&["start", "--data", "d", "--segment-bytes", "64MB"], "such as 64MiB"),
        (&["start", "--data", "d", "--commit-level", "durable"], "is not a commit level"),
        (&["start", "--data", "d", "--peer-timeout", "5"], "such as 100us or 5s"),
        (&["start", "--data", "d", "--sync-method", "fsync"], "expected dsync or fdatasync"),
        (&["start", "--data", "d", "--write-depth", "99"], "write_depth = 99: choose 1 to 32"),
        (&["start", "--data", "d", "--name", "a", "--log-filter", "a=b=c"], "log_filter = \"a=b=c\""),
        (&["start", "--config", "/nonexistent.toml"], "cannot read the configuration /nonexistent.toml"),
        (&["load", "-T", "5", "-t", "5"], "cannot be used with"),
        (&["load", "-c", "0"], "--clients 0: at least 1"),
        (&["load", "-b", "tpcc"], "there are tpcb-like"),
        (&["load", "--url", "http://a"], "expected redis://HOST:PORT"),
        (&["status", "--url", "127.0.0.1:6400"], "has no scheme"),
        (&["promote"], "--url <URL>"),
        (&["log", "dump", "--data", "d", "--from", "12"], "is not an LSN"),
        (&["fsync", "--data", ".", "--seconds", "1"], "3..=3600"),
        (&["demo", "--seconds", "0"], "1..=600"),
    ] {
        refused(arguments, 2, says);
    }
}

#[test]
fn what_fails_is_exit_code_1_and_names_the_place() {
    let dir = directory();
    let path = dir.path().to_str().expect("a path of text");
    let address = closed_address().to_string();
    let url = format!("redis://{address}");
    refused(&["status", "--url", &url], 1, &format!("cannot connect to {address}"));
    refused(&["promote", "--url", &url], 1, "is the node running there?");
    refused(&["load", "--url", &url, "-t", "1"], 1, &address);
    refused(&["log", "verify", "--data", path], 1, "there is no `meta` file");
    refused(&["log", "dump", "--data", "/nonexistent"], 1, "/nonexistent");
    refused(&["fsync", "--data", "/nonexistent"], 1, "/nonexistent: no such directory");
    std::fs::write(dir.path().join("thesis.tex"), "x").expect("a file");
    refused(&["init", "--data", path, "--name", "a", "--buffered"], 1, "holds \"thesis.tex\"");
}

#[test]
fn a_demo_leaves_foreign_directories_alone() {
    let dir = directory();
    std::fs::write(dir.path().join("precious"), "x").expect("a file");
    refused(&["demo", "--dir", dir.path().to_str().expect("text")], 2, "was not made by a demo");
    assert!(dir.path().join("precious").exists());
}

#[test]
fn every_help_text_has_examples_and_tells_exit_codes() {
    for command in ["start", "init", "promote", "status", "load", "log", "fsync", "config", "demo", "link", "distance"]
    {
        let outcome = walferry(&[command, "--help"]);
        assert_eq!(outcome.code, Some(0));
        assert!(outcome.out.contains("Examples:"), "{command}:\n{}", outcome.out);
        assert!(outcome.out.to_lowercase().contains("exit code"), "{command}:\n{}", outcome.out);
    }
    assert!(walferry(&["--help"]).out.contains("Exit codes:"));
}

#[test]
fn a_configuration_is_checked_and_shown() {
    let dir = directory();
    let file = dir.path().join("walferry.toml");
    let name = file.to_str().expect("text");
    std::fs::write(&file, "name = \"a\"\nlisten = \"0.0.0.0:7000\"\nsync = \"ANY 1 (b, c)\"\n").expect("a file");
    let outcome = walferry(&["config", "check", name]);
    assert_eq!((outcome.code, outcome.out.trim_end()), (Some(0), format!("{name}: ok").as_str()), "{}", outcome.err);
    let shown = walferry(&["config", "show", "--config", name, "--listen", "127.0.0.1:0"]).out;
    let line = |key: &str| shown.lines().find(|line| line.starts_with(key)).unwrap_or_default().to_owned();
    assert!(line("listen").contains("127.0.0.1:0") && line("listen").ends_with("# flag"), "{shown}");
    assert!(line("sync =").contains("ANY 1 (b, c)") && line("sync =").ends_with(name), "{shown}");
    assert!(line("commit_level").ends_with("# default"), "{shown}");

    std::fs::write(&file, "name = \"a\"\ncommit_levle = \"local\"\n").expect("a file");
    refused(&["config", "check", name], 2, "line 2: unknown key `commit_levle`; did you mean `commit_level`?");
    std::fs::write(&file, "name = \"a\"\npeer_timeout = \"150ms\"\n").expect("a file");
    refused(&["config", "check", name], 2, "two heartbeats must fit into peer_timeout = 150ms");
    refused(&["start", "--data", "d", "--config", name], 2, "heartbeat_interval = 100ms");
}

#[test]
fn password_in_a_file_that_others_can_read_is_refused() {
    let root = directory();
    let file = root.path().join("walferry.toml");
    let name = file.to_str().expect("a path of text");
    let chmod = |mode| std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).expect("our file");
    std::fs::write(&file, "name = \"a\"\npassword = \"hunter2\"\n").expect("our file");
    chmod(0o644);
    for arguments in [&["config", "check", name][..], &["start", "--data", "d", "--config", name]] {
        refused(arguments, 2, "can read or write it (mode 0644): chmod 640 it");
    }
    assert!(!walferry(&["config", "check", name]).err.contains("hunter2"));
    chmod(0o640);
    assert_eq!(walferry(&["config", "check", name]).code, Some(0));
    std::fs::write(&file, "name = \"a\"\n").expect("our file");
    chmod(0o644);
    assert_eq!(walferry(&["config", "check", name]).code, Some(0), "without a password anybody may read it");
}

#[test]
fn init_writes_down_what_it_was_told_and_only_once() {
    let dir = directory();
    let data = dir.path().join("a");
    let path = data.to_str().expect("text");
    let flags = ["--name", "a", "--sync-method", "fdatasync", "--write-depth", "3", "--segment-bytes", "16MiB"];
    let arguments = [&["init", "--buffered", "--data", path][..], &flags].concat();
    let outcome = walferry(&arguments);
    assert_eq!(outcome.code, Some(0), "{}", outcome.err);
    assert!(outcome.out.contains("node a, sync_method = fdatasync, write_depth = 3, segment_bytes = 16MiB"));
    let meta = Meta::load(&data).expect("readable").expect("there");
    assert_eq!((meta.name.as_str(), meta.write_depth, meta.segment_bytes), ("a", 3, 16 << 20));
    refused(&arguments, 1, "is initialised already");
}

#[test]
fn init_measures_what_it_is_not_told() {
    let dir = directory();
    let data = dir.path().join("a");
    let outcome = walferry(&["init", "--name", "a", "--data", data.to_str().expect("text")]);
    if outcome.err.contains("takes no O_DIRECT writes") {
        // The build directory is on a memory filesystem: the refusal is the right answer.
        assert_eq!(outcome.code, Some(1));
        return;
    }
    assert_eq!(outcome.code, Some(0), "{}", outcome.err);
    assert!(outcome.out.contains("durable/s") && outcome.out.contains("recommended: sync_method"), "{}", outcome.out);
    assert!(Meta::load(&data).expect("readable").is_some());
}

const EPOCH: Epoch = Epoch(1);

/// A data directory whose log has this many frames of one record each.
fn write_log(data: &Path, frames: u64) {
    let meta = Meta {
        cluster_id: 1,
        name: "a".to_owned(),
        segment_bytes: SEGMENT_BYTES_MIN,
        sync_method: SyncMethod::Fdatasync,
        write_depth: 1,
    };
    std::fs::create_dir_all(data.join("log")).expect("a directory");
    meta.save(data).expect("meta");
    let mut history = EpochHistory::default();
    history.push(EPOCH, Lsn::ZERO).expect("the first epoch");
    history.save(data).expect("the history");
    let mut segment = vec![0; SEGMENT_BYTES_MIN as usize];
    let (mut lsn, mut previous_crc) = (Lsn::ZERO, 0);
    for number in 0..frames {
        // One effect: put, the key and the value with their lengths in front.
        let record = format!("\x01\x01k\x01{}", number % 10);
        let at = lsn.0 as usize;
        let payload = &mut segment[at + FRAME_HEADER_BYTES..];
        payload[..4].copy_from_slice(&(record.len() as u32).to_le_bytes());
        payload[4..4 + record.len()].copy_from_slice(record.as_bytes());
        let header = FrameHeader {
            filler: false,
            epoch: EPOCH,
            lsn,
            payload_bytes: 4 + record.len() as u32,
            record_count: 1,
            previous_crc,
            crc: 0,
            flushed: lsn,
            committed: lsn,
            sealed_at_us: 1_700_000_000_000_000 + number,
        };
        let header = header.seal(&mut segment[at..]);
        (lsn, previous_crc) = (header.end(), header.crc);
    }
    std::fs::write(data.join("log/0000000000000000.wal"), segment).expect("the segment");
}

#[test]
fn a_log_is_dumped_frame_by_frame() {
    let dir = directory();
    write_log(dir.path(), 5);
    let data = dir.path().to_str().expect("text");
    let outcome = walferry(&["log", "dump", "--data", data, "--from", "0/1FFF", "--limit", "2", "--records"]);
    let lines: Vec<&str> = outcome.out.lines().collect();
    assert_eq!(outcome.code, Some(0), "{}", outcome.err);
    assert_eq!(lines.len(), 4, "{}", outcome.out);
    assert!(lines[0].starts_with("0/1000 frame epoch 1, 1 records, "), "the frame that holds 0/1FFF: {}", lines[0]);
    assert!(lines[0].contains("sealed 2023-11-14T22:13:20.000001Z"), "{}", lines[0]);
    assert!(lines[1].contains("put \"k\" \"1\""), "{}", lines[1]);
    assert!(lines[2].starts_with("0/2000 frame"), "{}", lines[2]);
    let whole = walferry(&["log", "dump", "--data", data]).out;
    assert_eq!(whole.lines().count(), 6, "five frames and where they end:\n{whole}");
    assert!(whole.lines().last().is_some_and(|line| line.starts_with("0/5000 no further frame")), "{whole}");
}

#[test]
fn damage_in_a_log_is_found_and_placed() {
    let dir = directory();
    write_log(dir.path(), 5);
    let data = dir.path().to_str().expect("text");
    let outcome = walferry(&["log", "verify", "--data", data]);
    assert_eq!(outcome.code, Some(0), "{}", outcome.err);
    assert!(outcome.out.contains("0/0 to 0/5000, no damage") && outcome.out.contains("5 frames, 5 records"));
    let segment = dir.path().join("log/0000000000000000.wal");
    let mut bytes = std::fs::read(&segment).expect("the segment");
    bytes[0x2000 + FRAME_HEADER_BYTES + 6] ^= 1;
    std::fs::write(&segment, bytes).expect("the segment");
    for part in [segment.to_str().expect("text"), "offset 8192", "LSN 0/2000", "checksum"] {
        refused(&["log", "verify", "--data", data], 1, part);
    }
}

/// Answers on one connection after the other as a server that knows only `known` commands, until the test ends.
fn plain_server(known: &'static [&'static str]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("its address");
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || answer(stream, known));
        }
    });
    address
}

fn answer(mut stream: TcpStream, known: &[&str]) {
    let (mut held, mut buffer) = (String::new(), [0; 4096]);
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        held.push_str(&String::from_utf8_lossy(&buffer[..count]));
        // A command is `*n`, then n times a length and a word, each on its own line.
        while let Some(lines) = held.strip_prefix('*').and_then(|text| text.split_once("\r\n")) {
            let words = lines.0.parse::<usize>().expect("a count") * 2;
            let parts: Vec<&str> = lines.1.splitn(words + 1, "\r\n").collect();
            if parts.len() <= words {
                break;
            }
            let reply = match (parts[1], known.contains(&parts[1])) {
                ("GET", true) => "$-1\r\n".to_owned(),
                (_, true) => "+OK\r\n".to_owned(),
                (name, false) => format!("-ERR unknown command '{name}'\r\n"),
            };
            if stream.write_all(reply.as_bytes()).is_err() {
                return;
            }
            held = parts[words].to_owned();
        }
    }
}

#[test]
fn load_measures_any_server_that_speaks_resp() {
    let dir = directory();
    let (script, log) = (dir.path().join("set.script"), dir.path().join("run.hlog"));
    std::fs::write(&script, "\\set k random(1, 10)\nSET key::k :payload\n").expect("the script");
    let url = format!("redis://{}", plain_server(&["GET", "PING", "SET"]));
    let (script, log) = (script.to_str().expect("text"), log.to_str().expect("text"));
    let base = ["load", "--url", &url, "-f", script, "-c", "3", "-j", "2", "-t", "7"];
    let outcome = walferry(&[&base[..], &["--json", "--log", log, "--seed", "5", "-D", "x=1"]].concat());
    assert_eq!(outcome.code, Some(0), "{}", outcome.err);
    let json: serde_json::Value = serde_json::from_str(&outcome.out).expect("JSON");
    assert_eq!(json["load"]["transactions"], 21);
    assert_eq!(json["load"]["failed"], 0);
    assert_eq!(json["load"]["seed"], 5);
    let (p50, max) = (&json["load"]["latency_ms"]["p50"], &json["load"]["latency_ms"]["max"]);
    assert!(p50.as_f64() > Some(0.0) && max.as_f64() >= p50.as_f64(), "{}", outcome.out);
    let log = std::fs::read_to_string(log).expect("the interval log");
    assert!(log.contains("#[StartTime:") && log.lines().any(|line| line.starts_with("0.000,")), "{log}");

    let text = walferry(&[&base[..], &["-r"]].concat()).out;
    for line in ["number of transactions actually processed: 21/21", "tps = ", "latency average = ", "p99.9 = "] {
        assert!(text.contains(line), "{line} is missing:\n{text}");
    }
    assert!(text.contains("SET key::k :payload"), "-r names each command:\n{text}");
}

#[test]
fn load_says_what_a_server_lacks() {
    let url = format!("redis://{}", plain_server(&["GET", "PING"]));
    refused(&["load", "--url", &url, "--level", "local", "-t", "1"], 1, "does not know commit levels");
    refused(&["load", "--url", &url, "-t", "1"], 1, "fill them with `walferry load -i");
    let dir = directory();
    let script = dir.path().join("a.script");
    std::fs::write(&script, "INCR k\n").expect("the script");
    let script = script.to_str().expect("text");
    refused(
        &["load", "--url", &url, "-f", script, "-t", "1"],
        1,
        "no transaction succeeded: ERR unknown command 'INCR'",
    );
    std::fs::write(script, "SET k \"x\n").expect("the script");
    refused(&["load", "--url", &url, "-f", script, "-t", "1"], 2, "line 1: a quote is not closed");
}
