//! Who waits: where they stand, how soon they want it, where the time went.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::Request;
use rudder_engine::EngineConfig;
use rudder_server::ServerConfig;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::common::{
    Answer, Fixture, Leash, MODEL, Manner, Stream, engine_config, eventually, start, start_with,
};
use crate::legal::Order;
use crate::sockets::{Socket, listen};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const RESPONSES: &str = "/v1/responses";
const MESSAGES: &str = "/v1/messages";

/// A server that runs one request at a time, in small steps now and then, and is busy with one.
struct Narrow {
    fixture: Fixture,
    leash: Leash,
    busy: JoinHandle<Answer>,
}

impl Narrow {
    async fn start() -> Self {
        Self::with(ServerConfig::new(MODEL)).await
    }

    async fn with(config: ServerConfig) -> Self {
        let engine =
            EngineConfig { max_sequences: 1, max_batch_tokens: 4, max_context: 4096, ..engine_config() };
        // A prompt of some hundred steps is read for longer than clients wait for news.
        let (manner, leash) = Manner::default().held(Duration::from_millis(20));
        let fixture = start_with(config, engine, manner, true);
        let body = json!({"prompt": "ab", "max_tokens": 4000, "ignore_eos": true});
        let request = request(COMPLETIONS, &body, ("x-api-key", "busy"));
        let server = fixture.clone();
        let busy = tokio::spawn(async move { server.send(request).await });
        let runs = eventually("the server is busy", async || fixture.engine.stats().running == 1);
        leash.stepping(runs).await;
        Self { fixture, leash, busy }
    }

    /// Waits until so many wait.
    async fn waiting(&self, count: usize) {
        eventually("they wait", async || self.fixture.engine.stats().waiting == count).await;
    }

    /// Takes away what the server is busy with.
    fn free(&self) {
        assert!(!self.busy.is_finished(), "it took longer than the server was busy");
        self.busy.abort();
    }

    /// The same once so many wait.
    async fn free_once(&self, count: usize) {
        self.waiting(count).await;
        self.free();
    }

    /// Asks once so many wait.
    async fn ask(&self, behind: usize, request: Request<Body>) -> Answer {
        self.waiting(behind).await;
        self.fixture.send(request).await
    }
}

/// A request with a header.
fn request(path: &str, body: &Value, header: (&str, &str)) -> Request<Body> {
    let body = with(body.clone(), json!({"model": MODEL})).to_string();
    Request::post(path).header(header.0, header.1).body(Body::from(body)).unwrap()
}

