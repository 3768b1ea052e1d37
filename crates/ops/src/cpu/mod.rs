//! The CPU backend: SIMD kernels chosen at run time over weights repacked at load.
//!
//! Buffers are our own and allocated once; an op on little data stays on the calling thread, the
//! others are spread over a [`pool::Pool`]. Every row's result is computed the same way whatever
//! rows are beside it and however many threads there are, bit for bit.

mod activation;
mod attention;
mod attention_pairs;
mod kv;
pub mod matmul;
mod memory;
mod mlp;
mod moe;
mod norm;
pub mod pool;
mod rope;
mod rows;
mod simd;

pub use kv::{KvCache, KvDType};
pub use moe::Experts;

use crate::{
    Activation, AttentionOptions, AttentionShape, BLOCK_SIZE, Backend, Batch, ExpertWeights, OpError, QkNorm,
    Rank, RawTensor, Result, Rope, SampleRow, Sampled, SamplerScratch, dequant, sample_row,
};
use kv::{LayerMut, Layout};
use matmul::{PackedMatrix, Rows, Scratch};
use memory::Numbers;
use mlp::Mlp;
use norm::{RmsNorm, RmsNormInPlace};
use pool::Pool;
use rows::{Disjoint, for_rows};
use rudder_comm::Member;
use simd::Level;
use std::sync::{Mutex, PoisonError};

/// The CPU as a [`Backend`].
pub struct Cpu {
    pool: Pool,
    level: Level,
    kv_dtype: KvDType,
    rope: Option<Rope>,
    max_rows: usize,
    max_width: usize,
    /// Whether there are weights that multiply pairs of bf16, so that rows are kept as pairs too by the ops that make them.
    pairs: bool,
    scratch: Scratch,
    step: Step,
    attention: attention::Buffers,
    moe: moe::Buffers,
    samplers: Vec<Mutex<SamplerScratch>>,
    /// Its place among the ranks of a model that is cut.
    member: Option<Member>,
}

/// What the ops of one step share.
#[derive(Default)]
struct Step {
    batch: Batch,
    rotations: rope::Rotations,
    plan: attention::Plan,
    /// Of the outputs alone.
    output_plan: attention::Plan,
    /// Blocks that a cache must have for the step's slots and block tables to lie in it.
    blocks: usize,
}

/// Activations, `[rows, width]`.
pub struct Tensor {
    data: Numbers<f32>,
    /// The same as pairs of bf16, `[rows, width / 2]` rounded up, where `paired`.
    pairs: Numbers<u32>,
    /// Whether the op that wrote the rows wrote pairs too: few do.
    paired: bool,
    rows: usize,
    max_rows: usize,
    width: usize,
}

/// An embedding table, left as it lies in its file.
pub struct Embedding {
    table: RawTensor,
    vocab: usize,
    hidden: usize,
}

impl Cpu {
    /// A backend on `threads` threads (at least one) whose KV caches hold `kv_dtype`.
    pub fn new(threads: usize, kv_dtype: KvDType) -> Self {
        let pool = Pool::new(threads);
        let threads = pool.threads();
        Self {
            pool,
            level: Level::detect(),
            kv_dtype,
            rope: None,
            max_rows: 0,
            max_width: 0,
            pairs: false,
            scratch: Scratch::new(0, 0),
            step: Step::default(),
            attention: attention::Buffers::new(threads),
            moe: moe::Buffers::default(),
            samplers: (0..threads).map(|_| Mutex::default()).collect(),
            member: None,
        }
    }

    /// The same as a rank of a model that is cut.
    pub fn in_group(self, member: Member) -> Self {
        Self { member: Some(member), ..self }
    }

    /// Sees to it that multiplications of `rows` rows of `width` inputs find room.
    fn reserve(&mut self, rows: usize, width: usize) {
        if rows > self.max_rows || width > self.max_width {
            (self.max_rows, self.max_width) = (self.max_rows.max(rows), self.max_width.max(width));
            self.scratch = Scratch::new(self.max_rows, self.max_width);
        }
    }

    fn pack(&mut self, parts: &[RawTensor]) -> Result<PackedMatrix> {
        let matrix = PackedMatrix::pack(&self.pool, parts)?;
        self.reserve(0, matrix.width());
        self.pairs |= matrix.is_bf16();
        Ok(matrix)
    }

