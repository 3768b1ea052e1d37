//! `POST /v1/responses`: whole and streamed answers, items in and out, what is refused.

use std::time::Duration;

use rudder_server::ServerConfig;
use serde_json::{Value, json};

use crate::common::{
    Answer, CONTEXT, Fixture, MODEL, Manner, PACE, engine_config, eventually, start, start_agent, start_held,
    start_held_agent, start_in, start_with,
};
use crate::legal;

const PATH: &str = "/v1/responses";
const CALLS: &str = "<think>two things</think>On it.\n\
    <tool_call>\n{\"name\": \"read\", \"arguments\": {\"path\": \"ä\"}}\n</tool_call>\n\
    <tool_call>\n{\"name\": \"crm__list\", \"arguments\": {}}\n</tool_call>";

fn body(more: Value) -> Value {
    let mut body = json!({"model": MODEL, "input": "x", "temperature": 0});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn tools() -> Value {
    json!([
        {"type": "function", "name": "read", "parameters": {"type": "object", "properties": {"path": {"type": "string"}}}},
        {"type": "namespace", "name": "crm", "description": "Customers", "tools": [{"type": "function", "name": "list"}]},
        {"type": "custom", "name": "patch"},
        {"type": "web_search"},
    ])
}

async fn whole(server: &Fixture, more: Value) -> Value {
    let answer = server.post(PATH, &body(more)).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

/// Events of a stream, each under its own name.
pub fn events(answer: &Answer) -> Vec<Value> {
    assert_eq!(answer.headers["content-type"], "text/event-stream");
    let text = answer.text();
    let frames = text.split_terminator("\n\n").filter(|frame| !frame.starts_with(':'));
    let event = |frame: &str| {
        let (name, data) =
            frame.strip_prefix("event: ").and_then(|frame| frame.split_once("\ndata: ")).expect(frame);
        let event: Value = serde_json::from_str(data).expect(data);
        assert_eq!(event["type"], name);
        event
    };
    frames.map(event).collect()
}

async fn streamed(server: &Fixture, more: Value) -> Vec<Value> {
    let mut body = body(more);
    body["stream"] = json!(true);
    let answer = server.post(PATH, &body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    events(&answer)
}

/// What differs from one answer to the next of the same words.
fn nameless(response: &Value) -> Value {
    let mut response = response.clone();
    for key in ["id", "created_at", "completed_at", "usage", "rudder"] {
        response[key] = Value::Null;
    }
    for item in response["output"].as_array_mut().unwrap() {
        item["id"] = Value::Null;
        item["call_id"] = Value::Null;
    }
    response
}

#[tokio::test]
async fn a_whole_response_has_every_field() {
    let server = start_agent(&["Hello."]);
    let response = whole(&server, json!({"metadata": {"k": "v"}, "tools": tools()})).await;
    for key in "id object created_at completed_at status incomplete_details model previous_response_id \
        instructions output error tools tool_choice truncation parallel_tool_calls text top_p presence_penalty \
        frequency_penalty top_logprobs temperature reasoning usage max_output_tokens max_tool_calls store background \
        service_tier metadata safety_identifier prompt_cache_key"
        .split_whitespace()
    {
        assert!(response.get(key).is_some(), "{key} is missing");
    }
    assert_eq!((&response["status"], &response["object"]), (&json!("completed"), &json!("response")));
    assert_eq!(response["metadata"], json!({"k": "v"}));
    assert_eq!(response["text"], json!({"format": {"type": "text"}}));
    assert_eq!(response["tools"][0]["strict"], false);
    assert_eq!(response["tools"][3], json!({"type": "web_search"}));
    let message = &response["output"][0];
    let part = json!({"type": "output_text", "text": "Hello.", "annotations": [], "logprobs": []});
    assert_eq!((&message["role"], &message["content"]), (&json!("assistant"), &json!([part])));
    let usage = &response["usage"];
    assert_eq!(usage["output_tokens"], 7);
    assert_eq!(usage["total_tokens"], usage["input_tokens"].as_u64().unwrap() + 7);
}

#[tokio::test]
async fn a_stream_is_legal_and_ends_as_the_whole_answer_does() {
    for answer in
        [CALLS, "Hello.", "", " \n", "<think>hm</think>", "<tool_call>{\"name\": \"read\", bad</tool_call>"]
    {
        let server = start_agent(&[answer]);
        let request = json!({"tools": tools(), "include": ["reasoning.encrypted_content"]});
        let events = streamed(&server, request.clone()).await;
        let last = legal::check(&events);
        assert_eq!(nameless(&last), nameless(&whole(&server, request).await), "{answer:?}");
        assert!(!last["output"].as_array().unwrap().is_empty(), "{answer:?}");
    }
}

#[tokio::test]
async fn reasoning_text_and_calls_become_items() {
    let server = start_agent(&[CALLS]);
    let response = whole(&server, json!({"tools": tools(), "store": false})).await;
    let output = response["output"].as_array().unwrap();
    let kinds: Vec<&str> = output.iter().map(|item| item["type"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["reasoning", "message", "function_call", "function_call"]);
    assert_eq!(output[0]["content"], json!([{"type": "reasoning_text", "text": "two things"}]));
    assert!(output[0]["encrypted_content"].as_str().unwrap().len() > 20);
    assert_eq!(output[2]["arguments"], "{\"path\": \"ä\"}");
    assert!(output[2]["call_id"].as_str().unwrap().starts_with("call_"));
    assert_eq!((&output[3]["name"], &output[3]["namespace"]), (&json!("list"), &json!("crm")));
    assert!(response["usage"]["output_tokens_details"]["reasoning_tokens"].as_u64().unwrap() >= 10);
}

#[tokio::test]
async fn a_custom_tools_text_is_streamed() {
    let patch = format!("*** Begin\n+ö{}", "\n+and a line".repeat(20));
    let answer = format!("<custom_tool_call name=\"patch\">\n{patch}\n</custom_tool_call>");
    let (server, leash) = start_held_agent(&[&answer]);
    let events = leash.stepping(streamed(&server, json!({"tools": tools()}))).await;
    let item = &legal::check(&events)["output"][0];
    assert_eq!((&item["type"], &item["name"]), (&json!("custom_tool_call"), &json!("patch")));
    assert_eq!(item["input"], patch);
    let deltas = events.iter().filter(|event| event["type"] == "response.custom_tool_call_input.delta");
    assert!(deltas.count() > 3);
}

#[tokio::test]
async fn what_was_said_is_found_in_the_cache_by_items_or_by_id() {
    for by_id in [false, true] {
        let server = start_agent(&[CALLS, "Done."]);
        let user =
            json!({"type": "message", "role": "user", "content": "a question that takes some blocks to ask"});
        let first = whole(
            &server,
            json!({"tools": tools(), "input": [user], "store": by_id,
            "include": ["reasoning.encrypted_content"]}),
        )
        .await;
        let output = first["output"].as_array().unwrap();
        let calls = output.iter().filter(|item| item["type"] == "function_call");
        let results = calls
            .map(|call| json!({"type": "function_call_output", "call_id": call["call_id"], "output": "ok"}));
        let mut input: Vec<Value> = results.collect();
        let mut next = json!({"tools": tools(), "store": by_id});
        if by_id {
            next["previous_response_id"] = first["id"].clone();
        } else {
            input.splice(0..0, std::iter::once(user).chain(output.clone()));
        }
        next["input"] = json!(input);
        let second = whole(&server, next).await;
        assert_eq!(second["output"][0]["content"][0]["text"], "Done.");
        let cached = second["usage"]["input_tokens_details"]["cached_tokens"].as_u64().unwrap();
        assert!(
            cached + 16 >= first["usage"]["total_tokens"].as_u64().unwrap() - 2,
            "{cached} of {}",
            first["usage"]
        );
        assert_eq!(second["previous_response_id"], if by_id { first["id"].clone() } else { Value::Null });
    }
}

#[tokio::test]
async fn instructions_come_first_and_are_not_inherited() {
    let server = start_agent(&["a", "b"]);
    let first = whole(&server, json!({"instructions": "a long instruction, to be told from none"})).await;
    assert_eq!(first["instructions"], "a long instruction, to be told from none");
    let second = whole(&server, json!({"previous_response_id": first["id"], "input": "y"})).await;
    assert_eq!(second["instructions"], Value::Null);
    assert!(second["usage"]["input_tokens"].as_u64() < first["usage"]["input_tokens"].as_u64());
}

#[tokio::test]
async fn a_limit_makes_it_incomplete() {
    let server = start();
    let response = legal::check(&streamed(&server, json!({"max_output_tokens": 4})).await);
    assert_eq!(response["incomplete_details"], json!({"reason": "max_output_tokens"}));
    assert_eq!(response["output"][0]["status"], "incomplete");
    assert_eq!(response["completed_at"], Value::Null);
}

#[tokio::test]
async fn logprobs_are_those_of_the_text() {
    let server = start_agent(&["<think>hm</think>Hi"]);
    let include = json!({"include": ["message.output_text.logprobs"], "top_logprobs": 2});
    let events = streamed(&server, include).await;
    let response = legal::check(&events);
    let logprobs = response["output"][1]["content"][0]["logprobs"].as_array().unwrap();
    let tokens: Vec<&str> = logprobs.iter().map(|entry| entry["token"].as_str().unwrap()).collect();
    assert_eq!(tokens.concat(), "Hi");
    assert_eq!(logprobs[0]["top_logprobs"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn logprobs_are_those_of_the_texts_own_tokens() {
    let call = "<tool_call>\n{\"name\": \"read\", \"arguments\": {\"path\": \"the cat\"}}\n</tool_call>\n";
    for (markup, said) in
        [("<think>the thing</think>\n", "hi"), (call, "the"), (&format!("On it.{call}"), "cat")]
    {
        let (server, answer) = (start_agent(&[&format!("{markup}{said}")]), format!("{markup}{said}"));
        let function = json!({"name": "read", "parameters": {"type": "object"}});
        let chat = json!({"messages": [{"role": "user", "content": "x"}], "temperature": 0, "logprobs": true,
            "tools": [{"type": "function", "function": function}]});
        let chat = server.post("/v1/chat/completions", &chat).await.json();
        let all = chat["choices"][0]["logprobs"]["content"].as_array().unwrap();
        assert_eq!(all.len(), answer.len(), "a byte a token");

        let include = json!({"include": ["message.output_text.logprobs"], "stream": true,
            "tools": [{"type": "function", "name": "read", "parameters": {"type": "object"}}]});
        let response = legal::check(&events(&server.post(PATH, &body(include)).await));
        assert_eq!(response["usage"]["input_tokens"], chat["usage"]["prompt_tokens"]);
        let message = response["output"].as_array().unwrap().last().unwrap();
        let own = message["content"][0]["logprobs"].as_array().unwrap();
        assert_eq!(message["content"][0]["text"], said);
        assert_eq!(own.len(), said.len());
        for (own, expected) in own.iter().zip(&all[all.len() - said.len()..]) {
            assert_eq!(own["token"], expected["token"]);
            let difference = own["logprob"].as_f64().unwrap() - expected["logprob"].as_f64().unwrap();
            assert!(difference.abs() < 1e-6, "{answer}: {own} for {expected}");
        }
    }
}

#[tokio::test]
async fn an_overflow_is_a_400_or_an_event_that_names_it() {
    let server = start();
    let long = "word ".repeat(CONTEXT);
    let answer = server.post(PATH, &body(json!({"input": long}))).await;
    assert_eq!(answer.error(), (400, "input".into(), "context_length_exceeded".into()));
    let events = streamed(&server, json!({"input": long})).await;
    let response = legal::check(&events);
    assert_eq!(
        (&response["status"], &response["error"]["code"]),
        (&json!("failed"), &json!("context_length_exceeded"))
    );
    assert!(response["error"]["message"].as_str().unwrap().contains("maximum context length is"));
}

#[tokio::test]
async fn truncation_drops_the_oldest_turns_alone() {
    let server = start();
    let turn = |text: &str| json!([{"role": "user", "content": text.repeat(20)}, {"role": "assistant", "content": text.repeat(20)}]);
    let mut input = vec![json!({"role": "developer", "content": "rules"})];
    for text in ["alpha ", "beta ", "gamma ", "delta "] {
        input.extend(turn(text).as_array().unwrap().clone());
    }
    input.push(json!({"role": "user", "content": "last"}));
    let request = json!({"input": input, "max_output_tokens": 20});
    assert_eq!(server.post(PATH, &body(request.clone())).await.status, 400);
    let mut cut = request;
    cut["truncation"] = json!("auto");
    let response = whole(&server, cut).await;
    let tokens = response["usage"]["input_tokens"].as_u64().unwrap() as usize;
    assert!(tokens + 20 <= CONTEXT && tokens > CONTEXT / 3, "{tokens}");
    let alone = json!({"input": "word ".repeat(CONTEXT), "truncation": "auto"});
    assert_eq!(server.post(PATH, &body(alone)).await.error().2, "context_length_exceeded");
}

#[tokio::test]
async fn an_engine_that_fails_is_told_in_either_form() {
    let manner = Manner::default();
    manner.failing.store(true, std::sync::atomic::Ordering::SeqCst);
    let server = start_in(manner);
    assert_eq!(server.post(PATH, &body(json!({}))).await.status, 500);
    let response = legal::check(&streamed(&server, json!({})).await);
    assert_eq!((&response["status"], &response["error"]["code"]), (&json!("failed"), &json!("server_error")));
}

#[tokio::test]
async fn a_client_that_leaves_ends_its_response() {
    for streams in [true, false] {
        let (server, leash) = start_held();
        let asked = body(json!({"stream": streams, "ignore_eos": true}));
        if streams {
            let mut stream = server.open(PATH, &asked).await;
            leash.stepping(stream.until("event: response.output_text.delta", 2)).await;
        } else {
            tokio::select! {
                _ = server.open(PATH, &asked) => panic!("it cannot have ended"),
                () = server.asked(1) => {}
            }
        }
        server.cancelled(1).await;
        leash.let_go();
        let stats = server.idle().await;
        assert!(stats.generation_tokens < 100, "{streams}: {stats:?}");
    }
}

#[tokio::test]
async fn a_background_response_runs_without_a_reader() {
    let (server, leash) = start_held_agent(&["Hello there."]);
    let answer = server.post(PATH, &body(json!({"background": true}))).await;
    let response = answer.json();
    assert_eq!(response["background"], true);
    assert!(matches!(response["status"].as_str(), Some("queued" | "in_progress")), "{response}");
    let goes_on = body(json!({"previous_response_id": response["id"], "input": "and?"}));
    let mut next = server.post(PATH, &goes_on).await;
    assert_eq!(next.status, 400, "it has not ended");
    leash.let_go();
    let ended = async || {
        next = server.post(PATH, &goes_on).await;
        next.status != 400
    };
    eventually("it ends", ended).await;
    assert!(next.json()["usage"]["input_tokens_details"]["cached_tokens"].as_u64().unwrap() > 0);
    let events = streamed(&server, json!({"background": true})).await;
    assert_eq!(events[0]["response"]["status"], "queued");
    assert_eq!(legal::check(&events)["status"], "completed");
}

#[tokio::test]
async fn a_keep_alive_is_a_comment() {
    let config = ServerConfig { keep_alive: Duration::from_millis(20), ..ServerConfig::new(MODEL) };
    let (manner, leash) = Manner::default().held(PACE);
    let server = start_with(config, engine_config(), manner, true);
    let mut stream = server.open(PATH, &body(json!({"stream": true, "max_output_tokens": 1}))).await;
    stream.until(": keep-alive\n\n", 2).await;
    leash.let_go();
    let answer = stream.whole().await;
    assert!(answer.text().matches(": keep-alive\n\n").count() >= 2);
    legal::check(&events(&answer));
    assert!(answer.text().contains("response.created"));
}

#[tokio::test]
async fn what_is_wrong_is_named() {
    let server = start();
    let image = json!([{"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,"}]}]);
    for (request, param, code) in [
        (json!({"model": MODEL}), "input", ""),
        (json!({"input": "x"}), "model", ""),
        (json!({"model": "other", "input": "x"}), "model", "model_not_found"),
        (body(json!({"input": image})), "input[0].content[0]", ""),
        (body(json!({"input": []})), "input", ""),
        (body(json!({"input": 3})), "input", ""),
        (body(json!({"input": [{"type": "item_reference", "id": "msg_gone"}]})), "input[0]", ""),
        (
            body(json!({"previous_response_id": "resp_gone"})),
            "previous_response_id",
            "previous_response_not_found",
        ),
        (body(json!({"tools": [{"type": "function"}]})), "tools[0].name", ""),
        (body(json!({"tool_choice": "required"})), "tool_choice", ""),
        (body(json!({"max_output_tokens": 0})), "max_output_tokens", ""),
        (body(json!({"top_logprobs": 21})), "top_logprobs", ""),
        (body(json!({"temperature": -1})), "temperature", ""),
        (body(json!({"truncation": "some"})), "truncation", ""),
        (body(json!({"metadata": {"k": 1}})), "metadata", ""),
        (body(json!({"text": {"format": {"type": "json_schema"}}})), "text.format.schema", ""),
        (body(json!({"text": {"format": {"type": "poem"}}})), "text.format.type", ""),
        (body(json!({"background": true, "store": false})), "background", ""),
        (body(json!({"prompt": {"id": "p"}})), "prompt", ""),
    ] {
        let answer = server.post_bytes(PATH, request.to_string().into_bytes()).await;
        let status = if code == "model_not_found" { 404 } else { 400 };
        assert_eq!(answer.status, status, "{request}");
        assert_eq!(answer.error(), (status, param.into(), code.into()), "{request}");
    }
    server.idle().await;
}
