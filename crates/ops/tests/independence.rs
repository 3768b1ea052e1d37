//! The cpu backend's promise: an answer's bits depend on its own sequence alone, not on
//! neighbours, chunk sizes, block tables or threads.

use rudder_ops::cpu::{Cpu, KvDType};
use rudder_ops::{
    Activation, AttentionOptions, AttentionShape, Backend, Batch, DType, ExpertWeights, QkNorm, RawTensor,
    Result, Rope, RopePairing,
};
use std::sync::Arc;

const HIDDEN: usize = 48;
const INNER: usize = 80;
const EXPERTS: usize = 5;
const VOCAB: usize = 64;
/// The last token's embedding is all NaN.
const NAN_TOKEN: u32 = VOCAB as u32 - 1;
const SHAPE: AttentionShape = AttentionShape { heads: 6, kv_heads: 2, head_dim: 20, scale: 0.22 };
const BLOCKS: usize = 200;
/// How servers keep keys and values; attention reads the two differently.
const SERVED: [KvDType; 2] = [KvDType::F16, KvDType::BF16];

fn values(seed: u32, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(747_796_405).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next() * 0.4).collect()
}

fn raw(seed: u32, shape: &[usize]) -> RawTensor {
    RawTensor::from_f32(format!("weight {seed}"), shape.to_vec(), &values(seed, shape.iter().product()))
}

/// The same in bf16, of which many rows take another way through an MLP than few.
fn bf16(seed: u32, shape: &[usize]) -> RawTensor {
    let values = values(seed, shape.iter().product());
    let bytes: Vec<u8> = values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect();
    RawTensor::new(format!("weight {seed}"), shape.to_vec(), DType::BF16, Arc::new(bytes), 0)
        .expect("whole numbers")
}

/// One decoder layer with every op in it.
struct Model {
    cpu: Cpu,
    window: Option<usize>,
    outputs_only: bool,
    sinks: Vec<f32>,
    embedding: <Cpu as Backend>::Embedding,
    norm: Vec<f32>,
    head_norm: Vec<f32>,
    qkv: <Cpu as Backend>::Matrix,
    attention_out: <Cpu as Backend>::Matrix,
    gate_up: <Cpu as Backend>::Matrix,
    down: <Cpu as Backend>::Matrix,
    router: <Cpu as Backend>::Matrix,
    experts: <Cpu as Backend>::Experts,
    cache: <Cpu as Backend>::KvCache,
}

impl Model {
    /// Attends within `window`; with one, to sinks too.
    fn new(threads: usize, kv_dtype: KvDType, window: Option<usize>) -> Result<Self> {
        let mut cpu = Cpu::new(threads, kv_dtype);
        let mut table = values(1, VOCAB * HIDDEN);
        table[(VOCAB - 1) * HIDDEN..].fill(f32::NAN);
        let inv_freq = (0..SHAPE.head_dim / 2).map(|i| 0.6f32.powi(i as i32)).collect();
        cpu.load_rope(&Rope { inv_freq, pairing: RopePairing::Halves }, 4096)?;
        let stack = |seed, shape: [usize; 2]| -> Vec<RawTensor> {
            (0..EXPERTS as u32).map(|i| bf16(seed + i, &shape)).collect()
        };
        let inner = [INNER, HIDDEN];
        let (gate, up, down) = (stack(20, inner), stack(30, inner), stack(40, [HIDDEN, INNER]));
        let biases =
            |seed, len| -> Vec<RawTensor> { (0..EXPERTS as u32).map(|i| raw(seed + i, &[len])).collect() };
        let biases = [biases(50, INNER), biases(60, INNER), biases(70, HIDDEN)];
        let experts = ExpertWeights {
            gate: &gate,
            up: &up,
            down: &down,
            biases: Some(biases.each_ref().map(Vec::as_slice)),
            activation: Activation::ClampedSwiglu { alpha: 1.702, limit: 0.5 },
        };
        Ok(Self {
            window,
            outputs_only: false,
            sinks: cpu.load_vector(&[raw(10, &[SHAPE.heads])])?,
            embedding: cpu.load_embedding(&RawTensor::from_f32("table", vec![VOCAB, HIDDEN], &table))?,
            norm: cpu.load_vector(&[raw(2, &[HIDDEN])])?,
            head_norm: cpu.load_vector(&[raw(3, &[SHAPE.head_dim])])?,
            qkv: cpu.load_matrix(&[raw(4, &[SHAPE.qkv_width(), HIDDEN])])?,
            attention_out: cpu.load_matrix(&[raw(5, &[HIDDEN, SHAPE.out_width()])])?,
            gate_up: cpu.load_matrix(&[bf16(6, &inner), bf16(7, &inner)])?,
            down: cpu.load_matrix(&[bf16(8, &[HIDDEN, INNER])])?,
            router: cpu.load_matrix(&[raw(9, &[EXPERTS, HIDDEN])])?,
            experts: cpu.load_experts(&experts)?,
            cache: cpu.kv_cache(1, &SHAPE, BLOCKS)?,
            cpu,
        })
    }

