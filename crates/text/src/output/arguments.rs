//! A JSON object of arguments that a model writes as text between tags, typed by the tool's schema.

use std::sync::Arc;

use serde_json::Value;

use super::json::escape_into;
use super::sink::Sink;
use super::tools::{Kind, Offered};

/// Writes the input of one call. Strings go out as they come; what else there is waits for its end,
/// since only then it shows whether it is JSON.
pub(super) struct Arguments {
    tools: Arc<Offered>,
    tool: String,
    /// A custom tool's input is the text of its one argument.
    custom: bool,
    any: bool,
    value: Written,
    scratch: String,
}

/// How the value at hand is written.
enum Written {
    String,
    /// A string unless it is `null`: as much of that as there is.
    StringOrNull(String),
    Whole {
        key: String,
        value: String,
        kind: Kind,
    },
    /// A custom tool's text.
    Raw,
    Ignored,
}

impl Arguments {
    /// Begins a call.
    pub(super) fn begin(tools: &Arc<Offered>, tool: &str, out: &mut Sink<'_>) -> Self {
        out.begin(tool);
        Self {
            tools: tools.clone(),
            tool: tool.to_owned(),
            custom: tools.is_custom(tool),
            any: false,
            value: Written::Ignored,
            scratch: String::new(),
        }
    }

    /// The tool's name.
    pub(super) fn tool(&self) -> &str {
        &self.tool
    }

    /// Whether the call is a custom tool's.
    pub(super) fn is_custom(&self) -> bool {
        self.custom
    }

    /// Writes the key of the next argument, whose value something else writes.
    pub(super) fn key(&mut self, key: &str, out: &mut Sink<'_>) {
        if !self.custom {
            self.scratch.clear();
            self.scratch.push_str(if self.any { ", \"" } else { "{\"" });
            key.chars().for_each(|c| escape_into(c, &mut self.scratch));
            self.scratch.push_str("\": ");
            out.input(&self.scratch);
        }
        self.any = true;
    }

    /// The next argument. `push` adds its value, and `end_value` ends it.
    pub(super) fn begin_value(&mut self, key: &str, out: &mut Sink<'_>) {
        if self.custom {
            self.value = if self.any { Written::Ignored } else { Written::Raw };
        }
        self.key(key, out);
        if self.custom {
            return;
        }
        self.value = match self.tools.kind(&self.tool, key) {
            Kind::Text => {
                out.input("\"");
                Written::String
            }
            Kind::TextOrNull => Written::StringOrNull(String::new()),
            kind => Written::Whole { key: key.to_owned(), value: String::new(), kind },
        };
    }

    pub(super) fn push(&mut self, text: &str, out: &mut Sink<'_>) {
        self.scratch.clear();
        match &mut self.value {
            Written::String => text.chars().for_each(|c| escape_into(c, &mut self.scratch)),
            Written::Raw => self.scratch.push_str(text),
            Written::Whole { value, .. } => value.push_str(text),
            Written::StringOrNull(value) => {
                value.push_str(text);
                if !"null".starts_with(value.as_str()) {
                    self.scratch.push('"');
                    value.chars().for_each(|c| escape_into(c, &mut self.scratch));
                    self.value = Written::String;
                }
            }
            Written::Ignored => {}
        }
        out.input(&self.scratch);
    }

    pub(super) fn end_value(&mut self, out: &mut Sink<'_>) {
        match std::mem::replace(&mut self.value, Written::Ignored) {
            Written::String => out.input("\""),
            Written::StringOrNull(value) if value == "null" => out.input(&value),
            Written::StringOrNull(value) => out.input(&quoted(&value)),
            Written::Whole { key, value, kind } => {
                let takes = |json: &Value| self.tools.takes(&self.tool, &key, json);
                out.input(&typed(&value, kind, takes));
            }
            Written::Raw | Written::Ignored => {}
        }
    }

    /// Ends the call.
    pub(super) fn close(&mut self, out: &mut Sink<'_>) {
        if !self.custom {
            out.input(if self.any { "}" } else { "{}" });
        }
        out.end();
    }
}

/// The JSON that a text stands for: itself if it is JSON, else a string. Where the schema takes strings too, it is a
/// string if the schema takes that and not what it says as JSON.
fn typed(text: &str, kind: Kind, takes: impl Fn(&Value) -> bool) -> String {
    let trimmed = text.trim();
    if let Ok(json) = serde_json::from_str::<Value>(trimmed)
        && (kind == Kind::Other || takes(&json) || !takes(&text.into()))
    {
        return trimmed.to_owned();
    }
    match trimmed {
        "True" | "False" if kind == Kind::Other => trimmed.to_lowercase(),
        "None" if kind == Kind::Other => "null".to_owned(),
        _ => quoted(text),
    }
}

fn quoted(text: &str) -> String {
    let mut json = String::from('"');
    text.chars().for_each(|c| escape_into(c, &mut json));
    json.push('"');
    json
}
