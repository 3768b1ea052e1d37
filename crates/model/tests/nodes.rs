//! A model over several nodes, here threads that talk over TCP, says what as many ranks of one process say, bit for bit, and outlives
//! steps that fail.

mod support;

use std::net::TcpListener;
use std::path::Path;
use std::time::Duration;

use rudder_comm::{Group, Terms};
use rudder_model::{KvSize, LoadError, LoadOptions, Loaded, Model, ModelSource, Node};
use rudder_ops::Batch;
use rudder_ops::cpu::{Cpu, KvDType};
use support::{expected, fixture};

const OPTIONS: LoadOptions =
    LoadOptions { max_batch_tokens: 80, max_outputs: 80, kv: KvSize::Blocks(8), max_context: 64 };

fn cpus(group: &Group) -> Vec<Cpu> {
    group.members().into_iter().map(|member| Cpu::new(1, KvDType::F32).in_group(member)).collect()
}

/// What each node says of loading, node 0 first, each with options of its own.
fn load(
    path: &Path,
    world: usize,
    options: &[LoadOptions],
) -> (Result<Loaded, LoadError>, Vec<Result<Node, LoadError>>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("an address").to_string();
    let terms = Terms { nodes: options.len(), world, others: Vec::new() };
    let source = ModelSource::open(path).expect("a fixture");
    std::thread::scope(|scope| {
        let (terms, address, source) = (&terms, &address, &source);
        let patience = Duration::from_secs(30);
        let nodes: Vec<_> = (1..options.len())
            .map(|node| {
                scope.spawn(move || {
                    let group = Group::follow(address, node, terms, patience).expect("it joins");
                    source.load_node(group.clone(), cpus(&group), options[node], |_, _| ())
                })
            })
            .collect();
        let group = Group::lead(listener, terms, patience).expect("all join");
        let loaded = source.load_ranks(group.clone(), cpus(&group), options[0], |_, _| ());
        drop(group);
        (loaded, nodes.into_iter().map(|node| node.join().expect("no panic")).collect())
    })
}

/// Logits of a prompt in two chunks, a neighbour beside them, then of ten greedy tokens.
fn logits(model: &mut dyn Model, ids: &[Vec<u32>]) -> Vec<u32> {
    let (mut batch, mut bits, vocab) = (Batch::default(), Vec::new(), model.config().vocab);
    let mut step = |model: &mut dyn Model, pieces: &[(&[u32], usize, &[u32])]| {
        batch.clear();
        pieces.iter().for_each(|(tokens, computed, blocks)| batch.push(tokens, *computed, blocks, 1));
        model.forward(&batch).expect("a step");
        let logits = model.logits().expect("logits");
        bits.extend(logits.iter().map(|x| x.to_bits()));
        let last = &logits[logits.len() - vocab..];
        let best = (0..vocab).max_by(|&a, &b| last[a].total_cmp(&last[b])).expect("a vocabulary");
        best as u32
    };
    let (blocks, beside) = ([5, 0, 3, 7], [1, 6, 2, 4]);
    step(model, &[(&ids[0][..17], 0, &blocks)]);
    let mut token = step(model, &[(&ids[1], 0, &beside), (&ids[0][17..], 17, &blocks)]);
    for i in 0..10 {
        token = step(model, &[(&[token], ids[0].len() + i, &blocks)]);
    }
    bits
}

#[test]
fn nodes_say_what_ranks_of_one_process_say_bit_for_bit() {
    for (name, nodes, world) in [("qwen2", 2, 2), ("qwen3moe", 2, 4), ("gptoss", 4, 4)] {
        let (path, ids) = (fixture(name), expected(name).ids);
        let group = Group::new(world);
        let one =
            ModelSource::open(&path).unwrap().load_ranks(group.clone(), cpus(&group), OPTIONS, |_, _| ());
        let wanted = logits(&mut *one.unwrap().model, &ids);
        let (loaded, others) = load(&path, world, &vec![OPTIONS; nodes]);
        std::thread::scope(|scope| {
            let running: Vec<_> =
                others.into_iter().map(|node| node.unwrap()).map(|node| scope.spawn(|| node.run())).collect();
            let mut model = loaded.unwrap().model;
            assert!(logits(&mut *model, &ids) == wanted, "{name}, {world} ranks on {nodes} nodes");
            assert!(model.kv_block().is_none());
            // All refuse it, and go on.
            let mut batch = Batch::default();
            batch.push(&[0; 81], 0, &[0; 6], 1);
            assert!(model.forward(&batch).unwrap_err().to_string().contains("81 tokens"));
            assert!(logits(&mut *model, &ids) == wanted, "{name} after a step that failed");
            drop(model);
            assert!(running.into_iter().all(|node| node.join().expect("no panic").is_ok()));
        });
    }
}

