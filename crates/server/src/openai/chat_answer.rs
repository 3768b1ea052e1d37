//! Chat's answers: whole, and as a stream of chunks.

use axum::Json;
use axum::response::{IntoResponse, Response};
use rudder_engine::Token;
use rudder_text::Text;
use serde::Serialize;

use super::error::ApiError;
use super::logprobs::ChatLogprobs;
use super::types::{Envelope, Head};
use crate::conversation::{Message, Piece, ToolCall};
use crate::generate::{Delta, End, EndReason, Running};
use crate::sse::{self, Events};
use crate::timing::Timing;

const OBJECT: &str = "chat.completion";
const CHUNK: &str = "chat.completion.chunk";

/// What an answer carries besides its text.
pub(crate) struct Shape {
    pub head: Head,
    pub choices: usize,
    /// With log-probabilities asked for, what words their tokens.
    pub logprobs: Option<Text>,
    pub token_ids: bool,
    /// End a stream with usage.
    pub include_usage: bool,
}

impl Shape {
    fn logprobs(&self, tokens: &[Token]) -> Option<ChatLogprobs> {
        self.logprobs.as_ref().map(|text| ChatLogprobs::new(text, tokens))
    }

    fn token_ids(&self, tokens: &[Token]) -> Option<Vec<u32>> {
        self.token_ids.then(|| tokens.iter().map(|token| token.id).collect())
    }
}

fn finish_reason(end: &End, called: bool) -> &'static str {
    match &end.reason {
        EndReason::StopToken if called => "tool_calls",
        reason => reason.as_str(),
    }
}

#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    message: Answer<'a>,
    logprobs: Option<ChatLogprobs>,
    finish_reason: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

#[derive(Serialize)]
struct Answer<'a> {
    role: &'static str,
    /// Null where tools were called and nothing was said.
    content: Option<&'a str>,
    refusal: Option<()>,
    annotations: [(); 0],
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<Call<'a>>,
}

/// A call, or in a stream a part of one.
#[derive(Default, Serialize)]
struct Call<'a> {
    /// In a stream: which call.
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    r#type: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    function: Option<FunctionCall<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    custom: Option<CustomCall<'a>>,
}

#[derive(Serialize)]
struct FunctionCall<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    arguments: &'a str,
}

#[derive(Serialize)]
struct CustomCall<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    input: &'a str,
}

impl<'a> Call<'a> {
    /// A call that has an id and a name.
    fn named(id: &'a str, name: &'a str, input: &'a str, custom: bool) -> Self {
        Self { id: Some(id), r#type: Some(kind(custom)), ..Self::part(Some(name), input, custom) }
    }

    fn part(name: Option<&'a str>, input: &'a str, custom: bool) -> Self {
        if custom {
            return Self { custom: Some(CustomCall { name, input }), ..Self::default() };
        }
        Self { function: Some(FunctionCall { name, arguments: input }), ..Self::default() }
    }
}

fn kind(custom: bool) -> &'static str {
    if custom { "custom" } else { "function" }
}

impl<'a> From<&'a Message> for Answer<'a> {
    fn from(message: &'a Message) -> Self {
        let said = !message.text.is_empty() || message.calls.is_empty();
        let calls = message.calls.iter();
        Self {
            role: "assistant",
            content: said.then_some(&message.text),
            refusal: None,
            annotations: [],
            reasoning_content: message.reasoning.as_deref(),
            tool_calls: calls
                .map(|ToolCall { id, name, input, custom }| Call::named(id, name, input, *custom))
                .collect(),
        }
    }
}

/// The whole answer.
pub(crate) async fn whole(mut running: Running, shape: &Shape) -> Result<Response, ApiError> {
    let deltas = running.finish().await?;
    let answers = running.answers().zip(&deltas);
    let choices: Vec<Choice> = answers
        .map(|(message, delta)| Choice {
            index: delta.index,
            message: message.into(),
            logprobs: shape.logprobs(&delta.tokens),
            finish_reason: delta
                .end
                .as_ref()
                .map_or("stop", |end| finish_reason(end, !message.calls.is_empty())),
            token_ids: shape.token_ids(&delta.tokens),
        })
        .collect();
    let totals = running.totals();
    let prompt = shape.token_ids.then(|| running.prompt(0));
    let envelope = Envelope::new(&shape.head, OBJECT, &choices, None).with_totals(totals).with_prompt(prompt);
    Ok(Timing::from(totals).tell(Json(envelope).into_response()))
}

