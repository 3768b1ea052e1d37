//! What an answer is held to: `response_format`, and the fields that vLLM's clients send.

use serde::Deserialize;
use serde_json::Value;

use super::error::ApiError;
use crate::conversation::AnswerFormat;

/// The fields that say what an answer is held to; at most one of them may.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct FormatFields {
    response_format: Option<ResponseFormat>,
    structured_outputs: Option<Structured>,
    guided_json: Option<Value>,
    guided_regex: Option<String>,
    guided_choice: Option<Vec<String>>,
    guided_grammar: Option<String>,
}

#[derive(Debug, Deserialize)]
struct ResponseFormat {
    r#type: String,
    json_schema: Option<NamedSchema>,
    /// Where some clients put the schema of a `json_object`.
    schema: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct NamedSchema {
    schema: Option<Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Structured {
    json: Option<Value>,
    json_object: Option<bool>,
    regex: Option<String>,
    choice: Option<Vec<String>>,
    grammar: Option<String>,
}

impl FormatFields {
    /// What the answer is held to.
    pub fn answer(self) -> Result<AnswerFormat, ApiError> {
        let structured = self.structured_outputs.unwrap_or_default();
        let wanted = [
            self.response_format.map(ResponseFormat::answer).transpose()?.flatten(),
            self.guided_json.or(structured.json).map(schema).transpose()?,
            structured.json_object.unwrap_or(false).then_some(AnswerFormat::JsonObject),
            self.guided_regex.or(structured.regex).map(AnswerFormat::Regex),
            self.guided_choice.or(structured.choice).map(choice).transpose()?,
            self.guided_grammar.or(structured.grammar).map(AnswerFormat::Lark),
        ];
        let mut wanted = wanted.into_iter().flatten();
        match (wanted.next(), wanted.next()) {
            (None, _) => Ok(AnswerFormat::Text),
            (Some(format), None) => Ok(format),
            (Some(_), Some(_)) => Err(ApiError::param(
                "structured_outputs",
                "The answer's format is given twice; send one of response_format, structured_outputs and guided_*.",
            )),
        }
    }
}

impl ResponseFormat {
    fn answer(self) -> Result<Option<AnswerFormat>, ApiError> {
        match (self.r#type.as_str(), self.json_schema.and_then(|named| named.schema).or(self.schema)) {
            ("text", _) => Ok(None),
            ("json_object", None) => Ok(Some(AnswerFormat::JsonObject)),
            ("json_object" | "json_schema", Some(given)) => {
                schema(given).map(Some).map_err(|error| error.at("response_format"))
            }
            ("json_schema", None) => Err(ApiError::param(
                "response_format.json_schema.schema",
                "A response_format of type json_schema needs json_schema.schema.",
            )),
            (other, _) => Err(ApiError::param(
                "response_format.type",
                format!("Unknown response_format `{other}`; use text, json_object or json_schema."),
            )),
        }
    }
}

/// A schema is an object or a truth value; vLLM's clients may send it in a string.
fn schema(given: Value) -> Result<AnswerFormat, ApiError> {
    let given = match given {
        Value::String(text) => serde_json::from_str(&text).unwrap_or(Value::String(text)),
        other => other,
    };
    if given.is_object() || given.is_boolean() {
        return Ok(AnswerFormat::JsonSchema(given));
    }
    Err(ApiError::param("structured_outputs", "A JSON schema must be an object."))
}

fn choice(choices: Vec<String>) -> Result<AnswerFormat, ApiError> {
    if choices.is_empty() {
        return Err(ApiError::param("structured_outputs", "choice is empty; give at least one text."));
    }
    Ok(AnswerFormat::Choice(choices))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn answer(fields: Value) -> Result<AnswerFormat, ApiError> {
        serde_json::from_value::<FormatFields>(fields).unwrap().answer()
    }

    #[test]
    fn every_spelling_of_a_schema_is_understood() {
        let schema = json!({"type": "object"});
        let expected = AnswerFormat::JsonSchema(schema.clone());
        for fields in [
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}),
            json!({"response_format": {"type": "json_object", "schema": schema}}),
            json!({"structured_outputs": {"json": schema}}),
            json!({"guided_json": schema}),
            json!({"guided_json": schema.to_string()}),
        ] {
            assert_eq!(answer(fields).unwrap(), expected);
        }
        assert_eq!(answer(json!({"response_format": {"type": "text"}})).unwrap(), AnswerFormat::Text);
    }

    #[test]
    fn wrong_or_doubled_formats_are_refused() {
        for fields in [
            json!({"response_format": {"type": "xml"}}),
            json!({"response_format": {"type": "json_schema"}}),
            json!({"guided_json": 7}),
            json!({"guided_choice": []}),
            json!({"guided_regex": "a", "response_format": {"type": "json_object"}}),
        ] {
            assert_eq!(answer(fields.clone()).expect_err(&fields.to_string()).status, 400);
        }
    }
}
