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

use std::path::PathBuf;

use self::machine::{H200, Machine, NVL72};
use self::report::{Pair, Runs};
use self::world::{Load, SCHEDULINGS};

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
    /// Seed of everything random.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Write an HTML report with plots.
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

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
            Self::H200 => (H200, Load { agents: 16, keys: 4, seconds: 1200.0, flood: 32, unit: 2, seed: 0 }),
            Self::Nvl72 => {
                (NVL72, Load { agents: 800, keys: 20, seconds: 240.0, flood: 1024, unit: 16, seed: 0 })
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
            compare(machine, Load { agents, seconds, seed: args.seed, ..load })
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
    let pairs = SCHEDULINGS
        .iter()
        .map(|scheduling| Pair {
            quiet: world::run(&machine, &Load { flood: 0, ..load }, scheduling),
            flood: world::run(&machine, &load, scheduling),
        })
        .collect();
    Runs { machine, load, pairs }
}

#[cfg(test)]
mod tests {
    use super::figures::Figures;
    use super::*;

    /// Coarse and short, as tests go.
    fn runs() -> Runs {
        let (machine, load) = MachineName::H200.machine();
        compare(machine, Load { seconds: 400.0, unit: 4, ..load })
    }

    #[test]
    fn a_flood_of_one_key_leaves_the_others_first_token_within_half_more_of_its_quiet_time() {
        let ratios = |pair: &Pair| {
            let [quiet, flood] = [&pair.quiet, &pair.flood].map(|outcome| Figures::of(outcome).unwrap());
            let [quiet, flood] = [quiet, flood].map(|figures| figures.first_token);
            [flood.median / quiet.median, flood.p90 / quiet.p90]
        };
        let ratios: Vec<[f64; 2]> = runs().pairs.iter().map(ratios).collect();
        assert!(ratios[0].iter().all(|&ratio| ratio > 1.5), "first come: {ratios:?}");
        assert!(ratios[2].iter().all(|&ratio| ratio <= 1.5), "fair, paced: {ratios:?}");
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
