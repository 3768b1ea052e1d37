//! Random weights: a model of any size from its configuration alone, to measure how fast it is, not what it says.

use std::sync::Arc;

use rudder_ops::{DType, RawTensor, fp8, int4, mxfp4, nvfp4};

use crate::ModelConfig;
use crate::arch::Architecture;

/// Configurations that are compiled in, as their checkpoints' config.json has them.
const PRESETS: [(&str, &str); 5] = [
    ("llama-3.1-8b", include_str!("../presets/llama-3.1-8b.json")),
    ("qwen3-8b", include_str!("../presets/qwen3-8b.json")),
    ("qwen3-coder-30b-a3b", include_str!("../presets/qwen3-coder-30b-a3b.json")),
    ("gpt-oss-20b", include_str!("../presets/gpt-oss-20b.json")),
    ("tiny", include_str!("../presets/tiny.json")),
];
/// Tensors begin at different places in their pool, so far apart at most.
const SHIFT: usize = 1 << 16;

/// What makes of a preset's name that of the same model with FP8 projections.
const FP8: &str = "-fp8";
const FP8_FIELDS: &str =
    r#"{"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},"#;

/// The config.json of a preset.
pub(crate) fn preset(name: &str) -> Option<String> {
    let find = |name: &str| PRESETS.iter().find(|(preset, _)| *preset == name).map(|(_, json)| *json);
    match name.strip_suffix(FP8) {
        None => find(name).map(str::to_owned),
        // What is quantised already has no such form.
        Some(plain) => find(plain)
            .filter(|json| !json.contains("quantization_config"))
            .map(|json| json.replacen('{', FP8_FIELDS, 1)),
    }
}

/// The presets' names.
pub(crate) fn preset_names() -> String {
    let with_fp8 = |name: &str| format!("{name}{FP8}");
    let names = PRESETS.iter().flat_map(|(name, _)| [(*name).to_owned(), with_fp8(name)]);
    names.filter(|name| preset(name).is_some()).collect::<Vec<_>>().join(", ")
}

/// Tensors of random bf16 that lie over each other in one pool, as large as the largest of them; matrices in a narrower format
/// in another where the configuration says so.
pub(crate) struct Dummy {
    pool: Arc<Vec<u8>>,
    quantised: Option<(DType, Arc<Vec<u8>>)>,
    ones: Arc<Vec<u8>>,
    bytes: u64,
    tied: bool,
}

impl Dummy {
    pub fn new(config: &ModelConfig, arch: &Architecture, tied: bool, quantised: Option<DType>) -> Self {
        let q = config.attention.out_width();
        let inner = config.moe.map_or(config.intermediate, |moe| moe.intermediate);
        let widest = config.hidden.max(q).max(config.attention.qkv_width());
        let largest_inner = config.hidden * inner.max(config.attention.qkv_width());
        let largest = largest_inner.max(config.hidden * config.vocab);
        let [experts, projections, others] = parameters(config, arch, tied);
        let (narrow, plain) = match quantised {
            None => (0, experts + projections + others),
            Some(DType::MXFP4) => (experts, projections + others),
            Some(_) => (experts + projections, others),
        };
        let narrow = quantised.map_or(0, |dtype| narrow / dtype.block_len() * dtype.block_bytes());
        let pool_of = |dtype: DType| {
            let blocks = largest_inner.div_ceil(dtype.block_len()) + SHIFT;
            Arc::new(match dtype {
                DType::MXFP4 => random_mxfp4(blocks),
                DType::INT4 => random_int4(blocks),
                DType::NVFP4 => random_nvfp4(blocks),
                _ => random_fp8(blocks),
            })
        };
        Self {
            pool: Arc::new(random(2 * (largest + SHIFT))),
            ones: Arc::new(0x3f80u16.to_le_bytes().repeat(widest)),
            bytes: (narrow + 2 * plain) as u64,
            quantised: quantised.map(|dtype| (dtype, pool_of(dtype))),
            tied,
        }
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn contains(&self, name: &str) -> bool {
        !(self.tied && name == "lm_head.weight")
    }

    /// A tensor of this name: norms are ones, all else is small.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Option<RawTensor> {
        let hash = name.bytes().fold(0usize, |hash, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
        if let (Some((dtype, pool)), &[_, width]) = (&self.quantised, shape) {
            let meant = match dtype {
                DType::MXFP4 => name.contains(".experts."),
                _ => name.ends_with("_proj.weight"),
            };
            if meant && width.is_multiple_of(dtype.block_len()) {
                let start = dtype.block_bytes() * (hash % SHIFT);
                return RawTensor::new(name, shape.to_vec(), *dtype, pool.clone(), start);
            }
        }
        let norm = shape.len() == 1 && name.contains("norm");
        let pool = if norm { self.ones.clone() } else { self.pool.clone() };
        let start = if norm { 0 } else { 2 * (hash % SHIFT) };
        RawTensor::new(name, shape.to_vec(), DType::BF16, pool, start)
    }
}

/// The next of a sequence of random numbers.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z ^ (z >> 31)
}

/// So many blocks of random codes, all scaled by 2^-9.
fn random_mxfp4(blocks: usize) -> Vec<u8> {
    let mut state = 0;
    let mut pool = Vec::with_capacity(blocks * mxfp4::BLOCK_BYTES);
    for _ in 0..blocks {
        pool.push(127 - 9);
        pool.extend_from_slice(&next(&mut state).to_le_bytes());
        pool.extend_from_slice(&next(&mut state).to_le_bytes());
    }
    pool
}

