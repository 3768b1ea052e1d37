//! A server over a real engine and tokenizer, with a model that recites a text by heart.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Request, StatusCode, response};
use http_body_util::BodyExt;
use rudder_engine::{DraftMode, Engine, EngineConfig, Stats};
use rudder_model::{Model, ModelConfig};
use rudder_ops::{
    AttentionShape, Batch, OpError, Rope, RopePairing, SampleRow, Sampled, SamplerScratch, sample_row,
};
use rudder_server::{Server, ServerConfig, router};
use rudder_text::{Text, TextSource};
use serde_json::Value;
use tokio::time::{sleep, timeout};
use tower::ServiceExt;

pub const MODEL: &str = "tiny";
/// What the model recites, a byte a token, from the prompt's length on, over and over.
pub const SCRIPT: &str = "fn main() { println!(\"héllo, wörld\"); }\n// and so on\n";
pub const CONTEXT: usize = 512;
/// More than anything takes that does not hang.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// How often a held model may take a step, where nothing depends on it.
pub const PACE: Duration = Duration::from_millis(1);
const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
                        {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
/// The same for a model that calls tools in Hermes' markup and reasons in `<think>`.
const AGENT_TEMPLATE: &str = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}\
    {% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\
    {% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}\
    <|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}\
    {# <think> #}";
/// A template as gpt-oss has it: the name that a result is shown with is the last call's, of which a message has one,
/// and only the first message is the system's.
const HARMONY_TEMPLATE: &str = "{% if tools %}{{ tools | tojson }}{% endif %}{% set call = namespace(name=none) %}\
    {% if messages[0].role == 'system' %}<|start|>developer<|message|>{{ messages[0].content }}<|end|>{% endif %}\
    {% for m in messages %}{% if m.role == 'assistant' and 'tool_calls' in m %}{% set f = m.tool_calls[0].function %}\
    <|start|>assistant to=functions.{{ f.name }}<|channel|>commentary json<|message|>{{ f.arguments | tojson }}<|call|>\
    {% set call.name = f.name %}{% elif m.role == 'tool' %}\
    {% if call.name is none %}{{ raise_exception('a result without a call') }}{% endif %}\
    <|start|>functions.{{ call.name }} to=assistant<|channel|>commentary<|message|>{{ m.content | tojson }}<|end|>\
    {% elif m.role in ['user', 'assistant'] %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}\
    {% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}";
/// The same for a model that does not reason.
const CALLING_TEMPLATE: &str = "{% if tools %}{{ tools | tojson }}{% endif %}\
    {% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{# <tool_call> #}";
/// The same for a model that reasons first; it calls no tools.
const REASONING_TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}";
/// The same for a model that reasons unless it is told not to, as hard as it is told to.
const HYBRID_TEMPLATE: &str = "{% if reasoning_effort is defined %}<|im_start|>system\nReasoning: {{ reasoning_effort }}<|im_end|>\n{% endif %}\
    {% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n\
    {% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}";
const SPECIALS: [&str; 6] =
    ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"];

/// Bytes' characters in GPT-2's byte-level alphabet, in byte order.
fn byte_tokens() -> Vec<String> {
    let printable = |b: u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut next = 0x100;
    let mut character = |byte: u32| {
        if printable(byte) {
            return byte;
        }
        next += 1;
        next - 1
    };
    (0..256).map(|byte| char::from_u32(character(byte)).unwrap().to_string()).collect()
}

/// Token `b` is byte `b`; the specials follow.
pub fn text(infill: bool) -> Text {
    text_with(infill, TEMPLATE, &[])
}

/// The same of a model that begins every text with `<|im_start|>`.
pub fn beginning_text() -> Text {
    let source = source(true, TEMPLATE, &[]);
    Text::from_gguf(TextSource { bos: Some(257), add_bos: Some(true), ..source }).unwrap()
}

/// The same of a SentencePiece model: token 259 is an `a` with a space before it.
pub fn spaced_text() -> Text {
    let mut tokens: Vec<String> = (0..256).map(|byte| format!("<0x{byte:02X}>")).collect();
    tokens.extend(["<unk>", "<s>", "</s>", "▁a", "▁", "a", "b"].map(String::from));
    let kind = |index: usize| match index {
        0..256 => 6,
        256 => 2,
        257 | 258 => 3,
        _ => 1,
    };
    Text::from_gguf(TextSource {
        model: "llama".into(),
        token_types: (0..tokens.len()).map(kind).collect(),
        scores: vec![0.0; tokens.len()],
        tokens,
        eos: Some(258),
        ..TextSource::default()
    })
    .unwrap()
}

