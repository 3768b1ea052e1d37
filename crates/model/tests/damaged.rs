//! Truncated and lying files are errors that name the tensor or key; never a panic.

mod support;

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use rudder_model::{Gguf, LoadError, ModelSource, Value};
use support::{ARRAY, BOOL, F32, GgufWriter, STRING, U32, array, string, to_gguf};

fn with_file<T>(bytes: &[u8], test: impl FnOnce(&Path) -> T) -> T {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    fs::write(&path, bytes).unwrap();
    test(&path)
}

/// Opens a file; one that opens must also give all its values and tensors.
fn open_file(path: &Path) -> Result<(), LoadError> {
    let gguf = Gguf::open(path)?;
    for (_, value) in gguf.metadata() {
        walk(value);
    }
    for name in gguf.tensor_names() {
        let tensor = gguf.tensor(name).expect("listed");
        assert_eq!(tensor.dtype.bytes(tensor.elements()), Some(tensor.bytes().len()));
    }
    ModelSource::open(path).map(drop)
}

/// Opens a file of these bytes.
fn open(bytes: &[u8]) -> Result<(), LoadError> {
    with_file(bytes, open_file)
}

fn walk(value: Value<'_>) {
    if let Value::Array(array) = value {
        assert_eq!(array.iter().map(walk).count(), array.len());
    }
}

/// The error that a changed copy of a good file gives.
fn error(change: impl FnOnce(&mut GgufWriter)) -> String {
    let mut writer = to_gguf("qwen2");
    change(&mut writer);
    open(&writer.bytes()).expect_err("damaged").to_string()
}

fn assert_names(message: &str, words: &[&str]) {
    for word in words {
        assert!(message.contains(word), "{message:?} does not say {word:?}");
    }
}

#[test]
fn metadata_of_every_kind_is_read() {
    let mut writer = GgufWriter::new("qwen2");
    writer.version = 2;
    writer.key("u8", 0, vec![200]);
    writer.key("i8", 1, vec![0xff]);
    writer.key("u16", 2, 40_000u16.to_le_bytes().into());
    writer.key("i16", 3, (-2i16).to_le_bytes().into());
    writer.key("i32", 5, (-3i32).to_le_bytes().into());
    writer.key("f32", F32, 1.5f32.to_le_bytes().into());
    writer.key("bool", BOOL, vec![1]);
    writer.key("u64", 10, (1u64 << 40).to_le_bytes().into());
    writer.key("i64", 11, (-4i64).to_le_bytes().into());
    writer.key("f64", 12, 2.5f64.to_le_bytes().into());
    writer.key("strings", ARRAY, array(STRING, &[string("a"), string(b"\xff"), string("")]));
    writer.key("ints", ARRAY, array(5, &[7i32.to_le_bytes().into(), (-7i32).to_le_bytes().into()]));
    writer.key("floats", ARRAY, array(F32, &[0.5f32.to_le_bytes().into()]));
    let inner = array(U32, &[9u32.to_le_bytes().into()]);
    writer.key("nested", ARRAY, array(ARRAY, &[inner.clone(), inner]));
    with_file(&writer.bytes(), |path| {
        let gguf = Gguf::open(path).unwrap();
        assert_eq!(gguf.str("general.architecture").unwrap(), "qwen2");
        assert_eq!(
            (gguf.u32("u8"), gguf.u32("u16"), gguf.u64("u64")),
            (Some(200), Some(40_000), Some(1 << 40))
        );
        assert_eq!((gguf.u32("u64"), gguf.u64("i8"), gguf.u64("f32")), (None, None, None));
        for (key, value) in [("i8", -1), ("i16", -2), ("i32", -3), ("i64", -4)] {
            assert_eq!(gguf.value(key), Some(Value::Signed(value)));
        }
        assert_eq!((gguf.f32("f32"), gguf.f32("f64"), gguf.bool("bool")), (Some(1.5), Some(2.5), Some(true)));
        assert_eq!(gguf.strings("strings").unwrap(), ["a", "\u{fffd}", ""]);
        let Some(Value::String(bytes)) = gguf.array("strings").unwrap().iter().nth(1) else { panic!() };
        assert_eq!(bytes, b"\xff");
        assert_eq!(gguf.ints("ints").unwrap(), [7, -7]);
        assert_eq!(gguf.floats("floats").unwrap(), [0.5]);
        assert_eq!(gguf.array("nested").unwrap().iter().count(), 2);
        assert_eq!(gguf.strings("ints"), None);
        assert_eq!(gguf.metadata().count(), 15);
    });
}

