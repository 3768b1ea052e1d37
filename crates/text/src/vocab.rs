//! The vocabulary as bytes: what each token stands for in the text, in one table.

use std::collections::HashMap;
use std::sync::LazyLock;

use crate::TextError;

/// What a token is for; the discriminants are GGUF's `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Normal = 1,
    Unknown = 2,
    /// Markup that is no text: begin and end of text, of turns.
    Control = 3,
    /// A whole word added to the vocabulary; text, but found before all merging.
    UserDefined = 4,
    /// A filler without meaning.
    Unused = 5,
    /// One byte, for what the vocabulary does not spell.
    Byte = 6,
}

impl Kind {
    /// From GGUF's number; what is not known counts as normal.
    pub(crate) fn from_gguf(number: i32) -> Self {
        match number {
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => Self::Normal,
        }
    }

    /// Whether such a token comes from its own markup alone, never from merging text.
    pub(crate) fn is_special(self) -> bool {
        matches!(self, Self::Unknown | Self::Control | Self::UserDefined)
    }
}

/// How a vocabulary spells bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Spelling {
    /// GPT-2's: each byte is one printable character.
    ByteLevel,
    /// SentencePiece's: UTF-8 with `▁` for the space and `<0xNN>` for lone bytes.
    SentencePiece,
}

/// Upper bound of a token's id; more is taken for a broken file, not for an allocation.
pub(crate) const MAX_VOCAB: usize = 1 << 24;

/// Every token's bytes and kind, and the special tokens by their text.
pub(crate) struct Vocab {
    bytes: Vec<u8>,
    /// Where each token's bytes end in `bytes`; they begin where those of the one before end.
    ends: Vec<usize>,
    kinds: Vec<Kind>,
    specials: HashMap<String, u32>,
}

impl Vocab {
    /// From the tokens in the order of their ids.
    pub(crate) fn new<'t>(
        tokens: impl Iterator<Item = (&'t str, Kind)>,
        spelling: Spelling,
    ) -> Result<Self, TextError> {
        let mut vocab =
            Self { bytes: Vec::new(), ends: Vec::new(), kinds: Vec::new(), specials: HashMap::new() };
        for (text, kind) in tokens {
            let id = vocab.kinds.len();
            if id >= MAX_VOCAB {
                return Err(TextError::Model(format!("the vocabulary has more than {MAX_VOCAB} tokens")));
            }
            let kind = if kind == Kind::Normal && is_turn_end(text) { Kind::Control } else { kind };
            spell(text, kind, spelling, &mut vocab.bytes);
            vocab.ends.push(vocab.bytes.len());
            vocab.kinds.push(kind);
            if kind.is_special() {
                vocab.specials.insert(text.to_owned(), id as u32);
            }
        }
        Ok(vocab)
    }

    pub(crate) fn len(&self) -> usize {
        self.kinds.len()
    }

    /// A token's bytes; none for an id outside the vocabulary.
    pub(crate) fn bytes(&self, token: u32) -> &[u8] {
        let token = token as usize;
        let Some(&end) = self.ends.get(token) else { return &[] };
        let start = if token == 0 { 0 } else { self.ends[token - 1] };
        &self.bytes[start..end]
    }

    pub(crate) fn kind(&self, token: u32) -> Option<Kind> {
        self.kinds.get(token as usize).copied()
    }

    /// Whether the token is markup that a reader of the text should not see.
    pub(crate) fn is_control(&self, token: u32) -> bool {
        matches!(self.kind(token), Some(Kind::Control | Kind::Unknown))
    }

    pub(crate) fn special(&self, text: &str) -> Option<u32> {
        self.specials.get(text).copied()
    }

    pub(crate) fn specials(&self) -> impl Iterator<Item = (&str, u32)> {
        self.specials.iter().map(|(text, &id)| (text.as_str(), id))
    }

    /// Checks that the id that `what` names is a token.
    pub(crate) fn check(&self, what: &str, id: Option<u32>) -> Result<(), TextError> {
        match id {
            Some(id) if id as usize >= self.len() => Err(TextError::Model(format!(
                "the model's {what} token is {id}, but its vocabulary ends at {}",
                self.len()
            ))),
            _ => Ok(()),
        }
    }

    /// The tokens that end a turn or a text: those the model file names, and the well-known ones.
    pub(crate) fn stop_tokens(&self, named: impl IntoIterator<Item = u32>) -> Vec<u32> {
        let mut stop: Vec<u32> =
            named.into_iter().chain(TURN_ENDS.iter().filter_map(|name| self.special(name))).collect();
        // In the harmony format a message ends with `<|end|>`, the turn only with one of these.
        if let (Some(end), Some(_), Some(_)) =
            (self.special("<|end|>"), self.special("<|return|>"), self.special("<|call|>"))
        {
            stop.retain(|&token| token != end);
        }
        stop.sort_unstable();
        stop.dedup();
        stop
    }
}

