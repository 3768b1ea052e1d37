//! Whole models on the cuda backend: tiny checkpoints of every architecture against the reference backend, however a sequence is
//! cut into steps.

mod ahead;
#[path = "../common/mod.rs"]
mod common;
#[path = "../common/flights.rs"]
mod flights;
mod real;

use common::{OPTIONS, cuda, fixture, model, on_gpu};
use rudder_comm::Group;
use rudder_cuda::{Cuda, PeerAccess, PrefillKernel};
use rudder_model::{KvSize, LoadOptions, Loaded, Model, ModelSource, load, worst_difference};
use rudder_ops::reference::Reference;
use rudder_ops::{Backend, Batch, SampleRow, SamplingParams};

/// Blocks of the two sequences, out of order and interleaved.
const BLOCKS: [[u32; 3]; 2] = [[5, 0, 3], [1, 6, 2]];
const LENGTH: usize = 37;

/// Logits of two sequences side by side, each by its own number of tokens a step: by sequence, then token.
fn logits(model: &mut dyn Model, chunks: [usize; 2]) -> [Vec<f32>; 2] {
    let vocab = model.config().vocab;
    let tokens: Vec<u32> = (0..LENGTH as u32).map(|i| (i * i + 7 * i) % vocab as u32).collect();
    let mut found = [Vec::new(), Vec::new()];
    let mut batch = Batch::default();
    while found.iter().any(|f| f.len() < LENGTH * vocab) {
        batch.clear();
        let mut rows = [0; 2];
        for s in 0..2 {
            let done = found[s].len() / vocab;
            let end = LENGTH.min(done + chunks[s]);
            rows[s] = end - done;
            if end > done {
                batch.push(&tokens[done..end], done, &BLOCKS[s], end - done);
            }
        }
        model.forward(&batch).expect("a step");
        let logits = model.logits().expect("logits");
        let (first, second) = logits.split_at(rows[0] * vocab);
        found[0].extend_from_slice(first);
        found[1].extend_from_slice(second);
    }
    found
}

#[test]
fn every_architecture_says_what_the_reference_says() {
    for name in ["qwen2", "llama", "llama3-rope", "qwen3", "qwen3moe", "gptoss", "gptoss-mxfp4"] {
        let Some(cuda) = cuda() else { return };
        let [expected, _] = logits(&mut *model(name, Reference::new(), OPTIONS.kv), [LENGTH; 2]);
        let largest = expected.iter().fold(0f32, |a, x| a.max(x.abs()));
        let mut model = model(name, cuda, OPTIONS.kv);
        // Whole, in chunks that end inside and on blocks, token by token, decode beside prefill.
        for chunks in [[LENGTH, LENGTH], [16, 7], [1, 20]] {
            for (s, found) in logits(&mut *model, chunks).iter().enumerate() {
                let worst = found.iter().zip(&expected).fold(0f32, |a, (x, y)| a.max((x - y).abs()));
                assert!(found.iter().all(|x| x.is_finite()));
                // A few layers of roundings to bf16; the gates of gptoss reach 56.
                let tolerance = if name == "gptoss" { 0.06 } else { 0.03 };
                assert!(worst < tolerance * largest, "{name} {chunks:?} {s}: {worst} of {largest}");
            }
        }
    }
}

