//! The sampler: from a row of logits to one token, on the host.
//!
//! A draw depends on the row's logits, its parameters, its own history and its position alone.
//! Randomness is counter-based, a hash of (seed, position), so that a preempted or restarted
//! sequence draws again what it drew before, and neighbours cannot shift anyone's stream.

use std::collections::HashMap;

/// An additive bias on one token's logit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogitBias {
    /// Token id.
    pub token: u32,
    /// Added to its logit before temperature.
    pub bias: f32,
}

/// How a request wants its tokens drawn. Ranges are checked by whoever builds one from input.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 is greedy.
    pub temperature: f32,
    /// Nucleus: keep the most likely tokens whose probabilities reach this sum (1 keeps all).
    /// Holtzman et al. 2019 (arXiv:1904.09751).
    pub top_p: f32,
    /// Keep this many of the most likely tokens (0 keeps all).
    pub top_k: u32,
    /// Keep tokens at least this fraction as likely as the most likely one (0 keeps all).
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or output
    /// (1 is off). Keskar et al. 2019 (arXiv:1909.05858).
    pub repetition_penalty: f32,
    /// Subtracted once for tokens seen in the output.
    pub presence_penalty: f32,
    /// Subtracted for every occurrence in the output.
    pub frequency_penalty: f32,
    /// Biases, at most one per token.
    pub logit_bias: Vec<LogitBias>,
    /// Seed of this request's random stream.
    pub seed: u64,
    /// How many alternatives to report with log-probabilities; `None` reports nothing.
    pub logprobs: Option<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: None,
        }
    }
}

impl SamplingParams {
    /// Whether any penalty needs [`TokenCounts`].
    pub fn needs_counts(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

/// How often each token occurred in a sequence; kept only for requests with penalties.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TokenCounts {
    /// Token to (occurrences in the output, seen at all in prompt or output).
    counts: HashMap<u32, u32>,
}

/// What the sampler needs to know of one row.
#[derive(Debug, Clone, Copy)]
pub struct SampleRow<'a> {
    /// The request's parameters.
    pub params: &'a SamplingParams,
    /// Occurrences so far, when the parameters need them.
    pub counts: Option<&'a TokenCounts>,
    /// Index in the sequence of the token being drawn: the counter of its random stream.
    pub position: u64,
    /// Allowed tokens, bit `t % 32` of word `t / 32`; words beyond the end count as zero.
    pub mask: Option<&'a [u32]>,
    /// Do not draw: report this token's log-probability (prompt log-probabilities).
    pub forced: Option<u32>,
}

/// A token and its natural-log probability.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLogprob {
    /// Token id.
    pub token: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
}

/// What was drawn from one row.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: u32,
    /// Its log-probability under the raw logits' softmax (before temperature and filters, as
    /// OpenAI and vLLM report it); `None` unless asked for.
    pub logprob: Option<f32>,
    /// The most likely tokens, best first, as many as asked for.
    pub top: Vec<TokenLogprob>,
    /// Set when the row could not be sampled: its logits were not finite, or no token was allowed.
    pub fault: Option<&'static str>,
}
