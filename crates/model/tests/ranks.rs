//! A model cut into ranks says what it says in one piece: logits within a tolerance, greedy answers token for token.

mod support;

use std::path::{Path, PathBuf};

use rudder_comm::{Group, Member};
use rudder_model::{KvSize, LoadOptions, Loaded, Model, ModelSource, load};
use rudder_ops::cpu::{Cpu, KvDType};
use rudder_ops::reference::Reference;
use rudder_ops::{Backend, Batch, SampleRow, Sampled, SamplingParams};
use support::{FIXTURES, GgufWriter, expected, fixture, to_gguf};

const OPTIONS: LoadOptions =
    LoadOptions { max_batch_tokens: 80, max_outputs: 80, kv: KvSize::Blocks(8), max_context: 64 };
/// Blocks of the two sequences, out of order and interleaved.
const BLOCKS: [[u32; 4]; 2] = [[5, 0, 3, 7], [1, 6, 2, 4]];
/// How far logits of ranks may be from those of one piece: sums are taken in another order. The fixtures' logits are
/// of the order of 1.
const TOLERANCE: f32 = 1e-5;
/// All fixtures have four query heads and two KV heads: four ranks hold each KV head twice.
const WORLDS: [usize; 2] = [2, 4];

fn cpu(member: Member) -> Cpu {
    Cpu::new(1, KvDType::F32).in_group(member)
}

fn ranks_on<B: Backend>(path: &Path, world: usize, backend: impl Fn(Member) -> B) -> Loaded {
    let group = Group::new(world);
    let backends = group.members().into_iter().map(backend).collect();
    let source = ModelSource::open(path).unwrap();
    let mut last = (0, 0);
    let loaded = source.load_ranks(group, backends, OPTIONS, |done, total| {
        assert!(done >= last.0 && done <= total);
        last = (done, total);
    });
    let loaded = loaded.unwrap();
    assert_eq!(last, (loaded.weight_bytes, loaded.weight_bytes));
    loaded
}

fn ranks(path: &Path, world: usize) -> Box<dyn Model> {
    ranks_on(path, world, cpu).model
}

fn whole(path: &Path) -> Box<dyn Model> {
    load(path, Cpu::new(2, KvDType::F32), OPTIONS, |_, _| ()).unwrap().model
}

/// Logits of all tokens of two sequences side by side, sequence `s` advancing `chunks[s]` tokens a step.
fn logits(model: &mut dyn Model, ids: &[Vec<u32>], chunks: [usize; 2]) -> Vec<f32> {
    let (mut done, mut found) = ([0; 2], vec![Vec::new(), Vec::new()]);
    let (mut batch, vocab) = (Batch::default(), model.config().vocab);
    while (0..2).any(|s| done[s] < ids[s].len()) {
        batch.clear();
        let mut rows = [0; 2];
        for s in 0..2 {
            let end = ids[s].len().min(done[s] + chunks[s]);
            rows[s] = end - done[s];
            if rows[s] > 0 {
                batch.push(&ids[s][done[s]..end], done[s], &BLOCKS[s], rows[s]);
            }
            done[s] = end;
        }
        model.forward(&batch).unwrap();
        let logits = model.logits().unwrap();
        let (first, second) = logits.split_at(rows[0] * vocab);
        assert_eq!(second.len(), rows[1] * vocab);
        found[0].extend_from_slice(first);
        found[1].extend_from_slice(second);
    }
    found.concat()
}

/// The largest difference; NaN is no small one.
fn worst(found: &[f32], wanted: &[f32]) -> f32 {
    assert_eq!(found.len(), wanted.len());
    let differences = found.iter().zip(wanted).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, |worst, d| if d <= worst { worst } else { d })
}

/// Twenty tokens that follow greedily on each of two prompts.
fn greedy(model: &mut dyn Model, ids: &[Vec<u32>]) -> Vec<u32> {
    let params = SamplingParams { temperature: 0.0, ..Default::default() };
    let row =
        SampleRow { params: &params, counts: None, drafted: &[], position: 0, mask: None, forced: None };
    let (mut batch, mut drawn, mut said) = (Batch::default(), Vec::<Sampled>::new(), Vec::new());
    for s in 0..2 {
        batch.push(&ids[s], 0, &BLOCKS[s], 1);
    }
    for step in 0..20 {
        model.forward(&batch).unwrap();
        model.sample(&[row, row], &mut drawn).unwrap();
        batch.clear();
        for s in 0..2 {
            said.push(drawn[s].token);
            batch.push(&[drawn[s].token], ids[s].len() + step, &BLOCKS[s], 1);
        }
    }
    said
}

fn check(path: &Path, name: &str, ids: &[Vec<u32>]) {
    let mut one = whole(path);
    let (wanted, answer) = (logits(&mut *one, ids, [40, 40]), greedy(&mut *one, ids));
    for world in WORLDS {
        let mut ranks = ranks(path, world);
        assert_eq!(ranks.config(), one.config());
        for chunks in [[40, 40], [7, 16], [1, 40]] {
            let worst = worst(&logits(&mut *ranks, ids, chunks), &wanted);
            assert!(worst < TOLERANCE, "{name} on {world} ranks, chunks of {chunks:?}: {worst}");
        }
        assert_eq!(greedy(&mut *ranks, ids), answer, "{name} on {world} ranks");
    }
}

