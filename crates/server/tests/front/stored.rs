//! Responses and conversations that outlive their request, their connection and the process.

use std::path::Path;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Method, Request};
use rudder_engine::EngineConfig;
use rudder_server::{ServerConfig, StoreConfig};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::common::{Answer, Fixture, MODEL, Manner, PACE, engine_config, eventually, saying, start_with};

const RESPONSES: &str = "/v1/responses";
const CONVERSATIONS: &str = "/v1/conversations";

fn start_at(folder: Option<&Path>, keys: &[&str], manner: Manner) -> Fixture {
    let config = ServerConfig {
        api_keys: keys.iter().map(|&key| key.to_owned()).collect(),
        store: StoreConfig { folder: folder.map(Into::into), ..StoreConfig::default() },
        keep_alive: Duration::from_millis(200),
        ..ServerConfig::new(MODEL)
    };
    start_with(config, EngineConfig { max_context: 4096, ..engine_config() }, manner, true)
}

fn start(answers: &[&str]) -> Fixture {
    start_at(None, &[], saying(answers))
}

fn ask(input: &str, further: Value) -> Value {
    let mut body = json!({"model": MODEL, "input": input, "temperature": 0});
    body.as_object_mut().unwrap().extend(further.as_object().unwrap().clone());
    body
}

async fn call(server: &Fixture, method: Method, path: &str, key: &str) -> Answer {
    let request = Request::builder().method(method).uri(path).header("x-api-key", key);
    server.send(request.body(Body::empty()).unwrap()).await
}

async fn posted(server: &Fixture, path: &str, body: Value) -> Value {
    let answer = server.post(path, &body).await;
    assert_eq!(answer.status, 200, "{path}: {}", answer.text());
    answer.json()
}

async fn got(server: &Fixture, path: &str) -> Value {
    let answer = server.get(path).await;
    assert_eq!(answer.status, 200, "{path}: {}", answer.text());
    answer.json()
}

fn id(object: &Value) -> &str {
    object["id"].as_str().unwrap_or_else(|| panic!("no id in {object}"))
}

fn said(response: &Value) -> &str {
    response["output"][0]["content"][0]["text"].as_str().unwrap_or_else(|| panic!("{response}"))
}

/// The texts of a list's messages.
fn texts(list: &Value) -> Vec<&str> {
    let items = list["data"].as_array().unwrap().iter();
    items.map(|item| item["content"][0]["text"].as_str().unwrap_or_else(|| panic!("{item}"))).collect()
}

fn events(answer: &Answer) -> Vec<Value> {
    assert_eq!(answer.headers["content-type"], "text/event-stream");
    let text = answer.text();
    let data = text.lines().filter_map(|line| line.strip_prefix("data: "));
    data.map(|data| serde_json::from_str(data).unwrap()).collect()
}

/// Asks until a response has come to its end.
async fn ended(server: &Fixture, id: &str) -> Value {
    let mut response = Value::Null;
    let ended = async || {
        response = got(server, &format!("{RESPONSES}/{id}")).await;
        !matches!(response["status"].as_str(), Some("queued" | "in_progress"))
    };
    eventually("the response ends", ended).await;
    response
}

#[tokio::test]
async fn a_response_is_read_again_until_it_is_deleted() {
    let server = start(&["hello"]);
    let response = posted(&server, RESPONSES, ask("hi", json!({"metadata": {"a": "b"}}))).await;
    let path = format!("{RESPONSES}/{}", id(&response));
    assert_eq!(got(&server, &path).await, response);
    let deleted = call(&server, Method::DELETE, &path, "").await.json();
    assert_eq!(deleted, json!({"id": id(&response), "object": "response", "deleted": true}));
    assert_eq!(server.get(&path).await.error().0, 404);
    assert_eq!(call(&server, Method::DELETE, &path, "").await.error().0, 404);
    assert_eq!(server.get(&format!("{path}/input_items")).await.error().0, 404);
    let further = ask("again", json!({"previous_response_id": id(&response)}));
    let error = server.post(RESPONSES, &further).await.error();
    assert_eq!(error, (400, "previous_response_id".into(), "previous_response_not_found".into()));
}

