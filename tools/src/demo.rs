//! `walferry demo`: a leader and two replicas as child processes, load at every commit level, one table, a clean stop.
//! Uses the same commands that a person would type; knows nothing of the daemon's inside.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clap::Args;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use walferry_cluster::CommitLevel;
use walferry_engine::log::{SyncMethod, direct_io_refusal};

use crate::cli::{Failure, say};
use crate::client::{Client, Url, info_field};
use crate::load::{self, Options, ScriptSource, Summary};
use crate::status::Status;

/// Examples for the help text.
pub const EXAMPLES: &str = "\
Examples:
  walferry demo
  walferry demo --seconds 5 --clients 64

The three nodes' data and logs stay in the directory to be looked at:
  walferry log dump --data ./walferry-demo/leader --limit 5
  cmp ./walferry-demo/{leader,replica-1}/log/0000000000000000.wal

Exit codes: 0 the table was printed and every node stopped cleanly; 1 something failed, with the reason; 2 wrong usage.";

/// Says that a directory was made by a demo and may be replaced by the next one.
const MARKER_FILE: &str = "made-by-walferry-demo";
const MARKER_TEXT: &str = "This directory was made by `walferry demo`; the next demo replaces it.\n";
const REPLICAS: [&str; 2] = ["replica-1", "replica-2"];
const SYNC_POLICY: &str = "ANY 1 (replica-1, replica-2)";
/// A node must serve, and its replicas must stream, within this time.
const START_MS_MAX: u64 = 20_000;
/// A node must end within this time of SIGTERM.
const STOP_MS_MAX: u64 = 5_000;
/// Between two looks at something that is awaited.
const POLL_MS: u64 = 20;
/// Lines of a node's log that are shown when it does not start.
const LOG_LINES_SHOWN: usize = 5;

/// Flags of `walferry demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Where the nodes keep their data; replaced if an earlier demo made it
    #[arg(long, value_name = "DIR", default_value = "./walferry-demo")]
    dir: PathBuf,
    /// How long each commit level is under load
    #[arg(long, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Clients of the load
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=1000))]
    clients: u16,
}

/// Runs `walferry demo`.
pub fn run(args: &DemoArgs) -> Result<(), Failure> {
    replace_directory(&args.dir)?;
    let buffered = without_direct_io(&args.dir)?;
    let policy = ["--sync", SYNC_POLICY];
    let leader = DemoNode::spawn(&args.dir, "leader", buffered, &policy)?.wait_until_ready()?;
    let follow = ["--follow", leader.peer_listen.as_str()];
    let starting = REPLICAS.map(|name| DemoNode::spawn(&args.dir, name, buffered, &follow));
    let mut replicas = Vec::new();
    for node in starting {
        replicas.push(node?.wait_until_ready()?);
    }
    say(format_args!("a leader and two replicas, data and logs under {}", args.dir.display()))?;
    for node in std::iter::once(&leader).chain(&replicas) {
        say(format_args!("  {:<10} {}", node.name, node.url))?;
    }
    wait_until_streaming(&leader, replicas.len())?;
    let summaries = table(args, &leader)?;
    let interrupted = summaries.iter().any(|summary| summary.interrupted);
    if interrupted {
        say("\ninterrupted: the other levels and the comparison of the nodes are left out")?;
    } else {
        check(&leader, &replicas)?;
    }
    for node in replicas.into_iter().chain([leader]) {
        node.stop()?;
    }
    say("every node stopped cleanly")
}

/// Makes the directory anew; a directory that no demo made is left alone.
fn replace_directory(dir: &Path) -> Result<(), Failure> {
    let failed = |what: &str, error: std::io::Error| {
        Failure::failed(format_args!("--dir {}: cannot {what} it: {error}", dir.display()))
    };
    let is_empty = || dir.read_dir().is_ok_and(|mut entries| entries.next().is_none());
    if dir.join(MARKER_FILE).is_file() {
        std::fs::remove_dir_all(dir).map_err(|error| failed("replace", error))?;
    } else if dir.exists() && !is_empty() {
        let dir = dir.display();
        return Err(Failure::Usage(format!("--dir {dir}: exists and was not made by a demo; name another directory")));
    }
    std::fs::create_dir_all(dir).map_err(|error| failed("create", error))?;
    std::fs::write(dir.join(MARKER_FILE), MARKER_TEXT).map_err(|error| failed("write to", error))
}

/// True if the filesystem has no O_DIRECT; says so, because the figures then say little about a disk.
fn without_direct_io(dir: &Path) -> Result<bool, Failure> {
    match direct_io_refusal(dir, SyncMethod::Fdatasync) {
        Ok(None) => Ok(false),
        Ok(Some(reason)) => {
            let dir = dir.display();
            say(format_args!(
                "{dir} has no O_DIRECT ({reason}): the nodes run --buffered, the figures are not a disk's"
            ))?;
            Ok(true)
        }
        Err(error) => Err(Failure::failed(format_args!("--dir {}: {error}", dir.display()))),
    }
}

