//! Steering: a user's correction of a response that runs.
//!
//! `accepted` means that the server owns the input. At the next boundary outside a tool call the response
//! ends as `incomplete` / `steered`, and a successor with the same settings goes on from all that was said:
//! its `response.created` is the commit. If results of tools are owed, the input waits: `pending` names them,
//! and the client's next request on this response carries both. If that fails or is cancelled, the input waits
//! again, for the next try. What cannot be committed comes back as `failed`.
//!
//! What is not taken comes back as `failed` too, to who sent it alone: it is no event of the response's, and
//! takes no number among them.

use std::sync::Arc;

use serde::Serialize;
use serde_json::{Value, json};

use super::live::{Live, State};
use super::request::{Ask, response_id};
use super::types::Status;
use crate::admission::random_id;

/// Most steers that may wait for one response, and their bytes.
const MAX_WAITING: usize = 16;
const MAX_WAITING_BYTES: usize = 1 << 20;

/// Why a correction was not taken or not committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Code {
    ResponseNotFound,
    InvalidInput,
    SteeringNotSupported,
    TooManyPendingSteers,
    ResponseAlreadyCompleted,
    ResponseNotActive,
    SuccessorCreationFailed,
}

/// A correction.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Steer {
    /// Its id; begins with `steer_`.
    pub id: String,
    /// The response to steer.
    pub previous_response_id: String,
    /// As the client wrote it, to give back.
    pub input: Value,
    /// The same as input items.
    pub items: Vec<Value>,
}

/// A correction that was not taken or not committed.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Refusal {
    pub code: Code,
    pub message: String,
    /// Absent where none was given yet.
    pub id: Option<String>,
    pub previous_response_id: String,
    pub input: Value,
}

/// Corrections that wait for the response to come to a boundary, in order.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    waiting: Vec<Steer>,
    /// Items that the client owes before the waiting ones can be applied; set when the response has ended.
    pub owed: Vec<Value>,
    /// The id that the successor will have, given with the first correction.
    pub successor_id: Option<String>,
}

/// A correction was taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Accepted {
    /// The sequence number of the event that says so.
    pub sequence: usize,
    /// The successor's id, should there be one.
    pub successor_id: String,
}

impl Queue {
    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Those that wait.
    pub fn waiting(&self) -> &[Steer] {
        &self.waiting
    }

    /// Takes all that wait.
    pub fn take(&mut self) -> Vec<Steer> {
        std::mem::take(&mut self.waiting)
    }

    /// They could not be applied yet after all.
    pub fn put_back(&mut self, steers: Vec<Steer>) {
        self.waiting.splice(0..0, steers);
    }
}

/// Corrections that waited on a response, and were taken by a request that goes on from it. Dropped, they wait
/// there again.
pub(crate) struct Taken {
    parent: Arc<Live>,
    steers: Vec<Steer>,
}

impl Taken {
    /// These, which waited on `parent`.
    pub fn new(parent: Arc<Live>, steers: Vec<Steer>) -> Self {
        Self { parent, steers }
    }

    /// Their input items, in order.
    pub fn items(&self) -> impl Iterator<Item = &Value> {
        self.steers.iter().flat_map(|steer| &steer.items)
    }

    /// They have become part of the conversation.
    pub fn commit(mut self) {
        self.steers.clear();
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let steers = std::mem::take(&mut self.steers);
        self.parent.write(|state| state.steers.put_back(steers));
    }
}

impl Steer {
    /// Reads a `response.steer` event, or the body of the POST that does the same.
    ///
    /// # Errors
    /// [`Code::InvalidInput`] with what is wrong.
    pub fn read(event: &Value) -> Result<Self, Box<Refusal>> {
        let text = |key: &str| event.get(key).and_then(Value::as_str).map(str::to_owned);
        let previous_response_id = text("previous_response_id").unwrap_or_default();
        let input = event.get("input").cloned().unwrap_or_else(|| "".into());
        let bytes = input.to_string().len();
        let refuse = |message: String| {
            Box::new(Refusal {
                code: Code::InvalidInput,
                message,
                id: None,
                previous_response_id: previous_response_id.clone(),
                input: if bytes > MAX_WAITING_BYTES { "".into() } else { input.clone() },
            })
        };
        if bytes > MAX_WAITING_BYTES {
            return Err(refuse(format!(
                "input has {bytes} bytes, which are not sent back; steer with at most {MAX_WAITING_BYTES}."
            )));
        }
        if previous_response_id.is_empty() {
            return Err(refuse("previous_response_id must name the response to steer.".into()));
        }
        let known = ["type", "previous_response_id", "input"];
        let unknown = event.as_object().into_iter().flatten().find(|(key, _)| !known.contains(&key.as_str()));
        if let Some((key, _)) = unknown {
            return Err(refuse(format!(
                "`{key}` is not allowed; response.steer takes type, previous_response_id and input."
            )));
        }
        let items = items(&input).map_err(refuse)?;
        Ok(Self { id: random_id("steer_"), previous_response_id, input, items })
    }

