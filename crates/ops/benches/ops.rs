//! The ops beside multiplication, in the shapes of Qwen2.5-Coder-0.5B: one row of a decode step and 512 rows of a
//! prefill. Norm, activation and rope are bounded by bytes (of f32 read and written, in caches); attention of a
//! decode step by the bytes of keys and values, of a prefill by arithmetic.
//!
//! `THREADS=2 cargo bench -p rudder-ops --bench ops`

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rudder_ops::cpu::{Cpu, KvDType};
use rudder_ops::{AttentionShape, BLOCK_SIZE, Backend, Batch, RawTensor, Rope, RopePairing};
use std::time::Duration;

const HIDDEN: usize = 896;
const INTERMEDIATE: usize = 4864;
const SHAPE: AttentionShape = AttentionShape { heads: 14, kv_heads: 2, head_dim: 64, scale: 0.125 };
const ROWS: [usize; 2] = [1, 512];

fn backend(kv_dtype: KvDType) -> Cpu {
    let threads = std::env::var("THREADS").ok().and_then(|v| v.parse().ok()).unwrap_or(2);
    Cpu::new(threads, kv_dtype)
}

/// A tensor of `rows` rows, by way of an embedding of as many tokens.
fn filled(cpu: &mut Cpu, rows: usize, width: usize) -> <Cpu as Backend>::Tensor {
    let data: Vec<f32> = (0..64 * width).map(|i| (i * 37 % 101) as f32 * 0.02 - 1.0).collect();
    let table = cpu.load_embedding(&RawTensor::from_f32("table", vec![64, width], &data)).expect("a table");
    let mut out = cpu.tensor(rows, width).expect("room");
    cpu.begin(&batch(rows, 0)).expect("a batch");
    cpu.embed(&table, &mut out).expect("embeds");
    out
}

/// `rows` new tokens of one sequence after `cached` ones.
fn batch(rows: usize, cached: usize) -> Batch {
    let blocks: Vec<u32> = (0..(rows + cached).div_ceil(BLOCK_SIZE) as u32).collect();
    let tokens: Vec<u32> = (0..rows as u32).map(|token| token % 64).collect();
    let mut batch = Batch::default();
    batch.push(&tokens, cached, &blocks, 1);
    batch
}

fn elementwise(c: &mut Criterion) {
    let mut cpu = backend(KvDType::F16);
    let mut group = c.benchmark_group("ops");
    group.sample_size(20).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_secs(1));
    for rows in ROWS {
        let (mut x, delta) = (filled(&mut cpu, rows, HIDDEN), filled(&mut cpu, rows, HIDDEN));
        let mut out = cpu.tensor(rows, HIDDEN).expect("room");
        let weight = vec![1.0; HIDDEN];
        group.throughput(Throughput::Bytes((4 * 4 * rows * HIDDEN) as u64));
        group.bench_function(BenchmarkId::new("rms_norm", rows), |b| {
            b.iter(|| cpu.rms_norm(&mut x, Some(&delta), &weight, 1e-6, &mut out));
        });
        let gate_up = filled(&mut cpu, rows, 2 * INTERMEDIATE);
        let mut out = cpu.tensor(rows, INTERMEDIATE).expect("room");
        group.throughput(Throughput::Bytes((3 * 4 * rows * INTERMEDIATE) as u64));
        group.bench_function(BenchmarkId::new("silu_mul", rows), |b| {
            b.iter(|| cpu.silu_mul(&gate_up, &mut out));
        });
    }
    group.finish();
}

fn attention(c: &mut Criterion) {
    attention_in(c, "attention", KvDType::F16);
    attention_in(c, "attention bf16", KvDType::BF16);
}

fn attention_in(c: &mut Criterion, name: &str, kv_dtype: KvDType) {
    let mut cpu = backend(kv_dtype);
    let inv_freq = (0..SHAPE.head_dim / 2).map(|i| 1e6f32.powf(-2.0 * i as f32 / SHAPE.head_dim as f32));
    let rope = Rope { inv_freq: inv_freq.collect(), pairing: RopePairing::Halves };
    cpu.load_rope(&rope, 1 << 15).expect("rope");
    let mut group = c.benchmark_group("ops");
    group.sample_size(20).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_secs(1));
    let width = SHAPE.qkv_width();
    for (rows, cached) in [(1usize, 2000), (1, 8000), (512, 0), (512, 1488)] {
        // As many layers as the model has, so that a decode step's keys do not stay in caches.
        let layers = 24;
        let mut cache = cpu.kv_cache(layers, &SHAPE, (rows + cached).div_ceil(BLOCK_SIZE)).expect("room");
        let mut qkv = filled(&mut cpu, rows, width);
        let mut out = cpu.tensor(rows, SHAPE.out_width()).expect("room");
        cpu.begin(&batch(rows, cached)).expect("a batch");
        let mut layer = (0..layers).cycle();
        let mut next = || layer.next().expect("never ends");
        let pairs: usize = (cached + 1..=cached + rows).sum();
        group.throughput(match rows {
            1 => Throughput::Bytes((pairs * 2 * SHAPE.kv_heads * SHAPE.head_dim * 2) as u64),
            _ => Throughput::Elements((pairs * 4 * SHAPE.out_width()) as u64),
        });
        group.bench_function(BenchmarkId::new(name, format!("{rows} at {cached}")), |b| {
            b.iter(|| cpu.attention(&qkv, &SHAPE, Default::default(), next(), &cache, &mut out));
        });
        if kv_dtype == KvDType::F16 && (cached == 0 || cached == 2000) {
            group.throughput(Throughput::Bytes((8 * rows * width) as u64));
            group.bench_function(BenchmarkId::new("rope_and_cache", rows), |b| {
                b.iter(|| cpu.rope_and_cache(&mut qkv, &SHAPE, None, next(), &mut cache));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, elementwise, attention);
criterion_main!(benches);
