//! A custom tool's call: `<custom_tool_call name="X">`, the text in lines of its own, `</custom_tool_call>`.

use std::sync::Arc;

use super::reader::{Reader, Step};
use super::sink::Sink;
use super::tools::{MAX_NAME, Offered};

/// What opens a call, up to its name.
pub(super) const OPENING: &str = "<custom_tool_call name=\"";
const CLOSING: &str = "</custom_tool_call>";

/// Reads one call after [`OPENING`].
///
/// The closing mark ends the text where it begins a line, since the text may well speak of it; within
/// a line it does so only at the end of everything.
pub(super) struct CustomCall {
    tools: Arc<Offered>,
    state: State,
    name: String,
    /// A newline that may be the last, the closing mark as far as it is there, and space after it.
    held: String,
    line_begins: bool,
}

enum State {
    Name,
    /// After the name's quote.
    Tag,
    /// After the tag, where a newline is none of the text's.
    First,
    Text,
    /// In what may be the closing mark.
    Closing {
        matched: usize,
    },
}

impl CustomCall {
    pub(super) fn new(tools: &Arc<Offered>) -> Self {
        Self {
            tools: tools.clone(),
            state: State::Name,
            name: String::new(),
            held: String::new(),
            line_begins: true,
        }
    }

    fn text(&mut self, c: char, out: &mut Sink<'_>) -> Step {
        match c {
            '<' => {
                if !self.line_begins {
                    self.release(out);
                }
                self.held.push(c);
                self.state = State::Closing { matched: 1 };
            }
            '\n' => {
                self.release(out);
                self.held.push(c);
                self.line_begins = true;
            }
            c => {
                self.release(out);
                out.input_char(c);
                self.line_begins = false;
            }
        }
        Step::More
    }

    fn closing(&mut self, c: char, matched: usize, out: &mut Sink<'_>) -> Step {
        if CLOSING[matched..].starts_with(c) {
            self.held.push(c);
            let whole = matched + 1 == CLOSING.len();
            if whole && self.line_begins {
                out.end();
                return Step::Done;
            }
            self.state = State::Closing { matched: matched + 1 };
            return Step::More;
        }
        if matched == CLOSING.len() && c.is_whitespace() {
            self.held.push(c);
            return Step::More;
        }
        self.state = State::Text;
        if self.held.ends_with('\n') {
            self.held.pop();
            self.text('\n', out);
        } else {
            self.release(out);
            self.line_begins = false;
        }
        self.text(c, out)
    }

    fn release(&mut self, out: &mut Sink<'_>) {
        if !self.held.is_empty() {
            out.input(&self.held);
            self.held.clear();
        }
    }
}

impl Reader for CustomCall {
    fn push(&mut self, c: char, out: &mut Sink<'_>) -> Step {
        match self.state {
            State::Name if c == '"' && self.tools.is_custom(&self.name) => self.state = State::Tag,
            State::Name if c != '"' && !c.is_control() && self.name.len() < MAX_NAME => self.name.push(c),
            State::Tag if c == '>' => {
                out.begin(&self.name);
                self.state = State::First;
            }
            State::First if c == '\n' => self.state = State::Text,
            State::First | State::Text => {
                self.state = State::Text;
                return self.text(c, out);
            }
            State::Closing { matched } => return self.closing(c, matched, out),
            _ => return Step::Out,
        }
        Step::More
    }

    fn closes(&self) -> bool {
        false
    }

    fn finish(&mut self, out: &mut Sink<'_>) {
        match self.state {
            State::Closing { matched } if matched == CLOSING.len() => out.end(),
            State::Text | State::Closing { .. } => self.release(out),
            _ => {}
        }
    }
}
