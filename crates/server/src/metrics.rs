//! What operators watch: every metric as `rudder_*`, and those that vLLM has as `vllm:*` too, so
//! that its dashboards and gateways work unchanged.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry, TextEncoder,
};
use rudder_engine::{DraftCounts, Stats, Usage};

use crate::generate::EndReason;
use crate::responses::store::StoreStats;
use crate::session_metrics::SessionMetrics;
use crate::tier_metrics::TierMetrics;

/// Names, less their prefix, that vLLM exports with the same meaning.
const VLLM: [&str; 16] = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "num_preemptions_total",
    "spec_decode_num_drafts_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
    "spec_decode_num_accepted_tokens_per_pos_total",
];
const VLLM_SUCCESS: &str = "request_success_total";

/// Bucket bounds in seconds: of waits before a first token or a whole answer, of what is done before a request is
/// submitted, and of one step.
const WAITS: [f64; 20] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0,
    320.0, 640.0, 2560.0,
];
const PREPARATIONS: [f64; 12] =
    [1e-5, 2.5e-5, 1e-4, 2.5e-4, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.25, 1.0];
const STEPS: [f64; 16] =
    [0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.04, 0.06, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0, 40.0];

/// The process's metrics. Gauges and engine counters are read when they are asked for.
pub(crate) struct Metrics {
    registry: Registry,
    running: IntGauge,
    waiting: IntGauge,
    kv_usage: Gauge,
    kv_blocks: IntGaugeVec,
    prefix_queries: IntCounter,
    prefix_hits: IntCounter,
    prompt_tokens: IntCounter,
    generation_tokens: IntCounter,
    preemptions: IntCounter,
    steps: IntCounter,
    drafts: IntCounterVec,
    drafted_tokens: IntCounterVec,
    accepted_tokens: IntCounterVec,
    accepted_at: IntCounterVec,
    success: IntCounterVec,
    first_token: Histogram,
    inter_token: Histogram,
    whole: Histogram,
    queue: Histogram,
    preparation: HistogramVec,
    store_bytes: IntGauge,
    store_failures: IntCounter,
    store_evictions: IntCounter,
    sessions: SessionMetrics,
    tier: TierMetrics,
    /// Held while a scrape moves the counters, so that two scrapes add nothing twice.
    scrape: Mutex<()>,
}

impl Metrics {
    /// Metrics labelled with a model's name.
    pub fn new(model: &str) -> Self {
        let labels = HashMap::from([("model_name".to_owned(), model.to_owned())]);
        let builder = Builder { registry: Registry::new(), labels };
        let by_source = |name, help| builder.add(IntCounterVec::new(builder.opts(name, help), &["source"]));
        Self {
            running: builder.gauge("num_requests_running", "Sequences running."),
            waiting: builder.gauge("num_requests_waiting", "Requests waiting."),
            kv_usage: builder.add(Gauge::with_opts(
                builder.opts("kv_cache_usage_perc", "Share of KV blocks held by running sequences, 0 to 1."),
            )),
            kv_blocks: builder.add(IntGaugeVec::new(
                builder.opts("kv_blocks", "KV blocks by state; the sum is the pool."),
                &["state"],
            )),
            prefix_queries: builder
                .counter("prefix_cache_queries_total", "Tokens looked up in the prefix tree."),
            prefix_hits: builder.counter("prefix_cache_hits_total", "Of these, found."),
            prompt_tokens: builder.counter("prompt_tokens_total", "Prompt tokens of admitted requests."),
            generation_tokens: builder.counter("generation_tokens_total", "Tokens generated."),
            preemptions: builder
                .counter("num_preemptions_total", "Sequences preempted for want of KV blocks."),
            steps: builder.counter("steps_total", "Engine steps run."),
            drafts: by_source("spec_decode_num_drafts_total", "Drafts verified."),
            drafted_tokens: by_source("spec_decode_num_draft_tokens_total", "Tokens in them."),
            accepted_tokens: by_source("spec_decode_num_accepted_tokens_total", "Of these, accepted."),
            accepted_at: builder.add(IntCounterVec::new(
                builder.opts(
                    "spec_decode_num_accepted_tokens_per_pos_total",
                    "Accepted tokens by their place in the draft.",
                ),
                &["source", "position"],
            )),
            success: builder.add(IntCounterVec::new(
                builder.opts(VLLM_SUCCESS, "Sequences ended, by reason."),
                &["finished_reason"],
            )),
            first_token: builder.histogram("time_to_first_token_seconds", "Arrival to first token.", &WAITS),
            inter_token: builder.histogram("inter_token_latency_seconds", "One step's tokens to the next.", &STEPS),
            whole: builder.histogram("e2e_request_latency_seconds", "Arrival to the end.", &WAITS),
            queue: builder.histogram("request_queue_time_seconds", "Submission to the first step.", &WAITS),
            preparation: builder.add(HistogramVec::new(
                builder
                    .histogram_opts(
                        "request_preparation_seconds",
                        "Before a conversation's submission: reading the request, rendering the template, tokenizing.",
                        &PREPARATIONS,
                    ),
                &["stage"],
            )),
            store_bytes: builder.gauge("response_store_bytes", "Bytes of stored responses."),
            store_failures: builder
                .counter("response_store_failures_total", "Responses that could not be stored or read."),
            store_evictions: builder.counter(
                "response_store_evictions_total",
                "Stored responses and conversations removed before their time, for want of space.",
            ),
            sessions: SessionMetrics::new(&builder),
            tier: TierMetrics::new(&builder),
            registry: builder.registry,
            scrape: Mutex::new(()),
        }
    }

