//! Applying frames to a store on a real filesystem, by what the key holds before: nothing, a change in memory, or a value that
//! only the store's file has. Checkpoints are kept out of the timed part.

mod frames;

use std::path::Path;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use frames::Sealed;
use walferry_applier::record::{Effect, Fields};
use walferry_applier::store::{Store, StoreConfig};
use walferry_engine::{Frame, Lsn};

/// Keys in the store's file where it has any.
const BASE_KEYS: usize = 50_000;
/// Keys that a timed run changes, once each.
const KEYS: usize = 4096;
const RECORDS_PER_FRAME: usize = 64;
const VALUE_BYTES: usize = 100;
/// As a node has it by default; the overlay stays below the first, so nothing is frozen.
const CONFIG: StoreConfig = StoreConfig {
    checkpoint_bytes: 64 << 20,
    checkpoint_log_bytes: u64::MAX,
    checkpoint_interval: Duration::MAX,
    cache_bytes: 128 << 20,
};

const _: () = assert!(KEYS <= BASE_KEYS && KEYS.is_multiple_of(RECORDS_PER_FRAME));

/// What is done to every key.
#[derive(Clone, Copy)]
enum Change {
    Put,
    Append,
    StreamAdd,
}

/// Where a key's value stands before the timed change.
#[derive(Clone, Copy, PartialEq)]
enum Before {
    Nowhere,
    Overlay,
    Base,
}

/// Record `sequence` for each of `keys`.
fn records(change: Change, sequence: u64, keys: impl Iterator<Item = usize>) -> Vec<Vec<u8>> {
    let value = [0x5a; VALUE_BYTES];
    let mut fields = Vec::new();
    for part in [&b"field"[..], &value] {
        Fields::push(&mut fields, part);
    }
    let record = |key| {
        let key = format!("key:{key:012}");
        let key = key.as_bytes();
        let mut record = Vec::new();
        let effect = match change {
            Change::Put => Effect::Put { key, value: &value },
            Change::Append => Effect::Append { key, bytes: &value },
            Change::StreamAdd => Effect::StreamAdd { key, id: (sequence, 0), fields: &fields },
        };
        effect.encode_into(&mut record);
        record
    };
    keys.map(record).collect()
}

fn seal_all(mut lsn: Lsn, records: &[Vec<u8>]) -> Vec<Sealed> {
    let seal = |records: &[Vec<u8>]| {
        let sealed = frames::seal(lsn, records);
        lsn = sealed.header.end();
        sealed
    };
    records.chunks(RECORDS_PER_FRAME).map(seal).collect()
}

fn end(frames: &[Sealed]) -> Lsn {
    frames.last().expect("a frame").header.end()
}

fn apply(store: &mut Store, frames: &[Frame<'_>]) {
    for frame in frames {
        store.apply(frame).expect("it applies");
    }
}

fn read(sealed: &[Sealed]) -> Vec<Frame<'_>> {
    sealed.iter().map(|frame| Frame::read(&frame.bytes, frame.header.lsn).expect("a sealed frame")).collect()
}

fn open(dir: &Path) -> Store {
    Store::open(dir, CONFIG, Box::new(|| ())).expect("a store")
}

/// A store whose file has `BASE_KEYS` keys.
fn store_with_snapshot(dir: &Path, change: Change) -> Store {
    let base = seal_all(Lsn::ZERO, &records(change, 1, 0..BASE_KEYS));
    let mut store = open(dir);
    apply(&mut store, &read(&base));
    store.close(Lsn::MAX).expect("a checkpoint");
    let store = open(dir);
    assert_eq!(store.durable_applied(), end(&base), "the file has every key");
    store
}

fn bench(criterion: &mut Criterion, name: &str, change: Change, before: Before) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let mut store = if before == Before::Base { store_with_snapshot(dir.path(), change) } else { open(dir.path()) };
    // Every so many keys of the file, in an order that is neither its own nor that of the names.
    let keys = || (0..KEYS).map(|at| at * 7919 % BASE_KEYS);
    let first = seal_all(store.applied(), &records(change, 2, keys()));
    let again = seal_all(end(&first), &records(change, 3, keys()));
    let (first, again) = (read(&first), read(&again));
    let (untimed, timed) = if before == Before::Overlay { (&first[..], &again) } else { (&[][..], &first) };
    let name = BenchmarkId::new(
        name,
        match before {
            Before::Nowhere => "new",
            Before::Overlay => "overlay",
            Before::Base => "base",
        },
    );
    let mut group = criterion.benchmark_group("store_apply");
    group.throughput(Throughput::Elements(KEYS as u64)).sample_size(20);
    group.bench_function(name, |bencher| {
        bencher.iter_custom(|times| {
            let mut elapsed = Duration::ZERO;
            for _ in 0..times {
                store.rollback().expect("back to the file");
                apply(&mut store, untimed);
                let start = Instant::now();
                apply(&mut store, timed);
                elapsed += start.elapsed();
                assert_eq!(store.applied(), timed[timed.len() - 1].header().end());
            }
            elapsed
        });
    });
    group.finish();
}

fn store_apply(criterion: &mut Criterion) {
    let changes = [("put", Change::Put), ("append", Change::Append), ("stream_add", Change::StreamAdd)];
    for (name, change) in changes {
        for before in [Before::Nowhere, Before::Overlay, Before::Base] {
            bench(criterion, name, change, before);
        }
    }
}

criterion_group!(benches, store_apply);
criterion_main!(benches);
