//! `POST /v1/completions`: text or tokens continued, or the hole before a `suffix` filled.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::response::{IntoResponse, Response};
use rudder_text::{Infill, Text};
use serde::{Deserialize, Serialize};

use super::error::ApiError;
use super::format::FormatFields;
use super::logprobs::{ColumnLogprobs, Offset};
use super::params::{self, CommonFields};
use super::types::{Envelope, Head};
use crate::generate::{Completion, Delta, Running};
use crate::prompt::off_thread_if_large;
use crate::session::Caller;
use crate::sse::{self, Events};
use crate::timing::Timing;
use crate::{Server, body};

const OBJECT: &str = "text_completion";
/// As OpenAI has it.
const DEFAULT_MAX_TOKENS: usize = 16;
/// Most prompts of a request.
const MAX_PROMPTS: usize = 128;

/// The fields that only completions have.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct CompletionFields {
    prompt: Option<Prompt>,
    suffix: Option<String>,
    echo: Option<bool>,
    best_of: Option<i64>,
    logprobs: Option<i64>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged, expecting = "expected a string, an array of strings, token ids, or an array of token ids")]
enum Prompt {
    Text(String),
    Tokens(Vec<i64>),
    Texts(Vec<String>),
    TokenLists(Vec<Vec<i64>>),
}

/// One prompt.
enum Input {
    Text(String),
    Tokens(Vec<u32>),
}

/// Answers every prompt `n` times.
pub(crate) async fn create(
    State(server): State<Arc<Server>>,
    caller: Caller,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let body = body::bytes(body, &server.config)?;
    let common: CommonFields = body::parse(&body)?;
    let mut fields: CompletionFields = body::parse(&body)?;
    let format: FormatFields = body::parse(&body)?;
    let head = Head::new("cmpl-", server.model_name(common.model.as_deref())?);
    let inputs = inputs(fields.prompt.take(), server.generator.engine().vocab_size())?;
    let suffix = fields.suffix.take().filter(|suffix| !suffix.is_empty());
    let echo = fields.echo.unwrap_or(false);
    check_combination(&inputs, suffix.is_some(), echo)?;
    let mut completion = completion(&server, &common, &fields, suffix.is_some(), arrived)?;
    completion.grammar = server.compile_grammar(format.answer()?.spec(), "response_format").await?;
    let worker = server.clone();
    let prompts = off_thread_if_large(body.len(), move || {
        let text = worker.generator.text();
        inputs
            .into_iter()
            .map(|input| encode(text, input, suffix.as_deref(), echo))
            .collect::<Result<Vec<_>, _>>()
    });
    let (prompts, echoed): (Vec<Arc<[u32]>>, Vec<String>) =
        prompts.await?.into_iter().map(|Encoded { tokens, echoed }| (tokens.into(), echoed)).unzip();
    completion.prompts = prompts;
    completion.origin = caller.origin(common.prompt_cache_key.as_deref());
    (_, completion.urgency) = common.urgency(&caller)?;
    let running = server.generator.start(&completion)?;
    let writer = Writer {
        head,
        columns: completion.sampling.logprobs.map(|_| server.generator.text().clone()),
        choices: (0..running.choices())
            .map(|index| ChoiceState {
                echo: Some(echoed[index / completion.n].clone()).filter(|echo| !echo.is_empty()),
                echo_columns: completion.prompt_logprobs,
                offset: Offset::default(),
            })
            .collect(),
        include_usage: common.include_usage(),
    };
    if common.stream() {
        return Ok(sse::respond(running, writer, server.config.keep_alive));
    }
    whole(running, writer).await
}

fn inputs(prompt: Option<Prompt>, vocab: usize) -> Result<Vec<Input>, ApiError> {
    let tokens = |tokens: Vec<i64>| {
        let ids = tokens.into_iter().map(|token| params::token_id("prompt", token, vocab));
        ids.collect::<Result<Vec<u32>, _>>().map(Input::Tokens)
    };
    let inputs: Vec<Input> = match prompt {
        None => return Err(ApiError::param("prompt", "prompt is missing.")),
        Some(Prompt::Text(text)) => vec![Input::Text(text)],
        Some(Prompt::Texts(texts)) => texts.into_iter().map(Input::Text).collect(),
        // An empty array is none of anything.
        Some(Prompt::Tokens(ids)) if ids.is_empty() => Vec::new(),
        Some(Prompt::Tokens(ids)) => vec![tokens(ids)?],
        Some(Prompt::TokenLists(lists)) => lists.into_iter().map(tokens).collect::<Result<_, _>>()?,
    };
    if inputs.is_empty() || inputs.len() > MAX_PROMPTS {
        let message = format!("prompt holds {} prompts; send 1 to {MAX_PROMPTS}.", inputs.len());
        return Err(ApiError::param("prompt", message));
    }
    Ok(inputs)
}

fn check_combination(inputs: &[Input], infill: bool, echo: bool) -> Result<(), ApiError> {
    if infill && echo {
        return Err(ApiError::param("echo", "echo cannot be had together with suffix."));
    }
    if infill && inputs.iter().any(|input| matches!(input, Input::Tokens(_))) {
        return Err(ApiError::param("suffix", "suffix needs the prompt as text, not as tokens."));
    }
    Ok(())
}

