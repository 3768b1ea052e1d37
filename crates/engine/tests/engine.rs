//! The engine over a tiny real checkpoint on the cpu backend: answers that neighbours, chunking,
//! the prefix cache and preemption leave alone; ends, limits and faults.

mod common;

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, LazyLock, Mutex};
use std::task::{Context, Waker};
use std::time::Duration;

use common::{
    Answer, CONFIG, ask, assert_whole, collect, eventually, model, prompt, request, start, unless_disturbed,
};
use rudder_engine::{
    Engine, EngineConfig, Event, FinishReason, GenerateRequest, Generation, SamplingParams, SubmitError,
};
use rudder_model::{Model, ModelConfig};
use rudder_ops::{Batch, OpError, SampleRow, Sampled};

/// Greedy answers to six prompts, asked at once under the plainest configuration.
static EXPECTED: LazyLock<Vec<Vec<u32>>> = LazyLock::new(|| {
    let engine = start(EngineConfig { prefix_cache: false, ..CONFIG });
    (0..6).map(|i| ask(&engine, request(prompt(i, 70), 64)).ids()).collect()
});

fn ask_all_at_once(config: EngineConfig) -> (Engine, Vec<Vec<u32>>) {
    let engine = start(config);
    let generations: Vec<_> = (0..6).map(|i| engine.submit(request(prompt(i, 70), 64)).unwrap()).collect();
    let answers = generations.into_iter().map(|g| collect(g).ids()).collect();
    (engine, answers)
}

#[test]
fn greedy_answers_are_the_same_for_every_chunk_size() {
    for max_batch_tokens in [1, 7, 64, 4096] {
        let max_sequences = max_batch_tokens.min(6);
        let (engine, answers) = ask_all_at_once(EngineConfig { max_batch_tokens, max_sequences, ..CONFIG });
        assert_eq!(answers, *EXPECTED, "chunks of {max_batch_tokens}");
        assert_whole(&engine);
    }
}

#[test]
fn greedy_answers_are_the_same_with_a_warm_prefix_cache() {
    let (engine, cold) = ask_all_at_once(CONFIG);
    let warm: Vec<_> = (0..6).map(|i| ask(&engine, request(prompt(i, 70), 64))).collect();
    assert!(warm.iter().all(|a| a.usage.cached_tokens == 64));
    assert_eq!(cold, *EXPECTED);
    assert_eq!(warm.iter().map(Answer::ids).collect::<Vec<_>>(), *EXPECTED);
}

#[test]
fn greedy_answers_are_the_same_under_preemption() {
    let (engine, answers) = ask_all_at_once(EngineConfig { kv_blocks: 16, ..CONFIG });
    assert!(engine.stats().preemptions > 0);
    assert_eq!(answers, *EXPECTED);
    assert_whole(&engine);
}

#[test]
fn a_seeded_answer_is_bit_identical_alone_and_beside_others() {
    let sampling = SamplingParams {
        seed: 42,
        top_p: 0.95,
        repetition_penalty: 1.1,
        frequency_penalty: 0.2,
        logprobs: Some(5),
        ..Default::default()
    };
    let seeded = || GenerateRequest { sampling: sampling.clone(), ..request(prompt(9, 50), 60) };
    let alone = ask(&start(CONFIG), seeded());
    let engine = start(CONFIG);
    let others: Vec<_> =
        (0..7).map(|i| engine.submit(request(prompt(i, 20 + 9 * i as usize), 100)).unwrap()).collect();
    let beside = ask(&engine, seeded());
    assert_eq!(alone.tokens, beside.tokens);
    assert_eq!(alone.tokens.len(), 60);
    drop(others);
    assert_whole(&engine);
}

#[test]
fn different_seeds_give_different_answers() {
    let engine = start(CONFIG);
    let with_seed = |seed| GenerateRequest {
        sampling: SamplingParams { seed, ..Default::default() },
        ..request(prompt(9, 50), 40)
    };
    assert_ne!(ask(&engine, with_seed(1)).ids(), ask(&engine, with_seed(2)).ids());
}

