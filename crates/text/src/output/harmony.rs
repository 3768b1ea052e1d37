//! gpt-oss's harmony: messages with a header that says where their text goes.
//!
//! ```text
//! <|channel|>analysis<|message|>..<|end|><|start|>assistant<|channel|>commentary to=functions.f
//! <|constrain|>json<|message|>{..}<|call|>
//! ```

use std::sync::Arc;

use super::answer::Answer;
use super::json_input::{JsonInput, Take};
use super::sink::Sink;
use super::tags::{Tag, Tagged};
use super::tools::Offered;
use super::{OutputEvent, OutputFormat, ReasoningFormat, ToolFormat, syntax};

const START: &str = "<|start|>";
const CHANNEL: &str = "<|channel|>";
const MESSAGE: &str = "<|message|>";

/// The marks of the format.
pub(super) const MARKS: [&str; 7] =
    [START, CHANNEL, "<|constrain|>", MESSAGE, "<|end|>", "<|call|>", "<|return|>"];

/// What ends a text. `<|end|>` alone may be a word of the text.
const ENDS: [&str; 7] = [
    "<|end|><|start|>",
    "<|call|>",
    "<|return|>",
    "<|start|>assistant",
    "<|channel|>analysis",
    "<|channel|>commentary",
    "<|channel|>final",
];

/// Headers are no longer than this, in bytes.
const MAX_HEADER: usize = 512;

/// Reads messages.
pub(super) struct Harmony {
    format: OutputFormat,
    tools: Arc<Offered>,
    state: State,
    tag: Tag,
    /// What the prompt held of a call, due with the first text.
    early: Vec<OutputEvent>,
    /// Whether text, and whether reasoning came in an earlier message, from which more is parted.
    said: [bool; 2],
    /// Whether the message has said nothing yet.
    fresh: bool,
    /// Space that belongs to a text only if more of it follows.
    space: String,
}

enum State {
    Header(String),
    Text(Box<Answer>),
    Reasoning,
    /// Before a custom tool's input, which may be text or an object.
    Custom,
    Call(JsonInput),
    /// A custom tool's text, or what follows an object.
    Raw {
        custom: bool,
    },
}

impl Harmony {
    /// `prompt`: the end of the rendered prompt, in which a message has begun.
    pub(super) fn new(format: OutputFormat, tools: Arc<Offered>, prompt: &str) -> Self {
        let open = prompt.rsplit_once(START).map_or("", |(_, open)| open);
        let mut harmony = Self {
            format,
            tools,
            state: State::Header(String::new()),
            tag: Tag::default(),
            early: Vec::new(),
            said: [false; 2],
            fresh: true,
            space: String::new(),
        };
        let mut early = Vec::new();
        harmony.push(open, &mut Sink::new(&mut early));
        if harmony.in_call() {
            harmony.early = early;
        }
        harmony
    }

    pub(super) fn push(&mut self, text: &str, out: &mut Sink<'_>) {
        out.extend(std::mem::take(&mut self.early));
        for c in text.chars() {
            self.push_char(c, out);
        }
    }

    /// Whether the text so far ends in a call, or in what may become one.
    pub(super) fn in_call(&self) -> bool {
        match &self.state {
            State::Header(header) => header.contains("to="),
            State::Text(answer) => answer.in_call(),
            State::Reasoning => false,
            State::Custom | State::Call(_) | State::Raw { .. } => true,
        }
    }

    pub(super) fn finish(&mut self, ended: bool, out: &mut Sink<'_>) {
        let cut = std::mem::take(&mut self.tag.seen);
        // The last mark may have been cut, or its second half.
        if !cut.starts_with("<|end|>") {
            cut.chars().for_each(|c| self.body(c, out));
        }
        match &mut self.state {
            State::Header(header) => {
                if !header.contains(CHANNEL) && !header.contains("to=") {
                    out.text(header);
                }
            }
            State::Text(answer) => answer.finish(out),
            State::Reasoning if !self.fresh => out.reasoning(&self.space),
            // What ends a call is a stop token, and none of the text. An object is whole without.
            State::Raw { custom } if ended || !*custom => {
                let custom = *custom;
                self.end_call(custom, out);
            }
            State::Raw { .. } => out.input(&self.space),
            State::Custom if ended => out.end(),
            State::Call(input) if ended => {
                if input.finish(out) {
                    out.end();
                }
            }
            State::Reasoning | State::Custom | State::Call(_) => {}
        }
    }

    fn end_call(&mut self, custom: bool, out: &mut Sink<'_>) {
        if custom {
            out.input(self.space.strip_suffix('\n').unwrap_or(&self.space));
        }
        out.end();
    }

