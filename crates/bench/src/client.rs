//! The HTTP client: sends a prompt to an OpenAI-compatible server and clocks the streamed answer.

use crate::args::{Endpoint, ServeArgs};
use crate::dist::Random;
use crate::prompt::{CodeText, TOKENS_PER_PIECE};
use crate::sse;
use anyhow::{Context, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::header::HeaderValue;
use hyper::http::request::Builder;
use hyper::{Request, Response, StatusCode, Uri};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use serde::Deserialize;
use serde_json::{Value, json};
use std::error::Error;
use std::time::{Duration, Instant};

/// A server, and how its prompts are measured. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    http: hyper_util::client::legacy::Client<HttpConnector, Full<Bytes>>,
    base: String,
    model: String,
    /// The `authorization` header, if there is a key.
    authorization: Option<HeaderValue>,
    endpoint: Endpoint,
    respect_eos: bool,
    timeout: Duration,
    /// Whether the server counts tokens for us.
    tokenize: bool,
    tokens_per_piece: f64,
}

/// Why a request failed. The message is what the report says.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    /// No connection, or it broke before an answer began.
    #[error("no answer: {0}")]
    Connect(String),
    /// The server answered with another status than 200.
    #[error("HTTP {0}: {1}")]
    Status(StatusCode, String),
    /// The answer broke off.
    #[error("the stream was cut: {0}")]
    Cut(String),
    /// The server reported an error in the stream.
    #[error("error in the stream: {0}")]
    Server(String),
    /// The answer is not what the API says.
    #[error("not understood: {0}")]
    Protocol(String),
    /// `--timeout` is over.
    #[error("no end after {} s", .0.as_secs_f64())]
    Timeout(Duration),
}

/// An answer as far as it came. Times are from the sending.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    pub(crate) text: String,
    /// When each chunk with output arrived.
    pub(crate) chunks: Vec<Duration>,
    /// When the last event arrived.
    pub(crate) end: Duration,
    pub(crate) usage: Option<Usage>,
    finished: bool,
}

/// OpenAI's `usage`.
#[derive(Debug, Clone, Default, Deserialize)]
pub(crate) struct Usage {
    #[serde(default)]
    pub(crate) prompt_tokens: usize,
    #[serde(default)]
    pub(crate) completion_tokens: usize,
    #[serde(default)]
    pub(crate) prompt_tokens_details: Option<PromptTokensDetails>,
}

/// OpenAI's `usage.prompt_tokens_details`.
#[derive(Debug, Clone, Default, Deserialize)]
pub(crate) struct PromptTokensDetails {
    #[serde(default)]
    pub(crate) cached_tokens: Option<usize>,
}

/// One event of either route's stream.
#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice {
    text: Option<String>,
    delta: Option<Delta>,
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Delta {
    content: Option<String>,
    /// The reasoning's two names; some servers send both.
    reasoning_content: Option<String>,
    reasoning: Option<String>,
}

/// Most bytes of an answer that is not a stream: token lists of long prompts fit.
const MAX_BODY: usize = 64 << 20;

impl Client {
    /// A server that is not asked anything yet; without `model`, [`Client::find_model`] is to be called.
    pub(crate) fn new(
        url: &str,
        model: Option<String>,
        api_key: Option<&str>,
        endpoint: Endpoint,
        respect_eos: bool,
        timeout: f64,
    ) -> anyhow::Result<Self> {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let http = hyper_util::client::legacy::Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            // Shorter than any server's keep-alive, so that none closes a connection being reused.
            .pool_idle_timeout(Duration::from_secs(2))
            .build(connector);
        Ok(Self {
            http,
            base: base_url(url)?,
            model: model.unwrap_or_default(),
            authorization: api_key.map(bearer).transpose()?,
            endpoint,
            respect_eos,
            timeout: Duration::from_secs_f64(timeout),
            tokenize: true,
            tokens_per_piece: TOKENS_PER_PIECE,
        })
    }

