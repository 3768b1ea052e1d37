//! Text to tokens: markup is found first, the text between is cut and merged.

use aho_corasick::{AhoCorasick, MatchKind};
use tokenizers::Model;
use tokenizers::models::bpe::BPE;
use unicode_normalization::{IsNormalized, UnicodeNormalization, is_nfc_quick};

use crate::TextError;
use crate::listed::Listed;
use crate::pretokenizer::PreTokenizer;
use crate::vocab::CHAR_OF_BYTE;

/// Encodes text with a byte-pair vocabulary.
pub(crate) struct Tokenizer {
    pub(crate) bpe: BPE,
    pub(crate) pipeline: Pipeline,
    pub(crate) markup: Markup,
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
    /// Whether it takes the whitespace to its left or right with it.
    pub(crate) strip_left: bool,
    pub(crate) strip_right: bool,
}

/// The markers of a vocabulary: all of them, and those that hold in plain text too.
pub(crate) struct Markup {
    all: Finder,
    plain: Finder,
}

struct Finder {
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
        let finder = if special { &self.markup.all } else { &self.markup.plain };
        let spans = finder.spans(text);
        if let Pipeline::Listed(listed) = &self.pipeline {
            return listed.encode(&self.bpe, text, &spans, out);
        }
        for span in spans {
            match span {
                Span::Token(token, _) => out.push(token),
                Span::Text(text) => self.encode_plain(text, true, out)?,
            }
        }
        Ok(())
    }

    /// Appends the tokens of a text without markup that continues another one: no space is put before it.
    pub(crate) fn encode_continued(&self, text: &str, out: &mut Vec<u32>) -> Result<(), TextError> {
        match &self.pipeline {
            Pipeline::SentencePiece { .. } => self.encode_plain(text, false, out),
            _ => self.encode(text, false, out),
        }
    }

    fn encode_plain(&self, text: &str, first: bool, out: &mut Vec<u32>) -> Result<(), TextError> {
        let mut spelled = String::new();
        match &self.pipeline {
            Pipeline::ByteLevel { compose, pre_tokenizer } => {
                let composed;
                let text = if *compose && is_nfc_quick(text.chars()) != IsNormalized::Yes {
                    composed = text.nfc().collect::<String>();
                    &composed
                } else {
                    text
                };
                pre_tokenizer.split(text, &mut |piece| {
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
            Pipeline::Listed(listed) => listed.encode(&self.bpe, text, &[Span::Text(text)], out),
        }
    }

    fn merge(&self, spelled: &str, out: &mut Vec<u32>) -> Result<(), TextError> {
        let tokens = self.bpe.tokenize(spelled).map_err(broken)?;
        out.extend(tokens.iter().map(|token| token.id));
        Ok(())
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
        Ok(Self { all: Finder::new(markers)?, plain: Finder::new(plain)? })
    }
}

impl Finder {
    fn new(markers: Vec<Marker>) -> Result<Self, TextError> {
        if markers.is_empty() {
            return Ok(Self { automaton: None, markers });
        }
        let automaton = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(markers.iter().map(|marker| &marker.text))
            .map_err(|error| TextError::Model(format!("the model's special tokens are too many: {error}")))?;
        Ok(Self { automaton: Some(automaton), markers })
    }

    /// The text as spans that, put together, are the text.
    fn spans<'t>(&self, text: &'t str) -> Vec<Span<'t>> {
        let mut spans = Vec::new();
        let mut done = 0;
        for found in self.automaton.iter().flat_map(|automaton| automaton.find_iter(text)) {
            // The marker before may have taken whitespace that is a marker itself.
            if found.start() < done {
                continue;
            }
            let marker = &self.markers[found.pattern()];
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
    use super::*;

    fn marker(text: &str, token: u32) -> Marker {
        Marker { text: text.into(), token, strip_left: false, strip_right: false }
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
