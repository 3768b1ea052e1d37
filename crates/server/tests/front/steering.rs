//! Steering: accepted, applied at a safe boundary, its successor's events and cache, pending, failed.

use axum::body::Body;
use axum::http::Request;
use rudder_server::{Message, Piece, Role, Turn};
use rudder_text::{Tool, ToolInput};
use serde_json::{Value, json};

use crate::common::{Fixture, Leash, Stream, eventually, start_agent, start_held_agent};
use crate::legal::{self, Order};
use crate::responses;
use crate::sockets::{Listening, Socket, listen, text};

/// Long, so that what follows it is never taken for the rest of the answer before.
const CORRECTION: &str = "No: the other one, of which we have spoken.";
const BLOCK: u64 = 16;
const RESPONSES: &str = "/v1/responses";

async fn steer(socket: &mut Socket, id: &Value, input: Value) {
    socket.send(json!({"type": "response.steer", "previous_response_id": id, "input": input})).await;
}

/// The response that a stream begins with.
fn created(stream: &Stream) -> Value {
    let (_, event) = stream.text().split_once("event: response.created\ndata: ").unwrap();
    let event: Value = serde_json::from_str(event.lines().next().unwrap()).unwrap();
    event["response"].clone()
}

/// Prompt tokens that were computed.
fn prefilled(response: &Value) -> u64 {
    let usage = &response["usage"];
    usage["input_tokens"].as_u64().unwrap() - usage["input_tokens_details"]["cached_tokens"].as_u64().unwrap()
}

/// A connection on which a response has begun to speak, and what it has told so far.
async fn speaking(server: &Listening, leash: &Leash) -> (Socket, Order) {
    let mut socket = server.connect().await;
    socket.create(json!({"input": "x"})).await;
    let mut order = Order::default();
    leash.stepping(socket.until("response.output_text.delta", &mut order)).await;
    (socket, order)
}

#[tokio::test]
async fn a_correction_lands_at_any_token_and_is_prefilled_alone() {
    let long = "one two three four five six seven eight nine ten eleven twelve".repeat(10);
    for after in (0..24).chain([40, 100]) {
        let (fixture, leash) = start_held_agent(&[&long, "Very well."]);
        let server = listen(fixture).await;
        let mut socket = server.connect().await;
        socket
            .create(json!({"input": "count for me, please, and as far as you can", "metadata": {"k": "v"}}))
            .await;
        let mut first = Order::default();
        socket.until("response.in_progress", &mut first).await;
        for _ in 0..after {
            leash.stepping(socket.until("response.output_text.delta", &mut first)).await;
        }
        let id = first.response["id"].clone();
        steer(&mut socket, &id, json!(CORRECTION)).await;
        let accepted = socket.until("response.steer.accepted", &mut first).await;
        assert_eq!(accepted["steer"]["previous_response_id"], id);
        socket.until("response.incomplete", &mut first).await;
        assert_eq!(first.response["incomplete_details"], json!({"reason": "steered"}));
        let said = first.text();
        assert!(long.starts_with(&said) && said.len() < long.len(), "{after}: {said:?}");

        leash.let_go();
        let second = socket.response().await;
        assert_eq!((&second["status"], &second["previous_response_id"]), (&json!("completed"), &id));
        assert_eq!((&second["metadata"], &second["temperature"]), (&json!({"k": "v"}), &json!(0.0)));
        // Steered before its first word, the model has its first answer left.
        let answer = if text(&second) == long && after == 0 { long.as_str() } else { "Very well." };
        assert_eq!(text(&second), answer);
        // What the template puts around it: 3 marks and the names of the roles.
        let correction = (CORRECTION.len() + "\n\nuser\n\nassistant\n".len() + 4) as u64;
        let new = prefilled(&second);
        assert!(new <= correction + BLOCK || after == 0, "{after}: {new} prefilled for {correction}");
        server.fixture.idle().await;
    }
}

