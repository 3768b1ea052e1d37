//! `/v1/responses/{id}`: a response that runs or is stored is read, streamed once more, cancelled, deleted;
//! its input items are listed.

use std::sync::Arc;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde::Deserialize;
use serde_json::{Value, json};

use super::listing::{self, List, ListFields};
use super::store::{Page, PageQuery};
use super::{rebuild, stream};
use crate::Server;
use crate::admission::Owner;
use crate::openai::ApiError;

/// How a response is to be read. Unknown parameters are ignored.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct GetFields {
    stream: Option<String>,
    starting_after: Option<String>,
}

impl GetFields {
    fn streams(&self) -> bool {
        self.stream.as_deref().is_some_and(|stream| matches!(stream, "true" | "True" | "1"))
    }

    /// Sequence number of the first event that is wanted.
    fn first(&self) -> Result<usize, ApiError> {
        match self.starting_after.as_deref() {
            None => Ok(0),
            Some(text) => match text.parse::<u32>() {
                Ok(number) => Ok(number as usize + 1),
                Err(_) => {
                    let message =
                        format!("starting_after is `{text}`; it must be an event's sequence number.");
                    Err(ApiError::param("starting_after", message))
                }
            },
        }
    }
}

/// `GET`: the response as it stands, or its events from some number on, to the end.
pub(crate) async fn retrieve(
    State(server): State<Arc<Server>>,
    Extension(owner): Extension<Owner>,
    Path(id): Path<String>,
    query: Result<Query<GetFields>, QueryRejection>,
) -> Result<Response, ApiError> {
    let fields = listing::query(query)?;
    let first = fields.first()?;
    if let Some(live) = server.responses.shown_live(owner, &id).await {
        return Ok(match fields.streams() {
            true => stream::respond(live.read_from(first), None, server.config.keep_alive),
            false => Json(live.response()).into_response(),
        });
    }
    let record = server.responses.store.get(owner, &id).await?.ok_or_else(|| not_found(&id))?;
    Ok(match fields.streams() {
        true => stream::whole(&rebuild::events(&record.response, first)),
        false => Json(record.response).into_response(),
    })
}

/// `DELETE`: it is cancelled if it runs, and forgotten.
pub(crate) async fn delete(
    State(server): State<Arc<Server>>,
    Extension(owner): Extension<Owner>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let live = server.responses.stored_live(owner, &id);
    if let Some(live) = &live {
        live.cancel();
        server.responses.registry.forget(&id);
    }
    let stored = server.responses.store.delete(owner, &id).await?;
    match stored || live.is_some() {
        true => Ok(Json(json!({"id": id, "object": "response", "deleted": true}))),
        false => Err(not_found(&id)),
    }
}

/// `POST .../cancel`: ends a background response. One that has ended stays as it is.
pub(crate) async fn cancel(
    State(server): State<Arc<Server>>,
    Extension(owner): Extension<Owner>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    if let Some(live) = server.responses.stored_live(owner, &id) {
        if !live.ask.settings.echo.background {
            return Err(not_background());
        }
        live.cancel();
        live.ended().await;
        return Ok(Json(live.response()).into_response());
    }
    let record = server.responses.store.get(owner, &id).await?.ok_or_else(|| not_found(&id))?;
    match record.response["background"] == true {
        true => Ok(Json(record.response).into_response()),
        false => Err(not_background()),
    }
}

/// `GET .../input_items`: everything that the response was made from, those before it in its chain too; a
/// conversation lists its own.
pub(crate) async fn input_items(
    State(server): State<Arc<Server>>,
    Extension(owner): Extension<Owner>,
    Path(id): Path<String>,
    query: Result<Query<ListFields>, QueryRejection>,
) -> Result<Json<List>, ApiError> {
    let query: PageQuery = listing::query(query)?.try_into()?;
    let items = match server.responses.stored_live(owner, &id) {
        Some(live) if live.ask.settings.conversation().is_some() => live.ask.input.to_vec(),
        Some(live) => live.ask.items().into_iter().cloned().collect(),
        None => server.responses.store.input_items(owner, &id).await?.ok_or_else(|| not_found(&id))?,
    };
    Ok(Json(Page::of(items, &query).ok_or_else(|| listing::no_such_cursor(&query))?.into()))
}

fn not_found(id: &str) -> ApiError {
    ApiError::not_found(format!("Response with id '{id}' not found."))
}

fn not_background() -> ApiError {
    ApiError::invalid(
        "Only a response made with `background` can be cancelled; close the connection of another.",
    )
}
