//! Users: who gets in, what the read-only role may do, how the file is read again, and how the tools say who they are. Nodes
//! among each other need none of it.

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{Client, Node, Reply, directory, until};

const NO_AUTH: &str = "NOAUTH Authentication required.";
const WRONG: &str = "WRONGPASS invalid username-password pair or user is disabled.";

fn ok() -> Reply {
    Reply::Simple("OK".into())
}

fn error(text: &str) -> Reply {
    Reply::Error(text.into())
}

fn write_users(root: &Path, text: &str) -> PathBuf {
    let file = root.join("users");
    std::fs::write(&file, text).expect("a file of users");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o640)).expect("our file");
    file
}

/// A node with these users.
fn start(root: &Path, text: &str) -> Node {
    let file = write_users(root, text);
    Node::start(root, "a", &["--users-file", file.to_str().expect("a path of text")])
}

fn log(root: &Path) -> String {
    std::fs::read_to_string(root.join("a.log")).expect("a log")
}

const USERS: &str =
    "# people\nuser default on >owner-secret ~* +@all\nuser reader on >reader-secret ~* +@read -@write\n";

fn as_user(node: &Node, user: &str, password: &str) -> Client {
    let mut client = node.client();
    assert_eq!(client.command(&["AUTH", user, password]), ok());
    client
}

#[test]
fn a_reader_reads_and_nothing_else() {
    let root = directory();
    let node = start(root.path(), USERS);
    let mut client = node.client();
    assert_eq!(client.command(&["GET", "a"]), error(NO_AUTH));
    assert_eq!(client.command(&["AUTH", "reader-secret"]), error(WRONG), "a password alone is the default user's");
    assert_eq!(client.command(&["AUTH", "reader", "owner-secret"]), error(WRONG));
    assert_eq!(client.command(&["AUTH", "nobody", "reader-secret"]), error(WRONG));
    assert_eq!(client.command(&["AUTH", "owner-secret"]), ok());
    assert_eq!(client.command(&["ACL", "WHOAMI"]), Reply::Bulk("default".into()));
    assert_eq!(client.command(&["SET", "a", "1"]), ok());

    let mut reader = as_user(&node, "reader", "reader-secret");
    assert_eq!(reader.command(&["ACL", "WHOAMI"]), Reply::Bulk("reader".into()));
    assert_eq!(reader.command(&["GET", "a"]), Reply::Bulk("1".into()));
    assert_eq!(reader.command(&["CLIENT", "SETNAME", "me"]), ok());
    assert!(matches!(reader.command(&["INFO", "replication"]), Reply::Bulk(_)));
    let refused =
        |command: &str| error(&format!("NOPERM User reader has no permissions to run the '{command}' command"));
    for words in [
        &["SET", "a", "2"][..],
        &["del", "a"],
        &["XADD", "s", "*", "f", "v"],
        &["CONFIG", "GET", "*"],
        &["PROMOTE"],
        &["SWITCHOVER"],
        &["JOIN", "b"],
        &["REMOVE", "b"],
        &["WATERFALL", "RESET"],
        &["CLIENT", "LIST"],
        &["CLIENT", "KILL", "ID", "1"],
        &["ACL", "LIST"],
        &["ACL", "LOAD"],
    ] {
        assert_eq!(reader.command(words), refused(&words[0].to_ascii_lowercase()), "{words:?}");
    }
    // A transaction is no way around it.
    assert_eq!(reader.command(&["MULTI"]), ok());
    assert_eq!(reader.command(&["SET", "a", "2"]), refused("set"));
    assert_eq!(reader.command(&["EXEC"]), error("EXECABORT Transaction discarded because of previous errors."));
    assert_eq!(reader.command(&["RESET"]), Reply::Simple("RESET".into()));
    assert_eq!(reader.command(&["GET", "a"]), error(NO_AUTH), "RESET forgets who it was");
    assert!(matches!(reader.command(&["HELLO", "2", "AUTH", "reader", "reader-secret"]), Reply::Array(_)));
    assert_eq!(reader.command(&["GET", "a"]), Reply::Bulk("1".into()), "nothing was changed");

    let Reply::Array(lines) = client.command(&["ACL", "LIST"]) else { panic!("ACL LIST answers with an array") };
    assert_eq!(lines.len(), 2);
    assert!(lines[1].text().starts_with("user reader on #") && lines[1].text().ends_with(" ~* &* -@all +@read"));
    assert!(client.command(&["CLIENT", "LIST"]).text().contains(" user=reader "));
    let log = log(root.path());
    assert!(!log.contains("secret"), "no password is in the log:\n{log}");
}

