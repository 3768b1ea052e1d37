//! Answers that others were given, or are being given: a retry, a further choice, a subagent on the same
//! errand says much of it again.
//!
//! Whether a guess holds shows in how fast an answer comes. So a text helps only those who could have read
//! it: the owner's own sequences, or, where the server asks for no key and cannot tell owners apart, those
//! that name the same session. Only answers are kept: what a sibling has read that matters to a
//! sequence, its own prompt has too.
//!
//! An answer is kept when it has ended, and while others of the party run beside it also in pieces of
//! [`PIECE`] tokens as it grows. A piece begins with what came before it, so that who has followed the one
//! before finds the next.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use super::suffix_index::{MAX_MATCH, SuffixIndex};
use crate::request::GenerateRequest;

/// Stands between two answers; no token.
pub(super) const BETWEEN: u32 = u32::MAX;
/// Tokens kept of a party's answers, the newest; some 260 KB with their index.
const KEPT: usize = 16 * 1024;
/// Parties kept, those that answered last.
const PARTIES: usize = 64;
/// Of a prompt's end, what is kept before its answer: the same question is known by it.
const LEAD: usize = MAX_MATCH;
/// Shorter answers are not worth it.
const LEAST: usize = 8;
/// Tokens by which an answer grows before its siblings see them.
pub(super) const PIECE: usize = 64;

/// Whose answers may help each other.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Party {
    /// All of an owner's.
    Owner(Arc<str>),
    /// Those of a session without an owner.
    Session(Arc<str>),
}

impl Party {
    /// None has a request that names neither.
    pub(crate) fn of(request: &GenerateRequest) -> Option<Self> {
        let session = || request.session.clone().map(Self::Session);
        request.owner.clone().map(Self::Owner).or_else(session)
    }
}

/// A text to search, which is not the sequence itself.
#[derive(Debug, Clone)]
pub(super) struct Reference {
    pub(super) tokens: Vec<u32>,
    pub(super) index: SuffixIndex,
}

impl Reference {
    /// A text whose index is to be made.
    pub(super) fn new(tokens: Vec<u32>) -> Self {
        Self { index: SuffixIndex::new(tokens.len()), tokens }
    }

    /// A text that will grow, and its index.
    fn of(tokens: impl Iterator<Item = u32>) -> Self {
        let mut text = Self { tokens: Vec::new(), index: SuffixIndex::new(KEPT) };
        text.push(tokens);
        text
    }

    fn push(&mut self, tokens: impl Iterator<Item = u32>) {
        self.tokens.extend(tokens);
        self.index.extend(&self.tokens, self.tokens.len());
    }
}

/// What all parties said last. See the module.
#[derive(Debug, Default)]
pub(crate) struct Siblings {
    parties: HashMap<Party, Kept>,
    /// Counts what happens to them.
    count: u64,
}

#[derive(Debug)]
struct Kept {
    view: View,
    /// What the text is made of, in order.
    said: VecDeque<Said>,
    /// When it last grew, in counts.
    last: u64,
    /// Sequences that run.
    running: usize,
}

/// A party's text at one time.
#[derive(Debug, Clone)]
pub(super) struct View {
    /// Shared with the sequences that look into it; what they hold stays as it is.
    pub(super) text: Arc<Reference>,
    /// Of two views with the same epoch, one's text is the beginning of the other's.
    pub(super) epoch: u64,
}

/// So many tokens of a text are this session's.
#[derive(Debug)]
struct Said {
    session: Option<Arc<str>>,
    tokens: usize,
}

impl Siblings {
    /// A sequence of a party's begins to run.
    pub(crate) fn begin(&mut self, party: &Party) {
        self.party(party).running += 1;
    }

    /// One of them has ended.
    pub(crate) fn end(&mut self, party: &Party) {
        if let Some(kept) = self.parties.get_mut(party) {
            kept.running = kept.running.saturating_sub(1);
        }
    }

    /// Whether several of a party's sequences run.
    pub(super) fn is_shared(&self, party: &Party) -> bool {
        self.parties.get(party).is_some_and(|kept| kept.running > 1)
    }

