//! Generation held to a toy grammar, over a tiny real checkpoint: masks, forced tokens, ends and
//! faults, early and late answers of the grammar, alone and under preemption.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{
    Answer, CONFIG, VOCAB, ask, assert_whole, check_ahead, check_drafted, check_drafts, collect, prompt,
    request, start, unless_disturbed,
};
use rudder_engine::{
    Constraint, EngineConfig, FinishReason, GenerateRequest, Grammar, Next, ReasoningBudget, SamplingParams,
};

/// What may follow a history of generated tokens.
enum Then {
    /// One of these; stop tokens are like any other.
    Any(Vec<u32>),
    /// Just these, in this order.
    Only(Vec<u32>),
    End,
    Error,
    Panic,
}

/// A grammar as a function of the history.
struct Toy {
    then: fn(&[u32]) -> Then,
    /// How long each answer takes.
    delay: Duration,
    started: AtomicUsize,
    /// Tokens that its states took.
    accepted: Arc<AtomicUsize>,
    /// Whether it can go back over tokens.
    rolls_back: bool,
}

impl std::fmt::Debug for Toy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Toy")
    }
}

impl Grammar for Toy {
    fn start(&self) -> Result<Box<dyn Constraint>, String> {
        self.started.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(State {
            then: self.then,
            delay: self.delay,
            history: Vec::new(),
            accepted: self.accepted.clone(),
            rolls_back: self.rolls_back,
        }))
    }
}

struct State {
    then: fn(&[u32]) -> Then,
    delay: Duration,
    history: Vec<u32>,
    accepted: Arc<AtomicUsize>,
    rolls_back: bool,
}

impl Constraint for State {
    fn accept(&mut self, token: u32) -> Result<(), String> {
        let allowed = match (self.then)(&self.history) {
            Then::Any(tokens) => tokens.contains(&token),
            Then::Only(tokens) => tokens[0] == token,
            _ => false,
        };
        self.history.push(token);
        self.accepted.fetch_add(1, Ordering::SeqCst);
        allowed.then_some(()).ok_or_else(|| format!("{token} was drawn against the mask"))
    }

    fn roll_back(&mut self, tokens: usize) -> Result<(), String> {
        self.history.truncate(self.history.len() - tokens);
        self.rolls_back.then_some(()).ok_or_else(|| "the toy cannot go back".into())
    }

    fn next(&mut self, mask: &mut [u32], mut forced: Option<&mut Vec<u32>>) -> Result<Next, String> {
        std::thread::sleep(self.delay);
        assert!(mask.iter().all(|&word| word == 0), "the mask comes empty");
        loop {
            let tokens = match (self.then)(&self.history) {
                Then::Any(tokens) => tokens,
                Then::Only(tokens) => match &mut forced {
                    Some(forced) => {
                        forced.extend_from_slice(&tokens);
                        self.history.extend(tokens);
                        continue;
                    }
                    None => vec![tokens[0]],
                },
                Then::End => return Ok(Next::End),
                Then::Error => return Err("the toy gave up".into()),
                Then::Panic => panic!("a fault for the test"),
            };
            for token in tokens {
                mask[token as usize / 32] |= 1 << (token % 32);
            }
            return Ok(Next::Draw);
        }
    }
}

fn toy(then: fn(&[u32]) -> Then) -> Arc<Toy> {
    slow_toy(then, Duration::ZERO)
}

fn slow_toy(then: fn(&[u32]) -> Then, delay: Duration) -> Arc<Toy> {
    Arc::new(Toy { then, delay, started: AtomicUsize::new(0), accepted: Arc::default(), rolls_back: true })
}

fn held(grammar: &Arc<Toy>, request: GenerateRequest) -> GenerateRequest {
    GenerateRequest { grammar: Some(grammar.clone()), ..request }
}

/// Even tokens, but after every fifth token the odd run 1, 3, .. 39 is forced; ends after four runs.
fn runs(history: &[u32]) -> Then {
    match history.len() {
        100.. => Then::End,
        n if n % 25 < 5 => Then::Any((0..VOCAB).step_by(2).collect()),
        n => Then::Only((n as u32 % 25 - 5..20).map(|i| 2 * i + 1).collect()),
    }
}

fn check_runs(ids: &[u32]) {
    assert_eq!(ids.len(), 100);
    for (i, &id) in ids.iter().enumerate() {
        match i as u32 % 25 {
            0..5 => assert!(id % 2 == 0, "{id} at {i}"),
            n => assert_eq!(id, 2 * (n - 5) + 1, "at {i}"),
        }
    }
}

