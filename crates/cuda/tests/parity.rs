//! The cuda backend against the reference: every op on random shapes, odd sizes and extreme values, on a GPU or on the CPU in
//! its place.
//!
//! Tolerances are those of bf16: one rounding is off by at most 1/256 of the value, a little less on average. Inputs are exact
//! in bf16 where that makes the comparison sharper.

mod common;
#[path = "../../ops/tests/support/mod.rs"]
mod support;

use common::{cuda, large, on_gpu};
use half::{bf16, f16};
use rudder_comm::Group;
use rudder_cuda::{Cuda, KvDType, PeerAccess, PrefillKernel, SharedPrefixes};
use rudder_ops::reference::Reference;
use rudder_ops::{
    Activation, AttentionOptions, AttentionShape, Backend, Batch, DType, ExpertWeights, LogitBias, OpError,
    QkNorm, RawTensor, Result, Rope, RopePairing, SampleRow, Sampled, SamplingParams, TokenCounts, fp8, int4,
    mxfp4,
};
use std::sync::{Arc, Barrier};
use support::{Random, Rows, assert_close, matrix, plain_batch, run_experts, run_moe, upload, vector};

/// Largest relative error of one rounding to bf16.
const BF16: f32 = 1.0 / 256.0;

#[test]
fn rms_norm_agrees_with_and_without_residual() -> Result<()> {
    let Some(mut cuda) = cuda() else { return Ok(()) };
    let mut random = Random(1);
    for width in [1, 7, 31, 64, 65, 896, 1537, 4096, 9000] {
        for (rows, scale) in [(1, 1.0), (3, 1e-18), (7, 1e15)] {
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
                let [sum, out] = run(&mut cuda, (&x, width), delta, &weight)?;
                let [expected_sum, expected] = run(&mut Reference::new(), (&x, width), delta, &weight)?;
                assert_eq!(sum, expected_sum, "the residual stream");
                assert_close(&out, &expected, BF16, 1e-30, &format!("width {width}, scale {scale}"));
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
    let Some(mut cuda) = cuda() else { return Ok(()) };
    let mut random = Random(2);
    for width in [1, 5, 16, 33, 200, 4864] {
        let x = random.vec(3 * 2 * width, 20.0);
        let (ours, theirs) = (
            run_silu_mul(&mut cuda, (&x, 2 * width))?,
            run_silu_mul(&mut Reference::new(), (&x, 2 * width))?,
        );
        assert_close(&ours, &theirs, BF16, 1e-6, &format!("width {width}"));
    }
    let extremes = [-1e30, -100.0, -88.1, 0.0, 88.1, 1e30, f32::INFINITY, f32::NAN];
    let x: Vec<f32> = extremes.into_iter().chain([0.5; 8]).collect();
    let (ours, theirs) = (run_silu_mul(&mut cuda, (&x, 16))?, run_silu_mul(&mut Reference::new(), (&x, 16))?);
    assert_close(&ours, &theirs, BF16, 1e-6, "extremes");
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
        other => unreachable!("no test data for {other:?}"),
    };
    RawTensor::new("stored", shape, dtype, Arc::new(bytes), 0).expect("whole blocks")
}

#[test]
fn embed_and_vectors_widen_every_kind_of_format() -> Result<()> {
    let Some(mut cuda) = cuda() else { return Ok(()) };
    let mut random = Random(3);
    for dtype in [DType::F32, DType::F16, DType::BF16, DType::Q8_0] {
        let table = stored(&mut random, dtype, vec![50, 96]);
        let parts = [stored(&mut random, dtype, vec![64]), stored(&mut random, dtype, vec![32])];
        fn run<B: Backend>(b: &mut B, table: &RawTensor, parts: &[RawTensor]) -> Result<[Vec<f32>; 2]> {
            let (table, weight) = (b.load_embedding(table)?, b.load_vector(parts)?);
            let mut batch = Batch::default();
            batch.push(&[3, 49, 0, 3], 0, &[0], 0);
            b.begin(&batch)?;
            let (mut x, mut out) = (b.tensor(9, 96)?, b.tensor(9, 96)?);
            b.embed(&table, &mut x)?;
            b.rms_norm(&mut x, None, &weight, 1e-5, &mut out)?;
            Ok([b.to_host(&x)?, b.to_host(&out)?])
        }
        let ours = run(&mut cuda, &table, &parts)?;
        let theirs = run(&mut Reference::new(), &table, &parts)?;
        let exact = matches!(dtype, DType::F32 | DType::BF16);
        assert_close(&ours[0], &theirs[0], if exact { 0.0 } else { BF16 }, 0.0, &format!("{dtype:?}"));
        assert_close(&ours[1], &theirs[1], 4.0 * BF16, 1e-6, &format!("{dtype:?}, normed"));
    }
    Ok(())
}

fn run_linear<B: Backend>(b: &mut B, x: Rows, parts: &[RawTensor], bias: Option<&[f32]>) -> Result<Vec<f32>> {
    let (rows, n) = (x.0.len() / x.1, parts.iter().map(|part| part.shape[0]).sum());
    let (x, w) = (upload(b, x)?, b.load_matrix(parts)?);
    let bias = bias.map(|bias| vector(b, bias)).transpose()?;
    let mut out = b.tensor(rows, n)?;
    b.linear(&x, &w, bias.as_ref(), &mut out)?;
    b.to_host(&out)
}

/// Which of two bounds holds. Emulated kernels add up in f32 and are given small shapes alone; a GPU may add up with fewer bits, and is given
/// large shapes.
fn bound(cuda: &Cuda, emulated: f32, gpu: f32) -> f32 {
    if on_gpu(cuda) { gpu } else { emulated }
}

/// The least number that a tolerance is of, where what sums are made of was rounded: such roundings are as large in small sums as in others.
/// In large shapes that is what the sums are about.
fn floor(cuda: &Cuda, sums: &[f32]) -> f32 {
    let squares: f64 = sums.iter().map(|x| f64::from(*x).powi(2)).sum();
    bound(cuda, 1.0, (squares / sums.len() as f64).sqrt().max(1.0) as f32)
}

/// Every kernel that multiplies, at its bounds: rows 8, 16 and a tile's 128; 16 features and a tile's; rows of weights that are
/// shorter than a step of 64 and longer than eight warps' 512.
#[test]
fn linear_agrees_at_the_bounds_of_every_kernel() -> Result<()> {
    let Some(mut cuda) = cuda() else { return Ok(()) };
    let mut random = Random(4);
    let mut shapes = vec![
        (1, 1, 1),
        (1, 200, 64),
        (3, 33, 700),
        (8, 16, 65),
        (9, 17, 128),
        (16, 130, 63),
        (17, 40, 200),
        (40, 129, 100),
        (65, 33, 128),
        (128, 128, 64),
        (131, 150, 260),
        (70, 129, 600),
    ];
    if large(&cuda) {
        shapes.extend([
            (1, 4096, 14336),
            (7, 151_936, 896),
            (16, 6144, 4096),
            (64, 6144, 4096),
            (1000, 1537, 4864),
        ]);
    }
    for (rows, n, k) in shapes {
        let (x, w) = (random.exact(rows * k, 1.0), random.exact(n * k, 1.0));
        let bias = random.vec(n, 1.0);
        let parts = [matrix("w", n, &w)];
        for (i, kernel) in kernels(&mut cuda, rows).into_iter().enumerate() {
            let bias = (i % 2 == 0).then_some(bias.as_slice());
            cuda.set_prefill_kernel(kernel)?;
            let ours = run_linear(&mut cuda, (&x, k), &parts, bias)?;
            let theirs = run_linear(&mut Reference::new(), (&x, k), &parts, bias)?;
            // Sums of k products, in another order, in f32.
            let what = format!("{rows} rows, [{n}, {k}], {kernel:?}");
            assert_close(&ours, &theirs, 4e-7 * k as f32, 1.0, &what);
        }
    }
    Ok(())
}

#[test]
fn linear_agrees_for_stacked_parts_of_several_formats() -> Result<()> {
    let Some(mut cuda) = cuda() else { return Ok(()) };
    let mut random = Random(5);
    for dtype in [DType::F32, DType::F16, DType::BF16, DType::Q8_0] {
        for rows in [1, 40] {
            let parts =
                [stored(&mut random, dtype, vec![19, 96]), stored(&mut random, DType::F32, vec![5, 96])];
            let x = random.vec(rows * 96, 1.0);
            let ours = run_linear(&mut cuda, (&x, 96), &parts, None)?;
            let theirs = run_linear(&mut Reference::new(), (&x, 96), &parts, None)?;
            // 96 products of two rounded values below 1.
            assert_close(&ours, &theirs, 0.05, 1.0, &format!("{dtype:?}, {rows} rows"));
        }
    }
    Ok(())
}

/// Which parts of a matrix of FP8 have a scale.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Scales {
    Rows,
    Blocks(usize),
}

/// A matrix of FP8 of either sign and any exponent, numbers up to about 1.
fn fp8_matrix(random: &mut Random, name: &str, [n, k]: [usize; 2], scales: Scales) -> RawTensor {
    let mut bytes = Vec::new();
    for _ in 0..n {
        let mut scale = 0.0f32;
        for block in 0..k / 64 {
            let begins = match scales {
                Scales::Rows => block == 0,
                Scales::Blocks(width) => block % (width / 64) == 0,
            };
            if begins {
                scale = (1.0 + random.below(7) as f32 / 8.0) / 900.0;
            }
            bytes.extend(scale.to_le_bytes());
            bytes.extend(
                (0..64).map(|_| random.next() as u8).map(|b| if b & 0x7f == 0x7f { b ^ 1 } else { b }),
            );
        }
    }
    RawTensor::new(name, vec![n, k], DType::F8_E4M3, Arc::new(bytes), 0).expect("whole blocks")
}

/// What the device has to multiply so many rows with: from 17 to 511 rows the plain kernel and those made for a GPU.
fn kernels(cuda: &mut Cuda, rows: usize) -> Vec<PrefillKernel> {
    let all = [PrefillKernel::Auto, PrefillKernel::Mma, PrefillKernel::Tcgen05];
    let count = if (17..512).contains(&rows) { all.len() } else { 1 };
    all[..count].iter().copied().filter(|kernel| cuda.set_prefill_kernel(*kernel).is_ok()).collect()
}

/// The kernels for few rows, tiles of rows and features, and from 512 rows on the product of what is widened, in several slices.
#[test]
fn linear_of_fp8_agrees_at_the_bounds_of_every_kernel() -> Result<()> {
    let Some(mut cuda) = cuda() else { return Ok(()) };
    let mut random = Random(17);
    let mut shapes = vec![
        (1, 1, 64),
        (3, 33, 192),
        (8, 16, 1088),
        (9, 17, 320),
        (16, 130, 2112),
        (17, 40, 192),
        (20, 129, 64),
        (33, 130, 704),
        (64, 129, 128),
        (65, 33, 128),
        (131, 150, 320),
        (513, 300, 192),
        (17, 40, 1280), // long k is taken in parts
        (70, 129, 960),
    ];
    if large(&cuda) {
        shapes.extend([(1, 28672, 4096), (16, 4096, 14336), (100, 6144, 4096), (1000, 12288, 4096)]);
    }
    for (i, (rows, n, k)) in shapes.into_iter().enumerate() {
        let scales = [Scales::Rows, Scales::Blocks(128), Scales::Blocks(64)][i % 3];
        let x = random.exact(rows * k, 1.0);
        let parts = match n {
            1 => vec![fp8_matrix(&mut random, "w", [n, k], scales)],
            _ => vec![
                fp8_matrix(&mut random, "first", [n / 2, k], Scales::Rows),
                fp8_matrix(&mut random, "second", [n - n / 2, k], scales),
            ],
        };
        let bias = random.vec(n, 1.0);
        let bias = (i % 2 == 0).then_some(bias.as_slice());
        let theirs = run_linear(&mut Reference::new(), (&x, k), &parts, bias)?;
        // Few rows read weights exactly, more read them rounded to bf16.
        let (tolerance, floor) =
            if rows <= 16 { (4e-7 * k as f32, 1.0) } else { (0.02, floor(&cuda, &theirs)) };
        for kernel in kernels(&mut cuda, rows) {
            cuda.set_prefill_kernel(kernel)?;
            let ours = run_linear(&mut cuda, (&x, k), &parts, bias)?;
            let what = format!("{rows} rows, [{n}, {k}], {scales:?}, {kernel:?}");
            assert_close(&ours, &theirs, tolerance, floor, &what);
        }
    }
    Ok(())
}

/// Numbers in blocks of 128 as FP8 holds them with a scale each: the nearest, ties to even.
fn rounded_to_fp8(x: &[f32], k: usize) -> Vec<f32> {
    let block = |block: &[f32]| {
        let most = block.iter().fold(0f32, |most, x| most.max(x.abs()));
        let (by, scale) = if most > 1e-30 { (448.0 / most, most / 448.0) } else { (0.0, 0.0) };
        block.iter().map(move |x| nearest_fp8(x * by) * scale).collect::<Vec<_>>()
    };
    x.chunks(k).flat_map(|row| row.chunks(128).flat_map(block)).collect()
}

/// What the device has to multiply rows with that are rounded.
fn rounding_kernels(cuda: &mut Cuda) -> Vec<PrefillKernel> {
    let mut all = vec![PrefillKernel::Auto, PrefillKernel::Tcgen05];
    all.retain(|kernel| cuda.set_prefill_kernel(*kernel).is_ok());
    all
}

/// Rows that bf16 holds, of which the first four have zeros, and small and large numbers, in their first halves.
fn of_many_magnitudes(random: &mut Random, [rows, k]: [usize; 2]) -> Vec<f32> {
    let mut x = random.exact(rows * k, 1.0);
    for (row, scale) in [0.0, 1e-32, 1e-20, 1e20].into_iter().enumerate() {
        x[row * k..][..k / 2].iter_mut().for_each(|x| *x = bf16::from_f32(*x * scale).to_f32());
    }
    x
}

