//! How long each sequence's draft is: as long as tokens a second are expected to rise.
//!
//! A drafted token's gain is the probability that it and all before it are accepted; its cost is a row
//! more in the step. Taken in order of gain over all sequences, the step's best length is where (tokens
//! expected) / (time estimated) is highest. Loaded steps so draft less, and their best guesses first.
//!
//! Beside a prefill a drafted token takes what a prompt token does, and the step is lengthened for the prefill as
//! much as drafts lengthen its decodes. Whoever decodes without a draft then waits for the others' drafts; so these
//! are cut until each decode gains what the step becomes longer.

use super::step_cost::StepCost;

/// A draft must promise this much more, or noise would choose.
const LEAST_GAIN: f32 = 1.02;
/// Beside a prefill, drafts may lengthen the decodes this much, whoever gains by it.
const LITTLE_LONGER: f32 = 0.1;

/// What a step is expected to give and to take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Outlook {
    /// Tokens, drafted ones by the probability that they are accepted.
    pub(crate) tokens: f32,
    /// Rows, those of drafted tokens among them.
    pub(crate) rows: usize,
    /// Time.
    pub(crate) seconds: f32,
}

impl Outlook {
    /// Tokens a second.
    pub(crate) fn rate(&self) -> f32 {
        self.tokens / self.seconds
    }
}

/// Chooses lengths; its memory is reused.
#[derive(Debug, Default)]
pub(crate) struct Lengths {
    /// Gain of a sequence's next drafted token, in order for each sequence.
    gains: Vec<(f32, u32)>,
    /// How many of them were chosen last.
    chosen: usize,
    seconds: Vec<f32>,
}

impl Lengths {
    pub(crate) fn clear(&mut self) {
        self.gains.clear();
        self.chosen = 0;
    }

    /// The drafted tokens of sequence `index` have these gains, falling from token to token.
    pub(crate) fn offer(&mut self, index: usize, gains: impl Iterator<Item = f32>) {
        self.gains.extend(gains.map(|gain| (gain, index as u32)));
    }

    /// Takes back what was offered for sequence `index`, before lengths are chosen anew.
    pub(crate) fn withdraw(&mut self, index: usize) {
        self.chosen = 0;
        self.gains.retain(|gain| gain.1 as usize != index);
    }

    /// Tokens expected of those last chosen for sequence `index`.
    pub(crate) fn promised(&self, index: usize) -> f32 {
        let chosen = self.gains[..self.chosen].iter();
        chosen.filter(|gain| gain.1 as usize == index).map(|gain| gain.0).sum()
    }

    /// Tells how many tokens each sequence drafts, by adding to `lengths`. The step holds
    /// `decodes` rows without them, at most `room` drafted ones, and where `prompt_token` says how many seconds a
    /// token of it takes, a prefill. Returns what is then expected, as far as is known.
    pub(crate) fn choose(
        &mut self,
        decodes: usize,
        room: usize,
        prompt_token: Option<f32>,
        cost: &StepCost,
        lengths: &mut [usize],
    ) -> Option<Outlook> {
        self.gains.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
        self.gains.truncate(room);
        cost.estimate(decodes + self.gains.len(), &mut self.seconds);
        for row in decodes.max(1)..self.seconds.len() {
            let least = self.seconds[row - 1] + prompt_token.unwrap_or(0.0);
            self.seconds[row] = self.seconds[row].max(least);
        }
        let outlook = self.best(decodes);
        if prompt_token.is_some() {
            self.spare_others(decodes);
        }
        for (_, index) in &self.gains[..self.chosen] {
            lengths[*index as usize] += 1;
        }
        outlook.filter(|_| prompt_token.is_none())
    }

    fn best(&mut self, decodes: usize) -> Option<Outlook> {
        self.chosen = 0;
        if decodes == 0 || self.seconds.is_empty() {
            return None; // nothing is known before the first step without drafts
        }
        let plain = Outlook { tokens: decodes as f32, rows: decodes, seconds: self.seconds[decodes - 1] };
        let (mut best, mut chosen, mut expected) = (plain.rate() * LEAST_GAIN, plain, plain.tokens);
        for (index, (gain, _)) in self.gains.iter().enumerate() {
            expected += gain;
            let rows = decodes + index + 1;
            let longer = Outlook { tokens: expected, rows, seconds: self.seconds[rows - 1] };
            if longer.rate() > best {
                (best, chosen) = (longer.rate(), longer);
            }
        }
        self.chosen = chosen.rows - decodes;
        Some(chosen)
    }

    /// Takes back the least of what was chosen, until each of the decodes gains as many times more tokens as the
    /// step takes longer.
    fn spare_others(&mut self, decodes: usize) {
        while self.chosen > 0 {
            let longer = self.seconds[decodes + self.chosen - 1] / self.seconds[decodes - 1] - 1.0;
            if longer <= LITTLE_LONGER.max(self.least_promised(decodes)) {
                return;
            }
            self.chosen -= 1;
        }
    }

