//! What a run tells at its end and on the way: pgbench's lines, percentiles, JSON, the interval log.
//! Called by the run; knows neither sockets nor scripts' contents.

use std::cmp::Reverse;
use std::fmt::Write as _;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use hdrhistogram::serialization::V2DeflateSerializer;
use hdrhistogram::serialization::interval_log::IntervalLogWriterBuilder;
use serde::Serialize;

use super::stats::{Moments, Stats};

/// The interval log counts nanoseconds and prints its maxima in milliseconds.
const LOG_MAX_DIVISOR: f64 = 1e6;

/// Latencies in milliseconds.
#[derive(Clone, Debug, Serialize)]
pub struct Latency {
    /// Mean, exact.
    pub average: f64,
    /// Standard deviation, exact.
    pub stddev: f64,
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
    /// 99.9th percentile.
    pub p999: f64,
    /// Largest.
    pub max: f64,
}

/// How one command did.
#[derive(Clone, Debug, Serialize)]
pub struct CommandSummary {
    /// The script's line.
    pub command: String,
    /// Mean from sending to the answer.
    pub latency_average_ms: f64,
    /// Error answers.
    pub failed: u64,
}

/// How one script did.
#[derive(Clone, Debug, Serialize)]
pub struct ScriptSummary {
    /// Its name.
    pub name: String,
    /// Its weight.
    pub weight: u64,
    /// Successful transactions.
    pub transactions: u64,
    /// Failed transactions.
    pub failed: u64,
    /// Successful transactions a second.
    pub tps: f64,
    /// Mean.
    pub latency_average_ms: f64,
    /// Standard deviation.
    pub latency_stddev_ms: f64,
    /// By command.
    pub commands: Vec<CommandSummary>,
}

/// One way in which transactions failed.
#[derive(Clone, Debug, Serialize)]
pub struct FailureSummary {
    /// The first word of the error.
    pub code: String,
    /// How often.
    pub count: u64,
    /// The first such error.
    pub example: String,
}

/// How late an open-loop run began its transactions, in milliseconds.
#[derive(Clone, Debug, Serialize)]
pub struct Lag {
    /// Mean.
    pub average: f64,
    /// Largest.
    pub max: f64,
}

/// Everything that a run found.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// What was under load, with its version.
    pub server: String,
    /// Scale of the tables.
    pub scale: i64,
    /// Clients.
    pub clients: usize,
    /// Threads.
    pub threads: usize,
    /// The commit level that was asked for; none is the node's default.
    pub level: Option<String>,
    /// Repeats the same random numbers.
    pub seed: u64,
    /// The asked rate of an open-loop run.
    pub rate: Option<f64>,
    /// The asked duration in seconds.
    pub duration_asked_s: Option<u64>,
    /// The asked number of transactions of each client.
    pub transactions_asked: Option<u64>,
    /// How long it ran, in seconds.
    pub duration_s: f64,
    /// Successful transactions.
    pub transactions: u64,
    /// Failed transactions.
    pub failed: u64,
    /// Transactions whose answer had not come when the run was given up.
    pub unfinished: u64,
    /// Successful transactions a second.
    pub tps: f64,
    /// Of successful transactions, from their start or, with a rate, from their scheduled time.
    pub latency_ms: Latency,
    /// The same as a curve: percentile and milliseconds.
    pub percentiles_ms: Vec<(f64, f64)>,
    /// With a rate: how late transactions began.
    pub schedule_lag_ms: Option<Lag>,
    /// Until all connections stood.
    pub initial_connection_ms: f64,
    /// Connections that were lost and opened again.
    pub reconnects: u64,
    /// By kind.
    pub failures: Vec<FailureSummary>,
    /// By script.
    pub scripts: Vec<ScriptSummary>,
    /// True if Ctrl-C ended the run.
    pub interrupted: bool,
}

impl Latency {
    /// Read from the merged histogram.
    pub fn of(stats: &Stats) -> Latency {
        Latency {
            average: stats.latency.mean_ms(),
            stddev: stats.latency.stddev_ms(),
            p50: stats.percentile_ms(50.0),
            p90: stats.percentile_ms(90.0),
            p99: stats.percentile_ms(99.0),
            p999: stats.percentile_ms(99.9),
            max: stats.latency.max_ms(),
        }
    }
}

