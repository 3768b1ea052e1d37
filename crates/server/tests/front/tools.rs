//! Chat with tools and reasoning: whole and streamed say the same, and what was said is cached.

use serde_json::{Value, json};

use crate::common::{Fixture, start_agent, start_harmony};

const CALLS: &str = "<think>two files</think>Reading both.\n\
    <tool_call>\n{\"name\": \"read\", \"arguments\": {\"path\":  \"a </tool_call> b\"}}\n</tool_call>\n\
    <tool_call>\n{\"name\": \"read\", \"arguments\": {\"path\": \"ö\"}}\n</tool_call>";

fn tools() -> Value {
    let parameters = json!({"type": "object", "properties": {"path": {"type": "string"}}});
    let custom = json!({"type": "custom", "custom": {"name": "patch", "description": "Patches."}});
    json!([{"type": "function", "function": {"name": "read", "parameters": parameters}}, custom])
}

fn request(messages: &[Value]) -> Value {
    json!({"messages": messages, "tools": tools(), "temperature": 0})
}

fn user(text: &str) -> Value {
    json!({"role": "user", "content": text})
}

async fn message(server: &Fixture, body: &Value) -> (Value, String) {
    let answer = server.post("/v1/chat/completions", body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let choice = &answer.json()["choices"][0];
    (choice["message"].clone(), choice["finish_reason"].as_str().unwrap().to_owned())
}

/// Puts a stream's chunks together as OpenAI's clients do.
async fn streamed(server: &Fixture, mut body: Value) -> (Value, String) {
    body["stream"] = json!(true);
    let (events, done) = server.post("/v1/chat/completions", &body).await.events();
    assert!(done);
    let (mut content, mut reasoning, mut calls) = (String::new(), String::new(), Vec::<Value>::new());
    for event in &events {
        let delta = &event["choices"][0]["delta"];
        content += delta["content"].as_str().unwrap_or_default();
        reasoning += delta["reasoning_content"].as_str().unwrap_or_default();
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            let index = call["index"].as_u64().unwrap() as usize;
            if index == calls.len() {
                calls.push(call.clone());
                continue;
            }
            let (kind, field) =
                if call["custom"].is_object() { ("custom", "input") } else { ("function", "arguments") };
            let so_far = calls[index][kind][field].as_str().unwrap().to_owned();
            calls[index][kind][field] = json!(so_far + call[kind][field].as_str().unwrap());
        }
    }
    let finish = events.iter().rev().find_map(|event| event["choices"][0]["finish_reason"].as_str());
    (json!({"content": content, "reasoning_content": reasoning, "tool_calls": calls}), finish.unwrap().into())
}

fn without_ids(calls: &Value) -> Vec<Value> {
    let strip = |call: &Value| {
        let mut call = call.clone();
        assert!(call["id"].as_str().unwrap().starts_with("call_"));
        call.as_object_mut().unwrap().retain(|key, _| key != "id" && key != "index");
        call
    };
    calls.as_array().unwrap().iter().map(strip).collect()
}

#[tokio::test]
async fn a_streamed_answer_is_the_whole_one() {
    let server = start_agent(&[CALLS]);
    let body = request(&[user("go")]);
    let (whole, finish) = message(&server, &body).await;
    let (stream, stream_finish) = streamed(&server, body).await;
    assert_eq!((finish.as_str(), stream_finish.as_str()), ("tool_calls", "tool_calls"));
    assert_eq!(whole["reasoning_content"], "two files");
    assert_eq!(whole["content"], "Reading both.");
    for key in ["content", "reasoning_content"] {
        assert_eq!(whole[key], stream[key]);
    }
    let calls = without_ids(&whole["tool_calls"]);
    assert_eq!(calls, without_ids(&stream["tool_calls"]));
    assert_eq!(calls[0]["function"]["arguments"], "{\"path\":  \"a </tool_call> b\"}");
    assert_eq!(
        calls[1],
        json!({"type": "function", "function": {"name": "read", "arguments": "{\"path\": \"ö\"}"}})
    );
}

#[tokio::test]
async fn a_custom_call_carries_its_text_as_it_is() {
    let server = start_agent(&["<custom_tool_call name=\"patch\">\n*** a \"b\"\n+c\n</custom_tool_call>"]);
    let body = request(&[user("go")]);
    let expected = json!([{"type": "custom", "custom": {"name": "patch", "input": "*** a \"b\"\n+c"}}]);
    let (whole, _) = message(&server, &body).await;
    assert_eq!(json!(without_ids(&whole["tool_calls"])), expected);
    assert_eq!(whole["content"], Value::Null);
    let (stream, _) = streamed(&server, body).await;
    assert_eq!(json!(without_ids(&stream["tool_calls"])), expected);
}

