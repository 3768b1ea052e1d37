//! The op set on a GPU.
//!
//! Weights are bf16 unless they are stored as what `weights` keeps; what matrices read is bf16, keys and values are unless FP8 was asked for. The
//! residual stream, what matrices put out and logits are f32.

use crate::block_mover::BlockMover;
use crate::device::{Arg, Buffer, Device, Grid};
use crate::kv::{self, KvCache, KvDType, Parts, PrefillKernel, Rotations, half_block};
use crate::matmul::{FEW, Instructions, Matrix, Multiplier, Rows, Vector};
use crate::moe::{self, Experts, MOST_EXPERTS, Moe, Stack};
use crate::peers::{PeerAccess, Peers, Way};
use crate::sample::Sampler;
use crate::shared_prefix::SharedPrefixes;
use crate::step::{List, Step, is_decode};
use crate::tensor::{Format, Tensor, check};
use crate::upload::Uploader;
use crate::weights::Weights;
use rudder_comm::Member;
use rudder_ops::{
    Activation, AttentionOptions, AttentionShape, BLOCK_SIZE, Backend, Batch, DType, ExpertWeights, OpError,
    QkNorm, Rank, RawTensor, Result, Rope, SampleRow, Sampled, SamplerScratch, sample_row,
};

/// A GPU as a [`Backend`].
pub struct Cuda {
    /// The ranks of a model that is cut. Goes first, so that nobody waits for a stream that waits for other ranks.
    peers: Option<Peers>,
    name: String,
    device: Device,
    uploader: Uploader,
    multiplier: Multiplier,
    moe: moe::Buffers,
    sampler: Sampler,
    scratch: SamplerScratch,
    step: Step,
    /// Rotations, and the longest context that they are for.
    rope: Option<(Rotations, usize)>,
    parts: Option<Parts>,
    block_mover: Option<BlockMover>,
    kv_dtype: KvDType,
    /// Whether the open step is one of decodes, whose launches are gathered.
    gathers: bool,
    /// What the step before drew, for steps that go on from it.
    answers: Arg,
}

/// An embedding table `[vocab, hidden]`: f32 where its file has it so, else bf16.
pub struct Embedding {
    buffer: Buffer,
    is_f32: bool,
    vocab: usize,
    hidden: usize,
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

/// Each expert's tensors of all `parts`, expert by expert.
fn in_turn(parts: &[&[RawTensor]]) -> Vec<RawTensor> {
    let experts = parts.first().map_or(0, |part| part.len());
    (0..experts).flat_map(|expert| parts.iter().map(move |part| part[expert].clone())).collect()
}

/// The variable that says what a GPU is used without.
const WITHOUT: &str = "RUDDER_CUDA_WITHOUT";

impl Cuda {
    /// The GPU of this number, used without what the variable `RUDDER_CUDA_WITHOUT` names.
    ///
    /// # Errors
    /// If there is none that the kernels run on, the driver fails, or the variable names something else; says why.
    pub fn new(index: usize) -> Result<Self> {
        let mut cuda = Self::on(format!("cuda:{index}"), Device::gpu(index)?)?;
        cuda.do_without(&std::env::var(WITHOUT).unwrap_or_default())?;
        Ok(cuda)
    }

    /// Does without these, words between commas, to find out which of them is at fault where answers are wrong or steps fail.
    fn do_without(&mut self, words: &str) -> Result<()> {
        for word in words.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            match word {
                "graphs" => self.set_graphs(false)?,
                "dependent-launches" => self.set_dependent_launches(false)?,
                "wgmma" | "tcgen05" => self.set_prefill_kernel(PrefillKernel::Mma)?,
                _ => {
                    let known = "graphs, dependent-launches, wgmma, tcgen05";
                    return Err(OpError::Backend(format!("{WITHOUT}: {word:?} is none of {known}")));
                }
            }
        }
        Ok(())
    }

    /// The CPU in a GPU's place, for tests.
    ///
    /// # Errors
    /// If memory is short.
    #[cfg(feature = "emulate")]
    pub fn emulated() -> Result<Self> {
        Self::on("cuda emulated".into(), Device::emulated())
    }

    /// The same in an IMEX channel, which is 0 otherwise: devices of other channels do not reach its memory from other nodes.
    ///
    /// # Errors
    /// If memory is short.
    #[cfg(feature = "emulate")]
    pub fn emulated_in(imex_channel: u32) -> Result<Self> {
        Self::on("cuda emulated".into(), Device::emulated_in(imex_channel))
    }

    fn on(name: String, device: Device) -> Result<Self> {
        let mut step = Step::new();
        step.instructions = Instructions::of(&device);
        Ok(Self {
            name,
            uploader: Uploader::new(&device)?,
            multiplier: Multiplier::new(&device),
            moe: moe::Buffers::default(),
            sampler: Sampler::new(&device),
            scratch: SamplerScratch::default(),
            step,
            rope: None,
            parts: None,
            block_mover: None,
            kv_dtype: KvDType::default(),
            peers: None,
            gathers: false,
            answers: Arg::NULL,
            device,
        })
    }

    /// The same as a rank of a model that is cut.
    pub fn in_group(self, member: Member) -> Self {
        self.in_group_by(member, PeerAccess::default())
    }

    /// The same, and whether ranks may add up in each other's memory. All of them must be told the same.
    pub fn in_group_by(self, member: Member, access: PeerAccess) -> Self {
        Self { peers: Some(Peers::new(member, &self.device, access)), ..self }
    }

    /// The same with KV caches of this dtype, which are bf16 otherwise.
    pub fn with_kv_dtype(self, kv_dtype: KvDType) -> Self {
        Self { kv_dtype, ..self }
    }

