//! What must not grow in a long drill: each node's memory and file descriptors, and segments that nothing needs. Takes a sample
//! of every process before each fault; judges them at the end. A process that was started again counts anew, once it has settled.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use walferry_engine::lsn::Lsn;
use walferry_engine::retain::Needs;
use walferry_engine::segment::list_segments;

use super::cluster::{Cluster, Site};
use super::own::{KEEP_BYTES_MIN, Own, SEGMENT_BYTES};
use super::table::Table;
use crate::cli::Failure;
use crate::client::info_field;
use crate::inspect;

/// A process's caches fill in its first time: until then it says nothing about leaks.
const SETTLED_AGE: Duration = Duration::from_secs(90);
/// The first so many samples in a hundred say nothing either: buffers go round once, the store's cache fills.
const WARM_UP_PERCENT: usize = 20;
/// Samples that can be judged: a third each at the beginning and at the end.
const SAMPLES_MIN: usize = 6;
/// The median of the last third may be above that of the first one by so much, for allocators are not exact.
const RSS_GROWTH_PERCENT_MAX: f64 = 10.0;
/// The same for descriptors: clients come and go with the leader.
const DESCRIPTORS_GROWTH_MAX: f64 = 4.0;
/// Segments that are needed no more and still there: what was released since the last checkpoint, and a slot's last save.
const LEFT_BEHIND_MAX: usize = 2;

/// Limits of a soak's nodes, so small that they are reached while it warms up.
pub const FLAGS: [&str; 6] =
    ["--checkpoint-bytes", "4MiB", "--store-cache-bytes", "16MiB", "--log-buffer-bytes", "64MiB"];

/// One process at one moment.
#[derive(Clone, Debug)]
struct Sample {
    at: Duration,
    name: String,
    age: Duration,
    rss_bytes: u64,
    descriptors: usize,
    /// Files in its log, and how many of them nothing needs.
    segments: usize,
    left_behind: usize,
}

/// A soak while it runs.
#[derive(Debug)]
pub struct Soak {
    started: Instant,
    every: Duration,
    ends: Duration,
    samples: Vec<Sample>,
    /// What a node's log says at the end.
    verified: Vec<String>,
}

impl Soak {
    /// Begins now.
    pub fn new(lasts: Duration, every: Duration) -> Soak {
        Soak { started: Instant::now(), every, ends: lasts, samples: Vec::new(), verified: Vec::new() }
    }

    /// Faults that fit.
    pub fn rounds(lasts: Duration, every: Duration) -> usize {
        (lasts.as_secs_f64() / every.as_secs_f64()) as usize
    }

    /// Waits for the turn of a fault and takes a sample of every node.
    pub fn wait_and_sample(&mut self, round: usize, cluster: &Cluster) -> Result<String, Failure> {
        let turn = (self.every * round as u32).min(self.ends);
        std::thread::sleep(turn.saturating_sub(self.started.elapsed()));
        let Site::Own(own) = &cluster.site else { return Ok(String::new()) };
        let first = self.samples.len();
        for member in &cluster.members {
            let sample = self.sample(own, cluster, &member.name)?;
            self.samples.push(sample);
        }
        Ok(line(&self.samples[first..]))
    }

    fn sample(&self, own: &Own, cluster: &Cluster, name: &str) -> Result<Sample, Failure> {
        let (process, age) = own.process(name)?;
        let info = cluster.client(name)?.call(&["INFO"]).map_err(Failure::failed)?.text().unwrap_or_default();
        let lsn = |key: &str| info_field(&info, key).and_then(|text| text.parse::<Lsn>().ok());
        let missing = || Failure::failed(format_args!("{name}: INFO tells no flushed_lsn or store_checkpoint_lsn"));
        let flushed = lsn("flushed_lsn").ok_or_else(missing)?;
        let node = lsn("store_checkpoint_lsn").ok_or_else(missing)?;
        // After INFO: what has gone meanwhile is not missed.
        let log = own.dir.join(name).join("log");
        let files = list_segments(&log).map_err(|error| Failure::failed(format_args!("{}: {error}", log.display())))?;
        let needs = Needs { node, taken: flushed, flushed, keep_bytes_min: KEEP_BYTES_MIN };
        let oldest = needs.oldest_segment(SEGMENT_BYTES);
        let proc = Path::new("/proc").join(process.to_string());
        Ok(Sample {
            at: self.started.elapsed(),
            name: name.to_owned(),
            age,
            rss_bytes: rss_bytes(&proc)
                .ok_or_else(|| Failure::failed(format_args!("{name}: no VmRSS in its status")))?,
            descriptors: std::fs::read_dir(proc.join("fd"))?.count(),
            segments: files.len(),
            left_behind: files.iter().filter(|number| **number < oldest).count(),
        })
    }

    /// Verifies the log of every node; they have ended.
    pub fn verify(&mut self, own: &Own) -> Result<(), Failure> {
        for name in own.names() {
            let verified = inspect::verified_clean(&own.dir.join(name))?;
            self.verified.push(format!("{name}: {verified}"));
        }
        Ok(())
    }

    /// Medians of what settled processes had, of the first and the last third after the warm-up. `None` when there are too few.
    fn thirds(&self, of: impl Fn(&Sample) -> f64) -> Option<(f64, f64)> {
        let (begins, lasts) = (self.samples.first()?.at, self.samples.last()?.at);
        let warm = begins + (lasts - begins) * WARM_UP_PERCENT as u32 / 100;
        let judged: Vec<f64> =
            self.samples.iter().filter(|sample| sample.at >= warm && sample.age >= SETTLED_AGE).map(of).collect();
        let third = judged.len() / 3;
        (judged.len() >= SAMPLES_MIN).then(|| (median(&judged[..third]), median(&judged[judged.len() - third..])))
    }