/// A short answer to a prompt of some eighty tokens, another one in each dialect.
fn bodies() -> [(&'static str, Value); 4] {
    let prompt = |name: &str| format!("{name} {}", "waiting ".repeat(9));
    let messages = |name: &str| json!([{"role": "user", "content": prompt(name)}]);
    [
        (CHAT, json!({"messages": messages("chat"), "max_tokens": 1})),
        (COMPLETIONS, json!({"prompt": prompt("completions"), "max_tokens": 1})),
        (RESPONSES, json!({"input": prompt("responses"), "max_output_tokens": 1, "store": false})),
        (MESSAGES, json!({"messages": messages("messages"), "max_tokens": 1})),
    ]
}

fn with(mut body: Value, extra: Value) -> Value {
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

/// What the first comment of a kind says.
async fn comment(stream: &mut Stream, kind: &str) -> String {
    stream.until(kind, 1).await;
    let (_, said) = stream.text().split_once(kind).unwrap();
    said.lines().next().unwrap().to_owned()
}

#[tokio::test]
async fn a_stream_tells_its_place_in_line_and_how_much_of_its_prompt_is_read() {
    let long = "waiting ".repeat(48);
    let messages = json!([{"role": "user", "content": long}]);
    for (path, body) in [
        (CHAT, json!({"messages": messages, "max_tokens": 1})),
        (RESPONSES, json!({"input": long, "max_output_tokens": 1, "store": false})),
        (MESSAGES, json!({"messages": messages, "max_tokens": 1})),
    ] {
        let server = Narrow::start().await;
        let mut stream = server.fixture.open(path, &with(body, json!({"stream": true}))).await;
        let position = server.leash.stepping(comment(&mut stream, ": queued position=")).await;
        assert_eq!(position, "1", "{path}");
        server.free();
        let read = server.leash.stepping(comment(&mut stream, ": prefill ")).await;
        let (done, total) = read.split_once('/').unwrap();
        assert!(done.parse::<usize>().unwrap() <= total.parse::<usize>().unwrap(), "{path}: {read}");
        server.leash.let_go();
        stream.whole().await;
    }
}

#[tokio::test]
async fn a_socket_tells_its_place_in_line_and_how_much_of_its_prompt_is_read() {
    let narrow = Narrow::start().await;
    let server = listen(narrow.fixture.clone()).await;
    let mut socket = server.connect().await;
    let mut order = Order::on(Some("a"));
    let mut told: Vec<Value> = Vec::new();
    // Up to what tells this state, or to the end.
    let mut hear = async |socket: &mut Socket, state: &str| {
        while !order.ended() && told.last().is_none_or(|last| last["state"] != state) {
            let event = socket.next_or_progress().await;
            match event["type"] == "rudder.progress" {
                true => told.push(event),
                false => order.take(&event),
            }
        }
    };
    let input = "waiting ".repeat(48);
    socket.create(json!({"stream_id": "a", "input": input, "max_output_tokens": 1})).await;
    narrow.leash.stepping(hear(&mut socket, "queued")).await;
    narrow.free();
    narrow.leash.stepping(hear(&mut socket, "prefill")).await;
    narrow.leash.let_go();
    hear(&mut socket, "ended").await;
    let response = order.response;
    for event in &told {
        assert_eq!((&event["response_id"], &event["stream_id"]), (&response["id"], &json!("a")));
        assert!(event.get("sequence_number").is_none(), "{event}");
    }
    assert_eq!(told[0]["position"], 1);
    let read = told.iter().find(|event| event["state"] == "prefill").unwrap();
    assert!(read["done"].as_u64().unwrap() <= read["total"].as_u64().unwrap(), "{read}");
    let distinct = told.windows(2).all(|pair| pair[0] != pair[1]);
    assert!(distinct, "the same is told once: {told:?}");
}

#[tokio::test]
async fn a_sockets_timeout_holds_for_each_of_its_requests() {
    let narrow = Narrow::start().await;
    let server = listen(narrow.fixture.clone()).await;
    let mut socket = server.connect_with("x-request-timeout", "0.5").await;
    socket.create(json!({"input": "late", "max_output_tokens": 1})).await;
    let late = narrow.leash.stepping(socket.response()).await;
    assert_eq!((&late["status"], &late["error"]["code"]), (&json!("failed"), &json!("deadline_exceeded")));
    // Its own time begins with its arrival. On a machine that stands still it may be over all the same.
    narrow.free();
    narrow.leash.let_go();
    let in_time = async || {
        socket.create(json!({"input": "in time", "max_output_tokens": 1})).await;
        socket.response().await["status"] == "incomplete"
    };
    eventually("one is in time", in_time).await;
}

#[tokio::test]
async fn a_quick_answer_has_no_comments() {
    let fixture = start();
    for (path, body) in bodies() {
        let began = Instant::now();
        let text = fixture.post(path, &with(body, json!({"stream": true}))).await.text();
        let comments = text.contains("\n: ") || text.starts_with(':');
        assert!(!comments || began.elapsed() >= Duration::from_millis(500), "{text}");
    }
}

#[tokio::test]
async fn what_still_waits_at_its_deadline_is_dropped_with_a_reason() {
    let server = Narrow::start().await;
    let [chat, completions, responses, messages] = bodies();
    let ask = async |(path, body): (&str, Value), timeout: &str| {
        server.fixture.send(request(path, &body, ("x-request-timeout", timeout))).await
    };
    let streamed = (CHAT, with(chat.1.clone(), json!({"stream": true})));
    let impatient = async {
        let asked = tokio::join!(
            ask(chat.clone(), "0.05"),
            ask(completions, "0.05"),
            ask(responses, "0.05"),
            ask(messages, "0.05"),
            ask(streamed, "0.05"),
            ask(chat.clone(), "soon"),
        );
        server.free();
        asked
    };
    let all = async { tokio::join!(impatient, ask(chat.clone(), "3600")) };
    let ((chat, completions, responses, messages, streamed, refused), patient) =
        server.leash.stepping(all).await;
    for answer in [chat, completions, responses] {
        assert_eq!(answer.error(), (504, String::new(), "deadline_exceeded".into()));
    }
    assert_eq!(messages.status, 504);
    assert_eq!(messages.json()["error"]["type"], "timeout_error");
    let (events, _) = streamed.events();
    assert_eq!(events.last().unwrap()["error"]["code"], "deadline_exceeded");
    assert_eq!(refused.error().0, 400);
    assert_eq!(patient.status, 200, "{}", patient.text());
}

#[tokio::test]
async fn an_urgent_request_passes_one_that_can_wait() {
    let server = Narrow::start().await;
    let order = Mutex::new(Vec::new());
    let ask = async |name: &'static str, extra: Value, behind: usize| {
        let body = with(json!({"prompt": name.repeat(6), "max_tokens": 1}), extra);
        let answer = server.ask(behind, request(COMPLETIONS, &body, ("x-api-key", ""))).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        order.lock().unwrap().push(name);
    };
    let all = async {
        tokio::join!(
            server.free_once(3),
            ask("flexible", json!({"service_tier": "flex"}), 0),
            ask("ordinary", json!({}), 1),
            ask("numbered", json!({"priority": -3}), 2),
        )
    };
    server.leash.stepping(all).await;
    assert_eq!(*order.lock().unwrap(), ["numbered", "ordinary", "flexible"]);
}

#[tokio::test]
async fn a_key_that_weighs_more_is_served_more() {
    let server = Narrow::with(ServerConfig {
        api_keys: ["light", "heavy", "busy"].map(str::to_owned).to_vec(),
        key_weights: vec![1, 8],
        ..ServerConfig::new(MODEL)
    })
    .await;
    let order = Mutex::new(Vec::new());
    let ask = async |key: &'static str, behind: usize| {
        let body = json!({"prompt": format!("{behind}: {key}, twenty bytes"), "max_tokens": 1});
        let answer = server.ask(behind, request(COMPLETIONS, &body, ("x-api-key", key))).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        order.lock().unwrap().push(key);
    };
    let all = async {
        tokio::join!(
            server.free_once(6),
            ask("light", 0),
            ask("heavy", 1),
            ask("light", 2),
            ask("heavy", 3),
            ask("light", 4),
            ask("heavy", 5),
        )
    };
    server.leash.stepping(all).await;
    assert_eq!(*order.lock().unwrap(), ["heavy", "heavy", "heavy", "light", "light", "light"]);
}

