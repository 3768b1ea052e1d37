//! Engines over models that are watched: what they answer with steps in flight and without, and when something fails there.

use crate::common::{OPTIONS, model};
use rudder_comm::Group;
use rudder_engine::{DraftMode, Engine, EngineConfig, Event, GenerateRequest, Generation, Token};
use rudder_model::{Model, ModelConfig};
use rudder_ops::reference::Reference;
use rudder_ops::{Batch, OpError, SampleRow, Sampled, SamplingParams};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Holds its model to steps that land one by one.
pub struct Grounded(pub Box<dyn Model>);

impl Model for Grounded {
    fn config(&self) -> &ModelConfig {
        self.0.config()
    }
    fn forward(&mut self, batch: &Batch) -> Result<(), OpError> {
        self.0.forward(batch)
    }
    fn sample(&mut self, rows: &[SampleRow<'_>], out: &mut Vec<Sampled>) -> Result<(), OpError> {
        self.0.sample(rows, out)
    }
    fn logits(&mut self) -> Result<Vec<f32>, OpError> {
        self.0.logits()
    }
}

/// When something happens to a model: as a step goes on from tokens that nobody has seen, or before what it drew comes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum When {
    /// Before the step that has so many such before it.
    Queued(usize),
    /// After some such steps.
    Landing,
}

/// What happens then: it fails, or does not.
pub type Happening = Box<dyn FnOnce() -> Result<(), OpError> + Send>;

/// Counts what goes on from tokens that nobody has seen, and has something happen there once.
pub struct Watched {
    inner: Box<dyn Model>,
    flights: Arc<AtomicUsize>,
    happening: Option<(When, Happening)>,
}

impl Watched {
    /// With its count.
    pub fn new(inner: Box<dyn Model>, happening: Option<(When, Happening)>) -> (Self, Arc<AtomicUsize>) {
        let flights = Arc::<AtomicUsize>::default();
        (Self { inner, flights: flights.clone(), happening }, flights)
    }

    fn happens(&mut self, is_now: impl Fn(When) -> bool) -> Result<(), OpError> {
        self.happening.take_if(|(when, _)| is_now(*when)).map_or(Ok(()), |(_, what)| what())
    }
}

