//! What the drafts of all sequences share: how often drafts hold, what steps cost, how long
//! drafts are, what others said.

use super::acceptance::Acceptance;
use super::lengths::{Lengths, Outlook};
use super::siblings::Siblings;
use super::step_cost::StepCost;

/// Tokens indexed before a step, over all sequences: some 0.2 ms. A prompt of 140,000 tokens is
/// indexed within nine steps, and until then drafted for from what is.
const INDEXED_PER_STEP: usize = 16 * 1024;

/// See the module.
#[derive(Debug)]
pub(crate) struct Drafting {
    pub(crate) acceptance: Acceptance,
    pub(crate) lengths: Lengths,
    pub(crate) cost: StepCost,
    pub(crate) siblings: Siblings,
    /// What the step promises with the lengths chosen; unknown beside a prefill and before a step was measured.
    pub(crate) outlook: Option<Outlook>,
    /// Most drafted tokens of a step.
    room: usize,
    /// Tokens that may still be indexed before this step.
    pub(crate) to_index: usize,
    // Reused from step to step.
    pub(crate) sequences: Vec<u64>,
    pub(crate) chosen: Vec<usize>,
    pub(crate) draft: Vec<u32>,
}

impl Drafting {
    pub(crate) fn new(room: usize) -> Self {
        Self {
            acceptance: Acceptance::of_engine(),
            lengths: Lengths::default(),
            cost: StepCost::new(),
            siblings: Siblings::default(),
            outlook: None,
            room,
            to_index: 0,
            sequences: Vec::new(),
            chosen: Vec::new(),
            draft: Vec::new(),
        }
    }

    pub(crate) fn begin(&mut self) {
        self.to_index = INDEXED_PER_STEP;
        self.sequences.clear();
        self.lengths.clear();
    }

    /// Tells how many tokens each of `sequences` drafts, in `chosen`; see [`Lengths::choose`].
    pub(crate) fn choose(&mut self, decodes: usize, prompt_token: Option<f32>) {
        self.chosen.clear();
        self.chosen.resize(self.sequences.len(), 0);
        self.outlook = self.lengths.choose(decodes, self.room, prompt_token, &self.cost, &mut self.chosen);
    }

    /// Most drafted tokens of a step.
    pub(crate) fn room(&self) -> usize {
        self.room
    }
}
