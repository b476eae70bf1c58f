//! `walferry load` against its peers, with the real servers: PostgreSQL and Redis run the same scripts, and a commit level
//! means there what it says or is refused. Prints why it skips where a server is not installed.

mod common;

use std::io::ErrorKind;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use common::{directory, until};
use serde_json::Value;

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("its address").port()
}

fn load(url: &str, flags: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_walferry"));
    command.args(["load", "--url", url]).args(flags).output().expect("the binary starts")
}

fn summary(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    report["load"].clone()
}

fn refusal(output: &Output, code: i32) -> String {
    assert_eq!(output.status.code(), Some(code), "{output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A server that ends with the test.
struct Server {
    child: Child,
    port: u16,
}

impl Server {
    /// Starts one that listens on `port` in the end, or tells that it is not installed.
    fn start(mut command: Command, port: u16) -> Option<Server> {
        let name = command.get_program().to_string_lossy().into_owned();
        match command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn() {
            Ok(child) => {
                let server = Server { child, port };
                until("the server listens", || TcpStream::connect(("127.0.0.1", port)).is_ok());
                Some(server)
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                println!("skipped: {name} is not installed");
                None
            }
            Err(error) => panic!("{name}: {error}"),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // SIGINT is PostgreSQL's fast end; Redis ends by it as well.
        // SAFETY: signals a process that is our child and not yet waited for.
        unsafe { libc::kill(self.child.id() as libc::pid_t, libc::SIGINT) };
        let _ = self.child.wait();
    }
}

fn postgres_programs() -> Option<PathBuf> {
    let installed = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let found = installed.map(|entry| entry.path().join("bin")).find(|bin| bin.join("postgres").exists());
    if found.is_none() {
        println!("skipped: PostgreSQL is not installed under /usr/lib/postgresql");
    }
    found
}

/// PostgreSQL refuses to run as root: then it runs as the user that its package made, in a directory of that user.
fn as_postgres(program: &Path, owned: &Path) -> Command {
    let mut command = Command::new(program);
    if std::fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0) {
        let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
        let line = users.lines().find(|line| line.starts_with("postgres:")).expect("its package makes a user");
        let number = |index: usize| line.split(':').nth(index).and_then(|id| id.parse().ok()).expect("a number");
        let (user, group): (u32, u32) = (number(2), number(3));
        chown(owned, Some(user), Some(group)).expect("root may give it away");
        std::os::unix::process::CommandExt::uid(&mut command, user);
        std::os::unix::process::CommandExt::gid(&mut command, group);
    }
    command
}

#[test]
fn postgresql_runs_the_built_in_scripts_at_the_levels_it_has() {
    let Some(programs) = postgres_programs() else { return };
    // Not below the target directory: PostgreSQL's own user must be able to reach it.
    let root = tempfile::tempdir().expect("a temporary directory");
    std::fs::set_permissions(root.path(), std::fs::Permissions::from_mode(0o755)).expect("it is ours");
    let data = root.path().join("data");
    std::fs::create_dir(&data).expect("a directory");
    let made = as_postgres(&programs.join("initdb"), &data)
        .args(["-A", "trust", "-U", "walferry", "--no-sync", "-D"])
        .arg(&data)
        .current_dir(&data)
        .output()
        .expect("initdb starts");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let port = free_port();
    let mut command = as_postgres(&programs.join("postgres"), &data);
    command.arg("-D").arg(&data).args(["-p", &port.to_string(), "-c", "unix_socket_directories="]).current_dir(&data);
    let Some(server) = Server::start(command, port) else { return };
    let url = format!("postgres://walferry@127.0.0.1:{}/postgres", server.port);
    until("it takes connections", || load(&url, &["-b", "append", "-t", "1"]).status.success());

    assert!(refusal(&load(&url, &["-t", "1"]), 1).contains("has no tables"));
    assert!(load(&url, &["-i"]).status.success());
    let scripts = ["-b", "tpcb-like", "-b", "simple-update", "-b", "append", "-b", "select-only"];
    let ran = summary(&load(
        &url,
        &[&scripts[..], &["-c", "4", "-j", "2", "-t", "50", "--level", "local", "--json"]].concat(),
    ));
    assert!(ran["server"].as_str().is_some_and(|server| server.starts_with("postgresql ")), "{ran}");
    assert_eq!((&ran["transactions"], &ran["failed"]), (&200.into(), &0.into()), "{ran}");
    let open = summary(&load(&url, &["-b", "append", "-c", "2", "-T", "1", "-R", "100", "--level", "off", "--json"]));
    assert!(open["schedule_lag_ms"]["average"].is_number() && open["failed"] == 0, "{open}");

    let refused = refusal(&load(&url, &["-b", "append", "-t", "1", "--level", "remote_flush"]), 1);
    assert!(refused.contains("synchronous_standby_names"), "{refused}");
    assert!(refusal(&load(&url, &["-t", "1", "--level", "sometimes"]), 2).contains("--level sometimes"));
    assert!(refusal(&load(&url, &["-t", "1", "--check"]), 2).contains("--check"));
    let nobody = format!("postgres://walferry@127.0.0.1:{}/postgres", free_port());
    assert!(refusal(&load(&nobody, &["-t", "1"]), 1).contains("refused"));
}

#[test]
fn redis_waits_for_what_the_level_says_or_refuses() {
    let root = directory();
    let start = |name: &str, more: &[&str]| {
        let (port, dir) = (free_port(), root.path().join(name));
        std::fs::create_dir(&dir).expect("a directory");
        let mut command = Command::new("redis-server");
        command.args(["--port", &port.to_string(), "--save", "", "--dir"]).arg(&dir).args(more);
        Server::start(command, port)
    };
    let Some(leader) = start("leader", &["--appendonly", "yes", "--appendfsync", "always"]) else { return };
    let url = format!("redis://127.0.0.1:{}", leader.port);
    let ran = summary(&load(&url, &["-b", "append", "-c", "2", "-t", "50", "--level", "local", "--json"]));
    assert!(ran["server"].as_str().is_some_and(|server| server.starts_with("redis ")), "{ran}");
    assert_eq!(ran["transactions"], 100);
    assert!(refusal(&load(&url, &["-b", "append", "-t", "1", "--level", "off"]), 2).contains("everysec"));

    let replica = start("replica", &["--replicaof", &format!("127.0.0.1 {}", leader.port)]).expect("it is installed");
    let waited = summary(&load(&url, &["-b", "append", "-c", "2", "-t", "20", "--level", "remote_write", "--json"]));
    assert_eq!((&waited["transactions"], &waited["failed"]), (&40.into(), &0.into()), "{waited}");
    let version =
        ran["server"].as_str().and_then(|server| server.strip_prefix("redis ")).expect("a version").to_owned();
    let flushed = load(&url, &["-b", "append", "-t", "1", "--level", "remote_flush", "--json"]);
    if version.starts_with("7.0.") || version.starts_with("6.") {
        assert!(refusal(&flushed, 2).contains("WAITAOF came with 7.2"));
    }
    drop(replica);
}