/// Where the curve of latencies is read.
const CURVE_PERCENTILES: [f64; 14] =
    [1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 98.0, 99.0, 99.5, 99.9, 99.99, 100.0];

/// Percentiles and milliseconds.
pub fn curve(stats: &Stats) -> Vec<(f64, f64)> {
    CURVE_PERCENTILES.iter().map(|percentile| (*percentile, stats.percentile_ms(*percentile))).collect()
}

impl Lag {
    /// Of an open-loop run.
    pub fn of(lag: &Moments) -> Lag {
        Lag { average: lag.mean_ms(), max: lag.max_ms() }
    }
}

/// By kind, most frequent first.
pub fn failures(stats: &Stats) -> Vec<FailureSummary> {
    let summary = |(code, failures): (&String, &super::stats::Failures)| FailureSummary {
        code: code.clone(),
        count: failures.count,
        example: failures.example.clone(),
    };
    let mut list: Vec<_> = stats.failures.iter().map(summary).collect();
    list.sort_by_key(|failure| Reverse(failure.count));
    list
}

impl Summary {
    /// pgbench's closing lines, then the percentiles.
    pub fn text(&self, per_command: bool) -> String {
        let mut out = String::new();
        // Writing into a String cannot fail.
        let _ = self.write_text(&mut out, per_command);
        out
    }

    fn write_text(&self, out: &mut String, per_command: bool) -> std::fmt::Result {
        match self.scripts.as_slice() {
            [script] => writeln!(out, "transaction type: {}", script.name)?,
            _ => writeln!(out, "transaction type: multiple scripts")?,
        }
        writeln!(out, "server: {}", self.server)?;
        writeln!(out, "scaling factor: {}", self.scale)?;
        writeln!(out, "commit level: {}", self.level.as_deref().unwrap_or("the node's default"))?;
        writeln!(out, "number of clients: {}", self.clients)?;
        writeln!(out, "number of threads: {}", self.threads)?;
        match (self.duration_asked_s, self.transactions_asked) {
            (Some(seconds), _) => {
                writeln!(out, "duration: {seconds} s")?;
                writeln!(out, "number of transactions actually processed: {}", self.transactions)?;
            }
            (None, each) => {
                let each = each.unwrap_or_default();
                writeln!(out, "number of transactions per client: {each}")?;
                let all = each * self.clients as u64;
                writeln!(out, "number of transactions actually processed: {}/{all}", self.transactions)?;
            }
        }
        let share = percent(self.failed, self.transactions + self.failed);
        writeln!(out, "number of failed transactions: {} ({share:.3}%)", self.failed)?;
        for failure in &self.failures {
            writeln!(out, "  {} x {}", failure.count, failure.example)?;
        }
        if self.unfinished > 0 {
            writeln!(out, "number of unfinished transactions: {} (no answer at the end)", self.unfinished)?;
        }
        if self.reconnects > 0 {
            writeln!(out, "number of reconnections: {}", self.reconnects)?;
        }
        writeln!(out, "latency average = {:.3} ms", self.latency_ms.average)?;
        writeln!(out, "latency stddev = {:.3} ms", self.latency_ms.stddev)?;
        if let Some(lag) = &self.schedule_lag_ms {
            writeln!(out, "rate limit schedule lag: avg {:.3} (max {:.3}) ms", lag.average, lag.max)?;
        }
        let Latency { p50, p90, p99, p999, max, .. } = self.latency_ms;
        writeln!(
            out,
            "latency p50 = {p50:.3} ms, p90 = {p90:.3} ms, p99 = {p99:.3} ms, p99.9 = {p999:.3} ms, max = {max:.3} ms"
        )?;
        writeln!(out, "initial connection time = {:.3} ms", self.initial_connection_ms)?;
        writeln!(out, "tps = {:.6} (without initial connection time)", self.tps)?;
        self.write_scripts(out, per_command)
    }