#[test]
fn every_architecture_says_the_same_in_ranks() {
    let folder = tempfile::tempdir().unwrap();
    // Activations rounded to eight bits make steps of the last bits in which ranks differ.
    for name in FIXTURES.into_iter().filter(|name| !name.contains("mxfp4")) {
        let ids = expected(name).ids;
        check(&fixture(name), name, &ids);
        check(&written(folder.path(), &to_gguf(name)), name, &ids);
    }
}

#[test]
fn the_reference_backend_says_the_same_in_ranks() {
    for name in ["qwen2", "qwen3moe", "gptoss-mxfp4"] {
        let ids = expected(name).ids;
        let one = load(&fixture(name), Reference::new(), OPTIONS, |_, _| ()).unwrap();
        let wanted = logits(&mut *{ one.model }, &ids, [40, 40]);
        for world in WORLDS {
            let loaded = ranks_on(&fixture(name), world, |member| Reference::new().in_group(member));
            let worst = worst(&logits(&mut *{ loaded.model }, &ids, [40, 40]), &wanted);
            assert!(worst < TOLERANCE, "{name} on {world} ranks: {worst}");
        }
    }
}

#[test]
fn two_runs_of_the_same_ranks_give_the_same_bits_whatever_their_threads() {
    let ids = expected("qwen3moe").ids;
    let with_threads = |threads| {
        let backend = |member| Cpu::new(threads, KvDType::F16).in_group(member);
        logits(&mut *ranks_on(&fixture("qwen3moe"), 2, backend).model, &ids, [7, 16])
    };
    let first = with_threads(1);
    assert!(first == with_threads(1) && first == with_threads(3));
}

fn written(folder: &Path, gguf: &GgufWriter) -> PathBuf {
    let path = folder.join("model.gguf");
    std::fs::write(&path, gguf.bytes()).unwrap();
    path
}

/// The llama fixture whose tensors of these names are Q8_0. Its MLPs are widened with zeros to 64, two blocks.
fn quantised(names: &[&str]) -> GgufWriter {
    let mut gguf = to_gguf("llama");
    let (_, _, width) =
        gguf.metadata.iter_mut().find(|(key, ..)| key == "llama.feed_forward_length").unwrap();
    *width = 64u32.to_le_bytes().to_vec();
    for tensor in &mut gguf.tensors {
        let kind = tensor.name.rsplit('.').nth(1).unwrap_or_default().to_owned();
        match kind.as_str() {
            "ffn_gate" | "ffn_up" => {
                tensor.dims[1] = 64;
                tensor.data.resize(4 * 32 * 64, 0);
            }
            "ffn_down" => {
                tensor.dims[0] = 64;
                let widened = |row: &[u8]| [row, &[0; 4 * 16]].concat();
                tensor.data = tensor.data.chunks_exact(4 * 48).flat_map(widened).collect();
            }
            _ => {}
        }
        if names.contains(&kind.as_str()) {
            tensor.kind = 8;
            let numbers: Vec<f32> =
                tensor.data.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
            tensor.data = numbers.chunks_exact(32).flat_map(q8_0).collect();
        }
    }
    gguf
}

/// A block of Q8_0 whose scale is 2^-7, in f16.
fn q8_0(block: &[f32]) -> Vec<u8> {
    let scale: u16 = (15 - 7) << 10;
    let quants = block.iter().map(|x| (x * 128.0).round().clamp(-127.0, 127.0) as i8 as u8);
    scale.to_le_bytes().into_iter().chain(quants).collect()
}

#[test]
fn quantised_tensors_are_cut_between_blocks() {
    let folder = tempfile::tempdir().unwrap();
    let all = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];
    let path = written(folder.path(), &quantised(&all));
    let ids = expected("llama").ids;
    let mut one = whole(&path);
    let (wanted, answer) = (logits(&mut *one, &ids, [40, 40]), greedy(&mut *one, &ids));
    let mut ranks = ranks(&path, 2);
    let worst = worst(&logits(&mut *ranks, &ids, [40, 40]), &wanted);
    // A sum that is rounded otherwise may be quantised otherwise before the next matrix.
    assert!(worst < 1e-2, "{worst}");
    assert_eq!(greedy(&mut *ranks, &ids), answer);
}

