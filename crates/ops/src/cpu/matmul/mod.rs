//! Multiplication of activations with packed weights, `x * w^T`.
//!
//! Quantised weights meet activations quantised to int8 in blocks of 32, so a block's dot product
//! is exact in integers and only its scaling is floating point; BF16 weights, kept in twelve bits where
//! that loses nothing, meet activations rounded to bf16; F32 and F16 weights are multiplied in f32. An
//! output depends bit for bit on its own row of `x` and its own row of weights alone: not on the batch,
//! the threads, or how the work was split.

mod bf16;
mod compact;
mod gated;
mod isa;
mod kernel;
mod layout;
#[cfg(target_arch = "aarch64")]
mod neon;
mod pack;
mod quantize;
#[cfg(test)]
mod tests;
mod unit;
#[cfg(target_arch = "x86_64")]
mod x86;

use super::memory::{Memory, Number, Numbers};
use super::pool::Pool;
use crate::{Activation, DType, OpError, RawTensor, Result};
use bf16::{Compact, group_tiles};
use compact::Table;
use gated::Half;
pub(super) use isa::Isa;
pub(super) use kernel::prefetch;
use kernel::{Input, Job, MANY_ROWS};
use layout::{BLOCK, LANES, Layout, tile_bytes};
use quantize::Activations;
pub(super) use quantize::{Pairs, pair_bf16, round_bf16};
use std::cell::RefCell;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Work pieces per thread: enough that a thread that is held up delays little.
const PIECES: usize = 8;

/// A weight matrix `[rows, width]` repacked for the CPU's kernels: one or several parts stacked
/// along the rows (outputs), each in its own storage format.
pub struct PackedMatrix {
    parts: Vec<Part>,
    rows: usize,
    width: usize,
}

/// Rows of one storage format.
struct Part {
    dtype: DType,
    rows: usize,
    tile_bytes: usize,
    tiles: Memory,
    /// Where the tiles are compact, what belongs to them.
    patches: Option<Vec<u32>>,
}

/// A pointer to memory whose disjoint pieces are written by the pool's threads.
struct Shared<T>(*mut T);

// SAFETY: every user writes pieces that no other part of the job touches.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    fn at(&self, index: usize) -> *mut T {
        self.0.wrapping_add(index)
    }
}

impl PackedMatrix {
    /// Packs `parts`, each `[rows, width]` of one width, stacked in order.
    ///
    /// # Errors
    /// If there is no part, a part is not a matrix, widths differ, or memory runs out.
    pub fn pack(pool: &Pool, parts: &[RawTensor]) -> Result<Self> {
        let Some(width) = parts.first().and_then(|part| part.shape.last().copied()) else {
            return Err(OpError::Backend("a matrix needs at least one tensor with a shape".into()));
        };
        let parts = parts.iter().map(|part| Part::pack(pool, &part.widened(), width));
        let parts = parts.collect::<Result<Vec<_>>>()?;
        Ok(Self { rows: parts.iter().map(|part| part.rows).sum(), parts, width })
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Whether [`gated`] computes it, its parts being gate and up.
    fn is_gated(&self) -> bool {
        let [gate, up] = &self.parts[..] else { return false };
        self.is_bf16() && gate.rows == up.rows && gate.rows.is_multiple_of(LANES)
    }

    /// Whether it multiplies pairs of bf16 alone.
    pub(super) fn is_bf16(&self) -> bool {
        self.parts.iter().all(|part| part.dtype == DType::BF16)
    }

    /// Inputs.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Bytes of room that a thread needs to multiply many rows: for a group of widened tiles, where some are compact.
    fn room(&self) -> usize {
        match self.parts.iter().any(|part| part.patches.is_some()) {
            true => group_tiles(self.width).max(4) * tile_bytes(DType::BF16, self.width),
            false => 0,
        }
    }

    /// Bytes the packed weights take, which is what a one-row multiplication reads.
    pub fn bytes(&self) -> usize {
        let patches = |part: &Part| part.patches.as_ref().map_or(0, |patches| size_of_val(&patches[..]));
        self.parts.iter().map(|part| part.tiles.bytes().len() + patches(part)).sum()
    }
}

impl Part {
    fn pack(pool: &Pool, tensor: &RawTensor, width: usize) -> Result<Self> {
        let rows = match tensor.shape[..] {
            [rows, columns] if columns == width && rows > 0 && width > 0 => rows,
            _ => {
                return Err(OpError::Shape {
                    name: tensor.name.clone(),
                    expected: format!("[outputs, {width}], neither of them 0"),
                    found: format!("{:?}", tensor.shape),
                });
            }
        };
        if tensor.dtype == DType::BF16 && compact::fits(width) {
            let tables = tables(pool, tensor, rows);
            if compact::pays(&tables, rows * width) {
                return Self::compact(pool, tensor, rows, width, &tables);
            }
        }
        Self::plain(pool, tensor, rows, width)
    }

