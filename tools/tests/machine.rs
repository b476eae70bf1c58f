//! A machine that is suspended, and a disk that fails one flush of a small file: real nodes over a small library (`machine.c`)
//! that changes what the system tells them.

mod common;

use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use common::{Client, Node, Reply, directory, until};

/// The offsets of the fields of `struct machine`.
const SUSPENDED_NS: u64 = 0;
const FLUSH_FAILS: u64 = 8;
/// Values of `FLUSH_FAILS`.
const OF_WATERMARK: i64 = 1;
const OF_REGISTER: i64 = 2;

/// A reply of a node that may be stopped is waited for so long.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(3);

/// The library; its compiler is the one that Rust links with.
fn library() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/machine.c");
        let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("machine-{}.so", std::process::id()));
        let built =
            Command::new("cc").args(["-shared", "-fPIC", "-O1", "-Wall", "-o"]).arg(&library).arg(source).status();
        assert!(built.expect("cc runs").success());
        library
    })
}

/// One machine: what the test sets is seen by its node at once.
struct Machine {
    control: std::fs::File,
    path: PathBuf,
}

impl Machine {
    fn new(root: &Path, name: &str) -> Machine {
        let path = root.join(format!("{name}.machine"));
        std::fs::write(&path, [0; 16]).expect("written");
        let control = std::fs::OpenOptions::new().read(true).write(true).open(&path).expect("just made");
        Machine { control, path }
    }

    fn set(&self, field: u64, value: i64) {
        self.control.write_all_at(&value.to_ne_bytes(), field).expect("written");
    }

    fn get(&self, field: u64) -> i64 {
        let mut bytes = [0; 8];
        self.control.read_exact_at(&mut bytes, field).expect("read");
        i64::from_ne_bytes(bytes)
    }

    fn start(&self, root: &Path, name: &str, flags: &[&str]) -> Node {
        let mut command = Command::new(env!("CARGO_BIN_EXE_walferry"));
        command.env("LD_PRELOAD", library()).env("WALFERRY_TEST_MACHINE", &self.path);
        Node::start_by(command, root, name, flags)
    }
}

struct Member {
    name: &'static str,
    machine: Machine,
    node: Node,
    flags: Vec<String>,
}

impl Member {
    /// Starts it again once its process has ended.
    fn bring(&mut self, root: &Path) {
        let flags: Vec<&str> = self.flags.iter().map(String::as_str).collect();
        self.node = self.machine.start(root, self.name, &flags);
    }

    fn client(&self) -> Client {
        let mut client = self.node.client();
        client.give_up_after(ANSWER_TIME_MAX);
        client
    }

    fn signal(&self, signal: libc::c_int) {
        // SAFETY: signals a process that is our child and not yet waited for.
        unsafe { libc::kill(self.node.pid() as libc::pid_t, signal) };
    }

    fn describe(&self) -> serde_json::Value {
        serde_json::from_str(self.client().command(&["DESCRIBE"]).text()).expect("JSON")
    }
}

fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port")
}

fn cluster(root: &Path, flags: &[&str]) -> Vec<Member> {
    let names = ["a", "b", "c"];
    let peers: Vec<String> = names.iter().map(|_| free_address().to_string()).collect();
    let members: Vec<String> = names.iter().zip(&peers).map(|(name, peer)| format!("{name}={peer}")).collect();
    let members = members.join(",");
    let start = |(name, peer): (&'static str, &String)| {
        let machine = Machine::new(root, name);
        let flags = [&["--members", &members, "--peer-listen", peer], flags].concat();
        let node = machine.start(root, name, &flags);
        Member { name, machine, node, flags: flags.into_iter().map(str::to_owned).collect() }
    };
    names.into_iter().zip(&peers).map(start).collect()
}

/// The one of them that takes a write at this level. Waits for it.
fn leader<'a>(members: &[&'a Member], level: &str, value: &str) -> &'a Member {
    let mut found = None;
    until("somebody leads", || {
        found = members.iter().copied().find(|member| {
            let mut client = member.client();
            // After a reply that did not come in time the next one is not its command's.
            let mut done = |words: &[&str]| matches!(client.try_command(words), Ok(Reply::Simple(_)));
            done(&["COMMITTIMEOUT", "500"]) && done(&["COMMITLEVEL", level]) && done(&["SET", "k", value])
        });
        found.is_some()
    });
    found.expect("just found")
}

fn others<'a>(members: &'a [Member], but: &Member) -> Vec<&'a Member> {
    members.iter().filter(|member| member.name != but.name).collect()
}

#[test]
fn suspended_leader_answers_no_strong_read() {
    let root = directory();
    let members = cluster(root.path(), &[]);
    let all: Vec<&Member> = members.iter().collect();
    let old = leader(&all, "remote_flush", "old");
    let mut client = old.client();
    client.command(&["READ", "STRONG"]);
    assert_eq!(client.command(&["GET", "k"]), Reply::Bulk("old".to_owned()));
    let begun = Instant::now();
    old.signal(libc::SIGSTOP);
    let new = leader(&others(&members, old), "remote_flush", "new");
    assert_ne!(new.name, old.name);
    client.send(&["GET", "k"]).expect("its kernel takes it");
    old.machine.set(SUSPENDED_NS, begun.elapsed().as_nanos() as i64);
    old.signal(libc::SIGCONT);
    match client.reply().expect("an answer") {
        Reply::Error(_) => {}
        answer => assert_eq!(answer, Reply::Bulk("new".to_owned())),
    }
}

