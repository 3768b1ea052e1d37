//! The reference backend: candle tensors on the CPU, f32, each op as its definition reads.
//!
//! It is the oracle that the other backends are tested against, so it shares none of their code:
//! weights are widened by candle's own routines. It is slow and allocates as it likes.

use crate::{
    Activation, AttentionOptions, AttentionShape, BLOCK_SIZE, Backend, Batch, DType, ExpertWeights, OpError,
    QkNorm, Rank, RawTensor, Result, Rope, RopePairing, SampleRow, Sampled, SamplerScratch, sample_row,
};
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{D, Device, IndexOp, Tensor as Candle};
use rudder_comm::Member;
use std::borrow::Cow;

const CPU: Device = Device::Cpu;

/// The reference [`Backend`].
#[derive(Default)]
pub struct Reference {
    batch: Batch,
    rope: Option<Rope>,
    member: Option<Member>,
}

/// Activations; `None` before they are first written.
pub struct Tensor {
    rows: Option<Candle>,
    width: usize,
}

/// The experts of a layer.
pub struct Experts {
    experts: Vec<Expert>,
    activation: Activation,
}

/// The MLP of one expert: gate, up and down, and their biases.
struct Expert {
    weights: [Candle; 3],
    biases: Option<[Candle; 3]>,
}

/// Keys and values of every layer, `[blocks * BLOCK_SIZE, kv_heads * head_dim]` each.
pub struct KvCache(Vec<[Candle; 2]>);

impl Reference {
    /// A reference backend.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same as a rank of a model that is cut.
    pub fn in_group(self, member: Member) -> Self {
        Self { member: Some(member), ..self }
    }

    /// Cosines and sines of this step's rows, `[rows, 1, head_dim / 2]`.
    fn angles(&self) -> Result<(RopePairing, Candle, Candle)> {
        let rope = self.rope.as_ref().ok_or_else(|| OpError::Backend("no rope is loaded".to_owned()))?;
        let positions: Vec<f32> = self.batch.positions.iter().map(|&p| p as f32).collect();
        let positions = Candle::from_vec(positions, (self.batch.rows(), 1, 1), &CPU)?;
        let frequencies = Candle::new(rope.inv_freq.as_slice(), &CPU)?.reshape((1, 1, ()))?;
        let angles = positions.broadcast_mul(&frequencies)?;
        Ok((rope.pairing, angles.cos()?, angles.sin()?))
    }
}

impl Tensor {
    fn get(&self) -> Result<&Candle> {
        self.rows.as_ref().ok_or_else(|| OpError::Backend("a tensor is read before it is written".to_owned()))
    }

    fn set(&mut self, rows: Candle) -> Result<()> {
        let (_, width) = rows.dims2()?;
        if width != self.width {
            return Err(OpError::Backend(format!("an output is {} wide, not {width}", self.width)));
        }
        self.rows = Some(rows.contiguous()?);
        Ok(())
    }
}

/// Widens a stored tensor to f32.
fn widen(raw: &RawTensor) -> Result<Candle> {
    let dtype = match raw.dtype {
        DType::F32 => GgmlDType::F32,
        DType::F16 => GgmlDType::F16,
        DType::BF16 => GgmlDType::BF16,
        DType::Q4_0 => GgmlDType::Q4_0,
        DType::Q4_1 => GgmlDType::Q4_1,
        DType::Q5_0 => GgmlDType::Q5_0,
        DType::Q5_1 => GgmlDType::Q5_1,
        DType::Q8_0 => GgmlDType::Q8_0,
        DType::Q2_K => GgmlDType::Q2K,
        DType::Q3_K => GgmlDType::Q3K,
        DType::Q4_K => GgmlDType::Q4K,
        DType::Q5_K => GgmlDType::Q5K,
        DType::Q6_K => GgmlDType::Q6K,
        DType::MXFP4 => return widen_mxfp4(raw),
        DType::F8_E4M3 => return widen_fp8(raw),
        DType::INT4 => return widen_int4(raw),
        DType::NVFP4 => return widen_nvfp4(raw),
    };
    // candle insists on aligned bytes, which a file does not promise.
    let mut copy = vec![0; raw.bytes().len() + 4];
    let start = copy.as_ptr().align_offset(4);
    let copy = &mut copy[start..][..raw.bytes().len()];
    copy.copy_from_slice(raw.bytes());
    let storage = QStorage::from_data(Cow::Borrowed(copy), &CPU, dtype)?;
    Ok(QTensor::new(storage, raw.shape.as_slice())?.dequantize(&CPU)?)
}