    /// A sequence of a party's, a turn of `session`, has said `tokens[from..]`.
    pub(crate) fn keep(&mut self, party: &Party, session: Option<&Arc<str>>, tokens: &[u32], from: usize) {
        if tokens.len() - from < LEAST {
            return;
        }
        // Of a long answer what was said last.
        let from = from.max(tokens.len().saturating_sub(KEPT / 2 - LEAD - 1));
        let answer = &tokens[from..];
        let kept = self.party(party);
        let lead = &tokens[from.saturating_sub(LEAD)..from];
        let more = lead.len() + answer.len() + 1;
        let epoch = kept.last;
        let text = Arc::make_mut(&mut kept.view.text);
        if text.tokens.len() + more > KEPT {
            // Half of it at once, so that it is not indexed anew each time.
            let half = text.tokens.split_off(text.tokens.len() - KEPT / 2);
            *text = Reference::of(half.into_iter());
            kept.view.epoch = epoch;
            shorten(&mut kept.said, KEPT / 2);
        }
        text.push(lead.iter().chain(answer).copied().chain([BETWEEN]));
        kept.said.push_back(Said { session: session.cloned(), tokens: more });
    }

    /// What a party's sequence may draft from.
    pub(super) fn of(&self, party: &Party) -> Option<View> {
        self.parties.get(party).map(|kept| kept.view.clone()).filter(|view| !view.text.tokens.is_empty())
    }

    /// Forgets what a session of a party's was answered.
    pub(crate) fn forget(&mut self, party: &Party, session: &str) {
        let is_its = |said: &Said| said.session.as_deref() == Some(session);
        if !self.parties.get(party).is_some_and(|kept| kept.said.iter().any(is_its)) {
            return;
        }
        let kept = self.party(party);
        let mut tokens = kept.view.text.tokens.iter().copied();
        let mut rest = Vec::with_capacity(tokens.len());
        for said in &kept.said {
            let its = tokens.by_ref().take(said.tokens);
            if is_its(said) { its.for_each(drop) } else { rest.extend(its) }
        }
        kept.said.retain(|said| !is_its(said));
        kept.view = View { text: Arc::new(Reference::of(rest.into_iter())), epoch: kept.last };
    }

    /// A party, in use now, at the cost of the one that was used longest ago if there are too many.
    fn party(&mut self, party: &Party) -> &mut Kept {
        if self.parties.len() >= PARTIES && !self.parties.contains_key(party) {
            let oldest = self.parties.iter().min_by_key(|(_, kept)| kept.last);
            if let Some(oldest) = oldest.map(|(party, _)| party.clone()) {
                self.parties.remove(&oldest);
            }
        }
        self.count += 1;
        let count = self.count;
        let new = || {
            let view = View { text: Arc::new(Reference::of(std::iter::empty())), epoch: count };
            Kept { view, said: VecDeque::new(), last: 0, running: 0 }
        };
        let kept = self.parties.entry(party.clone()).or_insert_with(new);
        kept.last = count;
        kept
    }
}

