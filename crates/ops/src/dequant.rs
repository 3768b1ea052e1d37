//! From stored weights to f32, exactly as the formats define it.

use crate::ggml::{Block, offset};
use crate::{DType, fp8, int4, mxfp4, nvfp4};
use half::{bf16, f16};

/// Widens `bytes`, whole blocks of `dtype`, to `out`, as many elements.
///
/// # Panics
/// If the lengths do not agree; a [`crate::RawTensor`]'s rows always do.
pub fn dequantize(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(dtype.bytes(out.len()), Some(bytes.len()), "{dtype:?}: {} elements", out.len());
    match dtype {
        DType::F32 => {
            for (y, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *y = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
        DType::F16 => {
            for (y, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *y = f16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
        DType::BF16 => {
            for (y, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *y = bf16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
        DType::MXFP4 => mxfp4::dequantize(bytes, out),
        DType::F8_E4M3 => fp8::dequantize(bytes, out),
        DType::INT4 => int4::dequantize(bytes, out),
        DType::NVFP4 => nvfp4::dequantize(bytes, out),
        _ => {
            let mut block = Block::zero();
            let blocks = bytes.chunks_exact(dtype.block_bytes()).zip(out.chunks_exact_mut(dtype.block_len()));
            for (bytes, out) in blocks {
                block.read(dtype, bytes);
                widen(&block, offset(dtype), out);
            }
        }
    }
}

fn widen(block: &Block, offset: i32, out: &mut [f32]) {
    let (d, min) = (block.d.to_f32(), block.min.to_f32());
    for (group, (out, quants)) in out.chunks_exact_mut(16).zip(block.quants.chunks_exact(16)).enumerate() {
        let scale = d * f32::from(block.scales[group]);
        let min = min * f32::from(block.mins[group]);
        for (y, &quant) in out.iter_mut().zip(quants) {
            *y = scale * (i32::from(quant) - offset) as f32 + min;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{Device, Tensor};

    const QUANTISED: [(DType, GgmlDType); 10] = [
        (DType::Q4_0, GgmlDType::Q4_0),
        (DType::Q4_1, GgmlDType::Q4_1),
        (DType::Q5_0, GgmlDType::Q5_0),
        (DType::Q5_1, GgmlDType::Q5_1),
        (DType::Q8_0, GgmlDType::Q8_0),
        (DType::Q2_K, GgmlDType::Q2K),
        (DType::Q3_K, GgmlDType::Q3K),
        (DType::Q4_K, GgmlDType::Q4K),
        (DType::Q5_K, GgmlDType::Q5K),
        (DType::Q6_K, GgmlDType::Q6K),
    ];

    #[test]
    fn quantised_formats_widen_as_candle_widens_them() {
        let data: Vec<f32> =
            (0..2048).map(|i| ((i * 37 % 1001) as f32 - 431.0) * 0.003 * (i % 7) as f32).collect();
        for (dtype, ggml) in QUANTISED {
            let tensor = Tensor::from_slice(&data, (4, 512), &Device::Cpu).unwrap();
            let quantised = QTensor::quantize(&tensor, ggml).unwrap();
            let bytes = quantised.data().unwrap();
            let expected: Vec<f32> =
                quantised.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            let mut out = vec![f32::NAN; data.len()];
            dequantize(dtype, &bytes, &mut out);
            for (i, (y, e)) in out.iter().zip(&expected).enumerate() {
                assert!((y - e).abs() <= e.abs() * 1e-6, "{dtype:?} element {i}: {y}, candle {e}");
            }
        }
    }

    #[test]
    fn plain_formats_widen_exactly() {
        let values = [0.0, -1.5, 65504.0, 6.1035e-5, 0.333_251_95];
        let mut out = [0.0; 5];
        let bytes: Vec<u8> = values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect();
        dequantize(DType::F16, &bytes, &mut out);
        assert_eq!(out, values.map(|x| f16::from_f32(x).to_f32()));
        let bytes: Vec<u8> = values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
        dequantize(DType::BF16, &bytes, &mut out);
        assert_eq!(out, values.map(|x| bf16::from_f32(x).to_f32()));
        let bytes: Vec<u8> = values.iter().flat_map(|&x| x.to_le_bytes()).collect();
        dequantize(DType::F32, &bytes, &mut out);
        assert_eq!(out, values);
    }
}
