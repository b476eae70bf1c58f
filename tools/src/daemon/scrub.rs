//! Reads the part of the log that recovery did not: what the store holds already, kept for replicas that are behind. A thread
//! walks it after the start, again after `scrub_interval`, and whenever a replica could not be fed from it; damage is repaired
//! from other nodes while the node runs. Segments before its end are written by nobody else, and none is recycled meanwhile: the
//! node asks `hold`, and puts no base copy in the log's place before the thread has ended.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};

use walferry_applier::repair::{RepairError, Repaired, Repairer};
use walferry_engine::error::RecoverError;
use walferry_engine::log::LOG_DIR;
use walferry_engine::lsn::Lsn;
use walferry_engine::reader::LogReader;
use walferry_engine::waker::Waker;
use walferry_shipper::base::serve::give_way;

/// Repairs of one walk, at most: a disk that is beyond this is not worth the peers' time.
const REPAIRS_MAX: usize = 1024;

/// A walk on its way; dropped, it ends with the frame at hand.
pub(super) struct Scrub {
    from: Lsn,
    stop: Arc<AtomicBool>,
    outcome: Receiver<Result<Vec<Repaired>, RepairError>>,
}

impl Scrub {
    /// Begins to read from `from` up to `to`, both where frames begin, where a segment begins at the latest.
    pub(super) fn start(repairer: Repairer, from: Lsn, to: Lsn, waker: Waker) -> std::io::Result<Scrub> {
        let stop = Arc::new(AtomicBool::new(false));
        let (outbox, outcome) = channel();
        let stopping = Arc::clone(&stop);
        std::thread::Builder::new().name("scrub".to_owned()).spawn(move || {
            give_way();
            // Nobody listens any more when the node has ended.
            let _ = outbox.send(walk(&repairer, from, to, &stopping));
            waker.wake();
        })?;
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
    pub(super) fn outcome(&self) -> Option<Result<Vec<Repaired>, RepairError>> {
        self.outcome.try_recv().ok()
    }
}

impl Drop for Scrub {
    fn drop(&mut self) {
        self.stop();
    }
}

fn walk(repairer: &Repairer, from: Lsn, to: Lsn, stop: &AtomicBool) -> Result<Vec<Repaired>, RepairError> {
    let mut repaired: Vec<Repaired> = Vec::new();
    loop {
        let damage = match read(repairer, from, to, stop) {
            Ok(()) => return Ok(repaired),
            Err(damage) => damage,
        };
        if repaired.len() >= REPAIRS_MAX {
            return Err(damage.into());
        }
        tracing::warn!("{damage}");
        repaired.push(repairer.close_next(damage, repaired.last(), &mut |text| tracing::debug!("{text}"))?);
    }
}

fn read(repairer: &Repairer, from: Lsn, to: Lsn, stop: &AtomicBool) -> Result<(), RecoverError> {
    let mut reader = LogReader::open(&repairer.data.join(LOG_DIR), repairer.segment_bytes, from, to)?;
    while !stop.load(Ordering::Acquire) && reader.next_frame()?.is_some() {}
    Ok(())
}
