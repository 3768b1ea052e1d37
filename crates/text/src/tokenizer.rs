//! Text to tokens: markup is found first, the text between is cut and merged.

use std::borrow::Cow;

use aho_corasick::{AhoCorasick, MatchKind};
use regex_syntax::is_word_character;
use tokenizers::Model;
use tokenizers::models::bpe::BPE;
use unicode_normalization::{IsNormalized, UnicodeNormalization, is_nfc_quick};

use crate::TextError;
use crate::listed::Listed;
use crate::pretokenizer::PreTokenizer;
use crate::token_cache::TokenCache;
use crate::vocab::CHAR_OF_BYTE;

/// Length from which on a text between markup is cut into pieces that are remembered apart. A text
/// that grows is encoded anew from its last cut on.
const PIECE_BYTES: usize = 4096;

/// Encodes text with a byte-pair vocabulary.
pub(crate) struct Tokenizer {
    pub(crate) bpe: BPE,
    pub(crate) pipeline: Pipeline,
    pub(crate) markup: Markup,
    pub(crate) cache: TokenCache,
}

/// What happens to a text before merging.
pub(crate) enum Pipeline {
    /// Cut by regular expressions, then each byte becomes its character.
    ByteLevel {
        /// Whether the text is brought into Unicode's composed form first.
        compose: bool,
        pre_tokenizer: PreTokenizer,
    },
    /// SentencePiece: spaces become `▁`, no cuts; a text may get a space put before it.
    SentencePiece { leading_space: bool },
    /// Whatever else a tokenizer.json asks for.
    Listed(Box<Listed>),
}

/// A token that is found in text by its own spelling, before all merging.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Marker {
    pub(crate) text: String,
    pub(crate) token: u32,
    /// How it is spelled in normalized text, if it is looked for there only.
    pub(crate) normalized: Option<String>,
    /// Whether it may not stand right beside a letter, a digit, or what else makes a word (`\w`).
    pub(crate) single_word: bool,
    /// Whether it takes the whitespace to its left or right with it.
    pub(crate) strip_left: bool,
    pub(crate) strip_right: bool,
}

/// The markers of a vocabulary: all of them, and those that hold in plain text too.
pub(crate) struct Markup {
    all: Markers,
    plain: Markers,
}

/// Markers that are found in a text as it is, and those that are then found in what is between, once normalized.
struct Markers {
    raw: Finder,
    normalized: Finder,
}

/// Finds markers by their spellings, of several at one place the longest.
#[derive(Default)]
pub(crate) struct Finder {
    /// `None` without markers.
    automaton: Option<AhoCorasick>,
    markers: Vec<Marker>,
}

