//! Input items to messages.
//!
//! What a model said in one go comes as several items: reasoning, a message, calls. They are one message
//! again here, equal to what was generated, so that its tokens are found again. A tool's result is put right
//! behind the call that it answers, whatever a user said in between: templates want it there.

use serde_json::Value;

use super::seal::Seal;
use super::tools::CallNames;
use crate::admission::random_id;
use crate::conversation::{CallPlace, CallPlaces, KnownMessage, Message, Role, ToolCall, part_left_out};
use crate::openai::ApiError;
use crate::openai::messages::arguments_or_none;

/// What items are read with.
pub(crate) struct Reading<'a> {
    /// The tools' names.
    pub names: &'a CallNames,
    /// Opens sealed reasoning.
    pub seal: &'a Seal,
    /// Number of items before the request's own; errors count from there.
    pub own: usize,
}

/// Items that say nothing that this model could use: results of tools that a server ran, traces, hints.
const PASSED_OVER: [&str; 17] = [
    "additional_tools",
    "code_interpreter_call",
    "compaction_trigger",
    "computer_call",
    "configuration_update",
    "file_search_call",
    "ghost_snapshot",
    "image_generation_call",
    "mcp_approval_request",
    "mcp_approval_response",
    "mcp_call",
    "mcp_list_tools",
    "program",
    "program_output",
    "tool_search_call",
    "tool_search_output",
    "web_search_call",
];

/// How errors name an item.
pub(crate) fn path(index: usize, own: usize) -> String {
    match index.checked_sub(own) {
        Some(index) => format!("input[{index}]"),
        None => "previous_response_id".into(),
    }
}

/// An id for an item of this type.
pub(crate) fn new_id(kind: Option<&str>) -> String {
    random_id(match kind {
        None | Some("message") => "msg_",
        Some("reasoning") => "rs_",
        Some("function_call") => "fc_",
        Some("function_call_output") => "fco_",
        Some("custom_tool_call") => "ctc_",
        Some("custom_tool_call_output") => "ctco_",
        Some("compaction") => "cmp_",
        Some(_) => "item_",
    })
}

/// Tools that an item brings into the conversation.
pub(crate) fn added_tools(item: &Value) -> Option<&[Value]> {
    let kind = item.get("type")?.as_str()?;
    let tools = matches!(kind, "additional_tools" | "tool_search_output").then(|| item.get("tools"))??;
    Some(tools.as_array()?)
}

/// The request's instructions, which come before everything.
pub(crate) fn instructions(text: &str) -> Message {
    Message::new(Role::System, text)
}

