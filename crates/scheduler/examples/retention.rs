//! What keeping sessions by their pauses gains over evicting what was used longest ago.
//!
//! Agents take turns with tool pauses between them while one-shot requests flood the same pool. No model:
//! time is virtual, a step takes as long as its tokens say, and every run draws the same arrivals.
//!
//!     cargo run --release -p rudder-scheduler --example retention

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use rudder_scheduler::{
    BLOCK_SIZE, Origin, Scheduler, SchedulerConfig, SequenceId, SessionHandle, SessionTable, StepPlan, Tick,
};

/// How the pool decides who goes first.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Policy {
    /// Least recently used; sessions mean nothing.
    Lru,
    /// Every session is protected for so many milliseconds after each turn.
    Fixed(Tick),
    /// As the engine does it: by the session's own pauses.
    Learnt,
}

/// Agents by kind: the median of their pauses in milliseconds, how often a person steps in, and the turns of
/// a session, after which another begins. Subagents, edits, builds.
const KINDS: [(f64, f64, usize); 3] = [(1_000.0, 0.0, 6), (4_000.0, 0.02, 15), (40_000.0, 0.05, 30)];
const PERSON: f64 = 120_000.0;
const AGENTS: usize = 24;
/// How long it all lasts, in milliseconds.
const END: f64 = 1_200_000.0;
/// Tokens that all agents begin with, that one brings, and that a turn brings.
const SHARED: usize = 4_000;
const TASK: usize = 6_000;
const TURN: usize = 1_500;
const ANSWER: usize = 60;
const FLOOD_PROMPT: usize = 6_000;
/// Blocks of the pool: well under what all agents have at their longest.
const BLOCKS: usize = 24_000;
/// A step's milliseconds: of its own, and for each token computed.
const STEP: f64 = 12.0;
const TOKEN: f64 = 0.08;

/// Xorshift, so that every run draws the same.
struct Random(u64);

impl Random {
    fn unit(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Log-normal with this median and a spread of one in the logarithm.
    fn pause(&mut self, median: f64) -> Tick {
        let normal = (0..12).map(|_| self.unit()).sum::<f64>() - 6.0;
        (median * normal.exp()).max(1.0) as Tick
    }
}

struct Agent {
    index: usize,
    key: Arc<str>,
    handle: Option<SessionHandle>,
    conversation: Vec<u32>,
    turns: usize,
    median: f64,
    person: f64,
    session_turns: usize,
    random: Random,
}

impl Agent {
    /// Begins its next session.
    fn begin(&mut self, scheduler: &mut Scheduler, policy: Policy) {
        let number = self.turns / self.session_turns;
        self.key = format!("agent-{}-{number}", self.index).into();
        self.handle = match policy {
            Policy::Fixed(_) => scheduler.open_session(),
            Policy::Lru | Policy::Learnt => None,
        };
        let task = tokens((self.index * 1000 + number) as u32 + 1, TASK);
        self.conversation = [tokens(0, SHARED), task].concat();
    }
}

enum Who {
    Agent(usize),
    Flood,
}

struct Live {
    who: Who,
    arrived: f64,
    cached: usize,
    left: usize,
    first_token: Option<f64>,
}

#[derive(Default)]
struct Outcome {
    prompt_tokens: usize,
    cached_tokens: usize,
    prefilled: usize,
    /// To the first token, in milliseconds: of agents' turns but the first, and of the flood.
    agents: Vec<f64>,
    flood: Vec<f64>,
}

struct World {
    policy: Policy,
    scheduler: Scheduler,
    table: SessionTable,
    agents: Vec<Agent>,
    live: HashMap<SequenceId, Live>,
    /// What comes when.
    events: BTreeMap<(Tick, usize), Who>,
    next: usize,
    now: f64,
    outcome: Outcome,
}

impl World {
    fn new(policy: Policy, flood_per_second: f64) -> Self {
        let config = SchedulerConfig {
            blocks: BLOCKS,
            max_sequences: 64,
            max_batch_tokens: 2048,
            max_drafted: 0,
            prefix_cache: true,
            policy: rudder_scheduler::Policy::FirstComeFirstServed,
        };
        let mut scheduler = Scheduler::new(config);
        let agents: Vec<Agent> = (0..AGENTS)
            .map(|index| {
                let (median, person, session_turns) = KINDS[index % KINDS.len()];
                let random = Random(0x9e37_79b9_7f4a_7c15 ^ (index as u64 + 1));
                let mut agent = Agent {
                    index,
                    key: "".into(),
                    handle: None,
                    conversation: Vec::new(),
                    turns: 0,
                    median,
                    person,
                    session_turns,
                    random,
                };
                agent.begin(&mut scheduler, policy);
                agent
            })
            .collect();
        let mut world = Self {
            policy,
            scheduler,
            table: SessionTable::default(),
            agents,
            live: HashMap::new(),
            events: BTreeMap::new(),
            next: 0,
            now: 0.0,
            outcome: Outcome::default(),
        };
        (0..AGENTS).for_each(|index| world.at(400 * index as Tick, Who::Agent(index)));
        let (mut random, mut time) = (Random(7), 0.0);
        while flood_per_second > 0.0 && time < END {
            time += -(1.0 - random.unit()).ln() * 1000.0 / flood_per_second;
            world.at(time as Tick, Who::Flood);
        }
        world
    }

