//! Times every kernel family on a GPU, on the shapes of Llama-3.1-8B and Qwen3-30B-A3B, against the chip's ceilings.
//!
//! Reports the median of several rounds, each of many launches and one wait. Bytes are those that an op must read and write
//! once; operations are those of its definition. Weights are rotated so that none is found in the second cache.
//!
//!     cargo bench -p rudder-cuda [-- --json FILE] [--bandwidth TB/S --arithmetic TFLOP/S]

use rudder_cuda::{Cuda, Matrix, PrefillKernel, SharedPrefixes, Tensor, Vector};
use rudder_ops::{
    AttentionShape, Backend, Batch, DType, ExpertWeights, RawTensor, Result, Rope, RopePairing, SampleRow,
    SamplingParams,
};
use std::sync::Arc;
use std::time::Instant;

/// The data sheet's, for H200: bytes and operations a second.
const BANDWIDTH: f64 = 4.8e12;
const ARITHMETIC: f64 = 989e12;
/// Weights of one shape take at least so many bytes together: several times the second cache.
const ROTATED: usize = 256 << 20;
const ROUNDS: usize = 7;
const LLAMA: AttentionShape = AttentionShape { heads: 32, kv_heads: 8, head_dim: 128, scale: 0.088_388_35 };

/// The ways to multiply many rows, where a GPU has several.
const WAYS: [(&str, PrefillKernel, bool); 4] = [
    ("mma", PrefillKernel::Mma, false),
    ("wgmma", PrefillKernel::Wgmma, false),
    ("tcgen05", PrefillKernel::Tcgen05, false),
    ("rows rounded", PrefillKernel::Auto, true),
];

/// One line of the table.
struct Line {
    name: String,
    seconds: f64,
    bytes: f64,
    operations: f64,
}

struct Bench {
    cuda: Cuda,
    pool: Arc<Vec<u8>>,
    lines: Vec<Line>,
    ceilings: [f64; 2],
}

impl Bench {
    /// Times `call`, which queues one op; the argument counts the calls.
    fn time(
        &mut self,
        name: String,
        bytes: f64,
        operations: f64,
        mut call: impl FnMut(&mut Cuda, usize) -> Result<()>,
    ) -> Result<()> {
        let mut calls = 0;
        let mut round = |cuda: &mut Cuda, n: usize| -> Result<f64> {
            cuda.synchronize()?;
            let began = Instant::now();
            for _ in 0..n {
                call(cuda, calls)?;
                calls += 1;
            }
            cuda.synchronize()?;
            Ok(began.elapsed().as_secs_f64() / n as f64)
        };
        round(&mut self.cuda, 3)?;
        let once = round(&mut self.cuda, 3)?;
        let n = ((0.02 / once) as usize).clamp(3, 2000);
        let mut times = (0..ROUNDS).map(|_| round(&mut self.cuda, n)).collect::<Result<Vec<_>>>()?;
        times.sort_by(f64::total_cmp);
        let line = Line { name, seconds: times[ROUNDS / 2], bytes, operations };
        self.print(&line);
        self.lines.push(line);
        Ok(())
    }

    fn print(&self, line: &Line) {
        let [bandwidth, arithmetic] = self.ceilings;
        let (rate, work) = (line.bytes / line.seconds, line.operations / line.seconds);
        println!(
            "{:<44} {:>10.1} {:>8.0} {:>8.1} {:>6.0} % {:>6.0} %",
            line.name,
            line.seconds * 1e6,
            rate / 1e9,
            work / 1e12,
            100.0 * rate / bandwidth,
            100.0 * work / arithmetic
        );
    }

    /// Random bf16 weights; all share one pool of bytes on the host.
    fn raw(&self, shape: &[usize]) -> RawTensor {
        let pool: Arc<Vec<u8>> = self.pool.clone();
        RawTensor::new("random", shape.to_vec(), DType::BF16, pool, 0).expect("the pool is large enough")
    }

