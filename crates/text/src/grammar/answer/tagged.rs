//! Calls whose arguments stand between tags, strings as they are and all else as JSON: Qwen3-Coder, GLM.

use llguidance::regex_to_lark;
use regex_syntax::ast::Ast;
use serde_json::Value;

use super::Group;
use super::arguments::{Held, objects};
use super::writer::Writer;
use crate::Tool;
use crate::grammar::compile::unanchored;
use crate::output::{self, ValueTags};
use crate::schema::{self, Member, Types, Way};

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

/// What an argument may be called that the schema does not name, so that its name is read as it was written.
const OTHER_NAME: &str = r"[^<>\s]([^<>\n\r]{0,60}[^<>\s])?";

/// How null is written.
const NULL: &str = "null";

/// `<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>`; where the model is free to call,
/// the outer opening tag may be missing at a line's start, which it often forgets; within a line it may be talk of calls.
pub(super) fn qwen(writer: &mut Writer<'_>, tools: &[&Tool]) -> Vec<Group> {
    let call = calls(writer, tools, &QWEN, |name| format!("{name}>\n"));
    let (function, end) = (writer.literal("\n<function="), writer.literal("</function>"));
    let outer_end = writer.literal("\n</tool_call>");
    let rest = format!("{function} {call} {end} {outer_end}");
    let mut groups = vec![Group::new("<tool_call>", rest)];
    if writer.free {
        let rest = format!("{call} {end} ({outer_end})?");
        groups.push(Group { at_line: true, ..Group::new("<function=", rest) });
    }
    groups
}

/// `<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n</tool_call>`.
pub(super) fn glm(writer: &mut Writer<'_>, tools: &[&Tool]) -> Group {
    let call = calls(writer, tools, &GLM, |name| format!("{name}\n"));
    Group::new("<tool_call>", format!("{call} {}", writer.literal("</tool_call>")))
}

/// Name and arguments of any of the tools.
fn calls(writer: &mut Writer<'_>, tools: &[&Tool], tags: &Tags, head: impl Fn(&str) -> String) -> String {
    let mut calls = Vec::new();
    for tool in tools {
        if writer.is_full() {
            break;
        }
        let head = writer.literal(&head(&tool.name));
        calls.push(format!("{head} {}", arguments(writer, tool, tags)));
    }
    writer.rule(&calls.join(" | "))
}

/// The arguments in the order of the schema, those that it does not require as the model likes, and then others if
/// there may be any.
fn arguments(writer: &mut Writer<'_>, tool: &Tool, tags: &Tags) -> String {
    let Some((held, objects)) = objects(writer, tool) else { return String::new() };
    let gap = writer.literal(tags.gap);
    let mut ways = Vec::new();
    for object in objects {
        let mut arguments = Vec::new();
        for Member { name, schema, required } in &object.members {
            if writer.is_full() {
                break;
            }
            let head = writer.literal(&format!("{}{name}{}", tags.name, tags.value));
            let value = value(writer, schema, held, tags);
            let optional = if *required { "" } else { "?" };
            arguments.push(format!("({head} {value} {gap}){optional}"));
        }
        if let Some(schema) = &object.others {
            let known: Vec<&str> = object.members.iter().map(|member| member.name).collect();
            let head = writer.name_between(tags.name, OTHER_NAME, &known, tags.value);
            let value = value(writer, schema, held, tags);
            arguments.push(format!("({head} {value} {gap})*"));
        }
        ways.push(arguments.join(" "));
    }
    if let [way] = &mut ways[..] { std::mem::take(way) } else { format!("({})", ways.join(" | ")) }
}

