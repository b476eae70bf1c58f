//! One real node as its users meet it: it keeps what it said, names what is wrong, and ends when asked.

mod common;

use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::{Client, Node, Reply, directory, log_bytes, lsn_bytes, until};
use walferry_engine::prepare::TEMPORARY_FILE;

fn ok() -> Reply {
    Reply::Simple("OK".into())
}

#[test]
fn writes_survive_a_clean_stop_and_a_kill() {
    let root = directory();
    let node = Node::start(root.path(), "a", &[]);
    let mut client = node.client();
    for number in 0..500 {
        client.send(&["SET", &format!("key:{number}"), &number.to_string()]).expect("send");
    }
    for _ in 0..500 {
        assert_eq!(client.reply().expect("reply"), ok());
    }
    assert_eq!(client.command(&["MULTI"]), ok());
    client.command(&["INCRBY", "sum", "5"]);
    client.command(&["XADD", "history", "*", "delta", "5"]);
    let Reply::Array(replies) = client.command(&["EXEC"]) else { panic!("EXEC answers with an array") };
    assert_eq!(replies[0], Reply::Integer(5));
    let (code, took) = node.stop();
    assert_eq!(code, Some(0), "SIGTERM is a clean end");
    assert!(took < Duration::from_secs(5), "SIGTERM took {took:?}");

    let node = Node::start(root.path(), "a", &[]);
    let mut client = node.client();
    assert_eq!(client.command(&["DBSIZE"]), Reply::Integer(502));
    assert_eq!(client.command(&["INCRBY", "sum", "1"]), Reply::Integer(6));
    node.kill();

    let node = Node::start(root.path(), "a", &[]);
    let mut client = node.client();
    assert_eq!(client.command(&["GET", "sum"]), Reply::Bulk("6".into()));
    assert_eq!(client.command(&["XLEN", "history"]), Reply::Integer(1));
    assert_eq!(client.command(&["GET", "key:499"]), Reply::Bulk("499".into()));
}

/// Everything below `directory` that others than its user and group can do something with, or its group can write.
fn open_to_others(directory: &Path) -> Vec<String> {
    let mut open = Vec::new();
    for entry in std::fs::read_dir(directory).expect("our directory").map(|entry| entry.expect("an entry").path()) {
        let meta = std::fs::symlink_metadata(&entry).expect("an entry");
        if meta.mode() & 0o027 != 0 {
            open.push(format!("{} {:o}", entry.display(), meta.mode()));
        }
        if meta.is_dir() {
            open.extend(open_to_others(&entry));
        }
    }
    open
}

/// `walferry`, started by somebody whose umask takes nothing away.
fn without_umask() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_walferry"));
    // SAFETY: umask is a plain system call, fit for the moment between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::umask(0);
            Ok(())
        });
    }
    command
}

#[test]
fn data_of_a_witness_is_closed_to_others() {
    let root = directory();
    let (data, secret, log) = (root.path().join("w"), root.path().join("secret"), root.path().join("w.log"));
    std::fs::create_dir(&data).expect("a directory that is there already");
    std::fs::set_permissions(&data, std::fs::Permissions::from_mode(0o777)).expect("our directory");
    assert!(
        without_umask()
            .arg("secret")
            .arg(&secret)
            .stdout(std::process::Stdio::null())
            .status()
            .expect("the binary starts")
            .success()
    );
    assert_eq!(std::fs::metadata(&secret).expect("it was made").mode() & 0o7777, 0o600);
    let mut witness = without_umask()
        .args([
            "witness",
            "--name",
            "w",
            "--members",
            "w=127.0.0.1:7001,a=127.0.0.1:7002",
            "--peer-listen",
            "127.0.0.1:0",
        ])
        .arg("--data")
        .arg(&data)
        .arg("--peer-secret")
        .arg(&secret)
        .stderr(std::fs::File::create(&log).expect("a log"))
        .spawn()
        .expect("the binary starts");
    let log = || std::fs::read_to_string(&log).expect("its log");
    common::until("the witness serves", || log().contains("witness w serves"));
    let mode = std::fs::metadata(&data).expect("our directory").mode() & 0o7777;
    let open = open_to_others(&data);
    witness.kill().and_then(|()| witness.wait()).expect("a child can be killed");
    assert_eq!((mode, open), (0o750, Vec::new()), "{}", log());
    assert!(log().contains("its mode was 0777 and is 0750 now"), "{}", log());
}

