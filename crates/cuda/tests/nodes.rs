//! Two processes that share a model: their emulated devices reach each other's memory by fabric handles, as GPUs of two trays would. They talk
//! over TCP as two machines do.
#![cfg(feature = "emulate")]

mod common;
#[path = "common/flights.rs"]
mod flights;

use common::{OPTIONS, fixture};
use flights::{
    Grounded, Watched, When, ask, drawn, engine, expect_answers, expect_preempted, faults, greedy, in_turn,
    limits_and_stops,
};
use rudder_comm::{Group, Terms};
use rudder_cuda::{Cuda, PeerAccess};
use rudder_model::{KvSize, LoadOptions, Model, ModelSource};
use rudder_ops::Batch;
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// More blocks than any node 0 of these tests has, which decides.
const OPTIONS_OF_NODE_1: LoadOptions = LoadOptions { kv: KvSize::Blocks(32), ..OPTIONS };
/// How two processes' ranks reach each other's memory: from the second step on, and at once, a switch adding up.
const RANKS: [(usize, &str); 2] = [(2, "auto"), (4, "multicast")];
const PATIENCE: Duration = Duration::from_secs(60);
/// What tells the other process what to do: node 0's address, the fixture, the ranks, how they add up, and its IMEX channel.
const VARIABLE: &str = "RUDDER_TEST_NODE_1";

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
    source
        .load_node(group, cudas, OPTIONS_OF_NODE_1, |_, _| ())
        .expect("it loads")
        .run()
        .expect("node 0 stays");
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

/// Held by each test: what is mapped is the process's.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The ranks of a group as node 0 has them, with so many KV blocks.
fn load(group: &Group, name: &str, how: &str, kv_blocks: usize) -> Box<dyn Model> {
    let source = ModelSource::open(&fixture(name)).expect("a fixture");
    let options = LoadOptions { kv: KvSize::Blocks(kv_blocks), ..OPTIONS };
    let loaded = source.load_ranks(group.clone(), cudas(group, access(how), 0), options, |_, _| ());
    loaded.expect("it loads").model
}

/// The ranks of one process.
fn one_process(name: &str, world: usize, how: &str, kv_blocks: usize) -> Box<dyn Model> {
    load(&Group::new(world), name, how, kv_blocks)
}

/// Those of two processes, of which the other's devices are in this channel and node 0's in channel 0; their group here, and the other process.
fn two_processes(
    name: &str,
    (world, how): (usize, &str),
    imex_channel: u32,
    kv_blocks: usize,
) -> (Box<dyn Model>, Group, Child) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("an address").to_string();
    let other = other_process(&address, name, world, how, imex_channel);
    let group = Group::lead(listener, &terms(world), PATIENCE).expect("node 1 joins");
    (load(&group, name, how, kv_blocks), group, other)
}

/// Lets go of the group, whereupon the other process ends well.
fn end(group: Group, mut other: Child) {
    drop(group);
    assert!(other.wait().expect("it ends").success());
}

/// What those of two processes say, and whether they reached each other's memory.
fn in_two_processes(name: &str, world: usize, how: &str, imex_channel: u32) -> (Vec<u32>, bool) {
    let (mut model, group, other) = two_processes(name, (world, how), imex_channel, 8);
    let bits = logits(&mut *model);
    // Devices' memory is mapped from a file only where other processes can map it too, and stays so only where all have.
    let maps = std::fs::read_to_string("/proc/self/maps").expect("what this process maps");
    drop(model);
    end(group, other);
    (bits, maps.contains("memfd:rudder"))
}

#[test]
fn ranks_of_two_processes_add_up_in_each_others_memory_to_the_bits_of_one_or_all_through_the_hosts() {
    let _alone = alone();
    for (name, world) in [("qwen2", 4), ("qwen3moe", 2)] {
        for how in ["auto", "multicast"] {
            let expected = logits(&mut *one_process(name, world, how, 8));
            assert!(in_two_processes(name, world, how, 0) == (expected, true), "{name}, {how}");
        }
        let expected = logits(&mut *one_process(name, world, "never", 8));
        // Neither node can import what the other has.
        assert!(in_two_processes(name, world, "multicast", 1) == (expected, false), "{name}");
    }
}