/// Well-known tokens that end a turn or a text.
const TURN_ENDS: [&str; 14] = [
    "<|im_end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|EOT|>",
    "<end_of_turn>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<EOT>",
    "▁<EOT>",
];

/// Whether a token is a well-known end in the shape that no text merges into. Some files call them normal.
fn is_turn_end(text: &str) -> bool {
    text.starts_with("<|") && TURN_ENDS.contains(&text)
}

/// Appends the bytes that a token stands for.
fn spell(text: &str, kind: Kind, spelling: Spelling, out: &mut Vec<u8>) {
    match (kind, spelling) {
        (Kind::Unused, _) => {}
        (Kind::Normal | Kind::Byte, Spelling::ByteLevel) => {
            for c in text.chars() {
                match BYTE_OF_CHAR.get(c as usize).copied().flatten() {
                    Some(byte) => out.push(byte),
                    None => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
                }
            }
        }
        (_, Spelling::SentencePiece) if lone_byte(text).is_some() => out.extend(lone_byte(text)),
        (Kind::Control | Kind::Unknown, _) | (_, Spelling::ByteLevel) => {
            out.extend_from_slice(text.as_bytes());
        }
        (_, Spelling::SentencePiece) => out.extend_from_slice(text.replace('▁', " ").as_bytes()),
    }
}

/// The byte of SentencePiece's `<0xNN>`.
fn lone_byte(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

/// GPT-2's character of each byte (`bytes_to_unicode` in its encoder.py): printable ones stand for
/// themselves, the others follow from U+0100 on.
pub(crate) static CHAR_OF_BYTE: LazyLock<[char; 256]> = LazyLock::new(|| {
    let mut next = 0x100u32;
    std::array::from_fn(|byte| match byte as u8 {
        b @ (b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF) => b as char,
        _ => {
            next += 1;
            char::from_u32(next - 1).expect("at most 256 past U+0100")
        }
    })
});

/// The inverse of [`CHAR_OF_BYTE`], by code point.
static BYTE_OF_CHAR: LazyLock<Vec<Option<u8>>> = LazyLock::new(|| {
    let mut bytes = vec![None; 0x200];
    for (byte, &c) in CHAR_OF_BYTE.iter().enumerate() {
        bytes[c as usize] = Some(byte as u8);
    }
    bytes
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_characters_are_those_of_gpt2() {
        assert_eq!(CHAR_OF_BYTE[b' ' as usize], 'Ġ');
        assert_eq!(CHAR_OF_BYTE[b'\n' as usize], 'Ċ');
        assert_eq!(CHAR_OF_BYTE[0xAD], 'Ń');
        assert_eq!(CHAR_OF_BYTE[b'a' as usize], 'a');
        for byte in 0..=255u8 {
            assert_eq!(BYTE_OF_CHAR[CHAR_OF_BYTE[byte as usize] as usize], Some(byte));
        }
    }

    #[test]
    fn tokens_spell_their_bytes() {
        let tokens =
            [("Ġa", Kind::Normal), ("Ã", Kind::Normal), ("<|x|>", Kind::Control), ("[PAD]", Kind::Unused)];
        let vocab = Vocab::new(tokens.into_iter(), Spelling::ByteLevel).unwrap();
        assert_eq!(vocab.bytes(0), b" a");
        assert_eq!(vocab.bytes(1), [0xC3]);
        assert_eq!(vocab.bytes(2), b"<|x|>");
        assert_eq!(vocab.bytes(3), b"");
        assert_eq!(vocab.bytes(4), b"");

        let tokens = [("▁a▁", Kind::Normal), ("<0xC3>", Kind::Byte), ("é", Kind::Normal)];
        let vocab = Vocab::new(tokens.into_iter(), Spelling::SentencePiece).unwrap();
        assert_eq!(vocab.bytes(0), b" a ");
        assert_eq!(vocab.bytes(1), [0xC3]);
        assert_eq!(vocab.bytes(2), "é".as_bytes());
    }

    #[test]
    fn ends_are_found_and_harmony_goes_on_after_a_message() {
        let kinds = |names: &[&'static str]| {
            let tokens: Vec<_> = names.iter().map(|&name| (name, Kind::Control)).collect();
            Vocab::new(tokens.into_iter(), Spelling::ByteLevel).unwrap()
        };
        assert_eq!(kinds(&["a", "<|im_end|>", "<|end|>"]).stop_tokens([0]), [0, 1, 2]);
        assert_eq!(kinds(&["<|return|>", "<|call|>", "<|end|>"]).stop_tokens([]), [0, 1]);
        // `</s>` in a byte-level vocabulary is a piece of HTML.
        let html = Vocab::new([("</s>", Kind::Normal)].into_iter(), Spelling::ByteLevel).unwrap();
        assert!(html.stop_tokens([]).is_empty());
    }
}