/// Rows and weights both of FP8: tiles that are whole and not, blocks of 128 that are half there, rows of zeros and of large and small
/// numbers; and what the rounding of rows does to the result.
#[test]
fn products_of_fp8_agree_with_rows_that_are_rounded_before() -> Result<()> {
    let Some(mut cuda) = cuda() else { return Ok(()) };
    if cuda.set_fp8_products(true).is_err() {
        return Ok(());
    }
    let mut random = Random(27);
    let mut shapes = vec![(17, 1, 64), (128, 128, 128), (65, 40, 192), (130, 150, 320), (40, 200, 1280)];
    if large(&cuda) {
        shapes.extend([(1000, 6144, 4096), (4096, 4096, 14336)]);
    }
    for (i, (rows, n, k)) in shapes.into_iter().enumerate() {
        let scales = [Scales::Rows, Scales::Blocks(128)][i % 2];
        let x = of_many_magnitudes(&mut random, [rows, k]);
        let parts = [fp8_matrix(&mut random, "w", [n, k], scales)];
        let bias = random.vec(n, 1.0);
        let bias = (i % 2 == 0).then_some(bias.as_slice());
        let rounded = rounded_to_fp8(&x, k);
        let theirs = run_linear(&mut Reference::new(), (&rounded, k), &parts, bias)?;
        let exact = run_linear(&mut Reference::new(), (&x, k), &parts, bias)?;
        // Hopper adds up products of FP8, and what it has of their sum, with 13 bits behind the largest.
        let tolerance = bound(&cuda, 3e-6 * k as f32, 3e-4 * (k as f32).sqrt());
        for kernel in rounding_kernels(&mut cuda) {
            cuda.set_prefill_kernel(kernel)?;
            let ours = run_linear(&mut cuda, (&x, k), &parts, bias)?;
            let what = format!("{rows} rows, [{n}, {k}], {scales:?}, {kernel:?}");
            for (row, (ours, theirs)) in ours.chunks(n).zip(theirs.chunks(n)).enumerate() {
                let floor = if row == 3 { 1e20 } else { 1.0 };
                assert_close(ours, theirs, tolerance, floor, &format!("{what}, row {row}"));
            }
            // Half a unit of four bits, of each of k numbers below 1 times weights below 1.
            assert_close(&ours[4 * n..], &exact[4 * n..], 0.05 * (k as f32).sqrt(), 1.0, &what);
        }
    }
    Ok(())
}

/// Numbers in blocks of 32 as MXFP8 holds them: with the smallest power of two as a scale by which none is larger than 448.
fn rounded_to_mxfp8(x: &[f32], k: usize) -> Vec<f32> {
    let block = |block: &[f32]| {
        let least = block.iter().fold(0f32, |most, x| most.max(x.abs())) / 448.0;
        let exponents = (-110..=127).map(|e| 2f32.powi(e));
        let scale = exponents.into_iter().find(|scale| *scale >= least).expect("numbers of f32");
        let zero = 448.0 * least <= 1e-30;
        block.iter().map(move |x| if zero { 0.0 } else { nearest_fp8(x / scale) * scale }).collect::<Vec<_>>()
    };
    x.chunks(k).flat_map(|row| row.chunks(32).flat_map(block)).collect()
}

/// Rows that become MXFP8 for weights of MXFP4: tiles that are whole and not, steps of 128 that are half there, blocks of zeros and of large and small
/// numbers beside others; and what the rounding does to the result.
#[test]
fn products_of_mxfp4_agree_with_rows_that_are_rounded_before() -> Result<()> {
    let Some(mut cuda) = cuda() else { return Ok(()) };
    if cuda.set_prefill_kernel(PrefillKernel::Tcgen05).is_err() {
        return Ok(());
    }
    cuda.set_fp8_products(true)?;
    let mut random = Random(35);
    let mut shapes = vec![(17, 1, 64), (128, 128, 128), (65, 40, 192), (130, 150, 320), (40, 200, 1280)];
    if large(&cuda) {
        shapes.extend([(1000, 6144, 4096), (4096, 2880, 2880)]);
    }
    for (i, (rows, n, k)) in shapes.into_iter().enumerate() {
        let x = of_many_magnitudes(&mut random, [rows, k]);
        let parts = [quantised(&mut random, [n, k])];
        let bias = random.vec(n, 1.0);
        let bias = (i % 2 == 0).then_some(bias.as_slice());
        let ours = run_linear(&mut cuda, (&x, k), &parts, bias)?;
        let rounded = rounded_to_mxfp8(&x, k);
        let theirs = run_linear(&mut Reference::new(), (&rounded, k), &parts, bias)?;
        let what = format!("{rows} rows, [{n}, {k}]");
        for (row, (ours, theirs)) in ours.chunks(n).zip(theirs.chunks(n)).enumerate() {
            let floor = if row == 3 { 1e20 } else { 1.0 };
            assert_close(ours, theirs, 3e-6 * k as f32, floor, &format!("{what}, row {row}"));
        }
        let exact = run_linear(&mut Reference::new(), (&x, k), &parts, bias)?;
        // Half a unit of four bits, of each of k numbers below 1 times weights of 1 at most.
        assert_close(&ours[4 * n..], &exact[4 * n..], 0.06 * (k as f32).sqrt(), 1.0, &what);
        assert!(ours[4 * n..] != exact[4 * n..]);
    }
    Ok(())
}

/// The magnitudes of E2M1.
const E2M1: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// Numbers as NVFP4 holds them: of 16 the largest becomes about 6 by a scale of FP8, of which the largest of a row is 448 by its factor.
fn rounded_to_nvfp4(x: &[f32], k: usize) -> Vec<f32> {
    let largest = |x: &[f32]| x.iter().fold(0f32, |most, x| most.max(x.abs()));
    let row = |row: &[f32]| {
        let most = largest(row);
        let (factor, to_scale) = if most > 1e-30 { (most / 2688.0, 448.0 / most) } else { (0.0, 0.0) };
        let block = |block: &[f32]| {
            let unit = nearest_fp8(largest(block) * to_scale) * factor;
            let by = if unit > 0.0 { 1.0 / unit } else { 0.0 };
            block.iter().map(|x| nearest(&E2M1, x * by) * unit).collect::<Vec<_>>()
        };
        row.chunks(16).flat_map(block).collect::<Vec<_>>()
    };
    x.chunks(k).flat_map(row).collect()
}

/// Rows that become NVFP4 for weights of NVFP4: tiles that are whole and not, steps of 256 that are in part there, blocks of zeros and of large and small
/// numbers beside others; and what the rounding does to the result.
#[test]
fn products_of_nvfp4_agree_with_rows_that_are_rounded_before() -> Result<()> {
    let Some(mut cuda) = rounding_to_nvfp4() else { return Ok(()) };
    let mut random = Random(37);
    let mut shapes =
        vec![(17, 2, 64), (128, 128, 256), (65, 40, 192), (130, 150, 320), (40, 200, 1280), (33, 20, 4160)];
    if large(&cuda) {
        shapes.extend([(1000, 6144, 4096), (4096, 4096, 14336)]);
    }
    for (i, (rows, n, k)) in shapes.into_iter().enumerate() {
        let x = of_many_magnitudes(&mut random, [rows, k]);
        let parts = [n / 2, n - n / 2].map(|n| nvfp4_matrix(&mut random, "part", [n, k]));
        let bias = random.vec(n, 1.0);
        let bias = (i % 2 == 0).then_some(bias.as_slice());
        let exact = run_linear(&mut Reference::new(), (&x, k), &parts, bias)?;
        let rounded = rounded_to_nvfp4(&x, k);
        let theirs = run_linear(&mut Reference::new(), (&rounded, k), &parts, bias)?;
        let what = format!("{rows} rows, [{n}, {k}]");
        let ours = run_linear(&mut cuda, (&x, k), &parts, bias)?;
        for (row, (ours, theirs)) in ours.chunks(n).zip(theirs.chunks(n)).enumerate() {
            let floor = if row == 3 { 1e20 } else { 1.0 };
            assert_close(ours, theirs, 3e-6 * k as f32, floor, &format!("{what}, row {row}"));
        }
        // Less than a unit of three bits, of each of k numbers below 1 times weights below 1.3.
        assert_close(&ours[4 * n..], &exact[4 * n..], 0.1 * (k as f32).sqrt(), 1.0, &what);
    }
    Ok(())
}

/// Products of FP8 alone leave them as they are.
#[test]
fn rows_become_nvfp4_only_where_it_was_asked_for() -> Result<()> {
    let Some(mut cuda) = rounding_to_nvfp4() else { return Ok(()) };
    let mut random = Random(39);
    let (x, parts) = (random.exact(17 * 64, 1.0), [nvfp4_matrix(&mut random, "w", [24, 64])]);
    let exact = run_linear(&mut Reference::new(), (&x, 64), &parts, None)?;
    let mut off = |fp4: bool| -> Result<f32> {
        cuda.set_fp8_products(!fp4)?;
        cuda.set_fp4_products(fp4)?;
        let found = run_linear(&mut cuda, (&x, 64), &parts, None)?;
        Ok(found.iter().zip(&exact).fold(0f32, |most, (x, y)| most.max((x - y).abs())))
    };
    assert!(off(false)? < 1e-4 && off(true)? > 0.01);
    Ok(())
}

/// A device that rounds rows for weights of NVFP4, if there is one.
fn rounding_to_nvfp4() -> Option<Cuda> {
    let mut cuda = cuda()?;
    cuda.set_prefill_kernel(PrefillKernel::Tcgen05).ok()?;
    cuda.set_fp4_products(true).ok()?;
    Some(cuda)
}

/// Rows times the unit matrix in NVFP4.
fn through_nvfp4(cuda: &mut Cuda, x: &[f32], k: usize) -> Result<Vec<f32>> {
    let block = |i: usize| {
        let (row, first) = (i / (k / 64), i % (k / 64) * 64);
        let codes = (0..32).map(move |pair| match row as i64 - (first + 2 * pair) as i64 {
            0 => 0x02,
            1 => 0x20,
            _ => 0,
        });
        1f32.to_le_bytes().into_iter().chain([0x38; 4]).chain(codes)
    };
    let bytes: Vec<u8> = (0..k * k / 64).flat_map(block).collect();
    let unit = RawTensor::new("unit", vec![k, k], DType::NVFP4, Arc::new(bytes), 0).expect("whole blocks");
    run_linear(cuda, (x, k), &[unit], None)
}

/// Every tie and what lies beside it, at scales of all magnitudes that a row's factor leaves; and what is too small beside the row's largest.
#[test]
fn rows_of_nvfp4_hold_the_nearest_numbers() -> Result<()> {
    let Some(mut cuda) = rounding_to_nvfp4() else { return Ok(()) };
    // The last is the largest of its block.
    let numbers =
        [0.0, 0.25, 0.26, 0.74, 0.75, -1.25, 1.26, -1.75, 2.5, 2.52, -3.48, 3.5, 5.0, -5.0, 5.1, 6.0];
    let nearest = [0.0, 0.0, 0.5, 0.5, 1.0, -1.0, 1.5, -2.0, 2.0, 3.0, -3.0, 4.0, 4.0, -4.0, 6.0, 6.0];
    let k = 320;
    let (mut x, mut expected) = (Vec::new(), Vec::new());
    for row in 0..20 {
        let factor = 2f32.powi(row - 10);
        for block in 0..k / 16 {
            // 448, which is what makes the factor, then from 256 down to less than half of the smallest number of FP8.
            let scale = if block == 0 { 448.0 } else { 2f32.powi(9 - block as i32) };
            let kept = if scale > 2f32.powi(-10) { scale } else { 0.0 };
            x.extend(numbers.map(|x| bf16::from_f32(x * scale * factor).to_f32()));
            expected.extend(nearest.map(|x| x * kept * factor));
        }
    }
    let found = through_nvfp4(&mut cuda, &x, k)?;
    assert!(found == expected, "{:?}", found.iter().zip(&expected).position(|(x, y)| x != y));
    Ok(())
}

/// What is no number, or infinite, makes its row so, whose place in a block it does not matter, and no other.
#[test]
fn what_is_no_number_in_rows_of_nvfp4_harms_no_other_row() -> Result<()> {
    let Some(mut cuda) = rounding_to_nvfp4() else { return Ok(()) };
    let k = 320;
    let mut x = Random(38).exact(20 * k, 1.0);
    let clean = through_nvfp4(&mut cuda, &x, k)?;
    (x[k + 7], x[3 * k + 300]) = (f32::NAN, f32::INFINITY);
    let found = through_nvfp4(&mut cuda, &x, k)?;
    for (row, (found, clean)) in found.chunks(k).zip(clean.chunks(k)).enumerate() {
        match row {
            1 | 3 => assert!(!found.iter().any(|x| x.is_finite()), "row {row}"),
            _ => assert!(found == clean, "row {row}"),
        }
    }
    Ok(())
}

