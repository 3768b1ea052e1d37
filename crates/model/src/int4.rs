//! Checkpoints of four-bit integers: GPTQ, AWQ and compressed-tensors' `pack-quantized`, as [`rudder_ops::int4`] has them where its blocks fit,
//! else widened to BF16.
//!
//! All pack eight codes into an int32, the first into its lowest bits, and have a scale, and a zero point or the middle, 8, for `group`
//! inputs of an output. For a matrix `X.weight` of `n` outputs and `k` inputs they hold:
//!
//! - GPTQ (AutoGPTQ's `QuantLinear.pack`): `X.qweight` `[k / 8, n]`, packed along the inputs; `X.qzeros` `[k / group, n / 8]`, each zero point less one
//!   in `checkpoint_format` `gptq`, as it is in `gptq_v2`; `X.scales` `[k / group, n]`; `X.g_idx` `[k]`, each input's group.
//! - AWQ (AutoAWQ's `WQLinear_GEMM`): `X.qweight` `[k, n / 8]`, packed along the outputs, eight of them in the order 0 2 4 6 1 3 5 7; `X.qzeros`
//!   `[k / group, n / 8]` likewise; `X.scales` `[k / group, n]`.
//! - compressed-tensors (`PackedQuantizationCompressor`): `X.weight_packed` `[n, k / 8]`; `X.weight_scale` `[n, k / group]`; where zero points differ,
//!   `X.weight_zero_point` `[n / 8, k / group]`, packed along the outputs.
//!
//! Where inputs are grouped in an order of their own (act-order: `g_idx`, compressed-tensors' `weight_g_idx`), matrices are widened to BF16.

use std::sync::Arc;
use std::thread;

use half::bf16;
use rudder_ops::dequant::dequantize;
use rudder_ops::int4::{BLOCK_BYTES, BLOCK_LEN, word};
use rudder_ops::{DType, RawTensor};
use safetensors::Dtype;

use crate::LoadError;
use crate::safetensors::Checkpoint;

/// Where AWQ packs each of eight outputs.
const AWQ_PLACES: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];
/// Outputs that are packed together.
const PACK: usize = 8;

/// How a checkpoint packs its matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packing {
    /// With what is added to a stored zero point.
    Gptq {
        offset: u8,
    },
    Awq,
    Compressed,
}

/// A matrix in its checkpoint.
struct Source<'a> {
    packing: Packing,
    words: &'a [[u8; 4]],
    /// Zero points; without them all are 8.
    zeros: Option<&'a [[u8; 4]]>,
    scales: Vec<f32>,
    /// Each input's group, where they are not as many inputs each, one group after another.
    order: Option<Vec<u32>>,
    n: usize,
    k: usize,
    groups: usize,
}

/// The code at a place of a word.
fn nibble(word: [u8; 4], place: usize) -> u8 {
    (u32::from_le_bytes(word) >> (4 * place)) as u8 & 15
}

