//! Metrics of the KV tier on disk; all zero where there is none.

use prometheus::{IntCounter, IntCounterVec, IntGauge};
use rudder_engine::TierStats;

use crate::metrics::{Builder, raise};

/// See the module.
pub(crate) struct TierMetrics {
    blocks: IntGauge,
    bytes: IntGauge,
    queued: IntGauge,
    readable: IntGauge,
    written: IntCounter,
    read: IntCounter,
    ahead: IntCounter,
    dropped: IntCounterVec,
    restores: IntCounterVec,
}

impl TierMetrics {
    /// Registers them.
    pub fn new(builder: &Builder) -> Self {
        let counters =
            |name, help, label| builder.add(IntCounterVec::new(builder.opts(name, help), &[label]));
        Self {
            blocks: builder.gauge("kv_disk_blocks", "KV blocks on disk that can be read."),
            bytes: builder.gauge("kv_disk_bytes", "Bytes of the files that KV is kept in."),
            queued: builder.gauge("kv_disk_queued_blocks", "KV blocks waiting to be written to disk."),
            readable: builder.gauge("kv_disk_reads_enabled", "0 while the disk is left alone after faults."),
            written: builder.counter("kv_disk_written_bytes_total", "Bytes of KV blocks written to disk."),
            read: builder.counter("kv_disk_read_bytes_total", "Bytes of KV blocks read from disk and whole."),
            ahead: builder.counter(
                "kv_disk_read_ahead_blocks_total",
                "KV blocks on disk that the system was told of while their request waited.",
            ),
            dropped: counters(
                "kv_disk_dropped_blocks_total",
                "KV blocks not kept, or kept and lost, by reason: queue (the disk did not keep up), \
                 write_error, read_error, damaged, torn (found at the start), foreign (files of another \
                 model, found at the start), evicted.",
                "reason",
            ),
            restores: counters(
                "kv_disk_restores_total",
                "Admissions that found their next KV blocks on disk: load, prefill (was thought faster); \
                 gave_up counts loads that failed or took too long.",
                "outcome",
            ),
        }
    }

    /// Moves all to what the engine says.
    pub fn take(&self, stats: &TierStats) {
        let store = &stats.store;
        self.blocks.set(store.blocks as i64);
        self.bytes.set(store.bytes as i64);
        self.queued.set(stats.queued as i64);
        self.readable.set(i64::from(stats.reads));
        raise(&self.written, store.written * stats.block_bytes);
        raise(&self.read, store.read * stats.block_bytes);
        raise(&self.ahead, stats.ahead);
        for (reason, total) in [
            ("queue", stats.dropped),
            ("write_error", store.write_errors),
            ("read_error", store.read_errors),
            ("damaged", store.damaged),
            ("torn", store.torn),
            ("foreign", store.foreign),
            ("evicted", store.evicted),
        ] {
            raise(&self.dropped.with_label_values(&[reason]), total);
        }
        for (outcome, total) in
            [("load", stats.loads), ("prefill", stats.prefills), ("gave_up", stats.given_up)]
        {
            raise(&self.restores.with_label_values(&[outcome]), total);
        }
    }
}

#[cfg(test)]
mod tests {
    use rudder_engine::{Stats, StoreStats};

    use super::*;
    use crate::metrics::Metrics;

    #[test]
    fn faults_of_the_disk_are_told_by_reason() {
        let store = StoreStats { blocks: 3, written: 5, damaged: 2, ..StoreStats::default() };
        let tier = TierStats { store, block_bytes: 100, loads: 4, given_up: 1, ..TierStats::default() };
        let metrics = Metrics::new("tiny");
        for _ in 0..2 {
            let text = metrics.render(&Stats { tier, ..Stats::default() }, &Default::default());
            for line in [
                "rudder_kv_disk_blocks{model_name=\"tiny\"} 3",
                "rudder_kv_disk_written_bytes_total{model_name=\"tiny\"} 500",
                "rudder_kv_disk_dropped_blocks_total{model_name=\"tiny\",reason=\"damaged\"} 2",
                "rudder_kv_disk_dropped_blocks_total{model_name=\"tiny\",reason=\"queue\"} 0",
                "rudder_kv_disk_restores_total{model_name=\"tiny\",outcome=\"load\"} 4",
                "rudder_kv_disk_restores_total{model_name=\"tiny\",outcome=\"gave_up\"} 1",
            ] {
                assert!(text.lines().any(|found| found == line), "{line} is missing in\n{text}");
            }
        }
    }
}
