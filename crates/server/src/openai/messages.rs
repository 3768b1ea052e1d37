//! Chat messages: checked, and put as templates expect them.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::error::ApiError;

/// A message as clients write it.
#[derive(Debug, Deserialize)]
pub(crate) struct Message {
    role: String,
    content: Option<Content>,
    name: Option<String>,
    reasoning_content: Option<String>,
    tool_calls: Option<Vec<Map<String, Value>>>,
    tool_call_id: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string or an array of content parts, each with a `type`")]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Deserialize)]
struct Part {
    r#type: String,
    text: Option<String>,
}

/// The messages as a template's `messages`: roles that templates know, content as one string,
/// arguments of tool calls as objects.
pub(crate) fn template_messages(messages: Vec<Message>) -> Result<Value, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::param("messages", "messages is empty; send at least one."));
    }
    let messages = messages.into_iter().enumerate();
    messages.map(|(index, message)| template_message(index, message)).collect()
}

fn template_message(index: usize, message: Message) -> Result<Value, ApiError> {
    let role = match message.role.as_str() {
        "developer" => "system",
        role @ ("system" | "user" | "assistant" | "tool") => role,
        other => {
            return Err(ApiError::param(
                format!("messages[{index}].role"),
                format!("Unknown role `{other}`; use system, developer, user, assistant or tool."),
            ));
        }
    };
    let content = match message.content {
        Some(content) => flatten(index, content)?,
        // An assistant may have called tools and said nothing.
        None if role == "assistant" => String::new(),
        None => {
            let param = format!("messages[{index}].content");
            return Err(ApiError::param(
                param,
                format!("A message of role `{}` needs content.", message.role),
            ));
        }
    };
    let mut fields = Map::new();
    fields.insert("role".into(), role.into());
    fields.insert("content".into(), content.into());
    for (key, value) in [
        ("name", message.name),
        ("reasoning_content", message.reasoning_content),
        ("tool_call_id", message.tool_call_id),
    ] {
        if let Some(value) = value {
            fields.insert(key.into(), value.into());
        }
    }
    if let Some(calls) = message.tool_calls.filter(|calls| !calls.is_empty()) {
        fields.insert("tool_calls".into(), calls.into_iter().map(parse_arguments).collect());
    }
    Ok(Value::Object(fields))
}

fn flatten(index: usize, content: Content) -> Result<String, ApiError> {
    let parts = match content {
        Content::Text(text) => return Ok(text),
        Content::Parts(parts) => parts,
    };
    let mut text = String::new();
    for (part, Part { r#type, text: part_text }) in parts.into_iter().enumerate() {
        match (r#type.as_str(), part_text) {
            ("text" | "input_text" | "output_text", Some(part_text)) => text.push_str(&part_text),
            ("text" | "input_text" | "output_text", None) => {
                let param = format!("messages[{index}].content[{part}].text");
                return Err(ApiError::param(param, "A text part needs `text`."));
            }
            (other, _) => {
                return Err(ApiError::param(
                    format!("messages[{index}].content[{part}].type"),
                    format!("Content of type `{other}` is not supported: this model reads text only."),
                ));
            }
        }
    }
    Ok(text)
}

/// OpenAI sends arguments as JSON in a string; templates write them out as an object.
fn parse_arguments(mut call: Map<String, Value>) -> Value {
    if let Some(arguments) = call.get_mut("function").and_then(|function| function.get_mut("arguments")) {
        let parsed =
            arguments.as_str().and_then(|text| serde_json::from_str::<Map<String, Value>>(text).ok());
        if let Some(parsed) = parsed {
            *arguments = Value::Object(parsed);
        }
    }
    Value::Object(call)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body;
    use serde_json::json;

    fn check(messages: Value) -> Result<Value, ApiError> {
        template_messages(body::parse(messages.to_string().as_bytes())?)
    }

    fn refused(messages: Value) -> String {
        let error = check(messages).expect_err("refused");
        assert_eq!(error.status, 400);
        error.param.unwrap_or_default()
    }

    #[test]
    fn parts_are_joined_and_developers_are_the_system() {
        let messages = check(json!([
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ]));
        let expected = json!([{"role": "system", "content": "be brief"}, {"role": "user", "content": "ab"}]);
        assert_eq!(messages.unwrap(), expected);
    }

    #[test]
    fn arguments_of_tool_calls_become_objects() {
        let call = |arguments: Value| json!({"id": "c", "function": {"name": "f", "arguments": arguments}});
        let assistant = |call: Value| json!({"role": "assistant", "content": null, "tool_calls": [call]});
        let messages =
            check(json!([assistant(call(json!("{\"x\": 1}"))), assistant(call(json!("not json")))])).unwrap();
        assert_eq!(messages[0]["tool_calls"][0], call(json!({"x": 1})));
        assert_eq!(messages[0]["content"], "");
        assert_eq!(messages[1]["tool_calls"][0], call(json!("not json")));
    }

    #[test]
    fn what_cannot_be_answered_is_refused_by_its_place() {
        assert_eq!(refused(json!([])), "messages");
        assert_eq!(refused(json!([{"role": "boss", "content": "x"}])), "messages[0].role");
        assert_eq!(refused(json!([{"role": "user"}])), "messages[0].content");
        assert_eq!(refused(json!([{"role": "user", "content": 7}])), "[0].content");
        let image = json!({"type": "image_url", "image_url": {"url": "data:"}});
        assert_eq!(refused(json!([{"role": "user", "content": [image]}])), "messages[0].content[0].type");
        assert_eq!(
            refused(json!([{"role": "user", "content": [{"type": "text"}]}])),
            "messages[0].content[0].text"
        );
    }
}
