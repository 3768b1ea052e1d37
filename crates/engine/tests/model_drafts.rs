//! A draft model changes nothing but speed, whatever it says, however it fails; and where it is right, it is believed.

mod common;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::{
    Ahead, Answer, CONFIG, VOCAB, ask, ask_at_once, assert_whole, checkpoint, model, penalised, prompt,
    queued_model, request, sampled, start, unless_disturbed,
};
use rudder_engine::{
    Constraint, DraftCounts, DraftMode, DraftModel, Engine, EngineConfig, Event, GenerateRequest, Grammar,
    Next, SamplingParams,
};
use rudder_model::{KvSize, LoadOptions, Loaded, Model, ModelConfig, ModelSource};
use rudder_ops::cpu::{Cpu, KvDType};
use rudder_ops::{Batch, OpError, SampleRow, Sampled};

/// What a draft model is made to do.
#[derive(Clone, Copy, Default)]
struct Manner {
    /// Every third of its tokens is another one.
    noisy: bool,
    /// Every third of its tokens is none of the large model's.
    wild: bool,
    /// What a step takes besides.
    step: Duration,
    /// The step that fails, by an error or by a panic.
    fails_at: Option<usize>,
    panics: bool,
}

/// A draft model with a manner.
struct Mannered {
    inner: Box<dyn Model>,
    manner: Manner,
    steps: Arc<AtomicUsize>,
    drawn: u32,
}

