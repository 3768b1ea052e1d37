//! Calls of custom tools, alike in all formats but harmony.

use super::Group;
use super::writer::Writer;
use crate::grammar::GrammarSpec;
use crate::grammar::compile::unanchored;
use crate::{Tool, ToolInput};

const MARK: &str = "<custom_tool_call name=\"";
const CLOSING: &str = "\n</custom_tool_call>";

/// Calls in `<custom_tool_call>`.
pub(super) fn group(writer: &mut Writer<'_>, tools: &[&Tool]) -> Group {
    let mut calls = Vec::new();
    for tool in tools {
        let head = writer.literal(&format!("{}\">\n", tool.name));
        let body = match &tool.input {
            ToolInput::Lark(lark) => {
                format!("{} {}", writer.part(GrammarSpec::Lark(lark.clone())), writer.literal(CLOSING))
            }
            // As one expression with the closing mark, since one that matches anything never ends.
            ToolInput::Regex(regex) => {
                let closing = regex_syntax::escape(CLOSING);
                writer.lazy(&format!("(?:{}){closing}", unanchored(regex)))
            }
            ToolInput::Text | ToolInput::Json { .. } => writer.until(CLOSING),
        };
        calls.push(format!("{head} {body}"));
    }
    Group::new(MARK, writer.rule(&calls.join(" | ")))
}