    /// Goes on gathering launches after something that ended it.
    fn gather_on(&self) -> Result<()> {
        if self.gathers { self.device.gather() } else { Ok(()) }
    }

    /// Waits until all that was queued is done.
    ///
    /// # Errors
    /// If any of it failed.
    pub fn synchronize(&self) -> Result<()> {
        self.device.synchronize()
    }

    /// Whether decode steps that come again run as CUDA graphs; they do unless told otherwise.
    ///
    /// # Errors
    /// If what was queued before cannot be run.
    pub fn set_graphs(&mut self, on: bool) -> Result<()> {
        self.device.set_graphs(on)
    }

    /// Whether kernels of steps of decodes may be brought up while the ones before them still run; they may unless told otherwise.
    ///
    /// # Errors
    /// If what was queued before fails.
    pub fn set_dependent_launches(&mut self, on: bool) -> Result<()> {
        self.device.set_dependent_launches(on)
    }

    /// When keys that several rows of a step see are read once for all of them.
    pub fn set_shared_prefixes(&mut self, when: SharedPrefixes) {
        self.step.prefix.when = when;
    }

    /// Chooses the kernels for prompts, from the next step on: their attention, and products that cuBLASLt does not do.
    ///
    /// # Errors
    /// If the device does not have it.
    pub fn set_prefill_kernel(&mut self, kernel: PrefillKernel) -> Result<()> {
        let instructions = match kernel {
            PrefillKernel::Auto => Instructions::of(&self.device),
            PrefillKernel::Mma => Instructions::Mma,
            PrefillKernel::Wgmma => Instructions::Wgmma,
            PrefillKernel::Tcgen05 => Instructions::Tcgen05,
        };
        let has = match instructions {
            Instructions::Mma => true,
            Instructions::Wgmma => self.device.has_wgmma(),
            Instructions::Tcgen05 => self.device.has_tcgen05(),
        };
        check(has, || {
            format!("{} has no {kernel:?}: Hopper has Wgmma, Blackwell Tcgen05, each alone", self.name)
        })?;
        self.step.instructions = instructions;
        self.multiplier.instructions = instructions;
        Ok(())
    }

    /// Whether more than 16 rows are rounded to FP8 too, each 128 of their elements with a scale, where weights are FP8 with scales for 128
    /// inputs or more; and on Blackwell to MXFP8 where weights are MXFP4: twice the arithmetic, and answers that differ by that rounding. They
    /// are not unless told otherwise.
    ///
    /// # Errors
    /// If the device does not have the kernels, which are for Hopper and Blackwell.
    pub fn set_fp8_products(&mut self, on: bool) -> Result<()> {
        check(!on || self.device.has_wgmma() || self.device.has_tcgen05(), || {
            format!("{} has no kernels for products of FP8; Hopper and Blackwell have", self.name)
        })?;
        self.multiplier.fp8_products = on;
        Ok(())
    }

    /// Whether the device can multiply NVFP4 with NVFP4.
    pub fn has_fp4_products(&self) -> bool {
        self.device.has_tcgen05()
    }

    /// Whether more than 16 rows are rounded to NVFP4 where weights are, for checkpoints that say so: each row with a factor, 16 of its elements with
    /// a scale of E4M3, four times the arithmetic of bf16. They are not unless told otherwise.
    ///
    /// # Errors
    /// If the device does not have the kernels, which are for Blackwell.
    pub fn set_fp4_products(&mut self, on: bool) -> Result<()> {
        check(!on || self.has_fp4_products(), || {
            format!("{} has no kernels for products of NVFP4; Blackwell has", self.name)
        })?;
        self.multiplier.fp4_products = on;
        Ok(())
    }

    /// Kinds of decode steps that run as CUDA graphs by now.
    pub fn graphs(&self) -> usize {
        self.device.graphs()
    }

    /// Uploads matrices `[n, k]` of a layer's experts, for each expert those of `parts` one below the other, and their biases.
    fn stack(
        &mut self,
        parts: &[&[RawTensor]],
        biases: Option<&[&[RawTensor]]>,
        [n, k]: [usize; 2],
    ) -> Result<Stack> {
        let matrices = in_turn(parts);
        for matrix in &matrices {
            expect_shape(matrix, matrix.shape == [n, k], || format!("[{n}, {k}]"))?;
        }
        let weights = Weights::load(&self.device, &mut self.uploader, &matrices, k)?;
        let bias = match biases.map(in_turn) {
            Some(biases) => {
                for bias in &biases {
                    expect_shape(bias, bias.shape == [n], || format!("[{n}]"))?;
                }
                Some(self.load_vector(&biases)?)
            }
            None => None,
        };
        Ok(Stack { weights, bias })
    }

    /// Gates, in FP8 too if what reads them can read that.
    fn gate(&mut self, gate_up: &Tensor, feeds_fp8: bool, out: &mut Tensor) -> Result<()> {
        gate_up.expect_f32("gates and ups")?;
        let width = gate_up.width / 2;
        out.set(gate_up.rows, width, Format::Bf16)?;
        out.in_fp8 = feeds_fp8 && self.multiplier.reads_fp8(out.rows, width);
        moe::gate(&self.device, gate_up.into(), width, Activation::Silu, (&*out).into())
    }

