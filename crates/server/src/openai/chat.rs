//! `POST /v1/chat/completions`: the request. What is answered is in `chat_answer`.

use std::sync::Arc;
use std::time::Instant;

use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::chat_answer::{ChatEvents, Shape, whole};
use super::error::ApiError;
use super::format::FormatFields;
use super::messages::{self, ChatMessage, conversation};
use super::params::{self, CommonFields};
use super::prediction::Prediction;
use super::tools::{self, ChatTool};
use super::types::Head;
use crate::conversation::{KnownMessage, Turn};
use crate::message_cache::{Dialect, ReadBody};
use crate::session::Caller;
use crate::{Server, body, effort, sse};

/// The fields that only chat has.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ChatFields {
    messages: Option<Vec<ChatMessage>>,
    tools: Option<Vec<ChatTool>>,
    tool_choice: Option<Value>,
    parallel_tool_calls: Option<bool>,
    max_completion_tokens: Option<i64>,
    logprobs: Option<bool>,
    top_logprobs: Option<i64>,
    chat_template_kwargs: Option<Map<String, Value>>,
    reasoning_effort: Option<String>,
    /// As vLLM's clients send it.
    thinking_token_budget: Option<i64>,
    return_token_ids: Option<bool>,
    prediction: Option<Prediction>,
}

/// Answers one conversation.
pub(crate) async fn create(
    State(server): State<Arc<Server>>,
    caller: Caller,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let body = body::bytes(body, &server.config)?;
    let read = server.messages.read(Dialect::Chat, &body, messages::add);
    let (known, rest) = ReadBody::parts(read);
    let common: CommonFields = body::parse_rest(&body, rest.as_deref())?;
    let chat: ChatFields = body::parse_rest(&body, rest.as_deref())?;
    let model = common.model.as_deref().ok_or_else(|| ApiError::missing_model(&server.config.model))?;
    let mut head = Head::new("chatcmpl-", server.model_name(Some(model))?);
    let (tier, urgency) = common.urgency(&caller)?;
    head.service_tier = common.service_tier.is_some().then_some(tier.as_str());
    let format: FormatFields = body::parse_rest(&body, rest.as_deref())?;
    let mut turn = Turn { answer: format.answer()?, ..turn(&server, &common, chat, known, arrived)? };
    turn.origin = caller.origin(common.prompt_cache_key.as_deref());
    turn.urgency = urgency;
    let shape = Shape {
        head,
        choices: turn.n,
        logprobs: turn.sampling.logprobs.is_some().then(|| server.generator.text().clone()),
        token_ids: turn.token_ids,
        include_usage: common.include_usage(),
    };
    server.generator.prepared("read", arrived.elapsed());
    let running = server.start_turn(turn).await?;
    if common.stream() {
        return Ok(sse::respond(running, ChatEvents::new(shape), server.config.keep_alive));
    }
    whole(running, &shape).await
}

fn turn(
    server: &Server,
    common: &CommonFields,
    chat: ChatFields,
    known: Option<Vec<KnownMessage>>,
    arrived: Instant,
) -> Result<Turn, ApiError> {
    let vocab = server.generator.engine().vocab_size();
    let logprobs = logprobs(&chat)?;
    let mut turn = match (known, chat.messages) {
        (Some(known), _) => Turn::new(known),
        (None, Some(messages)) => Turn::new(conversation(messages)?),
        (None, None) => return Err(ApiError::param("messages", "messages is missing.")),
    };
    turn.tools = tools::tools(chat.tools.unwrap_or_default())?;
    (turn.tool_choice, turn.allowed_tools) = tools::tool_choice(chat.tool_choice, &turn.tools)?;
    turn.parallel_tool_calls = chat.parallel_tool_calls.unwrap_or(true);
    turn.template_args = chat.chat_template_kwargs.unwrap_or_default();
    effort::tell(chat.reasoning_effort.as_deref(), &mut turn.template_args);
    turn.n = common.choices(&server.config)?;
    turn.sampling = common.sampling(vocab)?;
    turn.sampling.logprobs = logprobs;
    let limit = params::count("max_completion_tokens", chat.max_completion_tokens, 1)?;
    turn.max_tokens = limit.or(params::count("max_tokens", common.max_tokens, 1)?);
    turn.reasoning_budget = params::count("thinking_token_budget", chat.thinking_token_budget, 0)?;
    turn.stop = common.stops(&server.config)?;
    turn.stop_tokens = common.stop_tokens(vocab)?;
    turn.ignore_eos = common.ignore_eos.unwrap_or(false);
    turn.token_ids = chat.return_token_ids.unwrap_or(false);
    turn.prediction = chat.prediction.map(Prediction::text).transpose()?.unwrap_or_default();
    turn.arrived = arrived;
    Ok(turn)
}

fn logprobs(chat: &ChatFields) -> Result<Option<u32>, ApiError> {
    let top = params::integer("top_logprobs", chat.top_logprobs, 0..=20)?;
    match (chat.logprobs.unwrap_or(false), top) {
        (true, top) => Ok(Some(top.unwrap_or(0) as u32)),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => Err(ApiError::param("top_logprobs", "top_logprobs needs logprobs to be true.")),
    }
}
