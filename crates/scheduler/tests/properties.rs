//! The scheduler under random arrivals, answers, cancellations and shortages, against a simulated
//! KV cache that remembers what was written where.

use std::collections::{BTreeMap, HashMap, HashSet};

use proptest::prelude::*;
use rudder_scheduler::{
    BLOCK_SIZE, Chunk, Origin, Policy, PrefillLimit, Scheduler, SchedulerConfig, SequenceId, StepPlan,
};

/// A KV cache of hashes: a slot holds the hash of the whole prefix that it stands for, so a wrong
/// block, a stale block or a missing write shows as a wrong hash.
struct World {
    scheduler: Scheduler,
    config: SchedulerConfig,
    slots: Vec<u64>,
    /// Tokens still to generate, for every live sequence.
    remaining: BTreeMap<SequenceId, usize>,
    ended: HashMap<SequenceId, usize>,
    next_id: SequenceId,
    plan: StepPlan,
    /// Running sequences past their prompt, and the running one that came first.
    decoding: HashSet<SequenceId>,
    first: Option<SequenceId>,
    /// Whether answers force tokens now and then.
    forcing: bool,
    /// Whether sequences find blocks in a slower tier now and then.
    restoring: bool,
    /// Held sequences, and how many of their blocks are still on their way.
    held: BTreeMap<SequenceId, usize>,
    /// What ended sequences said.
    answers: BTreeMap<SequenceId, Vec<u32>>,
    /// Tokens drafted, and of these accepted.
    drafts: (usize, usize),
    /// Whether a step that only decodes is followed by one that is planned before it is committed.
    ahead: bool,
    /// Whether clients go away meanwhile.
    quits: bool,
    /// Tokens computed so, and those of sequences that had ended meanwhile.
    flown: (usize, usize),
}

fn extend(hash: u64, token: u32) -> u64 {
    (hash ^ u64::from(token).wrapping_add(0x9e37_79b9)).wrapping_mul(0x0100_0000_01b3).rotate_left(17)
}

fn hash(tokens: &[u32]) -> u64 {
    tokens.iter().fold(0, |hash, &token| extend(hash, token))
}

fn next_token(hash: u64) -> u32 {
    (hash >> 60) as u32 % 3
}

impl World {
    fn new(config: SchedulerConfig) -> Self {
        Self {
            scheduler: Scheduler::new(config),
            config,
            slots: vec![0; config.blocks * BLOCK_SIZE],
            remaining: BTreeMap::new(),
            ended: HashMap::new(),
            next_id: 0,
            plan: StepPlan::default(),
            decoding: HashSet::new(),
            first: None,
            forcing: true,
            restoring: false,
            held: BTreeMap::new(),
            answers: BTreeMap::new(),
            drafts: (0, 0),
            ahead: false,
            quits: false,
            flown: (0, 0),
        }
    }

    fn arrive(&mut self, prompt: Vec<u32>, answer: usize, score: bool) {
        self.arrive_for(Origin::default(), prompt, answer, score);
    }

    fn arrive_for(&mut self, origin: Origin, prompt: Vec<u32>, answer: usize, score: bool) {
        let room = self.scheduler.max_tokens() - 1;
        let prompt: Vec<u32> = prompt.into_iter().take(room).collect();
        let answer = answer.min(self.scheduler.max_tokens() - prompt.len()).max(1);
        self.scheduler.add(self.next_id, prompt, score, origin);
        self.remaining.insert(self.next_id, answer);
        self.next_id += 1;
    }

    fn cancel(&mut self, index: usize) {
        let id = self.remaining.keys().nth(index % self.remaining.len().max(1)).copied();
        if let Some(id) = id {
            self.end(id);
        }
    }

    fn end(&mut self, id: SequenceId) {
        let sequence = self.scheduler.sequence(id).expect("live sequences are known");
        self.answers.insert(id, sequence.tokens[sequence.prompt_len..].to_vec());
        self.scheduler.remove(id);
        self.remaining.remove(&id);
        self.held.remove(&id);
        *self.ended.entry(id).or_default() += 1;
    }

