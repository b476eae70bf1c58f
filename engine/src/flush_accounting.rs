//! The flush accounting: what each durable write carried and what it cost. The log's driver records, status and INFO read; nothing
//! decides by it.

use std::collections::VecDeque;
use std::time::Duration;

use hdrhistogram::Histogram;

/// The longest duration that is told apart, microseconds; longer ones count as this.
const DURATION_US_MAX: u64 = 60_000_000;
/// The most records a write that are told apart.
const RECORDS_MAX: u64 = 1 << 24;
/// The most bytes a write that are told apart.
const BYTES_MAX: u64 = 1 << 30;
/// Decimal digits that the histograms keep.
const PRECISION: u8 = 3;

/// One write that became durable.
#[derive(Clone, Copy, Debug)]
pub struct DurableWrite {
    /// Records in its frames.
    pub records: u64,
    /// Bytes, padding included.
    pub bytes: u64,
    /// Bytes of padding and fillers.
    pub padding_bytes: u64,
    /// From the arrival of its oldest record to its submission.
    pub queue_wait: Duration,
    /// From its submission until it was durable.
    pub device_time: Duration,
}

/// The sums and distributions of all durable writes since the start.
#[derive(Clone, Debug)]
pub struct FlushAccounting {
    flushes: u64,
    records: u64,
    bytes: u64,
    padding_bytes: u64,
    records_per_flush: Histogram<u64>,
    bytes_per_flush: Histogram<u64>,
    queue_us: Histogram<u64>,
    device_us: Histogram<u64>,
    /// Device times of the newest writes, at most [`RECENT_WRITES`].
    recent: VecDeque<Duration>,
}

/// The percentiles of one distribution.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Percentiles {
    /// Half are at most this.
    pub p50: u64,
    /// Nine of ten.
    pub p90: u64,
    /// 99 of 100.
    pub p99: u64,
    /// 999 of 1000.
    pub p999: u64,
    /// The largest.
    pub max: u64,
    /// The mean.
    pub mean: f64,
}

/// The flush accounting at one moment, as plain numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct FlushSnapshot {
    /// Durable writes.
    pub flushes: u64,
    /// Records in them.
    pub records: u64,
    /// Bytes in them, padding included.
    pub bytes: u64,
    /// Bytes of padding and fillers.
    pub padding_bytes: u64,
    /// Records per durable write.
    pub records_per_flush: Percentiles,
    /// Bytes per durable write.
    pub bytes_per_flush: Percentiles,
    /// Wait for the disk, microseconds.
    pub queue_us: Percentiles,
    /// Time at the disk, microseconds.
    pub device_us: Percentiles,
}

impl FlushSnapshot {
    /// Padding as a share of all bytes, 0 to 1.
    pub fn padding_share(&self) -> f64 {
        if self.bytes == 0 { 0.0 } else { self.padding_bytes as f64 / self.bytes as f64 }
    }

    /// Time at the disk that each commit would pay if they shared it evenly, microseconds.
    pub fn device_us_per_commit(&self) -> f64 {
        if self.records == 0 { 0.0 } else { self.device_us.mean * self.flushes as f64 / self.records as f64 }
    }

    /// Flushes that commits did not have to pay for, because another's flush carried them.
    pub fn saved_flushes(&self) -> u64 {
        self.records.saturating_sub(self.flushes)
    }
}

fn histogram(max: u64) -> Histogram<u64> {
    Histogram::new_with_bounds(1, max, PRECISION).expect("constant bounds that a histogram takes")
}

fn percentiles(of: &Histogram<u64>) -> Percentiles {
    let at = |quantile| of.value_at_quantile(quantile);
    Percentiles { p50: at(0.5), p90: at(0.9), p99: at(0.99), p999: at(0.999), max: of.max(), mean: of.mean() }
}

/// So many of the newest writes tell whether the disk is slow at the moment.
pub const RECENT_WRITES: usize = 128;

impl Default for FlushAccounting {
    fn default() -> FlushAccounting {
        FlushAccounting::new()
    }
}

