//! Messages to bytes and back, in the layout that `message.rs` shows. Every length is checked against the bound of its
//! kind before anything is taken or allocated.

use std::io::Read;

use walferry_engine::limits::{FRAME_BYTES_MAX, FRAME_HEADER_BYTES};

use super::types::{ENVELOPE_BYTES, Message};
use crate::error::{MessageError, ReadError};

use super::body::Body;
use super::frames::{decode_fetch_frames, decode_fetched_frames, encode_fetch_frames, encode_fetched_frames};
use super::handshake::{decode_hello, decode_refuse, decode_welcome, encode_hello, encode_refuse, encode_welcome};
use super::kind::MessageKind;
use super::stream::{
    decode_ack, decode_chunk, decode_heartbeat, decode_traced, encode_ack, encode_chunk, encode_heartbeat,
    encode_traced,
};
use super::transfer::{
    decode_fetch, decode_offer, decode_piece, decode_preparing, encode_fetch, encode_offer, encode_piece,
    encode_preparing,
};

/// The type of the record that a TLS connection begins with, and the first byte of its version: what somebody who speaks TLS
/// says first to a port that does not.
pub const TLS_FIRST_BYTES: [u8; 2] = [0x16, 0x03];

/// What a node that proves the peer secret says first.
const PROOF_FIRST_BYTES: [u8; 4] = *b"WFPA";

/// The error for somebody whose first bytes, as many as an envelope has, are those of TLS, of a proof or of a port for clients, where
/// none of them is expected.
pub fn identify(first: &[u8]) -> Option<MessageError> {
    if first.starts_with(&PROOF_FIRST_BYTES) {
        return Some(MessageError::Proof);
    }
    // `-ERR` and the like.
    if first.first() == Some(&b'-') && first.get(1..4).is_some_and(|code| code.iter().all(u8::is_ascii_uppercase)) {
        return Some(MessageError::Clients);
    }
    let is_tls = first.starts_with(&TLS_FIRST_BYTES) && first.get(5..ENVELOPE_BYTES) != Some(&[0; 3]);
    is_tls.then_some(MessageError::Tls)
}

/// True for what peers begin to speak with, and no client does: an envelope, or the proof of the secret.
pub fn is_of_a_peer(first: &[u8]) -> bool {
    let envelope = first.len() >= ENVELOPE_BYTES && first[3] == 0 && first[5..ENVELOPE_BYTES] == [0; 3];
    envelope || first.starts_with(&PROOF_FIRST_BYTES)
}

/// The envelope's flag of a traced frame.
const FLAG_TRACED: u8 = 1;

/// The envelope of a frame; the frame's `wire_bytes` follow it on the wire.
pub fn frame_envelope(wire_bytes: usize, traced: bool) -> [u8; ENVELOPE_BYTES] {
    assert!((FRAME_HEADER_BYTES..=FRAME_BYTES_MAX).contains(&wire_bytes));
    let mut bytes = envelope(MessageKind::Frame, wire_bytes);
    bytes[5] = if traced { FLAG_TRACED } else { 0 };
    bytes
}

pub(super) fn envelope(kind: MessageKind, body_bytes: usize) -> [u8; ENVELOPE_BYTES] {
    let mut bytes = [0; ENVELOPE_BYTES];
    bytes[..4].copy_from_slice(&(body_bytes as u32).to_le_bytes());
    bytes[4] = kind as u8;
    bytes
}

/// Reads the next message from a stream that blocks, and not a byte beyond it.
pub fn read_message(stream: &mut impl Read) -> Result<Message, ReadError> {
    let mut bytes = vec![0; ENVELOPE_BYTES];
    stream.read_exact(&mut bytes)?;
    // Bounds the length before memory is allocated for the body.
    if let Some((message, _)) = decode(&bytes)? {
        return Ok(message);
    }
    let body = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize;
    bytes.resize(ENVELOPE_BYTES + body, 0);
    stream.read_exact(&mut bytes[ENVELOPE_BYTES..])?;
    let (message, _) = decode(&bytes)?.ok_or(MessageError::Envelope)?;
    Ok(message)
}

