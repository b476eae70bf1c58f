//! Faults of the small files beside the logs: the power goes while one is written, or one cannot be written. Armed by the faults of a run;
//! what of a file was not durable is taken back here.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use walferry_engine::world::Saving;
use walferry_engine::world::simulated::Undo;

use super::{NodeNo, SimWorld};

/// Small files that a node still writes before one fails, at most.
const ARMED_SKIPS_MAX: u32 = 4;

/// What happens at one of a node's next small files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileFault {
    /// The power goes, just before the file is replaced or just after.
    Down,
    /// It cannot be written.
    Broken,
}

/// A fault to come.
#[derive(Clone, Copy, Debug)]
pub(super) struct Armed {
    pub(super) fault: FileFault,
    /// When that is.
    pub(super) at: Saving,
    /// So many files are left alone before.
    pub(super) skips: u32,
    /// It waits for an epoch history, the file that a node forgets by.
    pub(super) history_only: bool,
}

impl SimWorld {
    /// The power goes: of what was written to its files and not flushed some sectors are there and some are not, and nothing is
    /// written any more until `revive`.
    pub fn crash_files(&self, node: NodeNo, sector_bytes: usize, rng: &mut fastrand::Rng) {
        self.crashed.set(Some(node));
        let unsynced = std::mem::take(&mut *self.unsynced.borrow_mut());
        for ((of, path), changes) in unsynced {
            if of != node {
                self.unsynced.borrow_mut().insert((of, path), changes);
                continue;
            }
            // As for the log: all of it, nothing, or any part.
            let share = rng.u8(0..=4);
            let mut names_go_back = true;
            let mut file = None;
            for undo in changes.into_iter().rev() {
                match undo {
                    // An older name comes back only where the newer one did not last.
                    Undo::Name(from, before) => {
                        names_go_back &= rng.u8(0..4) < share;
                        if names_go_back {
                            take_name_back(&path, &from, before);
                            file = None;
                        }
                    }
                    undo => {
                        let open = || File::options().write(true).open(&path).expect("a file of a node's");
                        take_back(file.get_or_insert_with(open), undo, sector_bytes, || rng.u8(0..4) < share);
                    }
                }
            }
        }
    }

    /// The node of the last crash is gone.
    pub fn revive(&self) {
        self.crashed.set(None);
    }

    /// One of the next small files of a node fails.
    pub fn arm(&self, node: NodeNo, fault: FileFault, rng: &mut fastrand::Rng) {
        let at =
            [Saving::Begins, Saving::Named, Saving::Done][rng.usize(0..if fault == FileFault::Down { 3 } else { 2 })];
        let history_only = rng.bool();
        // The history and its copy are two files.
        let skips = rng.u32(0..if history_only { 2 } else { ARMED_SKIPS_MAX });
        self.armed.borrow_mut().insert(node, Armed { fault, at, skips, history_only });
    }

    /// Whatever was to come does not.
    pub fn disarm(&self) {
        self.armed.borrow_mut().clear();
    }

    /// The node that went down in the middle of its work, if one just did.
    pub fn went_down(&self) -> Option<NodeNo> {
        self.crashed.get()
    }

    /// Whether a small file of the node could not be written since this was asked last.
    pub fn take_failed(&self, node: NodeNo) -> bool {
        self.failed.borrow_mut().remove(&node)
    }

    /// Whether anything is wrong with the node's disk, or about to be.
    pub fn has_pending_fault(&self, node: NodeNo) -> bool {
        let armed = self.armed.borrow().contains_key(&node) || self.failed.borrow().contains(&node);
        armed || self.is_misreading(node) || self.full.borrow().contains(&node)
    }
}

fn take_name_back(path: &Path, from: &Path, before: Option<Vec<u8>>) {
    match std::fs::rename(path, from) {
        // It was removed meanwhile.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        outcome => {
            let moved = outcome.and_then(|()| before.map_or(Ok(()), |bytes| std::fs::write(path, bytes)));
            moved.expect("the simulator's own disk");
        }
    }
}

fn take_back(file: &File, undo: Undo, sector_bytes: usize, mut random: impl FnMut() -> bool) {
    match undo {
        Undo::Length(bytes) => {
            if random() {
                file.set_len(bytes).expect("it had this length");
            }
        }
        Undo::Name(..) => unreachable!("names are taken back whole"),
        Undo::Bytes(offset, bytes) => {
            for (index, sector) in bytes.chunks(sector_bytes).enumerate() {
                if random() {
                    file.write_all_at(sector, offset + (index * sector_bytes) as u64)
                        .expect("the simulator's own disk");
                }
            }
        }
    }
}
