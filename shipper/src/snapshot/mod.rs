//! Snapshots on the leader: for replicas whose place in the log is gone. One copy at a time stands on the shelf and serves all
//! that ask; it is made when the first asks, kept while it is of use, and holds the log from its LSN on meanwhile. A copy is made
//! of a checkpoint that the kept log can follow: where the newest one is too old, the node is asked for a fresh one. The shipper
//! owns this; the node makes the copy, since only it knows the store: it asks `wanted`, says `begun`, and then `made`.
//!
//! ```text
//! Fetch ──> ask ──> wanted ──> (node: checkpoint, export) ──> made ──> shelf ──> serve (a thread each) ──> replica
//!                      a slot at the copy's LSN ──> the log is there when the replica comes back
//! ```

pub mod file;
pub mod serve;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use walferry_cluster::member::MemberName;
use walferry_cluster::message::{Fetch, Offer, Refuse, RefuseCode};
use walferry_cluster::snapshot::{CopyProgress, Pace};
use walferry_engine::lsn::Lsn;
use walferry_engine::mutants;
use walferry_engine::told::Told;
use walferry_engine::waker::Waker;
use walferry_engine::world;

use file::SnapshotFile;
use serve::{Job, Serving, Shelf};

/// Replicas that receive a copy at once; another is asked to come again.
pub const SERVINGS_MAX: usize = 4;
/// A copy that nobody has asked for for so long is removed; until then a replica can go on with it.
const KEPT_TIME_MAX: Duration = Duration::from_secs(600);
/// A new copy has at most this part of `keep_bytes_max` behind it when the node begins to make it; the rest is for the log that is
/// written while the copy is made and sent.
const FRESH_DIVISOR: u64 = 4;
/// A copy with more than this part of `keep_bytes_max` behind it is not given to another replica, and `rate` is no longer observed
/// for those who receive it: only the end of the transfer frees the log.
const NEAR_DIVISOR: u64 = 2;

const _: () = assert!(FRESH_DIVISOR > NEAR_DIVISOR, "a fresh copy is near");

/// What the snapshots are given by their shipper.
#[derive(Clone, Debug)]
pub struct SnapshotsConfig {
    /// The data directory.
    pub data: PathBuf,
    /// Bytes a second of all copies together, the making of one included; 0 for no limit.
    pub rate: u64,
    /// A heartbeat goes out at least this often.
    pub heartbeat_interval: Duration,
    /// A replica that takes nothing for so long is dropped.
    pub peer_timeout: Duration,
    /// `slot_keep_bytes_max`: a copy that would hold back more log is given up.
    pub keep_bytes_max: u64,
}

/// A copy that is being made.
#[derive(Clone, Copy, Debug)]
struct Making {
    snapshot: Lsn,
    crc: u32,
}

/// The leader's snapshots.
pub struct Snapshots {
    config: SnapshotsConfig,
    shelf: Arc<Shelf>,
    pace: Arc<Mutex<Pace>>,
    waker: Waker,
    servings: BTreeMap<MemberName, Serving>,
    /// A copy that holds everything before this is to be made.
    wanted: Option<Lsn>,
    making: Option<Making>,
    used_at: Instant,
    /// The copy of an earlier run was looked for.
    looked: bool,
    /// `rate` is not observed at present: see `NEAR_DIVISOR`.
    hurried: bool,
    /// What the log has told of copies that failed.
    told: Told,
}

impl Snapshots {
    /// A manager without a snapshot.
    pub fn new(config: SnapshotsConfig, waker: Waker, now: Instant) -> Snapshots {
        Snapshots {
            pace: Arc::new(Mutex::new(Pace::new(config.rate))),
            config,
            shelf: Arc::default(),
            waker,
            servings: BTreeMap::new(),
            wanted: None,
            making: None,
            used_at: now,
            looked: false,
            hurried: false,
            told: Told::default(),
        }
    }

    /// Where the thread that makes a copy tells how far it is.
    pub fn shelf(&self) -> Arc<Shelf> {
        Arc::clone(&self.shelf)
    }

    /// What all copies share.
    pub fn pace(&self) -> Arc<Mutex<Pace>> {
        Arc::clone(&self.pace)
    }

    /// Looks for the copy of an earlier run of this leader; `crc_before` gives the crc of the frame that ends at an LSN of the log.
    pub fn look(&mut self, log_start: Lsn, crc_before: impl Fn(Lsn) -> Option<u32>) {
        if std::mem::replace(&mut self.looked, true) {
            return;
        }
        let found = file::clear(&self.config.data, false).and_then(|()| SnapshotFile::find(&self.config.data));
        let fits = |copy: &SnapshotFile| copy.snapshot >= log_start && crc_before(copy.snapshot) == Some(copy.crc);
        match found {
            Ok(Some(copy)) if fits(&copy) => {
                tracing::info!(snapshot = %copy.snapshot, bytes = copy.bytes, "a snapshot of before is on offer still");
                self.shelf.put(Some(Arc::new(copy)));
            }
            Ok(_) => self.discard(),
            Err(error) => {
                tracing::warn!("cannot look for an earlier snapshot: {error}");
                self.discard();
            }
        }
    }