impl Reading<'_> {
    /// The messages that the items make.
    pub fn messages(&self, items: &[&Value]) -> Result<Vec<KnownMessage>, ApiError> {
        let mut conversation = Conversation::default();
        self.go_on(&mut conversation, 0, items.iter().copied())?;
        Ok(conversation.into_messages())
    }

    /// Adds what further items say, of which this is the first one's number.
    pub fn go_on<'v>(
        &self,
        conversation: &mut Conversation,
        first: usize,
        items: impl IntoIterator<Item = &'v Value>,
    ) -> Result<(), ApiError> {
        let mut calls = conversation.call_places();
        let mut items = items.into_iter().enumerate();
        items.try_for_each(|(index, item)| {
            self.item(item, &path(first + index, self.own), conversation, &mut calls)
        })
    }

    fn item(
        &self,
        item: &Value,
        path: &str,
        conversation: &mut Conversation,
        calls: &mut CallPlaces,
    ) -> Result<(), ApiError> {
        let text = |key: &str| item.get(key).and_then(Value::as_str);
        let need = |key: &str| {
            text(key).ok_or_else(|| {
                let param = format!("{path}.{key}");
                let message = format!("{param} is missing or not a string.");
                ApiError::param(param, message)
            })
        };
        match text("type").unwrap_or("message") {
            "message" => message(item, path, conversation),
            "reasoning" => {
                if let Some(reasoning) = self.reasoning(item) {
                    conversation.assistant().reasoning.get_or_insert_default().push_str(&reasoning);
                    conversation.joint = Joint::Open;
                }
                Ok(())
            }
            "function_call" | "custom_tool_call" => {
                let custom = text("type") == Some("custom_tool_call");
                let key = if custom { "input" } else { "arguments" };
                let name = self.names.inward(need("name")?, text("namespace"));
                let input = need(key)?.to_owned();
                let input = if custom { input } else { arguments_or_none(input) };
                let call = ToolCall { id: need("call_id")?.into(), name, input, custom };
                // One that was cut short was never made.
                if text("status") != Some("incomplete") {
                    conversation.call(call, calls);
                }
                Ok(())
            }
            kind @ ("local_shell_call" | "shell_call" | "apply_patch_call") => {
                let id = text("call_id").or(text("id")).unwrap_or_default().to_owned();
                let name = kind.trim_end_matches("_call").to_owned();
                let input = item.get("action").or(item.get("operation")).cloned().unwrap_or_default();
                let call = ToolCall { id, name, input: input.to_string(), custom: false };
                conversation.call(call, calls);
                Ok(())
            }
            "function_call_output" | "custom_tool_call_output" => {
                let output = item.get("output").unwrap_or(&Value::Null);
                let output = content(output, &format!("{path}.output"), Role::Tool)?;
                conversation.result(need("call_id")?, output, path, calls)
            }
            "local_shell_call_output" | "shell_call_output" | "apply_patch_call_output" => {
                let id = text("call_id").or(text("id")).unwrap_or_default();
                let output = match item.get("output") {
                    Some(Value::String(output)) => output.clone(),
                    Some(output) => output.to_string(),
                    None => text("status").unwrap_or_default().to_owned(),
                };
                conversation.result(id, output, path, calls)
            }
            "compaction" | "compaction_summary" => {
                self.summary(need("encrypted_content")?, path, conversation)
            }
            "item_reference" => Err(ApiError::param(
                path,
                format!("{path}: there is no item `{}` here.", text("id").unwrap_or_default()),
            )),
            kind if PASSED_OVER.contains(&kind) => Ok(()),
            kind => Err(ApiError::param(
                format!("{path}.type"),
                format!("{path}: items of type `{kind}` are not supported."),
            )),
        }
    }

    /// Adds what a conversation was compacted to, which nobody but this server can read.
    fn summary(&self, sealed: &str, path: &str, conversation: &mut Conversation) -> Result<(), ApiError> {
        let Some(summary) = self.seal.open(sealed) else {
            return Err(ApiError::param(path, format!("{path} was not compacted by this server.")));
        };
        conversation.push(Message::new(Role::User, summary));
        conversation.compacted = true;
        Ok(())
    }

    /// Sealed reasoning of ours, else what stands in the open. What another server sealed is passed over.
    fn reasoning(&self, item: &Value) -> Option<String> {
        let sealed = item.get("encrypted_content").and_then(Value::as_str);
        let opened = sealed.and_then(|sealed| self.seal.open(sealed));
        opened.or_else(|| {
            let parts = item.get("content")?.as_array()?;
            let texts: Vec<&str> = parts.iter().filter_map(|part| part.get("text")?.as_str()).collect();
            (!texts.is_empty()).then(|| texts.concat())
        })
    }
}

/// What was said so far. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Conversation {
    said: Vec<Said>,
    joint: Joint,
    /// Calls may have been folded into a summary, so that their results stand alone.
    compacted: bool,
}

/// A message, and behind it the results of its calls.
#[derive(Debug, Clone)]
struct Said {
    message: KnownMessage,
    results: Vec<KnownMessage>,
}

/// How the next item of the assistant's joins the last message.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
enum Joint {
    /// It begins a message of its own.
    #[default]
    Closed,
    /// It goes on with the last.
    Open,
    /// The same, but the last item was a message: another one is set off.
    AfterText,
}

impl Conversation {
    /// The messages, with each result behind its call.
    pub fn into_messages(self) -> Vec<KnownMessage> {
        self.said.into_iter().flat_map(|said| std::iter::once(said.message).chain(said.results)).collect()
    }

    /// Where its calls stand.
    fn call_places(&self) -> CallPlaces {
        let mut places = CallPlaces::default();
        for (index, said) in self.said.iter().enumerate() {
            places.note_all(index, &said.message.calls);
        }
        places
    }

    /// Adds a message that nothing joins.
    fn push(&mut self, message: Message) {
        self.said.push(Said { message: message.into(), results: Vec::new() });
        self.joint = Joint::Closed;
    }

    /// The assistant's message that goes on, or a new one.
    fn assistant(&mut self) -> &mut Message {
        if self.joint == Joint::Closed {
            self.push(Message::new(Role::Assistant, ""));
        }
        let last = self.said.len() - 1;
        self.said[last].message.to_mut()
    }

    fn say(&mut self, text: &str) {
        let apart = self.joint == Joint::AfterText;
        let message = self.assistant();
        if apart && !message.text.is_empty() {
            message.text.push_str("\n\n");
        }
        message.text.push_str(text);
        self.joint = Joint::AfterText;
    }

    fn call(&mut self, call: ToolCall, places: &mut CallPlaces) {
        let id = call.id.clone();
        let calls = &mut self.assistant().calls;
        calls.push(call);
        let call = calls.len() - 1;
        places.note(&id, CallPlace { message: self.said.len() - 1, call });
        self.joint = Joint::Open;
    }