/// MXFP4 by its definition: each number a sign, two bits of exponent and one of mantissa, times its block's power of two.
fn widen_mxfp4(raw: &RawTensor) -> Result<Candle> {
    let number = |code: u8, scale: u8| {
        let (exponent, mantissa) = (i32::from(code >> 1 & 3), f64::from(code & 1));
        let magnitude = match exponent {
            0 => mantissa / 2.0,
            _ => (1.0 + mantissa / 2.0) * 2f64.powi(exponent - 1),
        };
        let sign = if code & 8 == 0 { 1.0 } else { -1.0 };
        let scale = if scale == 255 { f64::NAN } else { 2f64.powi(i32::from(scale) - 127) };
        (sign * magnitude * scale) as f32
    };
    let mut values = Vec::with_capacity(raw.elements());
    for block in raw.bytes().chunks_exact(17) {
        values.extend(block[1..].iter().map(|byte| number(byte & 15, block[0])));
        values.extend(block[1..].iter().map(|byte| number(byte >> 4, block[0])));
    }
    Ok(Candle::from_vec(values, raw.shape.as_slice(), &CPU)?)
}

/// FP8 by its definition: each number a sign, four bits of exponent and three of mantissa, times its block's scale.
fn widen_fp8(raw: &RawTensor) -> Result<Candle> {
    let mut values = Vec::with_capacity(raw.elements());
    for block in raw.bytes().chunks_exact(68) {
        let scale = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
        values.extend(block[4..].iter().map(|byte| {
            let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f64::from(byte & 7));
            let magnitude = match exponent {
                15 if mantissa == 7.0 => f64::NAN,
                0 => mantissa / 8.0 * 2f64.powi(-6),
                _ => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
            };
            (if byte >> 7 == 1 { -magnitude } else { magnitude } * f64::from(scale)) as f32
        }));
    }
    Ok(Candle::from_vec(values, raw.shape.as_slice(), &CPU)?)
}

/// A number of `bits` bits by its definition: a sign, an exponent with this bias, `mantissa` bits of mantissa.
fn float(byte: u8, bits: u32, mantissa: u32, bias: i32) -> f64 {
    let exponent = i32::from(byte >> mantissa & ((1 << (bits - 1 - mantissa)) - 1));
    let fraction = f64::from(byte & ((1 << mantissa) - 1)) / f64::from(1 << mantissa);
    let magnitude = match exponent {
        0 => fraction * 2f64.powi(1 - bias),
        _ => (1.0 + fraction) * 2f64.powi(exponent - bias),
    };
    if byte >> (bits - 1) & 1 == 1 { -magnitude } else { magnitude }
}

/// NVFP4 by its definition: each code times the scale of its sixteen and the factor of all.
fn widen_nvfp4(raw: &RawTensor) -> Result<Candle> {
    let mut values = Vec::with_capacity(raw.elements());
    for block in raw.bytes().chunks_exact(40) {
        let factor = f64::from(f32::from_le_bytes([block[0], block[1], block[2], block[3]]));
        let codes = block[8..].iter().flat_map(|byte| [byte % 16, byte / 16]).enumerate();
        values.extend(
            codes.map(|(i, code)| (float(code, 4, 1, 1) * float(block[4 + i / 16], 8, 3, 7) * factor) as f32),
        );
    }
    Ok(Candle::from_vec(values, raw.shape.as_slice(), &CPU)?)
}

