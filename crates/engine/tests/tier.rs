//! KV blocks on disk: a restarted engine goes on from them, and no fault of the disk harms an answer.

mod common;

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::task::{Context, Waker};
use std::time::{Duration, SystemTime};

use common::{
    Answer, CONFIG, ask, assert_whole, checkpoint, collect, eventually, model, model_at, prompt, request,
};
use rudder_engine::{
    Constraint, DiskTier, Engine, EngineConfig, Event, GenerateRequest, Grammar, Next, TierConfig, TierError,
};
use rudder_kvstore::{Disk, Medium, SegmentFile, StoreError};
use rudder_model::Model;

const ROOMY: EngineConfig = EngineConfig { kv_blocks: 512, max_context: 512, max_sequences: 8, ..CONFIG };
const CAPACITY: u64 = 256 << 20;

/// An engine whose disk misbehaves as the switches say.
fn start_on(folder: &Path, switches: &Arc<Switches>) -> Engine {
    start_as(model(&ROOMY), folder, switches)
}

fn start_as(model: Box<dyn Model>, folder: &Path, switches: &Arc<Switches>) -> Engine {
    start_with(model, ROOMY, folder, switches)
}

fn start_with(
    model: Box<dyn Model>,
    config: EngineConfig,
    folder: &Path,
    switches: &Arc<Switches>,
) -> Engine {
    let tier = open(&*model, folder, switches).patient();
    Engine::start_with(model, config, Some(tier))
}

fn open(model: &dyn Model, folder: &Path, switches: &Arc<Switches>) -> DiskTier {
    // The threads of the engine before let the folder go a moment after its last handle is gone.
    let mut disk = None;
    eventually("a free folder", || {
        disk = Disk::open(folder).ok();
        disk.is_some()
    });
    let medium = Arc::new(Failing { disk: disk.unwrap(), switches: switches.clone() });
    DiskTier::open_on(medium, CAPACITY, model).unwrap()
}

fn start(folder: &Path) -> Engine {
    start_on(folder, &Arc::default())
}

/// Waits until everything is written or dropped; ends the engine.
fn stop(engine: Engine) {
    assert_whole(&engine);
    eventually("an empty queue", || engine.stats().tier.queued == 0);
    drop(engine);
}

/// The files that blocks are kept in.
fn segments(folder: &Path) -> Vec<PathBuf> {
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|e| e == "kv")).collect()
}

const TURN: usize = 400;

/// What an engine without a disk says.
fn expected(seed: u32) -> Answer {
    ask(&Engine::start(model(&ROOMY), ROOMY), request(prompt(seed, TURN), 40))
}

fn turn(engine: &Engine, seed: u32) -> Answer {
    ask(engine, request(prompt(seed, TURN), 40))
}

#[test]
fn a_restarted_engine_finds_its_blocks_and_answers_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let wanted = expected(1);
    let engine = start(folder.path());
    let first = turn(&engine, 1);
    assert_eq!((first.ids(), first.usage.cached_tokens), (wanted.ids(), 0));
    eventually("all blocks on disk", || engine.stats().tier.store.written == (TURN as u64 + 39) / 16);
    stop(engine);

    let engine = start(folder.path());
    let again = turn(&engine, 1);
    assert_eq!(again.ids(), wanted.ids());
    assert_eq!(again.usage.cached_tokens, (TURN - 1) / 16 * 16);
    // A follow-up turn goes on from the answer's blocks too, which this engine computed.
    let longer = [prompt(1, TURN), wanted.ids(), prompt(5, 20)].concat();
    let without = ask(&Engine::start(model(&ROOMY), ROOMY), request(longer.clone(), 20));
    let follow_up = ask(&engine, request(longer, 20));
    assert_eq!(follow_up.ids(), without.ids());
    assert_eq!(follow_up.usage.cached_tokens, (TURN + 39) / 16 * 16);
    assert_whole(&engine);
    let stats = engine.stats().tier;
    assert_eq!((stats.loads, stats.given_up, stats.dropped), (1, 0, 0), "{stats:?}");
    assert_eq!(stats.store.read, (TURN as u64 - 1) / 16);
}

