//! Between text and tokens: tokenizer, chat template, incremental detokenizer, stop strings.

mod detokenizer;
mod folder;
mod gguf;
mod grammar;
mod infill;
mod json;
mod listed;
mod member_order;
mod message_loop;
mod output;
mod pretokenizer;
mod schema;
mod stop;
mod template;
mod template_limits;
mod token_cache;
mod tokenizer;
mod tool;
mod vocab;

use std::sync::Arc;

pub use detokenizer::Decoder;
pub use gguf::TextSource;
pub use grammar::{
    AnswerRules, CompiledGrammar, GrammarError, GrammarPart, GrammarSpec, GrammarState, JsonLayout,
};
pub use infill::{FimTokens, Infill};
pub use member_order::in_same_order;
pub use output::{OutputEvent, OutputFormat, OutputParser, ReasoningFormat, ReasoningMarks, ToolFormat};
pub use stop::StopMatcher;
pub use template::{Rendered, TemplateValue};
pub use template_limits::{CallArguments, TemplateLimits};
pub use tool::{Tool, ToolChoice, ToolInput};

/// What text handling can fail with. Every message is fit for a client.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A model file lacks or contradicts something; a fault of the model, found at load.
    #[error("{0}")]
    Model(String),
    /// The chat template refused the messages (`raise_exception`) or failed on them.
    #[error("the model's chat template refused the messages: {0}")]
    Template(String),
    /// The model has no such ability (fill-in-the-middle without its tokens, chat without a template).
    #[error("{0}")]
    Unsupported(String),
}

/// A tokenizer with everything a model file says about text. Cheap to clone.
#[derive(Clone)]
pub struct Text {
    parts: Arc<Parts>,
}

/// What a model file was read into, whatever its format.
struct Parts {
    vocab: vocab::Vocab,
    tokenizer: Arc<tokenizer::Tokenizer>,
    grammars: grammar::Grammars,
    /// The begin token, and whether the model wants it before a text.
    bos: Option<u32>,
    add_bos: bool,
    /// Whether encoding puts a space before a text, which decoding a whole text takes away again.
    leading_space: bool,
    template: Option<template::Template>,
    infill: Option<FimTokens>,
    stop_tokens: Vec<u32>,
    infill_stop_tokens: Vec<u32>,
}

impl Text {
    /// Encodes text. `special`: whether markup such as `<|im_start|>` becomes its special token;
    /// `bos`: whether the model's own begin token, if it wants one, is put first (a text that
    /// already begins with it gets no second one).
    ///
    /// # Errors
    /// If the model's own normalizer or pre-tokenizer fails on the text.
    pub fn encode(&self, text: &str, special: bool, bos: bool) -> Result<Vec<u32>, TextError> {
        let mut tokens = Vec::with_capacity(text.len() / 3 + 1);
        let begin = self.parts.bos.filter(|_| bos && self.parts.add_bos);
        tokens.extend(begin);
        self.parts.tokenizer.encode(text, special, &mut tokens)?;
        if begin.is_some() && tokens.get(1) == begin.as_ref() {
            tokens.remove(0);
        }
        Ok(tokens)
    }

    /// Whether a text may be cut before and behind any markup, and its parts encoded apart: no markup looks at what
    /// stands beside it or takes whitespace with it, none is looked for in normalized text only, and the first stretch
    /// is like the others.
    pub fn cuts_at_markup(&self) -> bool {
        self.parts.tokenizer.cuts_at_markup()
    }

    /// Decodes a whole sequence; invalid UTF-8 becomes U+FFFD. `skip_special` leaves out control
    /// tokens. Where encoding puts a space before a text (SentencePiece), that one is taken away.
    pub fn decode(&self, tokens: &[u32], skip_special: bool) -> String {
        let vocab = &self.parts.vocab;
        let bytes: Vec<u8> = tokens
            .iter()
            .filter(|&&token| !(skip_special && vocab.is_control(token)))
            .flat_map(|&token| vocab.bytes(token))
            .copied()
            .collect();
        let text = String::from_utf8_lossy(&bytes);
        match text.strip_prefix(' ') {
            Some(rest) if self.parts.leading_space => rest.to_owned(),
            _ => text.into_owned(),
        }
    }

    /// The bytes of one token, as they stand in the text. Empty for a token the model has not.
    pub fn token_bytes(&self, token: u32) -> Vec<u8> {
        self.parts.vocab.bytes(token).to_vec()
    }

    /// Whether the token is a control token: a mark such as `<|im_start|>`, which decoders leave out.
    pub fn is_control(&self, token: u32) -> bool {
        self.parts.vocab.is_control(token)
    }

    /// The token written exactly so in text with `special` set: `<|im_end|>`, `<tool_call>`.
    pub fn special_token(&self, text: &str) -> Option<u32> {
        self.parts.vocab.special(text)
    }

