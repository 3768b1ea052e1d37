//! A server that answers well, badly or not at all.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Bodies of requests.
pub type Bodies = Arc<Mutex<Vec<serde_json::Value>>>;

/// What the server does with a generation request.
#[derive(Clone, Copy, PartialEq)]
pub enum Deed {
    Answer,
    AnswerWithoutUsage,
    /// Answers whoever sends the key `secret`.
    AnswerToKey,
    Fail500,
    Cut,
    Garbage,
    ErrorEvent,
    Hang,
}

/// A server whose n-th generation request meets `deeds[n % deeds.len()]`; one connection each.
pub async fn server(deeds: Vec<Deed>) -> SocketAddr {
    recording(deeds).await.0
}

/// The same, and the bodies of the generation requests it got, in the order they came.
pub async fn recording(deeds: Vec<Deed>) -> (SocketAddr, Bodies) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let bodies = Bodies::default();
    let heard = bodies.clone();
    tokio::spawn(async move {
        let generations = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        while let Ok((stream, _)) = listener.accept().await {
            let (deeds, generations, heard) = (deeds.clone(), generations.clone(), heard.clone());
            tokio::spawn(async move {
                let next = || generations.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                let _ = handle(stream, &deeds, next, &heard).await;
            });
        }
    });
    (address, bodies)
}

async fn handle(
    mut stream: TcpStream,
    deeds: &[Deed],
    next: impl Fn() -> usize,
    heard: &Bodies,
) -> std::io::Result<()> {
    let (head, body) = read_request(&mut stream).await?;
    let knows_key = head.lines().any(|line| line.eq_ignore_ascii_case("authorization: bearer secret"));
    if deeds.contains(&Deed::AnswerToKey) && !knows_key {
        return plain(&mut stream, "401 Unauthorized", "no key").await;
    }
    if head.starts_with("GET /v1/models ") {
        return plain(&mut stream, "200 OK", r#"{"data":[{"id":"tiny"}]}"#).await;
    }
    if !head.starts_with("POST /v1/") {
        return plain(&mut stream, "404 Not Found", "no such route").await;
    }
    let body: serde_json::Value = serde_json::from_slice(&body)?;
    assert_eq!((&body["ignore_eos"], &body["temperature"]), (&true.into(), &0.into()));
    heard.lock().unwrap().push(body.clone());
    let tokens = body["max_tokens"].as_u64().unwrap_or(0);
    let words = body.to_string().split_whitespace().count();
    match deeds[next() % deeds.len()] {
        Deed::Answer | Deed::AnswerToKey => answer(&mut stream, tokens, Some(words)).await,
        Deed::AnswerWithoutUsage => answer(&mut stream, tokens, None).await,
        Deed::Fail500 => {
            plain(&mut stream, "500 Internal Server Error", r#"{"error":{"message":"it broke"}}"#).await
        }
        Deed::Cut => {
            begin(&mut stream).await?;
            chunk(&mut stream, "data: {\"choices\":[{\"text\":\"a\"}]}\n\ndata: {\"choi").await
        }
        Deed::Garbage => {
            begin(&mut stream).await?;
            chunk(&mut stream, "data: {not json}\n\n").await
        }
        Deed::ErrorEvent => {
            begin(&mut stream).await?;
            chunk(&mut stream, "data: {\"error\":{\"message\":\"out of blocks\"}}\n\n").await
        }
        Deed::Hang => {
            tokio::time::sleep(Duration::from_secs(60)).await;
            Ok(())
        }
    }
}

async fn read_request(stream: &mut TcpStream) -> std::io::Result<(String, Vec<u8>)> {
    let mut bytes = Vec::new();
    loop {
        if let Some(end) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
            let length =
                head.lines().find_map(|l| l.to_lowercase().strip_prefix("content-length: ")?.parse().ok());
            let mut body = bytes.split_off(end + 4);
            let have = body.len();
            body.resize(length.unwrap_or(0).max(have), 0);
            stream.read_exact(&mut body[have..]).await?;
            return Ok((head, body));
        }
        if stream.read_buf(&mut bytes).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
}

async fn plain(stream: &mut TcpStream, status: &str, body: &str) -> std::io::Result<()> {
    let length = body.len();
    let text = format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}");
    stream.write_all(text.as_bytes()).await
}

async fn begin(stream: &mut TcpStream) -> std::io::Result<()> {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).await
}

async fn chunk(stream: &mut TcpStream, data: &str) -> std::io::Result<()> {
    stream.write_all(format!("{:x}\r\n{data}\r\n", data.len()).as_bytes()).await
}

async fn answer(stream: &mut TcpStream, tokens: u64, prompt_tokens: Option<usize>) -> std::io::Result<()> {
    begin(stream).await?;
    chunk(stream, ": keep-alive\n\n").await?;
    tokio::time::sleep(Duration::from_millis(20)).await;
    for _ in 0..tokens {
        chunk(stream, "data: {\"choices\":[{\"text\":\" w\",\"delta\":{\"content\":\" w\"}}]}\n\n").await?;
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    chunk(stream, "data: {\"choices\":[{\"text\":\"\",\"finish_reason\":\"length\"}]}\n\n").await?;
    if let Some(prompt) = prompt_tokens {
        let usage = format!("{{\"prompt_tokens\":{prompt},\"completion_tokens\":{tokens}}}");
        chunk(stream, &format!("data: {{\"choices\":[],\"usage\":{usage}}}\n\n")).await?;
    }
    chunk(stream, "data: [DONE]\n\n").await?;
    stream.write_all(b"0\r\n\r\n").await
}