fn logprobs(request: GenerateRequest) -> GenerateRequest {
    let sampling = SamplingParams { logprobs: Some(0), ..request.sampling };
    GenerateRequest { sampling, ..request }
}

#[test]
fn every_token_is_one_the_grammar_allows() {
    let engine = start(CONFIG);
    for seed in 0..4 {
        let sampling = SamplingParams { seed, ..Default::default() };
        let asked = GenerateRequest { sampling, ..request(prompt(seed as u32, 40), 200) };
        let answer = ask(&engine, held(&toy(runs), asked));
        check_runs(&answer.ids());
        assert_eq!(answer.end, Some(Ok(FinishReason::Stop)));
        assert_eq!(answer.usage.completion_tokens, 100);
    }
    assert_whole(&engine);
}

#[test]
fn a_grammar_does_not_start_for_a_request_that_never_runs() {
    let (engine, grammar) = (start(CONFIG), toy(runs));
    let asked = |deadline| GenerateRequest { deadline, ..held(&grammar, request(prompt(1, 40), 200)) };
    assert!(ask(&engine, asked(Some(Instant::now()))).expired);
    check_runs(&ask(&engine, asked(None)).ids());
    assert_eq!(grammar.started.load(Ordering::SeqCst), 1);
}

/// One answer per prompt, however the grammar is used.
fn answers(
    config: EngineConfig,
    delay: Duration,
    change: fn(GenerateRequest) -> GenerateRequest,
) -> Vec<Vec<u32>> {
    let engine = start(config);
    let grammar = slow_toy(runs, delay);
    let asked: Vec<_> =
        (0..6).map(|i| engine.submit(change(held(&grammar, request(prompt(i, 70), 200)))).unwrap()).collect();
    let answers: Vec<_> = asked.into_iter().map(|g| collect(g).ids()).collect();
    assert_whole(&engine);
    assert_eq!(grammar.started.load(Ordering::SeqCst), 6, "each sequence has a state of its own");
    answers
}

#[test]
fn answers_are_the_same_whether_tokens_are_forced_early_late_or_drawn() {
    let expected = answers(CONFIG, Duration::ZERO, |asked| asked);
    expected.iter().for_each(|ids| check_runs(ids));
    assert_eq!(answers(CONFIG, Duration::from_millis(3), |asked| asked), expected, "late");
    assert_eq!(answers(CONFIG, Duration::ZERO, logprobs), expected, "drawn one by one");
    let small = EngineConfig { max_batch_tokens: 8, ..CONFIG };
    assert_eq!(answers(small, Duration::ZERO, |asked| asked), expected, "in small chunks");
    let tight = EngineConfig { kv_blocks: 16, ..CONFIG };
    assert_eq!(answers(tight.clone(), Duration::ZERO, |asked| asked), expected, "under preemption");
    assert_eq!(answers(tight, Duration::from_millis(1), |asked| asked), expected, "late under preemption");
}

/// Any token, but every seventh is an even one, and the end comes after 80.
fn loose(history: &[u32]) -> Then {
    match history.len() {
        80.. => Then::End,
        n if n % 7 == 3 => Then::Any((0..VOCAB).step_by(2).collect()),
        _ => Then::Any((0..VOCAB).collect()),
    }
}

#[test]
fn answers_are_the_same_with_drafts() {
    let asked = |grammar: &Arc<Toy>, change: fn(GenerateRequest) -> GenerateRequest| {
        (0..6).map(|i| change(held(grammar, request(prompt(i, 70), 120)))).collect::<Vec<_>>()
    };
    let sampled = |asked| {
        let sampling = SamplingParams { seed: 5, frequency_penalty: 0.3, ..Default::default() };
        GenerateRequest { sampling, ..asked }
    };
    for change in [|asked| asked, sampled, logprobs] {
        check_drafted(0.01, &CONFIG, &asked(&toy(loose), change));
        check_drafts(CONFIG, asked(&toy(runs), change));
    }
    let late = asked(&slow_toy(loose, Duration::from_millis(1)), |asked| asked);
    check_drafted(0.01, &CONFIG, &late);
    check_drafts(EngineConfig { kv_blocks: 16, ..CONFIG }, asked(&toy(loose), |asked| asked));
    let one_way = Arc::new(Toy { rolls_back: false, ..Arc::into_inner(toy(loose)).unwrap() });
    for Answer { usage, .. } in check_drafts(CONFIG, asked(&one_way, |asked| asked)) {
        let rejected = usage.drafted_tokens - usage.accepted_tokens;
        assert!(rejected <= 64, "{rejected} tokens rejected although it cannot go back");
    }
}

