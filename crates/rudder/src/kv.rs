//! How large the KV cache is, and how long a sequence may be in it.

use anyhow::{Result, bail};
use rudder_hub::bytes;
use rudder_ops::BLOCK_SIZE;

/// Full contexts that the KV cache holds by default: a few conversations of full length, or many
/// short ones, with room left for prefixes to stay.
const CONTEXTS: u64 = 4;
/// By default the KV cache takes at most one part in so many of the available memory.
const MEMORY_SHARE: u64 = 4;

/// What the machine and the model say, and what the user asks for.
#[derive(Debug, Clone, Copy)]
pub struct KvNeeds {
    /// Bytes of one block in all layers.
    pub block_bytes: u64,
    /// Longest sequence that the model can do, in tokens.
    pub context_length: usize,
    /// Memory available beside the weights, in bytes.
    pub available: u64,
    /// Context length asked for.
    pub max_context: Option<usize>,
    /// KV memory asked for, in bytes.
    pub kv_memory: Option<u64>,
}

/// The sizes decided on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvPlan {
    /// Blocks in the pool.
    pub blocks: usize,
    /// Longest sequence in tokens.
    pub max_context: usize,
}

impl KvNeeds {
    /// Decides. Without wishes the cache holds four full contexts, or a quarter of the available
    /// memory where that is less; a context that does not fit is cut. A wish is met or refused.
    ///
    /// # Errors
    /// If the wishes do not fit each other, the model or the memory; the message says what would.
    pub fn plan(self) -> Result<KvPlan> {
        let context = self.max_context.unwrap_or(self.context_length);
        if context > self.context_length {
            bail!(
                "max_context is {context}, but the model was trained for at most {} tokens",
                self.context_length
            );
        }
        let block_bytes = self.block_bytes.max(1);
        let one = blocks_for(context);
        let budget = match self.kv_memory {
            Some(asked) if asked > self.available => bail!(
                "kv_memory is {}, but only {} are available beside the weights",
                bytes(asked),
                bytes(self.available)
            ),
            Some(asked) => asked,
            None => (self.available / MEMORY_SHARE).min(one * CONTEXTS * block_bytes),
        };
        let blocks = budget / block_bytes;
        let holds = usize::try_from(blocks).unwrap_or(usize::MAX).saturating_mul(BLOCK_SIZE);
        if holds < context && (self.max_context.is_some() || blocks == 0) {
            bail!(
                "{} of KV cache hold {holds} tokens, but one sequence of max_context = {context} needs {}; \
                 set kv_memory to that or max_context lower",
                bytes(budget),
                bytes(one * block_bytes)
            );
        }
        Ok(KvPlan { blocks: usize::try_from(blocks)?, max_context: context.min(holds) })
    }
}

fn blocks_for(tokens: usize) -> u64 {
    tokens.div_ceil(BLOCK_SIZE) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    // 1 KiB a block, a context of 1,600 tokens: 100 blocks.
    const NEEDS: KvNeeds = KvNeeds {
        block_bytes: 1024,
        context_length: 1600,
        available: 1 << 30,
        max_context: None,
        kv_memory: None,
    };

    #[test]
    fn four_full_contexts_where_memory_is_plenty() {
        assert_eq!(NEEDS.plan().unwrap(), KvPlan { blocks: 400, max_context: 1600 });
    }

    #[test]
    fn a_quarter_of_memory_where_it_is_short_and_the_context_gives_way() {
        let short = KvNeeds { available: 80 * 1024, ..NEEDS };
        assert_eq!(short.plan().unwrap(), KvPlan { blocks: 20, max_context: 320 });
    }

    #[test]
    fn wishes_are_met_or_refused_never_bent() {
        let asked = KvNeeds { kv_memory: Some(150 * 1024), max_context: Some(800), ..NEEDS };
        assert_eq!(asked.plan().unwrap(), KvPlan { blocks: 150, max_context: 800 });
        let message =
            KvNeeds { kv_memory: Some(10 * 1024), max_context: Some(800), ..NEEDS }.plan().unwrap_err();
        assert!(message.to_string().contains("hold 160 tokens"), "{message}");
        let message = KvNeeds { max_context: Some(1601), ..NEEDS }.plan().unwrap_err();
        assert!(message.to_string().contains("at most 1600"), "{message}");
        let message = KvNeeds { kv_memory: Some(2 << 30), ..NEEDS }.plan().unwrap_err();
        assert!(message.to_string().contains("available"), "{message}");
        assert!(KvNeeds { kv_memory: Some(1), ..NEEDS }.plan().is_err());
    }
}
