//! CRC32C: the crate that frames are checked with against another implementation, from the smallest frame to a full one.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

/// One SET of 100 bytes with its frame header, a block, and larger frames.
const SIZES_BYTES: [usize; 4] = [192, 4 << 10, 64 << 10, 1 << 20];

fn crc(criterion: &mut Criterion) {
    let bytes: Vec<u8> = (0..SIZES_BYTES[3]).map(|at| (at.wrapping_mul(31) >> 3) as u8).collect();
    let mut group = criterion.benchmark_group("crc");
    for size in SIZES_BYTES {
        let bytes = &bytes[..size];
        assert_eq!(crc32c::crc32c(bytes), crc_fast::crc32_iscsi(bytes), "two ways to the same checksum");
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_with_input(BenchmarkId::new("crc32c", size), bytes, |bencher, bytes| {
            bencher.iter(|| crc32c::crc32c(black_box(bytes)));
        });
        group.bench_with_input(BenchmarkId::new("crc-fast", size), bytes, |bencher, bytes| {
            bencher.iter(|| crc_fast::crc32_iscsi(black_box(bytes)));
        });
    }
    group.finish();
}

criterion_group!(benches, crc);
criterion_main!(benches);