#[tokio::test]
async fn what_is_not_to_be_stored_is_not_there() {
    let server = start(&["hello"]);
    let response = posted(&server, RESPONSES, ask("hi", json!({"store": false}))).await;
    assert_eq!(server.get(&format!("{RESPONSES}/{}", id(&response))).await.error().0, 404);
}

#[tokio::test]
async fn nobody_sees_what_another_key_has_stored() {
    let server = start_at(None, &["mine", "yours"], saying(&["hello"]));
    let send = async |path: &str, body: Value, key: &str| {
        let request = Request::post(path).header("x-api-key", key);
        server.send(request.body(Body::from(body.to_string())).unwrap()).await
    };
    let response = send(RESPONSES, ask("hi", json!({"background": true})), "mine").await.json();
    let path = format!("{RESPONSES}/{}", id(&response));
    let conversation =
        send(CONVERSATIONS, json!({"items": [{"role": "user", "content": "x"}]}), "mine").await.json();
    let conversation_path = format!("{CONVERSATIONS}/{}", id(&conversation));
    let items = format!("{conversation_path}/items");
    let item = call(&server, Method::GET, &items, "mine").await.json()["data"][0].clone();
    for path in
        [&path, &format!("{path}/input_items"), &conversation_path, &items, &format!("{items}/{}", id(&item))]
    {
        assert_eq!(call(&server, Method::GET, path, "yours").await.error().0, 404, "{path}");
        assert_eq!(call(&server, Method::GET, path, "mine").await.status, 200, "{path}");
    }
    for path in [&path, &conversation_path, &format!("{items}/{}", id(&item))] {
        assert_eq!(call(&server, Method::DELETE, path, "yours").await.error().0, 404, "{path}");
    }
    assert_eq!(send(&format!("{path}/cancel"), json!({}), "yours").await.error().0, 404);
    assert_eq!(send(&conversation_path, json!({"metadata": {"k": "v"}}), "yours").await.error().0, 404);
    assert_eq!(
        send(&items, json!({"items": [{"role": "user", "content": "x"}]}), "yours").await.error().0,
        404
    );
    for further in
        [json!({"previous_response_id": id(&response)}), json!({"conversation": id(&conversation)})]
    {
        let refused = send(RESPONSES, ask("go on", further), "yours").await;
        assert!(matches!(refused.status.as_u16(), 400 | 404), "{}", refused.text());
    }
    assert_eq!(call(&server, Method::GET, &path, "mine").await.status, 200);
}

#[tokio::test]
async fn a_chain_is_gone_on_from_and_its_items_are_listed() {
    let server = start(&["one", "two", "three"]);
    let first = posted(&server, RESPONSES, ask("1", json!({"instructions": "Count."}))).await;
    let second = posted(&server, RESPONSES, ask("2", json!({"previous_response_id": id(&first)}))).await;
    let third = posted(&server, RESPONSES, ask("3", json!({"previous_response_id": id(&second)}))).await;
    assert_eq!((said(&first), said(&second), said(&third)), ("one", "two", "three"));
    assert!(third["usage"]["input_tokens"].as_u64() > second["usage"]["input_tokens"].as_u64());
    assert_eq!(third["previous_response_id"], second["id"]);
    let path = format!("{RESPONSES}/{}/input_items", id(&third));
    let all = got(&server, &format!("{path}?order=asc")).await;
    assert_eq!(texts(&all), ["1", "one", "2", "two", "3"]);
    assert_eq!((&all["object"], &all["has_more"]), (&json!("list"), &json!(false)));
    assert_eq!((&all["first_id"], &all["last_id"]), (&all["data"][0]["id"], &all["data"][4]["id"]));
    let page = got(&server, &format!("{path}?limit=2&include[]=x&include[]=y")).await;
    assert_eq!((texts(&page), &page["has_more"]), (vec!["3", "two"], &json!(true)));
    let next = format!("{path}?limit=3&after={}", page["last_id"].as_str().unwrap());
    assert_eq!(texts(&got(&server, &next).await), ["2", "one", "1"]);
    for query in ["limit=0", "limit=x", "order=up", "after=msg_none"] {
        assert_eq!(server.get(&format!("{path}?{query}")).await.error().0, 400, "{query}");
    }
}

