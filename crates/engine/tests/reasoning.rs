//! Budgets for reasoning, over a tiny real checkpoint: where it is cut, where it is left alone, and what the
//! answer is then.

mod common;

use common::{CONFIG, VOCAB, ask, assert_whole, check_ahead, check_drafts, prompt, request, start};
use rudder_engine::{EngineConfig, FinishReason, GenerateRequest, ReasoningBudget};

const LEN: usize = 40;

fn asked(budget: Option<ReasoningBudget>) -> GenerateRequest {
    GenerateRequest { reasoning: budget, ..request(prompt(0, 70), LEN) }
}

fn budget(tokens: usize, opening: Option<u32>, closing: u32) -> ReasoningBudget {
    ReasoningBudget { tokens, opening, closing, end: [3, closing, 4].into() }
}

/// A token that is not among these.
fn other_than(ids: &[u32]) -> u32 {
    (0..VOCAB).rev().find(|id| !ids.contains(id)).unwrap()
}

#[test]
fn reasoning_ends_where_its_budget_is_spent_and_the_answer_goes_on_from_there() {
    let engine = start(CONFIG);
    let full = ask(&engine, asked(None)).ids();
    let closing = other_than(&full);
    for tokens in [1, 10] {
        let answer = ask(&engine, asked(Some(budget(tokens, None, closing))));
        assert_eq!(answer.end, Some(Ok(FinishReason::Length)));
        assert_eq!(answer.usage.completion_tokens, LEN);
        let said = [&full[..tokens], &[3, closing, 4]].concat();
        let ids = answer.ids();
        assert_eq!(ids[..said.len()], said);
        let so_far = [prompt(0, 70), said.clone()].concat();
        assert_eq!(ids[said.len()..], ask(&engine, request(so_far, LEN - said.len())).ids());
        let none_drawn = answer.tokens[tokens..said.len()].iter().all(|token| token.logprob.is_none());
        assert!(none_drawn);
    }
    assert_whole(&engine);
}

#[test]
fn reasoning_counts_from_the_token_that_opens_it() {
    let engine = start(CONFIG);
    let full = ask(&engine, asked(None)).ids();
    let (opening, closing) = (full[6], other_than(&full));
    let first = full.iter().position(|&id| id == opening).unwrap();
    let ids = ask(&engine, asked(Some(budget(8, Some(opening), closing)))).ids();
    let spent = first + 1 + 8;
    assert_eq!(ids[..spent + 3], [&full[..spent], &[3, closing, 4]].concat());
    let ids = ask(&engine, asked(Some(budget(0, Some(opening), closing)))).ids();
    assert_eq!(ids[..first + 4], [&full[..=first], &[3, closing, 4]].concat());
}

#[test]
fn reasoning_within_its_budget_is_left_alone() {
    let engine = start(CONFIG);
    let full = ask(&engine, asked(None)).ids();
    let never = other_than(&full);
    for left_alone in [
        budget(full.iter().position(|&id| id == full[9]).unwrap() + 1, None, full[9]),
        budget(LEN + 1, None, never),
        budget(1, Some(never), never),
    ] {
        assert_eq!(ask(&engine, asked(Some(left_alone))).ids(), full);
    }
}

#[test]
fn the_limit_of_the_answer_may_come_within_the_end_of_the_reasoning() {
    let engine = start(CONFIG);
    let full = ask(&engine, asked(None)).ids();
    let closing = other_than(&full);
    let short = GenerateRequest { max_tokens: 7, ..asked(Some(budget(5, None, closing))) };
    let answer = ask(&engine, short);
    assert_eq!(answer.ids(), [&full[..5], &[3, closing]].concat());
    assert_eq!(answer.end, Some(Ok(FinishReason::Length)));
    assert_whole(&engine);
}

#[test]
fn budgets_are_the_same_with_drafts_and_under_preemption() {
    let budget = || Some(budget(12, None, VOCAB - 1));
    let requests: Vec<_> =
        (0..6).map(|i| GenerateRequest { reasoning: budget(), ..request(prompt(i, 70), 60) }).collect();
    let answers = check_drafts(CONFIG, requests.clone());
    assert_eq!(answers[0].ids()[12..15], [3, VOCAB - 1, 4]);
    let tight = check_drafts(EngineConfig { kv_blocks: 16, ..CONFIG }, requests);
    let ids = |answers: &[common::Answer]| answers.iter().map(common::Answer::ids).collect::<Vec<_>>();
    assert_eq!(ids(&tight), ids(&answers));
}

#[test]
fn budgets_are_the_same_where_steps_are_queued_ahead() {
    let asked = |i| GenerateRequest {
        reasoning: Some(budget(12 + i as usize, None, VOCAB - 1)),
        ..request(prompt(i, 70), 60)
    };
    assert!(check_ahead(CONFIG, (0..6).map(asked).collect()) > 100);
}
