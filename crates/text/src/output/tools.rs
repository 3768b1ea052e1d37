//! The tools that were offered, as readers look them up.

use std::collections::HashMap;

use serde_json::Value;

use crate::{Tool, ToolInput};

/// Longer names, in bytes, are no tool's.
pub(super) const MAX_NAME: usize = 256;

/// References in a schema are followed so far.
const MAX_DEPTH: usize = 8;

/// The offered tools by name.
pub(super) struct Offered {
    tools: HashMap<String, Tool>,
}

/// What an argument may be, as its tool's schema has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A string.
    Text,
    /// A string or null.
    TextOrNull,
    /// No string.
    Other,
    /// Anything, or the schema does not say.
    Unknown,
}

impl Offered {
    pub(super) fn new(tools: &[Tool]) -> Self {
        Self { tools: tools.iter().map(|tool| (tool.name.clone(), tool.clone())).collect() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.tools.is_empty()
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.tools.contains_key(name)
    }

    /// Whether the tool's calls carry text; one that was not offered carries an object.
    pub(super) fn is_custom(&self, name: &str) -> bool {
        self.tools.get(name).is_some_and(Tool::is_custom)
    }

    /// What an argument of a tool may be.
    pub(super) fn kind(&self, tool: &str, argument: &str) -> Kind {
        let Some(schema) = self.schema(tool) else { return Kind::Unknown };
        let mut types = Types::default();
        types.add(&schema["properties"][argument], schema, 0);
        match types {
            Types { string: true, null: false, other: false } => Kind::Text,
            Types { string: true, null: true, other: false } => Kind::TextOrNull,
            Types { string: false, null: _, other: true } => Kind::Other,
            _ => Kind::Unknown,
        }
    }

    /// The name of the argument at a place.
    pub(super) fn argument(&self, tool: &str, place: usize) -> Option<&str> {
        self.schema(tool)?["properties"].as_object()?.keys().nth(place).map(String::as_str)
    }

    fn schema(&self, tool: &str) -> Option<&Value> {
        match &self.tools.get(tool)?.input {
            ToolInput::Json { schema, .. } => Some(schema),
            _ => None,
        }
    }
}

/// The JSON types that a schema allows; none: it does not say.
#[derive(Default)]
struct Types {
    string: bool,
    null: bool,
    other: bool,
}

impl Types {
    fn add(&mut self, schema: &Value, root: &Value, depth: usize) {
        if depth > MAX_DEPTH {
            return;
        }
        match &schema["type"] {
            Value::String(name) => self.add_named(name),
            Value::Array(names) => {
                names.iter().filter_map(Value::as_str).for_each(|name| self.add_named(name))
            }
            _ => self.add_untyped(schema, root, depth),
        }
    }

    fn add_untyped(&mut self, schema: &Value, root: &Value, depth: usize) {
        let reference = schema["$ref"].as_str().and_then(|path| root.pointer(path.strip_prefix('#')?));
        let unions =
            ["anyOf", "oneOf", "allOf"].into_iter().filter_map(|key| schema[key].as_array()).flatten();
        for part in reference.into_iter().chain(unions) {
            self.add(part, root, depth + 1);
        }
        let values = schema["enum"].as_array().into_iter().flatten();
        for value in values.chain(schema.get("const")) {
            match value {
                Value::String(_) => self.string = true,
                Value::Null => self.null = true,
                _ => self.other = true,
            }
        }
        self.other |= schema.get("properties").is_some() || schema.get("items").is_some();
    }

    fn add_named(&mut self, name: &str) {
        match name {
            "string" => self.string = true,
            "null" => self.null = true,
            _ => self.other = true,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_schema_says_what_an_argument_is() {
        let schema = json!({
            "properties": {
                "a": {"type": "string"},
                "b": {"type": ["string", "null"]},
                "c": {"anyOf": [{"$ref": "#/$defs/text"}, {"type": "null"}]},
                "d": {"enum": ["x", "y"]},
                "e": {"type": ["integer", "null"]},
                "f": {"type": ["string", "integer"]},
                "g": {"$ref": "#/properties/g"},
                "h": {"description": "anything"},
                "i": {"properties": {}},
            },
            "$defs": {"text": {"type": "string"}},
        });
        let input = ToolInput::Json { schema, strict: false };
        let tools = Offered::new(&[Tool { name: "f".into(), description: String::new(), input }]);
        let kinds = "abcdefghij".chars().map(|name| tools.kind("f", &name.to_string()));
        let expected = [
            Kind::Text,
            Kind::TextOrNull,
            Kind::TextOrNull,
            Kind::Text,
            Kind::Other,
            Kind::Unknown,
            Kind::Unknown,
            Kind::Unknown,
            Kind::Other,
            Kind::Unknown,
        ];
        assert!(kinds.eq(expected));
        assert_eq!(tools.kind("g", "a"), Kind::Unknown);
        assert_eq!(tools.argument("f", 1), Some("b"));
        assert_eq!(tools.argument("f", 9), None);
    }
}
