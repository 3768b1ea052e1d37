//! `bench serve` against a server that answers well, badly or not at all: faults are counted.

use clap::Parser;
use rudder_bench::{Report, ServeArgs};
use std::net::SocketAddr;
use std::path::PathBuf;
use tokio::net::TcpListener;

#[allow(dead_code)]
mod mock;
use mock::{Deed, server};

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: ServeArgs,
}

/// Runs `bench serve` and returns how it ended and its JSON result.
async fn bench(name: &str, address: SocketAddr, more: &[&str]) -> (anyhow::Result<()>, Report) {
    let json = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.json"));
    let url = format!("http://{address}/v1/");
    let args = ["bench", "--url", &url, "--warmup", "0", "--prompt", "50", "--json"];
    let args = args.into_iter().chain([json.to_str().unwrap()]).chain(more.iter().copied());
    let ended = rudder_bench::serve(Cli::try_parse_from(args).unwrap().args).await;
    let report = serde_json::from_str(&std::fs::read_to_string(&json).unwrap()).unwrap();
    (ended, report)
}

fn errors(report: &Report) -> Vec<&str> {
    report.runs.iter().flat_map(|run| &run.requests).filter_map(|r| r.error.as_deref()).collect()
}

#[tokio::test]
async fn good_answers_are_clocked_and_counted() {
    let address = server(vec![Deed::Answer]).await;
    let args = ["--requests", "6", "--concurrency", "3", "--output", "8", "--repeats", "2"];
    let (ended, report) = bench("good", address, &args).await;
    ended.unwrap();
    assert_eq!((report.runs.len(), report.model.as_str()), (2, "tiny"));
    for request in report.runs.iter().flat_map(|run| &run.requests) {
        assert!(request.usage && request.error.is_none());
        assert_eq!((request.output_tokens, request.chunks.len()), (8, 8));
        assert!(request.chunks[0] >= 0.02 && request.end >= request.chunks[7]);
        assert!(request.prompt_tokens > 10);
    }
    let summary = &report.summary;
    assert!(summary.ttft.unwrap().median >= 0.02 && summary.inter_token.unwrap().median >= 0.001);
    assert!(summary.output_tokens_per_second > 0.0);
}

#[tokio::test]
async fn a_key_goes_with_every_request() {
    let address = server(vec![Deed::AnswerToKey]).await;
    let (ended, report) = bench("key", address, &["--requests", "2", "--api-key", "secret"]).await;
    ended.unwrap();
    assert_eq!((report.model.as_str(), errors(&report).len()), ("tiny", 0));
}

#[tokio::test]
async fn without_usage_chunks_are_counted() {
    let address = server(vec![Deed::AnswerWithoutUsage]).await;
    let (ended, report) = bench("no-usage", address, &["--requests", "2", "--output", "5"]).await;
    ended.unwrap();
    let request = &report.runs[0].requests[0];
    assert_eq!((request.usage, request.prompt_tokens, request.output_tokens), (false, 50, 5));
}

#[tokio::test]
async fn each_fault_is_counted_and_the_rest_goes_on() {
    // The two first requests calibrate the prompt length.
    let deeds = [Deed::Answer, Deed::Fail500, Deed::Cut, Deed::Garbage, Deed::ErrorEvent, Deed::Hang];
    let address = server(deeds.to_vec()).await;
    let args = ["--requests", "12", "--concurrency", "4", "--output", "3", "--timeout", "3"];
    let (ended, report) = bench("faults", address, &args).await;
    ended.unwrap();
    assert_eq!((report.summary.answered, report.summary.errors), (2.0, 10.0));
    for kind in
        ["HTTP 500 Internal Server Error: it broke", "cut", "not understood", "out of blocks", "no end after"]
    {
        assert_eq!(
            errors(&report).iter().filter(|e| e.contains(kind)).count(),
            2,
            "{kind}: {:?}",
            errors(&report)
        );
    }
}

#[tokio::test]
async fn a_server_that_is_not_there_is_an_error_that_says_so() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let (ended, report) = bench("refused", address, &["--requests", "3", "--model", "m"]).await;
    assert!(ended.unwrap_err().to_string().starts_with("every request failed; the first: no answer"));
    assert_eq!((report.summary.answered, report.summary.errors), (0.0, 3.0));

    let url = format!("http://{address}");
    let without_model = Cli::try_parse_from(["bench", "--url", &url]).unwrap().args;
    let error = rudder_bench::serve(without_model).await.unwrap_err();
    assert!(error.to_string().contains("is a server running there?"), "{error}");
}

#[tokio::test]
async fn an_agent_loop_sends_its_turns_in_order_with_all_that_came_before() {
    let address = server(vec![Deed::Answer]).await;
    let args = [
        "--agent-turns",
        "4",
        "--turn-tokens",
        "40",
        "--requests",
        "2",
        "--concurrency",
        "2",
        "--output",
        "3",
    ];
    for endpoint in ["completions", "chat"] {
        let (ended, report) = bench("agent", address, &[&args[..], &["--endpoint", endpoint]].concat()).await;
        ended.unwrap();
        for session in 0..2 {
            let turns: Vec<_> = report.runs[0].requests.iter().filter(|r| r.session == session).collect();
            assert_eq!(turns.iter().map(|r| r.turn).collect::<Vec<_>>(), [0, 1, 2, 3]);
            assert!(turns.windows(2).all(|w| w[1].prompt_tokens > w[0].prompt_tokens + 10));
            assert!(turns.windows(2).all(|w| w[1].start >= w[0].start + w[0].end));
        }
        assert_eq!(report.summary.turn_ttft.len(), 4);
    }
}

#[tokio::test]
async fn an_open_loop_does_not_wait_for_answers() {
    let address = server(vec![Deed::Answer]).await;
    // 20 requests at 200 a second, of 20 ms and more each: one at a time would take over 0.4 s.
    let (ended, report) =
        bench("open", address, &["--rate", "200", "--requests", "20", "--output", "1"]).await;
    ended.unwrap();
    let mut requests = report.runs[0].requests.clone();
    requests.sort_by(|a, b| a.start.total_cmp(&b.start));
    assert!(requests.windows(2).any(|w| w[1].start < w[0].start + w[0].end));
    assert_eq!(requests.len(), 20);
}

#[tokio::test]
async fn a_duration_bounds_when_requests_begin() {
    let address = server(vec![Deed::Answer]).await;
    let args = ["--duration", "0.3", "--concurrency", "2", "--output", "2"];
    let (ended, report) = bench("duration", address, &args).await;
    ended.unwrap();
    let requests = &report.runs[0].requests;
    assert!(requests.len() > 2 && requests.iter().all(|r| r.start < 0.35));
}
