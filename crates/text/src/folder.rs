//! A tokenizer from a Hugging Face folder: tokenizer.json and the configurations beside it.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;
use tokenizers::models::bpe::BPE;

use crate::gguf::check_merges;
use crate::grammar::Grammars;
use crate::infill::FimTokens;
use crate::listed::{Listed, Steps};
use crate::pretokenizer::PreTokenizer;
use crate::template::{Template, TemplateSource};
use crate::token_cache::TokenCache;
use crate::tokenizer::{Marker, Markup, Pipeline, Tokenizer};
use crate::vocab::{Kind, MAX_VOCAB, Spelling, Vocab};
use crate::{Parts, Text, TextError};

/// What we read of tokenizer.json.
#[derive(Deserialize)]
struct TokenizerFile {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    normalizer: Option<Value>,
    pre_tokenizer: Option<Value>,
    post_processor: Option<Value>,
    decoder: Option<Value>,
    model: Value,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    normalized: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    special: bool,
}

/// What we read of tokenizer_config.json.
#[derive(Default, Deserialize)]
struct ConfigFile {
    chat_template: Option<ChatTemplates>,
    add_bos_token: Option<bool>,
    bos_token: Option<TokenName>,
    eos_token: Option<TokenName>,
    pad_token: Option<TokenName>,
    unk_token: Option<TokenName>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum ChatTemplates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum TokenName {
    Text(String),
    Token { content: String },
}

impl TokenName {
    fn text(&self) -> &str {
        match self {
            Self::Text(text) | Self::Token { content: text } => text,
        }
    }
}

/// What we read of generation_config.json and config.json.
#[derive(Default, Deserialize)]
struct EndConfig {
    eos_token_id: Option<TokenIds>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum TokenIds {
    One(u32),
    Several(Vec<u32>),
}

impl Text {
    /// From a Hugging Face folder: tokenizer.json, and, as far as they are there, tokenizer_config.json,
    /// chat_template.jinja, generation_config.json and config.json.
    ///
    /// # Errors
    /// [`TextError::Model`] if tokenizer.json is missing, a file cannot be read, or the tokenizer is
    /// not of the byte-pair kind.
    pub fn from_folder(folder: &Path) -> Result<Self, TextError> {
        let Some(file) = read::<TokenizerFile>(folder, "tokenizer.json")? else {
            return Err(TextError::Model(format!(
                "{} has no tokenizer.json: save the model's fast tokenizer there (transformers' save_pretrained)",
                folder.display()
            )));
        };
        let config: ConfigFile = read(folder, "tokenizer_config.json")?.unwrap_or_default();
        let spelling = file.spelling()?;
        let (bpe, vocab) = file.model(spelling)?;
        let named = |name: &Option<TokenName>| name.as_ref().and_then(|name| vocab.special(name.text()));
        let bos = named(&config.bos_token).or_else(|| file.begin_token(&vocab));
        let add_bos = config.add_bos_token.unwrap_or_else(|| file.begin_token(&vocab).is_some());

        let mut ends = end_tokens(folder, &vocab)?;
        ends.extend(named(&config.eos_token));
        let stop_tokens = vocab.stop_tokens(ends);
        let infill = FimTokens::well_known(&vocab);
        let pipeline = file.pipeline()?;
        let markup = Markup::new(file.markers(&pipeline)?)?;
        Ok(Self {
            parts: Arc::new(Parts {
                infill_stop_tokens: infill
                    .as_ref()
                    .map(|fim| fim.stop_tokens(&stop_tokens))
                    .unwrap_or_default(),
                stop_tokens,
                infill,
                template: template(folder, config)?,
                leading_space: spelling == Spelling::SentencePiece && file.strips_leading_space(),
                bos,
                add_bos,
                tokenizer: Arc::new(Tokenizer { bpe, pipeline, markup, cache: TokenCache::new() }),
                grammars: Grammars::default(),
                vocab,
            }),
        })
    }
}

impl TokenizerFile {
    fn spelling(&self) -> Result<Spelling, TextError> {
        let names = |part: &Option<Value>, name: &str| {
            part.as_ref().is_some_and(|part| components(part).iter().any(|part| part["type"] == name))
        };
        if names(&self.decoder, "ByteLevel") || names(&self.pre_tokenizer, "ByteLevel") {
            Ok(Spelling::ByteLevel)
        } else if names(&self.decoder, "ByteFallback") || names(&self.decoder, "Metaspace") {
            Ok(Spelling::SentencePiece)
        } else {
            Err(TextError::Model(
                "tokenizer.json spells its tokens neither in bytes (ByteLevel) nor as SentencePiece (ByteFallback, Metaspace)"
                    .into(),
            ))
        }
    }