/// A stream's events: who speaks, what is said, why it ended, what it cost, `[DONE]`.
pub(crate) struct ChatEvents {
    shape: Shape,
    /// Of each choice: its calls so far, and whether the last is a custom one.
    calls: Vec<(usize, bool)>,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: usize,
    delta: ChunkDelta<'a>,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

#[derive(Default, Serialize)]
struct ChunkDelta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<[Call<'a>; 1]>,
}

impl ChatEvents {
    /// Events of the given shape.
    pub fn new(shape: Shape) -> Self {
        Self { calls: vec![(0, false); shape.choices], shape }
    }

    fn chunk(&self, choice: ChunkChoice<'_>, out: &mut Vec<u8>) {
        let usage = self.shape.include_usage.then_some(None);
        sse::event(&Envelope::new(&self.shape.head, CHUNK, &[choice], usage), out);
    }

    /// A chunk for a piece; the end of a call has none, as the next thing tells of it.
    fn piece<'a>(&mut self, index: usize, piece: &'a Piece) -> Option<ChunkDelta<'a>> {
        let (calls, custom) = &mut self.calls[index];
        let call = match piece {
            Piece::Text(text) => return Some(ChunkDelta { content: Some(text), ..ChunkDelta::default() }),
            Piece::Reasoning(text) => {
                return Some(ChunkDelta { reasoning_content: Some(text), ..ChunkDelta::default() });
            }
            Piece::CallBegin { id, name, custom: is_custom } => {
                *calls += 1;
                *custom = *is_custom;
                Call::named(id, name, "", *custom)
            }
            Piece::CallInput(text) => Call::part(None, text, *custom),
            Piece::CallEnd => return None,
        };
        let call = Call { index: Some(calls.saturating_sub(1)), ..call };
        Some(ChunkDelta { tool_calls: Some([call]), ..ChunkDelta::default() })
    }
}

impl Events for ChatEvents {
    fn begin(&mut self, running: &Running, out: &mut Vec<u8>) {
        for index in 0..self.shape.choices {
            let delta = ChunkDelta { role: Some("assistant"), content: Some(""), ..ChunkDelta::default() };
            let choice = ChunkChoice { index, delta, logprobs: None, finish_reason: None, token_ids: None };
            let usage = self.shape.include_usage.then_some(None);
            let prompt = self.shape.token_ids.then(|| running.prompt(0));
            sse::event(&Envelope::new(&self.shape.head, CHUNK, &[choice], usage).with_prompt(prompt), out);
        }
    }

    fn delta(&mut self, delta: &Delta, out: &mut Vec<u8>) {
        let index = delta.index;
        // Tokens go with the first chunk; where they make no text yet, in a chunk of their own.
        let mut logprobs = self.shape.logprobs(&delta.tokens);
        let mut token_ids = self.shape.token_ids(&delta.tokens);
        for piece in &delta.pieces {
            let Some(delta) = self.piece(index, piece) else { continue };
            let (logprobs, token_ids) = (logprobs.take(), token_ids.take());
            self.chunk(ChunkChoice { index, delta, logprobs, finish_reason: None, token_ids }, out);
        }
        if !delta.tokens.is_empty() && (logprobs.is_some() || token_ids.is_some()) {
            let delta = ChunkDelta::default();
            self.chunk(ChunkChoice { index, delta, logprobs, finish_reason: None, token_ids }, out);
        }
        if let Some(end) = &delta.end {
            let finish_reason = Some(finish_reason(end, self.calls[index].0 > 0));
            let delta = ChunkDelta::default();
            self.chunk(ChunkChoice { index, delta, logprobs: None, finish_reason, token_ids: None }, out);
        }
    }

    fn end(&mut self, running: &Running, out: &mut Vec<u8>) {
        if self.shape.include_usage {
            let chunk = Envelope::<()>::new(&self.shape.head, CHUNK, &[], None);
            sse::event(&chunk.with_totals(running.totals()), out);
        }
        out.extend_from_slice(sse::DONE);
    }
}