#[test]
fn the_file_is_read_again_and_whoever_is_no_more_in_it_is_gone() {
    let root = directory();
    let node = start(root.path(), USERS);
    let mut owner = as_user(&node, "default", "owner-secret");
    let mut reader = as_user(&node, "reader", "reader-secret");
    write_users(root.path(), "user default on >owner-secret ~* +@all\nuser reader on >new-secret +@read\n");
    assert_eq!(owner.command(&["ACL", "LOAD"]), ok());
    assert!(reader.try_command(&["GET", "a"]).is_err(), "its password is another one now");
    assert_eq!(owner.command(&["PING"]), Reply::Simple("PONG".into()), "who did not change stays");
    drop(as_user(&node, "reader", "new-secret"));

    write_users(root.path(), "user default on >owner-secret ~* +@all\nuser reader on +get >new-secret\n");
    let Reply::Error(text) = owner.command(&["ACL", "LOAD"]) else { panic!("the file is wrong") };
    assert!(text.contains("line 2: the rule \"+get\" is not supported"), "{text}");
    drop(as_user(&node, "reader", "new-secret"));

    write_users(root.path(), "user default on >owner-secret ~* +@all\n");
    // SAFETY: signals a process that is our child and not yet waited for.
    unsafe { libc::kill(node.pid() as libc::pid_t, libc::SIGHUP) };
    until("SIGHUP was heard", || node.client().command(&["AUTH", "reader", "new-secret"]) == error(WRONG));
    assert_eq!(owner.command(&["PING"]), Reply::Simple("PONG".into()));
}

#[test]
fn a_file_that_is_wrong_or_open_to_all_is_refused_at_the_start() {
    let root = directory();
    let file = write_users(root.path(), "user default on >secret ~cache:* +@all\n");
    let flags = ["--users-file", file.to_str().expect("a path of text")];
    let text = Node::try_start(root.path(), "a", &flags).err().expect("the file is wrong");
    assert!(text.contains("users, line 1: the rule \"~cache:*\" is not supported"), "{text}");
    std::fs::write(&file, USERS).expect("our file");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).expect("our file");
    let text = Node::try_start(root.path(), "a", &flags).err().expect("the file is open to all");
    assert!(text.contains("chmod 640"), "{text}");
    assert!(!text.contains("secret"), "{text}");
    let text = Node::try_start(root.path(), "a", &["--password", "secret"]).err().expect("flags are no place for it");
    assert!(text.contains("users_file") && !text.contains("secret"), "{text}");
}

#[test]
fn open_node_that_others_reach_warns_once() {
    let root = directory();
    // The flag that comes last counts.
    let node = Node::start(root.path(), "a", &["--listen", "0.0.0.0:0"]);
    drop(node);
    let told = log(root.path()).matches("whoever reaches this address may do everything").count();
    assert_eq!(told, 1);
    let file = write_users(root.path(), USERS);
    drop(Node::start(root.path(), "b", &["--listen", "0.0.0.0:0", "--users-file", file.to_str().expect("text")]));
    let log = std::fs::read_to_string(root.path().join("b.log")).expect("a log");
    assert!(!log.contains("whoever reaches"), "{log}");
}

#[test]
fn replicas_follow_a_leader_whose_clients_have_to_authenticate() {
    let root = directory();
    let node = start(root.path(), USERS);
    let file = root.path().join("users");
    let follow = node.peer_listen.to_string();
    let replica = Node::start(root.path(), "b", &["--follow", &follow, "--users-file", file.to_str().expect("text")]);
    let mut owner = as_user(&node, "default", "owner-secret");
    assert_eq!(owner.command(&["SET", "a", "1"]), ok());
    let mut reader = as_user(&replica, "reader", "reader-secret");
    until("it is there", || reader.command(&["GET", "a"]) == Reply::Bulk("1".into()));
}

/// What `walferry passwd` prints for a password on its standard input.
fn passwd(arguments: &[&str], password: &str) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_walferry"));
    let mut child = command
        .arg("passwd")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    child.stdin.take().expect("a pipe").write_all(format!("{password}\n").as_bytes()).expect("it is read");
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("text")
}

/// A number of INFO.
fn info(client: &mut Client, key: &str) -> u64 {
    let reply = client.command(&["INFO"]);
    let found = reply.text().lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    found.and_then(|value| value.trim().parse().ok()).unwrap_or_else(|| panic!("INFO has a number {key}: {reply:?}"))
}