    /// A sequence's first token came.
    pub fn time_to_first_token(&self, since_arrival: Duration) {
        self.first_token.observe(since_arrival.as_secs_f64());
    }

    /// A stage of a conversation's preparation is done.
    pub fn prepared(&self, stage: &str, took: Duration) {
        self.preparation.with_label_values(&[stage]).observe(took.as_secs_f64());
    }

    /// Further tokens of one step came.
    pub fn inter_token(&self, since_last: Duration) {
        self.inter_token.observe(since_last.as_secs_f64());
    }

    /// A sequence ended by itself or by a fault.
    pub fn ended(&self, reason: &EndReason, usage: &Usage, since_arrival: Duration) {
        self.success.with_label_values(&[reason.as_str()]).inc();
        self.queue.observe(usage.queue.as_secs_f64());
        self.whole.observe(since_arrival.as_secs_f64());
    }

    /// A client went away before its sequence's end.
    pub fn aborted(&self, since_arrival: Duration) {
        self.success.with_label_values(&["abort"]).inc();
        self.whole.observe(since_arrival.as_secs_f64());
    }

    /// Everything in Prometheus' text format, with the counts of the engine and of the store of responses.
    pub fn render(&self, stats: &Stats, store: &StoreStats) -> String {
        let _scrape = self.scrape.lock().unwrap_or_else(PoisonError::into_inner);
        self.take(stats);
        self.sessions.take(&stats.sessions);
        self.tier.take(&stats.tier);
        self.take_store(store);
        let mut families = self.registry.gather();
        let names = VLLM.iter().chain([&VLLM_SUCCESS]);
        for name in names {
            let ours = format!("rudder_{name}");
            if let Some(family) = families.iter().find(|family| family.name() == ours) {
                let mut theirs = family.clone();
                theirs.set_name(format!("vllm:{name}"));
                families.push(theirs);
            }
        }
        let mut text = Vec::new();
        if let Err(error) = TextEncoder::new().encode(&families, &mut text) {
            tracing::error!(%error, "metrics could not be encoded");
        }
        String::from_utf8(text).unwrap_or_default()
    }

    fn take_store(&self, stats: &StoreStats) {
        self.store_bytes.set(stats.bytes.load(Ordering::Relaxed) as i64);
        for (counter, total) in
            [(&self.store_failures, &stats.failures), (&self.store_evictions, &stats.evicted)]
        {
            raise(counter, total.load(Ordering::Relaxed));
        }
    }

    fn take(&self, stats: &Stats) {
        self.running.set(stats.running as i64);
        self.waiting.set(stats.waiting as i64);
        self.kv_usage.set(stats.kv_blocks_used as f64 / stats.kv_blocks.max(1) as f64);
        let states = [
            ("used", stats.kv_blocks_used),
            ("cached", stats.kv_blocks_cached),
            ("free", stats.kv_blocks_free),
        ];
        for (state, blocks) in states {
            self.kv_blocks.with_label_values(&[state]).set(blocks as i64);
        }
        for (counter, total) in [
            (&self.prefix_queries, stats.prefix_queries),
            (&self.prefix_hits, stats.prefix_hits),
            (&self.prompt_tokens, stats.prompt_tokens),
            (&self.generation_tokens, stats.generation_tokens),
            (&self.preemptions, stats.preemptions),
            (&self.steps, stats.steps),
        ] {
            raise(counter, total);
        }
        self.take_drafts("copy", &stats.copies());
        if let Some(model) = &stats.model_drafts {
            self.take_drafts("model", model);
        }
    }

