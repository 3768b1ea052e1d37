//! Calls with tagged arguments: Qwen3-Coder's `<function=f><parameter=x>` and GLM's `<arg_key>`.

use std::sync::Arc;

use super::arguments::Arguments;
use super::reader::{Reader, Step};
use super::sink::Sink;
use super::tagged_value::{TaggedValue, ValueTags};
use super::tags::{Tag, Tagged};
use super::tools::{MAX_NAME, Offered};

/// The tags of one family.
pub(crate) struct CallTags {
    /// Stands before the name; empty if nothing does.
    name: &'static str,
    /// Ends the name; empty if the line or the next tag does.
    name_end: &'static str,
    /// Ends an argument's key.
    key_end: &'static str,
    /// Stands between key and value; empty if nothing does.
    value: &'static str,
    pub(crate) values: ValueTags,
    /// What follows the name: the tag of a key, or what ends a call. The followers of a value are the same.
    ends: &'static [&'static str],
}

/// `<function=f>`, `<parameter=x>`, the value in lines of its own, `</parameter>`, `</function>`.
pub(crate) const QWEN: CallTags = CallTags {
    name: "<function=",
    name_end: ">",
    key_end: ">",
    value: "",
    values: ValueTags {
        opening: "<parameter=",
        closing: "</parameter>",
        followers: &["<parameter=", "</function>", "</tool_call>"],
        in_lines: true,
    },
    ends: &["<parameter=", "</function>", "</tool_call>"],
};

/// The name, then `<arg_key>x</arg_key><arg_value>1</arg_value>`.
pub(crate) const GLM: CallTags = CallTags {
    name: "",
    name_end: "",
    key_end: "</arg_key>",
    value: "<arg_value>",
    values: ValueTags {
        opening: "<arg_value>",
        closing: "</arg_value>",
        followers: &["<arg_key>", "</tool_call>"],
        in_lines: false,
    },
    ends: &["<arg_key>", "</tool_call>"],
};

const CLOSING: &str = "</tool_call>";

/// Reads one call.
pub(super) struct TaggedCall {
    tools: Arc<Offered>,
    tags: &'static CallTags,
    state: State,
    tag: Tag,
    /// The name, then the key.
    word: String,
    name: String,
    arguments: Option<Arguments>,
    scratch: String,
}

enum State {
    Open,
    Name,
    /// After the name.
    Body,
    Key,
    BeforeValue,
    Value(TaggedValue),
    /// After the call.
    Closing,
}

impl TaggedCall {
    /// From before the name's tag on.
    pub(super) fn new(tags: &'static CallTags, tools: &Arc<Offered>) -> Self {
        let state = if tags.name.is_empty() { State::Name } else { State::Open };
        Self {
            tools: tools.clone(),
            tags,
            state,
            tag: Tag::default(),
            word: String::new(),
            name: String::new(),
            arguments: None,
            scratch: String::new(),
        }
    }

    fn name(&mut self, c: char) -> Step {
        let ended = match self.tags.name_end {
            "" => c.is_whitespace() || c == '<',
            end => end.starts_with(c),
        };
        if !ended {
            if c.is_whitespace()
                || c.is_control()
                || matches!(c, '<' | '{' | '"')
                || self.word.len() > MAX_NAME
            {
                return Step::Out;
            }
            self.word.push(c);
            return Step::More;
        }
        if self.word.is_empty() {
            return Step::Out;
        }
        self.name = std::mem::take(&mut self.word);
        self.state = State::Body;
        if c == '<' {
            self.tag.push(c, self.tags.ends);
        }
        Step::More
    }

    fn body(&mut self, c: char, out: &mut Sink<'_>) -> Step {
        if self.tag.is_empty() && c.is_whitespace() {
            return Step::More;
        }
        match self.tag.push(c, self.tags.ends) {
            Tagged::More => Step::More,
            Tagged::No => Step::Out,
            Tagged::Found(end) => self.follow(end, out),
        }
    }

    /// A tag that follows the name or a value: of the next key, or of an end.
    fn follow(&mut self, follower: usize, out: &mut Sink<'_>) -> Step {
        if follower == 0 {
            self.state = State::Key;
            return Step::More;
        }
        let mut arguments =
            self.arguments.take().unwrap_or_else(|| Arguments::begin(&self.tools, &self.name, out));
        arguments.close(out);
        self.state = State::Closing;
        if self.tags.ends[follower] == CLOSING { Step::Done } else { Step::More }
    }

    fn key(&mut self, c: char, out: &mut Sink<'_>) -> Step {
        match self.tag.push(c, &[self.tags.key_end]) {
            Tagged::More => return Step::More,
            Tagged::No => {
                // Only a call that has not begun can be taken back.
                let odd = c == '\n' || self.word.len() > MAX_NAME;
                if odd && self.arguments.is_none() {
                    return Step::Out;
                }
                self.word.push_str(&std::mem::take(&mut self.tag.seen));
                self.word.push(c);
                return Step::More;
            }
            Tagged::Found(_) => {}
        }
        let key = std::mem::take(&mut self.word);
        let arguments = self.arguments.get_or_insert_with(|| Arguments::begin(&self.tools, &self.name, out));
        arguments.begin_value(key.trim(), out);
        self.state = match self.tags.value {
            "" => State::Value(TaggedValue::new(&self.tags.values)),
            _ => State::BeforeValue,
        };
        Step::More
    }

    fn before_value(&mut self, c: char, out: &mut Sink<'_>) -> Step {
        if self.tag.is_empty() && c.is_whitespace() {
            return Step::More;
        }
        match self.tag.push(c, &[self.tags.value]) {
            Tagged::More => return Step::More,
            Tagged::Found(_) => self.state = State::Value(TaggedValue::new(&self.tags.values)),
            // The tag was left out.
            Tagged::No => {
                let mut value = TaggedValue::new(&self.tags.values);
                self.scratch.clear();
                for c in std::mem::take(&mut self.tag.seen).chars() {
                    value.push(c, &mut self.scratch);
                }
                if let Some(arguments) = &mut self.arguments {
                    arguments.push(&self.scratch, out);
                }
                self.state = State::Value(value);
                return self.push(c, out);
            }
        }
        Step::More
    }
}

impl Reader for TaggedCall {
    fn push(&mut self, c: char, out: &mut Sink<'_>) -> Step {
        match &mut self.state {
            State::Open if self.tag.is_empty() && c.is_whitespace() => Step::More,
            State::Open => match self.tag.push(c, &[self.tags.name]) {
                Tagged::More => Step::More,
                Tagged::No => Step::Out,
                Tagged::Found(_) => {
                    self.state = State::Name;
                    Step::More
                }
            },
            State::Name => self.name(c),
            State::Body => self.body(c, out),
            State::Key => self.key(c, out),
            State::BeforeValue => self.before_value(c, out),
            State::Value(value) => {
                self.scratch.clear();
                let ended = value.push(c, &mut self.scratch);
                let Some(arguments) = &mut self.arguments else { return Step::Out };
                arguments.push(&self.scratch, out);
                let Some(follower) = ended else { return Step::More };
                arguments.end_value(out);
                self.follow(follower, out)
            }
            State::Closing if self.tag.is_empty() && c.is_whitespace() => Step::More,
            State::Closing => match self.tag.push(c, &[CLOSING]) {
                Tagged::More => Step::More,
                Tagged::Found(_) => Step::Done,
                Tagged::No => Step::Out,
            },
        }
    }

    fn closes(&self) -> bool {
        matches!(self.state, State::Closing)
    }
}