impl Source<'_> {
    /// The codes of output `row`, two a byte, in order.
    fn codes(&self, row: usize, out: &mut [u8]) {
        match self.packing {
            Packing::Compressed => {
                out.copy_from_slice(self.words[row * self.k / PACK..][..self.k / PACK].as_flattened());
            }
            Packing::Gptq { .. } => {
                for (i, out) in out.chunks_exact_mut(4).enumerate() {
                    out.copy_from_slice(&self.words[i * self.n + row]);
                }
            }
            Packing::Awq => {
                let (width, place) = (self.n / PACK, AWQ_PLACES[row % PACK]);
                let code = |input: usize| nibble(self.words[input * width + row / PACK], place);
                for (i, out) in out.iter_mut().enumerate() {
                    *out = code(2 * i) | code(2 * i + 1) << 4;
                }
            }
        }
    }

    fn zero(&self, row: usize, group: usize) -> u8 {
        let Some(zeros) = self.zeros else { return 8 };
        match self.packing {
            Packing::Compressed => nibble(zeros[row / PACK * self.groups + group], row % PACK),
            Packing::Gptq { offset } => {
                nibble(zeros[group * self.n / PACK + row / PACK], row % PACK) + offset
            }
            Packing::Awq => nibble(zeros[group * self.n / PACK + row / PACK], AWQ_PLACES[row % PACK]),
        }
    }

    fn scale(&self, row: usize, group: usize) -> f32 {
        match self.packing {
            Packing::Compressed => self.scales[row * self.groups + group],
            _ => self.scales[group * self.n + row],
        }
    }

    fn group(&self, input: usize) -> usize {
        let in_turn = || input / (self.k / self.groups);
        self.order.as_ref().map_or_else(in_turn, |order| order[input] as usize)
    }

    /// Output `row` in blocks, each with its word, of inputs that are grouped in turn.
    fn keep(&self, row: usize, codes: &mut [u8], out: &mut [u8]) {
        self.codes(row, codes);
        let blocks = codes.chunks_exact(BLOCK_LEN / 2).zip(out.chunks_exact_mut(BLOCK_BYTES));
        for (i, (codes, out)) in blocks.enumerate() {
            let of = self.group(i * BLOCK_LEN);
            out[..4].copy_from_slice(&word(self.scale(row, of), self.zero(row, of)));
            out[4..].copy_from_slice(codes);
        }
    }

    /// Output `row` as bf16.
    fn widen(&self, row: usize, codes: &mut [u8], out: &mut [u8]) {
        self.codes(row, codes);
        for (input, out) in out.chunks_exact_mut(2).enumerate() {
            let (code, group) = (codes[input / 2] >> (4 * (input % 2)) & 15, self.group(input));
            let from_zero = f32::from(code) - f32::from(self.zero(row, group));
            out.copy_from_slice(&bf16::from_f32(self.scale(row, group) * from_zero).to_le_bytes());
        }
    }
}

/// The matrix `name`, `[n, k]`, if the checkpoint holds it in this packing.
///
/// # Errors
/// If it is not whole, of another shape, or an input is in no group.
pub(crate) fn matrix(
    checkpoint: &Checkpoint,
    name: &str,
    packing: Packing,
    [n, k]: [usize; 2],
) -> Result<Option<RawTensor>, LoadError> {
    let Some(stem) = name.strip_suffix(".weight") else { return Ok(None) };
    let names = match packing {
        Packing::Compressed => ["weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx"],
        _ => ["qweight", "scales", "qzeros", "g_idx"],
    };
    let [codes, scales, zeros, order] = names.map(|name| format!("{stem}.{name}"));
    if !checkpoint.contains(&codes) {
        return Ok(None);
    }
    let invalid = |reason: String| LoadError::invalid(checkpoint.folder(), reason);
    if !k.is_multiple_of(PACK) || (packing != Packing::Compressed && !n.is_multiple_of(PACK)) {
        return Err(invalid(format!("tensor {codes} cannot be [{n}, {k}], packed by eight")));
    }
    let scale = checkpoint.tensor(&scales)?;
    let groups = match (packing, &scale.shape[..]) {
        (Packing::Compressed, &[rows, groups]) if rows == n => groups,
        (Packing::Compressed, &[rows]) if rows == n => 1,
        (Packing::Gptq { .. } | Packing::Awq, &[groups, rows]) if rows == n => groups,
        (_, shape) => {
            return Err(invalid(format!("tensor {scales} has shape {shape:?} for a matrix [{n}, {k}]")));
        }
    };
    if groups == 0 || !k.is_multiple_of(groups) {
        return Err(invalid(format!("tensor {scales} has {groups} groups for {k} inputs")));
    }
    let (codes_shape, zeros_shape) = match packing {
        Packing::Gptq { .. } => ([k / PACK, n], [groups, n / PACK]),
        Packing::Awq => ([k, n / PACK], [groups, n / PACK]),
        Packing::Compressed => ([n, k / PACK], [n.div_ceil(PACK), groups]),
    };
    let mut values = vec![0.0; scale.elements()];
    dequantize(scale.dtype, scale.bytes(), &mut values);
    let source = Source {
        packing,
        words: words(checkpoint, &codes, codes_shape)?,
        zeros: checkpoint.contains(&zeros).then(|| words(checkpoint, &zeros, zeros_shape)).transpose()?,
        scales: values,
        order: own_order(checkpoint, &order, k, groups)?,
        n,
        k,
        groups,
    };
    Ok(Some(convert(&source, name)))
}

