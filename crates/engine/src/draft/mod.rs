//! Drafts: what followed the same words before will follow them again.
//!
//! Agents' answers repeat their input: a file comes back with one change, a path or a name recurs. A
//! [`Drafter`] watches one sequence: its [`Cursor`] points at the token, in what the sequence said or
//! was told before, in a predicted output or in a sibling's answer, that should come next. Drafts are
//! read off there. The step loop runs them beside the last token and draws every position as always; a
//! drafted token is accepted if it is what was drawn, so answers are the same as without drafts, token
//! for token.
//!
//! Where that finds little, a draft model may guess instead: see [`ModelDrafter`]. All else is the same.

mod acceptance;
mod drafting;
mod lengths;
mod lost_time;
mod model_drafter;
mod promise;
#[cfg(test)]
mod replay;
mod siblings;
mod step_cost;
mod stray;
mod suffix_index;
mod varied;
mod window;

use std::sync::Arc;

use self::acceptance::{Acceptance, Evidence};
pub(crate) use self::drafting::Drafting;
pub(crate) use self::model_drafter::{Find, ModelDrafter, Subject};
pub(crate) use self::siblings::Party;
use self::siblings::{BETWEEN, PIECE, Reference, Siblings, View};
use self::stray::Stray;
use self::suffix_index::{MAX_MATCH, SuffixIndex};
use self::varied::Varied;

/// Longest draft of one sequence, in tokens.
pub(crate) const MAX_DRAFT: usize = 32;
/// With as many tokens matched, no better place is looked for.
const SURE: usize = 16;
/// Another place must be this much likelier than the one followed.
const LEAST_BETTER: f32 = 0.05;

/// Tokens matched that foretell one in earnest.
const LEAST_VARIED: usize = 2;

/// Finds drafts for one sequence; see the module.
#[derive(Debug)]
pub(crate) struct Drafter {
    own: SuffixIndex,
    prediction: Option<Reference>,
    party: Option<Party>,
    siblings: Option<View>,
    /// How many of its own tokens the party has been shown.
    shown: usize,
    cursor: Option<Cursor>,
    /// A copy that may still go on.
    stray: Option<(Source, Stray)>,
    rates: Acceptance,
    varied: Varied,
    /// Tokens that came as the prediction foretold.
    predicted: usize,
}

/// Which text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    /// The sequence itself.
    Own,
    Prediction,
    Siblings,
}

/// The token that should come next.
#[derive(Debug, Clone, Copy)]
struct Cursor {
    source: Source,
    next: usize,
    /// Tokens before it that matched.
    matched: usize,
    /// Tokens copied before the copy strayed that this one continues.
    copied: usize,
    evidence: Evidence,
}

impl Drafter {
    /// For a sequence of about `expected` tokens, what its client predicts and what its party's other
    /// sequences said.
    pub(crate) fn new(expected: usize, prediction: &[u32], party: Option<&Party>, said: &Siblings) -> Self {
        let prediction = (!prediction.is_empty()).then(|| Reference::new(prediction.to_vec()));
        // The answer is expected to begin as predicted.
        let evidence = Evidence::Predicted;
        let begin = Cursor { source: Source::Prediction, next: 0, matched: 0, copied: 0, evidence };
        Self {
            own: SuffixIndex::new(expected),
            cursor: prediction.as_ref().map(|_| begin),
            prediction,
            siblings: party.and_then(|party| said.of(party)),
            party: party.cloned(),
            shown: 0,
            stray: None,
            rates: Acceptance::of_sequence(),
            varied: Varied::default(),
            predicted: 0,
        }
    }

    /// Goes on indexing by at most `limit` tokens; `own` are the sequence's. Returns how many it were.
    pub(crate) fn index(&mut self, own: &[u32], limit: usize) -> usize {
        let predicted = self.prediction.as_mut().map_or(0, |p| p.index.extend(&p.tokens, limit));
        predicted + self.own.extend(own, limit - predicted)
    }