    /// The refusal of this one, which had its id.
    pub fn fail(self, code: Code, message: impl Into<String>) -> Box<Refusal> {
        Box::new(Refusal {
            code,
            message: message.into(),
            id: Some(self.id),
            previous_response_id: self.previous_response_id,
            input: self.input,
        })
    }

    /// The refusal of this one, whose id the client has not heard of.
    pub fn refuse(self, code: Code, message: impl Into<String>) -> Box<Refusal> {
        Box::new(Refusal { id: None, ..*self.fail(code, message) })
    }

    fn named(&self) -> Value {
        json!({"id": self.id, "previous_response_id": self.previous_response_id})
    }

    /// The fields of `response.steer.accepted`.
    pub fn accepted(&self) -> Value {
        json!({"steer": self.named()})
    }

    /// The fields of `response.steer.pending`.
    pub fn pending(&self, owed: &[Value]) -> Value {
        json!({"steer": self.named(), "reason": "waiting_for_required_input", "required_input": owed})
    }
}

impl Refusal {
    /// The fields of `response.steer.failed`.
    pub fn fields(&self) -> Value {
        let mut steer = json!({"previous_response_id": self.previous_response_id, "input": self.input});
        if let Some(id) = &self.id {
            steer["id"] = id.as_str().into();
        }
        json!({
            "steer": steer,
            "error": {"type": "invalid_request_error", "code": self.code, "message": self.message},
        })
    }
}

impl State {
    /// Takes a correction, or says why not.
    pub fn accept(&mut self, ask: &Ask, steer: Steer) -> Result<Accepted, Box<Refusal>> {
        let all = self.steers.waiting.iter().chain([&steer]);
        let bytes: usize = all.map(|steer| steer.input.to_string().len()).sum();
        let status = self.recorder.response().status;
        let refused = if status == Status::Completed {
            Some((Code::ResponseAlreadyCompleted, "The response has completed and takes no more steering."))
        } else if status.is_final() || self.wish.is_some() {
            Some((Code::ResponseNotActive, "The response has ended and takes no more steering."))
        } else if !ask.settings.steerable {
            Some((
                Code::SteeringNotSupported,
                "A response that is bound to a conversation or compacts by itself cannot be steered.",
            ))
        } else if self.steers.waiting.len() >= MAX_WAITING || bytes > MAX_WAITING_BYTES {
            Some((Code::TooManyPendingSteers, "Too much steering input waits for this response already."))
        } else {
            None
        };
        if let Some((code, message)) = refused {
            return Err(steer.refuse(code, message));
        }
        let sequence = self.recorder.count();
        self.recorder.note("response.steer.accepted", &steer.accepted());
        self.steers.waiting.push(steer);
        let successor_id = self.steers.successor_id.get_or_insert_with(response_id).clone();
        Ok(Accepted { sequence, successor_id })
    }
}

/// Input items of a correction: messages of the user's alone.
fn items(input: &Value) -> Result<Vec<Value>, String> {
    let list = match input {
        Value::String(text) if !text.is_empty() => {
            let part = json!({"type": "input_text", "text": text});
            return Ok(vec![
                json!({"type": "message", "id": random_id("msg_"), "role": "user", "content": [part]}),
            ]);
        }
        Value::Array(list) if !list.is_empty() => list,
        _ => return Err("input must be a text or a list of messages, and not empty.".into()),
    };
    list.iter()
        .enumerate()
        .map(|(index, item)| message(item).map_err(|why| format!("input[{index}]{why}")))
        .collect()
}

