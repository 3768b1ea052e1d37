//! `bench agent-trace` against a server: what it sends, in which order, and what it makes of the answers.

use clap::Parser;
use rudder_bench::{AgentTraceArgs, Report, TurnKind};
use serde_json::{Value, json};
use std::path::PathBuf;

#[allow(dead_code)]
mod mock;
use mock::Deed;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: AgentTraceArgs,
}

fn turn(say: &str, kind: &str) -> Value {
    json!({"say": say, "answer": format!("recorded {say}"), "output": 3, "pause": 0.02, "kind": kind})
}

/// A session of two turns and, after the first, two subagents.
fn trace() -> Value {
    let forks = json!([{"after": 1, "turns": [turn("f", "work"), turn("g", "work")]},
        {"after": 1, "turns": [turn("h", "work")]}]);
    let session = json!({"turns": [turn("a", "work"), turn("b", "edit")], "forks": forks});
    json!({"format": 1, "name": "t", "system": "sys", "sessions": [session]})
}

/// Replays the trace; its JSON result, and the bodies that the server got.
async fn replay(name: &str, deeds: Vec<Deed>, more: &[&str]) -> (anyhow::Result<()>, Report, Vec<Value>) {
    let (address, bodies) = mock::recording(deeds).await;
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let (file, result) = (folder.join(format!("{name}.trace")), folder.join(format!("{name}.json")));
    std::fs::write(&file, trace().to_string()).unwrap();
    let url = format!("http://{address}");
    let args = ["bench", file.to_str().unwrap(), "--url", &url, "--json", result.to_str().unwrap()];
    let args = Cli::try_parse_from([&args, more].concat()).unwrap().args;
    let ended = rudder_bench::agent_trace(args).await;
    let report = serde_json::from_str(&std::fs::read_to_string(&result).unwrap()).unwrap();
    let bodies = std::mem::take(&mut *bodies.lock().unwrap());
    (ended, report, bodies)
}

/// What each message of a request says.
fn said(body: &Value) -> Vec<&str> {
    body["messages"].as_array().unwrap().iter().map(|message| message["content"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn history_grows_and_forks_begin_with_all_of_it() {
    let (ended, report, bodies) = replay("history", vec![Deed::Answer], &[]).await;
    ended.unwrap();
    let system = "Workspace 0-1.\nsys";
    let asked = |last: &str| bodies.iter().map(said).find(|said| said.last() == Some(&last)).unwrap();
    assert_eq!(bodies.len(), 5);
    assert_eq!(asked("a"), [system, "a"]);
    assert_eq!(asked("f"), [system, "a", " w w w", "f"]);
    assert_eq!(asked("h"), [system, "a", " w w w", "h"]);
    assert_eq!(asked("g"), [system, "a", " w w w", "f", " w w w", "g"]);
    assert_eq!(asked("b"), [system, "a", " w w w", "b"]);
    assert_eq!(said(&bodies[0]), asked("a"));
    assert_eq!(said(&bodies[4]), asked("b"), "the session waits for its forks");

    let requests = &report.runs[0].requests;
    let places: Vec<_> = requests.iter().map(|request| (request.session, request.turn)).collect();
    assert_eq!(places, [(0, 0), (0, 1), (1, 1), (1, 2), (2, 1)]);
    assert_eq!(requests[1].kind, Some(TurnKind::Edit));
    assert!(requests.iter().all(|request| request.output_hash == requests[0].output_hash));
    let figures = report.summary.replay.unwrap();
    assert!(figures.first_ttft.is_some() && figures.follow_up_ttft.is_some());
    assert!(figures.edit_tokens_per_second.is_some() && figures.busy < report.summary.wall);
}

#[tokio::test]
async fn recorded_answers_stand_in_for_the_servers() {
    let (ended, _, bodies) =
        replay("recorded", vec![Deed::Answer], &["--recorded", "--pause-scale", "0"]).await;
    ended.unwrap();
    assert_eq!(said(&bodies[4])[1..], ["a", "recorded a", "b"]);
}

#[tokio::test]
async fn no_replay_finds_the_prompts_of_another_in_a_cache() {
    let (ended, report, bodies) =
        replay("repeats", vec![Deed::Answer], &["--repeats", "2", "--seed", "7"]).await;
    ended.unwrap();
    assert_eq!(report.runs.len(), 2);
    let systems: Vec<&str> = bodies.iter().map(|body| said(body)[0]).collect();
    assert_eq!((systems[0], systems[9]), ("Workspace 7-1.\nsys", "Workspace 7-2.\nsys"));
}

#[tokio::test]
async fn a_session_ends_at_its_first_fault() {
    let (ended, report, bodies) = replay("fault", vec![Deed::Answer, Deed::Fail500], &[]).await;
    ended.unwrap();
    assert!(report.summary.errors > 0.0);
    assert!(bodies.iter().map(said).all(|said| said.last() != Some(&"g") || said.len() == 6));
    let (ended, ..) = replay("all-fail", vec![Deed::Fail500], &[]).await;
    assert!(ended.unwrap_err().to_string().contains("every request failed"));
}