    fn at(&mut self, time: Tick, who: Who) {
        self.next += 1;
        self.events.insert((time, self.next), who);
    }

    fn run(mut self) -> Outcome {
        let mut plan = StepPlan::default();
        while self.now < END {
            if self.live.is_empty()
                && let Some((&(time, _), _)) = self.events.first_key_value()
            {
                self.now = self.now.max(time as f64);
            }
            while let Some(entry) = self.events.first_entry().filter(|entry| entry.key().0 as f64 <= self.now)
            {
                let ((time, _), who) = entry.remove_entry();
                self.arrive(time as f64, who);
            }
            self.scheduler.advance(self.now as Tick);
            self.scheduler.plan(&mut plan);
            self.step(&plan);
        }
        self.outcome
    }

    fn arrive(&mut self, arrived: f64, who: Who) {
        self.next += 1;
        let (id, now) = (self.next as SequenceId, self.now as Tick);
        let (prompt, answer) = match who {
            Who::Agent(index) => (self.agents[index].conversation.clone(), ANSWER),
            Who::Flood => (tokens(id as u32 + 1000, FLOOD_PROMPT), 16),
        };
        self.scheduler.add(id, prompt, false, Origin::default());
        match (self.policy, &who) {
            (Policy::Learnt, &Who::Agent(index)) => {
                self.table.arrive(&mut self.scheduler, id, Some(&self.agents[index].key), None, now);
            }
            (Policy::Learnt, Who::Flood) => self.table.arrive(&mut self.scheduler, id, None, None, now),
            (Policy::Fixed(_), &Who::Agent(index)) => {
                let session = self.agents[index].handle.expect("opened at the start");
                self.scheduler.join_session(id, session);
                self.scheduler.protect(session, Tick::MAX, Tick::MAX);
            }
            _ => {}
        }
        self.live.insert(id, Live { who, arrived, cached: 0, left: answer, first_token: None });
    }

    fn step(&mut self, plan: &StepPlan) {
        for (id, cached) in &plan.admitted {
            let live = self.live.get_mut(id).expect("it lives");
            if live.first_token.is_none() {
                live.cached = *cached;
            }
        }
        if self.policy == Policy::Learnt {
            self.table.admit(&mut self.scheduler, plan);
        }
        let computed: usize = plan.chunks.iter().map(|chunk| chunk.len).sum();
        let outputs: usize = plan.chunks.iter().map(|chunk| chunk.outputs).sum();
        self.outcome.prefilled += computed - outputs;
        self.now += STEP + TOKEN * computed as f64;
        self.scheduler.commit(plan);
        for chunk in plan.chunks.iter().filter(|chunk| chunk.outputs > 0) {
            let live = self.live.get_mut(&chunk.id).expect("it lives");
            live.first_token.get_or_insert(self.now);
            live.left -= 1;
            if live.left > 0 {
                self.scheduler.append(chunk.id, (chunk.id as usize * 31 + live.left) as u32);
            } else {
                self.end(chunk.id);
            }
        }
    }

