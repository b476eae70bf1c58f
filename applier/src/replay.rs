//! From the log into the store: frames that just became durable come from memory, older ones from the segment files. Called once
//! a turn by leader and replica alike; knows nothing of links.

use walferry_engine::error::RecoverError;
use walferry_engine::log::Log;
use walferry_engine::lsn::Lsn;
use walferry_engine::reader::LogReader;

use crate::store::{Store, StoreError};

/// Bytes of frames that are applied in one turn at most: what one turn may cost the clients.
const APPLY_BYTES_PER_TURN_MAX: u64 = 4 << 20;

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

/// Applies what is durable here and ends at or before `limit`. True when there is more to do at once.
pub fn apply_flushed(log: &mut Log, store: &mut Store, limit: Lsn) -> Result<bool, ReplayError> {
    if store.applied() < log.taken() {
        return replay_files(log, store, limit);
    }
    let begun = store.applied();
    while let Some(frame) = log.next_flushed_until(limit) {
        store.apply(&frame)?;
        if store.applied().since(begun) >= APPLY_BYTES_PER_TURN_MAX {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Applies from the segment files what the log handed out before this process or a rollback.
fn replay_files(log: &Log, store: &mut Store, limit: Lsn) -> Result<bool, ReplayError> {
    let until = log.taken().min(limit);
    let mut reader = LogReader::open(log.log_dir(), log.config().segment_bytes, store.applied(), until)?;
    while let Some(frame) = reader.next_frame()? {
        if frame.header().end() > until {
            return Ok(false);
        }
        store.apply(&frame)?;
    }
    Ok(store.applied() == log.taken())
}
