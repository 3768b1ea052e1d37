//! Answers and calls that are held to a grammar, whatever the model would rather say.

use rudder_server::{ForcedCall, ServerConfig};
use serde_json::{Value, json};

use crate::common::{Fixture, MODEL, start_caller};

fn start(answer: &str) -> Fixture {
    start_caller(ServerConfig::new(MODEL), answer)
}

const CHAT: &str = "/v1/chat/completions";

fn ask(fields: Value) -> Value {
    let mut body =
        json!({"messages": [{"role": "user", "content": "go"}], "temperature": 0, "max_tokens": 200});
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}

fn tool(name: &str, strict: bool) -> Value {
    let parameters = json!({"type": "object", "properties": {"n": {"type": "integer", "minimum": 3, "maximum": 9}},
        "required": ["n"], "additionalProperties": false});
    json!({"type": "function", "function": {"name": name, "parameters": parameters, "strict": strict}})
}

async fn choice(server: &Fixture, fields: Value) -> Value {
    let answer = server.post(CHAT, &ask(fields)).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()["choices"][0].clone()
}

/// The one call of an answer: its name and its arguments as they parse.
fn call(choice: &Value) -> (String, Value) {
    let function = &choice["message"]["tool_calls"][0]["function"];
    let arguments = function["arguments"].as_str().unwrap_or_else(|| panic!("{choice}"));
    (function["name"].as_str().unwrap().into(), serde_json::from_str(arguments).expect(arguments))
}

#[tokio::test]
async fn an_answer_parses_against_its_schema() {
    let server = start("I would rather talk.");
    let schema = json!({"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
        "additionalProperties": false});
    let format =
        json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": true}});
    let choice = choice(&server, json!({"response_format": format})).await;
    let content: Value = serde_json::from_str(choice["message"]["content"].as_str().unwrap()).unwrap();
    assert!(content["ok"].is_boolean(), "{choice}");
    assert_eq!(choice["finish_reason"], "stop");
    server.idle().await;
}

#[tokio::test]
async fn choices_and_expressions_hold_as_vllms_clients_send_them() {
    let server = start("maybe");
    let one = choice(&server, json!({"structured_outputs": {"choice": ["yes", "no"]}})).await;
    assert!(["yes", "no"].contains(&one["message"]["content"].as_str().unwrap()), "{one}");
    let other = choice(&server, json!({"guided_regex": "m[aeiou]y[0-9]{2}"})).await;
    let said = other["message"]["content"].as_str().unwrap();
    assert!(said.starts_with("may") && said.len() == 5, "{said}");
}

/// A request without messages, of which an answer is held to this.
fn with(input: &str, format: &Value) -> Value {
    let mut body = json!({input: "go", "temperature": 0});
    body.as_object_mut().unwrap().extend(format.as_object().unwrap().clone());
    body
}

#[tokio::test]
async fn completions_and_responses_are_held_to_the_same_fields() {
    let server = start("maybe");
    let formats = [
        json!({"structured_outputs": {"choice": ["yes", "no"]}}),
        json!({"guided_choice": ["yes", "no"]}),
        json!({"guided_regex": "yes|no"}),
        json!({"guided_grammar": "start: \"yes\" | \"no\""}),
        json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["yes", "no"]}}}}),
    ];
    for format in formats {
        let completion = server.post("/v1/completions", &with("prompt", &format)).await.json();
        let response = server.post("/v1/responses", &with("input", &format)).await.json();
        for said in [&completion["choices"][0]["text"], &response["output"][0]["content"][0]["text"]] {
            let said = said.as_str().unwrap_or_else(|| panic!("{completion} {response}"));
            assert!(["yes", "no"].contains(&said.trim_matches('"')), "{format}: {said}");
        }
    }
}

#[tokio::test]
async fn completions_and_responses_refuse_what_cannot_be_held() {
    let server = start("x");
    for (path, format, param) in [
        ("/v1/completions", json!({"guided_regex": "("}), "response_format"),
        ("/v1/completions", json!({"guided_regex": "a", "guided_choice": ["a"]}), "structured_outputs"),
        ("/v1/responses", json!({"guided_regex": "("}), "response_format"),
        ("/v1/responses", json!({"guided_choice": []}), "structured_outputs"),
        (
            "/v1/responses",
            json!({"guided_regex": "a", "text": {"format": {"type": "json_object"}}}),
            "text.format",
        ),
    ] {
        let input = if path == "/v1/completions" { "prompt" } else { "input" };
        let (status, at, _) = server.post(path, &with(input, &format)).await.error();
        assert_eq!((status, at.as_str()), (400, param), "{path} {format}");
    }
}

