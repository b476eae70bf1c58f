//! The faults: what is done to a cluster, for how long, and how it is undone. Everything is done from outside of the nodes, with
//! the kernel's means (and libfaketime, which stands between a node and its clock); on hosts of others by the operator's commands.

use std::fs::OpenOptions;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::cluster::Cluster;
use super::fault::Fault;
use super::ground::true_time_s;
use super::member::Site;
use super::plan::Step;
use crate::client::{Client, Reply, Url};
use crate::failure::Failure;

/// A slow disk stands still for so long, and works for so long, in turn.
const FROZEN: Duration = Duration::from_millis(150);
const THAWED: Duration = Duration::from_millis(50);
/// What a full disk is filled with.
const BALLAST_FILE: &str = "ballast";
/// Ballast is laid down in pieces of this size until none fits.
const BALLAST_BYTES: libc::off_t = 1 << 20;

nix::ioctl_readwrite!(freeze, b'X', 119, libc::c_int);
nix::ioctl_readwrite!(thaw, b'X', 120, libc::c_int);

/// A clock that jumps is so far off, ahead and then behind.
const JUMP_S: i64 = 3600;
/// A node must show its new time within this time.
const JUMP_TIME_MAX: Duration = Duration::from_secs(5);
/// Between two looks at a node's clock.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// A fault that was injected.
pub struct Injected {
    /// Whom it concerns.
    pub name: String,
    /// What did not go as it was wanted, in a hurry.
    pub note: Option<String>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    ballast: Option<PathBuf>,
}

impl Fault {
    /// Does it, to `leader` or to one of its replicas.
    pub fn inject(self, cluster: &mut Cluster, leader: &str, step: &Step) -> Result<Injected, Failure> {
        let replicas = cluster.others(leader);
        let victim = if self.is_replicas() { &replicas[step.replica % replicas.len()] } else { leader };
        let mut injected = Injected {
            name: victim.to_owned(),
            note: None,
            stop: Arc::new(AtomicBool::new(false)),
            thread: None,
            ballast: None,
        };
        if self == Fault::Switchover {
            let asked =
                cluster.client(victim).and_then(|mut client| client.call(&["SWITCHOVER"]).map_err(Failure::failed));
            match asked {
                Err(error) if step.hurried => injected.note = Some(error.to_string()),
                asked => drop(asked?),
            }
            return Ok(injected);
        }
        let others = cluster.others(victim);
        let address = cluster.address(victim);
        let own = match &mut cluster.site {
            Site::Hosts(hooks) => {
                hooks.inject(self, victim)?;
                return Ok(injected);
            }
            Site::Own(own) => own,
        };
        match self {
            Fault::Switchover => unreachable!("done above"),
            Fault::Kill | Fault::DeadReplica => own.kill(victim),
            Fault::Stop => own.signal(victim, Signal::SIGSTOP),
            Fault::IsolateLeader | Fault::IsolateReplica => {
                for other in &others {
                    own.cut(victim, other);
                    own.cut(other, victim);
                }
            }
            Fault::CutLeaderInbound => others.iter().for_each(|other| own.cut(other, victim)),
            Fault::CutLeaderOutbound => others.iter().for_each(|other| own.cut(victim, other)),
            Fault::SlowLeader | Fault::SlowReplica => {
                let (mount, stopped) = (own.disk(victim), Arc::clone(&injected.stop));
                injected.thread = Some(std::thread::spawn(move || stall(&mount, &stopped)));
            }
            Fault::FullDisk => injected.ballast = Some(fill(&own.disk(victim))?),
            Fault::ClockJump => {
                let clock = own.clock(victim);
                clock.set_off(JUMP_S)?;
                wait_for_clock(address, JUMP_S)?;
                let (half, stopped) = (step.lasts / 2, Arc::clone(&injected.stop));
                injected.thread = Some(std::thread::spawn(move || {
                    let until = Instant::now() + half;
                    while Instant::now() < until && !stopped.load(Ordering::Relaxed) {
                        std::thread::sleep(LOOK_INTERVAL);
                    }
                    // The drill ends this with the true time; a file that cannot be written is found there.
                    let _ = clock.set_off(-JUMP_S);
                    while !stopped.load(Ordering::Relaxed) {
                        std::thread::sleep(LOOK_INTERVAL);
                    }
                }));
            }
        }
        Ok(injected)
    }

