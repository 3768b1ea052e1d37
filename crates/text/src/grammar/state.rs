//! A compiled grammar, and one sequence's way through it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use llguidance::Matcher;

/// A grammar ready for use with one model's tokens. Sequences share what its lexer learns.
pub struct CompiledGrammar {
    /// At the start; cloned for each sequence.
    start: Matcher,
    broken: Arc<AtomicBool>,
}

impl std::fmt::Debug for CompiledGrammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CompiledGrammar")
    }
}

/// One sequence's place in a grammar. Only generated tokens go through it. After an error it is of no
/// further use.
pub struct GrammarState {
    matcher: Matcher,
    broken: Arc<AtomicBool>,
}

impl CompiledGrammar {
    pub(super) fn new(start: Matcher) -> Self {
        Self { start, broken: Arc::default() }
    }

    /// The state of a sequence of which nothing is generated.
    pub fn start(&self) -> GrammarState {
        GrammarState { matcher: self.start.clone(), broken: self.broken.clone() }
    }

    /// Whether a state met an error. What the states share may be at its limits then, so the grammar
    /// is not kept for others.
    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed)
    }
}

impl GrammarState {
    /// Takes a generated token.
    ///
    /// # Errors
    /// A message fit for the client, if the token is not allowed here or a limit is reached.
    pub fn accept(&mut self, token: u32) -> Result<(), String> {
        let accepted = self.matcher.consume_token(token);
        accepted.map_err(|error| self.failed(&error.to_string()))
    }

    /// Appends to `out` the tokens that alone can follow, and takes them. They are tokenized as the
    /// model's tokenizer would; where more than one tokenization is still possible they stop short.
    ///
    /// # Errors
    /// As for [`GrammarState::accept`].
    pub fn force(&mut self, out: &mut Vec<u32>) -> Result<(), String> {
        if !self.matcher.is_stopped() {
            out.extend(self.matcher.consume_ff_tokens());
        }
        match self.matcher.get_error() {
            Some(error) => Err(self.failed(&error)),
            None => Ok(()),
        }
    }

    /// Whether nothing can follow: the grammar is complete.
    pub fn is_complete(&self) -> bool {
        self.matcher.is_stopped() && !self.matcher.is_error()
    }

    /// Writes which tokens may follow: bit `t % 32` of word `t / 32` is token `t`. The model's stop
    /// tokens are among them where the grammar may end; words beyond the vocabulary are zero.
    ///
    /// # Errors
    /// As for [`GrammarState::accept`]; also if the grammar is complete.
    pub fn mask(&mut self, out: &mut [u32]) -> Result<(), String> {
        let mask = match self.matcher.compute_mask() {
            Ok(mask) => mask,
            Err(error) => return Err(self.failed(&error.to_string())),
        };
        out.fill(0);
        for (word, bits) in out.iter_mut().zip(mask.as_slice()) {
            *word = *bits;
        }
        Ok(())
    }

    /// Gives the last `tokens` tokens back.
    ///
    /// # Errors
    /// If the grammar has parts that cannot be gone back over. The state is of no further use then.
    pub fn roll_back(&mut self, tokens: usize) -> Result<(), String> {
        self.matcher.rollback(tokens).map_err(|error| error.to_string())?;
        // The mask of the place given up is kept under the lexer's state and the number of rows alone; another
        // way on may come by the same.
        self.matcher.invalidate_bias_cache();
        Ok(())
    }

    fn failed(&self, error: &str) -> String {
        self.broken.store(true, Ordering::Relaxed);
        let reason = super::compile::client_part(error);
        format!("the answer could not be held to its grammar: {reason}")
    }
}
