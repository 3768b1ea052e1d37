//! Calls of gpt-oss: a message of its own, addressed to the tool.
//!
//! `<|channel|>commentary to=functions.f <|constrain|>json<|message|>{..}`, which a stop token ends.

use super::input;
use super::writer::Writer;
use crate::grammar::GrammarSpec;
use crate::{Tool, ToolInput};

/// Messages to the user, and at the end a call; where the model is free, its answer instead.
pub(super) fn answer(writer: &mut Writer<'_>, tools: &[&Tool]) -> String {
    let text = writer.any_text();
    let next = writer.literal("<|end|><|start|>assistant");
    let mut calls = Vec::new();
    for tool in tools {
        let address = format!("<|channel|>commentary to=functions.{} ", tool.name);
        let (kind, body) = match &tool.input {
            ToolInput::Json { .. } => ("<|constrain|>json<|message|>", input(writer, tool)),
            ToolInput::Text => ("<|message|>", text.clone()),
            ToolInput::Lark(lark) => ("<|message|>", writer.part(GrammarSpec::Lark(lark.clone()))),
            ToolInput::Regex(regex) => ("<|message|>", writer.part(GrammarSpec::Regex(regex.clone()))),
        };
        calls.push(format!("{} {body}", writer.literal(&format!("{address}{kind}"))));
    }
    let call = writer.rule(&calls.join(" | "));
    let analysis = writer.literal("<|channel|>analysis<|message|>");
    if !writer.free {
        return format!("({analysis} {text} {next})* {call}");
    }
    let preamble = writer.literal("<|channel|>commentary<|message|>");
    let last = writer.literal("<|channel|>final<|message|>");
    let aside = writer.rule(&format!("({analysis} | {preamble}) {text}"));
    format!("({aside} {next})* ({call} | {last} {text} | {aside})")
}