/// A model whose projections stay FP8, of random weights, one whose bf16 becomes FP8, and one of experts, to all of which every token goes: no
/// rounding sends it elsewhere; and one of NVFP4.
#[test]
fn models_of_fp8_and_nvfp4_say_what_the_reference_says() {
    let dummy = |name| ModelSource::dummy(&fixture(name).to_string_lossy()).expect("a configuration");
    for source in
        [dummy("dummy-fp8"), dummy("dummy").with_fp8(), dummy("dummy-moe").with_fp8(), dummy("dummy-nvfp4")]
    {
        let Some(cuda) = cuda() else { return };
        let mut reference = source.load(Reference::new(), OPTIONS, |_, _| ()).expect("it loads").model;
        let [expected, _] = logits(&mut *reference, [LENGTH; 2]);
        let largest = expected.iter().fold(0f32, |a, x| a.max(x.abs()));
        let Some(mut rounding) = common::cuda() else { return };
        // On Hopper and Blackwell, where steps of many rows may be rounded to FP8 too; to NVFP4 on Blackwell alone.
        let (rounds, off) = match source.fp4_activations() {
            true => {
                let blackwell = rounding.set_prefill_kernel(PrefillKernel::Tcgen05);
                (blackwell.and_then(|()| rounding.set_fp4_products(true)).is_ok(), 0.25)
            }
            false => (rounding.set_fp8_products(true).is_ok(), 0.12),
        };
        for (cuda, tolerance) in [Some((cuda, 0.03)), rounds.then_some((rounding, off))].into_iter().flatten()
        {
            let mut model = source.load(cuda, OPTIONS, |_, _| ()).expect("it loads").model;
            for chunks in [[LENGTH, LENGTH], [1, 20]] {
                for found in logits(&mut *model, chunks) {
                    let worst = found.iter().zip(&expected).fold(0f32, |a, (x, y)| a.max((x - y).abs()));
                    assert!(worst < tolerance * largest, "{chunks:?}: {worst} of {largest}");
                }
            }
        }
    }
}

/// A model in ranks, all on one device where there is one: what several devices do, but for the way between them.
fn in_ranks(name: &str, group: Group, kv: KvSize, access: PeerAccess) -> Option<Loaded> {
    let members = group.members().into_iter();
    let backends: Option<Vec<_>> = members.map(|member| Some(cuda()?.in_group_by(member, access))).collect();
    let backends = backends?;
    let source = ModelSource::open(&fixture(name)).expect("the fixture is there");
    // So large a cache comes with a largest step at the load: on a GPU that ranks share nothing may grow while one's kernels wait for another.
    let kv = match (kv, &backends[0]) {
        (KvSize::Blocks(blocks), cuda) if on_gpu(cuda) => {
            KvSize::Bytes(blocks as u64 * source.kv_block_bytes(cuda))
        }
        _ => kv,
    };
    let options = LoadOptions { kv, ..OPTIONS };
    Some(source.load_ranks(group, backends, options, |_, _| ()).expect("the fixture loads"))
}

#[test]
fn ranks_say_what_one_device_says() {
    for name in ["qwen2", "qwen3moe"] {
        let Some(one) = cuda() else { return };
        let expected = logits(&mut *model(name, one, OPTIONS.kv), [LENGTH; 2]);
        let largest = expected.iter().flatten().fold(0f32, |a, x| a.max(x.abs()));
        // Through the host, which ranks on one GPU always go through, after the first step in each other's memory, and by a switch if there is
        // one.
        for (world, access) in [(2, PeerAccess::Never), (2, PeerAccess::Auto), (4, PeerAccess::Multicast)] {
            let Some(mut ranks) = in_ranks(name, Group::new(world), OPTIONS.kv, access) else { return };
            for chunks in [[LENGTH, LENGTH], [16, 7], [1, 1]] {
                let found = logits(&mut *ranks.model, chunks);
                let pairs = found.iter().flatten().zip(expected.iter().flatten());
                let worst = pairs.fold(0f32, |a, (x, y)| a.max((x - y).abs()));
                assert!(found.iter().flatten().all(|x| x.is_finite()));
                assert!(worst < 0.03 * largest, "{name} {chunks:?}: {worst} of {largest}");
            }
        }
    }
    // Each takes a fifth of what is free, both of one device where they share it.
    let Some(share) = cuda().map(|cuda| all_but(&cuda, 0.8)) else { return };
    let Some(shared) = in_ranks("qwen2", Group::new(2), share, PeerAccess::Auto) else { return };
    assert!(shared.kv_blocks > 8);
}

/// The share of a device's memory that leaves so much of what is free now, whoever else uses the device.
fn all_but(cuda: &Cuda, left: f64) -> KvSize {
    let (free, total) = cuda.memory().expect("a working device").expect("it has memory of its own");
    KvSize::DeviceShare(1.0 - left * free as f64 / total as f64)
}