/// Leaves the last `tokens` of a text.
fn shorten(said: &mut VecDeque<Said>, tokens: usize) {
    let mut over = said.iter().map(|said| said.tokens).sum::<usize>().saturating_sub(tokens);
    while let Some(first) = said.front_mut().filter(|_| over > 0) {
        let less = over.min(first.tokens);
        first.tokens -= less;
        over -= less;
        if first.tokens == 0 {
            said.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(name: &str) -> Party {
        Party::Owner(name.into())
    }

    /// Keeps what a sequence of no session's said to a prompt.
    fn keep(siblings: &mut Siblings, party: &Party, prompt: &[u32], answer: &[u32]) {
        siblings.keep(party, None, &[prompt, answer].concat(), prompt.len());
    }

    fn tokens(siblings: &Siblings, party: &Party) -> Option<Vec<u32>> {
        siblings.of(party).map(|view| view.text.tokens.clone())
    }

    #[test]
    fn what_one_party_said_is_not_there_for_another() {
        let mut siblings = Siblings::default();
        keep(&mut siblings, &owner("a"), &[1, 2], &[7; 20]);
        assert!(siblings.of(&owner("b")).is_none());
        assert!(siblings.of(&Party::Session("a".into())).is_none());
        assert_eq!(tokens(&siblings, &owner("a")).unwrap(), [&[1, 2][..], &[7; 20], &[BETWEEN]].concat());
    }

    #[test]
    fn what_one_session_was_answered_is_forgotten_alone() {
        let mut siblings = Siblings::default();
        let sessions: [Arc<str>; 2] = ["x".into(), "y".into()];
        for round in 0..3 {
            for (session, token) in sessions.iter().zip([7, 9]) {
                siblings.keep(&owner("a"), Some(session), &[token + round; 20], 4);
            }
        }
        let before = siblings.of(&owner("a")).unwrap();
        siblings.forget(&owner("a"), "x");
        let rest: Vec<u32> = (9..12).flat_map(|token| [vec![token; 20], vec![BETWEEN]].concat()).collect();
        let after = siblings.of(&owner("a")).unwrap();
        assert_eq!((&after.text.tokens, after.text.index.len()), (&rest, rest.len()));
        assert_ne!(before.epoch, after.epoch, "places have changed");
        siblings.forget(&owner("a"), "y");
        assert!(siblings.of(&owner("a")).is_none());
    }

    #[test]
    fn the_newest_answers_are_kept_and_no_more_than_fit() {
        let mut siblings = Siblings::default();
        let prompt: Vec<u32> = (0..500).collect();
        for round in 0..200 {
            keep(&mut siblings, &owner("a"), &prompt, &[round; 300]);
            let view = siblings.of(&owner("a")).unwrap();
            let text = view.text;
            assert!(text.tokens.len() <= KEPT && text.index.len() == text.tokens.len());
            let newest = [&prompt[500 - LEAD..], &[round; 300], &[BETWEEN]].concat();
            assert!(text.tokens.ends_with(&newest));
            assert!(round == 0 || text.tokens.contains(&(round - 1)), "one answer ousts no newer one");
            let said = siblings.parties[&owner("a")].said.iter().map(|said| said.tokens);
            assert_eq!(said.sum::<usize>(), text.tokens.len());
        }
        let long: Vec<u32> = (0..3 * KEPT as u32).collect();
        keep(&mut siblings, &owner("a"), &prompt, &long);
        let text = tokens(&siblings, &owner("a")).unwrap();
        assert!(text.len() <= KEPT && text.ends_with(&[&long[5 * KEPT / 2 + 1..], &[BETWEEN]].concat()));
    }

    #[test]
    fn a_text_in_use_stays_as_it_is_and_its_places_hold_while_the_epoch_does() {
        let mut siblings = Siblings::default();
        keep(&mut siblings, &owner("a"), &[], &[5; 9]);
        let mut before = siblings.of(&owner("a")).unwrap();
        let first = before.clone();
        for round in 0..200 {
            keep(&mut siblings, &owner("a"), &[], &[round; 300]);
            let now = siblings.of(&owner("a")).unwrap();
            assert_eq!(now.text.tokens.starts_with(&before.text.tokens), now.epoch == before.epoch);
            before = now;
        }
        assert_eq!(first.text.tokens, [&[5; 9][..], &[BETWEEN]].concat());
        assert_ne!(first.epoch, before.epoch);
    }

    #[test]
    fn the_party_silent_longest_is_forgotten_first() {
        let mut siblings = Siblings::default();
        for party in 0..PARTIES {
            keep(&mut siblings, &owner(&party.to_string()), &[], &[5; 9]);
        }
        keep(&mut siblings, &owner("0"), &[], &[5; 9]);
        keep(&mut siblings, &owner("one more"), &[], &[5; 9]);
        assert_eq!(siblings.parties.len(), PARTIES);
        assert!(siblings.of(&owner("0")).is_some() && siblings.of(&owner("1")).is_none());
    }

    #[test]
    fn a_party_is_shared_while_several_of_it_run() {
        let mut siblings = Siblings::default();
        let shared = |siblings: &mut Siblings| siblings.is_shared(&owner("a"));
        siblings.begin(&owner("a"));
        siblings.begin(&owner("b"));
        assert!(!shared(&mut siblings));
        siblings.begin(&owner("a"));
        assert!(shared(&mut siblings));
        siblings.end(&owner("a"));
        assert!(!shared(&mut siblings));
    }
}