#[test]
fn many_sequences_resume_side_by_side_with_others_that_compute() {
    let folder = tempfile::tempdir().unwrap();
    let wanted: Vec<_> = (0..6).map(|seed| expected(seed).ids()).collect();
    let engine = start(folder.path());
    (0..4).for_each(|seed| drop(turn(&engine, seed)));
    stop(engine);
    let engine = start(folder.path());
    let running: Vec<_> = (0..6)
        .chain(0..6)
        .map(|seed| (seed as usize, engine.submit(request(prompt(seed, TURN), 40)).unwrap()))
        .collect();
    let cancelled: Vec<_> =
        (0..4).map(|seed| engine.submit(request(prompt(seed, TURN), 40)).unwrap()).collect();
    drop(cancelled);
    for (seed, generation) in running {
        assert_eq!(collect(generation).ids(), wanted[seed], "seed {seed}");
    }
    assert_whole(&engine);
    assert!(engine.stats().tier.loads >= 4);
}

#[test]
fn what_a_preempted_sequence_loads_again_is_not_counted_as_cached() {
    let folder = tempfile::tempdir().unwrap();
    let engine = start(folder.path());
    (0..3).for_each(|seed| drop(turn(&engine, seed)));
    stop(engine);
    // Two prompts of 25 blocks, and less than both answers need.
    let small = EngineConfig { kv_blocks: 54, ..ROOMY };
    let engine = start_with(model(&small), small.clone(), folder.path(), &Arc::default());
    // The first is held at its first token until the others are there.
    let (grammar, gate) = held();
    let mut asked = (0..3).map(|seed| request(prompt(seed, TURN), 100)).collect::<Vec<_>>();
    asked[0].grammar = Some(grammar);
    let asked: Vec<_> = asked.into_iter().map(|request| engine.submit(request).unwrap()).collect();
    drop(gate);
    let answers: Vec<_> = asked.into_iter().map(collect).collect();
    let stats = engine.stats();
    assert!(stats.preemptions > 0 && stats.tier.loads > 3, "{stats:?}");
    for answer in answers {
        assert_eq!(answer.usage.cached_tokens, (TURN - 1) / 16 * 16);
    }
}

#[test]
fn short_sequences_and_scored_prompts_keep_away_from_the_disk() {
    let folder = tempfile::tempdir().unwrap();
    let engine = start(folder.path());
    ask(&engine, request(prompt(1, 100), 20));
    stop(engine);
    let engine = start(folder.path());
    turn(&engine, 1);
    stop(engine);
    let engine = start(folder.path());
    let mut scored = request(prompt(1, TURN), 1);
    scored.prompt_logprobs = true;
    let answer = ask(&engine, scored);
    assert_eq!((answer.scores.len(), answer.usage.cached_tokens), (TURN, 0));
    assert_eq!(engine.stats().tier.store.read, 0);
    assert!(engine.stats().tier.store.blocks > 0);
}

#[test]
fn sessions_on_disk_are_known_pinned_and_forgotten_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let list = |engine: &Engine| runtime.block_on(engine.sessions(Some("a".into()))).unwrap();
    let keys = |engine: &Engine| list(engine).iter().map(|s| s.info.key.to_string()).collect::<Vec<_>>();
    let asked = |seed, session: Option<&str>| GenerateRequest {
        owner: Some("a".into()),
        session: session.map(Into::into),
        ..request(prompt(seed, TURN), 40)
    };
    let engine = start(folder.path());
    for (seed, session) in [(1, Some("a:x")), (2, Some("a:y")), (3, None), (3, None), (1, Some("a:x"))] {
        ask(&engine, asked(seed, session));
    }
    ask(
        &engine,
        GenerateRequest { session: Some("a:short".into()), owner: Some("a".into()), ..request([1, 2], 4) },
    );
    runtime.block_on(engine.pin_session("a:y".into(), true)).unwrap().unwrap();
    stop(engine);

    let engine = start(folder.path());
    let mut known = list(&engine);
    known.sort_by(|a, b| a.info.key.cmp(&b.info.key));
    let [x, y] = &known[..] else { panic!("{known:?}") };
    assert_eq!((&*x.info.key, x.info.turns, x.info.cached_tokens, x.info.pinned), ("a:x", 2, 0, false));
    assert_eq!((&*y.info.key, y.info.turns, y.info.pinned), ("a:y", 1, true));
    assert!(x.is_on_disk_alone() && x.disk_tokens >= Some(256) && x.info.tokens >= TURN, "{x:?}");
    assert!(runtime.block_on(engine.sessions(Some("b".into()))).unwrap().is_empty(), "they are another's");
    let resumed = ask(&engine, asked(1, Some("a:x")));
    assert_eq!(resumed.usage.cached_tokens, (TURN - 1) / 16 * 16);
    assert_eq!(list(&engine).iter().find(|s| &*s.info.key == "a:x").unwrap().info.turns, 3);
    assert!(runtime.block_on(engine.remove_session("a:y".into())).unwrap());
    assert_eq!(keys(&engine), ["a:x"]);
    stop(engine);

    let engine = start(folder.path());
    assert_eq!(keys(&engine), ["a:x"]);
    assert_eq!(ask(&engine, asked(2, None)).usage.cached_tokens, 0, "what was forgotten is not found");
    stop(engine);
}

