//! Scripts for the guest: start, verify, read and end the nodes of a course. Used by `loss` and `faults`; the text of what an
//! operator would type, no test.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use clap::ValueEnum;

use crate::error::{During, Failure};
use crate::kernel::tool;
use crate::promise::{Held, SLOTS};

/// Where the scripts' files stand, memory, and where the disk is mounted.
pub const MOUNT: &str = "/mnt/data";
/// The guest's disk. XFS takes none below 300 MiB.
const DISK_BYTES: u64 = 640 << 20;
/// A node serves within so many seconds of its start; the processor is emulated.
const START_SECONDS_MAX: u64 = 150;
/// Small, so that segments end, are recycled and are covered by checkpoints many times in a run.
const FLAGS: &str = "--segment-bytes 16MiB --checkpoint-bytes 2MiB --log-buffer-bytes 64MiB --store-cache-bytes 8MiB \
                     --waterfall=false";

/// Timeouts for three members on one processor that is emulated and shared.
const EMULATED: &str = "--election-timeout 20s --heartbeat-interval 1s --peer-timeout 60s";
const ON_HOST: &str = "--election-timeout 4s --heartbeat-interval 500ms";
/// Segments are recycled as soon as they may be.
const KEEP_LITTLE: &str = "16MiB";

/// What the disk is formatted with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Filesystem {
    /// ext4
    Ext4,
    /// XFS
    Xfs,
}

impl Filesystem {
    /// As `mount -t` knows it.
    pub fn name(self) -> &'static str {
        match self {
            Filesystem::Ext4 => "ext4",
            Filesystem::Xfs => "xfs",
        }
    }

    /// A fresh disk.
    pub fn make(self, dir: &Path) -> Result<Vec<u8>, Failure> {
        let file = tempfile::NamedTempFile::new_in(dir).during("make a disk")?;
        file.as_file().set_len(DISK_BYTES).during("make a disk")?;
        let path = file.path().display().to_string();
        match self {
            // No lazy initialisation: the kernel's own thread would write for as long as the course takes.
            Filesystem::Ext4 => {
                tool("mkfs.ext4", &["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", &path], dir)?
            }
            Filesystem::Xfs => tool("mkfs.xfs", &["-q", "-f", &path], dir)?,
        };
        std::fs::read(file.path()).during("read the fresh disk")
    }
}

/// How a node makes a write durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FlushBy {
    /// The write itself, past the page cache (O_DIRECT, RWF_DSYNC)
    Dsync,
    /// A write past the page cache and an fdatasync
    Fdatasync,
    /// A write into the page cache and an fdatasync
    Buffered,
}

impl FlushBy {
    /// All ways.
    pub const ALL: [FlushBy; 3] = [FlushBy::Dsync, FlushBy::Fdatasync, FlushBy::Buffered];

    fn flags(self) -> &'static str {
        match self {
            FlushBy::Dsync => "--sync-method dsync",
            FlushBy::Fdatasync => "--sync-method fdatasync",
            FlushBy::Buffered => "--sync-method fdatasync --buffered",
        }
    }
}

/// The nodes of a course.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nodes {
    /// One leader, or three members of a cluster.
    names: &'static [&'static str],
    flush_by: FlushBy,
    /// How much old log they keep at least.
    keep: &'static str,
    /// Of members: how long they wait for each other.
    timeouts: &'static str,
}

impl Nodes {
    /// One leader.
    pub fn one(flush_by: FlushBy) -> Nodes {
        Nodes { names: &["a"], flush_by, keep: KEEP_LITTLE, timeouts: EMULATED }
    }

    /// Three members of a cluster.
    pub fn three(flush_by: FlushBy) -> Nodes {
        Nodes { names: &["a", "b", "c"], flush_by, keep: KEEP_LITTLE, timeouts: EMULATED }
    }

    /// The same on this host's processors.
    pub fn on_host(self) -> Nodes {
        Nodes { timeouts: ON_HOST, ..self }
    }

    /// The same, but every new segment needs space of its own: nothing is recycled.
    pub fn keeping_all(self) -> Nodes {
        Nodes { keep: "100GiB", ..self }
    }

    /// Makes the data directory of a node that is alone; members make theirs themselves.
    pub fn init(self) -> String {
        match self.names {
            [name] => format!("walferry init --data {MOUNT}/{name} --name {name} --segment-bytes 16MiB"),
            _ => String::new(),
        }
    }

