//! What a node takes from its machine beside disk and sockets: time, random numbers, and work in the background. In production these
//! are the system's clocks and threads. With the feature `simulation` a thread can put a world of its own in their place: then
//! nothing that runs on it reads a real clock or starts a real thread, and the same seed gives the same run (FoundationDB's
//! way). The ring has its counterpart in `ring`.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, RecvError, TryRecvError};
use std::time::{Duration, Instant, SystemTime};

use crate::lsn::Lsn;
#[cfg(feature = "simulation")]
use crate::mutants;

/// What a step of background work says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// There is more to do.
    Again,
    /// Nothing to do for so long, or until it is woken.
    Idle(Duration),
    /// Nothing to do until it is woken.
    Asleep,
    /// The work is finished; do not call it again.
    Over,
}

/// Work in the background: called again and again until it is over. A step may block, but not where the world is simulated.
pub type Work = Box<dyn FnMut() -> Pace + Send>;

/// Work that blocks, and ends by itself.
pub type Blocking = Box<dyn FnOnce() + Send>;

/// A simulated socket that was not ready is looked at again after this.
const SIMULATED_SOCKET_INTERVAL: Duration = Duration::from_micros(300);

/// Background work that was started.
#[derive(Debug)]
pub struct Task(Kind);

#[derive(Debug)]
enum Kind {
    Thread(std::thread::JoinHandle<()>),
    #[cfg(feature = "simulation")]
    Simulated(simulated::TaskNo),
}

/// Starts background work, on a thread of its own.
pub fn spawn(name: &str, mut work: Work) -> io::Result<Task> {
    #[cfg(feature = "simulation")]
    if let Some(world) = simulated::world() {
        return Ok(Task(Kind::Simulated(world.spawn(name, work))));
    }
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        loop {
            match work() {
                Pace::Again => {}
                Pace::Idle(time) => std::thread::park_timeout(time),
                Pace::Asleep => std::thread::park(),
                Pace::Over => return,
            }
        }
    })?;
    Ok(Task(Kind::Thread(thread)))
}

/// Starts work that blocks, on a thread of its own: it sleeps with [`sleep`], and asks its sockets with [`retry_until`].
pub fn spawn_blocking(name: &str, work: Blocking) -> io::Result<()> {
    #[cfg(feature = "simulation")]
    if let Some(world) = simulated::world() {
        world.spawn_blocking(name, work);
        return Ok(());
    }
    std::thread::Builder::new().name(name.to_owned()).spawn(work).map(drop)
}

/// Sleeps, in work that may block.
pub fn sleep(time: Duration) {
    #[cfg(feature = "simulation")]
    if let Some(world) = simulated::world() {
        return world.sleep(time);
    }
    std::thread::sleep(time);
}

/// An operation on a blocking socket with this timeout, in work that may block: the sockets of a simulated world never wait, so
/// there it is tried again until then.
pub fn retry_until<T>(timeout: Duration, mut operation: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    if !is_simulated() {
        return operation();
    }
    let until = now() + timeout;
    loop {
        match operation() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && now() < until => {
                sleep(SIMULATED_SOCKET_INTERVAL)
            }
            outcome => return outcome,
        }
    }
}

impl Task {
    /// There is something to do. What the caller published before is visible to the work.
    pub fn wake(&self) {
        match &self.0 {
            Kind::Thread(thread) => thread.thread().unpark(),
            #[cfg(feature = "simulation")]
            Kind::Simulated(task) => {
                if let Some(world) = simulated::world() {
                    world.wake(*task);
                }
            }
        }
    }

    /// Waits until the work is over; it panicked only if what it called did.
    pub fn join(self) {
        match self.0 {
            Kind::Thread(thread) => drop(thread.join()),
            #[cfg(feature = "simulation")]
            Kind::Simulated(task) => {
                if let Some(world) = simulated::world() {
                    world.finish(task);
                }
            }
        }
    }

    /// The next of what the work sends.
    pub fn receive<T>(&self, results: &Receiver<T>) -> Result<T, RecvError> {
        match &self.0 {
            Kind::Thread(_) => results.recv(),
            #[cfg(feature = "simulation")]
            Kind::Simulated(task) => loop {
                match results.try_recv() {
                    Ok(result) => return Ok(result),
                    Err(TryRecvError::Disconnected) => return Err(RecvError),
                    Err(TryRecvError::Empty) => simulated::world().expect("its own world").step(*task),
                }
            },
        }
    }

    /// Lets the work go on by one step where nobody else would: a caller that waits for it on a condition of its own.
    pub fn poke(&self) {
        #[cfg(feature = "simulation")]
        if let Kind::Simulated(task) = &self.0 {
            simulated::world().expect("its own world").step(*task);
        }
    }
}

