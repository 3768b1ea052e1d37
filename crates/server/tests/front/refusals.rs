//! What clients must not do, or not now: every refusal is a clear error and the server goes on.

use std::sync::atomic::Ordering;

use crate::common::{Fixture, MODEL, Manner, PACE, engine_config, eventually, start, start_in, start_with};
use axum::body::Body;
use axum::http::{Method, Request};
use proptest::prelude::*;
use rudder_engine::EngineConfig;
use rudder_server::ServerConfig;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

fn user(content: &str) -> Value {
    json!({"messages": [{"role": "user", "content": content}], "max_tokens": 4})
}

async fn refused(fixture: &Fixture, path: &str, body: &Value) -> (u16, String, String) {
    fixture.post(path, body).await.error()
}

#[tokio::test]
async fn what_is_wrong_is_named() {
    let fixture = start();
    for (path, body, param) in [
        (CHAT, json!({}), "messages"),
        (CHAT, json!({"messages": []}), "messages"),
        (CHAT, json!({"messages": "hi"}), "messages"),
        (CHAT, json!({"messages": [{"role": "boss", "content": "x"}]}), "messages[0].role"),
        (CHAT, json!({"messages": [{"role": "user", "content": 3}]}), "messages[0].content"),
        (CHAT, json!({"messages": [{"content": "x"}]}), "messages[0]"),
        (CHAT, json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}), "max_tokens"),
        (CHAT, json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": -5}), "max_tokens"),
        (CHAT, json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1e30}), "max_tokens"),
        (CHAT, json!({"messages": [{"role": "user", "content": "x"}], "top_logprobs": 3}), "top_logprobs"),
        (
            CHAT,
            json!({"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "yaml"}}),
            "response_format.type",
        ),
        (COMPLETIONS, json!({}), "prompt"),
        (COMPLETIONS, json!({"prompt": ""}), "prompt"),
        (COMPLETIONS, json!({"prompt": [999_999]}), "prompt"),
        (COMPLETIONS, json!({"prompt": "x", "best_of": 3}), "best_of"),
        (COMPLETIONS, json!({"prompt": "x", "logprobs": 21}), "logprobs"),
        (COMPLETIONS, json!({"prompt": [1], "suffix": "x"}), "suffix"),
        (COMPLETIONS, json!({"prompt": "a", "suffix": "x", "echo": true}), "echo"),
        ("/tokenize", json!({}), "prompt"),
        ("/detokenize", json!({"tokens": [-1]}), "tokens"),
        ("/infill", json!({"n_predict": -2}), "n_predict"),
    ] {
        let (status, at, _) = refused(&fixture, path, &body).await;
        assert_eq!((status, at.as_str()), (400, param), "{path} {body}");
    }
    assert_eq!(fixture.post(CHAT, &user("still there?")).await.status, 200);
}

#[tokio::test]
async fn a_body_that_is_no_json_or_no_utf8_or_too_large_is_refused() {
    let fixture = start();
    for body in [&b""[..], b"{", b"[]", b"{\"prompt\": \"\xff\"}", b"null"] {
        assert_eq!(fixture.post_bytes(COMPLETIONS, body.to_vec()).await.error().0, 400, "{body:?}");
    }
    let config = ServerConfig { max_body_bytes: 1000, ..ServerConfig::new(MODEL) };
    let fixture = start_with(config, engine_config(), Manner::default(), true);
    let answer = fixture.post(CHAT, &user(&"x".repeat(1000))).await;
    assert_eq!(answer.error(), (413, String::new(), "request_too_large".into()));
}

#[tokio::test]
async fn a_prompt_over_the_context_is_recognised_by_every_client() {
    let fixture = start();
    let answer = fixture.post(CHAT, &user(&"x".repeat(600))).await;
    assert_eq!(answer.error(), (400, "messages".into(), "context_length_exceeded".into()));
    assert!(answer.text().contains("maximum context length is 512 tokens"), "{}", answer.text());
    assert!(answer.text().contains("prompt is too long: "), "{}", answer.text());
    assert!(answer.text().contains(" tokens > 512 maximum"), "{}", answer.text());
    let large = fixture.post(COMPLETIONS, &json!({"prompt": "x ".repeat(20_000)})).await;
    assert_eq!(large.error(), (400, "prompt".into(), "context_length_exceeded".into()));
}