#[test]
fn a_good_file_opens_and_its_shapes_are_reversed() {
    with_file(&to_gguf("qwen2").bytes(), |path| {
        let gguf = Gguf::open(path).unwrap();
        assert_eq!(gguf.tensor("blk.0.ffn_up.weight").unwrap().shape, [48, 32]);
        let original = &support::tensors("qwen2")["model.layers.1.mlp.up_proj.weight"];
        let bytes: Vec<u8> = original.1.iter().flat_map(|x| x.to_le_bytes()).collect();
        assert_eq!(gguf.tensor("blk.1.ffn_up.weight").unwrap().bytes(), bytes);
        assert_names(&gguf.tensor("absent").unwrap_err().to_string(), &["absent", "model.gguf"]);
        assert_eq!(ModelSource::open(path).unwrap().config().vocab, 128);
    });
}

#[test]
fn lying_counts_are_errors() {
    for count in [1 << 20, u64::MAX, u64::MAX / 24 + 1] {
        assert_names(&error(|w| w.tensor_count = Some(count)), &["tensor count", &count.to_string()]);
        assert_names(&error(|w| w.key_count = Some(count)), &["metadata count", &count.to_string()]);
        let lying_array = [&STRING.to_le_bytes()[..], &count.to_le_bytes()].concat();
        assert_names(&error(|w| w.key("liar", ARRAY, lying_array)), &["liar", &count.to_string()]);
        assert_names(&error(|w| w.key("liar", STRING, count.to_le_bytes().into())), &["liar"]);
    }
}

#[test]
fn lying_tensors_are_errors_that_name_them() {
    let lie = |change: &dyn Fn(&mut support::GgufTensor)| {
        let message = error(|w| {
            let tensor = w.tensors.iter_mut().find(|t| t.name == "blk.0.ffn_up.weight").unwrap();
            change(tensor);
        });
        assert_names(&message, &["blk.0.ffn_up.weight"]);
        message
    };
    lie(&|t| t.offset = Some(1 << 30));
    lie(&|t| t.offset = Some(u64::MAX - 31));
    assert_names(&lie(&|t| t.offset = Some(4)), &["alignment"]);
    assert_names(&lie(&|t| t.kind = 999), &["999", "not supported"]);
    assert_names(&lie(&|t| t.kind = 12), &["Q4_K"]); // rows of 32 are no whole blocks of 256
    lie(&|t| t.dims = vec![]);
    lie(&|t| t.dims = vec![1; 5]);
    lie(&|t| t.dims = vec![0, 48]);
    lie(&|t| t.dims = vec![1 << 40, 48]);
    lie(&|t| t.dims = vec![1 << 33, 1 << 33]);
    lie(&|t| t.dims = vec![u64::MAX, u64::MAX]);
}

#[test]
fn duplicates_are_errors() {
    assert_names(&error(|w| w.key("qwen2.block_count", U32, vec![0; 4])), &["qwen2.block_count", "twice"]);
    assert_names(
        &error(|w| w.tensor("output_norm.weight", &(vec![1], vec![0.0]))),
        &["output_norm.weight", "twice"],
    );
}

#[test]
fn headers_that_are_not_ours_are_errors() {
    assert_names(&open(b"GGML").unwrap_err().to_string(), &["not a GGUF"]);
    assert_names(&open(b"").unwrap_err().to_string(), &["empty"]);
    assert_names(&error(|w| w.version = 1), &["version 1"]);
    assert_names(&error(|w| w.version = 3u32.swap_bytes()), &["big-endian"]);
    assert_names(
        &error(|w| w.key("general.alignment", U32, 24u32.to_le_bytes().into())),
        &["general.alignment"],
    );
    assert_names(&error(|w| w.key("odd", 13, vec![])), &["odd", "13"]);
    let mut deep = array(U32, &[]);
    (0..1_000).for_each(|_| {
        deep.splice(0..0, [&ARRAY.to_le_bytes()[..], &1u64.to_le_bytes()].concat()).for_each(drop)
    });
    assert_names(&error(|w| w.key("deep", ARRAY, deep)), &["deep", "nests"]);
}

#[test]
fn a_configuration_that_makes_no_sense_is_an_error_that_names_the_key() {
    let set = |key: &str, kind: u32, value: Vec<u8>| {
        error(|w| {
            w.metadata.retain(|(k, _, _)| k != key);
            w.key(key, kind, value);
        })
    };
    let u32 = |x: u32| x.to_le_bytes().to_vec();
    assert_names(&set("general.architecture", STRING, string("mamba")), &["mamba", "llama"]);
    assert_names(&set("qwen2.block_count", STRING, string("two")), &["qwen2.block_count"]);
    assert_names(&set("qwen2.block_count", U32, u32(u32::MAX)), &["layers"]);
    assert_names(&set("qwen2.attention.head_count", U32, u32(0)), &["heads is 0"]);
    assert_names(&set("qwen2.attention.head_count_kv", U32, u32(3)), &["KV heads"]);
    assert_names(&set("qwen2.rope.scaling.type", STRING, string("longrope")), &["longrope"]);
    assert_names(&set("qwen2.rope.dimension_count", U32, u32(8)), &["rope"]);
    assert_names(&set("split.count", U32, u32(2)), &["split"]);
    assert_names(
        &error(|w| w.metadata.retain(|(k, _, _)| k != "qwen2.context_length")),
        &["qwen2.context_length"],
    );
}

