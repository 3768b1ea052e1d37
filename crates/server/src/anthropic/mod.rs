//! Anthropic's Messages dialect: `/v1/messages`, `/v1/messages/count_tokens`, `/api/hello`.
//!
//! ```text
//! types (the body) -> request + tools (to a Turn) -> Server::start_turn
//!        -> blocks (pieces to content blocks) -> messages (one JSON, or events)
//! ```

mod blocks;
mod error;
pub(crate) mod messages;
mod request;
mod tools;
mod types;

pub(crate) use error::reword;
