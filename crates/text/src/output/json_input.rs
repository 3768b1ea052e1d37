//! The arguments of a call where a model writes them as JSON: passed on as they are written but for control
//! characters in strings, which are escaped, or, for a custom tool, the text in their `input`.

use super::json::{Scanner, Unescape, escape_into, is_delimiter};
use super::sink::Sink;

/// What became of a character.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Take {
    /// Taken; more is to come.
    More,
    /// Taken, and with it the whole is there.
    Whole,
    /// Not taken: it does not belong here.
    Past,
    /// Taken, and with it the mark that ends the call, in the midst of the value.
    Mark,
}

/// Reads one value.
pub(super) struct JsonInput {
    custom: bool,
    /// The mark that ends a call even where brackets are left open; empty if there is none.
    mark: &'static str,
    state: State,
    /// The beginning of the mark, of a literal, or of a custom tool's object.
    held: String,
    scanner: Scanner,
    unescape: Unescape,
    scratch: String,
}

enum State {
    Start,
    /// Passed on as it is.
    Raw,
    /// A number or a word.
    Literal,
    /// A quote, after which an object may stand as text.
    Quote,
    /// Text to be unescaped, up to its closing quote; what comes after it is of an object or not.
    Text {
        in_object: bool,
    },
    /// `{"input":"`.
    Head,
    /// What follows the input in its object; ignored.
    Rest,
}

const HEAD: &str = "{\"input\":\"";

impl JsonInput {
    pub(super) fn new(custom: bool, mark: &'static str) -> Self {
        Self {
            custom,
            mark,
            state: State::Start,
            held: String::new(),
            scanner: Scanner::default(),
            unescape: Unescape::default(),
            scratch: String::new(),
        }
    }

    pub(super) fn push(&mut self, c: char, out: &mut Sink<'_>) -> Take {
        match self.state {
            State::Start => self.start(c, out),
            State::Raw => self.raw(c, Some(out)),
            State::Rest => self.raw(c, None),
            State::Literal if is_delimiter(c) => {
                self.end_literal(out);
                Take::Past
            }
            State::Literal => {
                self.held.push(c);
                Take::More
            }
            State::Quote => self.quote(c, out),
            State::Text { in_object } => self.text(c, in_object, out),
            State::Head => self.head(c, out),
        }
    }

    /// The end of the call: ends what that alone ends, nothing at all, a number or a word; whether it was one of them.
    pub(super) fn finish(&mut self, out: &mut Sink<'_>) -> bool {
        let ends = matches!(self.state, State::Start | State::Literal);
        if ends {
            self.end_literal(out);
        }
        ends
    }

    /// Whether the value so far ends in a string.
    pub(super) fn in_string(&self) -> bool {
        match self.state {
            State::Text { .. } => true,
            State::Raw | State::Rest => self.scanner.in_string,
            State::Start | State::Literal | State::Quote | State::Head => false,
        }
    }

    fn start(&mut self, c: char, out: &mut Sink<'_>) -> Take {
        match c {
            c if c.is_whitespace() => {}
            '{' if self.custom => {
                self.held.push(c);
                self.state = State::Head;
            }
            '"' if self.custom => self.state = State::Text { in_object: false },
            '"' => self.state = State::Quote,
            '{' | '[' => {
                self.state = State::Raw;
                return self.raw(c, Some(out));
            }
            c if is_delimiter(c) => {
                self.end_literal(out);
                return Take::Past;
            }
            c => {
                self.held.push(c);
                self.state = State::Literal;
            }
        }
        Take::More
    }

    fn raw(&mut self, c: char, mut out: Option<&mut Sink<'_>>) -> Take {
        if self.held.is_empty() && (self.scanner.in_string || !self.mark.starts_with(c)) {
            if let Some(out) = out {
                self.raw_char(c, out);
            }
            return if self.scanner.push(c) { Take::Whole } else { Take::More };
        }
        self.held.push(c);
        if self.mark == self.held {
            return Take::Mark;
        }
        if self.mark.starts_with(self.held.as_str()) {
            return Take::More;
        }
        self.held.pop();
        if let Some(out) = out.as_deref_mut() {
            out.input(&self.held);
        }
        self.held.clear();
        self.raw(c, out)
    }

    /// A line break or another control character, which JSON's strings may hold escaped alone, is escaped: many
    /// models write code as it is. A backslash before it stays one.
    fn raw_char(&mut self, c: char, out: &mut Sink<'_>) {
        if !self.scanner.in_string || c >= ' ' {
            return out.input_char(c);
        }
        self.scratch.clear();
        if self.scanner.escaped {
            self.scratch.push('\\');
        }
        escape_into(c, &mut self.scratch);
        out.input(&self.scratch);
    }

    /// No arguments are an empty object.
    fn end_literal(&mut self, out: &mut Sink<'_>) {
        match self.held.as_str() {
            "" | "null" | "None" if self.custom => {}
            "" | "null" | "None" => out.input("{}"),
            literal => out.input(literal),
        }
    }

    /// Some models write the object as a string.
    fn quote(&mut self, c: char, out: &mut Sink<'_>) -> Take {
        match c {
            '{' => {
                out.input("{");
                self.state = State::Text { in_object: false };
                Take::More
            }
            '"' => {
                out.input("{}");
                Take::Whole
            }
            c => {
                self.state = State::Raw;
                self.raw('"', Some(out));
                self.raw(c, Some(out))
            }
        }
    }

    fn text(&mut self, c: char, in_object: bool, out: &mut Sink<'_>) -> Take {
        self.scratch.clear();
        let closed = self.unescape.push(c, &mut self.scratch);
        if !self.scratch.is_empty() {
            out.input(&self.scratch);
        }
        if !closed {
            return Take::More;
        }
        if !in_object {
            return Take::Whole;
        }
        self.scanner = Scanner::opened();
        self.state = State::Rest;
        Take::More
    }

    fn head(&mut self, c: char, out: &mut Sink<'_>) -> Take {
        let matched: usize = self.held.chars().filter(|c| !c.is_whitespace()).count();
        let between = matches!(HEAD.as_bytes().get(matched - 1), Some(b'{' | b':'))
            || HEAD.as_bytes().get(matched) == Some(&b':');
        if c.is_whitespace() && between {
            self.held.push(c);
            return Take::More;
        }
        if HEAD[matched..].starts_with(c) {
            self.held.push(c);
            if matched + 1 == HEAD.len() {
                self.held.clear();
                self.state = State::Text { in_object: true };
            }
            return Take::More;
        }
        // Another object: as it is.
        self.state = State::Raw;
        for held in std::mem::take(&mut self.held).chars() {
            self.raw(held, Some(out));
        }
        self.raw(c, Some(out))
    }
}
