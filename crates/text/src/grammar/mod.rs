//! Structured output: grammars that generated tokens are held to.
//!
//! [`Text::compile_grammar`] makes a [`CompiledGrammar`] of a [`GrammarSpec`]; each sequence walks it
//! with a [`GrammarState`] of its own. [`Text::answer_grammar`] writes the specification for an answer
//! that may reason and call tools. llguidance does the parsing; token trie, tokenizer, limits and
//! the grammars of tool calls are ours.

mod answer;
mod cache;
mod compile;
mod state;
mod string_check;
mod vocabulary;

use serde_json::Value;

pub use answer::AnswerRules;
pub use state::{CompiledGrammar, GrammarState};

pub(crate) use compile::Grammars;
pub(crate) use string_check::StringCheck;

/// What an answer must match, as a whole.
#[derive(Debug, Clone, PartialEq)]
pub enum GrammarSpec {
    /// A JSON object.
    Json,
    /// JSON that a schema allows, its properties in the schema's order.
    JsonSchema {
        /// The schema.
        schema: Value,
        /// Whether what a grammar cannot hold the answer to (`not`, `uniqueItems`, ..) is refused;
        /// else it goes unchecked. Of `oneOf`, as of `anyOf`, at least one choice holds.
        strict: bool,
    },
    /// Text that a regular expression matches as a whole (the syntax of Rust's `regex`, without
    /// look-around; anchors at both ends may be written).
    Regex(String),
    /// Text of a grammar in Lark's syntax, as llguidance reads it; its rule `start` is the whole.
    Lark(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A grammar in Lark's syntax in which `@name` stands for the part of that name.
    Composed {
        /// The grammar of the whole.
        lark: String,
        /// The parts.
        parts: Vec<GrammarPart>,
    },
}

/// A part of a composed grammar.
#[derive(Debug, Clone, PartialEq)]
pub struct GrammarPart {
    /// How the whole refers to it.
    pub name: String,
    /// What it must match; not composed itself.
    pub grammar: GrammarSpec,
    /// How JSON in it is laid out.
    pub layout: JsonLayout,
}

/// How generated JSON is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JsonLayout {
    /// As the model likes, within bounds.
    Loose,
    /// As chat templates write it, so that whatever is no value is forced.
    OneLine,
}

/// A grammar cannot be used; the client is to change it, unless it is told otherwise. The message says how.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// It is wrong, or contains what is not supported.
    #[error("the grammar cannot be used: {0}")]
    Invalid(String),
    /// It is too large.
    #[error("the grammar is too large ({0}); simplify it or split the task")]
    TooLarge(String),
    /// Compiling it takes too long.
    #[error("the grammar took longer than {} ms to compile; simplify it (fewer alternatives, smaller counts)", .0.as_millis())]
    TooSlow(std::time::Duration),
    /// Too many others are being compiled: the client is to try again.
    #[error("other grammars are being compiled, and none was done within {} ms; send the request again", .0.as_millis())]
    Busy(std::time::Duration),
    /// This model's vocabulary cannot be used with grammars.
    #[error("this model cannot be held to a grammar: {0}")]
    Unsupported(String),
}
