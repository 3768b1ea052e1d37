//! Drafts change nothing but speed: the same answers with and without, token for token, whatever is
//! asked; and the distribution that is drawn from stays what the model says.

mod common;

use std::time::Duration;

use common::{
    CONFIG, ask, ask_at_once, assert_whole, check_drafted, check_drafts as check, collect, drafting, model,
    penalised, prompt, request, sampled, start, unless_disturbed,
};
use rudder_engine::{DraftMode, Engine, EngineConfig, Event, FinishReason, GenerateRequest, SamplingParams};
use rudder_model::{Model, ModelConfig};
use rudder_ops::{Batch, OpError, SampleRow, Sampled, SamplerScratch, sample_row};

#[test]
fn greedy_answers_are_the_same() {
    check_drafted(0.1, &CONFIG, &[0, 1, 2, 3].map(|i| request(prompt(i, 70), 120)));
}

#[test]
fn seeded_answers_with_penalties_and_log_probabilities_are_the_same() {
    let sampling = |i: u32| if i.is_multiple_of(2) { sampled(i.into()) } else { penalised(i.into()) };
    let asked = |i| GenerateRequest { sampling: sampling(i), ..request(prompt(i, 30), 120) };
    check_drafted(0.05, &CONFIG, &[0, 1, 2, 3, 4, 5].map(asked));
}

#[test]
fn answers_are_the_same_under_preemption_in_small_steps_and_without_prefix_cache() {
    for config in [
        EngineConfig { kv_blocks: 16, ..CONFIG },
        EngineConfig { max_batch_tokens: 12, ..CONFIG },
        EngineConfig { prefix_cache: false, ..CONFIG },
    ] {
        let asked = |i| GenerateRequest { sampling: penalised(7), ..request(prompt(i, 70), 64) };
        check(config, (0..6).map(asked).collect());
    }
}

#[test]
fn answers_end_within_a_draft_as_they_would_without() {
    let full = ask(&start(CONFIG), request(prompt(0, 70), 100)).ids();
    let limits = (1..40).map(|max_tokens| request(prompt(0, 70), max_tokens));
    let stops =
        (1..40).map(|i| GenerateRequest { stop_tokens: vec![full[i]], ..request(prompt(0, 70), 100) });
    for asked in [limits.collect::<Vec<_>>(), stops.collect()] {
        for some in asked.chunks(8) {
            check(CONFIG, some.to_vec());
        }
    }
}

#[test]
fn a_right_prediction_is_accepted_and_a_wrong_one_costs_no_token() {
    let plain = ask(&start(CONFIG), request(prompt(1, 60), 150));
    let predicted =
        |prediction: &[u32]| GenerateRequest { prediction: prediction.into(), ..request(prompt(1, 60), 150) };
    unless_disturbed("drafts of what is predicted", || {
        let right = ask(&drafting(CONFIG), predicted(&plain.ids()));
        assert_eq!(right.tokens, plain.tokens);
        assert_eq!((right.usage.predicted_tokens, right.usage.mispredicted_tokens), (150, 0));
        right.usage.accepted_tokens > 20
    });
    let wrong = ask(&drafting(CONFIG), predicted(&[plain.ids()[0] ^ 1; 90]));
    assert_eq!(wrong.tokens, plain.tokens);
    assert_eq!(wrong.end, Some(Ok(FinishReason::Length)));
    assert!(wrong.usage.mispredicted_tokens > 80);
}

#[test]
fn an_answer_helps_its_owner_or_without_owners_its_session_and_nobody_else() {
    unless_disturbed("help for all who are to have it", || all_are_helped(&drafting(CONFIG)));
}

/// Whether all are helped that are to be. Checks that nobody else is.
fn all_are_helped(engine: &Engine) -> bool {
    let accepted = |owner: Option<&str>, session: Option<&str>| {
        let (owner, session) = (owner.map(Into::into), session.map(Into::into));
        let sampling = SamplingParams { seed: 3, ..Default::default() };
        let answer = ask(engine, GenerateRequest { owner, session, sampling, ..request(prompt(2, 60), 150) });
        (answer.ids(), answer.usage.accepted_tokens)
    };
    let (expected, alone) = accepted(None, None);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let forget = |key: &str| assert!(runtime.block_on(engine.remove_session(key.into())).unwrap());
    let helped = |owner, session| {
        let (ids, count) = accepted(owner, session);
        assert_eq!(ids, expected);
        count > alone + 30
    };
    assert!(alone < 30, "what is drawn at random repeats nothing, but {alone} were foretold");
    assert!(!helped(None, None), "nobody knows whose it was");
    assert!(!helped(Some("a"), Some("a:1")));
    let sibling = helped(Some("a"), Some("a:2"));
    let without_session = helped(Some("a"), None);
    assert!(!helped(Some("b"), Some("b:1")), "another owner's");
    assert!(!helped(None, Some("1")));
    let session = helped(None, Some("1"));
    assert!(!helped(None, Some("2")), "another session's, and maybe another's");
    forget("a:2");
    let by_those_left = helped(Some("a"), Some("a:3"));
    assert!(!helped(Some("c"), Some("c:1")));
    forget("c:1");
    assert!(!helped(Some("c"), Some("c:2")), "it was to be forgotten");
    forget("1");
    assert!(!helped(None, Some("1")));
    sibling && without_session && session && by_those_left
}