    /// Every tile as [`layout`] says.
    fn plain(pool: &Pool, tensor: &RawTensor, rows: usize, width: usize) -> Result<Self> {
        let dtype = tensor.dtype;
        let tile_bytes = tile_bytes(dtype, width);
        let mut tiles = Memory::new(rows.div_ceil(LANES) * tile_bytes)?;
        let to = Shared(tiles.bytes_mut().as_mut_ptr());
        for_tiles(pool, rows.div_ceil(LANES), |range| {
            for tile in range {
                // SAFETY: tile `tile` lies inside the mapping and is written by this piece alone.
                let to = unsafe { std::slice::from_raw_parts_mut(to.at(tile * tile_bytes), tile_bytes) };
                pack::pack_tile(dtype, &rows_of_tile(tensor, rows, tile), to);
            }
        });
        Ok(Self { dtype, rows, tile_bytes, tiles, patches: None })
    }

    /// Every tile as [`compact`] says, by its table.
    fn compact(pool: &Pool, tensor: &RawTensor, rows: usize, width: usize, tables: &[Table]) -> Result<Self> {
        let (dtype, tile_bytes) = (tensor.dtype, compact::tile_bytes(width));
        let mut tiles = Memory::new(tables.len() * tile_bytes)?;
        let mut first_patches = Vec::with_capacity(tables.len());
        let mut count = 0;
        for table in tables {
            first_patches.push(count);
            count += table.patches();
        }
        let mut patches = vec![0; count];
        let to = (Shared(tiles.bytes_mut().as_mut_ptr()), Shared(patches.as_mut_ptr()));
        for_tiles(pool, tables.len(), |range| {
            let mut plain = vec![0; layout::tile_bytes(dtype, width)];
            for tile in range {
                let (table, first) = (&tables[tile], first_patches[tile]);
                // SAFETY: tile `tile` and its patches lie inside what was allocated and are written by this piece alone.
                let (to, patches) = unsafe {
                    (
                        std::slice::from_raw_parts_mut(to.0.at(tile * tile_bytes), tile_bytes),
                        std::slice::from_raw_parts_mut(to.1.at(first), table.patches()),
                    )
                };
                plain.fill(0);
                pack::pack_tile(dtype, &rows_of_tile(tensor, rows, tile), &mut plain);
                table.pack(&plain, first as u32, to, patches);
            }
        });
        Ok(Self { dtype, rows, tile_bytes, tiles, patches: Some(patches) })
    }

