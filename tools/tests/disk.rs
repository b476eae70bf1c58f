//! A small disk that fills up, and a data directory that is taken away under its node.

mod common;

use std::fs;
use std::path::Path;

use common::{Client, Node, Reply, directory, until};
use walferry_mounts as mounts;

/// A filesystem of this size at `dir`, which goes with this thread and its children; false where this user may not mount one.
fn small_disk(dir: &Path, bytes: u64) -> bool {
    let made = mounts::own().and_then(|()| mounts::make_small(dir, bytes));
    if let Err(error) = made {
        eprintln!("skipped: this user may not mount a filesystem ({error})");
    }
    made.is_ok()
}

fn info(client: &mut Client, key: &str) -> u64 {
    let reply = client.command(&["INFO"]);
    let line = reply.text().lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':').map(str::to_owned));
    line.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("INFO has a number {key}"))
}

/// Few keys change little in memory: without a look at the disk no checkpoint would ever be due.
#[test]
fn few_keys_rewritten_on_a_small_disk_never_fill_it() {
    const DISK_BYTES: u64 = 160 << 20;
    const VALUE_BYTES: usize = 256 << 10;
    let root = directory();
    if !small_disk(root.path(), DISK_BYTES) {
        return;
    }
    // Neither the size of the changes nor that of the log calls for a checkpoint.
    let node = Node::start(root.path(), "a", &["--buffered", "--checkpoint-bytes", "64MiB"]);
    let mut client = node.client();
    let value = "v".repeat(VALUE_BYTES);
    let mut refused = 0;
    for turn in 0..4 * DISK_BYTES as usize / VALUE_BYTES {
        let key = format!("key:{}", turn % 20);
        // A disk that is full for a moment heals without anybody's help.
        until("there is space again", || match client.command(&["SET", &key, &value]) {
            Reply::Error(text) if text.starts_with("NOSPACE") => {
                refused += 1;
                false
            }
            reply => {
                assert_eq!(reply, Reply::Simple("OK".to_owned()));
                true
            }
        });
    }
    assert!(info(&mut client, "store_checkpoints") > 0);
    assert_eq!(client.command(&["STRLEN", "key:7"]), Reply::Integer(VALUE_BYTES as i64));
    eprintln!("{refused} refusals, {} checkpoints", info(&mut client, "store_checkpoints"));
    assert_eq!(node.stop().0, Some(0));
}

/// A disk that is too small for log and data: what fits is kept and served, and space that is made is used at once.
#[test]
fn lone_node_on_a_full_small_disk_answers_nospace_and_goes_on() {
    const VALUE_BYTES: usize = 100_000;
    // As installed (segments of 64 MiB, checkpoints at 64 MiB), and with small segments.
    for (disk_bytes, flags) in [
        (250 << 20, &["--segment-bytes", "64MiB"][..]),
        (250 << 20, &["--segment-bytes", "16MiB"]),
        (120 << 20, &["--checkpoint-bytes", "8MiB", "--keep-bytes-min", "0"]),
    ] {
        let root = directory();
        if !small_disk(root.path(), disk_bytes) {
            return;
        }
        let node = Node::start(root.path(), "a", &[flags, &["--buffered"]].concat());
        let mut client = node.client();
        let value = |number: i64| number.to_string().repeat(VALUE_BYTES / number.to_string().len());
        let mut written = 0;
        let refused = |reply: &Reply| matches!(reply, Reply::Error(text) if text.starts_with("NOSPACE"));
        // Refused for as long as anything may still heal by itself.
        let mut last_success = std::time::Instant::now();
        while last_success.elapsed() < std::time::Duration::from_secs(3) {
            let reply = client.try_command(&["SET", &format!("key:{written}"), &value(written)]);
            match reply.expect("the node goes on") {
                reply if refused(&reply) => std::thread::sleep(std::time::Duration::from_millis(10)),
                reply => {
                    assert_eq!(reply, Reply::Simple("OK".to_owned()));
                    (written, last_success) = (written + 1, std::time::Instant::now());
                }
            }
        }
        assert!(written > 100, "{written}");
        assert_eq!(client.command(&["DBSIZE"]), Reply::Integer(written));
        let blocked_reason = client.command(&["INFO"]).text().contains("space");
        assert!(blocked_reason, "INFO says why");
        eprintln!("{written} values on {disk_bytes} bytes with {flags:?}");
        mounts::resize(root.path(), 2 * disk_bytes).expect("a larger disk");
        until("what there is space for is taken", || !refused(&client.command(&["SET", "after", "space was freed"])));
        assert!(client.command(&["GET", "key:7"]).text() == value(7));
        assert_eq!(node.stop().0, Some(0), "{disk_bytes} {flags:?}");
        let node = Node::start(root.path(), "a", &["--buffered", flags[0], flags[1]]);
        assert_eq!(node.client().command(&["DBSIZE"]), Reply::Integer(written + 1));
    }
}

