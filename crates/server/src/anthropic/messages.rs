//! `POST /v1/messages` and `/v1/messages/count_tokens`.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::blocks::{BlockEvent, Blocks, ContentBlock, fold};
use super::types::MessagesFields;
use super::{error, request};
use crate::admission::random_id;
use crate::conversation::{Piece, Turn};
use crate::generate::{Delta, EndReason, Running, Totals};
use crate::message_cache::ReadBody;
use crate::openai::ApiError;
use crate::openai::params::CommonFields;
use crate::session::Caller;
use crate::sse::{self, Events};
use crate::timing::Timing;
use crate::{Server, body, session};

/// Answers one conversation.
pub(crate) async fn create(
    State(server): State<Arc<Server>>,
    caller: Caller,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let body = body::bytes(body, &server.config)?;
    let (known, rest) = ReadBody::parts(request::known(&server, &body));
    let common: CommonFields = body::parse_rest(&body, rest.as_deref())?;
    let fields: MessagesFields = body::parse_rest(&body, rest.as_deref())?;
    let head = Head { id: random_id("msg_"), model: model(&server, &common)? };
    if common.max_tokens.is_none() {
        return Err(ApiError::param("max_tokens", "max_tokens is missing: say how long the answer may be."));
    }
    let stream = common.stream();
    let omit_thinking =
        fields.thinking.as_ref().is_some_and(|thinking| thinking.display.as_deref() == Some("omitted"));
    let session = fields.metadata.as_ref().and_then(session::in_metadata);
    let (_, urgency) = common.urgency(&caller)?;
    let mut turn = request::turn(&server, common, fields, known, arrived)?;
    turn.origin = caller.origin(session.as_deref());
    turn.urgency = urgency;
    let answer = Answer {
        blocks: Blocks::new(omit_thinking),
        head,
        calls: false,
        stops: turn.stop.clone(),
        max_tokens: turn.max_tokens,
        stop: Stop::default(),
    };
    server.generator.prepared("read", arrived.elapsed());
    let running = server.start_turn(turn).await?;
    if stream {
        let keep_alive = server.config.keep_alive;
        let events = MessageEvents { server, answer, events: Vec::new() };
        return Ok(sse::respond(running, events, keep_alive));
    }
    whole(&server, running, answer).await
}

fn model(server: &Server, common: &CommonFields) -> Result<String, ApiError> {
    let asked = common.model.as_deref();
    server.model_name(Some(asked.ok_or_else(|| ApiError::missing_model(&server.config.model))?))
}

#[derive(Serialize)]
pub(crate) struct TokenCount {
    input_tokens: usize,
}

/// Counts the tokens of a prompt.
pub(crate) async fn count_tokens(
    State(server): State<Arc<Server>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<TokenCount>, ApiError> {
    let body = body::bytes(body, &server.config)?;
    let (known, rest) = ReadBody::parts(request::known(&server, &body));
    let common: CommonFields = body::parse_rest(&body, rest.as_deref())?;
    let fields: MessagesFields = body::parse_rest(&body, rest.as_deref())?;
    model(&server, &common)?;
    let turn: Turn = request::turn(&server, common, fields, known, Instant::now())?;
    Ok(Json(TokenCount { input_tokens: server.count_tokens(turn).await? }))
}

/// `GET` and `HEAD /api/hello`: whether there is a server.
pub(crate) async fn hello() -> Json<serde_json::Value> {
    Json(serde_json::json!({"message": "hello"}))
}

/// What is the same in every event of an answer.
struct Head {
    id: String,
    model: String,
}

/// A message; in a stream first without content.
#[derive(Serialize)]
struct MessageBody<'a> {
    id: &'a str,
    r#type: &'static str,
    role: &'static str,
    model: &'a str,
    content: Vec<ContentBlock>,
    #[serde(flatten)]
    stop: &'a Stop,
    usage: Usage,
}