#[test]
fn an_answer_helps_a_sibling_that_runs_beside_it() {
    let asked = |session: &str, max_tokens| GenerateRequest {
        owner: Some("a".into()),
        session: Some(session.into()),
        sampling: SamplingParams { seed: 3, ..Default::default() },
        ..request(prompt(2, 60), max_tokens)
    };
    let expected = ask(&start(CONFIG), asked("0", 190)).ids();
    unless_disturbed("drafts of what the first one said", || {
        let engine = drafting(CONFIG);
        let mut first = engine.submit(asked("1", 190)).unwrap();
        let mut said = 0;
        while said < 90 {
            let event = first.next_blocking().expect("it goes on");
            said += usize::from(matches!(event, Event::Token(_)));
        }
        let second = ask(&engine, asked("2", 80));
        assert_eq!(second.ids(), expected[..80]);
        assert_eq!(collect(first).ids(), expected[90..]);
        assert_whole(&engine);
        second.usage.accepted_tokens > 30
    });
}

#[test]
fn dropping_a_generation_that_drafts_frees_its_blocks() {
    let engine = drafting(CONFIG);
    let answer = ask(&engine, request(prompt(1, 60), 150)).ids();
    for events in 1..8 {
        let asked = GenerateRequest { prediction: answer.clone().into(), ..request(prompt(1, 60), 150) };
        let mut generation = engine.submit(asked).unwrap();
        (0..events).for_each(|_| drop(generation.next_blocking()));
    }
    assert_whole(&engine);
}

/// The next token depends on the last one alone, as [`chance`] tells.
struct Chain {
    config: ModelConfig,
    last: Vec<u32>,
    scratch: SamplerScratch,
}

const STATES: u32 = 5;

/// Probability that `next` follows `last`: 0.6 for the one after it, the rest shared out unevenly.
fn chance(last: u32, next: u32) -> f64 {
    match (next + STATES - last) % STATES {
        1 => 0.6,
        0 => 0.19,
        2 => 0.13,
        3 => 0.07,
        _ => 0.01,
    }
}

impl Model for Chain {
    fn config(&self) -> &ModelConfig {
        &self.config
    }
    fn forward(&mut self, batch: &Batch) -> Result<(), OpError> {
        std::thread::sleep(Duration::from_millis(1));
        self.last = batch.outputs.iter().map(|&row| batch.tokens[row as usize] % STATES).collect();
        Ok(())
    }
    fn sample(&mut self, rows: &[SampleRow<'_>], out: &mut Vec<Sampled>) -> Result<(), OpError> {
        for (row, &last) in rows.iter().zip(&self.last) {
            let mut logits = vec![f32::NEG_INFINITY; self.config.vocab];
            (0..STATES).for_each(|next| logits[next as usize] = chance(last, next).ln() as f32);
            out.push(sample_row(&mut logits, row, &mut self.scratch));
        }
        Ok(())
    }
    fn logits(&mut self) -> Result<Vec<f32>, OpError> {
        Ok(Vec::new())
    }
}

#[test]
fn tokens_follow_the_models_distribution_whatever_was_drafted() {
    unless_disturbed("drafts", || accepted_of_a_chain() > 500);
}

/// How many tokens were accepted of what a [`Chain`] draws, after a check of their distribution.
fn accepted_of_a_chain() -> usize {
    let chain =
        Chain { config: model(&CONFIG).config().clone(), last: Vec::new(), scratch: Default::default() };
    let engine = Engine::start(Box::new(chain), EngineConfig { draft: DraftMode::Lookup, ..CONFIG });
    let likely: Vec<u32> = (0..240).map(|i| i % STATES).collect();
    let mut seen = vec![vec![0.0; STATES as usize]; STATES as usize];
    let mut accepted = 0;
    for round in 0..10 {
        let asked = |seed| GenerateRequest {
            sampling: SamplingParams { seed, ..Default::default() },
            prediction: likely.clone().into(),
            ..request([4], 240)
        };
        for answer in ask_at_once(&engine, &(0..8).map(|i| asked(8 * round + i)).collect::<Vec<_>>()) {
            accepted += answer.usage.accepted_tokens;
            let ids = answer.ids();
            ids.iter().zip(&ids[1..]).for_each(|(&last, &next)| seen[last as usize][next as usize] += 1.0);
        }
    }
    for (last, row) in seen.iter().enumerate() {
        let total: f64 = row.iter().sum();
        for (next, n) in row.iter().enumerate() {
            let p = chance(last as u32, next as u32);
            // five standard deviations of a binomial share
            let bound = 5.0 * (p * (1.0 - p) / total).sqrt();
            assert!((n / total - p).abs() < bound, "{last} to {next}: {} against {p}", n / total);
        }
    }
    accepted
}