/// Four-bit integers by their definition: a code less its block's zero point, times the block's scale.
fn widen_int4(raw: &RawTensor) -> Result<Candle> {
    let mut values = Vec::with_capacity(raw.elements());
    for block in raw.bytes().chunks_exact(68) {
        let zero = i32::from(block[0] % 32);
        let scale = f32::from_le_bytes([block[0] - block[0] % 32, block[1], block[2], block[3]]);
        let codes = block[4..].iter().flat_map(|byte| [byte % 16, byte / 16]);
        values.extend(codes.map(|code| (f64::from(i32::from(code) - zero) * f64::from(scale)) as f32));
    }
    Ok(Candle::from_vec(values, raw.shape.as_slice(), &CPU)?)
}

/// Widens a matrix, which must be `expected` where that is known.
fn widen_matrix(raw: &RawTensor, expected: [Option<usize>; 2]) -> Result<Candle> {
    let holds =
        raw.shape.len() == 2 && raw.shape.iter().zip(expected).all(|(&n, e)| e.is_none_or(|e| e == n));
    if !holds {
        let [rows, width] = expected.map(|n| n.map_or("any".to_owned(), |n| n.to_string()));
        return Err(OpError::Shape {
            name: raw.name.clone(),
            expected: format!("[{rows}, {width}]"),
            found: format!("{:?}", raw.shape),
        });
    }
    widen(raw)
}

fn softmax(x: &Candle) -> Result<Candle> {
    let e = x.broadcast_sub(&x.max_keepdim(D::Minus1)?)?.exp()?;
    Ok(e.broadcast_div(&e.sum_keepdim(D::Minus1)?)?)
}

/// RMS norm over the last dimension.
fn rms_norm(x: &Candle, weight: &Candle, eps: f32) -> Result<Candle> {
    let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
    Ok(x.broadcast_div(&(mean + f64::from(eps))?.sqrt()?)?.broadcast_mul(weight)?)
}

fn silu(x: &Candle) -> Result<Candle> {
    Ok((x / (x.neg()?.exp()? + 1.0)?)?)
}

/// What an expert makes of its gate and up rows.
fn gated(activation: Activation, gate: &Candle, up: &Candle) -> Result<Candle> {
    match activation {
        Activation::Silu => Ok((silu(gate)? * up)?),
        Activation::ClampedSwiglu { alpha, limit } => {
            let gate = gate.minimum(limit)?;
            let up = up.clamp(-limit, limit)?;
            let sigmoid = ((&gate * -f64::from(alpha))?.exp()? + 1.0)?.recip()?;
            Ok(((gate * sigmoid)? * (up + 1.0)?)?)
        }
    }
}

/// Rotates `[rows, heads, head_dim]`.
fn rotate(x: &Candle, pairing: RopePairing, cos: &Candle, sin: &Candle) -> Result<Candle> {
    let (rows, heads, dim) = x.dims3()?;
    let pairs = match pairing {
        RopePairing::Halves => x.reshape((rows, heads, 2, dim / 2))?.transpose(2, 3)?,
        RopePairing::Interleaved => x.reshape((rows, heads, dim / 2, 2))?,
    };
    let (a, b) = (pairs.i((.., .., .., 0))?, pairs.i((.., .., .., 1))?);
    let first = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
    let second = (b.broadcast_mul(cos)? + a.broadcast_mul(sin)?)?;
    match pairing {
        RopePairing::Halves => Ok(Candle::cat(&[first, second], 2)?),
        RopePairing::Interleaved => Ok(Candle::stack(&[first, second], 3)?.reshape((rows, heads, dim))?),
    }
}

/// A row's experts and their weights.
fn route(logits: &[f32], top_k: usize, renormalise: bool) -> Result<Vec<(usize, f64)>> {
    let probabilities = softmax(&Candle::new(logits, &CPU)?)?.to_vec1::<f32>()?;
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| probabilities[b].total_cmp(&probabilities[a])); // stable: ties to the lower
    order.truncate(top_k);
    let sum = if renormalise { order.iter().map(|&e| f64::from(probabilities[e])).sum() } else { 1.0 };
    Ok(order.into_iter().map(|e| (e, f64::from(probabilities[e]) / sum)).collect())
}

