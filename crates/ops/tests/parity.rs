//! The cpu backend against the reference: every op on random shapes, odd sizes and extreme values.

mod support;

use half::{bf16, f16};
use rudder_ops::cpu::{Cpu, KvDType};
use rudder_ops::reference::Reference;
use rudder_ops::{
    Activation, AttentionOptions, AttentionShape, Backend, Batch, DType, ExpertWeights, LogitBias, OpError,
    QkNorm, RawTensor, Result, Rope, RopePairing, SampleRow, Sampled, SamplingParams, int4, mxfp4,
};
use std::sync::Arc;
use support::{Random, Rows, matrix, plain_batch, run_experts, run_moe, upload, vector};

/// Same length, and everywhere within `tolerance` times the larger of 1 and the value.
#[track_caller]
fn assert_close(found: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    support::assert_close(found, expected, tolerance, 1.0, what);
}

/// Both backends' answers to the same calls.
macro_rules! both {
    ($cpu:expr, $call:expr) => {
        ($call(&mut $cpu), $call(&mut Reference::new()))
    };
}

fn cpu(threads: usize) -> Cpu {
    Cpu::new(threads, KvDType::F32)
}

#[test]
fn rms_norm_agrees_with_and_without_residual() -> Result<()> {
    let mut random = Random(1);
    for width in [1, 7, 16, 31, 64, 65, 100, 896, 1537] {
        for (rows, scale) in [(1, 1.0), (3, 1e-18), (33, 1e15)] {
            let (x, delta) = (random.vec(rows * width, scale), random.vec(rows * width, scale));
            let weight = random.vec(width, 3.0);
            fn run<B: Backend>(
                b: &mut B,
                x: Rows,
                delta: Option<Rows>,
                weight: &[f32],
            ) -> Result<[Vec<f32>; 2]> {
                let (mut x, w) = (upload(b, x)?, vector(b, weight)?);
                let delta = delta.map(|d| upload(b, d)).transpose()?;
                let mut out = b.tensor(64, weight.len())?;
                b.rms_norm(&mut x, delta.as_ref(), &w, 1e-6, &mut out)?;
                Ok([b.to_host(&x)?, b.to_host(&out)?])
            }
            for delta in [None, Some((delta.as_slice(), width))] {
                let (ours, theirs) = both!(cpu(2), |b: &mut _| run(b, (&x, width), delta, &weight));
                let ([x, out], [expected_x, expected_out]) = (ours?, theirs?);
                assert_eq!(x, expected_x, "the residual stream");
                assert_close(&out, &expected_out, 3e-6, &format!("width {width}, scale {scale}"));
            }
        }
    }
    Ok(())
}

fn run_silu_mul<B: Backend>(b: &mut B, data: Rows) -> Result<Vec<f32>> {
    let x = upload(b, data)?;
    let mut out = b.tensor(64, data.1 / 2)?;
    b.silu_mul(&x, &mut out)?;
    b.to_host(&out)
}

#[test]
fn silu_mul_agrees_on_odd_widths_and_extremes() -> Result<()> {
    let mut random = Random(2);
    for width in [1, 5, 16, 33, 200, 4864] {
        let x = random.vec(3 * 2 * width, 20.0);
        let (ours, theirs) = both!(cpu(2), |b: &mut _| run_silu_mul(b, (&x, 2 * width)));
        assert_close(&ours?, &theirs?, 2e-6, &format!("width {width}"));
    }
    let extremes = [-1e30, -100.0, -88.1, 0.0, 88.1, 1e30, f32::INFINITY, f32::NAN];
    let x: Vec<f32> = extremes.into_iter().chain([0.5; 8]).collect();
    let (ours, theirs) = both!(cpu(1), |b: &mut _| run_silu_mul(b, (&x, 16)));
    assert_close(&ours?, &theirs?, 2e-6, "extremes");
    Ok(())
}

