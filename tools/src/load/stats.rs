//! What a thread counted in one interval. Histograms of threads and intervals are added up; percentiles are read
//! from the sum and never averaged. Knows no clock.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;

/// The longest latency that is told apart.
const LATENCY_NS_MAX: u64 = 3_600_000_000_000;
/// Three digits: 0.1 % of error.
const SIGNIFICANT_DIGITS: u8 = 3;
/// Kinds of failure that are told apart; further ones count as `other`.
const FAILURE_KINDS_MAX: usize = 16;
/// Kept of the first error text of each kind.
const EXAMPLE_CHARS_MAX: usize = 200;

/// Count, sum and sum of squares: exact mean and deviation.
#[derive(Clone, Copy, Debug, Default)]
pub struct Moments {
    /// How many.
    pub count: u64,
    sum: f64,
    sum_of_squares: f64,
    max: f64,
}

impl Moments {
    /// Counts one duration.
    pub fn record(&mut self, time: Duration) {
        let ms = time.as_secs_f64() * 1e3;
        self.count += 1;
        self.sum += ms;
        self.sum_of_squares += ms * ms;
        self.max = self.max.max(ms);
    }

    /// Adds what another counted.
    pub fn add(&mut self, other: &Moments) {
        self.count += other.count;
        self.sum += other.sum;
        self.sum_of_squares += other.sum_of_squares;
        self.max = self.max.max(other.max);
    }

    /// The mean in milliseconds; 0 of nothing.
    pub fn mean_ms(&self) -> f64 {
        if self.count == 0 { 0.0 } else { self.sum / self.count as f64 }
    }

    /// The standard deviation in milliseconds.
    pub fn stddev_ms(&self) -> f64 {
        if self.count == 0 {
            return 0.0;
        }
        let mean = self.mean_ms();
        (self.sum_of_squares / self.count as f64 - mean * mean).max(0.0).sqrt()
    }

    /// The largest in milliseconds.
    pub fn max_ms(&self) -> f64 {
        self.max
    }
}

/// How often something failed in one way.
#[derive(Clone, Debug, Default)]
pub struct Failures {
    /// How many transactions.
    pub count: u64,
    /// The first error's text.
    pub example: String,
}

/// What one command of one script cost.
#[derive(Clone, Copy, Debug, Default)]
pub struct CommandStats {
    /// From sending to the answer.
    pub latency: Moments,
    /// Error answers.
    pub failed: u64,
}

/// What one script did.
#[derive(Clone, Debug, Default)]
pub struct ScriptStats {
    /// Successful transactions.
    pub latency: Moments,
    /// Failed transactions.
    pub failed: u64,
    /// By step of the script; steps that are no command stay empty.
    pub commands: Vec<CommandStats>,
}

/// Everything that one thread counted in one interval, or all of them together.
#[derive(Clone, Debug)]
pub struct Stats {
    /// Latencies of successful transactions in nanoseconds.
    pub histogram: Histogram<u64>,
    /// The same, exactly.
    pub latency: Moments,
    /// How late transactions began after their scheduled time.
    pub lag: Moments,
    /// Failed transactions by the code of their error.
    pub failures: BTreeMap<String, Failures>,
    /// By script.
    pub scripts: Vec<ScriptStats>,
    /// Connections that were lost and opened again.
    pub reconnects: u64,
}

impl Stats {
    /// Nothing yet, for scripts with so many steps each.
    pub fn new(steps: &[usize]) -> Stats {
        let bounds = Histogram::new_with_bounds(1, LATENCY_NS_MAX, SIGNIFICANT_DIGITS);
        let script =
            |count: &usize| ScriptStats { commands: vec![CommandStats::default(); *count], ..Default::default() };
        Stats {
            histogram: bounds.expect("the bounds are constants that hdrhistogram takes"),
            latency: Moments::default(),
            lag: Moments::default(),
            failures: BTreeMap::new(),
            scripts: steps.iter().map(script).collect(),
            reconnects: 0,
        }
    }