#[tokio::test]
async fn a_background_response_is_polled_and_outlives_its_stream() {
    let (manner, leash) = saying(&["a long answer that takes its time"]).held(PACE);
    let server = start_at(None, &[], manner);
    let queued = posted(&server, RESPONSES, ask("hi", json!({"background": true}))).await;
    assert!(["queued", "in_progress"].contains(&queued["status"].as_str().unwrap()), "{queued}");
    leash.let_go();
    let done = ended(&server, id(&queued)).await;
    assert_eq!(
        (done["status"].as_str(), said(&done)),
        (Some("completed"), "a long answer that takes its time")
    );

    let body = ask("hi", json!({"background": true, "stream": true}));
    let mut stream = server.open(RESPONSES, &body).await;
    stream.until("\n\n", 1).await;
    let data = stream.text().lines().nth(1).unwrap().strip_prefix("data: ").unwrap();
    let created: Value = serde_json::from_str(data).unwrap();
    drop(stream);
    assert_eq!(created["type"], "response.created");
    let path = format!("{RESPONSES}/{}", id(&created["response"]));
    let rest = events(&server.get(&format!("{path}?stream=true&starting_after=2")).await);
    assert_eq!(rest[0]["sequence_number"], 3);
    let last = rest.last().unwrap();
    assert_eq!((&last["type"], said(&last["response"])), (&json!("response.completed"), said(&done)));
    let whole = events(&server.get(&format!("{path}?stream=true")).await);
    assert!(whole.iter().enumerate().all(|(index, event)| event["sequence_number"] == index));
    assert_eq!(whole[3..], rest);
    assert_eq!(server.get(&format!("{path}?stream=true&starting_after=x")).await.error().0, 400);
}

#[tokio::test]
async fn a_background_response_waits_while_the_engine_is_full() {
    let engine = EngineConfig { max_context: 4096, max_sequences: 1, max_waiting: 1, ..engine_config() };
    let (manner, leash) = Manner::default().held(PACE);
    let server = start_with(ServerConfig::new(MODEL), engine, manner, true);
    let mut waiting = Vec::new();
    for _ in 0..5 {
        let body = ask("hi", json!({"background": true, "max_output_tokens": 20, "ignore_eos": true}));
        waiting.push(posted(&server, RESPONSES, body).await);
    }
    let last = id(&waiting[4]);
    let cancelled = posted(&server, &format!("{RESPONSES}/{last}/cancel"), json!({})).await;
    assert_eq!(cancelled["status"], "cancelled");
    leash.let_go();
    for response in &waiting[..4] {
        let response = ended(&server, id(response)).await;
        assert_eq!(response["status"], "incomplete", "{response}");
        assert_eq!(response["usage"]["output_tokens"], 20);
    }
}

#[tokio::test]
async fn one_keys_flood_of_background_responses_keeps_no_other_out() {
    let engine = EngineConfig { max_context: 4096, max_sequences: 1, max_waiting: 1, ..engine_config() };
    let api_keys = ["flood", "modest"].map(str::to_owned).to_vec();
    let config = ServerConfig { api_keys, ..ServerConfig::new(MODEL) };
    let (manner, leash) = Manner::default().held(PACE);
    let server = start_with(config, engine, manner, true);
    let asked = ask("hi", json!({"background": true, "max_output_tokens": 1})).to_string();
    let send = async |key: &str| {
        let request = Request::post(RESPONSES).header("x-api-key", key);
        server.send(request.body(Body::from(asked.clone())).unwrap()).await
    };
    let mut taken = 0;
    let refused = loop {
        let answer = send("flood").await;
        if answer.status != 200 {
            break answer;
        }
        taken += 1;
        assert!(taken < 1000, "no end of what is taken");
    };
    assert_eq!((refused.error().0, refused.error().2.as_str()), (429, "rate_limit_exceeded"));
    assert!(refused.headers.contains_key("retry-after"));
    assert_eq!(send("modest").await.status, 200);
    assert_eq!(send("flood").await.status, 429);
    leash.let_go();
}

