//! Tools as a model is offered them, in no dialect's terms.

use serde_json::Value;

/// A tool that the model may call.
#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    /// The name the model calls it by; unique in a request.
    pub name: String,
    /// What it does, for the model.
    pub description: String,
    /// What a call of it carries.
    pub input: ToolInput,
}

/// What a call of a tool carries.
#[derive(Debug, Clone, PartialEq)]
pub enum ToolInput {
    /// A JSON object.
    Json {
        /// Its JSON schema.
        schema: Value,
        /// Whether calls are held to the schema while they are generated.
        strict: bool,
    },
    /// Free text.
    Text,
    /// Text of a grammar in Lark's syntax, held to it while it is generated.
    Lark(String),
    /// Text that matches a regular expression as a whole, held to it while it is generated.
    Regex(String),
}

impl Tool {
    /// Whether its calls carry text instead of a JSON object.
    pub fn is_custom(&self) -> bool {
        !matches!(self.input, ToolInput::Json { .. })
    }

    /// Whether its calls are held to what they carry even where the model is free to make them.
    pub(crate) fn is_held(&self) -> bool {
        match &self.input {
            ToolInput::Json { strict, .. } => *strict,
            ToolInput::Text => false,
            ToolInput::Lark(_) | ToolInput::Regex(_) => true,
        }
    }
}

/// Which tools the model may or must call.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ToolChoice {
    /// As it likes.
    #[default]
    Auto,
    /// None.
    None,
    /// At least one.
    Required,
    /// This one.
    Named(String),
}
