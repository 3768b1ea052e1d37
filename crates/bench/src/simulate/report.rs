//! The simulation's report: Markdown for the terminal, a page with plots.

use std::fmt::Write;

use super::figures::{self, Figures, GOOD_FIRST_TOKEN, GOOD_TOKEN};
use super::machine::Machine;
use super::world::{Load, Outcome, PACE, SCHEDULINGS};
use super::worst;
use crate::html;
use crate::plot::{self, Series};
use crate::table::number;

/// Both loads under one scheduling.
pub(crate) struct Pair {
    pub quiet: Outcome,
    pub flood: Outcome,
}

/// One machine's runs, in the order of [`SCHEDULINGS`].
pub(crate) struct Runs {
    pub machine: Machine,
    pub load: Load,
    pub pairs: Vec<Pair>,
    /// Of the last scheduling, times to first token when quiet and in the flood, of the same turns; by seed.
    pub seeds: Vec<Vec<[f64; 2]>>,
    /// Of its turns in the flood, how many of those that waited longest to show.
    pub worst: usize,
}

const HEAD: [&str; 11] = [
    "scheduling",
    "turns",
    "first token p50 s",
    "p95 s",
    "p99 s",
    "token gap p99 ms",
    "goodput tokens/s",
    "fairness",
    "prompts cached",
    "flood's share",
    "the same turns' first token p50, p95, p99 to quiet",
];

impl Runs {
    fn title(&self) -> String {
        let Load { agents, keys, seconds, flood, flood_prompt, unit, seed } = self.load;
        format!(
            "{}: {agents} agents at any time, of {keys} keys, for {seconds} s; a flood of {flood} requests of \
             {flood_prompt} new tokens at a time; steps of {unit} token(s), seed {seed}",
            self.machine.about
        )
    }

    fn rows(&self) -> Vec<Vec<String>> {
        let mut rows = Vec::new();
        for (scheduling, pair) in SCHEDULINGS.iter().zip(&self.pairs) {
            let (Some(quiet), Some(flood)) = (Figures::of(&pair.quiet), Figures::of(&pair.flood)) else {
                continue;
            };
            rows.push(row(format!("{}, quiet", scheduling.name), &quiet, String::new()));
            let first_tokens = figures::first_tokens(&pair.quiet, &pair.flood);
            let ratios = figures::ratios(&first_tokens).map_or(String::new(), |ratios| {
                format!(
                    "{} ({} turns)",
                    ratios.map(|ratio| format!("{ratio:.2}")).join(", "),
                    first_tokens.len()
                )
            });
            rows.push(row(format!("{}, flood", scheduling.name), &flood, ratios));
        }
        rows
    }
}

fn row(name: String, figures: &Figures, ratios: String) -> Vec<String> {
    let wait = figures.first_token;
    let times = [wait.median, figures.first_token_p95, wait.p99].map(|time| format!("{time:.2}"));
    let mut row = vec![name, figures.turns.to_string()];
    row.extend(times);
    row.push(format!("{:.0}", figures.gap * 1e3));
    row.push(number(Some(figures.goodput)));
    row.push(format!("{:.3}", figures.fairness));
    row.push(format!("{:.1} %", figures.cached * 100.0));
    row.push(format!("{:.0} %", figures.flood_share * 100.0));
    row.push(ratios);
    row
}

/// What all runs have in common, in words.
fn about() -> String {
    format!(
        "Agents' turns of the recorded shape on the real scheduler, in virtual time. *Quiet* is agents alone; in \
         *flood* one further key always has so many requests with new tokens under way. Figures are the agents' \
         alone; what is said *to quiet* is of the turns that both runs hold. Good turns have their first token \
         within {GOOD_FIRST_TOKEN} s and {:.0} ms a token after it; fairness is Jain's index over keys of how much longer turns take than on an empty machine; paced is a \
         target of {} ms a token.",
        GOOD_TOKEN * 1e3,
        PACE.as_millis()
    )
}