/// A node that is starting or runs; killed if it is dropped before it was stopped.
struct DemoNode {
    name: &'static str,
    child: Option<Child>,
    ready_file: PathBuf,
    log_file: PathBuf,
    url: Url,
    peer_listen: String,
}

impl DemoNode {
    fn spawn(dir: &Path, name: &'static str, buffered: bool, flags: &[&str]) -> Result<DemoNode, Failure> {
        let failed = |error: std::io::Error| Failure::failed(format_args!("cannot start {name}: {error}"));
        let (log_file, ready_file) = (dir.join(format!("{name}.log")), dir.join(format!("{name}.ready")));
        let log = std::fs::File::create(&log_file).map_err(failed)?;
        let mut command = Command::new(std::env::current_exe().map_err(failed)?);
        command.args(["start", "--name", name, "--listen", "127.0.0.1:0", "--peer-listen", "127.0.0.1:0"]);
        command.arg("--data").arg(dir.join(name)).arg("--ready-file").arg(&ready_file).args(flags);
        if buffered {
            command.arg("--buffered");
        }
        // Not under a supervisor: readiness is told by the file, and Ctrl-C is for the demo, which stops its nodes.
        command.env_remove("NOTIFY_SOCKET").env_remove("JOURNAL_STREAM").process_group(0);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        // SAFETY: prctl is a plain system call, fit for the moment between fork and exec.
        unsafe {
            command.pre_exec(|| {
                // A demo that is killed leaves no nodes behind.
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM);
                Ok(())
            });
        }
        let child = command.spawn().map_err(failed)?;
        let url = "redis://127.0.0.1:0".parse().map_err(Failure::Failed)?;
        Ok(DemoNode { name, child: Some(child), ready_file, log_file, url, peer_listen: String::new() })
    }

    fn wait_until_ready(mut self) -> Result<DemoNode, Failure> {
        let deadline = Instant::now() + Duration::from_millis(START_MS_MAX);
        loop {
            if let Ok(text) = std::fs::read_to_string(&self.ready_file) {
                let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
                if let (Some(listen), Some(peer_listen)) = (value("listen"), value("peer_listen")) {
                    self.url = format!("redis://{listen}").parse().map_err(Failure::Failed)?;
                    self.peer_listen = peer_listen.to_owned();
                    return Ok(self);
                }
            }
            let ended = self.child.as_mut().and_then(|child| child.try_wait().ok().flatten());
            if ended.is_some() || Instant::now() >= deadline {
                let why = if ended.is_some() { "ended at its start" } else { "does not become ready" };
                return Err(Failure::failed(format_args!("{} {why}:\n{}", self.name, self.log_end())));
            }
            std::thread::sleep(Duration::from_millis(POLL_MS));
        }
    }

    /// The last lines of the node's log.
    fn log_end(&self) -> String {
        let text = std::fs::read_to_string(&self.log_file).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..].join("\n")
    }

    /// Ends the node with SIGTERM; it has to end with exit code 0.
    fn stop(mut self) -> Result<(), Failure> {
        let Some(mut child) = self.child.take() else {
            return Ok(());
        };
        terminate(&child);
        match wait_for_end(&mut child) {
            Some(status) if status.success() => Ok(()),
            Some(status) => {
                Err(Failure::failed(format_args!("{} ended with {status}:\n{}", self.name, self.log_end())))
            }
            None => {
                let _ = child.kill();
                let _ = child.wait();
                Err(Failure::failed(format_args!("{} did not end within {STOP_MS_MAX} ms of SIGTERM", self.name)))
            }
        }
    }
}

impl Drop for DemoNode {
    /// Only after a failure is there still a child; it must not outlive the demo.
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            terminate(&child);
            if wait_for_end(&mut child).is_none() {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}

fn terminate(child: &Child) {
    // It may have ended by itself; then there is nothing to tell it.
    let _ = kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM);
}

fn wait_for_end(child: &mut Child) -> Option<std::process::ExitStatus> {
    let deadline = Instant::now() + Duration::from_millis(STOP_MS_MAX);
    while Instant::now() < deadline {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        std::thread::sleep(Duration::from_millis(POLL_MS));
    }
    None
}

fn wait_until_streaming(leader: &DemoNode, wanted: usize) -> Result<(), Failure> {
    let deadline = Instant::now() + Duration::from_millis(START_MS_MAX);
    let mut client = Client::connect(&leader.url).map_err(Failure::failed)?;
    loop {
        let streaming = Status::read(&mut client).map_err(Failure::failed)?.replicas_in_state("streaming");
        if streaming == wanted {
            return say("both replicas stream\n");
        }
        if Instant::now() >= deadline {
            return Err(Failure::failed(format_args!(
                "{streaming} of {wanted} replicas stream after {} s; the nodes' logs are beside their data",
                START_MS_MAX / 1000
            )));
        }
        std::thread::sleep(Duration::from_millis(POLL_MS));
    }
}

