//! `POST /v1/responses`: streamed, whole or in the background.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::Value;

use super::live::{Live, Tether};
use super::request::{self, Ask, ResponseFields, Settings};
use super::run::{self, Start};
use super::steer::Taken;
use super::types::{Echo, Link};
use super::{Responses, stream};
use crate::admission::Owner;
use crate::openai::ApiError;
use crate::session::Caller;
use crate::{Server, body};

/// What a request goes on from.
#[derive(Default)]
pub(crate) struct Previous {
    pub link: Option<Arc<Link>>,
    /// The response itself, if it ran lately: corrections may wait on it.
    pub live: Option<Arc<Live>>,
}

/// A request ready to start, and the corrections that it brings with it.
pub(crate) struct Created {
    pub ask: Ask,
    pub taken: Option<Taken>,
}

/// Answers one request.
pub(crate) async fn create(
    State(server): State<Arc<Server>>,
    caller: Caller,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let body = body::bytes(body, &server.config)?;
    let (mut fields, common) = request::parse(&body)?;
    fields.stream_id = None;
    fields.generate = None;
    let settings = fields.settings(&common, &server)?;
    let previous = fields.previous_response_id.as_deref();
    let previous = server.responses.context(caller.owner, previous, settings.conversation()).await?;
    let created = assemble(&server, &caller, fields, settings, previous, arrived)?;
    let (streams, background) = (common.stream(), created.ask.settings.echo.background);
    let how = Start { id: None, streams, taken: created.taken };
    let live = run::start(&server, created.ask, how).await?;
    let tether = (!background).then(|| Tether::new(live.clone()));
    if streams {
        return Ok(stream::respond(live.read_from(0), tether, server.config.keep_alive));
    }
    let Some(tether) = tether else { return created_response(&live) };
    live.ended().await;
    tether.let_go();
    whole(&live)
}

/// A background response as its first event shows it, however far it has come.
fn created_response(live: &Live) -> Result<Response, ApiError> {
    let first = live.state().recorder.events_from(0).first().cloned();
    let event = first.and_then(|event| serde_json::from_slice::<Value>(&event.json).ok());
    match event {
        Some(mut event) => Ok(Json(event["response"].take()).into_response()),
        None => whole(live),
    }
}

/// The response as it stands; one that failed is an error.
fn whole(live: &Live) -> Result<Response, ApiError> {
    let response = live.response();
    if let Some(failure) = &response.error {
        return Err(failure.error());
    }
    let timing = response.rudder;
    let response = (StatusCode::OK, Json(response)).into_response();
    Ok(match timing {
        Some(timing) => timing.tell(response),
        None => response,
    })
}

/// Joins a request with what it goes on from. Corrections that wait there come first in its input.
pub(crate) fn assemble(
    server: &Server,
    caller: &Caller,
    mut fields: ResponseFields,
    settings: Settings,
    previous: Previous,
    arrived: Instant,
) -> Result<Created, ApiError> {
    let mut input = match fields.input.take() {
        Some(input) => input.into_items(),
        None if previous.link.is_some() => Vec::new(),
        None => return Err(ApiError::param("input", "input is missing; send a text or a list of items.")),
    };
    resolve_references(&server.responses, caller.owner, previous.link.as_ref(), &mut input)?;
    let taken = match previous.live {
        Some(live) => take_steers(live, &input)?,
        None => None,
    };
    if let Some(taken) = &taken {
        input.splice(0..0, taken.items().cloned());
    }
    let ask = Ask {
        owner: caller.owner,
        session: session(caller, &settings.echo, previous.link.as_deref()),
        settings: Arc::new(settings),
        previous_response_id: fields.previous_response_id,
        previous: previous.link,
        input: input.into(),
        stream_id: fields.stream_id,
        steered: false,
        arrived,
        deadline: caller.deadline,
    };
    Ok(Created { ask, taken })
}

/// The name of the session that a request is a turn of.
pub(crate) fn session(caller: &Caller, echo: &Echo, previous: Option<&Link>) -> Option<Arc<str>> {
    let named = caller.session(echo.prompt_cache_key.as_deref());
    named.or_else(|| previous.and_then(|link| link.session.clone())).or_else(|| caller.lane())
}

/// Puts the items in that are named by their ids alone.
fn resolve_references(
    responses: &Responses,
    owner: Owner,
    previous: Option<&Arc<Link>>,
    input: &mut Vec<Value>,
) -> Result<(), ApiError> {
    let is_reference = |item: &Value| item.get("type").is_some_and(|kind| kind == "item_reference");
    if !input.iter().any(is_reference) {
        return Ok(());
    }
    let mut known = Vec::new();
    if let Some(previous) = previous {
        previous.items(&mut known);
    }
    let mut resolved = Vec::with_capacity(input.len());
    for (index, item) in input.drain(..).enumerate() {
        let id = item.get("id").and_then(Value::as_str).unwrap_or_default();
        if !is_reference(&item) {
            resolved.push(item);
        } else if known.iter().any(|known| known.get("id").is_some_and(|known| known == id)) {
            // It is in the conversation already.
        } else if let Some(found) = responses.item(owner, id) {
            resolved.push(found);
        } else {
            let path = format!("input[{index}]");
            let message = format!("{path}: there is no item with the id `{id}` here.");
            return Err(ApiError::param(path, message));
        }
    }
    *input = resolved;
    Ok(())
}

/// Takes the corrections that wait for this request; it must bring the results that are owed.
fn take_steers(live: Arc<Live>, input: &[Value]) -> Result<Option<Taken>, ApiError> {
    let mut state = live.state();
    if state.steers.is_empty() || !state.recorder.response().status.is_final() {
        return Ok(None);
    }
    let brought = |stub: &Value| {
        input.iter().any(|item| item["type"] == stub["type"] && item["call_id"] == stub["call_id"])
    };
    if let Some(missing) = state.steers.owed.iter().find(|stub| !brought(stub)) {
        let id = missing["call_id"].as_str().unwrap_or_default();
        return Err(ApiError::param("input", format!("No tool output found for the call `{id}`.")));
    }
    let steers = state.steers.take();
    drop(state);
    Ok(Some(Taken::new(live, steers)))
}
