//! Between text and tokens: tokenizer, chat template, incremental detokenizer, stop strings.

use std::sync::Arc;

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
pub struct Text {}

/// Fill-in-the-middle input in the model's own order and tokens.
#[derive(Debug, Clone, Default)]
pub struct Infill {
    /// Text before the hole.
    pub prefix: String,
    /// Text after the hole.
    pub suffix: String,
    /// Other files for context: (name, text); used where the model has repository tokens.
    pub extra: Vec<(String, String)>,
}

impl Text {
    /// Encodes text. `special`: whether markup such as `<|im_start|>` becomes its special token;
    /// `bos`: whether the model's own begin token, if it wants one, is put first.
    pub fn encode(&self, _text: &str, _special: bool, _bos: bool) -> Result<Vec<u32>, TextError> { todo!() }
    /// Decodes a whole sequence; invalid UTF-8 becomes U+FFFD.
    pub fn decode(&self, _tokens: &[u32], _skip_special: bool) -> String { todo!() }
    /// The bytes of one token, as they stand in the text.
    pub fn token_bytes(&self, _token: u32) -> Vec<u8> { todo!() }
    /// Renders the chat template. `messages` is the array as the template expects it (OpenAI's
    /// shape; content flattened to strings), `tools` likewise, `extra` further template variables.
    pub fn render_chat(
        &self,
        _messages: &serde_json::Value,
        _tools: Option<&serde_json::Value>,
        _add_generation_prompt: bool,
        _extra: &serde_json::Map<String, serde_json::Value>,
    ) -> Result<String, TextError> { todo!() }
    /// Tokens of a fill-in-the-middle prompt.
    pub fn encode_infill(&self, _infill: &Infill) -> Result<Vec<u32>, TextError> { todo!() }
    /// Tokens that end a generation (end of text, end of turn; with infill also its markers).
    pub fn stop_tokens(&self) -> &[u32] { todo!() }
    /// Vocabulary size, special tokens included.
    pub fn vocab_size(&self) -> usize { todo!() }
    /// A detokenizer for one sequence.
    pub fn decoder(&self) -> Decoder { todo!() }
}

/// Turns one sequence's tokens into text as they come, never splitting a UTF-8 character.
pub struct Decoder {}

impl Decoder {
    /// Adds a token; appends to `out` whatever text is now certain.
    pub fn push(&mut self, _token: u32, _out: &mut String) { todo!() }
    /// The end: appends what was held back (an unfinished character becomes U+FFFD).
    pub fn finish(&mut self, _out: &mut String) { todo!() }
}

/// Watches text for stop strings, holding back only what could still become one.
pub struct StopMatcher {}

impl StopMatcher {
    /// For these stop strings.
    pub fn new(_stops: Arc<[String]>) -> Self { todo!() }
    /// Adds text; appends to `out` what is certainly outside every stop string. Returns the index
    /// of the stop string that was found: then nothing more is to come.
    pub fn push(&mut self, _text: &str, _out: &mut String) -> Option<usize> { todo!() }
    /// The end without a stop: appends what was held back.
    pub fn finish(&mut self, _out: &mut String) { todo!() }
}
