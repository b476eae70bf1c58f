//! Round trips, every prefix, garbage.

use super::codec::envelope;
use super::kind::MessageKind;
use walferry_engine::lsn::{Epoch, Lsn};

use super::types::*;
use super::*;
use crate::error::MessageError;
use crate::member::{ClusterId, MemberName};
use crate::snapshot::{PIECE_BYTES, SNAPSHOT_BYTES_MAX};
use walferry_engine::limits::{FRAME_BYTES_MAX, FRAME_HEADER_BYTES};

fn history(count: u64) -> Vec<(Epoch, Lsn)> {
    (1..=count).map(|n| (Epoch(n * 2), Lsn(n * 4096))).collect()
}

fn samples() -> Vec<Message> {
    let name = || "node-a".parse::<MemberName>().expect("a name");
    let hello = |cluster_id, history| {
        Message::Hello(Hello {
            protocol: PROTOCOL_VERSION,
            cluster_id,
            name: name(),
            client_address: "10.0.0.2:6380".to_owned(),
            flushed: Lsn(8192),
            segment_bytes: 1 << 26,
            crc: 7,
            member: crate::register::MemberId(5),
            gives_up: Epoch(9),
            history,
        })
    };
    let welcome = Welcome {
        protocol: PROTOCOL_VERSION,
        cluster_id: ClusterId(u128::MAX),
        name: name(),
        start: Lsn(4096),
        segment_bytes: 1 << 26,
        client_address: "10.0.0.1:6380".to_owned(),
        heartbeat_ms: 1000,
        history: history(3),
        policy: "ANY 1 (a, b)".parse().expect("a policy"),
    };
    let refuse = Refuse { code: RefuseCode::LogGone, text: "slot a is lost".to_owned() };
    let (end, flushed, committed) = (Lsn(1 << 40), Lsn(1 << 39), Lsn(1 << 38));
    let heartbeat = LinkHeartbeat { end, flushed, committed, sent_at_us: 12, epoch: Epoch(9), stamp_us: 13 };
    let ack = Ack {
        written: end,
        flushed,
        applied: committed,
        echo_us: 12,
        echo_held_us: 1,
        write_us: 2,
        flush_us: 3,
        apply_us: 4,
        stamp_us: 5,
    };
    let fetch = |cluster_id, snapshot, suspect| {
        let (protocol, floor, segment_bytes, offset) = (PROTOCOL_VERSION, Lsn(4096), 1 << 26, 3 << 20);
        Message::Fetch(Fetch { protocol, cluster_id, name: name(), floor, segment_bytes, snapshot, offset, suspect })
    };
    let offer = |history, bytes| {
        let (protocol, cluster_id, snapshot, segment_bytes) = (PROTOCOL_VERSION, ClusterId(5), Lsn(8192), 1 << 26);
        Message::Offer(Offer {
            protocol,
            cluster_id,
            name: name(),
            snapshot,
            segment_bytes,
            bytes,
            offset: 1,
            crc: 9,
            history,
        })
    };
    let request = |crc, history| {
        let (protocol, cluster_id, segment_bytes) = (PROTOCOL_VERSION, ClusterId(5), 1 << 26);
        let (from, to) = (Lsn(4096), Lsn(1 << 40));
        Message::FetchFrames(FetchFrames { protocol, cluster_id, name: name(), from, to, segment_bytes, crc, history })
    };
    vec![
        request(None, history(1)),
        request(Some(0), history(EPOCHS_PER_MESSAGE_MAX as u64)),
        Message::FetchedFrames(FetchedFrames { from: Lsn(4096), bytes: FETCHED_FRAMES_BYTES_MAX }),
        hello(None, Vec::new()),
        hello(Some(ClusterId(5)), history(EPOCHS_PER_MESSAGE_MAX as u64)),
        Message::Welcome(welcome),
        Message::Refuse(refuse),
        Message::Frame { wire_bytes: FRAME_HEADER_BYTES, traced: false },
        Message::Frame { wire_bytes: FRAME_BYTES_MAX, traced: true },
        Message::Chunk(Chunk { lsn: Lsn(4096), bytes: CHUNK_BYTES_MAX }),
        Message::LinkHeartbeat(heartbeat),
        Message::Ack(ack),
        Message::Ack(Ack::default()),
        Message::Traced(Traced { end, flushes: 3, records: 9, written_us: 1, flushed_us: 200, applied_us: 201 }),
        fetch(None, Lsn::ZERO, false),
        fetch(Some(ClusterId(u128::MAX)), Lsn(1 << 40), true),
        Message::Preparing { done: 3, total: 1 << 40 },
        offer(history(1), SNAPSHOT_BYTES_MAX),
        offer(history(EPOCHS_PER_MESSAGE_MAX as u64), 1),
        Message::Piece(Piece { offset: 1 << 40, bytes: PIECE_BYTES as u32, crc: u32::MAX }),
    ]
}