/// Takes the message at the start of `bytes`: the message and how many bytes it took. `None`: more bytes are needed.
/// For `Frame`, `Chunk`, `Piece` and `FetchedFrames` the raw bytes are not counted: they follow what was taken. Wrong bytes are noticed as soon
/// as the envelope is there; nothing is allocated beyond the bounds of the messages.
pub fn decode(bytes: &[u8]) -> Result<Option<(Message, usize)>, MessageError> {
    let Some((head, rest)) = bytes.split_at_checked(ENVELOPE_BYTES) else {
        return Ok(None);
    };
    let body_bytes = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
    let kind = MessageKind::from_number(head[4]);
    let flags_max = if kind == Some(MessageKind::Frame) { FLAG_TRACED } else { 0 };
    if head[5] > flags_max || head[6..] != [0; 2] {
        return Err(identify(head).unwrap_or(MessageError::Envelope));
    }
    let kind = kind.ok_or(MessageError::Kind(head[4]))?;
    let (bytes_min, bytes_max) = kind.body_bytes();
    if body_bytes > bytes_max {
        return Err(MessageError::Length { kind: kind.name(), bytes: body_bytes, bytes_max });
    }
    if body_bytes < bytes_min
        && !matches!(
            kind,
            MessageKind::Hello
                | MessageKind::Welcome
                | MessageKind::Fetch
                | MessageKind::Offer
                | MessageKind::FetchFrames
        )
    {
        return Err(MessageError::Body(kind.name()));
    }
    if kind == MessageKind::Frame {
        let traced = head[5] == FLAG_TRACED;
        return Ok(Some((Message::Frame { wire_bytes: body_bytes, traced }, ENVELOPE_BYTES)));
    }
    let Some(body) = rest.get(..body_bytes) else {
        return Ok(None);
    };
    let body = Body { kind, rest: body };
    let message = match kind {
        MessageKind::Hello => Message::Hello(decode_hello(body)?),
        MessageKind::Welcome => Message::Welcome(decode_welcome(body)?),
        MessageKind::Refuse => Message::Refuse(decode_refuse(body)?),
        MessageKind::Chunk => Message::Chunk(decode_chunk(body)?),
        MessageKind::LinkHeartbeat => Message::LinkHeartbeat(decode_heartbeat(body)?),
        MessageKind::Ack => Message::Ack(decode_ack(body)?),
        MessageKind::Traced => Message::Traced(decode_traced(body)?),
        MessageKind::Fetch => Message::Fetch(decode_fetch(body)?),
        MessageKind::Preparing => decode_preparing(body)?,
        MessageKind::Offer => Message::Offer(decode_offer(body)?),
        MessageKind::Piece => Message::Piece(decode_piece(body)?),
        MessageKind::FetchFrames => Message::FetchFrames(decode_fetch_frames(body)?),
        MessageKind::FetchedFrames => Message::FetchedFrames(decode_fetched_frames(body)?),
        MessageKind::Frame => unreachable!("returned above"),
    };
    Ok(Some((message, ENVELOPE_BYTES + body_bytes)))
}

impl Message {
    /// Appends the message's bytes to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&[0; ENVELOPE_BYTES]);
        let kind = match self {
            Message::Hello(hello) => {
                encode_hello(out, hello);
                MessageKind::Hello
            }
            Message::Welcome(welcome) => {
                encode_welcome(out, welcome);
                MessageKind::Welcome
            }
            Message::Refuse(refuse) => {
                encode_refuse(out, refuse);
                MessageKind::Refuse
            }
            Message::Frame { wire_bytes, traced } => {
                out.truncate(start);
                out.extend_from_slice(&frame_envelope(*wire_bytes, *traced));
                return;
            }
            Message::Chunk(chunk) => {
                encode_chunk(out, chunk);
                MessageKind::Chunk
            }
            Message::LinkHeartbeat(heartbeat) => {
                encode_heartbeat(out, heartbeat);
                MessageKind::LinkHeartbeat
            }
            Message::Ack(ack) => {
                encode_ack(out, ack);
                MessageKind::Ack
            }
            Message::Traced(traced) => {
                encode_traced(out, traced);
                MessageKind::Traced
            }
            Message::Fetch(fetch) => {
                encode_fetch(out, fetch);
                MessageKind::Fetch
            }
            Message::Preparing { done, total } => {
                encode_preparing(out, *done, *total);
                MessageKind::Preparing
            }
            Message::Offer(offer) => {
                encode_offer(out, offer);
                MessageKind::Offer
            }
            Message::Piece(piece) => {
                encode_piece(out, piece);
                MessageKind::Piece
            }
            Message::FetchFrames(request) => {
                encode_fetch_frames(out, request);
                MessageKind::FetchFrames
            }
            Message::FetchedFrames(frames) => {
                encode_fetched_frames(out, frames);
                MessageKind::FetchedFrames
            }
        };
        let body_bytes = out.len() - start - ENVELOPE_BYTES;
        out[start..start + ENVELOPE_BYTES].copy_from_slice(&envelope(kind, body_bytes));
    }
}
