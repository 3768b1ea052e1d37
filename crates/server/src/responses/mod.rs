//! OpenAI's Responses API: over HTTP, streamed or whole, and over WebSocket, with steering.
//!
//! ```text
//! request (fields) -> items (messages) -> turn -> run (task) -> events -> live (log) -> SSE, WebSocket, GET
//! ```

pub(crate) mod events;
pub(crate) mod items;
pub(crate) mod live;
pub(crate) mod request;
pub(crate) mod seal;
pub(crate) mod steer;
pub(crate) mod tools;
pub(crate) mod types;

use std::sync::Arc;

use live::Registry;
use seal::Seal;

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
}
