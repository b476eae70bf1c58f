//! Members that the drill starts itself, as processes on this host: started, killed, signalled, cut off; and what their logs say.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::sys::signal::Signal;

use super::ground::{Clock, Disk, Ground};
use super::member::Split;
use crate::failure::Failure;
use crate::nodes::LocalNode;

/// Where clients of a member connect.
pub const CLIENT_PORT: u16 = 6400;
const PEER_PORT: u16 = 6401;
/// Small, so that a drill sees segments end and go.
pub const SEGMENT_BYTES: u64 = 16 << 20;
/// Log that members keep for each other.
pub const KEEP_BYTES_MIN: u64 = 32 << 20;
/// A node that a fault has doomed ends within this time of the fault's end.
const ENDS_WITHIN: Duration = Duration::from_secs(2);
/// Between two looks at a node that may end.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
const MICROS_PER_DAY: u64 = 86_400_000_000;

/// The processes. Nodes end before their disks and networks are taken down.
pub struct Own {
    /// Where data and logs stand.
    pub dir: PathBuf,
    names: Vec<String>,
    flags: Vec<String>,
    nodes: BTreeMap<String, LocalNode>,
    disks: BTreeMap<String, Disk>,
    clocks: BTreeMap<String, Clock>,
    /// What they stand on.
    pub ground: Ground,
}

impl Own {
    /// Starts every member.
    pub fn start(ground: Ground, dir: &Path, names: &[String], flags: Vec<String>) -> Result<Own, Failure> {
        let mut own = Own {
            dir: dir.to_owned(),
            names: names.to_vec(),
            flags,
            nodes: BTreeMap::new(),
            disks: BTreeMap::new(),
            clocks: BTreeMap::new(),
            ground,
        };
        for name in names {
            if own.ground.has_disks() {
                own.disks.insert(name.clone(), Disk::make(dir, name)?);
            }
            own.clocks.insert(name.clone(), Clock::new(dir, name)?);
        }
        let starting: Result<Vec<LocalNode>, Failure> = names.iter().map(|name| own.spawn(name)).collect();
        for node in starting? {
            let node = node.wait_until_ready()?;
            own.nodes.insert(node.name.clone(), node);
        }
        Ok(own)
    }

    fn index(&self, name: &str) -> usize {
        self.names.iter().position(|known| known == name).expect("a member")
    }

    fn spawn(&self, name: &str) -> Result<LocalNode, Failure> {
        let index = self.index(name);
        let command = self.ground.command(index, &LocalNode::program()?, &self.clocks[name]);
        let address = |(index, name): (usize, &String)| format!("{name}={}:{PEER_PORT}", self.ground.host(index));
        let members = self.names.iter().enumerate().map(address).collect::<Vec<_>>().join(",");
        let host = self.ground.host(index);
        let (listen, peer) = (format!("{host}:{CLIENT_PORT}"), format!("{host}:{PEER_PORT}"));
        let mut flags = vec!["--members", &members, "--listen", &listen, "--peer-listen", &peer];
        let (segment, keep) = (SEGMENT_BYTES.to_string(), KEEP_BYTES_MIN.to_string());
        flags.extend(["--segment-bytes", &segment, "--keep-bytes-min", &keep, "--sync-method", "dsync"]);
        flags.extend(["--write-depth", "4"]);
        flags.extend(self.flags.iter().map(String::as_str));
        LocalNode::spawn(command, &self.dir, name, &flags)
    }

    /// SIGKILL.
    pub fn kill(&mut self, name: &str) {
        if let Some(node) = self.nodes.remove(name) {
            node.kill();
        }
    }

    /// Starts a member again.
    pub fn bring(&mut self, name: &str) -> Result<(), Failure> {
        let node = self.spawn(name)?.wait_until_ready()?;
        self.nodes.insert(name.to_owned(), node);
        Ok(())
    }