#[test]
fn salted_line_of_passwd_lets_its_user_in_and_no_one_else() {
    let root = directory();
    let (app, root_user) = (passwd(&["app"], "app-secret"), passwd(&["root", "--role", "operator"], "root-secret"));
    assert!(
        app.starts_with("user app on $argon2id$v=19$m=19456,t=2,p=1$") && app.ends_with(" ~* +@all -@admin\n"),
        "{app}"
    );
    assert!(!app.contains("secret") && passwd(&["app"], "app-secret") != app, "each has a salt of its own");
    let file = write_users(root.path(), &format!("{app}{root_user}"));
    let flags = ["--users-file", file.to_str().expect("a path of text"), "--metrics-listen", "127.0.0.1:0"];
    let node = Node::start(root.path(), "a", &flags);
    let mut client = as_user(&node, "app", "app-secret");
    assert_eq!(client.command(&["SET", "a", "1"]), ok());
    let denied = "NOPERM User app has no permissions to run the 'promote' command";
    assert_eq!(client.command(&["PROMOTE"]), error(denied));
    let mut operator = as_user(&node, "root", "root-secret");
    let Reply::Array(lines) = operator.command(&["ACL", "LIST"]) else { panic!("ACL LIST answers with an array") };
    assert!(lines[0].text().contains("$argon2id$"), "{lines:?}");

    // A guesser in one write; the others are served meanwhile, and each guess is answered later than the one before.
    let begun = Instant::now();
    let mut guesser = node.client();
    for number in 0..1000 {
        guesser.send(&["AUTH", "app", &format!("guess {number}")]).expect("send");
    }
    for wait in [Duration::from_millis(500), Duration::from_millis(1500)] {
        assert_eq!(guesser.reply().expect("a reply"), error(WRONG));
        assert!(begun.elapsed() >= wait, "{:?} and not {wait:?}", begun.elapsed());
        assert_eq!(client.command(&["GET", "a"]), Reply::Bulk("1".into()));
    }
    until("they are counted", || info(&mut operator, "acl_access_denied_auth") >= 2);
    assert!(info(&mut operator, "acl_access_denied_auth") <= 4, "and few of the thousand were looked at");
    let mut page = TcpStream::connect(node.metrics_listen.expect("asked for")).expect("it listens");
    page.write_all(b"GET /metrics HTTP/1.1\r\nConnection: close\r\n\r\n").expect("it is read");
    let mut text = String::new();
    page.read_to_string(&mut text).expect("a page");
    let counted = text.lines().find_map(|line| line.strip_prefix("walferry_logins_failed_total "));
    assert!(counted.and_then(|count| count.parse::<u64>().ok()).is_some_and(|count| count >= 2), "{text}");
    let log = log(root.path());
    assert_eq!(log.matches("logins fail").count(), 1, "told rarely: {log}");
    assert!(log.contains("user=\"app\"") && !log.contains("guess"), "{log}");

    // The users' file is read again: what was verified is forgotten, and a password that is no longer there is none.
    write_users(root.path(), &format!("{}{root_user}", passwd(&["app"], "new-secret")));
    assert_eq!(operator.command(&["ACL", "LOAD"]), ok());
    assert_eq!(node.client().command(&["AUTH", "app", "app-secret"]), error(WRONG));
    as_user(&node, "app", "new-secret");
}

#[test]
fn the_tools_say_who_they_are() {
    let root = directory();
    let node = start(root.path(), USERS);
    let url = format!("redis://{}", node.listen);
    let secret = root.path().join("secret");
    std::fs::write(&secret, "owner-secret\n").expect("a file");
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o600)).expect("our file");
    let run = |arguments: &[&str], variables: &[(&str, &str)]| -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_walferry"));
        command.env_remove("WALFERRY_PASSWORD").env_remove("REDISCLI_AUTH").args(arguments);
        command.envs(variables.iter().copied()).output().expect("the binary starts")
    };
    let text = |output: &Output| {
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    };
    let status = ["status", "--url", &url];
    let output = run(&status, &[]);
    assert!(!output.status.success() && text(&output).contains(NO_AUTH), "{}", text(&output));
    let with_url = format!("redis://default:owner-secret@{}", node.listen);
    for (arguments, variables) in [
        (&["status", "--url", &with_url][..], &[][..]),
        (&status, &[("WALFERRY_PASSWORD", "owner-secret")]),
        (&status, &[("REDISCLI_AUTH", "owner-secret")]),
        (&["--user", "reader", "status", "--url", &url], &[("WALFERRY_PASSWORD", "reader-secret")]),
        (&["status", "--url", &url, "--password-file", secret.to_str().expect("text")], &[]),
    ] {
        let output = run(arguments, variables);
        assert!(output.status.success(), "{arguments:?}: {}", text(&output));
    }
    let load = ["load", "--url", &url, "-c", "2", "-t", "20"];
    assert!(run(&[&load[..], &["-i"]].concat(), &[("WALFERRY_PASSWORD", "owner-secret")]).status.success());
    let output = run(&load, &[("WALFERRY_PASSWORD", "owner-secret")]);
    assert!(output.status.success(), "{}", text(&output));
    let output = run(&status, &[("WALFERRY_PASSWORD", "wrong-secret")]);
    assert!(text(&output).contains(WRONG) && !text(&output).contains("wrong-secret"), "{}", text(&output));
}