    fn write_scripts(&self, out: &mut String, per_command: bool) -> std::fmt::Result {
        let weights: u64 = self.scripts.iter().map(|script| script.weight).sum();
        for (index, script) in self.scripts.iter().enumerate() {
            if self.scripts.len() > 1 {
                writeln!(out, "script {}: {}", index + 1, script.name)?;
                let targets = percent(script.weight, weights);
                writeln!(out, " - weight: {} (targets {targets:.1}% of total)", script.weight)?;
                let share = percent(script.transactions, self.transactions);
                let (count, tps) = (script.transactions, script.tps);
                writeln!(out, " - {count} transactions ({share:.1}% of total, tps = {tps:.6})")?;
                let share = percent(script.failed, script.transactions + script.failed);
                writeln!(out, " - number of failed transactions: {} ({share:.3}%)", script.failed)?;
                writeln!(out, " - latency average = {:.3} ms", script.latency_average_ms)?;
                writeln!(out, " - latency stddev = {:.3} ms", script.latency_stddev_ms)?;
            }
            if per_command {
                writeln!(out, "command latencies in milliseconds and failures:")?;
                for CommandSummary { command, latency_average_ms, failed } in &script.commands {
                    writeln!(out, "{latency_average_ms:>12.3} {failed:>11}  {command}")?;
                }
            }
        }
        Ok(())
    }
}

fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 * 100.0 / whole as f64 }
}

/// pgbench's progress line for what was counted since the last one.
pub fn progress_line(elapsed: Duration, since_last: Duration, stats: &Stats, open_loop: bool) -> String {
    let tps = stats.latency.count as f64 / since_last.as_secs_f64().max(1e-9);
    let (average, stddev) = (stats.latency.mean_ms(), stats.latency.stddev_ms());
    let (p99, failed) = (stats.percentile_ms(99.0), stats.failed_count());
    let mut line = format!(
        "progress: {:.1} s, {tps:.1} tps, lat {average:.3} ms stddev {stddev:.3} p99 {p99:.3}, {failed} failed",
        elapsed.as_secs_f64()
    );
    if open_loop {
        let _ = write!(line, ", lag {:.3} ms", stats.lag.mean_ms());
    }
    line
}

/// An HdrHistogram interval log: one histogram of nanoseconds for each interval, its maximum in milliseconds.
pub struct IntervalLog {
    path: PathBuf,
    file: std::io::BufWriter<std::fs::File>,
}

impl IntervalLog {
    /// Creates the file, with its header.
    pub fn create(path: &Path, start: SystemTime, comment: &str) -> Result<IntervalLog, String> {
        let file = std::fs::File::create(path).map_err(|error| format!("--log {}: {error}", path.display()))?;
        let mut log = IntervalLog { path: path.to_owned(), file: std::io::BufWriter::new(file) };
        let mut serializer = V2DeflateSerializer::new();
        IntervalLogWriterBuilder::new()
            .add_comment("[Histogram log format version 1.3]")
            .add_comment(comment)
            .with_start_time(start)
            .with_base_time(start)
            .with_max_value_divisor(LOG_MAX_DIVISOR)
            .begin_log_with(&mut log.file, &mut serializer)
            .map_err(|error| format!("--log {}: {error}", path.display()))?;
        Ok(log)
    }

    /// Adds the histogram of the interval that began `from` after the start.
    pub fn write(&mut self, from: Duration, duration: Duration, stats: &Stats) -> Result<(), String> {
        let failed = |error: String| format!("--log {}: {error}", self.path.display());
        let mut line = Vec::new();
        let mut serializer = V2DeflateSerializer::new();
        let mut builder = IntervalLogWriterBuilder::new();
        builder.with_max_value_divisor(LOG_MAX_DIVISOR);
        builder
            .begin_log_with(&mut line, &mut serializer)
            .map_err(|error| failed(error.to_string()))?
            .write_histogram(&stats.histogram, from, duration, None)
            .map_err(|error| failed(error.to_string()))?;
        // A builder writes the divisor's header each time; only the interval's own line belongs into the file now.
        let own = line.split_inclusive(|byte| *byte == b'\n').filter(|line| line[0] != b'#');
        for line in own {
            self.file.write_all(line).map_err(|error| failed(error.to_string()))?;
        }
        self.file.flush().map_err(|error| failed(error.to_string()))
    }
}
