//! `POST /v1/responses/{id}/steer`: steering for those without a WebSocket.
//!
//! The answer is the event that a WebSocket would bring, with the id that the successor will have; with
//! `stream`, what becomes of the correction follows: the successor's events, or why there is none. A successor
//! that nobody else follows ends with that stream.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde::Deserialize;
use serde_json::{Value, json};

use super::events::Event;
use super::live::{Live, Reader};
use super::steer::{Code, Refusal, Steer};
use super::stream::{self, Source};
use crate::admission::Owner;
use crate::openai::ApiError;
use crate::{Server, body};

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct SteerFields {
    input: Value,
    stream: Option<bool>,
}

/// Queues a correction of a response that runs.
pub(crate) async fn steer(
    State(server): State<Arc<Server>>,
    Extension(owner): Extension<Owner>,
    Path(id): Path<String>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let body = body::bytes(body, &server.config)?;
    let SteerFields { input, stream } = body::parse(&body)?;
    let steer = match Steer::read(&json!({"previous_response_id": id, "input": input})) {
        Ok(steer) => steer,
        Err(refusal) => return Ok(refused(&refusal)),
    };
    let live = server.responses.registry.find(&id).await.filter(|live| live.ask.owner == owner);
    let Some(live) = live else {
        return Ok(refused(
            &steer.refuse(Code::ResponseNotFound, format!("There is no response `{id}` here.")),
        ));
    };
    let (steer_id, mut answer) = (steer.id.clone(), steer.accepted());
    let accepted = match live.steer(steer) {
        Ok(accepted) => accepted,
        Err(refusal) => return Ok(refused(&refusal)),
    };
    if stream.unwrap_or(false) {
        let fate = Fate { parent: live, steer_id, told: 0, successor: None };
        return Ok(stream::respond(fate, None, server.config.keep_alive));
    }
    answer["type"] = "response.steer.accepted".into();
    answer["sequence_number"] = accepted.sequence.into();
    answer["successor_id"] = accepted.successor_id.into();
    Ok(Json(answer).into_response())
}

/// A refusal as its event, which has the shape of an error too.
fn refused(refusal: &Refusal) -> Response {
    let mut body = refusal.fields();
    body["type"] = "response.steer.failed".into();
    body["error"]["param"] = Value::Null;
    let status = match refusal.code {
        Code::ResponseNotFound => StatusCode::NOT_FOUND,
        Code::TooManyPendingSteers => StatusCode::TOO_MANY_REQUESTS,
        Code::ResponseAlreadyCompleted | Code::ResponseNotActive => StatusCode::CONFLICT,
        Code::InvalidInput | Code::SteeringNotSupported | Code::SuccessorCreationFailed => {
            StatusCode::BAD_REQUEST
        }
    };
    (status, Json(body)).into_response()
}

/// What becomes of a correction: the events about it, then its successor's.
struct Fate {
    parent: Arc<Live>,
    steer_id: String,
    /// Events of the parent's that were looked at.
    told: usize,
    successor: Option<(Arc<Live>, Reader)>,
}

impl Source for Fate {
    async fn read(&mut self, out: &mut Vec<Event>) -> bool {
        if let Some((_, reader)) = &mut self.successor {
            return reader.read(out).await;
        }
        let mut reader = self.parent.read_from(self.told);
        let mut events = Vec::new();
        while reader.read(&mut events).await {
            self.told += events.len();
            out.extend(events.drain(..).filter(|event| self.is_about(event)));
            if !out.is_empty() {
                return true;
            }
        }
        let Some(successor) = self.parent.successor() else { return false };
        let mut reader = successor.read_from(0);
        let more = reader.read(out).await;
        self.successor = Some((successor, reader));
        more
    }
}

impl Drop for Fate {
    fn drop(&mut self) {
        let Some((successor, reader)) = self.successor.take() else { return };
        drop(reader);
        // Whoever still follows the parent is about to go on to its successor.
        let followed = self.parent.is_followed() || successor.is_followed();
        if !followed && !successor.ask.settings.echo.background {
            successor.cancel();
        }
    }
}

impl Fate {
    fn is_about(&self, event: &Event) -> bool {
        let about = || {
            let event: Value = serde_json::from_slice(&event.json).ok()?;
            Some(event["steer"]["id"] == self.steer_id.as_str())
        };
        event.kind.starts_with("response.steer.") && about().unwrap_or(false)
    }
}