/// A stretch of text between markers, or a marker.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Span<'t> {
    Text(&'t str),
    Token(u32, &'t str),
}

impl Tokenizer {
    /// Appends the tokens of `text`; with `special`, markup becomes its token.
    pub(crate) fn encode(&self, text: &str, special: bool, out: &mut Vec<u32>) -> Result<(), TextError> {
        let markers = if special { &self.markup.all } else { &self.markup.plain };
        if let Pipeline::Listed(listed) = &self.pipeline
            && (listed.first.sees_the_start() || !markers.normalized.is_empty())
        {
            return listed.first.encode(&self.bpe, text, &markers.raw.spans(text), &markers.normalized, out);
        }
        for span in markers.raw.spans(text) {
            match span {
                Span::Token(token, _) => out.push(token),
                Span::Text(text) if markers.normalized.is_empty() => self.encode_remembered(text, out)?,
                Span::Text(text) => self.encode_normalized(text, &markers.normalized, out)?,
            }
        }
        Ok(())
    }

    /// Appends the tokens of a text in which markers are looked for once it is normalized.
    fn encode_normalized(&self, text: &str, markers: &Finder, out: &mut Vec<u32>) -> Result<(), TextError> {
        for span in markers.spans(&self.pipeline.composed(text)) {
            match span {
                Span::Token(token, _) => out.push(token),
                Span::Text(text) => self.encode_remembered(text, out)?,
            }
        }
        Ok(())
    }

    /// Whether markup, found wherever it stands, parts a text into texts that are encoded each by itself.
    pub(crate) fn cuts_at_markup(&self) -> bool {
        let sees_the_start =
            matches!(&self.pipeline, Pipeline::Listed(listed) if listed.first.sees_the_start());
        let sees_around = |marker: &Marker| marker.single_word || marker.strip_left || marker.strip_right;
        // A normalized text may have other markers than its parts.
        !sees_the_start
            && self.markup.all.normalized.is_empty()
            && !self.markup.all.raw.markers.iter().any(sees_around)
    }

    /// Appends the tokens of a text between markup, of which much may have been encoded before.
    fn encode_remembered(&self, mut text: &str, out: &mut Vec<u32>) -> Result<(), TextError> {
        while !text.is_empty() {
            let (piece, rest) = text.split_at(self.pipeline.independent_piece(text));
            self.cache.encode(piece, out, |out| self.encode_plain(piece, true, out))?;
            text = rest;
        }
        Ok(())
    }

    /// Appends the tokens of a text without markup that continues another one: no space is put before it.
    pub(crate) fn encode_continued(&self, text: &str, out: &mut Vec<u32>) -> Result<(), TextError> {
        match &self.pipeline {
            Pipeline::SentencePiece { .. } => self.encode_plain(text, false, out),
            Pipeline::Listed(listed) => {
                let Markers { raw, normalized } = &self.markup.plain;
                listed.continued.encode(&self.bpe, text, &raw.spans(text), normalized, out)
            }
            Pipeline::ByteLevel { .. } => self.encode(text, false, out),
        }
    }

    fn encode_plain(&self, text: &str, first: bool, out: &mut Vec<u32>) -> Result<(), TextError> {
        let mut spelled = String::new();
        match &self.pipeline {
            Pipeline::ByteLevel { pre_tokenizer, .. } => {
                pre_tokenizer.split(&self.pipeline.composed(text), &mut |piece| {
                    spelled.clear();
                    spelled.extend(piece.bytes().map(|byte| CHAR_OF_BYTE[byte as usize]));
                    self.merge(&spelled, out)
                })
            }
            Pipeline::SentencePiece { leading_space } => {
                if *leading_space && first {
                    spelled.push('▁');
                }
                spelled.push_str(&text.replace(' ', "▁"));
                self.merge(&spelled, out)
            }
            Pipeline::Listed(listed) => {
                listed.first.encode(&self.bpe, text, &[Span::Text(text)], &Finder::default(), out)
            }
        }
    }

    fn merge(&self, spelled: &str, out: &mut Vec<u32>) -> Result<(), TextError> {
        let tokens = self.bpe.tokenize(spelled).map_err(broken)?;
        out.extend(tokens.iter().map(|token| token.id));
        Ok(())
    }
}

impl Pipeline {
    /// Bytes of the text's first piece that is encoded the same whatever follows it.
    fn independent_piece(&self, text: &str) -> usize {
        match self {
            Self::ByteLevel { pre_tokenizer, .. } if text.len() > PIECE_BYTES => {
                pre_tokenizer.word_after(text, PIECE_BYTES).unwrap_or(text.len())
            }
            _ => text.len(),
        }
    }

    /// The text in Unicode's composed form, where that is asked for.
    fn composed<'t>(&self, text: &'t str) -> Cow<'t, str> {
        match self {
            Self::ByteLevel { compose: true, .. } if is_nfc_quick(text.chars()) != IsNormalized::Yes => {
                text.nfc().collect()
            }
            _ => text.into(),
        }
    }

    /// The text as it is when it is cut.
    ///
    /// # Errors
    /// If the model's own normalizer fails.
    pub(crate) fn normalized(&self, text: &str) -> Result<String, TextError> {
        match self {
            Self::Listed(listed) => listed.first.normalized(text),
            _ => Ok(self.composed(text).into_owned()),
        }
    }
}

pub(crate) fn broken(error: tokenizers::Error) -> TextError {
    TextError::Model(format!("the model's tokenizer failed on the text: {error}"))
}

impl Markup {
    /// Of these markers. Those that are all whitespace are spelling, not markup: they hold in plain text too.
    pub(crate) fn new(markers: Vec<Marker>) -> Result<Self, TextError> {
        let markers: Vec<_> = markers.into_iter().filter(|marker| !marker.text.is_empty()).collect();
        let plain = markers.iter().filter(|marker| marker.text.trim().is_empty()).cloned().collect();
        Ok(Self { all: Markers::new(markers)?, plain: Markers::new(plain)? })
    }
}

impl Markers {
    fn new(markers: Vec<Marker>) -> Result<Self, TextError> {
        let (raw, normalized) = markers.into_iter().partition(|marker| marker.normalized.is_none());
        Ok(Self { raw: Finder::new(raw)?, normalized: Finder::new(normalized)? })
    }
}

