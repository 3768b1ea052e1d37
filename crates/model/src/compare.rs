//! How far apart what two backends compute of one model is.

use rudder_ops::{BLOCK_SIZE, Backend, Batch};

use crate::{KvSize, LoadError, LoadOptions, Model, ModelSource};

/// Tokens of the prompts: one that fills tiles, and takes two steps, and a short one beside it.
const PROMPTS: [usize; 2] = [75, 9];
const FIRST_CHUNK: usize = 40;
/// Tokens that are then decoded, both sequences in a step.
const DECODED: usize = 4;
const BLOCKS: usize = 2 * (PROMPTS[0] + DECODED).div_ceil(BLOCK_SIZE);
const OPTIONS: LoadOptions = LoadOptions {
    max_batch_tokens: PROMPTS[0],
    max_outputs: PROMPTS[0],
    kv: KvSize::Blocks(BLOCKS),
    max_context: 2 * PROMPTS[0],
};

/// How far apart two backends' logits are at most, of prompts and of decodes, over the largest logit; infinity where one is not finite.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Difference {
    /// In steps of prompts.
    pub prefill: f32,
    /// In steps of one token a sequence.
    pub decode: f32,
}

impl Difference {
    /// The larger of the two.
    pub fn worst(self) -> f32 {
        self.prefill.max(self.decode)
    }
}

/// Loads a model on two backends, and runs prompts and decodes on both. The largest logit is `one`'s.
///
/// # Errors
/// If either backend fails.
pub fn worst_difference(
    source: &ModelSource,
    one: impl Backend,
    other: impl Backend,
) -> Result<Difference, LoadError> {
    let mut one = source.load(one, OPTIONS, |_, _| ())?.model;
    let mut other = source.load(other, OPTIONS, |_, _| ())?.model;
    compare(&mut *one, &mut *other)
}

fn compare(one: &mut dyn Model, other: &mut dyn Model) -> Result<Difference, LoadError> {
    let (mut largest, mut prefill, mut decode) = (f32::MIN_POSITIVE, 0f32, 0f32);
    for batch in steps(one.config().vocab) {
        let decodes = batch.rows() == batch.spans.len();
        let worst = if decodes { &mut decode } else { &mut prefill };
        one.forward(&batch)?;
        other.forward(&batch)?;
        for (x, y) in one.logits()?.into_iter().zip(other.logits()?) {
            if x.is_finite() {
                largest = largest.max(x.abs());
            }
            let difference = (x - y).abs();
            *worst = worst.max(if difference.is_finite() { difference } else { f32::INFINITY });
        }
    }
    Ok(Difference { prefill: prefill / largest, decode: decode / largest })
}

/// The steps, all of whose logits are wanted. The sequences' blocks are every other one.
fn steps(vocab: usize) -> Vec<Batch> {
    let token = |s: usize, at: usize| ((at * at + 31 * s + 7 * at) % vocab) as u32;
    let blocks = |s: usize| (0..BLOCKS as u32 / 2).map(|b| 2 * b + s as u32).collect::<Vec<_>>();
    let step = |parts: &[(usize, std::ops::Range<usize>)]| {
        let mut batch = Batch::default();
        for (s, range) in parts {
            let tokens: Vec<u32> = range.clone().map(|at| token(*s, at)).collect();
            batch.push(&tokens, range.start, &blocks(*s), tokens.len());
        }
        batch
    };
    let prompts = [step(&[(0, 0..FIRST_CHUNK)]), step(&[(0, FIRST_CHUNK..PROMPTS[0]), (1, 0..PROMPTS[1])])];
    let decodes = (0..DECODED).map(|i| {
        let [a, b] = PROMPTS.map(|len| len + i);
        step(&[(0, a..a + 1), (1, b..b + 1)])
    });
    prompts.into_iter().chain(decodes).collect()
}

#[cfg(test)]
mod tests {
    use rudder_ops::cpu::{Cpu, KvDType};
    use rudder_ops::reference::Reference;
    use rudder_ops::{OpError, SampleRow, Sampled};

    use super::*;
    use crate::ModelConfig;

    fn tiny() -> ModelSource {
        ModelSource::dummy("tiny").expect("it is compiled in")
    }

    #[test]
    fn the_cpu_and_the_reference_differ_by_roundings() {
        let found = worst_difference(&tiny(), Reference::new(), Cpu::new(1, KvDType::F32)).expect("both run");
        let Difference { prefill, decode } = found;
        assert!(prefill.min(decode) > 0.0 && found.worst() < 0.01, "{found:?}");
    }

    /// Shifts what a decode step sees, or loses a logit.
    struct Broken(Box<dyn Model>, bool);

    impl Model for Broken {
        fn config(&self) -> &ModelConfig {
            self.0.config()
        }
        fn forward(&mut self, batch: &Batch) -> Result<(), OpError> {
            let mut batch = batch.clone();
            if self.1 && batch.rows() == 2 {
                batch.positions[0] -= 1;
            }
            self.0.forward(&batch)
        }
        fn sample(&mut self, rows: &[SampleRow<'_>], out: &mut Vec<Sampled>) -> Result<(), OpError> {
            self.0.sample(rows, out)
        }
        fn logits(&mut self) -> Result<Vec<f32>, OpError> {
            let mut logits = self.0.logits()?;
            if !self.1 {
                (logits[5], logits[6]) = (f32::NAN, f32::INFINITY);
            }
            Ok(logits)
        }
    }

    #[test]
    fn one_wrong_position_and_what_is_no_number_show() {
        let load =
            || tiny().load(Cpu::new(1, KvDType::F32), OPTIONS, |_, _| ()).expect("the preset loads").model;
        let found = |shifts| compare(&mut *load(), &mut Broken(load(), shifts)).expect("both run");
        let lost = compare(&mut Broken(load(), false), &mut *load()).expect("both run");
        assert_eq!(lost.worst(), f32::INFINITY);
        let shifted = found(true);
        assert!(shifted.prefill == 0.0 && shifted.decode > 0.04 && shifted.worst() == shifted.decode);
        assert_eq!(found(false), Difference { prefill: f32::INFINITY, decode: f32::INFINITY });
        assert_eq!(compare(&mut *load(), &mut *load()).expect("both run").worst(), 0.0);
    }
}
