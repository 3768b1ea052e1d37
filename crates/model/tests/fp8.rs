//! FP8 checkpoints say what checkpoints of the numbers that they stand for say, whatever their scales are for.

mod support;

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use half::bf16;
use rudder_model::{KvSize, LoadOptions, load};
use rudder_ops::Batch;
use rudder_ops::cpu::{Cpu, KvDType};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, serialize_to_file};
use support::{fixture, tensors};

const OPTIONS: LoadOptions =
    LoadOptions { max_batch_tokens: 40, max_outputs: 40, kv: KvSize::Blocks(4), max_context: 64 };
/// Rows and columns of a block: the fixtures' matrices end inside some.
const BLOCK: [usize; 2] = [20, 24];

/// What scales are for.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Scales {
    Blocks,
    Rows,
    Matrix,
}

/// A tensor in the making.
type Stored = (Dtype, Vec<usize>, Vec<u8>);

fn f32s(shape: Vec<usize>, values: &[f32]) -> Stored {
    (Dtype::F32, shape, values.iter().flat_map(|x| x.to_le_bytes()).collect())
}

/// The number that a byte of E4M3 stands for.
fn number(byte: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f64::from(byte & 7));
    let magnitude = match exponent {
        0 => mantissa / 8.0 * 2f64.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
    };
    if byte >> 7 == 1 { -magnitude } else { magnitude }
}

/// A matrix as FP8 with its scales, and as the BF16 that it stands for. Of its bytes nearly all values occur that are numbers.
fn quantised(seed: usize, [rows, width]: [usize; 2], kind: Scales) -> ([Stored; 2], Stored) {
    let byte = |i: usize| ((i * 151 + seed * 29) % 251) as u8 ^ 0x80;
    let bytes: Vec<u8> =
        (0..rows * width).map(|i| if byte(i) & 0x7f == 0x7f { 0x7e } else { byte(i) }).collect();
    let (grid, shape) = match kind {
        Scales::Blocks => {
            let grid = [rows.div_ceil(BLOCK[0]), width.div_ceil(BLOCK[1])];
            (grid, grid.to_vec())
        }
        Scales::Rows => ([rows, 1], vec![rows, 1]),
        Scales::Matrix => ([1, 1], vec![]),
    };
    let scales: Vec<f32> = (0..grid[0] * grid[1]).map(|i| 0.001 * (1.0 + (i % 5) as f32 / 3.0)).collect();
    let place = |row: usize, column: usize| match kind {
        Scales::Blocks => row / BLOCK[0] * grid[1] + column / BLOCK[1],
        Scales::Rows => row,
        Scales::Matrix => 0,
    };
    let widened = (0..rows * width).flat_map(|i| {
        let product = number(bytes[i]) as f32 * scales[place(i / width, i % width)];
        bf16::from_f32(product).to_le_bytes()
    });
    let widened = (Dtype::BF16, vec![rows, width], widened.collect());
    ([(Dtype::F8_E4M3, vec![rows, width], bytes), f32s(shape, &scales)], widened)
}

/// Writes two folders of the qwen3 fixture's shape: with FP8 projections, and with the same in BF16.
fn write(fp8: &Path, plain: &Path, kind: Scales) {
    let config = fs::read_to_string(fixture("qwen3").join("config.json")).unwrap();
    fs::write(plain.join("config.json"), &config).unwrap();
    let block = match kind {
        Scales::Blocks => format!(", \"weight_block_size\": {BLOCK:?}"),
        _ => String::new(),
    };
    let quantization = format!("{{\"quantization_config\": {{\"quant_method\": \"fp8\"{block}}},");
    fs::write(fp8.join("config.json"), config.replacen('{', &quantization, 1)).unwrap();
    let (mut with_fp8, mut with_bf16) = (HashMap::new(), HashMap::new());
    for (seed, (name, (shape, values))) in tensors("qwen3").into_iter().enumerate() {
        match (name.ends_with("_proj.weight"), shape.as_slice()) {
            (true, &[rows, width]) => {
                let ([bytes, scales], widened) = quantised(seed, [rows, width], kind);
                let suffix = if kind == Scales::Blocks { "scale_inv" } else { "scale" };
                with_fp8.insert(format!("{name}_{suffix}"), scales);
                with_fp8.insert(name.clone(), bytes);
                with_bf16.insert(name, widened);
            }
            _ => {
                with_fp8.insert(name.clone(), f32s(shape.clone(), &values));
                with_bf16.insert(name, f32s(shape, &values));
            }
        }
    }
    for (folder, tensors) in [(fp8, with_fp8), (plain, with_bf16)] {
        let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
            (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
    }
}

fn logits(folder: &Path) -> Vec<f32> {
    let mut model = load(folder, Cpu::new(2, KvDType::F32), OPTIONS, |_, _| ()).unwrap().model;
    let mut batch = Batch::default();
    batch.push(&(0..40).collect::<Vec<_>>(), 0, &[0, 2, 1], 40);
    model.forward(&batch).unwrap();
    model.logits().unwrap()
}

#[test]
fn fp8_says_what_the_numbers_it_stands_for_say() {
    for kind in [Scales::Blocks, Scales::Rows, Scales::Matrix] {
        let (fp8, plain) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        write(fp8.path(), plain.path(), kind);
        let found = logits(fp8.path());
        assert!(found.iter().all(|x| x.is_finite()) && found.iter().any(|x| *x != found[0]));
        assert!(found == logits(plain.path()), "scales for {kind:?}");
    }
}

#[test]
fn missing_scales_and_scales_of_another_shape_are_named() {
    let (fp8, plain) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let refusal = || {
        let refused = load(fp8.path(), Cpu::new(1, KvDType::F32), OPTIONS, |_, _| ());
        refused.err().expect("refused").to_string()
    };
    write(fp8.path(), plain.path(), Scales::Blocks);
    let config = fs::read_to_string(fp8.path().join("config.json")).unwrap();
    fs::write(fp8.path().join("config.json"), config.replace(&format!("{BLOCK:?}"), "[8, 8]")).unwrap();
    let message = refusal();
    assert!(message.contains("q_proj.weight_scale_inv") && message.contains("[8, 8]"), "{message}");

    fs::write(fp8.path().join("config.json"), config).unwrap();
    let mut bytes = fs::read(fp8.path().join("model.safetensors")).unwrap();
    let renamed = String::from_utf8_lossy(&bytes[8..]).find("q_proj.weight_scale_inv").unwrap() + 8;
    bytes[renamed] = b'x';
    fs::write(fp8.path().join("model.safetensors"), bytes).unwrap();
    let message = refusal();
    assert!(message.contains("q_proj.weight_scale is missing"), "{message}");
}
