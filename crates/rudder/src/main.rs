//! The `rudder` command: reads settings, brings up the crates below it, nothing else.

mod bench;
mod chat;
mod cli;
mod device;
mod doctor;
mod draft_model;
mod gpu_check;
mod kv;
mod launch;
mod machine;
mod models;
mod nodes;
mod place;
mod serve;
mod settings;
mod text_source;

use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::Result;
use tracing_subscriber::EnvFilter;

use cli::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::read();
    start_log(cli.verbose);
    warn_of_unknown_variables();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {}", in_full(&e));
            ExitCode::FAILURE
        }
    }
}

/// An error with its causes, each said once: some errors name theirs themselves.
fn in_full(error: &anyhow::Error) -> String {
    let mut message = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !message.contains(&cause) {
            let colon = if message.is_empty() { "" } else { ": " };
            message = format!("{message}{colon}{cause}");
        }
    }
    message
}

fn run(cli: Cli) -> Result<()> {
    let config = cli.config.as_deref();
    match cli.command {
        Command::Serve(args) => {
            let (model, server) = (args.model.over(config)?, args.server.over(config)?);
            launch::load_kernels_first(&model);
            serve::run(&model, server, args.force_tool_call.as_deref())
        }
        Command::Chat(args) => {
            let model = args.model.over(config)?;
            launch::load_kernels_first(&model);
            chat::run(&model, args.system, args.temperature)
        }
        Command::Pull(args) => models::pull(&args.name, args.cache.over(config)?),
        Command::Models(args) => models::run(args.command, args.cache.over(config)?),
        Command::Bench(args) => bench::run(args.command, config),
        Command::Doctor(args) => doctor::run(&args.model.over(config)?),
        Command::CheckGpu { index } => gpu_check::run(index),
    }
}

/// Logs to standard error: warnings, and more with each `-v` or as RUST_LOG says.
fn start_log(verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "info",
        _ => "debug",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}

/// Variables of builds and tests, which a developer's shell may have set for those.
const OF_DEVELOPERS: [&str; 9] = [
    "RUDDER_BIN",
    "RUDDER_CLIENTS",
    "RUDDER_CUDA_WITHOUT",
    "RUDDER_FIXTURES",
    "RUDDER_KILLS",
    "RUDDER_NVCC",
    "RUDDER_SMALL_SHAPES",
    "RUDDER_TEST_DRAFT_MODEL",
    "RUDDER_TEST_MODEL",
];

/// A misspelt variable would be ignored in silence. It is no error: orchestrators set variables of
/// their own, RUDDER_SERVICE_HOST where a Kubernetes service is called rudder.
fn warn_of_unknown_variables() {
    let known = cli::variables();
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        let is_known = known.iter().any(|k| *k == name) || OF_DEVELOPERS.contains(&&*name);
        if name.starts_with("RUDDER_") && !is_known {
            tracing::warn!("unknown variable {name} is ignored{}", settings::did_you_mean(&name, &known));
        }
    }
}