    fn discard(&mut self) {
        self.shelf.put(None);
        if let Err(error) = file::clear(&self.config.data, true) {
            tracing::warn!("cannot remove a snapshot that is of no use any more: {error}");
        }
    }

    /// A replica asks for a copy. `offer` is what it is told beside the copy itself; `end` is the log's.
    pub fn ask(
        &mut self,
        socket: OwnedFd,
        fetch: Fetch,
        offer: Offer,
        end: Lsn,
        now: Instant,
    ) -> Result<(), (OwnedFd, Refuse)> {
        let name = fetch.name.clone();
        if let Some(old) = self.servings.remove(&name) {
            let text = format!("another connection of {name} took this one's place");
            old.end(Refuse { code: RefuseCode::Replaced, text });
        }
        if self.servings.len() >= SERVINGS_MAX {
            let text = format!("the leader gives {SERVINGS_MAX} snapshots already, which is the limit");
            return Err((socket, Refuse { code: RefuseCode::Full, text }));
        }
        self.used_at = now;
        let copy = self.shelf.copy();
        let serves = copy.is_some_and(|copy| {
            let suspect = fetch.suspect && fetch.snapshot == copy.snapshot;
            copy.snapshot >= fetch.floor
                && !suspect
                && (self.is_near(copy.snapshot, end) || fetch.snapshot == copy.snapshot)
        });
        // The copy that is being made is a new file, and the log behind it is kept.
        let comes = self.making.is_some_and(|making| making.snapshot >= fetch.floor);
        if !serves && !comes {
            // Whoever is being served has the file open; a suspect one is not given again.
            if self.making.is_none() {
                self.discard();
            }
            self.want(fetch.floor, end);
        }
        let job = Job {
            socket,
            fetch,
            offer,
            shelf: Arc::clone(&self.shelf),
            pace: Arc::clone(&self.pace),
            heartbeat_interval: self.config.heartbeat_interval,
            peer_timeout: self.config.peer_timeout,
            waker: self.waker.clone(),
        };
        match Serving::start(job) {
            Ok(serving) => drop(self.servings.insert(name, serving)),
            // Its socket is closed with the job; the replica comes again.
            Err(error) => {
                if self.told.tell(&error.to_string(), now).is_some() {
                    tracing::warn!(replica = %name, "cannot give a snapshot: {error}");
                }
            }
        }
        Ok(())
    }

    /// A copy is wanted that holds everything before `floor` and that the kept log, which ends at `end`, can follow. The position
    /// stays while the node waits for a checkpoint: under load a checkpoint would never reach one that moves with the log.
    fn want(&mut self, floor: Lsn, end: Lsn) {
        let fresh = Lsn(end.0.saturating_sub(self.config.keep_bytes_max / FRESH_DIVISOR));
        let fresh = if mutants::is_on("old-snapshot") { Lsn::ZERO } else { fresh };
        self.wanted = Some(self.wanted.unwrap_or(fresh).max(floor));
    }

    fn is_near(&self, snapshot: Lsn, end: Lsn) -> bool {
        end.since(snapshot) <= self.config.keep_bytes_max / NEAR_DIVISOR
    }

    /// A copy that holds everything before this is wanted and nobody makes it yet.
    pub fn wanted(&self) -> Option<Lsn> {
        self.wanted.filter(|_| self.making.is_none())
    }

    /// The node makes a copy as of `snapshot`, where a frame with this crc ends.
    pub fn begun(&mut self, snapshot: Lsn, crc: u32) {
        tracing::info!(%snapshot, "making a snapshot");
        self.wanted = None;
        self.making = Some(Making { snapshot, crc });
    }

    /// The crc that goes with the copy that is being made.
    pub fn making_crc(&self) -> u32 {
        self.making.map_or(0, |making| making.crc)
    }

    /// The copy is there, or why not.
    pub fn made(&mut self, outcome: Result<SnapshotFile, String>) {
        self.making = None;
        match outcome {
            Ok(copy) => {
                tracing::info!(snapshot = %copy.snapshot, bytes = copy.bytes, "a snapshot is on offer");
                self.wanted = self.wanted.filter(|floor| copy.snapshot < *floor);
                self.shelf.put(Some(Arc::new(copy)));
            }
            Err(text) => self.fail(text),
        }
    }

    /// No copy can be made.
    pub fn fail(&mut self, text: String) {
        // Replicas ask again and again; each is told.
        if self.told.tell(&text, world::now()).is_some() {
            tracing::warn!("no snapshot can be made: {text}");
        }
        (self.wanted, self.making) = (None, None);
        self.shelf.fail(text);
    }