/// A norm and a gate put out rows in FP8 beside bf16, which a product then reads: bit for bit what it makes of the same rows in bf16. Rows of one
/// turn of a block's threads, of several and of more than they hold; blocks of 128 that are half there; and what was written over since.
#[test]
fn norms_and_gates_round_to_fp8_as_is_done_after_them() -> Result<()> {
    let Some(mut cuda) = cuda() else { return Ok(()) };
    if cuda.set_fp8_products(true).is_err() {
        return Ok(());
    }
    let mut random = Random(29);
    for (rows, width) in [(16, 128), (17, 64), (20, 320), (131, 128), (18, 2240), (17, 8256)] {
        let w = cuda.load_matrix(&[fp8_matrix(&mut random, "w", [24, width], Scales::Rows)])?;
        let mut data = random.vec(2 * rows * width, 2.0);
        for (row, scale) in [0.0, 1e-32, 1e15].into_iter().enumerate() {
            data[row * 2 * width..][..width / 2].iter_mut().for_each(|x| *x *= scale);
        }
        let (mut x, gate_up) =
            (upload(&mut cuda, (&data[..rows * width], width))?, upload(&mut cuda, (&data, 2 * width))?);
        let delta = upload(&mut cuda, (&random.vec(rows * width, 2.0), width))?;
        let mut weight = vector(&mut cuda, &random.vec(width, 2.0))?;
        Cuda::norm_feeds(&mut weight, &w);
        let (mut made, mut out) = (cuda.tensor(rows, width)?, cuda.tensor(rows, 24)?);
        for what in ["norm", "residual and norm", "gate", "gathered"] {
            match what {
                "norm" => cuda.rms_norm(&mut x, None, &weight, 1e-6, &mut made)?,
                "residual and norm" => cuda.rms_norm(&mut x, Some(&delta), &weight, 1e-6, &mut made)?,
                "gate" => cuda.silu_mul(&gate_up, &mut made)?,
                _ => {
                    let mut other = cuda.tensor(rows, width)?;
                    cuda.rms_norm(&mut x, None, &weight, 1e-6, &mut other)?;
                    let mut batch = Batch::default();
                    batch.push(&vec![0; rows], 0, &[0; 9], rows);
                    cuda.begin(&batch)?;
                    cuda.gather(&other, None, &mut made)?;
                }
            }
            cuda.linear(&made, &w, None, &mut out)?;
            let found = cuda.to_host(&out)?;
            let plain = cuda.to_host(&made)?;
            let plain = upload(&mut cuda, (&plain, width))?;
            cuda.linear(&plain, &w, None, &mut out)?;
            assert!(bits(&found) == bits(&cuda.to_host(&out)?), "{what}, [{rows}, {width}]");
        }
    }
    Ok(())
}

/// Every number of the format, by itself, through every kernel, times a scale that bf16 holds.
#[test]
fn every_number_of_fp8_is_itself() -> Result<()> {
    let Some(mut cuda) = cuda() else { return Ok(()) };
    let codes: Vec<u8> = (0..=255).filter(|byte| byte & 0x7f != 0x7f).collect();
    let row = |code: &u8| [0.75f32.to_le_bytes().as_slice(), &[*code], &[0; 63]].concat();
    let bytes: Vec<u8> = codes.iter().flat_map(row).collect();
    let w = RawTensor::new("w", vec![254, 64], DType::F8_E4M3, Arc::new(bytes), 0).expect("whole blocks");
    for rows in [1, 16, 17, 600] {
        let x: Vec<f32> = (0..rows * 64).map(|i| f32::from(i % 64 == 0)).collect();
        let ours = run_linear(&mut cuda, (&x, 64), std::slice::from_ref(&w), None)?;
        let expected: Vec<f32> = codes.iter().map(|code| 0.75 * fp8::NUMBERS[usize::from(*code)]).collect();
        assert!(ours.chunks(254).all(|row| row == expected), "{rows} rows");
    }
    Ok(())
}

#[test]
fn fp8_that_is_no_number_is_refused_by_name() {
    let Some(mut cuda) = cuda() else { return };
    let mut random = Random(18);
    let good = fp8_matrix(&mut random, "good", [3, 64], Scales::Rows);
    let mut bytes = good.bytes().to_vec();
    bytes[68 + 10] = 0xff;
    let bad = RawTensor::new("bad", vec![3, 64], DType::F8_E4M3, Arc::new(bytes), 0).expect("whole blocks");
    let refusal = cuda.load_matrix(&[good, bad]).err().expect("refused").to_string();
    assert!(refusal.contains("tensor bad"), "{refusal}");
}

/// A matrix of four-bit integers from any zero point on, about `step` apart; `group` inputs have a scale and a zero point.
fn int4_matrix(random: &mut Random, [n, k]: [usize; 2], group: usize, step: f32) -> RawTensor {
    let mut bytes = Vec::new();
    for _ in 0..n {
        let mut word = [0; 4];
        for block in 0..k / 128 {
            if block % (group / 128) == 0 {
                let scale = bf16::from_f32((0.5 + random.below(7) as f32 / 8.0) * step).to_f32();
                word = int4::word(scale, random.below(17) as u8);
            }
            bytes.extend(word);
            bytes.extend((0..64).map(|_| random.next() as u8));
        }
    }
    RawTensor::new("w", vec![n, k], DType::INT4, Arc::new(bytes), 0).expect("whole blocks")
}

/// As of FP8: groups of 128, of 256 and of all inputs.
#[test]
fn linear_of_int4_agrees_at_the_bounds_of_every_kernel() -> Result<()> {
    let Some(mut cuda) = cuda() else { return Ok(()) };
    let mut random = Random(21);
    let mut shapes = vec![
        (1, 1, 128),
        (3, 33, 384),
        (8, 16, 1152),
        (9, 17, 256),
        (16, 130, 2176),
        (17, 40, 384),
        (20, 129, 896),
        (131, 150, 256),
        (513, 200, 256),
        (20, 40, 1408),
    ];
    if large(&cuda) {
        shapes.extend([(1, 28672, 4096), (16, 4096, 14336), (100, 6144, 4096), (1000, 12288, 4096)]);
    }
    for (i, (rows, n, k)) in shapes.into_iter().enumerate() {
        let group = [128, 256, k][i % 3];
        let (x, parts) = (random.exact(rows * k, 1.0), [int4_matrix(&mut random, [n, k], group, 0.03)]);
        let theirs = run_linear(&mut Reference::new(), (&x, k), &parts, None)?;
        let (tolerance, floor) =
            if rows <= 16 { (4e-7 * k as f32, 1.0) } else { (0.03, floor(&cuda, &theirs)) };
        for kernel in kernels(&mut cuda, rows) {
            cuda.set_prefill_kernel(kernel)?;
            let ours = run_linear(&mut cuda, (&x, k), &parts, None)?;
            let what = format!("{rows} rows, [{n}, {k}], groups of {group}, {kernel:?}");
            assert_close(&ours, &theirs, tolerance, floor, &what);
        }
    }
    Ok(())
}

/// A matrix of NVFP4, numbers up to about 1, scales of all magnitudes.
fn nvfp4_matrix(random: &mut Random, name: &str, [n, k]: [usize; 2]) -> RawTensor {
    let mut bytes = Vec::new();
    let factor = (1.0 + random.below(7) as f32 / 8.0) / 4000.0;
    for _ in 0..n * k / 64 {
        bytes.extend(factor.to_le_bytes());
        bytes.extend((0..4).map(|_| random.below(127) as u8));
        bytes.extend((0..32).map(|_| random.next() as u8));
    }
    RawTensor::new(name, vec![n, k], DType::NVFP4, Arc::new(bytes), 0).expect("whole blocks")
}

/// As of FP8; two parts have factors of their own.
#[test]
fn linear_of_nvfp4_agrees_at_the_bounds_of_every_kernel() -> Result<()> {
    let Some(mut cuda) = cuda() else { return Ok(()) };
    let mut random = Random(22);
    let mut shapes = vec![
        (1, 2, 64),
        (3, 33, 192),
        (8, 16, 1088),
        (16, 130, 320),
        (17, 40, 192),
        (20, 129, 64),
        (33, 130, 704),
        (131, 150, 320),
        (513, 200, 192),
        (20, 40, 1280),
    ];
    if large(&cuda) {
        shapes.extend([(1, 28672, 4096), (16, 4096, 14336), (100, 6144, 4096), (1000, 12288, 4096)]);
    }
    for (rows, n, k) in shapes {
        let x = random.exact(rows * k, 1.0);
        let parts = [n / 2, n - n / 2].map(|n| nvfp4_matrix(&mut random, "part", [n, k]));
        let bias = random.vec(n, 1.0);
        let theirs = run_linear(&mut Reference::new(), (&x, k), &parts, Some(&bias))?;
        // Numbers are exact up to 512 rows; from there on they are rounded with their factor.
        let (tolerance, floor) =
            if rows < 512 { (4e-7 * k as f32, 1.0) } else { (0.02, floor(&cuda, &theirs)) };
        for kernel in kernels(&mut cuda, rows) {
            cuda.set_prefill_kernel(kernel)?;
            let ours = run_linear(&mut cuda, (&x, k), &parts, Some(&bias))?;
            assert_close(&ours, &theirs, tolerance, floor, &format!("{rows} rows, [{n}, {k}], {kernel:?}"));
        }
    }
    Ok(())
}

#[test]
fn scales_of_nvfp4_that_are_no_positive_numbers_are_refused_by_name() {
    let Some(mut cuda) = cuda() else { return };
    let good = nvfp4_matrix(&mut Random(23), "good", [3, 128]);
    for (at, byte) in [(40 + 5, 0x7f), (4, 0x81), (80, good.bytes()[80] ^ 1)] {
        let mut bytes = good.bytes().to_vec();
        bytes[at] = byte;
        let bad =
            RawTensor::new("bad", vec![3, 128], DType::NVFP4, Arc::new(bytes), 0).expect("whole blocks");
        let refusal = cuda.load_matrix(&[good.clone(), bad]).err().expect("refused").to_string();
        assert!(refusal.contains("tensor bad"), "{refusal}");
    }
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
    /// Three sequences of up to `longest` tokens, which is more than 45; each step takes a random number of each one's next ones, the second takes few.
    fn random(
        random: &mut Random,
        shape: AttentionShape,
        norm: bool,
        pairing: RopePairing,
        scale: f32,
        longest: usize,
    ) -> Self {
        let inv_freq =
            (0..shape.head_dim / 2).map(|i| 10_000f32.powf(-2.0 * i as f32 / shape.head_dim as f32));
        let rope = Rope { inv_freq: inv_freq.collect(), pairing };
        let norm = norm.then(|| [random.vec(shape.head_dim, 2.0), random.vec(shape.head_dim, 2.0)]);
        let table = longest.div_ceil(16);
        let tables: [Vec<u32>; 3] =
            std::array::from_fn(|s| (0..table as u32).map(|i| i * 3 + s as u32).rev().collect());
        let mut computed = [0; 3];
        let mut steps = Vec::new();
        for most in [longest - 45, 1, 40, 1] {
            let mut batch = Batch::default();
            for (s, computed) in computed.iter_mut().enumerate() {
                let n = if s == 1 { 1 + random.below(3) } else { 1 + random.below(most) };
                batch.push(&vec![0; n], *computed, &tables[s], 0);
                *computed += n;
            }
            steps.push(batch);
        }
        let rows: usize = steps.iter().map(Batch::rows).sum();
        let qkv = random.exact(rows * shape.qkv_width(), scale);
        Self { shape, rope, norm, qkv, steps, blocks: 3 * table, window: None, sinks: None }
    }

    /// Rotated rows, and outputs, of every step, on layer 1 of 2.
    fn run<B: Backend>(&self, b: &mut B) -> Result<[Vec<f32>; 2]> {
        b.load_rope(&self.rope, 16 * self.blocks)?;
        let mut cache = b.kv_cache(2, &self.shape, self.blocks)?;
        let norm = match &self.norm {
            Some([q, k]) => Some((vector(b, q)?, vector(b, k)?)),
            None => None,
        };
        let sinks = self.sinks.as_ref().map(|sinks| vector(b, sinks)).transpose()?;
        let width = self.shape.qkv_width();
        let (mut results, mut start) = ([Vec::new(), Vec::new()], 0);
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
            results[0].extend(b.to_host(&qkv)?);
            results[1].extend(b.to_host(&out)?);
        }
        Ok(results)
    }
}

fn shape(heads: usize, kv_heads: usize, head_dim: usize) -> AttentionShape {
    AttentionShape { heads, kv_heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt() }
}

/// Head sizes with kernels of their own and without, groups of one to 20 heads (two fragments), contexts of several splits.
#[test]
fn rope_and_attention_agree_over_shapes_chunks_and_splits() -> Result<()> {
    let Some(mut cuda) = cuda() else { return Ok(()) };
    let mut random = Random(6);
    let mut cases = vec![
        (shape(1, 1, 2), 200),
        (shape(4, 2, 64), 600),
        (shape(2, 1, 64), 1200),
        (shape(14, 2, 64), 150),
        (shape(20, 1, 64), 80),
        (shape(3, 3, 96), 300),
        (shape(4, 1, 128), 300),
        (shape(2, 1, 256), 280),
        (shape(5, 5, 24), 90),
        (shape(3, 1, 80), 90),
        (shape(65, 1, 64), 60),
        (shape(1, 1, 512), 70),
    ];
    if large(&cuda) {
        cases.extend([(shape(32, 8, 128), 3000), (shape(14, 2, 64), 3000), (shape(64, 4, 128), 1500)]);
    }
    for (i, (shape, longest)) in cases.into_iter().enumerate() {
        let pairing = [RopePairing::Halves, RopePairing::Interleaved][i % 2];
        let case = AttentionCase::random(&mut random, shape, i % 3 == 1, pairing, 2.0, longest);
        let ([qkv, out], [expected_qkv, expected]) = (case.run(&mut cuda)?, case.run(&mut Reference::new())?);
        assert_close(&qkv, &expected_qkv, 3e-5, 1.0, &format!("{shape:?}, rotated"));
        // Keys, values and weights are rounded, then averaged; values are below 2.
        assert_close(&out, &expected, 0.02, 1.0, &format!("{shape:?}"));
    }
    Ok(())
}

/// Contexts of so many parts that a thread that adds them reads several times; what counts lies at both ends.
#[test]
fn contexts_of_many_splits_agree() -> Result<()> {
    let Some(mut cuda) = cuda() else { return Ok(()) };
    let mut random = Random(27);
    for (head_dim, context) in [(256, 9000), (96, 21_500), (64, 33_500)] {
        let mut case =
            AttentionCase::random(&mut random, shape(2, 1, head_dim), false, RopePairing::Halves, 2.0, 50);
        case.rope.inv_freq.fill(0.0);
        let (mut prompt, mut decode) = (Batch::default(), Batch::default());
        prompt.push(&[0; 16 * 24], 0, &(0..24).collect::<Vec<_>>(), 0);
        // Sixteen blocks again and again, and four of their own at the beginning and at the end.
        let blocks = context / 16 + 1;
        let mut table: Vec<u32> = (0..blocks as u32).map(|i| i % 16).collect();
        table[..4].copy_from_slice(&[16, 17, 18, 19]);
        table[blocks - 4..].copy_from_slice(&[20, 21, 22, 23]);
        decode.push(&[0], context - 1, &table, 0);
        case.steps = vec![prompt, decode];
        case.blocks = blocks;
        let width = case.shape.qkv_width();
        case.qkv = random.exact((16 * 24 + 1) * width, 2.0);
        // The keys of these eight are like the query of the last row's second head.
        let query = case.qkv[16 * 24 * width + head_dim..][..head_dim].to_vec();
        let share = 5.0 / (head_dim as f32).sqrt();
        for row in 16 * 16..16 * 24 {
            let key = &mut case.qkv[row * width + 2 * head_dim..][..head_dim];
            key.iter_mut().zip(&query).for_each(|(key, query)| *key = share * query);
        }
        let ([_, found], [_, expected]) = (case.run(&mut cuda)?, case.run(&mut Reference::new())?);
        assert_close(&found, &expected, 0.02, 1.0, &format!("heads of {head_dim}"));
    }
    Ok(())
}

