//! OpenAI's dialect: chat completions, completions, models, and the error shape all dialects use.

mod catalog;
pub(crate) mod chat;
mod chat_answer;
pub(crate) mod completions;
mod error;
pub(crate) mod format;
pub(crate) mod logprobs;
pub(crate) mod messages;
pub(crate) mod models;
pub(crate) mod params;
mod prediction;
pub(crate) mod tools;
pub(crate) mod types;

pub use error::ApiError;
