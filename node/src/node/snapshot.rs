//! Snapshots, as the node sees them: a leader makes the copy that its shipper gives away, a replica puts the one that its link
//! has received in the place of log and store, while it runs. Both ends show how far they are.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{TryRecvError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use walferry_applier::store::export::Export;
use walferry_cluster::snapshot::{CopyPhase, CopyProgress, Pace};
use walferry_engine::lsn::Lsn;
use walferry_engine::prepare::free_bytes;
use walferry_engine::ring::Ring;
use walferry_engine::world;
use walferry_shipper::snapshot::file::{self, SnapshotFile};
use walferry_shipper::snapshot::serve::{Shelf, give_way, keep_pace};

use crate::config::NodeConfig;
use crate::error::DaemonError;
use crate::node::open::{Opened, open_data};
use crate::node::state::{CommitWait, Making};
use crate::node::{Heard, Node, Role};

/// A checkpoint for a snapshot waits for the commit LSN until that has not moved for so long: it may be the replica of the copy that
/// keeps it back.
const COMMIT_WAIT_MAX: Duration = Duration::from_secs(2);
/// What the disk must have beside a copy, for the log to go on.
const SPARE_BYTES: u64 = 64 << 20;
/// What reading the finished copy once counts for at the pace of copies, as a divisor.
const SEAL_SHARE: usize = 8;
/// How often a bar is drawn.
const DRAW_INTERVAL: Duration = Duration::from_millis(200);
/// How often a line is logged where there is no terminal.
const TELL_INTERVAL: Duration = Duration::from_secs(5);

impl CommitWait {
    /// True once the checkpoint has to go beyond the commit LSN. While that moves, it reaches the checkpoint sooner or later.
    fn is_over(&mut self, committed: Lsn, now: Instant) -> bool {
        if committed > self.committed {
            *self = CommitWait { committed, moved: now };
        }
        now.saturating_duration_since(self.moved) > COMMIT_WAIT_MAX
    }
}