    fn push_char(&mut self, c: char, out: &mut Sink<'_>) {
        if let State::Header(header) = &mut self.state {
            header.push(c);
            return self.header(out);
        }
        if let State::Call(input) = &self.state
            && input.in_string()
        {
            return self.body(c, out);
        }
        match self.tag.push(c, &ENDS) {
            Tagged::More => {}
            Tagged::Found(end) => self.end(ENDS[end], out),
            Tagged::No if self.tag.is_empty() => self.body(c, out),
            Tagged::No => {
                let seen = std::mem::take(&mut self.tag.seen);
                seen.chars().for_each(|c| self.body(c, out));
                // Marks share no characters: only the last one may begin another.
                self.push_char(c, out);
            }
        }
    }

    /// Looks at the header so far.
    fn header(&mut self, out: &mut Sink<'_>) {
        let State::Header(header) = &self.state else { return };
        if let Some(header) = header.strip_suffix(MESSAGE) {
            let header = header.to_owned();
            return self.message(&header, out);
        }
        let begun = header.trim_start();
        let begun = begun.strip_prefix(START).unwrap_or(begun);
        let begun = begun.strip_prefix("assistant").unwrap_or(begun).trim_start();
        let fits = |start: &str| begun.starts_with(start) || start.starts_with(begun);
        let fits = fits(CHANNEL) || fits("to=") || "assistant".starts_with(begun) || START.starts_with(begun);
        if fits && header.len() < MAX_HEADER {
            return;
        }
        // No header: the markup was left out.
        let mut answer = self.answer();
        answer.push(header, out);
        self.state = State::Text(answer);
        self.said[0] = true;
        self.fresh = false;
    }

    /// A message begins.
    fn message(&mut self, header: &str, out: &mut Sink<'_>) {
        let after = |mark: &str| {
            let (_, rest) = header.split_once(mark)?;
            let end = rest.find(|c: char| c.is_whitespace() || c == '<').unwrap_or(rest.len());
            Some(&rest[..end])
        };
        self.space.clear();
        self.fresh = true;
        if let Some(name) = after("to=").and_then(|recipient| self.tool(recipient)) {
            out.begin(&name);
            self.state = match self.tools.is_custom(&name) {
                true => State::Custom,
                false => State::Call(JsonInput::new(false, "")),
            };
            return;
        }
        let reasons = self.format.reasoning == Some(ReasoningFormat::Harmony);
        self.state = match after(CHANNEL) == Some("analysis") && reasons {
            true => State::Reasoning,
            false => State::Text(self.answer()),
        };
    }

    fn answer(&self) -> Box<Answer> {
        Box::new(Answer::new(syntax::marks(self.format, &self.tools), self.tools.clone(), None))
    }

    /// The tool that a recipient means; what is none of ours is not called.
    fn tool(&self, recipient: &str) -> Option<String> {
        if self.format.tools != Some(ToolFormat::Harmony) || self.tools.is_empty() {
            return None;
        }
        match recipient.strip_prefix("functions.") {
            Some(name) => (!name.is_empty()).then(|| name.to_owned()),
            None => self.tools.has(recipient).then(|| recipient.to_owned()),
        }
    }

    fn body(&mut self, c: char, out: &mut Sink<'_>) {
        let mut buffer = [0; 4];
        let text: &str = c.encode_utf8(&mut buffer);
        match &mut self.state {
            State::Header(_) => {}
            State::Text(answer) => {
                if std::mem::take(&mut self.fresh) && std::mem::replace(&mut self.said[0], true) {
                    answer.push("\n\n", out);
                }
                answer.push(text, out);
            }
            State::Reasoning | State::Custom | State::Raw { .. } if c.is_whitespace() => self.space.push(c),
            State::Reasoning => {
                let first = std::mem::take(&mut self.fresh);
                if !first {
                    out.reasoning(&self.space);
                } else if std::mem::replace(&mut self.said[1], true) {
                    out.reasoning("\n\n");
                }
                self.space.clear();
                out.reasoning(text);
            }
            State::Custom if c == '{' => {
                let mut input = JsonInput::new(true, "");
                input.push(c, out);
                self.state = State::Call(input);
            }
            State::Custom => {
                out.input(self.space.strip_prefix('\n').unwrap_or(&self.space));
                self.space.clear();
                out.input(text);
                self.state = State::Raw { custom: true };
            }
            State::Call(input) => match input.push(c, out) {
                Take::More => {}
                take => {
                    self.state = State::Raw { custom: false };
                    if take == Take::Past {
                        self.body(c, out);
                    }
                }
            },
            State::Raw { .. } => {
                out.input(&self.space);
                self.space.clear();
                out.input(text);
            }
        }
    }

    /// A mark ended the message.
    fn end(&mut self, mark: &str, out: &mut Sink<'_>) {
        match &mut self.state {
            State::Text(answer) => {
                answer.finish(out);
                if answer.is_cut() {
                    out.end();
                }
            }
            State::Raw { custom } => {
                let custom = *custom;
                self.end_call(custom, out);
            }
            State::Custom => out.end(),
            State::Call(input) => {
                input.finish(out);
                out.end();
            }
            State::Header(_) | State::Reasoning => {}
        }
        self.space.clear();
        let header = if mark.starts_with(CHANNEL) { mark } else { "" };
        self.state = State::Header(header.to_owned());
    }
}