    fn tile_count(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    /// What a job with these tiles needs where they are compact; `next` are the tiles that its thread is likely to take next, after as many
    /// pieces as there are threads.
    fn compact_in(&self, room: *mut u8, next: Range<usize>) -> Option<Compact<'_>> {
        let next = &self.tiles.bytes()[next.start * self.tile_bytes..next.end * self.tile_bytes];
        self.patches.as_ref().map(|patches| Compact { patches, room, next })
    }
}

/// The tables that the tiles of a matrix would have in their compact form.
fn tables(pool: &Pool, tensor: &RawTensor, rows: usize) -> Vec<Table> {
    let tables = Mutex::new(vec![None; rows.div_ceil(LANES)]);
    for_tiles(pool, rows.div_ceil(LANES), |range| {
        let some: Vec<Table> =
            range.clone().map(|tile| Table::of(&rows_of_tile(tensor, rows, tile))).collect();
        let mut all = tables.lock().unwrap_or_else(PoisonError::into_inner);
        all[range].iter_mut().zip(some).for_each(|(to, table)| *to = Some(table));
    });
    tables.into_inner().unwrap_or_else(PoisonError::into_inner).into_iter().flatten().collect()
}

/// Calls `job` with ranges that together are all tiles, on the pool's threads.
fn for_tiles(pool: &Pool, tiles: usize, job: impl Fn(Range<usize>) + Sync) {
    let pieces = tiles.min(pool.threads() * PIECES);
    pool.run(pieces, |piece| job(piece * tiles / pieces..(piece + 1) * tiles / pieces));
}

/// The rows of a tile of a matrix of `rows` rows, as they lie in the file.
fn rows_of_tile(tensor: &RawTensor, rows: usize, tile: usize) -> Vec<&[u8]> {
    let row_bytes = tensor.bytes().len() / rows;
    let bytes = &tensor.bytes()[tile * LANES * row_bytes..rows.min((tile + 1) * LANES) * row_bytes];
    bytes.chunks_exact(row_bytes).collect()
}

/// Calls `work` with room for `bytes` bytes of this thread's own, which starts at a cache line.
///
/// # Panics
/// If there is no more memory; once there was room for so many bytes, it is kept.
fn with_room<T>(bytes: usize, work: impl FnOnce(*mut u8) -> T) -> T {
    thread_local!(static ROOM: RefCell<Option<Memory>> = const { RefCell::new(None) });
    ROOM.with_borrow_mut(|room| match room {
        Some(room) if room.bytes().len() >= bytes => work(room.bytes_mut().as_mut_ptr()),
        _ => {
            work(room.insert(Memory::new(bytes).expect("memory for widened tiles")).bytes_mut().as_mut_ptr())
        }
    })
}

/// Buffers for converted activations, reused by every multiplication.
pub struct Scratch {
    quantized: Numbers<Activations>,
    /// Pairs of bf16.
    pairs: Numbers<u32>,
    /// Such pairs that [`gated`] made.
    gated: Numbers<u32>,
}

impl Scratch {
    /// Buffers for up to `max_rows` rows of up to `max_width` inputs.
    pub fn new(max_rows: usize, max_width: usize) -> Self {
        Self {
            quantized: numbers(max_rows * max_width.div_ceil(BLOCK)),
            pairs: numbers(max_rows * max_width.div_ceil(2)),
            gated: numbers(max_rows * max_width.div_ceil(2)),
        }
    }

    /// `rows` rows of `x` as the parts of `w` want them.
    fn convert<'a>(&'a mut self, pool: &Pool, x: Rows<'a>, rows: usize, w: &PackedMatrix) -> Inputs<'a> {
        let width = w.width;
        let mut inputs = Inputs { plain: x.plain, ..Inputs::default() };
        if w.parts.iter().any(|part| Layout::of(part.dtype).is_some()) {
            inputs.quantized =
                convert_rows(pool, x.plain, rows, width / BLOCK, &mut self.quantized, quantize::quantize);
        }
        if w.parts.iter().any(|part| part.dtype == DType::BF16) {
            inputs.pairs = x.to_pairs(pool, rows, width, &mut self.pairs);
        }
        inputs
    }
}

/// Rows of activations that are multiplied.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// `[rows, width]`.
    pub(super) plain: &'a [f32],
    /// The same as [`Pairs`] makes of each row, where it is at hand.
    pub(super) pairs: Option<&'a [u32]>,
}

impl<'a> From<&'a [f32]> for Rows<'a> {
    fn from(plain: &'a [f32]) -> Self {
        Self { plain, pairs: None }
    }
}

impl<'a> Rows<'a> {
    /// All `rows` rows of `width` numbers as pairs of bf16, converted to `room` where need be.
    fn to_pairs(self, pool: &Pool, rows: usize, width: usize, room: &'a mut Numbers<u32>) -> &'a [u32] {
        if let Some(pairs) = self.pairs {
            assert_eq!(pairs.len(), rows * width.div_ceil(2), "pairs of x");
            return pairs;
        }
        let to_bf16 = |x: &[f32], out: &mut [u32]| quantize::to_bf16(x, width, out);
        convert_rows(pool, self.plain, rows, width.div_ceil(2), room, to_bf16)
    }
}

/// A multiplication's input in all forms that its weights' formats want.
#[derive(Clone, Copy, Default)]
struct Inputs<'a> {
    plain: &'a [f32],
    pairs: &'a [u32],
    quantized: &'a [Activations],
}