    fn matrices(&mut self, n: usize, k: usize) -> Result<Vec<Matrix>> {
        let copies = (ROTATED / (2 * n * k)).clamp(1, 8);
        let raw = self.raw(&[n, k]);
        (0..copies).map(|_| self.cuda.load_matrix(std::slice::from_ref(&raw))).collect()
    }

    /// Goes on with these kernels, and rows rounded or not; false where the GPU does not have them.
    fn choose(&mut self, kernel: PrefillKernel, rounds: bool) -> bool {
        let fp4 = rounds && self.cuda.has_fp4_products();
        self.cuda.set_prefill_kernel(kernel).is_ok()
            && self.cuda.set_fp8_products(rounds).is_ok()
            && self.cuda.set_fp4_products(fp4).is_ok()
    }

    /// Whether many rows can be rounded for weights of a format.
    fn rounds_for(&self, format: &str) -> bool {
        match format {
            "fp8" => true,
            "mxfp4" | "nvfp4" => self.cuda.has_fp4_products(), // Blackwell
            _ => false,
        }
    }

    /// The same of weights of a format, so many bytes each.
    fn linear_of(
        &mut self,
        format: &str,
        weight_bytes: f64,
        random: fn(&[usize]) -> RawTensor,
    ) -> Result<()> {
        for (name, n, k) in [("gate+up", 28672, 4096), ("down", 4096, 14336)] {
            let raw = random(&[n, k]);
            let copies = (ROTATED / (weight_bytes * (n * k) as f64) as usize).clamp(1, 8);
            let weights: Vec<Matrix> = (0..copies)
                .map(|_| self.cuda.load_matrix(std::slice::from_ref(&raw)))
                .collect::<Result<_>>()?;
            for rows in [1, 8, 16, 17, 64, 256, 511, 512, 4096] {
                for (way, kernel, products) in WAYS {
                    let same = match kernel {
                        PrefillKernel::Wgmma | PrefillKernel::Tcgen05 => !(17..512).contains(&rows),
                        _ => products && (rows <= 16 || !self.rounds_for(format)),
                    };
                    if same || !self.choose(kernel, products) {
                        continue;
                    }
                    let [x, _] = self.rows_for(rows, k, |norm| Cuda::norm_feeds(norm, &weights[0]))?;
                    let mut out = self.cuda.tensor(rows, n)?;
                    let bytes = weight_bytes * (n * k) as f64 + (2 * rows * k + 4 * rows * n) as f64;
                    let operations = 2.0 * (rows * n * k) as f64;
                    let name = format!("linear {format} {name} [{n}, {k}] {rows} rows, {way}");
                    self.time(name, bytes, operations, |cuda, i| {
                        cuda.linear(&x, &weights[i % weights.len()], None, &mut out)
                    })?;
                }
            }
        }
        self.choose(PrefillKernel::Auto, false);
        Ok(())
    }

    /// Normed rows, as matrices read them, and the residual stream that they came from.
    fn rows(&mut self, rows: usize, width: usize) -> Result<[Tensor; 2]> {
        self.rows_for(rows, width, |_| ())
    }

    /// The same after the norm's weight was told what it feeds.
    fn rows_for(&mut self, rows: usize, width: usize, tell: impl FnOnce(&mut Vector)) -> Result<[Tensor; 2]> {
        let table = self.cuda.load_embedding(&self.raw(&[rows, width]))?;
        let mut weight = self.cuda.load_vector(&[self.raw(&[width])])?;
        tell(&mut weight);
        let mut batch = Batch::default();
        let blocks: Vec<u32> = (0..rows.div_ceil(16) as u32).collect();
        batch.push(&(0..rows as u32).collect::<Vec<_>>(), 0, &blocks, 0);
        self.cuda.begin(&batch)?;
        let (mut x, mut out) = (self.cuda.tensor(rows, width)?, self.cuda.tensor(rows, width)?);
        self.cuda.embed(&table, &mut x)?;
        self.cuda.rms_norm(&mut x, None, &weight, 1e-5, &mut out)?;
        self.cuda.synchronize()?;
        Ok([out, x])
    }

