//! Predicts a distance that was not measured: a commit is its stages, drawn from their measured distributions, with another
//! round trip in their midst. The error against what was measured is always told with it.

use std::collections::HashMap;
use std::time::Duration;

use hdrhistogram::Histogram;
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};
use serde::Serialize;

use super::result::{Level, Point, ProfileResult};

/// Commits that are drawn for a prediction: p99 then rests on 200 of them.
const DRAWS: usize = 20_000;
/// The same prediction for the same measurement.
const SEED: u64 = 1;

const START: [&str; 1] = ["frame_wait"];
const LOCAL: [&str; 3] = ["local_queue", "local_flush", "local_apply"];
const REMOTE: [&str; 6] =
    ["hand_over", "network_out", "replica_write", "replica_flush", "replica_apply", "network_back"];
const END: [&str; 1] = ["reply"];

/// The distributions of a level's stages in microseconds, by name, and that of the whole as `total`.
pub type Stages = HashMap<String, Histogram<u64>>;

/// What the model says of one level at one distance.
#[derive(Debug, Serialize)]
pub struct Prediction {
    /// The distance.
    pub profile: String,
    /// Its round trip in milliseconds.
    pub rtt_ms: f64,
    /// The measured distance that the stages come from.
    pub from: String,
    /// Commit level.
    pub level: Level,
    /// One client, milliseconds.
    pub p50_ms: f64,
    /// One client, milliseconds.
    pub p99_ms: f64,
    /// Number of clients.
    pub clients: usize,
    /// Commits a second of so many clients.
    pub tps: f64,
    /// Predicted over measured minus 1, for a distance that was measured.
    pub error: Option<Errors>,
}

/// How far a prediction is off: 0.1 is ten percent too much.
#[derive(Debug, Serialize)]
pub struct Errors {
    /// Of the median.
    pub p50: f64,
    /// Of the 99th percentile.
    pub p99: f64,
    /// Of the throughput.
    pub tps: f64,
}

/// Predicts every measured distance from the nearest other one, and `asked` from the nearest of all.
pub fn predict(profiles: &[ProfileResult], asked: &[Duration]) -> Vec<Prediction> {
    let mut predictions = Vec::new();
    for target in profiles {
        let others: Vec<&ProfileResult> = profiles.iter().filter(|profile| profile.name != target.name).collect();
        let Some(base) = nearest(&others, target.rtt.p50_us) else { continue };
        predictions.extend(levels(base, &target.name, target.rtt.p50_us).map(|mut prediction| {
            prediction.error = errors(&prediction, target);
            prediction
        }));
    }
    let all: Vec<&ProfileResult> = profiles.iter().collect();
    for rtt in asked {
        let rtt_us = rtt.as_secs_f64() * 1e6;
        if let Some(base) = nearest(&all, rtt_us) {
            predictions.extend(levels(base, &walferry_node::units::Span(*rtt).to_string(), rtt_us));
        }
    }
    predictions
}

fn nearest<'a>(profiles: &[&'a ProfileResult], rtt_us: f64) -> Option<&'a ProfileResult> {
    let distance = |profile: &ProfileResult| (profile.rtt.p50_us - rtt_us).abs();
    profiles.iter().copied().min_by(|a, b| distance(a).total_cmp(&distance(b)))
}

fn levels<'a>(base: &'a ProfileResult, name: &'a str, rtt_us: f64) -> impl Iterator<Item = Prediction> + 'a {
    base.levels().into_iter().filter_map(move |level| {
        let alone = base.point(level, base.fewest_clients())?;
        let most = base.closed().filter(|point| point.level == level).max_by_key(|point| point.clients)?;
        let added_us = if level.is_remote() { rtt_us - base.rtt.p50_us } else { 0.0 };
        let drawn = draw(&alone.stages, added_us)?;
        // The client's own way to the node and back is no stage of the node's.
        let node_ms = alone.stages.get("total")?.value_at_quantile(0.5) as f64 / 1e3;
        let client_ms = (alone.load.latency_ms.p50 - node_ms).max(0.0);
        let at = |quantile: f64| drawn[((DRAWS - 1) as f64 * quantile) as usize] / 1e3 + client_ms;
        Some(Prediction {
            profile: name.to_owned(),
            rtt_ms: rtt_us / 1e3,
            from: base.name.clone(),
            level,
            p50_ms: at(0.5),
            p99_ms: at(0.99),
            clients: most.clients,
            tps: throughput(base, most, added_us),
            error: None,
        })
    })
}

