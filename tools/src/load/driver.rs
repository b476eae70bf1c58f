//! The event loop of one load thread: epoll over its connections, the schedule of an open-loop run, the intervals in
//! which statistics are handed over. All timing decisions of a run are here; what is sent stands in the sessions.
//!
//! Plain epoll, not a ring: with 64 connections tokio-uring 0.5 was measured at 0.80 of epoll's throughput against
//! the same server (its ring is itself awaited through epoll), a raw ring at 1.06; with one connection all three are
//! alike. Epoll also runs where io_uring is locked away, as in most containers that a load generator is started in.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::{Duration, Instant};

use super::connection::{Connection, Greeting, State};
use super::expr::Random;
use super::schedule::Schedule;
use super::session::Workload;
use super::stats::Stats;

/// Statistics are handed over once in so long.
pub const INTERVAL: Duration = Duration::from_secs(1);
/// The loop looks at the stop flag at least this often.
const WAKE_MS_MAX: u64 = 100;
/// All connections must stand within this time at the start.
const CONNECT_MS_MAX: u64 = 10_000;
/// How long the last transactions may take after the end of the run.
const DRAIN_MS_MAX: u64 = 5_000;
/// Events taken from epoll at once.
const EVENTS_MAX: usize = 256;

/// What a thread is to do.
pub struct Plan {
    /// Number of the thread.
    pub thread: usize,
    /// Sent on each new connection.
    pub greeting: Greeting,
    /// The thread's connections.
    pub connections: Vec<Connection>,
    /// Transactions a second of this thread, for an open-loop run, and the generator of its schedule.
    pub rate: Option<(f64, Random)>,
    /// How long to run; without it until every client has done its transactions.
    pub duration: Option<Duration>,
    /// For empty statistics.
    pub workload: Arc<Workload>,
    /// Set by Ctrl-C.
    pub stop: &'static AtomicBool,
}

/// What a thread tells.
pub enum Event {
    /// All connections stand.
    Connected,
    /// A connection cannot be opened at the start, or the loop cannot go on.
    Failed(String),
    /// What was counted in the thread's next interval.
    Interval(usize, Box<Stats>),
    /// No further interval will come; so many transactions never got an answer.
    Finished {
        /// The thread.
        thread: usize,
        /// Transactions that were given up.
        unfinished: u64,
    },
}

struct Loop {
    plan: Plan,
    epoll: OwnedFd,
    stats: Box<Stats>,
    /// Sleeping connections and those to be opened again.
    timers: BinaryHeap<Reverse<(Instant, usize)>>,
    idle: VecDeque<usize>,
    schedule: Option<Schedule>,
}

/// Runs a thread to its end. `start` brings the moment at which all threads begin.
pub fn run(plan: Plan, start: &Receiver<Instant>, events: &SyncSender<Event>) {
    let thread = plan.thread;
    // The receiver is gone only when the run was given up; then nobody wants to know.
    let tell = |event| events.send(event).is_ok();
    let mut state = match Loop::new(plan).and_then(|mut state| state.connect_all().map(|()| state)) {
        Ok(state) => state,
        Err(text) => {
            tell(Event::Failed(text));
            return;
        }
    };
    if !tell(Event::Connected) {
        return;
    }
    let Ok(start) = start.recv() else { return };
    match state.run(start, events) {
        Ok(unfinished) => {
            tell(Event::Interval(thread, state.stats));
            tell(Event::Finished { thread, unfinished });
        }
        Err(text) => {
            tell(Event::Failed(text));
        }
    }
}