    fn model(&self, spelling: Spelling) -> Result<(BPE, Vocab), TextError> {
        // Old files leave the type out; what has merges is byte-pair encoding.
        let kind = self.model["type"].as_str().unwrap_or("BPE");
        if kind != "BPE" {
            return Err(TextError::Model(format!(
                "tokenizer.json has a model of the type {kind}; known is BPE (byte-pair encoding)"
            )));
        }
        // What tokens are written with besides their text, in the text and in the merges.
        for mark in ["continuing_subword_prefix", "end_of_word_suffix"] {
            if let Some(mark_text) = self.model[mark].as_str().filter(|text| !text.is_empty()) {
                return Err(TextError::Model(format!(
                    "the model of tokenizer.json has the {mark} `{mark_text}`, which is not supported; known are \
                     byte-level (ByteLevel) and SentencePiece (ByteFallback, Metaspace) vocabularies without one"
                )));
            }
        }
        let parts: ModelParts = parse(&self.model, "model of tokenizer.json")?;
        let merges = parts.merges.iter().map(|merge| match merge {
            Merge::Pair(left, right) => (left.as_str(), right.as_str()),
            Merge::Line(line) => line.split_once(' ').unwrap_or((line, "")),
        });
        check_merges(merges, |token| token.is_empty() || parts.vocab.contains_key(token))?;
        let bpe = parse(&self.model, "model of tokenizer.json")?;
        Ok((bpe, self.vocab(&parts.vocab, spelling)?))
    }

    fn vocab(&self, words: &HashMap<String, u32>, spelling: Spelling) -> Result<Vocab, TextError> {
        let words = words.iter().map(|(text, &id)| (id, text.as_str(), Kind::Normal));
        let added = self.added_tokens.iter().map(|token| {
            let kind = if token.special { Kind::Control } else { Kind::UserDefined };
            (token.id, token.content.as_str(), kind)
        });
        let mut tokens = Vec::new();
        for (id, text, kind) in words.chain(added) {
            let id = id as usize;
            if id >= MAX_VOCAB {
                return Err(TextError::Model(format!(
                    "tokenizer.json gives the token `{text}` the id {id}, past the limit {MAX_VOCAB}"
                )));
            }
            if id >= tokens.len() {
                tokens.resize(id + 1, ("", Kind::Unused));
            }
            tokens[id] = (text, kind);
        }
        Vocab::new(tokens.into_iter(), spelling)
    }

    fn markers(&self, pipeline: &Pipeline) -> Result<Vec<Marker>, TextError> {
        let marker = |token: &AddedToken| {
            let normalized = token.normalized.then(|| pipeline.normalized(&token.content));
            Ok(Marker {
                text: token.content.clone(),
                token: token.id,
                normalized: normalized.transpose()?,
                single_word: token.single_word,
                strip_left: token.lstrip,
                strip_right: token.rstrip,
            })
        };
        self.added_tokens.iter().map(marker).collect()
    }

    /// Our own pre-tokenizer where it can do what the file asks for, else the library's.
    fn pipeline(&self) -> Result<Pipeline, TextError> {
        let compose = match self.normalizer.as_ref().map(components).unwrap_or_default()[..] {
            [] => Some(false),
            [normalizer] if normalizer["type"] == "NFC" => Some(true),
            _ => None,
        };
        let pre_tokenizer =
            self.pre_tokenizer.as_ref().and_then(byte_level_patterns).and_then(PreTokenizer::new);
        if let (Some(compose), Some(pre_tokenizer)) = (compose, pre_tokenizer) {
            return Ok(Pipeline::ByteLevel { compose, pre_tokenizer });
        }
        let first = Steps::new(self.normalizer.as_ref(), self.pre_tokenizer.as_ref())?;
        let [normalizer, pre_tokenizer] =
            [&self.normalizer, &self.pre_tokenizer].map(|part| part.clone().and_then(without_prefix));
        let continued = Steps::new(normalizer.as_ref(), pre_tokenizer.as_ref())?;
        Ok(Pipeline::Listed(Box::new(Listed { first, continued })))
    }

    /// The token that the file's own template puts before a single text.
    fn begin_token(&self, vocab: &Vocab) -> Option<u32> {
        let parts = components(self.post_processor.as_ref()?);
        let template = parts.iter().find(|part| part["type"] == "TemplateProcessing")?;
        vocab.special(template["single"][0]["SpecialToken"]["id"].as_str()?)
    }