impl Backend for Reference {
    type Tensor = Tensor;
    type Matrix = Candle;
    type Embedding = Candle;
    type Vector = Candle;
    type Experts = Experts;
    type KvCache = KvCache;

    fn name(&self) -> &str {
        "reference"
    }

    fn rank(&self) -> Rank {
        self.member.as_ref().map_or(Rank::ALONE, Member::rank)
    }

    fn load_matrix(&mut self, parts: &[RawTensor]) -> Result<Candle> {
        let width = parts.first().and_then(|p| p.shape.get(1).copied());
        let parts: Vec<Candle> =
            parts.iter().map(|p| widen_matrix(p, [None, width])).collect::<Result<_>>()?;
        Ok(Candle::cat(&parts, 0)?)
    }

    fn load_embedding(&mut self, table: &RawTensor) -> Result<Candle> {
        widen_matrix(table, [None, None])
    }

    fn load_vector(&mut self, parts: &[RawTensor]) -> Result<Candle> {
        if let Some(part) = parts.iter().find(|p| p.shape.len() != 1) {
            let (name, found) = (part.name.clone(), format!("{:?}", part.shape));
            return Err(OpError::Shape { name, expected: "[any]".to_owned(), found });
        }
        Ok(Candle::cat(&parts.iter().map(widen).collect::<Result<Vec<_>>>()?, 0)?)
    }

    fn load_experts(&mut self, weights: &ExpertWeights<'_>) -> Result<Experts> {
        let ExpertWeights { gate, up, down, biases, activation } = *weights;
        let Some([intermediate, hidden]) = gate.first().and_then(|g| g.shape.first_chunk().copied()) else {
            return Err(OpError::Backend("a layer has no experts".to_owned()));
        };
        let inner = [Some(intermediate), Some(hidden)];
        let outer = [Some(hidden), Some(intermediate)];
        let experts = gate.iter().zip(up).zip(down).enumerate().map(|(i, ((gate, up), down))| {
            let biases = match biases {
                Some([gate, up, down]) => Some([widen(&gate[i])?, widen(&up[i])?, widen(&down[i])?]),
                None => None,
            };
            let weights = [widen_matrix(gate, inner)?, widen_matrix(up, inner)?, widen_matrix(down, outer)?];
            Ok(Expert { weights, biases })
        });
        Ok(Experts { experts: experts.collect::<Result<_>>()?, activation })
    }

    fn tensor(&mut self, _max_rows: usize, width: usize) -> Result<Tensor> {
        Ok(Tensor { rows: None, width })
    }

    fn kv_cache(&mut self, layers: usize, shape: &AttentionShape, blocks: usize) -> Result<KvCache> {
        let size = (blocks * BLOCK_SIZE, shape.kv_heads * shape.head_dim);
        let zeros = || Candle::zeros(size, candle_core::DType::F32, &CPU);
        let layer = |_| Ok([zeros()?, zeros()?]);
        Ok(KvCache((0..layers).map(layer).collect::<Result<_>>()?))
    }

    fn kv_block_bytes(&self, shape: &AttentionShape) -> usize {
        2 * size_of::<f32>() * BLOCK_SIZE * shape.kv_heads * shape.head_dim
    }

    fn load_rope(&mut self, rope: &Rope, _max_positions: usize) -> Result<()> {
        self.rope = Some(rope.clone());
        Ok(())
    }

    fn begin(&mut self, batch: &Batch) -> Result<()> {
        self.batch = batch.clone();
        Ok(())
    }

    fn embed(&mut self, table: &Candle, out: &mut Tensor) -> Result<()> {
        out.set(table.index_select(&Candle::new(self.batch.tokens.as_slice(), &CPU)?, 0)?)
    }

    fn rms_norm(
        &mut self,
        x: &mut Tensor,
        delta: Option<&Tensor>,
        weight: &Candle,
        eps: f32,
        out: &mut Tensor,
    ) -> Result<()> {
        if let Some(delta) = delta {
            x.set((x.get()? + delta.get()?)?)?;
        }
        out.set(rms_norm(x.get()?, weight, eps)?)
    }

