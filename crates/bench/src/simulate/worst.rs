//! The turns that waited longest for their first token in the flood, and what for, beside the same turns when
//! it was quiet.

use std::fmt::Write;

use super::figures;
use super::world::{Outcome, TurnRecord};

const HEAD: [&str; 11] = [
    "turn, of agent",
    "asked at s",
    "prompt",
    "new",
    "read again",
    "first token s",
    "before it began s",
    "its prompt s",
    "agents' prompts s",
    "flood's prompts s",
    "decodes s",
];

/// The `count` worst as Markdown; each cell in the flood, and when quiet.
pub(crate) fn table(quiet: &Outcome, flood: &Outcome, count: usize) -> String {
    let mut turns = figures::same_turns(quiet, flood);
    turns.sort_by(|[_, a], [_, b]| b.first_token.total_cmp(&a.first_token));
    let mut out = String::from("\nThe longest waits for a first token in the flood (when quiet):\n\n");
    let _ = writeln!(out, "| {} |\n|{}", HEAD.join(" | "), "---|".repeat(HEAD.len()));
    for [quiet, flood] in turns.into_iter().take(count) {
        let cells = cells(flood).into_iter().zip(cells(quiet));
        let cells: Vec<String> = cells.map(|(flood, quiet)| format!("{flood} ({quiet})")).collect();
        let (agent, turn) = flood.name;
        let _ = writeln!(out, "| {turn}, {agent:x} | {} |", cells.join(" | "));
    }
    out
}

fn cells(turn: &TurnRecord) -> [String; HEAD.len() - 1] {
    let wait = &turn.wait;
    let times = [turn.first_token, wait.queued, wait.own, wait.agents, wait.flood, wait.decodes];
    let [first, queued, own, agents, flood, decodes] = times.map(|time| format!("{time:.2}"));
    let queued = if wait.preempted > 0 { format!("{queued}, lost {}", wait.preempted) } else { queued };
    let again = (wait.known - wait.cached).max(0.0);
    let [prompt, new, again] = [wait.prompt, wait.prompt - wait.known, again].map(|n| format!("{n:.0}"));
    [format!("{:.0}", wait.asked), prompt, new, again, first, queued, own, agents, flood, decodes]
}
