//! Pipelines that a tokenizer.json lists and that we leave to the `tokenizers` crate.

use std::panic::{AssertUnwindSafe, catch_unwind};

use serde::Deserialize;
use serde_json::Value;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizer::Range;
use tokenizers::pre_tokenizers::metaspace::PrependScheme;
use tokenizers::{
    Model, NormalizedString, Normalizer, NormalizerWrapper, OffsetType, PreTokenizedString, PreTokenizer,
    PreTokenizerWrapper, Token,
};

use crate::TextError;
use crate::tokenizer::{Finder, Span, broken};

/// What a tokenizer.json lists.
pub(crate) struct Listed {
    /// For a text of its own.
    pub(crate) first: Steps,
    /// For a text that continues another one: the same, but that nothing is put before it.
    pub(crate) continued: Steps,
}

/// A normalizer and a pre-tokenizer of the library's.
pub(crate) struct Steps {
    pub(crate) normalizer: Option<NormalizerWrapper>,
    pub(crate) pre_tokenizer: Option<PreTokenizerWrapper>,
}

impl Steps {
    /// Of a tokenizer.json.
    ///
    /// # Errors
    /// If the library does not understand them, or would panic or hang at texts.
    pub(crate) fn new(normalizer: Option<&Value>, pre_tokenizer: Option<&Value>) -> Result<Self, TextError> {
        Ok(Self {
            normalizer: normalizer.map(|part| read("normalizer", part)).transpose()?,
            pre_tokenizer: pre_tokenizer.map(|part| read("pre_tokenizer", part)).transpose()?,
        })
    }

    /// Whether a text's first stretch is encoded otherwise than the same stretch after markup.
    pub(crate) fn sees_the_start(&self) -> bool {
        fn sees(pre_tokenizer: &PreTokenizerWrapper) -> bool {
            match pre_tokenizer {
                PreTokenizerWrapper::Metaspace(metaspace) => metaspace.prepend_scheme == PrependScheme::First,
                PreTokenizerWrapper::Sequence(parts) => parts.as_ref().iter().any(sees),
                _ => false,
            }
        }
        self.pre_tokenizer.as_ref().is_some_and(sees)
    }

    /// The text as it is when it is cut.
    ///
    /// # Errors
    /// If the normalizer fails on it.
    pub(crate) fn normalized(&self, text: &str) -> Result<String, TextError> {
        guarded(|| {
            let mut text = NormalizedString::from(text);
            if let Some(normalizer) = &self.normalizer {
                normalizer.normalize(&mut text).map_err(broken)?;
            }
            Ok(text.get().to_owned())
        })
    }

    /// Appends the tokens of `text`, as the library encodes it, but with our spans of markup, and with our markers
    /// of normalized text found between those.
    ///
    /// # Errors
    /// If the library fails on the text; it may panic at what the file lists.
    pub(crate) fn encode(
        &self,
        bpe: &BPE,
        text: &str,
        spans: &[Span<'_>],
        normalized: &Finder,
        out: &mut Vec<u32>,
    ) -> Result<(), TextError> {
        guarded(|| self.encode_unguarded(bpe, text, spans, normalized, out))
    }

    fn encode_unguarded(
        &self,
        bpe: &BPE,
        text: &str,
        spans: &[Span<'_>],
        normalized: &Finder,
        out: &mut Vec<u32>,
    ) -> Result<(), TextError> {
        let mut text = PreTokenizedString::from(text);
        text.split(|_, whole| Ok(slices(&whole, spans))).map_err(broken)?;
        if let Some(normalizer) = &self.normalizer {
            text.normalize(|piece| normalizer.normalize(piece)).map_err(broken)?;
        }
        if !normalized.is_empty() {
            text.split(|_, piece| Ok(slices(&piece, &normalized.spans(piece.get())))).map_err(broken)?;
        }
        if let Some(pre_tokenizer) = &self.pre_tokenizer {
            pre_tokenizer.pre_tokenize(&mut text).map_err(broken)?;
        }
        text.tokenize(|piece| bpe.tokenize(piece.get())).map_err(broken)?;
        let encoding = text.into_encoding(None, 0, OffsetType::None).map_err(broken)?;
        out.extend_from_slice(encoding.get_ids());
        Ok(())
    }
}

/// What work with the library comes to, which may panic. Of what it changes the library keeps only a cache, which it
/// passes over where that was left locked.
fn guarded<T>(work: impl FnOnce() -> Result<T, TextError>) -> Result<T, TextError> {
    let panicked = |_| Err(broken("tokenizer.json lists a step that panics at it".into()));
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(panicked)
}

/// A normalizer or pre-tokenizer as the library has it.
fn read<T: for<'de> Deserialize<'de>>(what: &str, part: &Value) -> Result<T, TextError> {
    check(what, part)?;
    let refused =
        |why: &str| TextError::Model(format!("the {what} of tokenizer.json is not understood: {why}"));
    catch_unwind(|| T::deserialize(part))
        .map_err(|_| refused("it is damaged, or of another version"))?
        .map_err(|error| refused(&error.to_string()))
}

/// Refuses parts that the library takes and then panics at, or makes room for without end.
fn check(what: &str, part: &Value) -> Result<(), TextError> {
    for list in ["normalizers", "pretokenizers"] {
        part[list].as_array().into_iter().flatten().try_for_each(|part| check(what, part))?;
    }
    let fault = match part["type"].as_str() {
        Some("FixedLength") if part["length"] == 0 => "pieces of the length 0",
        Some("Precompiled") if !part["precompiled_charsmap"].as_str().is_some_and(is_whole) => {
            "a precompiled_charsmap that is shorter than it says"
        }
        _ => return Ok(()),
    };
    Err(TextError::Model(format!(
        "the {what} of tokenizer.json has a part {} with {fault}: the file is damaged",
        part["type"]
    )))
}

/// Whether a table of SentencePiece's, in base64, may have as many bytes as it begins with saying.
fn is_whole(table: &str) -> bool {
    let digit = |character: u8| match character {
        b'A'..=b'Z' => Some(character - b'A'),
        b'a'..=b'z' => Some(character - b'a' + 26),
        b'0'..=b'9' => Some(character - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    // Six digits are 36 bits; the first 32 are the count, its lowest byte first.
    let bits = table.as_bytes().get(..6).and_then(|digits| {
        digits.iter().try_fold(0u64, |bits, &character| Some(bits << 6 | u64::from(digit(character)?)))
    });
    let bytes = bits.map(|bits| ((bits >> 4) as u32).swap_bytes());
    bytes.is_some_and(|bytes| bytes as usize <= table.len() / 4 * 3)
}

/// The spans as slices of the library's own kind of string.
fn slices(whole: &NormalizedString, spans: &[Span<'_>]) -> Vec<(NormalizedString, Option<Vec<Token>>)> {
    let mut done = 0;
    let mut slices = Vec::with_capacity(spans.len());
    for &span in spans {
        let (Span::Text(text) | Span::Token(_, text)) = span;
        let range = done..done + text.len();
        done = range.end;
        let tokens = match span {
            Span::Text(_) => None,
            Span::Token(id, text) => Some(vec![Token::new(id, text.to_owned(), (0, text.len()))]),
        };
        // That of the original, even where both are the same, would be looked for from the text's beginning on.
        slices.extend(whole.slice(Range::Normalized(range)).map(|slice| (slice, tokens)));
    }
    slices
}