    /// The bits of the results of the rows that are outputs.
    fn forward(&mut self, batch: &Batch) -> Result<Vec<u32>> {
        let (b, rows) = (&mut self.cpu, batch.rows());
        let mut tensor = |width| b.tensor(rows, width);
        let (mut x, mut normed, mut y) = (tensor(HIDDEN)?, tensor(HIDDEN)?, tensor(HIDDEN)?);
        let (mut qkv, mut attended) = (tensor(SHAPE.qkv_width())?, tensor(SHAPE.out_width())?);
        let (mut gate_up, mut gated) = (tensor(2 * INNER)?, tensor(INNER)?);
        let (mut router, mut out) = (tensor(EXPERTS)?, tensor(HIDDEN)?);
        b.begin(batch)?;
        b.embed(&self.embedding, &mut x)?;
        b.rms_norm(&mut x, None, &self.norm, 1e-6, &mut normed)?;
        b.linear(&normed, &self.qkv, None, &mut qkv)?;
        let norm = QkNorm { q: &self.head_norm, k: &self.head_norm, eps: 1e-6 };
        b.rope_and_cache(&mut qkv, &SHAPE, Some(norm), 0, &mut self.cache)?;
        let (window, outputs_only) = (self.window, self.outputs_only);
        let options = AttentionOptions { window, sinks: window.map(|_| &self.sinks), outputs_only };
        b.attention(&qkv, &SHAPE, options, 0, &self.cache, &mut attended)?;
        b.linear(&attended, &self.attention_out, None, &mut y)?;
        b.rms_norm(&mut x, Some(&y), &self.norm, 1e-6, &mut normed)?;
        b.mlp(&normed, &self.gate_up, &self.down, (&mut gate_up, &mut gated), &mut y)?;
        b.rms_norm(&mut x, Some(&y), &self.norm, 1e-6, &mut normed)?;
        b.linear(&normed, &self.router, None, &mut router)?;
        b.moe(&normed, &router, &self.experts, 2, true, &mut out)?;
        b.gather(&x, Some(&out), &mut y)?;
        Ok(b.to_host(&y)?.iter().map(|x| x.to_bits()).collect())
    }
}

/// A prompt of `n` tokens.
fn prompt(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| i * i % (VOCAB as u32 - 1)).collect()
}

/// The results of `tokens` computed alone, in one step, on one thread.
fn whole(tokens: &[u32], kv_dtype: KvDType, window: Option<usize>) -> Result<Vec<u32>> {
    let mut batch = Batch::default();
    let blocks: Vec<u32> = (0..100).collect();
    batch.push(tokens, 0, &blocks, tokens.len());
    Model::new(1, kv_dtype, window)?.forward(&batch)
}

/// The same in chunks, beside neighbours, in other blocks.
fn chunked(tokens: &[u32], chunk: usize, mut model: Model) -> Result<Vec<u32>> {
    let blocks: Vec<u32> = (100..BLOCKS as u32).rev().collect();
    let mut results = Vec::new();
    let mut batch = Batch::default();
    for (index, part) in tokens.chunks(chunk).enumerate() {
        batch.clear();
        // A neighbour before that changes its length, and one after whose numbers are all NaN.
        batch.push(&prompt(1 + index % 19), 0, &[0, 1], 0);
        batch.push(part, index * chunk, &blocks, part.len());
        batch.push(&[NAN_TOKEN; 3], 0, &[2], 0);
        results.extend(model.forward(&batch)?);
    }
    Ok(results)
}

#[test]
fn bits_do_not_depend_on_chunks_neighbours_blocks_or_threads() -> Result<()> {
    // Beyond two pieces of attention, so that one stream's pieces are computed in parallel too.
    let tokens = prompt(1100);
    for kv_dtype in [KvDType::F16, KvDType::BF16, KvDType::F32] {
        let expected = whole(&tokens, kv_dtype, None)?;
        for (chunk, threads) in [(1, 2), (7, 1), (7, 3), (64, 1), (64, 2), (64, 3), (1100, 3)] {
            let found = chunked(&tokens, chunk, Model::new(threads, kv_dtype, None)?)?;
            assert!(found == expected, "{kv_dtype:?} in chunks of {chunk} on {threads} threads differs");
        }
    }
    Ok(())
}