/// The report as Markdown.
pub(crate) fn markdown(runs: &[Runs]) -> String {
    let mut out = format!("# Scheduling, simulated\n\n{}\n", about());
    for machine in runs {
        let _ = write!(out, "\n## {}\n\n{}\n\n", machine.machine.name, machine.title());
        let _ = writeln!(out, "| {} |\n|{}", HEAD.join(" | "), "---|".repeat(HEAD.len()));
        for row in machine.rows() {
            let _ = writeln!(out, "| {} |", row.join(" | "));
        }
        if let Some(pair) = machine.pairs.first() {
            let _ = writeln!(out, "\n{} agents with subagents (quiet).", pair.quiet.agents);
        }
        out.push_str(&over_seeds(machine));
        if let Some(pair) = machine.pairs.last().filter(|_| machine.worst > 0) {
            out.push_str(&worst::table(&pair.quiet, &pair.flood, machine.worst));
        }
    }
    out
}

/// What further seeds say of the last scheduling.
fn over_seeds(runs: &Runs) -> String {
    let (Some(scheduling), count @ 1..) = (SCHEDULINGS.last(), runs.seeds.len()) else {
        return String::new();
    };
    let seeds: Vec<[f64; 3]> = runs.seeds.iter().filter_map(|seed| figures::ratios(seed)).collect();
    let all = figures::ratios(&runs.seeds.concat()).unwrap_or_default();
    let of = |i: usize| seeds.iter().map(move |ratios| ratios[i]);
    let ratios = (0..3).map(|i| {
        let (mean, most) = (of(i).sum::<f64>() / count as f64, of(i).fold(0.0, f64::max));
        format!("{mean:.2} (at most {most:.2}, all turns together {:.2})", all[i])
    });
    let ratios = ratios.collect::<Vec<_>>().join(", ");
    format!(
        "\n{}, flood: the same turns' first token p50, p95, p99 to quiet, means over {count} seeds: {ratios}.\n",
        scheduling.name
    )
}

/// The report as a page.
pub(crate) fn page(runs: &[Runs]) -> String {
    let mut body = format!("<p>{}</p>\n", html::escape(&about().replace('*', "")));
    for machine in runs {
        let _ = writeln!(body, "<h2>{}</h2><p>{}</p>", machine.machine.name, html::escape(&machine.title()));
        body.push_str("<table><tr>");
        HEAD.iter().for_each(|head| body += &format!("<th>{head}</th>"));
        body.push_str("</tr>\n");
        for row in machine.rows() {
            let cells: String = row.iter().map(|cell| format!("<td>{}</td>", html::escape(cell))).collect();
            let _ = writeln!(body, "<tr>{cells}</tr>");
        }
        body.push_str("</table>\n");
        for (title, of) in LOADS {
            let _ = writeln!(body, "<h2>Time to first token, {}, {title}</h2>", machine.machine.name);
            html::key(&mut body, SCHEDULINGS.map(|scheduling| scheduling.name));
            body.push_str(&waits(machine.pairs.iter().map(of)));
            body.push('\n');
        }
    }
    html::document("Scheduling, simulated", &body)
}

type OfPair = fn(&Pair) -> &Outcome;

/// The loads, and where the outcome of each is.
const LOADS: [(&str, OfPair); 2] = [("quiet", |pair| &pair.quiet), ("flood", |pair| &pair.flood)];

/// How times to first token are spread, up to twice the longest of the paced one's best 99 %.
fn waits<'a>(outcomes: impl Iterator<Item = &'a Outcome>) -> String {
    let outcomes: Vec<&Outcome> = outcomes.collect();
    let longest = outcomes.last().and_then(|last| Figures::of(last)).map_or(1.0, |f| 2.0 * f.first_token.p99);
    let series: Vec<Series> = outcomes
        .iter()
        .map(|outcome| Series { values: outcome.turns.iter().map(|turn| turn.first_token).collect() })
        .collect();
    plot::cumulative(&series, "seconds", longest)
}