impl Making {
    /// What it made, once it has ended.
    fn outcome(&self) -> Option<Result<SnapshotFile, String>> {
        match self.outcome.try_recv() {
            Ok(outcome) => Some(outcome),
            Err(TryRecvError::Disconnected) => Some(Err("its thread ended early".to_owned())),
            Err(TryRecvError::Empty) => None,
        }
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

/// What the thread needs.
struct Work {
    export: Export,
    config: NodeConfig,
    crc: u32,
    shelf: Arc<Shelf>,
    pace: Arc<Mutex<Pace>>,
    stop: Arc<AtomicBool>,
}

impl Work {
    fn run(self) -> Result<SnapshotFile, String> {
        give_way();
        let data = &self.config.data;
        let failed = |error: std::io::Error| format!("in {}: {error}", data.join(file::SNAPSHOT_DIR).display());
        let path = file::making_path(data).map_err(failed)?;
        let total = self.export.source_bytes().map_err(failed)?;
        let free = free_bytes(data).map_err(failed)?;
        if free < total + SPARE_BYTES {
            let needed = total + SPARE_BYTES;
            return Err(format!("{} has {free} bytes free, a snapshot needs {needed}", data.display()));
        }
        let snapshot = self.export.applied();
        let mut done = 0;
        let go_on = || !self.stop.load(Ordering::Acquire);
        let written = |bytes: usize| {
            done += bytes as u64;
            self.shelf.making(done.min(total), total);
            keep_pace(&self.pace, bytes, go_on)
        };
        self.export.write(&path, written).map_err(|error| error.to_string())?;
        // Read back from memory, mostly, which costs the commits little.
        let read = |bytes: usize| keep_pace(&self.pace, bytes / SEAL_SHARE, go_on);
        SnapshotFile::seal(data, snapshot, self.crc, read).map_err(failed)
    }
}

impl Node {
    /// A leader's part: makes the copy that is wanted.
    pub(super) fn make_snapshot(&mut self) -> Result<(), DaemonError> {
        let Role::Leader(shipper) = &mut self.role else {
            // What it made meanwhile is dropped with it.
            self.snapshots.making.take_if(|making| {
                making.stop.store(true, Ordering::Release);
                making.outcome().is_some()
            });
            self.forget_checkpoint();
            return Ok(());
        };
        if let Some(making) = &self.snapshots.making {
            // One of an earlier leadership's says nothing to this one.
            let given_up = making.stop.load(Ordering::Acquire);
            match making.outcome() {
                None if given_up => return Ok(()),
                None => {}
                Some(outcome) => {
                    self.snapshots.making = None;
                    if !given_up {
                        shipper.snapshots().made(outcome);
                    }
                }
            }
        }
        let Some(floor) = shipper.snapshots().wanted() else {
            self.forget_checkpoint();
            return Ok(());
        };
        let floor = floor.max(Lsn(1));
        if self.store.durable_applied() < floor {
            let (committed, now) = (self.committed(), self.now());
            if self.snapshots.commit_wait.is_none() {
                let newest = self.store.durable_applied();
                tracing::info!(%newest, %floor, "a snapshot waits for a newer checkpoint, which the kept log can follow");
            }
            let wait = self.snapshots.commit_wait.get_or_insert(CommitWait { committed, moved: now });
            let beyond = wait.is_over(committed, now);
            self.store.ask_for_checkpoint(floor, beyond);
            return Ok(());
        }
        self.begin_snapshot()
    }

    /// No copy waits for a checkpoint any more: one that was to go beyond the commit LSN does not.
    fn forget_checkpoint(&mut self) {
        if self.snapshots.commit_wait.take().is_some() {
            self.store.ask_for_checkpoint(Lsn::ZERO, false);
        }
    }

    fn begin_snapshot(&mut self) -> Result<(), DaemonError> {
        let Role::Leader(shipper) = &mut self.role else { return Ok(()) };
        let export = self.store.export()?;
        let snapshot = export.applied();
        if !shipper.begin_snapshot(snapshot, &self.log) {
            shipper.snapshots().fail(format!("the store is at {snapshot}, where no frame of the log ends"));
            return Ok(());
        }
        let stop = Arc::new(AtomicBool::new(false));
        let (outbox, outcome) = channel();
        let work = Work {
            export,
            config: self.config.clone(),
            crc: shipper.snapshots().making_crc(),
            shelf: shipper.snapshots().shelf(),
            pace: shipper.snapshots().pace(),
            stop: Arc::clone(&stop),
        };
        let waker = self.waker.clone();
        let make = move || {
            // Nobody listens any more when the leader has stepped down.
            let _ = outbox.send(work.run());
            waker.wake();
        };
        match world::spawn_blocking("snapshot-make", Box::new(make)) {
            Ok(_) => self.snapshots.making = Some(Making { stop, outcome }),
            Err(error) => shipper.snapshots().fail(format!("no thread: {error}")),
        }
        Ok(())
    }

    /// A replica's part: once a copy is there, it takes the place of log and store. Clients stay; what they read from then on is the
    /// leader's state, older or newer than the node's own was.
    pub(super) fn take_snapshot(&mut self, ring: &mut Ring) -> Result<(), DaemonError> {
        let Role::Replica(replica) = &mut self.role else { return Ok(()) };
        if self.retired.is_some() || !replica.has_snapshot(&self.log) || !self.end_scrub() {
            return Ok(());
        }
        let Role::Replica(replica) = &mut self.role else { return Ok(()) };
        replica.give_way_to_snapshot(&self.log, &mut self.store, &self.history)?;
        self.lost_commits += replica.take_lost_commits();
        let (leader, promised) = (replica.leader().to_owned(), replica.promised());
        self.snapshots.taken += 1;
        (self.snapshots.taken_bytes, self.snapshots.kept_bytes) = replica.copied();
        // From here on an error ends the node, and its next start finishes what was begun.
        self.role = Role::Leaderless("a snapshot takes the place of its log and store".to_owned());
        let lock = self.log.retire(ring)?;
        let Opened { meta, history, log, store, recovery, .. } =
            open_data(&self.config, lock, (None, &self.tls), ring, &self.waker)?;
        (self.meta, self.history, self.log, self.store) = (meta, history, log, store);
        self.watch_files()?;
        self.heard =
            Heard { flushed: recovery.leader_flushed, committed: recovery.committed, fresh: None, at: self.heard.at };
        self.pending.clear();
        self.waterfall.abandon();
        // A held reply may be about commits of ours that the leader does not have, at LSNs that it has.
        self.abandon("a snapshot took the place of this node's state".to_owned());
        self.role = self.follow(leader, promised)?;
        tracing::info!(applied = %self.store.applied(), "the snapshot is in place");
        Ok(())
    }

    /// Shows copies that have begun, each on a thread of its own: a terminal may be slow.
    pub(super) fn show_snapshots(&mut self) {
        if world::is_simulated() {
            return;
        }
        self.snapshots.shown.retain(|progress| !progress.is_over());
        let copies: Vec<(String, Arc<CopyProgress>)> = match &mut self.role {
            Role::Leader(shipper) => {
                let label = |name| format!("snapshot for {name}");
                shipper.snapshots().copies().map(|(name, progress)| (label(name), Arc::clone(progress))).collect()
            }
            Role::Replica(replica) => {
                let label = || format!("snapshot from {}", replica.leader());
                replica.snapshot().map(|progress| (label(), Arc::clone(progress))).into_iter().collect()
            }
            Role::Leaderless(_) | Role::SteppedDown(_) => Vec::new(),
        };
        for (label, progress) in copies {
            let known = self.snapshots.shown.iter().any(|shown| Arc::ptr_eq(shown, &progress));
            if !known && !progress.is_over() {
                self.snapshots.shown.push(Arc::clone(&progress));
                // Without a thread it goes on unseen.
                let _ =
                    std::thread::Builder::new().name("snapshot-show".to_owned()).spawn(move || show(&label, &progress));
            }
        }
    }
}

/// A bar on a terminal, a line now and then elsewhere.
fn show(label: &str, progress: &CopyProgress) {
    let bar = std::io::stderr().is_terminal().then(|| {
        let style = ProgressStyle::with_template("{prefix} {wide_bar} {bytes} of {total_bytes} {msg}");
        ProgressBar::new(0).with_prefix(label.to_owned()).with_style(style.expect("a template"))
    });
    let mut told = world::now();
    while !progress.is_over() {
        let (done, total) = progress.bytes();
        match &bar {
            Some(bar) => {
                let phase = match progress.phase() {
                    CopyPhase::Preparing => "preparing",
                    CopyPhase::Copying => "copying",
                    CopyPhase::Verifying => "verifying",
                };
                bar.set_length(total);
                bar.set_position(done);
                bar.set_message(phase);
            }
            None if world::now() - told >= TELL_INTERVAL => {
                told = world::now();
                tracing::info!("{label}: {}", amounts(progress));
            }
            None => {}
        }
        std::thread::sleep(DRAW_INTERVAL);
    }
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
}

/// `1.2 of 3.4 GiB`, with what is done to them.
fn amounts(progress: &CopyProgress) -> String {
    let (done, total) = progress.bytes();
    let (unit, name) = if total >= 1 << 30 { ((1u64 << 30) as f64, "GiB") } else { ((1u64 << 20) as f64, "MiB") };
    let amount = format!("{:.1} of {:.1} {name}", done as f64 / unit, total as f64 / unit);
    match progress.phase() {
        CopyPhase::Preparing => format!("preparing, {amount}"),
        CopyPhase::Copying => amount,
        CopyPhase::Verifying => format!("verifying, {amount}"),
    }
}

/// What a replica says of itself meanwhile.
pub(super) fn receiving(progress: &CopyProgress, leader: &str) -> String {
    format!("receiving a snapshot: {} from {leader}; reads see the state before it", amounts(progress))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoint_goes_beyond_commits_only_when_they_stand_still() {
        let begun = world::now();
        let mut wait = CommitWait { committed: Lsn(100), moved: begun };
        let step = COMMIT_WAIT_MAX;
        assert!(!wait.is_over(Lsn(100), begun + step));
        // Commits that move slowly are waited for however long it takes.
        for turn in 1..10 {
            assert!(!wait.is_over(Lsn(100 + u64::from(turn)), begun + step * turn));
        }
        let moved = begun + step * 9;
        assert!(!wait.is_over(Lsn(109), moved + step));
        assert!(wait.is_over(Lsn(109), moved + step + Duration::from_millis(1)));
    }
}
