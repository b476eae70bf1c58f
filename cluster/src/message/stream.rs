//! The messages of a running data link as bytes: chunks, heartbeats, acknowledgements. Frames have only an envelope (`codec`).

use walferry_engine::lsn::Epoch;

use super::types::{Ack, CHUNK_BYTES_MAX, Chunk, LinkHeartbeat, Traced};
use crate::error::MessageError;

use super::body::{Body, put_u64s};

pub(super) fn encode_chunk(out: &mut Vec<u8>, chunk: &Chunk) {
    assert!((1..=CHUNK_BYTES_MAX).contains(&chunk.bytes));
    put_u64s(out, &[chunk.lsn.0, chunk.bytes]);
}

pub(super) fn decode_chunk(mut body: Body<'_>) -> Result<Chunk, MessageError> {
    let chunk = Chunk { lsn: body.lsn()?, bytes: body.u64()? };
    if !(1..=CHUNK_BYTES_MAX).contains(&chunk.bytes) {
        return Err(body.field("length"));
    }
    body.end()?;
    Ok(chunk)
}

pub(super) fn encode_heartbeat(out: &mut Vec<u8>, heartbeat: &LinkHeartbeat) {
    assert!(heartbeat.committed <= heartbeat.flushed && heartbeat.flushed <= heartbeat.end, "{heartbeat:?}");
    put_u64s(
        out,
        &[
            heartbeat.end.0,
            heartbeat.flushed.0,
            heartbeat.committed.0,
            heartbeat.sent_at_us,
            heartbeat.epoch.0,
            heartbeat.stamp_us,
        ],
    );
}

pub(super) fn decode_heartbeat(mut body: Body<'_>) -> Result<LinkHeartbeat, MessageError> {
    let (end, flushed, committed) = (body.lsn()?, body.lsn()?, body.lsn()?);
    let (sent_at_us, epoch, stamp_us) = (body.u64()?, Epoch(body.u64()?), body.u64()?);
    let heartbeat = LinkHeartbeat { end, flushed, committed, sent_at_us, epoch, stamp_us };
    if heartbeat.committed > heartbeat.flushed || heartbeat.flushed > heartbeat.end {
        return Err(body.field("order of positions"));
    }
    body.end()?;
    Ok(heartbeat)
}

pub(super) fn encode_ack(out: &mut Vec<u8>, ack: &Ack) {
    assert!(ack.applied <= ack.flushed && ack.flushed <= ack.written, "{ack:?}");
    put_u64s(out, &[ack.written.0, ack.flushed.0, ack.applied.0, ack.echo_us]);
    for duration in [ack.echo_held_us, ack.write_us, ack.flush_us, ack.apply_us] {
        out.extend_from_slice(&duration.to_le_bytes());
    }
    put_u64s(out, &[ack.stamp_us]);
}

pub(super) fn decode_ack(mut body: Body<'_>) -> Result<Ack, MessageError> {
    let (written, flushed, applied, echo_us) = (body.lsn()?, body.lsn()?, body.lsn()?, body.u64()?);
    let [echo_held_us, write_us, flush_us, apply_us] = [body.u32()?, body.u32()?, body.u32()?, body.u32()?];
    let stamp_us = body.u64()?;
    if applied > flushed || flushed > written {
        return Err(body.field("order of positions"));
    }
    body.end()?;
    Ok(Ack { written, flushed, applied, echo_us, echo_held_us, write_us, flush_us, apply_us, stamp_us })
}

pub(super) fn encode_traced(out: &mut Vec<u8>, traced: &Traced) {
    assert!(traced.written_us <= traced.flushed_us && traced.flushed_us <= traced.applied_us, "{traced:?}");
    put_u64s(out, &[traced.end.0, traced.flushes, traced.records]);
    for duration in [traced.written_us, traced.flushed_us, traced.applied_us, 0] {
        out.extend_from_slice(&duration.to_le_bytes());
    }
}

pub(super) fn decode_traced(mut body: Body<'_>) -> Result<Traced, MessageError> {
    let (end, flushes, records) = (body.lsn()?, body.u64()?, body.u64()?);
    let [written_us, flushed_us, applied_us, zeros] = [body.u32()?, body.u32()?, body.u32()?, body.u32()?];
    if written_us > flushed_us || flushed_us > applied_us || zeros != 0 {
        return Err(body.field("order of durations"));
    }
    body.end()?;
    Ok(Traced { end, flushes, records, written_us, flushed_us, applied_us })
}
