//! Tokens to text as they come: bytes are held back only while they are half a character.

use crate::Text;

/// Turns one sequence's tokens into text as they come, never splitting a UTF-8 character.
pub struct Decoder {
    text: Text,
    /// Control tokens that are text all the same.
    kept: Vec<u32>,
    /// The beginning of a character that is not whole yet: at most three bytes after each push.
    pending: Vec<u8>,
}

impl Decoder {
    pub(crate) fn new(text: Text, kept: Vec<u32>) -> Self {
        Self { text, kept, pending: Vec::new() }
    }

    /// Adds a token; appends to `out` whatever text is now certain.
    pub fn push(&mut self, token: u32, out: &mut String) {
        if self.leaves_out(token) {
            return;
        }
        let bytes = self.text.parts.vocab.bytes(token);
        match std::str::from_utf8(bytes) {
            Ok(text) if self.pending.is_empty() => out.push_str(text),
            _ => {
                self.pending.extend_from_slice(bytes);
                self.release(out);
            }
        }
    }

    /// Whether the token is a mark that is no part of the text.
    pub fn leaves_out(&self, token: u32) -> bool {
        self.text.is_control(token) && !self.kept.contains(&token)
    }

    /// The end: appends what was held back (an unfinished character becomes U+FFFD).
    pub fn finish(&mut self, out: &mut String) {
        if !self.pending.is_empty() {
            out.push(char::REPLACEMENT_CHARACTER);
            self.pending.clear();
        }
    }

    /// Moves whole characters from `pending` to `out`, and replaces what can become none.
    fn release(&mut self, out: &mut String) {
        let mut rest = self.pending.as_slice();
        loop {
            let error = match std::str::from_utf8(rest) {
                Ok(text) => {
                    out.push_str(text);
                    rest = &[];
                    break;
                }
                Err(error) => error,
            };
            let (valid, after) = rest.split_at(error.valid_up_to());
            out.push_str(&String::from_utf8_lossy(valid));
            rest = after;
            let Some(broken) = error.error_len() else { break };
            out.push(char::REPLACEMENT_CHARACTER);
            rest = &rest[broken..];
        }
        let kept = rest.len();
        self.pending.drain(..self.pending.len() - kept);
    }
}