/// A log that ran out of segments ends where one ends; the checkpoint that lets the others go has nothing beyond that to wait for.
#[test]
fn space_that_another_program_frees_is_used() {
    const DISK_BYTES: u64 = 260 << 20;
    const VALUE_BYTES: usize = 1_000_000;
    let root = directory();
    if !small_disk(root.path(), DISK_BYTES) {
        return;
    }
    let node = Node::start(root.path(), "a", &["--buffered", "--segment-bytes", "64MiB"]);
    let mut client = node.client();
    let value = "v".repeat(VALUE_BYTES);
    let mut set = |number: usize| client.command(&["SET", &format!("key:{}", number % 3), &value]);
    for number in 0..400 {
        until("there is space", || set(number) == Reply::Simple("OK".to_owned()));
    }
    let fill = root.path().join("of-another-program");
    let free = nix::sys::statvfs::statvfs(root.path()).expect("a filesystem");
    let bytes = (free.blocks_available() * free.fragment_size()).saturating_sub(100_000);
    let file = std::fs::File::create(&fill).expect("a file");
    nix::fcntl::posix_fallocate(&file, 0, bytes as i64).expect("there was so much");
    let refused = |reply: &Reply| matches!(reply, Reply::Error(text) if text.starts_with("NOSPACE"));
    let mut number = 400;
    until("the disk is full", || {
        number += 1;
        refused(&set(number))
    });
    std::fs::remove_file(&fill).expect("it was ours");
    drop(file);
    until("writes are taken again", || !refused(&set(number)));
    assert_eq!(node.stop().0, Some(0));
}

/// What is done to a data directory.
type Change = fn(&Path);

/// What a node acknowledges after that nobody would find again.
#[test]
fn node_ends_within_seconds_when_its_files_are_gone() {
    let changes: [(&str, Change); 6] = [
        ("directory renamed", |data| fs::rename(data, data.with_extension("moved")).expect("renamed")),
        ("directory replaced", |data| {
            fs::rename(data, data.with_extension("moved")).expect("renamed");
            fs::create_dir(data).expect("made");
        }),
        ("directory removed", |data| {
            // A segment may be in the making.
            until("it is removed", || fs::remove_dir_all(data).is_ok() || !data.exists());
        }),
        ("lock removed", |data| fs::remove_file(data.join("lock")).expect("removed")),
        ("segment removed", |data| fs::remove_file(data.join("log/0000000000000000.wal")).expect("removed")),
        ("store removed", |data| fs::remove_file(data.join("store/store.redb")).expect("removed")),
    ];
    for (what, change) in changes {
        let root = directory();
        let node = Node::start(root.path(), "a", &[]);
        assert_eq!(node.client().command(&["SET", "k", "v"]), Reply::Simple("OK".to_owned()));
        let data = node.data.clone();
        change(&data);
        assert_eq!(node.end(), Some(1), "{what}");
        let log = fs::read_to_string(root.path().join("a.log")).expect("a log");
        let told = log.lines().any(|line| line.contains("stepping down") && line.contains(&*data.to_string_lossy()));
        assert!(told, "{what}: {log}");
        if what == "directory replaced" {
            assert_eq!(fs::read_dir(&data).expect("there").count(), 0, "nothing is written into another directory");
        }
    }
}

