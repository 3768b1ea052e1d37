//! The load: conversations are made, started in a closed or an open loop, and recorded.

use crate::args::WorkloadArgs;
use crate::dist::Random;
use crate::record::{RequestRecord, Run, Summary};
use crate::target::{Conversation, Input, Target, Turn, microseconds};
use anyhow::Context;
use indicatif::{ProgressBar, ProgressState, ProgressStyle};
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// A conversation to be held: one turn, or an agent loop's several.
struct Job {
    session: usize,
    turns: Vec<Turn>,
}

/// Makes conversations. What a job holds depends on the seed, its run and its number alone.
struct Planner {
    target: Target,
    workload: WorkloadArgs,
    prefix: Option<Input>,
}

impl Planner {
    async fn new(target: Target, workload: WorkloadArgs) -> Self {
        let mut rng = Random::new(workload.seed, u64::MAX);
        let prefix = match workload.shared_prefix {
            0 => None,
            n => Some(target.input(&mut rng, n, true).await),
        };
        Self { target, workload, prefix }
    }

    /// Run 0 is the warm-up.
    async fn job(&self, run: usize, session: usize, exact: bool) -> Job {
        let rng = &mut Random::new(self.workload.seed, ((run as u64) << 40) + session as u64);
        let first = self.workload.prompt.draw(rng);
        let own = first.saturating_sub(self.workload.shared_prefix).max(1);
        let input = join(self.prefix.as_ref(), self.target.input(rng, own, exact).await);
        let tokens = self.workload.shared_prefix + own;
        let mut turns = vec![Turn { input, tokens, output: self.workload.output.draw(rng) }];
        let more = if run == 0 { 0 } else { self.workload.agent_turns - 1 };
        for _ in 0..more {
            let tokens = self.workload.turn_tokens.draw(rng);
            let input = self.target.input(rng, tokens, exact).await;
            turns.push(Turn { input, tokens, output: self.workload.output.draw(rng) });
        }
        Job { session, turns }
    }
}

fn join(prefix: Option<&Input>, rest: Input) -> Input {
    match (prefix, rest) {
        (Some(Input::Text(prefix)), Input::Text(rest)) => Input::Text(format!("{prefix}\n{rest}")),
        (Some(Input::Tokens(prefix)), Input::Tokens(rest)) => {
            Input::Tokens([prefix.as_slice(), &rest].concat())
        }
        (_, rest) => rest,
    }
}

/// Where the jobs of a run come from.
enum Jobs {
    /// A number of them, made before the clock starts.
    Ready(Mutex<std::vec::IntoIter<Job>>),
    /// As many as begin before a moment, made as they are needed and without asking the server.
    Until { end: Instant, run: usize, next: AtomicUsize },
}

impl Jobs {
    async fn next(&self, planner: &Planner) -> Option<Job> {
        match self {
            Self::Ready(jobs) => jobs.lock().unwrap_or_else(PoisonError::into_inner).next(),
            Self::Until { end, .. } if Instant::now() >= *end => None,
            Self::Until { run, next, .. } => {
                Some(planner.job(*run, next.fetch_add(1, Ordering::Relaxed), false).await)
            }
        }
    }
}

/// What the tasks of a run share.
struct Shared {
    planner: Arc<Planner>,
    jobs: Jobs,
    started: Instant,
    done: Mutex<Vec<RequestRecord>>,
    bar: ProgressBar,
    tokens: Arc<AtomicU64>,
}

/// Runs warm-up and repeats; one [`Run`] for each repeat.
pub(crate) async fn run(target: Target, workload: &WorkloadArgs) -> anyhow::Result<Vec<Run>> {
    let planner = Arc::new(Planner::new(target, workload.clone()).await);
    if workload.warmup > 0 {
        let jobs = ready(&planner, 0, workload.warmup).await;
        // A server that fails here fails in the run too, and is reported there.
        execute(&planner, jobs, 0, ProgressBar::hidden()).await?;
    }
    let mut runs = Vec::with_capacity(workload.repeats);
    for run in 1..=workload.repeats {
        let jobs = match workload.duration {
            None => ready(&planner, run, workload.requests).await,
            Some(seconds) => Jobs::Until {
                end: Instant::now() + Duration::from_secs_f64(seconds),
                run,
                next: AtomicUsize::new(0),
            },
        };
        let bar = progress(workload, run)?;
        let requests = execute(&planner, jobs, run, bar).await?;
        runs.push(Run { summary: Summary::of(&requests), requests });
    }
    Ok(runs)
}