#[test]
fn data_is_closed_to_others_whatever_the_umask_says() {
    let root = directory();
    let data = root.path().join("a");
    std::fs::create_dir(&data).expect("a directory that is there already");
    std::fs::set_permissions(&data, std::fs::Permissions::from_mode(0o777)).expect("our directory");
    let command = without_umask();
    let node = Node::start_by(command, root.path(), "a", &["--checkpoint-bytes", "1MiB"]);
    let mut client = node.client();
    for number in 0..40 {
        assert_eq!(client.command(&["SET", &format!("k{number}"), &"v".repeat(64 << 10)]), ok());
    }
    common::until("a checkpoint is written", || {
        let info = client.command(&["INFO"]).text().to_owned();
        !info.contains("store_checkpoints:0\r\n") && info.contains("store_checkpoints:")
    });
    let mode = std::fs::metadata(&data).expect("our directory").mode() & 0o7777;
    assert_eq!(mode, 0o750, "the directory that was there is narrowed");
    assert_eq!(open_to_others(&data), Vec::<String>::new());
    assert!(data.join("store").is_dir() && data.join("meta").is_file());
    let ready = std::fs::metadata(root.path().join("a.ready")).expect("the ready file").mode();
    assert_eq!(ready & 0o027, 0, "{ready:o}");
    let log = std::fs::read_to_string(root.path().join("a.log")).expect("the node's log");
    assert!(log.contains("its mode was 0777 and is 0750 now"), "{log}");
    drop(node);
}

#[test]
fn a_second_start_on_the_same_data_names_the_first() {
    let root = directory();
    let node = Node::start(root.path(), "a", &[]);
    let log = Node::try_start(root.path(), "a", &[]).err().expect("the second start fails");
    let named = log.lines().last().is_some_and(|line| line.contains(&node.pid().to_string()));
    assert!(named, "the error names the process that holds the directory:\n{log}");
    assert_eq!(node.client().command(&["PING"]), Reply::Simple("PONG".into()), "the first node goes on");
}

/// Writes at level `local` until the log holds several frames; gives the flushed end of the log in bytes.
fn fill(node: &Node, commits: u64) -> u64 {
    let mut client = node.client();
    for number in 0..commits {
        assert_eq!(client.command(&["SET", &format!("k{number}"), "value"]), ok());
    }
    lsn_bytes(client.command(&["LSN"]).text())
}

fn flip(node_data: &std::path::Path, offset: u64) {
    let file = node_data.join("log/0000000000000000.wal");
    let mut file = std::fs::OpenOptions::new().read(true).write(true).open(file).expect("the first segment");
    let mut byte = [0];
    file.seek(SeekFrom::Start(offset)).unwrap();
    file.read_exact(&mut byte).unwrap();
    file.seek(SeekFrom::Start(offset)).unwrap();
    file.write_all(&[byte[0] ^ 0x10]).unwrap();
    file.sync_all().unwrap();
}

#[test]
fn damage_in_what_was_flushed_stops_the_node_and_is_named() {
    let root = directory();
    let node = Node::start(root.path(), "a", &[]);
    let data = node.data.clone();
    fill(&node, 20);
    node.kill();
    // Each commit of a lone client is a frame of its own, 4 KiB: this is in the fifth.
    flip(&data, 4 * 4096 + 70);
    let before = log_bytes(&data, 0, 16 << 20);
    let log = Node::try_start(root.path(), "a", &[]).err().expect("the node refuses to start");
    assert!(log.contains("0000000000000000.wal") && log.contains("0/4000"), "file and LSN are named:\n{log}");
    assert!(log_bytes(&data, 0, 16 << 20) == before, "the damaged log is not touched");
}

