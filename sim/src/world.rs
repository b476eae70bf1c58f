//! The world that simulated nodes live in: their clocks, their background work, random numbers, and connections to each other.

mod files;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};
use walferry_cluster::message::{FetchedFrames, Message, read_message};
use walferry_engine::lsn::Lsn;
use walferry_engine::world::simulated::{TaskNo, Undo, World};
use walferry_engine::world::{Blocking, Pace, Saving, Work};
use walferry_shipper::frame_server::{LogSnapshot, look_up};

use crate::network::Network;

use files::Armed;

pub use files::FileFault;

/// Wall clocks begin here: 2026-01-01.
const WALL_EPOCH_S: u64 = 1_767_225_600;
/// Work that is not over after so many steps in a row is ended.
const FINISH_STEPS_MAX: usize = 100_000;
/// The most that two clocks may differ in rate, in millionths; the lease leaves a sixteenth unused.
pub const DRIFT_PPM_MAX: i64 = 20_000;

/// A disk that misreads brings so much from elsewhere, at one read of so many.
const MISREAD_BYTES: usize = 4096;
const MISREAD_ONE_OF: u8 = 4;

/// How the names of the epoch history and its copy begin.
const HISTORY_FILE: &[u8] = b"epochs";

/// The stack of work that blocks.
const STACK_BYTES: usize = 256 << 10;

/// A node by number.
pub type NodeNo = usize;

/// One node's clocks.
#[derive(Clone, Copy, Debug, Default)]
pub struct Clock {
    /// How much faster than true time its monotonic clock runs.
    pub drift_ppm: i64,
    /// How far its wall clock is off.
    pub wall_offset_us: i64,
    /// How long its machine was suspended so far; the clock of the leases counts that, CLOCK_MONOTONIC does not.
    pub suspended_us: u64,
}

struct Job {
    node: NodeNo,
    name: String,
    /// Away while it runs.
    work: Option<Running>,
}

/// What background work is here.
enum Running {
    Steps(Work),
    /// It has a stack of its own and leaves it where it sleeps, for so long.
    Blocking(Coroutine<(), Duration, ()>),
}

impl Running {
    fn step(&mut self) -> Pace {
        match self {
            Running::Steps(work) => work(),
            Running::Blocking(work) => {
                let before = SLEEPER.take();
                let outcome = work.resume(());
                SLEEPER.set(before);
                match outcome {
                    CoroutineResult::Yield(time) => Pace::Idle(time),
                    CoroutineResult::Return(()) => Pace::Over,
                }
            }
        }
    }
}

thread_local! {
    /// Where the blocking work that runs now leaves its stack.
    static SLEEPER: Cell<Option<*const Yielder<(), Duration>>> = const { Cell::new(None) };
}

/// The world of one run.
pub struct SimWorld {
    /// What true time 0 is as an instant.
    origin: Instant,
    /// True time, microseconds.
    time_us: Cell<u64>,
    /// Whose code runs.
    node: Cell<NodeNo>,
    clocks: RefCell<Vec<Clock>>,
    jobs: RefCell<BTreeMap<TaskNo, Job>>,
    last_job: Cell<TaskNo>,
    /// Started since the last look.
    started: RefCell<Vec<TaskNo>>,
    /// Those that sleep until they are woken, and those that were woken since the last look.
    asleep: RefCell<BTreeSet<TaskNo>>,
    woken: RefCell<Vec<TaskNo>>,
    rng: RefCell<fastrand::Rng>,
    /// Whose disk is full.
    full: RefCell<BTreeSet<NodeNo>>,
    /// What the nodes that answer can send of their logs.
    frame_servers: RefCell<BTreeMap<NodeNo, LogSnapshot>>,
    /// Whose disk brings other sectors than it was asked for, where in the log at most, and how often it has.
    misreading: Cell<Option<(NodeNo, Lsn)>>,
    misreads: Cell<u64>,
    /// What of the files beside the logs is not durable: how to take it back, the oldest first.
    unsynced: RefCell<BTreeMap<(NodeNo, PathBuf), Vec<Undo>>>,
    /// Nothing that this node writes reaches its disk any more.
    crashed: Cell<Option<NodeNo>>,
    armed: RefCell<BTreeMap<NodeNo, Armed>>,
    /// Nodes that could not write a small file since they were started.
    failed: RefCell<BTreeSet<NodeNo>>,
    network: Rc<RefCell<Network>>,
}

