//! What must hold at the end of every run.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use walferry::simulated::Member;
use walferry_applier::record::{Effect, effects};
use walferry_applier::view::{Value, View};
use walferry_cluster::level::CommitLevel;
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_engine::reader::LogReader;

use crate::clients::Acknowledged;
use crate::cluster::Broken;
use crate::world::NodeNo;

/// Every write that was acknowledged at a level that survives what happened is there.
pub fn nothing_acknowledged_is_lost(
    acknowledged: &[Acknowledged],
    member: &Member,
    leaders: &[(Epoch, NodeNo)],
) -> Result<(), Broken> {
    for ack in acknowledged {
        // What is durable on its leader alone is there as long as no other node took over.
        let stayed = || leaders.iter().all(|(epoch, leader)| *epoch <= ack.epoch || *leader == ack.node);
        let promised = ack.level >= CommitLevel::RemoteFlush || ack.level == CommitLevel::Local && stayed();
        if !promised {
            continue;
        }
        let found = member.store().get(ack.key.as_bytes()).map_err(|error| Broken(error.to_string()))?;
        let whole = matches!(&found, Some(Value::String(value)) if value[..] == *ack.value.as_bytes());
        if !whole {
            let is = if found.is_some() { "is another" } else { "is gone" };
            return Err(Broken(format!(
                "{} was acknowledged at {} in epoch {} by node {} at {} us, and {is}",
                ack.key, ack.level, ack.epoch, ack.node, ack.at_us
            )));
        }
    }
    Ok(())
}

/// What a leader once held to be confirmed stays in the log, whether anybody waited for it or not.
pub fn nothing_confirmed_is_taken_back(confirmed: &BTreeMap<Epoch, Lsn>, leader: &Member) -> Result<(), Broken> {
    for (epoch, lsn) in confirmed.iter().filter(|(_, lsn)| **lsn > Lsn::ZERO) {
        if leader.sealed() < *lsn || leader.history().epoch_of_end(*lsn) != *epoch {
            return Err(Broken(format!("the log up to {lsn}, of epoch {epoch}, was confirmed, and was taken back")));
        }
    }
    Ok(())
}

/// Both logs are the same, byte for byte, where both have it.
pub fn logs_agree(ours: &Member, theirs: &Member, end: Lsn, segment_bytes: u64) -> Result<(), Broken> {
    let mut at = ours.log_start().max(theirs.log_start());
    while at < end {
        let until = at.segment(segment_bytes).next().start(segment_bytes).min(end);
        let read = |member: &Member| {
            let bytes = fs::read(member.segment_path(at)).map_err(|error| Broken(error.to_string()))?;
            let from = at.offset(segment_bytes) as usize;
            Ok(bytes[from..from + (until - at) as usize].to_vec())
        };
        let (our_bytes, their_bytes) = (read(ours)?, read(theirs)?);
        if our_bytes != their_bytes {
            let differ = || our_bytes.iter().zip(&their_bytes).enumerate().filter(|(_, (our, their))| our != their);
            let (first, count) = (differ().next().map_or(0, |(index, _)| index as u64), differ().count());
            let first = at.advance(first);
            return Err(Broken(format!("the logs differ at {first}, in {count} bytes before {until}")));
        }
        at = until;
    }
    Ok(())
}

/// The store of a node holds what its log says, and nothing else.
pub fn state_is_the_log(member: &Member, dir: &Path) -> Result<(), Broken> {
    let broken = |error: &dyn std::fmt::Display| Broken(format!("{}: {error}", dir.display()));
    if member.log_start() > Lsn::ZERO {
        return Ok(());
    }
    let log_dir = dir.join(walferry_engine::log::LOG_DIR);
    let segment_bytes = crate::cluster::SEGMENT_BYTES;
    let reader = LogReader::open(&log_dir, segment_bytes, Lsn::ZERO, member.applied());
    let mut reader = reader.map_err(|error| broken(&error))?;
    let mut state: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
    while let Some(frame) = reader.next_frame().map_err(|error| broken(&error))? {
        for (_, record) in frame.records() {
            for effect in effects(record) {
                match effect.map_err(|error| broken(&error))? {
                    Effect::Put { key, value } => drop(state.insert(key.to_vec(), value.to_vec())),
                    Effect::Delete { key } => drop(state.remove(key)),
                    other => return Err(Broken(format!("an effect that no client asked for: {other:?}"))),
                }
            }
        }
    }
    let store = member.store();
    let count = store.len().map_err(|error| broken(&error))?;
    if count != state.len() as u64 {
        return Err(Broken(format!("{}: the store has {count} keys, its log {}", dir.display(), state.len())));
    }
    for (key, value) in &state {
        let found = store.get(key).map_err(|error| broken(&error))?;
        if !matches!(&found, Some(Value::String(found)) if found[..] == value[..]) {
            let key = String::from_utf8_lossy(key);
            return Err(Broken(format!("{}: {key} is not what the log says", dir.display())));
        }
    }
    Ok(())
}
