//! WebSocket on `GET /v1/responses`: prewarming, chains, lanes, interruption, errors.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use rudder_server::{ServerConfig, serve};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

use crate::common::{
    Fixture, MODEL, PACE, PATIENCE, engine_config, saying, start_agent, start_held, start_held_agent,
    start_with,
};
use crate::legal::Order;

/// A server on a port of its own.
pub struct Listening {
    pub fixture: Fixture,
    pub address: String,
    _shutdown: oneshot::Sender<()>,
}

pub async fn listen(fixture: Fixture) -> Listening {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("ws://{}/v1/responses", listener.local_addr().unwrap());
    let (shutdown, ended) = oneshot::channel::<()>();
    let server = fixture.server.clone();
    tokio::spawn(serve(listener, server, async {
        let _ = ended.await;
    }));
    Listening { fixture, address, _shutdown: shutdown }
}

/// A client.
pub struct Socket(WebSocketStream<MaybeTlsStream<tokio::net::TcpStream>>);

impl Listening {
    pub async fn connect(&self) -> Socket {
        Socket(connect_async(&self.address).await.unwrap().0)
    }

    /// Connects with a header besides.
    pub async fn connect_with(&self, name: &'static str, value: &'static str) -> Socket {
        let mut request = self.address.as_str().into_client_request().unwrap();
        request.headers_mut().insert(name, value.parse().unwrap());
        Socket(connect_async(request).await.unwrap().0)
    }
}

impl Socket {
    pub async fn send(&mut self, event: Value) {
        self.0.send(Message::text(event.to_string())).await.unwrap();
    }

    /// Sends a `response.create` with these fields besides.
    pub async fn create(&mut self, more: Value) {
        let mut event = json!({"type": "response.create", "model": MODEL, "store": false, "temperature": 0});
        event.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.send(event).await;
    }

    /// The next event of a response's, or an error.
    pub async fn next(&mut self) -> Value {
        loop {
            let event = self.next_or_progress().await;
            if event["type"] != "rudder.progress" {
                return event;
            }
        }
    }

