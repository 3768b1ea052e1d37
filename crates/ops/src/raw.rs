//! A tensor as it lies in its file: a name, a shape, a storage format and mapped bytes.

use crate::{fp8, int4, nvfp4};
use std::ops::Range;
use std::sync::Arc;

/// Storage formats of weights. The quantised ones are GGML's blocks, as specified by
/// <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md> and `ggml-common.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, non_camel_case_types)] // the names are the specification's
pub enum DType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    /// Of OCP, in GGML's layout.
    MXFP4,
    /// FP8 with scales, as [`crate::fp8`] says; no type of GGML's.
    F8_E4M3,
    /// Four-bit integers with scales and zero points, as [`crate::int4`] says; no type of GGML's.
    INT4,
    /// NVIDIA's, with scales, as [`crate::nvfp4`] says; not GGML's type of that name.
    NVFP4,
}

/// A GGML type number that Rudder does not read.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error(
    "GGML type {0} is not supported (supported: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, MXFP4)"
)]
pub struct UnsupportedDType(pub u32);

impl DType {
    /// From GGML's type number.
    ///
    /// # Errors
    /// If the type is not one of ours.
    pub fn from_ggml(id: u32) -> Result<Self, UnsupportedDType> {
        Ok(match id {
            0 => DType::F32,
            1 => DType::F16,
            2 => DType::Q4_0,
            3 => DType::Q4_1,
            6 => DType::Q5_0,
            7 => DType::Q5_1,
            8 => DType::Q8_0,
            10 => DType::Q2_K,
            11 => DType::Q3_K,
            12 => DType::Q4_K,
            13 => DType::Q5_K,
            14 => DType::Q6_K,
            30 => DType::BF16,
            39 => DType::MXFP4,
            other => return Err(UnsupportedDType(other)),
        })
    }

    /// Elements in one block.
    pub fn block_len(self) -> usize {
        match self {
            DType::F32 | DType::F16 | DType::BF16 => 1,
            DType::Q4_0 | DType::Q4_1 | DType::Q5_0 | DType::Q5_1 | DType::Q8_0 | DType::MXFP4 => 32,
            DType::F8_E4M3 => fp8::BLOCK_LEN,
            DType::INT4 => int4::BLOCK_LEN,
            DType::NVFP4 => nvfp4::BLOCK_LEN,
            DType::Q2_K | DType::Q3_K | DType::Q4_K | DType::Q5_K | DType::Q6_K => 256,
        }
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::Q4_0 => 18,
            DType::Q4_1 => 20,
            DType::Q5_0 => 22,
            DType::Q5_1 => 24,
            DType::Q8_0 => 34,
            DType::Q2_K => 84,
            DType::Q3_K => 110,
            DType::Q4_K => 144,
            DType::Q5_K => 176,
            DType::Q6_K => 210,
            DType::MXFP4 => 17,
            DType::F8_E4M3 => fp8::BLOCK_BYTES,
            DType::INT4 => int4::BLOCK_BYTES,
            DType::NVFP4 => nvfp4::BLOCK_BYTES,
        }
    }

    /// Bytes of `elements` elements; `None` if they are no whole number of blocks or overflow.
    pub fn bytes(self, elements: usize) -> Option<usize> {
        elements
            .is_multiple_of(self.block_len())
            .then(|| (elements / self.block_len()).checked_mul(self.block_bytes()))?
    }
}

/// A tensor in a mapped file. Cheap to clone; the mapping lives as long as any clone.
#[derive(Clone)]
pub struct RawTensor {
    /// Name in its file, for errors.
    pub name: String,
    /// Row-major shape, slowest dimension first: a linear weight is `[out, in]`.
    pub shape: Vec<usize>,
    /// Storage format.
    pub dtype: DType,
    storage: Arc<dyn AsRef<[u8]> + Send + Sync>,
    start: usize,
    len: usize,
}

impl RawTensor {
    /// A tensor of `shape` whose bytes begin at `start` of `storage`. `None` if the bytes do not
    /// lie inside `storage`, overflow, or the last dimension is no whole number of blocks.
    pub fn new(
        name: impl Into<String>,
        shape: Vec<usize>,
        dtype: DType,
        storage: Arc<dyn AsRef<[u8]> + Send + Sync>,
        start: usize,
    ) -> Option<Self> {
        let elements = shape.iter().try_fold(1usize, |a, &b| a.checked_mul(b))?;
        if shape.last().is_some_and(|last| last % dtype.block_len() != 0) {
            return None;
        }
        let len = dtype.bytes(elements)?;
        let end = start.checked_add(len)?;
        (end <= (*storage).as_ref().len()).then_some(Self {
            name: name.into(),
            shape,
            dtype,
            storage,
            start,
            len,
        })
    }

    /// A tensor that owns f32 data; for tests and random weights.
    pub fn from_f32(name: impl Into<String>, shape: Vec<usize>, data: &[f32]) -> Self {
        let bytes: Vec<u8> = data.iter().flat_map(|x| x.to_le_bytes()).collect();
        Self::new(name, shape, DType::F32, Arc::new(bytes), 0).expect("shape matches data")
    }