#[test]
fn nodes_take_node_0s_options_and_as_many_blocks_as_the_least_of_them_holds() {
    let other = LoadOptions { max_batch_tokens: 3, max_outputs: 2, kv: KvSize::Blocks(6), max_context: 10 };
    let (loaded, others) = load(&fixture("qwen2"), 2, &[OPTIONS, other]);
    let node = others.into_iter().next().unwrap().unwrap();
    let mut loaded = loaded.unwrap();
    assert_eq!((loaded.kv_blocks, node.kv_blocks), (6, 6));
    std::thread::scope(|scope| {
        let running = scope.spawn(|| node.run());
        let mut batch = Batch::default();
        batch.push(&[1; 60], 0, &[0, 1, 2, 5], 20);
        loaded.model.forward(&batch).unwrap();
        batch.clear();
        batch.push(&[1], 0, &[6], 1);
        assert!(loaded.model.forward(&batch).unwrap_err().to_string().contains("KV block 6 of 6"));
        drop(loaded);
        assert!(running.join().expect("no panic").is_ok());
    });
}

#[test]
fn a_node_that_cannot_load_is_heard_by_all() {
    let other = LoadOptions { kv: KvSize::Blocks(0), ..OPTIONS };
    let (loaded, others) = load(&fixture("qwen2"), 2, &[OPTIONS, other]);
    assert!(loaded.is_err() && others[0].is_err());
    let share = LoadOptions { kv: KvSize::DeviceShare(0.5), ..OPTIONS };
    let (loaded, others) = load(&fixture("qwen2"), 2, &[share, OPTIONS]);
    for message in [loaded.err().unwrap().to_string(), others[0].as_ref().err().unwrap().to_string()] {
        assert!(message.contains("kv_memory is set on some nodes"), "{message}");
    }
}

/// A model of random weights whose config.json says so of activations.
fn declaring(activations: &str) -> ModelSource {
    let folder = tempfile::tempdir().unwrap();
    let json = std::fs::read(fixture("dummy-nvfp4").join("config.json")).unwrap();
    let mut json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let group = format!(r#"{{"a": {{"input_activations": {activations}}}}}"#);
    json["quantization_config"]["config_groups"] = serde_json::from_str(&group).unwrap();
    std::fs::write(folder.path().join("config.json"), json.to_string()).unwrap();
    ModelSource::dummy(&folder.path().to_string_lossy()).unwrap()
}

#[test]
fn a_node_whose_files_declare_other_activations_is_told_so_and_refused() {
    let terms = |activations| {
        let others = declaring(activations).terms().into();
        Terms { nodes: 2, world: 2, others }
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, patience) = (listener.local_addr().unwrap().to_string(), Duration::from_secs(30));
    let ours = terms(r#"{"num_bits": 4, "dynamic": "local"}"#);
    std::thread::scope(|scope| {
        let leader = scope.spawn(|| Group::lead(listener, &ours, patience));
        for (activations, words) in [
            ("null", "none"),
            (r#"{"num_bits": 8, "dynamic": "local"}"#, "8-bit local"),
            (r#"{"num_bits": 4, "dynamic": false}"#, "4-bit static"),
        ] {
            let refusal =
                Group::follow(&address, 1, &terms(activations), patience).err().unwrap().to_string();
            let differs =
                format!("activations in config.json is {words} on node 1 and 4-bit local on node 0; ");
            assert_eq!(refusal, differs + "start all nodes with the same version, settings and model files");
        }
        let node = Group::follow(&address, 1, &ours, patience).unwrap();
        assert_eq!(leader.join().expect("no panic").unwrap().nodes(), node.nodes());
    });
}

#[test]
fn fingerprints_tell_models_apart() {
    let of = |name: &str| ModelSource::open(&fixture(name)).unwrap().fingerprint();
    assert_eq!(of("qwen2"), of("qwen2"));
    assert!(of("qwen2") != of("qwen3") && of("qwen3moe") != of("qwen3moe-raw-weights"));
}
