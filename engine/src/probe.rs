//! The fsync probe: how fast this disk makes writes durable, by sync method, depth and size, through the same ring
//! and the same kind of memory that the log writes from. `init` runs the brief one to choose the sync method and the
//! write depth; `walferry fsync` runs the full one and prints the table. Knows no log.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use io_uring::{opcode, squeue, types};

use crate::buffer::LogBuffer;
use crate::limits::{FRAME_ALIGN_BYTES, WRITE_DEPTH_MAX};
use crate::log::{SyncMethod, direct_io_refusal};
use crate::lsn::Lsn;
use crate::prepare::{open_segment, write_zeros};
use crate::ring::{Completion, Owner, Ring, RingError, Token};

/// The file that is written, in the probed directory; removed afterwards.
const PROBE_FILE: &str = "probe.tmp";
/// The size of the file in a brief probe.
const BRIEF_FILE_BYTES: u64 = 16 << 20;
/// The size of the file in a full probe.
const FULL_FILE_BYTES: u64 = 64 << 20;
/// The time that all trials of a brief probe share; with the file's zeros it stays below a second on a usual disk.
const BRIEF_BUDGET: Duration = Duration::from_millis(600);
/// The depth that is recommended is the smallest that reaches this share of the best rate, in percent.
const DEPTH_RATE_PERCENT_MIN: f64 = 85.0;
/// A depth is not recommended when its median latency is more than this many times that of a single write: beyond it
/// writes only queue at the device, and fewer, larger group commits cost less.
const DEPTH_LATENCY_FACTOR_MAX: u64 = 2;
/// A method with a longer flush at depth 1 is preferred only with this many times the rate of the other.
const RATE_ADVANTAGE_MIN: f64 = 1.25;
/// Latencies above this count as this.
const LATENCY_US_MAX: u64 = 60_000_000;

/// A way to make a write durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProbeMethod {
    /// O_DIRECT with `RWF_DSYNC`.
    Dsync,
    /// O_DIRECT, then a linked `fdatasync`.
    Fdatasync,
    /// Through the page cache, then a linked `fdatasync`.
    BufferedFdatasync,
}

impl ProbeMethod {
    /// The name in the table.
    pub fn name(self) -> &'static str {
        match self {
            ProbeMethod::Dsync => "dsync",
            ProbeMethod::Fdatasync => "fdatasync",
            ProbeMethod::BufferedFdatasync => "buffered+fdatasync",
        }
    }

    /// The log's sync method that it stands for.
    pub fn sync_method(self) -> SyncMethod {
        match self {
            ProbeMethod::Dsync => SyncMethod::Dsync,
            ProbeMethod::Fdatasync | ProbeMethod::BufferedFdatasync => SyncMethod::Fdatasync,
        }
    }

    fn buffered(self) -> bool {
        self == ProbeMethod::BufferedFdatasync
    }
}

/// What is tried, and for how long.
#[derive(Clone, Debug)]
pub struct ProbeConfig {
    /// The methods.
    pub methods: Vec<ProbeMethod>,
    /// Writes in flight; each at most WRITE_DEPTH_MAX.
    pub depths: Vec<usize>,
    /// Sizes of a write; multiples of FRAME_ALIGN_BYTES.
    pub sizes_bytes: Vec<usize>,
    /// The time that all trials share.
    pub budget: Duration,
    /// The size of the file.
    pub file_bytes: u64,
}

impl ProbeConfig {
    /// For `init`: under a second. With `buffered` only what a buffered log can use.
    pub fn brief(buffered: bool) -> ProbeConfig {
        let methods = if buffered {
            vec![ProbeMethod::BufferedFdatasync]
        } else {
            vec![ProbeMethod::Dsync, ProbeMethod::Fdatasync]
        };
        ProbeConfig {
            methods,
            depths: vec![1, 2, 4, 8],
            sizes_bytes: vec![FRAME_ALIGN_BYTES],
            budget: BRIEF_BUDGET,
            file_bytes: BRIEF_FILE_BYTES,
        }
    }