fn message(item: &Value) -> Result<Value, String> {
    let fields = item.as_object().ok_or(" must be a message.")?;
    let known = ["type", "role", "content", "id", "status"];
    if let Some(key) = fields.keys().find(|key| !known.contains(&key.as_str())) {
        return Err(format!(" has the field `{key}`; a message takes type, role and content."));
    }
    if fields.get("type").is_some_and(|kind| kind != "message") {
        return Err(" must be a message; steering takes no other items.".into());
    }
    if fields.get("role").is_none_or(|role| role != "user") {
        return Err(".role must be `user`.".into());
    }
    match fields.get("content") {
        Some(Value::String(_)) => {}
        Some(Value::Array(parts)) => {
            for (index, part) in parts.iter().enumerate() {
                let text = part.get("type").is_some_and(|kind| kind == "input_text")
                    && part.get("text").is_some_and(Value::is_string);
                if !text {
                    return Err(format!(".content[{index}] must be input_text: this model reads text only."));
                }
            }
        }
        _ => return Err(".content must be a text or a list of parts.".into()),
    }
    let mut message = item.clone();
    message["type"] = "message".into();
    if fields.get("id").is_none_or(|id| !id.is_string()) {
        message["id"] = random_id("msg_").into();
    }
    Ok(message)
}

/// What the client owes before a conversation that ends with these output items can go on: a stub of each
/// tool's result.
pub(crate) fn owed(output: &[Value]) -> Vec<Value> {
    let stub = |item: &Value| match item["type"].as_str()? {
        "function_call" => {
            let mut stub =
                json!({"type": "function_call_output", "call_id": item["call_id"], "name": item["name"]});
            if let Some(namespace) = item.get("namespace") {
                stub["namespace"] = namespace.clone();
            }
            Some(stub)
        }
        "custom_tool_call" => Some(json!({"type": "custom_tool_call_output", "call_id": item["call_id"]})),
        _ => None,
    };
    output.iter().filter(|item| item["status"] != "incomplete").filter_map(stub).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_or_user_messages_may_steer() {
        for input in [
            json!("no, the other file"),
            json!([{"role": "user", "content": "x"}]),
            json!([{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]}]),
        ] {
            let event = json!({"type": "response.steer", "previous_response_id": "resp_1", "input": input});
            let steer = Steer::read(&event).unwrap();
            assert_eq!((steer.items.len(), &steer.input), (1, &input));
            assert_eq!(steer.items[0]["type"], "message");
            assert!(steer.id.starts_with("steer_"));
        }
    }

    #[test]
    fn anything_else_comes_back_with_the_reason() {
        let image = json!([{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]);
        for (input, why) in [
            (json!(""), "not empty"),
            (json!([]), "not empty"),
            (json!(null), "not empty"),
            (json!([{"role": "system", "content": "x"}]), "input[0].role"),
            (json!([{"type": "function_call_output", "call_id": "c", "output": "x"}]), "input[0]"),
            (json!([{"role": "user", "content": "x", "name": "y"}]), "`name`"),
            (image, "input[0].content[0]"),
        ] {
            let event = json!({"type": "response.steer", "previous_response_id": "resp_1", "input": input});
            let refusal = Steer::read(&event).unwrap_err();
            assert_eq!((refusal.code, &refusal.input, &refusal.id), (Code::InvalidInput, &input, &None));
            assert!(refusal.message.contains(why), "{}", refusal.message);
        }
        let long = json!({"previous_response_id": "resp_1", "input": "x".repeat(MAX_WAITING_BYTES - 1)});
        let refusal = Steer::read(&long).unwrap_err();
        assert_eq!((refusal.code, refusal.input), (Code::InvalidInput, json!("")));
        assert!(refusal.message.contains("1048577 bytes"), "{}", refusal.message);
        let laned = json!({"previous_response_id": "resp_1", "input": "x", "stream_id": "a"});
        assert!(Steer::read(&laned).unwrap_err().message.contains("`stream_id`"));
        assert!(Steer::read(&json!({"input": "x"})).unwrap_err().message.contains("previous_response_id"));
    }

    #[test]
    fn owed_results_are_those_of_finished_calls() {
        let output = [
            json!({"type": "message"}),
            json!({"type": "function_call", "call_id": "a", "name": "f", "status": "completed"}),
            json!({"type": "custom_tool_call", "call_id": "b", "name": "g", "status": "completed"}),
            json!({"type": "function_call", "call_id": "c", "name": "f", "status": "incomplete"}),
        ];
        let stubs = owed(&output);
        assert_eq!(stubs[0], json!({"type": "function_call_output", "call_id": "a", "name": "f"}));
        assert_eq!(stubs[1], json!({"type": "custom_tool_call_output", "call_id": "b"}));
        assert_eq!(stubs.len(), 2);
    }
}