#[tokio::test]
async fn a_tier_is_repeated_where_it_was_named_and_refused_where_it_is_unknown() {
    let fixture = start();
    let [(_, chat), _, (_, responses), _] = bodies();
    let tier = async |path: &str, body: &Value, tier: Value| {
        fixture.post(path, &with(body.clone(), json!({"service_tier": tier}))).await
    };
    assert_eq!(tier(CHAT, &chat, json!("flex")).await.json()["service_tier"], "flex");
    assert_eq!(tier(CHAT, &chat, json!("auto")).await.json()["service_tier"], "default");
    assert!(tier(CHAT, &chat, Value::Null).await.json().get("service_tier").is_none());
    assert_eq!(tier(RESPONSES, &responses, json!("priority")).await.json()["service_tier"], "priority");
    for (path, body) in bodies() {
        assert_eq!(tier(path, &body, json!("at once")).await.status, 400);
    }
}

#[tokio::test]
async fn an_answer_tells_where_its_time_went() {
    let fixture = start();
    for (path, body) in bodies() {
        fixture.post(path, &body).await;
        let answer = fixture.post(path, &body).await;
        for name in ["queue-ms", "prefill-ms", "decode-ms"] {
            let value = answer.headers[&format!("x-rudder-{name}")].to_str().unwrap();
            assert!(value.parse::<f64>().is_ok_and(|ms| ms >= 0.0), "{name} {value}");
        }
        assert_ne!(answer.headers["x-rudder-cached-tokens"], "0", "{path}");
        let told = &answer.json()["rudder"];
        assert_eq!(told.is_object(), path != MESSAGES, "{told}");
        if told.is_object() {
            assert!(told["prefill_ms"].as_f64().unwrap() > 0.0, "{told}");
            assert_eq!(told["cached_tokens"].to_string(), answer.headers["x-rudder-cached-tokens"]);
        }
    }
    let [(_, chat), _, (_, responses), _] = bodies();
    let streamed = with(chat, json!({"stream": true, "stream_options": {"include_usage": true}}));
    let (events, _) = fixture.post(CHAT, &streamed).await.events();
    let told: Vec<bool> = events.iter().map(|event| event.get("rudder").is_some()).collect();
    assert!(told.last().unwrap() & !told[..told.len() - 1].contains(&true), "{events:?}");
    let text = fixture.post(RESPONSES, &with(responses, json!({"stream": true}))).await.text();
    let last = text.trim_end().rsplit_once("data: ").unwrap().1;
    let last: Value = serde_json::from_str(last).unwrap();
    assert!(last["response"]["rudder"]["decode_ms"].is_number(), "{last}");
}
