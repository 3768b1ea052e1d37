//! Where a copy goes on that strayed from its source: a token was replaced, others were put in or left out.
//!
//! The source is searched close to where the copy left it, for even one token that matches: closest is
//! what takes the fewest tokens skipped or put in, as in an edit distance. Edits keep their surroundings,
//! so one such token says as much as several anywhere else.

use std::cmp::Reverse;

use super::acceptance::Evidence;
use super::suffix_index::common_suffix;

/// How far around the place the source is expected to go on, in tokens, and for how many this is hoped.
const BEHIND: usize = 8;
const AHEAD: usize = 64;
const PATIENCE: usize = 48;
/// So many tokens in one go may be a copy, and so many are one.
const MAYBE_COPY: usize = 3;
const COPY: usize = 8;
/// A token more that matches outweighs a place two to the power of this as far.
const MATCHED: i32 = 4;

/// A copy that strayed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stray {
    /// Index of the source's token that did not come.
    next: usize,
    /// Tokens copied before.
    copied: usize,
    /// Tokens that came since, the first wrong one included.
    since: usize,
}

/// Where it may go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Resumption {
    /// Index of the source's token that should come next.
    pub(super) next: usize,
    /// Tokens before it that matched; none right after a token that may stand for the source's.
    pub(super) matched: usize,
    pub(super) evidence: Evidence,
}

impl Stray {
    /// A token came that is not the source's at `next`, after `copied` that were as there; none if
    /// these are too few to speak of a copy.
    pub(super) fn new(next: usize, copied: usize) -> Option<Self> {
        (copied >= MAYBE_COPY).then_some(Self { next, copied, since: 1 })
    }

    /// One more came.
    pub(super) fn go_on(&mut self) {
        self.since += 1;
    }

    /// Whether the source may still go on.
    pub(super) fn is_hopeful(&self) -> bool {
        self.since <= PATIENCE
    }

    /// Tokens copied before.
    pub(super) fn copied(&self) -> usize {
        self.copied
    }

    /// Index of the source's token that did not come.
    pub(super) fn next(&self) -> usize {
        self.next
    }

    /// Where in `source` the sequence `own` goes on most likely. With `varied`, the token that did not
    /// come stood for another one already.
    pub(super) fn resumption(&self, source: &[u32], own: &[u32], varied: bool) -> Option<Resumption> {
        let from = self.next.saturating_sub(BEHIND).max(1);
        let to = (self.next + self.since + AHEAD).min(source.len().saturating_sub(1));
        let places = (from..=to).map(|next| (next, common_suffix(&source[..next], own).min(self.since)));
        let matches = places.filter(|(_, matched)| *matched > 0);
        let score = |next: usize, matched: usize| {
            MATCHED * matched as i32 - (1 + self.way(next, matched)).ilog2() as i32
        };
        let closest = |next: usize, matched: usize| (score(next, matched), Reverse(self.way(next, matched)));
        let best = matches.clone().max_by_key(|&(next, matched)| closest(next, matched));
        let Some((next, matched)) =
            best.filter(|&(next, matched)| self.since > 1 || !varied && score(next, matched) >= 0)
        else {
            let evidence = self.evidence(self.since == 1);
            return Some(Resumption { next: self.next + 1, matched: 0, evidence });
        };
        let rivals = |other: (usize, usize)| other.1 >= matched && source[other.0] != source[next];
        Some(Resumption { next, matched, evidence: self.evidence(!matches.clone().any(rivals)) })
    }

    fn evidence(&self, alone: bool) -> Evidence {
        if alone && self.copied >= COPY { Evidence::Resumed } else { Evidence::Vague }
    }

    /// Tokens of the source skipped or gone back, beyond those that others came for.
    fn way(&self, next: usize, matched: usize) -> usize {
        let begin = next - matched;
        let replaced = self.next + self.since.saturating_sub(matched);
        begin.abs_diff(self.next).min(begin.abs_diff(replaced))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A source of different tokens.
    fn source() -> Vec<u32> {
        (0..100).collect()
    }

    /// Copies `source` up to 40, strays from it, and goes on as told; where is that?
    fn resumption(source: &[u32], on: &[u32]) -> Option<Resumption> {
        let own = [&source[..40], on].concat();
        let mut stray = Stray::new(40, 40).unwrap();
        (1..on.len()).for_each(|_| stray.go_on());
        stray.resumption(source, &own, false)
    }

    #[test]
    fn a_first_other_token_replaces_one() {
        let expected = Resumption { next: 41, matched: 0, evidence: Evidence::Resumed };
        assert_eq!(resumption(&source(), &[500]), Some(expected));
        let expected = Resumption { evidence: Evidence::Vague, ..expected };
        assert_eq!(resumption(&source(), &[500, 501]), Some(expected));
    }

    #[test]
    fn a_token_tells_where_a_copy_goes_on_after_some_were_put_in_replaced_or_left_out() {
        for (on, next) in
            [(&[500, 501, 40][..], 41), (&[500, 501, 42], 43), (&[44], 45), (&[500, 58, 59], 60)]
        {
            let found = resumption(&source(), on).map(|found| (found.next, found.evidence));
            assert_eq!(found, Some((next, Evidence::Resumed)), "{on:?}");
        }
    }

    #[test]
    fn of_places_alike_the_closest_is_taken_with_doubt() {
        let mut source = source();
        (source[44], source[50]) = (7, 7);
        let found = resumption(&source, &[500, 7]).unwrap();
        assert_eq!((found.next, found.evidence), (45, Evidence::Vague));
        (source[45], source[51]) = (8, 8);
        let found = resumption(&source, &[500, 7]).unwrap();
        assert_eq!(found.evidence, Evidence::Resumed, "they foretell the same");
    }

    #[test]
    fn a_source_that_ends_or_has_none_is_no_fault() {
        for source in [&[][..], &[1], &[1, 2]] {
            let found = Stray::new(5, 20).unwrap().resumption(source, &[9, 2], false);
            assert_eq!(found.map(|found| found.matched), Some(0));
        }
    }
}