    /// Undoes it. What is to be said of it, if anything.
    pub fn heal(self, cluster: &mut Cluster, injected: Injected) -> Result<Option<String>, Failure> {
        injected.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = injected.thread {
            thread.join().map_err(|_| Failure::failed("the thread that does a fault panicked"))?;
        }
        if self == Fault::Switchover {
            return Ok(injected.note);
        }
        let own = match &mut cluster.site {
            Site::Hosts(hooks) => return hooks.heal(self, &injected.name).map(|()| injected.note),
            Site::Own(own) => own,
        };
        match self {
            Fault::Kill | Fault::DeadReplica => own.bring(&injected.name)?,
            Fault::Stop => own.signal(&injected.name, Signal::SIGCONT),
            Fault::ClockJump => own.clock(&injected.name).set_off(0)?,
            _ => own.ground.heal(),
        }
        if let Some(file) = injected.ballast {
            std::fs::remove_file(&file)
                .map_err(|error| Failure::failed(format_args!("{}: {error}", file.display())))?;
            // A node whose store cannot be written ends, and its service manager starts it again; one that only waited for log
            // goes on.
            if own.revive(&injected.name)? {
                return Ok(Some(format!("{} had ended and was started again", injected.name)));
            }
        }
        Ok(injected.note)
    }
}

/// Waits until a node's wall clock is about so far off; one that does not follow would make the drill a comedy.
fn wait_for_clock(address: SocketAddr, off_s: i64) -> Result<(), Failure> {
    let url: Url = format!("redis://{address}").parse().map_err(Failure::Failed)?;
    let mut client = Client::connect(&url).map_err(Failure::failed)?;
    let deadline = Instant::now() + JUMP_TIME_MAX;
    loop {
        let answer = client.call(&["TIME"]).map_err(Failure::failed)?;
        let told = answer.items().first().and_then(Reply::int).unwrap_or_default();
        if (told - true_time_s() - off_s).abs() < JUMP_S / 2 {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(Failure::failed(format_args!(
                "{address}: its clock does not follow libfaketime: it says {told}"
            )));
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
}

/// Freezes a filesystem again and again: every write to it waits meanwhile.
fn stall(mount: &std::path::Path, stopped: &AtomicBool) {
    let Ok(dir) = std::fs::File::open(mount) else { return };
    let mut unused = 0;
    while !stopped.load(Ordering::Relaxed) {
        // SAFETY: both take and return nothing; the descriptor is open. A filesystem that is frozen already stays so.
        let frozen = unsafe { freeze(dir.as_raw_fd(), &raw mut unused) };
        std::thread::sleep(FROZEN);
        if frozen.is_ok() {
            // SAFETY: as above.
            let _ = unsafe { thaw(dir.as_raw_fd(), &raw mut unused) };
        }
        std::thread::sleep(THAWED);
    }
}

/// Takes all the space that a filesystem has left.
fn fill(mount: &std::path::Path) -> Result<PathBuf, Failure> {
    let path = mount.join(BALLAST_FILE);
    let failed = |error: std::io::Error| Failure::failed(format_args!("{}: {error}", path.display()));
    let file = OpenOptions::new().create(true).write(true).truncate(true).open(&path).map_err(failed)?;
    let mut at = 0;
    // SAFETY: a plain system call on an open file.
    while unsafe { libc::fallocate(file.as_raw_fd(), 0, at, BALLAST_BYTES) } == 0 {
        at += BALLAST_BYTES;
    }
    Ok(path)
}
