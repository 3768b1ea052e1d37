//! Calls of gpt-oss: a message of its own, addressed to the tool.
//!
//! `<|channel|>commentary to=functions.f <|constrain|>json<|message|>{..}`, which a stop token ends.

use serde_json::json;

use super::writer::Writer;
use super::{Answer, input};
use crate::ToolInput;
use crate::grammar::{GrammarSpec, JsonLayout};

/// Asides, and at the end a call, or the text where none is required.
pub(super) fn answer(writer: &mut Writer<'_>, answer: &Answer<'_>) -> String {
    let text = writer.any_text();
    let next = writer.literal("<|end|><|start|>assistant");
    let mut ends = Vec::new();
    for tool in &answer.tools {
        let address = format!("<|channel|>commentary to=functions.{} ", tool.name);
        let (kind, body) = match &tool.input {
            ToolInput::Json { .. } => ("<|constrain|>json<|message|>", input(writer, tool)),
            // As the model is told of them; what is held to a grammar is the text itself.
            ToolInput::Text => ("<|constrain|>json<|message|>", writer.part(text_in_object())),
            ToolInput::Lark(lark) => ("<|message|>", writer.part(GrammarSpec::Lark(lark.clone()))),
            ToolInput::Regex(regex) => ("<|message|>", writer.part(GrammarSpec::Regex(regex.clone()))),
        };
        ends.push(format!("{} {body}", writer.literal(&format!("{address}{kind}"))));
    }
    let analysis = writer.literal("<|channel|>analysis<|message|>");
    let preamble = writer.literal("<|channel|>commentary<|message|>");
    let last = writer.literal("<|channel|>final<|message|>");
    let aside = if writer.free { format!("({analysis} | {preamble})") } else { analysis };
    match answer.text {
        Some(held) => ends.push(format!("{last} {}", writer.part_laid_out(held.clone(), JsonLayout::Loose))),
        None if writer.free => ends.push(format!("({last} | {aside}) {text}")),
        None => {}
    }
    format!("({aside} {text} {next})* ({})", ends.join(" | "))
}

/// A custom tool's text as a function's only argument.
fn text_in_object() -> GrammarSpec {
    let schema = json!({"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"],
        "additionalProperties": false});
    GrammarSpec::JsonSchema { schema, strict: true }
}
