//! Who waits: where they stand, how soon they want it, where the time went.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::Request;
use http_body_util::BodyExt;
use rudder_engine::EngineConfig;
use rudder_server::ServerConfig;
use serde_json::{Value, json};
use tower::ServiceExt;

use crate::common::{Answer, CONTEXT, Fixture, MODEL, Manner, engine_config, start, start_with};
use crate::legal::Order;
use crate::sockets::{Socket, listen};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const RESPONSES: &str = "/v1/responses";
const MESSAGES: &str = "/v1/messages";

/// A server that runs one request at a time, in small steps that are slow until they need not be.
struct Narrow {
    fixture: Fixture,
    hurry: Arc<AtomicBool>,
}

impl Narrow {
    fn start() -> Self {
        Self::with(ServerConfig::new(MODEL))
    }

    fn with(config: ServerConfig) -> Self {
        let engine = EngineConfig { max_sequences: 1, max_batch_tokens: 4, ..engine_config() };
        let manner = Manner { step: Duration::from_millis(60), ..Manner::default() };
        let hurry = manner.hurry.clone();
        Self { fixture: start_with(config, engine, manner, true), hurry }
    }

    /// Keeps the server busy until this is over, half a minute at most.
    async fn while_busy<T>(&self, this: impl Future<Output = T>) -> T {
        let body = json!({"prompt": "ab", "max_tokens": CONTEXT - 2});
        tokio::select! {
            output = this => output,
            _ = self.fixture.post(COMPLETIONS, &body) => panic!("it took longer than the server was busy"),
        }
    }

