//! The real scheduler under simulated agents on a simulated machine, in virtual time.
//!
//! To be quick, a *unit* stands for some tokens: a step gives decodes as many tokens each, beside as many
//! prompt tokens as any step holds. So a request waits for its first step a little longer than it would.
//! Everything random comes from the seed, agent by agent: the same agents say the same in every run, and pause as
//! long, so that runs can be compared turn by turn.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use rudder_scheduler::{
    BLOCK_SIZE, Chunk, Origin, Pace, Policy, Scheduler, SchedulerConfig, SequenceId, SessionTable, StepPlan,
    Tick,
};

use super::agents::{self, Agent, Next};
use super::machine::{Machine, Work};

/// Seconds between two tokens that paced decodes may take beside prefill.
pub(crate) const PACE: Duration = Duration::from_millis(50);
/// The key that floods; agents' keys come before.
const FLOODER: u64 = u64::MAX;
/// Tokens of the answer to a flooding request.
const FLOOD_ANSWER: usize = 444;
/// Seconds over which agents that are there at the beginning send their first turn.
const SPREAD: f64 = 30.0;

/// How requests are scheduled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Scheduling {
    pub name: &'static str,
    pub policy: Policy,
    /// Prefill beside decodes is cut so that these keep [`PACE`].
    pub paced: bool,
}

/// What is compared.
pub(crate) const SCHEDULINGS: [Scheduling; 3] = [
    Scheduling { name: "first come", policy: Policy::FirstComeFirstServed, paced: false },
    Scheduling { name: "fair", policy: Policy::Fair, paced: false },
    Scheduling { name: "fair, paced", policy: Policy::Fair, paced: true },
];

/// Who is there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    /// Agents at any time, besides subagents.
    pub agents: usize,
    /// Keys that they share evenly.
    pub keys: usize,
    /// Length of the run.
    pub seconds: f64,
    /// Requests that a further key always has under way, from the second tenth of the run on; each answered
    /// one is followed by the next at once.
    pub flood: usize,
    /// New tokens of each.
    pub flood_prompt: usize,
    /// Tokens in a unit.
    pub unit: usize,
    pub seed: u64,
}

/// One turn of an agent, times in seconds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TurnRecord {
    pub owner: u64,
    /// To its first token; where the run ended before that, at least this.
    pub first_token: f64,
    /// From there to its end; none where the run ended before.
    pub rest: Option<f64>,
    /// Tokens of its answer.
    pub answer: f64,
    /// The time that the whole turn takes on an empty machine.
    pub alone: f64,
    /// Which one it is: its agent's name, and of the agent's turns. The same turn meets every policy.
    pub name: (u64, u64),
    pub wait: Wait,
}

/// What a turn waited for before its first token; times in seconds.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Wait {
    /// When it was asked, since the run began.
    pub asked: f64,
    /// Tokens of its prompt; of these computed before, and found in the cache.
    pub prompt: f64,
    pub known: f64,
    pub cached: f64,
    /// Until it was admitted.
    pub queued: f64,
    /// Parts of all the time: its own prompt's, other agents' prompts', the flood's prompts', and what the
    /// steps took besides, which is their decodes.
    pub own: f64,
    pub agents: f64,
    pub flood: f64,
    pub decodes: f64,
    /// How often it lost its place.
    pub preempted: u32,
}

/// What came of a run. Turns and gaps are those after its first quarter, without the flooding key's.
#[derive(Debug, Clone, Default)]
pub(crate) struct Outcome {
    pub turns: Vec<TurnRecord>,
    /// Seconds between two tokens, and for how many tokens.
    pub gaps: Vec<(f64, usize)>,
    /// Seconds that are counted.
    pub seconds: f64,
    /// Agents there were, subagents among them.
    pub agents: usize,
    /// Prompt tokens of agents' turns that began, and of these found in the cache.
    pub prompt: f64,
    pub cached: f64,
    /// Tokens computed for agents, and for the flooding key.
    pub computed: [f64; 2],
}

/// A request under way.
struct Turn {
    /// None for the flooding key.
    agent: Option<usize>,
    /// Of the agent's turns, which one.
    number: u64,
    submitted: f64,
    prompt: usize,
    known: usize,
    cached: usize,
    answer: usize,
    generated: usize,
    first_token: f64,
    wait: Wait,
}

