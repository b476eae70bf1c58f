//! What must hold at the end of every run.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use walferry_applier::record::{Fields, StreamId};
use walferry_applier::store::StoreError;
use walferry_applier::view::{Value, View};
use walferry_cluster::level::CommitLevel;
use walferry_engine::log::LOST_DIR;
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_node::simulated::Member;

use crate::clients::Acknowledged;
use crate::growing::{END, Growing, tokens};
use crate::limits::Broken;
use crate::lost::{keeps_a_store, lost_frames};
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

/// What a node acknowledged when it had it on its disk, and the log has not any more, is in the node's `lost/`.
pub fn what_was_cut_off_is_kept<'a>(
    acknowledged: impl Iterator<Item = &'a Acknowledged>,
    leader: &Member,
    data: &Path,
) -> Result<(), Broken> {
    let mut kept = None;
    for ack in acknowledged.filter(|ack| ack.level >= CommitLevel::Local) {
        let found = leader.store().get(ack.key.as_bytes()).map_err(|error| Broken(error.to_string()))?;
        if found.is_some() {
            continue;
        }
        if kept.is_none() {
            let files = lost_frames(data).map_err(Broken)?;
            kept = Some(files.into_values().flat_map(|file| file.puts).collect::<BTreeMap<_, _>>());
        }
        let value = kept.as_ref().and_then(|kept| kept.get(ack.key.as_bytes()));
        if value.is_none_or(|value| value != ack.value.as_bytes()) && !keeps_a_store(data) {
            return Err(Broken(format!(
                "{} was acknowledged at {} in epoch {} by node {} at {} us, was cut off, and is not in {}/{LOST_DIR}",
                ack.key,
                ack.level,
                ack.epoch,
                ack.node,
                ack.at_us,
                data.display()
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
            let mut bytes = vec![0; (until - at) as usize];
            let file = File::open(member.segment_path(at));
            let read = file.and_then(|file| file.read_exact_at(&mut bytes, at.offset(segment_bytes)));
            read.map(|()| bytes).map_err(|error| Broken(error.to_string()))
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

/// What the keys of growing values hold: tokens and their places, the length with them or their ids.
pub fn grown(growing: &Growing, leader: &Member) -> Result<BTreeMap<String, Vec<(String, String)>>, Broken> {
    let broken = |error: StoreError| Broken(error.to_string());
    let mut held = BTreeMap::new();
    for key in growing.keys() {
        let mut all = Vec::new();
        match leader.store().get(key.as_bytes()).map_err(broken)? {
            None => {}
            Some(Value::String(text)) => {
                let mut length = 0;
                for token in tokens(&String::from_utf8_lossy(&text)) {
                    length += token.len() + END.len_utf8();
                    all.push((token, length.to_string()));
                }
            }
            Some(Value::Stream(_)) => {
                let mut take = |id: StreamId, fields: &[u8]| {
                    let token = Fields::new(fields).nth(1).map(String::from_utf8_lossy).unwrap_or_default();
                    all.push((token.into_owned(), format!("{}-{}", id.0, id.1)));
                    true
                };
                let (first, last) = ((0, 0), (u64::MAX, u64::MAX));
                let read = leader.store().stream_range(key.as_bytes(), first, last, false, usize::MAX, &mut take);
                read.map_err(broken)?;
            }
        }
        held.insert(key, all);
    }
    Ok(held)
}