impl SimWorld {
    pub fn new(seed: u64, clocks: Vec<Clock>, network: Rc<RefCell<Network>>) -> SimWorld {
        SimWorld {
            origin: Instant::now(),
            time_us: Cell::new(0),
            node: Cell::new(0),
            clocks: RefCell::new(clocks),
            jobs: RefCell::default(),
            last_job: Cell::new(0),
            started: RefCell::default(),
            asleep: RefCell::default(),
            woken: RefCell::default(),
            rng: RefCell::new(fastrand::Rng::with_seed(seed)),
            full: RefCell::default(),
            frame_servers: RefCell::default(),
            misreading: Cell::new(None),
            misreads: Cell::new(0),
            unsynced: RefCell::default(),
            crashed: Cell::new(None),
            armed: RefCell::default(),
            failed: RefCell::default(),
            network,
        }
    }

    pub fn set_time(&self, time_us: u64) {
        self.time_us.set(time_us);
    }

    /// From now on the code of this node runs.
    pub fn be(&self, node: NodeNo) {
        self.node.set(node);
    }

    /// The disk of a node is full from now on, or has space again.
    pub fn set_full(&self, node: NodeNo, full: bool) {
        let mut all = self.full.borrow_mut();
        if full {
            all.insert(node)
        } else {
            all.remove(&node)
        };
    }

    /// Who answers when a node asks for what it lost of its log.
    pub fn set_frame_servers(&self, frame_servers: BTreeMap<NodeNo, LogSnapshot>) {
        *self.frame_servers.borrow_mut() = frame_servers;
    }

    /// The disk of a node brings wrong sectors of its log before `until` from now on, or of none.
    pub fn set_misreading(&self, misreading: Option<(NodeNo, Lsn)>) {
        self.misreading.set(misreading);
    }

    /// Whether the node's disk may have brought wrong sectors.
    pub fn is_misreading(&self, node: NodeNo) -> bool {
        self.misreading.get().is_some_and(|(misreading, _)| misreading == node)
    }

    /// How often sectors were wrong.
    pub fn misreads(&self) -> u64 {
        self.misreads.get()
    }

    /// The machine of a node was suspended for so long, and goes on.
    pub fn resume(&self, node: NodeNo, suspended_us: u64) {
        self.clocks.borrow_mut()[node].suspended_us += suspended_us;
    }

    /// Whether this work writes checkpoints.
    pub fn is_checkpoint(&self, task: TaskNo) -> bool {
        self.jobs.borrow().get(&task).is_some_and(|job| job.name == "checkpoint")
    }

    pub fn jump_wall_clock(&self, node: NodeNo, by_us: i64) {
        self.clocks.borrow_mut()[node].wall_offset_us += by_us;
    }

    /// True time as the node's monotonic clock counts it.
    fn local_us(&self, node: NodeNo) -> u64 {
        let time = self.time_us.get();
        time.saturating_add_signed(time as i64 / 1000 * self.clocks.borrow()[node].drift_ppm / 1000)
    }

    /// How much true time passes while this node's clock counts `local`.
    pub fn true_us(&self, node: NodeNo, local: Duration) -> u64 {
        let local = local.as_micros().min(3_600_000_000) as i64;
        (local - local * self.clocks.borrow()[node].drift_ppm / 1_000_000 + 1).max(1) as u64
    }

    /// Background work that was started since the last call, and whose.
    pub fn take_started(&self) -> Vec<(NodeNo, TaskNo)> {
        let jobs = self.jobs.borrow();
        let started = std::mem::take(&mut *self.started.borrow_mut());
        started.into_iter().filter_map(|task| Some((jobs.get(&task)?.node, task))).collect()
    }

