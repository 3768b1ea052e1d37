//! The grammar of a whole answer: reasoning, if the model reasons, then text or tool calls, the calls
//! in the markup of the model's family and held to the tools it was offered and to their inputs.
//!
//! Where a call is required, there is nothing but calls. Where the model is free to call, its text is
//! free until it opens a call; from there on the call is held.

mod arguments;
mod custom;
mod harmony;
mod marked;
mod pythonic;
mod tagged;
mod writer;

use serde_json::Value;

use super::{GrammarError, GrammarSpec, JsonLayout};
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
    mark: &'static str,
    /// Whether in free text it is a mark at a line's start alone.
    at_line: bool,
    /// What follows the mark, in Lark.
    rest: String,
}

impl Group {
    fn new(mark: &'static str, rest: String) -> Self {
        Self { mark, at_line: false, rest }
    }
}

/// What an answer is held to.
#[derive(Debug, Clone, Copy)]
pub struct AnswerRules<'a> {
    /// How the model marks calls and reasoning.
    pub format: OutputFormat,
    /// The end of the rendered prompt, in which reasoning may have been opened.
    pub prompt: &'a str,
    /// The tools that may be called.
    pub tools: &'a [Tool],
    /// Whether the prompt shows others too, so that calls are held to the names of these.
    pub others_shown: bool,
    /// Whether they must be.
    pub choice: &'a ToolChoice,
    /// Whether several calls may be made.
    pub parallel: bool,
    /// What the text must match, where no call is required. With it, an answer is either calls or
    /// text, not both.
    pub text: Option<&'a GrammarSpec>,
}

impl Text {
    /// The grammar for an answer. None where nothing is to be held: the text is free, and so is the
    /// model to call whatever the prompt shows, and no tool is strict or has a grammar of its own.
    ///
    /// Inputs are held to their schemas where calls are required, and always for strict tools; of a
    /// free call of another tool, at least name and form.
    ///
    /// # Errors
    /// If a strict tool's schema does not tell which arguments it takes.
    pub fn answer_grammar(&self, rules: AnswerRules<'_>) -> Result<Option<GrammarSpec>, GrammarError> {
        let AnswerRules { format, choice, text, .. } = rules;
        let offered = |tool: &&Tool| match choice {
            ToolChoice::None => false,
            ToolChoice::Auto | ToolChoice::Required => true,
            ToolChoice::Named(name) => *name == tool.name,
        };
        let tools: Vec<&Tool> =
            rules.tools.iter().filter(offered).filter(|_| format.tools.is_some()).collect();
        let required = matches!(choice, ToolChoice::Required | ToolChoice::Named(_)) && !tools.is_empty();
        let text = text.filter(|_| !required);
        let held = rules.others_shown && !tools.is_empty() || tools.iter().any(|tool| tool.is_held());
        if text.is_none() && !required && !held {
            return Ok(None);
        }
        let parallel = rules.parallel && !matches!(choice, ToolChoice::Named(_));
        let mut writer = Writer::new(self, format.markers(), !required);
        let answer = Answer { tools, parallel, text };
        let start = if format.is_harmony() {
            harmony::answer(&mut writer, &answer)
        } else {
            answer.write(&mut writer, format, rules.prompt)
        };
        writer.finish(&start).map(Some)
    }
}

/// What an answer consists of.
struct Answer<'a> {
    tools: Vec<&'a Tool>,
    parallel: bool,
    text: Option<&'a GrammarSpec>,
}

impl Answer<'_> {
    /// The whole, in the formats that mark calls in the text.
    fn write(&self, writer: &mut Writer<'_>, format: OutputFormat, prompt: &str) -> String {
        let calls = calls(writer, format, &self.tools, self.parallel);
        let rest = match self.text {
            Some(text) => {
                let text = writer.part_laid_out(text.clone(), JsonLayout::Loose);
                let calls = only_calls(writer, calls, self.parallel);
                if calls.is_empty() { text } else { format!("{text} | {calls}") }
            }
            None if writer.free => free_text(writer, calls, self.parallel),
            None => only_calls(writer, calls, self.parallel),
        };
        match format.reasoning.and_then(ReasoningFormat::marks) {
            Some(marks) => after_thought(writer, marks, prompt, &rest, self.text.is_none() && writer.free),
            None => rest,
        }
    }
}

/// How calls of these tools are written.
fn calls(writer: &mut Writer<'_>, format: OutputFormat, tools: &[&Tool], parallel: bool) -> Calls {
    let (custom, json): (Vec<&Tool>, Vec<&Tool>) = tools.iter().partition(|tool| tool.is_custom());
    let mut calls = Calls { groups: Vec::new(), bare: None };
    if !json.is_empty() {
        match format.tools {
            Some(ToolFormat::Hermes) => calls.groups.push(marked::hermes(writer, &json)),
            Some(ToolFormat::QwenXml) => calls.groups.extend(tagged::qwen(writer, &json)),
            Some(ToolFormat::Glm) => calls.groups.push(tagged::glm(writer, &json)),
            Some(ToolFormat::Mistral) => calls.groups.push(marked::mistral(writer, &json, parallel)),
            Some(ToolFormat::DeepSeek) => calls.groups.extend(marked::deepseek(writer, &json, parallel)),
            Some(ToolFormat::LlamaJson) => marked::llama(writer, &json, parallel, &mut calls),
            Some(ToolFormat::Pythonic) => pythonic::list(writer, &json, parallel, &mut calls),
            Some(ToolFormat::Harmony) | None => {}
        }
    }
    if !custom.is_empty() {
        calls.groups.push(custom::group(writer, &custom));
    }
    calls
}

/// The rest of an answer after reasoning, which the prompt or the answer may have opened. `may_end`:
/// whether an answer may end in the middle of it.
fn after_thought(
    writer: &mut Writer<'_>,
    (opening, closing): (&str, &str),
    prompt: &str,
    rest: &str,
    may_end: bool,
) -> String {
    let rest = writer.rule(rest);
    let thought = format!(r#"{} ("\n" | "\n\n")? {rest}"#, writer.until(closing));
    let thought = if may_end { format!("({thought} | {})", writer.any_text()) } else { thought };
    if prompt.trim_end().ends_with(opening) {
        return thought;
    }
    format!("{} {thought} | {rest}", writer.at_once(opening))
}

/// Calls alone.
fn only_calls(writer: &mut Writer<'_>, calls: Calls, parallel: bool) -> String {
    let groups = calls.groups.iter().map(|group| format!("{} {}", writer.literal(group.mark), group.rest));
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
    for Group { mark, at_line, rest } in &calls.groups {
        let begin = if *at_line { writer.until_at_line(mark) } else { writer.until(mark) };
        groups.push(format!("{begin} {rest}"));
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