    /// Tokens expected of those last chosen for the one of the decodes that has the least of them.
    fn least_promised(&self, decodes: usize) -> f32 {
        match decodes > self.chosen {
            true => 0.0, // some decode has no draft
            false => (0..decodes).map(|index| self.promised(index)).fold(f32::INFINITY, f32::min),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn cost(milliseconds: fn(usize) -> u64) -> StepCost {
        StepCost::known(&Vec::from_iter(1..=64), |rows| Duration::from_millis(milliseconds(rows)))
    }

    fn chosen(rates: &[f32], decodes: usize, cost: &StepCost) -> Vec<usize> {
        let mut lengths = Lengths::default();
        for (index, rate) in rates.iter().enumerate() {
            lengths.offer(index, (1..=16).map(|k| rate.powi(k)));
        }
        let mut out = vec![0; rates.len()];
        lengths.choose(decodes, 64, None, cost, &mut out);
        out
    }

    #[test]
    fn drafts_are_long_where_rows_cost_little_and_none_where_each_costs_a_step() {
        assert_eq!(chosen(&[0.95], 1, &cost(|_| 100)), [16]);
        assert_eq!(chosen(&[0.95], 1, &cost(|rows| 100 * rows as u64)), [0]);
        let middling = chosen(&[0.8], 1, &cost(|rows| 90 + 10 * rows as u64))[0];
        assert!((3..10).contains(&middling), "{middling}");
    }

    #[test]
    fn the_better_guess_gets_more_and_a_loaded_step_drafts_less() {
        let cost = cost(|rows| 90 + 10 * rows as u64);
        let both = chosen(&[0.9, 0.4], 2, &cost);
        assert!(both[0] > both[1]);
        let alone = chosen(&[0.7], 1, &cost);
        assert!(chosen(&[0.7], 30, &cost)[0] < alone[0]);
    }

    #[test]
    fn what_is_expected_goes_with_what_was_chosen_and_an_offer_can_be_taken_back() {
        let cost = cost(|_| 100);
        let (mut lengths, mut out) = (Lengths::default(), [0, 0]);
        lengths.offer(0, [0.5, 0.25].into_iter());
        lengths.offer(1, [0.8].into_iter());
        let outlook = lengths.choose(2, 64, None, &cost, &mut out).unwrap();
        assert_eq!((out, outlook.rows), ([2, 1], 5));
        assert!((outlook.tokens - 3.55).abs() < 1e-5 && (outlook.seconds - 0.1).abs() < 1e-3, "{outlook:?}");
        assert_eq!(lengths.promised(0), 0.75);
        lengths.withdraw(0);
        let (outlook, mut out) = (lengths.choose(2, 64, None, &cost, &mut [0, 0]).unwrap(), [0, 0]);
        assert!((outlook.tokens - 2.8).abs() < 1e-5 && lengths.promised(0) == 0.0, "{outlook:?}");
        lengths.clear();
        assert_eq!(lengths.choose(2, 64, None, &cost, &mut out).unwrap().rows, 2);
        assert_eq!(lengths.choose(0, 64, None, &cost, &mut out), None);
    }

    /// Lengths beside a prefill whose tokens take so many seconds, for sequences whose tokens have these rates.
    fn beside_prefill(rates: &[f32], prompt_token: f32, cost: &StepCost) -> Vec<usize> {
        let mut lengths = Lengths::default();
        for (index, rate) in rates.iter().enumerate().filter(|(_, rate)| **rate > 0.0) {
            lengths.offer(index, (1..=16).map(|k| rate.powi(k)));
        }
        let mut out = vec![0; rates.len()];
        assert_eq!(lengths.choose(rates.len(), 64, Some(prompt_token), cost, &mut out), None);
        out
    }

    #[test]
    fn beside_a_prefill_a_drafted_token_takes_what_a_prompt_token_does() {
        let (flat, steep) = (cost(|_| 100), cost(|rows| 90 + 10 * rows as u64));
        assert_eq!(beside_prefill(&[0.8], 0.0, &flat), chosen(&[0.8], 1, &flat));
        assert_eq!(beside_prefill(&[0.8], 0.01, &flat), chosen(&[0.8], 1, &steep));
        assert_eq!(beside_prefill(&[0.8], 0.001, &steep), chosen(&[0.8], 1, &steep));
        assert_eq!(beside_prefill(&[0.95], 0.1, &flat), [0]);
    }

    #[test]
    fn beside_a_prefill_nobody_waits_for_others_drafts() {
        let cost = cost(|rows| 90 + 10 * rows as u64);
        assert!(chosen(&[0.9], 2, &cost)[0] > 4);
        // 100 ms and 10 ms more for the second one, which gains nothing: one token is 9 % more.
        assert_eq!(beside_prefill(&[0.9, 0.0], 0.001, &cost), [1, 0]);
        let both = beside_prefill(&[0.9, 0.85], 0.001, &cost);
        assert!(both[0] > 3 && both[1] > 3, "{both:?}");
        assert!(beside_prefill(&[0.9, 0.3], 0.001, &cost)[0] < both[0]);
    }

    #[test]
    fn nothing_is_drafted_before_a_step_was_measured() {
        assert_eq!(chosen(&[0.99], 1, &StepCost::new()), [0]);
    }
}
