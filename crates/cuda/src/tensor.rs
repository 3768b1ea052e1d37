//! Activations on a device.

use crate::device::{Arg, Buffer, Device};
use rudder_ops::{OpError, Result};

/// How a tensor's elements lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// The residual stream, what matrices put out, logits.
    F32,
    /// What the tensor cores read: normed rows, attention's output, gated rows.
    Bf16,
}

/// Activations, `[rows, width]`; what wrote them last decided whether they are f32 or bf16.
pub struct Tensor {
    pub(crate) buffer: Buffer,
    pub(crate) rows: usize,
    pub(crate) width: usize,
    pub(crate) format: Format,
    /// Whether rows of bf16 are there in FP8 too (see [`crate::matmul::Rows`]).
    pub(crate) in_fp8: bool,
    max_rows: usize,
}

/// An error of a model that calls ops on what does not fit together.
pub(crate) fn check(holds: bool, otherwise: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(OpError::Backend(otherwise())) }
}

impl Tensor {
    pub(crate) fn new(device: &Device, max_rows: usize, width: usize) -> Result<Self> {
        let bytes = max_rows.checked_mul(width).and_then(|n| n.checked_mul(4));
        let bytes =
            bytes.ok_or_else(|| OpError::Backend(format!("no memory for a [{max_rows}, {width}] tensor")))?;
        Ok(Self {
            buffer: device.buffer(bytes)?,
            rows: 0,
            width,
            format: Format::F32,
            in_fp8: false,
            max_rows,
        })
    }

    /// Makes it an output of `rows` rows of `width`, which it has to have room for.
    pub(crate) fn set(&mut self, rows: usize, width: usize, format: Format) -> Result<()> {
        check(width == self.width, || format!("an output is {} wide, not {width}", self.width))?;
        check(rows <= self.max_rows, || format!("{rows} rows in a tensor of at most {}", self.max_rows))?;
        (self.rows, self.format, self.in_fp8) = (rows, format, false);
        Ok(())
    }

    pub(crate) fn elements(&self) -> usize {
        self.rows * self.width
    }

    /// The kernels' `is_f32`.
    pub(crate) fn is_f32(&self) -> Arg {
        (self.format == Format::F32).into()
    }

    /// Refuses what an op reads as f32 and is not.
    pub(crate) fn expect_f32(&self, what: &str) -> Result<()> {
        check(self.format == Format::F32, || format!("{what} is bf16 where f32 is read"))
    }
}

impl From<&Tensor> for Arg {
    fn from(tensor: &Tensor) -> Self {
        (&tensor.buffer).into()
    }
}

impl From<Option<&Tensor>> for Arg {
    fn from(tensor: Option<&Tensor>) -> Self {
        tensor.map_or(Arg::NULL, Arg::from)
    }
}
