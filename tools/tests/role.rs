//! A data directory knows what it is: a start whose flags contradict it is refused, with the ways out, and changes nothing.

mod common;

use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use common::{Client, Node, Reply, directory, until};

/// Runs the binary to its end: its exit code, and what it says.
fn run(arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_walferry"));
    let output = command.args(arguments).stdin(Stdio::null()).output().expect("the binary runs");
    let Output { status, stdout, stderr } = output;
    (status.code(), String::from_utf8_lossy(&[stdout, stderr].concat()).into_owned())
}

fn refused(arguments: &[&str], code: i32, says: &[&str]) {
    let (found, text) = run(arguments);
    assert_eq!(found, Some(code), "{arguments:?}: {text}");
    assert!(says.iter().all(|word| text.contains(word)), "{arguments:?} should say {says:?}: {text}");
}

/// A start of node `name` that has to be refused as wrong usage.
fn start_refused(root: &Path, name: &str, flags: &[&str], says: &[&str]) {
    let data = root.join(name).display().to_string();
    let common = ["start", "--data", &data, "--name", name, "--listen", "127.0.0.1:0", "--peer-listen", "127.0.0.1:0"];
    refused(&[&common[..], flags].concat(), 2, says);
}

fn set(client: &mut Client, key: &str, value: &str) {
    assert_eq!(client.command(&["SET", key, value]), Reply::Simple("OK".to_owned()));
}

fn get(node: &Node, key: &str) -> Reply {
    node.client().command(&["GET", key])
}

fn value(text: &str) -> Reply {
    Reply::Bulk(text.to_owned())
}

fn describe(node: &Node) -> Value {
    serde_json::from_str(node.client().command(&["DESCRIBE"]).text()).expect("JSON")
}

/// A leader, its peer address, and a replica that has what was written to it.
fn pair(root: &Path) -> (Node, String, Node) {
    let leader = Node::start(root, "a", &[]);
    let follow = leader.peer_listen.to_string();
    let replica = Node::start(root, "b", &["--follow", &follow]);
    set(&mut leader.client(), "k", "v");
    until("the replica has it", || get(&replica, "k") == value("v"));
    (leader, follow, replica)
}

#[test]
fn member_without_its_members_flag_is_refused() {
    let root = directory();
    let address = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port");
    let members = format!("a={address}");
    let peer = address.to_string();
    let as_member = ["--members", &members, "--peer-listen", &peer];
    let node = Node::start(root.path(), "a", &as_member);
    until("it leads", || matches!(node.client().command(&["SET", "k", "v"]), Reply::Simple(_)));
    node.kill_and_free();
    let says = ["it is a member's, of cluster", "--members as before", "--become leader", "lost"];
    start_refused(root.path(), "a", &[], &says);
    start_refused(root.path(), "a", &["--follow", "127.0.0.1:9"], &["--members as before", "--become replica"]);
    start_refused(root.path(), "a", &["--become", "replica"], &["--become replica: give --follow"]);
    let node = Node::start(root.path(), "a", &as_member);
    until("it leads", || matches!(node.client().command(&["SET", "k", "w"]), Reply::Simple(_)));
    node.kill_and_free();
    // The operator's word: it leaves the cluster, with all that it has.
    let alone = Node::start(root.path(), "a", &["--become", "leader"]);
    assert_eq!(get(&alone, "k"), value("w"));
    assert!(!alone.data.join("cluster.redb").exists());
    set(&mut alone.client(), "k", "x");
    alone.kill();
    // From now on that is what it is.
    assert_eq!(get(&Node::start(root.path(), "a", &[]), "k"), value("x"));
}

#[test]
fn replica_without_its_follow_flag_is_refused() {
    let root = directory();
    let (_leader, follow, replica) = pair(root.path());
    replica.kill();
    let says = ["it is a replica's, of the leader at", &follow, "--follow", "--become leader", "lost"];
    start_refused(root.path(), "b", &[], &says);
    let replica = Node::start(root.path(), "b", &["--follow", &follow]);
    until("it goes on as a replica", || get(&replica, "k") == value("v"));
    replica.kill();
    let second = Node::start(root.path(), "b", &["--become", "leader"]);
    assert_eq!(get(&second, "k"), value("v"));
    set(&mut second.client(), "k", "w");
}