fn run_mlp<B: Backend>(b: &mut B, data: Rows, [gate_up, down]: [&[RawTensor]; 2]) -> Result<Vec<f32>> {
    let x = upload(b, data)?;
    let (hidden, inner) = (down[0].shape[0], down[0].shape[1]);
    let (gate_up, down) = (b.load_matrix(gate_up)?, b.load_matrix(down)?);
    let (mut both, mut activated) = (b.tensor(64, 2 * inner)?, b.tensor(64, inner)?);
    let mut out = b.tensor(64, hidden)?;
    b.mlp(&x, &gate_up, &down, (&mut both, &mut activated), &mut out)?;
    b.to_host(&out)
}

#[test]
fn mlp_agrees_for_few_and_many_rows() -> Result<()> {
    let mut random = Random(23);
    for dtype in [DType::F32, DType::BF16] {
        for (hidden, inner) in [(32, 48), (65, 40), (96, 128)] {
            let mut weight = |shape| stored(&mut random, dtype, shape);
            let gate_up = [weight(vec![inner, hidden]), weight(vec![inner, hidden])];
            let down = [weight(vec![hidden, inner])];
            for rows in [1, 11, 12, 40] {
                let x = random.vec(rows * hidden, 0.3);
                let run = |ours: bool| match ours {
                    true => run_mlp(&mut cpu(2), (&x, hidden), [&gate_up, &down]),
                    false => run_mlp(&mut Reference::new(), (&x, hidden), [&gate_up, &down]),
                };
                // Inputs and what stands between the products are rounded to bf16.
                let tolerance = if dtype == DType::F32 { 1e-5 } else { 0.008 * (inner as f32).sqrt() };
                let what = format!("{dtype:?} {hidden} {inner}, {rows} rows");
                assert_close(&run(true)?, &run(false)?, tolerance, &what);
            }
        }
    }
    Ok(())
}

/// A tensor of `dtype` with usable scales and random quants.
fn stored(random: &mut Random, dtype: DType, shape: Vec<usize>) -> RawTensor {
    let n = shape.iter().product();
    let values = random.vec(n, 1.0);
    let bytes: Vec<u8> = match dtype {
        DType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
        DType::BF16 => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        DType::Q8_0 => values
            .chunks(32)
            .flat_map(|block| {
                let scale = f16::from_f32(1.0 / 127.0).to_le_bytes();
                scale.into_iter().chain(block.iter().map(|x| (x * 127.0) as i8 as u8)).collect::<Vec<_>>()
            })
            .collect(),
        DType::MXFP4 => (0..n / 32)
            .flat_map(|_| {
                let codes = std::array::from_fn(|_| random.next() as u8 & 15);
                mxfp4::block(120 + random.below(4) as u8, &codes)
            })
            .collect(),
        other => unreachable!("no test data for {other:?}"),
    };
    RawTensor::new("stored", shape, dtype, Arc::new(bytes), 0).expect("whole blocks")
}

#[test]
fn embed_and_load_vector_widen_every_plain_format_and_blocks() -> Result<()> {
    let mut random = Random(3);
    for dtype in [DType::F32, DType::F16, DType::BF16, DType::Q8_0, DType::MXFP4] {
        let table = stored(&mut random, dtype, vec![50, 96]);
        let parts = [stored(&mut random, dtype, vec![64]), stored(&mut random, dtype, vec![32])];
        fn run<B: Backend>(b: &mut B, table: &RawTensor, parts: &[RawTensor]) -> Result<Vec<f32>> {
            let (table, weight) = (b.load_embedding(table)?, b.load_vector(parts)?);
            let mut batch = Batch::default();
            batch.push(&[3, 49, 0, 3], 0, &[0], 0);
            b.begin(&batch)?;
            let (mut x, mut out) = (b.tensor(9, 96)?, b.tensor(9, 96)?);
            b.embed(&table, &mut x)?;
            b.rms_norm(&mut x, None, &weight, 1e-5, &mut out)?;
            Ok([b.to_host(&x)?, b.to_host(&out)?].concat())
        }
        let (ours, theirs) = both!(cpu(2), |b: &mut _| run(b, &table, &parts));
        assert_close(&ours?, &theirs?, 2e-6, &format!("{dtype:?}"));
    }
    Ok(())
}

