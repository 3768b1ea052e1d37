//! What reads the markup of calls, from its opening mark on.

use std::sync::Arc;

use super::sink::Sink;
use super::tools::Offered;

/// Makes a reader for the tools that were offered.
pub(super) type Start = fn(&Arc<Offered>) -> Box<dyn Reader>;

/// What became of a character.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Taken; more is to come.
    More,
    /// Taken, and with it the markup is closed.
    Done,
    /// Not taken: it ended a call without being part of it, and is to be given once more.
    Again,
    /// Not taken: the markup is over, or was none. What was taken since the last call, or since the
    /// mark if there was none, is text unless it is only space.
    Out,
}

/// Reads the calls after one mark. Before it begins a call it is given the benefit of the doubt; what
/// it has taken by then, its owner keeps.
pub(super) trait Reader: Send {
    /// Adds a character.
    fn push(&mut self, c: char, out: &mut Sink<'_>) -> Step;

    /// Whether what was taken since the last call is at most a beginning of the closing: no text, and no
    /// further call.
    fn closes(&self) -> bool;

    /// The end of the text. Ends a call that lacks only its closing.
    fn finish(&mut self, _out: &mut Sink<'_>) {}
}
