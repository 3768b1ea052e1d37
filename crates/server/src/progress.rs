//! What a client hears before the first token: its place in line, how much of its prompt is read.

use std::fmt;
use std::time::Duration;

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