/// So many blocks of random numbers below 2 of either sign, all scaled by 2^-8.
fn random_fp8(blocks: usize) -> Vec<u8> {
    let mut state = 0;
    let mut pool = Vec::with_capacity(blocks * fp8::BLOCK_BYTES);
    for _ in 0..blocks {
        pool.extend_from_slice(&2f32.powi(-8).to_le_bytes());
        for _ in 0..fp8::BLOCK_LEN / 8 {
            pool.extend_from_slice(&(next(&mut state) & 0xbfbf_bfbf_bfbf_bfbf).to_le_bytes());
        }
    }
    pool
}

/// So many blocks of random codes around a zero point of 8, all scaled by 2^-11.
fn random_int4(blocks: usize) -> Vec<u8> {
    let mut state = 0;
    let mut pool = Vec::with_capacity(blocks * int4::BLOCK_BYTES);
    for _ in 0..blocks {
        pool.extend_from_slice(&int4::word(2f32.powi(-11), 8));
        (0..int4::BLOCK_LEN / 16).for_each(|_| pool.extend_from_slice(&next(&mut state).to_le_bytes()));
    }
    pool
}

/// So many blocks of random codes, all scaled by 2^-9.
fn random_nvfp4(blocks: usize) -> Vec<u8> {
    let mut state = 0;
    let mut pool = Vec::with_capacity(blocks * nvfp4::BLOCK_BYTES);
    for _ in 0..blocks {
        pool.extend_from_slice(&2f32.powi(-9).to_le_bytes());
        pool.extend_from_slice(&[0x38; nvfp4::BLOCK_LEN / nvfp4::GROUP]); // 1
        (0..nvfp4::BLOCK_LEN / 16).for_each(|_| pool.extend_from_slice(&next(&mut state).to_le_bytes()));
    }
    pool
}

/// `bytes` of random bf16 of either sign between 2^-11 and 2^-7, so that rows of a few thousand keep sums about 1.
fn random(bytes: usize) -> Vec<u8> {
    let mut state = 0u64;
    let mut pool = Vec::with_capacity(bytes.next_multiple_of(8));
    while pool.len() < bytes {
        // Of each 16 bits the sign, the exponent's lowest two and the mantissa are random; 116 is 2^-11.
        let numbers = next(&mut state) & 0x81ff_81ff_81ff_81ff | 0x3a00_3a00_3a00_3a00;
        pool.extend_from_slice(&numbers.to_le_bytes());
    }
    pool
}

/// Numbers in all experts' matrices, in all other projections, and in the rest of the weights.
fn parameters(config: &ModelConfig, arch: &Architecture, tied: bool) -> [usize; 3] {
    let (hidden, vocab, attention) = (config.hidden, config.vocab, &config.attention);
    let when = |holds: bool, numbers: usize| if holds { numbers } else { 0 };
    let (experts, mlp, rest) = match &config.moe {
        Some(moe) => {
            let biases = moe.experts * (1 + 2 * moe.intermediate + hidden);
            let experts = 3 * moe.experts * hidden * moe.intermediate;
            (experts, 0, hidden * moe.experts + when(arch.expert_biases, biases))
        }
        None => (0, 3 * hidden * config.intermediate, 0),
    };
    let qkv = attention.qkv_width();
    let bias = when(arch.qkv_bias, qkv) + when(arch.output_bias, hidden) + when(arch.sinks, attention.heads);
    let norms = 2 * hidden + when(arch.qk_norm, 2 * attention.head_dim);
    let projections = hidden * (qkv + attention.out_width()) + mlp;
    let tables = if tied { 1 } else { 2 };
    let others = tables * vocab * hidden + hidden + config.layers * (bias + norms + rest);
    [config.layers * experts, config.layers * projections, others]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hf_config;

    fn config(name: &str) -> (ModelConfig, &'static Architecture) {
        let parsed = hf_config::parse(preset(name).unwrap().as_bytes()).unwrap();
        (parsed.config, parsed.arch)
    }

    #[test]
    fn presets_are_as_large_as_their_names_say() {
        // The parameters that the models' cards state.
        let stated = [
            ("llama-3.1-8b", 8.03),
            ("qwen3-8b", 8.19),
            ("qwen3-coder-30b-a3b", 30.53),
            ("gpt-oss-20b", 20.91),
            ("llama-3.1-8b-fp8", 8.03),
        ];
        for (name, billions) in stated {
            let (config, arch) = config(name);
            let found = parameters(&config, arch, false).iter().sum::<usize>() as f64 / 1e9;
            assert!((found - billions).abs() < 0.005, "{name}: {found}");
        }
        assert!(preset("gpt-2").is_none() && preset("gpt-oss-20b-fp8").is_none());
    }

    #[test]
    fn random_numbers_are_small_of_either_sign_and_differ() {
        let bytes = random(4096);
        let numbers: Vec<f32> = bytes
            .chunks_exact(2)
            .map(|b| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16))
            .collect();
        assert!(numbers.iter().all(|x| (2f32.powi(-11)..2f32.powi(-7)).contains(&x.abs())));
        let sum: f32 = numbers.iter().sum();
        assert!(sum.abs() < 0.1 * numbers.iter().map(|x| x.abs()).sum::<f32>());
        assert!(numbers.windows(2).filter(|w| w[0] == w[1]).count() < 100);
    }
}
