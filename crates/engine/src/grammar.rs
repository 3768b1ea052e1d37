//! The seam of structured output: what the step loop asks of a grammar. Tokens only; what they
//! spell, and in which language the grammar is written, stays above.

use std::fmt::Debug;

/// What the generated tokens of a sequence must match. The prompt is free.
pub trait Grammar: Debug + Send + Sync {
    /// A fresh state for one sequence. Runs on a worker thread.
    ///
    /// # Errors
    /// A message fit for the client, whose request fails with it.
    fn start(&self) -> Result<Box<dyn Constraint>, String>;
}

/// One sequence's way through a [`Grammar`]. Its methods run on a worker thread beside the forward
/// pass. An error fails its request, and a panic too; no other is harmed.
pub trait Constraint: Send {
    /// Takes a generated token.
    ///
    /// # Errors
    /// If the grammar does not allow the token here, or gives up; fit for the client.
    fn accept(&mut self, token: u32) -> Result<(), String>;

    /// What may follow the tokens taken so far.
    ///
    /// With `forced`, tokens that alone can follow are appended to it and taken, as by
    /// [`Constraint::accept`]; the rest of the answer is about what follows them.
    /// On [`Next::Draw`], `mask` (all zero before; bit `t % 32` of word `t / 32` is token `t`) tells
    /// which tokens may be drawn: at least one, and stop tokens where the grammar may end.
    ///
    /// # Errors
    /// If the grammar gives up; fit for the client.
    fn next(&mut self, mask: &mut [u32], forced: Option<&mut Vec<u32>>) -> Result<Next, String>;

    /// Gives the last `tokens` tokens back, as if they had not been taken: drafted ones are tried.
    ///
    /// # Errors
    /// If it cannot. It is then replaced by a new one that is given all tokens again.
    fn roll_back(&mut self, tokens: usize) -> Result<(), String>;
}

/// See [`Constraint::next`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// A token is to be drawn under the mask.
    Draw,
    /// Nothing can follow: the sequence ends as with a stop token.
    End,
}
