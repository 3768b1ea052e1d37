//! Answers that others were given before: a retry, a further choice, a subagent on the same errand says much
//! of it again.
//!
//! Whether a guess holds shows in how fast an answer comes. So a text helps only those who could have read
//! it: the owner's own sequences, or, where the server asks for no key and cannot tell owners apart, those
//! that name the same session. Only answers are kept: what a sibling has read that matters to a
//! sequence, its own prompt has too.

use std::collections::HashMap;
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

    fn empty() -> Self {
        Self { tokens: Vec::new(), index: SuffixIndex::new(KEPT) }
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
    /// Answers kept so far.
    count: u64,
}

#[derive(Debug)]
struct Kept {
    /// Shared with the sequences that began since it last grew; what they hold stays as it is.
    text: Arc<Reference>,
    /// When it last grew, in answers.
    last: u64,
}

impl Siblings {
    /// A sequence of a party's has ended, with `answer` to `prompt`.
    pub(crate) fn keep(&mut self, party: Party, prompt: &[u32], answer: &[u32]) {
        if answer.len() < LEAST {
            return;
        }
        self.make_room(&party);
        self.count += 1;
        let kept =
            self.parties.entry(party).or_insert_with(|| Kept { text: Arc::new(Reference::empty()), last: 0 });
        kept.last = self.count;
        let lead = &prompt[prompt.len().saturating_sub(LEAD)..];
        let answer = &answer[..answer.len().min(KEPT / 2 - LEAD - 1)];
        let text = Arc::make_mut(&mut kept.text);
        if text.tokens.len() + lead.len() + answer.len() + 1 > KEPT {
            // Half of it at once, so that it is not indexed anew each time.
            let half = text.tokens[text.tokens.len() - KEPT / 2..].to_vec();
            *text = Reference::empty();
            text.push(half.into_iter());
        }
        text.push(lead.iter().chain(answer).copied().chain([BETWEEN]));
    }

    /// What a party's sequence may draft from.
    pub(super) fn of(&self, party: &Party) -> Option<Arc<Reference>> {
        self.parties.get(party).map(|kept| kept.text.clone())
    }

    /// Forgets a party's answers; sequences that run may go on with them.
    pub(crate) fn forget(&mut self, party: &Party) {
        self.parties.remove(party);
    }

    /// Makes room for one more party, at the cost of the one that answered longest ago.
    fn make_room(&mut self, party: &Party) {
        if self.parties.len() < PARTIES || self.parties.contains_key(party) {
            return;
        }
        let oldest = self.parties.iter().min_by_key(|(_, kept)| kept.last).map(|(party, _)| party.clone());
        if let Some(oldest) = oldest {
            self.parties.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(name: &str) -> Party {
        Party::Owner(name.into())
    }

    #[test]
    fn what_one_party_said_is_not_there_for_another() {
        let mut siblings = Siblings::default();
        siblings.keep(owner("a"), &[1, 2], &[7; 20]);
        assert!(siblings.of(&owner("b")).is_none());
        assert!(siblings.of(&Party::Session("a".into())).is_none());
        let text = siblings.of(&owner("a")).unwrap();
        assert_eq!(text.tokens, [&[1, 2][..], &[7; 20], &[BETWEEN]].concat());
        siblings.forget(&owner("a"));
        assert!(siblings.of(&owner("a")).is_none());
    }

    #[test]
    fn the_newest_answers_are_kept_and_no_more_than_fit() {
        let mut siblings = Siblings::default();
        let prompt: Vec<u32> = (0..500).collect();
        for round in 0..200 {
            siblings.keep(owner("a"), &prompt, &[round; 300]);
            let text = siblings.of(&owner("a")).unwrap();
            assert!(text.tokens.len() <= KEPT && text.index.len() == text.tokens.len());
            let newest = [&prompt[500 - LEAD..], &[round; 300], &[BETWEEN]].concat();
            assert!(text.tokens.ends_with(&newest));
            assert!(round == 0 || text.tokens.contains(&(round - 1)), "one answer ousts no newer one");
        }
        siblings.keep(owner("a"), &prompt, &vec![1; 3 * KEPT]);
        assert!(siblings.of(&owner("a")).unwrap().tokens.len() <= KEPT);
    }

    #[test]
    fn a_text_in_use_stays_as_it_is() {
        let mut siblings = Siblings::default();
        siblings.keep(owner("a"), &[], &[5; 9]);
        let before = siblings.of(&owner("a")).unwrap();
        siblings.keep(owner("a"), &[], &[6; 9]);
        assert_eq!(before.tokens.len(), 10);
        assert_eq!(siblings.of(&owner("a")).unwrap().tokens.len(), 20);
    }

    #[test]
    fn the_party_silent_longest_is_forgotten_first() {
        let mut siblings = Siblings::default();
        for party in 0..PARTIES {
            siblings.keep(owner(&party.to_string()), &[], &[5; 9]);
        }
        siblings.keep(owner("0"), &[], &[5; 9]);
        siblings.keep(owner("one more"), &[], &[5; 9]);
        assert_eq!(siblings.parties.len(), PARTIES);
        assert!(siblings.of(&owner("0")).is_some() && siblings.of(&owner("1")).is_none());
    }
}