    /// Biases of `len` each, one after another.
    fn bias(&mut self, parts: &[&RawTensor], len: usize) -> Result<Vec<f32>> {
        let mut bias = Vec::with_capacity(parts.len() * len);
        for part in parts {
            expect_shape(part, part.shape == [len], || format!("[{len}]"))?;
            bias.extend(self.load_vector(&[(*part).clone()])?);
        }
        Ok(bias)
    }
}

impl Tensor {
    fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.width..(row + 1) * self.width]
    }

    /// The current rows.
    fn data(&self) -> &[f32] {
        &self.data[..self.rows * self.width]
    }

    fn data_mut(&mut self) -> &mut [f32] {
        self.paired = false;
        &mut self.data[..self.rows * self.width]
    }

    /// The current rows to be written, all of them where `paired`, as pairs too.
    fn written(&mut self, paired: bool) -> (Disjoint<'_, f32>, Option<Disjoint<'_, u32>>) {
        self.paired = paired;
        let (len, half) = (self.rows * self.width, self.rows * self.width.div_ceil(2));
        let pairs = paired.then(|| Disjoint::new(&mut self.pairs[..half]));
        (Disjoint::new(&mut self.data[..len]), pairs)
    }

    /// The current rows to be multiplied.
    fn input(&self) -> Rows<'_> {
        let pairs = self.paired.then(|| &self.pairs[..self.rows * self.width.div_ceil(2)]);
        Rows { plain: self.data(), pairs }
    }

    /// Makes it an output of `rows` rows of `width`, which it has to have room for.
    fn resize(&mut self, rows: usize, width: usize) -> Result<()> {
        check(width == self.width, || format!("an output is {} wide, not {width}", self.width))?;
        check(rows <= self.max_rows, || format!("{rows} rows in a tensor of at most {}", self.max_rows))?;
        (self.rows, self.paired) = (rows, false);
        Ok(())
    }
}

/// An error of a model that calls ops on what does not fit together.
fn check(holds: bool, otherwise: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(OpError::Backend(otherwise())) }
}

/// An error that names a weight whose shape is wrong.
fn expect_shape(tensor: &RawTensor, holds: bool, expected: impl FnOnce() -> String) -> Result<()> {
    if holds {
        return Ok(());
    }
    Err(OpError::Shape {
        name: tensor.name.clone(),
        expected: expected(),
        found: format!("{:?}", tensor.shape),
    })
}

impl Step {
    /// Takes over a batch, after checking that it does not contradict itself.
    fn set(&mut self, batch: &Batch, rope: Option<&Rope>) -> Result<()> {
        let rows = batch.rows();
        check(batch.positions.len() == rows && batch.slots.len() == rows, || {
            "a batch's tokens, positions and slots differ in number".to_owned()
        })?;
        let mut end = 0;
        let mut outputs = batch.outputs.iter().map(|&row| row as usize).peekable();
        for span in &batch.spans {
            let table = span.table.saturating_add(span.context.div_ceil(BLOCK_SIZE));
            let fits = span.len <= span.context && table <= batch.block_tables.len();
            // One behind the other, as no two threads may write a row.
            let within = end <= span.start && span.start.saturating_add(span.len) <= rows;
            check(fits && within, || format!("a batch holds a bad {span:?}"))?;
            end = span.start + span.len;
            while outputs.next_if(|row| (span.start..end).contains(row)).is_some() {}
        }
        check(outputs.next().is_none() && batch.outputs.is_sorted_by(|a, b| a < b), || {
            "a batch's outputs are not rows of its sequences, in their order".to_owned()
        })?;
        self.batch.copy_from(batch);
        let blocks =
            batch.block_tables.iter().copied().chain(batch.slots.iter().map(|s| s / BLOCK_SIZE as u32));
        self.blocks = blocks.max().map_or(0, |block| block as usize + 1);
        if let Some(rope) = rope {
            self.rotations.set(rope, &batch.positions);
        }
        self.plan.set(batch);
        self.output_plan.set_outputs(batch);
        Ok(())
    }

