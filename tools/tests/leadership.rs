//! What a replica carries from one leadership into the next, seen against a leader of our own that says exactly what the test
//! wants it to.

mod common;

use std::io::Write;
use std::net::{TcpListener, TcpStream};

use common::{Node, PATIENCE, Reply, directory, until};
use walferry_applier::record::Effect;
use walferry_cluster::message::{LinkHeartbeat, Message, PROTOCOL_VERSION, Welcome, frame_envelope, read_message};
use walferry_cluster::{ClusterId, SyncPolicy};
use walferry_engine::frame::FrameHeader;
use walferry_engine::limits::{FRAME_HEADER_BYTES, RECORD_LENGTH_BYTES};
use walferry_engine::lsn::{Epoch, Lsn};

const SEGMENT_BYTES: u64 = 64 << 20;

/// A leader that a replica has connected to.
struct Leader {
    link: TcpStream,
}

impl Leader {
    /// Takes the next connection and its hello, and says where the stream starts.
    fn welcome(listener: &TcpListener, start: Lsn, history: &[(u64, Lsn)]) -> Leader {
        let (mut link, _) = listener.accept().expect("the replica connects");
        link.set_read_timeout(Some(PATIENCE)).expect("a timeout that is not zero");
        let hello = read_message(&mut link).expect("a message");
        assert!(matches!(hello, Message::Hello(_)), "{hello:?}");
        let mut leader = Leader { link };
        leader.say(&Message::Welcome(Welcome {
            protocol: PROTOCOL_VERSION,
            cluster_id: ClusterId(0x1234),
            name: "fake".parse().expect("a name"),
            start,
            segment_bytes: SEGMENT_BYTES,
            client_address: String::new(),
            heartbeat_ms: 100,
            history: history.iter().map(|&(epoch, lsn)| (Epoch(epoch), lsn)).collect(),
            policy: SyncPolicy::None,
        }));
        leader
    }

    fn say(&mut self, message: &Message) {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        self.link.write_all(&bytes).expect("the replica listens");
    }

    fn heartbeat(&mut self, epoch: u64, end: Lsn, flushed: Lsn) {
        let (epoch, committed) = (Epoch(epoch), Lsn::ZERO);
        self.say(&Message::LinkHeartbeat(LinkHeartbeat { end, flushed, committed, sent_at_us: 1, epoch, stamp_us: 0 }));
    }

    /// One frame that puts `key`; what it is sealed as.
    fn put(&mut self, (epoch, lsn, previous_crc): (u64, Lsn, u32), key: &str) -> FrameHeader {
        let mut record = Vec::new();
        Effect::Put { key: key.as_bytes(), value: b"v" }.encode_into(&mut record);
        let header = FrameHeader {
            filler: false,
            epoch: Epoch(epoch),
            lsn,
            payload_bytes: (RECORD_LENGTH_BYTES + record.len()) as u32,
            record_count: 1,
            previous_crc,
            crc: 0,
            flushed: lsn,
            committed: Lsn::ZERO,
            sealed_at_us: 1,
        };
        let mut wire = vec![0; FRAME_HEADER_BYTES];
        wire.extend_from_slice(&(record.len() as u32).to_le_bytes());
        wire.extend_from_slice(&record);
        let header = header.seal(&mut wire);
        self.link.write_all(&frame_envelope(wire.len(), false)).expect("the replica listens");
        self.link.write_all(&wire).expect("the replica listens");
        header
    }
}

fn position(node: &Node, key: &str) -> String {
    let text = node.client().command(&["DESCRIBE"]).text().to_owned();
    let described: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    described[key].as_str().unwrap_or_else(|| panic!("{key} in {text}")).to_owned()
}

/// The leader of epoch 1 had flushed far beyond what the replica has of it. That says nothing of the leader of epoch 2, whose frames
/// begin where the replica's log ends.
#[test]
fn replica_applies_what_its_own_leader_has_flushed_only() {
    let root = directory();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound").to_string();
    let replica =
        Node::start(root.path(), "r", &["--follow", &address, "--segment-bytes", "64MiB", "--peer-auth", "none"]);
    let mut client = replica.client();
    let mut holds = |key: &str| client.command(&["GET", key]) == Reply::Bulk("v".into());

    let mut old = Leader::welcome(&listener, Lsn::ZERO, &[(1, Lsn::ZERO)]);
    let first = old.put((1, Lsn::ZERO, 0), "of epoch 1");
    old.heartbeat(1, Lsn(1 << 20), Lsn(1 << 20));
    until("the frame of epoch 1 is applied", || holds("of epoch 1"));
    drop(old);

    let fork = first.end();
    let mut new = Leader::welcome(&listener, fork, &[(1, Lsn::ZERO), (2, fork)]);
    let second = new.put((2, fork, first.crc), "of epoch 2");
    new.heartbeat(2, second.end(), fork);
    until("the frame of epoch 2 is flushed here", || position(&replica, "flushed") == second.end().to_string());
    // A command is answered in a turn that comes after; what may be applied is applied at the beginning of each.
    for _ in 0..3 {
        assert!(!holds("of epoch 2"), "its leader may still lose it");
        assert_eq!(position(&replica, "applied"), fork.to_string());
    }
    new.heartbeat(2, second.end(), second.end());
    until("the frame of epoch 2 is applied", || holds("of epoch 2"));
}
