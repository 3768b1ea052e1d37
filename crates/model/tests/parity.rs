//! Logits agree with Hugging Face transformers', however a sequence is cut into steps, from both formats.

mod support;

use std::fs;
use std::path::Path;

use rudder_model::{KvSize, LoadOptions, Model, ModelConfig, ModelSource, load};
use rudder_ops::cpu::{Cpu, KvDType};
use rudder_ops::reference::Reference;
use rudder_ops::{Backend, Batch};
use support::{Expected, F32, FIXTURES, STRING, U32, expected, fixture, string, to_gguf};

const OPTIONS: LoadOptions =
    LoadOptions { max_batch_tokens: 80, max_outputs: 80, kv: KvSize::Blocks(8), max_context: 64 };
/// Blocks of the two sequences, out of order and interleaved.
const BLOCKS: [[u32; 3]; 2] = [[5, 0, 3], [1, 6, 2]];
const TOLERANCE: f32 = 1e-4;
/// Where quantised weights meet activations rounded to eight bits.
const QUANTISED: f32 = 0.1;

/// Runs two sequences side by side, sequence `s` advancing `chunks[s]` tokens a step, and returns the
/// largest absolute difference to the expected logits.
fn worst_difference(model: &mut dyn Model, expected: &Expected, chunks: [usize; 2]) -> f32 {
    let (length, vocab) = (expected.ids[0].len(), model.config().vocab);
    let (mut done, mut worst, mut compared) = ([0; 2], 0f32, 0);
    let mut batch = Batch::default();
    while done != [length; 2] {
        batch.clear();
        let mut wanted = Vec::new();
        for s in 0..2 {
            let end = length.min(done[s] + chunks[s]);
            if end > done[s] {
                batch.push(&expected.ids[s][done[s]..end], done[s], &BLOCKS[s], end - done[s]);
                wanted.extend_from_slice(&expected.logits[s][done[s] * vocab..end * vocab]);
                done[s] = end;
            }
        }
        model.forward(&batch).unwrap();
        let logits = model.logits().unwrap();
        assert_eq!(logits.len(), wanted.len());
        compared += logits.len();
        for (found, wanted) in logits.iter().zip(&wanted) {
            // NaN is no small difference.
            worst = if (found - wanted).abs() <= worst { worst } else { (found - wanted).abs() };
        }
    }
    assert_eq!(compared, 2 * length * vocab);
    worst
}

fn check<B: Backend>(path: &Path, name: &str, backend: B) {
    let backend_name = backend.name().to_owned();
    let mut last = (0, 0);
    let mut loaded = load(path, backend, OPTIONS, |done, total| {
        assert!(done >= last.0 && done <= total);
        last = (done, total);
    })
    .unwrap();
    assert_eq!(last, (loaded.weight_bytes, loaded.weight_bytes));
    let expected = expected(name);
    // Whole, in chunks that end inside and on blocks, token by token, decode beside prefill.
    for chunks in [[40, 40], [7, 16], [17, 3], [1, 1], [1, 40]] {
        let worst = worst_difference(&mut *loaded.model, &expected, chunks);
        let tolerance = if name.contains("mxfp4") && backend_name == "cpu" { QUANTISED } else { TOLERANCE };
        assert!(worst < tolerance, "{name} on {backend_name}, chunks of {chunks:?}: {worst}");
    }
}

fn check_all<B: Backend>(backend: impl Fn() -> B) {
    let folder = tempfile::tempdir().unwrap();
    for name in FIXTURES {
        check(&fixture(name), name, backend());
        let gguf = folder.path().join(format!("{name}.gguf"));
        fs::write(&gguf, to_gguf(name).bytes()).unwrap();
        check(&gguf, name, backend());
    }
}

fn cpu() -> Cpu {
    Cpu::new(2, KvDType::F32)
}

#[test]
fn reference_agrees_with_transformers() {
    check_all(Reference::new);
}

#[test]
fn cpu_agrees_with_transformers() {
    check_all(cpu);
}

#[test]
fn outputs_are_the_rows_that_were_asked_for() {
    let mut model = load(&fixture("qwen2"), cpu(), OPTIONS, |_, _| ()).unwrap().model;
    let expected = expected("qwen2");
    let mut batch = Batch::default();
    batch.push(&expected.ids[0], 0, &BLOCKS[0], 1);
    batch.push(&expected.ids[1][..5], 0, &BLOCKS[1], 0);
    model.forward(&batch).unwrap();
    let vocab = model.config().vocab;
    let wanted = &expected.logits[0][39 * vocab..];
    let worst = model.logits().unwrap().iter().zip(wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < TOLERANCE, "{worst}");
    assert_eq!(model.logits().unwrap().len(), vocab);

    // A chunk of prefill that is not the last wants none.
    batch.clear();
    batch.push(&expected.ids[1][5..20], 5, &BLOCKS[1], 0);
    model.forward(&batch).unwrap();
    assert!(model.logits().unwrap().is_empty());
}