#[tokio::test]
async fn a_call_is_finished_first_and_its_result_is_owed() {
    let arguments = "{\"path\": \"some/path/file\"}";
    let call = format!("<tool_call>\n{{\"name\": \"read\", \"arguments\": {arguments}}}\n</tool_call>");
    let answer = format!("Let me see.{call} and so on");
    let (fixture, leash) = start_held_agent(&[&answer, "I see."]);
    let server = listen(fixture).await;
    let tools = json!([{"type": "function", "name": "read", "parameters": {"type": "object"}}]);
    let mut socket = server.connect().await;
    socket.create(json!({"input": "x", "tools": tools, "stream_id": "lane"})).await;
    let mut order = Order::on(Some("lane"));
    leash.stepping(socket.until("response.function_call_arguments.delta", &mut order)).await;
    let id = order.response["id"].clone();
    for input in [json!("first"), json!([{"role": "user", "content": "second"}])] {
        steer(&mut socket, &id, input).await;
        socket.until("response.steer.accepted", &mut order).await;
    }
    leash.stepping(socket.until("response.completed", &mut order)).await;
    leash.let_go();
    let call = order.response["output"][1].clone();
    assert_eq!(call["arguments"], arguments);
    assert_eq!(order.response["output"].as_array().unwrap().len(), 2, "it ends with its call");
    let owed = json!([{"type": "function_call_output", "call_id": call["call_id"], "name": "read"}]);
    for _ in 0..2 {
        let pending = socket.until("response.steer.pending", &mut order).await;
        assert_eq!(
            (&pending["reason"], &pending["required_input"]),
            (&json!("waiting_for_required_input"), &owed)
        );
    }

    // Without what is owed it does not go on, and may be tried again.
    socket.create(json!({"previous_response_id": id, "input": "well?", "stream_id": "lane"})).await;
    assert_eq!(socket.next().await["error"]["param"], "input");
    let mut result = owed[0].clone();
    result["output"] = json!("contents");
    let resumed = json!({"previous_response_id": id, "input": [result], "stream_id": "lane", "tools": tools});
    socket.create(resumed).await;
    let mut next = Order::on(Some("lane"));
    socket.until("response.completed", &mut next).await;
    assert_eq!(text(&next.response), "I see.");
    let correction = "second".len() + "first".len() + "contents".len();
    assert!(prefilled(&next.response) <= (correction + 90) as u64 + BLOCK, "{}", next.response["usage"]);
    server.fixture.idle().await;
}

fn read_tool() -> Value {
    json!([{"type": "function", "name": "read", "parameters": {"type": "object"}}])
}

/// A stored response that was steered within its call, to which a correction waits: its id, and the result
/// that it owes.
async fn steered_in_a_call(socket: &mut Socket, leash: &Leash) -> (Value, Value) {
    socket.create(json!({"input": "x", "tools": read_tool(), "store": true})).await;
    let mut order = Order::default();
    leash.stepping(socket.until("response.function_call_arguments.delta", &mut order)).await;
    let id = order.response["id"].clone();
    steer(socket, &id, json!(CORRECTION)).await;
    socket.until("response.steer.accepted", &mut order).await;
    let pending = leash.stepping(socket.until("response.steer.pending", &mut order)).await;
    (id, pending["required_input"][0].clone())
}

/// A request that brings the result that is owed.
fn resumed(id: &Value, owed: &Value, output: &str, streams: bool) -> Value {
    let mut result = owed.clone();
    result["output"] = json!(output);
    json!({"previous_response_id": id, "input": [result], "tools": read_tool(), "temperature": 0, "stream": streams})
}

/// Whether a response was made from the correction too.
async fn heard_the_correction(server: &Fixture, response: &Value) -> bool {
    let id = response["id"].as_str().unwrap_or_else(|| panic!("{response}"));
    server.get(&format!("/v1/responses/{id}/input_items")).await.text().contains(CORRECTION)
}