impl Model for Mannered {
    fn config(&self) -> &ModelConfig {
        self.inner.config()
    }
    fn forward(&mut self, batch: &Batch) -> Result<(), OpError> {
        let step = self.steps.fetch_add(1, Ordering::SeqCst);
        std::thread::sleep(self.manner.step);
        if self.manner.fails_at == Some(step) {
            assert!(!self.manner.panics, "a fault for the test");
            return Err(OpError::Backend("out of memory, say".into()));
        }
        self.inner.forward(batch)
    }
    fn sample(&mut self, rows: &[SampleRow<'_>], out: &mut Vec<Sampled>) -> Result<(), OpError> {
        self.inner.sample(rows, out)?;
        for sampled in out {
            self.drawn += 1;
            match (self.drawn % 3, self.manner) {
                (0, Manner { noisy: true, .. }) => sampled.token = (sampled.token + 1) % VOCAB,
                (0, Manner { wild: true, .. }) => sampled.token = u32::MAX - self.drawn,
                _ => {}
            }
        }
        Ok(())
    }
    fn logits(&mut self) -> Result<Vec<f32>, OpError> {
        self.inner.logits()
    }
}

/// A draft model that reads `window` tokens of each of four sequences, and the steps that it has run.
fn draft_of(folder: &Path, manner: Manner, window: usize) -> (DraftModel, Arc<AtomicUsize>) {
    let source = ModelSource::open(folder).expect("a fixture");
    let options = DraftModel::options(source.config(), CONFIG.max_sequences, window, 4);
    let loaded = source.load(Cpu::new(1, KvDType::F32), options, |_, _| ()).expect("the fixture loads");
    let steps = Arc::<AtomicUsize>::default();
    let model = Mannered { inner: loaded.model, manner, steps: steps.clone(), drawn: 0 };
    (DraftModel::new(Loaded { model: Box::new(model), ..loaded }, options, window), steps)
}

/// An engine in which a step takes long, so that drafts pay.
fn with(draft: DraftModel, config: EngineConfig) -> Engine {
    let config = EngineConfig { draft: DraftMode::Lookup, ..config };
    Engine::start_drafting(slow(model(&config), 6), config, None, Some(draft))
}

fn slow(inner: Box<dyn Model>, milliseconds: u64) -> Box<dyn Model> {
    let manner = Manner { step: Duration::from_millis(milliseconds), ..Manner::default() };
    Box::new(Mannered { inner, manner, steps: Arc::default(), drawn: 0 })
}

fn own_draft(manner: Manner) -> DraftModel {
    draft_of(&checkpoint(), manner, CONFIG.max_context).0
}

fn guessed(engine: &Engine) -> DraftCounts {
    engine.stats().model_drafts.expect("there is a draft model")
}

fn accepted(counts: &DraftCounts) -> u64 {
    counts.accepted_at.iter().sum()
}

fn assert_same(answers: &[Answer], expected: &[Answer]) {
    for (answer, expected) in answers.iter().zip(expected) {
        assert_eq!((&answer.tokens, &answer.end), (&expected.tokens, &expected.end));
        assert_eq!(answer.usage.completion_tokens, expected.usage.completion_tokens);
    }
}

/// Asks all at once with the draft model and without; checks that answers are equal and that guesses were made, as `wanted`.
fn check(
    draft: impl Fn() -> DraftModel,
    requests: &[GenerateRequest],
    wanted: impl Fn(&DraftCounts) -> bool,
) {
    let expected = ask_at_once(&start(CONFIG), requests);
    unless_disturbed("such guesses", || {
        let engine = with(draft(), CONFIG);
        let answers = ask_at_once(&engine, requests);
        assert_same(&answers, &expected);
        assert_whole(&engine);
        let (stats, counts) = (engine.stats(), guessed(&engine));
        let sum = |count: fn(&Answer) -> usize| answers.iter().map(count).sum::<usize>() as u64;
        assert_eq!(stats.copies().tokens + counts.tokens, sum(|a| a.usage.drafted_tokens));
        assert_eq!(accepted(&stats.copies()) + accepted(&counts), sum(|a| a.usage.accepted_tokens));
        assert!(counts.tokens >= counts.drafts && accepted(&counts) <= counts.tokens, "{counts:?}");
        counts.drafts > 0 && wanted(&counts)
    });
}

fn requests(sampling: impl Fn(u32) -> SamplingParams) -> Vec<GenerateRequest> {
    // Short: what goes on for long soon repeats itself, and is copied.
    (0..12)
        .map(|i| GenerateRequest { sampling: sampling(i), ..request(prompt(i, 20 + 5 * i as usize), 40) })
        .collect()
}

fn sampled_apart(i: u32) -> SamplingParams {
    sampled(i.into())
}

fn greedy(_: u32) -> SamplingParams {
    SamplingParams { temperature: 0.0, ..Default::default() }
}

#[test]
fn a_draft_model_that_is_the_large_one_is_nearly_always_right() {
    unless_disturbed("many guesses, and more than one at a time", || {
        // One at a time, so that none is cut for want of room.
        let engine = with(own_draft(Manner::default()), CONFIG);
        for asked in requests(greedy) {
            assert_same(&[ask(&engine, asked.clone())], &[ask(&start(CONFIG), asked)]);
        }
        let counts = guessed(&engine);
        let many = counts.tokens > 60 && counts.accepted_at[1] > 0;
        assert!(!many || accepted(&counts) * 100 >= counts.tokens * 97, "{counts:?}");
        many
    });
}

#[test]
fn greedy_answers_are_the_same_whoever_drafts() {
    let llama = checkpoint().with_file_name("llama");
    let other = draft_of(&llama, Manner::default(), CONFIG.max_context).0;
    for draft in [own_draft(Manner { noisy: true, ..Manner::default() }), other] {
        let requests = requests(greedy);
        let expected = ask_at_once(&start(CONFIG), &requests);
        let engine = with(draft, CONFIG);
        assert_same(&ask_at_once(&engine, &requests), &expected);
        assert_whole(&engine);
    }
    let noisy = || own_draft(Manner { noisy: true, ..Manner::default() });
    check(noisy, &requests(greedy), |counts| accepted(counts) < counts.tokens);
}

#[test]
fn seeded_answers_with_penalties_and_log_probabilities_are_the_same() {
    let sampling = |i: u32| if i.is_multiple_of(2) { sampled(i.into()) } else { penalised(i.into()) };
    let expected = ask_at_once(&start(CONFIG), &requests(sampling));
    let engine = with(own_draft(Manner::default()), CONFIG);
    assert_same(&ask_at_once(&engine, &requests(sampling)), &expected);
    assert_whole(&engine);
    // What is drawn at random, a likeliest token does not foretell; at a low temperature it does.
    let cool = |i: u32| SamplingParams { temperature: 0.01, logprobs: Some(3), ..sampled(i.into()) };
    check(|| own_draft(Manner::default()), &requests(cool), |_| true);
}

#[test]
fn answers_are_the_same_under_preemption_in_small_steps_and_without_prefix_cache() {
    for config in [
        EngineConfig { kv_blocks: 16, ..CONFIG },
        EngineConfig { max_batch_tokens: 12, ..CONFIG },
        EngineConfig { prefix_cache: false, max_sequences: 2, ..CONFIG },
    ] {
        let expected = ask_at_once(&start(config.clone()), &requests(greedy));
        let engine = with(own_draft(Manner::default()), config);
        assert_same(&ask_at_once(&engine, &requests(greedy)), &expected);
        assert_whole(&engine);
    }
}

#[test]
fn a_window_that_holds_few_of_the_tokens_moves_on_with_the_answer() {
    let draft = || draft_of(&checkpoint(), Manner::default(), 48).0;
    assert_eq!(draft().window(), 48);
    check(draft, &[request(prompt(1, 60), 190)], |_| true);
}

#[test]
fn answers_end_within_guesses_as_they_would_without() {
    let full = ask(&start(CONFIG), request(prompt(0, 70), 100)).ids();
    let limits = (1..24).map(|max_tokens| request(prompt(0, 70), max_tokens));
    let stops =
        (1..24).map(|i| GenerateRequest { stop_tokens: vec![full[i * 4]], ..request(prompt(0, 70), 100) });
    for asked in [limits.collect::<Vec<_>>(), stops.collect()] {
        let engine = with(own_draft(Manner::default()), CONFIG);
        for some in asked.chunks(6) {
            assert_same(&ask_at_once(&engine, some), &ask_at_once(&start(CONFIG), some));
        }
        assert_whole(&engine);
    }
}

#[test]
fn what_the_large_model_lacks_is_never_drafted() {
    check(|| own_draft(Manner { wild: true, ..Manner::default() }), &requests(greedy), |_| true);
}

#[test]
fn dropping_generations_that_are_guessed_for_frees_their_blocks() {
    let expected = [ask(&start(CONFIG), request(prompt(1, 60), 150))];
    unless_disturbed("guesses", || {
        let engine = with(own_draft(Manner::default()), CONFIG);
        for events in 1..12 {
            let asked = (0..3).map(|i| engine.submit(request(prompt(i, 60), 150)).unwrap());
            for mut generation in asked.collect::<Vec<_>>() {
                while !matches!(generation.next_blocking(), Some(Event::Token(_))) {}
                (0..events).for_each(|_| drop(generation.next_blocking()));
            }
        }
        assert_whole(&engine);
        let guesses = guessed(&engine).drafts;
        assert_same(&[ask(&engine, request(prompt(1, 60), 150))], &expected);
        guesses > 0
    });
}

/// Even tokens only.
#[derive(Debug)]
struct Even;

impl Grammar for Even {
    fn start(&self) -> Result<Box<dyn Constraint>, String> {
        Ok(Box::new(Even))
    }
}

impl Constraint for Even {
    fn accept(&mut self, token: u32) -> Result<(), String> {
        token.is_multiple_of(2).then_some(()).ok_or_else(|| format!("{token} is odd"))
    }
    fn next(&mut self, mask: &mut [u32], _forced: Option<&mut Vec<u32>>) -> Result<Next, String> {
        mask.fill(0x5555_5555);
        Ok(Next::Draw)
    }
    fn roll_back(&mut self, _tokens: usize) -> Result<(), String> {
        Ok(())
    }
}

#[test]
fn guesses_that_a_grammar_forbids_are_cut() {
    let held = |request: GenerateRequest| GenerateRequest { grammar: Some(Arc::new(Even)), ..request };
    let requests: Vec<_> = requests(greedy).into_iter().map(held).collect();
    let expected = ask_at_once(&start(CONFIG), &requests);
    assert!(expected.iter().flat_map(Answer::ids).all(|id| id % 2 == 0));
    check(|| own_draft(Manner { noisy: true, ..Manner::default() }), &requests, |_| true);
}

#[test]
fn a_draft_model_that_fails_is_switched_off_and_no_request_hears_of_it() {
    // Its steps are measured before anything is asked.
    let (draft, measured) = draft_of(&checkpoint(), Manner::default(), CONFIG.max_context);
    drop(with(draft, CONFIG));
    let measured = measured.load(Ordering::SeqCst);
    for (fails_at, panics) in
        [(0, false), (0, true), (measured, false), (measured + 2, true), (measured + 15, false)]
    {
        let manner = Manner { fails_at: Some(fails_at), panics, ..Manner::default() };
        unless_disturbed("the step that fails", || {
            let (draft, steps) = draft_of(&checkpoint(), manner, CONFIG.max_context);
            let engine = with(draft, CONFIG);
            let expected = ask_at_once(&start(CONFIG), &requests(greedy));
            assert_same(&ask_at_once(&engine, &requests(greedy)), &expected);
            let failed = steps.load(Ordering::SeqCst) > fails_at;
            let counts = guessed(&engine);
            assert_same(&ask_at_once(&engine, &requests(greedy)), &expected);
            assert_whole(&engine);
            if failed {
                let asked_again = steps.load(Ordering::SeqCst) > fails_at + 1;
                assert!(!asked_again && guessed(&engine) == counts, "{counts:?}");
            }
            failed
        });
    }
}

#[test]
fn a_draft_model_that_takes_longer_than_the_large_one_rests() {
    let manner = Manner { step: Duration::from_millis(25), ..Manner::default() };
    let expected = ask_at_once(&start(CONFIG), &requests(greedy));
    unless_disturbed("rest", || {
        let (draft, steps) = draft_of(&checkpoint(), manner, CONFIG.max_context);
        let engine = with(draft, CONFIG);
        let measured = steps.load(Ordering::SeqCst);
        assert_same(&ask_at_once(&engine, &requests(greedy)), &expected);
        (steps.load(Ordering::SeqCst), guessed(&engine).drafts) == (measured, 0)
    });
}

/// As [`with`], where steps can be queued ahead, each of which takes 6 ms at least.
fn with_queue(draft: DraftModel) -> (Engine, Arc<Ahead>) {
    let config = EngineConfig { draft: DraftMode::Lookup, ..CONFIG };
    let (large, ahead) = queued_model(&config, Duration::from_millis(6), None);
    (Engine::start_drafting(large, config, None, Some(draft)), ahead)
}

#[test]
fn steps_are_queued_ahead_while_a_draft_model_rests() {
    let manner = Manner { step: Duration::from_millis(25), ..Manner::default() };
    let expected = ask_at_once(&start(CONFIG), &requests(sampled_apart));
    unless_disturbed("steps ahead, and rest", || {
        let (draft, steps) = draft_of(&checkpoint(), manner, CONFIG.max_context);
        let (engine, ahead) = with_queue(draft);
        let measured = steps.load(Ordering::SeqCst);
        assert_same(&ask_at_once(&engine, &requests(sampled_apart)), &expected);
        assert_whole(&engine);
        let queued = ahead.steps.load(Ordering::SeqCst) as u64;
        println!("{queued} of {} steps were queued ahead", engine.stats().steps);
        let rested = (steps.load(Ordering::SeqCst), guessed(&engine).drafts) == (measured, 0);
        rested && 4 * queued > engine.stats().steps
    });
}

#[test]
fn a_draft_model_that_pays_is_asked_where_steps_could_be_queued_ahead() {
    let expected = ask_at_once(&start(CONFIG), &requests(greedy));
    unless_disturbed("guesses", || {
        let (engine, _) = with_queue(own_draft(Manner::default()));
        for (asked, expected) in requests(greedy).into_iter().zip(&expected) {
            assert_same(&[ask(&engine, asked)], std::slice::from_ref(expected));
        }
        assert_whole(&engine);
        println!("{:?}", guessed(&engine));
        accepted(&guessed(&engine)) > 60
    });
}

#[test]
fn without_drafts_a_draft_model_is_not_asked() {
    let (draft, steps) = draft_of(&checkpoint(), Manner::default(), CONFIG.max_context);
    let engine = Engine::start_drafting(model(&CONFIG), CONFIG, None, Some(draft));
    ask(&engine, request(prompt(0, 70), 64));
    assert_eq!((steps.load(Ordering::SeqCst), engine.stats().model_drafts), (0, None));
}

/// A real model of 512 tokens, loaded with these options.
fn real(file: &str, options: impl Fn(&ModelConfig) -> LoadOptions) -> (Loaded, LoadOptions) {
    let source = ModelSource::open(Path::new(file)).expect("a model");
    let options = options(source.config());
    (source.load(Cpu::new(2, KvDType::F16), options, |_, _| ()).expect("it loads"), options)
}

/// `RUDDER_TEST_MODEL` drafts for itself, or `RUDDER_TEST_DRAFT_MODEL` for it where that is set.
#[test]
#[ignore = "needs the default model; run by .ci/run"]
fn a_real_models_answer_is_the_same_with_a_real_draft_model() {
    let file = std::env::var("RUDDER_TEST_MODEL").expect("RUDDER_TEST_MODEL is the path of a GGUF file");
    let draft_file = std::env::var("RUDDER_TEST_DRAFT_MODEL").unwrap_or_else(|_| file.clone());
    let config = EngineConfig { max_context: 512, kv_blocks: 64, draft: DraftMode::Lookup, ..CONFIG };
    // Slow enough for guesses to pay, whichever model makes them.
    let large = || {
        let options = LoadOptions {
            max_batch_tokens: config.max_batch_tokens,
            max_outputs: config.max_sequences + config.draft.max_drafted(),
            kv: KvSize::Blocks(config.kv_blocks),
            max_context: config.max_context,
        };
        slow(real(&file, |_| options).0.model, 400)
    };
    // A question that was asked of the default model.
    let recorded = include_str!("recorded/free-new-code.tokens").lines().next().expect("a prompt");
    let prompt: Vec<u32> = recorded.split(' ').map(|id| id.parse().expect("a token")).collect();
    let asked = request(prompt, 40);
    let plain = Engine::start(large(), EngineConfig { draft: DraftMode::Off, ..config.clone() });
    let expected = ask(&plain, asked.clone());
    let (draft, options) =
        real(&draft_file, |draft| DraftModel::options(draft, config.max_sequences, config.max_context, 1));
    let draft = DraftModel::new(draft, options, config.max_context);
    let engine = Engine::start_drafting(large(), config, None, Some(draft));
    assert_same(&[ask(&engine, asked)], &[expected]);
    let counts = guessed(&engine);
    println!("{} of {} accepted", accepted(&counts), counts.tokens);
    assert!(accepted(&counts) > 0, "{counts:?}");
}
