//! `rudder bench`: brings up what is measured; the bench crate measures.

use std::path::Path;

use anyhow::Result;

use crate::cli::BenchCommand;
use crate::launch::launch;

/// Runs one of the benches.
pub fn run(command: BenchCommand, config: Option<&Path>) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    match command {
        BenchCommand::Serve(args) => runtime.block_on(rudder_bench::serve(args)),
        BenchCommand::AgentTrace(args) => runtime.block_on(rudder_bench::agent_trace(args)),
        BenchCommand::Compare(args) => rudder_bench::compare(&args),
        BenchCommand::Throughput { model, mut bench } => {
            let launched = launch(&model.over(config)?)?;
            bench.model_name = launched.name;
            runtime.block_on(rudder_bench::throughput(launched.engine, bench))
        }
    }
}
