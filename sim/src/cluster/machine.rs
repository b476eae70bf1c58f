//! A machine of a run: what runs on it, its disk, and what the checks remember of it. Has no logic of a run.

use std::collections::BTreeSet;
use std::path::PathBuf;

use walferry_cluster::register::MemberId;
use walferry_engine::EpochHistory;
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_node::simulated::Member;

use crate::control::{Control, Kept, name_of};
use crate::kernel::{Disk, Kernel};
use crate::rot::Rot;
use crate::world::NodeNo;

/// A running process.
pub(super) struct Process {
    pub(super) member: Member,
    pub(super) kernel: Kernel,
    pub(super) control: Control,
}

/// One machine.
pub(super) struct Node {
    pub(super) process: Option<Process>,
    /// The process of a witness, which has no node.
    pub(super) witness: Option<Control>,
    pub(super) kept: Kept,
    pub(super) dir: PathBuf,
    pub(super) disk: Disk,
    /// Counts its processes.
    pub(super) incarnation: u64,
    /// Stopped until then.
    pub(super) paused_until: u64,
    pub(super) turn_at: Option<u64>,
    /// Turns in a row that it had asked for and in which nothing happened.
    pub(super) idle_turns: u32,
    /// What its log held durably when its process was last seen.
    pub(super) durable: Lsn,
    /// And how its log ended there.
    pub(super) epoch: Epoch,
    /// The epochs of its log, and where that begins.
    pub(super) history: EpochHistory,
    pub(super) log_start: Lsn,
    /// Up to where its log was durable after its last turn.
    pub(super) seen_durable: Lsn,
    /// Its process after whose turn that was, how many of the commits that it counted as lost were found in `lost/` by then, and
    /// the files there.
    pub(super) seen_incarnation: u64,
    pub(super) lost_seen: u64,
    pub(super) lost_files: BTreeSet<String>,
    /// The most that its process knew to be committed, the checkpoint of its store, and how many snapshots it had taken then.
    pub(super) committed: Lsn,
    pub(super) checkpoint: Lsn,
    pub(super) copies: u64,
    /// Which incarnation lost its disk there last, and what it had.
    pub(super) lost: Option<(MemberId, EpochHistory, Lsn)>,
    /// The newest epoch when its disk was lost last.
    pub(super) lost_in: Option<Epoch>,
    /// What is damaged on its disk.
    pub(super) rotten: Option<Rot>,
    /// Something was damaged on its disk once.
    pub(super) was_damaged: bool,
    /// When its process was started.
    pub(super) started_us: u64,
}

impl Node {
    /// A machine on which nothing runs yet, with the identity that its first member will have.
    pub(super) fn new(node: NodeNo, id: MemberId, disk: Disk) -> Node {
        Node {
            process: None,
            witness: None,
            kept: Kept::new(id, Epoch(0), None),
            // Relative, so that no message names another directory in another run.
            dir: PathBuf::from(name_of(node).as_str()),
            disk,
            incarnation: 0,
            paused_until: 0,
            turn_at: None,
            idle_turns: 0,
            durable: Lsn::ZERO,
            epoch: Epoch(0),
            history: EpochHistory::default(),
            log_start: Lsn::ZERO,
            seen_durable: Lsn::ZERO,
            seen_incarnation: 0,
            lost_seen: 0,
            lost_files: BTreeSet::new(),
            committed: Lsn::ZERO,
            checkpoint: Lsn::ZERO,
            copies: 0,
            lost: None,
            lost_in: None,
            rotten: None,
            was_damaged: false,
            started_us: 0,
        }
    }

    /// The cluster thread of whatever runs there.
    pub(super) fn control(&self) -> Option<&Control> {
        self.process.as_ref().map(|process| &process.control).or(self.witness.as_ref())
    }

    pub(super) fn control_mut(&mut self) -> Option<&mut Control> {
        self.process.as_mut().map(|process| &mut process.control).or(self.witness.as_mut())
    }
}
