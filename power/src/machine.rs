//! A guest: boots it in QEMU's software emulation on a disk of this process, runs scripts in it, hears what its clients were
//! acknowledged, and cuts its power. Knows no test.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::disk::Disk;
use crate::error::{During, Failure};
use crate::guest::{ACKNOWLEDGED_PORT, AGENT_PORT};
use crate::kernel::Kernel;
use crate::node::Filesystem;
use crate::promise::Promises;

const QEMU: &str = "qemu-system-x86_64";
/// Packages that bring everything that is needed.
const PACKAGES: &str = "qemu-system-x86 busybox-static e2fsprogs xfsprogs kmod binutils";
const MEMORY_MIB: u32 = 1536;
/// A machine is up within this time, on a host that is busy otherwise.
const BOOT_TIME_MAX: Duration = Duration::from_secs(300);
/// Scripts must end within this time.
pub const SCRIPT_TIME_MAX: Duration = Duration::from_secs(600);
/// Lines of the console that are shown after a failure.
const CONSOLE_LINES_SHOWN: usize = 70;
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// How the disk is attached: decides how the guest's kernel makes a write durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Bus {
    /// virtio-blk: no FUA, so a durable write is a write and a flush
    Virtio,
    /// virtio-scsi with FUA: a durable write may be one command, which QEMU hands on as such from 10.1 on
    Scsi,
}

impl Bus {
    /// The disk's file in the guest.
    pub fn device(self) -> &'static str {
        match self {
            Bus::Virtio => "/dev/vda",
            Bus::Scsi => "/dev/sda",
        }
    }

    /// Prints whether the guest's kernel forces single writes (FUA), and how often it flushed the disk since it booted. Fewer
    /// flushes than the disk counts: QEMU before 10.1 makes a write and a flush of each forced write.
    pub fn flushes(self) -> String {
        let disk = self.device().trim_start_matches("/dev/");
        format!(
            "echo \"fua $(cat /sys/block/{disk}/queue/fua), $(awk '{{print $16}}' /sys/block/{disk}/stat) flushes of its own\""
        )
    }
}

/// Flags of every command that boots a machine.
#[derive(Debug, clap::Args)]
pub struct KitArgs {
    /// The binary [default: beside this one]
    #[arg(long, value_name = "PATH")]
    walferry: Option<PathBuf>,
    /// Where kernel, guest and failed images stand
    #[arg(long, value_name = "DIR", default_value = "target/power")]
    dir: PathBuf,
}

/// What every machine boots.
#[derive(Debug)]
pub struct Kit {
    kernel: PathBuf,
    initramfs: PathBuf,
    /// The binary, here.
    pub walferry: PathBuf,
    /// Where it stands, and where failed images go.
    pub dir: PathBuf,
}