    /// Puts a tool's result behind the call, and behind the results that are there already.
    fn result(
        &mut self,
        call_id: &str,
        output: String,
        path: &str,
        calls: &CallPlaces,
    ) -> Result<(), ApiError> {
        let (at, name) = match (calls.find(call_id), self.said.len()) {
            (Some(CallPlace { message, call }), _) => {
                (message, Some(self.said[message].message.calls[call].name.clone()))
            }
            (None, count @ 1..) if self.compacted => (count - 1, None),
            _ => {
                let message = format!("No tool call found for the output with call_id `{call_id}`.");
                return Err(ApiError::param(format!("{path}.call_id"), message));
            }
        };
        if at + 1 == self.said.len() {
            self.joint = Joint::Closed;
        }
        let result = Message { call_id: Some(call_id.to_owned()), name, ..Message::new(Role::Tool, output) };
        self.said[at].results.push(result.into());
        Ok(())
    }
}

fn message(item: &Value, path: &str, conversation: &mut Conversation) -> Result<(), ApiError> {
    let role = match item.get("role").and_then(Value::as_str) {
        Some("user") => Role::User,
        Some("assistant") => Role::Assistant,
        Some("system" | "developer") => Role::System,
        Some(other) => {
            let message =
                format!("{path}: role `{other}` is unknown; use user, assistant, system or developer.");
            return Err(ApiError::param(format!("{path}.role"), message));
        }
        None => return Err(ApiError::param(path, format!("{path} has neither a type nor a role."))),
    };
    let text = content(item.get("content").unwrap_or(&Value::Null), &format!("{path}.content"), role)?;
    if role == Role::Assistant {
        conversation.say(&text);
    } else {
        conversation.push(Message::new(role, text));
    }
    Ok(())
}