fn encoded(message: &Message) -> Vec<u8> {
    let mut bytes = Vec::new();
    message.encode(&mut bytes);
    bytes
}

#[test]
fn messages_round_trip_and_no_prefix_is_a_message() {
    let mut stream = Vec::new();
    let samples = samples();
    samples.iter().for_each(|message| message.encode(&mut stream));
    let mut at = 0;
    for message in &samples {
        let (decoded, taken) = decode(&stream[at..]).expect("valid").expect("whole");
        assert_eq!(&decoded, message);
        assert!(taken <= MESSAGE_BYTES_MAX);
        for cut in 0..taken {
            assert_eq!(decode(&stream[at..at + cut]), Ok(None), "{message:?} cut to {cut}");
        }
        at += taken;
    }
    assert_eq!(at, stream.len());
    assert_eq!(encoded(&Message::Ack(Ack::default())).len(), ENVELOPE_BYTES + ACK_BODY_BYTES);
    assert_eq!(encoded(&Message::LinkHeartbeat(LinkHeartbeat::default())).len(), ENVELOPE_BYTES + HEARTBEAT_BODY_BYTES);
}

#[test]
fn envelope_with_another_length_than_its_fields_is_refused() {
    for message in samples() {
        let kind_without_body = matches!(message, Message::Frame { .. } | Message::Refuse(_));
        let bytes = encoded(&message);
        let body_bytes = (bytes.len() - ENVELOPE_BYTES) as u32;
        for (difference, filler) in [(-1i64, 0), (1, 1)] {
            let mut wrong = bytes.clone();
            wrong.resize(bytes.len() + filler, 0);
            let length = (i64::from(body_bytes) + difference) as u32;
            wrong[..4].copy_from_slice(&length.to_le_bytes());
            assert!(kind_without_body || decode(&wrong).is_err(), "{message:?} {difference}");
        }
    }
}

#[test]
fn garbage_is_an_error_or_incomplete_but_never_a_panic() {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let seeds: Vec<Vec<u8>> = samples().iter().map(encoded).collect();
    for _ in 0..20_000 {
        let mut bytes = seeds[random() as usize % seeds.len()].clone();
        for _ in 0..=random() % 4 {
            // Most damage goes to the first bytes, where the lengths and counts are.
            let at = random() as usize % bytes.len().min(64);
            bytes[at] = random() as u8;
        }
        if let Ok(Some((message, taken))) = decode(&bytes) {
            assert!(taken <= bytes.len());
            if let Message::Hello(Hello { history, .. }) | Message::Welcome(Welcome { history, .. }) = message {
                assert!(history.capacity() <= EPOCHS_PER_MESSAGE_MAX);
            }
        }
        let noise: Vec<u8> = (0..random() % 200).map(|_| random() as u8).collect();
        let _ = decode(&noise);
    }
}

