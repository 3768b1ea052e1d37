//! How likely a drafted token is accepted, by what speaks for it and how many tokens before it matched:
//! measured, never assumed for long. Tokens are counted whether or not they were drafted, so that a
//! sequence whose drafts are off is measured all the same and drafts again when it pays.

/// Lower bounds of the classes of matched tokens.
const CLASSES: [usize; 10] = [0, 1, 2, 3, 4, 6, 9, 13, 21, 33];
/// Rates before anything is measured, by [`Evidence`].
const FIRST: [[f32; CLASSES.len()]; EVIDENCE] = [
    [0.25, 0.3, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.92, 0.96],
    [0.5, 0.5, 0.55, 0.65, 0.75, 0.85, 0.9, 0.93, 0.95, 0.97],
    [0.2, 0.2, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.94],
    [0.4, 0.6, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95, 0.96, 0.97],
    [0.2, 0.3, 0.4, 0.55, 0.65, 0.75, 0.85, 0.9, 0.93, 0.96],
    [0.3; CLASSES.len()],
    [0.7; CLASSES.len()],
    [0.08, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.88, 0.95],
];
/// Lower bounds of the classes of what a draft model holds its own guess for.
const PROBABILITIES: [f32; CLASSES.len()] = [0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.85, 0.92, 0.97, 0.99];
/// Observations that those count for in the engine's rates, and the engine's in a sequence's.
const FIRST_WEIGHT: f32 = 16.0;
const PRIOR_WEIGHT: f32 = 4.0;

/// What speaks for a foretold token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Evidence {
    /// The same tokens came before it earlier in the sequence.
    Repeated,
    /// Or in the predicted output.
    Predicted,
    /// Or in another sequence's answer.
    Sibling,
    /// A copy that strayed goes on in one place close by.
    Resumed,
    /// It may go on there or elsewhere, or was not much of a copy.
    Vague,
    /// Whatever else does, the token was another than foretold where it stands already.
    Varied,
    /// A draft model will guess it, whatever that is.
    Unguessed,
    /// A draft model has guessed it; [`sureness`] takes the place of matched tokens.
    Guessed,
}

/// How many kinds there are.
const EVIDENCE: usize = Evidence::Guessed as usize + 1;

/// Decaying counts by evidence and class.
#[derive(Debug, Clone)]
pub(crate) struct Acceptance {
    rates: [[Rate; CLASSES.len()]; EVIDENCE],
    /// What remains of a count at the next of its class.
    decay: f32,
}

#[derive(Debug, Clone, Copy, Default)]
struct Rate {
    hits: f32,
    tries: f32,
}

impl Acceptance {
    /// Over all sequences, slow to change.
    pub(crate) fn of_engine() -> Self {
        let first = |rate| Rate { hits: rate * FIRST_WEIGHT, tries: FIRST_WEIGHT };
        Self { rates: FIRST.map(|rates| rates.map(first)), decay: 0.995 }
    }

    /// Of one sequence: its last dozen or so.
    pub(crate) fn of_sequence() -> Self {
        Self { rates: Default::default(), decay: 0.92 }
    }

    /// Counts a token that `matched` tokens before it foretold.
    pub(crate) fn record(&mut self, evidence: Evidence, matched: usize, hit: bool) {
        let rate = &mut self.rates[evidence as usize][class(matched)];
        rate.hits = rate.hits * self.decay + f32::from(u8::from(hit));
        rate.tries = rate.tries * self.decay + 1.0;
    }

    /// Probability that a token is as foretold, leaning on `engine` where little is known.
    pub(crate) fn rate(&self, engine: &Acceptance, evidence: Evidence, matched: usize) -> f32 {
        let class = class(matched);
        let [own, all] = [self, engine].map(|acceptance| acceptance.rates[evidence as usize][class]);
        (own.hits + PRIOR_WEIGHT * all.hits / all.tries) / (own.tries + PRIOR_WEIGHT)
    }
}

/// Stands for as many matched tokens where a draft model gives its own guess this probability.
pub(crate) fn sureness(probability: f32) -> usize {
    CLASSES[PROBABILITIES.partition_point(|&least| least <= probability).max(1) - 1]
}

fn class(matched: usize) -> usize {
    CLASSES.partition_point(|&least| least <= matched) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_follow_what_is_seen_and_forget() {
        let engine = Acceptance::of_engine();
        let mut rates = Acceptance::of_sequence();
        let rate = |rates: &Acceptance, matched| rates.rate(&engine, Evidence::Repeated, matched);
        assert_eq!(rate(&rates, 40), FIRST[0][9]);
        (0..60).for_each(|_| rates.record(Evidence::Repeated, 40, false));
        assert!(rate(&rates, 33) < 0.25, "{}", rate(&rates, 33));
        assert_eq!(rate(&rates, 32), FIRST[0][8], "other classes are another matter");
        assert_eq!(rates.rate(&engine, Evidence::Resumed, 40), FIRST[3][9], "and so is other evidence");
        (0..60).for_each(|_| rates.record(Evidence::Repeated, 40, true));
        assert!(rate(&rates, 40) > 0.9);
    }

    #[test]
    fn guesses_are_told_apart_by_what_the_draft_model_holds_them_for() {
        assert_eq!([f32::NAN, 0.0, 0.14, 1.0].map(|p| class(sureness(p))), [0, 0, 0, 9]);
        let mut rates = Acceptance::of_engine();
        (0..300).for_each(|_| rates.record(Evidence::Guessed, sureness(0.5), false));
        let none = Acceptance::of_sequence();
        let rate = |p| none.rate(&rates, Evidence::Guessed, sureness(p));
        assert!(rate(0.5) < 0.15 && rate(0.46) < 0.15);
        assert_eq!((rate(0.65), rate(0.995)), (FIRST[7][4], FIRST[7][9]));
    }
}
