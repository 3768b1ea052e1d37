//! FP8 checkpoints: matrices of E4M3 with a scale for the whole or for each block of it, as [`rudder_ops::fp8`] has them where its
//! blocks fit, else widened to BF16.
//!
//! Beside `X.weight` lies what it is multiplied with: `X.weight_scale_inv`, one number for each block (DeepSeek-V3's layout,
//! arXiv:2412.19437, section 3.3; Qwen3's FP8 checkpoints), or `X.weight_scale`, one for the matrix or for each row of it
//! (compressed-tensors' `float-quantized`, <https://github.com/vllm-project/compressed-tensors>). What a checkpoint says of activations is
//! left aside: they are not rounded to FP8.

use std::sync::Arc;
use std::thread;

use half::bf16;
use rudder_ops::dequant::dequantize;
use rudder_ops::fp8::{BLOCK_LEN, NUMBERS};
use rudder_ops::{DType, RawTensor};
use safetensors::Dtype;

use crate::LoadError;
use crate::safetensors::Checkpoint;

/// A matrix's scales: one for each block of `block` rows and columns.
struct Scales {
    values: Vec<f32>,
    /// Blocks in a row.
    columns: usize,
    block: [usize; 2],
}

impl Scales {
    /// Those of a row, one after another.
    fn of_row(&self, row: usize) -> &[f32] {
        &self.values[row / self.block[0] * self.columns..][..self.columns]
    }
}

/// The tensor `name`. `block` is the size of a block where the checkpoint has scales for blocks.
///
/// # Errors
/// If it is no matrix, or its scales are missing or do not fit it.
pub(crate) fn matrix(checkpoint: &Checkpoint, name: &str, block: [usize; 2]) -> Result<RawTensor, LoadError> {
    let invalid = |reason: String| LoadError::invalid(checkpoint.folder(), format!("tensor {name} {reason}"));
    let (shape, bytes) = checkpoint.bytes(name, Dtype::F8_E4M3)?;
    let &[rows, width] = shape else {
        return Err(invalid(format!("is FP8 of shape {shape:?}; expected two dimensions")));
    };
    if rows == 0 || width == 0 {
        return Err(invalid(format!("is FP8 of shape {shape:?}, without an element")));
    }
    let scales = scales(checkpoint, name, [rows, width], block)?;
    // A block of ours has one scale.
    let kept =
        width.is_multiple_of(BLOCK_LEN) && (scales.columns <= 1 || scales.block[1].is_multiple_of(BLOCK_LEN));
    let dtype = if kept { DType::F8_E4M3 } else { DType::BF16 };
    let row_bytes = width / dtype.block_len() * dtype.block_bytes();
    let mut out = vec![0u8; rows * row_bytes];
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let share = rows.div_ceil(threads).max(1);
    thread::scope(|scope| {
        let parts = bytes.chunks((share * width).max(1)).zip(out.chunks_mut((share * row_bytes).max(1)));
        for (part, (bytes, out)) in parts.enumerate() {
            let scales = &scales;
            scope.spawn(move || {
                let rows = bytes.chunks_exact(width).zip(out.chunks_exact_mut(row_bytes)).enumerate();
                rows.for_each(|(row, (bytes, out))| match dtype {
                    DType::F8_E4M3 => keep(bytes, scales, part * share + row, out),
                    _ => widen(bytes, scales, part * share + row, out),
                });
            });
        }
    });
    // A name of its own: the checkpoint's pages are not where this lies.
    let name = format!("{name} as {dtype:?}");
    RawTensor::new(name, vec![rows, width], dtype, Arc::new(out), 0)
        .ok_or_else(|| invalid(format!("of shape {shape:?} is too large")))
}

/// A row in blocks, each with its scale.
fn keep(bytes: &[u8], scales: &Scales, row: usize, out: &mut [u8]) {
    let scales = scales.of_row(row).iter().flat_map(|scale| {
        let blocks = scales.block[1].div_ceil(BLOCK_LEN);
        std::iter::repeat_n(scale, blocks)
    });
    let blocks = bytes.chunks_exact(BLOCK_LEN).zip(out.chunks_exact_mut(DType::F8_E4M3.block_bytes()));
    for ((bytes, out), scale) in blocks.zip(scales) {
        out[..4].copy_from_slice(&scale.to_le_bytes());
        out[4..].copy_from_slice(bytes);
    }
}