#[test]
fn a_stop_token_ends_the_answer_and_is_not_sent_unless_ignored() {
    let engine = start(CONFIG);
    let full = &EXPECTED[0];
    let stop = full[10];
    let first = full.iter().position(|&t| t == stop).unwrap();
    let asked = GenerateRequest { stop_tokens: vec![stop], ..request(prompt(0, 70), 64) };
    let answer = ask(&engine, asked.clone());
    assert_eq!(answer.end, Some(Ok(FinishReason::Stop)));
    assert_eq!(answer.ids(), full[..first]);
    assert_eq!(answer.usage.completion_tokens, first + 1);
    let answer = ask(&engine, GenerateRequest { ignore_eos: true, ..asked });
    assert_eq!((answer.end.clone(), answer.ids()), (Some(Ok(FinishReason::Length)), full.clone()));
}

#[test]
fn the_context_bounds_the_answer() {
    let engine = start(EngineConfig { max_context: 100, ..CONFIG });
    let answer = ask(&engine, request(prompt(1, 90), 64));
    assert_eq!((answer.tokens.len(), answer.end), (10, Some(Ok(FinishReason::Length))));
    assert_eq!(answer.usage.prompt_tokens, 90);
}

#[test]
fn prompt_scores_agree_with_the_greedy_answer_and_survive_chunking() {
    let engine = start(CONFIG);
    let sampling = SamplingParams { temperature: 0.0, logprobs: Some(1), ..Default::default() };
    let answer = ask(&engine, GenerateRequest { sampling: sampling.clone(), ..request(prompt(3, 30), 50) });
    let whole: Vec<u32> = prompt(3, 30).into_iter().chain(answer.ids()).collect();
    let scored = |max_tokens| GenerateRequest {
        prompt_logprobs: true,
        sampling: sampling.clone(),
        ..request(whole.clone(), max_tokens)
    };
    let scores = ask(&engine, scored(0));
    assert!(scores.tokens.is_empty() && scores.usage.cached_tokens == 0);
    assert_eq!(scores.end, Some(Ok(FinishReason::Length)));
    assert_eq!(scores.scores.iter().map(|t| t.id).collect::<Vec<_>>(), whole);
    assert_eq!(scores.scores[0].logprob, None);
    assert_eq!(scores.scores[30..], answer.tokens[..], "a generated token scores as it did when drawn");
    assert_eq!(ask(&engine, scored(1)).tokens.len(), 1);
    // One token of the prompt a step.
    let alone = start(EngineConfig { max_sequences: 1, ..CONFIG });
    assert_eq!(ask(&alone, scored(0)).scores, scores.scores);
}

#[test]
fn prefill_is_reported_as_it_goes() {
    let engine = start(CONFIG);
    assert_eq!(ask(&engine, request(prompt(2, 150), 1)).prefill, [64, 128, 150]);
}

#[test]
fn dropping_a_generation_frees_its_blocks() {
    let engine = start(CONFIG);
    let mut generations: Vec<_> =
        (0..12).map(|i| engine.submit(request(prompt(i, 40), 200)).unwrap()).collect();
    while !matches!(generations[0].next_blocking(), Some(Event::Token(_))) {}
    drop(generations);
    assert_whole(&engine);
    assert_eq!(ask(&engine, request(prompt(0, 70), 64)).ids(), EXPECTED[0]);
}

#[test]
fn a_full_queue_turns_requests_away_and_takes_them_again_later() {
    let config = EngineConfig { max_sequences: 2, max_waiting: 3, ..CONFIG };
    let (held, gate) = held(&config);
    let engine = Engine::start(held, config);
    let closed = gate.lock().unwrap();
    let taken: Vec<_> = (0..5).map(|i| engine.submit(request(prompt(i, 100), 20)).unwrap()).collect();
    match engine.submit(request(prompt(9, 10), 1)).err() {
        Some(SubmitError::Busy { waiting: 3, retry_after }) => assert!(retry_after >= Duration::from_secs(1)),
        other => panic!("{other:?}"),
    }
    drop(closed);
    for generation in taken {
        assert_eq!(collect(generation).tokens.len(), 20);
    }
    eventually("room again", || engine.submit(request(prompt(9, 10), 1)).is_ok());
}

