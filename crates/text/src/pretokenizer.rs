//! Pre-tokenizers of byte-level vocabularies: where a text is cut before merging.
//!
//! Each family's cuts are regular expressions published in its tokenizer.json (for GPT-2 in its
//! encoder.py). They all hold one look-ahead, `\s+(?!\S)`, which would need a backtracking engine.
//! It only says that a run of whitespace leaves its last character to the word that follows; done by
//! hand, a linear-time engine does the rest.

use regex::Regex;
use regex_syntax::ast::{self, Ast};

use crate::TextError;

/// One cut of the text after another; each piece of a stage is cut further by the next.
pub(crate) struct PreTokenizer {
    stages: Vec<Stage>,
    /// Whether a space between two ASCII letters always begins a piece.
    cuts_words: bool,
}

/// One regular expression: its matches and what lies between them are the pieces.
struct Stage {
    regex: Regex,
    /// Which runs of whitespace leave their last character to the next piece.
    lookahead: Lookahead,
}

#[derive(Clone, Copy, PartialEq)]
enum Lookahead {
    None,
    /// All of them.
    Whitespace,
    /// Those that do not end a line; a run up to a line's end is an alternative of its own.
    WithinLine,
}

/// The look-ahead as all families write it, and the alternative that remains without it.
const LOOKAHEAD: &str = r"|\s+(?!\S)|\s+";
const WITHOUT: &str = r"|\s+";

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK3: &str = r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Expressions that take a space and the letters after it as one match and, like all of [`FAMILIES`],
/// never match a letter and a space after it.
const WORDS: [&str; 8] = [GPT2, LLAMA3, QWEN2, QWEN35, GPT4O, TEKKEN, DEEPSEEK3, r"\s?\p{L}+"];

/// GGUF names (`tokenizer.ggml.pre`) and the stages they stand for.
const FAMILIES: &[(&[&str], &[&str])] = &[
    (&["qwen2", "deepseek-r1-qwen"], &[QWEN2]),
    (&["qwen35"], &[QWEN35]),
    (&["llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2", "smaug-bpe", "dbrx"], &[LLAMA3]),
    (&["smollm", "starcoder", "refact", "command-r", "codeshell"], &[r"\p{N}", GPT2]),
    (&["gpt-2", "phi-2", "mpt", "olmo"], &[GPT2]),
    (&["gpt-4o", "llama4"], &[GPT4O]),
    (&["tekken"], &[TEKKEN]),
    (&["deepseek-coder"], &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\u{d7ff}]+", r"\p{N}"]),
    (&["deepseek-v3"], &[r"\p{N}{1,3}", "[一-龥\u{3040}-ゟ゠-ヿ]+", DEEPSEEK3]),
    // What llama.cpp does for files from before the names were written.
    (&["default"], &[r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]),
];

/// Whether a family's words are taken whole from the vocabulary where they stand in it, whatever the merges
/// say (`ignore_merges` in tokenizer.json). GGUF does not record it. The same families want a begin token
/// where the file does not say.
pub(crate) fn takes_whole_words(name: &str) -> bool {
    matches!(name, "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "lfm2" | "tekken")
}

impl PreTokenizer {
    /// By its name in a GGUF file.
    pub(crate) fn named(name: &str) -> Result<Self, TextError> {
        let Some((_, stages)) = FAMILIES.iter().find(|(names, _)| names.contains(&name)) else {
            let known: Vec<_> = FAMILIES.iter().flat_map(|(names, _)| names.iter().copied()).collect();
            return Err(TextError::Model(format!(
                "the model's pre-tokenizer `{name}` is not known; known are {}",
                known.join(", ")
            )));
        };
        Self::new(stages.iter().copied())
            .ok_or_else(|| TextError::Model(format!("the pre-tokenizer `{name}` does not compile")))
    }

    /// From regular expressions; `None` if one needs more look-around than can be done by hand.
    pub(crate) fn new<'p>(patterns: impl IntoIterator<Item = &'p str>) -> Option<Self> {
        let patterns: Vec<&str> = patterns.into_iter().collect();
        let known = |pattern| FAMILIES.iter().any(|(_, stages)| stages.contains(pattern));
        let cuts_words = patterns.iter().all(known) && patterns.iter().any(|cut| WORDS.contains(cut));
        let stages = patterns.into_iter().map(Stage::new).collect::<Option<_>>()?;
        Some(Self { stages, cuts_words })
    }

    /// Where the first word from byte `from` on begins, with the space before it: what stands before
    /// and what stands after is cut the same when it is cut apart. `None` if there is no such place,
    /// or if the expressions are not known well enough.
    pub(crate) fn word_after(&self, text: &str, from: usize) -> Option<usize> {
        if !self.cuts_words {
            return None;
        }
        // No expression looks further back than the match it makes, and of a word's end none looks
        // further ahead than the space. Unicode's composed form does not join letters over a space.
        let word = |around: &[u8]| {
            around[0].is_ascii_alphabetic() && around[1] == b' ' && around[2].is_ascii_alphabetic()
        };
        let at = text.as_bytes().get(from.saturating_sub(1)..)?.windows(3).position(word)?;
        Some(from.saturating_sub(1) + at + 1)
    }

    /// The pattern that byte-level pre-tokenizing means in a tokenizer.json unless told otherwise.
    pub(crate) fn gpt2_pattern() -> &'static str {
        GPT2
    }

    /// Calls `piece` with one piece of the text after the other.
    pub(crate) fn split<E>(
        &self,
        text: &str,
        piece: &mut impl FnMut(&str) -> Result<(), E>,
    ) -> Result<(), E> {
        cut(&self.stages, text, piece)
    }
}

