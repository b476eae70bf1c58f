//! Group commit without a disk: the engine's commit core, log buffer, frames and flush accounting between clients and a disk that exist
//! only as numbers. What criterion times is our own work per commit; the simulated clock gives records per flush.
//!
//! The driver here does what the log does in one turn: takes what completed, appends what arrived, seals and submits while the
//! disk can take a write. Everything is the same in every run.

use std::collections::VecDeque;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use walferry_engine::buffer::LogBuffer;
use walferry_engine::commit::{Commit, WriteNo};
use walferry_engine::flush_accounting::{DurableWrite, FlushAccounting};
use walferry_engine::frame::FrameHeader;
use walferry_engine::limits::{
    FRAME_ALIGN_BYTES, FRAME_HEADER_BYTES, FRAME_TARGET_BYTES, LOG_BUFFER_BYTES_DEFAULT, RECORD_LENGTH_BYTES,
};
use walferry_engine::lsn::{Epoch, Lsn};

const RECORD_BYTES: usize = 100;
const CLIENTS: [usize; 3] = [1, 64, 1024];
const WRITE_DEPTHS: [usize; 2] = [1, 4];
/// Commits in one timed run: more than there are clients, so that each comes round.
const COMMITS: u64 = 16 << 10;
const LOG_BUFFER_BYTES: usize = LOG_BUFFER_BYTES_DEFAULT;

/// The simulated times, nanoseconds: a durable write (each up to an eighth longer, at random) and what its bytes add...
const WRITE_NS: u64 = 100_000;
const WRITE_NS_PER_KIB: u64 = 1_000;
/// ...from an answer to the client's next command, the gap between two clients' commands, and one command here.
const ROUND_TRIP_NS: u64 = 25_000;
const CLIENT_GAP_NS: u64 = 100;
const COMMAND_NS: u64 = 250;

// All clients' records fit into one frame, and every frame in flight into the buffer.
const _: () = assert!(FRAME_HEADER_BYTES + CLIENTS[2] * (RECORD_LENGTH_BYTES + RECORD_BYTES) <= FRAME_TARGET_BYTES);
const _: () = assert!((Commit::WINDOW + 1) * FRAME_TARGET_BYTES <= LOG_BUFFER_BYTES);

/// A write at the simulated disk.
#[derive(Clone, Copy)]
struct Flight {
    number: WriteNo,
    records: u32,
    wire_bytes: usize,
    span_bytes: usize,
    submitted_ns: u64,
    queued_ns: u64,
    done_ns: u64,
}

struct Simulation {
    commit: Commit,
    buffer: LogBuffer,
    flush_accounting: FlushAccounting,
    crc: u32,
    /// Bytes of the open frame, its header's place included, and its records.
    open_bytes: usize,
    open_records: u32,
    open_since_ns: u64,
    flights: Vec<Flight>,
    now_ns: u64,
    /// When clients send their next commands, ascending.
    arrivals: VecDeque<u64>,
    /// The ends of records whose clients wait, ascending.
    waiting: VecDeque<Lsn>,
    random: u64,
}

impl Simulation {
    fn new(clients: usize, depth: usize) -> Simulation {
        Simulation {
            commit: Commit::new(Lsn::ZERO, depth),
            buffer: LogBuffer::new(LOG_BUFFER_BYTES, Lsn::ZERO).expect("memory for the log buffer"),
            flush_accounting: FlushAccounting::new(),
            crc: 0,
            open_bytes: FRAME_HEADER_BYTES,
            open_records: 0,
            open_since_ns: 0,
            flights: Vec::with_capacity(depth),
            now_ns: 0,
            arrivals: (0..clients as u64).map(|client| client * CLIENT_GAP_NS).collect(),
            waiting: VecDeque::with_capacity(clients),
            random: 0x9E37_79B9_7F4A_7C15,
        }
    }

    /// Goes on until `commits` more are answered.
    fn run(&mut self, commits: u64) {
        let mut left = commits;
        while left > 0 {
            left = left.saturating_sub(self.take_completions());
            self.take_arrivals();
            while self.commit.can_submit() && self.open_records > 0 {
                self.submit();
            }
            let completion = self.flights.iter().map(|flight| flight.done_ns).min();
            let next = self.arrivals.front().copied().into_iter().chain(completion).min();
            self.now_ns = self.now_ns.max(next.expect("a client is either about to send or waits for the disk"));
        }
    }