#[test]
fn a_torn_tail_is_cut_and_said() {
    let root = directory();
    let node = Node::start(root.path(), "a", &[]);
    let data = node.data.clone();
    fill(&node, 19);
    // The node's own watermark of what was durable, as it stood before the last commit: a crash takes the newer one with it.
    let watermark = std::fs::read(data.join("durable")).expect("the watermark");
    let mut client = node.client();
    assert_eq!(client.command(&["SET", "k19", "value"]), ok());
    let end = lsn_bytes(client.command(&["LSN"]).text());
    node.kill();
    std::fs::write(data.join("durable"), watermark).unwrap();
    flip(&data, end - 1);
    let node = Node::start(root.path(), "a", &[]);
    let log = std::fs::read_to_string(root.path().join("a.log")).expect("the node's log");
    let told = log.lines().find(|line| line.contains("torn tail")).expect("the cut is logged");
    assert!(
        told.contains("INFO") && told.contains("from=") && told.contains("to="),
        "the range, and no warning: {told}"
    );
    let mut client = node.client();
    assert_eq!(client.command(&["GET", "k18"]), Reply::Bulk("value".into()));
    assert_eq!(client.command(&["GET", "k19"]), Reply::Nil, "the torn commit is gone");
    assert_eq!(client.command(&["SET", "k19", "again"]), ok());
}

