//! NVFP4 checkpoints, as [`rudder_ops::nvfp4`] has them.
//!
//! For a matrix `X.weight` of `n` outputs and `k` inputs a checkpoint of compressed-tensors (`nvfp4-pack-quantized`) holds `X.weight_packed`, bytes
//! `[n, k / 2]`, two codes each, the first in the lower half; `X.weight_scale`, E4M3 `[n, k / 16]`; and `X.weight_global_scale`, one f32 that scales were
//! multiplied with to fit E4M3, so that numbers are divided by it. One of NVIDIA's Model Optimizer (`modelopt`) holds the same bytes as
//! `X.weight`, `X.weight_scale`, and in `X.weight_scale_2` the factor itself. Scales of activations are left aside:
//! where those are rounded, it is by scales of each row's own.

use std::sync::Arc;

use rudder_ops::dequant::dequantize;
use rudder_ops::nvfp4::{BLOCK_BYTES, BLOCK_LEN, GROUP};
use rudder_ops::{DType, RawTensor};
use safetensors::Dtype;

use crate::LoadError;
use crate::safetensors::Checkpoint;

/// The matrix `name`, `[n, k]`, if the checkpoint holds it as NVFP4.
///
/// # Errors
/// If it is not whole or of another shape.
pub(crate) fn matrix(
    checkpoint: &Checkpoint,
    name: &str,
    [n, k]: [usize; 2],
) -> Result<Option<RawTensor>, LoadError> {
    let packed = format!("{name}_packed");
    let codes_name = if checkpoint.contains(&packed) { &packed } else { name };
    let Ok((codes_shape, codes)) = checkpoint.bytes(codes_name, Dtype::U8) else { return Ok(None) };
    let invalid = |reason: String| LoadError::invalid(checkpoint.folder(), reason);
    let expect = |name: &str, shape: &[usize], expected: [usize; 2]| match shape == expected {
        true => Ok(()),
        false => Err(invalid(format!("tensor {name} has shape {shape:?}; {expected:?} was expected"))),
    };
    if !k.is_multiple_of(BLOCK_LEN) {
        return Err(invalid(format!(
            "tensor {codes_name} has {k} inputs, which are not whole blocks of {BLOCK_LEN}"
        )));
    }
    expect(codes_name, codes_shape, [n, k / 2])?;
    let scales_name = format!("{name}_scale");
    let (scales_shape, scales) = checkpoint.bytes(&scales_name, Dtype::F8_E4M3)?;
    expect(&scales_name, scales_shape, [n, k / GROUP])?;
    let factor = factor(checkpoint, name)?.to_le_bytes();
    let blocks = codes.chunks_exact(BLOCK_LEN / 2).zip(scales.chunks_exact(BLOCK_LEN / GROUP));
    let mut out = Vec::with_capacity(n * k / BLOCK_LEN * BLOCK_BYTES);
    for (codes, scales) in blocks {
        out.extend_from_slice(&factor);
        out.extend_from_slice(scales);
        out.extend_from_slice(codes);
    }
    // A name of its own: the checkpoint's pages are not where this lies.
    let tensor = RawTensor::new(format!("{name} as NVFP4"), vec![n, k], DType::NVFP4, Arc::new(out), 0);
    tensor.map(Some).ok_or_else(|| invalid(format!("tensor {name} is too large")))
}

/// What all numbers of a matrix are multiplied with.
fn factor(checkpoint: &Checkpoint, name: &str) -> Result<f32, LoadError> {
    let (divisor, factor) = (format!("{name}_global_scale"), format!("{name}_scale_2"));
    let by_divisor = checkpoint.contains(&divisor);
    let tensor = checkpoint.tensor(if by_divisor { &divisor } else { &factor })?;
    let mut value = vec![0.0; tensor.elements()];
    dequantize(tensor.dtype, tensor.bytes(), &mut value);
    match value[..] {
        [value] if by_divisor && value != 0.0 => Ok(1.0 / value),
        [value] if !by_divisor => Ok(value),
        _ => Err(LoadError::invalid(
            checkpoint.folder(),
            format!("tensor {} is not one number that a matrix can be scaled by", tensor.name),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::serialize_to_file;
    use safetensors::tensor::TensorView;

    const N: usize = 3;
    const K: usize = 128;

    fn read(names: [&str; 3], factor: f32, k: usize) -> Result<Option<RawTensor>, LoadError> {
        let folder = tempfile::tempdir().unwrap();
        let codes: Vec<u8> = (0..N * K / 2).map(|i| (i * 37 % 256) as u8).collect();
        let scales: Vec<u8> = (0..N * K / 16).map(|i| (i * 5 % 127) as u8).collect();
        let factor = factor.to_le_bytes();
        let views = [
            (names[0], TensorView::new(Dtype::U8, vec![N, K / 2], &codes).unwrap()),
            (names[1], TensorView::new(Dtype::F8_E4M3, vec![N, K / 16], &scales).unwrap()),
            (names[2], TensorView::new(Dtype::F32, vec![1], &factor).unwrap()),
        ];
        serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
        matrix(&Checkpoint::open(folder.path()).unwrap(), "x.weight", [N, k])
    }

    #[test]
    fn both_ways_to_store_it_are_the_same_numbers() {
        let compressed = ["x.weight_packed", "x.weight_scale", "x.weight_global_scale"];
        let modelopt = ["x.weight", "x.weight_scale", "x.weight_scale_2"];
        let e2m1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];
        for found in [read(compressed, 4.0, K), read(modelopt, 0.25, K)] {
            let found = found.unwrap().expect("it is there");
            assert_eq!((found.dtype, &found.shape[..]), (DType::NVFP4, &[N, K][..]));
            let mut numbers = vec![0.0; N * K];
            dequantize(found.dtype, found.bytes(), &mut numbers);
            for (i, number) in numbers.into_iter().enumerate() {
                let code = (i / 2 * 37 % 256) >> (4 * (i % 2)) & 15;
                let scale = rudder_ops::fp8::NUMBERS[i / 16 * 5 % 127];
                assert_eq!(number, e2m1[code] * scale * 0.25, "element {i}");
            }
        }
        assert!(read(compressed, 0.0, K).unwrap_err().to_string().contains("weight_global_scale"));
        assert!(read(compressed, 4.0, 192).unwrap_err().to_string().contains("x.weight_packed"));
        assert!(read(["y", "x.weight_scale", "x.weight_scale_2"], 1.0, K).unwrap().is_none());
    }
}