    fn linear(&mut self, x: &Tensor, w: &Candle, bias: Option<&Candle>, out: &mut Tensor) -> Result<()> {
        let y = x.get()?.matmul(&w.t()?)?;
        out.set(match bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        })
    }

    fn rope_and_cache(
        &mut self,
        qkv: &mut Tensor,
        shape: &AttentionShape,
        norm: Option<QkNorm<'_, Candle>>,
        layer: usize,
        cache: &mut KvCache,
    ) -> Result<()> {
        let (rows, dim) = (self.batch.rows(), shape.head_dim);
        let heads = qkv.get()?.reshape((rows, shape.heads + 2 * shape.kv_heads, dim))?;
        let mut q = heads.narrow(1, 0, shape.heads)?;
        let mut k = heads.narrow(1, shape.heads, shape.kv_heads)?;
        let v = heads.narrow(1, shape.heads + shape.kv_heads, shape.kv_heads)?;
        if let Some(norm) = norm {
            q = rms_norm(&q, norm.q, norm.eps)?;
            k = rms_norm(&k, norm.k, norm.eps)?;
        }
        let (pairing, cos, sin) = self.angles()?;
        let (q, k) = (rotate(&q, pairing, &cos, &sin)?, rotate(&k, pairing, &cos, &sin)?);
        for (cached, new) in cache.0[layer].iter().zip([&k, &v]) {
            for (row, &slot) in self.batch.slots.iter().enumerate() {
                cached.slice_set(&new.i(row)?.reshape((1, ()))?.contiguous()?, 0, slot as usize)?;
            }
        }
        qkv.set(Candle::cat(&[q, k, v], 1)?.reshape((rows, shape.qkv_width()))?)
    }

    fn attention(
        &mut self,
        qkv: &Tensor,
        shape: &AttentionShape,
        options: AttentionOptions<'_, Candle>,
        layer: usize,
        cache: &KvCache,
        out: &mut Tensor,
    ) -> Result<()> {
        let mut spans = Vec::new();
        for span in &self.batch.spans {
            let table = &self.batch.block_tables[span.table..];
            let slot = |p: usize| table[p / BLOCK_SIZE] * BLOCK_SIZE as u32 + (p % BLOCK_SIZE) as u32;
            let slots = Candle::from_iter((0..span.context).map(slot), &CPU)?;
            // Keys and values as [heads, context, head_dim], repeated for the heads of a group.
            let group = shape.heads / shape.kv_heads;
            let [k, v] = [0, 1].map(|i| -> Result<Candle> {
                let x = cache.0[layer][i].index_select(&slots, 0)?;
                let x = x.reshape((span.context, shape.kv_heads, 1, shape.head_dim))?;
                let x = x.repeat((1, 1, group, 1))?.reshape((span.context, shape.heads, shape.head_dim))?;
                Ok(x.transpose(0, 1)?.contiguous()?)
            });
            let q = qkv.get()?.i((span.start..span.start + span.len, ..shape.heads * shape.head_dim))?;
            let q = q.reshape((span.len, shape.heads, shape.head_dim))?.transpose(0, 1)?.contiguous()?;
            let scores = (q.matmul(&k?.t()?)? * f64::from(shape.scale))?;
            let first = span.context - span.len;
            let window = options.window.unwrap_or(usize::MAX);
            let mask = (0..span.len * span.context).map(|i| {
                let (key, row) = (i % span.context, first + i / span.context);
                if key <= row && row - key < window { 0.0 } else { f32::NEG_INFINITY }
            });
            let mask = Candle::from_iter(mask, &CPU)?.reshape((1, span.len, span.context))?;
            let mut scores = scores.broadcast_add(&mask)?;
            if let Some(sinks) = options.sinks {
                let sinks = sinks.reshape((shape.heads, 1, 1))?.repeat((1, span.len, 1))?;
                scores = Candle::cat(&[scores, sinks], 2)?;
            }
            // What a sink draws of the softmax goes nowhere.
            let weights = softmax(&scores)?.narrow(2, 0, span.context)?;
            let y = weights.contiguous()?.matmul(&v?)?;
            spans.push(y.transpose(0, 1)?.reshape((span.len, shape.out_width()))?);
        }
        out.set(Candle::cat(&spans, 0)?)
    }

    fn silu_mul(&mut self, gate_up: &Tensor, out: &mut Tensor) -> Result<()> {
        let (gate, up) =
            (gate_up.get()?.narrow(1, 0, out.width)?, gate_up.get()?.narrow(1, out.width, out.width)?);
        out.set((silu(&gate)? * up)?)
    }

    fn moe(
        &mut self,
        x: &Tensor,
        router_logits: &Tensor,
        experts: &Experts,
        top_k: usize,
        renormalise: bool,
        out: &mut Tensor,
    ) -> Result<()> {
        let mut rows = Vec::new();
        for (row, logits) in router_logits.get()?.to_vec2::<f32>()?.iter().enumerate() {
            let x = x.get()?.narrow(0, row, 1)?;
            let mut sum = x.zeros_like()?;
            for (expert, weight) in route(logits, top_k, renormalise)? {
                let Expert { weights, biases } = &experts.experts[expert];
                let product = |x: &Candle, i: usize| -> Result<Candle> {
                    let y = x.matmul(&weights[i].t()?)?;
                    Ok(match biases {
                        Some(biases) => y.broadcast_add(&biases[i])?,
                        None => y,
                    })
                };
                let hidden = gated(experts.activation, &product(&x, 0)?, &product(&x, 1)?)?;
                sum = (sum + (product(&hidden, 2)? * weight)?)?;
            }
            rows.push(sum);
        }
        out.set(Candle::cat(&rows, 0)?)
    }

    fn gather(&mut self, x: &Tensor, delta: Option<&Tensor>, out: &mut Tensor) -> Result<()> {
        let outputs = Candle::new(self.batch.outputs.as_slice(), &CPU)?;
        let mut rows = x.get()?.index_select(&outputs, 0)?;
        if let Some(delta) = delta {
            rows = (rows + delta.get()?.index_select(&outputs, 0)?)?;
        }
        out.set(rows)
    }

    fn all_reduce(&mut self, x: &mut Tensor) -> Result<()> {
        let Some(member) = &self.member else { return Ok(()) };
        let (rows, width) = x.get()?.dims2()?;
        let mut data: Vec<f32> = x.get()?.flatten_all()?.to_vec1()?;
        member.all_reduce(&mut data)?;
        x.set(Candle::from_vec(data, (rows, width), &CPU)?)
    }

    fn gather_columns(&mut self, part: &Tensor, whole: Option<&mut Tensor>) -> Result<()> {
        let Some(member) = &self.member else {
            return Err(OpError::Backend("columns are gathered from a group of ranks".to_owned()));
        };
        let (rows, _) = part.get()?.dims2()?;
        let data: Vec<f32> = part.get()?.flatten_all()?.to_vec1()?;
        let Some(whole) = whole else { return Ok(member.gather(&data, rows, None)?) };
        let mut all = vec![0.0; rows * whole.width];
        member.gather(&data, rows, Some(&mut all))?;
        whole.set(Candle::from_vec(all, (rows, whole.width), &CPU)?)
    }

    fn sample(&mut self, logits: &mut Tensor, rows: &[SampleRow<'_>], out: &mut Vec<Sampled>) -> Result<()> {
        let mut scratch = SamplerScratch::default();
        let mut logits = logits.get()?.to_vec2::<f32>()?;
        out.clear();
        out.extend(logits.iter_mut().zip(rows).map(|(logits, row)| sample_row(logits, row, &mut scratch)));
        Ok(())
    }

    fn to_host(&mut self, x: &Tensor) -> Result<Vec<f32>> {
        Ok(x.get()?.flatten_all()?.to_vec1()?)
    }
}