/// The same with another template, and tokens for these marks.
fn text_with(infill: bool, template: &str, marks: &[&str]) -> Text {
    Text::from_gguf(source(infill, template, marks)).unwrap()
}

fn source(infill: bool, template: &str, marks: &[&str]) -> TextSource {
    let mut tokens = byte_tokens();
    let count = if infill { 6 } else { 3 };
    tokens.extend(SPECIALS[..count].iter().map(|&token| token.to_owned()));
    tokens.extend(marks.iter().map(|&mark| mark.to_owned()));
    let token_types =
        tokens.iter().map(|token| if token.chars().count() == 1 { 1 } else { 3 }).chain([1]).collect();
    // A vocabulary needs a merge: that of two NULs, which no test sends.
    let nul = tokens[0].clone();
    tokens.push(nul.repeat(2));
    let special = |index: u32| infill.then_some(256 + index);
    TextSource {
        model: "gpt2".into(),
        pre: Some("qwen2".into()),
        tokens,
        token_types,
        merges: vec![format!("{nul} {nul}")],
        eos: Some(258),
        fim_prefix: special(3),
        fim_suffix: special(4),
        fim_middle: special(5),
        chat_template: Some(template.into()),
        ..TextSource::default()
    }
}

/// How the model behaves.
#[derive(Default)]
pub struct Manner {
    /// Every step takes this long.
    pub step: Duration,
    /// Every step waits for one of these, until no more can come.
    pub grants: Option<Receiver<()>>,
    /// While set, every step fails.
    pub failing: Arc<AtomicBool>,
    /// Ends the turn at this position.
    pub end_at: Option<u64>,
    /// Says these instead, one after the other, each to its end of turn; for one sequence at a time.
    pub answers: Vec<String>,
}

impl Manner {
    /// The same on a leash, with at most a step every `pace`.
    pub fn held(self, pace: Duration) -> (Self, Leash) {
        // Without room for any, no step is granted before it is waited for.
        let (sender, grants) = sync_channel(0);
        (Self { grants: Some(grants), ..self }, Leash { grants: sender, pace })
    }
}

/// Holds a model before each of its steps, however long its test takes. Dropped, it lets go.
pub struct Leash {
    grants: SyncSender<()>,
    pace: Duration,
}

impl Leash {
    /// Grants step after step until this is over.
    pub async fn stepping<T>(&self, this: impl Future<Output = T>) -> T {
        let mut this = pin!(this);
        loop {
            match timeout(self.pace, this.as_mut()).await {
                Ok(output) => return output,
                // Refused where the model does not wait for it.
                Err(_) => drop(self.grants.try_send(())),
            }
        }
    }

    /// From here on the model runs as fast as it can.
    pub fn let_go(self) {}
}