    /// For `walferry fsync`: every method, within about `budget`.
    pub fn full(budget: Duration) -> ProbeConfig {
        ProbeConfig {
            methods: vec![ProbeMethod::Dsync, ProbeMethod::Fdatasync, ProbeMethod::BufferedFdatasync],
            depths: vec![1, 2, 4, 8, 16],
            sizes_bytes: vec![4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20],
            budget,
            file_bytes: FULL_FILE_BYTES,
        }
    }
}

/// What one combination did.
#[derive(Clone, Copy, Debug)]
pub struct ProbeRow {
    /// The method.
    pub method: ProbeMethod,
    /// Writes in flight.
    pub depth: usize,
    /// The size of each.
    pub bytes: usize,
    /// How many were made durable.
    pub writes: u64,
    /// Durable writes in a second.
    pub per_second: f64,
    /// Median latency.
    pub p50_us: u64,
    /// Latency that 99 % stay under.
    pub p99_us: u64,
}

impl ProbeRow {
    /// Durable MiB in a second.
    pub fn mebibytes_per_second(&self) -> f64 {
        self.per_second * self.bytes as f64 / f64::from(1 << 20)
    }
}

/// What a log on this disk should use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recommendation {
    /// How writes are made durable.
    pub sync_method: SyncMethod,
    /// Writes in flight.
    pub write_depth: usize,
    /// True when only the page cache worked.
    pub buffered: bool,
}

