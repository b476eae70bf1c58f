//! A view of the node in Prometheus' text format. Base units are seconds and bytes, as Prometheus asks.

use std::fmt::{self, Write};

use serde_json::Value;

use crate::clients::limits::ClientCounts;
use crate::session::host::{NodeFacts, ReplicationRow};
use crate::watchdog::Turns;

/// Microseconds in a second.
const SECOND_US: f64 = 1e6;
const QUANTILES: [(&str, &str); 4] = [("0.5", "p50"), ("0.9", "p90"), ("0.99", "p99"), ("0.999", "p999")];

/// What the ring thread hands over.
#[derive(Debug)]
pub struct MetricsView {
    /// The node.
    pub facts: NodeFacts,
    /// A leader's replicas.
    pub replicas: Vec<ReplicationRow>,
    /// What `WATERFALL` answers.
    pub accounting: Value,
}

/// The text of one scrape.
pub fn render(view: &MetricsView) -> String {
    let mut page = Page::default();
    page.node(&view.facts);
    page.replicas(&view.replicas);
    page.accounting(&view.accounting);
    page.text
}

#[derive(Default)]
struct Page {
    text: String,
}

/// `a="x",b="y"`, values escaped.
fn labels(pairs: &[(&str, &str)]) -> String {
    let escaped = |value: &str| value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let pairs: Vec<String> = pairs.iter().map(|(key, value)| format!("{key}=\"{}\"", escaped(value))).collect();
    pairs.join(",")
}

fn rows(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(0.0)
}