impl Loop {
    fn new(plan: Plan) -> Result<Loop, String> {
        // SAFETY: plain system call; its result is checked and owned at once.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if fd < 0 {
            return Err(format!("cannot create an epoll: {}", std::io::Error::last_os_error()));
        }
        // SAFETY: `fd` is a new descriptor that nobody else owns.
        let epoll = unsafe { OwnedFd::from_raw_fd(fd) };
        let now = Instant::now();
        let timers = (0..plan.connections.len()).map(|index| Reverse((now, index))).collect();
        let stats = Box::new(plan.workload.empty_stats());
        Ok(Loop { plan, epoll, stats, timers, idle: VecDeque::new(), schedule: None })
    }

    /// Opens every connection; the first that cannot be opened ends the run.
    fn connect_all(&mut self) -> Result<(), String> {
        let deadline = Instant::now() + Duration::from_millis(CONNECT_MS_MAX);
        while self.idle.len() < self.plan.connections.len() {
            self.fire_timers(Instant::now());
            self.wait(Instant::now() + Duration::from_millis(WAKE_MS_MAX), false)?;
            if let Some(error) = self.plan.connections.iter_mut().find_map(|c| c.last_error.take()) {
                return Err(format!("cannot open {} connections: {error}", self.plan.connections.len()));
            }
            if self.plan.stop.load(Ordering::Relaxed) {
                return Err("interrupted while connecting".to_owned());
            }
            if Instant::now() > deadline {
                return Err(format!("no answer within {} s of connecting", CONNECT_MS_MAX / 1000));
            }
        }
        Ok(())
    }

    /// The run itself; returns how many transactions were given up.
    fn run(&mut self, start: Instant, events: &SyncSender<Event>) -> Result<u64, String> {
        // From the common start on: the time that connecting took is no backlog.
        self.schedule = self.plan.rate.take().map(|(rate, random)| Schedule::new(rate, start, random));
        if self.schedule.is_some() {
            // SAFETY: sets the calling thread's own timer slack; 50 us by default would be latency of ours.
            unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1_000) };
        }
        let end = self.plan.duration.map(|duration| start + duration);
        let mut next_interval = start + INTERVAL;
        let mut drain_until = None;
        loop {
            let now = Instant::now();
            if now >= next_interval {
                let full = std::mem::replace(&mut self.stats, Box::new(self.plan.workload.empty_stats()));
                if events.send(Event::Interval(self.plan.thread, full)).is_err() {
                    return Ok(0);
                }
                next_interval += INTERVAL;
            }
            let over = end.is_some_and(|end| now >= end) || self.plan.stop.load(Ordering::Relaxed) || self.is_used_up();
            if over {
                let busy = self.plan.connections.iter().filter(|c| c.is_busy()).count() as u64;
                let until = *drain_until.get_or_insert(now + Duration::from_millis(DRAIN_MS_MAX));
                if busy == 0 || now >= until {
                    return Ok(busy);
                }
            }
            self.fire_timers(now);
            if !over {
                self.begin_due(now);
            }
            let due = self.next_due(over).unwrap_or(next_interval);
            let until = due.min(next_interval).min(end.filter(|_| !over).unwrap_or(due));
            self.wait(until, !over)?;
        }
    }

    /// True if no client may start another transaction.
    fn is_used_up(&self) -> bool {
        self.plan.connections.iter().all(|c| c.left == Some(0))
    }

    fn fire_timers(&mut self, now: Instant) {
        while let Some(Reverse((at, index))) = self.timers.peek().copied() {
            if at > now {
                break;
            }
            self.timers.pop();
            let connection = &mut self.plan.connections[index];
            match connection.state() {
                State::Down(until) if until <= now => {
                    if let Some(fd) = connection.open(now) {
                        watch(&self.epoll, fd, index);
                    }
                }
                State::Sleeping(until) if until <= now => connection.wake(now, &mut self.stats),
                // A timer of an earlier state; the present state has its own.
                _ => continue,
            }
            self.finish_batch(index);
        }
    }

    /// Starts the transactions that are due, as long as clients are free.
    fn begin_due(&mut self, now: Instant) {
        while let Some(index) = self.idle.front().copied() {
            let connection = &mut self.plan.connections[index];
            // It may have been lost since it became idle.
            if connection.state() != State::Idle {
                self.idle.pop_front();
                continue;
            }
            let scheduled = match &mut self.schedule {
                Some(schedule) if schedule.due() > now => return,
                Some(schedule) => schedule.take(),
                None => now,
            };
            self.idle.pop_front();
            if self.schedule.is_some() {
                self.stats.lag.record(now.saturating_duration_since(scheduled));
            }
            connection.begin(scheduled, now, &mut self.stats);
            self.finish_batch(index);
        }
    }

    /// Notes what a connection waits for, after anything happened to it.
    fn finish_batch(&mut self, index: usize) {
        let connection = &self.plan.connections[index];
        match connection.state() {
            State::Idle if connection.left != Some(0) => self.idle.push_back(index),
            State::Down(at) | State::Sleeping(at) => self.timers.push(Reverse((at, index))),
            _ => {}
        }
    }

    fn next_due(&self, over: bool) -> Option<Instant> {
        let timer = self.timers.peek().map(|Reverse((at, _))| *at);
        let scheduled = self.schedule.as_ref().filter(|_| !over && !self.idle.is_empty()).map(Schedule::due);
        timer.into_iter().chain(scheduled).min()
    }

    /// Waits for sockets until a moment at most, serves those that are ready, and with `begin` gives each client that
    /// became free its next transaction at once.
    fn wait(&mut self, until: Instant, begin: bool) -> Result<(), String> {
        const EMPTY: libc::epoll_event = libc::epoll_event { events: 0, u64: 0 };
        let mut ready = [EMPTY; EVENTS_MAX];
        let pause = until.saturating_duration_since(Instant::now()).min(Duration::from_millis(WAKE_MS_MAX));
        let count =
            epoll_wait(&self.epoll, &mut ready, pause).map_err(|error| format!("cannot wait for sockets: {error}"))?;
        for event in &ready[..count] {
            let index = event.u64 as usize;
            let connection = &mut self.plan.connections[index];
            let before = connection.state();
            connection.ready(&self.plan.greeting, &mut self.stats);
            if connection.state() != before {
                self.finish_batch(index);
            }
            if begin {
                self.begin_due(Instant::now());
            }
        }
        Ok(())
    }
}

