//! The command line.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::builder::Resettable;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::settings::{self, ModelSettings, ServerSettings};

/// Self-hosted inference server for coding models.
#[derive(Debug, Parser)]
#[command(name = "rudder", version, after_help = AFTER_HELP)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// TOML file with settings; flags and RUDDER_* variables win over it
    #[arg(long, global = true, env = "RUDDER_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Log more (-v: what happens, -vv: in detail); RUST_LOG chooses finer
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

impl Cli {
    /// Reads the command line and the variables; ends the process where they make no sense.
    pub fn read() -> Self {
        let command = Self::command().mut_subcommands(|command| {
            command.mut_args(|argument| match argument.get_env().is_some_and(is_of_kubernetes) {
                true => argument.env(Resettable::Reset),
                false => argument,
            })
        });
        Self::from_arg_matches(&command.get_matches()).unwrap_or_else(|error| error.exit())
    }
}

/// Whether a variable holds what Kubernetes puts into every container where a service is called rudder, as
/// RUDDER_PORT=tcp://10.96.0.1:8000.
fn is_of_kubernetes(variable: &OsStr) -> bool {
    std::env::var(variable)
        .is_ok_and(|value| ["tcp://", "udp://", "sctp://"].iter().any(|protocol| value.starts_with(protocol)))
}

const AFTER_HELP: &str = "Examples:
  rudder serve                              serve the default model on http://127.0.0.1:8000
  rudder serve --model ./model.gguf --port 9000
  rudder chat --model qwen2.5-coder-1.5b    talk to a model in the terminal
  rudder doctor                             what this machine offers and what will be used";

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve a model to OpenAI clients
    Serve(Box<ServeArgs>),
    /// Talk to a model in the terminal
    Chat(ChatArgs),
    /// Fetch a model into the cache
    Pull(PullArgs),
    /// The catalog and the cache
    Models(ModelsArgs),
    /// Measure an engine or a server
    Bench(BenchArgs),
    /// What this machine offers and what will be used
    Doctor(DoctorArgs),
    /// Compare what a GPU computes with what the CPU does
    #[command(hide = true)]
    CheckGpu {
        /// Its number
        index: usize,
    },
}

/// `rudder serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// The model's side.
    #[command(flatten)]
    pub model: ModelSettings,
    /// The clients' side.
    #[command(flatten)]
    pub server: ServerSettings,
    /// JSON file with calls that are forced by grammar where they are offered; for tests of clients
    #[arg(long, hide = true, env = "RUDDER_FORCE_TOOL_CALL", value_name = "FILE")]
    pub force_tool_call: Option<PathBuf>,
}

/// `rudder chat`.
#[derive(Debug, Args)]
pub struct ChatArgs {
    /// The model's side.
    #[command(flatten)]
    pub model: ModelSettings,
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// 0 always takes the likeliest token, 1 draws as the model learned
    #[arg(long, value_name = "NUMBER", default_value_t = 0.7)]
    pub temperature: f32,
}

/// `rudder pull`.
#[derive(Debug, Args)]
pub struct PullArgs {
    /// Catalog name or hub id (org/name[:file])
    pub name: String,
    /// Where to.
    #[command(flatten)]
    pub cache: CacheArgs,
}

/// `rudder models`.
#[derive(Debug, Args)]
pub struct ModelsArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: ModelsCommand,
    /// Where.
    #[command(flatten)]
    pub cache: CacheArgs,
}

/// What `rudder models` does.
#[derive(Debug, Subcommand)]
pub enum ModelsCommand {
    /// List the catalog and what is in the cache
    List,
    /// Show a catalog model: licence, sources, checksum
    Show {
        /// Catalog name
        name: String,
    },
    /// Remove a model from the cache
    Remove {
        /// Catalog name or hub id, as `list` shows it
        name: String,
    },
}

/// Where downloaded models lie.
#[derive(Debug, Args)]
pub struct CacheArgs {
    /// Folder for downloaded models [default: rudder/models in the user's cache folder]
    #[arg(long, global = true, env = "RUDDER_CACHE", value_name = "FOLDER")]
    pub cache: Option<PathBuf>,
}

impl CacheArgs {
    /// The folder that is named here, else in the file, if there is one.
    ///
    /// # Errors
    /// If the file cannot be read, or holds a key that there is not.
    pub fn over(self, config: Option<&Path>) -> Result<Option<PathBuf>> {
        let file: Option<ModelSettings> = config.map(settings::read).transpose()?;
        Ok(self.cache.or(file.and_then(|file| file.cache)))
    }
}

/// `rudder doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// The model's side, as `serve` would be given it.
    #[command(flatten)]
    pub model: ModelSettings,
}

/// `rudder bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// What to measure.
    #[command(subcommand)]
    pub command: BenchCommand,
}

/// What `rudder bench` measures.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Any OpenAI-compatible server, over HTTP
    Serve(rudder_bench::ServeArgs),
    /// Any OpenAI-compatible server, by a replay of what coding agents sent
    AgentTrace(rudder_bench::AgentTraceArgs),
    /// The engine in this process
    Throughput {
        /// The model's side.
        #[command(flatten)]
        model: ModelSettings,
        /// The load.
        #[command(flatten)]
        bench: Box<rudder_bench::ThroughputArgs>,
    },
    /// Results of earlier runs, side by side
    Compare(rudder_bench::CompareArgs),
    /// Scheduling policies, side by side: thousands of simulated agents in virtual time
    Simulate(rudder_bench::SimulateArgs),
}

/// Every `RUDDER_*` variable that some command reads.
pub fn variables() -> Vec<String> {
    fn collect(command: &clap::Command, names: &mut Vec<String>) {
        let own =
            command.get_arguments().filter_map(|a| a.get_env()).map(|e| e.to_string_lossy().into_owned());
        names.extend(own);
        command.get_subcommands().for_each(|c| collect(c, names));
    }
    let mut names = Vec::new();
    collect(&Cli::command(), &mut names);
    names.sort();
    names.dedup();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_variables_and_keys_share_their_names() {
        let command = ServerSettings::augment_args(ModelSettings::augment_args(clap::Command::new("")));
        for argument in command.get_arguments() {
            let id = argument.get_id().as_str();
            assert_eq!(argument.get_long().unwrap(), id.replace('_', "-"));
            assert_eq!(
                argument.get_env().unwrap().to_str().unwrap(),
                format!("RUDDER_{}", id.to_uppercase())
            );
        }
    }

    #[test]
    fn flags_are_read() {
        let cli =
            Cli::try_parse_from(["rudder", "serve", "--prefix-cache", "off", "--kv-memory", "1GiB", "-vv"])
                .unwrap();
        let Command::Serve(args) = cli.command else { panic!("{cli:?}") };
        assert_eq!(args.model.prefix_cache, Some(false));
        assert_eq!(args.model.kv_memory.unwrap().0, 1 << 30);
        assert_eq!((cli.verbose, args.server.port), (2, None));
    }
}