    /// Checks what the two ops on the cache need.
    fn check_cache(&self, qkv: &Tensor, shape: &AttentionShape, layer: usize, cache: &KvCache) -> Result<()> {
        check(cache.layout == Layout::of(shape) && layer < cache.layers(), || {
            format!("layer {layer} with {shape:?} is not in the KV cache")
        })?;
        check(self.blocks <= cache.blocks(), || {
            format!("the batch uses KV block {}, the cache has {}", self.blocks - 1, cache.blocks())
        })?;
        check(shape.kv_heads > 0 && shape.heads.is_multiple_of(shape.kv_heads), || {
            format!("{} query heads cannot share {} key heads", shape.heads, shape.kv_heads)
        })?;
        check(qkv.width == shape.qkv_width() && qkv.rows == self.batch.rows(), || {
            format!("q, k and v are [{}, {}], not as the batch and {shape:?} say", qkv.rows, qkv.width)
        })
    }
}

impl Backend for Cpu {
    type Tensor = Tensor;
    type Matrix = PackedMatrix;
    type Embedding = Embedding;
    type Vector = Vec<f32>;
    type Experts = Experts;
    type KvCache = KvCache;

    fn name(&self) -> &str {
        "cpu"
    }

    fn rank(&self) -> Rank {
        self.member.as_ref().map_or(Rank::ALONE, Member::rank)
    }

    fn load_matrix(&mut self, parts: &[RawTensor]) -> Result<PackedMatrix> {
        self.pack(parts)
    }

    fn load_embedding(&mut self, table: &RawTensor) -> Result<Embedding> {
        expect_shape(table, table.shape.len() == 2, || "[vocab, hidden]".to_owned())?;
        Ok(Embedding { table: table.clone(), vocab: table.shape[0], hidden: table.shape[1] })
    }

    fn load_vector(&mut self, parts: &[RawTensor]) -> Result<Vec<f32>> {
        let mut vector = Vec::new();
        for part in parts {
            expect_shape(part, part.shape.len() == 1, || "[any]".to_owned())?;
            let start = vector.len();
            vector.resize(start + part.elements(), 0.0);
            dequant::dequantize(part.dtype, part.bytes(), &mut vector[start..]);
        }
        Ok(vector)
    }

    fn load_experts(&mut self, weights: &ExpertWeights<'_>) -> Result<Experts> {
        let ExpertWeights { gate, up, down, biases, activation } = *weights;
        let fits = |other: &[RawTensor]| other.len() == gate.len();
        let fit = fits(up) && fits(down) && biases.is_none_or(|biases| biases.into_iter().all(fits));
        check(!gate.is_empty() && fit, || {
            format!("{} gate, {} up and {} down matrices of experts", gate.len(), up.len(), down.len())
        })?;
        expect_shape(&gate[0], gate[0].shape.len() == 2, || "[intermediate, hidden]".to_owned())?;
        let (intermediate, hidden) = (gate[0].shape[0], gate[0].shape[1]);
        let mut experts = Vec::with_capacity(gate.len());
        for (i, ((gate, up), down)) in gate.iter().zip(up).zip(down).enumerate() {
            for (tensor, shape) in
                [(gate, [intermediate, hidden]), (up, [intermediate, hidden]), (down, [hidden, intermediate])]
            {
                expect_shape(tensor, tensor.shape == shape, || format!("{shape:?}"))?;
            }
            let gate_up = self.pack(&[gate.clone(), up.clone()])?;
            let biases = match biases {
                Some([gate, up, down]) => {
                    Some([self.bias(&[&gate[i], &up[i]], intermediate)?, self.bias(&[&down[i]], hidden)?])
                }
                None => None,
            };
            experts.push(moe::Expert { gate_up, down: self.pack(std::slice::from_ref(down))?, biases });
        }
        Ok(Experts { experts, hidden, intermediate, activation })
    }

    fn tensor(&mut self, max_rows: usize, width: usize) -> Result<Tensor> {
        let refuse = || OpError::Backend(format!("no memory for a [{max_rows}, {width}] tensor"));
        let room = |width| max_rows.checked_mul(width).ok_or_else(refuse);
        let data = Numbers::new(room(width)?).map_err(|_| refuse())?;
        let pairs = Numbers::new(room(width.div_ceil(2))?).map_err(|_| refuse())?;
        self.reserve(max_rows, 0);
        Ok(Tensor { data, pairs, paired: false, rows: 0, max_rows, width })
    }