    /// Finds the server's model and how to make prompts of a known length for it.
    pub(crate) async fn connect(args: &ServeArgs) -> anyhow::Result<Self> {
        let (model, key) = (args.model.clone(), args.api_key.as_deref());
        let mut client = Self::new(&args.url, model, key, args.endpoint, args.respect_eos, args.timeout)?;
        client.find_model().await?;
        client.calibrate().await;
        Ok(client)
    }

    /// Takes the first model that the server lists, unless one was named.
    pub(crate) async fn find_model(&mut self) -> anyhow::Result<()> {
        if self.model.is_empty() {
            self.model = self.first_model().await?;
        }
        Ok(())
    }

    /// The model that requests name.
    pub(crate) fn model(&self) -> &str {
        &self.model
    }

    /// Which route is loaded.
    pub(crate) fn endpoint(&self) -> Endpoint {
        self.endpoint
    }

    /// Tokens in a piece of [`CodeText`].
    pub(crate) fn tokens_per_piece(&self) -> f64 {
        self.tokens_per_piece
    }

    async fn first_model(&self) -> anyhow::Result<String> {
        let url = format!("{}/v1/models", self.base);
        let answer = self.json(&url, None).await;
        let answer = answer.with_context(|| format!("cannot read {url}; is a server running there?"))?;
        match answer["data"][0]["id"].as_str() {
            Some(id) => Ok(id.to_string()),
            None => bail!("{url} lists no model; name one with --model"),
        }
    }

    /// Learns how many tokens a piece of text has: from the server's /tokenize, or else from the
    /// usage of two prompts, whose difference leaves the chat template out.
    async fn calibrate(&mut self) {
        let mut code = CodeText::new(&mut Random::new(0, 0));
        if let Some(tokens) = self.count_tokens(&code.take(LONG)).await {
            self.tokens_per_piece = (tokens as f64 / LONG as f64).max(0.1);
            return;
        }
        self.tokenize = false;
        let mut counts = [0.0; 2];
        for (count, pieces) in counts.iter_mut().zip([SHORT, LONG]) {
            let body = match self.endpoint {
                Endpoint::Completions => self.body(json!({"prompt": code.take(pieces)}), 1),
                Endpoint::Chat => {
                    self.body(json!({"messages": [{"role": "user", "content": code.take(pieces)}]}), 1)
                }
            };
            let (answer, fault) = self.send(body, &|| ()).await;
            let Some(usage) = answer.usage.filter(|_| fault.is_none()) else {
                eprintln!("the server counts no tokens (neither /tokenize nor usage): lengths are estimates");
                return;
            };
            *count = usage.prompt_tokens as f64;
        }
        self.tokens_per_piece = ((counts[1] - counts[0]) / (LONG - SHORT) as f64).max(0.1);
    }

    /// The server's own count of a text's tokens, if it gives one. vLLM and Rudder want `prompt`,
    /// llama.cpp wants `content`.
    pub(crate) async fn count_tokens(&self, text: &str) -> Option<usize> {
        if !self.tokenize {
            return None;
        }
        let body = json!({"model": self.model, "prompt": text, "content": text, "add_special_tokens": false});
        let answer = self.json(&format!("{}/tokenize", self.base), Some(body)).await.ok()?;
        answer["tokens"].as_array().map(Vec::len).or_else(|| answer["count"].as_u64().map(|n| n as usize))
    }

    /// The body of a generation request; `input` holds `prompt` or `messages`.
    pub(crate) fn body(&self, mut input: Value, max_tokens: usize) -> Value {
        input["model"] = json!(self.model);
        input["max_tokens"] = json!(max_tokens);
        input["temperature"] = json!(0);
        input["stream"] = json!(true);
        input["stream_options"] = json!({"include_usage": true});
        if !self.respect_eos {
            input["ignore_eos"] = json!(true);
        }
        input
    }