    fn take_drafts(&self, source: &str, counts: &DraftCounts) {
        let accepted = counts.accepted_at.iter().sum();
        for (counters, total) in [
            (&self.drafts, counts.drafts),
            (&self.drafted_tokens, counts.tokens),
            (&self.accepted_tokens, accepted),
        ] {
            raise(&counters.with_label_values(&[source]), total);
        }
        for (position, &total) in counts.accepted_at.iter().enumerate() {
            raise(&self.accepted_at.with_label_values(&[source, &position.to_string()]), total);
        }
    }
}

/// Moves a counter to a total that only grows.
pub(crate) fn raise(counter: &IntCounter, total: u64) {
    counter.inc_by(total.saturating_sub(counter.get()));
}

/// Makes registered metrics that carry the model's name.
pub(crate) struct Builder {
    registry: Registry,
    labels: HashMap<String, String>,
}

impl Builder {
    pub(crate) fn opts(&self, name: &str, help: &str) -> Opts {
        Opts::new(format!("rudder_{name}"), help).const_labels(self.labels.clone())
    }

    /// The names are constants of this file, and a test renders them all.
    pub(crate) fn add<C: Collector + Clone + 'static>(&self, metric: prometheus::Result<C>) -> C {
        let metric = metric.expect("a constant, valid name");
        self.registry.register(Box::new(metric.clone())).expect("a constant, unique name");
        metric
    }

    pub(crate) fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.add(IntGauge::with_opts(self.opts(name, help)))
    }

    pub(crate) fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.add(IntCounter::with_opts(self.opts(name, help)))
    }

    fn histogram_opts(&self, name: &str, help: &str, buckets: &[f64]) -> HistogramOpts {
        HistogramOpts::from(self.opts(name, help)).buckets(buckets.to_vec())
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        self.add(Histogram::with_opts(self.histogram_opts(name, help, buckets)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats() -> Stats {
        Stats {
            running: 2,
            kv_blocks: 10,
            kv_blocks_used: 5,
            kv_blocks_cached: 2,
            kv_blocks_free: 3,
            prompt_tokens: 40,
            ..Stats::default()
        }
    }

    #[test]
    fn every_vllm_name_is_exported_under_both_prefixes() {
        let metrics = Metrics::new("tiny");
        metrics.ended(&EndReason::Length, &Usage::default(), Duration::from_millis(3));
        let text = metrics.render(&stats(), &StoreStats::default());
        for name in VLLM.iter().chain([&VLLM_SUCCESS]) {
            for name in [format!("rudder_{name}"), format!("vllm:{name}")] {
                assert!(text.contains(&format!("# TYPE {name} ")), "{name} is missing in\n{text}");
            }
        }
        assert!(text.contains(r#"vllm:num_requests_running{model_name="tiny"} 2"#), "{text}");
        assert!(text.contains(r#"rudder_kv_blocks{model_name="tiny",state="cached"} 2"#), "{text}");
        assert!(text.contains(r#"vllm:request_success_total{finished_reason="length",model_name="tiny"} 1"#));
        assert!(text.contains(r#"vllm:kv_cache_usage_perc{model_name="tiny"} 0.5"#));
    }

    #[test]
    fn drafts_are_told_apart_by_their_source() {
        let mut accepted_at = [0; 32];
        accepted_at[..2].copy_from_slice(&[5, 3]);
        let mut of_model = [0; 32];
        of_model[0] = 4;
        let model = DraftCounts { drafts: 6, tokens: 9, accepted_at: of_model };
        let stats =
            Stats { drafts: 10, drafted_tokens: 20, accepted_at, model_drafts: Some(model), ..stats() };
        let text = Metrics::new("tiny").render(&stats, &StoreStats::default());
        for (name, source, total) in [
            ("drafts_total", "copy", 4),
            ("drafts_total", "model", 6),
            ("draft_tokens_total", "copy", 11),
            ("accepted_tokens_total", "copy", 4),
            ("accepted_tokens_total", "model", 4),
        ] {
            let line = format!("spec_decode_num_{name}{{model_name=\"tiny\",source=\"{source}\"}} {total}\n");
            assert!(
                text.contains(&format!("rudder_{line}")) && text.contains(&format!("vllm:{line}")),
                "{line}"
            );
        }
        let line = r#"per_pos_total{model_name="tiny",position="1",source="copy"} 3"#;
        assert!(text.contains(line), "{text}");
        let none = Metrics::new("tiny").render(&Stats::default(), &StoreStats::default());
        assert!(!none.contains("source=\"model\""), "there is no draft model");
    }

    #[test]
    fn scraping_twice_counts_nothing_twice() {
        let metrics = Metrics::new("tiny");
        metrics.render(&stats(), &StoreStats::default());
        let text = metrics.render(&Stats { prompt_tokens: 41, ..stats() }, &StoreStats::default());
        assert!(text.contains(r#"rudder_prompt_tokens_total{model_name="tiny"} 41"#), "{text}");
    }
}
