//! `POST /infill` as llama.cpp's editor clients call it: fill the hole between two texts.
//!
//! Fields: github.com/ggml-org/llama.cpp, tools/server/README.md, "POST /infill".

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::response::{IntoResponse, Response};
use rudder_engine::Usage;
use rudder_text::{Infill, Text};
use serde::{Deserialize, Serialize};

use crate::generate::{Completion, Delta, End, EndReason, Running};
use crate::openai::ApiError;
use crate::openai::params::{self, CommonFields};
use crate::prompt::off_thread_if_large;
use crate::session::Caller;
use crate::sse::{self, Events};
use crate::{Server, body};

/// The fields that only this dialect has.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct InfillFields {
    input_prefix: Option<String>,
    input_suffix: Option<String>,
    input_extra: Option<Vec<Extra>>,
    prompt: Option<String>,
    n_predict: Option<i64>,
    repeat_penalty: Option<f64>,
}

#[derive(Debug, Deserialize)]
struct Extra {
    #[serde(default)]
    filename: String,
    text: String,
}

/// Fills one hole.
pub(crate) async fn create(
    State(server): State<Arc<Server>>,
    caller: Caller,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let body = body::bytes(body, &server.config)?;
    let mut common: CommonFields = body::parse(&body)?;
    let fields: InfillFields = body::parse(&body)?;
    editor_defaults(&mut common, &fields);
    let model = server.model_name(common.model.as_deref())?;
    let mut completion = completion(&server, &common, &fields, arrived)?;
    let worker = server.clone();
    let tokens = off_thread_if_large(body.len(), move || encode(worker.generator.text(), fields));
    let tokens = tokens.await?;
    let prompt_tokens = tokens.len();
    completion.prompts = vec![tokens.into()];
    completion.origin = caller.origin(common.prompt_cache_key.as_deref());
    (_, completion.urgency) = common.urgency(&caller)?;
    let running = server.generator.start(&completion)?;
    let writer = Writer { model, stop: completion.stop, prompt_tokens, has_new_line: false };
    if common.stream() {
        return Ok(sse::respond(running, writer, server.config.keep_alive));
    }
    whole(running, writer).await
}

/// llama.cpp's sampling defaults, which its clients rely on.
fn editor_defaults(common: &mut CommonFields, fields: &InfillFields) {
    common.temperature.get_or_insert(0.8);
    common.top_k.get_or_insert(40);
    common.top_p.get_or_insert(0.95);
    common.min_p.get_or_insert(0.05);
    common.repetition_penalty = common.repetition_penalty.or(fields.repeat_penalty);
    // -1, also as an unsigned number, asks for a random seed.
    common.seed = common.seed.filter(|seed| ![-1, i64::from(u32::MAX)].contains(seed));
}

fn completion(
    server: &Server,
    common: &CommonFields,
    fields: &InfillFields,
    arrived: Instant,
) -> Result<Completion, ApiError> {
    let text = server.generator.text();
    let vocab = server.generator.engine().vocab_size();
    let mut completion = Completion { arrived, ..Completion::new(text) };
    completion.sampling = common.sampling(vocab)?;
    // -1 is no limit; 0 only warms the cache.
    let limit = fields.n_predict.or(common.max_tokens).filter(|&limit| limit != -1);
    completion.max_tokens = params::count("n_predict", limit, 0)?;
    completion.stop = common.stops(&server.config)?;
    completion.stop_tokens = common.all_stop_tokens(text.infill_stop_tokens(), vocab)?;
    Ok(completion)
}

/// The hole's prompt; `prompt` is what the user has typed into the hole already.
fn encode(text: &Text, fields: InfillFields) -> Result<Vec<u32>, ApiError> {
    let extra = fields.input_extra.unwrap_or_default();
    let infill = Infill {
        prefix: fields.input_prefix.unwrap_or_default(),
        suffix: fields.input_suffix.unwrap_or_default(),
        middle: fields.prompt.unwrap_or_default(),
        extra: extra.into_iter().map(|Extra { filename, text }| (filename, text)).collect(),
    };
    Ok(text.encode_infill(&infill)?)
}

/// Words the answer, whole or in chunks.
struct Writer {
    model: String,
    stop: Arc<[String]>,
    prompt_tokens: usize,
    has_new_line: bool,
}