#[test]
fn sessions_of_which_nothing_is_left_on_disk_are_not_known() {
    let folder = tempfile::tempdir().unwrap();
    let engine = start(folder.path());
    ask(&engine, GenerateRequest { session: Some("x".into()), ..request(prompt(1, TURN), 40) });
    stop(engine);
    segments(folder.path()).iter().for_each(|file| std::fs::remove_file(file).unwrap());
    let engine = start(folder.path());
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    assert!(runtime.block_on(engine.sessions(None)).unwrap().is_empty());
    stop(engine);
    let left = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(left.into_iter().all(|name| !name.to_string_lossy().ends_with(".record")));
}

#[test]
fn a_session_is_known_although_its_first_turn_never_ended() {
    let (folder, left) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let engine = start(folder.path());
    let (grammar, gate) = held();
    let session = Some(Arc::from("first"));
    let turn = GenerateRequest { session, grammar: Some(grammar), ..request(prompt(1, TURN), 100) };
    let generation = engine.submit(turn).unwrap();
    let files = || std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path());
    // The last step of the prompt waits for the grammar.
    eventually("all other blocks", || engine.stats().tier.store.written == (TURN as u64 - 1) / 16);
    assert!(files().any(|path| path.extension().is_some_and(|e| e == "record")));
    // What a process leaves that is killed now.
    for file in files() {
        std::fs::copy(&file, left.path().join(file.file_name().unwrap())).unwrap();
    }
    assert_eq!(engine.stats().running, 1, "the turn ended before it could be cut short");
    drop(generation);
    drop(gate);
    stop(engine);

    let engine = start(left.path());
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let known = runtime.block_on(engine.sessions(None)).unwrap();
    let [session] = &known[..] else { panic!("{known:?}") };
    assert_eq!((&*session.info.key, session.info.turns), ("first", 1));
    assert!(session.is_on_disk_alone() && session.disk_tokens >= Some(256), "{session:?}");
    assert!(session.info.tokens >= TURN, "{session:?}");
    stop(engine);
}

#[test]
fn flipped_bytes_are_never_used() {
    let folder = tempfile::tempdir().unwrap();
    let wanted = expected(1);
    let engine = start(folder.path());
    turn(&engine, 1);
    stop(engine);
    for file in segments(folder.path()) {
        let mut bytes = std::fs::read(&file).unwrap();
        let payloads = bytes.len() / 2;
        bytes[payloads..].iter_mut().step_by(1000).for_each(|b| *b ^= 4);
        std::fs::write(&file, bytes).unwrap();
    }
    let engine = start(folder.path());
    let answer = turn(&engine, 1);
    assert_eq!(answer.ids(), wanted.ids());
    assert!(answer.usage.cached_tokens < (TURN - 1) / 16 * 16);
    assert_whole(&engine);
    let stats = engine.stats().tier;
    assert_eq!((stats.given_up, stats.store.damaged), (1, 1), "{stats:?}");
}

