//! Structures that both of OpenAI's generation dialects answer with.

use serde::Serialize;

use crate::admission::random_id;
use crate::generate::Totals;
use crate::timing::Timing;
use crate::unix_now;

/// What answers besides the model: it changes with our version.
pub(crate) const FINGERPRINT: &str = concat!("fp_rudder_", env!("CARGO_PKG_VERSION"));

/// What is the same in every chunk of an answer.
pub(crate) struct Head {
    pub id: String,
    pub created: u64,
    pub model: String,
    /// The tier, where the request names one.
    pub service_tier: Option<&'static str>,
}

impl Head {
    /// A new answer by `model`; `prefix` is that of its id.
    pub fn new(prefix: &str, model: String) -> Self {
        Self { id: random_id(prefix), created: unix_now(), model, service_tier: None }
    }
}

/// Token counts of a request.
#[derive(Debug, Serialize)]
pub(crate) struct UsageBody {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
    prompt_tokens_details: PromptDetails,
    completion_tokens_details: CompletionDetails,
}

#[derive(Debug, Serialize)]
struct PromptDetails {
    cached_tokens: usize,
}

#[derive(Debug, Serialize)]
struct CompletionDetails {
    reasoning_tokens: usize,
    accepted_prediction_tokens: usize,
    rejected_prediction_tokens: usize,
}

impl From<Totals> for UsageBody {
    fn from(totals: Totals) -> Self {
        Self {
            prompt_tokens: totals.prompt_tokens,
            completion_tokens: totals.completion_tokens,
            total_tokens: totals.prompt_tokens + totals.completion_tokens,
            prompt_tokens_details: PromptDetails { cached_tokens: totals.cached_tokens },
            completion_tokens_details: CompletionDetails {
                reasoning_tokens: totals.reasoning_tokens,
                accepted_prediction_tokens: totals.predicted_tokens,
                rejected_prediction_tokens: totals.mispredicted_tokens,
            },
        }
    }
}

/// An answer, or a chunk of one.
#[derive(Serialize)]
pub(crate) struct Envelope<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'static str,
    choices: &'a [C],
    /// Left out, or null in the chunks before the one that has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<UsageBody>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    service_tier: Option<&'static str>,
    /// Where the time went; with `usage`.
    #[serde(skip_serializing_if = "Option::is_none")]
    rudder: Option<Timing>,
    /// The prompt's tokens, where asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
}

impl<'a, C> Envelope<'a, C> {
    /// `usage`: `None` leaves the field out, `Some(None)` makes it null.
    pub fn new(
        head: &'a Head,
        object: &'static str,
        choices: &'a [C],
        usage: Option<Option<UsageBody>>,
    ) -> Self {
        Self {
            id: &head.id,
            object,
            created: head.created,
            model: &head.model,
            system_fingerprint: FINGERPRINT,
            choices,
            usage,
            service_tier: head.service_tier,
            rudder: None,
            prompt_token_ids: None,
        }
    }

    /// The same with what it cost, and where the time went.
    #[must_use]
    pub fn with_totals(self, totals: Totals) -> Self {
        Self { usage: Some(Some(totals.into())), rudder: Some(totals.into()), ..self }
    }

    /// The same with the prompt's tokens.
    #[must_use]
    pub fn with_prompt(self, prompt_token_ids: Option<&'a [u32]>) -> Self {
        Self { prompt_token_ids, ..self }
    }
}
