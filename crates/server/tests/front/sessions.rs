//! Sessions: who has them, what is told of them, what forks and pauses find again.

use axum::body::Body;
use axum::http::{Method, Request};
use rudder_engine::EngineConfig;
use rudder_server::ServerConfig;
use serde_json::{Value, json};

use crate::common::{Answer, Fixture, MODEL, Manner, PACE, engine_config, eventually, saying, start_with};
use crate::sockets::listen;

const SESSIONS: &str = "/v1/sessions";

fn manner() -> Manner {
    saying(&["done, and said at length, so that it takes a while"])
}

/// A server with room for `blocks` blocks of 16 tokens, let in by these keys.
fn start(keys: &[&str], blocks: usize, manner: Manner) -> Fixture {
    let config = ServerConfig {
        api_keys: keys.iter().map(|&key| key.to_owned()).collect(),
        ..ServerConfig::new(MODEL)
    };
    let engine = EngineConfig { kv_blocks: blocks, max_context: 4096, ..engine_config() };
    start_with(config, engine, manner, true)
}

fn small() -> Fixture {
    start(&[], 512, manner())
}

async fn call(server: &Fixture, method: Method, path: &str, key: &str) -> Answer {
    let request = Request::builder().method(method).uri(path).header("x-api-key", key);
    server.send(request.body(Body::empty()).unwrap()).await
}

/// Sends one message with these fields and this header; returns how many of its tokens were cached.
async fn say(server: &Fixture, text: &str, more: Value, header: (&'static str, &str)) -> u64 {
    let mut body = json!({"model": MODEL, "messages": [{"role": "user", "content": text}], "temperature": 0,
        "max_tokens": 4});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let request = Request::post("/v1/chat/completions").header(header.0, header.1);
    let answer = server.send(request.body(Body::from(body.to_string())).unwrap()).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
}

async fn turn(server: &Fixture, text: &str, session: &str) -> u64 {
    say(server, text, json!({"prompt_cache_key": session}), ("x-api-key", "")).await
}

async fn one_shot(server: &Fixture, text: &str) -> u64 {
    say(server, text, json!({}), ("x-api-key", "")).await
}

async fn list(server: &Fixture, key: &str) -> Vec<Value> {
    let answer = call(server, Method::GET, SESSIONS, key).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.json()["object"], "list");
    answer.json()["data"].as_array().unwrap().clone()
}

async fn ids(server: &Fixture, key: &str) -> Vec<String> {
    list(server, key).await.iter().map(|session| session["id"].as_str().unwrap().to_owned()).collect()
}

