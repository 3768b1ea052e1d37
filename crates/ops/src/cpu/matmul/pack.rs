//! Repacking of weights at load: from rows as they lie in the file to tiles.

use super::layout::{BLOCK, LANES, Layout, Quants, Scales};
use crate::DType;
use crate::ggml::Block;

/// Packs the rows of one tile, `rows` of at most [`LANES`] (the missing ones become zeros), into
/// `tile`, zeroed bytes of [`super::layout::tile_bytes`].
pub(super) fn pack_tile(dtype: DType, rows: &[&[u8]], tile: &mut [u8]) {
    match Layout::of(dtype) {
        Some(layout) => pack_quantised(dtype, layout, rows, tile),
        None => {
            let size = dtype.block_bytes();
            for (lane, row) in rows.iter().enumerate() {
                for (element, column) in row.chunks_exact(size).zip(tile.chunks_exact_mut(size * LANES)) {
                    column[lane * size..][..size].copy_from_slice(element);
                }
            }
        }
    }
}

fn pack_quantised(dtype: DType, layout: Layout, rows: &[&[u8]], tile: &mut [u8]) {
    let mut lanes = vec![Block::zero(); LANES];
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
                _ => pack_byte_scales(layout.scales, &lanes, 2 * block, scales),
            }
            pack_quants(layout.quants, &lanes, block, quants);
        }
    }
}

/// The blocks' scales and, where there is room, minimums, as f16.
fn pack_halves(lanes: &[Block], out: &mut [u8]) {
    for (i, bytes) in out.chunks_exact_mut(2).enumerate() {
        let lane = &lanes[i % LANES];
        bytes.copy_from_slice(&if i < LANES { lane.d } else { lane.min }.to_le_bytes());
    }
}

/// Scales and minimums of the 16 inputs `group` and the 16 after.
fn pack_byte_scales(scales: Scales, lanes: &[Block], group: usize, out: &mut [u8]) {
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

fn pack_quants(quants: Quants, lanes: &[Block], block: usize, out: &mut [u8]) {
    let mut vectors = [[0u8; 4 * LANES]; 8];
    for (i, lane) in lanes.iter().enumerate() {
        let inputs = &lane.quants[block * BLOCK..][..BLOCK];
        for (vector, four) in vectors.iter_mut().zip(inputs.chunks_exact(4)) {
            vector[4 * i..4 * i + 4].copy_from_slice(four);
        }
    }
    for (v, vector) in vectors.iter().enumerate() {
        for (i, &quant) in vector.iter().enumerate() {
            match quants {
                Quants::Two => out[v / 4 * 64 + i] |= quant << (2 * (v % 4)),
                Quants::Eight => out[v * 64 + i] = quant,
                Quants::Four => out[v % 4 * 64 + i] |= (quant & 15) << (4 * (v / 4)),
                Quants::Five => {
                    out[v % 4 * 64 + i] |= (quant & 15) << (4 * (v / 4));
                    out[256 + i] |= (quant >> 4) << v;
                }
                Quants::Six => {
                    out[v % 4 * 64 + i] |= (quant & 15) << (4 * (v / 4));
                    out[256 + v / 4 * 64 + i] |= (quant >> 4) << (2 * (v % 4));
                }
            }
        }
    }
}