/// A text, or the texts of a list of parts, as someone said it.
fn content(content: &Value, path: &str, role: Role) -> Result<String, ApiError> {
    let parts = match content {
        Value::String(text) => return Ok(text.clone()),
        Value::Array(parts) => parts,
        _ => return Err(ApiError::param(path, format!("{path} must be a string or a list of parts."))),
    };
    let mut text = String::new();
    for (index, part) in parts.iter().enumerate() {
        let of = |key: &str| part.get(key).and_then(Value::as_str);
        let placeholder =
            of("type").filter(|_| role == Role::Tool).and_then(|kind| part_left_out(kind, &text));
        if let Some(placeholder) = placeholder {
            text.push_str(&placeholder);
            continue;
        }
        match (of("type"), of("text").or(of("refusal"))) {
            (Some("input_text" | "output_text" | "text" | "refusal" | "summary_text"), Some(said)) => {
                text.push_str(said);
            }
            (Some("encrypted_content"), _) => {}
            (
                Some(
                    kind @ ("input_image"
                    | "input_file"
                    | "input_audio"
                    | "image_url"
                    | "computer_screenshot"),
                ),
                _,
            ) => {
                return Err(ApiError::param(
                    format!("{path}[{index}]"),
                    format!("Content of type `{kind}` is not supported: this model reads text only."),
                ));
            }
            (kind, _) => {
                let message =
                    format!("{path}[{index}] is no text part (its type: `{}`).", kind.unwrap_or("none"));
                return Err(ApiError::param(format!("{path}[{index}]"), message));
            }
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(items: Value) -> Result<Vec<Message>, ApiError> {
        let seal = Seal::new([1; 32]);
        let names = CallNames::default();
        let items: Vec<&Value> = items.as_array().unwrap().iter().collect();
        let messages = Reading { names: &names, seal: &seal, own: 0 }.messages(&items)?;
        Ok(messages.into_iter().map(|message| Message::clone(&message)).collect())
    }

    fn call(id: &str) -> Value {
        json!({"type": "function_call", "call_id": id, "name": "f", "arguments": "{}"})
    }

    fn output(id: &str) -> Value {
        json!({"type": "function_call_output", "call_id": id, "output": id})
    }

    fn tool(id: &str) -> Message {
        Message { call_id: Some(id.into()), name: Some("f".into()), ..Message::new(Role::Tool, id) }
    }

    #[test]
    fn what_was_said_in_one_go_is_one_message() {
        let sealed = Seal::new([1; 32]).close("hm");
        let messages = read(json!([
            {"role": "user", "content": "go"},
            {"type": "reasoning", "summary": [], "encrypted_content": sealed},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "First, "}]},
            call("a"),
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "then"}]},
            {"type": "custom_tool_call", "call_id": "b", "name": "g", "input": "*** x"},
            output("a"), {"type": "custom_tool_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "ok"}]},
        ]))
        .unwrap();
        assert_eq!(messages.len(), 4);
        let said = &messages[1];
        assert_eq!((said.text.as_str(), said.reasoning.as_deref()), ("First, then", Some("hm")));
        assert_eq!(
            said.calls[0],
            ToolCall { id: "a".into(), name: "f".into(), input: "{}".into(), custom: false }
        );
        assert_eq!(said.calls[1].input, "*** x");
        assert!(said.calls[1].custom);
        assert_eq!((messages[2].clone(), messages[3].text.as_str()), (tool("a"), "ok"));
    }

    #[test]
    fn results_stand_behind_their_calls_whatever_was_said_in_between() {
        let messages = read(json!([
            call("a"), call("b"), {"role": "user", "content": "wait"}, output("b"), output("a"), call("c"), output("c"),
        ]))
        .unwrap();
        let roles: Vec<Role> = messages.iter().map(|message| message.role).collect();
        use Role::{Assistant, Tool, User};
        assert_eq!(roles, [Assistant, Tool, Tool, User, Assistant, Tool]);
        assert_eq!(messages[1..3], [tool("b"), tool("a")]);
    }

    #[test]
    fn of_calls_with_one_id_a_result_answers_the_first_of_the_last_message_with_any() {
        let named =
            |name: &str| json!({"type": "function_call", "call_id": "a", "name": name, "arguments": "{}"});
        let messages = read(json!([
            named("f"), named("g"), output("a"), {"role": "user", "content": "wait"}, named("h"), named("i"), output("a"),
            output("a"),
        ]))
        .unwrap();
        let results = messages.iter().filter(|message| message.role == Role::Tool);
        assert!(results.map(|result| result.name.as_deref()).eq([Some("f"), Some("h"), Some("h")]));
    }

    #[test]
    fn two_messages_in_a_row_are_set_off() {
        let messages = read(json!([
            {"role": "assistant", "content": "I look.", "phase": "commentary"},
            {"role": "assistant", "content": "Done.", "phase": "final_answer"},
        ]));
        assert_eq!(messages.unwrap(), [Message::new(Role::Assistant, "I look.\n\nDone.")]);
    }

    #[test]
    fn an_output_without_its_call_is_refused() {
        let error = read(json!([call("a"), output("b")])).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("input[1].call_id"));
    }

    #[test]
    fn foreign_and_hosted_items_are_passed_over() {
        let messages = read(json!([
            {"type": "reasoning", "summary": [], "encrypted_content": "somebody else's"},
            {"type": "web_search_call", "id": "ws_1", "status": "completed"},
            {"type": "mcp_list_tools", "tools": []},
            {"type": "additional_tools", "tools": []},
            {"role": "developer", "content": "x"},
        ]));
        assert_eq!(messages.unwrap(), [Message::new(Role::System, "x")]);
    }

    #[test]
    fn a_local_shell_is_a_tool_like_any_other() {
        let messages = read(json!([
            {"type": "local_shell_call", "call_id": "s", "action": {"type": "exec", "command": ["ls"]}},
            {"type": "local_shell_call_output", "id": "s", "output": "{\"output\":\"a\"}"},
        ]))
        .unwrap();
        assert_eq!(messages[0].calls[0].name, "local_shell");
        assert_eq!(messages[1].text, "{\"output\":\"a\"}");
    }

    #[test]
    fn pictures_and_files_in_a_tools_result_are_left_out() {
        let parts = json!([{"type": "input_text", "text": "seen"}, {"type": "input_image", "image_url": "data:"},
            {"type": "input_file", "filename": "a.pdf", "file_data": "x"}]);
        for (kind, output) in
            [("function_call", "function_call_output"), ("custom_tool_call", "custom_tool_call_output")]
        {
            let call = json!({"type": kind, "call_id": "a", "name": "f", "arguments": "{}", "input": "x"});
            let messages = read(json!([call, {"type": output, "call_id": "a", "output": parts}])).unwrap();
            let expected = "seen\n[image left out: this model reads text only]\n[file left out: this model reads text only]";
            assert_eq!(messages[1].text, expected);
        }
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let image = json!([{"type": "input_image", "image_url": "data:"}]);
        for (item, param) in [
            (json!({"role": "user", "content": image}), "input[0].content[0]"),
            (json!({"role": "user"}), "input[0].content"),
            (json!({"role": "judge", "content": "x"}), "input[0].role"),
            (json!({"content": "x"}), "input[0]"),
            (json!(3), "input[0]"),
            (json!({"type": "function_call", "name": "f", "arguments": "{}"}), "input[0].call_id"),
            (json!({"type": "telepathy"}), "input[0].type"),
            (json!({"type": "compaction", "encrypted_content": "x"}), "input[0]"),
        ] {
            let error = read(json!([item])).unwrap_err();
            assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some(param)), "{item}");
        }
    }
}
