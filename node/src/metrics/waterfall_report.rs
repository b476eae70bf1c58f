//! The accounting as JSON: what WATERFALL answers. Reads the waterfall and the flush accounting; decides nothing.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Serializer, V2DeflateSerializer};
use serde_json::{Value, json};
use walferry_engine::flush_accounting::{FlushSnapshot, Percentiles};

use crate::metrics::waterfall::{LevelStages, Stage, Waterfall};

/// Everything that is known of the commits of a leader named `node`. With `histograms` each distribution comes along whole:
/// HdrHistogram's V2 format, deflated, in base64.
pub fn report(node: &str, waterfall: &Waterfall, flush: &FlushSnapshot, histograms: bool) -> Value {
    let levels: Vec<Value> = waterfall
        .levels()
        .filter(|(_, stages)| stages.commits > 0)
        .map(|(level, stages)| level_report(&level.to_string(), stages, waterfall, histograms))
        .collect();
    let commits: u64 = waterfall.levels().map(|(_, stages)| stages.commits).sum();
    json!({
        "enabled": waterfall.is_enabled(),
        "sampled_one_in": waterfall.one_in(),
        "untraced": waterfall.untraced(),
        "commits": commits,
        "levels": levels,
        "flush": flush_report(node, waterfall, flush),
    })
}

fn level_report(level: &str, stages: &LevelStages, waterfall: &Waterfall, histograms: bool) -> Value {
    let decided = stages.decided.iter().zip(waterfall.replicas());
    let replicas: serde_json::Map<String, Value> =
        decided.filter(|(count, _)| **count > 0).map(|(count, replica)| (replica.name.clone(), json!(count))).collect();
    let rows: Vec<Value> = Stage::ALL
        .into_iter()
        .filter(|stage| !stages.stages[*stage as usize].is_empty())
        .map(|stage| {
            let histogram = &stages.stages[stage as usize];
            let mut row = distribution(histogram, histograms);
            row["stage"] = stage.name().into();
            row["branch"] = stage.branch().name().into();
            row
        })
        .collect();
    json!({
        "level": level,
        "commits": stages.commits,
        "samples": stages.samples,
        "critical": { "local": stages.critical_local, "remote": stages.critical_remote },
        "total": distribution(&stages.total, histograms),
        "stages": rows,
        "replicas": replicas,
    })
}

fn distribution(histogram: &Histogram<u64>, whole: bool) -> Value {
    let at = |quantile| histogram.value_at_quantile(quantile);
    let mut value = json!({
        "samples": histogram.len(),
        "us": {
            "p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "p999": at(0.999),
            "max": histogram.max(), "mean": histogram.mean(),
        },
    });
    if whole {
        let mut bytes = Vec::new();
        // Into memory, and of counts that fit: it cannot fail.
        if V2DeflateSerializer::new().serialize(histogram, &mut bytes).is_ok() {
            value["histogram"] = STANDARD.encode(bytes).into();
        }
    }
    value
}

fn percentiles(of: &Percentiles) -> Value {
    json!({ "p50": of.p50, "p90": of.p90, "p99": of.p99, "p999": of.p999, "max": of.max, "mean": of.mean })
}

fn flush_report(node: &str, waterfall: &Waterfall, flush: &FlushSnapshot) -> Value {
    let by_level: Vec<Value> = waterfall
        .levels()
        .filter(|(_, stages)| stages.commits > 0)
        .map(|(level, stages)| {
            json!({
                "level": level.to_string(),
                "commits": stages.commits,
                "flushes_share": stages.flushes_share,
                "saved_flushes": (stages.commits as f64 - stages.flushes_share).max(0.0),
            })
        })
        .collect();
    let row = |name: &str, flushes: u64, records: u64| json!({ "node": name, "flushes": flushes, "records": records, "saved_flushes": records.saturating_sub(flushes) });
    let mut by_node = vec![row(node, flush.flushes, flush.records)];
    by_node.extend(waterfall.replicas().iter().map(|replica| row(&replica.name, replica.flushes, replica.records)));
    json!({
        "flushes": flush.flushes,
        "records": flush.records,
        "bytes": flush.bytes,
        "padding_bytes": flush.padding_bytes,
        "records_per_flush": percentiles(&flush.records_per_flush),
        "bytes_per_flush": percentiles(&flush.bytes_per_flush),
        "queue_us": percentiles(&flush.queue_us),
        "device_us": percentiles(&flush.device_us),
        "device_us_per_commit": flush.device_us_per_commit(),
        "saved_flushes": flush.saved_flushes(),
        "by_level": by_level,
        "by_node": by_node,
    })
}
