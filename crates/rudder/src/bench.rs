//! `rudder bench`: brings up what is measured; the bench crate measures.

use std::path::Path;

use anyhow::Result;

use crate::cli::BenchCommand;
use crate::launch::{Launched, launch, launch_dummy, load_kernels_first};
use crate::settings::LoadFormat;

/// Runs one of the benches.
pub fn run(command: BenchCommand, config: Option<&Path>) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new;
    match command {
        BenchCommand::Serve(args) => runtime()?.block_on(rudder_bench::serve(args)),
        BenchCommand::AgentTrace(args) => runtime()?.block_on(rudder_bench::agent_trace(args)),
        BenchCommand::Compare(args) => rudder_bench::compare(&args),
        BenchCommand::Simulate(args) => rudder_bench::simulate(&args),
        BenchCommand::Throughput { model, mut bench } => {
            let settings = model.over(config)?;
            load_kernels_first(&settings);
            let engine;
            (engine, bench.model_name) = match settings.load_format {
                Some(LoadFormat::Dummy) => {
                    let Launched { engine, name, .. } = launch_dummy(&settings)?;
                    (engine, name)
                }
                _ => {
                    let Launched { engine, name, .. } = launch(&settings)?;
                    (engine, name)
                }
            };
            runtime()?.block_on(rudder_bench::throughput(engine, *bench))
        }
    }
}
