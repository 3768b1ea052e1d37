//! Tokens of texts that were tokenized before: a conversation's next turn tokenizes only what is new.
//!
//! What is kept are pieces of text whose tokens do not depend on what stands around them (between
//! markup, between words), so that it does not matter in which conversation they came. A piece is
//! compared as a whole: its hash only finds it. Bounded; the pieces not asked for longest go first.

use std::hash::BuildHasher;
use std::sync::{Arc, Mutex, PoisonError};

use foldhash::fast::RandomState;
use lru::LruCache;

use crate::TextError;

/// Memory for texts and their tokens; a conversation of 140,000 tokens takes about 1.2 MB.
const MAX_BYTES: usize = 64 << 20;
/// Locks, each over a part of the pieces, so that threads do not wait for each other.
const SHARDS: usize = 16;
/// Shorter pieces are tokenized about as fast as they are found.
const MIN_PIECE: usize = 64;
/// What a kept piece costs besides its text and tokens, roughly.
const OVERHEAD: usize = 160;

/// A bounded memory of pieces of text and their tokens.
pub(crate) struct TokenCache {
    hasher: RandomState,
    shards: [Mutex<Shard>; SHARDS],
    max_shard_bytes: usize,
}

struct Shard {
    /// By their hash. Of two pieces with one hash the later is kept.
    pieces: LruCache<u64, Arc<Piece>, RandomState>,
    bytes: usize,
}

struct Piece {
    text: Box<str>,
    tokens: Box<[u32]>,
}

impl TokenCache {
    pub(crate) fn new() -> Self {
        Self::of_size(MAX_BYTES)
    }

    fn of_size(max_bytes: usize) -> Self {
        let hasher = RandomState::default();
        let shard = || Shard { pieces: LruCache::unbounded_with_hasher(hasher.clone()), bytes: 0 };
        Self {
            shards: std::array::from_fn(|_| Mutex::new(shard())),
            hasher,
            max_shard_bytes: max_bytes / SHARDS,
        }
    }

    /// Appends the tokens of `text`: those kept, or what `encode` appends, which are then kept.
    pub(crate) fn encode(
        &self,
        text: &str,
        out: &mut Vec<u32>,
        encode: impl FnOnce(&mut Vec<u32>) -> Result<(), TextError>,
    ) -> Result<(), TextError> {
        if text.len() < MIN_PIECE {
            return encode(out);
        }
        let hash = self.hasher.hash_one(text);
        if let Some(piece) = self.shard(hash, |shard| shard.pieces.get(&hash).cloned())
            && *piece.text == *text
        {
            out.extend_from_slice(&piece.tokens);
            return Ok(());
        }
        let before = out.len();
        encode(out)?;
        let piece = Piece { text: text.into(), tokens: out[before..].into() };
        self.shard(hash, |shard| shard.keep(hash, piece, self.max_shard_bytes));
        Ok(())
    }

    fn shard<T>(&self, hash: u64, work: impl FnOnce(&mut Shard) -> T) -> T {
        let shard = &self.shards[(hash >> 32) as usize % SHARDS];
        work(&mut shard.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Shard {
    fn keep(&mut self, hash: u64, piece: Piece, max_bytes: usize) {
        if piece.bytes() > max_bytes {
            return;
        }
        self.bytes += piece.bytes();
        if let Some(old) = self.pieces.put(hash, Arc::new(piece)) {
            self.bytes -= old.bytes();
        }
        while self.bytes > max_bytes {
            let Some((_, old)) = self.pieces.pop_lru() else { break };
            self.bytes -= old.bytes();
        }
    }
}

impl Piece {
    fn bytes(&self) -> usize {
        self.text.len() + size_of_val(&*self.tokens) + OVERHEAD
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Encodes a text of `length` letters as its length; returns whether that was remembered.
    fn ask(cache: &TokenCache, letter: char, length: usize) -> bool {
        let (mut tokens, mut remembered) = (vec![7], true);
        let encode = |out: &mut Vec<u32>| {
            remembered = false;
            out.extend([u32::from(letter), length as u32]);
            Ok(())
        };
        cache.encode(&letter.to_string().repeat(length), &mut tokens, encode).unwrap();
        assert_eq!(tokens, [7, u32::from(letter), length as u32]);
        remembered
    }

    #[test]
    fn a_text_is_encoded_once() {
        let cache = TokenCache::new();
        assert!(!ask(&cache, 'a', 100));
        assert!(ask(&cache, 'a', 100));
        assert!(!ask(&cache, 'a', 101) && !ask(&cache, 'b', 100));
    }

    #[test]
    fn short_texts_take_no_memory() {
        let cache = TokenCache::new();
        ask(&cache, 'a', 10);
        assert!(!ask(&cache, 'a', 10));
        assert!(cache.shards.iter().all(|shard| shard.lock().unwrap().bytes == 0));
    }

    #[test]
    fn memory_is_bounded_and_what_was_not_asked_for_longest_goes() {
        let cache = TokenCache::of_size(SHARDS * 1500);
        for length in 100..1000 {
            ask(&cache, 'a', 100);
            assert!(!ask(&cache, 'b', length));
            assert!(ask(&cache, 'a', 100), "what is asked for again and again stays");
        }
        for shard in &cache.shards {
            let shard = shard.lock().unwrap();
            assert!(shard.bytes <= 1500);
            assert_eq!(shard.bytes, shard.pieces.iter().map(|(_, piece)| piece.bytes()).sum::<usize>());
        }
        assert!(!ask(&cache, 'c', 2000));
        assert!(!ask(&cache, 'c', 2000), "larger than there is room for");
    }

    #[test]
    fn texts_with_one_hash_do_not_answer_for_each_other() {
        let cache = TokenCache::new();
        let text = "x".repeat(100);
        let hash = cache.hasher.hash_one(&*text);
        let other = Piece { text: "y".repeat(100).into(), tokens: [9].into() };
        cache.shard(hash, |shard| shard.keep(hash, other, 1 << 20));
        assert!(!ask(&cache, 'x', 100));
        assert!(ask(&cache, 'x', 100));
    }

    #[test]
    fn a_failure_is_not_remembered() {
        let cache = TokenCache::new();
        let fail = |_: &mut Vec<u32>| Err(TextError::Model("no".into()));
        assert!(cache.encode(&"a".repeat(100), &mut Vec::new(), fail).is_err());
        assert!(!ask(&cache, 'a', 100));
    }
}
