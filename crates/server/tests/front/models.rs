//! What `/v1/models` tells each kind of client.

use axum::body::Body;
use axum::http::Request;
use rudder_server::ServerConfig;
use serde_json::{Value, json};

use crate::common::{Fixture, MODEL, Manner, engine_config, start_agent, start_with};

fn aliased() -> Fixture {
    let aliases = vec!["claude-sonnet".into(), "org/alias".into(), "claude-*".into()];
    let config = ServerConfig { aliases, ..ServerConfig::new(MODEL) };
    start_with(config, engine_config(), Manner::default(), true)
}

fn ids(list: &Value, key: &str) -> Vec<String> {
    list.as_array().unwrap().iter().map(|model| model[key].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn every_name_is_listed_for_all_clients_and_patterns_are_not() {
    let list = aliased().get("/v1/models?limit=1000").await.json();
    assert_eq!(ids(&list["data"], "id"), [MODEL, "claude-sonnet", "org/alias"]);
    assert_eq!(ids(&list["models"], "slug"), ids(&list["data"], "id"));
    assert_eq!(list["object"], "list");
    assert_eq!(
        (&list["first_id"], &list["last_id"], &list["has_more"]),
        (&json!(MODEL), &json!("org/alias"), &json!(false))
    );
}

#[tokio::test]
async fn a_model_has_the_keys_of_openai_and_of_anthropic() {
    let server = aliased();
    let list = server.get("/v1/models").await.json();
    let one = server.get("/v1/models/org/alias").await.json();
    assert_eq!(list["data"][2], one);
    let fixed = json!({"id": "org/alias", "object": "model", "root": MODEL, "max_model_len": 512, "context_length": 512,
        "type": "model", "display_name": "org/alias", "lifecycle": "active", "max_input_tokens": 512, "max_tokens": 512});
    for (key, value) in fixed.as_object().unwrap() {
        assert_eq!(one.get(key), Some(value), "{key}");
    }
    let created_at = one["created_at"].as_str().unwrap();
    assert!(
        created_at.starts_with("20") && created_at.ends_with('Z') && created_at.contains('T'),
        "{created_at}"
    );
    assert_eq!(server.get("/v1/models/claude-haiku").await.json()["id"], "claude-haiku");
}

#[tokio::test]
async fn capabilities_are_those_of_the_model() {
    let supported = |model: &Value, name: &str| model["capabilities"][name]["supported"].as_bool().unwrap();
    let plain = aliased().get("/v1/models/tiny").await.json();
    let agent = start_agent(&["ok"]).get("/v1/models/tiny").await.json();
    for name in ["tools", "thinking"] {
        assert!(supported(&agent, name) && !supported(&plain, name), "{name}");
    }
    assert!(supported(&agent, "infill") && supported(&plain, "structured_outputs"));
    assert!(!supported(&agent, "image_input"));
}

#[tokio::test]
async fn codex_finds_every_key_that_it_requires() {
    let list = start_agent(&["ok"]).get("/v1/models?client_version=0.169.0").await.json();
    let entry = &list["models"][0];
    for (key, fits) in [
        ("slug", entry["slug"] == MODEL),
        ("display_name", entry["display_name"].is_string()),
        ("supported_reasoning_levels", entry["supported_reasoning_levels"][0]["effort"] == "low"),
        ("shell_type", entry["shell_type"].is_string()),
        ("visibility", entry["visibility"] == "list"),
        ("supported_in_api", entry["supported_in_api"] == true),
        ("priority", entry["priority"].is_u64()),
        ("support_verbosity", entry["support_verbosity"].is_boolean()),
        ("truncation_policy", entry["truncation_policy"] == json!({"mode": "tokens", "limit": 512})),
        ("experimental_supported_tools", entry["experimental_supported_tools"] == json!([])),
        (
            "base_instructions",
            entry["base_instructions"].as_str().is_some_and(|text| text.contains("apply_patch")),
        ),
        ("context_window", entry["context_window"] == 4096),
        ("use_responses_lite", entry["use_responses_lite"] == true),
    ] {
        assert!(fits, "{key}: {entry}");
    }
}

/// A client of Anthropic's may ask for models too: its errors are in its shape wherever it goes.
#[tokio::test]
async fn an_unknown_model_is_refused_in_the_askers_shape() {
    let server = aliased();
    let asked = |version: bool| {
        let request = Request::get("/v1/models/gpt-9");
        let request = if version { request.header("anthropic-version", "2023-06-01") } else { request };
        server.send(request.body(Body::empty()).unwrap())
    };
    assert_eq!(asked(false).await.error(), (404, "model".into(), "model_not_found".into()));
    let answer = asked(true).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["error"]["type"]), (404, &json!("not_found_error")));
}
