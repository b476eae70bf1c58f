//! What a run is about and what it came to. Made by `cluster`, read by the runner and by the checks.

use crate::limits::Broken;

/// What a run is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variation {
    /// The faults of the seed's plan.
    Faults,
    /// None, for comparison.
    Calm,
    /// One replica's disk is slow.
    SlowReplica,
    /// One replica is gone.
    DeadReplica,
}

/// What a run came to.
pub struct Summary {
    /// Of commits at `remote_flush`, if there were enough.
    pub p99_us: Option<u64>,
    pub hash: u64,
    pub commands: u64,
    pub acknowledged: usize,
    pub failovers: u64,
    pub faults: u64,
    pub restarts: u64,
    pub misreads: u64,
    pub snapshots: u64,
    pub checked_calls: usize,
    /// The stores were compared with what the log says.
    pub modelled: bool,
    pub simulated_us: u64,
}

/// The outcome of a check.
pub(super) type Checked<T = ()> = Result<T, Broken>;