/// Load at every commit level, a row each, printed as it comes.
fn table(args: &DemoArgs, leader: &DemoNode) -> Result<Vec<Summary>, Failure> {
    let mut options = Options {
        url: leader.url.clone(),
        clients: usize::from(args.clients),
        threads: 1,
        duration: Some(Duration::from_secs(args.seconds)),
        transactions: None,
        progress: None,
        rate: None,
        scale: Some(1),
        scripts: vec![ScriptSource::Builtin("tpcb-like".to_owned(), 1)],
        define: Vec::new(),
        payload_bytes: 0,
        level: None,
        seed: None,
        log: None,
    };
    load::initialise(&options)?;
    let (clients, seconds) = (args.clients, args.seconds);
    say(format_args!("tpcb-like, {clients} clients, {seconds} s at each level, sync policy {SYNC_POLICY}\n"))?;
    say(format_args!(
        "{:<13} {:>9} {:>9} {:>9} {:>14}   answered when",
        "level", "tps", "p50 ms", "p99 ms", "records/flush"
    ))?;
    let mut summaries = Vec::new();
    for level in CommitLevel::ALL {
        options.level = Some(level.to_string());
        let before = flushes(leader)?;
        let summary = load::execute(&options)?;
        let after = flushes(leader)?;
        let latency = &summary.latency_ms;
        say(format_args!(
            "{level:<13} {:>9.0} {:>9.3} {:>9.3} {:>14}   {}",
            summary.tps,
            latency.p50,
            latency.p99,
            records_per_flush(before, after),
            meaning(level)
        ))?;
        std::io::stdout().flush()?;
        if summary.failed > 0 {
            let example = summary.failures.first().map_or("", |failure| failure.example.as_str());
            say(format_args!("{:<13} {} transactions failed: {example}", "", summary.failed))?;
        }
        let interrupted = summary.interrupted;
        summaries.push(summary);
        if interrupted {
            break;
        }
    }
    Ok(summaries)
}

fn meaning(level: CommitLevel) -> &'static str {
    match level {
        CommitLevel::Off => "in the leader's memory",
        CommitLevel::Local => "durable on the leader",
        CommitLevel::RemoteWrite => "and received by a replica",
        CommitLevel::RemoteFlush => "and durable on a replica",
        CommitLevel::RemoteApply => "and visible to a replica's readers",
    }
}

/// Records and durable writes of the leader's log since its start.
fn flushes(leader: &DemoNode) -> Result<Option<(u64, u64)>, Failure> {
    let mut client = Client::connect(&leader.url).map_err(Failure::failed)?;
    let info = client.call(&["INFO"]).map_err(Failure::failed)?.text().unwrap_or_default();
    let number = |key| info_field(&info, key).and_then(|value| value.parse().ok());
    Ok(number("ledger_records").zip(number("ledger_flushes")))
}

fn records_per_flush(before: Option<(u64, u64)>, after: Option<(u64, u64)>) -> String {
    let (Some((records_before, flushes_before)), Some((records, flushes))) = (before, after) else {
        return "-".to_owned();
    };
    let flushes = flushes.saturating_sub(flushes_before);
    if flushes == 0 {
        return "-".to_owned();
    }
    format!("{:.1}", records.saturating_sub(records_before) as f64 / flushes as f64)
}

fn check(leader: &DemoNode, replicas: &[DemoNode]) -> Result<(), Failure> {
    let urls: Vec<Url> = replicas.iter().map(|node| node.url.clone()).collect();
    let checked = load::check(&leader.url, &urls)?;
    match checked.iter().find(|node| !node.agrees) {
        Some(node) => {
            let (address, sums) = (&node.address, &node.sums);
            Err(Failure::failed(format_args!("the sums of {address} disagree: {sums}")))
        }
        None => say("\naccounts, tellers, branches and history add up to the same on all three nodes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_directory_of_a_demo_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let (mine, other) = (dir.path().join("demo"), dir.path().join("other"));
        replace_directory(&mine).unwrap();
        std::fs::write(mine.join("old"), "x").unwrap();
        replace_directory(&mine).unwrap();
        assert!(!mine.join("old").exists() && mine.join(MARKER_FILE).exists());
        std::fs::create_dir(&other).unwrap();
        replace_directory(&other).unwrap();
        std::fs::remove_file(other.join(MARKER_FILE)).unwrap();
        std::fs::write(other.join("precious"), "x").unwrap();
        let error = replace_directory(&other).unwrap_err();
        assert!(matches!(error, Failure::Usage(_)) && error.to_string().contains("not made by a demo"), "{error}");
        assert!(other.join("precious").exists());
    }

    #[test]
    fn records_per_flush_is_a_difference() {
        assert_eq!(records_per_flush(Some((100, 10)), Some((500, 50))), "10.0");
        assert_eq!(records_per_flush(Some((100, 10)), Some((100, 10))), "-");
        assert_eq!(records_per_flush(None, Some((1, 1))), "-");
    }
}
