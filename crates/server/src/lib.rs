//! The HTTP front: one module per API dialect, admission, metrics.
//!
//! ```text
//! router -> admission (page, key, draining, request id) -> a dialect's handler
//!        -> prompt (template, tokens) -> generate (engine, text) -> JSON or SSE
//! ```
//!
//! [`Generator`] and its terms know no dialect: the terminal conversation uses them too.

mod admission;
mod answer;
mod anthropic;
mod body;
mod choice;
mod conversation;
mod dashboard;
mod effort;
mod forced;
mod generate;
mod grammar;
mod health;
mod infill;
mod message_cache;
mod metrics;
mod openai;
mod progress;
mod prompt;
mod prompt_cache;
mod responses;
mod serve;
mod session;
mod session_metrics;
mod sessions;
mod sse;
mod template_view;
mod text_places;
mod tier_metrics;
mod timing;
mod tokenize;
mod tool_names;
mod turn;
mod urgency;
mod verbatim;
mod web_pages;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::Body;
use axum::extract::DefaultBodyLimit;
use axum::http::{Method, Uri};
use axum::middleware::{from_fn, from_fn_with_state, map_request_with_state};
use axum::routing::{get, post};
use rudder_engine::Engine;
use rudder_text::{OutputFormat, ReasoningFormat, Text, ToolFormat};

pub use conversation::{AnswerFormat, KnownMessage, Message, Piece, Role, ToolCall, Turn};
pub use forced::ForcedCall;
pub use generate::{Completion, Delta, End, EndReason, Failed, Generator, Running, Totals};
pub use openai::ApiError;
pub use progress::Progress;
pub use responses::store::StoreConfig;
pub use serve::{serve, terminated};
pub use session::Origin;
pub use urgency::Urgency;

/// How the front is set up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerConfig {
    /// The name under which the model is served.
    pub model: String,
    /// Further names that clients may use for it; one that ends with `*` stands for all that begin so.
    pub aliases: Vec<String>,
    /// Keys of which a client must show one; none means that everyone is let in but web pages from elsewhere.
    pub api_keys: Vec<String>,
    /// What each of them weighs, in their order, where the machine is shared; 1 for those beyond.
    pub key_weights: Vec<u32>,
    /// Largest request body.
    pub max_body_bytes: usize,
    /// Longest pause between two pieces of a request body.
    pub body_pause: Duration,
    /// Most stop strings of a request.
    pub max_stops: usize,
    /// Largest `n`.
    pub max_choices: usize,
    /// Longest silence of a stream: after it comes an SSE comment, so that clients do not time out.
    pub keep_alive: Duration,
    /// How tool calls are read, where the chat template tells it wrong; `Some(None)` reads none.
    pub tool_parser: Option<Option<ToolFormat>>,
    /// How reasoning is read, likewise.
    pub reasoning_parser: Option<Option<ReasoningFormat>>,
    /// For tests with real clients, whose tasks need a certain call that a small model would not make:
    /// calls that are made for it, by grammar, where they are offered. Without any, nothing changes.
    pub forced_calls: Vec<ForcedCall>,
    /// How long running requests may go on after a signal to end.
    pub grace: Duration,
    /// Where responses and conversations are stored.
    pub store: StoreConfig,
}

impl ServerConfig {
    /// The defaults, for a model served as `model`.
    pub fn new(model: impl Into<String>) -> Self {
        Self {
            model: model.into(),
            aliases: Vec::new(),
            api_keys: Vec::new(),
            key_weights: Vec::new(),
            max_body_bytes: 32 << 20,
            body_pause: Duration::from_secs(30),
            max_stops: 16,
            max_choices: 16,
            keep_alive: Duration::from_secs(5),
            tool_parser: None,
            reasoning_parser: None,
            forced_calls: Vec::new(),
            grace: Duration::from_secs(30),
            store: StoreConfig::default(),
        }
    }

    /// All names of the model, its own first; those that stand for many are left out.
    pub fn model_names(&self) -> impl Iterator<Item = &str> {
        let names = std::iter::once(&self.model).chain(&self.aliases).map(String::as_str);
        names.filter(|name| !name.ends_with('*'))
    }

    /// Whether the model is also called `name`.
    fn is_model(&self, name: &str) -> bool {
        let begins = |alias: &String| alias.strip_suffix('*').is_some_and(|begin| name.starts_with(begin));
        self.model_names().any(|own| own == name) || self.aliases.iter().any(begins)
    }
}

/// A model being served: what every handler sees.
pub struct Server {
    pub(crate) config: ServerConfig,
    pub(crate) generator: Generator,
    pub(crate) markup: prompt::Markup,
    /// How the model's answers are read.
    pub(crate) format: OutputFormat,
    /// How its template is shown conversations.
    pub(crate) view: template_view::View,
    /// What the model said, for the turns to come.
    pub(crate) verbatim: Arc<verbatim::Verbatim>,
    /// What clients said, as it was read.
    pub(crate) messages: message_cache::MessageCache,
    /// Their conversations in tokens.
    pub(crate) prompts: prompt_cache::PromptCache,
    pub(crate) responses: responses::Responses,
    /// Bodies that are on their way.
    pub(crate) receiving: Arc<body::Receiving>,
    draining: AtomicBool,
    /// Unix time of the start.
    pub(crate) created: u64,
}

