//! Where images of a disk are recovered, one after another: mounted, verified, started, read, in another guest or with this host's
//! kernel. Tells what came of it; which promises that keeps is `loss`'s business.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use crate::disk::{Disk, DiskFile, Moment};
use crate::error::{During, Failure};
use crate::machine::{Bus, Kit, KitArgs, Machine, SCRIPT_TIME_MAX};
use crate::node::{Filesystem, MOUNT, Nodes};
use crate::promise::Promises;

const NOT_MOUNTED: i32 = 40;
const DAMAGED: i32 = 41;
const NOT_STARTED: i32 = 42;
/// Printed on this host when everything is read.
const ALL_READ: &str = "all read";

/// Flags of every command that recovers images.
#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    /// How the disk is attached
    #[arg(long, value_enum, default_value = "virtio")]
    pub bus: Bus,
    /// Recover on this host's kernel, by a loop device in namespaces of its own (root): much quicker than an emulated one
    #[arg(long)]
    pub on_host: bool,
    #[command(flatten)]
    pub kit: KitArgs,
}

/// The bench. A guest is booted again when a look left it unusable.
pub struct Bench<'a> {
    kit: &'a Kit,
    disk: Disk,
    filesystem: Filesystem,
    bus: Bus,
    nodes: Nodes,
    writers: usize,
    host: Option<HostBench>,
    machine: Option<Machine>,
    nobody: Arc<Mutex<Promises>>,
}

/// What one recovery came to.
pub struct Found {
    /// What `power read` printed, or why it came to nothing.
    pub outcome: Result<String, String>,
    /// Nothing was mounted yet.
    pub began: Moment,
    /// Everything was read by then.
    pub read_at: Moment,
    /// It was cleared away.
    pub ended: Moment,
}

/// This host's kernel.
struct HostBench {
    /// The disk, as a file here.
    path: PathBuf,
    file: DiskFile,
    tools: PathBuf,
}

impl HostBench {
    /// Fails where the host cannot mount the filesystem. Moves this thread to a mount namespace of its own.
    fn new(kit: &Kit, disk: &Disk, filesystem: Filesystem) -> Result<HostBench, Failure> {
        let known = std::fs::read_to_string("/proc/filesystems").during("read /proc/filesystems")?;
        let name = filesystem.name();
        if !known.split_whitespace().any(|word| word == name) {
            return Err(Failure::Missing(format!("--on-host: this kernel has no {name}")));
        }
        let missing = |error: &dyn std::fmt::Display| Failure::Missing(format!("--on-host: {error}"));
        walferry_mounts::own().map_err(|error| missing(&error))?;
        let path = kit.dir.join("recovered.img");
        let file = DiskFile::serve(disk, &path).map_err(|error| missing(&error))?;
        Ok(HostBench { path, file, tools: kit.dir.clone() })
    }

    /// Runs a script with mounts, network and processes of its own; all of them end with it. Its exit code and what it printed;
    /// `all_read` is called when it comes to that.
    fn ask(&self, script: &str, mut all_read: impl FnMut()) -> Result<(i32, String), Failure> {
        let path = format!("{}:{}", self.tools.display(), std::env::var("PATH").unwrap_or_default());
        let script = format!("mount -t tmpfs mnt /mnt && mkdir {MOUNT} && ip link set lo up || exit 39\n{script}");
        let mut command = Command::new("unshare");
        command.args(["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", &script]);
        command.env("PATH", path).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().during("run `unshare`")?;
        let mut text = String::new();
        for line in BufReader::new(child.stdout.take().expect("piped")).lines() {
            match line.during("read what the script prints")? {
                line if line == ALL_READ => all_read(),
                line => text.extend([&line, "\n"]),
            }
        }
        let status = child.wait().during("wait for `unshare`")?;
        if !self.file.wait_until_closed() {
            return Err(Failure::failed(format_args!("{} is still in use after a recovery", self.path.display())));
        }
        Ok((status.code().unwrap_or(-1), text))
    }
}

impl<'a> Bench<'a> {
    /// For images on `disk`.
    pub fn new(
        kit: &'a Kit,
        args: &BenchArgs,
        disk: &Disk,
        filesystem: Filesystem,
        nodes: Nodes,
        writers: usize,
    ) -> Result<Bench<'a>, Failure> {
        let host = if args.on_host { Some(HostBench::new(kit, disk, filesystem)?) } else { None };
        let nodes = if args.on_host { nodes.on_host() } else { nodes };
        let (disk, nobody) = (disk.clone(), Arc::default());
        Ok(Bench { kit, disk, filesystem, bus: args.bus, nodes, writers, host, machine: None, nobody })
    }

    fn script(&self, device: &str, options: &str) -> String {
        let (nodes, name) = (self.nodes, self.filesystem.name());
        format!(
            "rm -f /mnt/*.log /mnt/*.pid; mount -t {name} {options} {device} {MOUNT} || exit {NOT_MOUNTED}\n{}\n{}\n{}",
            nodes.verify(DAMAGED),
            nodes.start_all(NOT_STARTED),
            nodes.read(self.writers)
        )
    }

    /// Recovers from what stands on the disk now.
    pub fn look(&mut self) -> Result<Found, Failure> {
        match self.host.take() {
            Some(host) => {
                let found = self.look_on_host(&host);
                self.host = Some(host);
                found
            }
            None => self.look_in_guest(),
        }
    }

    fn look_on_host(&mut self, host: &HostBench) -> Result<Found, Failure> {
        let began = self.disk.state().stamp();
        let mut read_at = None;
        let script = self.script(&host.path.display().to_string(), "-o loop");
        let clear = format!("echo {ALL_READ}\n{}\numount {MOUNT} || exit 45", self.nodes.kill_all());
        let (code, output) = host.ask(&format!("exec 2>&1\n{script}\n{clear}"), || {
            read_at = Some(self.disk.state().stamp());
        })?;
        let ended = self.disk.state().stamp();
        Ok(Found { outcome: outcome(code, output), began, read_at: read_at.unwrap_or(ended), ended })
    }

    fn look_in_guest(&mut self) -> Result<Found, Failure> {
        let mut machine = match self.machine.take() {
            Some(machine) => machine,
            None => Machine::boot(self.kit, &self.disk, self.filesystem, self.bus, &self.nobody)?,
        };
        let began = self.disk.state().stamp();
        let (code, output) = machine.ask(&self.script(self.bus.device(), ""), SCRIPT_TIME_MAX)?;
        let read_at = self.disk.state().stamp();
        let outcome = outcome(code, output);
        if outcome.is_ok() {
            let clear = format!("{}\numount {MOUNT} || exit 45", self.nodes.kill_all());
            let (code, output) = machine.ask(&clear, SCRIPT_TIME_MAX)?;
            if code != 0 {
                return Err(Failure::failed(format_args!("the guest cannot be cleared (exit code {code}): {output}")));
            }
            self.machine = Some(machine);
        }
        let ended = self.disk.state().stamp();
        Ok(Found { outcome, began, read_at, ended })
    }
}

fn outcome(code: i32, output: String) -> Result<String, String> {
    let why = match code {
        0 => return Ok(output),
        NOT_MOUNTED => "the filesystem cannot be mounted",
        DAMAGED => "`walferry log verify` finds damage",
        NOT_STARTED => "a node does not start",
        _ => "nothing can be read",
    };
    Err(format!("{why} (exit code {code}): {}", output.trim()))
}
