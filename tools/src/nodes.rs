//! Nodes that a command starts for itself, as child processes: their directory, their start, their end. Used by `demo` and
//! `distance`; uses the same flags that a person would type and knows nothing of the daemon's inside.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use walferry_engine::log::{SyncMethod, direct_io_refusal};
use walferry_tls::Secrets;

use crate::client::{Client, Url};
use crate::failure::{Failure, say};
use crate::status::Status;
use walferry_node::peer_secret::SECRET_FILE;

/// Says that a directory was made for such nodes and may be replaced by the next ones.
const MARKER_FILE: &str = "made-by-walferry";
const MARKER_TEXT: &str =
    "This directory was made by `walferry demo` or `walferry distance`; the next run replaces it.\n";
/// A node must serve, and its replicas must stream, within this time.
const START_MS_MAX: u64 = 20_000;
/// A node must end within this time of SIGTERM.
const STOP_MS_MAX: u64 = 5_000;
/// Between two looks at something that is awaited.
const POLL_MS: u64 = 20;
/// Lines of a node's log that are shown when it does not start.
const LOG_LINES_SHOWN: usize = 5;

/// Makes the directory anew; any other directory is left alone.
pub fn replace_directory(dir: &Path) -> Result<(), Failure> {
    let failed = |what: &str, error: std::io::Error| {
        Failure::failed(format_args!("--dir {}: cannot {what} it: {error}", dir.display()))
    };
    let is_empty = || dir.read_dir().is_ok_and(|mut entries| entries.next().is_none());
    if dir.join(MARKER_FILE).is_file() {
        std::fs::remove_dir_all(dir).map_err(|error| failed("replace", error))?;
    } else if dir.exists() && !is_empty() {
        let dir = dir.display();
        return Err(Failure::Usage(format!(
            "--dir {dir}: exists and was not made by a demo or distance; name another directory"
        )));
    }
    std::fs::create_dir_all(dir).map_err(|error| failed("create", error))?;
    std::fs::write(dir.join(MARKER_FILE), MARKER_TEXT).map_err(|error| failed("write to", error))
}

/// The flags of nodes whose filesystem has no O_DIRECT; says so, because the figures then say little about a disk.
pub fn without_direct_io(dir: &Path) -> Result<Vec<&'static str>, Failure> {
    match direct_io_refusal(dir, SyncMethod::Fdatasync) {
        Ok(None) => Ok(Vec::new()),
        Ok(Some(reason)) => {
            let dir = dir.display();
            say(format_args!(
                "{dir} has no O_DIRECT ({reason}): the nodes run --buffered, the figures are not a disk's"
            ))?;
            Ok(vec!["--buffered"])
        }
        Err(error) => Err(Failure::failed(format_args!("--dir {}: {error}", dir.display()))),
    }
}

/// A node that is starting or runs; killed if it is dropped before it was stopped.
pub struct LocalNode {
    /// Its name.
    pub name: String,
    child: Option<Child>,
    started: Instant,
    ready_file: PathBuf,
    log_file: PathBuf,
    /// Where clients connect, once it is ready.
    pub url: Url,
    /// Where replicas connect, once it is ready.
    pub peer_listen: String,
}

impl LocalNode {
    /// This program, to be started again as a node.
    pub fn program() -> Result<PathBuf, Failure> {
        std::env::current_exe().map_err(|error| Failure::failed(format_args!("cannot find this program: {error}")))
    }

    /// Starts a node with `command`, which runs this program; data, log and ready file stand in `dir`. Flags win over the
    /// addresses on loopback.
    pub fn spawn(mut command: Command, dir: &Path, name: &str, flags: &[&str]) -> Result<LocalNode, Failure> {
        let failed = |error: std::io::Error| Failure::failed(format_args!("cannot start {name}: {error}"));
        let (log_file, ready_file) = (dir.join(format!("{name}.log")), dir.join(format!("{name}.ready")));
        // A node that is started again goes on in its log.
        let log = std::fs::OpenOptions::new().create(true).append(true).open(&log_file).map_err(failed)?;
        let _ = std::fs::remove_file(&ready_file);
        let secret = dir.join(SECRET_FILE);
        if !secret.exists() {
            Secrets::create(&secret).map_err(Failure::failed)?;
        }
        command.args(["start", "--name", name, "--listen", "127.0.0.1:0", "--peer-listen", "127.0.0.1:0"]);
        command.arg("--data").arg(dir.join(name)).arg("--ready-file").arg(&ready_file);
        command.arg("--peer-secret").arg(&secret).args(flags);
        // Not under a supervisor: readiness is told by the file, and Ctrl-C is for the caller, which stops its nodes.
        command.env_remove("NOTIFY_SOCKET").env_remove("JOURNAL_STREAM").process_group(0);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        // SAFETY: prctl is a plain system call, fit for the moment between fork and exec.
        unsafe {
            command.pre_exec(|| {
                // A caller that is killed leaves no nodes behind.
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM);
                Ok(())
            });
        }
        let child = command.spawn().map_err(failed)?;
        let url = "redis://127.0.0.1:0".parse().map_err(Failure::Failed)?;
        Ok(LocalNode {
            name: name.to_owned(),
            child: Some(child),
            started: Instant::now(),
            ready_file,
            log_file,
            url,
            peer_listen: String::new(),
        })
    }

    /// Waits until the node serves; a node that does not is an error with the end of its log.
    pub fn wait_until_ready(mut self) -> Result<LocalNode, Failure> {
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
            let ended = self.has_ended();
            if ended || Instant::now() >= deadline {
                let why = if ended { "ended at its start" } else { "does not become ready" };
                return Err(Failure::failed(format_args!("{} {why}:\n{}", self.name, self.log_end())));
            }
            std::thread::sleep(Duration::from_millis(POLL_MS));
        }
    }

    /// SIGKILL, without a word.
    pub fn kill(mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// True once its process has ended by itself.
    pub fn has_ended(&mut self) -> bool {
        self.child.as_mut().is_none_or(|child| matches!(child.try_wait(), Ok(Some(_))))
    }

    /// Its process, and how long that has run.
    pub fn process(&self) -> Option<(u32, Duration)> {
        self.child.as_ref().map(|child| (child.id(), self.started.elapsed()))
    }

    /// Sends a signal that the node survives.
    pub fn signal(&self, signal: Signal) {
        if let Some(child) = &self.child {
            let _ = kill(Pid::from_raw(child.id() as i32), signal);
        }
    }

    fn log_end(&self) -> String {
        log_end(&self.log_file)
    }

    /// Ends the node with SIGTERM; it has to end with exit code 0.
    pub fn stop(mut self) -> Result<(), Failure> {
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

/// The last lines of a node's log.
pub fn log_end(file: &Path) -> String {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..].join("\n")
}

impl Drop for LocalNode {
    /// Only after a failure is there still a child; it must not outlive its caller.
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

/// Waits until so many replicas of `leader` stream.
pub fn wait_until_streaming(leader: &LocalNode, wanted: usize) -> Result<(), Failure> {
    let deadline = Instant::now() + Duration::from_millis(START_MS_MAX);
    let mut client = Client::connect(&leader.url).map_err(Failure::failed)?;
    loop {
        let streaming = Status::read(&mut client).map_err(Failure::failed)?.replicas_in_state("streaming");
        if streaming == wanted {
            return Ok(());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_directory_of_ours_is_replaced() {
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
}