    /// Refuses rows to draw that are not the step's outputs.
    fn expect_rows(&self, logits: &Tensor, rows: &[SampleRow<'_>]) -> Result<()> {
        let real = self.step.real_of(logits.rows);
        check(real == rows.len(), || format!("{} rows to sample of {real}", rows.len()))?;
        logits.expect_f32("logits")
    }

    fn block_mover(&mut self) -> Result<&mut BlockMover> {
        self.block_mover.as_mut().ok_or_else(|| OpError::Backend("a KV block without a KV cache".to_owned()))
    }

    /// Draws rows that the kernel cannot on the host.
    fn sample_on_host(
        &mut self,
        logits: &Tensor,
        rows: &[SampleRow<'_>],
        out: &mut Vec<Sampled>,
    ) -> Result<()> {
        if let Some(peers) = &mut self.peers {
            peers.wait_in_flight(|| self.device.is_idle())?;
        }
        let mut data = self.to_host(logits)?;
        let scratch = &mut self.scratch;
        out.clear();
        let drawn = data.chunks_exact_mut(logits.width).zip(rows);
        out.extend(drawn.map(|(logits, row)| sample_row(logits, row, scratch)));
        Ok(())
    }
}

impl Backend for Cuda {
    type Tensor = Tensor;
    type Matrix = Matrix;
    type Embedding = Embedding;
    type Vector = Vector;
    type Experts = Experts;
    type KvCache = KvCache;

    fn name(&self) -> &str {
        &self.name
    }

    fn rank(&self) -> Rank {
        self.peers.as_ref().map_or(Rank::ALONE, Peers::rank)
    }

    fn memory(&self) -> Result<Option<(u64, u64)>> {
        self.device.memory().map(Some)
    }

    fn load_matrix(&mut self, parts: &[RawTensor]) -> Result<Matrix> {
        let k = parts.first().and_then(|part| part.shape.get(1).copied()).unwrap_or(0);
        for part in parts {
            expect_shape(part, part.shape.len() == 2 && part.shape[1] == k, || format!("[any, {k}]"))?;
        }
        let n = parts.iter().map(|part| part.shape[0]).sum();
        Ok(Matrix { weights: Weights::load(&self.device, &mut self.uploader, parts, k)?, n, k })
    }

    fn load_embedding(&mut self, table: &RawTensor) -> Result<Embedding> {
        expect_shape(table, table.shape.len() == 2, || "[vocab, hidden]".to_owned())?;
        let (vocab, hidden) = (table.shape[0], table.shape[1]);
        let is_f32 = table.dtype == DType::F32;
        let buffer = self.device.buffer(table.elements() * if is_f32 { 4 } else { 2 })?;
        match is_f32 {
            true => self.uploader.f32(table, hidden, &buffer, 0)?,
            false => self.uploader.matrix_bf16(table, hidden, &buffer, 0)?,
        }
        Ok(Embedding { buffer, is_f32, vocab, hidden })
    }

    fn load_vector(&mut self, parts: &[RawTensor]) -> Result<Vector> {
        for part in parts {
            expect_shape(part, part.shape.len() == 1, || "[any]".to_owned())?;
        }
        let len = parts.iter().map(RawTensor::elements).sum();
        let buffer = self.device.buffer(4 * len)?;
        let mut offset = 0;
        for part in parts {
            self.uploader.f32(part, part.elements(), &buffer, offset)?;
            offset += 4 * part.elements();
        }
        Ok(Vector { buffer, len, feeds_fp8: false })
    }

    fn norm_feeds(norm: &mut Vector, matrix: &Matrix) {
        norm.feeds_fp8 |= matrix.weights.takes_fp8();
    }

    fn norm_feeds_experts(norm: &mut Vector, experts: &Experts) {
        norm.feeds_fp8 |= experts.gate_up.weights.takes_fp8();
    }

    fn load_experts(&mut self, weights: &ExpertWeights<'_>) -> Result<Experts> {
        let ExpertWeights { gate, up, down, biases, activation } = *weights;
        let experts = gate.len();
        let fits = |other: &[RawTensor]| other.len() == experts;
        let fit = fits(up) && fits(down) && biases.is_none_or(|biases| biases.into_iter().all(fits));
        check((1..=MOST_EXPERTS).contains(&experts) && fit, || {
            format!("{experts} gate, {} up and {} down matrices of experts", up.len(), down.len())
        })?;
        expect_shape(&gate[0], gate[0].shape.len() == 2, || "[intermediate, hidden]".to_owned())?;
        let (intermediate, hidden) = (gate[0].shape[0], gate[0].shape[1]);
        let (inner_bias, outer_bias) = match biases {
            Some([gate, up, down]) => (Some(vec![gate, up]), Some(vec![down])),
            None => (None, None),
        };
        let gate_up = self.stack(&[gate, up], inner_bias.as_deref(), [intermediate, hidden])?;
        let down = self.stack(&[down], outer_bias.as_deref(), [hidden, intermediate])?;
        Ok(Experts { gate_up, down, activation, experts, hidden, intermediate })
    }

    fn tensor(&mut self, max_rows: usize, width: usize) -> Result<Tensor> {
        self.step.room = self.step.room.min(max_rows);
        Tensor::new(&self.device, max_rows, width)
    }

    fn kv_cache(&mut self, layers: usize, shape: &AttentionShape, blocks: usize) -> Result<KvCache> {
        let cache = KvCache::new(&self.device, layers, shape, blocks, self.kv_dtype)?;
        let context = self.rope.as_ref().map_or(0, |(_, context)| *context);
        self.parts = None; // first give back, then take
        self.parts = Some(Parts::new(&self.device, shape, context)?);
        self.block_mover = Some(BlockMover::new(&self.device, cache.block())?);
        self.step.shape = Some(*shape);
        self.step.prefix.token_bytes = self.kv_block_bytes(shape) / BLOCK_SIZE;
        Ok(cache)
    }

    fn kv_block_bytes(&self, shape: &AttentionShape) -> usize {
        2 * half_block(shape, self.kv_dtype)
    }

    fn kv_format(&self) -> Option<String> {
        Some(self.kv_dtype.format())
    }

    fn read_kv_block(&mut self, cache: &KvCache, block: u32, out: &mut [u8]) -> Result<()> {
        self.block_mover()?.read(cache, block, out)
    }

    fn write_kv_block(&mut self, cache: &mut KvCache, block: u32, bytes: &[u8]) -> Result<()> {
        self.block_mover()?.write(cache, block, bytes)
    }

    fn load_rope(&mut self, rope: &Rope, max_positions: usize) -> Result<()> {
        self.rope = Some((Rotations::new(&self.device, rope)?, max_positions));
        Ok(())
    }

    fn begin(&mut self, batch: &Batch) -> Result<()> {
        if let Some(peers) = &mut self.peers {
            peers.give_up_unfinished();
        }
        self.answers = match self.rank().index {
            0 => self.sampler.answers(&batch.drawn)?,
            _ => Arg::NULL, // rank 0 shows what it drew
        };
        if let Some(mover) = &mut self.block_mover {
            mover.begin(!batch.drawn.is_empty())?;
        }
        self.step.set(batch, &self.device)?;
        self.gathers = is_decode(batch);
        if let Some(peers) = &mut self.peers {
            peers.begin(self.gathers)?;
            check(batch.drawn.is_empty() || peers.in_flight().is_some(), || {
                "tokens that rank 0 drew are told in each other's memory, which the ranks do not reach"
                    .to_owned()
            })?;
        }
        self.gather_on()
    }

    fn embed(&mut self, table: &Embedding, out: &mut Tensor) -> Result<()> {
        let (rows, token) = (self.step.rows, self.step.largest_token);
        check(rows == 0 || (token as usize) < table.vocab, || {
            format!("token {token} is not in a vocabulary of {}", table.vocab)
        })?;
        out.set(rows, table.hidden, Format::F32)?;
        let args = [
            self.step.arg(List::Tokens),
            self.step.given(List::Drawn),
            self.answers,
            (&table.buffer).into(),
            table.is_f32.into(),
            (&*out).into(),
            table.hidden.into(),
        ];
        match self.peers.as_ref().and_then(Peers::in_flight) {
            Some(memory) => memory.embed(args, rows, table.vocab),
            None => self.device.launch("embed", Grid::new(rows, 256), 0, &args),
        }
    }

    fn rms_norm(
        &mut self,
        x: &mut Tensor,
        delta: Option<&Tensor>,
        weight: &Vector,
        eps: f32,
        out: &mut Tensor,
    ) -> Result<()> {
        let (rows, width) = (x.rows, x.width);
        expect_normed(x, delta, weight)?;
        out.set(rows, width, Format::Bf16)?;
        out.in_fp8 = weight.feeds_fp8 && self.multiplier.reads_fp8(rows, width);
        let [to, codes, scales] = Rows::from(&*out).targets();
        let weight = (&weight.buffer).into();
        let args = [(&*x).into(), delta.into(), weight, eps.into(), to, codes, scales, width.into()];
        self.device.launch("rms_norm", Grid::new(rows, norm_threads(width)), 0, &args)
    }

    fn linear(&mut self, x: &Tensor, w: &Matrix, bias: Option<&Vector>, out: &mut Tensor) -> Result<()> {
        self.multiplier.linear(x, w, bias, out)
    }

    fn rope_and_cache(
        &mut self,
        qkv: &mut Tensor,
        shape: &AttentionShape,
        norm: Option<QkNorm<'_, Vector>>,
        layer: usize,
        cache: &mut KvCache,
    ) -> Result<()> {
        expect_cache(shape, cache)?;
        let Some((rope, _)) = &self.rope else {
            return Err(OpError::Backend("no rope is loaded".to_owned()));
        };
        rope.apply(&self.device, &self.step, qkv, norm, layer, cache)
    }

    fn attention(
        &mut self,
        qkv: &Tensor,
        shape: &AttentionShape,
        options: AttentionOptions<'_, Vector>,
        layer: usize,
        cache: &KvCache,
        out: &mut Tensor,
    ) -> Result<()> {
        expect_cache(shape, cache)?;
        let Some(parts) = &self.parts else {
            return Err(OpError::Backend("attention without a KV cache".to_owned()));
        };
        check(self.step.shape == Some(*shape), || {
            format!("{shape:?} is not the shape of the KV cache made last")
        })?;
        kv::attention(&self.device, &self.step, parts, qkv, options, layer, cache, out)
    }

    fn silu_mul(&mut self, gate_up: &Tensor, out: &mut Tensor) -> Result<()> {
        self.gate(gate_up, true, out)
    }

    fn mlp(
        &mut self,
        x: &Tensor,
        gate_up: &Matrix,
        down: &Matrix,
        (both, activated): (&mut Tensor, &mut Tensor),
        out: &mut Tensor,
    ) -> Result<()> {
        if x.rows <= FEW {
            self.multiplier.gated_few(x, gate_up, activated)?;
        } else {
            self.linear(x, gate_up, None, both)?;
            self.gate(both, down.weights.takes_fp8(), activated)?;
        }
        self.linear(activated, down, None, out)
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
        let (multiplier, buffers) = (&mut self.multiplier, &mut self.moe);
        let mut op = Moe { device: &self.device, multiplier, buffers, experts, top_k };
        op.run(x, router_logits, renormalise, out)
    }

    fn gather(&mut self, x: &Tensor, delta: Option<&Tensor>, out: &mut Tensor) -> Result<()> {
        let outputs = self.step.len(List::Outputs);
        check(x.rows == self.step.rows, || "gather from rows that are not the batch's".to_owned())?;
        if delta.is_some() {
            expect_residual(x, delta)?;
        }
        out.set(outputs, x.width, x.format)?;
        let args = [
            x.into(),
            x.is_f32(),
            delta.into(),
            self.step.arg(List::Outputs),
            (&*out).into(),
            x.width.into(),
        ];
        self.device.launch("gather", Grid::new(outputs, 256), 0, &args)
    }

    fn all_reduce(&mut self, x: &mut Tensor) -> Result<()> {
        let Some(peers) = &mut self.peers else { return Ok(()) };
        x.expect_f32("what ranks add up")?;
        match (peers.way(4 * x.elements()), peers.memory()) {
            (Way::Kernels, Some(memory)) => return memory.all_reduce(x),
            (Way::Nccl, _) => peers.all_reduce_by_nccl(x)?,
            _ => peers.all_reduce_on_host(x)?,
        }
        self.gather_on()
    }

    fn reduce_norm(
        &mut self,
        x: &mut Tensor,
        delta: &mut Tensor,
        weight: &Vector,
        eps: f32,
        out: &mut Tensor,
    ) -> Result<()> {
        let memory = self.peers.as_ref().and_then(Peers::memory);
        if let Some(memory) = memory.filter(|memory| memory.can_norm(x.rows, x.width)) {
            expect_normed(x, Some(delta), weight)?;
            out.set(x.rows, x.width, Format::Bf16)?;
            out.in_fp8 = weight.feeds_fp8 && self.multiplier.reads_fp8(x.rows, x.width);
            return memory.reduce_norm(x, delta, weight, eps, out);
        }
        self.all_reduce(delta)?;
        self.rms_norm(x, Some(delta), weight, eps, out)
    }

    fn gather_columns(&mut self, part: &Tensor, whole: Option<&mut Tensor>) -> Result<()> {
        match &mut self.peers {
            Some(peers) => peers.gather_columns(part, whole),
            None => Err(OpError::Backend("columns are gathered from a group of ranks".to_owned())),
        }
    }

    fn end(&mut self) -> Result<()> {
        match &mut self.peers {
            Some(peers) => peers.end(),
            None => self.device.flush(),
        }
    }

    fn sample(&mut self, logits: &mut Tensor, rows: &[SampleRow<'_>], out: &mut Vec<Sampled>) -> Result<()> {
        self.expect_rows(logits, rows)?;
        if rows.is_empty() {
            out.clear();
            return Ok(());
        }
        if !rows.iter().all(Sampler::can) {
            return self.sample_on_host(logits, rows, out);
        }
        self.draw(logits, rows)?;
        self.drawn(out)
    }

    fn draws_ahead(&self) -> bool {
        self.peers.as_ref().is_none_or(Peers::draws_ahead)
    }

    fn draw(&mut self, logits: &mut Tensor, rows: &[SampleRow<'_>]) -> Result<()> {
        self.expect_rows(logits, rows)?;
        self.sampler.draw(logits, rows)
    }

    fn drawn(&mut self, out: &mut Vec<Sampled>) -> Result<()> {
        let waited = match &mut self.peers {
            Some(peers) => peers.wait_in_flight(|| self.sampler.has_come()),
            None => Ok(()),
        };
        waited.and(self.sampler.drawn(out))
    }

    fn landed(&mut self) -> Result<()> {
        self.peers.as_mut().map_or(Ok(()), Peers::landed)
    }

    fn recover(&mut self) -> Result<()> {
        if let Some(peers) = &mut self.peers {
            peers.give_up_unfinished();
        }
        // After a fault on the device every call gives its error, however often it is asked.
        self.synchronize()
    }

    fn to_host(&mut self, x: &Tensor) -> Result<Vec<f32>> {
        let elements = self.step.real_of(x.rows) * x.width;
        match x.format {
            Format::F32 => {
                let mut data = vec![0f32; elements];
                x.buffer.read(0, crate::step::bytes_mut(&mut data))?;
                Ok(data)
            }
            Format::Bf16 => {
                let mut data = vec![0u16; elements];
                x.buffer.read(0, crate::step::bytes_mut(&mut data))?;
                Ok(data.into_iter().map(|bits| half::bf16::from_bits(bits).to_f32()).collect())
            }
        }
    }
}

/// Refuses a residual stream, or what is added to it, of another format or shape.
fn expect_residual(x: &Tensor, delta: Option<&Tensor>) -> Result<()> {
    x.expect_f32("the residual stream")?;
    let Some(delta) = delta else { return Ok(()) };
    delta.expect_f32("a residual")?;
    check((delta.rows, delta.width) == (x.rows, x.width), || "a residual of another shape".to_owned())
}

/// Refuses a norm that does not fit its rows.
fn expect_normed(x: &Tensor, delta: Option<&Tensor>, weight: &Vector) -> Result<()> {
    check(weight.len == x.width, || format!("a norm of {} for rows of {}", weight.len, x.width))?;
    expect_residual(x, delta)
}

fn expect_cache(shape: &AttentionShape, cache: &KvCache) -> Result<()> {
    check(cache.shape == *shape, || format!("{shape:?} is not in the KV cache"))
}

/// Threads for a row's norm: few where it is narrow.
fn norm_threads(width: usize) -> u32 {
    (width.div_ceil(4).next_multiple_of(32) as u32).clamp(32, 512)
}

#[cfg(all(test, feature = "emulate"))]
mod tests {
    use super::*;
    use crate::emulated::LAUNCHED;
    use rudder_model::{KvSize, LoadOptions, ModelSource};
    use std::path::Path;
    use std::slice;
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    /// A matrix `[1, 64]` of ones in FP8.
    fn ones_in_fp8(cuda: &mut Cuda) -> Result<Matrix> {
        let block = [1f32.to_le_bytes().as_slice(), &[0x38; 64]].concat();
        let raw = RawTensor::new("w", vec![1, 64], DType::F8_E4M3, Arc::new(block), 0).expect("one block");
        cuda.load_matrix(&[raw])
    }

    fn ones(shape: &[usize]) -> RawTensor {
        RawTensor::from_f32("ones", shape.to_vec(), &[1.0; 128][..shape.iter().product()])
    }

    /// Makes `x` ones, as many rows of them.
    fn fill(cuda: &mut Cuda, rows: usize, x: &mut Tensor) -> Result<()> {
        let table = cuda.load_embedding(&ones(&[1, x.width]))?;
        let mut batch = Batch::default();
        batch.push(&vec![0; rows], 0, &[0, 1], 0);
        cuda.begin(&batch)?;
        cuda.embed(&table, x)
    }

    /// Whether a product reads these rows, of ones about, in FP8: it does if it finds them after their bf16 was wiped out.
    fn reads_fp8(cuda: &mut Cuda, made: &Tensor, w: &Matrix) -> Result<bool> {
        let mut out = cuda.tensor(made.rows, 1)?;
        made.buffer.write(0, &vec![0; 2 * made.elements()])?;
        cuda.linear(made, w, None, &mut out)?;
        let found = cuda.to_host(&out)?;
        assert!(found.iter().all(|x| (*x > 1.0) == (found[0] > 1.0)));
        Ok(found[0] > 1.0)
    }

    #[test]
    fn what_a_decode_step_kept_back_is_queued_when_it_ends() -> Result<()> {
        let mut cuda = Cuda::emulated()?;
        let (table, mut x) = (cuda.load_embedding(&ones(&[1, 64]))?, cuda.tensor(1, 64)?);
        let mut batch = Batch::default();
        batch.push(&[0], 0, &[0], 1);
        cuda.begin(&batch)?;
        cuda.embed(&table, &mut x)?;
        let found = || {
            let mut found = [0f32; 64];
            crate::emulated::read(x.buffer.address(), crate::step::bytes_mut(&mut found));
            found
        };
        assert_eq!(found(), [0.0; 64]);
        cuda.end()?;
        assert_eq!(found(), [1.0; 64]);
        Ok(())
    }

    #[test]
    fn products_read_the_fp8_that_a_norm_or_gate_left() -> Result<()> {
        let mut cuda = Cuda::emulated()?;
        cuda.set_fp8_products(true)?;
        let (w, mut weight) = (ones_in_fp8(&mut cuda)?, cuda.load_vector(&[ones(&[64])])?);
        Cuda::norm_feeds(&mut weight, &w);
        for (rows, in_fp8) in [(17, true), (16, false)] {
            for gates in [false, true] {
                let (mut x, mut made) =
                    (cuda.tensor(rows, if gates { 128 } else { 64 })?, cuda.tensor(rows, 64)?);
                fill(&mut cuda, rows, &mut x)?;
                match gates {
                    true => cuda.silu_mul(&x, &mut made)?,
                    false => cuda.rms_norm(&mut x, None, &weight, 1e-6, &mut made)?,
                }
                assert_eq!(reads_fp8(&mut cuda, &made, &w)?, in_fp8, "{rows} rows, {gates}");
            }
        }
        Ok(())
    }

    /// A matrix `[128, 128]` whose blocks of FP8, if that is what it is, have these scales in turn.
    fn square(dtype: DType, scales: [f32; 2]) -> RawTensor {
        let mut bytes = vec![0u8; dtype.bytes(128 * 128).expect("whole blocks")];
        if dtype == DType::F8_E4M3 {
            let blocks = bytes.chunks_exact_mut(dtype.block_bytes()).zip(scales.into_iter().cycle());
            blocks.for_each(|(block, scale)| block[..4].copy_from_slice(&scale.to_le_bytes()));
        }
        RawTensor::new("w", vec![128, 128], dtype, Arc::new(bytes), 0).expect("whole blocks")
    }

    /// Whether a norm that feeds such a matrix, or experts of it, writes rows in FP8 too.
    fn norm_writes_fp8(cuda: &mut Cuda, w: &RawTensor, experts: bool) -> Result<bool> {
        const ROWS: usize = 17;
        let (width, w) = (w.shape[1], slice::from_ref(w));
        let mut weight = cuda.load_vector(&[ones(&[width])])?;
        match experts {
            true => {
                let experts = cuda.load_experts(&ExpertWeights::plain(w, w, w))?;
                Cuda::norm_feeds_experts(&mut weight, &experts);
            }
            false => Cuda::norm_feeds(&mut weight, &cuda.load_matrix(w)?),
        }
        let (mut x, mut made) = (cuda.tensor(ROWS, width)?, cuda.tensor(ROWS, width)?);
        fill(cuda, ROWS, &mut x)?;
        let (codes, untouched) = (2 * ROWS * width, vec![0x55; ROWS * width]);
        made.buffer.write(codes, &untouched)?;
        cuda.rms_norm(&mut x, None, &weight, 1e-6, &mut made)?;
        let mut found = vec![0; untouched.len()];
        made.buffer.read(codes, &mut found)?;
        Ok(found != untouched)
    }

    #[test]
    fn norms_write_fp8_where_what_they_feed_reads_it() -> Result<()> {
        let mut cuda = Cuda::emulated()?;
        cuda.set_fp8_products(true)?;
        // The scales of blocks of FP8, of which there are two in a row.
        let formats = [
            (DType::F8_E4M3, [1f32, 1.0], true),
            (DType::F8_E4M3, [1.0, 2.0], false),
            (DType::MXFP4, [0.0; 2], false),
            (DType::NVFP4, [0.0; 2], false),
            (DType::INT4, [0.0; 2], false),
            (DType::BF16, [0.0; 2], false),
        ];
        for (dtype, scales, reads) in formats {
            let w = square(dtype, scales);
            for experts in [false, true] {
                let found = norm_writes_fp8(&mut cuda, &w, experts)?;
                assert_eq!(found, reads, "{dtype:?}, {scales:?}, experts {experts}");
            }
        }
        Ok(())
    }

    #[test]
    fn the_gate_of_an_mlp_writes_fp8_where_down_reads_it() -> Result<()> {
        const ROWS: usize = 17;
        let mut cuda = Cuda::emulated()?;
        cuda.set_fp8_products(true)?;
        let gate_up = cuda.load_matrix(&[square(DType::BF16, [0.0; 2]), square(DType::BF16, [0.0; 2])])?;
        for (dtype, reads) in
            [(DType::F8_E4M3, true), (DType::NVFP4, false), (DType::MXFP4, false), (DType::BF16, false)]
        {
            let down = cuda.load_matrix(&[square(dtype, [1.0; 2])])?;
            let (mut x, mut out) = (cuda.tensor(ROWS, 128)?, cuda.tensor(ROWS, 128)?);
            let (mut both, mut activated) = (cuda.tensor(ROWS, 256)?, cuda.tensor(ROWS, 128)?);
            fill(&mut cuda, ROWS, &mut x)?;
            LAUNCHED.take();
            cuda.mlp(&x, &gate_up, &down, (&mut both, &mut activated), &mut out)?;
            let launched = LAUNCHED.take();
            let gate = launched.iter().find(|(kernel, _)| *kernel == "silu_mul").expect("a gate");
            assert_eq!(gate.1[2] != Arg::NULL, reads, "{dtype:?}");
        }
        Ok(())
    }

    #[test]
    fn an_mlp_of_few_rows_is_two_launches() -> Result<()> {
        let mut cuda = Cuda::emulated()?;
        let square = square(DType::BF16, [0.0; 2]);
        let (gate_up, down) =
            (cuda.load_matrix(&[square.clone(), square.clone()])?, cuda.load_matrix(&[square])?);
        for (rows, expected) in [
            (8, ["matmul_few_gated_8", "matmul_few_8"].as_slice()),
            (16, &["matmul_few_gated_16", "matmul_few_16"]),
            (17, &["matmul_wgmma", "silu_mul", "matmul_wgmma"]),
        ] {
            let (mut x, mut out) = (cuda.tensor(rows, 128)?, cuda.tensor(rows, 128)?);
            let (mut both, mut activated) = (cuda.tensor(rows, 256)?, cuda.tensor(rows, 128)?);
            x.set(rows, 128, Format::Bf16)?;
            LAUNCHED.take();
            cuda.mlp(&x, &gate_up, &down, (&mut both, &mut activated), &mut out)?;
            let launched: Vec<_> = LAUNCHED.take().into_iter().map(|(kernel, _)| kernel).collect();
            assert_eq!(launched, expected);
        }
        Ok(())
    }

    #[test]
    fn k_is_taken_in_parts_where_tiles_are_few() -> Result<()> {
        let mut cuda = Cuda::emulated()?;
        for (kernel, fp8, n, k, product, parts) in [
            (PrefillKernel::Wgmma, false, 128, 1024, "matmul_wgmma_fp8", true),
            (PrefillKernel::Wgmma, false, 129, 1024, "matmul_wgmma_fp8", true),
            (PrefillKernel::Wgmma, false, 128, 512, "matmul_wgmma_fp8", false),
            (PrefillKernel::Wgmma, false, 6 * 128, 1024, "matmul_wgmma_fp8", false),
            (PrefillKernel::Mma, false, 128, 1024, "matmul_tiles_fp8", true),
            (PrefillKernel::Tcgen05, false, 128, 1024, "matmul_tcgen05_fp8", true),
            (PrefillKernel::Wgmma, true, 128, 1024, "matmul_fp8_fp8", true),
            (PrefillKernel::Wgmma, true, 128, 512, "matmul_fp8_fp8", false),
            (PrefillKernel::Wgmma, true, 6 * 128, 1024, "matmul_fp8_fp8", false),
            (PrefillKernel::Tcgen05, true, 128, 1024, "matmul_fp8_tcgen05", true),
        ] {
            cuda.set_prefill_kernel(kernel)?;
            cuda.set_fp8_products(fp8)?;
            let w = RawTensor::new("w", vec![n, k], DType::F8_E4M3, Arc::new(vec![0; n * k / 64 * 68]), 0);
            let w = cuda.load_matrix(&[w.expect("whole blocks")])?;
            let (mut x, mut out) = (cuda.tensor(17, k)?, cuda.tensor(17, n)?);
            x.set(17, k, Format::Bf16)?;
            LAUNCHED.take();
            cuda.linear(&x, &w, None, &mut out)?;
            let mut launched: Vec<_> = LAUNCHED.take().into_iter().map(|(kernel, _)| kernel).collect();
            launched.retain(|kernel| kernel != "quantise_rows");
            let expected = if parts { vec![product, "add_parts"] } else { vec![product] };
            assert_eq!(launched, expected, "[{n}, {k}]");
        }
        Ok(())
    }

    #[test]
    fn what_is_named_is_done_without_and_what_is_unknown_refused() -> Result<()> {
        let mut cuda = Cuda::emulated()?;
        cuda.set_prefill_kernel(PrefillKernel::Wgmma)?;
        cuda.do_without("")?;
        assert!(matches!(cuda.step.instructions, Instructions::Wgmma));
        cuda.do_without("graphs, wgmma,dependent-launches,")?;
        assert!(matches!(cuda.step.instructions, Instructions::Mma));
        let error = cuda.do_without("graphs,grafs").unwrap_err().to_string();
        assert!(error.contains("grafs") && error.contains("dependent-launches"), "{error}");
        Ok(())
    }

    /// Of the norms in a model's step: whether each writes rows in FP8 too.
    fn norms_that_write_fp8(source: &ModelSource) -> Result<Vec<bool>> {
        let mut cuda = Cuda::emulated()?;
        cuda.set_fp8_products(true)?;
        let options =
            LoadOptions { max_batch_tokens: 20, max_outputs: 20, kv: KvSize::Blocks(2), max_context: 32 };
        let mut model = source.load(cuda, options, |_, _| ()).expect("it loads").model;
        let mut batch = Batch::default();
        batch.push(&[0; 20], 0, &[0, 1], 20);
        LAUNCHED.take();
        model.forward(&batch)?;
        let norms = LAUNCHED.take().into_iter().filter(|(kernel, _)| kernel == "rms_norm");
        Ok(norms.map(|(_, args)| args[5] != Arg::NULL).collect())
    }

    #[test]
    fn norms_of_a_model_write_fp8_where_the_formats_of_its_matrices_say_so() -> Result<()> {
        let path = |name| Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures").join(name);
        let dummy = |name| ModelSource::dummy(&path(name).to_string_lossy()).expect("a configuration");
        let mxfp4 = || ModelSource::open(&path("gptoss-mxfp4")).expect("a checkpoint");
        // Of two layers each attention's, then the MLP's; the last is the output's, whose matrix is never FP8.
        for (source, what, found) in [
            (dummy("dummy-fp8"), "FP8", [true, true, true, true, false]),
            (dummy("dummy-moe").with_fp8(), "experts of FP8", [true, true, true, true, false]),
            (mxfp4().with_fp8(), "experts of MXFP4, else FP8", [true, false, true, false, false]),
            (mxfp4(), "MXFP4", [false; 5]),
            (dummy("dummy-nvfp4"), "NVFP4", [false; 5]),
        ] {
            assert_eq!(norms_that_write_fp8(&source)?, found, "{what}");
        }
        Ok(())
    }

    #[test]
    fn a_rank_that_has_left_a_step_recovers_without_the_others() {
        const PATIENCE: Duration = Duration::from_secs(10);
        let on_rank = |member: Member| -> Result<bool> {
            let mut cuda = Cuda::emulated()?.in_group_by(member, PeerAccess::Always);
            let (table, mut x) = (cuda.load_embedding(&ones(&[1, 64]))?, cuda.tensor(1, 64)?);
            cuda.begin(&Batch::default())?;
            let peers = cuda.peers.as_ref().expect("it is a rank");
            peers.memory().expect("they reach each other").wait_for(PATIENCE)?;
            cuda.end()?;
            let mut batch = Batch::default();
            batch.push(&[0], 0, &[0], 1);
            let mut waited = Duration::ZERO;
            for _ in 0..2 {
                cuda.begin(&batch)?;
                // What one of them has queued, the other has not.
                if cuda.rank().index == 0 {
                    cuda.embed(&table, &mut x)?;
                    cuda.all_reduce(&mut x)?;
                }
                let began = Instant::now();
                cuda.recover()?;
                waited = waited.max(began.elapsed());
            }
            cuda.begin(&Batch::default())?; // nobody reads the other's memory any more
            Ok(waited < PATIENCE)
        };
        let members = rudder_comm::Group::new(2).members().into_iter();
        std::thread::scope(|scope| {
            let ranks: Vec<_> = members.map(|member| scope.spawn(move || on_rank(member))).collect();
            let recovered = ranks.into_iter().map(|rank| rank.join().expect("no panic").expect("it goes on"));
            assert_eq!(recovered.collect::<Vec<_>>(), [true; 2]);
        });
    }

    #[test]
    fn products_read_the_fp8_that_a_norm_of_the_sum_over_ranks_left() {
        let on_rank = |member: Member, access, rows: usize| -> Result<bool> {
            let mut cuda = Cuda::emulated()?.in_group_by(member, access);
            cuda.set_fp8_products(true)?;
            let (w, mut weight) = (ones_in_fp8(&mut cuda)?, cuda.load_vector(&[ones(&[64])])?);
            Cuda::norm_feeds(&mut weight, &w);
            let (mut x, mut delta, mut made) =
                (cuda.tensor(rows, 64)?, cuda.tensor(rows, 64)?, cuda.tensor(rows, 64)?);
            fill(&mut cuda, rows, &mut x)?;
            fill(&mut cuda, rows, &mut delta)?;
            cuda.reduce_norm(&mut x, &mut delta, &weight, 1e-6, &mut made)?;
            let found = reads_fp8(&mut cuda, &made, &w)?;
            cuda.begin(&Batch::default())?; // nobody reads the other's memory any more
            Ok(found)
        };
        for access in [PeerAccess::Always, PeerAccess::Multicast] {
            for (rows, in_fp8) in [(17, true), (16, false)] {
                let members = rudder_comm::Group::new(2).members().into_iter();
                let found: Vec<_> = std::thread::scope(|scope| {
                    let ranks: Vec<_> =
                        members.map(|member| scope.spawn(move || on_rank(member, access, rows))).collect();
                    ranks.into_iter().map(|rank| rank.join().expect("no panic").ok()).collect()
                });
                assert_eq!(found, [Some(in_fp8); 2], "{rows} rows, {access:?}");
            }
        }
    }
}
