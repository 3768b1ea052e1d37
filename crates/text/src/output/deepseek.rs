//! DeepSeek's calls: V3 and R1 name the tool before a fenced block of JSON, V3.1 before bare JSON.
//!
//! ```text
//! <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME      (V3, R1)
//! ```json
//! {..}
//! ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>
//! <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{..}<｜tool▁call▁end｜><｜tool▁calls▁end｜>   (V3.1)
//! ```

use std::sync::Arc;

use super::json_input::{JsonInput, Take};
use super::reader::{Reader, Step};
use super::sink::Sink;
use super::tags::{Tag, Tagged};
use super::tools::{MAX_NAME, Offered};

pub(super) const ALL_BEGIN: &str = "<｜tool▁calls▁begin｜>";
pub(super) const BEGIN: &str = "<｜tool▁call▁begin｜>";
const SEPARATOR: &str = "<｜tool▁sep｜>";
const END: &str = "<｜tool▁call▁end｜>";
const ALL_END: &str = "<｜tool▁calls▁end｜>";

/// The marks in the order in which they come.
pub(super) const MARKS: [&str; 5] = [ALL_BEGIN, BEGIN, SEPARATOR, END, ALL_END];

/// Reads calls after the mark of all, or of one.
pub(super) struct DeepSeekCalls {
    tools: Arc<Offered>,
    state: State,
    tag: Tag,
    /// The tool's name, or what V3 writes before it.
    word: String,
}

enum State {
    Between,
    BeforeSeparator,
    AfterSeparator,
    /// The name in a line of its own.
    Line,
    /// The opening of the fenced block.
    Fence,
    Arguments(JsonInput),
    After,
}

impl DeepSeekCalls {
    /// After [`ALL_BEGIN`].
    pub(super) fn all(tools: &Arc<Offered>) -> Self {
        Self { tools: tools.clone(), state: State::Between, tag: Tag::default(), word: String::new() }
    }

    /// After [`BEGIN`].
    pub(super) fn one(tools: &Arc<Offered>) -> Self {
        Self { state: State::BeforeSeparator, ..Self::all(tools) }
    }

    fn between(&mut self, c: char) -> Step {
        match self.tag.push(c, &[BEGIN, ALL_END]) {
            Tagged::More => Step::More,
            Tagged::Found(0) => {
                self.word.clear();
                self.state = State::BeforeSeparator;
                Step::More
            }
            Tagged::Found(_) => Step::Done,
            Tagged::No if self.tag.is_empty() && c.is_whitespace() => Step::More,
            Tagged::No => Step::Out,
        }
    }

    fn word(&mut self, c: char) -> Step {
        if c.is_control() || c == '<' || self.word.len() > MAX_NAME {
            return Step::Out;
        }
        self.word.push(c);
        Step::More
    }

    fn line(&mut self, c: char, out: &mut Sink<'_>) -> Step {
        match c {
            '\n' | '`' if !self.word.trim().is_empty() => self.state = State::Fence,
            '{' => return self.arguments(c, out),
            c => return self.word(c),
        }
        Step::More
    }

    fn arguments(&mut self, c: char, out: &mut Sink<'_>) -> Step {
        let name = self.word.trim();
        if name.is_empty() {
            return Step::Out;
        }
        out.begin(name);
        let mut input = JsonInput::new(self.tools.is_custom(name), END);
        input.push(c, out);
        self.state = State::Arguments(input);
        Step::More
    }

    fn after(&mut self, c: char) -> Step {
        match self.tag.push(c, &[END, BEGIN, ALL_END]) {
            Tagged::More => Step::More,
            Tagged::Found(0) => {
                self.state = State::Between;
                Step::More
            }
            Tagged::Found(1) => {
                self.word.clear();
                self.state = State::BeforeSeparator;
                Step::More
            }
            Tagged::Found(_) => Step::Done,
            Tagged::No if self.tag.is_empty() && (c.is_whitespace() || c == '`') => Step::More,
            Tagged::No => Step::Out,
        }
    }
}

impl Reader for DeepSeekCalls {
    fn push(&mut self, c: char, out: &mut Sink<'_>) -> Step {
        match &mut self.state {
            State::Between => self.between(c),
            State::BeforeSeparator => match self.tag.push(c, &[SEPARATOR]) {
                Tagged::More => Step::More,
                Tagged::Found(_) => {
                    self.state = State::AfterSeparator;
                    Step::More
                }
                Tagged::No if self.tag.is_empty() => self.word(c),
                Tagged::No => Step::Out,
            },
            State::AfterSeparator if c.is_whitespace() => Step::More,
            State::AfterSeparator if c == '{' => self.arguments(c, out),
            State::AfterSeparator => {
                self.word.clear();
                self.state = State::Line;
                self.line(c, out)
            }
            State::Line => self.line(c, out),
            State::Fence if c == '{' => self.arguments(c, out),
            State::Fence if c.is_whitespace() || c == '`' || "json".contains(c) => Step::More,
            State::Fence => Step::Out,
            State::Arguments(input) => match input.push(c, out) {
                Take::More | Take::Past => Step::More,
                take => {
                    out.end();
                    self.state = if take == Take::Mark { State::Between } else { State::After };
                    Step::More
                }
            },
            State::After => self.after(c),
        }
    }

    fn closes(&self) -> bool {
        matches!(self.state, State::After | State::Between)
    }
}
