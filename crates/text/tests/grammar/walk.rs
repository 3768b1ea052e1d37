//! A small vocabulary, and random walks under masks.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use rudder_text::{CompiledGrammar, Text, TextSource};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

/// Marks of all families.
pub const MARKS: [&str; 36] = [
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
    "<|python_tag|>",
    "<|python_start|>",
    "<|python_end|>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[CALL_ID]",
    "[THINK]",
    "[/THINK]",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
    "<|start|>",
    "<|channel|>",
    "<|constrain|>",
    "<|message|>",
    "<|end|>",
    "<|call|>",
    "<|return|>",
    "<|im_start|>",
    "<|fim_prefix|>",
    "<|fim_suffix|>",
    "<|fim_middle|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<|vision_start|>",
    "<|box_end|>",
];

/// All 256 bytes, merged words and [`MARKS`], which are control tokens or words of the text.
pub fn text(words: bool) -> &'static Text {
    static TEXTS: [LazyLock<Text>; 2] = [LazyLock::new(|| make(false)), LazyLock::new(|| make(true))];
    &TEXTS[usize::from(words)]
}

/// One of its own.
pub fn make(words: bool) -> Text {
    let bytes: BTreeSet<String> = ByteLevel::alphabet().into_iter().map(String::from).collect();
    let mut tokens: Vec<String> = bytes.into_iter().collect();
    let merges = [
        "h e", "l l", "he ll", "hell o", "Ġ w", "Ã ©", "i m", "im _", "\" :", "\" ,", "\": Ġ", "Ġ \"",
        "{ \"", "\" }", "} }", "] }", "Ċ Ġ", "* *", "** *", "n a", "na m", "nam e", "t r", "tr u", "tru e",
        "} Ċ", ": Ġ\"",
    ];
    let merges: Vec<&str> = merges.into_iter().filter(|merge| !merge.starts_with("\": ")).collect();
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    let mut token_types = vec![1; tokens.len()];
    for mark in MARKS {
        tokens.push(mark.into());
        let control = !words || mark.starts_with("<|");
        token_types.push(if control { 3 } else { 4 });
    }
    tokens.push("<|im_end|>".into());
    token_types.push(3);
    Text::from_gguf(TextSource {
        model: "gpt2".into(),
        pre: Some("qwen2".into()),
        tokens,
        token_types,
        merges: merges.into_iter().map(String::from).collect(),
        ..TextSource::default()
    })
    .unwrap()
}

/// What ends this or that.
const ENDS: [&str; 22] = [
    "\"",
    "}",
    "]",
    "\n",
    ",",
    "*",
    "E",
    ")",
    "/",
    "e",
    "1",
    "</think>",
    "\n</parameter>",
    "</function>",
    "</arg_value>",
    "</tool_call>",
    "\n</custom_tool_call>",
    "<｜tool▁calls▁end｜>",
    "<|end|>",
    "*** End Patch",
    "<|channel|>commentary",
    "commentary",
];

pub fn stop(text: &Text) -> u32 {
    text.special_token("<|im_end|>").unwrap()
}

pub fn allows(mask: &[u32], token: u32) -> bool {
    mask.get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 == 1)
}

/// Draws allowed tokens at random; the longer it goes, the more it looks for an end.
pub struct Walk {
    pub jump: bool,
    /// Text that goes first, as far as it is allowed.
    pub begin: Vec<u32>,
    pub seed: u64,
    /// An end that is being written, the next token last.
    pub ending: Vec<u32>,
}

impl Walk {
    pub fn new(seed: u64) -> Self {
        Self { jump: true, begin: Vec::new(), seed, ending: Vec::new() }
    }

    fn random(&mut self) -> usize {
        // SplitMix64
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.seed ^ (self.seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb) >> 33) as usize
    }

    pub fn answer(self, text: &Text, grammar: &CompiledGrammar) -> String {
        self.run(text, grammar).0
    }

    /// Text and tokens of an answer, its stop token left out.
    pub fn run(mut self, text: &Text, grammar: &CompiledGrammar) -> (String, Vec<u32>) {
        let mut state = grammar.start();
        let mut tokens = Vec::new();
        let mut mask = vec![0; text.vocab_size().div_ceil(32)];
        loop {
            assert!(tokens.len() < 4_000, "no end: {:?}", text.decode(&tokens, false));
            let shown = tokens.len();
            if self.jump && tokens.len() >= self.begin.len() {
                state.force(&mut tokens).unwrap();
            }
            if state.is_complete() {
                break;
            }
            state.mask(&mut mask).unwrap();
            let token = match self.begin.get(tokens.len()) {
                Some(&token) => token,
                None => self.draw(text, &mask, tokens.len()),
            };
            assert!(allows(&mask, token), "{token} after {:?}", text.decode(&tokens, false));
            if text.stop_tokens().contains(&token) {
                break;
            }
            debug_assert!(tokens.len() >= shown);
            state.accept(token).unwrap();
            tokens.push(token);
        }
        (text.decode(&tokens, false), tokens)
    }

    fn draw(&mut self, text: &Text, mask: &[u32], drawn: usize) -> u32 {
        let allowed: Vec<u32> = (0..text.vocab_size() as u32).filter(|&token| allows(mask, token)).collect();
        assert!(!allowed.is_empty());
        let patience = self.random() % 40;
        if drawn > 40 + patience || self.random().is_multiple_of(8) {
            if let Some(&end) = allowed.iter().find(|token| text.stop_tokens().contains(token)) {
                return end;
            }
            if let Some(token) = self.ending.pop().filter(|token| allowed.contains(token)) {
                return token;
            }
            for _ in 0..4 * ENDS.len() {
                self.ending = text.encode(ENDS[self.random() % ENDS.len()], true, false).unwrap();
                self.ending.reverse();
                if let Some(token) = self.ending.pop().filter(|token| allowed.contains(token)) {
                    return token;
                }
            }
        }
        allowed[self.random() % allowed.len()]
    }
}