    /// One step, as the engine would run it; `fault` drops the whole batch, as a failed forward does.
    fn step(&mut self, fault: bool) {
        let mut plan = std::mem::take(&mut self.plan);
        self.fetch();
        self.propose();
        let short = self.is_short();
        self.scheduler.plan(&mut plan);
        let in_vain = !plan.preempted.is_empty() && plan.admitted.is_empty();
        assert!(short || !in_vain, "{:?} gave way to nobody", plan.preempted);
        self.hold(&mut plan);
        let nothing_to_do = self.remaining.is_empty() || !self.held.is_empty();
        assert!(!plan.chunks.is_empty() || nothing_to_do, "an empty plan means no work");
        let tokens: usize = plan.chunks.iter().map(|c| c.len).sum();
        let outputs: usize = plan.chunks.iter().map(|c| c.outputs).sum();
        let drafted: usize = plan.chunks.iter().map(|c| c.drafted).sum();
        assert!(tokens <= self.config.max_batch_tokens && drafted <= self.config.max_drafted);
        assert!(outputs <= self.config.max_sequences + drafted);
        assert!(self.scheduler.running() <= self.config.max_sequences);
        for id in &self.decoding {
            let planned = plan.chunks.iter().any(|c| c.id == *id) || plan.preempted.contains(id);
            assert!(planned || self.ended.contains_key(id), "decode {id} stands still");
        }
        // It is never preempted, and everyone becomes it in time.
        let first = self.first.filter(|id| plan.preempted.contains(id));
        assert_eq!(first, None, "the first running sequence was preempted");
        if fault {
            plan.chunks.iter().for_each(|c| self.end(c.id));
        } else {
            plan.chunks.iter().for_each(|c| self.write(c.id, c.start, c.len, c.drafted));
            match self.ahead && plan.decodes_plainly() {
                true => self.fly(&mut plan),
                false => self.land(&plan),
            }
        }
        self.plan = plan;
        self.check();
    }

    /// Whether the pool lacks blocks for the known tokens of those that run.
    fn is_short(&self) -> bool {
        let (mut held, mut missing) = (HashSet::<u32>::new(), 0);
        let sequences = self.remaining.keys().filter_map(|&id| self.scheduler.sequence(id));
        for sequence in sequences.filter(|sequence| !sequence.blocks.is_empty()) {
            let needed = sequence.tokens.len().div_ceil(BLOCK_SIZE);
            held.extend(&sequence.blocks[..needed.min(sequence.blocks.len())]);
            missing += needed.saturating_sub(sequence.blocks.len());
        }
        missing > self.config.blocks - held.len()
    }

    /// A step ran: what it computed is committed, and its sequences answer.
    fn land(&mut self, plan: &StepPlan) {
        self.scheduler.commit(plan);
        for chunk in &plan.chunks {
            let Some(sequence) = self.scheduler.sequence(chunk.id) else { continue };
            if sequence.pending() == 0 {
                assert!(chunk.outputs > chunk.drafted, "the last known token's logits are wanted");
                self.answer(chunk.id, chunk.drafted);
            }
        }
    }

    /// Steps after one that runs, each planned before the one before it lands, as long as it may be; some sequences go away
    /// meanwhile.
    fn fly(&mut self, plan: &mut StepPlan) {
        let mut next = StepPlan::default();
        for step in 0..4 {
            let may = |id| self.remaining.get(&id).is_some_and(|left| *left > 1);
            let goes_on = self.scheduler.plan_ahead(plan, &mut next, may);
            let continues =
                |c: &Chunk| plan.chunks.iter().any(|p| (p.id, p.start + p.len) == (c.id, c.start));
            assert!(!goes_on || next.chunks.iter().all(continues) && next.decodes_plainly());
            // It runs in any case, before anybody hears what the one before drew.
            if !goes_on {
                return self.land(plan);
            }
            let slots: Vec<_> = next.chunks.iter().map(|c| self.slot(c.id, c.start)).collect();
            self.land(plan);
            for (chunk, slot) in next.chunks.iter().zip(slots) {
                self.flown.0 += 1;
                let sequence = self.scheduler.sequence(chunk.id);
                self.flown.1 += usize::from(sequence.is_none());
                self.slots[slot] =
                    sequence.map_or(u64::MAX, |sequence| hash(&sequence.tokens[..=chunk.start]));
            }
            std::mem::swap(plan, &mut next);
            if step == 2 && self.quits {
                self.cancel(plan.chunks.len());
            }
        }
        self.land(plan);
    }

    /// Where a sequence's token at `position` goes, which no other sequence has and which is in no block that was filled.
    fn slot(&self, id: SequenceId, position: usize) -> usize {
        let sequence = self.scheduler.sequence(id).expect("planned sequences are known");
        let (index, block) = (position / BLOCK_SIZE, sequence.blocks[position / BLOCK_SIZE]);
        assert!(index >= sequence.indexed_blocks(), "sequence {id} writes to a block that others may read");
        let others = self.remaining.keys().filter(|other| **other != id);
        let held = |other: &SequenceId| self.scheduler.sequence(*other).unwrap().blocks.contains(&block);
        assert!(!others.into_iter().any(held), "block {block} is another's too");
        block as usize * BLOCK_SIZE + position % BLOCK_SIZE
    }

    /// Of the sequences that begin to run, some find blocks elsewhere and are held.
    fn hold(&mut self, plan: &mut StepPlan) {
        for id in &plan.preempted {
            self.held.remove(id);
        }
        for (id, cached) in plan.admitted.clone().into_iter().filter(|_| self.restoring) {
            let sequence = self.scheduler.sequence(id).expect("admitted sequences are known");
            let missing = ((sequence.prompt_len - 1) / BLOCK_SIZE).saturating_sub(cached / BLOCK_SIZE);
            let hash = sequence.tokens.iter().fold(id, |h, &t| extend(h, t));
            let found = missing.min((hash >> 40) as usize % 5);
            if found > 0 && !sequence.is_scoring() {
                self.scheduler.hold(plan, id);
                assert!(plan.chunks.iter().all(|chunk| chunk.id != id));
                self.held.insert(id, found);
            }
        }
    }

