//! BF16 weights in twelve bits each, without loss.
//!
//! A bf16's high byte is its sign and the upper seven bits of its exponent. Among the weights of a trained matrix sixteen
//! of these bytes make up all but one in thousands, for the exponents lie close together. (That trained exponents
//! carry less than three bits is known from Zhang et al. 2025, arXiv:2504.11651, who code them by Huffman.) So a tile keeps
//! its weights' low bytes, and of the high ones four-bit codes into a table of sixteen; the few that are not in
//! the table are patches beside the tiles. A step of decoding, which is bound by the bytes it reads, reads a quarter fewer.
//!
//! A tile is a header, the table and the index of its first patch, and then a record for each eight inputs of its
//! sixteen outputs: a vector of codes and two of low bytes. In each 16 bytes of the first vector of low bytes, the first
//! eight are of the record's first pair of inputs and the others of the second; the second vector is of the third and
//! fourth pair likewise. Codes in low nibbles belong to the first vector, those in high ones to the second. Interleaved with
//! the high bytes they stand for, 16 by 16, the low bytes are the vectors of a plain tile.

use super::layout::LANES;
use super::quantize::flush_bf16;
use super::unit::VECTOR;

/// Inputs of a record.
pub(super) const RECORD_INPUTS: usize = 8;
/// Bytes of a record.
pub(super) const RECORD_BYTES: usize = 3 * VECTOR;
/// Bytes of a tile's header, a cache line.
pub(super) const HEADER_BYTES: usize = 64;
/// High bytes that have a code.
pub(super) const TABLE_BYTES: usize = 16;
/// Weights a patch pays for. With more patches a step of decoding would wait for them and not for memory.
const WEIGHTS_PER_PATCH: usize = 256;
/// Behind a tile's last patch.
const END: u32 = u32::MAX;
/// Records that patches can tell apart, and from [`END`].
const MAX_RECORDS: usize = (1 << 17) - 1;

/// Bytes of a compact tile of `width` inputs.
pub(super) fn tile_bytes(width: usize) -> usize {
    HEADER_BYTES + width / RECORD_INPUTS * RECORD_BYTES
}

/// Whether tiles of `width` inputs have a compact form at all.
pub(super) fn fits(width: usize) -> bool {
    width.is_multiple_of(RECORD_INPUTS) && width / RECORD_INPUTS <= MAX_RECORDS
}

/// The high bytes of a tile that have codes, and how many weights have others.
#[derive(Debug, Clone)]
pub(super) struct Table {
    high: [u8; TABLE_BYTES],
    missed: usize,
}

/// Whether the compact form pays for `weights` weights in tiles of these tables.
pub(super) fn pays(tables: &[Table], weights: usize) -> bool {
    let missed: usize = tables.iter().map(|table| table.missed).sum();
    missed <= weights / WEIGHTS_PER_PATCH && missed + tables.len() <= u32::MAX as usize
}

impl Table {
    /// The table for a tile of `rows`, bf16 as in the file; rows that are missing count as zeros.
    pub fn of(rows: &[&[u8]]) -> Self {
        // Two counters for each byte: the next weight often has the same one.
        let mut counts = [[0u32; 256]; 2];
        for row in rows {
            for &[a, b, c, d] in row.as_chunks::<4>().0 {
                counts[0][usize::from(high([a, b]))] += 1;
                counts[1][usize::from(high([c, d]))] += 1;
            }
        }
        let mut counts: [u32; 256] = std::array::from_fn(|byte| counts[0][byte] + counts[1][byte]);
        let width = rows.first().map_or(0, |row| row.len() / 2);
        counts[0] += ((LANES - rows.len()) * width) as u32;
        let mut order: [u8; 256] = std::array::from_fn(|byte| byte as u8);
        order.sort_unstable_by_key(|&byte| (std::cmp::Reverse(counts[usize::from(byte)]), byte));
        let (first, others) = order.split_at(TABLE_BYTES);
        let missed = others.iter().map(|&byte| counts[usize::from(byte)] as usize).sum();
        Self { high: std::array::from_fn(|i| first[i]), missed }
    }

