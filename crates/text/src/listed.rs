//! Pipelines that a tokenizer.json lists and that we leave to the `tokenizers` crate.

use tokenizers::models::bpe::BPE;
use tokenizers::normalizer::Range;
use tokenizers::pre_tokenizers::metaspace::PrependScheme;
use tokenizers::{
    Model, NormalizedString, Normalizer, NormalizerWrapper, OffsetType, PreTokenizedString, PreTokenizer,
    PreTokenizerWrapper, Token,
};

use crate::TextError;
use crate::tokenizer::{Span, broken};

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

    /// Appends the tokens of `text`, as the library encodes it, but with our spans of markup.
    pub(crate) fn encode(
        &self,
        bpe: &BPE,
        text: &str,
        spans: &[Span<'_>],
        out: &mut Vec<u32>,
    ) -> Result<(), TextError> {
        let mut text = PreTokenizedString::from(text);
        text.split(|_, whole| Ok(slices(&whole, spans))).map_err(broken)?;
        if let Some(normalizer) = &self.normalizer {
            text.normalize(|piece| normalizer.normalize(piece)).map_err(broken)?;
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
        // Nothing is normalised yet, so both ranges are the same; that of the original would be looked for from
        // the text's beginning on.
        slices.extend(whole.slice(Range::Normalized(range)).map(|slice| (slice, tokens)));
    }
    slices
}
