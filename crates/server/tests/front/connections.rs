//! Clients that wait, leave or come too late; what operators see of it.

use std::time::Duration;

use crate::common::{
    MODEL, Manner, PACE, PATIENCE, engine_config, eventually, start, start_held, start_with,
};
use rudder_server::{ServerConfig, serve};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::timeout;

const CHAT: &str = "/v1/chat/completions";

fn body(stream: bool) -> Value {
    json!({"model": MODEL, "messages": [{"role": "user", "content": "x"}], "stream": stream, "ignore_eos": true, "max_tokens": 300})
}

#[tokio::test]
async fn a_stream_that_is_dropped_is_cancelled() {
    let (fixture, leash) = start_held();
    let mut asked = body(true);
    asked["n"] = json!(4);
    let mut stream = fixture.open(CHAT, &asked).await;
    // Four of these say that an answer begins.
    leash.stepping(stream.until("data: ", 12)).await;
    eventually("all four run", async || fixture.engine.stats().running == 4).await;
    drop(stream);
    leash.let_go();
    let stats = fixture.idle().await;
    assert!(stats.generation_tokens < 600, "{stats:?}");
    let metrics = fixture.get("/metrics").await.text();
    assert!(
        metrics.contains(r#"vllm:request_success_total{finished_reason="abort",model_name="tiny"} 4"#),
        "{metrics}"
    );
    assert!(metrics.contains(r#"vllm:num_requests_running{model_name="tiny"} 0"#));
}

#[tokio::test]
async fn a_silent_prefill_is_bridged_by_comments() {
    let config = ServerConfig { keep_alive: Duration::from_millis(20), ..ServerConfig::new(MODEL) };
    let (manner, leash) = Manner::default().held(PACE);
    let fixture = start_with(config, engine_config(), manner, true);
    let mut asked = body(true);
    asked["max_tokens"] = json!(1);
    let mut stream = fixture.open(CHAT, &asked).await;
    stream.until(": keep-alive\n\n", 2).await;
    leash.let_go();
    let answer = stream.whole().await;
    let text = answer.text();
    let (before, _) = text.split_once("\"finish_reason\":\"length\"").unwrap();
    assert!(before.matches(": keep-alive\n\n").count() >= 2, "{text}");
    assert!(text.starts_with("data: {"), "the first chunk does not wait: {text}");
    assert!(answer.events().1);
}

#[tokio::test]
async fn metrics_count_what_was_done() {
    let fixture = start();
    let mut asked = body(false);
    asked["max_tokens"] = json!(5);
    let usage = fixture.post(CHAT, &asked).await.json()["usage"].clone();
    fixture.idle().await;
    let metrics = fixture.get("/metrics").await.text();
    for line in [
        format!("rudder_prompt_tokens_total{{model_name=\"tiny\"}} {}", usage["prompt_tokens"]),
        "vllm:generation_tokens_total{model_name=\"tiny\"} 5".into(),
        "vllm:time_to_first_token_seconds_count{model_name=\"tiny\"} 1".into(),
        "vllm:e2e_request_latency_seconds_count{model_name=\"tiny\"} 1".into(),
        "vllm:request_queue_time_seconds_count{model_name=\"tiny\"} 1".into(),
        "vllm:request_success_total{finished_reason=\"length\",model_name=\"tiny\"} 1".into(),
    ] {
        assert!(metrics.contains(&line), "{line} is missing in\n{metrics}");
    }
    // Tokens that are taken together count once.
    let name = "vllm:inter_token_latency_seconds_count{model_name=\"tiny\"} ";
    let gaps = metrics.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    assert!(gaps.parse::<u32>().unwrap() <= 4, "{gaps}");
}

/// Sends a request over a connection of its own and returns the connection.
async fn send(address: std::net::SocketAddr, method: &str, path: &str, body: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    stream
}

async fn read(mut stream: TcpStream) -> String {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await.unwrap();
    String::from_utf8(bytes).unwrap()
}

#[tokio::test]
async fn what_many_connections_send_at_once_is_bounded_until_it_is_whole_or_given_up() {
    let config = ServerConfig { max_body_bytes: 1000, ..ServerConfig::new(MODEL) };
    let fixture = start_with(config, engine_config(), Manner::default(), true);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving = tokio::spawn(serve(listener, fixture.server.clone(), std::future::pending()));
    let whole = async || read(send(address, "POST", CHAT, &" ".repeat(500)).await).await;
    assert!(whole().await.starts_with("HTTP/1.1 400"), "it is no JSON");
    let mut unfinished = Vec::new();
    for _ in 0..16 {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let head = format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n");
        stream.write_all(format!("{head}{}", " ".repeat(990)).as_bytes()).await.unwrap();
        unfinished.push(stream);
    }
    eventually("they have come", async || whole().await.starts_with("HTTP/1.1 503")).await;
    let refused = whole().await;
    assert!(refused.contains("retry-after: ") && refused.contains("overloaded"), "{refused}");
    assert!(read(send(address, "GET", "/health", "").await).await.starts_with("HTTP/1.1 200"));
    let mut last = unfinished.pop().unwrap();
    last.write_all(" ".repeat(10).as_bytes()).await.unwrap();
    eventually("one is whole", async || whole().await.starts_with("HTTP/1.1 400")).await;
    drop(unfinished);
    for _ in 0..40 {
        assert!(whole().await.starts_with("HTTP/1.1 400"), "what was read is not counted any more");
    }
    serving.abort();
}

#[tokio::test]
async fn a_waiting_client_that_hangs_up_is_cancelled() {
    let (fixture, leash) = start_held();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving = tokio::spawn(serve(listener, fixture.server.clone(), std::future::pending()));
    let stream = send(address, "POST", CHAT, &body(false).to_string()).await;
    fixture.asked(1).await;
    drop(stream);
    fixture.cancelled(1).await;
    leash.let_go();
    assert!(fixture.idle().await.generation_tokens < 200);
    serving.abort();
}

#[tokio::test]
async fn a_drain_finishes_what_runs_and_refuses_what_comes() {
    let (fixture, leash) = start_held();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let shutdown = async move { stopped.await.unwrap() };
    let serving = tokio::spawn(serve(listener, fixture.server.clone(), shutdown));
    let running = send(address, "POST", CHAT, &body(true).to_string()).await;
    fixture.asked(1).await;
    stop.send(()).unwrap();
    eventually("it drains", async || fixture.server.is_draining()).await;
    let late = read(send(address, "POST", CHAT, &body(false).to_string()).await).await;
    assert!(late.starts_with("HTTP/1.1 503") && late.contains("retry-after: "), "{late}");
    assert!(read(send(address, "GET", "/ready", "").await).await.starts_with("HTTP/1.1 503"));
    assert!(read(send(address, "GET", "/health", "").await).await.starts_with("HTTP/1.1 200"));
    leash.let_go();
    let answer = read(running).await;
    assert!(answer.contains("\"finish_reason\":\"length\"") && answer.contains("data: [DONE]"), "{answer}");
    assert!(serving.await.unwrap().unwrap(), "all ended by itself");
    assert!(TcpStream::connect(address).await.is_err(), "nobody listens any more");
}

#[tokio::test]
async fn what_outlives_the_grace_is_told_so() {
    let config = ServerConfig { grace: Duration::from_millis(60), ..ServerConfig::new(MODEL) };
    let (manner, leash) = Manner::default().held(PACE);
    let fixture = start_with(config, engine_config(), manner, true);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let shutdown = async move { stopped.await.unwrap() };
    let serving = tokio::spawn(serve(listener, fixture.server.clone(), shutdown));
    let stream = send(address, "POST", CHAT, &body(true).to_string()).await;
    fixture.asked(1).await;
    stop.send(()).unwrap();
    let answer = leash.stepping(read(stream)).await;
    assert!(answer.contains("\"error\":{"), "{answer}");
    assert!(!serving.await.unwrap().unwrap());
}

/// A body that comes after its refusal must not break the connection for the next request.
#[tokio::test]
async fn a_refused_request_leaves_its_connection_usable() {
    let config = ServerConfig { api_keys: vec!["k".into()], ..ServerConfig::new(MODEL) };
    let fixture = start_with(config, engine_config(), Manner::default(), true);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving = tokio::spawn(serve(listener, fixture.server.clone(), std::future::pending()));
    let mut stream = TcpStream::connect(address).await.unwrap();
    for (path, key, status) in [("/v1/nope", "k", "404"), ("/v1/models", "k", "405"), (CHAT, "no", "401")] {
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-length: 2\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(30)).await;
        stream.write_all(b"{}").await.unwrap();
        let mut answer = vec![0; 4096];
        let length = stream.read(&mut answer).await.unwrap();
        let answer = String::from_utf8_lossy(&answer[..length]);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
    }
    serving.abort();
}

#[tokio::test]
async fn a_body_that_stops_coming_is_given_up() {
    let config = ServerConfig { body_pause: Duration::from_millis(50), ..ServerConfig::new(MODEL) };
    let fixture = start_with(config, engine_config(), Manner::default(), true);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving = tokio::spawn(serve(listener, fixture.server.clone(), std::future::pending()));
    for (path, kind) in [
        (CHAT, "invalid_request_error"),
        ("/v1/responses", "invalid_request_error"),
        ("/v1/messages", "timeout_error"),
    ] {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let begun = format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{{\"model\":");
        stream.write_all(begun.as_bytes()).await.unwrap();
        // It closes the connection, too.
        let answer = timeout(PATIENCE, read(stream)).await.expect("it waits for ever");
        assert!(answer.starts_with("HTTP/1.1 408"), "{path}: {answer}");
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        let error = &serde_json::from_str::<Value>(body).unwrap()["error"];
        assert_eq!(error["type"], kind, "{path}: {answer}");
        assert!(error["message"].as_str().unwrap().contains("send the request again"), "{answer}");
    }
    serving.abort();
}