#[test]
fn a_torn_file_gives_what_is_whole_and_the_rest_is_computed() {
    let folder = tempfile::tempdir().unwrap();
    let wanted = expected(1);
    let engine = start(folder.path());
    turn(&engine, 1);
    stop(engine);
    let file = &segments(folder.path())[0];
    let whole = std::fs::metadata(file).unwrap().len();
    let payload = model(&ROOMY).kv_block().unwrap().bytes as u64;
    std::fs::OpenOptions::new().write(true).open(file).unwrap().set_len(whole - 10 * payload).unwrap();
    let engine = start(folder.path());
    let answer = turn(&engine, 1);
    assert_eq!(answer.ids(), wanted.ids());
    let cached = answer.usage.cached_tokens;
    assert!((1..(TURN - 1) / 16 * 16).contains(&cached), "{cached}");
    let stats = engine.stats().tier;
    assert!((10..=12).contains(&stats.store.torn) && stats.loads == 1 && stats.given_up == 0, "{stats:?}");
    assert_whole(&engine);
}

#[test]
fn a_model_with_other_weights_uses_nothing_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let engine = start(folder.path());
    turn(&engine, 1);
    stop(engine);
    let altered = tempfile::tempdir().unwrap();
    std::fs::copy(checkpoint().join("config.json"), altered.path().join("config.json")).unwrap();
    let mut weights = std::fs::read(checkpoint().join("model.safetensors")).unwrap();
    let half = weights.len() / 2;
    weights[half..].iter_mut().step_by(64).for_each(|b| *b ^= 1);
    std::fs::write(altered.path().join("model.safetensors"), weights).unwrap();
    let other = || model_at(altered.path(), &ROOMY);

    let engine = start_as(other(), folder.path(), &Arc::default());
    let answer = turn(&engine, 1);
    let wanted = ask(&Engine::start(other(), ROOMY), request(prompt(1, TURN), 40));
    assert_eq!((answer.ids(), answer.usage.cached_tokens), (wanted.ids(), 0));
    let stats = engine.stats().tier;
    assert_eq!((stats.store.foreign, stats.store.read, stats.loads), (1, 0, 0), "{stats:?}");
    stop(engine);
    let engine = start(folder.path());
    assert!(turn(&engine, 1).usage.cached_tokens > 0, "the first model's blocks are still there");
}

#[test]
fn no_time_of_day_bears_on_what_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let wanted = expected(1);
    let engine = start(folder.path());
    turn(&engine, 1);
    stop(engine);
    let year = Duration::from_secs(365 * 24 * 3600);
    for time in [SystemTime::UNIX_EPOCH, SystemTime::now() + 20 * year] {
        for file in segments(folder.path()) {
            std::fs::File::options().write(true).open(file).unwrap().set_modified(time).unwrap();
        }
        let engine = start(folder.path());
        let answer = turn(&engine, 1);
        assert_eq!((answer.ids(), answer.usage.cached_tokens), (wanted.ids(), (TURN - 1) / 16 * 16));
        stop(engine);
    }
}

#[test]
fn an_unreadable_disk_is_left_alone_after_a_while_and_every_turn_is_served() {
    let folder = tempfile::tempdir().unwrap();
    let engine = start(folder.path());
    (0..6).for_each(|seed| drop(turn(&engine, seed)));
    stop(engine);
    let expected: Vec<_> = (0..6).map(|seed| expected(seed).ids()).collect();
    let switches = Arc::new(Switches::default());
    let engine = start_on(folder.path(), &switches);
    switches.unreadable.store(true, Ordering::SeqCst);
    let mut answers: Vec<_> = (0..3).map(|seed| turn(&engine, seed)).collect();
    // The others at once, while the disk is left alone: for ten seconds.
    let others = (3..6).map(|seed| request(prompt(seed, TURN), 40)).collect::<Vec<_>>();
    answers.extend(common::ask_at_once(&engine, &others));
    for (answer, expected) in answers.iter().zip(expected) {
        assert_eq!((answer.ids(), answer.usage.cached_tokens), (expected, 0));
    }
    assert_whole(&engine);
    let stats = engine.stats().tier;
    assert_eq!((stats.loads, stats.given_up, stats.prefills), (3, 3, 3), "{stats:?}");
    assert!(!stats.reads && stats.store.read_errors == 3);
}

