//! Bytes and back: frames, the records in them, and the two messages that peers exchange all the time.

mod frames;

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use walferry_applier::record::{Effect, effects};
use walferry_cluster::message::{Ack, LinkHeartbeat, Message, decode};
use walferry_engine::Frame;
use walferry_engine::limits::RECORD_LENGTH_BYTES;
use walferry_engine::lsn::{Epoch, Lsn};

const PAYLOADS_BYTES: [usize; 5] = [100, 1 << 10, 4 << 10, 16 << 10, 64 << 10];
/// Records of this size fill the payload; verifying walks them.
const RECORD_BYTES: usize = 100 - RECORD_LENGTH_BYTES;

/// Records whose lengths and bytes fill `payload_bytes`.
fn records(payload_bytes: usize) -> Vec<Vec<u8>> {
    let mut records = vec![vec![0x5a; RECORD_BYTES]; payload_bytes / (RECORD_LENGTH_BYTES + RECORD_BYTES)];
    if let Some(rest) = (payload_bytes % (RECORD_LENGTH_BYTES + RECORD_BYTES)).checked_sub(RECORD_LENGTH_BYTES) {
        records.push(vec![0x5a; rest]);
    }
    records
}

fn frame(criterion: &mut Criterion) {
    let lsn = Lsn(1 << 30);
    let mut group = criterion.benchmark_group("frame");
    for payload_bytes in PAYLOADS_BYTES {
        let mut sealed = frames::seal(lsn, &records(payload_bytes));
        assert_eq!(sealed.header.payload_bytes as usize, payload_bytes);
        group.throughput(Throughput::Bytes(sealed.header.wire_bytes() as u64));
        group.bench_function(BenchmarkId::new("seal", payload_bytes), |bencher| {
            bencher.iter(|| black_box(sealed.header).seal(black_box(&mut sealed.bytes)));
        });
        group.bench_function(BenchmarkId::new("verify", payload_bytes), |bencher| {
            bencher.iter(|| *Frame::read(black_box(&sealed.bytes), lsn).expect("a sealed frame").header());
        });
    }
    group.finish();
}

fn record(criterion: &mut Criterion) {
    let (key, value) = (&b"key:000000004711"[..], &[0x5a; 100][..]);
    let put = Effect::Put { key, value };
    let cases = [
        ("put", vec![put]),
        ("append", vec![Effect::Append { key, bytes: value }]),
        ("stream_add", vec![Effect::StreamAdd { key, id: (1_700_000_000_000, 7), fields: value }]),
        ("transaction_of_16", vec![put; 16]),
    ];
    let mut group = criterion.benchmark_group("record");
    for (name, changes) in &cases {
        let mut record = Vec::new();
        changes.iter().for_each(|effect| effect.encode_into(&mut record));
        group.throughput(Throughput::Bytes(record.len() as u64));
        group.bench_function(BenchmarkId::new("encode", name), |bencher| {
            // The buffer is the session's and is used again.
            let mut out = Vec::new();
            bencher.iter(|| {
                out.clear();
                black_box(changes).iter().for_each(|effect| effect.encode_into(&mut out));
                black_box(out.len())
            });
        });
        group.bench_function(BenchmarkId::new("decode", name), |bencher| {
            let key_bytes =
                |record| effects(record).map(|effect| effect.expect("as encoded").key().len()).sum::<usize>();
            bencher.iter(|| key_bytes(black_box(&record[..])));
        });
    }
    group.finish();
}

fn message(criterion: &mut Criterion) {
    let (end, flushed, committed) = (Lsn(3 << 40), Lsn(2 << 40), Lsn(1 << 40));
    let ack = Ack { written: end, flushed, applied: committed, echo_us: 1, echo_held_us: 2, ..Ack::default() };
    let heartbeat = LinkHeartbeat { end, flushed, committed, sent_at_us: 1, epoch: Epoch(1), stamp_us: 1 };
    let mut group = criterion.benchmark_group("message");
    for (name, message) in [("ack", Message::Ack(ack)), ("heartbeat", Message::LinkHeartbeat(heartbeat))] {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        assert_eq!(decode(&bytes), Ok(Some((message.clone(), bytes.len()))));
        group.throughput(Throughput::Elements(1));
        group.bench_function(BenchmarkId::new("encode", name), |bencher| {
            let mut out = Vec::new();
            bencher.iter(|| {
                out.clear();
                black_box(&message).encode(&mut out);
                black_box(out.len())
            });
        });
        group.bench_function(BenchmarkId::new("decode", name), |bencher| {
            bencher.iter(|| decode(black_box(&bytes)));
        });
    }
    group.finish();
}

criterion_group!(benches, frame, record, message);
criterion_main!(benches);