impl Server {
    /// Serves a model's text and the engine that runs it.
    pub fn new(config: ServerConfig, text: Text, engine: Engine) -> Arc<Self> {
        let markup = prompt::Markup::of(&text);
        let own = text.output_format();
        let format = OutputFormat {
            tools: config.tool_parser.unwrap_or(own.tools),
            reasoning: config.reasoning_parser.unwrap_or(own.reasoning),
        };
        let view = template_view::View::of(&text, format);
        Arc::new(Self {
            generator: Generator::new(&config.model, text, engine).with_weights(admission::weights(&config)),
            markup,
            format,
            view,
            verbatim: Arc::new(verbatim::Verbatim::new()),
            messages: message_cache::MessageCache::new(),
            prompts: prompt_cache::PromptCache::new(),
            responses: responses::Responses::new(&config.store),
            receiving: Arc::default(),
            config,
            draining: AtomicBool::new(false),
            created: unix_now(),
        })
    }

    /// Whether a signal to end has come.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    pub(crate) fn drain(&self) {
        self.draining.store(true, Ordering::Release);
    }

    /// Checks the model that a request names and returns the name to answer with. A request that
    /// names none means the one there is.
    pub(crate) fn model_name(&self, asked: Option<&str>) -> Result<String, ApiError> {
        match asked {
            None => Ok(self.config.model.clone()),
            Some(asked) if self.config.is_model(asked) => Ok(asked.to_owned()),
            Some(asked) => Err(ApiError::unknown_model(asked, &self.config.model)),
        }
    }
}

/// Seconds since 1970.
pub(crate) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn conversations() -> Router<Arc<Server>> {
    use responses::conversations as handlers;
    Router::new()
        .route("/v1/conversations", post(handlers::create))
        .route(
            "/v1/conversations/{id}",
            get(handlers::retrieve).post(handlers::update).delete(handlers::delete),
        )
        .route("/v1/conversations/{id}/items", get(handlers::list_items).post(handlers::add_items))
        .route(
            "/v1/conversations/{id}/items/{item}",
            get(handlers::retrieve_item).delete(handlers::delete_item),
        )
}

fn sessions() -> Router<Arc<Server>> {
    use sessions as handlers;
    Router::new()
        .route("/v1/sessions", get(handlers::list))
        .route("/v1/sessions/{id}", get(handlers::retrieve).delete(handlers::delete))
        .route("/v1/sessions/{id}/pin", post(handlers::pin))
        .route("/v1/sessions/{id}/unpin", post(handlers::unpin))
}

/// All routes of a server.
pub fn router(server: Arc<Server>) -> Router {
    let limit = server.config.max_body_bytes;
    Router::new()
        .route("/v1/chat/completions", post(openai::chat::create))
        .route("/v1/completions", post(openai::completions::create))
        .route("/v1/messages", post(anthropic::messages::create))
        .route("/v1/messages/count_tokens", post(anthropic::messages::count_tokens))
        .route("/api/hello", get(anthropic::messages::hello))
        .route("/v1/responses", post(responses::create::create).get(responses::socket::connect))
        .route("/v1/responses/compact", post(responses::compact::compact))
        .route("/v1/responses/input_tokens", post(responses::compact::input_tokens))
        .route("/v1/responses/{id}", get(responses::retrieve::retrieve).delete(responses::retrieve::delete))
        .route("/v1/responses/{id}/cancel", post(responses::retrieve::cancel))
        .route("/v1/responses/{id}/input_items", get(responses::retrieve::input_items))
        .route("/v1/responses/{id}/steer", post(responses::steer_post::steer))
        .merge(conversations())
        .merge(sessions())
        .route("/v1/models", get(openai::models::list))
        .route("/v1/models/{*model}", get(openai::models::retrieve))
        .route("/infill", post(infill::create))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/health", get(health::health))
        .route("/ready", get(health::ready))
        .route("/version", get(health::version))
        .route("/metrics", get(health::metrics))
        .route("/dashboard", get(dashboard::page))
        .fallback(async |method: Method, uri: Uri, body: Body| {
            body::discard(body).await;
            ApiError::unknown_route(method.as_str(), uri.path())
        })
        .method_not_allowed_fallback(async |method: Method, uri: Uri, body: Body| {
            body::discard(body).await;
            ApiError::wrong_method(method.as_str(), uri.path())
        })
        .layer(DefaultBodyLimit::max(limit))
        .layer(body::pause_limit(&server.config))
        .layer(map_request_with_state(server.clone(), body::bound))
        .layer(from_fn_with_state(server.clone(), admission::admit))
        .layer(from_fn(anthropic::reword))
        .layer(web_pages::cors(&server.config))
        .layer(from_fn(admission::request_id))
        .with_state(server)
}
