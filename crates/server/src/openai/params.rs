//! The fields that every dialect's requests share, and their checking.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Arc;

use rudder_engine::{LogitBias, SamplingParams};
use serde::Deserialize;

use super::error::ApiError;
use crate::ServerConfig;
use crate::session::Caller;
use crate::urgency::{Tier, Urgency};

/// Token counts above this are a mistake, not a wish.
const MAX_COUNT: i64 = i32::MAX as i64;
/// Most `stop_token_ids` and `logit_bias` entries.
const MAX_TOKEN_LIST: usize = 1024;
/// Longest stop string: the matcher of each choice takes memory for every byte of it.
const MAX_STOP_BYTES: usize = 1024;

/// Sampling and length, as the client wrote them. Unknown fields are ignored.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct CommonFields {
    pub model: Option<String>,
    pub max_tokens: Option<i64>,
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub top_k: Option<i64>,
    pub min_p: Option<f64>,
    pub repetition_penalty: Option<f64>,
    pub presence_penalty: Option<f64>,
    pub frequency_penalty: Option<f64>,
    pub logit_bias: Option<BTreeMap<String, f64>>,
    pub seed: Option<i64>,
    pub stop: Option<Stop>,
    pub stop_token_ids: Option<Vec<i64>>,
    pub ignore_eos: Option<bool>,
    pub n: Option<i64>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    pub prompt_cache_key: Option<String>,
    pub service_tier: Option<String>,
    pub priority: Option<i64>,
}

/// One stop string, or several.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string or an array of strings")]
pub(crate) enum Stop {
    One(String),
    Many(Vec<String>),
}

/// What a stream carries besides the answer.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct StreamOptions {
    pub include_usage: Option<bool>,
}

impl CommonFields {
    /// Sampling parameters in the engine's terms; a request without a seed gets a random one.
    pub fn sampling(&self, vocab: usize) -> Result<SamplingParams, ApiError> {
        let default = SamplingParams::default();
        Ok(SamplingParams {
            temperature: number("temperature", self.temperature, 0.0..=2.0, default.temperature)?,
            top_p: number("top_p", self.top_p, 0.0..=1.0, default.top_p)?,
            // -1 is how vLLM's clients say "off".
            top_k: integer("top_k", self.top_k, -1..=MAX_COUNT)?.map_or(0, |k| k.max(0) as u32),
            min_p: number("min_p", self.min_p, 0.0..=1.0, default.min_p)?,
            repetition_penalty: self.repetition_penalty()?,
            presence_penalty: number("presence_penalty", self.presence_penalty, -2.0..=2.0, 0.0)?,
            frequency_penalty: number("frequency_penalty", self.frequency_penalty, -2.0..=2.0, 0.0)?,
            logit_bias: self.logit_bias(vocab)?,
            seed: self.seed.map_or_else(|| fastrand::u64(..), |seed| seed as u64),
            logprobs: None,
        })
    }

    /// Dividing by zero would make every seen token impossible or certain.
    fn repetition_penalty(&self) -> Result<f32, ApiError> {
        let penalty = number("repetition_penalty", self.repetition_penalty, 0.0..=100.0, 1.0)?;
        if penalty < 0.01 {
            return Err(ApiError::param(
                "repetition_penalty",
                "repetition_penalty must be from 0.01 to 100.",
            ));
        }
        Ok(penalty)
    }

    fn logit_bias(&self, vocab: usize) -> Result<Vec<LogitBias>, ApiError> {
        let Some(biases) = &self.logit_bias else { return Ok(Vec::new()) };
        if biases.len() > MAX_TOKEN_LIST {
            return Err(ApiError::param(
                "logit_bias",
                format!("logit_bias has over {MAX_TOKEN_LIST} entries."),
            ));
        }
        let mut list = Vec::with_capacity(biases.len());
        for (key, &bias) in biases {
            let token = key.parse::<i64>().map_err(|_| {
                ApiError::param("logit_bias", format!("logit_bias: `{key}` is not a token id."))
            })?;
            let token = token_id("logit_bias", token, vocab)?;
            let bias = number("logit_bias", Some(bias), -100.0..=100.0, 0.0)?;
            list.push(LogitBias { token, bias });
        }
        // `"7"` and `"07"` name the same token: the engine wants each once.
        list.sort_by_key(|entry| entry.token);
        list.dedup_by_key(|entry| entry.token);
        Ok(list)
    }

