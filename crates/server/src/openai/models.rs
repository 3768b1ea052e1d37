//! `GET /v1/models`, and one by its id.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;

use super::error::ApiError;
use crate::Server;

/// A served model.
#[derive(Serialize)]
pub(crate) struct Model {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    root: String,
    parent: Option<String>,
    max_model_len: usize,
}

/// `data` is OpenAI's list; some clients look for it under `models`.
#[derive(Serialize)]
pub(crate) struct ModelList {
    object: &'static str,
    data: Vec<Model>,
    models: Vec<Model>,
}

fn model(server: &Server, id: &str) -> Model {
    Model {
        id: id.to_owned(),
        object: "model",
        created: server.created,
        owned_by: "rudder",
        root: server.config.model.clone(),
        parent: None,
        max_model_len: server.generator.engine().max_context(),
    }
}

/// `GET /v1/models`.
pub(crate) async fn list(State(server): State<Arc<Server>>) -> Json<ModelList> {
    let models = || server.config.model_names().map(|id| model(&server, id)).collect();
    Json(ModelList { object: "list", data: models(), models: models() })
}

/// `GET /v1/models/{id}`; an id may hold slashes.
pub(crate) async fn retrieve(
    State(server): State<Arc<Server>>,
    Path(id): Path<String>,
) -> Result<Json<Model>, ApiError> {
    let id = server.model_name(Some(&id))?;
    Ok(Json(model(&server, &id)))
}