const CALL: &str = "<tool_call>\n{\"name\": \"read\", \"arguments\": {\"path\": \"a/path\"}}\n</tool_call>";

#[tokio::test]
async fn a_correction_waits_again_if_the_request_that_brings_it_fails() {
    let (fixture, leash) = start_held_agent(&[CALL, "I see."]);
    let server = listen(fixture).await;
    let mut socket = server.connect().await;
    let (id, owed) = steered_in_a_call(&mut socket, &leash).await;
    leash.let_go();
    let server = &server.fixture;
    let too_long = "word ".repeat(2000);
    let refused = server.post(RESPONSES, &resumed(&id, &owed, &too_long, false)).await;
    assert_eq!(refused.error().2, "context_length_exceeded");
    let failed = server.post(RESPONSES, &resumed(&id, &owed, &too_long, true)).await;
    assert_eq!(legal::check(&responses::events(&failed))["status"], "failed");
    let response = server.post(RESPONSES, &resumed(&id, &owed, "contents", false)).await.json();
    assert_eq!(text(&response), "I see.");
    assert!(heard_the_correction(server, &response).await);
    // It has become part of the conversation, and is told no second time.
    let again = server.post(RESPONSES, &resumed(&id, &owed, "contents", false)).await.json();
    assert!(!heard_the_correction(server, &again).await);
}

#[tokio::test]
async fn a_correction_waits_again_if_the_client_that_brings_it_leaves() {
    let (fixture, leash) = start_held_agent(&[CALL, &"long ".repeat(300), "I see."]);
    let server = listen(fixture).await;
    let mut socket = server.connect().await;
    let (id, owed) = steered_in_a_call(&mut socket, &leash).await;
    let server = &server.fixture;
    let mut stream = server.open(RESPONSES, &resumed(&id, &owed, "contents", true)).await;
    leash.stepping(stream.until("event: response.output_text.delta", 3)).await;
    let left = format!("{RESPONSES}/{}", created(&stream)["id"].as_str().unwrap());
    drop(stream);
    let cancelled = async || server.get(&left).await.json()["status"] == "cancelled";
    eventually("it is cancelled", cancelled).await;
    leash.let_go();
    let response = server.post(RESPONSES, &resumed(&id, &owed, "contents", false)).await.json();
    assert!(heard_the_correction(server, &response).await);
}

#[tokio::test]
async fn corrections_before_the_first_token_are_joined_or_given_back_in_order() {
    let (fixture, leash) = start_held_agent(&["Very well."]);
    let server = listen(fixture).await;
    let mut socket = server.connect().await;
    socket.create(json!({"input": "x"})).await;
    let mut first = Order::default();
    socket.until("response.in_progress", &mut first).await;
    let id = first.response["id"].clone();
    for word in ["a", "b", "c"] {
        steer(&mut socket, &id, json!(word)).await;
    }
    let (mut accepted, mut failed, mut second) = (0, 0, Order::default());
    while accepted + failed < 3 || !first.ended() {
        let event = socket.next().await;
        let of_first = event["steer"].is_object() || !first.ended();
        let order = if of_first { &mut first } else { &mut second };
        order.take(&event);
        accepted += u32::from(event["type"] == "response.steer.accepted");
        failed += u32::from(event["type"] == "response.steer.failed");
    }
    assert!(accepted > 0 && accepted + failed == 3);
    leash.let_go();
    socket.until("response.completed", &mut second).await;
    assert_eq!((&second.response["previous_response_id"], text(&second.response)), (&id, "Very well."));
    // And the successor can be gone on from.
    socket.create(json!({"input": "and?", "previous_response_id": second.response["id"]})).await;
    let third = socket.response().await;
    assert!(third["usage"]["input_tokens"].as_u64() > second.response["usage"]["input_tokens"].as_u64());
}