#[test]
fn a_full_disk_costs_nothing_but_what_it_would_have_kept() {
    let folder = tempfile::tempdir().unwrap();
    let switches = Arc::new(Switches::default());
    let engine = start_on(folder.path(), &switches);
    switches.room.store(100_000, Ordering::SeqCst);
    switches.limited.store(true, Ordering::SeqCst);
    for seed in 0..3 {
        assert_eq!(turn(&engine, seed).ids(), expected(seed).ids());
    }
    assert_whole(&engine);
    eventually("an empty queue", || engine.stats().tier.queued == 0);
    let stats = engine.stats().tier;
    assert!(stats.store.write_errors >= 3 && stats.dropped > 0, "{stats:?}");
    stop(engine);
    let engine = start(folder.path());
    assert_eq!(turn(&engine, 0).ids(), expected(0).ids());
}

#[test]
fn what_a_waiting_sequence_will_load_is_fetched_ahead() {
    let folder = tempfile::tempdir().unwrap();
    let engine = start(folder.path());
    turn(&engine, 1);
    stop(engine);
    let single = EngineConfig { max_sequences: 1, ..ROOMY };
    let switches = Arc::new(Switches::default());
    let engine = start_with(model(&single), single, folder.path(), &switches);
    let (grammar, gate) = held();
    let mut long = request(prompt(2, 100), 400);
    long.grammar = Some(grammar);
    let first = engine.submit(long).unwrap();
    let waiting = engine.submit(request(prompt(1, TURN), 40)).unwrap();
    // So that there is one more plan, and no end.
    gate.send(()).unwrap();
    eventually("hints", || switches.hints.load(Ordering::SeqCst) == (TURN - 1) / 16);
    assert_eq!(switches.reads.load(Ordering::SeqCst), 2, "a header and a table, as yet no block");
    drop(first);
    drop(gate);
    assert_eq!(collect(waiting).ids(), expected(1).ids());
    let stats = engine.stats().tier;
    assert_eq!((stats.ahead, stats.loads), ((TURN as u64 - 1) / 16, 1), "{stats:?}");
    assert_whole(&engine);
}

#[test]
fn a_slow_disk_holds_nobody_up() {
    let folder = tempfile::tempdir().unwrap();
    let engine = start(folder.path());
    turn(&engine, 1);
    stop(engine);
    let (model, switches) = (model(&ROOMY), Arc::default());
    let impatient = open(&*model, folder.path(), &switches);
    let engine = Engine::start_with(model, ROOMY, Some(impatient));
    switches.millis.store(60_000, Ordering::SeqCst);
    let resumed = engine.submit(request(prompt(1, TURN), 40)).unwrap();
    assert_eq!(turn(&engine, 2).ids(), expected(2).ids(), "another goes on meanwhile");
    assert_eq!(collect(resumed).ids(), expected(1).ids());
    assert_whole(&engine);
    let stats = engine.stats().tier;
    assert_eq!((stats.loads, stats.given_up), (1, 1), "{stats:?}");
    switches.millis.store(0, Ordering::SeqCst);
}

#[test]
fn a_disk_that_writes_slowly_holds_nobody_up() {
    let folder = tempfile::tempdir().unwrap();
    let switches = Arc::new(Switches::default());
    let engine = start_on(folder.path(), &switches);
    switches.write_millis.store(60_000, Ordering::SeqCst);
    for seed in 0..3 {
        assert_eq!(turn(&engine, seed).ids(), expected(seed).ids());
    }
    assert_whole(&engine);
    let stats = engine.stats().tier;
    assert!(stats.queued > 0 && stats.store.written == 0, "{stats:?}");
    switches.write_millis.store(0, Ordering::SeqCst);
    stop(engine);
}

#[test]
fn a_client_that_leaves_while_its_blocks_are_read_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let engine = start(folder.path());
    turn(&engine, 1);
    stop(engine);
    let switches = Arc::new(Switches::default());
    let engine = start_on(folder.path(), &switches);
    let opened = switches.reads.load(Ordering::SeqCst);
    switches.millis.store(60_000, Ordering::SeqCst);
    let resumed = engine.submit(request(prompt(1, TURN), 40)).unwrap();
    eventually("a read", || switches.reads.load(Ordering::SeqCst) > opened);
    drop(resumed);
    assert_whole(&engine);
    switches.millis.store(0, Ordering::SeqCst);
    assert_eq!(turn(&engine, 1).ids(), expected(1).ids());
    assert_whole(&engine);
}