#[test]
fn a_share_of_the_memory_becomes_kv_cache_after_a_largest_step() {
    let Some(cuda) = cuda() else { return };
    let emulated = !on_gpu(&cuda);
    let path = fixture("qwen2");
    let options = LoadOptions { kv: all_but(&cuda, 0.5), ..OPTIONS };
    let loaded = load(&path, cuda, options, |_, _| ()).expect("the fixture loads");
    // Emulated, 1 of 2 MiB is free.
    assert!(loaded.kv_blocks > 8 && (!emulated || loaded.kv_bytes <= 512 * 1024));
    assert_eq!(loaded.kv_bytes % loaded.kv_blocks as u64, 0);
    let mut model = loaded.model;
    let found = logits(&mut *model, [16, 7]);
    assert!(found.iter().flatten().all(|x| x.is_finite()));
    let Some(cuda) = common::cuda() else { return };
    let options = LoadOptions { kv: KvSize::DeviceShare(0.0001), ..OPTIONS };
    let refusal = load(&path, cuda, options, |_, _| ()).err().expect("no room").to_string();
    assert!(refusal.contains("no room for a KV cache"), "{refusal}");
}

/// Tokens that `sequences` greedy streams of their own prompts draw in `steps` steps.
fn decode(model: &mut dyn Model, sequences: usize, steps: usize) -> Vec<u32> {
    let params = SamplingParams { temperature: 0.0, ..Default::default() };
    let row = |position| SampleRow {
        params: &params,
        counts: None,
        drafted: &[],
        position,
        mask: None,
        forced: None,
    };
    let (mut tokens, mut drawn, mut batch) = (Vec::new(), Vec::new(), Batch::default());
    for s in 0..sequences as u32 {
        batch.push(&[s + 1, 2 * s + 3, 5], 0, &[s], 1);
    }
    for step in 0..steps {
        model.forward(&batch).expect("a step");
        let logits = model.logits().expect("logits");
        assert_eq!(logits.len(), sequences * model.config().vocab);
        model.sample(&vec![row(step as u64); sequences], &mut drawn).expect("tokens");
        tokens.extend(drawn.iter().map(|sampled| sampled.token));
        batch.clear();
        for (s, sampled) in drawn.iter().enumerate() {
            batch.push(&[sampled.token], 3 + step, &[s as u32], 1);
        }
    }
    tokens
}

/// Nine sequences are padded to ten rows; each decode step comes again, so that on a GPU it runs as a graph, as kernels that begin while the ones
/// before them still run, or as both.
#[test]
fn padded_decode_steps_draw_what_plain_ones_draw() {
    for name in ["qwen2", "qwen3moe", "gptoss-mxfp4"] {
        let options = LoadOptions { kv: KvSize::Blocks(16), ..OPTIONS };
        let load = |graphs, dependent_launches| {
            let mut cuda = cuda()?;
            cuda.set_graphs(graphs).expect("nothing was queued");
            cuda.set_dependent_launches(dependent_launches).expect("nothing was queued");
            Some(load(&fixture(name), cuda, options, |_, _| ()).expect("the fixture loads").model)
        };
        let Some(mut plain) = load(false, false) else { return };
        let alone = decode(&mut *plain, 1, 8);
        let expected = decode(&mut *plain, 9, 8);
        assert_eq!(expected.iter().step_by(9).copied().collect::<Vec<_>>(), alone);
        for (graphs, dependent_launches) in [(false, true), (true, false), (true, true)] {
            let Some(mut model) = load(graphs, dependent_launches) else { return };
            // Twice, so that the second time finds every graph there.
            for _ in 0..2 {
                let found = decode(&mut *model, 9, 8);
                assert_eq!(
                    found, expected,
                    "{name}, graphs: {graphs}, dependent launches: {dependent_launches}"
                );
            }
        }
    }
}

/// What `--device auto` asks of a GPU before it takes it.
#[test]
fn the_device_passes_the_check_of_its_backend() {
    for name in ["tiny", "tiny-fp8"] {
        let Some(cuda) = cuda() else { return };
        let source = ModelSource::dummy(name).expect("it is compiled in");
        let found = worst_difference(&source, Reference::new(), cuda).expect("both run");
        assert!(found.worst() < 0.03, "{name}: {found:?}");
    }
}
