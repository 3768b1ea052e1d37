//! What a follow-up turn costs before any model runs: JSON, template, tokens, submission, prefix lookup.
//!
//! A conversation is grown turn by turn to some length, with the answers that the server gave. What is
//! timed is one more request with a new last message, to its first token, from a model that costs nothing:
//! once with the whole conversation in it (Chat), once with a response's id in its stead (Responses). Then the
//! parts of that time are printed, as the server's metrics tell them.
//! `RUDDER_TEST_MODEL` is the GGUF file whose vocabulary and chat template are used.

use std::path::Path;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use rudder_engine::EngineConfig;
use rudder_model::Gguf;
use rudder_server::ServerConfig;
use rudder_text::{Text, TextSource};
use serde_json::{Value, json};

#[allow(dead_code)]
#[path = "../tests/front/common.rs"]
mod common;
use common::{Fixture, MODEL, Manner};

/// Tokens known before the timed turn.
const LENGTHS: [usize; 3] = [10_000, 50_000, 140_000];
/// Bytes of code that a turn brings in: some 3,000 tokens.
const TURN_BYTES: usize = 12_000;
/// Bytes that the timed turn brings in: some 300 tokens.
const NEW_BYTES: usize = 1_200;
/// Turns over which the parts are averaged.
const PARTED: u64 = 100;

fn start() -> Fixture {
    let path = std::env::var("RUDDER_TEST_MODEL").expect("RUDDER_TEST_MODEL is the path of a GGUF file");
    let engine = EngineConfig {
        kv_blocks: 20_000,
        max_context: 160_000,
        max_batch_tokens: 8192,
        ..common::engine_config()
    };
    common::start_text(ServerConfig::new(MODEL), engine, Manner::default(), text_of(path.as_ref()))
}

/// Vocabulary and chat template of a GGUF file.
fn text_of(path: &Path) -> Text {
    let file = Gguf::open(path).unwrap();
    let key = |key: &str| format!("tokenizer.ggml.{key}");
    let strings = |name: &str| file.strings(&key(name)).unwrap().into_iter().map(Into::into).collect();
    let kinds = file.ints(&key("token_type")).unwrap();
    Text::from_gguf(TextSource {
        model: file.str(&key("model")).unwrap().into(),
        pre: file.str(&key("pre")).map(Into::into),
        tokens: strings("tokens"),
        token_types: kinds.into_iter().map(|kind| kind as i32).collect(),
        merges: strings("merges"),
        eos: file.u32(&key("eos_token_id")),
        chat_template: file.str("tokenizer.chat_template").map(Into::into),
        ..TextSource::default()
    })
    .unwrap()
}

/// Source code, over and over, each stretch under a number of its own.
struct Code {
    text: String,
    at: usize,
    taken: usize,
}

impl Code {
    fn new() -> Self {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src");
        let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect();
        files.retain(|file| file.extension().is_some_and(|extension| extension == "rs"));
        files.sort();
        Self {
            text: files.iter().map(|file| std::fs::read_to_string(file).unwrap()).collect(),
            at: 0,
            taken: 0,
        }
    }

    fn take(&mut self, bytes: usize) -> String {
        let from = self.text.ceil_char_boundary(self.at);
        let until = self.text.ceil_char_boundary(from + bytes);
        self.at = if until == self.text.len() { 7 } else { until };
        self.taken += 1;
        format!("// {}\n{}", self.taken, &self.text[from..until])
    }
}

/// A conversation in one of the dialects.
trait Dialect {
    const PATH: &str;

    /// The request that says one thing more. Of one with an answer of a token nobody asks again.
    fn body(&self, text: String, max_tokens: usize) -> Value;

    /// Takes in what was said and answered; returns the prompt's tokens.
    fn heard(&mut self, said: Value, answer: Value) -> usize;
}

/// Chat: every request carries the conversation.
#[derive(Default)]
struct Chat {
    messages: Vec<Value>,
}

impl Dialect for Chat {
    const PATH: &str = "/v1/chat/completions";

    fn body(&self, text: String, max_tokens: usize) -> Value {
        let said = json!({"role": "user", "content": text});
        let messages: Vec<&Value> = self.messages.iter().chain([&said]).collect();
        json!({"model": MODEL, "messages": messages, "max_tokens": max_tokens, "temperature": 0})
    }