#[test]
fn length_beyond_the_bounds_is_refused_by_the_envelope() {
    let table = [
        (MessageKind::Hello, MESSAGE_BYTES_MAX as u32),
        (MessageKind::Refuse, 1 << 16),
        (MessageKind::Frame, FRAME_BYTES_MAX as u32 + 1),
        (MessageKind::Frame, FRAME_HEADER_BYTES as u32 - 1),
        (MessageKind::Chunk, 17),
        (MessageKind::Ack, u32::MAX),
    ];
    for (kind, bytes) in table {
        assert!(decode(&envelope(kind, bytes as usize)).is_err(), "{kind:?} {bytes}");
    }
    assert_eq!(decode(b"GET / HTTP/1.1\r\n"), Err(MessageError::Envelope));
    assert_eq!(decode(b"-ERR Protocol error: ..."), Err(MessageError::Clients));
    for first in [&b"SET k v\r\n"[..], b"*3\r\n$3\r\nSET", b"PING\r\n", &[0x16, 3, 1, 2, 0, 1, 0, 1], b""] {
        assert!(!is_of_a_peer(first), "{first:?}");
    }
    assert_eq!(decode(&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc]), Err(MessageError::Tls), "a ClientHello");
}

/// The first message that is one of these.
fn sample(is: impl Fn(&Message) -> bool) -> Message {
    samples().into_iter().find(is).expect("there is one of each kind")
}

#[test]
fn another_protocol_version_is_told_from_garbage() {
    let mut bytes = encoded(&sample(|message| matches!(message, Message::Hello(_))));
    bytes[ENVELOPE_BYTES + 4] = 1;
    let decoded = decode(&bytes).expect("readable");
    assert!(matches!(decoded, Some((Message::Hello(Hello { protocol: 1, .. }), _))));
    bytes[ENVELOPE_BYTES] = b'X';
    assert_eq!(decode(&bytes), Err(MessageError::Magic));
}

#[test]
fn fields_that_contradict_each_other_are_refused() {
    let mut heartbeat = encoded(&sample(|message| matches!(message, Message::LinkHeartbeat(_))));
    heartbeat[ENVELOPE_BYTES..ENVELOPE_BYTES + 8].fill(0);
    assert!(matches!(decode(&heartbeat), Err(MessageError::Field { field: "order of positions", .. })));
    let mut welcome = encoded(&sample(|message| matches!(message, Message::Welcome(_))));
    let first_epoch = ENVELOPE_BYTES + WELCOME_FIXED_BYTES;
    welcome[first_epoch] = 200;
    assert!(matches!(decode(&welcome), Err(MessageError::Field { field: "epoch history", .. })));
    let mut welcome = encoded(&sample(|message| matches!(message, Message::Welcome(_))));
    *welcome.last_mut().expect("not empty") = b'x';
    assert!(matches!(decode(&welcome), Err(MessageError::Field { field: "sync policy", .. })));
}

#[test]
fn every_refusal_code_is_understood() {
    for (code, number) in RefuseCode::ALL.into_iter().zip(1u16..) {
        assert_eq!(code as u16, number);
        let message = Message::Refuse(Refuse { code, text: "why".to_owned() });
        assert_eq!(decode(&encoded(&message)).map(|decoded| decoded.map(|(message, _)| message)), Ok(Some(message)));
    }
    let mut unknown = encoded(&Message::Refuse(Refuse { code: RefuseCode::Full, text: String::new() }));
    unknown[ENVELOPE_BYTES] = 99;
    assert!(decode(&unknown).is_err());
}

#[test]
fn long_and_forged_refusals_are_tamed() {
    let text = "é".repeat(REFUSE_TEXT_BYTES_MAX);
    let bytes = encoded(&Message::Refuse(Refuse { code: RefuseCode::Full, text }));
    assert!(bytes.len() <= ENVELOPE_BYTES + REFUSE_FIXED_BYTES + REFUSE_TEXT_BYTES_MAX);
    let text = "a\nb\u{1b}[2J".to_owned();
    let bytes = encoded(&Message::Refuse(Refuse { code: RefuseCode::Full, text }));
    let Ok(Some((Message::Refuse(refuse), _))) = decode(&bytes) else { panic!("a refusal") };
    assert_eq!(refuse.text, "a b [2J");
}