    /// Sends a generation request and reads its answer to the end. `chunk` is called at each
    /// chunk with output. What came before a fault is kept.
    pub(crate) async fn send(&self, body: Value, chunk: &(dyn Fn() + Sync)) -> (Answer, Option<Fault>) {
        let route = match self.endpoint {
            Endpoint::Completions => "/v1/completions",
            Endpoint::Chat => "/v1/chat/completions",
        };
        let request = match self.post(&format!("{}{route}", self.base), &body) {
            Ok(request) => request,
            Err(e) => return (Answer::default(), Some(Fault::Protocol(e.to_string()))),
        };
        let mut answer = Answer::default();
        let sent = Instant::now();
        let read = self.read_stream(request, sent, &mut answer, chunk);
        let fault = match tokio::time::timeout(self.timeout, read).await {
            Ok(result) => result.err(),
            Err(_) => Some(Fault::Timeout(self.timeout)),
        };
        if fault.is_some() {
            answer.end = sent.elapsed();
        }
        (answer, fault)
    }

    /// Sends a request. Some servers close a kept connection without a word, so a request that
    /// breaks before any answer is sent once more, as ordinary clients do; its clock runs on.
    async fn exchange(
        &self,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, hyper_util::client::legacy::Error> {
        match self.http.request(request.clone()).await {
            Err(e) if !e.is_connect() => self.http.request(request).await,
            result => result,
        }
    }

    async fn read_stream(
        &self,
        request: Request<Full<Bytes>>,
        sent: Instant,
        answer: &mut Answer,
        chunk: &(dyn Fn() + Sync),
    ) -> Result<(), Fault> {
        let mut response = self.exchange(request).await.map_err(|e| Fault::Connect(chain(&e)))?;
        if response.status() != StatusCode::OK {
            return Err(Fault::Status(response.status(), excerpt(response).await));
        }
        let (mut parser, mut done) = (sse::Parser::default(), false);
        while let Some(frame) = response.frame().await {
            let now = sent.elapsed();
            let frame = match frame {
                Ok(frame) => frame,
                Err(_) if done => break,
                Err(e) => return Err(Fault::Cut(chain(&e))),
            };
            let Some(data) = frame.data_ref() else { continue };
            parser.push(data, |event| {
                if event == b"[DONE]" {
                    done = true;
                    answer.end = now;
                    return Ok(());
                }
                if answer.take_event(event, now)? {
                    chunk();
                }
                Ok(())
            })?;
        }
        if done || answer.finished { Ok(()) } else { Err(Fault::Cut("it ended without [DONE]".into())) }
    }

    fn post(&self, url: &str, body: &Value) -> anyhow::Result<Request<Full<Bytes>>> {
        let request = self.with_key(Request::post(url)).header("content-type", "application/json");
        Ok(request.body(Full::new(Bytes::from(serde_json::to_vec(body)?)))?)
    }

    fn with_key(&self, request: Builder) -> Builder {
        match &self.authorization {
            Some(authorization) => request.header("authorization", authorization),
            None => request,
        }
    }

    /// A plain JSON exchange: GET, or POST with a body.
    async fn json(&self, url: &str, body: Option<Value>) -> anyhow::Result<Value> {
        let request = match &body {
            Some(body) => self.post(url, body)?,
            None => self.with_key(Request::get(url)).body(Full::default())?,
        };
        let exchange = async {
            let response = self.exchange(request).await.map_err(|e| anyhow::anyhow!(chain(&e)))?;
            if response.status() != StatusCode::OK {
                bail!("HTTP {}: {}", response.status(), excerpt(response).await);
            }
            let body = Limited::new(response.into_body(), MAX_BODY).collect().await;
            let body = body.map_err(|e| anyhow::anyhow!("the answer broke off: {e}"))?.to_bytes();
            Ok(serde_json::from_slice(&body)?)
        };
        tokio::time::timeout(self.timeout, exchange).await.context("no answer in time")?
    }
}

/// Pieces of the prompts that calibrate.
const SHORT: usize = 40;
const LONG: usize = 400;

impl Answer {
    /// Takes one event's data; says whether it carried output.
    fn take_event(&mut self, data: &[u8], now: Duration) -> Result<bool, Fault> {
        let chunk: Chunk = serde_json::from_slice(data)
            .map_err(|e| Fault::Protocol(format!("{e} in {}", shorten(&String::from_utf8_lossy(data)))))?;
        if let Some(error) = chunk.error {
            let message = error["message"].as_str().map_or_else(|| error.to_string(), String::from);
            return Err(Fault::Server(shorten(&message)));
        }
        self.end = now;
        if chunk.usage.is_some() {
            self.usage = chunk.usage;
        }
        let Some(choice) = chunk.choices.into_iter().next() else { return Ok(false) };
        self.finished |= choice.finish_reason.is_some();
        let (content, reasoning) = match choice.delta {
            Some(delta) => (delta.content, [delta.reasoning_content, delta.reasoning]),
            None => (choice.text, [None, None]),
        };
        let content = content.unwrap_or_default();
        let output = !content.is_empty() || reasoning.into_iter().flatten().any(|r| !r.is_empty());
        self.text += &content;
        if output {
            self.chunks.push(now);
        }
        Ok(output)
    }
}

/// The address without a trailing slash or `/v1`.
fn base_url(url: &str) -> anyhow::Result<String> {
    let base = url.trim_end_matches('/');
    let base = base.strip_suffix("/v1").unwrap_or(base);
    let uri: Uri = base.parse().with_context(|| format!("--url {url} is not an address"))?;
    match (uri.scheme_str(), uri.host()) {
        (Some("http"), Some(_)) => Ok(base.to_string()),
        _ => bail!("--url {url} must be like http://127.0.0.1:8000 (plain http)"),
    }
}

/// The header that a key goes by, the first where the server's own variable holds several. The key shows in no message.
fn bearer(keys: &str) -> anyhow::Result<HeaderValue> {
    let key = keys.split(',').next().unwrap_or(keys).trim();
    let header = HeaderValue::try_from(format!("Bearer {key}"));
    let mut header = header.ok().context("--api-key holds control characters, which no header can")?;
    header.set_sensitive(true);
    Ok(header)
}

/// The beginning of an error's body; OpenAI's `error.message` if it has one.
async fn excerpt(response: Response<Incoming>) -> String {
    let Ok(body) = Limited::new(response.into_body(), MAX_BODY).collect().await else {
        return "the body could not be read".into();
    };
    let body = body.to_bytes();
    match serde_json::from_slice::<Value>(&body) {
        Ok(value) if value["error"]["message"].is_string() => {
            shorten(value["error"]["message"].as_str().unwrap_or_default())
        }
        _ => shorten(&String::from_utf8_lossy(&body)),
    }
}

fn shorten(text: &str) -> String {
    let mut short: String = text.trim().chars().take(200).collect();
    if short.len() < text.trim().len() {
        short.push('…');
    }
    short
}

/// An error with its causes.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        let e_text = e.to_string();
        if !text.contains(&e_text) {
            text += &format!(": {e_text}");
        }
        cause = e.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasoning_is_output_under_either_name_and_under_both() {
        for (delta, output) in [
            (json!({"reasoning": "x"}), true),
            (json!({"reasoning_content": "x"}), true),
            (json!({"reasoning": "x", "reasoning_content": "x"}), true),
            (json!({"reasoning": "x", "reasoning_content": ""}), true),
            (json!({"reasoning": null, "reasoning_content": ""}), false),
        ] {
            let event = json!({"choices": [{"delta": delta}]}).to_string();
            let mut answer = Answer::default();
            let told = answer.take_event(event.as_bytes(), Duration::ZERO).map_err(|fault| fault.to_string());
            assert_eq!((told, answer.chunks.len()), (Ok(output), usize::from(output)), "{event}");
        }
    }
}
