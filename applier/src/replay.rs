//! From the log into the store: frames that just became durable come from memory, older ones from the segment files. Called once
//! a turn by leader and replica alike; knows nothing of links.

use walferry_engine::error::RecoverError;
use walferry_engine::log::Log;
use walferry_engine::lsn::Lsn;
use walferry_engine::reader::LogReader;

use crate::store::{Store, StoreError};

/// Bytes of frames that are applied in one turn at most, and one frame: what one turn may cost the clients.
pub const APPLY_BYTES_PER_TURN_MAX: u64 = 4 << 20;

/// How applying ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// There is more to do at once.
    More,
    /// The store has everything that it may have now.
    All,
    /// Too many changes wait in memory for a checkpoint; its end wakes the node.
    Waits,
}

/// Why the log cannot be applied. Fatal for the node.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The log cannot be read back.
    #[error(transparent)]
    Log(#[from] RecoverError),
    /// The store cannot take it.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Applies what is durable here and ends at or before `limit`, as far as the store has memory for it. What the log holds back
/// meanwhile fills the log buffer, and then whoever sends to it waits.
pub fn apply_flushed(log: &mut Log, store: &mut Store, limit: Lsn) -> Result<Applied, ReplayError> {
    if store.applied() < log.taken() {
        return replay_files(log, store, limit);
    }
    let begun = store.applied();
    while !store.overloaded() {
        let Some(frame) = log.next_flushed_until(limit) else { return Ok(Applied::All) };
        store.apply(&frame)?;
        if store.applied().since(begun) >= APPLY_BYTES_PER_TURN_MAX {
            return Ok(Applied::More);
        }
    }
    Ok(Applied::Waits)
}

/// Applies from the segment files what the log handed out before this process or a rollback, as much as one turn may.
fn replay_files(log: &Log, store: &mut Store, limit: Lsn) -> Result<Applied, ReplayError> {
    if store.overloaded() {
        return Ok(Applied::Waits);
    }
    let (begun, until) = (store.applied(), log.taken().min(limit));
    let mut reader = LogReader::open(log.log_dir(), log.config().segment_bytes, begun, until)?;
    while let Some(frame) = reader.next_frame()? {
        if frame.header().end() > until {
            return Ok(Applied::All);
        }
        store.apply(&frame)?;
        if store.overloaded() {
            return Ok(Applied::Waits);
        }
        if store.applied().since(begun) >= APPLY_BYTES_PER_TURN_MAX {
            return Ok(Applied::More);
        }
    }
    Ok(if store.applied() == log.taken() { Applied::More } else { Applied::All })
}

#[cfg(test)]
#[path = "replay_tests.rs"]
mod tests;