impl FlushAccounting {
    /// An empty flush accounting.
    pub fn new() -> FlushAccounting {
        FlushAccounting {
            flushes: 0,
            records: 0,
            bytes: 0,
            padding_bytes: 0,
            records_per_flush: histogram(RECORDS_MAX),
            bytes_per_flush: histogram(BYTES_MAX),
            queue_us: histogram(DURATION_US_MAX),
            device_us: histogram(DURATION_US_MAX),
            recent: VecDeque::with_capacity(RECENT_WRITES),
        }
    }

    /// A write became durable.
    pub fn record(&mut self, write: &DurableWrite) {
        self.flushes += 1;
        self.records += write.records;
        self.bytes += write.bytes;
        self.padding_bytes += write.padding_bytes;
        self.records_per_flush.saturating_record(write.records);
        self.bytes_per_flush.saturating_record(write.bytes);
        self.queue_us.saturating_record(write.queue_wait.as_micros() as u64);
        self.device_us.saturating_record(write.device_time.as_micros() as u64);
        if self.recent.len() == RECENT_WRITES {
            self.recent.pop_front();
        }
        self.recent.push_back(write.device_time);
    }

    /// How many of the newest writes are looked at, and the time that 99 of 100 of them took at most.
    pub fn recent_p99(&self) -> (usize, Duration) {
        let mut times: Vec<Duration> = self.recent.iter().copied().collect();
        times.sort_unstable();
        let rank = (times.len() * 99).div_ceil(100);
        (times.len(), rank.checked_sub(1).map_or(Duration::ZERO, |index| times[index]))
    }

    /// Durable writes so far.
    pub fn flushes(&self) -> u64 {
        self.flushes
    }

    /// Records in them.
    pub fn records(&self) -> u64 {
        self.records
    }

    /// Everything as plain numbers.
    pub fn snapshot(&self) -> FlushSnapshot {
        FlushSnapshot {
            flushes: self.flushes,
            records: self.records,
            bytes: self.bytes,
            padding_bytes: self.padding_bytes,
            records_per_flush: percentiles(&self.records_per_flush),
            bytes_per_flush: percentiles(&self.bytes_per_flush),
            queue_us: percentiles(&self.queue_us),
            device_us: percentiles(&self.device_us),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flush_accounting_adds_up() {
        let mut flush_accounting = FlushAccounting::new();
        for records in [1, 3] {
            flush_accounting.record(&DurableWrite {
                records,
                bytes: 4096,
                padding_bytes: 1024,
                queue_wait: Duration::from_micros(10),
                device_time: Duration::from_secs(1000),
            });
        }
        let seen = flush_accounting.snapshot();
        assert_eq!((seen.flushes, seen.records, seen.bytes), (2, 4, 8192));
        assert_eq!(seen.saved_flushes(), 2);
        assert_eq!(seen.padding_share(), 0.25);
        assert_eq!(seen.records_per_flush.max, 3);
        assert!(seen.device_us.max >= DURATION_US_MAX, "beyond the range counts as its end");
    }

    #[test]
    fn a_disk_that_became_slow_is_seen_in_the_newest_writes() {
        let mut flush_accounting = FlushAccounting::new();
        assert_eq!(flush_accounting.recent_p99(), (0, Duration::ZERO));
        let mut write = |ms, count| {
            for _ in 0..count {
                let device_time = Duration::from_millis(ms);
                flush_accounting.record(&DurableWrite {
                    records: 1,
                    bytes: 4096,
                    padding_bytes: 0,
                    queue_wait: Duration::ZERO,
                    device_time,
                });
            }
            flush_accounting.recent_p99()
        };
        assert_eq!(write(1, 1000), (RECENT_WRITES, Duration::from_millis(1)));
        assert_eq!(write(300, 1).1, Duration::from_millis(1), "one of 128 is not the disk");
        assert_eq!(write(300, 1).1, Duration::from_millis(300));
        assert_eq!(write(1, RECENT_WRITES).1, Duration::from_millis(1), "it is fast again");
    }
}