/// Little's law: these clients took `clients / tps` for a commit there and take what the distance adds longer here, but are
/// never faster than what the level reached with any number of clients.
fn throughput(base: &ProfileResult, most: &Point, added_us: f64) -> f64 {
    let capacity =
        base.closed().filter(|point| point.level == most.level).map(|point| point.load.tps).fold(0.0, f64::max);
    let clients = most.clients as f64;
    let seconds = clients / most.load.tps.max(1e-9) + added_us / 1e6;
    // Nearer than the base the capacity is not known to be reached.
    let cap = if added_us < 0.0 { f64::INFINITY } else { capacity };
    (clients / seconds.max(1e-6)).min(cap)
}

fn errors(prediction: &Prediction, measured: &ProfileResult) -> Option<Errors> {
    let alone = measured.point(prediction.level, measured.fewest_clients())?;
    let many = measured.point(prediction.level, prediction.clients)?;
    let off = |predicted: f64, measured: f64| predicted / measured.max(1e-9) - 1.0;
    Some(Errors {
        p50: off(prediction.p50_ms, alone.load.latency_ms.p50),
        p99: off(prediction.p99_ms, alone.load.latency_ms.p99),
        tps: off(prediction.tps, many.load.tps),
    })
}

/// A distribution to draw from: its values, each with how many values there are up to it.
struct Urn {
    values: Vec<(u64, f64)>,
    count: u64,
}

impl Urn {
    /// `None` of an empty distribution.
    fn new(histogram: &Histogram<u64>) -> Option<Urn> {
        let mut count = 0;
        let recorded = histogram.iter_recorded().map(|step| {
            count += step.count_since_last_iteration();
            (count, step.value_iterated_to() as f64)
        });
        let values: Vec<(u64, f64)> = recorded.collect();
        (count > 0).then_some(Urn { values, count })
    }

    fn draw(&self, random: &mut Xoshiro256PlusPlus) -> f64 {
        let drawn = random.random_range(0..self.count);
        self.values[self.values.partition_point(|(count, _)| *count <= drawn)].1
    }
}

/// Commits in microseconds, sorted, with `added_us` more on the remote branch. None without samples.
fn draw(stages: &Stages, added_us: f64) -> Option<Vec<f64>> {
    stages.get("total").filter(|total| !total.is_empty())?;
    let mut random = Xoshiro256PlusPlus::seed_from_u64(SEED);
    let urns = |names: &[&str]| -> Vec<Urn> { names.iter().filter_map(|name| Urn::new(stages.get(*name)?)).collect() };
    let (start, local, remote, end) = (urns(&START), urns(&LOCAL), urns(&REMOTE), urns(&END));
    let mut sum = |urns: &[Urn]| urns.iter().map(|urn| urn.draw(&mut random)).sum::<f64>();
    let mut totals: Vec<f64> = (0..DRAWS)
        .map(|_| {
            let away = if remote.is_empty() { 0.0 } else { sum(&remote) + added_us };
            sum(&start) + sum(&local).max(away) + sum(&end)
        })
        .collect();
    totals.sort_by(f64::total_cmp);
    Some(totals)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn constant(us: u64) -> Histogram<u64> {
        let mut histogram = Histogram::new_with_bounds(1, 60_000_000, 3).unwrap();
        histogram.record_n(us, 100).unwrap();
        histogram
    }

    #[test]
    fn the_longer_branch_decides_and_only_it_takes_the_distance() {
        let named = |stages: &[(&str, u64)]| -> Stages {
            stages.iter().map(|(name, us)| ((*name).to_owned(), constant(*us))).collect()
        };
        let stages = named(&[
            ("frame_wait", 10),
            ("local_flush", 200),
            ("network_out", 20),
            ("replica_flush", 100),
            ("network_back", 20),
            ("reply", 5),
            ("total", 215),
        ]);
        let middle = |added| draw(&stages, added).unwrap()[DRAWS / 2];
        assert_eq!(middle(0.0), 215.0, "the local flush is longer");
        assert_eq!(middle(40.0), 215.0, "the remote branch still runs beside it");
        assert_eq!(middle(1000.0), 1155.0, "frame 10, remote 140 and the distance, reply 5");
        let alone = named(&[("frame_wait", 10), ("local_flush", 200), ("total", 210)]);
        assert_eq!(draw(&alone, 0.0).unwrap()[0], 210.0);
        assert!(draw(&Stages::new(), 0.0).is_none());
    }
}
