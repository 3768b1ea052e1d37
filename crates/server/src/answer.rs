//! A choice's text read as an answer: reasoning, text and calls, streamed and whole from one reader.

use std::ops::Range;
use std::sync::Arc;

use rudder_text::{OutputEvent, OutputFormat, OutputParser, Tool};

use crate::admission::random_id;
use crate::conversation::{Message, Piece, Role, ToolCall};
use crate::text_places::TextPlaces;
use crate::verbatim::{Answer, Prefix, Verbatim};

/// How the answers of one turn are read.
pub(crate) struct Reading {
    pub format: OutputFormat,
    /// Tools whose calls are looked for.
    pub tools: Arc<[Tool]>,
    /// The end of the rendered prompt, in which reasoning may have been opened.
    pub prompt_tail: String,
    /// What the template wrote at the prompt's end before the answer, if that is known.
    pub opening: Option<Arc<str>>,
    /// End the answer with its first call.
    pub single_call: bool,
    /// Where answers are kept, and the conversation that they follow.
    pub memory: Arc<Verbatim>,
    pub conversation: Prefix,
}

impl Reading {
    /// Keeps an answer's tokens for the turns to come, with what opened it: without that it could not stand there again.
    pub fn remember(&self, answer: &Message, tokens: Vec<u32>) {
        if let (Some(opening), false) = (&self.opening, tokens.is_empty()) {
            let conversation = self.memory.after(self.conversation, answer.digest());
            self.memory.keep(conversation, Answer { tokens: tokens.into(), opening: opening.clone() });
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
    /// The last call of the answer is whole: nothing is wanted any more but its closing mark.
    complete: bool,
    /// What follows that call is not its closing mark.
    cut: bool,
    answer: Message,
    reasoning_tokens: usize,
    reasons: bool,
    /// Only kept when log-probabilities are asked for.
    places: Option<TextPlaces>,
    /// Where texts stand that were read, in bytes, with the indices of their pieces.
    texts: Vec<(usize, Range<usize>)>,
}

impl AnswerReader {
    /// `places`: whether it is asked for where texts stand.
    pub fn new(reading: &Reading, places: bool) -> Self {
        let custom = reading.tools.iter().filter(|tool| tool.is_custom());
        Self {
            parser: OutputParser::new(reading.format, &reading.tools, &reading.prompt_tail),
            events: Vec::new(),
            custom: custom.map(|tool| tool.name.clone()).collect(),
            single_call: reading.single_call,
            complete: false,
            cut: false,
            answer: Message::new(Role::Assistant, ""),
            reasoning_tokens: 0,
            reasons: false,
            places: places.then(TextPlaces::default),
            texts: Vec::new(),
        }
    }

    /// Where texts stand that were read since the last time, in bytes, with the indices of their pieces.
    pub fn take_texts(&mut self) -> impl Iterator<Item = (usize, Range<usize>)> {
        self.texts.drain(..)
    }

    /// What was said so far.
    pub fn answer(&self) -> &Message {
        &self.answer
    }

    /// Tokens spent on reasoning so far.
    pub fn reasoning_tokens(&self) -> usize {
        self.reasoning_tokens
    }

    /// Whether the text read is that of the answer, and no more.
    pub fn is_whole(&self) -> bool {
        !self.cut
    }

    /// Whether the text so far ends within a call.
    pub fn in_call(&self) -> bool {
        self.parser.in_call()
    }

    /// Reads the text of one token; returns whether the answer is over.
    pub fn token(&mut self, text: &str, pieces: &mut Vec<Piece>) -> bool {
        self.read(text);
        if let Some(event) = self.events.last() {
            self.reasons = matches!(event, OutputEvent::Reasoning(_));
        }
        self.reasoning_tokens += usize::from(self.reasons);
        self.take_events(pieces)
    }

    /// Reads the end of the text, of which `rest` was held back. `ended`: the model ended it by itself.
    pub fn finish(&mut self, rest: &str, ended: bool, pieces: &mut Vec<Piece>) {
        self.read(rest);
        self.parser.finish(ended, &mut self.events);
        self.take_events(pieces);
    }

    fn read(&mut self, text: &str) {
        if let Some(places) = &mut self.places {
            places.read(text);
        }
        self.parser.push(text, &mut self.events);
    }

    /// Returns whether the answer is over: after its last call, and the mark that closes it, so that what is
    /// remembered of it is well-formed.
    fn take_events(&mut self, pieces: &mut Vec<Piece>) -> bool {
        // The buffer returns, so that reading a token allocates none.
        let mut events = std::mem::take(&mut self.events);
        for event in events.drain(..) {
            if self.complete {
                self.cut = true;
                break;
            }
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
            self.complete = piece == Piece::CallEnd && (self.single_call || self.repeats());
            let place = self.places.as_mut().and_then(|places| places.note(&piece));
            append(piece, pieces);
            self.texts.extend(place.map(|place| (pieces.len() - 1, place)));
        }
        self.events = events;
        self.complete && (self.cut || !self.parser.in_block())
    }

    /// Whether the last call says word for word what the one before it said, or two earlier ones did. Small
    /// models that must call go on so until their tokens run out, and nobody wants those calls.
    fn repeats(&self) -> bool {
        let Some((last, earlier)) = self.answer.calls.split_last() else { return false };
        let same = |call: &ToolCall| call.name == last.name && call.input == last.input;
        earlier.last().is_some_and(same) || earlier.iter().filter(|call| same(call)).count() >= 2
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

#[cfg(test)]
mod tests {
    use super::*;
    use rudder_text::{ToolFormat, ToolInput};

    fn reader(single_call: bool) -> AnswerReader {
        let input = ToolInput::Json { schema: serde_json::json!({}), strict: false };
        let reading = Reading {
            format: OutputFormat { tools: Some(ToolFormat::Hermes), reasoning: None },
            tools: Arc::from([Tool { name: "weather".into(), description: String::new(), input }]),
            prompt_tail: String::new(),
            opening: None,
            single_call,
            memory: Arc::new(Verbatim::new()),
            conversation: Prefix::default(),
        };
        AnswerReader::new(&reading, false)
    }

    fn call(city: &str) -> String {
        format!(r#"<tool_call>{{"name": "weather", "arguments": {{"city": "{city}"}}}}"#)
    }

    /// Calls made until the answer is over, with the city after which it was.
    fn asked(cities: &[&str]) -> (usize, Option<String>) {
        let (mut reader, mut pieces) = (reader(false), Vec::new());
        let over = cities.iter().find(|city| {
            assert!(!reader.token(&call(city), &mut pieces), "the call is not closed");
            reader.token("</tool_call>", &mut pieces)
        });
        assert!(reader.is_whole());
        (reader.answer().calls.len(), over.map(|city| (*city).to_owned()))
    }

    #[test]
    fn a_single_call_ends_with_its_closing_mark_or_before_another_call() {
        for (after, whole) in [
            ("</tool_call>", true),
            ("\n</tool_call>", true),
            (", {\"name\": \"weather\", \"arguments\": {\"city\"", false),
        ] {
            let (mut reader, mut pieces) = (reader(true), Vec::new());
            assert!(!reader.token(&call("Rome"), &mut pieces));
            let over = after.chars().any(|c| reader.token(c.encode_utf8(&mut [0; 4]), &mut pieces));
            assert_eq!((over, reader.is_whole()), (true, whole), "{after}");
            assert_eq!(reader.answer().calls.len(), 1);
            assert_eq!(pieces.last(), Some(&Piece::CallEnd), "{after}");
        }
    }

    #[test]
    fn different_calls_go_on() {
        assert_eq!(asked(&["Rome", "Oslo", "Rome", "Kyiv"]), (4, None));
    }

    #[test]
    fn a_call_said_twice_in_a_row_ends_the_answer() {
        assert_eq!(asked(&["Rome", "Oslo", "Oslo", "Kyiv"]), (3, Some("Oslo".into())));
    }

    #[test]
    fn a_call_said_for_the_third_time_ends_the_answer() {
        assert_eq!(asked(&["Rome", "Oslo", "Rome", "Kyiv", "Rome", "Bonn"]), (5, Some("Rome".into())));
    }
}
