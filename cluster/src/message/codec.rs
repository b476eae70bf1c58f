//! Messages to bytes and back, in the layout that `message.rs` shows. Every length is checked against the bound of its
//! kind before anything is taken or allocated.

use std::io::Read;

use walferry_engine::limits::{FRAME_BYTES_MAX, FRAME_HEADER_BYTES};
use walferry_engine::lsn::{Epoch, Lsn};

use super::{
    ACK_BODY_BYTES, ADDRESS_BYTES_MAX, Ack, CHUNK_BYTES_MAX, Chunk, ENVELOPE_BYTES, EPOCH_BYTES,
    EPOCHS_PER_MESSAGE_MAX, FETCH_FIXED_BYTES, FETCH_FRAMES_FIXED_BYTES, FETCHED_FRAMES_BODY_BYTES,
    FETCHED_FRAMES_BYTES_MAX, Fetch, FetchFrames, FetchedFrames, HEARTBEAT_BODY_BYTES, HELLO_FIXED_BYTES, Hello,
    LinkHeartbeat, MESSAGE_BYTES_MAX, Message, OFFER_FIXED_BYTES, Offer, PIECE_BODY_BYTES, PREPARING_BODY_BYTES,
    PROTOCOL_VERSION, Piece, REFUSE_FIXED_BYTES, REFUSE_TEXT_BYTES_MAX, Refuse, RefuseCode, TRACED_BODY_BYTES, Traced,
    WELCOME_FIXED_BYTES, Welcome,
};
use crate::error::{MessageError, ReadError};
use crate::member::{ClusterId, MEMBER_NAME_BYTES_MAX, MemberName};
use crate::policy::{POLICY_TEXT_BYTES_MAX, SyncPolicy};
use crate::register::MemberId;
use crate::snapshot::{PIECE_BYTES, SNAPSHOT_BYTES_MAX};

const MAGIC: [u8; 4] = *b"WFPR";
const CHUNK_BODY_BYTES: usize = 16;
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
/// The flag of FetchFrames of a crc that is known.
const FLAG_CRC: u8 = 1;

/// The number of a message in its envelope.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(super) enum Kind {
    Hello = 1,
    Welcome = 2,
    Refuse = 3,
    Frame = 4,
    Chunk = 5,
    LinkHeartbeat = 6,
    Ack = 7,
    Traced = 8,
    // 9 is what members ask each other, see `control.rs`.
    Fetch = 16,
    Preparing = 17,
    Offer = 18,
    Piece = 19,
    FetchFrames = 20,
    FetchedFrames = 21,
}

impl Kind {
    fn from_number(number: u8) -> Option<Kind> {
        use Kind::*;
        const ALL: [Kind; 14] = [
            Hello,
            Welcome,
            Refuse,
            Frame,
            Chunk,
            LinkHeartbeat,
            Ack,
            Traced,
            Fetch,
            Preparing,
            Offer,
            Piece,
            FetchFrames,
            FetchedFrames,
        ];
        ALL.into_iter().find(|kind| *kind as u8 == number)
    }

