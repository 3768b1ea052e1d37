//! Request bodies of the Messages dialect. Unknown fields are ignored.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::openai::ApiError;

/// The fields that only this dialect has.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct MessagesFields {
    pub messages: Option<Vec<InputMessage>>,
    pub system: Option<Content>,
    pub tools: Option<Vec<Map<String, Value>>>,
    pub tool_choice: Option<ToolChoiceField>,
    pub stop_sequences: Option<Vec<String>>,
    pub metadata: Option<Map<String, Value>>,
    pub thinking: Option<Thinking>,
    pub output_config: Option<OutputConfig>,
    /// The former place of `output_config.format`.
    pub output_format: Option<OutputFormatField>,
}

/// A message as clients write it.
#[derive(Debug, Deserialize)]
pub(super) struct InputMessage {
    pub role: String,
    pub content: Content,
}

/// One text, or blocks.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string or an array of content blocks, each with a `type`")]
pub(super) enum Content {
    Text(String),
    Blocks(Vec<Block>),
}

impl Content {
    /// The blocks; a text is one.
    pub fn into_blocks(self) -> Vec<Block> {
        match self {
            Self::Text(text) => {
                let fields = [("type", "text".into()), ("text", Value::String(text))];
                vec![Block {
                    fields: fields.map(|(key, value)| (key.to_owned(), value)).into_iter().collect(),
                }]
            }
            Self::Blocks(blocks) => blocks,
        }
    }
}

/// A content block. Its fields depend on its type, and there are types that we only pass over.
#[derive(Debug, Deserialize)]
#[serde(transparent)]
pub(super) struct Block {
    pub fields: Map<String, Value>,
}

impl Block {
    pub fn kind(&self) -> &str {
        self.str("type").unwrap_or_default()
    }

    pub fn str(&self, key: &str) -> Option<&str> {
        self.fields.get(key)?.as_str()
    }

    /// A string that must be there; `at` is the block's place in the request.
    pub fn required(&self, key: &str, at: &str) -> Result<&str, ApiError> {
        self.str(key).ok_or_else(|| {
            let message = format!("A block of type `{}` needs `{key}`, a string.", self.kind());
            ApiError::param(format!("{at}.{key}"), message)
        })
    }

    /// Blocks within this one, as in a tool's result.
    pub fn nested(&self, at: &str) -> Result<Vec<Block>, ApiError> {
        nested(self.fields.get("content"), &format!("{at}.content"))
    }
}

/// Content that lies within another structure.
pub(super) fn nested(content: Option<&Value>, at: &str) -> Result<Vec<Block>, ApiError> {
    match content {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(content) => Content::deserialize(content)
            .map(Content::into_blocks)
            .map_err(|error| ApiError::param(at, format!("{error}."))),
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct ToolChoiceField {
    pub r#type: String,
    pub name: Option<String>,
    pub disable_parallel_tool_use: Option<bool>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Thinking {
    pub r#type: String,
    pub budget_tokens: Option<i64>,
    pub display: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct OutputConfig {
    pub effort: Option<String>,
    pub format: Option<OutputFormatField>,
}

#[derive(Debug, Deserialize)]
pub(super) struct OutputFormatField {
    pub r#type: String,
    pub schema: Option<Value>,
}