    /// Starts a member again that has ended by itself, as a service manager does; true when it had. A node that cannot write its
    /// store notices with its next checkpoint, so it is watched for a while.
    pub fn revive(&mut self, name: &str) -> Result<bool, Failure> {
        let until = Instant::now() + ENDS_WITHIN;
        while Instant::now() < until {
            if self.nodes.get_mut(name).is_none_or(LocalNode::has_ended) {
                self.kill(name);
                self.bring(name)?;
                return Ok(true);
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        Ok(false)
    }

    /// Signals a running member.
    pub fn signal(&self, name: &str, signal: Signal) {
        if let Some(node) = self.nodes.get(name) {
            node.signal(signal);
        }
    }

    /// Every member's name.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// A running member's process, and how long it has run.
    pub fn process(&self, name: &str) -> Result<(u32, Duration), Failure> {
        let node = self.nodes.get(name);
        node.and_then(LocalNode::process).ok_or_else(|| Failure::failed(format_args!("{name} does not run")))
    }

    /// Cuts the way from one member to another.
    pub fn cut(&self, from: &str, to: &str) {
        self.ground.cut(self.index(from), self.index(to));
    }

    /// Where a member's disk is mounted.
    pub fn disk(&self, name: &str) -> PathBuf {
        self.disks[name].mount.clone()
    }

    /// A member's wall clock.
    pub fn clock(&self, name: &str) -> Clock {
        self.clocks[name].clone()
    }

    /// The end of every node's log.
    pub fn log_ends(&self) -> String {
        let text = |name: &String| format!("{name}:\n{}", crate::nodes::log_end(&self.log_file(name)));
        self.names.iter().map(text).collect::<Vec<_>>().join("\n")
    }

    fn log_file(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.log"))
    }

    /// Where the time went until another member led, as the nodes' logs tell.
    pub fn split(&self, since: SystemTime) -> Option<Split> {
        let texts = self.names.iter().filter_map(|name| std::fs::read_to_string(self.log_file(name)).ok());
        split(&texts.collect::<Vec<_>>(), since)
    }

    /// Ends every node.
    pub fn stop(&mut self) -> Result<(), Failure> {
        for (_, node) in std::mem::take(&mut self.nodes) {
            node.stop()?;
        }
        Ok(())
    }
}

fn split(logs: &[String], since: SystemTime) -> Option<Split> {
    let since_us = since.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_micros() as u64) % MICROS_PER_DAY;
    let moment = |line: &str| time_of_day_us(line).and_then(|us| us.checked_sub(since_us));
    let moments = |what: &'static str| {
        let lines = logs.iter().flat_map(|log| log.lines());
        lines.filter(move |line| line.contains(what)).filter_map(moment)
    };
    let led = moments(" leading epoch=").min()?;
    // The fences that this leader came from; an attempt before it that led nowhere is part of the detection.
    let fenced = moments(" fenced member=").filter(|us| *us <= led).min()?;
    let detection = Duration::from_micros(fenced);
    Some(Split { detection, election: Duration::from_micros(led - fenced) })
}

/// The time of day of a log line such as `2026-01-02T03:04:05.678901Z  INFO ...`, microseconds.
fn time_of_day_us(line: &str) -> Option<u64> {
    let (_, time) = line.split_once('T')?;
    let (time, _) = time.split_once('Z')?;
    let (clock, micros) = time.split_once('.')?;
    let mut seconds = 0_u64;
    for part in clock.split(':') {
        seconds = seconds * 60 + part.parse::<u64>().ok()?;
    }
    (micros.len() == 6).then_some(())?;
    Some(seconds * 1_000_000 + micros.parse::<u64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_lines_tell_their_time() {
        assert_eq!(time_of_day_us("2026-01-02T00:01:05.000007Z  INFO x"), Some(65_000_007));
        assert_eq!(time_of_day_us("no time here"), None);
    }

    #[test]
    fn outage_is_split_at_the_first_fence_and_the_new_leader() {
        let since = UNIX_EPOCH + Duration::from_secs(10);
        let a = "1970-01-01T00:00:09.900000Z INFO leading epoch=1\n1970-01-01T00:00:10.400000Z INFO fenced member=a\n";
        let b = "1970-01-01T00:00:10.405000Z INFO fenced member=b\n1970-01-01T00:00:10.420000Z INFO node: leading epoch=2\n";
        let split = split(&[a.to_owned(), b.to_owned()], since).expect("a new leader");
        assert_eq!((split.detection.as_millis(), split.election.as_millis()), (400, 20));
        assert!(super::split(&[a.to_owned()], since).is_none(), "nobody led");
    }
}
