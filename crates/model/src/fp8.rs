//! FP8 checkpoints: matrices of E4M3 with a scale for the whole or for each block of it, widened to BF16 as they are read.
//!
//! The number format: Micikevicius et al. 2022 (arXiv:2209.05433), without infinities. Beside `X.weight` lies what it is multiplied
//! with: `X.weight_scale_inv`, one number for each block (DeepSeek-V3's layout, arXiv:2412.19437, section 3.3; Qwen3's FP8 checkpoints),
//! or `X.weight_scale`, one for the matrix or for each row of it. What a checkpoint says of activations is left aside: they are not
//! rounded to FP8.

use std::sync::Arc;
use std::thread;

use half::bf16;
use rudder_ops::dequant::dequantize;
use rudder_ops::{DType, RawTensor};
use safetensors::Dtype;

use crate::LoadError;
use crate::safetensors::Checkpoint;

/// Every number that a byte may stand for.
const NUMBERS: [f32; 256] = {
    let mut numbers = [0.0; 256];
    let mut byte = 0;
    while byte < 256 {
        numbers[byte] = number(byte as u32);
        byte += 1;
    }
    numbers
};

/// A sign, four bits of exponent with bias 7 and three of mantissa.
const fn number(byte: u32) -> f32 {
    let (sign, exponent, mantissa) = (byte >> 7, byte >> 3 & 15, byte & 7);
    let magnitude = match (exponent, mantissa) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa as f32 / 512.0,
        _ => f32::from_bits((exponent + 120) << 23 | mantissa << 20),
    };
    if sign == 1 { -magnitude } else { magnitude }
}

/// A matrix's scales: one for each block of `block` rows and columns.
struct Scales {
    values: Vec<f32>,
    /// Blocks in a row.
    columns: usize,
    block: [usize; 2],
}

/// The tensor `name` as BF16. `block` is the size of a block where the checkpoint has scales for blocks.
///
/// # Errors
/// If it is no matrix, or its scales are missing or do not fit it.
pub(crate) fn widened(
    checkpoint: &Checkpoint,
    name: &str,
    block: [usize; 2],
) -> Result<RawTensor, LoadError> {
    let invalid = |reason: String| LoadError::invalid(checkpoint.folder(), format!("tensor {name} {reason}"));
    let (shape, bytes) = checkpoint.bytes(name, Dtype::F8_E4M3)?;
    let &[rows, width] = shape else {
        return Err(invalid(format!("is FP8 of shape {shape:?}; expected two dimensions")));
    };
    let scales = scales(checkpoint, name, [rows, width], block)?;
    let mut out = vec![0u8; 2 * bytes.len()];
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let share = rows.div_ceil(threads).max(1);
    thread::scope(|scope| {
        let parts = bytes.chunks((share * width).max(1)).zip(out.chunks_mut((2 * share * width).max(1)));
        for (part, (bytes, out)) in parts.enumerate() {
            let scales = &scales;
            scope.spawn(move || widen(bytes, scales, part * share, width, out));
        }
    });
    // A name of its own: the checkpoint's pages are not where this lies.
    let name = format!("{name} as BF16");
    RawTensor::new(name, vec![rows, width], DType::BF16, Arc::new(out), 0)
        .ok_or_else(|| invalid(format!("of shape {shape:?} is too large")))
}

/// Rows from `first` on.
fn widen(bytes: &[u8], scales: &Scales, first: usize, width: usize, out: &mut [u8]) {
    let [block_rows, block_width] = scales.block;
    for (row, (bytes, out)) in bytes.chunks_exact(width).zip(out.chunks_exact_mut(2 * width)).enumerate() {
        let scales = &scales.values[(first + row) / block_rows * scales.columns..][..scales.columns];
        let blocks = bytes.chunks(block_width).zip(out.chunks_mut(2 * block_width));
        for ((bytes, out), scale) in blocks.zip(scales) {
            for (byte, out) in bytes.iter().zip(out.chunks_exact_mut(2)) {
                let product = bf16::from_f32(NUMBERS[usize::from(*byte)] * scale);
                out.copy_from_slice(&product.to_le_bytes());
            }
        }
    }
}

/// The scales beside a matrix.
fn scales(
    checkpoint: &Checkpoint,
    name: &str,
    [rows, width]: [usize; 2],
    block: [usize; 2],
) -> Result<Scales, LoadError> {
    let inverse = format!("{name}_scale_inv");
    let tensor = match checkpoint.contains(&inverse) {
        true => checkpoint.tensor(&inverse)?,
        false => checkpoint.tensor(&format!("{name}_scale"))?,
    };
    let grid = [rows.div_ceil(block[0]), width.div_ceil(block[1])];
    let (block, columns) = match tensor.shape[..] {
        _ if tensor.elements() == 1 => ([rows, width], 1),
        [n] | [n, 1] if n == rows => ([1, width], 1),
        [n, m] if [n, m] == grid => (block, m),
        _ => {
            let reason = format!(
                "tensor {} has shape {:?}; [{rows}, {width}] in blocks of {block:?} asks for {grid:?}",
                tensor.name, tensor.shape
            );
            return Err(LoadError::invalid(checkpoint.folder(), reason));
        }
    };
    let mut values = vec![0.0; tensor.elements()];
    dequantize(tensor.dtype, tensor.bytes(), &mut values);
    Ok(Scales { values, columns, block })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_stand_for_the_numbers_of_the_format() {
        // Table 1 of the format's paper: the largest, the least normal one, the subnormal ones' ends, and what is no number.
        for (byte, value) in [
            (0x00, 0.0),
            (0x01, 0.001_953_125),
            (0x07, 0.013_671_875),
            (0x08, 0.015_625),
            (0x38, 1.0),
            (0x7e, 448.0),
        ] {
            assert_eq!(NUMBERS[byte], value, "{byte:#x}");
            assert_eq!(NUMBERS[byte + 128], -value, "{byte:#x}, negative");
        }
        assert!(NUMBERS[0x7f].is_nan() && NUMBERS[0xff].is_nan());
        assert!(NUMBERS[..0x7f].is_sorted_by(|a, b| a < b));
    }
}
