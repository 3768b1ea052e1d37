//! Multiplication with packed weights in the shapes of Qwen2.5-Coder-0.5B: one row (decode, bounded by
//! memory: GB/s of packed weights read), eight rows, and 512 rows (prefill, bounded by arithmetic:
//! GOP/s, a multiply-add counting as two).
//!
//! `THREADS=2 cargo bench -p rudder-ops --bench matmul`

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rudder_ops::cpu::matmul::{PackedMatrix, Scratch, matmul};
use rudder_ops::cpu::pool::Pool;
use rudder_ops::{DType, RawTensor};
use std::sync::Arc;
use std::time::Duration;

/// Outputs, inputs, formats.
const SHAPES: [(usize, usize, &[DType]); 5] = [
    (896, 896, &[DType::Q5_0, DType::Q8_0, DType::BF16]),
    (4864, 896, &[DType::Q5_0, DType::BF16]),
    (896, 4864, &[DType::Q4_K, DType::Q6_K, DType::Q5_0, DType::BF16]),
    (151_936, 896, &[DType::Q8_0, DType::BF16]),
    (8960, 1536, &[DType::Q4_K, DType::Q6_K, DType::Q4_0]),
];

/// More weights than caches hold, so that one row reads memory as a decode step does.
const WORKING_SET: usize = 400 << 20;

fn weights(dtype: DType, outputs: usize, inputs: usize) -> RawTensor {
    let length = dtype.bytes(outputs * inputs).expect("whole blocks");
    let bytes: Vec<u8> = match dtype {
        // Numbers as a trained matrix has them, for how they are packed depends on them.
        DType::BF16 => (0..length / 2).flat_map(|i| half::bf16::from_f32(normal(i)).to_le_bytes()).collect(),
        // Any bytes will do, with small exponents where a format has halves.
        _ => (0..length).map(|i| (i * 37 % 61) as u8).collect(),
    };
    RawTensor::new("w", vec![outputs, inputs], dtype, Arc::new(bytes), 0).expect("shape fits")
}

/// About normal numbers from a counter: four uniform ones added up.
fn normal(i: usize) -> f32 {
    let bits = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let bits = (bits ^ bits >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let uniform = |part: u32| (bits >> (16 * part) & 0xffff) as f32 / 65_536.0 - 0.5;
    0.03 * (uniform(0) + uniform(1) + uniform(2) + uniform(3))
}

fn bench(c: &mut Criterion) {
    let threads = std::env::var("THREADS").ok().and_then(|v| v.parse().ok()).unwrap_or(2);
    let pool = Pool::new(threads);
    let mut scratch = Scratch::new(512, 4864);
    for (outputs, inputs, dtypes) in SHAPES {
        for &dtype in dtypes {
            let raw = weights(dtype, outputs, inputs);
            let pack = || PackedMatrix::pack(&pool, std::slice::from_ref(&raw)).expect("packs");
            let mut group = c.benchmark_group(format!("pack {dtype:?} {outputs}x{inputs}"));
            group
                .sample_size(10)
                .warm_up_time(Duration::from_millis(200))
                .measurement_time(Duration::from_secs(1));
            group.throughput(Throughput::Bytes(raw.bytes().len() as u64));
            group.bench_function("pack", |b| b.iter(pack));
            group.finish();
            let first = pack();
            let copies = (WORKING_SET / first.bytes()).clamp(1, 400);
            let matrices: Vec<PackedMatrix> =
                std::iter::once(first).chain((1..copies).map(|_| pack())).collect();
            let mut group = c.benchmark_group(format!("{dtype:?} {outputs}x{inputs}"));
            group
                .sample_size(10)
                .warm_up_time(Duration::from_millis(200))
                .measurement_time(Duration::from_secs(1));
            for rows in [1, 8, 512] {
                if rows == 512 && outputs > 10_000 {
                    continue; // logits of a prefill are of its last row
                }
                let x: Vec<f32> = (0..rows * inputs).map(|i| (i % 127) as f32 - 60.0).collect();
                let mut out = vec![0.0; rows * outputs];
                let mut next = matrices.iter().cycle();
                group.throughput(match rows {
                    512 => Throughput::Elements(2 * (rows * outputs * inputs) as u64),
                    _ => Throughput::Bytes(matrices[0].bytes() as u64),
                });
                group.bench_function(BenchmarkId::from_parameter(rows), |b| {
                    b.iter(|| {
                        let matrix = next.next().expect("never ends");
                        matmul(&pool, &mut scratch, x[..].into(), rows, matrix, None, &mut out);
                    });
                });
            }
            group.finish();
        }
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