#[test]
fn linear_agrees_for_stacked_parts_of_several_formats() -> Result<()> {
    let mut random = Random(4);
    // Quantised weights meet activations rounded to eight bits, so there the bound is theirs:
    // 96 products, each off by at most 1/254 of a value below 1; bf16 activations by 1/256.
    for (dtype, tolerance) in
        [(DType::F32, 1e-5), (DType::F16, 1e-5), (DType::BF16, 0.05), (DType::Q8_0, 0.1), (DType::MXFP4, 0.1)]
    {
        for rows in [1, 5, 40] {
            let parts =
                [stored(&mut random, dtype, vec![19, 96]), stored(&mut random, DType::F32, vec![5, 96])];
            let (x, bias) = (random.vec(rows * 96, 1.0), random.vec(24, 1.0));
            fn run<B: Backend>(
                b: &mut B,
                x: Rows,
                parts: &[RawTensor],
                bias: Option<&[f32]>,
            ) -> Result<Vec<f32>> {
                let (x, w) = (upload(b, x)?, b.load_matrix(parts)?);
                let bias = bias.map(|bias| vector(b, bias)).transpose()?;
                let mut out = b.tensor(64, 24)?;
                b.linear(&x, &w, bias.as_ref(), &mut out)?;
                b.to_host(&out)
            }
            for bias in [None, Some(bias.as_slice())] {
                let (ours, theirs) = both!(cpu(2), |b: &mut _| run(b, (&x, 96), &parts, bias));
                assert_close(&ours?, &theirs?, tolerance, &format!("{dtype:?}, {rows} rows"));
            }
        }
    }
    Ok(())
}

/// They are widened when they are loaded.
#[test]
fn formats_that_only_gpus_keep_are_multiplied_as_bf16() -> Result<()> {
    let mut random = Random(40);
    for dtype in [DType::F8_E4M3, DType::INT4, DType::NVFP4] {
        // Numbers up to about 2, whatever else the bytes are.
        let block = |random: &mut Random| {
            let scale =
                (0.3 + random.below(3) as f32 / 7.0) / if dtype == DType::F8_E4M3 { 1.0 } else { 8.0 };
            let head = match dtype {
                DType::INT4 => int4::word(scale, random.below(17) as u8),
                _ => scale.to_le_bytes(),
            };
            let codes = (4..dtype.block_bytes()).map(|_| random.next() as u8 & 0xbf);
            let codes = codes.enumerate().map(|(i, code)| match dtype {
                DType::NVFP4 if i < 4 => code & 0x3f,
                _ => code,
            });
            head.into_iter().chain(codes.collect::<Vec<u8>>())
        };
        let width = 3 * dtype.block_len();
        let bytes: Vec<u8> = (0..19 * 3).flat_map(|_| block(&mut random)).collect();
        let stored = RawTensor::new("stored", vec![19, width], dtype, Arc::new(bytes), 0);
        let stored = stored.expect("whole blocks");
        let x = random.exact(3 * width, 1.0);
        fn run<B: Backend>(b: &mut B, x: Rows, w: RawTensor) -> Result<Vec<f32>> {
            let (x, w) = (upload(b, x)?, b.load_matrix(&[w])?);
            let mut out = b.tensor(3, 19)?;
            b.linear(&x, &w, None, &mut out)?;
            b.to_host(&out)
        }
        let found = run(&mut cpu(2), (&x, width), stored.clone())?;
        assert_eq!(found, run(&mut cpu(2), (&x, width), stored.widened())?);
        let expected = run(&mut Reference::new(), (&x, width), stored)?;
        // A few hundred products of numbers that are rounded once.
        assert_close(&found, &expected, 0.1, &format!("{dtype:?}"));
    }
    Ok(())
}

/// What an attention case needs; its rows are those of `steps` one after another.
struct AttentionCase {
    shape: AttentionShape,
    rope: Rope,
    norm: Option<[Vec<f32>; 2]>,
    qkv: Vec<f32>,
    steps: Vec<Batch>,
    blocks: usize,
    window: Option<usize>,
    sinks: Option<Vec<f32>>,
}

