//! Calls as a list in Python: `[f(x=1), g()]`.

use std::sync::Arc;

use super::arguments::Arguments;
use super::python_value::{PythonValue, Value};
use super::reader::{Reader, Step};
use super::sink::Sink;
use super::tags::{Tag, Tagged};
use super::tools::{MAX_NAME, Offered};

const CLOSING: &str = "<|python_end|>";

/// Whether a grammar has a list begin so with a call of the tool of this name.
pub(super) fn is_head(taken: &str, name: &str) -> bool {
    taken.strip_prefix('[').and_then(|taken| taken.strip_prefix(name)) == Some("(")
}

/// Reads a list of calls. Since other lists look alike, only those of offered tools are any.
pub(super) struct PythonicCalls {
    tools: Arc<Offered>,
    /// Whether a mark closes the list.
    marked: bool,
    state: State,
    word: String,
    arguments: Option<Arguments>,
    /// How many arguments came without a name.
    place: usize,
    tag: Tag,
    scratch: String,
}

enum State {
    Open,
    Name,
    /// Before an argument.
    Argument,
    /// In an argument's name, or a value.
    Word,
    Value(PythonValue),
    AfterCall,
    Closing,
}

impl PythonicCalls {
    /// From the list's bracket on.
    pub(super) fn new(tools: &Arc<Offered>) -> Self {
        Self {
            tools: tools.clone(),
            marked: false,
            state: State::Open,
            word: String::new(),
            arguments: None,
            place: 0,
            tag: Tag::default(),
            scratch: String::new(),
        }
    }

    /// After `<|python_start|>`, up to `<|python_end|>`.
    pub(super) fn marked(tools: &Arc<Offered>) -> Self {
        Self { marked: true, ..Self::new(tools) }
    }

    fn name(&mut self, c: char, out: &mut Sink<'_>) -> Step {
        match c {
            '(' if self.tools.has(&self.word) => {
                self.arguments = Some(Arguments::begin(&self.tools, &std::mem::take(&mut self.word), out));
                self.place = 0;
                self.state = State::Argument;
            }
            c if c.is_whitespace() && self.word.is_empty() => {}
            c if (c.is_alphanumeric() || matches!(c, '_' | '.' | '-')) && self.word.len() < MAX_NAME => {
                self.word.push(c);
            }
            _ => return Step::Out,
        }
        Step::More
    }

    fn argument(&mut self, c: char, out: &mut Sink<'_>) -> Step {
        match c {
            ')' => return self.close(out),
            ',' => {}
            c if c.is_whitespace() => {}
            '\'' | '"' | '(' | '[' | '{' => {
                self.place(out);
                let value = PythonValue::new(self.is_custom());
                return self.value(value, c, out);
            }
            c => {
                self.word.clear();
                self.word.push(c);
                self.state = State::Word;
            }
        }
        Step::More
    }

    fn word(&mut self, c: char, out: &mut Sink<'_>) -> Step {
        match c {
            '=' => {
                let key = std::mem::take(&mut self.word);
                if let Some(arguments) = &mut self.arguments {
                    arguments.key(key.trim(), out);
                }
                self.state = State::Value(PythonValue::new(self.is_custom()));
            }
            '\'' | '"' | '(' | '[' | '{' | ',' | ')' => {
                self.place(out);
                let value = PythonValue::of_word(self.is_custom(), std::mem::take(&mut self.word));
                return self.value(value, c, out);
            }
            // Not all that schemas name is a name in Python.
            c => self.word.push(c),
        }
        Step::More
    }

    /// The key of an argument without a name: the one that the schema has at its place.
    fn place(&mut self, out: &mut Sink<'_>) {
        let Some(arguments) = &mut self.arguments else { return };
        let known = self.tools.argument(arguments.tool(), self.place).map(str::to_owned);
        let key = known.unwrap_or_else(|| format!("arg{}", self.place));
        self.place += 1;
        arguments.key(&key, out);
    }

    fn value(&mut self, mut value: PythonValue, c: char, out: &mut Sink<'_>) -> Step {
        self.scratch.clear();
        let taken = value.push(c, &mut self.scratch);
        out.input(&self.scratch);
        if taken == Value::More {
            self.state = State::Value(value);
            return Step::More;
        }
        self.state = State::Argument;
        self.argument(c, out)
    }

    fn close(&mut self, out: &mut Sink<'_>) -> Step {
        if let Some(mut arguments) = self.arguments.take() {
            arguments.close(out);
        }
        self.state = State::AfterCall;
        Step::More
    }

    fn is_custom(&self) -> bool {
        self.arguments.as_ref().is_some_and(Arguments::is_custom)
    }
}

impl Reader for PythonicCalls {
    fn push(&mut self, c: char, out: &mut Sink<'_>) -> Step {
        match std::mem::replace(&mut self.state, State::Open) {
            State::Open if c == '[' => self.state = State::Name,
            State::Open if c.is_whitespace() => {}
            State::Open => return Step::Out,
            State::Name => {
                self.state = State::Name;
                return self.name(c, out);
            }
            State::Argument => {
                self.state = State::Argument;
                return self.argument(c, out);
            }
            State::Word => {
                self.state = State::Word;
                return self.word(c, out);
            }
            State::Value(value) => return self.value(value, c, out),
            State::AfterCall => match c {
                ',' => self.state = State::Name,
                ']' if self.marked => self.state = State::Closing,
                ']' => return Step::Done,
                c if c.is_whitespace() => self.state = State::AfterCall,
                _ => return Step::Out,
            },
            State::Closing => {
                self.state = State::Closing;
                return match self.tag.push(c, &[CLOSING]) {
                    Tagged::Found(_) => Step::Done,
                    Tagged::More => Step::More,
                    Tagged::No if self.tag.is_empty() && c.is_whitespace() => Step::More,
                    Tagged::No => Step::Out,
                };
            }
        }
        Step::More
    }

    fn closes(&self) -> bool {
        matches!(self.state, State::AfterCall | State::Closing)
    }
}
