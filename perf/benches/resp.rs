//! The parser of client commands over pipelines of SET, as they come from a socket: whole, and in pieces.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use walferry_node::session::resp::{Parser, Progress};

const PIPELINES: [usize; 3] = [1, 16, 256];
const VALUE_BYTES: usize = 100;
/// A large value arrives in pieces of this size.
const PIECE_BYTES: usize = 16 << 10;

/// `count` SETs in a row, with keys as redis-benchmark makes them.
fn sets(count: usize, value_bytes: usize) -> Vec<u8> {
    let value = "v".repeat(value_bytes);
    let set = |key| format!("*3\r\n$3\r\nSET\r\n$16\r\nkey:{key:012}\r\n${value_bytes}\r\n{value}\r\n");
    (0..count).map(set).collect::<String>().into_bytes()
}

/// Walks all commands in `bytes`; the length of their arguments.
fn walk(parser: &mut Parser, mut bytes: &[u8]) -> usize {
    let mut arguments_bytes = 0;
    while !bytes.is_empty() {
        let Ok(Progress::Command { bytes: taken }) = parser.parse(bytes) else { panic!("whole commands") };
        arguments_bytes += parser.args(bytes).bytes_len();
        bytes = &bytes[taken..];
        parser.next();
    }
    arguments_bytes
}

fn pipeline(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("resp");
    for count in PIPELINES {
        let bytes = sets(count, VALUE_BYTES);
        let mut parser = Parser::default();
        assert_eq!(walk(&mut parser, &bytes), count * (3 + 16 + VALUE_BYTES));
        group.throughput(Throughput::Elements(count as u64));
        group.bench_function(BenchmarkId::new("set_pipeline", count), |bencher| {
            bencher.iter(|| walk(&mut parser, black_box(&bytes)));
        });
    }
    group.finish();
}

/// One SET of 1 MiB, looked at again with each piece that arrives.
fn pieces(criterion: &mut Criterion) {
    let bytes = sets(1, 1 << 20);
    let ends: Vec<usize> = (PIECE_BYTES..bytes.len()).step_by(PIECE_BYTES).chain([bytes.len()]).collect();
    let mut parser = Parser::default();
    let mut group = criterion.benchmark_group("resp");
    group.throughput(Throughput::Elements(ends.len() as u64));
    group.bench_function("set_1_mib_in_pieces", |bencher| {
        bencher.iter(|| {
            let last = ends.iter().map(|&end| parser.parse(black_box(&bytes[..end]))).last();
            parser.next();
            assert_eq!(last, Some(Ok(Progress::Command { bytes: bytes.len() })));
        });
    });
    group.finish();
}

criterion_group!(benches, pipeline, pieces);
criterion_main!(benches);