/// Runs a load to its end.
pub(crate) fn run(machine: &Machine, load: &Load, scheduling: &Scheduling) -> Outcome {
    let mut world = World::new(machine, load, scheduling);
    world.populate();
    while world.now < load.seconds && world.step() {}
    world.end()
}

struct World<'a> {
    machine: &'a Machine,
    load: &'a Load,
    scheduler: Scheduler,
    /// Keeps sessions' blocks through their pauses.
    sessions: SessionTable,
    pace: Option<Pace>,
    plan: StepPlan,
    now: f64,
    agents: Vec<Agent>,
    /// Next turns: nanoseconds, and whose. `FLOOD` stands for the flooding key.
    due: BinaryHeap<Reverse<(u64, usize)>>,
    live: HashMap<SequenceId, Turn>,
    next_id: SequenceId,
    outcome: Outcome,
}

/// Stands for the flooding key among agents' numbers.
const FLOOD: usize = usize::MAX;

impl<'a> World<'a> {
    fn new(machine: &'a Machine, load: &'a Load, scheduling: &Scheduling) -> Self {
        let scheduler = Scheduler::new(SchedulerConfig {
            blocks: machine.kv_tokens / load.unit / BLOCK_SIZE,
            max_sequences: machine.max_sequences,
            max_batch_tokens: machine.max_batch_tokens / load.unit,
            max_drafted: 0,
            prefix_cache: true,
            policy: scheduling.policy,
        });
        let pace = Pace::new(PACE * load.unit as u32);
        Self {
            machine,
            load,
            scheduler,
            sessions: SessionTable::default(),
            pace: scheduling.paced.then_some(pace),
            plan: StepPlan::default(),
            now: 0.0,
            agents: Vec::new(),
            due: BinaryHeap::new(),
            live: HashMap::new(),
            next_id: 0,
            outcome: Outcome::default(),
        }
    }

    /// The agents that are there at the beginning, in the midst of their sessions and in the cache.
    fn populate(&mut self) {
        for number in 0..self.load.agents {
            let owner = (number % self.load.keys) as u64;
            let agent = Agent::begun(number, owner, self.load.unit, self.load.seed);
            let wait = SPREAD * number as f64 / self.load.agents as f64;
            let id = self.next_id;
            self.next_id += 1;
            self.scheduler.add(id, agent.context.clone(), false, Origin::default());
            while self.scheduler.sequence(id).is_some_and(|sequence| sequence.pending() > 0) {
                self.scheduler.plan(&mut self.plan);
                self.scheduler.commit(&self.plan);
            }
            self.scheduler.remove(id);
            self.agents.push(agent);
            self.later(wait, number);
        }
        self.due.extend((0..self.load.flood).map(|_| Reverse((nanos(self.load.seconds * 0.2), FLOOD))));
    }

    fn later(&mut self, seconds: f64, agent: usize) {
        self.due.push(Reverse((nanos(self.now + seconds), agent)));
    }

    /// Whether what is submitted now is counted.
    fn counts(&self) -> bool {
        self.now >= self.load.seconds / 4.0
    }

    /// One step, or the wait for the next request; false where nothing is left to do.
    fn step(&mut self) -> bool {
        if self.live.is_empty()
            && let Some(Reverse((at, _))) = self.due.peek()
        {
            self.now = self.now.max(*at as f64 / 1e9);
        }
        while let Some(Reverse((at, agent))) = self.due.peek().copied()
            && at <= nanos(self.now)
        {
            self.due.pop();
            self.submit(agent);
        }
        let mut plan = std::mem::take(&mut self.plan);
        self.scheduler.advance(self.tick());
        self.scheduler.plan(&mut plan);
        self.sessions.admit(&mut self.scheduler, &plan);
        for &(id, cached) in &plan.admitted {
            self.note_cached(id, cached);
        }
        let took = self.seconds(&plan);
        self.note_waits(&plan, took);
        self.now += took;
        self.scheduler.commit(&plan);
        self.keep_pace(&plan, took);
        for chunk in &plan.chunks {
            self.count(chunk);
            if chunk.outputs > 0 {
                self.token(chunk.id);
            }
        }
        let busy = !plan.chunks.is_empty();
        self.plan = plan;
        busy
    }

