//! Drafts without a second model: what followed the same words before will follow them again.
//!
//! Agents' answers repeat their input: a file comes back with one change, a path or a name recurs. A
//! [`Drafter`] watches one sequence: its [`Cursor`] points at the token, in what the sequence said or
//! was told before or in a predicted output, that should come next. Drafts are read off there. The step
//! loop runs them beside the last token and draws every position as always; a drafted token is
//! accepted if it is what was drawn, so answers are the same as without drafts, token for token.

mod acceptance;
mod drafting;
mod lengths;
mod step_cost;
mod suffix_index;

use std::sync::Arc;

use self::acceptance::Acceptance;
pub(crate) use self::drafting::Drafting;
use self::suffix_index::{MAX_MATCH, Match, SuffixIndex, common_suffix};

/// Longest draft of one sequence, in tokens.
pub(crate) const MAX_DRAFT: usize = 32;
/// With as many tokens matched, no better place is looked for.
const SURE: usize = 16;
/// After a miss, how far around it the text is expected to go on, and for how many tokens this is hoped.
const NEAR_BEHIND: usize = 8;
const NEAR_AHEAD: usize = 64;
const NEAR_TOKENS: usize = 48;
/// A near match counts for as many tokens more against a far one.
const NEAR_BONUS: usize = 3;

/// Finds drafts for one sequence; see the module.
#[derive(Debug)]
pub(crate) struct Drafter {
    own: SuffixIndex,
    prediction: Option<Prediction>,
    cursor: Option<Cursor>,
    /// Where the last long match ended in a miss, and tokens since.
    missed: Option<(Cursor, usize)>,
    rates: Acceptance,
    /// Tokens that came as the prediction foretold.
    predicted: usize,
}

/// A predicted output.
#[derive(Debug)]
struct Prediction {
    tokens: Arc<[u32]>,
    index: SuffixIndex,
}

/// Which text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    /// The sequence itself.
    Own,
    Prediction,
}

/// The token that should come next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cursor {
    source: Source,
    next: usize,
    /// Tokens before it that matched.
    matched: usize,
}

impl Drafter {
    /// For a sequence of about `expected` tokens, and what its client predicts.
    pub(crate) fn new(expected: usize, prediction: &Arc<[u32]>) -> Self {
        let prediction = (!prediction.is_empty())
            .then(|| Prediction { tokens: prediction.clone(), index: SuffixIndex::new(prediction.len()) });
        // The answer is expected to begin as predicted.
        let cursor = prediction.as_ref().map(|_| Cursor { source: Source::Prediction, next: 0, matched: 0 });
        Self {
            own: SuffixIndex::new(expected),
            prediction,
            cursor,
            missed: None,
            rates: Acceptance::of_sequence(),
            predicted: 0,
        }
    }

    /// Goes on indexing by at most `limit` tokens; `own` are the sequence's. Returns how many it were.
    pub(crate) fn index(&mut self, own: &[u32], limit: usize) -> usize {
        let predicted = self.prediction.as_mut().map_or(0, |p| p.index.extend(&p.tokens, limit));
        predicted + self.own.extend(own, limit - predicted)
    }

    /// A token follows `own`: was it foretold?
    pub(crate) fn observe(&mut self, own: &[u32], token: u32, engine: &mut Acceptance) {
        if let Some((_, since)) = &mut self.missed {
            *since += 1;
        }
        let Some(mut cursor) = self.cursor.take() else { return };
        let Some(&expected) = self.text(cursor.source, own).get(cursor.next) else { return };
        let hit = expected == token;
        self.rates.record(cursor.matched, hit);
        engine.record(cursor.matched, hit);
        if hit {
            self.predicted += usize::from(cursor.source == Source::Prediction);
            cursor.next += 1;
            cursor.matched += 1;
            self.cursor = Some(cursor);
            if cursor.matched >= NEAR_BONUS {
                self.missed = None;
            }
        } else if cursor.matched >= NEAR_BONUS || self.missed.is_none() {
            self.missed = Some((cursor, 0));
        }
    }

    /// Looks for the best place to go on from after `own`.
    pub(crate) fn aim(&mut self, own: &[u32]) {
        let matched = self.cursor.map_or(0, |cursor| cursor.matched);
        if matched >= SURE {
            return;
        }
        self.missed = self.missed.filter(|(_, since)| *since < NEAR_TOKENS);
        let near = self.near(own).map(|cursor| (cursor.matched + NEAR_BONUS, cursor));
        let predicted = self.prediction.as_ref().and_then(|p| {
            let found = p.index.longest(&p.tokens, own)?;
            Some((found.len + 1, Cursor::at(Source::Prediction, found)))
        });
        let repeated = self.own.longest(own, own).map(|found| (found.len, Cursor::at(Source::Own, found)));
        let best = [predicted, repeated, near].into_iter().flatten().max_by_key(|(score, _)| *score);
        if let Some((score, cursor)) = best
            && (self.cursor.is_none() || score > matched + NEAR_BONUS)
        {
            self.cursor = Some(cursor);
        }
        if self.cursor.is_none() {
            self.cursor = self.substituted();
        }
    }

    /// Right after a miss: perhaps one token stands for another, and the rest goes on.
    fn substituted(&self) -> Option<Cursor> {
        let (missed, since) = self.missed?;
        Some(Cursor { next: missed.next + 1, matched: 0, ..missed }).filter(|_| since == 0)
    }

