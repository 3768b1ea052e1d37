//! Turns replayed as the step loop runs them: how many steps they take, and how long by a step's cost as
//! measured on a CPU. The tokens are known beforehand, so all of it is the same each time.
//!
//! `benches/drafts.py --record` recorded the turns under `tests/recorded` of Qwen2.5-Coder-0.5B.

use std::time::Duration;

use super::step_cost::StepCost;
use super::*;

/// What to replay.
#[derive(Default)]
struct Turn<'a> {
    prompt: &'a [u32],
    answer: &'a [u32],
    prediction: &'a [u32],
    party: Option<&'a Party>,
}

/// What it took.
#[derive(Debug, Default)]
struct Took {
    steps: usize,
    drafted: usize,
    accepted: usize,
    /// Tokens for each step without drafts in the same time.
    speed: f32,
}

/// A step's time in that of one row; two cores of an AMD EPYC, Qwen2.5-Coder-0.5B.
fn cost(rows: usize) -> f32 {
    let more = rows as f32 - 1.0;
    1.0 + 0.06 * more + 0.0035 * more * more
}

/// An engine that knows its steps' times.
fn drafting() -> Drafting {
    let mut drafting = Drafting::new(64);
    drafting.cost =
        StepCost::known(&Vec::from_iter(1..=64), |rows| Duration::from_secs_f32(0.012 * cost(rows)));
    drafting
}

fn replay(drafting: &mut Drafting, turn: &Turn<'_>) -> Took {
    let (prompt, answer) = (turn.prompt, turn.answer);
    let expected = prompt.len() + answer.len();
    let mut drafter = Drafter::new(expected, turn.prediction, turn.party, &drafting.siblings);
    let mut own = prompt.to_vec();
    let (mut took, mut time) = (Took::default(), 0.0);
    while own.len() < expected {
        let rest = &answer[own.len() - prompt.len()..];
        drafting.begin();
        drafter.index(&own, drafting.to_index);
        drafter.aim(&own, &drafting.acceptance);
        let gains = drafter.gains(&own, MAX_DRAFT.min(rest.len() - 1), &drafting.acceptance);
        drafting.lengths.offer(0, gains);
        drafting.sequences.push(0);
        drafting.choose(1, None);
        drafting.draft.clear();
        drafter.draft(&own, drafting.chosen[0], &mut drafting.draft, |_| false);
        let accepted = drafting.draft.iter().zip(rest).take_while(|(draft, token)| draft == token).count();
        took.steps += 1;
        took.drafted += drafting.draft.len();
        took.accepted += accepted;
        time += cost(1 + drafting.draft.len());
        for &token in &rest[..=accepted] {
            drafter.observe(&own, token, &mut drafting.acceptance);
            own.push(token);
        }
    }
    took.speed = answer.len() as f32 / time;
    if let Some(party) = turn.party {
        drafting.siblings.keep(party, None, &own, prompt.len());
    }
    took
}

/// Something like code: names, some of them often, and between them a few tokens that are everywhere.
fn code(seed: u32, len: usize) -> Vec<u32> {
    let mut state = seed;
    let mut next = move |below: u32| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) % below
    };
    let token = |at| match at % 3 {
        0 => next(8),
        1 => 100 + next(40),
        _ => 1000 + next(400),
    };
    (0..len).map(token).collect()
}

/// `file` with an edit every 25 tokens: what `edit` makes of the tokens there.
fn edited(file: &[u32], edit: impl Fn(usize, &[u32]) -> Vec<u32>) -> Vec<u32> {
    file.chunks(25).enumerate().flat_map(|(i, lines)| edit(i, lines)).collect()
}

fn copied(file: &[u32], answer: &[u32]) -> Took {
    let prompt = [&code(9, 60), file, &code(8, 20)].concat();
    replay(&mut drafting(), &Turn { prompt: &prompt, answer, ..Turn::default() })
}

/// A recorded prompt and its answer.
fn recorded(text: &str) -> (Vec<u32>, Vec<u32>) {
    let mut lines = text.lines().map(|line| line.split(' ').map(|id| id.parse().unwrap()).collect());
    (lines.next().unwrap(), lines.next().unwrap())
}

#[test]
fn a_copy_takes_few_steps() {
    let file = code(1, 500);
    let took = copied(&file, &file);
    assert!(took.steps <= 38 && took.speed > 5.0, "{took:?}");
}

#[test]
fn a_copy_goes_on_at_once_after_an_edit_every_25_tokens() {
    let file = code(1, 500);
    let new = |i: usize| 5000 + i as u32;
    let edits: [(&str, Vec<u32>, f32); 5] = [
        ("replaced", edited(&file, |i, lines| [&lines[..12], &[new(i)], &lines[13..]].concat()), 4.4),
        ("two for one", edited(&file, |i, lines| [&lines[..12], &[new(i), 3], &lines[13..]].concat()), 3.2),
        ("put in", edited(&file, |i, lines| [&lines[..12], &[new(i)], &lines[12..]].concat()), 3.8),
        ("ten put in", edited(&file, |i, lines| [&lines[..12], &[new(i); 10], &lines[12..]].concat()), 3.2),
        ("left out", edited(&file, |_, lines| [&lines[..12], &lines[16..]].concat()), 4.6),
    ];
    for (name, answer, least) in edits {
        let took = copied(&file, &answer);
        assert!(took.speed > least, "{name}: {took:?}");
    }
}

#[test]
fn what_repeats_nothing_costs_next_to_nothing() {
    let answer = code(3, 400);
    let took = copied(&code(1, 400), &answer);
    assert!(took.speed > 0.97, "{took:?}");
}

#[test]
fn a_sibling_asked_the_same_is_repeated_from_its_first_token() {
    let (party, other) = (Party::Owner("a".into()), Party::Owner("b".into()));
    let (prompt, answer) = (code(1, 100), code(2, 300));
    let mut drafting = drafting();
    let mut ask =
        |party| replay(&mut drafting, &Turn { prompt: &prompt, answer: &answer, party, prediction: &[] });
    let [first, again, others] = [Some(&party), Some(&party), Some(&other)].map(&mut ask);
    assert!(first.accepted < 30 && others.accepted < 30, "{first:?} {others:?}");
    assert!(again.accepted > 270 && again.steps < 25, "{again:?}");
}

/// What a model said: files with some changes and with many, lines alike where it made some up instead,
/// and free text.
#[test]
fn recorded_turns_are_as_fast_as_they_were() {
    for (text, least) in [
        (include_str!("../../tests/recorded/edit-rename-a-method.tokens"), 5.0),
        (include_str!("../../tests/recorded/edit-add-a-docstring.tokens"), 5.3),
        (include_str!("../../tests/recorded/edit-add-type-hints.tokens"), 2.7),
        (include_str!("../../tests/recorded/edit-change-a-constant.tokens"), 2.7),
        (include_str!("../../tests/recorded/free-explain.tokens"), 1.04),
        (include_str!("../../tests/recorded/free-new-code.tokens"), 1.06),
        (include_str!("../../tests/recorded/free-story.tokens"), 1.45),
        (include_str!("../../tests/recorded/free-list.tokens"), 1.1),
    ] {
        let (prompt, answer) = recorded(text);
        let took = replay(&mut drafting(), &Turn { prompt: &prompt, answer: &answer, ..Turn::default() });
        assert!(took.speed > least, "{took:?}, not {least}");
    }
}