#[test]
fn a_tier_that_cannot_be_is_refused_with_a_reason() {
    let folder = tempfile::tempdir().unwrap();
    let config = |capacity| TierConfig { folder: folder.path().to_owned(), capacity };
    let model = model(&ROOMY);
    assert!(matches!(
        DiskTier::open(&config(10), &*model),
        Err(TierError::Store(StoreError::TooSmall { .. }))
    ));
    let _open = DiskTier::open(&config(CAPACITY), &*model).unwrap();
    assert!(matches!(DiskTier::open(&config(CAPACITY), &*model), Err(TierError::Store(StoreError::InUse))));
}

/// A grammar that allows everything. It gives as many answers as it is told to, and all once nobody can tell it any more.
#[derive(Debug, Clone)]
struct Held(Arc<Mutex<mpsc::Receiver<()>>>);

fn held() -> (Arc<dyn Grammar>, mpsc::Sender<()>) {
    let (answers, told) = mpsc::channel();
    (Arc::new(Held(Arc::new(Mutex::new(told)))), answers)
}

impl Grammar for Held {
    fn start(&self) -> Result<Box<dyn Constraint>, String> {
        Ok(Box::new(self.clone()))
    }
}

impl Constraint for Held {
    fn accept(&mut self, _: u32) -> Result<(), String> {
        Ok(())
    }
    fn next(&mut self, mask: &mut [u32], _: Option<&mut Vec<u32>>) -> Result<Next, String> {
        let _ = self.0.lock().unwrap().recv();
        mask.fill(u32::MAX);
        Ok(Next::Draw)
    }
    fn roll_back(&mut self, _: usize) -> Result<(), String> {
        Ok(())
    }
}

/// A folder whose disk can be full, slow or broken.
struct Failing {
    disk: Disk,
    switches: Arc<Switches>,
}

#[derive(Default)]
struct Switches {
    /// Bytes that can still be written, if limited.
    room: AtomicU64,
    limited: AtomicBool,
    unreadable: AtomicBool,
    /// How long a read takes; it ends early when this is lowered.
    millis: AtomicU64,
    /// How long a write takes, likewise.
    write_millis: AtomicU64,
    reads: AtomicUsize,
    /// Hints that a block will be read.
    hints: AtomicUsize,
}

struct FailingFile(Box<dyn SegmentFile>, Arc<Switches>);

fn linger(millis: &AtomicU64) {
    let mut waited = 0;
    while waited < millis.load(Ordering::SeqCst) {
        std::thread::sleep(Duration::from_millis(5));
        waited += 5;
    }
}

impl Medium for Failing {
    fn names(&self) -> io::Result<Vec<String>> {
        self.disk.names()
    }
    fn create(&self, name: &str) -> io::Result<Box<dyn SegmentFile>> {
        Ok(Box::new(FailingFile(self.disk.create(name)?, self.switches.clone())))
    }
    fn open(&self, name: &str) -> io::Result<Box<dyn SegmentFile>> {
        Ok(Box::new(FailingFile(self.disk.open(name)?, self.switches.clone())))
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        self.disk.remove(name)
    }
}

impl SegmentFile for FailingFile {
    fn size(&self) -> io::Result<u64> {
        self.0.size()
    }
    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        self.1.reads.fetch_add(1, Ordering::SeqCst);
        linger(&self.1.millis);
        match self.1.unreadable.load(Ordering::SeqCst) {
            true => Err(io::Error::other("the disk is broken")),
            false => self.0.read_at(out, offset),
        }
    }
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        linger(&self.1.write_millis);
        if !self.1.limited.load(Ordering::SeqCst) {
            return self.0.write_at(bytes, offset);
        }
        let room = self.1.room.load(Ordering::SeqCst);
        let fits = room.min(bytes.len() as u64);
        self.1.room.store(room - fits, Ordering::SeqCst);
        self.0.write_at(&bytes[..fits as usize], offset)?;
        if fits == bytes.len() as u64 { Ok(()) } else { Err(io::ErrorKind::StorageFull.into()) }
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.discard(offset, len)
    }
    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }
    fn read_ahead(&self, offset: u64, len: u64) {
        self.1.hints.fetch_add(1, Ordering::SeqCst);
        self.0.read_ahead(offset, len);
    }
}

