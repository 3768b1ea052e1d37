//! The compiled grammars used last, by what they were compiled from.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use super::{CompiledGrammar, GrammarSpec};
use crate::in_same_order;

/// Agents come with the same few tool sets, turn after turn. A grammar takes a megabyte or so, and some
/// 40 at its limits.
const CAPACITY: usize = 32;

/// See the module.
#[derive(Default)]
pub(super) struct Cache {
    /// The last used first.
    entries: Mutex<VecDeque<(GrammarSpec, Arc<CompiledGrammar>)>>,
}

impl Cache {
    pub(super) fn find(&self, spec: &GrammarSpec) -> Option<Arc<CompiledGrammar>> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let index = entries.iter().position(|(known, _)| is_same(known, spec))?;
        let entry = entries.remove(index)?;
        if entry.1.is_broken() {
            return None;
        }
        let found = entry.1.clone();
        entries.push_front(entry);
        Some(found)
    }

    pub(super) fn insert(&self, spec: GrammarSpec, grammar: Arc<CompiledGrammar>) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.push_front((spec, grammar));
        entries.truncate(CAPACITY);
    }
}

/// Whether both are the same grammar: a schema's properties come in its order.
fn is_same(a: &GrammarSpec, b: &GrammarSpec) -> bool {
    a == b
        && match (a, b) {
            (GrammarSpec::JsonSchema { schema: a, .. }, GrammarSpec::JsonSchema { schema: b, .. }) => {
                in_same_order(a, b)
            }
            (GrammarSpec::Composed { parts: a, .. }, GrammarSpec::Composed { parts: b, .. }) => {
                a.iter().zip(b).all(|(a, b)| is_same(&a.grammar, &b.grammar))
            }
            _ => true,
        }
}