    fn kv_cache(&mut self, layers: usize, shape: &AttentionShape, blocks: usize) -> Result<KvCache> {
        let mut cache = KvCache::new(layers, shape, blocks, self.kv_dtype)?;
        cache.provide(&self.pool, 1.min(blocks)); // before somebody waits
        Ok(cache)
    }

    fn kv_block_bytes(&self, shape: &AttentionShape) -> usize {
        let element = match self.kv_dtype {
            KvDType::F16 | KvDType::BF16 => 2,
            KvDType::F32 => 4,
        };
        Layout::of(shape).block_len() * element
    }

    fn kv_format(&self) -> Option<String> {
        Some(format!("cpu {:?} {}", self.kv_dtype, kv::LAYOUT))
    }

    fn read_kv_block(&mut self, cache: &KvCache, block: u32, out: &mut [u8]) -> Result<()> {
        cache.read_block(block as usize, out)
    }

    fn write_kv_block(&mut self, cache: &mut KvCache, block: u32, bytes: &[u8]) -> Result<()> {
        cache.write_block(block as usize, bytes)
    }

    fn load_rope(&mut self, rope: &Rope, _max_positions: usize) -> Result<()> {
        self.rope = Some(rope.clone());
        Ok(())
    }

    fn begin(&mut self, batch: &Batch) -> Result<()> {
        self.step.set(batch, self.rope.as_ref())
    }

