//! The step loop: takes requests, has them planned, runs the model, samples, streams events back.
//!
//! ```text
//! Engine::submit -> commands -> [step loop thread: plan -> forward -> sample -> commit] -> Generation
//! ```
//!
//! [`Engine`] is the handle that servers hold; [`GenerateRequest`] and [`Event`] are its whole
//! language. The loop owns the model and the scheduler, runs on a thread of its own and never
//! waits on a client: events go into unbounded channels, whose length `max_tokens` bounds.
//! A request may carry a [`Grammar`]: then its tokens are drawn under masks that worker threads
//! compute while the model runs. What repeats earlier text comes several tokens a step: see `draft`; where nothing
//! does, a [`DraftModel`] may guess.
//! With a [`DiskTier`], KV blocks outlive their place in memory, and the process.

mod draft;
mod draft_model;
mod engine;
mod grammar;
mod mask_workers;
mod places;
mod reasoning;
mod request;
mod session_record;
mod sessions;
mod step_loop;
mod tier;

pub use draft_model::DraftModel;
pub use engine::{DraftCounts, DraftMode, Engine, EngineConfig, Generation, Stats};
pub use grammar::{Constraint, Grammar, Next};
pub use places::Places;
pub use reasoning::ReasoningBudget;
pub use request::{
    Event, FinishReason, GenerateRequest, LogitBias, SamplingParams, SubmitError, Token, TokenLogprob, Usage,
};
pub use rudder_kvstore::StoreStats;
pub use rudder_scheduler::{MAX_PINNED, MAX_PINNED_OF_OWNER, PinError, SessionInfo, SessionState};
pub use sessions::{Session, SessionStats};
pub use tier::{DiskTier, TierConfig, TierError, TierStats};