impl<'a> Inputs<'a> {
    /// The form that weights stored as `dtype` want.
    fn of(self, dtype: DType) -> Input<'a> {
        match dtype {
            DType::F32 | DType::F16 => Input::Plain(self.plain),
            DType::BF16 => Input::Pairs(self.pairs),
            _ => Input::Quantized(self.quantized),
        }
    }
}

/// Room for converted activations.
///
/// # Panics
/// If there is no more memory.
fn numbers<T: Number>(len: usize) -> Numbers<T> {
    Numbers::new(len).expect("memory for activations")
}

/// Converts `rows` rows of `x` to `units` values each, with growing `out` where it is too short.
fn convert_rows<'a, T: Number + Send>(
    pool: &Pool,
    x: &[f32],
    rows: usize,
    units: usize,
    out: &'a mut Numbers<T>,
    convert: impl Fn(&[f32], &mut [T]) + Sync,
) -> &'a [T] {
    let out = grown(out, rows * units);
    let (to, width) = (Shared(out.as_mut_ptr()), x.len() / rows);
    // Few rows take less time than handing them over.
    let pieces = if rows < 8 { 1 } else { rows.min(pool.threads() * PIECES) };
    pool.run(pieces, |piece| {
        let (first, last) = (piece * rows / pieces, (piece + 1) * rows / pieces);
        // SAFETY: these rows lie inside `out` and are written by this piece alone.
        let out = unsafe { std::slice::from_raw_parts_mut(to.at(first * units), (last - first) * units) };
        convert(&x[first * width..last * width], out);
    });
    out
}

/// The first `len` numbers of `room`, which is made anew where it is too short.
///
/// # Panics
/// If there is no more memory.
fn grown<T: Number>(room: &mut Numbers<T>, len: usize) -> &mut [T] {
    if room.len() < len {
        *room = numbers(len);
    }
    &mut room[..len]
}

/// `out[r] = x[r] * w^T + bias`: `x` is `[rows, w.width()]`, `out` `[rows, w.rows()]`, both dense
/// and row-major; `bias` is `[w.rows()]`.
///
/// # Panics
/// If the lengths of `x`, `bias` and `out` are not as above.
pub fn matmul(
    pool: &Pool,
    scratch: &mut Scratch,
    x: Rows<'_>,
    rows: usize,
    w: &PackedMatrix,
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    matmul_on(Isa::widest(), pool, scratch, x, rows, w, bias, out);
}

/// [`matmul`] on a unit that this processor has.
#[allow(clippy::too_many_arguments)] // matmul's, and the unit
fn matmul_on(
    isa: Isa,
    pool: &Pool,
    scratch: &mut Scratch,
    x: Rows<'_>,
    rows: usize,
    w: &PackedMatrix,
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    assert_eq!(x.plain.len(), rows * w.width, "x");
    if rows > 0 {
        multiply(isa, pool, scratch.convert(pool, x, rows, w), rows, w, bias, out);
    }
}

/// [`matmul`] of rows in the forms that `w` wants.
fn multiply(
    isa: Isa,
    pool: &Pool,
    x: Inputs<'_>,
    rows: usize,
    w: &PackedMatrix,
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    assert_eq!(out.len(), rows * w.rows, "out");
    assert!(bias.is_none_or(|bias| bias.len() == w.rows), "bias");
    let out = Shared(out.as_mut_ptr());
    let tiles: usize = w.parts.iter().map(Part::tile_count).sum();
    let most = pool.threads() * PIECES;
    let (pieces, piece_tiles) = match w.is_bf16() {
        // The kernel for many rows takes two tiles at a time; pieces of one size end at the same time.
        true if rows >= MANY_ROWS => {
            let twos = tiles.div_ceil(2).div_ceil(most);
            (tiles.div_ceil(2 * twos), Some(2 * twos))
        }
        _ => (tiles.min(most), None),
    };
    let room = if rows >= MANY_ROWS { w.room() } else { 0 };
    let run = |piece: usize, room: *mut u8| {
        let cut = |piece| match piece_tiles {
            Some(count) => tiles.min(piece * count),
            None => tiles.min(piece * tiles / pieces),
        };
        let (first, last) = (cut(piece), cut(piece + 1));
        let (mut part_tile, mut part_row) = (0, 0);
        for part in &w.parts {
            let own = |tile: usize| tile.clamp(part_tile, part_tile + part.tile_count()) - part_tile;
            let (from, to) = (own(first), own(last));
            let next = own(cut(piece + pool.threads()))..own(cut(piece + pool.threads() + 1));
            if from < to {
                let row = part_row + from * LANES;
                let outputs = part.rows.min(to * LANES) - from * LANES;
                let job = Job {
                    tiles: &part.tiles.bytes()[from * part.tile_bytes..to * part.tile_bytes],
                    tile_bytes: part.tile_bytes,
                    width: w.width,
                    rows,
                    input: x.of(part.dtype),
                    compact: part.compact_in(room, next),
                    bias: bias.map(|bias| &bias[row..row + outputs]),
                    outputs,
                    out: out.at(row),
                    stride: w.rows,
                };
                // SAFETY: the processor has `isa`; the sizes agree as asserted above and as packed; columns
                // `row .. row + outputs` of `out` and the room are written by this piece alone.
                unsafe { isa.kernel(part.dtype)(&job) };
            }
            part_tile += part.tile_count();
            part_row += part.rows;
        }
    };
    pool.run(pieces, |piece| with_room(room, |room| run(piece, room)));
}