    /// Background work that was asleep and was woken since the last call, and whose.
    pub fn take_woken(&self) -> Vec<(NodeNo, TaskNo)> {
        let jobs = self.jobs.borrow();
        let woken = std::mem::take(&mut *self.woken.borrow_mut());
        woken.into_iter().filter_map(|task| Some((jobs.get(&task)?.node, task))).collect()
    }

    /// It is run again once it is woken, and not before.
    pub fn put_to_sleep(&self, task: TaskNo) {
        self.asleep.borrow_mut().insert(task);
    }

    /// One step of background work as its node; `None` when there is none of that number.
    pub fn run(&self, task: TaskNo) -> Option<Pace> {
        let (node, mut work) = {
            let mut jobs = self.jobs.borrow_mut();
            let job = jobs.get_mut(&task)?;
            (job.node, job.work.take()?)
        };
        let before = self.node.replace(node);
        let pace = work.step();
        self.node.set(before);
        let mut jobs = self.jobs.borrow_mut();
        if pace == Pace::Over {
            jobs.remove(&task);
        } else if let Some(job) = jobs.get_mut(&task) {
            job.work = Some(work);
        }
        Some(pace)
    }

    fn begin(&self, name: &str, work: Running) -> TaskNo {
        let number = self.last_job.get() + 1;
        self.last_job.set(number);
        self.jobs.borrow_mut().insert(number, Job { node: self.node.get(), name: name.to_owned(), work: Some(work) });
        self.started.borrow_mut().push(number);
        number
    }

    /// Whether this work may ask other nodes for their log.
    pub fn asks(&self, task: TaskNo) -> bool {
        self.jobs.borrow().get(&task).is_some_and(|job| job.name == "scrub")
    }

    /// The node is gone, and its background work with it.
    pub fn drop_jobs(&self, node: NodeNo) {
        let gone: Vec<Job> = {
            let mut jobs = self.jobs.borrow_mut();
            let numbers: Vec<TaskNo> = jobs.iter().filter(|(_, job)| job.node == node).map(|(no, _)| *no).collect();
            numbers.iter().filter_map(|number| jobs.remove(number)).collect()
        };
        drop(gone);
    }
}

impl World for SimWorld {
    fn now(&self) -> Instant {
        self.origin + Duration::from_micros(self.local_us(self.node.get()))
    }

    fn suspended(&self) -> Duration {
        Duration::from_micros(self.clocks.borrow()[self.node.get()].suspended_us)
    }

    fn wall_clock(&self) -> SystemTime {
        let offset = self.clocks.borrow()[self.node.get()].wall_offset_us;
        let us = (WALL_EPOCH_S * 1_000_000 + self.time_us.get()).saturating_add_signed(offset);
        UNIX_EPOCH + Duration::from_micros(us)
    }

    fn random(&self) -> u64 {
        self.rng.borrow_mut().u64(..)
    }

    fn spawn(&self, name: &str, work: Work) -> TaskNo {
        self.begin(name, Running::Steps(work))
    }

    fn spawn_blocking(&self, name: &str, work: Blocking) {
        let stack = DefaultStack::new(STACK_BYTES).expect("memory for a stack");
        let coroutine = Coroutine::with_stack(stack, |yielder: &Yielder<(), Duration>, ()| {
            SLEEPER.set(Some(std::ptr::from_ref(yielder)));
            work();
        });
        self.begin(name, Running::Blocking(coroutine));
    }

    fn sleep(&self, time: Duration) {
        let sleeper = SLEEPER.get().expect("only blocking work sleeps");
        let node = self.node.get();
        // SAFETY: it was set by the coroutine that runs now, whose yielder lives as long as its stack.
        unsafe { (*sleeper).suspend(time) };
        SLEEPER.set(Some(sleeper));
        self.node.set(node);
    }

    fn wake(&self, task: TaskNo) {
        if self.asleep.borrow_mut().remove(&task) {
            self.woken.borrow_mut().push(task);
        }
    }

