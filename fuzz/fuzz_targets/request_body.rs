//! Any bytes as the body of any request: the answer is a success or a refusal in the dialect's own shape.
//!
//! A panic on any thread, the engine's too, ends the run: libFuzzer's hook aborts.
#![no_main]

use std::sync::LazyLock;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use rudder_engine::EngineConfig;
use rudder_server::ServerConfig;
use serde_json::Value;
use tokio::runtime::Runtime;

#[allow(dead_code)]
#[path = "../../crates/server/tests/front/common.rs"]
mod common;
use common::{Answer, Fixture, MODEL, Manner};

/// Where bodies go; the first byte chooses. New ones go to the end, for the seeds name these by number.
const PATHS: [&str; 13] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/infill",
    "/tokenize",
    "/detokenize",
    "/v1/responses/input_tokens",
    "/v1/responses/compact",
    "/v1/conversations",
    "/v1/conversations/conv_0/items",
    "/v1/responses/resp_0/steer",
];
/// An answer that takes longer is one that never comes.
const PATIENCE: Duration = Duration::from_secs(20);

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
});
static FIXTURE: LazyLock<Fixture> = LazyLock::new(|| {
    let _guard = RUNTIME.enter();
    // Answers end soon, so that a run sees many requests.
    let engine = EngineConfig { max_context: 160, ..common::engine_config() };
    let manner = Manner { end_at: Some(96), ..Manner::default() };
    common::start_with(ServerConfig::new(MODEL), engine, manner, true)
});

fuzz_target!(|data: &[u8]| {
    let [choice, body @ ..] = data else { return };
    let path = PATHS[usize::from(*choice) % PATHS.len()];
    let answer = async { tokio::time::timeout(PATIENCE, FIXTURE.post_bytes(path, body.to_vec())).await };
    let answer = RUNTIME.block_on(answer).expect("an answer in time");
    match answer.status.as_u16() {
        200..300 => {}
        400..500 | 503 => refusal(path, &answer),
        status => panic!("{path}: {status} {}", answer.text()),
    }
});

/// Checks that an error reads as its dialect's clients expect.
fn refusal(path: &str, answer: &Answer) {
    let body: Value = serde_json::from_slice(&answer.body).expect("an error is JSON");
    let error = &body["error"];
    assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{path}: {body}");
    assert!(error["type"].is_string(), "{path}: {body}");
    if path.starts_with("/v1/messages") {
        assert_eq!(body["type"], "error", "{path}: {body}");
    } else {
        assert!(error.get("param").is_some() && error.get("code").is_some(), "{path}: {body}");
    }
}