#[test]
fn suspended_replica_knows_how_old_its_state_is() {
    let root = directory();
    let members = cluster(root.path(), &[]);
    let all: Vec<&Member> = members.iter().collect();
    let leads = leader(&all, "remote_flush", "old");
    let replica = others(&members, leads)[0];
    let mut client = replica.client();
    client.command(&["READ", "AT", "MOST", "800ms"]);
    until("the replica has it", || client.command(&["GET", "k"]) == Reply::Bulk("old".to_owned()));
    let begun = Instant::now();
    replica.signal(libc::SIGSTOP);
    leader(&others(&members, replica), "local", "new");
    until("what the replica has is older than asked for", || begun.elapsed() > Duration::from_secs(2));
    client.send(&["GET", "k"]).expect("its kernel takes it");
    replica.machine.set(SUSPENDED_NS, begun.elapsed().as_nanos() as i64);
    replica.signal(libc::SIGCONT);
    match client.reply().expect("an answer") {
        Reply::Error(_) => {}
        answer => assert_eq!(answer, Reply::Bulk("new".to_owned())),
    }
}

fn log_of(root: &Path, name: &str) -> String {
    std::fs::read_to_string(root.join(format!("{name}.log"))).expect("its log")
}

/// A member that stays up with a stopped log can promise nothing: with another one down nobody would be chosen.
#[test]
fn failed_flush_of_the_watermark_ends_the_process() {
    let root = directory();
    let mut members = cluster(root.path(), &["--election-timeout", "1s"]);
    let (old, next) = {
        let all: Vec<&Member> = members.iter().collect();
        let old = leader(&all, "remote_flush", "1");
        let next = others(&members, old)[0];
        let in_sync = || old.describe()["in_sync"].to_string().contains(&format!("{:?}", next.name));
        until("the next leader is in sync", in_sync);
        next.machine.set(FLUSH_FAILS, OF_WATERMARK);
        let mut client = old.node.client();
        // What it answers depends on how soon the next one gives up.
        let _ = client.try_command(&["SWITCHOVER", "TO", next.name]);
        until("the flush failed", || next.machine.get(FLUSH_FAILS) == 0);
        let leads = leader(&others(&members, next), "remote_flush", "2");
        until("its process ends", || Client::connect(next.node.listen).is_err());
        // Its last line comes after its port is closed.
        let says = |what: &str| log_of(root.path(), next.name).contains(what);
        until("it says why", || says("this process ends") && says("/durable"));
        (leads.name, next.name)
    };
    let broken = members.iter_mut().find(|member| member.name == next).expect("a member");
    broken.bring(root.path());
    let left: Vec<Member> = members.into_iter().filter(|member| member.name != old).collect();
    let left: Vec<&Member> = left.iter().collect();
    leader(&left, "remote_flush", "3");
}

#[test]
fn failed_flush_of_the_watermark_fails_a_promotion() {
    let root = directory();
    let leader = Node::start(root.path(), "a", &[]);
    let machine = Machine::new(root.path(), "b");
    let replica = machine.start(root.path(), "b", &["--follow", &leader.peer_listen.to_string()]);
    let mut client = replica.client();
    leader.client().command(&["SET", "k", "v"]);
    until("the replica has it", || client.command(&["GET", "k"]) == Reply::Bulk("v".to_owned()));
    machine.set(FLUSH_FAILS, OF_WATERMARK);
    let Reply::Error(text) = client.command(&["PROMOTE"]) else { panic!("it cannot lead") };
    assert!(text.contains("the promotion failed") && text.contains("durable"), "{text}");
    until("its process ends", || Client::connect(replica.listen).is_err());
    // Its last line comes after its port is closed.
    let says = |what: &str| log_of(root.path(), "b").contains(what);
    until("it says why", || says("this process ends") && says("/durable"));
}

/// What its register holds then is not known: a member that stays up without one keeps others from choosing a leader.
#[test]
fn failed_flush_of_the_register_ends_the_process() {
    let root = directory();
    let members = cluster(root.path(), &["--election-timeout", "1s"]);
    let all: Vec<&Member> = members.iter().collect();
    let leads = leader(&all, "remote_flush", "1");
    let (broken, other) = (others(&members, leads)[0], others(&members, leads)[1]);
    let in_sync = || leads.describe()["in_sync"].to_string().contains(&format!("{:?}", other.name));
    until("the next leader is in sync", in_sync);
    broken.machine.set(FLUSH_FAILS, OF_REGISTER);
    let _ = leads.node.client().try_command(&["SWITCHOVER", "TO", other.name]);
    until("its process ends", || Client::connect(broken.node.listen).is_err());
    let log = log_of(root.path(), broken.name);
    assert!(log.contains("start it again") && log.contains("cluster.redb"), "{log}");
    leader(&[leads, other], "remote_flush", "2");
}