    /// How reasoning is marked, where that is by a pair of tokens.
    ///
    /// # Errors
    /// If the model's own normalizer or pre-tokenizer fails.
    pub fn reasoning_marks(&self, format: ReasoningFormat) -> Result<Option<ReasoningMarks>, TextError> {
        let tokens = format.marks().and_then(|(opening, closing)| {
            Some((self.special_token(opening)?, self.special_token(closing)?, closing))
        });
        let Some((opening, closing, mark)) = tokens else { return Ok(None) };
        let end = self.encode(&format!("\n{mark}\n\n"), true, false)?;
        Ok(Some(ReasoningMarks { opening, closing, end }))
    }

    /// Renders the chat template. `messages` is the array as the template expects it (OpenAI's
    /// shape; content flattened to strings), `tools` likewise, `extra` further template variables.
    ///
    /// # Errors
    /// [`TextError::Template`] if the template refuses or fails, [`TextError::Unsupported`] if the
    /// model has none.
    pub fn render_chat(
        &self,
        messages: &serde_json::Value,
        tools: Option<&serde_json::Value>,
        add_generation_prompt: bool,
        extra: &serde_json::Map<String, serde_json::Value>,
    ) -> Result<String, TextError> {
        let messages: Vec<_> = messages.as_array().into_iter().flatten().map(TemplateValue::from).collect();
        let tools = tools.map(TemplateValue::from);
        self.template()?.render(&messages, tools.as_ref(), add_generation_prompt, extra)
    }

    /// The same with messages and tools that were made ready for the template before, up to where the assistant
    /// begins to speak. The first `known` messages, not all of them, need no text: an earlier rendering had them, the
    /// message after them, and the same tools and variables.
    ///
    /// # Errors
    /// As [`Self::render_chat`].
    pub fn render_from(
        &self,
        known: usize,
        messages: &[TemplateValue],
        tools: Option<&TemplateValue>,
        extra: &serde_json::Map<String, serde_json::Value>,
    ) -> Result<Rendered, TextError> {
        self.template()?.render_from(known, messages, tools, extra)
    }

    fn template(&self) -> Result<&template::Template, TextError> {
        self.parts.template.as_ref().ok_or_else(|| {
            TextError::Unsupported(
                "this model has no chat template: use /v1/completions, or serve an instruct model".into(),
            )
        })
    }

    /// Whether the model has a chat template.
    pub fn has_chat_template(&self) -> bool {
        self.parts.template.is_some()
    }

    /// How the model marks tool calls and reasoning, going by its chat template.
    pub fn output_format(&self) -> OutputFormat {
        self.parts.template.as_ref().map(template::Template::output_format).unwrap_or_default()
    }

    /// What the chat template cannot show.
    pub fn template_limits(&self) -> TemplateLimits {
        self.parts.template.as_ref().map(template::Template::limits).unwrap_or_default()
    }

    /// Tokens of a fill-in-the-middle prompt. The texts are taken literally: markup in them is text.
    ///
    /// # Errors
    /// [`TextError::Unsupported`] if the model has no fill-in-the-middle tokens.
    pub fn encode_infill(&self, infill: &Infill) -> Result<Vec<u32>, TextError> {
        let Some(fim) = &self.parts.infill else {
            return Err(TextError::Unsupported(
                "this model has no fill-in-the-middle tokens: use a code model trained for it, such as Qwen2.5-Coder"
                    .into(),
            ));
        };
        let begin = self.parts.bos.filter(|_| self.parts.add_bos);
        infill::encode(fim, &self.parts.tokenizer, begin, infill)
    }

    /// Whether the model has fill-in-the-middle tokens.
    pub fn has_infill(&self) -> bool {
        self.parts.infill.is_some()
    }

    /// Tokens that end a generation: end of text, end of turn. Sorted.
    pub fn stop_tokens(&self) -> &[u32] {
        &self.parts.stop_tokens
    }

    /// Tokens that end a fill-in-the-middle generation: [`Text::stop_tokens`] and the markers of
    /// the prompt itself, which a model that runs on would start anew. Sorted.
    pub fn infill_stop_tokens(&self) -> &[u32] {
        &self.parts.infill_stop_tokens
    }

    /// Vocabulary size, special tokens included.
    pub fn vocab_size(&self) -> usize {
        self.parts.vocab.len()
    }

    /// A detokenizer for one sequence. It leaves out control tokens, and keeps a leading space: what
    /// it is given continues a text.
    pub fn decoder(&self) -> Decoder {
        Decoder::new(self.clone(), Vec::new())
    }

    /// A detokenizer for an answer that an [`OutputParser`] reads: as [`Text::decoder`], but it keeps
    /// those control tokens that the format needs ([`OutputFormat::markers`]).
    pub fn decoder_for(&self, format: OutputFormat) -> Decoder {
        let kept = format.markers().into_iter().filter_map(|marker| self.special_token(marker));
        Decoder::new(self.clone(), kept.collect())
    }
}
