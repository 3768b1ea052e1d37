//! A planned step through the model and the sampler.

use std::panic::{AssertUnwindSafe, catch_unwind};

use rudder_model::Model;
use rudder_ops::{OpError, SampleRow, Sampled};
use rudder_scheduler::{Chunk, Sequence, StepPlan};

use super::StepLoop;
use super::active::Active;

impl StepLoop {
    pub(super) fn fill_batch(&mut self, plan: &StepPlan) {
        self.batch.clear();
        for &Chunk { id, start, len, outputs, drafted } in &plan.chunks {
            let Some(sequence) = self.scheduler.sequence(id) else { continue };
            let known = &sequence.tokens[start..start + len - drafted];
            let tokens = if drafted == 0 {
                known
            } else {
                self.chunk.clear();
                self.chunk.extend_from_slice(known);
                self.chunk.extend_from_slice(&sequence.draft()[..drafted]);
                &self.chunk
            };
            self.batch.push(tokens, start, &sequence.blocks, outputs);
        }
    }

    /// Runs the model and the sampler over the batch; a panic in either is this step's fault only.
    pub(super) fn compute(&mut self, plan: &StepPlan) -> Result<(), String> {
        let (model, batch) = (&mut self.model, &self.batch);
        guarded(|| model.forward(batch))?;
        self.await_masks(plan);
        let outcome = self.with_rows(plan, |model, rows, sampled| {
            sampled.clear();
            if rows.is_empty() { Ok(()) } else { model.sample(rows, sampled) }
        });
        let wanted: usize = plan.chunks.iter().map(|chunk| chunk.outputs).sum();
        outcome.and_then(|()| answers_all(&self.sampled, wanted))
    }

    /// Has the model do something with the output rows of a step, which it ran last. Those of sequences that are gone count too.
    pub(super) fn with_rows(
        &mut self,
        plan: &StepPlan,
        work: impl FnOnce(&mut dyn Model, &[SampleRow<'_>], &mut Vec<Sampled>) -> Result<(), OpError>,
    ) -> Result<(), String> {
        let mut rows = recycle(std::mem::take(&mut self.rows));
        for chunk in plan.chunks.iter().filter(|c| c.outputs > 0) {
            let (Some(sequence), Some(active)) =
                (self.scheduler.sequence(chunk.id), self.active.get(&chunk.id))
            else {
                let (params, position) = (&self.nobodys, chunk.start as u64);
                let (counts, drafted, mask, forced) = (None, &[][..], None, None);
                let nobodys = SampleRow { params, counts, drafted, position, mask, forced };
                rows.extend((0..chunk.outputs).map(|_| nobodys));
                continue;
            };
            let first = chunk.start + chunk.len - chunk.outputs + 1;
            let draft = &sequence.draft()[..chunk.drafted];
            let row = |row: usize| sample_row(sequence, active, first + row, &draft[..row.min(draft.len())]);
            rows.extend((0..chunk.outputs).map(row));
        }
        let (model, sampled) = (&mut *self.model, &mut self.sampled);
        let outcome = guarded(|| work(model, &rows, sampled));
        self.rows = recycle(rows);
        outcome
    }
}

/// What the sampler needs for the token at `position` of a sequence, after the tokens `drafted`.
fn sample_row<'a>(
    sequence: &'a Sequence,
    active: &'a Active,
    position: usize,
    drafted: &'a [u32],
) -> SampleRow<'a> {
    SampleRow {
        params: &active.submission.request.sampling,
        counts: active.counts.as_ref(),
        drafted,
        position: position as u64,
        mask: active.mask(drafted.len()),
        forced: if active.is_scoring() { sequence.tokens.get(position).copied() } else { None },
    }
}

/// Runs the model, which may fail or panic; the message is fit for the client.
pub(crate) fn guarded(work: impl FnOnce() -> Result<(), OpError>) -> Result<(), String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(outcome) => outcome.map_err(|error| format!("the model failed: {error}")),
        Err(_) => Err("the model failed unexpectedly".into()),
    }
}

/// Whether the sampler answered every row.
pub(crate) fn answers_all(sampled: &[Sampled], rows: usize) -> Result<(), String> {
    if sampled.len() == rows { Ok(()) } else { Err("the sampler did not answer every row".into()) }
}

/// An emptied vector's memory under another lifetime: collecting in place keeps the allocation.
pub(crate) fn recycle<'a>(mut rows: Vec<SampleRow<'_>>) -> Vec<SampleRow<'a>> {
    rows.clear();
    rows.into_iter().map(|_| unreachable!("the vector is empty")).collect()
}