#[tokio::test]
async fn cancelling_ends_a_background_response_and_no_other() {
    let long = "x".repeat(2000);
    let (manner, leash) = saying(&[&long]).held(PACE);
    let server = start_at(None, &[], manner);
    let response = posted(&server, RESPONSES, ask("hi", json!({"background": true}))).await;
    let path = format!("{RESPONSES}/{}/cancel", id(&response));
    let cancelled = posted(&server, &path, json!({})).await;
    assert_eq!(cancelled["status"], "cancelled");
    assert_eq!(posted(&server, &path, json!({})).await, cancelled);
    server.cancelled(1).await;
    leash.let_go();
    assert!(server.idle().await.generation_tokens < 100);
    let sync = posted(&server, RESPONSES, ask("hi", json!({"max_output_tokens": 3}))).await;
    let refused = server.post(&format!("{RESPONSES}/{}/cancel", id(&sync)), &json!({})).await;
    assert_eq!(refused.error().0, 400);
    assert_eq!(server.post(&format!("{RESPONSES}/resp_none/cancel"), &json!({})).await.error().0, 404);
}

#[tokio::test]
async fn deleting_a_running_response_ends_it_for_good() {
    let long = "x".repeat(2000);
    let (manner, leash) = saying(&[&long]).held(PACE);
    let server = start_at(None, &[], manner);
    let response = posted(&server, RESPONSES, ask("hi", json!({"background": true}))).await;
    let path = format!("{RESPONSES}/{}", id(&response));
    assert_eq!(call(&server, Method::DELETE, &path, "").await.status, 200);
    server.cancelled(1).await;
    leash.let_go();
    assert!(server.idle().await.generation_tokens < 100);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(server.get(&path).await.error().0, 404);
}

#[tokio::test]
async fn everything_stored_survives_a_restart() {
    let folder = TempDir::new().unwrap();
    let open = |answers: &[&str]| start_at(Some(folder.path()), &[], saying(answers));
    let server = open(&["one"]);
    let first = posted(&server, RESPONSES, ask("1", json!({}))).await;
    let conversation = posted(&server, CONVERSATIONS, json!({"metadata": {"topic": "t"}})).await;
    let in_conversation = ask("2", json!({"conversation": {"id": id(&conversation)}}));
    posted(&server, RESPONSES, in_conversation).await;
    drop(server);

    let server = open(&["two"]);
    let path = format!("{RESPONSES}/{}", id(&first));
    assert_eq!(got(&server, &path).await, first);
    let second = posted(&server, RESPONSES, ask("2", json!({"previous_response_id": id(&first)}))).await;
    assert_eq!(said(&second), "two");
    let items = got(&server, &format!("{RESPONSES}/{}/input_items?order=asc", id(&second))).await;
    assert_eq!(texts(&items), ["1", "one", "2"]);
    let found = got(&server, &format!("{CONVERSATIONS}/{}", id(&conversation))).await;
    assert_eq!(found, conversation);
    let items = got(&server, &format!("{CONVERSATIONS}/{}/items", id(&conversation))).await;
    assert_eq!(texts(&items), ["one", "2"]);

    let again = events(&server.get(&format!("{path}?stream=true")).await);
    assert_eq!(again[0]["type"], "response.created");
    let text: String = again
        .iter()
        .filter(|event| event["type"] == "response.output_text.delta")
        .map(|event| event["delta"].as_str().unwrap())
        .collect();
    assert_eq!(text, "one");
    assert_eq!(again.last().unwrap()["response"], first);
    for seen in [500, u32::MAX] {
        let rest = events(&server.get(&format!("{path}?stream=true&starting_after={seen}")).await);
        assert_eq!((rest.len(), &rest[0]["type"]), (1, &json!("response.completed")));
    }
    let refused = server.post(&format!("{path}/cancel"), &json!({})).await;
    assert_eq!(refused.error().0, 400);
}

