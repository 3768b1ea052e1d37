//! Owners, deadlines and places in line.

mod common;

use std::time::{Duration, Instant};

use common::{CONFIG, ask, collect, prompt, queued, request, start};
use rudder_engine::{EngineConfig, Event, GenerateRequest, SubmitError};

/// One at a time, so that what comes second waits.
const NARROW: EngineConfig = EngineConfig { max_sequences: 1, max_waiting: 3, ..CONFIG };

fn of(owner: &str, prompt: Vec<u32>, max_tokens: usize) -> GenerateRequest {
    GenerateRequest { owner: Some(owner.into()), ..request(prompt, max_tokens) }
}

#[test]
fn what_still_waits_at_its_deadline_is_dropped_and_what_runs_is_not() {
    let engine = start(NARROW);
    let running = engine.submit(GenerateRequest {
        deadline: Some(Instant::now() + Duration::from_secs(3600)),
        ..request(prompt(1, 20), 200)
    });
    let late = GenerateRequest { deadline: Some(Instant::now()), ..request(prompt(2, 20), 5) };
    let late = collect(engine.submit(late).unwrap());
    assert!(late.expired && late.tokens.is_empty() && late.prefill.is_empty(), "{late:?}");
    assert_eq!(late.usage.prefill, Duration::ZERO);
    assert_eq!(collect(running.unwrap()).tokens.len(), 200);
    let in_time = GenerateRequest {
        deadline: Some(Instant::now() + Duration::from_secs(3600)),
        ..request(prompt(3, 20), 5)
    };
    assert_eq!(ask(&engine, in_time).tokens.len(), 5);
    assert_eq!(engine.stats().waiting, 0);
}

#[test]
fn a_full_queue_still_takes_another_owners_request() {
    let (engine, ahead) = queued(NARROW, None);
    let closed = ahead.gate.lock().unwrap();
    let flood: Vec<_> = (0..4).map(|i| engine.submit(of("flood", prompt(i, 50), 100)).unwrap()).collect();
    let refused = engine.submit(of("flood", prompt(9, 50), 100)).err();
    drop(closed);
    assert!(matches!(refused, Some(SubmitError::Busy { .. })), "{refused:?}");
    assert_eq!(ask(&engine, of("modest", prompt(7, 10), 3)).tokens.len(), 3);
    drop(flood);
    common::eventually("all places are free", || engine.stats().waiting == 0);
    assert_eq!(ask(&engine, of("flood", prompt(8, 10), 3)).tokens.len(), 3);
}

#[test]
fn those_who_wait_hear_where_they_stand() {
    let engine = start(NARROW);
    let mut first = engine.submit(request(prompt(1, 20), 200)).unwrap();
    while !matches!(first.next_blocking(), Some(Event::Token(_))) {}
    let mut waiting = engine.submit(request(prompt(2, 20), 1)).unwrap();
    // It either waits long enough to hear, or has its turn at once.
    let mut positions = Vec::new();
    while let Some(event) = waiting.next_blocking() {
        if let Event::Queued { position } = event {
            positions.push(position);
        }
    }
    assert!(positions.iter().all(|&position| position == 1), "{positions:?}");
}
