//! Fixtures and a small GGUF writer.
#![allow(dead_code)] // each test binary uses its part

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};

/// All fixtures of make_fixtures.py.
pub const FIXTURES: [&str; 8] =
    ["llama", "llama3-rope", "qwen2", "qwen3", "qwen3moe", "qwen3moe-raw-weights", "gptoss", "gptoss-mxfp4"];

/// A Hugging Face folder with expected logits.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// What transformers computed for a fixture.
pub struct Expected {
    /// `[sequences][length]`.
    pub ids: Vec<Vec<u32>>,
    /// `[sequences][length][vocab]`, flat.
    pub logits: Vec<Vec<f32>>,
}

pub fn expected(name: &str) -> Expected {
    let bytes = fs::read(fixture(name).join("expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (ids, logits) = (file.tensor("input_ids").unwrap(), file.tensor("logits").unwrap());
    let sequences = ids.shape()[0];
    let split = |data: &[u8]| -> Vec<Vec<[u8; 4]>> {
        data.as_chunks().0.chunks(data.len() / 4 / sequences).map(<[_]>::to_vec).collect()
    };
    let u32s = |row: Vec<[u8; 4]>| row.into_iter().map(u32::from_le_bytes).collect();
    let f32s = |row: Vec<[u8; 4]>| row.into_iter().map(f32::from_le_bytes).collect();
    Expected {
        ids: split(ids.data()).into_iter().map(u32s).collect(),
        logits: split(logits.data()).into_iter().map(f32s).collect(),
    }
}

/// An F32 tensor: shape (slowest dimension first) and data.
pub type Tensor = (Vec<usize>, Vec<f32>);

/// All tensors of f32 of a fixture under Hugging Face's names.
pub fn tensors(name: &str) -> BTreeMap<String, Tensor> {
    let f32s = |data: &[u8]| data.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
    tensors_of(name, Dtype::F32, f32s)
}

/// All tensors of one type.
fn tensors_of<T>(
    name: &str,
    dtype: Dtype,
    read: impl Fn(&[u8]) -> Vec<T>,
) -> BTreeMap<String, (Vec<usize>, Vec<T>)> {
    let mut out = BTreeMap::new();
    for entry in fs::read_dir(fixture(name)).unwrap() {
        let path = entry.unwrap().path();
        let file = path.file_name().unwrap().to_str().unwrap();
        if file.starts_with("model") && file.ends_with(".safetensors") {
            let bytes = fs::read(&path).unwrap();
            let file = SafeTensors::deserialize(&bytes).unwrap();
            for (name, view) in file.iter().filter(|(_, view)| view.dtype() == dtype) {
                out.insert(name.to_owned(), (view.shape().to_vec(), read(view.data())));
            }
        }
    }
    out
}

/// A GGUF file in the making. Fields are public so that tests can lie.
pub struct GgufWriter {
    pub version: u32,
    pub tensor_count: Option<u64>,
    pub key_count: Option<u64>,
    /// Key, value type, value bytes.
    pub metadata: Vec<(String, u32, Vec<u8>)>,
    pub tensors: Vec<GgufTensor>,
}

/// A tensor in a [`GgufWriter`].
pub struct GgufTensor {
    pub name: String,
    /// GGUF's order, fastest dimension first.
    pub dims: Vec<u64>,
    pub kind: u32,
    /// In place of where the data really is.
    pub offset: Option<u64>,
    pub data: Vec<u8>,
}

pub const U32: u32 = 4;
pub const F32: u32 = 6;
pub const BOOL: u32 = 7;
pub const STRING: u32 = 8;
pub const ARRAY: u32 = 9;

/// A string as GGUF writes it.
pub fn string(text: impl AsRef<[u8]>) -> Vec<u8> {
    let text = text.as_ref();
    [&(text.len() as u64).to_le_bytes(), text].concat()
}

/// An array as GGUF writes it.
pub fn array(element: u32, items: &[Vec<u8>]) -> Vec<u8> {
    [&element.to_le_bytes()[..], &(items.len() as u64).to_le_bytes(), &items.concat()].concat()
}

impl GgufWriter {
    pub fn new(architecture: &str) -> Self {
        let mut writer =
            Self { version: 3, tensor_count: None, key_count: None, metadata: vec![], tensors: vec![] };
        writer.key("general.architecture", STRING, string(architecture));
        writer
    }

    pub fn key(&mut self, key: &str, kind: u32, value: Vec<u8>) {
        self.metadata.push((key.to_owned(), kind, value));
    }

    pub fn tensor(&mut self, name: &str, (shape, data): &Tensor) {
        self.tensors.push(GgufTensor {
            name: name.to_owned(),
            dims: shape.iter().rev().map(|&d| d as u64).collect(),
            kind: 0,
            offset: None,
            data: data.iter().flat_map(|x| x.to_le_bytes()).collect(),
        });
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.key_count.unwrap_or(self.metadata.len() as u64).to_le_bytes());
        for (key, kind, value) in &self.metadata {
            out.extend(string(key));
            out.extend(kind.to_le_bytes());
            out.extend(value);
        }
        let mut data: Vec<u8> = Vec::new();
        for tensor in &self.tensors {
            out.extend(string(&tensor.name));
            out.extend((tensor.dims.len() as u32).to_le_bytes());
            tensor.dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(&tensor.data);
            data.resize(data.len().next_multiple_of(32), 0);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(data);
        out
    }
}

/// Names of a layer's tensors: Hugging Face's and GGUF's.
const NAMES: [(&str, &str); 13] = [
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("mlp.gate", "ffn_gate_inp"),
    ("mlp.router", "ffn_gate_inp"),
];

/// Converts a fixture to GGUF, F32 where it is not MXFP4, as llama.cpp's converter lays each architecture out.
pub fn to_gguf(name: &str) -> GgufWriter {
    let json: serde_json::Value =
        serde_json::from_slice(&fs::read(fixture(name).join("config.json")).unwrap()).unwrap();
    let model_type = json["model_type"].as_str().unwrap();
    let arch = if model_type == "gpt_oss" { "gpt-oss".to_owned() } else { model_type.replace('_', "") };
    let mut writer = GgufWriter::new(&arch);
    let int = |field: &str| (json[field].as_u64().unwrap() as u32).to_le_bytes().to_vec();
    let float = |value: &serde_json::Value| (value.as_f64().unwrap() as f32).to_le_bytes().to_vec();
    for (key, field) in [
        ("block_count", "num_hidden_layers"),
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("attention.key_length", "head_dim"),
        ("attention.value_length", "head_dim"),
    ] {
        writer.key(&format!("{arch}.{key}"), U32, int(field));
    }
    writer.key(&format!("{arch}.attention.layer_norm_rms_epsilon"), F32, float(&json["rms_norm_eps"]));
    writer.key(&format!("{arch}.rope.freq_base"), F32, float(&json["rope_parameters"]["rope_theta"]));
    if arch == "qwen3moe" {
        writer.key("qwen3moe.expert_count", U32, int("num_local_experts"));
        writer.key("qwen3moe.expert_used_count", U32, int("num_experts_per_tok"));
        writer.key("qwen3moe.expert_feed_forward_length", U32, int("moe_intermediate_size"));
        let renormalise = json["norm_topk_prob"].as_bool().unwrap();
        writer.key("qwen3moe.expert_weights_norm", BOOL, vec![renormalise.into()]);
    }
    if arch == "gpt-oss" {
        writer.key("gpt-oss.expert_count", U32, int("num_local_experts"));
        writer.key("gpt-oss.expert_used_count", U32, int("num_experts_per_tok"));
        writer.key("gpt-oss.expert_feed_forward_length", U32, int("intermediate_size"));
        writer.key("gpt-oss.attention.sliding_window", U32, int("sliding_window"));
        let rope = &json["rope_parameters"];
        let context = rope["original_max_position_embeddings"].as_u64().unwrap() as u32;
        writer.key("gpt-oss.rope.scaling.type", STRING, string("yarn"));
        writer.key("gpt-oss.rope.scaling.factor", F32, float(&rope["factor"]));
        writer.key("gpt-oss.rope.scaling.original_context_length", U32, context.to_le_bytes().to_vec());
        quantised_experts(&mut writer, name);
    }
    if json["rope_parameters"]["rope_type"] == "llama3" {
        writer.tensor("rope_freqs.weight", &llama3_divisors(&json));
    }
    let heads = |field: &str| json[field].as_u64().unwrap() as usize;
    let mut experts: BTreeMap<String, Vec<(usize, Tensor)>> = BTreeMap::new();
    for (name, mut tensor) in tensors(name) {
        match name.as_str() {
            "model.embed_tokens.weight" => writer.tensor("token_embd.weight", &tensor),
            "model.norm.weight" => writer.tensor("output_norm.weight", &tensor),
            "lm_head.weight" => writer.tensor("output.weight", &tensor),
            layer => {
                let (index, rest) = layer.strip_prefix("model.layers.").unwrap().split_once('.').unwrap();
                if rest == "self_attn.sinks" {
                    writer.tensor(&format!("blk.{index}.attn_sinks.weight"), &tensor);
                    continue;
                }
                if let Some(kind) = rest.strip_prefix("mlp.experts.").filter(|_| arch == "gpt-oss") {
                    fused_experts(&mut writer, index, kind, &tensor);
                    continue;
                }
                if let Some(expert) = rest.strip_prefix("mlp.experts.") {
                    let (expert, kind) = expert.split_once('.').unwrap();
                    let gguf =
                        format!("blk.{index}.ffn_{}_exps.weight", kind.strip_suffix("_proj.weight").unwrap());
                    experts.entry(gguf).or_default().push((expert.parse().unwrap(), tensor));
                    continue;
                }
                let (stem, kind) = rest.rsplit_once('.').unwrap();
                let ours = match (arch.as_str(), stem) {
                    ("gpt-oss", "post_attention_layernorm") => "post_attention_norm",
                    _ => NAMES.iter().find(|(theirs, _)| *theirs == stem).unwrap().1,
                };
                match (arch.as_str(), ours) {
                    ("llama", "attn_q") => permute(&mut tensor, heads("num_attention_heads")),
                    ("llama", "attn_k") => permute(&mut tensor, heads("num_key_value_heads")),
                    _ => {}
                }
                writer.tensor(&format!("blk.{index}.{ours}.{kind}"), &tensor);
            }
        }
    }
    for (name, mut parts) in experts {
        parts.sort_by_key(|(expert, _)| *expert);
        let shape = [vec![parts.len()], parts[0].1.0.clone()].concat();
        let data = parts.into_iter().flat_map(|(_, (_, data))| data).collect();
        writer.tensor(&name, &(shape, data));
    }
    writer
}

/// gpt-oss's experts: in the last dimension gate and up take turns, and matrices are `[experts, in, out]`.
fn fused_experts(writer: &mut GgufWriter, layer: &str, kind: &str, (shape, data): &Tensor) {
    let (stem, bias) = match kind.strip_suffix("_bias") {
        Some(stem) => (stem, true),
        None => (kind, false),
    };
    let parts: &[&str] = if stem == "gate_up_proj" { &["gate", "up"] } else { &["down"] };
    let (experts, all) = (shape[0], shape[shape.len() - 1]);
    let (rows, width) = (all / parts.len(), if bias { 1 } else { shape[1] });
    for (first, part) in parts.iter().enumerate() {
        let mut out = Vec::new();
        for expert in 0..experts {
            for row in 0..rows {
                for column in 0..width {
                    out.push(data[(expert * width + column) * all + row * parts.len() + first]);
                }
            }
        }
        let (kind, shape) = match bias {
            true => ("bias", vec![experts, rows]),
            false => ("weight", vec![experts, rows, width]),
        };
        writer.tensor(&format!("blk.{layer}.ffn_{part}_exps.{kind}"), &(shape, out));
    }
}

/// gpt-oss's experts in blocks `[experts, out, in / 32, 16]` and scales, as GGML's MXFP4.
fn quantised_experts(writer: &mut GgufWriter, name: &str) {
    let tensors = tensors_of(name, Dtype::U8, <[u8]>::to_vec);
    for (blocks_name, (shape, blocks)) in tensors.iter().filter(|(name, _)| name.ends_with("_blocks")) {
        let scales = &tensors[&blocks_name.replace("_blocks", "_scales")].1;
        let layer = blocks_name.split('.').nth(2).unwrap();
        let parts: &[&str] = if blocks_name.contains("gate_up") { &["gate", "up"] } else { &["down"] };
        let (experts, rows, groups) = (shape[0], shape[1] / parts.len(), shape[2]);
        for (first, part) in parts.iter().enumerate() {
            let mut data = Vec::new();
            for row in (0..experts * rows).map(|row| row * parts.len() + first) {
                for group in row * groups..(row + 1) * groups {
                    let code = |i: usize| blocks[group * 16 + i / 2] >> (i % 2 * 4) & 15;
                    data.push(scales[group]);
                    data.extend((0..16).map(|i| code(i) | code(i + 16) << 4));
                }
            }
            writer.tensors.push(GgufTensor {
                name: format!("blk.{layer}.ffn_{part}_exps.weight"),
                dims: vec![32 * groups as u64, rows as u64, experts as u64],
                kind: 39,
                offset: None,
                data,
            });
        }
    }
}

/// Reorders the rows of every head so that rows `i` and `i + head_dim / 2` become neighbours.
fn permute((shape, data): &mut Tensor, heads: usize) {
    let (width, head_dim) = (shape[1], shape[0] / heads);
    let old = data.clone();
    for (row, out) in data.chunks_mut(width).enumerate() {
        let (head, i) = (row / head_dim, row % head_dim);
        let from = head * head_dim + i / 2 + (i % 2) * head_dim / 2;
        out.copy_from_slice(&old[from * width..][..width]);
    }
}

/// llama3's scaling as `rope_freqs.weight` holds it: what each inverse frequency is divided by.
fn llama3_divisors(json: &serde_json::Value) -> Tensor {
    let rope = |field: &str| json["rope_parameters"][field].as_f64().unwrap();
    let head_dim = json["head_dim"].as_u64().unwrap() as usize;
    let context = rope("original_max_position_embeddings");
    let (factor, low, high) = (rope("factor"), rope("low_freq_factor"), rope("high_freq_factor"));
    let divisor = |i: usize| {
        let wavelength = std::f64::consts::TAU * rope("rope_theta").powf(2.0 * i as f64 / head_dim as f64);
        let smooth = ((context / wavelength - low) / (high - low)).clamp(0.0, 1.0);
        (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
    };
    (vec![head_dim / 2], (0..head_dim / 2).map(divisor).collect())
}