    /// What was found, in a table and in sentences; an error when something grew.
    pub fn verdict(&self) -> (Vec<String>, Option<String>) {
        let (mut said, mut wrong) = (Vec::new(), Vec::new());
        let mut judge = |what: &str, thirds: Option<(f64, f64)>, max: &dyn Fn(f64) -> f64| match thirds {
            None => said.push(format!("{what}: too few samples of settled processes to judge")),
            Some((first, last)) => {
                let flat = last <= max(first);
                let word = if flat { "flat" } else { "GROWS" };
                said.push(format!("{what}: median {first:.1} in the first third, {last:.1} in the last: {word}"));
                if !flat {
                    wrong.push(format!("{what} grew from {first:.1} to {last:.1}"));
                }
            }
        };
        let rss = self.thirds(|sample| sample.rss_bytes as f64 / f64::from(1 << 20));
        judge("memory, MiB", rss, &|first| first * (1.0 + RSS_GROWTH_PERCENT_MAX / 100.0));
        let descriptors = self.thirds(|sample| sample.descriptors as f64);
        judge("file descriptors", descriptors, &|first| first + DESCRIPTORS_GROWTH_MAX);
        let most = self.samples.iter().max_by_key(|sample| sample.left_behind);
        let left = most.map_or(0, |sample| sample.left_behind);
        said.push(format!("segments that nothing needs: {left} at most at once"));
        if let Some(sample) = most.filter(|_| left > LEFT_BEHIND_MAX) {
            wrong.push(format!("{}: {left} of {} segments are needed by nothing", sample.name, sample.segments));
        }
        said.extend(self.verified.iter().cloned());
        (said, (!wrong.is_empty()).then(|| wrong.join("; ")))
    }

    /// Every sample.
    pub fn table(&self) -> Table {
        let mut table = Table::new(&["minute", "node", "age", "RSS MiB", "descriptors", "segments", "not needed"]);
        for sample in &self.samples {
            table.row(vec![
                format!("{:.1}", sample.at.as_secs_f64() / 60.0),
                sample.name.clone(),
                format!("{} s", sample.age.as_secs()),
                format!("{:.1}", mebibytes(sample)),
                sample.descriptors.to_string(),
                sample.segments.to_string(),
                sample.left_behind.to_string(),
            ]);
        }
        table
    }

    /// Every sample, for programs.
    pub fn json(&self) -> Value {
        let sample = |sample: &Sample| {
            json!({
                "at_s": sample.at.as_secs_f64(),
                "node": sample.name,
                "age_s": sample.age.as_secs_f64(),
                "rss_bytes": sample.rss_bytes,
                "descriptors": sample.descriptors,
                "segments": sample.segments,
                "segments_not_needed": sample.left_behind,
            })
        };
        let (said, wrong) = self.verdict();
        json!({ "samples": self.samples.iter().map(sample).collect::<Vec<_>>(), "said": said, "wrong": wrong })
    }
}

fn mebibytes(sample: &Sample) -> f64 {
    sample.rss_bytes as f64 / f64::from(1 << 20)
}

fn line(samples: &[Sample]) -> String {
    let one = |sample: &Sample| {
        let Sample { name, descriptors, segments, left_behind, .. } = sample;
        format!(
            "{name} {:.0} MiB, {descriptors} fds, {segments} segments ({left_behind} not needed)",
            mebibytes(sample)
        )
    };
    samples.iter().map(one).collect::<Vec<_>>().join("; ")
}

fn rss_bytes(proc: &Path) -> Option<u64> {
    let status = std::fs::read_to_string(proc.join("status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kilobytes| kilobytes << 10)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn soak(samples: impl IntoIterator<Item = (u64, u64, u64)>) -> Soak {
        let mut soak = Soak::new(Duration::from_secs(1800), Duration::from_secs(60));
        soak.samples.extend(samples.into_iter().map(|(minute, age_s, mebibytes)| Sample {
            at: Duration::from_secs(minute * 60),
            name: "a".to_owned(),
            age: Duration::from_secs(age_s),
            rss_bytes: mebibytes << 20,
            descriptors: 40,
            segments: 6,
            left_behind: 1,
        }));
        soak
    }

    #[test]
    fn memory_that_grows_after_the_warm_up_is_found() {
        assert_eq!(soak((0..30).map(|minute| (minute, 100 + minute, 100))).verdict().1, None);
        assert_eq!(soak((0..30).map(|minute| (minute, 100, 100.min(20 + minute * 20)))).verdict().1, None, "warms up");
        let wrong = soak((0..30).map(|minute| (minute, 100, 100 + minute))).verdict().1;
        assert!(wrong.is_some_and(|text| text.contains("memory") && !text.contains("descriptors")));
    }

    #[test]
    fn young_processes_and_a_few_samples_prove_nothing() {
        let young = |minute| (minute, if minute % 2 == 0 { 10 } else { 120 }, if minute % 2 == 0 { 5 } else { 100 });
        assert_eq!(soak((0..30).map(young)).thirds(mebibytes), Some((100.0, 100.0)));
        let (said, wrong) = soak((0..5).map(|minute| (minute, 100, 100 << minute))).verdict();
        assert!(wrong.is_none() && said[0].contains("too few"), "{said:?}");
    }

    #[test]
    fn segments_that_nothing_needs_are_named() {
        let mut soak = soak([(1, 100, 100)]);
        soak.samples[0].left_behind = 3;
        assert!(soak.verdict().1.is_some_and(|text| text.contains("3 of 6 segments")));
    }
}