    /// Waits until the server is busy.
    async fn busy(&self) {
        while self.fixture.engine.stats().running == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Waits until so many wait.
    async fn waiting(&self, count: usize) {
        while self.fixture.engine.stats().waiting < count {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    fn hurry(&self, hurry: bool) {
        self.hurry.store(hurry, Ordering::SeqCst);
    }

    /// Posts once the server is busy.
    async fn post_later(&self, path: &str, body: &Value, timeout: Option<&str>) -> Answer {
        self.busy().await;
        let body = with(body.clone(), json!({"model": MODEL})).to_string();
        let request = timeout
            .into_iter()
            .fold(Request::post(path), |request, timeout| request.header("x-request-timeout", timeout));
        self.fixture.send(request.body(Body::from(body)).unwrap()).await
    }
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

/// The rest of a stream up to a comment of a kind, and what the comment says.
async fn comment(body: &mut Body, kind: &str) -> String {
    let mut text = String::new();
    loop {
        let frame = body.frame().await.unwrap_or_else(|| panic!("no {kind:?} in {text}")).unwrap();
        text.push_str(str::from_utf8(frame.data_ref().unwrap()).unwrap());
        if let Some((_, said)) = text.split_once(kind) {
            return said.trim_end().to_owned();
        }
    }
}

#[tokio::test]
async fn a_stream_tells_its_place_in_line_and_how_much_of_its_prompt_is_read() {
    let server = Narrow::start();
    // No prompt is known from another one.
    let long = |name: &str| format!("{name} {}", "waiting ".repeat(47));
    let messages = |name: &str| json!([{"role": "user", "content": long(name)}]);
    for (path, body) in [
        (CHAT, json!({"messages": messages("chat"), "max_tokens": 1})),
        (RESPONSES, json!({"input": long("responses"), "max_output_tokens": 1, "store": false})),
        (MESSAGES, json!({"messages": messages("messages"), "max_tokens": 1})),
    ] {
        server.hurry(false);
        let body = with(body, json!({"model": MODEL, "stream": true})).to_string();
        let waits = async {
            server.busy().await;
            let request = Request::post(path).body(Body::from(body)).unwrap();
            let mut stream = server.fixture.router.clone().oneshot(request).await.unwrap().into_body();
            assert_eq!(comment(&mut stream, ": queued position=").await, "1", "{path}");
            stream
        };
        let mut stream = server.while_busy(waits).await;
        let read = comment(&mut stream, ": prefill ").await;
        let (done, total) = read.split_once('/').unwrap();
        assert!(done.parse::<usize>().unwrap() <= total.parse::<usize>().unwrap(), "{path}: {read}");
        server.hurry(true);
        stream.collect().await.unwrap();
    }
}

#[tokio::test]
async fn a_socket_tells_its_place_in_line_and_how_much_of_its_prompt_is_read() {
    let narrow = Narrow::start();
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
    let waits = async {
        narrow.busy().await;
        socket.create(json!({"stream_id": "a", "input": input, "max_output_tokens": 1})).await;
        hear(&mut socket, "queued").await;
    };
    narrow.while_busy(waits).await;
    hear(&mut socket, "prefill").await;
    narrow.hurry(true);
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
    let narrow = Narrow::start();
    let server = listen(narrow.fixture.clone()).await;
    let mut socket = server.connect_with("x-request-timeout", "0.5").await;
    let late = async {
        narrow.busy().await;
        socket.create(json!({"input": "late", "max_output_tokens": 1})).await;
        socket.response().await
    };
    let late = narrow.while_busy(late).await;
    assert_eq!((&late["status"], &late["error"]["code"]), (&json!("failed"), &json!("deadline_exceeded")));
    // Its own time begins with its arrival.
    narrow.hurry(true);
    socket.create(json!({"input": "in time", "max_output_tokens": 1})).await;
    assert_eq!(socket.response().await["status"], "incomplete");
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
    let server = Narrow::start();
    let [chat, completions, responses, messages] = bodies();
    let ask = async |(path, body): (&str, Value)| server.post_later(path, &body, Some("0.05")).await;
    let streamed = (CHAT, with(chat.1.clone(), json!({"stream": true})));
    let impatient = async {
        let asked = tokio::join!(
            ask(chat.clone()),
            ask(completions),
            ask(responses),
            ask(messages),
            ask(streamed),
            server.post_later(CHAT, &chat.1, Some("soon")),
        );
        server.hurry(true);
        asked
    };
    let ((chat, completions, responses, messages, streamed, refused), patient) =
        tokio::join!(server.while_busy(impatient), server.post_later(CHAT, &chat.1, Some("3600")));
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
    let server = Narrow::start();
    let order = Mutex::new(Vec::new());
    let ask = async |name: &'static str, extra: Value, behind: usize| {
        server.waiting(behind).await;
        let body = with(json!({"prompt": name.repeat(6), "max_tokens": 1}), extra);
        assert_eq!(server.post_later(COMPLETIONS, &body, None).await.status, 200);
        order.lock().unwrap().push(name);
    };
    tokio::join!(
        server.while_busy(server.waiting(3)),
        ask("flexible", json!({"service_tier": "flex"}), 0),
        ask("ordinary", json!({}), 1),
        ask("numbered", json!({"priority": -3}), 2),
    );
    assert_eq!(*order.lock().unwrap(), ["numbered", "ordinary", "flexible"]);
}

#[tokio::test]
async fn a_key_that_weighs_more_is_served_more() {
    let server = Narrow::with(ServerConfig {
        api_keys: ["light", "heavy", "other"].map(str::to_owned).to_vec(),
        key_weights: vec![1, 8],
        ..ServerConfig::new(MODEL)
    });
    let order = Mutex::new(Vec::new());
    let post = async |key: &'static str, prompt: String, max_tokens: usize| {
        let body = json!({"model": MODEL, "prompt": prompt, "max_tokens": max_tokens}).to_string();
        let request = Request::post(COMPLETIONS).header("x-api-key", key).body(Body::from(body));
        let answer = server.fixture.send(request.unwrap()).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        order.lock().unwrap().push(key);
    };
    let ask = async |key: &'static str, behind: usize| {
        server.busy().await;
        server.waiting(behind).await;
        post(key, format!("{behind}: {key}, twenty bytes"), 1).await;
    };
    let other = async {
        tokio::select! {
            () = post("other", "ab".into(), CONTEXT - 2) => panic!("the others were late"),
            () = server.waiting(6) => {}
        }
    };
    tokio::join!(
        other,
        ask("light", 0),
        ask("heavy", 1),
        ask("light", 2),
        ask("heavy", 3),
        ask("light", 4),
        ask("heavy", 5),
    );
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