    /// The bytes, little-endian, in `dtype`'s layout. Not necessarily aligned.
    pub fn bytes(&self) -> &[u8] {
        &(*self.storage).as_ref()[self.start..self.start + self.len]
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Slice `index` of the slowest dimension: expert `index` of stacked experts `[experts, out, in]`.
    ///
    /// # Panics
    /// If `index` is out of range.
    pub fn index(&self, index: usize) -> Self {
        let slices = self.shape[0];
        assert!(index < slices);
        let len = self.len / slices;
        Self {
            name: format!("{}[{index}]", self.name),
            shape: self.shape[1..].to_vec(),
            dtype: self.dtype,
            storage: self.storage.clone(),
            start: self.start + index * len,
            len,
        }
    }
}

impl RawTensor {
    /// Slices `rows` of the slowest dimension, rows of a matrix or elements of a vector; shares the bytes. `None` if they are not
    /// there, or their ends lie inside blocks of the format.
    pub fn rows(&self, rows: Range<usize>) -> Option<Self> {
        let (&count, inner) = self.shape.split_first()?;
        if rows.start > rows.end || rows.end > count {
            return None;
        }
        let width: usize = inner.iter().product();
        let mut shape = self.shape.clone();
        shape[0] = rows.len();
        Some(Self {
            name: self.name.clone(),
            shape,
            dtype: self.dtype,
            storage: self.storage.clone(),
            start: self.start + self.dtype.bytes(rows.start * width)?,
            len: self.dtype.bytes(rows.len() * width)?,
        })
    }

    /// Columns of a matrix `[out, in]`, copied together. `None` if it is no matrix, they are not there, or their ends lie inside
    /// blocks of the format.
    pub fn columns(&self, columns: Range<usize>) -> Option<Self> {
        let &[rows, width] = self.shape.as_slice() else { return None };
        if columns.start > columns.end || columns.end > width {
            return None;
        }
        let (start, len) = (self.dtype.bytes(columns.start)?, self.dtype.bytes(columns.len())?);
        let mut bytes = Vec::with_capacity(rows * len);
        for row in self.bytes().chunks_exact(self.dtype.bytes(width)?.max(1)) {
            bytes.extend_from_slice(&row[start..start + len]);
        }
        Self::new(self.name.clone(), vec![rows, columns.len()], self.dtype, Arc::new(bytes), 0)
    }
}

impl std::fmt::Debug for RawTensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:?} {:?}", self.name, self.dtype, self.shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dequant::dequantize;

    fn widened(tensor: &RawTensor) -> Vec<f32> {
        let mut out = vec![0.0; tensor.elements()];
        dequantize(tensor.dtype, tensor.bytes(), &mut out);
        out
    }

    /// A matrix of any format: every second byte is zero, so that scales are finite.
    fn matrix(dtype: DType, rows: usize, width: usize) -> RawTensor {
        let bytes = dtype.bytes(rows * width).expect("whole blocks");
        let data: Vec<u8> = (0..bytes + 3).map(|i| (i % 2 * (i * 37 % 59)) as u8).collect();
        RawTensor::new("w", vec![rows, width], dtype, Arc::new(data), 3).expect("as long as it says")
    }

    #[test]
    fn rows_and_columns_of_every_format_are_those_of_the_whole() {
        for (dtype, width, columns) in [
            (DType::F32, 6, 1..4),
            (DType::BF16, 5, 2..5),
            (DType::Q8_0, 96, 32..96),
            (DType::Q6_K, 768, 256..512),
            (DType::F8_E4M3, 192, 64..192),
            (DType::INT4, 384, 128..384),
            (DType::NVFP4, 192, 64..128),
        ] {
            let whole = matrix(dtype, 5, width);
            let expected = widened(&whole);
            assert!(expected.iter().any(|x| *x != expected[0]), "{dtype:?}");
            let rows = whole.rows(1..4).expect("rows are whole");
            assert_eq!(
                (rows.shape.as_slice(), widened(&rows)),
                (&[3, width][..], expected[width..4 * width].to_vec())
            );
            let part = whole.columns(columns.clone()).expect("blocks are whole");
            let of_row = |row: &[f32]| row[columns.clone()].to_vec();
            assert_eq!(part.shape, [5, columns.len()]);
            assert_eq!(
                widened(&part),
                expected.chunks(width).flat_map(of_row).collect::<Vec<_>>(),
                "{dtype:?}"
            );
        }
    }

    #[test]
    fn cuts_inside_a_block_or_beyond_the_tensor_are_refused() {
        let whole = matrix(DType::Q8_0, 2, 64);
        assert!(whole.columns(0..16).is_none() && whole.columns(16..48).is_none());
        assert!(whole.columns(32..96).is_none() && whole.rows(1..3).is_none());
        let vector =
            RawTensor::new("b", vec![64], DType::Q8_0, Arc::new(vec![0u8; 68]), 0).expect("two blocks");
        assert!(vector.rows(0..16).is_none() && vector.columns(0..32).is_none());
        assert_eq!(vector.rows(32..64).expect("a block").bytes().len(), 34);
    }
}
