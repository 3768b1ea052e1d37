//! What this machine can do at most, beside which the other benches' figures are read: bytes read from memory,
//! and multiply-adds in registers (counting as two) in f32, bf16 and int8.
//!
//! `THREADS=2 cargo bench -p rudder-ops --bench ceilings`

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rudder_ops::cpu::pool::Pool;
use std::hint::black_box;
use std::time::Duration;

/// More than caches hold.
const BYTES: usize = 1 << 30;
/// Bytes that one call of a reader takes.
const CHUNK: usize = 1 << 20;
/// Instructions in a loop body, enough to cover their latency.
#[cfg(target_arch = "x86_64")]
const CHAINS: usize = 16;
/// Loop bodies a call.
const ROUNDS: u64 = 1 << 16;

fn threads() -> usize {
    std::env::var("THREADS").ok().and_then(|v| v.parse().ok()).unwrap_or(2)
}

fn memory(c: &mut Criterion) {
    let pool = Pool::new(threads());
    let data: Vec<u64> = (0..BYTES as u64 / 8).collect();
    let mut group = c.benchmark_group("ceiling");
    group
        .sample_size(10)
        .measurement_time(Duration::from_secs(2))
        .throughput(Throughput::Bytes(BYTES as u64));
    group.bench_function("memory read", |b| {
        b.iter(|| {
            pool.run(BYTES / CHUNK, |chunk| {
                black_box(or_all(&data[chunk * CHUNK / 8..(chunk + 1) * CHUNK / 8]));
            });
        });
    });
    group.finish();
}

/// Reads everything; the bits of all words.
fn or_all(words: &[u64]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the feature was just detected.
        return unsafe { x86::or_all(words) };
    }
    words.iter().fold(0, |all, word| all | word)
}

/// Runs so many loop bodies.
#[cfg(target_arch = "x86_64")]
type Loop = unsafe fn(u64) -> f32;

#[cfg(target_arch = "x86_64")]
fn arithmetic(c: &mut Criterion) {
    let pool = Pool::new(threads());
    let mut group = c.benchmark_group("ceiling");
    group.sample_size(10).measurement_time(Duration::from_secs(1));
    // Name, whether this CPU has it, the loop, operations of one instruction.
    let kinds: [(&str, bool, Loop, u64); 3] = [
        ("f32 vfmadd", is_x86_feature_detected!("avx512f"), x86::fma, 32),
        ("bf16 vdpbf16ps", is_x86_feature_detected!("avx512bf16"), x86::bf16, 64),
        ("int8 vpdpbusd", is_x86_feature_detected!("avx512vnni"), x86::int8, 128),
    ];
    for (name, has, run, operations) in kinds {
        if has {
            let all = operations * CHAINS as u64 * ROUNDS * pool.threads() as u64;
            group.throughput(Throughput::Elements(all));
            group.bench_function(name, |b| {
                b.iter(|| {
                    pool.run(pool.threads(), |_| {
                        // SAFETY: the feature was detected above.
                        black_box(unsafe { run(ROUNDS) });
                    });
                });
            });
        }
    }
    group.finish();
}

#[cfg(not(target_arch = "x86_64"))]
fn arithmetic(_: &mut Criterion) {}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::CHAINS;
    use std::arch::x86_64::*;
    use std::hint::black_box;

    #[target_feature(enable = "avx512f")]
    pub fn or_all(words: &[u64]) -> u64 {
        let mut all = [_mm512_setzero_si512(); 4];
        for chunk in words.chunks_exact(32) {
            for (i, all) in all.iter_mut().enumerate() {
                // SAFETY: the chunk holds four vectors.
                let vector = unsafe { _mm512_loadu_si512(chunk.as_ptr().add(8 * i).cast()) };
                *all = _mm512_or_si512(*all, vector);
            }
        }
        let all = _mm512_or_si512(_mm512_or_si512(all[0], all[1]), _mm512_or_si512(all[2], all[3]));
        _mm512_reduce_or_epi64(all) as u64
    }

    #[target_feature(enable = "avx512f")]
    pub fn fma(rounds: u64) -> f32 {
        let (a, b) = (_mm512_set1_ps(black_box(1.5)), _mm512_set1_ps(black_box(0.5)));
        let mut sums = [_mm512_setzero_ps(); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(a, b, *sum);
            }
        }
        total(sums)
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub fn bf16(rounds: u64) -> f32 {
        let ones = _mm512_set1_ps(black_box(1.0));
        let a = _mm512_cvtne2ps_pbh(ones, ones);
        let mut sums = [_mm512_setzero_ps(); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, a, a);
            }
        }
        total(sums)
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub fn int8(rounds: u64) -> f32 {
        let a = _mm512_set1_epi8(black_box(3));
        let mut sums = [_mm512_setzero_si512(); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, a, a);
            }
        }
        sums.into_iter().map(|sum| _mm512_reduce_add_epi32(sum) as f32).sum()
    }

    #[target_feature(enable = "avx512f")]
    fn total(sums: [__m512; CHAINS]) -> f32 {
        sums.into_iter().map(|sum| _mm512_reduce_add_ps(sum)).sum()
    }
}

criterion_group!(benches, memory, arithmetic);
criterion_main!(benches);