/// Windows within a block, around a block's and a tile's and a split's size, and beyond all contexts; heads with kernels of their own
/// and without; groups of several rows a tile.
#[test]
fn sliding_windows_and_sinks_agree() -> Result<()> {
    let Some(mut cuda) = cuda() else { return Ok(()) };
    let mut random = Random(15);
    let mut cases = vec![
        (shape(8, 1, 64), 600, Some(1)),
        (shape(8, 1, 64), 600, Some(128)),
        (shape(4, 2, 64), 300, Some(17)),
        (shape(2, 1, 96), 600, Some(257)),
        (shape(2, 1, 128), 200, Some(64)),
        (shape(20, 1, 64), 100, Some(40)),
        (shape(3, 1, 24), 120, Some(33)),
        (shape(4, 2, 64), 600, Some(5000)),
        (shape(4, 2, 64), 600, None),
        (shape(3, 1, 24), 90, None),
    ];
    if large(&cuda) {
        cases.push((shape(64, 8, 64), 3000, Some(128)));
        cases.push((shape(64, 8, 64), 3000, Some(1000)));
    }
    for (shape, longest, window) in cases {
        let mut case = AttentionCase::random(&mut random, shape, false, RopePairing::Halves, 2.0, longest);
        case.window = window;
        let extremes = [-1e30, 60.0, 1e30].repeat(shape.heads)[..shape.heads].to_vec();
        for sinks in [None, Some(random.vec(shape.heads, 4.0)), Some(extremes)] {
            case.sinks = sinks;
            let ([_, found], [_, expected]) = (case.run(&mut cuda)?, case.run(&mut Reference::new())?);
            assert!(expected.iter().all(|x| x.is_finite()));
            assert_close(
                &found,
                &expected,
                0.02,
                1.0,
                &format!("{shape:?}, window {window:?}, {:?}", case.sinks),
            );
        }
    }
    Ok(())
}

#[test]
fn attention_agrees_when_scores_are_extreme() -> Result<()> {
    let Some(mut cuda) = cuda() else { return Ok(()) };
    let mut random = Random(7);
    for head_dim in [16, 64] {
        let shape = AttentionShape { heads: 4, kv_heads: 2, head_dim, scale: 1.0 };
        for scale in [1e-20, 1e8] {
            let mut case = AttentionCase::random(&mut random, shape, false, RopePairing::Halves, scale, 300);
            // No rotation: rounding angles alone would move products of 1e16 by more than their gaps.
            case.rope.inv_freq.fill(0.0);
            let ([_, found], [_, expected]) = (case.run(&mut cuda)?, case.run(&mut Reference::new())?);
            assert!(expected.iter().all(|x| x.is_finite()));
            assert_close(&found, &expected, 0.01, scale, &format!("scale {scale}, heads of {head_dim}"));
        }
    }
    Ok(())
}

/// Keys and values of FP8: such as the format holds give what bf16 gives, others what roundings of a sixteenth let expect.
#[test]
fn attention_over_fp8_agrees_with_and_without_roundings() -> Result<()> {
    let mut random = Random(19);
    let cases = [
        (shape(4, 2, 64), 600, None),
        (shape(2, 1, 96), 400, Some(257)),
        (shape(20, 1, 128), 100, Some(40)),
        (shape(2, 1, 256), 80, None),
        (shape(3, 1, 24), 90, None),
    ];
    for (shape, longest, window) in cases {
        let Some(cuda) = cuda() else { return Ok(()) };
        let mut cuda = cuda.with_kv_dtype(KvDType::Fp8);
        let mut case = AttentionCase::random(&mut random, shape, false, RopePairing::Halves, 2.0, longest);
        case.window = window;
        case.sinks = window.map(|_| random.vec(shape.heads, 4.0));
        let ([_, found], [_, expected]) = (case.run(&mut cuda)?, case.run(&mut Reference::new())?);
        assert_close(&found, &expected, 0.25, 1.0, &format!("{shape:?}, rounded"));
        // Four bits each, and no rotation.
        case.qkv.iter_mut().for_each(|x| *x = (*x * 7.5).round() / 8.0);
        case.rope.inv_freq.fill(0.0);
        let ([_, found], [_, expected]) = (case.run(&mut cuda)?, case.run(&mut Reference::new())?);
        assert_close(&found, &expected, 0.02, 1.0, &format!("{shape:?}, exact"));
    }
    Ok(())
}

/// Prompts by every kernel that the device has: tiles of one row and of all, groups of heads that do and do not fill a tile,
/// windows and sinks, contexts that end on a tile's bound and one before and behind it, bf16 and FP8.
#[test]
fn prompts_agree_by_every_kernel() -> Result<()> {
    let mut random = Random(26);
    let mut cases = vec![
        (shape(2, 1, 64), [127, 128, 129], None, KvDType::Bf16),
        (shape(3, 1, 96), [1, 43, 200], None, KvDType::Bf16),
        (shape(8, 2, 128), [16, 130, 33], Some(50), KvDType::Bf16),
        (shape(1, 1, 256), [64, 65, 131], None, KvDType::Bf16),
        (shape(20, 1, 64), [7, 6, 61], Some(17), KvDType::Fp8),
        (shape(1, 1, 96), [257, 2, 128], None, KvDType::Fp8),
        (shape(2, 2, 128), [129, 40, 3], None, KvDType::Fp8),
        (shape(2, 1, 256), [66, 5, 64], Some(64), KvDType::Fp8),
    ];
    if cuda().is_some_and(|cuda| large(&cuda)) {
        cases.push((shape(32, 8, 128), [3000, 517, 1], None, KvDType::Bf16));
        cases.push((shape(16, 2, 256), [1500, 700, 64], None, KvDType::Fp8));
    }
    for (shape, lengths, window, dtype) in cases {
        let longest = lengths.iter().max().expect("three") + 30;
        let mut case = AttentionCase::random(&mut random, shape, false, RopePairing::Halves, 1.0, longest);
        case.window = window;
        case.sinks = window.map(|_| random.vec(shape.heads, 4.0));
        case.rope.inv_freq.fill(0.0);
        // Whole prompts, then each goes on.
        let blocks = longest.div_ceil(16) as u32;
        case.steps = [(lengths, [0; 3]), ([30, 1, 17], lengths)]
            .map(|(new, computed)| {
                let mut batch = Batch::default();
                for (s, (new, computed)) in (0..).zip(new.into_iter().zip(computed)) {
                    let table: Vec<u32> = (0..blocks).map(|i| 3 * i + s).rev().collect();
                    batch.push(&vec![0; new], computed, &table, 0);
                }
                batch
            })
            .to_vec();
        let rows: usize = case.steps.iter().map(Batch::rows).sum();
        let numbers = random.vec(rows * shape.qkv_width(), 2.0);
        case.qkv = numbers.into_iter().map(|x| (x * 7.5).round() / 8.0).collect();
        let [_, expected] = case.run(&mut Reference::new())?;
        for kernel in [PrefillKernel::Mma, PrefillKernel::Wgmma, PrefillKernel::Tcgen05] {
            let Some(cuda) = cuda() else { return Ok(()) };
            let mut cuda = cuda.with_kv_dtype(dtype);
            if cuda.set_prefill_kernel(kernel).is_err() {
                continue;
            }
            let [_, found] = case.run(&mut cuda)?;
            assert_close(
                &found,
                &expected,
                0.02,
                1.0,
                &format!("{kernel:?} {shape:?} {lengths:?} {window:?}"),
            );
        }
    }
    Ok(())
}

/// A step of sequences of `blocks` blocks, of which each begins with the first `shared` of another: its rows, `new` of each sequence.
fn family(shared: &[(usize, usize)], contexts: &[usize], new: usize) -> (Batch, usize) {
    let (mut batch, mut tables, mut next): (_, Vec<Vec<u32>>, _) = (Batch::default(), Vec::new(), 0);
    for (&(of, count), &context) in shared.iter().zip(contexts) {
        let own = context.div_ceil(16) - count;
        let known: Vec<u32> = tables.get(of).map_or(Vec::new(), |table| table[..count].to_vec());
        // Not in the order of memory.
        tables.push([known, (next..next + own as u32).rev().collect()].concat());
        next += own as u32;
    }
    for (table, &context) in tables.iter().zip(contexts) {
        batch.push(&vec![0; new], context - new, table, new);
    }
    (batch, next as usize)
}

/// Rows whose contexts begin with the same blocks, on several levels, and drafted tokens: what is computed once for all is bit for bit what each
/// would have computed.
#[test]
fn shared_prefixes_change_no_bit() -> Result<()> {
    let mut random = Random(24);
    // Three share 32 blocks, two of them 48; a fourth goes on from the third's 16; one shares nothing, one less than a split.
    let shared = [(0, 0), (0, 48), (0, 33), (2, 16), (9, 0), (0, 15)];
    let contexts = [900, 769, 530, 400, 600, 300];
    // More rows than a tile has.
    let many = [(0, 0)].into_iter().chain([(0, 32); 20]).collect::<Vec<_>>();
    let cases = [
        (shape(4, 2, 64), &shared[..], &contexts[..], 1, KvDType::Bf16),
        (shape(3, 1, 96), &shared[..4], &contexts[..4], 1, KvDType::Fp8),
        (shape(16, 1, 128), &shared[..3], &contexts[..3], 1, KvDType::Bf16),
        (shape(4, 2, 128), &[(0, 0), (9, 0)], &[1300, 1100], 5, KvDType::Fp8),
        (shape(2, 1, 256), &shared[..3], &contexts[..3], 1, KvDType::Bf16),
        (shape(20, 1, 64), &shared[..3], &contexts[..3], 1, KvDType::Bf16),
        (shape(3, 1, 64), &many[..], &[513; 21], 1, KvDType::Bf16),
    ];
    for (shape, shared, contexts, new, dtype) in cases {
        let Some(cuda) = cuda() else { return Ok(()) };
        let mut cuda = cuda.with_kv_dtype(dtype);
        let (batch, blocks) = family(shared, contexts, new);
        let rope = Rope { inv_freq: vec![0.0; shape.head_dim / 2], pairing: RopePairing::Halves };
        let mut reference = Reference::new();
        cuda.load_rope(&rope, 4096)?;
        reference.load_rope(&rope, 4096)?;
        let (mut cache, mut expected_cache) =
            (cuda.kv_cache(1, &shape, blocks)?, reference.kv_cache(1, &shape, blocks)?);
        let width = shape.qkv_width();
        // All keys and values, by rows whose attention nobody asks for; such as FP8 holds.
        let mut fill = Batch::default();
        fill.push(&vec![0; 16 * blocks], 0, &(0..blocks as u32).collect::<Vec<_>>(), 0);
        let filling: Vec<f32> =
            random.vec(16 * blocks * width, 2.0).into_iter().map(|x| (x * 7.5).round() / 8.0).collect();
        let queries: Vec<f32> = filling[..batch.rows() * width].iter().map(|x| -x).collect();
        fn write<B: Backend>(
            b: &mut B,
            rows: Rows,
            s: &AttentionShape,
            batch: &Batch,
            cache: &mut B::KvCache,
        ) -> Result<B::Tensor> {
            let mut qkv = upload(b, rows)?;
            b.begin(batch)?;
            b.rope_and_cache(&mut qkv, s, None, 0, cache)?;
            Ok(qkv)
        }
        fn attend<B: Backend>(
            b: &mut B,
            qkv: &B::Tensor,
            options: AttentionOptions<'_, B::Vector>,
            s: &AttentionShape,
            cache: &B::KvCache,
        ) -> Result<Vec<f32>> {
            let mut out = b.tensor(64, s.out_width())?;
            b.attention(qkv, s, options, 0, cache, &mut out)?;
            b.to_host(&out)
        }
        write(&mut cuda, (&filling, width), &shape, &fill, &mut cache)?;
        write(&mut reference, (&filling, width), &shape, &fill, &mut expected_cache)?;
        let qkv = write(&mut reference, (&queries, width), &shape, &batch, &mut expected_cache)?;
        let sinks = random.vec(shape.heads, 4.0);
        let (ours, theirs) = (vector(&mut cuda, &sinks)?, vector(&mut reference, &sinks)?);
        for window in [None, Some(400)] {
            let options = AttentionOptions { window, sinks: Some(&theirs), ..Default::default() };
            let expected = attend(&mut reference, &qkv, options, &shape, &expected_cache)?;
            let found = [SharedPrefixes::Never, SharedPrefixes::Always].map(|when| {
                cuda.set_shared_prefixes(when);
                let qkv = write(&mut cuda, (&queries, width), &shape, &batch, &mut cache)?;
                let options = AttentionOptions { window, sinks: Some(&ours), ..Default::default() };
                attend(&mut cuda, &qkv, options, &shape, &cache)
            });
            let [alone, together] = found;
            let (alone, together) = (alone?, together?);
            assert_close(&alone, &expected, 0.02, 1.0, &format!("{shape:?}, window {window:?}"));
            assert!(bits(&alone) == bits(&together), "{shape:?}, window {window:?}");
        }
    }
    Ok(())
}

