//! Metrics of sessions, and of what is kept for them.

use prometheus::{IntCounterVec, IntGauge, IntGaugeVec};
use rudder_engine::SessionStats;

use crate::metrics::{Builder, raise};

/// See the module.
pub(crate) struct SessionMetrics {
    sessions: IntGaugeVec,
    protected: IntGauge,
    evicted: IntCounterVec,
}

impl SessionMetrics {
    /// Registers them.
    pub fn new(builder: &Builder) -> Self {
        let sessions = builder.opts(
            "sessions",
            "Sessions by state: running (a turn waits or runs), kept (between turns, protected), idle.",
        );
        let evicted = builder.opts(
            "kv_evicted_blocks_total",
            "Cached KV blocks that gave way, by whether they were protected for a session.",
        );
        Self {
            sessions: builder.add(IntGaugeVec::new(sessions, &["state"])),
            protected: builder.gauge("kv_protected_blocks", "KV blocks cached for protected sessions."),
            evicted: builder.add(IntCounterVec::new(evicted, &["protected"])),
        }
    }

    /// Moves all to what the engine says.
    pub fn take(&self, stats: &SessionStats) {
        for (state, sessions) in [("running", stats.running), ("kept", stats.kept), ("idle", stats.idle)] {
            self.sessions.with_label_values(&[state]).set(sessions as i64);
        }
        self.protected.set(stats.protected_blocks as i64);
        for (protected, total) in [("true", stats.evicted_protected), ("false", stats.evicted_unprotected)] {
            raise(&self.evicted.with_label_values(&[protected]), total);
        }
    }
}

#[cfg(test)]
mod tests {
    use rudder_engine::Stats;

    use super::*;
    use crate::metrics::Metrics;

    #[test]
    fn sessions_are_counted_by_state_and_evictions_once() {
        let sessions = SessionStats { kept: 3, evicted_protected: 7, ..SessionStats::default() };
        let metrics = Metrics::new("tiny");
        for _ in 0..2 {
            let text = metrics.render(&Stats { sessions, ..Stats::default() }, &Default::default());
            for line in [
                "rudder_sessions{model_name=\"tiny\",state=\"kept\"} 3",
                "rudder_sessions{model_name=\"tiny\",state=\"running\"} 0",
                "rudder_kv_evicted_blocks_total{model_name=\"tiny\",protected=\"true\"} 7",
                "rudder_kv_evicted_blocks_total{model_name=\"tiny\",protected=\"false\"} 0",
            ] {
                assert!(text.lines().any(|found| found == line), "{line} is missing in\n{text}");
            }
        }
    }
}
