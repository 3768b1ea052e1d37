//! What stands in `<tool_call>`: which family's call it is shows by its first character.

use std::sync::Arc;

use super::json_calls::JsonCalls;
use super::reader::{Reader, Step};
use super::sink::Sink;
use super::tagged_calls::{GLM, QWEN, TaggedCall};
use super::tools::Offered;

/// Reads calls after `<tool_call>`: JSON (Hermes), tags (Qwen3-Coder) or, where `bare_names` are known,
/// a name (GLM).
pub(super) struct ToolCall {
    tools: Arc<Offered>,
    bare_names: bool,
    reader: Option<Box<dyn Reader>>,
}

impl ToolCall {
    pub(super) fn new(bare_names: bool, tools: &Arc<Offered>) -> Self {
        Self { tools: tools.clone(), bare_names, reader: None }
    }
}

impl Reader for ToolCall {
    fn push(&mut self, c: char, out: &mut Sink<'_>) -> Step {
        if let Some(reader) = &mut self.reader {
            return reader.push(c, out);
        }
        let tools = &self.tools;
        let mut reader: Box<dyn Reader> = match c {
            c if c.is_whitespace() => return Step::More,
            '{' | '[' => Box::new(JsonCalls::closed_by("</tool_call>", tools)),
            '<' => Box::new(TaggedCall::new(&QWEN, tools)),
            _ if self.bare_names => Box::new(TaggedCall::new(&GLM, tools)),
            _ => return Step::Out,
        };
        let step = reader.push(c, out);
        self.reader = Some(reader);
        step
    }

    fn closes(&self) -> bool {
        self.reader.as_ref().is_some_and(|reader| reader.closes())
    }

    fn finish(&mut self, out: &mut Sink<'_>) {
        if let Some(reader) = &mut self.reader {
            reader.finish(out);
        }
    }
}
