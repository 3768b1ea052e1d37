//! What a follow-up turn costs before any model runs: JSON, template, tokens, submission, prefix lookup.
//!
//! A conversation is grown turn by turn to some length, with the answers that the server gave. What is
//! timed is one more request with a new last message, to its first token, from a model that costs nothing.
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

fn ask(messages: &[Value], max_tokens: usize) -> String {
    json!({"model": MODEL, "messages": messages, "max_tokens": max_tokens, "temperature": 0}).to_string()
}

async fn post(server: &Fixture, body: String) -> (String, usize) {
    let answer = server.post_bytes("/v1/chat/completions", body.into_bytes()).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let answer = answer.json();
    let text = answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    (text, answer["usage"]["prompt_tokens"].as_u64().unwrap() as usize)
}

/// Adds turns to a conversation until it has so many tokens.
async fn grow(server: &Fixture, messages: &mut Vec<Value>, code: &mut Code, length: usize) {
    loop {
        messages.push(json!({"role": "user", "content": code.take(TURN_BYTES)}));
        let (answer, tokens) = post(server, ask(messages, 16)).await;
        messages.push(json!({"role": "assistant", "content": answer}));
        if tokens >= length {
            return;
        }
    }
}

fn follow_up(criterion: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let server = runtime.block_on(async { start() });
    let mut group = criterion.benchmark_group("follow-up turn");
    group.sample_size(20).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(5));
    let (mut messages, mut code) = (Vec::new(), Code::new());
    for length in LENGTHS {
        runtime.block_on(grow(&server, &mut messages, &mut code, length));
        group.bench_function(BenchmarkId::from_parameter(length), |bencher| {
            bencher.iter_custom(|iterations| {
                let mut spent = Duration::ZERO;
                for _ in 0..iterations {
                    messages.push(json!({"role": "user", "content": code.take(NEW_BYTES)}));
                    let body = ask(&messages, 1);
                    messages.pop();
                    let begun = Instant::now();
                    runtime.block_on(post(&server, body));
                    spent += begun.elapsed();
                }
                spent
            });
        });
    }
    group.finish();
}

criterion_group!(benches, follow_up);
criterion_main!(benches);
