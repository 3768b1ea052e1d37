//! How likely a drafted token is accepted, by how many tokens before it matched: measured, never
//! assumed for long. Tokens are counted whether or not they were drafted, so that a sequence whose
//! drafts are off is measured all the same and drafts again when it pays.

/// Lower bounds of the classes of matched tokens.
const CLASSES: [usize; 10] = [0, 1, 2, 3, 4, 6, 9, 13, 21, 33];
/// Rates before anything is measured.
const FIRST: [f32; CLASSES.len()] = [0.25, 0.3, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.92, 0.96];
/// Observations that those count for in the engine's rates, and the engine's in a sequence's.
const FIRST_WEIGHT: f32 = 16.0;
const PRIOR_WEIGHT: f32 = 4.0;

/// Decaying counts by class.
#[derive(Debug, Clone)]
pub(crate) struct Acceptance {
    hits: [f32; CLASSES.len()],
    tries: [f32; CLASSES.len()],
    /// What remains of a count at the next of its class.
    decay: f32,
}

impl Acceptance {
    /// Over all sequences, slow to change.
    pub(crate) fn of_engine() -> Self {
        Self {
            hits: FIRST.map(|rate| rate * FIRST_WEIGHT),
            tries: [FIRST_WEIGHT; CLASSES.len()],
            decay: 0.995,
        }
    }

    /// Of one sequence: its last dozen or so.
    pub(crate) fn of_sequence() -> Self {
        Self { hits: [0.0; CLASSES.len()], tries: [0.0; CLASSES.len()], decay: 0.92 }
    }

    /// Counts a token that `matched` tokens before it foretold.
    pub(crate) fn record(&mut self, matched: usize, hit: bool) {
        let class = class(matched);
        self.hits[class] = self.hits[class] * self.decay + f32::from(u8::from(hit));
        self.tries[class] = self.tries[class] * self.decay + 1.0;
    }

    /// Probability that a token is as foretold, leaning on `engine` where little is known.
    pub(crate) fn rate(&self, engine: &Acceptance, matched: usize) -> f32 {
        let class = class(matched);
        let prior = engine.hits[class] / engine.tries[class];
        (self.hits[class] + PRIOR_WEIGHT * prior) / (self.tries[class] + PRIOR_WEIGHT)
    }
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
        assert_eq!(rates.rate(&engine, 40), FIRST[9]);
        (0..60).for_each(|_| rates.record(40, false));
        assert!(rates.rate(&engine, 33) < 0.25, "{}", rates.rate(&engine, 33));
        assert_eq!(rates.rate(&engine, 32), FIRST[8], "other classes are another matter");
        (0..60).for_each(|_| rates.record(40, true));
        assert!(rates.rate(&engine, 40) > 0.9);
    }
}
