//! Calls as JSON after a mark: Hermes, Mistral, DeepSeek; Llama's, whose mark may be missing.

use super::writer::{Writer, json_string};
use super::{Calls, Group, input};
use crate::Tool;

/// `<tool_call>\n{"name": "f", "arguments": {..}}\n</tool_call>`.
pub(super) fn hermes(writer: &mut Writer<'_>, tools: &[&Tool]) -> Group {
    let object = objects(writer, tools, "arguments");
    let (before, after) = (writer.literal("\n"), writer.literal("\n</tool_call>"));
    Group::new("<tool_call>", format!("{before} {object} {after}"))
}

/// `[TOOL_CALLS]f[ARGS]{..}` where the model knows that mark, else `[TOOL_CALLS] [{..}, {..}]`.
pub(super) fn mistral(writer: &mut Writer<'_>, tools: &[&Tool], parallel: bool) -> Group {
    let mark = "[TOOL_CALLS]";
    if writer.knows("[ARGS]") {
        let call = alternatives(writer, tools, |writer, tool| {
            let head = writer.literal(&format!("{}[ARGS]", tool.name));
            format!("{head} {}", input(writer, tool))
        });
        // Calls follow each other without a gap.
        let more = if parallel { format!("({} {call})*", writer.literal(mark)) } else { String::new() };
        return Group::new(mark, format!("{call} {more}"));
    }
    let object = objects(writer, tools, "arguments");
    let more = if parallel { format!(r#"(", " {object})*"#) } else { String::new() };
    Group::new(mark, format!(r#"" [" {object} {more} "]""#))
}

/// Both of DeepSeek's ways: V3 and R1 fence the arguments, V3.1 does not. Where the model is free to call, the outer mark
/// may be missing.
pub(super) fn deepseek(writer: &mut Writer<'_>, tools: &[&Tool], parallel: bool) -> Vec<Group> {
    let call = alternatives(writer, tools, |writer, tool| {
        let arguments = input(writer, tool);
        let name = &tool.name;
        let fenced = writer.literal(&format!("function<｜tool▁sep｜>{name}\n```json\n"));
        let bare = writer.literal(&format!("{name}<｜tool▁sep｜>"));
        format!(r#"({fenced} {arguments} "\n```" | {bare} {arguments})"#)
    });
    const BEGIN: &str = "<｜tool▁call▁begin｜>";
    let (begin, end) = (writer.literal(BEGIN), writer.literal("<｜tool▁call▁end｜>"));
    let all_end = writer.literal("<｜tool▁calls▁end｜>");
    let alone = Group::new(BEGIN, format!("{call} {end} ({all_end})?"));
    let call = writer.rule(&format!("{begin} {call} {end}"));
    let more = if parallel { format!(r#"("\n"? {call})*"#) } else { String::new() };
    let all = Group::new("<｜tool▁calls▁begin｜>", format!("{call} {more} {all_end}"));
    if writer.free { vec![all, alone] } else { vec![all] }
}

/// `{"name": "f", "parameters": {..}}`, several parted by semicolons, alone or after `<|python_tag|>`.
pub(super) fn llama(writer: &mut Writer<'_>, tools: &[&Tool], parallel: bool, calls: &mut Calls) {
    let object = objects(writer, tools, "parameters");
    let more = if parallel { format!(r#"("; " {object})*"#) } else { String::new() };
    let mut begins = Vec::new();
    for tool in tools {
        let name = regex_syntax::escape(&json_string(&tool.name));
        let begin = format!(r#"\{{\s?"name"\s?:\s?{name}\s?,\s?"parameters"\s?:"#);
        begins.push((begin, format!(r#"" " {} "}}" {more}"#, input(writer, tool))));
    }
    calls.bare = Some((format!("{object} {more}"), begins));
    if writer.free {
        calls.groups.push(Group::new("<|python_tag|>", format!("{object} {more}")));
    }
}

/// `{"name": "f", "arguments": {..}}` of any of the tools.
fn objects(writer: &mut Writer<'_>, tools: &[&Tool], key: &str) -> String {
    alternatives(writer, tools, |writer, tool| {
        let head = writer.literal(&format!(r#"{{"name": {}, "{key}": "#, json_string(&tool.name)));
        format!(r#"{head} {} "}}""#, input(writer, tool))
    })
}

fn alternatives(
    writer: &mut Writer<'_>,
    tools: &[&Tool],
    call: impl Fn(&mut Writer<'_>, &Tool) -> String,
) -> String {
    let calls: Vec<String> = tools.iter().map(|tool| call(writer, tool)).collect();
    writer.rule(&calls.join(" | "))
}