#[tokio::test]
async fn a_custom_call_in_harmonys_channels_has_its_result_in_the_next_turn() {
    let call =
        "<|channel|>commentary to=functions.patch <|constrain|>json<|message|>{\"input\": \"*** a\\n+c\"}";
    let server = start_harmony(&[call, "<|channel|>final<|message|>Done."]);
    let (said, _) = message(&server, &request(&[user("go")])).await;
    assert_eq!(said["tool_calls"][0]["custom"], json!({"name": "patch", "input": "*** a\n+c"}));
    let result = json!({"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "ok"});
    let messages = [user("go"), said, result];
    let shown = server.shown(&json!(messages), &tools()).await;
    let expected = "to=functions.patch<|channel|>commentary json<|message|>{\"input\": \"*** a\\n+c\"}<|call|>\
                    <|start|>functions.patch to=assistant";
    assert!(shown.contains(expected) && !shown.contains("<custom_tool_call"), "{shown}");
    let (done, _) = message(&server, &request(&messages)).await;
    assert_eq!(done["content"], "Done.");
}

#[tokio::test]
async fn several_calls_of_a_message_are_shown_one_by_one_where_its_template_shows_one() {
    let read = json!({"id": "a", "type": "function", "function": {"name": "read", "arguments": "{\"path\": \"x\"}"}});
    let patch = json!({"id": "b", "type": "custom", "custom": {"name": "patch", "input": "y"}});
    let result = |id: &str, text: &str| json!({"role": "tool", "tool_call_id": id, "content": text});
    let said = json!({"role": "assistant", "content": null, "tool_calls": [read, patch]});
    let messages = [user("go"), said, result("b", "patched"), result("a", "is x")];
    let server = start_harmony(&["<|channel|>final<|message|>Done."]);
    let shown = server.shown(&json!(messages), &tools()).await;
    let (_, calls) = shown.split_once("go<|end|>").unwrap();
    let channel = "<|channel|>commentary";
    let expected = format!(
        "<|start|>assistant to=functions.read{channel} json<|message|>{{\"path\": \"x\"}}<|call|>\
         <|start|>functions.read to=assistant{channel}<|message|>\"is x\"<|end|>\
         <|start|>assistant to=functions.patch{channel} json<|message|>{{\"input\": \"y\"}}<|call|>\
         <|start|>functions.patch to=assistant{channel}<|message|>\"patched\"<|end|><|start|>assistant"
    );
    assert_eq!(calls, expected);
    let (done, _) = message(&server, &request(&messages)).await;
    assert_eq!(done["content"], "Done.");
}

#[tokio::test]
async fn without_parallel_calls_the_answer_ends_with_the_first() {
    let server = start_agent(&[CALLS]);
    let mut body = request(&[user("go")]);
    body["parallel_tool_calls"] = json!(false);
    let (whole, finish) = message(&server, &body).await;
    assert_eq!(whole["tool_calls"].as_array().unwrap().len(), 1);
    assert_eq!(finish, "tool_calls");
    server.idle().await;
}

#[tokio::test]
async fn without_tools_or_with_none_chosen_markup_is_text() {
    let server = start_agent(&["<tool_call>\n{\"name\": \"read\", \"arguments\": {}}\n</tool_call>"]);
    let mut body = request(&[user("go")]);
    body["tool_choice"] = json!("none");
    let (whole, finish) = message(&server, &body).await;
    assert!(whole["content"].as_str().unwrap().starts_with("<tool_call>"), "{whole}");
    assert_eq!(finish, "stop");
}

/// Whatever a client drops or spells otherwise, the next turn finds all that was computed.
#[tokio::test]
async fn the_next_turn_finds_the_last_answer_in_the_cache() {
    let server = start_agent(&[CALLS, "Done."]);
    let first = request(&[user("go")]);
    let answer = server.post("/v1/chat/completions", &first).await.json();
    let usage = &answer["usage"];
    let computed = usage["prompt_tokens"].as_u64().unwrap() + usage["completion_tokens"].as_u64().unwrap();
    let mut said = answer["choices"][0]["message"].clone();
    said.as_object_mut().unwrap().remove("reasoning_content");
    said["tool_calls"][1]["function"]["arguments"] = json!("{\"path\":\"ö\"}");
    let ids = [&said["tool_calls"][0]["id"], &said["tool_calls"][1]["id"]].map(Clone::clone);
    let result = |id: &Value| json!({"role": "tool", "tool_call_id": id, "content": "x"});
    let second = request(&[user("go"), said.clone(), result(&ids[0]), result(&ids[1])]);
    let usage = server.post("/v1/chat/completions", &second).await.json()["usage"].clone();
    let cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    // The last block of the first turn is not full, and its end of turn was not computed.
    assert!(cached + 16 > computed - 1 && cached <= computed, "{cached} of {computed}");
}

#[tokio::test]
async fn reasoning_is_counted() {
    let server = start_agent(&["<think>abc</think>d"]);
    let usage = server.post("/v1/chat/completions", &request(&[user("go")])).await.json()["usage"].clone();
    let reasoning = usage["completion_tokens_details"]["reasoning_tokens"].as_u64().unwrap();
    assert!((3..=19).contains(&reasoning), "{usage}");
}

#[tokio::test]
async fn token_ids_are_reported_where_asked_for() {
    let server = start_agent(&["ab"]);
    let mut body = request(&[user("go")]);
    body["return_token_ids"] = json!(true);
    let whole = server.post("/v1/chat/completions", &body).await.json();
    assert_eq!(whole["choices"][0]["token_ids"], json!([97, 98]));
    assert_eq!(whole["prompt_token_ids"].as_array().unwrap().len() as u64, whole["usage"]["prompt_tokens"]);
    body["stream"] = json!(true);
    let (events, _) = server.post("/v1/chat/completions", &body).await.events();
    let ids = events
        .iter()
        .flat_map(|event| event["choices"][0]["token_ids"].as_array().cloned().unwrap_or_default());
    assert_eq!(ids.collect::<Vec<_>>(), [json!(97), json!(98)]);
}