#[tokio::test]
async fn a_conversation_is_made_changed_listed_and_deleted() {
    let server = start(&["hello"]);
    let items = json!([{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "hi"}]);
    let made = posted(&server, CONVERSATIONS, json!({"items": items, "metadata": {"a": "b"}})).await;
    assert_eq!((&made["object"], &made["metadata"]), (&json!("conversation"), &json!({"a": "b"})));
    assert!(id(&made).starts_with("conv_") && made["created_at"].is_u64());
    let path = format!("{CONVERSATIONS}/{}", id(&made));
    assert_eq!(got(&server, &path).await, made);
    let changed = posted(&server, &path, json!({"metadata": {"c": "d"}})).await;
    assert_eq!((&changed["metadata"], &changed["created_at"]), (&json!({"c": "d"}), &made["created_at"]));

    let items = format!("{path}/items");
    let added = posted(
        &server,
        &items,
        json!({"items": [
            {"role": "assistant", "content": "ho"},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "done"},
        ]}),
    )
    .await;
    assert_eq!(added["data"].as_array().unwrap().len(), 3);
    assert_eq!(added["data"][0]["content"][0]["type"], "output_text");
    let listed = got(&server, &format!("{items}?order=asc&limit=4")).await;
    assert_eq!(listed["data"][2], added["data"][0]);
    assert_eq!(listed["has_more"], true);
    assert_eq!(listed["data"][0]["role"], "developer");
    let item = format!("{items}/{}", id(&added["data"][2]));
    assert_eq!(got(&server, &item).await, added["data"][2]);
    let after = call(&server, Method::DELETE, &item, "").await.json();
    assert_eq!(after, changed);
    assert_eq!(server.get(&item).await.error().0, 404);
    let newest = got(&server, &format!("{items}?limit=1")).await;
    assert_eq!(newest["data"][0]["type"], "function_call");

    let deleted = call(&server, Method::DELETE, &path, "").await.json();
    assert_eq!(deleted, json!({"id": id(&made), "object": "conversation.deleted", "deleted": true}));
    for path in [&path, &items] {
        assert_eq!(server.get(path).await.error().0, 404);
    }
    assert_eq!(call(&server, Method::DELETE, &path, "").await.error().0, 404);
}

#[tokio::test]
async fn a_conversation_takes_nothing_that_could_not_be_gone_on_from() {
    let server = start(&["hello"]);
    let user = json!({"role": "user", "content": "x"});
    for (body, param) in [
        (json!({"items": vec![user.clone(); 21]}), "items"),
        (json!({"items": [{"role": "king", "content": "x"}]}), "items[0].role"),
        (
            json!({"items": [user, {"type": "function_call_output", "call_id": "c", "output": "x"}]}),
            "items[1].call_id",
        ),
        (json!({"metadata": {"k": 3}}), "metadata"),
        (json!({"items": "x"}), "items"),
    ] {
        let refused = server.post(CONVERSATIONS, &body).await;
        assert_eq!((refused.error().0, refused.error().1.as_str()), (400, param), "{body}");
    }
    let empty = server.post_bytes(CONVERSATIONS, Vec::new()).await.json();
    assert_eq!(empty["metadata"], json!({}));
    let items = format!("{CONVERSATIONS}/{}/items", id(&empty));
    assert_eq!(server.post(&items, &json!({})).await.error().1, "items");
    assert_eq!(got(&server, &items).await["data"], json!([]));
}

#[tokio::test]
async fn a_response_goes_on_from_its_conversation_and_is_taken_up_by_it() {
    let server = start(&["one", "two", "three"]);
    let items = json!([{"role": "user", "content": "zero"}]);
    let conversation = posted(&server, CONVERSATIONS, json!({"items": items})).await;
    let name = id(&conversation);
    let first = posted(&server, RESPONSES, ask("1", json!({"conversation": name}))).await;
    assert_eq!(first["conversation"], json!({"id": name}));
    // Not stored, it is taken up by the conversation all the same.
    let second = posted(&server, RESPONSES, ask("2", json!({"conversation": name, "store": false}))).await;
    assert!(second["usage"]["input_tokens"].as_u64() > first["usage"]["input_tokens"].as_u64());
    let third = ask("3", json!({"conversation": {"id": name}, "background": true}));
    let third = posted(&server, RESPONSES, third).await;
    ended(&server, id(&third)).await;
    let items = got(&server, &format!("{CONVERSATIONS}/{name}/items?order=asc")).await;
    assert_eq!(texts(&items), ["zero", "1", "one", "2", "two", "3", "three"]);
    let both = ask("x", json!({"conversation": name, "previous_response_id": id(&third)}));
    assert_eq!(server.post(RESPONSES, &both).await.error().0, 400);
    let unknown = server.post(RESPONSES, &ask("x", json!({"conversation": "conv_none"}))).await.error();
    assert_eq!((unknown.0, unknown.1.as_str()), (404, "conversation"));
}

