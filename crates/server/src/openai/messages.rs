//! Chat messages, from OpenAI's shape.

use serde::Deserialize;
use serde_json::Value;

use super::error::ApiError;
use crate::conversation::{KnownMessage, Message, Role, ToolCall, part_left_out};

/// A message as clients write it.
#[derive(Debug, Deserialize)]
pub(crate) struct ChatMessage {
    role: String,
    content: Option<Content>,
    name: Option<String>,
    /// The reasoning's two names; some clients send both.
    reasoning_content: Option<String>,
    reasoning: Option<String>,
    tool_calls: Option<Vec<Call>>,
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
    refusal: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Call {
    #[serde(default)]
    id: String,
    function: Option<FunctionCall>,
    custom: Option<CustomCall>,
}

#[derive(Debug, Deserialize)]
struct FunctionCall {
    name: String,
    /// JSON in a string; some clients send the object itself.
    #[serde(default)]
    arguments: Value,
}

#[derive(Debug, Deserialize)]
struct CustomCall {
    name: String,
    input: String,
}

/// Checks messages and puts them in no dialect's terms.
pub(crate) fn conversation(messages: Vec<ChatMessage>) -> Result<Vec<Message>, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::param("messages", "messages is empty; send at least one."));
    }
    messages.into_iter().enumerate().map(|(index, message)| neutral(index, message)).collect()
}

/// Adds a message to a conversation, if it has no fault.
pub(crate) fn add(conversation: &mut Vec<KnownMessage>, message: ChatMessage) -> Option<()> {
    conversation.push(neutral(0, message).ok()?.into());
    Some(())
}

fn neutral(index: usize, message: ChatMessage) -> Result<Message, ApiError> {
    let role = match message.role.as_str() {
        "system" | "developer" => Role::System,
        "user" => Role::User,
        "assistant" => Role::Assistant,
        "tool" | "function" => Role::Tool,
        other => {
            return Err(ApiError::param(
                format!("messages[{index}].role"),
                format!("Unknown role `{other}`; use system, developer, user, assistant or tool."),
            ));
        }
    };
    let text = match message.content {
        Some(content) => flatten(index, content, role)?,
        // An assistant may have called tools and said nothing.
        None if role == Role::Assistant => String::new(),
        None => {
            let param = format!("messages[{index}].content");
            return Err(ApiError::param(
                param,
                format!("A message of role `{}` needs content.", message.role),
            ));
        }
    };
    let calls = message.tool_calls.unwrap_or_default().into_iter().enumerate();
    let mut reasoning = [message.reasoning_content, message.reasoning].into_iter().flatten();
    Ok(Message {
        role,
        text,
        reasoning: reasoning.find(|reasoning| !reasoning.is_empty()),
        calls: calls
            .map(|(call_index, call)| tool_call(index, call_index, call))
            .collect::<Result<_, _>>()?,
        call_id: message.tool_call_id,
        name: message.name,
    })
}

fn flatten(index: usize, content: Content, role: Role) -> Result<String, ApiError> {
    let parts = match content {
        Content::Text(text) => return Ok(text),
        Content::Parts(parts) => parts,
    };
    let mut text = String::new();
    for (part, Part { r#type, text: part_text, refusal }) in parts.into_iter().enumerate() {
        let placeholder = (role == Role::Tool).then(|| part_left_out(&r#type, &text)).flatten();
        if let Some(placeholder) = placeholder {
            text.push_str(&placeholder);
            continue;
        }
        match (r#type.as_str(), part_text.or(refusal)) {
            ("text" | "input_text" | "output_text" | "refusal", Some(part_text)) => text.push_str(&part_text),
            ("text" | "input_text" | "output_text" | "refusal", None) => {
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

/// A call's arguments, an object without any where a client writes none.
pub(crate) fn arguments_or_none(text: String) -> String {
    if text.trim().is_empty() { "{}".into() } else { text }
}

fn tool_call(index: usize, call_index: usize, call: Call) -> Result<ToolCall, ApiError> {
    match (call.function, call.custom) {
        (Some(FunctionCall { name, arguments }), _) => {
            let input = match arguments {
                Value::String(text) => arguments_or_none(text),
                Value::Null => "{}".into(),
                other => other.to_string(),
            };
            Ok(ToolCall { id: call.id, name, input, custom: false })
        }
        (None, Some(CustomCall { name, input })) => Ok(ToolCall { id: call.id, name, input, custom: true }),
        (None, None) => Err(ApiError::param(
            format!("messages[{index}].tool_calls[{call_index}]"),
            "A tool call needs `function` with name and arguments, or `custom` with name and input.",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body;
    use serde_json::json;

    fn check(messages: Value) -> Result<Vec<Message>, ApiError> {
        conversation(body::parse(messages.to_string().as_bytes())?)
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
        let expected = [Message::new(Role::System, "be brief"), Message::new(Role::User, "ab")];
        assert_eq!(messages.unwrap(), expected);
    }

    #[test]
    fn calls_keep_the_spelling_of_their_arguments() {
        let call = |arguments: Value| json!({"id": "c", "function": {"name": "f", "arguments": arguments}});
        let custom = json!({"id": "d", "type": "custom", "custom": {"name": "p", "input": "x"}});
        let said = json!([{"role": "assistant", "content": null, "reasoning_content": "hm",
            "tool_calls": [call(json!("{\"x\":  1}")), call(json!({"x": 1})), custom, call(json!(" "))]}]);
        let [message] = &check(said).unwrap()[..] else { panic!() };
        let inputs: Vec<&str> = message.calls.iter().map(|call| &call.input[..]).collect();
        assert_eq!(inputs, ["{\"x\":  1}", "{\"x\":1}", "x", "{}"]);
        assert!(message.calls[2].custom && message.text.is_empty());
        assert_eq!(message.reasoning.as_deref(), Some("hm"));
    }

    #[test]
    fn reasoning_is_read_under_either_name_and_under_both() {
        let said = |fields: Value| {
            let mut message = json!({"role": "assistant", "content": "x"});
            message.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
            check(json!([message])).unwrap().remove(0).reasoning
        };
        for (fields, expected) in [
            (json!({"reasoning": "hm"}), Some("hm")),
            (json!({"reasoning_content": "hm"}), Some("hm")),
            (json!({"reasoning": null, "reasoning_content": "hm"}), Some("hm")),
            (json!({"reasoning": "hm", "reasoning_content": ""}), Some("hm")),
            (json!({"reasoning": "hm", "reasoning_content": "hm"}), Some("hm")),
            (json!({"reasoning": "", "reasoning_content": null}), None),
        ] {
            assert_eq!(said(fields.clone()).as_deref(), expected, "{fields}");
        }
    }

    #[test]
    fn pictures_and_files_in_a_tools_result_are_left_out() {
        let parts = json!([{"type": "image_url", "image_url": {"url": "data:"}}, {"type": "text", "text": "\nseen"},
            {"type": "file", "file": {"file_id": "f"}}]);
        let messages = check(json!([{"role": "tool", "tool_call_id": "c", "content": parts}])).unwrap();
        let expected =
            "[image left out: this model reads text only]\nseen\n[file left out: this model reads text only]";
        assert_eq!(messages[0].text, expected);
        let unknown = json!([{"role": "tool", "tool_call_id": "c", "content": [{"type": "smell"}]}]);
        assert_eq!(refused(unknown), "messages[0].content[0].type");
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
        let empty = json!([{"role": "assistant", "tool_calls": [{"id": "c"}]}]);
        assert_eq!(refused(empty), "messages[0].tool_calls[0]");
    }
}
