//! Grammars from `text` as the engine's: the two crates do not know each other.

use std::sync::Arc;

use rudder_engine::{Constraint, Grammar, Next};
use rudder_text::{CompiledGrammar, GrammarState};

/// A compiled grammar for [`rudder_engine::GenerateRequest::grammar`].
pub(crate) fn for_engine(grammar: Arc<CompiledGrammar>) -> Arc<dyn Grammar> {
    Arc::new(Compiled(grammar))
}

#[derive(Debug)]
struct Compiled(Arc<CompiledGrammar>);

impl Grammar for Compiled {
    fn start(&self) -> Result<Box<dyn Constraint>, String> {
        Ok(Box::new(State(self.0.start())))
    }
}

struct State(GrammarState);

impl Constraint for State {
    fn accept(&mut self, token: u32) -> Result<(), String> {
        self.0.accept(token)
    }

    fn next(&mut self, mask: &mut [u32], forced: Option<&mut Vec<u32>>) -> Result<Next, String> {
        if let Some(forced) = forced {
            self.0.force(forced)?;
        }
        if self.0.is_complete() {
            return Ok(Next::End);
        }
        self.0.mask(mask)?;
        Ok(Next::Draw)
    }

    fn roll_back(&mut self, tokens: usize) -> Result<(), String> {
        self.0.roll_back(tokens)
    }
}
