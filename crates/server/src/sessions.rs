//! `/v1/sessions`: what is kept of an owner's sessions, and for how long; kept on request, or forgotten.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::{Extension, Json};
use rudder_engine::{MAX_PINNED, MAX_PINNED_OF_OWNER, PinError, Session, SessionState};
use serde_json::{Value, json};

use crate::admission::Owner;
use crate::openai::ApiError;
use crate::{Server, unix_now};

/// `GET /v1/sessions`: those used last first, all of them.
pub(crate) async fn list(
    State(server): State<Arc<Server>>,
    Extension(owner): Extension<Owner>,
) -> Result<Json<Value>, ApiError> {
    let sessions = server.generator.engine().sessions(owner.origin(None).owner).await?;
    let data: Vec<Value> = sessions.iter().map(|session| shown(owner, session)).collect();
    let end = |session: Option<&Value>| session.map_or(Value::Null, |session| session["id"].clone());
    let (first, last) = (end(data.first()), end(data.last()));
    Ok(Json(json!({"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": false})))
}

/// `GET /v1/sessions/{id}`.
pub(crate) async fn retrieve(
    State(server): State<Arc<Server>>,
    Extension(owner): Extension<Owner>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    Ok(Json(shown(owner, &find(&server, owner, &id).await?)))
}

/// `DELETE /v1/sessions/{id}`: what it alone had cached is free at once, but for what runs, and soon on disk.
pub(crate) async fn delete(
    State(server): State<Arc<Server>>,
    Extension(owner): Extension<Owner>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let name = crate::session::name(&id).ok_or_else(|| not_found(&id))?;
    // On disk there may be what is not known any more.
    let key =
        find(&server, owner, &id).await.map_or_else(|_| owner.session_key(&name), |session| session.info.key);
    match server.generator.engine().remove_session(key).await? {
        true => Ok(Json(json!({"id": id, "object": "session", "deleted": true}))),
        false => Err(not_found(&id)),
    }
}

/// `POST /v1/sessions/{id}/pin`: kept until it is unpinned.
pub(crate) async fn pin(
    state: State<Arc<Server>>,
    owner: Extension<Owner>,
    id: Path<String>,
) -> Result<Json<Value>, ApiError> {
    set_pinned(state, owner, id, true).await
}

/// `POST /v1/sessions/{id}/unpin`: kept as long as others.
pub(crate) async fn unpin(
    state: State<Arc<Server>>,
    owner: Extension<Owner>,
    id: Path<String>,
) -> Result<Json<Value>, ApiError> {
    set_pinned(state, owner, id, false).await
}

async fn set_pinned(
    State(server): State<Arc<Server>>,
    Extension(owner): Extension<Owner>,
    Path(id): Path<String>,
    pinned: bool,
) -> Result<Json<Value>, ApiError> {
    let session = find(&server, owner, &id).await?;
    match server.generator.engine().pin_session(session.info.key, pinned).await? {
        Ok(session) => Ok(Json(shown(owner, &session))),
        Err(PinError::Unknown) => Err(not_found(&id)),
        Err(PinError::TooMany) => Err(ApiError::invalid(format!(
            "{MAX_PINNED_OF_OWNER} of your sessions are pinned, the most there may be; unpin one."
        ))),
        Err(PinError::TooManyInAll) => Err(ApiError::invalid(format!(
            "{MAX_PINNED} sessions are pinned, the most that this server keeps; unpin one of yours, or try again later."
        ))),
    }
}

/// An owner's session by its name: that of its key, or the key itself where the engine made it up.
async fn find(server: &Server, owner: Owner, id: &str) -> Result<Session, ApiError> {
    let name = crate::session::name(id).ok_or_else(|| not_found(id))?;
    for key in [owner.session_key(&name), name.clone()] {
        let found = server.generator.engine().session(owner.origin(None).owner, key).await?;
        if let Some(session) = found.filter(|found| owner.session_name(&found.info.key) == &*name) {
            return Ok(session);
        }
    }
    Err(not_found(id))
}

fn shown(owner: Owner, session: &Session) -> Value {
    let info = &session.info;
    let state = match info.state {
        SessionState::Running => "running",
        SessionState::Kept => "kept",
        SessionState::Idle if session.is_on_disk_alone() => "disk",
        SessionState::Idle => "idle",
    };
    let (now, seconds) = (unix_now(), |milliseconds: u64| milliseconds / 1000);
    json!({
        "id": owner.session_name(&info.key),
        "object": "session",
        "created_at": now.saturating_sub(seconds(info.age)),
        "last_used_at": now.saturating_sub(seconds(info.idle)),
        "state": state,
        "pinned": info.pinned,
        "age_seconds": seconds(info.age),
        "idle_seconds": seconds(info.idle),
        "kept_for_seconds": info.kept_for.map(seconds),
        "turns": info.turns,
        "tokens": info.tokens,
        "cached_tokens": {"device": info.cached_tokens, "disk": session.disk_tokens},
    })
}

fn not_found(id: &str) -> ApiError {
    ApiError::not_found(format!(
        "Session with id '{id}' not found; a session is known from its first turn on."
    ))
}