    fn submit(&mut self, agent: usize) {
        let id = self.next_id;
        self.next_id += 1;
        let (prompt, known, number, answer, origin) = if agent == FLOOD {
            let stream = u64::MAX - id;
            let prompt =
                (0..self.load.flood_prompt / self.load.unit).map(|at| agents::token(stream, at)).collect();
            let origin = Origin { owner: FLOODER, ..Origin::default() };
            (prompt, 0, 0, FLOOD_ANSWER / self.load.unit, origin)
        } else {
            let agent = &mut self.agents[agent];
            agent.turns += 1;
            let origin = Origin { owner: agent.owner, session: Some(agent.session), ..Origin::default() };
            (agent.context.clone(), agent.known, agent.turns, agent.answer(), origin)
        };
        let turn = Turn {
            agent: (agent != FLOOD).then_some(agent),
            number,
            submitted: self.now,
            prompt: prompt.len(),
            known,
            cached: 0,
            answer,
            generated: 0,
            first_token: 0.0,
            wait: Wait::default(),
        };
        self.scheduler.add(id, prompt, false, origin);
        let session: Option<Arc<str>> = origin.session.map(|session| session.to_string().into());
        let owner = origin.owner.to_string().into();
        let now = self.tick();
        self.sessions.arrive(&mut self.scheduler, id, session.as_ref(), Some(&owner), now);
        self.live.insert(id, turn);
    }

    fn note_cached(&mut self, id: SequenceId, cached: usize) {
        let Some(turn) = self.live.get_mut(&id).filter(|turn| turn.generated == 0) else { return };
        if turn.wait.preempted == 0 {
            turn.wait.queued = self.now - turn.submitted;
        }
        turn.cached = cached;
        if turn.agent.is_some() {
            self.outcome.prompt += turn.prompt as f64;
            self.outcome.cached += cached as f64;
        }
    }

    /// Tells those who wait for their first token what the step's time is spent on.
    fn note_waits(&mut self, plan: &StepPlan, took: f64) {
        for id in &plan.preempted {
            if let Some(turn) = self.live.get_mut(id) {
                turn.wait.preempted += 1;
            }
        }
        let (mut agents, mut flood) = (0.0, 0.0);
        for chunk in &plan.chunks[plan.decodes..] {
            let seconds = self.prefill_seconds(chunk);
            let Some(turn) = self.live.get_mut(&chunk.id) else { continue };
            turn.wait.own += seconds;
            turn.wait.agents -= seconds; // it is in the sum of all agents'
            *if turn.agent.is_some() { &mut agents } else { &mut flood } += seconds;
        }
        for turn in self.live.values_mut().filter(|turn| turn.generated == 0) {
            turn.wait.agents += agents;
            turn.wait.flood += flood;
            turn.wait.decodes += took - agents - flood;
        }
    }

    fn prefill_seconds(&self, chunk: &Chunk) -> f64 {
        let unit = self.load.unit as f64;
        let mut work = Work::default();
        work.add_prefill(chunk.start as f64 * unit, chunk.len as f64 * unit);
        self.machine.prefill_seconds(&work)
    }

    /// What the planned step takes.
    fn seconds(&self, plan: &StepPlan) -> f64 {
        let unit = self.load.unit as f64;
        let mut work = self.decode_work(plan);
        for chunk in &plan.chunks[plan.decodes..] {
            work.add_prefill(chunk.start as f64 * unit, chunk.len as f64 * unit);
        }
        if plan.decodes == 0 {
            work.steps = 1.0;
        }
        self.machine.seconds(&work)
    }

    /// What its decodes take alone.
    fn decode_seconds(&self, plan: &StepPlan) -> f64 {
        self.machine.seconds(&self.decode_work(plan))
    }

    fn decode_work(&self, plan: &StepPlan) -> Work {
        let unit = self.load.unit as f64;
        let decodes = &plan.chunks[..plan.decodes];
        let contexts = decodes.iter().map(|chunk| chunk.start as f64 * unit).sum();
        Work { steps: unit, decodes: decodes.len() as f64, contexts, ..Work::default() }
    }

    fn tick(&self) -> Tick {
        (self.now * 1e3) as Tick
    }

    fn keep_pace(&mut self, plan: &StepPlan, took: f64) {
        if plan.decodes > 0 && self.counts() {
            let agents = |chunk: &&Chunk| self.live.get(&chunk.id).is_some_and(|turn| turn.agent.is_some());
            let decodes = plan.chunks[..plan.decodes].iter().filter(agents).count();
            // One of the steps that this stands for holds the prompt tokens, unless they are spread.
            let unit = self.load.unit;
            let plain = self.decode_seconds(plan) / unit as f64;
            match self.pace {
                Some(_) => self.outcome.gaps.push((took / unit as f64, decodes * unit)),
                None => self
                    .outcome
                    .gaps
                    .extend([(took - plain * (unit - 1) as f64, decodes), (plain, decodes * (unit - 1))]),
            }
        }
        if let Some(pace) = &mut self.pace {
            pace.record(plan, Duration::from_secs_f64(took));
            self.scheduler.limit_prefill(pace.prefill_limit());
        }
    }

