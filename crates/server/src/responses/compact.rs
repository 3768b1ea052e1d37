//! `POST /v1/responses/input_tokens`: how long a prompt would be. `POST /v1/responses/compact`: a
//! conversation's user messages and, sealed, the model's own summary of everything.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use serde_json::{Map, Value, json};

use super::create;
use super::items::new_id;
use super::listing::shown;
use super::live::Tether;
use super::request::{self, Ask, Conversation, Input, ResponseFields, response_id};
use super::run::{self, Start};
use super::types::{Link, Response};
use crate::admission::Owner;
use crate::openai::ApiError;
use crate::openai::params::CommonFields;
use crate::session::Caller;
use crate::{Server, body, unix_now};

/// Most tokens of a summary.
const SUMMARY_TOKENS: i64 = 4096;
/// What the model is asked for. Whoever goes on has the user's messages and the summary alone.
const INSTRUCTION: &str = "Write a summary of this conversation for whoever continues it without having \
    seen it; only the user's messages will be there besides. State the goal and what the user demands, what \
    was done and found out so far with the names of files, functions, commands and values that matter, \
    decisions and their reasons, what failed, and what is to be done next. Be exact and complete, call no \
    tools, and answer with the summary alone.";
/// How the summary is introduced to the model that goes on from it.
const HEADING: &str = "Summary of the conversation so far:";

/// A request's fields and what it goes on from.
struct Asked {
    fields: ResponseFields,
    common: CommonFields,
    previous: Option<Arc<Link>>,
    input: Vec<Value>,
    arrived: Instant,
}

impl Asked {
    async fn read(
        server: &Server,
        owner: Owner,
        body: Result<Bytes, BytesRejection>,
    ) -> Result<Self, ApiError> {
        let arrived = Instant::now();
        let body = body::bytes(body, &server.config)?;
        let (mut fields, common) = request::parse(&body)?;
        let conversation = fields.conversation.as_ref().map(Conversation::id);
        let previous = fields.previous_response_id.as_deref();
        let previous = server.responses.context(owner, previous, conversation).await?.link;
        let input = fields.input.take().map(Input::into_items).unwrap_or_default();
        Ok(Self { fields, common, previous, input, arrived })
    }

    /// The request, going on from nothing but its items, with `further` at the end.
    fn ask(mut self, server: &Server, caller: &Caller, further: Option<Value>) -> Result<Ask, ApiError> {
        self.input.extend(further);
        let settings = self.fields.settings(&self.common, server)?;
        Ok(Ask {
            owner: caller.owner,
            session: create::session(caller, &settings.echo, self.previous.as_deref()),
            settings: Arc::new(settings),
            previous_response_id: None,
            previous: self.previous,
            input: self.input.into(),
            stream_id: None,
            steered: false,
            arrived: self.arrived,
            deadline: caller.deadline,
        })
    }

    /// All items, oldest first.
    fn items(&self) -> Vec<&Value> {
        let mut items = Vec::new();
        if let Some(previous) = &self.previous {
            previous.items(&mut items);
        }
        items.extend(&self.input);
        items
    }
}

/// Counts the tokens of the prompt that a request would have.
pub(crate) async fn input_tokens(
    State(server): State<Arc<Server>>,
    caller: Caller,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Value>, ApiError> {
    let mut asked = Asked::read(&server, caller.owner, body).await?;
    // To count, any model will do; there is but one.
    asked.common.model.get_or_insert_with(|| server.config.model.clone());
    let ask = asked.ask(&server, &caller, None)?;
    let turn = ask.prepare(&server.responses.seal)?.turn;
    let tokens = server.count_tokens(turn).await?;
    Ok(Json(json!({"object": "response.input_tokens", "input_tokens": tokens})))
}

/// Compacts a conversation. What does not fit into the context with it is left out, oldest first.
pub(crate) async fn compact(
    State(server): State<Arc<Server>>,
    caller: Caller,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Value>, ApiError> {
    let mut asked = Asked::read(&server, caller.owner, body).await?;
    if asked.common.model.is_none() {
        return Err(ApiError::missing_model(&server.config.model));
    }
    let said_by_user =
        |item: &&Value| item["role"] == "user" && item.get("type").is_none_or(|kind| kind == "message");
    let mut output: Vec<Value> = asked.items().into_iter().filter(said_by_user).cloned().map(shown).collect();
    if asked.items().is_empty() {
        return Err(ApiError::param(
            "input",
            "There is nothing to compact; send input or previous_response_id.",
        ));
    }
    let half = server.generator.engine().max_context() as i64 / 2;
    asked.fields = ResponseFields {
        instructions: asked.fields.instructions.take(),
        prompt_cache_key: asked.fields.prompt_cache_key.take(),
        max_output_tokens: Some(SUMMARY_TOKENS.min(half).max(1)),
        truncation: Some("auto".into()),
        chat_template_kwargs: Some(Map::from_iter([("enable_thinking".into(), false.into())])),
        store: Some(false),
        ..ResponseFields::default()
    };
    let instruction = json!({"type": "message", "role": "user", "content": INSTRUCTION, "id": new_id(None)});
    let ask = asked.ask(&server, &caller, Some(instruction))?;
    let live = run::start(&server, ask, Start::default()).await?;
    let tether = Tether::new(live.clone());
    live.ended().await;
    tether.let_go();
    let response = live.response();
    let summary = summary(&response)?;
    output.push(json!({
        "type": "compaction", "id": new_id(Some("compaction")),
        "encrypted_content": server.responses.seal.close(&format!("{HEADING}\n\n{summary}")),
    }));
    Ok(Json(json!({
        "id": response_id(), "object": "response.compaction", "created_at": unix_now(),
        "output": output, "usage": response.usage,
    })))
}

/// What the model wrote.
fn summary(response: &Response) -> Result<String, ApiError> {
    if let Some(failure) = &response.error {
        return Err(ApiError::internal(failure.message.as_str()));
    }
    let messages = response.output.iter().filter(|item| item["type"] == "message");
    let parts = messages.filter_map(|item| item["content"].as_array()).flatten();
    let text: String = parts.filter_map(|part| part["text"].as_str()).collect();
    match text.trim() {
        "" => Err(ApiError::internal("The model wrote no summary; try again.")),
        text => Ok(text.to_owned()),
    }
}