#[test]
fn promoted_replica_with_its_old_flags_is_refused() {
    let root = directory();
    let (leader, follow, replica) = pair(root.path());
    leader.kill();
    assert!(matches!(replica.client().command(&["PROMOTE"]), Reply::Integer(_)));
    set(&mut replica.client(), "k", "w");
    replica.kill();
    let says = ["promoted from being a replica of", "Leave out --follow", "--become replica"];
    start_refused(root.path(), "b", &["--follow", &follow], &says);
    let promoted = Node::start(root.path(), "b", &[]);
    assert_eq!(get(&promoted, "k"), value("w"));
    // A leader comes back as the replica of another without more ado, and is one from then on.
    let follow = promoted.peer_listen.to_string();
    let again = Node::start(root.path(), "a", &["--follow", &follow]);
    until("the old leader follows", || get(&again, "k") == value("w"));
    again.kill();
    start_refused(root.path(), "a", &[], &["it is a replica's", "--become leader"]);
}

#[test]
fn witness_and_node_never_take_each_others_directory() {
    let root = directory();
    let address = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port");
    let members = format!("w={address},x=127.0.0.1:9");
    let data = root.path().join("w").display().to_string();
    let as_witness = ["witness", "--data", &data, "--name", "w", "--members", &members, "--peer-auth", "none"];
    let mut command = Command::new(env!("CARGO_BIN_EXE_walferry"));
    command.args(as_witness).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut witness = command.spawn().expect("the binary starts");
    until("its register is there", || root.path().join("w/cluster.redb").exists());
    witness.kill().and_then(|()| witness.wait()).expect("a child can be killed");
    for flags in [&[][..], &["--members", &members], &["--follow", "127.0.0.1:9"], &["--become", "leader"]] {
        let flags = [flags, &["--peer-auth", "none"]].concat();
        start_refused(root.path(), "w", &flags, &["it is a witness's", "walferry witness"]);
    }
    assert!(!root.path().join("w/meta").exists(), "nothing was begun there");
    let node = Node::start(root.path(), "n", &[]);
    node.kill();
    let data = root.path().join("n").display().to_string();
    let members = format!("n={address}");
    let as_witness = ["witness", "--data", &data, "--name", "n", "--members", &members, "--peer-auth", "none"];
    refused(&as_witness, 2, &["it is a stand-alone leader's", "walferry start"]);
    Node::start(root.path(), "n", &[]);
}

#[test]
fn data_below_a_missing_directory_is_refused() {
    let root = directory();
    let data = root.path().join("volume/nodes/a").display().to_string();
    let missing = root.path().join("volume").display().to_string();
    let says = [missing.as_str(), "mount"];
    refused(&["start", "--data", &data, "--name", "a"], 1, &says);
    refused(&["init", "--data", &data, "--name", "a"], 1, &says);
    refused(&["witness", "--data", &data, "--name", "a", "--members", "a=127.0.0.1:9"], 1, &says);
    assert!(!root.path().join("volume").exists());
}