async fn ready(planner: &Planner, run: usize, count: usize) -> Jobs {
    let mut jobs = Vec::with_capacity(count);
    for session in 0..count {
        jobs.push(planner.job(run, session, true).await);
    }
    Jobs::Ready(Mutex::new(jobs.into_iter()))
}

async fn execute(
    planner: &Arc<Planner>,
    jobs: Jobs,
    run: usize,
    bar: ProgressBar,
) -> anyhow::Result<Vec<RequestRecord>> {
    let tokens = Arc::new(AtomicU64::new(0));
    let counted = tokens.clone();
    bar.set_style(bar.style().with_key("tokens", move |_: &ProgressState, out: &mut dyn Write| {
        let _ = write!(out, "{}", counted.load(Ordering::Relaxed));
    }));
    let planner = planner.clone();
    let shared =
        Arc::new(Shared { planner, jobs, started: Instant::now(), done: Mutex::default(), bar, tokens });
    match shared.planner.workload.rate {
        Some(rate) => open_loop(&shared, rate, run).await?,
        None => closed_loop(&shared).await?,
    }
    shared.bar.finish_and_clear();
    let mut done = shared.done.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(std::mem::take(&mut *done))
}

/// As many clients as `concurrency`, each with one conversation at a time.
async fn closed_loop(shared: &Arc<Shared>) -> anyhow::Result<()> {
    let mut clients = JoinSet::new();
    for _ in 0..shared.planner.workload.concurrency {
        let shared = shared.clone();
        clients.spawn(async move {
            while let Some(job) = shared.jobs.next(&shared.planner).await {
                if !shared.hold(job).await {
                    // A server that is gone fails at once; do not spin on it.
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        });
    }
    wait(clients).await
}

/// Conversations begin at the moments of a Poisson process, whatever the server does.
async fn open_loop(shared: &Arc<Shared>, rate: f64, run: usize) -> anyhow::Result<()> {
    let mut rng = Random::new(shared.planner.workload.seed, u64::MAX - 1 - run as u64);
    let (mut running, mut at) = (JoinSet::new(), 0.0);
    while let Some(job) = shared.jobs.next(&shared.planner).await {
        at += rng.exponential(rate);
        tokio::time::sleep_until((shared.started + Duration::from_secs_f64(at)).into()).await;
        let shared = shared.clone();
        running.spawn(async move {
            shared.hold(job).await;
        });
    }
    wait(running).await
}

async fn wait(mut tasks: JoinSet<()>) -> anyhow::Result<()> {
    while let Some(ended) = tasks.join_next().await {
        ended.context("a client of the load generator broke off")?;
    }
    Ok(())
}

impl Shared {
    /// Holds a conversation to its end or its first fault; says whether all went well.
    async fn hold(&self, job: Job) -> bool {
        let mut conversation = Conversation::default();
        let count = || {
            self.tokens.fetch_add(1, Ordering::Relaxed);
        };
        for (number, turn) in job.turns.into_iter().enumerate() {
            let start = microseconds(self.started.elapsed().as_secs_f64());
            let mut record = self.planner.target.answer(&mut conversation, turn, &count).await;
            (record.session, record.turn, record.start) = (job.session, number, start);
            let fine = record.error.is_none();
            self.done.lock().unwrap_or_else(PoisonError::into_inner).push(record);
            self.bar.inc(1);
            if !fine {
                return false;
            }
        }
        true
    }
}

fn progress(workload: &WorkloadArgs, run: usize) -> anyhow::Result<ProgressBar> {
    let (bar, template) = match workload.duration {
        None => {
            let bar = ProgressBar::new((workload.requests * workload.agent_turns) as u64);
            (bar, "{prefix} {wide_bar} {pos}/{len} requests  {tokens} tokens  {elapsed}")
        }
        Some(_) => {
            (ProgressBar::no_length(), "{prefix} {spinner} {pos} requests  {tokens} tokens  {elapsed}")
        }
    };
    let bar = bar.with_style(ProgressStyle::with_template(template)?);
    bar.set_prefix(format!("run {run} of {}", workload.repeats));
    bar.enable_steady_tick(Duration::from_millis(200));
    Ok(bar)
}
