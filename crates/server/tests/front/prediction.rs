//! Predicted outputs: what is right of them comes several tokens a step, and no answer changes.

use std::time::Duration;

use crate::common::{Fixture, MODEL, Manner, engine_config, start, start_with};
use rudder_engine::{DraftMode, EngineConfig};
use rudder_server::ServerConfig;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";

fn drafting() -> Fixture {
    let engine = EngineConfig { draft: DraftMode::Lookup, ..engine_config() };
    let manner = Manner { step: Duration::from_millis(2), ..Manner::default() };
    start_with(ServerConfig::new(MODEL), engine, manner, true)
}

fn predicting(content: Value) -> Value {
    json!({
        "messages": [{"role": "user", "content": "go"}], "max_tokens": 120, "temperature": 0,
        "prediction": {"type": "content", "content": content},
    })
}

async fn said(fixture: &Fixture, body: &Value) -> (String, u64, u64) {
    let answer = fixture.post(CHAT, body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let answer = answer.json();
    let details = &answer["usage"]["completion_tokens_details"];
    let count = |name: &str| details[name].as_u64().unwrap();
    let text = answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    (text, count("accepted_prediction_tokens"), count("rejected_prediction_tokens"))
}

#[tokio::test]
async fn what_is_right_of_a_prediction_is_counted_and_comes_in_fewer_steps() {
    // One step that the machine delays makes drafts look dear to an engine for good.
    let mut tries = 0;
    let (fixture, after) = loop {
        let fixture = drafting();
        let (text, accepted, rejected) = said(&fixture, &predicting(json!(""))).await;
        assert_eq!((accepted, rejected), (0, 0));
        let before = fixture.idle().await;
        assert_eq!(said(&fixture, &predicting(json!(text))).await, (text.clone(), 120, 0));
        let after = fixture.idle().await;
        let steps = after.steps - before.steps;
        if steps < 110 {
            break (fixture, after);
        }
        tries += 1;
        assert!(tries < 10, "{steps} steps");
    };
    let metrics = fixture.get("/metrics").await.text();
    let counted = |name: &str| {
        let of = |line: &&str| line.starts_with(&format!("rudder_{name}"));
        metrics.lines().filter(of).map(|l| l.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum::<f64>()
    };
    assert_eq!(counted("spec_decode_num_drafts_total"), after.drafts as f64);
    assert_eq!(counted("spec_decode_num_draft_tokens_total"), after.drafted_tokens as f64);
    let accepted = counted("spec_decode_num_accepted_tokens_total");
    assert!(accepted > 10.0);
    assert_eq!(counted("spec_decode_num_accepted_tokens_per_pos_total"), accepted);
}

#[tokio::test]
async fn a_wrong_prediction_changes_nothing() {
    let fixture = drafting();
    let (text, ..) = said(&fixture, &predicting(json!(""))).await;
    let (before, after) = text.split_at(text.find("main").unwrap());
    let parts = json!([{"type": "text", "text": before}, {"type": "text", "text": "XYZ"}, {"type": "text", "text": after}]);
    let (answer, accepted, rejected) = said(&fixture, &predicting(parts)).await;
    assert_eq!(answer, text);
    assert!(accepted >= 100 && rejected >= 3, "{accepted} accepted, {rejected} rejected");
    let (answer, accepted, _) = said(&fixture, &predicting(json!("#".repeat(5000)))).await;
    assert_eq!((answer, accepted), (text, 0), "longer than the context");
}

#[tokio::test]
async fn what_is_wrong_with_a_prediction_is_named() {
    let fixture = start();
    for (prediction, param) in [
        (json!("text"), "prediction"),
        (json!({"type": "content"}), "prediction"),
        (json!({"type": "guess", "content": "x"}), "prediction.type"),
        (json!({"type": "content", "content": 3}), "prediction.content"),
        (json!({"type": "content", "content": [{"type": "image", "text": "x"}]}), "prediction.content[0]"),
        (json!({"type": "content", "content": [{"type": "text"}]}), "prediction.content[0]"),
    ] {
        let mut body = predicting(json!("x"));
        body["prediction"] = prediction.clone();
        let (status, at, _) = fixture.post(CHAT, &body).await.error();
        assert_eq!((status, at.as_str()), (400, param), "{prediction}");
    }
    let mut body = predicting(json!("x"));
    body["prediction"] = Value::Null;
    assert_eq!(fixture.post(CHAT, &body).await.status, 200);
}
