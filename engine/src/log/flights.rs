//! The writes of a log that are on their way to the disk.

use std::time::{Duration, Instant};

use crate::commit::{Commit, WriteNo};
use crate::lsn::Lsn;

/// A write from submission to durable. `from <= end`.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Flight {
    pub(super) number: WriteNo,
    pub(super) start: Lsn,
    /// What is written before this needs no resubmission.
    pub(super) from: Lsn,
    pub(super) end: Lsn,
    /// Completions that are still to come: one, or two with a linked flush.
    pub(super) outstanding: u8,
    /// A flush succeeded after the last byte was written.
    pub(super) synced: bool,
    pub(super) short_writes: u32,
    pub(super) records: u32,
    pub(super) wire_bytes: u64,
    pub(super) submitted: Option<Instant>,
    pub(super) queue: Duration,
}

/// The writes in flight, by [`WriteNo::slot`].
pub(super) struct Flights {
    pub(super) slots: [Flight; Commit::WINDOW],
    /// A bit for each slot whose write must be submitted again.
    pub(super) short: u64,
    pub(super) outstanding: usize,
}

impl Flights {
    pub(super) fn new() -> Flights {
        Flights { slots: [Flight::default(); Commit::WINDOW], short: 0, outstanding: 0 }
    }

    /// Writes that were written short are not submitted again.
    pub(super) fn give_up_short_writes(&mut self) {
        self.short = 0;
    }

    /// Completions that are still to come, and writes to submit again.
    pub(super) fn outstanding(&self) -> usize {
        self.outstanding + self.short.count_ones() as usize
    }
}
