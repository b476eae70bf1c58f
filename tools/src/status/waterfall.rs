//! `walferry status --waterfall`: where commits spend their time, drawn from what WATERFALL answers; and its interval logs.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::interval_log::{IntervalLogWriterBuilder, Tag};
use hdrhistogram::serialization::{Deserializer, V2DeflateSerializer};
use serde_json::Value;

use crate::client::{Client, ClientError};

/// Columns of a bar that stands for the whole commit.
const BAR_COLUMNS: usize = 48;
/// In an interval log, maxima are given in milliseconds.
const LOG_MAX_DIVISOR: f64 = 1_000.0;

/// Asks a node; with `histograms` the distributions come along whole.
pub fn read(client: &mut Client, histograms: bool) -> Result<Value, ClientError> {
    let words: &[&str] = if histograms { &["WATERFALL", "HISTOGRAMS"] } else { &["WATERFALL"] };
    let text = client.call(words)?.text().unwrap_or_default();
    // A node of ours answers JSON; anything else shows as nothing known.
    Ok(serde_json::from_str(&text).unwrap_or(Value::Null))
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(0.0)
}

fn rows(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text_of(value: &Value) -> &str {
    value.as_str().unwrap_or("-")
}

/// Microseconds in a column of nine.
fn micros(us: f64) -> String {
    match us {
        ..10.0 => format!("{us:.1} us"),
        ..1_000.0 => format!("{us:.0} us"),
        ..1_000_000.0 => format!("{:.2} ms", us / 1e3),
        _ => format!("{:.2} s", us / 1e6),
    }
}

/// The waterfall of each level, and the shares of each flush.
pub fn text(report: &Value) -> String {
    let mut out = String::new();
    // Writing into a String cannot fail.
    let _ = write_text(report, &mut out);
    out
}

fn write_text(report: &Value, out: &mut String) -> std::fmt::Result {
    if report["enabled"] == false {
        return writeln!(out, "the accounting is off: start the node with --waterfall=true");
    }
    let levels = rows(&report["levels"]);
    if levels.is_empty() {
        return writeln!(out, "no commits yet: only a leader accounts them");
    }
    for level in levels {
        write_level(level, number(&report["sampled_one_in"]), out)?;
        writeln!(out)?;
    }
    write_flush(&report["flush"], out)
}

/// The branch that ended later in most of a level's commits.
pub fn critical(level: &Value) -> &'static str {
    if number(&level["critical"]["remote"]) > number(&level["critical"]["local"]) { "remote" } else { "local" }
}

/// A stage of a commit, placed on the commit's own time.
pub struct Bar<'a> {
    /// Its name.
    pub stage: &'a str,
    /// Its percentiles and mean.
    pub us: &'a Value,
    /// When it begins on average, from the commit's start.
    pub from_us: f64,
    /// How long it takes on average.
    pub mean_us: f64,
    /// True if the commit waits for it; the other branch runs beside the critical one.
    pub is_critical: bool,
}

/// The stages of one level of a report, in their order. Both branches begin where `start` ends; `end` begins after the longer.
pub fn bars(level: &Value) -> Vec<Bar<'_>> {
    let stages = rows(&level["stages"]);
    let mean = |stage: &Value| number(&stage["us"]["mean"]);
    let of = |branch: &str| stages.iter().filter(|stage| stage["branch"] == branch).map(mean).sum::<f64>();
    let start = of("start");
    let join = start + of("local").max(of("remote"));
    let (mut local, mut remote) = (start, start);
    let next = |end: &mut f64, us: f64| std::mem::replace(end, *end + us);
    let mut bars = Vec::new();
    for stage in stages {
        let (branch, mean_us) = (text_of(&stage["branch"]), mean(stage));
        let from_us = match branch {
            "start" => 0.0,
            "local" => next(&mut local, mean_us),
            "remote" => next(&mut remote, mean_us),
            _ => join,
        };
        let is_critical = branch == "start" || branch == "end" || branch == critical(level);
        bars.push(Bar { stage: text_of(&stage["stage"]), us: &stage["us"], from_us, mean_us, is_critical });
    }
    bars
}