#[test]
fn an_engine_over_two_processes_answers_as_over_one_with_steps_in_flight_to_every_limit_and_stop() {
    let _alone = alone();
    for (world, how) in RANKS {
        let grounded = || Box::new(Grounded(one_process("qwen2", world, how, 16)));
        let full = in_turn(grounded(), &[drawn(2, 24)]).remove(0);
        assert_eq!(full.len(), 24);
        let requests = limits_and_stops(&full);
        let expected = in_turn(grounded(), &requests);
        // To land each step over two processes takes long, and the way of sums makes no difference there.
        for flies in [true, false].into_iter().filter(|flies| *flies || how == "auto") {
            let (model, group, other) = two_processes("qwen2", (world, how), 0, 16);
            let (watched, flights) = Watched::new(model, None);
            let model: Box<dyn Model> =
                if flies { Box::new(watched) } else { Box::new(Grounded(Box::new(watched))) };
            assert_eq!(in_turn(model, &requests), expected, "{world} ranks, {how}");
            assert_eq!(flights.load(Ordering::SeqCst) > 40, flies);
            end(group, other);
        }
    }
}

#[test]
fn an_engine_over_two_processes_answers_each_its_own_side_by_side_and_preempted() {
    let _alone = alone();
    let (model, group, other) = two_processes("qwen2", (2, "auto"), 0, 8);
    let (flying, flights) = Watched::new(model, None);
    expect_preempted(&engine(Box::new(flying), 8));
    assert!(flights.load(Ordering::SeqCst) > 10);
    end(group, other);
}

#[test]
fn steps_land_one_by_one_over_two_processes_that_do_not_reach_each_others_memory() {
    let _alone = alone();
    let (model, group, other) = two_processes("qwen2", (2, "auto"), 1, 16);
    let (grounded, flights) = Watched::new(model, None);
    expect_answers(&engine(Box::new(grounded), 16), &[greedy(1, 12)]);
    assert_eq!(flights.load(Ordering::SeqCst), 0);
    end(group, other);
}

#[test]
fn a_rank_that_fails_in_flight_ends_its_requests_on_both_nodes_and_the_engine_goes_on() {
    let _alone = alone();
    for (ranks, fault) in RANKS.into_iter().flat_map(|ranks| [0, 1, 2].map(|fault| (ranks, fault))) {
        let (model, group, other) = two_processes("qwen2", ranks, 0, 16);
        let (when, what, said) =
            faults(&group, ranks.0 / 2 - 1).into_iter().nth(fault).expect("one of three");
        let (flying, flights) = Watched::new(model, Some((when, what)));
        let engine = engine(Box::new(flying), 16);
        let requests = [greedy(1, 12), greedy(4, 12)];
        let failed = ask(&engine, &requests);
        assert!(failed.iter().any(|answer| answer.as_ref().is_err_and(|m| m.contains(said))), "{failed:?}");
        let before = flights.load(Ordering::SeqCst);
        expect_answers(&engine, &requests);
        assert!(flights.load(Ordering::SeqCst) > before + 4);
        drop(engine);
        end(group, other);
    }
}

#[test]
fn a_node_that_dies_with_a_step_in_flight_ends_the_requests_with_its_name_and_not_the_engine() {
    let _alone = alone();
    for when in [When::Queued(3), When::Landing] {
        let (model, group, mut other) = two_processes("qwen2", (2, "auto"), 0, 16);
        let dies = move || {
            other.kill().expect("it runs");
            assert!(!other.wait().expect("it has ended").success());
            Ok(())
        };
        let (flying, _) = Watched::new(model, Some((when, Box::new(dies))));
        let engine = engine(Box::new(flying), 16);
        let requests = [greedy(1, 12), greedy(4, 12)];
        // Those that come after it as well.
        for _ in 0..2 {
            for answer in ask(&engine, &requests) {
                let message = answer.expect_err("a node is gone");
                assert!(message.contains("node 1 at 127.0.0.1 is gone"), "{message}");
            }
        }
        assert!(group.lost().is_some_and(|failed| failed.rank == 1));
    }
}
