//! Calls as a list in Python, `[f(x=1), g()]`: Llama 3.2 and 4.

use serde_json::Value;

use super::arguments::{Held, objects};
use super::writer::Writer;
use super::{Calls, Group};
use crate::Tool;
use crate::schema::{self, Member, Object, Types};

/// What an argument may be called that the schema does not name.
const OTHER_NAME: &str = "[A-Za-z_][A-Za-z0-9_]{0,60}";

/// The list, alone in an answer or, where the model is free to call, after `<|python_start|>`.
pub(super) fn list(writer: &mut Writer<'_>, tools: &[&Tool], parallel: bool, calls: &mut Calls) {
    let mut inputs = Vec::new();
    for tool in tools {
        if writer.is_full() {
            break;
        }
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
    let whole = format!(r#""[" {call} {more} "]""#);
    calls.bare = Some((whole.clone(), begins.collect()));
    if writer.free {
        let end = writer.literal("<|python_end|>");
        calls.groups.push(Group::new("<|python_start|>", format!("{whole} ({end})?")));
    }
}

/// The arguments by name, in the order of the schema: those it requires, then any of the others, named or not.
fn arguments(writer: &mut Writer<'_>, tool: &Tool) -> String {
    let Some((held, objects)) = objects(writer, tool) else { return String::new() };
    let ways: Vec<String> = objects.iter().map(|object| of_object(writer, object, held)).collect();
    format!("({})", ways.join(" | "))
}

fn of_object(writer: &mut Writer<'_>, object: &Object<'_>, held: Held<'_>) -> String {
    let (first, others): (Vec<&Member<'_>>, Vec<_>) =
        object.members.iter().partition(|member| member.required);
    let mut argument = |member: &Member<'_>| {
        if writer.is_full() {
            return String::new();
        }
        let head = writer.literal(&format!("{}=", member.name));
        format!("{head} {}", value(writer, &member.schema, held))
    };
    let first: Vec<String> = first.into_iter().map(&mut argument).collect();
    let mut others: Vec<(String, &str)> = others.into_iter().map(|other| (argument(other), "?")).collect();
    if let Some(schema) = &object.others {
        let known: Vec<&str> = object.members.iter().map(|member| member.name).collect();
        let head = writer.name_between("", OTHER_NAME, &known, "=");
        others.push((format!("{head} {}", value(writer, schema, held)), "*"));
    }
    let after = |others: &[(String, &str)]| {
        others.iter().map(|(other, times)| format!(r#"(", " {other}){times}"#)).collect::<Vec<_>>().join(" ")
    };
    if !first.is_empty() {
        return format!("{} {}", first.join(r#" ", " "#), after(&others));
    }
    // Without a required one, the first written may be any, and those after it may follow.
    let ways = (0..others.len()).map_while(|i| {
        if writer.is_full() {
            return None;
        }
        // The last may follow itself, if it stands for all that have no name of their own.
        let from = if others[i].1 == "*" { i } else { i + 1 };
        Some(writer.rule(&format!("{} {}", others[i].0, after(&others[from..]))))
    });
    let ways: Vec<String> = ways.collect();
    if ways.is_empty() { r#""""#.into() } else { format!("({})?", ways.join(" | ")) }
}

/// A value: Python's own words for true, false and none at the top, else as JSON, which is Python too.
fn value(writer: &mut Writer<'_>, schema: &Value, held: Held<'_>) -> String {
    let ways = schema::ways(schema, held.root).unwrap_or_default();
    let types = ways.iter().fold(Types::NONE, |types, way| types.or(way.types()));
    let mut words = Vec::new();
    if ways.iter().any(|way| way.types().has(Types::BOOLEAN) && way.listed().is_none()) {
        words.extend([r#""True""#, r#""False""#]);
    }
    if types.has(Types::NULL) {
        words.push(r#""None""#);
    }
    let words = words.join(" | ");
    if !words.is_empty()
        && types.within(Types::BOOLEAN.or(Types::NULL))
        && ways.iter().all(|way| way.listed().is_none())
    {
        return format!("({words})");
    }
    let json = held.json(writer, schema);
    if words.is_empty() { json } else { format!("({words} | {json})") }
}