fn cut<E>(stages: &[Stage], text: &str, piece: &mut impl FnMut(&str) -> Result<(), E>) -> Result<(), E> {
    let Some((stage, further)) = stages.split_first() else { return piece(text) };
    let mut done = 0;
    while let Some(found) = stage.regex.find_at(text, done) {
        if found.start() > done {
            cut(further, &text[done..found.start()], piece)?;
        }
        done = found.start() + stage.kept(found.as_str(), found.end() == text.len());
        cut(further, &text[found.start()..done], piece)?;
    }
    if done < text.len() { cut(further, &text[done..], piece) } else { Ok(()) }
}

impl Stage {
    fn new(pattern: &str) -> Option<Self> {
        let (pattern, lookahead) = match pattern.strip_suffix(LOOKAHEAD) {
            None => (pattern.to_owned(), Lookahead::None),
            Some(start) => {
                let line_end =
                    [r"\s*[\r\n]", "\\s*[\r\n]"].iter().any(|alternative| start.contains(alternative));
                let lookahead = if line_end { Lookahead::WithinLine } else { Lookahead::Whitespace };
                (format!("{start}{WITHOUT}"), lookahead)
            }
        };
        // A quantifier upon another (`x++`) makes it possessive elsewhere, and repeats it in this engine.
        ast::visit(&ast::parse::Parser::new().parse(&pattern).ok()?, SingleQuantifiers).ok()?;
        // An expression that can match nothing would never come forward.
        let shortest = regex_syntax::parse(&pattern).ok()?.properties().minimum_len()?;
        if shortest == 0 {
            return None;
        }
        Some(Self { regex: Regex::new(&pattern).ok()?, lookahead })
    }

    /// How many bytes of a match this piece keeps.
    fn kept(&self, found: &str, at_end: bool) -> usize {
        let Some(last) = found.chars().next_back().filter(|c| c.is_whitespace()) else { return found.len() };
        let ends_line = matches!(last, '\r' | '\n') && self.lookahead == Lookahead::WithinLine;
        if self.lookahead == Lookahead::None || at_end || ends_line {
            return found.len();
        }
        let rest = found.len() - last.len_utf8();
        if rest > 0 && found[..rest].chars().all(char::is_whitespace) { rest } else { found.len() }
    }
}

/// Looks over an expression; an error if a quantifier stands right upon another.
struct SingleQuantifiers;

impl ast::Visitor for SingleQuantifiers {
    type Output = ();
    type Err = ();

    fn finish(self) -> Result<(), ()> {
        Ok(())
    }

