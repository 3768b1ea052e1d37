//! A call as one JSON object: `{"name": .., "arguments": ..}`, in either order.

use std::sync::Arc;

use super::json::{Scanner, Unescape, is_delimiter};
use super::json_input::{JsonInput, Take};
use super::sink::Sink;
use super::tools::{MAX_NAME, Offered};

/// Longer keys are none of a call's.
const MAX_KEY: usize = 32;

/// Whether a grammar has an object begin so that is a call of the tool of this name (Llama's).
pub(super) fn is_head(taken: &str, name: &str) -> bool {
    let name = serde_json::Value::from(name).to_string();
    let mut pieces = ["{", "\"name\"", ":", &name, ",", "\"parameters\"", ":"].into_iter();
    let rest = pieces.try_fold(taken, |rest, piece| {
        let rest = rest.strip_prefix(piece)?;
        Some(rest.strip_prefix(char::is_whitespace).unwrap_or(rest))
    });
    rest.is_some()
}

/// Reads one object. Whatever is given out has a name; before that, malformed is refused.
pub(super) struct CallObject {
    tools: Arc<Offered>,
    /// Refuses names that were not offered, and keys that no call has before its arguments: nothing else says
    /// that this is a call.
    strict: bool,
    mark: &'static str,
    state: State,
    key: String,
    name: Option<String>,
    /// Arguments that came before the name.
    early: Option<String>,
    input: JsonInput,
    pub(super) begun: bool,
    /// Whether the arguments are whole.
    given: bool,
    scanner: Scanner,
    unescape: Unescape,
}

enum State {
    Open,
    Key {
        first: bool,
    },
    InKey,
    Colon,
    Value,
    InName(String),
    Input,
    /// A value that is not for now: kept as early arguments, or skipped.
    Container {
        keep: bool,
    },
    Literal {
        keep: bool,
    },
    After,
}

impl CallObject {
    /// `mark`: what ends the call even in the midst of its arguments; empty if nothing does.
    pub(super) fn new(tools: Arc<Offered>, strict: bool, mark: &'static str) -> Self {
        Self {
            tools,
            strict,
            mark,
            state: State::Open,
            key: String::new(),
            name: None,
            early: None,
            input: JsonInput::new(false, mark),
            begun: false,
            given: false,
            scanner: Scanner::default(),
            unescape: Unescape::default(),
        }
    }

    /// Adds a character. After `Past` the call, if it has begun, is ended.
    pub(super) fn push(&mut self, c: char, out: &mut Sink<'_>) -> Take {
        let take = self.step(c, out);
        if self.begun && matches!(take, Take::Past | Take::Mark | Take::Whole) {
            out.end();
        }
        take
    }

    /// The end of the text: a call that lacks nothing but its closing is whole.
    pub(super) fn finish(&mut self, out: &mut Sink<'_>) {
        if self.begun && self.given {
            out.end();
        }
    }

    fn step(&mut self, c: char, out: &mut Sink<'_>) -> Take {
        match &mut self.state {
            State::Open if c == '{' => self.state = State::Key { first: true },
            State::Key { .. } | State::Colon | State::Value | State::After if c.is_whitespace() => {}
            State::Key { .. } if c == '"' => {
                self.key.clear();
                self.state = State::InKey;
            }
            // Some models double the brace.
            State::Key { first: true } if c == '{' => {}
            State::Key { .. } if c == '}' => return self.close(out),
            State::InKey if c == '"' => {
                if self.strict
                    && !self.begun
                    && !matches!(self.key.as_str(), "name" | "arguments" | "parameters" | "type" | "id")
                {
                    return Take::Past;
                }
                self.state = State::Colon;
            }
            State::InKey if self.key.len() < MAX_KEY && !c.is_control() && c != '\\' => self.key.push(c),
            State::Colon if c == ':' => self.state = State::Value,
            State::Value => return self.value(c, out),
            State::InName(name) => {
                if c.is_control() || name.len() > MAX_NAME {
                    return Take::Past;
                }
                if self.unescape.push(c, name) {
                    let name = std::mem::take(name);
                    return self.named(name, out);
                }
            }
            State::Input => return self.input(c, out),
            State::Container { keep } => {
                if let (true, Some(early)) = (*keep, &mut self.early) {
                    early.push(c);
                }
                if self.scanner.push(c) {
                    self.state = State::After;
                }
            }
            State::Literal { .. } if is_delimiter(c) => {
                self.state = State::After;
                return self.step(c, out);
            }
            State::Literal { keep } => {
                if let (true, Some(early)) = (*keep, &mut self.early) {
                    early.push(c);
                }
            }
            State::After if c == ',' => self.state = State::Key { first: false },
            State::After if c == '}' => return self.close(out),
            _ => return Take::Past,
        }
        Take::More
    }

    fn value(&mut self, c: char, out: &mut Sink<'_>) -> Take {
        match self.key.as_str() {
            "name" if self.name.is_none() => {
                if c != '"' {
                    return Take::Past;
                }
                self.state = State::InName(String::new());
                Take::More
            }
            "arguments" | "parameters" if !self.given && self.early.is_none() => {
                if self.name.is_some() {
                    self.begin(out);
                    self.state = State::Input;
                    return self.input(c, out);
                }
                self.early = Some(String::new());
                self.aside(c, true, out)
            }
            _ => self.aside(c, false, out),
        }
    }

    fn aside(&mut self, c: char, keep: bool, out: &mut Sink<'_>) -> Take {
        self.scanner = Scanner::default();
        self.state = match c {
            '{' | '[' | '"' => State::Container { keep },
            _ => State::Literal { keep },
        };
        self.step(c, out)
    }

    fn named(&mut self, name: String, out: &mut Sink<'_>) -> Take {
        if name.is_empty() || self.strict && !self.tools.has(&name) {
            return Take::Past;
        }
        self.name = Some(name);
        self.state = State::After;
        if let Some(early) = self.early.take() {
            self.begin(out);
            // A literal is ended by what follows it.
            let mut rest = early.chars().chain([',']);
            while rest.next().is_some_and(|c| self.input.push(c, out) == Take::More) {}
            self.given = true;
        }
        Take::More
    }

    fn begin(&mut self, out: &mut Sink<'_>) {
        let name = self.name.as_deref().unwrap_or_default();
        out.begin(name);
        self.begun = true;
        self.input = JsonInput::new(self.tools.is_custom(name), self.mark);
    }

    fn input(&mut self, c: char, out: &mut Sink<'_>) -> Take {
        match self.input.push(c, out) {
            Take::Whole => {
                self.given = true;
                self.state = State::After;
                Take::More
            }
            Take::Past => {
                self.given = true;
                self.state = State::After;
                self.step(c, out)
            }
            take => take,
        }
    }

    /// The closing brace.
    fn close(&mut self, out: &mut Sink<'_>) -> Take {
        if !self.begun {
            if self.strict || self.name.is_none() {
                return Take::Past;
            }
            self.begin(out);
            self.input.push('}', out);
        }
        Take::Whole
    }
}
