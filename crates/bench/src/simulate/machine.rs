//! How long a step takes on a machine: bytes read over bandwidth, arithmetic over speed, and what a
//! step costs anyway. Nothing overlaps, so the times are on the safe side.

/// A machine with a model on it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Machine {
    pub name: &'static str,
    /// In words, for reports.
    pub about: &'static str,
    /// Bytes of weights that a step reads.
    weights: f64,
    /// Parameters that a token is multiplied by.
    active: f64,
    /// Query heads times head size, over all layers.
    attention: f64,
    /// Bytes of keys and values a token.
    kv_token: f64,
    /// Bytes a second.
    bandwidth: f64,
    /// Operations a second.
    speed: f64,
    /// Seconds of a step besides: launches, collectives, sampling.
    overhead: f64,
    /// Tokens whose keys and values are kept.
    pub kv_tokens: usize,
    /// Most sequences at once.
    pub max_sequences: usize,
    /// Most tokens of a step.
    pub max_batch_tokens: usize,
}

/// One H200. Bandwidth at 80 % and arithmetic at half of what the data sheet says.
pub(crate) const H200: Machine = Machine {
    name: "h200",
    about: "one H200 with Qwen3-Coder-30B-A3B in FP8; KV in its own 95 GB and 256 GB of the host's memory",
    weights: 31e9,
    active: 3.3e9,
    attention: 48.0 * 32.0 * 128.0,
    kv_token: 48.0 * 4.0 * 128.0 * 2.0,
    bandwidth: 0.8 * 4.8e12,
    speed: 0.5 * 1.979e15,
    overhead: 2e-3,
    kv_tokens: 7_100_000,
    max_sequences: 64,
    max_batch_tokens: 8192,
};

/// 72 GPUs of a GB200 NVL72. Bandwidth at 70 % and arithmetic at 40 % of what the data sheet says.
pub(crate) const NVL72: Machine = Machine {
    name: "nvl72",
    about: "a GB200 NVL72 with Qwen3-Coder-480B-A35B in FP8; KV in its own 12 TB and 13.5 TB of the hosts' memory",
    weights: 480e9,
    active: 35e9,
    attention: 62.0 * 96.0 * 128.0,
    kv_token: 62.0 * 8.0 * 128.0 * 2.0,
    bandwidth: 0.7 * 72.0 * 8e12,
    speed: 0.4 * 72.0 * 5e15,
    overhead: 6e-3,
    kv_tokens: 200_000_000,
    max_sequences: 1024,
    max_batch_tokens: 262_144,
};

/// What is computed in one step, or in several alike.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Work {
    /// Steps.
    pub steps: f64,
    /// Sequences that get one token in each of them, and the tokens before it, summed.
    pub decodes: f64,
    /// See `decodes`.
    pub contexts: f64,
    /// Prompt tokens in all of them, and the tokens before each, summed.
    pub prefill: f64,
    /// See `prefill`.
    pub prefill_contexts: f64,
}

impl Work {
    /// Adds `len` prompt tokens that come after `start` others.
    pub fn add_prefill(&mut self, start: f64, len: f64) {
        self.prefill += len;
        self.prefill_contexts += len * (start + len / 2.0);
    }
}

impl Machine {
    /// Seconds that `work` takes.
    pub fn seconds(&self, work: &Work) -> f64 {
        let bytes = self.weights + work.contexts * self.kv_token;
        let decodes = 2.0 * self.active * work.steps * work.decodes / self.speed;
        work.steps * (self.overhead + bytes / self.bandwidth) + decodes + self.prefill_seconds(work)
    }

    /// Of it, what the prompt tokens take.
    pub fn prefill_seconds(&self, work: &Work) -> f64 {
        // Attention's scores and their weighted sum: a multiplication and an addition each.
        (2.0 * self.active * work.prefill + 4.0 * self.attention * work.prefill_contexts) / self.speed
    }

    /// Seconds of a turn that has the machine to itself: to its first token, and from there to its end.
    pub fn alone(&self, cached: f64, prompt: f64, answer: f64) -> (f64, f64) {
        let new = (prompt - cached).max(1.0);
        let mut prefill = Work { steps: (new / self.max_batch_tokens as f64).ceil(), ..Work::default() };
        prefill.add_prefill(cached, new);
        let decode = Work { steps: answer - 1.0, decodes: 1.0, contexts: prompt, ..Work::default() };
        (self.seconds(&prefill), self.seconds(&decode))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decode_is_bound_by_bandwidth_and_a_prefill_by_arithmetic() {
        let (first, rest) = H200.alone(136_000.0, 142_000.0, 101.0);
        assert!((0.5..1.0).contains(&first), "{first} s for 6,000 tokens after 136,000");
        // 31 GB and 142,000 times 49 kB at 3.84 TB/s, and 2 ms.
        assert!((rest / 100.0 - 11.9e-3).abs() < 1e-4, "{rest}");
        let (first, rest) = NVL72.alone(136_000.0, 142_000.0, 101.0);
        assert!(first < 0.05 && rest / 100.0 < 9e-3, "{first} {rest}");
    }
}