#[test]
fn full_disk_refuses_writes_and_serves_reads() {
    let root = directory();
    let image = root.path().join("disk.img");
    let mount = root.path().join("disk");
    std::fs::create_dir(&mount).unwrap();
    std::fs::File::create(&image).unwrap().set_len(96 << 20).unwrap();
    let run =
        |program: &str, args: &[&str]| Command::new(program).args(args).output().is_ok_and(|out| out.status.success());
    let (image_name, mount_name) = (image.to_str().unwrap(), mount.to_str().unwrap());
    if !run("mkfs.ext4", &["-q", "-m", "0", image_name]) || !run("mount", &["-o", "loop", image_name, mount_name]) {
        println!("skipped: mounting a small disk needs root, mkfs.ext4 and a loop device");
        return;
    }
    let outcome = std::panic::catch_unwind(|| full_disk(&mount));
    assert!(run("umount", &["-l", mount_name]), "the small disk is unmounted");
    outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

fn full_disk(mount: &std::path::Path) {
    let node = Node::start(mount, "a", &["--keep-bytes-min", "0"]);
    let mut client = node.client();
    assert_eq!(client.command(&["SET", "kept", "1"]), ok());
    let ballast = mount.join("ballast");
    fill_up(&ballast);
    let value = "v".repeat(256 << 10);
    let mut refusal = None;
    for number in 0..400 {
        match client.command(&["SET", &format!("big:{number}"), &value]) {
            Reply::Error(text) => {
                refusal = Some(text);
                break;
            }
            reply => assert_eq!(reply, ok()),
        }
    }
    let refusal = refusal.expect("a full disk refuses writes");
    assert!(refusal.contains("space"), "the refusal says why: {refusal}");
    assert_eq!(client.command(&["GET", "kept"]), Reply::Bulk("1".into()), "reads go on");
    std::fs::remove_file(&ballast).unwrap();
    common::until("writes are taken again", || client.command(&["SET", "after", "1"]) == ok());
    node.kill();
    // A running node makes segments and gives up on them, and a start removes what the last one did not finish: neither may free space.
    let _ = std::fs::remove_file(mount.join("a/log").join(TEMPORARY_FILE));
    fill_up(&ballast);
    // What was freed is free only now, after the flush.
    let rest = mount.join("rest");
    fill_up(&rest);
    let said = refused_start(&mount.join("a"));
    assert!(
        said.contains("No space left") && said.contains("free some space there"),
        "it says why and what to do: {said}"
    );
    std::fs::remove_file(&ballast).and_then(|()| std::fs::remove_file(&rest)).unwrap();
    let node = Node::start(mount, "a", &["--keep-bytes-min", "0"]);
    for key in ["kept", "after"] {
        assert_eq!(node.client().command(&["GET", key]), Reply::Bulk("1".into()), "nothing is lost");
    }
}

/// What a node says that has to end at its start.
fn refused_start(data: &std::path::Path) -> String {
    // Should it serve instead, the test fails within a minute.
    let mut command = Command::new("timeout");
    command.args(["60", env!("CARGO_BIN_EXE_walferry"), "start", "--name", "a", "--keep-bytes-min", "0"]);
    command.args(["--listen", "127.0.0.1:0", "--peer-listen", "127.0.0.1:0"]).arg("--data").arg(data);
    let ended = command.output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert_eq!(ended.status.code(), Some(1), "{said}");
    said
}

/// Leaves no block free.
fn fill_up(file: &std::path::Path) {
    let mut file = std::fs::File::create(file).unwrap();
    let block = vec![1; 64 << 10];
    while file.write_all(&block).is_ok() {}
    while file.write_all(&block[..512]).is_ok() {}
    // What does not fit any more is the point; the error of the last write is expected.
    let _ = file.sync_all();
}

#[test]
fn a_protocol_error_closes_that_connection_only() {
    let root = directory();
    let node = Node::start(root.path(), "a", &[]);
    let mut good = node.client();
    let mut bad = std::net::TcpStream::connect(node.listen).unwrap();
    bad.write_all(b"*1\r\n+not a bulk string\r\n").unwrap();
    let mut answer = String::new();
    bad.read_to_string(&mut answer).expect("an answer, then the end");
    assert!(answer.starts_with("-ERR Protocol error"), "{answer}");
    assert_eq!(good.command(&["PING"]), Reply::Simple("PONG".into()));
}

#[test]
fn undurable_write_is_read_by_its_own_session_only() {
    let root = directory();
    let node = Node::start(root.path(), "a", &["--commit-level", "off"]);
    let mut writer = node.client();
    let mut reader = node.client();
    for number in 0..200 {
        let value = number.to_string();
        assert_eq!(writer.command(&["SET", "k", &value]), ok());
        assert_eq!(writer.command(&["GET", "k"]), Reply::Bulk(value.clone()), "the writer reads its own write");
        // The writer's read was answered, so the write is durable and everybody may see it.
        assert_eq!(reader.command(&["GET", "k"]), Reply::Bulk(value));
    }
}

#[test]
fn a_client_that_goes_away_in_the_middle_disturbs_nobody() {
    let root = directory();
    let node = Node::start(root.path(), "a", &[]);
    for _ in 0..50 {
        let mut leaver = Client::connect(node.listen).unwrap();
        leaver.send(&["SET", "gone", "1"]).unwrap();
        drop(leaver);
    }
    let mut half = std::net::TcpStream::connect(node.listen).unwrap();
    half.write_all(b"*3\r\n$3\r\nSET\r\n$1\r\n").unwrap();
    drop(half);
    assert_eq!(node.client().command(&["SET", "still", "here"]), ok());
}

/// A checkpoint that a truncation should have undone: the store is of one log, and the files beside it are of another that is as
/// long.
#[test]
fn store_of_another_log_is_made_anew() {
    let root = directory();
    let write = |name: &str, value: &str| {
        let node = Node::start(root.path(), name, &[]);
        let mut client = node.client();
        for number in 0..20 {
            assert_eq!(client.command(&["SET", &format!("key:{number}"), value]), ok());
        }
        node.stop();
    };
    write("a", "kept");
    write("b", "gone");
    let store = |name: &str| root.path().join(name).join("store/store.redb");
    std::fs::copy(store("b"), store("a")).expect("the other store");
    let node = Node::start(root.path(), "a", &[]);
    assert_eq!(node.client().command(&["GET", "key:7"]), Reply::Bulk("kept".into()), "the log says it");
    node.kill();
    let log = std::fs::read_to_string(root.path().join("a.log")).expect("its log");
    assert!(log.contains("the store is made anew from the log"), "{log}");
}

/// A node that listens at every address tells each client the one at which that client reached it.
#[test]
fn leader_that_listens_everywhere_tells_a_usable_address() {
    for (listen, hosts) in [("0.0.0.0:0", &["127.0.0.1", "127.0.0.2"][..]), ("[::]:0", &["127.0.0.1", "[::1]"])] {
        let root = directory();
        let Ok(node) = Node::try_start(root.path(), "a", &["--listen", listen]) else {
            assert!(listen.starts_with('['), "0.0.0.0 can be listened at");
            eprintln!("skipped: no IPv6 here");
            continue;
        };
        for host in hosts {
            let expected = format!("{host}:{}", node.listen.port());
            let mut client = Client::connect(expected.parse().expect("an address")).expect("it listens everywhere");
            assert_eq!(client.command(&["LEADER"]), Reply::Bulk(expected.clone()));
            let told = client.command(&["DESCRIBE"]);
            assert!(told.text().contains(&format!("\"leader_address\":\"{expected}\"")), "{told:?}");
        }
        let replica = Node::start(root.path(), "b", &["--follow", &node.peer_listen.to_string()]);
        let expected = Reply::Bulk(format!("127.0.0.1:{}", node.listen.port()));
        until("the replica knows its leader", || replica.client().command(&["LEADER"]) == expected);
    }
}

/// systemctl status shows what the node said last.
#[test]
fn service_manager_is_told_when_the_role_changes() {
    let root = directory();
    let leader = Node::start(root.path(), "a", &[]);
    let replica = Node::start(root.path(), "b", &["--follow", &leader.peer_listen.to_string()]);
    let socket = root.path().join("b.notify");
    std::fs::remove_file(&socket).expect("the socket of its start");
    let manager = std::os::unix::net::UnixDatagram::bind(&socket).expect("a socket");
    manager.set_read_timeout(Some(common::PATIENCE)).expect("a timeout");
    let mut message = [0; 4096];
    let mut told = |wanted: &str| {
        until(wanted, || {
            let length = manager.recv(&mut message).expect("the node tells of itself");
            String::from_utf8_lossy(&message[..length]).contains(wanted)
        });
    };
    let mut client = replica.client();
    until("it follows", || client.command(&["INFO"]).text().contains("master_link_status:up"));
    leader.kill();
    told("STATUS=replica b of 127.0.0.1:");
    assert!(!matches!(client.command(&["PROMOTE"]), Reply::Error(_)));
    told("STATUS=leader b in epoch ");
    let ended = std::thread::spawn(move || replica.stop());
    told("STOPPING=1");
    assert_eq!(ended.join().expect("it ends").0, Some(0));
}

/// A node whose stderr is a pipe that holds a page, and the pipe.
fn node_with_small_pipe(root: &Path, name: &str) -> (Node, std::fs::File) {
    let fifo = root.join(format!("{name}.pipe"));
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
    let pipe = std::fs::OpenOptions::new().read(true).write(true).open(&fifo).expect("both ends");
    // SAFETY: a plain system call on our own descriptor.
    assert!(unsafe { libc::fcntl(pipe.as_raw_fd(), libc::F_SETPIPE_SZ, 4096) } >= 4096);
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("exec \"$0\" \"$@\" 2>>{}", fifo.display())).arg(env!("CARGO_BIN_EXE_walferry"));
    (Node::start_by(command, root, name, &[]), pipe)
}