    fn strips_leading_space(&self) -> bool {
        let decoder = self.decoder.as_ref().map(components).unwrap_or_default();
        decoder.iter().any(|part| match part["type"].as_str() {
            Some("Strip") => part["content"] == " " && part["start"].as_u64() > Some(0),
            Some("Metaspace") => part["prepend_scheme"] != "never" && part["add_prefix_space"] != false,
            _ => false,
        })
    }
}

/// The vocabulary and merges, read apart from the library to be checked before it relies on them.
#[derive(Deserialize)]
struct ModelParts {
    vocab: HashMap<String, u32>,
    merges: Vec<Merge>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Line(String),
}

/// A normalizer or pre-tokenizer that puts nothing before the text; `None` if it did nothing else.
fn without_prefix(mut part: Value) -> Option<Value> {
    for list in ["normalizers", "pretokenizers"] {
        if let Some(parts) = part.get_mut(list).and_then(Value::as_array_mut) {
            *parts = std::mem::take(parts).into_iter().filter_map(without_prefix).collect();
        }
    }
    match part["type"].as_str() {
        Some("Prepend") => return None,
        Some("Metaspace") => {
            part["prepend_scheme"] = "never".into();
            part["add_prefix_space"] = false.into();
        }
        Some("ByteLevel") => part["add_prefix_space"] = false.into(),
        _ => {}
    }
    Some(part)
}

/// The parts of a sequence, or the one part.
fn components(part: &Value) -> Vec<&Value> {
    for list in ["normalizers", "pretokenizers", "processors", "decoders"] {
        if let Some(parts) = part[list].as_array() {
            return parts.iter().flat_map(components).collect();
        }
    }
    vec![part]
}

/// The patterns of a byte-level pre-tokenizer that consists of plain cuts; `None` if there is more to it.
fn byte_level_patterns(pre_tokenizer: &Value) -> Option<Vec<&str>> {
    let parts = components(pre_tokenizer);
    let (last, cuts) = parts.split_last()?;
    let mut patterns = Vec::new();
    for cut in cuts {
        patterns.push(match cut["type"].as_str()? {
            "Split" if cut["behavior"] == "Isolated" && cut["invert"] != true => {
                cut["pattern"]["Regex"].as_str()?
            }
            "Digits" if cut["individual_digits"] == true => r"\p{N}",
            _ => return None,
        });
    }
    let byte_level = last["type"] == "ByteLevel" && last["add_prefix_space"] == false;
    if last["use_regex"] != false {
        patterns.push(PreTokenizer::gpt2_pattern());
    }
    byte_level.then_some(patterns)
}

fn end_tokens(folder: &Path, vocab: &Vocab) -> Result<Vec<u32>, TextError> {
    for name in ["generation_config.json", "config.json"] {
        let ends = match read::<EndConfig>(folder, name)?.and_then(|config| config.eos_token_id) {
            None => continue,
            Some(TokenIds::One(id)) => vec![id],
            Some(TokenIds::Several(ids)) => ids,
        };
        ends.iter().try_for_each(|&id| vocab.check("end", Some(id)))?;
        return Ok(ends);
    }
    Ok(Vec::new())
}

fn template(folder: &Path, config: ConfigFile) -> Result<Option<Template>, TextError> {
    let mut chat = read_text(folder, "chat_template.jinja")?;
    let mut tool_use = None;
    match config.chat_template {
        None => {}
        Some(ChatTemplates::One(template)) => {
            chat.get_or_insert(template);
        }
        Some(ChatTemplates::Named(templates)) => {
            for NamedTemplate { name, template } in templates {
                match name.as_str() {
                    "default" => {
                        chat.get_or_insert(template);
                    }
                    "tool_use" => tool_use = Some(template),
                    _ => {}
                }
            }
        }
    }
    let Some(chat) = chat else { return Ok(None) };
    let text = |name: Option<TokenName>| name.map(|name| name.text().to_owned());
    Template::new(TemplateSource {
        chat: &chat,
        tool_use: tool_use.as_deref(),
        tokens: [
            ("bos_token", text(config.bos_token)),
            ("eos_token", text(config.eos_token)),
            ("pad_token", text(config.pad_token)),
            ("unk_token", text(config.unk_token)),
        ],
    })
    .map(Some)
}

/// A file of the folder as JSON; `None` if it is not there.
fn read<T: for<'de> Deserialize<'de>>(folder: &Path, name: &str) -> Result<Option<T>, TextError> {
    let Some(text) = read_text(folder, name)? else { return Ok(None) };
    serde_json::from_str(&text)
        .map(Some)
        .map_err(|error| TextError::Model(format!("{} is broken: {error}", folder.join(name).display())))
}

fn read_text(folder: &Path, name: &str) -> Result<Option<String>, TextError> {
    let path = folder.join(name);
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(TextError::Model(format!("{} cannot be read: {error}", path.display()))),
    }
}

fn parse<T: for<'de> Deserialize<'de>>(part: &Value, what: &str) -> Result<T, TextError> {
    T::deserialize(part).map_err(|error| TextError::Model(format!("the {what} is not understood: {error}")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_list_of_no_normalizers_or_of_nfc_alone_leaves_cutting_to_us() {
        let nfc = json!({"type": "NFC"});
        let list = |parts: Value| json!({"type": "Sequence", "normalizers": parts});
        for (normalizer, expected) in [
            (Value::Null, Some(false)),
            (nfc.clone(), Some(true)),
            (list(json!([])), Some(false)),
            (list(json!([list(json!([nfc]))])), Some(true)),
            (list(json!([nfc, {"type": "Lowercase"}])), None),
        ] {
            let file: TokenizerFile = serde_json::from_value(json!({
                "normalizer": normalizer,
                "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true},
                "model": {},
            }))
            .unwrap();
            let composes = match file.pipeline().unwrap() {
                Pipeline::ByteLevel { compose, .. } => Some(compose),
                _ => None,
            };
            assert_eq!(composes, expected, "{normalizer}");
        }
    }
}
