//! What the model said, token for token, so that a later turn repeats exactly that.
//!
//! Clients send an answer back as text and parsed calls. Rendered and tokenized anew it may differ
//! from what was generated (spaces in JSON, dropped reasoning, another split into tokens), and from
//! there on no cached KV fits. So an answer's tokens are kept under a hash of the conversation up to
//! it, and put into the next prompt as they are.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::{Arc, Mutex, PoisonError};

use lru::LruCache;

/// Most tokens remembered, over all conversations: 64 MiB.
const MAX_TOKENS: usize = 16 << 20;

/// A conversation up to some message, as a hash with a key of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(crate) struct Prefix(u64);

/// Answers by the conversation that they end. Bounded; those not asked for longest go first.
pub(crate) struct Verbatim {
    hasher: RandomState,
    kept: Mutex<Kept>,
}

struct Kept {
    answers: LruCache<Prefix, Arc<[u32]>>,
    tokens: usize,
}

impl Verbatim {
    pub fn new() -> Self {
        let kept = Kept { answers: LruCache::unbounded(), tokens: 0 };
        Self { hasher: RandomState::new(), kept: Mutex::new(kept) }
    }

    /// The conversation after one more message, given by its digest.
    pub fn after(&self, prefix: Prefix, digest: u64) -> Prefix {
        Prefix(self.hasher.hash_one((prefix, digest)))
    }

    /// Keeps the tokens of the answer that ends a conversation.
    pub fn keep(&self, conversation: Prefix, tokens: Arc<[u32]>) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.tokens += tokens.len();
        if let Some(old) = kept.answers.put(conversation, tokens) {
            kept.tokens -= old.len();
        }
        while kept.tokens > MAX_TOKENS {
            let Some((_, old)) = kept.answers.pop_lru() else { break };
            kept.tokens -= old.len();
        }
    }

    /// The tokens of the answer that ends a conversation, if it was given here.
    pub fn find(&self, conversation: Prefix) -> Option<Arc<[u32]>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).answers.get(&conversation).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conversation::{Message, Role, ToolCall};

    fn after(memory: &Verbatim, prefix: Prefix, message: &Message) -> Prefix {
        memory.after(prefix, message.digest())
    }

    fn answer(input: &str) -> Message {
        let call = ToolCall { id: "c".into(), name: "f".into(), input: input.into(), custom: false };
        Message { calls: vec![call], ..Message::new(Role::Assistant, " said \n") }
    }

    #[test]
    fn an_answer_is_found_however_its_client_spells_it() {
        let memory = Verbatim::new();
        let asked = after(&memory, Prefix::default(), &Message::new(Role::User, "hi"));
        memory.keep(after(&memory, asked, &answer(r#"{"a":1, "b": "x"}"#)), Arc::from([1, 2]));
        let mut again = answer(r#"{ "b":"x","a":1 }"#);
        again.text = "said".into();
        assert_eq!(memory.find(after(&memory, asked, &again)).as_deref(), Some(&[1, 2][..]));
    }

    #[test]
    fn the_same_words_in_another_conversation_are_another_answer() {
        let memory = Verbatim::new();
        let asked = |text: &str| after(&memory, Prefix::default(), &Message::new(Role::User, text));
        memory.keep(after(&memory, asked("hi"), &answer("{}")), Arc::from([1]));
        assert!(memory.find(after(&memory, asked("ho"), &answer("{}"))).is_none());
        assert!(memory.find(after(&memory, asked("hi"), &answer("[]"))).is_none());
    }

    #[test]
    fn memory_is_bounded_and_the_oldest_go_first() {
        let memory = Verbatim::new();
        let key = |index: u64| Prefix(index);
        for index in 0..20 {
            memory.keep(key(index), vec![0; 1 << 20].into());
        }
        assert!(memory.find(key(3)).is_none() && memory.find(key(4)).is_some());
        memory.keep(key(4), Arc::from([1]));
        assert_eq!(memory.kept.lock().unwrap().tokens, (15 << 20) + 1);
    }
}