/// Waits until this holds.
pub async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let polled = async {
        while !holds().await {
            sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(PATIENCE, polled).await.unwrap_or_else(|_| panic!("{what}: it did not come about"));
}

struct Reciter {
    config: ModelConfig,
    manner: Manner,
    scratch: SamplerScratch,
    /// Of the answer being given: its number, where it began, and where the last row was.
    answer: Option<(usize, u64, u64)>,
}

impl Reciter {
    /// The byte of an answer at a position, or the end of the turn. A gap begins the next answer.
    fn answer_token(&mut self, position: u64) -> usize {
        let (number, begin) = match self.answer {
            // A draw may be taken back, where the grammar goes on without one.
            Some((number, begin, last)) if position == last || position == last + 1 => (number, begin),
            Some((number, ..)) => (number + 1, position),
            None => (0, position),
        };
        self.answer = Some((number, begin, position));
        let answer = &self.manner.answers[number % self.manner.answers.len()];
        answer.as_bytes().get((position - begin) as usize).map_or(258, |&byte| byte.into())
    }

    fn row_logits(&mut self, position: u64) -> Vec<f32> {
        let mut logits = vec![0.0; self.config.vocab];
        if !self.manner.answers.is_empty() {
            // Told apart by their places.
            logits[self.answer_token(position)] = 9.0 + (position % 100) as f32 / 100.0;
            return logits;
        }
        let script = SCRIPT.as_bytes();
        let said = match self.manner.end_at {
            Some(end) if position >= end => 258,
            _ => usize::from(script[position as usize % script.len()]),
        };
        logits[said] = 9.0;
        logits
    }
}

impl Model for Reciter {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn forward(&mut self, _batch: &Batch) -> Result<(), OpError> {
        if let Some(grants) = &self.manner.grants {
            // An error: it was let go.
            let _ = grants.recv();
        }
        std::thread::sleep(self.manner.step);
        match self.manner.failing.load(Ordering::SeqCst) {
            true => Err(OpError::Backend("a fault for the test".into())),
            false => Ok(()),
        }
    }

    fn sample(&mut self, rows: &[SampleRow<'_>], out: &mut Vec<Sampled>) -> Result<(), OpError> {
        for row in rows {
            let mut logits = self.row_logits(row.position);
            out.push(sample_row(&mut logits, row, &mut self.scratch));
        }
        Ok(())
    }

    fn logits(&mut self) -> Result<Vec<f32>, OpError> {
        Ok(Vec::new())
    }
}

/// A server under test.
#[derive(Clone)]
pub struct Fixture {
    pub router: Router,
    pub server: Arc<Server>,
    pub engine: Engine,
    pub text: Text,
}

pub fn engine_config() -> EngineConfig {
    EngineConfig {
        kv_blocks: 512,
        max_context: CONTEXT,
        max_sequences: 16,
        max_batch_tokens: 256,
        decode_latency_target: Duration::from_millis(100),
        max_waiting: 64,
        prefix_cache: true,
        // Reciters count on being asked for every position once.
        draft: DraftMode::Off,
    }
}

pub fn start_with(config: ServerConfig, engine: EngineConfig, manner: Manner, infill: bool) -> Fixture {
    start_text(config, engine, manner, text(infill))
}

/// A server whose model gives these answers, one after the other, and may reason and call tools.
pub fn start_agent(answers: &[&str]) -> Fixture {
    start_answering(ServerConfig::new(MODEL), saying(answers), text_with(true, AGENT_TEMPLATE, &[]))
}

/// A server whose model gives these answers in harmony's channels.
pub fn start_harmony(answers: &[&str]) -> Fixture {
    let marks = ["<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>"];
    let text = text_with(true, HARMONY_TEMPLATE, &marks);
    start_answering(ServerConfig::new(MODEL), saying(answers), text)
}

/// A server whose model reasons as its prompt has begun to, and gives these answers.
pub fn start_reasoner(answers: &[&str]) -> Fixture {
    let text = text_with(true, REASONING_TEMPLATE, &["<think>", "</think>"]);
    start_answering(ServerConfig::new(MODEL), saying(answers), text)
}

/// A server whose model reasons unless it is told not to, and gives these answers.
pub fn start_hybrid(answers: &[&str]) -> Fixture {
    let text = text_with(true, HYBRID_TEMPLATE, &["<think>", "</think>"]);
    start_answering(ServerConfig::new(MODEL), saying(answers), text)
}

/// The same on a leash.
pub fn start_held_agent(answers: &[&str]) -> (Fixture, Leash) {
    let (manner, leash) = saying(answers).held(PACE);
    let text = text_with(true, AGENT_TEMPLATE, &[]);
    (start_answering(ServerConfig::new(MODEL), manner, text), leash)
}

/// A server whose model would say this, and calls tools.
pub fn start_caller(config: ServerConfig, answer: &str) -> Fixture {
    start_answering(config, saying(&[answer]), text_with(true, CALLING_TEMPLATE, &[]))
}

/// Gives these answers.
pub fn saying(answers: &[&str]) -> Manner {
    let answers = answers.iter().map(|&answer| answer.to_owned()).collect();
    Manner { answers, ..Manner::default() }
}

fn start_answering(config: ServerConfig, manner: Manner, text: Text) -> Fixture {
    let engine = EngineConfig { max_context: 4096, ..engine_config() };
    start_text(config, engine, manner, text)
}

pub fn start_text(config: ServerConfig, engine: EngineConfig, manner: Manner, text: Text) -> Fixture {
    let model = Reciter {
        config: ModelConfig {
            architecture: "llama".into(),
            hidden: 1,
            intermediate: 1,
            layers: 1,
            attention: AttentionShape { heads: 1, kv_heads: 1, head_dim: 2, scale: 1.0 },
            windows: vec![None],
            vocab: text.vocab_size(),
            context_length: engine.max_context,
            rms_eps: 1e-5,
            rope: Rope { inv_freq: vec![1.0], pairing: RopePairing::Halves },
            moe: None,
        },
        manner,
        scratch: SamplerScratch::default(),
        answer: None,
    };
    let engine = Engine::start(Box::new(model), engine);
    let server = Server::new(config, text.clone(), engine.clone());
    Fixture { router: router(server.clone()), server, engine, text }
}

pub fn start_in(manner: Manner) -> Fixture {
    start_with(ServerConfig::new(MODEL), engine_config(), manner, true)
}

pub fn start() -> Fixture {
    start_in(Manner::default())
}

/// A server whose model is on a leash.
pub fn start_held() -> (Fixture, Leash) {
    let (manner, leash) = Manner::default().held(PACE);
    (start_in(manner), leash)
}

/// A whole answer.
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&self.body)))
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    /// The JSON of every event, and whether `[DONE]` came last.
    pub fn events(&self) -> (Vec<Value>, bool) {
        assert_eq!(self.headers["content-type"], "text/event-stream");
        let text = self.text();
        assert!(text.ends_with("\n\n"), "{text:?}");
        let mut data: Vec<&str> = text
            .split_terminator("\n\n")
            .filter(|event| !event.starts_with(':'))
            .map(|event| event.strip_prefix("data: ").expect(event))
            .collect();
        let done = data.pop_if(|last| *last == "[DONE]").is_some();
        (data.into_iter().map(|data| serde_json::from_str(data).expect(data)).collect(), done)
    }

    /// Status, `param` and `code` of an error in OpenAI's shape.
    pub fn error(&self) -> (u16, String, String) {
        let body = self.json();
        let error = &body["error"];
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{body}");
        assert!(
            error["type"].is_string() && error.get("param").is_some() && error.get("code").is_some(),
            "{body}"
        );
        let word = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
        (self.status.as_u16(), word("param"), word("code"))
    }
}