#[derive(Serialize)]
struct Chunk<'a> {
    index: usize,
    content: &'a str,
    tokens: [u32; 0],
    stop: bool,
    id_slot: i32,
    tokens_evaluated: usize,
}

#[derive(Serialize)]
struct Final<'a> {
    #[serde(flatten)]
    chunk: Chunk<'a>,
    model: &'a str,
    tokens_predicted: usize,
    tokens_cached: usize,
    truncated: bool,
    has_new_line: bool,
    stop_type: &'static str,
    stopping_word: &'a str,
    timings: Timings,
}

/// Milliseconds and rates.
#[derive(Serialize)]
struct Timings {
    cache_n: usize,
    prompt_n: usize,
    prompt_ms: f64,
    prompt_per_token_ms: f64,
    prompt_per_second: f64,
    predicted_n: usize,
    predicted_ms: f64,
    predicted_per_token_ms: f64,
    predicted_per_second: f64,
}

impl From<&Usage> for Timings {
    fn from(usage: &Usage) -> Self {
        let (prompt_n, predicted_n) =
            (usage.prompt_tokens.saturating_sub(usage.cached_tokens), usage.completion_tokens);
        let (prompt_ms, predicted_ms) = (usage.prefill.as_secs_f64() * 1e3, usage.decode.as_secs_f64() * 1e3);
        let per = |a: f64, b: f64| if b > 0.0 { a / b } else { 0.0 };
        Self {
            cache_n: usage.cached_tokens,
            prompt_n,
            prompt_ms,
            prompt_per_token_ms: per(prompt_ms, prompt_n as f64),
            prompt_per_second: per(prompt_n as f64 * 1e3, prompt_ms),
            predicted_n,
            predicted_ms,
            predicted_per_token_ms: per(predicted_ms, predicted_n as f64),
            predicted_per_second: per(predicted_n as f64 * 1e3, predicted_ms),
        }
    }
}

impl Writer {
    fn chunk<'a>(&self, content: &'a str, stop: bool) -> Chunk<'a> {
        Chunk { index: 0, content, tokens: [], stop, id_slot: -1, tokens_evaluated: self.prompt_tokens }
    }

    fn last<'a>(&'a self, content: &'a str, end: &End) -> Final<'a> {
        let (stop_type, stopping_word) = match &end.reason {
            EndReason::StopToken => ("eos", ""),
            EndReason::StopString(index) => ("word", self.stop.get(*index).map_or("", String::as_str)),
            EndReason::Length => ("limit", ""),
            EndReason::Stopped | EndReason::Failed(_) | EndReason::Expired => ("none", ""),
        };
        Final {
            chunk: self.chunk(content, true),
            model: &self.model,
            tokens_predicted: end.usage.completion_tokens,
            tokens_cached: end.usage.prompt_tokens + end.usage.completion_tokens,
            truncated: false,
            has_new_line: self.has_new_line,
            stop_type,
            stopping_word,
            timings: Timings::from(&end.usage),
        }
    }
}

impl Events for Writer {
    fn begin(&mut self, _running: &Running, _out: &mut Vec<u8>) {}

    fn delta(&mut self, delta: &Delta, out: &mut Vec<u8>) {
        self.has_new_line |= delta.text.contains('\n');
        match &delta.end {
            None => sse::event(&self.chunk(&delta.text, false), out),
            // The last event has the figures and, as llama.cpp has it, no text.
            Some(end) => {
                if !delta.text.is_empty() {
                    sse::event(&self.chunk(&delta.text, false), out);
                }
                sse::event(&self.last("", end), out);
            }
        }
    }

    fn end(&mut self, _running: &Running, _out: &mut Vec<u8>) {}
}

async fn whole(mut running: Running, mut writer: Writer) -> Result<Response, ApiError> {
    let answers = running.finish().await?;
    let answer = answers.first().and_then(|delta| delta.end.as_ref().map(|end| (delta, end)));
    let (delta, end) = answer.ok_or_else(|| ApiError::internal("the engine gave no answer"))?;
    writer.has_new_line = delta.text.contains('\n');
    Ok(Json(writer.last(&delta.text, end)).into_response())
}