    fn linear(&mut self) -> Result<()> {
        let shapes =
            [("qkv", 6144, 4096), ("o", 4096, 4096), ("gate+up", 28672, 4096), ("down", 4096, 14336)];
        for (name, n, k) in shapes.into_iter().chain([("logits", 128_256, 4096)]) {
            let weights = self.matrices(n, k)?;
            for rows in [1, 4, 8, 16, 64, 256, 1024, 4096] {
                if name == "logits" && rows > 256 {
                    continue;
                }
                let [x, _] = self.rows(rows, k)?;
                let mut out = self.cuda.tensor(rows, n)?;
                let bytes = (2 * n * k + 2 * rows * k + 4 * rows * n) as f64;
                let operations = 2.0 * (rows * n * k) as f64;
                let name = format!("linear {name} [{n}, {k}] {rows} rows");
                self.time(name, bytes, operations, |cuda, i| {
                    cuda.linear(&x, &weights[i % weights.len()], None, &mut out)
                })?;
            }
        }
        Ok(())
    }

    fn rowwise(&mut self) -> Result<()> {
        for rows in [1, 64, 4096] {
            let [_, mut x] = self.rows(rows, 4096)?;
            let [_, delta] = self.rows(rows, 4096)?;
            let mut weight = self.cuda.load_vector(&[self.raw(&[4096])])?;
            let mut out = self.cuda.tensor(rows, 4096)?;
            let bytes = (rows * 4096 * 14) as f64;
            self.time(format!("rms_norm 4096, {rows} rows"), bytes, 0.0, |cuda, _| {
                cuda.rms_norm(&mut x, Some(&delta), &weight, 1e-5, &mut out)
            })?;
            let [_, gate_up] = self.rows(rows, 28672)?;
            let mut gated = self.cuda.tensor(rows, 14336)?;
            self.time(format!("silu_mul 14336, {rows} rows"), (rows * 14336 * 10) as f64, 0.0, |cuda, _| {
                cuda.silu_mul(&gate_up, &mut gated)
            })?;
            if rows <= 16 || !self.choose(PrefillKernel::Auto, true) {
                continue;
            }
            Cuda::norm_feeds(&mut weight, &self.cuda.load_matrix(&[random_fp8(&[16, 4096])])?);
            let bytes = (rows * 4096 * 15) as f64;
            self.time(format!("rms_norm 4096 and fp8, {rows} rows"), bytes, 0.0, |cuda, _| {
                cuda.rms_norm(&mut x, Some(&delta), &weight, 1e-5, &mut out)
            })?;
            let bytes = (rows * 14336 * 11) as f64;
            self.time(format!("silu_mul 14336 and fp8, {rows} rows"), bytes, 0.0, |cuda, _| {
                cuda.silu_mul(&gate_up, &mut gated)
            })?;
            self.choose(PrefillKernel::Auto, false);
        }
        Ok(())
    }

