//! Load generator and reports for any OpenAI-compatible server, and for an engine in process.
//!
//! ```text
//! workload (dist, prompt) -> load (arrivals) -> target (client | engine) -> record -> stats -> report
//! trace                   -> replay          -> client                   -> record -> stats -> report
//! ```
//!
//! `simulate` measures no server: it puts scheduling policies side by side in virtual time.
//!
//! A client of its own measures every server the same way: the clock is read when a chunk of the
//! answer arrives, and tokens are counted by the server's own `usage` where it is given.

mod args;
mod client;
mod compare;
mod dist;
mod html;
mod load;
mod plot;
mod prompt;
mod record;
mod replay;
mod report;
mod simulate;
mod sse;
mod stats;
mod table;
mod target;
mod trace;

pub use args::{AgentTraceArgs, CompareArgs, Endpoint, OutputArgs, ServeArgs, ThroughputArgs, WorkloadArgs};
pub use compare::compare;
pub use dist::{BadLength, Length};
pub use record::{ReplaySummary, Report, RequestRecord, Run, Summary};
pub use simulate::{MachineName, SimulateArgs, simulate};
pub use stats::Spread;
pub use trace::TurnKind;

use client::Client;
use report::Measured;
use rudder_engine::Engine;
use target::Target;
use trace::Trace;

/// Measures a server over HTTP and writes the reports that were asked for.
///
/// # Errors
/// If the server cannot be reached or has no model, if every request fails (the reports are
/// written first), or if a report cannot be written.
pub async fn serve(args: ServeArgs) -> anyhow::Result<()> {
    let client = Client::connect(&args).await?;
    let (name, model) = (args.url.clone(), client.model().to_string());
    report::measure(Target::Server(client), name, model, &args.workload, &args.output).await
}

/// Replays an agent trace against a server and writes the reports that were asked for.
///
/// # Errors
/// If the trace cannot be read, the server cannot be reached or has no model, every request fails (the
/// reports are written first), or a report cannot be written.
pub async fn agent_trace(args: AgentTraceArgs) -> anyhow::Result<()> {
    let trace = Trace::read(&args.trace)?;
    let mut client = replay::client(&args)?;
    client.find_model().await?;
    let started = report::now();
    let runs = replay::run(&client, &trace, &args).await?;
    let measured = Measured {
        target: args.url.clone(),
        model: client.model().to_string(),
        workload: args.describe(&trace),
        started,
        runs,
    };
    measured.report(&args.output)
}

/// Measures an engine in this process, without HTTP or text.
///
/// # Errors
/// If every request fails (the reports are written first), or if a report cannot be written.
pub async fn throughput(engine: Engine, args: ThroughputArgs) -> anyhow::Result<()> {
    report::measure(
        Target::Engine(engine),
        "in process".into(),
        args.model_name,
        &args.workload,
        &args.output,
    )
    .await
}