fn find(program: &str) -> Result<PathBuf, Failure> {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let sbin = [PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")];
    let all = std::env::split_paths(&paths).chain(sbin);
    all.map(|path| path.join(program))
        .find(|path| path.is_file())
        .ok_or_else(|| Failure::Missing(format!("there is no {program}: `apt-get install {PACKAGES}`")))
}

impl Kit {
    /// Brings together kernel, tools and binaries; `more` programs stand in the guest where they stand here.
    pub fn prepare(args: &KitArgs, more: &[PathBuf]) -> Result<Kit, Failure> {
        for program in [QEMU, "mkfs.ext4", "mkfs.xfs", "depmod", "objcopy", "ldd"] {
            find(program)?;
        }
        let busybox = find("busybox")?;
        let beside = std::env::current_exe().during("find this program")?.with_file_name("walferry");
        let walferry = args.walferry.as_deref().unwrap_or(&beside);
        if !walferry.is_file() {
            let path = walferry.display();
            return Err(Failure::Missing(format!(
                "there is no {path}: `cargo build --release`, or name it with --walferry"
            )));
        }
        let dir = &args.dir;
        std::fs::create_dir_all(dir).during(format_args!("make --dir {}", dir.display()))?;
        // Tools run in it.
        let dir = &dir.canonicalize().during(format_args!("find --dir {}", dir.display()))?;
        let kernel = Kernel::find(dir)?;
        let initramfs = crate::initramfs::build(dir, &busybox, walferry, more, &kernel.modules)?;
        let walferry = walferry.canonicalize().during("find the binary")?;
        Ok(Kit { kernel: kernel.image, initramfs, walferry, dir: dir.to_owned() })
    }
}

/// A machine that runs.
pub struct Machine {
    qemu: Child,
    agent: UnixStream,
    acknowledged: Option<JoinHandle<Result<(), String>>>,
    console: PathBuf,
    /// How long it took to boot.
    pub booted_in: Duration,
    _sockets: tempfile::TempDir,
}

impl Machine {
    /// Boots on `disk`; what its writers are acknowledged goes to `promises`.
    pub fn boot(
        kit: &Kit,
        disk: &Disk,
        filesystem: Filesystem,
        bus: Bus,
        promises: &Arc<Mutex<Promises>>,
    ) -> Result<Machine, Failure> {
        let started = Instant::now();
        let sockets = tempfile::tempdir().during("make a directory for sockets")?;
        let at = |name: &str| sockets.path().join(name);
        disk.serve(&at("disk")).during("serve the disk")?;
        let agent = listen(&at("agent"))?;
        let acknowledged = listen(&at("acknowledged"))?;
        let console = at("console");
        let mut command = Command::new(QEMU);
        command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-machine", "q35"]);
        command.args(["-accel", "tcg", "-cpu", "max,la57=off", "-smp", "1", "-m", &MEMORY_MIB.to_string()]);
        command.arg("-kernel").arg(&kit.kernel).arg("-initrd").arg(&kit.initramfs);
        let filesystem = filesystem.name();
        // On a busy host the emulated timer is late, and the kernel would take it for broken.
        let line =
            format!("console=ttyS0 quiet panic=-1 rdinit=/init mitigations=off no_timer_check filesystem={filesystem}");
        command.args(["-append", &line]);
        command.arg("-serial").arg(format!("file:{}", console.display()));
        command
            .arg("-blockdev")
            .arg(format!("driver=nbd,node-name=disk,server.type=unix,server.path={}", at("disk").display()));
        command.args(match bus {
            Bus::Virtio => &["-device", "virtio-blk-pci,drive=disk,werror=report,rerror=report"][..],
            Bus::Scsi => {
                &["-device", "virtio-scsi-pci", "-device", "scsi-hd,drive=disk,dpofua=on,werror=report,rerror=report"]
            }
        });
        command.args(["-device", "virtio-serial-pci"]);
        for (port, name) in [(AGENT_PORT, "agent"), (ACKNOWLEDGED_PORT, "acknowledged")] {
            command.arg("-chardev").arg(format!("socket,id={name},path={}", at(name).display()));
            command.arg("-device").arg(format!("virtserialport,chardev={name},nr={port},name={name}"));
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(File::create(at("qemu")).during("make QEMU's log")?).process_group(0);
        // SAFETY: prctl is a plain system call, fit for the moment between fork and exec.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        let mut qemu = command.spawn().during(format_args!("start {QEMU}"))?;
        let connected = accept(&agent, &mut qemu).and_then(|agent| Ok((agent, accept(&acknowledged, &mut qemu)?)));
        let (agent, acknowledged) = connected.map_err(|error| {
            let _ = qemu.kill();
            let _ = qemu.wait();
            let said = std::fs::read_to_string(at("qemu")).unwrap_or_default();
            Failure::failed(format_args!("{error}: {}", said.trim()))
        })?;
        let (disk, promises) = (disk.clone(), Arc::clone(promises));
        let acknowledged = std::thread::spawn(move || hear(acknowledged, &disk, &promises));
        let acknowledged = Some(acknowledged);
        let mut machine = Machine { qemu, agent, acknowledged, console, booted_in: Duration::ZERO, _sockets: sockets };
        machine.ask("true", BOOT_TIME_MAX)?;
        machine.booted_in = started.elapsed();
        Ok(machine)
    }

    /// Runs a shell script in the guest; its exit code and what it printed.
    pub fn ask(&mut self, script: &str, time_max: Duration) -> Result<(i32, String), Failure> {
        let asked = self.exchange(script, time_max);
        asked.map_err(|error| {
            let console = std::fs::read_to_string(&self.console).unwrap_or_default();
            let lines: Vec<&str> = console.lines().collect();
            let end = lines[lines.len().saturating_sub(CONSOLE_LINES_SHOWN)..].join("\n");
            Failure::failed(format_args!("the guest does not answer ({error}) to `{script}`; its console:\n{end}"))
        })
    }

    fn exchange(&mut self, script: &str, time_max: Duration) -> std::io::Result<(i32, String)> {
        self.agent.set_read_timeout(Some(time_max))?;
        self.agent.write_all(&[&(script.len() as u32).to_le_bytes(), script.as_bytes()].concat())?;
        let mut head = [0; 8];
        self.agent.read_exact(&mut head)?;
        let [code, length] = [0, 4].map(|at| <[u8; 4]>::try_from(&head[at..at + 4]).expect("four bytes"));
        let mut output = vec![0; u32::from_le_bytes(length) as usize];
        self.agent.read_exact(&mut output)?;
        Ok((i32::from_le_bytes(code), String::from_utf8_lossy(&output).into_owned()))
    }

    /// Runs a script that has to succeed.
    pub fn run(&mut self, script: &str) -> Result<String, Failure> {
        match self.ask(script, SCRIPT_TIME_MAX)? {
            (0, output) => Ok(output),
            (code, output) => {
                Err(Failure::failed(format_args!("in the guest, `{script}`: exit code {code}\n{output}")))
            }
        }
    }

    /// Cuts the power, and waits until the last acknowledgement that left the machine is noted.
    pub fn cut(mut self) -> Result<(), Failure> {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        match self.acknowledged.take().map(JoinHandle::join) {
            Some(Ok(heard)) => heard.map_err(Failure::Failed),
            _ => Ok(()),
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

fn listen(path: &Path) -> Result<UnixListener, Failure> {
    let listener = UnixListener::bind(path).during(format_args!("listen at {}", path.display()))?;
    listener.set_nonblocking(true).during("listen")?;
    Ok(listener)
}

fn accept(listener: &UnixListener, qemu: &mut Child) -> Result<UnixStream, Failure> {
    let deadline = Instant::now() + BOOT_TIME_MAX;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).during("use a socket")?;
                return Ok(stream);
            }
            Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => return Err(Failure::failed(error)),
            Err(_) => {}
        }
        if let Some(status) = qemu.try_wait().during(format_args!("wait for {QEMU}"))? {
            return Err(Failure::failed(format_args!("{QEMU} ended with {status}")));
        }
        if Instant::now() >= deadline {
            return Err(Failure::failed(format_args!("{QEMU} does not connect")));
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// Notes each line `writer value`, stamped after everything that the disk had answered when it came.
fn hear(stream: UnixStream, disk: &Disk, promises: &Mutex<Promises>) -> Result<(), String> {
    let mut lines = BufReader::new(stream);
    let mut line = String::new();
    while lines.read_line(&mut line).is_ok_and(|length| length > 0) && line.ends_with('\n') {
        let mut numbers = line.split_whitespace().map(|number| number.parse::<u64>().ok());
        let (Some(Some(writer)), Some(Some(value))) = (numbers.next(), numbers.next()) else {
            return Err(format!("a writer told nonsense: {line:?}"));
        };
        let at = disk.state().stamp();
        promises.lock().expect("the promises' lock").acknowledge(writer as usize, value, at)?;
        line.clear();
    }
    Ok(())
}
