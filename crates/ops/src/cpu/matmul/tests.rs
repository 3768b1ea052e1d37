//! Tests of packing and of all kernels against dequantised weights, and of bit-for-bit repetition.

use super::*;
use crate::cpu::simd::Level;
use crate::dequant::dequantize;
use crate::mxfp4;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use half::{bf16, f16};
use std::sync::Arc;

const ALL: [DType; 14] = [
    DType::F32,
    DType::F16,
    DType::BF16,
    DType::Q4_0,
    DType::Q4_1,
    DType::Q5_0,
    DType::Q5_1,
    DType::Q8_0,
    DType::Q2_K,
    DType::Q3_K,
    DType::Q4_K,
    DType::Q5_K,
    DType::Q6_K,
    DType::MXFP4,
];

/// Numbers in -1 .. 1 from a counter (splitmix64).
fn random(count: usize, seed: u64) -> Vec<f32> {
    (0..count as u64)
        .map(|i| {
            let mut z = (seed << 32).wrapping_add(i).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ z >> 31) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// `data` stored as `dtype`.
fn tensor(dtype: DType, rows: usize, width: usize, data: &[f32]) -> RawTensor {
    let ggml = match dtype {
        DType::F32 => return RawTensor::from_f32("w", vec![rows, width], data),
        DType::F16 => {
            return raw(dtype, rows, width, data.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()));
        }
        DType::BF16 => {
            return raw(dtype, rows, width, data.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()));
        }
        DType::MXFP4 => return raw(dtype, rows, width, data.chunks_exact(32).flat_map(mxfp4_block)),
        DType::Q4_0 => GgmlDType::Q4_0,
        DType::Q4_1 => GgmlDType::Q4_1,
        DType::Q5_0 => GgmlDType::Q5_0,
        DType::Q5_1 => GgmlDType::Q5_1,
        DType::Q8_0 => GgmlDType::Q8_0,
        DType::Q2_K => GgmlDType::Q2K,
        DType::Q3_K => GgmlDType::Q3K,
        DType::Q4_K => GgmlDType::Q4K,
        DType::Q5_K => GgmlDType::Q5K,
        DType::Q6_K => GgmlDType::Q6K,
        other => unreachable!("{other:?} is widened before it is packed"),
    };
    let data = Tensor::from_slice(data, (rows, width), &Device::Cpu).unwrap();
    let quantised = QTensor::quantize(&data, ggml).unwrap();
    let bytes = quantised.data().unwrap().to_vec();
    raw(dtype, rows, width, bytes.into_iter())
}

/// The nearest codes under the least scale that holds the largest number.
fn mxfp4_block(data: &[f32]) -> [u8; 17] {
    let largest = data.iter().fold(0f32, |m, x| m.max(x.abs()));
    let exponent = (largest / 6.0).log2().ceil().clamp(-126.0, 127.0);
    let codes = std::array::from_fn(|i| {
        let x = data[i] / exponent.exp2();
        let distance = |code: &usize| ([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][*code] - x.abs()).abs();
        let nearest = (0..8).min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap_or(0);
        nearest as u8 | u8::from(x < 0.0) << 3
    });
    mxfp4::block((exponent + 127.0) as u8, &codes)
}

fn raw(dtype: DType, rows: usize, width: usize, bytes: impl Iterator<Item = u8>) -> RawTensor {
    RawTensor::new("w", vec![rows, width], dtype, Arc::new(bytes.collect::<Vec<u8>>()), 0).unwrap()
}

fn random_tensor(dtype: DType, rows: usize, width: usize, seed: u64) -> RawTensor {
    tensor(dtype, rows, width, &random(rows * width, seed))
}