impl AttentionCase {
    fn random(
        random: &mut Random,
        shape: AttentionShape,
        norm: bool,
        pairing: RopePairing,
        scale: f32,
    ) -> Self {
        let inv_freq =
            (0..shape.head_dim / 2).map(|i| 10_000f32.powf(-2.0 * i as f32 / shape.head_dim as f32));
        let rope = Rope { inv_freq: inv_freq.collect(), pairing };
        let norm = norm.then(|| [random.vec(shape.head_dim, 2.0), random.vec(shape.head_dim, 2.0)]);
        // Three sequences; each step takes a random number of each one's next tokens.
        let tables: [Vec<u32>; 3] =
            std::array::from_fn(|s| (0..45).map(|i| i * 3 + s as u32).rev().collect());
        let mut computed = [0; 3];
        let mut steps = Vec::new();
        for most in [700, 1, 40, 1] {
            let mut batch = Batch::default();
            for (s, computed) in computed.iter_mut().enumerate() {
                let n =
                    if s == 1 { 1 + random.below(3) } else { 1 + random.below(most) }.min(700 - *computed);
                batch.push(&vec![0; n], *computed, &tables[s], 0);
                *computed += n;
            }
            steps.push(batch);
        }
        let rows: usize = steps.iter().map(Batch::rows).sum();
        let qkv = random.vec(rows * shape.qkv_width(), scale);
        Self { shape, rope, norm, qkv, steps, blocks: 135, window: None, sinks: None }
    }

    /// Rotated rows and outputs of every step, on layer 1 of 2.
    fn run<B: Backend>(&self, b: &mut B) -> Result<Vec<f32>> {
        b.load_rope(&self.rope, 1024)?;
        let mut cache = b.kv_cache(2, &self.shape, self.blocks)?;
        let norm = match &self.norm {
            Some([q, k]) => Some((vector(b, q)?, vector(b, k)?)),
            None => None,
        };
        let sinks = self.sinks.as_ref().map(|sinks| vector(b, sinks)).transpose()?;
        let width = self.shape.qkv_width();
        let (mut results, mut start) = (Vec::new(), 0);
        for step in &self.steps {
            let rows = &self.qkv[start * width..(start + step.rows()) * width];
            start += step.rows();
            let mut qkv = upload(b, (rows, width))?;
            let mut out = b.tensor(step.rows(), self.shape.out_width())?;
            b.begin(step)?;
            let norm = norm.as_ref().map(|(q, k)| QkNorm { q, k, eps: 1e-6 });
            b.rope_and_cache(&mut qkv, &self.shape, norm, 1, &mut cache)?;
            let options =
                AttentionOptions { window: self.window, sinks: sinks.as_ref(), ..Default::default() };
            b.attention(&qkv, &self.shape, options, 1, &cache, &mut out)?;
            results.extend(b.to_host(&qkv)?);
            results.extend(b.to_host(&out)?);
        }
        Ok(results)
    }
}

#[test]
fn rope_and_attention_agree_over_shapes_chunks_and_pieces() -> Result<()> {
    let mut random = Random(5);
    let shapes = [(1, 1, 2), (4, 2, 8), (3, 1, 16), (14, 2, 64), (9, 3, 40), (5, 5, 24), (10, 1, 80)];
    for (i, (heads, kv_heads, head_dim)) in shapes.into_iter().enumerate() {
        let shape = AttentionShape { heads, kv_heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt() };
        let pairing = [RopePairing::Halves, RopePairing::Interleaved][i % 2];
        let case = AttentionCase::random(&mut random, shape, i % 3 == 1, pairing, 2.0);
        let expected = case.run(&mut Reference::new())?;
        let what = format!("{shape:?}");
        assert_close(&case.run(&mut cpu(2))?, &expected, 3e-5, &what);
        assert_close(&case.run(&mut Cpu::new(2, KvDType::F16))?, &expected, 1e-2, &what);
        assert_close(&case.run(&mut Cpu::new(2, KvDType::BF16))?, &expected, 5e-2, &what);
    }
    Ok(())
}