/// The outcome of a probe.
#[derive(Clone, Debug)]
pub struct ProbeReport {
    /// By method, then size, then depth.
    pub rows: Vec<ProbeRow>,
    /// Methods that this filesystem refuses, with the reason.
    pub refused: Vec<(ProbeMethod, String)>,
    /// What to use; `None` when every method was refused.
    pub recommendation: Option<Recommendation>,
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// No ring.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// The file cannot be made or written.
    #[error("cannot probe {path}: {source}", path = path.display())]
    Io {
        /// The probe's file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Removes the probe's file, however the probe ends.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Probes the disk of `dir`, an existing directory.
pub fn run(dir: &Path, config: &ProbeConfig) -> Result<ProbeReport, ProbeError> {
    let scratch = Scratch(dir.join(PROBE_FILE));
    let io = |source| ProbeError::Io { path: scratch.0.clone(), source };
    let mut refused = Vec::new();
    let mut methods = Vec::new();
    for method in config.methods.iter().copied() {
        match method.buffered() {
            false => match direct_io_refusal(dir, method.sync_method()).map_err(io)? {
                Some(reason) => refused.push((method, reason)),
                None => methods.push(method),
            },
            true => methods.push(method),
        }
    }
    let direct = methods.iter().any(|method| !method.buffered());
    write_zeros(&scratch.0, config.file_bytes, !direct, || Ok(false)).map_err(io)?;
    let bytes_max = config.sizes_bytes.iter().max().copied().unwrap_or(FRAME_ALIGN_BYTES);
    let mut trial = Trial::new(bytes_max, config.file_bytes).map_err(|error| match error {
        TrialError::Ring(error) => ProbeError::Ring(error),
        TrialError::Io(error) => io(error),
    })?;
    let trials = methods.len() * config.depths.len() * config.sizes_bytes.len();
    let time = config.budget / trials.max(1) as u32;
    let mut rows = Vec::with_capacity(trials);
    for method in methods {
        let file = open_segment(&scratch.0, method.buffered()).map_err(io)?;
        for bytes in config.sizes_bytes.iter().copied() {
            for depth in config.depths.iter().copied() {
                rows.push(trial.run(&file, method, depth, bytes, time).map_err(io)?);
            }
        }
    }
    let recommendation = recommend(&rows);
    Ok(ProbeReport { rows, refused, recommendation })
}

enum TrialError {
    Ring(RingError),
    Io(io::Error),
}

/// The ring and the memory of all trials.
struct Trial {
    ring: Ring,
    buffer: LogBuffer,
    registered: bool,
    file_bytes: u64,
}

/// A write of a trial: when it started, and completions still to come.
#[derive(Clone, Copy)]
struct Slot {
    started: Instant,
    outstanding: u8,
}

impl Trial {
    fn new(bytes_max: usize, file_bytes: u64) -> Result<Trial, TrialError> {
        let mut ring = Ring::new(WRITE_DEPTH_MAX as u32 * 2).map_err(TrialError::Ring)?;
        let mut buffer = LogBuffer::new(bytes_max, Lsn::ZERO).map_err(TrialError::Io)?;
        // Not zeros: some virtual disks take a shortcut for those.
        for (index, byte) in buffer.bytes_mut(Lsn::ZERO, bytes_max).iter_mut().enumerate() {
            *byte = (index % 251) as u8 + 1;
        }
        // SAFETY: ring and buffer live and end together, and every trial waits for its writes.
        let registered = unsafe { ring.register_buffers(&[buffer.fixed_range()]) }.is_ok();
        Ok(Trial { ring, buffer, registered, file_bytes })
    }

    fn run(
        &mut self,
        file: &File,
        method: ProbeMethod,
        depth: usize,
        bytes: usize,
        time: Duration,
    ) -> io::Result<ProbeRow> {
        assert!((1..=WRITE_DEPTH_MAX).contains(&depth) && bytes as u64 <= self.file_bytes);
        let mut latency = Histogram::<u64>::new_with_bounds(1, LATENCY_US_MAX, 3).expect("sound bounds");
        let started = Instant::now();
        let mut slots = vec![Slot { started, outstanding: 0 }; depth];
        let mut at = 0;
        for (slot, state) in slots.iter_mut().enumerate() {
            *state = self.push(file, method, slot, bytes, &mut at);
        }
        let mut running = depth;
        let mut failure = None;
        let mut completions: Vec<Completion> = Vec::with_capacity(depth * 2);
        while running > 0 {
            self.ring.submit_and_wait(None)?;
            self.ring.completions(&mut completions);
            let now = Instant::now();
            for completion in completions.drain(..) {
                let (slot, is_write) = ((completion.token.id() >> 1) as usize, completion.token.id() & 1 == 0);
                if completion.result < 0 || is_write && completion.result as usize != bytes {
                    failure = failure.or(Some(completion.outcome().err().unwrap_or(io::ErrorKind::WriteZero.into())));
                }
                slots[slot].outstanding -= 1;
                if slots[slot].outstanding > 0 {
                    continue;
                }
                latency.saturating_record(now.duration_since(slots[slot].started).as_micros() as u64);
                if failure.is_none() && now.duration_since(started) < time {
                    slots[slot] = self.push(file, method, slot, bytes, &mut at);
                } else {
                    running -= 1;
                }
            }
        }
        match failure {
            Some(error) => Err(error),
            None => Ok(ProbeRow {
                method,
                depth,
                bytes,
                writes: latency.len(),
                per_second: latency.len() as f64 / started.elapsed().as_secs_f64(),
                p50_us: latency.value_at_quantile(0.5),
                p99_us: latency.value_at_quantile(0.99),
            }),
        }
    }

    /// Queues a durable write at the next place of the file.
    fn push(&mut self, file: &File, method: ProbeMethod, slot: usize, bytes: usize, at: &mut u64) -> Slot {
        if *at + bytes as u64 > self.file_bytes {
            *at = 0;
        }
        let fd = types::Fd(file.as_raw_fd());
        let address = self.buffer.address(Lsn::ZERO).cast_const();
        let flags = if method == ProbeMethod::Dsync { libc::RWF_DSYNC } else { 0 };
        let write = if self.registered {
            opcode::WriteFixed::new(fd, address, bytes as u32, 0).offset(*at).rw_flags(flags).build()
        } else {
            opcode::Write::new(fd, address, bytes as u32).offset(*at).rw_flags(flags).build()
        };
        *at += bytes as u64;
        let token = |part| u64::from(Token::new(Owner::Log, (slot as u64) << 1 | part));
        let write = write.user_data(token(0));
        let linked = method != ProbeMethod::Dsync;
        if linked {
            let flush = opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build();
            let chain = [write.flags(squeue::Flags::IO_LINK), flush.user_data(token(1))];
            // SAFETY: `run` holds buffer and file until the completions are in.
            unsafe { self.ring.push_chain(&chain) };
        } else {
            // SAFETY: as above.
            unsafe { self.ring.push(write) };
        }
        Slot { started: Instant::now(), outstanding: if linked { 2 } else { 1 } }
    }
}

/// The method and depth for small frames, on which the latency of a commit hangs.
fn recommend(rows: &[ProbeRow]) -> Option<Recommendation> {
    let smallest = rows.iter().map(|row| row.bytes).min()?;
    let direct = rows.iter().any(|row| !row.method.buffered());
    let small = || rows.iter().filter(|row| row.bytes == smallest && row.method.buffered() != direct);
    let best = |method| small().filter(|r| r.method == method).map(|r| r.per_second).fold(0.0, f64::max);
    let alone = |method| small().filter(|r| r.method == method).min_by_key(|r| r.depth).map_or(u64::MAX, |r| r.p50_us);
    let mut chosen = small().next()?.method;
    for method in small().map(|row| row.method) {
        let faster = best(method) / best(chosen);
        let sooner = alone(method) < alone(chosen);
        if faster >= RATE_ADVANTAGE_MIN || sooner && faster > 1.0 / RATE_ADVANTAGE_MIN {
            chosen = method;
        }
    }
    let near = || small().filter(|r| r.method == chosen && r.p50_us <= alone(chosen) * DEPTH_LATENCY_FACTOR_MAX);
    let enough = near().map(|row| row.per_second).fold(0.0, f64::max) * DEPTH_RATE_PERCENT_MIN / 100.0;
    let depths = near().filter(|row| row.per_second >= enough);
    Some(Recommendation {
        sync_method: chosen.sync_method(),
        write_depth: depths.map(|row| row.depth).min()?,
        buffered: chosen.buffered(),
    })
}

impl fmt::Display for Recommendation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let buffered = if self.buffered { ", buffered = true" } else { "" };
        write!(f, "sync_method = \"{}\", write_depth = {}{buffered}", self.sync_method, self.write_depth)
    }
}