    /// The next event of all.
    pub async fn next_or_progress(&mut self) -> Value {
        loop {
            let message = tokio::time::timeout(PATIENCE, self.0.next()).await.expect("silence");
            match message.expect("open").unwrap() {
                Message::Text(text) => return serde_json::from_str(&text).unwrap(),
                Message::Ping(_) | Message::Pong(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// Whether nothing comes for a while.
    pub async fn is_silent(&mut self) -> bool {
        tokio::time::timeout(Duration::from_millis(100), self.0.next()).await.is_err()
    }

    /// Reads one response to its end.
    pub async fn response(&mut self) -> Value {
        let mut order = Order::default();
        while !order.ended() {
            order.take(&self.next().await);
        }
        order.response
    }

    /// Reads up to an error, while a response runs.
    pub async fn error(&mut self, order: &mut Order) -> Value {
        loop {
            match self.next().await {
                event if event["type"] == "error" => return event,
                event => order.take(&event),
            }
        }
    }

    /// Reads up to an event of a type.
    pub async fn until(&mut self, kind: &str, order: &mut Order) -> Value {
        loop {
            let event = self.next().await;
            order.take(&event);
            if event["type"] == kind {
                return event;
            }
        }
    }
}

pub fn text(response: &Value) -> &str {
    response["output"][0]["content"][0]["text"].as_str().unwrap()
}

#[tokio::test]
async fn codex_prewarms_and_goes_on_from_there() {
    let server = listen(start_agent(&["ignored", "Hello."])).await;
    let mut socket = server.connect().await;
    // Without a word to read, and with some.
    socket.create(json!({"generate": false, "stream": true, "input": []})).await;
    let empty = socket.response().await;
    assert_eq!((&empty["status"], &empty["output"]), (&json!("completed"), &json!([])));
    let rules =
        json!([{"role": "developer", "content": "rules that fill some blocks of the cache, and more"}]);
    socket.create(json!({"generate": false, "input": rules, "previous_response_id": empty["id"]})).await;
    let warm = socket.response().await;
    assert_eq!((&warm["status"], &warm["output"]), (&json!("completed"), &json!([])));
    assert_eq!(warm["usage"]["output_tokens"], 0);
    socket.create(json!({"previous_response_id": warm["id"], "input": "hi"})).await;
    let response = socket.response().await;
    assert_eq!(text(&response), "Hello.");
    assert!(response["usage"]["input_tokens_details"]["cached_tokens"].as_u64().unwrap() >= 32, "{response}");
}

#[tokio::test]
async fn tools_may_come_as_an_item() {
    let call = "<tool_call>\n{\"name\": \"exec\", \"arguments\": {}}\n</tool_call>";
    let server = listen(start_agent(&[call, "Done."])).await;
    let mut socket = server.connect().await;
    let tools = json!([{"type": "namespace", "name": "functions", "description": "", "tools": [
        {"type": "function", "name": "exec", "parameters": {"type": "object"}}]}]);
    let added = json!({"type": "additional_tools", "id": "at_1", "role": "developer", "tools": tools});
    socket.create(json!({"input": [added, {"role": "user", "content": "go"}]})).await;
    let response = socket.response().await;
    let call = &response["output"][0];
    assert_eq!((&call["name"], &call["namespace"]), (&json!("exec"), &json!("functions")));
    let result = json!([{"type": "function_call_output", "call_id": call["call_id"], "output": "ok"}]);
    socket.create(json!({"previous_response_id": response["id"], "input": result})).await;
    assert_eq!(text(&socket.response().await), "Done.");
}

#[tokio::test]
async fn unstored_responses_belong_to_their_connection() {
    let server = listen(start_agent(&["One.", "Two."])).await;
    let mut socket = server.connect().await;
    socket.create(json!({"input": "x"})).await;
    let first = socket.response().await;
    let mut other = server.connect().await;
    other.create(json!({"input": "y", "previous_response_id": first["id"]})).await;
    let error = other.next().await;
    assert_eq!((&error["type"], &error["status"]), (&json!("error"), &json!(400)));
    assert_eq!(error["error"]["code"], "previous_response_not_found");
    // The connection stays open.
    other.create(json!({"input": "y"})).await;
    assert_eq!(text(&other.response().await), "Two.");
}

#[tokio::test]
async fn a_failed_continuation_forgets_what_it_continued() {
    let server = listen(start_agent(&["One."])).await;
    let mut socket = server.connect().await;
    socket.create(json!({"input": "x"})).await;
    let first = socket.response().await;
    let stray = json!([{"type": "function_call_output", "call_id": "call_gone", "output": "x"}]);
    socket.create(json!({"input": stray, "previous_response_id": first["id"]})).await;
    assert_eq!(socket.next().await["error"]["param"], "input[0].call_id");
    socket.create(json!({"input": "y", "previous_response_id": first["id"]})).await;
    assert_eq!(socket.next().await["error"]["code"], "previous_response_not_found");
}

#[tokio::test]
async fn a_lane_keeps_its_order_and_lanes_run_side_by_side() {
    let (fixture, leash) = start_held();
    let mut leash = Some(leash);
    let server = listen(fixture).await;
    let mut socket = server.connect().await;
    let lanes = [Some("a"), Some("b"), None];
    for lane in lanes.iter().cycle().take(6) {
        let mut fields = json!({"input": "x", "max_output_tokens": 40, "ignore_eos": true});
        if let Some(lane) = lane {
            fields["stream_id"] = json!(lane);
        }
        socket.create(fields).await;
    }
    let mut running: Vec<(Option<String>, Order)> = Vec::new();
    let (mut ended, mut most) = (0, 0);
    while ended < 6 {
        let event = socket.next().await;
        let lane = event.get("stream_id").map(|lane| lane.as_str().unwrap().to_owned());
        if event["type"] == "response.created" {
            assert!(running.iter().all(|(other, _)| *other != lane), "one at a time on a lane");
            running.push((lane.clone(), Order::on(lane.as_deref())));
        }
        most = most.max(running.len());
        if most == lanes.len() {
            leash.take();
        }
        let at = running.iter().position(|(other, _)| *other == lane).unwrap();
        running[at].1.take(&event);
        if running[at].1.ended() {
            running.remove(at);
            ended += 1;
        }
    }
    assert_eq!(most, 3);
}

#[tokio::test]
async fn a_connection_may_name_any_number_of_lanes_one_after_the_other() {
    let server = listen(start_agent(&["Hello."])).await;
    let mut socket = server.connect().await;
    for lane in 0..70 {
        let lane = format!("lane_{lane}");
        socket.create(json!({"input": "x", "stream_id": lane, "generate": false})).await;
        let mut order = Order::on(Some(&lane));
        socket.until("response.completed", &mut order).await;
    }
}

#[tokio::test]
async fn lanes_with_requests_are_kept_and_are_so_many_at_most() {
    let (fixture, leash) = start_held();
    let server = listen(fixture).await;
    let mut socket = server.connect().await;
    let fields =
        |lane: usize| json!({"input": "x", "max_output_tokens": 1, "stream_id": format!("lane_{lane}")});
    for lane in 0..65 {
        socket.create(fields(lane)).await;
    }
    let refused = loop {
        let event = socket.next().await;
        if event["type"] == "error" {
            break event;
        }
    };
    assert_eq!((&refused["stream_id"], &refused["error"]["param"]), (&json!("lane_64"), &json!("stream_id")));
    socket.create(fields(0)).await;
    leash.let_go();
    let mut ended = Vec::new();
    while ended.len() < 65 {
        let event = socket.next().await;
        assert_ne!(event["type"], "error", "{event}");
        if event["type"] == "response.incomplete" {
            ended.push(event["stream_id"].clone());
        }
    }
    assert_eq!(ended.iter().filter(|&lane| lane == "lane_0").count(), 2);
}

#[tokio::test]
async fn a_running_response_stays_in_reach_of_its_connection_whoever_names_it() {
    let (fixture, leash) = start_held_agent(&[&"long ".repeat(200)]);
    let server = listen(fixture).await;
    let mut socket = server.connect().await;
    socket.create(json!({"input": "x", "stream_id": "a"})).await;
    let mut order = Order::on(Some("a"));
    leash.stepping(socket.until("response.output_text.delta", &mut order)).await;
    let id = order.response["id"].clone();
    socket.create(json!({"input": "y", "stream_id": "b", "previous_response_id": id})).await;
    assert_eq!(socket.error(&mut order).await["error"]["code"], "previous_response_not_found");
    socket.send(json!({"type": "response.cancel", "response_id": id})).await;
    socket.until("response.incomplete", &mut order).await;
    assert_eq!(order.response["status"], "cancelled");
    leash.let_go();
    server.fixture.idle().await;
}

/// What a histogram of `/metrics` adds up to, in seconds.
async fn sum(server: &Listening, histogram: &str) -> f64 {
    let metrics = server.fixture.get("/metrics").await.text();
    let sum = metrics.lines().find_map(|line| line.strip_prefix(histogram)).unwrap_or("0");
    sum.trim().parse().unwrap()
}

#[tokio::test]
async fn time_on_a_lane_is_none_of_reading_or_of_the_first_token() {
    const READ: &str = "rudder_request_preparation_seconds_sum{model_name=\"tiny\",stage=\"read\"}";
    const FIRST_TOKEN: &str = "vllm:time_to_first_token_seconds_sum{model_name=\"tiny\"}";
    let (fixture, leash) = start_held_agent(&[&"long ".repeat(50), "Hello."]);
    let server = listen(fixture).await;
    let mut socket = server.connect().await;
    socket.create(json!({"input": "x"})).await;
    let mut order = Order::default();
    leash.stepping(socket.until("response.output_text.delta", &mut order)).await;
    socket.create(json!({"input": "y"})).await;
    // Heard after that one, which waits from now on.
    socket.send(json!({"type": "response.dance"})).await;
    socket.error(&mut order).await;
    let waits = tokio::time::Instant::now();
    let before = [sum(&server, READ).await, sum(&server, FIRST_TOKEN).await];
    assert!(before.iter().all(|&sum| sum > 0.0), "{before:?}");
    tokio::time::sleep(Duration::from_millis(300)).await;
    let waited = waits.elapsed();
    leash.let_go();
    socket.until("response.completed", &mut order).await;
    assert_eq!(socket.response().await["status"], "completed");
    let after = [sum(&server, READ).await, sum(&server, FIRST_TOKEN).await];
    // On a machine that stands still the rest takes as long.
    let rest = (waits.elapsed() - waited).as_secs_f64();
    for (after, before) in after.iter().zip(before) {
        assert!(after - before <= rest, "{} of {rest} s", after - before);
    }
}

#[tokio::test]
async fn requests_that_wait_on_a_connection_have_at_most_the_bytes_of_one() {
    let (manner, leash) = saying(&["Hello."]).held(PACE);
    let config = ServerConfig { max_body_bytes: 1000, ..ServerConfig::new(MODEL) };
    let server = listen(start_with(config, engine_config(), manner, false)).await;
    let mut socket = server.connect().await;
    socket.create(json!({"input": "x", "max_output_tokens": 2})).await;
    let mut order = Order::default();
    socket.until("response.created", &mut order).await;
    let long = json!({"input": "x".repeat(400), "max_output_tokens": 2});
    for _ in 0..2 {
        socket.create(long.clone()).await;
    }
    let refused = socket.error(&mut order).await;
    assert!(refused["error"]["message"].as_str().unwrap().contains("wait on this connection"), "{refused}");
    leash.let_go();
    while !order.ended() {
        order.take(&socket.next().await);
    }
    assert_eq!(socket.response().await["status"], "incomplete");
    // Nothing waits any more.
    socket.create(long).await;
    assert_eq!(socket.response().await["status"], "incomplete");
}

#[tokio::test]
async fn an_interrupted_response_drops_what_is_unfinished_and_is_gone_on_from() {
    let answer = format!("<think>brief</think>{}", "long ".repeat(200));
    let (fixture, leash) = start_held_agent(&[&answer, "Right."]);
    let server = listen(fixture).await;
    let mut socket = server.connect().await;
    socket.create(json!({"input": "a question that fills a block or two of the cache"})).await;
    let mut order = Order::default();
    for _ in 0..4 {
        leash.stepping(socket.until("response.output_text.delta", &mut order)).await;
    }
    let id = order.response["id"].clone();
    socket
        .send(json!({"type": "response.interrupt", "response_id": id, "mode": "discard_partial_items"}))
        .await;
    socket.until("response.incomplete", &mut order).await;
    assert_eq!(order.response["incomplete_details"], json!({"reason": "interrupted"}));
    let output = order.response["output"].as_array().unwrap();
    assert_eq!((output.len(), &output[0]["type"]), (1, &json!("reasoning")));
    assert!(order.response["usage"]["output_tokens"].as_u64().unwrap() < 200);
    // Again, too late: nothing comes.
    socket
        .send(json!({"type": "response.interrupt", "response_id": id, "mode": "discard_partial_items"}))
        .await;
    assert!(socket.is_silent().await);
    leash.let_go();
    // Long, so that what follows it is never taken for the rest of the answer before.
    socket
        .create(json!({"input": "shorter, and to the point, if you please", "previous_response_id": id}))
        .await;
    let response = socket.response().await;
    assert_eq!(text(&response), "Right.");
    assert!(response["usage"]["input_tokens_details"]["cached_tokens"].as_u64().unwrap() >= 32);
    server.fixture.idle().await;
}

#[tokio::test]
async fn a_response_can_be_cancelled() {
    let (fixture, leash) = start_held_agent(&[&"long ".repeat(200)]);
    let server = listen(fixture).await;
    let mut socket = server.connect().await;
    socket.create(json!({"input": "x"})).await;
    let mut order = Order::default();
    leash.stepping(socket.until("response.output_text.delta", &mut order)).await;
    socket.send(json!({"type": "response.cancel", "response_id": order.response["id"]})).await;
    socket.until("response.incomplete", &mut order).await;
    assert_eq!(order.response["status"], "cancelled");
    leash.let_go();
    server.fixture.idle().await;
}

#[tokio::test]
async fn a_connection_that_closes_ends_what_runs_on_it() {
    let (fixture, leash) = start_held_agent(&[&"long ".repeat(500)]);
    let server = listen(fixture).await;
    let mut socket = server.connect().await;
    socket.create(json!({"input": "x"})).await;
    let mut order = Order::default();
    leash.stepping(socket.until("response.output_text.delta", &mut order)).await;
    drop(socket);
    server.fixture.cancelled(1).await;
    leash.let_go();
    let stats = server.fixture.idle().await;
    assert!(stats.generation_tokens < 1000, "{stats:?}");
}

#[tokio::test]
async fn errors_are_events_and_the_connection_stays_open() {
    let server = listen(start_agent(&["Fine."])).await;
    let mut socket = server.connect().await;
    for (event, param) in [
        (json!({"type": "response.dance"}), json!("type")),
        (json!({"input": "x"}), Value::Null),
        (json!({"type": "response.create", "input": "x"}), json!("model")),
        (
            json!({"type": "response.create", "model": MODEL, "input": "x", "background": true}),
            json!("background"),
        ),
        (
            json!({"type": "response.create", "model": MODEL, "input": [{"role": "judge", "content": ""}], "stream_id": "a"}),
            json!("input[0].role"),
        ),
        (json!({"type": "response.interrupt", "response_id": "resp_gone"}), json!("response_id")),
        (json!({"type": "response.cancel"}), json!("response_id")),
    ] {
        let lane = event.get("stream_id").cloned();
        socket.send(event.clone()).await;
        let error = socket.next().await;
        assert_eq!((&error["type"], &error["error"]["param"]), (&json!("error"), &param), "{event}");
        assert_eq!(error.get("stream_id").cloned(), lane);
        assert_eq!(error["status"], 400);
    }
    socket.create(json!({"input": "x"})).await;
    assert_eq!(text(&socket.response().await), "Fine.");
}

#[tokio::test]
async fn a_page_from_elsewhere_opens_no_socket_without_a_key() {
    let server = listen(start_agent(&["hello"])).await;
    let mut request = server.address.as_str().into_client_request().unwrap();
    request.headers_mut().insert("origin", "https://example.org".parse().unwrap());
    match connect_async(request).await {
        Err(Error::Http(answer)) => assert_eq!(answer.status(), 403),
        other => panic!("{other:?}"),
    }
    server.connect_with("origin", "http://localhost:3000").await;
}