#[tokio::test]
async fn what_cannot_be_steered_gives_its_input_back() {
    let server = listen(start_agent(&["Hello."])).await;
    let mut socket = server.connect().await;
    socket.create(json!({"input": "x"})).await;
    let done = socket.response().await["id"].clone();
    let image = json!([{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]);
    for (id, input, code) in [
        (&json!("resp_gone"), json!("a"), "response_not_found"),
        (&done, json!([{"type": "message", "role": "user", "content": "b"}]), "response_already_completed"),
        (&done, image, "invalid_input"),
        (&done, json!(""), "invalid_input"),
    ] {
        steer(&mut socket, id, input.clone()).await;
        let failed = socket.next().await;
        assert_eq!(failed["type"], "response.steer.failed");
        assert_eq!(
            (&failed["error"]["code"], &failed["error"]["type"]),
            (&json!(code), &json!("invalid_request_error"))
        );
        assert_eq!(failed["steer"], json!({"previous_response_id": id, "input": input}));
        assert!(failed["sequence_number"].is_u64());
    }
}

/// A stored response's events, as whoever asks for it gets them.
async fn replayed(server: &Fixture, id: &Value) -> Vec<Value> {
    let path = format!("/v1/responses/{}?stream=true", id.as_str().unwrap());
    responses::events(&server.get(&path).await)
}

#[tokio::test]
async fn a_refusal_is_told_on_its_lane_behind_the_end_and_is_not_kept_with_the_response() {
    let server = listen(start_agent(&["Hello."])).await;
    let mut socket = server.connect().await;
    socket.create(json!({"input": "x", "store": true, "stream_id": "a"})).await;
    let mut order = Order::on(Some("a"));
    let end = socket.until("response.completed", &mut order).await;
    let id = order.response["id"].clone();
    for input in [json!("late"), json!(7)] {
        steer(&mut socket, &id, input).await;
        let failed = socket.until("response.steer.failed", &mut order).await;
        assert_eq!(failed["sequence_number"], end["sequence_number"].as_u64().unwrap() + 1);
    }
    assert_eq!(replayed(&server.fixture, &id).await.last(), Some(&end));
}

#[tokio::test]
async fn a_running_response_keeps_no_correction_that_it_did_not_take() {
    let (fixture, leash) = start_held_agent(&["Hello."]);
    let server = listen(fixture).await;
    let mut socket = server.connect().await;
    socket.create(json!({"input": "x", "store": true})).await;
    let mut order = Order::default();
    socket.until("response.in_progress", &mut order).await;
    let id = order.response["id"].clone();
    steer(&mut socket, &id, json!(7)).await;
    socket.until("response.steer.failed", &mut order).await;
    leash.let_go();
    let end = socket.until("response.completed", &mut order).await;
    let replayed = replayed(&server.fixture, &id).await;
    assert_eq!((legal::check(&replayed), replayed.last()), (order.response, Some(&end)));
    assert!(replayed.iter().all(|event| event["type"] != "response.steer.failed"));
}

#[tokio::test]
async fn an_input_that_is_too_long_to_wait_is_not_sent_back() {
    let server = listen(start_agent(&["Hello."])).await;
    let mut socket = server.connect().await;
    steer(&mut socket, &json!("resp_gone"), json!("x".repeat(1 << 20))).await;
    let failed = socket.next().await;
    assert_eq!((&failed["error"]["code"], &failed["steer"]["input"]), (&json!("invalid_input"), &json!("")));
}

#[tokio::test]
async fn too_many_corrections_are_refused_and_an_interrupt_gives_back_those_that_wait() {
    let call = "<tool_call>\n{\"name\": \"read\", \"arguments\": {\"path\": \"";
    let answer = format!("{call}{}", "x".repeat(2000));
    let (fixture, leash) = start_held_agent(&[&answer]);
    let server = listen(fixture).await;
    let mut socket = server.connect().await;
    let tools = json!([{"type": "function", "name": "read", "parameters": {"type": "object"}}]);
    socket.create(json!({"input": "x", "tools": tools})).await;
    let mut order = Order::default();
    leash.stepping(socket.until("response.function_call_arguments.delta", &mut order)).await;
    let id = order.response["id"].clone();
    for _ in 0..17 {
        steer(&mut socket, &id, json!("more")).await;
    }
    let mut accepted = 0;
    let refused = loop {
        let event = socket.next().await;
        if event["type"] == "response.steer.failed" {
            break event;
        }
        accepted += u32::from(event["type"] == "response.steer.accepted");
    };
    assert_eq!((accepted, &refused["error"]["code"]), (16, &json!("too_many_pending_steers")));
    assert!(refused["steer"].get("id").is_none());
    socket.send(json!({"type": "response.interrupt", "response_id": id})).await;
    let mut failed = 0;
    while failed < 16 {
        let event = socket.next().await;
        if event["type"] == "response.steer.failed" {
            assert_eq!(
                (&event["error"]["code"], &event["steer"]["input"]),
                (&json!("response_not_active"), &json!("more"))
            );
            assert!(event["steer"]["id"].as_str().unwrap().starts_with("steer_"));
            failed += 1;
        }
    }
    leash.let_go();
    server.fixture.idle().await;
}

#[tokio::test]
async fn a_successor_that_cannot_be_made_gives_the_input_back() {
    let (fixture, leash) = start_held_agent(&[&"long ".repeat(500)]);
    let server = listen(fixture).await;
    let (mut socket, mut order) = speaking(&server, &leash).await;
    let input = "word ".repeat(2000);
    steer(&mut socket, &order.response["id"].clone(), json!(input)).await;
    socket.until("response.incomplete", &mut order).await;
    let failed = socket.until("response.steer.failed", &mut order).await;
    assert_eq!(failed["error"]["code"], "successor_creation_failed");
    assert_eq!(failed["steer"]["input"], json!(input));
}

#[tokio::test]
async fn over_http_a_correction_is_posted_and_its_successor_streamed() {
    let (fixture, leash) = start_held_agent(&[&"long ".repeat(300), "Very well."]);
    let server = listen(fixture).await;
    let (mut socket, mut first) = speaking(&server, &leash).await;
    let id = first.response["id"].as_str().unwrap().to_owned();
    let path = format!("/v1/responses/{id}/steer");
    let answer = server.fixture.post(&path, &json!({"input": CORRECTION})).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let accepted = answer.json();
    // Its id is known before it is, and leads to it, although nothing is stored.
    let successor = format!("/v1/responses/{}?stream=true", accepted["successor_id"].as_str().unwrap());
    let ended = async {
        socket.until("response.incomplete", &mut first).await;
        leash.let_go();
    };
    let (streamed, ()) = tokio::join!(server.fixture.get(&successor), ended);
    let events = responses::events(&streamed);
    assert_eq!(text(&legal::check(&events)), "Very well.");
    assert_eq!(
        (&accepted["type"], &accepted["steer"]["previous_response_id"]),
        (&json!("response.steer.accepted"), &json!(id))
    );
    let second = socket.response().await;
    assert_eq!((&second["id"], text(&second)), (&accepted["successor_id"], "Very well."));

    let late = server.fixture.post(&path, &json!({"input": "too late"})).await;
    assert_eq!((late.status.as_u16(), &late.json()["error"]["code"]), (409, &json!("response_not_active")));
    let gone = server.fixture.post("/v1/responses/resp_gone/steer", &json!({"input": "x"})).await;
    assert_eq!((gone.status.as_u16(), &gone.json()["error"]["code"]), (404, &json!("response_not_found")));
}

#[tokio::test]
async fn over_http_the_successor_may_be_streamed_by_the_one_who_steers() {
    let (fixture, leash) = start_held_agent(&[&"long ".repeat(300), "Very well."]);
    let server = listen(fixture).await;
    let (mut socket, mut first) = speaking(&server, &leash).await;
    let path = format!("/v1/responses/{}/steer", first.response["id"].as_str().unwrap());
    let stream = server.fixture.open(&path, &json!({"input": CORRECTION, "stream": true})).await;
    socket.until("response.incomplete", &mut first).await;
    leash.let_go();
    let answer = stream.whole().await;
    let text = answer.text();
    let data = text.lines().filter_map(|line| line.strip_prefix("data: "));
    let events: Vec<Value> = data.map(|data| serde_json::from_str(data).unwrap()).collect();
    assert_eq!(events[0]["type"], "response.steer.accepted");
    assert_eq!(legal::check(&events[1..])["output"][0]["content"][0]["text"], "Very well.");
}

/// Steers by way of HTTP and reads up to the successor, of which it returns the id.
async fn steered_over_http(server: &Fixture, id: &Value) -> (Stream, String) {
    let path = format!("{RESPONSES}/{}/steer", id.as_str().unwrap());
    let mut stream = server.open(&path, &json!({"input": CORRECTION, "stream": true})).await;
    stream.until("event: response.created", 1).await;
    let id = created(&stream)["id"].as_str().unwrap().to_owned();
    (stream, id)
}

/// Waits for a response's end; returns its status.
async fn end_of(server: &Fixture, id: &str) -> String {
    let mut status = String::new();
    let ended = async || {
        let response = server.get(&format!("{RESPONSES}/{id}")).await.json();
        status = response["status"].as_str().unwrap_or_else(|| panic!("{response}")).to_owned();
        status != "queued" && status != "in_progress"
    };
    eventually("it ends", ended).await;
    status
}

#[tokio::test]
async fn a_background_successor_outlives_the_stream_of_the_one_who_steered() {
    let (server, leash) = start_held_agent(&[&"long ".repeat(300), "Very well."]);
    let asked = json!({"input": "x", "temperature": 0, "background": true, "stream": true});
    let mut first = server.open(RESPONSES, &asked).await;
    leash.stepping(first.until("event: response.output_text.delta", 1)).await;
    let id = created(&first)["id"].clone();
    drop(first);
    let (stream, successor) = steered_over_http(&server, &id).await;
    drop(stream);
    leash.let_go();
    assert_eq!(end_of(&server, &successor).await, "completed");
}

#[tokio::test]
async fn a_successor_that_a_socket_reads_outlives_the_stream_of_the_one_who_steered() {
    let (fixture, leash) = start_held_agent(&[&"long ".repeat(300), "Very well."]);
    let server = listen(fixture).await;
    let (mut socket, mut first) = speaking(&server, &leash).await;
    let (stream, _) = steered_over_http(&server.fixture, &first.response["id"]).await;
    drop(stream);
    socket.until("response.incomplete", &mut first).await;
    leash.let_go();
    let second = socket.response().await;
    assert_eq!((&second["status"], text(&second)), (&json!("completed"), "Very well."));
}

#[tokio::test]
async fn a_successor_ends_with_the_stream_of_the_one_who_steered_unless_another_reads_it() {
    for read in [true, false] {
        let (server, leash) = start_held_agent(&[&"long ".repeat(300), "Very well."]);
        let asked = json!({"input": "x", "temperature": 0, "stream": true});
        let mut first = server.open(RESPONSES, &asked).await;
        leash.stepping(first.until("event: response.output_text.delta", 1)).await;
        let (stream, successor) = steered_over_http(&server, &created(&first)["id"]).await;
        first.whole().await;
        if read {
            let path = format!("{RESPONSES}/{successor}?stream=true");
            let other = server.begin(Request::get(path).body(Body::empty()).unwrap()).await;
            drop(stream);
            leash.let_go();
            assert_eq!(legal::check(&responses::events(&other.whole().await))["status"], "completed");
        } else {
            drop(stream);
            assert_eq!(end_of(&server, &successor).await, "cancelled");
            leash.let_go();
        }
        server.idle().await;
    }
}

#[tokio::test]
async fn a_conversation_goes_on_after_many_corrections() {
    let answers =
        ["first answer, which goes on and on and on and on", "second answer, which goes on too", "Done."];
    let server = listen(start_agent(&answers)).await;
    let mut socket = server.connect().await;
    let mut id = Value::Null;
    for turn in 0..6 {
        let mut fields = json!({"input": format!("turn {turn}")});
        if !id.is_null() {
            fields["previous_response_id"] = id;
        }
        socket.create(fields).await;
        let response = socket.response().await;
        assert_eq!(response["status"], "completed");
        id = response["id"].clone();
    }
    server.fixture.idle().await;
}

#[tokio::test]
async fn an_answer_that_is_to_end_outside_calls_ends_with_its_call_however_much_has_come() {
    let (fixture, leash) = start_held_agent(&[&format!("{CALL} and so on")]);
    let input = ToolInput::Json { schema: json!({}), strict: false };
    let mut turn = Turn::new([Message::new(Role::User, "x")]);
    turn.tools = vec![Tool { name: "read".into(), description: String::new(), input }];
    turn.sampling.temperature = 0.0;
    let mut running = fixture.server.start_turn(turn).await.unwrap();
    let mut pieces = Vec::new();
    while !pieces.iter().any(|piece| matches!(piece, Piece::CallInput(_))) {
        assert!(leash.stepping(running.advance()).await);
        pieces.extend(running.deltas().flat_map(|delta| delta.pieces.clone()));
    }
    running.stop_outside_calls();
    // The rest is there before any of it is read.
    leash.let_go();
    fixture.idle().await;
    while running.advance().await {
        pieces.extend(running.deltas().flat_map(|delta| delta.pieces.clone()));
    }
    assert_eq!(pieces.last(), Some(&Piece::CallEnd), "{pieces:?}");
}

#[tokio::test]
async fn in_reasoning_text_or_a_call_the_boundary_is_a_safe_one() {
    let answer = "<think>hm, two files to read</think>Let me look.\n<tool_call>\n{\"name\": \"read\", \
        \"arguments\": {\"path\": \"a/path\"}}\n</tool_call> and then on and on";
    let tools = json!([{"type": "function", "name": "read", "parameters": {"type": "object"}}]);
    let (mut steered, mut pending) = (0, 0);
    // From its first word on: events 0 and 1 come before it.
    for after in (3..60).step_by(3) {
        let (fixture, leash) = start_held_agent(&[answer, "Very well."]);
        let server = listen(fixture).await;
        let mut socket = server.connect().await;
        socket.create(json!({"input": "x", "tools": tools})).await;
        let mut order = Order::default();
        socket.until("response.in_progress", &mut order).await;
        for _ in 2..after {
            order.take(&leash.stepping(socket.next()).await);
        }
        let id = order.response["id"].clone();
        steer(&mut socket, &id, json!(CORRECTION)).await;
        socket.until("response.steer.accepted", &mut order).await;
        while !order.ended() {
            order.take(&leash.stepping(socket.next()).await);
        }
        leash.let_go();
        let output = order.response["output"].as_array().unwrap();
        let calls: Vec<&Value> = output.iter().filter(|item| item["type"] == "function_call").collect();
        if let [call] = calls[..] {
            assert_eq!(
                (&call["status"], &call["arguments"]),
                (&json!("completed"), &json!("{\"path\": \"a/path\"}"))
            );
            assert_eq!(order.response["status"], "completed");
            socket.until("response.steer.pending", &mut order).await;
            pending += 1;
        } else {
            assert_eq!(order.response["incomplete_details"]["reason"], "steered", "{after}");
            assert_eq!(text(&socket.response().await), "Very well.");
            steered += 1;
        }
        server.fixture.idle().await;
    }
    assert!(steered > 3 && pending > 3, "{steered} steered, {pending} pending");
}
