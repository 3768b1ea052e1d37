//! What the engine's tests share: a tiny real checkpoint on the cpu backend, questions and answers.
#![allow(dead_code, missing_docs)] // each test file uses its part

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rudder_engine::{
    DraftMode, Engine, EngineConfig, Event, FinishReason, GenerateRequest, Generation, LogitBias,
    SamplingParams, Token, Usage,
};
use rudder_model::{KvSize, LoadOptions, Model, ModelConfig};
use rudder_ops::cpu::{Cpu, KvDType};
use rudder_ops::{Batch, OpError, SampleRow, Sampled};

/// The checkpoint's vocabulary.
pub const VOCAB: u32 = 128;

pub const CONFIG: EngineConfig = EngineConfig {
    kv_blocks: 256,
    max_context: 256,
    max_sequences: 8,
    max_batch_tokens: 64,
    // No stall cuts what a step computes of prompts.
    decode_latency_target: Duration::from_secs(3600),
    max_waiting: 16,
    prefix_cache: true,
    // How many steps an answer takes is then a matter of time; see `drafting`.
    draft: DraftMode::Off,
};

/// The folder of the checkpoint.
pub fn checkpoint() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures/qwen2")
}

pub fn model(config: &EngineConfig) -> Box<dyn Model> {
    model_at(&checkpoint(), config)
}

pub fn model_at(folder: &Path, config: &EngineConfig) -> Box<dyn Model> {
    let options = LoadOptions {
        max_batch_tokens: config.max_batch_tokens,
        max_outputs: config.max_sequences + config.draft.max_drafted(),
        kv: KvSize::Blocks(config.kv_blocks),
        max_context: config.max_context,
    };
    rudder_model::load(folder, Cpu::new(2, KvDType::F32), options, |_, _| ())
        .expect("the fixture loads")
        .model
}

pub fn start(config: EngineConfig) -> Engine {
    Engine::start(model(&config), config)
}

pub fn request(prompt: impl Into<Vec<u32>>, max_tokens: usize) -> GenerateRequest {
    let greedy = SamplingParams { temperature: 0.0, ..Default::default() };
    GenerateRequest::new(prompt.into(), greedy, max_tokens)
}

pub fn prompt(seed: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| (i * i + seed * 31 + i * seed) % 128).collect()
}

/// A way to draw.
pub fn sampled(seed: u64) -> SamplingParams {
    SamplingParams { seed, temperature: 0.8, top_p: 0.95, ..Default::default() }
}

/// The same with everything that changes logits, and log-probabilities.
pub fn penalised(seed: u64) -> SamplingParams {
    SamplingParams {
        repetition_penalty: 1.2,
        presence_penalty: 0.3,
        frequency_penalty: 0.1,
        logit_bias: vec![LogitBias { token: 5, bias: 2.0 }],
        logprobs: Some(3),
        ..sampled(seed)
    }
}

/// Everything a generation said.
#[derive(Debug, Default, PartialEq)]
pub struct Answer {
    pub scores: Vec<Token>,
    pub tokens: Vec<Token>,
    pub prefill: Vec<usize>,
    pub expired: bool,
    pub end: Option<Result<FinishReason, String>>,
    pub usage: Usage,
}

impl Answer {
    pub fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|t| t.id).collect()
    }
}

pub fn collect(mut generation: Generation) -> Answer {
    let mut answer = Answer::default();
    while let Some(event) = generation.next_blocking() {
        assert!(answer.end.is_none() && !answer.expired, "nothing comes after the end, but {event:?} did");
        match event {
            Event::Queued { position } => assert!(position > 0 && answer.tokens.is_empty()),
            Event::Prefill { done, .. } => answer.prefill.push(done),
            Event::Prompt(scores) => answer.scores = scores,
            Event::Token(token) => answer.tokens.push(token),
            Event::Finished { reason, usage } => {
                answer.end = Some(Ok(reason));
                answer.usage = usage;
            }
            Event::Failed { message } => answer.end = Some(Err(message)),
            Event::Expired { usage } => {
                answer.expired = true;
                answer.usage = usage;
            }
        }
    }
    answer
}

pub fn ask(engine: &Engine, request: GenerateRequest) -> Answer {
    collect(engine.submit(request).expect("there is room"))
}

pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..12_000 {
        if holds() {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("{what} did not come about");
}

/// For what is done only where it is measured to pay: a stall at the wrong moment spoils the measurements of one engine. Each try
/// is to begin with a new one.
pub fn unless_disturbed(what: &str, mut comes_about: impl FnMut() -> bool) {
    assert!((0..5).any(|_| comes_about()), "{what} did not come about in any try");
}

pub fn assert_whole(engine: &Engine) {
    eventually("an idle engine with a whole KV cache", || {
        let s = engine.stats();
        s.running + s.waiting + s.kv_blocks_used == 0 && s.kv_blocks_cached + s.kv_blocks_free == s.kv_blocks
    });
}

/// A model whose steps take long, however many rows they have: drafts pay.
struct Slow(Box<dyn Model>);

impl Model for Slow {
    fn config(&self) -> &ModelConfig {
        self.0.config()
    }
    fn forward(&mut self, batch: &Batch) -> Result<(), OpError> {
        std::thread::sleep(Duration::from_millis(2));
        self.0.forward(batch)
    }
    fn sample(&mut self, rows: &[SampleRow<'_>], out: &mut Vec<Sampled>) -> Result<(), OpError> {
        self.0.sample(rows, out)
    }
    fn logits(&mut self) -> Result<Vec<f32>, OpError> {
        self.0.logits()
    }
}

/// An engine in which drafts pay.
pub fn drafting(config: EngineConfig) -> Engine {
    let config = EngineConfig { draft: DraftMode::Lookup, ..config };
    Engine::start(Box::new(Slow(model(&config))), config)
}

pub fn ask_at_once(engine: &Engine, requests: &[GenerateRequest]) -> Vec<Answer> {
    let asked: Vec<_> = requests.iter().map(|r| engine.submit(r.clone()).unwrap()).collect();
    asked.into_iter().map(collect).collect()
}

/// Asks all at once, without drafts and with some predicted from the answer itself, with a wrong
/// token here and there. Checks that answers are equal; returns those with drafts.
pub fn check_drafts(config: EngineConfig, requests: Vec<GenerateRequest>) -> Vec<Answer> {
    let expected = ask_at_once(&start(config.clone()), &requests);
    let predicting = |(request, answer): (GenerateRequest, &Answer)| {
        let said = answer.ids().into_iter().enumerate();
        let prediction: Vec<u32> =
            said.map(|(i, id)| if i % 11 == 7 { (id + 1) % VOCAB } else { id }).collect();
        GenerateRequest { prediction: prediction.into(), ..request }
    };
    let requests: Vec<_> = requests.into_iter().zip(&expected).map(predicting).collect();
    let engine = drafting(config);
    let answers = ask_at_once(&engine, &requests);
    for (answer, expected) in answers.iter().zip(&expected) {
        assert_eq!((&answer.tokens, &answer.end), (&expected.tokens, &expected.end));
        assert_eq!(answer.usage.completion_tokens, expected.usage.completion_tokens);
        assert!(answer.usage.accepted_tokens <= answer.usage.drafted_tokens);
    }
    assert_whole(&engine);
    let sum = |count: fn(&Answer) -> usize| answers.iter().map(count).sum::<usize>() as u64;
    let stats = engine.stats();
    assert_eq!(stats.drafted_tokens, sum(|a| a.usage.drafted_tokens));
    assert_eq!(stats.accepted_at.iter().sum::<u64>(), sum(|a| a.usage.accepted_tokens));
    answers
}

/// Checks as [`check_drafts`] does. Of all tokens, at least this share came by drafts, and some drafts were wrong. How many are tried
/// depends on what steps take, so on a busy machine it is not many.
pub fn check_drafted(share: f64, config: &EngineConfig, requests: &[GenerateRequest]) {
    unless_disturbed("drafts, right and wrong", || {
        let answers = check_drafts(config.clone(), requests.to_vec());
        let sum = |count: fn(&Answer) -> usize| answers.iter().map(count).sum::<usize>();
        let (accepted, drafted) = (sum(|a| a.usage.accepted_tokens), sum(|a| a.usage.drafted_tokens));
        let generated = sum(|a| a.usage.completion_tokens);
        println!("of {generated} tokens {drafted} were drafted, {accepted} accepted");
        accepted as f64 >= share * generated as f64 && drafted > accepted
    });
}

/// What of the steps went on from tokens that the engine had not seen, and a gate: while it is closed no step runs.
#[derive(Debug, Default)]
pub struct Ahead {
    pub steps: AtomicUsize,
    pub rows: AtomicUsize,
    pub gate: Mutex<()>,
}

/// The real model. It keeps what it draws until that is done and asked for, and reads from there what a step goes on from.
struct Queued {
    inner: Box<dyn Model>,
    /// Each step takes so long, one after the other, drafted tokens or not.
    takes: Duration,
    busy_until: Instant,
    ahead: Arc<Ahead>,
    on_its_way: Option<(Instant, Vec<Sampled>)>,
    /// What the step before drew, if it has not told.
    last: Vec<u32>,
    batch: Batch,
    /// Fails the first step that goes on from unseen tokens, or what is drawn there.
    fault: Option<Fault>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fault {
    Forward,
    Panic,
    Drawn,
}

impl Model for Queued {
    fn config(&self) -> &ModelConfig {
        self.inner.config()
    }
    fn forward(&mut self, batch: &Batch) -> Result<(), OpError> {
        // Nothing is kept under the gate, so that a panic of the test that closed it breaks nothing.
        drop(self.ahead.gate.lock());
        self.busy_until = self.busy_until.max(Instant::now()) + self.takes;
        self.batch.copy_from(batch);
        if !batch.drawn.is_empty() {
            match self.fault.take_if(|fault| *fault != Fault::Drawn) {
                Some(Fault::Panic) => panic!("a fault for the test"),
                Some(_) => return Err(OpError::Backend("out of memory, say".into())),
                None => {}
            }
            self.ahead.steps.fetch_add(1, Ordering::SeqCst);
            self.ahead.rows.fetch_add(batch.rows(), Ordering::SeqCst);
            for (token, &output) in self.batch.tokens.iter_mut().zip(&batch.drawn) {
                *token = self.last[output as usize];
            }
            self.batch.drawn.clear();
        }
        self.inner.forward(&self.batch)
    }
    fn sample(&mut self, rows: &[SampleRow<'_>], out: &mut Vec<Sampled>) -> Result<(), OpError> {
        assert!(self.on_its_way.is_none(), "a step that lands at once, while another is in flight");
        self.last.clear();
        wait_until(self.busy_until);
        self.inner.sample(rows, out)
    }
    fn draws_ahead(&self) -> bool {
        true
    }
    fn draw(&mut self, rows: &[SampleRow<'_>]) -> Result<(), OpError> {
        assert!(self.on_its_way.is_none(), "two draws on their way");
        assert!(rows.iter().all(|row| row.forced.is_none()));
        let mut drawn = Vec::new();
        self.inner.sample(rows, &mut drawn)?;
        self.last = drawn.iter().map(|sampled| sampled.token).collect();
        self.on_its_way = Some((self.busy_until, drawn));
        Ok(())
    }
    fn drawn(&mut self, out: &mut Vec<Sampled>) -> Result<(), OpError> {
        let (done, drawn) = self.on_its_way.take().expect("a draw is on its way");
        wait_until(done);
        *out = drawn;
        self.last.clear();
        let ahead = self.ahead.steps.load(Ordering::SeqCst) > 0;
        match self.fault.take_if(|fault| *fault == Fault::Drawn && ahead) {
            Some(_) => Err(OpError::Backend("the device is gone, say".into())),
            None => Ok(()),
        }
    }
    fn logits(&mut self) -> Result<Vec<f32>, OpError> {
        self.inner.logits()
    }
}

fn wait_until(done: Instant) {
    std::thread::sleep(done.saturating_duration_since(Instant::now()));
}

pub fn queued(config: EngineConfig, fault: Option<Fault>) -> (Engine, Arc<Ahead>) {
    let takes = Duration::from_millis(if config.draft == DraftMode::Off { 0 } else { 2 });
    let (queued, ahead) = queued_model(&config, takes, fault);
    (Engine::start(queued, config), ahead)
}

/// The real model as a device with a queue runs it, each step taking so long at least.
pub fn queued_model(
    config: &EngineConfig,
    takes: Duration,
    fault: Option<Fault>,
) -> (Box<dyn Model>, Arc<Ahead>) {
    let ahead = Arc::new(Ahead::default());
    let queued = Queued {
        inner: model(config),
        takes,
        busy_until: Instant::now(),
        ahead: ahead.clone(),
        on_its_way: None,
        last: Vec::new(),
        batch: Batch::default(),
        fault,
    };
    (Box::new(queued), ahead)
}

/// Asks all at once of an engine whose steps land one by one and of one that queues them ahead. Checks that answers are equal;
/// returns how many rows were computed ahead.
pub fn check_ahead(config: EngineConfig, requests: Vec<GenerateRequest>) -> usize {
    let expected = ask_at_once(&start(config.clone()), &requests);
    let (engine, ahead) = queued(config, None);
    let closed = ahead.gate.lock().unwrap();
    let asked: Vec<_> = requests.iter().map(|r| engine.submit(r.clone()).unwrap()).collect();
    drop(closed);
    let answers: Vec<_> = asked.into_iter().map(collect).collect();
    for (answer, expected) in answers.iter().zip(&expected) {
        assert_eq!((&answer.tokens, &answer.end), (&expected.tokens, &expected.end));
        assert_eq!(answer.usage.completion_tokens, expected.usage.completion_tokens);
    }
    assert_whole(&engine);
    ahead.rows.load(Ordering::SeqCst)
}