/// A row as bf16.
fn widen(bytes: &[u8], scales: &Scales, row: usize, out: &mut [u8]) {
    let block = scales.block[1];
    let blocks = bytes.chunks(block).zip(out.chunks_mut(2 * block));
    for ((bytes, out), scale) in blocks.zip(scales.of_row(row)) {
        for (byte, out) in bytes.iter().zip(out.chunks_exact_mut(2)) {
            let product = bf16::from_f32(NUMBERS[usize::from(*byte)] * scale);
            out.copy_from_slice(&product.to_le_bytes());
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
    let block = [block[0].min(rows), block[1].min(width)];
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
    use safetensors::serialize_to_file;
    use safetensors::tensor::TensorView;

    /// Scales, their shape, the size of a block, and what is made of the matrix.
    type Case<'a> = (&'a [f32], &'a [usize], [usize; 2], DType);

    /// The matrix `[3, width]` of byte `i % 120` at `i`, with these scales.
    fn stored(width: usize, scales: &[f32], shape: &[usize], block: [usize; 2]) -> RawTensor {
        read([3, width], scales, shape, block).unwrap()
    }

    fn read(
        [rows, width]: [usize; 2],
        scales: &[f32],
        shape: &[usize],
        block: [usize; 2],
    ) -> Result<RawTensor, LoadError> {
        let folder = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..rows * width).map(|i| (i % 120) as u8).collect();
        let scale_bytes: Vec<u8> = scales.iter().flat_map(|x| x.to_le_bytes()).collect();
        let views = [
            ("w.weight", TensorView::new(Dtype::F8_E4M3, vec![rows, width], &bytes).unwrap()),
            ("w.weight_scale", TensorView::new(Dtype::F32, shape.to_vec(), &scale_bytes).unwrap()),
        ];
        serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
        matrix(&Checkpoint::open(folder.path()).unwrap(), "w.weight", block)
    }

    #[test]
    fn a_matrix_without_an_element_is_refused() {
        for shape in [[0, 64], [64, 0], [0, 0]] {
            let error = read(shape, &[0.5], &[], [128, 128]).unwrap_err();
            assert!(error.to_string().contains("without an element"), "{error}");
        }
    }

    #[test]
    fn matrices_stay_fp8_where_no_block_ends_inside_one_of_64() {
        let cases: [Case<'_>; 5] = [
            (&[0.5], &[], [128, 128], DType::F8_E4M3),
            (&[0.5, 0.25, 3.0], &[3, 1], [128, 128], DType::F8_E4M3),
            (&[0.3, 0.7, 0.9, 1.1], &[2, 2], [2, 64], DType::F8_E4M3),
            (&[0.3, 0.7], &[2, 1], [2, 128], DType::F8_E4M3),
            (&[0.5, 0.25], &[1, 2], [3, 96], DType::BF16),
        ];
        for (scales, shape, block, dtype) in cases {
            let found = stored(128, scales, shape, block);
            assert_eq!((found.dtype, &found.shape[..]), (dtype, &[3, 128][..]), "{shape:?}");
            let columns = shape.get(1).copied().unwrap_or(1);
            let scale = |row: usize, column: usize| match (shape, columns) {
                ([], _) => scales[0],
                (&[3, 1], _) => scales[row],
                _ => scales[row / block[0] * columns + column / block[1]],
            };
            let mut numbers = [0.0; 3 * 128];
            dequantize(found.dtype, found.bytes(), &mut numbers);
            for (i, number) in numbers.into_iter().enumerate() {
                let exact = NUMBERS[i % 120] * scale(i / 128, i % 128);
                let expected = if dtype == DType::BF16 { bf16::from_f32(exact).to_f32() } else { exact };
                assert_eq!(number, expected, "{shape:?}, element {i}");
            }
        }
    }

    #[test]
    fn a_block_that_is_said_to_be_absurdly_wide_is_as_wide_as_the_matrix() {
        let found = stored(96, &[0.5, 2.0], &[2, 1], [2, 1 << 63]);
        let mut numbers = [0.0; 3 * 96];
        dequantize(found.dtype, found.bytes(), &mut numbers);
        assert_eq!(
            (found.dtype, numbers[1], numbers[2 * 96]),
            (DType::BF16, 0.5 * NUMBERS[1], 2.0 * NUMBERS[72])
        );
    }
}