    fn attention(&mut self) -> Result<()> {
        let rope = Rope { inv_freq: vec![0.1; 64], pairing: RopePairing::Halves };
        self.cuda.load_rope(&rope, 131_072)?;
        let width = LLAMA.qkv_width();
        let token = (LLAMA.kv_heads * LLAMA.head_dim * 4) as f64;
        for (sequences, context) in [(1usize, 8000usize), (1, 100_000), (16, 8000), (64, 8000), (256, 1000)] {
            let blocks = context.div_ceil(16);
            let cache = self.cuda.kv_cache(1, &LLAMA, sequences * blocks)?;
            let [_, qkv] = self.rows(sequences, width)?;
            let mut out = self.cuda.tensor(sequences, LLAMA.out_width())?;
            let mut batch = Batch::default();
            for s in 0..sequences {
                let table: Vec<u32> = (0..blocks as u32).map(|b| b * sequences as u32 + s as u32).collect();
                batch.push(&[0], context - 1, &table, 0);
            }
            self.cuda.begin(&batch)?;
            let read = (sequences * context) as f64;
            let operations = 4.0 * read * LLAMA.out_width() as f64;
            let name = format!("decode attention, {sequences} x {context}");
            self.time(name, read * token, operations, |cuda, _| {
                cuda.attention(&qkv, &LLAMA, Default::default(), 0, &cache, &mut out)
            })?;
        }
        for (new, context) in [(2000usize, 2000usize), (8000, 8000), (2000, 32_000)] {
            let blocks = context.div_ceil(16);
            let mut cache = self.cuda.kv_cache(1, &LLAMA, blocks)?;
            let [_, mut qkv] = self.rows(new, width)?;
            let mut out = self.cuda.tensor(new, LLAMA.out_width())?;
            let mut batch = Batch::default();
            batch.push(&vec![0; new], context - new, &(0..blocks as u32).collect::<Vec<_>>(), 0);
            self.cuda.begin(&batch)?;
            let pairs = (new * context - new * (new - 1) / 2) as f64;
            let operations = 4.0 * pairs * LLAMA.out_width() as f64;
            for kernel in [PrefillKernel::Mma, PrefillKernel::Wgmma, PrefillKernel::Tcgen05] {
                if self.cuda.set_prefill_kernel(kernel).is_err() {
                    continue;
                }
                self.cuda.begin(&batch)?;
                let name = format!("prefill attention, {new} of {context}, {kernel:?}");
                self.time(name, context as f64 * token, operations, |cuda, _| {
                    cuda.attention(&qkv, &LLAMA, Default::default(), 0, &cache, &mut out)
                })?;
            }
            self.cuda.set_prefill_kernel(PrefillKernel::Auto)?;
            self.cuda.begin(&batch)?;
            let bytes = (new * (width * 8 + 2 * LLAMA.kv_heads * LLAMA.head_dim * 2)) as f64;
            self.time(format!("rope and cache, {new} rows"), bytes, 0.0, |cuda, _| {
                cuda.rope_and_cache(&mut qkv, &LLAMA, None, 0, &mut cache)
            })?;
        }
        Ok(())
    }

    /// Sequences that begin alike, and one with drafted tokens: each row by itself, and what they share once.
    fn shared_prefixes(&mut self) -> Result<()> {
        let token = (LLAMA.kv_heads * LLAMA.head_dim * 4) as f64;
        for (sequences, rows, context, shared) in [
            (16usize, 1usize, 16_000usize, 8000usize),
            (64, 1, 8000, 6144),
            (64, 1, 40_000, 8000),
            (1, 8, 32_000, 0),
        ] {
            let (own, shared) = ((context - shared).div_ceil(16) as u32, shared as u32 / 16);
            let cache = self.cuda.kv_cache(1, &LLAMA, shared as usize + sequences * own as usize)?;
            let [_, qkv] = self.rows(sequences * rows, LLAMA.qkv_width())?;
            let mut out = self.cuda.tensor(sequences * rows, LLAMA.out_width())?;
            let mut batch = Batch::default();
            for s in 0..sequences as u32 {
                let table: Vec<u32> = (0..shared).chain(shared + s * own..shared + (s + 1) * own).collect();
                batch.push(&vec![0; rows], 16 * table.len() - rows, &table, rows);
            }
            let read = 16.0 * f64::from(shared + sequences as u32 * own);
            let operations = 4.0 * (sequences * rows * context * LLAMA.out_width()) as f64;
            for when in [SharedPrefixes::Never, SharedPrefixes::Always] {
                self.cuda.set_shared_prefixes(when);
                self.cuda.begin(&batch)?;
                let name = format!(
                    "shared {shared}, {sequences} x {rows} of {context}, {when:?}",
                    shared = 16 * shared
                );
                self.time(name, read * token, operations, |cuda, _| {
                    cuda.attention(&qkv, &LLAMA, Default::default(), 0, &cache, &mut out)
                })?;
            }
        }
        self.cuda.set_shared_prefixes(SharedPrefixes::Auto);
        Ok(())
    }