    /// Stop strings.
    pub fn stops(&self, config: &ServerConfig) -> Result<Arc<[String]>, ApiError> {
        let stops: &[String] = match &self.stop {
            None => &[],
            Some(Stop::One(stop)) => std::slice::from_ref(stop),
            Some(Stop::Many(stops)) => stops,
        };
        if stops.len() > config.max_stops {
            let message = format!("stop holds {} strings; the limit is {}.", stops.len(), config.max_stops);
            return Err(ApiError::param("stop", message));
        }
        if stops.iter().any(String::is_empty) {
            return Err(ApiError::param("stop", "stop must not hold an empty string."));
        }
        if stops.iter().any(|stop| stop.len() > MAX_STOP_BYTES) {
            let message = format!("stop holds a string of over {MAX_STOP_BYTES} bytes.");
            return Err(ApiError::param("stop", message));
        }
        Ok(stops.into())
    }

    /// The client's stop tokens.
    pub fn stop_tokens(&self, vocab: usize) -> Result<Vec<u32>, ApiError> {
        token_ids("stop_token_ids", self.stop_token_ids.as_deref().unwrap_or_default(), vocab)
    }

    /// The client's stop tokens and, unless told to ignore them, the model's own.
    pub fn all_stop_tokens(&self, own: &[u32], vocab: usize) -> Result<Vec<u32>, ApiError> {
        let mut tokens = self.stop_tokens(vocab)?;
        if !self.ignore_eos.unwrap_or(false) {
            tokens.extend_from_slice(own);
        }
        Ok(tokens)
    }

    /// Number of choices.
    pub fn choices(&self, config: &ServerConfig) -> Result<usize, ApiError> {
        Ok(integer("n", self.n, 1..=config.max_choices as i64)?.unwrap_or(1) as usize)
    }

    /// Tier and urgency of a request of this caller's.
    pub fn urgency(&self, caller: &Caller) -> Result<(Tier, Urgency), ApiError> {
        let tier = Tier::parse(self.service_tier.as_deref())?;
        Ok((tier, Urgency { priority: tier.priority(self.priority), deadline: caller.deadline }))
    }