    fn visit_pre(&mut self, part: &Ast) -> Result<(), ()> {
        match part {
            Ast::Repetition(outer) if matches!(*outer.ast, Ast::Repetition(_)) => Err(()),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::test_runner::TestRunner;

    use super::*;

    fn pieces(name: &str, text: &str) -> Vec<String> {
        pieces_of(&PreTokenizer::named(name).unwrap(), text)
    }

    fn pieces_of(pre_tokenizer: &PreTokenizer, text: &str) -> Vec<String> {
        let mut out = Vec::new();
        let mut piece = |piece: &str| -> Result<(), ()> {
            out.push(piece.to_owned());
            Ok(())
        };
        pre_tokenizer.split(text, &mut piece).unwrap();
        out
    }

    #[test]
    fn every_family_compiles_and_cuts_without_loss() {
        let text = "def f(x):\n    return x+1  # it's 1234 \t\r\n\n 中文 ñ\u{a0}\u{a0}x 👩‍💻  ";
        for (names, _) in FAMILIES {
            for name in *names {
                assert_eq!(pieces(name, text).concat(), text, "{name}");
            }
        }
    }

    #[test]
    fn whitespace_leaves_one_space_to_the_word() {
        assert_eq!(pieces("qwen2", "a   b"), ["a", "  ", " b"]);
        assert_eq!(pieces("qwen2", "a   "), ["a", "   "]);
        assert_eq!(pieces("qwen2", "a \n\n  b"), ["a", " \n\n", " ", " b"]);
        assert_eq!(pieces("qwen2", "a\n b"), ["a", "\n", " b"]);
        assert_eq!(pieces("gpt-2", "a\n\nb"), ["a", "\n", "\n", "b"]);
        assert_eq!(pieces("gpt-2", "a\n  b"), ["a", "\n ", " b"]);
    }

    #[test]
    fn digits_go_by_family() {
        assert_eq!(pieces("qwen2", "x12345"), ["x", "1", "2", "3", "4", "5"]);
        assert_eq!(pieces("llama-bpe", "x12345"), ["x", "123", "45"]);
        assert_eq!(pieces("gpt-2", "x 12345"), ["x", " 12345"]);
        assert_eq!(pieces("smollm", "x 12"), ["x", " ", "1", "2"]);
    }

    #[test]
    fn contractions_go_by_family() {
        assert_eq!(pieces("qwen2", "I'LL don't"), ["I", "'LL", " don", "'t"]);
        assert_eq!(pieces("gpt-2", "I'LL"), ["I", "'", "LL"]);
    }

    #[test]
    fn a_text_cut_between_words_is_cut_the_same() {
        let named = |(names, _): &(&[&'static str], _)| (names[0], PreTokenizer::named(names[0]).unwrap());
        let families: Vec<_> = FAMILIES.iter().map(named).collect();
        let part = "[a-cS'9é中\u{301}]{0,3}[ \n\t./\u{a0}]{0,3}|a b|'s";
        let parts = prop::collection::vec(part, 0..40);
        let config = ProptestConfig { failure_persistence: None, ..Default::default() };
        let cuts_the_same = |(parts, from): (Vec<String>, usize)| {
            let text = parts.concat();
            for (name, family) in &families {
                let Some(word) = family.word_after(&text, from) else { continue };
                prop_assert!(word >= from);
                let (head, tail) = text.split_at(word);
                let apart = [pieces_of(family, head), pieces_of(family, tail)].concat();
                prop_assert_eq!(pieces_of(family, &text), apart, "{}", name);
            }
            Ok(())
        };
        TestRunner::new(config).run(&(parts, 0usize..60), cuts_the_same).unwrap();
    }

    #[test]
    fn words_are_found_and_only_where_the_expressions_are_known() {
        let qwen = PreTokenizer::named("qwen2").unwrap();
        assert_eq!(qwen.word_after("ab cd ef", 0), Some(2));
        assert_eq!(qwen.word_after("ab cd ef", 2), Some(2));
        assert_eq!(qwen.word_after("ab cd ef", 3), Some(5));
        for without in ["", "a", "ab\ncd", "ab 1", "1 b", "ab  c", "ab "] {
            assert_eq!(qwen.word_after(without, 0), None, "{without:?}");
        }
        assert_eq!(qwen.word_after("a b", 9), None);
        assert!(FAMILIES.iter().all(|(names, _)| PreTokenizer::named(names[0]).unwrap().cuts_words));
        assert!(!PreTokenizer::new([QWEN2, r"\w \w"]).unwrap().cuts_words);
        assert!(!PreTokenizer::new([r"\p{N}"]).unwrap().cuts_words, "digits alone leave words together");
    }

    #[test]
    fn deepseek_takes_words_whole_and_punctuation_with_the_ascii_behind_it() {
        for (text, expected) in [
            ("naïve", &["naïve"][..]),
            ("Übung\nCafé au", &["Übung", "\n", "Café", " au"]),
            ("a_b[c:d{e", &["a", "_b", "[c", ":d", "{e"]),
            (".naïve", &[".na", "ïve"]),
        ] {
            assert_eq!(pieces("deepseek-v3", text), expected);
        }
    }

    #[test]
    fn an_unknown_name_is_refused_with_the_known_ones() {
        let Err(error) = PreTokenizer::named("klingon") else { panic!("accepted") };
        assert!(error.to_string().contains("`klingon`") && error.to_string().contains("qwen2"), "{error}");
    }

    #[test]
    fn expressions_beyond_a_linear_engine_are_left_to_others() {
        assert!(PreTokenizer::new([r"(?=x)y"]).is_none());
        assert!(PreTokenizer::new([r"x*"]).is_none());
        assert!(PreTokenizer::new([r"\b"]).is_none());
        for possessive in [r"x?+y", r"(ab*+c)+", r"x++", r"\p{N}{1,3}+"] {
            assert!(PreTokenizer::new([possessive]).is_none(), "{possessive}");
        }
        assert!(PreTokenizer::new([r"x+\++[?+]+(?:y+)+"]).is_some());
    }
}