/// Rows that are done in several turns, as there is not room enough for all parts: tiles reach over the turns' bounds.
#[test]
fn shared_prefixes_reach_over_the_turns_of_long_contexts() -> Result<()> {
    let Some(mut cuda) = cuda() else { return Ok(()) };
    let shape = shape(16, 1, 64);
    cuda.load_rope(&Rope { inv_freq: vec![0.0; 32], pairing: RopePairing::Halves }, 1 << 16)?;
    let mut cache = cuda.kv_cache(1, &shape, 110)?;
    let mut random = Random(25);
    let bytes: Vec<u8> =
        random.exact(110 * 2 * 16 * 64, 1.0).iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
    let size = cuda.kv_block_bytes(&shape);
    bytes
        .chunks(size)
        .zip(0..)
        .try_for_each(|(bytes, block)| cuda.write_kv_block(&mut cache, block, bytes))?;
    // One of 65,000 tokens, which makes 256 splits of each, and so turns of 64 rows.
    let mut batch = Batch::default();
    batch.push(&[0], 65_000, &[109; 4063], 1);
    for s in 0..70 {
        batch.push(&[0], 268 + s as usize % 3, &[(0..16).collect(), vec![16 + s]].concat(), 1);
    }
    let queries = random.exact(71 * shape.qkv_width(), 1.0);
    let mut outs = Vec::new();
    for when in [SharedPrefixes::Never, SharedPrefixes::Always] {
        cuda.set_shared_prefixes(when);
        let qkv = upload(&mut cuda, (&queries, shape.qkv_width()))?;
        let mut out = cuda.tensor(71, shape.out_width())?;
        cuda.begin(&batch)?;
        cuda.attention(&qkv, &shape, AttentionOptions::default(), 0, &cache, &mut out)?;
        outs.push(cuda.to_host(&out)?);
    }
    assert!(outs[0].iter().all(|x| x.is_finite()) && outs[0].iter().any(|x| *x != 0.0));
    assert!(bits(&outs[0]) == bits(&outs[1]));
    Ok(())
}

/// How a context is cut depends on the number of rows and on itself, not on the others.
#[test]
fn a_row_does_not_depend_on_how_long_others_are() -> Result<()> {
    let Some(mut cuda) = cuda() else { return Ok(()) };
    let shape = shape(4, 2, 64);
    cuda.load_rope(&Rope { inv_freq: vec![0.0; 32], pairing: RopePairing::Halves }, 1 << 15)?;
    let mut cache = cuda.kv_cache(1, &shape, 64)?;
    let mut random = Random(28);
    let size = cuda.kv_block_bytes(&shape);
    for block in 0..64 {
        let numbers = random.exact(size / 2, 1.0);
        let bytes: Vec<u8> = numbers.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
        cuda.write_kv_block(&mut cache, block, &bytes)?;
    }
    let queries = random.exact(2 * shape.qkv_width(), 1.0);
    let mut firsts = Vec::new();
    for other in [20, 900, 20_000] {
        let mut batch = Batch::default();
        for context in [700, other] {
            let table: Vec<u32> = (0..=context as u32 / 16).map(|i| i % 64).collect();
            batch.push(&[0], context, &table, 1);
        }
        let qkv = upload(&mut cuda, (&queries, shape.qkv_width()))?;
        let mut out = cuda.tensor(2, shape.out_width())?;
        cuda.begin(&batch)?;
        cuda.attention(&qkv, &shape, AttentionOptions::default(), 0, &cache, &mut out)?;
        firsts.push(bits(&cuda.to_host(&out)?[..shape.out_width()]));
    }
    assert!(firsts[0] == firsts[1] && firsts[0] == firsts[2]);
    Ok(())
}

/// The number of FP8 that is nearest, 448 at most.
fn nearest_fp8(x: f32) -> f32 {
    nearest(&fp8::NUMBERS[..127], x)
}

/// The number that is nearest of a format's positive ones, which are in the order of their codes, and zero; the last at most.
fn nearest(numbers: &[f32], x: f32) -> f32 {
    let magnitude = x.abs().min(numbers[numbers.len() - 1]);
    let above = numbers.partition_point(|number| *number < magnitude).max(1);
    let [low, high] = [above - 1, above].map(|at| (f64::from(numbers[at]) - f64::from(magnitude)).abs());
    // Of two that are as near, the one whose last bit is zero.
    let best = if low < high || (low == high && above % 2 == 1) { above - 1 } else { above };
    numbers[best].copysign(x)
}

/// A row that sees one token puts out its value.
#[test]
fn values_of_fp8_are_the_nearest_and_at_most_448() -> Result<()> {
    let Some(cuda) = cuda() else { return Ok(()) };
    let mut cuda = cuda.with_kv_dtype(KvDType::Fp8);
    let mut random = Random(20);
    let numbers = &fp8::NUMBERS[..127];
    let halfway = numbers.windows(2).map(|w| (w[0] + w[1]) / 2.0);
    let mut values: Vec<f32> = numbers.iter().copied().chain(halfway).collect();
    values.extend([449.0, 1e30, f32::INFINITY, 1e-9, 0.000_976]);
    values.extend(random.vec(200, 500.0).into_iter().chain(random.vec(200, 0.02)).map(f32::abs));
    values.extend(values.clone().into_iter().map(|x| -x));
    values.resize(values.len().next_multiple_of(64), 0.0);
    for dim in [64, 8] {
        let shape = AttentionShape { heads: 1, kv_heads: 1, head_dim: dim, scale: 1.0 };
        cuda.load_rope(&Rope { inv_freq: vec![0.0; dim / 2], pairing: RopePairing::Halves }, 16)?;
        let rows: Vec<f32> =
            values.chunks(dim).flat_map(|v| [vec![0.0; 2 * dim], v.to_vec()].concat()).collect();
        let mut cache = cuda.kv_cache(1, &shape, values.len() / dim)?;
        let mut qkv = upload(&mut cuda, (&rows, 3 * dim))?;
        let mut out = cuda.tensor(values.len() / dim, dim)?;
        let mut batch = Batch::default();
        (0..values.len() / dim).for_each(|i| batch.push(&[0], 0, &[i as u32], 0));
        cuda.begin(&batch)?;
        cuda.rope_and_cache(&mut qkv, &shape, None, 0, &mut cache)?;
        cuda.attention(&qkv, &shape, AttentionOptions::default(), 0, &cache, &mut out)?;
        for (x, found) in values.iter().zip(cuda.to_host(&out)?) {
            assert_eq!(found, nearest_fp8(*x), "{x}");
        }
    }
    Ok(())
}

/// Random experts as raw tensors: gates, ups and downs.
fn experts(random: &mut Random, n: usize, hidden: usize, intermediate: usize) -> [Vec<RawTensor>; 3] {
    [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)].map(|(rows, width)| {
        (0..n).map(|i| matrix(&format!("expert {i}"), rows, &random.exact(rows * width, 0.5))).collect()
    })
}

/// Few pairs, each by itself, and many, sorted: up to several chunks of the sort and several tiles of an expert.
#[test]
fn moe_agrees_for_every_top_k_and_ties_go_to_the_lower_expert() -> Result<()> {
    let Some(mut cuda) = cuda() else { return Ok(()) };
    let mut random = Random(8);
    let mut cases =
        vec![(1, 1, 24, 40), (4, 9, 24, 40), (19, 30, 72, 33), (3, 150, 24, 40), (150, 5, 24, 40)];
    if large(&cuda) {
        cases.push((128, 700, 256, 96));
    }
    for (n, rows, hidden, intermediate) in cases {
        let stack = experts(&mut random, n, hidden, intermediate);
        let x = random.exact(rows * hidden, 1.0);
        let mut logits = random.vec(rows * n, 3.0);
        logits[..n].fill(0.25);
        for (i, top_k) in [1, 2, 8, 19].into_iter().filter(|&k| k <= n).enumerate() {
            let renormalise = top_k % 2 == 0;
            let (x, logits) = ((x.as_slice(), hidden), (logits.as_slice(), n));
            let all = kernels(&mut cuda, rows.clamp(17, 511));
            cuda.set_prefill_kernel(all[i % all.len()])?;
            let ours = run_moe(&mut cuda, x, logits, &stack, top_k, renormalise)?;
            let theirs = run_moe(&mut Reference::new(), x, logits, &stack, top_k, renormalise)?;
            // The gated row is rounded once.
            let floor = floor(&cuda, &theirs);
            assert_close(&ours, &theirs, 0.02, floor, &format!("{top_k} of {n}, {rows} rows"));
        }
    }
    Ok(())
}

/// A matrix of random codes, with scales from 2^-7 to 2^-4; now and then the least and the largest that kernels take.
fn quantised(random: &mut Random, shape: [usize; 2]) -> RawTensor {
    let block = |i: usize, random: &mut Random| {
        let codes = std::array::from_fn(|_| random.next() as u8 & 15);
        let codes = if i % 97 == 5 { [1; 32] } else { codes };
        let scale = match i % 97 {
            3 => 0,
            5 => 128,
            _ => 120 + random.below(4) as u8,
        };
        mxfp4::block(scale, &codes)
    };
    let bytes: Vec<u8> = (0..shape[0] * shape[1] / 32).flat_map(|i| block(i, random)).collect();
    RawTensor::new("quantised", shape.to_vec(), DType::MXFP4, Arc::new(bytes), 0).expect("whole blocks")
}

/// An expert's matrix in a format, F32 for bf16.
fn expert(random: &mut Random, dtype: DType, shape: [usize; 2]) -> RawTensor {
    match dtype {
        DType::MXFP4 => quantised(random, shape),
        DType::F8_E4M3 => fp8_matrix(random, "expert", shape, Scales::Blocks(128)),
        DType::INT4 => int4_matrix(random, shape, 128, 0.008),
        DType::NVFP4 => nvfp4_matrix(random, "expert", shape),
        _ => matrix("expert", shape[0], &random.exact(shape[0] * shape[1], 0.3)),
    }
}

/// Experts as gpt-oss has them, few pairs and many, of widths that are whole steps of the kernels and not, in bf16 and MXFP4.
#[test]
fn biased_experts_with_a_clamped_gate_agree_in_every_format() -> Result<()> {
    let Some(mut cuda) = cuda() else { return Ok(()) };
    let mut random = Random(16);
    // Numbers on both sides of the limit.
    let activation = Activation::ClampedSwiglu { alpha: 1.702, limit: 1.0 };
    // The last: few pairs of more turns than are read ahead.
    let mut cases =
        vec![(3, 2, 64usize, 32usize), (5, 9, 160, 96), (4, 80, 96, 64), (2, 150, 64, 160), (3, 2, 64, 1344)];
    if large(&cuda) {
        cases.extend([(8, 4, 2880, 2880), (8, 300, 2880, 2880)]);
    }
    for (n, rows, hidden, intermediate) in cases {
        for stored_as in [DType::F32, DType::MXFP4, DType::F8_E4M3, DType::INT4, DType::NVFP4] {
            let whole = stored_as.block_len().max(32);
            let (hidden, intermediate) =
                (hidden.next_multiple_of(whole), intermediate.next_multiple_of(whole));
            let mut stack = |shape: [usize; 2]| -> Vec<RawTensor> {
                (0..n).map(|_| expert(&mut random, stored_as, shape)).collect()
            };
            let (gate, up) = (stack([intermediate, hidden]), stack([intermediate, hidden]));
            let down = stack([hidden, intermediate]);
            let biases = [intermediate, intermediate, hidden].map(|len| -> Vec<RawTensor> {
                (0..n).map(|_| RawTensor::from_f32("bias", vec![len], &random.vec(len, 1.0))).collect()
            });
            let biases = Some(biases.each_ref().map(Vec::as_slice));
            let weights = ExpertWeights { gate: &gate, up: &up, down: &down, biases, activation };
            let (x, logits) = (random.exact(rows * hidden, 1.0), random.vec(rows * n, 3.0));
            let plain = ExpertWeights { biases: None, activation: Activation::Silu, ..weights };
            for weights in [weights, plain] {
                let (x, logits) = ((x.as_slice(), hidden), (logits.as_slice(), n));
                let theirs = run_experts(&mut Reference::new(), x, logits, &weights, 2, true)?;
                let what = format!("{n} experts, {rows} rows, [{intermediate}, {hidden}] of {stored_as:?}");
                for kernel in kernels(&mut cuda, rows) {
                    cuda.set_prefill_kernel(kernel)?;
                    let ours = run_experts(&mut cuda, x, logits, &weights, 2, true)?;
                    // Gated rows are rounded once.
                    let floor = floor(&cuda, &theirs);
                    assert_close(&ours, &theirs, 0.02, floor, &format!("{what}, {kernel:?}"));
                }
            }
        }
    }
    Ok(())
}

/// Few rows through gate and up at once are what they are by an op for each step, bit for bit; so are those of experts, but for the order in which
/// their last sums are added up. Widths that are whole blocks of features and not.
#[test]
fn few_rows_are_gated_at_once_as_by_ops_of_their_own() -> Result<()> {
    let Some(mut cuda) = cuda() else { return Ok(()) };
    let mut random = Random(41);
    let mut cases = vec![(1, 37, 128usize), (8, 64, 700), (9, 100, 256), (16, 33, 64)];
    if large(&cuda) {
        cases.extend([(1, 4864, 896), (16, 14336, 4096)]);
    }
    for (rows, width, hidden) in cases {
        for dtype in [DType::F32, DType::MXFP4, DType::F8_E4M3, DType::INT4, DType::NVFP4] {
            let hidden = if dtype == DType::F32 { hidden } else { hidden.next_multiple_of(128) };
            let [gate, up] = [(); 2].map(|()| expert(&mut random, dtype, [width, hidden]));
            let down = expert(&mut random, DType::F32, [hidden, width]);
            let data = random.exact(rows * hidden, 1.0);
            let x = upload(&mut cuda, (&data, hidden))?;
            let [gate_up, through] = [[gate.clone(), up.clone()].as_slice(), std::slice::from_ref(&down)]
                .map(|parts| cuda.load_matrix(parts));
            let (gate_up, through) = (gate_up?, through?);
            let (mut both, mut gated) = (cuda.tensor(rows, 2 * width)?, cuda.tensor(rows, width)?);
            let mut out = cuda.tensor(rows, hidden)?;
            cuda.linear(&x, &gate_up, None, &mut both)?;
            cuda.silu_mul(&both, &mut gated)?;
            cuda.linear(&gated, &through, None, &mut out)?;
            let by_steps = cuda.to_host(&out)?;
            cuda.mlp(&x, &gate_up, &through, (&mut both, &mut gated), &mut out)?;
            let what = format!("{rows} rows, [{width}, {hidden}] of {dtype:?}");
            assert!(bits(&cuda.to_host(&out)?) == bits(&by_steps), "{what}");
            let [gate, up, down] = [[gate], [up], [down]];
            let weights = ExpertWeights::plain(&gate, &up, &down);
            let logits = vec![0.0; rows];
            let of_expert = run_experts(&mut cuda, (&data, hidden), (&logits, 1), &weights, 1, true)?;
            assert_close(&of_expert, &by_steps, 1e-5, 1.0, &format!("an expert, {what}"));
        }
    }
    Ok(())
}

