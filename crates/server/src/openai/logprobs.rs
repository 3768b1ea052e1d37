//! Log-probabilities in OpenAI's two formats: by token (chat), by column (completions).

use rudder_engine::Token;
use rudder_text::Text;
use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};
use serde_json::Value;

/// JSON has no infinity; OpenAI writes this for what is impossible.
const IMPOSSIBLE: f32 = -9999.0;

fn finite(logprob: f32) -> f32 {
    logprob.max(IMPOSSIBLE)
}

/// A token as text. One that is no whole character is written by its bytes, so that alternatives
/// differ: `bytes:\xe2\x80`.
fn spelled(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap_or_else(|error| {
        let hex = error.as_bytes().iter().map(|byte| format!("\\x{byte:02x}"));
        std::iter::once("bytes:".to_owned()).chain(hex).collect()
    })
}

/// Chat's `logprobs`.
#[derive(Debug, Serialize)]
pub(crate) struct ChatLogprobs {
    content: Vec<ChatToken>,
    refusal: Option<()>,
}

#[derive(Debug, Serialize)]
struct ChatToken {
    #[serde(flatten)]
    token: Alternative,
    top_logprobs: Vec<Alternative>,
}

#[derive(Debug, Serialize)]
struct Alternative {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl Alternative {
    fn new(text: &Text, id: u32, logprob: f32) -> Self {
        let bytes = text.token_bytes(id);
        Self { token: spelled(bytes.clone()), logprob: finite(logprob), bytes }
    }
}

impl ChatLogprobs {
    pub fn new<'t>(text: &Text, tokens: impl IntoIterator<Item = &'t Token>) -> Self {
        let content = tokens
            .into_iter()
            .map(|token| ChatToken {
                token: Alternative::new(text, token.id, token.logprob.unwrap_or(IMPOSSIBLE)),
                top_logprobs: token
                    .top
                    .iter()
                    .map(|other| Alternative::new(text, other.token, other.logprob))
                    .collect(),
            })
            .collect();
        Self { content, refusal: None }
    }

    /// The tokens' entries alone.
    pub fn into_values(self) -> Vec<Value> {
        let values = self.content.iter().map(serde_json::to_value).collect::<Result<_, _>>();
        values.unwrap_or_else(|error| {
            tracing::error!(%error, "log-probabilities could not be serialised");
            Vec::new()
        })
    }
}

/// Completions' `logprobs`: one entry a token in every column.
#[derive(Debug, Default, Serialize)]
pub(crate) struct ColumnLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<TopMap>>,
    /// Characters before the token, in the whole text.
    text_offset: Vec<usize>,
}

/// Alternatives as an object, best first.
#[derive(Debug)]
struct TopMap(Vec<(String, f32)>);

impl Serialize for TopMap {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (token, logprob) in &self.0 {
            map.serialize_entry(token, logprob)?;
        }
        map.end()
    }
}

/// Where the next token of a choice begins, in characters.
#[derive(Debug, Clone, Default)]
pub(crate) struct Offset {
    chars: usize,
}

impl ColumnLogprobs {
    /// Appends a prompt's tokens; `echoed` is the text that repeats it. It lacks what encoding put before the
    /// prompt: a begin token, a space.
    pub fn extend_prompt(&mut self, text: &Text, tokens: &[Token], echoed: &str, offset: &mut Offset) {
        let mut rest = echoed.as_bytes();
        for token in tokens {
            let bytes = text.token_bytes(token.id);
            let shown = match bytes.strip_prefix(b" ") {
                _ if rest.starts_with(&bytes) => &bytes[..],
                Some(word) if rest.len() == echoed.len() && rest.starts_with(word) => word,
                _ if text.is_control(token.id) => &[],
                // Normalised or no UTF-8: about as long as what it became.
                _ => &bytes[..bytes.len().min(rest.len())],
            };
            rest = &rest[shown.len()..];
            let chars = chars(shown);
            self.push(text, token, bytes, offset.chars);
            offset.chars += chars;
        }
        offset.chars = echoed.chars().count();
    }

    /// Appends tokens that continue the text from `offset`, which moves on.
    pub fn extend(&mut self, text: &Text, tokens: &[Token], offset: &mut Offset) {
        for token in tokens {
            let bytes = text.token_bytes(token.id);
            let chars = if text.is_control(token.id) { 0 } else { chars(&bytes) };
            self.push(text, token, bytes, offset.chars);
            offset.chars += chars;
        }
    }

    fn push(&mut self, text: &Text, token: &Token, bytes: Vec<u8>, offset: usize) {
        self.text_offset.push(offset);
        let name = spelled(bytes);
        self.token_logprobs.push(token.logprob.map(finite));
        self.top_logprobs.push(token.logprob.map(|logprob| top_map(text, token, &name, logprob)));
        self.tokens.push(name);
    }
}

/// The characters that begin in these bytes: one that is spread over several tokens counts where it begins.
fn chars(bytes: &[u8]) -> usize {
    bytes.iter().filter(|&&byte| byte & 0xc0 != 0x80).count()
}

/// The alternatives and, if it is not among them, the token itself.
fn top_map(text: &Text, token: &Token, name: &str, logprob: f32) -> TopMap {
    let mut map: Vec<(String, f32)> = Vec::with_capacity(token.top.len() + 1);
    for other in &token.top {
        let name = spelled(text.token_bytes(other.token));
        if !map.iter().any(|(known, _)| *known == name) {
            map.push((name, finite(other.logprob)));
        }
    }
    if !map.iter().any(|(known, _)| known == name) {
        map.push((name.to_owned(), finite(logprob)));
    }
    TopMap(map)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_a_character_is_spelled_by_its_bytes() {
        assert_eq!(spelled(b"fn".to_vec()), "fn");
        assert_eq!(spelled(vec![0xe2, 0x80]), "bytes:\\xe2\\x80");
    }

    #[test]
    fn the_impossible_stays_valid_json() {
        assert_eq!(serde_json::to_string(&finite(f32::NEG_INFINITY)).unwrap(), "-9999.0");
    }
}
