//! What a leader keeps: its lease, its last reports, the role that the node was given. Changed by `agent/leading.rs`.

use std::collections::BTreeMap;
use std::time::Instant;

use walferry_engine::lsn::Epoch;

use crate::lease::Lease;
use crate::member::MemberName;
use crate::register::{MemberId, MemberRole};

/// What the node was told last.
#[derive(Debug)]
pub(in crate::agent) struct Role {
    pub(in crate::agent) told: Option<MemberRole>,
    pub(in crate::agent) told_version: u64,
    /// Epochs up to this began in an earlier process of this incarnation, which may have led in them.
    pub(in crate::agent) epochs_before: Epoch,
}

impl Role {
    pub(in crate::agent) fn new(epochs_before: Epoch) -> Role {
        Role { told: None, told_version: 0, epochs_before }
    }
}

/// The in-sync set that the leader's node reported.
#[derive(Debug)]
pub(in crate::agent) struct Wanted {
    pub(in crate::agent) epoch: Epoch,
    pub(in crate::agent) number: u64,
    pub(in crate::agent) members: BTreeMap<MemberName, MemberId>,
}

/// A leader's state.
#[derive(Debug)]
pub(in crate::agent) struct Leading {
    /// The lease of the epoch in which this member leads.
    pub(in crate::agent) lease: Option<(Epoch, Lease)>,
    pub(in crate::agent) heartbeat_at: Instant,
    pub(in crate::agent) wanted_in_sync: Option<Wanted>,
    pub(in crate::agent) in_sync_changing: bool,
    /// A proposal of the in-sync set followed on this version; true once it was answered. Until the register is past the
    /// version, the proposal may be taken.
    pub(in crate::agent) in_sync_open: Option<(u64, bool)>,
    /// The report of which the node was told that the register has it.
    pub(in crate::agent) in_sync_recorded: Option<(Epoch, u64)>,
    /// After a change of the in-sync set that failed.
    pub(in crate::agent) in_sync_at: Instant,
    /// Since when no change of it was answered, and why.
    pub(in crate::agent) in_sync_failing: Option<(Instant, String)>,
}

impl Leading {
    pub(in crate::agent) fn new(now: Instant) -> Leading {
        Leading {
            lease: None,
            heartbeat_at: now,
            wanted_in_sync: None,
            in_sync_changing: false,
            in_sync_open: None,
            in_sync_recorded: None,
            in_sync_at: now,
            in_sync_failing: None,
        }
    }

    pub(in crate::agent) fn heartbeat_at(&self) -> Option<Instant> {
        self.lease.as_ref().map(|_| self.heartbeat_at)
    }
}
