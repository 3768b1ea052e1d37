//! What a draft model promises: tokens a second with its guesses, all that they cost counted, against without.
//!
//! A guess costs a row of the draft model's step and, like any draft, a row of the large model's. As many steps of the
//! draft model are planned as promise most tokens a second. While they run, each guess says how sure it is: a further
//! step is then worth its time if it promises more for it than that rate.

use super::lengths::Outlook;
use super::window::MOST_GUESSES;

/// What steps take by their rows, in seconds: of the large model, and of the draft model.
#[derive(Debug, Default)]
pub(crate) struct StepTimes {
    pub(crate) large: Vec<f32>,
    pub(crate) small: Vec<f32>,
    /// Of a token that the draft model only reads.
    pub(crate) reading: f32,
}

/// A sequence that may be guessed for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Prospect {
    /// Probability that a guess is right.
    pub(crate) chance: f32,
    /// Most guesses of use.
    pub(crate) most: usize,
    /// Tokens that its draft promises otherwise, and the rows of that.
    pub(crate) copied: f32,
    pub(crate) copied_rows: usize,
    /// Tokens that its first guess has to read first.
    pub(crate) behind: usize,
}

impl Prospect {
    /// Tokens expected of so many guesses.
    pub(crate) fn expected(&self, guesses: usize) -> f32 {
        (1..=guesses.min(self.most)).map(|guess| self.chance.powi(guess as i32)).sum()
    }
}

/// The best rate, in tokens a second, that guesses for these sequences promise, and the steps of the draft model for it.
/// `outlook` is the step without them.
pub(crate) fn best_depth(
    outlook: Outlook,
    prospects: impl Iterator<Item = Prospect> + Clone,
    times: &StepTimes,
) -> (usize, f32) {
    let sequences = prospects.clone().count();
    let (mut tokens, mut rows, mut guessing) = (outlook.tokens, outlook.rows, 0.0);
    for prospect in prospects.clone() {
        tokens -= prospect.copied;
        rows -= prospect.copied_rows;
        guessing += prospect.behind as f32 * times.reading;
    }
    let mut best = (0, 0.0);
    for depth in 1..=MOST_GUESSES {
        rows += sequences;
        let small = sequences.checked_sub(1).and_then(|row| times.small.get(row));
        let (Some(small), Some(large)) = (small, times.large.get(rows - 1)) else { break };
        let of_depth = |p: Prospect| if depth <= p.most { p.chance.powi(depth as i32) } else { 0.0 };
        tokens += prospects.clone().map(of_depth).sum::<f32>();
        guessing += small;
        let rate = tokens / (large + guessing);
        if rate > best.1 {
            best = (depth, rate);
        }
    }
    best
}

impl StepTimes {
    /// Seconds that a further step of the draft model for `sequences` takes, with the rows that it adds to the
    /// `rows` of the large model's.
    pub(crate) fn of_guess(&self, sequences: usize, rows: usize) -> f32 {
        let small = sequences.checked_sub(1).and_then(|row| self.small.get(row));
        let large = |rows: usize| rows.checked_sub(1).and_then(|row| self.large.get(row));
        match (small, large(rows), large(rows + sequences)) {
            (Some(small), Some(before), Some(after)) => small + after - before,
            _ => f32::INFINITY,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Steps of the large model take 100 ms and 5 ms a row more, those of the small one `small`.
    fn times(small: f32) -> StepTimes {
        StepTimes {
            large: (0..128).map(|row| 0.1 + 0.005 * row as f32).collect(),
            small: (0..64).map(|row| small + 0.001 * row as f32).collect(),
            reading: 0.002,
        }
    }

    fn outlook(rows: usize) -> Outlook {
        Outlook { tokens: rows as f32, rows, seconds: 0.1 + 0.005 * (rows - 1) as f32 }
    }

    fn prospect(chance: f32) -> Prospect {
        Prospect { chance, most: MOST_GUESSES, copied: 0.0, copied_rows: 0, behind: 0 }
    }

    #[test]
    fn the_surer_and_the_cheaper_guesses_are_the_more_of_them_pay() {
        let best = |chance, small| best_depth(outlook(1), [prospect(chance)].into_iter(), &times(small));
        let (depth, rate) = best(0.8, 0.02);
        assert!((2..MOST_GUESSES).contains(&depth) && rate > 15.0, "{depth} {rate}");
        assert!(best(0.95, 0.02).0 > depth && best(0.8, 0.005).0 > depth);
        assert!(best(0.95, 0.1).1 < outlook(1).rate(), "a draft model as slow as the large one");
        assert!(best(0.1, 0.02).1 < outlook(1).rate());
        assert_eq!(best_depth(outlook(1), [].into_iter(), &times(0.02)), (0, 0.0));
    }

    #[test]
    fn what_copies_promise_is_given_up_for_guesses() {
        let copied = Prospect { copied: 3.0, copied_rows: 4, ..prospect(0.8) };
        let with = Outlook { tokens: 4.0, rows: 5, seconds: 0.12 };
        let [alone, instead] = [(outlook(1), prospect(0.8)), (with, copied)]
            .map(|(outlook, prospect)| best_depth(outlook, [prospect].into_iter(), &times(0.02)));
        assert!((alone.1 - instead.1).abs() < 1e-3, "{alone:?} {instead:?}");
    }

    #[test]
    fn reading_what_was_copied_before_the_first_guess_is_counted() {
        let best = |behind| {
            let prospect = Prospect { behind, ..prospect(0.7) };
            best_depth(outlook(1), [prospect].into_iter(), &times(0.03)).1
        };
        assert!(best(0) > outlook(1).rate() && best(0) > best(4), "{}", best(0));
        assert!(best(40) < outlook(1).rate(), "{}", best(40));
    }

    #[test]
    fn a_loaded_step_promises_less_and_few_guesses_of_use_count_as_few() {
        let rate = |sequences: usize| {
            let prospects = vec![prospect(0.7); sequences];
            best_depth(outlook(sequences), prospects.into_iter(), &times(0.03)).1 / outlook(sequences).rate()
        };
        assert!(rate(16) < rate(1));
        let short = Prospect { most: 2, ..prospect(0.95) };
        assert_eq!(best_depth(outlook(1), [short].into_iter(), &times(0.02)).0, 2);
        assert!((short.expected(8) - 0.95 - 0.9025).abs() < 1e-4);
    }

    #[test]
    fn a_step_costs_its_rows_in_both_models_and_more_than_can_be_is_never_worth_it() {
        let times = times(0.02);
        assert!((times.of_guess(2, 3) - 0.021 - 0.01).abs() < 1e-5);
        assert_eq!(times.of_guess(0, 3), f32::INFINITY);
        assert_eq!(times.of_guess(2, 127), f32::INFINITY);
    }
}
