//! OpenAI's Responses API: over HTTP, streamed or whole, and over WebSocket, with steering.
//!
//! ```text
//! request (fields) -> items (messages) -> turn -> run (task) -> events -> live (log) -> SSE, WebSocket, GET
//! ```

pub(crate) mod create;
pub(crate) mod events;
pub(crate) mod items;
pub(crate) mod live;
pub(crate) mod request;
pub(crate) mod run;
pub(crate) mod seal;
pub(crate) mod socket;
pub(crate) mod steer;
pub(crate) mod steer_post;
pub(crate) mod store;
pub(crate) mod stream;
pub(crate) mod tools;
pub(crate) mod types;

use std::sync::Arc;

use create::Previous;
use live::{Live, Registry};
use seal::Seal;
use serde_json::Value;

use crate::openai::ApiError;

/// What the Responses API keeps between requests.
pub(crate) struct Responses {
    /// Seals reasoning and summaries.
    pub seal: Arc<Seal>,
    /// Responses that run or ended lately.
    pub registry: Registry,
}

impl Responses {
    /// Nothing kept yet, and a key for as long as this process runs.
    ///
    /// # Panics
    /// If the system has no randomness to give.
    pub fn new() -> Self {
        let seal = Seal::random().expect("a key needs the system's randomness");
        Self { seal: Arc::new(seal), registry: Registry::default() }
    }

    /// A response has been created.
    pub fn started(&self, live: &Arc<Live>) {
        self.registry.add(live.clone());
    }

    /// A response has ended.
    pub fn ended(&self, live: &Arc<Live>) {
        // Corrections that wait, and successors, are reached through it.
        let steered = live.state().steers.successor_id.is_some();
        self.registry.ended(live, live.ask.settings.echo.store || steered);
    }

    /// What a request goes on from that names this response.
    ///
    /// # Errors
    /// If there is none, or it has not ended well.
    pub async fn previous(&self, id: &str) -> Result<Previous, ApiError> {
        let live = self.registry.get(id).ok_or_else(|| not_found(id))?;
        let link = live.link().ok_or_else(|| not_found(id))?;
        Ok(Previous { link: Some(link), live: Some(live) })
    }

    /// An input or output item that is still known.
    pub fn item(&self, id: &str) -> Option<Value> {
        self.registry.item(id)
    }
}

/// 400 for a response to go on from.
pub(crate) fn not_found(id: &str) -> ApiError {
    let message = format!("Previous response with id `{id}` not found.");
    ApiError { code: Some("previous_response_not_found"), ..ApiError::param("previous_response_id", message) }
}