#[test]
fn sliding_windows_and_sinks_agree() -> Result<()> {
    let mut random = Random(11);
    let windows = [None, Some(1), Some(5), Some(16), Some(130), Some(511), Some(513), Some(5000)];
    for (i, window) in windows.into_iter().enumerate() {
        let (heads, kv_heads, head_dim) = [(8, 1, 16), (3, 3, 24), (6, 2, 64)][i % 3];
        let shape = AttentionShape { heads, kv_heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt() };
        let mut case = AttentionCase::random(&mut random, shape, false, RopePairing::Halves, 2.0);
        case.window = window;
        for sinks in
            [None, Some(random.vec(heads, 4.0)), Some([-1e30, 60.0, 1e30].repeat(heads)[..heads].to_vec())]
        {
            case.sinks = sinks;
            let expected = case.run(&mut Reference::new())?;
            assert!(expected.iter().all(|x| x.is_finite()));
            let what = format!("window {window:?}, sinks {:?}", case.sinks);
            assert_close(&case.run(&mut cpu(2))?, &expected, 3e-5, &what);
            assert_close(&case.run(&mut Cpu::new(3, KvDType::F16))?, &expected, 1e-2, &what);
            assert_close(&case.run(&mut Cpu::new(3, KvDType::BF16))?, &expected, 5e-2, &what);
        }
    }
    Ok(())
}

#[test]
fn attention_agrees_when_scores_are_extreme() -> Result<()> {
    let mut random = Random(6);
    let shape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 16, scale: 1.0 };
    for scale in [1e-20, 1e8] {
        let mut case = AttentionCase::random(&mut random, shape, false, RopePairing::Halves, scale);
        // No rotation: f32 angles alone would move products of 1e16 by more than their gaps.
        case.rope.inv_freq.fill(0.0);
        let (found, expected) = (case.run(&mut cpu(2))?, case.run(&mut Reference::new())?);
        assert!(expected.iter().all(|x| x.is_finite()));
        assert_close(&found, &expected, 1e-4, &format!("scale {scale}"));
    }
    Ok(())
}

/// Random experts as raw tensors: gates, ups and downs.
fn experts(random: &mut Random, n: usize, hidden: usize, intermediate: usize) -> [Vec<RawTensor>; 3] {
    [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)].map(|(rows, width)| {
        (0..n).map(|i| matrix(&format!("expert {i}"), rows, &random.vec(rows * width, 0.5))).collect()
    })
}

#[test]
fn moe_agrees_for_every_top_k_and_ties_go_to_the_lower_expert() -> Result<()> {
    let mut random = Random(7);
    for (n, rows) in [(1, 1), (4, 9), (19, 30)] {
        let stack = experts(&mut random, n, 24, 40);
        let x = random.vec(rows * 24, 1.0);
        let mut logits = random.vec(rows * n, 3.0);
        logits[..n].fill(0.25);
        for top_k in [1, 2, 8, 19].into_iter().filter(|&k| k <= n) {
            for renormalise in [false, true] {
                let (ours, theirs) =
                    both!(cpu(2), |b: &mut _| run_moe(b, (&x, 24), (&logits, n), &stack, top_k, renormalise));
                assert_close(&ours?, &theirs?, 1e-5, &format!("{top_k} of {n}"));
            }
        }
    }
    Ok(())
}

#[test]
fn biased_experts_with_a_clamped_gate_agree() -> Result<()> {
    let mut random = Random(12);
    let (n, rows, hidden, intermediate) = (5, 9, 64, 32);
    // Numbers on both sides of the limit.
    let activation = Activation::ClampedSwiglu { alpha: 1.702, limit: 1.0 };
    for (dtype, tolerance) in [(DType::F32, 2e-5), (DType::MXFP4, 0.05)] {
        let mut stack = |shape: [usize; 2]| -> Vec<RawTensor> {
            (0..n).map(|_| stored(&mut random, dtype, shape.to_vec())).collect()
        };
        let (gate, up) = (stack([intermediate, hidden]), stack([intermediate, hidden]));
        let down = stack([hidden, intermediate]);
        let biases = [intermediate, intermediate, hidden].map(|len| -> Vec<RawTensor> {
            (0..n).map(|_| RawTensor::from_f32("bias", vec![len], &random.vec(len, 1.0))).collect()
        });
        let biases = Some(biases.each_ref().map(Vec::as_slice));
        let weights = ExpertWeights { gate: &gate, up: &up, down: &down, biases, activation };
        let (x, logits) = (random.vec(rows * hidden, 1.0), random.vec(rows * n, 3.0));
        let (ours, theirs) =
            both!(cpu(2), |b: &mut _| run_experts(b, (&x, hidden), (&logits, n), &weights, 2, true));
        assert_close(&ours?, &theirs?, tolerance, &format!("{dtype:?}"));
        let plain = ExpertWeights { biases: None, ..weights };
        let (ours, theirs) =
            both!(cpu(2), |b: &mut _| run_experts(b, (&x, hidden), (&logits, n), &plain, 2, true));
        assert_close(&ours?, &theirs?, tolerance, &format!("{dtype:?}, no biases"));
    }
    Ok(())
}