    fn count(&mut self, chunk: &Chunk) {
        let Some(turn) = self.live.get(&chunk.id) else { return };
        if self.counts() {
            self.outcome.computed[usize::from(turn.agent.is_none())] += (chunk.len * self.load.unit) as f64;
        }
    }

    /// A sequence got its next token.
    fn token(&mut self, id: SequenceId) {
        let Some(turn) = self.live.get_mut(&id) else { return };
        if turn.generated == 0 {
            turn.first_token = self.now;
        }
        turn.generated += 1;
        if turn.generated >= turn.answer {
            return self.end_turn(id);
        }
        let at = turn.prompt + turn.generated - 1;
        let token = turn.agent.map_or(u32::MAX, |agent| self.agents[agent].token(at));
        self.scheduler.append(id, token);
    }

    fn end_turn(&mut self, id: SequenceId) {
        let Some(turn) = self.live.remove(&id) else { return };
        self.record(&turn, Some(self.now - turn.first_token));
        let now = self.tick();
        self.sessions.end(&mut self.scheduler, id, now);
        match turn.agent {
            Some(number) => {
                if let Some(sequence) = self.scheduler.sequence(id) {
                    let agent = &mut self.agents[number];
                    agent.context.clone_from(&sequence.tokens);
                    agent.known = agent.context.len();
                }
                self.scheduler.remove(id);
                self.go_on(number);
            }
            None => {
                self.scheduler.remove(id);
                self.later(0.0, FLOOD);
            }
        }
    }

    fn record(&mut self, turn: &Turn, rest: Option<f64>) {
        let from = self.load.seconds / 4.0;
        let Some(agent) = turn.agent.filter(|_| turn.submitted >= from) else { return };
        let unit = self.load.unit as f64;
        let [cached, known, prompt, answer] =
            [turn.cached, turn.known, turn.prompt, turn.answer].map(|n| n as f64 * unit);
        let (first, decode) = self.machine.alone(cached, prompt, answer);
        let first_token = if turn.generated > 0 { turn.first_token } else { self.now };
        let agent = &self.agents[agent];
        self.outcome.turns.push(TurnRecord {
            owner: agent.owner,
            first_token: first_token - turn.submitted,
            rest,
            answer,
            alone: first + decode,
            name: (agent.stream, turn.number),
            wait: Wait { asked: turn.submitted, prompt, known, cached, ..turn.wait },
        });
    }

    /// An agent's turn was answered.
    fn go_on(&mut self, number: usize) {
        match self.agents[number].next() {
            Next::Turn(pause) => self.later(pause, number),
            Next::Subagents(count) => {
                self.agents[number].children = count;
                for _ in 0..count {
                    let child = self.agents.len();
                    let agent = self.agents[number].subagent(number, self.load.seed);
                    self.agents.push(agent);
                    self.later(0.0, child);
                }
            }
            Next::End => self.leave(number),
        }
    }

    /// An agent has ended: its parent may go on, or another session begins in its stead.
    fn leave(&mut self, number: usize) {
        self.agents[number].context = Vec::new();
        match self.agents[number].parent {
            Some(parent) => {
                self.agents[parent].children -= 1;
                if self.agents[parent].children == 0 {
                    self.later(0.0, parent);
                }
            }
            None => {
                let next = self.agents.len();
                let mut agent = self.agents[number].successor(next as u64, self.load.seed);
                let pause = agent.pause();
                self.agents.push(agent);
                self.later(pause, next);
            }
        }
    }

    /// Counts the turns that are still under way and closes the books.
    fn end(mut self) -> Outcome {
        let mut live: Vec<_> = self.live.drain().collect();
        live.sort_by_key(|(id, _)| *id);
        for (_, turn) in &live {
            self.record(turn, None);
        }
        self.outcome.agents = self.agents.len();
        self.outcome.seconds = self.now - self.load.seconds / 4.0;
        self.outcome
    }
}

fn nanos(seconds: f64) -> u64 {
    // Rounded, so that the moment at which something is due has come when it has.
    (seconds * 1e9).round() as u64
}