    fn embed(&mut self, table: &Embedding, out: &mut Tensor) -> Result<()> {
        let tokens = &self.step.batch.tokens;
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= table.vocab) {
            return Err(OpError::Backend(format!("token {token} is not in a vocabulary of {}", table.vocab)));
        }
        out.resize(tokens.len(), table.hidden)?;
        let (bytes, width) = (table.table.bytes(), table.hidden);
        let row_bytes = bytes.len() / table.vocab.max(1);
        let out = Disjoint::new(out.data_mut());
        for_rows(&self.pool, tokens.len(), width, |range| {
            for row in range {
                // SAFETY: every row is in one range.
                let out = unsafe { out.part(row * width..(row + 1) * width) };
                let start = tokens[row] as usize * row_bytes;
                dequant::dequantize(table.table.dtype, &bytes[start..start + row_bytes], out);
            }
        });
        Ok(())
    }

    fn rms_norm(
        &mut self,
        x: &mut Tensor,
        delta: Option<&Tensor>,
        weight: &Vec<f32>,
        eps: f32,
        out: &mut Tensor,
    ) -> Result<()> {
        let (rows, width, level) = (x.rows, x.width, self.level);
        check(weight.len() == width, || format!("a norm of {} for rows of {width}", weight.len()))?;
        check(delta.is_none_or(|d| (d.rows, d.width) == (rows, width)), || {
            "a residual of another shape".to_owned()
        })?;
        out.resize(rows, width)?;
        let x = Disjoint::new(x.data_mut());
        let (out, pairs) = out.written(self.pairs);
        let half = width.div_ceil(2);
        for_rows(&self.pool, rows, width, |range| {
            for row in range {
                let part = row * width..(row + 1) * width;
                // SAFETY: every row is in one range.
                let (x, out) = unsafe { (x.part(part.clone()), out.part(part)) };
                // SAFETY: likewise.
                let pairs = pairs.as_ref().map(|p| unsafe { p.part(row * half..(row + 1) * half) });
                if let Some(delta) = delta {
                    x.iter_mut().zip(delta.row(row)).for_each(|(x, d)| *x += d);
                }
                level.run(RmsNorm { x, weight, eps, out, pairs });
            }
        });
        Ok(())
    }

    fn linear(
        &mut self,
        x: &Tensor,
        w: &PackedMatrix,
        bias: Option<&Vec<f32>>,
        out: &mut Tensor,
    ) -> Result<()> {
        check(x.width == w.width(), || format!("rows of {} for a matrix of width {}", x.width, w.width()))?;
        check(bias.is_none_or(|b| b.len() == w.rows()), || {
            "a bias of another length than the output".to_owned()
        })?;
        out.resize(x.rows, w.rows())?;
        let bias = bias.map(Vec::as_slice);
        matmul::matmul(&self.pool, &mut self.scratch, x.input(), x.rows, w, bias, out.data_mut());
        Ok(())
    }

    fn rope_and_cache(
        &mut self,
        qkv: &mut Tensor,
        shape: &AttentionShape,
        norm: Option<QkNorm<'_, Vec<f32>>>,
        layer: usize,
        cache: &mut KvCache,
    ) -> Result<()> {
        self.step.check_cache(qkv, shape, layer, cache)?;
        let Some(rope) = &self.rope else {
            return Err(OpError::Backend("no rope is loaded".to_owned()));
        };
        check(2 * rope.inv_freq.len() == shape.head_dim, || {
            format!("{} frequencies for heads of {}", rope.inv_freq.len(), shape.head_dim)
        })?;
        check(
            norm.as_ref().is_none_or(|n| n.q.len() == shape.head_dim && n.k.len() == shape.head_dim),
            || "a query or key norm of another length than a head".to_owned(),
        )?;
        self.rotate(qkv, shape, norm.as_ref(), rope);
        cache.provide(&self.pool, self.step.blocks);
        let layout = cache.layout;
        match cache.layer_mut(layer) {
            LayerMut::F16(kv) => self.write_kv(qkv, shape, layout, kv),
            LayerMut::BF16(kv) => self.write_kv(qkv, shape, layout, kv),
            LayerMut::F32(kv) => self.write_kv(qkv, shape, layout, kv),
        }
        Ok(())
    }

    fn attention(
        &mut self,
        qkv: &Tensor,
        shape: &AttentionShape,
        options: AttentionOptions<'_, Vec<f32>>,
        layer: usize,
        cache: &KvCache,
        out: &mut Tensor,
    ) -> Result<()> {
        self.step.check_cache(qkv, shape, layer, cache)?;
        let AttentionOptions { window, sinks, outputs_only } = options;
        check(window != Some(0), || "attention within a window of no token".to_owned())?;
        check(sinks.is_none_or(|s| s.len() == shape.heads), || {
            format!("attention sinks for other than {} heads", shape.heads)
        })?;
        out.resize(qkv.rows, shape.out_width())?;
        let Step { batch, plan, output_plan, .. } = &self.step;
        let plan = if outputs_only { output_plan } else { plan };
        let sinks = sinks.map(Vec::as_slice);
        let op =
            attention::Attention { plan, batch, shape, window, sinks, qkv: qkv.data(), level: self.level };
        let (rows, pairs) = out.written(self.pairs && !outputs_only && shape.head_dim.is_multiple_of(2));
        let out = attention::Out { rows, pairs };
        op.run(&self.pool, cache, layer, &mut self.attention, &out);
        Ok(())
    }

    fn silu_mul(&mut self, gate_up: &Tensor, out: &mut Tensor) -> Result<()> {
        out.resize(gate_up.rows, gate_up.width / 2)?;
        let width = out.width;
        activation::gated(&self.pool, self.level, Activation::Silu, gate_up.data(), width, out.data_mut());
        Ok(())
    }

    fn mlp(
        &mut self,
        x: &Tensor,
        gate_up: &PackedMatrix,
        down: &PackedMatrix,
        (both, activated): (&mut Tensor, &mut Tensor),
        out: &mut Tensor,
    ) -> Result<()> {
        check(x.width == gate_up.width() && gate_up.rows() == 2 * down.width(), || {
            format!(
                "an MLP [{}, {}, {}] on rows of {}",
                gate_up.width(),
                gate_up.rows(),
                down.width(),
                x.width
            )
        })?;
        both.resize(x.rows, gate_up.rows())?;
        activated.resize(x.rows, down.width())?;
        out.resize(x.rows, down.rows())?;
        let room = mlp::Room { gate_up: both.data_mut(), activated: activated.data_mut() };
        let mlp = Mlp { gate_up, down, biases: None, activation: Activation::Silu };
        mlp.run(&self.pool, self.level, &mut self.scratch, x.input(), room, out.data_mut());
        Ok(())
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
        let count = experts.experts.len();
        check(
            x.width == experts.hidden && router_logits.width == count && router_logits.rows == x.rows,
            || format!("{} experts of width {} for other inputs", count, experts.hidden),
        )?;
        check(top_k <= count, || format!("{top_k} of {count} experts"))?;
        out.resize(x.rows, x.width)?;
        let (scratch, buffers) = (&mut self.scratch, &mut self.moe);
        let context = moe::Context { pool: &self.pool, level: self.level, scratch, buffers };
        moe::moe(context, x.data(), router_logits.data(), experts, top_k, renormalise, out.data_mut());
        Ok(())
    }

    fn gather(&mut self, x: &Tensor, delta: Option<&Tensor>, out: &mut Tensor) -> Result<()> {
        let outputs = &self.step.batch.outputs;
        check(x.rows == self.step.batch.rows(), || "gather from rows that are not the batch's".to_owned())?;
        check(delta.is_none_or(|d| (d.rows, d.width) == (x.rows, x.width)), || {
            "a residual of another shape".to_owned()
        })?;
        out.resize(outputs.len(), x.width)?;
        for (&row, out) in outputs.iter().zip(out.data_mut().chunks_exact_mut(x.width)) {
            out.copy_from_slice(x.row(row as usize));
            if let Some(delta) = delta {
                out.iter_mut().zip(delta.row(row as usize)).for_each(|(x, d)| *x += d);
            }
        }
        Ok(())
    }

    fn all_reduce(&mut self, x: &mut Tensor) -> Result<()> {
        let Some(member) = &self.member else { return Ok(()) };
        Ok(member.all_reduce(x.data_mut())?)
    }

    fn gather_columns(&mut self, part: &Tensor, mut whole: Option<&mut Tensor>) -> Result<()> {
        let Some(member) = &self.member else {
            return Err(OpError::Backend("columns are gathered from a group of ranks".to_owned()));
        };
        if let Some(whole) = whole.as_deref_mut() {
            let width = whole.width;
            whole.resize(part.rows, width)?;
        }
        Ok(member.gather(part.data(), part.rows, whole.map(Tensor::data_mut))?)
    }

    fn sample(&mut self, logits: &mut Tensor, rows: &[SampleRow<'_>], out: &mut Vec<Sampled>) -> Result<()> {
        check(logits.rows == rows.len(), || format!("{} rows to sample of {}", rows.len(), logits.rows))?;
        out.clear();
        out.resize(rows.len(), Sampled::default());
        let (width, threads) = (logits.width, self.samplers.len().min(rows.len()));
        let (logits, drawn) = (Disjoint::new(logits.data_mut()), Disjoint::new(out));
        self.pool.run(threads, |thread| {
            let mut scratch = self.samplers[thread].lock().unwrap_or_else(PoisonError::into_inner);
            for (index, row) in rows.iter().enumerate().skip(thread).step_by(threads) {
                // SAFETY: every row belongs to one thread.
                let (logits, drawn) = unsafe {
                    (logits.part(index * width..(index + 1) * width), drawn.part(index..index + 1))
                };
                drawn[0] = sample_row(logits, row, &mut scratch);
            }
        });
        Ok(())
    }

    fn to_host(&mut self, x: &Tensor) -> Result<Vec<f32>> {
        Ok(x.data().to_vec())
    }
}