/// Asks the node to read its files again, which it logs, again and again; PING in between.
fn reload(node: &Node, times: usize) {
    let mut client = node.client();
    for _ in 0..times {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(node.pid() as i32), nix::sys::signal::Signal::SIGHUP)
            .expect("a process of ours");
        assert_eq!(client.command(&["PING"]), Reply::Simple("PONG".to_owned()));
    }
}

#[test]
fn log_that_nobody_reads_holds_up_neither_clients_nor_the_end() {
    let root = directory();
    let (node, _pipe) = node_with_small_pipe(root.path(), "a");
    reload(&node, 300);
    let mut client = node.client();
    assert_eq!(client.command(&["SET", "k", "v"]), ok());
    assert!(client.command(&["INFO"]).text().contains("log_lines_lost:0\r\n"), "they wait");
    assert_eq!(node.stop().0, Some(0));
}

#[test]
fn last_lines_reach_a_reader_that_is_late() {
    let root = directory();
    let (node, mut pipe) = node_with_small_pipe(root.path(), "a");
    reload(&node, 300);
    let data = node.data.clone();
    // It ends with an error.
    std::fs::remove_file(data.join("lock")).expect("removed");
    let ended = std::thread::spawn(move || node.end());
    let (mut text, mut piece) = (String::new(), [0; 4096]);
    while !text.contains("walferry: ") {
        let length = pipe.read(&mut piece).expect("the node writes");
        text.push_str(&String::from_utf8_lossy(&piece[..length]));
    }
    assert_eq!(ended.join().expect("no panic"), Some(1));
    let before = |line: &str| text.find(line).unwrap_or_else(|| panic!("{line} is in the log: {text}"));
    assert!(before("serves") < before("the peer secret was read again"));
    assert!(
        before("the peer secret was read again") < before("stepping down")
            && before("stepping down") < before("walferry: ")
    );
}