/// Blocks of random bytes: every quant and scale there can be. Halves that are not finite are not
/// among them.
fn hostile_tensor(dtype: DType, rows: usize, width: usize, seed: u64) -> RawTensor {
    let bytes = dtype.bytes(rows * width).unwrap();
    let mut bytes: Vec<u8> = random(bytes, seed).iter().map(|v| (v * 128.0 + 128.0) as u8).collect();
    for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
        let halves: &[usize] = match dtype {
            DType::Q4_0 | DType::Q5_0 | DType::Q8_0 => &[0],
            DType::Q4_1 | DType::Q5_1 | DType::Q4_K | DType::Q5_K => &[0, 2],
            DType::Q2_K => &[80, 82],
            DType::Q3_K => &[108],
            DType::Q6_K => &[208],
            _ => &[],
        };
        for &at in halves {
            block[at + 1] = block[at + 1] % 16 + 32; // exponent around 2^-7, either quarter
        }
        if dtype == DType::MXFP4 {
            block[0] = if block[0] < 16 { 0 } else { block[0] % 32 + 100 };
        }
    }
    raw(dtype, rows, width, bytes.into_iter())
}

fn widen(w: &RawTensor) -> Vec<f32> {
    let mut out = vec![0.0; w.elements()];
    dequantize(w.dtype, w.bytes(), &mut out);
    out
}

