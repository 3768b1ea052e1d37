//! `rudder bench simulate`: the real scheduler under thousands of simulated agents, in virtual time.
//!
//! ```text
//! agents (turns, pauses, subagents) -> world (the scheduler, step by step) -> figures -> report
//!                                        machine (how long a step takes)
//! ```
//!
//! No model runs, so policies can be put side by side on machines that are not at hand, in seconds. What
//! it cannot show: tiers of KV (everything cached counts as near), drafts, the network.

mod agents;
mod figures;
mod machine;
mod report;
mod world;
mod worst;

use std::path::PathBuf;

use self::machine::{H200, Machine, NVL72};
use self::report::{Pair, Runs};
use self::world::{Load, SCHEDULINGS, Scheduling};

/// `rudder bench simulate`: compare scheduling policies on simulated machines and agents.
#[derive(Debug, Clone, clap::Args)]
pub struct SimulateArgs {
    /// Machine to simulate; both unless given.
    #[arg(long, value_enum)]
    pub machine: Option<MachineName>,
    /// Agents at any time, besides their subagents [default: 16 on h200, 800 on nvl72].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub agents: Option<u32>,
    /// Virtual seconds to simulate [default: 1200 on h200, 240 on nvl72].
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(10..=1_000_000))]
    pub seconds: Option<u32>,
    /// Requests that the flooding key always has under way [default: 32 on h200, 1024 on nvl72].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub flood: Option<u32>,
    /// New tokens of each of these requests.
    #[arg(long, value_name = "TOKENS", default_value_t = FLOOD_PROMPT as u32,
        value_parser = clap::value_parser!(u32).range(16..=1_000_000))]
    pub flood_prompt: u32,
    /// Seed of everything random.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Also run the last scheduling under so many seeds from this one on.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub seeds: u32,
    /// Show so many of the turns that waited longest, and what for.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub worst: u32,
    /// Write an HTML report with plots.
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

/// New tokens of a flooding request.
const FLOOD_PROMPT: usize = 60_000;

/// A machine that can be simulated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum MachineName {
    /// One H200
    H200,
    /// A GB200 NVL72
    Nvl72,
}

impl MachineName {
    fn machine(self) -> (Machine, Load) {
        match self {
            Self::H200 => {
                let (agents, keys, seconds, flood, unit) = (16, 4, 1200.0, 32, 2);
                (H200, Load { agents, keys, seconds, flood, flood_prompt: FLOOD_PROMPT, unit, seed: 0 })
            }
            Self::Nvl72 => {
                let (agents, keys, seconds, flood, unit) = (800, 20, 240.0, 1024, 16);
                (NVL72, Load { agents, keys, seconds, flood, flood_prompt: FLOOD_PROMPT, unit, seed: 0 })
            }
        }
    }
}

/// Simulates, prints the report as Markdown and, if asked, writes it as a page.
///
/// # Errors
/// If the report cannot be written.
pub fn simulate(args: &SimulateArgs) -> anyhow::Result<()> {
    let machines = match args.machine {
        Some(machine) => vec![machine],
        None => vec![MachineName::H200, MachineName::Nvl72],
    };
    let runs: Vec<Runs> = machines
        .into_iter()
        .map(|name| {
            let (machine, load) = name.machine();
            let agents = args.agents.map_or(load.agents, |agents| agents as usize);
            let seconds = args.seconds.map_or(load.seconds, f64::from);
            let flood = args.flood.map_or(load.flood, |flood| flood as usize);
            let flood_prompt = args.flood_prompt as usize;
            let load = Load { agents, seconds, flood, flood_prompt, seed: args.seed, ..load };
            let seeds = under_seeds(&machine, &load, args.seeds);
            Runs { seeds, worst: args.worst as usize, ..compare(machine, load) }
        })
        .collect();
    print!("{}", report::markdown(&runs));
    if let Some(path) = &args.html {
        crate::report::write(path, &report::page(&runs))?;
    }
    Ok(())
}

/// Every policy, with and without the flood.
fn compare(machine: Machine, load: Load) -> Runs {
    let pairs = SCHEDULINGS.iter().map(|scheduling| pair(&machine, &load, scheduling)).collect();
    Runs { machine, load, pairs, seeds: Vec::new(), worst: 0 }
}

fn pair(machine: &Machine, load: &Load, scheduling: &Scheduling) -> Pair {
    Pair {
        quiet: world::run(machine, &Load { flood: 0, ..*load }, scheduling),
        flood: world::run(machine, load, scheduling),
    }
}

/// The last policy's first tokens when quiet and in the flood, of the same turns, for each of so many seeds.
fn under_seeds(machine: &Machine, load: &Load, seeds: u32) -> Vec<Vec<[f64; 2]>> {
    let first_tokens = (0..u64::from(seeds)).filter_map(|more| {
        let Pair { quiet, flood } =
            pair(machine, &Load { seed: load.seed + more, ..*load }, SCHEDULINGS.last()?);
        Some(figures::first_tokens(&quiet, &flood))
    });
    first_tokens.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Coarse and short, as tests go.
    fn runs() -> Runs {
        let (machine, load) = MachineName::H200.machine();
        compare(machine, Load { seconds: 400.0, unit: 4, ..load })
    }

    /// How much longer each policy's first tokens take while a key floods.
    fn ratios(runs: &Runs) -> Vec<[f64; 3]> {
        let of = |pair: &Pair| figures::ratios(&figures::first_tokens(&pair.quiet, &pair.flood)).unwrap();
        runs.pairs.iter().map(of).collect()
    }

    #[test]
    fn a_flood_of_one_key_leaves_the_others_first_token_within_half_more_of_its_quiet_time() {
        let ratios = ratios(&runs());
        assert!(ratios[0].iter().all(|&ratio| ratio > 1.5), "first come: {ratios:?}");
        assert!(ratios[2].iter().all(|&ratio| ratio <= 1.5), "fair, paced: {ratios:?}");
    }

    #[test]
    fn a_flood_of_short_prompts_does_not_cost_the_others_what_they_have_cached() {
        let (machine, load) = MachineName::H200.machine();
        let load = Load { seconds: 900.0, unit: 8, flood_prompt: 8_000, ..load };
        let Pair { quiet, flood } = pair(&machine, &load, &SCHEDULINGS[2]);
        let [quiet, flood] = [quiet, flood].map(|outcome| outcome.cached / outcome.prompt);
        assert!(flood > quiet - 0.005, "{flood} of prompts cached, {quiet} when quiet");
    }

    #[test]
    fn a_seed_names_a_run_for_good() {
        assert_eq!(report::markdown(&[runs()]), report::markdown(&[runs()]));
    }

    #[test]
    fn a_page_shows_a_plot_for_each_load() {
        let page = report::page(&[runs()]);
        assert_eq!(page.matches("<svg").count(), 2);
        assert!(!page.contains("NaN") && !page.contains("<script"));
    }
}
