//! Calls as a list in Python, `[f(x=1), g()]`: Llama 3.2 and 4.

use serde_json::{Map, Value};

use super::Calls;
use super::tagged::within;
use super::writer::Writer;
use crate::grammar::GrammarSpec;
use crate::{Tool, ToolInput};

/// The list, alone in an answer.
pub(super) fn list(writer: &mut Writer<'_>, tools: &[&Tool], parallel: bool, calls: &mut Calls) {
    let mut inputs = Vec::new();
    for tool in tools {
        inputs.push((tool, arguments(writer, tool)));
    }
    let all: Vec<String> = inputs
        .iter()
        .map(|(tool, arguments)| format!(r#"{} {arguments} ")""#, writer.literal(&format!("{}(", tool.name))))
        .collect();
    let call = writer.rule(&all.join(" | "));
    let more = if parallel { format!(r#"(", " {call})*"#) } else { String::new() };
    let begins = inputs.iter().map(|(tool, arguments)| {
        let begin = format!(r"\[{}\(", regex_syntax::escape(&tool.name));
        (begin, format!(r#"{arguments} ")" {more} "]""#))
    });
    calls.bare = Some((format!(r#""[" {call} {more} "]""#), begins.collect()));
}

/// The arguments by name, in the order of the schema: those it requires, then any of the others.
fn arguments(writer: &mut Writer<'_>, tool: &Tool) -> String {
    let ToolInput::Json { schema, strict } = &tool.input else { return String::new() };
    let no_properties = Map::new();
    let properties = schema["properties"].as_object().unwrap_or(&no_properties);
    let required: Vec<&str> =
        schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let (first, others): (Vec<_>, Vec<_>) =
        properties.iter().partition(|(name, _)| required.contains(&name.as_str()));
    let mut argument = |(name, property): (&String, &Value)| {
        let head = writer.literal(&format!("{name}="));
        format!("{head} {}", value(writer, property, schema, *strict))
    };
    let first: Vec<String> = first.into_iter().map(&mut argument).collect();
    let others: Vec<String> = others.into_iter().map(&mut argument).collect();
    if !first.is_empty() {
        let others = others.iter().map(|other| format!(r#"(", " {other})?"#)).collect::<Vec<_>>();
        return format!("{} {}", first.join(r#" ", " "#), others.join(" "));
    }
    // Without a required one, the first written may be any, and those after it may follow.
    let ways = (0..others.len()).map(|i| {
        let after = others[i + 1..].iter().map(|other| format!(r#"(", " {other})?"#)).collect::<Vec<_>>();
        writer.rule(&format!("{} {}", others[i], after.join(" ")))
    });
    let ways: Vec<String> = ways.collect();
    if ways.is_empty() { String::new() } else { format!("({})?", ways.join(" | ")) }
}

/// A value: Python's own words for true, false and none at the top, else as JSON, which is Python too.
fn value(writer: &mut Writer<'_>, property: &Value, root: &Value, strict: bool) -> String {
    match property["type"].as_str() {
        Some("boolean") => r#"("True" | "False")"#.into(),
        Some("null") => r#""None""#.into(),
        _ => writer.part(GrammarSpec::JsonSchema { schema: within(property, root), strict }),
    }
}