    /// No log from here on may be recycled.
    pub fn hold(&self) -> Lsn {
        let copy = self.shelf.copy().map(|copy| copy.snapshot);
        let making = self.making.map(|making| making.snapshot);
        copy.into_iter().chain(making).min().unwrap_or(Lsn::MAX)
    }

    /// Moves copies along; once a turn. The replicas whose copy is under way or just ended well, for their slots.
    pub fn poll(&mut self, end: Lsn, now: Instant) -> Vec<(MemberName, Lsn)> {
        let keep_bytes_max = self.config.keep_bytes_max;
        if let Some(copy) = self.shelf.copy() {
            let far = end.since(copy.snapshot) > keep_bytes_max;
            let unused = self.servings.is_empty() && now.saturating_duration_since(self.used_at) > KEPT_TIME_MAX;
            if far {
                tracing::warn!(
                    snapshot = %copy.snapshot, %end, slot_keep_bytes_max = keep_bytes_max,
                    "more log was written since a snapshot than slot_keep_bytes_max keeps: it is given up for a fresh one. If this \
                     repeats, raise slot_keep_bytes_max on all members, or write less until the replica has caught up"
                );
            }
            if far || unused {
                self.discard();
            }
            // A replica that has not been offered the copy yet waits for the next one.
            if far && self.servings.values().any(|serving| serving.snapshot().is_none()) {
                self.want(Lsn::ZERO, end);
            }
        }
        self.set_pace(end);
        let mut slots = Vec::new();
        let told = &mut self.told;
        self.servings.retain(|name, serving| {
            match serving.snapshot() {
                Some(snapshot) if end.since(snapshot) > keep_bytes_max => {
                    let text = format!(
                        "more log was written since the snapshot at {snapshot} than slot_keep_bytes_max = {keep_bytes_max} keeps: the \
                         transfer begins again with a fresh snapshot"
                    );
                    serving.end(Refuse { code: RefuseCode::NoSnapshot, text });
                }
                Some(snapshot) => slots.push((name.clone(), snapshot)),
                None => {}
            }
            match serving.outcome() {
                None => true,
                Some(Ok(())) => {
                    tracing::info!(replica = %name, bytes = serving.progress.bytes().1, "a snapshot was given");
                    false
                }
                Some(Err(error)) => {
                    if told.tell(&format!("{name}: {error}"), now).is_some() {
                        tracing::warn!(replica = %name, "a snapshot was interrupted: {error}");
                    }
                    false
                }
            }
        });
        if !self.servings.is_empty() {
            self.used_at = now;
        }
        slots
    }

    /// Transfers observe `rate` while the log behind them is well within `keep_bytes_max`, and go as fast as they can from then on.
    fn set_pace(&mut self, end: Lsn) {
        let making = self.making.map(|making| making.snapshot);
        let oldest = self.servings.values().filter_map(Serving::snapshot).chain(making).min();
        let hurried = oldest.is_some_and(|snapshot| !self.is_near(snapshot, end));
        if hurried == self.hurried {
            return;
        }
        self.hurried = hurried;
        self.pace.lock().expect("nobody panics with it").set_rate(if hurried { 0 } else { self.config.rate });
        if let Some(snapshot) = oldest.filter(|_| hurried) {
            tracing::warn!(
                %snapshot, %end, slot_keep_bytes_max = self.config.keep_bytes_max,
                "the log behind a snapshot transfer is longer than half of slot_keep_bytes_max: snapshot_rate is not observed \
                 until the transfer ends"
            );
        }
    }

    /// Copies for others than these are given up.
    pub fn keep_only(&mut self, keep: impl Fn(&MemberName) -> bool, refuse: impl Fn(&MemberName) -> Refuse) {
        self.servings.retain(|name, serving| {
            let kept = keep(name);
            if !kept {
                serving.end(refuse(name));
            }
            kept
        });
    }

    /// Every copy on its way.
    pub fn copies(&self) -> impl Iterator<Item = (&MemberName, &Arc<CopyProgress>)> {
        self.servings.iter().map(|(name, serving)| (name, &serving.progress))
    }

