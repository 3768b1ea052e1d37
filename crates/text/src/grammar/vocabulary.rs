//! Our vocabulary as llguidance wants it: a trie of all tokens' bytes, and our tokenizer for what a
//! grammar forces.

use std::sync::Arc;

use aho_corasick::{AhoCorasick, MatchKind};
use llguidance::toktrie::{INVALID_TOKEN, TokRxInfo, TokTrie, TokenId, TokenizerEnv};

use crate::Parts;
use crate::tokenizer::Tokenizer;
use crate::vocab::{Kind, Vocab};

/// A model's tokens. In the trie, control tokens begin with a byte that no text has, so a grammar
/// matches them only by name; the others are their text.
pub(super) struct Vocabulary {
    trie: TokTrie,
    tokenizer: Arc<Tokenizer>,
    words: Words,
}

/// Whole words that the model knows as one token although no merge makes them (`<tool_call>`).
struct Words {
    /// `None` if there are none.
    finder: Option<AhoCorasick>,
    tokens: Vec<TokenId>,
}

impl Vocabulary {
    /// Takes tenths of a second for 150,000 tokens.
    pub(super) fn new(parts: &Parts) -> Self {
        let vocab = &parts.vocab;
        let ids = 0..vocab.len() as TokenId;
        let spellings: Vec<Vec<u8>> = ids.map(|id| spelling(vocab, id)).collect();
        let info = TokRxInfo::new(vocab.len() as u32, INVALID_TOKEN);
        let mut trie = TokTrie::from(&info, &spellings);
        if !parts.stop_tokens.is_empty() {
            trie = trie.with_eos_tokens(&parts.stop_tokens);
        }
        Self { trie, tokenizer: parts.tokenizer.clone(), words: Words::of(vocab) }
    }

    fn encode(&self, text: &str) -> Vec<TokenId> {
        let mut tokens = Vec::new();
        let mut done = 0;
        let plain = |text: &str, tokens: &mut Vec<TokenId>| {
            text.is_empty() || self.tokenizer.encode_continued(text, tokens).is_ok()
        };
        let mut whole = true;
        for found in self.words.finder.iter().flat_map(|finder| finder.find_iter(text)) {
            whole &= plain(&text[done..found.start()], &mut tokens);
            tokens.push(self.words.tokens[found.pattern()]);
            done = found.end();
        }
        whole &= plain(&text[done..], &mut tokens);
        // A tokenizer that fails, or normalizes, cannot be followed.
        if whole && self.trie.decode_raw(&tokens) == text.as_bytes() {
            tokens
        } else {
            self.trie.greedy_tokenize(text.as_bytes())
        }
    }
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie.tokenize_with_greedy_fallback(bytes, |text| self.encode(text))
    }
}

fn spelling(vocab: &Vocab, id: TokenId) -> Vec<u8> {
    let bytes = vocab.bytes(id);
    if vocab.is_control(id) && !bytes.is_empty() {
        [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat()
    } else {
        bytes.to_vec()
    }
}

impl Words {
    fn of(vocab: &Vocab) -> Self {
        let words = vocab
            .specials()
            .filter(|&(text, id)| vocab.kind(id) == Some(Kind::UserDefined) && !text.trim().is_empty());
        let (texts, tokens): (Vec<&str>, Vec<TokenId>) = words.unzip();
        let build = || AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(&texts).ok();
        Self { finder: (!texts.is_empty()).then(build).flatten(), tokens }
    }
}