    /// The longest match close to where the last long one ended; of equal ones the closest.
    fn near(&self, own: &[u32]) -> Option<Cursor> {
        let (missed, _) = self.missed?;
        let text = self.text(missed.source, own);
        let from = missed.next.saturating_sub(NEAR_BEHIND).max(1);
        let to = (missed.next + NEAR_AHEAD).min(text.len().saturating_sub(1));
        let matches = (from..=to).map(|next| (next, common_suffix(&text[..next], own)));
        let distance = |next: usize| std::cmp::Reverse(next.abs_diff(missed.next));
        let (next, matched) = matches.max_by_key(|&(next, matched)| (matched, distance(next)))?;
        (matched > 0).then_some(Cursor { source: missed.source, next, matched })
    }

    /// Probabilities that the first, the first two, .. of at most `most` drafted tokens are accepted.
    pub(crate) fn gains<'a>(
        &'a self,
        own: &[u32],
        most: usize,
        engine: &'a Acceptance,
    ) -> impl Iterator<Item = f32> + 'a {
        let (matched, room) = self.cursor.map_or((0, 0), |cursor| match cursor.source {
            Source::Own => (cursor.matched, MAX_DRAFT),
            source => (cursor.matched, self.text(source, own).len().saturating_sub(cursor.next)),
        });
        let rates = (0..most.min(room)).map(move |ahead| self.rates.rate(engine, matched + ahead));
        rates.scan(1.0, |gain, rate| {
            *gain *= rate;
            Some(*gain)
        })
    }

    /// Appends a draft of at most `len` tokens to `out`, cut before any that `ends` the sequence.
    pub(crate) fn draft(&self, own: &[u32], len: usize, out: &mut Vec<u32>, ends: impl Fn(u32) -> bool) {
        let Some(cursor) = self.cursor else { return };
        let text = self.text(cursor.source, own);
        let begin = out.len();
        for at in cursor.next..cursor.next + len {
            // What overtakes its own end repeats itself, as LZ77's copies do.
            let token = match text.get(at) {
                Some(&token) => token,
                None if cursor.source == Source::Own => out[begin + at - text.len()],
                None => break,
            };
            if ends(token) {
                break;
            }
            out.push(token);
        }
    }

    /// Of the predicted tokens, those that came and those that did not; `None` without prediction.
    pub(crate) fn prediction(&self) -> Option<(usize, usize)> {
        let tokens = self.prediction.as_ref()?.tokens.len();
        Some((self.predicted, tokens.saturating_sub(self.predicted)))
    }

    fn text<'a>(&'a self, source: Source, own: &'a [u32]) -> &'a [u32] {
        match (source, &self.prediction) {
            (Source::Prediction, Some(prediction)) => &prediction.tokens,
            _ => own,
        }
    }
}

impl Cursor {
    fn at(source: Source, found: Match) -> Self {
        Self { source, next: found.next, matched: found.len.min(MAX_MATCH) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lets a sequence grow from `prompt` by `answer`; tells how many of its tokens were foretold.
    fn foretold(prompt: &[u32], answer: &[u32], prediction: &[u32]) -> usize {
        let mut engine = Acceptance::of_engine();
        let mut drafter = Drafter::new(prompt.len() + answer.len(), &prediction.into());
        let mut own = prompt.to_vec();
        let mut hits = 0;
        for &token in answer {
            while drafter.index(&own, 1000) > 0 {}
            drafter.aim(&own);
            let mut draft = Vec::new();
            drafter.draft(&own, MAX_DRAFT, &mut draft, |_| false);
            assert!(draft.len() <= MAX_DRAFT);
            hits += usize::from(draft.first() == Some(&token));
            drafter.observe(&own, token, &mut engine);
            own.push(token);
        }
        hits
    }

    fn file(len: u32) -> Vec<u32> {
        (0..len).map(|i| 1000 + i * i % 257).collect()
    }

    #[test]
    fn a_copy_is_foretold_after_its_first_tokens() {
        let file = file(200);
        let prompt = [&[1, 2, 3], &file[..], &[4, 5]].concat();
        assert!(foretold(&prompt, &file, &[]) >= 196);
    }

    #[test]
    fn a_copy_goes_on_after_a_replaced_an_inserted_and_a_removed_token() {
        let file = file(200);
        let prompt = [&[1, 2, 3], &file[..], &[4, 5]].concat();
        let edited = [&file[..50], &[7], &file[51..100], &[8, 9], &file[100..150], &file[153..]].concat();
        assert!(foretold(&prompt, &edited, &[]) >= edited.len() - 4 - 8);
    }

    #[test]
    fn a_predicted_answer_is_foretold_from_its_first_token() {
        let file = file(100);
        assert_eq!(foretold(&[1, 2, 3], &file, &file), 100);
    }

    #[test]
    fn drafts_read_on_into_themselves() {
        let own = [1, 2, 3, 9, 1, 2, 3, 9, 1, 2, 3];
        let mut drafter = Drafter::new(own.len(), &Arc::from([]));
        drafter.index(&own, 100);
        drafter.aim(&own);
        let mut draft = Vec::new();
        drafter.draft(&own, 7, &mut draft, |_| false);
        assert_eq!(draft, [9, 1, 2, 3, 9, 1, 2]);
        draft.clear();
        drafter.draft(&own, 7, &mut draft, |token| token == 2);
        assert_eq!(draft, [9, 1]);
    }

    #[test]
    fn indexing_goes_on_where_its_limit_ended() {
        let own = file(100);
        let mut drafter = Drafter::new(100, &own.clone().into());
        assert_eq!((0..3).map(|_| drafter.index(&own, 70)).collect::<Vec<_>>(), [70, 70, 60]);
    }
}