    /// Patches of its tile, the end among them.
    pub fn patches(&self) -> usize {
        self.missed + 1
    }

    /// Packs the tile whose plain form is `plain` into `tile`, of [`tile_bytes`], and fills `patches`, of
    /// [`Table::patches`], which begin at `first_patch` of all.
    pub fn pack(&self, plain: &[u8], first_patch: u32, tile: &mut [u8], patches: &mut [u32]) {
        const NONE: u8 = 0x80;
        let mut codes = [NONE; 256];
        self.high.iter().zip(0..).for_each(|(&high, code)| codes[usize::from(high)] = code);
        let (header, records) = tile.split_at_mut(HEADER_BYTES);
        header[..TABLE_BYTES].copy_from_slice(&self.high);
        header[TABLE_BYTES..][..4].copy_from_slice(&first_patch.to_le_bytes());
        let mut patches = patches.iter_mut();
        let mut patch = |value| *patches.next().expect("as many as were missed") = value;
        let records = records.chunks_exact_mut(RECORD_BYTES);
        for (record, (plain, bytes)) in plain.chunks_exact(4 * VECTOR).zip(records).enumerate() {
            let (nibbles, low) = bytes.split_at_mut(VECTOR);
            let high = split(plain, low);
            let mut coded = high.map(|byte| codes[usize::from(byte)]);
            if coded.iter().fold(0, |all, code| all | code) & NONE != 0 {
                for (place, code) in coded.iter_mut().enumerate().filter(|(_, code)| **code == NONE) {
                    patch((record as u32) << 15 | (place as u32) << 8 | u32::from(high[place]));
                    *code = 0;
                }
            }
            let (first, second) = coded.split_at(VECTOR);
            for ((nibbles, first), second) in nibbles.iter_mut().zip(first).zip(second) {
                *nibbles = first | second << 4;
            }
        }
        patch(END);
    }
}

/// Puts the low bytes of a record's four plain vectors in their places and gives the high ones in the same order.
fn split(plain: &[u8], low: &mut [u8]) -> [u8; 2 * VECTOR] {
    let mut high = [0; 2 * VECTOR];
    // Sixteen bytes of a plain vector are eight of each half.
    for (from, halves) in plain.as_chunks::<16>().0.iter().enumerate() {
        let (vector, group) = (from / 4, from % 4);
        let place = vector / 2 * VECTOR + group * 16 + vector % 2 * 8;
        for (i, &[l, h]) in halves.as_chunks::<2>().0.iter().enumerate() {
            low[place + i] = l;
            high[place + i] = h;
        }
    }
    high
}

/// The high byte of a weight as it is packed.
#[inline(always)]
fn high(half: [u8; 2]) -> u8 {
    (flush_bf16(u16::from_le_bytes(half)) >> 8) as u8
}

/// What a tile's header says: its table and, among the part's patches, its own.
#[inline(always)]
pub(super) fn header<'a>(bytes: &[u8; HEADER_BYTES], patches: &'a [u32]) -> ([u8; TABLE_BYTES], Patches<'a>) {
    let table = std::array::from_fn(|i| bytes[i]);
    let first = u32::from_le_bytes(std::array::from_fn(|i| bytes[TABLE_BYTES + i]));
    let mut rest = patches[first as usize..].iter();
    let next = rest.next().copied().unwrap_or(END);
    (table, Patches { next, rest })
}

/// A tile's patches, in the order of its records.
pub(super) struct Patches<'a> {
    next: u32,
    rest: std::slice::Iter<'a, u32>,
}

impl Patches<'_> {
    /// Whether there are any for a record; to be asked for one record after another.
    #[inline(always)]
    pub fn are_due(&self, record: usize) -> bool {
        (self.next >> 15) as usize == record
    }

    /// Puts those of a record in their places among its high bytes.
    #[inline(always)]
    pub fn apply(&mut self, record: usize, high: &mut [u8; 2 * VECTOR]) {
        while self.are_due(record) {
            high[(self.next >> 8) as usize % (2 * VECTOR)] = self.next as u8;
            self.next = self.rest.next().copied().unwrap_or(END);
        }
    }
}