fn write_level(level: &Value, one_in: f64, out: &mut String) -> std::fmt::Result {
    let total = &level["total"]["us"];
    writeln!(
        out,
        "{}: {} commits, {} sampled (one in {one_in} now); mean {}, p50 {}, p99 {}",
        text_of(&level["level"]),
        level["commits"],
        level["samples"],
        micros(number(&total["mean"])),
        micros(number(&total["p50"])),
        micros(number(&total["p99"])),
    )?;
    let bars = bars(level);
    writeln!(out, "  {:<15}{:>10}{:>10}{:>10}", "stage", "mean", "p50", "p99")?;
    let scale = BAR_COLUMNS as f64 / number(&total["mean"]).max(1.0);
    for Bar { stage, us, from_us, mean_us, is_critical } in &bars {
        let mark = if *is_critical { '*' } else { ' ' };
        let (skip, length) = ((from_us * scale).round() as usize, (mean_us * scale).round() as usize);
        let bar = if *is_critical { "█" } else { "░" }.repeat(length.min(BAR_COLUMNS));
        let bar = if bar.is_empty() { "▏".to_owned() } else { bar };
        let p = |key: &str| micros(number(&us[key]));
        writeln!(
            out,
            "{mark} {stage:<15}{:>10}{:>10}{:>10}  {}{bar}",
            p("mean"),
            p("p50"),
            p("p99"),
            " ".repeat(skip.min(BAR_COLUMNS)),
        )?;
    }
    let replicas = level["replicas"].as_object().filter(|replicas| !replicas.is_empty());
    if let Some(replicas) = replicas {
        let decided: Vec<String> = replicas.iter().map(|(name, count)| format!("{name} {count}")).collect();
        writeln!(out, "  released by: {}", decided.join(", "))?;
    }
    writeln!(out, "  * critical path: the {} branch ended later on average; the other runs beside it", critical(level))
}

fn write_flush(flush: &Value, out: &mut String) -> std::fmt::Result {
    writeln!(
        out,
        "flushes {}, records {} ({:.1} a flush), device {} a flush, {} a commit; wait for another's flush {}",
        flush["flushes"],
        flush["records"],
        number(&flush["records_per_flush"]["mean"]),
        micros(number(&flush["device_us"]["mean"])),
        micros(number(&flush["device_us_per_commit"])),
        micros(number(&flush["queue_us"]["mean"])),
    )?;
    for row in rows(&flush["by_level"]) {
        writeln!(
            out,
            "  {:<15}{:>10} commits, {:>10.0} flushes, {:>10.0} saved",
            text_of(&row["level"]),
            row["commits"].as_u64().unwrap_or(0),
            number(&row["flushes_share"]),
            number(&row["saved_flushes"]),
        )?;
    }
    for row in rows(&flush["by_node"]) {
        writeln!(
            out,
            "  node {:<10}{:>10} records, {:>10} flushes, {:>10} saved",
            text_of(&row["node"]),
            row["records"].as_u64().unwrap_or(0),
            row["flushes"].as_u64().unwrap_or(0),
            row["saved_flushes"].as_u64().unwrap_or(0),
        )?;
    }
    Ok(())
}

/// An HdrHistogram interval log of every stage of every level, microseconds, tagged `level.stage`.
pub struct StageLog {
    path: PathBuf,
    file: std::io::BufWriter<std::fs::File>,
    began: Instant,
    last: Duration,
    before: Vec<(String, Histogram<u64>)>,
}

impl StageLog {
    /// Creates the file, with its header.
    pub fn create(path: &Path) -> Result<StageLog, String> {
        let failed = |error: String| format!("--hlog {}: {error}", path.display());
        let file = std::fs::File::create(path).map_err(|error| failed(error.to_string()))?;
        let mut file = std::io::BufWriter::new(file);
        let now = SystemTime::now();
        IntervalLogWriterBuilder::new()
            .add_comment("[Histogram log format version 1.3]")
            .add_comment("walferry: stages of commits in microseconds, tagged level.stage")
            .with_start_time(now)
            .with_base_time(now)
            .with_max_value_divisor(LOG_MAX_DIVISOR)
            .begin_log_with(&mut file, &mut V2DeflateSerializer::new())
            .map_err(|error| failed(error.to_string()))?;
        let (began, last) = (Instant::now(), Duration::ZERO);
        Ok(StageLog { path: path.to_owned(), file, began, last, before: Vec::new() })
    }

    /// Adds an interval: what `report` counts beyond the report before it.
    pub fn write(&mut self, report: &Value) -> Result<(), String> {
        let now = self.began.elapsed();
        let (from, duration) = (self.last, now - self.last);
        self.last = now;
        for (tag, histogram) in histograms(report) {
            let before = self.before.iter_mut().find(|(known, _)| *known == tag);
            let mut interval = histogram.clone();
            match before {
                // A node that began anew counts from zero.
                Some((_, before)) if before.len() <= histogram.len() => {
                    let _ = interval.subtract(&*before);
                    *before = histogram;
                }
                Some((_, before)) => *before = histogram,
                None => self.before.push((tag.clone(), histogram)),
            }
            if !interval.is_empty() {
                self.write_interval(&tag, from, duration, &interval)
                    .map_err(|error| format!("--hlog {}: {error}", self.path.display()))?;
            }
        }
        self.file.flush().map_err(|error| format!("--hlog {}: {error}", self.path.display()))
    }