#[test]
fn a_row_of_nan_harms_no_other_row() -> Result<()> {
    let mut random = Random(8);
    let stack = experts(&mut random, 5, 24, 40);
    let (mut x, mut logits) = (random.vec(3 * 24, 1.0), random.vec(3 * 5, 1.0));
    let clean = run_moe(&mut cpu(1), (&x, 24), (&logits, 5), &stack, 2, true)?;
    x[24..48].fill(f32::NAN);
    logits[5..10].fill(f32::NAN);
    let found = run_moe(&mut cpu(1), (&x, 24), (&logits, 5), &stack, 2, true)?;
    assert!(found[24..48].iter().all(|x| x.is_nan()));
    assert_eq!((&found[..24], &found[48..]), (&clean[..24], &clean[48..]));
    Ok(())
}

#[test]
fn gather_takes_the_wanted_rows_and_adds_the_residual() -> Result<()> {
    let mut random = Random(9);
    let (x, delta) = (random.vec(7 * 33, 1.0), random.vec(7 * 33, 1.0));
    fn run<B: Backend>(b: &mut B, x: Rows, delta: Option<Rows>) -> Result<Vec<f32>> {
        let x = upload(b, x)?;
        let delta = delta.map(|d| upload(b, d)).transpose()?;
        let mut batch = Batch::default();
        batch.push(&[0; 4], 0, &[0], 2);
        batch.push(&[0; 3], 5, &[1], 1);
        b.begin(&batch)?;
        let mut out = b.tensor(3, 33)?;
        b.gather(&x, delta.as_ref(), &mut out)?;
        b.to_host(&out)
    }
    for delta in [None, Some((delta.as_slice(), 33))] {
        let (ours, theirs) = both!(cpu(2), |b: &mut _| run(b, (&x, 33), delta));
        let ours = ours?;
        assert_eq!(ours, theirs?);
        assert_eq!(ours.len(), 3 * 33);
    }
    Ok(())
}

#[test]
fn sampling_is_the_same_on_any_number_of_threads_and_a_bad_row_is_alone() -> Result<()> {
    let mut random = Random(10);
    let vocab = 1003;
    let mut logits = random.vec(9 * vocab, 5.0);
    logits[4 * vocab + 17] = f32::NAN;
    let params: Vec<SamplingParams> = (0..9)
        .map(|i| SamplingParams {
            temperature: i as f32 * 0.4,
            top_p: 1.0 - i as f32 * 0.05,
            seed: i,
            logprobs: (i % 2 == 0).then_some(3),
            logit_bias: vec![LogitBias { token: i as u32, bias: 4.0 }],
            ..Default::default()
        })
        .collect();
    let row =
        |params| SampleRow { params, counts: None, drafted: &[], position: 12, mask: None, forced: None };
    let rows: Vec<SampleRow> = params.iter().map(row).collect();
    fn run<B: Backend>(b: &mut B, logits: Rows, rows: &[SampleRow]) -> Result<Vec<Sampled>> {
        let mut logits = upload(b, logits)?;
        let mut out = vec![Sampled::default(); 77]; // what is left from an earlier step
        b.sample(&mut logits, rows, &mut out)?;
        Ok(out)
    }
    let expected = run(&mut Reference::new(), (&logits, vocab), &rows)?;
    let faults: Vec<usize> = (0..9).filter(|&i| expected[i].fault.is_some()).collect();
    assert_eq!(faults, [4]);
    for threads in [1, 2, 3, 12] {
        assert_eq!(run(&mut cpu(threads), (&logits, vocab), &rows)?, expected);
    }
    assert!(run(&mut cpu(1), (&logits, vocab), &rows[1..]).is_err());
    Ok(())
}