    /// Blocks arrive for held sequences, two a step; the last ones now and then do not come.
    fn fetch(&mut self) {
        for (id, missing) in std::mem::take(&mut self.held) {
            let arrived = missing.min(2);
            let start = self.scheduler.sequence(id).expect("held sequences are known").computed;
            self.write(id, start, arrived * BLOCK_SIZE, 0);
            self.scheduler.restored(id, arrived);
            if missing > arrived && id % 5 != 0 {
                self.held.insert(id, missing - arrived);
            } else {
                self.scheduler.go_on(id);
            }
        }
    }

    /// Proposes drafts of which some tokens are right, then some wrong.
    fn propose(&mut self) {
        for &id in self.remaining.keys() {
            if !self.scheduler.can_draft(id) {
                continue;
            }
            let mut tokens = self.scheduler.sequence(id).unwrap().tokens.clone();
            let (known, seed) = (tokens.len(), hash(&tokens) >> 20);
            (0..seed % 7).for_each(|_| tokens.push(next_token(hash(&tokens))));
            (0..seed % 4).for_each(|_| tokens.push((next_token(hash(&tokens)) + 1) % 3));
            self.scheduler.propose(id, &tokens[known..]);
        }
    }

    /// Writes a chunk's slots, having checked everything before it through the block table.
    fn write(&mut self, id: SequenceId, start: usize, len: usize, drafted: usize) {
        let sequence = self.scheduler.sequence(id).expect("planned sequences are known");
        assert_eq!(sequence.computed, start);
        let mut hash = 0;
        let known = &sequence.tokens[..start + len - drafted];
        for (position, &token) in known.iter().chain(&sequence.draft()[..drafted]).enumerate() {
            hash = extend(hash, token);
            let slot = sequence.blocks[position / BLOCK_SIZE] as usize * BLOCK_SIZE + position % BLOCK_SIZE;
            if position < start {
                assert_eq!(self.slots[slot], hash, "sequence {id} reads another's KV at {position}");
            } else {
                self.slots[slot] = hash;
            }
        }
        self.drafts.0 += drafted;
    }

    /// The next token is a function of the tokens before it, as a greedy model's is. Now and then
    /// one forces more after it, up to a few blocks of them. Where the next token is as drafted, the
    /// same step tells the one after it.
    fn answer(&mut self, id: SequenceId, drafted: usize) {
        let draft = self.scheduler.sequence(id).unwrap().draft()[..drafted].to_vec();
        let mut draft = draft.into_iter();
        loop {
            let hash = hash(&self.scheduler.sequence(id).unwrap().tokens);
            let forced = if self.forcing && hash.is_multiple_of(11) { (hash >> 32) as usize % 40 } else { 0 };
            if draft.next() != Some(next_token(hash)) || forced > 0 {
                return self.append(id, hash, 1 + forced);
            }
            self.drafts.1 += 1;
            self.scheduler.accept(id, next_token(hash));
            let remaining = self.remaining.get_mut(&id).unwrap();
            *remaining -= 1;
            if *remaining == 0 {
                return self.end(id);
            }
        }
    }

    /// Forces tokens on a sequence that answers, whatever it is doing: running, waiting or restarting.
    fn force(&mut self, index: usize, more: usize) {
        let answering =
            |&id: &SequenceId| self.scheduler.sequence(id).is_some_and(|s| s.tokens.len() > s.prompt_len);
        let ids: Vec<_> = self.remaining.keys().copied().filter(answering).collect();
        if let Some(&id) = ids.get(index % ids.len().max(1)) {
            self.append(id, index as u64, more);
        }
    }

    fn append(&mut self, id: SequenceId, hash: u64, tokens: usize) {
        let remaining = self.remaining.get_mut(&id).unwrap();
        for token in 0..tokens.min(*remaining) as u32 {
            self.scheduler.append(id, ((hash >> 60) as u32 + token) % 3);
            *remaining -= 1;
        }
        if *remaining == 0 {
            self.end(id);
        }
    }

    fn check(&mut self) {
        let counts = self.scheduler.counts();
        assert_eq!(counts.used + counts.cached + counts.free, self.config.blocks);
        if !self.config.prefix_cache {
            assert_eq!(counts.cached, 0);
        }
        let sequences = || self.remaining.keys().filter_map(|&id| self.scheduler.sequence(id));
        let held: HashSet<_> = sequences().flat_map(|sequence| &sequence.blocks).collect();
        assert_eq!(counts.used, held.len(), "a block is held by nobody, or lost");
        let running = |id: &SequenceId| !self.scheduler.sequence(*id).unwrap().blocks.is_empty();
        let past_prompt = |id: &SequenceId| {
            let sequence = self.scheduler.sequence(*id).unwrap();
            sequence.computed >= sequence.prompt_len && !self.held.contains_key(id)
        };
        let ids = || self.remaining.keys().copied().filter(running);
        self.first = ids().next();
        self.decoding = ids().filter(past_prompt).collect();
    }

