//! The messages of a snapshot transfer as bytes.

use walferry_engine::lsn::Lsn;

use super::types::{Fetch, Message, Offer, Piece};
use crate::error::MessageError;
use crate::member::ClusterId;
use crate::snapshot::{PIECE_BYTES, SNAPSHOT_BYTES_MAX};

use super::body::{Body, put_handshake, put_history, put_u64s};

pub(super) fn encode_fetch(out: &mut Vec<u8>, fetch: &Fetch) {
    put_handshake(out, fetch.protocol, &fetch.name, "", fetch.cluster_id);
    put_u64s(out, &[fetch.floor.0, fetch.segment_bytes, fetch.snapshot.0, fetch.offset]);
    out.extend_from_slice(&u32::from(fetch.suspect).to_le_bytes());
    out.extend_from_slice(fetch.name.as_str().as_bytes());
}

pub(super) fn decode_fetch(mut body: Body<'_>) -> Result<Fetch, MessageError> {
    let (protocol, ours) = body.version()?;
    if !ours {
        let name = "unknown".parse().expect("a name");
        let (floor, snapshot) = (Lsn::ZERO, Lsn::ZERO);
        let (cluster_id, segment_bytes, offset, suspect) = (None, 0, 0, false);
        return Ok(Fetch { protocol, cluster_id, name, floor, segment_bytes, snapshot, offset, suspect });
    }
    let [name_bytes, zero] = body.number()?;
    let id = u128::from_le_bytes(body.number()?);
    let cluster_id = (id != 0).then_some(ClusterId(id));
    let (floor, segment_bytes, snapshot, offset) = (body.lsn()?, body.u64()?, body.lsn()?, body.u64()?);
    let suspect = body.u32()?;
    if zero != 0 || suspect > 1 {
        return Err(body.field("flag"));
    }
    if offset > SNAPSHOT_BYTES_MAX {
        return Err(body.field("offset"));
    }
    let name = body.name(name_bytes)?;
    body.end()?;
    Ok(Fetch { protocol, cluster_id, name, floor, segment_bytes, snapshot, offset, suspect: suspect == 1 })
}

pub(super) fn encode_preparing(out: &mut Vec<u8>, done: u64, total: u64) {
    put_u64s(out, &[done.min(total), total]);
}

pub(super) fn decode_preparing(mut body: Body<'_>) -> Result<Message, MessageError> {
    let (done, total) = (body.u64()?, body.u64()?);
    if done > total {
        return Err(body.field("progress"));
    }
    body.end()?;
    Ok(Message::Preparing { done, total })
}

pub(super) fn encode_offer(out: &mut Vec<u8>, offer: &Offer) {
    assert!((1..=SNAPSHOT_BYTES_MAX).contains(&offer.bytes) && offer.offset <= offer.bytes, "{offer:?}");
    put_handshake(out, offer.protocol, &offer.name, "", Some(offer.cluster_id));
    put_u64s(out, &[offer.snapshot.0, offer.segment_bytes, offer.bytes, offer.offset]);
    out.extend_from_slice(&offer.crc.to_le_bytes());
    put_history(out, &offer.history);
    out.extend_from_slice(offer.name.as_str().as_bytes());
}

pub(super) fn decode_offer(mut body: Body<'_>) -> Result<Offer, MessageError> {
    let (protocol, ours) = body.version()?;
    if !ours {
        return Err(body.field("protocol version"));
    }
    let [name_bytes, zero] = body.number()?;
    let cluster_id = ClusterId(u128::from_le_bytes(body.number()?));
    let (snapshot, segment_bytes, bytes, offset) = (body.lsn()?, body.u64()?, body.u64()?, body.u64()?);
    if zero != 0 || !(1..=SNAPSHOT_BYTES_MAX).contains(&bytes) || offset > bytes {
        return Err(body.field("length"));
    }
    let crc = body.u32()?;
    let history = body.history()?;
    let name = body.name(name_bytes)?;
    body.end()?;
    Ok(Offer { protocol, cluster_id, name, snapshot, segment_bytes, bytes, offset, crc, history })
}

pub(super) fn encode_piece(out: &mut Vec<u8>, piece: &Piece) {
    assert!((1..=PIECE_BYTES as u32).contains(&piece.bytes));
    put_u64s(out, &[piece.offset]);
    out.extend_from_slice(&piece.bytes.to_le_bytes());
    out.extend_from_slice(&piece.crc.to_le_bytes());
}

pub(super) fn decode_piece(mut body: Body<'_>) -> Result<Piece, MessageError> {
    let piece = Piece { offset: body.u64()?, bytes: body.u32()?, crc: body.u32()? };
    if !(1..=PIECE_BYTES as u32).contains(&piece.bytes) {
        return Err(body.field("length"));
    }
    body.end()?;
    Ok(piece)
}