fn text_of(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing into a String cannot fail, here and below.
        let _ = writeln!(self.text, "# HELP walferry_{name} {help}\n# TYPE walferry_{name} {kind}");
    }

    fn sample(&mut self, name: &str, pairs: &[(&str, &str)], value: impl fmt::Display) {
        let labels = labels(pairs);
        let _ = match labels.as_str() {
            "" => writeln!(self.text, "walferry_{name} {value}"),
            labels => writeln!(self.text, "walferry_{name}{{{labels}}} {value}"),
        };
    }

    fn single(&mut self, name: &str, kind: &str, help: &str, value: impl fmt::Display) {
        self.family(name, kind, help);
        self.sample(name, &[], value);
    }

    /// A distribution of microseconds as a summary in seconds, or of plain numbers with `unit` 1.
    fn summary(&mut self, name: &str, pairs: &[(&str, &str)], of: &Value, samples: f64, unit: f64) {
        for (quantile, key) in QUANTILES {
            let pairs = [pairs, &[("quantile", quantile)]].concat();
            self.sample(name, &pairs, number(&of[key]) / unit);
        }
        self.sample(&format!("{name}_sum"), pairs, number(&of["mean"]) * samples / unit);
        self.sample(&format!("{name}_count"), pairs, samples);
    }

    fn node(&mut self, facts: &NodeFacts) {
        let role = facts.role.to_string();
        self.family("node_info", "gauge", "The node; always 1.");
        let info = [("name", facts.name.as_str()), ("role", &role), ("cluster_id", &facts.cluster_id)];
        self.sample("node_info", &info, 1);
        let leads = u8::from(facts.following.is_none());
        self.single("leads", "gauge", "1 on the leader while it holds its lease: where writes are taken.", leads);
        let blocked = u8::from(!facts.blocked_reason.is_empty());
        self.single(
            "blocked",
            "gauge",
            "1 while blocked_reason in INFO is not empty: degraded, stopped, no space.",
            blocked,
        );
        self.single("epoch", "gauge", "The epoch that the node is in.", facts.epoch.number());
        self.single("uptime_seconds", "gauge", "Since the node started.", facts.uptime_s);
        self.single("clients", "gauge", "Client connections.", facts.clients.connected);
        self.clients(&facts.clients);
        self.single("commands_total", "counter", "Commands executed.", facts.commands);
        self.turns(&facts.turns);
        let help = "Lines of the node's log that nobody read in time, or that could not be written.";
        self.single("log_lines_lost_total", "counter", help, facts.lost_lines);
        let repairs = &facts.repairs;
        let help = "Damaged parts of the log that other nodes gave back.";
        self.single("log_repaired_ranges_total", "counter", help, repairs.ranges);
        self.single(
            "log_repaired_bytes_total",
            "counter",
            "Bytes of log that were repaired from other nodes.",
            repairs.bytes,
        );
        self.single("stores_rebuilt_total", "counter", "Damaged stores that were rebuilt.", repairs.stores);
        self.family("lsn_bytes", "gauge", "The log's positions: end, written, flushed, applied, committed.");
        for (position, lsn) in [
            ("end", facts.end),
            ("written", facts.written),
            ("flushed", facts.flushed),
            ("applied", facts.applied),
            ("committed", facts.committed),
        ] {
            self.sample("lsn_bytes", &[("position", position)], lsn.0);
        }
        if let Some(staleness) = facts.staleness {
            let help = "What was durable on the leader so long ago is applied here; absent when the node cannot say.";
            self.single("staleness_seconds", "gauge", help, staleness.as_secs_f64());
        }
        if let Some(following) = &facts.following {
            let connected = u8::from(following.connected);
            self.single("leader_connected", "gauge", "1 while the link to the leader is up.", connected);
            let silence = following.silence.as_secs_f64();
            self.single("leader_silence_seconds", "gauge", "Time since a leader was heard.", silence);
            if let Some(bytes) = following.lag_bytes {
                let help = "The leader's log that is not applied here; absent while the leader is not heard.";
                self.single("lag_bytes", "gauge", help, bytes);
            }
            let help =
                "For how long the oldest of it waits; while the leader is not heard, at least for how long it was not.";
            self.single("lag_seconds", "gauge", help, following.lag.as_secs_f64());
        }
    }

    fn turns(&mut self, turns: &Turns) {
        let help = "The longest turn of the loop: for so long no client was served.";
        self.single("turn_seconds_max", "gauge", help, turns.longest.as_secs_f64());
        self.single("slow_turns_total", "counter", "Turns of the loop of 50 ms and longer.", turns.slow);
        self.family("slow_commands_total", "counter", "Commands that took 50 ms or longer, by name.");
        for (command, count) in &turns.slow_commands {
            self.sample("slow_commands_total", &[("command", command)], count);
        }
    }

    fn clients(&mut self, counts: &ClientCounts) {
        let help = "What clients have half sent, queued and not yet read.";
        self.single("clients_buffered_bytes", "gauge", help, counts.buffered_bytes);
        self.single("clients_accepted_total", "counter", "Clients accepted.", counts.accepted);
        self.family(
            "clients_sent_away_total",
            "counter",
            "Clients turned away or disconnected by the node, by reason.",
        );
        for (reason, count) in [
            ("too_many", counts.rejected),
            ("idle", counts.idle),
            ("stalled", counts.stalled),
            ("half_closed", counts.half_closed),
            ("evicted", counts.evicted),
            ("killed", counts.killed),
            ("http", counts.http),
            ("unread", counts.unread),
            ("authentication_timeout", counts.unknown),
            ("displaced", counts.displaced),
        ] {
            self.sample("clients_sent_away_total", &[("reason", reason)], count);
        }
        self.single("logins_failed_total", "counter", "Wrong names or passwords of clients.", counts.failed_logins);
        let help = "Clients that are connected and have not logged in.";
        self.single("clients_unauthenticated", "gauge", help, counts.unknown_now);
    }

    fn replicas(&mut self, replicas: &[ReplicationRow]) {
        if replicas.is_empty() {
            return;
        }
        type Of = fn(&ReplicationRow) -> f64;
        let families: [(&str, &str, Of); 4] = [
            ("replica_streaming", "1 while the replica streams.", |row| f64::from(row.state == "streaming")),
            ("replica_in_sync", "1 while the replica is in the in-sync set.", |row| f64::from(row.in_sync)),
            ("replica_lag_bytes", "Log that the replica has not applied.", |row| row.lag_bytes as f64),
            ("replica_lag_seconds", "For how long the oldest of it waits.", |row| row.lag_us as f64 / SECOND_US),
        ];
        for (name, help, of) in families {
            self.family(name, "gauge", help);
            for row in replicas {
                self.sample(name, &[("replica", &row.name)], of(row));
            }
        }
        self.family("replica_lsn_bytes", "gauge", "What each replica has confirmed: sent, written, flushed, applied.");
        for row in replicas {
            for (position, lsn) in
                [("sent", row.sent), ("written", row.written), ("flushed", row.flushed), ("applied", row.applied)]
            {
                self.sample("replica_lsn_bytes", &[("replica", &row.name), ("position", position)], lsn.0);
            }
        }
    }

    fn accounting(&mut self, accounting: &Value) {
        let flush = &accounting["flush"];
        let count = |key: &str| number(&flush[key]);
        self.single("flushes_total", "counter", "Durable writes of the log.", count("flushes"));
        self.single("records_total", "counter", "Records in durable writes of the log.", count("records"));
        self.single(
            "flushed_bytes_total",
            "counter",
            "Bytes of durable writes of the log, padding included.",
            count("bytes"),
        );
        self.single(
            "padding_bytes_total",
            "counter",
            "Padding bytes of durable writes of the log.",
            count("padding_bytes"),
        );
        self.single("saved_flushes_total", "counter", "Records minus flushes.", count("saved_flushes"));
        let flushes = count("flushes");
        for (name, key, help, unit) in [
            ("records_per_flush", "records_per_flush", "Records in a flush.", 1.0),
            ("bytes_per_flush", "bytes_per_flush", "Bytes in a flush.", 1.0),
            ("flush_queue_seconds", "queue_us", "A frame's wait for the disk.", SECOND_US),
            ("flush_device_seconds", "device_us", "A durable write.", SECOND_US),
        ] {
            self.family(name, "summary", help);
            self.summary(name, &[], &flush[key], flushes, unit);
        }
        let levels = rows(&accounting["levels"]);
        if levels.is_empty() {
            return;
        }
        self.single(
            "commit_sampled_one_in",
            "gauge",
            "Of so many commits one is traced.",
            &accounting["sampled_one_in"],
        );
        self.family("commits_total", "counter", "Commits by level.");
        for level in levels {
            self.sample("commits_total", &[("level", text_of(&level["level"]))], &level["commits"]);
        }
        self.family("commit_seconds", "summary", "A sampled commit, from its command to its reply.");
        for level in levels {
            let total = &level["total"];
            let pairs = [("level", text_of(&level["level"]))];
            self.summary("commit_seconds", &pairs, &total["us"], number(&total["samples"]), SECOND_US);
        }
        self.family(
            "commit_stage_seconds",
            "summary",
            "One stage of a sampled commit; the local and the remote branch overlap.",
        );
        for level in levels {
            for stage in rows(&level["stages"]) {
                let pairs = ["level", "stage", "branch"].map(|key| match key {
                    "level" => (key, text_of(&level[key])),
                    _ => (key, text_of(&stage[key])),
                });
                self.summary("commit_stage_seconds", &pairs, &stage["us"], number(&stage["samples"]), SECOND_US);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::time::Duration;
    use walferry_engine::lsn::Lsn;

    #[test]
    fn a_page_is_well_formed() {
        let us = json!({ "p50": 250, "p90": 300, "p99": 400, "p999": 500, "max": 600, "mean": 260.0 });
        let accounting = json!({
            "sampled_one_in": 1,
            "levels": [{
                "level": "remote_apply", "commits": 12, "total": { "samples": 10, "us": us },
                "stages": [{ "stage": "network_out", "branch": "remote", "samples": 10, "us": us }],
            }],
            "flush": { "flushes": 4, "records": 12, "saved_flushes": 8, "device_us": us },
        });
        let row = ReplicationRow {
            name: "b".to_owned(),
            address: "127.0.0.1:1".to_owned(),
            state: "streaming".to_owned(),
            sent: Lsn(8192),
            written: Lsn(8192),
            flushed: Lsn(4096),
            applied: Lsn(4096),
            lag_bytes: 4096,
            lag_us: 1500,
            sync_state: "quorum".to_owned(),
            in_sync: true,
        };
        let facts = NodeFacts {
            name: "a\"\\".to_owned(),
            staleness: Some(Duration::from_millis(1500)),
            turns: Turns {
                longest: Duration::from_millis(250),
                slow_commands: [("exec", 2)].into(),
                ..Turns::default()
            },
            ..NodeFacts::default()
        };
        let text = render(&MetricsView { facts, replicas: vec![row], accounting });
        for line in [
            "walferry_node_info{name=\"a\\\"\\\\\",role=\"leader\",cluster_id=\"\"} 1",
            "walferry_staleness_seconds 1.5",
            "walferry_turn_seconds_max 0.25",
            "walferry_slow_commands_total{command=\"exec\"} 2",
            "walferry_replica_lag_seconds{replica=\"b\"} 0.0015",
            "walferry_replica_lsn_bytes{replica=\"b\",position=\"flushed\"} 4096",
            "walferry_saved_flushes_total 8",
            "walferry_commits_total{level=\"remote_apply\"} 12",
            "walferry_commit_seconds{level=\"remote_apply\",quantile=\"0.5\"} 0.00025",
            "walferry_commit_seconds_sum{level=\"remote_apply\"} 0.0026",
            "walferry_commit_stage_seconds_count{level=\"remote_apply\",stage=\"network_out\",branch=\"remote\"} 10",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is missing in\n{text}");
        }
        let mut family = String::new();
        let mut seen = std::collections::HashSet::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                family = rest.split(' ').next().unwrap().to_owned();
                assert!(seen.insert(family.clone()), "{family} is given twice");
            } else if !line.starts_with('#') {
                assert!(line.starts_with(&family), "{line} is not of the family {family} above it");
                assert!(line.rsplit(' ').next().unwrap().parse::<f64>().is_ok(), "{line} ends with a number");
            }
        }
    }
}