/// The table and the recommendation, as `walferry fsync` prints them.
impl fmt::Display for ProbeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<20} {:>8} {:>6} {:>12} {:>10} {:>10} {:>10}",
            "method", "size", "depth", "durable/s", "MiB/s", "p50 us", "p99 us"
        )?;
        for row in &self.rows {
            writeln!(
                f,
                "{:<20} {:>4} KiB {:>6} {:>12.0} {:>10.1} {:>10} {:>10}",
                row.method.name(),
                row.bytes >> 10,
                row.depth,
                row.per_second,
                row.mebibytes_per_second(),
                row.p50_us,
                row.p99_us
            )?;
        }
        for (method, reason) in &self.refused {
            writeln!(f, "{:<20} refused by this filesystem: {reason}", method.name())?;
        }
        match &self.recommendation {
            Some(recommendation) => write!(f, "recommended: {recommendation}"),
            None => write!(f, "no method works on this filesystem"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(method: ProbeMethod, depth: usize, per_second: f64, p50_us: u64) -> ProbeRow {
        ProbeRow { method, depth, bytes: 4096, writes: 1, per_second, p50_us, p99_us: p50_us }
    }

    #[test]
    fn the_smallest_depth_near_the_best_rate_of_the_sooner_method() {
        let rows = [
            row(ProbeMethod::Dsync, 1, 7500.0, 120),
            row(ProbeMethod::Dsync, 4, 18_200.0, 200),
            row(ProbeMethod::Dsync, 8, 29_000.0, 250),
            row(ProbeMethod::Fdatasync, 1, 5000.0, 190),
            row(ProbeMethod::Fdatasync, 4, 20_000.0, 220),
            row(ProbeMethod::BufferedFdatasync, 8, 90_000.0, 10),
        ];
        let recommended = recommend(&rows).expect("rows");
        assert_eq!((recommended.sync_method, recommended.write_depth), (SyncMethod::Dsync, 4));
        let fast =
            [rows[0], row(ProbeMethod::Fdatasync, 1, 7000.0, 130), row(ProbeMethod::Fdatasync, 2, 12_000.0, 150)];
        assert_eq!(recommend(&fast).map(|r| (r.sync_method, r.write_depth)), Some((SyncMethod::Fdatasync, 2)));
        let cached = recommend(&rows[5..]).expect("rows");
        assert!(cached.buffered && recommend(&[]).is_none());
    }
}