    /// A layer of Qwen3-30B-A3B, 8 of 128 experts, 2048 to 768, in every format that has a way of its own.
    fn moe(&mut self) -> Result<()> {
        let (hidden, inner) = (2048, 768);
        let shapes = [[inner, hidden], [hidden, inner]];
        self.moe_of("bf16", 2.0, shapes.map(|shape| self.raw(&shape)))?;
        self.moe_of("fp8", 1.03, shapes.map(|shape| random_fp8(&shape)))?;
        self.moe_of("mxfp4", 0.53, shapes.map(|shape| random_mxfp4(&shape)))?;
        self.moe_of("nvfp4", 0.5625, shapes.map(|shape| random_nvfp4(&shape)))
    }

    /// The same of weights `[up, down]`, so many bytes each.
    fn moe_of(&mut self, format: &str, weight_bytes: f64, [up, down]: [RawTensor; 2]) -> Result<()> {
        let (experts, top_k, hidden, inner) = (128, 8, up.shape[1], up.shape[0]);
        let (up, down) = (vec![up; experts], vec![down; experts]);
        let weights = self.cuda.load_experts(&ExpertWeights::plain(&up, &up, &down))?;
        let rounds = self.rounds_for(format);
        for rows in [1, 4, 8, 16, 64, 256, 4096] {
            let logits: Vec<f32> = (0..rows * experts).map(|i| (i * 7919 % 1009) as f32 / 300.0).collect();
            let table =
                self.cuda.load_embedding(&RawTensor::from_f32("logits", vec![rows, experts], &logits))?;
            let one = 3 * hidden * inner;
            // Of experts drawn evenly, those that somebody drew.
            let read = experts as f64 * (1.0 - (1.0 - top_k as f64 / experts as f64).powi(rows as i32));
            let (bytes, operations) = (weight_bytes * read * one as f64, 2.0 * (rows * top_k * one) as f64);
            for (way, kernel, products) in WAYS {
                if (products && (!rounds || rows <= 16)) || !self.choose(kernel, products) {
                    continue;
                }
                let [x, _] = self.rows_for(rows, hidden, |norm| Cuda::norm_feeds_experts(norm, &weights))?;
                let (mut router, mut out) =
                    (self.cuda.tensor(rows, experts)?, self.cuda.tensor(rows, hidden)?);
                self.cuda.embed(&table, &mut router)?;
                self.time(
                    format!("moe {format} 8 of 128, {rows} rows, {way}"),
                    bytes,
                    operations,
                    |cuda, _| cuda.moe(&x, &router, &weights, top_k, true, &mut out),
                )?;
            }
            self.choose(PrefillKernel::Auto, false);
        }
        Ok(())
    }

    fn sample(&mut self) -> Result<()> {
        let vocab = 151_936;
        let greedy = SamplingParams { temperature: 0.0, ..Default::default() };
        let filtered = SamplingParams { top_p: 0.9, top_k: 50, ..Default::default() };
        for (name, params) in [("greedy", &greedy), ("top-p and top-k", &filtered)] {
            for rows in [1, 64] {
                let [_, mut logits] = self.rows(rows, vocab)?;
                let row =
                    SampleRow { params, counts: None, drafted: &[], position: 1, mask: None, forced: None };
                let (all, mut out) = (vec![row; rows], Vec::new());
                self.time(
                    format!("sample {name}, {rows} rows"),
                    (rows * vocab * 4) as f64,
                    0.0,
                    |cuda, _| cuda.sample(&mut logits, &all, &mut out),
                )?;
            }
        }
        Ok(())
    }