/// A value with its closing tag.
fn value(writer: &mut Writer<'_>, schema: &Value, held: Held<'_>, tags: &Tags) -> String {
    let end = writer.literal(tags.end);
    let Some(ways) = schema::ways(schema, held.root) else {
        // As it is read: a string where the schema names no other type, else JSON. JSON's grammar refuses references that lead nowhere,
        // which is for strict tools alone.
        return match !held.strict || Types::named(schema).within(Types::STRING.or(Types::NULL)) {
            true => writer.value_until(tags.end, tags.read),
            false => format!("{} {end}", held.json(writer, schema)),
        };
    };
    let types = ways.iter().fold(Types::NONE, |types, way| types.or(way.types()));
    let nothing_else = types.within(Types::STRING.or(Types::NULL));
    if !types.has(Types::STRING) {
        return format!("{} {end}", held.json(writer, schema));
    }
    let texts: Vec<Texts<'_>> =
        ways.iter().filter(|way| way.types().has(Types::STRING)).map(Texts::of).collect();
    if texts.iter().any(Texts::is_free) {
        return writer.value_until(tags.end, tags.read);
    }
    if let Some(listed) = Texts::all_listed(&texts) {
        let mut ways: Vec<String> = listed.iter().map(|text| writer.literal(text)).collect();
        if !nothing_else {
            ways.push(held.json(writer, schema));
        } else if types.has(Types::NULL) {
            ways.push(writer.literal(NULL));
        }
        return format!("({}) {end}", ways.join(" | "));
    }
    if !nothing_else {
        // A string in quotes is read as well, where not all that fits is a string.
        return format!("{} {end}", held.json(writer, schema));
    }
    let null = types.has(Types::NULL).then(|| vec![NULL.to_owned()]);
    let ways: Vec<Vec<String>> = texts.into_iter().flat_map(Texts::rules).chain(null).collect();
    writer.matched_until(&ways, tags.end, tags.read)
}

/// What one way of a schema says of strings.
enum Texts<'s> {
    Listed(Vec<&'s str>),
    /// Expressions that a string must match, all of them.
    Matched(Vec<String>),
}

impl<'s> Texts<'s> {
    fn of(way: &Way<'s>) -> Self {
        match way.listed() {
            Some(listed) => Self::Listed(listed.iter().filter_map(|value| value.as_str()).collect()),
            None => {
                Self::Matched(length(way).into_iter().chain(way.all("pattern").filter_map(pattern)).collect())
            }
        }
    }

    fn is_free(&self) -> bool {
        matches!(self, Self::Matched(rules) if rules.is_empty())
    }

    /// The listed texts, if all are.
    fn all_listed(all: &[Self]) -> Option<Vec<&'s str>> {
        let mut texts = Vec::new();
        for one in all {
            let Self::Listed(listed) = one else { return None };
            texts.extend(listed);
        }
        Some(texts)
    }

    /// Expressions for each of its ways.
    fn rules(self) -> Vec<Vec<String>> {
        match self {
            Self::Listed(texts) => texts.into_iter().map(|text| vec![regex_syntax::escape(text)]).collect(),
            Self::Matched(rules) => vec![rules],
        }
    }
}

/// The length that a string must have, as an expression.
fn length(way: &Way<'_>) -> Option<String> {
    let least = way.all("minLength").filter_map(Value::as_u64).max();
    let most = way.all("maxLength").filter_map(Value::as_u64).min();
    let bounded = least.is_some_and(|least| least > 0) || most.is_some();
    let most = most.map(|most| most.to_string()).unwrap_or_default();
    bounded.then(|| format!("(?s:.{{{},{most}}})", least.unwrap_or(0)))
}

/// A `pattern` as an expression that the whole string must match. It is JavaScript's, whose digits and words are ASCII,
/// and may match anywhere; each of its alternatives has anchors of its own. `None` of one that looks ahead or behind, or is none.
fn pattern(pattern: &Value) -> Option<String> {
    let pattern = regex_to_lark(pattern.as_str()?, "dw");
    let parsed = regex_syntax::ast::parse::Parser::new().parse(&pattern);
    let alternatives: Vec<&str> = match &parsed {
        Ok(Ast::Alternation(alternation)) => {
            let spans = alternation.asts.iter().map(Ast::span);
            spans.map(|span| &pattern[span.start.offset..span.end.offset]).collect()
        }
        Ok(_) => vec![&pattern],
        Err(_) => return None,
    };
    let whole = alternatives.into_iter().map(|alternative| {
        let inner = unanchored(alternative);
        let before = if alternative.starts_with('^') { "" } else { "(?s:.*)" };
        let anchored = alternative.len() > inner.len() + usize::from(before.is_empty());
        let after = if anchored { "" } else { "(?s:.*)" };
        format!("{before}(?:{inner}){after}")
    });
    Some(whole.collect::<Vec<_>>().join("|"))
}
