//! Grammars of tool calls: what a model writes, held to the markup of its family, to the tools it was
//! offered and to their inputs.
//!
//! Where a call is required, the answer is reasoning, if the model reasons, and calls. Where the model
//! is free to call, its text is free until it opens a call; from there on the call is held.

mod custom;
mod harmony;
mod marked;
mod pythonic;
mod tagged;
mod writer;

use serde_json::Value;

use super::GrammarSpec;
use crate::{OutputFormat, ReasoningFormat, Text, Tool, ToolChoice, ToolFormat, ToolInput};
use writer::Writer;

/// Where calls may stand.
struct Calls {
    /// A call, or several if they share a mark, after one of these marks.
    groups: Vec<Group>,
    /// For formats whose calls need no mark: all of an answer that is calls, and what it may begin
    /// with, each way as a regular expression and what follows it.
    bare: Option<(String, Vec<(String, String)>)>,
}

/// Calls after a mark.
struct Group {
    mark: String,
    /// What follows the mark, in Lark.
    rest: String,
}

impl Text {
    /// The grammar for an answer to a request with tools, of a model that calls in the given format.
    /// `prompt` is the end of the rendered prompt, in which reasoning may have been opened. None where
    /// nothing is to be held: the model is free, and no tool is strict or has a grammar of its own.
    ///
    /// Inputs are held to their schemas where calls are required, and always for strict tools; of a
    /// free call of another tool, at least the form.
    pub fn tool_grammar(
        &self,
        format: OutputFormat,
        tools: &[Tool],
        choice: &ToolChoice,
        parallel: bool,
        prompt: &str,
    ) -> Option<GrammarSpec> {
        let family = format.tools?;
        let (free, parallel) = match choice {
            ToolChoice::None => return None,
            ToolChoice::Auto if !tools.iter().any(is_held) => return None,
            ToolChoice::Auto => (true, parallel),
            ToolChoice::Required => (false, parallel),
            ToolChoice::Named(_) => (false, false),
        };
        let offered = |tool: &&Tool| !matches!(choice, ToolChoice::Named(name) if *name != tool.name);
        let tools: Vec<&Tool> = tools.iter().filter(offered).collect();
        if tools.is_empty() {
            return None;
        }
        let mut writer = Writer::new(self, format.markers(), free);
        let start = if family == ToolFormat::Harmony {
            harmony::answer(&mut writer, &tools)
        } else {
            answer(&mut writer, format, &tools, parallel, prompt)
        };
        Some(writer.finish(&start))
    }
}

/// Whether calls are held even where the model is free to make them.
fn is_held(tool: &Tool) -> bool {
    match &tool.input {
        ToolInput::Json { strict, .. } => *strict,
        ToolInput::Text => false,
        ToolInput::Lark(_) | ToolInput::Regex(_) => true,
    }
}

/// The whole answer, in the formats that mark calls in the text.
fn answer(
    writer: &mut Writer<'_>,
    format: OutputFormat,
    tools: &[&Tool],
    parallel: bool,
    prompt: &str,
) -> String {
    let (custom, json): (Vec<&Tool>, Vec<&Tool>) = tools.iter().partition(|tool| tool.is_custom());
    let mut calls = Calls { groups: Vec::new(), bare: None };
    if !json.is_empty() {
        match format.tools {
            Some(ToolFormat::Hermes) => calls.groups.push(marked::hermes(writer, &json)),
            Some(ToolFormat::QwenXml) => calls.groups.push(tagged::qwen(writer, &json)),
            Some(ToolFormat::Glm) => calls.groups.push(tagged::glm(writer, &json)),
            Some(ToolFormat::Mistral) => calls.groups.push(marked::mistral(writer, &json, parallel)),
            Some(ToolFormat::DeepSeek) => calls.groups.push(marked::deepseek(writer, &json, parallel)),
            Some(ToolFormat::LlamaJson) => marked::llama(writer, &json, parallel, &mut calls),
            Some(ToolFormat::Pythonic) => pythonic::list(writer, &json, parallel, &mut calls),
            Some(ToolFormat::Harmony) | None => {}
        }
    }
    if !custom.is_empty() {
        calls.groups.push(custom::group(writer, &custom));
    }
    let rest =
        if writer.free { free_text(writer, calls, parallel) } else { only_calls(writer, calls, parallel) };
    match format.reasoning.and_then(ReasoningFormat::marks) {
        Some(marks) => after_thought(writer, marks, prompt, &rest),
        None => rest,
    }
}

/// The rest of an answer after reasoning, which the prompt or the answer may have opened.
fn after_thought(
    writer: &mut Writer<'_>,
    (opening, closing): (&str, &str),
    prompt: &str,
    rest: &str,
) -> String {
    let rest = writer.rule(rest);
    let thought = format!(r#"{} ("\n" | "\n\n")? {rest}"#, writer.until(closing));
    // Where no call is owed, the answer may end in the middle of it.
    let thought = if writer.free { format!("({thought} | {})", writer.any_text()) } else { thought };
    if prompt.trim_end().ends_with(opening) {
        return thought;
    }
    format!("{} {thought} | {rest}", writer.at_once(opening))
}

/// Calls alone.
fn only_calls(writer: &mut Writer<'_>, calls: Calls, parallel: bool) -> String {
    let groups = calls.groups.iter().map(|group| format!("{} {}", writer.literal(&group.mark), group.rest));
    let groups: Vec<String> = groups.collect();
    let mut ways = Vec::new();
    if !groups.is_empty() {
        let call = writer.rule(&groups.join(" | "));
        ways.push(if parallel { format!(r#"{call} ("\n" {call})* "\n"?"#) } else { call });
    }
    ways.extend(calls.bare.map(|(whole, _)| whole));
    ways.join(" | ")
}

/// Text in which calls may stand.
fn free_text(writer: &mut Writer<'_>, calls: Calls, parallel: bool) -> String {
    let text = writer.any_text();
    let mut groups = Vec::new();
    for Group { mark, rest } in &calls.groups {
        groups.push(format!("{} {rest}", writer.until(mark)));
    }
    let mut ways = match groups.is_empty() {
        true => vec![text],
        false => {
            let group = writer.rule(&groups.join(" | "));
            if parallel { vec![format!("{group}* {text}")] } else { vec![group, text] }
        }
    };
    for (begin, rest) in calls.bare.into_iter().flat_map(|(_, begins)| begins) {
        ways.push(format!("{} {rest}", writer.lazy(&begin)));
    }
    ways.join(" | ")
}

/// What a JSON tool's input is held to.
fn input(writer: &mut Writer<'_>, tool: &Tool) -> String {
    let ToolInput::Json { schema, strict } = &tool.input else { return String::new() };
    let spec = match schema {
        _ if writer.free && !strict => GrammarSpec::Json,
        Value::Object(schema) => {
            let mut schema = schema.clone();
            schema.entry("type").or_insert_with(|| "object".into());
            GrammarSpec::JsonSchema { schema: Value::Object(schema), strict: *strict }
        }
        _ => GrammarSpec::Json,
    };
    writer.part(spec)
}
