//! What is measured: a server over HTTP or an engine in this process, asked in the same way.

use crate::args::Endpoint;
use crate::client::{Answer, Client, Fault};
use crate::dist::Random;
use crate::prompt::Fit;
use crate::record::RequestRecord;
use rudder_engine::{Engine, Event, GenerateRequest, SamplingParams};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// What answers requests. Cheap to clone.
#[derive(Clone)]
pub(crate) enum Target {
    /// Over HTTP.
    Server(Client),
    /// In this process.
    Engine(Engine),
}

/// New input of one turn.
#[derive(Debug, Clone)]
pub(crate) enum Input {
    /// For a server.
    Text(String),
    /// For an engine.
    Tokens(Vec<u32>),
}

/// A conversation so far: all that the next turn sends.
#[derive(Debug, Clone, Default)]
pub(crate) struct Conversation {
    text: String,
    messages: Vec<Value>,
    tokens: Vec<u32>,
    /// Tokens asked for so far, for servers that do not count.
    asked: usize,
}

/// One turn: what it adds, and how much it wants back.
#[derive(Debug, Clone)]
pub(crate) struct Turn {
    pub(crate) input: Input,
    /// Tokens that `input` was asked to have.
    pub(crate) tokens: usize,
    /// Tokens to generate.
    pub(crate) output: usize,
}

impl Target {
    /// Input of `tokens` tokens. With `exact`, a server is asked to count them; otherwise
    /// nothing is sent and the length is an estimate.
    pub(crate) async fn input(&self, rng: &mut Random, tokens: usize, exact: bool) -> Input {
        match self {
            Self::Server(client) => {
                let mut fit = Fit::new(rng, tokens, client.tokens_per_piece());
                while exact && let Some(counted) = client.count_tokens(fit.text()).await {
                    if fit.correct(counted) {
                        break;
                    }
                }
                Input::Text(fit.into_text())
            }
            Self::Engine(engine) => {
                Input::Tokens((0..tokens).map(|_| rng.below(engine.vocab_size()) as u32).collect())
            }
        }
    }

    /// Sends the conversation with one more turn and adds the answer to it. Never fails: a fault
    /// is in the record. `start` and the place in the run are the caller's to fill in.
    pub(crate) async fn answer(
        &self,
        conversation: &mut Conversation,
        turn: Turn,
        chunk: &(dyn Fn() + Sync),
    ) -> RequestRecord {
        conversation.asked += turn.tokens;
        match (self, turn.input) {
            (Self::Server(client), Input::Text(text)) => {
                ask_server(client, conversation, text, turn.output, chunk).await
            }
            (Self::Engine(engine), Input::Tokens(tokens)) => {
                conversation.tokens.extend(tokens);
                ask_engine(engine, conversation, turn.output, chunk).await
            }
            _ => unreachable!("a target makes its own inputs"),
        }
    }
}

async fn ask_server(
    client: &Client,
    conversation: &mut Conversation,
    input: String,
    output: usize,
    chunk: &(dyn Fn() + Sync),
) -> RequestRecord {
    let body = match client.endpoint() {
        Endpoint::Completions => {
            conversation.text += &input;
            json!({"prompt": conversation.text})
        }
        Endpoint::Chat => {
            conversation.messages.push(json!({"role": "user", "content": input}));
            json!({"messages": conversation.messages})
        }
    };
    let (answer, fault) = client.send(client.body(body, output), chunk).await;
    let record = record(&answer, fault, conversation.asked);
    conversation.asked += record.output_tokens;
    match client.endpoint() {
        Endpoint::Completions => conversation.text += &answer.text,
        Endpoint::Chat => conversation.messages.push(json!({"role": "assistant", "content": answer.text})),
    }
    record
}

/// What a server's answer shows; `prompt_tokens` stands in for a count that it did not give.
pub(crate) fn record(answer: &Answer, fault: Option<Fault>, prompt_tokens: usize) -> RequestRecord {
    let mut record = RequestRecord {
        chunks: answer.chunks.iter().map(Duration::as_secs_f64).map(microseconds).collect(),
        end: microseconds(answer.end.as_secs_f64()),
        prompt_tokens,
        output_tokens: answer.chunks.len(),
        error: fault.map(|f| f.to_string()),
        ..Default::default()
    };
    if let Some(usage) = &answer.usage {
        record.usage = true;
        record.prompt_tokens = usage.prompt_tokens;
        record.output_tokens = usage.completion_tokens;
        record.cached_tokens =
            usage.prompt_tokens_details.as_ref().and_then(|d| d.cached_tokens).unwrap_or(0);
    }
    record
}

async fn ask_engine(
    engine: &Engine,
    conversation: &mut Conversation,
    output: usize,
    chunk: &(dyn Fn() + Sync),
) -> RequestRecord {
    let greedy = SamplingParams { temperature: 0.0, ..Default::default() };
    let request = GenerateRequest::new(conversation.tokens.as_slice(), greedy, output);
    let sent = Instant::now();
    let mut record =
        RequestRecord { error: Some("the engine ended without a word".into()), ..Default::default() };
    match engine.submit(request) {
        Err(e) => record.error = Some(e.to_string()),
        Ok(mut generation) => {
            while let Some(event) = generation.next().await {
                let now = microseconds(sent.elapsed().as_secs_f64());
                match event {
                    Event::Token(token) => {
                        record.chunks.push(now);
                        conversation.tokens.push(token.id);
                        chunk();
                    }
                    Event::Finished { usage, .. } => {
                        record.error = None;
                        record.usage = true;
                        record.prompt_tokens = usage.prompt_tokens;
                        record.cached_tokens = usage.cached_tokens;
                        record.output_tokens = usage.completion_tokens;
                    }
                    Event::Failed { message } => record.error = Some(message),
                    // No deadline was given.
                    Event::Expired { .. } => {}
                    Event::Queued { .. } | Event::Prefill { .. } | Event::Prompt(_) => {}
                }
            }
        }
    }
    record.end = microseconds(sent.elapsed().as_secs_f64());
    record
}

/// Seconds, rounded to whole microseconds so that results stay small.
pub(crate) fn microseconds(seconds: f64) -> f64 {
    (seconds * 1e6).round() / 1e6
}