#[test]
fn unusable_prompts_are_refused_with_the_reason() {
    let engine = start(CONFIG);
    assert_eq!(engine.submit(request([], 1)).err(), Some(SubmitError::EmptyPrompt));
    assert_eq!(
        engine.submit(request([1, 128], 1)).err(),
        Some(SubmitError::BadToken { token: 128, vocab: 128 })
    );
    let too_long = engine.submit(request(vec![1; 256], 1)).err();
    assert_eq!(too_long, Some(SubmitError::TooLong { tokens: 256, maximum: 256 }));
    assert!(engine.submit(request(vec![1; 255], 1)).is_ok());
}

/// The real model, which runs no step while its gate is closed.
struct Held {
    inner: Box<dyn Model>,
    gate: Arc<Mutex<()>>,
}

fn held(config: &EngineConfig) -> (Box<dyn Model>, Arc<Mutex<()>>) {
    let gate = Arc::new(Mutex::new(()));
    (Box::new(Held { inner: model(config), gate: gate.clone() }), gate)
}

/// Asks for more than runs at once, so that some wait, and are in no step; lets `then` come before any step is done.
fn flood(engine: &Engine, gate: &Mutex<()>, then: impl FnOnce()) -> Vec<Generation> {
    let _closed = gate.lock().unwrap();
    let asked = (0..20).map(|i| engine.submit(request(prompt(i, 70), 180)).unwrap()).collect();
    then();
    asked
}