/// Each input's group, where the tensor `name` is there and says other than what goes without saying.
fn own_order(
    checkpoint: &Checkpoint,
    name: &str,
    k: usize,
    groups: usize,
) -> Result<Option<Vec<u32>>, LoadError> {
    if !checkpoint.contains(name) {
        return Ok(None);
    }
    let (_, bytes) = checkpoint.bytes(name, Dtype::I32)?;
    let order: Vec<u32> = bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
    let in_turn = |(input, &group): (usize, &u32)| group as usize == input / (k / groups);
    // compressed-tensors writes -1 where there is no order.
    if order.iter().all(|&group| group == u32::MAX)
        || (order.len() == k && order.iter().enumerate().all(in_turn))
    {
        return Ok(None);
    }
    if order.len() != k || order.iter().any(|&group| group as usize >= groups) {
        let reason = format!("tensor {name} does not give each of {k} inputs one of {groups} groups");
        return Err(LoadError::invalid(checkpoint.folder(), reason));
    }
    Ok(Some(order))
}

/// A tensor of packed words, of this shape.
fn words<'a>(
    checkpoint: &'a Checkpoint,
    name: &str,
    expected: [usize; 2],
) -> Result<&'a [[u8; 4]], LoadError> {
    let (shape, bytes) = checkpoint.bytes(name, Dtype::I32)?;
    if shape != expected {
        let reason = format!("tensor {name} has shape {shape:?}; {expected:?} was expected");
        return Err(LoadError::invalid(checkpoint.folder(), reason));
    }
    Ok(bytes.as_chunks().0)
}

