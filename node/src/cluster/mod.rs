//! A member's part in its cluster, on a thread of its own, which drives the member agent. It shares nothing
//! with the node's ring thread but what stands here, so that no flush and no full queue is ever waited for.
//!
//! ```text
//! ring thread (node)                     cluster thread (driver)                    other members
//!   orders  <── lead, follow, fence ─────  Agent (walferry_cluster)  <── wire ──>  the same
//!   reports ──> in sync, unfit, commands ─>  Register (openraft)
//!   lease   <── until when it may speak ─
//! ```

mod driver;
mod wire;
pub mod witness;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub use walferry_cluster::agent::Command;
use walferry_cluster::agent::{self, AgentConfig};
use walferry_cluster::consensus::RegisterStore;
use walferry_cluster::member::Caller;
use walferry_cluster::register::MemberId;
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_engine::waker::Waker;
use walferry_engine::world;

use crate::error::DaemonError;
use crate::tls::Tls;

/// How a member takes part.
#[derive(Clone, Debug)]
pub struct ClusterConfig {
    /// What its agent goes by.
    pub agent: AgentConfig,
    /// How its links are protected.
    pub tls: Tls,
}

/// What the cluster thread tells the node to do.
#[derive(Debug)]
pub enum Order {
    /// What the agent says.
    Agent(agent::Order),
    /// This incarnation of the member is over, and the next one knows no register yet; its id, and what it has promised.
    BeginAnew(MemberId, Epoch),
    /// A replica connected.
    Connection(OwnedFd, Caller),
    /// The member can take no part any more, for this reason: its process ends, and its next start finds out what its disk has.
    End(String),
}

/// What the node tells the cluster thread.
#[derive(Debug)]
pub enum Report {
    /// For the agent.
    Agent(agent::Report),
    /// An operator's command; the answer goes to its client.
    Command(Command, Reply),
}

/// Where the answer to a command goes: to be looked at when the node was woken.
pub type Reply = Arc<Mutex<Option<Result<String, String>>>>;

/// Until when the leader may speak, shared by both threads.
#[derive(Debug)]
pub struct LeaseUntil {
    origin: Instant,
    /// Microseconds from `origin`; 0 for none.
    until_us: AtomicU64,
}

impl LeaseUntil {
    fn new() -> LeaseUntil {
        LeaseUntil { origin: world::now(), until_us: AtomicU64::new(0) }
    }

    fn set(&self, until: Option<Instant>) {
        let us = until.map_or(0, |until| until.saturating_duration_since(self.origin).as_micros() as u64);
        self.until_us.store(us, Ordering::Release);
    }

    /// When it ends, or ended; `None` for none.
    pub fn until(&self) -> Option<Instant> {
        let us = self.until_us.load(Ordering::Acquire);
        (us > 0).then(|| self.origin + Duration::from_micros(us))
    }

    /// True while the leader may speak.
    pub fn holds(&self, now: Instant) -> bool {
        self.until().is_some_and(|until| now < until)
    }
}

/// What both threads see.
#[derive(Debug)]
pub struct Shared {
    /// The leader's lease.
    pub lease: LeaseUntil,
    /// The end of the node's log, for heartbeats.
    pub end: AtomicU64,
    /// When the ring thread turned last, microseconds from `lease.origin`.
    turned_us: AtomicU64,
    /// Why nobody leads, or what the cluster thread waits for; empty when all is well.
    pub blocked_reason: Mutex<String>,
}

impl Shared {
    /// The ring thread turns; its log ends here.
    pub fn turned(&self, now: Instant, end: Lsn) {
        self.end.store(end.0, Ordering::Relaxed);
        let us = now.saturating_duration_since(self.lease.origin).as_micros() as u64;
        self.turned_us.store(us, Ordering::Relaxed);
    }

    /// True when the ring thread has not turned for longer than this.
    fn is_stuck(&self, time_max: Duration) -> bool {
        let turned = Duration::from_micros(self.turned_us.load(Ordering::Relaxed));
        world::now().saturating_duration_since(self.lease.origin).saturating_sub(turned) > time_max
    }
}

/// The node's end of the cluster thread.
pub struct Cluster {
    /// What both threads see.
    pub shared: Arc<Shared>,
    orders: mpsc::Receiver<Order>,
    reports: tokio::sync::mpsc::UnboundedSender<Report>,
    thread: Option<JoinHandle<()>>,
}

/// The other end of a [`Cluster`]: who orders the node about, and hears its reports.
pub struct Control {
    node: driver::NodeEnd,
    reports: tokio::sync::mpsc::UnboundedReceiver<Report>,
}

#[cfg(feature = "simulation")]
impl Control {
    /// Tells the node what to do.
    pub fn order(&self, order: Order) {
        self.node.order(order);
    }

    /// What the node has reported.
    pub fn next_report(&mut self) -> Option<Report> {
        self.reports.try_recv().ok()
    }

    /// Whether the node has reported something.
    pub fn has_reports(&self) -> bool {
        !self.reports.is_empty()
    }

    /// Until when the node may speak as a leader.
    pub fn set_lease(&self, until: Option<Instant>) {
        self.node.shared.lease.set(until);
    }

    /// The end of the node's log at its last turn.
    pub fn log_end(&self) -> Lsn {
        Lsn(self.node.shared.end.load(Ordering::Relaxed))
    }
}

impl Cluster {
    /// Both ends, without a thread between them.
    pub fn pair(waker: Waker) -> (Cluster, Control) {
        let shared = Arc::new(Shared {
            lease: LeaseUntil::new(),
            end: AtomicU64::new(0),
            turned_us: AtomicU64::new(0),
            blocked_reason: Mutex::new(String::new()),
        });
        let (order_sender, orders) = mpsc::channel();
        let (reports, report_inbox) = tokio::sync::mpsc::unbounded_channel();
        let node = driver::NodeEnd { orders: order_sender, waker, shared: Arc::clone(&shared) };
        (Cluster { shared, orders, reports, thread: None }, Control { node, reports: report_inbox })
    }

    /// Starts the thread, which listens to peers at `listener`.
    pub fn start(
        config: ClusterConfig,
        store: RegisterStore,
        listener: std::net::TcpListener,
        waker: Waker,
    ) -> Result<Cluster, DaemonError> {
        let (mut cluster, control) = Cluster::pair(waker);
        cluster.thread = Some(driver::spawn(config, store, listener, Some(control.node), control.reports)?);
        Ok(cluster)
    }

    /// The next order, if there is one.
    pub fn next_order(&self) -> Option<Order> {
        self.orders.try_recv().ok()
    }

    /// Tells the cluster thread.
    pub fn report(&self, report: Report) {
        // The thread ends only after this end is gone.
        let _ = self.reports.send(report);
    }

    /// Ends the thread.
    pub fn close(mut self) {
        drop(self.reports);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