    fn step(&self, task: TaskNo) {
        self.run(task);
    }

    fn finish(&self, task: TaskNo) {
        for _ in 0..FINISH_STEPS_MAX {
            match self.run(task) {
                Some(Pace::Again) => {}
                // Nobody will wake it any more.
                Some(Pace::Idle(_) | Pace::Asleep | Pace::Over) | None => break,
            }
        }
        let job = self.jobs.borrow_mut().remove(&task);
        drop(job);
    }

    fn has_space(&self) -> bool {
        !self.full.borrow().contains(&self.node.get())
    }

    fn connect(&self, address: &str) -> io::Result<TcpStream> {
        self.network.borrow_mut().connect(self.node.get(), address, self.time_us.get())
    }

    fn ask(&self, address: &str, mut question: &[u8]) -> io::Result<Vec<u8>> {
        let to = self.network.borrow().reach(self.node.get(), address)?;
        let frame_servers = self.frame_servers.borrow();
        let log = frame_servers.get(&to).ok_or(io::ErrorKind::TimedOut)?;
        let Ok(Message::FetchFrames(request)) = read_message(&mut question) else {
            panic!("a node asks for what is not simulated");
        };
        let mut answer = Vec::new();
        match look_up(&request, log) {
            Ok(frames) => {
                Message::FetchedFrames(FetchedFrames { from: request.from, bytes: frames.len() as u64 })
                    .encode(&mut answer);
                answer.extend_from_slice(&frames);
            }
            Err(refuse) => Message::Refuse(refuse).encode(&mut answer),
        }
        Ok(answer)
    }

    fn misread(&self, at: Lsn, bytes: &mut [u8]) {
        let Some((_, until)) = self.misreading.get().filter(|(node, _)| *node == self.node.get()) else { return };
        let sectors = bytes.len() / MISREAD_BYTES;
        let mut rng = self.rng.borrow_mut();
        if sectors < 2 || at.advance(bytes.len() as u64) > until || rng.u8(0..MISREAD_ONE_OF) > 0 {
            return;
        }
        let (from, to) = (rng.usize(0..sectors), rng.usize(0..sectors));
        bytes.copy_within(from * MISREAD_BYTES..(from + 1) * MISREAD_BYTES, to * MISREAD_BYTES);
        self.misreads.set(self.misreads.get() + 1);
    }

    fn writes(&self, path: &Path, undo: Undo) -> io::Result<()> {
        let node = self.node.get();
        if self.crashed.get() == Some(node) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.unsynced.borrow_mut().entry((node, path.to_owned())).or_default().push(undo);
        Ok(())
    }

    fn saves(&self, path: &Path, saving: Saving) -> io::Result<()> {
        let node = self.node.get();
        let broken = || io::Error::from_raw_os_error(libc::EIO);
        if self.crashed.get() == Some(node) {
            return Err(broken());
        }
        let mut all = self.armed.borrow_mut();
        let Some(armed) = all.get_mut(&node) else { return Ok(()) };
        let is_history = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(HISTORY_FILE));
        if armed.history_only && !is_history || saving != armed.at {
            return Ok(());
        }
        if armed.skips > 0 {
            armed.skips -= 1;
            return Ok(());
        }
        match armed.fault {
            FileFault::Down => self.crashed.set(Some(node)),
            FileFault::Broken => drop(self.failed.borrow_mut().insert(node)),
        }
        all.remove(&node);
        Err(broken())
    }

    fn synced(&self, path: &Path) {
        let node = self.node.get();
        if self.crashed.get() != Some(node) {
            self.unsynced.borrow_mut().remove(&(node, path.to_owned()));
        }
    }

    fn synced_names(&self, dir: &Path) {
        let node = self.node.get();
        if self.crashed.get() == Some(node) {
            return;
        }
        self.unsynced.borrow_mut().retain(|(of, path), changes| {
            if *of == node && path.parent() == Some(dir) {
                changes.retain(|change| !matches!(change, Undo::Name(..)));
            }
            !changes.is_empty()
        });
    }
}