#[tokio::test]
async fn unknown_models_routes_and_methods_have_their_codes() {
    let fixture = start();
    let body = json!({"model": "gpt-9", "prompt": "x"});
    assert_eq!(refused(&fixture, COMPLETIONS, &body).await, (404, "model".into(), "model_not_found".into()));
    assert_eq!(fixture.get("/v1/models/gpt-9").await.error().2, "model_not_found");
    assert_eq!(fixture.get("/v1/nothing").await.error(), (404, String::new(), "unknown_url".into()));
    assert_eq!(fixture.get(CHAT).await.error(), (405, String::new(), "method_not_allowed".into()));
}

#[tokio::test]
async fn models_are_listed_with_their_context_length() {
    let config = ServerConfig { aliases: vec!["org/alias".into()], ..ServerConfig::new(MODEL) };
    let fixture = start_with(config, engine_config(), Manner::default(), true);
    let list = fixture.get("/v1/models?limit=1000").await.json();
    assert_eq!(list["data"][0]["id"], MODEL);
    assert_eq!(list["data"][1]["max_model_len"], 512);
    let one = fixture.get("/v1/models/org/alias").await.json();
    assert_eq!(one["id"], "org/alias");
    let mut body = user("x");
    body["model"] = json!("org/alias");
    assert_eq!(fixture.post(CHAT, &body).await.json()["model"], "org/alias");
}

#[tokio::test]
async fn a_key_is_wanted_everywhere_but_at_the_probes() {
    let config = ServerConfig { api_keys: vec!["secret".into()], ..ServerConfig::new(MODEL) };
    let fixture = start_with(config, engine_config(), Manner::default(), true);
    assert_eq!(fixture.get("/v1/models").await.error().0, 401);
    assert_eq!(fixture.post(CHAT, &user("x")).await.error(), (401, String::new(), "invalid_api_key".into()));
    let with_key = Request::get("/v1/models").header("authorization", "Bearer secret").body(Body::empty());
    assert_eq!(fixture.send(with_key.unwrap()).await.status, 200);
    for probe in ["/health", "/ready", "/version", "/metrics"] {
        assert_eq!(fixture.get(probe).await.status, 200, "{probe}");
    }
    let preflight = Request::options(CHAT)
        .header("origin", "http://editor")
        .header("access-control-request-method", "POST")
        .body(Body::empty());
    let answer = fixture.send(preflight.unwrap()).await;
    assert_eq!(
        (answer.status.as_u16(), &answer.headers["access-control-allow-origin"]),
        (200, &"*".parse().unwrap())
    );
}

#[tokio::test]
async fn a_page_may_send_its_key() {
    let keyed = ServerConfig { api_keys: vec!["secret".into()], ..ServerConfig::new(MODEL) };
    for config in [keyed, ServerConfig::new(MODEL)] {
        let fixture = start_with(config, engine_config(), Manner::default(), true);
        let mut preflight = of_page(Method::OPTIONS, CHAT, "http://localhost:3000");
        let asked = "authorization,content-type";
        preflight.headers_mut().insert("access-control-request-headers", asked.parse().unwrap());
        let answer = fixture.send(preflight).await;
        let allowed = answer.headers["access-control-allow-headers"].to_str().unwrap();
        // A `*` would be all but `authorization`.
        assert!(
            allowed.split(',').any(|name| name.trim().eq_ignore_ascii_case("authorization")),
            "{allowed}"
        );
    }
}

/// A request of a page of this origin.
fn of_page(method: Method, path: &str, origin: &str) -> Request<Body> {
    let request = Request::builder().method(method).uri(path).header("host", "rudder.lan:8000");
    let request = request.header("origin", origin).header("access-control-request-method", "POST");
    request.body(Body::empty()).unwrap()
}

#[tokio::test]
async fn without_keys_a_page_from_elsewhere_gets_nothing() {
    let fixture = start();
    let elsewhere = "https://example.org";
    for path in ["/v1/sessions", "/v1/responses/resp_1/input_items", "/metrics", "/health", "/nothing"] {
        let answer = fixture.send(of_page(Method::GET, path, elsewhere)).await;
        assert_eq!(answer.error(), (403, String::new(), "origin_not_allowed".into()), "{path}");
        assert!(!answer.headers.contains_key("access-control-allow-origin"), "{path}");
    }
    let messages = fixture.send(of_page(Method::POST, "/v1/messages", elsewhere)).await.json();
    assert_eq!(messages["error"]["type"], "permission_error");
    assert!(messages["error"]["message"].as_str().unwrap().contains("`--api-key`"), "{messages}");
    let preflight = fixture.send(of_page(Method::OPTIONS, CHAT, elsewhere)).await;
    assert!(!preflight.headers.contains_key("access-control-allow-origin"));
}