    fn json(&self) -> String {
        let line = |l: &Line| {
            let Line { name, seconds, bytes, operations } = l;
            format!(
                "  {{\"name\": {name:?}, \"seconds\": {seconds:e}, \"bytes\": {bytes:e}, \"operations\": {operations:e}}}"
            )
        };
        format!("[\n{}\n]\n", self.lines.iter().map(line).collect::<Vec<_>>().join(",\n"))
    }
}

/// FP8 below 2, with a scale for 128 weights.
fn random_fp8(shape: &[usize]) -> RawTensor {
    let block = |i: usize| {
        let scale = 2f32.powi(-8 - (i / 2 % 3) as i32).to_le_bytes();
        scale.into_iter().chain((0..64).map(move |j| (i * 31 + j * 7) as u8 & 0xbf))
    };
    let bytes = (0..shape.iter().product::<usize>() / 64).flat_map(block).collect::<Vec<u8>>();
    RawTensor::new("random", shape.to_vec(), DType::F8_E4M3, Arc::new(bytes), 0).expect("whole blocks")
}

/// MXFP4 below 0.02.
fn random_mxfp4(shape: &[usize]) -> RawTensor {
    let block = |i: usize| [118].into_iter().chain((0..16).map(move |j| (i * 31 + j * 7) as u8));
    let bytes = (0..shape.iter().product::<usize>() / 32).flat_map(block).collect::<Vec<u8>>();
    RawTensor::new("random", shape.to_vec(), DType::MXFP4, Arc::new(bytes), 0).expect("whole blocks")
}

/// NVFP4 below 0.02.
fn random_nvfp4(shape: &[usize]) -> RawTensor {
    let block = |i: usize| {
        let factor = 2f32.powi(-9).to_le_bytes();
        factor.into_iter().chain([0x38; 4]).chain((0..32).map(move |j| (i * 31 + j * 7) as u8))
    };
    let bytes = (0..shape.iter().product::<usize>() / 64).flat_map(block).collect::<Vec<u8>>();
    RawTensor::new("random", shape.to_vec(), DType::NVFP4, Arc::new(bytes), 0).expect("whole blocks")
}

/// The value after `flag` on the command line.
fn option(flag: &str) -> Option<String> {
    std::env::args().skip_while(|arg| arg != flag).nth(1)
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let cuda = match Cuda::new(0) {
        Ok(cuda) => cuda,
        Err(reason) => {
            println!("skipped: {reason}");
            return Ok(());
        }
    };
    let ceiling = |flag: &str, otherwise: f64| {
        option(flag).map_or(Ok(otherwise), |text| text.parse::<f64>().map(|x| x * 1e12))
    };
    let ceilings = [ceiling("--bandwidth", BANDWIDTH)?, ceiling("--arithmetic", ARITHMETIC)?];
    // Four bf16 of either sign between 2^-11 and 2^-7 at a time.
    let pool: Vec<u8> = (0..150_000_000u64)
        .flat_map(|i| {
            let z = i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            ((z ^ (z >> 31)) & 0x81ff_81ff_81ff_81ff | 0x3a00_3a00_3a00_3a00).to_le_bytes()
        })
        .collect();
    let mut bench = Bench { cuda, pool: Arc::new(pool), lines: Vec::new(), ceilings };
    println!("{:<44} {:>10} {:>8} {:>8} {:>8} {:>8}", "op", "us", "GB/s", "TFLOP/s", "memory", "matrix");
    bench.rowwise()?;
    bench.linear()?;
    bench.linear_of("fp8", 1.0 + 1.0 / 32.0, random_fp8)?;
    bench.linear_of("nvfp4", 0.5625, random_nvfp4)?;
    bench.attention()?;
    bench.shared_prefixes()?;
    bench.moe()?;
    bench.sample()?;
    if let Some(path) = option("--json") {
        std::fs::write(path, bench.json())?;
    }
    Ok(())
}
