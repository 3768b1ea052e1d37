//! A tokenizer from a GGUF file's `tokenizer.*` metadata.

use std::sync::Arc;

use tokenizers::models::bpe::{BPE, Vocab as BpeVocab};

use crate::grammar::Grammars;
use crate::infill::FimTokens;
use crate::pretokenizer::{PreTokenizer, takes_whole_words};
use crate::template::{Template, TemplateSource};
use crate::token_cache::TokenCache;
use crate::tokenizer::{Marker, Markup, Pipeline, Tokenizer};
use crate::vocab::{Kind, Spelling, Vocab};
use crate::{Parts, Text, TextError};

/// Bytes of the longest token of a SentencePiece vocabulary. Those that models were trained with have some dozens;
/// every place where a token may be parted is looked at.
const MAX_PIECE_BYTES: usize = 1024;

/// What a GGUF file says about text; each field names the metadata key it comes from.
#[derive(Debug, Clone, Default)]
pub struct TextSource {
    /// `tokenizer.ggml.model`: `gpt2` (byte-level BPE) or `llama` (SentencePiece BPE).
    pub model: String,
    /// `tokenizer.ggml.pre`: the family of the pre-tokenizer; files without it mean `default`.
    pub pre: Option<String>,
    /// `tokenizer.ggml.tokens`.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.token_type`; empty means that all are normal.
    pub token_types: Vec<i32>,
    /// `tokenizer.ggml.merges`: pairs parted by a space, the first merged first. For `gpt2`.
    pub merges: Vec<String>,
    /// `tokenizer.ggml.scores`: the highest merged first. For `llama`.
    pub scores: Vec<f32>,
    /// `tokenizer.ggml.bos_token_id`.
    pub bos: Option<u32>,
    /// `tokenizer.ggml.eos_token_id`.
    pub eos: Option<u32>,
    /// `tokenizer.ggml.eot_token_id`.
    pub eot: Option<u32>,
    /// `tokenizer.ggml.eom_token_id`.
    pub eom: Option<u32>,
    /// `tokenizer.ggml.padding_token_id`.
    pub pad: Option<u32>,
    /// `tokenizer.ggml.unknown_token_id`.
    pub unknown: Option<u32>,
    /// `tokenizer.ggml.add_bos_token`.
    pub add_bos: Option<bool>,
    /// `tokenizer.ggml.add_space_prefix`.
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.ggml.fim_pre_token_id`.
    pub fim_prefix: Option<u32>,
    /// `tokenizer.ggml.fim_suf_token_id`.
    pub fim_suffix: Option<u32>,
    /// `tokenizer.ggml.fim_mid_token_id`.
    pub fim_middle: Option<u32>,
    /// `tokenizer.ggml.fim_pad_token_id`.
    pub fim_pad: Option<u32>,
    /// `tokenizer.ggml.fim_rep_token_id`.
    pub fim_repo: Option<u32>,
    /// `tokenizer.ggml.fim_sep_token_id`.
    pub fim_separator: Option<u32>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
    /// `tokenizer.chat_template.tool_use`: the template where there are tools, if the file has one more.
    pub tool_use_template: Option<String>,
}

impl Text {
    /// From a GGUF file's metadata.
    ///
    /// # Errors
    /// [`TextError::Model`] if the metadata is incomplete, contradicts itself, or names a kind of
    /// tokenizer that is not known.
    pub fn from_gguf(source: TextSource) -> Result<Self, TextError> {
        let kinds = source.kinds()?;
        let spelling = source.spelling()?;
        let tokens = source.tokens.iter().map(String::as_str).zip(kinds.iter().copied());
        let vocab = Vocab::new(tokens, spelling)?;
        source.check_ids(&vocab)?;

        let markers = vocab
            .specials()
            .map(|(text, token)| Marker {
                text: text.to_owned(),
                token,
                normalized: None,
                single_word: false,
                strip_left: false,
                strip_right: false,
            })
            .collect();
        let markup = Markup::new(markers)?;
        let (pipeline, bpe, add_bos) = match spelling {
            Spelling::ByteLevel => {
                let name = source.pre.as_deref().unwrap_or("default");
                let pre_tokenizer = PreTokenizer::named(name)?;
                let whole = takes_whole_words(name);
                let bpe = source.byte_level_bpe(&vocab, whole)?;
                (Pipeline::ByteLevel { compose: false, pre_tokenizer }, bpe, whole)
            }
            Spelling::SentencePiece => {
                let leading_space = source.add_space_prefix.unwrap_or(true);
                (Pipeline::SentencePiece { leading_space }, source.sentence_piece_bpe(&vocab)?, true)
            }
        };
        let infill = source.fim_tokens(&vocab);
        let stop_tokens = vocab.stop_tokens([source.eos, source.eot, source.eom].into_iter().flatten());
        Ok(Self {
            parts: Arc::new(Parts {
                infill_stop_tokens: infill
                    .as_ref()
                    .map(|fim| fim.stop_tokens(&stop_tokens))
                    .unwrap_or_default(),
                stop_tokens,
                infill,
                template: source.template()?,
                leading_space: matches!(pipeline, Pipeline::SentencePiece { leading_space: true }),
                bos: source.bos,
                add_bos: source.add_bos.unwrap_or(add_bos),
                tokenizer: Arc::new(Tokenizer { bpe, pipeline, markup, cache: TokenCache::new() }),
                grammars: Grammars::default(),
                vocab,
            }),
        })
    }
}

impl TextSource {
    fn spelling(&self) -> Result<Spelling, TextError> {
        match self.model.as_str() {
            "gpt2" => Ok(Spelling::ByteLevel),
            "llama" => Ok(Spelling::SentencePiece),
            other => Err(TextError::Model(format!(
                "the model's tokenizer is of the kind `{other}`; known are `gpt2` (byte-level BPE) and `llama` (SentencePiece BPE)"
            ))),
        }
    }

    fn kinds(&self) -> Result<Vec<Kind>, TextError> {
        if self.tokens.is_empty() {
            return Err(TextError::Model("the model file has no tokens (tokenizer.ggml.tokens)".into()));
        }
        if self.token_types.is_empty() {
            return Ok(vec![Kind::Normal; self.tokens.len()]);
        }
        if self.token_types.len() != self.tokens.len() {
            return Err(TextError::Model(format!(
                "the model file has {} tokens, but {} token types",
                self.tokens.len(),
                self.token_types.len()
            )));
        }
        Ok(self.token_types.iter().map(|&number| Kind::from_gguf(number)).collect())
    }

    fn check_ids(&self, vocab: &Vocab) -> Result<(), TextError> {
        vocab.check("begin", self.bos)?;
        vocab.check("end", self.eos)?;
        vocab.check("end-of-turn", self.eot)?;
        vocab.check("end-of-message", self.eom)?;
        vocab.check("padding", self.pad)?;
        vocab.check("unknown", self.unknown)?;
        let fim = [self.fim_prefix, self.fim_suffix, self.fim_middle];
        let around = [self.fim_pad, self.fim_repo, self.fim_separator];
        fim.into_iter().chain(around).try_for_each(|id| vocab.check("fill-in-the-middle", id))
    }

    /// The tokens that merging may yield: never a special one, whatever the text.
    fn mergeable(&self, vocab: &Vocab) -> BpeVocab {
        (0u32..)
            .zip(&self.tokens)
            .filter(|&(id, _)| matches!(vocab.kind(id), Some(Kind::Normal | Kind::Byte)))
            .map(|(id, token)| (token.clone(), id))
            .collect()
    }

    fn byte_level_bpe(&self, vocab: &Vocab, whole_words: bool) -> Result<BPE, TextError> {
        let mut mergeable = self.mergeable(vocab);
        if self.merges.is_empty() {
            return Err(TextError::Model("the model file has no merges (tokenizer.ggml.merges)".into()));
        }
        let mut merges = Vec::with_capacity(self.merges.len());
        for (index, merge) in self.merges.iter().enumerate() {
            // A space may itself be the first half.
            let parted = merge.char_indices().skip(1).find(|&(_, c)| c == ' ');
            let Some((space, _)) = parted else {
                return Err(TextError::Model(format!(
                    "merge {index} of the model file, `{merge}`, is no pair"
                )));
            };
            merges.push((merge[..space].to_owned(), merge[space + 1..].to_owned()));
        }
        self.admit_merged_specials(&merges, vocab, &mut mergeable);
        bpe(mergeable, merges, whole_words, false)
    }

    /// A token that a merge names is merged, whatever kind the file calls it.
    fn admit_merged_specials(&self, merges: &[(String, String)], vocab: &Vocab, mergeable: &mut BpeVocab) {
        let mut whole = String::new();
        for (left, right) in merges {
            whole.clear();
            whole.push_str(left);
            whole.push_str(right);
            for part in [left, right, &whole] {
                if let Some(id) = vocab.special(part) {
                    mergeable.entry(part.clone()).or_insert(id);
                }
            }
        }
    }

    /// SentencePiece merges the pair whose whole has the highest score; as a list of merges, that is
    /// every way to part a token into two others, the best whole first.
    fn sentence_piece_bpe(&self, vocab: &Vocab) -> Result<BPE, TextError> {
        if self.scores.len() != self.tokens.len() {
            return Err(TextError::Model(format!(
                "the model file has {} tokens, but {} scores (tokenizer.ggml.scores)",
                self.tokens.len(),
                self.scores.len()
            )));
        }
        let mut mergeable = self.mergeable(vocab);
        // Runs of spaces are often listed as words of their own, and still merged.
        let spaces = vocab.specials().filter(|(text, _)| text.chars().all(|c| c == '▁'));
        mergeable.extend(spaces.map(|(text, id)| (text.to_owned(), id)));
        let mut merges = Vec::new();
        for (token, &id) in &mergeable {
            if token.len() > MAX_PIECE_BYTES {
                return Err(TextError::Model(format!(
                    "token {id} of the model file has {} bytes, more than a SentencePiece vocabulary may have \
                     ({MAX_PIECE_BYTES}): the file is damaged, or was converted wrongly",
                    token.len()
                )));
            }
            for (middle, _) in token.char_indices().skip(1) {
                let (left, right) = token.split_at(middle);
                if mergeable.contains_key(left) && mergeable.contains_key(right) {
                    merges.push((id, left.to_owned(), right.to_owned()));
                }
            }
        }
        let score = |id: u32| self.scores[id as usize];
        merges.sort_unstable_by(|a, b| {
            score(b.0).total_cmp(&score(a.0)).then(a.0.cmp(&b.0)).then(b.1.len().cmp(&a.1.len()))
        });
        let merges = merges.into_iter().map(|(_, left, right)| (left, right)).collect();
        bpe(mergeable, merges, false, true)
    }

    fn fim_tokens(&self, vocab: &Vocab) -> Option<FimTokens> {
        let known = FimTokens::well_known(vocab);
        let known = known.as_ref();
        Some(FimTokens {
            prefix: self.fim_prefix.or(known.map(|fim| fim.prefix))?,
            suffix: self.fim_suffix.or(known.map(|fim| fim.suffix))?,
            middle: self.fim_middle.or(known.map(|fim| fim.middle))?,
            pad: self.fim_pad.or(known.and_then(|fim| fim.pad)),
            repo: self.fim_repo.or(known.and_then(|fim| fim.repo)),
            separator: self.fim_separator.or(known.and_then(|fim| fim.separator)),
        })
    }

    fn template(&self) -> Result<Option<Template>, TextError> {
        let Some(chat) = &self.chat_template else { return Ok(None) };
        let name = |id: Option<u32>| id.and_then(|id| self.tokens.get(id as usize)).cloned();
        Template::new(TemplateSource {
            chat,
            tool_use: self.tool_use_template.as_deref(),
            tokens: [
                ("bos_token", name(self.bos)),
                ("eos_token", name(self.eos)),
                ("pad_token", name(self.pad)),
                ("unk_token", name(self.unknown)),
            ],
        })
        .map(Some)
    }
}

/// Builds the merging model, after checking that every merge stays within the vocabulary.
fn bpe(
    vocab: BpeVocab,
    merges: Vec<(String, String)>,
    whole_words: bool,
    byte_fallback: bool,
) -> Result<BPE, TextError> {
    check_merges(merges.iter().map(|(left, right)| (left.as_str(), right.as_str())), |token| {
        vocab.contains_key(token)
    })?;
    BPE::builder()
        .vocab_and_merges(vocab, merges)
        .ignore_merges(whole_words)
        .byte_fallback(byte_fallback)
        .build()
        .map_err(|error| TextError::Model(format!("the model's vocabulary and merges do not fit: {error}")))
}

/// Checks that both halves of every merge and their whole are tokens; the library relies on it.
pub(crate) fn check_merges<'m>(
    merges: impl Iterator<Item = (&'m str, &'m str)>,
    is_token: impl Fn(&str) -> bool,
) -> Result<(), TextError> {
    let mut whole = String::new();
    for (index, (left, right)) in merges.enumerate() {
        whole.clear();
        whole.push_str(left);
        whole.push_str(right);
        if let Some(missing) = [left, right, &whole].into_iter().find(|part| !is_token(part)) {
            return Err(TextError::Model(format!(
                "merge {index} of the model file, `{left} {right}`, needs the token `{missing}`, which its vocabulary lacks"
            )));
        }
    }
    Ok(())
}
