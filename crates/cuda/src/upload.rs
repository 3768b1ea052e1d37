//! Weights on their way to a device: rows are converted by several threads into one stage while the other one is copied.

use crate::device::{Buffer, Device, Staging};
use half::bf16;
use half::slice::HalfFloatSliceExt;
use rudder_ops::dequant::dequantize;
use rudder_ops::{DType, OpError, RawTensor, Result};

/// Bytes of a stage. Below a stage's quarter a thread of its own costs more than it brings.
const STAGE: usize = 16 << 20;

/// Two stages in turn.
pub(crate) struct Uploader {
    stages: [Staging; 2],
    next: usize,
    threads: usize,
}

impl Uploader {
    pub fn new(device: &Device) -> Result<Self> {
        let stages = [Staging::new(device, STAGE)?, Staging::new(device, STAGE)?];
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(16);
        Ok(Self { stages, next: 0, threads })
    }

    /// Uploads a matrix `[rows, width]` as bf16 to `offset` of `to`, each row followed by zeros up to `padded` elements.
    pub fn matrix_bf16(&mut self, raw: &RawTensor, padded: usize, to: &Buffer, offset: usize) -> Result<()> {
        let (rows, width) = (raw.shape[0], raw.shape[1]);
        self.rows(to, offset, rows, 2 * padded, |first, out| {
            let mut wide = if raw.dtype == DType::BF16 { Vec::new() } else { vec![0.0; width] };
            for (i, out) in out.chunks_exact_mut(2 * padded).enumerate() {
                let (out, zeros) = out.split_at_mut(2 * width);
                let row = row(raw, first + i, width);
                match raw.dtype {
                    DType::BF16 => out.copy_from_slice(row),
                    dtype => {
                        dequantize(dtype, row, &mut wide);
                        narrow(&wide, out);
                    }
                }
                zeros.fill(0);
            }
        })
    }

    /// Uploads a tensor's rows of `width` as f32.
    pub fn f32(&mut self, raw: &RawTensor, width: usize, to: &Buffer, offset: usize) -> Result<()> {
        let rows = raw.elements() / width.max(1);
        self.rows(to, offset, rows, 4 * width, |first, out| {
            let mut wide = vec![0.0; width];
            for (i, out) in out.chunks_exact_mut(4 * width).enumerate() {
                dequantize(raw.dtype, row(raw, first + i, width), &mut wide);
                for (bytes, x) in out.chunks_exact_mut(4).zip(&wide) {
                    bytes.copy_from_slice(&x.to_le_bytes());
                }
            }
        })
    }

    /// Uploads `rows` rows of `row_bytes`; `make` writes those from a given row on into the slice it gets.
    pub(crate) fn rows(
        &mut self,
        to: &Buffer,
        offset: usize,
        rows: usize,
        row_bytes: usize,
        make: impl Fn(usize, &mut [u8]) + Sync,
    ) -> Result<()> {
        if row_bytes > STAGE {
            return Err(OpError::Backend(format!("rows of {row_bytes} bytes are wider than {STAGE}")));
        }
        if row_bytes == 0 {
            return Ok(());
        }
        let most = STAGE / row_bytes;
        for first in (0..rows).step_by(most) {
            let rows = most.min(rows - first);
            let bytes = rows * row_bytes;
            let stage = &mut self.stages[self.next];
            self.next = 1 - self.next;
            let memory = &mut stage.memory()?[..bytes];
            let threads = (4 * self.threads * bytes).div_ceil(STAGE).clamp(1, self.threads);
            let share = rows.div_ceil(threads);
            std::thread::scope(|scope| {
                let mut parts = memory.chunks_mut(share * row_bytes).enumerate();
                let own = parts.next();
                for (i, part) in parts {
                    let make = &make;
                    scope.spawn(move || make(first + i * share, part));
                }
                if let Some((_, part)) = own {
                    make(first, part);
                }
            });
            stage.send(bytes, to, offset + first * row_bytes)?;
        }
        Ok(())
    }
}

/// The bytes of a tensor's row; its width is a whole number of blocks.
pub(crate) fn row(raw: &RawTensor, row: usize, width: usize) -> &[u8] {
    let bytes = width / raw.dtype.block_len() * raw.dtype.block_bytes();
    &raw.bytes()[row * bytes..(row + 1) * bytes]
}

/// Rounds to bf16, to nearest, ties to even.
fn narrow(wide: &[f32], out: &mut [u8]) {
    let mut part = [bf16::ZERO; 256];
    for (wide, out) in wide.chunks(256).zip(out.chunks_mut(512)) {
        let part = &mut part[..wide.len()];
        part.convert_from_f32_slice(wide);
        for (bytes, x) in out.chunks_exact_mut(2).zip(part) {
            bytes.copy_from_slice(&x.to_le_bytes());
        }
    }
}
