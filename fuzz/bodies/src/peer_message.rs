//! Messages of peers, as a leader and as a replica take them, and questions and answers of members. The first byte chooses the
//! side.

use walferry_applier::receiver::{Receiver, Step};
use walferry_cluster::control::{Answer, Ask, CONTROL_BYTES_MAX, Packet, body_bytes, encode};
use walferry_cluster::member::{ClusterId, MemberName};
use walferry_cluster::message::{ENVELOPE_BYTES, MESSAGE_BYTES_MAX, Message, PROTOCOL_VERSION, decode};
use walferry_engine::epoch::EpochHistory;
use walferry_engine::lsn::{Epoch, Lsn};
use walferry_shipper::handshake::{Leader, judge, judge_fetch};

use crate::Input;

/// Any bytes.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    match input.byte() % 4 {
        0 => to_leader(input.0),
        1 => to_replica(input.byte(), input.0),
        2 => control(input.0),
        _ => round_trip(input.0),
    }
}

/// What decodes is written as it was read, and nothing less decodes to it.
fn round_trip(bytes: &[u8]) {
    let Ok(Some((message, length))) = decode(bytes) else { return };
    assert!(length <= bytes.len() && length <= MESSAGE_BYTES_MAX);
    if !matches!(message, Message::Frame { .. }) {
        assert_eq!(decode(&bytes[..length - 1]).map(|found| found.map(|(_, length)| length)), Ok(None));
    }
    let mut again = Vec::new();
    // A frame is sent without being a `Message`; a peer of another version is never answered in kind.
    let ours = match &message {
        Message::Frame { .. } => false,
        Message::Hello(hello) => hello.protocol == PROTOCOL_VERSION,
        Message::Welcome(welcome) => welcome.protocol == PROTOCOL_VERSION,
        Message::Fetch(fetch) => fetch.protocol == PROTOCOL_VERSION,
        Message::Offer(offer) => offer.protocol == PROTOCOL_VERSION,
        _ => true,
    };
    if ours {
        message.encode(&mut again);
        assert_eq!(decode(&again).expect("what was encoded decodes"), Some((message, again.len())));
    }
}

fn to_leader(bytes: &[u8]) {
    let history =
        EpochHistory::from_entries(&[(Epoch(1), Lsn(0)), (Epoch(2), Lsn(8 << 20)), (Epoch(7), Lsn(20 << 20))])
            .expect("an ascending history");
    let name: MemberName = "a".parse().expect("a name");
    let leader = Leader {
        cluster_id: ClusterId(7),
        name: &name,
        segment_bytes: 16 << 20,
        history: &history,
        log_start: Lsn(4 << 20),
        sealed: Lsn(24 << 20),
    };
    let mut rest = bytes;
    while let Ok(Some((message, length))) = decode(rest) {
        match &message {
            Message::Hello(hello) => {
                if let Ok(start) = judge(hello, &leader) {
                    assert!(leader.log_start <= start && start <= leader.sealed.min(hello.flushed));
                }
            }
            Message::Fetch(fetch) => drop(judge_fetch(fetch, &leader)),
            _ => {}
        }
        rest = &rest[length..];
    }
}

fn to_replica(piece: u8, bytes: &[u8]) {
    let mut receiver = Receiver::default();
    let mut end = Lsn(4096);
    let mut pieces = bytes.chunks(1 + usize::from(piece));
    let give = |receiver: &mut Receiver, piece: &[u8]| {
        let space = receiver.space();
        assert!(space.len() >= piece.len(), "there is space while more is asked for");
        space[..piece.len()].copy_from_slice(piece);
        receiver.advance(piece.len());
    };
    while let Ok(step) = receiver.step(end) {
        match step {
            Step::Welcome(welcome) => {
                let _ = EpochHistory::from_entries(&welcome.history);
                receiver.accept();
            }
            Step::Refuse(_) => return,
            Step::Frame { wire_bytes, .. } => {
                assert!(receiver.front().len() >= wire_bytes, "a frame is there whole");
                receiver.consume(wire_bytes);
            }
            Step::Raw if !receiver.front().is_empty() => {
                let raw = receiver.raw().min(receiver.front().len() as u64);
                receiver.consume(raw as usize);
                receiver.raw_done(raw);
                end = end.advance(raw);
            }
            Step::Heartbeat(_) => {}
            Step::More | Step::Raw => {
                let Some(piece) = pieces.next() else { return };
                give(&mut receiver, piece);
            }
        }
    }
}

fn control(bytes: &[u8]) {
    let Some((envelope, body)) = bytes.split_first_chunk::<ENVELOPE_BYTES>() else { return };
    if let Some(length) = body_bytes(envelope) {
        assert!(length <= CONTROL_BYTES_MAX);
    }
    if let Ok(packet) = serde_json::from_slice::<Packet<Ask>>(body) {
        let again = encode(&packet);
        let read: Packet<Ask> = serde_json::from_slice(&again[ENVELOPE_BYTES..]).expect("what was written is read");
        assert_eq!(read.number, packet.number);
    }
    if let Ok(packet) = serde_json::from_slice::<Packet<Answer>>(body) {
        let again = encode(&packet);
        serde_json::from_slice::<Packet<Answer>>(&again[ENVELOPE_BYTES..]).expect("what was written is read");
    }
}