    /// How far the copy for a replica is.
    pub fn progress(&self, name: &MemberName) -> Option<&Arc<CopyProgress>> {
        self.servings.get(name).map(|serving| &serving.progress)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use walferry_cluster::member::ClusterId;
    use walferry_engine::waker::WakeSource;
    use walferry_engine::world;

    use super::*;

    const KEEP_BYTES_MAX: u64 = 1000;
    const RATE: u64 = 1 << 20;

    fn snapshots(data: &std::path::Path) -> Snapshots {
        let config = SnapshotsConfig {
            data: data.to_owned(),
            rate: RATE,
            heartbeat_interval: Duration::from_millis(1),
            peer_timeout: Duration::from_secs(60),
            keep_bytes_max: KEEP_BYTES_MAX,
        };
        Snapshots::new(config, WakeSource::new().expect("a waker").0, world::now())
    }

    /// A replica asks for what holds everything before `floor`, of a leader whose log ends at `end`; its end of the connection.
    fn ask(snapshots: &mut Snapshots, name: &str, floor: u64, end: u64) -> UnixStream {
        let (leader, replica) = UnixStream::pair().expect("a pair of sockets");
        let fetch = Fetch {
            protocol: 1,
            cluster_id: None,
            name: name.parse().expect("a name"),
            floor: Lsn(floor),
            segment_bytes: 16 << 20,
            snapshot: Lsn::ZERO,
            offset: 0,
            suspect: false,
        };
        let offer = Offer {
            protocol: 1,
            cluster_id: ClusterId(1),
            name: "leader".parse().expect("a name"),
            snapshot: Lsn::ZERO,
            segment_bytes: 16 << 20,
            bytes: 0,
            offset: 0,
            crc: 0,
            history: Vec::new(),
        };
        snapshots.ask(leader.into(), fetch, offer, Lsn(end), world::now()).expect("there is capacity");
        replica
    }

    fn made_at(snapshots: &mut Snapshots, snapshot: u64) {
        let data = snapshots.config.data.clone();
        std::fs::write(file::making_path(&data).expect("a directory"), b"a store").expect("written");
        snapshots.made(Ok(SnapshotFile::seal(&data, Lsn(snapshot), 0, |_| true).expect("sealed")));
    }

    fn observes_rate(snapshots: &Snapshots) -> bool {
        let (pace, now) = (snapshots.pace(), world::now());
        let mut pace = pace.lock().expect("nobody panics with it");
        pace.wait(1 << 20, now);
        pace.wait(1, now) > Duration::ZERO
    }

    #[test]
    fn snapshot_request_wants_a_checkpoint_the_log_can_follow() {
        let data = tempfile::tempdir().expect("a directory");
        let mut snapshots = snapshots(data.path());
        let _a = ask(&mut snapshots, "a", 0, 9000);
        let fresh = Lsn(9000 - KEEP_BYTES_MAX / FRESH_DIVISOR);
        assert_eq!(snapshots.wanted(), Some(fresh));
        // Under load the log grows while the node waits for the checkpoint: what is wanted stays, but for what a replica has confirmed.
        let _b = ask(&mut snapshots, "b", 0, 9500);
        assert_eq!(snapshots.wanted(), Some(fresh));
        let _c = ask(&mut snapshots, "c", 8900, 9500);
        assert_eq!(snapshots.wanted(), Some(Lsn(8900)));
        // One that is being made will do for a replica whose confirmed log it holds, however long the log is by now.
        snapshots.begun(Lsn(9100), 0);
        let _d = ask(&mut snapshots, "d", 9100, 9900);
        made_at(&mut snapshots, 9100);
        assert_eq!((snapshots.wanted(), snapshots.hold()), (None, Lsn(9100)));
    }

    #[test]
    fn snapshot_given_up_for_its_log_is_wanted_afresh_for_who_waits() {
        let data = tempfile::tempdir().expect("a directory");
        let mut snapshots = snapshots(data.path());
        let waiting = ask(&mut snapshots, "a", 5000, 5000);
        snapshots.begun(Lsn(5000), 0);
        // Of a copy that is too old for it, the replica is offered nothing: as if its thread had not come to look yet.
        made_at(&mut snapshots, 4000);
        assert_eq!(snapshots.wanted(), None);
        snapshots.poll(Lsn(4000 + KEEP_BYTES_MAX), world::now());
        assert_eq!((snapshots.wanted(), snapshots.hold()), (None, Lsn(4000)));
        snapshots.poll(Lsn(4001 + KEEP_BYTES_MAX), world::now());
        assert_eq!((snapshots.wanted(), snapshots.hold()), (Some(Lsn(4751)), Lsn::MAX));
        drop(waiting);
    }

    #[test]
    fn snapshot_rate_is_observed_until_the_log_behind_it_is_long() {
        let data = tempfile::tempdir().expect("a directory");
        let mut snapshots = snapshots(data.path());
        let half = KEEP_BYTES_MAX / NEAR_DIVISOR;
        snapshots.begun(Lsn(5000), 0);
        snapshots.poll(Lsn(5000 + half), world::now());
        assert!(observes_rate(&snapshots));
        snapshots.poll(Lsn(5001 + half), world::now());
        assert!(!observes_rate(&snapshots));
        snapshots.fail("the disk is full".to_owned());
        snapshots.poll(Lsn(5001 + half), world::now());
        assert!(observes_rate(&snapshots), "nothing is under way any more");
    }
}
