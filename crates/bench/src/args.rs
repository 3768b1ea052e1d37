//! The command lines of `rudder bench`.

use crate::dist::Length;
use crate::trace::Trace;
use std::path::PathBuf;

/// `rudder bench serve`: measure any OpenAI-compatible server over HTTP.
#[derive(Debug, Clone, clap::Args)]
pub struct ServeArgs {
    /// Address of the server, as in http://127.0.0.1:8000 (a trailing /v1 is allowed).
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    pub url: String,
    /// Which route to load.
    #[arg(long, value_enum, default_value = "completions")]
    pub endpoint: Endpoint,
    /// Model name to send; the first that /v1/models lists unless given.
    #[arg(long)]
    pub model: Option<String>,
    /// Key to send, if the server asks for one. Prefer the variable: others can read a command line.
    #[arg(long, env = "RUDDER_API_KEY", value_name = "KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// Let the model end its answers; otherwise `ignore_eos` is sent so that lengths are as asked.
    #[arg(long)]
    pub respect_eos: bool,
    /// Give a request up after this many seconds and count it as an error.
    #[arg(long, value_name = "SECONDS", default_value_t = 600.0, value_parser = positive)]
    pub timeout: f64,
    /// What to send.
    #[command(flatten)]
    pub workload: WorkloadArgs,
    /// What to write.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// `rudder bench agent-trace`: replay what coding agents sent.
#[derive(Debug, Clone, clap::Args)]
pub struct AgentTraceArgs {
    /// The trace: benches/traces holds some, and the script that makes them from a git repository.
    #[arg(value_name = "TRACE.json")]
    pub trace: PathBuf,
    /// Address of the server, as in http://127.0.0.1:8000 (a trailing /v1 is allowed).
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    pub url: String,
    /// Model name to send; the first that /v1/models lists unless given.
    #[arg(long)]
    pub model: Option<String>,
    /// Key to send, if the server asks for one. Prefer the variable: others can read a command line.
    #[arg(long, env = "RUDDER_API_KEY", value_name = "KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// Go on from the recorded answers instead of the server's own: all servers get the same prompts.
    #[arg(long)]
    pub recorded: bool,
    /// Let the model end its answers; otherwise `ignore_eos` is sent so that lengths are as recorded.
    #[arg(long)]
    pub respect_eos: bool,
    /// Pauses are this many times as long as recorded; 0 leaves them out.
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, value_parser = not_negative)]
    pub pause_scale: f64,
    /// Replays; every figure is the median over them. No replay finds another's prompts in a cache.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    pub repeats: usize,
    /// Makes the replay's prompts unlike those of other seeds from the first line on.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Give a request up after this many seconds and count it as an error.
    #[arg(long, value_name = "SECONDS", default_value_t = 600.0, value_parser = positive)]
    pub timeout: f64,
    /// What to write.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// `rudder bench throughput`: measure the engine in this process.
#[derive(Debug, Clone, clap::Args)]
pub struct ThroughputArgs {
    /// What the report calls the model; whoever loads the engine fills it in.
    #[arg(skip)]
    pub model_name: String,
    /// What to generate.
    #[command(flatten)]
    pub workload: WorkloadArgs,
    /// What to write.
    #[command(flatten)]
    pub output: OutputArgs,
}

/// `rudder bench compare`: put results side by side.
#[derive(Debug, Clone, clap::Args)]
pub struct CompareArgs {
    /// JSON results of earlier runs; ratios are to the first.
    #[arg(required = true, num_args = 2.., value_name = "RESULT.json")]
    pub results: Vec<PathBuf>,
    /// Write an HTML report with plots.
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

/// The OpenAI route that is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Endpoint {
    /// `POST /v1/completions`
    Completions,
    /// `POST /v1/chat/completions`
    Chat,
}

