//! The front over a real engine and tokenizer: requests in, HTTP answers out.

mod common;
mod connections;
mod dashboard;
mod generation;
mod legal;
mod messages;
mod models;
mod prediction;
mod prompts;
mod refusals;
mod responses;
mod sessions;
mod sockets;
mod steering;
mod stored;
mod structured;
mod tools;
mod urgency;