#[test]
fn nor_do_they_within_a_sliding_window() -> Result<()> {
    let tokens = prompt(1100);
    // Within a block, across blocks and pieces, over more than a piece.
    for (window, kv_dtype) in [5, 130, 700].into_iter().flat_map(|n| SERVED.map(|kv_dtype| (n, kv_dtype))) {
        let expected = whole(&tokens, kv_dtype, Some(window))?;
        for (chunk, threads) in [(1, 2), (7, 3), (64, 2), (1100, 3)] {
            let found = chunked(&tokens, chunk, Model::new(threads, kv_dtype, Some(window))?)?;
            assert!(
                found == expected,
                "{kv_dtype:?}, a window of {window} in chunks of {chunk} on {threads} threads differs"
            );
        }
    }
    Ok(())
}

#[test]
fn what_stands_before_a_window_does_not_show_even_when_it_is_nan() -> Result<()> {
    for (kv_dtype, window) in SERVED.into_iter().flat_map(|kv_dtype| [20, 19].map(|n| (kv_dtype, n))) {
        let mut tokens = prompt(600);
        let expected = whole(&tokens, kv_dtype, Some(window))?;
        tokens[570] = NAN_TOKEN;
        let after = (570 + window) * HIDDEN;
        assert!(whole(&tokens, kv_dtype, Some(window))?[after..] == expected[after..], "{kv_dtype:?}");
    }
    Ok(())
}

#[test]
fn a_lone_decode_split_into_pieces_gives_the_same_bits() -> Result<()> {
    let tokens = prompt(1500);
    let blocks: Vec<u32> = (0..100).collect();
    let cases = [(2, None), (3, None), (8, None), (3, Some(900))];
    for ((threads, window), kv_dtype) in cases.into_iter().flat_map(|case| SERVED.map(|dtype| (case, dtype)))
    {
        let expected = whole(&tokens, kv_dtype, window)?;
        let mut model = Model::new(threads, kv_dtype, window)?;
        let mut batch = Batch::default();
        batch.push(&tokens[..1490], 0, &blocks, 0);
        model.forward(&batch)?;
        for position in 1490..1500 {
            batch.clear();
            batch.push(&tokens[position..position + 1], position, &blocks, 1);
            assert!(model.forward(&batch)? == expected[position * HIDDEN..(position + 1) * HIDDEN]);
        }
    }
    Ok(())
}

#[test]
fn what_a_block_held_before_does_not_show() -> Result<()> {
    let tokens = prompt(21);
    for kv_dtype in SERVED {
        let expected = whole(&tokens, kv_dtype, None)?;
        let mut model = Model::new(2, kv_dtype, None)?;
        let mut batch = Batch::default();
        batch.push(&[NAN_TOKEN; 32], 0, &[7, 3], 0);
        model.forward(&batch)?;
        batch.clear();
        batch.push(&tokens, 0, &[3, 7], tokens.len());
        assert!(model.forward(&batch)? == expected, "{kv_dtype:?}");
    }
    Ok(())
}

#[test]
fn a_later_token_of_the_same_chunk_does_not_show_even_when_it_is_nan() -> Result<()> {
    // With the other half of a pair before it, and with none.
    for (kv_dtype, last) in SERVED.into_iter().flat_map(|kv_dtype| [20, 21].map(|last| (kv_dtype, last))) {
        let mut tokens = prompt(last + 1);
        let expected = whole(&tokens, kv_dtype, None)?;
        tokens[last] = NAN_TOKEN;
        let before = last * HIDDEN;
        assert!(whole(&tokens, kv_dtype, None)?[..before] == expected[..before], "{kv_dtype:?}");
    }
    Ok(())
}

#[test]
fn rows_that_are_wanted_have_the_same_bits_where_attention_leaves_out_the_others() -> Result<()> {
    let mut batch = Batch::default();
    batch.push(&prompt(700), 0, &(0..100).collect::<Vec<_>>(), 0);
    batch.push(&prompt(40), 0, &[100, 101, 102], 0);
    batch.push(&prompt(5), 0, &[103], 0);
    // None of the last sequence; some in the middle of one, more at once than are computed together, and the ends of two that meet.
    batch.outputs = [3, 4, 6].into_iter().chain(600..640).chain([698, 699, 700, 739]).collect();
    for (kv_dtype, window) in SERVED.into_iter().flat_map(|kv_dtype| [None, Some(90)].map(|n| (kv_dtype, n)))
    {
        let expected = Model::new(2, kv_dtype, window)?.forward(&batch)?;
        assert_eq!(expected.len(), batch.outputs.len() * HIDDEN);
        for threads in 1..4 {
            let mut model = Model { outputs_only: true, ..Model::new(threads, kv_dtype, window)? };
            let found = model.forward(&batch)?;
            assert!(found == expected, "{kv_dtype:?}, window {window:?}, {threads} threads");
        }
    }
    Ok(())
}
