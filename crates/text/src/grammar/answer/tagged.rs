//! Calls whose arguments stand between tags, strings as they are and all else as JSON: Qwen3-Coder, GLM.

use serde_json::{Map, Value};

use super::Group;
use super::writer::Writer;
use crate::grammar::GrammarSpec;
use crate::grammar::compile::unanchored;
use crate::output::{self, ValueTags};
use crate::{Tool, ToolInput};

/// How a family writes an argument: before its name, between name and value, after the value.
struct Tags {
    name: &'static str,
    value: &'static str,
    end: &'static str,
    gap: &'static str,
    /// As they are read.
    read: &'static ValueTags,
}

const QWEN: Tags =
    Tags { name: "<parameter=", value: ">\n", end: "\n</parameter>", gap: "\n", read: &output::QWEN.values };
const GLM: Tags = Tags {
    name: "<arg_key>",
    value: "</arg_key>\n<arg_value>",
    end: "</arg_value>",
    gap: "\n",
    read: &output::GLM.values,
};

/// `<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>`.
pub(super) fn qwen(writer: &mut Writer<'_>, tools: &[&Tool]) -> Group {
    group(writer, tools, &QWEN, |name| format!("\n<function={name}>\n"), "</function>\n</tool_call>")
}

/// `<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n</tool_call>`.
pub(super) fn glm(writer: &mut Writer<'_>, tools: &[&Tool]) -> Group {
    group(writer, tools, &GLM, |name| format!("{name}\n"), "</tool_call>")
}

fn group(
    writer: &mut Writer<'_>,
    tools: &[&Tool],
    tags: &Tags,
    head: impl Fn(&str) -> String,
    end: &str,
) -> Group {
    let mut calls = Vec::new();
    for tool in tools {
        let head = writer.literal(&head(&tool.name));
        calls.push(format!("{head} {}", arguments(writer, tool, tags)));
    }
    let call = writer.rule(&calls.join(" | "));
    Group { mark: "<tool_call>".into(), rest: format!("{call} {}", writer.literal(end)) }
}

/// The arguments in the order of the schema, those that it does not require as the model likes.
fn arguments(writer: &mut Writer<'_>, tool: &Tool, tags: &Tags) -> String {
    let ToolInput::Json { schema, strict } = &tool.input else { return String::new() };
    let no_properties = Map::new();
    let properties = schema["properties"].as_object().unwrap_or(&no_properties);
    let required: Vec<&str> =
        schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let mut arguments = Vec::new();
    for (name, property) in properties {
        let head = writer.literal(&format!("{}{name}{}", tags.name, tags.value));
        let value = value(writer, property, schema, *strict, tags);
        let optional = if required.contains(&name.as_str()) { "" } else { "?" };
        let gap = writer.literal(tags.gap);
        arguments.push(format!("({head} {value} {gap}){optional}"));
    }
    arguments.join(" ")
}

/// A value with its closing tag.
fn value(writer: &mut Writer<'_>, property: &Value, root: &Value, strict: bool, tags: &Tags) -> String {
    let end = writer.literal(tags.end);
    let texts = literal_texts(property);
    if !texts.is_empty() {
        let texts: Vec<String> = texts.iter().map(|text| writer.literal(text)).collect();
        return format!("({}) {end}", texts.join(" | "));
    }
    let held = text_rules(property);
    if !held.is_empty() {
        return writer.matched_until(&held, tags.end, tags.read);
    }
    if may_be_text(property, root, 0) {
        return writer.value_until(tags.end, tags.read);
    }
    format!("{} {end}", writer.part(GrammarSpec::JsonSchema { schema: within(property, root), strict }))
}

/// The texts that a schema lists, if it allows nothing else.
fn literal_texts(schema: &Value) -> Vec<&str> {
    let listed =
        schema["enum"].as_array().map(Vec::as_slice).or(schema.get("const").map(std::slice::from_ref));
    let listed = listed.unwrap_or_default();
    let texts: Vec<&str> = listed.iter().filter_map(Value::as_str).filter(|text| !text.is_empty()).collect();
    if texts.len() == listed.len() { texts } else { Vec::new() }
}

/// Expressions that a string must match, if the schema allows a string alone and holds it to any.
fn text_rules(schema: &Value) -> Vec<String> {
    if schema["type"] != "string" {
        return Vec::new();
    }
    let [least, most] = ["minLength", "maxLength"].map(|key| schema[key].as_u64());
    let length = (least.is_some() || most.is_some()).then(|| {
        let most = most.map(|most| most.to_string()).unwrap_or_default();
        format!("(?s:.{{{},{most}}})", least.unwrap_or(0))
    });
    let pattern = schema["pattern"].as_str().map(|pattern| {
        let whole = unanchored(pattern);
        let before = if pattern.starts_with('^') { "" } else { "(?s:.*)" };
        let after = if pattern.len() > whole.len() + usize::from(before.is_empty()) { "" } else { "(?s:.*)" };
        format!("{before}(?:{whole}){after}")
    });
    length.into_iter().chain(pattern).collect()
}

/// Whether a schema allows a string, or does not say what it allows.
pub(super) fn may_be_text(schema: &Value, root: &Value, depth: usize) -> bool {
    const MAX_DEPTH: usize = 16;
    if depth > MAX_DEPTH {
        return true;
    }
    match &schema["type"] {
        Value::String(name) => return name == "string",
        Value::Array(names) => return names.iter().any(|name| name == "string"),
        _ => {}
    }
    let target = schema["$ref"].as_str().and_then(|path| root.pointer(path.strip_prefix('#')?));
    let unions = ["anyOf", "oneOf"].into_iter().filter_map(|key| schema[key].as_array()).flatten();
    let parts: Vec<&Value> = target.into_iter().chain(unions).collect();
    if !parts.is_empty() {
        return parts.into_iter().any(|part| may_be_text(part, root, depth + 1));
    }
    match schema["enum"].as_array() {
        Some(values) => values.iter().any(Value::is_string),
        None => schema.get("properties").is_none() && schema.get("items").is_none(),
    }
}

/// A property's schema on its own, with the definitions of the whole that it may refer to.
pub(super) fn within(property: &Value, root: &Value) -> Value {
    let mut schema = property.as_object().cloned().unwrap_or_default();
    for key in ["$defs", "definitions"] {
        if let Some(definitions) = root.get(key) {
            schema.entry(key).or_insert_with(|| definitions.clone());
        }
    }
    Value::Object(schema)
}