fn run(isa: Isa, threads: usize, x: &[f32], rows: usize, w: &PackedMatrix, bias: Option<&[f32]>) -> Vec<f32> {
    let mut out = vec![f32::NAN; rows * w.rows()];
    matmul_on(isa, &Pool::new(threads), &mut Scratch::new(1, 32), Rows::from(x), rows, w, bias, &mut out);
    out
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Checks every output against a sum in f64. Quantised activations are off by at most half a step,
/// `absmax / 254` of their block of 32, bf16 ones by 2^-8 of themselves; on top of it f32 summation, here 1e-5
/// of the magnitudes.
fn check(w: &RawTensor, x: &[f32], bias: &[f32], out: &[f32]) {
    let [outputs, width] = w.shape[..] else { panic!() };
    let weights = widen(w);
    let w_dtype = w.dtype;
    for (row, out) in x.chunks_exact(width).zip(out.chunks_exact(outputs)) {
        for (o, y) in out.iter().enumerate() {
            let (mut sum, mut slack) = (f64::from(bias[o]), 1e-6);
            for (weights, x) in weights[o * width..][..width].chunks(32).zip(row.chunks(32)) {
                let step = x.iter().fold(0f32, |m, v| m.max(v.abs())) / 254.0;
                let largest = weights.iter().fold(0f32, |m, v| m.max(v.abs()));
                for (w, x) in weights.iter().zip(x) {
                    sum += f64::from(w * x);
                    slack += 1e-5 * f64::from(largest * x.abs());
                    slack += match w_dtype {
                        DType::F32 | DType::F16 => 0.0,
                        DType::BF16 => f64::from((w * x).abs()) / 256.0,
                        _ => 1.001 * f64::from(step * w.abs()),
                    };
                }
            }
            let error = (f64::from(*y) - sum).abs();
            assert!(
                error <= slack,
                "{:?} {outputs} x {width}, output {o}: {y}, expected {sum} +- {slack}",
                w.dtype
            );
        }
    }
}

#[test]
fn every_format_agrees_with_its_dequantised_weights_within_the_error_of_int8_activations() {
    for dtype in ALL {
        let widths: &[usize] = match dtype.block_len() {
            1 => &[1, 33, 64, 896],
            32 => &[32, 64, 896],
            _ => &[256, 1536],
        };
        for &width in widths {
            for (outputs, rows) in [(1, 1), (16, 2), (37, 5), (50, 12)] {
                let w = random_tensor(dtype, outputs, width, width as u64);
                let packed = PackedMatrix::pack(&Pool::new(2), std::slice::from_ref(&w)).unwrap();
                let (x, bias) = (random(rows * width, 1), random(outputs, 2));
                for isa in Isa::available() {
                    check(&w, &x, &bias, &run(isa, 2, &x, rows, &packed, Some(&bias)));
                }
            }
        }
    }
}

#[test]
fn every_unit_gives_the_portable_bits_for_every_quant_and_scale_there_can_be() {
    for dtype in ALL {
        let w = match dtype.block_len() {
            1 => random_tensor(dtype, 19, 512, 3),
            _ => hostile_tensor(dtype, 19, 512, 3),
        };
        let packed = PackedMatrix::pack(&Pool::new(1), std::slice::from_ref(&w)).unwrap();
        let mut x = random(14 * 512, 4);
        for (v, sign) in x.iter_mut().zip([1.0, -1.0].iter().cycle()).take(64) {
            *v = *sign; // all quants at their ends
        }
        let portable = run(Isa::Portable, 1, &x, 14, &packed, None);
        check(&w, &x, &[0.0; 19], &portable);
        for isa in Isa::available() {
            assert_eq!(bits(&run(isa, 1, &x, 14, &packed, None)), bits(&portable), "{dtype:?} {isa:?}");
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_batch_and_on_any_number_of_threads() {
    for dtype in ALL {
        let w = random_tensor(dtype, 75, 1536, 5);
        let packed = PackedMatrix::pack(&Pool::new(1), &[w]).unwrap();
        let x = random(64 * 1536, 6);
        let bias = random(75, 7);
        for isa in Isa::available() {
            let single: Vec<f32> =
                x.chunks_exact(1536).flat_map(|row| run(isa, 1, row, 1, &packed, Some(&bias))).collect();
            for rows in [1, 2, 3, 7, 17, 64] {
                for threads in [1, 2, 3] {
                    let out = run(isa, threads, &x[..rows * 1536], rows, &packed, Some(&bias));
                    assert_eq!(
                        bits(&out),
                        bits(&single[..rows * 75]),
                        "{dtype:?} {isa:?} {rows} rows, {threads}"
                    );
                }
            }
        }
    }
}

#[test]
fn stacked_parts_of_different_formats_give_what_each_gives_alone() {
    let parts = [
        random_tensor(DType::Q5_0, 20, 256, 8),
        random_tensor(DType::Q8_0, 7, 256, 9),
        random_tensor(DType::F32, 33, 256, 10),
        random_tensor(DType::Q6_K, 16, 256, 11),
    ];
    let pool = Pool::new(2);
    let (x, bias) = (random(3 * 256, 12), random(76, 13));
    let stacked = PackedMatrix::pack(&pool, &parts).unwrap();
    assert_eq!((stacked.rows(), stacked.width()), (76, 256));
    let mut out = vec![f32::NAN; 3 * 76];
    matmul(&pool, &mut Scratch::new(3, 256), Rows::from(&x[..]), 3, &stacked, Some(&bias), &mut out);
    let mut first = 0;
    for part in parts {
        let rows = part.shape[0];
        let alone = PackedMatrix::pack(&pool, &[part]).unwrap();
        let mut expected = vec![f32::NAN; 3 * rows];
        let bias = &bias[first..first + rows];
        matmul(&pool, &mut Scratch::new(3, 256), Rows::from(&x[..]), 3, &alone, Some(bias), &mut expected);
        for row in 0..3 {
            assert_eq!(bits(&out[row * 76 + first..][..rows]), bits(&expected[row * rows..][..rows]));
        }
        first += rows;
    }
}

#[test]
fn a_row_that_is_not_finite_harms_no_other_row() {
    for dtype in ALL {
        let packed = PackedMatrix::pack(&Pool::new(1), &[random_tensor(dtype, 24, 256, 14)]).unwrap();
        let clean = random(5 * 256, 15);
        for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = clean.clone();
            x[2 * 256 + 100] = poison;
            for isa in Isa::available() {
                let (out, expected) =
                    (run(isa, 1, &x, 5, &packed, None), run(isa, 1, &clean, 5, &packed, None));
                for row in [0, 1, 3, 4] {
                    let row = row * 24..row * 24 + 24;
                    assert_eq!(bits(&out[row.clone()]), bits(&expected[row]), "{dtype:?} {isa:?}");
                }
                assert!(out[48..72].iter().all(|v| !v.is_finite()), "{dtype:?} {isa:?}");
            }
        }
    }
}

#[test]
fn extreme_activations_stay_within_the_tolerance() {
    let w = random_tensor(DType::Q5_0, 17, 64, 16);
    let packed = PackedMatrix::pack(&Pool::new(1), std::slice::from_ref(&w)).unwrap();
    for scale in [0.0, 1e-20, 1e-3, 1e4, 1e30] {
        let mut x: Vec<f32> = random(3 * 64, 17).iter().map(|v| v * scale).collect();
        x[5] *= 1000.0; // an outlier costs its own block its precision, no other
        for isa in Isa::available() {
            check(&w, &x, &[0.0; 17], &run(isa, 1, &x, 3, &packed, None));
        }
    }
}

#[test]
fn shapes_that_do_not_fit_are_errors_that_name_the_tensor() {
    let pool = Pool::new(1);
    let parts = [random_tensor(DType::F32, 4, 64, 18), random_tensor(DType::F32, 4, 32, 19)];
    let error = PackedMatrix::pack(&pool, &parts).err().expect("widths differ");
    assert_eq!(error.to_string(), "tensor w: expected shape [outputs, 64], neither of them 0, found [4, 32]");
    assert!(PackedMatrix::pack(&pool, &[RawTensor::from_f32("v", vec![4], &[0.0; 4])]).is_err());
    assert!(PackedMatrix::pack(&pool, &[RawTensor::from_f32("v", vec![0, 4], &[])]).is_err());
    assert!(PackedMatrix::pack(&pool, &[]).is_err());
}

#[test]
fn packing_makes_no_format_much_larger() {
    for dtype in ALL {
        let w = random_tensor(dtype, 32, 512, 20);
        let packed = PackedMatrix::pack(&Pool::new(1), std::slice::from_ref(&w)).unwrap();
        let growth = packed.bytes() as f64 / w.bytes().len() as f64;
        let range = match dtype {
            DType::Q3_K => 1.0..1.34,
            DType::Q2_K => 1.0..1.20,
            DType::BF16 => 0.75..0.77,
            _ => 1.0..1.03,
        };
        assert!(range.contains(&growth), "{dtype:?}: {growth}");
    }
}

/// BF16 weights of which one in 400 is anything there can be: in every fifth output infinities and NaN too, in the others
/// zeros, subnormals and other numbers up to 2.
fn exceptional_tensor(rows: usize, width: usize) -> RawTensor {
    let values = random(rows * width, 21).into_iter().zip(random(rows * width, 22));
    let bytes = values.enumerate().flat_map(|(i, (value, pick))| {
        let any = (value.to_bits() >> 3) as u16 ^ (i as u16).wrapping_mul(0x9e37);
        let bits = match pick {
            0.995.. if i / width % 5 == 3 => any | if value < 0.0 { 0x7f80 } else { 0 },
            0.995.. => any & 0xbfff,
            _ => bf16::from_f32(value).to_bits(),
        };
        bits.to_le_bytes()
    });
    raw(DType::BF16, rows, width, bytes)
}

#[test]
fn compact_weights_give_the_bits_of_plain_ones() {
    let pool = Pool::new(2);
    let all = &[1, 2, 3, 4, 11, 12, 29, 250][..];
    // Of the last each piece of work has more tiles than a group.
    for (outputs, width, row_counts) in
        [(50, 896, all), (37, 1536, all), (16, 1000, all), (48, 512, all), (400, 6000, &[29])]
    {
        let w = exceptional_tensor(outputs, width);
        let part = Part::plain(&pool, &w, outputs, width).unwrap();
        let plain = PackedMatrix { rows: outputs, width, parts: vec![part] };
        let compact = PackedMatrix::pack(&pool, &[w]).unwrap();
        let patches = compact.parts[0].patches.as_ref().expect("few exceptions");
        assert!(patches.len() > outputs.div_ceil(LANES) + 5, "{outputs} x {width}: no patches");
        let bias = random(outputs, 23);
        for &rows in row_counts {
            let x = random(rows * width, 24);
            for isa in Isa::available() {
                if rows == 250 && isa == Isa::Portable {
                    continue; // slow, and a loop of its own on no other path
                }
                // Which NaN comes out is the compiler's choice, for it may swap the operands of a sum.
                let one_nan = |&v: &f32| if v.is_nan() { f32::NAN.to_bits() } else { v.to_bits() };
                let same = |out: &[f32]| out.iter().map(one_nan).collect::<Vec<u32>>();
                let expected = run(isa, 1, &x, rows, &plain, Some(&bias));
                assert!(expected.iter().any(|v| v.is_nan()) && expected.iter().any(|v| v.is_finite()));
                for threads in [1, 2, 3] {
                    let out = run(isa, threads, &x, rows, &compact, Some(&bias));
                    assert_eq!(
                        same(&out),
                        same(&expected),
                        "{outputs} x {width}, {rows} rows, {isa:?}, {threads}"
                    );
                }
            }
        }
    }
}

#[test]
fn every_bf16_there_is_comes_back_from_the_compact_form() {
    let width = 4096;
    // Rows of all, in an order that mixes their high bytes.
    let all: Vec<u8> = (0..=u16::MAX).flat_map(|i| i.wrapping_mul(0x9e37).to_le_bytes()).collect();
    for present in [16, 11] {
        let rows: Vec<&[u8]> = all.chunks_exact(2 * width).take(present).collect();
        let mut plain = vec![0; tile_bytes(DType::BF16, width)];
        pack::pack_tile(DType::BF16, &rows, &mut plain);
        let table = Table::of(&rows);
        let (mut tile, mut patches) = (vec![0; compact::tile_bytes(width)], vec![7; 3 + table.patches()]);
        table.pack(&plain, 3, &mut tile, &mut patches[3..]);
        let (mut back, row) = (vec![1; plain.len()], vec![0; width / 2]);
        // SAFETY: the tile and the row are of this width, and what comes back has room for the tile's plain form.
        unsafe {
            let (x, back) = (row.as_ptr(), Some(back.as_mut_ptr()));
            super::bf16::compact_rows::<unit::Portable, 1>(tile.as_ptr(), &patches, x, width / 2, 0, back);
        }
        assert!(back == plain);
    }
}

#[test]
fn weights_with_no_compact_form_stay_plain() {
    let pool = Pool::new(1);
    let exponents = (0..64 * 64u32).flat_map(|i| (i as u16).wrapping_mul(0x9e37).to_le_bytes());
    let exponents = raw(DType::BF16, 64, 64, exponents);
    let odd = random_tensor(DType::BF16, 64, 60, 25);
    for w in [exponents, odd] {
        let packed = PackedMatrix::pack(&pool, std::slice::from_ref(&w)).unwrap();
        assert!(packed.parts[0].patches.is_none());
        assert_eq!(packed.bytes(), w.bytes().len());
    }
}

#[test]
fn gate_and_up_in_one_pass_give_the_bits_that_they_give_one_by_one() {
    let pool = Pool::new(2);
    let clamped = Activation::ClampedSwiglu { alpha: 1.702, limit: 0.5 };
    // Compact tiles, plain ones, and one of both; of the last, more tiles than a group holds; rows that leave some over.
    for (outputs, width, compact) in [
        (48, 896, [true, true]),
        (320, 64, [false, false]),
        (16, 512, [true, false]),
        (80, 33, [false, false]),
        (272, 2600, [true, false]),
    ] {
        let part = |seed: u64, compact: bool| {
            let w = random_tensor(DType::BF16, outputs, width, seed);
            let part =
                if compact { Part::pack(&pool, &w, width) } else { Part::plain(&pool, &w, outputs, width) };
            let part = part.unwrap();
            assert_eq!(part.patches.is_some(), compact);
            part
        };
        let parts = vec![part(30, compact[0]), part(31, compact[1])];
        let w = PackedMatrix { rows: 2 * outputs, width, parts };
        let biases = random(2 * outputs, 32);
        for (rows, activation, bias) in
            [(12, Activation::Silu, None), (29, clamped, Some(&biases[..])), (250, Activation::Silu, None)]
        {
            let x = random(rows * width, 33);
            let mut activated = vec![0.0; rows * outputs];
            let both = run(Isa::Portable, 1, &x, rows, &w, bias);
            crate::cpu::activation::gated(&pool, Level::detect(), activation, &both, outputs, &mut activated);
            let mut expected = vec![0; rows * outputs / 2];
            quantize::to_bf16(&activated, outputs, &mut expected);
            for isa in Isa::available() {
                for threads in [1, 3] {
                    let mut scratch = Scratch::new(1, 32);
                    let x = Rows::from(&x[..]);
                    gated(isa, &Pool::new(threads), &mut scratch, activation, x, rows, &w, bias);
                    let found = &scratch.gated[..expected.len()];
                    assert!(
                        found == expected,
                        "{outputs} x {width}, {rows} rows, {isa:?}, {threads} threads"
                    );
                }
            }
        }
    }
}
