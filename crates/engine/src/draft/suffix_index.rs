//! Where the end of a text occurred before: hash chains over its n-grams.
//!
//! Every position is chained to the last one before it at which the same [`GRAM`] tokens ended, as LZ77
//! coders do (Ziv and Lempel 1977; RFC 1951, section 4). Appending a token and finding the longest
//! earlier occurrence among the [`PROBES`] newest are O(1). Prompt lookup (Saxena 2023) and SAM-Decoding
//! (arXiv:2411.10666) draft from the same question; a suffix automaton (Blumer et al. 1985) answers it
//! without the bound, but takes some 100 bytes a token where this takes about 14, and knows one
//! occurrence of many, where the newest or the nearest is the better guess.
//!
//! Of pairs the newest occurrence alone is known. A guess by a pair is often wrong, but one row more costs
//! so little that it may pay; measured acceptance tells.

/// Tokens that an occurrence in a chain shares at least.
pub(super) const GRAM: usize = 3;
/// And one that is looked for where there is none.
const PAIR: usize = 2;
/// Longer matches are not told apart.
pub(super) const MAX_MATCH: usize = 64;
/// Occurrences looked at.
const PROBES: usize = 24;
/// Largest hash table, in entries. Beyond, chains grow longer and finds older ones less often.
const MAX_HEADS: usize = 1 << 20;

/// See the module. It holds positions alone; the tokens lie with the caller.
#[derive(Debug, Clone)]
pub(crate) struct SuffixIndex {
    /// By hash, the newest end of a gram and one more; 0 is none. The end is the index of the token
    /// after it.
    heads: Vec<u32>,
    /// By end, the one before it on its chain, likewise.
    previous: Vec<u32>,
    /// By hash, the index of the token after the newest pair that one follows; 0 is none.
    pairs: Vec<u32>,
}

/// An earlier occurrence of the end of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Match {
    /// Index of the token after it.
    pub(super) next: usize,
    /// Tokens in it, up to [`MAX_MATCH`].
    pub(super) len: usize,
}

impl SuffixIndex {
    /// An index for a text of about `expected` tokens.
    pub(super) fn new(expected: usize) -> Self {
        let heads = expected.next_power_of_two().clamp(1 << 8, MAX_HEADS);
        Self { heads: vec![0; heads], previous: Vec::with_capacity(expected), pairs: vec![0; heads] }
    }

    /// Tokens indexed.
    pub(super) fn len(&self) -> usize {
        self.previous.len()
    }

    /// Goes on indexing `tokens`, whose beginning was given before, by at most `limit` of them; returns
    /// how many that were.
    pub(super) fn extend(&mut self, tokens: &[u32], limit: usize) -> usize {
        let from = self.len();
        let to = tokens.len().min(from + limit);
        for last in from..to {
            let end = last as u32 + 1;
            let previous = match (last + 1).checked_sub(GRAM) {
                Some(first) => {
                    let head = self.slot(&tokens[first..=last]);
                    std::mem::replace(&mut self.heads[head], end)
                }
                None => 0,
            };
            self.previous.push(previous);
            if let Some(first) = last.checked_sub(PAIR) {
                let pair = self.slot(&tokens[first..last]);
                self.pairs[pair] = last as u32;
            }
        }
        to.saturating_sub(from)
    }

    /// The longest match in `tokens`, the text indexed, for the end of `context` that a token
    /// follows; of equal ones the newest. `context` may be the text itself.
    pub(super) fn longest(&self, tokens: &[u32], context: &[u32]) -> Option<Match> {
        let gram = &context[context.len().checked_sub(GRAM)?..];
        let mut best: Option<Match> = None;
        let mut end = self.heads[self.slot(gram)] as usize;
        for _ in 0..PROBES {
            if end == 0 {
                break;
            }
            // The end of the text itself is followed by nothing.
            if end < tokens.len() {
                let len = common_suffix(&tokens[..end], context);
                if len >= GRAM && best.is_none_or(|best| len > best.len) {
                    best = Some(Match { next: end, len });
                }
                if len == MAX_MATCH {
                    break;
                }
            }
            end = self.previous[end - 1] as usize;
        }
        best
    }

