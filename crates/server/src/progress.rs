//! What a client hears before the first token: its place in line, how much of its prompt is read.

use std::fmt;
use std::time::Duration;

use serde_json::{Value, json};

/// How often it hears, at most.
pub(crate) const INTERVAL: Duration = Duration::from_millis(500);

/// How far a request has come that says nothing yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// It waits.
    Queued {
        /// Its place in line, from 1 on.
        position: usize,
    },
    /// Its prompt is being read.
    Prefill {
        /// Tokens read, or found in the cache.
        done: usize,
        /// Tokens of the prompt.
        total: usize,
    },
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Queued { position } => write!(f, "queued position={position}"),
            Self::Prefill { done, total } => write!(f, "prefill {done}/{total}"),
        }
    }
}

/// Appends it as a comment of a stream of events, which parsers pass over.
pub(crate) fn comment(progress: Progress, out: &mut Vec<u8>) {
    out.extend_from_slice(format!(": {progress}\n\n").as_bytes());
}

/// The same for a WebSocket, which has no comments: an event of a type that clients do not know and pass over.
pub(crate) fn event(progress: Progress, response_id: &str, stream_id: Option<&str>) -> Value {
    let mut event = match progress {
        Progress::Queued { position } => json!({"state": "queued", "position": position}),
        Progress::Prefill { done, total } => json!({"state": "prefill", "done": done, "total": total}),
    };
    event["type"] = "rudder.progress".into();
    event["response_id"] = response_id.into();
    if let Some(stream_id) = stream_id {
        event["stream_id"] = stream_id.into();
    }
    event
}
