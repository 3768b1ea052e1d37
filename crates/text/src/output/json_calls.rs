//! Calls as JSON objects: one or several, in an array or not, up to a closing mark or as far as they go.

use std::sync::Arc;

use super::call_object::CallObject;
use super::json_input::Take;
use super::reader::{Reader, Step};
use super::sink::Sink;
use super::tools::Offered;

/// Reads objects of calls.
pub(super) struct JsonCalls {
    tools: Arc<Offered>,
    strict: bool,
    /// The closing mark; empty if there is none.
    mark: &'static str,
    object: Option<CallObject>,
    /// Whether a call was made.
    any: bool,
    in_array: bool,
    /// How much of the mark is there, in bytes.
    marked: usize,
}

impl JsonCalls {
    /// Calls up to a closing mark.
    pub(super) fn closed_by(mark: &'static str, tools: &Arc<Offered>) -> Self {
        let tools = tools.clone();
        Self { tools, strict: false, mark, object: None, any: false, in_array: false, marked: 0 }
    }

    /// Calls that an opening mark alone announces.
    pub(super) fn announced(tools: &Arc<Offered>) -> Self {
        Self::closed_by("", tools)
    }

    /// Calls that nothing else shows to be calls: only those of offered tools are any.
    pub(super) fn unmarked(mark: &'static str, tools: &Arc<Offered>) -> Self {
        Self { strict: true, ..Self::closed_by(mark, tools) }
    }

    /// Between objects.
    fn between(&mut self, c: char, out: &mut Sink<'_>) -> Step {
        if self.marked == 0 {
            match c {
                c if c.is_whitespace() => return Step::More,
                '{' => {
                    self.object = Some(CallObject::new(self.tools.clone(), self.strict, self.mark));
                    return self.push(c, out);
                }
                '[' if !self.any && !self.in_array => {
                    self.in_array = true;
                    return Step::More;
                }
                ']' if self.in_array => {
                    self.in_array = false;
                    return if self.mark.is_empty() { Step::Done } else { Step::More };
                }
                ',' | ';' if self.any => return Step::More,
                // A brace too many.
                '}' if self.any && !self.mark.is_empty() => return Step::More,
                _ => {}
            }
        }
        if !self.any || !self.mark[self.marked..].starts_with(c) {
            return Step::Out;
        }
        self.marked += c.len_utf8();
        if self.marked == self.mark.len() { Step::Done } else { Step::More }
    }
}

impl Reader for JsonCalls {
    fn push(&mut self, c: char, out: &mut Sink<'_>) -> Step {
        let Some(object) = &mut self.object else { return self.between(c, out) };
        let take = object.push(c, out);
        let begun = object.begun;
        match take {
            Take::More => return Step::More,
            Take::Mark => return Step::Done,
            Take::Past if !begun => return Step::Out,
            Take::Past | Take::Whole => {}
        }
        self.object = None;
        self.any = true;
        if take == Take::Past { Step::Again } else { Step::More }
    }

    fn closes(&self) -> bool {
        self.object.is_none() && self.any
    }

    fn finish(&mut self, out: &mut Sink<'_>) {
        if let Some(object) = &mut self.object {
            object.finish(out);
        }
    }
}

/// Reads such calls in a fenced block of Markdown, which small models put around them.
pub(super) struct FencedCalls {
    /// The opening line, until it is whole.
    opening: Option<String>,
    calls: JsonCalls,
}

const FENCE: &str = "```";

impl FencedCalls {
    pub(super) fn new(tools: &Arc<Offered>) -> Self {
        Self { opening: Some(String::new()), calls: JsonCalls::unmarked(FENCE, tools) }
    }
}

impl Reader for FencedCalls {
    fn push(&mut self, c: char, out: &mut Sink<'_>) -> Step {
        let Some(opening) = &mut self.opening else { return self.calls.push(c, out) };
        match c {
            '\n' if matches!(&opening[..], "```" | "```json" | "```tool_call" | "```tool_code") => {
                self.opening = None;
            }
            '`' | 'a'..='z' | '_' if opening.len() < 16 => opening.push(c),
            _ => return Step::Out,
        }
        Step::More
    }

    fn closes(&self) -> bool {
        self.calls.closes()
    }

    fn finish(&mut self, out: &mut Sink<'_>) {
        self.calls.finish(out);
    }
}