/// Logits by which so many rows go to each expert first, then to the lowest other.
fn routed(rows: &[usize]) -> Vec<f32> {
    let row = |expert: usize| (0..rows.len()).map(move |e| if e == expert { 5.0 } else { -(e as f32) });
    rows.iter().enumerate().flat_map(|(expert, &rows)| (0..rows).flat_map(move |_| row(expert))).collect()
}

/// Experts of every format that no row goes to, one row, some, and one more than a tile has.
#[test]
fn experts_agree_whatever_rows_go_to_them() -> Result<()> {
    let Some(mut cuda) = cuda() else { return Ok(()) };
    let mut random = Random(31);
    let (hidden, intermediate) = (512, 128);
    for (rows, top_k) in [(&[0, 1, 129, 0][..], 1), (&[17, 0, 35], 2)] {
        let (total, n) = (rows.iter().sum::<usize>(), rows.len());
        let (x, logits) = (random.exact(total * hidden, 0.3), routed(rows));
        for dtype in [DType::F32, DType::MXFP4, DType::F8_E4M3, DType::INT4, DType::NVFP4] {
            let shapes = [[intermediate, hidden], [intermediate, hidden], [hidden, intermediate]];
            let stack =
                shapes.map(|shape| (0..n).map(|_| expert(&mut random, dtype, shape)).collect::<Vec<_>>());
            let (x, logits) = ((x.as_slice(), hidden), (logits.as_slice(), n));
            let theirs = run_moe(&mut Reference::new(), x, logits, &stack, top_k, false)?;
            for kernel in kernels(&mut cuda, total) {
                cuda.set_prefill_kernel(kernel)?;
                let ours = run_moe(&mut cuda, x, logits, &stack, top_k, false)?;
                let what = format!("{top_k} of {rows:?}, {dtype:?}, {kernel:?}");
                assert_close(&ours, &theirs, 0.02, 1.0, &what);
            }
        }
    }
    Ok(())
}

/// Rows of `x` through one expert with the ops of a dense layer.
fn run_dense_expert(cuda: &mut Cuda, x: Rows, weights: &ExpertWeights<'_>, e: usize) -> Result<Vec<f32>> {
    let [gate_bias, up_bias, down_bias] = weights.biases.expect("biases");
    let gate_up = cuda.load_matrix(&[weights.gate[e].clone(), weights.up[e].clone()])?;
    let down = cuda.load_matrix(std::slice::from_ref(&weights.down[e]))?;
    let inner = cuda.load_vector(&[gate_bias[e].clone(), up_bias[e].clone()])?;
    let outer = cuda.load_vector(std::slice::from_ref(&down_bias[e]))?;
    let (rows, width) = (x.0.len() / x.1, weights.gate[e].shape[0]);
    let mut both = cuda.tensor(rows, 2 * width)?;
    let (mut gated, mut out) = (cuda.tensor(rows, width)?, cuda.tensor(rows, x.1)?);
    let x = upload(cuda, x)?;
    cuda.linear(&x, &gate_up, Some(&inner), &mut both)?;
    cuda.silu_mul(&both, &mut gated)?;
    cuda.linear(&gated, &down, Some(&outer), &mut out)?;
    cuda.to_host(&out)
}

/// Compares experts with what dense layers of their weights make, each of all rows.
fn experts_are_dense_layers(
    cuda: &mut Cuda,
    (x, hidden): Rows,
    (logits, n): Rows,
    weights: &ExpertWeights<'_>,
    top_k: usize,
) -> Result<()> {
    let found = run_experts(cuda, (x, hidden), (logits, n), weights, top_k, true)?;
    let dense = (0..n).map(|e| run_dense_expert(cuda, (x, hidden), weights, e));
    let dense = dense.collect::<Result<Vec<_>>>()?;
    for (row, (found, logits)) in found.chunks(hidden).zip(logits.chunks(n)).enumerate() {
        let mut chosen: Vec<usize> = (0..n).collect();
        chosen.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        let sum: f32 = chosen[..top_k].iter().map(|&e| logits[e].exp()).sum();
        let expected: Vec<f32> = (row * hidden..(row + 1) * hidden)
            .map(|i| chosen[..top_k].iter().map(|&e| logits[e].exp() / sum * dense[e][i]).sum())
            .collect();
        assert_close(found, &expected, 1e-5, 1.0, &format!("{top_k} of {n}, row {row}"));
    }
    Ok(())
}

/// Rows that become FP8 for experts: each expert's are what a dense layer of its weights makes of them, experts without rows, with one, some and
/// more than a tile has; scales that the product of FP8 takes and, of 64 weights, those that it does not.
#[test]
fn experts_of_fp8_multiply_as_dense_layers_do() -> Result<()> {
    let Some(mut cuda) = cuda() else { return Ok(()) };
    if cuda.set_fp8_products(true).is_err() {
        return Ok(());
    }
    let mut random = Random(33);
    let cases = [
        ([Scales::Rows, Scales::Blocks(128)], &[0, 1, 129, 17][..], 1, 128, 192),
        ([Scales::Blocks(128), Scales::Rows], &[35, 0, 12], 2, 704, 64),
        ([Scales::Blocks(64), Scales::Blocks(128)], &[70, 5], 1, 192, 256),
        ([Scales::Blocks(128), Scales::Blocks(64)], &[70, 5], 2, 320, 128),
    ];
    for ([inner, outer], rows, top_k, hidden, intermediate) in cases {
        let (total, n) = (rows.iter().sum::<usize>(), rows.len());
        let mut stack = |shape: [usize; 2], scales| -> Vec<_> {
            (0..n).map(|_| fp8_matrix(&mut random, "expert", shape, scales)).collect()
        };
        let (gate, up) = (stack([intermediate, hidden], inner), stack([intermediate, hidden], inner));
        let down = stack([hidden, intermediate], outer);
        let biases = [intermediate, intermediate, hidden].map(|len| -> Vec<RawTensor> {
            (0..n).map(|_| RawTensor::from_f32("bias", vec![len], &random.vec(len, 1.0))).collect()
        });
        let biases = Some(biases.each_ref().map(Vec::as_slice));
        let weights =
            ExpertWeights { gate: &gate, up: &up, down: &down, biases, activation: Activation::Silu };
        let (x, logits) = (random.exact(total * hidden, 1.0), routed(rows));
        for kernel in rounding_kernels(&mut cuda) {
            cuda.set_prefill_kernel(kernel)?;
            experts_are_dense_layers(&mut cuda, (&x, hidden), (&logits, n), &weights, top_k)?;
        }
    }
    Ok(())
}

/// The same of MXFP4 and NVFP4, and rows that become MXFP8 and NVFP4.
#[test]
fn experts_of_four_bits_multiply_as_dense_layers_do() -> Result<()> {
    let Some(mut cuda) = cuda() else { return Ok(()) };
    if cuda.set_prefill_kernel(PrefillKernel::Tcgen05).is_err() {
        return Ok(());
    }
    cuda.set_fp8_products(true)?;
    cuda.set_fp4_products(true)?;
    let mut random = Random(36);
    let cases = [(&[0, 1, 129, 17][..], 1, 128, 192), (&[35, 0, 12], 2, 704, 64), (&[70, 5], 1, 192, 320)];
    for (i, (rows, top_k, hidden, intermediate)) in cases.into_iter().chain(cases).enumerate() {
        let dtype = if i < cases.len() { DType::MXFP4 } else { DType::NVFP4 };
        let (total, n) = (rows.iter().sum::<usize>(), rows.len());
        let mut stack =
            |shape: [usize; 2]| -> Vec<_> { (0..n).map(|_| expert(&mut random, dtype, shape)).collect() };
        let (gate, up) = (stack([intermediate, hidden]), stack([intermediate, hidden]));
        let down = stack([hidden, intermediate]);
        let biases = [intermediate, intermediate, hidden].map(|len| -> Vec<RawTensor> {
            (0..n).map(|_| RawTensor::from_f32("bias", vec![len], &random.vec(len, 1.0))).collect()
        });
        let biases = Some(biases.each_ref().map(Vec::as_slice));
        let weights =
            ExpertWeights { gate: &gate, up: &up, down: &down, biases, activation: Activation::Silu };
        let (x, logits) = (random.exact(total * hidden, 1.0), routed(rows));
        experts_are_dense_layers(&mut cuda, (&x, hidden), (&logits, n), &weights, top_k)?;
    }
    Ok(())
}

/// So few rows that they stay bf16, and so many pairs of them that the gated rows become FP8.
#[test]
fn few_rows_of_many_experts_of_fp8_agree() -> Result<()> {
    let Some(mut cuda) = cuda() else { return Ok(()) };
    if cuda.set_fp8_products(true).is_err() {
        return Ok(());
    }
    let mut random = Random(34);
    let (rows, hidden, intermediate) = (9, 128, 64);
    let stack = [[intermediate, hidden], [intermediate, hidden], [hidden, intermediate]]
        .map(|shape| (0..8).map(|_| fp8_matrix(&mut random, "e", shape, Scales::Rows)).collect::<Vec<_>>());
    let (x, logits) = (random.exact(rows * hidden, 0.3), random.vec(rows * 8, 1.0));
    let (x, logits) = ((x.as_slice(), hidden), (logits.as_slice(), 8));
    let theirs = run_moe(&mut Reference::new(), x, logits, &stack, 8, true)?;
    let ours = run_moe(&mut cuda, x, logits, &stack, 8, true)?;
    cuda.set_fp8_products(false)?;
    let plain = run_moe(&mut cuda, x, logits, &stack, 8, true)?;
    assert_close(&plain, &theirs, 0.02, 1.0, "without rounding");
    assert_close(&ours, &theirs, 0.1, 1.0, "rounded");
    assert!(ours != plain);
    Ok(())
}

#[test]
fn scales_of_mxfp4_beyond_the_kernels_are_refused_by_name() {
    let Some(mut cuda) = cuda() else { return };
    let block = |scale| {
        let bytes = mxfp4::block(scale, &[1; 32]).repeat(32);
        [RawTensor::new("outsized", vec![32, 32], DType::MXFP4, Arc::new(bytes), 0).expect("whole blocks")]
    };
    let load = |cuda: &mut Cuda, scale| {
        let part = block(scale);
        cuda.load_experts(&ExpertWeights::plain(&part, &part, &part)).map(drop)
    };
    assert!(load(&mut cuda, 128).is_ok());
    assert!(load(&mut cuda, 129).is_err_and(|e| e.to_string().contains("outsized")));
}

/// Rows 0 and 2 of what is computed beside a row of NaN.
#[test]
fn a_row_of_nan_harms_no_other_row() -> Result<()> {
    let Some(mut cuda) = cuda() else { return Ok(()) };
    let mut random = Random(9);
    let stack = experts(&mut random, 5, 24, 40);
    let w = [matrix("w", 30, &random.exact(30 * 24, 1.0))];
    for rows in [3, 60] {
        let (mut x, mut logits) = (random.exact(rows * 24, 1.0), random.vec(rows * 5, 1.0));
        let clean = run_moe(&mut cuda, (&x, 24), (&logits, 5), &stack, 2, true)?;
        let clean_linear = run_linear(&mut cuda, (&x, 24), &w, None)?;
        x[24..48].fill(f32::NAN);
        logits[5..10].fill(f32::NAN);
        let found = run_moe(&mut cuda, (&x, 24), (&logits, 5), &stack, 2, true)?;
        assert!(found[24..48].iter().all(|x| x.is_nan()));
        assert_eq!((&found[..24], &found[48..]), (&clean[..24], &clean[48..]));
        let found = run_linear(&mut cuda, (&x, 24), &w, None)?;
        assert!(found[30..60].iter().all(|x| x.is_nan()));
        assert_eq!((&found[..30], &found[60..]), (&clean_linear[..30], &clean_linear[60..]));
    }
    Ok(())
}

/// A block that held NaN before is used again: what lies behind the context must not show.
#[test]
fn what_a_block_held_before_does_not_show() -> Result<()> {
    let Some(mut cuda) = cuda() else { return Ok(()) };
    let mut random = Random(10);
    for shape in [shape(4, 2, 64), shape(2, 1, 96), shape(2, 1, 20)] {
        let width = shape.qkv_width();
        let qkv = random.exact(19 * width, 1.0);
        let rope = Rope { inv_freq: vec![0.5; shape.head_dim / 2], pairing: RopePairing::Halves };
        cuda.load_rope(&rope, 64)?;
        let run = |cuda: &mut Cuda, before: f32| -> Result<Vec<f32>> {
            let mut cache = cuda.kv_cache(1, &shape, 2)?;
            let mut out = cuda.tensor(32, shape.out_width())?;
            let mut results = Vec::new();
            let rows = [vec![before; 32 * width], qkv[..18 * width].to_vec(), qkv[18 * width..].to_vec()];
            for (rows, computed) in rows.iter().zip([0, 0, 18]) {
                let mut x = upload(cuda, (rows, width))?;
                let mut batch = Batch::default();
                batch.push(&vec![0; rows.len() / width], computed, &[1, 0], 0);
                cuda.begin(&batch)?;
                cuda.rope_and_cache(&mut x, &shape, None, 0, &mut cache)?;
                cuda.attention(&x, &shape, AttentionOptions::default(), 0, &cache, &mut out)?;
                results.push(cuda.to_host(&out)?);
            }
            Ok(results[1..].concat())
        };
        let (clean, found) = (run(&mut cuda, 0.0)?, run(&mut cuda, f32::NAN)?);
        assert!(found.iter().all(|x| x.is_finite()));
        assert_eq!(clean, found, "{shape:?}");
    }
    Ok(())
}