impl Marker {
    /// What is looked for.
    fn spelling(&self) -> &str {
        self.normalized.as_ref().unwrap_or(&self.text)
    }

    /// Whether it may stand between these texts.
    fn fits(&self, before: &str, after: &str) -> bool {
        let in_word = |c: Option<char>| c.is_some_and(is_word_character);
        !(self.single_word && (in_word(before.chars().next_back()) || in_word(after.chars().next())))
    }
}

impl Finder {
    fn new(mut markers: Vec<Marker>) -> Result<Self, TextError> {
        markers.retain(|marker| !marker.spelling().is_empty());
        if markers.is_empty() {
            return Ok(Self { automaton: None, markers });
        }
        let automaton = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(markers.iter().map(Marker::spelling))
            .map_err(|error| TextError::Model(format!("the model's special tokens are too many: {error}")))?;
        Ok(Self { automaton: Some(automaton), markers })
    }

    /// Whether it finds nothing.
    pub(crate) fn is_empty(&self) -> bool {
        self.markers.is_empty()
    }

    /// The text as spans that, put together, are the text.
    pub(crate) fn spans<'t>(&self, text: &'t str) -> Vec<Span<'t>> {
        let mut spans = Vec::new();
        let mut done = 0;
        for found in self.automaton.iter().flat_map(|automaton| automaton.find_iter(text)) {
            let marker = &self.markers[found.pattern()];
            // The marker before may have taken whitespace that is a marker itself.
            if found.start() < done || !marker.fits(&text[..found.start()], &text[found.end()..]) {
                continue;
            }
            let before = &text[done..found.start()];
            let before = if marker.strip_left { before.trim_end() } else { before };
            if !before.is_empty() {
                spans.push(Span::Text(before));
            }
            let start = done + before.len();
            let after = &text[found.end()..];
            let taken = if marker.strip_right { after.len() - after.trim_start().len() } else { 0 };
            done = found.end() + taken;
            spans.push(Span::Token(marker.token, &text[start..done]));
        }
        if done < text.len() {
            spans.push(Span::Text(&text[done..]));
        }
        spans
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::test_runner::TestRunner;
    use rudder_model::Gguf;
    use tokenizers::models::bpe::Vocab;

    use super::*;
    use crate::{Text, TextSource};

    /// Bytes, a few merges, and two markers.
    fn small() -> Tokenizer {
        let tokens = CHAR_OF_BYTE.iter().map(char::to_string);
        let merges = [("a", "b"), ("Ġ", "a"), ("Ġa", "b"), ("b", "c"), ("Ċ", "Ċ")];
        let merged = merges.iter().map(|(left, right)| format!("{left}{right}"));
        let vocab: Vocab = tokens.chain(merged).zip(0..).collect();
        let merges = merges.map(|(left, right)| (left.to_owned(), right.to_owned())).to_vec();
        let bpe = BPE::builder().vocab_and_merges(vocab, merges);
        Tokenizer {
            bpe: bpe.build().unwrap(),
            pipeline: Pipeline::ByteLevel {
                compose: true,
                pre_tokenizer: PreTokenizer::named("qwen2").unwrap(),
            },
            markup: Markup::new(vec![marker("<s>", 900), marker("<e>", 901)]).unwrap(),
            cache: TokenCache::new(),
        }
    }

    fn real() -> Text {
        let path = std::env::var("RUDDER_TEST_MODEL").expect("RUDDER_TEST_MODEL is the path of a GGUF file");
        let file = Gguf::open(path.as_ref()).unwrap();
        let strings = |key: &str| file.strings(key).unwrap().into_iter().map(Into::into).collect();
        Text::from_gguf(TextSource {
            model: file.str("tokenizer.ggml.model").unwrap().into_owned(),
            pre: file.str("tokenizer.ggml.pre").map(Into::into),
            tokens: strings("tokenizer.ggml.tokens"),
            token_types: file
                .ints("tokenizer.ggml.token_type")
                .unwrap()
                .into_iter()
                .map(|kind| kind as i32)
                .collect(),
            merges: strings("tokenizer.ggml.merges"),
            ..TextSource::default()
        })
        .unwrap()
    }

    /// The tokens with nothing remembered and no text between markup cut.
    fn encode_whole(tokenizer: &Tokenizer, text: &str, special: bool) -> Vec<u32> {
        let markers = if special { &tokenizer.markup.all } else { &tokenizer.markup.plain };
        let mut tokens = Vec::new();
        for span in markers.raw.spans(text) {
            match span {
                Span::Token(token, _) => tokens.push(token),
                Span::Text(text) => tokenizer.encode_plain(text, true, &mut tokens).unwrap(),
            }
        }
        tokens
    }

    /// A conversation that grows by one text after another has, each time, the tokens that it has when
    /// nothing is remembered.
    fn grows_exactly(tokenizer: &Tokenizer, start: &str, end: &str, cases: u32) {
        let word = "[a-eA-E]{1,9} |[ \\n\\t]{1,3}|[0-9.,;'(){}/*_-]{1,3}|[é中😀\u{301}ſ]|\\PC";
        let words = prop::collection::vec(word, 1..40).prop_map(|words| words.concat());
        let length = prop_oneof![3 => 0usize..300, 1 => 3900usize..4300, 1 => 8000usize..9000];
        let text = (words, length).prop_map(|(words, length)| {
            let mut text = words.repeat(length / words.len() + 1);
            let cut = (0..=length).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
            text.truncate(cut);
            text
        });
        let glue = prop_oneof![
            Just(String::new()),
            Just(start.to_owned()),
            Just(end.to_owned()),
            Just(format!("{end}\n{start}x\n")),
        ];
        let turns = prop::collection::vec((text, glue), 1..6);
        let config = ProptestConfig { failure_persistence: None, cases, ..Default::default() };
        TestRunner::new(config)
            .run(&(turns, any::<bool>()), |(turns, special)| {
                let mut conversation = String::new();
                for (text, glue) in turns {
                    conversation += &text;
                    conversation += &glue;
                    let mut tokens = Vec::new();
                    tokenizer.encode(&conversation, special, &mut tokens).unwrap();
                    prop_assert!(
                        tokens == encode_whole(tokenizer, &conversation, special),
                        "{conversation:?}"
                    );
                }
                Ok(())
            })
            .unwrap();
    }

    #[test]
    fn a_growing_conversation_has_the_tokens_that_it_has_at_once() {
        grows_exactly(&small(), "<s>", "<e>", 24);
    }

    #[test]
    #[ignore = "needs the default model; run by .ci/run"]
    fn a_growing_conversation_has_the_tokens_that_it_has_at_once_in_a_real_vocabulary() {
        grows_exactly(&real().parts.tokenizer, "<|im_start|>", "<|im_end|>", 200);
    }

    #[test]
    fn of_a_text_that_grows_only_the_end_is_encoded_anew() {
        let tokenizer = small();
        let pieces = |text: &str| {
            let (mut text, mut pieces) = (text, Vec::new());
            while !text.is_empty() {
                let (piece, rest) = text.split_at(tokenizer.pipeline.independent_piece(text));
                pieces.push(piece.to_owned());
                text = rest;
            }
            pieces
        };
        let text = "some words 1 2 3\n".repeat(2000);
        let (before, after) = (pieces(&text), pieces(&(text.clone() + "and more")));
        assert!(before.len() > 5 && before.iter().all(|piece| piece.len() < PIECE_BYTES + 100));
        assert_eq!(before[..before.len() - 1], after[..before.len() - 1]);
        assert_eq!(pieces(&"x".repeat(3 * PIECE_BYTES)).len(), 1, "a word is never cut");
    }

    fn marker(text: &str, token: u32) -> Marker {
        Marker {
            text: text.into(),
            token,
            normalized: None,
            single_word: false,
            strip_left: false,
            strip_right: false,
        }
    }

    #[test]
    fn the_longest_marker_is_found_and_nothing_is_lost() {
        let finder = Finder::new(vec![marker("<a>", 1), marker("<a><b>", 2)]).unwrap();
        assert_eq!(
            finder.spans("x<a><b>y<a>"),
            [Span::Text("x"), Span::Token(2, "<a><b>"), Span::Text("y"), Span::Token(1, "<a>")]
        );
        assert_eq!(finder.spans("plain"), [Span::Text("plain")]);
        assert!(finder.spans("").is_empty());
    }

    #[test]
    fn markers_take_the_whitespace_they_ask_for() {
        let left = Marker { strip_left: true, ..marker("<l>", 1) };
        let right = Marker { strip_right: true, ..marker("<r>", 2) };
        let finder = Finder::new(vec![left, right, marker("\n", 3)]).unwrap();
        assert_eq!(
            finder.spans("a  <l> b <r> \n c"),
            [
                Span::Text("a"),
                Span::Token(1, "  <l>"),
                Span::Text(" b "),
                Span::Token(2, "<r> \n "),
                Span::Text("c")
            ]
        );
    }
}