#[test]
fn a_bias_that_is_not_read_is_an_error_that_names_it() {
    let bias = (vec![64], vec![0.0; 64]);
    for name in ["blk.1.attn_output.bias", "blk.0.ffn_down.bias", "blk.0.ffn_gate_inp.bias"] {
        assert_names(&error(|w| w.tensor(name, &bias)), &[name, "qwen2"]);
    }
}

#[test]
fn a_file_cut_anywhere_is_an_error() {
    let bytes = to_gguf("qwen2").bytes();
    let cuts = (0..3_000).chain((3_000..bytes.len() - 32).step_by(997));
    with_file(&bytes, |path| {
        let file = fs::File::options().write(true).open(path).unwrap();
        // From the last on, so that it is written once.
        for cut in cuts.rev() {
            file.set_len(cut as u64).unwrap();
            assert!(open_file(path).is_err(), "cut at {cut}");
        }
    });
}

#[test]
fn damaged_safetensors_are_errors() {
    let good = support::fixture("qwen2");
    let folder = tempfile::tempdir().unwrap();
    fs::copy(good.join("config.json"), folder.path().join("config.json")).unwrap();
    let message = |bytes: &[u8]| {
        fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
        ModelSource::open(folder.path()).map(drop).expect_err("damaged").to_string()
    };
    assert_names(
        &ModelSource::open(folder.path()).map(drop).unwrap_err().to_string(),
        &["model.safetensors"],
    );
    let bytes = fs::read(good.join("model.safetensors")).unwrap();
    for cut in [1, 7, 8, 100, bytes.len() / 2, bytes.len() - 1] {
        assert_names(&message(&bytes[..cut]), &["model.safetensors"]);
    }
    let mut huge = bytes.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    message(&huge);
    // Eight tensors whose sizes add up to 2^64.
    let tensors: Vec<String> = (0..8u64)
        .map(|i| {
            let (begin, end) = (i << 61, (i + 1).saturating_mul(1 << 61));
            format!(
                r#""t{i}": {{"dtype": "U8", "shape": [{}], "data_offsets": [{begin}, {end}]}}"#,
                1u64 << 61
            )
        })
        .collect();
    let header = format!("{{{}}}", tensors.join(", "));
    message(&[&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat());
}

#[test]
fn a_shard_index_may_not_leave_its_folder_or_name_missing_tensors() {
    let good = support::fixture("llama3-rope");
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(&good).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    ModelSource::open(folder.path()).unwrap();
    let index = folder.path().join("model.safetensors.index.json");
    let text = fs::read_to_string(&index).unwrap();
    let message = |text: &str| {
        fs::write(&index, text).unwrap();
        ModelSource::open(folder.path()).map(drop).expect_err("damaged").to_string()
    };
    assert_names(&message(&text.replace("model-00001", "../model-00001")), &["not a plain file name"]);
    assert_names(&message(&text.replace("\"lm_head.weight\"", "\"nowhere\"")), &["nowhere"]);
    assert_names(&message(&text.replace("00001-of", "00009-of")), &["model-00009-of-00004"]);
    message("{");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// Bytes of a GGUF header changed at random: an error or a file whose every tensor lies inside it.
    #[test]
    fn mutated_gguf_never_panics(
        fixture in prop::sample::select(vec!["llama3-rope", "qwen3moe"]),
        changes in prop::collection::vec((0usize..4_000, any::<u8>()), 1..12),
        cut in prop::option::of(0usize..8_000),
    ) {
        let mut bytes = to_gguf(fixture).bytes();
        for (at, value) in changes {
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut);
        }
        let _ = open(&bytes);
    }

    /// The same of a safetensors header.
    #[test]
    fn mutated_safetensors_never_panic(changes in prop::collection::vec((0usize..2_000, any::<u8>()), 1..4)) {
        let good = support::fixture("qwen2");
        let folder = tempfile::tempdir().unwrap();
        fs::copy(good.join("config.json"), folder.path().join("config.json")).unwrap();
        let mut bytes = fs::read(good.join("model.safetensors")).unwrap();
        for (at, value) in changes {
            bytes[at] = value;
        }
        fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
        let _ = ModelSource::open(folder.path());
    }
}