    fn write_interval(
        &mut self,
        tag: &str,
        from: Duration,
        duration: Duration,
        interval: &Histogram<u64>,
    ) -> Result<(), String> {
        let mut line = Vec::new();
        let mut serializer = V2DeflateSerializer::new();
        let mut builder = IntervalLogWriterBuilder::new();
        builder.with_max_value_divisor(LOG_MAX_DIVISOR);
        let mut writer = builder.begin_log_with(&mut line, &mut serializer).map_err(|error| error.to_string())?;
        writer.write_histogram(interval, from, duration, Tag::new(tag)).map_err(|error| error.to_string())?;
        // A builder writes the divisor's header each time; only the interval's own line belongs into the file now.
        for line in line.split_inclusive(|byte| *byte == b'\n').filter(|line| line[0] != b'#') {
            self.file.write_all(line).map_err(|error| error.to_string())?;
        }
        Ok(())
    }
}

/// Every distribution of a report that came with HISTOGRAMS, named `level.stage`.
pub fn histograms(report: &Value) -> Vec<(String, Histogram<u64>)> {
    let decode = |value: &Value| -> Option<Histogram<u64>> {
        let bytes = STANDARD.decode(value.as_str()?).ok()?;
        Deserializer::new().deserialize(&mut bytes.as_slice()).ok()
    };
    let mut found = Vec::new();
    for level in rows(&report["levels"]) {
        let name = text_of(&level["level"]);
        let stages = rows(&level["stages"]).iter().map(|stage| (text_of(&stage["stage"]), &stage["histogram"]));
        for (stage, histogram) in stages.chain([("total", &level["total"]["histogram"])]) {
            if let Some(histogram) = decode(histogram) {
                found.push((format!("{name}.{stage}"), histogram));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use hdrhistogram::serialization::Serializer;
    use serde_json::json;

    fn report(samples: u64) -> Value {
        let mut histogram = Histogram::<u64>::new_with_bounds(1, 60_000_000, 3).unwrap();
        (0..samples).for_each(|n| histogram.record(100 + n).unwrap());
        let mut bytes = Vec::new();
        V2DeflateSerializer::new().serialize(&histogram, &mut bytes).unwrap();
        let us = json!({ "p50": 100, "p90": 101, "p99": 101, "p999": 101, "max": 101, "mean": 100.0 });
        let stage = |name: &str, branch: &str| json!({ "stage": name, "branch": branch, "us": us, "histogram": STANDARD.encode(&bytes) });
        json!({
            "enabled": true, "sampled_one_in": 1, "levels": [{
                "level": "remote_apply", "commits": samples, "samples": samples,
                "critical": { "local": 0, "remote": samples },
                "total": { "us": { "p50": 400, "p99": 400, "mean": 400.0 }, "histogram": STANDARD.encode(&bytes) },
                "stages": [
                    stage("frame_wait", "start"), stage("local_flush", "local"),
                    stage("network_out", "remote"), stage("replica_flush", "remote"), stage("reply", "end"),
                ],
                "replicas": { "b": samples },
            }],
            "flush": { "flushes": 5, "records": 10, "records_per_flush": { "mean": 2.0 }, "by_level": [], "by_node": [] },
        })
    }

    #[test]
    fn the_bars_overlap_and_the_critical_path_is_marked() {
        let text = text(&report(10));
        let bar = |stage: &str| {
            let line = text.lines().find(|line| line.contains(stage)).unwrap();
            (line.starts_with('*'), line.find(['█', '░']).unwrap())
        };
        assert_eq!(bar("local_flush").1, bar("network_out").1, "{text}");
        assert!(bar("replica_flush").1 > bar("network_out").1 && bar("reply").1 > bar("replica_flush").1, "{text}");
        assert!(!bar("local_flush").0 && bar("network_out").0 && bar("frame_wait").0 && bar("reply").0, "{text}");
        assert!(text.contains("released by: b 10"));
    }

    #[test]
    fn an_interval_log_holds_what_was_new() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stages.hlog");
        let mut log = StageLog::create(&path).unwrap();
        for samples in [10, 10, 25] {
            log.write(&report(samples)).unwrap();
        }
        let text = std::fs::read(&path).unwrap();
        use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};
        let counts: Vec<u64> = IntervalLogIterator::new(&text)
            .filter_map(|entry| match entry.unwrap() {
                LogEntry::Interval(interval)
                    if interval.tag().map(|tag| tag.as_str()) == Some("remote_apply.total") =>
                {
                    let bytes = STANDARD.decode(interval.encoded_histogram()).unwrap();
                    Some(Deserializer::new().deserialize::<u64, _>(&mut bytes.as_slice()).unwrap().len())
                }
                _ => None,
            })
            .collect();
        assert_eq!(counts, [10, 15], "an interval without news has no line");
    }
}
