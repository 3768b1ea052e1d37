//! KV blocks taken out of one loaded model and put into another carry on as if computed there.

mod support;

use std::fs;

use rudder_model::{KvSize, LoadOptions, Model, load};
use rudder_ops::Batch;
use rudder_ops::cpu::{Cpu, KvDType};
use rudder_ops::reference::Reference;
use support::{FIXTURES, expected, fixture, to_gguf};

const OPTIONS: LoadOptions =
    LoadOptions { max_batch_tokens: 80, max_outputs: 80, kv: KvSize::Blocks(8), max_context: 64 };

fn model(name: &str, dtype: KvDType) -> Box<dyn Model> {
    load(&fixture(name), Cpu::new(2, dtype), OPTIONS, |_, _| ()).unwrap().model
}

/// Runs `ids[start..]` after what is in `blocks`, and returns the last token's logits.
fn run(model: &mut dyn Model, ids: &[u32], start: usize, blocks: &[u32]) -> Vec<f32> {
    let mut batch = Batch::default();
    batch.push(&ids[start..], start, blocks, 1);
    model.forward(&batch).unwrap();
    model.logits().unwrap()
}

#[test]
fn blocks_moved_to_another_model_of_the_same_weights_give_the_same_logits_bit_for_bit() {
    for (name, dtype) in
        FIXTURES.iter().flat_map(|n| [(n, KvDType::F16), (n, KvDType::BF16), (n, KvDType::F32)])
    {
        let ids = &expected(name).ids[0];
        let mut first = model(name, dtype);
        let wanted = run(&mut *first, ids, 0, &[5, 0, 3]);
        let mut second = model(name, dtype);
        assert_eq!(first.kv_block(), second.kv_block());
        let mut bytes = vec![0; first.kv_block().unwrap().bytes];
        for (from, to) in [(5, 2), (0, 7)] {
            first.export_block(from, &mut bytes).unwrap();
            second.import_block(to, &bytes).unwrap();
        }
        assert_eq!(run(&mut *second, ids, 32, &[2, 7, 1]), wanted, "{name} {dtype:?}");
    }
}

#[test]
fn blocks_that_are_not_there_or_of_another_size_are_errors() {
    let mut model = model("qwen2", KvDType::F16);
    let bytes = model.kv_block().unwrap().bytes;
    assert!(
        model.export_block(8, &mut vec![0; bytes]).is_err_and(|e| e.to_string().contains("block 8 of 8"))
    );
    assert!(model.export_block(0, &mut vec![0; bytes - 1]).is_err());
    assert!(model.import_block(0, &vec![0; bytes + 1]).is_err());
    assert!(model.import_block(0, &[]).is_err());
    let mut reference = load(&fixture("qwen2"), Reference::new(), OPTIONS, |_, _| ()).unwrap().model;
    assert!(reference.kv_block().is_none());
    assert!(reference.export_block(0, &mut []).is_err());
}

#[test]
fn the_fingerprint_changes_with_weights_configuration_and_dtype() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let of = |change: &dyn Fn(&mut support::GgufWriter)| {
        let mut writer = to_gguf("qwen2");
        change(&mut writer);
        fs::write(&path, writer.bytes()).unwrap();
        load(&path, Cpu::new(1, KvDType::F16), OPTIONS, |_, _| ())
            .unwrap()
            .model
            .kv_block()
            .unwrap()
            .fingerprint
    };
    let same = of(&|_| ());
    assert_eq!(of(&|_| ()), same);
    for name in ["blk.1.attn_k.weight", "blk.0.attn_norm.weight", "token_embd.weight", "blk.1.attn_v.bias"] {
        let changed = of(&|w| w.tensors.iter_mut().find(|t| t.name == name).unwrap().data[0] ^= 1);
        assert_ne!(changed, same, "{name}");
    }
    let fingerprint = |name, dtype| model(name, dtype).kv_block().unwrap().fingerprint;
    assert_ne!(fingerprint("qwen2", KvDType::F16), fingerprint("qwen2", KvDType::F32));
    assert_ne!(fingerprint("qwen2", KvDType::F16), fingerprint("qwen2", KvDType::BF16));
    assert_ne!(fingerprint("qwen2", KvDType::F16), fingerprint("qwen3", KvDType::F16));
}
