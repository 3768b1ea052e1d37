//! A choice's text read as an answer: reasoning, text and calls, streamed and whole from one reader.

use std::sync::Arc;

use rudder_text::{OutputEvent, OutputFormat, OutputParser, Tool};

use crate::admission::random_id;
use crate::conversation::{Message, Piece, Role, ToolCall};
use crate::verbatim::{Prefix, Verbatim};

/// How the answers of one turn are read.
pub(crate) struct Reading {
    pub format: OutputFormat,
    /// Tools whose calls are looked for.
    pub tools: Arc<[Tool]>,
    /// The end of the rendered prompt, in which reasoning may have been opened.
    pub prompt_tail: String,
    /// End the answer with its first call.
    pub single_call: bool,
    /// Where answers are kept, and the conversation that they follow.
    pub memory: Arc<Verbatim>,
    pub conversation: Prefix,
}

impl Reading {
    /// Keeps an answer's tokens for the turns to come.
    pub fn remember(&self, answer: &Message, tokens: Vec<u32>) {
        if !tokens.is_empty() {
            self.memory.keep(self.memory.after(self.conversation, answer), tokens.into());
        }
    }
}

impl std::fmt::Debug for Reading {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reading").field("format", &self.format).finish_non_exhaustive()
    }
}

/// Reads one answer.
pub(crate) struct AnswerReader {
    parser: OutputParser,
    events: Vec<OutputEvent>,
    custom: Vec<String>,
    single_call: bool,
    answer: Message,
    reasoning_tokens: usize,
    reasons: bool,
}

impl AnswerReader {
    pub fn new(reading: &Reading) -> Self {
        let custom = reading.tools.iter().filter(|tool| tool.is_custom());
        Self {
            parser: OutputParser::new(reading.format, &reading.tools, &reading.prompt_tail),
            events: Vec::new(),
            custom: custom.map(|tool| tool.name.clone()).collect(),
            single_call: reading.single_call,
            answer: Message::new(Role::Assistant, ""),
            reasoning_tokens: 0,
            reasons: false,
        }
    }

    /// What was said so far.
    pub fn answer(&self) -> &Message {
        &self.answer
    }

    /// Tokens spent on reasoning so far.
    pub fn reasoning_tokens(&self) -> usize {
        self.reasoning_tokens
    }

    /// Whether the text so far ends within a call.
    pub fn in_call(&self) -> bool {
        self.parser.in_call()
    }

    /// Reads the text of one token; returns whether the answer is over.
    pub fn token(&mut self, text: &str, pieces: &mut Vec<Piece>) -> bool {
        self.parser.push(text, &mut self.events);
        if let Some(event) = self.events.last() {
            self.reasons = matches!(event, OutputEvent::Reasoning(_));
        }
        self.reasoning_tokens += usize::from(self.reasons);
        self.take_events(pieces)
    }

    /// Reads the end of the text, of which `rest` was held back.
    pub fn finish(&mut self, rest: &str, pieces: &mut Vec<Piece>) {
        self.parser.push(rest, &mut self.events);
        self.parser.finish(&mut self.events);
        self.take_events(pieces);
    }

    fn take_events(&mut self, pieces: &mut Vec<Piece>) -> bool {
        // The buffer returns, so that reading a token allocates none.
        let mut events = std::mem::take(&mut self.events);
        let mut over = false;
        for event in events.drain(..) {
            let piece = match event {
                OutputEvent::Reasoning(text) => {
                    self.answer.reasoning.get_or_insert_default().push_str(&text);
                    Piece::Reasoning(text)
                }
                OutputEvent::Text(text) => {
                    self.answer.text.push_str(&text);
                    Piece::Text(text)
                }
                OutputEvent::CallBegin { name } => {
                    let custom = self.custom.contains(&name);
                    let id = random_id("call_");
                    let call = ToolCall { id: id.clone(), name: name.clone(), input: String::new(), custom };
                    self.answer.calls.push(call);
                    Piece::CallBegin { id, name, custom }
                }
                OutputEvent::CallInput(text) => {
                    if let Some(call) = self.answer.calls.last_mut() {
                        call.input.push_str(&text);
                    }
                    Piece::CallInput(text)
                }
                OutputEvent::CallEnd => Piece::CallEnd,
            };
            over = self.single_call && piece == Piece::CallEnd;
            append(piece, pieces);
            if over {
                break;
            }
        }
        self.events = events;
        over
    }
}

/// Joins what came in one go.
fn append(piece: Piece, pieces: &mut Vec<Piece>) {
    match (pieces.last_mut(), piece) {
        (Some(Piece::Reasoning(last)), Piece::Reasoning(text))
        | (Some(Piece::Text(last)), Piece::Text(text))
        | (Some(Piece::CallInput(last)), Piece::CallInput(text)) => last.push_str(&text),
        (_, piece) => pieces.push(piece),
    }
}