#[test]
fn answers_are_the_same_where_steps_are_queued_before_the_grammar_has_answered() {
    for delay in [Duration::ZERO, Duration::from_millis(1)] {
        for (then, least) in [(loose as fn(&[u32]) -> Then, 200), (runs, 1)] {
            let grammar = slow_toy(then, delay);
            let sampling = |i: u32| SamplingParams { seed: i.into(), ..Default::default() };
            let asked = |i| GenerateRequest { sampling: sampling(i), ..request(prompt(i, 70), 200) };
            // A free one beside them, which has no part in what is forced on the others.
            let mut requests: Vec<_> = (0..5).map(|i| held(&grammar, asked(i))).collect();
            requests.push(asked(5));
            for config in [CONFIG, EngineConfig { kv_blocks: 20, ..CONFIG }] {
                let rows = check_ahead(config, requests.clone());
                assert!(rows >= least, "{rows} rows");
            }
        }
    }
}

#[test]
fn accepted_drafts_are_parsed_once_and_rejected_ones_no_more_than_that() {
    let config = EngineConfig { max_batch_tokens: 256, ..CONFIG };
    let expected = ask(&start(config.clone()), held(&toy(loose), request(prompt(1, 70), 120))).ids();
    for (wrong_every, delay) in [(1000, 0), (9, 0), (9, 1)] {
        let predicted =
            expected.iter().enumerate().map(|(i, id)| if i % wrong_every == 8 { id ^ 1 } else { *id });
        let prediction: Arc<[u32]> = predicted.collect::<Vec<_>>().into();
        unless_disturbed("drafts", || {
            let grammar = slow_toy(loose, Duration::from_millis(delay));
            let engine = common::drafting(config.clone());
            let asked = GenerateRequest { prediction: prediction.clone(), ..request(prompt(1, 70), 120) };
            let Answer { usage, tokens, .. } = ask(&engine, held(&grammar, asked));
            assert_eq!(tokens.iter().map(|token| token.id).collect::<Vec<_>>(), expected);
            let parsed = grammar.accepted.load(Ordering::SeqCst);
            let most = usage.completion_tokens + usage.drafted_tokens - usage.accepted_tokens;
            assert!(parsed <= most, "{parsed} parsed, {usage:?}");
            usage.accepted_tokens > 0
        });
    }
}

#[test]
fn a_grammar_hears_of_what_ends_the_reasoning() {
    /// Anything up to 121, then even tokens.
    fn answer_is_even(history: &[u32]) -> Then {
        let reasons = !history.contains(&121);
        Then::Any((0..VOCAB).filter(|token| reasons || token % 2 == 0).collect())
    }
    let reasoning = ReasoningBudget { tokens: 9, opening: None, closing: 121, end: [7, 121, 122].into() };
    let grammar = toy(answer_is_even);
    let asked = (0..4).map(|i| GenerateRequest {
        reasoning: Some(reasoning.clone()),
        ..held(&grammar, request(prompt(i, 70), 40))
    });
    for answer in check_drafts(CONFIG, asked.collect()) {
        let ids = answer.ids();
        let closed = ids.iter().position(|&id| id == 121).unwrap();
        assert!(closed <= 10 && ids[closed + 1..].iter().all(|id| id % 2 == 0), "{ids:?}");
    }
}

#[test]
fn penalties_count_forced_tokens() {
    fn penalised(request: GenerateRequest) -> GenerateRequest {
        let sampling = SamplingParams { frequency_penalty: 1.5, repetition_penalty: 1.3, ..request.sampling };
        GenerateRequest { sampling, ..request }
    }
    let drawn = answers(CONFIG, Duration::ZERO, |asked| logprobs(penalised(asked)));
    assert_eq!(answers(CONFIG, Duration::ZERO, penalised), drawn);
    assert_ne!(drawn, answers(CONFIG, Duration::ZERO, |asked| asked));
}

#[test]
fn forced_tokens_cost_few_steps_and_have_no_logprob_unless_asked_for() {
    let steps = |asked: GenerateRequest| {
        let engine = start(CONFIG);
        let answer = ask(&engine, asked);
        check_runs(&answer.ids());
        assert_whole(&engine);
        (engine.stats().steps, answer)
    };
    let asked = || held(&toy(runs), request(prompt(1, 40), 200));
    let (jumped, answer) = steps(asked());
    assert!(answer.tokens.iter().all(|t| t.logprob.is_none()));
    // Four runs of one prefill or forced chunk, five draws, and the step that computes the fifth
    // when its grammar answers late; the last run is never computed.
    assert!(jumped <= 4 * 7, "{jumped} steps");
    let (drawn, answer) = steps(logprobs(asked()));
    // One more where the grammar tells of its end late.
    assert!((100..=101).contains(&drawn), "{drawn} steps");
    assert!(answer.tokens.iter().all(|t| t.logprob.is_some()));
}