#[test]
fn gather_takes_the_wanted_rows_and_adds_the_residual() -> Result<()> {
    let Some(mut cuda) = cuda() else { return Ok(()) };
    let mut random = Random(11);
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
        let ours = run(&mut cuda, (&x, 33), delta)?;
        assert_eq!(ours, run(&mut Reference::new(), (&x, 33), delta)?);
        assert_eq!(ours.len(), 3 * 33);
    }
    Ok(())
}

fn sample<B: Backend>(b: &mut B, logits: Rows, rows: &[SampleRow]) -> Result<Vec<Sampled>> {
    let mut logits = upload(b, logits)?;
    let mut out = vec![Sampled::default(); 77]; // what is left from an earlier step
    b.sample(&mut logits, rows, &mut out)?;
    Ok(out)
}

/// Same tokens and faults, log-probabilities within rounding.
#[track_caller]
fn assert_same_draws(ours: &[Sampled], theirs: &[Sampled], what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for (row, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
        assert_eq!((ours.token, ours.fault), (theirs.token, theirs.fault), "{what}, row {row}");
        assert_eq!(ours.logprob.is_some(), theirs.logprob.is_some(), "{what}, row {row}");
        let tokens = |s: &Sampled| s.top.iter().map(|t| t.token).collect::<Vec<_>>();
        assert_eq!(tokens(ours), tokens(theirs), "{what}, row {row}");
        let logprobs =
            |s: &Sampled| s.logprob.into_iter().chain(s.top.iter().map(|t| t.logprob)).collect::<Vec<_>>();
        assert_close(&logprobs(ours), &logprobs(theirs), 1e-5, 1.0, what);
    }
}

/// Every parameter, alone and with others, on vocabularies around the block's and the warp's size.
#[test]
fn draws_are_the_hosts() -> Result<()> {
    let Some(mut cuda) = cuda() else { return Ok(()) };
    let mut random = Random(12);
    let vocabs = if large(&cuda) { vec![1, 33, 1024, 5003, 151_936] } else { vec![1, 31, 33, 1024, 2003] };
    for vocab in vocabs {
        let n = 24;
        let mut logits = random.vec(n * vocab, 6.0);
        logits[..vocab].fill(1.5); // all the same
        let mut masks = Vec::new();
        let mut all_counts = Vec::new();
        let params: Vec<SamplingParams> = (0..n)
            .map(|i| {
                let pick = |values: &[f32], random: &mut Random| values[random.below(values.len())];
                masks.push((0..vocab.div_ceil(32)).map(|_| random.next() as u32 | 1).collect::<Vec<u32>>());
                let mut counts = TokenCounts::of_prompt(&[0, random.below(vocab) as u32]);
                (0..5).for_each(|_| counts.add(random.below(vocab) as u32));
                all_counts.push(counts);
                SamplingParams {
                    temperature: pick(&[0.0, 0.3, 1.0, 2.0], &mut random),
                    top_p: pick(&[1.0, 0.9, 0.5, 0.0], &mut random),
                    top_k: [0, 1, 3, 40, 100_000][random.below(5)],
                    min_p: pick(&[0.0, 0.05, 0.5], &mut random),
                    repetition_penalty: pick(&[1.0, 1.3], &mut random),
                    presence_penalty: pick(&[0.0, 0.7], &mut random),
                    frequency_penalty: pick(&[0.0, 0.2], &mut random),
                    seed: i as u64,
                    logprobs: [None, Some(0), Some(1), Some(32)][random.below(4)],
                    logit_bias: vec![
                        LogitBias { token: random.below(vocab) as u32, bias: 4.0 },
                        LogitBias { token: vocab as u32 + 9, bias: 4.0 },
                    ],
                }
            })
            .collect();
        let drafted = [0, 0, vocab as u32 - 1];
        let rows: Vec<SampleRow> = params
            .iter()
            .enumerate()
            .map(|(i, params)| SampleRow {
                params,
                counts: params.needs_counts().then_some(&all_counts[i]),
                drafted: &drafted[..i % 4],
                position: 1000 + i as u64,
                mask: (i % 3 == 1).then_some(&masks[i]),
                forced: (i % 7 == 6).then_some(random.below(vocab) as u32),
            })
            .collect();
        let theirs = sample(&mut Reference::new(), (&logits, vocab), &rows)?;
        assert_same_draws(&sample(&mut cuda, (&logits, vocab), &rows)?, &theirs, &format!("{vocab} tokens"));
    }
    Ok(())
}

/// A chosen token's log-probability is that of its raw logit, wherever it stands among those with a bias or a count.
#[test]
fn what_is_said_of_a_chosen_token_leaves_its_bias_and_its_count_out() -> Result<()> {
    let Some(mut cuda) = cuda() else { return Ok(()) };
    let mut random = Random(14);
    let (n, vocab, adjusted) = (16, 300, 100);
    let logits = random.vec(n * vocab, 3.0);
    let mut rows_of = Vec::new();
    for chosen in 0..n as u32 {
        let chosen = chosen * 7 % adjusted;
        let mut counts = TokenCounts::of_prompt(&[]);
        (0..adjusted).chain([chosen; 3]).for_each(|token| counts.add(token));
        let bias = |token| LogitBias { token, bias: if token == chosen { 40.0 } else { 0.5 } };
        let greedy = SamplingParams { temperature: 0.0, logprobs: Some(1), ..Default::default() };
        let biased = SamplingParams { logit_bias: (0..adjusted).map(bias).collect(), ..greedy.clone() };
        rows_of.push((biased, None));
        rows_of.push((SamplingParams { frequency_penalty: -10.0, ..greedy }, Some(counts)));
    }
    for half in rows_of.chunks(n) {
        let rows: Vec<SampleRow> = half
            .iter()
            .map(|(params, counts)| SampleRow {
                params,
                counts: counts.as_ref(),
                drafted: &[],
                position: 3,
                mask: None,
                forced: None,
            })
            .collect();
        let theirs = sample(&mut Reference::new(), (&logits, vocab), &rows)?;
        assert!(theirs.iter().all(|row| row.token < adjusted));
        assert_same_draws(&sample(&mut cuda, (&logits, vocab), &rows)?, &theirs, "adjusted");
    }
    Ok(())
}

#[test]
fn bad_rows_are_faults_of_their_own_and_many_alternatives_come_from_the_host() -> Result<()> {
    let Some(mut cuda) = cuda() else { return Ok(()) };
    let mut random = Random(13);
    let vocab = 200;
    let mut logits = random.vec(5 * vocab, 5.0);
    logits[17] = f32::NAN;
    logits[vocab + 3] = f32::INFINITY;
    logits[2 * vocab + 5] = f32::NEG_INFINITY;
    let params = SamplingParams { logprobs: Some(2), ..Default::default() };
    let greedy = SamplingParams { temperature: 0.0, ..Default::default() };
    let nothing = [0u32; 7];
    let row =
        |params| SampleRow { params, counts: None, drafted: &[], position: 3, mask: None, forced: None };
    let blocked = SampleRow { mask: Some(&nothing), ..row(&greedy) };
    let rows = [row(&params), row(&params), row(&params), blocked, row(&greedy)];
    let theirs = sample(&mut Reference::new(), (&logits, vocab), &rows)?;
    let faults: Vec<bool> = theirs.iter().map(|s| s.fault.is_some()).collect();
    assert_eq!(faults, [true, true, false, true, false]);
    assert_same_draws(&sample(&mut cuda, (&logits, vocab), &rows)?, &theirs, "faults");

    let many = SamplingParams { logprobs: Some(100), ..Default::default() };
    let rows = [row(&many), row(&params)];
    let logits = (&logits[3 * vocab..], vocab);
    let theirs = sample(&mut Reference::new(), logits, &rows)?;
    assert_same_draws(&sample(&mut cuda, logits, &rows)?, &theirs, "many alternatives");
    assert!(sample(&mut cuda, logits, &rows[..1]).is_err());
    Ok(())
}

#[test]
fn blocks_leave_the_cache_and_come_back_elsewhere() -> Result<()> {
    let mut random = Random(14);
    let mut formats = Vec::new();
    for dtype in [KvDType::Bf16, KvDType::Fp8] {
        let Some(cuda) = cuda() else { return Ok(()) };
        let mut cuda = cuda.with_kv_dtype(dtype);
        let shape = shape(2, 2, 64);
        let mut cache = cuda.kv_cache(3, &shape, 4)?;
        let bytes: Vec<u8> = (0..3 * cuda.kv_block_bytes(&shape)).map(|_| random.next() as u8).collect();
        let mut found = vec![0; bytes.len()];
        cuda.write_kv_block(&mut cache, 3, &bytes)?;
        cuda.read_kv_block(&cache, 3, &mut found)?;
        assert!(found == bytes);
        cuda.read_kv_block(&cache, 2, &mut found)?;
        assert!(found.iter().all(|&b| b == 0), "a neighbour was written");
        // One behind the other, by the same stage.
        let other: Vec<u8> = bytes.iter().map(|byte| !byte).collect();
        cuda.write_kv_block(&mut cache, 1, &other)?;
        cuda.write_kv_block(&mut cache, 0, &bytes)?;
        for (block, expected) in [(1, &other), (0, &bytes), (3, &bytes)] {
            cuda.read_kv_block(&cache, block, &mut found)?;
            assert!(found == *expected, "block {block}");
        }
        assert!(cuda.read_kv_block(&cache, 4, &mut found).is_err());
        assert!(cuda.write_kv_block(&mut cache, 0, &bytes[1..]).is_err());
        formats.push((cuda.kv_format(), bytes.len()));
    }
    assert!(formats[0].0 != formats[1].0 && formats[0].1 == 2 * formats[1].1);
    Ok(())
}

#[test]
fn weights_of_wrong_shape_are_refused_by_name() {
    let Some(mut cuda) = cuda() else { return };
    let raw = |name: &str, shape: &[usize]| {
        RawTensor::from_f32(name, shape.to_vec(), &vec![0.0; shape.iter().product()])
    };
    let good = [raw("good", &[6, 8])];
    let refusals = [
        cuda.load_matrix(&[raw("good", &[6, 8]), raw("bad", &[6, 9])]).err(),
        cuda.load_matrix(&[raw("bad", &[8])]).err(),
        cuda.load_matrix(&[raw("bad", &[2, 3, 4])]).err(),
        cuda.load_embedding(&raw("bad", &[8])).err(),
        cuda.load_vector(&[raw("good", &[8]), raw("bad", &[8, 1])]).err(),
        cuda.load_experts(&ExpertWeights::plain(&good, &[raw("bad", &[6, 7])], &[raw("good", &[8, 6])]))
            .err(),
        cuda.load_experts(&ExpertWeights::plain(&good, &good, &[raw("bad", &[6, 8])])).err(),
    ];
    for error in refusals {
        assert!(matches!(&error, Some(OpError::Shape { name, .. }) if name == "bad"), "{error:?}");
    }
}

