//! What the model said, token for token, so that a later turn repeats exactly that.
//!
//! Clients send an answer back as text and parsed calls. Rendered and tokenized anew it may differ
//! from what was generated (spaces in JSON, dropped reasoning, another split into tokens), and from
//! there on no cached KV fits. So an answer's tokens are kept under a hash of the conversation up to
//! it, and put into the next prompt as they are, behind what opened it then.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lru::LruCache;
use serde_json::{Map, Value};

/// Most tokens remembered, over all conversations: 64 MiB.
const MAX_TOKENS: usize = 16 << 20;
/// What an answer takes besides its tokens, as so many of them: its places in the list and the table, its counts.
const TOKENS_OF_ANSWER: usize = 48;

/// Openings that are known. A client has one or two: with reasoning and without.
const MAX_OPENINGS: usize = 64;
/// Variables of a template whose opening is kept take no more, as JSON.
const MAX_VARIABLES: usize = 1024;

/// An answer as it was generated.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Answer {
    pub tokens: Arc<[u32]>,
    /// What the template wrote before it. Those that were opened alike share it.
    pub opening: Arc<str>,
}

impl Answer {
    /// What it takes, in tokens.
    fn weight(&self) -> usize {
        TOKENS_OF_ANSWER + self.tokens.len()
    }
}

/// A conversation up to some message, as a hash with a key of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(crate) struct Prefix(u64);

/// Answers by the conversation that they end. Bounded; those not asked for longest go first.
pub(crate) struct Verbatim {
    hasher: RandomState,
    kept: Mutex<Kept>,
}

struct Kept {
    answers: LruCache<Prefix, Answer>,
    /// What they take, in tokens.
    tokens: usize,
    /// What opens answers, by the template's further variables as JSON.
    openings: LruCache<String, Arc<str>>,
}

impl Verbatim {
    pub fn new() -> Self {
        let kept = Kept { answers: LruCache::unbounded(), tokens: 0, openings: LruCache::unbounded() };
        Self { hasher: RandomState::new(), kept: Mutex::new(kept) }
    }

    /// The conversation after one more message, given by its digest.
    pub fn after(&self, prefix: Prefix, digest: u64) -> Prefix {
        Prefix(self.hasher.hash_one((prefix, digest)))
    }

    /// Keeps the answer that ends a conversation.
    pub fn keep(&self, conversation: Prefix, answer: Answer) {
        let mut kept = self.kept();
        kept.tokens += answer.weight();
        if let Some(old) = kept.answers.put(conversation, answer) {
            kept.tokens -= old.weight();
        }
        while kept.tokens > MAX_TOKENS {
            let Some((_, old)) = kept.answers.pop_lru() else { break };
            kept.tokens -= old.weight();
        }
    }

    /// The answer that ends a conversation, if it was given here.
    pub fn find(&self, conversation: Prefix) -> Option<Answer> {
        self.kept().answers.get(&conversation).cloned()
    }

    /// What the template writes before an answer where it is given these variables, as `render` tells.
    pub fn opening(&self, variables: &Map<String, Value>, render: impl FnOnce() -> String) -> Arc<str> {
        let key = serde_json::to_string(variables).unwrap_or_default();
        if let Some(known) = self.kept().openings.get(&key) {
            return known.clone();
        }
        let opening: Arc<str> = render().into();
        if key.len() <= MAX_VARIABLES {
            let mut kept = self.kept();
            kept.openings.put(key, opening.clone());
            if kept.openings.len() > MAX_OPENINGS {
                kept.openings.pop_lru();
            }
        }
        opening
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conversation::{Message, Role, ToolCall};

    fn tokens(tokens: &[u32]) -> Answer {
        Answer { tokens: tokens.into(), opening: "".into() }
    }

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
        memory.keep(after(&memory, asked, &answer(r#"{"a":1, "b": "x"}"#)), tokens(&[1, 2]));
        let mut again = answer(r#"{ "b":"x","a":1 }"#);
        again.text = "said".into();
        assert_eq!(memory.find(after(&memory, asked, &again)), Some(tokens(&[1, 2])));
    }

    #[test]
    fn the_same_words_in_another_conversation_are_another_answer() {
        let memory = Verbatim::new();
        let asked = |text: &str| after(&memory, Prefix::default(), &Message::new(Role::User, text));
        memory.keep(after(&memory, asked("hi"), &answer("{}")), tokens(&[1]));
        assert!(memory.find(after(&memory, asked("ho"), &answer("{}"))).is_none());
        assert!(memory.find(after(&memory, asked("hi"), &answer("[]"))).is_none());
    }

    #[test]
    fn memory_is_bounded_and_the_oldest_go_first() {
        let memory = Verbatim::new();
        let key = |index: u64| Prefix(index);
        for index in 0..20 {
            memory.keep(key(index), tokens(&vec![0; (1 << 20) - TOKENS_OF_ANSWER]));
        }
        assert!(memory.find(key(3)).is_none() && memory.find(key(4)).is_some());
        memory.keep(key(4), tokens(&[1]));
        assert_eq!(memory.kept().tokens, (15 << 20) + 1 + TOKENS_OF_ANSWER);
        for index in 0..400_000 {
            memory.keep(key(index), tokens(&[1]));
        }
        assert_eq!(
            memory.kept().answers.len(),
            MAX_TOKENS / (1 + TOKENS_OF_ANSWER),
            "short ones count as well"
        );
    }

    #[test]
    fn an_opening_is_rendered_once_for_the_same_variables_and_few_are_kept() {
        let (memory, mut rendered) = (Verbatim::new(), 0);
        let mut open = |number: usize, long: usize| {
            let variables = Map::from_iter([(number.to_string(), Value::from("x".repeat(long)))]);
            memory.opening(&variables, || {
                rendered += 1;
                format!("opening {number}")
            });
            rendered
        };
        assert_eq!([open(0, 1), open(0, 1), open(1, 1), open(0, 1)], [1, 1, 2, 2]);
        assert_eq!([open(0, 2000), open(0, 2000)], [3, 4], "long ones are not kept");
        for number in 2..1000 {
            open(number, 1);
        }
        assert!(memory.kept().openings.len() <= MAX_OPENINGS);
    }
}
