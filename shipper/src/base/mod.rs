//! Base copies on the leader: for replicas whose place in the log is gone. One copy at a time stands on the shelf and serves all
//! that ask; it is made when the first asks, kept while it is of use, and holds the log from its LSN on meanwhile. The shipper
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

use walferry_cluster::base_copy::{CopyProgress, Pace};
use walferry_cluster::member::MemberName;
use walferry_cluster::message::{Fetch, Offer, Refuse, RefuseCode};
use walferry_engine::lsn::Lsn;
use walferry_engine::waker::Waker;

use file::BaseFile;
use serve::{Job, Serving, Shelf};

/// Replicas that receive a copy at once; another is asked to come again.
pub const SERVINGS_MAX: usize = 4;
/// A copy that nobody has asked for for so long is removed; until then a replica can go on with it.
const KEPT_TIME_MAX: Duration = Duration::from_secs(600);

/// What the bases are given by their shipper.
#[derive(Clone, Debug)]
pub struct BasesConfig {
    /// The data directory.
    pub data: PathBuf,
    /// Bytes a second of all copies together, the making of one included; 0 for no limit.
    pub rate: u64,
    /// A sign of life goes out at least this often.
    pub heartbeat_interval: Duration,
    /// A replica that takes nothing for so long is dropped.
    pub peer_timeout: Duration,
    /// A copy that would hold back more log is given up.
    pub keep_bytes_max: u64,
}

/// A copy that is being made.
#[derive(Clone, Copy, Debug)]
struct Making {
    base: Lsn,
    crc: u32,
}

/// The leader's base copies.
pub struct Bases {
    config: BasesConfig,
    shelf: Arc<Shelf>,
    pace: Arc<Mutex<Pace>>,
    waker: Waker,
    servings: BTreeMap<MemberName, Serving>,
    /// A copy that holds everything before this is to be made.
    wanted: Option<Lsn>,
    making: Option<Making>,
    used_at: Instant,
    /// The copy of an earlier life was looked for.
    looked: bool,
}

impl Bases {
    /// None yet.
    pub fn new(config: BasesConfig, waker: Waker, now: Instant) -> Bases {
        Bases {
            pace: Arc::new(Mutex::new(Pace::new(config.rate))),
            config,
            shelf: Arc::default(),
            waker,
            servings: BTreeMap::new(),
            wanted: None,
            making: None,
            used_at: now,
            looked: false,
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

    /// Looks for the copy of an earlier life of this leader; `crc_before` gives the crc of the frame that ends at an LSN of the log.
    pub fn look(&mut self, log_start: Lsn, crc_before: impl Fn(Lsn) -> Option<u32>) {
        if std::mem::replace(&mut self.looked, true) {
            return;
        }
        let found = file::clear(&self.config.data, false).and_then(|()| BaseFile::find(&self.config.data));
        let fits = |copy: &BaseFile| copy.base >= log_start && crc_before(copy.base) == Some(copy.crc);
        match found {
            Ok(Some(copy)) if fits(&copy) => {
                tracing::info!(base = %copy.base, bytes = copy.bytes, "a base copy of before is on offer still");
                self.shelf.put(Some(Arc::new(copy)));
            }
            Ok(_) => self.discard(),
            Err(error) => {
                tracing::warn!("cannot look for an earlier base copy: {error}");
                self.discard();
            }
        }
    }

    fn discard(&mut self) {
        self.shelf.put(None);
        if let Err(error) = file::clear(&self.config.data, true) {
            tracing::warn!("cannot remove a base copy that is of no use any more: {error}");
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
            let text = format!("the leader gives {SERVINGS_MAX} base copies already, which is its bound");
            return Err((socket, Refuse { code: RefuseCode::Full, text }));
        }
        self.used_at = now;
        let copy = self.shelf.copy();
        let near = |copy: &BaseFile| end.since(copy.base) <= self.config.keep_bytes_max / 2;
        let serves = copy.is_some_and(|copy| {
            let suspect = fetch.suspect && fetch.base == copy.base;
            copy.base >= fetch.floor && !suspect && (near(&copy) || fetch.base == copy.base)
        });
        if !serves {
            // Whoever is being served has the file open; a suspect one is not given again.
            if self.making.is_none() {
                self.discard();
            }
            self.wanted = Some(self.wanted.unwrap_or_default().max(fetch.floor));
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
            Err(error) => tracing::warn!(replica = %name, "cannot give a base copy: {error}"),
        }
        Ok(())
    }

    /// A copy that holds everything before this is wanted and nobody makes it yet.
    pub fn wanted(&self) -> Option<Lsn> {
        self.wanted.filter(|_| self.making.is_none())
    }

    /// The node makes a copy as of `base`, where a frame with this crc ends.
    pub fn begun(&mut self, base: Lsn, crc: u32) {
        tracing::info!(%base, "making a base copy");
        self.wanted = None;
        self.making = Some(Making { base, crc });
    }

    /// The crc that goes with the copy that is being made.
    pub fn making_crc(&self) -> u32 {
        self.making.map_or(0, |making| making.crc)
    }

    /// The copy is there, or why not.
    pub fn made(&mut self, outcome: Result<BaseFile, String>) {
        self.making = None;
        match outcome {
            Ok(copy) => {
                tracing::info!(base = %copy.base, bytes = copy.bytes, "a base copy is on offer");
                self.wanted = self.wanted.filter(|floor| copy.base < *floor);
                self.shelf.put(Some(Arc::new(copy)));
            }
            Err(text) => self.fail(text),
        }
    }

    /// No copy can be made.
    pub fn fail(&mut self, text: String) {
        tracing::warn!("no base copy can be made: {text}");
        (self.wanted, self.making) = (None, None);
        self.shelf.fail(text);
    }

    /// No log from here on may be recycled.
    pub fn hold(&self) -> Lsn {
        let copy = self.shelf.copy().map(|copy| copy.base);
        let making = self.making.map(|making| making.base);
        copy.into_iter().chain(making).min().unwrap_or(Lsn::MAX)
    }

    /// Moves copies along; once a turn. The replicas whose copy is under way or just ended well, for their slots.
    pub fn poll(&mut self, end: Lsn, now: Instant) -> Vec<(MemberName, Lsn)> {
        if let Some(copy) = self.shelf.copy() {
            let far = end.since(copy.base) > self.config.keep_bytes_max;
            let unused = self.servings.is_empty() && now.saturating_duration_since(self.used_at) > KEPT_TIME_MAX;
            if far {
                let text = format!("the log behind the copy at {} has become too long: it begins again", copy.base);
                let refuse = Refuse { code: RefuseCode::NoBase, text };
                self.servings.values().for_each(|serving| serving.end(refuse.clone()));
            }
            if far || unused {
                self.discard();
            }
        }
        let mut slots = Vec::new();
        let keep_bytes_max = self.config.keep_bytes_max;
        self.servings.retain(|name, serving| {
            if let Some(base) = serving.base().filter(|base| end.since(*base) <= keep_bytes_max) {
                slots.push((name.clone(), base));
            }
            match serving.outcome() {
                None => true,
                Some(Ok(())) => {
                    tracing::info!(replica = %name, bytes = serving.progress.bytes().1, "a base copy was given");
                    false
                }
                Some(Err(error)) => {
                    tracing::warn!(replica = %name, "a base copy was interrupted: {error}");
                    false
                }
            }
        });
        if !self.servings.is_empty() {
            self.used_at = now;
        }
        slots
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
