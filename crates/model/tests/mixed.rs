//! Checkpoints whose matrices are of several formats: layers that differ load, and say the same in ranks.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use rudder_comm::Group;
use rudder_model::{KvSize, LoadOptions, Model, ModelSource, load};
use rudder_ops::cpu::{Cpu, KvDType};
use rudder_ops::{Batch, SampleRow, Sampled, SamplingParams};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, serialize_to_file};

const OPTIONS: LoadOptions =
    LoadOptions { max_batch_tokens: 40, max_outputs: 40, kv: KvSize::Blocks(4), max_context: 64 };
const HIDDEN: usize = 128;
/// Query heads of 64, half as many KV heads.
const HEADS: usize = 4;
const VOCAB: usize = 96;

/// How a matrix is stored.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Plain,
    Fp8,
    /// As Model Optimizer does, and as compressed-tensors does.
    Nvfp4,
    PackedNvfp4,
    PackedInt4,
}

/// A layer's Q; K; V; attention's output; gate; up; down.
type Layer = [Kind; 7];

/// A checkpoint in the making.
#[derive(Default)]
struct Made {
    tensors: HashMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
    state: u32,
}

impl Made {
    fn next(&mut self) -> u32 {
        self.state = self.state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        self.state >> 8
    }

    fn bytes(&mut self, count: usize, of: impl Fn(u32) -> u8) -> Vec<u8> {
        (0..count).map(|_| of(self.next())).collect()
    }

    fn add(&mut self, name: String, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) {
        self.tensors.insert(name, (dtype, shape.to_vec(), bytes));
    }

    fn f32s(&mut self, name: String, shape: &[usize], values: &[f32]) {
        self.add(name, Dtype::F32, shape, values.iter().flat_map(|x| x.to_le_bytes()).collect());
    }

    /// Numbers around 0, of about this size.
    fn plain(&mut self, name: String, shape: &[usize], size: f32) {
        let values: Vec<f32> =
            (0..shape.iter().product()).map(|_| size * (self.next() % 2001) as f32 / 1000.0 - size).collect();
        self.f32s(name, shape, &values);
    }

    /// A matrix of numbers of about 0.1.
    fn matrix(&mut self, name: &str, [n, k]: [usize; 2], kind: Kind) {
        let beside = |what: &str| format!("{name}.weight{what}");
        match kind {
            Kind::Plain => self.plain(beside(""), &[n, k], 0.1),
            Kind::Fp8 => {
                let bytes = self.bytes(n * k, |x| (0x20 + x % 0x18 + 0x80 * (x >> 10 & 1)) as u8);
                self.add(beside(""), Dtype::F8_E4M3, &[n, k], bytes);
                self.f32s(beside("_scale"), &[], &[0.2]);
            }
            Kind::Nvfp4 | Kind::PackedNvfp4 => {
                let (codes, scales) =
                    (self.bytes(n * k / 2, |x| x as u8), self.bytes(n * k / 16, |x| 0x30 + x as u8 % 8));
                let packed = matches!(kind, Kind::PackedNvfp4);
                self.add(beside(if packed { "_packed" } else { "" }), Dtype::U8, &[n, k / 2], codes);
                self.add(beside("_scale"), Dtype::F8_E4M3, &[n, k / 16], scales);
                match packed {
                    true => self.f32s(beside("_global_scale"), &[1], &[20.0]),
                    false => self.f32s(beside("_scale_2"), &[], &[0.05]),
                }
            }
            Kind::PackedInt4 => {
                let codes = self.bytes(n * k / 2, |x| x as u8);
                self.add(beside("_packed"), Dtype::I32, &[n, k / 8], codes);
                self.plain(beside("_scale"), &[n, k / 128], 0.03);
            }
        }
    }

    fn write(&self, folder: &Path) {
        let views = self.tensors.iter().map(|(name, (dtype, shape, bytes))| {
            (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
    }
}

/// Writes a checkpoint of these layers, whose MLPs are `inner` wide.
fn write(folder: &Path, layers: &[Layer], inner: usize, quantization: &str) -> Made {
    let count = layers.len();
    let config = format!(
        r#"{{"model_type": "llama", "hidden_size": {HIDDEN}, "intermediate_size": {inner}, "num_hidden_layers": {count},
            "num_attention_heads": {HEADS}, "num_key_value_heads": {}, "head_dim": 64, "vocab_size": {VOCAB},
            "max_position_embeddings": 64, "tie_word_embeddings": false, "quantization_config": {{{quantization}}}}}"#,
        HEADS / 2
    );
    fs::write(folder.join("config.json"), config).unwrap();
    let (q, kv) = (64 * HEADS, 32 * HEADS);
    let mut made = Made::default();
    made.plain("model.embed_tokens.weight".into(), &[VOCAB, HIDDEN], 1.0);
    made.plain("lm_head.weight".into(), &[VOCAB, HIDDEN], 1.0);
    made.f32s("model.norm.weight".into(), &[HIDDEN], &[1.0; HIDDEN]);
    for (index, kinds) in layers.iter().enumerate() {
        let name = |part: &str| format!("model.layers.{index}.{part}");
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            made.f32s(name(&format!("{norm}.weight")), &[HIDDEN], &[1.0; HIDDEN]);
        }
        let matrices = [
            ("self_attn.q_proj", [q, HIDDEN]),
            ("self_attn.k_proj", [kv, HIDDEN]),
            ("self_attn.v_proj", [kv, HIDDEN]),
            ("self_attn.o_proj", [HIDDEN, q]),
            ("mlp.gate_proj", [inner, HIDDEN]),
            ("mlp.up_proj", [inner, HIDDEN]),
            ("mlp.down_proj", [HIDDEN, inner]),
        ];
        for ((part, shape), &kind) in matrices.into_iter().zip(kinds) {
            made.matrix(&name(part), shape, kind);
        }
    }
    made.write(folder);
    made
}

