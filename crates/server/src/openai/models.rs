//! `GET /v1/models`, and one by its id.
//!
//! Three kinds of clients ask here, each for keys of its own: OpenAI's want `data` with ids, Anthropic's
//! the same `data` with display names and capabilities, Codex a catalog under `models`. One answer has
//! them all.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use jiff::Timestamp;
use rudder_text::ReasoningFormat;
use serde::Serialize;

use super::catalog::CatalogEntry;
use super::error::ApiError;
use crate::Server;

/// A served model: OpenAI's keys, vLLM's `max_model_len`, then Anthropic's keys.
#[derive(Serialize)]
pub(crate) struct Model {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    root: String,
    parent: Option<String>,
    max_model_len: usize,
    context_length: usize,
    r#type: &'static str,
    display_name: String,
    created_at: String,
    lifecycle: &'static str,
    max_input_tokens: usize,
    max_tokens: usize,
    capabilities: Capabilities,
}

/// What the model and the server can do. Anthropic's names, and `tools` and `infill` besides.
#[derive(Serialize)]
struct Capabilities {
    tools: Support,
    infill: Support,
    structured_outputs: Support,
    thinking: Thinking,
    effort: Effort,
    context_management: Support,
    image_input: Support,
    pdf_input: Support,
    citations: Support,
    batch: Support,
    code_execution: Support,
    server_tools: ServerTools,
}

#[derive(Clone, Copy, Serialize)]
struct Support {
    supported: bool,
}

const YES: Support = Support { supported: true };
const NO: Support = Support { supported: false };

#[derive(Serialize)]
struct Thinking {
    supported: bool,
    types: ThinkingTypes,
}

#[derive(Serialize)]
struct ThinkingTypes {
    adaptive: Support,
    between_tools: Support,
    disabled: Support,
    enabled: Support,
}

#[derive(Serialize)]
struct Effort {
    supported: bool,
    low: Support,
    medium: Support,
    high: Support,
    max: Support,
}

#[derive(Serialize)]
struct ServerTools {
    supported: bool,
    web_search: Support,
    code_execution: Support,
}

impl Capabilities {
    fn of(server: &Server) -> Self {
        let reasoning = Support { supported: server.format.reasoning.is_some() };
        // Other templates know no efforts.
        let effort = Support { supported: server.format.reasoning == Some(ReasoningFormat::Harmony) };
        Self {
            tools: Support { supported: server.format.tools.is_some() },
            infill: Support { supported: server.generator.text().has_infill() },
            structured_outputs: YES,
            thinking: Thinking {
                supported: reasoning.supported,
                types: ThinkingTypes {
                    adaptive: reasoning,
                    between_tools: NO,
                    disabled: YES,
                    enabled: reasoning,
                },
            },
            effort: Effort {
                supported: effort.supported,
                low: effort,
                medium: effort,
                high: effort,
                max: NO,
            },
            context_management: NO,
            image_input: NO,
            pdf_input: NO,
            citations: NO,
            batch: NO,
            code_execution: NO,
            server_tools: ServerTools { supported: false, web_search: NO, code_execution: NO },
        }
    }
}

/// `data` is OpenAI's and Anthropic's list, in one page; `models` is Codex's catalog.
#[derive(Serialize)]
pub(crate) struct ModelList {
    object: &'static str,
    data: Vec<Model>,
    has_more: bool,
    first_id: Option<String>,
    last_id: Option<String>,
    models: Vec<CatalogEntry>,
}

fn model(server: &Server, id: &str) -> Model {
    let context = server.generator.engine().max_context();
    let created = i64::try_from(server.created).ok().and_then(|second| Timestamp::from_second(second).ok());
    Model {
        id: id.to_owned(),
        object: "model",
        created: server.created,
        owned_by: "rudder",
        root: server.config.model.clone(),
        parent: None,
        max_model_len: context,
        context_length: context,
        r#type: "model",
        display_name: id.to_owned(),
        created_at: created.unwrap_or_default().to_string(),
        lifecycle: "active",
        max_input_tokens: context,
        max_tokens: context,
        capabilities: Capabilities::of(server),
    }
}

/// `GET /v1/models`.
pub(crate) async fn list(State(server): State<Arc<Server>>) -> Json<ModelList> {
    let names = || server.config.model_names();
    let (reasons, context) = (server.format.reasoning.is_some(), server.generator.engine().max_context());
    Json(ModelList {
        object: "list",
        data: names().map(|id| model(&server, id)).collect(),
        has_more: false,
        first_id: names().next().map(str::to_owned),
        last_id: names().last().map(str::to_owned),
        models: names().map(|id| CatalogEntry::new(id, context, reasons)).collect(),
    })
}

/// `GET /v1/models/{id}`; an id may hold slashes.
pub(crate) async fn retrieve(
    State(server): State<Arc<Server>>,
    Path(id): Path<String>,
) -> Result<Json<Model>, ApiError> {
    let id = server.model_name(Some(&id))?;
    Ok(Json(model(&server, &id)))
}
