//! What the system lets a drill do to members that it starts itself: networks, disks and clocks of their own. Makes them and
//! takes them down; knows no node and no fault but by what it needs.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::unistd::Uid;

use super::fault::Fault;
use crate::failure::Failure;
use crate::link::Star;

/// A disk of a node that has its own.
const DISK_BYTES: u64 = 1 << 30;
/// Where Linux distributions keep libfaketime; `{}` stands for the machine's triplet.
const FAKETIME_PATHS: [&str; 4] = [
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1",
    "/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1",
    "/usr/lib64/faketime/libfaketimeMT.so.1",
    "/usr/lib/faketime/libfaketimeMT.so.1",
];

/// What a drill needs beyond processes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Needs {
    /// A disk for each member.
    pub disks: bool,
    /// Wall clocks that can be set.
    pub clocks: bool,
}

/// What there is.
pub struct Ground {
    star: Option<Star>,
    disks: bool,
    faketime: Option<&'static str>,
}

fn is_root() -> bool {
    Uid::effective().is_root()
}

impl Ground {
    /// Networks for `members`, `rtt` apart, if that is possible; whatever else is needed and possible.
    pub fn find(members: usize, rtt: Option<Duration>, needs: Needs) -> Result<Ground, Failure> {
        let there = |path: &&str| Path::new(path).exists();
        let faketime = FAKETIME_PATHS.into_iter().find(there).filter(|_| needs.clocks);
        if !is_root() {
            return match rtt {
                None => Ok(Ground { star: None, disks: false, faketime }),
                Some(_) => Err(Failure::failed("--rtt: a network with a distance needs root")),
            };
        }
        match Star::start(members, rtt.unwrap_or_default()) {
            Ok(star) => Ok(Ground { star: Some(star), disks: needs.disks, faketime }),
            Err(error) if rtt.is_some() => Err(Failure::failed(format_args!("--rtt: {error}"))),
            Err(_) => Ok(Ground { star: None, disks: needs.disks, faketime }),
        }
    }

    /// Why a fault cannot be injected here.
    pub fn cannot(&self, fault: Fault) -> Option<&'static str> {
        if fault.needs_network() && self.star.is_none() {
            return Some("network namespaces and TUN devices need root and iproute2");
        }
        if fault.needs_disks() && !self.disks {
            return Some("loop devices and their mounts need root");
        }
        (fault.needs_clocks() && self.faketime.is_none()).then_some("libfaketime is not installed (package `faketime`)")
    }

    /// Members have disks of their own.
    pub fn has_disks(&self) -> bool {
        self.disks
    }

    /// The address of a member's host.
    pub fn host(&self, index: usize) -> String {
        match &self.star {
            Some(star) => star.address(index + 1).to_string(),
            // Loopback addresses of this process's own, so that ports may be the same everywhere.
            None => format!("127.{}.{}.{}", 1 + std::process::id() % 250, std::process::id() / 250 % 250, 1 + index),
        }
    }

    /// `program`, to be started in a member's network and by its clock.
    pub fn command(&self, index: usize, program: &Path, clock: &Clock) -> Command {
        let mut command = match &self.star {
            Some(star) => star.namespace(index + 1).command(program),
            None => Command::new(program),
        };
        if let Some(library) = self.faketime {
            // The monotonic clock and the timers stay true, as they do when an operator or NTP steps the time of a machine.
            command.env("LD_PRELOAD", library).env("FAKETIME_TIMESTAMP_FILE", &clock.file);
            command.env("FAKETIME_DONT_FAKE_MONOTONIC", "1").env("FAKETIME_NO_CACHE", "1");
        }
        command
    }

    /// Lets nothing pass from one member to another any more.
    pub fn cut(&self, from: usize, to: usize) {
        if let Some(star) = &self.star {
            star.cut(from + 1, to + 1, true);
        }
    }

    /// Every way is open again.
    pub fn heal(&self) {
        if let Some(star) = &self.star {
            star.heal();
        }
    }
}

/// A member's wall clock: how far it is off the true time stands in a file.
#[derive(Clone, Debug)]
pub struct Clock {
    file: PathBuf,
}

impl Clock {
    /// A true one.
    pub fn new(dir: &Path, name: &str) -> Result<Clock, Failure> {
        let clock = Clock { file: dir.join(format!("{name}.clock")) };
        clock.set_off(0)?;
        Ok(clock)
    }

    /// From now on it is so many seconds ahead.
    pub fn set_off(&self, seconds: i64) -> Result<(), Failure> {
        let failed = |error: std::io::Error| Failure::failed(format_args!("{}: {error}", self.file.display()));
        // Replaced as a whole: the node reads it at any moment.
        let next = self.file.with_extension("clock-next");
        std::fs::write(&next, format!("{seconds:+}\n")).map_err(failed)?;
        std::fs::rename(&next, &self.file).map_err(failed)
    }
}

/// Seconds since the Unix epoch by this process's clock.
pub fn true_time_s() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs() as i64)
}

/// A filesystem in a file.
pub struct Disk {
    /// Where it is mounted.
    pub mount: PathBuf,
    image: PathBuf,
}

fn tool(program: &str, arguments: &[&str]) -> Result<(), Failure> {
    let failed = |text: String| Failure::failed(format_args!("`{program} {}`: {text}", arguments.join(" ")));
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let output = output.map_err(|error| failed(error.to_string()))?;
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if output.status.success() { Ok(()) } else { Err(failed(said)) }
}

impl Disk {
    /// Makes one in `dir`, mounted at the node's own directory there.
    pub fn make(dir: &Path, name: &str) -> Result<Disk, Failure> {
        let disk = Disk { mount: dir.join(name), image: dir.join(format!("{name}.img")) };
        let failed = |error: std::io::Error| Failure::failed(format_args!("{}: {error}", disk.image.display()));
        std::fs::File::create(&disk.image).and_then(|file| file.set_len(DISK_BYTES)).map_err(failed)?;
        std::fs::create_dir_all(&disk.mount).map_err(failed)?;
        let (image, mount) = (disk.image.display().to_string(), disk.mount.display().to_string());
        tool("mkfs.ext4", &["-q", "-m", "0", &image])?;
        tool("mount", &["-o", "loop", &image, &mount])?;
        Ok(disk)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let mount = self.mount.display().to_string();
        // Lazily: a node that was killed may still be on its way out.
        let _ = tool("umount", &["-l", &mount]);
    }
}