async fn session(server: &Fixture, id: &str) -> Value {
    let answer = call(server, Method::GET, &format!("{SESSIONS}/{id}"), "").await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

#[tokio::test]
async fn a_session_tells_what_is_kept_of_it() {
    let server = small();
    assert_eq!(ids(&server, "").await, [""; 0]);
    turn(&server, &"a".repeat(200), "work").await;
    let told = session(&server, "work").await;
    let fields = [
        ("object", json!("session")),
        ("state", json!("kept")),
        ("pinned", json!(false)),
        ("turns", json!(1)),
    ];
    for (field, value) in fields {
        assert_eq!(told[field], value, "{field} of {told}");
    }
    let tokens = told["tokens"].as_u64().unwrap();
    assert!(tokens > 200, "{told}");
    let cached = told["cached_tokens"]["device"].as_u64().unwrap();
    assert!(cached <= tokens && tokens - cached <= 17, "{told}");
    assert_eq!(told["cached_tokens"]["disk"], Value::Null, "there is no disk");
    assert!(told["kept_for_seconds"].as_u64().unwrap() > 0, "{told}");
    assert!(told["created_at"].as_u64() <= told["last_used_at"].as_u64(), "{told}");
    assert_eq!(list(&server, "").await.len(), 1);
}

#[tokio::test]
async fn whatever_names_a_session_makes_one() {
    let server = small();
    turn(&server, "by key", "a/b c").await;
    for (header, id) in
        [("session_id", "codex"), ("x-session-id", "opencode"), ("x-claude-code-session-id", "claude")]
    {
        say(&server, id, json!({}), (header, id)).await;
    }
    let body = json!({"input": "begins a chain", "temperature": 0});
    let first = server.post("/v1/responses", &body).await.json()["id"].as_str().unwrap().to_owned();
    let body = json!({"input": "goes on", "previous_response_id": first, "temperature": 0});
    assert_eq!(server.post("/v1/responses", &body).await.status, 200);
    let mut ids = ids(&server, "").await;
    ids.sort();
    let mut wanted =
        vec!["a/b c".to_owned(), "claude".into(), "codex".into(), "opencode".into(), first.clone()];
    wanted.sort();
    assert_eq!(ids, wanted);
    assert_eq!(session(&server, &first).await["turns"], 2, "a chain of responses is a session");
    assert_eq!(session(&server, "a%2Fb%20c").await["id"], "a/b c");
}

#[tokio::test]
async fn the_lane_of_a_websocket_is_a_session() {
    let server = listen(small()).await;
    let mut socket = server.connect().await;
    for input in ["one", "two"] {
        socket.create(json!({"input": input})).await;
        socket.response().await;
    }
    let sessions = list(&server.fixture, "").await;
    assert_eq!((sessions.len(), &sessions[0]["turns"]), (1, &json!(2)), "{sessions:?}");
}

#[tokio::test]
async fn a_conversation_that_nothing_names_is_found_by_its_prefix() {
    let server = small();
    let begin = "x".repeat(100);
    one_shot(&server, &begin).await;
    one_shot(&server, &"y".repeat(100)).await;
    assert_eq!(ids(&server, "").await, [""; 0], "most requests never return");
    let message = |role: &str, content: &str| json!({"role": role, "content": content});
    let turns = json!({"messages": [message("user", &begin), message("assistant", "done"), message("user", "go on")]});
    assert!(say(&server, "", turns, ("x-api-key", "")).await >= 96);
    let sessions = list(&server, "").await;
    assert_eq!(sessions.len(), 1);
    assert_eq!((&sessions[0]["turns"], &sessions[0]["state"]), (&json!(2), &json!("kept")));
}

#[tokio::test]
async fn a_session_outlasts_a_flood_of_other_prompts() {
    let server = start(&[], 128, manner());
    let conversation = "s".repeat(600);
    turn(&server, &conversation, "mine").await;
    one_shot(&server, &"o".repeat(600)).await;
    for number in 0..20 {
        one_shot(&server, &format!("{number} {}", "f".repeat(400))).await;
    }
    assert_eq!(one_shot(&server, &"o".repeat(600)).await, 0, "what nobody keeps has gone");
    assert!(turn(&server, &(conversation + " and on"), "mine").await >= 592);
    // An answer is out a moment before the metrics are.
    let mut metrics = String::new();
    let counted = async || {
        metrics = server.get("/metrics").await.text();
        metrics.contains("rudder_sessions{model_name=\"tiny\",state=\"kept\"} 1")
    };
    eventually("the session is counted", counted).await;
    assert!(metrics.contains("rudder_kv_evicted_blocks_total{model_name=\"tiny\",protected=\"true\"} 0"));
}

#[tokio::test]
async fn forks_find_what_they_share() {
    let server = small();
    let common = "c".repeat(320);
    assert_eq!(turn(&server, &common, "parent").await, 0);
    let fork = |task: &str| format!("{common}{task}");
    for child in ["child-1", "child-2"] {
        assert!(turn(&server, &fork(child), child).await >= 320, "a subagent begins where its parent is");
    }
    let body = json!({"prompt_cache_key": "parent", "n": 3});
    assert!(say(&server, &fork("choices"), body, ("x-api-key", "")).await >= 320);
    assert!(turn(&server, &fork("choices"), "parent").await >= 320, "a retry");
    let before = server.idle().await.kv_blocks_cached;
    assert!(before < 512 / 4, "{before} blocks: what is shared is there once");
    assert_eq!(call(&server, Method::DELETE, &format!("{SESSIONS}/child-1"), "").await.status, 200);
    assert!(
        turn(&server, &fork("child-2"), "child-2").await >= 320,
        "forks do not take along what others need"
    );
}

#[tokio::test]
async fn a_deleted_session_is_forgotten_and_its_blocks_are_free() {
    let server = small();
    turn(&server, &"d".repeat(300), "gone").await;
    let path = format!("{SESSIONS}/gone");
    let deleted = call(&server, Method::DELETE, &path, "").await.json();
    assert_eq!(deleted, json!({"id": "gone", "object": "session", "deleted": true}));
    eventually("nothing is cached", async || server.idle().await.kv_blocks_cached == 0).await;
    for method in [Method::GET, Method::DELETE] {
        assert_eq!(call(&server, method, &path, "").await.error().0, 404);
    }
    assert_eq!(turn(&server, &"d".repeat(300), "gone").await, 0);
}

#[tokio::test]
async fn deleting_a_session_lets_its_turn_end() {
    let (manner, leash) = manner().held(PACE);
    let server = start(&[], 512, manner);
    let running =
        say(&server, "a long one", json!({"prompt_cache_key": "busy", "max_tokens": 40}), ("x-api-key", ""));
    let delete = async {
        server.asked(1).await;
        assert_eq!(session(&server, "busy").await["state"], "running");
        call(&server, Method::DELETE, &format!("{SESSIONS}/busy"), "").await.status
    };
    let deleted = async {
        // Sessions are looked at between steps.
        let status = leash.stepping(delete).await;
        leash.let_go();
        status
    };
    let (_, status) = tokio::join!(running, deleted);
    assert_eq!(status, 200);
    assert_eq!(ids(&server, "").await, [""; 0]);
    server.idle().await;
}

#[tokio::test]
async fn a_pinned_session_is_kept_until_it_is_unpinned() {
    let server = small();
    turn(&server, "keep me", "p").await;
    for _ in 0..2 {
        let told = call(&server, Method::POST, &format!("{SESSIONS}/p/pin"), "").await.json();
        assert_eq!(
            (&told["pinned"], &told["state"], &told["kept_for_seconds"]),
            (&json!(true), &json!("kept"), &Value::Null)
        );
    }
    let told = call(&server, Method::POST, &format!("{SESSIONS}/p/unpin"), "").await.json();
    assert_eq!(told["pinned"], false);
    assert!(told["kept_for_seconds"].is_u64(), "{told}");
    assert_eq!(call(&server, Method::POST, &format!("{SESSIONS}/other/pin"), "").await.error().0, 404);
    assert_eq!(call(&server, Method::GET, &format!("{SESSIONS}/p/pin"), "").await.error().0, 405);
}

#[tokio::test]
async fn a_key_sees_only_its_own_sessions() {
    let server = start(&["mine", "yours"], 512, manner());
    for key in ["mine", "yours"] {
        say(&server, "hello", json!({"prompt_cache_key": "same"}), ("x-api-key", key)).await;
    }
    say(&server, "hello", json!({"prompt_cache_key": "secret"}), ("x-api-key", "mine")).await;
    assert_eq!(ids(&server, "yours").await, ["same"]);
    assert_eq!(ids(&server, "mine").await.len(), 2);
    let secret = format!("{SESSIONS}/secret");
    for (method, path) in [
        (Method::GET, secret.clone()),
        (Method::DELETE, secret.clone()),
        (Method::POST, format!("{secret}/pin")),
        (Method::POST, format!("{secret}/unpin")),
    ] {
        assert_eq!(call(&server, method, &path, "yours").await.error().0, 404, "{path}");
    }
    assert_eq!(call(&server, Method::DELETE, &format!("{SESSIONS}/same"), "yours").await.status, 200);
    assert_eq!(ids(&server, "mine").await.len(), 2);
    assert_eq!(call(&server, Method::GET, SESSIONS, "").await.error().0, 401);
}
