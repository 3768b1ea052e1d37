//! A draft model: a small one of the same vocabulary that guesses what a large one will say.

use rudder_model::{KvSize, LoadOptions, Loaded, Model, ModelConfig};
use rudder_ops::BLOCK_SIZE;

/// Most of a sequence's newest tokens that it reads: enough for nearly all that foretells the next ones.
const WINDOW: usize = 4096;
/// Most tokens of one of its steps; on a CPU some half a second.
const BATCH_TOKENS: usize = 512;
/// Most sequences that it guesses for in one step: a step verifies no more than 64 guesses.
const SEQUENCES: usize = 64;

/// A draft model, loaded. It shares nothing with the model that it guesses for, its KV cache neither.
pub struct DraftModel {
    pub(crate) model: Box<dyn Model>,
    pub(crate) options: LoadOptions,
    pub(crate) kv_blocks: usize,
    pub(crate) window: usize,
}

impl DraftModel {
    /// How to load a draft model of this configuration, for sequences of at most `max_context` tokens of which
    /// `sequences` run at once. Its KV cache holds as many as `windows` sequences' newest tokens.
    pub fn options(
        config: &ModelConfig,
        sequences: usize,
        max_context: usize,
        windows: usize,
    ) -> LoadOptions {
        let window = WINDOW.min(max_context).min(config.context_length);
        // A block more for the guesses at a full window's end.
        let blocks = window.div_ceil(BLOCK_SIZE) + 1;
        LoadOptions {
            max_batch_tokens: BATCH_TOKENS,
            max_outputs: sequences.clamp(1, SEQUENCES),
            kv: KvSize::Blocks(blocks * windows.clamp(1, sequences.max(1))),
            max_context: config.context_length,
        }
    }

    /// A draft model that was loaded with these [`Self::options`], for the same `max_context`.
    pub fn new(loaded: Loaded, options: LoadOptions, max_context: usize) -> Self {
        let window = WINDOW.min(max_context).min(options.max_context);
        Self { model: loaded.model, kv_blocks: loaded.kv_blocks, options, window }
    }

    /// Most of a sequence's newest tokens that it reads.
    pub fn window(&self) -> usize {
        self.window
    }
}