#[test]
fn steps_that_do_not_fit_are_errors() -> Result<()> {
    let Some(mut b) = cuda() else { return Ok(()) };
    let shape = AttentionShape { heads: 2, kv_heads: 1, head_dim: 4, scale: 1.0 };
    let table = b.load_embedding(&RawTensor::from_f32("table", vec![3, 16], &[0.5; 48]))?;
    let mut cache = b.kv_cache(2, &shape, 4)?;
    let (mut qkv, mut out) = (b.tensor(2, 16)?, b.tensor(2, 8)?);
    let mut step = |b: &mut Cuda, tokens: &[u32], block, layer| {
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
    b.synchronize()?;
    let mut batch = plain_batch(2);
    batch.spans[0].context = 40;
    assert!(b.begin(&batch).is_err());
    assert!(b.kv_cache(usize::MAX / 2, &shape, 64).is_err());
    assert!(b.kv_cache(1 << 20, &shape, 1 << 40).is_err());
    Ok(())
}

/// A decode step that comes again runs as a CUDA graph where there is a GPU, with cuBLASLt's product in it, and makes the same.
#[test]
fn decode_steps_that_come_again_are_graphs() -> Result<()> {
    const ROWS: u32 = 20;
    let Some(mut cuda) = cuda() else { return Ok(()) };
    let mut random = Random(38);
    let table = RawTensor::from_f32("table", vec![50, 64], &random.vec(50 * 64, 1.0));
    let table = cuda.load_embedding(&table)?;
    let weight = vector(&mut cuda, &random.vec(64, 2.0))?;
    let w = cuda.load_matrix(&[matrix("w", 33, &random.exact(33 * 64, 1.0))])?;
    let rows = ROWS as usize;
    let (mut x, mut normed, mut out) =
        (cuda.tensor(rows, 64)?, cuda.tensor(rows, 64)?, cuda.tensor(rows, 33)?);
    let mut found = Vec::new();
    for _ in 0..4 {
        let mut batch = Batch::default();
        (0..ROWS).for_each(|row| batch.push(&[2 * row], 0, &[row], 1));
        cuda.begin(&batch)?;
        cuda.embed(&table, &mut x)?;
        cuda.rms_norm(&mut x, None, &weight, 1e-6, &mut normed)?;
        cuda.linear(&normed, &w, None, &mut out)?;
        cuda.end()?;
        found.push(bits(&cuda.to_host(&out)?));
    }
    assert!(found[0].iter().any(|&bits| bits != 0) && found.iter().all(|bits| *bits == found[0]));
    assert_eq!(cuda.graphs(), usize::from(on_gpu(&cuda)));
    Ok(())
}

/// Runs `work` on a thread for each of several ranks that add up in each other's memory, on one GPU where there is one, from the next step
/// on. Between the two meetings of the barrier nothing may be allocated or given back there, which could wait for kernels that wait.
fn on_ranks<T: Send>(
    world: usize,
    access: PeerAccess,
    work: impl Fn(&mut Cuda, usize, &Barrier) -> Result<T> + Sync,
) -> Result<Option<Vec<T>>> {
    let (group, barrier, work) = (Group::new(world), &Barrier::new(world), &work);
    let cudas: Option<Vec<_>> = (0..world).map(|_| cuda()).collect();
    let Some(cudas) = cudas else { return Ok(None) };
    std::thread::scope(|scope| {
        let ranks = group.members().into_iter().zip(cudas).enumerate().map(|(rank, (member, cuda))| {
            let mut cuda = cuda.in_group_by(member, access);
            scope.spawn(move || {
                cuda.begin(&Batch::default())?;
                cuda.end()?;
                work(&mut cuda, rank, barrier)
            })
        });
        let ranks = ranks.collect::<Vec<_>>().into_iter();
        ranks.map(|rank| rank.join().expect("no rank panics")).collect::<Result<_>>().map(Some)
    })
}

/// What a rank adds: large and small numbers, whose sum depends on the order, and numbers that are none.
fn part(rank: usize, seed: u64, n: usize) -> Vec<f32> {
    let mut random = Random(100 * seed + rank as u64);
    let mut x = random.vec(n, 1.0);
    x.iter_mut().for_each(|x| *x *= 10f32.powi(random.below(60) as i32 - 30));
    for (i, value) in [f32::INFINITY, f32::MAX, f32::MIN_POSITIVE / 8.0, -0.0].into_iter().enumerate() {
        if rank == 1 && n > 50 {
            x[10 * i] = value;
        }
    }
    x
}

fn added(parts: &[Vec<f32>]) -> Vec<f32> {
    let mut sum = parts[0].clone();
    parts[1..].iter().for_each(|part| sum.iter_mut().zip(part).for_each(|(sum, x)| *sum += x));
    sum
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Ranks that add up in their own order, and such as have a switch add up.
const RANKS: [(usize, PeerAccess); 8] = [
    (2, PeerAccess::Always),
    (3, PeerAccess::Always),
    (4, PeerAccess::Always),
    (8, PeerAccess::Always),
    (2, PeerAccess::Multicast),
    (3, PeerAccess::Multicast),
    (4, PeerAccess::Multicast),
    (8, PeerAccess::Multicast),
];

/// Whether a sum is right to so many roundings, in whatever order it was taken.
fn is_sum(sum: f32, parts: impl Iterator<Item = f32> + Clone) -> bool {
    let (exact, magnitude) = parts.clone().fold((0.0, 0.0), |(sum, magnitude), part| {
        (sum + f64::from(part), magnitude + f64::from(part).abs())
    });
    let tolerance = parts.count() as f64 * magnitude / f64::from(1 << 24);
    f64::from(sum) == exact || (f64::from(sum) - exact).abs() <= tolerance
}

/// One shot and two, messages that take several launches, all in one step: bit for bit what the host would add up. Through the switch, if there
/// is one: the same bits everywhere.
#[test]
fn sums_over_ranks_are_those_of_the_host_on_every_rank() -> Result<()> {
    for (world, access) in RANKS {
        let mut shapes = vec![(1, 1), (3, 33), (1, 4096), (5, 896), (64, 8201)];
        shapes.extend((world == 2).then_some((2, 1_100_001)));
        let ranks = on_ranks(world, access, |cuda, rank, barrier| {
            let parts = shapes
                .iter()
                .zip(0..)
                .map(|(&(rows, width), seed)| upload(cuda, (&part(rank, seed, rows * width), width)));
            let mut parts = parts.collect::<Result<Vec<_>>>()?;
            barrier.wait();
            for part in &mut parts {
                cuda.all_reduce(part)?;
            }
            cuda.synchronize()?;
            barrier.wait();
            parts.iter().map(|part| cuda.to_host(part)).collect::<Result<Vec<_>>>()
        })?;
        let Some(ranks) = ranks else { return Ok(()) };
        for (i, (rows, width)) in shapes.into_iter().enumerate() {
            let parts: Vec<_> = (0..world).map(|rank| part(rank, i as u64, rows * width)).collect();
            let expected = match access {
                PeerAccess::Multicast => &ranks[0][i],
                _ => &added(&parts),
            };
            for (rank, found) in ranks.iter().enumerate() {
                let what = format!("{world} ranks, [{rows}, {width}] on rank {rank}");
                assert!(bits(&found[i]) == bits(expected), "{what}");
            }
            for (j, &sum) in expected.iter().enumerate() {
                assert!(is_sum(sum, parts.iter().map(|part| part[j])), "{world} ranks, element {j}: {sum}");
            }
        }
    }
    Ok(())
}

#[test]
fn sums_over_ranks_are_normed_as_by_two_ops() -> Result<()> {
    // Blocks without a row and with several; rows that a thread holds whole, and such as are left to two ops.
    let shapes =
        [(1, 4), (1, 64), (7, 896), (70, 132), (2, 4096), (1, 16384), (1, 16388), (3, 2050), (300, 8)];
    for (world, access) in RANKS {
        let scale = [1.0, 1e-18, 1e15][world % 3];
        let random = |seed: usize, n: usize| Random(seed as u64).vec(n, scale);
        let ranks = on_ranks(world, access, |cuda, rank, barrier| {
            let mut all = Vec::new();
            for (i, (rows, width)) in shapes.into_iter().enumerate() {
                let x = upload(cuda, (&random(i, rows * width), width))?;
                let delta = upload(cuda, (&random(1000 + 10 * i + rank, rows * width), width))?;
                all.push((x, delta, vector(cuda, &random(500 + i, width))?, cuda.tensor(rows, width)?));
            }
            barrier.wait();
            for (x, delta, weight, out) in &mut all {
                cuda.reduce_norm(x, delta, weight, 1e-6, out)?;
            }
            cuda.synchronize()?;
            barrier.wait();
            all.iter()
                .map(|(x, _, _, out)| Ok([cuda.to_host(x)?, cuda.to_host(out)?]))
                .collect::<Result<Vec<_>>>()
        })?;
        let Some(ranks) = ranks else { return Ok(()) };
        for (i, (rows, width)) in shapes.into_iter().enumerate() {
            let deltas: Vec<_> = (0..world).map(|rank| random(1000 + 10 * i + rank, rows * width)).collect();
            let mut reference = Reference::new();
            let mut x = upload(&mut reference, (&random(i, rows * width), width))?;
            let delta = upload(&mut reference, (&added(&deltas), width))?;
            let weight = vector(&mut reference, &random(500 + i, width))?;
            let mut out = reference.tensor(rows, width)?;
            reference.rms_norm(&mut x, Some(&delta), &weight, 1e-6, &mut out)?;
            let expected = [reference.to_host(&x)?, reference.to_host(&out)?];
            for found in &ranks {
                let what = format!("{world} ranks, [{rows}, {width}], {access:?}");
                if access == PeerAccess::Multicast {
                    let largest = |x: &[f32]| x.iter().fold(0f32, |a, x| a.max(x.abs()));
                    assert_close(&found[i][0], &expected[0], 1e-6, largest(&expected[0]), &what);
                    assert_close(&found[i][1], &expected[1], BF16, largest(&expected[1]) * 1e-3, &what);
                } else {
                    assert_eq!(found[i][0], expected[0], "{what}: the residual stream");
                    assert_close(&found[i][1], &expected[1], BF16, 1e-30, &what);
                }
                for part in 0..2 {
                    assert_eq!(bits(&found[i][part]), bits(&ranks[0][i][part]), "{what}");
                }
            }
        }
    }
    Ok(())
}

/// The norm of the ranks' sum puts out rows in FP8 beside bf16: bit for bit what a product makes of the same rows in bf16. Blocks of 128 that are
/// half there, several rows a block, threads that hold two vectors and such as hold none; rows of zeros and of large numbers.
#[test]
fn norms_of_sums_over_ranks_round_to_fp8_as_is_done_after_them() -> Result<()> {
    let shapes = [(16, 64), (17, 64), (70, 320), (18, 2240)];
    for (world, access) in [RANKS[0], RANKS[1], RANKS[6]] {
        let ranks = on_ranks(world, access, |cuda, rank, barrier| {
            let rounds = cuda.set_fp8_products(true).is_ok();
            let mut all = Vec::new();
            for (i, (rows, width)) in shapes.into_iter().enumerate() {
                let mut random = Random(40 + i as u64);
                let w = cuda.load_matrix(&[fp8_matrix(&mut random, "w", [24, width], Scales::Rows)])?;
                let mut weight = vector(cuda, &random.vec(width, 2.0))?;
                Cuda::norm_feeds(&mut weight, &w);
                let scaled = |random: &mut Random| {
                    let mut data = random.vec(rows * width, 2.0);
                    data[..width].fill(0.0);
                    data[width..][..width / 2].iter_mut().for_each(|x| *x *= 1e15);
                    data
                };
                let x = upload(cuda, (&scaled(&mut random), width))?;
                let delta = upload(cuda, (&scaled(&mut Random(60 + rank as u64)), width))?;
                all.push((x, delta, weight, w, cuda.tensor(rows, width)?, cuda.tensor(rows, 24)?));
            }
            barrier.wait();
            for (x, delta, weight, w, made, out) in &mut all {
                cuda.reduce_norm(x, delta, weight, 1e-6, made)?;
                cuda.linear(made, w, None, out)?;
            }
            cuda.synchronize()?;
            barrier.wait();
            for ((.., w, made, out), (rows, width)) in all.iter_mut().zip(shapes) {
                let found = cuda.to_host(out)?;
                let plain = cuda.to_host(made)?;
                let plain = upload(cuda, (&plain, width))?;
                cuda.linear(&plain, w, None, out)?;
                let what = format!("{world} ranks, {access:?}, [{rows}, {width}]");
                assert!(!rounds || bits(&found) == bits(&cuda.to_host(out)?), "{what}");
            }
            Ok(())
        })?;
        if ranks.is_none() {
            return Ok(());
        }
    }
    Ok(())
}

/// In decode steps all ranks embed the tokens that the first is told, whatever they are: more rows than blocks of the kernel, and fewer.
#[test]
fn ranks_embed_the_tokens_of_the_first_in_decode_steps() -> Result<()> {
    const ROWS: [usize; 6] = [1, 7, 64, 65, 1, 150];
    let table = RawTensor::from_f32("table", vec![50, 33], &Random(9).vec(50 * 33, 1.0));
    let token = |rank: usize, row: usize| ((31 * row + 7 + 11 * rank) % 50) as u32;
    for (world, access) in [RANKS[0], RANKS[1], RANKS[6], RANKS[3]] {
        let ranks = on_ranks(world, access, |cuda, rank, barrier| {
            let table = cuda.load_embedding(&table)?;
            let mut outs = ROWS.map(|rows| cuda.tensor(rows, 33)).into_iter().collect::<Result<Vec<_>>>()?;
            cuda.begin(&plain_batch(150))?;
            cuda.end()?;
            barrier.wait();
            for (rows, out) in ROWS.into_iter().zip(&mut outs) {
                let mut batch = Batch::default();
                (0..rows).for_each(|row| batch.push(&[token(rank, row)], 0, &[0], 1));
                cuda.begin(&batch)?;
                cuda.embed(&table, out)?;
                cuda.end()?;
            }
            cuda.synchronize()?;
            barrier.wait();
            outs.iter().map(|out| cuda.to_host(out)).collect::<Result<Vec<_>>>()
        })?;
        let Some(ranks) = ranks else { return Ok(()) };
        let values: Vec<f32> = Random(9).vec(50 * 33, 1.0);
        for (rank, found) in ranks.iter().enumerate() {
            for (rows, found) in ROWS.into_iter().zip(found) {
                let row = |row| values[33 * token(0, row) as usize..][..33].to_vec();
                let expected: Vec<f32> = (0..rows).flat_map(row).collect();
                assert_eq!(*found, expected, "{world} ranks, {access:?}, {rows} rows on rank {rank}");
            }
        }
    }
    Ok(())
}

/// Parts of uneven widths, in one launch and in several.
#[test]
fn parts_of_ranks_are_gathered_side_by_side_on_the_first() -> Result<()> {
    for (world, rows, width) in [(2, 1, 3), (3, 70, 1), (4, 9, 257), (8, 2, 1000), (2, 5, 900_000)] {
        let width = |rank: usize| width + rank % 3;
        let total = (0..world).map(width).sum::<usize>();
        let values =
            |rank: usize, round: usize| Random((10 * round + rank) as u64).vec(rows * width(rank), 1.0);
        let ranks = on_ranks(world, PeerAccess::Always, |cuda, rank, barrier| {
            let parts = (0..2).map(|round| upload(cuda, (&values(rank, round), width(rank))));
            let parts = parts.collect::<Result<Vec<_>>>()?;
            let mut wholes = (0..2)
                .map(|_| (rank == 0).then(|| cuda.tensor(rows, total)).transpose())
                .collect::<Result<Vec<_>>>()?;
            barrier.wait();
            for (part, whole) in parts.iter().zip(&mut wholes) {
                cuda.gather_columns(part, whole.as_mut())?;
            }
            barrier.wait();
            wholes.iter().flatten().map(|whole| cuda.to_host(whole)).collect::<Result<Vec<_>>>()
        })?;
        let Some(ranks) = ranks else { return Ok(()) };
        assert!(ranks[0].len() == 2 && ranks[1..].iter().all(Vec::is_empty));
        for (round, found) in ranks[0].iter().enumerate() {
            let parts: Vec<_> = (0..world).map(|rank| values(rank, round)).collect();
            let row =
                |row: usize| (0..world).flat_map(move |rank| row * width(rank)..(row + 1) * width(rank));
            let of = (0..world).flat_map(|rank| std::iter::repeat_n(rank, width(rank)));
            for r in 0..rows {
                for ((rank, i), found) in of.clone().zip(row(r)).zip(&found[r * total..]) {
                    assert_eq!(*found, parts[rank][i], "{world} ranks, row {r}, rank {rank}");
                }
            }
        }
    }
    Ok(())
}
