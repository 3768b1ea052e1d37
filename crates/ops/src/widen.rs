//! Formats that a GPU keeps as they are, for backends that do not: as BF16.

use crate::dequant::dequantize;
use crate::{DType, RawTensor};
use half::bf16;
use std::sync::Arc;
use std::thread;

impl RawTensor {
    /// The same tensor, widened to BF16 if it is of a format that only GPUs multiply with. Each number is rounded once.
    pub fn widened(&self) -> RawTensor {
        if !matches!(self.dtype, DType::F8_E4M3 | DType::INT4 | DType::NVFP4) {
            return self.clone();
        }
        let mut out = vec![0u8; 2 * self.elements()];
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let blocks = self.elements() / self.dtype.block_len();
        let share = blocks.div_ceil(threads).max(1);
        let parts = self.bytes().chunks(share * self.dtype.block_bytes());
        thread::scope(|scope| {
            for (bytes, out) in parts.zip(out.chunks_mut(2 * share * self.dtype.block_len())) {
                scope.spawn(|| widen(self.dtype, bytes, out));
            }
        });
        RawTensor::new(self.name.clone(), self.shape.clone(), DType::BF16, Arc::new(out), 0)
            .expect("two bytes an element")
    }
}

/// Whole blocks to bf16.
fn widen(dtype: DType, bytes: &[u8], out: &mut [u8]) {
    let mut wide = vec![0.0; dtype.block_len()];
    for (block, out) in
        bytes.chunks_exact(dtype.block_bytes()).zip(out.chunks_exact_mut(2 * dtype.block_len()))
    {
        dequantize(dtype, block, &mut wide);
        for (out, x) in out.as_chunks_mut::<2>().0.iter_mut().zip(&wide) {
            *out = bf16::from_f32(*x).to_le_bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_gpus_keep_becomes_bf16_and_the_rest_stays() {
        let bytes: Vec<u8> =
            (0..3 * 2 * 68).map(|i| if i % 68 < 4 { 0x3f } else { (i * 7 % 127) as u8 }).collect();
        let raw =
            RawTensor::new("w", vec![3, 128], DType::F8_E4M3, Arc::new(bytes), 0).expect("whole blocks");
        let wide = raw.widened();
        assert_eq!((wide.dtype, &wide.shape, &wide.name), (DType::BF16, &raw.shape, &raw.name));
        let [mut expected, mut found] = [[0.0; 3 * 128]; 2];
        dequantize(raw.dtype, raw.bytes(), &mut expected);
        dequantize(wide.dtype, wide.bytes(), &mut found);
        assert_eq!(found, expected.map(|x| bf16::from_f32(x).to_f32()));
        assert_eq!(wide.widened().bytes().as_ptr(), wide.bytes().as_ptr());
    }
}