/// What background work finds in its inbox.
#[derive(Debug)]
pub enum Inbox<T> {
    /// Something to do.
    Item(T),
    /// No message has arrived yet.
    Empty,
    /// The sender is gone: no message will arrive.
    Closed,
}

/// The next item of an inbox of background work. Waits for it, but not where the world is simulated: whoever puts something in calls
/// [`Task::wake`] too.
pub fn take<T>(inbox: &Receiver<T>) -> Inbox<T> {
    if is_simulated() {
        return match inbox.try_recv() {
            Ok(item) => Inbox::Item(item),
            Err(TryRecvError::Empty) => Inbox::Empty,
            Err(TryRecvError::Disconnected) => Inbox::Closed,
        };
    }
    inbox.recv().map_or(Inbox::Closed, Inbox::Item)
}

/// True on a thread that has a world of its own.
pub fn is_simulated() -> bool {
    #[cfg(feature = "simulation")]
    return simulated::world().is_some();
    #[cfg(not(feature = "simulation"))]
    return false;
}

/// The clock by which leases, grants, timeouts and the age of a replica's state are measured: it never goes back, and it goes on
/// while the machine is suspended (CLOCK_BOOTTIME). `Instant::now` reads CLOCK_MONOTONIC, which stands still meanwhile: a leader
/// whose machine was suspended would hold its lease for as long after it as it was suspended. Instants of the two clocks must not
/// be compared. No clock sees that the hypervisor stopped the processors of a virtual machine and its clocks with them
/// (docs/design/failover.md, "Suspended processes").
pub fn now() -> Instant {
    #[cfg(feature = "simulation")]
    if let Some(world) = simulated::world() {
        let now = world.now();
        if mutants::is_on("monotonic-lease-clock") {
            return now.checked_sub(world.suspended()).expect("a node is suspended for less time than has passed");
        }
        return now;
    }
    static ORIGIN: OnceLock<(Instant, Duration)> = OnceLock::new();
    let (origin, at) = *ORIGIN.get_or_init(|| (Instant::now(), since_boot()));
    origin + since_boot().saturating_sub(at)
}

/// CLOCK_BOOTTIME: 30 ns by the vDSO, as CLOCK_MONOTONIC.
fn since_boot() -> Duration {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
    time.expect("Linux has CLOCK_BOOTTIME since 2.6.39, io_uring since 5.1").into()
}

/// The wall clock.
pub fn wall_clock() -> SystemTime {
    #[cfg(feature = "simulation")]
    if let Some(world) = simulated::world() {
        return world.wall_clock();
    }
    SystemTime::now()
}

/// A random number without the quality that secrets need: the seed that the standard library gives each hash map.
pub fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    #[cfg(feature = "simulation")]
    if let Some(world) = simulated::world() {
        return world.random();
    }
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}

/// True where the world is simulated and its disk is full.
pub fn is_out_of_space() -> bool {
    #[cfg(feature = "simulation")]
    if let Some(world) = simulated::world() {
        return !world.has_space();
    }
    false
}

/// A connection to `address`, where the world is simulated; `None` where it is the real one.
pub fn simulated_connection(address: &str) -> Option<io::Result<std::net::TcpStream>> {
    #[cfg(feature = "simulation")]
    if let Some(world) = simulated::world() {
        return Some(world.connect(address));
    }
    let _ = address;
    None
}

/// What the node at `address` answers to `question`, where the world is simulated; `None` where it is to be asked over a socket.
pub fn simulated_answer(address: &str, question: &[u8]) -> Option<io::Result<Vec<u8>>> {
    #[cfg(feature = "simulation")]
    if let Some(world) = simulated::world() {
        return Some(world.ask(address, question));
    }
    let _ = (address, question);
    None
}

/// What was read of the log at `at`: a simulated disk may bring another part of the file in its place.
#[inline]
pub fn misread(at: Lsn, bytes: &mut [u8]) {
    #[cfg(feature = "simulation")]
    if let Some(world) = simulated::world() {
        world.misread(at, bytes);
    }
    let _ = (at, bytes);
}

/// Bytes of a file beside the log, open for reading too, are about to be replaced: until `synced`, a crash of a simulated machine may
/// bring them back.
#[inline]
pub fn replaces(path: &Path, file: &File, offset: u64, bytes: usize) -> io::Result<()> {
    #[cfg(feature = "simulation")]
    if let Some(world) = simulated::world() {
        // What is not there yet is zeros.
        let mut before = vec![0; bytes];
        std::os::unix::fs::FileExt::read_at(file, &mut before, offset)?;
        return world.writes(path, simulated::Undo::Bytes(offset, before));
    }
    let _ = (path, file, offset, bytes);
    Ok(())
}