/// Logits of a prompt, and twenty tokens that follow greedily.
fn says(model: &mut dyn Model) -> (Vec<f32>, Vec<u32>) {
    let params = SamplingParams { temperature: 0.0, ..Default::default() };
    let row =
        SampleRow { params: &params, counts: None, drafted: &[], position: 0, mask: None, forced: None };
    let (mut batch, mut drawn, mut said) = (Batch::default(), Vec::<Sampled>::new(), Vec::new());
    batch.push(&(0..20).collect::<Vec<_>>(), 0, &[0, 2, 1], 1);
    model.forward(&batch).unwrap();
    let logits = model.logits().unwrap();
    for step in 0..20 {
        model.sample(&[row], &mut drawn).unwrap();
        said.push(drawn[0].token);
        batch.clear();
        batch.push(&[drawn[0].token], 20 + step, &[0, 2, 1], 1);
        model.forward(&batch).unwrap();
    }
    (logits, said)
}

fn in_ranks(folder: &Path, world: usize) -> Result<Box<dyn Model>, String> {
    let group = Group::new(world);
    let backends = group.members().into_iter().map(|member| Cpu::new(1, KvDType::F32).in_group(member));
    let backends = backends.collect();
    let source = ModelSource::open(folder).map_err(|error| error.to_string())?;
    let loaded = source.load_ranks(group, backends, OPTIONS, |_, _| ());
    loaded.map(|loaded| loaded.model).map_err(|error| error.to_string())
}

fn check(folder: &Path) {
    let mut one = load(folder, Cpu::new(2, KvDType::F32), OPTIONS, |_, _| ()).unwrap().model;
    let (wanted, answer) = says(&mut *one);
    assert!(wanted.iter().all(|x| x.is_finite()) && wanted.iter().any(|x| (x - wanted[0]).abs() > 1.0));
    assert!(answer.iter().any(|token| *token != answer[0]));
    let (found, said) = says(&mut *in_ranks(folder, 2).unwrap());
    // Where a CPU multiplies BF16, activations are rounded to it, which makes steps of the last bits in which ranks differ.
    let largest = wanted.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    let worst = found.iter().zip(&wanted).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    assert!(worst < 0.01 * largest, "{worst} of {largest}");
    assert_eq!(said, answer);
}

#[test]
fn layers_that_are_left_as_numbers_do_not_decide_how_the_others_are_cut() {
    use Kind::{Fp8, Nvfp4, Plain};
    let folder = tempfile::tempdir().unwrap();
    let layers = [[Plain; 7], [Fp8, Nvfp4, Plain, Fp8, Nvfp4, Nvfp4, Nvfp4], [Fp8; 7]];
    // Three blocks of 64, which two ranks would have halved between them.
    let modelopt = r#""quant_method": "modelopt", "quant_algo": "MIXED_PRECISION""#;
    write(folder.path(), &layers, 192, modelopt);
    check(folder.path());
    let refusal = in_ranks(folder.path(), 4).err().expect("more ranks than blocks");
    assert!(
        refusal.contains("model.layers.1.mlp.down_proj.weight") && refusal.contains("NVFP4"),
        "{refusal}"
    );
}

#[test]
fn formats_of_one_mixture_are_told_apart_though_their_tensors_have_the_same_names() {
    use Kind::{Fp8, PackedInt4, PackedNvfp4, Plain};
    let folder = tempfile::tempdir().unwrap();
    let layers =
        [[Fp8; 7], [PackedNvfp4; 7], [PackedInt4, PackedNvfp4, Fp8, PackedInt4, Plain, Fp8, PackedInt4]];
    let groups = r#""a": {"format": "float-quantized"}, "b": {"format": "nvfp4-pack-quantized"},
        "c": {"format": "pack-quantized", "weights": {"num_bits": 4}}"#;
    let compressed = r#""quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups""#;
    write(folder.path(), &layers, 384, &format!("{compressed}: {{{groups}}}"));
    check(folder.path());
}

#[test]
fn a_quantised_output_matrix_is_used_though_nothing_says_that_it_is_not_the_embedding_table() {
    let folder = tempfile::tempdir().unwrap();
    let quantization = r#""quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"a": {"weights": {"num_bits": 4}}}"#;
    let mut made = write(folder.path(), &[[Kind::PackedInt4; 7]], 384, quantization);
    made.tensors.remove("lm_head.weight");
    made.matrix("lm_head", [VOCAB, HIDDEN], Kind::PackedInt4);
    made.write(folder.path());
    let open = || load(folder.path(), Cpu::new(1, KvDType::F32), OPTIONS, |_, _| ());
    let stated = says(&mut *open().unwrap().model);
    let config = folder.path().join("config.json");
    let silent = fs::read_to_string(&config).unwrap().replace(r#""tie_word_embeddings": false, "#, "");
    fs::write(&config, &silent).unwrap();
    assert_eq!(says(&mut *open().unwrap().model), stated);

    // Of a format that is not told, it is not passed over either.
    made = write(folder.path(), &[[Kind::Plain; 7]], 384, "");
    made.tensors.remove("lm_head.weight");
    made.matrix("lm_head", [VOCAB, HIDDEN], Kind::PackedInt4);
    made.write(folder.path());
    fs::write(&config, silent.replace(&format!("{{{quantization}}}"), "null")).unwrap();
    let refusal = open().err().expect("a format that is not told").to_string();
    assert!(
        refusal.contains("lm_head.weight_packed") && refusal.contains("quantization_config"),
        "{refusal}"
    );
}