    fn drain(&mut self) {
        let mut steps = 0;
        while !self.remaining.is_empty() {
            self.step(false);
            steps += 1;
            assert!(steps < 200_000, "work does not end");
        }
        assert_eq!(self.scheduler.counts().used, 0);
        assert_eq!(self.scheduler.running() + self.scheduler.waiting(), 0);
        assert!((0..self.next_id).all(|id| self.ended[&id] == 1), "every request ends exactly once");
    }
}

#[derive(Debug, Clone)]
enum Act {
    Arrive { origin: Origin, prefix: u32, shared: usize, own: Vec<u32>, answer: usize, score: bool },
    Cancel(usize),
    Steps(usize),
    Force { index: usize, tokens: usize },
    Fault,
}

fn origin() -> impl Strategy<Value = Origin> {
    (0u64..3, prop::option::of(0u64..4), -9i32..9).prop_map(|(owner, session, priority)| {
        let weight = [1, 2, 4][owner as usize];
        Origin { owner, weight, session, priority }
    })
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => (
            origin(), 0u32..3, 0usize..90, prop::collection::vec(0u32..3, 1..60), 1usize..60,
            prop::bool::weighted(0.1),
        )
            .prop_map(|(origin, prefix, shared, own, answer, score)| {
                Act::Arrive { origin, prefix, shared, own, answer, score }
            }),
        1 => any::<usize>().prop_map(Act::Cancel),
        4 => (1usize..20).prop_map(Act::Steps),
        1 => (any::<usize>(), 1usize..50).prop_map(|(index, tokens)| Act::Force { index, tokens }),
        1 => Just(Act::Fault),
    ]
}

fn config() -> impl Strategy<Value = SchedulerConfig> {
    (4usize..40, 1usize..9, 0usize..64, 0usize..24, any::<bool>(), any::<bool>()).prop_map(
        |(blocks, max_sequences, more, max_drafted, prefix_cache, fair)| SchedulerConfig {
            blocks,
            max_sequences,
            max_batch_tokens: max_sequences + more,
            max_drafted,
            prefix_cache,
            policy: if fair { Policy::Fair } else { Policy::FirstComeFirstServed },
        },
    )
}

fn limit() -> impl Strategy<Value = PrefillLimit> {
    (1usize..64, prop::option::of(0usize..64)).prop_map(|(time, decodes)| limit_to(time, decodes))
}

