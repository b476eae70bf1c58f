//! The kinds of messages, with their numbers on the wire and the bounds of their bodies.

use walferry_engine::limits::{FRAME_BYTES_MAX, FRAME_HEADER_BYTES};

use super::types::{
    ACK_BODY_BYTES, ENVELOPE_BYTES, FETCH_FIXED_BYTES, FETCH_FRAMES_FIXED_BYTES, FETCHED_FRAMES_BODY_BYTES,
    HEARTBEAT_BODY_BYTES, HELLO_FIXED_BYTES, MESSAGE_BYTES_MAX, OFFER_FIXED_BYTES, PIECE_BODY_BYTES,
    PREPARING_BODY_BYTES, REFUSE_FIXED_BYTES, REFUSE_TEXT_BYTES_MAX, TRACED_BODY_BYTES, WELCOME_FIXED_BYTES,
};
use crate::member::MEMBER_NAME_BYTES_MAX;

use super::body::CHUNK_BODY_BYTES;

/// The number of a message in its envelope.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(super) enum MessageKind {
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

impl MessageKind {
    pub(super) fn from_number(number: u8) -> Option<MessageKind> {
        use MessageKind::*;
        const ALL: [MessageKind; 14] = [
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

    pub(super) const fn name(self) -> &'static str {
        match self {
            MessageKind::Hello => "Hello",
            MessageKind::Welcome => "Welcome",
            MessageKind::Refuse => "Refuse",
            MessageKind::Frame => "Frame",
            MessageKind::Chunk => "Chunk",
            MessageKind::LinkHeartbeat => "LinkHeartbeat",
            MessageKind::Ack => "Ack",
            MessageKind::Traced => "Traced",
            MessageKind::Fetch => "Fetch",
            MessageKind::Preparing => "Preparing",
            MessageKind::Offer => "Offer",
            MessageKind::Piece => "Piece",
            MessageKind::FetchFrames => "FetchFrames",
            MessageKind::FetchedFrames => "FetchedFrames",
        }
    }

    pub(super) const fn body_bytes(self) -> (usize, usize) {
        const HANDSHAKE_MAX: usize = MESSAGE_BYTES_MAX - ENVELOPE_BYTES;
        match self {
            MessageKind::Hello => (HELLO_FIXED_BYTES + 1, HANDSHAKE_MAX),
            MessageKind::Welcome => (WELCOME_FIXED_BYTES + 1, HANDSHAKE_MAX),
            MessageKind::Refuse => (REFUSE_FIXED_BYTES, REFUSE_FIXED_BYTES + REFUSE_TEXT_BYTES_MAX),
            MessageKind::Frame => (FRAME_HEADER_BYTES, FRAME_BYTES_MAX),
            MessageKind::Chunk => (CHUNK_BODY_BYTES, CHUNK_BODY_BYTES),
            MessageKind::LinkHeartbeat => (HEARTBEAT_BODY_BYTES, HEARTBEAT_BODY_BYTES),
            MessageKind::Ack => (ACK_BODY_BYTES, ACK_BODY_BYTES),
            MessageKind::Traced => (TRACED_BODY_BYTES, TRACED_BODY_BYTES),
            MessageKind::Fetch => (FETCH_FIXED_BYTES + 1, FETCH_FIXED_BYTES + MEMBER_NAME_BYTES_MAX),
            MessageKind::Preparing => (PREPARING_BODY_BYTES, PREPARING_BODY_BYTES),
            MessageKind::Offer => (OFFER_FIXED_BYTES + 1, HANDSHAKE_MAX),
            MessageKind::Piece => (PIECE_BODY_BYTES, PIECE_BODY_BYTES),
            MessageKind::FetchFrames => (FETCH_FRAMES_FIXED_BYTES + 1, HANDSHAKE_MAX),
            MessageKind::FetchedFrames => (FETCHED_FRAMES_BODY_BYTES, FETCHED_FRAMES_BODY_BYTES),
        }
    }
}