    fn heard(&mut self, mut said: Value, mut answer: Value) -> usize {
        self.messages.extend(said["messages"].as_array_mut().unwrap().pop());
        let answered = answer["choices"][0]["message"]["content"].take();
        self.messages.push(json!({"role": "assistant", "content": answered}));
        answer["usage"]["prompt_tokens"].as_u64().unwrap() as usize
    }
}

/// Responses: every request names the response before it.
#[derive(Default)]
struct Chain {
    last: Option<String>,
}

impl Dialect for Chain {
    const PATH: &str = "/v1/responses";

    fn body(&self, text: String, max_tokens: usize) -> Value {
        json!({"model": MODEL, "input": text, "previous_response_id": self.last, "max_output_tokens": max_tokens,
            "temperature": 0, "store": max_tokens > 1})
    }

    fn heard(&mut self, _: Value, answer: Value) -> usize {
        self.last = Some(answer["id"].as_str().unwrap().to_owned());
        answer["usage"]["input_tokens"].as_u64().unwrap() as usize
    }
}

async fn post(server: &Fixture, path: &str, body: Vec<u8>) -> Value {
    let answer = server.post_bytes(path, body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

/// Adds turns to a conversation until it has so many tokens.
async fn grow<D: Dialect>(server: &Fixture, conversation: &mut D, code: &mut Code, length: usize) {
    loop {
        let said = conversation.body(code.take(TURN_BYTES), 16);
        let answer = post(server, D::PATH, said.to_string().into_bytes()).await;
        if conversation.heard(said, answer) >= length {
            return;
        }
    }
}

/// Asks so many times for a next turn, which the conversation then forgets; returns the time it took.
async fn ask<D: Dialect>(server: &Fixture, conversation: &D, code: &mut Code, times: u64) -> Duration {
    let mut spent = Duration::ZERO;
    for _ in 0..times {
        let body = conversation.body(code.take(NEW_BYTES), 1).to_string().into_bytes();
        let begun = Instant::now();
        post(server, D::PATH, body).await;
        spent += begun.elapsed();
    }
    spent
}

/// Sum in seconds of a histogram of the server's metrics.
async fn seconds(server: &Fixture, histogram: &str, label: &str) -> f64 {
    let metrics = server.get("/metrics").await.text();
    let name = format!("{histogram}_sum{{");
    let line = metrics.lines().find(|line| line.starts_with(&name) && line.contains(label)).unwrap();
    line.rsplit_once(' ').unwrap().1.parse().unwrap()
}

/// Prints where the time of a next turn goes.
async fn print_parts<D: Dialect>(server: &Fixture, conversation: &D, code: &mut Code, length: usize) {
    const STAGE: &str = "rudder_request_preparation_seconds";
    let parts = [
        ("read the request", STAGE, "stage=\"read\""),
        ("render the template", STAGE, "stage=\"render\""),
        ("tokenize", STAGE, "stage=\"tokenize\""),
        ("submit, find the prefix", "rudder_request_queue_time_seconds", ""),
    ];
    let mut before = Vec::new();
    for (_, histogram, label) in parts {
        before.push(seconds(server, histogram, label).await);
    }
    let mut rest = ask(server, conversation, code, PARTED).await.as_secs_f64();
    print!("{} at {length}, microseconds:", D::PATH);
    for ((part, histogram, label), before) in parts.into_iter().zip(before) {
        let took = seconds(server, histogram, label).await - before;
        rest -= took;
        print!(" {part} {:.0};", took / PARTED as f64 * 1e6);
    }
    println!(" the rest {:.0}", rest / PARTED as f64 * 1e6);
}

fn follow_ups<D: Dialect + Default>(criterion: &mut Criterion, name: &str) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let server = runtime.block_on(async { start() });
    let mut group = criterion.benchmark_group(name);
    group.sample_size(20).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(5));
    let (mut conversation, mut code) = (D::default(), Code::new());
    for length in LENGTHS {
        runtime.block_on(grow(&server, &mut conversation, &mut code, length));
        group.bench_function(BenchmarkId::from_parameter(length), |bencher| {
            bencher.iter_custom(|times| runtime.block_on(ask(&server, &conversation, &mut code, times)));
        });
        runtime.block_on(print_parts(&server, &conversation, &mut code, length));
    }
    group.finish();
}

fn chat(criterion: &mut Criterion) {
    follow_ups::<Chat>(criterion, "follow-up turn, Chat");
}

fn chain(criterion: &mut Criterion) {
    follow_ups::<Chain>(criterion, "follow-up turn, previous_response_id");
}

criterion_group!(benches, chat, chain);
criterion_main!(benches);
