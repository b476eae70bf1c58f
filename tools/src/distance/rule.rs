//! Which level for which data, in the operator's own numbers.

use walferry_cluster::CommitLevel;

use super::format::{bytes, millis};
use super::result::{Lag, Level, ProfileResult};

/// A line for each kind of data that a measured level fits.
pub fn rule(profile: &ProfileResult) -> Vec<String> {
    let clients = profile.fewest_clients();
    let p50 = |level| profile.point(Level(level), clients).map(|point| point.load.latency_ms.p50);
    let local = p50(CommitLevel::Local);
    let costs = |level| {
        let p50 = p50(level)?;
        let over = local.map_or(String::new(), |local| format!(", {} over local", millis(p50 - local)));
        Some(format!("{} a commit{over}", millis(p50)))
    };
    let lost = |level: CommitLevel| {
        let loss = profile.losses.iter().find(|loss| loss.level == Level(level))?;
        let Lag { bytes_max, seconds_max, .. } = loss.at_most?;
        Some(format!("up to {} ({})", millis(seconds_max * 1e3), bytes(bytes_max as f64)))
    };
    let mut lines = Vec::new();
    let mut add = |data: &str, level: CommitLevel, then: String| {
        if let Some(costs) = costs(level) {
            lines.push(format!("{data}: {level}, {costs}; {then}"));
        }
    };
    let nothing = "a failover loses nothing".to_owned();
    add("must survive, and be read on a replica at once", CommitLevel::RemoteApply, nothing.clone());
    add("must survive the leader's disk (orders, money)", CommitLevel::RemoteFlush, nothing);
    let memory = "a failover loses nothing unless the replica's host dies with the leader's";
    add("must survive the leader, not both hosts at once", CommitLevel::RemoteWrite, memory.to_owned());
    let lag = lost(CommitLevel::Local).unwrap_or_else(|| "what replicas lack".to_owned());
    add("may lose its last moment in a failover (sessions)", CommitLevel::Local, format!("a failover loses {lag}"));
    let lag = lost(CommitLevel::Off).unwrap_or_else(|| "what is not flushed".to_owned());
    add(
        "can be made again (caches, counters)",
        CommitLevel::Off,
        format!("a crash alone loses some; a failover {lag}"),
    );
    lines
}