    /// Shows the party what the sequence, a turn of `session`, has said since it last did: a piece at a time
    /// while it runs, where others run too, and the rest where it `ends`.
    pub(crate) fn show(
        &mut self,
        own: &[u32],
        prompt_len: usize,
        session: Option<&Arc<str>>,
        ends: bool,
        said: &mut Siblings,
    ) {
        let Some(party) = &self.party else { return };
        let from = self.shown.max(prompt_len);
        if ends || own.len() >= from + PIECE && said.is_shared(party) {
            said.keep(party, session, own, from);
            self.shown = own.len();
        }
    }

    /// Takes up what the party has said since the last time.
    pub(crate) fn hear(&mut self, said: &Siblings) {
        let now = self.party.as_ref().and_then(|party| said.of(party));
        let epoch = |view: &Option<View>| view.as_ref().map(|view| view.epoch);
        if epoch(&now) != epoch(&self.siblings) {
            self.cursor = self.cursor.filter(|cursor| cursor.source != Source::Siblings);
            self.stray = self.stray.filter(|(source, _)| *source != Source::Siblings);
        }
        self.siblings = now;
    }

    /// A token follows `own`: was it foretold?
    pub(crate) fn observe(&mut self, own: &[u32], token: u32, engine: &mut Acceptance) {
        if let Some((_, stray)) = &mut self.stray {
            stray.go_on();
        }
        let Some(mut cursor) = self.cursor.take() else { return };
        let Some(&expected) = self.text(cursor.source, own).get(cursor.next) else { return };
        if expected == BETWEEN {
            return;
        }
        let hit = expected == token;
        let evidence = self.evidence(cursor, 0);
        self.rates.record(evidence, cursor.matched, hit);
        engine.record(evidence, cursor.matched, hit);
        if !hit && cursor.matched >= LEAST_VARIED {
            self.varied.mark(own.len());
        }
        if hit {
            self.predicted += usize::from(cursor.source == Source::Prediction);
            cursor.next += 1;
            cursor.matched += 1;
            self.cursor = Some(cursor);
            if cursor.is_sure() {
                self.stray = None;
            }
        } else if self.stray.is_none() {
            let stray = Stray::new(cursor.next, cursor.copied + cursor.matched);
            self.stray = stray.map(|stray| (cursor.source, stray));
        }
    }

    /// Looks for the best place to go on from after `own`.
    pub(crate) fn aim(&mut self, own: &[u32], engine: &Acceptance) {
        if self.cursor.is_some_and(|cursor| cursor.matched >= SURE) {
            return;
        }
        self.stray = self.stray.filter(|(_, stray)| stray.is_hopeful());
        let rate = |cursor: &Cursor| self.rates.rate(engine, cursor.evidence, cursor.matched);
        let found = [
            self.found(Source::Siblings, own),
            self.found(Source::Own, own),
            self.found(Source::Prediction, own),
            self.resumed(own),
        ];
        // Of equally likely ones the last.
        let best = found.into_iter().flatten().max_by(|a, b| rate(a).total_cmp(&rate(b)));
        self.cursor = match (self.cursor, best) {
            (Some(followed), Some(best)) => {
                let same = (followed.source, followed.next) == (best.source, best.next);
                let least = rate(&followed) + if same { 0.0 } else { LEAST_BETTER };
                Some(if rate(&best) > least { best } else { followed })
            }
            (followed, best) => followed.or(best),
        };
    }

    /// The longest match in a text, or the newest of two tokens.
    fn found(&self, source: Source, own: &[u32]) -> Option<Cursor> {
        let (index, evidence) = match source {
            Source::Own => (&self.own, Evidence::Repeated),
            Source::Prediction => (&self.prediction.as_ref()?.index, Evidence::Predicted),
            Source::Siblings => (&self.siblings.as_ref()?.text.index, Evidence::Sibling),
        };
        let text = self.text(source, own);
        let found = index.longest(text, own).or_else(|| index.newest_pair(text, own))?;
        if text[found.next] == BETWEEN {
            return None;
        }
        Some(Cursor { source, next: found.next, matched: found.len.min(MAX_MATCH), copied: 0, evidence })
    }