impl<'a> MessageBody<'a> {
    fn new(head: &'a Head, content: Vec<ContentBlock>, stop: &'a Stop, usage: Usage) -> Self {
        Self { id: &head.id, r#type: "message", role: "assistant", model: &head.model, content, stop, usage }
    }
}

/// Why an answer ended; all null while it runs.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
struct Stop {
    stop_reason: Option<&'static str>,
    stop_sequence: Option<String>,
    stop_details: Option<()>,
    container: Option<()>,
}

/// Token counts. Those found in the prefix cache are not among the input tokens.
#[derive(Debug, Serialize)]
struct Usage {
    input_tokens: usize,
    cache_creation_input_tokens: usize,
    cache_read_input_tokens: usize,
    cache_creation: Option<()>,
    output_tokens: usize,
    output_tokens_details: OutputTokensDetails,
    server_tool_use: Option<()>,
    service_tier: &'static str,
    inference_geo: Option<()>,
}

#[derive(Debug, Serialize)]
struct OutputTokensDetails {
    thinking_tokens: usize,
}

impl From<Totals> for Usage {
    fn from(totals: Totals) -> Self {
        Self {
            input_tokens: totals.prompt_tokens.saturating_sub(totals.cached_tokens),
            cache_creation_input_tokens: 0,
            cache_read_input_tokens: totals.cached_tokens,
            cache_creation: None,
            output_tokens: totals.completion_tokens,
            output_tokens_details: OutputTokensDetails { thinking_tokens: totals.reasoning_tokens },
            server_tool_use: None,
            service_tier: "standard",
            inference_geo: None,
        }
    }
}

/// An answer as it comes together.
struct Answer {
    head: Head,
    blocks: Blocks,
    /// Whether a tool was called.
    calls: bool,
    /// The request's stop sequences and limit.
    stops: Arc<[String]>,
    max_tokens: Option<usize>,
    stop: Stop,
}

impl Answer {
    /// Takes what is new; appends what that does to the blocks.
    fn push(&mut self, delta: &Delta, server: &Server, events: &mut Vec<BlockEvent>) {
        for piece in &delta.pieces {
            self.calls |= *piece == Piece::CallEnd;
            self.blocks.push(piece, &server.responses.seal, events);
        }
        if let Some(end) = &delta.end {
            self.stop = self.stop(&end.reason, end.usage.completion_tokens);
        }
    }

    fn stop(&self, reason: &EndReason, tokens: usize) -> Stop {
        let (reason, sequence) = match reason {
            EndReason::StopString(index) => ("stop_sequence", self.stops.get(*index).cloned()),
            EndReason::Length if self.max_tokens.is_some_and(|limit| tokens < limit) => {
                ("model_context_window_exceeded", None)
            }
            EndReason::Length => ("max_tokens", None),
            _ if self.calls => ("tool_use", None),
            _ => ("end_turn", None),
        };
        Stop { stop_reason: Some(reason), stop_sequence: sequence, ..Stop::default() }
    }
}

async fn whole(server: &Server, mut running: Running, mut answer: Answer) -> Result<Response, ApiError> {
    let mut events = Vec::new();
    for delta in running.finish().await? {
        answer.push(&delta, server, &mut events);
    }
    answer.blocks.finish(&server.responses.seal, &mut events);
    let totals = running.totals();
    let body = MessageBody::new(&answer.head, fold(events), &answer.stop, totals.into());
    Ok(Timing::from(totals).tell(Json(body).into_response()))
}

/// A stream's events: the message without content, its blocks, why it ended and what it cost.
struct MessageEvents {
    server: Arc<Server>,
    answer: Answer,
    events: Vec<BlockEvent>,
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum MessageEvent<'a> {
    MessageStart { message: MessageBody<'a> },
    MessageDelta { delta: &'a Stop, usage: Usage },
    MessageStop,
    Ping,
}

impl MessageEvents {
    fn write_blocks(&mut self, out: &mut Vec<u8>) {
        for event in self.events.drain(..) {
            sse::named_event(event.name(), &event, out);
        }
    }
}

impl Events for MessageEvents {
    fn begin(&mut self, running: &Running, out: &mut Vec<u8>) {
        let totals = running.totals();
        let Answer { head, stop, .. } = &self.answer;
        let message = MessageBody::new(head, Vec::new(), stop, totals.into());
        sse::named_event("message_start", &MessageEvent::MessageStart { message }, out);
    }

    fn delta(&mut self, delta: &Delta, out: &mut Vec<u8>) {
        self.answer.push(delta, &self.server, &mut self.events);
        self.write_blocks(out);
    }

    fn end(&mut self, running: &Running, out: &mut Vec<u8>) {
        self.answer.blocks.finish(&self.server.responses.seal, &mut self.events);
        self.write_blocks(out);
        let event = MessageEvent::MessageDelta { delta: &self.answer.stop, usage: running.totals().into() };
        sse::named_event("message_delta", &event, out);
        sse::named_event("message_stop", &MessageEvent::MessageStop, out);
    }

    fn keep_alive(&mut self, out: &mut Vec<u8>) {
        sse::named_event("ping", &MessageEvent::Ping, out);
    }

    fn failed(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        sse::named_event("error", &error::body(error.status, &error.message, None), out);
    }
}
