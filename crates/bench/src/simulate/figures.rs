//! What is reported of a run: waiting, pace, goodput, fairness; and of two, what one's turns wait longer.

use std::collections::HashMap;

use super::world::{Outcome, TurnRecord};
use crate::stats::{self, Spread};

/// A turn is good if its first token comes so soon, and its others at this pace: seconds.
pub(crate) const GOOD_FIRST_TOKEN: f64 = 5.0;
/// See [`GOOD_FIRST_TOKEN`].
pub(crate) const GOOD_TOKEN: f64 = 0.1;

/// The figures of one run; times in seconds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Figures {
    pub turns: usize,
    pub first_token: Spread,
    /// 95th percentile of the same.
    pub first_token_p95: f64,
    /// 99th percentile of the time between two tokens.
    pub gap: f64,
    /// Answers' tokens a second, of good turns alone.
    pub goodput: f64,
    /// Jain's index over keys of how much longer their turns take than on an empty machine: 1 is alike.
    pub fairness: f64,
    /// The flooding key's share of all tokens computed.
    pub flood_share: f64,
    /// Of agents' prompt tokens, how many were in the cache.
    pub cached: f64,
}

impl Figures {
    /// Of a run; none if nothing was asked in it.
    pub fn of(outcome: &Outcome) -> Option<Self> {
        let good = outcome.turns.iter().filter(|turn| is_good(turn)).fold(0.0, |sum, turn| sum + turn.answer);
        let [agents, flood] = outcome.computed;
        let waits = stats::sorted(outcome.turns.iter().map(|turn| turn.first_token));
        Some(Self {
            turns: outcome.turns.len(),
            first_token_p95: stats::percentile(&waits, 95.0)?,
            first_token: Spread::of(waits)?,
            gap: weighted_percentile(&outcome.gaps, 0.99),
            goodput: good / outcome.seconds,
            fairness: fairness(&outcome.turns),
            flood_share: flood / (agents + flood),
            cached: outcome.cached / outcome.prompt,
        })
    }
}

/// The turns that both runs counted: as they were when it was quiet, and in the flood. A run that is slower
/// holds fewer turns, so percentiles over all of each would be those of different work.
pub(crate) fn same_turns<'a>(quiet: &'a Outcome, flood: &'a Outcome) -> Vec<[&'a TurnRecord; 2]> {
    let quiet: HashMap<_, _> = quiet.turns.iter().map(|turn| (turn.name, turn)).collect();
    flood.turns.iter().filter_map(|turn| Some([*quiet.get(&turn.name)?, turn])).collect()
}

/// Times to first token when it is quiet and in the flood, of the same turns.
pub(crate) fn first_tokens(quiet: &Outcome, flood: &Outcome) -> Vec<[f64; 2]> {
    same_turns(quiet, flood).into_iter().map(|pair| pair.map(|turn| turn.first_token)).collect()
}

/// How much longer first tokens take than when it is quiet: the median, the 95th and the 99th percentile of
/// the same turns. None of none.
pub(crate) fn ratios(first_tokens: &[[f64; 2]]) -> Option<[f64; 3]> {
    let [quiet, flood] = [0, 1].map(|run| stats::sorted(first_tokens.iter().map(|pair| pair[run])));
    let mut ratios = [50.0, 95.0, 99.0];
    for ratio in &mut ratios {
        *ratio = stats::percentile(&flood, *ratio)? / stats::percentile(&quiet, *ratio)?;
    }
    Some(ratios)
}

fn is_good(turn: &TurnRecord) -> bool {
    let paced = |rest: f64| rest <= GOOD_TOKEN * (turn.answer - 1.0).max(1.0);
    turn.first_token <= GOOD_FIRST_TOKEN && turn.rest.is_some_and(paced)
}

/// R. Jain, D. Chiu and W. Hawe, "A Quantitative Measure of Fairness and Discrimination", 1984.
fn fairness(turns: &[TurnRecord]) -> f64 {
    let mut slowdowns: Vec<(u64, f64, usize)> = Vec::new();
    for turn in turns {
        let slowdown = (turn.first_token + turn.rest.unwrap_or(0.0)) / turn.alone;
        match slowdowns.iter_mut().find(|(owner, ..)| *owner == turn.owner) {
            Some((_, sum, count)) => (*sum, *count) = (*sum + slowdown, *count + 1),
            None => slowdowns.push((turn.owner, slowdown, 1)),
        }
    }
    let means: Vec<f64> = slowdowns.iter().map(|(_, sum, count)| sum / *count as f64).collect();
    let (sum, squares) =
        means.iter().fold((0.0, 0.0), |(sum, squares), mean| (sum + mean, squares + mean * mean));
    sum * sum / (means.len() as f64 * squares)
}

/// The value below which a `share` of the weight lies; 0 of nothing.
fn weighted_percentile(values: &[(f64, usize)], share: f64) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(|a, b| a.0.total_cmp(&b.0));
    let wanted = share * values.iter().map(|(_, weight)| *weight as f64).sum::<f64>();
    let mut seen = 0.0;
    let found = values.iter().find(|(_, weight)| {
        seen += *weight as f64;
        seen >= wanted
    });
    found.map_or(0.0, |(value, _)| *value)
}

#[cfg(test)]
mod tests {
    use super::super::world::Wait;
    use super::*;

    fn turn(owner: u64, first_token: f64, rest: Option<f64>) -> TurnRecord {
        let (answer, alone, wait) = (101.0, 2.0, Wait::default());
        TurnRecord { owner, first_token, rest, answer, alone, name: (owner, 0), wait }
    }

    #[test]
    fn turns_that_only_one_run_has_are_not_compared() {
        let run = |turns: &[(u64, f64)]| Outcome {
            turns: turns.iter().map(|&(name, first)| turn(name, first, None)).collect(),
            ..Outcome::default()
        };
        let (quiet, flood) = (run(&[(1, 1.0), (2, 2.0), (3, 90.0)]), run(&[(2, 3.0), (1, 1.5), (4, 70.0)]));
        let first_tokens = first_tokens(&quiet, &flood);
        assert_eq!(first_tokens, [[2.0, 3.0], [1.0, 1.5]]);
        assert_eq!(ratios(&first_tokens), Some([1.5; 3]));
        assert_eq!(ratios(&[]), None);
    }

    #[test]
    fn fairness_is_one_where_all_wait_alike_and_less_where_one_waits_longer() {
        assert_eq!(fairness(&[turn(1, 1.0, Some(3.0)), turn(2, 2.0, Some(2.0))]), 1.0);
        assert_eq!(fairness(&[turn(1, 0.0, Some(2.0)), turn(2, 4.0, Some(2.0))]), 0.8); // 4² / (2 · 10)
    }

    #[test]
    fn a_turn_that_waits_drags_or_never_ends_is_not_good() {
        let good = |first, rest| is_good(&turn(0, first, rest));
        assert!(good(5.0, Some(10.0)));
        assert!(!good(5.1, Some(10.0)) && !good(1.0, Some(10.1)) && !good(1.0, None));
    }

    #[test]
    fn a_percentile_goes_by_weight() {
        assert_eq!(weighted_percentile(&[(3.0, 1), (1.0, 99), (2.0, 0)], 0.99), 1.0);
        assert_eq!(weighted_percentile(&[(3.0, 2), (1.0, 98)], 0.99), 3.0);
        assert_eq!(weighted_percentile(&[], 0.99), 0.0);
    }
}
