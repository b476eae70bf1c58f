//! The question for lost frames, and its answer, as bytes.

use walferry_engine::lsn::Lsn;

use super::types::{FETCHED_FRAMES_BYTES_MAX, FetchFrames, FetchedFrames};
use crate::error::MessageError;
use crate::member::ClusterId;

use super::body::{Body, FLAG_CRC, put_handshake, put_history, put_u64s};

pub(super) fn encode_fetch_frames(out: &mut Vec<u8>, request: &FetchFrames) {
    let start = out.len();
    assert!(request.from < request.to, "{request:?}");
    put_handshake(out, request.protocol, &request.name, "", Some(request.cluster_id));
    out[start + 7] = if request.crc.is_some() { FLAG_CRC } else { 0 };
    put_u64s(out, &[request.from.0, request.segment_bytes, request.to.0]);
    out.extend_from_slice(&request.crc.unwrap_or(0).to_le_bytes());
    put_history(out, &request.history);
    out.extend_from_slice(request.name.as_str().as_bytes());
}

pub(super) fn decode_fetch_frames(mut body: Body<'_>) -> Result<FetchFrames, MessageError> {
    let (protocol, ours) = body.version()?;
    if !ours {
        let name = "unknown".parse().expect("a name");
        let (cluster_id, from, to, history) = (ClusterId(0), Lsn::ZERO, Lsn(1), Vec::new());
        return Ok(FetchFrames { protocol, cluster_id, name, from, to, segment_bytes: 0, crc: None, history });
    }
    let [name_bytes, flags] = body.number()?;
    let cluster_id = ClusterId(u128::from_le_bytes(body.number()?));
    let (from, segment_bytes, to) = (body.lsn()?, body.u64()?, body.lsn()?);
    let crc = body.u32()?;
    if flags > FLAG_CRC || (flags == 0 && crc != 0) {
        return Err(body.field("flag"));
    }
    if from >= to {
        return Err(body.field("order of positions"));
    }
    let history = body.history()?;
    let name = body.name(name_bytes)?;
    body.end()?;
    let crc = (flags == FLAG_CRC).then_some(crc);
    Ok(FetchFrames { protocol, cluster_id, name, from, to, segment_bytes, crc, history })
}

pub(super) fn encode_fetched_frames(out: &mut Vec<u8>, frames: &FetchedFrames) {
    assert!((1..=FETCHED_FRAMES_BYTES_MAX).contains(&frames.bytes));
    put_u64s(out, &[frames.from.0, frames.bytes]);
}

pub(super) fn decode_fetched_frames(mut body: Body<'_>) -> Result<FetchedFrames, MessageError> {
    let frames = FetchedFrames { from: body.lsn()?, bytes: body.u64()? };
    if !(1..=FETCHED_FRAMES_BYTES_MAX).contains(&frames.bytes) {
        return Err(body.field("length"));
    }
    body.end()?;
    Ok(frames)
}
