//! Repacking of weights at load: from rows as they lie in the file to tiles.

use super::layout::{BLOCK, LANES, Layout, Quants, Scales};
use super::quantize::flush_bf16;
use super::unit::VECTOR;
use crate::DType;
use crate::ggml::Block;

/// Packs the rows of one tile, `rows` of at most [`LANES`] (the missing ones become zeros), into
/// `tile`, zeroed bytes of [`super::layout::tile_bytes`].
pub(super) fn pack_tile(dtype: DType, rows: &[&[u8]], tile: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the feature was just detected.
        unsafe { pack_tile_avx2(dtype, rows, tile) };
        return;
    }
    pack(dtype, rows, tile);
}

/// The same code, compiled for AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn pack_tile_avx2(dtype: DType, rows: &[&[u8]], tile: &mut [u8]) {
    pack(dtype, rows, tile);
}

#[inline(always)]
fn pack(dtype: DType, rows: &[&[u8]], tile: &mut [u8]) {
    match (Layout::of(dtype), dtype) {
        (Some(layout), _) => pack_quantised(dtype, layout, rows, tile),
        (None, DType::F32) => pack_plain::<4>(rows, tile),
        (None, DType::F16) => pack_plain::<2>(rows, tile),
        (None, _) => pack_bf16(rows, tile),
    }
}

/// Elements of `SIZE` bytes.
#[inline(always)]
fn pack_plain<const SIZE: usize>(rows: &[&[u8]], tile: &mut [u8]) {
    let (columns, _) = tile.as_chunks_mut::<SIZE>();
    for (lane, row) in rows.iter().enumerate() {
        for (element, column) in row.as_chunks::<SIZE>().0.iter().zip(columns.chunks_exact_mut(LANES)) {
            column[lane] = *element;
        }
    }
}

/// Pairs of inputs; the last one's second half stays zero where the width is odd. Subnormals become zeros, as
/// `vdpbf16ps` takes them.
#[inline(always)]
fn pack_bf16(rows: &[&[u8]], tile: &mut [u8]) {
    let (columns, _) = tile.as_chunks_mut::<4>();
    let normal = |half: [u8; 2]| flush_bf16(u16::from_le_bytes(half)).to_le_bytes();
    for (lane, row) in rows.iter().enumerate() {
        let (pairs, last) = row.as_chunks::<4>();
        let mut columns = columns.chunks_exact_mut(LANES);
        for (&[a, b, c, d], column) in pairs.iter().zip(&mut columns) {
            let ([a, b], [c, d]) = (normal([a, b]), normal([c, d]));
            column[lane] = [a, b, c, d];
        }
        if let (&[a, b], Some(column)) = (last, columns.next()) {
            let [a, b] = normal([a, b]);
            column[lane] = [a, b, 0, 0];
        }
    }
}

#[inline(always)]
fn pack_quantised(dtype: DType, layout: Layout, rows: &[&[u8]], tile: &mut [u8]) {
    let mut lanes = [const { Block::zero() }; LANES];
    for (index, record) in tile.chunks_exact_mut(layout.record_bytes()).enumerate() {
        for (lane, row) in lanes.iter_mut().zip(rows) {
            let size = dtype.block_bytes();
            lane.read(dtype, &row[index * size..][..size]);
        }
        let (header, blocks) = record.split_at_mut(layout.scales.header_bytes());
        pack_halves(&lanes, header);
        let block_bytes = layout.scales.block_bytes() + layout.quants.bytes();
        for (block, bytes) in blocks.chunks_exact_mut(block_bytes).enumerate() {
            let (scales, quants) = bytes.split_at_mut(layout.scales.block_bytes());
            match layout.scales {
                Scales::Block | Scales::BlockMin => pack_halves(&lanes, scales),
                Scales::Exponents => {
                    scales.iter_mut().zip(&lanes).for_each(|(byte, lane)| *byte = lane.exponent)
                }
                _ => pack_byte_scales(layout.scales, &lanes, 2 * block, scales),
            }
            pack_quants(layout.quants, &lanes, block, quants);
        }
    }
}

/// The blocks' scales and, where there is room, minimums, as f16.
#[inline(always)]
fn pack_halves(lanes: &[Block; LANES], out: &mut [u8]) {
    for (i, bytes) in out.chunks_exact_mut(2).enumerate() {
        let lane = &lanes[i % LANES];
        bytes.copy_from_slice(&if i < LANES { lane.d } else { lane.min }.to_le_bytes());
    }
}

/// Scales and minimums of the 16 inputs `group` and the 16 after.
#[inline(always)]
fn pack_byte_scales(scales: Scales, lanes: &[Block; LANES], group: usize, out: &mut [u8]) {
    for (i, lane) in lanes.iter().enumerate() {
        out[i] = lane.scales[group] as u8;
        match scales {
            Scales::SuperMin => out[LANES + i] = lane.mins[group],
            _ => out[LANES + i] = lane.scales[group + 1] as u8,
        }
        if scales == Scales::SuperHalvesMin {
            out[2 * LANES + i] = lane.mins[group];
            out[3 * LANES + i] = lane.mins[group + 1];
        }
    }
}

#[inline(always)]
fn pack_quants(quants: Quants, lanes: &[Block; LANES], block: usize, out: &mut [u8]) {
    let vectors = transpose(lanes, block);
    let (out, _) = out.as_chunks_mut::<VECTOR>();
    match quants {
        Quants::Eight => out.copy_from_slice(&vectors),
        Quants::Two => {
            for (out, four) in out.iter_mut().zip(vectors.chunks_exact(4)) {
                for i in 0..VECTOR {
                    out[i] = four[0][i] | four[1][i] << 2 | four[2][i] << 4 | four[3][i] << 6;
                }
            }
        }
        Quants::Four | Quants::Codes => pack_nibbles(&vectors, out),
        Quants::Five => {
            pack_nibbles(&vectors, out);
            for (v, vector) in vectors.iter().enumerate() {
                for i in 0..VECTOR {
                    out[4][i] |= (vector[i] >> 4) << v;
                }
            }
        }
        Quants::Six => {
            pack_nibbles(&vectors, out);
            for (out, four) in out[4..].iter_mut().zip(vectors.chunks_exact(4)) {
                for i in 0..VECTOR {
                    let high = four[0][i] >> 4 | four[1][i] >> 4 << 2;
                    out[i] = high | four[2][i] >> 4 << 4 | four[3][i] >> 4 << 6;
                }
            }
        }
    }
}

/// The eight vectors of a block: four inputs of each lane, then the next four.
#[inline(always)]
fn transpose(lanes: &[Block; LANES], block: usize) -> [[u8; VECTOR]; 8] {
    let mut vectors = [[0; VECTOR]; 8];
    for (i, lane) in lanes.iter().enumerate() {
        let (fours, _) = lane.quants[block * BLOCK..][..BLOCK].as_chunks::<4>();
        for (vector, four) in vectors.iter_mut().zip(fours) {
            vector.as_chunks_mut::<4>().0[i] = *four;
        }
    }
    vectors
}

/// The low nibbles: vector `v` in the low half of bytes, `v + 4` in the high one.
#[inline(always)]
fn pack_nibbles(vectors: &[[u8; VECTOR]; 8], out: &mut [[u8; VECTOR]]) {
    let (low, high) = vectors.split_at(4);
    for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
        for i in 0..VECTOR {
            out[i] = low[i] & 15 | high[i] << 4;
        }
    }
}