    /// Ends the writes that are done and answers the clients whose commits are durable; how many.
    fn take_completions(&mut self) -> u64 {
        while let Some(at) = self.flights.iter().position(|flight| flight.done_ns <= self.now_ns) {
            let flight = self.flights.swap_remove(at);
            self.flush_accounting.record(&DurableWrite {
                records: u64::from(flight.records),
                bytes: flight.span_bytes as u64,
                padding_bytes: (flight.span_bytes - flight.wire_bytes) as u64,
                queue_wait: Duration::from_nanos(flight.submitted_ns - flight.queued_ns),
                device_time: Duration::from_nanos(flight.done_ns - flight.submitted_ns),
            });
            self.commit.complete(flight.number);
        }
        let flushed = self.commit.flushed();
        self.commit.apply(flushed);
        let mut answered = 0;
        while self.waiting.front().is_some_and(|end| *end <= flushed) {
            self.waiting.pop_front();
            let behind_the_last = self.arrivals.back().map_or(0, |last| last + CLIENT_GAP_NS);
            self.arrivals.push_back(behind_the_last.max(self.now_ns + ROUND_TRIP_NS));
            answered += 1;
        }
        answered
    }

    fn take_arrivals(&mut self) {
        while self.arrivals.front().is_some_and(|at| *at <= self.now_ns) {
            self.arrivals.pop_front();
            if self.open_records == 0 {
                self.open_since_ns = self.now_ns;
                let fits = self.buffer.evict_for(self.commit.sealed(), FRAME_TARGET_BYTES, self.commit.applied());
                assert!(fits, "fewer bytes wait than the buffer has");
            }
            let at = self.commit.sealed().advance(self.open_bytes as u64);
            let bytes = self.buffer.bytes_mut(at, RECORD_LENGTH_BYTES + RECORD_BYTES);
            bytes[..RECORD_LENGTH_BYTES].copy_from_slice(&(RECORD_BYTES as u32).to_le_bytes());
            bytes[RECORD_LENGTH_BYTES..].fill(self.open_records as u8);
            self.waiting.push_back(at.advance(bytes.len() as u64));
            self.open_bytes += bytes.len();
            self.open_records += 1;
            self.now_ns += COMMAND_NS;
        }
    }

    /// Seals the open frame and gives it to the disk.
    fn submit(&mut self) {
        let flushed = self.commit.flushed();
        let header = FrameHeader {
            filler: false,
            epoch: Epoch(1),
            lsn: self.commit.sealed(),
            payload_bytes: (self.open_bytes - FRAME_HEADER_BYTES) as u32,
            record_count: self.open_records,
            previous_crc: self.crc,
            crc: 0,
            flushed,
            committed: flushed,
            sealed_at_us: self.now_ns / 1000,
        };
        let bytes = self.buffer.bytes_mut(header.lsn, header.span_bytes());
        bytes[header.wire_bytes()..].fill(0);
        self.crc = header.seal(bytes).crc;
        self.commit.seal(header.end());
        let write_ns = WRITE_NS + WRITE_NS_PER_KIB * (header.span_bytes() as u64 >> 10) + self.jitter(WRITE_NS / 8);
        self.flights.push(Flight {
            number: self.commit.submit(header.end()),
            records: self.open_records,
            wire_bytes: header.wire_bytes(),
            span_bytes: header.span_bytes(),
            submitted_ns: self.now_ns,
            queued_ns: self.open_since_ns,
            done_ns: self.now_ns + write_ns,
        });
        (self.open_bytes, self.open_records) = (FRAME_HEADER_BYTES, 0);
    }

    fn jitter(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % below
    }
}

/// What the simulated clock says of one case.
fn report(clients: usize, depth: usize) {
    let mut simulation = Simulation::new(clients, depth);
    simulation.run(COMMITS);
    let seen = simulation.flush_accounting.snapshot();
    assert!(seen.records >= COMMITS && seen.records <= COMMITS + clients as u64, "{} records", seen.records);
    assert!(clients > 1 || seen.records == seen.flushes, "one client waits for each of its commits");
    assert!(seen.bytes >= seen.flushes * FRAME_ALIGN_BYTES as u64);
    assert!(simulation.commit.sealed() - simulation.commit.flushed() <= (depth * FRAME_TARGET_BYTES) as u64);
    println!(
        "group_commit: {clients} clients, depth {depth}: {:.1} records per flush (p50 {}, max {}), {:.0} commits per simulated \
         second, padding {:.0} %",
        seen.records_per_flush.mean,
        seen.records_per_flush.p50,
        seen.records_per_flush.max,
        COMMITS as f64 / (simulation.now_ns as f64 / 1e9),
        seen.padding_share() * 100.0,
    );
}

fn group_commit(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("group_commit");
    group.throughput(Throughput::Elements(COMMITS));
    for depth in WRITE_DEPTHS {
        for clients in CLIENTS {
            report(clients, depth);
            let mut simulation = Simulation::new(clients, depth);
            group.bench_function(BenchmarkId::new(format!("depth_{depth}"), clients), |bencher| {
                bencher.iter(|| simulation.run(COMMITS));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, group_commit);
criterion_main!(benches);