/// The load: how much, how fast, of what shape.
#[derive(Debug, Clone, clap::Args)]
pub struct WorkloadArgs {
    /// Closed loop: this many clients, each sending its next request when the last has ended.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    pub concurrency: usize,
    /// Open loop: requests a second, at random (Poisson) moments, whether or not earlier ones ended.
    #[arg(long, value_name = "R", conflicts_with = "concurrency", value_parser = positive)]
    pub rate: Option<f64>,
    /// Requests in a run (conversations, with --agent-turns).
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = at_least_one)]
    pub requests: usize,
    /// Start requests for this many seconds instead of a fixed number.
    #[arg(long, value_name = "SECONDS", conflicts_with = "requests", value_parser = positive)]
    pub duration: Option<f64>,
    /// Prompt tokens: N, A:B (uniform) or lognormal:MEAN:SIGMA.
    #[arg(long, value_name = "LENGTH", default_value = "512")]
    pub prompt: Length,
    /// Output tokens: N, A:B (uniform) or lognormal:MEAN:SIGMA.
    #[arg(long, value_name = "LENGTH", default_value = "128")]
    pub output: Length,
    /// Begin all prompts with the same N tokens; without it each prompt differs from its first line on.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub shared_prefix: usize,
    /// Agent loop: turns of a conversation; each appends the last answer and --turn-tokens to it.
    #[arg(long, value_name = "T", default_value_t = 1, value_parser = at_least_one)]
    pub agent_turns: usize,
    /// Tokens that each agent turn after the first brings in.
    #[arg(long, value_name = "LENGTH", default_value = "300")]
    pub turn_tokens: Length,
    /// Requests sent before the first run and not counted.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub warmup: usize,
    /// Runs; every figure is the median over them.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    pub repeats: usize,
    /// Seed of prompts, lengths and arrivals.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// Where results go besides the terminal.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct OutputArgs {
    /// What this result is called in reports and comparisons; the address unless given.
    #[arg(long)]
    pub label: Option<String>,
    /// Write everything measured, request by request.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write an HTML report with plots.
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

impl WorkloadArgs {
    /// The load in words, for the head of a report.
    pub(crate) fn describe(&self) -> String {
        let arrivals = match self.rate {
            Some(rate) => format!("open loop, {rate} requests/s"),
            None => format!("{} at a time", self.concurrency),
        };
        let amount = match self.duration {
            Some(seconds) => format!("for {seconds} s"),
            None if self.agent_turns > 1 => format!("{} conversations", self.requests),
            None => format!("{} requests", self.requests),
        };
        let mut shape = format!("{} tokens in, {} out", self.prompt, self.output);
        if self.agent_turns > 1 {
            shape += &format!(", {} turns of +{} tokens", self.agent_turns, self.turn_tokens);
        }
        if self.shared_prefix > 0 {
            shape += &format!(", {} of them shared", self.shared_prefix);
        }
        format!("{arrivals}, {amount}, {shape}, {} run(s)", self.repeats)
    }
}

impl AgentTraceArgs {
    /// The replay in words, for the head of a report.
    pub(crate) fn describe(&self, trace: &Trace) -> String {
        let turns = trace.turns().count();
        let answers = if self.recorded { "recorded answers" } else { "the server's own answers" };
        format!(
            "agent trace {}: {} sessions, {turns} turns, {answers}, pauses x {}, {} run(s)",
            trace.name,
            trace.sessions.len(),
            self.pause_scale,
            self.repeats
        )
    }
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x.is_finite() && x > 0.0 => Ok(x),
        _ => Err("must be a number above 0".into()),
    }
}

fn not_negative(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if (0.0..=1e6).contains(&x) => Ok(x),
        _ => Err("must be a number, not below 0".into()),
    }
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(x) if x > 0 => Ok(x),
        _ => Err("must be a whole number, at least 1".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        serve: ServeArgs,
    }

    fn parse(args: &[&str]) -> Result<ServeArgs, clap::Error> {
        Cli::try_parse_from([&["bench"], args].concat()).map(|cli| cli.serve)
    }

    #[test]
    fn open_and_closed_loop_exclude_each_other() {
        assert!(parse(&["--rate", "2", "--concurrency", "4"]).is_err());
        assert_eq!(parse(&["--rate", "2"]).unwrap().workload.rate, Some(2.0));
        assert_eq!(parse(&["--concurrency", "4"]).unwrap().workload.concurrency, 4);
    }

    #[test]
    fn numbers_that_make_no_load_are_refused() {
        for args in [["--requests", "0"], ["--rate", "0"], ["--rate", "inf"], ["--prompt", "9:2"]] {
            assert!(parse(&args).is_err(), "{args:?}");
        }
    }
}