impl Cpu {
    /// Normalises and rotates the query and key heads of all rows.
    fn rotate(
        &self,
        qkv: &mut Tensor,
        shape: &AttentionShape,
        norm: Option<&QkNorm<'_, Vec<f32>>>,
        rope: &Rope,
    ) {
        let (rows, width, dim, level) = (qkv.rows, qkv.width, shape.head_dim, self.level);
        let rotations = &self.step.rotations;
        let qkv = Disjoint::new(qkv.data_mut());
        for_rows(&self.pool, rows, width, |range| {
            for row in range {
                // SAFETY: every row is in one range.
                let row_data = unsafe { qkv.part(row * width..(row + 1) * width) };
                let heads = row_data.chunks_exact_mut(dim).take(shape.heads + shape.kv_heads);
                for (index, head) in heads.enumerate() {
                    if let Some(QkNorm { q, k, eps }) = norm {
                        let weight = if index < shape.heads { q } else { k };
                        level.run(RmsNormInPlace { x: head, weight, eps: *eps });
                    }
                    rotations.apply(rope.pairing, row, head);
                }
            }
        });
    }

    /// Writes keys and values of all rows. Threads take heads, not rows: rows share blocks.
    fn write_kv<E: kv::Element>(&self, qkv: &Tensor, shape: &AttentionShape, layout: Layout, kv: &mut [E]) {
        let dim = shape.head_dim;
        let kv = Disjoint::new(kv);
        let elements = qkv.rows * 2 * dim;
        for_rows(&self.pool, shape.kv_heads, elements, |heads| {
            for head in heads {
                for (row, &slot) in self.step.batch.slots.iter().enumerate() {
                    let (block, offset) = (slot as usize / BLOCK_SIZE, slot as usize % BLOCK_SIZE);
                    let key = &qkv.row(row)[(shape.heads + head) * dim..][..dim];
                    let value = &qkv.row(row)[(shape.heads + shape.kv_heads + head) * dim..][..dim];
                    let start = layout.keys(block, head);
                    // SAFETY: every head of every block belongs to one thread.
                    let to = unsafe { kv.part(start..start + layout.head_len()) };
                    layout.write(to, offset, key, value);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RopePairing;

    /// Bits of a step through every op with kernels of ours, on one level.
    fn bits(level: Level, kv_dtype: KvDType, shape: &AttentionShape) -> Result<Vec<u32>> {
        let mut cpu = Cpu::new(1, kv_dtype);
        cpu.level = level;
        let (rows, width) = (37, shape.qkv_width());
        let data: Vec<f32> = (0..rows * width).map(|i| ((i * 7919 % 1013) as f32 - 506.0) / 200.0).collect();
        let table = cpu.load_embedding(&RawTensor::from_f32("table", vec![rows, width], &data))?;
        let inv_freq = (0..shape.head_dim / 2).map(|i| 0.9f32.powi(i as i32)).collect();
        cpu.load_rope(&Rope { inv_freq, pairing: RopePairing::Halves }, 64)?;
        let (mut qkv, mut normed) = (cpu.tensor(rows, width)?, cpu.tensor(rows, width)?);
        let (mut attended, mut gated) = (cpu.tensor(rows, shape.out_width())?, cpu.tensor(rows, width / 2)?);
        let mut cache = cpu.kv_cache(1, shape, 3)?;
        let mut batch = Batch::default();
        batch.push(&(0..rows as u32).collect::<Vec<_>>(), 0, &[2, 0, 1], rows);
        cpu.begin(&batch)?;
        cpu.embed(&table, &mut qkv)?;
        cpu.pairs = true;
        cpu.rms_norm(&mut qkv, None, &vec![1.5; width], 1e-6, &mut normed)?;
        let mut pairs = normed.pairs.to_vec();
        cpu.silu_mul(&normed, &mut gated)?;
        let norm = vec![0.7; shape.head_dim];
        cpu.rope_and_cache(
            &mut normed,
            shape,
            Some(QkNorm { q: &norm, k: &norm, eps: 1e-6 }),
            0,
            &mut cache,
        )?;
        let sinks = vec![0.3; shape.heads];
        let options = AttentionOptions { window: Some(20), sinks: Some(&sinks), outputs_only: false };
        cpu.attention(&normed, shape, options, 0, &cache, &mut attended)?;
        pairs.extend_from_slice(&attended.pairs);
        let numbers = [&normed, &gated, &attended].into_iter().flat_map(|t| t.data());
        Ok(numbers.map(|x| x.to_bits()).chain(pairs).collect())
    }

    #[test]
    fn rows_that_are_kept_as_pairs_too_give_the_products_that_they_give_without() -> Result<()> {
        for (heads, head_dim, rows) in [(3, 64, 1), (3, 64, 30), (1, 36, 30), (5, 6, 12)] {
            let shape = AttentionShape { heads, kv_heads: 1, head_dim, scale: 0.3 };
            let mut cpu = Cpu::new(2, KvDType::BF16);
            let inv_freq = (0..head_dim / 2).map(|i| 0.9f32.powi(i as i32)).collect();
            cpu.load_rope(&Rope { inv_freq, pairing: RopePairing::Halves }, 64)?;
            let number = |i| ((i * 7919 % 1013) as f32 - 506.0) / 200.0;
            let data = |len: usize| (0..len).map(number).collect::<Vec<f32>>();
            let mut matrix = |width: usize| {
                let bytes = data(5 * width).into_iter().flat_map(|x| half::bf16::from_f32(x).to_le_bytes());
                let bytes = std::sync::Arc::new(bytes.collect::<Vec<u8>>());
                cpu.load_matrix(&[
                    RawTensor::new("w", vec![5, width], crate::DType::BF16, bytes, 0).expect("whole numbers")
                ])
            };
            let (qkv_width, width) = (shape.qkv_width(), shape.out_width());
            let (of_norm, of_heads) = (matrix(qkv_width)?, matrix(width)?);
            let upload = |cpu: &mut Cpu, rows: usize, data: &[f32]| {
                let width = data.len() / rows;
                let table = cpu.load_embedding(&RawTensor::from_f32("x", vec![rows, width], data))?;
                let mut x = cpu.tensor(rows, width)?;
                cpu.embed(&table, &mut x)?;
                Ok::<_, OpError>(x)
            };
            let mut batch = Batch::default();
            batch.push(&(0..rows as u32).collect::<Vec<_>>(), 0, &[1, 0], rows);
            cpu.begin(&batch)?;
            let mut x = upload(&mut cpu, rows, &data(rows * qkv_width))?;
            let (mut normed, mut heads) = (cpu.tensor(rows, qkv_width)?, cpu.tensor(rows, width)?);
            cpu.rms_norm(&mut x, None, &vec![1.5; qkv_width], 1e-6, &mut normed)?;
            let (mut cache, mut qkv) = (cpu.kv_cache(1, &shape, 2)?, upload(&mut cpu, rows, normed.data())?);
            cpu.rope_and_cache(&mut qkv, &shape, None, 0, &mut cache)?;
            cpu.attention(&qkv, &shape, AttentionOptions::default(), 0, &cache, &mut heads)?;
            assert!(normed.paired && heads.paired && !x.paired && !qkv.paired);
            let options = AttentionOptions { outputs_only: true, ..Default::default() };
            let mut some = cpu.tensor(rows, width)?;
            cpu.attention(&qkv, &shape, options, 0, &cache, &mut some)?;
            assert!(!some.paired, "not all rows are written");
            for (x, w) in [(&normed, &of_norm), (&heads, &of_heads)] {
                let plain = upload(&mut cpu, rows, x.data())?;
                let (mut found, mut expected) = (cpu.tensor(rows, 5)?, cpu.tensor(rows, 5)?);
                cpu.linear(x, w, None, &mut found)?;
                cpu.linear(&plain, w, None, &mut expected)?;
                assert!(!plain.paired && found.data() == expected.data(), "{shape:?}, {rows} rows");
            }
            // Written again by an op that writes no pairs.
            cpu.rope_and_cache(&mut normed, &shape, None, 0, &mut cache)?;
            let plain = upload(&mut cpu, rows, normed.data())?;
            let (mut found, mut expected) = (cpu.tensor(rows, 5)?, cpu.tensor(rows, 5)?);
            cpu.linear(&normed, &of_norm, None, &mut found)?;
            cpu.linear(&plain, &of_norm, None, &mut expected)?;
            assert!(!normed.paired && found.data() == expected.data(), "rotated, {shape:?}, {rows} rows");
        }
        Ok(())
    }

    #[test]
    fn all_instruction_sets_give_the_same_bits() -> Result<()> {
        for (heads, kv_heads, head_dim) in [(6, 2, 64), (14, 2, 36), (3, 3, 6)] {
            let shape = AttentionShape { heads, kv_heads, head_dim, scale: 0.3 };
            for kv_dtype in [KvDType::F16, KvDType::BF16, KvDType::F32] {
                let plain =
                    bits(Level::supported().next().expect("plain code runs anywhere"), kv_dtype, &shape)?;
                for level in Level::supported() {
                    assert!(bits(level, kv_dtype, &shape)? == plain, "{level:?} differs from plain code");
                }
            }
        }
        Ok(())
    }
}
