//! `POST /v1/chat/completions`.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::error::ApiError;
use super::logprobs::ChatLogprobs;
use super::params::{self, CommonFields};
use super::types::{Envelope, Head, UsageBody};
use crate::generate::{Completion, Delta, Running};
use crate::openai::messages::{Message, template_messages};
use crate::prompt::{ChatPrompt, off_thread_if_large};
use crate::sse::{self, Events};
use crate::{Server, body};
use rudder_text::Text;

const OBJECT: &str = "chat.completion";
const CHUNK: &str = "chat.completion.chunk";

/// The fields that only chat has.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ChatFields {
    messages: Option<Vec<Message>>,
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
    max_completion_tokens: Option<i64>,
    logprobs: Option<bool>,
    top_logprobs: Option<i64>,
    chat_template_kwargs: Option<Map<String, Value>>,
    response_format: Option<ResponseFormat>,
}

#[derive(Debug, Deserialize)]
struct ResponseFormat {
    r#type: String,
}

/// Answers one conversation.
pub(crate) async fn create(
    State(server): State<Arc<Server>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let body = body::bytes(body, &server.config)?;
    let common: CommonFields = body::parse(&body)?;
    let chat: ChatFields = body::parse(&body)?;
    let head = Head::new("chatcmpl-", server.model_name(common.model.as_deref())?);
    let mut completion = completion(&server, &common, &chat, arrived)?;
    let prompt = chat_prompt(chat)?;
    let worker = server.clone();
    let tokens =
        off_thread_if_large(body.len(), move || Ok(prompt.encode(worker.generator.text(), &worker.markup)?));
    completion.prompts = vec![tokens.await?.into()];
    let running = server.generator.start(&completion).map_err(|error| match ApiError::from(error) {
        // Chat's prompt is its messages.
        error if error.param.is_some() => error.at("messages"),
        error => error,
    })?;
    let logprobs = completion.sampling.logprobs.is_some().then(|| server.generator.text().clone());
    if common.stream() {
        let choices = completion.n;
        let events = ChatEvents { head, choices, logprobs, include_usage: common.include_usage() };
        return Ok(sse::respond(running, events, server.config.keep_alive));
    }
    whole(running, &head, logprobs.as_ref()).await
}

/// Everything but the prompt.
fn completion(
    server: &Server,
    common: &CommonFields,
    chat: &ChatFields,
    arrived: Instant,
) -> Result<Completion, ApiError> {
    let text = server.generator.text();
    let vocab = server.generator.engine().vocab_size();
    let mut completion = Completion { n: common.choices(&server.config)?, arrived, ..Completion::new(text) };
    completion.sampling = common.sampling(vocab)?;
    completion.sampling.logprobs = logprobs(chat)?;
    let limit = params::count("max_completion_tokens", chat.max_completion_tokens, 1)?;
    completion.max_tokens = limit.or(params::count("max_tokens", common.max_tokens, 1)?);
    completion.stop = common.stops(&server.config)?;
    completion.stop_tokens = common.all_stop_tokens(text.stop_tokens(), vocab)?;
    if let Some(format) = chat.response_format.as_ref().filter(|format| format.r#type != "text") {
        let message = format!("response_format `{}` is not supported; leave it out.", format.r#type);
        return Err(ApiError::param("response_format", message));
    }
    Ok(completion)
}

fn logprobs(chat: &ChatFields) -> Result<Option<u32>, ApiError> {
    let top = params::integer("top_logprobs", chat.top_logprobs, 0..=20)?;
    match (chat.logprobs.unwrap_or(false), top) {
        (true, top) => Ok(Some(top.unwrap_or(0) as u32)),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => Err(ApiError::param("top_logprobs", "top_logprobs needs logprobs to be true.")),
    }
}

fn chat_prompt(chat: ChatFields) -> Result<ChatPrompt, ApiError> {
    let messages = chat.messages.ok_or_else(|| ApiError::param("messages", "messages is missing."))?;
    let messages = template_messages(messages)?;
    let wanted = !matches!(&chat.tool_choice, Some(Value::String(choice)) if choice == "none");
    let tools = chat.tools.filter(|tools| wanted && !tools.is_empty());
    if let Some(index) = tools.iter().flatten().position(|tool| !tool.is_object()) {
        return Err(ApiError::param(format!("tools[{index}]"), "A tool must be an object."));
    }
    let extra = chat.chat_template_kwargs.unwrap_or_default();
    Ok(ChatPrompt { messages, tools: tools.map(Value::Array), extra })
}

#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    message: Answer<'a>,
    logprobs: Option<ChatLogprobs>,
    finish_reason: &'static str,
}

#[derive(Serialize)]
struct Answer<'a> {
    role: &'static str,
    content: &'a str,
    refusal: Option<()>,
}

async fn whole(mut running: Running, head: &Head, logprobs: Option<&Text>) -> Result<Response, ApiError> {
    let answers = running.finish().await?;
    let choices: Vec<Choice> = answers
        .iter()
        .map(|answer| Choice {
            index: answer.index,
            message: Answer { role: "assistant", content: &answer.text, refusal: None },
            logprobs: logprobs.map(|text| ChatLogprobs::new(text, &answer.tokens)),
            finish_reason: answer.end.as_ref().map_or("stop", |end| end.reason.as_str()),
        })
        .collect();
    let usage = UsageBody::from(running.totals());
    Ok(Json(Envelope::new(head, OBJECT, &choices, Some(Some(usage)))).into_response())
}

/// A stream's events: who speaks, what is said, why it ended, what it cost, `[DONE]`.
struct ChatEvents {
    head: Head,
    choices: usize,
    logprobs: Option<Text>,
    include_usage: bool,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: usize,
    delta: ChunkDelta<'a>,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
}

#[derive(Default, Serialize)]
struct ChunkDelta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}

impl ChatEvents {
    fn chunk(&self, choice: ChunkChoice<'_>, out: &mut Vec<u8>) {
        let usage = self.include_usage.then_some(None);
        sse::event(&Envelope::new(&self.head, CHUNK, &[choice], usage), out);
    }
}

impl Events for ChatEvents {
    fn begin(&mut self, out: &mut Vec<u8>) {
        for index in 0..self.choices {
            let delta = ChunkDelta { role: Some("assistant"), content: Some("") };
            self.chunk(ChunkChoice { index, delta, logprobs: None, finish_reason: None }, out);
        }
    }

    fn delta(&mut self, delta: &Delta, out: &mut Vec<u8>) {
        let index = delta.index;
        if !delta.text.is_empty() || !delta.tokens.is_empty() {
            let said = ChunkDelta { content: Some(&delta.text), ..ChunkDelta::default() };
            let logprobs = self.logprobs.as_ref().map(|text| ChatLogprobs::new(text, &delta.tokens));
            self.chunk(ChunkChoice { index, delta: said, logprobs, finish_reason: None }, out);
        }
        if let Some(end) = &delta.end {
            let finish_reason = Some(end.reason.as_str());
            let delta = ChunkDelta::default();
            self.chunk(ChunkChoice { index, delta, logprobs: None, finish_reason }, out);
        }
    }

    fn end(&mut self, running: &Running, out: &mut Vec<u8>) {
        if self.include_usage {
            let usage = UsageBody::from(running.totals());
            sse::event(&Envelope::<()>::new(&self.head, CHUNK, &[], Some(Some(usage))), out);
        }
        out.extend_from_slice(sse::DONE);
    }
}