impl Model for Watched {
    fn config(&self) -> &ModelConfig {
        self.inner.config()
    }
    fn forward(&mut self, batch: &Batch) -> Result<(), OpError> {
        if !batch.drawn.is_empty() {
            let before = self.flights.fetch_add(1, Ordering::SeqCst);
            self.happens(|when| when == When::Queued(before))?;
        }
        self.inner.forward(batch)
    }
    fn sample(&mut self, rows: &[SampleRow<'_>], out: &mut Vec<Sampled>) -> Result<(), OpError> {
        self.inner.sample(rows, out)
    }
    fn draws_ahead(&self) -> bool {
        self.inner.draws_ahead()
    }
    fn draw(&mut self, rows: &[SampleRow<'_>]) -> Result<(), OpError> {
        self.inner.draw(rows)
    }
    fn drawn(&mut self, out: &mut Vec<Sampled>) -> Result<(), OpError> {
        let flown = self.flights.load(Ordering::SeqCst) > 3;
        let happened = self.happens(|when| flown && when == When::Landing);
        self.inner.drawn(out)?;
        happened
    }
    fn logits(&mut self) -> Result<Vec<f32>, OpError> {
        self.inner.logits()
    }
}

/// What happens to ranks and has requests end, as said here: one of them fails when a step is queued, or waited in vain.
pub fn faults(group: &Group, faulty: usize) -> [(When, Happening, &'static str); 3] {
    let fails = |rank| -> Happening {
        let group = group.clone();
        Box::new(move || {
            group.fail(rank, "no memory, say".into());
            Ok(())
        })
    };
    let in_vain: Happening = Box::new(|| Err(OpError::Backend("a rank waited in vain, say".into())));
    let said = "no memory";
    [
        (When::Queued(0), fails(faulty), said),
        (When::Queued(3), fails(0), said),
        (When::Landing, in_vain, "in vain"),
    ]
}

pub fn engine(model: Box<dyn Model>, kv_blocks: usize) -> Engine {
    Engine::start(
        model,
        EngineConfig {
            kv_blocks,
            max_context: 64,
            max_sequences: 4,
            max_batch_tokens: 80,
            decode_latency_target: Duration::from_millis(100),
            max_waiting: 8,
            prefix_cache: true,
            draft: DraftMode::Off,
        },
    )
}

fn prompt(i: u64) -> Vec<u32> {
    (0..20).map(|token| token * (i as u32 + 3) % 128).collect()
}

/// A request whose tokens are drawn; every third counts its tokens and tells what else was likely.
pub fn drawn(i: u64, max_tokens: usize) -> GenerateRequest {
    let (presence_penalty, logprobs) = if i % 3 == 2 { (0.5, Some(i as u32)) } else { (0.0, None) };
    let sampling =
        SamplingParams { temperature: 0.7, seed: i, presence_penalty, logprobs, ..SamplingParams::default() };
    GenerateRequest::new(prompt(i), sampling, max_tokens)
}

pub fn greedy(i: u64, max_tokens: usize) -> GenerateRequest {
    let sampling = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    GenerateRequest::new(prompt(i), sampling, max_tokens)
}

/// Requests that end at limits and at tokens of what [`drawn`] 2 is answered, `full`.
pub fn limits_and_stops(full: &[Token]) -> Vec<GenerateRequest> {
    let limits = (1..4).map(|max_tokens| drawn(2, max_tokens));
    let stops = [1, 2, 13].map(|i| GenerateRequest { stop_tokens: vec![full[i].id], ..drawn(2, 24) });
    [drawn(0, 24), drawn(2, 24)].into_iter().chain(limits).chain(stops).collect()
}

/// What an engine answers to requests, some of them at the same time.
pub fn ask(engine: &Engine, requests: &[GenerateRequest]) -> Vec<Result<Vec<Token>, String>> {
    let submitted = requests.iter().map(|request| engine.submit(request.clone()).expect("there is room"));
    let answer = |mut generation: Generation| {
        let mut tokens = Vec::new();
        while let Some(event) = generation.next_blocking() {
            match event {
                Event::Token(token) => tokens.push(token),
                Event::Failed { message } => return Err(message),
                _ => {}
            }
        }
        Ok(tokens)
    };
    submitted.collect::<Vec<_>>().into_iter().map(answer).collect()
}

/// The same, one after the other, since here the number of rows moves roundings.
pub fn in_turn(model: Box<dyn Model>, requests: &[GenerateRequest]) -> Vec<Vec<Token>> {
    let engine = engine(model, 16);
    let one = |request| ask(&engine, std::slice::from_ref(request)).remove(0).expect("it is answered");
    requests.iter().map(one).collect()
}

/// Refuses tokens that the reference, given those before them, has by more than roundings below others.
fn expect_greedy(prompt: &[u32], answer: &[Token]) {
    let answer: Vec<u32> = answer.iter().map(|token| token.id).collect();
    let mut reference = model("qwen2", Reference::new(), OPTIONS.kv);
    let (all, mut batch) = ([prompt, &answer].concat(), Batch::default());
    batch.push(&all[..all.len() - 1], 0, &[0, 1, 2, 3], answer.len());
    reference.forward(&batch).expect("a step");
    let logits = reference.logits().expect("logits");
    let largest = logits.iter().fold(0f32, |a, x| a.max(x.abs()));
    for (i, (logits, &token)) in logits.chunks(reference.config().vocab).zip(&answer).enumerate() {
        let most = logits.iter().fold(f32::NEG_INFINITY, |a, &x| a.max(x));
        assert!(logits[token as usize] > most - 0.05 * largest, "token {i} of {answer:?}");
    }
}

/// Expects an engine over 8 blocks to answer each of several requests its own, though not all have room.
pub fn expect_preempted(engine: &Engine) {
    let requests: Vec<_> = (0..5).map(|i| greedy(i, 36 + i as usize)).collect();
    expect_answers(engine, &requests);
    assert!(engine.stats().preemptions > 0, "{:?}", engine.stats());
}

/// Expects greedy requests to be answered by as many tokens as they ask for.
pub fn expect_answers(engine: &Engine, requests: &[GenerateRequest]) {
    for (request, answer) in requests.iter().zip(ask(engine, requests)) {
        let answer = answer.expect("it is answered");
        assert_eq!(answer.len(), request.max_tokens);
        expect_greedy(&request.prompt, &answer);
    }
}
