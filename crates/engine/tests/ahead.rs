//! Steps that are queued while the one before them runs change nothing but speed: over a real checkpoint whose draws come a step
//! later, as those of a device with a queue do.

mod common;

use std::sync::atomic::Ordering;

use common::{
    CONFIG, Fault, ask, assert_whole, check_ahead as check, collect, penalised, prompt, queued, request,
    sampled, start, unless_disturbed,
};
use rudder_engine::{DraftMode, EngineConfig, Event, FinishReason, GenerateRequest, SamplingParams};

#[test]
fn answers_are_the_same_greedy_or_drawn() {
    let asked = |i| GenerateRequest { sampling: sampled(i), ..request(prompt(i as u32, 70), 100) };
    assert!(check(CONFIG, (0..6).map(asked).collect()) > 300);
    assert!(check(CONFIG, (0..6).map(|i| request(prompt(i, 30), 100)).collect()) > 300);
}

#[test]
fn penalties_count_what_was_drawn_in_flight() {
    let asked = |i| GenerateRequest { sampling: penalised(i), ..request(prompt(i as u32, 30), 100) };
    assert!(check(CONFIG, (0..6).map(asked).collect()) > 300);
}

#[test]
fn answers_end_in_flight_as_they_would_on_the_ground() {
    let full = ask(&start(CONFIG), request(prompt(0, 70), 100)).ids();
    let limits = (1..25).map(|max_tokens| request(prompt(0, 70), max_tokens));
    let stops =
        (1..25).map(|i| GenerateRequest { stop_tokens: vec![full[3 * i]], ..request(prompt(0, 70), 100) });
    for asked in [limits.collect::<Vec<_>>(), stops.collect()] {
        for some in asked.chunks(8) {
            assert!(check(CONFIG, some.to_vec()) > 0);
        }
    }
}

#[test]
fn answers_are_the_same_under_preemption_for_few_places_and_without_prefix_cache() {
    for config in [
        EngineConfig { kv_blocks: 16, ..CONFIG },
        EngineConfig { max_sequences: 2, ..CONFIG },
        EngineConfig { max_batch_tokens: 12, ..CONFIG },
        EngineConfig { prefix_cache: false, ..CONFIG },
    ] {
        let rows = check(config.clone(), (0..8).map(|i| request(prompt(i, 70), 64)).collect());
        assert!(rows > 0, "{config:?}");
    }
}

#[test]
fn log_probabilities_come_with_what_was_drawn_in_flight_but_for_very_many() {
    let scored = |logprobs| GenerateRequest {
        sampling: SamplingParams { logprobs: Some(logprobs), ..penalised(3) },
        ..request(prompt(3, 40), 60)
    };
    for logprobs in [0, 3, 32] {
        assert!(check(CONFIG, vec![scored(logprobs), request(prompt(4, 40), 60)]) > 60);
    }
    // The other one may begin a step later, and ends before all the same.
    assert_eq!(check(CONFIG, vec![scored(33), request(prompt(4, 40), 50)]), 0);
    let short = GenerateRequest { max_tokens: 5, ..scored(33) };
    assert!(check(CONFIG, vec![short, request(prompt(4, 40), 100)]) > 40, "from its end on");
}

#[test]
fn drafts_are_made_where_they_pay_and_other_steps_are_queued_ahead() {
    let config = EngineConfig { draft: DraftMode::Lookup, ..CONFIG };
    let drawn = GenerateRequest { sampling: sampled(5), ..request(prompt(1, 60), 120) };
    let expected = ask(&start(CONFIG), drawn.clone());
    unless_disturbed("drafts, and steps ahead without them", || {
        let (engine, ahead) = queued(config.clone(), None);
        // Nothing foretells what is drawn, until it is predicted.
        let alone = ask(&engine, drawn.clone());
        let steps = ahead.steps.load(Ordering::SeqCst);
        let prediction = expected.ids().into();
        let predicted = ask(&engine, GenerateRequest { prediction, ..drawn.clone() });
        assert_eq!([&alone.tokens, &predicted.tokens], [&expected.tokens; 2]);
        let fewer = ahead.steps.load(Ordering::SeqCst) < steps + 80;
        println!("{ahead:?} after {steps}, {:?}", predicted.usage);
        steps > 40 && predicted.usage.accepted_tokens > 30 && fewer
    });
}

#[test]
fn a_long_prompt_goes_on_beside_a_decode_that_flies() {
    let config = EngineConfig { max_batch_tokens: 12, ..CONFIG };
    let (engine, ahead) = queued(config, None);
    // Nothing runs before both are asked for. The prompt takes more steps than are taken in a row without one that only decodes.
    let closed = ahead.gate.lock().unwrap();
    let decodes = engine.submit(request(prompt(0, 20), 230)).unwrap();
    let prompts = engine.submit(request(prompt(1, 240), 1)).unwrap();
    drop(closed);
    assert_eq!(collect(prompts).tokens.len(), 1);
    assert_eq!(collect(decodes).tokens.len(), 230);
    assert!(ahead.steps.load(Ordering::SeqCst) > 0);
    assert!(engine.stats().steps <= 2 + 229, "the prompt waited: {} steps", engine.stats().steps);
}

#[test]
fn who_goes_away_in_flight_leaves_no_block_held_and_others_their_answers() {
    let (engine, ahead) = queued(CONFIG, None);
    let expected = ask(&start(CONFIG), request(prompt(9, 40), 200)).ids();
    let stays = engine.submit(request(prompt(9, 40), 200)).unwrap();
    for i in 0..20 {
        let mut goes = engine.submit(request(prompt(i, 40), 200)).unwrap();
        let mut tokens = 0;
        while tokens < i % 5 + 1 {
            tokens += u32::from(matches!(goes.next_blocking(), Some(Event::Token(_))));
        }
    }
    assert_eq!(collect(stays).ids(), expected);
    assert_whole(&engine);
    assert!(ahead.steps.load(Ordering::SeqCst) > 0);
}

#[test]
fn a_fault_in_flight_ends_its_requests_and_the_engine_goes_on() {
    let expected = ask(&start(CONFIG), request(prompt(0, 70), 64)).ids();
    for fault in [Fault::Forward, Fault::Panic, Fault::Drawn] {
        let (engine, ahead) = queued(CONFIG, Some(fault));
        let message = ask(&engine, request(prompt(1, 70), 64)).end.unwrap().expect_err("its step failed");
        assert!(message.starts_with("the model failed"), "{message}");
        let answer = ask(&engine, request(prompt(0, 70), 64));
        assert_eq!(
            (answer.ids(), answer.end),
            (expected.clone(), Some(Ok(FinishReason::Length))),
            "{fault:?}"
        );
        assert!(ahead.steps.load(Ordering::SeqCst) > 0);
        assert_whole(&engine);
    }
}
