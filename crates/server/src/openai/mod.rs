//! OpenAI's dialect: chat completions, completions, models, and the error shape all dialects use.

pub(crate) mod chat;
pub(crate) mod completions;
mod error;
mod logprobs;
pub(crate) mod messages;
pub(crate) mod models;
pub(crate) mod params;
pub(crate) mod types;

pub use error::ApiError;
