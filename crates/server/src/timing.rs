//! Where an answer's time went, as its client is told: a `rudder` field, and headers.

use axum::http::{HeaderName, HeaderValue};
use axum::response::Response;
use serde::Serialize;

use crate::generate::Totals;

/// See the module. Of several choices, the longest times.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Timing {
    /// Waiting for its turn, milliseconds.
    queue_ms: f64,
    /// Reading the prompt, up to the first token.
    prefill_ms: f64,
    /// From there to the end.
    decode_ms: f64,
    /// Tokens of the prompt found in the cache.
    cached_tokens: usize,
    /// Tokens drafted, and of these accepted.
    drafted_tokens: usize,
    accepted_tokens: usize,
}

impl From<Totals> for Timing {
    fn from(totals: Totals) -> Self {
        let [queue_ms, prefill_ms, decode_ms] = [totals.queue, totals.prefill, totals.decode]
            .map(|time| (time.as_secs_f64() * 1e6).round() / 1e3);
        let Totals { cached_tokens, drafted_tokens, accepted_tokens, .. } = totals;
        Self { queue_ms, prefill_ms, decode_ms, cached_tokens, drafted_tokens, accepted_tokens }
    }
}

impl Timing {
    /// The response with these figures in its headers.
    pub fn tell(&self, mut response: Response) -> Response {
        let headers = response.headers_mut();
        for (name, value) in [
            ("x-rudder-queue-ms", self.queue_ms.to_string()),
            ("x-rudder-prefill-ms", self.prefill_ms.to_string()),
            ("x-rudder-decode-ms", self.decode_ms.to_string()),
            ("x-rudder-cached-tokens", self.cached_tokens.to_string()),
            ("x-rudder-drafted-tokens", self.drafted_tokens.to_string()),
            ("x-rudder-accepted-tokens", self.accepted_tokens.to_string()),
        ] {
            if let Ok(value) = HeaderValue::try_from(value) {
                headers.insert(HeaderName::from_static(name), value);
            }
        }
        response
    }
}