#[tokio::test]
async fn input_tokens_are_those_that_a_response_is_billed() {
    let server = start(&["hello"]);
    let tools = json!([{"type": "function", "name": "f", "parameters": {"type": "object"}}]);
    let body = ask("hi", json!({"instructions": "Be brief.", "tools": tools}));
    let response = posted(&server, RESPONSES, body.clone()).await;
    let counted = posted(&server, "/v1/responses/input_tokens", body).await;
    assert_eq!(counted["object"], "response.input_tokens");
    assert_eq!(counted["input_tokens"], response["usage"]["input_tokens"]);
    let body = json!({"previous_response_id": id(&response), "input": "more"});
    let more = posted(&server, "/v1/responses/input_tokens", body).await;
    assert!(more["input_tokens"].as_u64() > counted["input_tokens"].as_u64());
    let error =
        server.post("/v1/responses/input_tokens", &json!({"model": "other", "input": "x"})).await.error();
    assert_eq!(error.0, 404);
    server.idle().await;
}

#[tokio::test]
async fn a_compacted_conversation_is_gone_on_from() {
    let server = start(&["one", "We counted to one.", "two"]);
    let first = posted(&server, RESPONSES, ask("1", json!({}))).await;
    let body = json!({"model": MODEL, "previous_response_id": id(&first), "input": "what next?"});
    let compacted = posted(&server, "/v1/responses/compact", body).await;
    assert_eq!(compacted["object"], "response.compaction");
    assert!(compacted["usage"]["output_tokens"].as_u64() > Some(0));
    let output = compacted["output"].as_array().unwrap();
    let kinds: Vec<&str> = output.iter().map(|item| item["type"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["message", "message", "compaction"]);
    assert_eq!(output[1]["content"][0]["text"], "what next?");
    let mut input = output.clone();
    input.push(json!({"role": "user", "content": "2"}));
    let body = json!({"model": MODEL, "input": input, "temperature": 0});
    let counted = posted(&server, "/v1/responses/input_tokens", body.clone()).await;
    let without = json!({"model": MODEL, "input": [input[0], input[1], input[3]]});
    let without = posted(&server, "/v1/responses/input_tokens", without).await;
    let more = counted["input_tokens"].as_u64().unwrap() - without["input_tokens"].as_u64().unwrap();
    assert!(more as usize > "We counted to one.".len(), "the summary is in the prompt: {more}");
    assert_eq!(said(&posted(&server, RESPONSES, body.clone()).await), "two");
    let mut forged = body;
    forged["input"][2]["encrypted_content"] = json!("Zm9yZ2Vk");
    assert_eq!(server.post(RESPONSES, &forged).await.error().0, 400);
    let nothing = server.post("/v1/responses/compact", &json!({"model": MODEL})).await;
    assert_eq!(nothing.error().1, "input");
}

#[tokio::test]
async fn the_store_is_among_the_metrics() {
    let server = start(&["hello"]);
    posted(&server, RESPONSES, ask("hi", json!({}))).await;
    let response = posted(&server, RESPONSES, ask("hi", json!({}))).await;
    got(&server, &format!("{RESPONSES}/{}", id(&response))).await;
    let metrics = server.get("/metrics").await.text();
    for name in ["response_store_bytes", "response_store_failures_total", "response_store_evictions_total"] {
        assert!(metrics.contains(&format!("rudder_{name}{{")), "{name}");
    }
}