    /// Counts a successful transaction.
    pub fn succeeded(&mut self, script: usize, latency: Duration) {
        self.histogram.saturating_record(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX));
        self.latency.record(latency);
        self.scripts[script].latency.record(latency);
    }

    /// Counts a failed transaction by its error, whose first word is its code.
    pub fn failed(&mut self, script: usize, error: &str) {
        self.scripts[script].failed += 1;
        let code = error.split_whitespace().next().unwrap_or("unknown");
        self.count_failures(code, 1, error);
    }

    fn count_failures(&mut self, code: &str, count: u64, example: &str) {
        let known = self.failures.contains_key(code) || self.failures.len() < FAILURE_KINDS_MAX;
        let entry = self.failures.entry(if known { code } else { "other" }.to_owned()).or_default();
        if entry.count == 0 {
            entry.example = example.chars().take(EXAMPLE_CHARS_MAX).collect();
        }
        entry.count += count;
    }

    /// How many transactions failed.
    pub fn failed_count(&self) -> u64 {
        self.scripts.iter().map(|script| script.failed).sum()
    }

    /// Adds what another counted.
    pub fn add(&mut self, other: &Stats) {
        self.histogram.add(&other.histogram).expect("both histograms have the same bounds");
        self.latency.add(&other.latency);
        self.lag.add(&other.lag);
        self.reconnects += other.reconnects;
        for (code, failures) in &other.failures {
            self.count_failures(code, failures.count, &failures.example);
        }
        for (mine, theirs) in self.scripts.iter_mut().zip(&other.scripts) {
            mine.latency.add(&theirs.latency);
            mine.failed += theirs.failed;
            for (mine, theirs) in mine.commands.iter_mut().zip(&theirs.commands) {
                mine.latency.add(&theirs.latency);
                mine.failed += theirs.failed;
            }
        }
    }

    /// A percentile in milliseconds; never above the largest latency, whatever the histogram's buckets round up to.
    pub fn percentile_ms(&self, percentile: f64) -> f64 {
        if self.histogram.is_empty() {
            return 0.0;
        }
        (self.histogram.value_at_percentile(percentile) as f64 / 1e6).min(self.latency.max_ms())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_come_from_the_sum_of_histograms() {
        let (mut fast, mut slow) = (Stats::new(&[1]), Stats::new(&[1]));
        for _ in 0..99 {
            fast.succeeded(0, Duration::from_micros(100));
        }
        slow.succeeded(0, Duration::from_millis(50));
        fast.add(&slow);
        assert!((fast.percentile_ms(50.0) - 0.1).abs() < 0.001);
        assert!((fast.percentile_ms(100.0) - 50.0).abs() < 0.1);
        assert!((fast.latency.mean_ms() - 0.599).abs() < 0.001, "{}", fast.latency.mean_ms());
        assert_eq!(fast.scripts[0].latency.count, 100);
    }

    #[test]
    fn moments_are_exact() {
        let mut moments = Moments::default();
        for ms in [2, 4, 4, 4, 5, 5, 7, 9] {
            moments.record(Duration::from_millis(ms));
        }
        assert!((moments.mean_ms() - 5.0).abs() < 1e-9);
        assert!((moments.stddev_ms() - 2.0).abs() < 1e-9);
        assert_eq!(moments.max_ms(), 9.0);
        assert_eq!(Moments::default().mean_ms(), 0.0);
    }

    #[test]
    fn failures_are_counted_by_code_within_a_bound() {
        let mut stats = Stats::new(&[1]);
        stats.failed(0, "UNCERTAIN committed locally at 0/1000, not confirmed by b");
        stats.failed(0, "UNCERTAIN committed locally at 0/2000, not confirmed by b");
        for number in 0..100 {
            stats.failed(0, &format!("CODE{number} x"));
        }
        assert_eq!(stats.failures["UNCERTAIN"].count, 2);
        assert!(stats.failures["UNCERTAIN"].example.contains("0/1000"));
        assert_eq!(stats.failures.len(), FAILURE_KINDS_MAX + 1);
        assert_eq!(stats.failed_count(), 102);
    }
}
