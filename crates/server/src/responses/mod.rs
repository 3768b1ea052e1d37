//! OpenAI's Responses API: over HTTP, streamed or whole, and over WebSocket, with steering.
//!
//! ```text
//! request (fields) -> items (messages) -> turn -> run (task) -> events -> live (log) -> SSE, WebSocket, GET
//! ```

mod background;
pub(crate) mod compact;
pub(crate) mod conversations;
pub(crate) mod create;
pub(crate) mod events;
pub(crate) mod items;
mod listing;
pub(crate) mod live;
mod rebuild;
pub(crate) mod request;
pub(crate) mod retrieve;
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
use std::time::Duration;

use create::Previous;
use live::{Live, Registry};
use rudder_engine::Places;
use seal::Seal;
use serde_json::Value;
use store::{History, Store, StoreConfig};
use types::{Link, Record};

use crate::admission::Owner;
use crate::openai::ApiError;

/// After the last answer is generated, how long responses may take to come to their ends.
const SETTLE: Duration = Duration::from_secs(2);

/// What the Responses API keeps between requests.
pub(crate) struct Responses {
    /// Seals reasoning and summaries.
    pub seal: Arc<Seal>,
    /// Responses that run or ended lately.
    pub registry: Registry,
    /// Background responses that the engine has no place for yet.
    waiting: Arc<Places>,
    /// Responses and conversations that outlive the process.
    pub store: Store,
}

impl Responses {
    /// What is stored already, and the data folder's key, or one for as long as this process runs.
    ///
    /// # Panics
    /// If the system has no randomness to give.
    pub fn new(config: &StoreConfig) -> Self {
        let kept = config.folder.as_deref().and_then(|folder| {
            let warn = |error: &std::io::Error| {
                tracing::warn!(%error, "reasoning that clients keep will not be understood after a restart");
            };
            Seal::of_folder(folder).inspect_err(warn).ok()
        });
        let seal = kept.unwrap_or_else(|| Seal::random().expect("a key needs the system's randomness"));
        Self {
            seal: Arc::new(seal),
            registry: Registry::default(),
            waiting: Arc::new(Places::new(background::MAX_WAITING)),
            store: Store::open(config),
        }
    }

    /// A response has been created. In the background it is on disk before its client hears of it.
    pub async fn started(&self, live: &Arc<Live>) {
        self.registry.add(live.clone());
        if let Some(record) = record(live) {
            let written = self.store.insert(live.ask.owner, record).await;
            if live.ask.settings.echo.background {
                // A failure is counted and logged; the response runs all the same.
                let _ = written.done().await;
            }
        }
    }

    /// A response has ended.
    pub async fn ended(&self, live: &Arc<Live>) {
        let Some(record) = record(live) else {
            self.add_to_conversation(live).await;
            return self.registry.ended(live, live.is_kept());
        };
        self.store.update(live.ask.owner, record).await;
        self.registry.ended(live, true);
    }

    /// What a response that is not stored adds to its conversation.
    async fn add_to_conversation(&self, live: &Live) {
        use types::Status::{Completed, Incomplete};
        if let Some(conversation) = live.ask.settings.conversation()
            && let Some(link) = live.link()
            && matches!(live.state().recorder.response().status, Completed | Incomplete)
        {
            let items = link.input.iter().chain(&link.output).cloned().collect();
            // A failure is counted and logged.
            let _ = self.store.append(live.ask.owner, conversation, items).await;
        }
    }

    /// What a request goes on from that names a response or a conversation.
    ///
    /// # Errors
    /// If it is not there, or cannot be gone on from.
    pub async fn context(
        &self,
        owner: Owner,
        previous: Option<&str>,
        conversation: Option<&str>,
    ) -> Result<Previous, ApiError> {
        match (previous, conversation) {
            (Some(id), _) => self.previous(owner, id).await,
            (None, Some(id)) => {
                let items = self.store.conversation_items(owner, id).await?;
                let items = items.ok_or_else(|| conversations::not_found(id).at("conversation"))?;
                let link = Link::new(None, items, Vec::new(), Some(id.into()));
                Ok(Previous { link: Some(Arc::new(link)), live: None })
            }
            (None, None) => Ok(Previous::default()),
        }
    }

    /// What a request goes on from that names this response.
    ///
    /// # Errors
    /// If there is none, or it has not ended well.
    pub async fn previous(&self, owner: Owner, id: &str) -> Result<Previous, ApiError> {
        if let Some(live) = self.registry.get(id).filter(|live| live.ask.owner == owner) {
            let link = live.link().ok_or_else(|| not_found(id))?;
            return Ok(Previous { link: Some(link), live: Some(live) });
        }
        match self.store.history(owner, id).await? {
            History::Found(link) => Ok(Previous { link: Some(link), live: None }),
            History::Missing => Err(not_found(id)),
        }
    }

    /// A response of the owner's that GET may show and that is in memory with all of its events.
    pub fn stored_live(&self, owner: Owner, id: &str) -> Option<Arc<Live>> {
        let whole = |live: &Live| {
            let state = live.state();
            state.recorder.events_from(0).len() == state.recorder.count()
        };
        let live = self.registry.get(id)?;
        (live.ask.owner == owner && live.ask.settings.echo.store && whole(&live)).then_some(live)
    }

    /// The same, or the successor of one that was steered, of which its client may know the id alone: waits
    /// for it to be created.
    pub async fn shown_live(&self, owner: Owner, id: &str) -> Option<Arc<Live>> {
        let found = self.registry.find(id).await?;
        let successor = (found.ask.owner == owner && found.ask.steered).then_some(found);
        successor.or_else(|| self.stored_live(owner, id))
    }

    /// An input or output item that is still known.
    pub fn item(&self, owner: Owner, id: &str) -> Option<Value> {
        self.registry.item(owner, id)
    }

    /// Waits until what has ended is stored.
    pub async fn settle(&self) {
        let all_ended = async {
            for live in self.registry.running() {
                live.ended().await;
            }
        };
        // Those that do not end are found at the next start.
        let _ = tokio::time::timeout(SETTLE, all_ended).await;
        self.store.flush().await;
    }
}

/// What is to be stored of a response, if anything.
fn record(live: &Live) -> Option<Record> {
    if !live.ask.settings.echo.store {
        return None;
    }
    live.record().inspect_err(|error| tracing::error!(%error, "a response could not be serialised")).ok()
}

/// 400 for a response to go on from.
pub(crate) fn not_found(id: &str) -> ApiError {
    let message = format!("Previous response with id `{id}` not found.");
    ApiError { code: Some("previous_response_not_found"), ..ApiError::param("previous_response_id", message) }
}