    /// Where the last two tokens of `context` came last in `tokens`, the text indexed, with one to follow.
    pub(super) fn newest_pair(&self, tokens: &[u32], context: &[u32]) -> Option<Match> {
        let pair = &context[context.len().checked_sub(PAIR)?..];
        let next = self.pairs[self.slot(pair)] as usize;
        let len = common_suffix(&tokens[..next], context);
        (len >= PAIR).then_some(Match { next, len })
    }

    fn slot(&self, gram: &[u32]) -> usize {
        // Fibonacci hashing, Knuth, volume 3, section 6.4.
        let mixed = gram.iter().fold(0u64, |hash, &token| {
            (hash.rotate_left(21) ^ u64::from(token)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        });
        (mixed >> 32) as usize & (self.heads.len() - 1)
    }
}

/// How many tokens both end with, up to [`MAX_MATCH`].
pub(super) fn common_suffix(a: &[u32], b: &[u32]) -> usize {
    a.iter().rev().zip(b.iter().rev()).take(MAX_MATCH).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn index(tokens: &[u32]) -> SuffixIndex {
        let mut index = SuffixIndex::new(tokens.len());
        while index.extend(tokens, 7) > 0 {}
        index
    }

    /// Tries every end, newest first.
    fn naive(tokens: &[u32], context: &[u32]) -> Option<Match> {
        let ends = (GRAM..tokens.len()).rev();
        let matches = ends.map(|next| Match { next, len: common_suffix(&tokens[..next], context) });
        // Of equal ones the first, which is the newest.
        matches.filter(|m| m.len >= GRAM).reduce(|best, m| if m.len > best.len { m } else { best })
    }

    #[test]
    fn the_longest_of_many_occurrences_is_found_whatever_came_since() {
        let tokens = [[9, 1, 2, 3, 4].as_slice(), &[8, 2, 3, 5, 7, 1, 2, 3, 6, 9, 1, 2, 3]].concat();
        assert_eq!(index(&tokens).longest(&tokens, &tokens), Some(Match { next: 4, len: 4 }));
    }

    #[test]
    fn a_run_of_one_token_goes_on() {
        let tokens = [5; 200];
        assert_eq!(index(&tokens).longest(&tokens, &tokens), Some(Match { next: 199, len: MAX_MATCH }));
    }

    #[test]
    fn a_pair_is_found_where_it_came_last_before_the_end() {
        let tokens = [1, 2, 3, 1, 2, 4, 9, 1, 2];
        let index = index(&tokens);
        assert_eq!(index.newest_pair(&tokens, &tokens), Some(Match { next: 5, len: 2 }));
        assert_eq!(index.newest_pair(&tokens, &[7, 2, 3]), Some(Match { next: 3, len: 2 }));
        assert_eq!(index.newest_pair(&tokens, &[4, 1]), None);
        assert_eq!(index.newest_pair(&tokens, &[4]), None);
    }

    proptest! {
        #[test]
        fn a_match_is_the_longest_as_a_search_of_everything_finds_it(
            // Few enough of a kind that the probes reach them all.
            tokens in prop::collection::vec(0u32..6, 0..160),
            context in prop::collection::vec(0u32..6, 0..40),
        ) {
            let index = index(&tokens);
            for context in [&tokens, &context] {
                let (found, naive) = (index.longest(&tokens, context), naive(&tokens, context));
                prop_assert_eq!(found, naive);
            }
        }

        #[test]
        fn a_match_is_a_match_where_many_are_alike(tokens in prop::collection::vec(0u32..2, 0..600)) {
            if let Some(Match { next, len }) = index(&tokens).longest(&tokens, &tokens) {
                prop_assert!(next < tokens.len() && len >= GRAM);
                prop_assert_eq!(common_suffix(&tokens[..next], &tokens), len);
            }
        }
    }
}
