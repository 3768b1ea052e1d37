//! The engine over a model that is cut into ranks: it answers as over a model in one piece, with the prefix cache, in chunks, under
//! preemption and from KV on disk.

mod common;

use common::{CONFIG, ask, ask_at_once, assert_whole, checkpoint, eventually, model, prompt, request, start};
use rudder_comm::Group;
use rudder_engine::{DiskTier, Engine, EngineConfig, GenerateRequest, TierConfig};
use rudder_model::{KvSize, LoadOptions, Model, ModelSource};
use rudder_ops::cpu::{Cpu, KvDType};

/// The checkpoint of [`model`] in two ranks.
fn ranks(config: &EngineConfig) -> Box<dyn Model> {
    let group = Group::new(2);
    let cpus = group.members().into_iter().map(|member| Cpu::new(1, KvDType::F32).in_group(member)).collect();
    let options = LoadOptions {
        max_batch_tokens: config.max_batch_tokens,
        max_outputs: config.max_sequences + config.draft.max_drafted(),
        kv: KvSize::Blocks(config.kv_blocks),
        max_context: config.max_context,
    };
    let source = ModelSource::open(&checkpoint()).expect("the fixture is there");
    source.load_ranks(group, cpus, options, |_, _| ()).expect("the fixture loads").model
}

fn requests() -> Vec<GenerateRequest> {
    (0..6).map(|i| request(prompt(i, 70), 64)).collect()
}

fn ids(answers: &[common::Answer]) -> Vec<Vec<u32>> {
    answers.iter().map(common::Answer::ids).collect()
}

#[test]
fn greedy_answers_are_those_of_one_piece_chunked_cached_and_preempted() {
    let expected = ids(&ask_at_once(&start(EngineConfig { prefix_cache: false, ..CONFIG }), &requests()));
    for (max_batch_tokens, kv_blocks) in [(64, 256), (9, 256), (64, 16)] {
        let config = EngineConfig { max_batch_tokens, kv_blocks, ..CONFIG };
        let engine = Engine::start(ranks(&config), config);
        assert_eq!(ids(&ask_at_once(&engine, &requests())), expected, "{max_batch_tokens} {kv_blocks}");
        assert_eq!(engine.stats().preemptions > 0, kv_blocks == 16);
        let again = ask(&engine, request(prompt(5, 70), 64));
        assert_eq!(again.ids(), expected[5]);
        assert!(again.usage.cached_tokens > 0 || kv_blocks == 16);
        assert_whole(&engine);
    }
}

#[test]
fn ranks_go_on_from_their_kv_on_disk_and_one_piece_does_not_take_it_for_its_own() {
    const ROOMY: EngineConfig = EngineConfig { kv_blocks: 512, max_context: 512, ..CONFIG };
    let folder = tempfile::tempdir().unwrap();
    let tier = TierConfig { folder: folder.path().to_owned(), capacity: 256 << 20 };
    let turn = || request(prompt(1, 400), 40);
    let start = |model: Box<dyn Model>| {
        // The threads of the engine before let the folder go a moment after its last handle is gone.
        let mut disk = None;
        eventually("a free folder", || {
            disk = DiskTier::open(&tier, &*model).ok().map(DiskTier::patient);
            disk.is_some()
        });
        Engine::start_with(model, ROOMY, disk)
    };
    let stop = |engine: Engine| {
        assert_whole(&engine);
        eventually("an empty queue", || engine.stats().tier.queued == 0);
    };
    let first = start(ranks(&ROOMY));
    let expected = ask(&first, turn());
    stop(first);
    let second = start(ranks(&ROOMY));
    let answer = ask(&second, turn());
    assert_eq!((answer.ids(), answer.usage.cached_tokens), (expected.ids(), 384));
    stop(second);
    let one = start(model(&ROOMY));
    let answer = ask(&one, turn());
    assert_eq!((answer.ids(), answer.usage.cached_tokens), (expected.ids(), 0));
}