/// As blocks of ours, or as bf16.
fn convert(source: &Source<'_>, name: &str) -> RawTensor {
    let &Source { n, k, groups, .. } = source;
    // A block of ours has one scale.
    let kept =
        source.order.is_none() && k.is_multiple_of(BLOCK_LEN) && (k / groups).is_multiple_of(BLOCK_LEN);
    let dtype = if kept { DType::INT4 } else { DType::BF16 };
    let row_bytes = k / dtype.block_len() * dtype.block_bytes();
    let mut out = vec![0u8; n * row_bytes];
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let share = n.div_ceil(threads).max(1);
    thread::scope(|scope| {
        for (part, out) in out.chunks_mut((share * row_bytes).max(1)).enumerate() {
            scope.spawn(move || {
                let mut codes = vec![0; k / 2];
                for (row, out) in out.chunks_exact_mut(row_bytes).enumerate() {
                    match kept {
                        true => source.keep(part * share + row, &mut codes, out),
                        false => source.widen(part * share + row, &mut codes, out),
                    }
                }
            });
        }
    });
    // A name of its own: the checkpoint's pages are not where this lies.
    RawTensor::new(format!("{name} as {dtype:?}"), vec![n, k], dtype, Arc::new(out), 0)
        .expect("as many bytes as its rows take")
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::serialize_to_file;
    use safetensors::tensor::TensorView;

    const N: usize = 16;

    fn code(row: usize, input: usize) -> u32 {
        ((row * 5 + input * 7 + input / 16) % 16) as u32
    }

    fn zero(row: usize, group: usize) -> u32 {
        ((row * 3 + group * 5) % 15 + 1) as u32
    }

    /// A power of two, so that no rounding hides a mistake.
    fn scale(row: usize, group: usize) -> f32 {
        2f32.powi((row % 5) as i32 - (group % 3) as i32 - 4)
    }

    /// Packs `value(i)` for eight places `i`.
    fn pack(value: impl Fn(usize) -> u32) -> [u8; 4] {
        (0..8).fold(0u32, |word, i| word | value(i) << (4 * i)).to_le_bytes()
    }

    /// A tensor in the making: name, type, shape and bytes.
    type Stored = (String, Dtype, Vec<usize>, Vec<u8>);

    /// The same matrix as each packing's tensors.
    fn tensors(packing: Packing, k: usize, group: usize) -> Vec<Stored> {
        let (groups, order) = (k / group, [0, 2, 4, 6, 1, 3, 5, 7]);
        let all = |rows: usize, columns: usize, word: &dyn Fn(usize, usize) -> [u8; 4]| -> Vec<u8> {
            (0..rows * columns).flat_map(|i| word(i / columns, i % columns)).collect()
        };
        let scales = |rows: usize, columns: usize, of: &dyn Fn(usize, usize) -> f32| -> Vec<u8> {
            (0..rows * columns)
                .flat_map(|i| half::f16::from_f32(of(i / columns, i % columns)).to_le_bytes())
                .collect()
        };
        let named =
            |name: &str, dtype, shape: [usize; 2], bytes| (format!("x.{name}"), dtype, shape.to_vec(), bytes);
        match packing {
            Packing::Compressed => vec![
                named(
                    "weight_packed",
                    Dtype::I32,
                    [N, k / 8],
                    all(N, k / 8, &|row, i| pack(|p| code(row, 8 * i + p))),
                ),
                named("weight_scale", Dtype::F16, [N, groups], scales(N, groups, &scale)),
                named(
                    "weight_zero_point",
                    Dtype::I32,
                    [N / 8, groups],
                    all(N / 8, groups, &|i, g| pack(|p| zero(8 * i + p, g))),
                ),
            ],
            Packing::Gptq { offset } => vec![
                named(
                    "qweight",
                    Dtype::I32,
                    [k / 8, N],
                    all(k / 8, N, &|i, row| pack(|p| code(row, 8 * i + p))),
                ),
                named("scales", Dtype::F16, [groups, N], scales(groups, N, &|g, row| scale(row, g))),
                named(
                    "qzeros",
                    Dtype::I32,
                    [groups, N / 8],
                    all(groups, N / 8, &|g, i| pack(|p| zero(8 * i + p, g) - u32::from(offset))),
                ),
            ],
            Packing::Awq => vec![
                named(
                    "qweight",
                    Dtype::I32,
                    [k, N / 8],
                    all(k, N / 8, &|input, i| pack(|p| code(8 * i + order[p], input))),
                ),
                named("scales", Dtype::F16, [groups, N], scales(groups, N, &|g, row| scale(row, g))),
                named(
                    "qzeros",
                    Dtype::I32,
                    [groups, N / 8],
                    all(groups, N / 8, &|g, i| pack(|p| zero(8 * i + order[p], g))),
                ),
            ],
        }
    }

    fn read(packing: Packing, tensors: &[Stored], k: usize) -> Result<Option<RawTensor>, LoadError> {
        let folder = tempfile::tempdir().unwrap();
        let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
            (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
        matrix(&Checkpoint::open(folder.path()).unwrap(), "x.weight", packing, [N, k])
    }

    #[test]
    fn every_packing_holds_the_same_matrix() {
        let packings =
            [Packing::Compressed, Packing::Gptq { offset: 1 }, Packing::Gptq { offset: 0 }, Packing::Awq];
        for (k, group, dtype) in [(256, 128, DType::INT4), (384, 384, DType::INT4), (128, 32, DType::BF16)] {
            for packing in packings {
                let found = read(packing, &tensors(packing, k, group), k).unwrap().expect("it is there");
                assert_eq!((found.dtype, &found.shape[..]), (dtype, &[N, k][..]));
                let mut numbers = vec![0.0; N * k];
                dequantize(found.dtype, found.bytes(), &mut numbers);
                for (i, number) in numbers.into_iter().enumerate() {
                    let (row, input) = (i / k, i % k);
                    let from_zero = code(row, input) as f32 - zero(row, input / group) as f32;
                    assert_eq!(number, scale(row, input / group) * from_zero, "{packing:?}, {row}, {input}");
                }
            }
        }
    }

    #[test]
    fn inputs_that_are_grouped_in_an_order_of_their_own_are_what_their_groups_make_of_them() {
        let (k, group) = (256, 128);
        // As many inputs in each group, and unevenly.
        for of in [|input: usize| input * 7 / 3 % 2, |input: usize| (input % 5).min(1)] {
            for packing in [Packing::Gptq { offset: 1 }, Packing::Gptq { offset: 0 }, Packing::Compressed] {
                let name = if packing == Packing::Compressed { "x.weight_g_idx" } else { "x.g_idx" };
                let order = (0..k).flat_map(|input| (of(input) as u32).to_le_bytes()).collect();
                let mut tensors = tensors(packing, k, group);
                tensors.push((name.into(), Dtype::I32, vec![k], order));
                let found = read(packing, &tensors, k).unwrap().expect("it is there");
                assert_eq!((found.dtype, &found.shape[..]), (DType::BF16, &[N, k][..]));
                let mut numbers = vec![0.0; N * k];
                dequantize(found.dtype, found.bytes(), &mut numbers);
                for (i, number) in numbers.into_iter().enumerate() {
                    let (row, input) = (i / k, i % k);
                    let from_zero = code(row, input) as f32 - zero(row, of(input)) as f32;
                    assert_eq!(number, scale(row, of(input)) * from_zero, "{packing:?}, {row}, {input}");
                }
            }
        }
        let mut without = tensors(Packing::Compressed, k, group);
        without.push(("x.weight_g_idx".into(), Dtype::I32, vec![k], vec![0xff; 4 * k]));
        assert_eq!(read(Packing::Compressed, &without, k).unwrap().expect("it is there").dtype, DType::INT4);
    }

    #[test]
    fn a_checkpoint_knows_how_large_it_is_widened() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("model.safetensors");
        let bytes = [0u8; 64];
        let view = |dtype, shape| TensorView::new(dtype, shape, &bytes).unwrap();
        let views = [
            ("a.weight_packed", view(Dtype::I32, vec![16])),
            ("b.weight", view(Dtype::F8_E4M3, vec![64])),
            ("c.weight", view(Dtype::U8, vec![64])),
            ("c_blocks", view(Dtype::U8, vec![64])),
            ("d.weight", view(Dtype::BF16, vec![32])),
        ];
        serialize_to_file(views, None, &file).unwrap();
        assert_eq!(Checkpoint::open(folder.path()).unwrap().widened_bytes(), 64 * (4 + 2 + 4 + 1 + 1));
    }

    #[test]
    fn without_zero_points_codes_count_from_8() {
        let mut symmetric = tensors(Packing::Compressed, 128, 128);
        symmetric.pop();
        let found = read(Packing::Compressed, &symmetric, 128).unwrap().expect("it is there");
        let mut numbers = vec![0.0; N * 128];
        dequantize(found.dtype, found.bytes(), &mut numbers);
        assert_eq!(numbers[3], scale(0, 0) * (code(0, 3) as f32 - 8.0));
    }

    #[test]
    fn orders_other_shapes_and_what_is_not_there_are_told_apart() {
        let packing = Packing::Gptq { offset: 1 };
        let mut ordered = tensors(packing, 256, 128);
        let order = |of: fn(u32) -> u32| (0..256u32).flat_map(|i| of(i).to_le_bytes()).collect::<Vec<u8>>();
        ordered.push(("x.g_idx".into(), Dtype::I32, vec![256], order(|i| i / 128)));
        assert!(read(packing, &ordered, 256).unwrap().is_some());
        ordered[3].3 = order(|i| i % 3);
        assert!(read(packing, &ordered, 256).unwrap_err().to_string().contains("x.g_idx"));
        ordered[3] = ("x.g_idx".into(), Dtype::I32, vec![255], ordered[3].3[..4 * 255].to_vec());
        assert!(read(packing, &ordered, 256).unwrap_err().to_string().contains("x.g_idx"));
        let refusal = read(packing, &tensors(packing, 128, 128), 256).unwrap_err().to_string();
        assert!(refusal.contains("x.qweight"), "{refusal}");
        assert!(read(Packing::Compressed, &ordered, 256).unwrap().is_none());
    }
}
