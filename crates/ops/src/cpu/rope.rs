//! Rotary position embedding: the rotations of a step's rows, and their application.

use crate::{Rope, RopePairing};

/// Cosines and sines for the rows of one step, shared by its layers. Computing them costs less
/// than reading them from a table of all positions would in memory.
#[derive(Default)]
pub(super) struct Rotations {
    cos: Vec<f32>,
    sin: Vec<f32>,
    pairs: usize,
}

impl Rotations {
    /// Prepares the rows at `positions`.
    pub fn set(&mut self, rope: &Rope, positions: &[u32]) {
        self.pairs = rope.inv_freq.len();
        self.cos.clear();
        self.sin.clear();
        for &position in positions {
            for &frequency in &rope.inv_freq {
                // The angle is rounded to f32 as transformers does it, so that logits agree.
                let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
                self.cos.push(cos as f32);
                self.sin.push(sin as f32);
            }
        }
    }

    /// Rotates one head of row `row` in place.
    pub fn apply(&self, pairing: RopePairing, row: usize, head: &mut [f32]) {
        let range = row * self.pairs..(row + 1) * self.pairs;
        let turns = self.cos[range.clone()].iter().zip(&self.sin[range]);
        match pairing {
            RopePairing::Halves => {
                let (first, second) = head.split_at_mut(self.pairs);
                for ((a, b), turn) in first.iter_mut().zip(second).zip(turns) {
                    (*a, *b) = rotate(*a, *b, turn);
                }
            }
            RopePairing::Interleaved => {
                for (pair, turn) in head.chunks_exact_mut(2).zip(turns) {
                    (pair[0], pair[1]) = rotate(pair[0], pair[1], turn);
                }
            }
        }
    }
}

#[inline(always)]
fn rotate(a: f32, b: f32, (cos, sin): (&f32, &f32)) -> (f32, f32) {
    (a * cos - b * sin, b * cos + a * sin)
}