#[tokio::test]
async fn without_keys_pages_of_this_machine_and_the_servers_own_are_answered() {
    let fixture = start();
    for origin in ["http://localhost:3000", "http://127.0.0.1:5173", "http://rudder.lan:8000"] {
        let answer = fixture.send(of_page(Method::GET, "/v1/models", origin)).await;
        assert_eq!(
            (answer.status.as_u16(), &answer.headers["access-control-allow-origin"]),
            (200, &origin.parse().unwrap())
        );
        let preflight = fixture.send(of_page(Method::OPTIONS, CHAT, origin)).await;
        assert_eq!(preflight.headers["access-control-allow-origin"], origin);
        assert!(preflight.headers.contains_key("access-control-allow-methods"));
    }
}

#[tokio::test]
async fn every_answer_carries_a_request_id() {
    let fixture = start();
    let named = Request::get("/health").header("x-request-id", "mine").body(Body::empty());
    assert_eq!(fixture.send(named.unwrap()).await.headers["x-request-id"], "mine");
    assert!(fixture.get("/nothing").await.headers["x-request-id"].to_str().unwrap().starts_with("req-"));
}

#[tokio::test]
async fn a_model_without_infill_tokens_says_so() {
    let fixture = start_with(ServerConfig::new(MODEL), engine_config(), Manner::default(), false);
    let body = json!({"prompt": "a", "suffix": "b"});
    assert_eq!(refused(&fixture, COMPLETIONS, &body).await, (400, "suffix".into(), String::new()));
    assert_eq!(refused(&fixture, "/infill", &json!({"input_prefix": "a"})).await.0, 400);
}

#[tokio::test]
async fn more_answers_at_once_than_there_can_be_places_are_400_with_the_limit() {
    let engine = EngineConfig { max_sequences: 1, max_waiting: 2, ..engine_config() };
    let fixture = start_with(ServerConfig::new(MODEL), engine, Manner::default(), true);
    for body in [json!({"prompt": "x", "n": 4}), json!({"prompt": ["x", "y"], "n": 2})] {
        let answer = fixture.post(COMPLETIONS, &body).await;
        assert_eq!(answer.error(), (400, String::new(), String::new()));
        assert!(answer.text().contains("at most 3"), "{}", answer.text());
    }
    assert_eq!(fixture.engine.stats().steps, 0);
    let all = json!({"prompt": ["x", "y", "z"], "max_tokens": 1});
    assert_eq!(fixture.post(COMPLETIONS, &all).await.status, 200);
}

#[tokio::test]
async fn a_full_queue_is_429_with_a_time_to_retry() {
    let engine = EngineConfig { max_sequences: 1, max_waiting: 2, ..engine_config() };
    let (manner, leash) = Manner::default().held(PACE);
    let fixture = start_with(ServerConfig::new(MODEL), engine, manner, true);
    let busy = fixture.clone();
    tokio::spawn(async move { busy.post(COMPLETIONS, &json!({"prompt": "x", "max_tokens": 50})).await });
    fixture.asked(1).await;
    let answer = fixture.post(COMPLETIONS, &json!({"prompt": "x", "n": 3})).await;
    assert_eq!(answer.error(), (429, String::new(), "rate_limit_exceeded".into()));
    assert!(answer.headers["retry-after"].to_str().unwrap().parse::<u64>().unwrap() >= 1);
    // The places of the two that were taken back come free once the step loop has heard of it.
    leash.let_go();
    let again = json!({"prompt": "x", "n": 3, "max_tokens": 1});
    let admitted = async || fixture.post(COMPLETIONS, &again).await.status == 200;
    eventually("the queue empties", admitted).await;
}

#[tokio::test]
async fn an_engines_fault_is_a_500_or_an_error_event_and_passes() {
    let manner = Manner::default();
    let failing = manner.failing.clone();
    let fixture = start_in(manner);
    failing.store(true, Ordering::SeqCst);
    assert_eq!(fixture.post(CHAT, &user("x")).await.error().0, 500);
    let mut streamed = user("x");
    streamed["stream"] = json!(true);
    let (events, done) = fixture.post(CHAT, &streamed).await.events();
    assert!(!done && events.len() == 2, "{events:?}");
    assert_eq!(events[1]["error"]["type"], "server_error");
    failing.store(false, Ordering::SeqCst);
    assert_eq!(fixture.post(CHAT, &user("x")).await.status, 200);
    fixture.idle().await;
}