impl Model for Held {
    fn config(&self) -> &ModelConfig {
        self.inner.config()
    }
    fn forward(&mut self, batch: &Batch) -> Result<(), OpError> {
        let _open = self.gate.lock().unwrap();
        self.inner.forward(batch)
    }
    fn sample(&mut self, rows: &[SampleRow<'_>], out: &mut Vec<Sampled>) -> Result<(), OpError> {
        self.inner.sample(rows, out)
    }
    fn logits(&mut self) -> Result<Vec<f32>, OpError> {
        self.inner.logits()
    }
}

/// The real model, each of whose steps waits to be granted, until no more can be.
struct Stepped {
    inner: Box<dyn Model>,
    granted: Receiver<()>,
}

impl Model for Stepped {
    fn config(&self) -> &ModelConfig {
        self.inner.config()
    }
    fn forward(&mut self, batch: &Batch) -> Result<(), OpError> {
        let _ = self.granted.recv();
        self.inner.forward(batch)
    }
    fn sample(&mut self, rows: &[SampleRow<'_>], out: &mut Vec<Sampled>) -> Result<(), OpError> {
        self.inner.sample(rows, out)
    }
    fn logits(&mut self) -> Result<Vec<f32>, OpError> {
        self.inner.logits()
    }
}

/// Asks, or looks whether there is an answer.
fn is_answered(question: &mut Pin<Box<impl Future>>) -> bool {
    question.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready()
}

#[test]
fn however_many_ask_about_sessions_steps_go_on() {
    const ASKED: usize = 50;
    // Without room for any, no step is granted before it is waited for.
    let (grants, granted) = sync_channel(0);
    let engine = Engine::start(Box::new(Stepped { inner: model(&CONFIG), granted }), CONFIG);
    let running = engine.submit(request(prompt(0, 70), 8)).unwrap();
    let mut asked: Vec<_> = (0..ASKED).map(|_| Box::pin(engine.sessions(None))).collect();
    let mut answered = || {
        asked.retain_mut(|question| !is_answered(question));
        ASKED - asked.len()
    };
    assert!(answered() <= 1);
    for step in 1..5 {
        grants.send(()).unwrap();
        let answered = answered();
        assert!(answered <= step + 1, "{answered} were answered before step {}", step + 1);
    }
    drop(grants);
    assert_eq!(collect(running).tokens.len(), 8);
    eventually("all are answered", || answered() == ASKED);
}

#[test]
fn a_burst_of_requests_is_taken_in_over_several_steps() {
    let config = EngineConfig {
        kv_blocks: 1024,
        max_sequences: 301,
        max_batch_tokens: 4096,
        max_waiting: 300,
        ..CONFIG
    };
    let (grants, granted) = sync_channel(0);
    let engine = Engine::start(Box::new(Stepped { inner: model(&config), granted }), config);
    let asked: Vec<_> = (0..301).map(|i| engine.submit(request(prompt(i, 5), 8)).unwrap()).collect();
    // All have come before the second step is planned, and the third has ended when the fourth is granted.
    (0..4).for_each(|_| grants.send(()).unwrap());
    let running = engine.stats().running;
    assert!((1..=4 * 64).contains(&running), "{running} were taken in within four steps");
    drop(asked); // of which some were not taken in
    drop(grants);
    assert_whole(&engine);
}

#[test]
fn who_has_asked_about_sessions_and_is_gone_keeps_nobody_waiting() {
    let (grants, granted) = sync_channel(0);
    let engine = Engine::start(Box::new(Stepped { inner: model(&CONFIG), granted }), CONFIG);
    let running = engine.submit(request(prompt(0, 70), 8)).unwrap();
    for _ in 0..50 {
        is_answered(&mut Box::pin(engine.sessions(None)));
    }
    let mut question = Box::pin(engine.sessions(None));
    let at_once = is_answered(&mut question);
    // Between two steps it is heard.
    (0..2).for_each(|_| grants.send(()).unwrap());
    assert!(at_once || is_answered(&mut question));
    drop(grants);
    assert_eq!(collect(running).tokens.len(), 8);
}

/// The real model, failing at given steps.
struct Faulty {
    inner: Box<dyn Model>,
    steps: Arc<AtomicUsize>,
    fail_at: usize,
    /// The step that fails takes so long.
    takes: Duration,
    panic: bool,
    /// Whether it can be used on after that.
    recovers: bool,
}

impl Faulty {
    /// Fails at once.
    fn of(inner: Box<dyn Model>) -> Self {
        let (steps, takes) = (Arc::default(), Duration::ZERO);
        Self { inner, steps, fail_at: 0, takes, panic: false, recovers: true }
    }
}

impl Model for Faulty {
    fn config(&self) -> &ModelConfig {
        self.inner.config()
    }
    fn forward(&mut self, batch: &Batch) -> Result<(), OpError> {
        if self.steps.fetch_add(1, Ordering::SeqCst) == self.fail_at {
            std::thread::sleep(self.takes);
            assert!(!self.panic, "a fault for the test");
            return Err(OpError::Backend("out of memory, say".into()));
        }
        self.inner.forward(batch)
    }
    fn sample(&mut self, rows: &[SampleRow<'_>], out: &mut Vec<Sampled>) -> Result<(), OpError> {
        self.inner.sample(rows, out)
    }
    fn recover(&mut self) -> Result<(), OpError> {
        if self.recovers { Ok(()) } else { Err(OpError::Backend("an illegal address, say".into())) }
    }
    fn logits(&mut self) -> Result<Vec<f32>, OpError> {
        self.inner.logits()
    }
}

#[test]
fn a_failing_step_ends_its_requests_and_the_engine_goes_on() {
    for panic in [false, true] {
        let engine =
            Engine::start(Box::new(Faulty { fail_at: 5, panic, ..Faulty::of(model(&CONFIG)) }), CONFIG);
        let answer = ask(&engine, request(prompt(0, 70), 64));
        let message = answer.end.unwrap().unwrap_err();
        assert!(message.starts_with("the model failed"), "{message}");
        assert_eq!(ask(&engine, request(prompt(0, 70), 64)).ids(), EXPECTED[0]);
        assert_whole(&engine);
    }
}

#[test]
fn how_long_a_failing_step_takes_does_not_slow_later_prompts() {
    let config = EngineConfig { decode_latency_target: Duration::from_millis(200), ..CONFIG };
    unless_disturbed("a whole step's prompt beside an answer", || {
        let faulty = Faulty { takes: Duration::from_secs(1), ..Faulty::of(model(&config)) };
        let engine = Engine::start(Box::new(faulty), config.clone());
        assert!(ask(&engine, request(prompt(0, 64), 4)).end.unwrap().is_err());
        let mut running = engine.submit(request(prompt(1, 64), 180)).unwrap();
        while !matches!(running.next_blocking(), Some(Event::Token(_))) {}
        ask(&engine, request(prompt(2, 120), 1)).prefill.first().is_some_and(|&done| done > 60)
    });
}

#[tokio::test]
async fn a_device_that_computes_no_more_ends_all_requests_and_the_engine_which_says_why() {
    const LATE: usize = 1 << 20;
    let steps = Arc::new(AtomicUsize::new(0));
    let (inner, gate) = held(&CONFIG);
    let faulty = Faulty { steps: steps.clone(), fail_at: LATE, recovers: false, ..Faulty::of(inner) };
    let engine = Engine::start(Box::new(faulty), CONFIG);
    let asked = flood(&engine, &gate, || steps.store(LATE, Ordering::SeqCst));
    let reason = engine.broken().await;
    assert!(reason.contains("an illegal address"), "{reason}");
    assert_eq!(engine.submit(request([1], 1)).err(), Some(SubmitError::ShuttingDown));
    let reader = std::thread::spawn(move || asked.into_iter().map(collect).collect::<Vec<_>>());
    for answer in reader.join().unwrap() {
        let message = answer.end.unwrap().unwrap_err();
        assert!(message.starts_with("the model failed"), "{message}");
    }
    assert!(engine.shutdown(Duration::ZERO).await, "places are held");
}

/// The real model, which panics once it is told to, where the step loop asks it about itself.
struct Panicking(Box<dyn Model>, Arc<AtomicBool>);

impl Model for Panicking {
    fn config(&self) -> &ModelConfig {
        self.0.config()
    }
    fn forward(&mut self, batch: &Batch) -> Result<(), OpError> {
        self.0.forward(batch)
    }
    fn sample(&mut self, rows: &[SampleRow<'_>], out: &mut Vec<Sampled>) -> Result<(), OpError> {
        self.0.sample(rows, out)
    }
    fn draws_ahead(&self) -> bool {
        assert!(!self.1.load(Ordering::SeqCst), "a fault for the test");
        false
    }
    fn logits(&mut self) -> Result<Vec<f32>, OpError> {
        self.0.logits()
    }
}

#[tokio::test]
async fn a_panic_of_the_step_loop_ends_all_requests_and_the_engine_which_says_why() {
    let told = Arc::new(AtomicBool::new(false));
    let (inner, gate) = held(&CONFIG);
    let engine = Engine::start(Box::new(Panicking(inner, told.clone())), CONFIG);
    let asked = flood(&engine, &gate, || told.store(true, Ordering::SeqCst));
    let reason = engine.broken().await;
    assert_eq!(reason, "the engine failed unexpectedly");
    assert_eq!(engine.submit(request([1], 1)).err(), Some(SubmitError::ShuttingDown));
    let reader = std::thread::spawn(move || asked.into_iter().map(collect).collect::<Vec<_>>());
    for answer in reader.join().unwrap() {
        assert_eq!(answer.end.unwrap().unwrap_err(), reason);
    }
    assert!(engine.shutdown(Duration::ZERO).await, "places are held");
}

#[tokio::test]
async fn shutdown_lets_running_requests_finish_and_refuses_new_ones() {
    let engine = start(CONFIG);
    let running = engine.submit(request(prompt(0, 70), 64)).unwrap();
    // The expected answer waits for an engine too, which a thread of the runtime must not.
    let reader = std::thread::spawn(move || assert_eq!(collect(running).ids(), EXPECTED[0]));
    assert!(engine.shutdown(Duration::from_secs(60)).await);
    reader.join().unwrap();
    assert_eq!(engine.submit(request([1], 1)).err(), Some(SubmitError::ShuttingDown));
}

#[test]
fn shutdown_ends_what_outlasts_the_grace() {
    let (model, gate) = held(&CONFIG);
    let engine = Engine::start(model, CONFIG);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let running =
        flood(&engine, &gate, || assert!(!runtime.block_on(engine.shutdown(Duration::ZERO)), "none is done"));
    for answer in running.into_iter().map(collect) {
        assert_eq!(answer.end, Some(Err("the server is shutting down".into())));
    }
}