/// Whether a gated MLP of `rows` rows goes through [`gated`] and [`matmul_gated`].
pub(super) fn takes_gated(rows: usize, gate_up: &PackedMatrix, down: &PackedMatrix) -> bool {
    rows >= MANY_ROWS && gate_up.is_gated() && down.is_bf16()
}

/// Joins the halves of `x * w^T + bias`, gate and up, by `activation` and keeps the result in `scratch`, as *down* wants it. The processor
/// has the unit.
///
/// # Panics
/// If `w` is no such matrix or a length is not as for [`matmul`].
#[allow(clippy::too_many_arguments)] // matmul's, the unit and the activation
pub(super) fn gated(
    isa: Isa,
    pool: &Pool,
    scratch: &mut Scratch,
    activation: Activation,
    x: Rows<'_>,
    rows: usize,
    w: &PackedMatrix,
    bias: Option<&[f32]>,
) {
    let [gate, up] = &w.parts[..] else { panic!("gate and up") };
    assert!(w.is_gated() && x.plain.len() == rows * w.width && bias.is_none_or(|bias| bias.len() == w.rows));
    let (width, outputs) = (w.width, gate.rows);
    let x = x.to_pairs(pool, rows, width, &mut scratch.pairs);
    let out = Shared(grown(&mut scratch.gated, rows * outputs / 2).as_mut_ptr());
    let tiles = gate.tile_count();
    let pieces = tiles.min(pool.threads() * PIECES);
    let run = |piece: usize, room: *mut u8| {
        let cut = |piece| tiles.min(piece * tiles / pieces);
        let (first, last) = (cut(piece), cut(piece + 1));
        let next = cut(piece + pool.threads())..cut(piece + pool.threads() + 1);
        let halves = [(gate, 0), (up, outputs)].map(|(part, from)| Half {
            tiles: &part.tiles.bytes()[first * part.tile_bytes..last * part.tile_bytes],
            tile_bytes: part.tile_bytes,
            compact: part.compact_in(room, next.clone()),
            bias: bias.map(|bias| &bias[from + first * LANES..from + last * LANES]),
        });
        let job = gated::Job {
            activation,
            halves,
            tiles: last - first,
            width,
            rows,
            x,
            out: out.at(first * LANES / 2),
            stride: outputs / 2,
        };
        // SAFETY: the processor has `isa`; the sizes agree as asserted above and as packed; these columns of `out` and
        // the room are written by this piece alone.
        unsafe { isa.gated()(&job) };
    };
    pool.run(pieces, |piece| with_room(w.room(), |room| run(piece, room)));
}

/// [`matmul`] of the `rows` rows that [`gated`] left in `scratch`.
///
/// # Panics
/// If `w` is not of bf16 or of another width, or a length is not as for [`matmul`].
pub(super) fn matmul_gated(
    pool: &Pool,
    scratch: &Scratch,
    rows: usize,
    w: &PackedMatrix,
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    assert!(w.is_bf16() && w.width.is_multiple_of(LANES));
    let pairs = &scratch.gated[..rows * w.width / 2];
    multiply(Isa::widest(), pool, Inputs { pairs, ..Inputs::default() }, rows, w, bias, out);
}
