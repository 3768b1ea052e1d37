//! The step loop: takes requests, has them planned, runs the model, samples, streams events back.
//!
//! ```text
//! Engine::submit -> queue -> [step loop thread: plan -> forward -> sample -> commit] -> Generation
//! ```

mod request;

pub use request::{
    Event, FinishReason, GenerateRequest, LogitBias, SamplingParams, SubmitError, Token, TokenLogprob, Usage,
};

use std::time::Duration;

/// How an engine is set up.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineConfig {
    /// KV blocks in the pool.
    pub kv_blocks: usize,
    /// Longest sequence, prompt and answer together, in tokens.
    pub max_context: usize,
    /// Most sequences running at once.
    pub max_sequences: usize,
    /// Most tokens computed in one step.
    pub max_batch_tokens: usize,
    /// Most requests waiting before new ones are turned away.
    pub max_waiting: usize,
    /// Keep finished sequences' blocks for later requests that begin alike.
    pub prefix_cache: bool,
}

/// A handle to a running engine. Cheap to clone; all clones drive the same step loop.
#[derive(Clone)]
pub struct Engine {}

impl Engine {
    /// Starts the step loop on a thread of its own.
    pub fn start(_model: Box<dyn rudder_model::Model>, _config: EngineConfig) -> Self { todo!() }
    /// Queues a request. Returns at once; never blocks on the step loop.
    ///
    /// # Errors
    /// See [`SubmitError`]; nothing was queued then.
    pub fn submit(&self, _request: GenerateRequest) -> Result<Generation, SubmitError> { todo!() }
    /// The configuration in force.
    pub fn config(&self) -> &EngineConfig { todo!() }
    /// Vocabulary size of the model.
    pub fn vocab_size(&self) -> usize { todo!() }
    /// A snapshot of the engine's counters and gauges.
    pub fn stats(&self) -> Stats { todo!() }
    /// Takes nothing new, waits until everything running has ended or `grace` is over, then
    /// fails what is left and stops the step loop. Returns whether all ended by themselves.
    pub async fn shutdown(&self, _grace: Duration) -> bool { todo!() }
}

/// A running generation. Dropping it cancels: its blocks are free within one step.
pub struct Generation {}

impl Generation {
    /// The next event; `None` after the last one.
    pub async fn next(&mut self) -> Option<Event> { todo!() }
    /// The next event from a thread that is not in an async runtime.
    pub fn next_blocking(&mut self) -> Option<Event> { todo!() }
}

/// Counters since the start, and gauges now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Sequences running.
    pub running: usize,
    /// Requests waiting.
    pub waiting: usize,
    /// KV blocks in the pool.
    pub kv_blocks: usize,
    /// Blocks held by running sequences.
    pub kv_blocks_used: usize,
    /// Unheld blocks that the prefix tree keeps for reuse.
    pub kv_blocks_cached: usize,
    /// Blocks holding nothing. used + cached + free = all.
    pub kv_blocks_free: usize,
    /// Steps run.
    pub steps: u64,
    /// Prompt tokens of admitted requests.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub generation_tokens: u64,
    /// Prompt tokens looked up in the prefix tree.
    pub prefix_queries: u64,
    /// Of these, found.
    pub prefix_hits: u64,
    /// Sequences preempted because blocks ran out.
    pub preemptions: u64,
}
