//! Probes: alive, ready, which version, how it goes.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use serde_json::{Value, json};

use crate::Server;
use crate::openai::ApiError;

/// `GET /health`: the process answers.
pub(crate) async fn health() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

/// `GET /ready`: 503 once the server drains, so that a balancer looks elsewhere.
pub(crate) async fn ready(State(server): State<Arc<Server>>) -> Result<Json<Value>, ApiError> {
    if server.is_draining() {
        return Err(ApiError::shutting_down());
    }
    Ok(Json(json!({"status": "ready", "model": server.config.model})))
}

/// `GET /version`.
pub(crate) async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}

/// `GET /metrics`.
pub(crate) async fn metrics(State(server): State<Arc<Server>>) -> impl IntoResponse {
    (
        [(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)],
        server.generator.metrics(server.responses.store.stats()),
    )
}
