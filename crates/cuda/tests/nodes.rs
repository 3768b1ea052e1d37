//! Two processes that share a model: their emulated devices reach each other's memory by fabric handles, as GPUs of two trays would. They talk
//! over TCP as two machines do.
#![cfg(feature = "emulate")]

use rudder_comm::{Group, Terms};
use rudder_cuda::{Cuda, PeerAccess};
use rudder_model::{KvSize, LoadOptions, Model, ModelSource};
use rudder_ops::Batch;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const OPTIONS: LoadOptions =
    LoadOptions { max_batch_tokens: 80, max_outputs: 80, kv: KvSize::Blocks(8), max_context: 64 };
const PATIENCE: Duration = Duration::from_secs(60);
/// What tells the other process what to do: node 0's address, the fixture, the ranks, how they add up, and its IMEX channel.
const VARIABLE: &str = "RUDDER_TEST_NODE_1";

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures").join(name)
}

fn cudas(group: &Group, access: PeerAccess, imex_channel: u32) -> Vec<Cuda> {
    let cuda =
        |member| Cuda::emulated_in(imex_channel).expect("memory for a device").in_group_by(member, access);
    group.members().into_iter().map(cuda).collect()
}

fn access(name: &str) -> PeerAccess {
    match name {
        "never" => PeerAccess::Never,
        "multicast" => PeerAccess::Multicast,
        _ => PeerAccess::Auto,
    }
}

fn terms(world: usize) -> Terms {
    Terms { nodes: 2, world, others: Vec::new() }
}

/// Node 1, of this number of ranks in all.
fn other_process(address: &str, name: &str, world: usize, access: &str, imex_channel: u32) -> Child {
    let mut command = Command::new(std::env::current_exe().expect("this test's program"));
    command.args(["--exact", "node_1_runs_what_it_is_told", "--nocapture"]).stdout(Stdio::null());
    let told = format!("{address} {name} {world} {access} {imex_channel}");
    command.env(VARIABLE, told).spawn().expect("another process")
}

/// In the other process it is node 1; as a test of its own there is nothing to do.
#[test]
fn node_1_runs_what_it_is_told() {
    let Ok(told) = std::env::var(VARIABLE) else { return };
    let words: Vec<_> = told.split(' ').collect();
    let [address, name, world, how, imex_channel] = words[..] else { panic!("{told}") };
    let (world, imex_channel) = (world.parse().expect("ranks"), imex_channel.parse().expect("a channel"));
    let group = Group::follow(address, 1, &terms(world), PATIENCE).expect("it joins");
    let cudas = cudas(&group, access(how), imex_channel);
    let source = ModelSource::open(&fixture(name)).expect("a fixture");
    source.load_node(group, cudas, OPTIONS, |_, _| ()).expect("it loads").run().expect("node 0 stays");
}

/// Logits of a prompt in two chunks, a neighbour beside them, then of some tokens: steps of many rows and of few.
fn logits(model: &mut dyn Model) -> Vec<u32> {
    let (mut batch, mut bits, vocab) = (Batch::default(), Vec::new(), model.config().vocab as u32);
    let tokens: Vec<u32> = (0..40).map(|i| (i * i + 7 * i) % vocab).collect();
    let (blocks, beside) = ([5, 0, 3], [1, 6, 2]);
    let mut step = |pieces: &[(&[u32], usize, &[u32])]| {
        batch.clear();
        pieces.iter().for_each(|(tokens, computed, blocks)| batch.push(tokens, *computed, blocks, 1));
        model.forward(&batch).expect("a step");
        bits.extend(model.logits().expect("logits").iter().map(|x| x.to_bits()));
    };
    step(&[(&tokens[..17], 0, &blocks)]);
    step(&[(&tokens[20..], 0, &beside), (&tokens[17..20], 17, &blocks)]);
    (20..24).for_each(|i| step(&[(&tokens[i..=i], i, &blocks), (&tokens[i..=i], i, &beside)]));
    bits
}

/// What the ranks of one process say.
fn in_one_process(name: &str, world: usize, how: &str) -> Vec<u32> {
    let (group, source) = (Group::new(world), ModelSource::open(&fixture(name)).expect("a fixture"));
    let loaded = source.load_ranks(group.clone(), cudas(&group, access(how), 0), OPTIONS, |_, _| ());
    logits(&mut *loaded.expect("it loads").model)
}

/// What those of two processes say, whose devices are in channel 0 and in this, and whether they reached each other's memory.
fn in_two_processes(name: &str, world: usize, how: &str, imex_channel: u32) -> (Vec<u32>, bool) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("an address").to_string();
    let mut other = other_process(&address, name, world, how, imex_channel);
    let group = Group::lead(listener, &terms(world), PATIENCE).expect("node 1 joins");
    let source = ModelSource::open(&fixture(name)).expect("a fixture");
    let loaded = source.load_ranks(group.clone(), cudas(&group, access(how), 0), OPTIONS, |_, _| ());
    let mut model = loaded.expect("it loads").model;
    let bits = logits(&mut *model);
    // Devices' memory is mapped from a file only where other processes can map it too, and stays so only where all have.
    let maps = std::fs::read_to_string("/proc/self/maps").expect("what this process maps");
    drop((model, group));
    assert!(other.wait().expect("it ends").success());
    (bits, maps.contains("memfd:rudder"))
}

/// One test, since what is mapped is the process's.
#[test]
fn ranks_of_two_processes_add_up_in_each_others_memory_to_the_bits_of_one_or_all_through_the_hosts() {
    for (name, world) in [("qwen2", 4), ("qwen3moe", 2)] {
        for how in ["auto", "multicast"] {
            let expected = in_one_process(name, world, how);
            assert!(in_two_processes(name, world, how, 0) == (expected, true), "{name}, {how}");
        }
        let expected = in_one_process(name, world, "never");
        // Neither node can import what the other has.
        assert!(in_two_processes(name, world, "multicast", 1) == (expected, false), "{name}");
    }
}
