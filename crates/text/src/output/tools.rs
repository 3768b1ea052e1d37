//! The tools that were offered, as readers look them up.

use std::collections::HashMap;

use serde_json::Value;

use crate::schema::{self, Types};
use crate::{Tool, ToolInput};

/// Longer names, in bytes, are no tool's.
pub(super) const MAX_NAME: usize = 256;

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
    /// A string or something else, or the schema does not say.
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

    /// Whether one of them takes an object.
    pub(super) fn any_takes_json(&self) -> bool {
        self.tools.values().any(|tool| !tool.is_custom())
    }

    /// Whether calls of one of them are held by a grammar.
    pub(super) fn any_is_held(&self) -> bool {
        self.tools.values().any(Tool::is_held)
    }

    /// Whether calls of the tool are held by a grammar.
    pub(super) fn is_held(&self, name: &str) -> bool {
        self.tools.get(name).is_some_and(Tool::is_held)
    }

    /// Whether a whole input certainly is what the tool's grammar would hold it to.
    pub(super) fn vouches(&self, tool: &str, input: &str) -> bool {
        let (Some(schema), Ok(input)) = (self.schema(tool), serde_json::from_str::<Value>(input)) else {
            return false;
        };
        input.is_object() && schema::surely_fits(&input, schema, schema)
    }

    /// Whether the tool's calls carry text; one that was not offered carries an object.
    pub(super) fn is_custom(&self, name: &str) -> bool {
        self.tools.get(name).is_some_and(Tool::is_custom)
    }

    /// What an argument of a tool may be.
    pub(super) fn kind(&self, tool: &str, argument: &str) -> Kind {
        let Some(schema) = self.schema(tool) else { return Kind::Unknown };
        let types = schema::types(&schema::member(schema, argument), schema);
        let text_or_null = Types::STRING.or(Types::NULL);
        match types {
            Types::NONE => Kind::Unknown,
            Types::STRING => Kind::Text,
            types if types == text_or_null => Kind::TextOrNull,
            types if !types.has(Types::STRING) => Kind::Other,
            _ => Kind::Unknown,
        }
    }

    /// Whether an argument of a tool may be this value.
    pub(super) fn takes(&self, tool: &str, argument: &str, value: &Value) -> bool {
        self.schema(tool).is_none_or(|schema| schema::fits(value, &schema::member(schema, argument), schema))
    }

    /// The name of the argument at a place.
    pub(super) fn argument(&self, tool: &str, place: usize) -> Option<&str> {
        schema::names(self.schema(tool)?).get(place).copied()
    }

    fn schema(&self, tool: &str) -> Option<&Value> {
        match &self.tools.get(tool)?.input {
            ToolInput::Json { schema, .. } => Some(schema),
            _ => None,
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
                "k": {"allOf": [{"type": ["string", "integer"]}, {"$ref": "#/properties/a"}]},
                "l": {"enum": ["x", null]},
                "m": {"enum": ["x", 1, null]},
                "n": {"$ref": "#/$defs/a%3Cb~1c%3E"},
                "o": {"type": "string", "oneOf": vec![json!({"const": "1"}); 70]},
                "p": {"anyOf": [{"type": "string"}, {"$ref": "other.json"}]},
            },
            "$defs": {"text": {"type": "string"}, "a<b/c>": {"type": "boolean"}},
        });
        let input = ToolInput::Json { schema, strict: false };
        let tools = Offered::new(&[Tool { name: "f".into(), description: String::new(), input }]);
        let kinds = "abcdefghijklmnop".chars().map(|name| tools.kind("f", &name.to_string()));
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
            Kind::Text,
            Kind::TextOrNull,
            Kind::Unknown,
            Kind::Other,
            Kind::Text,
            Kind::Text,
        ];
        assert!(kinds.eq(expected));
        assert_eq!(tools.kind("g", "a"), Kind::Unknown);
        assert_eq!(tools.argument("f", 1), Some("b"));
        assert_eq!(tools.argument("f", 99), None);
    }
}
