//! How weights lie in memory once packed.
//!
//! A matrix is cut into tiles of [`LANES`] outputs. A quantised tile is a run of records over the
//! inputs, read once from front to back: an optional header for 256 inputs, then for each 32
//! inputs the scales and the quants of all 16 outputs. Quants stay as narrow as in the file. After
//! widening, a block of 32 inputs is eight 64-byte vectors, vector `v` holding inputs
//! `4v .. 4v + 4` of output 0, then of output 1 and so on: what one `vpdpbusd` eats. A BF16 tile is such
//! vectors of two inputs an output, for `vdpbf16ps`; F32 and F16 tiles go input by input.

use crate::{DType, ggml};

/// Outputs in a tile.
pub(super) const LANES: usize = 16;
/// Inputs in a block.
pub(super) const BLOCK: usize = 32;

/// Bits of a quant and how the eight vectors of a block share bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Quants {
    /// Two vectors; byte fields from the lowest bits up are vectors 0 to 3, then 4 to 7.
    Two,
    /// Four vectors; vector `v` in low nibbles, `v + 4` in high ones.
    Four,
    /// As `Four`, then one vector whose bit `v` is the fifth bit of vector `v`.
    Five,
    /// As `Four`, then the two high bits as in `Two`.
    Six,
    /// Eight vectors.
    Eight,
    /// As `Four`, codes of MXFP4.
    Codes,
}

impl Quants {
    /// Bytes of a tile's block.
    pub const fn bytes(self) -> usize {
        match self {
            Quants::Two => 128,
            Quants::Four | Quants::Codes => 256,
            Quants::Five => 320,
            Quants::Six => 384,
            Quants::Eight => 512,
        }
    }
}

/// Where scales and minimums are. `h` is 16 halves (f16), one a lane; `b` 16 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scales {
    /// A block: scale `h`.
    Block,
    /// A block: scale `h`, minimum `h`.
    BlockMin,
    /// A block: `b`, exponents of scales that are powers of two.
    Exponents,
    /// A header: scale `h`, minimum `h`. A block: scale `b`, minimum `b`.
    SuperMin,
    /// A header: scale `h`. A block: signed scale `b` for each 16 inputs.
    SuperHalves,
    /// A header: scale `h`, minimum `h`. A block: scale `b` for each 16 inputs, minimum `b` likewise.
    SuperHalvesMin,
}

impl Scales {
    /// Bytes of a header.
    pub const fn header_bytes(self) -> usize {
        match self {
            Scales::Block | Scales::BlockMin | Scales::Exponents => 0,
            Scales::SuperHalves => 32,
            Scales::SuperMin | Scales::SuperHalvesMin => 64,
        }
    }

    /// Bytes in front of a block's quants.
    pub const fn block_bytes(self) -> usize {
        match self {
            Scales::Exponents => 16,
            Scales::Block | Scales::SuperMin | Scales::SuperHalves => 32,
            Scales::BlockMin | Scales::SuperHalvesMin => 64,
        }
    }

    /// Blocks behind one header.
    pub const fn blocks(self) -> usize {
        match self {
            Scales::Block | Scales::BlockMin | Scales::Exponents => 1,
            _ => 8,
        }
    }
}

/// The packed form of a quantised format.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    pub quants: Quants,
    pub scales: Scales,
    /// Subtracted from the unsigned quants.
    pub offset: i32,
}

impl Layout {
    /// The packed form of `dtype`; `None` for formats that are not quantised.
    pub const fn of(dtype: DType) -> Option<Self> {
        let (quants, scales) = match dtype {
            DType::F32 | DType::F16 | DType::BF16 => return None,
            // Widened before they are packed.
            DType::F8_E4M3 | DType::INT4 | DType::NVFP4 => return None,
            DType::Q4_0 => (Quants::Four, Scales::Block),
            DType::Q4_1 => (Quants::Four, Scales::BlockMin),
            DType::Q5_0 => (Quants::Five, Scales::Block),
            DType::Q5_1 => (Quants::Five, Scales::BlockMin),
            DType::Q8_0 => (Quants::Eight, Scales::Block),
            DType::Q2_K => (Quants::Two, Scales::SuperHalvesMin),
            DType::Q3_K => (Quants::Four, Scales::SuperHalves), // three bits, kept in four
            DType::Q4_K => (Quants::Four, Scales::SuperMin),
            DType::Q5_K => (Quants::Five, Scales::SuperMin),
            DType::Q6_K => (Quants::Six, Scales::SuperHalves),
            DType::MXFP4 => (Quants::Codes, Scales::Exponents),
        };
        Some(Self { quants, scales, offset: ggml::offset(dtype) })
    }

    /// Bytes of a header and its blocks.
    pub const fn record_bytes(self) -> usize {
        self.scales.header_bytes() + self.scales.blocks() * (self.scales.block_bytes() + self.quants.bytes())
    }
}

/// Bytes of a packed tile of `width` inputs.
pub(super) fn tile_bytes(dtype: DType, width: usize) -> usize {
    match Layout::of(dtype) {
        Some(layout) => width / (BLOCK * layout.scales.blocks()) * layout.record_bytes(),
        // BF16 inputs come in pairs.
        None if dtype == DType::BF16 => width.next_multiple_of(2) * LANES * dtype.block_bytes(),
        None => width * LANES * dtype.block_bytes(),
    }
}