#[test]
fn a_complete_grammar_ends_the_sequence_without_another_step() {
    let engine = start(CONFIG);
    let grammar = slow_toy(|h| if h.len() < 3 { Then::Any(vec![5, 6]) } else { Then::End }, Duration::ZERO);
    let answer = ask(&engine, held(&grammar, request(prompt(1, 40), 50)));
    assert_eq!((answer.tokens.len(), answer.end), (3, Some(Ok(FinishReason::Stop))));
    assert_eq!(answer.usage.completion_tokens, 3);
    assert_whole(&engine);
    assert!(engine.stats().steps <= 4);
}

#[test]
fn a_stop_token_is_drawn_only_where_the_grammar_allows_it() {
    const STOP: u32 = 7;
    let grammar = toy(|h| match h.len() {
        0..10 => Then::Any((0..VOCAB).filter(|&t| t != STOP).collect()),
        10..20 => Then::Any(vec![1, STOP]),
        _ => Then::Any(vec![STOP]),
    });
    let engine = start(CONFIG);
    for seed in 0..3 {
        let sampling = SamplingParams { seed, ..Default::default() };
        let asked = request(prompt(seed as u32, 30), 100);
        let answer =
            ask(&engine, held(&grammar, GenerateRequest { stop_tokens: vec![STOP], sampling, ..asked }));
        assert_eq!(answer.end, Some(Ok(FinishReason::Stop)));
        assert!((10..=20).contains(&answer.tokens.len()));
        assert!(!answer.ids().contains(&STOP));
    }
}

#[test]
fn max_tokens_cuts_a_forced_run() {
    let engine = start(CONFIG);
    let whole = ask(&engine, held(&toy(runs), request(prompt(2, 40), 200)));
    for max_tokens in [5, 6, 12] {
        let answer = ask(&engine, held(&toy(runs), request(prompt(2, 40), max_tokens)));
        assert_eq!(answer.end, Some(Ok(FinishReason::Length)));
        assert_eq!(answer.ids(), whole.ids()[..max_tokens]);
    }
    let scored = GenerateRequest { prompt_logprobs: true, ..request(prompt(2, 40), 0) };
    let grammar = toy(runs);
    assert_eq!(ask(&engine, held(&grammar, scored)).scores.len(), 40);
    assert_eq!(grammar.started.load(Ordering::SeqCst), 0, "nothing is generated");
}

#[test]
fn prompt_scores_and_a_grammar_go_together() {
    let engine = start(CONFIG);
    let sampling = SamplingParams { temperature: 0.0, logprobs: Some(1), ..Default::default() };
    let asked = GenerateRequest { prompt_logprobs: true, sampling, ..request(prompt(3, 90), 200) };
    let answer = ask(&engine, held(&slow_toy(runs, Duration::from_millis(1)), asked));
    assert_eq!(answer.scores.len(), 90);
    check_runs(&answer.ids());
}

#[test]
fn a_grammar_that_fails_or_panics_fails_its_request_alone() {
    let engine = start(CONFIG);
    let alone = ask(&engine, request(prompt(1, 40), 60)).ids();
    let ends = |then, message: &str| {
        let beside = engine.submit(request(prompt(1, 40), 60)).unwrap();
        let answer: Answer = ask(&engine, held(&toy(then), request(prompt(2, 40), 60)));
        assert_eq!(answer.end, Some(Err(message.into())));
        assert_eq!(collect(beside).ids(), alone);
    };
    ends(|_| Then::Error, "the toy gave up");
    ends(|h| if h.len() < 4 { Then::Any(vec![3]) } else { Then::Error }, "the toy gave up");
    ends(|h| if h.len() < 4 { Then::Any(vec![3]) } else { Then::Panic }, "the grammar failed unexpectedly");
    ends(|_| Then::Any(vec![]), "no token was allowed here");
    assert_whole(&engine);
}

#[test]
fn a_generation_may_be_dropped_while_its_grammar_works() {
    let engine = start(CONFIG);
    for wait in 0..10 {
        let grammar = slow_toy(runs, Duration::from_millis(2));
        let generation = engine.submit(held(&grammar, request(prompt(1, 40), 200))).unwrap();
        std::thread::sleep(Duration::from_millis(wait));
        drop(generation);
    }
    assert_whole(&engine);
    check_runs(&ask(&engine, held(&toy(runs), request(prompt(1, 40), 200))).ids());
}
