//! The world that simulated nodes live in: their clocks, their background work, chance, and connections to each other.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::TcpStream;
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use walferry_engine::world::simulated::{TaskNo, World};
use walferry_engine::world::{Pace, Work};

use crate::network::Network;

/// Wall clocks begin here: 2026-01-01.
const WALL_EPOCH_S: u64 = 1_767_225_600;
/// Work that is not over after so many steps in a row is ended.
const FINISH_STEPS_MAX: usize = 100_000;
/// The most that two clocks may differ in rate, in millionths; the lease leaves a sixteenth unused.
pub const DRIFT_PPM_MAX: i64 = 20_000;

/// A node by number.
pub type NodeNo = usize;

/// One node's clocks.
#[derive(Clone, Copy, Debug, Default)]
pub struct Clock {
    /// How much faster than true time its monotonic clock runs.
    pub drift_ppm: i64,
    /// How far its wall clock is off.
    pub wall_offset_us: i64,
}

struct Job {
    node: NodeNo,
    /// Away while it runs.
    work: Option<Work>,
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
    chance: RefCell<fastrand::Rng>,
    /// Whose disk is full.
    full: RefCell<BTreeSet<NodeNo>>,
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
            chance: RefCell::new(fastrand::Rng::with_seed(seed)),
            full: RefCell::default(),
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

    /// One step of background work as its node; `None` when there is none of that number.
    pub fn run(&self, task: TaskNo) -> Option<Pace> {
        let (node, mut work) = {
            let mut jobs = self.jobs.borrow_mut();
            let job = jobs.get_mut(&task)?;
            (job.node, job.work.take()?)
        };
        let before = self.node.replace(node);
        let pace = work();
        self.node.set(before);
        let mut jobs = self.jobs.borrow_mut();
        if pace == Pace::Over {
            jobs.remove(&task);
        } else if let Some(job) = jobs.get_mut(&task) {
            job.work = Some(work);
        }
        Some(pace)
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

    fn wall_clock(&self) -> SystemTime {
        let offset = self.clocks.borrow()[self.node.get()].wall_offset_us;
        let us = (WALL_EPOCH_S * 1_000_000 + self.time_us.get()).saturating_add_signed(offset);
        UNIX_EPOCH + Duration::from_micros(us)
    }

    fn chance(&self) -> u64 {
        self.chance.borrow_mut().u64(..)
    }

    fn spawn(&self, _name: &str, work: Work) -> TaskNo {
        let number = self.last_job.get() + 1;
        self.last_job.set(number);
        self.jobs.borrow_mut().insert(number, Job { node: self.node.get(), work: Some(work) });
        self.started.borrow_mut().push(number);
        number
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
}