/// A limit of so many tokens where the decodes take as long as so many.
fn limit_to(tokens: usize, decodes: Option<usize>) -> PrefillLimit {
    let decodes = decodes.map(|tokens| tokens as f64);
    PrefillLimit { time: tokens as f64, decodes, drafted: 1.0, token: 1.0, context: 0.0 }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn blocks_add_up_kv_is_right_decodes_go_on_and_every_request_ends_once(
        config in config(),
        limit in limit(),
        acts in prop::collection::vec(act(), 1..60),
        restoring in any::<bool>(),
        ahead in any::<bool>(),
    ) {
        let mut world = World::new(config);
        (world.ahead, world.quits) = (ahead, ahead);
        world.scheduler.limit_prefill(limit);
        world.restoring = restoring && config.prefix_cache;
        for act in acts {
            match act {
                Act::Arrive { origin, prefix, shared, own, answer, score } => {
                    let prompt = std::iter::repeat_n(prefix, shared).chain(own).collect();
                    world.arrive_for(origin, prompt, answer, score);
                }
                Act::Cancel(index) => world.cancel(index),
                Act::Steps(n) => (0..n).for_each(|_| world.step(false)),
                Act::Force { index, tokens } => world.force(index, tokens),
                Act::Fault => world.step(true),
            }
        }
        world.drain();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Others come without end, any of them more urgent, shorter or of an owner of its own; those there
    /// are more than can be served. The watched one has the least urgent priority and the longest prompt.
    #[test]
    fn nobody_starves_under_an_endless_flood(
        config in config(),
        limit in limit(),
        flood in prop::collection::vec((origin(), 1usize..40, 1usize..20), 1..8),
        mine in origin(),
    ) {
        let mut world = World::new(SchedulerConfig { policy: Policy::Fair, ..config });
        world.scheduler.limit_prefill(limit);
        world.forcing = false;
        let room = world.scheduler.max_tokens() * 3 / 4;
        let mut flood = flood.into_iter().cycle();
        let mut arrive = |world: &mut World| {
            let (origin, prompt, answer) = flood.next().unwrap();
            let tokens = (0..prompt as u32).map(|t| (t + world.next_id as u32) % 7).collect();
            world.arrive_for(origin, tokens, answer, false);
        };
        (0..5).for_each(|_| arrive(&mut world));
        world.step(false);
        let watched = world.next_id;
        world.arrive_for(Origin { priority: 3, ..mine }, vec![9; room], 20, false);
        let mut steps = 0;
        while world.remaining.contains_key(&watched) {
            while world.remaining.len() < 24 {
                arrive(&mut world);
            }
            world.step(false);
            steps += 1;
            assert!(steps < 100_000, "the watched sequence starves");
        }
    }
}

fn run_to_end(config: SchedulerConfig, prompts: &[Vec<u32>], answer: usize) -> (World, Vec<Vec<u32>>) {
    let mut world = World::new(config);
    for prompt in prompts {
        world.arrive(prompt.clone(), answer, false);
    }
    world.drain();
    let answers = std::mem::take(&mut world.answers).into_values().collect();
    (world, answers)
}

const ROOMY: SchedulerConfig = SchedulerConfig {
    blocks: 256,
    max_sequences: 8,
    max_batch_tokens: 64,
    max_drafted: 0,
    prefix_cache: true,
    policy: Policy::Fair,
};

#[test]
fn answers_do_not_change_under_preemption_chunking_or_without_prefix_cache() {
    let prompts: Vec<Vec<u32>> = (0..6).map(|i| (0..70).map(|t| t * i % 5).collect()).collect();
    let (_, expected) = run_to_end(ROOMY, &prompts, 80);
    for config in [
        SchedulerConfig { blocks: 14, ..ROOMY }, // room for hardly two at a time: preempts
        SchedulerConfig { max_batch_tokens: 8, ..ROOMY },
        SchedulerConfig { prefix_cache: false, ..ROOMY },
        SchedulerConfig { max_drafted: 16, ..ROOMY },
        SchedulerConfig { max_drafted: 3, prefix_cache: false, ..ROOMY },
        SchedulerConfig { max_drafted: 16, blocks: 14, ..ROOMY },
    ] {
        let (_, answers) = run_to_end(config, &prompts, 80);
        assert_eq!(answers, expected, "{config:?}");
    }
}

#[test]
fn answers_do_not_change_where_steps_are_planned_before_the_one_before_lands() {
    let prompts: Vec<Vec<u32>> = (0..6).map(|i| (0..70).map(|t| t * i % 5).collect()).collect();
    let (_, expected) = run_to_end(ROOMY, &prompts, 80);
    for config in [ROOMY, SchedulerConfig { blocks: 20, ..ROOMY }] {
        let mut world = World::new(config);
        world.ahead = true;
        prompts.iter().for_each(|prompt| world.arrive(prompt.clone(), 80, false));
        let mut steps = 0;
        while !world.remaining.is_empty() {
            world.step(false);
            steps += 1;
        }
        assert!(world.flown.0 > 2 * steps, "{:?} in {steps}", world.flown);
        assert_eq!(world.answers.into_values().collect::<Vec<_>>(), expected, "{config:?}");
    }
}

#[test]
fn a_pool_too_small_for_all_preempts_the_youngest() {
    let mut world = World::new(SchedulerConfig { blocks: 6, ..ROOMY });
    for i in 0..2 {
        world.arrive(vec![i; 30], 40, false);
    }
    let mut preempted = Vec::new();
    while !world.remaining.is_empty() {
        world.step(false);
        preempted.extend_from_slice(&world.plan.preempted);
    }
    assert!(!preempted.is_empty() && preempted.iter().all(|&id| id == 1), "{preempted:?}");
}

#[test]
fn a_follow_up_turn_computes_only_what_is_new() {
    let mut world = World::new(ROOMY);
    world.arrive(vec![1; 100], 20, false);
    let mut tokens = Vec::new();
    while !world.remaining.is_empty() {
        world.step(false);
        tokens = world.scheduler.sequence(0).map_or(tokens, |s| s.tokens.clone());
    }
    tokens.extend([2; 10]);
    let turn = tokens.len();
    world.arrive(tokens, 1, false);
    world.step(false);
    let (_, cached) = world.plan.admitted[0];
    assert_eq!(cached, 119 / BLOCK_SIZE * BLOCK_SIZE); // the last generated token was never computed
    assert!(turn - cached < 10 + BLOCK_SIZE + 1);
}

#[test]
fn forks_of_a_prompt_that_is_being_fetched_wait_for_it_and_share_it() {
    let mut world = World::new(ROOMY);
    for i in 0..3 {
        world.arrive([vec![1; 160], vec![2 + i; 8]].concat(), 4, false);
    }
    let mut plan = StepPlan::default();
    world.scheduler.plan(&mut plan);
    world.scheduler.hold(&mut plan, 0);
    assert!(plan.chunks.is_empty());
    for _ in 0..2 {
        world.write(0, world.scheduler.sequence(0).unwrap().computed, 5 * BLOCK_SIZE, 0);
        world.scheduler.restored(0, 5);
        world.scheduler.plan(&mut plan);
    }
    assert_eq!(plan.admitted, [(1, 160), (2, 160)], "all that is shared has been fetched");
    world.scheduler.go_on(0);
    world.scheduler.plan(&mut plan);
    assert_eq!(
        plan.chunks.iter().map(|c| (c.id, c.start)).collect::<Vec<_>>(),
        [(0, 160), (1, 160), (2, 160)]
    );
}

#[test]
fn forks_that_arrive_together_compute_their_prefix_once() {
    let mut world = World::new(ROOMY);
    for i in 0..4 {
        world.arrive([vec![1; 160], vec![2 + i; 8]].concat(), 4, false);
    }
    let mut computed = 0;
    while !world.remaining.is_empty() {
        world.step(false);
        computed += world.plan.chunks.iter().filter(|c| c.start < 168).map(|c| c.len).sum::<usize>();
    }
    assert_eq!(computed, 168 + 3 * 8);
}

#[test]
fn decodes_run_in_every_step_beside_a_long_prefill() {
    let mut world = World::new(SchedulerConfig { max_batch_tokens: 16, ..ROOMY });
    world.forcing = false;
    world.arrive(vec![1; 10], 60, false);
    world.step(false);
    world.arrive(vec![2; 600], 1, false);
    for _ in 0..30 {
        world.step(false);
        assert!(world.plan.chunks.iter().any(|c| c.id == 0 && c.len == 1));
        assert_eq!(world.plan.chunks.iter().map(|c| c.len).sum::<usize>(), 16);
    }
}

#[test]
fn forced_tokens_run_in_chunks_beside_decodes_and_prefill() {
    let mut world = World::new(SchedulerConfig { max_batch_tokens: 24, ..ROOMY });
    world.forcing = false;
    for i in 0..2 {
        world.arrive(vec![i; 10], 100, false);
    }
    world.step(false);
    world.arrive(vec![2; 600], 1, false);
    world.force(0, 25);
    let planned = |world: &mut World| {
        world.step(false);
        world.plan.chunks.iter().map(|c| (c.id, c.len, c.outputs)).collect::<Vec<_>>()
    };
    // Each decode has one token; of the 22 left, forced ones may take half.
    assert_eq!(planned(&mut world), [(0, 12, 0), (1, 1, 1), (2, 11, 0)]);
    assert_eq!(planned(&mut world), [(0, 12, 0), (1, 1, 1), (2, 11, 0)]);
    assert_eq!(planned(&mut world), [(0, 2, 1), (1, 1, 1), (2, 21, 0)]);
    assert_eq!(planned(&mut world), [(0, 1, 1), (1, 1, 1), (2, 22, 0)]);
}

#[test]
fn a_scored_prompt_is_computed_whole_with_all_its_logits() {
    let mut world = World::new(ROOMY);
    world.arrive(vec![1; 100], 1, false);
    world.drain();
    world.arrive(vec![1; 100], 1, true);
    let mut outputs = 0;
    while !world.remaining.is_empty() {
        world.step(false);
        outputs += world.plan.chunks.iter().map(|c| c.outputs).sum::<usize>();
    }
    assert_eq!(outputs, 100);
}

#[test]
fn accepted_drafts_take_fewer_steps() {
    let steps = |max_drafted| {
        let mut world = World::new(SchedulerConfig { max_drafted, ..ROOMY });
        world.forcing = false;
        world.arrive(vec![1; 30], 200, false);
        let mut steps = 0;
        while !world.remaining.is_empty() {
            world.step(false);
            steps += 1;
        }
        (steps, world.drafts.1)
    };
    let (plain, _) = steps(0);
    let (drafted, accepted) = steps(16);
    assert!(accepted > 50);
    assert_eq!(drafted + accepted, plain);
}

#[test]
fn a_draft_takes_only_budget_and_blocks_that_others_leave() {
    // Two sequences fill the pool to its last token but for one block.
    let config = SchedulerConfig { blocks: 7, max_batch_tokens: 256, max_drafted: 80, ..ROOMY };
    let mut scheduler = Scheduler::new(config);
    scheduler.add(0, vec![1; 47], false, Origin::default());
    scheduler.add(1, vec![2; 40], false, Origin::default());
    let mut plan = StepPlan::default();
    while [0, 1].iter().any(|&id| !scheduler.can_draft(id)) {
        scheduler.plan(&mut plan);
        scheduler.commit(&plan);
        for id in 0..2 {
            if scheduler.sequence(id).unwrap().pending() == 0 {
                scheduler.append(id, 3);
            }
        }
    }
    let known = |scheduler: &Scheduler, id| scheduler.sequence(id).unwrap().tokens.len();
    assert_eq!(scheduler.counts().free, 1);
    for id in 0..2 {
        scheduler.propose(id, &[5; 40]);
    }
    scheduler.plan(&mut plan);
    assert!(plan.preempted.is_empty());
    let room = |id| known(&scheduler, id).next_multiple_of(BLOCK_SIZE) - known(&scheduler, id);
    for chunk in &plan.chunks {
        // The block left is spare for two running sequences, so drafts end with the blocks held.
        assert_eq!((chunk.len, chunk.drafted), (1 + room(chunk.id), room(chunk.id)));
    }
    // A short budget: half of what the decodes leave.
    let mut scheduler = Scheduler::new(SchedulerConfig { max_batch_tokens: 12, max_drafted: 40, ..ROOMY });
    scheduler.add(0, vec![1; 10], false, Origin::default());
    scheduler.plan(&mut plan);
    scheduler.commit(&plan);
    scheduler.append(0, 1);
    scheduler.propose(0, &[5; 40]);
    scheduler.add(1, vec![2; 40], false, Origin::default());
    scheduler.plan(&mut plan);
    let planned: Vec<_> = plan.chunks.iter().map(|c| (c.id, c.len, c.outputs, c.drafted)).collect();
    assert_eq!(planned, [(0, 6, 6, 5), (1, 6, 0, 0)]);
}

#[test]
fn rejected_drafts_preempt_nobody() {
    // Each sequence alone with its draft would fit, both with theirs would not.
    let config = SchedulerConfig { blocks: 8, max_batch_tokens: 64, max_drafted: 40, ..ROOMY };
    let mut scheduler = Scheduler::new(config);
    let mut plan = StepPlan::default();
    scheduler.add(0, vec![1; 30], false, Origin::default());
    scheduler.add(1, vec![2; 30], false, Origin::default());
    for _ in 0..33 {
        for id in 0..2 {
            scheduler.propose(id, &[7; 40]);
        }
        scheduler.plan(&mut plan);
        assert!(plan.preempted.is_empty());
        scheduler.commit(&plan);
        for id in 0..2 {
            if scheduler.sequence(id).unwrap().pending() == 0 {
                scheduler.append(id, 3);
            }
        }
        let counts = scheduler.counts();
        assert_eq!(counts.used + counts.cached + counts.free, 8);
    }
    scheduler.remove(0);
    scheduler.remove(1);
    assert_eq!(scheduler.counts().used, 0);
}

/// Steps until a turn with `prompt` new tokens and an answer of `answer` has ended, after the others
/// have run for `before` steps.
fn steps_of_a_turn(world: &mut World, origin: Origin, prompt: usize, answer: usize) -> usize {
    let id = world.next_id;
    world.arrive_for(origin, vec![50 + id as u32; prompt], answer, false);
    let mut steps = 0;
    while world.remaining.contains_key(&id) {
        world.step(false);
        steps += 1;
    }
    steps
}

fn key(owner: u64) -> Origin {
    Origin { owner, ..Origin::default() }
}

#[test]
fn a_flood_of_one_key_leaves_anothers_turns_within_half_more_of_their_quiet_time() {
    for policy in [Policy::Fair, Policy::FirstComeFirstServed] {
        let mut world = World::new(SchedulerConfig { blocks: 400, policy, ..ROOMY });
        world.forcing = false;
        let quiet = steps_of_a_turn(&mut world, key(1), 400, 40);
        let mut longest = 0;
        for turn in 0..10 {
            while world.remaining.len() < 100 {
                let own = (0..300).map(|t| t ^ world.next_id as u32).collect();
                world.arrive_for(key(2), own, 200, false);
            }
            (0..7 + turn).for_each(|_| world.step(false));
            longest = longest.max(steps_of_a_turn(&mut world, key(1), 400, 40));
        }
        let fair = policy == Policy::Fair;
        assert_eq!(2 * longest <= 3 * quiet, fair, "{longest} steps, {quiet} when quiet");
    }
}

/// An owner's three sequences, the first as long as the others together, and one of another owner that has just come.
fn beside_another_owners(prompt: usize) -> World {
    let config = SchedulerConfig { blocks: 48, max_batch_tokens: 640, ..ROOMY };
    let mut world = World::new(config);
    world.forcing = false;
    for (i, len) in [290, 145, 145].into_iter().enumerate() {
        world.arrive_for(key(1), vec![i as u32; len], 12, false);
    }
    world.step(false);
    world.arrive_for(key(2), vec![7; prompt], 1, false);
    world
}

#[test]
fn who_holds_too_much_gives_way_in_the_step_that_admits_another() {
    let mut world = beside_another_owners(250);
    world.step(false);
    assert_eq!((&world.plan.preempted[..], &world.plan.admitted[..]), (&[2][..], &[(3, 0)][..]));
    let planned: Vec<_> = world.plan.chunks.iter().map(|c| (c.id, c.len)).collect();
    assert_eq!((planned, world.plan.decodes), (vec![(0, 1), (1, 1), (3, 250)], 2));
}

#[test]
fn nobody_gives_way_where_that_makes_no_room() {
    let mut world = beside_another_owners(400);
    for _ in 0..8 {
        world.step(false);
        assert_eq!((&world.plan.preempted[..], world.plan.chunks.len()), (&[][..], 3));
    }
    world.drain();
}

#[test]
fn nobody_gives_way_to_a_sequence_that_waits_for_what_another_computes() {
    let config = SchedulerConfig { max_sequences: 2, max_batch_tokens: 32, ..ROOMY };
    let mut world = World::new(config);
    world.forcing = false;
    world.arrive_for(key(1), vec![1; 160], 20, false);
    world.arrive_for(key(1), vec![2; 8], 20, false);
    world.step(false);
    world.arrive_for(key(2), vec![1; 168], 1, false);
    let mut steps = 0;
    while world.plan.admitted.is_empty() || steps == 0 {
        world.step(false);
        steps += 1;
        assert_eq!(world.plan.preempted.len(), world.plan.admitted.len());
    }
    assert!(steps > 2, "{steps}");
    world.drain();
}

#[test]
fn a_turn_with_little_to_compute_does_not_wait_behind_a_long_prompt() {
    let mut world = World::new(SchedulerConfig { blocks: 4096, max_sequences: 2, ..ROOMY });
    world.forcing = false;
    for id in 0..3 {
        world.arrive(vec![id; 20_000], 1, false); // takes every place
    }
    world.step(false);
    assert_eq!(steps_of_a_turn(&mut world, Origin::default(), 60, 5), 5);
}

#[test]
fn a_step_that_decodes_holds_its_prefill_limit() {
    let mut world = World::new(ROOMY);
    world.forcing = false;
    world.scheduler.limit_prefill(limit_to(20, None));
    world.arrive(vec![1; 100], 50, false);
    world.step(false);
    assert_eq!(world.plan.chunks[0].len, 64, "nothing decodes yet");
    world.step(false);
    world.arrive(vec![2; 100], 1, false);
    world.step(false);
    assert_eq!(world.plan.chunks.iter().map(|c| c.len).collect::<Vec<_>>(), [1, 20]);
    world.scheduler.limit_prefill(limit_to(0, None));
    world.step(false);
    assert_eq!(world.plan.chunks.iter().map(|c| c.len).collect::<Vec<_>>(), [1]);
}

#[test]
fn tokens_after_a_long_context_take_more_of_the_limit() {
    let mut world = World::new(SchedulerConfig { blocks: 8192, max_batch_tokens: 256, ..ROOMY });
    world.forcing = false;
    world.arrive(vec![1; 10], 90, false);
    world.step(false);
    let limit = PrefillLimit { time: 60.0, token: 1.0, context: 0.001, ..PrefillLimit::NONE };
    world.scheduler.limit_prefill(limit);
    world.arrive(vec![2; 4000], 1, false);
    let mut chunk = || {
        world.step(false);
        *world.plan.chunks.iter().find(|chunk| chunk.id == 1).unwrap()
    };
    let first = chunk();
    assert_eq!((first.start, first.len), (0, 58)); // and 1.7 for the 29 before each, on average
    let late = std::iter::from_fn(|| Some(chunk())).find(|chunk| chunk.start > 2000).unwrap();
    assert!((18..=20).contains(&late.len), "{late:?}"); // each takes three times as long
    world.scheduler.limit_prefill(PrefillLimit { time: 1e-9, ..limit });
    world.step(false);
    let least = world.plan.chunks.iter().find(|chunk| chunk.id == 1).unwrap();
    assert_eq!(least.len, BLOCK_SIZE, "it never stands still");
}

/// A flood of forty prompts of a second key.
fn flood(world: &mut World) {
    for id in 0..40 {
        world.arrive_for(key(2), vec![100 + id; 2000], 1, false);
    }
}

const WIDE: SchedulerConfig =
    SchedulerConfig { blocks: 8192, max_sequences: 32, max_batch_tokens: 256, ..ROOMY };

#[test]
fn a_flood_gets_a_sixth_of_the_time_that_a_step_takes_for_others_and_else_all() {
    let mut world = World::new(WIDE);
    world.forcing = false;
    world.scheduler.limit_prefill(limit_to(200, Some(192)));
    /// Prompt tokens of a step: those of sequence 41, and the flood's.
    fn step(world: &mut World) -> (usize, usize) {
        world.step(false);
        let prefills = &world.plan.chunks[world.plan.decodes..];
        let own = prefills.iter().filter(|chunk| chunk.id == 41).map(|chunk| chunk.len).sum();
        (own, prefills.iter().map(|chunk| chunk.len).sum::<usize>() - own)
    }
    world.arrive_for(key(1), vec![1; 40], 120, false);
    flood(&mut world);
    (0..40).for_each(|_| world.step(false)); // its credit is used up
    assert_eq!(step(&mut world), (0, 32));
    world.arrive_for(key(3), vec![7; 500], 30, false);
    assert_eq!([0; 3].map(|_| step(&mut world)), [(200, 0), (200, 0), (100, 49)]);
    while [0, 41].iter().any(|id| world.remaining.contains_key(id)) {
        world.step(false);
    }
    assert_eq!(step(&mut world), (0, 256));
}

#[test]
fn the_line_tells_who_is_next() {
    let mut world = World::new(SchedulerConfig { max_sequences: 1, ..ROOMY });
    world.arrive(vec![1; 30], 50, false);
    world.step(false);
    world.arrive(vec![2; 300], 1, false);
    world.arrive(vec![3; 100], 1, false);
    world.arrive_for(Origin { priority: -3, ..Origin::default() }, vec![4; 400], 1, false);
    world.step(false);
    assert_eq!(world.scheduler.waiting_in_line().collect::<Vec<_>>(), [3, 2, 1]);
}