    /// Where a copy that strayed goes on.
    fn resumed(&self, own: &[u32]) -> Option<Cursor> {
        let (source, stray) = self.stray?;
        let varied = source == Source::Own && self.varied.contains(stray.next());
        let found = stray.resumption(self.text(source, own), own, varied)?;
        let copied = stray.copied();
        Some(Cursor { source, next: found.next, matched: found.matched, copied, evidence: found.evidence })
    }

    /// Probabilities that the first, the first two, .. of at most `most` drafted tokens are accepted.
    pub(crate) fn gains<'a>(
        &'a self,
        own: &[u32],
        most: usize,
        engine: &'a Acceptance,
    ) -> impl Iterator<Item = f32> + 'a {
        let cursor = self.cursor.map(|cursor| (cursor, self.room(cursor, own).min(most)));
        let rates = cursor.into_iter().flat_map(move |(cursor, room)| {
            let rate =
                move |ahead| self.rates.rate(engine, self.evidence(cursor, ahead), cursor.matched + ahead);
            (0..room).map(rate)
        });
        rates.scan(1.0, |gain, rate| {
            *gain *= rate;
            Some(*gain)
        })
    }

    /// What speaks for the token `ahead` of where the cursor is.
    fn evidence(&self, cursor: Cursor, ahead: usize) -> Evidence {
        match cursor.source {
            Source::Own if self.varied.contains(cursor.next + ahead) => Evidence::Varied,
            _ => cursor.evidence,
        }
    }

    /// How many tokens may be drafted from a place on.
    fn room(&self, cursor: Cursor, own: &[u32]) -> usize {
        match cursor.source {
            Source::Own => MAX_DRAFT,
            source => {
                let rest = self.text(source, own).get(cursor.next..).unwrap_or_default();
                rest.iter().take(MAX_DRAFT).take_while(|token| **token != BETWEEN).count()
            }
        }
    }

    /// Appends a draft of at most `len` tokens to `out`, cut before any that `ends` the sequence.
    pub(crate) fn draft(&self, own: &[u32], len: usize, out: &mut Vec<u32>, ends: impl Fn(u32) -> bool) {
        let Some(cursor) = self.cursor else { return };
        let text = self.text(cursor.source, own);
        let begin = out.len();
        for at in cursor.next..cursor.next + len.min(self.room(cursor, own)) {
            // What overtakes its own end repeats itself, as LZ77's copies do.
            let token = match text.get(at) {
                Some(&token) => token,
                None => out[begin + at - text.len()],
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
        match source {
            Source::Own => own,
            Source::Prediction => self.prediction.as_ref().map_or(&[][..], |text| &text.tokens),
            Source::Siblings => self.siblings.as_ref().map_or(&[][..], |view| &view.text.tokens),
        }
    }
}

impl Cursor {
    /// Whether the copy that strayed goes on here, or is over.
    fn is_sure(&self) -> bool {
        self.matched >= if self.evidence == Evidence::Resumed { 3 } else { 6 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drafter(expected: usize, prediction: &[u32]) -> Drafter {
        Drafter::new(expected, prediction, None, &Siblings::default())
    }

    /// Lets a sequence grow from `prompt` by `answer`; tells how many of its tokens were foretold.
    fn foretold(prompt: &[u32], answer: &[u32], prediction: &[u32]) -> usize {
        let mut engine = Acceptance::of_engine();
        let mut drafter = drafter(prompt.len() + answer.len(), prediction);
        let mut own = prompt.to_vec();
        let mut hits = 0;
        for &token in answer {
            while drafter.index(&own, 1000) > 0 {}
            drafter.aim(&own, &engine);
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
        let mut drafter = drafter(own.len(), &[]);
        drafter.index(&own, 100);
        drafter.aim(&own, &Acceptance::of_engine());
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
        let mut drafter = drafter(100, &own);
        assert_eq!((0..3).map(|_| drafter.index(&own, 70)).collect::<Vec<_>>(), [70, 70, 60]);
    }
}