    const fn name(self) -> &'static str {
        match self {
            Kind::Hello => "Hello",
            Kind::Welcome => "Welcome",
            Kind::Refuse => "Refuse",
            Kind::Frame => "Frame",
            Kind::Chunk => "Chunk",
            Kind::LinkHeartbeat => "LinkHeartbeat",
            Kind::Ack => "Ack",
            Kind::Traced => "Traced",
            Kind::Fetch => "Fetch",
            Kind::Preparing => "Preparing",
            Kind::Offer => "Offer",
            Kind::Piece => "Piece",
            Kind::FetchFrames => "FetchFrames",
            Kind::FetchedFrames => "FetchedFrames",
        }
    }

    const fn body_bytes(self) -> (usize, usize) {
        const HANDSHAKE_MAX: usize = MESSAGE_BYTES_MAX - ENVELOPE_BYTES;
        match self {
            Kind::Hello => (HELLO_FIXED_BYTES + 1, HANDSHAKE_MAX),
            Kind::Welcome => (WELCOME_FIXED_BYTES + 1, HANDSHAKE_MAX),
            Kind::Refuse => (REFUSE_FIXED_BYTES, REFUSE_FIXED_BYTES + REFUSE_TEXT_BYTES_MAX),
            Kind::Frame => (FRAME_HEADER_BYTES, FRAME_BYTES_MAX),
            Kind::Chunk => (CHUNK_BODY_BYTES, CHUNK_BODY_BYTES),
            Kind::LinkHeartbeat => (HEARTBEAT_BODY_BYTES, HEARTBEAT_BODY_BYTES),
            Kind::Ack => (ACK_BODY_BYTES, ACK_BODY_BYTES),
            Kind::Traced => (TRACED_BODY_BYTES, TRACED_BODY_BYTES),
            Kind::Fetch => (FETCH_FIXED_BYTES + 1, FETCH_FIXED_BYTES + MEMBER_NAME_BYTES_MAX),
            Kind::Preparing => (PREPARING_BODY_BYTES, PREPARING_BODY_BYTES),
            Kind::Offer => (OFFER_FIXED_BYTES + 1, HANDSHAKE_MAX),
            Kind::Piece => (PIECE_BODY_BYTES, PIECE_BODY_BYTES),
            Kind::FetchFrames => (FETCH_FRAMES_FIXED_BYTES + 1, HANDSHAKE_MAX),
            Kind::FetchedFrames => (FETCHED_FRAMES_BODY_BYTES, FETCHED_FRAMES_BODY_BYTES),
        }
    }
}

/// The envelope of a frame; the frame's `wire_bytes` follow it on the wire.
pub fn frame_envelope(wire_bytes: usize, traced: bool) -> [u8; ENVELOPE_BYTES] {
    assert!((FRAME_HEADER_BYTES..=FRAME_BYTES_MAX).contains(&wire_bytes));
    let mut bytes = envelope(Kind::Frame, wire_bytes);
    bytes[5] = if traced { FLAG_TRACED } else { 0 };
    bytes
}