/// How far a small file has come that takes the place of an older one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Saving {
    /// Before the new file exists.
    Begins,
    /// It has its name, which a power cut may take back.
    Named,
    /// The new file has replaced the old one, durably.
    Done,
}

/// A small file takes the place of the one at `path`: where the world is simulated its machine may go down here, or its disk fail.
#[inline]
pub fn saves(path: &Path, saving: Saving) -> io::Result<()> {
    #[cfg(feature = "simulation")]
    if let Some(world) = simulated::world() {
        return world.saves(path, saving);
    }
    let _ = (path, saving);
    Ok(())
}

/// `from` is about to be renamed to `to`: until the names in its directory are durable, a crash of a simulated machine may take
/// that back.
#[inline]
pub fn renames(from: &Path, to: &Path) -> io::Result<()> {
    #[cfg(feature = "simulation")]
    if let Some(world) = simulated::world() {
        let before = match std::fs::read(to) {
            Ok(bytes) => Some(bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        return world.writes(to, simulated::Undo::Name(from.to_owned(), before));
    }
    let _ = (from, to);
    Ok(())
}

/// The names in the directory are durable.
#[inline]
pub fn synced_names(dir: &Path) {
    #[cfg(feature = "simulation")]
    if let Some(world) = simulated::world() {
        world.synced_names(dir);
    }
    let _ = dir;
}

/// What was written to the file is durable.
#[inline]
pub fn synced(path: &Path) {
    #[cfg(feature = "simulation")]
    if let Some(world) = simulated::world() {
        world.synced(path);
    }
    let _ = path;
}

/// A world in place of the system's.
#[cfg(feature = "simulation")]
pub mod simulated {
    use std::cell::RefCell;
    use std::io;
    use std::path::{Path, PathBuf};
    use std::rc::Rc;
    use std::time::{Duration, Instant, SystemTime};

    use super::{Blocking, Saving, Work};
    use crate::lsn::Lsn;

    /// Background work by number.
    pub type TaskNo = u64;

    /// What a simulation gives the nodes that run on its thread.
    pub trait World {
        /// The clock of the node that runs now; it goes on while the node's machine is suspended.
        fn now(&self) -> Instant;
        /// How long its machine was suspended so far: by so much its monotonic clock is behind `now`.
        fn suspended(&self) -> Duration {
            Duration::ZERO
        }
        /// Its wall clock.
        fn wall_clock(&self) -> SystemTime;
        /// A random number.
        fn random(&self) -> u64;
        /// Takes background work.
        fn spawn(&self, name: &str, work: Work) -> TaskNo;
        /// Takes work that blocks.
        fn spawn_blocking(&self, name: &str, work: Blocking);
        /// Lets this much time pass for work that blocks, which is what runs.
        fn sleep(&self, time: Duration);
        /// Background work that is asleep goes on.
        fn wake(&self, task: TaskNo);
        /// One step of background work, now.
        fn step(&self, task: TaskNo);
        /// All its steps, now; one that would go on for ever is ended.
        fn finish(&self, task: TaskNo);
        /// Whether its disk takes another segment.
        fn has_space(&self) -> bool;
        /// A connection.
        fn connect(&self, address: &str) -> io::Result<std::net::TcpStream>;
        /// A question to another node, and its answer.
        fn ask(&self, address: &str, question: &[u8]) -> io::Result<Vec<u8>>;
        /// The disk has read this of the log.
        fn misread(&self, at: Lsn, bytes: &mut [u8]);
        /// A file beside the log is about to change; an error when its node is going down. Until `synced` a crash may take any
        /// part of the change back.
        fn writes(&self, path: &Path, undo: Undo) -> io::Result<()>;
        /// A small file is replaced whole; an error when its node goes down there, or its disk fails.
        fn saves(&self, path: &Path, saving: Saving) -> io::Result<()>;
        /// What was written to the file is durable.
        fn synced(&self, path: &Path);
        /// The names of the files in the directory are durable.
        fn synced_names(&self, dir: &Path);
    }

    /// How a change of a file is taken back.
    pub enum Undo {
        /// These bytes stood at this offset.
        Bytes(u64, Vec<u8>),
        /// Give the file back the length that it had.
        Length(u64),
        /// It had this name, and its name now was that of a file with these bytes, or of none.
        Name(PathBuf, Option<Vec<u8>>),
    }

    thread_local! {
        static WORLD: RefCell<Option<Rc<dyn World>>> = const { RefCell::new(None) };
    }

    /// This thread lives in `world` from now on; `None` gives it back to the real one.
    pub fn enter(world: Option<Rc<dyn World>>) {
        WORLD.with(|current| *current.borrow_mut() = world);
    }

    /// The world of this thread.
    pub fn world() -> Option<Rc<dyn World>> {
        WORLD.with(|current| current.borrow().clone())
    }
}