fn watch(epoll: &OwnedFd, fd: i32, index: usize) {
    let interest = libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLRDHUP | libc::EPOLLET;
    let mut event = libc::epoll_event { events: interest as u32, u64: index as u64 };
    // SAFETY: both descriptors are open and `event` lives through the call. It fails only for want of kernel memory;
    // the connection then never becomes ready and the run says so.
    unsafe { libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &mut event) };
}

/// epoll_wait with nanoseconds; with milliseconds on kernels before 5.11.
fn epoll_wait(epoll: &OwnedFd, ready: &mut [libc::epoll_event], pause: Duration) -> std::io::Result<usize> {
    let (fd, events, count) = (epoll.as_raw_fd(), ready.as_mut_ptr(), ready.len());
    let time = libc::timespec { tv_sec: pause.as_secs() as libc::time_t, tv_nsec: i64::from(pause.subsec_nanos()) };
    // SAFETY: `events` points to `count` writable entries and `time` lives through the call; no signal mask is given.
    let mut result = unsafe {
        libc::syscall(libc::SYS_epoll_pwait2, fd, events, count, &raw const time, std::ptr::null::<libc::sigset_t>(), 0)
    };
    if result < 0 && std::io::Error::last_os_error().raw_os_error() == Some(libc::ENOSYS) {
        let pause_ms = pause.as_micros().div_ceil(1000) as i32;
        // SAFETY: as above.
        result = i64::from(unsafe { libc::epoll_wait(fd, events, count as i32, pause_ms) });
    }
    match usize::try_from(result) {
        Ok(count) => Ok(count),
        Err(_) => match std::io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::EINTR) => Ok(0),
            error => Err(error),
        },
    }
}