pub(super) fn envelope(kind: Kind, body_bytes: usize) -> [u8; ENVELOPE_BYTES] {
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
    let kind = Kind::from_number(head[4]);
    let flags_max = if kind == Some(Kind::Frame) { FLAG_TRACED } else { 0 };
    if head[5] > flags_max || head[6..] != [0; 2] {
        return Err(identify(head).unwrap_or(MessageError::Envelope));
    }
    let kind = kind.ok_or(MessageError::Kind(head[4]))?;
    let (bytes_min, bytes_max) = kind.body_bytes();
    if body_bytes > bytes_max {
        return Err(MessageError::Length { kind: kind.name(), bytes: body_bytes, bytes_max });
    }
    if body_bytes < bytes_min
        && !matches!(kind, Kind::Hello | Kind::Welcome | Kind::Fetch | Kind::Offer | Kind::FetchFrames)
    {
        return Err(MessageError::Body(kind.name()));
    }
    if kind == Kind::Frame {
        let traced = head[5] == FLAG_TRACED;
        return Ok(Some((Message::Frame { wire_bytes: body_bytes, traced }, ENVELOPE_BYTES)));
    }
    let Some(body) = rest.get(..body_bytes) else {
        return Ok(None);
    };
    let body = Body { kind, rest: body };
    let message = match kind {
        Kind::Hello => Message::Hello(decode_hello(body)?),
        Kind::Welcome => Message::Welcome(decode_welcome(body)?),
        Kind::Refuse => Message::Refuse(decode_refuse(body)?),
        Kind::Chunk => Message::Chunk(decode_chunk(body)?),
        Kind::LinkHeartbeat => Message::LinkHeartbeat(decode_heartbeat(body)?),
        Kind::Ack => Message::Ack(decode_ack(body)?),
        Kind::Traced => Message::Traced(decode_traced(body)?),
        Kind::Fetch => Message::Fetch(decode_fetch(body)?),
        Kind::Preparing => decode_preparing(body)?,
        Kind::Offer => Message::Offer(decode_offer(body)?),
        Kind::Piece => Message::Piece(decode_piece(body)?),
        Kind::FetchFrames => Message::FetchFrames(decode_fetch_frames(body)?),
        Kind::FetchedFrames => Message::FetchedFrames(decode_fetched_frames(body)?),
        Kind::Frame => unreachable!("returned above"),
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
                let address = cut(&hello.client_address, ADDRESS_BYTES_MAX);
                put_handshake(out, hello.protocol, &hello.name, address, hello.cluster_id);
                put_u64s(out, &[hello.flushed.0, hello.segment_bytes]);
                out.extend_from_slice(&hello.crc.to_le_bytes());
                put_u64s(out, &[hello.member.0, hello.gives_up.0]);
                put_history(out, &hello.history);
                out.extend_from_slice(hello.name.as_str().as_bytes());
                out.extend_from_slice(address.as_bytes());
                Kind::Hello
            }
            Message::Welcome(welcome) => {
                let address = cut(&welcome.client_address, ADDRESS_BYTES_MAX);
                put_handshake(out, welcome.protocol, &welcome.name, address, Some(welcome.cluster_id));
                put_u64s(out, &[welcome.start.0, welcome.segment_bytes]);
                out.extend_from_slice(&welcome.heartbeat_ms.to_le_bytes());
                put_history(out, &welcome.history);
                out.extend_from_slice(welcome.name.as_str().as_bytes());
                out.extend_from_slice(address.as_bytes());
                out.extend_from_slice(welcome.policy.to_string().as_bytes());
                Kind::Welcome
            }
            Message::Refuse(refuse) => {
                out.extend_from_slice(&(refuse.code as u16).to_le_bytes());
                out.extend_from_slice(&[0; 2]);
                out.extend_from_slice(cut(&refuse.text, REFUSE_TEXT_BYTES_MAX).as_bytes());
                Kind::Refuse
            }
            Message::Frame { wire_bytes, traced } => {
                out.truncate(start);
                out.extend_from_slice(&frame_envelope(*wire_bytes, *traced));
                return;
            }
            Message::Chunk(chunk) => {
                assert!((1..=CHUNK_BYTES_MAX).contains(&chunk.bytes));
                put_u64s(out, &[chunk.lsn.0, chunk.bytes]);
                Kind::Chunk
            }
            Message::LinkHeartbeat(heartbeat) => {
                assert!(
                    heartbeat.committed <= heartbeat.flushed && heartbeat.flushed <= heartbeat.end,
                    "{heartbeat:?}"
                );
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
                Kind::LinkHeartbeat
            }
            Message::Ack(ack) => {
                assert!(ack.applied <= ack.flushed && ack.flushed <= ack.written, "{ack:?}");
                put_u64s(out, &[ack.written.0, ack.flushed.0, ack.applied.0, ack.echo_us]);
                for duration in [ack.echo_held_us, ack.write_us, ack.flush_us, ack.apply_us] {
                    out.extend_from_slice(&duration.to_le_bytes());
                }
                put_u64s(out, &[ack.stamp_us]);
                Kind::Ack
            }
            Message::Traced(traced) => {
                assert!(traced.written_us <= traced.flushed_us && traced.flushed_us <= traced.applied_us, "{traced:?}");
                put_u64s(out, &[traced.end.0, traced.flushes, traced.records]);
                for duration in [traced.written_us, traced.flushed_us, traced.applied_us, 0] {
                    out.extend_from_slice(&duration.to_le_bytes());
                }
                Kind::Traced
            }
            Message::Fetch(fetch) => {
                put_handshake(out, fetch.protocol, &fetch.name, "", fetch.cluster_id);
                put_u64s(out, &[fetch.floor.0, fetch.segment_bytes, fetch.snapshot.0, fetch.offset]);
                out.extend_from_slice(&u32::from(fetch.suspect).to_le_bytes());
                out.extend_from_slice(fetch.name.as_str().as_bytes());
                Kind::Fetch
            }
            Message::Preparing { done, total } => {
                put_u64s(out, &[*done.min(total), *total]);
                Kind::Preparing
            }
            Message::Offer(offer) => {
                assert!((1..=SNAPSHOT_BYTES_MAX).contains(&offer.bytes) && offer.offset <= offer.bytes, "{offer:?}");
                put_handshake(out, offer.protocol, &offer.name, "", Some(offer.cluster_id));
                put_u64s(out, &[offer.snapshot.0, offer.segment_bytes, offer.bytes, offer.offset]);
                out.extend_from_slice(&offer.crc.to_le_bytes());
                put_history(out, &offer.history);
                out.extend_from_slice(offer.name.as_str().as_bytes());
                Kind::Offer
            }
            Message::Piece(piece) => {
                assert!((1..=PIECE_BYTES as u32).contains(&piece.bytes));
                put_u64s(out, &[piece.offset]);
                out.extend_from_slice(&piece.bytes.to_le_bytes());
                out.extend_from_slice(&piece.crc.to_le_bytes());
                Kind::Piece
            }
            Message::FetchFrames(request) => {
                assert!(request.from < request.to, "{request:?}");
                put_handshake(out, request.protocol, &request.name, "", Some(request.cluster_id));
                out[start + ENVELOPE_BYTES + 7] = if request.crc.is_some() { FLAG_CRC } else { 0 };
                put_u64s(out, &[request.from.0, request.segment_bytes, request.to.0]);
                out.extend_from_slice(&request.crc.unwrap_or(0).to_le_bytes());
                put_history(out, &request.history);
                out.extend_from_slice(request.name.as_str().as_bytes());
                Kind::FetchFrames
            }
            Message::FetchedFrames(frames) => {
                assert!((1..=FETCHED_FRAMES_BYTES_MAX).contains(&frames.bytes));
                put_u64s(out, &[frames.from.0, frames.bytes]);
                Kind::FetchedFrames
            }
        };
        let body_bytes = out.len() - start - ENVELOPE_BYTES;
        out[start..start + ENVELOPE_BYTES].copy_from_slice(&envelope(kind, body_bytes));
    }
}

