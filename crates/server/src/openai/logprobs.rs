//! Log-probabilities in OpenAI's two formats: by token (chat), by column (completions).

use rudder_engine::Token;
use rudder_text::Text;
use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};

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
    pub fn new(text: &Text, tokens: &[Token]) -> Self {
        let content = tokens
            .iter()
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
    /// Appends tokens that continue the text from `offset`, which moves on.
    pub fn extend(&mut self, text: &Text, tokens: &[Token], offset: &mut Offset) {
        for token in tokens {
            let bytes = text.token_bytes(token.id);
            self.text_offset.push(offset.chars);
            // A character that is spread over several tokens counts where it begins.
            offset.chars += bytes.iter().filter(|&&byte| byte & 0xc0 != 0x80).count();
            let name = spelled(bytes);
            self.token_logprobs.push(token.logprob.map(finite));
            self.top_logprobs.push(token.logprob.map(|logprob| top_map(text, token, &name, logprob)));
            self.tokens.push(name);
        }
    }
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
