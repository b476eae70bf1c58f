//! The sections of INFO that only this node has: what its flushes cost, the stages of a commit, log, store and shipping. Decides nothing.

use walferry_shipper::slots::SLOTS_MAX;
use walferry_shipper::status::SentBytes;

use crate::metrics::waterfall::Stage as CommitStage;
use crate::node::{Node, Role};

fn line(key: &str, value: impl std::fmt::Display) -> (String, String) {
    (key.to_owned(), value.to_string())
}

impl Node {
    pub(super) fn flush_lines(&self) -> Vec<(String, String)> {
        let flush = self.log.flush_accounting().snapshot();
        let mut lines = vec![
            line("flush_count", flush.flushes),
            line("flush_records", flush.records),
            line("flush_bytes", flush.bytes),
            line("flush_padding_bytes", flush.padding_bytes),
            line("flush_padding_share", format_args!("{:.3}", flush.padding_share())),
            line("flush_saved", flush.saved_flushes()),
            line("flush_records_per_flush", format_args!("{:.2}", flush.records_per_flush.mean)),
            line("flush_records_per_flush_p99", flush.records_per_flush.p99),
            line("flush_bytes_per_flush_p50", flush.bytes_per_flush.p50),
            line("flush_queue_us_p50", flush.queue_us.p50),
            line("flush_queue_us_p99", flush.queue_us.p99),
            line("flush_device_us_p50", flush.device_us.p50),
            line("flush_device_us_p99", flush.device_us.p99),
            line("flush_device_us_max", flush.device_us.max),
            line("flush_device_us_per_commit", format_args!("{:.1}", flush.device_us_per_commit())),
        ];
        let slow = self.disk_words();
        if !slow.is_empty() {
            lines.push(line("flush_slow", slow));
        }
        lines
    }

    /// The mean of each stage of each level: `WATERFALL` tells the distributions.
    pub(super) fn waterfall_lines(&self) -> Vec<(String, String)> {
        let mut lines = vec![line("waterfall_sampled_one_in", self.waterfall.one_in())];
        for (level, stages) in self.waterfall.levels().filter(|(_, stages)| stages.samples > 0) {
            let of = |stage: &CommitStage| {
                let mean = stages.stages[*stage as usize].mean();
                (mean > 0.0).then(|| format!("{}={mean:.0}", stage.name()))
            };
            let means: Vec<String> = CommitStage::ALL.iter().filter_map(of).collect();
            let total = stages.total.mean();
            lines.push(line(&format!("waterfall_{level}_us"), format_args!("total={total:.0},{}", means.join(","))));
        }
        lines
    }

    pub(super) fn log_lines(&self) -> Vec<(String, String)> {
        let log = self.log.config();
        vec![
            line("log_start_lsn", self.log.start()),
            line("log_hot_start_lsn", self.log.hot_start()),
            line("log_segment_bytes", log.segment_bytes),
            line("log_write_depth", log.write_depth),
            line("log_sync_method", log.sync_method),
            line("log_buffered", log.buffered),
            line("store_checkpoint_lsn", self.store.durable_applied()),
            line("store_checkpoints", self.store.checkpoints()),
            line("store_overlay_bytes", self.store.overlay_bytes()),
            line("log_repaired_ranges", self.repaired.ranges),
            line("log_repaired_bytes", self.repaired.bytes),
            line("stores_rebuilt", self.repaired.stores),
            line("snapshots_taken", self.snapshots.taken),
            line("snapshot_received_bytes", self.snapshots.taken_bytes),
            line("snapshot_kept_bytes", self.snapshots.kept_bytes),
        ]
    }

    pub(super) fn shipping_lines(&self) -> Vec<(String, String)> {
        let Role::Leader(shipper) = &self.role else { return Vec::new() };
        let replicas = shipper.replicas();
        let sent = replicas.iter().fold(SentBytes::default(), |sum, replica| sum.plus(replica.sent_bytes));
        let mut lines = vec![
            line("shipped_zc_bytes", sent.zero_copy),
            line("shipped_copy_bytes", sent.copy),
            line("shipped_sendfile_bytes", sent.sendfile),
        ];
        let slots = shipper.slots();
        lines.push(line("slots", slots.len()));
        lines.push(line("slots_max", SLOTS_MAX));
        lines.push(line("slots_lost", slots.iter().filter(|slot| slot.lost).count()));
        for replica in replicas {
            let name = &replica.name;
            lines.push(line(&format!("replica_{name}_transport"), replica.transport));
            let micros = |duration: std::time::Duration| duration.as_micros();
            lines.push(line(
                &format!("replica_{name}_us"),
                format_args!(
                    "write={},flush={},apply={},round_trip={}",
                    micros(replica.durations.write),
                    micros(replica.durations.flush),
                    micros(replica.durations.apply),
                    replica.round_trip.map_or(0, micros)
                ),
            ));
        }
        lines
    }
}