/// Segments that replace each other all the time are not taken for files that are gone.
#[test]
fn recycled_segments_are_no_files_that_are_gone() {
    let root = directory();
    let node = Node::start(root.path(), "a", &["--checkpoint-bytes", "1MiB", "--keep-bytes-min", "0"]);
    let mut client = node.client();
    let value = "v".repeat(200_000);
    let begun = std::time::Instant::now();
    let mut written = 0;
    // Longer than two looks.
    while begun.elapsed() < walferry_engine::held::LOOK_INTERVAL * 5 / 2 {
        assert_eq!(client.command(&["SET", "key", &value]), Reply::Simple("OK".to_owned()));
        written += 1;
    }
    assert!(!node.data.join("log/0000000000000000.wal").exists(), "{written} writes recycle segments");
    // A short frame ends within what was a long one: nothing of the log is missing there.
    assert_eq!(client.command(&["SET", "key", "short"]), Reply::Simple("OK".to_owned()));
    assert_eq!(node.stop().0, Some(0));
    let node = Node::start(root.path(), "a", &[]);
    let log = fs::read_to_string(root.path().join("a.log")).expect("a log");
    assert!(log.contains("log recovered") && !log.contains("torn"), "{log}");
    assert_eq!(node.client().command(&["GET", "key"]), Reply::Bulk("short".to_owned()));
}

#[test]
fn segment_size_other_than_the_directorys_is_refused() {
    let root = directory();
    let node = Node::start(root.path(), "a", &[]);
    assert_eq!(node.stop().0, Some(0));
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_walferry"));
    command.args(["start", "--name", "a", "--listen", "127.0.0.1:0", "--peer-listen", "127.0.0.1:0", "--data"]);
    let refused = command.arg(root.path().join("a")).args(["--segment-bytes", "64MiB"]).output().expect("it runs");
    let text = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && text.contains("segments of 16MiB") && text.contains("64MiB"), "{text}");
}

/// Beyond the limit of a file's size the kernel ends a process by SIGXFSZ, without a word.
#[test]
fn file_size_limit_ends_a_node_with_file_and_limit() {
    const LIMIT_BYTES: u64 = 48 << 20;
    let limited = |bytes: u64| {
        let mut command = std::process::Command::new("prlimit");
        command.arg(format!("--fsize={bytes}")).arg(env!("CARGO_BIN_EXE_walferry"));
        command
    };
    let root = directory();
    let refused = Node::try_start_by(limited(1 << 20), root.path(), "small", &[]).err().expect("no segment fits");
    assert!(refused.contains("1048576") && refused.contains("RLIMIT_FSIZE"), "{refused}");
    let node = Node::start_by(
        limited(LIMIT_BYTES),
        root.path(),
        "a",
        &["--log-buffer-bytes", "48MiB", "--checkpoint-bytes", "1MiB"],
    );
    let mut client = node.client();
    let value = "v".repeat(200_000);
    let mut written = 0;
    while matches!(client.try_command(&["SET", &format!("key:{written}"), &value]), Ok(Reply::Simple(_))) {
        written += 1;
        assert!(written < 1000, "the store's file is larger than any file may be");
    }
    assert_eq!(node.end(), Some(1));
    let log = fs::read_to_string(root.path().join("a.log")).expect("a log");
    let told = log.lines().find(|line| line.contains("store.redb") && line.contains("RLIMIT_FSIZE"));
    assert!(told.is_some_and(|line| line.contains(&LIMIT_BYTES.to_string())), "{log}");
    // Nothing that was acknowledged is missing where the limit is gone.
    let node = Node::start(root.path(), "a", &[]);
    let Reply::Integer(found) = node.client().command(&["DBSIZE"]) else { panic!("a number") };
    // The command that met the limit was not answered, and its record may be in the log.
    assert!((written..=written + 1).contains(&found), "{found} of {written}");
}

/// It counts no blocks, used or free.
#[test]
fn node_runs_on_a_filesystem_without_a_size() {
    let root = directory();
    if let Err(error) = mounts::own().and_then(|()| mounts::make_unbounded(root.path())) {
        eprintln!("skipped: this user may not mount a filesystem ({error})");
        return;
    }
    let node = Node::start(root.path(), "a", &["--buffered", "--checkpoint-bytes", "1MiB"]);
    let mut client = node.client();
    for turn in 0..20 {
        let value = "v".repeat(200_000);
        assert_eq!(client.command(&["SET", &format!("key:{turn}"), &value]), Reply::Simple("OK".to_owned()));
    }
    assert_eq!(node.stop().0, Some(0));
}