/// An answer on its way. Dropped, its client has left.
pub struct Stream {
    head: response::Parts,
    body: Body,
    read: Vec<u8>,
}

impl Stream {
    /// What has come so far.
    pub fn text(&self) -> &str {
        str::from_utf8(&self.read).unwrap()
    }

    /// Reads on until this has come so many times.
    pub async fn until(&mut self, part: &str, times: usize) {
        while self.text().matches(part).count() < times {
            let frame = timeout(PATIENCE, self.body.frame()).await.expect("silence");
            let frame = frame.unwrap_or_else(|| panic!("no {part:?} in {}", self.text())).unwrap();
            self.read.extend_from_slice(frame.data_ref().unwrap());
        }
    }

    /// Reads to the end.
    pub async fn whole(mut self) -> Answer {
        let rest = timeout(PATIENCE, self.body.collect()).await.expect("no end").unwrap();
        self.read.extend_from_slice(&rest.to_bytes());
        Answer { status: self.head.status, headers: self.head.headers, body: self.read }
    }
}

impl Fixture {
    /// Sends a request and reads its whole answer.
    pub async fn send(&self, request: Request<Body>) -> Answer {
        self.begin(request).await.whole().await
    }

    /// The same, to be read as it comes.
    pub async fn begin(&self, request: Request<Body>) -> Stream {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (head, body) = response.into_parts();
        Stream { head, body, read: Vec::new() }
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.send(Request::get(path).body(Body::empty()).unwrap()).await
    }

    /// Posts `body`; a dialect's request that names no model gets the one there is.
    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        self.open(path, body).await.whole().await
    }

    /// The same, to be read as it comes.
    pub async fn open(&self, path: &str, body: &Value) -> Stream {
        let mut body = body.clone();
        if path.starts_with("/v1/") && body.is_object() {
            body.as_object_mut().unwrap().entry("model").or_insert(MODEL.into());
        }
        self.begin(Request::post(path).body(Body::from(body.to_string())).unwrap()).await
    }

    pub async fn post_bytes(&self, path: &str, body: Vec<u8>) -> Answer {
        self.send(Request::post(path).body(Body::from(body)).unwrap()).await
    }

    /// A conversation as the model is shown it.
    pub async fn shown(&self, messages: &Value, tools: &Value) -> String {
        let answer = self.post("/tokenize", &serde_json::json!({"messages": messages, "tools": tools})).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        let tokens: Vec<u32> = serde_json::from_value(answer.json()["tokens"].take()).unwrap();
        self.text.decode(&tokens, false)
    }

    /// Waits until so many requests run or wait. This needs no step.
    pub async fn asked(&self, count: usize) {
        let asked = async || {
            let stats = self.engine.stats();
            stats.running + stats.waiting == count
        };
        eventually("the requests are there", asked).await;
    }

    /// Waits until so many answers were cancelled. This needs no step.
    pub async fn cancelled(&self, count: usize) {
        let line =
            format!("vllm:request_success_total{{finished_reason=\"abort\",model_name=\"tiny\"}} {count}\n");
        eventually("answers are cancelled", async || self.get("/metrics").await.text().contains(&line)).await;
    }

    /// Waits until nothing runs and every KV block is accounted for.
    pub async fn idle(&self) -> Stats {
        let rests = async || {
            let stats = self.engine.stats();
            let whole = stats.kv_blocks_cached + stats.kv_blocks_free == stats.kv_blocks;
            stats.running + stats.waiting == 0 && whole
        };
        eventually("the engine is at rest", rests).await;
        self.engine.stats()
    }
}