#[test]
fn a_step_beyond_the_models_limits_is_refused_and_harms_nothing() {
    let mut model = load(&fixture("qwen2"), cpu(), OPTIONS, |_, _| ()).unwrap().model;
    let refused = |model: &mut dyn Model, tokens: &[u32], computed: usize, blocks: &[u32], word: &str| {
        let mut batch = Batch::default();
        batch.push(tokens, computed, blocks, 1);
        let message = model.forward(&batch).unwrap_err().to_string();
        assert!(message.contains(word), "{message:?} does not say {word:?}");
    };
    refused(&mut *model, &[0; 81], 0, &[0; 6], "81 tokens");
    refused(&mut *model, &[128], 0, &[0], "token 128");
    refused(&mut *model, &[1], 64, &[0; 5], "65 tokens");
    refused(&mut *model, &[1], 0, &[8], "KV block 8");
    assert!(worst_difference(&mut *model, &expected("qwen2"), [40, 40]) < TOLERANCE);
}

#[test]
fn options_that_do_not_fit_are_errors() {
    let attempt =
        |options| load(&fixture("qwen2"), cpu(), options, |_, _| ()).map(drop).unwrap_err().to_string();
    assert!(attempt(LoadOptions { max_context: 513, ..OPTIONS }).contains("at most 512"));
    assert!(attempt(LoadOptions { kv: KvSize::Bytes(100), ..OPTIONS }).contains("KV cache of 0 blocks"));
    let loaded =
        load(&fixture("qwen2"), cpu(), LoadOptions { kv: KvSize::Bytes(100_000), ..OPTIONS }, |_, _| ());
    let loaded = loaded.unwrap();
    assert!(loaded.kv_blocks > 0 && loaded.kv_bytes <= 100_000);
}

/// What a GGUF file is with these keys of rope.
fn config_with(keys: &[(&str, u32, Vec<u8>)]) -> ModelConfig {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let mut writer = to_gguf("qwen2");
    keys.iter().for_each(|(key, kind, value)| writer.key(&format!("qwen2.rope.{key}"), *kind, value.clone()));
    fs::write(&path, writer.bytes()).unwrap();
    ModelSource::open(&path).unwrap().config().clone()
}

fn float(x: f32) -> Vec<u8> {
    x.to_le_bytes().to_vec()
}

#[test]
fn gguf_files_may_weaken_what_yarn_does_to_attention() {
    let yarn = |factor: f32| {
        config_with(&[
            ("scaling.type", STRING, string("yarn")),
            ("scaling.factor", F32, float(4.0)),
            ("scaling.original_context_length", U32, 64u32.to_le_bytes().to_vec()),
            ("scaling.attn_factor", F32, float(factor)),
        ])
    };
    assert_eq!(yarn(0.5).attention.scale, yarn(1.0).attention.scale / 4.0);
    assert!(
        (yarn(1.0).attention.scale / config_with(&[]).attention.scale - 1.1386294f32.powi(2)).abs() < 1e-5
    );
}

#[test]
fn older_gguf_files_scale_rope_without_naming_a_type() {
    let rope = |keys: &[(&str, u32, Vec<u8>)]| config_with(keys).rope;
    let named = rope(&[("scaling.type", STRING, string("linear")), ("scaling.factor", F32, float(4.0))]);
    assert_eq!(rope(&[("scale_linear", F32, float(4.0))]), named);
    assert_eq!(rope(&[("scaling.factor", F32, float(4.0))]), named);
    let plain = rope(&[]);
    assert_eq!(rope(&[("scale_linear", F32, float(0.0))]), plain);
    assert_eq!(rope(&[("scaling.type", STRING, string("none")), ("scaling.factor", F32, float(4.0))]), plain);
    assert_ne!(named, plain);
}

#[test]
fn a_missing_or_misshapen_tensor_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let attempt = |change: &dyn Fn(&mut support::GgufWriter)| {
        let mut writer = to_gguf("qwen3moe");
        change(&mut writer);
        fs::write(&path, writer.bytes()).unwrap();
        load(&path, Reference::new(), OPTIONS, |_, _| ()).map(drop).unwrap_err().to_string()
    };
    let name = "blk.1.ffn_up_exps.weight";
    let message = attempt(&|w| w.tensors.retain(|t| t.name != name));
    assert!(message.contains(name) && message.contains("missing"), "{message}");
    let message = attempt(&|w| w.tensors.iter_mut().find(|t| t.name == name).unwrap().dims = vec![24, 32, 8]);
    assert!(message.contains(name) && message.contains("[8, 24, 32]"), "{message}");
}

#[test]
fn fused_experts_of_another_shape_are_named() {
    for (name, tensor) in
        [("gptoss", "experts.gate_up_proj "), ("gptoss-mxfp4", "experts.gate_up_proj_blocks ")]
    {
        let folder = tempfile::tempdir().unwrap();
        let config = fs::read(fixture(name).join("config.json")).unwrap();
        let mut config: serde_json::Value = serde_json::from_slice(&config).unwrap();
        config["intermediate_size"] = 64.into();
        fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let weights = "model.safetensors";
        fs::copy(fixture(name).join(weights), folder.path().join(weights)).unwrap();
        let refused = load(folder.path(), Reference::new(), OPTIONS, |_, _| ()).map(drop);
        let message = refused.unwrap_err().to_string();
        assert!(message.contains(tensor) && message.contains("asks for [4, "), "{message}");
    }
}
