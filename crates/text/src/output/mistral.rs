//! Mistral's calls after `[TOOL_CALLS]`: an array of objects, or `name[ARGS]{..}`.

use std::sync::Arc;

use super::json_calls::JsonCalls;
use super::json_input::{JsonInput, Take};
use super::reader::{Reader, Step};
use super::sink::Sink;
use super::tags::{Tag, Tagged};
use super::tools::{MAX_NAME, Offered};

/// Reads what follows one mark.
pub(super) struct MistralCalls {
    tools: Arc<Offered>,
    state: State,
    name: String,
    tag: Tag,
}

enum State {
    Open,
    Array(Box<JsonCalls>),
    Name,
    /// In the id that some versions put between name and arguments.
    Id,
    BeforeArguments,
    Arguments(JsonInput),
}

const TAGS: [&str; 2] = ["[ARGS]", "[CALL_ID]"];

impl MistralCalls {
    pub(super) fn new(tools: &Arc<Offered>) -> Self {
        Self { tools: tools.clone(), state: State::Open, name: String::new(), tag: Tag::default() }
    }

    fn name(&mut self, c: char, out: &mut Sink<'_>) -> Step {
        if self.tag.is_empty() && c != '[' {
            return match c {
                '{' if !self.name.is_empty() => self.arguments(c, out),
                c if c.is_whitespace() || c.is_control() || self.name.len() > MAX_NAME => Step::Out,
                '{' | ']' | '"' | '<' => Step::Out,
                c => {
                    self.name.push(c);
                    Step::More
                }
            };
        }
        match self.tag.push(c, &TAGS) {
            Tagged::More => return Step::More,
            Tagged::Found(0) if !self.name.is_empty() => self.state = State::BeforeArguments,
            Tagged::Found(1) if !self.name.is_empty() => self.state = State::Id,
            _ => return Step::Out,
        }
        Step::More
    }

    fn arguments(&mut self, c: char, out: &mut Sink<'_>) -> Step {
        out.begin(&self.name);
        let mut input = JsonInput::new(self.tools.is_custom(&self.name), "");
        input.push(c, out);
        self.state = State::Arguments(input);
        Step::More
    }
}

impl Reader for MistralCalls {
    fn push(&mut self, c: char, out: &mut Sink<'_>) -> Step {
        match &mut self.state {
            State::Open if c.is_whitespace() => Step::More,
            State::Open if matches!(c, '[' | '{') => {
                let mut calls = Box::new(JsonCalls::announced(&self.tools));
                let step = calls.push(c, out);
                self.state = State::Array(calls);
                step
            }
            State::Open => {
                self.state = State::Name;
                self.name(c, out)
            }
            State::Array(calls) => calls.push(c, out),
            State::Name => self.name(c, out),
            State::Id => match self.tag.push(c, &TAGS[..1]) {
                Tagged::Found(_) => {
                    self.state = State::BeforeArguments;
                    Step::More
                }
                Tagged::More => Step::More,
                Tagged::No if c.is_ascii_alphanumeric() && self.tag.is_empty() => Step::More,
                Tagged::No => Step::Out,
            },
            State::BeforeArguments if c.is_whitespace() => Step::More,
            State::BeforeArguments if matches!(c, '{' | '"') => self.arguments(c, out),
            State::BeforeArguments => Step::Out,
            State::Arguments(input) => match input.push(c, out) {
                Take::More | Take::Mark | Take::Past => Step::More,
                Take::Whole => {
                    out.end();
                    Step::Done
                }
            },
        }
    }

    fn closes(&self) -> bool {
        matches!(&self.state, State::Array(calls) if calls.closes())
    }

    fn finish(&mut self, out: &mut Sink<'_>) {
        if let State::Array(calls) = &mut self.state {
            calls.finish(out);
        }
    }
}