/// Neither has a register: the leader that is started again and the replica that was promoted begin epochs of the same number.
#[test]
fn leader_that_went_on_follows_the_promoted_replica() {
    // Starts as a leader, writes there, and writes to the promoted replica: either log may be the longer one.
    for (starts, lost, kept) in [(1, 3, 40), (1, 40, 3), (3, 10, 10)] {
        let root = directory();
        let (leader, _, replica) = pair(root.path());
        leader.kill();
        assert!(matches!(replica.client().command(&["PROMOTE"]), Reply::Integer(_)));
        (0..kept).for_each(|n| set(&mut replica.client(), &format!("kept{n}"), "there"));
        let mut session = String::new();
        for start in 0..starts {
            let leader = Node::start(root.path(), "a", &[]);
            let mut client = leader.client();
            (0..lost).for_each(|n| set(&mut client, &format!("lost{start}.{n}"), "here"));
            session = client.command(&["SESSION"]).text().to_owned();
            leader.kill();
        }
        let again = Node::start(root.path(), "a", &["--follow", &replica.peer_listen.to_string()]);
        until("it follows", || get(&again, &format!("kept{}", kept - 1)) == value("there"));
        for node in [&again, &replica] {
            assert_eq!(node.client().command(&["DBSIZE"]), Reply::Integer(kept + 1));
        }
        assert_eq!(describe(&again)["lost_commits"].as_u64(), Some(lost * starts));
        let again_data = again.data.clone();
        assert!(again_data.join("lost").read_dir().expect("a directory").next().is_some());
        // A session of the side that was cut is told so, on either node.
        for node in [&again, &replica] {
            let mut client = node.client();
            assert_eq!(client.command(&["SESSION", &session]), Reply::Simple("OK".to_owned()));
            let reply = client.command(&["GET", "lost0.0"]);
            let told =
                matches!(&reply, Reply::Error(text) if text.starts_with(if starts == 1 { "LOST" } else { "BEHIND" }));
            assert!(told, "{reply:?}");
        }
        // Started again it is the replica that it has become, and may lead later.
        again.kill();
        let data = again_data.display().to_string();
        let (code, dumped) = run(&["log", "dump", "--data", &data, "--lost", "--records"]);
        assert_eq!(code, Some(0), "{dumped}");
        assert!(dumped.contains(&format!("lost{}.0", starts - 1)), "{dumped}");
        let again = Node::start(root.path(), "a", &["--follow", &replica.peer_listen.to_string()]);
        set(&mut replica.client(), "last", "word");
        until("it goes on", || get(&again, "last") == value("word"));
    }
}

/// The leader's directory was set back: its replica has what was confirmed, and does not throw it away without being told to.
#[test]
fn replica_of_a_restored_leader_keeps_what_was_committed() {
    let root = directory();
    let start = |name: &str, flags: &[&str]| {
        let policy: &[&str] = if name == "a" { &["--sync", "ANY 1 (b)"] } else { &[] };
        Node::start(root.path(), name, &[policy, flags].concat())
    };
    let leader = start("a", &[]);
    set(&mut leader.client(), "k", "v");
    leader.kill();
    let (data, copy) = (root.path().join("a"), root.path().join("copy"));
    assert!(Command::new("cp").arg("-a").args([&data, &copy]).status().expect("cp runs").success());
    let leader = start("a", &[]);
    let replica = start("b", &["--follow", &leader.peer_listen.to_string()]);
    let mut client = leader.client();
    assert_eq!(client.command(&["COMMITLEVEL", "remote_flush"]), Reply::Simple("OK".to_owned()));
    (0..20).for_each(|n| set(&mut client, &format!("k{n}"), "confirmed"));
    // What is committed is told with the next heartbeat.
    until("the replica knows it", || describe(&replica)["committed"] == describe(&leader)["committed"]);
    leader.kill();
    replica.kill();
    std::fs::remove_dir_all(&data).and_then(|()| std::fs::rename(&copy, &data)).expect("the copy is in its place");
    let leader = start("a", &[]);
    let follow = leader.peer_listen.to_string();
    let replica = start("b", &["--follow", &follow]);
    until("it says why it does not follow", || {
        let blocked_reason = describe(&replica)["blocked_reason"].as_str().unwrap_or_default().to_owned();
        ["walferry promote", "--become replica", "restored from an older copy"]
            .iter()
            .all(|word| blocked_reason.contains(word))
    });
    // The last frame is applied once a leader says that it has flushed it.
    assert_eq!(get(&replica, "k10"), value("confirmed"));
    replica.kill();
    // The one way out: what it has is given up, kept and counted.
    let replica = start("b", &["--follow", &follow, "--become", "replica"]);
    set(&mut leader.client(), "k", "w");
    until("it follows", || get(&replica, "k") == value("w"));
    assert_eq!(get(&replica, "k10"), Reply::Nil);
    assert!(describe(&replica)["lost_commits"].as_u64() >= Some(20));
}
