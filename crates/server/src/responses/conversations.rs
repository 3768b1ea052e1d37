//! `/v1/conversations`: items kept under one name, which requests go on from and add to.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::{Extension, Json};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::items::Reading;
use super::listing::{self, List, ListFields, shown};
use super::request::{Input, check_metadata};
use super::store::{Conversation, Page, PageQuery};
use super::tools::CallNames;
use crate::admission::{Owner, random_id};
use crate::openai::ApiError;
use crate::{Server, body, unix_now};

/// Most items of one request.
const MAX_ITEMS: usize = 20;

type Body = Result<Bytes, BytesRejection>;

/// Metadata and first items.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Fields {
    items: Option<Vec<Value>>,
    metadata: Option<Map<String, Value>>,
}

/// `POST /v1/conversations`.
pub(crate) async fn create(
    State(server): State<Arc<Server>>,
    Extension(owner): Extension<Owner>,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let fields = fields(&server, body)?;
    let items = checked_items(&server, &[], fields.items.unwrap_or_default())?;
    let metadata = checked_metadata(fields.metadata)?;
    let conversation = Conversation { id: random_id("conv_"), created_at: unix_now(), metadata };
    server.responses.store.create_conversation(owner, conversation.clone(), items).await?;
    Ok(Json(object(&conversation)))
}

/// `GET /v1/conversations/{id}`.
pub(crate) async fn retrieve(
    State(server): State<Arc<Server>>,
    Extension(owner): Extension<Owner>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let found = server.responses.store.conversation(owner, &id).await?;
    found.map(|conversation| Json(object(&conversation))).ok_or_else(|| not_found(&id))
}

/// `POST /v1/conversations/{id}`: other metadata.
pub(crate) async fn update(
    State(server): State<Arc<Server>>,
    Extension(owner): Extension<Owner>,
    Path(id): Path<String>,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let metadata = checked_metadata(fields(&server, body)?.metadata)?;
    let found = server.responses.store.update_conversation(owner, &id, metadata).await?;
    found.map(|conversation| Json(object(&conversation))).ok_or_else(|| not_found(&id))
}

/// `DELETE /v1/conversations/{id}`.
pub(crate) async fn delete(
    State(server): State<Arc<Server>>,
    Extension(owner): Extension<Owner>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    match server.responses.store.delete_conversation(owner, &id).await? {
        true => Ok(Json(json!({"id": id, "object": "conversation.deleted", "deleted": true}))),
        false => Err(not_found(&id)),
    }
}

/// `GET /v1/conversations/{id}/items`.
pub(crate) async fn list_items(
    State(server): State<Arc<Server>>,
    Extension(owner): Extension<Owner>,
    Path(id): Path<String>,
    query: Result<Query<ListFields>, QueryRejection>,
) -> Result<Json<List>, ApiError> {
    let query: PageQuery = listing::query(query)?.try_into()?;
    let page = server.responses.store.page(owner, &id, query.clone()).await?.ok_or_else(|| not_found(&id))?;
    Ok(Json(page.ok_or_else(|| listing::no_such_cursor(&query))?.into()))
}

/// `POST /v1/conversations/{id}/items`.
pub(crate) async fn add_items(
    State(server): State<Arc<Server>>,
    Extension(owner): Extension<Owner>,
    Path(id): Path<String>,
    body: Body,
) -> Result<Json<List>, ApiError> {
    let Some(new) = fields(&server, body)?.items.filter(|items| !items.is_empty()) else {
        return Err(ApiError::param("items", "items is missing or empty; send a list of items."));
    };
    let store = &server.responses.store;
    let known = store.conversation_items(owner, &id).await?.ok_or_else(|| not_found(&id))?;
    let items = checked_items(&server, &known, new)?;
    store.append(owner, &id, items.clone()).await?.ok_or_else(|| not_found(&id))?;
    Ok(Json(Page { items, has_more: false }.into()))
}

/// `GET /v1/conversations/{id}/items/{item}`.
pub(crate) async fn retrieve_item(
    State(server): State<Arc<Server>>,
    Extension(owner): Extension<Owner>,
    Path((id, item)): Path<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    let found = server.responses.store.item(owner, &id, &item).await?;
    found.map(|item| Json(shown(item))).ok_or_else(|| item_not_found(&id, &item))
}

/// `DELETE /v1/conversations/{id}/items/{item}`; answers the conversation.
pub(crate) async fn delete_item(
    State(server): State<Arc<Server>>,
    Extension(owner): Extension<Owner>,
    Path((id, item)): Path<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    let found = server.responses.store.delete_item(owner, &id, &item).await?;
    found.map(|conversation| Json(object(&conversation))).ok_or_else(|| item_not_found(&id, &item))
}

/// 404 for a conversation.
pub(crate) fn not_found(id: &str) -> ApiError {
    ApiError::not_found(format!("Conversation with id '{id}' not found."))
}

fn item_not_found(id: &str, item: &str) -> ApiError {
    ApiError::not_found(format!("Item with id '{item}' not found in conversation '{id}'."))
}

fn object(conversation: &Conversation) -> Value {
    let Conversation { id, created_at, metadata } = conversation;
    json!({"id": id, "object": "conversation", "created_at": created_at, "metadata": metadata})
}

/// An empty body is an empty object.
fn fields(server: &Server, body: Body) -> Result<Fields, ApiError> {
    let body = body::bytes(body, &server.config)?;
    if body.is_empty() { Ok(Fields::default()) } else { body::parse(&body) }
}

fn checked_metadata(metadata: Option<Map<String, Value>>) -> Result<Value, ApiError> {
    let metadata = metadata.unwrap_or_default();
    check_metadata(&metadata)?;
    Ok(metadata.into())
}

/// New items, each with an id, if a request can go on from them and those before.
fn checked_items(server: &Server, known: &[Value], new: Vec<Value>) -> Result<Vec<Value>, ApiError> {
    if new.len() > MAX_ITEMS {
        let message = format!("items holds {}; at most {MAX_ITEMS} may be added at a time.", new.len());
        return Err(ApiError::param("items", message));
    }
    let new = Input::Items(new).into_items();
    let all: Vec<&Value> = known.iter().chain(&new).collect();
    let reading = Reading { names: &CallNames::default(), seal: &server.responses.seal, own: known.len() };
    reading.messages(&all).map_err(|error| ApiError {
        param: error.param.map(|param| param.replacen("input", "items", 1)),
        message: error.message.replacen("input[", "items[", 1),
        ..error
    })?;
    Ok(new)
}