    /// Whether the answer is streamed.
    pub fn stream(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    /// Whether the stream ends with usage.
    pub fn include_usage(&self) -> bool {
        self.stream_options.as_ref().and_then(|options| options.include_usage).unwrap_or(false)
    }
}

/// A token count, at least `least`.
pub(crate) fn count(name: &str, value: Option<i64>, least: i64) -> Result<Option<usize>, ApiError> {
    Ok(integer(name, value, least..=MAX_COUNT)?.map(|value| value as usize))
}

/// An integer within `range`.
pub(crate) fn integer(
    name: &str,
    value: Option<i64>,
    range: RangeInclusive<i64>,
) -> Result<Option<i64>, ApiError> {
    match value {
        Some(value) if !range.contains(&value) => Err(ApiError::param(
            name,
            format!("{name} is {value}; it must be from {} to {}.", range.start(), range.end()),
        )),
        value => Ok(value),
    }
}

/// A number within `range`; NaN is in none.
pub(crate) fn number(
    name: &str,
    value: Option<f64>,
    range: RangeInclusive<f64>,
    default: f32,
) -> Result<f32, ApiError> {
    match value {
        None => Ok(default),
        Some(value) if range.contains(&value) => Ok(value as f32),
        Some(value) => Err(ApiError::param(
            name,
            format!("{name} is {value}; it must be from {} to {}.", range.start(), range.end()),
        )),
    }
}

/// Token ids, each within the vocabulary, not too many to search at every token.
pub(crate) fn token_ids(name: &str, tokens: &[i64], vocab: usize) -> Result<Vec<u32>, ApiError> {
    if tokens.len() > MAX_TOKEN_LIST {
        return Err(ApiError::param(name, format!("{name} has over {MAX_TOKEN_LIST} entries.")));
    }
    tokens.iter().map(|&token| token_id(name, token, vocab)).collect()
}

/// A token id within the vocabulary.
pub(crate) fn token_id(name: &str, token: i64, vocab: usize) -> Result<u32, ApiError> {
    u32::try_from(token).ok().filter(|&id| (id as usize) < vocab).ok_or_else(|| {
        ApiError::param(name, format!("{name}: {token} is outside the vocabulary of {vocab} tokens."))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body;

    fn fields(text: &str) -> CommonFields {
        body::parse(text.as_bytes()).unwrap()
    }

    fn refused(text: &str) -> String {
        let config = ServerConfig::new("m");
        let checked = body::parse::<CommonFields>(text.as_bytes()).and_then(|fields| {
            fields.sampling(100)?;
            fields.stops(&config)?;
            fields.stop_tokens(100)?;
            fields.choices(&config)
        });
        let error = checked.expect_err(text);
        assert_eq!(error.status, 400, "{text}");
        error.param.unwrap_or_default()
    }

    #[test]
    fn numbers_outside_their_range_are_refused_by_name() {
        for (text, param) in [
            (r#"{"temperature": -0.1}"#, "temperature"),
            (r#"{"temperature": 2.1}"#, "temperature"),
            (r#"{"temperature": "hot"}"#, "temperature"),
            (r#"{"top_p": 1.5}"#, "top_p"),
            (r#"{"top_k": -2}"#, "top_k"),
            (r#"{"top_k": 1.5}"#, "top_k"),
            (r#"{"min_p": -1}"#, "min_p"),
            (r#"{"presence_penalty": 3}"#, "presence_penalty"),
            (r#"{"frequency_penalty": -3}"#, "frequency_penalty"),
            (r#"{"repetition_penalty": 0}"#, "repetition_penalty"),
            (r#"{"logit_bias": {"a": 1}}"#, "logit_bias"),
            (r#"{"logit_bias": {"100": 1}}"#, "logit_bias"),
            (r#"{"logit_bias": {"1": 101}}"#, "logit_bias"),
            (r#"{"logit_bias": [1]}"#, "logit_bias"),
            (r#"{"stop_token_ids": [-1]}"#, "stop_token_ids"),
            (r#"{"stop": [""]}"#, "stop"),
            (r#"{"stop": 7}"#, "stop"),
            (r#"{"n": 0}"#, "n"),
            (r#"{"n": 17}"#, "n"),
            (r#"{"seed": 1e30}"#, "seed"),
            (r#"{"stream": "yes"}"#, "stream"),
        ] {
            assert_eq!(refused(text), param, "{text}");
        }
    }

    #[test]
    fn a_stop_list_over_the_limit_is_refused() {
        let stops: Vec<String> = (0..17).map(|i| format!("s{i}")).collect();
        assert_eq!(refused(&serde_json::json!({ "stop": stops }).to_string()), "stop");
        let config = ServerConfig::new("m");
        let fields = fields(&serde_json::json!({ "stop": stops[..16] }).to_string());
        assert_eq!(fields.stops(&config).unwrap().len(), 16);
    }

    #[test]
    fn nulls_and_unknown_fields_mean_the_defaults() {
        let fields = fields(r#"{"temperature": null, "stop": null, "user": "me", "store": true, "x": {}}"#);
        let sampling = fields.sampling(100).unwrap();
        assert_eq!(SamplingParams { seed: 0, ..sampling }, SamplingParams::default());
        assert!(fields.stops(&ServerConfig::new("m")).unwrap().is_empty());
    }

    #[test]
    fn requests_without_a_seed_differ_in_theirs() {
        let seeds: Vec<u64> = (0..4).map(|_| fields("{}").sampling(1).unwrap().seed).collect();
        assert!(seeds.iter().any(|&seed| seed != seeds[0]));
        assert_eq!(fields(r#"{"seed": 7}"#).sampling(1).unwrap().seed, 7);
    }

    #[test]
    fn biases_of_one_token_are_given_once() {
        let sampling = fields(r#"{"logit_bias": {"7": 1, "07": 2, "3": -100}}"#).sampling(100).unwrap();
        assert_eq!(sampling.logit_bias.iter().map(|entry| entry.token).collect::<Vec<_>>(), [3, 7]);
    }
}