    /// Where a node's clients connect.
    pub fn address(self, name: &str) -> String {
        format!("127.0.0.1:{}", client_port(name))
    }

    /// Where all nodes' clients connect.
    pub fn addresses(self) -> String {
        self.names.iter().map(|name| self.address(name)).collect::<Vec<_>>().join(",")
    }

    /// Starts a node.
    pub fn spawn(self, name: &str) -> String {
        let mut flags = format!("{FLAGS} --keep-bytes-min {} {}", self.keep, self.flush_by.flags());
        if self.names.len() > 1 {
            let member = |name: &&str| format!("{name}=127.0.0.1:{}", peer_port(name));
            let members = self.names.iter().map(member).collect::<Vec<_>>().join(",");
            let _ = write!(flags, " --members {members} --sync 'ANY 1 (*)' {}", self.timeouts);
        }
        format!(
            "rm -f /mnt/{name}.ready; walferry start --data /mnt/data/{name} --name {name} --listen {} --peer-listen \
             127.0.0.1:{} {flags} --ready-file /mnt/{name}.ready >>/mnt/{name}.log 2>&1 & echo $! >/mnt/{name}.pid",
            self.address(name),
            peer_port(name)
        )
    }

    /// Waits until a node that was started serves.
    pub fn wait(self, name: &str) -> String {
        format!("power await --file /mnt/{name}.ready --process $(cat /mnt/{name}.pid) --seconds {START_SECONDS_MAX}")
    }

    /// Starts all of them; this exit code and the log's end when one does not serve.
    pub fn start_all(self, code: i32) -> String {
        let spawn = self.names.iter().map(|name| self.spawn(name)).collect::<Vec<_>>().join("\n");
        let wait = |name: &&str| format!("{} || {{ tail -n 5 /mnt/{name}.log; exit {code}; }}", self.wait(name));
        format!("{spawn}\n{}", self.names.iter().map(wait).collect::<Vec<_>>().join("\n"))
    }

    /// Prints what the nodes and their writers said last.
    pub fn last_words(self) -> &'static str {
        "tail -n 12 /mnt/*.log"
    }

    /// Verifies every log that is there; this exit code when one is damaged.
    pub fn verify(self, code: i32) -> String {
        let one = |name: &&str| {
            format!(
                "if [ -f /mnt/data/{name}/meta ] && [ -d /mnt/data/{name}/log ]; then walferry log verify --data /mnt/data/{name} \
                 >/mnt/verify 2>&1 || {{ cat /mnt/verify; exit {code}; }}; fi"
            )
        };
        self.names.iter().map(one).collect::<Vec<_>>().join("\n")
    }

    /// Prints what the node that leads holds; exit code 43 when none does, or a value is damaged.
    pub fn read(self, writers: usize) -> String {
        let addresses = self.addresses();
        format!("power read --addresses {addresses} --writers {writers} || exit 43")
    }

    /// SIGKILL to all of them; exit code 44 when one does not end.
    pub fn kill_all(self) -> String {
        self.names.iter().map(|name| self.kill(name)).collect::<Vec<_>>().join("\n")
    }

    /// SIGKILL to one of them; exit code 44 when it does not end.
    pub fn kill(self, name: &str) -> String {
        format!(
            "kill -KILL $(cat /mnt/{name}.pid); n=0; while kill -0 $(cat /mnt/{name}.pid) 2>/dev/null; do \
                 sleep 0.05; n=$((n+1)); [ $n -lt 600 ] || {{ tail -n 5 /mnt/{name}.log; exit 44; }}; done"
        )
    }
}

fn client_port(name: &str) -> u16 {
    6400 + 10 * u16::from(name.as_bytes()[0] - b'a')
}

fn peer_port(name: &str) -> u16 {
    client_port(name) + 1
}

/// What `power read` printed.
pub fn held(text: &str, writers: usize) -> Result<Vec<Held>, Failure> {
    let mut held = vec![Held::new(); writers];
    for line in text.lines() {
        let numbers: Vec<u64> = line.split_whitespace().filter_map(|number| number.parse().ok()).collect();
        match numbers[..] {
            [writer, slot, value] if (writer as usize) < writers && slot < SLOTS => {
                held[writer as usize].insert(slot, value);
            }
            _ => return Err(Failure::failed(format_args!("`power read` printed {line:?}"))),
        }
    }
    Ok(held)
}

/// Where a failed disk is kept.
pub fn failed_image(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("failed-{name}.img"))
}