fn completion(
    server: &Server,
    common: &CommonFields,
    fields: &CompletionFields,
    infill: bool,
    arrived: Instant,
) -> Result<Completion, ApiError> {
    let text = server.generator.text();
    let vocab = server.generator.engine().vocab_size();
    let n = common.choices(&server.config)?;
    if fields.best_of.is_some_and(|best_of| best_of != n as i64) {
        return Err(ApiError::param("best_of", "best_of is only supported equal to n; leave it out."));
    }
    let logprobs = params::integer("logprobs", fields.logprobs, 0..=20)?.map(|top| top as u32);
    let mut completion = Completion { n, arrived, ..Completion::new(text) };
    completion.sampling = common.sampling(vocab)?;
    completion.sampling.logprobs = logprobs;
    completion.prompt_logprobs = logprobs.is_some() && fields.echo.unwrap_or(false);
    let max_tokens = params::count("max_tokens", common.max_tokens, 0)?;
    completion.max_tokens = Some(max_tokens.unwrap_or(DEFAULT_MAX_TOKENS));
    completion.stop = common.stops(&server.config)?;
    let own_stops = if infill { text.infill_stop_tokens() } else { text.stop_tokens() };
    completion.stop_tokens = common.all_stop_tokens(own_stops, vocab)?;
    Ok(completion)
}

/// A prompt in tokens, and the text to repeat before its answer.
struct Encoded {
    tokens: Vec<u32>,
    echoed: String,
}

fn encode(text: &Text, input: Input, suffix: Option<&str>, echo: bool) -> Result<Encoded, ApiError> {
    match (input, suffix) {
        (Input::Text(prefix), Some(suffix)) => {
            let infill = Infill { prefix, suffix: suffix.to_owned(), ..Infill::default() };
            let tokens = text.encode_infill(&infill).map_err(|error| ApiError::from(error).at("suffix"))?;
            Ok(Encoded { tokens, echoed: String::new() })
        }
        (Input::Text(prompt), None) => {
            let tokens = text.encode(&prompt, true, true)?;
            Ok(Encoded { tokens, echoed: if echo { prompt } else { String::new() } })
        }
        (Input::Tokens(tokens), _) => {
            let echoed = if echo { text.decode(&tokens, false) } else { String::new() };
            Ok(Encoded { tokens, echoed })
        }
    }
}

/// Words the answers, whole or in chunks.
struct Writer {
    head: Head,
    /// Set when log-probabilities are asked for.
    columns: Option<Text>,
    choices: Vec<ChoiceState>,
    include_usage: bool,
}

struct ChoiceState {
    /// The prompt, until it has been repeated.
    echo: Option<String>,
    /// The prompt's log-probabilities come with it: wait for them.
    echo_columns: bool,
    offset: Offset,
}

#[derive(Serialize)]
struct Choice {
    index: usize,
    text: String,
    logprobs: Option<ColumnLogprobs>,
    finish_reason: Option<&'static str>,
}

impl Writer {
    fn choice(&mut self, delta: &Delta) -> Choice {
        let state = &mut self.choices[delta.index];
        let mut text = state.echo.take().unwrap_or_default();
        let echoed = text.len();
        text.push_str(&delta.text);
        let logprobs = self.columns.as_ref().map(|model| {
            let mut columns = ColumnLogprobs::default();
            if !delta.prompt.is_empty() {
                columns.extend_prompt(model, &delta.prompt, &text[..echoed], &mut state.offset);
            }
            columns.extend(model, &delta.tokens, &mut state.offset);
            columns
        });
        let finish_reason = delta.end.as_ref().map(|end| end.reason.as_str());
        Choice { index: delta.index, text, logprobs, finish_reason }
    }
}

impl Events for Writer {
    fn begin(&mut self, _running: &Running, out: &mut Vec<u8>) {
        for index in 0..self.choices.len() {
            let state = &self.choices[index];
            if state.echo.is_some() && !state.echo_columns {
                self.delta(&Delta { index, ..Delta::default() }, out);
            }
        }
    }

    fn delta(&mut self, delta: &Delta, out: &mut Vec<u8>) {
        let choice = self.choice(delta);
        let usage = self.include_usage.then_some(None);
        sse::event(&Envelope::new(&self.head, OBJECT, &[choice], usage), out);
    }

    fn end(&mut self, running: &Running, out: &mut Vec<u8>) {
        if self.include_usage {
            let chunk = Envelope::<()>::new(&self.head, OBJECT, &[], None);
            sse::event(&chunk.with_totals(running.totals()), out);
        }
        out.extend_from_slice(sse::DONE);
    }
}

async fn whole(mut running: Running, mut writer: Writer) -> Result<Response, ApiError> {
    let answers = running.finish().await?;
    let choices: Vec<Choice> = answers.iter().map(|answer| writer.choice(answer)).collect();
    let totals = running.totals();
    let envelope = Envelope::new(&writer.head, OBJECT, &choices, None).with_totals(totals);
    Ok(Timing::from(totals).tell(Json(envelope).into_response()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(prompt: &str) -> Result<usize, ApiError> {
        let fields: CompletionFields = body::parse(format!(r#"{{"prompt": {prompt}}}"#).as_bytes())?;
        inputs(fields.prompt, 10).map(|inputs| inputs.len())
    }

    #[test]
    fn a_prompt_comes_in_four_forms() {
        for (prompt, count) in [("\"a\"", 1), ("[\"a\", \"b\"]", 2), ("[1, 2, 3]", 1), ("[[1], [2, 3]]", 2)] {
            assert_eq!(check(prompt).unwrap(), count, "{prompt}");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for prompt in ["null", "[]", "7", "{}", "[10]", "[-1]", "[[1], \"a\"]", "[[10]]", "[1.5]"] {
            let error = check(prompt).expect_err(prompt);
            assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some("prompt")), "{prompt}");
        }
    }
}
