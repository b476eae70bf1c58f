//! Reads the part of the log that recovery did not: what the store holds already, kept for replicas that are behind. A thread
//! walks it after the start, again after `scrub_interval`, and whenever a replica could not be fed from it; damage is repaired
//! from other nodes while the node runs. Segments before its end are written by nobody else, and none is recycled meanwhile: the
//! node asks `hold`, and puts no snapshot in the log's place before the thread has ended.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};

use walferry_applier::repair::{RepairError, Repaired, Repairer};
use walferry_engine::error::RecoverError;
use walferry_engine::log::LOG_DIR;
use walferry_engine::lsn::Lsn;
use walferry_engine::reader::LogReader;
use walferry_engine::waker::Waker;
use walferry_engine::world::{self, Pace};
use walferry_shipper::snapshot::serve::give_way;

/// Repairs of one walk, at most, each of which may be many frames: what is kept of them stays in memory.
const REPAIRS_MAX: usize = 64 << 10;
/// Frames of a step.
const STEP_FRAMES: usize = 64;

/// Damage that nobody gave back.
pub(super) struct Unreadable {
    pub(super) error: RepairError,
    /// What is before this may be damaged: the end of the segment.
    pub(super) before: Lsn,
}

/// A walk on its way; dropped, it ends with the frame at hand.
pub(super) struct Scrub {
    from: Lsn,
    stop: Arc<AtomicBool>,
    outcome: Receiver<Result<Vec<Repaired>, Unreadable>>,
}

impl Scrub {
    /// Begins to read from `from` up to `to`, both where frames begin, where a segment begins at the latest.
    pub(super) fn start(repairer: Repairer, from: Lsn, to: Lsn, waker: Waker) -> std::io::Result<Scrub> {
        let stop = Arc::new(AtomicBool::new(false));
        let (outbox, outcome) = channel();
        let mut walk = Walk { repairer, from, to, reader: None, repaired: Vec::new(), stop: Arc::clone(&stop) };
        let work = move || {
            let Some(ended) = walk.step() else { return Pace::Again };
            // Nobody listens any more when the node has ended.
            let _ = outbox.send(ended);
            waker.wake();
            Pace::Over
        };
        world::spawn("scrub", Box::new(work))?;
        Ok(Scrub { from, stop, outcome })
    }

    /// Nothing from here on may be recycled.
    pub(super) fn hold(&self) -> Lsn {
        self.from
    }

    /// It is to end with the frame at hand; `outcome` tells when it has.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
    }

    /// What it repaired, once it has ended.
    pub(super) fn outcome(&self) -> Option<Result<Vec<Repaired>, Unreadable>> {
        self.outcome.try_recv().ok()
    }
}

impl Drop for Scrub {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Where the walk is.
struct Walk {
    repairer: Repairer,
    /// Everything before this was read.
    from: Lsn,
    to: Lsn,
    /// `None` before the first step and after a repair, from where on it goes on.
    reader: Option<LogReader>,
    repaired: Vec<Repaired>,
    stop: Arc<AtomicBool>,
}

impl Walk {
    /// Reads some frames, or repairs what it met; how it ended, once it has.
    fn step(&mut self) -> Option<Result<Vec<Repaired>, Unreadable>> {
        let damage = match self.read() {
            Ok(true) => return Some(Ok(std::mem::take(&mut self.repaired))),
            Ok(false) => return None,
            Err(damage) => damage,
        };
        self.reader = None;
        let segment_bytes = self.repairer.segment_bytes;
        let at = damage.gap().map_or(self.to, |gap| gap.from);
        let unreadable = |error| Unreadable { error, before: at.segment(segment_bytes).next().start(segment_bytes) };
        if self.repaired.len() >= REPAIRS_MAX {
            return Some(Err(unreadable(damage.into())));
        }
        tracing::warn!("{damage}");
        let last = self.repaired.last();
        match self.repairer.close_next(damage, last, &mut |text| tracing::debug!("{text}")) {
            Ok(repaired) => {
                // What was written is read again, and what it goes on from was: it fits.
                self.from = repaired.from;
                self.repaired.push(repaired);
            }
            Err(error) => return Some(Err(unreadable(error))),
        }
        None
    }

    /// True at the end, or when it is to end.
    fn read(&mut self) -> Result<bool, RecoverError> {
        let Repairer { data, segment_bytes, .. } = &self.repairer;
        let reader = match &mut self.reader {
            Some(reader) => reader,
            None => {
                give_way();
                self.reader.insert(LogReader::open(&data.join(LOG_DIR), *segment_bytes, self.from, self.to)?)
            }
        };
        for _ in 0..STEP_FRAMES {
            if self.stop.load(Ordering::Acquire) || reader.next_frame()?.is_none() {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
