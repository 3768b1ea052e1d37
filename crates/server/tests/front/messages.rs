//! Anthropic's dialect: wholes and streams say the same, what was said comes back, errors have its shape.

use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::body::Body;
use axum::http::Request;
use proptest::prelude::*;
use rudder_server::ServerConfig;
use serde_json::{Value, json};

use crate::common::{
    Answer, Fixture, MODEL, Manner, PACE, engine_config, start, start_agent, start_in, start_reasoner,
    start_with,
};

const MESSAGES: &str = "/v1/messages";
const COUNT: &str = "/v1/messages/count_tokens";
const CALLS: &str = "<think>two files</think>Reading both.\n\
    <tool_call>\n{\"name\": \"read\", \"arguments\": {\"path\": \"a </tool_call> b\"}}\n</tool_call>\n\
    <tool_call>\n{\"name\": \"read\", \"arguments\": {}}\n</tool_call>";

fn user(content: impl Into<Value>) -> Value {
    json!({"role": "user", "content": content.into()})
}

fn request(messages: &[Value], extra: Value) -> Value {
    let schema = json!({"type": "object", "properties": {"path": {"type": "string"}}});
    let mut body = json!({"model": MODEL, "messages": messages, "max_tokens": 400, "temperature": 0,
        "tools": [{"name": "read", "description": "Reads.", "input_schema": schema}]});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

async fn whole(server: &Fixture, body: &Value) -> Value {
    let answer = server.post("/v1/messages?beta=true", body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

/// A stream's events, each of which is named as its type says. Between them may be comments.
fn events(answer: &Answer) -> Vec<Value> {
    assert_eq!(answer.headers["content-type"], "text/event-stream");
    let text = answer.text();
    let events = text.strip_suffix("\n\n").unwrap_or_else(|| panic!("{text:?}")).split("\n\n");
    let event = |event: &str| {
        let (name, data) = event.split_once('\n').expect(event);
        let data: Value = serde_json::from_str(data.strip_prefix("data: ").expect(event)).expect(event);
        assert_eq!(name, format!("event: {}", data["type"].as_str().unwrap()));
        data
    };
    events.filter(|event| !event.starts_with(':')).map(event).collect()
}

/// Puts a stream's message together as Anthropic's clients do; panics if its events come in an order
/// that they do not expect.
fn message(events: &[Value]) -> Value {
    let mut events = events.iter().filter(|event| event["type"] != "ping").peekable();
    let start = events.next().unwrap();
    assert_eq!(start["type"], "message_start");
    let mut message = start["message"].clone();
    assert_eq!((&message["content"], &message["stop_reason"]), (&json!([]), &Value::Null));
    let mut blocks = Vec::new();
    while let Some(begin) = events.next_if(|event| event["type"] == "content_block_start") {
        let index = json!(blocks.len());
        assert_eq!(begin["index"], index);
        let mut block = begin["content_block"].clone();
        let mut input = String::new();
        while let Some(event) = events.next_if(|event| event["type"] == "content_block_delta") {
            assert_eq!(event["index"], index);
            append(&mut block, &event["delta"], &mut input);
        }
        if !input.is_empty() {
            block["input"] = serde_json::from_str(&input).unwrap_or(json!({}));
        }
        let stop = events.next().unwrap();
        assert_eq!((&stop["type"], &stop["index"]), (&json!("content_block_stop"), &index));
        blocks.push(block);
    }
    message["content"] = blocks.into();
    let delta = events.next().unwrap();
    assert_eq!(delta["type"], "message_delta");
    for (key, value) in delta["delta"].as_object().unwrap() {
        message[key] = value.clone();
    }
    for (key, value) in delta["usage"].as_object().unwrap() {
        message["usage"][key] = value.clone();
    }
    assert_eq!(events.next().unwrap(), &json!({"type": "message_stop"}));
    assert_eq!(events.next(), None);
    message
}

fn append(block: &mut Value, delta: &Value, input: &mut String) {
    let (kind, field) = match delta["type"].as_str().unwrap() {
        "text_delta" => ("text", "text"),
        "thinking_delta" => ("thinking", "thinking"),
        "signature_delta" => ("thinking", "signature"),
        "input_json_delta" => {
            assert_eq!(block["type"], "tool_use");
            return input.push_str(delta["partial_json"].as_str().unwrap());
        }
        other => panic!("{other}"),
    };
    assert_eq!(block["type"], kind);
    let so_far = block[field].as_str().unwrap().to_owned();
    block[field] = json!(so_far + delta[field].as_str().unwrap());
}

/// What may differ from answer to answer.
fn comparable(message: &Value) -> Value {
    let mut message = message.clone();
    assert!(message["id"].as_str().unwrap().starts_with("msg_"));
    message["id"] = Value::Null;
    for block in message["content"].as_array_mut().unwrap() {
        if block["type"] == "tool_use" {
            assert!(!block["id"].as_str().unwrap().is_empty());
            block["id"] = Value::Null;
        }
    }
    let usage = &mut message["usage"];
    let prompt = usage["input_tokens"].as_u64().unwrap() + usage["cache_read_input_tokens"].as_u64().unwrap();
    usage["input_tokens"] = json!(prompt);
    usage["cache_read_input_tokens"] = json!(0);
    message
}

fn types(message: &Value) -> Vec<&str> {
    message["content"].as_array().unwrap().iter().map(|block| block["type"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn arguments_that_cannot_be_read_are_not_left_out() {
    let said = |arguments: &str| {
        format!("<tool_call>\n{{\"name\": \"read\", \"arguments\": {arguments}}}\n</tool_call>")
    };
    for (arguments, input, streamed) in [
        ("{\"path\": \"a\nb\"}", json!({"path": "a\nb"}), json!({"path": "a\nb"})),
        ("[\"a\"]", json!({"arguments": "[\"a\"]"}), json!({"arguments": "[\"a\"]"})),
        // What was streamed cannot be taken back: the client finds that it is no JSON.
        ("{\"path\": a.txt}", json!({"arguments": "{\"path\": a.txt}"}), json!({})),
    ] {
        let server = start_agent(&[&said(arguments)]);
        let answer = whole(&server, &request(&[user("x")], json!({}))).await;
        assert_eq!(answer["content"][0]["input"], input, "{answer}");
        let body = request(&[user("x")], json!({"stream": true}));
        let answer = message(&events(&server.post(MESSAGES, &body).await));
        assert_eq!(answer["content"][0]["input"], streamed, "{answer}");
    }
}

#[tokio::test]
async fn a_stream_is_the_whole_answer() {
    let server = start_agent(&[CALLS]);
    for (extra, reason, blocks) in [
        (json!({}), "tool_use", &["thinking", "text", "tool_use", "tool_use"][..]),
        (
            json!({"thinking": {"type": "adaptive", "display": "omitted"}}),
            "tool_use",
            &["thinking", "text", "tool_use", "tool_use"],
        ),
        (json!({"tools": []}), "end_turn", &["thinking", "text"]),
        (json!({"max_tokens": 30}), "max_tokens", &["thinking", "text"]),
        (json!({"stop_sequences": ["never", "both"]}), "stop_sequence", &["thinking", "text"]),
        (
            json!({"tool_choice": {"type": "auto", "disable_parallel_tool_use": true}}),
            "tool_use",
            &["thinking", "text", "tool_use"],
        ),
    ] {
        let mut body = request(&[user("go")], extra);
        let whole = whole(&server, &body).await;
        assert_eq!((whole["stop_reason"].as_str(), &types(&whole)[..]), (Some(reason), blocks), "{whole}");
        body["stream"] = json!(true);
        let streamed = message(&events(&server.post(MESSAGES, &body).await));
        assert_eq!(comparable(&streamed), comparable(&whole));
        server.idle().await;
    }
}

#[tokio::test]
async fn an_answer_has_every_field_of_its_type() {
    let server = start_agent(&[CALLS]);
    let answer = whole(&server, &request(&[user("go")], json!({}))).await;
    let fixed = json!({"type": "message", "role": "assistant", "model": MODEL, "stop_sequence": null,
        "stop_details": null, "container": null});
    for (key, value) in fixed.as_object().unwrap() {
        assert_eq!(answer.get(key), Some(value), "{key}");
    }
    let usage = &answer["usage"];
    for key in ["cache_creation", "inference_geo", "server_tool_use"] {
        assert_eq!(usage.get(key), Some(&Value::Null), "{key}");
    }
    assert_eq!(
        (&usage["cache_creation_input_tokens"], &usage["service_tier"]),
        (&json!(0), &json!("standard"))
    );
    assert!(usage["output_tokens_details"]["thinking_tokens"].as_u64().unwrap() >= 9, "{usage}");
    let content = &answer["content"];
    assert_eq!(content[0]["thinking"], "two files");
    assert_eq!(content[1], json!({"type": "text", "text": "Reading both.", "citations": null}));
    assert_eq!(
        (&content[2]["name"], &content[2]["input"]),
        (&json!("read"), &json!({"path": "a </tool_call> b"}))
    );
    assert_eq!((&content[3]["caller"], &content[3]["input"]), (&json!({"type": "direct"}), &json!({})));
}

#[tokio::test]
async fn thinking_ends_where_its_budget_is_spent() {
    // It says the second where the first was cut.
    let server = start_reasoner(&["one two and so on", "answer"]);
    let asked = |thinking: Value| request(&[user("go")], json!({"tools": [], "thinking": thinking}));
    let answer = whole(&server, &asked(json!({"type": "enabled", "budget_tokens": 8}))).await;
    assert_eq!(answer["content"][0]["thinking"], "one two");
    assert_eq!(answer["content"][1]["text"], "answer");
    assert_eq!(answer["usage"]["output_tokens"], 8 + 4 + 6 + 1);

    let chat = |budget: Value| {
        json!({"model": MODEL, "messages": [user("go")], "temperature": 0, "max_tokens": 100,
            "thinking_token_budget": budget})
    };
    let answer = server.post("/v1/chat/completions", &chat(json!(8))).await.json();
    let message = &answer["choices"][0]["message"];
    assert_eq!((&message["reasoning_content"], &message["content"]), (&json!("one two"), &json!("answer")));
    let (status, param, _) = server.post("/v1/chat/completions", &chat(json!(-1))).await.error();
    assert_eq!((status, param.as_str()), (400, "thinking_token_budget"));

    let answer = whole(&server, &asked(json!({"type": "enabled", "budget_tokens": 4000}))).await;
    assert_eq!(answer["content"][0]["thinking"], "one two and so on");
}

#[tokio::test]
async fn a_stop_sequence_is_named_and_the_end_of_the_window_is_told_apart() {
    let server = start_agent(&[CALLS]);
    let stopped = whole(&server, &request(&[user("go")], json!({"stop_sequences": ["never", "both"]}))).await;
    assert_eq!(
        (&stopped["stop_reason"], &stopped["stop_sequence"]),
        (&json!("stop_sequence"), &json!("both"))
    );
    assert_eq!(stopped["content"][1]["text"], "Reading ");
    let endless = json!({"model": MODEL, "messages": [user("go")], "max_tokens": 100_000, "temperature": 0});
    assert_eq!(whole(&start(), &endless).await["stop_reason"], "model_context_window_exceeded");
}

/// The tokens of a prompt, and how many of them were found in the cache.
fn prompt(message: &Value) -> (u64, u64) {
    let usage = |key: &str| message["usage"][key].as_u64().unwrap();
    (usage("input_tokens") + usage("cache_read_input_tokens"), usage("cache_read_input_tokens"))
}

/// All that was computed but the last block, which is not full.
fn reuses(cached: u64, before: &Value) -> bool {
    let computed = prompt(before).0 + before["usage"]["output_tokens"].as_u64().unwrap();
    cached + 16 >= computed - 1 && cached <= computed
}

#[tokio::test]
async fn what_was_said_comes_back_and_is_found_in_the_cache() {
    let server = start_agent(&[CALLS, "Done."]);
    let first = whole(&server, &request(&[user("go")], json!({"thinking": {"type": "adaptive"}}))).await;
    let mut said = first["content"].clone();
    said[3]["cache_control"] = json!({"type": "ephemeral"});
    let result = |index: usize, content: Value| json!({"type": "tool_result", "tool_use_id": first["content"][index]["id"], "content": content});
    let results = json!([
        result(2, json!("one")),
        result(3, json!([{"type": "text", "text": "two"}, {"type": "image", "source": {"type": "base64", "data": ""}}])),
        {"type": "text", "text": "and now?"},
    ]);
    let messages = [user("go"), json!({"role": "assistant", "content": said}), user(results)];
    let body = request(&messages, json!({"thinking": {"type": "adaptive"}}));
    let counted = server.post(COUNT, &body).await.json()["input_tokens"].as_u64().unwrap();
    let second = whole(&server, &body).await;
    assert_eq!(second["content"][0]["text"], "Done.");
    let (tokens, cached) = prompt(&second);
    assert_eq!(tokens, counted);
    assert!(reuses(cached, &first), "{cached} {first}");
}

#[tokio::test]
async fn a_billing_header_and_other_spellings_of_the_same_keep_the_cache() {
    let server = start_agent(&["ok"]);
    let system = |version: u32| {
        json!([
            {"type": "text", "text": format!("x-anthropic-billing-header: cc_version={version}; x=y;")},
            {"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}},
        ])
    };
    let rules = [
        json!("be brief"),
        json!([{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}]),
    ];
    let long = "a long request ".repeat(10);
    let mut cached = Vec::new();
    for (version, rules) in [1, 22].into_iter().zip(rules) {
        let messages = [user(long.as_str()), json!({"role": "system", "content": rules})];
        let answer = whole(&server, &request(&messages, json!({"system": system(version)}))).await;
        cached.push(prompt(&answer));
    }
    assert_eq!((cached[0].0, cached[0].1), (cached[1].0, 0));
    assert!(cached[1].1 + 16 >= cached[1].0, "{cached:?}");
    let joined = "x-anthropic-billing-header: cc_version=3;\nYou are an agent.";
    let server = &server;
    let count = |system: Value| {
        let body = request(&[user("go")], json!({"system": system, "max_tokens": null}));
        async move { server.post(COUNT, &body).await.json()["input_tokens"].as_u64().unwrap() }
    };
    assert_eq!(count(json!(joined)).await, count(json!("You are an agent.")).await);
}

#[tokio::test]
async fn tools_that_the_model_may_not_call_are_not_in_its_prompt() {
    let server = start_agent(&["ok"]);
    let schema = json!({"type": "object"});
    let offered = json!({"name": "read", "input_schema": schema});
    let deferred = json!({"name": "rare", "input_schema": schema, "defer_loading": true});
    let web = json!({"type": "web_search_20260318", "name": "web_search", "max_uses": 3});
    let server = &server;
    let count = |tools: Value| {
        let body = request(&[user("go")], json!({"tools": tools}));
        async move { server.post(COUNT, &body).await.json()["input_tokens"].as_u64().unwrap() }
    };
    let alone = count(json!([offered])).await;
    assert_eq!(count(json!([offered, web, deferred])).await, alone);
    assert!(count(json!([])).await < alone);
}

/// Status, type and message of an error in Anthropic's shape.
fn refused(answer: &Answer) -> (u16, String, String) {
    let body = answer.json();
    assert_eq!(
        (body["type"].as_str(), &body["request_id"]),
        (Some("error"), &json!(answer.headers["request-id"].to_str().unwrap()))
    );
    let word = |key: &str| body["error"][key].as_str().unwrap_or_default().to_owned();
    assert!(!word("message").is_empty(), "{body}");
    (answer.status.as_u16(), word("type"), word("message"))
}

#[tokio::test]
async fn what_is_wrong_is_named_in_the_message() {
    let server = start_agent(&["ok"]);
    let with = |extra: Value| request(&[user("go")], extra);
    let says = |content: Value| request(&[user(content)], json!({}));
    let image =
        json!([{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}]);
    let pdf = json!([{"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": ""}}]);
    for (body, named) in [
        (with(json!({"model": null})), "model"),
        (with(json!({"max_tokens": null})), "max_tokens"),
        (with(json!({"max_tokens": 0})), "max_tokens"),
        (with(json!({"messages": null})), "messages"),
        (with(json!({"messages": []})), "messages"),
        (with(json!({"messages": [{"role": "assistant", "content": "x"}]})), "end with a user message"),
        (with(json!({"messages": [{"role": "boss", "content": "x"}]})), "messages[0].role"),
        (with(json!({"messages": [{"role": "user", "content": 7}]})), "messages[0].content"),
        (with(json!({"temperature": 7})), "temperature"),
        (with(json!({"system": [{"type": "text"}]})), "system[0].text"),
        (with(json!({"stop_sequences": [""]})), "stop_sequences"),
        (with(json!({"thinking": {"type": "deep"}})), "thinking.type"),
        (with(json!({"thinking": {"type": "enabled", "budget_tokens": 0}})), "thinking.budget_tokens"),
        (with(json!({"output_config": {"format": {"type": "yaml"}}})), "output_config.format"),
        (with(json!({"tools": [{"name": "f"}]})), "tools[0].input_schema"),
        (with(json!({"tool_choice": {"type": "tool", "name": "g"}})), "tool_choice.name"),
        (says(image), "messages[0].content[0]"),
        (says(pdf), "messages[0].content[0]"),
        (says(json!([{"type": "tool_result"}])), "messages[0].content[0].tool_use_id"),
    ] {
        let (status, kind, message) = refused(&server.post(MESSAGES, &body).await);
        assert_eq!((status, kind.as_str()), (400, "invalid_request_error"), "{body}");
        assert!(message.contains(named), "{named}: {message}");
    }
    assert_eq!(server.post(MESSAGES, &with(json!({}))).await.status, 200);
}

#[tokio::test]
async fn errors_of_every_layer_have_this_dialects_shape() {
    let config = ServerConfig {
        api_keys: vec!["secret".into()],
        aliases: vec!["claude-*".into()],
        max_body_bytes: 2000,
        ..ServerConfig::new(MODEL)
    };
    let server = start_with(config, engine_config(), Manner::default(), true);
    let send = async |method: &str, path: &str, key: &str, body: String| {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("x-api-key", key)
            .header("x-request-id", "mine");
        server.send(request.body(Body::from(body)).unwrap()).await
    };
    let body = |model: &str, text: &str| {
        json!({"model": model, "messages": [user(text)], "max_tokens": 3}).to_string()
    };
    for (method, path, key, text, status, kind) in [
        ("POST", MESSAGES, "wrong", body(MODEL, "go"), 401, "authentication_error"),
        ("POST", MESSAGES, "secret", body("gpt-9", "go"), 404, "not_found_error"),
        ("POST", MESSAGES, "secret", body(MODEL, &"x".repeat(2000)), 413, "request_too_large"),
        ("POST", MESSAGES, "secret", body(MODEL, &"x".repeat(600)), 400, "invalid_request_error"),
        ("POST", MESSAGES, "secret", "{".into(), 400, "invalid_request_error"),
        ("POST", "/v1/messages/batches", "secret", body(MODEL, "go"), 404, "not_found_error"),
        ("GET", MESSAGES, "secret", String::new(), 405, "invalid_request_error"),
    ] {
        let answer = send(method, path, key, text).await;
        assert_eq!(answer.headers["request-id"], "mine");
        let (got, got_kind, message) = refused(&answer);
        assert_eq!((got, got_kind.as_str()), (status, kind), "{message}");
        if kind == "not_found_error" && path == MESSAGES {
            assert!(message.contains("--alias gpt-9"), "{message}");
        }
        if path == MESSAGES && message.contains("too long") {
            assert!(message.contains(" tokens > 512 maximum"), "{message}");
        }
    }
    let answer = send("POST", MESSAGES, "secret", body("claude-haiku-9", "go")).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["model"]), (200, &json!("claude-haiku-9")));
    assert_eq!(answer.headers["request-id"], "mine");
}

#[tokio::test]
async fn a_silent_stream_pings_and_a_failed_one_says_so() {
    let config = ServerConfig { keep_alive: Duration::from_millis(10), ..ServerConfig::new(MODEL) };
    let (manner, leash) = Manner::default().held(PACE);
    let failing = manner.failing.clone();
    let server = start_with(config, engine_config(), manner, true);
    let body =
        json!({"model": MODEL, "messages": [user("go")], "max_tokens": 3, "temperature": 0, "stream": true});
    let mut stream = server.open(MESSAGES, &body).await;
    stream.until("event: ping", 1).await;
    leash.let_go();
    let all = events(&stream.whole().await);
    assert!(all.iter().any(|event| *event == json!({"type": "ping"})), "{all:?}");
    assert_eq!(message(&all)["stop_reason"], "max_tokens");
    failing.store(true, Ordering::SeqCst);
    let all = events(&server.post(MESSAGES, &body).await);
    let last = all.last().unwrap();
    assert_eq!((&last["type"], &last["error"]["type"]), (&json!("error"), &json!("api_error")));
    assert!(last["error"]["message"].as_str().unwrap().contains("a fault for the test"), "{last}");
}

#[tokio::test]
async fn whoever_says_hello_needs_no_key() {
    let config = ServerConfig { api_keys: vec!["secret".into()], ..ServerConfig::new(MODEL) };
    let server = start_with(config, engine_config(), Manner::default(), true);
    assert_eq!(server.get("/api/hello").await.status, 200);
    let head = server.send(Request::head("/api/hello").body(Body::empty()).unwrap()).await;
    assert_eq!((head.status.as_u16(), head.body.len()), (200, 0));
}

#[tokio::test]
async fn the_sampling_of_a_request_is_this_dialects() {
    let server = start_in(Manner { end_at: Some(70), ..Manner::default() });
    let body = |seed: u64| {
        json!({"model": MODEL, "messages": [user("go")], "max_tokens": 40, "temperature": 1.0,
        "top_k": 5, "top_p": 0.9, "seed": seed, "metadata": {"user_id": "x"}, "service_tier": "auto",
        "context_management": {"edits": []}, "output_config": {"effort": "xhigh"}, "container": null})
    };
    let said = async |seed: u64| whole(&server, &body(seed)).await["content"].clone();
    assert_eq!(said(1).await, said(1).await);
}

fn any_value() -> impl Strategy<Value = Value> + Clone {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-3i64..70).prop_map(Value::from),
        "\\PC{0,6}".prop_map(Value::from),
        Just(
            json!({"type": "text", "data": "plain", "definition": {"name": "g", "input_schema": {}}, "name": "f"})
        ),
        Just(json!(["x", {"type": "text", "text": "y"}])),
        Just(json!({})),
    ]
}

/// Objects of these types with some of these keys.
fn any_object(types: &[&'static str], keys: &[&'static str]) -> impl Strategy<Value = Value> + Clone + use<> {
    let fields = prop::collection::hash_map(prop::sample::select(keys.to_vec()), any_value(), 0..6);
    (prop::sample::select(types.to_vec()), fields).prop_map(|(kind, fields)| {
        let mut object = json!(fields);
        object["type"] = kind.into();
        object
    })
}

fn any_content() -> impl Strategy<Value = Value> {
    let types = [
        "text",
        "thinking",
        "tool_use",
        "tool_result",
        "document",
        "image",
        "search_result",
        "tool_reference",
        "tool_addition",
        "tool_removal",
        "redacted_thinking",
        "server_tool_use",
        "novel",
    ];
    let keys = [
        "text",
        "id",
        "name",
        "input",
        "tool_use_id",
        "content",
        "is_error",
        "thinking",
        "signature",
        "source",
        "tool",
        "tool_name",
        "title",
        "cache_control",
    ];
    let block = any_object(&types, &keys);
    let result = prop::collection::vec(block.clone(), 0..3)
        .prop_map(|nested| json!({"type": "tool_result", "tool_use_id": "a", "content": nested}));
    let call = Just(json!({"type": "tool_use", "id": "a", "name": "f", "input": {"x": 1}}));
    let said = "\\PC{0,9}".prop_map(|text| json!({"type": "text", "text": text}));
    let blocks = prop_oneof![block, result, call, said];
    prop_oneof![any_value(), prop::collection::vec(blocks, 0..4).prop_map(Value::from)]
}

#[test]
fn whatever_conversation_comes_is_answered_or_refused() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let server = start();
    let roles = prop::sample::select(vec!["user", "user", "assistant", "system", "boss"]);
    let messages = prop::collection::vec((roles, any_content()), 0..4);
    let tools = prop::collection::vec(
        any_object(&["custom", "web_search_20250305"], &["name", "input_schema", "strict", "defer_loading"]),
        0..3,
    );
    let choice = any_object(&["auto", "any", "tool", "none"], &["name", "disable_parallel_tool_use"]);
    let request = (messages, any_content(), tools, choice, any::<bool>());
    proptest!(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() },
        |((messages, system, tools, choice, stream) in request)| {
        let messages: Vec<_> = messages.iter().map(|(role, content)| json!({"role": role, "content": content})).collect();
        let body = json!({"model": MODEL, "max_tokens": 3, "messages": messages, "system": system, "tools": tools,
            "tool_choice": choice, "stream": stream});
        let answer = runtime.block_on(server.post(MESSAGES, &body));
        match answer.status.as_u16() {
            200 if stream => { message(&events(&answer)); }
            200 => { comparable(&answer.json()); }
            status => {
                prop_assert_eq!(status, 400, "{} {}", body, answer.text());
                refused(&answer);
            }
        }
    });
    runtime.block_on(server.idle());
}