fn put_u64s(out: &mut Vec<u8>, values: &[u64]) {
    values.iter().for_each(|value| out.extend_from_slice(&value.to_le_bytes()));
}

fn put_handshake(out: &mut Vec<u8>, protocol: u16, name: &MemberName, address: &str, id: Option<ClusterId>) {
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&protocol.to_le_bytes());
    out.extend_from_slice(&[name.as_str().len() as u8, address.len() as u8]);
    out.extend_from_slice(&id.map_or(0, |id| id.0).to_le_bytes());
}

/// The longest beginning of `text` within `bytes_max` that ends with a whole character.
fn cut(text: &str, bytes_max: usize) -> &str {
    let longest = text.len().min(bytes_max);
    let end = (0..=longest).rev().find(|at| text.is_char_boundary(*at));
    &text[..end.unwrap_or(0)]
}

fn put_history(out: &mut Vec<u8>, history: &[(Epoch, Lsn)]) {
    let newest = &history[history.len().saturating_sub(EPOCHS_PER_MESSAGE_MAX)..];
    out.extend_from_slice(&(newest.len() as u32).to_le_bytes());
    newest.iter().for_each(|(epoch, lsn)| put_u64s(out, &[epoch.0, lsn.0]));
}

/// The rest of a body; every take is checked.
struct Body<'a> {
    kind: Kind,
    rest: &'a [u8],
}

