//! Experts as gpt-oss's checkpoints hold them: all of a layer in one tensor, gate's and up's rows in turn; either MXFP4 in
//! blocks and scales apart from each other, or numbers, then transposed.

use std::sync::Arc;

use rudder_ops::{DType, RawTensor, mxfp4};
use safetensors::Dtype;

use crate::LoadError;
use crate::safetensors::Checkpoint;

/// Bytes of a block's codes.
const CODE_BYTES: usize = mxfp4::BLOCK_BYTES - 1;

/// The experts of one layer.
pub(crate) struct FusedExperts<'a> {
    checkpoint: &'a Checkpoint,
    /// What their tensors' names begin with.
    prefix: String,
}

/// Where one of the three matrices lies: in which tensor, and its share of the rows there.
struct Place {
    stem: String,
    /// Its first row, and how far its rows lie apart.
    first: usize,
    step: usize,
}

impl<'a> FusedExperts<'a> {
    /// The experts under `prefix`, if the checkpoint holds them so.
    pub fn find(checkpoint: &'a Checkpoint, prefix: String) -> Option<Self> {
        let holds = |name: &str| checkpoint.contains(&format!("{prefix}.{name}"));
        (holds("down_proj") || holds("down_proj_blocks")).then_some(Self { checkpoint, prefix })
    }

    /// One matrix `[out, in]` of every expert; `name` is `gate`, `up` or `down`.
    pub fn matrices(&self, name: &str, count: usize, shape: [usize; 2]) -> Result<Vec<RawTensor>, LoadError> {
        let place = self.place(name);
        match self.checkpoint.contains(&format!("{}_blocks", place.stem)) {
            true => self.mxfp4(&place, count, shape),
            false => self.transposed(&place, count, shape),
        }
    }

    /// The bias of that matrix of every expert, `[len]` each.
    pub fn biases(&self, name: &str, count: usize, len: usize) -> Result<Vec<RawTensor>, LoadError> {
        let place = self.place(name);
        let name = format!("{}_bias", place.stem);
        let tensor = self.checkpoint.tensor(&name)?;
        self.expect(&name, &tensor.shape, &[count, place.step * len])?;
        let size = tensor.dtype.block_bytes();
        let biases = tensor.bytes().chunks_exact((place.step * len * size).max(1)).enumerate();
        let biases = biases.map(|(expert, bytes)| {
            let elements = bytes.chunks_exact(size).skip(place.first).step_by(place.step);
            self.made(&place, expert, vec![len], tensor.dtype, elements.flatten().copied().collect())
        });
        biases.collect()
    }

    fn place(&self, name: &str) -> Place {
        let (stem, first, step) = match name {
            "gate" => ("gate_up_proj", 0, 2),
            "up" => ("gate_up_proj", 1, 2),
            _ => ("down_proj", 0, 1),
        };
        Place { stem: format!("{}.{stem}", self.prefix), first, step }
    }

    /// From blocks `[count, rows, width / 32, 16]` and scales `[count, rows, width / 32]`.
    fn mxfp4(
        &self,
        place: &Place,
        count: usize,
        [rows, width]: [usize; 2],
    ) -> Result<Vec<RawTensor>, LoadError> {
        let names = [format!("{}_blocks", place.stem), format!("{}_scales", place.stem)];
        let (blocks_shape, blocks) = self.checkpoint.bytes(&names[0], Dtype::U8)?;
        let (scales_shape, scales) = self.checkpoint.bytes(&names[1], Dtype::U8)?;
        let groups = width / mxfp4::BLOCK_LEN;
        self.expect(&names[0], blocks_shape, &[count, place.step * rows, groups, CODE_BYTES])?;
        self.expect(&names[1], scales_shape, &[count, place.step * rows, groups])?;
        let (blocks, _) = blocks.as_chunks::<CODE_BYTES>();
        let matrices = (0..count).map(|expert| {
            let mut bytes = Vec::with_capacity(rows * groups * mxfp4::BLOCK_BYTES);
            for row in 0..rows {
                let row = expert * place.step * rows + row * place.step + place.first;
                let range = row * groups..(row + 1) * groups;
                for (codes, &scale) in blocks[range.clone()].iter().zip(&scales[range]) {
                    bytes.extend_from_slice(&in_halves(scale, codes));
                }
            }
            self.made(place, expert, vec![rows, width], DType::MXFP4, bytes)
        });
        matrices.collect()
    }

    /// From numbers `[count, width, rows]`.
    fn transposed(
        &self,
        place: &Place,
        count: usize,
        [rows, width]: [usize; 2],
    ) -> Result<Vec<RawTensor>, LoadError> {
        let tensor = self.checkpoint.tensor(&place.stem)?;
        let all = place.step * rows;
        self.expect(&place.stem, &tensor.shape, &[count, width, all])?;
        let size = tensor.dtype.block_bytes();
        let matrices = tensor.bytes().chunks_exact((width * all * size).max(1)).enumerate();
        let matrices = matrices.map(|(expert, from)| {
            let mut bytes = vec![0; rows * width * size];
            for (row, to) in bytes.chunks_exact_mut((width * size).max(1)).enumerate() {
                for (column, to) in to.chunks_exact_mut(size).enumerate() {
                    let at = (column * all + row * place.step + place.first) * size;
                    to.copy_from_slice(&from[at..at + size]);
                }
            }
            self.made(place, expert, vec![rows, width], tensor.dtype, bytes)
        });
        let matrices = matrices.collect();
        self.checkpoint.release(&tensor);
        matrices
    }

    fn expect(&self, name: &str, found: &[usize], expected: &[usize]) -> Result<(), LoadError> {
        if found == expected {
            return Ok(());
        }
        let reason = format!("tensor {name} has shape {found:?}, the configuration asks for {expected:?}");
        Err(LoadError::invalid(self.checkpoint.folder(), reason))
    }

    /// A tensor of its own.
    fn made(
        &self,
        place: &Place,
        expert: usize,
        shape: Vec<usize>,
        dtype: DType,
        bytes: Vec<u8>,
    ) -> Result<RawTensor, LoadError> {
        let name = format!("{}[{expert}, {}..]", place.stem, place.first);
        let invalid = format!("tensor {name} cannot be {dtype:?} of shape {shape:?}");
        RawTensor::new(name, shape, dtype, Arc::new(bytes), 0)
            .ok_or_else(|| LoadError::invalid(self.checkpoint.folder(), invalid))
    }
}

/// A block whose codes lie in order, two a byte, as a block of [`DType::MXFP4`].
fn in_halves(scale: u8, codes: &[u8; CODE_BYTES]) -> [u8; mxfp4::BLOCK_BYTES] {
    let mut block = [scale; mxfp4::BLOCK_BYTES];
    for i in 0..CODE_BYTES / 2 {
        let (first, second) = (codes[i], codes[i + CODE_BYTES / 2]);
        block[1 + 2 * i] = first & 0x0f | second << 4;
        block[2 + 2 * i] = first >> 4 | second & 0xf0;
    }
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_two_a_byte_in_order_become_codes_in_halves() {
        let in_order: [u8; 32] = std::array::from_fn(|i| (i * 5 % 16) as u8);
        let pairs: [u8; 16] = std::array::from_fn(|i| in_order[2 * i] | in_order[2 * i + 1] << 4);
        assert_eq!(in_halves(77, &pairs), mxfp4::block(77, &in_order));
    }
}
