//! Replay of an agent trace: its turns, pauses and forks, sent to a server and clocked.

use crate::args::{AgentTraceArgs, Endpoint};
use crate::client::Client;
use crate::record::{RequestRecord, Run, Summary};
use crate::target;
use crate::trace::{Trace, TracedTurn};
use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// One replay under way.
struct Replay {
    trace: Trace,
    client: Client,
    recorded: bool,
    pause_scale: f64,
    started: Instant,
    done: Mutex<Vec<RequestRecord>>,
    bar: ProgressBar,
}

/// A conversation as far as it went.
#[derive(Clone)]
struct Agent {
    session: usize,
    /// Names the session to servers that keep sessions.
    key: String,
    turn: usize,
    messages: Vec<Value>,
}

/// Replays the trace as often as asked; one [`Run`] for each time.
pub(crate) async fn run(client: &Client, trace: &Trace, args: &AgentTraceArgs) -> anyhow::Result<Vec<Run>> {
    let mut runs = Vec::with_capacity(args.repeats);
    for run in 1..=args.repeats {
        let bar = ProgressBar::new(trace.turns().count() as u64);
        let bar =
            bar.with_style(ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len} turns  {elapsed}")?);
        bar.set_prefix(format!("run {run} of {}", args.repeats));
        bar.enable_steady_tick(Duration::from_millis(200));
        // The first line differs from run to run: none finds another's prompts in a cache.
        let mut trace = trace.clone();
        trace.system = format!("Workspace {}-{run}.\n{}", args.seed, trace.system);
        let replay = Arc::new(Replay {
            client: client.clone(),
            recorded: args.recorded,
            pause_scale: args.pause_scale,
            started: Instant::now(),
            done: Mutex::default(),
            bar,
            trace,
        });
        let requests = replay.clone().execute(run).await?;
        runs.push(Run { summary: Summary::of(&requests), requests });
    }
    Ok(runs)
}

impl Replay {
    async fn execute(self: Arc<Self>, run: usize) -> anyhow::Result<Vec<RequestRecord>> {
        let mut sessions = JoinSet::new();
        for session in 0..self.trace.sessions.len() {
            sessions.spawn(self.clone().hold(session, run));
        }
        while let Some(ended) = sessions.join_next().await {
            ended.context("a session of the replay broke off")??;
        }
        self.bar.finish_and_clear();
        let mut done = std::mem::take(&mut *self.done.lock().unwrap_or_else(PoisonError::into_inner));
        done.sort_by_key(|record| (record.session, record.turn));
        Ok(done)
    }

    /// Holds a session with its forks. After a fault it is over, as its history is not what it should be.
    async fn hold(self: Arc<Self>, session: usize, run: usize) -> anyhow::Result<()> {
        let traced = &self.trace.sessions[session];
        self.wait(traced.start).await;
        let mut agent = Agent {
            session,
            key: format!("{}-{run}-{session}", self.trace.name),
            turn: 0,
            messages: vec![json!({"role": "system", "content": self.trace.system})],
        };
        for number in 0..=traced.turns.len() {
            self.clone().fork(&agent, session, number).await?;
            let Some(turn) = traced.turns.get(number) else { break };
            if !self.answer(&mut agent, turn).await {
                break;
            }
        }
        Ok(())
    }

    /// Runs the forks that begin here, side by side, to their ends.
    async fn fork(self: Arc<Self>, agent: &Agent, session: usize, after: usize) -> anyhow::Result<()> {
        let mut forks = JoinSet::new();
        for (number, fork) in self.trace.sessions[session].forks.iter().enumerate() {
            if fork.after != after {
                continue;
            }
            let mut agent = agent.clone();
            let before: usize = self.trace.sessions[..session].iter().map(|before| before.forks.len()).sum();
            agent.session = self.trace.sessions.len() + before + number;
            let replay = self.clone();
            forks.spawn(async move {
                for turn in &replay.trace.sessions[session].forks[number].turns {
                    if !replay.answer(&mut agent, turn).await {
                        break;
                    }
                }
            });
        }
        while let Some(ended) = forks.join_next().await {
            ended.context("a fork of the replay broke off")?;
        }
        Ok(())
    }

    async fn wait(&self, seconds: f64) {
        tokio::time::sleep(Duration::from_secs_f64(seconds * self.pause_scale)).await;
    }

    /// Sends one turn; says whether it was answered.
    async fn answer(&self, agent: &mut Agent, turn: &TracedTurn) -> bool {
        self.wait(turn.pause).await;
        agent.messages.push(json!({"role": "user", "content": turn.say}));
        let input = json!({"messages": agent.messages, "prompt_cache_key": agent.key});
        let start = target::microseconds(self.started.elapsed().as_secs_f64());
        let (answer, fault) = self.client.send(self.client.body(input, turn.output), &|| ()).await;
        let mut record = target::record(&answer, fault, 0);
        (record.session, record.turn, record.start) = (agent.session, agent.turn, start);
        record.kind = Some(turn.kind);
        record.output_hash = Some(format!("{:016x}", fnv1a(answer.text.as_bytes())));
        let answered = record.error.is_none();
        self.done.lock().unwrap_or_else(PoisonError::into_inner).push(record);
        self.bar.inc(1);
        let said = if self.recorded { turn.answer.clone() } else { answer.text };
        agent.messages.push(json!({"role": "assistant", "content": said}));
        agent.turn += 1;
        answered
    }
}

/// FNV-1a, 64 bits (Fowler, Noll, Vo): the same everywhere and at any time.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// The client that a replay uses.
pub(crate) fn client(args: &AgentTraceArgs) -> anyhow::Result<Client> {
    let (model, key) = (args.model.clone(), args.api_key.as_deref());
    Client::new(&args.url, model, key, Endpoint::Chat, args.respect_eos, args.timeout)
}

#[cfg(test)]
mod tests {
    use super::fnv1a;

    #[test]
    fn the_hash_is_that_of_its_definition() {
        assert_eq!(fnv1a(b""), 0xcbf29ce484222325);
        assert_eq!(fnv1a(b"a"), 0xaf63dc4c8601ec8c);
        assert_eq!(fnv1a(b"foobar"), 0x85944171f73967e8);
    }
}