impl<'a> Body<'a> {
    fn take(&mut self, bytes: usize) -> Result<&'a [u8], MessageError> {
        let short = MessageError::Body(self.kind.name());
        let (taken, rest) = self.rest.split_at_checked(bytes).ok_or(short)?;
        self.rest = rest;
        Ok(taken)
    }

    fn number<const BYTES: usize>(&mut self) -> Result<[u8; BYTES], MessageError> {
        Ok(self.take(BYTES)?.try_into().expect("as many as asked for"))
    }

    fn u16(&mut self) -> Result<u16, MessageError> {
        self.number().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, MessageError> {
        self.number().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, MessageError> {
        self.number().map(u64::from_le_bytes)
    }

    fn lsn(&mut self) -> Result<Lsn, MessageError> {
        self.u64().map(Lsn)
    }

    fn field(&self, field: &'static str) -> MessageError {
        MessageError::Field { kind: self.kind.name(), field }
    }

    fn end(self) -> Result<(), MessageError> {
        if self.rest.is_empty() { Ok(()) } else { Err(MessageError::Body(self.kind.name())) }
    }

    /// Magic, version; true when the rest is of our version.
    fn version(&mut self) -> Result<(u16, bool), MessageError> {
        if self.take(MAGIC.len())? != MAGIC {
            return Err(MessageError::Magic);
        }
        let protocol = self.u16()?;
        Ok((protocol, protocol == PROTOCOL_VERSION))
    }

    fn history(&mut self) -> Result<Vec<(Epoch, Lsn)>, MessageError> {
        let count = self.u32()? as usize;
        if count > EPOCHS_PER_MESSAGE_MAX {
            return Err(self.field("epoch count"));
        }
        let mut epochs = Body { kind: self.kind, rest: self.take(count * EPOCH_BYTES)? };
        let mut history: Vec<(Epoch, Lsn)> = Vec::with_capacity(count);
        while !epochs.rest.is_empty() {
            let next = (Epoch(epochs.u64()?), epochs.lsn()?);
            if history.last().is_some_and(|last| next.0 <= last.0 || next.1 < last.1) {
                return Err(self.field("epoch history"));
            }
            history.push(next);
        }
        Ok(history)
    }

    fn name(&mut self, bytes: u8) -> Result<MemberName, MessageError> {
        let name = self.take(usize::from(bytes))?;
        let text = std::str::from_utf8(name).map_err(|_| self.field("name"))?;
        text.parse().map_err(|_| self.field("name"))
    }

    fn address(&mut self, bytes: u8) -> Result<String, MessageError> {
        let address = self.take(usize::from(bytes))?;
        let address = std::str::from_utf8(address).map_err(|_| self.field("client address"))?;
        // It goes into replies and logs, where a control character could forge a line.
        if address.chars().any(char::is_control) {
            return Err(self.field("client address"));
        }
        Ok(address.to_owned())
    }

    /// The rest is a sync policy.
    fn policy(&mut self) -> Result<SyncPolicy, MessageError> {
        if self.rest.len() > POLICY_TEXT_BYTES_MAX {
            return Err(self.field("sync policy"));
        }
        let text = std::str::from_utf8(self.take(self.rest.len())?).map_err(|_| self.field("sync policy"))?;
        let policy: Option<SyncPolicy> = text.parse().ok();
        policy.filter(|policy| policy.to_string() == text).ok_or_else(|| self.field("sync policy"))
    }
}

fn decode_hello(mut body: Body<'_>) -> Result<Hello, MessageError> {
    let (protocol, ours) = body.version()?;
    if !ours {
        let name = "unknown".parse().expect("a name");
        let (flushed, client_address, history) = (Lsn::ZERO, String::new(), Vec::new());
        return Ok(Hello {
            protocol,
            cluster_id: None,
            name,
            client_address,
            flushed,
            segment_bytes: 0,
            crc: 0,
            member: MemberId(0),
            gives_up: Epoch(0),
            history,
        });
    }
    let [name_bytes, address_bytes] = body.number()?;
    let id = u128::from_le_bytes(body.number()?);
    let cluster_id = (id != 0).then_some(ClusterId(id));
    let (flushed, segment_bytes, crc) = (body.lsn()?, body.u64()?, body.u32()?);
    let (member, gives_up) = (MemberId(body.u64()?), Epoch(body.u64()?));
    let history = body.history()?;
    let name = body.name(name_bytes)?;
    let client_address = body.address(address_bytes)?;
    body.end()?;
    Ok(Hello { protocol, cluster_id, name, client_address, flushed, segment_bytes, crc, member, gives_up, history })
}

fn decode_welcome(mut body: Body<'_>) -> Result<Welcome, MessageError> {
    let (protocol, ours) = body.version()?;
    if !ours {
        return Err(body.field("protocol version"));
    }
    let [name_bytes, address_bytes] = body.number()?;
    let cluster_id = ClusterId(u128::from_le_bytes(body.number()?));
    let (start, segment_bytes, heartbeat_ms) = (body.lsn()?, body.u64()?, body.u32()?);
    let history = body.history()?;
    let name = body.name(name_bytes)?;
    let client_address = body.address(address_bytes)?;
    let policy = body.policy()?;
    Ok(Welcome { protocol, cluster_id, name, start, segment_bytes, client_address, heartbeat_ms, history, policy })
}

fn decode_refuse(mut body: Body<'_>) -> Result<Refuse, MessageError> {
    let code = body.u16()?;
    let code = RefuseCode::from_number(code).ok_or_else(|| body.field("code"))?;
    body.take(2)?;
    let text = String::from_utf8_lossy(body.rest);
    // It goes into logs: what a peer sends must not forge lines there.
    let text = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    Ok(Refuse { code, text })
}

fn decode_chunk(mut body: Body<'_>) -> Result<Chunk, MessageError> {
    let chunk = Chunk { lsn: body.lsn()?, bytes: body.u64()? };
    if !(1..=CHUNK_BYTES_MAX).contains(&chunk.bytes) {
        return Err(body.field("length"));
    }
    body.end()?;
    Ok(chunk)
}

fn decode_heartbeat(mut body: Body<'_>) -> Result<LinkHeartbeat, MessageError> {
    let (end, flushed, committed) = (body.lsn()?, body.lsn()?, body.lsn()?);
    let (sent_at_us, epoch, stamp_us) = (body.u64()?, Epoch(body.u64()?), body.u64()?);
    let heartbeat = LinkHeartbeat { end, flushed, committed, sent_at_us, epoch, stamp_us };
    if heartbeat.committed > heartbeat.flushed || heartbeat.flushed > heartbeat.end {
        return Err(body.field("order of positions"));
    }
    body.end()?;
    Ok(heartbeat)
}

fn decode_ack(mut body: Body<'_>) -> Result<Ack, MessageError> {
    let (written, flushed, applied, echo_us) = (body.lsn()?, body.lsn()?, body.lsn()?, body.u64()?);
    let [echo_held_us, write_us, flush_us, apply_us] = [body.u32()?, body.u32()?, body.u32()?, body.u32()?];
    let stamp_us = body.u64()?;
    if applied > flushed || flushed > written {
        return Err(body.field("order of positions"));
    }
    body.end()?;
    Ok(Ack { written, flushed, applied, echo_us, echo_held_us, write_us, flush_us, apply_us, stamp_us })
}

fn decode_traced(mut body: Body<'_>) -> Result<Traced, MessageError> {
    let (end, flushes, records) = (body.lsn()?, body.u64()?, body.u64()?);
    let [written_us, flushed_us, applied_us, zeros] = [body.u32()?, body.u32()?, body.u32()?, body.u32()?];
    if written_us > flushed_us || flushed_us > applied_us || zeros != 0 {
        return Err(body.field("order of durations"));
    }
    body.end()?;
    Ok(Traced { end, flushes, records, written_us, flushed_us, applied_us })
}

fn decode_fetch(mut body: Body<'_>) -> Result<Fetch, MessageError> {
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

fn decode_preparing(mut body: Body<'_>) -> Result<Message, MessageError> {
    let (done, total) = (body.u64()?, body.u64()?);
    if done > total {
        return Err(body.field("progress"));
    }
    body.end()?;
    Ok(Message::Preparing { done, total })
}

fn decode_offer(mut body: Body<'_>) -> Result<Offer, MessageError> {
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

fn decode_piece(mut body: Body<'_>) -> Result<Piece, MessageError> {
    let piece = Piece { offset: body.u64()?, bytes: body.u32()?, crc: body.u32()? };
    if !(1..=PIECE_BYTES as u32).contains(&piece.bytes) {
        return Err(body.field("length"));
    }
    body.end()?;
    Ok(piece)
}

fn decode_fetch_frames(mut body: Body<'_>) -> Result<FetchFrames, MessageError> {
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

fn decode_fetched_frames(mut body: Body<'_>) -> Result<FetchedFrames, MessageError> {
    let frames = FetchedFrames { from: body.lsn()?, bytes: body.u64()? };
    if !(1..=FETCHED_FRAMES_BYTES_MAX).contains(&frames.bytes) {
        return Err(body.field("length"));
    }
    body.end()?;
    Ok(frames)
}