#[test]
fn weights_of_wrong_shape_are_refused_by_name() {
    fn refusals<B: Backend>(b: &mut B) -> Vec<Option<OpError>> {
        let raw = |name: &str, shape: &[usize]| {
            RawTensor::from_f32(name, shape.to_vec(), &vec![0.0; shape.iter().product()])
        };
        let good = [raw("good", &[6, 8])];
        vec![
            b.load_matrix(&[raw("good", &[6, 8]), raw("bad", &[6, 9])]).err(),
            b.load_matrix(&[raw("bad", &[8])]).err(),
            b.load_matrix(&[raw("bad", &[2, 3, 4])]).err(),
            b.load_embedding(&raw("bad", &[8])).err(),
            b.load_vector(&[raw("good", &[8]), raw("bad", &[8, 1])]).err(),
            b.load_experts(&ExpertWeights::plain(&good, &[raw("bad", &[6, 7])], &[raw("good", &[8, 6])]))
                .err(),
            b.load_experts(&ExpertWeights::plain(&good, &good, &[raw("bad", &[6, 8])])).err(),
        ]
    }
    for error in refusals(&mut cpu(1)).into_iter().chain(refusals(&mut Reference::new())) {
        assert!(matches!(&error, Some(OpError::Shape { name, .. }) if name == "bad"), "{error:?}");
    }
}

#[test]
fn steps_that_do_not_fit_are_errors() -> Result<()> {
    let mut b = cpu(1);
    let shape = AttentionShape { heads: 2, kv_heads: 1, head_dim: 4, scale: 1.0 };
    let table = b.load_embedding(&RawTensor::from_f32("table", vec![3, 16], &[0.5; 48]))?;
    let mut cache = b.kv_cache(2, &shape, 4)?;
    let (mut qkv, mut out) = (b.tensor(2, 16)?, b.tensor(2, 8)?);
    let mut step = |b: &mut Cpu, tokens: &[u32], block, layer| {
        let mut batch = Batch::default();
        batch.push(tokens, 0, &[block], 1);
        b.begin(&batch)?;
        b.embed(&table, &mut qkv)?;
        b.rope_and_cache(&mut qkv, &shape, None, layer, &mut cache)?;
        b.attention(&qkv, &shape, AttentionOptions::default(), layer, &cache, &mut out)
    };
    assert!(step(&mut b, &[0], 0, 0).is_err_and(|e| e.to_string().contains("rope")));
    b.load_rope(&Rope { inv_freq: vec![1.0, 0.1], pairing: RopePairing::Halves }, 16)?;
    assert!(step(&mut b, &[0, 3], 0, 0).is_err_and(|e| e.to_string().contains("token 3")));
    assert!(step(&mut b, &[0; 3], 0, 0).is_err_and(|e| e.to_string().contains("3 rows")));
    assert!(step(&mut b, &[0], 4, 0).is_err_and(|e| e.to_string().contains("KV block 4")));
    assert!(step(&mut b, &[0], 0, 2).is_err_and(|e| e.to_string().contains("layer 2")));
    step(&mut b, &[0, 2], 3, 1)?;
    let mut batch = plain_batch(2);
    batch.spans[0].context = 40;
    assert!(b.begin(&batch).is_err());
    let mut batch = plain_batch(2);
    batch.spans.push(batch.spans[0]);
    assert!(b.begin(&batch).is_err_and(|e| e.to_string().contains("bad Span")));
    for outputs in [vec![2], vec![1, 0], vec![0, 0]] {
        let batch = Batch { outputs, ..plain_batch(2) };
        assert!(b.begin(&batch).is_err_and(|e| e.to_string().contains("outputs")));
    }
    assert!(b.kv_cache(usize::MAX / 2, &shape, 64).is_err());
    assert!(b.kv_cache(1 << 20, &shape, 1 << 40).is_err());
    Ok(())
}