#[tokio::test]
async fn a_call_that_is_required_is_made_and_fits_its_schema() {
    let server = start("No calls today.");
    for chosen in [json!("required"), json!({"type": "function", "function": {"name": "b"}})] {
        let fields = json!({"tools": [tool("a", false), tool("b", false)], "tool_choice": chosen,
            "parallel_tool_calls": false});
        let choice = choice(&server, fields).await;
        let (name, arguments) = call(&choice);
        assert!(chosen.is_string() || name == "b", "{choice}");
        assert!((3..=9).contains(&arguments["n"].as_i64().unwrap()), "{choice}");
        assert_eq!(choice["finish_reason"], "tool_calls");
    }
}

#[tokio::test]
async fn a_strict_tool_is_held_even_where_the_model_is_free() {
    let server = start("So:\n<tool_call>\n{\"name\": \"a\", \"arguments\": {\"n\": 70}}\n</tool_call>");
    let choice = choice(&server, json!({"tools": [tool("a", true)], "parallel_tool_calls": false})).await;
    assert_eq!(choice["message"]["content"], "So:");
    assert!((3..=9).contains(&call(&choice).1["n"].as_i64().unwrap()), "{choice}");
}

#[tokio::test]
async fn a_tool_that_is_not_among_the_allowed_is_not_called() {
    let server = start("So:\n<tool_call>\n{\"name\": \"a\", \"arguments\": {\"n\": 4}}\n</tool_call>");
    let allowed = json!({"mode": "auto", "tools": [{"type": "function", "function": {"name": "b"}}]});
    for (chosen, called) in
        [(json!("auto"), "a"), (json!({"type": "allowed_tools", "allowed_tools": allowed}), "b")]
    {
        let fields = json!({"tools": [tool("a", false), tool("b", false)], "tool_choice": chosen,
            "parallel_tool_calls": false});
        let choice = choice(&server, fields).await;
        assert_eq!(choice["message"]["content"], "So:");
        assert_eq!(choice["message"]["tool_calls"][0]["function"]["name"], called, "{choice}");
    }
}

#[tokio::test]
async fn a_grammar_that_cannot_be_used_is_a_400_that_says_so() {
    let server = start("x");
    for (fields, param) in [
        (json!({"guided_regex": "("}), "response_format"),
        (json!({"guided_grammar": "start: nowhere"}), "response_format"),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "cat"}}}}),
            "response_format",
        ),
    ] {
        let answer = server.post(CHAT, &ask(fields.clone())).await;
        assert_eq!(answer.error().0, 400, "{fields}");
        assert_eq!(answer.error().1, param);
    }
    server.idle().await;
}

#[tokio::test]
async fn a_forced_call_is_made_where_it_is_offered_and_only_before_its_result() {
    let arguments = json!({"n": 4});
    let forced = ForcedCall { name: "b".into(), arguments: Some(arguments.clone()), input: None };
    let config = ServerConfig { forced_calls: vec![forced], ..ServerConfig::new(MODEL) };
    let server = start_caller(config, "I would rather talk.");
    let tools = json!([tool("a", false), tool("b", false)]);
    let made = choice(&server, json!({"tools": tools})).await;
    assert_eq!(call(&made), ("b".into(), arguments));
    let id = made["message"]["tool_calls"][0]["id"].clone();
    let messages = json!([{"role": "user", "content": "go"}, made["message"],
        {"role": "tool", "tool_call_id": id, "content": "done"}]);
    let after = choice(&server, json!({"tools": tools, "messages": messages})).await;
    assert!(after["message"].get("tool_calls").is_none() && after["finish_reason"] == "stop", "{after}");
    let elsewhere = choice(&server, json!({"tools": [tool("a", false)]})).await;
    assert!(elsewhere["message"].get("tool_calls").is_none(), "{elsewhere}");
}