#[tokio::test]
async fn a_session_tells_how_much_of_it_is_on_disk() {
    let folder = tempfile::tempdir().unwrap();
    let engine = start(folder.path());
    let session = Some(Arc::from("s"));
    let turn = GenerateRequest { session, ..request(prompt(1, TURN), 40) };
    let mut generation = engine.submit(turn).unwrap();
    while generation.next().await.is_some() {}
    eventually("an empty queue", || engine.stats().tier.queued == 0);
    let sessions = engine.sessions(None).await.unwrap();
    assert_eq!(sessions.len(), 1);
    // The answer's last token has no KV.
    assert_eq!((sessions[0].info.tokens, sessions[0].disk_tokens), (TURN + 39, Some(256)));
}

async fn turn_of(engine: &Engine, session: &str, seed: u32) -> usize {
    let session = Some(Arc::from(session));
    let mut generation =
        engine.submit(GenerateRequest { session, ..request(prompt(seed, TURN), 40) }).unwrap();
    let mut cached = None;
    while let Some(event) = generation.next().await {
        if let Event::Finished { usage, .. } = event {
            cached = Some(usage.cached_tokens);
        }
    }
    cached.expect("the turn ends")
}

#[tokio::test]
async fn a_session_that_later_ones_displaced_can_be_deleted_from_disk() {
    let folder = tempfile::tempdir().unwrap();
    let engine = start(folder.path());
    turn_of(&engine, "old", 1).await;
    for number in 0..rudder_scheduler::MAX_SESSIONS {
        let session = Some(number.to_string().into());
        let mut generation = engine.submit(GenerateRequest { session, ..request([1, 2], 1) }).unwrap();
        while generation.next().await.is_some() {}
    }
    assert!(engine.session(None, "old".into()).await.unwrap().is_none());
    assert!(engine.stats().tier.store.blocks > 0);
    assert!(engine.remove_session("old".into()).await.unwrap());
    eventually("erased blocks", || engine.stats().tier.store.blocks == 0);
    assert!(!engine.remove_session("old".into()).await.unwrap());
}

#[tokio::test]
async fn nothing_of_a_turn_is_written_after_its_session_was_deleted() {
    let folder = tempfile::tempdir().unwrap();
    let engine = start(folder.path());
    let (grammar, gate) = held();
    let asked = GenerateRequest {
        grammar: Some(grammar),
        session: Some("s".into()),
        ..request(prompt(1, TURN), 100)
    };
    let mut generation = engine.submit(asked).unwrap();
    gate.send(()).unwrap();
    eventually("blocks on disk", || engine.stats().tier.store.written >= (TURN as u64 - 1) / 16);
    // It is asked while a step waits for the grammar, and heard after that step.
    let mut removal = Box::pin(engine.remove_session("s".into()));
    assert!(removal.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    drop(gate);
    assert!(removal.await.unwrap());
    while generation.next().await.is_some() {}
    drop(generation);
    stop(engine);
    let engine = start(folder.path());
    let store = engine.stats().tier.store;
    assert_eq!((store.blocks, store.torn), (0, 0));
}

#[tokio::test]
async fn a_deleted_session_leaves_nothing_on_disk_but_what_others_use() {
    let folder = tempfile::tempdir().unwrap();
    let engine = start(folder.path());
    for (session, seed) in [("gone", 1), ("gone", 2), ("stays", 2), ("stays", 3)] {
        turn_of(&engine, session, seed).await;
    }
    eventually("an empty queue", || engine.stats().tier.queued == 0);
    let blocks = engine.stats().tier.store.blocks;
    assert!(engine.remove_session("gone".into()).await.unwrap());
    let own = (TURN as u64 + 39) / 16;
    eventually("erased blocks", || engine.stats().tier.store.blocks == blocks - own);
    stop(engine);

    let engine = start(folder.path());
    let all = (TURN - 1) / 16 * 16;
    let mut found = Vec::new();
    for seed in 1..4 {
        found.push(turn_of(&engine, "new", seed).await);
    }
    assert_eq!(found, [0, all, all]);
    assert_eq!(engine.stats().tier.store.torn, 0);
}
