//! The most that an answer may reason before it has to answer.

use std::sync::Arc;

/// How long the reasoning of an answer may be, and how it is ended.
#[derive(Debug, Clone)]
pub struct ReasoningBudget {
    /// Most tokens of it; at least one is drawn where the prompt has begun it.
    pub tokens: usize,
    /// The token that begins it; absent where the prompt has begun it.
    pub opening: Option<u32>,
    /// The token that ends it.
    pub closing: u32,
    /// Appended without a draw once the tokens are spent; `closing` is among them.
    pub end: Arc<[u32]>,
}

/// Where an answer is with its budget.
#[derive(Debug)]
pub(crate) struct Reasoning {
    budget: ReasoningBudget,
    state: State,
}

#[derive(Debug)]
enum State {
    Before,
    Within { left: usize },
    After,
}

impl Reasoning {
    pub(crate) fn new(budget: ReasoningBudget) -> Self {
        let state = match budget.opening {
            Some(_) => State::Before,
            None => State::Within { left: budget.tokens },
        };
        Self { budget, state }
    }

    /// Takes a token that was drawn. Returns what has to follow it, if it was the last that the budget allows.
    pub(crate) fn take(&mut self, token: u32) -> Option<Arc<[u32]>> {
        self.state = match self.state {
            State::Before if self.budget.opening == Some(token) => State::Within { left: self.budget.tokens },
            State::Within { .. } if token == self.budget.closing => State::After,
            State::Within { left } => State::Within { left: left.saturating_sub(1) },
            _ => return None,
        };
        if !matches!(self.state, State::Within { left: 0 }) {
            return None;
        }
        self.state = State::After;
        Some(self.budget.end.clone())
    }
}