    fn end(&mut self, id: SequenceId) {
        let (live, now) = (self.live.remove(&id).expect("it lives"), self.now as Tick);
        let waited = live.first_token.unwrap_or(self.now) - live.arrived;
        let said = self.scheduler.sequence(id).expect("it runs").tokens.clone();
        if self.policy == Policy::Learnt {
            self.table.end(&mut self.scheduler, id, now);
        }
        match live.who {
            Who::Flood => self.outcome.flood.push(waited),
            Who::Agent(index) => {
                let agent = &mut self.agents[index];
                if let (Policy::Fixed(time), Some(session)) = (self.policy, agent.handle) {
                    self.scheduler.protect(session, now + time, now);
                }
                agent.turns += 1;
                if agent.turns % agent.session_turns != 1 {
                    self.outcome.prompt_tokens += agent.conversation.len();
                    self.outcome.cached_tokens += live.cached;
                    self.outcome.agents.push(waited);
                }
                let further = tokens((index * 10_000 + agent.turns) as u32 + 10_000_000, TURN);
                agent.conversation = [said, further].concat();
                if agent.turns.is_multiple_of(agent.session_turns) {
                    agent.begin(&mut self.scheduler, self.policy);
                }
                let median = if agent.random.unit() < agent.person { PERSON } else { agent.median };
                let pause = agent.random.pause(median);
                self.at(now + pause, Who::Agent(index));
            }
        }
        self.scheduler.remove(id);
    }
}

/// Tokens that no other seed has.
fn tokens(seed: u32, count: usize) -> Vec<u32> {
    (0..count as u32).map(|at| seed.wrapping_mul(2_654_435_761).wrapping_add(at)).collect()
}

fn quantile(times: &mut [f64], share: f64) -> f64 {
    times.sort_by(f64::total_cmp);
    times
        .get(((times.len() as f64 * share) as usize).min(times.len().saturating_sub(1)))
        .copied()
        .unwrap_or(0.0)
}

fn main() {
    let policies = [
        ("least recently used", Policy::Lru),
        ("fixed, 5 s", Policy::Fixed(5_000)),
        ("fixed, 60 s", Policy::Fixed(60_000)),
        ("fixed, 10 min", Policy::Fixed(600_000)),
        ("learnt", Policy::Learnt),
    ];
    println!("{AGENTS} agents, {} minutes, a pool of {} tokens", END / 60_000.0, BLOCKS * BLOCK_SIZE);
    for flood in [0.0, 0.5, 1.0] {
        println!("\nflood of {flood} prompts of {FLOOD_PROMPT} tokens a second");
        println!(
            "{:<22}{:>9}{:>15}{:>12}{:>12}{:>14}{:>8}",
            "policy", "hit rate", "prefilled", "TTFT p50", "TTFT p95", "flood p95", "turns"
        );
        let only = std::env::args().nth(1);
        for (name, policy) in
            policies.into_iter().filter(|(name, _)| only.as_ref().is_none_or(|only| only == name))
        {
            let mut outcome = World::new(policy, flood).run();
            let hits = outcome.cached_tokens as f64 / outcome.prompt_tokens as f64;
            println!(
                "{name:<22}{:>8.1}%{:>15}{:>10.0}ms{:>10.0}ms{:>12.0}ms{:>8}",
                hits * 100.0,
                outcome.prefilled,
                quantile(&mut outcome.agents, 0.5),
                quantile(&mut outcome.agents, 0.95),
                quantile(&mut outcome.flood, 0.95),
                outcome.agents.len(),
            );
        }
    }
}