#[tokio::test]
async fn a_tool_whose_calls_could_not_be_read_back_is_refused_in_every_dialect() {
    let fixture = start();
    let ask = |tool: Value| json!({"messages": [{"role": "user", "content": "x"}], "input": "x", "max_tokens": 1, "tools": [tool]});
    for (name, good) in
        [("a\"b", false), ("a b", false), ("", false), (&*"a".repeat(129), false), ("mcp__a:b/c.d-e", true)]
    {
        let function = json!({"type": "function", "function": {"name": name}});
        let custom = json!({"type": "custom", "custom": {"name": name}});
        let schema = json!({"name": name, "input_schema": {"type": "object"}});
        for (path, tool) in [
            (CHAT, function),
            (CHAT, custom),
            ("/v1/responses", json!({"type": "function", "name": name})),
            ("/v1/responses", json!({"type": "custom", "name": name})),
            ("/v1/messages", schema),
        ] {
            let answer = fixture.post(path, &ask(tool.clone())).await;
            assert_eq!(answer.status, if good { 200 } else { 400 }, "{path} {tool}: {}", answer.text());
            assert!(good || answer.text().contains("A tool's name must be"), "{}", answer.text());
        }
    }
}

/// JSON of no particular sense, but often with fields that mean something.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-3i64..70).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "\\PC{0,6}".prop_map(Value::from),
        Just(json!("user")),
        Just(json!("<|im_end|>")),
        prop::sample::select(vec![
            "message",
            "function_call",
            "function_call_output",
            "reasoning",
            "function",
            "custom",
            "json_schema",
            "grammar",
            "auto",
            "required",
            "object",
            "{}"
        ])
        .prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::hash_map(field(), inner, 0..4).prop_map(|map| json!(map)),
        ]
    })
}

fn field() -> impl Strategy<Value = String> {
    let known = [
        "messages",
        "prompt",
        "role",
        "content",
        "type",
        "text",
        "max_tokens",
        "n",
        "stop",
        "stream",
        "suffix",
        "echo",
        "logprobs",
        "top_logprobs",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "logit_bias",
        "tools",
        "tool_calls",
        "function",
        "arguments",
        "stop_token_ids",
        "tokens",
        "n_predict",
        "input_prefix",
        "input_suffix",
        "input_extra",
        "ignore_eos",
        "chat_template_kwargs",
        "stream_options",
        "with_pieces",
        "repetition_penalty",
        "tool_choice",
        "parallel_tool_calls",
        "response_format",
        "structured_outputs",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "return_token_ids",
        "reasoning_effort",
        "input",
        "instructions",
        "text",
        "reasoning",
        "include",
        "metadata",
        "truncation",
        "previous_response_id",
        "conversation",
        "store",
        "role",
        "type",
        "name",
        "parameters",
        "call_id",
        "output",
        "summary",
        "encrypted_content",
    ];
    prop::sample::select(known.to_vec()).prop_map(str::to_owned)
}

#[test]
fn whatever_json_comes_is_answered_or_refused() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let fixture = start();
    let paths = [CHAT, COMPLETIONS, "/infill", "/tokenize", "/detokenize", "/v1/responses"];
    let valid = json!({"messages": [{"role": "user", "content": "x"}], "prompt": "x", "tokens": [1], "max_tokens": 3,
        "n_predict": 3, "input_prefix": "x", "input": "x", "max_output_tokens": 16});
    let fields = prop::collection::hash_map(field(), any_json(), 0..5);
    let request = (prop::sample::select(paths.to_vec()), any::<bool>(), fields);
    proptest!(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() },
        |((path, sound, fields) in request)| {
        let mut body = if sound { valid.clone() } else { json!({}) };
        body.as_object_mut().unwrap().extend(fields);
        let answer = runtime.block_on(fixture.post(path, &body));
        let status = answer.status.as_u16();
        // 404: an earlier response or a conversation that is none.
        prop_assert!(matches!(status, 200 | 400 | 404), "{path} {body}: {status} {}", answer.text());
        if status == 400 {
            answer.error();
        }
    });
    runtime.block_on(fixture.idle());
}
