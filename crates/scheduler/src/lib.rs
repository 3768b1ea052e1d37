//! Pure scheduling: queues, budgets, KV blocks and the prefix tree.
//!
//! No tensors, no I/O, no threads, no clock. The engine adds sequences, asks for a [`StepPlan`],
//! runs it, and commits it:
//!
//! ```
//! use rudder_scheduler::{Origin, Policy, Scheduler, SchedulerConfig, StepPlan};
//!
//! let config = SchedulerConfig {
//!     blocks: 64,
//!     max_sequences: 8,
//!     max_batch_tokens: 32,
//!     max_drafted: 8,
//!     prefix_cache: true,
//!     policy: Policy::Fair,
//! };
//! let mut scheduler = Scheduler::new(config);
//! scheduler.add(1, vec![5; 40], false, Origin::default());
//! let mut plan = StepPlan::default();
//! scheduler.plan(&mut plan);
//! assert_eq!(plan.chunks[0].len, 32); // the budget cuts the prompt of 40
//! scheduler.commit(&plan);
//! scheduler.plan(&mut plan);
//! assert_eq!((plan.chunks[0].len, plan.chunks[0].outputs), (8, 1)); // its end gives a token
//! scheduler.commit(&plan);
//! scheduler.append(1, 7);
//! scheduler.remove(1);
//! assert_eq!(scheduler.counts().used, 0);
//! ```

mod ahead;
mod block_pool;
mod cached_path;
mod drafts;
mod fairness;
mod key_heap;
mod pace;
mod pauses;
mod prefix_tree;
mod restore;
mod retention;
mod room;
mod scheduler;
mod sequence;
mod session_table;
mod sessions;
mod shares;

pub use block_pool::{BlockCounts, BlockId};
pub use fairness::Origin;
pub use pace::{Pace, PrefillLimit};
pub use retention::{MAX_SESSIONS, PROTECTED_SHARE, RetentionStats, SessionBlocks, SessionHandle, Tick};
pub use scheduler::{Chunk, Policy, PrefixStats, Scheduler, SchedulerConfig, StepPlan};
pub use sequence::{Sequence, SequenceId};
pub use session_table::{
    KEPT_PAUSES, LONGEST_KEPT, MARGIN, MAX_PINNED, MAX_PINNED_OF_OWNER, PastSession, PinError, SHORTEST_KEPT,
    SessionInfo, SessionState, SessionTable,
};

/// Tokens in one KV block; the engine checks that it equals the op set's.
pub const BLOCK_SIZE: usize = 16;
