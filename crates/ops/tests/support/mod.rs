//! What parity tests of backends share, those of the cuda crate too: random numbers, tensors, comparison.

#![allow(dead_code)] // every test binary uses a part

use half::bf16;
use rudder_ops::{Backend, Batch, ExpertWeights, RawTensor, Result};

/// SplitMix64, so that a failure can be repeated.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    /// `n` numbers in `-scale .. scale`.
    pub fn vec(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| ((self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0) * scale).collect()
    }
    /// The same, such as bf16 holds them exactly: what the kernels round is then no difference.
    pub fn exact(&mut self, n: usize, scale: f32) -> Vec<f32> {
        self.vec(n, scale).into_iter().map(|x| bf16::from_f32(x).to_f32()).collect()
    }
}

/// A matrix of f32, by its values and width.
pub type Rows<'a> = (&'a [f32], usize);

/// Puts rows into a new tensor, by way of the only op that makes activations out of weights.
pub fn upload<B: Backend>(b: &mut B, (data, width): Rows<'_>) -> Result<B::Tensor> {
    let rows = data.len() / width;
    let table = b.load_embedding(&RawTensor::from_f32("rows", vec![rows, width], data))?;
    b.begin(&plain_batch(rows))?;
    let mut out = b.tensor(rows, width)?;
    b.embed(&table, &mut out)?;
    Ok(out)
}

/// One sequence of `rows` tokens 0, 1, 2, ...
pub fn plain_batch(rows: usize) -> Batch {
    let mut batch = Batch::default();
    let blocks: Vec<u32> = (0..rows.div_ceil(16) as u32).collect();
    batch.push(&(0..rows as u32).collect::<Vec<_>>(), 0, &blocks, 0);
    batch
}

pub fn vector<B: Backend>(b: &mut B, data: &[f32]) -> Result<B::Vector> {
    b.load_vector(&[RawTensor::from_f32("vector", vec![data.len()], data)])
}

pub fn matrix(name: &str, rows: usize, data: &[f32]) -> RawTensor {
    RawTensor::from_f32(name, vec![rows, data.len() / rows], data)
}

/// Same length, and everywhere within `tolerance` times the larger of `floor` and the value.
#[track_caller]
pub fn assert_close(found: &[f32], expected: &[f32], tolerance: f32, floor: f32, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (&x, &y)) in found.iter().zip(expected).enumerate() {
        let same = x == y || (x.is_nan() && y.is_nan()) || (x - y).abs() <= tolerance * y.abs().max(floor);
        assert!(same, "{what}: element {i} is {x}, the reference has {y}");
    }
}

/// A mixture's output on rows `x` and their experts' `logits`; at most 1,024 rows.
pub fn run_experts<B: Backend>(
    b: &mut B,
    x: Rows,
    logits: Rows,
    weights: &ExpertWeights<'_>,
    top_k: usize,
    renormalise: bool,
) -> Result<Vec<f32>> {
    let experts = b.load_experts(weights)?;
    let (xs, logits) = (upload(b, x)?, upload(b, logits)?);
    let mut out = b.tensor(1024, x.1)?;
    b.moe(&xs, &logits, &experts, top_k, renormalise, &mut out)?;
    b.to_host(&out)
}

/// The same of gates, ups and downs without biases.
pub fn run_moe<B: Backend>(
    b: &mut B,
    x: Rows,
    logits: Rows,
    [gate, up, down]: &[Vec<RawTensor>; 3],
    top_k: usize,
    renormalise: bool,
) -> Result<Vec<f32>> {
    run_experts(b, x, logits, &ExpertWeights::plain(gate, up, down), top_k, renormalise)
}