#[test]
fn what_cannot_be_cut_names_the_tensor_and_what_can() {
    let folder = tempfile::tempdir().unwrap();
    let refusal =
        |path: &Path, world| ModelSource::open(path).unwrap().check_ranks(world).unwrap_err().to_string();
    let message = refusal(&fixture("qwen3moe"), 3);
    assert!(message.contains("3 ranks") && message.contains("4 query heads and 2 KV heads"), "{message}");
    assert!(message.ends_with("a tensor_parallel_size of 1, 2, 4 will do"), "{message}");
    let message = refusal(&written(folder.path(), &quantised(&["attn_output"])), 4);
    assert!(
        message.contains("blk.0.attn_output.weight would end inside its blocks of 32 (Q8_0)"),
        "{message}"
    );
    assert!(message.ends_with("of 1, 2 will do"), "{message}");
    let path = written(folder.path(), &quantised(&["ffn_down"]));
    let message = refusal(&path, 4);
    assert!(message.contains("blk.0.ffn_down.weight has 2 blocks of 32 (Q8_0)"), "{message}");

    // Loading refuses the same, and what is no group.
    let group = Group::new(4);
    let backends = group.members().into_iter().map(cpu).collect();
    let source = ModelSource::open(&path).unwrap();
    let loaded = source.load_ranks(group, backends, OPTIONS, |_, _| panic!("nothing is loaded"));
    assert_eq!(loaded.map(drop).unwrap_err().to_string(), message);
    let member = Group::new(2).members().remove(1);
    assert!(source.load(cpu(member), OPTIONS, |_, _| ()).map(drop).is_err());
    let mut members = Group::new(2).members();
    members.reverse();
    let backends = members.into_iter().map(cpu).collect();
    assert!(source.load_ranks(Group::new(2), backends, OPTIONS, |_, _| ()).map(drop).is_err());
    let share = LoadOptions { kv: KvSize::DeviceShare(0.5), ..OPTIONS };
    let group = Group::new(2);
    let backends = group.members().into_iter().map(cpu).collect();
    let message = source.load_ranks(group, backends, share, |_, _| ()).map(drop).unwrap_err().to_string();
    assert!(message.contains("does not say how much memory"), "{message}");
}

#[test]
fn a_step_beyond_the_limits_is_refused_by_all_ranks_and_harms_nothing() {
    let ids = expected("qwen2").ids;
    let mut model = ranks(&fixture("qwen2"), 2);
    let wanted = logits(&mut *model, &ids, [40, 40]);
    let mut batch = Batch::default();
    batch.push(&[0; 81], 0, &[0; 6], 1);
    let message = model.forward(&batch).unwrap_err().to_string();
    assert!(message.contains("81 tokens"), "{message}");
    assert!(logits(&mut *model, &ids, [40, 40]) == wanted);
}

#[test]
fn blocks_move_between_models_of_as_many_ranks_and_no_others() {
    let ids = &expected("qwen3").ids[0];
    let last = |model: &mut dyn Model, start: usize, blocks: &[u32]| {
        let mut batch = Batch::default();
        batch.push(&ids[start..], start, blocks, 1);
        model.forward(&batch).unwrap();
        model.logits().unwrap()
    };
    let path = fixture("qwen3");
    let one = whole(&path).kv_block().unwrap();
    for (world, replicas) in [(2, 1), (4, 2)] {
        let mut first = ranks(&path, world);
        let wanted = last(&mut *first, 0, &[5, 0, 3]);
        let mut second = ranks(&path, world);
        let block = first.kv_block().unwrap();
        assert_eq!(second.kv_block(), Some(block));
        assert_eq!(block.bytes, one.bytes * replicas);
        assert_ne!(block.fingerprint, one.fingerprint);
        let mut bytes = vec![0; block.bytes];
        for (from, to) in [(5, 2), (0, 7)] {
            first.export_block(from, &mut bytes).unwrap();
            second.import_block(to, &bytes).unwrap();
        }
        assert!(last(&mut *second, 32, &[2, 7, 1]) == wanted, "{world} ranks");
        assert!(first.export_block(8, &mut bytes).is_err_and(|e| e.to_string().contains("block 8 of 8")));
        assert!(first.import_block(0, &bytes[1..]).is_err());
    }
    let fingerprint = |world| ranks(&path, world).kv_block().unwrap().fingerprint;
    assert_ne!(fingerprint(2), fingerprint(4));
}

#[test]
fn a_kv_cache_of_so_many_bytes_is_shared_by_the_ranks() {
    let source = ModelSource::open(&fixture("qwen2")).unwrap();
    let options = LoadOptions { kv: KvSize::Bytes(100_000), ..OPTIONS };
    let one = source.load(Cpu::new(1, KvDType::F16), options, |_, _| ()).unwrap();
    let of = |world| {
        let group = Group::new(world);
        let member = |member| Cpu::new(1, KvDType::F16).in_group(member);
        let backends = group.members().into_iter().map(member).collect();
        source.load_ranks(group, backends, options, |_, _| ()).unwrap()
    };
    let (two, four) = (of(2), of(4));
    assert!([&one, &two, &four].iter().all(|loaded| loaded.kv_bytes <= 100_000 && loaded.kv_blocks > 0));
    assert_eq!((two.kv_blocks, four.kv_blocks), (one.kv_blocks, one.kv_blocks / 2));
}
