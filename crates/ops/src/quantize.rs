//! Numbers to FP8 with a scale for each row of a matrix, for weights that a GPU is to read at half their bytes.

use crate::dequant::dequantize;
use crate::fp8::{BLOCK_BYTES, BLOCK_LEN};
use crate::{DType, RawTensor};
use std::sync::Arc;
use std::thread;

/// The largest number of the format.
const LARGEST: f32 = 448.0;

/// The byte of the number that is nearest to `x`, of two as near the even one; what is larger than the largest becomes that.
fn nearest(x: f32) -> u8 {
    let magnitude = x.abs().min(LARGEST);
    // Adding it leaves as many bits behind the point as the format has there, rounded as f32 rounds.
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(-6);
    let shift = f32::from_bits(((exponent + 20 + 127) as u32) << 23);
    let rounded = (magnitude + shift) - shift;
    let bits = rounded.to_bits();
    let byte = match rounded < 0.015_625 {
        true => (rounded * 512.0) as u32,
        false => (bits >> 20) - (120 << 3),
    };
    byte as u8 | if x.is_sign_negative() { 0x80 } else { 0 }
}

impl RawTensor {
    /// The matrix as FP8, each row scaled so that its largest magnitude is the format's. `None` if it is not stored as plain numbers, is no
    /// matrix, its width is not a whole number of blocks, or it holds what is not finite.
    pub fn to_fp8(&self) -> Option<RawTensor> {
        let &[rows, width] = self.shape.as_slice() else { return None };
        if self.dtype.block_len() != 1 || !width.is_multiple_of(BLOCK_LEN) || self.elements() == 0 {
            return None;
        }
        let (from, to) = (width * self.dtype.block_bytes(), width / BLOCK_LEN * BLOCK_BYTES);
        let mut out = vec![0u8; rows * to];
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let share = rows.div_ceil(threads);
        let parts = self.bytes().chunks(share * from).zip(out.chunks_mut(share * to));
        let finite = thread::scope(|scope| {
            let parts = parts.map(|(bytes, out)| {
                scope.spawn(move || {
                    let mut wide = vec![0.0; width];
                    bytes.chunks_exact(from).zip(out.chunks_exact_mut(to)).all(|(bytes, out)| {
                        dequantize(self.dtype, bytes, &mut wide);
                        row(&wide, out)
                    })
                })
            });
            let parts: Vec<_> = parts.collect();
            parts.into_iter().all(|part| part.join().unwrap_or(false))
        });
        let name = format!("{} to FP8", self.name);
        finite.then(|| RawTensor::new(name, self.shape.clone(), DType::F8_E4M3, Arc::new(out), 0))?
    }
}

/// A row in blocks of one scale; false if it holds what is not finite.
fn row(numbers: &[f32], out: &mut [u8]) -> bool {
    let largest = numbers.iter().fold(0f32, |a, x| a.max(x.abs()));
    if !numbers.iter().all(|x| x.is_finite()) {
        return false;
    }
    // A row of zeros, or of numbers so small that a scale would be none, has zeros.
    let scale = if largest / LARGEST >= f32::MIN_POSITIVE { largest / LARGEST } else { 1.0 };
    for (numbers, out) in numbers.chunks_exact(BLOCK_LEN).zip(out.chunks_exact_mut(BLOCK_BYTES)) {
        out[..4].copy_from_slice(&scale.to_le_bytes());
        for (x, out) in numbers.iter().zip(&mut out[4..]) {
            *out = nearest(x / scale);
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fp8;

    #[test]
    fn the_nearest_number_is_found_and_of_two_the_even_one() {
        let numbers = &fp8::NUMBERS[..127];
        for (code, pair) in numbers.windows(2).enumerate() {
            let (below, above) = (code as u8, code as u8 + 1);
            let halfway = (pair[0] + pair[1]) / 2.0;
            let even = if below.is_multiple_of(2) { below } else { above };
            let quarter = (pair[1] - pair[0]) / 4.0;
            let cases = [
                (pair[0], below),
                (pair[1], above),
                (halfway, even),
                (halfway - quarter, below),
                (halfway + quarter, above),
            ];
            for (x, byte) in cases {
                assert_eq!((nearest(x), nearest(-x)), (byte, byte | 0x80), "{x}");
            }
        }
        assert_eq!((nearest(1e9), nearest(-449.0), nearest(1e-30), nearest(0.0)), (0x7e, 0xfe, 0, 0));
    }

    #[test]
    fn a_row_keeps_its_largest_number_and_the_others_within_a_sixteenth() {
        let numbers: Vec<f32> =
            (0..2 * 128).map(|i| (i as f32 - 100.0) * 0.01 * (1.0 + (i / 128) as f32)).collect();
        let stored = RawTensor::from_f32("w", vec![2, 128], &numbers);
        let found = stored.to_fp8().expect("plain numbers");
        assert_eq!((found.dtype, &found.shape[..]), (DType::F8_E4M3, &[2, 128][..]));
        let mut wide = vec![0.0; 256];
        fp8::dequantize(found.bytes(), &mut wide);
        for (row, (wide, numbers)) in wide.chunks(128).zip(numbers.chunks(128)).enumerate() {
            let largest = numbers.iter().fold(0f32, |a, x| a.max(x.abs()));
            for (x, y) in wide.iter().zip(numbers) {
                let least = largest / 448.0 / 1024.0;
                assert!((x - y).abs() <= (y.abs() / 16.0 * 1.0001).max(least), "row {row}: {y} became {x}");
                assert!(y.abs() < largest || (x - y).abs() < 1e-6 * largest);
            }
        }
        let zeros = RawTensor::from_f32("w", vec![1, 64], &[0.0; 64]).to_fp8().expect("plain numbers");
        fp8::dequantize(zeros.bytes(), &mut wide[..64]);
        assert!(wide[..64].iter().all(|x| *x == 0.0));
    }

    #[test]
    fn what_cannot_be_fp8_is_left_alone() {
        assert!(RawTensor::from_f32("w", vec![2, 65], &[1.0; 130]).to_fp8().is_none());
        assert!(RawTensor::from_f32("w", vec![64], &[1.0; 64]).to_fp8().is_none());
        let mut numbers = [1.0; 128];
        numbers[70] = f32::INFINITY;
        assert!(RawTensor::from_f32("w", vec![2, 64], &numbers).to_fp8().is_none());
        numbers[70] = f32::NAN;
        assert!(RawTensor::from_f32("w", vec![2, 64], &numbers).to_fp8().is_none());
    }
}
